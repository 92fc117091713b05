"""Pairs of parameters and data: `simulate` draws them, and `Simulations` holds them.

`theta_i ~ p(theta)` and `x_i ~ p(x | theta_i)` depend on the key and on the number `i` of the draw
only. A draw that fails, or whose `x` is not finite, is left out and counted.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.sbi import store as files
from scoreprior.sbi.draws import Theta, draw_many, sampler
from scoreprior.sbi.simulators import AbstractSimulator, JaxSimulator
from scoreprior.sbi.store import Store, Table
from scoreprior.sbi.worker import Status
from scoreprior.train.identity import digest, program

NUM_TRIALS = 10
REASONS = {
    Status.NOT_FINITE: "NaN or infinite x",
    Status.ERROR: "errors",
    Status.TIMEOUT: "timeouts",
    Status.WRONG_SHAPE: "x of another shape",
    Status.WORKER_LOST: "workers lost",
}


@dataclass(frozen=True, eq=False, repr=False)
class Simulations:
    """The draws that have an `x`, and what became of the others.

    `theta` is an array [n, *event], or a dict of them by site, `x` an array [n, *x], and `index`
    [n] are the numbers of these draws among the `num` that were asked for. `left_out` says how many
    draws are missing for which reason, and `messages` what the first failures were, by number of
    draw.
    """

    theta: Theta
    x: Float[Array, "n *x"]
    index: Int[np.ndarray, " n"]
    num: int
    left_out: Mapping[str, int]
    messages: Mapping[int, str]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Simulations":
        """What a store holds so far; raises `ValueError` where there is none, or nothing in it."""
        table = files.read(path)
        if not table.num_done:
            raise ValueError(f"store {path} must hold simulations, got none so far")
        return _simulations(table)

    @property
    def num_nan(self) -> int:
        """Draws whose `x` has NaN or infinity."""
        return self.left_out.get(REASONS[Status.NOT_FINITE], 0)

    @property
    def num_failed(self) -> int:
        """Draws without an `x`: by errors, timeouts, wrong shapes or lost workers."""
        return sum(self.left_out.values()) - self.num_nan

    @property
    def num_pending(self) -> int:
        """Draws not made yet, after an interruption."""
        return self.num - len(self) - sum(self.left_out.values())

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        shapes = jax.tree.map(lambda leaf: leaf.shape[1:], self.theta)
        lines = [f"Simulations: {len(self):,} of {self.num:,} draws, theta {shapes}, "]
        lines[0] += f"x {self.x.shape[1:]}"
        if self.num_pending:
            lines.append(f"  {self.num_pending:,} not made yet")
        lines += [f"  {count:,} left out: {reason}" for reason, count in self.left_out.items()]
        lines += [f"  draw {i}: {message}" for i, message in list(self.messages.items())[:3]]
        return "\n".join(lines)


class TooManyFailures(ValueError):
    """Raised when more draws fail than `max_failures`; `simulations` are those that did not."""

    def __init__(self, message: str, simulations: Simulations):
        super().__init__(message)
        self.simulations = simulations


def simulate(
    prior: Any,
    simulator: AbstractSimulator | Callable[[Key, Any], Any],
    num: int,
    *,
    key: Key,
    store: str | os.PathLike[str] | None = None,
    max_failures: float = 0.1,
    progress: bool = True,
) -> Simulations:
    """Draw `num` pairs, `theta_i` from `prior` and `x_i` from `simulator`.

    `prior` is a NumPyro distribution, or a model without observed sites, whose draws are dicts from
    site to array. `simulator` is a `BlackBox`, a `Command`, a `JaxSimulator`, or a function of JAX
    `simulator(key, theta) -> x`, which is taken for the last. Each is given one draw at a time.
    `x` has the type of JAX's floats.

    Draw `i` depends on `key` and `i` only: not on the number of devices or workers, on batches, on
    the order in which draws arrive, nor on `num` (a `JaxSimulator` may round in another way when
    chunks are of another size).

    **Arguments:** `store`, a folder for a Zarr group to which draws are written as they arrive. If
    it is there the run goes on where it ended, with settings of the simulator that do not change
    its draws, and with another `num`, as you like. A Zarr group is for one run at a time.
    `max_failures`, the share of draws that may fail: the pairs that are left follow the law given
    success, which is not the one you wrote down.

    Ctrl-C returns what has arrived. A warning says how many draws were left out.

    **Errors:** `ValueError` and `TypeError` before any long work, for arguments of no use, for a
    prior and a simulator that do not fit, and for a store of another run, naming what differs;
    `ValueError` when none of the first draws succeeds; `TooManyFailures` as soon as the number of
    failures exceeds `max_failures * num`; `ImportError` where the extra `sbi` is missing.
    """
    check_count("num", num)
    check_share("max_failures", max_failures)
    simulator = as_simulator("simulator", simulator)
    if store is not None:
        files.zarr()
    draw = sampler(prior)
    theta_key, x_key = jax.random.split(key)
    theta = draw_many(draw, theta_key, num)
    identity = _identity(theta, key, simulator, x_key)
    identity["program of prior"] = program(draw, theta_key)
    table, kept = _open(theta, store, identity)
    _check_failures(table, max_failures)
    try:
        _fill(table, simulator, x_key, kept, max_failures, progress)
    except KeyboardInterrupt:
        if not table.num_done:
            raise KeyboardInterrupt("interrupted before the first simulation") from None
    return _finished(table)


def simulate_given(
    theta: Theta,
    simulator: AbstractSimulator,
    *,
    key: Key,
    store: str | os.PathLike[str] | None = None,
    max_failures: float = 0.1,
    progress: bool = True,
    check: Callable[[tuple[int, ...]], None] = lambda shape: None,
) -> Simulations:
    """`simulate` at parameters `theta`, leaves [num, ...], in place of draws of a prior.

    `check` is called with the shape of `x` as soon as one has arrived, and may raise. Ctrl-C raises
    `KeyboardInterrupt`.
    """
    if store is not None:
        files.zarr()
    theta = jax.tree.map(np.array, theta)
    identity = _identity(theta, key, simulator, key)
    identity["values of theta"] = digest(theta)
    table, kept = _open(theta, store, identity)
    _check_failures(table, max_failures)
    _fill(table, simulator, key, kept, max_failures, progress, check)
    return _finished(table)


def as_simulator(name: str, simulator: Any) -> AbstractSimulator:
    """A function of JAX as a simulator; raises `TypeError` for what is none."""
    if isinstance(simulator, AbstractSimulator):
        return simulator
    if not callable(simulator):
        raise TypeError(
            f"{name} must be a function of JAX, {name}(key, theta), a BlackBox or a Command, got "
            f"{simulator!r}"
        )
    return JaxSimulator(simulator)


def check_share(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a share of failures that is allowed."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be a share in [0, 1), got {value}")


def _identity(
    theta: PyTree[np.ndarray], key: Key, simulator: AbstractSimulator, x_key: Key
) -> dict[str, Any]:
    """What must agree for a store to be gone on with, `key` that of the call."""
    return {
        "key": [str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()],
        "theta": files.describe_theta(theta),
        "type of x": str(jnp.result_type(float)),
        **simulator.identity(theta, x_key),
    }


def _open(
    theta: PyTree[np.ndarray], store: str | os.PathLike[str] | None, identity: dict[str, Any]
) -> tuple[Table, Store | None]:
    """A table of draws, filled from the store where there is one."""
    table = Table(theta, len(jax.tree.leaves(theta)[0]))
    return table, None if store is None else Store(Path(store), identity, table)


def _finished(table: Table) -> Simulations:
    """What has an `x`, with a warning for draws that are left out."""
    simulations = _simulations(table)
    if table.num_left_out:
        warnings.warn(
            f"{table.num_left_out} of {len(table.status)} draws are left out "
            f"({_counts(simulations.left_out)}); theta and x follow their law given success",
            stacklevel=3,
        )
    return simulations


def _fill(
    table: Table,
    simulator: AbstractSimulator,
    key: Key,
    kept: Store | None,
    max_failures: float,
    progress: bool,
    check: Callable[[tuple[int, ...]], None] = lambda shape: None,
) -> None:
    """Simulate what is pending; whatever ends this, what has arrived is in the table and stored."""
    shape = None if table.x is None else table.x.shape[1:]
    if shape is not None:
        check(shape)
    pending = table.pending
    if not len(pending):
        return
    total = len(table.status)
    bar = tqdm(total=total, initial=total - len(pending), disable=not progress, unit="draw")
    try:
        with bar, contextlib.closing(simulator.run(table.theta, key, pending, shape)) as run:
            for arrived in run:
                table.add(arrived)
                if kept is not None:
                    kept.add(arrived)
                if shape is None and table.x is not None:
                    shape = table.x.shape[1:]
                    check(shape)
                _check_failures(table, max_failures)
                if table.num_left_out:
                    bar.set_postfix(left_out=table.num_left_out, refresh=False)
                bar.update(len(arrived.draws))
    except Exception as error:
        if kept is not None:
            error.add_note(f"what has arrived is kept in {kept.path}")
        raise
    finally:
        if kept is not None:
            kept.flush()


def _check_failures(table: Table, max_failures: float) -> None:
    num, num_left_out = len(table.status), table.num_left_out
    is_too_many = num_left_out > max_failures * num
    if not table.num_done and (is_too_many or num_left_out >= NUM_TRIALS):
        raise ValueError(
            f"simulator must succeed for some draws of the prior, got none of the first "
            f"{num_left_out}: {_why(table)}; call the simulator on one draw of the prior by hand, "
            "and look whether the prior has values that it cannot take"
        )
    if is_too_many:
        raise TooManyFailures(
            f"more draws failed than max_failures={max_failures} of {num} allows: {_why(table)}; "
            "mend the simulator, narrow the prior, or allow more; those that succeeded are in the "
            "attribute simulations of this error",
            _simulations(table),
        )


def _why(table: Table) -> str:
    """How many draws failed for which reason, and what the first of them said."""
    index, message = min(table.messages.items(), default=(None, ""))
    first = "" if index is None else f" (draw {index}: {message})"
    return _counts(_left_out(table)) + first


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in left_out.items())


def _left_out(table: Table) -> dict[str, int]:
    counts = {reason: table.count(status) for status, reason in REASONS.items()}
    return {reason: count for reason, count in counts.items() if count}


def _simulations(table: Table) -> Simulations:
    index = np.flatnonzero(table.status == Status.DONE)
    x: Any = table.x
    return Simulations(
        theta=jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), table.theta),
        x=jnp.asarray(x[index]),
        index=index,
        num=len(table.status),
        left_out=_left_out(table),
        messages=dict(sorted(table.messages.items())[: files.NUM_MESSAGES]),
    )


__all__ = [
    "Simulations",
    "TooManyFailures",
    "as_simulator",
    "check_share",
    "simulate",
    "simulate_given",
]
