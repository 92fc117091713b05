"""The prior under NumPyro's effect handlers, against the same densities written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive, log_likelihood
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import log_density, potential_energy

from laws import close
from priors import PRIORS, SCORE, draws, log_prob, log_probs, to_data

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(0)


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]


def model(prior, y=None):
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.HalfNormal(0.5))
    numpyro.sample("y", dist.Normal(x, noise).to_event(x.ndim), obs=y)


def latents(prior):
    return {"x": draws(prior, 1)[0], "noise": jnp.array(0.7)}


def log_prior(prior, values):
    return log_prob(prior, values["x"]) + dist.HalfNormal(0.5).log_prob(values["noise"])


def log_lik(values, y):
    return dist.Normal(values["x"], values["noise"]).log_prob(y).sum()


def test_seeded_trace_draws_from_the_flow(prior):
    trace = handlers.trace(handlers.seed(model, KEY)).get_trace(prior)
    site = trace["x"]
    key = site["kwargs"]["rng_key"]
    u = jax.random.normal(key, prior.event_shape)
    close(site["value"], to_data(prior, u))


def test_log_density_with_substituted_and_conditioned_values(prior):
    values, y = latents(prior), draws(prior, 1, seed=1)[0]
    expected = log_prior(prior, values) + log_lik(values, y)
    close(log_density(model, (prior, y), {}, values)[0], expected)
    conditioned = handlers.condition(model, {"y": y, "x": values["x"]})
    trace = handlers.trace(handlers.seed(conditioned, KEY)).get_trace(prior)
    assert trace["x"]["is_observed"]
    close(trace["x"]["value"], values["x"])
    close(log_density(conditioned, (prior,), {}, values)[0], expected)
    substituted = handlers.substitute(handlers.seed(model, KEY), {"x": values["x"]})
    trace = handlers.trace(substituted).get_trace(prior)
    assert not trace["x"]["is_observed"]
    close(trace["x"]["value"], values["x"])


def test_scale_and_mask(prior):
    values = latents(prior)
    x_part = log_prob(prior, values["x"])
    rest = log_density(model, (prior, values["x"]), {}, values)[0] - x_part

    def scaled(y):
        with handlers.scale(scale=3.0):
            x = numpyro.sample("x", prior)
        noise = numpyro.sample("noise", dist.HalfNormal(0.5))
        numpyro.sample("y", dist.Normal(x, noise).to_event(x.ndim), obs=y)

    close(log_density(scaled, (values["x"],), {}, values)[0], 3 * x_part + rest)

    def masked(y):
        with handlers.mask(mask=False):
            x = numpyro.sample("x", prior)
        noise = numpyro.sample("noise", dist.HalfNormal(0.5))
        numpyro.sample("y", dist.Normal(x, noise).to_event(x.ndim), obs=y)

    close(log_density(masked, (values["x"],), {}, values)[0], rest)


def test_lift_puts_the_prior_on_a_param(prior):
    def plain(y):
        w = numpyro.param("w", jnp.zeros(prior.event_shape))
        numpyro.sample("y", dist.Normal(w, 1.0).to_event(w.ndim), obs=y)

    y, w = draws(prior, 2)
    lifted = handlers.lift(plain, prior={"w": prior})
    site = handlers.trace(handlers.seed(lifted, KEY)).get_trace(y)["w"]
    assert site["type"] == "sample"
    expected = log_prob(prior, w) + dist.Normal(w, 1.0).log_prob(y).sum()
    close(log_density(lifted, (y,), {}, {"w": w})[0], expected)


def test_observed_prior(prior):
    def observed(x, shift):
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", prior, obs=x - shift)

    x = draws(prior, 3)
    expected = log_probs(prior, x - 0.3).sum() + dist.Normal(0.0, 1.0).log_prob(0.3)
    close(log_density(observed, (x, 0.0), {}, {"shift": jnp.array(0.3)})[0], expected)


def plated(prior, y, size=None):
    with numpyro.plate("data", len(y), subsample_size=size) as index:
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(len(prior.event_shape)), obs=y[index])


def test_plate_and_subsampling(prior):
    y, x = draws(prior, 4), draws(prior, 4, seed=1)
    joint = log_probs(prior, x) + dist.Normal(x, 0.5).log_prob(y).reshape(4, -1).sum(1)
    close(log_density(plated, (prior, y), {}, {"x": x})[0], joint.sum())
    index = jnp.array([2, 0])
    values = {"x": x[index], "data": index}
    close(log_density(plated, (prior, y, 2), {}, values)[0], 2 * joint[index].sum())
    trace = handlers.trace(handlers.seed(plated, KEY)).get_trace(prior, y, 2)
    assert trace["x"]["value"].shape == (2, *prior.event_shape)
    assert not np.allclose(trace["x"]["value"][0], trace["x"]["value"][1])


def chain(prior, y):
    def step(state, y):
        x = numpyro.sample("x", prior)
        state = 0.5 * state + x
        numpyro.sample("y", dist.Normal(state, 1.0).to_event(x.ndim), obs=y)
        return state, state

    return scan(step, jnp.zeros(prior.event_shape), y)


def chain_by_hand(prior, x, y):
    state, total = jnp.zeros(prior.event_shape), 0.0
    for x_t, y_t in zip(x, y, strict=True):
        state = 0.5 * state + x_t
        total += log_prob(prior, x_t) + dist.Normal(state, 1.0).log_prob(y_t).sum()
    return total


def test_scan(prior):
    y, x = draws(prior, 2), draws(prior, 2, seed=1)
    close(log_density(chain, (prior, y), {}, {"x": x})[0], chain_by_hand(prior, x, y))
    energy = jax.jit(jax.grad(lambda x: potential_energy(chain, (prior, y), {}, {"x": x})))
    close(-energy(x), jax.jit(jax.grad(lambda x: chain_by_hand(prior, x, y)))(x), 1e-7)
    trace = handlers.trace(handlers.seed(chain, KEY)).get_trace(prior, y)
    assert len(np.unique(trace["x"]["value"])) == y.size


def test_transform_reparam(prior):
    y, u = draws(prior, 1)[0], jax.random.normal(KEY, prior.event_shape)
    reparam = handlers.reparam(model, config={"x": TransformReparam()})
    values = {"x_base": u, "noise": jnp.array(0.7)}
    total, trace = log_density(reparam, (prior, y), {}, values)
    x = to_data(prior, u)
    close(trace["x"]["value"], x)
    expected = jax.scipy.stats.norm.logpdf(u).sum() + dist.HalfNormal(0.5).log_prob(0.7)
    close(total, expected + log_lik({"x": x, "noise": 0.7}, y))
    plates = handlers.reparam(plated, config={"x": TransformReparam()})
    base = jax.random.normal(KEY, (2, *prior.event_shape))
    trace = log_density(plates, (prior, jnp.stack([y, y])), {}, {"x_base": base})[1]
    close(trace["x"]["value"], jnp.stack([to_data(prior, row) for row in base]))


@pytest.mark.parametrize("parallel", [True, False])
def test_prior_predictive_draws_have_standard_normal_noise(prior, parallel):
    """Draws mapped back are N(0, I): first two moments within 5 standard errors."""
    num = 2000
    samples = Predictive(model, num_samples=num, parallel=parallel)(KEY, prior)
    u = prior.transforms[0].inv(samples["x"]).reshape(num, -1)
    assert np.all(np.abs(u.mean(0)) < 5 / np.sqrt(num))
    assert np.all(np.abs((u**2).mean(0) - 1) < 5 * np.sqrt(2 / num))
    # The data are the draws plus noise of the drawn level.
    z = (samples["y"] - samples["x"]).reshape(num, -1) / samples["noise"][:, None]
    assert np.all(np.abs((z**2).mean(0) - 1) < 5 * np.sqrt(2 / num))


def test_posterior_predictive_and_log_likelihood(prior):
    x, y = draws(prior, 3), draws(prior, 1, seed=1)[0]
    posterior = {"x": x, "noise": jnp.array([0.1, 0.2, 0.3])}
    samples = Predictive(model, posterior)(KEY, prior)
    assert set(samples) == {"y"}
    keys = jax.random.split(KEY, 3)
    by_hand = [
        handlers.trace(
            handlers.seed(
                handlers.substitute(model, {"x": x[i], "noise": posterior["noise"][i]}), k
            )
        ).get_trace(prior)["y"]["value"]
        for i, k in enumerate(keys)
    ]
    close(samples["y"], jnp.stack(by_hand))
    expected = [log_lik({"x": x[i], "noise": posterior["noise"][i]}, y) for i in range(3)]
    close(log_likelihood(model, posterior, prior, y)["y"], jnp.stack(expected))


def test_log_likelihood_of_an_observed_prior(prior):
    def observed(x):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", prior, obs=x - loc)

    x, loc = draws(prior, 2), jnp.array([0.1, -0.4, 0.2])
    expected = jnp.stack([log_probs(prior, x - shift) for shift in loc])
    close(log_likelihood(observed, {"loc": loc}, x)["x"], expected)


def test_score_gradient_survives_every_handler(prior):
    """The gradient of a scaled, plated, conditioned model is the score where the policy says so."""
    scored = prior.with_density(SCORE)
    y, x = draws(prior, 4), draws(prior, 2, seed=1)
    index = jnp.array([2, 0])

    def total(x):
        return log_density(plated, (scored, y, 2), {}, {"x": x, "data": index})[0]

    by_score = jax.vmap(lambda e: prior.flow.denoiser.score(e, 0.3))(x)
    gradient = jax.jit(jax.grad(total))(x)
    close(gradient, 2 * (by_score + (y[index] - x) / 0.25))
    through_solver = jax.vmap(jax.grad(lambda e: log_prob(prior, e)))(x)
    assert not np.allclose(by_score, through_solver, rtol=1e-3)
