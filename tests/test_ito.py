"""Log densities along sampled paths: closed forms, the flow, order of convergence, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import A_M, COV_M, GAUSSIAN, MIXTURE, Y_M, at_level
from priors import network
from scoreprior.denoise import AbstractDenoiser
from scoreprior.density import FlowDensity
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.ito import sample_with_log_density
from scoreprior.sample import LogGrid
from stats import assert_cov, assert_mean

KEY = jax.random.key(0)
GRID = LogGrid(0.1, 50.0)


def drawn(denoiser, num_steps, moments=None, num_samples=4000, **options):
    moments = denoiser.moments() if moments is None else moments
    return sample_with_log_density(
        denoiser, moments, num_samples, key=KEY, sigmas=GRID(num_steps), **options
    )


def errors(law, num_steps):
    """Of the log density of every path's end, in nats."""
    x, log_density = drawn(law, num_steps)
    return np.asarray(log_density - jax.vmap(lambda x: law.log_prob(x, 0.1))(x))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_gaussian_data_need_one_step(num_steps):
    x, log_density = drawn(GAUSSIAN, num_steps, num_samples=45_000)
    exact = jax.vmap(lambda x: GAUSSIAN.log_prob(x, 0.1))(x)
    np.testing.assert_allclose(log_density, exact, atol=1e-10)
    law = at_level(GAUSSIAN, 0.1).law
    assert_mean(x, law.mean)
    assert_cov(x, law.covariance())


def test_paths_converge_with_order_one_half():
    """Sixteen times the steps, a quarter of the error; and its mean, of order one, is smaller."""
    coarse, fine = errors(MIXTURE, 25), errors(MIXTURE, 400)
    assert 0.2 < fine.std() / coarse.std() < 0.3
    assert fine.std() < 0.08
    assert abs(fine.mean()) < 0.01 < coarse.mean()


def test_wrong_moments_cost_steps_and_nothing_else():
    """Those of other data, in another basis: the start and the kernels are wrong, the limit not."""
    moments = Moments.dense(jnp.array([0.5, 0.0]), jnp.array([[2.0, -0.5], [-0.5, 1.0]]))
    x, log_density = drawn(GAUSSIAN, 800, moments)
    error = log_density - jax.vmap(lambda x: GAUSSIAN.log_prob(x, 0.1))(x)
    assert 1e-3 < float(error.std()) < 0.08
    assert abs(float(error.mean())) < 0.01


def test_the_flow_has_the_same_density():
    """For an exact denoiser; that of a trained one has a law for each of the two."""
    x, log_density = drawn(MIXTURE, 400, num_samples=100)
    flow = Flow(MIXTURE, MIXTURE.moments(), sigma_min=0.1)
    by_flow = jax.jit(jax.vmap(lambda x: FlowDensity().log_prob(flow, x)))(x)
    assert float(jnp.std(log_density - by_flow)) < 0.1
    assert float(jnp.std(by_flow)) > 0.5


@pytest.mark.parametrize("num_steps", [3, 25])
@pytest.mark.parametrize("denoiser", [MIXTURE, network()], ids=["exact", "untrained"])
def test_the_weights_of_draws_have_the_evidence_as_mean(denoiser, num_steps):
    """For any number of steps and any denoiser: `f` is an exact prior times a likelihood."""
    law = at_level(MIXTURE, 0.1)
    moments = Moments.dense(MIXTURE.moments().mean, 1.5 * MIXTURE.moments().covariance())
    x, log_density = drawn(denoiser, num_steps, moments, num_samples=40_000)

    def log_joint(x):
        normal = jax.scipy.stats.multivariate_normal
        return law.log_prob(x) + normal.logpdf(Y_M, A_M @ x, COV_M)

    log_evidence = law.log_evidence(A_M, Y_M, COV_M)
    weights = jnp.exp(jax.vmap(log_joint)(x) - log_density - log_evidence)
    assert_mean(weights[:, None], 1.0)
    assert 5 * float(weights.std()) / 200 < 0.3


class Scaled(AbstractDenoiser):
    """A denoiser with a context: data `context` times as large."""

    def __call__(self, x, sigma, context=None):
        return context**2 / (context**2 + sigma**2) * x


def test_a_context_reaches_the_denoiser():
    moments = Moments(jnp.zeros(2), jnp.full(2, 9.0))
    x, log_density = drawn(Scaled(), 2, moments, num_samples=100, context=jnp.asarray(3.0))
    exact = jax.vmap(lambda x: moments.log_prob(x, 0.1))(x)
    np.testing.assert_allclose(log_density, exact, atol=1e-10)


def test_bad_levels_are_named():
    moments = MIXTURE.moments()
    with pytest.raises(ValueError, match="sigmas must hold at least two levels, got shape"):
        sample_with_log_density(MIXTURE, moments, 2, key=KEY, sigmas=jnp.array([1.0]))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        sample_with_log_density(MIXTURE, moments, 0, key=KEY, sigmas=GRID(2))
    for sigmas in ([1.0, 2.0], [1.0, 0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="sigmas must be positive and decreasing"):
            sample_with_log_density(MIXTURE, moments, 2, key=KEY, sigmas=jnp.array(sigmas))
