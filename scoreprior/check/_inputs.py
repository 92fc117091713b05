"""What checks take: true parameters beside posterior draws, and data as rows of numbers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike

Values = ArrayLike | Mapping[str, ArrayLike]
"""Parameters or data: an array, or a dict from a site's name to its array."""

LEAST = 10
"""Fewest replicates, and fewest draws: with fewer, no deviation from calibration could be seen."""


class Pairs(NamedTuple):
    """True parameters and the posterior draws given the data of each."""

    names: list[str]  # of the entries: "theta[0]", or "rate" for a scalar site
    truth: np.ndarray  # [n, entry]
    draws: np.ndarray  # [n, num_draws, entry]


def pairs(truth: Values, draws: Values) -> Pairs:
    """Flatten `truth` [n, *event] and `draws` [n, num_draws, *event], site by site.

    Raises `ValueError` for sites or shapes that disagree, for fewer than ten replicates or draws,
    and for entries that are not finite.
    """
    left, right = sites("truth", truth, "theta"), sites("draws", draws, "theta")
    if list(left) != list(right):
        raise ValueError(
            f"truth and draws must have the same sites, got {list(left)} and {list(right)}"
        )
    names, columns, sheets = [], [], []
    shapes = {}
    for site, true in left.items():
        drawn = right[site]
        shapes[site] = true.shape[:1] + drawn.shape[1:2]
        if true.ndim < 1 or drawn.ndim < 2 or drawn.shape != shapes[site] + true.shape[1:]:
            raise ValueError(
                "truth must be [n, *event] and draws [n, num_draws, *event], got "
                f"{site} of shapes {true.shape} and {drawn.shape}"
            )
        check_least("truth", len(true), "replicates")
        check_least("draws", drawn.shape[1], "draws of each replicate")
        check_no_nan(f"truth[{site!r}]", true)
        check_no_nan(f"draws[{site!r}]", drawn)
        names += entry_names(site, true.shape[1:])
        columns.append(true.reshape(len(true), -1))
        sheets.append(drawn.reshape(*drawn.shape[:2], -1))
    if len(set(shapes.values())) > 1:
        raise ValueError(f"all sites must have one n and one num_draws, got {shapes}")
    return Pairs(names, np.concatenate(columns, -1), np.concatenate(sheets, -1))


def sites(name: str, values: Values, site: str) -> dict[str, np.ndarray]:
    """`values` as a dict of arrays, in order of names; an array alone is called `site`."""
    found = dict(values) if isinstance(values, Mapping) else {site: values}
    if not found:
        raise ValueError(f"{name} must have at least one site, got an empty mapping")
    return {str(key): np.asarray(found[key], float) for key in sorted(found)}


def entry_names(site: str, shape: tuple[int, ...]) -> list[str]:
    """Names of the entries of a site in ArviZ's way: `beta[0, 1]`, or `beta` for a scalar."""
    if not shape:
        return [site]
    return [f"{site}[{', '.join(map(str, index))}]" for index in np.ndindex(*shape)]


class Predictions(NamedTuple):
    """Observed data beside simulated ones, entry by entry."""

    names: list[str]
    observed: np.ndarray  # [entry]
    simulated: np.ndarray  # [num, entry]


def predictions(observed: Values, simulated: Values) -> Predictions:
    """Flatten `observed` [*event] and `simulated` [num, *event], site by site.

    Raises `ValueError` for sites or shapes that disagree, for fewer than twenty simulations, and
    for entries that are not finite.
    """
    left, right = sites("observed", observed, "x"), sites("simulated", simulated, "x")
    if list(left) != list(right):
        raise ValueError(
            f"observed and simulated must have the same sites, got {list(left)} and {list(right)}"
        )
    names = []
    for site, seen in left.items():
        if right[site].ndim < 1 or right[site].shape[1:] != seen.shape:
            raise ValueError(
                "observed must be [*event] and simulated [num, *event], got "
                f"{site} of shapes {seen.shape} and {right[site].shape}"
            )
        check_least("simulated", len(right[site]), "data sets", 2 * LEAST)
        check_no_nan(f"observed[{site!r}]", seen)
        check_no_nan(f"simulated[{site!r}]", right[site])
        names += entry_names(site, seen.shape)
    if len({len(rows) for rows in right.values()}) > 1:
        found = {site: len(rows) for site, rows in right.items()}
        raise ValueError(f"all sites of simulated must have one num, got {found}")
    return Predictions(
        names,
        np.concatenate([seen.ravel() for seen in left.values()]),
        np.concatenate([rows.reshape(len(rows), -1) for rows in right.values()], -1),
    )


def matrix(name: str, values: ArrayLike, num_columns: int | None = None) -> np.ndarray:
    """`values` as rows [n, column]; raises `ValueError` for another shape, too few rows or NaN."""
    rows = np.asarray(values, float)
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"{name} must be a matrix [n, d], got shape {rows.shape}")
    if num_columns is not None and rows.shape[1] != num_columns:
        raise ValueError(f"{name} must have {num_columns} columns, got shape {rows.shape}")
    check_least(name, len(rows), "rows")
    check_no_nan(name, rows)
    return rows


def check_least(name: str, num: int, what: str, least: int = LEAST) -> None:
    """Raise `ValueError` if `num` is below `least`."""
    if num < least:
        raise ValueError(f"{name} must hold at least {least} {what}, got {num}")


def check_no_nan(name: str, values: np.ndarray) -> None:
    """Raise `ValueError` unless all of `values` are finite."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, got {bad} of {values.size} entries NaN or infinite"
        )


def check_prob(name: str, prob: float) -> None:
    """Raise `ValueError` unless `0 < prob < 1`."""
    if not 0 < prob < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {prob!r}")


def varies(name: str, rows: np.ndarray, names: list[str]) -> np.ndarray:
    """Standard deviations of columns; raises `ValueError`, naming them, where one is zero."""
    constant = np.ptp(rows, axis=0) == 0
    if constant.any():
        which = [names[i] for i in np.flatnonzero(constant)]
        raise ValueError(
            f"{name} must vary in every entry, got {len(which)} constant: {which[:5]}; "
            "leave them out"
        )
    return rows.std(0)


def as_attrs(**attrs: Any) -> dict[str, Any]:
    """Attributes of a tree, in plain types that any file format stores."""
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in attrs.items()
    }


def bonferroni(p_values: np.ndarray) -> float:
    """A p-value of all of several tests together, however they depend on one another."""
    return float(min(1.0, p_values.min() * p_values.size))
