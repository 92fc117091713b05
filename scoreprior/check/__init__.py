"""Checks of posteriors: calibration, coverage, two-sample tests, predictions.

Every check gives a `DataTree` whose attribute `p_value` is small where the posterior is wrong.
"""

from scoreprior.check.calibration import Replicates, coverage, replicate, sbc
from scoreprior.check.classify import c2st, local_c2st
from scoreprior.check.plots import plot_coverage, plot_ecdf, plot_predictive, plot_tarp
from scoreprior.check.predictive import (
    AbstractDistance,
    Energy,
    Mahalanobis,
    Nearest,
    evidence_ratio,
    misspecification,
    posterior_predictive,
)
from scoreprior.check.tarp import tarp

__all__ = [
    "AbstractDistance",
    "Energy",
    "Mahalanobis",
    "Nearest",
    "Replicates",
    "c2st",
    "coverage",
    "evidence_ratio",
    "local_c2st",
    "misspecification",
    "plot_coverage",
    "plot_ecdf",
    "plot_predictive",
    "plot_tarp",
    "posterior_predictive",
    "replicate",
    "sbc",
    "tarp",
]
