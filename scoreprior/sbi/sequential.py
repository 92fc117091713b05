"""Sequential rounds for one observation: simulate where the posterior is, and train again.

Truncated sequential neural posterior score estimation (Sharrock et al., "Sequential neural score
estimation", ICML 2024): each round draws parameters from the prior truncated to the region of
highest posterior density of the round before. On that region the proposal is proportional to the
prior, so the loss needs no correction. The posterior that comes out serves the one observation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float

from scoreprior._typing import Key, PyTree, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.prior import ScorePrior
from scoreprior.sbi.amortise import NPSE
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior, push

NUM_DRAWS = 2000
"""Posterior draws of which the region and the change between rounds are estimated."""

NUM_DIRECTIONS = 64


class Region(NamedTuple):
    """`{z : log q(z) >= threshold}` within a box, for a posterior `q`.

    The threshold is the quantile of `log q` of its own draws; the box, which spares most densities,
    holds all of them with a margin of half its width on either side.
    """

    law: ScorePrior
    threshold: Scalar
    low: Float[Array, " size"]
    high: Float[Array, " size"]

    @classmethod
    def of(cls, law: ScorePrior, key: Key, quantile: float) -> "Region":
        """That of highest density of `law` with all but about `quantile` of its mass."""
        draws = law.sample(key, (NUM_DRAWS,))
        threshold = jnp.quantile(_log_probs(law, draws), quantile)
        low, high = draws.min(0), draws.max(0)
        margin = (high - low) / 2
        return cls(law, threshold, low - margin, high + margin)

    def __call__(self, z: Float[Array, "n size"]) -> Bool[Array, " n"]:
        """Which of the points lie in the region, [n]."""
        inside = np.array(((z >= self.low[None]) & (z <= self.high[None])).all(1))
        candidates = z[inside]
        if len(candidates):
            # A length of few values, so that few programs are compiled.
            padded = 1 << (len(candidates) - 1).bit_length()
            filled = jnp.resize(candidates, (padded, z.shape[1]))
            above = np.asarray(_log_probs(self.law, filled) >= self.threshold)[: len(candidates)]
            inside[inside] = above
        return jnp.asarray(inside)


class Round(NamedTuple):
    """One round: what was simulated, and how far the posterior moved."""

    num_simulations: int  # all that have been trained on
    acceptance: float  # share of prior draws in the region; 1 in the first round
    change: float  # distance from the posterior before, in its standard deviations; NaN at first


class Sequential(NamedTuple):
    """The posterior of the last round, and all rounds. It serves the one observation only."""

    posterior: Posterior
    rounds: tuple[Round, ...]
    theta: PyTree[Array]  # [n, ...]
    x: Float[Array, "n *x"]


class TSNPSE(eqx.Module):
    """Truncated sequential rounds of `NPSE` for one observation.

    **Arguments:** `prior`; `simulate(key, theta)`, one simulation [*x] of one draw of the prior, in
    JAX; `num_simulations` of each round, at most `num_rounds` of them; `quantile`, the posterior
    mass that a region may leave out; `tolerance`, below which change from one round to the next
    the rounds stop: the sliced Wasserstein distance of the posteriors in standard deviations, with
    the same noise for both, so that equal posteriors have distance zero. `None` takes all rounds.
    `settings` of `NPSE`, `training` of `NPSE.fit`; no `surrogate` unless it says so, which would
    draw from the whole prior.
    """

    prior: dist.Distribution | Callable[[], Any]
    simulate: Callable[[Key, Any], Array]
    num_simulations: int = eqx.field(static=True)
    num_rounds: int = eqx.field(static=True)
    quantile: float = eqx.field(static=True, default=1e-4)
    tolerance: float | None = eqx.field(static=True, default=None)
    settings: dict[str, Any] = eqx.field(default_factory=dict)
    training: dict[str, Any] = eqx.field(default_factory=dict)

    def __check_init__(self):
        check_count("num_simulations", self.num_simulations, least=4)
        check_count("num_rounds", self.num_rounds)
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie in (0, 1), got {self.quantile}")
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)

    def fit(self, x_o: Float[Array, "*x"], *, key: Key) -> Sequential:
        """Run the rounds for the observation `x_o`.

        Raises `RuntimeError` where a region holds less than one prior draw in 100,000.
        """
        parameters = Parameters.of(self.prior)
        training: dict[str, Any] = {"surrogate": None} | self.training
        region: Region | None = None
        thetas: list[Any] = []
        xs: list[Any] = []
        rounds: list[Round] = []
        while True:
            number = len(rounds)
            draw, simulate, train, select = jax.random.split(jax.random.fold_in(key, number), 4)
            theta, acceptance = draw_truncated(parameters, region, draw, self.num_simulations)
            keys = jax.random.split(simulate, self.num_simulations)
            thetas.append(theta)
            xs.append(jax.vmap(self.simulate)(keys, theta))
            data = jax.tree.map(lambda *parts: jnp.concatenate(parts), *thetas), jnp.concatenate(xs)
            npse = NPSE(parameters, data, **self.settings)
            posterior = npse.fit(key=train, **training)
            law = posterior.condition(x_o)
            change = np.nan if region is None else distance(region.law, law, select)
            rounds.append(Round(len(data[1]), acceptance, change))
            is_settled = self.tolerance is not None and change <= self.tolerance
            if is_settled or len(rounds) == self.num_rounds:
                return Sequential(posterior, tuple(rounds), *data)
            region = Region.of(law, select, self.quantile)


def draw_truncated(
    parameters: Parameters, region: Region | None, key: Key, num: int
) -> tuple[PyTree[Array], float]:
    """`num` draws of the prior in the region, by rejection, and the share that was accepted."""
    kept, num_kept, num_tried, batch = [], 0, 0, max(num, 1000)
    to_vectors = jax.vmap(parameters.to_vector)
    while num_kept < num:
        keys = jax.random.split(jax.random.fold_in(key, num_tried), batch)
        theta = jax.vmap(parameters.sample)(keys)
        inside = np.ones(batch, bool) if region is None else np.asarray(region(to_vectors(theta)))
        kept.append(jax.tree.map(lambda leaf, inside=inside: leaf[inside], theta))
        num_kept, num_tried = num_kept + int(inside.sum()), num_tried + batch
        if num_kept < 1e-5 * num_tried and num_tried >= 1e6:
            raise RuntimeError(
                f"the truncated prior holds {num_kept} of {num_tried} prior draws: take fewer "
                "rounds, or a prior that is nearer to the posterior"
            )
    theta = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num], *kept)
    return theta, num_kept / num_tried


def distance(old: ScorePrior, new: ScorePrior, key: Key) -> float:
    """Sliced Wasserstein-2 distance of two laws of `z`, whitened by the covariance of the old."""
    noise, directions = jax.random.split(key)
    u = jax.random.normal(noise, (NUM_DRAWS, *old.event_shape), old.flow.moments.mean.dtype)
    moments = old.flow.moments
    white = [jax.vmap(lambda z: moments.whiten(z, 0.0))(push(law.flow, u)) for law in (old, new)]
    axes = jax.random.normal(directions, (old.event_shape[0], NUM_DIRECTIONS), u.dtype)
    axes = axes / jnp.linalg.norm(axes, axis=0)[None]
    a, b = (jnp.sort(z @ axes, axis=0) for z in white)
    return float(jnp.sqrt(jnp.mean((a - b) ** 2)))


@eqx.filter_jit
def _log_probs(law: ScorePrior, z: Float[Array, "n size"]) -> Float[Array, " n"]:
    return law.log_prob(z)
