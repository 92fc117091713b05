"""Energy networks: gradients, wrappers, what they learn, and the density policy made of them."""

import functools
import warnings

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import oracles
from laws import check_denoiser, check_pytree, close
from oracles import A_G, A_M, COV_M, GAUSSIAN, SD_G, Y_G, Y_M
from priors import mixture, network
from scoreprior import nn
from scoreprior.denoise import (
    AbstractDenoiser,
    Calibrated,
    Conditioned,
    EnergyNetwork,
    Gaussian,
    InnerProduct,
    Noised,
    Rescaled,
    Smoothed,
    SquaredDistance,
)
from scoreprior.density import EnergyDensity
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Dense, Moments
from scoreprior.infer import infer
from scoreprior.mcmc import NUTS
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import HMCMoves, TemperedSMC
from scoreprior.train import DenoisingLoss, LogUniform, Residual, Teacher, fit
from scoreprior.vi import VI, MeanField, Pathfinder
from stats import assert_cov_of_chains, assert_mean, assert_mean_of_chains
from training import KEY, MIXTURE, MIXTURE_MOMENTS, draws

GAINS = [InnerProduct(), SquaredDistance()]
X = jax.random.normal(jax.random.key(4), (3, 2))


def random_net(event_shape=(2,), context_size=0):
    """A network none of whose layers is zero."""
    net = nn.ResidualMLP(
        event_shape,
        width=8,
        num_blocks=1,
        embedding_size=8,
        context_size=context_size,
        key=jax.random.key(1),
    )
    flat, unravel = jax.flatten_util.ravel_pytree(eqx.filter(net, eqx.is_inexact_array))
    moved = unravel(flat + 0.3 * jax.random.normal(jax.random.key(2), flat.shape))
    return eqx.combine(moved, net)


def energy_network(gain=GAINS[0]):
    data = jax.random.normal(jax.random.key(3), (50, 2)) @ jnp.array([[1.0, 0.8], [0.0, 0.3]])
    return EnergyNetwork(random_net(), Moments.fit(data, Dense()), gain)


@eqx.filter_jit
def score_and_slope(denoiser, x, sigma, context=None):
    """The score, and minus the gradient of the energy."""
    slope = jax.grad(lambda x: -denoiser.energy(x, sigma, context))(x)
    return denoiser.score(x, sigma, context), slope


@pytest.mark.parametrize("gain", GAINS, ids=["inner", "squared"])
def test_an_energy_network_is_a_denoiser_whose_score_is_minus_the_gradient(gain):
    denoiser = energy_network(gain)
    for sigma in (0.1, 1.0, 30.0):
        check_denoiser(denoiser, X, sigma)
        close(*score_and_slope(denoiser, X[0], sigma))
    check_pytree(denoiser, lambda d: d.energy(X[0], 0.5))
    assert float(jnp.abs(denoiser(X[0], 0.5) - denoiser.moments.denoise(X[0], 0.5)).max()) > 0.01


@pytest.mark.parametrize("gain", GAINS, ids=["inner", "squared"])
def test_a_silent_network_is_gaussian_data(gain):
    denoiser = energy_network(gain)
    silent = eqx.tree_at(lambda d: d.net, denoiser, lambda u, level, context: jnp.zeros_like(u))
    law = denoiser.moments
    close(silent(X[0], 0.3), law.denoise(X[0], 0.3))
    gaps = [silent.energy(x, 0.3) + law.log_prob(x, 0.3) for x in X]
    close(jnp.stack(gaps), jnp.full(3, gaps[0]))


def test_isotropic_energies_are_the_published_ones():
    """PITA's and the squared distance, written with the coefficients of EDM."""
    sigma, scale = 0.4, 1.3
    moments = Moments(jnp.zeros(2), jnp.full(2, scale**2))
    net = random_net()
    a = np.hypot(sigma, scale)
    c_skip, c_out, c_in = scale**2 / a**2, sigma * scale / a, 1 / a
    for x in X:
        output = net(c_in * x, jnp.log(sigma / scale) / 4, None)
        inner = (1 - c_skip) / (2 * sigma**2) * x @ x - c_out / sigma**2 * output @ x
        close(EnergyNetwork(net, moments).energy(x, sigma), inner)
        squared = jnp.sum((c_in * x - c_out / (c_in * sigma**2) * output) ** 2) / 2
        close(EnergyNetwork(net, moments, SquaredDistance()).energy(x, sigma), squared)


def test_energies_of_a_squared_distance_are_not_negative():
    points = 5 * jax.random.normal(KEY, (200, 2))

    def lowest(denoiser):
        return float(jax.vmap(lambda x: denoiser.energy(x, 0.1))(points).min())

    assert lowest(energy_network(SquaredDistance())) >= 0 > lowest(energy_network())


def test_a_context_reaches_the_network():
    moments = Moments(jnp.zeros(2), jnp.ones(2))
    denoiser = EnergyNetwork(random_net(context_size=3), moments)
    context = jnp.arange(3.0)
    close(*score_and_slope(denoiser, X[0], 0.5, context))
    fixed = Conditioned(denoiser, context)
    close(*score_and_slope(fixed, X[0], 0.5))
    close(fixed.energy(X[0], 0.5), denoiser.energy(X[0], 0.5, context))
    assert abs(float(fixed.energy(X[0], 0.5) - denoiser.energy(X[0], 0.5, -context))) > 1e-3
    with pytest.raises(ValueError, match="context is already fixed"):
        fixed.energy(X[0], 0.5, context)


OFFSETS = jnp.array([[0.3, -0.2], [0.1, 0.4]])
MADE_OF_OTHERS = {
    "exact": mixture,
    "rescaled": lambda: Rescaled(mixture(), jnp.array([1.0, 2.0]), 3.0),
    "noised": lambda: Noised(mixture(), 0.2),
    "calibrated": lambda: Calibrated(mixture(), jnp.array([0.1, 1.0]), OFFSETS, 1.0),
    "smoothed": lambda: Smoothed(mixture(), 0.2, OFFSETS),
    "learned": lambda: Rescaled(Noised(energy_network(), 0.2), 1.0, 2.0),
}


@pytest.mark.parametrize("name", MADE_OF_OTHERS)
def test_the_energy_of_what_is_made_of_others_has_their_score(name):
    denoiser = MADE_OF_OTHERS[name]()
    for sigma in (0.2, 1.5):
        close(*score_and_slope(denoiser, X[0], sigma))


@pytest.mark.parametrize(
    "denoiser", [network(), Rescaled(network(), 0.0, 2.0), Noised(lambda x, sigma: x, 0.1)]
)
def test_a_denoiser_without_an_energy_says_so(denoiser):
    with pytest.raises(NotImplementedError, match=r"has no energy: its score need not.*Teacher"):
        denoiser.energy(X[0], 0.5)


def test_an_unknown_gain_is_named(as_user):
    with pytest.raises(TypeError, match=r"gain must be InnerProduct\(\) or .*, got None"):
        EnergyNetwork(random_net(), MIXTURE_MOMENTS, None)


class Perceptron(eqx.Module):
    """A small network of `u` and the noise level, cheap to differentiate twice."""

    layers: eqx.nn.MLP

    def __init__(self):
        self.layers = eqx.nn.MLP(4, 2, 32, 2, jax.nn.silu, key=KEY)

    def __call__(self, u, log_sigma, context):
        return self.layers(
            jnp.concatenate([u, jnp.stack([log_sigma, jax.nn.sigmoid(4 * log_sigma)])])
        )


LEVELS = LogUniform(0.1, 10.0)
DSM = DenoisingLoss(LEVELS, Residual(MIXTURE_MOMENTS))
DISTILLATION = DenoisingLoss(LEVELS, Residual(MIXTURE_MOMENTS), Teacher(MIXTURE))


def student():
    return EnergyNetwork(Perceptron(), MIXTURE_MOMENTS)


def trained(loss, num_steps):
    return fit(
        student(),
        draws(MIXTURE, 5000),
        loss,
        key=KEY,
        num_steps=num_steps,
        batch_size=128,
        optimiser=optax.adam(optax.cosine_decay_schedule(1e-2, num_steps)),
        averaging=0.95,
        progress=False,
    ).denoiser


@eqx.filter_jit
def gap(denoiser, sigma):
    """Standard deviation over noised data of the error of the log density, in nats."""
    noise = jax.random.normal(jax.random.key(9), (1000, 2))
    x = draws(MIXTURE, 1000, jax.random.key(8)) + sigma * noise
    return jnp.std(jax.vmap(lambda x: denoiser.energy(x, sigma) + MIXTURE.log_prob(x, sigma))(x))


@eqx.filter_jit
def excess(denoiser, sigma):
    """Mean square distance to the exact denoiser over that of the Gaussian one."""
    noise = jax.random.normal(jax.random.key(9), (1000, 2))
    x = draws(MIXTURE, 1000, jax.random.key(8)) + sigma * noise

    def distance(other):
        return jnp.mean(jax.vmap(lambda x: other(x, sigma) - MIXTURE(x, sigma))(x) ** 2)

    return distance(denoiser) / distance(Gaussian(MIXTURE_MOMENTS))


LEVELS_TESTED = (0.2, 0.5, 1.0, 2.0)


@functools.cache
def distilled():
    return trained(DISTILLATION, 400)


def test_denoising_score_matching_trains_an_energy():
    """Nine tenths of the way from the Gaussian denoiser to the exact one."""
    denoiser = trained(DSM, 400)
    assert max(float(excess(denoiser, sigma)) for sigma in LEVELS_TESTED) < 0.1
    assert min(float(excess(student(), sigma)) for sigma in LEVELS_TESTED) > 0.9


def test_distillation_gives_the_log_density_of_the_teacher():
    """Its differences to a fifth of a nat; the network knew nothing of them before."""
    assert max(float(gap(distilled(), sigma)) for sigma in LEVELS_TESTED) < 0.2
    assert min(float(gap(student(), sigma)) for sigma in LEVELS_TESTED) > 0.3


@pytest.mark.parametrize(("of", "factor"), [(student, 1.5), (distilled, 20)])
def test_gradients_of_distillation_are_those_of_score_matching_with_less_variance(of, factor):
    """At the start of training and near its end; of the last layer, for 20,000 events each."""
    denoiser = of()
    weight_of = lambda d: d.net.layers.layers[-1].weight

    @jax.jit
    def gradients(x, u, keys):
        def one(loss, x, u, key):
            def value(weight):
                return loss(eqx.tree_at(weight_of, denoiser, weight), x, u, None, key=key)

            return jax.grad(value)(weight_of(denoiser)).ravel()

        return [jax.vmap(one, (None, 0, 0, 0))(loss, x, u, keys) for loss in (DSM, DISTILLATION)]

    x, u = draws(MIXTURE, 20_000, jax.random.key(11)), jax.random.uniform(KEY, (20_000,))
    plain, projected = gradients(x, u, jax.random.split(jax.random.key(13), 20_000))
    assert_mean(plain - projected, 0)
    assert float(plain.var(0).sum() / projected.var(0).sum()) > factor


def test_a_teacher_is_told_the_context_and_is_not_trained():
    teacher = EnergyNetwork(random_net(context_size=3), MIXTURE_MOMENTS)
    loss = DenoisingLoss(LEVELS, Residual(MIXTURE_MOMENTS), Teacher(teacher))
    value = lambda loss, student: loss(student, X[0], jnp.asarray(0.5), jnp.arange(3.0), key=KEY)
    assert float(value(loss, teacher)) == 0
    assert float(value(loss, student())) > 1e-3
    slopes = eqx.filter_grad(value)(loss, student())
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(slopes.target))


def flow_of(denoiser):
    moments = getattr(denoiser, "moments", None)
    return Flow(denoiser, moments() if callable(moments) else moments, sigma_min=0.1)


@pytest.mark.parametrize("denoiser", [mixture(), energy_network()], ids=["exact", "learned"])
def test_the_density_is_minus_the_energy_and_its_gradient_the_score(denoiser):
    flow = flow_of(denoiser)
    value = jax.jit(lambda x: EnergyDensity().log_prob(flow, x))
    close(value(X[0]), -denoiser.energy(X[0], 0.1))
    close(jax.grad(value)(X[0]), denoiser.score(X[0], 0.1))
    close(jax.hessian(value)(X[0]), jax.jacfwd(lambda x: denoiser.score(x, 0.1))(X[0]), 1e-8)
    assert "while(" not in value.lower(X[0]).compile().as_text()
    prior = ScorePrior(flow, EnergyDensity())
    close(prior.log_prob(X), jnp.stack([value(x) for x in X]))


def test_an_exact_denoiser_keeps_its_constant():
    close(EnergyDensity().log_prob(flow_of(mixture()), X[0]), mixture().log_prob(X[0], 0.1))


class Shifted(AbstractDenoiser):
    """A denoiser whose energy is known up to a constant: here 100."""

    denoiser: AbstractDenoiser

    def __call__(self, x, sigma, context=None):
        return self.denoiser(x, sigma, context)

    def energy(self, x, sigma, context=None):
        return self.denoiser.energy(x, sigma, context) + 100


def model_of(denoiser, A, cov_y):
    # One step is exact for Gaussian data; elsewhere the flow only says where chains start.
    solver = FixedGrid(1)
    flow = Flow(Shifted(denoiser), denoiser.moments(), sigma_min=0.1, solver=solver)
    prior = ScorePrior(flow, EnergyDensity())

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.MultivariateNormal(A @ x, cov_y), obs=y)

    return model


CASES = {
    "gaussian": (GAUSSIAN, A_G, Y_G, SD_G**2 * jnp.eye(1)),
    "mixture": (oracles.MIXTURE, A_M, Y_M, COV_M),
}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("case", CASES)
def test_nuts_in_the_centred_form_draws_from_the_posterior(case):
    denoiser, A, y, cov_y = CASES[case]
    engine = NUTS(150, 300, 16, centred=True)
    tree = infer(model_of(denoiser, A, cov_y), engine, y, key=KEY, progress=False)
    chains = tree["posterior"]["x"].values
    mean, covariance = oracles.moments(oracles.at_level(denoiser, 0.1).posterior(A, y, cov_y))
    assert_mean_of_chains(chains, mean, bias=0.2)
    assert_cov_of_chains(chains, covariance, bias=0.3)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean_of_chains(chains, mean + 0.2 * np.sqrt(np.diag(covariance)), bias=0.2)


@pytest.mark.promotes_ranks
def test_the_evidence_of_tempering_does_not_see_the_constant():
    denoiser, A, y, cov_y = CASES["gaussian"]
    of = Problem.from_model(model_of(denoiser, A, cov_y), y)
    draws = TemperedSMC(200, 16, centred=True, kernel=HMCMoves(3)).run(of, KEY, progress=False)
    value, se = (float(draws.extra[name][1]) for name in ("log_evidence", "log_evidence_se"))
    assert abs(value - float(oracles.at_level(denoiser, 0.1).log_evidence(A, y, cov_y))) < 5 * se
    assert se < 0.03


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "engine", [VI(MeanField(), 5, 25, centred=True), Pathfinder(1, 25, centred=True)]
)
def test_no_evidence_is_reported_where_the_constant_is_missing(engine):
    denoiser, A, y, cov_y = CASES["gaussian"]
    of = Problem.from_model(model_of(denoiser, A, cov_y), y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "k-hat is")
        draws = engine.run(of, KEY, progress=False)
    assert draws.extra.keys() == {"khat", "bound"}


@pytest.mark.promotes_ranks
def test_a_prior_without_an_energy_is_refused_before_any_work():
    prior = ScorePrior(flow_of(network()), EnergyDensity())

    def model():
        numpyro.sample("x", prior)

    with pytest.raises(NotImplementedError, match="Network has no energy"):
        infer(model, NUTS(centred=True), key=KEY, progress=False)
    unknown = Flow(lambda x, sigma: x, MIXTURE_MOMENTS, sigma_min=0.1)
    with pytest.raises(NotImplementedError, match="function has no energy"):
        EnergyDensity().log_prob(unknown, X[0])
