"""Energy networks: gradients, wrappers, what they learn, and the density policy made of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from laws import check_denoiser, check_pytree, close
from priors import mixture, network
from scoreprior import nn
from scoreprior.denoise import (
    Calibrated,
    Conditioned,
    EnergyNetwork,
    Gaussian,
    InnerProduct,
    Network,
    Noised,
    Rescaled,
    Smoothed,
    SquaredDistance,
)
from scoreprior.gaussian import Dense, Moments
from scoreprior.train import DenoisingLoss, LogUniform, Residual, Teacher, fit
from stats import assert_same_mean
from training import KEY, MIXTURE, MIXTURE_MOMENTS, draws

GAINS = [InnerProduct(), SquaredDistance()]
X = jax.random.normal(jax.random.key(4), (3, 2))


def random_net(event_shape=(2,), context_size=0):
    """A network whose last layer is not zero."""
    net = nn.ResidualMLP(
        event_shape,
        width=8,
        num_blocks=1,
        embedding_size=8,
        context_size=context_size,
        key=jax.random.key(1),
    )
    weight = 0.5 * jax.random.normal(jax.random.key(2), net.last.weight.shape)
    return eqx.tree_at(lambda n: n.last.weight, net, weight)


def energy_network(gain=InnerProduct()):
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
        squared = jnp.sum((c_in * x - c_out / (c_in * sigma**2) * c_in * output) ** 2) / 2
        close(EnergyNetwork(net, moments, SquaredDistance()).energy(x, sigma), squared)


def test_energies_of_a_squared_distance_are_not_negative():
    points = 5 * jax.random.normal(KEY, (200, 2))
    lowest = {
        type(gain): float(jax.vmap(lambda x, d=energy_network(gain): d.energy(x, 0.1))(points).min())
        for gain in GAINS
    }
    assert lowest[SquaredDistance] >= 0 > lowest[InnerProduct]


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


def test_an_unknown_gain_is_named():
    with pytest.raises(TypeError, match=r"gain must be InnerProduct\(\) or .*, got None"):
        EnergyNetwork(random_net(), MIXTURE_MOMENTS, None)


LEVELS = LogUniform(0.05, 20.0)
DSM = DenoisingLoss(LEVELS, Residual(MIXTURE_MOMENTS))
DISTILLATION = DenoisingLoss(LEVELS, Residual(MIXTURE_MOMENTS), Teacher(MIXTURE))


def student():
    net = nn.ResidualMLP((2,), width=32, num_blocks=1, embedding_size=16, key=KEY)
    return EnergyNetwork(net, MIXTURE_MOMENTS)


def trained(loss, num_steps):
    return fit(
        student(),
        draws(MIXTURE, 5000),
        loss,
        key=KEY,
        num_steps=num_steps,
        batch_size=256,
        optimiser=optax.adam(5e-3),
        averaging=0.99,
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


def test_denoising_score_matching_trains_an_energy():
    """From the Gaussian denoiser nine tenths of the way to the exact one, as for a `Network`."""
    denoiser = trained(DSM, 400)
    assert float(excess(student(), 0.5)) == pytest.approx(1.0)
    print([float(excess(denoiser, s)) for s in (0.2, 0.5, 1.0, 2.0)],[float(gap(denoiser, s)) for s in (0.2, 0.5, 1.0, 2.0)])
    assert max(float(excess(denoiser, sigma)) for sigma in (0.2, 0.5, 1.0, 2.0)) < 0.1


def test_distillation_gives_the_log_density_of_the_teacher():
    denoiser = trained(DISTILLATION, 400)
    gaps = [float(gap(denoiser, sigma)) for sigma in (0.2, 0.5, 1.0, 2.0)]
    untrained = [float(gap(student(), sigma)) for sigma in (0.2, 0.5, 1.0, 2.0)]
    print(gaps, untrained)
