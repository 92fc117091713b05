"""Markov chain Monte Carlo engines on a `Problem`, by blackjax; samplers that follow a score."""

from scoreprior.mcmc.annealed import AnnealedLangevin, PredictorCorrector
from scoreprior.mcmc.noised import FlatLikelihood, MomentLikelihood
from scoreprior.mcmc.nuts import NUTS
from scoreprior.mcmc.schedule import Constant, Decaying
from scoreprior.mcmc.score import SGHMC, SGLD
from scoreprior.mcmc.svgd import SVGD

__all__ = [
    "NUTS",
    "SGHMC",
    "SGLD",
    "SVGD",
    "AnnealedLangevin",
    "Constant",
    "Decaying",
    "FlatLikelihood",
    "MomentLikelihood",
    "PredictorCorrector",
]
