"""Three small priors, one per kind of denoiser, on which NumPyro conformance is tested.

A coarse, cheap solver: conformance is exact with any, since everything is compared with the same
flow evaluated outside NumPyro (`log_prob` below).
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior.denoise import Empirical, GaussianMixture
from scoreprior.denoise.network import Network
from scoreprior.density import FlowDensity, ScoreGradient
from scoreprior.flow import EULER, FixedGrid, Flow
from scoreprior.gaussian import Dense, Moments
from scoreprior.nn import ResidualMLP
from scoreprior.prior import ScorePrior

COARSE = FixedGrid(8, method=EULER)
SCORE = FlowDensity(gradient=ScoreGradient(0.3))


def mixture():
    means = jnp.array([[-1.0, 0.5], [1.0, -0.5]])
    covariances = jnp.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]])
    return GaussianMixture.full(jnp.array([0.4, 0.6]), means, covariances)


def network():
    """An untrained network whose last layer is not zero."""
    data = jax.random.normal(jax.random.key(3), (50, 2)) * 0.7 + 0.2
    net = ResidualMLP((2,), width=8, num_blocks=1, embedding_size=8, key=jax.random.key(1))
    weight = 0.3 * jax.random.normal(jax.random.key(2), net.last.weight.shape)
    net = eqx.tree_at(lambda n: n.last.weight, net, weight)
    return Network(net, Moments.fit(data, Dense()))


def empirical():
    return Empirical(0.8 * jax.random.normal(jax.random.key(5), (12, 2, 2)), 0.4)


def flow_of(denoiser, solver):
    moments = denoiser.moments if isinstance(denoiser, Network) else denoiser.moments()
    return Flow(denoiser, moments, sigma_min=0.1, sigma_max=10.0, solver=solver)


def build(denoiser, density=None, solver=COARSE):
    return ScorePrior(flow_of(denoiser, solver), density)


@eqx.filter_jit
def _flows():
    kinds = {"exact": mixture, "network": network, "empirical": empirical}
    return {name: flow_of(kind(), COARSE) for name, kind in kinds.items()}


PRIORS = {name: ScorePrior(flow) for name, flow in _flows().items()}


def stretched(prior, factor):
    """The same prior with all of its parameters multiplied: another law, no compilation."""
    arrays, static = eqx.partition(prior.flow, eqx.is_inexact_array)
    flow = eqx.combine(jax.tree.map(lambda a: factor * a, arrays), static)
    return ScorePrior(flow, prior.density)


@eqx.filter_jit
def _log_prob(flow, density, x):
    return density.log_prob(flow, x)


@eqx.filter_jit
def _to_data(flow, u):
    return flow.to_data(u)


@eqx.filter_jit
def _gradient(flow, density, x):
    return jax.grad(lambda x: density.log_prob(flow, x))(x)


@eqx.filter_jit
def _score(denoiser, x):
    return denoiser.score(x, SCORE.gradient.sigma)


def log_prob(prior, x):
    """The log density of one event, computed from the flow and the policy alone."""
    return _log_prob(prior.flow, prior.density, x)


def log_probs(prior, xs):
    """`log_prob` of events `[n, *event]`, one at a time, [n]."""
    return jnp.stack([log_prob(prior, x) for x in xs])


def gradient(prior, x):
    """The gradient of `log_prob`."""
    return _gradient(prior.flow, prior.density, x)


def score(prior, x):
    """The gradient that the policy `SCORE` puts in its place."""
    return _score(prior.flow.denoiser, x)


def to_data(prior, u):
    """The event that the flow makes of one piece of noise."""
    return _to_data(prior.flow, u)


def draws(prior, num_draws, seed=0):
    """Noise pushed through the flow, [num_draws, *event]."""
    u = jax.random.normal(jax.random.key(seed), (num_draws, *prior.event_shape))
    return jnp.stack([to_data(prior, row) for row in u])
