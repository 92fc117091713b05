"""Priors from measurements: exact cases on Gaussians, resumption, errors."""

import dataclasses
import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.denoise.network import Network
from scoreprior.gaussian import Dense, Diagonal, Moments
from scoreprior.guide import MMPS, Classifier
from scoreprior.learn import (
    EM,
    CorrectedDraws,
    GuidedDraws,
    MatchMoments,
    Measurements,
    Train,
    fit_gaussian,
)
from scoreprior.sample import LogGrid
from scoreprior.train import DenoisingLoss, LogUniform, Residual, adamw
from stats import assert_cov, assert_masses, assert_mean
from training import draws, mlp_denoiser

KEY = jax.random.key(0)
ROOT = jnp.array([[1.5, 0.0, 0.0], [0.6, 1.0, 0.0], [-0.4, 0.5, 0.8]])
LAW = Gaussian(Moments.dense(jnp.array([1.0, -1.0, 0.5]), ROOT @ ROOT.T))
VARIANCE = 0.5
SIGMAS = LogGrid(0.02, 100.0)(64)


def seen(law, num, *, missing=0.3, key=KEY, variance=VARIANCE):
    """Events of `law` in noise, some entries absent."""
    key_x, key_n, key_m = jax.random.split(key, 3)
    x = draws(law, num, key_x)
    y = x + variance**0.5 * jax.random.normal(key_n, x.shape)
    present = jax.random.uniform(key_m, x.shape) >= missing
    return x, Measurements(y, variance, present=present)


def exact_draw(denoiser, observation, key):
    """A draw from the posterior of a Gaussian, in closed form."""
    A = jnp.diag(observation.present.astype(float))
    cov_y = jnp.diag(observation.noise.eigenvalues)
    law = denoiser.law
    gain = jnp.linalg.solve(A @ law.covariance() @ A.T + cov_y, A @ law.covariance()).T
    key_x, key_y = jax.random.split(key)
    x, e = law.sample(key_x), jnp.sqrt(observation.noise.eigenvalues)
    y = A @ x + e * jax.random.normal(key_y, x.shape)
    return x + gain @ (observation.data - y)


def test_guided_draws_are_exact_for_a_gaussian():
    _, measurements = seen(LAW, 4)
    observation = measurements.observation(1)
    assert observation.present.sum() == 2  # some seen and some not
    draw = GuidedDraws(LAW.law, SIGMAS, MMPS(3, rtol=1e-9))
    keys = jax.random.split(KEY, 40_000)
    x = jax.jit(jax.vmap(lambda key: draw(LAW, observation, key)))(keys)
    A = jnp.diag(observation.present.astype(float))
    exact = LAW.posterior(A, observation.data, VARIANCE * jnp.eye(3)).law
    assert_mean(x, exact.mean)
    assert_cov(x, exact.covariance())


MODES = GaussianMixture.diagonal(jnp.array([0.3, 0.7]), jnp.array([[-1.5, -1.5], [1.5, 1.0]]), 0.05)


@pytest.mark.slow
def test_corrected_draws_keep_the_masses_of_modes():
    """One entry of two seen, in noise as wide as the gap; guided draws do not keep them."""
    measurements = Measurements(
        jnp.array([[0.1, 0.0], [0.0, 0.0]]), 1.5, present=jnp.array([[True, False]] * 2)
    )
    observation = measurements.observation(0)
    A = jnp.diag(observation.present.astype(float))
    exact = MODES.posterior(A, observation.data, 1.5 * jnp.eye(2))
    keys = jax.random.split(KEY, 3_000)

    def drawn(draw):
        return jax.jit(jax.vmap(lambda key: draw(MODES, observation, key)))(keys)

    moments = MODES.moments()
    x = drawn(CorrectedDraws(moments, 0.02, 40.0, 40, 24))
    masses = jax.vmap(exact.log_responsibilities)(x).argmax(1)
    guided = drawn(GuidedDraws(moments, LogGrid(0.02, 40.0)(40), MMPS(2)))
    off = jax.vmap(exact.log_responsibilities)(guided).argmax(1)
    assert_masses(masses, exact.weights, bias=0.07)
    with pytest.raises(AssertionError, match="outside 5"):
        assert_masses(off, exact.weights, bias=0.07)
    assert_mean(x, exact.moments().mean, bias=0.15)


def test_chi_squared_is_one_where_prior_and_draws_are_right():
    """And what the closed form says for a prior too narrow or too wide."""
    _, measurements = seen(LAW, 20_000)
    em = EM(exact_draw, MatchMoments(Dense(0.0)), 1, batch_size=5_000)

    def found(scale):
        law = LAW.law
        prior = Gaussian(Moments(law.mean, scale * law.eigenvalues, law.basis))
        return em.run(prior, measurements, key=KEY, progress=False).history.chi_squared[0]

    def expected(scale):
        """Whole measurements only: `E (y - x)^2 / v` for a prior of covariance `scale C`."""
        lam = np.asarray(LAW.law.eigenvalues)
        kept = VARIANCE / (scale * lam + VARIANCE)
        return np.mean(kept**2 * (lam + VARIANCE) / VARIANCE + 1 - kept)

    assert abs(found(1.0) - 1) < 5 * np.sqrt(2 / 42_000)  # at least: there is some covariance
    _, measurements = seen(LAW, 20_000, missing=0.0)
    for scale in (0.5, 1.0, 2.0):
        assert abs(found(scale) - expected(scale)) < 5 * np.sqrt(2 / 60_000) * expected(scale)
    assert expected(0.5) > 1.1
    assert expected(2.0) < 0.95


def test_rounds_with_exact_draws_end_at_the_likeliest_gaussian():
    _, measurements = seen(LAW, 4_000)
    start = Gaussian(Moments.dense(jnp.zeros(3), 9 * jnp.eye(3)))
    em = EM(exact_draw, MatchMoments(Dense(0.0)), 25, batch_size=4_000)
    _, held_out = seen(LAW, 4_000, key=jax.random.key(1))
    learned = em.run(start, measurements, key=KEY, held_out=held_out, progress=False)
    law, history = learned.denoiser.law, learned.history
    gain = history.held_out_before - history.held_out_after
    assert gain[0] > 0.1
    assert abs(gain[-1]) < 0.01
    best = fit_gaussian(measurements, Dense(0.0), num_steps=200).moments
    scale = np.sqrt(np.diag(best.covariance()))
    np.testing.assert_allclose((law.mean - best.mean) / scale, 0, atol=0.1)
    error = (law.covariance() - best.covariance()) / np.outer(scale, scale)
    np.testing.assert_allclose(error, 0, atol=0.1)
    # The noise that is to be taken off is larger than the tolerance.
    assert np.min(VARIANCE / scale**2) > 0.15


TRUTH = GaussianMixture.diagonal(jnp.array([0.5, 0.5]), jnp.array([[-1.5, -1.5], [1.5, 1.5]]), 0.05)


def denoising_error(denoiser, x, sigma):
    noisy = x + sigma * jax.random.normal(jax.random.key(7), x.shape)
    return float(jnp.mean((jax.vmap(lambda y: denoiser(y, sigma))(noisy) - x) ** 2))


@pytest.mark.slow
def test_rounds_with_training_find_what_is_not_gaussian():
    """Two modes in noise that fills the gap between them, a tenth of the entries missing."""
    _, measurements = seen(TRUTH, 1_000, missing=0.1, variance=0.6)
    _, held_out = seen(TRUTH, 200, missing=0.1, variance=0.6, key=jax.random.key(9))
    moments = fit_gaussian(measurements, Dense(0.0), num_steps=60).moments
    loss = DenoisingLoss(LogUniform(0.05, 20.0), Residual(moments))
    em = EM(
        GuidedDraws(moments, LogGrid(0.05, 20.0)(30), MMPS(2)),
        Train(loss, 400, batch_size=128, averaging=0.99, optimiser=adamw(400, peak=3e-3)),
        3,
        batch_size=1_000,
    )
    learned = em.run(
        mlp_denoiser(moments, width=32), measurements, key=KEY, held_out=held_out, progress=False
    )
    x, naive = draws(TRUTH, 4_000, jax.random.key(5)), Gaussian(moments)
    for sigma in (0.5, 1.0):
        error, floor = (denoising_error(d, x, sigma) for d in (learned.denoiser, TRUTH))
        start = denoising_error(naive, x, sigma)
        assert error - floor < 0.7 * (start - floor)


def training(num_rounds, draw=None):
    moments = Moments(jnp.zeros(3), 2 * jnp.ones(3))
    loss = DenoisingLoss(LogUniform(0.05, 20.0), Residual(moments))
    draw = draw or GuidedDraws(moments, LogGrid(0.05, 20.0)(8), MMPS(2))
    return EM(draw, Train(loss, 20, batch_size=16, evaluate_every=5), num_rounds, batch_size=24)


class Slope(eqx.Module):
    """A network that is one matrix."""

    weight: jax.Array

    def __call__(self, x, log_sigma, context):
        return self.weight @ x


def network():
    net = Slope(0.1 * jax.random.normal(KEY, (3, 3)))
    return Network(net, Moments(jnp.zeros(3), 2 * jnp.ones(3)))


def leaves(learned):
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(learned.denoiser, eqx.is_array))
    ]


@pytest.fixture(scope="module")
def whole():
    _, measurements = seen(LAW, 64)
    _, held_out = seen(LAW, 32, key=jax.random.key(2))
    run = {"key": KEY, "held_out": held_out, "progress": False}
    return measurements, run, training(3).run(network(), measurements, **run)


def same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))
    for x, y in zip(a.history, b.history, strict=True):
        np.testing.assert_array_equal(x, y)


def test_rounds_are_resumed_and_added(whole, tmp_path):
    measurements, run, expected = whole
    training(1).run(network(), measurements, checkpoint=tmp_path, **run)
    again = training(3).run(network(), measurements, checkpoint=tmp_path, **run)
    same(again, expected)
    assert not again.interrupted
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"round-000{i}.safetensors" for i in (1, 2, 3)
    ]
    with pytest.raises(ValueError, match=r"is of another run, it differs in: key"):
        training(3).run(
            network(), measurements, checkpoint=tmp_path, **(run | {"key": jax.random.key(5)})
        )


def test_an_interrupted_run_keeps_its_rounds(whole, tmp_path, monkeypatch):
    """Ctrl-C in the middle of the second training; then the same call ends as if whole."""
    module = importlib.import_module("scoreprior.train.fit")
    measurements, run, expected = whole
    advance, calls = module.advance, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(module, "advance", interrupted)
    part = training(3).run(network(), measurements, checkpoint=tmp_path, **run)
    assert part.interrupted
    np.testing.assert_array_equal(part.history.chi_squared, expected.history.chi_squared[:1])
    assert (tmp_path / "fit-0002.safetensors").exists()
    monkeypatch.setattr(module, "advance", advance)
    same(training(3).run(network(), measurements, checkpoint=tmp_path, **run), expected)


def test_draws_do_not_depend_on_the_batch(whole):
    measurements, run, expected = whole
    found = dataclasses.replace(training(3), batch_size=64).run(network(), measurements, **run)
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-6)


@pytest.mark.usefixtures("as_user")
def test_bad_input_is_refused(whole):
    measurements, run, _ = whole
    flat = Measurements(jnp.ones((4, 2)), 1.0)
    with pytest.raises(ValueError, match=r"held_out must be of events of shape \(3,\)"):
        training(1).run(network(), measurements, **(run | {"held_out": flat}))
    with pytest.raises(ValueError, match="a draw fails"):
        training(1).run(network(), flat, key=KEY)
    with pytest.raises(ValueError, match=r"draw must make events of shape \(3,\), got \(2,\)"):
        training(1, lambda d, o, k: jnp.ones(2)).run(network(), measurements, **run)
    with pytest.raises(FloatingPointError, match="64 of 64 posterior draws of round 1"):
        training(1, lambda d, o, k: jnp.full(3, jnp.nan)).run(network(), measurements, **run)
    with pytest.raises(TypeError, match="maximise must be such as Train"):
        EM(exact_draw, Diagonal(), 1)
    with pytest.raises(ValueError, match="structure of the one it was given"):
        EM(exact_draw, MatchMoments(Dense(0.0)), 1).run(
            Gaussian(Moments(jnp.zeros(3), jnp.ones(3))), measurements, key=KEY, progress=False
        )
    with pytest.raises(TypeError, match="guidance must have a Gaussian law of the data"):
        CorrectedDraws(LAW.law, 0.1, 10.0, 4, 4, Classifier(lambda x: x.sum()))
    with pytest.raises(ValueError, match="sigma_min must be below sigma_max"):
        CorrectedDraws(LAW.law, 10.0, 0.1, 4, 4)
    with pytest.raises(ValueError, match=r"sigmas must hold at least two levels, got \(1,\)"):
        GuidedDraws(LAW.law, jnp.ones(1))
