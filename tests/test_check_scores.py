"""Scores of posteriors at the truth, against closed forms, and that they are proper."""

from math import gamma, pi, sqrt

import numpy as np
import pytest
from scipy.stats import norm

from scoreprior import check
from stats import assert_mean

NUM = 100_000


@pytest.mark.parametrize("num_draws", [2, 5])
@pytest.mark.parametrize("z", [0.0, 1.5])
def test_crps_of_a_gaussian(num_draws, z):
    """Unbiased for few draws too: dividing by num^2 is off by 14 % with five, 70 % with two."""
    rng = np.random.default_rng(0)
    draws = 3.0 + 2.0 * rng.standard_normal((num_draws, NUM))
    found = check.crps(np.full(NUM, 3.0 + 2.0 * z), draws)
    exact = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / sqrt(pi)
    assert_mean(found, 2.0 * exact)


def test_crps_is_the_integral_over_thresholds():
    """`int (F - 1{x >= y})^2 dx` of the empirical `F`, which has num^2 for num (num - 1)."""
    draws, y = np.array([0.0, 1.0, 4.0]), 2.0
    integral = (1 / 3) ** 2 * 1 + (2 / 3) ** 2 * 1 + (1 / 3) ** 2 * 2
    half_of_all_pairs = (1.0 + 4.0 + 3.0) / 9
    assert check.crps(y, draws) == pytest.approx(
        integral + half_of_all_pairs * (1 - 9 / 6), rel=1e-12
    )


@pytest.mark.parametrize("d", [1, 3])
def test_energy_score_of_a_gaussian(d):
    """At the mean, `(sqrt(2) - 1) s Gamma((d + 1) / 2) / Gamma(d / 2)`."""
    rng = np.random.default_rng(1)
    draws = 2.0 * rng.standard_normal((20_000, 5, d))
    found = [check.energy_score(np.zeros(d), each) for each in draws]
    assert_mean(found, 2.0 * (sqrt(2) - 1) * gamma((d + 1) / 2) / gamma(d / 2))


def test_energy_score_of_one_entry_is_the_crps():
    rng = np.random.default_rng(2)
    draws = rng.standard_normal((3000, 1, 1))
    found = check.energy_score(np.array([[0.4]]), draws)
    assert found == pytest.approx(check.crps(np.array([[0.4]]), draws).item(), rel=1e-10)


def spread_only(truth, draws):
    """`E|X - y|`, which is no proper score."""
    return float(np.linalg.norm(draws - truth, axis=-1).mean())


def gains(score, spoil):
    """By how much the right posterior is better, [replicate]: `x ~ N(0, C)`, and draws of it."""
    rng = np.random.default_rng(3)
    root = np.array([[1.0, 0.0], [0.8, 0.6]])
    truths = rng.standard_normal((3000, 2)) @ root.T
    noise = rng.standard_normal((3000, 20, 2))
    return np.array(
        [
            score(truth, spoil(each, root)) - score(truth, each @ root.T)
            for truth, each in zip(truths, noise, strict=True)
        ]
    )


SPOILT = {
    "narrow": lambda noise, root: 0.5 * noise @ root.T,
    "wide": lambda noise, root: 2.0 * noise @ root.T,
    "shifted": lambda noise, root: noise @ root.T + np.array([0.5, 0.0]),
    "uncorrelated": lambda noise, root: noise,
}


@pytest.mark.parametrize("how", SPOILT)
def test_the_right_posterior_scores_best(how):
    def mean_crps(truth, draws):
        return float(check.crps(truth, draws).mean())

    for score in (check.energy_score, mean_crps):
        if score is mean_crps and how == "uncorrelated":
            continue  # the margins are right
        gain = gains(score, SPOILT[how])
        assert gain.mean() > 5 * gain.std() / sqrt(len(gain))


def test_an_improper_score_prefers_a_narrow_posterior():
    """The negative control: what the test above would see of a score that is not proper."""
    gain = gains(spread_only, SPOILT["narrow"])
    assert gain.mean() < -5 * gain.std() / sqrt(len(gain))


def test_psnr_is_decibels_of_the_peak():
    truth = np.zeros((4, 4))
    assert check.psnr(truth, truth + 1.6, peak=16.0) == pytest.approx(20.0, rel=1e-12)
    assert check.psnr(truth, truth, peak=1.0) == np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check.crps(np.zeros(2), np.zeros((5, 3))), r"\(2,\) and \(5, 3\)"),
        (lambda: check.crps(0.0, np.zeros(1)), "draws must be at least two, got 1"),
        (lambda: check.energy_score(np.zeros(1), np.full((5, 1), np.nan)), "draws"),
        (lambda: check.psnr(np.zeros(2), np.zeros(3), peak=1.0), r"\(2,\) and \(3,\)"),
        (lambda: check.psnr(np.zeros(2), np.ones(2), peak=0.0), "peak"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
