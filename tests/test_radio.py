"""The simulator of radio sources, and the prior trained on it that ships with the package."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scoreprior as sp
from scoreprior.flow import Multistep
from scoreprior.interferometry import measure_ring

pytestmark = pytest.mark.promotes_ranks
EXAMPLE = Path(__file__).parents[1] / "examples" / "radio_sources.py"


@pytest.fixture(scope="module")
def radio():
    spec = importlib.util.spec_from_file_location("radio_sources", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["radio_sources"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["radio_sources"]


@pytest.fixture(scope="module")
def sources(radio):
    return radio.simulate_many(jax.random.key(0), 600)


def test_sources_are_images_of_unit_flux_within_the_field(radio, sources):
    np.testing.assert_allclose(sources.image.sum((1, 2)), 1, rtol=1e-6)
    assert sources.image.min() >= 0
    edge = np.ones((32, 32), bool)
    edge[2:-2, 2:-2] = False
    assert np.quantile(sources.image[:, edge].sum(1), 0.95) < 0.01
    assert set(sources.shape.tolist()) == set(range(len(radio.SHAPES)))
    has_diameter = np.isfinite(sources.diameter)
    np.testing.assert_array_equal(has_diameter, sources.shape < 3)
    assert ((sources.diameter > 20) & (sources.diameter < 77))[has_diameter].all()


def test_z_is_the_image_but_for_the_floor(radio, sources):
    z = jax.vmap(radio.to_z)(jnp.asarray(sources.image))
    np.testing.assert_allclose(z.max((1, 2)), 5.0, atol=0.01)
    np.testing.assert_allclose(z.min(), np.log(np.expm1(0.002)), atol=0.01)
    shares = np.asarray(jax.vmap(radio.floor_share)(jnp.asarray(sources.image)))
    assert shares.mean() < 0.01
    assert np.quantile(shares, 0.99) < 0.035
    back = jax.vmap(radio.to_image)(z)
    floor = shares[:, None, None] / 1024
    expected = (1 - shares[:, None, None]) * sources.image + floor
    np.testing.assert_allclose(back, expected, atol=1e-9)


def thin_ring(radio, diameter, *, north=0.0, east=0.0, gradient=0.0, towards=0.0):
    """A thin Gaussian annulus brighter towards a position angle, in degrees."""
    offset = (15.5 - np.arange(32)) * radio.PIXEL
    up, left = offset[:, None] - north, offset[None] - east
    angle = np.arctan2(left, up)
    bright = 1 + gradient * np.cos(angle - np.deg2rad(towards))
    image = bright * np.exp(-((np.hypot(up, left) - diameter / 2) ** 2) / (2 * 4.0**2))
    return jnp.asarray(image / image.sum())


def test_position_angles_go_from_north_through_east(radio):
    key = jax.random.key(0)
    grid = jax.vmap(radio.random_grid)(jax.random.split(key, 4))
    # East is to the left: the distance to a point east of the centre falls with the column.
    image = thin_ring(radio, 40.0, gradient=0.9, towards=90.0)
    assert image[:, :16].sum() > 1.5 * image[:, 16:].sum()
    found = measure_ring(np.asarray(image), radio.PIXEL, radii=(5.0, 50.0))
    assert abs(np.rad2deg(found.orientation) - 90) < 5
    for along, across in zip(grid.along, grid.across, strict=True):
        # The axes are orthonormal: one fine pixel is a step of length two.
        steps = np.hypot(np.diff(along, axis=0), np.diff(across, axis=0))
        np.testing.assert_allclose(steps, radio.FINE, rtol=1e-4)


def test_smoothing_keeps_flux_and_adds_the_variance_of_the_beam(radio):
    fine = jnp.zeros((64, 64)).at[30, 33].set(1.0)
    smoothed = np.asarray(radio.smooth(fine, jnp.asarray(6.0)))
    np.testing.assert_allclose(smoothed.sum(), 1, rtol=1e-6)
    offset = (np.arange(64) - 30) * radio.FINE
    np.testing.assert_allclose((smoothed.sum(1) * offset**2).sum(), 36, rtol=1e-4)


def test_the_prior_is_small_and_documented():
    folder = Path(sp.io.__file__).parents[1] / "weights" / "radio"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    metadata = sp.load_metadata("radio")
    assert list(metadata["contexts"]) == ["ring", "disk", "double", "blob"]
    assert sp.load_images("radio").shape == (64, 32, 32)
    sp.load("radio", context="ring", expect={"pixel_micro_arcseconds": 4.0})
    with pytest.raises(ValueError, match=r"pixel_micro_arcseconds = 3.0, but the prior radio was"):
        sp.load("radio", context="ring", expect={"pixel_micro_arcseconds": 3.0})
    with pytest.raises(ValueError, match=r"context must be one of \['ring', .*got 'jet'"):
        sp.load("radio", context="jet")
    with pytest.raises(ValueError, match=r"context must be one of \[\] of this prior"):
        sp.load("digits", context="seven")


@pytest.mark.slow
def test_the_prior_beats_a_gaussian_and_knows_its_groups(radio):
    sources = radio.simulate_many(jax.random.key(77), 72)
    z = jax.vmap(radio.to_z)(jnp.asarray(sources.image))
    x = z + 0.1 * jax.random.normal(jax.random.key(1), z.shape, z.dtype)
    prior = sp.load("radio").with_density(sp.BoundDensity(64))
    nats = np.asarray(prior.log_prob(x))
    gaussian = np.asarray(jax.vmap(lambda x: prior.flow.moments.log_prob(x, 0.1))(x))
    gain = nats - gaussian
    assert gain.mean() > 100 + 5 * gain.std() / len(gain) ** 0.5
    group = np.asarray(radio.GROUP_OF_SHAPE)[sources.shape]
    contexts = np.eye(4, dtype=np.float32)
    each = np.stack([np.asarray(prior.with_context(c).log_prob(x)) for c in contexts])
    # Of four groups; a small blob may well be a small disk.
    assert (each.argmax(0) == group).mean() > 0.7
    # The noise of both priors is one space, and so is that of its groups.
    ring = sp.load("radio", context="ring")
    assert ring.flow.moments.mean.shape == (32, 32)
    np.testing.assert_array_equal(ring.flow.denoiser.context, contexts[0])
    assert isinstance(ring.flow.solver, Multistep)
