"""Training a denoiser: the loop around `state.advance`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree
from tqdm.auto import tqdm

from scoreprior._typing import Key
from scoreprior._util import check_count, check_data, check_positive
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.train import checkpoint as files
from scoreprior.train.augment import Unchanged
from scoreprior.train.identity import identity
from scoreprior.train.loss import AbstractLoss
from scoreprior.train.state import (
    ContextTransform,
    Data,
    Run,
    State,
    Transform,
    advance,
    held_out_losses,
)


class History(NamedTuple):
    """Losses at each evaluation."""

    step: Int[np.ndarray, " num_evaluations"]
    train_loss: Float[np.ndarray, " num_evaluations"]  # mean since the evaluation before
    held_out_loss: Float[np.ndarray, " num_evaluations"]  # of the averaged weights; NaN if none


class Fit(NamedTuple):
    """A trained denoiser and how it came about."""

    denoiser: AbstractDenoiser  # averaged weights at best_step
    best_step: int  # 0 where training found nothing better than what it began with
    history: History


def adamw(
    num_steps: int,
    *,
    peak: float = 1e-3,
    weight_decay: float = 0.01,
    num_warmup: int | None = None,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to `peak / 100` and gradients clipped to norm 1.

    The warm-up takes `num_warmup` of the `num_steps` steps: 200, or half of them if that is less,
    when `None`.
    """
    check_count("num_steps", num_steps)
    if num_warmup is None:
        num_warmup = min(200, num_steps // 2)
    check_count("num_warmup", num_warmup, least=0)
    if num_warmup >= num_steps:
        raise ValueError(f"num_warmup must be below num_steps, got {num_warmup} and {num_steps}")
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, num_warmup, num_steps, peak / 100)
    rule = optax.adamw(rate, b2=0.99, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def network_of(denoiser: Any) -> Any:
    """`denoiser.net`: what `fit` trains unless told otherwise."""
    return denoiser.net


def fit(
    denoiser: AbstractDenoiser,
    data: Float[Array, "n *event"],
    loss: AbstractLoss,
    *,
    key: Key,
    num_steps: int,
    batch_size: int = 256,
    context: PyTree[Array] = None,
    held_out: Float[Array, "m ..."] | None = None,
    held_out_context: PyTree[Array] = None,
    num_held_out_draws: int = 8,
    optimiser: optax.GradientTransformation | None = None,
    averaging: float = 0.999,
    evaluate_every: int = 250,
    patience: int | None = None,
    least_gain: float = 0.0,
    dequantise: Transform = Unchanged(),  # noqa: B008
    augment: Transform = Unchanged(),  # noqa: B008
    augment_context: ContextTransform = Unchanged(),  # noqa: B008
    where: Callable[[Any], Any] = network_of,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Fit:
    """Train `denoiser` on `data` [n, *event] in data units, and return it with averaged weights.

    Every `evaluate_every` steps the loss of the averaged weights is computed on `held_out`
    [m, *event], with the same `num_held_out_draws` noises per event each time; the weights
    returned are those of the lowest held-out loss (the last ones without `held_out`), and training
    stops after `patience` evaluations without a new lowest; `patience` needs `held_out`. Where they
    are not better by `least_gain` standard errors, of the mean difference over held-out events,
    than the weights before training, those are returned.

    **Arguments:** `context`, a pytree with leaves [n, ...], one per event, for conditional
    denoisers; `optimiser`, by default `adamw(num_steps)`; `averaging`, the decay per step of the
    exponential moving average of the weights; `dequantise(key, x)`, part of the data's law and so
    applied to held-out events too, as a `RandomCrop` is, and before it `augment(key, x)`, applied
    in training only, both afresh for every event of every step; `augment_context(key, context)`,
    as often, part of the law of the contexts and so applied to held-out ones too, to drop some for
    example;
    `where(denoiser)`, the part that is trained; `checkpoint`, a file written after every
    evaluation, from which the same call resumes and ends with the same weights, bit for bit.

    **Errors:** `ValueError` before any work for unusable arguments or a checkpoint of another run,
    naming what differs (see `train.identity`); `FloatingPointError` when the training or the
    held-out loss is no longer finite.
    """
    _check(num_steps, batch_size, evaluate_every, num_held_out_draws, averaging)
    _check_held_out(held_out, held_out_context, patience)
    dtype = _dtype(where(denoiser))
    training = _data("data", data, context, dtype)
    testing = None if held_out is None else _data("held_out", held_out, held_out_context, dtype)
    _check_events(denoiser, training, testing, (dequantise, augment, augment_context))
    optimiser = adamw(num_steps) if optimiser is None else optimiser
    run = Run(
        denoiser=denoiser,
        where=where,
        loss=loss,
        optimiser=optimiser,
        data=training,
        held_out=testing,
        key=key,
        dequantise=dequantise,
        augment=augment,
        augment_context=augment_context,
        batch_size=batch_size,
        averaging=averaging,
        num_held_out_draws=num_held_out_draws,
    )
    plan = _plan(num_steps, evaluate_every)
    state, settings = run.start(len(plan)), {}
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        settings = identity(run, state, num_steps, evaluate_every)
        if path.exists():
            state = files.read(path, state, settings)
    bar = tqdm(total=num_steps, initial=int(state.step), disable=not progress, unit="step")
    with bar:
        for evaluation, end in enumerate(plan):
            if end <= int(state.step):
                continue
            if patience is not None and _stale(state, plan) >= patience:
                break
            start = int(state.step)
            num = end - start
            state = advance(run, state, num, jnp.asarray(evaluation))
            _check_progress(run, state, evaluation, start)
            if path is not None:
                files.write(path, state, settings)
            bar.update(num)
            bar.set_postfix(_report(state, evaluation), refresh=False)
    history = _history(state, plan)
    if testing is not None and not _is_better(run, state, least_gain):
        return Fit(denoiser, 0, history)
    return Fit(run.build(state.best), int(state.best_step), history)


def _is_better(run: Run, state: State, least_gain: float) -> bool:
    """Whether training has lowered the held-out loss, by `least_gain` standard errors."""
    before, after = (
        np.asarray(held_out_losses(run, params), float) for params in (run.params(), state.best)
    )
    gain = before - after
    # An untrained network may be infinitely wrong.
    if not np.isfinite(before).all():
        return True
    return not gain.mean() < least_gain * gain.std() / math.sqrt(len(gain))


def _plan(num_steps: int, evaluate_every: int) -> list[int]:
    """Steps after which the loss is evaluated; the last is `num_steps`."""
    return [*range(evaluate_every, num_steps, evaluate_every), num_steps]


def _stale(state: State, plan: list[int]) -> int:
    """Evaluations since the lowest held-out loss."""
    return sum(int(state.best_step) < end <= int(state.step) for end in plan)


def _report(state: State, evaluation: int) -> dict[str, str]:
    held_out = float(state.held_out_losses[evaluation])
    report = {"loss": f"{float(state.train_losses[evaluation]):.4g}"}
    return report if math.isnan(held_out) else report | {"held_out": f"{held_out:.4g}"}


def _history(state: State, plan: list[int]) -> History:
    done = np.array([end for end in plan if end <= int(state.step)], dtype=int)
    train_losses, held_out_losses = np.asarray(state.train_losses), state.held_out_losses
    return History(done, train_losses[: len(done)], np.asarray(held_out_losses)[: len(done)])


def _data(name: str, x: Array, context: PyTree[Array], dtype: Any) -> Data:
    x = jnp.asarray(x, dtype)
    check_data(name, x)
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"context of {name} must have one entry per event, leading size {x.shape[0]}, "
                f"got shape {jnp.shape(leaf)}"
            )
    return Data(x, jax.tree.map(jnp.asarray, context))


def _dtype(trained: Any) -> Any:
    leaves = jax.tree.leaves(eqx.filter(trained, eqx.is_inexact_array))
    if not leaves:
        raise ValueError("where must select a part of the denoiser that holds floating arrays")
    return jnp.result_type(*leaves)


def _check(
    num_steps: int,
    batch_size: int,
    evaluate_every: int,
    num_held_out_draws: int,
    averaging: float,
) -> None:
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    check_count("evaluate_every", evaluate_every)
    check_count("num_held_out_draws", num_held_out_draws)
    check_positive("averaging", averaging)
    if averaging >= 1:
        raise ValueError(f"averaging must lie in (0, 1), got {averaging}")


def _check_held_out(
    held_out: Array | None, held_out_context: PyTree[Array], patience: int | None
) -> None:
    if held_out is None and held_out_context is not None:
        raise ValueError("held_out_context belongs to held_out and so needs it, got held_out=None")
    if patience is None:
        return
    check_count("patience", patience)
    if held_out is None:
        raise ValueError(
            "patience counts evaluations of the held-out loss and so needs held_out, got "
            f"patience={patience} and held_out=None"
        )


def _check_events(
    denoiser: AbstractDenoiser,
    data: Data,
    held_out: Data | None,
    maps: tuple[Transform, Transform, ContextTransform],
) -> None:
    """Raise unless the denoiser maps an event, as `maps` make it, to one of the same shape."""
    event = data.x.shape[1:]
    if held_out is not None and held_out.x.shape[1:] != event:
        raise ValueError(
            f"held_out must hold events of shape {event} like data, got {held_out.x.shape[1:]}"
        )
    first = jax.tree.map(lambda leaf: leaf[0], data)
    sigma = jnp.ones((), data.x.dtype)

    def denoise(
        denoiser: AbstractDenoiser, x: Array, sigma: Array, context: Any, key: Key
    ) -> tuple[Array, Array]:
        dequantise, augment, augment_context = maps
        x = dequantise(key, augment(key, x))
        return denoiser(x, sigma, augment_context(key, context)), x

    try:
        key = jax.random.key(0)
        made, given = eqx.filter_eval_shape(
            denoise, denoiser, *(first.x, sigma, first.context), key
        )
    except Exception as error:
        raise ValueError(
            f"data must hold events the denoiser accepts; one of shape {event} fails: {error}"
        ) from error
    if made.shape != given.shape:
        raise ValueError(
            f"data must hold events of the denoiser's shape {made.shape}, got events of shape "
            f"{given.shape}"
        )
    whole = eqx.filter_eval_shape(maps[0], key, first.x).shape
    if held_out is not None and whole != given.shape:
        raise ValueError(
            "dequantise must give held-out events the shape that augment gives those of training, "
            f"got {whole} and {given.shape}: a crop belongs to dequantise"
        )


def _check_progress(run: Run, state: State, evaluation: int, start: int) -> None:
    """Raise unless the losses of an evaluation are finite; `start` is the step of the last one."""
    if not math.isfinite(float(state.train_losses[evaluation])):
        raise FloatingPointError(
            f"training loss is not finite between steps {start} and {int(state.step)}; lower the "
            "learning rate or raise the smallest noise level"
        )
    held_out = float(state.held_out_losses[evaluation])
    if run.held_out is not None and not math.isfinite(held_out):
        raise FloatingPointError(
            f"held-out loss is not finite at step {int(state.step)}, got {held_out}; look for "
            "extreme events in held_out, or lower the learning rate"
        )
