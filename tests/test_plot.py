"""Posterior panels: what is drawn is what was asked for, on one scale, hidden pixels marked."""

import subprocess
import sys

import arviz as az
import matplotlib.figure
import numpy as np
import pytest

from scoreprior.plot import plot_posterior_images

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
    names = ["Truth", "Data", "Posterior mean", "Posterior sd", *(f"Draw {i}" for i in range(1, 5))]
    assert list(found) == names
    flat = DRAWS.reshape(-1, 4, 6)
    np.testing.assert_allclose(found["Truth"][0], TRUTH)
    np.testing.assert_allclose(found["Posterior mean"][0], flat.mean(0))
    np.testing.assert_allclose(found["Posterior sd"][0], flat.std(0, ddof=1))
    for i, row in enumerate([7, 22, 37, 52]):  # two out of each of the chains
        np.testing.assert_allclose(found[f"Draw {i + 1}"][0], flat[row])


def test_images_share_a_scale_and_the_sd_has_its_own(tree):
    found = panels(plot_posterior_images(tree, "x", truth=TRUTH, data=DATA))
    sd = found.pop("Posterior sd")[1]
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
    with pytest.raises(ValueError, match="num_draws must be at most 60"):
        plot_posterior_images(tree, "x", num_draws=61)
