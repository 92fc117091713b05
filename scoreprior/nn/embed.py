"""How a network is told the noise level and its context: features, and FiLM.

And what wraps layers or a network: dropout, and computing in a short type.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar


class Fourier(eqx.Module):
    """Sines and cosines `[sin(w_k t), cos(w_k t)]` of a number, `w_k` geometric in `[1, fastest]`.

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
    """Noise level and optional context vector to one embedding [size], by one hidden layer."""

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


class Dropout(eqx.Module):
    """Zeroes each unit with probability `rate` and rescales the others, once it is given a key.

    Without a key it is the identity: a network drops nothing until `with_dropout` arms it, which
    training does for every event and step (Srivastava et al., JMLR 2014).
    """

    rate: float = eqx.field(static=True)
    key: Key | None = None

    def __check_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.rate}")

    def __call__(self, h: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        if self.key is None or self.rate == 0:
            return h
        kept = jax.random.bernoulli(self.key, 1 - self.rate, h.shape)
        return jnp.where(kept, h / (1 - self.rate), 0)


class MixedPrecision(eqx.Module):
    """A network that computes in a short type and keeps its weights in theirs.

    `net(x, log_sigma, context)` with weights, event and context cast to `dtype`, and the output
    cast back to the type of the event. What stands around the network, its preconditioning, the
    loss, the optimiser and the average of the weights, stays in full precision (Micikevicius et
    al., ICLR 2018; `bfloat16` has the range of `float32`, so that no loss is scaled). The noise
    level is cast as well, to a relative precision of 1/256.

    Train `Network(MixedPrecision(net), moments)`, and take `net` out of it afterwards, to save it
    or to compute with it in full precision.
    """

    net: Any
    dtype: Any = eqx.field(static=True, default=jnp.bfloat16)

    def __call__(self, x: Event, log_sigma: Scalar, context: Any = None) -> Event:
        def short(tree: Any) -> Any:
            return jax.tree.map(
                lambda leaf: leaf.astype(self.dtype) if eqx.is_inexact_array(leaf) else leaf, tree
            )

        return short(self.net)(*short((x, log_sigma, context))).astype(x.dtype)


def with_dropout[Tree](key: Key, tree: Tree) -> Tree:
    """The tree with an independent key in each of its `Dropout` layers."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_dropout)
    keys = jax.random.split(key, len(leaves))
    armed = [
        Dropout(leaf.rate, k) if _is_dropout(leaf) else leaf
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, armed)


def _is_dropout(node: object) -> bool:
    return isinstance(node, Dropout)


def zeroed[Layer: eqx.nn.Linear | eqx.nn.Conv](layer: Layer) -> Layer:
    """The layer with weight and bias set to zero."""
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, replace_fn=jnp.zeros_like)
