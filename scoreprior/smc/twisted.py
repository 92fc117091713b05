"""The posterior of a diffusion prior as a Feynman-Kac model: guidance, corrected by weights.

The prior is the law of the chain

    x_{k+1} = x_k + h_k s(x_k, r_k) + sqrt(V_k) n,      h_k = r_k^2 - r_{k+1}^2,

down levels `r_0 > ... > r_K = 0` of noise on top of `x`. It starts from the Gaussian with the
moments of noisy data, and `V_k = (h_k + h_{k+1}) / 2` is half of the noise before a score and half
after it (`sample.HalfNoise`). A method of `guide` gives

    p(y | x_k) ~ exp(tau_k(x_k)) = N(y; mean(x_k), S(x_k)),

a twist (Whiteley & Lee 2014; Wu et al. 2023, "Practical and asymptotically exact conditional
sampling in diffusion models"), and at the end `tau_K` is the exact log likelihood. Telescoping,

    log G_k = tau_{k+1}(x_{k+1}) - tau_k(x_k) + log P(x_{k+1} | x_k) - log M(x_{k+1} | x_k)

corrects any proposal `M` and any twist; the evidence is unbiased for the law of the chain. Here `M`
is not a shifted `P` but the posterior of `x_{k+1}` under `P` and a Gaussian for the next twist,

    N(y; mean(x_k) + T B (x_{k+1} - E x_{k+1}), S'),

carried from level to level as in a Gaussian prior: with the eigenvalues `j` of the Jacobian of the
denoiser in the space of the data,

    T = r_k^2 / (r_{k+1}^2 + h_k j),        S' = cov_y + r_{k+1}^2 T A J A' .

By Bayes' rule the weight is then

    log G_k = tau_{k+1}(x_{k+1}) - log N(y; prediction(x_{k+1}), S') + log N(y; mean, S' + V B B')
              - tau_k(x_k),

which for an isotropic Gaussian prior is constant up to the error of the steps.
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreprior._typing import Event, Key, Scalar
from scoreprior.denoise.base import Noised
from scoreprior.feynman_kac import FeynmanKacModel, Levels, over
from scoreprior.feynman_kac.rejuvenate import AbstractRejuvenation, Place, Target
from scoreprior.flow import Flow
from scoreprior.guide.base import AbstractGaussianTwist, Predicted, operator
from scoreprior.guide.linear import Linear, first_event
from scoreprior.observation import AbstractObservation


class Known(NamedTuple):
    """What is known of a particle at its level."""

    x_hat: Event  # [*event]
    predicted: Predicted
    twist: Scalar


class Whitening(NamedTuple):
    """`W` and `C` with `W A A' W' = I` where data see the event, and `C` the pseudo-inverse."""

    whiten: Float[Array, "m m"]
    colour: Float[Array, "m m"]

    @classmethod
    def of(cls, A: Float[Array, "m n"]) -> "Whitening":
        values, vectors = jnp.linalg.eigh(A @ A.T)
        floor = 10 * values.size * jnp.finfo(values.dtype).eps * values[-1]
        seen = values > floor
        root = jnp.sqrt(jnp.where(seen, values, 1.0))
        whiten = jnp.where(seen, 1 / root, 0.0)[:, None] * vectors.T
        return cls(whiten, vectors * jnp.where(seen, root, 0.0)[None])


class Twisted(eqx.Module):
    """The posterior of the event of `flow` given `observation`, twisted by `guidance`.

    `whitening` is that of linear data, the same for all events; without it, every particle computes
    its own at every step. It shapes the proposal, and the weights correct for one that is wrong.
    """

    flow: Flow
    observation: AbstractObservation
    guidance: AbstractGaussianTwist
    levels: Levels
    batch_size: int | None = eqx.field(static=True)
    rejuvenation: AbstractRejuvenation | None = None
    whitening: Whitening | None = None

    def whitened(self) -> "Twisted":
        """With the whitening that all events share, where the mean of the data is linear."""
        A = operator(self.observation, self.flow.moments.mean)
        return dataclasses.replace(self, whitening=Whitening.of(A))

    def model(self) -> FeynmanKacModel:
        rejuvenate = None if self.rejuvenation is None else self.rejuvenate
        size = self.levels.r.size
        return FeynmanKacModel(self.init, self.propagate, size, rejuvenate=rejuvenate)

    def init(self, key: Key, num_particles: int) -> tuple[Event, Array, Known]:
        keys = jax.random.split(key, num_particles)
        return over(self._first, self.batch_size)(keys)

    def propagate(
        self, key: Key, k: Int[Array, ""], x: Event, known: Known, log_weights: Array
    ) -> tuple[Event, Array, Known]:
        keys = jax.random.split(key, len(x))
        middle = over(lambda args: self._next(k, *args), self.batch_size)
        last = over(lambda args: self._last(*args), self.batch_size)
        return jax.lax.cond(k + 1 < self.levels.r.size, middle, last, (keys, x, known))

    def rejuvenate(
        self, key: Key, k: Int[Array, ""], x: Event, known: Known
    ) -> tuple[Event, Known]:
        """Move by a kernel that leaves `q exp(tau_k)` as it is.

        `q` has half of the noise of the next step in advance, `r_k^2 + h_k / 2`: the law of the
        chain up to the error of its steps.
        """
        r, rejuvenation = self.levels.r[k], self.rejuvenation
        assert rejuvenation is not None
        square = r**2 + self.levels.h[k] / 2
        denoiser = Noised(self.flow.denoiser, jnp.asarray(self.flow.sigma_min))

        def score(x: Event, v: Scalar) -> Event:
            return (denoiser(x, jnp.sqrt(square + v)) - x) / (square + v)

        def place(x: Event, known: Known) -> Place:
            if not rejuvenation.follows_score:
                return Place(x, known.twist, None, jnp.zeros_like(x), known)
            direction = known.predicted.pull(self._y).reshape(x.shape)
            return Place(x, known.twist, direction, score(x, jnp.zeros_like(r)), known)

        target = Target(
            score,
            lambda key, x: place(x, self._know(x, r)),
            jnp.sqrt(square + self.flow.sigma_min**2),
            self.levels.r[0] ** 2 - square,
        )

        def move(args: Any) -> tuple[Event, Known]:
            key, x, known = args
            new = rejuvenation(key, target, place(x, known))
            return new.x, new.cache

        return over(move, self.batch_size)((jax.random.split(key, len(x)), x, known))

    def _know(self, x: Event, r: Scalar) -> Known:
        denoiser = Noised(self.flow.denoiser, jnp.asarray(self.flow.sigma_min))
        x_hat, predicted = self.guidance.predict(lambda x: denoiser(x, r), self.observation, x, r)
        return Known(x_hat, predicted, predicted.log_prob(self._y))

    @property
    def _y(self) -> Float[Array, " m"]:
        return self.observation.data.ravel()

    def _first(self, key: Key) -> tuple[Event, Scalar, Known]:
        sigma_min, start = self.flow.sigma_min, self.levels.start
        x, log_ratio = first_event(self.flow.moments, self.observation, sigma_min, start, key)
        known = self._know(x, self.levels.r[0])
        return x, known.twist + log_ratio, known

    def _next(self, k: Int[Array, ""], key: Key, x: Event, known: Known) -> Any:
        r, h, V = self.levels.r[k], self.levels.h[k], self.levels.V[k]
        r_next = self.levels.r[k + 1]
        predicted = known.predicted
        whitening = self.whitening or Whitening.of(predicted.A)
        T, spread = carry(predicted, whitening, r, r_next, h)
        B, S = T @ predicted.B, predicted.noise(self.observation.noise) + r_next**2 * spread
        key_draw, key = jax.random.split(key)
        centre = x + h / r**2 * (known.x_hat - x)
        draw = centre + jnp.sqrt(V) * jax.random.normal(key_draw, x.shape, x.dtype)
        linear = Linear(predicted.mean, B, V * B)
        x, log_ratio = linear.condition(key, centre, draw, predicted.combine(self._y), S)
        new = self._know(x, r_next)
        return x, new.twist + log_ratio - known.twist, new

    def _last(self, key: Key, x: Event, known: Known) -> Any:
        r, h, V = self.levels.r[-1], self.levels.h[-1], self.levels.V[-1]
        key_draw, key = jax.random.split(key)
        centre = x + h / r**2 * (known.x_hat - x)
        draw = centre + jnp.sqrt(V) * jax.random.normal(key_draw, x.shape, x.dtype)
        noise = self.observation.noise
        seen = known.predicted
        if seen.basis is None:
            A, mean = operator(self.observation, centre), self.observation.mean(centre).ravel()
        else:
            # The same of combinations of the data: as if the denoiser were the identity.
            _, seen = self.guidance.predict(lambda x: x, self.observation, centre, jnp.sqrt(V))
            A, mean = seen.A, seen.mean
        linear = Linear(mean, A, V * A)
        x, log_ratio = linear.condition(key, centre, draw, seen.combine(self._y), seen.noise(noise))
        exact = noise.log_prob(self.observation.data - self.observation.mean(x))
        return x, exact + log_ratio - known.twist, known


def carry(
    predicted: Predicted, whitening: Whitening, r: Scalar, r_next: Scalar, h: Scalar
) -> tuple[Float[Array, "m m"], Float[Array, "m m"]]:
    """`T` and `T A J A'` of the module docstring.

    `J` counts as symmetric, and an eigenvalue below zero, which only the Jacobian of a network can
    have, as zero: this shapes the proposal, and the weights correct for it.
    """
    spread = predicted.B @ predicted.A.T
    whiten, colour = whitening
    j, basis = jnp.linalg.eigh(whiten @ ((spread + spread.T) / 2) @ whiten.T)
    j = jnp.maximum(j, 0)
    ratio = r**2 / (r_next**2 + h * j)
    left = colour @ basis
    T = (left * ratio[None]) @ (basis.T @ whiten)
    return T, (left * (ratio * j)[None]) @ left.T


__all__ = ["Twisted"]
