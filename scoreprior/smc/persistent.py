"""`PersistentSMC`: tempered sequential Monte Carlo in which no particle is thrown away."""

import os
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc.ess import ess, log_ess
from blackjax.smc.persistent_sampling import (
    PersistentSMCState,
    compute_log_persistent_weights,
)
from blackjax.smc.persistent_sampling import step as persistent_step
from blackjax.smc.solver import dichotomy
from jaxtyping import Array, Float, Int

from scoreprior._run import Checkpoint, Draws, Loop, run_chunks
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.feynman_kac import count_distinct, over, systematic
from scoreprior.problem import Problem
from scoreprior.smc.moves import AbstractMoves, HMCMoves, check_fraction
from scoreprior.smc.report import (
    check_start,
    describe,
    draw_rows,
    history,
    identify,
    is_finished,
    pool_evidence,
    warn_clouds,
)
from scoreprior.smc.step import Rule, move, tempered, weigh


class Ensemble(NamedTuple):
    """The particles of all temperatures so far, and what the next takes over from them."""

    persistent: PersistentSMCState  # leaves [row, particle, ...], zero beyond row `iteration`
    ancestor: Int[Array, "row particle"]  # the prior draw whence a particle comes
    step_size: Scalar


class PersistentSMC(eqx.Module):
    """Persistent sampling (Karamanis & Seljak 2024) along `prior * likelihood^lam`.

    As `TemperedSMC`, but the particles of all temperatures are kept. Together they are a sample of
    the mixture `q = mean_s prior * likelihood^lam_s / Z_s`, and for temperature `lam` each has the
    weight `likelihood^lam / mean_s (likelihood^lam_s / Z_s)` (equations 14 to 16 there), whose mean
    over all of them estimates the evidence `Z` at `lam`. New particles are resampled from the whole
    ensemble and moved. Evidence and posterior rest on many more particles than are moved at once,
    for the same evaluations and more memory: every particle of every temperature is stored,
    `max_temperatures * num_particles` in each group. The algorithm is blackjax's.

    Draws are resampled to equal weight, `num_samples` per group, from the ensembles of all groups
    together, each with its evidence as weight. More of them than `posterior_ess` are repetitions.
    `log_evidence` and its standard error come from the groups as for `TemperedSMC`.

    **Tuning** is that of `TemperedSMC`. The next temperature is that at which the effective sample
    size of the ensemble falls to `target_ess * num_particles`, where `target_ess` may be above one.
    The ensemble starts with more prior draws than that.

    **Arguments:** `num_particles` moved at a time, per group; `num_groups`; `num_samples`, draws
    per group. `kernel`, `centred`, `max_autocorrelation`, `max_moves`, `batch_size`: as for
    `TemperedSMC`. `target_ess`, in units of `num_particles`. `max_temperatures` before giving up.
    """

    num_particles: int = eqx.field(static=True, default=500)
    num_groups: int = eqx.field(static=True, default=4)
    num_samples: int = eqx.field(static=True, default=1000)
    kernel: AbstractMoves = eqx.field(default=HMCMoves(), kw_only=True)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    target_ess: float = eqx.field(static=True, default=2.0, kw_only=True)
    max_autocorrelation: float = eqx.field(static=True, default=0.5, kw_only=True)
    max_moves: int = eqx.field(static=True, default=50, kw_only=True)
    max_temperatures: int = eqx.field(static=True, default=100, kw_only=True)
    batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_count("num_particles", self.num_particles, least=4)
        check_count("num_groups", self.num_groups)
        check_count("num_samples", self.num_samples)
        check_count("max_moves", self.max_moves, least=2)
        check_count("max_temperatures", self.max_temperatures)
        check_positive("target_ess", self.target_ess)
        check_fraction("max_autocorrelation", self.max_autocorrelation)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if not isinstance(self.kernel, AbstractMoves):
            raise TypeError(f"kernel must be moves such as HMCMoves(), got {self.kernel!r}")

    @property
    def num_prior_rows(self) -> int:
        """Rows of prior draws with which an ensemble starts."""
        return int(self.target_ess) + 1

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`: draws [group, num_samples], of equal weight.

        `stats` hold for every draw its joint log density `lp`, its `group_of_draw`, the
        `temperature_of_draw` at which it was made and its `ancestor`, the prior draw of that group
        whence it comes. `extra` holds `log_evidence`, `log_evidence_se`, `group_log_evidence` and
        `posterior_ess` [group], the effective sample size of the last weights, and the record of
        every temperature, [group, step].

        Checkpoints, Ctrl-C and errors are as for `TemperedSMC.run`, but for one thing:
        `max_temperatures` is a size of the stored arrays, and cannot be raised on resuming.
        """
        problem = problem.centred() if self.centred else problem
        key_start, key_steps, key_end = jax.random.split(key, 3)
        start = _start(self, problem, key_start)
        rows = start.persistent.persistent_log_likelihoods[:, : self.num_prior_rows]
        log_likelihood = rows.reshape(self.num_groups, -1)
        check_start(log_likelihood, "num_particles")
        store = Checkpoint.of(checkpoint, lambda: identify(self, problem, key, log_likelihood))

        def advance(ensembles: Ensemble, step: int, count: int) -> Any:
            return _advance(self, problem, ensembles, key_steps, jnp.asarray(step))

        loop = Loop(self.max_temperatures, 0, 1, describe, is_finished)
        chunks, ensembles, interrupted = run_chunks(
            advance, start, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted at the prior, before the first temperature")
        finished = is_finished(chunks[-1].outputs)
        positions, stats, own = jax.tree.map(np.asarray, _finish(self, problem, ensembles, key_end))
        extra = pool_evidence(np.asarray(own["log_evidence"], float), finished)
        extra["posterior_ess"] = (("group",), own["ess"])
        cut = interrupted and not finished
        draws = Draws(problem, positions, stats, cut, extra | history(chunks))
        warn_clouds(self, draws, finished)
        return draws

    @property
    def more_moves(self) -> str:
        """The remedy for particles that do not move."""
        return f"raise max_moves above {self.max_moves}"


@eqx.filter_jit
def _start(engine: PersistentSMC, problem: Problem, key: Key) -> Ensemble:
    """Ensembles of prior draws at temperature zero, whose evidence is one."""
    shape = engine.num_prior_rows, engine.num_particles
    num_rows = shape[0] + engine.max_temperatures

    def pad(leaf: Array) -> Array:
        leaf = leaf.reshape(*shape, *leaf.shape[1:])
        return jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype).at[: shape[0]].set(leaf)

    def one(key: Key) -> Ensemble:
        keys = jax.random.split(key, shape[0] * shape[1])
        position = over(problem.initial, engine.batch_size)(keys)
        log_likelihood = over(problem.log_likelihood, engine.batch_size)(position)
        size = sum(leaf[0].size for leaf in jax.tree.leaves(position))
        zeros = jnp.zeros(num_rows, log_likelihood.dtype)
        persistent = PersistentSMCState(
            jax.tree.map(pad, position),
            pad(log_likelihood),
            zeros,
            zeros,
            jnp.asarray(shape[0] - 1, jnp.int32),
        )
        ancestor = pad(jnp.arange(len(keys), dtype=jnp.int32))
        return Ensemble(persistent, ancestor, zeros[0] + engine.kernel.first_step_size(size))

    return jax.vmap(one)(jax.random.split(key, engine.num_groups))


@eqx.filter_jit
def _advance(
    engine: PersistentSMC, problem: Problem, ensembles: Ensemble, key: Key, step: Array
) -> tuple[Ensemble, dict[str, dict[str, Array]]]:
    """All ensembles one temperature on; the record has leaves [1, group]."""
    keys = jax.random.split(jax.random.fold_in(key, step), engine.num_groups)
    ensembles, record = jax.vmap(lambda ensemble, key: _grow(engine, problem, ensemble, key))(
        ensembles, keys
    )
    return ensembles, {"record": jax.tree.map(lambda leaf: leaf[None], record)}


def _grow(
    engine: PersistentSMC, problem: Problem, ensemble: Ensemble, key: Key
) -> tuple[Ensemble, dict[str, Array]]:
    """The ensemble with the particles of one more temperature; one at the end stays as it is."""
    old = ensemble.persistent
    idle = old.tempering_param >= 1
    temperature, size = next_temperature(old, engine.target_ess)
    rule = Rule(
        engine.kernel,
        engine.target_ess,
        engine.max_autocorrelation,
        engine.max_moves,
        engine.batch_size,
    )
    logdensity_fn = tempered(problem, temperature)

    def update(keys: Array, position: Any) -> tuple[Any, Any]:
        moved = move(rule, logdensity_fn, position, ensemble.step_size, idle, keys[0])
        return moved.particles.position, moved

    new, info = persistent_step(
        key,
        old,
        temperature,
        problem.log_likelihood,
        update,
        systematic,
        batch_size=engine.batch_size or 0,
    )
    moved, parents = info.update_info, info.ancestors
    ancestors = ensemble.ancestor.reshape(-1)[parents]
    ancestor = ensemble.ancestor.at[new.iteration].set(ancestors)
    grown = Ensemble(new, ancestor, moved.step_size)
    grown = jax.tree.map(lambda old, new: jnp.where(idle, old, new), ensemble, grown)
    record = {
        "temperature": grown.persistent.tempering_param,
        "log_evidence_so_far": grown.persistent.log_Z,
        "ess": size,
        "unique_parents": count_distinct(parents, ancestor.size),
        "unique_ancestors": count_distinct(
            grown.ancestor[grown.persistent.iteration],
            engine.num_prior_rows * engine.num_particles,
        ),
        "num_moves": moved.num_moves,
        "acceptance_rate": moved.acceptance,
        "diverging": moved.diverging / jnp.maximum(moved.num_moves, 1),
        "step_size": grown.step_size,
        "autocorrelation": moved.autocorrelation,
    }
    return grown, record


def next_temperature(state: PersistentSMCState, target_ess: float) -> tuple[Scalar, Scalar]:
    """The next temperature, and the effective sample size of the ensemble there.

    The size is `target_ess` times the number of particles, or more at temperature one. Where it is
    below that already, the temperature stays, and another row of particles is to come. blackjax's
    own search (Karamanis & Seljak 2024, algorithm 2) computes the mixture anew for every
    temperature that it tries; here it is computed once.
    """
    log_mixture = _log_mixture(state)
    now = state.tempering_param

    def log_weights(step: Scalar) -> Float[Array, " n"]:
        power = weigh(state.persistent_log_likelihoods, now + step)
        return (power - log_mixture).reshape(-1)

    target = jnp.log(target_ess * state.num_particles)
    step = dichotomy(lambda step: log_ess(log_weights(step)) - target, jnp.zeros_like(now), 1 - now)
    step = jnp.where(jnp.isnan(step), 0, step)
    temperature = jnp.where(step >= 1 - now, 1, now + step)
    return temperature, ess(log_weights(temperature - now))


def _log_mixture(state: PersistentSMCState) -> Float[Array, "row particle"]:
    """`log mean_s likelihood^lam_s / Z_s`, infinite beyond the rows so far."""
    row = state.iteration + 1
    schedule = state.tempering_schedule.at[row].set(0)
    negative, log_mean = compute_log_persistent_weights(
        state.persistent_log_likelihoods, state.persistent_log_Z, schedule, row
    )
    return -(negative + log_mean)


@eqx.filter_jit
def _finish(
    engine: PersistentSMC, problem: Problem, ensembles: Ensemble, key: Key
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Draws [group, num_samples] of equal weight, their statistics, and those of the groups."""
    persistent = ensembles.persistent

    def weights_of(state: PersistentSMCState) -> tuple[Array, Scalar, Array]:
        log_weights, _ = compute_log_persistent_weights(
            state.persistent_log_likelihoods,
            state.persistent_log_Z,
            state.tempering_schedule,
            state.iteration,
            include_current=True,
        )
        weights = jax.nn.softmax(log_weights.reshape(-1))
        temperature = jnp.broadcast_to(state.tempering_schedule[:, None], log_weights.shape)
        return weights, state.log_Z, temperature

    weights, log_evidence, temperature = jax.vmap(weights_of)(persistent)
    shares = jax.nn.softmax(log_evidence)[:, None] * weights
    rows = draw_rows(key, shares.reshape(-1), engine.num_groups, engine.num_samples)

    def take(leaf: Array) -> Array:
        return leaf.reshape(-1, *leaf.shape[3:])[rows]

    positions = jax.tree.map(take, persistent.persistent_particles)
    log_prior = jax.lax.map(jax.vmap(problem.log_prior), positions)
    group = jnp.broadcast_to(jnp.arange(engine.num_groups)[:, None, None], temperature.shape)
    stats = {
        "lp": log_prior + take(persistent.persistent_log_likelihoods),
        "group_of_draw": take(group),
        "temperature_of_draw": take(temperature),
        "ancestor": take(ensembles.ancestor),
    }
    own = {"log_evidence": log_evidence, "ess": 1 / jnp.sum(weights**2, 1)}
    return positions, stats, own
