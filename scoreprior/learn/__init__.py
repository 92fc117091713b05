"""Priors learned from noisy or incomplete measurements only."""

from scoreprior.learn.gaussian import GaussianFit, fit_gaussian, log_evidence
from scoreprior.learn.measurements import Measurement, Measurements

__all__ = ["GaussianFit", "Measurement", "Measurements", "fit_gaussian", "log_evidence"]
