"""Steps of an optax optimiser that never leave the finite numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from scoreprior._run import fingerprint
from scoreprior._typing import PyTree, Scalar

LEARNING_RATE = 0.02


class FitState(NamedTuple):
    """What the next step needs."""

    params: PyTree[Any]
    optimizer: Any


def describe(module: Any) -> str:
    """A module of plain settings with all of them, defaults included."""
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(module).items())
    return f"{type(module).__name__}({settings})"


def check_optimizer(optimizer: Any) -> None:
    """Raise `TypeError` unless `optimizer` is an optax transformation or `None`."""
    if optimizer is not None and not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"optimizer must be an optax transformation such as optax.adam(0.01), got {optimizer!r}"
        )


def or_default(
    optimizer: optax.GradientTransformation | None, num_steps: int
) -> optax.GradientTransformation:
    """`optimizer`, or Adam with a learning rate that falls from 0.02 to zero along a cosine."""
    if optimizer is not None:
        return optimizer
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))


def identify(optimizer: optax.GradientTransformation, state: FitState) -> list[str]:
    """What tells an optimiser from another: the structure of its state and its first step."""
    ones = jax.tree.map(jnp.ones_like, state.params)
    first, _ = optimizer.update(ones, state.optimizer, state.params)
    return [str(jax.tree.structure(state.optimizer)), fingerprint(first)]


def step(
    optimizer: optax.GradientTransformation,
    loss: Callable[[PyTree[Any]], tuple[Scalar, Any]],
    state: FitState,
) -> tuple[FitState, Any, Bool[Array, ""]]:
    """One step down `loss(params) -> (value, aux)`; also `aux`, and whether all was finite.

    The state stays as it is where the value or its gradient is not finite.
    """
    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient))]
    is_finite = jnp.stack(finite).all()
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    new = FitState(optax.apply_updates(state.params, updates), inner)
    new = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state)
    return new, aux, is_finite


def repeat(
    advance: Callable[[FitState, Array], tuple[FitState, PyTree[Array]]],
    state: FitState,
    start: Array,
    count: Array,
    num_rows: int,
) -> tuple[FitState, PyTree[Array]]:
    """`count` times `advance(state, step) -> (state, row)`; rows are `num_rows`, the rest zero."""
    row = jax.eval_shape(advance, state, start)[1]
    rows = jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape), leaf.dtype), row)

    def body(i: Array, carry: Any) -> Any:
        state, rows = carry
        state, row = advance(state, start + i)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)

    return jax.lax.fori_loop(0, count, body, (state, rows))
