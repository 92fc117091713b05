"""From an observation to the vector a network is told: standardisation, then an embedding.

An embedding is any callable pytree from one standardised observation [*x] to a vector; it is
trained with the rest. `SetEncoder` takes a set of observations, as many as its mask says.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, size_of


class Standardise(eqx.Module):
    """`(x - mean) / scale`, feature by feature, with the range seen in training.

    `mean`, `scale`, `low` and `high` are [*x], the latter two standardised. A feature that never
    changed in training has scale 1. Nothing is clipped.
    """

    mean: Float[Array, "*x"]
    scale: Float[Array, "*x"]
    low: Float[Array, "*x"]
    high: Float[Array, "*x"]

    @classmethod
    def fit(cls, x: Float[Array, "n *x"]) -> "Standardise":
        """Of simulations `x` [n, *x]."""
        mean, sd = x.mean(0), x.std(0)
        # The mean of equal numbers is off by rounding, and so is their deviation not quite zero.
        constant = x.max(0) == x.min(0)
        mean, scale = jnp.where(constant, x[0], mean), jnp.where(constant, 1.0, sd)
        return cls(mean, scale, (x.min(0) - mean) / scale, (x.max(0) - mean) / scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Standardised `x` [*x], or a set of them [n, *x]."""
        lead = (None,) * (x.ndim - self.mean.ndim)
        return (x - self.mean[lead]) / self.scale[lead]

    def outside(self, x: Float[Array, "*x"]) -> Bool[Array, "*x"]:
        """Which features lie beyond all of training's, or are not finite."""
        value = self(x)
        return ~((value >= self.low) & (value <= self.high))


class Flat(eqx.Module):
    """The observation itself, flattened: the default embedding."""

    def __call__(self, x: Float[Array, "*x"]) -> Float[Array, " size"]:
        return x.ravel()


class SetEncoder(eqx.Module):
    """A vector of a set of observations, whatever their order and number (Zaheer et al. 2017).

        second([ sum_i m_i first(x_i) / n,  log n ]),       n = sum_i m_i

    for items `x` [max_items, *x] with mask `m` [max_items]: what stands where the mask is False
    does not count. For exchangeable observations a mean of features and their number are enough.

    **Arguments:** `item_shape`, that of one observation; `size` of the vector; `width` and `depth`
    of the two networks' hidden layers.
    """

    takes_sets: ClassVar[bool] = True
    """What `NPSE` asks an embedding: simulations are sets [n, max_items, *x]."""

    item_shape: tuple[int, ...] = eqx.field(static=True)
    first: eqx.nn.MLP
    second: eqx.nn.MLP

    def __init__(
        self,
        item_shape: tuple[int, ...],
        size: int = 32,
        *,
        width: int = 64,
        depth: int = 2,
        key: Key,
    ):
        check_count("size", size)
        check_count("width", width)
        check_count("depth", depth)
        first, second = jax.random.split(key)
        self.item_shape = tuple(item_shape)
        num = size_of(self.item_shape)
        self.first = eqx.nn.MLP(num, width, width, depth, jax.nn.silu, key=first)
        self.second = eqx.nn.MLP(width + 1, size, width, depth, jax.nn.silu, key=second)

    def __call__(
        self, x: Float[Array, "max_items *x"], mask: Bool[Array, " max_items"]
    ) -> Float[Array, " size"]:
        if x.shape[1:] != self.item_shape:
            raise ValueError(f"items must have shape {self.item_shape}, got {x.shape[1:]}")
        # Zero first: what is masked may be NaN, which no product with zero removes.
        blank = jnp.zeros((), x.dtype)
        items = jnp.where(mask[(slice(None), *(None,) * (x.ndim - 1))], x, blank)
        features = jax.vmap(lambda item: self.first(item.ravel()))(items)
        num: Scalar = jnp.sum(mask).astype(x.dtype)
        mean = jnp.sum(jnp.where(mask[:, None], features, blank), 0) / num
        return self.second(jnp.append(mean, jnp.log(num)))


class DrawItems(eqx.Module):
    """A random subset of the items, their number uniform on 1, ..., `max_items`: a mask."""

    def __call__(self, key: Key, mask: Bool[Array, " max_items"]) -> Bool[Array, " max_items"]:
        number, order = jax.random.split(key)
        num = jax.random.randint(number, (), 1, mask.size + 1)
        return jax.random.permutation(order, mask.size) < num
