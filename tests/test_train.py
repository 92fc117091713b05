"""Training: parts of the loss against closed forms, what `fit` learns, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scoreprior.denoise import AbstractDenoiser, Gaussian, Rescaled
from scoreprior.denoise.network import Network
from scoreprior.gaussian import Moments
from scoreprior.train import (
    Conservative,
    DenoisingLoss,
    Dequantise,
    Likelihood,
    LogNormal,
    LogUniform,
    Relative,
    Residual,
    TargetScore,
    adamw,
    fit,
)
from training import KEY, LOSS, MIXTURE, MIXTURE_MOMENTS, Shift, draws, mlp_denoiser, quick

VARIANCE = jnp.array([0.5, 2.0])
GAUSSIAN = Gaussian(Moments(jnp.array([1.0, -1.0]), VARIANCE))


def expected_loss(loss, denoiser, data, key=KEY):
    """Monte-Carlo mean and standard error of a loss over data."""
    u = (jnp.arange(len(data)) + 0.5) / len(data)
    keys = jax.random.split(key, len(data))
    values = jax.vmap(lambda x, u, k: loss(denoiser, x, u, None, key=k))(data, u, keys)
    return values.mean(), values.std() / jnp.sqrt(len(data))


def gated(loss, denoiser, data, expected):
    mean, error = expected_loss(loss, denoiser, data)
    assert jnp.abs(mean - expected) < 5 * error
    assert 5 * error < 0.05 * jnp.abs(expected)  # sharp enough to see a 5 % bias


def at_level(sigma):
    return LogUniform(sigma * (1 - 1e-9), sigma)


def test_levels_have_their_laws():
    u = jnp.linspace(0.0, 1.0, 11)[1:-1]
    sigma = jax.vmap(LogUniform(0.1, 10.0))(u)
    np.testing.assert_allclose(jnp.log10(sigma), 2 * u - 1, rtol=1e-12, atol=1e-12)
    sigma = jax.vmap(LogNormal(0.6, 1.2))(u)
    np.testing.assert_allclose(jnp.log(sigma / 0.6) / 1.2, jax.scipy.stats.norm.ppf(u), rtol=1e-9)


def test_the_loss_of_the_gaussian_denoiser_is_one_at_every_level():
    data = draws(GAUSSIAN, 40_000)
    for sigma in (0.1, 1.0, 10.0):
        for metric in (Residual(GAUSSIAN.law), Relative(GAUSSIAN.law)):
            gated(DenoisingLoss(at_level(sigma), metric), GAUSSIAN, data, 1.0)


def test_likelihood_loss_is_the_closed_form():
    sigma = 0.8
    expected = jnp.sum(VARIANCE / (VARIANCE + sigma**2))
    gated(DenoisingLoss(at_level(sigma), Likelihood()), GAUSSIAN, draws(GAUSSIAN, 40_000), expected)


def test_target_score_has_no_variance_on_a_gaussian():
    """With `tau^2` the variance of the data the target is the denoiser itself, at every draw."""
    isotropic = Gaussian(Moments(jnp.zeros(2), jnp.full(2, 1.7)))
    data = draws(isotropic, 64)
    target = TargetScore(lambda x: -x / 1.7, spread=float(np.sqrt(1.7)))
    metric = Likelihood()
    mean, _ = expected_loss(DenoisingLoss(LogUniform(0.1, 10.0), metric, target), isotropic, data)
    assert mean < 1e-20
    plain, _ = expected_loss(DenoisingLoss(LogUniform(0.1, 10.0), metric), isotropic, data)
    assert plain > 0.1


def test_target_score_is_unbiased_on_a_mixture():
    """`E[(target - D) f(x_t)] = 0` for any function `f`, here the identity."""
    data, sigma = draws(MIXTURE, 40_000), 0.5
    noise = jax.random.normal(jax.random.key(1), data.shape)
    target = TargetScore(lambda x: jax.grad(MIXTURE.log_prob)(x), spread=0.3)

    def residual(x, z, target):
        x_t = x + sigma * z
        return (target(x, x_t, jnp.asarray(sigma)).value - MIXTURE(x_t, sigma)) * x_t

    values = jax.vmap(residual, (0, 0, None))(data, noise, target)
    error = values.std(0) / jnp.sqrt(len(data))
    assert jnp.all(jnp.abs(values.mean(0)) < 5 * error)
    wrong = TargetScore(lambda x: 0.5 * jax.grad(MIXTURE.log_prob)(x) - 1.0, spread=0.3)
    values = jax.vmap(residual, (0, 0, None))(data, noise, wrong)
    assert jnp.any(jnp.abs(values.mean(0)) > 5 * values.std(0) / jnp.sqrt(len(data)))


class Linear(AbstractDenoiser):
    matrix: jax.Array

    def __call__(self, x, sigma, context=None):
        return self.matrix @ x


def test_conservative_penalty_is_the_antisymmetric_part():
    matrix = jax.random.normal(KEY, (4, 4))
    penalty = Conservative(0.3)
    keys = jax.random.split(KEY, 20_000)
    arguments = (jnp.zeros(4), jnp.asarray(1.0), None)
    values = jax.vmap(lambda k: penalty(Linear(matrix), *arguments, k))(keys)
    expected = 0.3 * jnp.sum((matrix - matrix.T) ** 2) / 8
    error = values.std() / jnp.sqrt(len(keys))
    assert jnp.abs(values.mean() - expected) < 5 * error
    symmetric = Linear(matrix + matrix.T)
    assert penalty(symmetric, *arguments, KEY) < 1e-25


def excess(denoiser, levels=(0.2, 0.5, 1.0, 2.0)):
    """Mean square distance to the exact denoiser over that of the Gaussian one."""
    data = draws(MIXTURE, 2000, jax.random.key(5))
    noise = jax.random.normal(jax.random.key(6), data.shape)

    def distance(other, sigma):
        gap = jax.vmap(lambda x: other(x, sigma) - MIXTURE(x, sigma))
        return jnp.mean(gap(data + sigma * noise) ** 2)

    gaussian = Gaussian(MIXTURE_MOMENTS)
    return max(float(distance(denoiser, s) / distance(gaussian, s)) for s in levels)


def test_fit_learns_a_mixture():
    """From the Gaussian denoiser nine tenths of the way and more to the exact one."""
    result = fit(
        mlp_denoiser(),
        draws(MIXTURE, 20_000),
        LOSS,
        key=KEY,
        num_steps=1200,
        batch_size=256,
        held_out=draws(MIXTURE, 500, jax.random.key(7)),
        optimiser=optax.adam(3e-3),
        averaging=0.99,
        evaluate_every=400,
        progress=False,
    )
    assert excess(mlp_denoiser()) == pytest.approx(1.0)
    assert excess(result.denoiser) < 0.1
    assert result.history.step.tolist() == [400, 800, 1200]
    losses = result.history.held_out_loss
    assert result.best_step == result.history.step[np.argmin(losses)]
    moments = result.denoiser.moments
    assert jnp.array_equal(moments.eigenvalues, MIXTURE_MOMENTS.eigenvalues)


def test_early_stopping_keeps_the_best_weights():
    """A step size that ruins a trained network: the weights before are kept, and training stops."""
    data, held_out = draws(MIXTURE, 256), draws(MIXTURE, 256, jax.random.key(8))
    trained = quick(mlp_denoiser(), data, num_steps=300, optimiser=optax.adam(3e-3)).denoiser
    rate = optax.piecewise_constant_schedule(1e-5, {10: 3e4})
    result = quick(
        trained,
        data,
        held_out=held_out,
        num_steps=200,
        patience=3,
        optimiser=optax.sgd(rate),
        averaging=0.5,
    )
    assert result.best_step == 10
    assert result.history.step.tolist() == [10, 20, 30, 40]
    assert np.argmin(result.history.held_out_loss) == 0


def test_the_weights_before_training_are_kept_where_it_makes_them_worse():
    data, held_out = draws(MIXTURE, 256), draws(MIXTURE, 256, jax.random.key(8))
    trained = quick(mlp_denoiser(), data, num_steps=300, optimiser=optax.adam(3e-3)).denoiser
    result = quick(trained, data, held_out=held_out, num_steps=20, optimiser=optax.sgd(0.3))
    assert result.best_step == 0
    assert eqx.tree_equal(result.denoiser, trained)


def test_dequantised_data_are_learnt_in_data_units():
    """`X = 3` always, dequantised to U[3, 5): mean 4, variance 1/3."""
    data = jnp.full((64, 2), 3.0)
    denoiser = mlp_denoiser(Moments(jnp.full(2, 4.0), jnp.full(2, 1 / 3)))
    loss = DenoisingLoss(LogUniform(0.1, 5.0), Residual(denoiser.moments))
    result = quick(
        denoiser, data, loss, num_steps=400, dequantise=Dequantise(2.0), optimiser=optax.adam(3e-3)
    )
    grid = jnp.linspace(3.0, 5.0, 4001)
    sigma, x = 0.4, 3.2
    weight = jnp.exp(-((x - grid) ** 2) / (2 * sigma**2))
    expected = jnp.sum(weight * grid) / jnp.sum(weight)
    np.testing.assert_allclose(result.denoiser(jnp.full(2, x), sigma), expected, atol=0.05)
    gaussian = Gaussian(denoiser.moments)(jnp.full(2, x), sigma)
    assert jnp.min(jnp.abs(gaussian - expected)) > 0.05


def test_augmentation_reaches_training_but_not_the_held_out_loss():
    data = draws(MIXTURE, 64)
    shifted = lambda key, x: x + 100.0
    plain = quick(mlp_denoiser(), data, held_out=data, num_steps=1, optimiser=optax.sgd(0.0))
    moved = quick(
        mlp_denoiser(), data, held_out=data, num_steps=1, optimiser=optax.sgd(0.0), augment=shifted
    )
    assert moved.history.held_out_loss[0] == plain.history.held_out_loss[0]
    assert moved.history.train_loss[0] > 10 * plain.history.train_loss[0]


def test_context_is_kept_with_its_event():
    """`X = y` exactly: the only weight that explains it is known, and shuffled pairs give none."""
    y = jax.random.normal(KEY, (512, 2))
    moments = Moments(jnp.zeros(2), jnp.ones(2))
    loss = DenoisingLoss(at_level(100.0), Residual(moments))
    options = {"num_steps": 300, "optimiser": optax.adam(3e-2), "averaging": 0.9}
    fitted = quick(Network(Shift(jnp.zeros(())), moments), y, loss, context=y, **options)
    assert abs(fitted.denoiser.net.weight - 1) < 0.05
    other = jnp.roll(y, 1, 0)
    fitted = quick(Network(Shift(jnp.zeros(())), moments), y, loss, context=other, **options)
    assert abs(fitted.denoiser.net.weight) < 0.3


class FlaxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 48, rngs=rngs)
        self.second = nnx.Linear(48, 2, rngs=rngs)

    def __call__(self, x, log_sigma, context):
        return self.second(nnx.silu(self.first(jnp.append(x, log_sigma.astype(x.dtype)))))


def test_a_flax_network_is_trained():
    denoiser = Network(FlaxNet(nnx.Rngs(0)), MIXTURE_MOMENTS)
    data = draws(MIXTURE, 4096)
    result = quick(denoiser, data, num_steps=600, batch_size=128, optimiser=optax.adam(1e-2))
    assert excess(result.denoiser) < 0.5


def test_where_selects_what_is_trained():
    inner = mlp_denoiser()
    denoiser = Rescaled(inner, jnp.zeros(2), jnp.asarray(2.0))
    result = quick(denoiser, draws(MIXTURE, 64), where=lambda d: d.denoiser.net)
    assert result.denoiser.scale == 2.0
    before, after = inner.net.last.weight, result.denoiser.denoiser.net.last.weight
    assert jnp.max(jnp.abs(after - before)) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"averaging": 1.0}, r"averaging must lie in \(0, 1\), got 1.0"),
        ({"data": jnp.array([[1.0, jnp.nan], [0.0, 0.0]])}, "data must be finite, got 1 of 4"),
        ({"data": jnp.zeros((8, 3))}, r"data must hold events the denoiser accepts; .*\(3,\)"),
        ({"held_out": jnp.zeros((8, 3))}, r"held_out must hold events of shape \(2,\) like data"),
        ({"context": jnp.zeros((3, 1))}, "context of data must have one entry per event"),
        ({"where": lambda d: 3}, "where must select a part of the denoiser"),
        ({"held_out_context": jnp.zeros((3, 1))}, "held_out_context belongs to held_out"),
        ({"patience": 3}, "patience counts .* needs held_out, got patience=3 and held_out=None"),
    ],
)
def test_bad_arguments_fail_before_any_work(options, message):
    options = {"data": draws(MIXTURE, 16)} | options
    with pytest.raises(ValueError, match=message):
        quick(mlp_denoiser(), options.pop("data"), **options)


def short(**options):
    data, denoiser = draws(MIXTURE, 16), Network(Shift(jnp.asarray(0.5)), MIXTURE_MOMENTS)
    return quick(denoiser, data, context=data, **options)


def test_divergence_is_reported():
    """At step 12, that is between the evaluations at steps 10 and 20."""
    rate = optax.piecewise_constant_schedule(1e-3, {12: 1e300})
    with pytest.raises(FloatingPointError, match="loss is not finite between steps 10 and 20; low"):
        short(optimiser=optax.sgd(rate))


def test_a_held_out_loss_that_is_not_finite_is_reported():
    """Events so far out that their squares overflow, while the training loss stays finite."""
    held_out = jnp.full((4, 2), 1e200)
    with pytest.raises(FloatingPointError, match="held-out loss is not finite at step 10, got inf"):
        short(held_out=held_out, held_out_context=jnp.zeros((4, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogUniform(2.0, 1.0), "sigma_min must be below sigma_max, got 2.0 and 1.0"),
        (lambda: LogNormal(-1.0, 1.0), "median must be a positive finite number, got -1.0"),
        (lambda: Dequantise(0.0), "width must be a positive finite number, got 0.0"),
        (lambda: adamw(0), "num_steps must be at least 1, got 0"),
        (lambda: adamw(9, num_warmup=-1), "num_warmup must be at least 0, got -1"),
        (lambda: adamw(9, num_warmup=9), "num_warmup must be below num_steps, got 9 and 9"),
        (lambda: Conservative(-1.0), "weight must be a positive finite number, got -1.0"),
    ],
)
def test_errors_of_parts(make, message):
    with pytest.raises(ValueError, match=message):
        make()
