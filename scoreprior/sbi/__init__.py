"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""

from scoreprior.sbi.amortise import NPSE
from scoreprior.sbi.compose import Product, compose
from scoreprior.sbi.embed import Flat, SetEncoder, Standardise
from scoreprior.sbi.hierarchical import draw_local, infer_hierarchical, joined, local_data
from scoreprior.sbi.joint import JointNPSE, JointPosterior
from scoreprior.sbi.laws import law_of
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior
from scoreprior.sbi.scores import FNPSE, GAUSS, JAC, Damped, Sum, annealed_langevin
from scoreprior.sbi.sequential import TSNPSE, Round, Sequential
from scoreprior.sbi.simulate import Simulations, TooManyFailures, simulate
from scoreprior.sbi.simulators import AbstractSimulator, BlackBox, Command, JaxSimulator
from scoreprior.sbi.surrogate import Surrogate
from scoreprior.sbi.transforms import ProbabilityIntegral, SoftUniform, gaussianise

__all__ = [
    "FNPSE",
    "GAUSS",
    "JAC",
    "NPSE",
    "TSNPSE",
    "AbstractSimulator",
    "BlackBox",
    "Command",
    "Damped",
    "Flat",
    "JaxSimulator",
    "JointNPSE",
    "JointPosterior",
    "Parameters",
    "Posterior",
    "ProbabilityIntegral",
    "Product",
    "Round",
    "Sequential",
    "SetEncoder",
    "Simulations",
    "SoftUniform",
    "Standardise",
    "Sum",
    "Surrogate",
    "TooManyFailures",
    "annealed_langevin",
    "compose",
    "draw_local",
    "gaussianise",
    "infer_hierarchical",
    "joined",
    "law_of",
    "local_data",
    "simulate",
]
