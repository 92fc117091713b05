"""How far a guide is from the posterior: importance weights, their tail, the evidence.

With `n` draws `z_i` of the guide and `w_i = p(y, z_i) / q(z_i)`, the mean of `log w_i` estimates
the ELBO and that of `w_i` the evidence `p(y)`, without bias. k-hat is the shape of the generalised
Pareto distribution fitted to the largest `w_i` (Vehtari, Simpson, Gelman, Yao & Gabry 2024,
"Pareto smoothed importance sampling"): above `min(1 - 1 / log10(n), 0.7)` weighted estimates cannot
be trusted. A mode that no draw comes near leaves no trace in k-hat: the evidence is then too low by
the log of the mass that is missing.
"""

import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from scoreprior._psis import MAX_K_HAT, smooth


def diagnose(log_weights: Float[np.ndarray, " n"]) -> tuple[dict[str, Any], np.ndarray]:
    """`elbo`, `log_evidence`, their standard errors and `khat`; and the smoothed weights [n].

    Standard errors are those of independent draws; for the evidence relative to it, the delta
    method. Weights sum to one.
    """
    weights = np.asarray(log_weights, float)
    n, top = len(weights), weights.max()
    ratios = np.exp(weights - top)
    mean = ratios.mean()
    smoothed, khat = smooth(log_weights)
    found = {
        "elbo": weights.mean(),
        "elbo_se": weights.std(ddof=1) / math.sqrt(n),
        "log_evidence": top + np.log(mean),
        "log_evidence_se": ratios.std(ddof=1) / mean / math.sqrt(n),
        "khat": khat,
    }
    return {name: ((), np.asarray(value)) for name, value in found.items()}, smoothed


def largest_k_hat(num_draws: int) -> float:
    """The largest k-hat with which `num_draws` weighted draws can be trusted."""
    return min(1 - 1 / math.log10(num_draws), MAX_K_HAT)


def warn_k_hat(khat: float, num_draws: int, remedy: str, stacklevel: int) -> None:
    """Warn where `khat` is too large, or not a number."""
    largest = largest_k_hat(num_draws)
    if not khat <= largest:
        warnings.warn(
            f"k-hat is {khat:.2f}, above {largest:.2f}: the guide does not cover the posterior, so "
            "its draws are biased and log_evidence is unreliable, mostly too low, and so is "
            f"log_evidence_se; {remedy}",
            stacklevel=stacklevel + 1,
        )


def warn_not_finite(log_weights: np.ndarray, stacklevel: int) -> None:
    """Warn where the log density of a draw is NaN or plus infinity."""
    if bad := int((np.isnan(log_weights) | (log_weights == np.inf)).sum()):
        warnings.warn(
            f"the log density is NaN or plus infinity at {bad} of {len(log_weights)} draws of the "
            "guide, so the bound and the evidence are NaN: check the model far from its prior",
            stacklevel=stacklevel + 1,
        )
