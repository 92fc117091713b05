"""Moments: whitening laws, the structures against independent computations, shrinkage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from scoreprior.gaussian import (
    Dense,
    Diagonal,
    Fourier,
    HartleyBasis,
    HouseholderBasis,
    Isotropic,
    KroneckerBasis,
    LowRank,
    Moments,
    Separable,
)

STRUCTURES = [
    *(Isotropic(), Diagonal(), Dense(), LowRank(3), Fourier(), Fourier(axes=(0,)), Separable()),
]
SHAPE = (3, 4)


def images(n=200):
    """Correlated images of unequal variance and mean."""
    key_mix, key_noise = jax.random.split(jax.random.key(0))
    mixing = jax.random.normal(key_mix, (12, 12))
    noise = jax.random.normal(key_noise, (n, 12))
    return (noise @ mixing + jnp.arange(12.0)[None]).reshape(n, *SHAPE)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_whiten_is_inverted_by_colour_with_the_stated_log_det(structure):
    moments, x, sigma = Moments.fit(images(), structure), images()[0], 0.7
    u = moments.whiten(x, sigma)
    np.testing.assert_allclose(moments.colour(u, sigma), x, rtol=1e-12)
    flat = lambda u: moments.colour(u.reshape(SHAPE), sigma).ravel()
    jacobian = jax.jacfwd(flat)(u.ravel())
    np.testing.assert_allclose(moments.log_det(sigma), np.linalg.slogdet(jacobian)[1], rtol=1e-12)
    # Whitened in the sense that colouring white noise gives the noised covariance.
    noised = moments.covariance() + sigma**2 * jnp.eye(12)
    np.testing.assert_allclose(jacobian @ jacobian.T, noised, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_log_prob_and_denoiser_equal_the_dense_formulas(structure):
    moments, x, sigma = Moments.fit(images(), structure), images()[1], 0.7
    covariance, mean = moments.covariance(), moments.mean.ravel()
    noised = covariance + sigma**2 * jnp.eye(12)
    expected = jax.scipy.stats.multivariate_normal.logpdf(x.ravel(), mean, noised)
    np.testing.assert_allclose(moments.log_prob(x, sigma), expected, rtol=1e-10)
    wiener = mean + covariance @ jnp.linalg.solve(noised, x.ravel() - mean)
    np.testing.assert_allclose(moments.denoise(x, sigma).ravel(), wiener, rtol=1e-8, atol=1e-9)


def test_dense_without_shrinkage_is_the_sample_covariance():
    data = images()
    moments = Moments.fit(data, Dense(shrinkage=0.0))
    expected = np.cov(data.reshape(len(data), -1).T, bias=True)
    np.testing.assert_allclose(moments.covariance(), expected, atol=1e-10)
    np.testing.assert_allclose(Moments.fit(data, Diagonal()).eigenvalues.ravel(), np.diag(expected))
    isotropic = Moments.fit(data, Isotropic()).eigenvalues
    np.testing.assert_allclose(isotropic, np.full(SHAPE, np.trace(expected) / 12))


def test_shrinkage_is_ledoit_wolf_and_cures_a_singular_covariance():
    few = images(8)
    moments = Moments.fit(few, Dense())
    expected, weight = ledoit_wolf(few.reshape(8, -1))
    assert weight > 0.01
    np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-8, atol=1e-9)
    unshrunk = Moments.fit(few, Dense(shrinkage=0.0))
    assert float(unshrunk.eigenvalues.min()) < 1e-10 < float(moments.eigenvalues.min())


def test_constant_pixels_and_constant_data_stay_finite():
    data = images(20).at[:, 0, 0].set(3.0)
    for structure in STRUCTURES:
        moments = Moments.fit(data, structure)
        assert bool(jnp.all(jnp.isfinite(moments.whiten(data[0], 0.1))))
    same = Moments.fit(jnp.ones((5, 2)), Dense())
    np.testing.assert_array_equal(same.eigenvalues, jnp.zeros(2))


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 5, 2)])
def test_hartley_transform_is_orthonormal_and_diagonalises_stationary_covariances(shape):
    basis = HartleyBasis(tuple(range(len(shape))))
    x = jax.random.normal(jax.random.key(0), shape)
    coefficients = basis.analyse(x)
    np.testing.assert_allclose(basis.synthesise(coefficients), x, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(coefficients**2), jnp.sum(x**2), rtol=1e-12)
    # A stationary covariance is circular convolution by an even kernel.
    kernel = jax.random.normal(jax.random.key(1), shape)
    even = kernel + jnp.roll(jnp.flip(kernel), 1, range(len(shape)))
    convolve = lambda x: jnp.fft.ifftn(jnp.fft.fftn(x) * jnp.fft.fftn(even)).real
    ratio = basis.analyse(convolve(x)) / coefficients
    np.testing.assert_allclose(ratio, jnp.fft.fftn(even).real, rtol=1e-8)


def test_fourier_moments_recover_a_known_spectrum():
    shape = (8, 8)
    k = jnp.fft.fftfreq(8)
    spectrum = 1 / (0.05 + k[:, None] ** 2 + k[None] ** 2)
    law = Moments(jnp.full(shape, 2.0), spectrum, HartleyBasis((0, 1)))
    n = 20_000
    data = jax.vmap(law.sample)(jax.random.split(jax.random.key(2), n))
    fitted = Moments.fit(data, Fourier())
    # Each power is a mean of n chi-squared draws: relative standard error sqrt(2 / n) = 1 %.
    assert float(jnp.abs(fitted.eigenvalues / spectrum - 1).max()) < 5 * (2 / n) ** 0.5
    assert float(jnp.ptp(fitted.mean)) == 0


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_separable_moments_recover_a_kronecker_covariance(shape):
    keys = jax.random.split(jax.random.key(4), len(shape))
    factors = [jax.random.normal(key, (n, n)) for key, n in zip(keys, shape, strict=True)]
    whole = jnp.ones((1, 1))
    for factor in factors:
        whole = jnp.kron(whole, factor)
    # Plus and minus every column of a root of the covariance: its sample covariance is exact.
    columns = whole.T * len(whole) ** 0.5
    data = 0.5 + jnp.concatenate([columns, -columns]).reshape(-1, *shape)
    moments = Moments.fit(data, Separable())
    np.testing.assert_allclose(moments.covariance(), whole @ whole.T, atol=1e-9)
    np.testing.assert_allclose(moments.mean, jnp.full(shape, 0.5), atol=1e-12)
    assert isinstance(moments.basis, KroneckerBasis)
    variances = np.asarray(moments.eigenvalues)
    for axis in range(len(shape)):
        assert (np.diff(variances, axis=axis) < 0).all()  # the largest first


def test_householder_basis_is_orthonormal_with_the_columns_asked_for():
    # The first column is one of the standard basis, for which the reflection is the identity.
    rest = jax.random.normal(jax.random.key(0), (12, 3)).at[0].set(0)
    columns = jnp.concatenate([jnp.eye(12, 1), jnp.linalg.qr(rest)[0]], 1)
    basis = HouseholderBasis.along(columns)
    identity = jnp.eye(12).reshape(12, *SHAPE)
    matrix = jax.vmap(basis.synthesise)(identity).reshape(12, 12).T
    np.testing.assert_allclose(matrix.T @ matrix, jnp.eye(12), atol=1e-13)
    np.testing.assert_allclose(jnp.abs(columns.T @ matrix), jnp.eye(4, 12), atol=1e-13)
    analysed = jax.vmap(basis.analyse)(identity).reshape(12, 12).T
    np.testing.assert_allclose(analysed, matrix.T, atol=1e-13)


@pytest.mark.parametrize("rank", [3, 5], ids=["full column rank", "two columns too many"])
def test_low_rank_moments_have_the_stated_covariance(rank):
    factor = jax.random.normal(jax.random.key(1), (12, 3)) @ jnp.eye(3, rank)
    law = Moments.low_rank(jnp.zeros(SHAPE), factor, 0.3)
    np.testing.assert_allclose(law.covariance(), factor @ factor.T + 0.3 * jnp.eye(12), atol=1e-12)


def test_low_rank_of_few_data_is_that_of_their_covariance():
    data = images(8)
    dense = Moments.fit(data, Dense(shrinkage=0.0))
    values, vectors = np.linalg.eigh(np.asarray(dense.covariance()))
    top = vectors[:, -2:]
    rest = values[:-2].mean()
    expected = (top * (values[-2:] - rest)) @ top.T + rest * np.eye(12)
    np.testing.assert_allclose(Moments.fit(data, LowRank(2)).covariance(), expected, atol=1e-10)


def test_singular_covariances_keep_their_rank():
    factor = jax.random.normal(jax.random.key(0), (30, 3))
    law = Moments.dense(jnp.zeros(30), factor @ factor.T)
    assert float(law.eigenvalues.min()) == 0
    np.testing.assert_allclose(law.covariance(), factor @ factor.T, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.fit(jnp.ones((1, 3)), Dense()), r"data must hold at least two events"),
        (
            lambda: Moments.fit(jnp.array([[1.0], [jnp.nan]]), Dense()),
            r"data must be finite, got 1",
        ),
        (lambda: Dense(shrinkage=1.5), r"shrinkage must lie in \[0, 1\] or be None, got 1.5"),
        (lambda: Moments(jnp.zeros(3), jnp.ones(2)), r"eigenvalues must have the shape of mean"),
        (lambda: Moments(jnp.zeros(2), jnp.array([1.0, -2.0])), r"must not be negative.*got -2"),
        (lambda: Moments.dense(jnp.zeros(2), -0.1 * jnp.eye(2)), r"must not be negative.*got -0.1"),
        (
            lambda: Moments.dense(jnp.zeros(2), jnp.array([[1.0, 0.5], [0.2, 1.0]])),
            r"covariance must be symmetric, got entries that differ by 0.3",
        ),
        (lambda: Moments.dense(jnp.zeros(3), jnp.eye(2)), r"covariance must have shape \(3, 3\)"),
        (
            lambda: Moments.low_rank(jnp.zeros(3), jnp.ones((3, 3)), 1.0),
            r"factor must have 3 rows and fewer columns .* got shape \(3, 3\)",
        ),
        (
            lambda: Moments.fit(images(4), LowRank(4)),
            r"rank must be below the size of an event, 12, and the number of data, 4, got 4",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_moments_are_built_of_constants_inside_a_compiled_function():
    variances, negative = jnp.array([1.0, 4.0]), jnp.array([-1.0])
    compiled = jax.jit(lambda x: Moments(x, variances).log_prob(x, 0.0))
    np.testing.assert_allclose(compiled(jnp.zeros(2)), -np.log(2 * np.pi) - np.log(2))
    with pytest.raises(ValueError, match="eigenvalues must not be negative or NaN, got -1"):
        jax.jit(lambda x: Moments(x, negative).mean)(jnp.zeros(1))
