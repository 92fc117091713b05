"""`Visibilities`: what an interferometer measured, as a table.

Notation: the visibility of baseline (i, j) is `V_ij = sum_k I_k exp(-2 pi i (u l_k + v m_k))` in
Jy, with `u, v` in wavelengths, `l` to the east and `m` to the north in radians; that of (j, i) is
its complex conjugate at `(-u, -v)`. A station enters by its complex gain, `g_i conj(g_j) V_ij`.
Noise is circular: `sigma` is the standard deviation of the real part, and of the imaginary part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Complex, Float, Int

Baseline = tuple[str, str]


@dataclass(frozen=True, eq=False, repr=False)
class Visibilities:
    """Measured visibilities, one per row; arrays of length `n` that cannot be written to.

    `data[index]` has the rows of an index, a mask or a slice.

    **Arguments:** `time` in hours (UTC); `station1`, `station2`, codes of the two stations; `u`,
    `v` in wavelengths; `vis` in Jy; `sigma` in Jy, per real and imaginary part.

    Raises `ValueError` for lengths that differ, entries that are NaN or infinite, `sigma` that is
    not positive, or a baseline of a station with itself, naming the first such row.
    """

    time: Float[np.ndarray, " n"]
    station1: np.ndarray
    station2: np.ndarray
    u: Float[np.ndarray, " n"]
    v: Float[np.ndarray, " n"]
    vis: Complex[np.ndarray, " n"]
    sigma: Float[np.ndarray, " n"]

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"station1": str, "station2": str, "vis": np.complex128}
        for field in fields(self):
            array = np.array(getattr(self, field.name), dtype=kinds.get(field.name, np.float64))
            if array.ndim != 1 or len(array) != len(self.time):
                raise ValueError(
                    f"{field.name} must have one entry per visibility, shape {np.shape(self.time)} "
                    f"as time has, got {array.shape}"
                )
            if array.dtype.kind in "fc":
                _check_rows(field.name, array, np.isfinite(array), "finite")
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        _check_rows("sigma", self.sigma, self.sigma > 0, "positive (zero marks flagged data)")
        other = self.station1 != self.station2
        _check_rows("station2", self.station2, other, "another station than station1")

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, index: Any) -> "Visibilities":
        rows = np.atleast_1d(np.arange(len(self))[index])
        return Visibilities(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def stations(self) -> list[str]:
        """Codes of the stations, sorted."""
        return sorted({*self.station1.tolist(), *self.station2.tolist()})

    @property
    def baselines(self) -> list[Baseline]:
        """Pairs of stations, each pair and the list sorted."""
        return sorted(set(self._pairs()))

    @property
    def amplitude(self) -> Float[np.ndarray, " n"]:
        """`|V|` in Jy, which noise makes too large: its square by `2 sigma^2` in the mean."""
        return np.abs(self.vis)

    @property
    def snr(self) -> Float[np.ndarray, " n"]:
        """`|V| / sigma`."""
        return self.amplitude / self.sigma

    @property
    def uv_distance(self) -> Float[np.ndarray, " n"]:
        """Length of the projected baseline, in wavelengths."""
        return np.hypot(self.u, self.v)

    def on(self, *baselines: Baseline) -> Bool[np.ndarray, " n"]:
        """Which rows are of these baselines, in either order of the stations."""
        wanted = {_sorted(*pair) for pair in baselines}
        return np.array([pair in wanted for pair in self._pairs()], dtype=bool)

    def with_station(self, *stations: str) -> Bool[np.ndarray, " n"]:
        """Which rows have one of these stations."""
        return np.isin(self.station1, stations) | np.isin(self.station2, stations)

    @property
    def station_index(self) -> Int[np.ndarray, "n 2"]:
        """Places of the two stations in `stations`, for gains: `g[i[:, 0]] * conj(g[i[:, 1]])`."""
        return np.searchsorted(self.stations, np.stack([self.station1, self.station2], 1))

    def replace(self, **columns: np.ndarray) -> "Visibilities":
        """The same table with other columns."""
        return Visibilities(
            **{
                field.name: columns.pop(field.name, getattr(self, field.name))
                for field in fields(self)
            },
            **columns,
        )

    def summary(self) -> str:
        """A table of the baselines: number of visibilities, length, amplitude, noise and SNR."""
        lines = [repr(self), "baseline    n    Gλ min    max   Jy median  sigma median  SNR median"]
        for pair in self.baselines:
            part = self[self.on(pair)]
            length = part.uv_distance / 1e9
            lines.append(
                f"{'-'.join(pair):8s}{len(part):5d}  {length.min():8.4f}{length.max():7.3f}  "
                f"{np.median(part.amplitude):10.4f}  {np.median(part.sigma):12.5f}  "
                f"{np.median(part.snr):10.1f}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        if not len(self):
            return "Visibilities(none)"
        return (
            f"Visibilities({len(self)} on {len(self.baselines)} baselines of "
            f"{' '.join(self.stations)}; {len(np.unique(self.time))} times from "
            f"{self.time.min():.3f} to {self.time.max():.3f} h, up to "
            f"{self.uv_distance.max() / 1e9:.3f} Gλ)"
        )

    def _pairs(self) -> Sequence[Baseline]:
        return [_sorted(*pair) for pair in zip(*self._codes(), strict=True)]

    def _codes(self) -> tuple[list[str], list[str]]:
        return self.station1.tolist(), self.station2.tolist()


def _sorted(a: str, b: str) -> Baseline:
    return (a, b) if a < b else (b, a)


def _check_rows(name: str, array: np.ndarray, good: np.ndarray, rule: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            f"{name} must be {rule}, got {array[row]!s} in row {row} "
            f"({int((~good).sum())} of {len(array)} rows)"
        )
