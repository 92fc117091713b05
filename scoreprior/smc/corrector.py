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
from scoreprior.composition import Composition
from scoreprior.feynman_kac import (
    AbstractControl,
    AbstractNoise,
    AbstractRejuvenation,
    AbstractWeight,
    Composed,
    FeynmanKacModel,
    FKState,
    MiniBatched,
    Resampling,
    TargetScore,
    Trapezoid,
    init,
    step,
)
from scoreprior.guide import TMPD
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc.pinned import Pinned
from scoreprior.smc.report import FEW_ANCESTORS, draw_rows, history, pool_evidence, warn_groups
from scoreprior.smc.target import Guidance, Scheme, Target
from scoreprior.smc.twisted import Twisted


class FeynmanKac(eqx.Module):
    """Guided diffusion made exact by weights: twisted sequential Monte Carlo.

    A cloud goes down the noise levels from data-conditioned noise to the posterior. A method of
    `scoreprior.guide` says at each level how likely the data are; weights correct what it gets
    wrong, and their mean estimates the evidence `p(y)` (Wu et al. 2023, "Practical and
    asymptotically exact conditional sampling in diffusion models"). The denoiser is evaluated once
    per particle and level; no flow is solved, and no density is needed.

    The prior is a `ScorePrior` or a `Composition`, and the guidance one of

    - a method for one site observed with Gaussian noise: `TMPD()`, `DiagonalTMPD()`, `MMPS(...)`,
      `PiGDM(...)`, `JFPS(...)`, `DiffPIR(...)`, `NRLG()` or `DPS(...)`. By all but `DiagonalTMPD`
      and `DPS`, moves of a `ScorePrior` are drawn from the posterior of the next event under a
      Gaussian for the next twist, so that weights vary little (see `smc.twisted`);
    - `guide.MCGDiff()`, for linear data and a `ScorePrior`;
    - a condition, `guide.Exceeds(...)` or `guide.Equals(...)`, or `guide.Classifier(log_prob)`:
      rare events and classes, which the model holds as a `numpyro.factor`;
    - `guide.Steering(scale)`, for any observed sites and factors;
    - `None`: the prior itself, weighted by the likelihood at the end.

    **Exact** for the law of the chain of `num_steps` levels, which tends to the prior, the error of
    its variance of second order in the steps, for a `ScorePrior` without `control`; otherwise up to
    the error of `weight`, of which `EnergyRatio()` has none. Groups are independent repetitions,
    pooled as in `TemperedSMC`: `log_evidence_se` is from their spread. Draws are resampled to equal
    weight.

    **Arguments:** `guidance`; the nearer it is to the truth, the less the weights vary.
    `num_particles` per group; `num_groups`; `num_steps`, levels even in `log sigma`, of which a
    `sbi.Product` may take more. `threshold`: particles are resampled when their effective sample
    size falls below this share of them; 1 resamples always, 0 never. `control`: an extra drift that
    flattens the weights; `None` is
    `VarianceControl()` for a `Composition` and none for a `ScorePrior`. `weight`: how the weights
    of a step are integrated where there is a composition or control; `EnergyRatio()` takes the
    denoisers' energies and is exact at any `num_steps`, for a `ScorePrior` too, which then is the
    law of its energy. `noise` of the moves of a composition, `TargetScore()` or `TemperedNoise()`.
    `rejuvenation`: moves of particles that have just been resampled, `ScoreLine(...)` or
    `Renoise(...)` of `scoreprior.feynman_kac`, or none; with it the run is exact up to the error of
    the steps, and the evidence has a bias of order `1 / num_particles`. `batch_size`: particles of
    a group moved at once, all by default, to bound memory. `chunk_size`: steps between two updates
    of the progress bar and of the checkpoint; it does not change the draws.
    """

    guidance: Guidance = eqx.field(default=TMPD())
    num_particles: int = eqx.field(static=True, default=1000)
    num_groups: int = eqx.field(static=True, default=4)
    num_steps: int = eqx.field(static=True, default=100)
    threshold: float = eqx.field(static=True, default=0.5, kw_only=True)
    control: AbstractControl | None = eqx.field(default=None, kw_only=True)
    weight: AbstractWeight = eqx.field(default=Trapezoid(), kw_only=True)
    noise: AbstractNoise = eqx.field(default=TargetScore(), kw_only=True)
    rejuvenation: AbstractRejuvenation | None = eqx.field(default=None, kw_only=True)
    batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=10, kw_only=True)

    def __check_init__(self):
        if not isinstance(self.guidance, Guidance):
            raise TypeError(
                "guidance must say how likely the data are, for weights to correct: a method such "
                "as TMPD(), MMPS() or DPS(...), MCGDiff(), a condition such as Exceeds(...), "
                f"Classifier(...), Steering(...), or None for the prior, got {self.guidance!r}"
            )
        if not isinstance(self.control, AbstractControl | None):
            raise TypeError(f"control must be VarianceControl() or NoControl(), got {self.control}")
        if not isinstance(self.weight, AbstractWeight):
            raise TypeError(f"weight must be one such as Trapezoid(), got {self.weight!r}")
        if not isinstance(self.noise, AbstractNoise):
            raise TypeError(f"noise must be TargetScore() or TemperedNoise(), got {self.noise!r}")
        if not isinstance(self.rejuvenation, AbstractRejuvenation | None):
            raise TypeError(
                "rejuvenation must be ScoreLine(...), Renoise(...) or None, got "
                f"{self.rejuvenation!r}"
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
        Raises `ValueError`, naming the site, unless the model has one prior site of one event and
        no other latent site, and for a Gaussian method one observed site, seen in Gaussian noise
        that is known; and `FloatingPointError` where a weight is not a number, or none is positive.
        """
        target = self._scheme.target(problem)
        key_start, key_steps, key_end = jax.random.split(key, 3)
        key_chain = jax.random.fold_in(key, 3)
        store = Checkpoint.of(checkpoint, lambda: self._settings(target, key))
        clouds = _start(self, target.chain, key_chain, key_start)

        def advance(clouds: FKState, start: int, count: int) -> Any:
            keys = key_steps, jnp.asarray(start), jnp.asarray(count)
            clouds, record = _advance(self, target.chain, key_chain, clouds, *keys)
            _check_weights(clouds, start + count, self.guidance)
            return clouds, record

        num_steps = target.chain.levels.r.size
        loop = Loop(num_steps, 0, self.chunk_size, _describe)
        chunks, clouds, interrupted = run_chunks(
            advance, clouds, loop, progress=progress, checkpoint=store
        )
        done = sum(len(chunk.outputs["record"]["ess"]) for chunk in chunks)
        if interrupted and done < num_steps:
            where = "" if checkpoint is None else f"; {checkpoint} has them: run again to go on"
            raise KeyboardInterrupt(
                f"interrupted after {done} of {num_steps} levels, where particles are noise "
                f"and no draws from the posterior{where}"
            )
        log_weights = np.asarray(clouds.log_weights, float)
        groups = np.logaddexp.reduce(log_weights, 1) - np.log(self.num_particles)
        _, khat = smooth(log_weights.ravel())
        positions, stats = jax.tree.map(np.asarray, _finish(self, clouds, key_end))
        extra = pool_evidence(groups, True) | {"khat": ((), np.asarray(khat))}
        draws = Draws(
            target.problem, {target.site: positions}, stats, False, extra | history(chunks)
        )
        self._warn(draws)
        return draws

    @property
    def _scheme(self) -> Scheme:
        named = {name: getattr(self, name) for name in Scheme._fields[1:]}
        return Scheme(type(self).__name__, **named)

    def _settings(self, target: Target, key: Key) -> dict[str, Any]:
        chain = target.chain
        parts = ("guidance", "control", "weight", "noise", "rejuvenation")
        free = {"chunk_size", "batch_size", *parts}
        engine = {name: value for name, value in vars(self).items() if name not in free}
        return {
            "engine": type(self).__name__,
            **engine,
            **{name: repr(getattr(self, name)) for name in parts},
            "guidance_values": fingerprint(self.guidance),
            "key": key_words(key),
            "data": fingerprint(target.data),
            "prior": fingerprint(_flows(target.prior)),
            "levels": fingerprint(chain.levels),
            "factors": fingerprint(chain.stacks if isinstance(chain, Composed) else ()),
            "mini-batches": chain.num_in_batch if isinstance(chain, MiniBatched) else None,
        }

    def _warn(self, draws: Draws) -> None:
        record = {name: values for name, (_, values) in draws.extra.items()}
        num_steps = record["unique_ancestors"].shape[1]
        remedy = f"num_particles above {self.num_particles}, or num_steps above {num_steps}"
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


def _flows(prior: ScorePrior | Composition) -> Any:
    """The parts of a prior that make it what it is, for a fingerprint."""
    if isinstance(prior, ScorePrior):
        return prior.flow
    return [factor.flow for factor in prior.priors], prior.exponents


def _check_weights(clouds: FKState, done: int, guidance: Any) -> None:
    log_weights = np.asarray(clouds.log_weights)
    if (log_weights == -np.inf).all():
        raise FloatingPointError(
            f"the likelihood is zero at all {log_weights.size} particles after step {done}: take a "
            "guidance towards the data, or raise num_particles"
        )
    bad = np.isnan(log_weights)
    if bad.any():
        raise FloatingPointError(
            f"{bad.sum()} of {bad.size} weights are not a number after step {done}: the denoiser "
            f"gave NaN, or {type(guidance).__name__} a matrix that is no covariance; try the "
            "denoiser at the levels of the prior, another guidance, or double precision"
        )


def _model(chain: Twisted | Composed | Pinned, seed: Key) -> FeynmanKacModel:
    """Of one group."""
    return (chain.seeded(seed) if isinstance(chain, Composed) else chain).model()


@eqx.filter_jit
def _start(
    engine: FeynmanKac, chain: Twisted | Composed | Pinned, key_chain: Key, key: Key
) -> FKState:
    def one(seed: Key, key: Key) -> FKState:
        return init(_model(chain, seed), engine.num_particles, key)

    return jax.vmap(one)(*(jax.random.split(k, engine.num_groups) for k in (key_chain, key)))


@eqx.filter_jit
def _advance(
    engine: FeynmanKac,
    chain: Twisted | Composed | Pinned,
    key_chain: Key,
    clouds: FKState,
    key: Key,
    start: Array,
    count: Array,
) -> tuple[FKState, dict[str, dict[str, Array]]]:
    """All clouds `count` steps on; the record has leaves [chunk_size, group]."""
    resampling = Resampling(engine.threshold)
    seeds = jax.random.split(key_chain, engine.num_groups)

    def one(clouds: FKState, number: Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), engine.num_groups)
        # The step is that of all groups: under `vmap`, a branch on it would be taken both ways.
        at = clouds._replace(step=None)
        new, info = jax.vmap(
            lambda seed, cloud, key: step(
                _model(chain, seed), resampling, cloud._replace(step=number), key, "group"
            ),
            axis_name="group",
        )(seeds, at, keys)
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
