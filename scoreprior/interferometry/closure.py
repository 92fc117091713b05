"""Closure phases and log closure amplitudes: what of the data no station's gain changes.

`Blackburn2020` below is Blackburn, Pesce, Johnson et al. (2020), "Closure statistics in
interferometric data", ApJ 894, 31. At one time, with `n` stations and all baselines, there are
`(n - 1)(n - 2) / 2` independent closure phases and `n (n - 3) / 2` independent log closure
amplitudes. A set of them is a matrix `D` of integers that acts on the phases, or on the logs of the
amplitudes, of the visibilities. Any set that is minimal (of full rank, nothing redundant) has the
same information, with its covariance `D diag(sigma^2 / |V|^2) D'`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Complex, Float, Int

from scoreprior.interferometry.visibilities import Visibilities

Leg = tuple[str, str, int]
"""Two stations and the power of their visibility in the closure."""


@dataclass(frozen=True, eq=False, repr=False)
class Closures:
    """A minimal set of closure phases (three legs) or log closure amplitudes (four), by time.

    Thermal covariances are those of high SNR: the phase of a visibility, and the log of its
    amplitude, have the standard deviation `sigma / |V|`, with the measured `|V|`. Closures of
    different times are independent. `closures[mask]` are some of them, with their covariance.

    **Attributes:** `stations` [n, legs], in the order of the formula; `time` [n] hours;
    `index` [n, legs], rows of the visibilities, and `sign` [n, legs], their powers +1 or -1;
    `num_visibilities`; `value` [n], as measured, in radians or nats; `shortest` [n], the shortest
    leg in wavelengths; `factors` [times, m, m], lower Cholesky factors of the covariances, filled
    up with the identity, and `slot` [n], the place of each closure among the `times * m`.
    """

    stations: np.ndarray
    time: Float[np.ndarray, " n"]
    index: Int[np.ndarray, "n legs"]
    sign: Int[np.ndarray, "n legs"]
    num_visibilities: int
    value: Float[np.ndarray, " n"]
    shortest: Float[np.ndarray, " n"]
    factors: Float[np.ndarray, "times m m"]
    slot: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.time)

    def __call__(self, vis: Complex[np.ndarray, "*batch vis"]) -> Float[np.ndarray, "*batch n"]:
        """The closures of visibilities: phases in radians, in (-pi, pi], or log amplitudes."""
        vis = np.asarray(vis)
        if vis.shape[-1:] != (self.num_visibilities,):
            raise ValueError(
                f"vis must end in the {self.num_visibilities} visibilities that the closures are "
                f"of, got shape {vis.shape}"
            )
        if self.is_phase:
            return _wrap((self.sign * np.angle(vis)[..., self.index]).sum(-1))
        return (self.sign * np.log(np.abs(vis))[..., self.index]).sum(-1)

    def __getitem__(self, index: Any) -> "Closures":
        rows = np.atleast_1d(np.arange(len(self))[index])
        block, place = np.divmod(self.slot[rows], self.factors.shape[1])
        roots = self.factors[block, place]
        factors, slot = _factorise(self.time[rows], lambda k: roots[k] @ roots[k].T)
        return Closures(
            self.stations[rows],
            self.time[rows],
            self.index[rows],
            self.sign[rows],
            self.num_visibilities,
            self.value[rows],
            self.shortest[rows],
            factors,
            slot,
        )

    @property
    def is_phase(self) -> bool:
        """Whether these are closure phases, and not log closure amplitudes."""
        return self.index.shape[1] == 3

    @property
    def design(self) -> Int[np.ndarray, "n vis"]:
        """`D`, of entries -1, 0 and 1."""
        design = np.zeros((len(self), self.num_visibilities), dtype=int)
        design[np.arange(len(self))[:, None], self.index] = self.sign
        return design

    @property
    def covariance(self) -> Float[np.ndarray, "n n"]:
        """The thermal covariance `D diag(sigma^2 / |V|^2) D'`."""
        block, place = np.divmod(self.slot, self.factors.shape[1])
        roots = self.factors[block, place]
        return np.where(block[:, None] == block, roots @ roots.T, 0.0)

    @property
    def sd(self) -> Float[np.ndarray, " n"]:
        """Thermal standard deviations, in radians or nats."""
        return np.sqrt(np.diag(self.covariance))

    def chi_squared(self, model: Complex[np.ndarray, " vis"]) -> float:
        """`r' C^-1 r` of the residuals, those of phases wrapped, of a model's visibilities."""
        residual = self.value - self(model)
        residual = _wrap(residual) if self.is_phase else residual
        filled = np.zeros(self.factors.shape[:2])
        filled.flat[self.slot] = residual
        return float((np.linalg.solve(self.factors, filled[..., None]) ** 2).sum())

    def __repr__(self) -> str:
        kind = "closure phases" if self.is_phase else "log closure amplitudes"
        times = len(np.unique(self.time))
        sd = f", median sd {np.median(self.sd):.3g}" if len(self) else ""
        return f"Closures({len(self)} {kind} at {times} times{sd})"


def closure_phases(data: Visibilities, *, zero_baseline: float = 0.0) -> Closures:
    """A minimal set of closure phases `arg(V_ab V_bc V_ca)`, time by time.

    Triangles are taken from the least noisy on, and one is left out where those before imply it;
    triangles with a leg under `zero_baseline` wavelengths, whose phase is near zero for any compact
    source, come last. So `closures[closures.shortest >= zero_baseline]` has all that the others
    tell, and is as good as flagging those legs first.

    Raises `ValueError` where no triangle closes, two visibilities are of one baseline and time
    (average them first), or an amplitude is zero.
    """
    return _closures(data, _triangles, zero_baseline, lambda shortest: True, "triangle")


def trivial_closure_phases(data: Visibilities, *, zero_baseline: float) -> Closures:
    """A minimal set of the triangles with a leg under `zero_baseline` wavelengths, as a check.

    The other two legs see the same, so the phase is zero but for noise, and for emission that the
    zero baseline resolves: their `chi_squared` of a point source tells whether `sigma` is right.
    """
    keep = lambda shortest: shortest < zero_baseline  # noqa: E731
    return _closures(data, _triangles, 0.0, keep, "triangle with a zero baseline")


def log_closure_amplitudes(data: Visibilities, *, zero_baseline: float = 0.0) -> Closures:
    """A minimal set of log closure amplitudes `log |V_ab V_cd| - log |V_ac V_bd|`, time by time.

    Quadrangles are chosen as triangles are in `closure_phases`. Those with a leg under
    `zero_baseline` wavelengths compare the compact source with all flux that is there.

    Noise makes log amplitudes too large, by `E1(snr^2 / 2) / 2` nats in the mean: 0.001 at an SNR
    of 3, 0.024 at 2 and 0.28 at 1.

    Raises as `closure_phases` does.
    """
    return _closures(data, _quadrangles, zero_baseline, lambda shortest: True, "quadrangle")


def _triangles(stations: list[str]) -> Iterator[tuple[tuple[str, ...], list[Leg]]]:
    for a, b, c in combinations(stations, 3):
        yield (a, b, c), [(a, b, 1), (b, c, 1), (c, a, 1)]


def _quadrangles(stations: list[str]) -> Iterator[tuple[tuple[str, ...], list[Leg]]]:
    for four in combinations(stations, 4):
        # The three ratios of the three ways to pair four stations, of which two are independent.
        for a, b, c, d in ((0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 3, 1)):
            p, q, r, s = four[a], four[b], four[c], four[d]
            yield (p, q, r, s), [(p, q, 1), (r, s, 1), (p, r, -1), (q, s, -1)]


def _closures(
    data: Visibilities,
    shapes: Callable[[list[str]], Iterator[tuple[tuple[str, ...], list[Leg]]]],
    zero_baseline: float,
    keep: Callable[[float], bool],
    noun: str,
) -> Closures:
    if not (data.vis != 0).all():
        row = int(np.argmax(data.vis == 0))
        raise ValueError(f"data must have no amplitude of zero for closures, got one in row {row}")
    variance, length = data.snr**-2.0, data.uv_distance
    chosen = []
    for time, rows in _by_time(data).items():
        stations = sorted({code for pair in rows for code in pair})
        found = []
        for names, legs in shapes(stations):
            if not all((a, b) in rows for a, b, _ in legs):
                continue
            index = [rows[a, b][0] for a, b, _ in legs]
            # Conjugating a visibility turns its phase about and leaves its amplitude.
            turn = [rows[a, b][1] if len(legs) == 3 else 1 for a, b, _ in legs]
            sign = [power * way for (_, _, power), way in zip(legs, turn, strict=True)]
            shortest = float(length[index].min())
            if keep(shortest):
                order = (shortest < zero_baseline, float(variance[index].sum()), names)
                found.append((order, names, index, sign, shortest))
        found.sort(key=lambda item: item[0])
        columns = sorted({row for row, _ in rows.values()})
        for k in _independent([(item[2], item[3]) for item in found], columns):
            chosen.append((time, *found[k][1:]))
    if not chosen:
        raise ValueError(
            f"data must have a {noun} all of whose baselines were seen at one time, got none among "
            f"{len(data)} visibilities; averaging gives one time to all baselines"
        )
    time, names, index, sign, shortest = (np.array(column) for column in zip(*chosen, strict=True))

    def covariance(rows: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k k"]:
        columns, place = np.unique(index[rows], return_inverse=True)
        design = np.zeros((len(rows), len(columns)))
        design[np.arange(len(rows))[:, None], place.reshape(len(rows), -1)] = sign[rows]
        return (design * variance[columns]) @ design.T

    factors, slot = _factorise(time, covariance)
    blank = np.zeros(len(time))
    closures = Closures(names, time, index, sign, len(data), blank, shortest, factors, slot)
    return replace(closures, value=closures(data.vis))


def _by_time(data: Visibilities) -> dict[float, dict[tuple[str, str], tuple[int, int]]]:
    """For each time, in order, the row of each ordered pair, and -1 where it is conjugated."""
    times: dict[float, dict[tuple[str, str], tuple[int, int]]] = defaultdict(dict)
    codes = zip(data.station1.tolist(), data.station2.tolist(), strict=True)
    for row, (time, (a, b)) in enumerate(zip(data.time.tolist(), codes, strict=True)):
        if (a, b) in times[time]:
            raise ValueError(
                f"data must have one visibility of a baseline at a time, got two of {a}-{b} at "
                f"{time} h (rows {times[time][a, b][0]} and {row}): average them first"
            )
        times[time][a, b], times[time][b, a] = (row, 1), (row, -1)
    return dict(sorted(times.items()))


def _independent(candidates: list[tuple[list[int], list[int]]], columns: list[int]) -> list[int]:
    """The first candidates (rows, signs) that no combination of those before them equals."""
    place = {column: k for k, column in enumerate(columns)}
    basis = np.zeros((0, len(columns)))
    chosen = []
    for k, (index, sign) in enumerate(candidates):
        row = np.zeros(len(columns))
        row[[place[i] for i in index]] = sign
        for _ in range(2):  # once more against rounding
            row -= basis.T @ (basis @ row)
        norm = np.linalg.norm(row)
        # Rows of integers: what is left of one is zero, or far above rounding.
        if norm > 1e-6:
            basis = np.vstack([basis, row / norm])
            chosen.append(k)
    return chosen


def _factorise(
    time: Float[np.ndarray, " n"], covariance: Callable[[np.ndarray], np.ndarray]
) -> tuple[Float[np.ndarray, "times m m"], Int[np.ndarray, " n"]]:
    """Cholesky factors, time by time, of the covariance of the rows of a time, and their slots."""
    labels, block = np.unique(time, return_inverse=True)
    members = [np.flatnonzero(block == k) for k in range(len(labels))]
    size = max((len(rows) for rows in members), default=0)
    factors = np.tile(np.eye(size), (len(labels), 1, 1))
    slot = np.zeros(len(time), dtype=int)
    for k, rows in enumerate(members):
        factors[k, : len(rows), : len(rows)] = np.linalg.cholesky(covariance(rows))
        slot[rows] = k * size + np.arange(len(rows))
    return factors, slot


def _wrap(angle: np.ndarray) -> np.ndarray:
    """Angles in (-pi, pi]."""
    return np.pi - (np.pi - angle) % (2 * np.pi)
