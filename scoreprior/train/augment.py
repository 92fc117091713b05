"""Random maps of clean events, and of contexts: dequantisation and augmentation."""

from collections.abc import Callable

import equinox as eqx
import jax

from scoreprior._typing import Array, Event, Float, Key
from scoreprior._util import check_count, check_positive


class Dequantise(eqx.Module):
    """`x + U`, `U` uniform on `[0, width)` in each entry.

    Turns counts or grey levels, multiples of `width`, into continuous data whose density bounds
    their probability: `log P(x) >= E log(width^d p(x + U))` (Theis et al., ICLR 2016).
    """

    width: float = 1.0

    def __check_init__(self) -> None:
        check_positive("width", self.width)

    def __call__(self, key: Key, x: Event) -> Event:
        return x + self.width * jax.random.uniform(key, x.shape, x.dtype)


class RandomCrop(eqx.Module):
    """A window of `shape` at a random place of an image [..., row, col], all places as likely.

    Crops of a large image are events of their own law, which is what the prior is of: as
    `fit(..., dequantise=RandomCrop((32, 32)))` images of training and held-out ones are cropped
    afresh at every step. The moments of crops are those of `crops(key, images, num)`, and
    `Fourier()` suits them, for crops have one law wherever they are taken, but for their edges,
    which are not periodic.
    """

    shape: tuple[int, int] = eqx.field(static=True)

    def __check_init__(self) -> None:
        for size in self.shape:
            check_count("shape", size)

    def __call__(self, key: Key, x: Float[Array, "*image"]) -> Event:
        room = [whole - part for whole, part in zip(x.shape[-2:], self.shape, strict=True)]
        if x.ndim < 2 or min(room) < 0:
            raise ValueError(f"shape must fit into images of shape {x.shape}, got {self.shape}")
        keys = jax.random.split(key)
        row, col = (jax.random.randint(k, (), 0, r + 1) for k, r in zip(keys, room, strict=True))
        x = jax.lax.dynamic_slice_in_dim(x, row, self.shape[0], -2)
        return jax.lax.dynamic_slice_in_dim(x, col, self.shape[1], -1)

    def crops(
        self, key: Key, images: Float[Array, "n *image"], num: int
    ) -> Float[Array, "num *event"]:
        """`num` crops, each of an image drawn anew."""
        check_count("num", num)
        which, where = jax.random.split(key)
        index = jax.random.randint(which, (num,), 0, len(images))
        return jax.vmap(lambda i, k: self(k, images[i]))(index, jax.random.split(where, num))


class InSequence(eqx.Module):
    """One random map after another, each with a key of its own."""

    maps: tuple[Callable[[Key, Event], Event], ...]

    def __call__(self, key: Key, x: Float[Array, "*image"]) -> Event:
        for each, k in zip(self.maps, jax.random.split(key, len(self.maps)), strict=True):
            x = each(k, x)
        return x


class Unchanged(eqx.Module):
    """`x` itself, whatever it is."""

    def __call__[Value](self, key: Key, x: Value) -> Value:
        return x
