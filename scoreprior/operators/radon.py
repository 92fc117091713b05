"""Parallel-beam tomography: integrals of an image along strips.

Lengths are in pixels. Pixel (r, c) lies at `x = c - (cols - 1) / 2` to the right and
`y = (rows - 1) / 2 - r` up, the centre of rotation is that of the image, and the detector of the
projection at angle `theta` measures along `t = x cos(theta) + y sin(theta)`.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from scoreprior._util import check_count, check_finite
from scoreprior.operators.base import AbstractLinearOperator, Data, Image
from scoreprior.operators.pixels import image_shape

ANGLES_AT_ONCE = 16
"""Projections computed together: each takes memory for ten numbers per pixel."""


class Radon(AbstractLinearOperator):
    """Projections [angle, bin] of an image of square pixels, each of constant value; exact.

    A bin is one pixel wide and holds the integral of the image over its strip: the line integral,
    averaged across the bin. A pixel casts a trapezoid onto the detector, of which each bin takes
    its share, so that a projection has the sum of the image. Differentiable in `angles`, too.

    **Arguments:** `angles` [angle] in radians; `shape_in` of an image, [row, col]; `num_bins` of
    the detector, centred, by default enough for the diagonal; what falls beside fewer is lost.

    Raises `ValueError` for angles that are not finite or not one-dimensional.
    """

    angles: Float[Array, " angle"]
    shape_in: tuple[int, ...] = eqx.field(static=True)
    num_bins: int = eqx.field(static=True)

    def __init__(
        self,
        angles: ArrayLike,
        shape_in: tuple[int, ...],
        num_bins: int | None = None,
    ):
        self.angles = jnp.asarray(angles)
        self.shape_in = shape_in = image_shape(shape_in)
        if num_bins is None:
            diagonal = math.ceil(math.hypot(*shape_in))
            # Bins that match the columns of pixels at angle 0.
            num_bins = diagonal + (diagonal - shape_in[-1]) % 2
        self.num_bins = num_bins

    def __check_init__(self):
        if jnp.ndim(self.angles) != 1:
            raise ValueError(f"angles must have shape [angle], got {jnp.shape(self.angles)}")
        if len(self.shape_in) != 2:
            raise ValueError(f"shape_in must be [row, col], got {self.shape_in}")
        check_finite("angles", self.angles)
        check_count("num_bins", self.num_bins)

    @property
    def shape_out(self) -> tuple[int, ...]:
        return (self.angles.shape[0], self.num_bins)

    def apply(self, x: Image) -> Data:
        return jax.lax.map(
            lambda angle: self._project(x, angle), self.angles, batch_size=ANGLES_AT_ONCE
        )

    def _project(self, x: Image, angle: Array) -> Data:
        rows, cols = self.shape_in
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        right = jnp.arange(cols) - (cols - 1) / 2
        up = (rows - 1) / 2 - jnp.arange(rows)
        place = right[None] * cos + up[:, None] * sin + (self.num_bins - 1) / 2
        nearest = jnp.round(place)
        # A pixel is at most sqrt(2) wide, so that it reaches no further than the next bins.
        edges = (nearest - place)[..., None] + jnp.array([-1.5, -0.5, 0.5, 1.5])[None, None]
        shares = jnp.diff(_trapezoid_cdf(edges, jnp.abs(cos), jnp.abs(sin)), axis=-1)
        index = nearest.astype(int)[..., None] + jnp.arange(-1, 2)[None, None]
        # A negative index would count from the end.
        index = jnp.where(index < 0, self.num_bins, index)
        values = shares * x[..., None]
        return jnp.zeros(self.num_bins, values.dtype).at[index].add(values, mode="drop")


def _trapezoid_cdf(z: Array, a: Array, b: Array) -> Array:
    """Distribution function at `z` of the sum of uniform variables of widths `a` and `b`."""
    wide, narrow = jnp.maximum(a, b), jnp.minimum(a, b)
    distance = jnp.abs(z)
    left = jnp.clip((wide + narrow) / 2 - distance, 0, narrow)
    # Written as a product of ratios up to 1, which are exact for squares along the axes as well.
    ratio = left / jnp.where(narrow > 0, narrow, 1)
    upper = jnp.where(
        distance < (wide - narrow) / 2, 0.5 + distance / wide, 1 - ratio * left / (2 * wide)
    )
    return jnp.where(z < 0, 1 - upper, upper)


__all__ = ["Radon"]
