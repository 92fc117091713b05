"""Products of powers of diffusion models, and anything that tilts them, as a Feynman-Kac model.

The target at noise level `r` is

    p_r(x) = prod_i q_{i,r}(x)^beta_i exp(tau_r(x)),

`q_{i,r}` the law of factor `i` with noise `r` added, and `tau` a twist that ends at the exact log
likelihood: annealing (`beta != 1`), geometric averages and classifier-free guidance (`sum beta =
1`), products of experts, posteriors and rare events of all of these. No `q` is known, only scores
`s_i`. A cloud moves by

    x' = x + h (S + b + grad tau) + sqrt(h) n,     S = sum_i beta_i s_i,    h = r^2 - r'^2,

with `b` a drift that `control` adds, and `S + b` extrapolated to the middle of the step from the
step before (Adams-Bashforth), which makes the law of second order at one evaluation; a particle
that rejuvenation has moved has no step before, and `EnergyRatio` does without. Without twist the
log weight has the rate (Skreta et al. 2025, "Feynman-Kac correctors in diffusion", whose
propositions are cases of it)

    g = (|S|^2 - sum_i beta_i |s_i|^2) / 2 + S . b + div b

per unit of `r^2`, integrated over a step by an `AbstractWeight`; or, where energies are known, a
weight without an error of the steps (`EnergyRatio`). Moves may have less noise (see `noise`), at
the same rate. The twist is on top of that chain:

    tau'(x') - tau(x) - sqrt(h) n . grad tau - h |grad tau|^2 / 2

corrects for any twist and any direction in place of its gradient, without bias. For one factor with
`beta = 1` and no control nothing else is left.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreprior._stack import Stack
from scoreprior._typing import Event, Key, Scalar
from scoreprior.denoise.base import energy_of
from scoreprior.feynman_kac.control import AbstractControl
from scoreprior.feynman_kac.engine import FeynmanKacModel, over
from scoreprior.feynman_kac.levels import Levels
from scoreprior.feynman_kac.noise import AbstractNoise, TargetScore
from scoreprior.feynman_kac.rejuvenate import AbstractRejuvenation, Place, Target
from scoreprior.feynman_kac.weight import AbstractWeight, Moved, Scores, dots
from scoreprior.gaussian import Moments

Twist = Callable[[Callable[[Event], Event], Event, Scalar], tuple[Scalar, Event]]
"""`twist(denoise, x, r) -> (tau, direction)`.

With `B = sum_i beta_i` a product at level `r` is, as far as it is Gaussian, the product at level
zero with noise `r / sqrt(B)`, whose denoiser is `x + r^2 / B S(x)`. The noise that is yet to come
is that of the chain, of level `r`.
"""


class Factor(eqx.Module):
    """A diffusion model to a power: the law of `denoiser` at `sigma_min`, to the `exponent`."""

    denoiser: Callable[..., Event]
    moments: Moments
    sigma_min: Scalar
    exponent: Scalar

    def score(self, x: Event, r: Scalar) -> Event:
        sigma = self.sigma(r)
        return (self.denoiser(x, sigma) - x) / sigma**2

    def energy_and_gradient(self, x: Event, r: Scalar) -> tuple[Scalar, Event]:
        """The energy of the denoiser and, by the same evaluation, its gradient: minus the score."""
        sigma, energy = self.sigma(r), energy_of(self.denoiser)
        return jax.value_and_grad(lambda x: energy(x, sigma))(x)

    def sigma(self, r: Scalar) -> Scalar:
        """The noise level of the denoiser."""
        return jnp.sqrt(r**2 + self.sigma_min**2)


class Known(NamedTuple):
    """What is known of a particle, and of the step that brought it here."""

    scores: Scores
    tau: Scalar
    direction: Event | None  # of the twist
    drift: Event  # S + b of the last step
    ahead: Scalar  # 1 if it is of this path, from which to extrapolate, and 0 if there is none
    rate: Scalar  # of the log weight over the last step, without control
    response: Float[Array, " basis"]  # its derivative in theta


class Composed(eqx.Module):
    """A product of factors, tilted by `twist` on the way and by `log_likelihood` at the end.

    Factors of a kind are in one `Stack`: they are evaluated together.
    """

    stacks: tuple[Stack[Factor], ...]
    levels: Levels
    weight: AbstractWeight
    control: AbstractControl
    noise: AbstractNoise = TargetScore()
    twist: Twist | None = None
    log_likelihood: Callable[[Event], Scalar] | None = None
    batch_size: int | None = eqx.field(static=True, default=None)
    rejuvenation: AbstractRejuvenation | None = None
    log_scale: Scalar | None = None

    def with_factors(self, stacks: tuple[Stack[Factor], ...], log_scale: Scalar) -> "Composed":
        """With further factors, whose product is `exp(-log_scale)` at level zero."""
        return dataclasses.replace(self, stacks=(*self.stacks, *stacks), log_scale=log_scale)

    @property
    def factors(self) -> list[Factor]:
        """One by one."""
        return [factor for stack in self.stacks for factor in stack.items()]

    @property
    def total(self) -> Scalar:
        """`sum_i beta_i`."""
        return sum_over(self.stacks, lambda factor: factor.exponent)

    def seeded(self, key: Key) -> "Composed":
        """With what the chain leaves to chance, but for its particles, from `key`: nothing."""
        return self

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
        theta = self.control.solve(log_weights, known.rate, known.response)
        theta = jnp.where(k == 0, jnp.zeros_like(theta), theta)
        keys = jax.random.split(key, len(x))

        def step(is_last: bool) -> Callable[..., Any]:
            return over(lambda args: self._step(k, is_last, theta, *args), self.batch_size)

        is_last = k + 1 == self.levels.r.size
        return jax.lax.cond(is_last, step(True), step(False), (keys, x, known))

    def rejuvenate(
        self, key: Key, k: Int[Array, ""], x: Event, known: Known
    ) -> tuple[Event, Known]:
        """Move by a kernel that leaves `p_r` as it is at the level `r` before step `k`."""
        r, rejuvenation = self.levels.r[k], self.rejuvenation
        assert rejuvenation is not None
        sigmas = [jnp.min(stack.map(lambda factor: factor.sigma(r))) for stack in self.stacks]
        noise = jnp.min(jnp.stack(sigmas))

        def place(x: Event, known: Known) -> Place:
            return Place(x, known.tau, known.direction, known.scores.S, known)

        target = Target(
            lambda x, v: self._sum(x, jnp.sqrt(r**2 + v))[0],
            lambda key, x: place(x, self._know(x, r, key)),
            noise / jnp.sqrt(self.total),
            self.levels.r[0] ** 2 - r**2,
        )

        def move(args: Any) -> tuple[Event, Known]:
            key, x, known = args
            new = rejuvenation(key, target, place(x, known))
            # What the step before did to the weight is of the cloud, for the control to see.
            return new.x, new.cache._replace(rate=known.rate, response=known.response)

        return over(move, self.batch_size)((jax.random.split(key, len(x)), x, known))

    def gaussian(self, r: Scalar) -> tuple[Event, Scalar]:
        """Mean and variance of the isotropic Gaussian nearest to the product at level `r`."""

        def natural(factor: Factor) -> tuple[Scalar, Event]:
            variance = jnp.mean(factor.moments.eigenvalues) + factor.sigma(r) ** 2
            return factor.exponent / variance, factor.exponent / variance * factor.moments.mean

        precision, pull = sum_over(self.stacks, natural)
        return pull / precision, 1 / precision

    def _first(self, key: Key) -> tuple[Event, Scalar, Known]:
        key_draw, key_probe = jax.random.split(key)
        start = jnp.sqrt(self.levels.start)
        mean, variance = self.gaussian(start)
        noise = jax.random.normal(key_draw, mean.shape, mean.dtype)
        x = mean + jnp.sqrt(variance) * noise
        log_g = jnp.sum(noise**2 + jnp.log(2 * jnp.pi * variance)) / 2
        if self.log_scale is not None:
            log_g = log_g + self.log_scale
        known = self._know(x, self.levels.r[0], key_probe)
        if known.scores.energy is not None:
            return x, log_g - known.scores.energy + known.tau, known
        # No energies: the factors are noise by now, and as good as Gaussian with their moments.
        log_g = log_g + sum_over(
            self.stacks,
            lambda factor: factor.exponent * factor.moments.log_prob(x, factor.sigma(start)),
        )
        return x, log_g + known.tau, known

    def _step(
        self, k: Int[Array, ""], is_last: bool, theta: Array, key: Key, x: Event, known: Known
    ) -> Any:
        h, square = self.levels.h[k], self.noise.variance(self.total)
        key_noise, key_probe = jax.random.split(key)
        noise = jax.random.normal(key_noise, x.shape, x.dtype)
        drift = known.scores.drift(theta) + (square - 1) / 2 * known.scores.S
        ahead = known.ahead * h / (2 * self.levels.h[k - 1])
        extrapolated = drift
        if self.weight.extrapolates:
            extrapolated = drift + ahead * (drift - known.drift)
        moved = x + h * extrapolated + jnp.sqrt(square * h) * noise
        if known.direction is not None:
            moved = moved + square * h * known.direction
        r = jnp.zeros_like(h) if is_last else self.levels.r[k + 1]
        new = self._know(moved, r, key_probe, is_last)
        step = Moved(known.scores, new.scores, theta, h, extrapolated, moved - x, self.total)
        log_g, rate, response = self.weight.log_g(step)
        tilt = new.tau - known.tau
        if known.direction is not None:
            tilt = tilt - jnp.sqrt(square * h) * jnp.sum(noise * known.direction)
            tilt = tilt - square * h / 2 * jnp.sum(known.direction**2)
            response = response + h * dots(known.scores.bases, known.direction)
        one = jnp.ones_like(known.ahead)
        new = new._replace(drift=drift, ahead=one, rate=rate + tilt, response=response)
        return moved, log_g + tilt, new

    def _know(self, x: Event, r: Scalar, key: Key, is_last: bool = False) -> Known:
        scores = self._scores(x, r, key)
        zero = jnp.zeros_like(scores.squares)
        nothing = jnp.zeros_like(x), zero, zero, jnp.zeros_like(scores.divergence)
        if is_last:
            tau = zero if self.log_likelihood is None else self.log_likelihood(x)
            direction = None if self.twist is None else jnp.zeros_like(x)
            return Known(scores, tau, direction, *nothing)
        if self.twist is None:
            return Known(scores, zero, None, *nothing)

        def denoise(x: Event) -> Event:
            return x + r**2 / self.total * self._sum(x, r)[0]

        return Known(scores, *self.twist(denoise, x, r), *nothing)

    def _sum(self, x: Event, r: Scalar) -> tuple[Event, Scalar]:
        """`S` and `sum_i beta_i |s_i|^2`."""

        def term(factor: Factor) -> tuple[Event, Scalar]:
            score = factor.score(x, r)
            return factor.exponent * score, factor.exponent * jnp.sum(score**2)

        return sum_over(self.stacks, term)

    def _sum_with_energy(self, x: Event, r: Scalar) -> tuple[Event, tuple[Scalar, Scalar]]:
        """`S`, and beside it `sum_i beta_i |s_i|^2` and `sum_i beta_i E_i`."""

        def term(factor: Factor) -> tuple[Event, tuple[Scalar, Scalar]]:
            (energy, gradient), beta = factor.energy_and_gradient(x, r), factor.exponent
            return -beta * gradient, (beta * jnp.sum(gradient**2), beta * energy)

        return sum_over(self.stacks, term)

    def _scores(self, x: Event, r: Scalar, key: Key) -> Scores:
        nothing = jnp.zeros((0, *x.shape), x.dtype), jnp.zeros(0, x.dtype)
        if not self.weight.needs_energy and self.control.num_bases == 0:
            return Scores(*self._sum(x, r), *nothing)

        def known(x: Event) -> tuple[Event, tuple[Scalar, Scalar | None]]:
            if self.weight.needs_energy:
                return self._sum_with_energy(x, r)
            S, squares = self._sum(x, r)
            return S, (squares, None)

        probe = jax.random.rademacher(key, x.shape, x.dtype)
        S, turned, (squares, energy) = jax.jvp(known, (x,), (probe,), has_aux=True)
        divergence = jnp.sum(probe * turned)
        slope = divergence / x.size if self.weight.needs_energy else None
        if self.control.num_bases == 0:
            return Scores(S, squares, *nothing, energy, slope)
        mean, variance = self.gaussian(r)
        bases = jnp.stack([S, (mean - x) / variance])
        divergences = jnp.stack([divergence, -x.size / variance])
        return Scores(S, squares, bases, divergences, energy, slope)


def sum_over(stacks: tuple[Stack[Factor], ...], term: Callable[[Factor], Any]) -> Any:
    """The sum over all factors of `term(factor)`, a pytree of arrays."""
    sums = [jax.tree.map(lambda leaf: jnp.sum(leaf, 0), stack.map(term)) for stack in stacks]
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *sums)


__all__ = ["Composed", "Factor", "Known", "Twist"]
