"""Pictures of checks, in ArviZ's style: one panel a parameter, its p-value above it.

Figures are made without `pyplot`'s state: save one with `figure.savefig("sbc.png", dpi=150)`.
ArviZ's own `plot_ecdf_pit` takes the tree of `sbc`, too.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import Dataset, DataTree
else:
    Axes = Dataset = DataTree = Figure = Any

STYLE = "arviz-variat"
SIZES = {
    "axes.titlesize": 9,
    "axes.titleweight": "normal",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
}
"""Points, of text in panels this small."""

NUM_COLUMNS = 4
WIDTH, HEIGHT = 3.0, 2.5
"""Inches of a panel."""


def plot_ecdf(tree: DataTree) -> Figure:
    """Ranks of `sbc`: their empirical distribution function less the uniform one, in its band.

    A posterior too narrow gives an arch over the left half and its mirror image below the right
    half; one too wide, the reverse; a biased one, one arch.
    """
    curve = _group(tree, "sbc", "ecdf")
    return _curves(curve, "ecdf", "Fractional rank", "ECDF difference", relative=True)


def plot_coverage(tree: DataTree) -> Figure:
    """Expected coverage against the level of credible regions, with the band of a right posterior.

    Below the diagonal the posterior is too narrow, above it too wide.
    """
    curve = _group(tree, "coverage", "coverage")
    return _curves(curve, "coverage", "Credibility level", "Expected coverage", relative=False)


def plot_tarp(tree: DataTree) -> Figure:
    """Expected coverage of `tarp` against credibility, with the band of a right posterior."""
    curve = _group(tree, "tarp", "coverage")
    return _curves(curve, "coverage", "Credibility level", "Expected coverage", relative=False)


def plot_predictive(tree: DataTree) -> Figure:
    """Statistics and distances of simulated data as histograms, the observed one as a line.

    Takes the trees of `posterior_predictive`, `misspecification` and `evidence_ratio`.
    """
    groups = [name for name in ("statistics", "distances") if name in tree.children]
    if not groups:
        raise ValueError(
            "tree must have a group statistics or distances, as posterior_predictive gives, got "
            f"{sorted(tree.children)}"
        )
    rows = [
        (str(name), values.sel(statistic=name), group == "distances")
        for group in groups
        for values in [tree[group].to_dataset()]
        for name in values["statistic"].values
    ]
    panels = [
        Panel(
            name,
            float(row["observed"]),
            row["simulated"].values,
            float(row["p_value"]),
            "distance" if distance else "statistic",
        )
        for name, row, distance in rows
    ]
    return _histograms(panels, "simulated")


def plot_local_c2st(tree: DataTree) -> Figure:
    """The statistic of `local_c2st` at every observation, among those of permuted labels."""
    found = _group(tree, "local_c2st", "null")
    num = found.sizes["observation"]
    panels = [
        Panel(
            "observation" if num == 1 else f"observation {i}",
            float(row["statistic"]),
            row["null"].values,
            float(row["p_value"]),
            "mean of (probability - 1/2)²",
        )
        for i in range(num)
        for row in [found.isel(observation=i)]
    ]
    return _histograms(panels, "permuted labels")


def plot_c2st(tree: DataTree) -> Figure:
    """Held-out accuracy of every fold of `c2st`, with two standard errors of guessing about 1/2."""
    folds = _group(tree, "c2st", "accuracy")["accuracy"].values
    attrs, places = tree.attrs, np.arange(len(folds)) + 1
    spread = 1 / np.sqrt(2 * attrs["num"] / len(folds))  # twice sqrt(1/4 / draws held out)
    with _page(1) as (figure, (ax,)):
        blue, red = _colours()
        ax.axhspan(0.5 - spread, 0.5 + spread, color="0.5", alpha=0.25, linewidth=0)
        ax.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
        ax.axhline(attrs["accuracy"], color=red, linewidth=2, label="mean")
        ax.plot(places, folds, "o", color=blue, label="folds")
        ax.set_title(_title("C2ST", attrs["p_value"]))
        ax.set(xlabel="Fold", ylabel="Accuracy", xticks=places)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


class Panel(NamedTuple):
    """One number among those that it is compared with."""

    name: str
    observed: float
    null: np.ndarray
    p_value: float
    xlabel: str


def _histograms(panels: list[Panel], null: str) -> Figure:
    with _page(len(panels)) as (figure, axes):
        blue, red = _colours()
        for ax, panel in zip(axes, panels, strict=True):
            bins = _bins(panel.null)
            ax.hist(panel.null, bins, color=blue, alpha=0.5, density=True, label=null)
            ax.axvline(panel.observed, color=red, linewidth=2, label="observed")
            ax.set_title(_title(panel.name, panel.p_value))
            ax.set_xlabel(panel.xlabel)
            ax.set_yticks([])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _curves(curve: Dataset, variable: str, xlabel: str, ylabel: str, *, relative: bool) -> Figure:
    level = np.concatenate([[0.0], curve["level"].values, [1.0]])
    base = level if relative else np.zeros_like(level)

    def ends(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], values, [1.0]]) - base

    lower, upper = ends(curve["lower"].values), ends(curve["upper"].values)
    names = curve["parameter"].values
    with _page(len(names)) as (figure, axes):
        blue, _ = _colours()
        for ax, name in zip(axes, names, strict=True):
            row = curve.sel(parameter=name)
            ax.fill_between(level, lower, upper, color="0.5", alpha=0.25, linewidth=0)
            ax.plot(level, ends(level[1:-1]), color="0.5", linestyle="--", linewidth=1)
            ax.plot(level, ends(row[variable].values), color=blue)
            ax.set_title(_title(str(name), float(row["p_value"])))
            ax.set_xlabel(xlabel)
            ax.set_xticks([0, 0.5, 1])
        for ax in axes[:: min(NUM_COLUMNS, len(names))]:
            ax.set_ylabel(ylabel)
    return figure


@contextmanager
def _page(num: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with `num` panels, four in a row, while ArviZ's style is on."""
    import arviz  # noqa: F401  (it makes its styles known to matplotlib)
    import matplotlib.style
    from matplotlib.figure import Figure

    columns = min(NUM_COLUMNS, num)
    rows = math.ceil(num / columns)
    with matplotlib.style.context([STYLE, SIZES]):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, i + 1) for i in range(num)]


def _colours() -> tuple[str, str]:
    """The first two of the style; `C0` would be looked up when the page is drawn, without it."""
    from matplotlib.colors import to_hex

    return to_hex("C0"), to_hex("C1")


def _bins(values: np.ndarray) -> int:
    """Of one value a single bin; else so many that each holds some."""
    return 1 if np.ptp(values) == 0 else min(40, max(5, math.isqrt(len(values))))


def _title(name: str, p_value: float) -> str:
    return f"{name}, p = {p_value:.2g}"


def _group(tree: DataTree, group: str, variable: str, check: str | None = None) -> Dataset:
    if group not in tree.children or variable not in tree[group].data_vars:
        raise ValueError(
            f"tree must have {variable} in its group {group}, as check.{check or group} gives, got "
            f"groups {sorted(tree.children)}"
        )
    return tree[group].to_dataset()


__all__ = [
    "plot_c2st",
    "plot_coverage",
    "plot_ecdf",
    "plot_local_c2st",
    "plot_predictive",
    "plot_tarp",
]
