"""Calibration: the mean score made zero at every noise level.

The score of the exact noised law has mean zero, `E s(x_t, sigma) = 0`; a trained network's has not.
Pang et al. ("On Calibrating Diffusion Probabilistic Models", NeurIPS 2023, eq. 10) subtract the
mean. In the denoiser's form

    D_cal(x, sigma) = D(x, sigma) - b(sigma),      b(sigma) = E D(x_t, sigma) - E X,

so that `E D_cal(x_t, sigma) = E X`. The denoising loss `E |D - X|^2` drops by `|b|^2` at every
level.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import check_count, check_data
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper


class Calibrated(AbstractWrapper):
    """`D(x, sigma) - b(sigma)`, with `b` interpolated linearly in `log sigma`.

    What is interpolated, and kept constant beyond the first and last level, is
    `b sqrt(sigma^2 + scale^2) / (sigma scale)`: the bias in units of the residual that a
    preconditioned network returns. So `b` vanishes with `sigma` and stays bounded above.

    **Arguments:** `sigmas` [num_levels], increasing; `bias` [num_levels, *event] in data units;
    `scale`, the standard deviation of the data. Built by `calibrate`.
    """

    denoiser: AbstractDenoiser
    sigmas: Float[Array, " num_levels"] = eqx.field(converter=jnp.asarray)
    bias: Float[Array, "num_levels *event"] = eqx.field(converter=jnp.asarray)
    scale: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        _check_sigmas(self.sigmas)
        if self.bias.shape[0] != self.sigmas.shape[0]:
            raise ValueError(
                f"bias must have one row per level, {self.sigmas.shape[0]}, "
                f"got shape {self.bias.shape}"
            )

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        return self.denoiser(x, sigma, context) - self.bias_at(sigma)

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """`E(x, sigma) + b(sigma)'x / sigma^2`: a bias of the score tilts the energy."""
        return self.denoiser.energy(x, sigma, context) + jnp.vdot(self.bias_at(sigma), x) / sigma**2

    def bias_at(self, sigma: Sigma) -> Event:
        """`b(sigma)`, [*event]."""
        rows = jax.vmap(lambda s, b: b / self._unit(s))(self.sigmas, self.bias)
        level = jnp.log(sigma)
        interpolate = jax.vmap(lambda row: jnp.interp(level, jnp.log(self.sigmas), row))
        flat = interpolate(rows.reshape(rows.shape[0], -1).T)
        return self._unit(sigma) * flat.reshape(self.bias.shape[1:])

    def _unit(self, sigma: Sigma) -> Scalar:
        return sigma * self.scale / jnp.sqrt(sigma**2 + self.scale**2)


def calibrate(
    denoiser: AbstractDenoiser,
    data: Float[Array, "n *event"],
    *,
    key: Key,
    sigmas: Float[Array, " num_levels"],
    num_draws: int = 8,
) -> Calibrated:
    """Estimate the bias of an unconditional denoiser at `sigmas` and subtract it.

    `b(sigma)` is the mean of `D(x_i + sigma z_ij, sigma) - x_i` over `data` [n, *event] and
    `num_draws` noises `z_ij` each, in antithetic pairs; its standard error is about
    `sqrt(E|D - X|^2 / (n num_draws))`. A denoiser with a context is calibrated one context at a
    time, as `Conditioned(denoiser, context)`.
    """
    data, sigmas = jnp.asarray(data), jnp.sort(jnp.asarray(sigmas))
    check_data("data", data)
    check_count("num_draws", num_draws, least=2)
    if num_draws % 2:
        raise ValueError(f"num_draws must be even (antithetic pairs), got {num_draws}")
    _check_sigmas(sigmas)
    bias = _mean_residuals(denoiser, data, key, sigmas, num_draws)
    scale = jnp.sqrt(jnp.mean(jnp.var(data, axis=0)))
    return Calibrated(denoiser, sigmas, bias, scale)


@eqx.filter_jit
def _mean_residuals(
    denoiser: AbstractDenoiser, data: Array, key: Key, sigmas: Array, num_draws: int
) -> Array:
    """`mean(D(x_t, sigma) - x)` at each level, [num_levels, *event], by common random numbers."""

    def one(x: Array, key: Key, sigma: Array) -> Array:
        half = jax.random.normal(key, (num_draws // 2, *x.shape), x.dtype)
        noises = jnp.concatenate([half, -half])
        return jax.vmap(lambda z: denoiser(x + sigma * z, sigma) - x)(noises).mean(0)

    keys = jax.random.split(key, data.shape[0])
    return jax.lax.map(lambda sigma: jax.vmap(one, (0, 0, None))(data, keys, sigma).mean(0), sigmas)


def _check_sigmas(sigmas: Array) -> None:
    if sigmas.ndim != 1 or sigmas.shape[0] < 1:
        raise ValueError(f"sigmas must be a vector of noise levels, got shape {sigmas.shape}")
    if not bool(jnp.all(jnp.isfinite(sigmas) & (sigmas > 0))):
        raise ValueError("sigmas must be positive finite numbers")
    if not bool(jnp.all(jnp.diff(sigmas) > 0)):
        raise ValueError("sigmas must be distinct and increasing")
