"""How a network is told the noise level and its context: features, and FiLM."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Key, Scalar


class Fourier(eqx.Module):
    """Sines and cosines of one number: `[sin(w_k t), cos(w_k t)]`, `w_k` geometric in `[1, fastest]`.

    The networks here see `t = log(sigma / scale) / 4`, which spans about two units; `fastest` is
    therefore kept low, so that the network is smooth in the noise level and few solver steps do.
    """

    num_frequencies: int = eqx.field(static=True)
    fastest: float = eqx.field(static=True, default=8.0)

    @property
    def size(self) -> int:
        return 2 * self.num_frequencies

    def __call__(self, t: Scalar) -> Float[Array, " size"]:
        angles = jnp.geomspace(1.0, self.fastest, self.num_frequencies, dtype=t.dtype) * t
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class Condition(eqx.Module):
    """Noise level and optional context vector to one embedding `[size]`, through one hidden layer."""

    features: Fourier
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    context_size: int = eqx.field(static=True)

    def __init__(self, size: int, context_size: int, *, key: Key):
        first, second = jax.random.split(key)
        self.features = Fourier(16)
        self.first = eqx.nn.Linear(self.features.size + context_size, size, key=first)
        self.second = eqx.nn.Linear(size, size, key=second)
        self.context_size = context_size

    def __call__(
        self, log_sigma: Scalar, context: Float[Array, " context_size"] | None
    ) -> Float[Array, " size"]:
        features = self.features(log_sigma)
        if self.context_size:
            if context is None or context.shape != (self.context_size,):
                got = None if context is None else context.shape
                raise ValueError(f"context must have shape ({self.context_size},), got {got}")
            features = jnp.concatenate([features, context])
        elif context is not None:
            raise ValueError("context must be None for a network built with context_size=0")
        return jax.nn.silu(self.second(jax.nn.silu(self.first(features))))


class FiLM(eqx.Module):
    """Feature-wise `h (1 + scale) + shift`, scale and shift linear in the embedding.

    Perez et al., AAAI 2018. `h` is [channels, *space]; zero weights at first, so it starts as the
    identity.
    """

    linear: eqx.nn.Linear

    def __init__(self, embedding_size: int, channels: int, *, key: Key):
        self.linear = zeroed(eqx.nn.Linear(embedding_size, 2 * channels, key=key))

    def __call__(
        self, h: Float[Array, "channels *space"], embedding: Float[Array, " size"]
    ) -> Float[Array, "channels *space"]:
        scale, shift = jnp.split(self.linear(embedding), 2)
        expand = (slice(None), *(None,) * (h.ndim - 1))
        return h * (1 + scale[expand]) + shift[expand]


def zeroed[Layer: eqx.nn.Linear | eqx.nn.Conv](layer: Layer) -> Layer:
    """The layer with weight and bias set to zero."""
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, replace_fn=jnp.zeros_like)
