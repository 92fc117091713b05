"""Rejuvenation: its law at one level, where it is applied, and the posterior with it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import oracles
from oracles import GAUSSIAN, MIXTURE
from scoreprior import feynman_kac as fk
from scoreprior.composition import compose
from scoreprior.denoise import Gaussian
from scoreprior.feynman_kac import FeynmanKacModel, Levels, NoControl, Renoise, ScoreLine
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.guide import TMPD, DiffPIR
from scoreprior.observation import LinearObservation
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.sample import LogGrid
from scoreprior.smc import FeynmanKac, Resampling
from scoreprior.smc.twisted import Twisted
from stats import assert_cov, assert_masses, assert_mean
from test_feynman_kac import PLANE, check

KEY = jax.random.key(11)
STEPS, NUM = 100, 20_000
WIDE = Gaussian(Moments.dense(jnp.array([-0.5, 0.3]), jnp.array([[2.0, -0.4], [-0.4, 1.5]])))


def low(denoiser, sigma_min=0.1):
    """A prior whose clouds start at little noise, not far from any level."""
    flow = Flow(
        denoiser, denoiser.moments(), sigma_min=sigma_min, sigma_max=3.0, solver=FixedGrid(1)
    )
    return ScorePrior(flow)


NARROW_PRIOR, WIDE_PRIOR, MIXED_PRIOR = low(GAUSSIAN), low(WIDE, 0.3), low(MIXTURE)
Y, SD = jnp.array([0.8, 0.1]), 0.9


def seen(denoise, x, sigma):
    """The log likelihood of `Y`, and no more than half of its gradient."""
    return -jnp.sum((x - Y) ** 2) / (2 * SD**2), (Y - x) / (2 * SD**2)


def renewed(chain, know, k):
    """Draws at level `k` after many moves, from a cloud that is wider; `know(x, r, key)`."""

    @jax.jit
    def run(key, k):
        model, keys = chain.model(), jax.random.split(key, 3)
        x = 1.5 * jax.random.normal(keys[0], (NUM, 2))
        cache = jax.vmap(lambda x: know(x, chain.levels.r[k], keys[0]))(x)
        before, cache = model.rejuvenate(keys[1], k, x, cache)
        after, _ = model.rejuvenate(keys[2], k, before, cache)
        return after, jnp.mean(jnp.any(before != after, axis=1))

    x, share = run(KEY, jnp.asarray(k))
    assert share > 0.5
    return np.asarray(x)


def composed(exponents, rejuvenation, twist=seen):
    product = compose(exponents)
    return product.composed(
        STEPS, control=NoControl(), twist=twist, log_likelihood=None, rejuvenation=rejuvenation
    )


def product(chain, r):
    """Mean and covariance of the law at level `r` of a chain of Gaussians seen by `seen`."""
    precision = np.eye(2) / SD**2
    pull = precision @ np.asarray(Y)
    for factor in chain.factors:
        noisy = np.asarray(factor.moments.covariance()) + float(
            factor.sigma(jnp.asarray(r))
        ) ** 2 * np.eye(2)
        part = float(factor.exponent) * np.linalg.inv(noisy)
        precision, pull = precision + part, pull + part @ np.asarray(factor.moments.mean)
    return np.linalg.solve(precision, pull), np.linalg.inv(precision)


def level(chain, least):
    """The last level above `least`."""
    k = int(np.sum(np.asarray(chain.levels.r) > least)) - 1
    return k, float(chain.levels.r[k])


@pytest.mark.parametrize(
    ("exponents", "rejuvenation"),
    [
        ({NARROW_PRIOR: 1.5, WIDE_PRIOR: 0.7}, ScoreLine(1.2, 30)),
        ({NARROW_PRIOR: 1.5, WIDE_PRIOR: -0.3}, ScoreLine(1.2, 30)),
        ({NARROW_PRIOR: 1.0}, ScoreLine(1.2, 30)),
        ({NARROW_PRIOR: 1.0}, Renoise(1.5, 2, 20)),
    ],
    ids=["product", "quotient", "single", "renoise"],
)
def test_a_gaussian_cloud_comes_to_the_law_of_its_level(exponents, rejuvenation):
    chain = composed(exponents, rejuvenation)
    k, r = level(chain, 0.6)
    x = renewed(chain, chain._know, k)
    mean, covariance = product(chain, r)
    assert_mean(x, mean)
    assert_cov(x, covariance, bias=0.08)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_cov(x, product(chain, 1.5 * r)[1])


@pytest.mark.parametrize("rejuvenation", [ScoreLine(1.0, 40), Renoise(2.0, 8, 10)], ids=repr)
def test_a_mixture_cloud_comes_to_the_law_of_its_level(rejuvenation):
    chain = composed({MIXED_PRIOR: 1.0}, rejuvenation)
    k, r = level(chain, 0.6)
    x = renewed(chain, chain._know, k)

    def truth(r):
        law = oracles.at_level(MIXTURE, float(chain.factors[0].sigma(jnp.asarray(r))))
        return law.posterior(jnp.eye(2), Y, SD**2 * jnp.eye(2))

    exact = truth(r)
    mean, covariance = oracles.moments(exact)
    assert_mean(x, mean)
    assert_cov(x, covariance, bias=0.08)
    assert_masses(np.exp(jax.vmap(exact.log_responsibilities)(x)), exact.weights, bias=0.08)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_cov(x, oracles.moments(truth(1.5 * r))[1])


@pytest.mark.parametrize("rejuvenation", [ScoreLine(1.0, 40), Renoise(2.0, 8, 10)], ids=repr)
def test_a_twisted_cloud_has_half_of_the_next_noise_in_advance(rejuvenation):
    """For a Gaussian prior the twist of `TMPD` is Gaussian in closed form."""
    flow = NARROW_PRIOR.flow
    A, cov_y = jnp.array([[1.0, 0.5]]), jnp.array([[0.3]])
    observation = LinearObservation(A, jnp.array([0.4]), cov_y)
    levels = Levels.half_noise(flow.sigma_min, LogGrid(flow.sigma_min, 3.0)(9))
    chain = Twisted(flow, observation, TMPD(), levels, None, rejuvenation)
    k, r = level(chain, 0.6)
    x = renewed(chain, lambda x, r, key: chain._know(x, r), k)
    mean, C = map(np.asarray, (flow.moments.mean, flow.moments.covariance()))
    C = C + flow.sigma_min**2 * np.eye(2)
    gain = C @ np.linalg.inv(C + r**2 * np.eye(2))
    B, S = A @ gain, cov_y + A @ (C - gain @ C) @ A.T

    def truth(h):
        prior = Gaussian(Moments.dense(jnp.asarray(mean), jnp.asarray(C + (r**2 + h) * np.eye(2))))
        offset = A @ (mean - gain @ mean)
        return oracles.moments(prior.posterior(B, jnp.array([0.4]) - offset, S))

    half = float(levels.h[k]) / 2
    assert_mean(x, truth(half)[0])
    assert_cov(x, truth(half)[1], bias=0.08)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_cov(x, truth(-half)[1])


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("rejuvenation", [ScoreLine(1.0), Renoise(1.5)], ids=repr)
def test_with_a_poor_twist_the_posterior_and_the_evidence_stay_right(rejuvenation):
    engine = FeynmanKac(DiffPIR(2.0), 250, 32, 60, threshold=0.9, rejuvenation=rejuvenation)
    draws = engine.run(PLANE, KEY, progress=False)
    check(draws, "plane", bias=0.3)
    resampled, share = (draws.extra[name][1] for name in ("resampled", "rejuvenated"))
    assert resampled.any(0).sum() > 5
    assert (share[~resampled] == 0).all()
    assert (share[resampled] > 0.3).all()


def test_nothing_is_spent_where_no_cloud_was_resampled():
    """Of six steps of two clouds, those at which one or the other is resampled."""
    calls = []
    heavy = jnp.array([[0.0, 9, 0, 0, 0, 9], [0.0, 0, 0, 9, 0, 9]])

    def rejuvenate(key, k, x, cache):
        jax.debug.callback(lambda k: calls.append(int(k)), k)
        return x + 1.0, cache

    def run(cloud):
        def weights(k):
            return jnp.zeros(4).at[0].set(heavy[cloud, k])

        def propagate(key, k, x, cache, log_weights):
            return x, weights(jnp.minimum(k + 1, 5)), cache

        model = FeynmanKacModel(
            lambda key, n: (jnp.zeros(n), weights(0), None), propagate, 6, rejuvenate=rejuvenate
        )
        state = fk.init(model, 4, KEY)

        def one(state, k):
            state = state._replace(step=k)
            return fk.step(model, Resampling(0.5), state, KEY, axis_name="cloud")

        return one, state

    def both(k, states):
        one = lambda cloud, state: run(cloud)[0](state, k)
        return jax.vmap(one, axis_name="cloud")(jnp.arange(2), states)

    states = jax.vmap(lambda cloud: run(cloud)[1]._replace(step=None))(jnp.arange(2))
    shares = []
    step = jax.jit(both)
    for k in range(6):
        states, info = step(jnp.asarray(k, jnp.int32), states)
        states = states._replace(step=None)
        shares.append(info.rejuvenated)
    jax.effects_barrier()
    assert sorted(set(calls)) == [1, 3, 5]
    expected = [[0, 0], [1, 0], [0, 0], [0, 1], [0, 0], [1, 1]]
    np.testing.assert_array_equal(shares, expected)
    np.testing.assert_array_equal(states.particles, [[2.0] * 4, [2.0] * 4])


def test_wrong_moves_fail_before_any_work():
    x = compose({NARROW_PRIOR: 0.5, WIDE_PRIOR: 0.5})

    def model():
        numpyro.factor("event", numpyro.sample("x", x)[0])

    engine = FeynmanKac(None, 20, 2, 60, rejuvenation=Renoise(1.5))
    message = "no product of powers; take ScoreLine(step_size), got exponents [0.5, 0.5]"
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.run(Problem.from_model(model), KEY, progress=False)
    with pytest.raises(TypeError, match="rejuvenation"):
        FeynmanKac(rejuvenation="line")
    with pytest.raises(ValueError, match="factor must be above 1, got 1.0"):
        Renoise(1.0)
    with pytest.raises(ValueError, match="step_size must be"):
        ScoreLine(0.0)
    with pytest.raises(ValueError, match="num_steps must be"):
        ScoreLine(0.5, 0)
