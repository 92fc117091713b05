"""Samples of the Fourier transform of an image: on the grid, off it, by several coils, magnitudes.

Transforms are orthonormal, `1 / sqrt(row * col)` times the sum, and pixel (0, 0) is their origin.
Grids of frequencies are in NumPy's order, zero frequency first: `numpy.fft.ifftshift` makes it of
one with zero frequency at the centre. Of a real image half of the samples are the conjugates of
the others: a mask that has both measures one number twice.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from scoreprior._util import check_finite
from scoreprior.operators.base import AbstractLinearOperator, AbstractOperator, Data, Image
from scoreprior.operators.nonuniform import AbstractTransform, Direct
from scoreprior.operators.pixels import Mask, concrete_mask, image_shape
from scoreprior.operators.svd import AbstractSVD, OrthogonalRows


class FourierSampling(AbstractLinearOperator):
    """Cartesian samples `y = F(x)[mask]` of the orthonormal transform, complex, [num].

    **Arguments:** `mask` [row, col] of frequencies, boolean, true where taken, in NumPy's order,
    row-major in the data; `complex_image`: whether images are complex, which is for the adjoint and
    the SVD to know.

    Raises `TypeError` for a mask that is not boolean and `ValueError` for one that is empty or not
    two-dimensional.
    """

    selected: Mask
    shape_in: tuple[int, ...] = eqx.field(static=True)
    complex_image: bool = eqx.field(static=True)

    def __init__(self, mask: Any, *, complex_image: bool = False):
        mask = concrete_mask(mask)
        if mask.ndim != 2:
            raise ValueError(f"mask must have shape [row, col], got {mask.shape}")
        self.selected, self.shape_in = Mask(mask), mask.shape
        self.complex_image = complex_image

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.selected.shape_out

    @property
    def complex_in(self) -> bool:
        return self.complex_image

    def apply(self, x: Image) -> Data:
        return self.selected.apply(jnp.fft.fft2(x, norm="ortho"))

    def svd(self) -> AbstractSVD:
        """All singular values 1 for complex images, dense for real ones."""
        return OrthogonalRows(self, 1.0) if self.complex_in else super().svd()


class NonCartesianFourier(AbstractLinearOperator):
    """Samples of the orthonormal transform at any frequencies, complex, [num].

        y_j = sum_rc x[r, c] exp(-2 pi i (f_j r + g_j c)) / sqrt(row * col)

    **Arguments:** `frequencies` [num, 2], `(f, g)` along rows and columns, in cycles per pixel;
    `shape_in` of an image, [row, col]; `transform`, `Direct()` or `NonUniformFFT()`;
    `complex_image`: whether images are complex, for the adjoint.

    Raises `ValueError` for frequencies that are not finite or of another shape.
    """

    frequencies: Float[Array, "num 2"] = eqx.field(converter=jnp.asarray)
    shape_in: tuple[int, ...] = eqx.field(static=True, converter=image_shape)
    transform: AbstractTransform = Direct()
    complex_image: bool = eqx.field(static=True, default=False, kw_only=True)

    def __check_init__(self):
        shape = jnp.shape(self.frequencies)
        if len(shape) != 2 or shape[1] != 2:
            raise ValueError(f"frequencies must have shape [num, 2], got {shape}")
        if len(self.shape_in) != 2:
            raise ValueError(f"shape_in must be [row, col], got {self.shape_in}")
        check_finite("frequencies", self.frequencies)

    @property
    def shape_out(self) -> tuple[int, ...]:
        return (self.frequencies.shape[0],)

    @property
    def complex_in(self) -> bool:
        return self.complex_image

    def apply(self, x: Image) -> Data:
        return self.transform(x, self.frequencies, (0.0, 0.0)) / math.sqrt(x.size)


class MultiCoilMRI(AbstractLinearOperator):
    """Magnetic resonance imaging by several coils: samples of `S_c x` for each coil, [coil, *y].

    Images are those that `sampling` takes, real or complex ([row, col], dimensionless), and
    sensitivities complex; no field inhomogeneity, no relaxation.

    **Arguments:** `sensitivities` `S` [coil, row, col], which may be traced; `sampling`, one
    operator for all coils, such as `FourierSampling` or `NonCartesianFourier`.

    Raises `ValueError` for sensitivities of another shape than the image, or not finite.
    """

    sensitivities: Inexact[Array, "coil row col"]
    sampling: AbstractLinearOperator
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, sensitivities: ArrayLike, sampling: AbstractLinearOperator):
        self.sensitivities = jnp.asarray(sensitivities)
        self.sampling, self.shape_in = sampling, sampling.shape_in

    def __check_init__(self):
        shape = jnp.shape(self.sensitivities)
        if shape[1:] != self.shape_in:
            raise ValueError(
                f"sensitivities must have shape [coil, *image] with images of {self.shape_in}, "
                f"got {shape}"
            )
        check_finite("sensitivities", self.sensitivities)

    @property
    def shape_out(self) -> tuple[int, ...]:
        return (self.sensitivities.shape[0], *self.sampling.shape_out)

    @property
    def complex_in(self) -> bool:
        return self.sampling.complex_in

    def apply(self, x: Image) -> Data:
        return jax.vmap(lambda s: self.sampling.apply(s * x))(self.sensitivities)


class PhaseRetrieval(AbstractOperator):
    """Magnitudes of the oversampled Fourier transform, `|F(x padded with zeros)|`; not linear.

    The transform of the padded image is orthonormal, so that `|y|^2` has the sum of `|x|^2`. An
    image, its mirror image at the origin and, for an image with an empty border, its shifts have
    the same data. The gradient is 0 where a magnitude is 0.

    **Arguments:** `shape_in` of an image, [row, col]; `oversampling` of each axis, at least 1: data
    have `ceil(oversampling * size)` entries along an axis of `size`, in NumPy's order.

    Raises `ValueError` for an oversampling below 1.
    """

    shape_in: tuple[int, ...] = eqx.field(static=True, converter=image_shape)
    oversampling: float = eqx.field(static=True, default=2.0)

    def __check_init__(self):
        if len(self.shape_in) != 2:
            raise ValueError(f"shape_in must be [row, col], got {self.shape_in}")
        if not (math.isfinite(self.oversampling) and self.oversampling >= 1):
            raise ValueError(
                f"oversampling must be a finite number of at least 1, got {self.oversampling}"
            )

    @property
    def shape_out(self) -> tuple[int, ...]:
        return tuple(math.ceil(self.oversampling * n) for n in self.shape_in)

    def apply(self, x: Image) -> Data:
        return jnp.abs(jnp.fft.fft2(x, self.shape_out, norm="ortho"))


__all__ = ["FourierSampling", "MultiCoilMRI", "NonCartesianFourier", "PhaseRetrieval"]
