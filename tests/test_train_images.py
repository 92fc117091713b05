"""Training on images: crops, a short type, and a U-Net on what is not Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior import nn
from scoreprior.denoise.network import Network
from scoreprior.gaussian import Fourier, Isotropic, Moments
from scoreprior.nn import MixedPrecision
from scoreprior.train import (
    DenoisingLoss,
    Dequantise,
    InSequence,
    LogUniform,
    RandomCrop,
    Residual,
    adamw,
    fit,
)

KEY = jax.random.key(0)
SHAPE = (8, 8)


def disks(num, size, key):
    """Disks of radius 2 to 4 at random places, on a torus, of brightness 1 on 0."""
    place, radius = jax.random.split(key)
    centre = jax.random.uniform(place, (num, 2), minval=0, maxval=size)
    radius = jax.random.uniform(radius, (num,), minval=2.0, maxval=4.0)
    pixels = jnp.arange(size, dtype=float)
    gap = jnp.abs(pixels[None, :, None] - centre[:, None, :])
    gap = jnp.minimum(gap, size - gap)
    distance = jnp.hypot(gap[:, :, None, 0], gap[:, None, :, 1])
    return (distance < radius[:, None, None]).astype(float)


def test_a_crop_is_a_window_of_the_image_wherever():
    image = jnp.arange(5 * 7.0).reshape(5, 7)
    crop = RandomCrop((3, 4))
    found = np.array(jax.vmap(lambda k: crop(k, image))(jax.random.split(KEY, 2000)))
    corners, counts = np.unique(found[:, 0, 0], return_counts=True)
    np.testing.assert_array_equal(corners, np.array(image[:3, :4]).ravel())
    share = 1 / len(corners)
    assert np.all(np.abs(counts / 2000 - share) < 5 * np.sqrt(share * (1 - share) / 2000))
    for window in found[:50]:
        row, col = divmod(int(window[0, 0]), 7)
        np.testing.assert_array_equal(window, image[row : row + 3, col : col + 4])


def test_crops_keep_channels_and_have_the_moments_of_the_image():
    images = disks(200, 16, KEY)
    crops = RandomCrop(SHAPE).crops(jax.random.key(1), jnp.stack([images, -images], 1), 4000)
    np.testing.assert_array_equal(crops[:, 0], -crops[:, 1])
    moments = Moments.fit(crops[:, 0], Fourier())
    se = float(crops[:, 0].mean((1, 2)).std()) / 200**0.5  # at most as if images were their crops
    assert abs(float(moments.mean[0, 0] - images.mean())) < 5 * se
    assert se < 0.05


def test_maps_in_sequence_have_keys_of_their_own():
    both = InSequence((Dequantise(1.0), Dequantise(2.0)))
    found = jax.vmap(lambda k: both(k, jnp.zeros(())))(jax.random.split(KEY, 20_000))
    expected = 1 / 12 + 4 / 12  # one key for both would give 9 / 12
    se = float(((found - found.mean()) ** 2).std()) / 20_000**0.5
    assert abs(float(found.var()) - expected) < 5 * se


def quick(net, images, **options):
    moments = Moments.fit(RandomCrop(SHAPE).crops(KEY, images, 2000), Isotropic())
    loss = DenoisingLoss(LogUniform(0.05, 5.0), Residual(moments))
    run = {
        "dequantise": RandomCrop(SHAPE),
        "batch_size": 32,
        "evaluate_every": 50,
        "progress": False,
        "averaging": 0.98,
    }
    denoiser = Network(net, moments)
    return fit(denoiser, images, loss, key=KEY, **(run | options))


@pytest.mark.slow
def test_crops_are_drawn_afresh_in_training_and_resumed(tmp_path):
    images = disks(64, 12, KEY).astype(jnp.float32)
    net = nn.UNet(SHAPE, widths=(4,), embedding_size=8, key=KEY)
    settings = {"num_steps": 6, "evaluate_every": 3, "held_out": images[:8]}
    whole = quick(net, images[8:], **settings)
    path = tmp_path / "run.safetensors"
    for _ in range(2):
        again = quick(net, images[8:], checkpoint=path, **settings)
    np.testing.assert_array_equal(whole.history.held_out_loss, again.history.held_out_loss)


@pytest.mark.slow
def test_a_unet_denoises_structure_better_than_a_gaussian():
    """Its loss falls below that of the Gaussian denoiser of the spectrum, on crops held out."""
    images = disks(300, 16, KEY).astype(jnp.float32)
    net = nn.UNet(SHAPE, widths=(8, 8), embedding_size=16, key=KEY)
    net = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), net)
    found = quick(net, images[:250], num_steps=150, optimiser=adamw(150, peak=1e-2))
    crops = RandomCrop(SHAPE).crops(jax.random.key(2), images[250:], 300)
    moments = Moments.fit(RandomCrop(SHAPE).crops(KEY, images[:250], 4000), Fourier())
    noise = jax.random.normal(jax.random.key(3), crops.shape, jnp.float32)
    for sigma in (0.3, 1.0):

        def error(denoise, sigma=sigma):
            x_hat = jax.vmap(lambda x: denoise(x, sigma))(crops + sigma * noise)
            return float(jnp.mean((x_hat - crops) ** 2))

        assert error(found.denoiser) < 0.9 * error(moments.denoise)


@pytest.mark.slow
def test_a_short_type_gives_nearly_the_same_loss_and_keeps_the_weights():
    images = disks(64, 8, KEY).astype(jnp.float32)
    moments = Moments.fit(images, Isotropic())
    loss = DenoisingLoss(LogUniform(0.05, 5.0), Residual(moments))
    net = nn.UNet(SHAPE, widths=(8, 16), embedding_size=16, key=KEY)
    net = jax.tree.map(
        lambda leaf: (leaf + 0.1 * jax.random.normal(KEY, leaf.shape)).astype(jnp.float32), net
    )

    def mean_loss(net):
        u = (jnp.arange(64, dtype=jnp.float32) + 0.5) / 64
        keys = jax.random.split(KEY, 64)
        each = lambda x, u, k: loss(Network(net, moments), x, u, None, key=k)
        return jax.vmap(each)(images, u, keys).mean()

    long, slope = jax.jit(jax.value_and_grad(mean_loss))(net)
    short, short_slope = jax.jit(jax.value_and_grad(mean_loss))(MixedPrecision(net))
    assert short.dtype == jnp.float32
    np.testing.assert_allclose(short, long, rtol=0.02)
    assert short != long
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (slope, short_slope)
    )
    assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
    found = quick(MixedPrecision(net), images, num_steps=3, dequantise=InSequence(()))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.denoiser.net)} == {jnp.float32.dtype}
    x = jnp.zeros(SHAPE, jnp.float32)
    np.testing.assert_allclose(
        Network(found.denoiser.net.net, moments)(x, 1.0), found.denoiser(x, 1.0), atol=0.05
    )


@pytest.mark.usefixtures("as_user")
def test_bad_crops_are_refused():
    images = jnp.zeros((4, 6, 6))
    with pytest.raises(ValueError, match=r"shape must fit into images of shape \(6, 6\)"):
        RandomCrop((7, 3))(KEY, images[0])
    with pytest.raises(ValueError, match="shape must be at least 1, got 0"):
        RandomCrop((0, 3))
    net = nn.UNet((4, 4), widths=(4,), key=KEY)
    with pytest.raises(ValueError, match="a crop belongs to dequantise"):
        quick(
            net,
            disks(8, 12, KEY),
            num_steps=1,
            dequantise=InSequence(()),
            augment=RandomCrop(SHAPE),
            held_out=disks(8, 12, KEY),
        )
