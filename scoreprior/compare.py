"""Compare runs of one problem with each other, and models by their evidence `p(y)`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

# ArviZ and xarray take longer to load than everything else together: not before they are needed.
if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataTree
else:
    DataFrame = DataTree = Any


class LogBayesFactor(NamedTuple):
    """`log p(y | first) - log p(y | second)` in nats, and its standard error."""

    value: float
    se: float


def log_bayes_factor(first: DataTree, second: DataTree) -> LogBayesFactor:
    """The log Bayes factor of the model of `first` over that of `second`, from trees by `infer`.

    With equal prior probabilities of the models, that of the first given the data is
    `1 / (1 + exp(-value))`. Errors of independent runs add in squares; that is NaN where a run had
    one group. The models may differ in priors, noise, operator or anything else, but must have the
    same data.

    Raises `ValueError`, naming the tree, for one whose engine gives no evidence or did not reach
    the posterior, and, naming the site, for data that differ.
    """
    _check_data(first, second, ("first", "second"))
    evidences = _evidence(first, "first"), _evidence(second, "second")
    value = evidences[0][0] - evidences[1][0]
    return LogBayesFactor(value, math.hypot(evidences[0][1], evidences[1][1]))


def _evidence(tree: DataTree, name: str) -> tuple[float, float]:
    stats = tree["sample_stats"].to_dataset()
    if "log_evidence" not in stats:
        engine = str(tree.attrs.get("engine", "its engine")).partition("(")[0]
        raise ValueError(
            f"{name} must have log_evidence in sample_stats, but {engine} gives none: run "
            "TemperedSMC, PersistentSMC or NestedSampling"
        )
    value, se = float(stats["log_evidence"]), float(stats["log_evidence_se"])
    if math.isnan(value):
        raise ValueError(
            f"the log_evidence of {name} is NaN: its run stopped before the posterior, resume it"
        )
    return value, se


def _check_data(first: DataTree, second: DataTree, names: tuple[str, str]) -> None:
    data = [
        dict(tree["observed_data"].data_vars) if "observed_data" in tree.children else {}
        for tree in (first, second)
    ]
    both, (one, other) = " and ".join(names), (sorted(map(str, values)) for values in data)
    if one != other:
        raise ValueError(f"{both} must have the same observed sites, got {one} and {other}")
    for site in one:
        here, there = (np.asarray(values[site]) for values in data)
        if here.shape != there.shape or not np.array_equal(here, there, equal_nan=True):
            raise ValueError(
                f"{both} must have the same data, but observed site {site!r} differs: only runs on "
                "one data set can be compared"
            )


def compare(*trees: DataTree, names: Sequence[str] | None = None) -> DataFrame:
    """A table of runs on one posterior problem: what they found, whether they agree, the cost.

    The first tree is the reference. One row per tree, named by its engine or by `names`, over all
    entries of the variables that every tree has in `posterior`:

    - `draws`, `min_ess` (bulk) and `max_r_hat` (of runs with several chains); `ancestors`, the
      effective number of clusters below, of runs by particles;
    - `mean_z_rms`, `mean_z_max`: difference of a mean from that of the reference, in standard
      errors of the two, root mean square and largest. About 1 and below 5 where runs agree;
    - `sd_z_rms`, `sd_z_max`: the same of standard deviations;
    - `mean_shift`: the largest difference of means in standard deviations of the reference, and
      `sd_ratio`, the median ratio of standard deviations to those of the reference: how much a
      disagreement matters;
    - `seconds`, compilation included, and `ess_per_second`, of the smallest `min_ess`;
    - `log_evidence` and `log_evidence_se`, where the engine gives them.

    **Particles** that descend from one ancestor in one group depend on one another: they form a
    cluster. For `TemperedSMC`, `PersistentSMC`, `NestedSampling` and `FeynmanKac`, with clusters
    `c` of `n_c` of all `n` draws `x_i` of mean `m` and standard deviation `s`, the standard errors
    are

        se(m)^2 = sum_c (sum_{i in c} (x_i - m))^2 / (n^2 (1 - sum_c (n_c / n)^2))
        se(s)   = se(s^2) / (2 s), se(s^2) that of the mean of (x_i - m)^2

    and the effective sample size is `s^2 / se(m)^2`. The sum is the estimator of Chan & Lai (2013,
    "A general theory of particle filters in hidden Markov models and some applications"; Lee &
    Whiteley 2018, "Variance estimation in the particle filter"), consistent for many particles
    however much or little their moves forget. Its divisor makes it exact where all draws are
    independent, and where clusters of one size are copies of one draw each.
    `ancestors` is `1 / sum_c (n_c / n)^2`. An error from few of them is itself uncertain, by a
    share of about `1 / sqrt(2 ancestors)`: below some 20, `z` exceed one though runs agree. From a
    single ancestor nothing can be said, and the agreement is NaN.

    What does not apply is NaN; entries that do not vary are left out of the agreement. Raises
    `ValueError` for fewer than two trees, for a wrong number of names, for trees of different data,
    and where a common variable differs in shape.
    """
    if len(trees) < 2:
        raise ValueError(f"trees must be at least two, got {len(trees)}")
    if names is not None and len(names) != len(trees):
        raise ValueError(f"names must be {len(trees)}, one per tree, got {list(names)}")
    labels = list(names) if names is not None else _number([_engine(tree) for tree in trees])
    for label, tree in zip(labels[1:], trees[1:], strict=True):
        _check_data(trees[0], tree, (labels[0], label))
    common = _common(trees, labels)
    moments = [_moments(tree, common) for tree in trees]
    rows = [_row(tree, found, moments[0]) for tree, found in zip(trees, moments, strict=True)]
    return _frame(rows, labels)


class _Moments(NamedTuple):
    """Of every entry of the common variables: mean, sd and their standard errors; ESS and R-hat.

    And the effective number of clusters of draws, NaN where draws have no ancestors.
    """

    mean: np.ndarray
    sd: np.ndarray
    mean_se: np.ndarray
    sd_se: np.ndarray
    ess: np.ndarray
    r_hat: np.ndarray
    ancestors: float


def _moments(tree: DataTree, common: list[str]) -> _Moments:
    import arviz as az

    draws = tree["posterior"].to_dataset()[common]
    dims = ["chain", "draw"]

    def flat(kind: Any) -> np.ndarray:
        return np.concatenate([np.ravel(kind[name]) for name in common]).astype(float)

    mean, sd = flat(draws.mean(dims)), flat(draws.std(dims, ddof=1))
    r_hat = flat(az.rhat(draws)) if draws.sizes["chain"] > 1 else np.full_like(mean, np.nan)
    stats = tree["sample_stats"].to_dataset()
    if "ancestor" not in stats:
        mean_se, sd_se = (flat(az.mcse(draws, method=method)) for method in ("mean", "sd"))
        return _Moments(mean, sd, mean_se, sd_se, flat(az.ess(draws)), r_hat, math.nan)
    clusters = Clusters.of(stats["group_of_draw"].values, stats["ancestor"].values)
    rows = [np.asarray(draws[name], float) for name in common]
    x = np.concatenate([row.reshape(row.shape[0] * row.shape[1], -1) for row in rows], 1)
    mean_se = clusters.mean_se(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        sd_se = clusters.mean_se((x - mean) ** 2) / (2 * sd)
        ess = np.where(sd > 0, (sd / mean_se) ** 2, len(x))
    return _Moments(mean, sd, mean_se, sd_se, ess, r_hat, clusters.effective)


class Clusters(NamedTuple):
    """Draws that may depend on one another, and are independent of all others."""

    order: np.ndarray  # [n], draws sorted by cluster
    starts: np.ndarray  # [cluster], where each begins in that order

    @classmethod
    def of(cls, *labels: np.ndarray) -> "Clusters":
        """Draws whose `labels`, each [n], are all the same."""
        pairs = np.stack([np.ravel(label) for label in labels])
        _, index = np.unique(pairs, axis=1, return_inverse=True)
        order = np.argsort(index.ravel(), kind="stable")
        return cls(order, np.flatnonzero(np.diff(index.ravel()[order], prepend=-1)))

    @property
    def effective(self) -> float:
        """`1 / sum_c (n_c / n)^2`, the number of clusters where all are of one size."""
        sizes = np.diff(self.starts, append=len(self.order))
        return float(len(self.order) ** 2 / (sizes**2).sum())

    def mean_se(self, x: np.ndarray) -> np.ndarray:
        """Standard errors of the means of `x` [n, entry]; NaN for a single cluster."""
        if len(self.starts) == 1:
            return np.full(x.shape[1], np.nan)
        sums = np.add.reduceat((x - x.mean(0))[self.order], self.starts)
        return np.sqrt((sums**2).sum(0) / (1 - 1 / self.effective)) / len(x)


def _row(tree: DataTree, found: _Moments, reference: _Moments) -> dict[str, float]:
    posterior, stats = tree["posterior"].to_dataset(), tree["sample_stats"].to_dataset()
    seconds = float(tree.attrs.get("sampling_time", np.nan))
    row = {
        "draws": float(posterior.sizes["chain"] * posterior.sizes["draw"]),
        "min_ess": found.ess.min(),
        "max_r_hat": found.r_hat.max(),
        "ancestors": found.ancestors,
        **_agreement(found, reference),
        "seconds": seconds,
        "ess_per_second": found.ess.min() / seconds,
    }
    for name in ("log_evidence", "log_evidence_se"):
        row[name] = float(stats[name]) if name in stats else np.nan
    return row


def _agreement(found: _Moments, reference: _Moments) -> dict[str, float]:
    mean_se = np.hypot(found.mean_se, reference.mean_se)
    sd_se = np.hypot(found.sd_se, reference.sd_se)
    varies = (mean_se > 0) & (sd_se > 0) & (reference.sd > 0)
    if found is reference or not varies.any():
        names = ("mean_z_rms", "mean_z_max", "sd_z_rms", "sd_z_max", "mean_shift", "sd_ratio")
        return dict.fromkeys(names, math.nan)
    shift = (found.mean - reference.mean)[varies]
    mean_z = shift / mean_se[varies]
    sd_z = (found.sd - reference.sd)[varies] / sd_se[varies]
    return {
        "mean_z_rms": float(np.sqrt(np.mean(mean_z**2))),
        "mean_z_max": float(np.abs(mean_z).max()),
        "sd_z_rms": float(np.sqrt(np.mean(sd_z**2))),
        "sd_z_max": float(np.abs(sd_z).max()),
        "mean_shift": float((np.abs(shift) / reference.sd[varies]).max()),
        "sd_ratio": float(np.median(found.sd[varies] / reference.sd[varies])),
    }


def _common(trees: Sequence[DataTree], labels: Sequence[str]) -> list[str]:
    sets = [tree["posterior"].to_dataset().data_vars for tree in trees]
    common = [str(name) for name in sets[0] if all(name in each for each in sets)]
    if not common:
        raise ValueError(f"trees must share a variable in posterior, got {[*map(list, sets)]}")
    for name in common:
        shapes = [each[name].shape[2:] for each in sets]
        for label, shape in zip(labels, shapes, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"variable {name!r} must have one shape in all trees, got {shapes[0]} in "
                    f"{labels[0]} and {shape} in {label}"
                )
    return common


def _engine(tree: DataTree) -> str:
    return str(tree.attrs.get("engine", "run")).partition("(")[0]


def _number(labels: list[str]) -> list[str]:
    """Labels made distinct: `NUTS`, `NUTS 2`."""
    seen: dict[str, int] = {}
    distinct = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        distinct.append(label if seen[label] == 1 else f"{label} {seen[label]}")
    return distinct


def _frame(rows: list[dict[str, float]], labels: list[str]) -> DataFrame:
    import xarray as xr

    columns = {name: ("run", [row[name] for row in rows]) for name in rows[0]}
    return xr.Dataset(columns, coords={"run": labels}).to_dataframe()


__all__ = ["LogBayesFactor", "compare", "log_bayes_factor"]
