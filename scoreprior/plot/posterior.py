"""The posterior of an image, on one page."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike

from scoreprior._util import check_count

# Both take long to load: not before they are needed.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from xarray import DataTree
else:
    Axes = DataTree = Figure = Any

SIDE, GAP, BAR, MARGIN, HEAD = 1.15, 0.1, 0.09, 0.12, 0.24
"""Inches: width of an image, between images, of a colour bar, around the page, of a title."""

RANKS = (0.0, 0.05, 0.25, 0.75, 0.95, 1.0)
RANK_COLOURS = ("#b2182b", "#f4a582", "#f7f7f7", "#92c5de", "#2166ac")
"""Shares of draws below the truth, and a colour for each stretch: the ends are beyond the central
90 %, the middle half is nearly white."""


def plot_posterior_images(
    tree: DataTree,
    var: str,
    *,
    truth: ArrayLike | None = None,
    data: ArrayLike | None = None,
    num_draws: int = 6,
    cmap: str = "gray_r",
    title: str | None = None,
) -> Figure:
    """Truth, data, posterior mean, standard deviation, coverage and draws of an image, on one page.

    **Arguments:** `tree`, as `infer` returns it; `var`, the image [chain, draw, row, col] in its
    `posterior`; `truth` [row, col] and `data`, an image in the units of the truth, of any size,
    NaN where nothing was observed (hatched), each left out when `None`; `num_draws`, taken evenly
    out of the chains laid end to end; `cmap`, matplotlib's name of a colour map for the images;
    `title`, above everything.

    All images share one colour scale, from the 1st to the 99th percentile of all but the data;
    arrows at its ends tell that some pixels go beyond. The standard deviation has its own scale.
    With a truth comes a map of its rank, the share of draws below it in each pixel, in five
    colours: red where the truth is below the central 90 % of the draws, dark blue where it is
    above. Pixels of one image are dependent, so that the share within 90 %, in the title, varies
    more than that of independent ones.
    """
    draws = _draws(tree, var)
    check_count("num_draws", num_draws, least=0)
    if num_draws > len(draws):
        raise ValueError(
            f"num_draws must be at most {len(draws)}, the draws there, got {num_draws}"
        )
    # Midpoints of equal stretches: the same number out of each of the chains.
    picks = draws[((np.arange(num_draws) + 0.5) * len(draws) / max(num_draws, 1)).astype(int)]
    shown = {"Truth": truth, "Data": data, "Posterior mean": draws.mean(0)}
    top = {name: _image(name.lower(), image) for name, image in shown.items() if image is not None}
    below = {f"Draw {i + 1}": image for i, image in enumerate(picks)}
    if truth is not None and top["Truth"].shape != draws.shape[1:]:
        raise ValueError(
            f"truth must have the shape of the image, {draws.shape[1:]}, got {top['Truth'].shape}"
        )
    rank = None if truth is None else _rank(draws, top["Truth"])
    return _figure(top, draws.std(0, ddof=1), rank, below, cmap, title)


def _figure(
    top: dict[str, np.ndarray],
    sd: np.ndarray,
    rank: np.ndarray | None,
    below: dict[str, np.ndarray],
    cmap: str,
    title: str | None,
) -> Figure:
    from matplotlib.figure import Figure

    height = SIDE * sd.shape[0] / sd.shape[1]
    bar_room = BAR + 0.36
    num_bars = 2 if rank is None else 3
    width_top = (len(top) + num_bars - 1) * (SIDE + GAP) + num_bars * bar_room
    width = 2 * MARGIN + max(width_top, len(below) * (SIDE + GAP)) - GAP
    page = MARGIN + (height + HEAD) * (2 if below else 1) + (0.2 if title else 0)
    figure = Figure(figsize=(width, page))

    def axes(x: float, row: int, across: float = SIDE) -> Axes:
        y = MARGIN + (height + HEAD if below and row == 0 else 0)
        return figure.add_axes((x / width, y / page, across / width, height / page))

    limits = _limits([image for name, image in (top | below).items() if name != "Data"])
    drawn = [
        _show(axes(MARGIN + i * (SIDE + GAP), 0), name, image, limits, cmap)
        for i, (name, image) in enumerate(top.items())
    ][-1]
    x = MARGIN + len(top) * (SIDE + GAP)
    _bar(axes(x - GAP / 2, 0, BAR), drawn, _beyond([*top.values(), *below.values()], limits))
    x += bar_room
    drawn = _show(axes(x, 0), "Posterior sd", sd, (0.0, float(sd.max())), "viridis")
    _bar(axes(x + SIDE + GAP / 2, 0, BAR), drawn, "neither")
    if rank is not None:
        x += SIDE + GAP + bar_room
        _show_rank(axes(x, 0), axes(x + SIDE + GAP / 2, 0, BAR), rank)
    for i, (name, image) in enumerate(below.items()):
        _show(axes(MARGIN + i * (SIDE + GAP), 1), name, image, limits, cmap)
    if title:
        figure.suptitle(title, x=MARGIN / width, y=1 - 0.08 / page, ha="left", va="top", fontsize=8)
    return figure


def _show(
    ax: Axes, name: str, image: np.ndarray, limits: tuple[float, float], cmap: "str | Colormap"
) -> "AxesImage":
    """Draw an image; the hatched background shows where it is NaN."""
    ax.set_title(name, fontsize=8, pad=3)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(linewidth=0.5, color="0.4")
    ax.patch.set(facecolor="0.95", edgecolor="0.7", hatch="/////")
    low, high = limits
    return ax.imshow(
        np.ma.masked_invalid(image),
        cmap=cmap,
        vmin=low,
        vmax=high,
        interpolation="none",
        aspect="auto",
    )


def _show_rank(ax: Axes, ax_bar: Axes, rank: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    within = np.mean((rank >= RANKS[1]) & (rank <= RANKS[-2]))
    colours = ListedColormap(RANK_COLOURS)
    drawn = _show(ax, f"Truth: {100 * within:.0f} % in 90 %", rank, (0.0, 1.0), colours)
    drawn.set_norm(BoundaryNorm(RANKS, colours.N))
    _bar(ax_bar, drawn, "neither")
    ax_bar.set_yticks(RANKS, [f"{share:g}" for share in RANKS])


def _rank(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of draws below the truth, half of those that equal it."""
    return (draws < truth).mean(0) + (draws == truth).mean(0) / 2


def _bar(ax: Axes, drawn: "AxesImage", extend: str) -> None:
    bar = ax.figure.colorbar(drawn, cax=ax, extend=extend)
    bar.ax.tick_params(labelsize=7, length=2, width=0.5, pad=2)
    bar.outline.set(linewidth=0.5, edgecolor="0.4")


def _limits(images: list[np.ndarray]) -> tuple[float, float]:
    """Ends of the colour scale: all but the extreme hundredths, so one pixel does not set it."""
    low, high = np.percentile(np.concatenate([image.ravel() for image in images]), [1, 99])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _beyond(images: list[np.ndarray], limits: tuple[float, float]) -> str:
    """Which ends of the colour scale are exceeded, as matplotlib says it."""
    below = any(np.nanmin(image) < limits[0] for image in images)
    above = any(np.nanmax(image) > limits[1] for image in images)
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def _draws(tree: DataTree, var: str) -> np.ndarray:
    """All draws of an image, [draw, row, col], chain after chain."""
    names = sorted(map(str, tree["posterior"].data_vars))
    if var not in names:
        raise ValueError(f"var must name a variable of the posterior, {names}, got {var!r}")
    draws = np.asarray(tree["posterior"][var])
    if draws.ndim != 4:
        raise ValueError(
            f"var must be an image, [chain, draw, row, col], got {var!r} of shape {draws.shape}"
        )
    return draws.reshape(-1, *draws.shape[2:])


def _image(name: str, image: ArrayLike) -> np.ndarray:
    array = np.asarray(image, float)
    if array.ndim != 2:
        raise ValueError(f"{name} must be an image, [row, col], got shape {array.shape}")
    return array
