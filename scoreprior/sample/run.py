"""Whole runs of a sampler down a grid."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Key, Scalar
from scoreprior._util import check_count
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.gaussian import Moments
from scoreprior.sample.samplers import AbstractSampler, Memory, Stage


@eqx.filter_jit
def solve(
    denoiser: AbstractDenoiser | Callable[..., Any],
    x_init: Event,
    *,
    key: Key,
    sigmas: Float[Array, " num_levels"],
    sampler: AbstractSampler,
    context: Context = None,
) -> Event:
    """Carry one event `x_init` at noise level `sigmas[0]` down to `sigmas[-1]`.

    Without a `context`, any callable `denoiser(x, sigma)` will do.
    """
    if sigmas.shape[0] < 2:
        raise ValueError(f"sigmas must hold at least two levels, got {sigmas.shape[0]}")
    sigmas = sigmas.astype(x_init.dtype)

    def denoise(x: Event, sigma: Scalar) -> Event:
        return denoiser(x, sigma) if context is None else denoiser(x, sigma, context)

    def step(carry: tuple[Event, Memory], level: tuple[Scalar, Scalar, Key]) -> tuple:
        sigma, sigma_next, step_key = level
        noise = jax.random.normal(step_key, (sampler.num_noises, *x_init.shape), x_init.dtype)
        return sampler.step(Stage(denoise, sigma, sigma_next, noise), *carry), None

    keys = jax.random.split(key, sigmas.shape[0] - 1)
    (x, _), _ = jax.lax.scan(step, (x_init, sampler.init(x_init)), (sigmas[:-1], sigmas[1:], keys))
    return x


@eqx.filter_jit
def sample(
    denoiser: AbstractDenoiser,
    moments: Moments,
    num_samples: int,
    *,
    key: Key,
    sigmas: Float[Array, " num_levels"],
    sampler: AbstractSampler,
    context: Context = None,
    denoise_last: bool = False,
) -> Float[Array, "num_samples *event"]:
    """Draw `num_samples` events, [num_samples, *event], in data units.

    Starts from the moment-matched `N(m, C + sigmas[0]^2 I)`, right to second order at any level
    ("How much is enough?", Franzese et al. 2023); moments with zero eigenvalues and mean give the
    usual `N(0, sigmas[0]^2 I)`. `sigmas` comes from a grid, `LogGrid(0.01, 100.0)(32)`. `context`
    is shared by all draws.
    """
    check_count("num_samples", num_samples)

    def one(key: Key) -> Event:
        start, steps = jax.random.split(key)
        x = moments.sample(start, sigmas[0])
        x = solve(denoiser, x, key=steps, sigmas=sigmas, sampler=sampler, context=context)
        return denoiser(x, sigmas[-1], context) if denoise_last else x

    return jax.vmap(one)(jax.random.split(key, num_samples))


__all__ = ["sample", "solve"]
