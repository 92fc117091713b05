"""NumPyro's kernels on the prior: energies and forces they saw, against hand-written ones."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms
from numpyro.infer import HMC, MCMC, NUTS, BarkerMH
from numpyro.infer.reparam import TransformReparam

from laws import close
from priors import PRIORS, SCORE, draws, log_prob, log_probs, score, stretched, to_data
from scoreprior.denoise import Gaussian
from scoreprior.density import ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior
from stats import assert_cov_of_chains, assert_mean_of_chains

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(0)
STEP = {"step_size": 0.03, "adapt_step_size": False}


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]


def model(prior, y):
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.HalfNormal(0.5))
    numpyro.sample("y", dist.Normal(x, noise).to_event(x.ndim), obs=y)


def energies(prior, samples, y):
    """Minus the log joint in the unconstrained coordinates `(log noise, x)`, draw by draw."""
    x, noise = samples["x"], samples["noise"]
    lik = jnp.stack([dist.Normal(a, s).log_prob(y).sum() for a, s in zip(x, noise, strict=True)])
    hyper = dist.HalfNormal(0.5).log_prob(noise) + jnp.log(noise)
    return -(log_probs(prior, x) + hyper + lik)


def run(kernel, *args, num_chains=1, chain_method="sequential", extra=(), **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=2,
        num_samples=6,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
        **kwargs,
    )
    mcmc.run(KEY, *args, extra_fields=("potential_energy", *extra))
    return mcmc


def nuts(model=model, **kwargs):
    return NUTS(model, max_tree_depth=3, **STEP, **kwargs)


def hmc(model=model, **kwargs):
    """Where the kernel does not matter: quicker to compile."""
    return HMC(model, trajectory_length=None, num_steps=3, **STEP, **kwargs)


def barker(model=model):
    return BarkerMH(model, **STEP)


def check_energies(mcmc, prior, y):
    samples = mcmc.get_samples()
    close(mcmc.get_extra_fields()["potential_energy"], energies(prior, samples, y), 1e-8)
    assert len(np.unique(samples["noise"])) > 1  # it moved


@pytest.mark.parametrize("kernel", [nuts, hmc, barker])
def test_kernels_see_the_energy_of_the_model(prior, kernel):
    y = draws(prior, 1, seed=1)[0]
    check_energies(run(kernel(), prior, y), prior, y)


KINDS = [("exact", nuts), ("network", hmc), ("empirical", hmc)]


@pytest.mark.parametrize(("name", "kernel"), KINDS)
def test_forward_mode(name, kernel):
    prior, y = PRIORS[name], draws(PRIORS[name], 1, seed=1)[0]
    check_energies(run(kernel(forward_mode_differentiation=True), prior, y), prior, y)


@pytest.mark.parametrize("chain_method", ["vectorized", "parallel"])
@pytest.mark.parametrize(("name", "kernel"), KINDS)
def test_several_chains_see_the_energy_of_the_model(name, kernel, chain_method):
    assert jax.device_count() >= 2
    prior, y = PRIORS[name], draws(PRIORS[name], 1, seed=1)[0]
    mcmc = run(kernel(), prior, y, num_chains=2, chain_method=chain_method)
    check_energies(mcmc, prior, y)
    one, two = mcmc.get_samples(group_by_chain=True)["noise"]
    assert not np.any(np.isclose(one, two))


def test_force_follows_the_policy(prior):
    """The gradient that HMC holds at its draws is the score, its energy the density."""
    y = draws(prior, 1, seed=1)[0]
    scored = prior.with_density(SCORE)

    def fixed_noise(y):
        x = numpyro.sample("x", scored)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(x.ndim), obs=y)

    mcmc = run(hmc(fixed_noise), y, extra=("z_grad",))
    x = mcmc.get_samples()["x"]
    forces = mcmc.get_extra_fields()["z_grad"]["x"]
    close(forces, jnp.stack([-score(prior, row) - (y - row) / 0.25 for row in x]), 1e-8)
    lik = jnp.stack([dist.Normal(row, 0.5).log_prob(y).sum() for row in x])
    close(mcmc.get_extra_fields()["potential_energy"], -log_probs(prior, x) - lik, 1e-8)


def test_prior_as_a_model_argument_is_an_argument_of_the_compiled_model(prior):
    """With `jit_model_args=True` another prior of the same structure needs no compilation."""
    y = draws(prior, 1, seed=1)[0]
    mcmc = run(hmc(), prior, y, jit_model_args=True)
    check_energies(mcmc, prior, y)
    wider = stretched(prior, 1.1)
    programs = len(mcmc._cache)
    mcmc.run(KEY, wider, y, extra_fields=("potential_energy",))
    assert len(mcmc._cache) == programs
    check_energies(mcmc, wider, y)
    with pytest.raises(AssertionError):
        check_energies(mcmc, prior, y)


def test_non_centred_chain_needs_no_density(prior):
    y = draws(prior, 1, seed=1)[0]
    reparam = numpyro.handlers.reparam(model, config={"x": TransformReparam()})
    silent = prior.with_density(ScoreOnly())
    mcmc = run(hmc(reparam), silent, y)
    samples = mcmc.get_samples()
    u, noise = samples["x_base"], samples["noise"]
    x = jnp.stack([to_data(prior, row) for row in u])
    close(samples["x"], x)
    lik = jnp.stack([dist.Normal(a, s).log_prob(y).sum() for a, s in zip(x, noise, strict=True)])
    base = jax.scipy.stats.norm.logpdf(u).reshape(len(u), -1).sum(1)
    hyper = dist.HalfNormal(0.5).log_prob(noise) + jnp.log(noise)
    close(mcmc.get_extra_fields()["potential_energy"], -(base + hyper + lik), 1e-8)


def test_positive_data_by_a_prior_of_their_logarithms(prior):
    """The chain runs in the unconstrained space in which the prior was trained."""
    y = jnp.exp(draws(prior, 1, seed=1)[0])

    def positive(y):
        law = dist.TransformedDistribution(prior, transforms.ExpTransform())
        v = numpyro.sample("v", law)
        numpyro.sample("y", dist.Normal(v, 0.5).to_event(v.ndim), obs=y)

    mcmc = run(hmc(positive), y)
    v = mcmc.get_samples()["v"]
    assert np.all(v > 0)
    expected = [log_prob(prior, jnp.log(a)) + dist.Normal(a, 0.5).log_prob(y).sum() for a in v]
    close(mcmc.get_extra_fields()["potential_energy"], -jnp.stack(expected), 1e-7)


def test_plate_of_priors(prior):
    y = draws(prior, 3, seed=1)

    def plated(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(len(prior.event_shape)), obs=y)

    mcmc = run(hmc(plated), y)
    x = mcmc.get_samples()["x"]
    assert x.shape[1:] == y.shape
    expected = [log_probs(prior, a).sum() + dist.Normal(a, 0.5).log_prob(y).sum() for a in x]
    close(mcmc.get_extra_fields()["potential_energy"], -jnp.stack(expected), 1e-8)


# The law of the chains, where it is known


LAW = Gaussian(Moments.dense(jnp.array([0.5, -1.0]), jnp.array([[1.0, 0.6], [0.6, 0.8]])))
PRIOR = ScorePrior(Flow(LAW, LAW.law, sigma_min=0.1, solver=FixedGrid(1)))
Y, NOISE = jnp.array([1.5]), 0.5


@pytest.mark.parametrize("centred", [True, False])
def test_nuts_draws_the_gaussian_posterior(centred):
    """One coordinate observed; the prior is that of `X + sigma_min N`."""

    def half(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(x[:1], NOISE).to_event(1), obs=y)

    config = {} if centred else {"x": TransformReparam()}
    mcmc = MCMC(
        NUTS(numpyro.handlers.reparam(half, config=config)),
        num_warmup=300,
        num_samples=1000,
        num_chains=25,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, Y)
    noisy = Gaussian(Moments.dense(LAW.law.mean, LAW.law.covariance() + 0.01 * jnp.eye(2)))
    truth = noisy.posterior(jnp.eye(2)[:1], Y, NOISE**2 * jnp.eye(1)).law
    chains = mcmc.get_samples(group_by_chain=True)["x"]
    assert_mean_of_chains(chains, truth.mean, bias=0.1)
    assert_cov_of_chains(chains, truth.covariance(), bias=0.1)
