"""`VI`: fit a guide to the posterior of a `Problem` by raising a bound on its log evidence."""

import os
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from scoreprior._run import Checkpoint, Chunk, Draws, Loop, key_words, run_chunks
from scoreprior._typing import Key, PyTree
from scoreprior._util import check_count
from scoreprior.problem import Problem
from scoreprior.vi.bounds import ELBO, AbstractBound, estimate
from scoreprior.vi.fitted import LEAST_DRAWS, FittedGuide, data_of, draw
from scoreprior.vi.frame import Frame, check_start, form, start
from scoreprior.vi.guides import AbstractGuide, FullRank
from scoreprior.vi.natural import NaturalGradient, check_natural
from scoreprior.vi.optimise import (
    FitState,
    check_optimizer,
    describe,
    identify,
    or_default,
    repeat,
    step,
)


class VI(eqx.Module):
    """Variational inference: the guide `q` that maximises a bound on the log evidence.

    In the non-centred form, the default, a gradient is one differentiable solve of the flow and no
    divergence. In the centred form the prior enters by its density policy: `FlowDensity` as in Feng
    et al. (2023), "Score-based diffusion models as principled priors for inverse imaging", and
    `BoundDensity` as in Feng & Bouman (2024), "Variational Bayesian imaging with an efficient
    surrogate score-based prior". The gradient is reparameterised; guides live on the scale of prior
    draws, so one learning rate fits all models.

    **Arguments:** `guide`: `MeanField()`, `LowRank(rank)`, `FullRank()`, `IAF()`. `num_steps` of
    the optimiser; `num_samples`: draws of the fitted guide, at least 25, that are returned and that
    the diagnostics rest on. `bound`: `ELBO(num_particles)` or `IWELBO(num_particles)`. `optimizer`:
    an optax transformation, by default Adam with a learning rate that falls from 0.02 to zero along
    a cosine, or `NaturalGradient()`, which fits `FullRank()` in tens of steps. `centred`: fit `x`
    with the prior's density policy, rather than its noise. `resample`: return draws that are
    resampled by their Pareto-smoothed importance weights, instead of those of the guide itself.
    `chunk_size`: steps between two updates of the progress bar and of the checkpoint; it does not
    change the fit.
    """

    guide: AbstractGuide
    num_steps: int = eqx.field(static=True, default=2000)
    num_samples: int = eqx.field(static=True, default=1000)
    bound: AbstractBound = eqx.field(default=ELBO(), kw_only=True)
    optimizer: optax.GradientTransformation | NaturalGradient | None = eqx.field(
        default=None, kw_only=True
    )
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    resample: bool = eqx.field(static=True, default=False, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=50, kw_only=True)

    def __check_init__(self):
        if not isinstance(self.guide, AbstractGuide):
            raise TypeError(f"guide must be a guide such as FullRank(), got {self.guide!r}")
        if not isinstance(self.bound, AbstractBound):
            raise TypeError(f"bound must be a bound such as ELBO(), got {self.bound!r}")
        check_count("num_steps", self.num_steps)
        check_count("num_samples", self.num_samples, least=LEAST_DRAWS)
        check_count("chunk_size", self.chunk_size)
        if isinstance(self.optimizer, NaturalGradient):
            self._check_natural(self.optimizer)
        else:
            check_optimizer(self.optimizer)

    def _check_natural(self, optimizer: NaturalGradient) -> None:
        if not isinstance(self.guide, FullRank):
            raise ValueError(f"guide must be FullRank() for a NaturalGradient, got {self.guide!r}")
        if not isinstance(self.bound, ELBO) or self.bound.num_particles % 2:
            raise ValueError(
                "bound must be an ELBO of an even number of particles for a NaturalGradient, got "
                f"{self.bound!r}"
            )
        if optimizer.num_curvatures > self.bound.num_particles:
            raise ValueError(
                f"num_curvatures must be at most the {self.bound.num_particles} particles of the "
                f"bound, got {optimizer.num_curvatures}"
            )
        if self.centred:
            raise ValueError("centred must be False for a NaturalGradient, got True")

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """`fit`, then draws of the guide with their diagnostics: see `FittedGuide.run`.

        Draws are [1, num_samples], one chain. Ctrl-C returns draws of the guide as fitted so far,
        with a warning. Warns where k-hat is too large, and where steps were skipped.
        """
        key_fit, key_draw = jax.random.split(key)
        fitted = self._fit(problem, key_fit, progress, checkpoint, stacklevel=4)
        problem = form(problem, self.centred)
        remedy = "try a richer guide, more steps, NUTS or TemperedSMC"
        return draw(fitted, problem, key_draw, remedy, stacklevel=3)

    def fit(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> FittedGuide:
        """The guide fitted to the posterior of `problem`.

        With `checkpoint`, a directory, the fit is stored after every chunk, and the same call
        resumes it bit for bit. Ctrl-C returns the guide as it is, with a warning. Raises
        `ValueError` where the log density is NaN at a prior draw or minus infinity at all, and for
        the centred form of a prior with a `ScoreGradient`; `NotImplementedError` for the centred
        form of a prior without a density.
        """
        return self._fit(problem, key, progress, checkpoint, stacklevel=4)

    def _fit(
        self, problem: Problem, key: Key, progress: bool, checkpoint: Any, stacklevel: int
    ) -> FittedGuide:
        problem = form(problem, self.centred)
        if isinstance(self.optimizer, NaturalGradient):
            check_natural(problem)
        key_start, key_steps = jax.random.split(key)
        frame, state, log_density = _start(self, problem, key_start)
        check_start(np.asarray(log_density))
        store = Checkpoint.of(checkpoint, lambda: self._settings(problem, key, state, log_density))

        def advance(state: FitState, step: int, count: int) -> Any:
            return _advance(
                self, problem, frame, state, key_steps, jnp.asarray(step), jnp.asarray(count)
            )

        loop = Loop(self.num_steps, 0, self.chunk_size, _describe)
        chunks, state, interrupted = run_chunks(
            advance, state, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted before the first chunk of steps")
        history, num_skipped = _history(chunks)
        self._warn(len(history), num_skipped, interrupted, stacklevel)
        return FittedGuide(
            self.guide,
            state.params,
            frame,
            jnp.asarray(history),
            problem.is_centred,
            data_of(problem),
            self.num_samples,
            self.resample,
            interrupted,
        )

    def _optimizer(self) -> Any:
        if isinstance(self.optimizer, NaturalGradient):
            return self.optimizer
        return or_default(self.optimizer, self.num_steps)

    def _settings(
        self, problem: Problem, key: Key, state: FitState, log_density: Array
    ) -> dict[str, Any]:
        """What identifies a fit.

        Draws and `chunk_size` do not change it, and an optimiser is known by its first step.
        """
        return {
            "engine": type(self).__name__,
            "guide": describe(self.guide),
            "bound": describe(self.bound),
            "num_steps": self.num_steps,
            "optimizer": self._identity(state),
            "centred": problem.is_centred,
            "key": key_words(key),
            "data": data_of(problem),
            "log_density_at_start": [float(value) for value in log_density],
        }

    def _identity(self, state: FitState) -> Any:
        if isinstance(self.optimizer, NaturalGradient):
            return describe(self.optimizer)
        return identify(self._optimizer(), state)

    def _warn(self, num_steps: int, num_skipped: int, interrupted: bool, stacklevel: int) -> None:
        if interrupted:
            warnings.warn(
                f"interrupted after {num_steps} of {self.num_steps} steps: the guide is as fitted "
                "so far; run again with the same checkpoint to go on",
                stacklevel=stacklevel,
            )
        if num_skipped:
            warnings.warn(
                f"{num_skipped} of {num_steps} steps were skipped because the bound or its "
                "gradient was not finite: the guide avoids those places, and may be wrong; check "
                "the model far from its prior, or lower the learning rate",
                stacklevel=stacklevel,
            )


@eqx.filter_jit
def _start(engine: VI, problem: Problem, key: Key) -> tuple[Frame, FitState, Array]:
    key_frame, key_params = jax.random.split(key)
    frame, log_density = start(problem, key_frame)
    params = engine.guide.init(key_params, frame.size)
    params = jax.tree.map(lambda leaf: leaf.astype(frame.loc.dtype), params)
    return frame, FitState(params, engine._optimizer().init(params)), log_density


@eqx.filter_jit
def _advance(
    engine: VI,
    problem: Problem,
    frame: Frame,
    state: FitState,
    key: Key,
    start: Array,
    count: Array,
) -> tuple[FitState, dict[str, dict[str, Array]]]:
    """`count` steps from step number `start`; outputs have `chunk_size` rows."""

    def advance(state: FitState, number: Array) -> tuple[FitState, dict[str, dict[str, Array]]]:
        return _step(engine, problem, frame, state, jax.random.fold_in(key, number))

    return repeat(advance, state, start, count, engine.chunk_size)


def _step(
    engine: VI, problem: Problem, frame: Frame, state: FitState, key: Key
) -> tuple[FitState, dict[str, dict[str, Array]]]:
    if isinstance(engine.optimizer, NaturalGradient):
        num_particles = engine.bound.num_particles
        state, bound, is_finite = engine.optimizer.step(problem, frame, num_particles, state, key)
        return state, {"fit": {"bound": bound, "is_finite": is_finite}}

    def log_density(z: Array) -> Array:
        return problem.log_density(frame.position(z)) + frame.log_det

    def loss(params: PyTree[Any]) -> tuple[Array, Array]:
        bound = estimate(engine.bound, engine.guide, params, log_density, key)
        return -bound, bound

    state, bound, is_finite = step(engine._optimizer(), loss, state)
    return state, {"fit": {"bound": bound, "is_finite": is_finite}}


def _history(chunks: list[Chunk]) -> tuple[np.ndarray, int]:
    """The bound at every step, and the number of steps left out."""
    found = [chunk.outputs["fit"] for chunk in chunks]
    finite = np.concatenate([fit["is_finite"] for fit in found])
    return np.concatenate([fit["bound"] for fit in found]), int((~finite).sum())


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    fit = outputs["fit"]
    bound = fit["bound"][fit["is_finite"]]
    return f"bound {bound.mean():.4g}" if len(bound) else "no finite bound"


__all__ = ["VI"]
