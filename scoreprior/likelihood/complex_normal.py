"""Complex data in circular Gaussian noise."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes, validate_sample

from scoreprior._typing import Key


class ComplexNormal(dist.Distribution):
    """Circular complex Gaussian: `z = loc + scale (a + i b)`, with `a`, `b` standard normal.

    `scale` is the standard deviation of the real part and of the imaginary part, the convention of
    radio astronomy: `E |z - loc|^2 = 2 scale^2`, and
    `log p(z) = -|z - loc|^2 / (2 scale^2) - log(2 pi scale^2)`, a density over the plane.

    NumPyro has no unconstrained space of complex numbers: a latent one is written as two real.

    **Arguments:** `loc`, complex or real; `scale`, positive, in its units; shapes broadcast.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.complex,
        "scale": constraints.positive,
    }
    support = constraints.complex
    reparametrized_params: ClassVar[list[str]] = ["loc", "scale"]

    def __init__(self, loc: Any = 0.0, scale: Any = 1.0, *, validate_args: bool | None = None):
        loc, scale = jnp.asarray(loc), jnp.asarray(scale)
        if jnp.issubdtype(scale.dtype, jnp.complexfloating):
            raise TypeError(f"scale must be real, got {scale.dtype}")
        self.loc, self.scale = promote_shapes(loc + 0j, scale)
        shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale))
        super().__init__(shape, validate_args=validate_args)

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        assert key is not None
        shape = (*sample_shape, *self.batch_shape)
        # JAX's complex normal has a variance of one in all.
        noise = jax.random.normal(key, shape, self.loc.dtype) * math.sqrt(2)
        return self.loc + self.scale * noise

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        error = (jnp.asarray(value) - self.loc) / self.scale
        square = jnp.real(error) ** 2 + jnp.imag(error) ** 2
        return -square / 2 - math.log(2 * math.pi) - 2 * jnp.log(self.scale)

    @property
    def mean(self) -> Array:
        return jnp.broadcast_to(self.loc, self.batch_shape)

    @property
    def variance(self) -> Array:
        """`E |z - loc|^2 = 2 scale^2`."""
        return jnp.broadcast_to(2 * self.scale**2, self.batch_shape)
