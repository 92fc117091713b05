"""Posteriors under priors with edges: what a network says beyond them must not matter."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior import sbi
from scoreprior.denoise import AbstractDenoiser, BlurredUniform
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.sbi import Parameters, Posterior, Standardise, confined
from scoreprior.sbi.confined import Confined
from scoreprior.smc import FeynmanKac

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(5)
PARAMETERS = Parameters.of(dist.Uniform(-jnp.ones(2), jnp.ones(2)).to_event(1))
LAW = PARAMETERS.law
VARIANCE = 0.5
LEVELS = (3e-3, 10.0)
X = jnp.asarray([[1.5, -0.4]]) + jnp.sqrt(VARIANCE) * jax.random.normal(KEY, (5, 2))


class RightWithin(AbstractDenoiser):
    """Exact for `x = z + N(0, VARIANCE I)` where training shows `z`; beyond, no noise is seen."""

    law: BlurredUniform

    def __call__(self, x, sigma, context=None):
        total = 1 + sigma**2 / VARIANCE
        point = (x + sigma**2 / VARIANCE * context.x) / total
        right = self.law(point, sigma / jnp.sqrt(total))
        return jnp.where(depth(x, sigma) > jnp.sqrt(2.0) + 4, x, right)


def depth(z, sigma):
    """Standard deviations of a normal law whose density falls as much as that of the prior."""
    return jnp.sqrt(2 * (LAW.energy(z, sigma) - LAW.energy(jnp.zeros_like(z), sigma)))


def posterior(denoiser):
    ranges = Standardise(jnp.zeros(2), jnp.ones(2), jnp.full(2, -9.0), jnp.full(2, 9.0))
    return Posterior(PARAMETERS, denoiser, ranges, LAW.moments(), *LEVELS)


def draws(posteriors, num_particles, num_groups):
    product = sbi.compose(posteriors, LAW, bridge=False)
    engine = FeynmanKac(None, num_particles, num_groups, num_steps=200)
    tree = infer(lambda: numpyro.sample("z", product), engine, key=KEY, progress=False)
    z = tree.posterior["z"].values.reshape(-1, 2)
    return z, float(tree.sample_stats["log_evidence"])


def truth():
    """Means and variances of the entries given all of `X`, and the evidence ratio."""
    grid = np.linspace(-3, 3, 20_001)[:, None] * np.ones(2)
    each = BlurredUniform(LAW.low[:1], LAW.high[:1], LAW.blur[:1])
    log_prior = jax.vmap(lambda z: each.log_prob(z[:1]))(jnp.asarray(grid))
    logs = np.asarray(log_prior, float)[:, None] * np.ones(2)
    for x in np.asarray(X, float):
        single = [float(each.log_prob(jnp.asarray(v)[None], jnp.sqrt(VARIANCE))) for v in x]
        normal = -((grid - x) ** 2) / (2 * VARIANCE) - np.log(2 * np.pi * VARIANCE) / 2
        logs = logs + normal - np.asarray(single)
    width = grid[1, 0] - grid[0, 0]
    log_z = np.logaddexp.reduce(logs) + np.log(width)
    masses = np.exp(logs - log_z) * width
    mean = (masses * grid).sum(0)
    return mean, (masses * (grid - mean) ** 2).sum(0), float(log_z.sum())


def test_what_a_network_says_beyond_the_prior_does_not_matter(monkeypatch):
    posteriors = [posterior(RightWithin(LAW)).condition(x) for x in X]
    mean, variance, log_z = truth()
    z, found = draws(posteriors, 500, 4)
    # As good as 250 independent draws, of 2,000.
    se = np.sqrt(variance / 250)
    assert (np.abs(z.mean(0) - mean) < 5 * se).all()
    np.testing.assert_allclose(z.var(0), variance, rtol=0.3)
    assert abs(found - log_z) < 0.15
    monkeypatch.setattr(confined, "Confined", lambda denoiser, law, center: denoiser)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clouds that collapse and disagree
        z, _ = draws(posteriors, 1000, 4)
    assert np.abs(z).max() > 100


@pytest.mark.parametrize("sigma", [1e-2, 0.3, 5.0])
def test_the_network_holds_where_the_prior_has_mass_and_the_prior_beyond(sigma):
    inner = RightWithin(LAW)
    law = Confined(inner, LAW, jnp.zeros(2))
    context = posterior(inner).context(X[0])
    ray = jnp.linspace(0, 12, 2001)[:, None] * jnp.asarray([[0.8, 0.6]]) * jnp.hypot(sigma, 1.0)
    depths = np.asarray(jax.vmap(lambda z: depth(z, sigma))(ray))
    found, network, prior = (
        np.asarray(jax.vmap(f)(ray))
        for f in (
            lambda z: law(z, sigma, context),
            lambda z: inner(z, sigma, context),
            lambda z: LAW(z, sigma),
        )
    )
    near, far = depths <= np.sqrt(2) + 3, depths >= np.sqrt(2) + 4
    assert near.sum() > 100
    assert far.sum() > 100
    np.testing.assert_allclose(found[near], network[near], rtol=1e-12)
    np.testing.assert_array_equal(found[far], prior[far])
    assert (np.abs(network - prior)[near] > 1e-4 * np.hypot(sigma, 1.0)).any()


def test_normal_priors_are_left_alone():
    inner = RightWithin(LAW)
    ranges = posterior(inner).standardise
    moments = Moments(jnp.zeros(2), jnp.ones(2))
    for prior, is_confined in (
        (dist.Uniform(-jnp.ones(2), jnp.ones(2)).to_event(1), True),
        (dist.Uniform(-jnp.ones((1, 2)), jnp.ones((1, 2))).to_event(2), True),
        (dist.Normal(jnp.zeros(2), 1.0).to_event(1), False),
        (dist.Normal(jnp.zeros((1, 2)), 1.0).to_event(2), False),
    ):
        one = Posterior(Parameters.of(prior), inner, ranges, moments, *LEVELS)
        law = one.condition(X[0])
        assert not isinstance(law.flow.denoiser, Confined)
        together = sbi.compose([law, law], one.parameters.law, bridge=False).priors
        found = [isinstance(each.flow.denoiser, Confined) for each in together]
        assert found == [is_confined, is_confined, False]
