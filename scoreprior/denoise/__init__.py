"""Denoisers: exact, learned, adapted from other parameterisations, or made from one another."""

from scoreprior.denoise.adapt import (
    VE,
    VP,
    AbstractPrediction,
    AbstractSchedule,
    CleanPrediction,
    Cosine,
    Discrete,
    FlowMatching,
    NoisePrediction,
    ScorePrediction,
    SubVP,
    VelocityPrediction,
    VPrediction,
)
from scoreprior.denoise.base import AbstractDenoiser, Conditioned, Noised, Rescaled
from scoreprior.denoise.calibrate import Calibrated
from scoreprior.denoise.conservative import Asymmetry, asymmetry
from scoreprior.denoise.energy import (
    AbstractGain,
    EnergyNetwork,
    InnerProduct,
    SquaredDistance,
)
from scoreprior.denoise.exact import AbstractExact, Empirical, Gaussian, GaussianMixture, Smoothed
from scoreprior.denoise.network import Network
from scoreprior.denoise.subspace import Subspace, leading
from scoreprior.denoise.uniform import BlurredUniform, Uniform

__all__ = [
    "VE",
    "VP",
    "AbstractDenoiser",
    "AbstractExact",
    "AbstractGain",
    "AbstractPrediction",
    "AbstractSchedule",
    "Asymmetry",
    "BlurredUniform",
    "Calibrated",
    "CleanPrediction",
    "Conditioned",
    "Cosine",
    "Discrete",
    "Empirical",
    "EnergyNetwork",
    "FlowMatching",
    "Gaussian",
    "GaussianMixture",
    "InnerProduct",
    "Network",
    "NoisePrediction",
    "Noised",
    "Rescaled",
    "ScorePrediction",
    "Smoothed",
    "SquaredDistance",
    "SubVP",
    "Subspace",
    "Uniform",
    "VPrediction",
    "VelocityPrediction",
    "asymmetry",
    "leading",
]
