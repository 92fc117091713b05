"""Pareto-smoothed importance sampling: smoothed weights, and how far they can be trusted."""

import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import psis_weights

MAX_K_HAT = 0.7  # above it, weighted estimates cannot be trusted however many the draws

EVEN = 1e-3
"""A spread of log weights that costs 10^-6 of the effective sample size at most."""


def smooth(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed weights [n] that sum to one, and k-hat (Vehtari et al. 2024).

    Weights within `EVEN` of each other have no tail: they are left as they are, and k-hat is 0, as
    blackjax says of weights that are equal exactly; it divides by zero where only some are, as
    rounding makes them.
    """
    log_weights = np.asarray(log_weights)
    spread = np.ptp(log_weights)
    rounding = 64 * np.finfo(log_weights.dtype).eps * max(1.0, np.abs(log_weights).max())
    if spread <= max(rounding, EVEN):
        weights = np.exp((log_weights - log_weights.max()).astype(float))
        return weights / weights.sum(), 0.0
    smoothed, khat = psis_weights(jnp.asarray(log_weights))
    weights = np.exp(np.asarray(smoothed, float))
    return weights / weights.sum(), float(khat)
