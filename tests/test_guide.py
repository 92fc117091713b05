"""Guidance: exact on Gaussian priors, and what each approximation says it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import check_guidance, close
from oracles import MIXTURE, at_level, moments
from scoreprior.denoise import Gaussian, GaussianMixture, Noised
from scoreprior.gaussian import Moments
from scoreprior.guide import DPS, JFPS, MMPS, NRLG, TMPD, DiagonalTMPD, DiffPIR, PiGDM
from scoreprior.observation import AbstractObservation, LinearObservation
from scoreprior.sample import HalfNoise, LogGrid, sample
from stats import assert_cov, assert_mean

KEYS = jax.random.split(jax.random.key(0), 8)
SIGMAS = (0.03, 0.5, 3.0, 40.0)
ROOT = jax.random.normal(KEYS[0], (4, 4))
COV = ROOT @ ROOT.T / 2 + 0.1 * jnp.eye(4)
GAUSSIAN = Gaussian(Moments.dense(jnp.array([[0.5, -1.0], [2.0, 0.0]]), COV))
A = jax.random.normal(KEYS[1], (3, 4))
COV_Y = jnp.array([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.4]])
Y = jnp.array([1.0, -2.0, 0.5])
SEEN = LinearObservation(A, Y, COV_Y)
X = 2 * jax.random.normal(KEYS[2], (3, 2, 2))


class Squares(AbstractObservation):
    """`y = B (x + x^2 / 4) + N(0, cov_y)`, and data that are no vector."""

    B: jax.Array
    data: jax.Array
    noise: Moments

    def mean(self, x):
        return (self.B @ (x + x**2 / 4).ravel()).reshape(self.data.shape)


SQUARES = Squares(
    jax.random.normal(KEYS[3], (4, 2)),
    jnp.array([[0.3, 1.0], [-0.4, 0.2]]),
    Moments.dense(jnp.zeros((2, 2)), 0.2 * COV),
)


@jax.jit
def at_all_levels(denoiser):
    """At every level and event, [levels, events, *event]."""
    sigmas = jnp.array(SIGMAS)
    return jax.vmap(lambda s: jax.vmap(lambda x: denoiser((1 + s) * x, s))(X))(sigmas)


call = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))


def check_exact(guidance, prior, observation, cov_y):
    """The denoiser of the closed-form posterior, at every level."""
    exact = at_all_levels(prior.posterior(observation.A, observation.data, cov_y))
    assert np.all(np.abs(exact - at_all_levels(prior)).max((1, 2, 3)) > 1e-4)
    close(at_all_levels(guidance(prior, observation)), exact, 1e-8)


def check_inexact(guidance, prior, observation, cov_y):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_exact(guidance, prior, observation, cov_y)


@pytest.mark.parametrize(
    "guidance",
    [TMPD(), MMPS(12, rtol=1e-12), JFPS(GAUSSIAN.law)],
    ids=lambda g: type(g).__name__,
)
def test_exact_on_a_gaussian(guidance):
    check_exact(guidance, GAUSSIAN, SEEN, COV_Y)
    check_inexact(guidance, GAUSSIAN, SEEN, 1.01 * COV_Y)


def test_jfps_uses_its_covariance_and_not_its_mean():
    law = GAUSSIAN.law
    check_exact(JFPS(Moments(law.mean + 7, law.eigenvalues, law.basis)), GAUSSIAN, SEEN, COV_Y)
    wrong = Moments(law.mean, 1.01 * law.eigenvalues, law.basis)
    check_inexact(JFPS(wrong), GAUSSIAN, SEEN, COV_Y)


def test_pigdm_is_exact_on_an_isotropic_gaussian():
    prior = Gaussian(Moments(GAUSSIAN.law.mean, jnp.full((2, 2), 1.7)))
    check_exact(PiGDM(1.7), prior, SEEN, COV_Y)
    check_inexact(PiGDM(1.75), prior, SEEN, COV_Y)


def test_diagonal_tmpd_is_exact_where_the_covariance_is_diagonal():
    """Rows of `A` along principal axes of the prior, seen in independent noise."""
    rows = GAUSSIAN.law.basis.vectors.T[:3] * jnp.array([2.0, 1.0, -0.5])[:, None]
    cov_y = jnp.diag(jnp.array([0.3, 0.1, 0.2]))
    check_exact(DiagonalTMPD(), GAUSSIAN, LinearObservation(rows, Y, cov_y), cov_y)
    check_inexact(DiagonalTMPD(), GAUSSIAN, SEEN, COV_Y)


def test_diagonal_tmpd_divides_by_row_sums():
    x, sigma = X[0], 0.7
    J, x_hat = GAUSSIAN.covariance(x, sigma) / sigma**2, GAUSSIAN(x, sigma)
    sums = (COV_Y + sigma**2 * A @ J @ A.T).sum(1)
    expected = x_hat.ravel() + sigma**2 * J @ A.T @ ((Y - A @ x_hat.ravel()) / sums)
    close(DiagonalTMPD()(GAUSSIAN, SEEN)(x, sigma).ravel(), expected)


def test_nrlg_is_exact_for_a_flat_prior():
    """The error of its likelihood score falls as the variance of the prior grows."""

    def error(variance):
        flat = Gaussian(Moments(jnp.zeros((2, 2)), jnp.full((2, 2), variance)))
        exact = at_all_levels(flat.posterior(A, Y, COV_Y)) - at_all_levels(flat)
        found = at_all_levels(NRLG()(flat, SEEN)) - at_all_levels(flat)
        return np.abs(found - exact).max((1, 2, 3)) / np.abs(exact).max((1, 2, 3))

    assert np.all(error(1e6) < 1e-2)
    # At the smallest level the error is that of rounding.
    np.testing.assert_allclose(error(1e5)[1:] / error(1e6)[1:], 10, rtol=0.02)


def test_nrlg_weighs_the_likelihood_score():
    x, sigma = X[0], 0.7
    pulls = [NRLG(w)(GAUSSIAN, SEEN)(x, sigma) - GAUSSIAN(x, sigma) for w in (1.0, 0.3)]
    close(pulls[1], 0.3 * pulls[0])
    assert np.abs(pulls[0]).max() > 0.1


@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_diffpir_is_the_minimum_of_its_objective(weight):
    """A quadratic, so zero gradient is enough; around any denoiser."""
    for sigma in SIGMAS:
        x = X[1] * (1 + sigma)
        x_hat = GAUSSIAN(x, sigma).ravel()

        def objective(x, x_hat=x_hat, sigma=sigma):
            error = Y - A @ x
            data = error @ jnp.linalg.solve(COV_Y, error)
            return data + weight / sigma**2 * jnp.sum((x - x_hat) ** 2)

        least = DiffPIR(weight)(GAUSSIAN, SEEN)(x, sigma).ravel()
        scale = jnp.abs(jax.grad(objective)(x_hat)).max()
        close(jax.grad(objective)(least) / scale, jnp.zeros(4), 0, 1e-10)
        assert np.abs(least - x_hat).max() > 1e-4


@pytest.mark.parametrize("observation", [SEEN, SQUARES], ids=["linear", "nonlinear"])
def test_dps_follows_the_gradient_of_the_distance(observation):
    """By central differences in every entry."""
    prior = GAUSSIAN if observation is SEEN else MIXTURE
    x, sigma, step = X[0] if observation is SEEN else X[0, 0], 0.8, 0.3

    def distance(x):
        return jnp.linalg.norm((observation.data - observation.mean(prior(x, sigma))).ravel())

    moves = 1e-5 * jnp.eye(x.size).reshape(-1, *x.shape)
    difference = jax.jit(jax.vmap(lambda h: distance(x + h) - distance(x - h)))(moves)
    expected = prior(x, sigma) - step * (difference / 2e-5).reshape(x.shape)
    close(DPS(step)(prior, observation)(x, sigma), expected, 1e-7, 1e-8)


def test_dps_stays_where_the_data_are_met():
    x, sigma = X[0], 0.8
    met = LinearObservation(A, SEEN.mean(GAUSSIAN(x, sigma)), COV_Y)
    close(DPS(0.3)(GAUSSIAN, met)(x, sigma), GAUSSIAN(x, sigma), 0, 0)


def test_tmpd_and_mmps_agree_on_a_nonlinear_observation():
    """And with dense matrices: two moments of Tweedie, the observation linearised at `D`."""
    noise = SQUARES.noise.covariance()
    for sigma in (0.2, 1.0, 5.0):
        x = X[0, 0]
        x_hat, J = MIXTURE(x, sigma), MIXTURE.covariance(x, sigma) / sigma**2
        flat = jax.jacfwd(lambda x: SQUARES.mean(x).ravel())(x_hat)
        S = noise + sigma**2 * flat @ J @ flat.T
        error = (SQUARES.data - SQUARES.mean(x_hat)).ravel()
        expected = x_hat + sigma**2 * J @ flat.T @ jnp.linalg.solve(S, error)
        for guided in (TMPD()(MIXTURE, SQUARES), MMPS(20, rtol=1e-12)(MIXTURE, SQUARES)):
            close(call(guided, x, sigma), expected, 1e-8)
        assert np.abs(expected - x_hat).max() > 1e-3


def mmps_problem(singular):
    """Five data of an isotropic prior: the eigenvalues of `S` are `1 + c s^2`, one per `s`."""
    prior = Gaussian(Moments(jnp.zeros(5), jnp.full(5, 2.0)))
    left, _, right = jnp.linalg.svd(jax.random.normal(KEYS[4], (5, 5)))
    A = left @ jnp.diag(jnp.array(singular, float)) @ right
    return prior, LinearObservation(A, jnp.arange(5.0) - 1.5, jnp.eye(5))


@pytest.mark.parametrize(
    ("singular", "count"), [([2.0] * 5, 1), ([1.0, 3.0, 1.0, 3.0, 3.0], 2), ([0, 1, 2, 3, 4], 5)]
)
def test_mmps_needs_one_iteration_per_distinct_eigenvalue(singular, count):
    prior, observation = mmps_problem(singular)
    denoise, x = (lambda x: prior(x, 0.8)), jnp.ones(5)
    solution = MMPS(20, rtol=1e-9).solution(denoise, observation, x, 0.8)
    assert solution.num_iterations == count
    assert solution.residual < 1e-9
    cut = MMPS(count - 1 or 1, rtol=1e-9).solution(denoise, observation, x, 0.8)
    assert cut.num_iterations == (count - 1 or 1)
    assert (cut.residual > 1e-3) == (count > 1)


def test_mmps_says_what_residual_is_left():
    prior, observation = mmps_problem([0, 1, 2, 3, 4])
    denoise, x, sigma = (lambda x: prior(x, 0.8)), jnp.ones(5), 0.8
    J = 2.0 / (2.0 + sigma**2)
    S = jnp.eye(5) + sigma**2 * J * observation.A @ observation.A.T
    error = observation.data - observation.A @ denoise(x)
    for k in (1, 2, 3):
        v, _, residual = MMPS(k, rtol=1e-9).solution(denoise, observation, x, sigma)
        close(residual, jnp.linalg.norm(S @ v - error) / jnp.linalg.norm(error), 1e-8)
        guided = MMPS(k, rtol=1e-9)(prior, observation)(x, sigma)
        close(guided, denoise(x) + sigma**2 * J * observation.A.T @ v)
    v = MMPS(1, rtol=1e-9).solution(denoise, observation, x, sigma).v
    close(v, error * (error @ error) / (error @ S @ error))


def test_mmps_makes_no_iteration_where_the_data_are_met():
    met = LinearObservation(A, SEEN.mean(GAUSSIAN(X[0], 0.8)), COV_Y)
    solution = MMPS().solution(lambda x: GAUSSIAN(x, 0.8), met, X[0], 0.8)
    assert (solution.num_iterations, solution.residual) == (0, 0)
    close(MMPS()(GAUSSIAN, met)(X[0], 0.8), GAUSSIAN(X[0], 0.8), 0, 0)


def test_draws_with_a_guided_denoiser_are_of_the_posterior():
    """A sampler takes it as any other denoiser: here two correlated data of four entries."""
    seen = LinearObservation(A[:2], Y[:2], COV_Y[:2, :2])
    sigmas, sampler = LogGrid(0.1, 30.0)(100), HalfNoise()
    draws = sample(
        TMPD()(GAUSSIAN, seen), GAUSSIAN.law, 20_000, key=KEYS[5], sigmas=sigmas, sampler=sampler
    )
    mean, covariance = moments(at_level(GAUSSIAN.posterior(A[:2], Y[:2], COV_Y[:2, :2]), 0.1))
    assert_mean(draws, mean.ravel())
    assert_cov(draws, covariance, bias=0.1)


METHODS = [
    TMPD(),
    DiagonalTMPD(),
    MMPS(2),
    PiGDM(1.3),
    JFPS(MIXTURE.moments()),
    DiffPIR(3.0),
    NRLG(0.7),
    DPS(0.2),
]


@pytest.mark.parametrize("guidance", METHODS, ids=lambda g: type(g).__name__)
def test_law_of_guidance(guidance):
    check_guidance(guidance, MIXTURE, SQUARES, X[:, 0], 0.9)


@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
def test_noised_is_the_denoiser_of_noisy_data(law):
    level, x = 0.6, X[0] if isinstance(law, Gaussian) else X[0, 0]
    noised, exact = Noised(law, level), at_level(law, level)
    for r in (0.1, 0.7, 5.0):
        close(noised(x, r), exact(x, r))
        close(noised.score(x, r), exact.score(x, r), 1e-8)
    assert np.abs(noised(x, 0.7) - law(x, 0.7)).max() > 1e-2


def test_noised_at_its_own_level_is_the_event():
    noised = Noised(MIXTURE, 0.6)
    close(noised(X[0, 0], 0.0), X[0, 0], 0, 0)
    slope = jax.jacfwd(lambda x: noised(x, 0.0))(X[0, 0])
    close(slope, jnp.eye(2), 0, 0)


def test_noised_moves_the_range_of_levels():
    class Ranged(GaussianMixture):
        level_range = (0.5, 1.3)

    law = Ranged(MIXTURE.log_weights, MIXTURE.components, MIXTURE.shared_basis)
    close(jnp.array(Noised(law, 0.3).level_range), jnp.array([0.4, (1.3**2 - 0.09) ** 0.5]))
    assert Noised(law, 0.7).level_range[0] == 0
    assert TMPD()(law, SEEN).level_range == (0.5, 1.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffPIR(0.0), "weight must be a positive finite number, got .*0"),
        (lambda: NRLG(-1.0), "weight must be a positive finite number, got .*-1"),
        (lambda: DPS(jnp.nan), "step must be a positive finite number, got .*nan"),
        (lambda: PiGDM(0.0), "prior_variance must be a positive finite number, got .*0"),
        (lambda: MMPS(0), "max_iterations must be at least 1, got 0"),
        (lambda: MMPS(rtol=0.0), "rtol must be a positive finite number, got 0.0"),
        (lambda: Noised(GAUSSIAN, 0.0), "level must be a positive finite number, got .*0"),
        (
            lambda: LinearObservation(A, Y[:2], COV_Y),
            r"A must have shape \[m, size\] and data \[m\], got \(3, 4\) and \(2,\)",
        ),
        (
            lambda: LinearObservation(Y, Y, COV_Y),
            r"A must have shape \[m, size\] and data \[m\], got \(3,\) and \(3,\)",
        ),
        (
            lambda: LinearObservation(A, Y, COV_Y[:2, :2]),
            r"covariance must have shape \(3, 3\) .* got \(2, 2\)",
        ),
        (
            lambda: LinearObservation(A, Y, GAUSSIAN.law),
            r"cov_y must be of data of shape \(3,\), got \(2, 2\)",
        ),
        (lambda: LinearObservation(A.at[0, 0].set(jnp.nan), Y, COV_Y), "A must be finite, got 1"),
        (lambda: LinearObservation(A, Y.at[1].set(jnp.inf), COV_Y), "data must be finite, got 1"),
    ],
)
def test_errors(make, message, as_user):
    with pytest.raises(ValueError, match=message):
        make()
