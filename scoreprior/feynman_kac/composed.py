"""Products of powers of diffusion models, and anything that tilts them, as a Feynman-Kac model.

The target at noise level `r` is

    p_r(x) = prod_i q_{i,r}(x)^beta_i exp(tau_r(x)),

`q_{i,r}` the law of factor `i` with noise `r` added, and `tau` a twist that ends at the exact log
likelihood: annealing (`beta != 1`), geometric averages and classifier-free guidance (`sum beta =
1`), products of experts, posteriors and rare events of all of these. No `q` is known, only scores
`s_i`. A cloud moves by

    x' = x + h (S + b + grad tau) + sqrt(h) n,     S = sum_i beta_i s_i,    h = r^2 - r'^2,

with `b` a drift that `control` adds, and `S + b` extrapolated to the middle of the step from the
step before (Adams-Bashforth), which makes the law of second order at one evaluation. Without twist
the log weight has the rate (Skreta et al. 2025, "Feynman-Kac correctors in diffusion", whose
propositions are cases of it)

    g = (|S|^2 - sum_i beta_i |s_i|^2) / 2 + S . b + div b

per unit of `r^2`, integrated over a step by an `AbstractWeight`. The twist is on top of that chain:

    tau'(x') - tau(x) - sqrt(h) n . grad tau - h |grad tau|^2 / 2

corrects for any twist and any direction in place of its gradient, without bias. For one factor with
`beta = 1` and no control nothing else is left.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreprior._typing import Event, Key, Scalar
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.feynman_kac.control import AbstractControl
from scoreprior.feynman_kac.engine import FeynmanKacModel, over
from scoreprior.feynman_kac.levels import Levels
from scoreprior.feynman_kac.weight import AbstractWeight, Moved, Scores, dots
from scoreprior.gaussian import Moments

Twist = Callable[[Callable[[Event], Event], Event, Scalar], tuple[Scalar, Event]]
"""`twist(denoise, x, sigma) -> (tau, direction)`.

With `B = sum_i beta_i` a product at level `r` is, as far as it is Gaussian, the product at level
zero with noise `sigma = r / sqrt(B)`, whose denoiser is `x + sigma^2 S(x)`.
"""


class Factor(eqx.Module):
    """A diffusion model to a power: the law of `denoiser` at `sigma_min`, to the `exponent`."""

    denoiser: AbstractDenoiser
    moments: Moments
    sigma_min: Scalar
    exponent: Scalar

    def score(self, x: Event, r: Scalar) -> Event:
        sigma = self.sigma(r)
        return (self.denoiser(x, sigma) - x) / sigma**2

    def sigma(self, r: Scalar) -> Scalar:
        """The noise level of the denoiser."""
        return jnp.sqrt(r**2 + self.sigma_min**2)


class Known(NamedTuple):
    """What is known of a particle, and of the step that brought it here."""

    scores: Scores
    tau: Scalar
    direction: Event | None  # of the twist
    drift: Event  # S + b of the last step
    rate: Scalar  # of the log weight over the last step, without control
    response: Float[Array, " basis"]  # its derivative in theta


class Composed(eqx.Module):
    """A product of `factors`, tilted by `twist` on the way and by `log_likelihood` at the end."""

    factors: tuple[Factor, ...]
    levels: Levels
    weight: AbstractWeight
    control: AbstractControl
    twist: Twist | None = None
    log_likelihood: Callable[[Event], Scalar] | None = None
    batch_size: int | None = eqx.field(static=True, default=None)

    def model(self) -> FeynmanKacModel:
        return FeynmanKacModel(self.init, self.propagate, self.levels.r.size)

    def init(self, key: Key, num_particles: int) -> tuple[Event, Array, Known]:
        keys = jax.random.split(key, num_particles)
        return over(self._first, self.batch_size)(keys)

    def propagate(
        self, key: Key, k: Int[Array, ""], x: Event, known: Known, log_weights: Array
    ) -> tuple[Event, Array, Known]:
        theta = self.control.solve(log_weights, known.rate, known.response)
        theta = jnp.where(k == 0, jnp.zeros_like(theta), theta)
        keys = jax.random.split(key, len(x))

        def step(is_last: bool) -> Callable[..., Any]:
            return over(lambda args: self._step(k, is_last, theta, *args), self.batch_size)

        is_last = k + 1 == self.levels.r.size
        return jax.lax.cond(is_last, step(True), step(False), (keys, x, known))

    def gaussian(self, r: Scalar) -> tuple[Event, Scalar]:
        """Mean and variance of the isotropic Gaussian nearest to the product at level `r`."""
        precisions = [
            factor.exponent / (jnp.mean(factor.moments.eigenvalues) + factor.sigma(r) ** 2)
            for factor in self.factors
        ]
        variance = 1 / sum(precisions)
        terms = zip(precisions, self.factors, strict=True)
        return variance * sum(p * factor.moments.mean for p, factor in terms), variance

    def _first(self, key: Key) -> tuple[Event, Scalar, Known]:
        key_draw, key_probe = jax.random.split(key)
        start = jnp.sqrt(self.levels.start)
        mean, variance = self.gaussian(start)
        noise = jax.random.normal(key_draw, mean.shape, mean.dtype)
        x = mean + jnp.sqrt(variance) * noise
        # The factors are noise by now, and as good as Gaussian with their moments.
        log_g = jnp.sum(noise**2 + jnp.log(2 * jnp.pi * variance)) / 2
        for factor in self.factors:
            log_g = log_g + factor.exponent * factor.moments.log_prob(x, factor.sigma(start))
        known = self._know(x, self.levels.r[0], key_probe)
        return x, log_g + known.tau, known

    def _step(
        self, k: Int[Array, ""], is_last: bool, theta: Array, key: Key, x: Event, known: Known
    ) -> Any:
        h = self.levels.h[k]
        key_noise, key_probe = jax.random.split(key)
        noise = jax.random.normal(key_noise, x.shape, x.dtype)
        drift = known.scores.drift(theta)
        ahead = jnp.where(k == 0, 0.0, h / (2 * self.levels.h[k - 1]))
        extrapolated = drift + ahead * (drift - known.drift)
        moved = x + h * extrapolated + jnp.sqrt(h) * noise
        if known.direction is not None:
            moved = moved + h * known.direction
        r = jnp.zeros_like(h) if is_last else self.levels.r[k + 1]
        new = self._know(moved, r, key_probe, is_last)
        step = Moved(known.scores, new.scores, theta, h, extrapolated, moved - x)
        log_g, rate, response = self.weight.log_g(step)
        if known.direction is not None:
            tilt = jnp.sqrt(h) * jnp.sum(noise * known.direction)
            tilt = new.tau - known.tau - tilt - h / 2 * jnp.sum(known.direction**2)
            log_g, rate = log_g + tilt, rate + tilt
            response = response + h * dots(known.scores.bases, known.direction)
        else:
            log_g, rate = log_g + new.tau - known.tau, rate + new.tau - known.tau
        return moved, log_g, new._replace(drift=drift, rate=rate, response=response)

    def _know(self, x: Event, r: Scalar, key: Key, is_last: bool = False) -> Known:
        scores = self._scores(x, r, key)
        zero = jnp.zeros_like(scores.squares)
        nothing = jnp.zeros_like(x), zero, jnp.zeros_like(scores.divergence)
        if is_last:
            tau = zero if self.log_likelihood is None else self.log_likelihood(x)
            direction = None if self.twist is None else jnp.zeros_like(x)
            return Known(scores, tau, direction, *nothing)
        if self.twist is None:
            return Known(scores, zero, None, *nothing)

        total = sum(factor.exponent for factor in self.factors)

        def denoise(x: Event) -> Event:
            return x + r**2 / total * self._sum(x, r)[0]

        return Known(scores, *self.twist(denoise, x, r / jnp.sqrt(total)), *nothing)

    def _sum(self, x: Event, r: Scalar) -> tuple[Event, Scalar]:
        """`S` and `sum_i beta_i |s_i|^2`."""
        scores = [factor.score(x, r) for factor in self.factors]
        total, squares = jnp.zeros_like(x), jnp.zeros((), x.dtype)
        for factor, score in zip(self.factors, scores, strict=True):
            total = total + factor.exponent * score
            squares = squares + factor.exponent * jnp.sum(score**2)
        return total, squares

    def _scores(self, x: Event, r: Scalar, key: Key) -> Scores:
        if self.control.num_bases == 0:
            S, squares = self._sum(x, r)
            return Scores(S, squares, jnp.zeros((0, *x.shape), x.dtype), jnp.zeros(0, x.dtype))
        probe = jax.random.rademacher(key, x.shape, x.dtype)
        S, slope, squares = jax.jvp(lambda x: self._sum(x, r), (x,), (probe,), has_aux=True)
        mean, variance = self.gaussian(r)
        bases = jnp.stack([S, (mean - x) / variance])
        return Scores(S, squares, bases, jnp.stack([jnp.sum(probe * slope), -x.size / variance]))


__all__ = ["Composed", "Factor", "Known", "Twist"]
