"""Exact denoisers against independent closed forms, quadrature and one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import check_exact_denoiser
from scoreprior.denoise import Conditioned, Empirical, Gaussian, GaussianMixture, Rescaled, Smoothed
from scoreprior.gaussian import Moments
from stats import assert_cov, assert_mean

KEYS = jax.random.split(jax.random.key(7), 8)
SHAPE, SIZE, K = (2, 2), 4, 3
WEIGHTS = jnp.array([0.5, 0.3, 0.2])
MEANS = 2 * jax.random.normal(KEYS[0], (K, *SHAPE))
FACTORS = 0.5 * jax.random.normal(KEYS[1], (K, SIZE, SIZE))
COVARIANCES = FACTORS @ FACTORS.mT + 0.1 * jnp.eye(SIZE)[None]

EXACT = {
    "gaussian": Gaussian(Moments.dense(MEANS[0], COVARIANCES[0])),
    "shared": GaussianMixture.shared(WEIGHTS, MEANS, COVARIANCES[0]),
    "diagonal": GaussianMixture.diagonal(WEIGHTS, MEANS, jnp.array([[0.2, 0.3], [0.4, 0.5]])),
    "full": GaussianMixture.full(WEIGHTS, MEANS, COVARIANCES),
    "kernel density": Empirical(MEANS, 0.3),
}
CONJUGATE = ["gaussian", "shared", "diagonal", "full"]
XS = jax.random.normal(KEYS[2], (3, *SHAPE))
X = XS[0]
A = jax.random.normal(KEYS[3], (2, SIZE))
Y, COV_Y = jnp.array([0.5, -1.0]), jnp.array([[0.3, 0.1], [0.1, 0.2]])


@pytest.mark.parametrize("denoiser", EXACT.values(), ids=EXACT)
def test_score_denoiser_density_and_covariance_agree(denoiser):
    check_exact_denoiser(denoiser, XS, 0.7)


@pytest.mark.parametrize("denoiser", EXACT.values(), ids=EXACT)
def test_draws_have_the_stated_moments(denoiser):
    draws = jax.vmap(denoiser.sample)(jax.random.split(KEYS[4], 100_000)).reshape(-1, SIZE)
    moments = denoiser.moments()
    assert_mean(draws, moments.mean.ravel())
    assert_cov(draws, moments.covariance())


def test_mixture_density_equals_the_sum_of_its_components():
    sigma = 0.4
    parts = [
        jnp.log(w) + jax.scipy.stats.multivariate_normal.logpdf(X.ravel(), m.ravel(), c)
        for w, m, c in zip(
            WEIGHTS, MEANS, COVARIANCES + sigma**2 * jnp.eye(SIZE)[None], strict=True
        )
    ]
    total = jax.scipy.special.logsumexp(jnp.stack(parts))
    np.testing.assert_allclose(EXACT["full"].log_prob(X, sigma), total, rtol=1e-12)
    masses = jnp.exp(EXACT["full"].log_responsibilities(X, sigma))
    np.testing.assert_allclose(masses, jnp.exp(jnp.stack(parts) - total), rtol=1e-10)


@pytest.mark.parametrize("sigma", [1e-3, 0.4, 30.0])
@pytest.mark.parametrize(
    "mixture",
    [
        GaussianMixture.shared(WEIGHTS, 5.0 + MEANS, COVARIANCES[0]),
        GaussianMixture.diagonal(WEIGHTS, 5.0 + MEANS, jnp.array([[0.2, 0.3], [0.4, 0.5]])),
    ],
    ids=["shared", "diagonal"],
)
def test_a_shared_covariance_is_that_of_every_component(mixture, sigma):
    assert mixture.shared_covariance
    one = Moments(MEANS[0], mixture.components.eigenvalues[0], mixture.components.basis)
    covariance = jnp.broadcast_to(one.covariance(), (K, SIZE, SIZE))
    full = GaussianMixture.full(WEIGHTS, mixture.components.mean, covariance)
    x = 5.0 + (1 + sigma) * X
    for name in ("log_responsibilities", "score", "__call__"):
        found, expected = getattr(mixture, name)(x, sigma), getattr(full, name)(x, sigma)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10, err_msg=name)


def test_responsibilities_far_from_the_origin_survive_single_precision():
    """Two modes 160 standard deviations apart, a point where one has three times the mass."""
    size, offset = 800, 1e3
    step = jnp.full(size, 160 / size**0.5)
    means = offset + jnp.stack([jnp.zeros(size), step])
    mixture = GaussianMixture.diagonal(jnp.full(2, 0.5), means, 1.0)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mixture)
    x = offset + (0.5 + jnp.log(3) / 160**2) * step
    found = single.log_responsibilities(x.astype(jnp.float32), 0.0)
    # The point itself is rounded to 3e-5, and 160 of it to half a hundredth.
    np.testing.assert_allclose(jnp.exp(found), [0.25, 0.75], atol=0.02)


@pytest.mark.parametrize("name", CONJUGATE)
def test_posterior_and_evidence_satisfy_bayes_rule(name):
    denoiser = EXACT[name]
    posterior, evidence = denoiser.posterior(A, Y, COV_Y), denoiser.log_evidence(A, Y, COV_Y)
    for x in jax.random.normal(KEYS[5], (3, *SHAPE)):
        likelihood = jax.scipy.stats.multivariate_normal.logpdf(Y, A @ x.ravel(), COV_Y)
        expected = denoiser.log_prob(x) + likelihood - evidence
        np.testing.assert_allclose(posterior.log_prob(x), expected, rtol=1e-9)


def test_denoiser_of_the_posterior_equals_quadrature_in_one_dimension():
    mixture = GaussianMixture.diagonal(jnp.array([0.4, 0.6]), jnp.array([[-1.0], [1.5]]), 0.2)
    posterior = mixture.posterior(jnp.array([[2.0]]), jnp.array([1.0]), jnp.array([[4.0]]))
    grid = jnp.linspace(-8, 8, 20_001)[:, None]
    x_t, sigma = jnp.array([0.3]), 0.8
    log_joint = (
        jax.vmap(mixture.log_prob)(grid)
        - (1.0 - 2 * grid[:, 0]) ** 2 / 8
        - (x_t[0] - grid[:, 0]) ** 2 / (2 * sigma**2)
    )
    expected = jax.nn.softmax(log_joint) @ grid[:, 0]
    np.testing.assert_allclose(posterior(x_t, sigma)[0], expected, rtol=1e-8)


def test_kernel_density_is_the_mixture_centred_on_its_data():
    mixture = GaussianMixture.diagonal(jnp.full(K, 1 / K), MEANS, 0.3**2)
    kernel = EXACT["kernel density"]
    np.testing.assert_allclose(kernel(X, 0.5), mixture(X, 0.5), rtol=1e-10)
    np.testing.assert_allclose(kernel.log_prob(X, 0.5), mixture.log_prob(X, 0.5), rtol=1e-10)


def test_without_bandwidth_the_denoiser_returns_its_data_and_says_so():
    memory = Empirical(MEANS, 0.0)
    np.testing.assert_allclose(memory(MEANS[1] + 0.01, 0.05), MEANS[1], atol=1e-10)
    np.testing.assert_allclose(memory.effective_neighbours(MEANS[1], 0.05), 1.0, atol=1e-10)
    np.testing.assert_allclose(memory.effective_neighbours(X, 1e4), K, rtol=1e-6)


def test_smoothing_moves_the_denoiser_to_barycentres():
    smoothed = Smoothed.draw(
        Empirical(MEANS, 0.0), SHAPE, scale=2.0, num_perturbations=64, key=KEYS[6]
    )
    at_data = smoothed(MEANS[0], 0.05)
    perturbed = [Empirical(MEANS, 0.0)(MEANS[0] + 2.0 * p, 0.05) for p in smoothed.perturbations]
    np.testing.assert_allclose(at_data, jnp.mean(jnp.stack(perturbed), 0), rtol=1e-10)
    assert float(jnp.abs(at_data - MEANS[0]).max()) > 0.05
    np.testing.assert_allclose(smoothed.perturbations.mean(0), jnp.zeros(SHAPE), atol=1e-12)
    # A linear denoiser is unchanged by antithetic smoothing.
    linear = EXACT["gaussian"]
    same = Smoothed.draw(linear, SHAPE, scale=2.0, num_perturbations=64, key=KEYS[6])
    np.testing.assert_allclose(same(X, 0.5), linear(X, 0.5), rtol=1e-10)


def test_rescaled_is_the_denoiser_of_the_rescaled_law():
    loc, scale = 3.0, 2.5
    moved = GaussianMixture.full(WEIGHTS, loc + scale * MEANS, scale**2 * COVARIANCES)
    rescaled = Rescaled(EXACT["full"], loc, scale)
    np.testing.assert_allclose(rescaled(X, 0.7), moved(X, 0.7), rtol=1e-10)
    np.testing.assert_allclose(rescaled.score(X, 0.7), moved.score(X, 0.7), rtol=1e-9)


def test_conditioned_fixes_the_context_once():
    class Shifted(Rescaled):
        def __call__(self, x, sigma, context=None):
            return self.denoiser(x - context, sigma) + context

    conditioned = Conditioned(Shifted(EXACT["full"], 0.0, 1.0), jnp.asarray(2.0))
    moved = GaussianMixture.full(WEIGHTS, MEANS + 2.0, COVARIANCES)
    np.testing.assert_allclose(conditioned(X, 0.7), moved(X, 0.7), rtol=1e-10)
    with pytest.raises(ValueError, match="context is already fixed"):
        conditioned(X, 0.7, jnp.asarray(1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture.full(WEIGHTS[:2], MEANS, COVARIANCES), "must agree in K"),
        (lambda: GaussianMixture.diagonal(2 * WEIGHTS, MEANS, 1.0), "weights must be positive and"),
        (lambda: EXACT["full"].posterior(A[:, :3], Y, COV_Y), r"A must have shape \[m, 4\]"),
        (lambda: EXACT["full"].posterior(A, Y[:1], COV_Y), "y and cov_y must have shapes"),
        (lambda: Empirical(MEANS, -0.1), "bandwidth must be non-negative, got -0.1"),
        (lambda: Empirical(jnp.full((3, 2), jnp.nan), 0.1), "data must be finite"),
        (lambda: Rescaled(EXACT["full"], 0.0, -1.0), "scale must be a positive finite number"),
        (
            lambda: Smoothed.draw(
                EXACT["full"], SHAPE, scale=1.0, num_perturbations=3, key=KEYS[0]
            ),
            "num_perturbations must be even and positive, got 3",
        ),
    ],
)
def test_bad_input_is_named(as_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
