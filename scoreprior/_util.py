"""Small checks and shapes shared by every rung."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array


def is_traced(value: Any) -> bool:
    """Whether `value` is an abstract value inside a JAX transformation."""
    return isinstance(value, Tracer)


def check_positive(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a positive finite number (traced values pass)."""
    if is_traced(value):
        return
    if not (math.isfinite(float(value)) and float(value) > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_finite(name: str, value: Array) -> None:
    """Raise `ValueError` unless every entry of `value` is finite (traced values pass)."""
    if is_traced(value):
        return
    bad = int(jnp.sum(~jnp.isfinite(value)))
    if bad:
        raise ValueError(
            f"{name} must be finite, got {bad} of {value.size} entries NaN or infinite"
        )


def check_data(name: str, data: Array) -> None:
    """Raise `ValueError` unless `data` holds at least two finite events `[n, *event]`."""
    if data.ndim < 1 or data.shape[0] < 2:
        raise ValueError(
            f"{name} must hold at least two events, shape [n, *event], got {data.shape}"
        )
    check_finite(name, data)


def size_of(shape: Sequence[int]) -> int:
    """Number of entries of an array of this shape."""
    return math.prod(shape)
