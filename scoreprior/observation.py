"""An event seen in Gaussian noise: all that guidance needs to know of a model."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event
from scoreprior._util import check_finite
from scoreprior.gaussian import Moments


class AbstractObservation(eqx.Module):
    """`y = f(x) + e` with `e ~ N(0, cov_y)`, for one event `x`.

    `data` [*y] is `y`, and `noise` is `N(0, cov_y)` as `Moments`.
    """

    data: eqx.AbstractVar[Float[Array, "*y"]]
    noise: eqx.AbstractVar[Moments]

    @abstractmethod
    def mean(self, x: Event) -> Float[Array, "*y"]:
        """`f(x)`."""


class LinearObservation(AbstractObservation):
    """`y = A x + N(0, cov_y)`, with `A` [m, size] acting on the flattened event.

    **Arguments:** `A`; `data` [m]; `cov_y` [m, m], or `noise`, its `Moments`. Raises `ValueError`
    for shapes that do not fit and for values that are not finite.
    """

    A: Float[Array, "m size"]
    data: Float[Array, " m"]
    noise: Moments

    def __init__(
        self,
        A: Float[Array, "m size"],
        data: Float[Array, " m"],
        cov_y: Float[Array, "m m"] | Moments,
    ):
        self.A, self.data = jnp.asarray(A), jnp.asarray(data)
        if self.A.ndim != 2 or self.data.shape != self.A.shape[:1]:
            raise ValueError(
                f"A must have shape [m, size] and data [m], got {self.A.shape} and "
                f"{self.data.shape}"
            )
        check_finite("A", self.A)
        check_finite("data", self.data)
        noise = cov_y if isinstance(cov_y, Moments) else Moments.dense(0 * self.data, cov_y)
        if noise.event_shape != self.data.shape:
            raise ValueError(
                f"cov_y must be of data of shape {self.data.shape}, got {noise.event_shape}"
            )
        self.noise = noise

    def mean(self, x: Event) -> Float[Array, " m"]:
        return self.A @ x.ravel()


__all__ = ["AbstractObservation", "LinearObservation"]
