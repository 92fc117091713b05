"""NUTS draws from the right posterior: closed forms, both forms, both gradient policies."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M
from scoreprior.density import FlowDensity, ScoreGradient
from scoreprior.flow import FixedGrid, Flow
from scoreprior.infer import infer
from scoreprior.mcmc import NUTS
from scoreprior.prior import ScorePrior
from stats import assert_cov_of_chains, assert_masses, assert_mean_of_chains, chain_ess

pytestmark = [pytest.mark.promotes_ranks, pytest.mark.slow]


def build(denoiser, density=None, num_steps=8):
    flow = Flow(denoiser, denoiser.moments(), sigma_min=0.1, solver=FixedGrid(num_steps))
    return ScorePrior(flow, density)


def two_priors(density):
    """A Gaussian and a mixture prior in one model."""
    gaussian, mixture = build(GAUSSIAN, density, 1), build(MIXTURE, density)

    def model(y_g, y_m):
        g = numpyro.sample("g", gaussian)
        m = numpyro.sample("m", mixture)
        numpyro.sample("y_g", dist.Normal(A_G @ g, SD_G).to_event(1), obs=y_g)
        numpyro.sample("y_m", dist.MultivariateNormal(A_M @ m, COV_M), obs=y_m)

    return model


def check_two_priors(tree, scale=1.0):
    """Against the closed form for noise levels `scale` times those of the model."""
    g, m = (tree["posterior"][name].values for name in ("g", "m"))
    exact_g = oracles.posterior(build(GAUSSIAN), A_G, Y_G, jnp.eye(1) * (scale * SD_G) ** 2)
    exact_m = oracles.posterior(build(MIXTURE), A_M, Y_M, scale**2 * COV_M)
    for chains, exact in ((g, exact_g), (m, exact_m)):
        mean, covariance = oracles.moments(exact)
        assert_mean_of_chains(chains, mean)
        assert_cov_of_chains(chains, covariance, bias=0.1)
    flat = m.reshape(-1, 2)
    memberships = np.exp(jax.vmap(exact_m.log_responsibilities)(flat))
    ess = chain_ess(memberships.reshape(*m.shape[:2], 2)).min()
    assert_masses(memberships, exact_m.weights, ess=ess)


FORMS = {
    "non-centred": (None, False),
    "centred, through the flow": (None, True),
    "centred, score gradient": (FlowDensity(gradient=ScoreGradient(0.1)), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_posterior_of_a_gaussian_and_a_mixture_prior(form):
    density, centred = FORMS[form]
    engine = NUTS(200, 650, 64, centred=centred, chunk_size=425)
    tree = infer(two_priors(density), engine, Y_G, Y_M, key=jax.random.key(1), progress=False)
    check_two_priors(tree)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_two_priors(tree, scale=0.9)


def test_an_unknown_noise_level_shared_by_a_plate_of_images():
    prior = build(MIXTURE)
    y = jnp.array([[-1.2, 0.3], [1.5, -1.4]])
    location, width = -0.5, 0.5

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(location, width))
        with numpyro.plate("image", len(y)):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    engine = NUTS(200, 650, 64, target_accept=0.95, chunk_size=425)
    posterior = infer(model, engine, y, key=jax.random.key(2), progress=False)["posterior"]
    assert posterior["x"].dims == ("chain", "draw", "image", "x_dim_0")
    exact = oracles.UnknownScale(prior, y, location, width)
    mean, variance = exact.scale_moments()
    scale = posterior["scale"].values[..., None]
    assert_mean_of_chains(scale, mean, bias=0.1)
    assert_cov_of_chains(scale, variance, bias=0.15)
    assert_mean_of_chains(posterior["x"].values, exact.mean(), bias=0.1)
