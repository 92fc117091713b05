"""`Pathfinder`: normals along quasi-Newton paths to the modes, by blackjax."""

import os
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.optimizers.lbfgs import lbfgs_inverse_hessian_formula_1
from blackjax.vi.pathfinder import approximate
from jaxtyping import Array

from scoreprior._run import Checkpoint, Draws, Loop, fingerprint, key_words, run_chunks
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count
from scoreprior.problem import Problem
from scoreprior.vi.fitted import LEAST_DRAWS, FittedGuide, data_of, draw
from scoreprior.vi.frame import Frame, check_start, form, start
from scoreprior.vi.paths import Paths


class Pathfinder(eqx.Module):
    """Multi-path Pathfinder (Zhang, Carpenter, Gelman & Vehtari 2022).

    From prior draws, L-BFGS climbs to modes of the log density; every point of a path proposes a
    normal with the local inverse Hessian, and that of the largest ELBO is kept. The guide is the
    equal mixture of the normals of all paths, and its draws are resampled by importance. Weights
    have the density of the mixture, `p / mean_k q_k`, rather than that of each draw's own path as
    in the paper: paths that end in different modes then add up to the evidence instead of sharing
    it. Fast, and a good start for anything else. Covariances are dense: up to some thousand
    coordinates.

    **Arguments:** `num_paths`; `num_samples`: draws, at least 25. `max_iterations` of a path;
    `history_size`: steps from which the Hessian is built. `num_elbo_samples` per point of a path.
    `centred`: work on `x` with the prior's density policy, rather than on its noise. `resample`:
    resample the draws by their Pareto-smoothed importance weights. `chunk_size`: paths side by
    side, and between two checkpoints.
    """

    num_paths: int = eqx.field(static=True, default=8)
    num_samples: int = eqx.field(static=True, default=1000)
    max_iterations: int = eqx.field(static=True, default=50, kw_only=True)
    history_size: int = eqx.field(static=True, default=10, kw_only=True)
    num_elbo_samples: int = eqx.field(static=True, default=25, kw_only=True)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    resample: bool = eqx.field(static=True, default=True, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=1, kw_only=True)

    def __check_init__(self):
        check_count("num_paths", self.num_paths)
        check_count("num_samples", self.num_samples, least=LEAST_DRAWS)
        check_count("max_iterations", self.max_iterations)
        check_count("history_size", self.history_size)
        check_count("num_elbo_samples", self.num_elbo_samples)
        check_count("chunk_size", self.chunk_size)

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """`fit`, then draws [1, num_samples] with their diagnostics: see `FittedGuide.run`.

        `bound` in `extra` is [path], the ELBO of the normal of every path.
        """
        key_fit, key_draw = jax.random.split(key)
        fitted = self.fit(problem, key_fit, progress=progress, checkpoint=checkpoint)
        problem = form(problem, self.centred)
        remedy = "try more paths, VI with a richer guide, NUTS or TemperedSMC"
        return draw(fitted, problem, key_draw, remedy, stacklevel=3)

    def fit(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> FittedGuide:
        """The mixture of the normals of all paths.

        With `checkpoint`, a directory, finished paths are stored, and the same call resumes. Ctrl-C
        returns the mixture of the paths that are finished, with a warning. Raises as `VI.fit` does,
        and `RuntimeError` where every path fails; one that fails is left out, with a warning.
        """
        problem = form(problem, self.centred)
        key_start, key_paths = jax.random.split(key)
        frame, log_density = _start(problem, key_start)
        check_start(np.asarray(log_density))
        store = Checkpoint.of(checkpoint, lambda: self._settings(problem, key, log_density))

        def advance(state: Array, start: int, count: int) -> Any:
            return state, _advance(self, problem, frame, key_paths, jnp.asarray(start))

        chunks, _, interrupted = run_chunks(
            advance,
            jnp.zeros(()),
            Loop(self.num_paths, 0, self.chunk_size, _describe),
            progress=progress,
            checkpoint=store,
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted before the end of the first path")
        found = [chunk.outputs["path"] for chunk in chunks]
        paths = {name: np.concatenate([path[name] for path in found]) for name in found[0]}
        good = np.isfinite(paths["elbo"]) & np.isfinite(paths["scale_tril"]).all((1, 2))
        self._warn(len(good), int(good.sum()), interrupted)
        params = {name: jnp.asarray(paths[name][good]) for name in ("loc", "scale_tril")}
        return FittedGuide(
            Paths(int(good.sum())),
            params,
            frame,
            jnp.asarray(paths["elbo"]),
            problem.is_centred,
            data_of(problem),
            self.num_samples,
            self.resample,
            interrupted,
        )

    def _settings(self, problem: Problem, key: Key, log_density: Array) -> dict[str, Any]:
        """What identifies a fit; draws do not change it, but paths side by side round anew."""
        drawn = ("num_samples", "resample")
        engine = {name: value for name, value in vars(self).items() if name not in drawn}
        return {
            "engine": type(self).__name__,
            **engine,
            "centred": problem.is_centred,
            "key": key_words(key),
            "data": data_of(problem),
            "log_density_at_start": fingerprint(log_density),
        }

    def _warn(self, num_done: int, num_good: int, interrupted: bool) -> None:
        if interrupted:
            warnings.warn(
                f"interrupted after {num_done} of {self.num_paths} paths: the guide is the mixture "
                "of these; run again with the same checkpoint to go on",
                stacklevel=4,
            )
        if not num_good:
            raise RuntimeError(
                f"all {num_done} paths failed, their log density or Hessian is not finite: check "
                "the model far from its prior, or use VI or NUTS"
            )
        if num_good < num_done:
            warnings.warn(
                f"{num_done - num_good} of {num_done} paths failed and are left out: their log "
                "density or Hessian is not finite",
                stacklevel=4,
            )


@eqx.filter_jit
def _start(problem: Problem, key: Key) -> tuple[Frame, Array]:
    return start(problem, key)


@eqx.filter_jit
def _advance(
    engine: Pathfinder, problem: Problem, frame: Frame, key: Key, start: Array
) -> dict[str, dict[str, Array]]:
    """The normals of paths `start`, `start + 1`, ..., `chunk_size` of them."""

    def log_density(z: Array) -> Scalar:
        return problem.log_density(frame.position(z)) + frame.log_det

    def path(index: Array) -> dict[str, Array]:
        key_start, key_path = jax.random.split(jax.random.fold_in(key, index))
        state, _ = approximate(
            key_path,
            log_density,
            frame.z(problem.initial(key_start)),
            engine.num_elbo_samples,
            maxiter=engine.max_iterations,
            maxcor=engine.history_size,
        )
        covariance = lbfgs_inverse_hessian_formula_1(state.alpha, state.beta, state.gamma)
        # The gradient is that of minus the log density. blackjax 1.7.1 adds this step where
        # algorithm 4 of the paper subtracts it.
        loc = state.position - covariance @ state.grad_position
        return {"loc": loc, "scale_tril": jnp.linalg.cholesky(covariance), "elbo": state.elbo}

    return {"path": jax.vmap(path)(start + jnp.arange(engine.chunk_size))}


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    return f"ELBO {outputs['path']['elbo'].max():.4g}"


__all__ = ["Pathfinder"]
