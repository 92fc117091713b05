"""`Measurements`: many events, each seen once through a linear operator of its own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from scoreprior._typing import Event
from scoreprior.gaussian import Moments
from scoreprior.observation import AbstractObservation

Operator = Callable[[Event, Any], Array]
"""`A(x, context)`, linear in the event `x`."""


def identity(x: Event, context: Any) -> Event:
    """The event itself."""
    return x


class Measurement(AbstractObservation):
    """`y = P A(x, context) + N(0, variance)`, `P` zero where nothing is present.

    An absent entry is a zero seen through an operator that is zero, and so says nothing.
    """

    data: Float[Array, "*y"]
    noise: Moments
    present: Bool[Array, "*y"]
    context: Any
    operator: Operator

    def mean(self, x: Event) -> Float[Array, "*y"]:
        return jnp.where(self.present, self.operator(x, self.context), 0)

    def chi_squared(self, x: Event) -> Float[Array, ""]:
        """`sum (y - A x)^2 / variance` over the entries that are present."""
        return jnp.sum((self.data - self.mean(x)) ** 2 / self.noise.eigenvalues)


class Measurements(eqx.Module):
    """`y_i = P_i A(x_i, c_i) + N(0, diag(v_i))` for `i = 1, ..., n`: one measurement per event.

    Noise that is correlated is whitened first: `L^-1 y` and `L^-1 A`, for `cov = L L'`.

    **Arguments:** `data` [n, *y]; `variance` `v` of its noise, a number or broadcast to `data`;
    `operator(x, context)`, linear in one event, by default the event itself; `context`, a pytree
    with leaves [n, ...], what the operator needs to know of each measurement; `present`, booleans
    broadcast to `data`: entries that were measured, all by default. The others may hold anything,
    NaN too. `event_shape`, by default that of one measurement.

    **Errors:** `ValueError` for shapes that do not fit, a variance that is not positive, data that
    are present and not finite, and an operator that is not linear.
    """

    data: Float[Array, "n *y"]
    variance: Float[Array, "n *y"]
    present: Bool[Array, "n *y"]
    context: PyTree[Array]
    operator: Operator
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        data: Float[Array, "n ..."] | np.ndarray,
        variance: float | Float[Array, "..."] | np.ndarray,
        *,
        operator: Operator = identity,
        context: PyTree[Array] = None,
        present: Bool[Array, "..."] | np.ndarray | None = None,
        event_shape: tuple[int, ...] | None = None,
    ):
        data = jnp.asarray(data)
        if data.ndim < 2 or len(data) < 2:
            raise ValueError(
                f"data must hold at least two measurements, shape [n, *y], got {data.shape}"
            )
        shape = data.shape
        self.present = _broadcast("present", True if present is None else present, shape)
        self.variance = _broadcast("variance", variance, shape).astype(data.dtype)
        if not bool(jnp.all(jnp.isfinite(self.variance) & (self.variance > 0))):
            raise ValueError(
                "variance must be positive and finite, got values from "
                f"{float(jnp.min(self.variance)):g} to {float(jnp.max(self.variance)):g}"
            )
        bad = int(jnp.sum(self.present & ~jnp.isfinite(data)))
        if bad:
            raise ValueError(
                f"data must be finite where they are present, got {bad} of {data.size} entries NaN "
                "or infinite; say by present which were measured"
            )
        self.data = jnp.where(self.present, data, 0)
        for leaf in jax.tree.leaves(context):
            if jnp.shape(leaf)[:1] != shape[:1]:
                raise ValueError(
                    f"context must have one entry per measurement, leading size {shape[0]}, got "
                    f"shape {jnp.shape(leaf)}"
                )
        self.context = jax.tree.map(jnp.asarray, context)
        self.operator = operator
        self.event_shape = shape[1:] if event_shape is None else tuple(event_shape)
        self._check_operator()

    def __len__(self) -> int:
        return len(self.data)

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def observation(self, i: int | Int[Array, ""]) -> Measurement:
        """Measurement `i`, for guidance."""
        variance = self.variance[i]
        return Measurement(
            data=self.data[i],
            noise=Moments(jnp.zeros_like(variance), variance),
            present=self.present[i],
            context=jax.tree.map(lambda leaf: leaf[i], self.context),
            operator=self.operator,
        )

    def _check_operator(self) -> None:
        first, shape = self.observation(0), self.data.shape[1:]
        key_x, key_z = jax.random.split(jax.random.key(0))
        x = jax.random.normal(key_x, self.event_shape, self.dtype)
        z = jax.random.normal(key_z, self.event_shape, self.dtype)
        try:
            image = first.operator(x, first.context)
        except Exception as error:
            raise ValueError(
                f"operator must accept events of event_shape {self.event_shape}; it fails: {error}"
            ) from error
        if jnp.shape(image) != shape:
            raise ValueError(
                f"operator must make data of shape {shape} of events of event_shape "
                f"{self.event_shape}, got {jnp.shape(image)}"
            )
        other = first.operator(z, first.context)
        both = first.operator(2 * x - 3 * z, first.context)
        error = float(jnp.max(jnp.abs(both - 2 * image + 3 * other)))
        size = float(jnp.max(jnp.abs(image)) + jnp.max(jnp.abs(other)))
        if not error <= 1e3 * float(jnp.finfo(self.dtype).eps) * size:
            raise ValueError(
                "operator must be linear in the event, got A(2x - 3z) off 2 A(x) - 3 A(z) by "
                f"{error:g}"
            )


def _broadcast(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    value = jnp.asarray(value)
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to data {shape}, got {value.shape}") from None
