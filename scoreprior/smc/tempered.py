"""`TemperedSMC`: posterior draws and the evidence by a cloud of particles that is slowly cooled."""

import math
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._run import Checkpoint, Draws, Loop, run_chunks
from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.feynman_kac import systematic
from scoreprior.problem import Problem
from scoreprior.smc.moves import AbstractMoves, HMCMoves, check_fraction
from scoreprior.smc.report import (
    check_start,
    describe,
    history,
    identify,
    is_finished,
    pool_evidence,
    warn_clouds,
)
from scoreprior.smc.step import Cloud, Rule, start, temper


class TemperedSMC(eqx.Module):
    """Sequential Monte Carlo along `prior * likelihood^lam` (Del Moral, Doucet & Jasra 2006).

    Particles start as exact draws from the prior, at temperature `lam = 0`, and arrive at the
    posterior, `lam = 1`. At each temperature they are weighted by `likelihood^(lam' - lam)`,
    resampled systematically to equal weights and moved by a Markov kernel. Modes get their mass
    from the weights, so a posterior with separate modes is no obstacle. The product of the mean
    weights estimates the evidence `p(y)`.

    **Groups** are independent repetitions, in one compiled program. With `Z_g` the evidence found
    by group `g` of `G`,

        log_evidence    = log mean_g Z_g
        log_evidence_se = sqrt(sum_g (Z_g / mean(Z) - 1)^2 / (G (G - 1)))

    the latter the standard error of `mean(Z)` relative to it; NaN for one group. Particles of all
    groups are at last resampled together, group `g` with weight `Z_g`, so draws have equal weight
    and a group that missed a mode counts for little. Rows of the result, its chains, hold the
    groups in order: where all find the same evidence, row `g` is group `g`.

    **Tuning** is by the cloud itself, for each group alone. The next temperature is that at which
    the effective sample size falls to `target_ess`. The kernel measures its scales on the resampled
    cloud, for each half of it on the other half, since a kernel whose scales depend on the particle
    that it moves does not leave its target invariant; its step size goes on from temperature to
    temperature and is corrected after every move by `log step += acceptance - target`. Moves end
    when the autocorrelation with the start, within modes and as a mean over coordinates, is at most
    `max_autocorrelation`, or after `max_moves`. Each move leaves its target invariant, but settings
    that depend on the cloud make the evidence consistent in the number of particles rather than
    exactly unbiased (Beskos, Jasra, Kantas & Thiery 2016, "On the convergence of adaptive
    sequential Monte Carlo methods").

    **Waste-free** (Dau & Chopin 2022, algorithm 2), with `num_ancestors = M` of `N` particles: only
    `M` are resampled, each is moved `N / M - 1` times, and all states on the way are the next
    cloud. A temperature costs about one move per particle, so at equal cost there can be more
    particles; `max_autocorrelation` and `max_moves` have no part in it. Particles of one ancestor
    depend on one another: the spread of the groups shows it, the effective sample size does not.

    **Arguments:** `num_particles` per group; `num_groups`. `kernel`: `HMCMoves(...)`,
    `RandomWalkMoves(...)`. `centred`: move `x` with the prior's density policy, rather than its
    noise. `target_ess`, `max_autocorrelation` in (0, 1). `max_temperatures` before giving up.
    `num_ancestors`, a divisor of `num_particles`, for the waste-free scheme, or `None`.
    `batch_size`: particles of a group moved at once, all by default, to bound memory.
    """

    num_particles: int = eqx.field(static=True, default=1000)
    num_groups: int = eqx.field(static=True, default=4)
    kernel: AbstractMoves = eqx.field(default=HMCMoves(), kw_only=True)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    target_ess: float = eqx.field(static=True, default=0.9, kw_only=True)
    max_autocorrelation: float = eqx.field(static=True, default=0.5, kw_only=True)
    max_moves: int = eqx.field(static=True, default=50, kw_only=True)
    max_temperatures: int = eqx.field(static=True, default=200, kw_only=True)
    num_ancestors: int | None = eqx.field(static=True, default=None, kw_only=True)
    batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_count("num_particles", self.num_particles, least=4)
        check_count("num_groups", self.num_groups)
        check_count("max_moves", self.max_moves, least=2)
        check_count("max_temperatures", self.max_temperatures)
        check_fraction("target_ess", self.target_ess)
        check_fraction("max_autocorrelation", self.max_autocorrelation)
        if self.num_ancestors is not None:
            check_count("num_ancestors", self.num_ancestors, least=4)
            if self.num_particles % self.num_ancestors or self.num_particles == self.num_ancestors:
                raise ValueError(
                    f"num_ancestors must be a proper divisor of num_particles = "
                    f"{self.num_particles}, got {self.num_ancestors}"
                )
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if not isinstance(self.kernel, AbstractMoves):
            raise TypeError(f"kernel must be moves such as HMCMoves(), got {self.kernel!r}")

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draw from the posterior of `problem`: draws [group, particle], of equal weight.

        `stats` hold for every draw its joint log density `lp`, its `group_of_draw`, and its
        `ancestor`, the prior draw of that group whence it comes. `extra` holds `log_evidence`,
        `log_evidence_se`, `group_log_evidence` [group] and the record of every temperature,
        [group, step], with the share of proposals that were refused since their density was NaN as
        `diverging`, of which a warning tells.

        With `checkpoint`, a directory, the run is stored after every temperature, and the same call
        resumes it bit for bit. Ctrl-C returns the clouds at the temperatures they have reached:
        draws from `prior * likelihood^temperature` and no posterior, which a warning and an
        evidence of NaN say. Raises `ValueError` where the log likelihood is NaN at a prior draw or
        minus infinity at all of a group's, and `NotImplementedError` for the centred form of a
        prior without a density.
        """
        problem = problem.centred() if self.centred else problem
        key_start, key_steps, key_end = jax.random.split(key, 3)
        clouds = _start(self, problem, key_start)
        check_start(clouds.log_likelihood, "num_particles")
        # More temperatures may be asked of a stopped run.
        known = problem, key, clouds.log_likelihood, ("max_temperatures",)
        store = Checkpoint.of(checkpoint, lambda: identify(self, *known))

        def advance(clouds: Cloud, step: int, count: int) -> Any:
            return _advance(self, problem, clouds, key_steps, jnp.asarray(step))

        loop = Loop(self.max_temperatures, 0, 1, describe, is_finished)
        chunks, clouds, interrupted = run_chunks(
            advance, clouds, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted at the prior, before the first temperature")
        finished = is_finished(chunks[-1].outputs)
        positions, stats = jax.tree.map(np.asarray, _finish(problem, clouds, key_end, finished))
        extra = pool_evidence(np.asarray(clouds.log_evidence, float), finished)
        cut = interrupted and not finished
        draws = Draws(problem, positions, stats, cut, extra | history(chunks))
        warn_clouds(self, draws, finished)
        return draws

    def _rule(self) -> Rule:
        adaptive = Rule(
            self.kernel,
            self.target_ess,
            self.max_autocorrelation,
            self.max_moves,
            self.batch_size,
        )
        if self.num_ancestors is None:
            return adaptive
        return adaptive._replace(
            num_ancestors=self.num_ancestors,
            max_moves=self.num_particles // self.num_ancestors - 1,
            max_autocorrelation=-1.0,
        )

    @property
    def more_moves(self) -> str:
        """The remedy for particles that do not move."""
        if self.num_ancestors is not None:
            return f"lower num_ancestors below {self.num_ancestors}"
        return f"raise max_moves above {self.max_moves}"


@eqx.filter_jit
def _start(engine: TemperedSMC, problem: Problem, key: Key) -> Cloud:
    rule, keys = engine._rule(), jax.random.split(key, engine.num_groups)
    return jax.vmap(lambda key: start(problem, rule, engine.num_particles, key))(keys)


@eqx.filter_jit
def _advance(
    engine: TemperedSMC, problem: Problem, clouds: Cloud, key: Key, step: Array
) -> tuple[Cloud, dict[str, dict[str, Array]]]:
    """All clouds one temperature on; the record has leaves [1, group]."""
    rule = engine._rule()
    keys = jax.random.split(jax.random.fold_in(key, step), engine.num_groups)
    clouds, record = jax.vmap(lambda cloud, key: temper(problem, rule, cloud, key))(clouds, keys)
    return clouds, {"record": jax.tree.map(lambda leaf: leaf[None], record)}


@eqx.filter_jit
def _finish(
    problem: Problem, clouds: Cloud, key: Key, finished: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draws [group, particle] of equal weight and statistics; clouds unchanged if unfinished."""
    shape = clouds.log_likelihood.shape
    log_prior = jax.lax.map(jax.vmap(problem.log_prior), clouds.position)
    stats = {
        "lp": log_prior + clouds.log_likelihood,
        "group_of_draw": jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape),
        "ancestor": clouds.ancestor,
    }
    if not finished:
        return clouds.position, stats
    weights = jnp.repeat(jax.nn.softmax(clouds.log_evidence), shape[1])
    chosen = systematic(key, weights, math.prod(shape))

    def take(leaf: Array) -> Array:
        return leaf.reshape(-1, *leaf.shape[2:])[chosen].reshape(leaf.shape)

    return jax.tree.map(take, (clouds.position, stats))
