"""Posteriors of many observations, composed; Gaussians and mixtures are known in closed form."""

import itertools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior import feynman_kac as fk
from scoreprior import sbi
from scoreprior._stack import Stack
from scoreprior.denoise import AbstractDenoiser, Conditioned, Gaussian, GaussianMixture
from scoreprior.feynman_kac.composed import sum_over
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.mcmc import NUTS
from scoreprior.prior import ScorePrior
from scoreprior.sample import Ancestral, LogGrid, sample
from scoreprior.sbi import bridge
from scoreprior.smc import FeynmanKac, TemperedSMC
from scoreprior.vi import VI, FullRank
from stats import assert_cov, assert_mean

KEY = jax.random.key(11)
SIGMA_MIN, SIGMA_MAX = 3e-3, 30.0
PRIOR = Gaussian(Moments.dense(jnp.zeros(2), jnp.eye(2)))
NOISE = jnp.asarray([[0.5, 0.2], [0.2, 1.5]])
X = jax.random.normal(jax.random.fold_in(KEY, 1), (6, 2)) + jnp.asarray([[0.5, -1.0]])


def score_prior(law):
    return ScorePrior(Flow(law, law.moments(), sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX))


def gaussian_posterior(x):
    """Of `x = z + N(0, NOISE)`."""
    return score_prior(PRIOR.posterior(jnp.eye(2), x, NOISE))


def mixed_posterior(x):
    """Of `x = z + N(0, c I)`, `c` one of 2.25 and 1/9."""
    c, x = np.asarray([2.25, 1 / 9])[:, None] * np.ones(2), np.asarray(x)
    weights = jax.nn.softmax(jnp.asarray(-np.sum(x**2 / (1 + c) + np.log1p(c), 1) / 2))
    return score_prior(
        GaussianMixture.diagonal(weights, jnp.asarray(x / (1 + c)), jnp.asarray(c / (1 + c)))
    )


def tall_gaussian(x):
    """Mean and covariance given all `x`, and `log p(x_1..n) - sum_i log p(x_i)`."""
    n = len(x)
    precision = np.eye(2) + n * np.linalg.inv(NOISE)
    mean = np.linalg.solve(precision, np.linalg.inv(NOISE) @ np.asarray(x).sum(0))
    joint = np.kron(np.ones((n, n)), np.eye(2)) + np.kron(np.eye(n), np.asarray(NOISE))
    flat = jnp.asarray(x).ravel()
    log_joint = dist.MultivariateNormal(jnp.zeros(2 * n), jnp.asarray(joint)).log_prob(flat)
    single = jax.vmap(dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2) + NOISE).log_prob)(x)
    return mean, np.linalg.inv(precision), float(log_joint - single.sum())


def tall_mixture(x):
    """The mixture of `2^n` Gaussians given all `x`, and the evidence ratio."""
    logs, means, variances = [], [], []
    for c in itertools.product([2.25, 1 / 9], repeat=len(x)):
        c = np.asarray(c)[:, None]
        precision = 1 + (1 / c).sum(0) * np.ones(2)
        pull = (np.asarray(x) / c).sum(0)
        log = -np.sum(np.asarray(x) ** 2 / c + np.log(2 * np.pi * c)) / 2 + len(x) * np.log(0.5)
        logs.append(log + np.sum(pull**2 / precision - np.log(precision)) / 2)
        means.append(pull / precision), variances.append(1 / precision)
    log_z = np.logaddexp.reduce(logs)
    for one in np.asarray(x):
        terms = [
            np.sum(-(one**2) / (1 + c) - np.log(2 * np.pi * (1 + c))) / 2 for c in (2.25, 1 / 9)
        ]
        log_z -= np.logaddexp(*terms) + np.log(0.5)
    weights = jnp.exp(jnp.asarray(logs) - np.logaddexp.reduce(logs))
    return GaussianMixture.diagonal(weights, jnp.asarray(means), jnp.asarray(variances)), log_z


def cloud(product, num_steps, size=1000, **settings):
    """Draws of equal weight, the evidence, and the least ESS."""
    model = product.composed(num_steps, **settings).model()
    state, info = jax.jit(lambda key: fk.run(model, fk.Resampling(), size, key))(KEY)
    rows = fk.systematic(KEY, jax.nn.softmax(state.log_weights), size)
    return state.particles[rows], float(state.log_evidence), float(info.ess.min())


def test_a_stack_shares_what_is_one_object_and_maps_as_a_loop_does():
    net, items = jnp.arange(3.0), [jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 5.0])]
    stack = Stack.of([(net, item) for item in items])
    assert [leaf.shape for leaf in stack.leaves] == [(3,), (2, 2)]
    found = stack.map(lambda pair, b: b * jnp.sum(pair[0]) * pair[1], jnp.asarray([1.0, 10.0]))
    np.testing.assert_allclose(found, [[3, 6], [90, 150]])
    turned = stack.rearrange(lambda pair, b: {"b": b, "net": pair[0], "x": pair[1]}, jnp.ones(2))
    assert jax.tree.map(jnp.shape, turned[1]) == {"b": (), "net": (3,), "x": (2,)}
    np.testing.assert_allclose(stack.take(jnp.asarray([1, 1]))[0][1], items[1])
    groups = Stack.group([items[0], net, items[1]])
    assert [places for places, _ in groups] == [(0, 2), (1,)]


def test_a_gaussian_product_is_exact_in_few_steps_by_the_bridge():
    mean, covariance, log_z = tall_gaussian(X)
    product = sbi.compose([gaussian_posterior(x) for x in X], PRIOR)
    draws, found, ess = cloud(product, 60, 20_000)
    assert_mean(draws, mean)
    assert_cov(draws, covariance, bias=0.1)
    assert abs(found - log_z) < 2e-3
    assert ess > 19_990


def test_two_hundred_observations_take_no_more_steps():
    root = np.linalg.cholesky(np.asarray(NOISE))
    x = np.asarray(jax.random.normal(jax.random.fold_in(KEY, 2), (200, 2))) @ root.T
    precision = np.eye(2) + 200 * np.linalg.inv(NOISE)
    mean = np.linalg.solve(precision, np.linalg.inv(NOISE) @ x.sum(0))
    product = sbi.compose([gaussian_posterior(one) for one in jnp.asarray(x)], PRIOR)
    draws, _, ess = cloud(product, 60, 2000)
    assert_mean(draws, mean, bias=0.2)
    assert_cov(draws, np.linalg.inv(precision), bias=0.3)
    assert ess > 1900


@pytest.mark.parametrize("has_bridge", [True, False])
def test_the_mixture_given_all_and_its_evidence_are_exact(has_bridge):
    x = X[:4]
    truth, log_z = tall_mixture(x)
    product = sbi.compose([mixed_posterior(one) for one in x], PRIOR, bridge=has_bridge)
    draws, found, ess = cloud(product, 300, 6000)
    moments = truth.moments()
    assert_mean(draws, moments.mean, ess=ess / 2, bias=0.2)
    assert_cov(draws, moments.covariance(), ess=ess / 2, bias=0.4)
    assert abs(found - log_z) < 0.08


def test_sums_of_scores_fail_where_the_cloud_is_right():
    x = X[:4]
    truth, _ = tall_mixture(x)
    product = sbi.compose([mixed_posterior(one) for one in x], PRIOR)
    variance = np.trace(truth.moments().covariance())
    for score in (sbi.Sum(product), sbi.GAUSS(product)):
        draws = draw(score, 2000)
        found = np.trace(np.cov(np.asarray(draws).T))
        # Of normal draws; the tails here are lighter.
        assert abs(found - variance) > 5 * variance * np.sqrt(2 / 2000)


def draw(score, size, num_steps=400):
    start = Moments.dense(jnp.zeros(2), jnp.zeros((2, 2)))
    sigmas = LogGrid(SIGMA_MIN, SIGMA_MAX)(num_steps)
    return sample(score, start, size, key=KEY, sigmas=sigmas, sampler=Ancestral())


@pytest.mark.parametrize("kind", [sbi.GAUSS, sbi.JAC])
def test_precision_weighted_scores_are_those_of_the_diffused_gaussian(kind):
    mean, covariance, _ = tall_gaussian(X)
    score = kind(sbi.compose([gaussian_posterior(x) for x in X], PRIOR))
    truth = Gaussian(Moments.dense(jnp.asarray(mean), jnp.asarray(covariance)))
    z = jnp.asarray([0.4, -0.3])
    for sigma in (0.05, 0.7, 8.0):
        sigma = jnp.asarray(sigma)
        np.testing.assert_allclose(
            score.composite(z, sigma), truth.score(z, sigma), rtol=2e-3, atol=1e-4
        )
        plain = sbi.Sum(sbi.compose([gaussian_posterior(x) for x in X], PRIOR))
        assert np.abs(plain.composite(z, sigma) - truth.score(z, sigma)).max() > 1e-2


def test_annealed_langevin_finds_the_gaussian():
    mean, covariance, _ = tall_gaussian(X[:3])
    score = sbi.FNPSE(sbi.compose([gaussian_posterior(x) for x in X[:3]], PRIOR))
    draws = sbi.annealed_langevin(
        score, 2000, key=KEY, sigma_max=SIGMA_MAX, sigma_min=0.01, num_levels=300
    )
    scale = np.sqrt(covariance.diagonal())
    # Unadjusted, with few steps per level: near, and no more is claimed.
    assert np.abs((draws.mean(0) - mean) / scale).max() < 0.25
    assert np.abs(draws.std(0) / scale - 1).max() < 0.25


def test_damping_ends_at_the_sum_and_mini_batches_are_unbiased():
    product = sbi.compose([gaussian_posterior(x) for x in X], PRIOR)
    z = jnp.asarray([0.3, 0.2])
    low = jnp.asarray(1e-2)
    full = sbi.Damped(product, last=0.01)
    np.testing.assert_allclose(
        full.composite(z, low), sbi.Sum(product).composite(z, low), rtol=0.03
    )
    levels = jnp.linspace(0.29, 0.31, 20_000)
    batched = sbi.Damped(product, last=0.01, batch_size=2)
    found = jax.vmap(lambda s: batched.composite(z, s))(levels)
    exact = jax.vmap(lambda s: full.composite(z, s))(levels)
    assert_mean(found - exact, np.zeros(2))
    assert float(jnp.std(found[:, 0] - exact[:, 0])) > 0.1


def test_mini_batches_of_the_cloud_are_unbiased():
    """Score and rate at one level, averaged over batches, are those of all observations."""
    product = sbi.compose([mixed_posterior(x) for x in X], PRIOR)
    batched = sbi.compose([mixed_posterior(x) for x in X], PRIOR, batch_size=3)
    full, some = (p.composed(50, control=fk.NoControl()) for p in (product, batched))
    z, levels = jnp.asarray([0.4, -0.2]), jnp.linspace(0.499, 0.501, 20_000)

    def known(chain):
        scores = jax.vmap(lambda r: chain._scores(z, r, KEY))(levels)
        return np.concatenate([scores.S, jax.vmap(lambda s: s.rate)(scores)[:, None]], 1)

    exact, found = known(full), known(some)
    spread = found.std(0)
    assert (spread > 0.05).all()
    assert_mean((found - exact) / spread, np.zeros(3))


def test_mini_batches_give_the_law_of_all_observations():
    x = X[:4]
    truth, log_z = tall_mixture(x)
    product = sbi.compose([mixed_posterior(one) for one in x], PRIOR, batch_size=3)
    draws, found, ess = cloud(product, 1000, 4000)
    assert_mean(draws, truth.moments().mean, ess=ess / 2, bias=0.3)
    assert_cov(draws, truth.moments().covariance(), ess=ess / 2, bias=0.5)
    assert abs(found - log_z) < 0.2


def test_groups_have_batches_of_their_own():
    """So that the error of the evidence is seen: that of one choice of batches is not."""
    product = sbi.compose([mixed_posterior(x) for x in X[:4]], PRIOR, batch_size=2)

    def model():
        numpyro.sample("z", product)

    engine = FeynmanKac(None, num_particles=1000, num_groups=16, num_steps=100)
    tree = infer(model, engine, key=KEY, progress=False)
    spread = np.std(tree.sample_stats["group_log_evidence"].values, ddof=1)
    chain = product.composed(100)
    keys = jax.random.split(KEY, 16)
    states = jax.jit(
        jax.vmap(lambda key: fk.run(chain.model(), fk.Resampling(), 1000, key)[0].log_evidence)
    )(keys)
    # A standard deviation of 16 is known to within 90 %, at 5 standard errors.
    assert spread > 3 * np.std(states, ddof=1)


@pytest.mark.promotes_ranks
def test_tails_wider_than_their_gaussian_widen_the_bridge(tmp_path):
    """Of half `N(0, 1)` and half `N(0, 1/100)`: the Gaussian of variance 1/2 is too narrow."""
    wide = GaussianMixture.diagonal(
        jnp.asarray([0.5, 0.5]), jnp.zeros((2, 2)), jnp.asarray([[0.9, 0.9], [0.01, 0.01]])
    )
    product = sbi.compose([score_prior(wide)] * 20, PRIOR)
    assert 0 < product.share < 1
    assert f"bridge of share {product.share:g}" in repr(product)
    found = bridge.make_bridge(product.priors, product.exponents.tolist(), 1.0)
    rises = bridge.tails(product.factors(), found.stack)
    assert (rises.path[rises.bridge < -bridge.LEAST_SLOPE] < 0).any()
    kept = bridge.make_bridge(product.priors, product.exponents.tolist(), product.share)
    assert bridge.tails(product.factors(), kept.stack).path.min() >= bridge.LEAST_SLOPE
    # What the bridge leaves of an observation pulls too.
    plain = sbi.compose([score_prior(wide)] * 20, PRIOR, bridge=False)
    found = []
    for law in (product, plain):
        with pytest.warns(UserWarning, match=r"num_steps is raised from 2 to \d+: Product"):
            found.append(len(law.composed(2).levels.h))
    assert 20 < found[0] < found[1] / 3
    assert len(product.composed(found[0]).levels.h) == found[0]
    engine = FeynmanKac(None, num_particles=100, num_groups=1, num_steps=2, chunk_size=7)

    def run(law):
        with pytest.warns(UserWarning, match="num_steps is raised"):
            return infer(
                lambda: numpyro.sample("z", law),
                engine,
                key=KEY,
                progress=False,
                checkpoint=tmp_path / "run",
            )

    tree, again = run(product), run(product)
    assert tree.sample_stats["ess"].shape == (1, found[0])
    np.testing.assert_array_equal(tree.posterior["z"], again.posterior["z"])
    with pytest.raises(ValueError, match="levels"):
        run(plain)


def test_tails_are_seen_between_the_axes_too():
    """Correlated posteriors taken for round: too narrow a Gaussian along one diagonal."""
    law = Gaussian(Moments.dense(jnp.zeros(2), jnp.asarray([[0.5, 0.06], [0.06, 0.5]])))
    flow = Flow(law, Moments(jnp.zeros(2), jnp.full(2, 0.5)), sigma_min=SIGMA_MIN, sigma_max=30.0)
    product = sbi.compose([ScorePrior(flow)] * 100, PRIOR)
    found = bridge.make_bridge(product.priors, product.exponents.tolist(), 1.0)
    assert bridge.tails(product.factors(), found.stack).path.min() < 0
    assert product.share < 1


class Off(AbstractDenoiser):
    """Off by up to two thirds of the noise, outwards; or by more and more."""

    exact: AbstractDenoiser
    bounded: bool = eqx.field(static=True)

    def __call__(self, x, sigma, context=None):
        length = jnp.sqrt(1 + jnp.sum(x**2)) if self.bounded else 1.0
        return self.exact(x, sigma) + sigma * x / length / 1.5


def test_errors_that_outweigh_the_posterior_leave_it_its_bridge():
    """They are bounded; tails of errors that grow rise on any path, and that is told."""
    law = PRIOR.posterior(jnp.eye(2), jnp.zeros(2), jnp.eye(2))

    def compose(bounded):
        flow = Flow(Off(law, bounded), law.law, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        return sbi.compose([ScorePrior(flow)] * 50, PRIOR)

    product = compose(True)
    assert product.share == 1.0
    # Three standard deviations out, at the level of one, scores point outwards.
    z, r = jnp.asarray([3.0, 0.0]) * 51**-0.5, jnp.asarray(51**-0.5)
    stacks = product.composed(60).stacks
    assert sum_over(stacks, lambda f: f.exponent * f.score(z, r))[0] > 0
    with pytest.warns(UserWarning, match="50 posteriors may have no normaliser"):
        compose(False)


def test_rounding_does_not_take_a_gaussian_product_its_bridge():
    """The Gaussian toy of Linhart et al. (2024), widths from 0.003 to 0.8, in single precision."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 25.1, 32)
    noise = (0.2 * np.eye(32) + 0.8) / np.outer(scales, scales)
    x = rng.normal(size=32) + rng.multivariate_normal(np.zeros(32), noise, 90)
    with jax.enable_x64(False):
        prior = Gaussian(Moments.dense(jnp.zeros(32), jnp.eye(32)))
        laws = [prior.posterior(jnp.eye(32), one, jnp.asarray(noise)) for one in jnp.asarray(x)]
        product = sbi.compose([score_prior(law) for law in laws], prior)
        assert product.share == 1.0
        assert product.log_scale.dtype == jnp.float32


def test_the_tails_of_many_are_those_of_some():
    """Twenty equal posteriors, seen by five."""
    wide = GaussianMixture.diagonal(
        jnp.asarray([0.5, 0.5]), jnp.zeros((2, 2)), jnp.asarray([[0.9, 0.9], [0.01, 0.01]])
    )
    full = sbi.compose([score_prior(wide)] * 20, PRIOR)
    exponents = full.exponents.tolist()
    _, share = bridge.find_bridge(full.priors, exponents, full.factors(), np.arange(5))
    assert 0 < share < 1
    assert share == full.share


def test_a_posterior_narrower_than_the_noise_of_its_factors_is_exact():
    """The law is the product of noised posteriors, under a quarter of the noise in variance."""
    n, noise = 400, 0.15
    law = PRIOR.posterior(jnp.eye(2), X[0], NOISE)
    posterior = ScorePrior(Flow(law, law.law, sigma_min=noise, sigma_max=SIGMA_MAX))
    product = sbi.compose([posterior] * n, PRIOR)
    one = np.linalg.inv(np.asarray(law.law.covariance()) + noise**2 * np.eye(2))
    precision = n * one - (n - 1) / (1 + noise**2) * np.eye(2)
    mean = np.linalg.solve(precision, n * one @ np.asarray(law.law.mean))
    assert np.linalg.inv(precision).diagonal().max() < noise**2 / 4
    draws, _, ess = cloud(product, 60, 2000)
    assert_mean(draws, mean, bias=0.2)
    assert_cov(draws, np.linalg.inv(precision), bias=0.3)
    assert ess > 1900


def test_another_prior_takes_the_place_of_that_of_training():
    new = Gaussian(Moments.dense(jnp.asarray([2.0, 0.0]), 0.25 * jnp.eye(2)))
    product = sbi.compose([gaussian_posterior(x) for x in X], PRIOR, new_prior=new)
    precision = 4 * np.eye(2) + len(X) * np.linalg.inv(NOISE)
    pull = 4 * np.asarray([2.0, 0.0]) + np.linalg.inv(NOISE) @ np.asarray(X).sum(0)
    draws, _, _ = cloud(product, 60, 20_000)
    assert_mean(draws, np.linalg.solve(precision, pull))
    assert_cov(draws, np.linalg.inv(precision), bias=0.1)


def test_posteriors_of_different_simulators_compose():
    """Of two of one kind, and one of the other, in every order."""
    (mean, covariance, _), x = tall_gaussian(X[:2]), X[2]
    each = [gaussian_posterior(X[0]), mixed_posterior(x), gaussian_posterior(X[1])]
    product = sbi.compose(each, PRIOR)
    assert len(product.factors()) == 2  # the prior is of the kind of the first
    logs, means, covariances = [], [], []
    for c in (2.25, 1 / 9):
        law = dist.MultivariateNormal(jnp.asarray(mean), jnp.asarray(covariance + c * np.eye(2)))
        gain = covariance @ np.linalg.inv(covariance + c * np.eye(2))
        logs.append(float(law.log_prob(x)))
        means.append(mean + gain @ (np.asarray(x) - mean))
        covariances.append(covariance - gain @ covariance)
    weights = np.exp(logs - np.logaddexp(*logs))
    center = weights @ np.asarray(means)
    total = sum(
        w * (c + np.outer(m - center, m - center))
        for w, m, c in zip(weights, means, covariances, strict=True)
    )
    draws, _, ess = cloud(product, 200, 6000)
    assert_mean(draws, center, ess=ess, bias=0.1)
    assert_cov(draws, total, ess=ess, bias=0.2)
    with pytest.raises(ValueError, match="must be of one network with a batch_size, got 2 kinds"):
        sbi.compose(each, PRIOR, batch_size=2)
    with pytest.raises(ValueError, match="posteriors of one kind, got 2 kinds"):
        sbi.Damped(product)


def test_posteriors_wider_than_the_prior_are_repaired_and_said_so():
    wide = Moments.dense(jnp.zeros(2), jnp.diag(jnp.asarray([0.5, 1.2])))
    odd = ScorePrior(
        Flow(gaussian_posterior(X[0]).flow.denoiser, wide, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    )
    product = sbi.compose([odd, gaussian_posterior(X[1])], PRIOR)
    assert product.num_repaired == 1
    assert "1 posteriors repaired" in repr(product)
    mean, covariance, log_z = tall_gaussian(X[:2])
    draws, found, ess = cloud(product, 300, 4000)
    assert_mean(draws, mean, ess=ess, bias=0.2)
    assert_cov(draws, covariance, ess=ess, bias=0.3)
    assert abs(found - log_z) < 0.1


def test_covariances_wider_than_the_prior_are_cut_in_gauss_with_a_warning():
    variances = [0.5, *[1.5] * 4]
    laws = []
    for variance in variances:
        moments = Moments.dense(jnp.zeros(2), jnp.diag(jnp.asarray([variance, 0.3])))
        flow = Flow(Gaussian(moments), moments, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        laws.append(ScorePrior(flow))
    # What the prior leaves of the precisions of the first entry: 2 / 3 of one, and 4 / 1.5 - 3 < 0.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sbi.GAUSS(sbi.compose(laws, PRIOR, bridge=False)).num_repaired == 0
    product = sbi.compose(laws[1:], PRIOR, bridge=False)
    with pytest.warns(UserWarning, match="4 of 4 posteriors are wider than the prior"):
        score = sbi.GAUSS(product)
    assert score.num_repaired == 4
    # Precisions times sigma^2 at sigma = 2, of the prior instead of the posteriors.
    weights = (1 + 4) * np.asarray([1, 1, 1, 1, -3])
    slopes = -1 / (np.asarray([*variances[1:], 1.0]) + 4)
    found = score.composite(jnp.asarray([1.0, 0.0]), jnp.asarray(2.0))
    np.testing.assert_allclose(found[0], weights @ slopes / weights.sum(), rtol=0.02)


def test_posteriors_that_have_no_product_are_told():
    moments = Moments.dense(jnp.zeros(2), 1.05 * jnp.eye(2))
    wide = ScorePrior(Flow(Gaussian(moments), moments, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX))
    with pytest.warns(UserWarning, match="40 posteriors may have no normaliser") as caught:
        product = sbi.compose([wide] * 40, PRIOR)
    # 40 / 1.05 - 39, what is left of their precisions, is -0.9; less so at higher levels.
    found = float(str(caught[0].message).split("by ")[1].split()[0])
    assert 0.3 < found < 0.91
    assert product.num_repaired == 40
    with pytest.warns(UserWarning, match="40 posteriors may have no normaliser"):
        sbi.compose([wide] * 40, PRIOR, batch_size=10)


@pytest.mark.slow
@pytest.mark.promotes_ranks
def test_engines_that_take_the_density_agree_on_a_product():
    """Of two observations, with the likelihood of a third in the model."""
    moments = tall_mixture(X[:3])[0].moments()
    product = sbi.compose([mixed_posterior(x) for x in X[:2]], PRIOR)

    def model(x):
        z = numpyro.sample("z", product)
        kinds = dist.Categorical(jnp.asarray([0.5, 0.5]))
        scales = jnp.sqrt(jnp.asarray([[2.25], [1 / 9]]))
        noise = dist.Normal(z[None], scales * jnp.ones((2, 2))).to_event(1)
        numpyro.sample("x", dist.MixtureSameFamily(kinds, noise), obs=x)

    for engine in (NUTS(200, 500, num_chains=4), TemperedSMC(num_particles=500)):
        tree = infer(model, engine, X[2], key=KEY, progress=False)
        draws = np.asarray(tree.posterior["z"]).reshape(-1, 2)
        assert_mean(draws, moments.mean, ess=1000, bias=0.25)
        assert_cov(draws, moments.covariance(), ess=1000, bias=0.5)


def test_a_product_is_a_prior_site_with_a_likelihood_of_its_own():
    product = sbi.compose([gaussian_posterior(x) for x in X[:2]], PRIOR)

    def model(y):
        z = numpyro.sample("z", product)
        numpyro.sample("y", dist.Normal(z[0], 0.5), obs=y)

    engine = FeynmanKac(None, num_particles=1000, num_groups=4, num_steps=60)
    tree = infer(model, engine, jnp.asarray(1.0), key=KEY, progress=False)
    mean, covariance, log_z = tall_gaussian(X[:2])
    gain = covariance[:, 0] / (covariance[0, 0] + 0.25)
    draws = np.asarray(tree.posterior["z"]).reshape(-1, 2)
    assert_mean(draws, mean + gain * (1 - mean[0]), ess=2000, bias=0.2)
    assert_cov(draws, covariance - np.outer(gain, covariance[0]), ess=2000, bias=0.3)
    log_y = dist.Normal(mean[0], np.sqrt(covariance[0, 0] + 0.25)).log_prob(1.0)
    assert abs(float(tree.sample_stats["log_evidence"]) - log_z - log_y) < 0.1


@pytest.mark.promotes_ranks
def test_variational_inference_fits_a_product():
    """Draws of the guide by their importance weights, so that its last few steps do not matter."""
    product = sbi.compose([gaussian_posterior(x) for x in X[:2]], PRIOR)
    engine = VI(FullRank(), 300, 8000, resample=True)
    tree = infer(lambda: numpyro.sample("z", product), engine, key=KEY, progress=False)
    mean, covariance, _ = tall_gaussian(X[:2])
    draws = np.asarray(tree.posterior["z"]).reshape(-1, 2)
    assert_mean(draws, mean, bias=0.2)
    assert_cov(draws, covariance, bias=0.3)


def normal(mean, variance, z):
    law = dist.MultivariateNormal(mean, variance * jnp.eye(2))
    return np.asarray(jax.vmap(law.log_prob)(z))


def test_log_prob_of_observations_of_one_network_is_their_weighted_sum():
    class Amortised(Gaussian):
        """The posterior mean for `x = z + N(0, I)`, the observation being the context."""

        def __call__(self, x, sigma, context=None):
            return (x / sigma**2 + context) / (1 / sigma**2 + 2)

    net = Amortised(Moments.dense(jnp.zeros(2), 0.5 * jnp.eye(2)))
    flows = [
        Flow(
            Conditioned(net, x),
            Moments.dense(x / 2, 0.5 * jnp.eye(2)),
            sigma_min=SIGMA_MIN,
            sigma_max=SIGMA_MAX,
        )
        for x in X
    ]
    product = sbi.compose([ScorePrior(flow) for flow in flows], PRIOR)
    assert len(product.stacks) == 2
    z = jnp.asarray([[0.1, 0.4], [-0.3, 0.2]])
    truth = sum(np.asarray(normal(x / 2, 0.5, z)) for x in X)
    truth = truth - 5 * normal(jnp.zeros(2), 1.0, z)
    np.testing.assert_allclose(product.log_prob(z), truth, atol=5e-3)
    gradient = jax.grad(lambda z: product.log_prob(z).sum())(z)
    np.testing.assert_allclose(gradient, np.asarray(X.sum(0)) - 7 * np.asarray(z), atol=0.02)


@pytest.mark.usefixtures("as_user")
def test_errors_say_what_is_wrong():
    one = gaussian_posterior(X[0])
    with pytest.raises(ValueError, match="posteriors must hold at least one"):
        sbi.compose([], PRIOR)
    with pytest.raises(ValueError, match="train with drop > 0"):
        sbi.compose([one, one], None)
    with pytest.raises(TypeError, match="new_prior must be a ScorePrior .* got Normal"):
        sbi.compose([one, one], PRIOR, new_prior=dist.Normal())
    with pytest.raises(TypeError, match="product must be what sbi.compose.* returns, got list"):
        sbi.GAUSS([one, one])
    with pytest.raises(ValueError, match="batch_size must be from 2 to the number of obs"):
        sbi.compose([one, one], PRIOR, batch_size=1)
    with pytest.raises(ValueError, match="bridge must be True with a batch_size, got False"):
        sbi.compose([one, one], PRIOR, batch_size=2, bridge=False)
    with pytest.raises(ValueError, match="control must be None or NoControl"):
        sbi.compose([one, one], PRIOR, batch_size=2).composed(50, control=fk.VarianceControl())
    with pytest.raises(ValueError, match="rejuvenation must be None with mini-batches"):
        sbi.compose([one, one], PRIOR, batch_size=2).composed(50, rejuvenation=fk.ScoreLine(1.0))
    with pytest.raises(ValueError, match="must share an event shape"):
        sbi.compose([one, one], Gaussian(Moments.dense(jnp.zeros(3), jnp.eye(3))))
    product = sbi.compose([one, one], PRIOR)
    with pytest.raises(ValueError, match="batch_size must be at most the 2 observations, got 3"):
        sbi.Damped(product, batch_size=3)
    with pytest.raises(ValueError, match=r"last must lie in \(0, 1\], got 0.0"):
        sbi.Damped(product, last=0.0)
