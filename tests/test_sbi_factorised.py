"""Posteriors of a series by its transitions."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from scoreprior import feynman_kac as fk
from scoreprior import sbi
from scoreprior.denoise import Gaussian
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior
from stats import assert_cov, assert_mean

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(17)
LEVELS = {"sigma_min": 3e-3, "sigma_max": 30.0}
PRIOR = Gaussian(Moments.dense(jnp.zeros(2), jnp.eye(2)))
NOISE = np.array([[0.5, 0.2], [0.2, 1.5]])


def score_prior(law):
    return ScorePrior(Flow(law, law.moments(), **LEVELS))


def given(operator, data, noise):
    """Of `data = operator z + N(0, noise)`."""
    return score_prior(PRIOR.posterior(*map(jnp.asarray, (operator, data, noise))))


def cloud(product, num_steps, size=6000):
    """Draws of equal weight, the evidence, and the least ESS."""
    model = product.composed(num_steps).model()
    state, info = jax.jit(lambda key: fk.run(model, fk.Resampling(), size, key))(KEY)
    rows = fk.systematic(KEY, jax.nn.softmax(state.log_weights), size)
    return state.particles[rows], float(state.log_evidence), float(info.ess.min())


# The series x_{t+1} = A x_t + z + N(0, NOISE), with z ~ N(0, I) its drift.

A, NUM = 0.7, 8


def stationary():
    """Mean, as a factor of `z`, and covariance of a state long after the start."""
    return np.eye(2) / (1 - A), NOISE / (1 - A**2)


def series():
    """States [NUM + 1, 2], the first far from where the drift takes them."""
    errors = np.random.default_rng(3).multivariate_normal(np.zeros(2), NOISE, NUM)
    states = [np.array([2.0, -3.0])]
    for error in errors:
        states.append(A * states[-1] + np.array([0.8, -0.4]) + error)
    return np.array(states)


def of_whole(x, starts_anywhere):
    """`z` and log density of the states as one Gaussian vector, after the first or with it."""
    num = len(x) - 1
    powers = np.tril(A ** np.maximum(np.subtract.outer(np.arange(num), np.arange(num)), 0))
    later = np.kron(powers, np.eye(2))
    drift, noise = later @ np.tile(np.eye(2), (num, 1)), later @ np.kron(np.eye(num), NOISE)
    noise = noise @ later.T
    first = np.kron(A ** np.arange(1, num + 1)[:, None], np.eye(2))  # what x_0 leaves in each
    if starts_anywhere:
        mean, covariance = stationary()
        drift = np.concatenate([mean, drift + first @ mean])
        root = np.concatenate([np.eye(2), first])
        noise = root @ covariance @ root.T + np.pad(noise, ((2, 0), (2, 0)))
        data = x.ravel()
    else:
        data = x[1:].ravel() - first @ x[0]
    law = dist.MultivariateNormal(jnp.zeros(len(data)), jnp.asarray(drift @ drift.T + noise))
    posterior = PRIOR.posterior(*map(jnp.asarray, (drift, data, noise)))
    return posterior.moments(), float(law.log_prob(jnp.asarray(data)))


def log_normal(x, covariance):
    law = dist.MultivariateNormal(jnp.zeros(2), jnp.asarray(covariance))
    return float(law.log_prob(jnp.asarray(x)))


@pytest.mark.parametrize("starts_anywhere", [False, True])
def test_transitions_of_a_series_give_the_posterior_of_the_whole(starts_anywhere):
    """A first state that tells of the drift is one observation more."""
    x = series()
    truth, log_joint = of_whole(x, starts_anywhere)
    gains = x[1:] - A * x[:-1]
    posteriors = [given(np.eye(2), gain, NOISE) for gain in gains]
    log_single = sum(log_normal(gain, np.eye(2) + NOISE) for gain in gains)
    if starts_anywhere:
        mean, covariance = stationary()
        posteriors.append(given(mean, x[0], covariance))
        log_single += log_normal(x[0], mean @ mean.T + covariance)
    draws, log_evidence, _ = cloud(sbi.compose(posteriors, PRIOR), 60)
    assert_mean(draws, truth.mean, bias=0.1)
    assert_cov(draws, truth.covariance(), bias=0.15)
    assert abs(log_evidence - (log_joint - log_single)) < 2e-3


def test_states_drawn_from_the_series_itself_count_twice():
    """In training the first state of a pair must not depend on the parameters."""
    x = series()
    mean, covariance = stationary()
    noise = np.zeros((4, 4))
    noise[:2, :2], noise[2:, 2:] = covariance, NOISE
    posteriors = [
        given(np.concatenate([mean, np.eye(2)]), np.concatenate([old, new - A * old]), noise)
        for old, new in itertools.pairwise(x)
    ]
    draws, _, _ = cloud(sbi.compose(posteriors, PRIOR), 60)
    with pytest.raises(AssertionError, match="covariance"):
        assert_cov(draws, of_whole(x, starts_anywhere=False)[0].covariance(), bias=0.15)


@pytest.mark.slow
def test_the_example_of_the_documentation_is_right():
    """`theta` given 12 transitions: `N(0, 1)` times those of standard deviation 0.3."""
    page = (Path(__file__).parents[1] / "docs" / "simulation-based.md").read_text()
    section = page.split("## Time series")[1]
    block = re.search(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(block[1], names)
    gains = np.asarray(names["series"][1:] - 0.5 * names["series"][:-1])
    assert len(gains) == 12
    precision = 1 + 12 / 0.3**2
    mean, sd = gains.sum() / 0.3**2 / precision, precision**-0.5
    draws = np.asarray(names["theta"])
    assert abs(draws.mean() - mean) < 0.5 * sd
    assert abs(draws.std() / sd - 1) < 0.2
    # One transition alone says much less.
    assert sd < 0.35 * (1 + 1 / 0.3**2) ** -0.5
