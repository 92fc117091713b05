"""Engines whose draws are independent of one another: batches, checkpoints, warnings."""

import os
import warnings
from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._run import Checkpoint, Draws, Loop, fingerprint, join, key_words, run_chunks
from scoreprior._typing import Event, Key
from scoreprior._util import check_count
from scoreprior.mcmc.score import all_finite
from scoreprior.problem import Problem


class AbstractIndependent(eqx.Module):
    """`num_samples` draws, `batch_size` side by side. Draw `i` has key `i` in any batch."""

    num_samples: eqx.AbstractVar[int]
    batch_size: eqx.AbstractVar[int]

    def __check_init__(self):
        check_count("num_samples", self.num_samples)
        check_count("batch_size", self.batch_size)

    @abstractmethod
    def prepare(self, problem: Problem) -> Any:
        """What is asked of the model: something with `problem`, centred, and its prior `site`.

        Raises `ValueError` for a model that the engine cannot treat.
        """

    @abstractmethod
    def draw(self, prepared: Any, key: Key) -> Event:
        """One draw."""

    @abstractmethod
    def remedy(self) -> str:
        """What to do about draws that are not finite."""

    def extra(self, prepared: Any) -> dict[str, Any]:
        """What is returned beside draws, as in `Draws`."""
        return {}

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`: draws [1, draw], with their `log_likelihood`.

        With `checkpoint`, a directory, the run is stored after every batch, and the same call
        resumes it bit for bit. Ctrl-C returns the batches that are done, with a warning. Raises
        `ValueError`, naming the site, for a model that the engine cannot treat.
        """
        prepared = self.prepare(problem)
        store = Checkpoint.of(checkpoint, lambda: self._settings(prepared, key))

        def advance(state: Any, start: int, count: int) -> Any:
            return state, _draw(self, prepared, key, jnp.asarray(start))

        loop = Loop(self.num_samples, 0, min(self.batch_size, self.num_samples), lambda _: "")
        chunks, _, interrupted = run_chunks(advance, (), loop, progress=progress, checkpoint=store)
        if not chunks:
            raise KeyboardInterrupt("interrupted before the first batch of draws")
        outputs = join(chunks)
        positions, stats = outputs["positions"], outputs["stats"]
        draws = Draws(prepared.problem, positions, stats, interrupted, self.extra(prepared))
        lost = draws.stats["diverging"]
        if interrupted:
            warnings.warn(
                f"interrupted: {lost.size} of {self.num_samples} draws are returned", stacklevel=2
            )
        if lost.any():
            warnings.warn(
                f"{int(lost.sum())} of {lost.size} draws are not finite: {self.remedy()}",
                stacklevel=2,
            )
        return draws

    def _settings(self, prepared: Any, key: Key) -> dict[str, Any]:
        """What identifies a run."""
        engine = {name: value for name, value in vars(self).items() if name != "batch_size"}
        modules = {name: repr(v) for name, v in engine.items() if isinstance(v, eqx.Module)}
        return {
            "engine": type(self).__name__,
            **engine,
            **modules,
            "values": fingerprint(self),
            "key": key_words(key),
            "data": fingerprint(self.data(prepared)),
            "prior": fingerprint(prepared.prior.flow),
        }

    @abstractmethod
    def data(self, prepared: Any) -> Any:
        """The arrays of the observation."""


@eqx.filter_jit
def _draw(
    engine: AbstractIndependent, prepared: Any, key: Key, start: Array
) -> dict[str, dict[str, Array]]:
    """Draws `start .. start + batch_size`, leaves [draw, 1, ...]."""
    size = min(engine.batch_size, engine.num_samples)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(size))
    x = jax.vmap(lambda key: engine.draw(prepared, key))(keys)
    name = prepared.site
    log_likelihood = jax.vmap(lambda x: prepared.problem.log_likelihood({name: x}))(x)
    stats = {"diverging": ~all_finite(x), "log_likelihood": log_likelihood}
    outputs = {"positions": {name: x}, "stats": stats}
    return jax.tree.map(lambda leaf: leaf[:, None], outputs)


__all__ = ["AbstractIndependent"]
