"""Samplers: order of convergence, second-order variance, laws."""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.gaussian import Moments
from scoreprior.guide import Replacement
from scoreprior.sample import (
    Ancestral,
    ArctanGrid,
    Churned,
    DPMSolver,
    EDMGrid,
    Euler,
    GradientEstimation,
    HalfNoise,
    Heun,
    LogGrid,
    Recurrent,
    Stage,
    StochasticHeun,
    sample,
    solve,
)
from stats import assert_cov

KEY = jax.random.key(0)
MIXTURE = GaussianMixture.diagonal(
    jnp.array([0.3, 0.7]), jnp.array([[-2.0, 0.5], [1.5, -1.0]]), 0.2
)


@pytest.mark.parametrize(
    "grid", [LogGrid(0.02, 20.0), EDMGrid(0.02, 20.0), ArctanGrid(0.02, 20.0, scale=1.0)]
)
def test_grids_descend_between_their_ends_and_are_even_in_their_coordinate(grid):
    sigmas = grid(10)
    assert sigmas.shape == (11,)
    assert sigmas[0] == 20.0
    assert sigmas[-1] == 0.02
    steps = np.diff(grid.warp(sigmas))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
    assert np.all(np.diff(sigmas) < 0)


def test_edm_grid_is_equation_5():
    i = np.arange(9)
    expected = (80 ** (1 / 7) + i / 8 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(EDMGrid(0.002, 80.0)(8), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Euler(), 1),
        (Heun(), 2),
        (DPMSolver(), 2),
        (Churned(0.0), 2),
        (Ancestral(0.0), 1),
        (GradientEstimation(2.0), 1),
        (GradientEstimation(1.5), 2),
    ],
)
def test_order_of_convergence(sampler, order):
    """Root-mean-square error to a fine solution falls by `2^order` per doubling of the steps."""
    starts = jax.vmap(lambda k: MIXTURE.moments().sample(k, 10.0))(jax.random.split(KEY, 32))

    def end(sampler, num_steps):
        sigmas = LogGrid(0.2, 10.0)(num_steps)
        run = lambda x: solve(MIXTURE, x, key=KEY, sigmas=sigmas, sampler=sampler)
        return jax.vmap(run)(starts)

    fine = end(Heun(), 4096)
    errors = [jnp.sqrt(jnp.mean((end(sampler, n) - fine) ** 2)) for n in (128, 256, 512)]
    measured = np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))
    np.testing.assert_allclose(measured, order, atol=0.15)


def _variance_after(sampler, variance, num_steps):
    """Variance of a one-dimensional sampler on `N(0, variance)` data, propagated without chance.

    A step is linear in `x` and in its noise, so the variance maps by the squared coefficients.
    """
    data = Gaussian(Moments(jnp.zeros(1), jnp.full(1, variance)))
    sigmas = LogGrid(0.1, 5.0)(num_steps)

    def step(spread, levels):
        def move(x, noise):
            return sampler.step(Stage(data, *levels, noise), x, sampler.init(x))[0][0]

        to_x, to_noise = jax.grad(move, (0, 1))(jnp.zeros(1), jnp.zeros((sampler.num_noises, 1)))
        return jnp.sum(to_x**2) * spread + jnp.sum(to_noise**2), None

    start = variance + sigmas[0] ** 2
    end, _ = jax.lax.scan(step, start, (sigmas[:-1], sigmas[1:]))
    return float(end)


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda n: HalfNoise(), 2),
        (lambda n: Churned(8 / n), 2),
        (lambda n: Euler(), 1),
        (lambda n: Ancestral(), 1),
        (lambda n: Ancestral(0.5), 1),
        (lambda n: StochasticHeun(), 2),
        (lambda n: Recurrent(HalfNoise(), 3), 2),
        (lambda n: Recurrent(Ancestral(), 3), 1),
    ],
    ids=[
        "HalfNoise",
        "Churned",
        "Euler",
        "Ancestral",
        "between",
        "StochasticHeun",
        "recurrent",
        "recurrent of first order",
    ],
)
def test_variance_error_on_a_gaussian(make, order):
    exact = 1.3 + 0.1**2
    errors = [abs(_variance_after(make(n), 1.3, n) - exact) for n in (200, 400, 800)]
    measured = np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))
    np.testing.assert_allclose(measured, order, atol=0.15)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_variance_of_ancestral_steps_is_in_closed_form(eta):
    """`eta` of DDIM enters by its square; for data at one point the law is right at any step."""
    assert _variance_after(Ancestral(eta), 0.0, 3) == pytest.approx(0.01, rel=1e-9)
    variance, sigmas = 1.3, np.asarray(LogGrid(0.1, 5.0)(6))
    spread = variance + sigmas[0] ** 2
    for sigma, sigma_next in pairwise(sigmas):
        kept = variance / (variance + sigma**2)
        fresh = eta**2 * (1 - sigma_next**2 / sigma**2)
        factor = kept + sigma_next / sigma * np.sqrt(1 - fresh) * (1 - kept)
        spread = factor**2 * spread + sigma_next**2 * fresh
    assert _variance_after(Ancestral(eta), variance, 6) == pytest.approx(spread, rel=1e-9)


def test_the_ancestral_step_is_the_posterior_of_the_next_level():
    """`p(x_next | x, X = D)`: precisions add, of noise to `D` and of noise to `x`."""
    x, sigma, sigma_next, noise = jnp.array([1.7]), 2.0, 0.8, jnp.array([[-0.4]])
    data = Gaussian(Moments(jnp.zeros(1), jnp.full(1, 1.3)))
    above = sigma**2 - sigma_next**2
    variance = 1 / (1 / sigma_next**2 + 1 / above)
    expected = variance * (data(x, sigma) / sigma_next**2 + x / above) + variance**0.5 * noise[0]
    found, _ = Ancestral().step(Stage(data, sigma, sigma_next, noise), x, ())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gradient_estimation_looks_back_one_step():
    """The recursion written out, and its error at `gamma = 2` against that of Euler's steps."""
    sigmas, x = LogGrid(0.2, 10.0)(5), jnp.array([3.0, -1.0])
    expected, before = x, None
    for sigma, sigma_next in pairwise(sigmas):
        slope = (expected - MIXTURE(expected, sigma)) / sigma
        average = slope if before is None else 1.7 * slope - 0.7 * before
        expected, before = expected + (sigma_next - sigma) * average, slope
    found = solve(MIXTURE, x, key=KEY, sigmas=sigmas, sampler=GradientEstimation(1.7))
    np.testing.assert_allclose(found, expected, rtol=1e-10)

    def end(sampler, num_steps):
        return solve(MIXTURE, x, key=KEY, sigmas=LogGrid(0.2, 10.0)(num_steps), sampler=sampler)

    errors = [end(s, 800) - end(Heun(), 4096) for s in (Euler(), GradientEstimation(2.0))]
    np.testing.assert_allclose(errors[1], -errors[0], rtol=0.05)


def test_ancestral_steps_without_noise_have_the_gradient_of_euler():
    data = Gaussian(Moments(jnp.zeros(1), jnp.full(1, 1.3)))

    def end(sigmas, sampler):
        return solve(data, jnp.ones(1), key=KEY, sigmas=sigmas, sampler=sampler)[0]

    sigmas = LogGrid(0.2, 10.0)(8)
    slopes = [jax.grad(end)(sigmas, s) for s in (Ancestral(0.0), Euler())]
    assert jnp.max(jnp.abs(slopes[1])) > 1e-3
    np.testing.assert_allclose(*slopes, rtol=1e-12, atol=1e-14)


NARROW = Churned(0.3, sigma_low=0.4, sigma_high=2.0, noise_scale=1.4)


def heun_factor(sigma, sigma_next, variance):
    """What Heun's step multiplies `x` by on `N(0, variance)` data, where the slope is `r x`."""
    r, r_next = (s / (variance + s**2) for s in (sigma, sigma_next))
    step = sigma_next - sigma
    return 1 + step * (r + r_next * (1 + step * r)) / 2


def churned_variance(sampler, sigmas, variance):
    """Variance at the end on `N(0, variance)` data, in closed form."""
    spread = variance + sigmas[0] ** 2
    for sigma, sigma_next in pairwise(sigmas):
        active = sampler.sigma_low <= sigma <= sampler.sigma_high
        raised = sigma * (1 + sampler.churn) if active else sigma
        spread += sampler.noise_scale**2 * (raised**2 - sigma**2)
        spread *= heun_factor(raised, sigma_next, variance) ** 2
    return spread


def test_churn_adds_noise_of_its_scale_between_its_levels():
    data, sigmas = Gaussian(Moments(jnp.zeros(1), jnp.full(1, 1.3))), LogGrid(0.1, 5.0)(12)
    expected = churned_variance(NARROW, np.asarray(sigmas), 1.3)
    plain = churned_variance(Churned(0.3, 0.4, 2.0), np.asarray(sigmas), 1.3)
    assert expected > 1.2 * plain
    draws = sample(data, data.moments(), 40_000, key=KEY, sigmas=sigmas, sampler=NARROW)
    assert_cov(draws, [[expected]])


def test_churn_outside_its_levels_is_heun_bit_for_bit():
    x, sigmas = jnp.array([3.0, 1.0]), LogGrid(0.2, 10.0)(20)
    run = lambda sampler: solve(MIXTURE, x, key=KEY, sigmas=sigmas, sampler=sampler)
    heun = run(Heun())
    assert jnp.array_equal(run(Churned(0.3, sigma_low=10.1, noise_scale=1.4)), heun)
    assert jnp.array_equal(run(Churned(0.3, sigma_high=0.19, noise_scale=1.4)), heun)
    assert not jnp.array_equal(run(Churned(0.3)), heun)


@pytest.mark.parametrize(
    ("sigma", "active"), [(0.39, False), (0.4, True), (1.0, True), (2.0, True), (2.01, False)]
)
def test_a_churned_step_is_heun_from_the_raised_level(sigma, active):
    x, noise = jnp.array([0.3, -1.2]), jnp.array([[1.0, -0.5]])
    stage = Stage(lambda x, s: MIXTURE(x, s), jnp.asarray(sigma), jnp.asarray(0.1), noise)
    raised = 1.3 * sigma if active else sigma
    start = x + 1.4 * np.sqrt(raised**2 - sigma**2) * noise[0]
    expected, _ = Heun().step(stage._replace(sigma=jnp.asarray(raised)), start, ())
    np.testing.assert_allclose(NARROW.step(stage, x, ())[0], expected, rtol=1e-12)


def test_order_of_convergence_under_churn():
    """Second order to the path with the same noise and the flow solved exactly, on a Gaussian."""
    data = Gaussian(Moments(jnp.zeros(1), jnp.full(1, 1.3)))

    def error(num_steps):
        sampler, sigmas = Churned(8 / num_steps, noise_scale=1.2), LogGrid(0.1, 5.0)(num_steps)

        def step(both, level):
            sigma, sigma_next, noise = level
            x, _ = sampler.step(Stage(data, sigma, sigma_next, noise), both[0], ())
            raised = sigma * (1 + sampler.churn)
            y = both[1] + 1.2 * jnp.sqrt(raised**2 - sigma**2) * noise[0]
            return (x, y * jnp.sqrt((1.3 + sigma_next**2) / (1.3 + raised**2))), None

        def gap(key):
            start, key = jax.random.split(key)
            x, noise = 5 * jax.random.normal(start, (1,)), jax.random.normal(key, (num_steps, 1, 1))
            (x, y), _ = jax.lax.scan(step, (x, x), (sigmas[:-1], sigmas[1:], noise))
            return x - y

        return jnp.sqrt(jnp.mean(jax.vmap(gap)(jax.random.split(KEY, 512)) ** 2))

    assert np.log2(error(300) / error(600)) == pytest.approx(2, abs=0.15)


def test_inactive_churn_has_the_gradient_of_heun():
    """Also by the levels, where the root of a difference that is zero would give NaN."""
    data = Gaussian(Moments(jnp.zeros(1), jnp.full(1, 1.3)))

    def end(sigmas, sampler):
        return solve(data, jnp.ones(1), key=KEY, sigmas=sigmas, sampler=sampler)[0]

    sigmas = LogGrid(0.2, 10.0)(8)
    slopes = [jax.grad(end)(sigmas, s) for s in (Churned(0.3, sigma_low=10.1), Heun())]
    assert jnp.max(jnp.abs(slopes[1])) > 1e-3
    np.testing.assert_allclose(*slopes, rtol=1e-12, atol=1e-14)


SAMPLERS = [
    Euler(),
    Heun(),
    DPMSolver(),
    HalfNoise(),
    Churned(0.1),
    Ancestral(),
    GradientEstimation(2.0),
    StochasticHeun(),
    Recurrent(DPMSolver(), 2),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_law_on_a_gaussian(sampler):
    """Mean and covariance within five standard errors of `N(m, C + sigma_min^2 I)`."""
    covariance = jnp.array([[2.0, 0.8], [0.8, 1.0]])
    data = Gaussian(Moments.dense(jnp.array([3.0, -1.0]), covariance))
    grid = LogGrid(0.1, 20.0)(400)
    n = 10_000
    draws = sample(data, data.moments(), n, key=KEY, sigmas=grid, sampler=sampler)
    noisy = covariance + 0.01 * jnp.eye(2)
    mean_error = (draws.mean(0) - data.law.mean) / jnp.sqrt(jnp.diag(noisy) / n)
    assert jnp.max(jnp.abs(mean_error)) < 5
    spread = jnp.diag(noisy)[:, None] * jnp.diag(noisy)[None, :] + noisy**2
    # The variance error of first order at 400 steps is a few parts in a hundred: allowed on top.
    bias = 0.03 if isinstance(sampler, Euler | Ancestral | GradientEstimation) else 0.0
    covariance_error = jnp.abs(jnp.cov(draws.T) - noisy) - bias * jnp.abs(noisy)
    assert jnp.max(covariance_error / jnp.sqrt(spread / n)) < 5


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_mixture_masses(sampler):
    n = 10_000
    sigmas = LogGrid(0.05, 30.0)(120)
    draws = sample(MIXTURE, MIXTURE.moments(), n, key=KEY, sigmas=sigmas, sampler=sampler)
    mass = jnp.mean(draws[:, 0] < -0.25)
    assert jnp.abs(mass - 0.3) < 5 * jnp.sqrt(0.3 * 0.7 / n)


def test_mixture_masses_are_wrong_from_a_wrong_start():
    """The check above can fail: starting too low without the moments loses the masses."""
    n = 10_000
    start = Moments(jnp.zeros(2), jnp.zeros(2))
    sigmas = LogGrid(0.05, 1.0)(60)
    draws = sample(MIXTURE, start, n, key=KEY, sigmas=sigmas, sampler=Heun())
    mass = jnp.mean(draws[:, 0] < -0.25)
    assert jnp.abs(mass - 0.3) > 5 * jnp.sqrt(0.3 * 0.7 / n)


def test_repeats_go_up_and_down_again():
    """Two repeats of a step with one noise, written out; one repeat is the sampler itself."""
    sampler, x = Ancestral(), jnp.array([0.3, -1.2])
    noise = jax.random.normal(KEY, (3, 2))
    stage = Stage(MIXTURE, jnp.asarray(2.0), jnp.asarray(0.8), noise)
    once, _ = sampler.step(stage._replace(noise=noise[:1]), x, ())
    again = once + np.sqrt(2.0**2 - 0.8**2) * noise[1]
    expected, _ = sampler.step(stage._replace(noise=noise[2:]), again, ())
    found, _ = Recurrent(sampler, 2).step(stage, x, ())
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert Recurrent(sampler, 2).num_noises == 3
    single = Recurrent(sampler, 1)
    assert single.num_noises == 1
    stage = stage._replace(noise=noise[:1])
    assert jnp.array_equal(single.step(stage, x, ())[0], once)


def test_repeats_bring_replacement_nearer_to_the_posterior():
    """Two unit normals of correlation 0.8, one of them known: the law of the other, by recursion.

    Steps are affine, so means and covariances are propagated without chance.
    """
    data = Gaussian(Moments.dense(jnp.array([0.5, -1.0]), jnp.array([[1.0, 0.8], [0.8, 1.0]])))
    known = Replacement(data, jnp.array([True, False]), jnp.array([2.0, 0.0]))
    sigmas = LogGrid(0.05, 10.0)(50)

    @eqx.filter_jit
    def law(sampler):
        def step(carry, levels):
            move = lambda x, n: sampler.step(Stage(known, *levels, n), x, sampler.init(x))[0]
            mean, cov = carry
            zero = jnp.zeros((sampler.num_noises, 2))
            to_x, to_noise = jax.jacfwd(move, (0, 1))(mean, zero)
            to_noise = to_noise.reshape(2, -1)
            return (move(mean, zero), to_x @ cov @ to_x.T + to_noise @ to_noise.T), None

        start = data.law.mean, data.law.covariance() + sigmas[0] ** 2 * jnp.eye(2)
        return jax.lax.scan(step, start, (sigmas[:-1], sigmas[1:]))[0]

    mean, variance = -1.0 + 0.8 * 1.5, 1 - 0.8**2 + 0.05**2
    errors = []
    for num_repeats in (1, 3, 10, 30):
        found_mean, found_cov = law(Recurrent(HalfNoise(), num_repeats))
        np.testing.assert_allclose(found_mean[0], 2.0, atol=1e-3)
        shift = abs(found_mean[1] - mean) / np.sqrt(variance)
        errors.append([shift, abs(found_cov[1, 1] / variance - 1)])
    # The errors that the docstring of Recurrent states: they fall, and do not vanish.
    np.testing.assert_allclose(np.asarray(errors)[[0, 2, 3], 0], [0.8, 0.1, 0.03], rtol=0.15)
    assert (np.asarray(errors[1:]) < 0.5 * np.asarray(errors[:-1])).all()
    assert np.min(errors) > 0.01


def test_a_bare_callable_is_a_denoiser():
    arguments = {"key": KEY, "sigmas": LogGrid(0.2, 10.0)(5), "sampler": HalfNoise()}
    found = solve(lambda x, sigma: MIXTURE(x, sigma), jnp.ones(2), **arguments)
    np.testing.assert_array_equal(found, solve(MIXTURE, jnp.ones(2), **arguments))


def test_evaluations_per_step_are_counted():
    x = jnp.zeros(2)
    counts = {sampler: sampler.num_evaluations(x) for sampler in (Euler(), Heun(), HalfNoise())}
    assert list(counts.values()) == [1, 2, 1]
    assert StochasticHeun().num_evaluations(x) == 2
    assert Recurrent(Heun(), 5).num_evaluations(x) == 10


def test_denoise_last_returns_posterior_means():
    arguments = {"key": KEY, "sigmas": LogGrid(0.5, 10.0)(20), "sampler": Heun()}
    raw = sample(MIXTURE, MIXTURE.moments(), 4, **arguments)
    last = sample(MIXTURE, MIXTURE.moments(), 4, **arguments, denoise_last=True)
    np.testing.assert_allclose(last, jax.vmap(lambda x: MIXTURE(x, 0.5))(raw), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogGrid(-0.1, 1.0), "sigma_min must be a positive finite number, got -0.1"),
        (lambda: EDMGrid(2.0, 1.0), "sigma_min must be below sigma_max, got 2.0 and 1.0"),
        (lambda: LogGrid(0.1, 1.0)(0), "num_steps must be at least 1, got 0"),
        (lambda: Churned(0.1, 2.0, 1.0), "and below sigma_high, got 2.0 and 1.0"),
        (lambda: Churned(0.1, -1.0), "sigma_low must be non-negative .* got -1.0 and inf"),
        (lambda: Churned(0.1, noise_scale=0.0), "noise_scale must be a positive .* got 0.0"),
        (lambda: Ancestral(1.2), r"eta must lie in \[0, 1\], got 1.2"),
        (lambda: GradientEstimation(0.9), "gamma must be finite and at least 1, got 0.9"),
        (lambda: Recurrent(Euler(), 0), "num_repeats must be at least 1, got 0"),
        (lambda: Churned(0.6), r"churn must lie in \[0, sqrt\(2\) - 1\], got 0.6"),
        (
            lambda: solve(MIXTURE, jnp.zeros(2), key=KEY, sigmas=jnp.ones(1), sampler=Euler()),
            "sigmas must hold at least two levels, got 1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
