"""Operators made of others: several side by side, and complex numbers as pairs of real ones."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from scoreprior._util import size_of
from scoreprior.operators.base import AbstractLinearOperator, Data, Image


class Stack(AbstractLinearOperator):
    """The data of several linear operators on one image, flattened and joined, [num].

    `split` takes them apart again. Data are complex where any of them are.

    **Arguments:** the operators.

    Raises `ValueError` where there is none or where they take images of different shapes, or some
    of them complex ones.
    """

    operators: tuple[AbstractLinearOperator, ...]
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, *operators: AbstractLinearOperator):
        shapes = {operator.shape_in for operator in operators}
        if len(shapes) != 1:
            raise ValueError(f"operators of a Stack must take one shape, got {sorted(shapes)}")
        if len({operator.complex_in for operator in operators}) != 1:
            raise ValueError("operators of a Stack must all take complex images, or none of them")
        self.operators = operators
        self.shape_in = operators[0].shape_in

    @property
    def shape_out(self) -> tuple[int, ...]:
        return (sum(size_of(operator.shape_out) for operator in self.operators),)

    @property
    def complex_in(self) -> bool:
        return self.operators[0].complex_in

    def apply(self, x: Image) -> Data:
        return jnp.concatenate([operator.apply(x).ravel() for operator in self.operators])

    def split(self, y: Inexact[Array, " num"]) -> list[Data]:
        """The data of each operator, in its own shape."""
        sizes = [size_of(operator.shape_out) for operator in self.operators]
        parts = jnp.split(y, np.cumsum(sizes)[:-1])
        return [
            part.reshape(operator.shape_out)
            for part, operator in zip(parts, self.operators, strict=True)
        ]


class RealImag(AbstractLinearOperator):
    """The data of a linear operator with complex data, as real and imaginary parts, [2, *y].

    For sites of models that take real data: complex noise with standard deviation `s` in each
    part is `Normal(RealImag(A)(x), s)`.

    **Arguments:** `operator`. `split` makes such data of complex ones.
    """

    operator: AbstractLinearOperator
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, operator: AbstractLinearOperator):
        self.operator, self.shape_in = operator, operator.shape_in

    @property
    def shape_out(self) -> tuple[int, ...]:
        return (2, *self.operator.shape_out)

    @property
    def complex_in(self) -> bool:
        return self.operator.complex_in

    def apply(self, x: Image) -> Data:
        return self.split(self.operator.apply(x))

    @staticmethod
    def split(y: Inexact[Array, "*data"]) -> Inexact[Array, "2 *data"]:
        """Real and imaginary parts [2, *y] of complex data."""
        return jnp.stack([y.real, y.imag])


class ComplexImage(AbstractLinearOperator):
    """A linear operator of complex images, as one of real and imaginary parts, [2, row, col].

    For priors, which are of real arrays, over complex images.

    **Arguments:** `operator`.
    """

    operator: AbstractLinearOperator
    shape_in: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, operator: AbstractLinearOperator):
        self.operator, self.shape_in = operator, (2, *operator.shape_in)

    @property
    def shape_out(self) -> tuple[int, ...]:
        return self.operator.shape_out

    def apply(self, x: Image) -> Data:
        return self.operator.apply(x[0] + 1j * x[1])


__all__ = ["ComplexImage", "RealImag", "Stack"]
