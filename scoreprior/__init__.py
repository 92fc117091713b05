"""Diffusion models as priors for Bayesian models.

Six nouns, one verb each:

- a **denoiser** `D(x, sigma) = E[X | X + sigma N = x]` is called (`denoise`, `nn`, `train`,
  `sample`);
- **moments**, a Gaussian approximation of the data, whiten (`Moments`);
- a **flow** maps noise to data and back (`Flow`);
- a **prior** is a NumPyro distribution that samples and has a `log_prob` (`ScorePrior`);
- a **problem** is what a NumPyro model with such a prior asks (`Problem`);
- an **engine** runs and answers it (`NUTS`, `TemperedSMC`, `FeynmanKac`, through `infer`).

`sbi` makes denoisers from simulators, `learn` from measurements only, and `check` tells whether a
posterior is right.
"""

from importlib.metadata import PackageNotFoundError, version

from scoreprior import (
    check,
    denoise,
    feynman_kac,
    guide,
    interferometry,
    ito,
    learn,
    likelihood,
    nn,
    operators,
    sample,
    sbi,
    train,
    vi,
)
from scoreprior.compare import compare, log_bayes_factor
from scoreprior.composition import Composition, compose
from scoreprior.density import (
    BoundDensity,
    EnergyDensity,
    Exact,
    FlowDensity,
    Hutchinson,
    ScoreGradient,
    ScoreOnly,
)
from scoreprior.flow import Adaptive, FixedGrid, Flow, Multistep
from scoreprior.gaussian import Dense, Diagonal, Fourier, Isotropic, LowRank, Moments, Separable
from scoreprior.infer import infer
from scoreprior.io import load, load_images, load_metadata, save
from scoreprior.mcmc import (
    DAPS,
    HMC,
    MALA,
    MCLMC,
    MEADS,
    NUTS,
    SGHMC,
    SGLD,
    SVGD,
    AdjustedMCLMC,
    AnnealedLangevin,
    Barker,
    ChEES,
    DynamicHMC,
    EllipticalSlice,
    GivenValues,
    Guided,
    GuideDraws,
    LatentGaussian,
    PredictorCorrector,
    PriorDraws,
    RandomWalk,
    Slice,
    SplitGibbs,
)
from scoreprior.plot import plot_posterior_images, plot_residuals
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import FeynmanKac, NestedSampling, PersistentSMC, TemperedSMC
from scoreprior.vi import VI, Pathfinder, REDDiff

try:
    __version__ = version("scoreprior")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "DAPS",
    "HMC",
    "MALA",
    "MCLMC",
    "MEADS",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SVGD",
    "VI",
    "Adaptive",
    "AdjustedMCLMC",
    "AnnealedLangevin",
    "Barker",
    "BoundDensity",
    "ChEES",
    "Composition",
    "Dense",
    "Diagonal",
    "DynamicHMC",
    "EllipticalSlice",
    "EnergyDensity",
    "Exact",
    "FeynmanKac",
    "FixedGrid",
    "Flow",
    "FlowDensity",
    "Fourier",
    "GivenValues",
    "GuideDraws",
    "Guided",
    "Hutchinson",
    "Isotropic",
    "LatentGaussian",
    "LowRank",
    "Moments",
    "Multistep",
    "NestedSampling",
    "Pathfinder",
    "PersistentSMC",
    "PredictorCorrector",
    "PriorDraws",
    "Problem",
    "REDDiff",
    "RandomWalk",
    "ScoreGradient",
    "ScoreOnly",
    "ScorePrior",
    "Separable",
    "Slice",
    "SplitGibbs",
    "TemperedSMC",
    "check",
    "compare",
    "compose",
    "denoise",
    "feynman_kac",
    "guide",
    "infer",
    "interferometry",
    "ito",
    "learn",
    "likelihood",
    "load",
    "load_images",
    "load_metadata",
    "log_bayes_factor",
    "nn",
    "operators",
    "plot_posterior_images",
    "plot_residuals",
    "sample",
    "save",
    "sbi",
    "train",
    "vi",
]
