"""Sequential Monte Carlo over any Feynman-Kac model: moves, weights, resampling, the evidence.

A model is a sequence of laws on particles `x_0 ... x_K`: `x_0 ~ M_0` with weight `G_0(x_0)`, then
`x_k ~ M_k(x_{k-1}, .)` with weight `G_k(x_{k-1}, x_k)`. Its evidence is the mean of the product of
all weights, and its last law is that of `x_K` under them (Del Moral 2004; Chopin & Papaspiliopoulos
2020, chapter 5). Guidance, products and tempering of diffusion models are all of this form; they
differ in `M` and `G` only.

Log weights are never reset. After resampling every particle carries the mean weight, so at every
step, resampled or not,

    log_evidence = logsumexp(log_weights) - log(num_particles).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.ess import ess
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Key, Scalar
from scoreprior.feynman_kac.resample import systematic

Particles = Any
"""A pytree of arrays [particle, ...]."""


class FeynmanKacModel(NamedTuple):
    """`M` and `G` of a whole cloud, fused: weights are by-products of moves.

    - `init(key, num_particles) -> (particles, log_g, cache)`, with `log_g` [particle] the log of
      `G_0`;
    - `propagate(key, k, particles, cache, log_weights) -> (particles, log_g, cache)`: step
      `k = 0 ... num_steps - 1`. `cache` holds what is known of every particle and belongs to it,
      such as the score at its position; it is resampled with the particle;
    - `num_steps`;
    - `log_eta(k, particles, cache) -> [particle]`, a look-ahead: before step `k`, particles are
      resampled in proportion to `weight * eta`, and `eta` is divided out again (auxiliary particle
      filter; Pitt & Shephard 1999);
    - `rejuvenate(key, k, particles, cache) -> (particles, cache)`, a Markov kernel that leaves the
      law before step `k` invariant. It is applied where the cloud has just been resampled, and
      only there: elsewhere no two particles are the same. That whether it is depends on the cloud,
      so the evidence has a bias of order `1 / num_particles`, unless it is resampled always.
    """

    init: Callable[..., tuple[Particles, Float[Array, " particle"], Particles]]
    propagate: Callable[..., tuple[Particles, Float[Array, " particle"], Particles]]
    num_steps: int
    log_eta: Callable[..., Float[Array, " particle"]] | None = None
    rejuvenate: Callable[..., tuple[Particles, Particles]] | None = None


class FKState(NamedTuple):
    """A weighted cloud before step `step`."""

    particles: Particles
    log_weights: Float[Array, " particle"]
    cache: Particles
    ancestor: Int[Array, " particle"]  # the particle of the first cloud whence it comes
    step: Int[Array, ""]

    @property
    def log_evidence(self) -> Scalar:
        """`logsumexp(log_weights) - log(num_particles)`."""
        return logsumexp(self.log_weights) - jnp.log(len(self.log_weights))


class FKInfo(NamedTuple):
    """The record of one step."""

    ess: Scalar  # effective sample size before resampling
    resampled: Bool[Array, ""]
    log_evidence_increment: Scalar
    log_g_variance: Scalar  # of log G_k over the cloud, weighted
    unique_ancestors: Int[Array, ""]
    rejuvenated: Scalar  # the share of particles that rejuvenation moved


class Resampling(NamedTuple):
    """When and how: if `ESS < threshold * num_particles`, at steps `first <= k < last`.

    `function(key, weights, num_samples)` gives indices, as blackjax's resampling functions do.
    """

    threshold: float = 0.5
    first: int = 0
    last: int | None = None
    function: Callable[[Key, Array, int], Int[Array, " n"]] = systematic


def init(model: FeynmanKacModel, num_particles: int, key: Key) -> FKState:
    """The first cloud."""
    particles, log_g, cache = model.init(key, num_particles)
    ancestor = jnp.arange(num_particles, dtype=jnp.int32)
    return FKState(particles, log_g, cache, ancestor, jnp.zeros((), jnp.int32))


def step(
    model: FeynmanKacModel,
    resampling: Resampling,
    state: FKState,
    key: Key,
    axis_name: str | None = None,
) -> tuple[FKState, FKInfo]:
    """Resample and rejuvenate if need be, move and weigh.

    Under a `jax.vmap` over clouds at the same step, `axis_name` is its name: then nothing is spent
    on rejuvenation where no cloud was resampled.
    """
    key_resample, key_rejuvenate, key_move = jax.random.split(key, 3)
    before, num_particles = state.log_evidence, len(state.log_weights)
    log_eta = jnp.zeros_like(state.log_weights)
    if model.log_eta is not None:
        log_eta = model.log_eta(state.step, state.particles, state.cache)
    target = state.log_weights + log_eta
    size = ess(target)
    last = model.num_steps if resampling.last is None else resampling.last
    active = (state.step >= resampling.first) & (state.step < last)
    resampled = active & (size < resampling.threshold * num_particles)

    def draw(state: FKState) -> FKState:
        weights = jax.nn.softmax(target)
        parents = resampling.function(key_resample, weights, num_particles).astype(jnp.int32)
        mean = logsumexp(target) - jnp.log(num_particles)
        kept = jax.tree.map(
            lambda leaf: leaf[parents], (state.particles, state.cache, state.ancestor)
        )
        particles, cache, ancestor = kept
        return FKState(particles, mean - log_eta[parents], cache, ancestor, state.step)

    state = jax.lax.cond(resampled, draw, lambda state: state, state)
    particles, cache = state.particles, state.cache
    rejuvenated = jnp.zeros_like(size)
    rejuvenate = model.rejuvenate
    if rejuvenate is not None:
        before_moves, due = (particles, cache), resampled
        if axis_name is not None:
            due = jax.lax.pmax(resampled.astype(jnp.int32), axis_name) > 0
        moved = jax.lax.cond(
            due,
            lambda cloud: rejuvenate(key_rejuvenate, state.step, *cloud),
            lambda cloud: cloud,
            before_moves,
        )
        particles, cache = jax.tree.map(
            lambda new, old: jnp.where(resampled, new, old), moved, before_moves
        )
        rejuvenated = _share_moved(particles, state.particles).astype(size.dtype)
    shares = jax.nn.softmax(state.log_weights)
    particles, log_g, cache = model.propagate(
        key_move, state.step, particles, cache, state.log_weights
    )
    new = FKState(particles, state.log_weights + log_g, cache, state.ancestor, state.step + 1)
    info = FKInfo(
        size,
        resampled,
        new.log_evidence - before,
        _variance(shares, log_g),
        count_distinct(new.ancestor, num_particles),
        rejuvenated,
    )
    return new, info


def _share_moved(new: Particles, old: Particles) -> Scalar:
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    changed = [jnp.any((a != b).reshape(len(a), -1), axis=1) for a, b in pairs]
    return jnp.mean(jnp.any(jnp.stack(changed), axis=0))


def _variance(shares: Float[Array, " particle"], log_g: Float[Array, " particle"]) -> Scalar:
    """Infinite where a weight is zero."""
    variance = jnp.sum(shares * (log_g - jnp.sum(shares * log_g)) ** 2)
    return jnp.where(jnp.any(log_g == -jnp.inf), jnp.inf, variance)


def run(
    model: FeynmanKacModel, resampling: Resampling, num_particles: int, key: Key
) -> tuple[FKState, FKInfo]:
    """All steps in one scan: the last cloud, and the record with leaves [step]."""
    key_init, key_steps = jax.random.split(key)

    def body(state: FKState, key: Key) -> tuple[FKState, FKInfo]:
        return step(model, resampling, state, key)

    state = init(model, num_particles, key_init)
    return jax.lax.scan(body, state, jax.random.split(key_steps, model.num_steps))


def count_distinct(indices: Int[Array, " n"], size: int) -> Int[Array, ""]:
    """How many of `0 .. size - 1` there are among `indices`."""
    return jnp.sum(jnp.zeros(size, jnp.int32).at[indices].set(1))


def over(function: Callable[[Any], Any], batch_size: int | None) -> Callable[[Any], Any]:
    """`function` over a leading axis, at once or `batch_size` entries at a time."""
    if batch_size is None:
        return jax.vmap(function)
    return lambda inputs: jax.lax.map(function, inputs, batch_size=batch_size)


__all__ = [
    "FKInfo",
    "FKState",
    "FeynmanKacModel",
    "Resampling",
    "count_distinct",
    "init",
    "over",
    "run",
    "step",
]
