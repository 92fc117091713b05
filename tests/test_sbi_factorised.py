"""Posteriors of a series by its transitions, and of many observations by subsets of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from scoreprior import feynman_kac as fk
from scoreprior import sbi
from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior
from scoreprior.sample import Ancestral, LogGrid, sample
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


# Subsets of m of the observations x_i = z + N(0, NOISE).

X = np.random.default_rng(5).multivariate_normal([0.5, -1.0], np.eye(2) + NOISE, 6)


def subsets(x, m):
    return [x[i : i + m] for i in range(0, len(x), m)]


def of_items(x):
    """Gaussian posterior of all items together."""
    some = len(x)
    noise = np.kron(np.eye(some), NOISE)
    return PRIOR.posterior(
        *map(jnp.asarray, (np.tile(np.eye(2), (some, 1)), np.ravel(x), noise))
    ).moments()


def displaced(x, by):
    """The posterior of `x` whose mean is wrong by `by` standard deviations of its own."""
    moments = of_items(x)
    root = jnp.linalg.cholesky(moments.covariance())
    mean = moments.mean + by * root @ jnp.ones(2)
    return score_prior(Gaussian(Moments.dense(mean, moments.covariance())))


def test_errors_of_subsets_add_up_to_less_than_errors_of_single_observations():
    """`c` of its own deviation in each factor makes `c sqrt(n / m)` or more of that of all."""
    truth, by = of_items(X), 0.3
    white = np.linalg.inv(np.linalg.cholesky(np.asarray(truth.covariance())))
    errors = {}
    for m in (1, 3, 6):
        product = sbi.compose([displaced(part, by) for part in subsets(X, m)], PRIOR)
        draws, _, _ = cloud(product, 60)
        assert_cov(draws, truth.covariance(), bias=0.15)
        pull = np.zeros(2)
        for part in subsets(X, m):
            pull += by * np.linalg.inv(np.linalg.cholesky(of_items(part).covariance())).sum(0)
        assert_mean(draws, truth.mean + truth.covariance() @ pull, bias=0.1)
        errors[m] = np.linalg.norm(white @ (np.asarray(draws).mean(0) - truth.mean)) / by / 2**0.5
    # (n / m) sqrt((1 + m l) / (1 + n l)) where an observation adds l times the prior's precision.
    assert errors[6] < 1.2
    assert 1.4 < errors[3] < 1.7
    assert errors[1] > 3


def mixture(x):
    """The posterior of `x_i = z + N(0, c I)`, `c` one of 2.25 and 1/9, and `log p(x)`."""
    logs, means, variances = np.zeros(1), np.zeros((1, 2)), np.ones((1, 2))
    for item in x:
        parts = []
        for c in (2.25, 1 / 9):
            total = variances + c
            fit = -((item - means) ** 2 / total + np.log(2 * np.pi * total)).sum(1) / 2
            mean = (means * c + item * variances) / total
            parts.append((logs + fit + np.log(0.5), mean, variances * c / total))
        logs, means, variances = map(np.concatenate, zip(*parts, strict=True))
    log_evidence = np.logaddexp.reduce(logs)
    weights = jnp.asarray(np.exp(logs - log_evidence))
    return GaussianMixture.diagonal(weights, jnp.asarray(means), jnp.asarray(variances)), (
        log_evidence
    )


def of_subsets(x, m):
    return [score_prior(mixture(part)[0]) for part in subsets(x, m)]


def test_subsets_give_the_posterior_and_the_evidence_of_all():
    x = X[:4]
    truth, log_evidence = mixture(x)
    draws, found, ess = cloud(sbi.compose(of_subsets(x, 2), PRIOR), 300)
    assert_mean(draws, truth.moments().mean, ess=ess / 2, bias=0.2)
    assert_cov(draws, truth.moments().covariance(), ess=ess / 2, bias=0.4)
    assert abs(found - log_evidence + sum(mixture(part)[1] for part in subsets(x, 2))) < 0.08


def test_without_weights_subsets_are_wrong_until_one_holds_all():
    """Sums of scores, whose law depends on what is summed; one factor alone is a diffusion."""
    x = X[:4]
    truth = mixture(x)[0].moments()

    def check(m):
        score = sbi.Sum(sbi.compose(of_subsets(x, m), PRIOR, bridge=False))
        start = Moments.dense(jnp.zeros(2), jnp.zeros((2, 2)))
        grid = LogGrid(LEVELS["sigma_min"], LEVELS["sigma_max"])(400)
        draws = sample(score, start, 4000, key=KEY, sigmas=grid, sampler=Ancestral())
        assert_mean(draws, truth.mean, bias=0.15)
        assert_cov(draws, truth.covariance(), bias=0.25)

    check(4)
    for m in (1, 2):
        with pytest.raises(AssertionError, match="mean"):
            check(m)


def test_annealed_langevin_lags_behind_more_the_larger_the_subsets():
    """Its path narrows late, so that five steps a level do not follow; fifty do, nearly."""
    truth = of_items(X)
    precision = np.linalg.inv(np.asarray(truth.covariance()))

    def divergence(m, num_steps):
        """From the Gaussian of the draws to the posterior, nats."""
        posteriors = [score_prior(Gaussian(of_items(part))) for part in subsets(X, m)]
        score = sbi.FNPSE(sbi.compose(posteriors, PRIOR, bridge=False))
        levels = {"sigma_max": 30.0, "sigma_min": 0.01, "num_levels": 100}
        draws = sbi.annealed_langevin(score, 4000, key=KEY, num_steps=num_steps, **levels)
        ratio = precision @ np.cov(np.asarray(draws).T)
        off = np.asarray(draws.mean(0) - truth.mean)
        return (np.trace(ratio) - 2 - np.linalg.slogdet(ratio)[1] + off @ precision @ off) / 2

    lags = [divergence(m, 5) for m in (1, 6)]
    assert 0.02 < lags[1] < 0.08
    assert lags[1] > 3 * lags[0]
    assert divergence(6, 50) < lags[1] / 5
