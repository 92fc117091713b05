"""Tomography and interferometry against direct formulas, and the errors of all operators."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from skimage.transform import radon

from laws import close
from scoreprior.operators import (
    Circular,
    Convolution,
    Direct,
    Downsample,
    FourierSampling,
    GaussianBlur,
    Interferometer,
    Mask,
    MultiCoilMRI,
    NonCartesianFourier,
    NonUniformFFT,
    PhaseRetrieval,
    Radon,
    Stack,
    Zero,
    nonuniform,
)

RNG = np.random.default_rng(3)
ANGLES = np.deg2rad([0.0, 17.0, 45.0, 90.0, 133.0, 180.0, 240.0])


def uniform(*shape):
    return np.random.default_rng(1).random(shape)


def gaussian(size, centre, sd):
    """Integrals of a round Gaussian of mass 1 over the pixels of a centred square image."""
    edges = np.arange(size + 1) - size / 2
    share = lambda at: np.diff(erf((edges - at) / (sd * np.sqrt(2)))) / 2
    return share(centre[1])[::-1, None] * share(centre[0])[None]


def test_radon_of_one_pixel_is_the_area_of_strips():
    """Points laid evenly on the pixel, counted by bins."""
    operator = Radon(ANGLES, (4, 5))
    image = np.zeros((4, 5))
    image[1, 3] = 2.0
    n = 400
    inside = (np.arange(n) + 0.5) / n - 0.5
    right, up = np.meshgrid(3 - 2 + inside, 1.5 - 1 + inside)
    for angle, projection in zip(ANGLES, operator(jnp.asarray(image)), strict=True):
        t = right * np.cos(angle) + up * np.sin(angle)
        edges = np.arange(operator.num_bins + 1) - operator.num_bins / 2
        # Points on an edge, of squares along the axes, may fall to either side.
        counts = np.histogram(t + 1e-9, edges)[0]
        np.testing.assert_allclose(projection, 2 * counts / n**2, atol=8 / n)


def test_radon_along_axes_is_sums_and_keeps_the_mass():
    image = uniform(5, 5)
    operator = Radon(np.array([0, np.pi / 2, np.pi, 0.3]), (5, 5), 5)
    up, left, back, _ = operator(jnp.asarray(image))
    close(up, image.sum(0))
    close(left, image.sum(1)[::-1])  # t is y, which rises from the last row to the first
    close(back, up[::-1])
    close(Radon(ANGLES, (5, 7))(jnp.ones((5, 7))).sum(1), np.full(len(ANGLES), 35.0))


def test_a_narrow_detector_loses_what_falls_beside_it():
    image = jnp.asarray(uniform(5, 7))
    wide, narrow = (Radon(ANGLES, (5, 7), num_bins)(image) for num_bins in (9, 3))
    close(narrow, wide[:, 3:6])


def test_radon_of_a_gaussian_is_a_gaussian():
    size, centre, sd = 41, (4.0, -2.5), 4.0
    operator = Radon(ANGLES, (size, size))
    sinogram = operator(jnp.asarray(gaussian(size, centre, sd)))
    t = np.arange(operator.num_bins) - (operator.num_bins - 1) / 2
    at = centre[0] * np.cos(ANGLES) + centre[1] * np.sin(ANGLES)
    # Pixels smear it twice, by the variance 1/12 of a square: once where they take their means,
    # once where they cast their shadows. Along the axes bins undo it.
    is_oblique = np.abs(np.sin(2 * ANGLES)) > 1e-6
    width = np.sqrt(sd**2 + is_oblique / 6)
    cdf = lambda t: erf((t[None] - at[:, None]) / (width[:, None] * np.sqrt(2))) / 2
    expected = cdf(t + 0.5) - cdf(t - 0.5)
    np.testing.assert_allclose(sinogram, expected, atol=5e-4 * expected.max())
    mirrored = operator(jnp.asarray(gaussian(size, (-centre[0], centre[1]), sd)))
    assert np.abs(mirrored - expected).max() > 0.1 * expected.max()


def test_radon_agrees_with_scikit_image():
    """Which turns the image with linear interpolation and adds, so that smooth ones agree."""
    image = gaussian(41, (5.0, 3.0), 3.0) + 0.5 * gaussian(41, (-6.0, 1.0), 2.0)
    right, up = np.meshgrid(*2 * [np.arange(41) - 20])
    image = np.where(np.hypot(right, up) < 20, image, 0)
    theirs = radon(image, np.rad2deg(ANGLES), circle=True).T
    ours = Radon(ANGLES, image.shape, 41)(jnp.asarray(image))
    np.testing.assert_allclose(ours, theirs, atol=0.005 * theirs.max())


def test_radon_is_smooth_in_its_angles():
    image = jnp.asarray(gaussian(9, (1.0, 0.5), 1.5))

    def total(angle):
        return jnp.sum(Radon(angle[None], (9, 9))(image) ** 2)

    step = 1e-6
    for angle in (0.4, 2.0):
        slope = (total(jnp.array(angle + step)) - total(jnp.array(angle - step))) / (2 * step)
        close(jax.grad(total)(jnp.array(angle)), slope, 1e-5, 1e-8)
    assert np.isfinite(jax.grad(total)(jnp.array(0.0)))


# Visibilities of 128 micro-arcseconds on baselines to ten thousand million wavelengths.
PIXEL_SIZE = 4e-6 / 3600 * np.pi / 180
U, V = RNG.uniform(-8e9, 8e9, (2, 50))


@pytest.mark.parametrize("shape", [(32, 32), (5, 8)])
def test_visibilities_are_the_sum(shape):
    image = uniform(*shape)
    expected = np.zeros(len(U), complex)
    for (r, c), flux in np.ndenumerate(image):
        east = ((shape[1] - 1) / 2 - c) * PIXEL_SIZE
        north = ((shape[0] - 1) / 2 - r) * PIXEL_SIZE
        expected += flux * np.exp(-2j * np.pi * (U * east + V * north))
    direct = Interferometer(U, V, PIXEL_SIZE, shape)(jnp.asarray(image))
    np.testing.assert_allclose(direct, expected, rtol=1e-9, atol=1e-9 * image.sum())


def test_a_source_to_the_east_has_a_phase_that_falls_with_u():
    image = np.zeros((3, 3))
    image[1, 0] = 2.0  # the east is to the left
    found = Interferometer(jnp.array([0.1]), jnp.array([0.7]), 1.0, (3, 3))(jnp.asarray(image))
    close(found, 2 * np.exp(-2j * np.pi * np.array([0.1])))


@pytest.mark.parametrize("shape", [(32, 32), (7, 10)])
def test_transforms_agree(shape):
    """For real and complex images, and in batches, forward mode and reverse mode as well."""
    fast, slow = (
        Interferometer(U, V, PIXEL_SIZE, shape, transform)
        for transform in (NonUniformFFT(), Direct())
    )
    images = jnp.asarray(uniform(3, *shape))

    @jax.jit
    def evaluate(operator):
        power = lambda x: jnp.sum(jnp.abs(operator(x)) ** 2)
        return (
            operator(images[0]),
            operator(images[0] + 1j * images[1]),
            jax.vmap(operator)(images),
            jax.jvp(operator, (images[0],), (images[1],))[1],
            jax.grad(power)(images[0]),
            jax.vmap(jax.grad(power))(images),
            jax.jacfwd(jax.grad(power))(images[0])[0, 0],
            jax.grad(lambda x: jax.vmap(power)(x).sum())(images),
        )

    for quick, direct in zip(evaluate(fast), evaluate(slow), strict=True):
        np.testing.assert_allclose(quick, direct, atol=1e-8 * np.abs(direct).max())

    several = jnp.stack([U, V])[:, None] * jnp.array([1.0, 0.3])[None, :, None]
    batch = jax.vmap(
        lambda u, v: Interferometer(u, v, PIXEL_SIZE, shape, NonUniformFFT())(images[0])
    )
    each = [Interferometer(u, v, PIXEL_SIZE, shape)(images[0]) for u, v in several.swapaxes(0, 1)]
    np.testing.assert_allclose(batch(*several), jnp.stack(each), atol=1e-8 * np.abs(each).max())


def test_single_precision_of_both_transforms():
    image = jnp.asarray(uniform(32, 32), jnp.float32)
    u, v, pixel = jnp.float32(U), jnp.float32(V), jnp.float32(PIXEL_SIZE)
    exact = Interferometer(U, V, PIXEL_SIZE, (32, 32))(image.astype(float))
    for transform in (Direct(), NonUniformFFT()):
        found = Interferometer(u, v, pixel, (32, 32), transform)(image)
        assert found.dtype == jnp.complex64
        np.testing.assert_allclose(found, exact, atol=1e-5 * image.sum())


def test_the_package_is_wanted_only_where_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_finufft", None)
    nonuniform._package.cache_clear()
    NonCartesianFourier(np.zeros((1, 2)), (2, 2), Direct())(jnp.ones((2, 2)))
    with pytest.raises(ImportError, match=r"install scoreprior\[nufft\], or use Direct"):
        NonCartesianFourier(np.zeros((1, 2)), (2, 2), NonUniformFFT())(jnp.ones((2, 2)))


ONES = np.ones((2, 2))
FULL = np.ones((2, 2), bool)
BLUR = GaussianBlur(1.0, (2, 2), Zero())
REFUSED = {
    "mask must be boolean, true where data are taken, got float64": lambda: Mask(ONES),
    "mask must be true somewhere, got none of 4": lambda: Mask(ONES < 0),
    "mask must be a concrete array": lambda: jax.jit(lambda m: Mask(m).index)(FULL),
    "mask must have shape \\[row, col\\], got \\(1, 2, 2\\)": lambda: FourierSampling(FULL[None]),
    "must divide the last two axes of shape_in = \\(2, 2\\), got 3": lambda: Downsample(3, (2, 2)),
    "factor must be at least 1, got 0": lambda: Downsample(0, (2, 2)),
    "factor must be an int or a pair of ints": lambda: Downsample((1, 2, 3), (2, 2)),
    "at least two positive ints, \\[..., row, col\\], got \\(4,\\)": lambda: Downsample(2, (4,)),
    "kernel must be no larger than the image, \\(2, 2\\), got \\(1, 3\\)": lambda: Convolution(
        np.ones((1, 3)), (2, 2), Zero()
    ),
    "kernel must have shape \\[row, col\\], got \\(2,\\)": lambda: Convolution(
        ONES[0], (2, 2), Zero()
    ),
    "kernel must be finite, got 4 of 4": lambda: Convolution(np.nan * ONES, (2, 2), Zero()),
    "width must be a positive finite number": lambda: GaussianBlur(-1.0, (2, 2), Zero()),
    "width must be one number, got shape \\(2,\\)": lambda: GaussianBlur(ONES[0], (2, 2), Zero()),
    "frequencies must have shape \\[num, 2\\], got \\(2, 3\\)": lambda: NonCartesianFourier(
        np.ones((2, 3)), (2, 2)
    ),
    "frequencies must be finite, got 4 of 4": lambda: NonCartesianFourier(np.inf * ONES, (2, 2)),
    "shape_in must be \\[row, col\\], got \\(1, 2, 2\\)": lambda: NonCartesianFourier(
        ONES, (1, 2, 2)
    ),
    "tolerance must be a positive finite number, got 0": lambda: NonUniformFFT(0.0),
    "sensitivities must have shape .* \\(2, 2\\), got \\(2, 2\\)": lambda: MultiCoilMRI(
        ONES, FourierSampling(FULL)
    ),
    "sensitivities must be finite, got 1 of 4": lambda: MultiCoilMRI(
        np.array([[[np.nan, 1], [1, 1]]]), FourierSampling(FULL)
    ),
    "oversampling must be a finite number of at least 1, got 0.5": lambda: PhaseRetrieval(
        (2, 2), 0.5
    ),
    "u and v must have one shape \\[num\\], got \\(2,\\) and \\(3,\\)": lambda: Interferometer(
        np.ones(2), np.ones(3), 1.0, (2, 2)
    ),
    "u must be finite, got 1 of 2": lambda: Interferometer(
        np.array([np.nan, 1]), np.ones(2), 1.0, (2, 2)
    ),
    "v must be finite, got 2 of 2": lambda: Interferometer(
        np.ones(2), np.inf * np.ones(2), 1.0, (2, 2)
    ),
    "pixel_size must be a positive finite number": lambda: Interferometer(
        np.ones(2), np.ones(2), 0.0, (2, 2)
    ),
    "angles must have shape \\[angle\\], got \\(2, 2\\)": lambda: Radon(ONES, (2, 2)),
    "angles must be finite, got 1 of 2": lambda: Radon(np.array([np.nan, 0]), (2, 2)),
    "num_bins must be at least 1, got 0": lambda: Radon(ONES[0], (2, 2), 0),
    "operators of a Stack must take one shape, got \\[\\(2, 2\\), \\(4, 4\\)\\]": lambda: Stack(
        BLUR, Downsample(2, (4, 4))
    ),
    "operators of a Stack must take one shape, got \\[\\]": lambda: Stack(),
    "must all take complex images, or none": lambda: Stack(
        BLUR, FourierSampling(FULL, complex_image=True)
    ),
    "GaussianBlur @ Downsample: the left takes shape \\(2, 2\\), and the right gives \\(1, 1\\)": (
        lambda: BLUR @ Downsample(2, (2, 2))
    ),
    "GaussianBlur takes an image of shape \\(2, 2\\), got \\(3, 2, 2\\); .* jax.vmap": lambda: BLUR(
        jnp.ones((3, 2, 2))
    ),
    "GaussianBlur takes an image of floats or complex numbers, got int": lambda: BLUR(
        jnp.ones((2, 2), int)
    ),
    "GaussianBlur adjoint takes data of shape \\(2, 2\\), got \\(4,\\)": lambda: BLUR.adjoint(
        jnp.ones(4)
    ),
    "at most max_entries = 15 entries, got 4 x 4 = 16": lambda: BLUR.materialise(max_entries=15),
    "cutoff must be in \\[0, 1\\), got 1.0": lambda: BLUR.svd().pinv(jnp.ones((2, 2)), cutoff=1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_errors_name_argument_rule_and_value(as_user, message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()


def test_traced_parameters_pass():
    close(jax.jit(lambda w: GaussianBlur(w, (2, 2), Circular())(jnp.eye(2)))(1.0).sum(), 2.0)
