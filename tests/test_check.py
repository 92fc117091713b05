"""Checks of posteriors, on a Gaussian model whose posterior is known and on one spoilt by a bit.

`theta ~ N(0, I)` in two dimensions, `x = A theta + noise`: the posterior is `N(G x, C)`. A check
passes the right one, and has its own spoilt one that it must accuse.
"""

import sys
from math import erf, exp, pi, sqrt

import jax
import numpy as np
import pytest

from scoreprior import check
from scoreprior.check import _uniform
from stats import assert_proportion

A = np.array([[1.0, 0.5], [0.0, 0.7]])
NOISE = 0.8
COV = np.linalg.inv(np.eye(2) + A.T @ A / NOISE**2)
GAIN = COV @ A.T / NOISE**2
ROOT = np.linalg.cholesky(COV)
NARROW, SHIFT = 0.75, 0.5
NUM, NUM_DRAWS = 2000, 199


def cdf(z):
    return (1 + erf(z / sqrt(2))) / 2


def simulate(num, rng):
    truth = rng.normal(size=(num, 2))
    return truth, truth @ A.T + NOISE * rng.normal(size=(num, 2))


def posterior(data, num_draws, rng, *, scale=1.0, shift=0.0):
    """Draws [n, num_draws, 2], with standard deviations times `scale`, means off by `shift` sd."""
    noise = scale * rng.normal(size=(len(data), num_draws, 2)) @ ROOT.T
    return (data @ GAIN.T)[:, None] + noise + shift * np.sqrt(np.diag(COV))


def log_prob(theta, data, scale):
    white = (theta - (data @ GAIN.T)[:, None]) @ np.linalg.inv(ROOT).T
    return -((white / scale) ** 2).sum(-1) / 2


def pairs(seed=0, num=NUM, num_draws=NUM_DRAWS, **spoilt):
    rng = np.random.default_rng(seed)
    truth, data = simulate(num, rng)
    return truth, posterior(data, num_draws, rng, **spoilt), data


# The null law.


@pytest.mark.parametrize("num_draws", [19, 400])
def test_bands_hold_all_of_a_curve_with_their_probability(num_draws):
    rng = np.random.default_rng(1)
    num, num_curves = 150, 4000
    ranks = rng.integers(0, num_draws + 1, size=(num_curves, num))
    k = _uniform.ladder(num_draws + 1)
    counts = (ranks[:, :, None] < k).sum(1)
    null = _uniform.bands(num, k / (num_draws + 1))
    for prob in (0.8, 0.95):
        lower, upper = null.limits(prob)
        inside = ((counts / num >= lower) & (counts / num <= upper)).all(1)
        assert_proportion(inside.sum(), num_curves, prob, bias=0.05)
        np.testing.assert_array_equal(inside, null.p_value(counts) > 1 - prob)
        # One point at a time holds much more: a pointwise band would fail the line above.
        assert ((counts / num >= lower) & (counts / num <= upper)).mean() > 0.5 + prob / 2


def test_tails_of_the_null_law_are_binomial():
    null = _uniform.bands(7, np.array([0.3]))
    mass = [35 * 0.3**3 * 0.7**4, 35 * 0.3**4 * 0.7**3]
    np.testing.assert_allclose(null.at_most[0, 3] - null.at_most[0, 2], mass[0], rtol=1e-12)
    np.testing.assert_allclose(null.at_least[0, 4] - null.at_least[0, 5], mass[1], rtol=1e-12)
    np.testing.assert_allclose(null.statistic(np.array([[0]])), 2 * 0.7**7, rtol=1e-12)


def test_ties_are_broken_evenly():
    num = 8000
    rank = _uniform.ranks(np.zeros(num), np.zeros((num, 3)))
    for value in range(4):
        assert_proportion((rank == value).sum(), num, 0.25)


# Calibration.

SPOILT = {
    "narrow": {"scale": NARROW},
    "wide": {"scale": 1 / NARROW},
    "shifted": {"shift": SHIFT},
}
spoilt = pytest.mark.parametrize("how", list(SPOILT))


def test_sbc_passes_the_right_posterior():
    tree = check.sbc(*pairs()[:2])
    assert tree.attrs["p_value"] > 0.01
    assert (tree.attrs["num"], tree.attrs["num_draws"]) == (NUM, NUM_DRAWS)
    curve = tree["sbc"]
    assert ((curve["ecdf"] >= curve["lower"]) & (curve["ecdf"] <= curve["upper"])).all()
    rank = curve["rank"].values
    for level in (0.1, 0.5, 0.9):
        hits = (rank < level * (NUM_DRAWS + 1)).sum(0)
        assert_proportion(hits, NUM, level, bias=0.1)
        np.testing.assert_array_equal(curve["ecdf"].sel(level=level) * NUM, hits)


@spoilt
def test_sbc_accuses(how):
    tree = check.sbc(*pairs(**SPOILT[how])[:2])
    assert (tree["sbc"]["p_value"] <= 1e-3).all()


def test_sbc_accuses_the_parameter_that_is_wrong():
    truth, draws, _ = pairs()
    tree = check.sbc(
        {"right": truth[:, 0], "wrong": truth[:, 1:]},
        {"right": draws[..., 0], "wrong": draws[..., 1:] + 0.2},
    )
    p_value = tree["sbc"]["p_value"].to_series()
    assert list(p_value.index) == ["right", "wrong[0]"]
    assert p_value["right"] > 0.01
    assert p_value["wrong[0]"] <= 1e-3
    assert tree.attrs["p_value"] == 2 * p_value["wrong[0]"]


def test_coverage_of_the_right_posterior():
    truth, draws, data = pairs()
    tree = check.coverage(
        truth,
        draws,
        truth_log_prob=log_prob(truth[:, None], data, 1.0)[:, 0],
        draws_log_prob=log_prob(draws, data, 1.0),
    )
    curve = tree["coverage"]
    assert list(curve["parameter"].values) == ["theta[0]", "theta[1]", "highest density"]
    assert tree.attrs["p_value"] > 0.01
    assert (abs(curve["excess"]) <= 5 * curve["excess_se"]).all()
    for level in (0.5, 0.9):
        row = curve.sel(level=level)
        assert_proportion(row["coverage"] * NUM, NUM, level, bias=0.1)


def test_coverage_of_a_narrow_posterior_is_what_it_must_be():
    # Inside a central interval with probability P(|Z| < c q), inside a region of highest density,
    # in two dimensions, with probability 1 - (1 - z)^(c^2).
    truth, draws, data = pairs(num=5000, num_draws=399, scale=NARROW)
    tree = check.coverage(
        truth,
        draws,
        truth_log_prob=log_prob(truth[:, None], data, NARROW)[:, 0],
        draws_log_prob=log_prob(draws, data, NARROW),
    )
    row = tree["coverage"].sel(level=0.5)
    central = 2 * cdf(NARROW * 0.6744898) - 1
    assert_proportion(row["coverage"][:2] * 5000, 5000, central)
    assert_proportion(row["coverage"][2:] * 5000, 5000, 1 - 0.5 ** (NARROW**2))
    assert (tree["coverage"]["p_value"] <= 1e-3).all()
    assert (tree["coverage"]["excess"] < -5 * tree["coverage"]["excess_se"]).all()


@spoilt
def test_coverage_accuses(how):
    curve = check.coverage(*pairs(**SPOILT[how])[:2])["coverage"]
    assert (curve["p_value"] <= 1e-3).all()
    sign = 1 if how == "wide" else -1
    assert (sign * curve["excess"] > 5 * curve["excess_se"]).all()


def test_truth_without_density_is_outside_every_region():
    truth, draws, data = pairs(num=20)
    tree = check.coverage(
        truth,
        draws,
        truth_log_prob=np.full(20, -np.inf),
        draws_log_prob=log_prob(draws, data, 1.0),
    )
    assert (tree["coverage"]["coverage"].sel(parameter="highest density") == 0).all()


def test_tarp_passes_the_right_posterior():
    tree = check.tarp(*pairs()[:2], key=jax.random.key(1))
    curve = tree["tarp"].sel(parameter="TARP")
    assert tree.attrs["p_value"] > 0.01
    assert abs(curve["atc"]) <= 5 * curve["atc_se"]
    row = curve.sel(level=0.5)
    assert_proportion(row["coverage"] * NUM, NUM, 0.5, bias=0.1)


@spoilt
def test_tarp_accuses(how):
    tree = check.tarp(*pairs(**SPOILT[how])[:2], key=jax.random.key(1))
    assert tree.attrs["p_value"] <= 1e-3
    if how != "shifted":
        excess = tree["tarp"]["atc"] / tree["tarp"]["atc_se"]
        assert (excess > 5 if how == "wide" else excess < -5).all()


def test_tarp_about_a_point_far_away_is_sbc():
    truth, draws, _ = pairs(num=200)
    far = np.full((200, 1), -1e4)
    tree = check.tarp(truth[:, :1], draws[..., :1], references=far)
    np.testing.assert_array_equal(
        tree["tarp"]["coverage"], check.sbc(truth[:, :1], draws[..., :1])["sbc"]["ecdf"]
    )


def test_tarp_is_blind_to_units():
    truth, draws, _ = pairs(num=200)
    here, there = (
        check.tarp(truth * unit, draws * unit, key=jax.random.key(0))
        for unit in (np.ones(2), np.array([1e3, 1e-3]))
    )
    np.testing.assert_array_equal(here["tarp"]["credibility"], there["tarp"]["credibility"])


def test_the_prior_passes_until_references_know_the_data():
    rng = np.random.default_rng(3)
    truth, data = simulate(NUM, rng)
    prior = rng.normal(size=(NUM, NUM_DRAWS, 2))
    assert check.sbc(truth, prior).attrs["p_value"] > 0.01
    assert check.tarp(truth, prior, key=jax.random.key(0)).attrs["p_value"] > 0.01
    assert check.tarp(truth, prior, references=data @ GAIN.T).attrs["p_value"] <= 1e-3
    draws = posterior(data, NUM_DRAWS, rng)
    assert check.tarp(truth, draws, references=data @ GAIN.T).attrs["p_value"] > 0.01


def _replicates(num_data, used):
    """`theta ~ N(0, 1)`, `num_data` data of unit noise; a posterior that believes in `used`."""

    def infer(key, data):
        variance = 1 / (1 + used)
        return variance * used * data.mean() + sqrt(variance) * jax.random.normal(key, (99,))

    return check.replicate(
        lambda key: jax.random.normal(key, ()),
        lambda key, theta: theta + jax.random.normal(key, (num_data,)),
        infer,
        num=400,
        key=jax.random.key(5),
    )


@pytest.mark.parametrize("num_data", [1, 8])
def test_replicates_are_calibrated_at_one_and_many_observations(num_data):
    found = _replicates(num_data, num_data)
    assert found.truth.shape == (400,)
    assert found.data.shape == (400, num_data)
    assert check.sbc(found.truth, found.draws).attrs["p_value"] > 0.01


def test_replicates_accuse_a_posterior_that_forgets_most_observations():
    found = _replicates(8, 3)
    assert check.sbc(found.truth, found.draws).attrs["p_value"] <= 1e-3


# Classifiers.


def test_c2st_is_that_of_the_benchmark():
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(80, 2)) * [1, 100], rng.normal(1.0, 2.0, size=(80, 2)) * [1, 100]
    both = np.concatenate([a, b])
    both = ((both - a.mean(0)) / a.std(0, ddof=1)).astype(np.float32)
    network = MLPClassifier((20, 20), max_iter=10_000, random_state=3)
    folds = KFold(5, shuffle=True, random_state=3)
    scores = cross_val_score(network, both, np.arange(160) >= 80, cv=folds)
    tree = check.c2st(a, b, seed=3)
    np.testing.assert_array_equal(tree["c2st"]["accuracy"], scores)
    assert tree.attrs["accuracy"] == scores.mean()
    assert tree.attrs["num_unconverged"] == 0


def test_c2st_of_equal_and_of_shifted_laws():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 2000, 2))
    same = check.c2st(a, b)
    assert_proportion(same.attrs["accuracy"] * 4000, 4000, 0.5, bias=0.06)
    assert same.attrs["p_value"] > 0.01
    apart = check.c2st(a, b + [1.5, 0.0])
    # The best accuracy is Phi(delta / 2); the network comes within its error, never above.
    assert_proportion(apart.attrs["accuracy"] * 4000, 4000, cdf(0.75), bias=0.06)
    assert apart.attrs["p_value"] < 1e-6


def test_c2st_sees_a_narrow_posterior():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 2000, 2))
    tree = check.c2st(a, b * NARROW)
    # Best accuracy: both radii, cut where the densities are equal.
    cut = -2 * np.log(NARROW**2) / (1 / NARROW**2 - 1)
    best = (1 + exp(-cut / 2) - exp(-cut / (2 * NARROW**2))) / 2
    assert tree.attrs["p_value"] < 1e-3
    assert abs(tree.attrs["accuracy"] - best) < 5 * tree.attrs["se"]


def test_fits_that_do_not_converge_are_counted():
    rng = np.random.default_rng(0)
    tree = check.c2st(*rng.normal(size=(2, 50, 1)), max_iter=1)
    assert tree.attrs["num_unconverged"] == 5
    assert (tree["c2st"]["num_iter"] == 1).all()


def _local(rng, wrong, num, **settings):
    """A posterior off by `wrong(x)` standard deviations, tested at -1.5 and 1.5."""
    truth = rng.normal(size=(num, 1))
    data = truth + rng.normal(size=(num, 1))
    at = np.array([[-1.5], [1.5]])

    def draw(x, size):
        return x / 2 + sqrt(0.5) * (rng.normal(size=size) + wrong(x))

    draws = draw(data, (num, 1))
    at_draws = draw(at[:, None], (2, 200, 1))
    return check.local_c2st(truth, draws, data, at, at_draws, **settings)


def test_local_c2st_accuses_where_the_posterior_is_wrong():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    model = make_pipeline(PolynomialFeatures(4), LogisticRegression(solver="newton-cholesky"))
    rng = np.random.default_rng(4)
    tree = _local(rng, lambda x: np.maximum(x, 0.0), 2000, classifier=model, num_null=99)
    left, right = tree["local_c2st"]["p_value"].values
    assert left > 0.05
    assert right == 0.01
    assert tree.attrs["p_value"] == 0.02
    assert tree.attrs["num_unconverged"] == 0


def test_local_c2st_p_values_are_exact():
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    rng = np.random.default_rng(5)
    model = QuadraticDiscriminantAnalysis()
    runs = [
        _local(rng, np.zeros_like, 60, classifier=model, num_null=9, seed=i) for i in range(250)
    ]
    p_value = np.array([run["local_c2st"]["p_value"].values[0] for run in runs])
    assert_proportion((p_value <= 0.2 + 1e-9).sum(), len(p_value), 0.2, bias=0.2)
    assert_proportion((p_value <= 0.6 + 1e-9).sum(), len(p_value), 0.6, bias=0.25)


def test_local_c2st_by_its_own_network():
    rng = np.random.default_rng(6)
    tree = _local(rng, np.ones_like, 300, num_null=19)
    assert tree["local_c2st"]["p_value"][1] == 0.05
    # Draws too high: the classifier knows those on the right side as draws.
    assert tree["local_c2st"]["probability"][1].mean() > 0.55
    assert tree.attrs["num_unconverged"] == 0
    # At a draw that the classifier is sure of it is 1/4, at one it is in doubt of zero.
    spread = np.abs(tree["local_c2st"]["probability"].values - 0.5)
    np.testing.assert_allclose(tree["local_c2st"]["statistic"], (spread**2).mean(-1))


def test_classifiers_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install \"scoreprior\[sbi\]\""):
        check.c2st(*np.random.default_rng(0).normal(size=(2, 50, 1)))


# Predictions.


def test_predictive_statistics_have_their_normal_p_values():
    rng = np.random.default_rng(0)
    num = 4000
    simulated = rng.normal(size=(num, 4))
    observed = np.full(4, 0.4)
    tree = check.posterior_predictive(observed, simulated, statistics={"mean": np.mean})
    p_value = float(tree["statistics"]["p_value"].sel(statistic="mean"))
    assert_proportion(p_value / 2 * num, num, 1 - cdf(0.4 * 2))
    assert_proportion(
        tree["distances"]["p_value"].sel(statistic="Mahalanobis") * num / 2,
        num / 2,
        # A chi-square with four degrees of freedom above 0.64.
        exp(-0.32) * (1 + 0.32),
        bias=0.08,
    )


def test_posterior_predictive_accuses_a_wrong_noise():
    rng = np.random.default_rng(1)
    theta = rng.normal(size=(2000, 1)) * 0.1
    observed = rng.normal(size=30)
    right = check.posterior_predictive(observed, theta + rng.normal(size=(2000, 30)))
    assert right.attrs["p_value"] > 0.05
    narrow = check.posterior_predictive(observed, theta + 0.5 * rng.normal(size=(2000, 30)))
    assert narrow["statistics"]["p_value"].sel(statistic="sd") <= 2 / 2001
    assert (narrow["distances"]["p_value"] <= 1 / 1001).all()


@pytest.mark.parametrize(
    ("statistic", "spoil"),
    {
        "mean": lambda x: x + 1.2,
        "sd": lambda x: 2 * x,
        "smallest": lambda x: np.where(x == x.min(), -7.0, x),
        "largest": lambda x: np.where(x == x.max(), 7.0, x),
    }.items(),
    ids=["mean", "sd", "smallest", "largest"],
)
def test_each_predictive_statistic_sees_what_it_is_for(statistic, spoil):
    rng = np.random.default_rng(3)
    observed, simulated = rng.normal(size=30), rng.normal(size=(2000, 30))
    right = check.posterior_predictive(observed, simulated)["statistics"]["p_value"]
    wrong = check.posterior_predictive(spoil(observed), simulated)["statistics"]["p_value"]
    assert (right > 0.01).all()
    assert wrong.sel(statistic=statistic) == 2 / 2001


def test_statistics_of_sites():
    rng = np.random.default_rng(2)
    simulated = {"a": rng.normal(size=(500, 2)), "b": rng.normal(size=500)}
    tree = check.posterior_predictive(
        {"a": np.zeros(2), "b": np.array(6.0)},
        simulated,
        statistics={"a": lambda x: x["a"].sum(), "b": lambda x: x["b"]},
    )
    p_value = tree["statistics"]["p_value"].to_series()
    assert p_value["a"] > 0.5
    assert p_value["b"] == 2 / 501


def test_energy_distance_of_a_gaussian():
    cloud = np.random.default_rng(0).normal(size=(4000, 1)) * 3
    points = np.array([0.0, 1.0, 3.0])
    density = np.exp(-(points**2) / 2) / sqrt(2 * pi)
    expected = 2 * (2 * density + points * [2 * cdf(x) - 1 for x in points]) - 2 / sqrt(pi)
    distance = check.Energy()(3 * points[:, None], cloud)
    np.testing.assert_allclose(distance, expected, atol=5 * 2 / sqrt(4000))


def test_alarms_have_exact_p_values():
    rng = np.random.default_rng(3)
    distances = {"Mahalanobis": check.Mahalanobis(), "Nearest": check.Nearest(3)}
    distances |= {"Energy": check.Energy()}
    p_value = []
    for _ in range(1000):
        x = rng.normal(size=(99, 2)) ** 3
        tree = check.misspecification(x[0], x[1:], distances=distances)
        p_value.append(tree["distances"]["p_value"].values)
    # 49 are held out: the p-value is uniform on 1/50, ..., 1.
    for share in (0.1, 0.5):
        hits = (np.array(p_value) <= share + 1e-9).sum(0)
        assert_proportion(hits, 1000, share, bias=0.12)


def test_alarms_outside_the_cloud_and_in_its_hole():
    rng = np.random.default_rng(4)
    ring = rng.normal(size=(2000, 2))
    ring = ring / np.linalg.norm(ring, axis=1, keepdims=True) + 0.05 * rng.normal(size=(2000, 2))
    assert check.misspecification(ring[0], ring[1:]).attrs["p_value"] > 0.05
    outside = check.misspecification(np.array([2.0, 0.0]), ring)["distances"]["p_value"]
    assert (outside <= 1 / 1001).all()
    middle = check.misspecification(np.zeros(2), ring)["distances"]["p_value"].to_series()
    assert middle["Nearest"] <= 1 / 1001
    assert middle["Mahalanobis"] > 0.9


def test_mahalanobis_is_blind_to_units():
    rng = np.random.default_rng(5)
    cloud = rng.normal(size=(500, 2)) @ np.array([[1.0, 0.9], [0.0, 0.1]])
    scale = np.array([1e-6, 1e6])
    distance = check.Mahalanobis()
    point = np.array([[0.5, -0.5]])
    np.testing.assert_allclose(distance(point * scale, cloud * scale), distance(point, cloud))
    white = point - cloud.mean(0)
    expected = np.sqrt(white @ np.linalg.inv(np.cov(cloud.T)) @ white.T)[0]
    np.testing.assert_allclose(distance(point, cloud), expected)


def _ratio(x, noise=1.0):
    """`log p(x_1, ..., x_n) - sum_i log p(x_i)` of `theta ~ N(0, 1)`, rows of `x` [..., n]."""
    num = x.shape[-1]
    total = noise**2 * (noise**2 + num)
    quadratic = ((x**2).sum(-1) - x.sum(-1) ** 2 / (noise**2 + num)) / noise**2
    log_det = np.log(total / noise**2) + (num - 1) * np.log(noise**2)
    single = num * np.log(1 + noise**2) + (x**2).sum(-1) / (1 + noise**2)
    return (single - log_det - quadratic) / 2


def test_evidence_ratio_accuses_observations_that_share_no_parameter():
    rng = np.random.default_rng(6)
    num, size = 2000, 8
    x = rng.normal(size=(num, size))
    cov = np.ones((size, size)) + 0.25 * np.eye(size)
    joint = -(x[0] @ np.linalg.solve(cov, x[0]) + np.linalg.slogdet(cov)[1]) / 2
    alone = -(x[0] ** 2 / 1.25 + np.log(1.25)).sum() / 2
    np.testing.assert_allclose(_ratio(x[0], 0.5), joint - alone)
    shared = rng.normal(size=(num, 1)) + 0.5 * x
    null = _ratio(shared[1:], 0.5)
    assert check.evidence_ratio(_ratio(shared[0], 0.5), null).attrs["p_value"] > 0.01
    other = rng.normal(size=size) + 0.5 * x[0]
    found = check.evidence_ratio(_ratio(other, 0.5), null)
    assert found.attrs["p_value"] <= 1e-3
    assert found["statistics"]["p_high"] == 1
    # The p-value counts the data as one of their simulations: never zero.
    assert check.evidence_ratio(-1e9, null).attrs["p_value"] == 1 / num
    assert check.evidence_ratio(1e9, null)["statistics"]["p_high"] == 1 / num
    copies = check.evidence_ratio(_ratio(np.full(size, 2.5), 0.5), null)
    assert copies["statistics"]["p_high"] < 0.05


# Pictures.


def test_pictures_show_the_tree():
    from sklearn.linear_model import LogisticRegression

    truth, draws, _ = pairs(num=100, num_draws=49)
    ranks, covers = check.sbc(truth, draws), check.coverage(truth, draws)
    level = ranks["sbc"]["level"].values
    axes = check.plot_ecdf(ranks).axes
    assert len(axes) == 2
    drawn = axes[1].lines[1].get_ydata()
    np.testing.assert_allclose(drawn[1:-1], ranks["sbc"]["ecdf"].values[1] - level)
    figure = check.plot_coverage(covers)
    drawn = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(drawn[1:-1], covers["coverage"]["coverage"].values[0])
    tree = check.tarp(truth, draws, key=jax.random.key(0))
    drawn = check.plot_tarp(tree).axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(drawn[1:-1], tree["tarp"]["coverage"].values[0])
    tree = check.posterior_predictive(truth[0], truth[1:])
    axes = check.plot_predictive(tree).axes
    assert [ax.lines[0].get_xdata()[0] for ax in axes] == [
        *tree["statistics"]["observed"].values,
        *tree["distances"]["observed"].values,
    ]
    rng = np.random.default_rng(0)
    tree = check.c2st(*rng.normal(size=(2, 200, 1)))
    ax = check.plot_c2st(tree).axes[0]
    np.testing.assert_allclose(ax.lines[2].get_ydata(), tree["c2st"]["accuracy"].values)
    assert ax.lines[1].get_ydata()[0] == tree.attrs["accuracy"]
    low, height = ax.patches[0].get_y(), ax.patches[0].get_height()
    np.testing.assert_allclose([low, height], [0.5 - 80**-0.5, 2 * 80**-0.5])
    tree = _local(rng, np.zeros_like, 60, classifier=LogisticRegression(), num_null=9)
    axes = check.plot_local_c2st(tree).axes
    assert [ax.lines[0].get_xdata()[0] for ax in axes] == [*tree["local_c2st"]["statistic"].values]
    heights = [sum(bar.get_height() * bar.get_width() for bar in ax.patches) for ax in axes]
    np.testing.assert_allclose(heights, 1)
    with pytest.raises(ValueError, match="tree must have ecdf in its group sbc"):
        check.plot_ecdf(covers)
    with pytest.raises(ValueError, match="tree must have a group statistics or distances"):
        check.plot_predictive(covers)


def test_trees_are_stored_and_arviz_takes_their_ranks(tmp_path):
    import arviz as az
    import xarray as xr

    tree = check.sbc(*pairs(num=100, num_draws=49)[:2])
    tree.to_netcdf(tmp_path / "sbc.nc")
    with xr.open_datatree(tmp_path / "sbc.nc") as again:
        xr.testing.assert_identical(again.load(), tree)
    ranks = tree["prior_sbc"]["theta[0]"].values
    np.testing.assert_allclose(ranks[0] * 50, tree["sbc"]["rank"].values[:, 0] + 0.5)
    page = az.plot_ecdf_pit(tree, backend="none")
    assert set(page.data.data_vars) == {"theta[0]", "theta[1]"}


# Bad input.

T, D = np.zeros((20, 2)), np.random.default_rng(0).normal(size=(20, 30, 2))
BAD = {
    "truth must hold at least 10 replicates, got 0": lambda: check.sbc(T[:0], D[:0]),
    "draws must hold at least 10 draws of each replicate, got 5": lambda: check.sbc(T, D[:, :5]),
    "shapes (20, 2) and (19, 30, 2)": lambda: check.sbc(T, D[:-1]),
    "shapes (20, 2) and (20, 30)": lambda: check.sbc(T, D[..., 0]),
    "truth and draws must have the same sites, got ['a'] and ['b']": lambda: check.sbc(
        {"a": T}, {"b": D}
    ),
    "all sites must have one n and one num_draws": lambda: check.sbc(
        {"a": T, "b": T[:15]}, {"a": D, "b": D[:15]}
    ),
    "truth must have at least one site": lambda: check.sbc({}, {}),
    "draws['theta'] must be finite, got 1200 of 1200": lambda: check.coverage(T, np.nan * D),
    "truth['theta'] must be finite, got 40 of 40": lambda: check.tarp(T + np.inf, D),
    "prob must be between 0 and 1, got 1.0": lambda: check.sbc(T, D, prob=1.0),
    "truth_log_prob and draws_log_prob must be given both": lambda: check.coverage(
        T, D, truth_log_prob=T[:, 0]
    ),
    "draws_log_prob must have shape (20, 30), got (20, 29)": lambda: check.coverage(
        T, D, truth_log_prob=T[:, 0], draws_log_prob=D[:, 1:, 0]
    ),
    "truth_log_prob must be numbers below inf, got 20 of 20": lambda: check.coverage(
        T, D, truth_log_prob=np.nan * T[:, 0], draws_log_prob=D[..., 0]
    ),
    "one of key and references must be given, got neither": lambda: check.tarp(T, D),
    "references must have shape (20, 2), got (20, 1)": lambda: check.tarp(
        T, D, references=T[:, :1]
    ),
    "must vary in every parameter, got constant ones: ['theta[1]']": lambda: check.tarp(
        T, D * [1, 0], references=T
    ),
    "b must have 2 columns, got shape (20, 1)": lambda: check.c2st(D[:, 0], D[:, 0, :1]),
    "equal numbers of draws, got 20 and 15": lambda: check.c2st(D[:, 0], D[:15, 0]),
    "a must vary in every entry, got 1 constant: ['column 1']": lambda: check.c2st(
        D[:, 0] * [1, 0], D[:, 0]
    ),
    "a must be a matrix [n, d], got shape (20,)": lambda: check.c2st(T[:, 0], T[:, 0]),
    "b must be finite, got 40 of 40": lambda: check.c2st(D[:, 0], np.nan * D[:, 1]),
    "truth and data must have equal numbers of rows, got 20 and 19": lambda: check.local_c2st(
        T, D[:, 0], D[1:, 1], D[0, 0], D[0]
    ),
    "observed must be [2] or [k, 2], as data are, got shape (1,)": lambda: check.local_c2st(
        T, D[:, 0], D[:, 1], D[0, 0, :1], D[0]
    ),
    "observed_draws must be [num, 2] for each of 1 observed": lambda: check.local_c2st(
        T, D[:, 0], D[:, 1], D[0, 0], D[0, :, :1]
    ),
    "num_null must be at least 1, got 0": lambda: check.local_c2st(
        T, D[:, 0], D[:, 1], D[0, 0], D[0], num_null=0
    ),
    "shapes (3,) and (20, 2)": lambda: check.misspecification(np.zeros(3), D[:, 0]),
    "simulated must hold at least 20 data sets, got 19": lambda: check.misspecification(
        T[0], D[1:, 0]
    ),
    "observed['x'] must be finite, got 2 of 2": lambda: check.misspecification(
        np.nan * T[0], D[:, 0]
    ),
    "simulated must vary in every entry, got 1 constant: ['x[0]']": lambda: check.misspecification(
        T[0], D[:, 0] * [0, 1]
    ),
    "Mahalanobis needs a covariance of full rank, got rank 1 of 2": lambda: check.misspecification(
        T[0], D[:, 0, :1] * [1, 2]
    ),
    "num must be at most 10, of the cloud, got 11": lambda: check.misspecification(
        T[0], D[:, 0], distances={"far": check.Nearest(11)}
    ),
    "distances must not be empty": lambda: check.misspecification(T[0], D[:, 0], distances={}),
    "statistics and distances must not both be empty": lambda: check.posterior_predictive(
        T[0], D[:, 0], statistics={}, distances={}
    ),
    "statistics must give one number each, got shape (2,) of 'x'": lambda: (
        check.posterior_predictive(T[0], D[:, 0], statistics={"x": lambda x: x})
    ),
    "statistics['x'] must be finite, got 21 of 21": lambda: check.posterior_predictive(
        T[0], D[:, 0], statistics={"x": lambda x: np.nan}
    ),
    "statistics must be given for data that are a dict": lambda: check.posterior_predictive(
        {"x": T[0]}, {"x": D[:, 0]}
    ),
    "null must hold at least 10 log evidence ratios, got 9": lambda: check.evidence_ratio(
        1.0, np.zeros(9)
    ),
    "observed must be one number and null [num]": lambda: check.evidence_ratio(T[0], T[:, 0]),
    "observed must be finite, got 1 of 1": lambda: check.evidence_ratio(np.nan, T[:, 0]),
    "num must be at least 1, got 0": lambda: check.replicate(*[lambda *_: T] * 3, num=0, key=KEY),
    "infer must give one structure and shape for all replicates": lambda: check.replicate(
        lambda key: 0.0, lambda key, theta: 0.0, _growing, num=2, key=KEY
    ),
}
KEY = jax.random.key(0)
SIZES = iter((3, 4))


def _growing(key, data):
    return np.zeros(next(SIZES))


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)
