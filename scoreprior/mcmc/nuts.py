"""`NUTS`: the no-U-turn sampler on a `Problem`, all chains in one compiled program."""

import math
import os
import warnings
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from scoreprior._run import Checkpoint, Draws, Loop, fingerprint, join, key_words, run_chunks
from scoreprior._typing import Key
from scoreprior._util import check_count, check_positive
from scoreprior.mcmc.start import start_chains
from scoreprior.mcmc.warmup import Warmup, WarmupState
from scoreprior.problem import Problem


class ChainState(NamedTuple):
    """What the next step needs: blackjax's state of every chain and the shared adaptation."""

    chains: Any  # leaves [chain, ...]
    warmup: WarmupState


class NUTS(eqx.Module):
    """The no-U-turn sampler (Hoffman & Gelman 2014), by blackjax.

    Chains start at prior draws and advance in lock step under `vmap`. In the warm-up each learns
    its step size, and all together learn one mass matrix.

    **Arguments:** `num_warmup`, `num_samples`: steps per chain; `num_chains`. `centred`: sample `x`
    with the prior's density policy, rather than its noise. `target_accept`: mean acceptance rate,
    between 0 and 1. `max_tree_depth`: at most `2^depth - 1` gradients per draw. `dense_mass`: learn
    a full mass matrix. `step_size`: the first one; without a warm-up the only one, beside a unit
    mass matrix. `chunk_size`: steps between two updates of the progress bar and of the checkpoint;
    it does not change the draws.
    """

    num_warmup: int = eqx.field(static=True, default=500)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=4)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)
    max_tree_depth: int = eqx.field(static=True, default=10, kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=False, kw_only=True)
    step_size: float = eqx.field(static=True, default=1.0, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)

    def __check_init__(self):
        check_count("num_warmup", self.num_warmup, least=0)
        check_count("num_samples", self.num_samples)
        check_count("num_chains", self.num_chains)
        check_count("max_tree_depth", self.max_tree_depth)
        check_positive("step_size", self.step_size)
        check_count("chunk_size", self.chunk_size)
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, got {self.target_accept}")

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
        `ValueError` where the log density is not finite at prior draws, and
        `NotImplementedError` for the centred form of a prior without a density.
        """
        problem = problem.centred() if self.centred else problem
        key_start, key_steps = jax.random.split(key)
        chains = start_chains(problem, blackjax.nuts.init, key_start, self.num_chains)
        store = None
        if checkpoint is not None:
            store = Checkpoint(checkpoint, self._settings(problem, key, chains))
        one = jax.tree.map(lambda leaf: leaf[0], chains.position)
        size = sum(leaf.size for leaf in jax.tree.leaves(one))
        first = jnp.full_like(chains.logdensity, self.step_size)
        state = ChainState(chains, _warmup(self).init(size, first))
        schedule = jnp.asarray(_warmup(self).schedule(self.num_samples))

        def advance(state: ChainState, start: int, count: int) -> Any:
            steps = jnp.asarray(start), jnp.asarray(count)
            return _advance(self, problem, state, key_steps, schedule, *steps)

        chunks, _, interrupted = run_chunks(
            advance,
            state,
            Loop(self.num_warmup + self.num_samples, self.num_warmup, self.chunk_size, _describe),
            progress=progress,
            checkpoint=store,
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted in the warm-up, before the first draw")
        outputs = join(chunks)
        draws = Draws(problem, outputs["positions"], outputs["stats"], interrupted)
        self._warn(draws)
        return draws

    def _settings(self, problem: Problem, key: Key, start: Any) -> dict[str, Any]:
        """What identifies a run, `chunk_size` apart: it does not change the draws."""
        engine = {name: value for name, value in vars(self).items() if name != "chunk_size"}
        return {
            "engine": type(self).__name__,
            **engine,
            "key": key_words(key),
            "data": fingerprint((problem.args, problem.kwargs, problem.sites.params)),
            "log_density_at_start": [float(value) for value in start.logdensity],
            "gradient_at_start": fingerprint(start.logdensity_grad),
        }

    def _warn(self, draws: Draws) -> None:
        stats = draws.stats
        shape = stats["diverging"].shape
        if draws.interrupted:
            warnings.warn(
                f"interrupted: {shape[1]} of {self.num_samples} draws per chain are returned",
                stacklevel=3,
            )
        if diverging := int(stats["diverging"].sum()):
            remedy = (
                "use the non-centred form (centred=False), or raise"
                if self.centred
                else "look for a badly scaled or funnel-shaped nuisance parameter, or raise"
            )
            warnings.warn(
                f"{diverging} of {math.prod(shape)} draws diverged, so they may be biased: "
                f"{remedy} target_accept above {self.target_accept}",
                stacklevel=3,
            )
        if saturated := int(stats["reached_max_tree_depth"].sum()):
            warnings.warn(
                f"{saturated} of {math.prod(shape)} draws reached max_tree_depth = "
                f"{self.max_tree_depth}: draws are correlated; try dense_mass=True, a longer "
                "num_warmup, or a larger max_tree_depth",
                stacklevel=3,
            )


@eqx.filter_jit
def _advance(
    engine: NUTS,
    problem: Problem,
    state: ChainState,
    key: Key,
    schedule: Int[Array, "steps 2"],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[ChainState, dict[str, Any]]:
    """`count` steps from step number `start`; outputs have `chunk_size` rows."""

    def body(i: Array, carry: Any) -> Any:
        state, rows = carry
        step = start + i
        key_step = jax.random.fold_in(key, step)
        state, row = _step(engine, problem, state, key_step, schedule[step])
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)

    template = jax.eval_shape(lambda s: _step(engine, problem, s, key, schedule[0])[1], state)
    rows = jax.tree.map(
        lambda leaf: jnp.zeros((engine.chunk_size, *leaf.shape), leaf.dtype), template
    )
    return jax.lax.fori_loop(0, count, body, (state, rows))


def _step(
    engine: NUTS, problem: Problem, state: ChainState, key: Key, scheduled: Int[Array, "2"]
) -> tuple[ChainState, dict[str, Any]]:
    kernel = blackjax.nuts.build_kernel()
    step_size, inverse_mass_matrix = state.warmup.step_size, state.warmup.inverse_mass_matrix

    def one(key: Key, chain: Any, step_size: Array) -> Any:
        return kernel(
            key,
            chain,
            problem.log_density,
            step_size,
            inverse_mass_matrix,
            max_num_doublings=engine.max_tree_depth,
        )

    keys = jax.random.split(key, engine.num_chains)
    chains, info = jax.vmap(one)(keys, state.chains, step_size)
    flat = jax.vmap(lambda position: ravel_pytree(position)[0])(chains.position)
    warmup = _warmup(engine).update(state.warmup, scheduled, flat, info.acceptance_rate)
    depth = info.num_trajectory_expansions
    stats = {
        "acceptance_rate": info.acceptance_rate,
        "diverging": info.is_divergent,
        "energy": info.energy,
        "lp": chains.logdensity,
        "n_steps": info.num_integration_steps,
        "reached_max_tree_depth": (depth >= engine.max_tree_depth) & ~info.is_turning,
        "step_size": step_size,
        "tree_depth": depth,
    }
    return ChainState(chains, warmup), {"positions": chains.position, "stats": stats}


def _warmup(engine: NUTS) -> Warmup:
    return Warmup(engine.num_warmup, engine.target_accept, engine.dense_mass)


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    stats = outputs["stats"]
    step_size, num_gradients = np.median(stats["step_size"][-1]), stats["n_steps"].mean()
    diverging = int(stats["diverging"].sum())
    return f"step {step_size:.2g}, {num_gradients:.0f} gradients per draw, {diverging} divergences"
