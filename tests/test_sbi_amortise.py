"""Amortised posteriors: closed-form networks give closed-form ones, trained networks come near."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats

from scoreprior import nn
from scoreprior.denoise import AbstractDenoiser
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.nn.embed import zeroed
from scoreprior.prior import ScorePrior
from scoreprior.sbi import NPSE, Parameters, Posterior, SetEncoder, Standardise, compose, law_of
from scoreprior.sbi.embed import DrawItems
from scoreprior.sbi.posterior import push
from scoreprior.smc import FeynmanKac
from stats import assert_cov, assert_mean, assert_proportion

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(7)

# theta ~ N(loc, diag(sd^2)), x = A theta + N(0, noise^2 I); z = (theta - loc) / sd.
LOC, SD, NOISE = jnp.array([1.0, -2.0]), jnp.array([2.0, 0.5]), 0.3
A = jnp.array([[1.0, 0.5], [0.0, 1.0], [0.7, -1.0]])
PRIOR = dist.Normal(LOC, SD).to_event(1)
X_O = jnp.array([0.5, -2.2, 3.0])


def exact(x, noise=NOISE):
    """Mean and covariance of `theta` given `x`."""
    covariance = jnp.linalg.inv(jnp.diag(1 / SD**2) + A.T @ A / noise**2)
    return covariance @ (LOC / SD**2 + A.T @ x / noise**2), covariance


class LinearGaussian(AbstractDenoiser):
    """The exact denoiser of `z` given `x`."""

    noise: float

    def __call__(self, x, sigma, context=None):
        mean, covariance = exact(context.x, self.noise)
        scaled = covariance / jnp.outer(SD, SD)
        return Moments.dense((mean - LOC) / SD, scaled).denoise(x, sigma)


STANDARDISE = Standardise(jnp.zeros(3), jnp.ones(3), jnp.full(3, -20.0), jnp.full(3, 20.0))


def posterior(noise=NOISE, sigma_min=1e-4):
    moments = Moments(jnp.zeros(2), jnp.ones(2))
    denoiser = LinearGaussian(noise)
    return Posterior(Parameters.of(PRIOR), denoiser, STANDARDISE, moments, sigma_min, 10.0)


def check_exact(posterior):
    mean, covariance = exact(X_O)
    draws = posterior.sample(KEY, X_O, 45_000)
    assert_mean(draws, mean)
    assert_cov(draws, covariance)
    law = dist.MultivariateNormal(mean, covariance)
    some = law.sample(KEY, (20,))
    np.testing.assert_allclose(posterior.log_prob(some, X_O), law.log_prob(some), atol=0.01)


def test_an_exact_denoiser_gives_the_exact_posterior():
    check_exact(posterior())


def test_a_wrong_denoiser_is_seen():
    with pytest.raises(AssertionError, match="covariance"):
        check_exact(posterior(noise=1.05 * NOISE))


def test_moments_of_the_posterior_make_few_steps_enough():
    """Same solver, whitened by the prior's moments and by the posterior's own."""
    amortised = posterior()
    own = amortised.condition(X_O)
    flow = own.flow
    levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max, "solver": flow.solver}
    plain = ScorePrior(Flow(flow.denoiser, amortised.moments, **levels))
    mean, covariance = exact(X_O)
    scaled = covariance / jnp.outer(SD, SD)
    law = dist.MultivariateNormal((mean - LOC) / SD, scaled)
    z = law.sample(KEY, (200,))
    errors = [float(jnp.abs(p.log_prob(z) - law.log_prob(z)).max()) for p in (plain, own)]
    assert errors[1] < 0.01
    assert errors[0] > 5 * errors[1]


def test_moments_of_many_posteriors_at_once_have_no_error_of_sampling():
    """Eight draws each, of posteriors up to sixty standard deviations off the prior's centre."""
    x = X_O + jnp.asarray([[0.0, 0.0, 0.0], [1.0, -0.5, 2.0], [-6.0, 3.0, -4.0]])
    laws = posterior().condition_all(x, num_pilot=8)
    for one, law in zip(x, laws, strict=True):
        mean, covariance = exact(one)
        sd = jnp.sqrt(jnp.diag(covariance)) / SD
        found = law.flow.moments
        np.testing.assert_allclose((found.mean - (mean - LOC) / SD) / sd, 0, atol=1e-3)
        expected = covariance / jnp.outer(SD, SD)
        np.testing.assert_allclose(found.covariance(), expected, atol=2e-3 * expected.max())
    alone = posterior().condition(x[1])
    z = alone.sample(KEY, (5,))
    np.testing.assert_allclose(laws[1].log_prob(z), alone.log_prob(z), atol=1e-3)


def test_many_observations_are_checked_together():
    with pytest.raises(ValueError, match="x_o must hold at least one observation, got shape"):
        posterior().condition_all(jnp.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"x_o must have shape \(3,\), got \(2,\)"):
        posterior().condition_all(jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="x_o must be finite, got 1 of 6 values"):
        posterior().condition_all(jnp.zeros((2, 3)).at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="num_pilot must be"):
        posterior().condition_all(jnp.zeros((2, 3)), num_pilot=1)
    with pytest.warns(UserWarning, match="in 2 of 6 features"):
        posterior().condition_all(jnp.asarray([X_O, X_O.at[:2].set(jnp.array([21.0, -21.0]))]))


def test_the_posterior_is_a_prior_of_any_model():
    """`z` under the posterior at one observation, then a second one as a likelihood."""
    law = posterior().condition(X_O)
    assert isinstance(law, ScorePrior)

    def model():
        z = numpyro.sample("z", law)
        numpyro.sample("y", dist.Normal(z[0], 1.0), obs=0.3)

    log_density = numpyro.infer.util.log_density(model, (), {}, {"z": jnp.array([0.1, 0.2])})[0]
    assert jnp.isfinite(log_density)


def gamma_model():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("mean", dist.Normal(0.0, scale))


def test_a_density_of_parameters_counts_the_jacobian():
    """With the denoiser of the prior itself, the posterior is the prior in every coordinate."""
    parameters = Parameters.of(gamma_model)

    class Prior(AbstractDenoiser):
        def __call__(self, x, sigma, context=None):
            return parameters.law(x, sigma)

    moments = Moments(jnp.zeros(2), jnp.ones(2))
    same = Posterior(parameters, Prior(), STANDARDISE, moments, 1e-4, 10.0)
    theta = same.sample(KEY, X_O, 50)
    expected = jax.vmap(lambda t: numpyro.infer.util.log_density(gamma_model, (), {}, t)[0])(theta)
    np.testing.assert_allclose(same.log_prob(theta, X_O), expected, atol=0.02)
    assert (
        jnp.max(
            jnp.abs(expected - jax.vmap(parameters.log_prob)(jax.vmap(parameters.to_vector)(theta)))
        )
        > 0.1
    )


# The regression under the network.


def simulations(num, key=KEY):
    draw, noise = jax.random.split(key)
    theta = LOC[None] + SD[None] * jax.random.normal(draw, (num, 2))
    return theta, theta @ A.T + NOISE * jax.random.normal(noise, (num, 3))


def test_the_untrained_network_knows_a_linear_gaussian_model():
    """Its regression is the posterior, up to the error of 20,000 simulations."""
    amortised = NPSE(PRIOR, simulations(20_000), width=8, num_blocks=1).fit(
        key=KEY, num_steps=1, surrogate=None, progress=False
    )
    mean, covariance = exact(X_O)
    draws = amortised.sample(KEY, X_O, 20_000)
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((draws.mean(0) - mean) / sd, 0, atol=0.05)
    np.testing.assert_allclose(
        np.cov(draws.T) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.05
    )


def test_a_network_that_held_out_data_do_not_ask_for_is_left_out():
    """A linear Gaussian model leaves it nothing to learn; a square in place of a line does."""
    theta, x = simulations(2000)

    def last(x, **settings):
        npse = NPSE(PRIOR, (theta, x), width=16, num_blocks=1)
        settings |= {"surrogate": None, "progress": False}
        found = npse.fit(key=KEY, num_steps=300, peak=5e-3, **settings)
        return float(jnp.abs(found.denoiser.net.mlp.last.weight).max())

    square = x.at[:, 0].set(((x[:, 0] - 1) / 2) ** 2)
    assert last(x) == 0
    assert last(square) > 0
    assert last(square, least_gain=jnp.inf) == 0


BOUND, SLOPE, WIDTH = 2.0, 0.8, 0.9


def in_a_box(num, key=KEY):
    """Uniform parameters, and each seen by `N(SLOPE theta + 0.1, WIDTH^2)`."""
    draw, noise = jax.random.split(key)
    theta = BOUND * jax.random.uniform(draw, (num, 2), minval=-1)
    return theta, SLOPE * theta + 0.1 + WIDTH * jax.random.normal(noise, (num, 2))


@pytest.mark.parametrize("x_o", [[0.3, 1.4], [-2.5, 2.0]])
def test_the_untrained_network_knows_the_edges_of_a_uniform_prior(x_o):
    """Truncated normal posteriors, up to the error of the regression; no Gaussian is near."""
    prior = dist.Uniform(-BOUND, jnp.full(2, BOUND)).to_event(1)
    amortised = NPSE(prior, in_a_box(20_000), width=8, num_blocks=1, drop=0.1).fit(
        key=KEY, num_steps=1, surrogate=None, progress=False
    )
    x_o = jnp.asarray(x_o)
    draws = amortised.sample(KEY, x_o, 20_000)
    assert (jnp.abs(draws) <= BOUND).all()
    loc, scale = (x_o - 0.1) / SLOPE, WIDTH / SLOPE
    ends = (-BOUND - loc) / scale, (BOUND - loc) / scale
    truth = scipy.stats.truncnorm(*map(np.asarray, ends), np.asarray(loc), scale)
    for power in (1, 2, 3):
        moment = np.array([truth.moment(power)]).ravel()
        spread = np.sqrt(truth.moment(2 * power) - moment**2)
        np.testing.assert_allclose(((draws**power).mean(0) - moment) / spread, 0, atol=0.05)
    some = jnp.asarray(truth.rvs((100, 2), random_state=0))
    error = amortised.log_prob(some, x_o) - truth.logpdf(some).sum(1)
    assert jnp.sqrt(jnp.mean(error**2)) < 0.1
    gaussian = dist.Normal(truth.mean(), truth.std()).to_event(1)
    error = gaussian.log_prob(some) - truth.logpdf(some).sum(1)
    assert jnp.sqrt(jnp.mean(error**2)) > 0.2
    unseen = amortised.prior()
    np.testing.assert_allclose(unseen.flow.moments.eigenvalues, 1, atol=0.2)


# Sets.


def encoder(size=5):
    return SetEncoder((2,), size, width=8, depth=1, key=KEY)


def test_a_set_has_no_order_and_padding_does_not_count():
    encode, x = encoder(), jax.random.normal(KEY, (6, 2))
    mask = jnp.arange(6) < 4
    first = encode(x, mask)
    order = jnp.array([2, 0, 3, 1, 4, 5])
    np.testing.assert_allclose(encode(x[order], mask), first, rtol=1e-12)
    np.testing.assert_allclose(encode(x.at[4:].set(jnp.nan), mask), first, rtol=1e-12)
    np.testing.assert_allclose(encode(x[:4], mask[:4]), first, rtol=1e-12)
    gradient = jax.grad(lambda x: encode(x, mask).sum())(x.at[4:].set(jnp.nan))
    assert jnp.isfinite(gradient).all()
    assert (gradient[4:] == 0).all()


def test_a_set_knows_its_items_and_their_number():
    encode, x = encoder(), jnp.ones((6, 2))
    all_of_them = encode(x, jnp.ones(6, bool))
    assert jnp.max(jnp.abs(encode(x, jnp.arange(6) < 3) - all_of_them)) > 1e-3
    assert jnp.max(jnp.abs(encode(x.at[2].set(0.0), jnp.ones(6, bool)) - all_of_them)) > 1e-3


def test_training_draws_every_number_of_items_and_every_item_alike():
    num = 12_000
    masks = jax.vmap(lambda key: DrawItems()(key, jnp.ones(4, bool)))(jax.random.split(KEY, num))
    counts = np.bincount(np.asarray(masks.sum(1)), minlength=5)
    assert counts[0] == 0
    assert_proportion(counts[1:], num, np.full(4, 0.25))
    assert_proportion(np.asarray(masks.sum(0)), num, np.full(4, 0.625))


@pytest.fixture(scope="module")
def of_sets():
    """`theta ~ N(0, 1)`, items `N(theta, 1)`: from 1 to 8 of them, or none."""
    num, items = 4000, 8
    draw, noise = jax.random.split(KEY)
    theta = jax.random.normal(draw, (num,))
    x = theta[:, None, None] + jax.random.normal(noise, (num, items, 1))
    encode = SetEncoder((1,), 8, width=16, depth=1, key=KEY)
    settings = {"embedding": encode, "drop": 0.2, "width": 32, "num_blocks": 1, "dropout": 0.0}
    npse = NPSE(dist.Normal(0.0, 1.0), (theta, x), **settings)
    return npse.fit(key=KEY, num_steps=800, batch_size=128, peak=5e-3, progress=False)


def errors_of_sets(amortised):
    """Of `N(sum x / (n + 1), 1 / (n + 1))`, and of the prior `N(0, 1)`: means and deviations."""
    laws = [(0.0, 1.0, amortised.prior().sample(KEY, (4000,)))]
    for n in (1, 3, 8):
        x = 0.8 + 0.5 * jnp.linspace(-1, 1, n)[:, None] if n > 1 else jnp.array([[0.8]])
        laws.append((0.8 * n / (n + 1), (n + 1) ** -0.5, amortised.sample(KEY, x, 4000)))
    errors = [(abs(z.mean() - mean) / sd, abs(z.std() / sd - 1)) for mean, sd, z in laws]
    return float(np.max(errors))


def test_one_network_serves_sets_of_every_size_and_knows_the_prior(of_sets):
    """The network silenced says the prior of every set."""
    silent = eqx.tree_at(lambda p: p.denoiser.net.mlp.last, of_sets, replace_fn=zeroed)
    assert errors_of_sets(of_sets) < 0.2
    assert errors_of_sets(silent) > 0.5


@pytest.mark.parametrize("num", [1, 1025])
def test_draws_in_groups_are_those_made_side_by_side(num):
    flow = posterior().condition(X_O).flow
    noise = jax.random.normal(KEY, (num, 2))
    np.testing.assert_allclose(push(flow, noise), jax.vmap(flow.to_data)(noise), rtol=1e-9)


def product_of_sets(amortised):
    """Error of the composition of two sets of four and the learned prior: mean and deviation."""
    x = 0.8 + 0.5 * jnp.linspace(-1, 1, 8)[:, None]
    product = compose([amortised.condition(x[:4]), amortised.condition(x[4:])], amortised.prior())
    engine = FeynmanKac(None, num_particles=1000, num_groups=2, num_steps=60)
    tree = infer(lambda: numpyro.sample("z", product), engine, key=KEY, progress=False)
    z = np.asarray(tree.posterior["z"])
    return max(abs(z.mean() - 0.8 * 8 / 9) * 3, abs(3 * z.std() - 1))


@pytest.mark.usefixtures("as_user")
def test_posteriors_of_sets_compose_with_the_prior_that_was_learnt(of_sets):
    """Silenced, each set says the prior, and so does their product."""
    silent = eqx.tree_at(lambda p: p.denoiser.net.mlp.last, of_sets, replace_fn=zeroed)
    assert product_of_sets(of_sets) < 0.25
    assert product_of_sets(silent) > 1


def test_a_law_of_theta_in_place_of_that_of_z_is_warned_of():
    theta = PRIOR.sample(KEY, (400,))
    x = theta @ A.T + NOISE * jax.random.normal(KEY, (400, 3))
    amortised = NPSE(PRIOR, (theta, x), width=8, num_blocks=1).fit(
        key=KEY, num_steps=1, surrogate=None, progress=False
    )
    laws = [amortised.condition(A @ LOC + shift) for shift in (0.0, 0.1)]
    compose(laws, amortised.parameters.law)
    with pytest.warns(UserWarning, match=r"got \[ 1. -2.\] \+- .* divides by another prior"):
        compose(laws, law_of(PRIOR))


# Bad input.


def test_an_observation_outside_training_is_warned_of():
    with pytest.warns(UserWarning, match="outside the range .* in 2 of 3 features"):
        posterior().condition(X_O.at[:2].set(jnp.array([21.0, -21.0])))


@pytest.mark.parametrize(
    ("x_o", "message"),
    [
        (jnp.zeros(2), r"x_o must have shape \(3,\), got \(2,\)"),
        (X_O.at[0].set(jnp.nan), "x_o must be finite, got 1 of 3"),
    ],
)
def test_observations_that_are_refused(as_user, x_o, message):
    with pytest.raises(ValueError, match=message):
        posterior().condition(x_o)


@pytest.mark.parametrize(
    ("num", "message"), [(0, "from 1 to 8 items, as in training, got 0"), (9, "got 9")]
)
def test_sets_of_a_size_never_seen_are_refused(as_user, of_sets, num, message):
    with pytest.raises(ValueError, match=message):
        of_sets.condition(jnp.zeros((num, 1)))


def test_a_prior_that_was_not_learned_is_refused():
    with pytest.raises(ValueError, match="drop > 0"):
        posterior().prior()


THETA, X = simulations(20)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (
            (THETA, jnp.full_like(X, jnp.nan)),
            {},
            "must not all hold NaN or infinite values, got 20",
        ),
        ((THETA[:5], X), {}, r"as many simulations, got \(5, 2\) and \(20, 3\)"),
        ((THETA[:0], X[:0]), {}, r"at least one x, \[n, \*x\], got shape \(0, 3\)"),
        ((THETA[:, :1], X), {}, r"theta must have shape \(2,\)"),
        ((THETA.at[3].set(jnp.inf), X), {}, "inside the support of the prior, got 1 of 20"),
        ((THETA, X), {"drop": 1.0}, r"drop must lie in \[0, 1\), got 1"),
        ((THETA, X), {"sigma_min": 0.0}, "sigma_min must be a positive finite number"),
        ((THETA, X), {"embedding": lambda x: x[None]}, "embedding must give a vector"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(as_user, data, settings, message):
    with pytest.raises(ValueError, match=message):
        NPSE(PRIOR, data, **settings).fit(key=KEY, num_steps=2, progress=False)


def test_failed_simulations_are_counted_and_left_out():
    with pytest.warns(UserWarning, match="2 of 20 simulations"):
        npse = NPSE(PRIOR, (THETA, X.at[:2, 0].set(jnp.nan)))
    np.testing.assert_array_equal(npse.x, X[2:])
    np.testing.assert_allclose(npse.z, (THETA[2:] - LOC) / SD)


def test_a_constant_feature_is_kept_and_told_apart():
    x = jnp.concatenate([X, jnp.full((20, 1), 0.1)], 1)
    standardise = Standardise.fit(x)
    values = jax.vmap(standardise)(x)
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(values.std(0), [1, 1, 1, 0], atol=1e-12)
    assert list(standardise.outside(x[0].at[3].set(0.2))) == [False, False, False, True]


def test_networks_may_join_their_context_to_the_event():
    joined = nn.ResidualMLP(
        (2,), width=4, num_blocks=1, context_size=3, joins_context=True, key=KEY
    )
    again = nn.from_config(joined.config(), key=KEY)
    assert eqx.tree_equal(joined, again)
    assert joined.first.weight.shape == (4, 5)
