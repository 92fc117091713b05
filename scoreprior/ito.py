"""Draws together with their log density, accumulated along the path that makes them.

In the coordinate `v = sigma^2` the noised densities obey the heat equation, `dq/dv = Lap q / 2`, so
that along the reverse SDE, `dx = s h + sqrt(h) dW` for a step of `h = -dv`, Ito's formula gives

    d log q(x) = s'dx - |s|^2 h / 2 :

the Laplacian cancels, and the log density of a draw costs no divergence (Skreta et al., "The
superposition of diffusion models using the Ito density estimator", ICLR 2025). In discrete steps,
for a draw `x'` of a kernel `P(x' | x)` and the kernel of noising, `F(x | x') = N(x; x', h I)`,

    log q(x_n) = log q(x_0) + sum log P(x' | x) / F(x | x'),

which is the formula above for `P = N(x + h s, h I)`. Here `P = N(x + h s, h R diag(rho) R')` with
`rho = (lam + sigma'^2) / (lam + sigma^2)` has the mean of the exact reverse kernel for any data,
and its covariance for Gaussian data with the moments given: then one step is exact.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Key, Scalar
from scoreprior._util import check_count, is_traced
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.gaussian import Moments


class DensityDraws(NamedTuple):
    """Draws of the chain and the logarithm of the ratio of its path to one noised from its end."""

    x: Float[Array, "num_samples *event"]
    log_density: Float[Array, " num_samples"]  # in nats


def sample_with_log_density(
    denoiser: AbstractDenoiser,
    moments: Moments,
    num_samples: int,
    *,
    key: Key,
    sigmas: Float[Array, " num_levels"],
    context: Context = None,
) -> DensityDraws:
    """`num_samples` draws at noise level `sigmas[-1]`, with an estimate of `log p_sigma` of each.

    One evaluation of the denoiser per step. The estimate belongs to the path: it has an error of
    order one half in the number of steps, that of a single path, and none for Gaussian data. That
    is little to know of one point, for which `FlowDensity` is there. What is exact for any number
    of steps, any denoiser and any unnormalised target `f` is

        E[ f(x) exp(-log_density) ] = int f dx :

    the draws are importance samples, and the weights `log f(x) - log_density` have the evidence as
    their mean. Its variance is that of the paths, and falls as the steps become finer.

    Starts from the moment-matched `N(m, C + sigmas[0]^2 I)`, as `sample.sample` does.

    **Arguments:** `moments` of the data; `sigmas`, decreasing noise levels in data units, the last
    of them that of the draws, such as `LogGrid(0.01, 100.0)(64)`; `context`, shared by all draws.

    **Errors:** `ValueError` for levels that are too few, not positive or not decreasing.
    """
    check_count("num_samples", num_samples)
    sigmas = jnp.asarray(sigmas)
    if sigmas.ndim != 1 or sigmas.shape[0] < 2:
        raise ValueError(f"sigmas must hold at least two levels, got shape {sigmas.shape}")
    falling = jnp.all(sigmas > 0) & jnp.all(jnp.diff(sigmas) < 0)
    if not is_traced(falling) and not falling:
        raise ValueError(f"sigmas must be positive and decreasing, got {sigmas}")
    return _sample(denoiser, moments, num_samples, key, sigmas, context)


@eqx.filter_jit
def _sample(
    denoiser: AbstractDenoiser,
    moments: Moments,
    num_samples: int,
    key: Key,
    sigmas: Array,
    context: Context,
) -> DensityDraws:
    dtype = moments.mean.dtype
    sigmas = sigmas.astype(dtype)

    def step(carry: tuple[Event, Scalar], level: tuple[Scalar, Scalar, Key]) -> tuple:
        x, log_density = carry
        sigma, sigma_next, step_key = level
        h = (sigma - sigma_next) * (sigma + sigma_next)
        root = moments.scales(sigma_next) / moments.scales(sigma)
        noise = jax.random.normal(step_key, x.shape, dtype)
        drift = h / sigma**2 * (denoiser(x, sigma, context) - x)
        move = drift + jnp.sqrt(h) * moments.basis.synthesise(root * noise)
        # The common factor (2 pi h)^(-d/2) of the two kernels is gone.
        ratio = jnp.sum(move**2) / (2 * h) - jnp.sum(noise**2) / 2 - jnp.sum(jnp.log(root))
        return (x + move, log_density + ratio), None

    def one(key: Key) -> DensityDraws:
        start, steps = jax.random.split(key)
        x = moments.sample(start, sigmas[0])
        keys = jax.random.split(steps, sigmas.shape[0] - 1)
        levels = (sigmas[:-1], sigmas[1:], keys)
        return DensityDraws(*jax.lax.scan(step, (x, moments.log_prob(x, sigmas[0])), levels)[0])

    return jax.vmap(one)(jax.random.split(key, num_samples))
