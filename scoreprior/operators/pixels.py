"""Operators on pixels: those seen, and means of blocks of them."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scoreprior._util import check_count, is_traced, size_of
from scoreprior.operators.base import AbstractLinearOperator, Data, Image
from scoreprior.operators.svd import AbstractSVD, OrthogonalRows


class Mask(AbstractLinearOperator):
    """The pixels that are seen: `y = x[mask]`, [num_seen] in row-major order.

    Pixels that are not seen have no entry in the data, so that a noise level learned from `y` is
    that of the data alone. `adjoint` puts data in their places, and 0 elsewhere.

    **Arguments:** `mask`, of the shape of an image, boolean, true where a pixel is seen, concrete.

    Raises `TypeError` for a mask that is not boolean and `ValueError` for one without a pixel.
    """

    index: Int[Array, " num_seen"]
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, mask: Any):
        mask = concrete_mask(mask)
        self.index = jnp.asarray(np.flatnonzero(mask))
        self.shape_in = mask.shape

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.index.shape

    def apply(self, x: Image) -> Data:
        return x.ravel()[self.index]

    def svd(self) -> AbstractSVD:
        return OrthogonalRows(self, 1.0)


class Downsample(AbstractLinearOperator):
    """Means of blocks of `factor` x `factor` pixels, [..., row / factor, col / factor].

    **Arguments:** `factor`, one for both axes or a pair for rows and columns; `shape_in`, of an
    image, the last two axes of which shrink.

    Raises `ValueError` where a factor does not divide the image.
    """

    factors: tuple[int, int] = eqx.field(static=True)
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, factor: int | tuple[int, int], shape_in: tuple[int, ...]):
        factors = factor if isinstance(factor, tuple) else (factor, factor)
        if len(factors) != 2:
            raise ValueError(f"factor must be an int or a pair of ints, got {factor!r}")
        for each in factors:
            check_count("factor", each)
        self.factors = factors
        self.shape_in = image_shape(shape_in)
        if any(size % each for size, each in zip(self.shape_in[-2:], factors, strict=True)):
            raise ValueError(
                f"factor must divide the last two axes of shape_in = {self.shape_in}, got {factor}"
            )

    @property
    def shape_out(self) -> tuple[int, ...]:
        *channels, rows, cols = self.shape_in
        return (*channels, rows // self.factors[0], cols // self.factors[1])

    def apply(self, x: Image) -> Data:
        *channels, rows, cols = self.shape_out
        blocks = x.reshape(*channels, rows, self.factors[0], cols, self.factors[1])
        return blocks.mean((-3, -1))

    def svd(self) -> AbstractSVD:
        return OrthogonalRows(self, size_of(self.factors) ** -0.5)


def concrete_mask(mask: Any) -> np.ndarray:
    """`mask` as a NumPy array; raises unless it is boolean, concrete and true somewhere."""
    if is_traced(mask):
        raise TypeError(
            "mask must be a concrete array, since it fixes the shape of the data; got a traced one"
        )
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"mask must be boolean, true where data are taken, got {mask.dtype}; "
            "write mask > 0 or mask == 1, whichever is meant"
        )
    if not mask.any():
        raise ValueError(f"mask must be true somewhere, got none of {mask.size} entries")
    return mask


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as a tuple of at least two positive ints, or `ValueError`."""
    shape = tuple(shape)
    if len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"shape_in must be at least two positive ints, [..., row, col], got {shape}"
        )
    return shape


__all__ = ["Downsample", "Mask", "concrete_mask", "image_shape"]
