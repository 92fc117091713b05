"""`TemperedSMC`: posterior draws and the evidence by a cloud of particles that is slowly cooled."""

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._run import Checkpoint, Chunk, Draws, Loop, fingerprint, key_words, run_chunks
from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.problem import Problem
from scoreprior.smc.moves import AbstractMoves, HMCMoves, check_fraction
from scoreprior.smc.resample import systematic
from scoreprior.smc.step import Cloud, Rule, start, temper

FEW_ANCESTORS = 5
LOW_ACCEPTANCE = 0.5  # of the target


class TemperedSMC(eqx.Module):
    """Sequential Monte Carlo along `prior * likelihood^lam` (Del Moral, Doucet & Jasra 2006).

    Particles start as exact draws from the prior, at temperature `lam = 0`, and arrive at the
    posterior, `lam = 1`. At each temperature they are weighted by `likelihood^(lam' - lam)`,
    resampled systematically to equal weights and moved by a Markov kernel. Modes get their mass
    from the weights, so a posterior with separate modes is no obstacle. The product of the mean
    weights estimates the evidence `p(y)`.

    **Groups** are independent repetitions, in one compiled program. With `Z_g` the evidence found
    by group `g` of `G`,

        log_evidence    = log mean_g Z_g
        log_evidence_se = sqrt(sum_g (Z_g / mean(Z) - 1)^2 / (G (G - 1)))

    the latter the standard error of `mean(Z)` relative to it; NaN for one group. Particles of all
    groups are at last resampled together, group `g` with weight `Z_g`, so draws have equal weight
    and a group that missed a mode counts for little. Rows of the result, its chains, hold the
    groups in order: where all find the same evidence, row `g` is group `g`.

    **Tuning** is by the cloud itself, for each group alone. The next temperature is that at which
    the effective sample size falls to `target_ess`. The kernel measures its scales on the resampled
    cloud; its step size goes on from temperature to temperature and is corrected after every move
    by `log step += acceptance - target`. Moves end when the autocorrelation with the start, within
    modes and as a mean over coordinates, is at most `max_autocorrelation`, or after `max_moves`.
    Each move leaves its target invariant, but settings that depend on the cloud make the evidence
    consistent in the number of particles rather than exactly unbiased (Beskos, Jasra, Kantas &
    Thiery 2016, "On the convergence of adaptive sequential Monte Carlo methods").

    **Arguments:** `num_particles` per group; `num_groups`. `kernel`: `HMCMoves(...)`,
    `RandomWalkMoves(...)`. `centred`: move `x` with the prior's density policy, rather than its
    noise. `target_ess`, `max_autocorrelation` in (0, 1). `max_temperatures` before giving up.
    `batch_size`: particles of a group moved at once, all by default, to bound memory.
    """

    num_particles: int = eqx.field(static=True, default=1000)
    num_groups: int = eqx.field(static=True, default=4)
    kernel: AbstractMoves = eqx.field(default=HMCMoves(), kw_only=True)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    target_ess: float = eqx.field(static=True, default=0.9, kw_only=True)
    max_autocorrelation: float = eqx.field(static=True, default=0.5, kw_only=True)
    max_moves: int = eqx.field(static=True, default=50, kw_only=True)
    max_temperatures: int = eqx.field(static=True, default=200, kw_only=True)
    batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_count("num_particles", self.num_particles, least=2)
        check_count("num_groups", self.num_groups)
        check_count("max_moves", self.max_moves, least=2)
        check_count("max_temperatures", self.max_temperatures)
        check_fraction("target_ess", self.target_ess)
        check_fraction("max_autocorrelation", self.max_autocorrelation)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if not isinstance(self.kernel, AbstractMoves):
            raise TypeError(f"kernel must be moves such as HMCMoves(), got {self.kernel!r}")

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`: draws [group, particle], of equal weight.

        `stats` hold for every draw its joint log density `lp`, its `group_of_draw`, and its
        `ancestor`, the prior draw of that group whence it comes. `extra` holds `log_evidence`,
        `log_evidence_se`, `group_log_evidence` [group] and the record of every temperature,
        [group, step].

        With `checkpoint`, a directory, the run is stored after every temperature, and the same call
        resumes it bit for bit. Ctrl-C returns the clouds at the temperatures they have reached:
        draws from `prior * likelihood^temperature` and no posterior, which a warning and an
        evidence of NaN say. Raises `ValueError` where the log likelihood is NaN at a prior draw or
        minus infinity at all of a group's, and `NotImplementedError` for the centred form of a
        prior without a density.
        """
        problem = problem.centred() if self.centred else problem
        key_start, key_steps, key_end = jax.random.split(key, 3)
        clouds = _start(self, problem, key_start)
        _check_start(clouds)
        store = None
        if checkpoint is not None:
            store = Checkpoint(checkpoint, self._settings(problem, key, clouds))

        def advance(clouds: Cloud, step: int, count: int) -> Any:
            return _advance(self, problem, clouds, key_steps, jnp.asarray(step))

        loop = Loop(self.max_temperatures, 0, 1, _describe, _is_finished)
        chunks, clouds, interrupted = run_chunks(
            advance, clouds, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted at the prior, before the first temperature")
        finished = bool(np.all(np.asarray(clouds.temperature) >= 1))
        positions, stats = jax.tree.map(np.asarray, _finish(problem, clouds, key_end, finished))
        extra = _evidence(np.asarray(clouds.log_evidence, float), finished) | _history(chunks)
        draws = Draws(problem, positions, stats, interrupted and not finished, extra)
        self._warn(draws, finished)
        return draws

    def _rule(self) -> Rule:
        return Rule(
            self.kernel,
            self.target_ess,
            self.max_autocorrelation,
            self.max_moves,
            self.batch_size,
        )

    def _settings(self, problem: Problem, key: Key, clouds: Cloud) -> dict[str, Any]:
        """What identifies a run, `max_temperatures` apart: more may be asked of a stopped one."""
        engine = {name: value for name, value in vars(self).items() if name != "max_temperatures"}
        return {
            "engine": type(self).__name__,
            **engine,
            "kernel": repr(self.kernel),
            "key": key_words(key),
            "data": fingerprint((problem.args, problem.kwargs, problem.sites.params)),
            "log_likelihood_at_start": fingerprint(clouds.log_likelihood),
        }

    def _warn(self, draws: Draws, finished: bool) -> None:
        record = {name: values for name, (_, values) in draws.extra.items()}
        if not finished:
            reached = record["temperature"][:, -1].min()
            why = (
                "interrupted"
                if draws.interrupted
                else f"max_temperatures = {self.max_temperatures} reached"
            )
            remedy = (
                "run again with the same checkpoint to go on"
                if draws.interrupted
                else "raise max_temperatures, or check the units of the noise"
            )
            warnings.warn(
                f"{why} at temperature {reached:.3g} of 1: the draws are from prior * "
                f"likelihood^temperature and not from the posterior; {remedy}",
                stacklevel=3,
            )
            return
        self._warn_clouds(record)

    def _warn_clouds(self, record: Mapping[str, np.ndarray]) -> None:
        ancestors = record["unique_ancestors"][:, -1]
        if (fewest := int(ancestors.min())) < FEW_ANCESTORS:
            warnings.warn(
                f"collapsed cloud: the {self.num_particles} particles of a group descend from only "
                f"{fewest} prior draws, so the masses of separate modes are unreliable; raise "
                f"num_particles, or target_ess above {self.target_ess}",
                stacklevel=4,
            )
        # The mean over groups, still moving, at the worst temperature.
        worst = float(np.nanmean(record["acceptance_rate"], 0).min())
        if worst < LOW_ACCEPTANCE * self.kernel.target_accept:
            warnings.warn(
                f"the acceptance rate fell to {worst:.2g} (target {self.kernel.target_accept}), so "
                "particles may not have moved: raise max_moves above "
                f"{self.max_moves}, or use the non-centred form (centred=False)",
                stacklevel=4,
            )
        groups = record["group_log_evidence"]
        shares = np.exp(groups - groups.max())
        if shares.sum() ** 2 / (shares**2).sum() < max(len(groups) / 2, 1):
            warnings.warn(
                f"groups disagree on the log evidence, from {groups.min():.3g} to "
                f"{groups.max():.3g}, and the draws are mostly from the best: raise num_particles "
                f"above {self.num_particles}, or target_ess above {self.target_ess}",
                stacklevel=4,
            )


@eqx.filter_jit
def _start(engine: TemperedSMC, problem: Problem, key: Key) -> Cloud:
    rule, keys = engine._rule(), jax.random.split(key, engine.num_groups)
    return jax.vmap(lambda key: start(problem, rule, engine.num_particles, key))(keys)


@eqx.filter_jit
def _advance(
    engine: TemperedSMC, problem: Problem, clouds: Cloud, key: Key, step: Array
) -> tuple[Cloud, dict[str, dict[str, Array]]]:
    """All clouds one temperature on; the record has leaves [1, group]."""
    rule = engine._rule()
    keys = jax.random.split(jax.random.fold_in(key, step), engine.num_groups)
    clouds, record = jax.vmap(lambda cloud, key: temper(problem, rule, cloud, key))(clouds, keys)
    return clouds, {"record": jax.tree.map(lambda leaf: leaf[None], record)}


@eqx.filter_jit
def _finish(
    problem: Problem, clouds: Cloud, key: Key, finished: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draws [group, particle] of equal weight and statistics; clouds unchanged if unfinished."""
    shape = clouds.log_likelihood.shape
    log_prior = jax.lax.map(jax.vmap(problem.log_prior), clouds.position)
    stats = {
        "lp": log_prior + clouds.log_likelihood,
        "group_of_draw": jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape),
        "ancestor": clouds.ancestor,
    }
    if not finished:
        return clouds.position, stats
    weights = jnp.repeat(jax.nn.softmax(clouds.log_evidence), shape[1])
    chosen = systematic(key, weights, math.prod(shape))

    def take(leaf: Array) -> Array:
        return leaf.reshape(-1, *leaf.shape[2:])[chosen].reshape(leaf.shape)

    return jax.tree.map(take, (clouds.position, stats))


def _check_start(clouds: Cloud) -> None:
    log_likelihood = np.asarray(clouds.log_likelihood)
    bad = np.isnan(log_likelihood) | (log_likelihood == np.inf)
    if bad.any():
        raise ValueError(
            f"the log likelihood is NaN or plus infinity at {bad.sum()} of {bad.size} prior draws: "
            "check the data for NaN, and the model at extreme draws from its prior"
        )
    dead = (log_likelihood == -np.inf).all(1)
    if dead.any():
        raise ValueError(
            f"the log likelihood is minus infinity at all {log_likelihood.shape[1]} prior draws of "
            f"{dead.sum()} of {len(dead)} groups: check that the data are possible under the "
            "prior, or raise num_particles"
        )


def _evidence(groups: np.ndarray, finished: bool) -> dict[str, Any]:
    """Evidence of the groups and of all; NaN before the posterior is reached."""
    if not finished:
        groups = np.full_like(groups, np.nan)
    shares = np.exp(groups - groups.max())
    mean, count = shares.mean(), len(groups)
    spread = ((shares / mean - 1) ** 2).sum()
    se = math.sqrt(spread / (count * (count - 1))) if count > 1 else math.nan
    return {
        "log_evidence": ((), np.asarray(groups.max() + np.log(mean))),
        "log_evidence_se": ((), np.asarray(se)),
        "group_log_evidence": (("group",), groups),
    }


def _history(chunks: list[Chunk]) -> dict[str, Any]:
    """The record of every temperature, [group, step]."""
    records = [chunk.outputs["record"] for chunk in chunks]
    return {
        name: (("group", "step"), np.concatenate([record[name] for record in records]).T)
        for name in records[0]
    }


def _is_finished(outputs: dict[str, dict[str, np.ndarray]]) -> bool:
    return bool(np.all(outputs["record"]["temperature"][-1] >= 1))


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    record = {name: values[-1] for name, values in outputs["record"].items()}
    return (
        f"temperature {record['temperature'].min():.3g}, ESS {record['ess'].min():.0f}, "
        f"{record['num_moves'].max()} moves"
    )
