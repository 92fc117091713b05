"""Markov chain Monte Carlo engines on a `Problem`, by blackjax."""

from scoreprior.mcmc.nuts import NUTS

__all__ = ["NUTS"]
