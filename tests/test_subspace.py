"""A denoiser of leading coefficients, against the exact one of the same law of whole events."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import check_denoiser
from scoreprior.denoise import Conditioned, Gaussian, GaussianMixture, Rescaled, Subspace, leading
from scoreprior.flow import Flow
from scoreprior.gaussian import KroneckerBasis, Moments
from scoreprior.prior import ScorePrior

SHAPE, SIZE = (3, 4), 12
KEYS = jax.random.split(jax.random.key(11), 8)
VARIANCES = jax.random.uniform(KEYS[0], SHAPE, minval=0.1, maxval=3.0)
MEAN = jax.random.normal(KEYS[1], SHAPE)
FACTORS = tuple(
    jnp.linalg.qr(jax.random.normal(key, (n, n)))[0]
    for key, n in zip(KEYS[2:4], SHAPE, strict=True)
)
MOMENTS = Moments(MEAN, VARIANCES, KroneckerBasis(FACTORS))
INDEX = leading(MOMENTS, 3)
WEIGHTS = jnp.array([0.3, 0.7])
MEANS = 1.5 * jax.random.normal(KEYS[4], (2, 3))
ROOTS = jax.random.normal(KEYS[5], (2, 3, 3))
COVARIANCES = ROOTS @ ROOTS.mT + 0.1 * jnp.eye(3)[None]
INNER = GaussianMixture.full(WEIGHTS, MEANS, COVARIANCES)


def whole():
    """The same law written as a mixture in twelve dimensions."""
    rotation = jnp.kron(*FACTORS)  # columns in the order of flattened coefficients
    at = np.asarray(INDEX)
    means = jnp.zeros((2, SIZE)).at[:, at].set(MEANS)
    diagonal = jnp.diag(VARIANCES.ravel())
    covariances = jnp.stack([diagonal.at[np.ix_(at, at)].set(c) for c in COVARIANCES])
    return GaussianMixture.full(
        WEIGHTS,
        (means @ rotation.T + MEAN.ravel()[None]).reshape(2, *SHAPE),
        rotation[None] @ covariances @ rotation.T[None],
    )


XS = jax.random.normal(KEYS[6], (3, *SHAPE))


def test_it_is_the_denoiser_of_the_joint_law():
    denoiser, exact = Subspace(INNER, MOMENTS, INDEX), whole()
    check_denoiser(denoiser, XS, 0.7)
    for sigma in (0.05, 0.7, 20.0):
        for x in XS:
            np.testing.assert_allclose(denoiser(x, sigma), exact(x, sigma), rtol=1e-8)
            np.testing.assert_allclose(denoiser.energy(x, sigma), exact.energy(x, sigma), rtol=1e-9)


def test_leading_are_the_largest_and_project_gives_them():
    assert set(INDEX) == set(np.argsort(-np.asarray(VARIANCES).ravel())[:3].tolist())
    assert list(INDEX) == sorted(INDEX)
    rotation = np.kron(*(np.asarray(f) for f in FACTORS))
    expected = np.asarray((XS[0] - MEAN).ravel() @ rotation)[list(INDEX)]
    denoiser = Subspace(INNER, MOMENTS, INDEX)
    np.testing.assert_allclose(denoiser.project(XS[0]), expected, rtol=1e-10)
    limited = Subspace(Rescaled(Ranged(MOMENTS), 0.0, 2.0), MOMENTS, INDEX)
    assert limited.level_range == (0.2, 6.0)


class Ranged(Gaussian):
    """Trained at some levels only."""

    @property
    def level_range(self):
        return 0.1, 3.0


class Shifted(Rescaled):
    """`N(context, 1)` plus what the denoiser inside has: conditional, and exact."""

    def __call__(self, x, sigma, context=None):
        return self.denoiser(x - context, sigma) + context


def test_with_context_is_the_prior_of_that_context():
    inner = Gaussian(Moments(jnp.zeros(3), jnp.ones(3)))
    shifts = jnp.array([[0.0, 0.0, 0.0], [0.5, -1.0, 0.3]])
    conditional = Subspace(Shifted(inner, 0.0, 1.0), MOMENTS, INDEX)
    flow = Flow(Conditioned(conditional, shifts[0]), MOMENTS, sigma_min=0.1, sigma_max=300.0)
    prior = ScorePrior(flow)
    variances = VARIANCES.ravel().at[np.asarray(INDEX)].set(1.0).reshape(SHAPE)
    for given, shift in ((prior, shifts[0]), (prior.with_context(shifts[1]), shifts[1])):
        coefficients = jnp.zeros(SIZE).at[np.asarray(INDEX)].set(shift).reshape(SHAPE)
        mean = MEAN + MOMENTS.basis.synthesise(coefficients)
        exact = Moments(mean, variances, MOMENTS.basis)
        expected = jax.vmap(lambda x, e=exact: e.log_prob(x, 0.1))(XS)
        np.testing.assert_allclose(given.log_prob(XS), expected, atol=0.02)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Subspace(INNER, MOMENTS, (3, 1, 2)), ValueError, r"increasing integers from 0"),
        (lambda: Subspace(INNER, MOMENTS, (0, 1, 12)), ValueError, r"0 to 11.*got \(0, 1, 12\)"),
        (lambda: Subspace(INNER, MOMENTS, ()), ValueError, r"at least one, got \(\)"),
        (lambda: leading(MOMENTS, 13), ValueError, "num must be at most 12, of the event, got 13"),
        (
            lambda: ScorePrior(
                Flow(Gaussian(MOMENTS), MOMENTS, sigma_min=0.1, sigma_max=10.0)
            ).with_context(jnp.zeros(2)),
            TypeError,
            "denoise.Conditioned, got Gaussian",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
