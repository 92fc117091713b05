"""The reverse SDE with adaptive steps: its noise, its steps, its law, its convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior.denoise import AbstractDenoiser, Gaussian, GaussianMixture
from scoreprior.gaussian import Moments
from scoreprior.sample import StepControl, sample_adaptive, solve_adaptive
from scoreprior.sample.adaptive import DEPTH, brownian_path, path_level
from stats import assert_cov, assert_mean

KEY = jax.random.key(4)
LEVELS = {"sigma_max": 10.0, "sigma_min": 0.1}
MIXTURE = GaussianMixture.diagonal(
    jnp.array([0.3, 0.7]), jnp.array([[-2.0, 0.5], [1.5, -1.0]]), 0.2
)
GAUSSIAN = Gaussian(Moments.dense(jnp.array([3.0, -1.0]), jnp.array([[2.0, 0.8], [0.8, 1.0]])))


ENDS = jnp.asarray(0.1), jnp.asarray(10.0)


def path(key, number, shape=()):
    return brownian_path(key, jnp.asarray(number), *ENDS, shape)


def test_the_noise_is_a_brownian_motion_in_the_square_of_the_level():
    """Increments are independent, of the right variance, over long and over short intervals."""
    numbers = jnp.array([0, 1, 8000, 40_000, 40_001, 40_003, 65_000, 2**DEPTH])
    sigmas = 0.1 * 100 ** (numbers / 2**DEPTH)
    np.testing.assert_allclose([path_level(n, *ENDS) for n in numbers], sigmas, rtol=1e-12)

    def increments(key):
        values = jax.vmap(lambda number: path(key, number))(numbers)
        return jnp.diff(values) / jnp.sqrt(jnp.diff(sigmas**2))

    drawn = jax.jit(jax.vmap(increments))(jax.random.split(KEY, 12_000))
    assert_mean(drawn, 0.0, bias=0.1)
    assert_cov(drawn, np.eye(7), bias=0.1)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_cov(drawn[:, :2] @ np.array([[1.0, 0.2], [0.0, 1.0]]), np.eye(2), bias=0.1)
    assert path(KEY, 0) == 0


def test_the_algorithm_written_out():
    control = StepControl(rtol=0.1, atol=0.02, first_step=0.5)
    x = before = np.array([8.0, -5.0])
    last = number = 2**DEPTH
    h, num_tries, num_refused = 0.5 * 100, 0, 0
    score = jax.jit(lambda x, sigma: MIXTURE.score(x, sigma))
    at = jax.jit(lambda number: path(KEY, number, (2,)))
    while number > 0:
        sigma = 0.1 * 100 ** (number / last)
        target = np.sqrt(max(sigma**2 - h, 0.01))
        number_next = min(round(last * np.log(target / 0.1) / np.log(100)), number - 1)
        sigma_next = 0.1 * 100 ** (number_next / last)
        h = sigma**2 - sigma_next**2
        noise = at(number) - at(number_next)
        euler = x + h * score(x, sigma) + noise
        improved = (x + euler + h * score(euler, sigma_next) + noise) / 2
        allowed = np.maximum(0.02, 0.1 * np.maximum(abs(euler), abs(before)))
        error = np.sqrt(np.mean(((euler - improved) / allowed) ** 2))
        num_tries += 1
        if error <= 1:
            x, number, before = improved, number_next, euler
        else:
            num_refused += 1
        h *= np.clip(0.9 * error**-0.9, 0.2, 5)
    found = solve_adaptive(MIXTURE, jnp.array([8.0, -5.0]), key=KEY, **LEVELS, control=control)
    assert (found.num_evaluations, found.num_refused) == (2 * num_tries, num_refused)
    assert num_refused > 0
    np.testing.assert_allclose(found.x, x, rtol=1e-8)


class Counted(AbstractDenoiser):
    """A Gaussian denoiser that tells of every call."""

    def __call__(self, x, sigma, context=None):
        jax.debug.callback(lambda _: CALLS.append(1), sigma)
        return GAUSSIAN(x, sigma)


CALLS = []


def test_every_evaluation_is_counted():
    CALLS.clear()
    control = StepControl(rtol=0.1, atol=0.02)
    run = solve_adaptive(Counted(), jnp.ones(2), key=KEY, **LEVELS, control=control)
    jax.effects_barrier()
    assert len(CALLS) == run.num_evaluations > 10


def test_the_law_on_a_gaussian():
    truth = GAUSSIAN.law.covariance() + 0.01 * jnp.eye(2)
    settings = {"sigma_max": 10.0, "sigma_min": 0.1}

    def draws(rtol, atol):
        control = StepControl(rtol=rtol, atol=atol)
        run = sample_adaptive(
            GAUSSIAN, GAUSSIAN.moments(), 6000, key=KEY, **settings, control=control
        )
        assert np.isfinite(run.x).all()
        return run.x, float(run.num_evaluations.mean())

    fine, cost = draws(0.05, 0.02)
    assert_mean(fine, GAUSSIAN.law.mean, bias=0.15)
    assert_cov(fine, truth, bias=0.15)
    coarse, less = draws(3.0, 3.0)
    assert less < cost / 4
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_cov(coarse, truth, bias=0.15)


def test_draws_of_one_key_converge_as_the_tolerance_falls():
    starts = jax.vmap(lambda k: MIXTURE.moments().sample(k, 10.0))(jax.random.split(KEY, 64))
    keys = jax.random.split(jax.random.key(1), 64)

    @jax.jit
    def end(rtol):
        control = StepControl(rtol=rtol, atol=rtol / 5)
        run = lambda x, key: solve_adaptive(MIXTURE, x, key=key, **LEVELS, control=control)
        return jax.vmap(run)(starts, keys)

    fine = end(0.0005).x
    errors, costs = [], []
    for rtol in (0.2, 0.05, 0.0125):
        run = end(rtol)
        # A few paths pass so near to the watershed of the modes that they end in another.
        errors.append(np.median(np.linalg.norm(run.x - fine, axis=1)))
        costs.append(run.num_evaluations.mean())
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2] > 0
    assert costs[0] < costs[1] < costs[2]


def test_events_side_by_side_have_steps_of_their_own():
    starts = jnp.array([[8.0, -5.0], [0.1, 0.2], [-30.0, 3.0]])
    keys = jax.random.split(KEY, 3)
    control = StepControl(rtol=0.1, atol=0.02)
    run = lambda x, key: solve_adaptive(MIXTURE, x, key=key, **LEVELS, control=control)
    together = jax.vmap(run)(starts, keys)
    for i in range(3):
        alone = run(starts[i], keys[i])
        np.testing.assert_allclose(together.x[i], alone.x, rtol=1e-8)
        assert together.num_evaluations[i] == alone.num_evaluations
    assert len(set(together.num_evaluations.tolist())) > 1


def test_an_event_that_does_not_arrive_is_not_a_number():
    control = StepControl(rtol=0.01, atol=0.001, max_evaluations=7)
    run = solve_adaptive(MIXTURE, jnp.ones(2), key=KEY, **LEVELS, control=control)
    assert np.isnan(run.x).all()
    assert run.num_evaluations == 6


def test_single_precision_stays():
    data, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (GAUSSIAN, jnp.ones(2)))
    control = StepControl(rtol=0.1, atol=0.1)
    run = solve_adaptive(data, x, key=KEY, **LEVELS, control=control)
    assert run.x.dtype == jnp.float32
    assert np.isfinite(run.x).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepControl(rtol=0.0, atol=1.0), "rtol must be a positive finite number, got 0.0"),
        (lambda: StepControl(rtol=1.0, atol=-1.0), "atol must be a positive .* got -1.0"),
        (lambda: StepControl(rtol=1.0, atol=1.0, max_evaluations=1), "max_evaluations .* 2, got 1"),
        (
            lambda: solve_adaptive(
                MIXTURE,
                jnp.ones(2),
                key=KEY,
                sigma_max=0.1,
                sigma_min=0.2,
                control=StepControl(rtol=1.0, atol=1.0),
            ),
            "sigma_min must be below sigma_max, got 0.2 and 0.1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
