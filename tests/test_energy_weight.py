"""`EnergyRatio`: compositions of energies at few steps, against mixtures and grids.

Energies of an untrained network are those of no diffusion: no score of theirs solves a
Fokker-Planck equation, and only weights that are exact at every step find the law of the last.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior import compose
from scoreprior import feynman_kac as fk
from scoreprior.denoise import EnergyNetwork, Gaussian, Network
from scoreprior.feynman_kac import EnergyRatio, NoControl, Trapezoid, VarianceControl
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.guide import TMPD, MCGDiff, Steering
from scoreprior.nn import ResidualMLP
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import FeynmanKac
from stats import assert_mean_of_groups, require_power
from test_composition import LEFT, RIGHT, THREE

KEY = jax.random.key(17)
GRID = jnp.linspace(-9, 9, 6001)
Y, SD = jnp.array([0.9]), 0.4


class Waves(eqx.Module):
    """A bounded network of random waves, whose phases move with the level as they like."""

    frequencies: jax.Array
    phases: jax.Array
    rates: jax.Array

    @classmethod
    def make(cls, seed, size=4):
        keys = jax.random.split(jax.random.key(seed), 3)
        return cls(
            jax.random.uniform(keys[0], (size,), minval=0.5, maxval=1.5),
            jax.random.uniform(keys[1], (size,), maxval=2 * jnp.pi),
            4 * jax.random.normal(keys[2], (size,)),
        )

    def __call__(self, u, log_sigma, context=None):
        phases = self.phases + self.rates * log_sigma
        return 0.05 * jnp.sum(jnp.sin(self.frequencies * u + phases), keepdims=True)


def untrained(seed, mean, variance):
    moments = Moments(jnp.array([mean]), jnp.array([variance]))
    denoiser = EnergyNetwork(Waves.make(seed), moments)
    flow = Flow(denoiser, moments, sigma_min=0.15, sigma_max=8.0, solver=FixedGrid(1))
    return ScorePrior(flow)


ONE, TWO = untrained(1, 0.3, 0.8), untrained(2, -0.2, 1.3)
EXACT = {"annealed": {THREE: 3.0}, "product": {LEFT: 1.0, RIGHT: 1.0}}
LEARNT = {
    "low temperature": {ONE: 2.5},
    "product": {ONE: 1.0, TWO: 1.2},
}


def truth(factors, seen=False):
    """Log normaliser of `exp(-sum_i beta_i E_i)`, times a likelihood or not, mean and variance."""
    log = jnp.zeros_like(GRID)
    for prior, beta in factors.items():
        energy = lambda x, p=prior: p.flow.denoiser.energy(x[None], jnp.asarray(p.sigma_min))
        log = log - beta * jax.jit(jax.vmap(energy))(GRID)
    if seen:
        log = log + dist.Normal(GRID, SD).log_prob(Y[0])
    weights = jax.nn.softmax(log)
    mean = weights @ GRID
    spacing = GRID[1] - GRID[0]
    return jax.nn.logsumexp(log) + jnp.log(spacing), mean, weights @ (GRID - mean) ** 2


def model(law, seen):
    x = numpyro.sample("x", law)
    if seen:
        numpyro.sample("y", dist.Normal(x, SD).to_event(1), obs=Y)


def run(law, seen=False, guidance=None, **settings):
    settings = {"num_particles": 400, "num_groups": 100, "num_steps": 30} | settings
    engine = FeynmanKac(guidance, **{"weight": EnergyRatio()} | settings)
    return engine.run(Problem.from_model(model, law, seen), KEY, progress=False)


def check(draws, exact, *, bias):
    """Evidences of groups, without their logarithm, and the moments of draws."""
    log_z, mean, variance = exact
    ratio = np.exp(np.asarray(draws.extra["group_log_evidence"][1]) - float(log_z))
    se = ratio.std(ddof=1) / len(ratio) ** 0.5
    require_power(se, 1.0, bias=bias)
    assert abs(ratio.mean() - 1) < 5 * se, f"evidence over truth {ratio.mean():.4f}, se {se:.4f}"
    x = draws.positions["x"].reshape(-1, 1)
    groups = draws.stats["group_of_draw"].reshape(-1)
    sd = float(variance) ** 0.5
    assert_mean_of_groups(x, groups, mean, scale=sd, bias=bias)
    assert_mean_of_groups((x - float(mean)) ** 2, groups, variance, scale=sd**2, bias=2 * bias)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("control", [VarianceControl(), NoControl()], ids=repr)
@pytest.mark.parametrize("name", EXACT)
def test_mixtures_have_their_law_and_normaliser_in_30_steps(name, control):
    check(run(compose(EXACT[name]), control=control), truth(EXACT[name]), bias=0.1)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("name", EXACT)
def test_the_weights_of_scores_are_biased_at_30_steps(name):
    draws = run(compose(EXACT[name]), weight=Trapezoid())
    with pytest.raises(AssertionError, match="evidence over truth"):
        check(draws, truth(EXACT[name]), bias=0.2)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("seen", [False, True], ids=["prior", "posterior"])
@pytest.mark.parametrize("name", LEARNT)
def test_energies_of_an_untrained_network(name, seen):
    draws = run(compose(LEARNT[name]), seen, TMPD() if seen else None)
    check(draws, truth(LEARNT[name], seen), bias=0.1)


@pytest.mark.promotes_ranks
def test_scores_of_an_untrained_network_do_not_tell_its_law():
    """However many steps: the score of one level is not that of the next with noise."""
    factors = LEARNT["low temperature"]
    draws = run(compose(factors), weight=Trapezoid(), num_steps=150, num_groups=20)
    _, mean, variance = truth(factors)
    x, groups = (a.reshape(-1, 1) for a in (draws.positions["x"], draws.stats["group_of_draw"]))
    with pytest.raises(AssertionError, match="mean of groups"):
        assert_mean_of_groups(x, groups[:, 0], mean, scale=float(variance) ** 0.5, bias=0.15)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("guidance", [TMPD(), Steering(0.5)], ids=["TMPD", "Steering"])
def test_a_single_prior_is_the_law_of_its_energy(guidance):
    check(run(ONE, True, guidance), truth({ONE: 1.0}, True), bias=0.1)


def test_weights_of_an_isotropic_gaussian_vary_to_second_order():
    """With the kernels of `KernelRatio` their variance is of first order in the steps."""
    law = Gaussian(Moments(jnp.array([0.4, -0.3]), jnp.ones(2)))
    prior = ScorePrior(Flow(law, law.moments(), sigma_min=0.1, solver=FixedGrid(1)))

    def lost(weight, num_steps):
        composed = compose({prior: 1.0}).composed(num_steps, weight=weight, control=NoControl())
        never = fk.Resampling(0.0)
        _, info = jax.jit(lambda key: fk.run(composed.model(), never, 4000, key))(KEY)
        return -float(jnp.log(info.ess.min() / 4000))

    coarse, fine = lost(EnergyRatio(), 30), lost(EnergyRatio(), 60)
    assert fine < coarse / 2.5
    assert fine < lost(fk.KernelRatio(), 60) / 2


@pytest.mark.promotes_ranks
def test_factors_without_an_energy_are_named():
    net = ResidualMLP((1,), width=8, num_blocks=1, embedding_size=8, key=KEY)
    moments = ONE.flow.moments
    network = ScorePrior(
        Flow(Network(net, moments), moments, sigma_min=0.15, sigma_max=8.0, solver=FixedGrid(1))
    )
    named = (
        r"EnergyRatio\(\) needs an energy of every factor, and factor 1, ScorePrior.*Network has"
    )
    with pytest.raises(ValueError, match=f"{named} no energy.*EnergyNetwork.*Trapezoid"):
        run(compose({ONE: 1.0, network: 1.0}))
    with pytest.raises(ValueError, match="weight one that needs no energy"):
        run(ONE, True, MCGDiff())
