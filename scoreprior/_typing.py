"""Types used throughout: one event, one noise level, one key."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Event = Float[Array, "*event"]
"""One data point, of any rank."""

Scalar = Float[Array, ""]
"""One number, possibly traced."""

Sigma = float | Float[Array, ""]
"""A noise level: the standard deviation of the noise added to clean data, in data units."""

Key = PRNGKeyArray
"""One JAX random key, consumed by the callee."""

Context = PyTree[Any] | None
"""What a conditional denoiser is conditioned on."""

Field = Callable[[Any, Any], Any]
"""The right-hand side `f(sigma, y)` of `dy/dsigma = f(sigma, y)`."""

__all__ = ["Array", "Context", "Event", "Field", "Float", "Key", "PyTree", "Scalar", "Sigma"]
