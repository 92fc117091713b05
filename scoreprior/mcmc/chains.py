"""What every Markov chain engine shares: start, chunks, checkpoints, draws that are kept.

An engine says what a chain is at a position, `start`, what a run is at its chains, `first`, and how
all chains make one step, `step`. They are pure functions of arrays, so a run is one compiled loop,
called chunk by chunk.
"""

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scoreprior._run import (
    Checkpoint,
    Draws,
    Loop,
    fingerprint,
    join,
    key_words,
    run_chunks,
    run_first,
)
from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.mcmc.start import AbstractInit, PriorDraws, start_chains
from scoreprior.problem import Problem


class AbstractChains(eqx.Module):
    """Chains that advance in lock step on a `Problem`.

    `num_warmup` steps are dropped, `num_samples` are kept, for each of `num_chains` chains.
    `chunk_size` steps lie between two updates of the progress bar and of the checkpoint. `init`
    says where chains start: `PriorDraws()`, `GivenValues(values)` or `GuideDraws(guide)`.
    """

    num_warmup: eqx.AbstractVar[int]
    num_samples: eqx.AbstractVar[int]
    num_chains: eqx.AbstractVar[int]
    centred: eqx.AbstractVar[bool]
    chunk_size: eqx.AbstractVar[int]
    init: AbstractInit = eqx.field(default_factory=PriorDraws, kw_only=True)

    def __check_init__(self):
        check_count("num_warmup", self.num_warmup, least=0)
        check_count("num_samples", self.num_samples)
        check_count("num_chains", self.num_chains)
        check_count("chunk_size", self.chunk_size)
        if not isinstance(self.init, AbstractInit):
            raise TypeError(
                "init must be PriorDraws(), GivenValues(values) or GuideDraws(guide), got "
                f"{self.init!r}"
            )

    @property
    def num_looped_warmup(self) -> int:
        """How many steps of the warm-up are calls of `step`; `first` makes the others, at once."""
        return self.num_warmup

    def form(self, problem: Problem) -> Problem:
        """`problem` in the form in which the chains move."""
        return problem.centred() if self.centred else problem

    def begin(self, problem: Problem, key: Key, init: AbstractInit) -> Any:
        """The states of the chains [chain, ...] where `init` says."""
        return start_chains(problem, self.start, key, self.num_chains, init)

    @abstractmethod
    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> Any:
        """The state of one chain, with the fields `position` and, where known, `logdensity`."""

    @abstractmethod
    def first(self, problem: Problem, chains: Any, key: Key) -> Any:
        """The state of a run, from `chains`, the states [chain, ...] at the starting points."""

    @abstractmethod
    def step(
        self, problem: Problem, state: Any, key: Key, number: Int[Array, ""]
    ) -> tuple[Any, dict[str, Any]]:
        """All chains one step on; step `number` counts from the first that the loop makes.

        The second result holds `positions` [chain, *site] by site and `stats` [chain] by name.
        """

    @abstractmethod
    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        """What the progress bar says of the last chunk, of outputs [step, chain, ...]."""

    def warn(self, draws: Draws) -> None:
        """Warn of trouble that the statistics of `draws` show, with the remedy."""

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`.

        With `checkpoint`, a directory, the run is stored after every chunk, and the same call
        resumes it bit for bit. Ctrl-C returns the draws made so far, with a warning. Raises
        `ValueError` where `init` does not fit the problem or the log density is not finite where
        chains start, and `NotImplementedError` for the centred form of a prior without a density.
        """
        problem = self.form(problem)
        key_start, key_steps = jax.random.split(key)
        engine = replace(self, init=PriorDraws())  # compiled code knows no starting points
        chains = engine.begin(problem, key_start, self.init)
        store = Checkpoint.of(checkpoint, lambda: self._settings(problem, key, chains))

        def first() -> Any:
            return engine.first(problem, chains, jax.random.fold_in(key_start, 1))

        num_looped = self.num_looped_warmup
        num_before = self.num_warmup - num_looped
        state = run_first(first, num_before, progress=progress, checkpoint=store)

        def advance(state: Any, start: int, count: int) -> Any:
            return _advance(
                engine, problem, state, key_steps, jnp.asarray(start), jnp.asarray(count)
            )

        loop = Loop(num_looped + self.num_samples, num_looped, self.chunk_size, self.describe)
        chunks, _, interrupted = run_chunks(
            advance, state, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted in the warm-up, before the first draw")
        outputs = join(chunks)
        draws = Draws(problem, outputs["positions"], outputs["stats"], interrupted)
        if interrupted:
            num_draws = next(iter(draws.stats.values())).shape[1]
            warnings.warn(
                f"interrupted: {num_draws} of {self.num_samples} draws per chain are returned",
                stacklevel=2,
            )
        self.warn(draws)
        return draws

    def _settings(self, problem: Problem, key: Key, start: Any) -> dict[str, Any]:
        """What identifies a run, `chunk_size` apart: it does not change the draws."""
        engine = {k: v for k, v in vars(self).items() if k not in ("chunk_size", "init")}
        return {
            "engine": type(self).__name__,
            **engine,
            "init": [type(self.init).__name__, fingerprint(self.init)],
            "key": key_words(key),
            "data": fingerprint((problem.args, problem.kwargs, problem.sites.params)),
            "log_density_at_start": [float(v) for v in getattr(start, "logdensity", ())],
            "start": fingerprint(start),
        }


def warn_nan(draws: Draws) -> None:
    """Warn of proposals that were refused because their density is NaN; called by `warn`."""
    diverging = draws.stats["diverging"]
    if count := int(diverging.sum()):
        warnings.warn(
            f"the log density was NaN at a proposal of {count} of {diverging.size} draws, and "
            "these proposals were refused as if it were minus infinity: where the model is "
            "impossible return minus infinity, where it is possible keep it finite",
            stacklevel=4,
        )


@eqx.filter_jit
def _advance(
    engine: AbstractChains,
    problem: Problem,
    state: Any,
    key: Key,
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[Any, dict[str, Any]]:
    """`count` steps from step number `start`; outputs have `chunk_size` rows."""

    def body(i: Array, carry: Any) -> Any:
        state, rows = carry
        number = start + i
        state, row = engine.step(problem, state, jax.random.fold_in(key, number), number)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)

    template = jax.eval_shape(lambda s: engine.step(problem, s, key, start)[1], state)
    rows = jax.tree.map(
        lambda leaf: jnp.zeros((engine.chunk_size, *leaf.shape), leaf.dtype), template
    )
    return jax.lax.fori_loop(0, count, body, (state, rows))
