"""The network of `sbi.NPSE`, a `nn.ResidualMLP` that is told the data, in Flax, for gensbi."""

from typing import Any

import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """`h + W2 dropout(silu(FiLM(W1 norm(h))))`, as `nn.mlp.MLPBlock`."""

    def __init__(self, width: int, embedding_size: int, dropout: float, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.first = nnx.Linear(width, width, rngs=rngs)
        self.film = nnx.Linear(embedding_size, 2 * width, kernel_init=zeros, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, h: Any, embedding: Any) -> Any:
        scale, shift = jnp.split(self.film(embedding), 2, -1)
        inner = nnx.silu(self.first(self.norm(h)) * (1 + scale) + shift)
        return h + self.second(self.dropout(inner))


class ResidualMLP(nnx.Module):
    """`F(obs, t, cond)`, arrays [n, size, 1]; what has one row in place of n is computed once."""

    def __init__(
        self,
        size: int,
        context_size: int,
        width: int = 128,
        num_blocks: int = 3,
        embedding_size: int = 64,
        dropout: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ):
        zeros = nnx.initializers.zeros_init()
        self.told = nnx.Linear(32 + context_size, embedding_size, rngs=rngs)
        self.embed = nnx.Linear(embedding_size, embedding_size, rngs=rngs)
        self.first = nnx.Linear(size + context_size, width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, embedding_size, dropout, rngs=rngs) for _ in range(num_blocks)]
        )
        self.last = nnx.Linear(width, size, kernel_init=zeros, rngs=rngs)

    def __call__(self, obs: Any, t: Any, cond: Any, **_: Any) -> Any:
        x, c = obs[..., 0], cond[..., 0]
        angles = jnp.geomspace(1.0, 8.0, 16) * t.reshape(-1, 1)
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        told = jnp.concatenate([features, jnp.broadcast_to(c, (len(features), c.shape[1]))], -1)
        embedding = nnx.silu(self.embed(nnx.silu(self.told(told))))
        beside = jnp.broadcast_to(c, (len(x), c.shape[1]))
        h = self.first(jnp.concatenate([x, beside], -1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(nnx.silu(h))[..., None]
