"""Markov chain Monte Carlo engines on a `Problem`, by blackjax; samplers that follow a score."""

from scoreprior.mcmc.annealed import AnnealedLangevin, PredictorCorrector
from scoreprior.mcmc.daps import DAPS
from scoreprior.mcmc.ensemble import MEADS, ChEES
from scoreprior.mcmc.gaussian_prior import EllipticalSlice, LatentGaussian
from scoreprior.mcmc.gradient import HMC, MALA, Barker, DynamicHMC
from scoreprior.mcmc.gradient_free import RandomWalk, Slice
from scoreprior.mcmc.guided import Guided
from scoreprior.mcmc.microcanonical import MCLMC, AdjustedMCLMC
from scoreprior.mcmc.noised import FlatLikelihood, MomentLikelihood
from scoreprior.mcmc.nuts import NUTS
from scoreprior.mcmc.schedule import Constant, Decaying
from scoreprior.mcmc.score import SGHMC, SGLD
from scoreprior.mcmc.split_gibbs import SplitGibbs
from scoreprior.mcmc.start import GivenValues, GuideDraws, PriorDraws
from scoreprior.mcmc.svgd import SVGD

__all__ = [
    "DAPS",
    "HMC",
    "MALA",
    "MCLMC",
    "MEADS",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SVGD",
    "AdjustedMCLMC",
    "AnnealedLangevin",
    "Barker",
    "ChEES",
    "Constant",
    "Decaying",
    "DynamicHMC",
    "EllipticalSlice",
    "FlatLikelihood",
    "GivenValues",
    "GuideDraws",
    "Guided",
    "LatentGaussian",
    "MomentLikelihood",
    "PredictorCorrector",
    "PriorDraws",
    "RandomWalk",
    "Slice",
    "SplitGibbs",
]
