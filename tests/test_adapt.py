"""Adapters: every parameterisation on every schedule gives a Gaussian's closed-form denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scoreprior.denoise import Gaussian
from scoreprior.denoise.adapt import (
    VE,
    VP,
    AbstractSchedule,
    CleanPrediction,
    Cosine,
    Discrete,
    FlowMatching,
    NoisePrediction,
    ScorePrediction,
    SubVP,
    VelocityPrediction,
    VPrediction,
)
from scoreprior.gaussian import Moments

MEAN = jnp.array([1.0, -2.0, 0.5])
VARIANCE = jnp.array([0.5, 2.0, 4.0])
EXACT = Gaussian(Moments(MEAN, VARIANCE))


class Quadratic(AbstractSchedule):
    """No closed-form time: found by bisection."""

    def alpha(self, t):
        return 1 - t**2 / 2

    def sigma(self, t):
        return t + t**3


SCHEDULES = [
    VP(),
    SubVP(),
    VE(0.01, 50.0),
    Cosine(),
    FlowMatching(),
    FlowMatching(noise_first=True),
    Discrete.ddpm(),
    Quadratic(),
]


def expectations(schedule, x_t, t):
    """`E[X | x_t]` and `E[z | x_t]` for the Gaussian, from its joint law with `x_t`."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    clean = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x_t - alpha * MEAN)
    noise = sigma / (alpha**2 * VARIANCE + sigma**2) * (x_t - alpha * MEAN)
    return clean, noise


def clean(schedule, x_t, t):
    return expectations(schedule, x_t, t)[0]


def noise(schedule, x_t, t):
    return expectations(schedule, x_t, t)[1]


def score(schedule, x_t, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return -(x_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)


def v(schedule, x_t, t):
    x, z = expectations(schedule, x_t, t)
    return schedule.alpha(t) * z - schedule.sigma(t) * x


def velocity(schedule, x_t, t):
    x, z = expectations(schedule, x_t, t)
    return jax.grad(schedule.alpha)(t) * x + jax.grad(schedule.sigma)(t) * z


PREDICTIONS = [
    (CleanPrediction, clean),
    (NoisePrediction, noise),
    (ScorePrediction, score),
    (VPrediction, v),
    (VelocityPrediction, velocity),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("prediction", "predict"), PREDICTIONS, ids=lambda p: p.__name__)
def test_every_prediction_is_the_gaussian_denoiser(prediction, predict, schedule):
    denoiser = prediction(lambda x_t, t, context: predict(schedule, x_t, t), schedule)
    x = jnp.array([0.3, 4.0, -7.0])
    for sigma in (0.05, 0.7, 3.5):
        np.testing.assert_allclose(denoiser(x, sigma), EXACT(x, sigma), rtol=1e-8, atol=1e-8)


def test_predictions_are_not_interchangeable():
    schedule = VP()
    net = lambda x_t, t, context: noise(schedule, x_t, t)
    x = jnp.array([0.3, 4.0, -7.0])
    for wrong in (CleanPrediction, ScorePrediction, VPrediction, VelocityPrediction):
        assert jnp.max(jnp.abs(wrong(net, schedule)(x, 0.7) - EXACT(x, 0.7))) > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_time_inverts_level_and_agrees_with_bisection(schedule):
    for level in (0.03, 0.4, 1.0, 3.9):
        t = schedule.time(level)
        assert schedule.time_range[0] <= t <= schedule.time_range[1]
        np.testing.assert_allclose(schedule.level(t), level, rtol=1e-12)
        bisected = AbstractSchedule.find_time(schedule, jnp.asarray(level))
        np.testing.assert_allclose(t, bisected, rtol=1e-10)
        slope = jax.grad(schedule.time)(level) * jax.grad(schedule.level)(t)
        np.testing.assert_allclose(slope, 1.0, rtol=1e-9)


def test_time_is_accurate_in_single_precision():
    with jax.enable_x64(False):
        for schedule in (VP(), SubVP(), VE(0.01, 50.0), Cosine(), FlowMatching(), Discrete.ddpm()):
            for level in (0.03, 0.4, 1.0, 20.0):
                t = schedule.time(level)
                assert t.dtype == jnp.float32
                np.testing.assert_allclose(schedule.level(t), level, rtol=1e-4)


def test_levels_out_of_reach_are_nan_and_never_extrapolated():
    low, high = VE(0.01, 50.0).level_range
    np.testing.assert_allclose((low, high), (0.01, 50.0))
    assert jnp.isnan(VE(0.01, 50.0).time(60.0))
    assert jnp.isnan(VP().time(1e4))
    assert jnp.isnan(Discrete.ddpm().time(1e-4))
    assert jnp.isfinite(FlowMatching().time(1e6))


def test_schedules_against_published_tables():
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    table = Discrete.ddpm()
    np.testing.assert_allclose(table.alpha(jnp.asarray(499.0)), np.sqrt(bars[499]), rtol=1e-9)
    np.testing.assert_allclose(table.sigma(jnp.asarray(0.0)), np.sqrt(1e-4), rtol=1e-9)
    assert abs(bars[-1] - 4.036e-5) < 1e-8
    np.testing.assert_allclose(VP().alpha(jnp.asarray(1.0)), np.exp(-20.1 / 4), rtol=1e-12)
    # DDPM is the discretisation of VP, to first order in 1 / num_times
    t = jnp.asarray(0.5)
    np.testing.assert_allclose(table.alpha(jnp.asarray(499.5)), VP().alpha(t), rtol=2e-2)


class Affine(nnx.Module):
    """A Flax NNX network whose ideal weights for the Gaussian are known."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x_t, t, context):
        return self.linear(x_t)


def test_flax_nnx_module_as_network():
    schedule = FlowMatching()
    sigma = 0.7
    t = schedule.time(sigma)
    alpha, std = schedule.alpha(t), schedule.sigma(t)
    net = Affine(nnx.Rngs(0))
    gain = std / (alpha**2 * VARIANCE + std**2)
    net.linear.kernel[...] = jnp.diag(gain).astype(jnp.float32)
    net.linear.bias[...] = (-gain * alpha * MEAN).astype(jnp.float32)
    denoiser = NoisePrediction(net, schedule)
    x = jnp.array([0.3, 4.0, -7.0])
    np.testing.assert_allclose(denoiser(x, sigma), EXACT(x, sigma), rtol=1e-5)
    mapped = jax.jit(jax.vmap(denoiser, (0, None)))(jnp.stack([x, -x]), sigma)
    np.testing.assert_allclose(mapped[1], EXACT(-x, sigma), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(beta_min=-1.0), "beta_min must be a positive finite number, got -1.0"),
        (lambda: VE(0.0, 1.0), "sigma_min must be a positive finite number, got 0.0"),
        (lambda: Discrete(jnp.array([0.5, 0.9])), "alpha_bar must be a vector decreasing"),
        (lambda: Discrete.ddpm(1), "num_times must be at least 2, got 1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
