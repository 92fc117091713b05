"""The page on simulation-based inference runs from top to bottom, and its answers are right.

All of its simulators are linear and Gaussian, so that every law is known. Networks are trained on
few simulations: means are to be right within half a standard deviation, and widths within a fifth.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from scoreprior.denoise import Gaussian
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.prior import ScorePrior
from scoreprior.smc import FeynmanKac

pytestmark = [pytest.mark.promotes_ranks, pytest.mark.slow]
PAGE = Path(__file__).parents[1] / "docs" / "simulation-based.md"
TIMES = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
ORIGIN, UNIT = np.zeros(2), np.eye(2)


def given(rows, data, variance, mean=ORIGIN, covariance=UNIT):
    """Mean and covariance of `theta ~ N(mean, covariance)` given `rows theta` with noise."""
    rows, noise = np.asarray(rows), np.broadcast_to(variance, len(rows))
    precision = np.linalg.inv(covariance) + (rows.T / noise) @ rows
    pull = np.linalg.solve(covariance, mean) + (rows.T / noise) @ np.ravel(data)
    return np.linalg.solve(precision, pull), np.linalg.inv(precision)


def log_evidence(x):
    """`log p(x_1..n) - sum_i log p(x_i)` of observations [n, 3]."""

    def log_prob(x):
        rows = np.tile(TIMES, (len(x), 1))
        law = dist.MultivariateNormal(
            jnp.zeros(len(rows)), jnp.asarray(rows @ rows.T + 0.25 * np.eye(len(rows)))
        )
        return float(law.log_prob(jnp.asarray(x).ravel()))

    return log_prob(x) - sum(log_prob(x[i : i + 1]) for i in range(len(x)))


def agree(draws, mean, covariance):
    draws, sd = np.asarray(draws), np.sqrt(np.diag(np.atleast_2d(covariance)))
    draws = draws.reshape(-1, len(sd))
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean) / sd, 0.5)
    np.testing.assert_array_less(np.abs(draws.std(0) / sd - 1), 0.2)


def check_sets(page):
    """Subsets of two of eight, by the exact posterior of a set."""

    def condition(some):
        mean, covariance = given(np.tile(TIMES, (len(some), 1)), some, 0.25)
        law = Gaussian(Moments.dense(jnp.asarray(mean), jnp.asarray(covariance)))
        return ScorePrior(Flow(law, law.moments(), sigma_min=3e-3, sigma_max=10.0))

    sets = SimpleNamespace(condition=condition, parameters=page["posterior"].parameters)
    assert page["compose_subsets"](sets, page["observations"], 2).num_observations == 4


def check_one(page):
    x = np.asarray(page["x_observed"])
    truth = given(TIMES, x, 0.25)
    agree(page["theta"], *truth)
    agree(page["narrowed"], *truth)
    agree(page["embedded"].sample(jax.random.key(0), page["x_observed"], 2000), *truth)
    agree(page["gap"]["theta"], *given(TIMES[[0, 2]], x[[0, 2]], 0.25))
    check_one_more(page)
    known = page["known"]["theta"]
    agree(known[:, 1], *given(TIMES[:, 1:], x - 0.5, 0.25, np.zeros(1), np.eye(1)))
    np.testing.assert_allclose(known[:, 0], 0.5, rtol=1e-6)


def check_one_more(page):
    """The posterior as a prior site, with an observation of the speed beside it."""
    engine = FeynmanKac(None, num_particles=1000, num_steps=60)
    tree = infer(page["one_more"], engine, -0.5, key=jax.random.key(1), progress=False)
    z = tree.posterior["z"].values.reshape(-1, 2)
    theta = jax.vmap(page["posterior"].parameters.from_vector)(z)
    rows, data = [*TIMES, [0.0, 1.0]], [*np.asarray(page["x_observed"]), -0.5]
    agree(theta, *given(rows, data, [0.25] * 3 + [0.01]))


def check_many(page):
    data, rows = np.asarray(page["observations"]), np.tile(TIMES, (8, 1))
    agree(page["tree"].posterior["theta"], *given(rows, data, 0.25))
    rows, data = [*rows, [0.0, 1.0]], [*data.ravel(), -0.25]
    noise = [0.25] * 24 + [0.01]
    agree(page["together"].posterior["theta"], *given(rows, data, noise, [0.0, -0.5], 0.09 * UNIT))
    # The product with the new prior has the density of the old one times their ratio.
    z = jnp.array([[0.0, -0.5], [0.6, -0.3], [0.9, -0.7]])
    ratio = page["new_prior"].log_prob(z) - page["prior"].log_prob(z)
    found = page["swapped"].log_prob(z) - page["product"].log_prob(z)
    np.testing.assert_allclose(found - found[0], ratio - ratio[0], atol=0.05)


def check_series(page):
    gains = np.asarray(page["series"][1:] - 0.5 * page["series"][:-1])
    agree(page["drift"], *given(np.ones((12, 1)), gains, 0.09, np.zeros(1), np.eye(1)))


def check_hierarchy(page):
    x, posterior = page["measured"].ravel(), page["hierarchy"].posterior

    def mean_of_all(x):
        return given(np.ones((len(x), 1)), x, 0.74, np.zeros(1), np.eye(1))

    agree(posterior["mean"], *mean_of_all(x))
    for i, value in enumerate(x):
        mean, variance = mean_of_all(np.delete(x, i))
        own = given([[1.0]], value, 0.25, mean, variance + 0.49)
        agree(posterior["own"][..., i], *own)


def check_checks(page):
    for name in ("calibration", "calibration_of_many", "fit", "alarm", "together_or_not"):
        assert page[name].attrs["p_value"] > 0.01, name
    exact = np.array([log_evidence(data) for data in page["found"].data])
    assert np.abs(page["null"] - exact).max() < 0.5
    assert exact.std() > 1
    assert page["strays"] < page["null"].min()


CHECKS = (check_one, check_many, check_sets, check_series, check_hierarchy, check_checks)


@pytest.mark.usefixtures("as_user")
def test_the_page_runs_from_top_to_bottom_and_is_right(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    for block in blocks:
        exec(block, page)
    for each in CHECKS:
        each(page)
