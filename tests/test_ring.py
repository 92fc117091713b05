"""Rings of known diameter, width, orientation and asymmetry, measured in images of few pixels."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from scoreprior.interferometry import measure_ring

RADII = (5.0, 50.0)


def bessel(order, x):
    """`I_n(x) e^-x` by its integral over one period, exact to rounding."""
    theta = 2 * np.pi * (np.arange(720) + 0.5) / 720
    return (np.exp(np.multiply.outer(x, np.cos(theta) - 1)) * np.cos(order * theta)).mean(-1)


def brightness(r, theta, radius, sd, asymmetry=0.0, orientation=0.0):
    """An infinitely thin ring of brightness `1 + 2 A cos(theta - eta)`, blurred by a Gaussian."""
    x = r * radius / sd**2
    ring = bessel(0, x) + 2 * asymmetry * np.cos(theta - orientation) * bessel(1, x)
    return np.exp(-((r - radius) ** 2) / (2 * sd**2)) * ring


def draw(radius, sd, *, n=32, pixel=4.0, center=(0.0, 0.0), **kwargs):
    half = (n - 1) / 2
    east = (half - np.arange(n))[None, :] * pixel - center[0]
    north = (half - np.arange(n))[:, None] * pixel - center[1]
    return brightness(np.hypot(east, north), np.arctan2(east, north), radius, sd, **kwargs)


def exact(radius, sd, asymmetry=0.0):
    """Diameter, width, asymmetry and depth about the true centre, by the definitions."""
    r = np.arange(0, 50.005, 0.01)
    theta = 2 * np.pi * np.arange(24) / 24
    profile = np.stack([brightness(r, t, radius, sd, asymmetry) for t in theta], 1)
    tops = profile.argmax(0)
    floor = profile[-1].mean()
    widths = []
    for line, top in zip(profile.T - floor, tops, strict=True):
        above = np.flatnonzero(line >= line[top] / 2)
        widths.append((above[-1] - above[0]) * 0.01)
    diameter, width = 2 * r[tops].mean(), np.mean(widths)
    band = np.abs(r - diameter / 2) <= width / 2
    moments = profile[band] @ np.exp(1j * theta)
    depth = profile[r <= 5].mean() / profile[round(diameter / 2 / 0.01)].mean()
    return diameter, width, (np.abs(moments) / profile[band].sum(1)).mean(), depth


@pytest.mark.parametrize("center", [(0.0, 0.0), (7.3, -5.1)])
@pytest.mark.parametrize(("radius", "fwhm"), [(21.0, 14.0), (21.0, 20.0), (26.0, 12.0)])
@pytest.mark.parametrize(("n", "pixel"), [(32, 4.0), (64, 2.0)])
def test_a_symmetric_ring(n, pixel, radius, fwhm, center):
    sd = fwhm / np.sqrt(8 * np.log(2))
    ring = measure_ring(draw(radius, sd, n=n, pixel=pixel, center=center), pixel, radii=RADII)
    diameter, width, _, depth = exact(radius, sd)
    assert_allclose(ring.center, center, atol=0.05 * pixel)
    assert_allclose(ring.diameter, diameter, atol=0.06 * pixel)
    assert_allclose(ring.width, width, atol=0.15 * pixel)
    assert_allclose(ring.central_brightness, depth, atol=0.02)
    assert ring.diameter_sd < 0.15 * pixel
    assert ring.asymmetry < 0.02
    assert ring.peaked == ring.resolved == 1.0
    # The shift of the peak that blurring makes, to the next order.
    assert_allclose(diameter, 2 * radius - fwhm**2 / (4 * np.log(2) * 2 * radius), atol=0.6)


@pytest.mark.parametrize("orientation", [0.5, 3.4, 5.5])
@pytest.mark.parametrize("asymmetry", [0.1, 0.3])
def test_a_ring_with_a_bright_side(asymmetry, orientation):
    sd, center = 6.0, (-4.0, 6.5)
    image = draw(21.0, sd, center=center, asymmetry=asymmetry, orientation=orientation)
    ring = measure_ring(image, 4.0, radii=RADII)
    diameter, width, exact_asymmetry, depth = exact(21.0, sd, asymmetry)
    assert_allclose(ring.center, center, atol=1.2)
    assert_allclose(ring.diameter, diameter, atol=0.6)
    assert_allclose(ring.width, width, atol=1.0)
    assert_allclose(ring.asymmetry, exact_asymmetry, atol=0.003)
    assert_allclose(ring.central_brightness, depth, atol=0.02)
    turn = np.angle(np.exp(1j * (ring.orientation - orientation)))
    assert abs(turn) < 0.1
    # About the centroid of brightness the ring is not regular: the search is needed.
    axis = (15.5 - np.arange(32)) * 4.0
    centroid = (image.sum(0) @ axis / image.sum(), image.sum(1) @ axis / image.sum())
    simple = measure_ring(image, 4.0, radii=RADII, center=centroid)
    assert simple.diameter_sd > 1.3 * ring.diameter_sd
    assert abs(simple.asymmetry - exact_asymmetry) > 2 * abs(ring.asymmetry - exact_asymmetry)


def test_orientations_are_from_north_to_east():
    # Row 0 is north and column 0 east: the bright side is in the upper left.
    image = draw(21.0, 6.0, asymmetry=0.3, orientation=np.pi / 4)
    assert image[:16, :16].sum() > 2 * image[16:, 16:].sum()
    assert_allclose(measure_ring(image, 4.0, radii=RADII).orientation, np.pi / 4, atol=0.05)


def test_results_scale_with_the_pixel():
    image = draw(21.0, 6.0, center=(3.0, 2.0), asymmetry=0.2)
    one = measure_ring(image, 4.0, radii=RADII)
    two = measure_ring(7 * image, 8.0, radii=(10.0, 100.0))
    assert_allclose(two.diameter, 2 * one.diameter)
    assert_allclose(two.center, 2 * np.array(one.center), atol=1e-12)
    assert_allclose(two.asymmetry, one.asymmetry)


def test_what_is_no_ring_says_so():
    half = np.arange(32) - 15.5
    blob = np.exp(-(half[:, None] ** 2 + half**2) / (2 * 4.0**2))
    with pytest.raises(ValueError, match="image must have a ring with radii inside the range"):
        measure_ring(blob, 4.0, radii=RADII)
    found = measure_ring(blob, 4.0, radii=RADII, center=(0.0, 0.0))
    assert found.peaked == 0.0
    assert np.isnan(found.width)
    assert np.isnan(found.asymmetry)
    assert found.central_brightness >= 1.0


def test_images_that_cannot_be_measured(as_user):
    good = draw(21.0, 6.0)
    for image, pixel, radii, message in [
        (good[:-1], 4.0, RADII, r"image must be square.*\(31, 32\)"),
        (np.where(good == good.max(), np.nan, good), 4.0, RADII, "image must be finite, got"),
        (-good, 4.0, RADII, "image must have a positive total, got -"),
        (good, 0.0, RADII, "pixel must be a positive finite number, got 0.0"),
        (good, 4.0, (5.0, 70.0), r"radii must rise.*below half the image, 64, got \(5.0, 70.0\)"),
        (good, 4.0, (0.0, 50.0), "radii must rise from above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure_ring(image, pixel, radii=radii)
