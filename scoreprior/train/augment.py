"""Random maps of clean events, and of contexts: dequantisation and augmentation."""

import equinox as eqx
import jax

from scoreprior._typing import Event, Key
from scoreprior._util import check_positive


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


class Unchanged(eqx.Module):
    """`x` itself, whatever it is."""

    def __call__[Value](self, key: Key, x: Value) -> Value:
        return x
