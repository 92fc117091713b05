"""The reverse SDE with steps that an estimate of their error chooses.

Jolicoeur-Martineau et al., "Gotta go fast when generating data with score-based models" (2021),
algorithm 1, in the coordinate `sigma`. An Euler step `x'` and the improved Euler step `x''` of
`StochasticHeun` share two evaluations and their noise; the step is taken where

    E = || (x' - x'') / max(atol, rtol max(|x'|, |x'_before|)) || / sqrt(size) <= 1,

`x'_before` being the `x'` of the last step taken, and `x''` is kept. The next try, after a step
taken or refused, has the size `0.9 h E^-0.9` in `sigma^2`.

Two departures from the paper. A size is within a factor of 5 of the one before: `E` rises so
steeply where a step would end far below `sigma` that sizes leap to and fro without a limit. And the
noise is *one* Brownian path of the key, looked up where a step ends, at one of 2^16 levels even in
`log sigma`. Drawn afresh after a refusal it would be biased, since steps are refused where their
noise is large. The path does not depend on the tolerances, so with one key draws converge as these
fall.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import check_count, check_positive, is_traced
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.gaussian import Moments
from scoreprior.sample.samplers import Stage, improved_euler

SAFETY, EXPONENT = 0.9, 0.9  # theta and r in the paper
LIMIT = 5.0
DEPTH = 16  # a path has 2^DEPTH + 1 levels, numbered from sigma_min up


class StepControl(eqx.Module):
    """How large a step may be.

    **Arguments:** `rtol`, a pure number, and `atol`, in data units, as in the formula above; the
    paper recommends `rtol` from 0.01 to 0.1, and for `atol` the step between two grey levels.
    `first_step`: the first `h` tried, in units of `sigma_max^2`. `max_evaluations` of the denoiser,
    two per try: an event that has not arrived by then is NaN.
    """

    rtol: float | Scalar = eqx.field(kw_only=True)
    atol: float | Scalar = eqx.field(kw_only=True)
    first_step: float | Scalar = eqx.field(default=0.1, kw_only=True)
    max_evaluations: int = eqx.field(static=True, default=10_000, kw_only=True)

    def __check_init__(self):
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)
        check_positive("first_step", self.first_step)
        check_count("max_evaluations", self.max_evaluations, least=2)


class AdaptiveRun(NamedTuple):
    """Events at `sigma_min`, and what they cost."""

    x: Event  # [*event]; NaN where it did not arrive
    num_evaluations: Int[Array, "*batch"]  # calls of the denoiser, of refused steps too
    num_refused: Int[Array, "*batch"]


class _At(NamedTuple):
    """Where an event is on its way down."""

    x: Event
    number: Int[Array, ""]  # of the level
    path: Event  # the Brownian path there
    h: Scalar  # the size of the step to try
    before: Event  # x' of the last step taken
    num_tries: Int[Array, ""]
    num_taken: Int[Array, ""]


@eqx.filter_jit
def solve_adaptive(
    denoiser: AbstractDenoiser,
    x_init: Event,
    *,
    key: Key,
    sigma_max: Sigma,
    sigma_min: Sigma,
    control: StepControl,
    context: Context = None,
) -> AdaptiveRun:
    """Carry one event `x_init` at noise level `sigma_max` down to `sigma_min`; see the module.

    Under `vmap` every event has steps of its own, and all take the time of the slowest. There is no
    reverse-mode derivative.
    """
    _check_levels(sigma_min, sigma_max)
    top, bottom = (jnp.asarray(sigma, x_init.dtype) for sigma in (sigma_max, sigma_min))

    def denoise(x: Event, sigma: Scalar) -> Event:
        return denoiser(x, sigma, context)

    def path(number: Int[Array, ""]) -> Event:
        return brownian_path(key, number, bottom, top, x_init.shape)

    def going(at: _At) -> Bool[Array, ""]:
        in_budget = 2 * (at.num_tries + 1) <= control.max_evaluations
        return (at.number > 0) & in_budget & jnp.isfinite(at.h)

    def attempt(at: _At) -> _At:
        sigma = path_level(at.number, bottom, top)
        number = _number_below(at.number, jnp.sqrt(sigma**2 - at.h), bottom, top)
        sigma_next, end = path_level(number, bottom, top), path(number)
        stage = Stage(denoise, sigma, sigma_next, jnp.zeros((0, *x_init.shape), x_init.dtype))
        ahead, x = improved_euler(stage, at.x, at.path - end)
        scale = jnp.maximum(jnp.abs(ahead), jnp.abs(at.before))
        tolerance = jnp.maximum(control.atol, control.rtol * scale)
        error = jnp.sqrt(jnp.mean(((ahead - x) / tolerance) ** 2))
        taken = error <= 1
        factor = jnp.clip(SAFETY * error**-EXPONENT, 1 / LIMIT, LIMIT)
        h = (sigma**2 - sigma_next**2) * factor
        new = _At(x, number, end, h, ahead, at.num_tries + 1, at.num_taken + 1)
        old = at._replace(h=h, num_tries=at.num_tries + 1)
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)

    zero = jnp.zeros((), jnp.int32)
    h = jnp.asarray(control.first_step * top**2, x_init.dtype)
    first = jnp.asarray(2**DEPTH, jnp.int32)
    start = _At(x_init, first, path(first), h, x_init, zero, zero)
    end = jax.lax.while_loop(going, attempt, start)
    x = jnp.where(end.number > 0, jnp.nan, end.x)
    return AdaptiveRun(x, 2 * end.num_tries, end.num_tries - end.num_taken)


@eqx.filter_jit
def sample_adaptive(
    denoiser: AbstractDenoiser,
    moments: Moments,
    num_samples: int,
    *,
    key: Key,
    sigma_max: Sigma,
    sigma_min: Sigma,
    control: StepControl,
    context: Context = None,
) -> AdaptiveRun:
    """Draw `num_samples` events as `sample` does, by `solve_adaptive`, each with its own steps."""
    check_count("num_samples", num_samples)
    _check_levels(sigma_min, sigma_max)

    def one(key: Key) -> AdaptiveRun:
        start, steps = jax.random.split(key)
        return solve_adaptive(
            denoiser,
            moments.sample(start, sigma_max),
            key=steps,
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            control=control,
            context=context,
        )

    return jax.vmap(one)(jax.random.split(key, num_samples))


def path_level(number: Int[Array, ""], sigma_min: Scalar, sigma_max: Scalar) -> Scalar:
    """The noise level with this number: `sigma_min` for 0 and `sigma_max` for the last."""
    share = number.astype(sigma_min.dtype) / 2**DEPTH
    return sigma_min ** (1 - share) * sigma_max**share


def _number_below(
    number: Int[Array, ""], sigma: Scalar, sigma_min: Scalar, sigma_max: Scalar
) -> Int[Array, ""]:
    """The level nearest to `sigma`, but below `number` and not below 0; NaN counts as the last."""
    share = jnp.log(sigma / sigma_min) / jnp.log(sigma_max / sigma_min)
    nearest = jnp.round(2**DEPTH * jnp.where(sigma > sigma_min, share, 0)).astype(number.dtype)
    return jnp.clip(nearest, 0, number - 1)


def brownian_path(
    key: Key,
    number: Int[Array, ""],
    sigma_min: Scalar,
    sigma_max: Scalar,
    shape: tuple[int, ...],
) -> Float[Array, "*event"]:
    """A Brownian motion in `sigma^2` at level `number`, 0 at `sigma_min`: a function of the key.

    The levels are halved `DEPTH` times, with a Brownian bridge drawn at each middle.
    """
    dtype, cell = sigma_min.dtype, jnp.log(sigma_max / sigma_min) / 2**DEPTH

    def variance(low: Array, count: Array) -> Scalar:
        """What `sigma^2` gains over `count` levels from level `low` on."""
        return sigma_min**2 * jnp.exp(2 * cell * low) * jnp.expm1(2 * cell * count)

    def halve(i: Array, carry: tuple) -> tuple:
        low, ends = carry
        half = (2 ** (DEPTH - 1 - i)).astype(low.dtype)
        before, after = variance(low, half), variance(low + half, half)
        share = before / (before + after)
        noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), low), shape, dtype)
        middle = ends[0] + share * (ends[1] - ends[0]) + jnp.sqrt(after * share) * noise
        below = number < low + half
        ends = (jnp.where(below, ends[0], middle), jnp.where(below, middle, ends[1]))
        return jnp.where(below, low, low + half), ends

    zero = jnp.zeros_like(number)
    noise = jax.random.normal(jax.random.fold_in(key, DEPTH), shape, dtype)
    ends = jnp.zeros(shape, dtype), jnp.sqrt(variance(zero, jnp.asarray(2**DEPTH))) * noise
    low, ends = jax.lax.fori_loop(0, DEPTH, halve, (zero, ends))
    return jnp.where(number == low, *ends)


def _check_levels(sigma_min: Sigma, sigma_max: Sigma) -> None:
    check_positive("sigma_min", sigma_min)
    check_positive("sigma_max", sigma_max)
    if not (is_traced(sigma_min) or is_traced(sigma_max)) and sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")


__all__ = ["AdaptiveRun", "StepControl", "sample_adaptive", "solve_adaptive"]
