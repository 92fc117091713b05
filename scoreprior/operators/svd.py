"""Singular value decompositions of linear operators: dense, of a filter, of orthogonal rows.

`A = U diag(s) V*`, with orthonormal columns of `U` (data) and `V` (images). Coefficients are real
arrays of the shape of `s`, complex ones where images are complex.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

Coefficients = Inexact[Array, "*coefficients"]


class AbstractSVD(eqx.Module):
    """`A = U diag(s) V*`, with `s` in `singular_values`, in no particular order."""

    @property
    @abstractmethod
    def singular_values(self) -> Float[Array, "*coefficients"]:
        """`s`, non-negative."""

    @abstractmethod
    def analyse(self, x: Inexact[Array, "*image"]) -> Coefficients:
        """Coefficients `V* x` of an image."""

    @abstractmethod
    def synthesise(self, coefficients: Coefficients) -> Inexact[Array, "*image"]:
        """The image `V c` with these coefficients."""

    @abstractmethod
    def analyse_data(self, y: Inexact[Array, "*data"]) -> Coefficients:
        """Coefficients `U* y` of data."""

    @abstractmethod
    def synthesise_data(self, coefficients: Coefficients) -> Inexact[Array, "*data"]:
        """The data `U c` with these coefficients."""

    def pinv(self, y: Inexact[Array, "*data"], *, cutoff: float) -> Inexact[Array, "*image"]:
        """The image of least norm among those that fit `y` best in least squares.

        Singular values up to `cutoff` times the largest, with `0 <= cutoff < 1`, count as zero.
        """
        if not 0 <= cutoff < 1:
            raise ValueError(f"cutoff must be in [0, 1), got {cutoff}")
        s = self.singular_values
        kept = s > cutoff * jnp.max(s)
        inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
        return self.synthesise(inverse * self.analyse_data(y))


class DenseSVD(AbstractSVD):
    """SVD of a matrix on flattened arrays; made by `DenseSVD.of`.

    `u` [m, rank], `s` [rank], `vh` [rank, n]. With `stacked`, data are complex and images real:
    rows of `u` are the real parts of the data and then the imaginary ones.
    """

    u: Inexact[Array, "m rank"]
    s: Float[Array, " rank"]
    vh: Inexact[Array, "rank n"]
    shape_in: tuple[int, ...] = eqx.field(static=True)
    shape_out: tuple[int, ...] = eqx.field(static=True)
    stacked: bool = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        matrix: Inexact[Array, "m n"],
        shape_in: tuple[int, ...],
        shape_out: tuple[int, ...],
        complex_in: bool = False,
    ) -> "DenseSVD":
        """Decompose the `matrix` of an operator from real images, or complex ones."""
        stacked = jnp.iscomplexobj(matrix) and not complex_in
        rows = jnp.concatenate([matrix.real, matrix.imag]) if stacked else matrix
        u, s, vh = jnp.linalg.svd(rows, full_matrices=False)
        return cls(u, s, vh, shape_in, shape_out, stacked)

    @property
    def singular_values(self) -> Float[Array, "*coefficients"]:
        return self.s

    def analyse(self, x: Inexact[Array, "*image"]) -> Coefficients:
        return self.vh @ x.ravel()

    def synthesise(self, coefficients: Coefficients) -> Inexact[Array, "*image"]:
        return (self.vh.conj().T @ coefficients).reshape(self.shape_in)

    def analyse_data(self, y: Inexact[Array, "*data"]) -> Coefficients:
        flat = y.ravel()
        rows = jnp.concatenate([flat.real, flat.imag]) if self.stacked else flat
        return self.u.conj().T @ rows

    def synthesise_data(self, coefficients: Coefficients) -> Inexact[Array, "*data"]:
        rows = self.u @ coefficients
        if self.stacked:
            real, imaginary = jnp.split(rows, 2)
            rows = real + 1j * imaginary
        return rows.reshape(self.shape_out)


class OrthogonalRows(AbstractSVD):
    """SVD of an operator with `A A* = scale^2 I`: `U` is the identity.

    Every singular value is `scale`.
    """

    operator: Any  # an AbstractLinearOperator
    scale: float = eqx.field(static=True)

    @property
    def singular_values(self) -> Float[Array, "*coefficients"]:
        return jnp.full(self.operator.shape_out, self.scale)

    def analyse(self, x: Inexact[Array, "*image"]) -> Coefficients:
        return self.operator(x) / self.scale

    def synthesise(self, coefficients: Coefficients) -> Inexact[Array, "*image"]:
        return self.operator.adjoint(coefficients) / self.scale

    def analyse_data(self, y: Inexact[Array, "*data"]) -> Coefficients:
        return y

    def synthesise_data(self, coefficients: Coefficients) -> Inexact[Array, "*data"]:
        return coefficients


class FilterSVD(AbstractSVD):
    """SVD of a periodic filter of real images, `A = F^-1 diag(T) F` along the last two axes.

    `V` is the discrete Hartley transform, real and orthonormal, `s = |T|`, and `U` is `V` after
    the all-pass filter `T / |T|`. `transfer` [row, col] is that of a real kernel, `T(-k) =
    conj(T(k))`; images have shape `shape`, [..., row, col].
    """

    transfer: Inexact[Array, "row col"]
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def singular_values(self) -> Float[Array, "*coefficients"]:
        return jnp.broadcast_to(jnp.abs(self.transfer), self.shape)

    def analyse(self, x: Inexact[Array, "*image"]) -> Coefficients:
        transformed = jnp.fft.fft2(x, norm="ortho")
        return transformed.real - transformed.imag

    def synthesise(self, coefficients: Coefficients) -> Inexact[Array, "*image"]:
        return self.analyse(coefficients)

    def analyse_data(self, y: Inexact[Array, "*data"]) -> Coefficients:
        return self.analyse(self._turn(y, self._phase().conj()))

    def synthesise_data(self, coefficients: Coefficients) -> Inexact[Array, "*data"]:
        return self._turn(self.analyse(coefficients), self._phase())

    def _phase(self) -> Array:
        size = jnp.abs(self.transfer)
        # Where the filter lets nothing through, any phase will do.
        return jnp.where(size > 0, self.transfer / jnp.where(size > 0, size, 1), 1)

    def _turn(self, x: Array, phase: Array) -> Array:
        return jnp.fft.ifft2(jnp.fft.fft2(x) * jnp.broadcast_to(phase, x.shape)).real


__all__ = ["AbstractSVD", "DenseSVD", "FilterSVD", "OrthogonalRows"]
