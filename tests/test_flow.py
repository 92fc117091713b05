"""The whitened flow: exact for Gaussians, convergent for mixtures, and what whitening saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import (
    Conditioned,
    Discrete,
    Gaussian,
    GaussianMixture,
    NoisePrediction,
    Rescaled,
)
from scoreprior.density import Exact, FlowDensity
from scoreprior.flow import (
    EULER,
    HEUN,
    KUTTA3,
    RK4,
    Adaptive,
    ArctanTime,
    FixedGrid,
    Flow,
    LogRatioTime,
    LogTime,
    Multistep,
    PowerTime,
)
from scoreprior.gaussian import HartleyBasis, Moments
from stats import assert_mean

SHAPE, SIGMA = (2, 2), 0.1
KEYS = jax.random.split(jax.random.key(3), 4)
FACTOR = jax.random.normal(KEYS[0], (4, 4))
DENSE = Moments.dense(jnp.arange(4.0).reshape(SHAPE), FACTOR @ FACTOR.T + 0.1 * jnp.eye(4))
GAUSSIANS = {
    "dense": DENSE,
    "diagonal": Moments(jnp.ones(SHAPE), jnp.array([[0.1, 1.0], [2.0, 0.0]])),
    "fourier": Moments(jnp.ones(SHAPE), jnp.array([[0.1, 1.0], [2.0, 3.0]]), HartleyBasis((0, 1))),
}
MIXTURE = GaussianMixture.diagonal(
    jnp.array([0.3, 0.5, 0.2]), 2 * jax.random.normal(KEYS[1], (3, *SHAPE)), 0.3
)
TIMES = [LogTime(), ArctanTime(1.5), PowerTime(7.0), LogRatioTime(0.3, 3.0)]
X = jax.random.normal(KEYS[2], SHAPE)


def mixture_flow(solver, **kwargs):
    return Flow(MIXTURE, MIXTURE.moments(), sigma_min=SIGMA, solver=solver, **kwargs)


def log_prob(flow, x):
    return jax.jit(FlowDensity().log_prob)(flow, x)


@pytest.mark.parametrize("solver", [FixedGrid(1, method=EULER), Multistep(3)], ids=["Euler", "AB"])
@pytest.mark.parametrize("moments", GAUSSIANS.values(), ids=GAUSSIANS)
def test_gaussian_data_are_exact_with_the_fewest_steps_of_any_method(moments, solver):
    flow = Flow(Gaussian(moments), moments, sigma_min=SIGMA, sigma_max=2.0, solver=solver)
    u = jax.random.normal(KEYS[3], SHAPE)
    np.testing.assert_allclose(flow.to_data(u), moments.colour(u, SIGMA), rtol=1e-9)
    np.testing.assert_allclose(flow.to_noise(X), moments.whiten(X, SIGMA), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_prob(flow, X), moments.log_prob(X, SIGMA), rtol=1e-9)


def test_density_of_a_mixture_converges_to_the_closed_form():
    flow = mixture_flow(FixedGrid(200, ArctanTime(1.5)), sigma_max=1e4)
    np.testing.assert_allclose(log_prob(flow, X), MIXTURE.log_prob(X, SIGMA), atol=2e-7)


def test_log_det_is_that_of_the_numerical_map():
    flow = mixture_flow(FixedGrid(100, ArctanTime(1.5)))
    u, log_det = flow.to_noise_and_log_det(X, Exact())
    jacobian = jax.jacfwd(lambda x: flow.to_noise(x.reshape(SHAPE)).ravel())(X.ravel())
    np.testing.assert_allclose(log_det[0], np.linalg.slogdet(jacobian)[1], atol=1e-5)
    np.testing.assert_allclose(u, flow.to_noise(X), rtol=1e-12)


@pytest.mark.parametrize(("solver", "scale"), [(FixedGrid, 1), (Multistep, 3)])
def test_both_directions_are_inverse_up_to_the_solver(solver, scale):
    errors = []
    for num_steps in (10, 20, 40):
        flow = mixture_flow(solver(scale * num_steps, ArctanTime(1.5)))
        errors.append(float(jnp.abs(flow.to_data(flow.to_noise(X)) - X).max()))
    assert errors[2] < 1e-4
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize(
    ("method", "order"), [(EULER, 1), (HEUN, 2), (KUTTA3, 3), (RK4, 4)], ids=["1", "2", "3", "4"]
)
@pytest.mark.parametrize("time", TIMES, ids=lambda t: type(t).__name__)
def test_order_of_convergence(method, order, time):
    u = jax.random.normal(KEYS[3], SHAPE)
    reference = mixture_flow(FixedGrid(1500, time, RK4), sigma_max=20.0).to_data(u)
    coarse, fine = (
        float(
            jnp.abs(
                mixture_flow(FixedGrid(n, time, method), sigma_max=20.0).to_data(u) - reference
            ).max()
        )
        for n in (100, 200)
    )
    assert order - 0.35 < np.log2(coarse / fine) < order + 0.6


@pytest.mark.parametrize("time", TIMES, ids=lambda t: type(t).__name__)
def test_multistep_is_of_third_order_in_the_state_and_in_the_density(time):
    def solve(solver):
        u, log_det = mixture_flow(solver, sigma_max=20.0).to_noise_and_log_det(X, Exact())
        return jnp.append(u.ravel(), log_det)

    reference = solve(FixedGrid(600, time, RK4))
    coarse, fine = (jnp.abs(solve(Multistep(n, time)) - reference) for n in (200, 400))
    assert 2.65 < np.log2(coarse[:-1].max() / fine[:-1].max()) < 3.6
    assert 2.65 < np.log2(coarse[-1] / fine[-1]) < 3.6


def test_multistep_halves_the_error_of_kutta_at_equal_cost():
    """Of the density of well separated components, from 30 evaluations (32 against 33)."""
    means = 4 * jax.random.normal(KEYS[1], (3, *SHAPE))
    law = GaussianMixture.diagonal(MIXTURE.weights, means, 0.3)
    points = jax.vmap(law.sample)(jax.random.split(KEYS[1], 64))
    truth = jax.vmap(lambda x: law.log_prob(x, SIGMA))(points)
    default = Flow(law, law.moments(), sigma_min=SIGMA).solver
    assert default.num_evaluations == 32

    def error(solver):
        flow = Flow(law, law.moments(), sigma_min=SIGMA, solver=solver)
        values = jax.jit(jax.vmap(lambda x: FlowDensity().log_prob(flow, x)))(points)
        return float(jnp.sqrt(jnp.mean((values - truth) ** 2)))

    assert error(default) < 0.5 * error(FixedGrid(11, default.time))


def test_gradient_through_multistep_is_the_score():
    flow = mixture_flow(Multistep(200, ArctanTime(1.5)), sigma_max=1e3)
    score = jax.grad(lambda x: MIXTURE.log_prob(x, SIGMA))(X)
    np.testing.assert_allclose(jax.grad(lambda x: log_prob(flow, x))(X), score, atol=1e-4)


def test_adaptive_solver_reaches_its_tolerance_and_grows_with_it():
    truth = MIXTURE.log_prob(X, SIGMA)
    loose = abs(log_prob(mixture_flow(Adaptive(1e-2, 1e-2), sigma_max=1e4), X) - truth)
    tight = abs(log_prob(mixture_flow(Adaptive(1e-9, 1e-9), sigma_max=1e4), X) - truth)
    assert tight < 1e-6 < loose


def test_adaptive_solver_goes_both_ways():
    flow = mixture_flow(Adaptive(1e-9, 1e-9), sigma_max=20.0)
    u = jax.random.normal(KEYS[1], SHAPE)
    fine = mixture_flow(FixedGrid(300, ArctanTime(1.5), RK4), sigma_max=20.0)
    np.testing.assert_allclose(flow.to_data(u), fine.to_data(u), atol=1e-6)
    np.testing.assert_allclose(flow.to_noise(flow.to_data(u)), u, atol=1e-6)


def test_draws_follow_the_mixture():
    flow = mixture_flow(FixedGrid(20, ArctanTime(1.5)), sigma_max=200.0)
    noise = jax.random.normal(KEYS[0], (40_000, *SHAPE))
    draws = jax.jit(jax.vmap(flow.to_data))(noise)
    masses = jnp.exp(jax.vmap(lambda x: MIXTURE.log_responsibilities(x, SIGMA))(draws))
    assert_mean(masses, MIXTURE.weights)
    assert_mean(draws.reshape(-1, 4), MIXTURE.moments().mean.ravel())


def test_whitening_saves_high_noise_steps():
    """High noise is the Gaussian's business ("Gaussian score approximation", Wang & Vastola 2024):
    started at twice the largest standard deviation, the whitened flow is closer to the truth than
    one started from N(m, sigma_max^2 I) at four times it.
    """
    largest = float(jnp.sqrt(MIXTURE.moments().eigenvalues.max()))
    truth = MIXTURE.log_prob(X, SIGMA)
    solver = FixedGrid(200, ArctanTime(1.5))
    unwhitened = Moments(MIXTURE.moments().mean, jnp.zeros(SHAPE))

    def error(moments, multiple):
        flow = Flow(MIXTURE, moments, sigma_min=SIGMA, sigma_max=multiple * largest, solver=solver)
        return abs(float(log_prob(flow, X) - truth))

    assert error(MIXTURE.moments(), 2) < error(unwhitened, 4)
    assert error(MIXTURE.moments(), 4) < 0.1 * error(unwhitened, 4)


def test_error_of_a_finite_sigma_max_falls_faster_than_its_square():
    """What the terminal Gaussian leaves out is third order ("How much is enough?", Franzese et al.
    2023): with matched first and second moments, doubling sigma_max divides it by eight or more.
    """
    solver = FixedGrid(400, ArctanTime(1.5))
    errors = [
        abs(float(log_prob(mixture_flow(solver, sigma_max=s), X) - MIXTURE.log_prob(X, SIGMA)))
        for s in (10.0, 20.0)
    ]
    assert errors[0] > 6 * errors[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigma_min": -0.1}, "sigma_min must be a positive finite number, got -0.1"),
        ({"sigma_min": 0.1, "sigma_max": 0.05}, "sigma_max must exceed sigma_min = 0.1, got 0.05"),
        ({"sigma_min": float("nan")}, "sigma_min must be a positive finite number, got nan"),
    ],
)
def test_bad_noise_levels_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Flow(MIXTURE, MIXTURE.moments(), **kwargs)


def test_other_bad_input_is_named(as_user):
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        FixedGrid(0)
    with pytest.raises(ValueError, match="num_steps must be at least 3, got 2"):
        Multistep(2)
    with pytest.raises(TypeError, match="num_steps must be an int, got 2.5"):
        FixedGrid(2.5)
    with pytest.raises(ValueError, match="rtol must be a positive finite number, got 0"):
        Adaptive(0, 1e-3)
    with pytest.raises(TypeError, match="denoiser must be callable"):
        Flow(None, DENSE, sigma_min=0.1)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((0.001, 10.0), "sigma_min must be at least 0.02.*of the denoiser, got 0.001"),
        ((0.1, 1e4), "sigma_max must be at most 314.*of the denoiser, got 10000"),
    ],
)
def test_levels_outside_those_of_the_denoiser_are_refused(levels, message):
    net = NoisePrediction(lambda x, t, context: x, Discrete.ddpm())
    denoiser = Conditioned(Rescaled(net, 0.0, 2.0), None)
    with pytest.raises(ValueError, match=message):
        Flow(denoiser, DENSE, sigma_min=levels[0], sigma_max=levels[1])
    Flow(denoiser, DENSE, sigma_min=0.1, sigma_max=10.0)
