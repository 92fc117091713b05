"""Composed posteriors over many simulated data sets: ranks, and evidence ratios as an alarm.

`z ~ N(0, 1)`, `x_i = z + e_i` with errors of variance 2.25 or 0.5, so that posteriors of single
observations are mixtures, known in closed form, and only their product by weights is right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

from scoreprior import check, sbi
from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.feynman_kac import ScoreLine
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.prior import ScorePrior
from scoreprior.smc import FeynmanKac
from stats import assert_cov, assert_mean

pytestmark = [
    pytest.mark.promotes_ranks,
    pytest.mark.slow,
    pytest.mark.usefixtures("as_user"),  # in half the time
    # Of so many clouds of so few particles, some have a few heavy ones.
    pytest.mark.filterwarnings("ignore:k-hat of the last weights"),
]
NUM_OBSERVATIONS, NUM = 6, 50
VARIANCES = np.array([2.25, 0.5])
ENGINE = FeynmanKac(None, num_particles=150, num_groups=2, num_steps=60, chunk_size=60)


def normal(sd):
    return Gaussian(Moments(jnp.zeros(1), jnp.full(1, sd**2)))


def simulate(key, theta):
    which, noise = jax.random.split(key)
    variance = jax.random.choice(which, jnp.asarray(VARIANCES), (NUM_OBSERVATIONS,))
    return theta + jnp.sqrt(variance) * jax.random.normal(noise, (NUM_OBSERVATIONS,))


def mixture(x):
    """Log weights, means and variances of the law of `z` given all of `x`; weights sum to `p(x)`.

    Component by component, the product of the prior and one normal likelihood for each datum.
    """
    logs, means, variances = np.zeros(1), np.zeros(1), np.ones(1)
    for item in np.asarray(x):
        total = variances[:, None] + VARIANCES[None]
        gap = item - means[:, None]
        logs = logs[:, None] - (gap**2 / total + np.log(2 * np.pi * total)) / 2 - np.log(2)
        means = means[:, None] + variances[:, None] / total * gap
        variances = variances[:, None] * VARIANCES[None] / total
        logs, means, variances = (each.ravel() for each in (logs, means, variances))
    return logs, means, variances


def log_ratio(x):
    """`log p(x_1..n) - sum_i log p(x_i)`."""
    together, *single = (np.logaddexp.reduce(mixture(y)[0]) for y in (x, *np.split(x, len(x))))
    return together - sum(single)


def posterior(x):
    logs, *rest = mixture(x[None])
    means, variances = (jnp.asarray(each[:, None]) for each in rest)
    law = GaussianMixture.diagonal(jax.nn.softmax(jnp.asarray(logs)), means, variances)
    return ScorePrior(Flow(law, law.moments(), sigma_min=3e-3, sigma_max=30.0))


def infer_all(prior):
    def run(key, x):
        product = sbi.compose([posterior(one) for one in x], prior)
        tree = infer(lambda: numpyro.sample("z", product), ENGINE, key=key, progress=False)
        # One in three: draws of one cloud depend on one another.
        draws = np.asarray(tree.posterior["z"]).reshape(-1)[::3]
        return {"z": draws, "log_evidence": float(tree.sample_stats["log_evidence"])}

    return run


def replicate(prior, num=NUM):
    key = jax.random.key(3)
    return check.replicate(jax.random.normal, simulate, infer_all(prior), num=num, key=key)


def p_values(found):
    """Of ranks, of intervals, and of distances from the mean of the data."""
    draws = found.draws["z"]
    mean = np.mean(found.data, 1, keepdims=True)
    trees = [check.sbc(found.truth, draws), check.coverage(found.truth, draws)]
    trees.append(check.tarp(found.truth, draws, references=mean))
    return np.array([tree.attrs["p_value"] for tree in trees])


def test_composed_posteriors_are_calibrated_and_their_evidence_is_an_alarm():
    found = replicate(normal(1.0))
    assert p_values(found).min() > 0.01
    null = found.draws["log_evidence"]
    exact = np.array([log_ratio(x) for x in found.data])
    assert np.abs(null - exact).max() < 0.2
    assert exact.std() > 0.5

    run = infer_all(normal(1.0))
    key = jax.random.key(4)
    x = np.asarray(simulate(key, 0.3))
    stray = np.append(x[1:], -8.0)  # of another parameter
    alarms = [check.evidence_ratio(run(key, data)["log_evidence"], null) for data in (x, stray)]
    assert alarms[0].attrs["p_value"] > 0.01
    assert alarms[1].attrs["p_value"] == 1 / (1 + NUM)


def test_a_prior_counted_wrongly_is_seen():
    """Divided out as one of ten times its width, it stays in the product `n` times, nearly."""
    assert p_values(replicate(normal(10.0), 30)).max() < 0.01


def test_moves_by_scores_at_every_level_leave_the_product_as_it_is():
    engine = FeynmanKac(
        None, 1000, num_steps=60, threshold=1.0, rejuvenation=ScoreLine(1.0), chunk_size=60
    )
    x = np.asarray(simulate(jax.random.key(4), 0.3))
    product = sbi.compose([posterior(one) for one in x], normal(1.0))
    key = jax.random.key(5)
    tree = infer(lambda: numpyro.sample("z", product), engine, key=key, progress=False)
    logs, means, variances = mixture(x)
    weights = np.exp(logs - np.logaddexp.reduce(logs))
    mean = weights @ means
    draws, ess = np.asarray(tree.posterior["z"]).reshape(-1, 1), 2000
    assert_mean(draws, mean, ess=ess, bias=0.2)
    assert_cov(draws, weights @ (variances + (means - mean) ** 2), ess=ess, bias=0.3)
    assert abs(float(tree.sample_stats["log_evidence"]) - log_ratio(x)) < 0.1
    assert float(tree.sample_stats["rejuvenated"][:, 1:].min()) > 0.2
