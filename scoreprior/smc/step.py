"""One temperature of one cloud of particles: reweight, resample, move.

At inverse temperature `lam` the cloud is a sample of `pi_lam ~ prior * likelihood^lam`, every
particle with the same weight. Log weights are differences of `lam` times log likelihoods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.ess import ess, ess_solver
from blackjax.smc.solver import dichotomy
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Key, Scalar
from scoreprior.feynman_kac import count_distinct, over, systematic
from scoreprior.problem import Problem
from scoreprior.smc.moves import AbstractMoves, flatten


class Cloud(NamedTuple):
    """A cloud at its temperature, and what the next temperature takes over from it."""

    position: dict[str, Array]  # [particle, *site]
    log_likelihood: Float[Array, " particle"]
    ancestor: Int[Array, " particle"]  # the prior draw whence a particle comes
    temperature: Scalar
    log_evidence: Scalar  # log of the normaliser of pi_lam
    step_size: Scalar


class Moved(NamedTuple):
    """State of the moves at one temperature."""

    num_moves: Int[Array, ""]
    particles: Any  # blackjax states, leaves [particle, ...]
    distance: Float[Array, "moves size"]  # mean squared distance from the start after each move
    step_size: Scalar
    acceptance: Scalar
    diverging: Scalar  # sum over moves of the share whose proposal had a density of NaN
    autocorrelation: Scalar
    trail: dict[str, Array] | None = None  # states on the way, [1 + moves, particle, *site]


class Rule(NamedTuple):
    """Settings of a temperature step, as in `TemperedSMC`.

    Without waste, `max_moves` is the number of moves, and no autocorrelation ends them.
    """

    kernel: AbstractMoves
    target_ess: float
    max_autocorrelation: float
    max_moves: int
    batch_size: int | None
    num_ancestors: int | None = None


def start(problem: Problem, rule: Rule, num_particles: int, key: Key) -> Cloud:
    """Prior draws: the cloud at temperature zero."""
    keys = jax.random.split(key, num_particles)
    position = over(problem.initial, rule.batch_size)(keys)
    log_likelihood = over(problem.log_likelihood, rule.batch_size)(position)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(position))
    zero = jnp.zeros((), log_likelihood.dtype)
    ancestor = jnp.arange(num_particles, dtype=jnp.int32)
    step_size = zero + rule.kernel.first_step_size(size)
    return Cloud(position, log_likelihood, ancestor, zero, zero, step_size)


def temper(problem: Problem, rule: Rule, cloud: Cloud, key: Key) -> tuple[Cloud, dict[str, Array]]:
    """The cloud at the next temperature, and the record of the step.

    A cloud at temperature one stays as it is.
    """
    key_resample, key_moves = jax.random.split(key)
    num_particles = len(cloud.log_likelihood)
    idle = cloud.temperature >= 1
    temperature = next_temperature(cloud, rule.target_ess)
    log_weights = weigh(cloud.log_likelihood, temperature - cloud.temperature)
    increment = logsumexp(log_weights) - jnp.log(num_particles)
    weights = jax.nn.softmax(log_weights)
    parents = systematic(key_resample, weights, rule.num_ancestors or num_particles)
    position = jax.tree.map(lambda leaf: leaf[parents], cloud.position)
    ancestor = cloud.ancestor[parents]

    logdensity_fn = tempered(problem, temperature)
    moved = move(rule, logdensity_fn, position, cloud.step_size, idle, key_moves)
    if moved.trail is None:
        position = moved.particles.position
    else:
        position = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), moved.trail)
        ancestor = jnp.tile(ancestor, rule.max_moves + 1)
    log_likelihood = over(problem.log_likelihood, rule.batch_size)(position)
    log_evidence = cloud.log_evidence + increment
    new = Cloud(position, log_likelihood, ancestor, temperature, log_evidence, moved.step_size)
    new = jax.tree.map(lambda old, new: jnp.where(idle, old, new), cloud, new)
    record = {
        "temperature": new.temperature,
        "log_evidence_increment": jnp.where(idle, 0, increment),
        "ess": ess(log_weights),
        "unique_parents": count_distinct(parents, num_particles),
        "unique_ancestors": count_distinct(new.ancestor, num_particles),
        "num_moves": moved.num_moves,
        "acceptance_rate": moved.acceptance,
        "diverging": moved.diverging / jnp.maximum(moved.num_moves, 1),
        "step_size": new.step_size,
        "autocorrelation": moved.autocorrelation,
    }
    return new, record


def next_temperature(cloud: Cloud, target_ess: float) -> Scalar:
    """The temperature at which the effective sample size falls to `target_ess`, at most one.

    Particles of likelihood zero have no weight at any temperature, so the fraction is that of the
    others.
    """
    possible = jnp.mean(jnp.isfinite(cloud.log_likelihood), dtype=cloud.temperature.dtype)
    step = ess_solver(
        lambda log_likelihood: log_likelihood,
        cloud.log_likelihood,
        target_ess * possible,
        1 - cloud.temperature,
        dichotomy,
    )
    # The last step ends at one exactly, whatever the rounding of the sum.
    rest = 1 - cloud.temperature
    return jnp.where(step >= rest, 1, cloud.temperature + step)


def weigh(log_likelihood: Float[Array, "*n"], step: Scalar) -> Float[Array, "*n"]:
    """`step * log_likelihood`, minus infinity where that is the log likelihood, even at step 0."""
    possible = jnp.isfinite(log_likelihood)
    return jnp.where(possible, step * jnp.where(possible, log_likelihood, 0), -jnp.inf)


def tempered(problem: Problem, temperature: Scalar) -> Callable[[Any], Scalar]:
    """The log density of `prior * likelihood^temperature`."""

    def logdensity_fn(position: Any) -> Scalar:
        log_likelihood = problem.log_likelihood(position)
        # Zero stays zero at temperature zero, too.
        power = jnp.where(log_likelihood == -jnp.inf, -jnp.inf, temperature * log_likelihood)
        return problem.log_prior(position) + power

    return logdensity_fn


def move(
    rule: Rule,
    logdensity_fn: Callable[[Any], Scalar],
    position: dict[str, Array],
    step_size: Scalar,
    idle: Bool[Array, ""],
    key: Key,
) -> Moved:
    """Move all particles until they have forgotten where they started, or `max_moves` times.

    Each half of the cloud moves by the scales of the other half: a kernel tuned on the particle
    that it moves does not leave `logdensity_fn` invariant. Copies that resampling made of one
    particle are neighbours, so that hardly any has a copy in the other half.

    With `num_ancestors`, all states on the way are kept in `trail`. The step size follows
    `log step_size += acceptance - target_accept` after every move.
    """
    kernel, num_particles = rule.kernel, len(jax.tree.leaves(position)[0])
    started = flatten(position)
    # The last of an odd number of particles is moved twice, and counts once.
    index = jnp.minimum(jnp.arange(num_particles + num_particles % 2), num_particles - 1)
    halves = index.reshape(2, -1)

    def body(state: Moved) -> Moved:
        keys = jax.random.split(jax.random.fold_in(key, state.num_moves), num_particles)

        def half(scales: Any, inputs: Any) -> Any:
            def one(inputs: Any) -> Any:
                key, particle = inputs
                return kernel.step(key, particle, logdensity_fn, state.step_size, scales)

            return over(one, rule.batch_size)(inputs)

        inputs = jax.tree.map(lambda leaf: leaf[halves], (keys, state.particles))
        particles, accepted = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_particles],
            jax.vmap(half)(scales, inputs),
        )
        diverging = jnp.isnan(accepted)
        acceptance = jnp.mean(jnp.where(diverging, 0, accepted))
        count = state.num_moves + 1
        moved = jnp.mean((flatten(particles.position) - started) ** 2, 0)
        distance = state.distance.at[count].set(moved)
        return Moved(
            count,
            particles,
            distance,
            state.step_size * jnp.exp(acceptance - kernel.target_accept),
            acceptance,
            state.diverging + jnp.mean(diverging, dtype=acceptance.dtype),
            _autocorrelation(distance, count, state.autocorrelation),
            _extend(state.trail, particles.position, count),
        )

    def unfinished(state: Moved) -> Array:
        mixed = state.autocorrelation <= rule.max_autocorrelation
        return (state.num_moves < rule.max_moves) & ~mixed & ~idle

    size = started.shape[1]
    particles = over(lambda p: kernel.init(p, logdensity_fn), rule.batch_size)(position)
    own = jax.vmap(kernel.scales)(jax.tree.map(lambda leaf: leaf[halves], particles))
    scales = jax.tree.map(lambda leaf: leaf[::-1], own)
    nothing = jnp.zeros((rule.max_moves + 1, size), started.dtype)
    one, nan = jnp.ones_like(step_size), jnp.full_like(step_size, jnp.nan)
    trail = None
    if rule.num_ancestors is not None:
        trail = jax.tree.map(lambda leaf: jnp.stack([leaf] * (rule.max_moves + 1)), position)
    zero = jnp.zeros_like(step_size)
    first = Moved(jnp.zeros((), jnp.int32), particles, nothing, step_size, nan, zero, one, trail)
    return jax.lax.while_loop(unfinished, body, first)


def _extend(
    trail: dict[str, Array] | None, position: dict[str, Array], count: Int[Array, ""]
) -> dict[str, Array] | None:
    if trail is None:
        return None
    return jax.tree.map(lambda rows, row: rows.at[count].set(row), trail, position)


def _autocorrelation(
    distance: Float[Array, "moves size"], count: Int[Array, ""], last: Scalar
) -> Scalar:
    """Estimate, after an even number of moves, of the autocorrelation with the start.

    With autocorrelation `r^k` after `k` moves within a mode, the mean squared distance is
    `m_k = 2 V (1 - r^k)`, so `m_k / m_{k/2} - 1 = r^{k/2}` whatever the variance `V` of the mode:
    distances between modes, which no kernel forgets, do not enter. Mean over the coordinates.
    """
    ratio = distance[count] / distance[count // 2] - 1
    new = jnp.mean(jnp.clip(ratio, -1, 1) ** 2)
    return jnp.where((count % 2 == 0) & jnp.isfinite(new), new, last)
