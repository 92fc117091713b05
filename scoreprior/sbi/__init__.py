"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.parameters import Parameters

__all__ = ["Parameters"]
