"""Feynman-Kac models: clouds that move, are weighted and resampled; compositions as such models."""

from scoreprior.feynman_kac.composed import Composed, Factor
from scoreprior.feynman_kac.control import AbstractControl, NoControl, VarianceControl
from scoreprior.feynman_kac.engine import (
    FeynmanKacModel,
    FKInfo,
    FKState,
    Resampling,
    count_distinct,
    init,
    over,
    run,
    step,
)
from scoreprior.feynman_kac.levels import Levels
from scoreprior.feynman_kac.minibatch import MiniBatched
from scoreprior.feynman_kac.noise import AbstractNoise, TargetScore, TemperedNoise
from scoreprior.feynman_kac.rejuvenate import AbstractRejuvenation, Renoise, ScoreLine
from scoreprior.feynman_kac.resample import systematic
from scoreprior.feynman_kac.weight import AbstractWeight, EnergyRatio, Euler, KernelRatio, Trapezoid

__all__ = [
    "AbstractControl",
    "AbstractNoise",
    "AbstractRejuvenation",
    "AbstractWeight",
    "Composed",
    "EnergyRatio",
    "Euler",
    "FKInfo",
    "FKState",
    "Factor",
    "FeynmanKacModel",
    "KernelRatio",
    "Levels",
    "MiniBatched",
    "NoControl",
    "Renoise",
    "Resampling",
    "ScoreLine",
    "TargetScore",
    "TemperedNoise",
    "Trapezoid",
    "VarianceControl",
    "count_distinct",
    "init",
    "over",
    "run",
    "step",
    "systematic",
]
