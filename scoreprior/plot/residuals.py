"""What a posterior says of the data that it was given."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike

# Takes long to load: not before it is needed.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

WIDTH, HEIGHT = 7.0, 2.8
"""Inches of the page, and of one data product."""

DATA, FIT = "black", "#3b6ea5"


class Predictions(NamedTuple):
    """Measurements of one kind beside what draws of the posterior predict for them.

    **Attributes:** `observed` [n]; `predicted` [draw, n], noise-free; `sd` [n], of the noise;
    `x` [n], where to draw them, by number if `None`; `x_label` and `label`, of the axes; `period`
    of an angle (360 in degrees), whose residuals are wrapped.
    """

    observed: ArrayLike
    predicted: ArrayLike
    sd: ArrayLike
    x: ArrayLike | None = None
    x_label: str = "datum"
    label: str = ""
    period: float | None = None

    def residuals(self) -> np.ndarray:
        """`(y - f(x)) / sd`, [draw, n]."""
        gap = np.asarray(self.observed, float) - np.asarray(self.predicted, float)
        if self.period is not None:
            gap = gap - self.period * np.round(gap / self.period)
        return gap / np.asarray(self.sd, float)

    def chi_squared(self) -> float:
        """Mean over draws of the mean squared residual: about 1 where model and noise are right.

        Divided by the number of data, not of degrees of freedom, which a posterior does not have:
        the draws spread about the best fit, which makes up for what that fit has taken in.
        """
        return float(np.mean(self.residuals() ** 2))


def plot_residuals(products: Mapping[str, Predictions]) -> Figure:
    """Data over the central 90 % of predictions, and residuals in standard deviations below.

    One row for each of the `products`, by name; its chi-squared per datum is in the title.

    **Raises:** `ValueError` for no product, shapes that disagree, values that are not finite and
    standard deviations that are not positive.
    """
    from matplotlib.figure import Figure

    if not products:
        raise ValueError("products must hold at least one, got none")
    for name, product in products.items():
        _check(name, product)
    figure = Figure(figsize=(WIDTH, HEIGHT * len(products)), layout="constrained")
    parts = figure.subfigures(len(products), squeeze=False)[:, 0]
    for part, (name, product) in zip(parts, products.items(), strict=True):
        above, below = part.subplots(2, sharex=True, height_ratios=[2, 1])
        part.suptitle(
            f"{name}: chi-squared {product.chi_squared():.2f} per datum", fontsize=9, x=0.5
        )
        _draw(above, below, product)
    return figure


def _draw(above: Axes, below: Axes, product: Predictions) -> None:
    observed, sd = np.asarray(product.observed, float), np.asarray(product.sd, float)
    x = np.arange(len(observed)) if product.x is None else np.asarray(product.x, float)
    residuals = product.residuals()
    # About the observed value, so that an angle stays on its side of the cut.
    low, middle, high = observed - sd * np.quantile(residuals, [0.95, 0.5, 0.05], axis=0)
    style = {"linestyle": "none", "linewidth": 0.8}
    above.vlines(x, low, high, color=FIT, linewidth=3, alpha=0.35, label="90 % of the posterior")
    above.plot(x, middle, "_", color=FIT, markersize=5)
    above.errorbar(x, observed, sd, fmt=".", color=DATA, markersize=3, elinewidth=0.6, label="data")
    above.set_ylabel(product.label)
    above.legend(frameon=False, fontsize=7, ncols=2)
    below.axhspan(-2, 2, color="0.92")
    below.axhline(0, color="0.6", linewidth=0.6)
    below.plot(x, residuals.mean(0), ".", color=DATA, markersize=3, **style)
    reach = 1.1 * max(3.0, np.abs(residuals.mean(0)).max())
    below.set(xlabel=product.x_label, ylabel="off, sd", ylim=(-reach, reach))


def _check(name: str, product: Predictions) -> None:
    observed, predicted = np.asarray(product.observed), np.asarray(product.predicted)
    shapes = {"sd": np.shape(product.sd), "predicted": predicted.shape[1:]}
    if product.x is not None:
        shapes["x"] = np.shape(product.x)
    if (
        observed.ndim != 1
        or predicted.ndim != 2
        or any(s != observed.shape for s in shapes.values())
    ):
        raise ValueError(
            f"products[{name!r}] must have observed [n], predicted [draw, n] and sd [n], got "
            f"{observed.shape}, {predicted.shape} and {shapes['sd']}"
            + (f", with x {shapes['x']}" if "x" in shapes else "")
        )
    for field in ("observed", "predicted", "sd"):
        if not np.all(np.isfinite(np.asarray(getattr(product, field), float))):
            raise ValueError(
                f"{field} of products[{name!r}] must be finite, got a value that is not"
            )
    if np.min(product.sd) <= 0:
        raise ValueError(f"sd of products[{name!r}] must be positive, got {np.min(product.sd):g}")


__all__ = ["Predictions", "plot_residuals"]
