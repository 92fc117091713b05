"""One network for every conditional, on laws in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior import nn
from scoreprior.gaussian import Moments
from scoreprior.nn.embed import zeroed
from scoreprior.sbi import JointNPSE, JointPosterior, Parameters, Standardise
from scoreprior.sbi.joint import DrawMask, JointDenoiser, Masked
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


def ranged():
    """`joint`, with the range of `z` in training too."""
    range_z = Standardise(jnp.zeros(2), jnp.ones(2), jnp.full(2, -3.0), jnp.full(2, 3.0))
    return eqx.tree_at(lambda law: law.range_z, joint(), range_z, is_leaf=lambda leaf: leaf is None)


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        ({"x": VALUE[2:].at[0].set(1e3)}, "x lies outside the range .* in 1 of 3 features"),
        ({"x": jnp.array([jnp.nan, -1e3, 1e3])}, "x lies outside the range .* in 2 of 2 features"),
        ({"theta": LOC + 4 * SD}, "theta lies outside the range .* in 2 of 2 features"),
        ({"theta": jnp.array([jnp.nan, 1.0])}, "theta lies outside the range .* in 1 of 1 feat"),
        ({"theta": VALUE[:2].at[0].set(-9.0), "x": VALUE[2:].at[1].set(jnp.nan)}, "theta .* 1 of"),
    ],
)
def test_what_lies_outside_training_is_warned_of_once(observed, message):
    for act in (ranged().context, ranged().condition, lambda o: ranged().sample(KEY, o, 2)):
        with pytest.warns(UserWarning, match=message) as caught:
            act(observed)
        assert len(caught) == 1


def test_what_lies_inside_training_is_not_warned_of():
    """Warnings are errors here; what is missing has no range."""
    for observed in ({}, {"x": VALUE[2:].at[0].set(jnp.nan)}, {"theta": VALUE[:2]}):
        ranged().context(observed)
    joint().context({"theta": LOC + 4 * SD})  # without a range of z there is nothing to compare


@pytest.mark.parametrize("infinite", [jnp.inf, -jnp.inf])
def test_infinite_values_are_refused(as_user, infinite):
    message = " must be finite, or NaN where it is missing, got 1 of "
    with pytest.raises(ValueError, match=f"^x{message}3 values infinite"):
        joint().condition({"x": jnp.array([jnp.nan, infinite, 0.0])})
    with pytest.raises(ValueError, match=f"^theta{message}2 values infinite"):
        joint().sample(KEY, {"theta": VALUE[:2].at[1].set(infinite)}, 5)


def apart():
    numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("mean", dist.Normal(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:Out-of-support values")
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_parameters_outside_the_prior_are_refused(as_user, scale):
    law = eqx.tree_at(lambda law: law.parameters, joint(), Parameters.of(apart))
    with pytest.raises(ValueError, match=f"scale must lie inside the support .*, got {scale}, wi"):
        law.context({"scale": scale})
