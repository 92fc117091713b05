"""Training: losses made of parts, and `fit` with averaging, early stopping and exact resumption."""

from scoreprior.train.augment import Dequantise, InSequence, RandomCrop, Unchanged
from scoreprior.train.fit import Fit, History, adamw, fit
from scoreprior.train.levels import AbstractLevels, LogNormal, LogUniform
from scoreprior.train.loss import (
    AbstractLoss,
    AbstractMetric,
    AbstractRegulariser,
    AbstractTarget,
    Clean,
    Conservative,
    DenoisingLoss,
    Goal,
    Likelihood,
    Relative,
    Residual,
    TargetScore,
    Teacher,
)
from scoreprior.train.noisy import SURE, Ambient, SUREScore

__all__ = [
    "SURE",
    "AbstractLevels",
    "AbstractLoss",
    "AbstractMetric",
    "AbstractRegulariser",
    "AbstractTarget",
    "Ambient",
    "Clean",
    "Conservative",
    "DenoisingLoss",
    "Dequantise",
    "Fit",
    "Goal",
    "History",
    "InSequence",
    "Likelihood",
    "LogNormal",
    "LogUniform",
    "RandomCrop",
    "Relative",
    "Residual",
    "SUREScore",
    "TargetScore",
    "Teacher",
    "Unchanged",
    "adamw",
    "fit",
]
