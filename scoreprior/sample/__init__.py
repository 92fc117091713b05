"""Unconditional draws: noise-level grids and samplers.

A sampler moves `x_t` from the law of `X + sigma_0 N` down a grid `sigma_0 > ... > sigma_n > 0`. Its
draws have the law of `X + sigma_n N`, up to the error of the steps; `denoise_last=True` replaces
each by its posterior mean `D(x, sigma_n)`, which is what is usually shown, but not what a density
at `sigma_n` describes.

All samplers integrate one of

    probability flow   dx/dsigma = (x - D(x, sigma)) / sigma
    reverse SDE        dx = 2 (x - D) / sigma dsigma + sqrt(2 sigma |dsigma|) dW

(Karras et al., NeurIPS 2022, eqs. 1 and 6) or, by `Ancestral`, what lies between. A step is a
deterministic function of its noise, so everything here can be differentiated and replayed.
"""

from scoreprior.sample.adaptive import AdaptiveRun, StepControl, sample_adaptive, solve_adaptive
from scoreprior.sample.grids import AbstractGrid, ArctanGrid, EDMGrid, LogGrid
from scoreprior.sample.recurrent import Recurrent
from scoreprior.sample.run import sample, solve
from scoreprior.sample.samplers import (
    AbstractSampler,
    Ancestral,
    Churned,
    Denoise,
    DPMSolver,
    Euler,
    GradientEstimation,
    GradientEstimationMemory,
    HalfNoise,
    Heun,
    Memory,
    MultistepMemory,
    Stage,
    StochasticHeun,
)

__all__ = [
    "AbstractGrid",
    "AbstractSampler",
    "AdaptiveRun",
    "Ancestral",
    "ArctanGrid",
    "Churned",
    "DPMSolver",
    "Denoise",
    "EDMGrid",
    "Euler",
    "GradientEstimation",
    "GradientEstimationMemory",
    "HalfNoise",
    "Heun",
    "LogGrid",
    "Memory",
    "MultistepMemory",
    "Recurrent",
    "Stage",
    "StepControl",
    "StochasticHeun",
    "sample",
    "sample_adaptive",
    "solve",
    "solve_adaptive",
]
