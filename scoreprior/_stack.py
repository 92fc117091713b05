"""Many pytrees of one kind as one, so that a loop over them is a `jax.vmap`."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree


class Stack[Item](eqx.Module):
    """`size` pytrees of one structure, dtypes and shapes.

    Arrays that are the same object in all of them, as the weights of a network that they share, are
    kept once; the others are stacked along a first axis.
    """

    leaves: list[Array]
    is_shared: tuple[bool, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)
    size: int = eqx.field(static=True)

    @classmethod
    def of(cls, items: Sequence[Item]) -> "Stack[Item]":
        """The items, which must be alike: see `group`."""
        columns = list(zip(*(jax.tree.leaves(item) for item in items), strict=True))
        is_shared = tuple(all(leaf is column[0] for leaf in column) for column in columns)
        leaves = [
            column[0] if shared else _stacked(column)
            for column, shared in zip(columns, is_shared, strict=True)
        ]
        return cls(leaves, is_shared, jax.tree.structure(items[0]), len(items))

    @classmethod
    def batched(cls, tree: Item, size: int) -> "Stack[Item]":
        """From one pytree, all of whose arrays have a first axis of `size`."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(leaves, (False,) * len(leaves), structure, size)

    @classmethod
    def group(cls, items: Sequence[Item]) -> list[tuple[tuple[int, ...], "Stack[Item]"]]:
        """Stacks of those that are alike, each with the places of its items in the list."""
        kinds: dict[Hashable, list[int]] = {}
        for index, item in enumerate(items):
            leaves = tuple(
                (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(item)
            )
            kinds.setdefault((jax.tree.structure(item), leaves), []).append(index)
        return [(tuple(kind), cls.of([items[i] for i in kind])) for kind in kinds.values()]

    def __getitem__(self, index: int) -> Item:
        return self._item([leaf[index] for leaf in self._stacked()])

    def items(self) -> list[Item]:
        return [self[index] for index in range(self.size)]

    def map(self, function: Callable[..., Any], *args: PyTree[Array]) -> PyTree[Array]:
        """`function(item, *args)` of every item; `args` and results have a first axis of `size`."""
        if self.size == 1:
            first = jax.tree.map(lambda leaf: leaf[0], args)
            return jax.tree.map(lambda leaf: leaf[None], function(self[0], *first))

        def one(stacked: list[Array], *args: PyTree[Array]) -> PyTree[Array]:
            return function(self._item(stacked), *args)

        return jax.vmap(one)(self._stacked(), *args)

    def take(self, indices: Array | np.ndarray) -> "Stack[Item]":
        """The items at `indices` [m], a stack of `m`."""
        leaves = [
            leaf if shared else leaf[indices]
            for leaf, shared in zip(self.leaves, self.is_shared, strict=True)
        ]
        return Stack(leaves, self.is_shared, self.structure, len(indices))

    def rearrange(self, function: Callable[..., Any], *args: Array) -> "Stack[Any]":
        """The stack of `function(item, *args)`, which may only put arrays in other places."""
        shared: list[Array | None] = []
        structures: list[Any] = []

        def one(stacked: list[Array], *args: Array) -> list[Array]:
            leaves, structure = jax.tree.flatten(function(self._item(stacked), *args))
            own = {id(leaf) for leaf in (*stacked, *args)}
            shared[:] = [None if id(leaf) in own else leaf for leaf in leaves]
            structures[:] = [structure]
            return [leaf for leaf in leaves if id(leaf) in own]

        rest = iter(jax.vmap(one)(self._stacked(), *args))
        leaves = [next(rest) if leaf is None else leaf for leaf in shared]
        return Stack(leaves, tuple(leaf is not None for leaf in shared), structures[0], self.size)

    def _stacked(self) -> list[Array]:
        pairs = zip(self.leaves, self.is_shared, strict=True)
        return [leaf for leaf, shared in pairs if not shared]

    def _item(self, stacked: list[Array]) -> Item:
        rest = iter(stacked)
        pairs = zip(self.leaves, self.is_shared, strict=True)
        leaves = [leaf if shared else next(rest) for leaf, shared in pairs]
        return jax.tree.unflatten(self.structure, leaves)


def _stacked(column: Sequence[Array]) -> Array:
    """`jnp.stack`, whose compilation takes minutes for ten thousand arrays, only where it must."""
    if any(isinstance(leaf, Tracer) for leaf in column):
        return jnp.stack(column)
    return jnp.asarray(np.stack([np.asarray(leaf) for leaf in column]))


__all__ = ["Stack"]
