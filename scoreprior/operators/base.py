"""What an operator is: a map from one image to data, and products of such maps.

An *image* is a float or complex array of shape `shape_in`, [row, col] unless a class says
otherwise; *data* have shape `shape_out` and are real or complex. Data spaces carry the real inner
product `<a, b> = Re sum conj(a) b`, so that a map from real images to complex data has an adjoint
that returns real images.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from scoreprior._util import size_of
from scoreprior.operators.svd import AbstractSVD, DenseSVD

Image = Inexact[Array, "*image"]
"""One image, real or complex."""

Data = Inexact[Array, "*data"]
"""The data of one image, real or complex."""

MAX_ENTRIES = 2**24
"""The largest matrix that `materialise` forms unless told otherwise: 128 MB in double precision."""


class AbstractOperator(eqx.Module):
    """A map from one image of shape `shape_in` to data of shape `shape_out`.

    `operator(x)` raises `ValueError` for another shape, and `TypeError` for integers. `A @ B` is
    the operator that applies `B` first.
    """

    shape_in: eqx.AbstractVar[tuple[int, ...]]

    @property
    @abstractmethod
    def shape_out(self) -> tuple[int, ...]:
        """Shape of the data."""

    @abstractmethod
    def apply(self, x: Image) -> Data:
        """Data of an image that has the right shape."""

    def __call__(self, x: Image) -> Data:
        return self.apply(_checked("an image", self, x, self.shape_in))

    def __matmul__(self, other: "AbstractOperator") -> "AbstractOperator":
        if isinstance(self, AbstractLinearOperator) and isinstance(other, AbstractLinearOperator):
            return LinearProduct(self, other)
        return Product(self, other)


class AbstractLinearOperator(AbstractOperator):
    """A linear operator, which has an adjoint, a matrix and a singular value decomposition."""

    @property
    def complex_in(self) -> bool:
        """Whether images are complex."""
        return False

    def adjoint(self, y: Data) -> Image:
        """`A* y`, with `Re sum conj(y) A x = Re sum conj(A* y) x` for every image `x`.

        A real image where images are real, although data be complex. Where real images have real
        data, complex `y` gives a complex image, one for each part.
        """
        y = _checked("data", self, y, self.shape_out, verb="adjoint takes")
        image = jax.ShapeDtypeStruct(self.shape_in, jnp.finfo(y.dtype).dtype)
        data = jax.eval_shape(self.apply, image)
        both_parts = jnp.iscomplexobj(y) and not _is_complex(data.dtype)
        if self.complex_in or both_parts:
            image = jax.ShapeDtypeStruct(self.shape_in, jnp.result_type(image.dtype, 1j))
            data = jax.eval_shape(self.apply, image)
        # JAX transposes with respect to Re sum a b, without the conjugate.
        (x,) = jax.linear_transpose(self.apply, image)(y.conj().astype(data.dtype))
        return x.conj()

    def materialise(self, *, max_entries: int = MAX_ENTRIES) -> Inexact[Array, "m n"]:
        """The matrix [size of data, size of image] on flattened arrays.

        Raises `ValueError` where it has more than `max_entries` entries.
        """
        m, n = size_of(self.shape_out), size_of(self.shape_in)
        if m * n > max_entries:
            raise ValueError(
                f"the matrix of {type(self).__name__} must have at most max_entries = "
                f"{max_entries} entries, got {m} x {n} = {m * n}"
            )
        columns = jax.vmap(self.apply)(jnp.eye(n).reshape(n, *self.shape_in))
        return columns.reshape(n, m).T

    def svd(self) -> AbstractSVD:
        """Singular value decomposition; dense, by `materialise`, unless a class knows its own."""
        return DenseSVD.of(self.materialise(), self.shape_in, self.shape_out, self.complex_in)


class Product(AbstractOperator):
    """`outer(inner(x))`, made by `outer @ inner`."""

    outer: AbstractOperator
    inner: AbstractOperator
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, outer: AbstractOperator, inner: AbstractOperator):
        _check_fit(outer, inner)
        self.outer, self.inner, self.shape_in = outer, inner, inner.shape_in

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.outer.shape_out

    def apply(self, x: Image) -> Data:
        return self.outer.apply(self.inner.apply(x))


class LinearProduct(AbstractLinearOperator):
    """`outer(inner(x))` of two linear operators, made by `outer @ inner`."""

    outer: AbstractLinearOperator
    inner: AbstractLinearOperator
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, outer: AbstractLinearOperator, inner: AbstractLinearOperator):
        _check_fit(outer, inner)
        self.outer, self.inner, self.shape_in = outer, inner, inner.shape_in

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.outer.shape_out

    @property
    def complex_in(self) -> bool:
        return self.inner.complex_in

    def apply(self, x: Image) -> Data:
        return self.outer.apply(self.inner.apply(x))


def _check_fit(outer: AbstractOperator, inner: AbstractOperator) -> None:
    if outer.shape_in != inner.shape_out:
        raise ValueError(
            f"{type(outer).__name__} @ {type(inner).__name__}: the left takes shape "
            f"{outer.shape_in}, and the right gives {inner.shape_out}"
        )


def _checked(
    noun: str, operator: AbstractOperator, x: Any, shape: tuple[int, ...], verb: str = "takes"
) -> Array:
    x = jnp.asarray(x)
    if x.shape != shape:
        raise ValueError(
            f"{type(operator).__name__} {verb} {noun} of shape {shape}, got {x.shape}; "
            "an operator acts on one image: use jax.vmap for several"
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{type(operator).__name__} {verb} {noun} of floats or complex numbers, got {x.dtype}"
        )
    return x


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


__all__ = [
    "AbstractLinearOperator",
    "AbstractOperator",
    "Data",
    "Image",
    "LinearProduct",
    "Product",
]
