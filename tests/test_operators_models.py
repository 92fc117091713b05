"""Operators in models: engines read them off, and parameters of instruments are latent sites.

Priors are Gaussian fields, so that posteriors given the instrument have a closed form and what is
unknown of the instrument is integrated on a grid.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from oracles import at_level, moments
from scoreprior import operators as op
from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.guide import TMPD
from scoreprior.mcmc import NUTS, EllipticalSlice, Guided, SplitGibbs
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import FeynmanKac
from stats import (
    assert_cov,
    assert_cov_of_chains,
    assert_mean,
    assert_mean_of_chains,
    assert_mean_of_groups,
)

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(5)
SHAPE = (3, 4)
SIGMA_MIN = 0.5
PLACES = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).reshape(-1, 2)
DISTANCE = np.linalg.norm(PLACES[:, None] - PLACES[None], axis=-1)
LAW = Gaussian(
    Moments.dense(jnp.linspace(-1, 1, 12).reshape(SHAPE), jnp.asarray(np.exp(-DISTANCE / 1.5)))
)
PRIOR = ScorePrior(Flow(LAW, LAW.law, sigma_min=SIGMA_MIN, solver=FixedGrid(1)))
EXACT = at_level(LAW, SIGMA_MIN)
MASK = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]], bool)

BLUR = op.GaussianBlur(0.8, SHAPE, op.Zero())
U, V = np.random.default_rng(0).uniform(-0.4, 0.4, (2, 4))
INSTRUMENTS = {
    "blur": BLUR,
    "blurred Fourier": op.RealImag(op.FourierSampling(MASK) @ BLUR),
    "interferometer": op.RealImag(op.Interferometer(U, V, 1.0, SHAPE)),
}
SD = 0.6


def problem_of(operator):
    truth = jax.random.normal(KEY, SHAPE)
    y = operator(truth) + SD * jax.random.normal(jax.random.key(6), operator.shape_out)

    def model(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(operator(x), SD).to_event(len(y.shape)), obs=y)

    noise = SD**2 * jnp.eye(y.size)
    return Problem.from_model(model, y), EXACT.posterior(operator.materialise(), y.ravel(), noise)


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_linear_operator_is_read_off_as_its_matrix(name):
    problem, _ = problem_of(INSTRUMENTS[name])
    seen = problem.linearise({"x": jnp.zeros(SHAPE)})
    assert seen.is_linear(KEY)
    matrix = INSTRUMENTS[name].materialise()
    np.testing.assert_allclose(seen.matrix(), matrix, atol=1e-12)
    np.testing.assert_allclose(seen.cov_y(), SD**2 * np.eye(len(matrix)), atol=1e-12)


ENGINES = {
    "SplitGibbs": (SplitGibbs(None, 60, 1, 3000, num_steps=12), "blur"),
    "EllipticalSlice": (EllipticalSlice(100, 400, 32), "blurred Fourier"),
    "FeynmanKac": (FeynmanKac(TMPD(), 60, 48, 40), "blurred Fourier"),
    "Guided": (Guided(TMPD(), 3000, 60), "interferometer"),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_posteriors_are_those_of_the_closed_form(kind):
    engine, name = ENGINES[kind]
    problem, exact = problem_of(INSTRUMENTS[name])
    draws = engine.run(problem, KEY, progress=False)
    x = draws.positions["x"]
    if (
        kind == "EllipticalSlice"
    ):  # which moves in the noise of the flow, by more draws than it needs
        x = jax.vmap(jax.vmap(PRIOR.flow.to_data))(x)
        check = lambda truth: assert_mean_of_chains(x, truth, bias=0.2)
        assert_cov_of_chains(x, moments(exact)[1], bias=0.3)
    elif kind == "FeynmanKac":
        groups = draws.stats["group_of_draw"].ravel()
        flat = x.reshape(-1, *SHAPE)
        check = lambda truth: assert_mean_of_groups(flat, groups, truth, bias=0.2)
    else:
        flat = x.reshape(-1, *SHAPE)
        check = lambda truth: assert_mean(flat, truth, bias=0.15)
        assert_cov(flat, moments(exact)[1], bias=0.25)
    check(moments(exact)[0])
    # The same data, had they been taken without the instrument, say something else.
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check(moments(EXACT)[0])


# A bright pixel, so that one image tells the width of its blur.
BRIGHT = Gaussian(
    Moments.dense(jnp.zeros(SHAPE).at[1, 1].set(8.0), 0.3 * jnp.asarray(np.exp(-DISTANCE / 1.5)))
)
BRIGHT_PRIOR = ScorePrior(Flow(BRIGHT, BRIGHT.law, sigma_min=SIGMA_MIN, solver=FixedGrid(1)))
LOG_WIDTH, LOG_NOISE = (-0.2, 0.4), (-0.7, 0.4)


def unknown(y):
    width = numpyro.sample("width", dist.LogNormal(*LOG_WIDTH))
    noise = numpyro.sample("noise", dist.LogNormal(*LOG_NOISE))
    x = numpyro.sample("x", BRIGHT_PRIOR)
    mean = op.GaussianBlur(width, SHAPE, op.Zero())(x)
    numpyro.sample("y", dist.Normal(mean, noise).to_event(2), obs=y)


def data_of_unknown():
    truth = BRIGHT.law.mean + 0.5 * jax.random.normal(jax.random.key(2), SHAPE)
    noise = 0.4 * jax.random.normal(jax.random.key(3), SHAPE)
    return op.GaussianBlur(0.7, SHAPE, op.Zero())(truth) + noise


def quadrature(y, num_points=61):
    """Exact posterior means of log width, log noise and image, and variances of the first two."""
    law, grid = at_level(BRIGHT, SIGMA_MIN), jnp.linspace(-4, 4, num_points)
    axes = (location + scale * grid for location, scale in (LOG_WIDTH, LOG_NOISE))
    log_width, log_noise = (axis.ravel() for axis in jnp.meshgrid(*axes))

    def at(point):
        width, noise = jnp.exp(point)
        A = op.GaussianBlur(width, SHAPE, op.Zero()).materialise()
        cov_y = noise**2 * jnp.eye(12)
        log_prior = sum(
            jax.scipy.stats.norm.logpdf(value, *prior)
            for value, prior in zip(point, (LOG_WIDTH, LOG_NOISE), strict=True)
        )
        log_joint = log_prior + law.log_evidence(A, y.ravel(), cov_y)
        return log_joint, law.posterior(A, y.ravel(), cov_y).moments().mean

    points = jnp.stack([log_width, log_noise], 1)
    log_joint, means = jax.lax.map(at, points, batch_size=500)
    weights = jax.nn.softmax(log_joint)
    mean = weights @ points
    return mean, weights @ (points - mean[None]) ** 2, jnp.tensordot(weights, means, 1)


JOINT = {
    "NUTS": NUTS(300, 1000, 8, chunk_size=100),
    "SplitGibbs": SplitGibbs(None, 120, 300, 48, num_steps=12, num_nuts_steps=2, chunk_size=60),
}


@pytest.mark.parametrize("kind", JOINT)
def test_blur_and_noise_are_learned_with_the_image(kind):
    y = data_of_unknown()
    mean, variance, image = quadrature(y)
    # The data say something of both: a posterior unlike the prior.
    assert (variance < 0.6 * jnp.array([LOG_WIDTH[1], LOG_NOISE[1]]) ** 2).all()
    draws = JOINT[kind].run(Problem.from_model(unknown, y), KEY, progress=False)
    instrument = jnp.stack([draws.positions["width"], draws.positions["noise"]], -1)
    x = draws.positions["x"]
    if kind == "NUTS":
        x = jax.vmap(jax.vmap(BRIGHT_PRIOR.flow.to_data))(x)
    assert_mean_of_chains(instrument, mean, bias=0.2)
    assert_mean_of_chains((instrument - mean) ** 2, variance, bias=0.2)
    assert_mean_of_chains(x, image, bias=0.2)
