"""The statistical gates pass on the truth and fail on a planted bias of five per cent."""

import numpy as np
import pytest

from stats import (
    assert_cov,
    assert_cov_of_chains,
    assert_masses,
    assert_mean,
    assert_mean_of_chains,
    assert_mean_of_groups,
    assert_proportion,
    assert_same_mean,
    chain_ess,
    require_power,
)

COV = np.array([[1.0, 0.6], [0.6, 2.0]])
MEAN = np.array([0.5, -1.0])
SD = np.sqrt(np.diag(COV))


def gaussian(n, seed=0):
    return np.random.default_rng(seed).multivariate_normal(MEAN, COV, size=n)


def chains(n, seed=0, num_chains=4, memory=0.5):
    """Autoregressive chains with law N(MEAN, COV) and a known loss of efficiency."""
    rng = np.random.default_rng(seed)
    noise = rng.multivariate_normal(np.zeros(2), COV, size=(num_chains, n))
    state = noise[:, 0]
    out = np.empty_like(noise)
    for i in range(n):
        state = memory * state + np.sqrt(1 - memory**2) * noise[:, i] if i else state
        out[:, i] = state
    return MEAN + out


def fails(assertion, *args, match, **kwargs):
    with pytest.raises(AssertionError, match=match):
        assertion(*args, **kwargs)


def test_mean():
    draws = gaussian(20_000)
    assert_mean(draws, MEAN)
    fails(assert_mean, draws, MEAN + [0, 0.05 * SD[1]], match="component 1")
    fails(assert_mean, draws[:5_000], MEAN, match="no power")
    assert_mean(draws[:5_000], MEAN, bias=0.1)
    fails(assert_mean, draws, MEAN, ess=5_000, match="no power")


def test_mean_of_groups():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 150, size=400)
    shift = rng.standard_normal((400, 2)) / np.sqrt(100)  # shared by the draws of a group
    labels = np.repeat(np.arange(400), sizes)
    draws = gaussian(len(labels)) + shift[labels]
    assert_mean_of_groups(draws, labels, MEAN)
    fails(assert_mean_of_groups, draws, labels, MEAN + [0, 0.1], match="component 1")
    # Without the groups the gate would be too narrow by a factor of 1.4, or too wide with few.
    few = labels < 40
    fails(assert_mean_of_groups, draws[few], labels[few], MEAN, match="no power")


def test_mean_keeps_the_shape_of_events_and_the_rounding_of_constants():
    draws = np.stack([gaussian(20_000), np.full((20_000, 2), 0.1)], axis=1)
    assert_mean(draws, np.stack([MEAN, [0.1, 0.1]]))
    fails(assert_mean, draws, np.stack([MEAN, [0.1, 0.1001]]), match="component 3")


@pytest.mark.parametrize("planted", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails(planted):
    draws = gaussian(20_000)
    draws[7, 0] = planted
    with np.errstate(invalid="ignore"):
        fails(assert_mean, draws, MEAN, match="component 0")


def test_cov():
    draws = gaussian(40_000)
    assert_cov(draws, COV)
    fails(assert_cov, draws, COV * [[1.05, 1], [1, 1]], match="component 0")
    fails(assert_cov, draws, COV + [[0, 0.08], [0.08, 0]], match="2 of 4")
    fails(assert_cov, draws, COV, ess=[40_000, 1_000], match="no power")


def test_chains_use_their_effective_sample_size():
    draws = chains(30_000)
    efficiency = chain_ess(draws) / draws[..., 0].size
    np.testing.assert_allclose(efficiency, 1 / 3, rtol=0.1)
    assert_mean_of_chains(draws, MEAN)
    assert_cov_of_chains(draws, COV)
    fails(assert_mean_of_chains, draws, MEAN + 0.05 * SD, match="2 of 2")
    fails(assert_cov_of_chains, draws, 1.05 * COV, match="covariance")
    fails(assert_mean_of_chains, draws[:, :5_000], MEAN, match="no power")


def test_proportion():
    hits = np.random.default_rng(1).binomial(5_000, 0.9)
    assert_proportion(hits, 5_000, 0.9)
    fails(assert_proportion, hits, 5_000, 0.95, match="proportion")
    fails(assert_proportion, hits, 5_000, 0.85, match="proportion")
    fails(assert_proportion, 50, 100, 0.5, match="no power")


def test_masses():
    weights = np.array([0.5, 0.3, 0.2])
    labels = np.random.default_rng(2).choice(3, size=5_000, p=weights)
    assert_masses(labels, weights)
    assert_masses(np.eye(3)[labels], weights)
    fails(assert_masses, labels, weights + [0.05, -0.05, 0], match="mass")
    fails(assert_masses, np.where(labels == 2, 1, labels), weights, match="component 2")
    fails(assert_masses, labels, weights, ess=100, match="no power")


def test_same_mean():
    a, b = gaussian(40_000, seed=3), gaussian(40_000, seed=4)
    assert_same_mean(a, b)
    fails(assert_same_mean, a, b + 0.05 * SD, match="2 of 2")
    fails(assert_same_mean, a, b[:1_000], match="no power")


def test_power_is_a_share_of_the_scale():
    require_power(0.05 / 7.01, 1.0)
    fails(require_power, 0.05 / 6.99, 1.0, match="no power")
    require_power(0.2 / 7.01, 1.0, bias=0.2)
    fails(require_power, [0.0, np.nan], 1.0, match="1 of 2")
