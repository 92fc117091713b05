"""Sequential Monte Carlo engines on a `Problem`, with kernels by blackjax."""

from scoreprior.feynman_kac import FeynmanKacModel, Resampling, systematic
from scoreprior.smc.corrector import FeynmanKac
from scoreprior.smc.moves import AbstractMoves, HMCMoves, RandomWalkMoves
from scoreprior.smc.nested import NestedSampling
from scoreprior.smc.persistent import PersistentSMC
from scoreprior.smc.tempered import TemperedSMC

__all__ = [
    "AbstractMoves",
    "FeynmanKac",
    "FeynmanKacModel",
    "HMCMoves",
    "NestedSampling",
    "PersistentSMC",
    "RandomWalkMoves",
    "Resampling",
    "TemperedSMC",
    "systematic",
]
