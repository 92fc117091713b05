"""Denoisers: exact, learned, adapted from other parameterisations, or made from one another."""

from scoreprior.denoise.base import AbstractDenoiser, Conditioned, Rescaled
from scoreprior.denoise.exact import AbstractExact, Empirical, Gaussian, GaussianMixture, Smoothed

__all__ = [
    "AbstractDenoiser",
    "AbstractExact",
    "Conditioned",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Rescaled",
    "Smoothed",
]
