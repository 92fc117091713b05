"""`NestedSampling`: posterior draws and the evidence by compressing the prior."""

import math
import os
import warnings
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.ns.adaptive import AdaptiveNSState
from blackjax.ns.adaptive import init as init_live
from blackjax.ns.base import NSInfo, StateWithLogLikelihood
from blackjax.ns.from_mcmc import build_kernel
from blackjax.ns.utils import log_weights
from jaxtyping import Array, Int

from scoreprior._run import Checkpoint, Chunk, Draws, Loop, run_chunks
from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.problem import Problem
from scoreprior.smc.contour import LivePoint, directions, live_point, slice_move
from scoreprior.smc.moves import check_fraction
from scoreprior.smc.report import check_start, draw_rows, history, identify, warn_nan

NUM_SIMULATIONS = 200
FEW_EFFECTIVE = 50
MANY_STUCK = 0.05
WIDE_SPREAD = 3.0  # of group evidences, in units of what the volumes explain


class NestedSampling(eqx.Module):
    """Nested slice sampling (Skilling 2006; Yallup, Kroupa & Handley 2026) by blackjax.

    Live points start as exact draws from the prior. At every step the `num_delete` of them with the
    lowest likelihood die, and as many survivors, copied and moved, take their places: slice
    sampling from the prior, within the contour of the last likelihood to die, along directions that
    the covariance of the live points shapes. So the prior volume `X` above the contour shrinks by
    known factors, and `Z = int L dX`. No gradient is taken, and neither phase transitions nor
    likelihoods with kinks are an obstacle; but a step of one coordinate costs several evaluations,
    so it is for tens of coordinates, not for thousands. The position is the noise `u`, whose prior
    is standard normal. A point where the log likelihood is NaN lies outside every contour; slice
    moves on the way of which there was one are `diverging`, and a warning gives their share.

    **Groups** are independent runs. Dead and last live points of all groups are merged into one run
    with `num_groups * num_live` live points (Higson et al. 2019, "Dynamic nested sampling"), whose
    volumes are simulated 200 times: `log_evidence` is the mean over simulations of `log Z`.
    `log_evidence_se` is the larger of their standard deviation, `log_evidence_se_volumes`, which is
    about `sqrt(information / (num_groups * num_live))` and takes moves for perfect, and of the
    standard error of the mean over groups, which does not.

    Draws are resampled to equal weight from the merged run, `num_samples` per group. More of them
    than `posterior_ess` are repetitions.

    **Arguments:** `num_live` points per group; `num_groups`; `num_samples`, draws per group.
    `num_inner_steps`: slice moves per new point, by default twice the number of coordinates and at
    least five. `num_delete`: points that die at a step, in parallel, by default a tenth.
    `max_remaining`: the run ends when the live points hold at most this share of the evidence.
    `max_steps` before giving up. `chunk_size`: steps between two looks at that share and two
    updates of checkpoint and progress bar.
    """

    num_live: int = eqx.field(static=True, default=500)
    num_groups: int = eqx.field(static=True, default=4)
    num_samples: int = eqx.field(static=True, default=1000)
    num_inner_steps: int | None = eqx.field(static=True, default=None, kw_only=True)
    num_delete: int | None = eqx.field(static=True, default=None, kw_only=True)
    max_remaining: float = eqx.field(static=True, default=0.01, kw_only=True)
    max_steps: int = eqx.field(static=True, default=10_000, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=10, kw_only=True)

    def __check_init__(self):
        check_count("num_live", self.num_live, least=2)
        check_count("num_groups", self.num_groups)
        check_count("num_samples", self.num_samples)
        check_count("max_steps", self.max_steps)
        check_count("chunk_size", self.chunk_size)
        check_fraction("max_remaining", self.max_remaining)
        if self.num_inner_steps is not None:
            check_count("num_inner_steps", self.num_inner_steps)
        if self.num_delete is not None:
            check_count("num_delete", self.num_delete)
            if self.num_delete >= self.num_live:
                raise ValueError(
                    f"num_delete must be below num_live = {self.num_live}, got {self.num_delete}"
                )

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`: draws [group, num_samples], of equal weight.

        `stats` hold for every draw its joint log density `lp`, its `group_of_draw` and its
        `ancestor`, the prior draw of that group whence it comes by copies and moves. `extra` holds
        `log_evidence`, `log_evidence_se`, `log_evidence_se_volumes`, `group_log_evidence` [group],
        `information`, the divergence of the posterior from the prior in nats, `posterior_ess`, and
        the record of every step, [group, step].

        With `checkpoint`, a directory, the run is stored after every chunk, and the same call
        resumes it bit for bit. Ctrl-C returns what the dead and live points so far say of the
        posterior, and a warning says which share of the evidence is still in live points: the draws
        are too wide while it is large, and the evidence is NaN. Raises `ValueError` where the log
        likelihood is NaN at a prior draw or minus infinity at all of a group's.
        """
        key_start, key_steps, key_end = jax.random.split(key, 3)
        start = _start(self, problem, key_start)
        check_start(start.particles.loglikelihood, "num_live")
        # More steps may be asked of a stopped run.
        known = problem, key, start.particles.loglikelihood, ("max_steps",)
        store = Checkpoint.of(checkpoint, lambda: identify(self, *known))

        def advance(state: AdaptiveNSState, step: int, count: int) -> Any:
            steps = jnp.asarray(step), jnp.asarray(count)
            return _advance(self, problem, state, key_steps, *steps)

        loop = Loop(self.max_steps, 0, self.chunk_size, _describe, self._is_finished)
        chunks, state, interrupted = run_chunks(
            advance, start, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted at the prior, before the first step")
        finished = self._is_finished(chunks[-1].outputs)
        points = _merge(chunks, state.particles)
        found = _weigh(key_end, points, finished)
        positions, stats = self._draw(key_end, points, found.weights)
        cut = interrupted and not finished
        draws = Draws(problem, positions, stats, cut, found.extra | history(chunks))
        self._warn(draws, finished)
        return draws

    def _is_finished(self, outputs: dict[str, dict[str, np.ndarray]]) -> bool:
        return bool(np.all(outputs["record"]["remaining"][-1] <= self.max_remaining))

    def _draw(
        self, key: Key, points: "Points", weights: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        shape = self.num_groups, self.num_samples
        rows = np.asarray(draw_rows(jax.random.fold_in(key, 1), jnp.asarray(weights), *shape))
        stats = {
            "lp": (points.log_prior + points.log_likelihood)[rows],
            "group_of_draw": points.group[rows],
            "ancestor": points.ancestor[rows],
        }
        return {name: leaf[rows] for name, leaf in points.position.items()}, stats

    def _warn(self, draws: Draws, finished: bool) -> None:
        record = {name: values for name, (_, values) in draws.extra.items()}
        if (diverging := float(record["diverging"].mean())) > 0:
            what = f"the log likelihood was NaN on the way of {diverging:.2g} of all slice moves"
            warn_nan(what, stacklevel=3)
        if not finished:
            self._warn_unfinished(draws.interrupted, float(record["remaining"][:, -1].max()))
            return
        if (ess := float(record["posterior_ess"])) < FEW_EFFECTIVE:
            warnings.warn(
                f"collapsed cloud: the draws stand for {ess:.0f} independent ones; raise num_live "
                f"above {self.num_live}",
                stacklevel=3,
            )
        if (stuck := float(record["stuck"].mean())) > MANY_STUCK:
            warnings.warn(
                f"{stuck:.0%} of the slice moves found no point within the contour and stayed: the "
                "likelihood may be flat or noisy near its maximum; raise max_remaining above "
                f"{self.max_remaining}, or num_live above {self.num_live}",
                stacklevel=3,
            )
        groups = record["group_log_evidence"]
        if len(groups) > 1:
            se = groups.std(ddof=1) / math.sqrt(len(groups))
            if se > WIDE_SPREAD * record["log_evidence_se_volumes"]:
                warnings.warn(
                    f"groups disagree on the log evidence, from {groups.min():.3g} to "
                    f"{groups.max():.3g}, more than the volumes explain: raise num_inner_steps, or "
                    f"num_live above {self.num_live}",
                    stacklevel=3,
                )

    def _warn_unfinished(self, interrupted: bool, remaining: float) -> None:
        why, remedy = (
            ("interrupted", "run again with the same checkpoint to go on")
            if interrupted
            else (f"max_steps = {self.max_steps} reached", "raise max_steps")
        )
        warnings.warn(
            f"{why} with {remaining:.2g} of the evidence in live points: the draws are wider than "
            f"the posterior; {remedy}",
            stacklevel=4,
        )


class Points(NamedTuple):
    """Dead points and last live points of all groups, group after group, on the host."""

    position: dict[str, np.ndarray]  # [point, *site]
    log_prior: np.ndarray
    log_likelihood: np.ndarray
    birth: np.ndarray  # log likelihood of the contour within which it was drawn, NaN for the prior
    ancestor: np.ndarray  # the prior draw of its group whence it comes
    group: np.ndarray


class Found(NamedTuple):
    """Posterior weights of the points, and what is known of the evidence."""

    weights: np.ndarray
    extra: dict[str, Any]


@eqx.filter_jit
def _start(engine: NestedSampling, problem: Problem, key: Key) -> AdaptiveNSState:
    def one(key: Key) -> AdaptiveNSState:
        positions = jax.vmap(problem.initial)(jax.random.split(key, engine.num_live))

        def init(positions: Any) -> LivePoint:
            ancestors = jnp.arange(engine.num_live, dtype=jnp.int32)
            return jax.vmap(partial(live_point, problem))(positions, ancestors)

        return init_live(positions, init, update_inner_kernel_params_fn=directions, rng_key=key)

    return jax.vmap(one)(jax.random.split(key, engine.num_groups))


@eqx.filter_jit
def _advance(
    engine: NestedSampling,
    problem: Problem,
    state: AdaptiveNSState,
    key: Key,
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[AdaptiveNSState, dict[str, dict[str, Array]]]:
    """`count` steps of all groups from step `start`; outputs have `chunk_size` rows."""

    def step(i: Array, state: AdaptiveNSState) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, start + i), engine.num_groups)
        return jax.vmap(lambda key, state: _step(engine, problem, key, state))(keys, state)

    def body(i: Array, carry: Any) -> Any:
        state, rows = carry
        state, row = step(i, state)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)

    template = jax.eval_shape(lambda state: step(jnp.zeros_like(start), state)[1], state)
    rows = jax.tree.map(
        lambda leaf: jnp.zeros((engine.chunk_size, *leaf.shape), leaf.dtype), template
    )
    return jax.lax.fori_loop(0, count, body, (state, rows))


def _step(engine: NestedSampling, problem: Problem, key: Key, state: AdaptiveNSState) -> Any:
    size = sum(leaf[0].size for leaf in jax.tree.leaves(state.particles.position))

    def move(key: Key, point: LivePoint, loglikelihood_0: Array, covariance_factor: Array) -> Any:
        return slice_move(problem, key, point, loglikelihood_0, covariance_factor)

    num_inner_steps = engine.num_inner_steps or max(5, 2 * size)
    num_delete = engine.num_delete or max(1, engine.num_live // 10)
    kernel = build_kernel(move, num_inner_steps, directions, num_delete)
    state, info = kernel(key, state)
    dead, slices, integral = info.particles, info.update_info, state.integrator
    total = jnp.logaddexp(integral.logZ, integral.logZ_live)
    record = {
        "log_volume": integral.logX,
        "log_evidence_so_far": total,
        "remaining": jnp.exp(integral.logZ_live - total),
        "evaluations": jnp.mean(slices["n_steps"]),
        "stuck": jnp.mean(~slices["found"]),
        "diverging": jnp.mean(slices["diverging"]),
    }
    numbers = {
        "log_prior": dead.logdensity,
        "log_likelihood": dead.loglikelihood,
        "birth": dead.loglikelihood_birth,
        "ancestor": dead.ancestor,
    }
    return state, {"position": dead.position, "dead": numbers, "record": record}


def _merge(chunks: list[Chunk], live: LivePoint) -> Points:
    """All points, in the order of the groups."""
    dead = [chunk.outputs for chunk in chunks]

    def join(kind: str, name: str, last: Array) -> np.ndarray:
        # Leaves [step, group, num_delete, ...], then [group, num_live, ...].
        rows = np.concatenate([outputs[kind][name] for outputs in dead]).swapaxes(0, 1)
        rows = rows.reshape(len(rows), -1, *rows.shape[3:])
        rows = np.concatenate([rows, np.asarray(last)], 1)
        return rows.reshape(-1, *rows.shape[2:])

    position = {name: join("position", name, leaf) for name, leaf in live.position.items()}
    log_likelihood = join("dead", "log_likelihood", live.loglikelihood)
    num_groups = len(live.loglikelihood)
    return Points(
        position,
        join("dead", "log_prior", live.logdensity),
        log_likelihood,
        join("dead", "birth", live.loglikelihood_birth),
        join("dead", "ancestor", live.ancestor),
        np.repeat(np.arange(num_groups), len(log_likelihood) // num_groups),
    )


def _weigh(key: Key, points: Points, finished: bool) -> Found:
    """Weights and evidence of the merged run, and evidence of each group."""
    simulated = _simulate(key, points.log_likelihood, points.birth)
    log_z = np.logaddexp.reduce(simulated, 0)
    shares = np.exp(simulated - log_z).mean(1)
    num_groups = points.group[-1] + 1
    groups = np.array(
        [
            np.logaddexp.reduce(
                _simulate(key, points.log_likelihood[own], points.birth[own]), 0
            ).mean()
            for own in (points.group == group for group in range(num_groups))
        ]
    )
    volumes = log_z.std(ddof=1)
    spread = groups.std(ddof=1) / math.sqrt(num_groups) if num_groups > 1 else 0.0
    possible = shares > 0
    information = np.sum(shares[possible] * points.log_likelihood[possible]) - log_z.mean()
    known = {
        "log_evidence": log_z.mean(),
        "log_evidence_se": max(volumes, spread),
        "log_evidence_se_volumes": volumes,
        "group_log_evidence": groups,
        "information": information,
    }
    values = {n: np.asarray(value if finished else value * np.nan) for n, value in known.items()}
    values["posterior_ess"] = np.asarray(1 / np.sum(shares**2))
    extra = {n: (("group",) if value.ndim else (), value) for n, value in values.items()}
    return Found(shares, extra)


def _simulate(key: Key, log_likelihood: np.ndarray, birth: np.ndarray) -> np.ndarray:
    """Log of `likelihood * dX` [point, simulation].

    Always in double precision: the volumes are sums of many small numbers.
    """
    with jax.enable_x64(True):
        values, births = jnp.asarray(log_likelihood, float), jnp.asarray(birth, float)
        nothing = jnp.zeros_like(values)
        particles = StateWithLogLikelihood(nothing, nothing, values, births)
        return np.asarray(log_weights(key, NSInfo(particles, ()), NUM_SIMULATIONS))


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    record = {name: values[-1] for name, values in outputs["record"].items()}
    return (
        f"log volume {record['log_volume'].mean():.1f}, log evidence "
        f"{record['log_evidence_so_far'].mean():.2f}, {record['remaining'].max():.2g} of it remains"
    )
