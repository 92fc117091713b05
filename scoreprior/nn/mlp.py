"""A residual multilayer perceptron over flattened events."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar
from scoreprior._util import check_count, size_of
from scoreprior.nn.embed import Condition, Dropout, FiLM, zeroed


class MLPBlock(eqx.Module):
    """`h + W2 dropout(silu(FiLM(W1 norm(h))))`."""

    norm: eqx.nn.LayerNorm
    first: eqx.nn.Linear
    film: FiLM
    dropout: Dropout
    second: eqx.nn.Linear

    def __init__(self, width: int, embedding_size: int, dropout: float, *, key: Key):
        first, film, second = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(width)
        self.first = eqx.nn.Linear(width, width, key=first)
        self.film = FiLM(embedding_size, width, key=film)
        self.dropout = Dropout(dropout)
        self.second = eqx.nn.Linear(width, width, key=second)

    def __call__(
        self, h: Float[Array, " width"], embedding: Float[Array, " size"]
    ) -> Float[Array, " width"]:
        inner = jax.nn.silu(self.film(self.first(self.norm(h)), embedding))
        return h + self.second(self.dropout(inner))


class ResidualMLP(eqx.Module):
    """Residual perceptron `F(x, log_sigma, context)` for events of any shape.

    `num_blocks` pre-norm residual blocks of `width` units over the flattened event, each modulated
    by the noise level and an optional context vector [context_size]. With `joins_context` the first
    layer sees the context too, beside the event: for contexts that say precisely where the event
    must be. The last layer starts at zero, so the untrained network returns zeros. `dropout` acts
    within the blocks, in training only.
    """

    event_shape: tuple[int, ...] = eqx.field(static=True)
    width: int = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)
    embedding_size: int = eqx.field(static=True)
    context_size: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    joins_context: bool = eqx.field(static=True)
    condition: Condition
    first: eqx.nn.Linear
    blocks: list[MLPBlock]
    last: eqx.nn.Linear

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        width: int = 256,
        num_blocks: int = 2,
        embedding_size: int = 64,
        context_size: int = 0,
        dropout: float = 0.0,
        joins_context: bool = False,
        key: Key,
    ):
        check_count("width", width)
        check_count("num_blocks", num_blocks)
        check_count("embedding_size", embedding_size)
        check_count("context_size", context_size, least=0)
        self.event_shape = tuple(event_shape)
        self.width, self.num_blocks = width, num_blocks
        self.embedding_size, self.context_size = embedding_size, context_size
        self.dropout, self.joins_context = dropout, joins_context
        condition, first, last, *blocks = jax.random.split(key, 3 + num_blocks)
        size = size_of(self.event_shape)
        self.condition = Condition(embedding_size, context_size, key=condition)
        joined = context_size if joins_context else 0
        self.first = eqx.nn.Linear(size + joined, width, key=first)
        self.blocks = [MLPBlock(width, embedding_size, dropout, key=k) for k in blocks]
        self.last = zeroed(eqx.nn.Linear(width, size, key=last))

    def __call__(
        self,
        x: Event,
        log_sigma: Scalar,
        context: Float[Array, " context_size"] | None = None,
    ) -> Event:
        embedding = self.condition(log_sigma, context)
        joined = [context] if self.joins_context and context is not None else []
        h = self.first(jnp.concatenate([x.ravel(), *joined]))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(jax.nn.silu(h)).reshape(x.shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, `key` apart, as plain JSON; see `nn.from_config`."""
        return {
            "name": "ResidualMLP",
            "event_shape": list(self.event_shape),
            "width": self.width,
            "num_blocks": self.num_blocks,
            "embedding_size": self.embedding_size,
            "context_size": self.context_size,
            "dropout": self.dropout,
            "joins_context": self.joins_context,
        }
