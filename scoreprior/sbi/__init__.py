"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.amortise import NPSE
from scoreprior.sbi.embed import Flat, SetEncoder, Standardise
from scoreprior.sbi.joint import JointNPSE, JointPosterior
from scoreprior.sbi.laws import law_of
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior
from scoreprior.sbi.sequential import TSNPSE, Round, Sequential
from scoreprior.sbi.transforms import ProbabilityIntegral, gaussianise

__all__ = [
    "NPSE",
    "TSNPSE",
    "Flat",
    "JointNPSE",
    "JointPosterior",
    "Parameters",
    "Posterior",
    "ProbabilityIntegral",
    "Round",
    "Sequential",
    "SetEncoder",
    "Standardise",
    "gaussianise",
    "law_of",
]
