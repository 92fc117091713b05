"""A Gaussian and a mixture prior in one model, with the closed form that an engine must find."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import oracles
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M
from scoreprior.denoise import GaussianMixture
from scoreprior.flow import FixedGrid, Flow
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from stats import assert_mean_of_groups, require_power


def build(denoiser, num_steps=5):
    flow = Flow(denoiser, denoiser.moments(), sigma_min=0.1, solver=FixedGrid(num_steps))
    return ScorePrior(flow)


PRIOR_G, PRIOR_M = build(GAUSSIAN, 1), build(MIXTURE)


def two_priors(y_g, y_m):
    """A Gaussian and a mixture prior in one model."""
    g = numpyro.sample("g", PRIOR_G)
    m = numpyro.sample("m", PRIOR_M)
    numpyro.sample("y_g", dist.Normal(A_G @ g, SD_G).to_event(1), obs=y_g)
    numpyro.sample("y_m", dist.MultivariateNormal(A_M @ m, COV_M), obs=y_m)


def run(model, engine, *args, seed=1):
    problem = Problem.from_model(model, *args)
    draws = engine.run(problem, jax.random.key(seed), progress=False)
    values = jax.jit(jax.vmap(jax.vmap(draws.problem.constrain)))(draws.positions)
    flat = {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in values.items()}
    return draws, flat


def check_evidence(draws, truth, *, bias=0.05):
    evidence, se = (float(draws.extra[name][1]) for name in ("log_evidence", "log_evidence_se"))
    assert abs(evidence - truth) <= 5 * se, f"log evidence {evidence}, se {se}, should be {truth}"
    require_power(se, 1.0, bias=bias)


def check_law(draws, x, exact, *, bias):
    """Mean, covariance and, for a mixture, masses of draws [n, size]."""
    groups = draws.stats["group_of_draw"].reshape(-1)
    mean, covariance = oracles.moments(exact)
    assert_mean_of_groups(x, groups, mean, bias=bias)
    offsets = x - mean
    sd = np.sqrt(np.diag(covariance))
    scale = np.outer(sd, sd).reshape(-1)
    products = offsets[:, :, None] * offsets[:, None, :]
    assert_mean_of_groups(products, groups, covariance, scale=scale, bias=2 * bias)
    if isinstance(exact, GaussianMixture):
        memberships = np.exp(jax.vmap(exact.log_responsibilities)(x))
        assert_mean_of_groups(memberships, groups, exact.weights, scale=1.0, bias=bias)


def check_two_priors(draws, flat, *, scale=1.0, bias=0.05):
    """Against the closed form for noise levels `scale` times those of the model."""
    cov_g, cov_m = jnp.eye(1) * (scale * SD_G) ** 2, scale**2 * COV_M
    check_law(draws, flat["g"], oracles.posterior(PRIOR_G, A_G, Y_G, cov_g), bias=bias)
    check_law(draws, flat["m"], oracles.posterior(PRIOR_M, A_M, Y_M, cov_m), bias=bias)


def evidence_of_two_priors(scale=1.0):
    g, m = oracles.at_level(GAUSSIAN, 0.1), oracles.at_level(MIXTURE, 0.1)
    cov_g, cov_m = jnp.eye(1) * (scale * SD_G) ** 2, scale**2 * COV_M
    return float(g.log_evidence(A_G, Y_G, cov_g) + m.log_evidence(A_M, Y_M, cov_m))
