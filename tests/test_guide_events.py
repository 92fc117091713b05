"""Guidance that is no observation in noise: classifiers, contexts, events, known entries."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import check_denoiser, check_pytree, close
from oracles import A_G, GAUSSIAN, MIXTURE, SD_G, Y_G
from scoreprior.denoise import AbstractDenoiser, Conditioned, Gaussian
from scoreprior.gaussian import Moments
from scoreprior.guide import (
    TMPD,
    ClassifierFree,
    ClassifierGuidance,
    Equals,
    EventGuidance,
    Exceeds,
    Replacement,
)
from scoreprior.observation import LinearObservation

SIGMAS = (0.05, 0.5, 3.0, 30.0)
X = jnp.array([[0.4, -1.2], [1.5, 0.3], [-2.0, 0.7]])
COV_Y = jnp.eye(1) * SD_G**2
POSTERIOR = GAUSSIAN.posterior(A_G, Y_G, COV_Y)


@jax.jit
def at_all_levels(denoiser):
    """At every level and event, [levels, events, *event]."""
    sigmas = jnp.array(SIGMAS)
    return jax.vmap(lambda s: jax.vmap(lambda x: denoiser((1 + s) * x, s))(X))(sigmas)


call = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))
covariance_of = jax.jit(lambda law, x, sigma: law.covariance(x, sigma))


def difference(a, b):
    """The largest at each level."""
    return np.abs(a - b).max((1, 2))


class Recognise(eqx.Module):
    """`log P(component | x_t)`: the classifier of noisy events that a mixture has."""

    component: int = eqx.field(static=True)

    def __call__(self, x, sigma):
        return MIXTURE.log_responsibilities(x, sigma)[self.component]


def component(k):
    law = jax.tree.map(lambda leaf: leaf[k], MIXTURE.components)
    return Gaussian(Moments(law.mean, law.eigenvalues, law.basis))


@pytest.mark.parametrize("k", [0, 1])
def test_a_classifier_of_components_gives_the_denoiser_of_one(k):
    exact = at_all_levels(component(k))
    close(at_all_levels(ClassifierGuidance(MIXTURE, Recognise(k))), exact)
    assert np.all(difference(exact, at_all_levels(MIXTURE)) > 1e-4)


def test_a_classifier_scales_its_gradient():
    """The score of `p_sigma(x) p(c | x)^scale = q_1^(1 - scale) q_2^scale`."""
    plain, one = at_all_levels(MIXTURE), at_all_levels(component(0))
    close(
        at_all_levels(ClassifierGuidance(MIXTURE, Recognise(0), 2.5)), plain + 2.5 * (one - plain)
    )


class Seen(AbstractDenoiser):
    """A conditional denoiser: of a Gaussian, or of its posterior when the datum is told."""

    told: jax.Array

    def __call__(self, x, sigma, context=None):
        if context is None:
            return GAUSSIAN(x, sigma)
        return jnp.where(context == self.told, POSTERIOR(x, sigma), 3 * GAUSSIAN(x, sigma))


def product(weight, sigma):
    """`q_1^(1 - weight) q_2^weight` of two noised Gaussians, by their precisions."""
    precision, shift = jnp.zeros((2, 2)), jnp.zeros(2)
    for law, power in ((GAUSSIAN.law, 1 - weight), (POSTERIOR.law, weight)):
        P = jnp.linalg.inv(law.covariance() + sigma**2 * jnp.eye(2))
        precision, shift = precision + power * P, shift + power * P @ law.mean
    return lambda x: shift - precision @ x


@pytest.mark.parametrize("weight", [0.4, 1.0, 3.0])
def test_classifier_free_guidance_follows_a_product_of_noised_laws(weight):
    guided = Conditioned(ClassifierFree(Seen(jnp.array(2.0)), weight), jnp.array(2.0))
    if weight == 1:
        close(at_all_levels(guided), at_all_levels(POSTERIOR))
    for sigma in SIGMAS:
        close(guided.score(X[0], sigma), product(weight, sigma)(X[0]), 1e-8)


def test_classifier_free_guidance_has_a_context_that_says_nothing():
    """Given as `unconditional`, where the network takes no `None`."""
    denoiser, weight, x = Seen(jnp.array(2.0)), 1.5, X[0]
    told = ClassifierFree(denoiser, weight, jnp.array(1.0))(x, 0.5, jnp.array(2.0))
    close(told, 3 * GAUSSIAN(x, 0.5) + weight * (POSTERIOR(x, 0.5) - 3 * GAUSSIAN(x, 0.5)))
    close(ClassifierFree(denoiser, weight)(x, 0.5), GAUSSIAN(x, 0.5))


def test_guided_laws_are_not_the_noised_law_of_anything_unless_the_weight_is_one():
    """Noising `q_1^-1 q_2^2` of clean data gives another score: what the docstrings warn of."""
    precision = 2 * jnp.linalg.inv(POSTERIOR.law.covariance())
    precision -= jnp.linalg.inv(GAUSSIAN.law.covariance())
    tilted = jnp.linalg.inv(precision) + jnp.eye(2)
    slope = jax.jacfwd(product(2.0, 1.0))(X[0])
    assert np.abs(slope + jnp.linalg.inv(tilted)).max() > 0.02


NORMAL = jnp.array([0.6, -1.1])


def linear(x):
    return NORMAL @ x


@jax.jit
def truncated(x, sigma, threshold):
    """`E[X | x_t, c'X > threshold]` and the log probability, by quadrature over `c'X`."""
    mean, covariance = GAUSSIAN(x, sigma), GAUSSIAN.covariance(x, sigma)
    scale = jnp.sqrt(NORMAL @ covariance @ NORMAL)
    # Beyond twelve deviations nothing is left; below the threshold nothing counts.
    low = jnp.maximum(threshold, linear(mean) - 12 * scale)
    u = jnp.linspace(low, low + 24 * scale, 20_001)
    density = jax.scipy.stats.norm.pdf(u, linear(mean), scale)
    mass = jnp.trapezoid(density, u)
    along = jnp.trapezoid(density * (u - linear(mean)), u) / mass
    return mean + covariance @ NORMAL / scale**2 * along, jnp.log(mass)


@pytest.mark.parametrize("threshold", [-1.0, 2.0])
def test_an_inequality_is_exact_for_a_linear_function_of_a_gaussian(threshold):
    guided = EventGuidance(GAUSSIAN, Exceeds(linear, threshold))
    for sigma in SIGMAS:
        x = X[1] * (1 + sigma)
        expected, log_mass = truncated(x, sigma, threshold)
        close(call(guided, x, sigma), expected, 1e-6, 1e-8)
        close(guided.log_prob(x, sigma), log_mass, 1e-6, 1e-8)


def test_an_event_far_in_the_tail_is_guided_to():
    """Sixty deviations out, where the probability itself is no number of double precision."""
    x, sigma = X[1], 0.5
    guided = EventGuidance(GAUSSIAN, Exceeds(linear, 25.0))
    assert guided.log_prob(x, sigma) < -800
    # Past the threshold by the reciprocal of the hazard, one part in thousands of the deviation.
    met = EventGuidance(GAUSSIAN, Equals(linear, 25.0))(x, sigma)
    close(linear(met), 25.0)
    assert 0 < linear(guided(x, sigma)) - 25 < 0.02


def test_equality_is_exact_for_a_linear_function_of_a_gaussian():
    exact = GAUSSIAN.posterior(A_G, Y_G, jnp.zeros((1, 1)))
    guided = EventGuidance(GAUSSIAN, Equals(lambda x: A_G @ x, Y_G))
    close(at_all_levels(guided), at_all_levels(exact), 1e-7)
    x, sigma = X[0], 0.7
    J = GAUSSIAN.covariance(x, sigma)
    density = jax.scipy.stats.norm.logpdf(
        Y_G[0], A_G[0] @ GAUSSIAN(x, sigma), jnp.sqrt(A_G[0] @ J @ A_G[0])
    )
    close(guided.log_prob(x, sigma), density)


def bent(x):
    """Of two entries, in a shape of its own."""
    return jnp.stack([x[0] + x[1] ** 2 / 4, jnp.sin(x[1])])[None]


def test_a_nonlinear_function_is_linearised_at_the_denoised_event():
    """Equality is `TMPD` of data without noise; an inequality pulls along its own gradient."""
    x, sigma = X[1], 0.9
    x_hat, covariance = MIXTURE(x, sigma), covariance_of(MIXTURE, x, sigma)
    A = jax.jacfwd(lambda x: bent(x)[0])(x_hat)
    value = jnp.array([[0.3, 0.5]])
    flat = LinearObservation(A, value[0] - bent(x_hat)[0] + A @ x_hat, jnp.zeros((2, 2)))
    guided = call(EventGuidance(MIXTURE, Equals(bent, value)), x, sigma)
    close(guided, call(TMPD()(MIXTURE, flat), x, sigma), 1e-8)
    scale = jnp.sqrt(A[0] @ covariance @ A[0])
    z = (bent(x_hat)[0, 0] - 0.4) / scale
    hazard = jax.scipy.stats.norm.pdf(z) / jax.scipy.stats.norm.cdf(z)
    guided = call(EventGuidance(MIXTURE, Exceeds(lambda x: bent(x)[0, 0], 0.4)), x, sigma)
    close(guided, x_hat + covariance @ A[0] * hazard / scale, 1e-8)


MASK = jnp.array([[True, False], [False, True]])
VALUES = jnp.array([[0.7, jnp.nan], [jnp.nan, -1.3]])
MEAN = jnp.array([[0.2, -0.5], [1.0, 0.4]])


def correlated(correlation):
    """Unit variances, and one correlation between all entries."""
    return Gaussian(
        Moments.dense(MEAN, (1 - correlation) * jnp.eye(4) + correlation * jnp.ones((4, 4)))
    )


def inpainted(prior, x, sigma):
    """The exact denoiser of the entries that are not known, and that of `Replacement`."""
    A = jnp.eye(4)[MASK.ravel()]
    exact = prior.posterior(A, VALUES[MASK], jnp.zeros((2, 2)))
    found = Replacement(prior, MASK, VALUES)(x, sigma)
    close(found[MASK], VALUES[MASK], 0, 0)
    close(found[~MASK], prior(x, sigma)[~MASK], 0, 0)
    return exact(x, sigma)[~MASK], found[~MASK]


def test_replacement_is_exact_only_where_entries_are_independent():
    x = jnp.array([[0.1, 1.4], [-0.6, 2.0]])
    for sigma in SIGMAS:
        close(*inpainted(correlated(0.0), x, sigma))
    errors = [
        np.abs(np.subtract(*inpainted(correlated(0.7), x, sigma))).max()
        for sigma in (0.01, 0.1, 3.0)
    ]
    # At low noise both are `x_t` itself; at high noise the known entries say nothing.
    assert errors[0] < 1e-3
    assert errors[2] > 0.3
    assert errors[0] < errors[1] < errors[2]


def test_the_gradient_of_replacement_sees_no_unknown_value():
    slope = jax.jacrev(lambda x: Replacement(correlated(0.7), MASK, VALUES)(x, 0.5))(MEAN)
    assert np.all(np.isfinite(slope))
    close(slope[MASK], jnp.zeros((2, 2, 2)), 0, 0)


DENOISERS = {
    "classifier": ClassifierGuidance(MIXTURE, Recognise(1), 1.7),
    "classifier-free": ClassifierFree(Conditioned(MIXTURE, None), 1.7),
    "equality": EventGuidance(MIXTURE, Equals(bent, jnp.array([[0.3, 0.5]]))),
    "inequality": EventGuidance(MIXTURE, Exceeds(linear, 1.0)),
    "replacement": Replacement(MIXTURE, jnp.array([True, False]), jnp.array([0.3, 0.0])),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_law_of_a_denoiser(name):
    denoiser = DENOISERS[name]
    check_denoiser(denoiser, X, 0.8)
    check_pytree(denoiser, lambda d: d(X[0], 0.8))
    assert denoiser.level_range == MIXTURE.level_range


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ClassifierGuidance(MIXTURE, Recognise(0), 0.0),
            "scale must be a positive finite number, got .*0",
        ),
        (lambda: ClassifierFree(MIXTURE, -1.0), "weight must be a positive finite number"),
        (lambda: Exceeds(linear, jnp.zeros(2)), r"threshold must be one number, got shape \(2,\)"),
        (lambda: Exceeds(linear, jnp.inf), "threshold must be finite"),
        (lambda: Equals(bent, jnp.array([jnp.nan])), "value must be finite"),
        (
            lambda: EventGuidance(MIXTURE, Equals(bent, jnp.zeros(3)))(X[0], 0.5),
            "function must give as many numbers as value, 3, got 2",
        ),
        (
            lambda: EventGuidance(MIXTURE, Exceeds(bent, 0.0))(X[0], 0.5),
            "function must give one number, got 2",
        ),
        (
            lambda: Replacement(MIXTURE, jnp.array([True]), jnp.zeros(2)),
            r"mask must be Boolean, of the shape of values, \(2,\), got bool of shape \(1,\)",
        ),
        (
            lambda: Replacement(MIXTURE, jnp.ones(2), jnp.zeros(2)),
            r"mask must be Boolean, .* got float64 of shape \(2,\)",
        ),
        (
            lambda: Replacement(MIXTURE, MASK[0], VALUES[1]),
            "values where mask must be finite, got 1 of 1 entries",
        ),
    ],
)
def test_errors(make, message, as_user):
    with pytest.raises(ValueError, match=message):
        make()
