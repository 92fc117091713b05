"""One network for every conditional, and sequential rounds, on laws in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior import nn
from scoreprior.denoise import Gaussian
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.nn.embed import zeroed
from scoreprior.prior import ScorePrior
from scoreprior.sbi import TSNPSE, JointNPSE, JointPosterior, Parameters, Standardise
from scoreprior.sbi.joint import DrawMask, JointDenoiser, Masked
from scoreprior.sbi.sequential import Region, distance, draw_truncated
from stats import assert_cov, assert_mean, assert_proportion

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(11)

# theta ~ N(loc, diag(sd^2)), x = A theta + N(0, noise^2 I), standardised as c = (x - shift) / 2.
LOC, SD, NOISE = jnp.array([1.0, -2.0]), jnp.array([2.0, 0.5]), 0.3
A = jnp.array([[1.0, 0.5], [0.0, 1.0], [0.7, -1.0]])
PRIOR = dist.Normal(LOC, SD).to_event(1)
SHIFT = A @ LOC + 1
MEAN = jnp.concatenate([LOC, A @ LOC])
ROOT = jnp.concatenate([jnp.diag(SD), A * SD[None]], 0)
COVARIANCE = ROOT @ ROOT.T + jnp.diag(jnp.array([0, 0, 1, 1, 1]) * NOISE**2)
VALUE = jnp.array([0.4, -1.7, 0.5, -2.2, 3.0])
PATTERNS = {
    "joint": [0, 0, 0, 0, 0],
    "posterior": [0, 0, 1, 1, 1],
    "likelihood": [1, 1, 0, 0, 0],
    "missing": [0, 0, 1, 0, 1],
    "some": [1, 0, 0, 1, 0],
}


def joint(covariance=COVARIANCE):
    """The untrained network on the true moments: the exact law of all conditionals."""
    to_units = jnp.concatenate([SD, jnp.full(3, 2.0)])
    mean = jnp.concatenate([jnp.zeros(2), (A @ LOC - SHIFT) / 2])
    moments = Moments.dense(mean, covariance / jnp.outer(to_units, to_units))
    net = nn.ResidualMLP((5,), width=4, num_blocks=1, context_size=5, joins_context=True, key=KEY)
    denoiser = JointDenoiser(net, moments.mean, moments.covariance(), (1e-4, 20.0))
    standardise = Standardise(SHIFT, jnp.full(3, 2.0), jnp.full(3, -9.0), jnp.full(3, 9.0))
    return JointPosterior(Parameters.of(PRIOR), denoiser, standardise, moments, 1e-4, 20.0)


def conditional(observed):
    """Mean and covariance of what is not observed."""
    given, left = np.flatnonzero(observed), np.flatnonzero(~observed)
    gain = COVARIANCE[np.ix_(left, given)] @ jnp.linalg.inv(COVARIANCE[np.ix_(given, given)])
    mean = MEAN[left] + gain @ (VALUE - MEAN)[given]
    return mean, COVARIANCE[np.ix_(left, left)] - gain @ COVARIANCE[np.ix_(given, left)]


def check_conditional(law, pattern):
    observed = np.array(pattern, bool)
    value = jnp.where(observed, VALUE, jnp.nan)
    draws = law.sample(KEY, {"theta": value[:2], "x": value[2:]}, 20_000)
    full = jnp.concatenate([draws["theta"], draws["x"]], 1)
    np.testing.assert_allclose(full[:, observed], jnp.tile(VALUE[observed], (20_000, 1)), rtol=1e-9)
    mean, covariance = conditional(observed)
    assert_mean(full[:, ~observed], mean, bias=0.1)
    assert_cov(full[:, ~observed], covariance, bias=0.1)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_every_conditional_of_a_gaussian_is_exact(pattern):
    check_conditional(joint(), pattern)


def test_a_wrong_joint_law_is_seen():
    wrong = COVARIANCE + jnp.diag(jnp.array([0, 0, 1, 1, 1]) * NOISE**2 * 0.4)
    with pytest.raises(AssertionError, match="covariance"):
        check_conditional(joint(wrong), PATTERNS["posterior"])


def test_a_conditional_has_a_density():
    law = joint()
    context = law.context({"x": VALUE[2:]})
    assert list(context.observed) == [False, False, True, True, True]
    mean, covariance = conditional(np.array(PATTERNS["posterior"], bool))
    exact = dist.MultivariateNormal((mean - LOC) / SD, covariance / jnp.outer(SD, SD))
    z = exact.sample(KEY, (20,))
    np.testing.assert_allclose(
        law.condition({"x": VALUE[2:]}).log_prob(z), exact.log_prob(z), atol=0.01
    )


def test_observed_entries_pass_through_and_nothing_else_depends_on_their_noise():
    law, x = joint(), jax.random.normal(KEY, (5,))
    context = Masked(jnp.arange(5.0), jnp.array([False, True, False, True, True]))
    out = law.denoiser(x, 0.7, context)
    np.testing.assert_array_equal(out[context.observed], context.value[context.observed])
    moved = law.denoiser(jnp.where(context.observed, x + 5, x), 0.7, context)
    np.testing.assert_array_equal(moved, out)


def test_masks_are_of_five_kinds_and_never_full():
    """Of 2 parameters and 1 datum; the first kind takes in what would be full."""
    num = 20_000
    keys = jax.random.split(KEY, num)
    masks = jax.vmap(lambda key: DrawMask(2)(key, jnp.zeros(3)).observed)(keys)
    codes = np.asarray(masks @ jnp.array([4, 2, 1]))
    bits = np.array([bin(code).count("1") for code in range(8)])
    expected = sum(p**bits * (1 - p) ** (3 - bits) for p in (0.3, 0.7)) / 5
    expected[0] += 0.2 + expected[7]
    expected[7] = 0
    expected[0b001] += 0.2
    expected[0b110] += 0.2
    counts = np.bincount(codes, minlength=8)
    assert counts[7] == 0
    assert_proportion(counts[:7], num, expected[:7])


def banana(num, key):
    """`theta ~ N(0, 1)`, `x = theta^2 + N(0, 0.3^2)`: two modes, which no Gaussian has."""
    draw, noise = jax.random.split(key)
    theta = jax.random.normal(draw, (num,))
    return theta, (theta**2 + 0.3 * jax.random.normal(noise, (num,)))[:, None]


def test_training_learns_what_no_gaussian_has():
    """Posterior at `x = 2`: modes at `+-1.4`, against quadrature; the likelihood at `theta = 1`."""
    npse = JointNPSE(dist.Normal(0.0, 1.0), banana(4000, KEY), width=32, num_blocks=2, dropout=0.0)
    settings = {"key": KEY, "batch_size": 128, "peak": 5e-3, "progress": False}
    grid = jnp.linspace(-4, 4, 2001)
    weight = jnp.exp(-(grid**2) / 2 - (2.0 - grid**2) ** 2 / (2 * 0.3**2))
    size = jnp.sum(jnp.abs(grid) * weight) / jnp.sum(weight)

    def errors(law):
        theta = law.sample(KEY, {"x": jnp.array([2.0])}, 2000)["theta"]
        x = law.sample(KEY, {"theta": jnp.array(1.0)}, 2000)["x"]
        off = [jnp.abs(theta).mean() - size, (theta > 0).mean() - 0.5, x.mean() - 1]
        return float(jnp.max(jnp.abs(jnp.array(off))))

    law = npse.fit(num_steps=500, **settings)
    silent = eqx.tree_at(lambda law: law.denoiser.net.last, law, replace_fn=zeroed)
    assert errors(law) < 0.15
    assert errors(silent) > 0.4


def scaled():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("mean", dist.Normal(0.0, scale))


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        ({"y": 1.0}, r"keys among \['theta', 'x'\], got \['y'\]"),
        ({"x": jnp.zeros(2)}, r"x must have shape \(3,\), got \(2,\)"),
        ({"theta": jnp.zeros(3)}, r"theta must have shape \(2,\), got \(3,\)"),
        ({"x": VALUE[2:], "theta": VALUE[:2]}, "must leave an entry"),
    ],
)
def test_what_cannot_be_conditioned_on_is_refused(as_user, observed, message):
    with pytest.raises(ValueError, match=message):
        joint().condition(observed)


def test_a_site_that_depends_on_an_unknown_one_is_refused():
    law = JointPosterior(
        Parameters.of(scaled),
        *(
            getattr(joint(), n)
            for n in ("denoiser", "standardise", "moments", "sigma_min", "sigma_max")
        ),
    )
    with pytest.raises(ValueError, match="coordinates of their own"):
        law.condition({"mean": 0.3})
    assert law.context({"scale": 0.3}).observed.sum() == 1


# Sequential rounds.


def gaussian(sd, mean=(0.3, -0.2)):
    law = Moments(jnp.array(mean), jnp.asarray(sd) ** 2)
    return ScorePrior(Flow(Gaussian(law), law, sigma_min=1e-5, sigma_max=10.0))


def test_a_truncated_prior_is_the_prior_on_the_region():
    """`log q >= threshold` is an ellipse, of which the share of prior draws is counted by hand."""
    parameters = Parameters.of(dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    sd = jnp.array([0.4, 0.2])
    region = Region.of(gaussian(sd), KEY, 0.05)
    radius = -2 * (region.threshold - gaussian(sd).log_prob(jnp.array([0.3, -0.2])))
    np.testing.assert_allclose(radius, -2 * np.log(0.05), rtol=0.1)  # 95 % of a chi^2 of 2
    theta, acceptance = draw_truncated(parameters, region, KEY, 3000)
    squared = jnp.sum(((theta - jnp.array([[0.3, -0.2]])) / sd[None]) ** 2, 1)
    assert jnp.max(squared) <= radius * (1 + 1e-6)
    free = jax.random.normal(jax.random.key(1), (400_000, 2))
    inside = jnp.sum(((free - jnp.array([[0.3, -0.2]])) / sd[None]) ** 2, 1) <= radius
    share = float(inside.mean())
    assert abs(acceptance - share) < 5 * np.sqrt(share / (3000 / share)) + 1e-3
    assert_mean(theta, np.asarray(free[inside].mean(0)), bias=0.2)
    assert region(free[:1000]).tolist() == inside[:1000].tolist()


def test_distance_is_zero_for_one_law_and_the_shift_for_two():
    one, other = gaussian([0.4, 0.4]), gaussian([0.4, 0.4], (0.5, -0.2))
    assert distance(one, one, KEY) == 0
    np.testing.assert_allclose(distance(one, other, KEY), 0.5 / np.sqrt(2), rtol=0.15)


def simulate(key, theta):
    return theta + 0.05 * jax.random.normal(key, (1,))


def test_rounds_narrow_the_prior_and_stop_when_nothing_changes():
    """The posterior has sd 0.05, so a region of all its mass holds few prior draws."""
    prior = dist.Normal(jnp.zeros(1), 1.0).to_event(1)
    training = {"num_steps": 60, "batch_size": 64, "progress": False}
    settings = {"width": 8, "num_blocks": 1}
    run = TSNPSE(prior, simulate, 300, 5, tolerance=0.5, settings=settings, training=training)
    result = run.fit(jnp.array([0.7]), key=KEY)
    first, *later = result.rounds
    assert first.acceptance == 1
    assert np.isnan(first.change)
    assert 1 < len(result.rounds) < 5
    assert all(0.05 < r.acceptance < 0.25 for r in later)
    assert later[-1].change <= 0.5
    assert [r.num_simulations for r in later] == [300 * (i + 2) for i in range(len(later))]
    draws = result.posterior.sample(KEY, jnp.array([0.7]), 2000)
    assert abs(draws.mean() - 0.7) < 0.02
    assert abs(draws.std() - 0.05) < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_simulations": 2}, "num_simulations must be at least 4, got 2"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"quantile": 0.0}, r"quantile must lie in \(0, 1\), got 0"),
        ({"tolerance": -1.0}, "tolerance must be a positive finite number"),
    ],
)
def test_rounds_that_are_refused(as_user, change, message):
    with pytest.raises(ValueError, match=message):
        TSNPSE(PRIOR, simulate, **({"num_simulations": 10, "num_rounds": 2} | change))
