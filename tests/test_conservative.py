"""Asymmetry of Jacobians: exact where it is known, zero for energies, and what a penalty does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scoreprior.denoise import AbstractDenoiser, EnergyNetwork, Network, asymmetry
from scoreprior.train import Conservative, DenoisingLoss, LogUniform, Residual
from training import KEY, MIXTURE, MIXTURE_MOMENTS, draws, quick


class Linear(AbstractDenoiser):
    matrix: jax.Array

    def __call__(self, x, sigma, context=None):
        scale = 1.0 if context is None else context
        return (scale * self.matrix @ x.ravel() / (1 + sigma**2)).reshape(x.shape)


PARTS = jax.random.normal(KEY, (2, 4, 4))
SYMMETRIC, ANTISYMMETRIC = PARTS[0] + PARTS[0].T, PARTS[1] - PARTS[1].T
X_T = jax.random.normal(jax.random.key(1), (4000, 2, 2))


def test_the_asymmetry_of_a_linear_denoiser_is_the_closed_form():
    """`J = S + A` with `A` antisymmetric: `|J - J'|^2 = 4|A|^2` and `|J|^2 = |S|^2 + |A|^2`."""
    total = jnp.sum(SYMMETRIC**2) + jnp.sum(ANTISYMMETRIC**2)
    exact = float(jnp.sqrt(4 * jnp.sum(ANTISYMMETRIC**2) / total))
    for num_probes in (1, 4):
        found = asymmetry(
            Linear(SYMMETRIC + ANTISYMMETRIC), X_T, 0.5, key=KEY, num_probes=num_probes
        )
        error = float(found.standard_error)
        assert abs(float(found.value) - exact) < 5 * error
        assert 7 * error < 0.05 * exact


def test_the_standard_error_is_that_of_repeated_runs():
    denoiser = Linear(SYMMETRIC + ANTISYMMETRIC)
    keys = jax.random.split(KEY, 400)
    found = jax.vmap(lambda k: asymmetry(denoiser, X_T[:50], 0.5, key=k))(keys)
    np.testing.assert_allclose(found.standard_error.mean(), found.value.std(), rtol=0.15)


def test_the_ends_of_the_scale():
    assert float(asymmetry(Linear(SYMMETRIC), X_T[:9], 0.5, key=KEY).value) < 1e-12
    found = asymmetry(Linear(ANTISYMMETRIC), X_T[:9], 0.5, key=KEY, context=jnp.asarray(3.0))
    np.testing.assert_allclose(found.value, 2, rtol=1e-12)


def test_of_a_curved_denoiser_it_is_the_mean_over_events():
    """Against the Jacobians themselves, for a network that is not the gradient of anything."""
    denoiser, x_t = network(jax.random.key(3)), draws(MIXTURE, 4000)
    jacobians = jax.vmap(jax.jacfwd(lambda x: denoiser(x, 0.5)))(x_t)
    above = jnp.sum((jacobians - jnp.swapaxes(jacobians, 1, 2)) ** 2)
    exact = float(jnp.sqrt(above / jnp.sum(jacobians**2)))
    found = asymmetry(denoiser, x_t, 0.5, key=KEY, num_probes=8)
    # The probes alone make the difference; the standard error has that of the events besides.
    assert abs(float(found.value) - exact) < 5 * float(found.standard_error)
    assert 7 * float(found.standard_error) < 0.2 * exact


class Perceptron(eqx.Module):
    layers: eqx.nn.MLP

    def __call__(self, u, log_sigma, context):
        return self.layers(jnp.append(u, log_sigma))


def network(key, kind=Network):
    return kind(Perceptron(eqx.nn.MLP(3, 2, 32, 2, jnp.tanh, key=key)), MIXTURE_MOMENTS)


def test_an_energy_network_is_conservative_to_rounding():
    x_t = draws(MIXTURE, 50)
    energy, plain = (
        float(asymmetry(network(KEY, kind), x_t, 0.5, key=KEY).value)
        for kind in (EnergyNetwork, Network)
    )
    assert energy < 1e-13
    assert plain > 0.01


def test_the_penalty_makes_a_network_more_conservative():
    levels, metric = LogUniform(0.1, 10.0), Residual(MIXTURE_MOMENTS)
    found = []
    for parts in ((), (Conservative(30.0),)):
        loss = DenoisingLoss(levels, metric, regularisers=parts)
        denoiser = quick(
            network(KEY),
            draws(MIXTURE, 2000),
            loss,
            num_steps=300,
            batch_size=64,
            evaluate_every=300,
            optimiser=optax.adam(3e-3),
            averaging=0.9,
        ).denoiser
        x_t = draws(MIXTURE, 1000, jax.random.key(7)) + 0.5 * X_T[:1000, 0]
        found.append(float(asymmetry(denoiser, x_t, 0.5, key=KEY, num_probes=4).value))
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: asymmetry(Linear(SYMMETRIC), X_T[:1], 0.5, key=KEY), "x_t must hold at least two"),
        (
            lambda: asymmetry(Linear(SYMMETRIC), X_T, 0.5, key=KEY, num_probes=0),
            "num_probes must be at least 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
