"""Diffusion models as priors for Bayesian models.

Six nouns, one verb each:

- a **denoiser** `D(x, sigma) = E[X | X + sigma N = x]` is called (`denoise`, `nn`, `train`,
  `sample`);
- **moments**, a Gaussian approximation of the data, whiten (`Moments`);
- a **flow** maps noise to data and back (`Flow`);
- a **prior** is a NumPyro distribution that samples and has a `log_prob` (`ScorePrior`);
- a **problem** is what a NumPyro model with such a prior asks (`Problem`);
- an **engine** runs and answers it (`NUTS`, `TemperedSMC`, through `infer`).
"""

from importlib.metadata import PackageNotFoundError, version

from scoreprior import denoise, nn, sample, train
from scoreprior.density import (
    BoundDensity,
    Exact,
    FlowDensity,
    Hutchinson,
    ScoreGradient,
    ScoreOnly,
)
from scoreprior.flow import Adaptive, FixedGrid, Flow
from scoreprior.gaussian import Dense, Diagonal, Fourier, Isotropic, Moments
from scoreprior.infer import infer
from scoreprior.io import load, load_images, load_metadata, save
from scoreprior.mcmc import NUTS, SGHMC, SGLD, SVGD, AnnealedLangevin, PredictorCorrector
from scoreprior.plot import plot_posterior_images
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import TemperedSMC

try:
    __version__ = version("scoreprior")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "NUTS",
    "SGHMC",
    "SGLD",
    "SVGD",
    "Adaptive",
    "AnnealedLangevin",
    "BoundDensity",
    "Dense",
    "Diagonal",
    "Exact",
    "FixedGrid",
    "Flow",
    "FlowDensity",
    "Fourier",
    "Hutchinson",
    "Isotropic",
    "Moments",
    "PredictorCorrector",
    "Problem",
    "ScoreGradient",
    "ScoreOnly",
    "ScorePrior",
    "TemperedSMC",
    "denoise",
    "infer",
    "load",
    "load_images",
    "load_metadata",
    "nn",
    "plot_posterior_images",
    "sample",
    "save",
    "train",
]
