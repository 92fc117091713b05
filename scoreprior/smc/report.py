"""What the engines of this package have in common beside the algorithm: checks and reports.

Groups are independent repetitions of one algorithm, in one compiled program.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from scoreprior._run import Chunk, Draws, fingerprint, key_words
from scoreprior._typing import Key
from scoreprior.feynman_kac import systematic
from scoreprior.problem import Problem
from scoreprior.smc.moves import AbstractMoves

FEW_ANCESTORS = 5
LOW_ACCEPTANCE = 0.5  # of the target


def check_start(log_likelihood: Array, name: str) -> None:
    """Raise `ValueError` for prior draws [group, particle] from which no run can start.

    `name` is the setting that asks for more of them.
    """
    values = np.asarray(log_likelihood)
    bad = np.isnan(values) | (values == np.inf)
    if bad.any():
        raise ValueError(
            f"the log likelihood is NaN or plus infinity at {bad.sum()} of {bad.size} prior draws: "
            "check the data for NaN, and the model at extreme draws from its prior"
        )
    dead = (values == -np.inf).all(1)
    if dead.any():
        raise ValueError(
            f"the log likelihood is minus infinity at all {values.shape[1]} prior draws of "
            f"{dead.sum()} of {len(dead)} groups: check that the data are possible under the "
            f"prior, or raise {name}"
        )


def identify(
    engine: Any, problem: Problem, key: Key, log_likelihood: Array, free: Iterable[str] = ()
) -> dict[str, Any]:
    """What identifies a run for its checkpoint; settings in `free` may change."""
    settings = {name: value for name, value in vars(engine).items() if name not in free}
    moves = {n: repr(value) for n, value in settings.items() if isinstance(value, AbstractMoves)}
    return {
        "engine": type(engine).__name__,
        **settings,
        **moves,
        "key": key_words(key),
        "data": fingerprint((problem.args, problem.kwargs, problem.sites.params)),
        "log_likelihood_at_start": fingerprint(log_likelihood),
    }


def pool_evidence(groups: np.ndarray, finished: bool) -> dict[str, Any]:
    """Evidence of the groups and of all; NaN before the posterior is reached.

    With `Z_g` the evidence found by group `g` of `G`, `log_evidence = log mean_g Z_g` and
    `log_evidence_se = sqrt(sum_g (Z_g / mean(Z) - 1)^2 / (G (G - 1)))`.
    """
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


def history(chunks: list[Chunk]) -> dict[str, Any]:
    """The record of every step, [group, step]."""
    records = [chunk.outputs["record"] for chunk in chunks]
    return {
        name: (("group", "step"), np.concatenate([record[name] for record in records]).T)
        for name in records[0]
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw_rows(key: Key, weights: Array, num_groups: int, num_samples: int) -> Array:
    """Indices [group, num_samples] of draws from weighted particles, in the order of the groups.

    Resampled systematically, so their order is that of the particles; within a row it is then made
    random, since no chain should climb from the prior to the posterior.
    """
    key_resample, key_order = jax.random.split(key)
    chosen = systematic(key_resample, weights, num_groups * num_samples)
    rows = chosen.reshape(num_groups, num_samples)
    return jax.random.permutation(key_order, rows, axis=1, independent=True)


def is_finished(outputs: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    """Whether every group has come to temperature one."""
    return bool(np.all(outputs["record"]["temperature"][-1] >= 1))


def describe(outputs: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The last temperature, for the progress bar."""
    record = {name: values[-1] for name, values in outputs["record"].items()}
    return (
        f"temperature {record['temperature'].min():.3g}, ESS {record['ess'].min():.0f}, "
        f"{record['num_moves'].max()} moves"
    )


def warn_clouds(engine: Any, draws: Draws, finished: bool) -> None:
    """Warn of clouds that are not at the posterior, collapsed, stuck or at odds."""
    record = {name: values for name, (_, values) in draws.extra.items()}
    if (count := record["diverging"] * record["num_moves"]).any():
        share = count.sum() / record["num_moves"].sum()
        warn_nan(f"the density was NaN at {share:.2g} of all proposed moves", stacklevel=4)
    if not finished:
        _warn_unfinished(engine, draws.interrupted, record["temperature"][:, -1].min())
        return
    more = f"num_particles above {engine.num_particles}, or target_ess above {engine.target_ess}"
    _warn_collapse(int(record["unique_ancestors"][:, -1].min()), engine.num_particles, more)
    # The mean over groups, still moving, at the worst temperature.
    _warn_acceptance(float(np.nanmean(record["acceptance_rate"], 0).min()), engine)
    warn_groups(record["group_log_evidence"], more)


def warn_nan(what: str, stacklevel: int) -> None:
    """Warn that points of no density were refused; `what` says how many."""
    warnings.warn(
        f"{what}, and these points were refused as if it were minus infinity: where the model is "
        "impossible return minus infinity, where it is possible keep it finite",
        stacklevel=stacklevel + 1,
    )


def warn_groups(groups: np.ndarray, remedy: str) -> None:
    """Warn where one group, or few, have all the weight."""
    shares = np.exp(groups - groups.max())
    if shares.sum() ** 2 / (shares**2).sum() < max(len(groups) / 2, 1):
        warnings.warn(
            f"groups disagree on the log evidence, from {groups.min():.3g} to "
            f"{groups.max():.3g}, and the draws are mostly from the best: raise {remedy}",
            stacklevel=4,
        )


def _warn_unfinished(engine: Any, interrupted: bool, temperature: float) -> None:
    reached = f"max_temperatures = {engine.max_temperatures} reached"
    why, remedy = (
        ("interrupted", "run again with the same checkpoint to go on")
        if interrupted
        else (reached, "raise max_temperatures, or check the units of the noise")
    )
    warnings.warn(
        f"{why} at temperature {temperature:.3g} of 1: the draws are from prior * "
        f"likelihood^temperature and not from the posterior; {remedy}",
        stacklevel=4,
    )


def _warn_collapse(fewest: int, num_particles: int, remedy: str) -> None:
    if fewest < FEW_ANCESTORS:
        warnings.warn(
            f"collapsed cloud: the {num_particles} particles of a group descend from only "
            f"{fewest} prior draws, so the masses of separate modes are unreliable; raise {remedy}",
            stacklevel=4,
        )


def _warn_acceptance(worst: float, engine: Any) -> None:
    target = engine.kernel.target_accept
    if worst < LOW_ACCEPTANCE * target:
        remedy = engine.more_moves
        warnings.warn(
            f"the acceptance rate fell to {worst:.2g} (target {target}), so particles may not have "
            f"moved: {remedy}, or use the non-centred form (centred=False)",
            stacklevel=4,
        )
