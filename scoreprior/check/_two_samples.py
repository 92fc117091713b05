"""Whether two samples have one law: permutation tests, exact for exchangeable rows.

With `n` and `m` independent rows of one law, every assignment of the `n + m` rows to the two
samples is as probable as any other, so that the p-value `(1 + #{as extreme}) / (1 + num)` of `num`
random assignments is at most the level with its probability, whatever the law and the statistic
(Phipson & Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010).
"""

from collections.abc import Callable

import numpy as np

SEED = 20_101_117
ROUNDING = 1e-9
"""Statistics that differ by less count as equal."""


def differ_in_mean(
    left: np.ndarray, right: np.ndarray, *, num: int = 999, is_lower: bool = False
) -> float:
    """P-value of `max_j |mean left_j - mean right_j| / sd_j`, of columns of [n, k] and [m, k].

    With `is_lower` only what is lower on the left counts, `max_j (mean right_j - mean left_j) /
    sd_j`. Columns that are constant over both samples say nothing.
    """
    pooled = np.concatenate([left, right])
    sd = pooled.std(0)
    pooled = (pooled - pooled.mean(0))[:, sd > 0] / sd[sd > 0]
    if pooled.shape[1] == 0:
        return 1.0
    total = pooled.sum(0)

    def statistic(members: np.ndarray) -> np.ndarray:
        """Of assignments [num, n + m], one for rows on the left."""
        sums = members @ pooled
        contrast = sums / len(left) - (total - sums) / len(right)
        return (-contrast if is_lower else np.abs(contrast)).max(-1)

    observed = statistic((np.arange(len(pooled)) < len(left))[None].astype(float))[0]
    members = assignments(len(left), len(right), num)
    return (1 + float((statistic(members) >= observed - ROUNDING).sum())) / (1 + num)


def differ(
    statistics: Callable[[np.ndarray], np.ndarray], num_left: int, num_right: int, *, num: int
) -> float:
    """P-value of the largest of several `statistics`, each standardised over assignments.

    `statistics(is_left)` gives contrasts [k] between the two samples for one assignment, of mean
    zero when they have one law.
    """
    observed = np.zeros((1, num_left + num_right))
    observed[:, :num_left] = 1
    members = np.concatenate([observed, assignments(num_left, num_right, num)])
    values = np.stack([statistics(each > 0) for each in members])
    # The observed one is standardised as all others are, so that they stay exchangeable.
    scale = values.std(0)
    largest = np.abs(values[:, scale > 0] / scale[scale > 0]).max(-1, initial=0)
    return float((largest >= largest[0] - ROUNDING).mean())


def assignments(num_left: int, num_right: int, num: int) -> np.ndarray:
    """Random assignments [num, num_left + num_right], one for rows on the left and zero else."""
    total = num_left + num_right
    order = np.random.default_rng(SEED).random((num, total)).argsort(1)
    return (order < num_left).astype(float)


def mid_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n] from one up, ties sharing their mean rank."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, "left")
    return (below + np.searchsorted(ordered, values, "right") + 1) / 2
