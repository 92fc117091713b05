"""Methods of guidance as twists: what they say of the data, and their correction by weights."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax.scipy.stats import norm

import oracles
from oracles import GAUSSIAN
from scoreprior import feynman_kac as fk
from scoreprior.guide import DPS, MMPS, TMPD, Classifier, ClassifierGuidance, DiagonalTMPD
from scoreprior.guide.twist import ClassifierTwist
from scoreprior.observation import LinearObservation
from scoreprior.problem import Problem
from scoreprior.smc import FeynmanKac
from stats import assert_mean, assert_mean_of_groups
from test_feynman_kac import GAUSSIAN_PRIOR, KEY, PLANE, SIGMA_MIN, TRUTHS, check
from two_priors import check_evidence

RNG = np.random.default_rng(3)
M, N = 4, 6
A = jnp.asarray(RNG.standard_normal((M, N)))
ROOT = RNG.standard_normal((M, M))
COV_Y = jnp.asarray(ROOT @ ROOT.T / M + 0.3 * np.eye(M))
SEEN = LinearObservation(A, jnp.asarray(RNG.standard_normal(M)), COV_Y)
X = jnp.asarray(RNG.standard_normal(N))
ROUGH = jnp.asarray(RNG.standard_normal((N, N)))  # neither symmetric nor positive
SMOOTH = ROUGH @ ROUGH.T / N


def close(a, b, rtol=1e-9):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("J", [SMOOTH, ROUGH], ids=["smooth", "rough"])
@pytest.mark.parametrize(
    "method", [MMPS(4), MMPS(9), MMPS(2, num_probes=1), MMPS(1, num_probes=3)], ids=repr
)
def test_mmps_with_all_the_data_in_its_spaces_is_tmpd(method, J):
    assert np.linalg.eigvalsh(A @ (ROUGH + ROUGH.T) @ A.T)[0] < -1
    for seen in (SEEN, LinearObservation(jnp.ones((M, N)), SEEN.data, COV_Y)):
        (tau, direction), (ours, along) = (
            g.twist(lambda x: J @ x, seen, X, 0.8) for g in (TMPD(), method)
        )
        close(ours, tau)
        close(along, direction)


def test_mmps_follows_its_own_conjugate_gradients():
    for k in (1, 2, 3):
        method = MMPS(k, rtol=1e-12, num_probes=0)
        _, direction = method.twist(lambda x: SMOOTH @ x, SEEN, X, 0.8)
        guided = method.guide(lambda x: SMOOTH @ x, SEEN, X, 0.8)
        close(SMOOTH @ X + 0.8**2 * direction, guided)


def log_density(seen, J, sigma):
    S = seen.noise.covariance() + sigma**2 * seen.A @ J @ seen.A.T
    error = seen.data - seen.A @ J @ X
    return -0.5 * (error @ jnp.linalg.solve(S, error) + jnp.linalg.slogdet(2 * jnp.pi * S)[1])


@pytest.mark.parametrize("num_probes", [0, 1, 2])
def test_where_all_data_are_alike_one_iteration_knows_the_density(num_probes):
    """`S` is then a multiple of the identity; without a probe it is known of one datum only."""
    rows = jnp.linalg.qr(A.T)[0].T
    seen = LinearObservation(rows, SEEN.data, 0.5 * jnp.eye(M))
    tau, _ = MMPS(1, num_probes=num_probes).twist(lambda x: 0.3 * x, seen, X, 2.0)
    unseen = 0 if num_probes else 0.5 * (M - 1) * jnp.log((0.5 + 4 * 0.3) / 0.5)
    close(tau, log_density(seen, 0.3 * jnp.eye(N), 2.0) + unseen)


def test_the_determinant_of_the_rest_is_estimated():
    """Of data whose noises differ, and that are met, so that the determinant is all."""
    size = 40
    rows = jnp.asarray(RNG.standard_normal((size, size))) / size**0.5
    noise = jnp.diag(jnp.linspace(0.5, 2.0, size))
    seen = LinearObservation(rows, rows.sum(1), noise)
    spread = noise + rows @ rows.T
    exact = -0.5 * jnp.linalg.slogdet(2 * jnp.pi * spread)[1]
    tau, _ = MMPS(6, num_probes=1).twist(lambda x: x, seen, jnp.ones(size), 1.0)
    without, _ = MMPS(6, num_probes=0).twist(lambda x: x, seen, jnp.ones(size), 1.0)
    assert abs(tau - exact) < 2.5
    assert abs(without - exact) > 8.0


def test_dps_follows_the_gradient_of_what_it_says():
    def denoise(x):
        return jnp.tanh(ROUGH @ x)

    step, sigma = 0.7, 0.8

    def tau(x):
        return -step / sigma**2 * jnp.linalg.norm(SEEN.data - A @ denoise(x))

    value, direction = DPS(step).twist(denoise, SEEN, X, sigma)
    close(value, tau(X))
    close(direction, jax.grad(tau)(X))
    close(DPS(step).guide(denoise, SEEN, X, sigma), denoise(X) + sigma**2 * direction)


def test_a_classifier_follows_its_gradient_at_the_noise_of_the_denoiser():
    def classify(x, sigma):
        return -jnp.sum(x**2) / (1 + sigma)

    x = X[:2]
    value, direction = ClassifierTwist(Classifier(classify, 2.0), jnp.asarray(0.6))(
        lambda x: x, x, jnp.asarray(0.8)
    )
    close(value, 2 * classify(x, 1.0))
    guided = ClassifierGuidance(GAUSSIAN, classify, 2.0)(x, 1.0)
    close(guided, GAUSSIAN(x, 1.0) + direction)


def test_diagonal_tmpd_says_what_tmpd_does_where_the_covariance_is_diagonal():
    seen = LinearObservation(jnp.eye(N)[:M], SEEN.data, jnp.diag(jnp.arange(1.0, 1 + M)))
    J = jnp.diag(jnp.linspace(0.2, 0.9, N))
    (tau, direction), (ours, along) = (
        g.twist(lambda x: J @ x, seen, X, 0.8) for g in (TMPD(), DiagonalTMPD())
    )
    close(ours, tau)
    close(along, direction)


METHODS = {
    "MMPS, all data": (MMPS(2), 0.1),
    "MMPS, one of two": (MMPS(1), 0.1),
    "DPS": (DPS(0.002), 0.2),
    "DiagonalTMPD": (DiagonalTMPD(), 0.1),
}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(("guidance", "bias"), METHODS.values(), ids=METHODS)
def test_corrected_methods_have_the_posterior_and_the_evidence(guidance, bias):
    engine = FeynmanKac(guidance, 400, 32, 100)
    check(engine.run(PLANE, KEY, progress=False), "plane", bias=bias)
    if guidance != MMPS(2):  # which is exact for a Gaussian prior
        unweighted(engine, PLANE, oracles.moments(TRUTHS["plane"])[0])


def unweighted(engine, problem, mean):
    """Without its weights the same chain has another law."""
    model = engine._scheme.target(problem).chain.model()
    cloud, _ = fk.run(model, fk.Resampling(0.0), 10_000, KEY)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean(cloud.particles, mean)


# A class that a Gaussian prior seldom shows, with probability Phi((w . x - a) / s).
SLOPE, AT, WIDTH = jnp.array([1.0, -0.5]), 2.5, 0.4
LAW = oracles.at_level(GAUSSIAN, SIGMA_MIN).law


def recognise(x):
    return norm.logcdf((x @ SLOPE - AT) / WIDTH)


def recognise_noisy(x, sigma):
    """The same of noisy events, exact."""
    variance = sigma**2 - SIGMA_MIN**2
    gain = LAW.covariance() @ jnp.linalg.inv(LAW.covariance() + variance * jnp.eye(2))
    mean = LAW.mean + gain @ (x - LAW.mean)
    return norm.logcdf((mean @ SLOPE - AT) / jnp.sqrt(WIDTH**2 + variance * SLOPE @ gain @ SLOPE))


def labelled():
    x = numpyro.sample("x", GAUSSIAN_PRIOR)
    numpyro.factor("class", recognise(x))


CLASSIFIERS = {
    "exact": (Classifier(recognise_noisy), 0.1),
    "too weak": (Classifier(recognise_noisy, 0.6), 0.1),
}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(("guidance", "bias"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_corrected_classifier_has_the_law_of_the_class(guidance, bias):
    pull = LAW.covariance() @ SLOPE
    scale = jnp.sqrt(WIDTH**2 + SLOPE @ pull)
    z = (LAW.mean @ SLOPE - AT) / scale
    mean = LAW.mean + pull / scale * jnp.exp(norm.logpdf(z) - norm.logcdf(z))

    problem = Problem.from_model(labelled)
    engine = FeynmanKac(guidance, 400, 32, 100)
    draws = engine.run(problem, KEY, progress=False)
    groups = draws.stats["group_of_draw"].reshape(-1)
    assert_mean_of_groups(draws.positions["x"].reshape(-1, 2), groups, mean, bias=bias)
    check_evidence(draws, float(norm.logcdf(z)), bias=bias)
    if guidance is CLASSIFIERS["too weak"][0]:
        unweighted(engine, problem, mean)


def test_what_weights_cannot_correct_is_refused(as_user):
    guided = ClassifierGuidance(GAUSSIAN, lambda x, sigma: jnp.sum(x))
    with pytest.raises(TypeError, match=r"weights to correct.*MMPS.*Classifier.*, got"):
        FeynmanKac(guided)
    with pytest.raises(ValueError, match="scale must be a positive finite number"):
        Classifier(recognise_noisy, -1.0)
    with pytest.raises(ValueError, match="num_probes must be at least 0, got -1"):
        MMPS(num_probes=-1)
    nothing = Problem.from_model(lambda: numpyro.sample("x", GAUSSIAN_PRIOR))
    with pytest.raises(ValueError, match="guidance Classifier needs an observed site or a factor"):
        FeynmanKac(Classifier(recognise_noisy)).run(nothing, KEY)
