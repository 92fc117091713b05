"""How diverse draws are, and whether they are copies of training events."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
from jaxtyping import ArrayLike

from scoreprior._util import check_count, check_positive
from scoreprior.check._inputs import as_attrs, check_least, check_no_nan
from scoreprior.check._two_samples import differ, differ_in_mean, mid_ranks

if TYPE_CHECKING:
    from xarray import DataTree
else:
    DataTree = Any

ORDERS = (0.5, 1.0, 2.0, float("inf"))


class AbstractSimilarity(eqx.Module):
    """A positive semi-definite similarity of events with `k(x, x) = 1`."""

    @abstractmethod
    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Similarities [n, n] of `rows` [n, d]."""


class CosineSimilarity(AbstractSimilarity):
    """`<x, y> / (|x| |y|)`. Raises `ValueError` for an event that is zero."""

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(rows, axis=1)
        if not (norms > 0).all():
            raise ValueError(f"events must not be zero, got {int((norms == 0).sum())} that are")
        return rows @ rows.T / np.outer(norms, norms)


class GaussianSimilarity(AbstractSimilarity):
    """`exp(-|x - y|^2 / (2 length^2))`; `length` in units of the events, no default."""

    length: float = eqx.field(static=True)

    def __check_init__(self):
        check_positive("length", self.length)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return np.exp(-_squared_distances(rows, rows) / (2 * self.length**2))


def vendi_score(
    events: ArrayLike, similarity: AbstractSimilarity, *, orders: Sequence[float] = (1.0,)
) -> np.ndarray:
    """Vendi scores [order]: effective numbers of different events among `n`.

    With `lam` the eigenvalues of `K / n`, `K` the similarities,

        VS_q = (sum_i lam_i^q)^(1 / (1 - q)),   VS_1 = exp(-sum_i lam_i log lam_i),
        VS_inf = 1 / max_i lam_i

    (Friedman & Dieng, "The Vendi score", TMLR 2023, for `q = 1`; Pasarkar & Dieng, "Cousins of the
    Vendi score", AISTATS 2024, for the others). It is 1 for `n` equal events and `n` for `n` events
    of which none is similar to another. Small `q` counts rare kinds of events, large `q` only the
    most common.

    **Arguments:** `events` [n, *event]; `orders`, positive, infinity allowed.
    """
    return _vendi(similarity(_rows("events", events, least=1)), _orders(orders))


def diversity(
    draws: ArrayLike,
    data: ArrayLike,
    similarity: AbstractSimilarity,
    *,
    orders: Sequence[float] = ORDERS,
    num_permutations: int = 199,
) -> DataTree:
    """Vendi scores of draws of a prior beside those of as many data.

    Fewer kinds among draws than among data: modes were lost. More: draws are noisy, or blends of
    several. `p_value` is that of a permutation test of the log ratios, all orders together.

    **Arguments:** `draws` and `data` [n, *event], the same number, independent, and the data with
    the noise of the prior's `sigma_min`; `similarity`, `GaussianSimilarity(length)`, with half the
    median distance of data as a length to begin with, or `CosineSimilarity()`; `orders` as in
    `vendi_score`. Costs `num_permutations` eigenvalue problems of size `n`, twice.

    **Returns** a tree with the group `vendi`: `draws` and `data` [order].

    Raises `ValueError` for shapes that disagree, fewer than ten events, and NaN.
    """
    import xarray as xr

    left, right = _rows("draws", draws), _rows("data", data)
    if left.shape != right.shape:
        raise ValueError(
            f"draws and data must have one shape, got {np.shape(draws)} and {np.shape(data)}"
        )
    check_count("num_permutations", num_permutations, least=19)
    found, num = _orders(orders), len(left)
    matrix = similarity(np.concatenate([left, right]))

    def log_ratio(is_left: np.ndarray) -> np.ndarray:
        one, other = np.flatnonzero(is_left), np.flatnonzero(~is_left)
        scores = [_vendi(matrix[np.ix_(part, part)], found) for part in (one, other)]
        return np.log(scores[0]) - np.log(scores[1])

    p_value = differ(log_ratio, num, num, num=num_permutations)
    scores = xr.Dataset(
        {
            "draws": ("order", _vendi(matrix[:num, :num], found)),
            "data": ("order", _vendi(matrix[num:, num:], found)),
        },
        {"order": found},
    )
    attrs = as_attrs(check="diversity", statistic="log Vendi score", p_value=p_value, num=num)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), "vendi": scores})


def memorisation(draws: ArrayLike, training: ArrayLike, held_out: ArrayLike) -> DataTree:
    """Alarm: are draws nearer to training events than other data are?

    The Euclidean distance of each draw to its nearest training event, beside those of events that
    training has not seen. `p_value` is that of a one-sided rank test (Mann-Whitney, by permutation)
    that draws are not nearer, as in Meehan, Chaudhuri & Dasgupta, "A non-parametric test to detect
    data-copying in generative models", AISTATS 2020, without their cells. Copies make it small, and
    so do draws that lack the variety of data; `nearest` says which training event to look at.

    **Arguments:** `draws` [n, *event]; `training` [m, *event] without noise; `held_out`
    [k, *event] of the same law, never trained on, and with the noise of the prior's `sigma_min`, as
    draws have it.

    **Returns** a tree with the groups `draws` and `held_out`: `distance` and `nearest` (index into
    `training`) [event]. Its attribute `share_nearer` is the probability that a draw is nearer than
    a held-out event, one half for a good prior.

    Raises `ValueError` for shapes that disagree, fewer than ten events, and NaN.
    """
    import xarray as xr

    named = {"draws": draws, "training": training, "held_out": held_out}
    rows = {name: _rows(name, events) for name, events in named.items()}
    if len({np.shape(events)[1:] for events in named.values()}) > 1:
        shapes = {name: np.shape(events) for name, events in named.items()}
        raise ValueError(
            f"draws, training and held_out must hold events of one shape, got {shapes}"
        )
    groups, distances = {}, {}
    for name in ("draws", "held_out"):
        squared = _squared_distances(rows[name], rows["training"])
        nearest = squared.argmin(1)
        # Not by differences of squares, which cannot tell a copy from a neighbour.
        exact = np.linalg.norm(rows[name] - rows["training"][nearest], axis=1)
        distances[name] = exact
        groups[name] = xr.Dataset({"distance": ("event", exact), "nearest": ("event", nearest)})
    num = len(rows["draws"])
    ranks = mid_ranks(np.concatenate([distances["draws"], distances["held_out"]]))
    p_value = differ_in_mean(ranks[:num, None], ranks[num:, None], is_lower=True)
    higher = ranks[:num].sum() - num * (num + 1) / 2
    attrs = as_attrs(
        check="memorisation",
        statistic="rank of the distance to the nearest training event, lower tail",
        p_value=p_value,
        share_nearer=float(1 - higher / (num * len(rows["held_out"]))),
        num=num,
    )
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def _vendi(similarities: np.ndarray, orders: np.ndarray) -> np.ndarray:
    values = np.linalg.eigvalsh(similarities / len(similarities))
    # Zero eigenvalues come out as rounding errors of either sign, which small orders would count.
    values = values[values > len(values) * np.finfo(float).eps]
    scores = []
    for order in orders:
        if order == 1:
            scores.append(np.exp(-np.sum(values * np.log(values))))
        elif np.isinf(order):
            scores.append(1 / values.max())
        else:
            scores.append(np.sum(values**order) ** (1 / (1 - order)))
    return np.array(scores)


def _squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`|x - y|^2` [n, m], a cross product at a time: no array of differences."""
    centre = right.mean(0)
    left, right = left - centre, right - centre
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    return np.maximum(squares, 0)


def _rows(name: str, events: ArrayLike, least: int = 10) -> np.ndarray:
    found = np.asarray(events, float)
    if found.ndim < 2:
        raise ValueError(f"{name} must be events [n, *event], got shape {found.shape}")
    check_least(name, len(found), "events", least)
    check_no_nan(name, found)
    return found.reshape(len(found), -1)


def _orders(orders: Sequence[float]) -> np.ndarray:
    found = np.asarray(orders, float)
    if found.ndim != 1 or not len(found) or not (found > 0).all():
        raise ValueError(f"orders must be positive numbers, got {orders!r}")
    return found


__all__ = [
    "AbstractSimilarity",
    "CosineSimilarity",
    "GaussianSimilarity",
    "diversity",
    "memorisation",
    "vendi_score",
]
