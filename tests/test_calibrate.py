"""Calibration: a planted bias is recovered, and the loss drops by its square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import AbstractDenoiser, GaussianMixture
from scoreprior.denoise.calibrate import Calibrated, calibrate

KEY = jax.random.key(1)
MIXTURE = GaussianMixture.diagonal(
    jnp.array([0.3, 0.7]), jnp.array([[-2.0, 0.5, 1.0], [1.5, -1.0, 0.0]]), 0.2
)
SIGMAS = jnp.geomspace(0.1, 10.0, 7)
SHIFT = jnp.array([0.4, -0.2, 0.1])


def planted(sigma):
    """A bias of the denoiser, `sigma^2` times one of the score."""
    return SHIFT * sigma / (1 + sigma)


class Biased(AbstractDenoiser):
    exact: AbstractDenoiser

    def __call__(self, x, sigma, context=None):
        return self.exact(x, sigma) + planted(sigma)


DATA = jax.vmap(MIXTURE.sample)(jax.random.split(KEY, 4000))


def residuals(denoiser, sigma, key):
    noise = jax.random.normal(key, DATA.shape)
    return jax.vmap(lambda x, z: denoiser(x + sigma * z, sigma) - x)(DATA, noise)


@pytest.fixture(scope="module")
def calibrated():
    return Biased(MIXTURE).calibrate(DATA, key=jax.random.key(2), sigmas=SIGMAS, num_draws=2)


def test_planted_bias_is_recovered(calibrated):
    for sigma, bias in zip(SIGMAS, calibrated.bias, strict=True):
        # The standard error of independent draws bounds that of antithetic pairs.
        error = residuals(MIXTURE, sigma, jax.random.key(3)).std(0) / jnp.sqrt(len(DATA))
        assert jnp.all(jnp.abs(bias - planted(sigma)) < 5 * error)
        assert jnp.max(jnp.abs(planted(sigma)) / error) > 10  # a bias the test can see


def test_mean_score_is_zero_at_and_between_levels(calibrated):
    for sigma in (SIGMAS[2], 0.25, 3.0):
        r = residuals(calibrated, jnp.asarray(sigma), jax.random.key(4))
        error = jnp.sqrt(2.0) * r.std(0) / jnp.sqrt(len(DATA))
        assert jnp.all(jnp.abs(r.mean(0)) < 5 * error)
        uncalibrated = residuals(Biased(MIXTURE), jnp.asarray(sigma), jax.random.key(4))
        assert jnp.any(jnp.abs(uncalibrated.mean(0)) > 5 * error)


def test_loss_drops_by_the_squared_bias(calibrated):
    """`E|D - X|^2 - E|D_cal - X|^2 = |b|^2`, on draws the calibration has not seen."""
    sigma, key = SIGMAS[4], jax.random.key(5)
    before = jnp.sum(residuals(Biased(MIXTURE), sigma, key) ** 2, 1)
    after = jnp.sum(residuals(calibrated, sigma, key) ** 2, 1)
    drop = before - after
    expected = jnp.sum(planted(sigma) ** 2)
    assert jnp.abs(drop.mean() - expected) < 5 * drop.std() / jnp.sqrt(len(DATA))
    assert expected > 5 * drop.std() / jnp.sqrt(len(DATA))


def test_interpolation_is_exact_for_a_bias_constant_in_network_units():
    scale = 1.7
    unit = SIGMAS * scale / jnp.sqrt(SIGMAS**2 + scale**2)
    wrapped = Calibrated(MIXTURE, SIGMAS, unit[:, None] * SHIFT[None], scale)
    for sigma in (0.01, 0.3, 4.0, 200.0):
        expected = SHIFT * sigma * scale / np.sqrt(sigma**2 + scale**2)
        np.testing.assert_allclose(wrapped.bias_at(sigma), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": jnp.array([0.0, 1.0])}, "sigmas must be positive finite numbers"),
        ({"sigmas": jnp.array([1.0, 1.0])}, "sigmas must be distinct and increasing"),
        ({"num_draws": 3}, "num_draws must be even"),
        ({"data": DATA.at[0, 0].set(jnp.nan)}, "data must be finite, got 1 of"),
    ],
)
def test_errors(arguments, message):
    arguments = {"data": DATA, "sigmas": SIGMAS} | arguments
    with pytest.raises(ValueError, match=message):
        calibrate(MIXTURE, arguments.pop("data"), key=KEY, **arguments)
