"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.amortise import NPSE
from scoreprior.sbi.embed import Flat, SetEncoder, Standardise
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior

__all__ = ["NPSE", "Flat", "Parameters", "Posterior", "SetEncoder", "Standardise"]
