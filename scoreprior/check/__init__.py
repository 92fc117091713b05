"""Checks of posteriors: calibration, coverage, two-sample tests, predictions; and of priors.

Every check gives a `DataTree` whose attribute `p_value` is small where the posterior or the prior
is wrong. Scores (`crps`, `energy_score`, `psnr`) are numbers, to compare posteriors by.
"""

from scoreprior.check.calibration import Replicates, coverage, replicate, sbc
from scoreprior.check.classify import c2st, local_c2st
from scoreprior.check.diversity import (
    AbstractSimilarity,
    CosineSimilarity,
    GaussianSimilarity,
    diversity,
    memorisation,
    vendi_score,
)
from scoreprior.check.plots import (
    plot_c2st,
    plot_coverage,
    plot_ecdf,
    plot_local_c2st,
    plot_predictive,
    plot_tarp,
)
from scoreprior.check.predictive import (
    AbstractDistance,
    Energy,
    Mahalanobis,
    Nearest,
    evidence_ratio,
    misspecification,
    posterior_predictive,
)
from scoreprior.check.prior import held_out_bits, out_of_distribution, spectrum
from scoreprior.check.prior_plots import (
    plot_bits,
    plot_diversity,
    plot_draws,
    plot_memorisation,
    plot_nearest,
    plot_out_of_distribution,
    plot_spectrum,
)
from scoreprior.check.scores import crps, energy_score, psnr
from scoreprior.check.tarp import tarp

__all__ = [
    "AbstractDistance",
    "AbstractSimilarity",
    "CosineSimilarity",
    "Energy",
    "GaussianSimilarity",
    "Mahalanobis",
    "Nearest",
    "Replicates",
    "c2st",
    "coverage",
    "crps",
    "diversity",
    "energy_score",
    "evidence_ratio",
    "held_out_bits",
    "local_c2st",
    "memorisation",
    "misspecification",
    "out_of_distribution",
    "plot_bits",
    "plot_c2st",
    "plot_coverage",
    "plot_diversity",
    "plot_draws",
    "plot_ecdf",
    "plot_local_c2st",
    "plot_memorisation",
    "plot_nearest",
    "plot_out_of_distribution",
    "plot_predictive",
    "plot_spectrum",
    "plot_tarp",
    "posterior_predictive",
    "psnr",
    "replicate",
    "sbc",
    "spectrum",
    "tarp",
    "vendi_score",
]
