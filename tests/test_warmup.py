"""After the warm-up chains accept as often as was asked."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.mcmc import HMC, MALA, NUTS, Barker, DynamicHMC, LatentGaussian, RandomWalk
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(5)
LAW = Gaussian(Moments(jnp.zeros(10), jnp.ones(10)))
PRIOR = ScorePrior(Flow(LAW, LAW.law, sigma_min=0.1, solver=FixedGrid(1)))
BAND = 0.06


def scaled():
    """A posterior whose coordinates have standard deviations of 0.1 to 0.7."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, jnp.geomspace(0.1, 1.0, 10)).to_event(1), obs=jnp.zeros(10))


PROBLEM = Problem.from_model(scaled)
SETTINGS = {"num_warmup": 200, "num_samples": 100, "num_chains": 128}
SHORT = {**SETTINGS, "num_warmup": 60}  # six steps remain once the mass matrix is known
ENGINES = {
    # Few leapfrog steps: half a period of the posterior has a rate of 1 at any step size.
    "HMC": HMC(num_leapfrog=2, **SETTINGS),
    "DynamicHMC": DynamicHMC(num_leapfrog=2, **SETTINGS),
    "HMC, short": HMC(num_leapfrog=2, **SHORT),
    "NUTS": NUTS(**SETTINGS),
    "MALA": MALA(**SETTINGS),
    "Barker": Barker(**SETTINGS),
    "RandomWalk": RandomWalk(**SETTINGS),
    "LatentGaussian": LatentGaussian(**SETTINGS),
}


def check_rate(rates, target):
    """The mean of `rates` [chain] lies within `BAND` of `target`, and the noise does not decide."""
    error = 5 * rates.std(ddof=1) / np.sqrt(len(rates))
    assert error < BAND, f"no power: five standard errors are {error:.3f}"
    assert abs(rates.mean() - target) < BAND, f"mean rate {rates.mean():.3f}, asked {target}"


@pytest.mark.parametrize("name", ENGINES)
def test_the_mean_acceptance_rate_is_the_target(name):
    engine = ENGINES[name]
    draws = engine.run(PROBLEM, KEY, progress=False)
    rates = draws.stats["acceptance_rate"].mean(1)
    check_rate(rates, engine.target_accept)
    with pytest.raises(AssertionError, match="mean rate"):
        check_rate(rates, engine.target_accept + 2 * BAND)
