"""Markov chain Monte Carlo engines on a `Problem`, by blackjax."""

from scoreprior.mcmc.ensemble import MEADS, ChEES
from scoreprior.mcmc.gaussian_prior import EllipticalSlice, LatentGaussian
from scoreprior.mcmc.gradient import HMC, MALA, Barker, DynamicHMC
from scoreprior.mcmc.gradient_free import RandomWalk, Slice
from scoreprior.mcmc.microcanonical import MCLMC, AdjustedMCLMC
from scoreprior.mcmc.nuts import NUTS
from scoreprior.mcmc.start import GivenValues, GuideDraws, PriorDraws

__all__ = [
    "HMC",
    "MALA",
    "MCLMC",
    "MEADS",
    "NUTS",
    "AdjustedMCLMC",
    "Barker",
    "ChEES",
    "DynamicHMC",
    "EllipticalSlice",
    "GivenValues",
    "GuideDraws",
    "LatentGaussian",
    "PriorDraws",
    "RandomWalk",
    "Slice",
]
