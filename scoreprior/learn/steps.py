"""The two steps of expectation maximisation: posterior draws, and a prior fitted to them."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar
from scoreprior._util import check_count
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.denoise.exact import Gaussian
from scoreprior.gaussian import AbstractStructure, Moments
from scoreprior.guide import MMPS, AbstractGuidance
from scoreprior.observation import AbstractObservation
from scoreprior.sample import AbstractSampler, HalfNoise, solve
from scoreprior.train import AbstractLoss, adamw, fit
from scoreprior.train.fit import network_of
from scoreprior.train.identity import described, digest, program

PosteriorDraw = Callable[[AbstractDenoiser, AbstractObservation, Key], Event]
"""One draw of the event given its measurement, under the prior of a denoiser; JAX traces it."""


class GuidedDraws(eqx.Module):
    """One draw per measurement, by a sampler with the guided denoiser.

    A draw starts from `moments` at the first of the levels `sigmas`, whatever the data, so that
    level is many times the spread of the events; it ends with the posterior mean at the last, which
    is far below what there is to resolve. For a Gaussian prior `MMPS` iterated to the end, as any
    guidance that is exact there, gives exact draws in the limit of many levels. For other priors
    guidance is biased, and so is what is learned; `CorrectedDraws` are not.

    **Arguments:** `moments` of the events, such as those of `fit_gaussian`; `sigmas`, decreasing,
    from a grid: `LogGrid(0.01, 100.0)(64)`; `guidance`; `sampler`.
    """

    moments: Moments
    sigmas: Float[Array, " num_levels"]
    guidance: AbstractGuidance = MMPS()
    sampler: AbstractSampler = HalfNoise()

    def __check_init__(self):
        if jnp.ndim(self.sigmas) != 1 or len(self.sigmas) < 2:
            raise ValueError(f"sigmas must hold at least two levels, got {jnp.shape(self.sigmas)}")

    def __call__(
        self, denoiser: AbstractDenoiser, observation: AbstractObservation, key: Key
    ) -> Event:
        key_start, key_steps = jax.random.split(key)
        guided = self.guidance(denoiser, observation)
        x = self.moments.sample(key_start, self.sigmas[0])
        x = solve(guided, x, key=key_steps, sigmas=self.sigmas, sampler=self.sampler)
        return guided(x, self.sigmas[-1])


class AbstractMaximisation(eqx.Module):
    """How a prior is fitted to posterior draws."""

    @abstractmethod
    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x: Float[Array, "n *event"],
        *,
        key: Key,
        held_out: Float[Array, "m *event"] | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> AbstractDenoiser:
        """The denoiser fitted to `x`, beginning at `denoiser`, with the structure of its tree."""

    @abstractmethod
    def objective(
        self, denoiser: AbstractDenoiser, x: Float[Array, "m *event"], *, key: Key
    ) -> Scalar:
        """What is made small, as a mean over `x`."""

    def identity(self, denoiser: AbstractDenoiser) -> dict[str, str]:
        """What tells this fit from another, for checkpoints."""
        return {"maximise": described(self), "arrays of maximise": digest(self)}


class Train(AbstractMaximisation):
    """`train.fit` from the weights at hand, with the averaged weights of the lowest held-out loss.

    **Arguments:** `loss`; `num_steps`, `batch_size`, `averaging`, `evaluate_every`, `patience` and
    `where` as in `train.fit`; `optimiser`, begun afresh every time, by default `adamw(num_steps)`;
    `num_draws`, noises per held-out event.
    """

    loss: AbstractLoss
    num_steps: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    averaging: float = eqx.field(static=True)
    evaluate_every: int = eqx.field(static=True)
    patience: int | None = eqx.field(static=True)
    num_draws: int = eqx.field(static=True)
    optimiser: Any = eqx.field(static=True)
    where: Callable[[Any], Any] = eqx.field(static=True)

    def __init__(
        self,
        loss: AbstractLoss,
        num_steps: int,
        *,
        batch_size: int = 256,
        averaging: float = 0.999,
        evaluate_every: int = 250,
        patience: int | None = None,
        num_draws: int = 8,
        optimiser: Any = None,
        where: Callable[[Any], Any] = network_of,
    ):
        check_count("num_steps", num_steps)
        check_count("num_draws", num_draws)
        self.loss, self.num_steps, self.batch_size = loss, num_steps, batch_size
        self.averaging, self.evaluate_every, self.patience = averaging, evaluate_every, patience
        self.num_draws, self.where = num_draws, where
        # One optimiser for all rounds, so that they share compiled programs.
        self.optimiser = adamw(num_steps) if optimiser is None else optimiser

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x: Float[Array, "n *event"],
        *,
        key: Key,
        held_out: Float[Array, "m *event"] | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> AbstractDenoiser:
        return fit(
            denoiser,
            x,
            self.loss,
            key=key,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            held_out=held_out,
            num_held_out_draws=self.num_draws,
            optimiser=self.optimiser,
            averaging=self.averaging,
            evaluate_every=self.evaluate_every,
            patience=None if held_out is None else self.patience,
            where=self.where,
            checkpoint=checkpoint,
            progress=progress,
        ).denoiser

    def objective(
        self, denoiser: AbstractDenoiser, x: Float[Array, "m *event"], *, key: Key
    ) -> Scalar:
        return _mean_loss(self.loss, denoiser, x, key, self.num_draws)

    def identity(self, denoiser: AbstractDenoiser) -> dict[str, str]:
        params = eqx.filter(self.where(denoiser), eqx.is_inexact_array)
        state = self.optimiser.init(params)
        update = program(self.optimiser.update, params, state, params)
        # The optimiser is told by its program: its functions have no other name.
        names = "num_steps", "batch_size", "averaging", "evaluate_every", "patience", "num_draws"
        settings = {name: getattr(self, name) for name in names}
        return {
            "maximise": f"{settings}, {described(self.loss)}",
            "arrays of maximise": digest(self.loss),
            "optimiser": f"update {update}, initial state {digest(state)}",
        }


class MatchMoments(AbstractMaximisation):
    """The Gaussian with the moments of the draws, for a `denoise.Gaussian`.

    With exact draws this is the stochastic version of `fit_gaussian`.
    """

    structure: AbstractStructure

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x: Float[Array, "n *event"],
        *,
        key: Key,
        held_out: Float[Array, "m *event"] | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> AbstractDenoiser:
        return Gaussian(Moments.fit(x, self.structure))

    def objective(
        self, denoiser: AbstractDenoiser, x: Float[Array, "m *event"], *, key: Key
    ) -> Scalar:
        """The mean of `-log p`, in nats."""
        if not isinstance(denoiser, Gaussian):
            raise TypeError(f"denoiser must be a denoise.Gaussian, got {type(denoiser).__name__}")
        return -jnp.mean(jax.vmap(denoiser.log_prob)(x))


@eqx.filter_jit
def _mean_loss(
    loss: AbstractLoss,
    denoiser: AbstractDenoiser,
    x: Float[Array, "m *event"],
    key: Key,
    num_draws: int,
) -> Scalar:
    """The loss over events, with levels and noises that depend on `key` alone."""

    def one(pair: tuple[Event, Key]) -> Scalar:
        event, key = pair
        level, *keys = jax.random.split(key, 1 + num_draws)
        inner = jax.random.uniform(level, (num_draws,), event.dtype, minval=1e-3, maxval=1 - 1e-3)
        levels = (jnp.arange(num_draws, dtype=event.dtype) + inner) / num_draws

        def draw(u: Scalar, key: Key) -> Scalar:
            return loss(denoiser, event, u, None, key=key)

        return jnp.mean(jax.vmap(draw)(levels, jnp.stack(keys)))

    pairs = (x, jax.random.split(key, len(x)))
    return jnp.mean(jax.lax.map(one, pairs, batch_size=min(len(x), 64)))
