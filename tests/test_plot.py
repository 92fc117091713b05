"""Posterior panels: what is drawn is what was asked for, on one scale, hidden pixels marked."""

import subprocess
import sys

import arviz as az
import matplotlib.figure
import numpy as np
import pytest

from scoreprior.plot import Predictions, plot_posterior_images, plot_residuals

rng = np.random.default_rng(0)
TRUTH = rng.uniform(size=(4, 6))
DRAWS = TRUTH + 0.1 * rng.normal(size=(2, 30, 4, 6))
DATA = np.where(np.arange(4)[:, None] < 2, TRUTH + rng.normal(size=(4, 6)), np.nan)


@pytest.fixture(scope="module")
def tree():
    return az.from_dict({"posterior": {"x": DRAWS, "level": DRAWS[..., 0, 0]}})


def panels(figure):
    """Image and colour limits by title."""
    images = {ax.get_title(): ax.images[0] for ax in figure.axes if ax.images}
    return {name: (image.get_array(), image.get_clim()) for name, image in images.items()}


def test_the_panels_hold_what_they_say(tree):
    found = panels(plot_posterior_images(tree, "x", truth=TRUTH, data=DATA, num_draws=4))
    rank = next(name for name in found if name.startswith("Truth: "))
    names = ["Truth", "Data", "Posterior mean", "Posterior sd", rank]
    assert list(found) == [*names, *(f"Draw {i}" for i in range(1, 5))]
    flat = DRAWS.reshape(-1, 4, 6)
    np.testing.assert_allclose(found["Truth"][0], TRUTH)
    np.testing.assert_allclose(found["Posterior mean"][0], flat.mean(0))
    np.testing.assert_allclose(found["Posterior sd"][0], flat.std(0, ddof=1))
    for i, row in enumerate([7, 22, 37, 52]):  # two out of each of the chains
        np.testing.assert_allclose(found[f"Draw {i + 1}"][0], flat[row])


def test_images_share_a_scale_and_the_sd_has_its_own(tree):
    found = panels(plot_posterior_images(tree, "x", truth=TRUTH, data=DATA))
    sd = found.pop("Posterior sd")[1]
    found = {name: panel for name, panel in found.items() if not name.startswith("Truth: ")}
    assert len({limits for _, limits in found.values()}) == 1
    assert sd == (0.0, pytest.approx(DRAWS.reshape(-1, 4, 6).std(0, ddof=1).max()))
    low, high = found["Truth"][1]
    assert DRAWS.min() < low < high < DRAWS.max()


def test_hidden_pixels_show_the_hatched_ground(tree):
    figure = plot_posterior_images(tree, "x", truth=TRUTH, data=DATA)
    (ax,) = (ax for ax in figure.axes if ax.get_title() == "Data")
    np.testing.assert_array_equal(ax.images[0].get_array().mask, np.isnan(DATA))
    assert ax.patch.get_hatch()


def test_data_of_another_size_and_nothing_but_the_posterior(tree):
    found = panels(plot_posterior_images(tree, "x", data=np.ones((2, 3)), num_draws=0))
    assert list(found) == ["Data", "Posterior mean", "Posterior sd"]
    assert found["Data"][0].shape == (2, 3)


def test_it_saves_without_a_display_or_pyplot(tree, tmp_path):
    figure = plot_posterior_images(tree, "x", truth=TRUTH, title="A title")
    assert isinstance(figure, matplotlib.figure.Figure)
    figure.savefig(tmp_path / "p.png", dpi=50)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    code = "import scoreprior.plot, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_constant_images_are_drawn():
    flat = az.from_dict({"posterior": {"x": np.ones((1, 9, 2, 2))}})
    plot_posterior_images(flat, "x").canvas.draw()


@pytest.mark.usefixtures("as_user")
def test_bad_arguments_are_named(tree):
    with pytest.raises(ValueError, match=r"var must name a variable.*\['level', 'x'\], got 'y'"):
        plot_posterior_images(tree, "y")
    with pytest.raises(ValueError, match=r"'level' of shape \(2, 30\)"):
        plot_posterior_images(tree, "level")
    with pytest.raises(ValueError, match=r"truth must be an image, \[row, col\], got shape \(3,\)"):
        plot_posterior_images(tree, "x", truth=np.ones(3))
    with pytest.raises(ValueError, match=r"truth must have the shape of the image, \(4, 6\)"):
        plot_posterior_images(tree, "x", truth=np.ones((2, 2)))
    with pytest.raises(ValueError, match="num_draws must be at most 60"):
        plot_posterior_images(tree, "x", num_draws=61)


def test_the_map_of_ranks_says_where_the_truth_lies(tree):
    found = panels(plot_posterior_images(tree, "x", truth=TRUTH))
    (name,) = (name for name in found if name.startswith("Truth: "))
    flat = np.sort(DRAWS.reshape(-1, 4, 6), axis=0)
    rank = np.array(
        [np.searchsorted(flat[:, i, j], TRUTH[i, j]) for i in range(4) for j in range(6)]
    )
    np.testing.assert_allclose(found[name][0].ravel(), rank / 60)
    within = np.mean((rank >= 3) & (rank <= 57))
    assert name == f"Truth: {100 * within:.0f} % in 90 %"
    # A truth beyond all draws is within none of their intervals.
    assert "Truth: 0 % in 90 %" in panels(plot_posterior_images(tree, "x", truth=TRUTH + 9))


@pytest.fixture
def phases():
    sd = rng.uniform(5, 20, 400)
    predicted = rng.uniform(-180, 180, 400) + rng.normal(0, 1, (50, 400))
    observed = (predicted[0] + sd * rng.normal(size=400) + 180) % 360 - 180
    return Predictions(observed, predicted, sd, period=360.0, label="degrees")


def test_residuals_of_right_predictions_have_unit_size(phases):
    assert abs(phases.chi_squared() - 1) < 5 * np.sqrt(2 / 400)
    # Twice the stated noise, or angles that are not wrapped, do not.
    assert phases._replace(sd=np.asarray(phases.sd) / 2).chi_squared() > 3
    assert phases._replace(period=None).chi_squared() > 3
    gap = (phases.observed - phases.predicted[0] + 180) % 360 - 180
    np.testing.assert_allclose(phases.residuals()[0], gap / phases.sd)


def test_residuals_are_drawn_a_row_for_each_product(phases):
    figure = plot_residuals({"closure phases": phases, "again": phases})
    parts = figure.subfigs
    assert [part.get_suptitle() for part in parts] == [
        f"{name}: chi-squared {phases.chi_squared():.2f} per datum"
        for name in ("closure phases", "again")
    ]
    drawn = parts[0].axes[1].lines[-1].get_ydata()
    np.testing.assert_allclose(drawn, phases.residuals().mean(0))


@pytest.mark.usefixtures("as_user")
def test_bad_products_are_named(phases):
    with pytest.raises(ValueError, match="products must hold at least one"):
        plot_residuals({})
    with pytest.raises(ValueError, match=r"products\['a'\] must have observed \[n\].*\(400,\)"):
        plot_residuals({"a": phases._replace(sd=1.0)})
    with pytest.raises(ValueError, match=r"with x \(3,\)"):
        plot_residuals({"a": phases._replace(x=np.arange(3))})
    with pytest.raises(ValueError, match=r"observed of products\['a'\] must be finite"):
        plot_residuals({"a": phases._replace(observed=np.full(400, np.nan))})
    with pytest.raises(ValueError, match=r"sd of products\['a'\] must be positive, got 0"):
        plot_residuals({"a": phases._replace(sd=np.zeros(400))})
