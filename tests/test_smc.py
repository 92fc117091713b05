"""TemperedSMC finds the right posterior and evidence: closed forms, both forms, all kernels."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
from oracles import A_M, COV_M, GAUSSIAN, MIXTURE, Y_G, Y_M
from scoreprior.denoise import GaussianMixture
from scoreprior.smc import HMCMoves, RandomWalkMoves, TemperedSMC
from scoreprior.smc.step import Cloud, Rule, _autocorrelation, move, next_temperature
from stats import assert_mean, assert_mean_of_groups
from two_priors import (
    PRIOR_M,
    build,
    check_evidence,
    check_law,
    check_two_priors,
    evidence_of_two_priors,
    run,
    two_priors,
)

pytestmark = [pytest.mark.promotes_ranks, pytest.mark.slow]


def check_shares(draws):
    """A group has draws in proportion to its evidence."""
    evidence = draws.extra["group_log_evidence"][1]
    share = np.exp(evidence - evidence.max())
    log_mean = evidence.max() + np.log(share.mean())
    np.testing.assert_allclose(draws.extra["log_evidence"][1], log_mean)
    group = draws.stats["group_of_draw"].reshape(-1)
    expected = group.size * share / share.sum()
    counts = np.bincount(group, minlength=len(share))
    num_particles = group.size // len(share)
    assert np.abs(counts - expected).max() < 0.1 * num_particles
    assert np.abs(counts - expected).sum() < 0.1 * np.abs(counts - num_particles).sum()


def test_posterior_and_evidence_of_a_gaussian_and_a_mixture_prior():
    draws, flat = run(two_priors, TemperedSMC(120, 100), Y_G, Y_M)
    check_two_priors(draws, flat, bias=0.08)
    check_evidence(draws, evidence_of_two_priors(), bias=0.1)
    check_shares(draws)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_two_priors(draws, flat, scale=0.9)
    with pytest.raises(AssertionError, match="log evidence"):
        check_evidence(draws, evidence_of_two_priors(scale=1.3))


ENGINES = {
    "centred": TemperedSMC(50, 50, centred=True),
    "random walk, few temperatures": TemperedSMC(
        100, 60, kernel=RandomWalkMoves(), target_ess=0.5, max_autocorrelation=0.2
    ),
    "Langevin, diagonal mass": TemperedSMC(
        100, 40, kernel=HMCMoves(1, dense_mass=False), max_autocorrelation=0.5
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_other_forms_and_kernels(name):
    draws, flat = run(two_priors, ENGINES[name], Y_G, Y_M)
    check_two_priors(draws, flat, bias=0.25)
    check_evidence(draws, evidence_of_two_priors(), bias=0.2)


@pytest.mark.parametrize("num_particles", [20, 200])
def test_mass_matrix_is_the_shrunk_second_moment_of_the_gradients(num_particles):
    """Also of fewer particles than coordinates, where it is kept as a diagonal and a low rank."""
    size = 50
    correlated = np.random.default_rng(0).normal(size=(num_particles + 1, size))
    gradients = (correlated + correlated[:, :1]) * np.linspace(1, 30, size)
    gradients[-1, 3] = np.nan  # of a particle that has no say
    states = SimpleNamespace(logdensity_grad={"u": jnp.asarray(gradients)})
    metric = HMCMoves().scales(states)
    root = np.diag(metric.sigma)
    inverse = root @ (np.eye(size) + (metric.U * (metric.lam - 1)) @ metric.U.T) @ root
    gradients, shrinkage = gradients[:-1], size / (num_particles + size)
    moment = gradients.T @ gradients / num_particles
    mass = (1 - shrinkage) * moment + shrinkage * np.diag(np.diag(moment))
    np.testing.assert_allclose(inverse @ mass, np.eye(size), atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "num_particles", "size", "step_size"),
    [(HMCMoves(3), 32, 16, 0.5), (RandomWalkMoves(), 15, 8, 0.7)],
    ids=["HMC", "random walk, an odd number"],
)
def test_moves_tuned_on_a_small_cloud_leave_its_law_alone(kernel, num_particles, size, step_size):
    """Scales measured on the particles that they move shrink these clouds by 1 and 2 %."""
    rule = Rule(kernel, 0.9, -1.0, 6, None)

    def square(key):
        key_start, key_moves = jax.random.split(key)
        start = {"x": jax.random.normal(key_start, (num_particles, size))}
        log_density = lambda position: -0.5 * jnp.sum(position["x"] ** 2)
        first, idle = jnp.asarray(step_size), jnp.asarray(False)
        moved = move(rule, log_density, start, first, idle, key_moves)
        return jnp.mean(moved.particles.position["x"] ** 2)

    keys = jax.random.split(jax.random.key(0), 8000)
    assert_mean(jax.lax.map(square, keys, batch_size=500)[:, None], 1.0, bias=0.11)


def test_single_precision():
    with jax.enable_x64(False):
        prior = build(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), MIXTURE))

        def model(y):
            m = numpyro.sample("m", prior)
            cov_y = jnp.asarray(COV_M, jnp.float32)
            loc = jnp.asarray(A_M, jnp.float32) @ m
            numpyro.sample("y", dist.MultivariateNormal(loc, cov_y), obs=y)

        draws, flat = run(model, TemperedSMC(100, 40), Y_M.astype(jnp.float32))
    assert flat["m"].dtype == np.float32
    assert draws.extra["temperature"][1].dtype == np.float32
    check_law(
        draws, flat["m"].astype(float), oracles.posterior(PRIOR_M, A_M, Y_M, COV_M), bias=0.25
    )
    check_evidence(
        draws, float(oracles.at_level(MIXTURE, 0.1).log_evidence(A_M, Y_M, COV_M)), bias=0.1
    )


def test_masses_of_modes_between_which_chains_hardly_move():
    """Three modes, of which the data rule out the one between: NUTS hardly ever jumps over it."""
    means = jnp.array([[-6.0, 0.0], [0.0, 3.0], [6.0, 0.0]])
    law = GaussianMixture.diagonal(jnp.array([0.1, 0.75, 0.15]), means, 0.05)
    prior = build(law, 8)
    A, y, sd = jnp.array([[0.02, 1.0]]), jnp.array([0.1]), 0.3

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(A @ x, sd).to_event(1), obs=y)

    exact = oracles.posterior(prior, A, y, sd**2 * jnp.eye(1))
    assert 0.3 < exact.weights[0] < 0.45
    draws, flat = run(model, TemperedSMC(150, 40), y)
    left = (flat["x"][:, :1] < 0).astype(float)
    groups = draws.stats["group_of_draw"].reshape(-1)
    assert_mean_of_groups(left, groups, exact.weights[:1], scale=1.0, bias=0.1)
    assert_mean_of_groups(flat["x"], groups, oracles.moments(exact)[0], bias=0.2)
    truth = oracles.at_level(law, 0.1).log_evidence(A, y, sd**2 * jnp.eye(1))
    check_evidence(draws, float(truth), bias=0.1)


def test_likelihoods_of_zero_are_weights_of_zero():
    """A truncated prior: the evidence is the probability of what is left."""
    prior = build(GAUSSIAN, 1)

    def model():
        g = numpyro.sample("g", prior)
        numpyro.factor("left", jnp.where(g[0] > 1.5, 0.0, -jnp.inf))

    draws, flat = run(model, TemperedSMC(200, 100))
    assert (flat["g"][:, 0] > 1.5).all()
    tail = jax.scipy.stats.norm.logcdf(-1.0 / jnp.sqrt(1.0 + 0.1**2))
    check_evidence(draws, float(tail), bias=0.15)


def test_the_next_temperature_has_the_effective_sample_size_asked_for():
    log_likelihood = -(jnp.linspace(0.0, 30.0, 400) ** 2)
    log_likelihood = log_likelihood.at[::4].set(-jnp.inf)
    zero = jnp.zeros(())
    cloud = Cloud({}, log_likelihood, jnp.arange(400), zero, zero, zero)
    temperature = next_temperature(cloud, 0.6)
    weights = np.asarray(jax.nn.softmax(temperature * log_likelihood))
    np.testing.assert_allclose(1 / (weights**2).sum(), 0.6 * 300, rtol=1e-3)


@pytest.mark.parametrize("memory", [0.2, 0.7, 0.95])
def test_the_autocorrelation_is_that_within_modes(memory):
    """Of autoregressive moves within two modes that no move leaves."""
    rng = np.random.default_rng(0)
    centre = 10 * rng.choice([-1.0, 1.0], size=(20_000, 3))
    start = x = rng.standard_normal(centre.shape)
    distance = [np.zeros(3)]
    for _ in range(8):
        x = memory * x + np.sqrt(1 - memory**2) * rng.standard_normal(centre.shape)
        distance.append((((centre + x) - (centre + start)) ** 2).mean(0))
    found = _autocorrelation(jnp.asarray(np.stack(distance)), jnp.asarray(8), jnp.ones(()))
    np.testing.assert_allclose(found, memory**8, atol=0.03)
