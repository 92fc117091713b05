"""Guidance: the denoiser of a posterior, made from the denoiser of a prior.

Methods for data `y = f(x) + N(0, cov_y)` are called with a denoiser and an observation.
`ClassifierGuidance`, `ClassifierFree`, `EventGuidance` and `Replacement` are denoisers themselves.
"""

from scoreprior.guide.base import (
    AbstractGaussianGuidance,
    AbstractGaussianTwist,
    AbstractGuidance,
    AbstractTwist,
    GuidedDenoiser,
)
from scoreprior.guide.classifier import ClassifierFree, ClassifierGuidance
from scoreprior.guide.diffpir import DiffPIR
from scoreprior.guide.dps import DPS
from scoreprior.guide.event import AbstractCondition, Equals, EventGuidance, Exceeds
from scoreprior.guide.jfps import JFPS
from scoreprior.guide.mcgdiff import MCGDiff
from scoreprior.guide.mmps import MMPS
from scoreprior.guide.nrlg import NRLG
from scoreprior.guide.pigdm import PiGDM
from scoreprior.guide.replace import Replacement
from scoreprior.guide.tmpd import TMPD, DiagonalTMPD
from scoreprior.guide.twist import Classifier, Steering

__all__ = [
    "DPS",
    "JFPS",
    "MMPS",
    "NRLG",
    "TMPD",
    "AbstractCondition",
    "AbstractGaussianGuidance",
    "AbstractGaussianTwist",
    "AbstractGuidance",
    "AbstractTwist",
    "Classifier",
    "ClassifierFree",
    "ClassifierGuidance",
    "DiagonalTMPD",
    "DiffPIR",
    "Equals",
    "EventGuidance",
    "Exceeds",
    "GuidedDenoiser",
    "MCGDiff",
    "PiGDM",
    "Replacement",
    "Steering",
]
