"""Shared and local parameters of a Gaussian hierarchy, of which everything is known.

`g ~ N(0, 1)`, `l_i ~ N(g, 0.5)`, `x_i ~ N(l_i, 0.3)`; the networks are exact.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior import sbi
from scoreprior.denoise import AbstractDenoiser
from scoreprior.gaussian import Moments
from scoreprior.smc import FeynmanKac
from stats import assert_cov, assert_mean

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(5)
SPREAD, NOISE = 0.5, 0.3
X = jnp.asarray([[0.4], [1.5], [-0.3]])


class Shared(AbstractDenoiser):
    """Of `g` given `x`, the local parameter integrated out, or given nothing."""

    def __call__(self, x, sigma, context=None):
        gain = 1.0 if context.known is None else context.known
        variance = 1 / (1 + gain / (SPREAD + NOISE))
        mean = variance * gain * context.x / (SPREAD + NOISE)
        return Moments.dense(mean, jnp.full((1, 1), variance)).denoise(x, sigma)


class Local(AbstractDenoiser):
    """Of `l` given `(x, g)`."""

    spread: float = SPREAD

    def __call__(self, x, sigma, context=None):
        variance = 1 / (1 / self.spread + 1 / NOISE)
        mean = variance * (context.x[:1] / NOISE + context.x[1:] / self.spread)
        return Moments.dense(mean, jnp.full((1, 1), variance)).denoise(x, sigma)


def prior(name):
    def model():
        numpyro.sample(name, dist.Normal(0.0, 1.0))

    return model


def posterior(denoiser, name, size):
    standardise = sbi.Standardise(
        jnp.zeros(size), jnp.ones(size), jnp.full(size, -20.0), jnp.full(size, 20.0)
    )
    moments = Moments(jnp.zeros(1), jnp.ones(1))
    parameters = sbi.Parameters.of(prior(name))
    return sbi.Posterior(parameters, denoiser, standardise, moments, 1e-3, 10.0)


def truth():
    """Mean and covariance of `(g, l_1, l_2, l_3)`."""
    precision = np.diag([1 + 3 / SPREAD, *[1 / SPREAD + 1 / NOISE] * 3])
    precision[0, 1:] = precision[1:, 0] = -1 / SPREAD
    pull = np.concatenate([[0], np.asarray(X).ravel() / NOISE])
    return np.linalg.solve(precision, pull), np.linalg.inv(precision)


def check(local, shared=None):
    engine = FeynmanKac(None, num_particles=5000, num_groups=4, num_steps=60)
    shared = posterior(Shared(), "g", 1) if shared is None else shared
    tree = sbi.infer_hierarchical(
        shared, posterior(local, "l", 2), X, engine, key=KEY, progress=False
    )
    assert tree.posterior["l"].dims == ("chain", "draw", "observation")
    g, own = (np.asarray(tree.posterior[name]) for name in ("g", "l"))
    draws = np.concatenate([g.reshape(-1, 1), own.reshape(-1, 3)], 1)
    mean, covariance = truth()
    assert_mean(draws, mean)
    assert_cov(draws, covariance, bias=0.1)


def test_draws_are_those_of_the_joint_posterior():
    check(Local())


def test_a_prior_that_is_not_known_is_the_learned_one():
    known = posterior(Shared(), "g", 1)
    parameters = dataclasses.replace(known.parameters, law=None)
    with pytest.raises(ValueError, match="prior.. needs a network that was trained with drop > 0"):
        check(Local(), dataclasses.replace(known, parameters=parameters))
    check(Local(), dataclasses.replace(known, parameters=parameters, can_drop=True))


def test_shared_draws_outside_the_range_of_training_are_warned_of():
    local = posterior(Local(), "l", 2)
    local = eqx.tree_at(lambda p: p.standardise.high, local, jnp.asarray([20.0, 1.0]))
    z = jnp.asarray([[0.5], [0.9], [1.1]])
    with pytest.warns(UserWarning, match="^z lies outside .* in 1 of 3 features"):
        sbi.draw_local(local, z, X, key=KEY)
    with pytest.warns(UserWarning, match="^x_o lies outside .* in 1 of 3 features"):
        sbi.draw_local(local, z[:2], X.at[1].set(21.0), key=KEY)
    sbi.draw_local(local, z[:2], X, key=KEY)


def test_a_wrong_local_network_is_seen():
    with pytest.raises(AssertionError, match="mean|covariance"):
        check(Local(1.2 * SPREAD))


def test_local_data_join_each_simulation_with_its_own_shared_parameters():
    parameters = sbi.Parameters.of(dist.LogNormal(0.0, 1.0))
    shared = jnp.exp(jnp.asarray([1.0, 2.0]))
    found = sbi.local_data(parameters, shared, jnp.asarray([[[3.0, 4.0]], [[5.0, 6.0]]]))
    np.testing.assert_allclose(found, [[3, 4, 1], [5, 6, 2]], rtol=1e-6)


def test_errors_say_what_is_wrong():
    shared, local = posterior(Shared(), "g", 1), posterior(Local(), "g", 2)
    with pytest.raises(ValueError, match="observations must hold at least one, got none"):
        sbi.infer_hierarchical(shared, local, [], FeynmanKac(None), key=KEY)
    with pytest.raises(ValueError, match=r"local_data, here of shape \(2,\), got \(1,\)"):
        sbi.draw_local(posterior(Local(), "l", 1), jnp.zeros((1, 1)), X, key=KEY)
    with pytest.raises(ValueError, match=r"local_data, here of shape \(2,\), got \(3,\)"):
        sbi.infer_hierarchical(shared, posterior(Local(), "l", 3), X, None, key=KEY)  # no engine
    with pytest.raises(ValueError, match=r"names of their own, got \['g'\] twice"):
        sbi.infer_hierarchical(shared, local, X, FeynmanKac(None), key=KEY)
