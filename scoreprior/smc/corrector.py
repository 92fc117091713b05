"""`FeynmanKac`: posterior draws and the evidence by a guided diffusion with weights."""

import os
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._psis import MAX_K_HAT, smooth
from scoreprior._run import Checkpoint, Draws, Loop, fingerprint, key_words, run_chunks
from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.feynman_kac import FKState, Levels, Resampling, init, step
from scoreprior.guide import TMPD
from scoreprior.guide.base import AbstractGaussianGuidance
from scoreprior.problem import Problem
from scoreprior.problem.observed import ObservedEvent, observed_event
from scoreprior.sample import LogGrid
from scoreprior.smc.report import FEW_ANCESTORS, draw_rows, history, pool_evidence, warn_groups
from scoreprior.smc.twisted import Twisted


class FeynmanKac(eqx.Module):
    """Guided diffusion made exact by weights: twisted sequential Monte Carlo.

    A cloud goes down the noise levels from data-conditioned noise to the posterior. A method of
    `scoreprior.guide` says at each level how likely the data are; weights correct what it gets
    wrong, and their mean estimates the evidence `p(y)` (Wu et al. 2023, "Practical and
    asymptotically exact conditional sampling in diffusion models"). Unlike theirs, moves are drawn
    from the posterior of the next event under a Gaussian for the next twist, so that weights vary
    little (see `smc.twisted`). The denoiser is evaluated once per particle and level; no flow is
    solved, and no density is needed.

    **Exact** for the law of the chain of `num_steps` levels, which tends to the prior: the error of
    its variance is of second order in the steps. Groups are independent repetitions, pooled as in
    `TemperedSMC`: `log_evidence_se` is from their spread. Draws are resampled to equal weight.

    **Arguments:** `guidance`, a Gaussian method such as `TMPD()`; the nearer it is to the truth,
    the less the weights vary. `num_particles` per group; `num_groups`; `num_steps`, levels even in
    `log sigma`. `threshold`: particles are resampled when their effective sample size falls below
    this share of them; 1 resamples always, 0 never. `batch_size`: particles of a group moved at
    once, all by default, to bound memory. `chunk_size`: steps between two updates of the progress
    bar and of the checkpoint; it does not change the draws.
    """

    guidance: AbstractGaussianGuidance = eqx.field(default=TMPD())
    num_particles: int = eqx.field(static=True, default=1000)
    num_groups: int = eqx.field(static=True, default=4)
    num_steps: int = eqx.field(static=True, default=100)
    threshold: float = eqx.field(static=True, default=0.5, kw_only=True)
    batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=10, kw_only=True)

    def __check_init__(self):
        if not isinstance(self.guidance, AbstractGaussianGuidance):
            raise TypeError(
                "guidance must say how likely the data are, such as TMPD() or PiGDM(...), got "
                f"{self.guidance!r}"
            )
        check_count("num_particles", self.num_particles, least=2)
        check_count("num_groups", self.num_groups)
        check_count("num_steps", self.num_steps, least=2)
        check_count("chunk_size", self.chunk_size)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`: draws [group, particle], of equal weight.

        `stats` hold for every draw its `group_of_draw`, and its `ancestor`, the first particle of
        that group whence it comes. `extra` holds `log_evidence`, `log_evidence_se`,
        `group_log_evidence` [group], `khat`, the Pareto shape of the last weights since the
        last resampling (Vehtari et al. 2024), and the record of every step, [group, step].

        With `checkpoint`, a directory, the run is stored after every chunk, and the same call
        resumes it bit for bit; stopped before its end it has no posterior draws, and Ctrl-C raises.
        Raises `ValueError`, naming the site, unless the model has one prior site of one event,
        observed with Gaussian noise that is known, and no other latent or observed site; and
        `FloatingPointError` where a weight is not a number.
        """
        observed = observed_event(problem, type(self).__name__)
        key_start, key_steps, key_end = jax.random.split(key, 3)
        twisted = self._twisted(observed)
        store = Checkpoint.of(checkpoint, lambda: self._settings(observed, key))
        clouds = _start(self, twisted, key_start)

        def advance(clouds: FKState, start: int, count: int) -> Any:
            keys = key_steps, jnp.asarray(start), jnp.asarray(count)
            clouds, record = _advance(self, twisted, clouds, *keys)
            _check_weights(clouds, start + count, self.guidance)
            return clouds, record

        loop = Loop(self.num_steps, 0, self.chunk_size, _describe)
        chunks, clouds, interrupted = run_chunks(
            advance, clouds, loop, progress=progress, checkpoint=store
        )
        done = sum(len(chunk.outputs["record"]["ess"]) for chunk in chunks)
        if interrupted and done < self.num_steps:
            where = "" if checkpoint is None else f"; {checkpoint} has them: run again to go on"
            raise KeyboardInterrupt(
                f"interrupted after {done} of {self.num_steps} levels, where particles are noise "
                f"and no draws from the posterior{where}"
            )
        log_weights = np.asarray(clouds.log_weights, float)
        groups = np.logaddexp.reduce(log_weights, 1) - np.log(self.num_particles)
        _, khat = smooth(log_weights.ravel())
        positions, stats = jax.tree.map(np.asarray, _finish(self, clouds, key_end))
        extra = pool_evidence(groups, True) | {"khat": ((), np.asarray(khat))}
        draws = Draws(
            observed.problem, {observed.site: positions}, stats, False, extra | history(chunks)
        )
        self._warn(draws)
        return draws

    def _twisted(self, observed: ObservedEvent) -> Twisted:
        flow = observed.prior.flow
        sigmas = LogGrid(float(flow.sigma_min), float(flow.sigma_max))(self.num_steps)
        levels = Levels.half_noise(flow.sigma_min, sigmas.astype(flow.moments.mean.dtype))
        return Twisted(flow, observed.observation, self.guidance, levels, self.batch_size)

    def _settings(self, observed: ObservedEvent, key: Key) -> dict[str, Any]:
        free = ("chunk_size", "batch_size", "guidance")
        engine = {name: value for name, value in vars(self).items() if name not in free}
        return {
            "engine": type(self).__name__,
            **engine,
            "guidance": repr(self.guidance),
            "guidance_values": fingerprint(self.guidance),
            "key": key_words(key),
            "data": fingerprint((observed.observation.data, observed.observation.noise)),
            "prior": fingerprint(observed.prior.flow),
        }

    def _warn(self, draws: Draws) -> None:
        record = {name: values for name, (_, values) in draws.extra.items()}
        remedy = f"num_particles above {self.num_particles}, or num_steps above {self.num_steps}"
        fewest, khat = int(record["unique_ancestors"][:, -1].min()), float(record["khat"])
        if fewest < FEW_ANCESTORS:
            warnings.warn(
                f"collapsed cloud: the {self.num_particles} particles of a group descend from only "
                f"{fewest}: raise {remedy}, or take a guidance nearer to the truth",
                stacklevel=3,
            )
        if not khat <= MAX_K_HAT:
            warnings.warn(
                f"k-hat of the last weights is {khat:.2f}, above {MAX_K_HAT}: few particles have "
                f"most of the weight, because the guidance is too sure of itself; raise {remedy}",
                stacklevel=3,
            )
        warn_groups(record["group_log_evidence"], remedy)


def _check_weights(clouds: FKState, done: int, guidance: AbstractGaussianGuidance) -> None:
    bad = np.isnan(np.asarray(clouds.log_weights))
    if bad.any():
        raise FloatingPointError(
            f"{bad.sum()} of {bad.size} weights are not a number after step {done}: the denoiser "
            f"gave NaN, or {type(guidance).__name__} a matrix that is no covariance; try the "
            "denoiser at the levels of the prior, another guidance, or double precision"
        )


@eqx.filter_jit
def _start(engine: FeynmanKac, twisted: Twisted, key: Key) -> FKState:
    keys, model = jax.random.split(key, engine.num_groups), twisted.model()
    return jax.vmap(lambda key: init(model, engine.num_particles, key))(keys)


@eqx.filter_jit
def _advance(
    engine: FeynmanKac, twisted: Twisted, clouds: FKState, key: Key, start: Array, count: Array
) -> tuple[FKState, dict[str, dict[str, Array]]]:
    """All clouds `count` steps on; the record has leaves [chunk_size, group]."""
    model, resampling = twisted.model(), Resampling(engine.threshold)

    def one(clouds: FKState, number: Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), engine.num_groups)
        # The step is that of all groups: under `vmap`, a branch on it would be taken both ways.
        at = clouds._replace(step=None)
        new, info = jax.vmap(
            lambda cloud, key: step(model, resampling, cloud._replace(step=number), key)
        )(at, keys)
        return new, info._asdict()

    first = jax.eval_shape(lambda: one(clouds, start.astype(jnp.int32))[1])
    empty = jax.tree.map(
        lambda leaf: jnp.zeros((engine.chunk_size, *leaf.shape), leaf.dtype), first
    )

    def body(i: Array, carry: Any) -> Any:
        clouds, rows = carry
        clouds, row = one(clouds, (start + i).astype(jnp.int32))
        return clouds, jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)

    clouds, rows = jax.lax.fori_loop(0, count, body, (clouds, empty))
    return clouds, {"record": rows}


@eqx.filter_jit
def _finish(engine: FeynmanKac, clouds: FKState, key: Key) -> tuple[Array, dict[str, Array]]:
    """Draws [group, particle, *event] of equal weight, from all groups together."""
    shape = clouds.log_weights.shape
    weights = jax.nn.softmax(clouds.log_weights.ravel())
    rows = draw_rows(key, weights, *shape)

    def take(leaf: Array) -> Array:
        return leaf.reshape(-1, *leaf.shape[2:])[rows]

    group = jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape)
    stats = {"group_of_draw": group, "ancestor": clouds.ancestor}
    return take(clouds.particles), jax.tree.map(take, stats)


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    record = {name: values[-1] for name, values in outputs["record"].items()}
    return f"ESS {record['ess'].min():.0f}, {record['unique_ancestors'].min()} ancestors"


__all__ = ["FeynmanKac"]
