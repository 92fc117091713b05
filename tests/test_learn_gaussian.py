"""Gaussian priors from measurements: closed forms, the slope of the likelihood, bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from scoreprior.gaussian import Dense, Diagonal, Fourier, Isotropic, LowRank, Moments
from scoreprior.learn import Measurements, fit_gaussian, log_evidence

SHAPE = (2, 3)
SIZE = 6
VARIANCE = 0.5
RNG = np.random.default_rng(0)
ROOT = np.linalg.cholesky(np.eye(SIZE) + 0.8 * np.ones((SIZE, SIZE)))
EVENTS = (1 + 2 * RNG.standard_normal((400, SIZE)) @ ROOT.T).reshape(400, *SHAPE)
NOISY = EVENTS + VARIANCE**0.5 * RNG.standard_normal(EVENTS.shape)
PRESENT = RNG.uniform(size=EVENTS.shape) < 0.7


def mix(x, weight):
    """Four data of an event, by weights of its own."""
    return weight @ x.ravel()


def mixed(num=60):
    """Data through random operators, in noise of different variance, some of them absent."""
    weight = RNG.standard_normal((num, 4, SIZE))
    variance = RNG.uniform(0.2, 1.0, (num, 4))
    clean = np.einsum("nij,nj->ni", weight, EVENTS[:num].reshape(num, SIZE))
    data = clean + variance**0.5 * RNG.standard_normal((num, 4))
    present = np.arange(4 * num).reshape(num, 4) % 5 > 0
    seen = Measurements(
        np.where(present, data, np.nan),
        variance,
        operator=mix,
        context=jnp.asarray(weight),
        present=present,
        event_shape=SHAPE,
    )
    return seen, (weight, variance, data, present)


@pytest.mark.parametrize(
    "structure", [Dense(0.0), LowRank(2), Diagonal(), Fourier(), Isotropic()], ids=repr
)
def test_noisy_events_give_the_moments_of_the_data_less_the_noise(structure):
    """`C + v I` has the structure of `C`, so the likeliest is that of the data themselves."""
    fit = fit_gaussian(Measurements(NOISY, VARIANCE), structure, num_steps=60)
    naive = Moments.fit(jnp.asarray(NOISY), structure)
    assert jnp.min(naive.eigenvalues) > 2 * VARIANCE  # so that 60 steps are enough
    np.testing.assert_allclose(fit.moments.mean, naive.mean, rtol=1e-8)
    expected = naive.covariance() - VARIANCE * np.eye(SIZE)
    np.testing.assert_allclose(fit.moments.covariance(), expected, atol=1e-7)


def test_a_step_takes_the_moments_of_all_posteriors():
    seen, (weight, variance, data, present) = mixed()
    mean, covariance = np.arange(6) / 5, ROOT @ ROOT.T
    start = Moments.dense(jnp.asarray(mean).reshape(SHAPE), jnp.asarray(covariance))
    step = fit_gaussian(seen, Dense(0.0), num_steps=1, start=start, batch_size=7).moments
    means, spreads = [], []
    for A, v, y, there in zip(weight, variance, data, present, strict=True):
        A, y, precision = A[there], y[there], np.diag(1 / v[there])
        spreads.append(np.linalg.inv(np.linalg.inv(covariance) + A.T @ precision @ A))
        means.append(mean + spreads[-1] @ A.T @ precision @ (y - A @ mean))
    np.testing.assert_allclose(step.mean.ravel(), np.mean(means, 0), rtol=1e-8)
    expected = np.mean(spreads, 0) + np.cov(np.transpose(means), bias=True)
    np.testing.assert_allclose(step.covariance(), expected, rtol=1e-8, atol=1e-10)


def direct_log_evidence(parts, mean, covariance):
    """`sum_i log p(y_i)` with the absent entries left out."""
    return sum(
        multivariate_normal.logpdf(
            y[seen], A[seen] @ mean, A[seen] @ covariance @ A[seen].T + np.diag(v[seen])
        )
        for A, v, y, seen in zip(*parts, strict=True)
        if seen.any()
    )


def test_log_evidence_leaves_absent_data_out():
    seen, parts = mixed()
    moments = Moments.dense(jnp.arange(6.0).reshape(SHAPE) / 5, jnp.asarray(ROOT @ ROOT.T))
    direct = direct_log_evidence(parts, np.arange(6) / 5, ROOT @ ROOT.T) / len(seen)
    np.testing.assert_allclose(log_evidence(moments, seen, batch_size=7), direct, rtol=1e-10)


def test_a_fit_ends_where_the_likelihood_has_no_slope():
    """Random operators, unequal noise, absent data: no closed form, but a direct likelihood."""
    seen, parts = mixed()
    fit = fit_gaussian(seen, Diagonal(), num_steps=600)
    steps = np.diff(fit.log_evidence)
    assert np.all(steps > -1e-12)
    assert steps[0] > 1e-3
    assert steps[-1] < 1e-9
    theta = np.concatenate([fit.moments.mean.ravel(), fit.moments.eigenvalues.ravel()])

    def likelihood(theta):
        return direct_log_evidence(parts, theta[:SIZE], np.diag(theta[SIZE:])) / len(seen)

    def slopes(theta):
        h = 1e-4
        return [
            (likelihood(theta + h * e) - likelihood(theta - h * e)) / (2 * h)
            for e in np.eye(2 * SIZE)
        ]

    # Variances may end at zero, where the likelihood falls inwards.
    free = np.concatenate([np.ones(SIZE, bool), theta[SIZE:] > 1e-3])
    assert free.sum() >= 10
    np.testing.assert_allclose(np.array(slopes(theta))[free], 0, atol=1e-5)
    moved = np.concatenate([theta[:SIZE], 1.05 * theta[SIZE:]])
    assert np.abs(np.array(slopes(moved))[free]).max() > 1e-4


def test_low_rank_is_the_likeliest_of_its_rank():
    """Against scikit-learn, whose covariance of principal components is the same estimate."""
    from sklearn.decomposition import PCA

    flat = EVENTS.reshape(400, SIZE)
    expected = PCA(2).fit(flat).get_covariance() * 399 / 400
    found = Moments.fit(jnp.asarray(EVENTS), LowRank(2))
    np.testing.assert_allclose(found.covariance(), expected, rtol=1e-8)


@pytest.mark.usefixtures("as_user")
def test_bad_measurements_are_refused():
    def refused(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            Measurements(*args, **options)

    hole = np.where(PRESENT, NOISY, np.nan)
    refused("data must be finite where they are present, got", hole, 1.0)
    Measurements(hole, 1.0, present=PRESENT)
    refused("at least two measurements", NOISY[:1], 1.0)
    refused("variance must be positive and finite, got values from 0", NOISY, 0.0)
    refused("variance must be positive", NOISY, np.where(PRESENT, 1.0, np.nan))
    refused(r"variance must broadcast to data \(400, 2, 3\), got \(1, 5\)", NOISY, np.ones((1, 5)))
    refused("context must have one entry per measurement", NOISY, 1.0, context=jnp.ones(3))
    refused("must be linear", NOISY, 1.0, operator=lambda x, context: x + 1)
    refused("must be linear", NOISY, 1.0, operator=lambda x, context: x**2)
    refused(r"make data of shape \(2, 3\)", NOISY, 1.0, operator=lambda x, context: x[:1])
    refused("it fails", NOISY, 1.0, operator=mix, context=jnp.ones((400, 2, 5)))


@pytest.mark.usefixtures("as_user")
def test_bad_arguments_are_refused():
    seen = Measurements(NOISY, VARIANCE)
    with pytest.raises(ValueError, match="shrinkage None"):
        fit_gaussian(seen, Dense(), num_steps=1)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        fit_gaussian(seen, Diagonal(), num_steps=0)
    flat = Moments(jnp.zeros(6), jnp.ones(6))
    with pytest.raises(ValueError, match=r"start must be of events of shape \(2, 3\), got \(6,\)"):
        fit_gaussian(seen, Diagonal(), num_steps=1, start=flat)
    with pytest.raises(
        ValueError, match="rank must be below the size of an event, 6, and .* got 6"
    ):
        Moments.fit(jnp.asarray(EVENTS), LowRank(6))
