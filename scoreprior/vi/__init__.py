"""Variational inference on a `Problem`: guides, bounds and engines, on NumPyro and blackjax."""

from scoreprior.vi.bounds import ELBO, IWELBO, AbstractBound
from scoreprior.vi.engine import VI
from scoreprior.vi.fitted import FittedGuide
from scoreprior.vi.guides import IAF, AbstractGuide, FullRank, LowRank, MeanField
from scoreprior.vi.natural import NaturalGradient
from scoreprior.vi.pathfinder import Pathfinder
from scoreprior.vi.paths import Paths
from scoreprior.vi.red import REDDiff

__all__ = [
    "ELBO",
    "IAF",
    "IWELBO",
    "VI",
    "AbstractBound",
    "AbstractGuide",
    "FittedGuide",
    "FullRank",
    "LowRank",
    "MeanField",
    "NaturalGradient",
    "Pathfinder",
    "Paths",
    "REDDiff",
]
