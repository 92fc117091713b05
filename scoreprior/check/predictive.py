"""Predictive checks: do observed data look like those that a model or its posterior simulates?

All p-values are `(1 + #{as extreme}) / (1 + num)`, of `num` simulated values: never zero, and at
most the level with its probability when observed and simulated data are exchangeable.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
from jaxtyping import ArrayLike

from scoreprior._util import check_count
from scoreprior.check._inputs import (
    LEAST,
    Predictions,
    Values,
    as_attrs,
    bonferroni,
    check_least,
    check_no_nan,
    predictions,
    varies,
)

if TYPE_CHECKING:
    from xarray import Dataset, DataTree
else:
    Dataset = DataTree = Any

CHUNK = 2**22
"""Entries of an array of differences at a time."""


class AbstractDistance(eqx.Module):
    """How far points are from a cloud: call it with points [n, d] and a cloud [num, d]."""

    def __call__(self, points: np.ndarray, cloud: np.ndarray) -> np.ndarray:
        """Distances [n]."""
        raise NotImplementedError


class Mahalanobis(AbstractDistance):
    """`sqrt((x - m)' C^-1 (x - m))`, with mean `m` and covariance `C` of the cloud.

    Sees the level and linear relations of entries. Raises `ValueError` for a cloud whose covariance
    is singular, of no more points than dimensions in any case.
    """

    def __call__(self, points: np.ndarray, cloud: np.ndarray) -> np.ndarray:
        mean, cov = cloud.mean(0), np.atleast_2d(np.cov(cloud, rowvar=False))
        sd = np.sqrt(np.diag(cov))
        values, vectors = np.linalg.eigh(cov / np.outer(sd, sd))
        rank = int((values > values.max() * len(values) * np.finfo(float).eps * 10).sum())
        if rank < len(values):
            raise ValueError(
                f"Mahalanobis needs a covariance of full rank, got rank {rank} of {len(values)} "
                f"from {len(cloud)} simulations: simulate more, or reduce the data"
            )
        return np.sqrt((((points - mean) / sd @ vectors) ** 2 / values).sum(-1))


class Nearest(AbstractDistance):
    """Mean Euclidean distance to the `num` nearest points of the cloud, in standard deviations.

    Sees holes of the cloud, and data beside a curved one, that `Mahalanobis` takes for its middle.
    """

    num: int = eqx.field(default=5, static=True)

    def __check_init__(self):
        check_count("num", self.num)

    def __call__(self, points: np.ndarray, cloud: np.ndarray) -> np.ndarray:
        if self.num > len(cloud):
            raise ValueError(f"num must be at most {len(cloud)}, of the cloud, got {self.num}")
        return _over_points(
            lambda each: np.partition(each, self.num - 1, axis=1)[:, : self.num].mean(1),
            points,
            cloud,
        )


class Energy(AbstractDistance):
    """Energy distance of a point from the cloud, `2 E|x - X| - E|X - X'|`, in standard deviations.

    Székely & Rizzo (2013), "Energy statistics: a class of statistics based on distances", of a
    point mass. Robust where covariances are not, and in any dimension.
    """

    def __call__(self, points: np.ndarray, cloud: np.ndarray) -> np.ndarray:
        num = len(cloud)
        within = _over_points(lambda each: each.mean(1), cloud, cloud).mean() * num / (num - 1)
        return 2 * _over_points(lambda each: each.mean(1), points, cloud) - within


def _over_points(
    reduce: Callable[[np.ndarray], np.ndarray], points: np.ndarray, cloud: np.ndarray
) -> np.ndarray:
    """`reduce` distances [n, num] of points from a cloud to [n], some points at a time."""
    sd = cloud.std(0)
    points, cloud = points / sd, cloud / sd
    step = max(1, CHUNK // cloud.size)
    parts = [
        reduce(np.linalg.norm(points[i : i + step, None] - cloud, axis=-1))
        for i in range(0, len(points), step)
    ]
    return np.concatenate(parts)


STATISTICS: dict[str, Callable[[Any], Any]] = {
    "mean": np.mean,
    "sd": np.std,
    "smallest": np.min,
    "largest": np.max,
}
DISTANCES = {"Mahalanobis": Mahalanobis(), "Energy": Energy()}
ALARMS = {"Mahalanobis": Mahalanobis(), "Nearest": Nearest()}


def posterior_predictive(
    observed: Values,
    simulated: Values,
    *,
    statistics: Mapping[str, Callable[[Any], Any]] | None = None,
    distances: Mapping[str, AbstractDistance] | None = None,
) -> DataTree:
    """Posterior predictive check: observed data among those simulated from posterior draws.

    Of each statistic `T`, the two-sided p-value `2 min(P(T >= t), P(T <= t))` (Gelman, Meng & Stern
    1996, "Posterior predictive assessment of model fitness via realized discrepancies"), and of
    each distance the one-sided p-value of the observed one among those of held-out simulations:
    those of even number are the cloud, those of odd number are held out. The posterior has seen
    the data, so that p-values are nearer to one half than uniform ones if the model is right:
    small ones accuse it, large ones do not acquit it. From the prior instead of the posterior it is
    a prior predictive check, with p-values that are uniform.

    **Arguments:** `observed` [*event] and `simulated` [num, *event], independent draws of the
    predictive law, at least twenty, or dicts of sites; `statistics`, functions of one data set as
    given, by default mean, sd, smallest and largest of an array's entries; `distances`, by default
    `Mahalanobis` and `Energy`, none with `{}`.

    **Returns** a tree with the groups `statistics` and `distances`: `observed` [statistic],
    `simulated` [statistic, draw] and `p_value` [statistic]. Its attribute `p_value` is that of all
    together (Bonferroni).

    Raises `ValueError` for shapes that disagree, too few simulations, NaN, statistics that are
    not finite numbers, and entries that do not vary, with distances.
    """
    found = predictions(observed, simulated)
    if statistics is None:
        if isinstance(observed, Mapping):
            raise ValueError("statistics must be given for data that are a dict of sites")
        statistics = STATISTICS
    groups = {}
    if statistics:
        groups["statistics"] = _statistics(observed, simulated, statistics)
    distances = DISTANCES if distances is None else distances
    if distances:
        groups["distances"] = _distances(found, distances)
    if not groups:
        raise ValueError("statistics and distances must not both be empty")
    about = "each statistic, two-sided, and each distance, one-sided"
    return _tree("posterior_predictive", about, groups, len(found.simulated))


def misspecification(
    observed: Values,
    simulated: Values,
    *,
    distances: Mapping[str, AbstractDistance] | None = None,
) -> DataTree:
    """Alarm: are the observed data among those that the network was trained on?

    An amortised posterior extrapolates, silently, at data that its simulator does not make. As in
    `posterior_predictive`, the distance of the observed data from a cloud of prior-predictive
    draws (the training simulations), every other one, among those of the rest, held out. Under a
    right model `p_value` is uniform; a small one says that posteriors at `observed` are not to be
    trusted. Schmitt, Bürkner, Köthe & Radev (2023), "Detecting model misspecification in amortized
    Bayesian inference with neural networks", do so in a learned space of summaries: give summaries
    as `observed` and `simulated` for that.

    **Arguments:** `observed` [*event] and `simulated` [num, *event], or dicts of sites;
    `distances`, by default `Mahalanobis` and `Nearest`.

    **Returns** a tree with the group `distances`, as `posterior_predictive` has it. Raises as that.
    """
    found = predictions(observed, simulated)
    distances = ALARMS if distances is None else distances
    if not distances:
        raise ValueError("distances must not be empty")
    groups = {"distances": _distances(found, distances)}
    return _tree("misspecification", "each distance, one-sided", groups, len(found.simulated))


def evidence_ratio(observed: ArrayLike, null: ArrayLike) -> DataTree:
    """Alarm: do several observations share one parameter, as the model says?

    The log evidence ratio `log p(x_1, ..., x_n) - sum_i log p(x_i)`, nats, as composition gives
    it, is low where posteriors given single observations exclude one another. `observed` is that
    of the data, `null` [num] are those of data sets simulated with `n` observations of one shared
    parameter each, drawn from the prior, or from the posterior where settings that are right for
    the data are not for all of it: at least ten, of the same composition and settings, whose errors
    then are in both. `p_value` is the share of `null` as low, one-sided; `p_high` that as
    high, small for observations far out in the prior together, or too much alike.

    **Returns** a tree with the group `statistics`, as `posterior_predictive` has it.

    Raises `ValueError` for shapes other than a number and [num], too few, and NaN.
    """
    value, rest = np.asarray(observed, float), np.asarray(null, float)
    if value.ndim != 0 or rest.ndim != 1:
        raise ValueError(
            f"observed must be one number and null [num], got shapes {value.shape}, {rest.shape}"
        )
    check_least("null", len(rest), "log evidence ratios")
    check_no_nan("observed", value)
    check_no_nan("null", rest)
    low, high = _tails(value[None], rest[None])
    group = _group(["log evidence ratio"], value[None], rest[None], low)
    group["p_high"] = ("statistic", high)
    return _tree(
        "evidence_ratio", "log evidence ratio, lower tail", {"statistics": group}, len(rest)
    )


def _statistics(
    observed: Values, simulated: Values, statistics: Mapping[str, Callable[[Any], Any]]
) -> Dataset:
    if isinstance(observed, Mapping) and isinstance(simulated, Mapping):
        seen = {site: np.asarray(values) for site, values in observed.items()}
        sheets = {site: np.asarray(values) for site, values in simulated.items()}
        num = len(next(iter(sheets.values())))
        rest = [{site: values[i] for site, values in sheets.items()} for i in range(num)]
    else:
        seen, rest = np.asarray(observed), list(np.asarray(simulated))
    at_seen, at_rest = [], []
    for name, statistic in statistics.items():
        values = [np.asarray(statistic(each), float) for each in (seen, *rest)]
        if any(value.ndim for value in values):
            raise ValueError(
                f"statistics must give one number each, got shape {values[0].shape} of {name!r}"
            )
        check_no_nan(f"statistics[{name!r}]", np.array(values))
        at_seen.append(values[0])
        at_rest.append(values[1:])
    first, others = np.array(at_seen), np.array(at_rest)
    p_value = np.minimum(1.0, 2 * np.minimum(*_tails(first, others)))
    return _group(list(statistics), first, others, p_value)


def _distances(found: Predictions, distances: Mapping[str, AbstractDistance]) -> Dataset:
    cloud, held_out = found.simulated[::2], found.simulated[1::2]
    check_least("simulated", len(held_out), "data sets, held out", LEAST)
    varies("simulated", cloud, found.names)
    points = np.concatenate([found.observed[None], held_out])
    values = np.stack([distance(points, cloud) for distance in distances.values()])
    _, far = _tails(values[:, 0], values[:, 1:])
    return _group(list(distances), values[:, 0], values[:, 1:], far)


def _tails(observed: np.ndarray, simulated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares [statistic] of `simulated` [statistic, draw] as low and as high as `observed`."""
    num = simulated.shape[1]
    low = (1 + (simulated <= observed[:, None]).sum(1)) / (1 + num)
    high = (1 + (simulated >= observed[:, None]).sum(1)) / (1 + num)
    return low, high


def _group(
    names: Sequence[str], observed: np.ndarray, simulated: np.ndarray, p_value: np.ndarray
) -> Dataset:
    import xarray as xr

    return xr.Dataset(
        {
            "observed": ("statistic", observed),
            "simulated": (("statistic", "draw"), simulated),
            "p_value": ("statistic", p_value),
        },
        {"statistic": list(names)},
    )


def _tree(check: str, statistic: str, groups: dict[str, Dataset], num: int) -> DataTree:
    import xarray as xr

    p_values = np.concatenate([group["p_value"].values for group in groups.values()])
    attrs = as_attrs(check=check, statistic=statistic, p_value=bonferroni(p_values), num=num)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


__all__ = [
    "AbstractDistance",
    "Energy",
    "Mahalanobis",
    "Nearest",
    "evidence_ratio",
    "misspecification",
    "posterior_predictive",
]
