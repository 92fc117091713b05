"""Closure phases and log closure amplitudes given model visibilities.

`C` is the thermal covariance of `interferometry.Closures`, block by block in time, and `L` its
lower Cholesky factor. It is that of high SNR with the measured amplitudes, so it does not depend on
the model.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import i0e
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample, von_mises_centered

from scoreprior._typing import Key
from scoreprior.interferometry import Closures


class ClosurePhases(dist.Distribution):
    """Closure phases about those of model visibilities, on the torus, with their covariance.

    `numpyro.sample("phases", ClosurePhases(V, closures), obs=closures.value)`. With the residuals
    `r = value - loc`, taken one by one within a time,

        delta_i = r_i - sum_{j < i} (L_ij / L_jj) sin(delta_j),
        p = prod_i exp(cos(delta_i) / L_ii^2) / (2 pi I_0(1 / L_ii^2)):

    each is von Mises given those before it. This is a normalised density at any noise, smooth and
    of period `2 pi` in every phase, and for `L_ii` well under one radian it is the normal density
    `N(r; 0, C)`, with `sin(delta) = delta`, which is exact at high SNR. (A normal density of
    wrapped residuals jumps where one of them wraps, if they are correlated, and its normaliser has
    no closed form.) A single phase has the law `VonMises(loc, 1 / L^2)`. At low SNR the order
    matters, `Closures` has the least noisy first, and the law is an approximation: of six stations
    with noisy visibilities, 90.0 % of the `delta_i` fall into their central 90 % interval at an SNR
    of 10, 89.4 % at 3 and 89.5 % at 1.5, single ones from 87 to 93 %.

    **Arguments:** `vis` [*batch, vis], complex model visibilities in the order of the data, none of
    them zero; `closures`, from `interferometry.closure_phases`.

    Raises `TypeError` or `ValueError` for closures of another kind or number of visibilities.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.circular, 1)
    reparametrized_params: ClassVar[list[str]] = ["loc"]
    pytree_data_fields = ("loc", "concentration", "ratio", "slot")

    def __init__(self, vis: Any, closures: Closures, *, validate_args: bool | None = None):
        vis = _check(vis, closures, phase=True)
        self.loc = _wrap(jnp.sum(_pick(jnp.angle(vis), closures), -1))
        dtype = self.loc.dtype
        diagonal = closures.factors.diagonal(axis1=1, axis2=2)
        lower = closures.factors * (1 - jnp.eye(diagonal.shape[1], dtype=dtype))
        self.ratio = jnp.asarray(lower / diagonal[:, None, :], dtype)  # [times, m, m]
        self.concentration = jnp.asarray(diagonal.reshape(-1)[closures.slot] ** -2.0, dtype)
        self.slot = jnp.asarray(closures.slot)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        assert key is not None
        shape = self.shape(sample_shape)
        key_low, key_high = jax.random.split(key)
        kappa = self.concentration
        low = von_mises_centered(key_low, jnp.minimum(kappa, 1e3), shape, kappa.dtype)
        # Concentrated: rejection loses its digits, and the variance 1 / (kappa - 1/2) is right to
        # the second order.
        high = jax.random.normal(key_high, shape, kappa.dtype)
        high = high / jnp.sqrt(jnp.maximum(kappa, 1e3) - 0.5)
        delta = jnp.where(kappa > 1e3, high, low)
        pulls = jnp.einsum("tij,...tj->...ti", self.ratio, self._blocks(jnp.sin(delta)))
        return _wrap(self.loc + delta + self._flat(pulls))

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        delta = self.innovations(value)
        kappa = self.concentration
        # cos - 1 without its loss of digits
        each = -2 * kappa * jnp.sin(delta / 2) ** 2 - jnp.log(2 * math.pi * i0e(kappa))
        return jnp.sum(each, -1)

    def innovations(self, value: Any) -> Array:
        """`delta` [*batch, n]: residuals less what those before them in their time say."""
        residual = self._blocks(jnp.asarray(value) - self.loc)

        def step(sines: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            place, own, ratio = row
            delta = own - jnp.einsum("tj,...tj->...t", ratio, sines)
            return sines.at[..., place].set(jnp.sin(delta)), delta

        rows = (
            jnp.arange(residual.shape[-1]),
            jnp.moveaxis(residual, -1, 0),
            jnp.moveaxis(self.ratio, 1, 0),
        )
        _, delta = jax.lax.scan(step, jnp.zeros_like(residual), rows)
        return self._flat(jnp.moveaxis(delta, 0, -1))

    def _blocks(self, flat: Array) -> Array:
        """Entries [*batch, n] by time and place, [*batch, times, m], the rest zero."""
        return _fill(flat, self.slot, self.ratio.shape[-3:-1])

    def _flat(self, blocks: Array) -> Array:
        return blocks.reshape(*blocks.shape[:-2], -1)[..., self.slot]

    @property
    def mean(self) -> Array:
        """The mean direction: the law is symmetric about it."""
        return self.loc


class LogClosureAmplitudes(dist.Distribution):
    """Log closure amplitudes about those of model visibilities: `N(loc, C)`.

    `numpyro.sample("amplitudes", LogClosureAmplitudes(V, closures), obs=closures.value)`. Exact at
    high SNR. Noise makes the log of each amplitude too large, by `E1(snr^2 / 2) / 2` in the mean
    (0.001 at an SNR of 3, 0.024 at 2, 0.28 at 1), and skews it downwards: flag what is lower.

    **Arguments:** `vis` [*batch, vis], complex model visibilities in the order of the data, none of
    them zero; `closures`, from `interferometry.log_closure_amplitudes`.

    Raises `TypeError` or `ValueError` for closures of another kind or number of visibilities.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    reparametrized_params: ClassVar[list[str]] = ["loc"]
    pytree_data_fields = ("loc", "factors", "slot")

    def __init__(self, vis: Any, closures: Closures, *, validate_args: bool | None = None):
        vis = _check(vis, closures, phase=False)
        self.loc = jnp.sum(_pick(jnp.log(jnp.abs(vis)), closures), -1)
        self.factors = jnp.asarray(closures.factors, self.loc.dtype)
        self.slot = jnp.asarray(closures.slot)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        assert key is not None
        noise = jax.random.normal(key, self.shape(sample_shape), self.loc.dtype)
        blocks = _fill(noise, self.slot, self.factors.shape[-3:-1])
        moved = jnp.einsum("tij,...tj->...ti", self.factors, blocks)
        return self.loc + moved.reshape(*noise.shape[:-1], -1)[..., self.slot]

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        residual = jnp.asarray(value) - self.loc
        blocks = _fill(residual, self.slot, self.factors.shape[-3:-1])
        factors = jnp.broadcast_to(self.factors, (*blocks.shape, blocks.shape[-1]))
        white = solve_triangular(factors, blocks[..., None], lower=True)
        # Places that are filled up have a factor of one, whose log counts nothing.
        log_det = jnp.sum(jnp.log(jnp.diagonal(self.factors, axis1=-2, axis2=-1)))
        constant = residual.shape[-1] / 2 * math.log(2 * math.pi) + log_det
        return -jnp.sum(white**2, (-3, -2, -1)) / 2 - constant

    @property
    def mean(self) -> Array:
        return self.loc


def _check(vis: Any, closures: Closures, *, phase: bool) -> Array:
    maker = "closure_phases" if phase else "log_closure_amplitudes"
    if not isinstance(closures, Closures):
        raise TypeError(f"closures must be Closures, got {type(closures).__name__}")
    if closures.is_phase != phase or not len(closures):
        raise ValueError(f"closures must be some of interferometry.{maker}, got {closures!r}")
    vis = jnp.asarray(vis)
    if not jnp.issubdtype(vis.dtype, jnp.complexfloating):
        raise TypeError(f"vis must be complex, got {vis.dtype}")
    if vis.shape[-1:] != (closures.num_visibilities,):
        raise ValueError(
            f"vis must end in the {closures.num_visibilities} visibilities that the closures are "
            f"of, got shape {vis.shape}"
        )
    return vis


def _pick(values: Array, closures: Closures) -> Array:
    """What each closure adds up, [*batch, n, legs]."""
    signs = jnp.broadcast_to(jnp.asarray(closures.sign, values.dtype), closures.index.shape)
    picked = values[..., closures.index]
    return picked * jnp.broadcast_to(signs, picked.shape)


def _fill(flat: Array, slot: Array, shape: tuple[int, ...]) -> Array:
    times, size = shape
    blank = jnp.zeros((*flat.shape[:-1], times * size), flat.dtype)
    return blank.at[..., slot].set(flat).reshape(*flat.shape[:-1], times, size)


def _wrap(angle: Array) -> Array:
    """Angles in (-pi, pi]."""
    return math.pi - (math.pi - angle) % (2 * math.pi)
