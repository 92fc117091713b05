"""Waste-free, persistent and nested engines find the right posterior and evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
import scoreprior.smc.nested as nested
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M
from scoreprior._run import Chunk
from scoreprior.compare import Clusters
from scoreprior.denoise import Gaussian
from scoreprior.gaussian import Moments
from scoreprior.problem import Problem
from scoreprior.smc import HMCMoves, NestedSampling, PersistentSMC, TemperedSMC
from stats import GATE
from two_priors import PRIOR_G, PRIOR_M, build, check_evidence, check_law, run

pytestmark = [pytest.mark.promotes_ranks, pytest.mark.slow]

ENGINES = {
    "waste-free": TemperedSMC(400, 40, num_ancestors=40, kernel=HMCMoves(3)),
    "persistent": PersistentSMC(150, 40, 400),
    "nested": NestedSampling(100, 40, 400),
}


def mixture(y):
    m = numpyro.sample("m", PRIOR_M)
    numpyro.sample("y", dist.MultivariateNormal(A_M @ m, COV_M), obs=y)


def evidence_of_mixture(scale=1.0):
    law = oracles.at_level(MIXTURE, 0.1)
    return float(law.log_evidence(A_M, Y_M, scale**2 * COV_M))


@pytest.mark.parametrize("name", ENGINES)
def test_posterior_and_evidence_of_a_mixture_prior(name):
    draws, flat = run(mixture, ENGINES[name], Y_M)
    check_law(draws, flat["m"], oracles.posterior(PRIOR_M, A_M, Y_M, COV_M), bias=0.2)
    check_evidence(draws, evidence_of_mixture(), bias=0.2)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_law(draws, flat["m"], oracles.posterior(PRIOR_M, A_M, Y_M, 0.8 * COV_M), bias=0.2)
    with pytest.raises(AssertionError, match="log evidence"):
        check_evidence(draws, evidence_of_mixture(scale=1.3))


@pytest.mark.parametrize("name", ["persistent", "nested"])
def test_single_precision(name):
    with jax.enable_x64(False):
        prior = build(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), GAUSSIAN), 1)
        A = A_G.astype(jnp.float32)

        def model(y):
            g = numpyro.sample("g", prior)
            numpyro.sample("y", dist.Normal(A @ g, SD_G).to_event(1), obs=y)

        draws, flat = run(model, ENGINES[name], Y_G.astype(jnp.float32))
    assert flat["g"].dtype == draws.stats["lp"].dtype == np.float32
    g, cov_y = flat["g"].astype(float), jnp.eye(1) * SD_G**2
    evidence = lambda scale: float(
        oracles.at_level(GAUSSIAN, 0.1).log_evidence(A_G, Y_G, scale**2 * cov_y)
    )
    check_law(draws, g, oracles.posterior(PRIOR_G, A_G, Y_G, cov_y), bias=0.2)
    check_evidence(draws, evidence(1.0), bias=0.2)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_law(draws, g, oracles.posterior(PRIOR_G, A_G, Y_G, 0.7 * cov_y), bias=0.2)
    with pytest.raises(AssertionError, match="log evidence"):
        check_evidence(draws, evidence(2.0))


@pytest.mark.parametrize("name", ["persistent", "nested"])
def test_likelihoods_of_zero(name):
    """A likelihood `exp(-g_1)` where `g_0 > 1`, and zero elsewhere: a plateau of the prior."""
    prior = build(GAUSSIAN, 1)

    def model():
        g = numpyro.sample("g", prior)
        numpyro.factor("left", jnp.where(g[0] > 1.0, -g[1], -jnp.inf))

    draws, flat = run(model, ENGINES[name])
    assert (flat["g"][:, 0] > 1.0).all()
    # The factor shifts the mean of a Gaussian N(m, C) by minus the column of C.
    mean, cov = oracles.moments(oracles.at_level(GAUSSIAN, 0.1))
    tail = jax.scipy.stats.norm.logcdf((mean[0] - cov[0, 1] - 1.0) / cov[0, 0] ** 0.5)
    check_evidence(draws, float(cov[1, 1] / 2 - mean[1] + tail), bias=0.2)


def test_the_error_of_nested_sampling_by_ancestors_is_that_of_repeated_runs():
    """A Gaussian in the plane, with two moves per new point, which remember their start.

    Groups are the repetitions, each taken as a run of its own. Some 11 ancestors are left; the mean
    square of a t of 11 degrees of freedom is 1.2.
    """
    sd, y = 0.3, np.array([1.5, -1.0])
    prior = build(Gaussian(Moments(jnp.zeros(2), jnp.ones(2))), 1)

    def model():
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, sd).to_event(1), obs=y)

    num_runs, num_draws = 100, 400
    of, key = Problem.from_model(model), jax.random.key(1)
    engine = NestedSampling(100, num_runs, num_draws, num_inner_steps=2)
    chunks, state = [], nested._start(engine, of, key)
    while not (chunks and engine._is_finished(chunks[-1].outputs)):
        steps = jnp.asarray(10 * len(chunks)), jnp.asarray(10)
        state, outputs = nested._advance(engine, of, state, key, *steps)
        chunks.append(Chunk(0, jax.tree.map(np.asarray, outputs)))
    points = nested._merge(chunks, state.particles)
    values = jax.jit(jax.vmap(of.constrain))(points.position)["x"]
    error, by_ancestors, independent = [], [], []
    for group, own in enumerate(np.split(np.arange(len(values)), num_runs)):
        alone = jax.tree.map(lambda leaf, own=own: leaf[own], points)
        own_key = jax.random.key(group)
        weights = nested._weigh(own_key, alone._replace(group=0 * own), True).weights
        rows = np.asarray(nested.draw_rows(own_key, jnp.asarray(weights), 1, num_draws))[0]
        x = np.asarray(values)[own][rows]
        variance = 1 / (1 / 1.01 + 1 / sd**2)
        error.append(x.mean(0) - variance * y / sd**2)
        by_ancestors.append(Clusters.of(alone.ancestor[rows]).mean_se(x))
        independent.append(x.std(0) / np.sqrt(num_draws))

    def mean_square(se):
        return np.mean((np.array(error) / np.array(se)) ** 2)

    limit = GATE * np.sqrt(2 / (2 * num_runs))
    assert abs(mean_square(by_ancestors) - 1) < limit
    assert mean_square(independent) > 1 + 2 * limit
