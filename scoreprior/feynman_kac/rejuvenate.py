"""Rejuvenation: Metropolis moves of resampled particles, where only scores of a law are known.

At every level a cloud has the law `p(x) ~ q(x) exp(tau(x))`, of which the score of `q` and the
twist `tau` itself are known. A proposal `x*` is accepted with probability `min(1, exp(a))`; what
`a` is, without a density of `q`, makes the difference between the classes here.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._typing import Event, Key, Scalar
from scoreprior._util import check_count, check_positive


class Place(NamedTuple):
    """A particle where it is."""

    x: Event
    tau: Scalar
    direction: Event | None  # the gradient of tau or what stands for it
    score: Event  # of q; zero unless the rejuvenation follows it
    cache: Any  # of the Feynman-Kac model


class Target(NamedTuple):
    """`q exp(tau)` at one level.

    `score(x, v)` is that of `q` with noise of variance `v` added to it; `visit(key, x)` finds out
    all of a `Place`; `noise` is the standard deviation of the noise that `q` has already, and
    `room` the largest `v` at which the score is known.
    """

    score: Callable[[Event, Scalar], Event]
    visit: Callable[[Key, Event], Place]
    noise: Scalar
    room: Scalar


class AbstractRejuvenation(eqx.Module):
    """A Markov kernel that leaves `q exp(tau)` as it is: `num_steps` Metropolis steps."""

    num_steps: eqx.AbstractVar[int]
    follows_score: ClassVar[bool]

    @abstractmethod
    def propose(self, key: Key, target: Target, place: Place) -> tuple[Place, Scalar]:
        """A proposal and the log of its acceptance ratio."""

    def check(self, exponents: Sequence[float]) -> None:
        """Raise `ValueError` unless the kernel is right for factors with these exponents."""

    def __call__(self, key: Key, target: Target, place: Place) -> Place:
        def body(place: Place, key: Key) -> tuple[Place, None]:
            key_propose, key_accept = jax.random.split(key)
            proposal, log_ratio = self.propose(key_propose, target, place)
            height = jnp.log(jax.random.uniform(key_accept, (), log_ratio.dtype))
            # A ratio that is not a number is accepted, so that the weights show it.
            refused = height >= log_ratio
            new = jax.tree.map(lambda a, b: jnp.where(refused, a, b), place, proposal)
            return new, None

        return jax.lax.scan(body, place, jax.random.split(key, self.num_steps))[0]


class ScoreLine(AbstractRejuvenation):
    """Metropolis-adjusted Langevin with the density ratio from scores (Lam et al. 2026).

    With `e = step_size * sigma`, `sigma` the noise level, and `P = s + grad tau`, the proposal is

        x* = x + e^2 P(x) / 2 + e n,

    and the log ratio of `q` the line integral of its score by Simpson's rule,

        log q(x*) - log q(x) = (x* - x) . (s(x) + 4 s((x + x*) / 2) + s(x*)) / 6,

    at two evaluations of the score per step; that of the twist is exact, whatever stands for its
    gradient. The rule is exact for a score that is cubic on the line, as that of a Gaussian; its
    error falls with the fourth power of the step. A network whose score is no gradient has no such
    ratio: see `denoise.asymmetry`.

    **Arguments:** `step_size`, in units of the noise level: about 1 in a few dimensions, less in
    many; `num_steps` per resampling.
    """

    step_size: float
    num_steps: int = eqx.field(static=True, default=1)

    follows_score: ClassVar[bool] = True

    def __check_init__(self):
        check_positive("step_size", self.step_size)
        check_count("num_steps", self.num_steps)

    def propose(self, key: Key, target: Target, place: Place) -> tuple[Place, Scalar]:
        key_noise, key_visit = jax.random.split(key)
        e = self.step_size * target.noise
        noise = jax.random.normal(key_noise, place.x.shape, place.x.dtype)
        ahead = place.x + e**2 / 2 * slope(place) + e * noise
        new = target.visit(key_visit, ahead)
        middle = target.score((place.x + new.x) / 2, jnp.zeros_like(target.noise))
        moved = new.x - place.x
        line = jnp.sum(moved * (place.score + 4 * middle + new.score)) / 6
        back = (moved + e**2 / 2 * slope(new)) / e
        turned = (jnp.sum(noise**2) - jnp.sum(back**2)) / 2
        return new, line + new.tau - place.tau + turned


def slope(place: Place) -> Event:
    return place.score if place.direction is None else place.score + place.direction


class Renoise(AbstractRejuvenation):
    """Noise up and down again, accepted by the twist alone.

    Noise is added until its level is `factor` times what it was, and taken off by the reverse SDE:
    `x -> x_up -> x*` with `p(x_up | x) p(x* | x_up)` reversible for `q`, as a Gibbs sampler's sweep
    is. So the acceptance ratio is `exp(tau(x*) - tau(x))`, as that of preconditioned Crank-Nicolson
    moves is, with no density; without a twist every proposal is accepted. No score need be a
    gradient.

    Exact up to the error of the reverse SDE, in `num_levels` steps with half of the noise before
    each score and half after it: for a law narrow against the noise, the worst case, its variance
    is wrong by 1.4 % after many moves with `factor = 1.5` and four levels, an error that falls with
    the square of their number.
    Only for a single prior to the power one: noise added to a product of powers is not that of its
    factors.

    **Arguments:** `factor` above 1, how far to go: the nearer to 1, the more proposals are
    accepted; no level is higher than the first of the chain. `num_levels`, evaluations of the
    denoiser on the way down; `num_steps` per resampling.
    """

    factor: float
    num_levels: int = eqx.field(static=True, default=4)
    num_steps: int = eqx.field(static=True, default=1)

    follows_score: ClassVar[bool] = False

    def __check_init__(self):
        if not self.factor > 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")
        check_count("num_levels", self.num_levels)
        check_count("num_steps", self.num_steps)

    def check(self, exponents: Sequence[float]) -> None:
        if list(exponents) != [1.0]:
            raise ValueError(
                "rejuvenation Renoise adds noise and takes it off again, which leaves the law of "
                "one prior as it is, and of no product of powers; take ScoreLine(step_size), got "
                f"exponents {list(exponents)}"
            )

    def propose(self, key: Key, target: Target, place: Place) -> tuple[Place, Scalar]:
        key_up, key_down, key_visit = jax.random.split(key, 3)
        square = target.noise**2
        top = jnp.minimum(square * (self.factor**2 - 1), jnp.maximum(target.room, 0.0))
        shares = jnp.linspace(1.0, 0.0, self.num_levels + 1, dtype=square.dtype)
        extra = square * jnp.expm1(shares * jnp.log1p(top / square))
        h = extra[:-1] - extra[1:]
        half = jnp.append(h, 0.0) / 2

        def down(x: Event, args: Any) -> tuple[Event, None]:
            key, v, h, variance = args
            noise = jax.random.normal(key, x.shape, x.dtype)
            return x + h * target.score(x, v) + jnp.sqrt(variance) * noise, None

        noise = jax.random.normal(key_up, place.x.shape, place.x.dtype)
        x = place.x + jnp.sqrt(top + half[0]) * noise
        keys = jax.random.split(key_down, self.num_levels)
        x, _ = jax.lax.scan(down, x, (keys, extra[:-1], h, half[:-1] + half[1:]))
        new = target.visit(key_visit, x)
        return new, new.tau - place.tau


__all__ = ["AbstractRejuvenation", "Place", "Renoise", "ScoreLine", "Target"]
