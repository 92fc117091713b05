"""Steps of training by hand: the average of the weights, dropout, and the default optimiser."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scoreprior.denoise.network import Network
from scoreprior.nn import Dropout
from scoreprior.train import AbstractLoss, adamw
from stats import assert_proportion
from training import MIXTURE, MIXTURE_MOMENTS, Shift, draws, quick


class Slope(AbstractLoss):
    """The weight itself, whose gradient is one at every event."""

    def __call__(self, denoiser, x, u, context, *, key):
        return denoiser.net.weight


def test_weights_are_averaged_exponentially():
    """Steps of minus one, decays `min(0.15, step / (step + 10))`: 1/11, then 0.15."""
    data = draws(MIXTURE, 8)
    result = quick(
        Network(Shift(jnp.zeros(())), MIXTURE_MOMENTS),
        data,
        Slope(),
        context=data,
        held_out=data,
        held_out_context=data,
        num_steps=3,
        evaluate_every=1,
        optimiser=optax.sgd(1.0),
        averaging=0.15,
    )
    first = -10 / 11
    second = 0.15 * first - 0.85 * 2
    third = 0.15 * second - 0.85 * 3
    history = result.history
    np.testing.assert_allclose(history.train_loss, [0, -1, -2], atol=1e-15)
    np.testing.assert_allclose(history.held_out_loss, [first, second, third], rtol=1e-14)
    np.testing.assert_allclose(result.denoiser.net.weight, third, rtol=1e-14)


class Unit(eqx.Module):
    """A network of one unit, which is dropped half of the time in training."""

    weight: jax.Array
    dropout: Dropout

    def __call__(self, x, log_sigma, context):
        return self.weight * self.dropout(jnp.ones(1)) * jnp.ones(2)


class Square(AbstractLoss):
    """The square of what the network puts out: dropout keeps the mean and doubles the square."""

    def __call__(self, denoiser, x, u, context, *, key):
        return denoiser.net(x, u, context)[0] ** 2


def test_units_are_dropped_in_training_only():
    """Each unit is 0 or 2 in training, independently for every event and step, and 1 without."""
    num_steps, batch_size, data = 50, 400, draws(MIXTURE, 8)
    result = quick(
        Network(Unit(jnp.ones(()), Dropout(0.5)), MIXTURE_MOMENTS),
        data,
        Square(),
        held_out=data,
        num_steps=num_steps,
        evaluate_every=num_steps,
        batch_size=batch_size,
        optimiser=optax.sgd(0.0),
    )
    num = num_steps * batch_size
    assert_proportion(result.history.train_loss[0] / 4 * num, num, 0.5)
    assert result.history.held_out_loss[0] == 1


class Itself(AbstractLoss):
    """The context, which must not go with the noise: times the sign of a draw of it, the second."""

    signed: bool

    def __call__(self, denoiser, x, u, context, *, key):
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        return jnp.sum(context) * (sign if self.signed else 1.0)


def dropped(key, context):
    """Kept with probability 0.8."""
    return context * jax.random.bernoulli(key, 0.8)


@pytest.mark.parametrize("signed", [False, True])
def test_contexts_are_drawn_anew_for_every_event_and_step(signed):
    num_steps, num = 50, 400
    contexts = jnp.ones((num, 1))
    result = quick(
        Network(Shift(jnp.zeros(())), MIXTURE_MOMENTS),
        draws(MIXTURE, num),
        Itself(signed),
        context=contexts,
        held_out=draws(MIXTURE, num),
        held_out_context=contexts,
        num_held_out_draws=num_steps,
        augment_context=dropped,
        num_steps=2 * num_steps,
        evaluate_every=num_steps,
        batch_size=num,
        optimiser=optax.sgd(0.0),
    )
    total = num_steps * num
    history = result.history
    for mean in [*history.train_loss, history.held_out_loss[0]]:
        if signed:
            assert abs(mean) < 5 * np.sqrt(0.8 / total)
        else:
            assert_proportion(mean * total, total, 0.8)
    assert history.train_loss[0] != history.train_loss[1]
    assert history.held_out_loss[0] == history.held_out_loss[1]


def rates(optimiser, num):
    """Learning rates of the first `num` steps: Adam scales a constant gradient to one."""

    def step(state, _):
        update, state = optimiser.update(jnp.ones(()), state, jnp.zeros(()))
        return state, -update

    return jax.lax.scan(step, optimiser.init(jnp.zeros(())), length=num)[1]


def test_adamw_warms_up_and_decays():
    rate = rates(adamw(40, peak=2e-3, num_warmup=10), 41)
    half = 2e-3 * (0.99 / 2 + 0.01)
    expected = [0.0, 1e-3, 2e-3, half, 2e-5]
    np.testing.assert_allclose(rate[jnp.array([0, 5, 10, 25, 40])], expected, rtol=1e-6)
    assert jnp.argmax(rates(adamw(1000), 1001)) == 200
    assert jnp.argmax(rates(adamw(100), 101)) == 50
    assert jnp.argmax(rates(adamw(100, num_warmup=99), 101)) == 99
    np.testing.assert_allclose(rates(adamw(1), 1), 1e-3, rtol=1e-6)


def test_adamw_clips_gradients_of_norm_above_one():
    """Two steps by hand, the first of a gradient of norm 50 and the second of one of norm 1/2."""
    optimiser = adamw(10, peak=0.1, weight_decay=0.3, num_warmup=0)
    weights, clipped, small = np.array([3.0, 4.0]), np.array([0.6, 0.8]), np.array([0.3, 0.4])
    state = optimiser.init(jnp.asarray(weights))
    update, state = optimiser.update(jnp.array([30.0, 40.0]), state, jnp.asarray(weights))
    np.testing.assert_allclose(update, -0.1 * (1 + 0.3 * weights), rtol=1e-6)
    weights = weights + np.asarray(update)
    update, _ = optimiser.update(jnp.asarray(small), state, jnp.asarray(weights))
    mean = (0.09 * clipped + 0.1 * small) / (1 - 0.9**2)
    square = (0.0099 * clipped**2 + 0.01 * small**2) / (1 - 0.99**2)
    rate = 0.1 * (0.99 * (1 + np.cos(np.pi / 10)) / 2 + 0.01)
    expected = -rate * (mean / np.sqrt(square) + 0.3 * weights)
    np.testing.assert_allclose(update, expected, rtol=1e-6)
