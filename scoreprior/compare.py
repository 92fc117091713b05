"""Compare models by their evidence, `p(y)` under each."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from xarray import DataTree
else:
    DataTree = Any


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
    _check_data(first, second)
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


def _check_data(first: DataTree, second: DataTree) -> None:
    trees = {"first": first, "second": second}
    data = {
        name: dict(tree["observed_data"].data_vars) if "observed_data" in tree.children else {}
        for name, tree in trees.items()
    }
    sites = {name: sorted(map(str, values)) for name, values in data.items()}
    if sites["first"] != sites["second"]:
        raise ValueError(
            "first and second must have the same observed sites, got "
            f"{sites['first']} and {sites['second']}"
        )
    for site in sites["first"]:
        one, other = (np.asarray(values[site]) for values in data.values())
        if one.shape != other.shape or not np.array_equal(one, other, equal_nan=True):
            raise ValueError(
                f"first and second must have the same data, but observed site {site!r} differs: a "
                "Bayes factor compares models of one data set"
            )


__all__ = ["LogBayesFactor", "log_bayes_factor"]
