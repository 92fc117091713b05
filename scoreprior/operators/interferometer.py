"""A radio interferometer: visibilities of an image of the sky.

Images [row, col] are seen from Earth, north up and east to the left. Pixel (r, c) of an image of
`rows` x `cols` pixels of side `pixel_size` lies at

    l = ((cols - 1) / 2 - c) pixel_size (east),    m = ((rows - 1) / 2 - r) pixel_size (north).
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Scalar
from scoreprior._util import check_finite, check_positive
from scoreprior.operators.base import AbstractLinearOperator, Data, Image
from scoreprior.operators.nonuniform import AbstractTransform, Direct
from scoreprior.operators.pixels import image_shape


class Interferometer(AbstractLinearOperator):
    """Visibilities of an image, complex, [num], in the unit of the image (Jy for Jy per pixel).

        V_j = sum_k I_k exp(-2 pi i (u_j l_k + v_j m_k))

    with the sign of the EHT Collaboration (ApJL 875, L4, 2019), for a small field. Pixels are
    points: no primary beam, no bandwidth or time smearing, and no `w` term. Baselines beyond
    `1 / (2 pixel_size)` wavelengths see the grid of pixels, not the sky.

    **Arguments:** `u`, `v` [num], east and north, in wavelengths; `pixel_size` in radians;
    `shape_in` of an image, [row, col]; `transform`, `Direct()` or `NonUniformFFT()`.

    Raises `ValueError` for `u` and `v` that are not finite or differ in shape, and for a
    `pixel_size` that is not positive.
    """

    u: Float[Array, " num"] = eqx.field(converter=jnp.asarray)
    v: Float[Array, " num"] = eqx.field(converter=jnp.asarray)
    pixel_size: Scalar = eqx.field(converter=jnp.asarray)
    shape_in: tuple[int, ...] = eqx.field(static=True, converter=image_shape)
    transform: AbstractTransform = Direct()

    def __check_init__(self):
        shapes = jnp.shape(self.u), jnp.shape(self.v)
        if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
            raise ValueError(f"u and v must have one shape [num], got {shapes[0]} and {shapes[1]}")
        if len(self.shape_in) != 2:
            raise ValueError(f"shape_in must be [row, col], got {self.shape_in}")
        check_finite("u", self.u)
        check_finite("v", self.v)
        check_positive("pixel_size", self.pixel_size)

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.u.shape

    def apply(self, x: Image) -> Data:
        rows, cols = self.shape_in
        # North and east fall as rows and columns rise.
        frequencies = -self.pixel_size * jnp.stack([self.v, self.u], 1)
        return self.transform(x, frequencies, ((rows - 1) / 2, (cols - 1) / 2))


__all__ = ["Interferometer"]
