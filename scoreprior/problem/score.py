"""The gradient of a joint density whose prior has a score but no value.

NumPyro's own accounting of plates, masks, scales and bijections is kept: only the density policy of
the prior sites is exchanged, for one whose value is NaN and whose gradient is the score.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.primitives import Messenger

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior.density import AbstractDensity, FlowDensity, ScoreGradient, with_score
from scoreprior.flow import Flow
from scoreprior.prior import ProbabilityFlow
from scoreprior.problem.sites import is_prior


class NoValue(AbstractDensity):
    """A log density of NaN whose gradient is the score at noise level `sigma`.

    `sigma` of `None` is the level of the policy that it stands for: that of its `ScoreGradient`, or
    of a default one.
    """

    sigma: Sigma | None
    instead_of: AbstractDensity

    def log_prob(self, flow: Flow, x: Event) -> Scalar:
        sigma = _level(self.instead_of, flow) if self.sigma is None else self.sigma
        return with_score(flow, x, value=_nan, sigma=sigma)


class ByScore(Messenger):
    """Exchanges the density policy of every prior site of `fn` for `NoValue(sigma)`."""

    def __init__(self, fn: Callable[..., Any], sigma: Sigma | None):
        super().__init__(fn)
        self.sigma = sigma

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and is_prior(msg["fn"]):
            msg["fn"] = jax.tree.map(self._exchange, msg["fn"], is_leaf=_is_flow)

    def _exchange(self, leaf: Any) -> Any:
        if not _is_flow(leaf):
            return leaf
        return ProbabilityFlow(leaf.flow, NoValue(self.sigma, leaf.density))


def _is_flow(leaf: Any) -> bool:
    return isinstance(leaf, ProbabilityFlow)


def _level(density: AbstractDensity, flow: Flow) -> float:
    gradient = density.gradient if isinstance(density, FlowDensity) else None
    return (gradient or ScoreGradient()).level(flow)


def _nan(flow: Flow, x: Event) -> Scalar:
    # Made of `x`, so that under `vmap` it has the batch axes of its gradient.
    return jnp.nan * jnp.sum(x)


__all__ = ["ByScore", "NoValue"]
