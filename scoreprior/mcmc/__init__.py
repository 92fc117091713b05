"""Markov chain Monte Carlo engines on a `Problem`, by blackjax."""

from scoreprior.mcmc.ensemble import MEADS, ChEES
from scoreprior.mcmc.microcanonical import MCLMC, AdjustedMCLMC
from scoreprior.mcmc.nuts import NUTS

__all__ = ["MCLMC", "MEADS", "NUTS", "AdjustedMCLMC", "ChEES"]
