"""Checks of priors: closed forms on exact laws, levels of their tests, and what each must see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreprior import check
from scoreprior.check._two_samples import differ, differ_in_mean, mid_ranks
from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.density import ScoreOnly
from scoreprior.flow import EULER, FixedGrid, Flow
from scoreprior.gaussian import HartleyBasis, Moments
from scoreprior.prior import ScorePrior
from stats import assert_mean, assert_proportion

pytestmark = pytest.mark.promotes_ranks
SHAPE, SIZE, SIGMA = (8, 8), 64, 0.1
KEYS = jax.random.split(jax.random.key(5), 8)


def stationary(slope=2.0):
    """A Gaussian field with a falling spectrum about a mean of two."""
    k = jnp.fft.fftfreq(8)
    spectrum = 0.2 / (0.02 + k[:, None] ** 2 + k[None] ** 2) ** (slope / 2)
    return Moments(jnp.full(SHAPE, 2.0), spectrum, HartleyBasis((0, 1)))


def prior_of(moments, density=None):
    # A Gaussian flow moves nothing, so one step is exact.
    solver = FixedGrid(1, method=EULER)
    flow = Flow(Gaussian(moments), moments, sigma_min=SIGMA, sigma_max=50.0, solver=solver)
    return ScorePrior(flow, density)


LAW = stationary()
PRIOR = prior_of(LAW)


def draw(moments, num, key):
    return np.asarray(jax.vmap(moments.sample)(jax.random.split(key, num)))


def noisy(x, key=KEYS[7]):
    return x + SIGMA * np.asarray(jax.random.normal(key, x.shape))


def test_permutation_tests_keep_their_level_and_see_a_shift():
    rng = np.random.default_rng(0)
    num, hits, lower, several = 2000, 0, 0, 0
    for _ in range(num):
        a, b = rng.normal(size=(12, 3)), rng.normal(size=(8, 3))
        hits += differ_in_mean(a, b, num=99) <= 0.1
        lower += differ_in_mean(a, b, num=99, is_lower=True) <= 0.1
    assert_proportion(hits, num, 0.1)
    assert_proportion(lower, num, 0.1)
    shift = np.array([0.0, 0.0, -2.0])
    assert differ_in_mean(a + shift, b) < 0.01
    assert differ_in_mean(a + shift, b, is_lower=True) < 0.01
    assert differ_in_mean(a - shift, b, is_lower=True) > 0.1
    assert differ_in_mean(np.ones((5, 2)), np.ones((6, 2))) == 1
    for _ in range(num):
        values = np.concatenate([rng.normal(size=12), rng.normal(size=8)])
        both = np.stack([values, values**2])
        contrast = lambda is_left, v=both: v[:, is_left].mean(1) - v[:, ~is_left].mean(1)
        several += differ(contrast, 12, 8, num=19) <= 0.1
    assert_proportion(several, num, 0.1)


def test_mid_ranks_share_ties():
    np.testing.assert_array_equal(mid_ranks(np.array([3.0, 1.0, 3.0, 0.0])), [3.5, 2, 3.5, 1])


def test_held_out_bits_are_the_entropy_of_a_gaussian():
    tree = check.held_out_bits(PRIOR, draw(LAW, 20_000, KEYS[0]), key=KEYS[1], num_draws=5000)
    variances = LAW.eigenvalues + SIGMA**2
    entropy = float(jnp.mean(jnp.log2(2 * jnp.pi * jnp.e * variances)) / 2)
    assert_mean(tree["held_out"]["bits"].values, entropy)
    assert_mean(tree["draws"]["bits"].values, entropy, bias=0.1)
    np.testing.assert_allclose(tree["held_out"]["gaussian"], tree["held_out"]["bits"], rtol=1e-9)
    bits = tree["held_out"]["bits"].values
    assert tree.attrs["bits"] == bits.mean()
    np.testing.assert_allclose(tree.attrs["bits_se"], bits.std(ddof=1) / len(bits) ** 0.5)
    assert tree.attrs["p_value"] > 0.01


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_held_out_bits_see_events_of_another_law(factor):
    wrong = 2 + factor * (draw(LAW, 400, KEYS[0]) - 2)
    tree = check.held_out_bits(PRIOR, wrong, key=KEYS[1], num_draws=400)
    assert tree.attrs["p_value"] <= 0.002
    assert (tree.attrs["bits"] > tree.attrs["draws_bits"]) == (factor > 1)


def test_held_out_bits_are_below_the_gaussian_ones_where_the_law_is_a_mixture():
    means = jnp.stack([jnp.full(SHAPE, -3.0), jnp.full(SHAPE, 3.0)])
    mixture = GaussianMixture.diagonal(jnp.array([0.5, 0.5]), means, jnp.ones((2, *SHAPE)))
    flow = Flow(mixture, mixture.moments(), sigma_min=SIGMA, sigma_max=300.0)
    x = jax.vmap(mixture.sample)(jax.random.split(KEYS[2], 20))
    tree = check.held_out_bits(ScorePrior(flow), x, key=KEYS[1], num_draws=10)
    key = jax.random.split(KEYS[1])[0]
    seen = x + SIGMA * jax.random.normal(key, x.shape)
    exact = -jax.vmap(lambda x: mixture.log_prob(x, SIGMA))(seen) / SIZE / np.log(2)
    np.testing.assert_allclose(tree["held_out"]["bits"], exact, atol=2e-3)
    # One bit for which mode, and 64 dimensions: ln 64 / 2 nats less than nothing.
    assert tree.attrs["bits"] < tree.attrs["gaussian_bits"] - 0.01


def test_the_spectrum_is_that_of_the_field():
    x = draw(LAW, 20_000, KEYS[0])
    tree = check.spectrum(x[:9000], x[9000:], prob=0.5)
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(8), np.fft.fftfreq(8)))
    power = np.asarray(LAW.eigenvalues)
    truth = [power[np.rint(8 * k) == ring].mean() for ring in (1, 2, 3, 4)]
    for name in ("draws", "data"):
        values = tree[name]["power"].values
        assert_mean(values, truth, bias=0.1)
        np.testing.assert_array_equal(tree[name]["frequency"], np.arange(1, 5) / 8)
        inside = (values >= tree[name]["lower"].values) & (values <= tree[name]["upper"].values)
        np.testing.assert_allclose(inside.mean(0), 0.5, atol=1e-3)
    assert tree.attrs["p_value"] > 0.01


def test_the_spectrum_sees_blur_and_grain():
    x, y = draw(LAW, 150, KEYS[0]), draw(LAW, 200, KEYS[1])
    assert check.spectrum(x, y).attrs["p_value"] > 0.01
    grainy = x + 0.5 * np.random.default_rng(0).normal(size=x.shape)
    blurred = draw(stationary(slope=2.5), 150, KEYS[2])
    assert check.spectrum(grainy, y).attrs["p_value"] <= 0.002
    assert check.spectrum(blurred, y).attrs["p_value"] <= 0.002


@pytest.mark.parametrize("order", [0.3, 1.0, 2.0, np.inf])
def test_vendi_scores_in_closed_form(order):
    cosine, gaussian = check.CosineSimilarity(), check.GaussianSimilarity(1.5)

    def score(rows, similarity=cosine):
        return check.vendi_score(rows, similarity, orders=[order])[0]

    np.testing.assert_allclose(score(np.ones((7, 3))), 1)
    np.testing.assert_allclose(score(np.eye(9)), 9)
    groups = np.repeat(np.eye(3), [1, 3, 6], axis=0).reshape(10, 3, 1)
    share = np.array([0.1, 0.3, 0.6])
    effective = {
        0.3: (share**0.3).sum() ** (1 / 0.7),
        1.0: np.exp(-(share * np.log(share)).sum()),
        2.0: 1 / (share**2).sum(),
        np.inf: 1 / 0.6,
    }[order]
    np.testing.assert_allclose(score(groups), effective)
    k = np.exp(-(2.0**2) / (2 * 1.5**2))
    pair = np.array([(1 + k) / 2, (1 - k) / 2])
    expected = {
        0.3: (pair**0.3).sum() ** (1 / 0.7),
        1.0: np.exp(-(pair * np.log(pair)).sum()),
        2.0: 1 / (pair**2).sum(),
        np.inf: 1 / pair.max(),
    }[order]
    np.testing.assert_allclose(score(np.array([[0.0, 1.0], [2.0, 1.0]]), gaussian), expected)


def modes(weights, num, seed):
    """Images near one of five patterns."""
    rng = np.random.default_rng(seed)
    which = rng.choice(5, num, p=weights)
    patterns = np.random.default_rng(9).normal(size=(5, *SHAPE))
    return patterns[which] + 0.2 * rng.normal(size=(num, *SHAPE))


def test_diversity_sees_lost_modes_and_added_noise():
    similarity, even = check.GaussianSimilarity(3.0), np.full(5, 0.2)
    data = modes(even, 100, 0)
    same = check.diversity(modes(even, 100, 1), data, similarity)
    assert same.attrs["p_value"] > 0.02
    lost = check.diversity(modes([0.4, 0.4, 0.1, 0.1, 0.0], 100, 2), data, similarity)
    assert lost.attrs["p_value"] <= 0.01
    assert (lost["vendi"]["draws"] < lost["vendi"]["data"]).all()
    blends = modes(even, 100, 3) + np.random.default_rng(4).normal(size=(100, *SHAPE)) * 0.3
    noised = check.diversity(blends, data, similarity)
    assert noised.attrs["p_value"] <= 0.01
    assert (noised["vendi"]["draws"] > noised["vendi"]["data"]).all()
    scores = check.vendi_score(data, similarity, orders=noised["vendi"]["order"].values.tolist())
    np.testing.assert_allclose(noised["vendi"]["data"], scores)


def test_memorisation_sees_copies():
    training, held_out, fresh = (draw(LAW, 200, key) for key in KEYS[:3])
    right = check.memorisation(noisy(fresh), training, noisy(held_out, KEYS[6]))
    assert right.attrs["p_value"] > 0.01
    assert abs(right.attrs["share_nearer"] - 0.5) < 0.1
    mixed = np.concatenate([training[:50], fresh[50:]])
    for copies in (training, mixed):
        tree = check.memorisation(noisy(copies), training, noisy(held_out, KEYS[6]))
        assert tree.attrs["p_value"] <= 0.001
        np.testing.assert_array_equal(tree["draws"]["nearest"][:50], np.arange(50))
    # Draws that are far from all data are wrong, and no copies.
    far = check.memorisation(noisy(fresh) + 3, training, noisy(held_out, KEYS[6]))
    assert far.attrs["p_value"] > 0.99
    assert far.attrs["share_nearer"] < 0.01


def test_distances_to_the_nearest_are_those_of_all_pairs():
    training, held_out, fresh = (1e6 * draw(LAW, 30, key) for key in KEYS[:3])
    # A copy, and one so near that differences of squares would lose it.
    fresh[0], fresh[1] = training[7], training[3] + 1e-3
    tree = check.memorisation(fresh, training, held_out)
    each = np.linalg.norm((fresh[:, None] - training[None]).reshape(30, 30, -1), axis=-1)
    np.testing.assert_allclose(tree["draws"]["distance"], each.min(1), rtol=1e-12)
    np.testing.assert_array_equal(tree["draws"]["nearest"], each.argmin(1))
    assert tree["draws"]["distance"][0] == 0


def test_out_of_distribution_keeps_its_level():
    events = noisy(draw(LAW, 2000, KEYS[0]))
    tree = check.out_of_distribution(PRIOR, events, key=KEYS[3], num_draws=4000)
    for group in ("score_norms", "log_density"):
        # As many references as events: the error is that of half as many.
        share = (tree[group]["p_value"].values <= 0.1).mean()
        assert_proportion(share * 1000, 1000, 0.1, bias=0.07)
    levels = tree["score_norms"]["level"].values
    z = LAW.basis.analyse(jnp.asarray(events[0]) - LAW.mean)
    norms = [jnp.linalg.norm(z / (LAW.eigenvalues + level**2)) for level in levels]
    np.testing.assert_allclose(tree["score_norms"]["observed"][0], np.log(norms), rtol=1e-9)
    np.testing.assert_allclose(levels[[0, -1]], [SIGMA, LAW.eigenvalues.max() ** 0.5])


def test_out_of_distribution_sees_strange_events():
    usual = noisy(draw(LAW, 1, KEYS[0]))[0]
    scales = np.sqrt(np.asarray(LAW.eigenvalues) + SIGMA**2)
    # From 1.7 at the lowest frequency to nothing at the highest.
    tilted = 1.7 * (scales - scales.min()) / np.ptp(scales)
    whitened = np.asarray(LAW.basis.analyse(jnp.asarray(usual - 2))) / scales * tilted
    whitened *= np.sqrt(SIZE / (whitened**2).sum())
    redder = 2 + np.asarray(LAW.basis.analyse(jnp.asarray(whitened * scales)))
    events = np.stack([usual, 2 + 1.5 * (usual - 2), 2 + 0.5 * (usual - 2), redder])
    tree = check.out_of_distribution(PRIOR, events, key=KEYS[3], num_draws=1000)
    density = tree["log_density"]["p_value"].values
    norms = tree["score_norms"]["p_value"].values
    assert density[0] > 0.05
    assert norms[0] > 0.05
    assert (density[1:3] < 0.01).all()
    # As probable as any other by its density; its power is at the wrong scales.
    assert density[3] > 0.5
    assert norms[3] < 0.01
    assert tree.attrs["p_value"] < 0.05


def test_data_of_another_law_are_strange_among_draws_and_not_among_their_like():
    data = noisy(2 + 1.3 * (draw(LAW, 301, KEYS[0]) - 2))
    among = check.out_of_distribution(PRIOR, data[:1], key=KEYS[3], num_draws=300)
    assert among.attrs["p_value"] < 0.05
    like = check.out_of_distribution(PRIOR, data[:1], key=KEYS[3], reference=data[1:])
    assert like.attrs["p_value"] > 0.1
    assert like.attrs["num"] == 300


def test_a_prior_without_density_has_score_norms_alone():
    prior = prior_of(LAW, ScoreOnly())
    tree = check.out_of_distribution(prior, noisy(draw(LAW, 2, KEYS[0])), key=KEYS[3], num_draws=40)
    assert sorted(tree.children) == ["score_norms"]


EVENTS = np.random.default_rng(1).normal(size=(12, *SHAPE))
ONES = check.CosineSimilarity()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check.held_out_bits(PRIOR, EVENTS[:, :4], key=KEYS[0]),
            r"held_out must be \[n, \*\(8, 8\)\], got shape \(12, 4, 8\)",
        ),
        (lambda: check.held_out_bits(PRIOR, EVENTS[:9], key=KEYS[0]), "at least 10 events, got 9"),
        (lambda: check.spectrum(EVENTS, EVENTS[:, :4]), r"alike, got \(12, 8, 8\) and \(12, 4, 8"),
        (lambda: check.spectrum(EVENTS[0], EVENTS), r"draws must be images .* got shape \(8, 8\)"),
        (lambda: check.spectrum(EVENTS, EVENTS * np.nan), "data must be finite, got 768 of 768"),
        (lambda: check.spectrum(EVENTS, 0 * EVENTS), "must have power at every frequency"),
        (lambda: check.vendi_score(0 * EVENTS, ONES), "events must not be zero, got 12"),
        (lambda: check.vendi_score(EVENTS, ONES, orders=[0.0]), "orders must be positive.*0.0"),
        (lambda: check.GaussianSimilarity(-1.0), "length must be a positive finite number"),
        (lambda: check.diversity(EVENTS, EVENTS[:11], ONES), r"one shape, got \(12, 8, 8\) and"),
        (
            lambda: check.memorisation(EVENTS, EVENTS[:, :4], EVENTS),
            r"events of one shape, got .*'training': \(12, 4, 8\)",
        ),
        (
            lambda: check.out_of_distribution(PRIOR, EVENTS, key=KEYS[0], num_draws=39),
            "num_draws must be at least 40, got 39",
        ),
        (
            lambda: check.out_of_distribution(PRIOR, EVENTS, key=KEYS[0], reference=EVENTS),
            "reference must hold at least 40 events, got 12",
        ),
        (
            lambda: check.out_of_distribution(PRIOR, EVENTS, key=KEYS[0], levels=jnp.zeros(2)),
            "levels must be a positive finite number",
        ),
    ],
)
def test_bad_input_is_named(as_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Pictures.


def test_pictures_show_the_tree():
    x, y = draw(LAW, 30, KEYS[0]), draw(LAW, 40, KEYS[1])
    images = [ax.images[0].get_array() for ax in check.plot_draws(x, y, num=9).axes]
    np.testing.assert_array_equal(images, np.concatenate([y[:9], x[:9]]))
    scaled = check.plot_draws(x, y, num=9, is_common_scale=True).axes
    both = np.concatenate([y[:9], x[:9]])
    assert {ax.images[0].get_clim() for ax in scaled} == {(both.min(), both.max())}

    tree = check.memorisation(x, y, noisy(y))
    shown = [ax.images[0].get_array() for ax in check.plot_nearest(x, y, tree, num=3).axes]
    order = np.argsort(tree["draws"]["distance"].values)[:3]
    nearest = tree["draws"]["nearest"].values[order]
    np.testing.assert_array_equal(shown, np.concatenate([x[order], y[nearest]]))
    axes = check.plot_memorisation(tree).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["held out", "draws"]
    areas = [sum(bar.get_width() * bar.get_height() for bar in bars) for bars in axes.containers]
    np.testing.assert_allclose(areas, 1)

    tree = check.spectrum(x, y)
    lines = check.plot_spectrum(tree).axes[0].lines
    for line, name in zip(lines, ("data", "draws"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), tree[name]["median"])

    tree = check.diversity(x, y[:30], check.GaussianSimilarity(5.0), num_permutations=19)
    lines = check.plot_diversity(tree).axes[0].lines
    for line, name in zip(lines, ("data", "draws"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), tree["vendi"][name])

    tree = check.held_out_bits(PRIOR, y, key=KEYS[2], num_draws=10)
    assert len(check.plot_bits(tree).axes[0].containers) == 3
    tree = check.out_of_distribution(PRIOR, x[:2], key=KEYS[2], num_draws=60)
    norms, density = check.plot_out_of_distribution(tree).axes
    group = tree["score_norms"]
    less = group["observed"].values[1] - np.median(group["simulated"].values, 0)
    np.testing.assert_array_equal(norms.lines[1].get_ydata(), less)
    at = [line.get_xdata()[0] for line in density.lines]
    np.testing.assert_array_equal(at, tree["log_density"]["observed"])
    with pytest.raises(ValueError, match="must have power in its group data, as check.spectrum"):
        check.plot_spectrum(tree)
    with pytest.raises(ValueError, match=r"draws must be images \[n, row, col\]"):
        check.plot_draws(x[0], y)
