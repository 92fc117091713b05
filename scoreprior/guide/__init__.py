"""Guidance: the denoiser of a posterior, made from the denoiser of a prior."""

from scoreprior.guide.base import AbstractGaussianGuidance, AbstractGuidance, GuidedDenoiser
from scoreprior.guide.diffpir import DiffPIR
from scoreprior.guide.dps import DPS
from scoreprior.guide.jfps import JFPS
from scoreprior.guide.mmps import MMPS
from scoreprior.guide.nrlg import NRLG
from scoreprior.guide.pigdm import PiGDM
from scoreprior.guide.tmpd import TMPD, DiagonalTMPD

__all__ = [
    "DPS",
    "JFPS",
    "MMPS",
    "NRLG",
    "TMPD",
    "AbstractGaussianGuidance",
    "AbstractGuidance",
    "DiagonalTMPD",
    "DiffPIR",
    "GuidedDenoiser",
    "PiGDM",
]
