"""Priors learned from noisy or incomplete measurements only.

`Measurements` say what was seen of every event; `fit_gaussian` finds the likeliest Gaussian prior,
and `EM` goes on from there to a diffusion prior, by rounds of posterior draws (`GuidedDraws`, or
without bias `CorrectedDraws`) and training (`Train`). Where the events are whole and only noisy,
losses of `scoreprior.train` need no draws: `Ambient` and `SURE`.
"""

from scoreprior.learn.corrected import CorrectedDraws
from scoreprior.learn.em import EM, Learned, Round
from scoreprior.learn.gaussian import GaussianFit, fit_gaussian, log_evidence
from scoreprior.learn.measurements import Measurement, Measurements
from scoreprior.learn.steps import (
    AbstractMaximisation,
    GuidedDraws,
    MatchMoments,
    PosteriorDraw,
    Train,
)

__all__ = [
    "EM",
    "AbstractMaximisation",
    "CorrectedDraws",
    "GaussianFit",
    "GuidedDraws",
    "Learned",
    "MatchMoments",
    "Measurement",
    "Measurements",
    "PosteriorDraw",
    "Round",
    "Train",
    "fit_gaussian",
    "log_evidence",
]
