"""Fourier transforms at arbitrary frequencies, two ways.

Both compute `y_j = sum_rc x[r, c] exp(-2 pi i (f_j (r - r_0) + g_j (c - c_0)))` for frequencies
`(f, g)` in cycles per pixel along rows and columns, and an `origin` `(r_0, c_0)`.
"""

from abc import abstractmethod
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.interpreters import batching
from jaxtyping import Array, Complex, Float

from scoreprior._util import check_positive
from scoreprior.operators.base import Image


class AbstractTransform(eqx.Module):
    """A way to compute a Fourier transform at arbitrary frequencies."""

    @abstractmethod
    def __call__(
        self, x: Image, frequencies: Float[Array, "num 2"], origin: tuple[float, float]
    ) -> Complex[Array, " num"]:
        """`y` [num] of the image `x` [row, col]; `frequencies` in cycles per pixel."""


class Direct(AbstractTransform):
    """The sum itself, as a product of factors for rows and columns.

    `num * row * col` operations and memory for `num * (row + col)` numbers: the better choice
    for some thousand frequencies. Differentiable in the frequencies too.
    """

    def __call__(
        self, x: Image, frequencies: Float[Array, "num 2"], origin: tuple[float, float]
    ) -> Complex[Array, " num"]:
        rows, cols = (
            jnp.exp(-2j * jnp.pi * frequencies[:, axis, None] * (jnp.arange(n) - at)[None])
            for axis, (n, at) in enumerate(zip(x.shape, origin, strict=True))
        )
        return jnp.sum((rows @ x.astype(rows.dtype)) * cols, 1)


class NonUniformFFT(AbstractTransform):
    """The non-uniform fast Fourier transform, by the package `jax-finufft`, of the extra `nufft`.

    FINUFFT: Barnett, Magland & af Klinteberg, SIAM J. Sci. Comput. 41, 2019. Some
    `row * col * log(row * col) + num * log(1 / tolerance)^2` operations.

    **Arguments:** `tolerance`, the relative error in the 2-norm; in single precision 1e-6 at best,
    and that is what finer ones mean there.

    Raises `ImportError` where the package is missing, when called.
    """

    tolerance: float = eqx.field(static=True, default=1e-9)

    def __check_init__(self):
        check_positive("tolerance", self.tolerance)

    def __call__(
        self, x: Image, frequencies: Float[Array, "num 2"], origin: tuple[float, float]
    ) -> Complex[Array, " num"]:
        dtype = jnp.result_type(x.dtype, frequencies.dtype, 1j)
        real = jnp.finfo(dtype).dtype
        # The package puts pixel n // 2 at the origin, and wants angles in [-pi, pi].
        shift = jnp.array([n // 2 - at for n, at in zip(x.shape, origin, strict=True)])
        angles = (2 * jnp.pi * (frequencies - jnp.round(frequencies))).astype(real)
        phase = jnp.exp(-2j * jnp.pi * (frequencies @ shift)).astype(dtype)
        tolerance = max(self.tolerance, 1e-6 if real == jnp.float32 else 0.0)
        transformed = _package().nufft2(
            x.astype(dtype), angles[:, 0], angles[:, 1], iflag=-1, eps=tolerance
        )
        return phase * transformed


@cache
def _package() -> Any:
    try:
        import jax_finufft
    except ImportError as error:
        raise ImportError(
            "NonUniformFFT needs jax-finufft: install scoreprior[nufft], or use Direct()"
        ) from error
    try:
        jax.eval_shape(
            jax.vmap(lambda x: jax_finufft.nufft2(x, jnp.zeros(1), jnp.zeros(1))),
            jax.ShapeDtypeStruct((2, 2, 2), jnp.result_type(jnp.zeros(()), 1j)),
        )
    except AttributeError:
        # jax-finufft 1.3.1 asks JAX for a name that JAX 0.10.2 dropped (its issue #227).
        for primitive in (jax_finufft.ops.nufft1_p, jax_finufft.ops.nufft2_p):
            _set_batching_rule(primitive)
    return jax_finufft


def _set_batching_rule(primitive: Any) -> None:
    """Let `primitive(source [a, b, ...], *points [a, num])` run under `jax.vmap`."""

    def batch(args: Any, axes: Any, **params: Any) -> tuple[Array, int]:
        size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
        source, *points = (
            jnp.broadcast_to(x[None], (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
            for x, a in zip(args, axes, strict=True)
        )
        if all(a is None for a in axes[1:]):  # one set of points: one transform of many images
            across = jnp.moveaxis(source, 0, 1)  # [a, size, b, ...]
            flat = across.reshape(across.shape[0], -1, *across.shape[3:])
            out = primitive.bind(flat, *(p[0] for p in points), **params)
            return out.reshape(*across.shape[:3], *out.shape[2:]), 1
        flat = [x.reshape(-1, *x.shape[2:]) for x in (source, *points)]
        out = primitive.bind(*flat, **params)
        return out.reshape(size, -1, *out.shape[1:]), 0

    batching.primitive_batchers[primitive] = batch


__all__ = ["AbstractTransform", "Direct", "NonUniformFFT"]
