"""Losses for noisy events: closed forms on a Gaussian, and the bias of posterior means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import Gaussian
from scoreprior.gaussian import Moments
from scoreprior.train import SURE, Ambient, DenoisingLoss, Likelihood, LogUniform, SUREScore
from training import draws

KEY = jax.random.key(0)
LEVEL = 0.8
LAM = jnp.array([0.5, 2.0])
MEAN = jnp.array([1.0, -1.0])
NUM = 200_000
X = draws(Gaussian(Moments(MEAN, LAM)), NUM)
Y = X + LEVEL * jax.random.normal(jax.random.key(1), X.shape)


def scaled(factor):
    """The denoiser for variances `factor LAM`; exact at 1."""
    return Gaussian(Moments(MEAN, factor * LAM))


def values(loss, denoiser, data):
    u = (jnp.arange(NUM) + 0.5) / NUM
    keys = jax.random.split(KEY, NUM)
    return jax.vmap(lambda y, u, k: loss(denoiser, y, u, None, key=k))(data, u, keys)


def check_slope(loss, data, factor, zero, shift=1.05):
    """Whether the expected loss has no slope in the scale of the variances at `factor`.

    Where it has none, a minimum that is off by `shift` would be seen.
    """
    slope = jax.jit(jax.jacfwd(lambda f: values(loss, scaled(f), data)))(factor)
    se = slope.std() / NUM**0.5
    assert (abs(slope.mean()) < 5 * se) == zero
    if zero:
        moved = jax.jit(jax.jacfwd(lambda f: values(loss, scaled(f), data)))(shift * factor)
        assert abs(moved.mean()) > 5 * se


def at_level(sigma):
    return LogUniform(sigma * (1 - 1e-6), sigma)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_sure_is_the_risk_without_the_truth(factor):
    """`E|h - x|^2 / (n s^2)` in closed form, for a right and for wrong denoisers."""
    found = jax.jit(lambda: values(SURE(LEVEL), scaled(factor), Y))()
    kept = factor * LAM / (factor * LAM + LEVEL**2)
    risk = jnp.mean((1 - kept) ** 2 * LAM / LEVEL**2 + kept**2)
    error = found.std() / NUM**0.5
    assert abs(found.mean() - risk) < 5 * error
    assert 5 * error < 0.05 * risk


def test_sure_is_least_at_the_exact_denoiser():
    check_slope(SURE(LEVEL), Y, 1.0, True)
    check_slope(SURE(LEVEL), Y, 0.8, False)
    check_slope(SURE(1.2 * LEVEL), Y, 1.0, False)


@pytest.mark.parametrize(("r", "shift"), [(0.4, 1.1), (3.0, 1.05)])
def test_ambient_is_least_at_the_exact_denoiser(r, shift):
    """And denoising score matching of the noisy events as if clean is not."""
    plain = DenoisingLoss(at_level(r), Likelihood())
    check_slope(Ambient(plain, LEVEL), Y, 1.0, True, shift)
    check_slope(plain, Y, 1.0, False)
    check_slope(plain, X, 1.0, True)


def test_sure_score_takes_posterior_means_for_events():
    """Its second term is least at the variance `lam^2 / (lam + s^2)` of posterior means."""
    dsm = DenoisingLoss(at_level(1.0), Likelihood())
    kept = LAM / (LAM + LEVEL**2)
    narrow = Gaussian(Moments(MEAN, kept * LAM))
    loss = SUREScore(LEVEL, dsm, weight=0.7)
    found = jax.jit(lambda: values(loss, scaled(1.0), Y).mean())()
    keys = jax.vmap(jax.random.split)(jax.random.split(KEY, NUM))
    u = (jnp.arange(NUM) + 0.5) / NUM

    def parts(y, u, keys):
        h = scaled(1.0)(y, LEVEL)
        risk = SURE(LEVEL)(scaled(1.0), y, u, None, key=keys[0])
        return risk + 0.7 * dsm(scaled(1.0), h, u, None, key=keys[1])

    np.testing.assert_allclose(found, jax.jit(jax.vmap(parts))(Y, u, keys).mean(), rtol=1e-10)
    # A shared factor of the variances of posterior means: no slope at 1.
    means = jax.vmap(lambda y: scaled(1.0)(y, LEVEL))(Y)
    slope = jax.jit(
        jax.jacfwd(
            lambda f: values(dsm, Gaussian(Moments(MEAN, f * narrow.law.eigenvalues)), means)
        )
    )
    for factor, zero in ((1.0, True), (1.05, False), (1 / float(kept.mean()), False)):
        each = slope(factor)
        assert (abs(each.mean()) < 5 * each.std() / NUM**0.5) == zero
    assert kept.min() < 0.5


def test_no_gradient_goes_through_the_denoised_events():
    """The slope of the whole is that of `SURE` and of the loss at fixed means."""
    dsm = DenoisingLoss(at_level(1.0), Likelihood())
    y, u = Y[0], jnp.asarray(0.5)
    key_risk, key_loss = jax.random.split(KEY)
    h = scaled(1.3)(y, LEVEL)

    def whole(f):
        return SUREScore(LEVEL, dsm)(scaled(f), y, u, None, key=KEY)

    def fixed(f):
        risk = SURE(LEVEL)(scaled(f), y, u, None, key=key_risk)
        return risk + dsm(scaled(f), h, u, None, key=key_loss)

    np.testing.assert_allclose(jax.grad(whole)(1.3), jax.grad(fixed)(1.3), rtol=1e-10)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("level", [0.0, -1.0, float("nan")])
def test_bad_levels_are_refused(level):
    dsm = DenoisingLoss(at_level(1.0), Likelihood())
    for make in (SURE, lambda s: Ambient(dsm, s), lambda s: SUREScore(s, dsm)):
        with pytest.raises(ValueError, match="level must be a positive finite number"):
            make(level)
    with pytest.raises(ValueError, match="weight must be a positive"):
        SUREScore(1.0, dsm, weight=level)
