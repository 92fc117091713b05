"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.simulate import Simulations, TooManyFailures, simulate
from scoreprior.sbi.simulators import AbstractSimulator, BlackBox, Command, JaxSimulator

__all__ = [
    "AbstractSimulator",
    "BlackBox",
    "Command",
    "JaxSimulator",
    "Simulations",
    "TooManyFailures",
    "simulate",
]
