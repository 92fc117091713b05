"""Pictures of checks of priors, in ArviZ's style.

Figures are made without `pyplot`'s state: save one with `figure.savefig("draws.png", dpi=150)`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike

from scoreprior._util import check_count
from scoreprior.check._inputs import check_no_nan
from scoreprior.check.plots import _bins, _colours, _group, _page, _title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import DataTree
else:
    Axes = DataTree = Figure = Any

COLUMNS = 8


def plot_draws(
    draws: ArrayLike, data: ArrayLike, *, num: int = 24, is_common_scale: bool = False
) -> Figure:
    """Draws of a prior below images of the data, eight in a row, `num` of each.

    **Arguments:** `draws` and `data` [n, row, col]; `is_common_scale`, one scale of brightness for
    all instead of one for each.
    """
    rows = {"data": _images("data", data)[:num], "draws": _images("draws", draws)[:num]}
    check_count("num", num)
    limits = None
    if is_common_scale:
        both = np.concatenate(list(rows.values()))
        limits = both.min(), both.max()
    return _gallery(rows, limits)


def plot_nearest(draws: ArrayLike, training: ArrayLike, tree: DataTree, *, num: int = 8) -> Figure:
    """The draws nearest to training images, above the training images that they are nearest to.

    **Arguments:** those that `memorisation` was given, as images [n, row, col], and its tree. The
    distance stands above each pair.
    """
    near = _group(tree, "draws", "nearest", "memorisation")
    left, right = _images("draws", draws), _images("training", training)
    if len(left) != near.sizes["event"]:
        raise ValueError(f"draws must be those of tree, {near.sizes['event']}, got {len(left)}")
    check_count("num", num)
    order = np.argsort(near["distance"].values)[: min(num, COLUMNS)]
    chosen = near["nearest"].values[order]
    rows = {"draws": left[order], "nearest training image": right[chosen]}
    titles = [f"{near['distance'].values[i]:.3g}" for i in order]
    return _gallery(rows, None, titles)


def plot_bits(tree: DataTree) -> Figure:
    """Bits per dimension of held-out events, of the same under a Gaussian, and of draws."""
    held_out = _group(tree, "held_out", "bits", "held_out_bits")
    draws = _group(tree, "draws", "bits", "held_out_bits")
    values = {
        "held out": held_out["bits"].values,
        "draws": draws["bits"].values,
        "held out, Gaussian": held_out["gaussian"].values,
    }
    with _page(1) as (figure, (ax,)):
        _histograms(ax, values)
        ax.set_xlabel("bits per dimension")
        ax.set_title(_title("bits", tree.attrs["p_value"]))
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_spectrum(tree: DataTree) -> Figure:
    """Median power of draws and of data against frequency, with bands over images."""
    sets = {name: _group(tree, name, "power", "spectrum") for name in ("data", "draws")}
    with _page(1) as (figure, (ax,)):
        for (name, each), colour in zip(sets.items(), _colours()[::-1], strict=True):
            frequency = each["frequency"].values
            band = each["lower"].values, each["upper"].values
            ax.fill_between(frequency, *band, color=colour, alpha=0.25, linewidth=0)
            ax.plot(frequency, each["median"].values, color=colour, label=name)
        ax.set_yscale("log")
        ax.set_xlabel("cycles per pixel")
        ax.set_ylabel("power")
        ax.set_title(_title("spectrum", tree.attrs["p_value"]))
        ax.legend()
    return figure


def plot_diversity(tree: DataTree) -> Figure:
    """Vendi scores of draws and of data by order."""
    scores = _group(tree, "vendi", "draws", "diversity")
    labels = [f"{order:g}" for order in scores["order"].values]
    with _page(1) as (figure, (ax,)):
        blue, red = _colours()
        ax.plot(labels, scores["data"].values, "o-", color=red, label="data")
        ax.plot(labels, scores["draws"].values, "o-", color=blue, label="draws")
        ax.set_yscale("log")
        ax.set_xlabel("order q")
        ax.set_ylabel(f"Vendi score of {tree.attrs['num']}")
        ax.set_title(_title("diversity", tree.attrs["p_value"]))
        ax.legend()
    return figure


def plot_memorisation(tree: DataTree) -> Figure:
    """Distances to the nearest training event, of draws and of held-out events."""
    values = {
        label: _group(tree, name, "distance", "memorisation")["distance"].values
        for name, label in (("held_out", "held out"), ("draws", "draws"))
    }
    with _page(1) as (figure, (ax,)):
        _histograms(ax, values)
        ax.set_xlabel("distance to the nearest training event")
        ax.set_title(_title("memorisation", tree.attrs["p_value"]))
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_out_of_distribution(tree: DataTree) -> Figure:
    """Score norms of events over levels, in the band of 90 % of draws; and log densities."""
    norms = _group(tree, "score_norms", "observed", "out_of_distribution")
    has_density = "log_density" in tree.children
    with _page(1 + has_density) as (figure, axes):
        blue, red = _colours()
        level, drawn = norms["level"].values, norms["simulated"].values
        middle = np.median(drawn, 0)
        lower, upper = np.quantile(drawn, [0.05, 0.95], axis=0) - middle
        axes[0].fill_between(level, lower, upper, color=blue, alpha=0.25, label="draws, 90 %")
        for i, row in enumerate(norms["observed"].values):
            label = "events" if i == 0 else None
            axes[0].plot(level, row - middle, color=red, linewidth=1, label=label)
        axes[0].set_xscale("log")
        axes[0].set_xlabel("noise level")
        axes[0].set_ylabel("log score norm less its median")
        axes[0].set_title(_title("score norms", float(norms["p_value"].min())))
        if has_density:
            density = tree["log_density"].to_dataset()
            simulated = density["simulated"].values
            axes[1].hist(simulated, _bins(simulated), color=blue, alpha=0.5, density=True)
            for value in density["observed"].values:
                axes[1].axvline(value, color=red, linewidth=1)
            axes[1].set_xlabel("log density")
            axes[1].set_yticks([])
            axes[1].set_title(_title("log density", float(density["p_value"].min())))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _histograms(ax: Axes, values: dict[str, np.ndarray]) -> None:
    """Histograms on common bins, of one area each."""
    everything = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(everything, _bins(everything)).tolist()
    for (name, each), colour in zip(values.items(), [*_colours()[::-1], "0.5"], strict=False):
        ax.hist(each, edges, density=True, alpha=0.5, color=colour, label=name)
    ax.set_yticks([])


def _gallery(
    rows: dict[str, np.ndarray],
    limits: tuple[float, float] | None,
    titles: list[str] | None = None,
) -> Figure:
    """Blocks of images under their names, eight in a row."""
    from matplotlib.figure import Figure

    heights = [-(-len(images) // COLUMNS) for images in rows.values()]
    figure = Figure(figsize=(1.1 * COLUMNS, 1.2 * sum(heights) + 0.3 * len(rows)))
    figure.set_layout_engine("constrained")
    blocks = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, height, (name, images) in zip(blocks, heights, rows.items(), strict=True):
        block.suptitle(name, fontsize=9)
        for i, image in enumerate(images):
            ax = block.add_subplot(height, COLUMNS, i + 1)
            low, high = (None, None) if limits is None else limits
            ax.imshow(image, cmap="inferno", vmin=low, vmax=high)
            ax.set_axis_off()
            if titles is not None:
                ax.set_title(titles[i], fontsize=7)
    return figure


def _images(name: str, images: ArrayLike) -> np.ndarray:
    found = np.asarray(images, float)
    if found.ndim != 3 or not len(found):
        raise ValueError(f"{name} must be images [n, row, col], got shape {found.shape}")
    check_no_nan(name, found)
    return found


__all__ = [
    "plot_bits",
    "plot_diversity",
    "plot_draws",
    "plot_memorisation",
    "plot_nearest",
    "plot_out_of_distribution",
    "plot_spectrum",
]
