"""`DAPS`: the law that it targets on a Gaussian prior, by a recursion of its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
from oracles import A_G, GAUSSIAN, SD_G, Y_G, at_level
from scoreprior.density import ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.mcmc import DAPS
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.sample import DPMSolver, HalfNoise, Heun, LogGrid
from stats import assert_cov, assert_mean

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(9)
SIGMA_MIN = 0.1
OUTSIDE = "outside 5 standard errors"
FLOW = Flow(GAUSSIAN, GAUSSIAN.moments(), sigma_min=SIGMA_MIN, solver=FixedGrid(1))
LAW = at_level(GAUSSIAN, SIGMA_MIN)


def line(y):
    x = numpyro.sample("x", ScorePrior(FLOW, ScoreOnly()))
    numpyro.sample("y", dist.Normal(A_G @ x, SD_G).to_event(1), obs=y)


PROBLEM = Problem.from_model(line, Y_G)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T


def recursion(levels, A, y, cov_y):
    """Mean and covariance of the last event, with the probability flow solved exactly.

    The flow takes `x_r` to `m + C^(1/2) (C + r^2 I)^(-1/2) (x_r - m)`.
    """
    m, C = oracles.moments(LAW)
    A, y, cov_y = map(np.asarray, (A, y, cov_y))
    eye = np.eye(len(m))
    mean, cov = m, C + levels[0] ** 2 * eye
    for r, r_next in zip(levels, [*levels[1:], 0.0], strict=True):
        T = root(C) @ np.linalg.inv(root(C + r**2 * eye))
        P = np.linalg.inv(eye / r**2 + A.T @ np.linalg.solve(cov_y, A))
        M = P / r**2 @ T
        mean = P @ (A.T @ np.linalg.solve(cov_y, y) + (m - T @ m) / r**2) + M @ mean
        cov = M @ cov @ M.T + P + r_next**2 * eye
    return mean, cov


def grid(num_levels):
    top = np.sqrt(FLOW.sigma_max**2 - SIGMA_MIN**2)
    return np.asarray(LogGrid(0.1 * SIGMA_MIN, float(top))(num_levels - 1))


@pytest.mark.parametrize("sampler", [Heun(), DPMSolver()], ids=lambda s: type(s).__name__)
def test_the_law_on_a_gaussian_is_that_of_the_recursion(sampler):
    engine = DAPS(12_000, 10, num_ode_steps=16, sampler=sampler, batch_size=12_000)
    draws = engine.run(PROBLEM, KEY, progress=False)
    x = draws.positions["x"][0]
    observation = A_G, Y_G, SD_G**2 * jnp.eye(1)
    mean, cov = recursion(grid(10), *observation)
    assert_mean(x, mean, bias=0.1)
    assert_cov(x, cov, bias=0.1)
    _, exact_cov = oracles.moments(LAW.posterior(*observation))
    with pytest.raises(AssertionError, match=OUTSIDE):
        assert_cov(x, exact_cov, bias=0.1)
    # The direction that is seen is right to a few hundredths, the other is much too wide.
    seen, unseen = np.array([1.0, 1.0]), np.array([1.0, -1.0])
    assert seen @ cov @ seen == pytest.approx(seen @ exact_cov @ seen, rel=0.1)
    assert unseen @ cov @ unseen > 5 * unseen @ exact_cov @ unseen
    per_step = {"Heun": 2, "DPMSolver": 1}[type(sampler).__name__]
    assert draws.extra["num_evaluations"][1] == 10 * 16 * per_step


def test_without_data_the_variance_is_twice_that_of_the_prior():
    """What the docstring says, by the recursion: from above, with ever more levels."""
    _, C = oracles.moments(LAW)
    nothing = jnp.zeros((1, 2)), jnp.zeros(1), jnp.eye(1)
    ratios = []
    for num_levels in (10, 100, 1000):
        _, cov = recursion(grid(num_levels), *nothing)
        ratios.append(np.diag(cov) / np.diag(C))
    np.testing.assert_allclose(ratios, [[5.84] * 2, [2.155] * 2, [2.014] * 2], rtol=1e-3)


def test_batches_change_only_the_rounding_and_a_run_resumes(tmp_path):
    settings = {"num_samples": 20, "num_levels": 4, "num_ode_steps": 2}
    whole = DAPS(**settings).run(PROBLEM, KEY, progress=False)
    path = tmp_path / "run"
    parts = DAPS(**settings, batch_size=8).run(PROBLEM, KEY, progress=False, checkpoint=path)
    np.testing.assert_allclose(parts.positions["x"], whole.positions["x"], rtol=1e-9)
    again = DAPS(**settings, batch_size=8).run(PROBLEM, KEY, progress=False, checkpoint=path)
    np.testing.assert_array_equal(again.positions["x"], parts.positions["x"])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_levels": 1}, ValueError, "num_levels must be at least 2, got 1"),
        ({"num_ode_steps": 0}, ValueError, "num_ode_steps must be at least 1, got 0"),
        ({"sampler": HalfNoise()}, ValueError, "without noise, got HalfNoise"),
        ({"sampler": None}, TypeError, "sampler must be a sampler such as Heun"),
    ],
)
def test_bad_settings(as_user, settings, error, match):
    with pytest.raises(error, match=match):
        DAPS(**settings)


def test_a_model_with_more_unknowns_is_refused():
    def model():
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        x = numpyro.sample("x", ScorePrior(FLOW, ScoreOnly()))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=jnp.ones(2))

    with pytest.raises(ValueError, match="DAPS needs one prior site, .* no other latent site"):
        DAPS().run(Problem.from_model(model), KEY, progress=False)


def test_the_program_is_compiled_once_for_many_data(monkeypatch):
    def seen(y, sd):
        x = numpyro.sample("x", ScorePrior(FLOW, ScoreOnly()))
        numpyro.sample("y", dist.Normal(A_G @ x, sd).to_event(1), obs=y)

    traced, denoised = [], DAPS._denoised
    monkeypatch.setattr(DAPS, "_denoised", lambda *inputs: traced.append(1) or denoised(*inputs))
    engine, first = DAPS(20, 4), Problem.from_model(seen, Y_G, jnp.array(SD_G))
    for number, shift in enumerate((0.0, 1.5)):
        inputs = Y_G + shift, jnp.array(SD_G * (1 + shift))
        traced.clear()
        found = engine.run(first.with_data(*inputs), KEY, progress=False)
        assert bool(traced) == (number == 0)
        fresh = engine.run(Problem.from_model(seen, *inputs), KEY, progress=False)
        np.testing.assert_allclose(found.positions["x"], fresh.positions["x"], rtol=1e-9)
        for runs in (found, fresh):
            assert runs.problem.args[0].tolist() == inputs[0].tolist()
        likelihoods = (runs.stats["log_likelihood"] for runs in (found, fresh))
        np.testing.assert_allclose(*likelihoods, rtol=1e-9)
