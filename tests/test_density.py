"""Density policies: values, gradients and standard errors against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.density import (
    BoundDensity,
    Exact,
    FlowDensity,
    Hutchinson,
    ScoreGradient,
    ScoreOnly,
)
from scoreprior.flow import Adaptive, ArctanTime, FixedGrid, Flow
from scoreprior.gaussian import Moments
from stats import assert_mean

SHAPE, SIGMA = (2, 2), 0.1
KEYS = jax.random.split(jax.random.key(5), 4)
FACTOR = jax.random.normal(KEYS[0], (4, 4))
MIXTURE = GaussianMixture.shared(
    jnp.array([0.3, 0.5, 0.2]),
    2 * jax.random.normal(KEYS[1], (3, *SHAPE)),
    0.1 * FACTOR @ FACTOR.T + 0.2 * jnp.eye(4),
)
SOLVER = FixedGrid(30, ArctanTime(1.5))
FLOW = Flow(MIXTURE, MIXTURE.moments(), sigma_min=SIGMA, sigma_max=300.0, solver=SOLVER)
X = jax.random.normal(KEYS[2], SHAPE)


class Linear(eqx.Module):
    """A denoiser that is no gradient and not quite Gaussian data's: D = m + M (x - m)."""

    matrix: jax.Array

    def __call__(self, x, sigma, context=None):
        return (self.matrix @ x.ravel()).reshape(x.shape) / (1 + sigma**2)


def test_exact_trace_in_batches_is_the_trace():
    function = lambda x: jnp.sin(x) @ FACTOR[:2, :2]
    jacobian = jax.jacfwd(lambda flat: function(flat.reshape(SHAPE)).ravel())(X.ravel())
    for batch_size in (None, 1, 3):
        trace = Exact(batch_size)(function, X)
        np.testing.assert_allclose(trace, jnp.trace(jacobian)[None], rtol=1e-12)


class Probes(Hutchinson):
    """Hutchinson with its probes as an array, so that they can be mapped over."""

    probes: jax.Array | None = None

    def __call__(self, function, x):
        _, push = jax.linearize(function, x)
        return jax.vmap(lambda v: jnp.vdot(v, push(v)))(self.probes)


def test_hutchinson_is_unbiased_with_an_honest_standard_error():
    # Unbiased on any one grid: a coarse one keeps 20,000 solves quick.
    coarse = eqx.tree_at(lambda f: f.solver, FLOW, FixedGrid(4, ArctanTime(1.5)))
    truth = FlowDensity().log_prob(coarse, X)

    def estimate(key):
        policy = FlowDensity(Probes(8, probes=jax.random.rademacher(key, (8, *SHAPE), float)))
        return policy.log_prob(coarse, X), policy.standard_error(coarse, X)

    values, errors = jax.jit(jax.vmap(estimate))(jax.random.split(KEYS[3], 20_000))
    assert_mean(values[:, None], truth[None])
    # The standard error of 8 probes, squared, is an unbiased estimate of the variance.
    np.testing.assert_allclose(jnp.mean(errors**2), jnp.var(values), rtol=0.1)
    policy = FlowDensity(Hutchinson(8))
    assert abs(policy.log_prob(coarse, X) - truth) < 5 * policy.standard_error(coarse, X)


def test_hutchinson_is_one_function_and_noiseless_for_gaussian_data():
    policy = FlowDensity(Hutchinson(2))
    assert policy.log_prob(FLOW, X) == policy.log_prob(FLOW, X)
    law = MIXTURE.moments()
    gaussian = Flow(Gaussian(law), law, sigma_min=SIGMA)
    np.testing.assert_allclose(policy.log_prob(gaussian, X), law.log_prob(X, SIGMA), rtol=1e-9)
    assert float(policy.standard_error(gaussian, X)) < 1e-9
    assert float(FlowDensity(Hutchinson(1)).standard_error(FLOW, X)) == float("inf")
    assert float(FlowDensity().standard_error(FLOW, X)) == 0


def test_gradient_through_the_flow_is_the_score_of_the_exact_denoiser():
    gradient = jax.grad(lambda x: FlowDensity().log_prob(FLOW, x))(X)
    np.testing.assert_allclose(gradient, MIXTURE.score(X, SIGMA), rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_score_gradient_replaces_the_gradient_and_nothing_else(sigma):
    plain, scored = FlowDensity(), FlowDensity(gradient=ScoreGradient(sigma))
    assert plain.log_prob(FLOW, X) == scored.log_prob(FLOW, X)
    function = lambda x: scored.log_prob(FLOW, x)
    expected = (MIXTURE(X, sigma) - X) / sigma**2
    np.testing.assert_allclose(jax.grad(function)(X), expected, rtol=1e-10)
    np.testing.assert_allclose(jax.jacfwd(function)(X), expected, rtol=1e-10)
    jacobian_of_score = jax.jacfwd(lambda x: (MIXTURE(x, sigma) - x) / sigma**2)(X)
    np.testing.assert_allclose(jax.hessian(function)(X), jacobian_of_score, rtol=1e-8)


def test_score_gradient_still_differentiates_parameters_through_the_solver():
    denoiser = Linear(0.3 * FACTOR)
    moments = Moments(jnp.zeros(SHAPE), jnp.ones(SHAPE))

    def gradient(policy):
        def value(denoiser):
            flow = Flow(denoiser, moments, sigma_min=SIGMA, sigma_max=20.0, solver=FixedGrid(6))
            return policy.log_prob(flow, X)

        return jax.grad(value)(denoiser).matrix

    expected = gradient(FlowDensity())
    np.testing.assert_allclose(
        gradient(FlowDensity(gradient=ScoreGradient(0.3))), expected, rtol=1e-10
    )
    assert float(jnp.abs(expected).max()) > 0.1


def test_gradient_alone_with_a_score_needs_no_solve():
    scored = FlowDensity(gradient=ScoreGradient(0.3))
    value = lambda x: scored.log_prob(FLOW, x)
    loops = lambda function: jax.jit(function).lower(X).compile().as_text().count("while(")
    assert loops(value) > 0
    assert loops(jax.grad(value)) == 0


def test_adaptive_solver_serves_both_gradients():
    flow = Flow(
        MIXTURE, MIXTURE.moments(), sigma_min=SIGMA, sigma_max=300.0, solver=Adaptive(1e-8, 1e-8)
    )
    for policy in (FlowDensity(), FlowDensity(gradient=ScoreGradient(SIGMA))):
        gradient = jax.grad(lambda x, policy=policy: policy.log_prob(flow, x))(X)
        np.testing.assert_allclose(gradient, MIXTURE.score(X, SIGMA), rtol=1e-5)


def test_bound_is_tight_for_the_exact_score_and_noiseless_for_gaussian_data():
    policy = BoundDensity(40_000, seed=1)
    estimates = policy.estimates(FLOW, X)
    gap = MIXTURE.log_prob(X, SIGMA) - FLOW.moments.log_prob(X, SIGMA)
    assert_mean(estimates[:, None], gap[None])
    np.testing.assert_allclose(policy.log_prob(FLOW, X), MIXTURE.log_prob(X, SIGMA), atol=0.2)
    law = MIXTURE.moments()
    gaussian = Flow(Gaussian(law), law, sigma_min=SIGMA)
    np.testing.assert_allclose(
        BoundDensity(2).log_prob(gaussian, X), law.log_prob(X, SIGMA), rtol=1e-8
    )


def test_bound_lies_below_the_density_of_a_wrong_score():
    """A denoiser that is wrong loses `int |D - D_true|^2 / sigma^3 dsigma` on average: for Gaussian
    data seen by a Gaussian of another variance, a closed form.
    """
    truth, wrong = 1.0, 4.0
    law = Moments(jnp.zeros(1), jnp.full(1, truth))
    flow = Flow(
        Gaussian(Moments(jnp.zeros(1), jnp.full(1, wrong))), law, sigma_min=SIGMA, sigma_max=1e4
    )
    draws = (truth + SIGMA**2) ** 0.5 * jax.random.normal(KEYS[0], (4000, 1))
    policy = BoundDensity(512, seed=2)
    losses = jax.vmap(lambda x: law.log_prob(x, SIGMA) - policy.log_prob(flow, x))(draws)
    log_sigma = jnp.linspace(jnp.log(SIGMA), jnp.log(1e4), 20_001)
    sigma = jnp.exp(log_sigma)
    excess = (wrong / (wrong + sigma**2) - truth / (truth + sigma**2)) ** 2 * (truth + sigma**2)
    expected = jnp.trapezoid(excess / sigma**2, log_sigma)
    assert float(expected) > 0.1
    np.testing.assert_allclose(jnp.mean(losses), expected, rtol=0.1)


def test_score_only_says_what_to_do():
    with pytest.raises(NotImplementedError, match="ScoreOnly has no log_prob"):
        ScoreOnly().log_prob(FLOW, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Hutchinson(0), "num_probes must be at least 1, got 0"),
        (lambda: Hutchinson(1, seed=-1), "seed must be at least 0, got -1"),
        (lambda: ScoreGradient(0.0), "sigma must be a positive finite number, got 0.0"),
        (lambda: BoundDensity(3), "num_times must be even, got 3"),
        (lambda: Exact(0), "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_default_level_of_the_score_follows_the_flow():
    by_default = jax.grad(lambda x: FlowDensity(gradient=ScoreGradient()).log_prob(FLOW, x))(X)
    level = 1.25 * SIGMA
    np.testing.assert_allclose(by_default, (MIXTURE(X, level) - X) / level**2, rtol=1e-10)
