"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.compose import Product, compose
from scoreprior.sbi.scores import FNPSE, GAUSS, JAC, Damped, Sum, annealed_langevin

__all__ = ["FNPSE", "GAUSS", "JAC", "Damped", "Product", "Sum", "annealed_langevin", "compose"]
