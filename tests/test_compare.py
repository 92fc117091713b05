"""Bayes factors against closed forms: two priors, two noise levels, two operators."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
from scoreprior.compare import Clusters, _moments, compare, log_bayes_factor
from scoreprior.denoise import Gaussian
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.smc import RandomWalkMoves, TemperedSMC
from stats import GATE, assert_mean, require_power
from two_priors import build

Y = jnp.array([1.3, 0.2])
PRIORS = {
    "round": Gaussian(Moments(jnp.zeros(2), jnp.ones(2))),
    "long": Gaussian(Moments.dense(jnp.array([0.5, 0.0]), jnp.array([[2.0, 0.9], [0.9, 0.6]]))),
}
OPERATORS = {"mean": jnp.array([[0.5, 0.5], [1.0, 0.0]]), "difference": jnp.eye(2) * 0.8}
# Prior, noise and operator.
BASE = ("round", 0.4, "mean")
OTHERS = {
    "prior": ("long", 0.4, "mean"),
    "noise": ("round", 1.0, "mean"),
    "operator": ("round", 0.4, "difference"),
}


def model(prior, A, sd, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(A @ x, sd).to_event(1), obs=y)


def tree_of(prior, sd, operator):
    engine = TemperedSMC(300, 32, kernel=RandomWalkMoves())
    args = build(PRIORS[prior], 1), OPERATORS[operator], sd, Y
    return infer(model, engine, *args, key=jax.random.key(len(prior + operator)), progress=False)


def truth_of(prior, sd, operator):
    law = oracles.at_level(PRIORS[prior], 0.1)
    return float(law.log_evidence(OPERATORS[operator], Y, sd**2 * jnp.eye(2)))


@pytest.mark.slow
@pytest.mark.promotes_ranks
def test_priors_noise_levels_and_operators():
    base = tree_of(*BASE)
    for kind, other in OTHERS.items():
        found = log_bayes_factor(base, tree_of(*other))
        truth = truth_of(*BASE) - truth_of(*other)
        assert abs(found.value - truth) <= GATE * found.se, kind
        # The factors are some tenths of a nat to several nats: the wrong sign would be seen.
        require_power(found.se, 2 * abs(truth), bias=1.0)


def tree(y=(1.0, 2.0), **stats):
    """What `infer` returns, as far as it matters here."""
    groups = {
        "posterior": {"x": np.zeros((1, 3))},
        "sample_stats": {"lp": np.zeros((1, 3))},
        "observed_data": {"y": np.asarray(y)},
    }
    made = az.from_dict(groups, attrs={"/": {"engine": "NUTS(num_warmup=5)"}})
    made["sample_stats"].dataset = made["sample_stats"].to_dataset().assign(stats)
    return made


def test_errors_add_in_squares():
    first = tree(log_evidence=-3.0, log_evidence_se=0.3)
    found = log_bayes_factor(first, tree(log_evidence=-5.5, log_evidence_se=0.4))
    assert found == pytest.approx((2.5, 0.5))


def test_a_tree_without_evidence_is_refused():
    good = tree(log_evidence=-3.0, log_evidence_se=0.3)
    with pytest.raises(ValueError, match="second must have log_evidence .* NUTS gives none"):
        log_bayes_factor(good, tree())
    partial = tree(log_evidence=np.nan, log_evidence_se=np.nan)
    with pytest.raises(ValueError, match="the log_evidence of first is NaN: its run stopped"):
        log_bayes_factor(partial, good)


def test_different_data_are_refused():
    evidence = {"log_evidence": -3.0, "log_evidence_se": 0.3}
    with pytest.raises(ValueError, match="observed site 'y' differs"):
        log_bayes_factor(tree(**evidence), tree((1.0, 2.1), **evidence))
    with pytest.raises(ValueError, match="observed site 'y' differs"):
        log_bayes_factor(tree(**evidence), tree((1.0, 2.0, 3.0), **evidence))
    other = tree(**evidence)
    del other["observed_data"]
    with pytest.raises(ValueError, match=r"same observed sites, got \['y'\] and \[\]"):
        log_bayes_factor(tree(**evidence), other)


NAMES = ["a", "same", "moved", "wide"]


def runs(*laws, num_draws=500, **attrs):
    """A tree for every (shift, scale) of iid standard normal draws of `x` [400]."""
    rng = np.random.default_rng(0)
    for shift, scale in laws:
        x = shift + scale * rng.standard_normal((4, num_draws, 400))
        groups = {
            "posterior": {"x": x},
            "sample_stats": {"lp": x[..., 0]},
            "observed_data": {"y": np.ones(2)},
        }
        made = {"engine": "NUTS(num_warmup=5)", "sampling_time": 2.0, **attrs}
        yield az.from_dict(groups, attrs={"/": made})


def test_runs_on_one_law_agree_and_others_do_not():
    table = compare(
        *runs((0, 1), (0, 1), (0.15, 1), (0, 1.15)), names=["a", "same", "moved", "wide"]
    )
    assert table.index.tolist() == ["a", "same", "moved", "wide"]
    z = table[["mean_z_rms", "sd_z_rms"]]
    # The mean square of 400 independent z is 1 +- sqrt(2 / 400).
    least, limit = np.sqrt(1 + np.array([-GATE, GATE]) * np.sqrt(2 / 400))
    assert (z.loc["same"] < limit).all()
    assert (z.loc["same"] > least).all()
    assert z.loc["moved", "mean_z_rms"] > limit > z.loc["moved", "sd_z_rms"]
    assert z.loc["wide", "sd_z_rms"] > limit > z.loc["wide", "mean_z_rms"]
    assert table.loc["moved", "mean_shift"] == pytest.approx(0.15, abs=0.15)
    # The sd of a median of 400 ratios, each +- 1 / sqrt(2000): 0.0014.
    assert table.loc["wide", "sd_ratio"] == pytest.approx(1.15, abs=0.007)


def clouds(sizes, spread=0.0, *, labels=True, num_trees=2, seed=1):
    """Trees of particles of `x` [400], standard normal: `sizes` of them for every ancestor.

    A particle is its ancestor, moved so that only `1 - spread^2` of its variance is left. Particles
    are in no order and equal ancestors in two groups are two; `labels=False` forgets them all.
    """
    rng = np.random.default_rng(seed)
    for _ in range(num_trees):
        rows = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        x = rng.standard_normal((len(sizes), 400))[rows]
        x = np.sqrt(1 - spread**2) * x + spread * rng.standard_normal(x.shape)
        x, rows = x.reshape(4, -1, 400), rows.reshape(4, -1)
        stats = {"group_of_draw": rows % 2, "ancestor": rows // 2} if labels else {}
        groups = {"posterior": {"x": x}, "sample_stats": {"lp": x[..., 0], **stats}}
        yield az.from_dict(groups)


# 100 clusters; of one size, and of sizes from 4 to 76, as resampling makes them.
EQUAL, UNEQUAL = np.full(100, 40), np.repeat([4, 22, 40, 58, 76], 20)


@pytest.mark.parametrize("spread", [0.0, 0.9, 1.0], ids=["copies", "moved", "independent"])
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_particles_of_few_ancestors_have_the_error_of_their_clusters(sizes, spread):
    """The variance of a mean is `(1 - spread^2) sum p_c^2 + spread^2 / n`, with shares `p_c`."""
    n, shares = sizes.sum(), sizes / sizes.sum()
    variance = (1 - spread**2) * (shares**2).sum() + spread**2 / n
    found, _ = (_moments(tree, ["x"]) for tree in clouds(sizes, spread))
    assert found.ancestors == pytest.approx(1 / (shares**2).sum())
    # Over 400 independent entries of relative sd sqrt(2 / ancestors): a bias of 0.07 is seen.
    assert_mean(found.mean_se[:, None] ** 2 / variance, 1.0, bias=0.36)
    assert np.median(found.ess) == pytest.approx(1 / variance, rel=0.1)
    # Those of draws that are taken to be independent are too small, by a known factor.
    forgetful, _ = (_moments(tree, ["x"]) for tree in clouds(sizes, spread, labels=False))
    assert np.median(forgetful.mean_se**2) == pytest.approx(1 / n, rel=0.1)


def test_errors_of_clusters_by_hand():
    """Copies count once, unrelated draws as ever; equal labels of two groups are two."""
    x = np.array([[0.0], [2.0], [2.0], [0.0]])
    np.testing.assert_allclose(Clusters.of(np.array([0, 1, 1, 0])).mean_se(x), np.sqrt(2 / 2))
    alone = Clusters.of(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(alone.mean_se(x), x.std(ddof=1) / 2)
    assert alone.effective == 4


@pytest.mark.parametrize("spread", [0.0, 0.9], ids=["copies", "moved"])
def test_runs_of_few_ancestors_agree_as_often_as_they_should(spread):
    """With 100 clusters, `z` is nearly normal; the standard error of its mean square is 0.07."""
    sizes = UNEQUAL
    row = compare(*clouds(sizes, spread)).iloc[1]
    least, limit = np.sqrt(1 + np.array([-GATE, GATE]) * np.sqrt(2 / 400))
    for name in ("mean_z_rms", "sd_z_rms"):
        assert least < row[name] < limit, name
    assert row["mean_z_max"] < 5
    naive = compare(*clouds(sizes, spread, labels=False)).iloc[1]
    assert naive["mean_z_rms"] > 2
    assert naive["mean_z_max"] > 5


def test_a_single_ancestor_has_no_error():
    whole, single = clouds(EQUAL, num_trees=1), clouds(np.array([4000]), 0.5, num_trees=1)
    row = compare(*whole, *single).iloc[1]
    assert row["ancestors"] == 1
    assert row[["min_ess", "mean_z_rms", "sd_z_max", "mean_shift"]].isna().all()


def test_the_reference_has_no_agreement_with_itself_and_cost_is_a_rate():
    table = compare(*runs((0, 1), (0, 1)))
    assert table.index.tolist() == ["NUTS", "NUTS 2"]
    assert table.loc["NUTS", ["mean_z_rms", "sd_ratio", "log_evidence"]].isna().all()
    np.testing.assert_allclose(table["ess_per_second"], table["min_ess"] / 2.0)
    assert (table["draws"] == 2000).all()


def test_evidence_is_in_the_table():
    table = compare(tree(), tree(log_evidence=-5.5, log_evidence_se=0.4))
    assert table["log_evidence"].tolist() == pytest.approx([np.nan, -5.5], nan_ok=True)


def test_bad_comparisons_are_refused():
    first, second = runs((0, 1), (0, 1), num_draws=10)
    with pytest.raises(ValueError, match="trees must be at least two, got 1"):
        compare(first)
    with pytest.raises(ValueError, match=r"names must be 2, one per tree, got \['a'\]"):
        compare(first, second, names=["a"])
    second["observed_data"]["y"] = ("y_dim_0", np.zeros(2))
    with pytest.raises(ValueError, match="observed site 'y' differs"):
        compare(first, second)
    with pytest.raises(ValueError, match="must have one shape in all trees"):
        compare(tree((1.0, 1.0)), next(runs((0, 1), num_draws=10)))
    other = az.from_dict({"posterior": {"z": np.zeros((1, 5))}, "sample_stats": {}})
    with pytest.raises(ValueError, match="must share a variable"):
        compare(other, next(iter([az.from_dict({"posterior": {"x": np.zeros((1, 5))}})])))
