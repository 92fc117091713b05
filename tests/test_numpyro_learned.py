"""Parameters of the denoiser learned by SVI: in the model, in the guide, in three frameworks."""

import equinox as eqx
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer import initialization as init
from numpyro.infer.util import log_density
from numpyro.optim import Adam

from laws import close
from priors import COARSE, PRIORS, draws, network
from scoreprior.denoise.network import Network
from scoreprior.density import FlowDensity
from scoreprior.flow import Flow
from scoreprior.prior import ScorePrior

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(0)


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]


# The prior as a guide


def test_prior_as_a_guide(prior):
    """Loss and gradient in the denoiser's parameters, by hand, through draw and density."""
    arrays, static = eqx.partition(prior.flow, eqx.is_inexact_array)
    y = draws(prior, 1, seed=1)[0]

    def target(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand(prior.event_shape).to_event())
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(x.ndim), obs=y)

    def guide(y):
        learned = numpyro.param("arrays", arrays)
        numpyro.sample("x", ScorePrior(eqx.combine(learned, static)))

    def loss(arrays):
        return Trace_ELBO().loss(KEY, {"arrays": arrays}, target, guide, y)

    _, guide_key = jax.random.split(KEY)
    _, key = jax.random.split(guide_key)
    u = jax.random.normal(key, prior.event_shape)

    def by_hand(arrays):
        flow = eqx.combine(arrays, static)
        x = flow.to_data(u)
        joint = dist.Normal(0.0, 1.0).log_prob(x).sum() + dist.Normal(x, 0.5).log_prob(y).sum()
        return FlowDensity().log_prob(flow, x) - joint

    value, slope = jax.jit(jax.value_and_grad(loss))(arrays)
    expected, expected_slope = jax.jit(jax.value_and_grad(by_hand))(arrays)
    close(value, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-6, 1e-8), slope, expected_slope)


# Parameters of the denoiser learned inside a model


def prior_of(net, moments, density=None):
    flow = Flow(Network(net, moments), moments, sigma_min=0.1, sigma_max=10.0, solver=COARSE)
    return ScorePrior(flow, density)


MOMENTS = network().moments


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, log_sigma, context=None):
        h = flax.linen.Dense(4, param_dtype=float)(jnp.append(x, log_sigma))
        return flax.linen.Dense(2, param_dtype=float)(jnp.tanh(h))


class NNX(flax.nnx.Module):
    def __init__(self):
        rngs = flax.nnx.Rngs(0)
        self.first = flax.nnx.Linear(3, 4, param_dtype=float, rngs=rngs)
        self.second = flax.nnx.Linear(4, 2, param_dtype=float, rngs=rngs)

    def __call__(self, x, log_sigma, context=None):
        return self.second(jnp.tanh(self.first(jnp.append(x, log_sigma))))


def linen_net(params):
    return lambda x, s, c=None: Linen().apply({"params": params}, x, s, c)


def nnx_net(params):
    graph, state = flax.nnx.split(NNX())
    flax.nnx.replace_by_pure_dict(state, params)
    return flax.nnx.merge(graph, state)


def eqx_net(params):
    return eqx.combine(params, eqx.partition(network().net, eqx.is_inexact_array)[1])


FRAMEWORKS = {
    "equinox": (lambda: eqx_module("net", network().net), eqx_net),
    "linen": (lambda: flax_module("net", Linen(), jnp.zeros(2), jnp.zeros(())), linen_net),
    "nnx": (lambda: nnx_module("net", NNX()), nnx_net),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("latent", [False, True])
def test_weights_of_a_network_are_learned_inside_a_model(name, latent):
    """Loss and gradient in the weights equal those of a bare differentiated solve."""
    register, rebuild = FRAMEWORKS[name]
    y = draws(PRIORS["network"], 2)

    def with_data(y):
        law = prior_of(register(), MOMENTS)
        with numpyro.plate("data", len(y)):
            if latent:
                x = numpyro.sample("x", law)
                numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
            else:
                numpyro.sample("y", law, obs=y)

    guide = autoguide.AutoDelta(with_data, init_loc_fn=init.init_to_value(values={"x": 0.5 * y}))
    svi = SVI(with_data, guide, Adam(1e-2), Trace_ELBO())
    state = svi.init(KEY, y)
    params = svi.get_params(state)

    @jax.jit
    def evaluate(params):
        return jax.value_and_grad(
            lambda params: Trace_ELBO().loss(KEY, params, with_data, guide, y)
        )(params)

    @jax.jit
    def by_hand(params):
        def loss(weights):
            law = prior_of(rebuild(weights), MOMENTS)
            x = 0.5 * y if latent else y
            lik = dist.Normal(x, 0.5).log_prob(y).sum() if latent else 0.0
            one = lambda e: FlowDensity().log_prob(law.flow, e)
            return -jax.vmap(one)(x).sum() - lik

        return jax.value_and_grad(loss)(params["net$params"])

    loss, slope = evaluate(params)
    expected, expected_slope = by_hand(params)
    close(loss, expected)
    slope = slope["net$params"]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope)) > 1e-2
    for got, wanted in zip(jax.tree.leaves(slope), jax.tree.leaves(expected_slope), strict=True):
        close(got, wanted, 1e-7, 1e-9)
    state, first = jax.jit(svi.update)(state, y)
    close(first, expected)
    moved = svi.get_params(state)["net$params"]
    changes = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), moved, params["net$params"])
    assert max(map(float, jax.tree.leaves(changes))) > 5e-3


@pytest.mark.parametrize("name", ["exact", "empirical"])
def test_parameters_of_closed_forms_are_learned_inside_a_model(name):
    prior = PRIORS[name]
    arrays, static = eqx.partition(prior.flow.denoiser, eqx.is_inexact_array)
    x = draws(prior, 2)

    def learned(arrays):
        denoiser = eqx.combine(arrays, static)
        return eqx.tree_at(lambda f: f.denoiser, prior.flow, denoiser)

    def with_data(x):
        law = ScorePrior(learned(numpyro.param("denoiser", arrays)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", law, obs=x)

    def total(arrays):
        return log_density(with_data, (x,), {}, {"denoiser": arrays})[0]

    def by_hand(arrays):
        return jax.vmap(lambda e: FlowDensity().log_prob(learned(arrays), e))(x).sum()

    value, slope = jax.jit(jax.value_and_grad(total))(arrays)
    expected, expected_slope = jax.jit(jax.value_and_grad(by_hand))(arrays)
    close(value, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-7, 1e-9), slope, expected_slope)
