"""A training run: what changes (`State`), what does not (`Run`), and how it advances."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from scoreprior._typing import Event, Key, Scalar
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.nn.embed import with_dropout
from scoreprior.train.loss import AbstractLoss

Transform = Callable[[Key, Event], Event]
"""A random map of one clean event, `transform(key, x)`."""

ContextTransform = Callable[[Key, Any], Any]
"""A random map of the context of one event, `transform(key, context)`."""

# Beyond the counters of every `split`, so that these draws are independent of all others.
_CONTEXT_STREAM = 2**31


class State(NamedTuple):
    """Everything a run carries from one step to the next."""

    step: Int[Array, ""]
    params: PyTree[Array]
    average: PyTree[Array]  # exponential moving average of params
    optimiser: PyTree[Array]
    best: PyTree[Array]  # average at the lowest held-out loss
    best_loss: Scalar
    best_step: Int[Array, ""]
    train_losses: Float[Array, " num_evaluations"]  # NaN where not yet reached
    held_out_losses: Float[Array, " num_evaluations"]


class Data(NamedTuple):
    """Events with their contexts."""

    x: Float[Array, "n *event"]
    context: PyTree[Array]  # leaves [n, ...], or None


class Run(eqx.Module):
    """What stays fixed while training."""

    denoiser: AbstractDenoiser
    where: Callable[[AbstractDenoiser], Any] = eqx.field(static=True)
    loss: AbstractLoss
    optimiser: optax.GradientTransformation = eqx.field(static=True)
    data: Data
    held_out: Data | None
    key: Key
    dequantise: Transform
    augment: Transform
    augment_context: ContextTransform
    batch_size: int = eqx.field(static=True)
    averaging: float = eqx.field(static=True)
    num_held_out_draws: int = eqx.field(static=True)

    def params(self) -> PyTree[Array]:
        """The weights that are trained, as they are before training."""
        return eqx.filter(self.where(self.denoiser), eqx.is_inexact_array)

    def build(self, params: PyTree[Array]) -> AbstractDenoiser:
        """The denoiser with these weights."""
        fixed = eqx.filter(self.where(self.denoiser), eqx.is_inexact_array, inverse=True)
        return eqx.tree_at(self.where, self.denoiser, eqx.combine(params, fixed))

    def start(self, num_evaluations: int) -> State:
        """The state before the first step."""
        params = jax.tree.map(jnp.asarray, self.params())
        blank = jnp.full(num_evaluations, jnp.nan)
        infinity, zero = jnp.asarray(jnp.inf, blank.dtype), jnp.asarray(0)
        optimiser = jax.tree.map(jnp.asarray, self.optimiser.init(params))
        return State(zero, params, params, optimiser, params, infinity, zero, blank, blank)


@eqx.filter_jit
def advance(run: Run, state: State, num_steps: int, evaluation: Int[Array, ""]) -> State:
    """Take `num_steps` steps, then evaluate; results go to entry `evaluation` of the history."""
    state, losses = jax.lax.scan(lambda s, _: _step(run, s), state, length=num_steps)
    train_loss = jnp.mean(losses).astype(state.train_losses.dtype)
    state = state._replace(train_losses=state.train_losses.at[evaluation].set(train_loss))
    if run.held_out is None:
        return state._replace(best=state.average, best_step=state.step)
    loss = jnp.mean(held_out_losses(run, state.average)).astype(state.best_loss.dtype)
    better = loss < state.best_loss
    return state._replace(
        held_out_losses=state.held_out_losses.at[evaluation].set(loss),
        best=jax.tree.map(lambda a, b: jnp.where(better, a, b), state.average, state.best),
        best_loss=jnp.where(better, loss, state.best_loss),
        best_step=jnp.where(better, state.step, state.best_step),
    )


def _step(run: Run, state: State) -> tuple[State, Scalar]:
    """One optimiser step. All randomness comes from the run's key and the step's number."""
    index_key, level_key, event_key = jax.random.split(jax.random.fold_in(run.key, state.step), 3)
    index = jax.random.randint(index_key, (run.batch_size,), 0, run.data.x.shape[0])
    batch = jax.tree.map(lambda leaf: leaf[index], run.data)
    u = _stratified(level_key, run.batch_size, batch.x.dtype)
    keys = jax.random.split(event_key, run.batch_size)

    def mean_loss(params: PyTree[Array]) -> Scalar:
        denoiser = run.build(params)

        def one(x: Event, context: Any, u: Scalar, key: Key) -> Scalar:
            dequantise, augment, drop, noise = jax.random.split(key, 4)
            x = run.dequantise(dequantise, run.augment(augment, x))
            context = _augmented(run, key, context)
            return run.loss(with_dropout(drop, denoiser), x, u, context, key=noise)

        return jnp.mean(jax.vmap(one)(batch.x, batch.context, u, keys))

    loss, gradient = jax.value_and_grad(mean_loss)(state.params)
    updates, optimiser = run.optimiser.update(gradient, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    # A young average forgets faster, so that it does not remember the initial weights.
    decay = jnp.minimum(run.averaging, step / (step + 10))
    average = jax.tree.map(
        lambda a, p: a + (1 - decay).astype(p.dtype) * (p - a), state.average, params
    )
    state = state._replace(step=step, params=params, average=average, optimiser=optimiser)
    return state, loss


def _augmented(run: Run, key: Key, context: Any) -> Any:
    """The context of one event, drawn anew with a key of its own."""
    return run.augment_context(jax.random.fold_in(key, _CONTEXT_STREAM), context)


@eqx.filter_jit
def held_out_losses(run: Run, params: PyTree[Array]) -> Float[Array, " m"]:
    """The loss of every held-out event, with the same draws at every call."""
    if run.held_out is None:
        raise ValueError("held_out must be given to compute a held-out loss")
    denoiser = run.build(params)
    num = run.held_out.x.shape[0]

    def one(event: tuple[Data, Key]) -> Scalar:
        (x, context), key = event
        level_key, *keys = jax.random.split(key, 1 + run.num_held_out_draws)
        levels = _stratified(level_key, run.num_held_out_draws, x.dtype)

        def draw(u: Scalar, key: Key) -> Scalar:
            dequantise, noise = jax.random.split(key)
            given = _augmented(run, key, context)
            return run.loss(denoiser, run.dequantise(dequantise, x), u, given, key=noise)

        return jnp.mean(jax.vmap(draw)(levels, jnp.stack(keys)))

    # No step has a negative number, so these draws are independent of the training's.
    keys = jax.random.split(jax.random.fold_in(run.key, jnp.uint32(2**32 - 1)), num)
    return jax.lax.map(one, (run.held_out, keys), batch_size=min(num, run.batch_size))


def _stratified(key: Key, num: int, dtype: Any) -> Float[Array, " num"]:
    """One uniform number in each of `num` equal parts of (0, 1)."""
    inner = jax.random.uniform(key, (num,), dtype, minval=1e-3, maxval=1 - 1e-3)
    return (jnp.arange(num, dtype=dtype) + inner) / num
