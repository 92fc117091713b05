"""Operators against SciPy and direct formulas, and the law of linear ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal

from laws import check_operator, close
from scoreprior.operators import (
    Circular,
    ComplexImage,
    Convolution,
    Direct,
    Downsample,
    FilterSVD,
    FourierSampling,
    GaussianBlur,
    Interferometer,
    Mask,
    MultiCoilMRI,
    NonCartesianFourier,
    NonUniformFFT,
    OrthogonalRows,
    PhaseRetrieval,
    Product,
    Radon,
    RealImag,
    Stack,
    Zero,
)

KEY = jax.random.key(4)
RNG = np.random.default_rng(2)
SHAPE = (5, 6)
IMAGE = RNG.normal(size=SHAPE)
X = jnp.asarray(IMAGE)
SEEN = RNG.random(SHAPE) < 0.6
KERNEL = RNG.random((3, 4))
FREQUENCIES = RNG.uniform(-1.5, 1.5, (7, 2))
COILS = RNG.normal(size=(2, *SHAPE)) + 1j * RNG.normal(size=(2, *SHAPE))
U, V = RNG.normal(size=(2, 8))
PIXEL = 0.2

MASK = Mask(SEEN)
FOURIER = FourierSampling(SEEN)
BLUR = GaussianBlur(0.8, SHAPE, Zero())
OPERATORS = {
    "mask": MASK,
    "downsample": Downsample(2, (4, 6)),
    "downsample channels": Downsample((1, 3), (2, 4, 6)),
    "circular": Convolution(KERNEL, SHAPE, Circular()),
    "circular channels": Convolution(KERNEL, (2, *SHAPE), Circular()),
    "blind filter": Convolution(np.array([[0.5, 0.5]]), SHAPE, Circular()),
    "zero": Convolution(KERNEL, SHAPE, Zero()),
    "blur circular": GaussianBlur(0.8, SHAPE, Circular()),
    "blur zero": BLUR,
    "fourier": FOURIER,
    "fourier complex": FourierSampling(SEEN, complex_image=True),
    "off grid": NonCartesianFourier(FREQUENCIES, SHAPE),
    "off grid complex": NonCartesianFourier(FREQUENCIES, SHAPE, complex_image=True),
    "off grid, package": NonCartesianFourier(FREQUENCIES, SHAPE, NonUniformFFT(1e-12)),
    "coils": MultiCoilMRI(COILS, FOURIER),
    "coils complex": MultiCoilMRI(COILS, FourierSampling(SEEN, complex_image=True)),
    "coils off grid": MultiCoilMRI(COILS, NonCartesianFourier(FREQUENCIES, SHAPE)),
    "radon": Radon(np.linspace(0, 3, 5), SHAPE),
    "radon narrow": Radon(np.linspace(0, 3, 5), SHAPE, 4),
    "interferometer": Interferometer(U, V, PIXEL, SHAPE),
    "interferometer, package": Interferometer(U, V, PIXEL, SHAPE, NonUniformFFT(1e-12)),
    "product": FOURIER @ BLUR,
    "product of three": Downsample((5, 2), SHAPE) @ BLUR @ BLUR,
    "stack": Stack(MASK, BLUR),
    "stack of real and complex": Stack(FOURIER, BLUR),
    "parts": RealImag(FOURIER @ BLUR),
    "parts complex": ComplexImage(FourierSampling(SEEN, complex_image=True)),
    "both parts": RealImag(
        ComplexImage(MultiCoilMRI(COILS, FourierSampling(SEEN, complex_image=True)))
    ),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_law(operator):
    check_operator(operator, KEY)


def test_mask_is_numpys():
    close(MASK(X), IMAGE[SEEN])
    expected = np.zeros(SHAPE)
    expected[SEEN] = IMAGE[SEEN]
    close(MASK.adjoint(MASK(X)), expected)


def test_downsample_is_the_mean_of_blocks():
    operator = Downsample((2, 3), (4, 6))
    image = np.random.default_rng(1).normal(size=(4, 6))
    expected = [
        [image[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean() for j in (0, 1)] for i in (0, 1)
    ]
    close(operator(jnp.asarray(image)), expected)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (1, 3), SHAPE])
def test_convolution_is_scipys(shape):
    kernel = np.random.default_rng(1).normal(size=shape)
    for boundary, mode in ((Circular(), "wrap"), (Zero(), "constant")):
        expected = ndimage.convolve(IMAGE, kernel, mode=mode)
        close(Convolution(kernel, SHAPE, boundary)(X), expected)
    if shape == (3, 3):
        close(Convolution(kernel, SHAPE, Zero())(X), signal.convolve2d(IMAGE, kernel, "same"))


def test_channels_are_convolved_one_by_one():
    images = jnp.stack([X, 2 * X[::-1]])
    one = Convolution(KERNEL, SHAPE, Zero())
    close(Convolution(KERNEL, images.shape, Zero())(images), jnp.stack([one(x) for x in images]))


@pytest.mark.parametrize("width", [0.3, 0.8, 2.0])
def test_gaussian_blur_is_scipys(width):
    """Beyond eight widths nothing is left; SciPy repeats the image as often as that takes."""
    for boundary, mode in ((Circular(), "wrap"), (Zero(), "constant")):
        expected = ndimage.gaussian_filter(IMAGE, width, mode=mode, truncate=8)
        close(GaussianBlur(width, SHAPE, boundary)(X), expected, 1e-7, 1e-7)


def test_blur_is_smooth_in_a_traced_width():
    def total(width):
        return jnp.sum(GaussianBlur(width, SHAPE, Zero())(X) ** 2)

    step = 1e-5
    slope = (total(0.8 + step) - total(0.8 - step)) / (2 * step)
    close(jax.jit(jax.grad(total))(0.8), slope, 1e-7)
    widths = jnp.array([0.4, 1.3])
    batch = jax.vmap(lambda w: GaussianBlur(w, SHAPE, Circular())(X))(widths)
    close(batch, jnp.stack([GaussianBlur(w, SHAPE, Circular())(X) for w in widths]))


def test_circular_convolution_is_a_product_with_the_transfer_function():
    operator = OPERATORS["circular"]
    close(np.fft.fft2(operator(X)), operator.transfer() * np.fft.fft2(IMAGE))
    svd = operator.svd()
    assert isinstance(svd, FilterSVD)
    by_numpy = np.linalg.svd(operator.materialise(), compute_uv=False)
    close(np.sort(svd.singular_values.ravel())[::-1], by_numpy)


@pytest.mark.parametrize("name", ["mask", "downsample", "downsample channels", "fourier complex"])
def test_singular_values_of_orthogonal_rows(name):
    svd = OPERATORS[name].svd()
    assert isinstance(svd, OrthogonalRows)
    by_numpy = np.linalg.svd(OPERATORS[name].materialise(), compute_uv=False)
    close(svd.singular_values.ravel(), by_numpy)


@pytest.mark.parametrize("name", ["mask", "downsample", "blind filter", "zero", "fourier"])
def test_pseudo_inverse_is_numpys(name):
    operator = OPERATORS[name]
    matrix = np.asarray(operator.materialise())
    y = jax.random.normal(KEY, operator.shape_out)
    rows = np.concatenate([matrix.real, matrix.imag])
    parts = np.concatenate([y.ravel(), np.zeros(y.size)])
    expected = np.linalg.pinv(rows, rcond=1e-10) @ parts
    close(operator.svd().pinv(y, cutoff=1e-10).ravel(), expected, 1e-7, 1e-7)


def test_fourier_sampling_is_numpys():
    expected = np.fft.fft2(IMAGE, norm="ortho")[SEEN]
    close(FOURIER(X), expected)
    complex_image = IMAGE + 1j * IMAGE[::-1]
    expected = np.fft.fft2(complex_image, norm="ortho")[SEEN]
    close(FOURIER(jnp.asarray(complex_image)), expected)


@pytest.mark.parametrize("transform", [Direct(), NonUniformFFT(1e-10)])
def test_off_the_grid_agrees_with_the_grid_on_it(transform):
    grid = np.stack(np.meshgrid(*map(np.fft.fftfreq, SHAPE), indexing="ij"), -1)[SEEN]
    # A frequency more or less, in whole cycles per pixel, is the same.
    close(NonCartesianFourier(grid + np.array([[1.0, -2.0]]), SHAPE, transform)(X), FOURIER(X))


def test_coils_multiply_the_image():
    expected = np.fft.fft2(COILS * IMAGE, norm="ortho")[:, SEEN]
    close(OPERATORS["coils"](X), expected)


def test_phase_retrieval_keeps_the_norm_and_loses_what_it_says():
    operator = PhaseRetrieval(SHAPE, 2.0)
    assert operator(X).shape == (10, 12)
    close(operator(X), np.abs(np.fft.fft2(IMAGE, (10, 12))) / np.sqrt(120))
    close(jnp.sum(operator(X) ** 2), np.sum(IMAGE**2))
    close(operator(X[::-1, ::-1]), operator(X))
    assert isinstance(operator @ BLUR, Product)
    close((operator @ BLUR)(X), operator(BLUR(X)))
    assert np.isfinite(jax.grad(lambda x: operator(x).sum())(jnp.zeros(SHAPE))).all()


def test_products_and_stacks_are_those_of_matrices():
    matrices = {"a": FOURIER.materialise(), "b": BLUR.materialise()}
    close((FOURIER @ BLUR).materialise(), matrices["a"] @ matrices["b"])
    stack = Stack(FOURIER, BLUR)
    close(stack.materialise(), np.concatenate(list(matrices.values())))
    of_fourier, of_blur = stack.split(stack(X))
    close(of_fourier, FOURIER(X))
    close(of_blur, BLUR(X))


def test_complex_numbers_are_pairs():
    y = FOURIER(X)
    close(RealImag(FOURIER)(X), np.stack([y.real, y.imag]))
    close(RealImag.split(y), RealImag(FOURIER)(X))
    pair = jnp.stack([X, X[::-1]])
    close(ComplexImage(FOURIER)(pair), FOURIER(X + 1j * X[::-1]))


def test_single_precision_is_kept():
    for name in ("mask", "downsample", "fourier"):
        y = OPERATORS[name](jnp.ones(OPERATORS[name].shape_in, jnp.float32))
        assert y.dtype in (jnp.float32, jnp.complex64)
        assert OPERATORS[name].adjoint(y).dtype == jnp.float32
