"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.laws import law_of
from scoreprior.sbi.transforms import ProbabilityIntegral, gaussianise

__all__ = ["ProbabilityIntegral", "gaussianise", "law_of"]
