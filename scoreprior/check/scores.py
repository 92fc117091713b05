"""Scores of one posterior at the truth, in the units of what is inferred: lower is better.

CRPS and energy score are proper: their mean over data is lowest for the right posterior, whatever
the wrong one (Gneiting & Raftery 2007, "Strictly proper scoring rules, prediction, and estimation",
sections 4.2 and 4.3; the sign here is that of a loss). Coverage alone is satisfied by the prior,
and the error of a mean by a posterior of no width; these are not. `psnr` is that error, for images,
in decibels.
"""

import numpy as np
from jaxtyping import ArrayLike

from scoreprior._util import check_positive
from scoreprior.check._inputs import check_no_nan

CHUNK = 2**22
"""Entries of an array of differences at a time."""


def crps(truth: ArrayLike, draws: ArrayLike) -> np.ndarray:
    """Continuous ranked probability score of every entry, [*event], in its units.

        E|X - y| - 1/2 E|X - X'| = integral of (F(x) - 1{x >= y})^2 dx

    of the law `F` whence the draws `X` come, at the truth `y` (Gneiting & Raftery 2007, eq. 21).
    `X'` are the other draws, so that the estimate is unbiased for any number of independent ones
    (Ferro 2014, "Fair scores for ensemble forecasts"); it may then be negative.

    **Arguments:** `truth` [*event]; `draws` [num, *event], at least two, of equal weight.

    Raises `ValueError` for shapes that disagree, fewer than two draws, and NaN.
    """
    y, x = _checked(truth, draws)
    num = len(x)
    # sum_ij |x_i - x_j| = 2 sum_i (2 i - num + 1) x_(i), with i = 0 the least.
    rank_weights = 2.0 * np.arange(num) - num + 1
    within = 2 * np.tensordot(rank_weights, np.sort(x, axis=0), 1) / (num * (num - 1))
    return np.asarray(np.abs(x - y).mean(0) - within / 2)


def energy_score(truth: ArrayLike, draws: ArrayLike) -> float:
    """`E|X - y| - 1/2 E|X - X'|` with Euclidean distances of whole events, in their units.

    The CRPS of several entries together, which sees how they depend on one another (Gneiting &
    Raftery 2007, eq. 22 with `beta = 1`). Unbiased for independent draws, as `crps` is.

    **Arguments:** as those of `crps`. Raises as that.
    """
    y, x = _checked(truth, draws)
    num = len(x)
    x = x.reshape(num, -1)
    step = max(1, CHUNK // x.size)
    within = sum(
        float(np.linalg.norm(x[i : i + step, None] - x, axis=-1).sum()) for i in range(0, num, step)
    )
    return float(np.linalg.norm(x - y.ravel(), axis=-1).mean()) - within / (2 * num * (num - 1))


def psnr(truth: ArrayLike, estimate: ArrayLike, *, peak: float) -> float:
    """Peak signal-to-noise ratio, `10 log10(peak^2 / mean (estimate - truth)^2)`, decibels.

    Higher is better; infinite where they are equal.

    **Arguments:** `truth` and `estimate` [*event]; `peak`, the range of an entry, in their units.

    Raises `ValueError` for shapes that disagree, NaN, and a peak that is not positive.
    """
    y, x = np.asarray(truth, float), np.asarray(estimate, float)
    if y.shape != x.shape:
        raise ValueError(f"truth and estimate must have one shape, got {y.shape} and {x.shape}")
    check_no_nan("truth", y)
    check_no_nan("estimate", x)
    check_positive("peak", peak)
    error = float(np.mean((x - y) ** 2))
    return 10 * float(np.log10(peak**2 / error)) if error > 0 else float("inf")


def _checked(truth: ArrayLike, draws: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.asarray(truth, float), np.asarray(draws, float)
    if x.ndim < 1 or x.shape[1:] != y.shape:
        raise ValueError(
            f"truth must be [*event] and draws [num, *event], got shapes {y.shape} and {x.shape}"
        )
    if len(x) < 2:
        raise ValueError(f"draws must be at least two, got {len(x)}")
    check_no_nan("truth", y)
    check_no_nan("draws", x)
    return y, x


__all__ = ["crps", "energy_score", "psnr"]
