"""Whether ranks are uniform, exactly: empirical distribution functions and simultaneous bands.

A quantity and `num_draws` draws of it that are exchangeable have a rank `r`, the number of draws
below, that is uniform on `0, ..., num_draws`. Of `n` independent ranks the number below `k` is then
binomial with probability `z = k / (num_draws + 1)`, without approximation, and so is the number of
them in any set of `k` ranks. Levels `z` are multiples of `1 / (num_draws + 1)` throughout.

Säilynoja, Bürkner & Vehtari (2022), "Graphical test for discrete uniformity and its applications in
goodness-of-fit evaluation and multiple sample comparison", Algorithm 1: the statistic of a curve of
counts is the smallest of its two-sided pointwise tail probabilities,

    gamma = min_k 2 min(P(C_k <= c_k), P(C_k >= c_k)),  C_k ~ Binomial(n, z_k),

and the band of probability `prob` is that between the pointwise quantiles at the quantile
`1 - prob` of `gamma`, simulated from uniform ranks with a fixed key. So a curve leaves the band
exactly if its p-value is at most `1 - prob`.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

NUM_SIMULATED = 10_000
NUM_LEVELS = 100
SEED = 20_220_317


class Bands(NamedTuple):
    """The null law of a curve of counts."""

    levels: np.ndarray  # [level], increasing
    at_most: np.ndarray  # [level, n + 1], P(C_k <= c)
    at_least: np.ndarray  # [level, n + 1], P(C_k >= c)
    simulated: np.ndarray  # [NUM_SIMULATED], gamma of uniform ranks, sorted

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """`gamma` [...] of curves `counts` [..., level]."""
        return _statistic(self.at_most, self.at_least, counts)

    def p_value(self, counts: np.ndarray) -> np.ndarray:
        """Probability of a `gamma` as small under uniformity, [...]; at least 1e-4."""
        below = np.searchsorted(self.simulated, self.statistic(counts), side="right")
        return (1 + below) / (1 + NUM_SIMULATED)

    def limits(self, prob: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the band of the fraction `C_k / n`, both inside it, [level] each."""
        # The smallest gamma whose p-value is above 1 - prob.
        gamma = self.simulated[max(0, int((1 - prob) * (1 + NUM_SIMULATED)) - 1)]
        inside = 2 * np.minimum(self.at_most, self.at_least) >= gamma
        num = inside.shape[1] - 1
        return inside.argmax(1) / num, (num - inside[:, ::-1].argmax(1)) / num


def bands(num: int, levels: np.ndarray) -> Bands:
    """The null law of `num` independent ranks at `levels` [level], increasing within (0, 1)."""
    return _bands(num, tuple(levels.tolist()))


@lru_cache(maxsize=4)
def _bands(num: int, levels: tuple[float, ...]) -> Bands:
    z, c = np.array(levels), np.arange(num + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    mass = np.exp(log_choose + np.outer(np.log(z), c) + np.outer(np.log1p(-z), num - c))
    at_most, at_least = mass.cumsum(1), mass[:, ::-1].cumsum(1)[:, ::-1]
    steps = np.diff(z, prepend=0.0, append=1.0)
    drawn = np.random.default_rng(SEED).multinomial(num, steps, size=NUM_SIMULATED)
    counts = drawn[:, :-1].cumsum(1)
    return Bands(z, at_most, at_least, np.sort(_statistic(at_most, at_least, counts)))


def _statistic(at_most: np.ndarray, at_least: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rows = np.broadcast_to(np.arange(len(at_most)), counts.shape)
    return 2 * np.minimum(at_most[rows, counts], at_least[rows, counts]).min(-1)


def ranks(value: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Number of `draws` [n, num_draws, ...] below `value` [n, ...]; ties are broken at random."""
    below = (draws < value[:, None]).sum(1)
    ties = (draws == value[:, None]).sum(1)
    if ties.any():
        below = below + np.random.default_rng(SEED).integers(0, ties + 1)
    return below


def ladder(top: int | float) -> np.ndarray:
    """Integers within `(0, top)`: a hundred or so, evenly, with the first and the last."""
    largest = math.ceil(top) - 1
    k = np.linspace(0, top, NUM_LEVELS + 1).round().astype(int)
    return np.unique(np.concatenate([[1, largest], k[(k >= 1) & (k <= largest)]]))
