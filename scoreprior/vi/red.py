"""`REDDiff`: modes, not posterior draws, by regularisation with a denoiser."""

import os
import warnings
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from numpyro.primitives import Messenger

from scoreprior._run import Checkpoint, Draws, Loop, fingerprint, key_words, run_chunks
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.problem.sites import peel
from scoreprior.vi.fitted import data_of
from scoreprior.vi.frame import Frame, check_start, start
from scoreprior.vi.optimise import FitState, check_optimizer, identify, or_default, repeat, step


class REDDiff(eqx.Module):
    """RED-diff: **modes** of a regularised posterior (Mardani, Song, Kautz & Vahdat 2023).

    Every chain moves a point `x` down

        -log p(y | x) + E_sigma[ weight sigma^(power + 1) KL(N(x, sigma^2 I) || p_sigma) ],

    with noise levels log-uniform from `sigma_min` to `sigma_max` of the flow, by the gradient

        weight E[ sigma^power (eps_hat - eps) ],   eps_hat = (x + sigma eps - D) / sigma,

    which needs no density and no derivative of the denoiser `D`. `power = 1` is their linear
    schedule `lambda_t` in `sigma_t / alpha_t`, 0 their constant one. Other latent sites are point
    estimates too, by their own density in unconstrained space.

    **What comes out are modes.** The spread of chains is that of the starting points, prior draws:
    neither draws nor their spread are a posterior. Cheap, for a first look or a start.

    Departures from the paper: levels are drawn afresh at every step, stratified and with antithetic
    noise, rather than in one descending pass, so the answer is the minimum of the sum above and not
    a matter of the number of steps; and the likelihood is the model's, in nats. For data with
    noise `sigma_y` their weight of 0.25 is `0.25 / sigma_y^2` here.

    **Arguments:** `weight`, in data units to the power `-(power + 1)`. `num_steps`; `num_chains`.
    `num_levels` per step. `optimizer`: as for `VI`. `chunk_size`: steps between two updates of the
    progress bar and of the checkpoint.
    """

    weight: float = eqx.field(static=True)
    num_steps: int = eqx.field(static=True, default=1000)
    num_chains: int = eqx.field(static=True, default=4)
    power: float = eqx.field(static=True, default=1.0, kw_only=True)
    num_levels: int = eqx.field(static=True, default=4, kw_only=True)
    optimizer: optax.GradientTransformation | None = eqx.field(default=None, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=50, kw_only=True)

    def __check_init__(self):
        check_positive("weight", self.weight)
        check_count("num_steps", self.num_steps)
        check_count("num_chains", self.num_chains)
        check_count("num_levels", self.num_levels)
        check_count("chunk_size", self.chunk_size)
        check_optimizer(self.optimizer)

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """One mode per chain, [num_chains, 1], with a warning that they are modes.

        `stats` hold the `log_likelihood`. With `checkpoint`, a directory, the same call resumes a
        stopped run bit for bit. Ctrl-C returns the points reached so far, with a warning. Raises
        `ValueError` where the log likelihood is NaN at a prior draw or minus infinity at all, and
        for a prior site behind further transforms, whose denoiser is not known.
        """
        # Not problem.centred(), which asks for a density.
        problem = replace(problem, is_centred=True)
        _check_sites(problem)
        key_start, key_steps = jax.random.split(key)
        frame, state, log_density = _start(self, problem, key_start)
        check_start(np.asarray(log_density))
        store = Checkpoint.of(checkpoint, lambda: self._settings(problem, key, state, log_density))

        def advance(state: FitState, start: int, count: int) -> Any:
            numbers = jnp.asarray(start), jnp.asarray(count)
            return _advance(self, problem, frame, state, key_steps, *numbers)

        loop = Loop(self.num_steps, 0, self.chunk_size, _describe)
        chunks, state, interrupted = run_chunks(
            advance, state, loop, progress=progress, checkpoint=store
        )
        if not chunks:
            raise KeyboardInterrupt("interrupted before the first chunk of steps")
        finite = np.concatenate([chunk.outputs["fit"]["is_finite"] for chunk in chunks])
        self._warn(finite, interrupted)
        positions, log_likelihood = jax.tree.map(np.asarray, _finish(problem, frame, state.params))
        return Draws(problem, positions, {"log_likelihood": log_likelihood}, interrupted)

    def _optimizer(self) -> optax.GradientTransformation:
        return or_default(self.optimizer, self.num_steps)

    def _settings(
        self, problem: Problem, key: Key, state: FitState, log_density: Array
    ) -> dict[str, Any]:
        """What identifies a run; `chunk_size` does not change it."""
        apart = ("chunk_size", "optimizer")
        engine = {name: value for name, value in vars(self).items() if name not in apart}
        one = jax.tree.map(lambda leaf: leaf[0], state)
        return {
            "engine": type(self).__name__,
            **engine,
            "optimizer": identify(self._optimizer(), one),
            "key": key_words(key),
            "data": data_of(problem),
            "log_density_at_start": fingerprint(log_density),
        }

    def _warn(self, finite: np.ndarray, interrupted: bool) -> None:
        warnings.warn(
            "REDDiff returns modes and not posterior draws: neither they nor the spread of the "
            "chains say how uncertain the answer is; use NUTS, VI or TemperedSMC for that",
            stacklevel=3,
        )
        if interrupted:
            warnings.warn(
                f"interrupted after {len(finite)} of {self.num_steps} steps: the points are those "
                "reached so far; run again with the same checkpoint to go on",
                stacklevel=3,
            )
        if num_skipped := int((~finite).sum()):
            warnings.warn(
                f"{num_skipped} of {finite.size} steps were skipped because the log likelihood or "
                "its gradient was not finite: check the model far from its prior",
                stacklevel=3,
            )


class _WithoutPriors(Messenger):
    """Takes the density of prior sites out of a model."""

    def __init__(self, fn: Any, names: tuple[str, ...]):
        super().__init__(fn)
        self.names = names

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.names:
            msg["fn"] = msg["fn"].mask(False)


def _without_priors(problem: Problem) -> Problem:
    return replace(problem, model=_WithoutPriors(problem.model, tuple(problem.sites.priors)))


def _check_sites(problem: Problem) -> None:
    """`ValueError` unless the value of every prior site is that of its flow."""

    def look() -> None:
        sites = problem.trace(problem.constrain(problem.initial(jax.random.key(0))))
        for name in problem.sites.priors:
            base, _ = peel(sites[name]["fn"])
            if not isinstance(base, ScorePrior):
                raise ValueError(
                    f"prior site {name!r} is a ScorePrior behind further transforms, whose "
                    "denoiser is not known: apply the transform to the value of the site instead"
                )

    jax.eval_shape(look)


@eqx.filter_jit
def _start(engine: REDDiff, problem: Problem, key: Key) -> tuple[Frame, FitState, Array]:
    key_frame, key_chains = jax.random.split(key)
    frame, log_density = start(_without_priors(problem), key_frame)
    positions = jax.vmap(problem.initial)(jax.random.split(key_chains, engine.num_chains))
    z = jax.vmap(frame.z)(positions)
    return frame, FitState(z, jax.vmap(engine._optimizer().init)(z)), log_density


@eqx.filter_jit
def _advance(
    engine: REDDiff,
    problem: Problem,
    frame: Frame,
    state: FitState,
    key: Key,
    start: Array,
    count: Array,
) -> tuple[FitState, dict[str, dict[str, Array]]]:
    """`count` steps of all chains; outputs are [chunk_size, chain]."""

    def one(state: FitState, key: Key) -> Any:
        def loss(z: Array) -> tuple[Scalar, Scalar]:
            return _loss(engine, problem, frame.position(z), key)

        return step(engine._optimizer(), loss, state)

    def advance(state: FitState, number: Array) -> tuple[FitState, dict[str, dict[str, Array]]]:
        keys = jax.random.split(jax.random.fold_in(key, number), engine.num_chains)
        state, log_density, is_finite = jax.vmap(one)(state, keys)
        return state, {"fit": {"log_density": log_density, "is_finite": is_finite}}

    return repeat(advance, state, start, count, engine.chunk_size)


def _loss(
    engine: REDDiff, problem: Problem, position: dict[str, Array], key: Key
) -> tuple[Scalar, Scalar]:
    """A number with the gradient of the class docstring, and the log density without priors."""
    log_density = _without_priors(problem).log_density(position)
    sites = problem.trace(problem.constrain(position))
    total = -log_density
    for index, name in enumerate(problem.sites.priors):
        prior, _ = peel(sites[name]["fn"])
        gradient = _regulariser(engine, prior, position[name], jax.random.fold_in(key, index))
        total += jnp.vdot(jax.lax.stop_gradient(gradient), position[name])
    return total, log_density


def _regulariser(engine: REDDiff, prior: ScorePrior, x: Array, key: Key) -> Array:
    """`weight E[sigma^power (eps_hat - eps)]`, the mean over levels and antithetic noises.

    As `eps_hat = -sigma s(x + sigma eps)`, and noises cancel in a pair, a pair gives
    `-sigma^(power + 1)` times the mean of two scores.
    """
    key_levels, key_noise = jax.random.split(key)
    uniform = jax.random.uniform(key_levels, (engine.num_levels,), x.dtype)
    uniform = (jnp.arange(engine.num_levels) + uniform) / engine.num_levels
    low, high = jnp.log(prior.flow.sigma_min), jnp.log(prior.flow.sigma_max)
    levels = jnp.exp(low + (high - low) * uniform).astype(x.dtype)
    noises = jax.random.normal(key_noise, (engine.num_levels, *x.shape), x.dtype)

    def pair(sigma: Array, noise: Array) -> Array:
        both = jnp.stack([x + sigma * noise, x - sigma * noise])
        return -(sigma ** (engine.power + 1)) * jnp.mean(prior.score(both, sigma), 0)

    return engine.weight * jnp.mean(jax.vmap(pair)(levels, noises), 0)


@eqx.filter_jit
def _finish(problem: Problem, frame: Frame, z: Array) -> tuple[dict[str, Array], Array]:
    """Positions [chain, 1, *site] and log likelihoods [chain, 1]."""
    positions = jax.vmap(frame.position)(z)
    log_likelihood = jax.vmap(problem.log_likelihood)(positions)
    return jax.tree.map(lambda leaf: leaf[:, None], (positions, log_likelihood))


def _describe(outputs: dict[str, dict[str, np.ndarray]]) -> str:
    fit = outputs["fit"]
    last = fit["log_density"][-1]
    return f"log likelihood {last.min():.4g} to {last.max():.4g}"


__all__ = ["REDDiff"]
