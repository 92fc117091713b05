"""Variational inference against closed forms: guides, bounds, evidence, k-hat, both forms."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats

import oracles
from oracles import A_M, COV_M, GAUSSIAN, MIXTURE, Y_M
from scoreprior.density import BoundDensity, FlowDensity
from scoreprior.flow import FixedGrid, Flow
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.vi import (
    ELBO,
    IAF,
    IWELBO,
    VI,
    FullRank,
    LowRank,
    MeanField,
    Pathfinder,
)
from scoreprior.vi.bounds import estimate
from scoreprior.vi.diagnose import diagnose
from scoreprior.vi.fitted import FittedGuide, data_of
from scoreprior.vi.frame import Frame
from stats import assert_cov, assert_masses, assert_mean, require_power

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(5)
# So that the posterior of the noise is correlated, 0.75.
A, Y, SD = jnp.array([[1.0, 0.0]]), jnp.array([1.5]), 0.3


def build(denoiser, density=None, num_steps=1):
    flow = Flow(denoiser, denoiser.moments(), sigma_min=0.1, solver=FixedGrid(num_steps))
    return ScorePrior(flow, density)


PRIOR = build(GAUSSIAN)
COV_Y = jnp.eye(1) * SD**2
LAW = oracles.at_level(GAUSSIAN, 0.1)
EXACT = oracles.posterior(PRIOR, A, Y, COV_Y)
LOG_EVIDENCE = float(LAW.log_evidence(A, Y, COV_Y))


def sharp(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(A @ x, SD).to_event(1), obs=y)


@functools.cache
def problem():
    return Problem.from_model(sharp, Y)


def run(engine, of=None, key=KEY):
    """Draws, without the k-hat warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "k-hat is")
        return engine.run(of or problem(), key, progress=False)


def number(draws, name):
    return float(draws.extra[name][1])


def values(draws, name="x"):
    x = jax.jit(jax.vmap(jax.vmap(draws.problem.constrain)))(draws.positions)[name]
    return np.asarray(x)[0]


def noise_law():
    """Mean and precision of the posterior of `u`, by the affine map that a Gaussian's flow is."""
    slope = A @ jax.jacfwd(PRIOR.flow.to_data)(jnp.zeros(2))
    precision = jnp.eye(2) + slope.T @ slope / SD**2
    residual = Y - A @ PRIOR.flow.to_data(jnp.zeros(2))
    return jnp.linalg.solve(precision, slope.T @ residual / SD**2), np.asarray(precision)


@pytest.mark.parametrize("guide", [FullRank(), LowRank(1)], ids=repr)
def test_a_gaussian_posterior_is_found_exactly(guide):
    draws = run(VI(guide, 1500, 40_000))
    assert abs(number(draws, "elbo") - LOG_EVIDENCE) < 1e-3
    assert abs(number(draws, "log_evidence") - LOG_EVIDENCE) < 1e-3
    # Where the weights do not vary, neither estimate has an error: the landing was stuck.
    assert number(draws, "elbo_se") < 5e-4
    mean, covariance = oracles.moments(EXACT)
    x = values(draws)
    assert_mean(x, mean)
    assert_cov(x, covariance)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_cov(x, 1.1 * covariance)


def test_mean_field_has_the_conditional_variances_and_the_known_gap():
    _, precision = noise_law()
    fitted = VI(MeanField(), 1500, 8000).fit(problem(), KEY, progress=False)
    variance = np.exp(2 * np.asarray(fitted.params["log_scale"]))
    np.testing.assert_allclose(variance, 1 / np.diag(precision), rtol=0.03)
    gap = (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1]) / 2
    draws = run(fitted)
    elbo, se = number(draws, "elbo"), number(draws, "elbo_se")
    assert abs(elbo - (LOG_EVIDENCE - gap)) <= 5 * se
    require_power(se, gap, bias=0.2)


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_k_hat_says_whether_a_guide_is_too_narrow(factor):
    """`factor` times the posterior's widths: in two dimensions the weights are exactly Pareto."""
    mean, precision = noise_law()
    tril = np.linalg.cholesky(np.linalg.inv(precision))
    lower = jnp.sqrt(2) * jnp.array([tril[1, 0] / tril[1, 1]])
    params = {"loc": mean, "log_scale": jnp.log(factor * np.diag(tril)), "lower": lower}
    frame = Frame(jnp.zeros(2), jnp.ones(2), (("x", (2,)),))
    num = 20_000
    guide = FittedGuide(FullRank(), params, frame, jnp.zeros(1), False, data_of(problem()), num)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = guide.run(problem(), KEY)
    assert [str(w.message)[:8] for w in caught] == (["k-hat is"] if factor == 0.5 else [])
    shape = 1 - factor**2
    assert abs(number(draws, "khat") - shape) <= 5 * (1 + shape) / np.sqrt(3 * np.sqrt(num))
    divergence = factor**2 - 1 - 2 * np.log(factor)
    error = number(draws, "elbo") - (LOG_EVIDENCE - divergence)
    assert abs(error) <= 5 * number(draws, "elbo_se")


def test_flows_bend_to_the_posterior_and_know_their_density():
    fitted = VI(IAF(), 1500).fit(problem(), KEY, progress=False)
    draws = fitted.run(problem(), KEY)
    elbo, se = number(draws, "elbo"), number(draws, "elbo_se")
    assert LOG_EVIDENCE - 0.03 < elbo < LOG_EVIDENCE + 5 * se
    few = {name: x[0, :20] for name, x in draws.positions.items()}
    log_q = draws.stats["lp"][0, :20] - draws.stats["log_weight"][0, :20]
    np.testing.assert_allclose(jax.vmap(fitted.log_prob)(few), log_q, rtol=1e-6)


# A plain Gaussian target in two dimensions, its evidence 1.
TARGET = dist.MultivariateNormal(
    jnp.array([0.3, -0.2]), precision_matrix=jnp.array([[2.0, 0.8], [0.8, 1.0]])
)
BROAD = {"loc": jnp.array([0.5, 0.0]), "log_scale": jnp.log(jnp.array([0.8, 0.9]))}


def estimates(bound, num, guide=MeanField(), params=BROAD, gradient=False):  # noqa: B008
    function = lambda params, key: estimate(bound, guide, params, TARGET.log_prob, key)
    function = jax.grad(function) if gradient else function
    keys = jax.random.split(KEY, num)
    return jax.jit(jax.vmap(function, (None, 0)))(params, keys)


def test_bounds_are_ordered_and_the_elbo_is_minus_the_divergence():
    elbo, tight = (np.asarray(estimates(b, 20_000)) for b in (ELBO(4), IWELBO(4)))
    q = MeanField().distribution(BROAD).base_dist
    full = dist.MultivariateNormal(q.loc, jnp.diag(q.scale**2))
    divergence = float(dist.kl_divergence(full, TARGET))
    assert_mean(elbo, -divergence)
    assert np.mean(elbo) + 5 * elbo.std() / 141 < np.mean(tight)
    assert np.mean(tight) + 5 * tight.std() / 141 < 0


def test_sticking_the_landing_changes_the_noise_and_not_the_gradient():
    class Costly(MeanField):
        has_cheap_density = False  # the plain estimator

    def rows(gradient):
        return np.concatenate([np.asarray(gradient[name]) for name in ("loc", "log_scale")], 1)

    stuck = rows(estimates(ELBO(4), 20_000, gradient=True))
    plain = rows(estimates(ELBO(4), 20_000, guide=Costly(), gradient=True))
    se = np.hypot(stuck.std(0), plain.std(0)) / np.sqrt(20_000)
    assert (np.abs(stuck.mean(0) - plain.mean(0)) <= 5 * se).all()
    require_power(se, np.abs(plain.mean(0)).max(), bias=0.1)
    # At the posterior itself nothing is left of the noise.
    scale_tril = np.linalg.cholesky(np.linalg.inv(TARGET.precision_matrix))
    scale = np.diag(scale_tril)
    lower = jnp.sqrt(2) * jnp.asarray([(scale_tril / scale[:, None])[1, 0]])
    params = {"loc": TARGET.loc, "log_scale": jnp.log(scale), "lower": lower}
    landed = estimates(ELBO(4), 100, guide=FullRank(), params=params, gradient=True)
    assert all(np.abs(leaf).max() < 1e-10 for leaf in landed.values())


@pytest.mark.parametrize("shape", [0.3, 0.6, 0.9])
def test_k_hat_is_the_shape_of_a_pareto_tail(shape):
    log_weights = shape * np.random.default_rng(1).exponential(size=40_000)
    found, weights = diagnose(log_weights)
    khat = float(found["khat"][1])
    tail = 3 * np.sqrt(len(log_weights))
    assert abs(khat - shape) <= 5 * (1 + shape) / np.sqrt(tail)
    theirs, their_khat = array_stats.psislw(-log_weights)
    np.testing.assert_allclose(khat, their_khat, atol=0.02)
    # They cut at the k-hat of 1/3 in another place; both are normalised.
    if shape > 0.4:
        np.testing.assert_allclose(np.log(weights), theirs - np.log(np.exp(theirs).sum()), atol=0.2)


# Two modes: the likelihood of a Gaussian prior is a mixture of Gaussians in the first entry.
MODES, MASSES, WIDTH = jnp.array([-3.0, 3.0]), jnp.array([0.75, 0.25]), 0.4


def two_modes():
    x = numpyro.sample("x", PRIOR)
    numpyro.factor(
        "modes", jax.nn.logsumexp(jnp.log(MASSES) + dist.Normal(MODES, WIDTH).log_prob(x[0]))
    )


def shares_of_modes():
    """Log evidence, and the mass of each mode."""
    cov_y = jnp.eye(1) * WIDTH**2
    each = jnp.stack([LAW.log_evidence(A, mode[None], cov_y) for mode in MODES])
    log_masses = each + jnp.log(MASSES)
    return float(jax.nn.logsumexp(log_masses)), np.asarray(jax.nn.softmax(log_masses))


@functools.cache
def bimodal():
    return Problem.from_model(two_modes)


def test_a_missed_mode_takes_its_mass_from_the_evidence():
    log_evidence, masses = shares_of_modes()
    assert masses.min() > 0.1
    draws = run(VI(FullRank(), 1500, 4000), bimodal())
    hits = (values(draws)[:, 0] > 0).mean()
    assert hits in (0, 1), "the guide sits on one mode"
    expected = log_evidence + np.log(masses[int(hits)])
    se = number(draws, "log_evidence_se")
    assert abs(number(draws, "log_evidence") - expected) <= 5 * se + 1e-3
    assert number(draws, "log_evidence") < log_evidence - 0.2


def test_paths_to_several_modes_add_up():
    log_evidence, masses = shares_of_modes()
    draws = run(Pathfinder(8, 20_000), bimodal())
    se = number(draws, "log_evidence_se")
    assert abs(number(draws, "log_evidence") - log_evidence) <= 5 * se
    require_power(se, 1.0, bias=0.1)
    ratios = np.exp(draws.stats["log_weight"][0] - draws.stats["log_weight"].max())
    # Weighted, then resampled: the noise of both.
    ess = 1 / (1 / 20_000 + (1 + ratios.var() / ratios.mean() ** 2) / 20_000)
    x = values(draws)
    assert_masses((x[:, 0] > 0).astype(int), masses, ess=ess)


@pytest.mark.parametrize("density", [FlowDensity(), BoundDensity(1024)], ids=["flow", "bound"])
def test_centred_inference_of_a_mixture_with_published_densities(density):
    prior = build(MIXTURE, density, 5)

    def model():
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.MultivariateNormal(A_M @ x, COV_M), obs=Y_M)

    exact = oracles.posterior(prior, A_M, Y_M, COV_M)
    law = oracles.at_level(MIXTURE, 0.1)
    # The error of the density, averaged over the posterior, is that of the evidence.
    x = jax.vmap(exact.sample)(jax.random.split(KEY, 2000))
    error = jax.jit(jax.vmap(lambda x: density.log_prob(prior.flow, x) - law.log_prob(x)))(x)
    shift = float(jax.nn.logsumexp(error) - jnp.log(2000))
    assert abs(shift) < 0.1
    truth = float(law.log_evidence(A_M, Y_M, COV_M)) + shift
    draws = run(VI(FullRank(), 600, 8000, centred=True, resample=True), Problem.from_model(model))
    se = number(draws, "log_evidence_se")
    assert abs(number(draws, "log_evidence") - truth) <= 5 * np.hypot(
        se, error.std() / np.sqrt(2000)
    )
    mean, covariance = oracles.moments(exact)
    assert_mean(values(draws), mean, ess=2500, bias=0.15)
    assert_cov(values(draws), covariance, ess=2500, bias=0.3)


def test_an_unknown_noise_level_by_resampled_draws():
    y = jnp.array([[-1.2, 0.3]])
    location, width = -0.5, 0.5

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(location, width))
        with numpyro.plate("image", 1):
            x = numpyro.sample("x", PRIOR)
            numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    exact = oracles.UnknownScale(PRIOR, y, location, width)
    draws = run(VI(FullRank(), 1500, 20_000, resample=True), Problem.from_model(model, y))
    # The steps of the fit see the bound that draws of the guide confirm, Jacobians included.
    steps = draws.extra["bound"][1][-300:]
    assert abs(steps.mean() - number(draws, "elbo")) <= 5 * steps.std() / np.sqrt(len(steps))
    require_power(steps.std() / np.sqrt(len(steps)), np.log(2), bias=1.0)
    ess = 8000
    mean, variance = exact.scale_moments()
    scale = values(draws, "scale")[:, None]
    assert_mean(scale, mean, ess=ess, bias=0.08)
    assert_cov(scale, variance, ess=ess, bias=0.2)
    assert_mean(values(draws)[:, 0], exact.mean()[0], ess=ess, bias=0.08)
