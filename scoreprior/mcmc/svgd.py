"""`SVGD`: a cloud of particles carried to the posterior by a score, without noise."""

import os
import warnings
from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.vi.svgd import rbf_kernel, update_median_heuristic
from jaxtyping import Array

from scoreprior._run import Checkpoint, Draws, Loop, fingerprint, key_words, run_chunks
from scoreprior._typing import Key
from scoreprior._util import check_count, check_positive
from scoreprior.mcmc.score import all_finite, check_sigma, start_by_score
from scoreprior.problem import Problem


class SVGD(eqx.Module):
    """Stein variational gradient descent, by blackjax (Liu & Wang 2016, algorithm 1).

    With `s` the score of the posterior and `k(x, x') = exp(-|x - x'|^2 / l)`, particles follow

        phi(x_i) = mean_j [ k(x_j, x_i) s(x_j) + grad_{x_j} k(x_j, x_i) ],

    by Adam, with a step size that falls to zero as a cosine; `l` is `median |x_i - x_j|^2 / log n`
    at every step. All particles are the draws: they are no independent sample but a set of points
    placed by one another. Their mean is good, their spread is too small, the more so the larger the
    dimension is beside `num_particles` (Ba et al., "Understanding the variance collapse of SVGD in
    high dimensions", ICLR 2022). A step costs one score per particle, and a kernel and its gradient
    for every pair.

    **Arguments:** `num_particles`; `num_steps`; `step_size`: that of the first step, in the units
    of the position. `sigma`: the noise level of the prior's score, in data units; by default see
    `Problem.score`. `centred`: move `x`, the reason for this engine, rather than its noise.
    `chunk_size`: steps between two updates of the progress bar and of the checkpoint; it does not
    change the draws.
    """

    num_particles: int = eqx.field(static=True, default=100)
    num_steps: int = eqx.field(static=True, default=1000)
    step_size: float = eqx.field(static=True, kw_only=True)
    sigma: float | None = eqx.field(static=True, default=None, kw_only=True)
    centred: bool = eqx.field(static=True, default=True, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=100, kw_only=True)

    def __check_init__(self):
        check_count("num_particles", self.num_particles, least=2)
        check_count("num_steps", self.num_steps)
        check_count("chunk_size", self.chunk_size)
        check_positive("step_size", self.step_size)
        check_sigma(self.sigma, self.centred)

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Carry particles from the prior to the posterior of `problem`: draws [1, particle].

        `extra` holds the record of every step: `phi`, the root mean square of `phi(x_i)` over
        particles and coordinates, which falls towards zero, and `length_scale`, `l`. With
        `checkpoint`, a directory, the run is stored after every chunk, and the same call resumes it
        bit for bit. Ctrl-C returns the particles where they are, with a warning. Raises
        `ValueError` where the score is not finite at prior draws.
        """
        problem = problem.centred(with_value=False) if self.centred else problem
        particles = start_by_score(problem, self.sigma, key, self.num_particles)
        store = Checkpoint.of(checkpoint, lambda: self._settings(problem, key, particles))
        state = _first(self, particles)

        def advance(state: Any, start: int, count: int) -> Any:
            return _advance(self, problem, state, jnp.asarray(count))

        loop = Loop(self.num_steps, 0, self.chunk_size, _describe)
        chunks, state, interrupted = run_chunks(
            advance, state, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted at the prior, before the first steps")
        names = chunks[0].outputs["record"]
        record = {n: np.concatenate([c.outputs["record"][n] for c in chunks]) for n in names}
        if interrupted:
            warnings.warn(
                f"interrupted after {len(record['phi'])} of {self.num_steps} steps: the particles "
                "are on their way from the prior to the posterior",
                stacklevel=2,
            )
        finite = all_finite(state.particles)
        if not finite.all():
            warnings.warn(
                f"{int((~finite).sum())} of {len(finite)} particles are not finite: lower "
                f"step_size below {self.step_size}",
                stacklevel=2,
            )
        positions, stats = jax.tree.map(
            lambda leaf: np.asarray(leaf)[None], (state.particles, {"diverging": ~finite})
        )
        extra = {name: (("step",), values) for name, values in record.items()}
        return Draws(problem, positions, stats, interrupted, extra)

    def _settings(self, problem: Problem, key: Key, particles: Any) -> dict[str, Any]:
        engine = {name: value for name, value in vars(self).items() if name != "chunk_size"}
        return {
            "engine": type(self).__name__,
            **engine,
            "key": key_words(key),
            "data": fingerprint((problem.args, problem.kwargs, problem.sites.params)),
            "start": fingerprint(particles),
        }

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(self.step_size, self.num_steps))


@eqx.filter_jit
def _first(engine: SVGD, particles: dict[str, Array]) -> Any:
    # A dictionary of our own: blackjax writes into the one it is given.
    scale = {"length_scale": jnp.ones((), jnp.result_type(*jax.tree.leaves(particles)))}
    state = blackjax.svgd.init(particles, scale, engine._optimizer())
    return update_median_heuristic(state)


@eqx.filter_jit
def _advance(
    engine: SVGD, problem: Problem, state: Any, count: Array
) -> tuple[Any, dict[str, dict[str, Array]]]:
    """`count` steps; the record has `chunk_size` rows."""
    optimizer = engine._optimizer()
    watched = optax.chain(_watch(), optimizer)
    kernel = blackjax.svgd.build_kernel(watched)

    def score(position: dict[str, Array]) -> dict[str, Array]:
        return problem.score(position, engine.sigma)

    def body(i: Array, carry: Any) -> Any:
        state, rows = carry
        wrapped = state._replace(opt_state=(jnp.zeros_like(rows["phi"][0]), state.opt_state))
        moved = kernel(wrapped, score, rbf_kernel)
        phi, opt_state = moved.opt_state
        # The length scale goes in a new dictionary, since blackjax writes into it.
        moved = moved._replace(opt_state=opt_state, kernel_parameters=dict(moved.kernel_parameters))
        row = {"phi": phi, "length_scale": state.kernel_parameters["length_scale"]}
        rows = jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)
        return update_median_heuristic(moved), rows

    dtype = state.kernel_parameters["length_scale"].dtype
    rows = {name: jnp.zeros(engine.chunk_size, dtype) for name in ("phi", "length_scale")}
    state, rows = jax.lax.fori_loop(0, count, body, (state, rows))
    return state, {"record": rows}


def _watch() -> optax.GradientTransformation:
    """Passes updates on; its state is their root mean square."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(updates)
        total = sum(jnp.sum(leaf**2) for leaf in leaves)
        return updates, jnp.sqrt(total / sum(leaf.size for leaf in leaves))

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    return f"phi {outputs['record']['phi'][-1]:.2g}"


__all__ = ["SVGD"]
