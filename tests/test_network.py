"""Preconditioned networks: EDM, the Gaussian denoiser when untrained, conditioning, Flax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scoreprior import nn
from scoreprior.denoise import Gaussian
from scoreprior.denoise.network import Network
from scoreprior.gaussian import HartleyBasis, Moments

KEY = jax.random.key(3)
IMAGE = jax.random.normal(jax.random.key(4), (4, 4))


def dense_moments():
    factor = jax.random.normal(KEY, (16, 16))
    return Moments.dense(jnp.arange(16.0).reshape(4, 4), factor @ factor.T / 16 + jnp.eye(16))


MOMENTS = {
    "isotropic": Moments(jnp.full((4, 4), 2.0), jnp.full((4, 4), 3.0)),
    "diagonal": Moments(jnp.zeros((4, 4)), jnp.linspace(0.0, 5.0, 16).reshape(4, 4)),
    "dense": dense_moments(),
    "fourier": Moments(
        jnp.ones((4, 4)), jnp.linspace(0.5, 2.0, 16).reshape(4, 4), HartleyBasis((0, 1))
    ),
}

NETWORKS = {
    "ResidualMLP": nn.ResidualMLP((4, 4), width=16, num_blocks=2, key=KEY),
    "UNet": nn.UNet((4, 4), widths=(8, 16), key=KEY),
}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_untrained_network_is_the_gaussian_denoiser(net, moments):
    denoiser, exact = Network(net, moments), Gaussian(moments)
    for sigma in (0.01, 1.0, 50.0):
        np.testing.assert_allclose(
            denoiser(IMAGE, sigma), exact(IMAGE, sigma), rtol=1e-10, atol=1e-10
        )


def bent(x, log_sigma, context):
    """Some network: not linear, not elementwise."""
    return jnp.tanh(jnp.roll(x, 1, 0) + log_sigma) * x


def test_isotropic_moments_give_edm():
    """Karras et al. 2022, table 1, written out."""
    sd, m, sigma = np.sqrt(3.0), 2.0, 0.7
    total = np.sqrt(sigma**2 + sd**2)
    inner = bent((IMAGE - m) / total, jnp.log(sigma / sd) / 4, None)
    expected = m + sd**2 / total**2 * (IMAGE - m) + sigma * sd / total * inner
    np.testing.assert_allclose(
        Network(bent, MOMENTS["isotropic"])(IMAGE, sigma), expected, rtol=1e-12
    )


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
def test_network_sees_unit_covariance_and_its_ideal_output_has_unit_variance(moments):
    """Cov of the input is I; the posterior covariance has the squared output scales."""
    sigma = 0.8
    seen = []
    Network(lambda x, s, c: seen.append(x) or x, moments)(IMAGE, sigma)
    gain = jax.jacfwd(
        lambda x: moments.basis.synthesise(
            moments.basis.analyse(x - moments.mean) / moments.scales(sigma)
        )
    )(IMAGE)
    whitener = gain.reshape(16, 16)
    noisy = moments.covariance() + sigma**2 * jnp.eye(16)
    np.testing.assert_allclose(whitener @ noisy @ whitener.T, jnp.eye(16), atol=1e-10)
    np.testing.assert_allclose(
        seen[0].ravel(), whitener @ (IMAGE - moments.mean).ravel(), rtol=1e-9, atol=1e-10
    )
    c = moments.covariance()
    posterior = c - c @ jnp.linalg.solve(noisy, c)
    scale = Network(bent, moments).output_scale(sigma)
    columns = jax.vmap(lambda e: moments.apply(scale**2, e.reshape(4, 4)).ravel())(jnp.eye(16))
    np.testing.assert_allclose(columns, posterior, atol=1e-10)


def perturbed(net):
    """The network with every weight moved, so that nothing is zero any more."""
    arrays, rest = eqx.partition(net, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    keys = jax.random.split(KEY, len(leaves))
    moved = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, moved), rest)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_depend_on_level_and_context(name):
    build = {"ResidualMLP": nn.ResidualMLP, "UNet": nn.UNet}[name]
    net = perturbed(build((4, 4), context_size=2, key=KEY))
    out = net(IMAGE, jnp.asarray(0.1), jnp.zeros(2))
    assert out.shape == (4, 4)
    assert jnp.max(jnp.abs(net(IMAGE, jnp.asarray(0.5), jnp.zeros(2)) - out)) > 1e-3
    assert jnp.max(jnp.abs(net(IMAGE, jnp.asarray(0.1), jnp.ones(2)) - out)) > 1e-3
    with pytest.raises(ValueError, match=r"context must have shape \(2,\), got None"):
        net(IMAGE, jnp.asarray(0.1))
    with pytest.raises(ValueError, match="context must be None"):
        NETWORKS[name](IMAGE, jnp.asarray(0.1), jnp.ones(2))


def test_unet_is_equivariant_to_shifts_by_whole_coarse_pixels_inside():
    """Far from the border a U-Net of two resolutions commutes with shifts by two pixels."""
    net = perturbed(nn.UNet((64, 64), widths=(4, 4), num_blocks=1, key=KEY))
    x = jnp.zeros((64, 64)).at[31:33, 31:33].set(1.0)
    moved = jnp.roll(x, 2, 0)
    out, out_moved = net(x, jnp.asarray(0.0)), net(moved, jnp.asarray(0.0))
    np.testing.assert_allclose(out_moved[30:38, 28:36], out[28:36, 28:36], rtol=1e-6, atol=1e-9)
    assert jnp.max(jnp.abs(out_moved - out)) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_config_rebuilds_the_same_network(name):
    net = NETWORKS[name]
    again = nn.from_config(net.config(), key=KEY)
    assert jax.tree.structure(again) == jax.tree.structure(net)
    assert all(
        jnp.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(again), strict=True)
    )


def test_dropout_acts_only_when_armed_and_keeps_the_mean():
    layer = nn.Dropout(0.3)
    h = jnp.linspace(1.0, 2.0, 4000)
    assert jnp.array_equal(layer(h), h)
    dropped = nn.with_dropout(KEY, layer)(h)
    rate = jnp.mean(dropped == 0)
    assert jnp.abs(rate - 0.3) < 5 * jnp.sqrt(0.3 * 0.7 / 4000)
    spread = h * jnp.sqrt(0.3 / 0.7)
    assert jnp.abs(jnp.mean(dropped - h)) < 5 * jnp.sqrt(jnp.sum(spread**2)) / 4000
    net = perturbed(nn.ResidualMLP((4, 4), width=16, dropout=0.3, key=KEY))
    t = jnp.asarray(0.0)
    armed = nn.with_dropout(KEY, net)(IMAGE, t)
    assert jnp.max(jnp.abs(armed - net(IMAGE, t))) > 1e-3
    other = nn.with_dropout(jax.random.key(9), net)(IMAGE, t)
    assert jnp.max(jnp.abs(armed - other)) > 1e-3


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(17, 16, rngs=rngs)

    def __call__(self, x, log_sigma, context):
        inputs = jnp.concatenate([x.ravel(), log_sigma[None]])
        return self.linear(inputs).reshape(x.shape)


def test_flax_nnx_module_as_network():
    net = FlaxNet(nnx.Rngs(0))
    moments = MOMENTS["isotropic"]
    denoiser = Network(net, moments)
    sigma = jnp.asarray(0.7)
    level = jnp.log(sigma / jnp.sqrt(3.0)) / 4
    whitened = (IMAGE - 2.0) / jnp.sqrt(3.0 + sigma**2)
    inner = jnp.append(whitened.ravel(), level) @ net.linear.kernel[...] + net.linear.bias[...]
    expected = Gaussian(moments)(IMAGE, sigma) + denoiser.output_scale(sigma) * inner.reshape(4, 4)
    np.testing.assert_allclose(denoiser(IMAGE, sigma), expected, rtol=1e-6)
    batch = jax.jit(jax.vmap(denoiser, (0, None)))(jnp.stack([IMAGE, IMAGE]), sigma)
    np.testing.assert_allclose(batch[1], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ResidualMLP((4,), width=0, key=KEY), "width must be at least 1, got 0"),
        (lambda: nn.ResidualMLP((4,), dropout=1.0, key=KEY), r"dropout must lie in \[0, 1\)"),
        (
            lambda: nn.UNet((3, 3), widths=(4, 8), key=KEY),
            "height and width must be divisible by 2",
        ),
        (lambda: nn.UNet((8,), key=KEY), "event_shape must be"),
        (lambda: nn.from_config({"name": "LeNet"}, key=KEY), "config must name one of"),
        (
            lambda: nn.from_config({"name": "UNet", "event_shape": [8, 8], "depth": 3}, key=KEY),
            "config does not fit UNet",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
