"""Convolution of images, by the fast Fourier transform, with any kernel or a Gaussian one.

`y[i] = sum_k kernel[c + k] x[i - k]` along the last two axes, with `c = size // 2` the centre of
the kernel, as in `scipy.ndimage.convolve`. What lies outside an image is said by a *boundary*.
"""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from scoreprior._typing import Scalar
from scoreprior._util import check_finite, check_positive
from scoreprior.operators.base import AbstractLinearOperator, Data, Image
from scoreprior.operators.pixels import image_shape
from scoreprior.operators.svd import AbstractSVD, FilterSVD

Profile = Callable[[Array], Array]


class AbstractBoundary(eqx.Module):
    """What lies outside an image."""

    @abstractmethod
    def length(self, size: int, reach: int) -> int:
        """Length of the transform of an axis of `size`, for kernels that reach `reach` pixels."""

    @abstractmethod
    def sample(self, profile: Profile, size: int) -> Float[Array, " length"]:
        """`profile` of the offsets of an axis, offset 0 first, with sum 1 over all offsets."""


class Circular(AbstractBoundary):
    """The image again, and again: a periodic plane."""

    def length(self, size: int, reach: int) -> int:
        return size

    def sample(self, profile: Profile, size: int) -> Float[Array, " length"]:
        # Three periods to either side: for a Gaussian as wide as the image, all but 5e-4 of it.
        offsets = _offsets(size)[:, None] + size * jnp.arange(-3.0, 4.0)[None]
        folded = profile(offsets).sum(1)
        return folded / folded.sum()


class Zero(AbstractBoundary):
    """Nothing: what is blurred across the edge is lost."""

    def length(self, size: int, reach: int) -> int:
        return size + reach

    def sample(self, profile: Profile, size: int) -> Float[Array, " length"]:
        everywhere = jnp.arange(-4.0 * size, 4.0 * size + 1)
        return profile(_offsets(self.length(size, size - 1))) / profile(everywhere).sum()


class AbstractConvolution(AbstractLinearOperator):
    """A convolution, known by its `transfer` function; diagonalised by Fourier where periodic."""

    shape_in: eqx.AbstractVar[tuple[int, ...]]
    boundary: eqx.AbstractVar[AbstractBoundary]

    @abstractmethod
    def transfer(self) -> Complex[Array, "row col"]:
        """Discrete Fourier transform of the kernel, its centre at (0, 0), NumPy's order.

        For `Circular` it has the size of the image, and `A = F^-1 diag(transfer) F`. For `Zero`
        it has that of an image with zeros behind.
        """

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.shape_in

    def apply(self, x: Image) -> Data:
        transfer = self.transfer()
        size, (rows, cols) = transfer.shape, self.shape_in[-2:]
        channels = (1,) * (x.ndim - 2)
        if jnp.iscomplexobj(x):
            product = jnp.fft.fft2(x, size) * transfer.reshape(*channels, *size)
            return jnp.fft.ifft2(product)[..., :rows, :cols]
        half = transfer[:, : size[1] // 2 + 1]
        product = jnp.fft.rfft2(x, size) * half.reshape(*channels, *half.shape)
        return jnp.fft.irfft2(product, size)[..., :rows, :cols]

    def svd(self) -> AbstractSVD:
        """Along Fourier modes for `Circular`, dense otherwise."""
        transfer = self.transfer()
        if transfer.shape == self.shape_in[-2:]:
            return FilterSVD(transfer, self.shape_in)
        return super().svd()


class Convolution(AbstractConvolution):
    """Convolution with a `kernel` [row, col], its centre at `size // 2`.

    The kernel is taken as it is: with sum 1 it keeps the mean (`Circular`). It may be traced.
    Rounding of the transforms leaves negative values of the order of 1e-16 where exact ones are 0.

    **Arguments:** `kernel`, real; `shape_in` of an image, [..., row, col]; `boundary`.

    Raises `ValueError` for a kernel larger than the image, one that is not two-dimensional, and
    entries that are not finite.
    """

    kernel: Float[Array, "row col"] = eqx.field(converter=jnp.asarray)
    shape_in: tuple[int, ...] = eqx.field(static=True, converter=image_shape)
    boundary: AbstractBoundary

    def __check_init__(self):
        if jnp.ndim(self.kernel) != 2:
            raise ValueError(f"kernel must have shape [row, col], got {jnp.shape(self.kernel)}")
        if any(k > n for k, n in zip(self.kernel.shape, self.shape_in[-2:], strict=True)):
            raise ValueError(
                f"kernel must be no larger than the image, {self.shape_in[-2:]}, got "
                f"{self.kernel.shape}"
            )
        check_finite("kernel", self.kernel)

    def transfer(self) -> Complex[Array, "row col"]:
        centre = [k // 2 for k in self.kernel.shape]
        size = [
            self.boundary.length(n, reach)
            for n, reach in zip(self.shape_in[-2:], centre, strict=True)
        ]
        padding = [(0, n - k) for n, k in zip(size, self.kernel.shape, strict=True)]
        placed = jnp.roll(jnp.pad(self.kernel, padding), [-c for c in centre], (0, 1))
        return jnp.fft.fft2(placed)


class GaussianBlur(AbstractConvolution):
    """Convolution with `exp(-|offset|^2 / (2 width^2))`, sampled at pixels, normalised to sum 1.

    The kernel is not truncated: with `Zero` it reaches across the image, with `Circular` it is
    folded. All its values are positive, and it is smooth in `width`, which may be traced and so a
    latent site of a model.

    **Arguments:** `width`, the standard deviation in pixels, positive; `shape_in` of an image,
    [..., row, col]; `boundary`.

    Raises `ValueError` for a width that is not positive and finite, unless it is traced.
    """

    width: Scalar = eqx.field(converter=jnp.asarray)
    shape_in: tuple[int, ...] = eqx.field(static=True, converter=image_shape)
    boundary: AbstractBoundary

    def __check_init__(self):
        if jnp.ndim(self.width):
            raise ValueError(f"width must be one number, got shape {jnp.shape(self.width)}")
        check_positive("width", self.width)

    def transfer(self) -> Complex[Array, "row col"]:
        def profile(offset: Array) -> Array:
            return jnp.exp(-((offset / self.width) ** 2) / 2)

        rows, cols = (
            jnp.fft.fft(self.boundary.sample(profile, size)) for size in self.shape_in[-2:]
        )
        return rows[:, None] * cols[None]


def _offsets(length: int) -> Array:
    """Offsets of an axis in the order of the transform: 0, 1, ..., -2, -1."""
    return jnp.asarray(np.rint(np.fft.fftfreq(length) * length), float)


__all__ = [
    "AbstractBoundary",
    "AbstractConvolution",
    "Circular",
    "Convolution",
    "GaussianBlur",
    "Zero",
]
