"""Noised laws of priors in closed form: the uniform box, and `law_of` NumPyro distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms
from scipy.integrate import simpson

from laws import check_exact_denoiser
from scoreprior.denoise import BlurredUniform, Gaussian, GaussianMixture, Uniform
from scoreprior.gaussian import Moments
from scoreprior.sbi import law_of
from stats import assert_cov, assert_mean

KEYS = jax.random.split(jax.random.key(23), 8)
LOW, HIGH = -1.0, 2.0
POINTS = [-100.0, -3.0, -1.5, -1.001, -1.0, -0.999, -0.5, 0.3, 1.9, 2.0, 2.01, 5.0, 1000.0]
LEVELS = [1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 30.0, 1e3, 1e4]
XS, SIGMAS = (a.ravel() for a in np.meshgrid(POINTS, LEVELS))
BOX = Uniform(jnp.array([[-1.0, 0.0], [2.0, -3.0]]), jnp.array([[1.0, 0.5], [3.0, 4.0]]))


def truth(x, sigma):
    """Log density, score, mean and variance of the uniform law on [LOW, HIGH], by Simpson's rule.

    Over the part of the interval where the integrand exceeds e^-60 of its largest value.
    """
    mode = np.clip(x, LOW, HIGH)
    reach = 120 * sigma / (abs(mode - x) / sigma + np.hypot((mode - x) / sigma, 120**0.5))
    first, last = max(LOW - mode, -reach), min(HIGH - mode, reach)
    offsets = np.linspace(first, last, 20_001)
    exponents = -offsets * (offsets / 2 + mode - x) / sigma**2
    mean_of = lambda values: simpson(values * np.exp(exponents), offsets)
    total = mean_of(np.ones_like(offsets))
    offset = mean_of(offsets) / total
    variance = mean_of((offsets - offset) ** 2) / total
    log_peak = -((mode - x) ** 2) / (2 * sigma**2) - np.log(sigma * np.sqrt(2 * np.pi))
    log_density = np.log(total) + log_peak - np.log(HIGH - LOW)
    return log_density, (mode - x + offset) / sigma**2, mode + offset, variance


def evaluated(dtype):
    box = Uniform(dtype(LOW), dtype(HIGH))

    @jax.jit
    @jax.vmap
    def evaluate(x, sigma):
        mean, slope = jax.jvp(lambda x: box(x, sigma), (x,), (jnp.ones_like(x),))
        return {
            "log density": box.log_prob(x, sigma),
            "score": box.score(x, sigma),
            "gradient": jax.grad(box.log_prob)(x, sigma),
            "mean": mean,
            "covariance": box.covariance(x, sigma)[0, 0],
            "slope": slope * sigma**2,
            "reverse": jax.grad(lambda x: box(x, sigma))(x) * sigma**2,
        }

    values = evaluate(dtype(XS), dtype(SIGMAS))
    assert all(value.dtype == dtype for value in values.values())
    return values


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-10), (jnp.float32, 1e-5)])
def test_noised_box_equals_quadrature_everywhere(dtype, tolerance):
    inputs = (np.asarray(dtype(values), float) for values in (XS, SIGMAS))
    rows = [truth(x, sigma) for x, sigma in zip(*inputs, strict=True)]
    log_density, score, mean, variance = np.array(rows).T
    values = evaluated(dtype)
    # Inside a wide box the score is a tiny fraction of 1/sigma, to the rounding of 1/sigma.
    floor = np.where(SIGMAS < HIGH - LOW, 0.05 / SIGMAS, 0.0)
    expected = {
        "log density": (log_density, 1.0 + abs(log_density)),
        "score": (score, floor + abs(score)),
        "gradient": (score, floor + abs(score)),
        "mean": (mean, 0.1 + abs(mean)),
        "covariance": (variance, variance),
        "slope": (variance, variance),
        "reverse": (variance, variance),
    }
    for name, (value, scale) in expected.items():
        error = np.max(np.abs(values[name] - value) / scale)
        assert error < tolerance, (name, error)


def test_textbook_formula_fails_where_the_box_does_not():
    x, sigma = jnp.float32(-3.0), jnp.float32(0.1)
    a, b = (jnp.float32(LOW) - x) / sigma, (jnp.float32(HIGH) - x) / sigma
    norm = jax.scipy.stats.norm
    naive = x + sigma * (norm.pdf(a) - norm.pdf(b)) / (norm.cdf(b) - norm.cdf(a))
    assert not jnp.isfinite(naive)
    near_edge = Uniform(jnp.float32(LOW), jnp.float32(HIGH))(x, sigma)
    np.testing.assert_allclose(near_edge - LOW, truth(-3.0, 0.1)[2] - LOW, rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_score_denoiser_density_and_covariance_of_the_box_agree(sigma):
    check_exact_denoiser(BOX, 2 * jax.random.normal(KEYS[0], (3, 2, 2)), sigma)


def test_draws_of_the_box_have_its_moments():
    draws = jax.vmap(BOX.sample)(jax.random.split(KEYS[1], 100_000)).reshape(-1, 4)
    assert_mean(draws, BOX.moments().mean.ravel())
    assert_cov(draws, BOX.moments().covariance())


def test_denoiser_of_the_box_is_the_mean_of_clean_data_given_noisy_data():
    sigma, num = 0.8, 100_000
    clean = jax.vmap(BOX.sample)(jax.random.split(KEYS[2], num))
    noisy = clean + sigma * jax.random.normal(KEYS[3], clean.shape)
    residual = clean - jax.vmap(BOX, (0, None))(noisy, sigma)
    variance = jax.vmap(lambda x: jnp.diag(BOX.covariance(x, sigma)).reshape(2, 2))(noisy)
    # Uncorrelated with any function of the noisy data, and as large as it says.
    for function in (jnp.ones_like, jnp.tanh, jnp.cos):
        assert_mean(residual * function(noisy), 0.0)
        assert_mean((residual**2 - variance) * function(noisy), 0.0)
    shrunk = clean - jax.vmap(Gaussian(BOX.moments()), (0, None))(noisy, sigma)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean(shrunk * jnp.tanh(noisy - BOX.moments().mean[None]) ** 3, 0.0)


def test_box_without_noise_is_the_uniform_density():
    box = Uniform(jnp.zeros(2), jnp.array([1.0, 4.0]))
    inside, outside = jnp.array([0.5, 4.0]), jnp.array([0.5, 5.0])
    np.testing.assert_allclose(box.log_prob(inside), -np.log(4))
    assert box.log_prob(outside) == -jnp.inf
    np.testing.assert_array_equal(box(outside, 0.0), [0.5, 4.0])
    np.testing.assert_array_equal(box.score(outside, 0.0), [0.0, -jnp.inf])
    np.testing.assert_array_equal(box.covariance(inside, 0.0), np.zeros((2, 2)))
    np.testing.assert_allclose(box(outside, 1e-6), [0.5, 4.0], atol=1e-9)


BLUR = jnp.array([[0.1, 0.3], [0.5, 1.0]])
SOFT = BlurredUniform(BOX.low, BOX.high.at[1, 1].set(-3.0), BLUR)
"""Its last entry is a normal law."""


def test_a_blurred_box_is_a_box_with_noise():
    x, sigma = 2 * jax.random.normal(KEYS[4], (2, 2)), 0.4
    box = BlurredUniform(BOX.low, BOX.high, BLUR)
    noise = jnp.sqrt(sigma**2 + BLUR**2)
    each = lambda method: jax.vmap(lambda low, high, *at: getattr(Uniform(low, high), method)(*at))
    entries = [jnp.ravel(value) for value in (BOX.low, BOX.high, x, noise)]
    np.testing.assert_allclose(box.log_prob(x, sigma), each("log_prob")(*entries).sum(), rtol=1e-12)
    np.testing.assert_allclose(box.score(x, sigma).ravel(), each("score")(*entries), rtol=1e-12)
    point, normal = BlurredUniform(BOX.low, BOX.low, BLUR), Gaussian(Moments(BOX.low, BLUR**2))
    for method in ("__call__", "log_prob", "score", "covariance"):
        ours, truth = (getattr(law, method)(x, sigma) for law in (point, normal))
        np.testing.assert_allclose(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 20.0])
def test_score_denoiser_density_and_covariance_of_a_blurred_box_agree(sigma):
    check_exact_denoiser(SOFT, 2 * jax.random.normal(KEYS[5], (3, 2, 2)), sigma)


def test_draws_of_a_blurred_box_have_its_moments():
    draws = jax.vmap(SOFT.sample)(jax.random.split(KEYS[6], 100_000)).reshape(-1, 4)
    assert_mean(draws, SOFT.moments().mean.ravel())
    assert_cov(draws, SOFT.moments().covariance())


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("low", "high", "blur", "message"),
    [
        (0.0, 1.0, jnp.ones(2), r"blur must have the shape of low, \(\), got \(\) and \(2,\)"),
        (0.0, -1.0, 0.1, "high must not be below low, got a difference of -1"),
        (0.0, 1.0, 0.0, "blur must be positive, got 0"),
    ],
)
def test_a_blurred_box_that_is_none_is_refused(low, high, blur, message):
    with pytest.raises(ValueError, match=message):
        BlurredUniform(low, high, blur)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (jnp.zeros(2), jnp.ones(3), r"high must have the shape of low, \(2,\), got \(3,\)"),
        (jnp.zeros(2), jnp.array([1.0, 0.0]), "high must exceed low, got a difference of 0"),
        (jnp.zeros(2), jnp.array([1.0, jnp.inf]), "high must be finite, got 1 of 2"),
    ],
)
def test_box_that_is_none_is_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        Uniform(low, high)


FACTOR = 0.5 * jax.random.normal(KEYS[4], (3, 3, 3))
COVARIANCES = FACTOR @ FACTOR.mT + 0.2 * jnp.eye(3)[None]
MEANS = jax.random.normal(KEYS[5], (3, 3))
CATEGORICAL = dist.Categorical(jnp.array([0.2, 0.5, 0.3]))
DENSE = dist.MultivariateNormal(MEANS[0], COVARIANCES[0])
KNOWN = {
    "normal": (dist.Normal(1, 2), Gaussian),
    "vector": (dist.Normal(MEANS[0], 0.5).to_event(1), Gaussian),
    "expanded": (dist.Normal(1.0, jnp.array([0.5, 2.0])).expand([3, 2]).to_event(2), Gaussian),
    "dense": (DENSE, Gaussian),
    "batch of dense": (dist.MultivariateNormal(MEANS, COVARIANCES).to_event(1), Gaussian),
    "low rank": (dist.LowRankMultivariateNormal(MEANS[0], FACTOR[0], jnp.ones(3)), Gaussian),
    "walk": (dist.GaussianRandomWalk(0.7, 4), Gaussian),
    "affine": (
        dist.TransformedDistribution(
            DENSE,
            [
                transforms.AffineTransform(1.0, jnp.array([-2.0, 1.0, 0.5])),
                transforms.PermuteTransform(jnp.array([2, 0, 1])),
                transforms.LowerCholeskyAffine(MEANS[1], jnp.linalg.cholesky(COVARIANCES[1])),
            ],
        ),
        Gaussian,
    ),
    "uniform": (dist.Uniform(-1.0, 2.0), Uniform),
    "box": (dist.Uniform(-1.0, jnp.array([1.0, 2.0])).expand([3, 2]).to_event(2), Uniform),
    "mixture": (
        dist.MixtureSameFamily(CATEGORICAL, dist.Normal(MEANS[0], jnp.array([0.3, 1.0, 2.0]))),
        GaussianMixture,
    ),
    "mixture of vectors": (
        dist.MixtureSameFamily(CATEGORICAL, dist.Normal(MEANS, 0.5).to_event(1)),
        GaussianMixture,
    ),
    "mixture of dense": (
        dist.MixtureSameFamily(CATEGORICAL, dist.MultivariateNormal(MEANS, COVARIANCES)),
        GaussianMixture,
    ),
    "mixture of scalars": (
        dist.MixtureGeneral(CATEGORICAL, [dist.Normal(m, 1.0 + m**2) for m in MEANS[0]]),
        GaussianMixture,
    ),
    "general mixture": (
        dist.MixtureGeneral(
            CATEGORICAL,
            [
                DENSE,
                dist.LowRankMultivariateNormal(MEANS[1], FACTOR[1], jnp.ones(3)),
                dist.GaussianRandomWalk(0.7, 3),
            ],
        ),
        GaussianMixture,
    ),
}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(("distribution", "kind"), KNOWN.values(), ids=KNOWN)
def test_law_of_a_distribution_has_its_density_and_draws(distribution, kind):
    law = law_of(distribution)
    assert type(law) is kind
    inside = distribution.sample(KEYS[6], (5,))
    np.testing.assert_allclose(
        jax.vmap(law.log_prob)(inside), distribution.log_prob(inside), rtol=1e-9, atol=1e-9
    )
    # A wide kernel sees the moments alone.
    sigma, x = 1e3, inside[0]
    draws = distribution.sample(KEYS[7], (25_000,)).reshape(25_000, -1)
    assert_mean(draws, law.moments().mean.ravel())
    np.testing.assert_allclose(
        law.covariance(x, sigma), law.moments().covariance(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.promotes_ranks
def test_law_of_a_distribution_with_noise_is_its_convolution():
    distribution = KNOWN["mixture"][0]
    law, sigma, grid = law_of(distribution), 0.6, jnp.linspace(-15, 15, 4001)
    for x in (-2.0, 0.1, 3.0):
        kernel = jax.scipy.stats.norm.pdf(x, grid, sigma)
        convolved = simpson(np.exp(distribution.log_prob(grid)) * kernel, np.asarray(grid))
        np.testing.assert_allclose(law.log_prob(jnp.array(x), sigma), np.log(convolved), rtol=1e-9)


UNKNOWN = {
    "Gamma": dist.Gamma(2.0, 1.0),
    "LogNormal": dist.LogNormal(jnp.zeros(2), 1.0).to_event(1),
    "LeftTruncatedDistribution": dist.TruncatedNormal(0.0, 1.0, low=0.0),
    "Delta": dist.Delta(1.0),
    "Poisson": dist.Poisson(2.0),
    r"TransformedDistribution\(Normal, SigmoidTransform\)": dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), transforms.SigmoidTransform()
    ),
    r"TransformedDistribution\(Uniform, AffineTransform\)": dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), transforms.AffineTransform(0.0, 2.0)
    ),
    "FoldedDistribution": dist.FoldedDistribution(dist.Normal(0.0, 1.0)),
    "MaskedDistribution": dist.Normal(0.0, 1.0).mask(False),
    r"MixtureSameFamily\(Laplace\)": dist.MixtureSameFamily(
        CATEGORICAL, dist.Laplace(jnp.zeros(3), jnp.arange(1.0, 4.0))
    ),
    r"MixtureGeneral\(Normal, Laplace, Normal\)": dist.MixtureGeneral(
        CATEGORICAL, [dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0), dist.Normal(0.0, 1.0)]
    ),
    r"MixtureSameFamily\(Normal\)": dist.MixtureSameFamily(
        dist.Categorical(jnp.ones((2, 3)) / 3), dist.Normal(jnp.zeros((2, 3)), 1.0)
    ).to_event(1),
}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(("name", "distribution"), UNKNOWN.items(), ids=UNKNOWN)
def test_law_without_a_closed_form_is_an_error_that_says_what_to_do(name, distribution):
    with pytest.raises(ValueError, match=f"law of {name} has no.*train a prior score.*Parameters"):
        law_of(distribution)


@pytest.mark.usefixtures("as_user")
def test_law_of_a_batch_or_of_no_distribution_is_an_error():
    with pytest.raises(ValueError, match=r"batch shape \(2, 3\).*\.to_event\(2\)"):
        law_of(dist.Normal(jnp.zeros((2, 3)), 1.0))
    with pytest.raises(TypeError, match="must be a NumPyro distribution, got <function"):
        law_of(lambda: None)


@pytest.mark.promotes_ranks
def test_moments_are_those_of_the_gaussian_that_was_written_down():
    law = law_of(KNOWN["affine"][0])
    scale, order = np.array([-2.0, 1.0, 0.5]), [2, 0, 1]
    mean = (1.0 + scale * np.asarray(MEANS[0]))[order]
    covariance = (scale[:, None] * scale * np.asarray(COVARIANCES[0]))[np.ix_(order, order)]
    factor = np.linalg.cholesky(COVARIANCES[1])
    expected = Moments.dense(
        jnp.asarray(MEANS[1] + factor @ mean), jnp.asarray(factor @ covariance @ factor.T)
    )
    np.testing.assert_allclose(law.moments().mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(law.moments().covariance(), expected.covariance(), rtol=1e-12)
