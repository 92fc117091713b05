"""A small U-Net over images."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar
from scoreprior._util import check_count
from scoreprior.nn.embed import Condition, Dropout, FiLM, zeroed

Image = Float[Array, "_channels _height _width"]


class ConvBlock(eqx.Module):
    """Residual block: norm, SiLU, 3x3 convolution, FiLM, SiLU, dropout, 3x3 convolution."""

    norm: eqx.nn.GroupNorm
    first: eqx.nn.Conv2d
    film: FiLM
    dropout: Dropout
    second: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d | eqx.nn.Identity

    def __init__(
        self, channels_in: int, channels: int, embedding_size: int, dropout: float, *, key: Key
    ):
        first, film, second, shortcut = jax.random.split(key, 4)
        self.norm = eqx.nn.GroupNorm(_num_groups(channels_in), channels_in)
        self.first = eqx.nn.Conv2d(channels_in, channels, 3, padding=1, key=first)
        self.film = FiLM(embedding_size, channels, key=film)
        self.dropout = Dropout(dropout)
        self.second = eqx.nn.Conv2d(channels, channels, 3, padding=1, key=second)
        same = channels_in == channels
        self.shortcut = (
            eqx.nn.Identity() if same else eqx.nn.Conv2d(channels_in, channels, 1, key=shortcut)
        )

    def __call__(self, h: Image, embedding: Float[Array, " size"]) -> Image:
        inner = self.first(jax.nn.silu(self.norm(h)))
        inner = self.dropout(jax.nn.silu(self.film(inner, embedding)))
        return self.shortcut(h) + self.second(inner)


class UNet(eqx.Module):
    """U-Net `F(x, log_sigma, context)` for images [channels, height, width] or [height, width].

    Channels first. `widths` are the channels at each resolution, halved from one to the next, so
    height and width must be divisible by `2^(len(widths) - 1)`. Each resolution has `num_blocks`
    residual blocks on the way down and on the way up, modulated by the noise level and an optional
    context vector [context_size]. The last layer starts at zero, so the untrained network returns
    zeros. `dropout` acts within the blocks, in training only. After Ronneberger et al. (MICCAI
    2015) and Ho et al. (NeurIPS 2020), without attention.
    """

    event_shape: tuple[int, ...] = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)
    embedding_size: int = eqx.field(static=True)
    context_size: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    condition: Condition
    first: eqx.nn.Conv2d
    down: list[list[ConvBlock]]
    up: list[list[ConvBlock]]
    norm: eqx.nn.GroupNorm
    last: eqx.nn.Conv2d

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        widths: Sequence[int] = (32, 64),
        num_blocks: int = 1,
        embedding_size: int = 64,
        context_size: int = 0,
        dropout: float = 0.0,
        key: Key,
    ):
        _check_shapes(tuple(event_shape), tuple(widths))
        check_count("num_blocks", num_blocks)
        check_count("embedding_size", embedding_size)
        check_count("context_size", context_size, least=0)
        self.event_shape, self.widths = tuple(event_shape), tuple(widths)
        self.num_blocks = num_blocks
        self.embedding_size, self.context_size = embedding_size, context_size
        self.dropout = dropout
        condition, first, last, blocks = jax.random.split(key, 4)
        keys = iter(jax.random.split(blocks, 2 * num_blocks * len(widths)))

        def stack(channels_in: int, channels: int) -> list[ConvBlock]:
            sizes = [channels_in, *[channels] * (num_blocks - 1)]
            return [
                ConvBlock(size, channels, embedding_size, dropout, key=next(keys)) for size in sizes
            ]

        channels = 1 if len(event_shape) == 2 else event_shape[0]
        self.condition = Condition(embedding_size, context_size, key=condition)
        self.first = eqx.nn.Conv2d(channels, widths[0], 3, padding=1, key=first)
        below = [widths[0], *widths[:-1]]
        self.down = [stack(a, b) for a, b in zip(below, widths, strict=True)]
        # On the way up a level receives what comes from below beside what it sent down.
        above = [*widths[1:], widths[-1]]
        self.up = [stack(a + b, b) for a, b in zip(above, widths, strict=True)]
        self.norm = eqx.nn.GroupNorm(_num_groups(widths[0]), widths[0])
        self.last = zeroed(eqx.nn.Conv2d(widths[0], channels, 3, padding=1, key=last))

    def __call__(
        self,
        x: Event,
        log_sigma: Scalar,
        context: Float[Array, " context_size"] | None = None,
    ) -> Event:
        embedding = self.condition(log_sigma, context)
        h = self.first(x.reshape(-1, *x.shape[-2:]))
        sent = []
        for level, blocks in enumerate(self.down):
            h = h if level == 0 else _halve(h)
            h = _through(blocks, h, embedding)
            sent.append(h)
        for level, blocks in reversed(list(enumerate(self.up))):
            h = _through(blocks, jnp.concatenate([h, sent[level]]), embedding)
            h = h if level == 0 else _double(h)
        return self.last(jax.nn.silu(self.norm(h))).reshape(x.shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, `key` apart, as plain JSON; see `nn.from_config`."""
        return {
            "name": "UNet",
            "event_shape": list(self.event_shape),
            "widths": list(self.widths),
            "num_blocks": self.num_blocks,
            "embedding_size": self.embedding_size,
            "context_size": self.context_size,
            "dropout": self.dropout,
        }


def _through(blocks: list[ConvBlock], h: Image, embedding: Float[Array, " size"]) -> Image:
    for block in blocks:
        h = block(h, embedding)
    return h


def _halve(h: Image) -> Image:
    """Means over 2x2 squares."""
    channels, height, width = h.shape
    return h.reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))


def _double(h: Image) -> Image:
    """Each pixel repeated 2x2 times."""
    return jnp.repeat(jnp.repeat(h, 2, 1), 2, 2)


def _num_groups(channels: int) -> int:
    """Groups of at least four channels, eight of them at most."""
    return max(g for g in range(1, 9) if channels % g == 0 and (channels // g >= 4 or g == 1))


def _check_shapes(event_shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
    if len(event_shape) not in (2, 3):
        raise ValueError(
            f"event_shape must be (channels, height, width) or (height, width), got {event_shape}"
        )
    if not widths:
        raise ValueError("widths must name at least one resolution, got ()")
    for width in widths:
        check_count("widths", width)
    factor = 2 ** (len(widths) - 1)
    if any(size % factor for size in event_shape[-2:]):
        raise ValueError(
            f"height and width must be divisible by {factor} for {len(widths)} resolutions, "
            f"got event_shape {event_shape}"
        )
