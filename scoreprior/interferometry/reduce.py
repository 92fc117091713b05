"""From raw visibilities to those that are fitted: flags, averages, error budget, total flux.

Every function gives a new table.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from scoreprior._util import check_positive
from scoreprior.interferometry.visibilities import Baseline, Visibilities

SECONDS = 3600.0
"""Seconds of an hour, the unit of `Visibilities.time`."""


def flag(
    data: Visibilities,
    *,
    stations: Iterable[str] = (),
    baselines: Iterable[Baseline] = (),
    min_snr: float = 0.0,
    times: tuple[float, float] = (-np.inf, np.inf),
) -> Visibilities:
    """`data` without what is named.

    That is, the visibilities of `stations` and of `baselines` (in either order), those of
    `|V| / sigma < min_snr`, and those outside of `times` (first and last, in hours).
    A cut in SNR keeps the visibilities that noise has made larger: make it far above one, or far
    below the data.

    Raises `ValueError` for a station or baseline that is not there, and where nothing is left.
    """
    stations, baselines = list(stations), list(baselines)
    for code in stations:
        if code not in data.stations:
            raise ValueError(f"stations must be among {data.stations}, got {code!r}")
    for pair in baselines:
        if tuple(sorted(pair)) not in data.baselines:
            raise ValueError(f"baselines must be among {data.baselines}, got {pair!r}")
    first, last = times
    keep = (data.time >= first) & (data.time <= last) & (data.snr >= min_snr)
    keep &= ~data.with_station(*stations) & ~data.on(*baselines)
    if not keep.any():
        raise ValueError(
            f"flags must leave some visibilities, got none of {len(data)}: stations={stations}, "
            f"baselines={baselines}, min_snr={min_snr}, times={times}"
        )
    return data[keep]


def average_scans(data: Visibilities, *, gap: float) -> Visibilities:
    """Coherent averages over scans: a scan ends where no station recorded for over `gap` seconds.

    Per scan and baseline `V = sum_i w_i V_i / sum_i w_i`, `w_i = sigma_i^-2`, with
    `sigma = (sum_i w_i)^-1/2`; `u` and `v` are averaged with the same weights, at which a model's
    visibility is that of the average to first order. All baselines of a scan have one `time`, the
    middle between its first and last, so that closures are formed; pairs of stations are put in
    sorted order.

    Stations' phases must not drift within a scan, or the average loses amplitude and, where
    baselines miss different parts of it, closures no longer close.
    """
    check_positive("gap", gap)
    times, which = np.unique(data.time, return_inverse=True)
    scan = np.cumsum(np.diff(times, prepend=times[:1]) * SECONDS > gap)
    return _average(data, scan[which])


def average_seconds(data: Visibilities, seconds: float) -> Visibilities:
    """Coherent averages over fixed intervals of `seconds`, the first from the first time on.

    As for `average_scans`, with intervals in place of scans.
    """
    check_positive("seconds", seconds)
    # Times are printed to 1e-8 hours: an integration on the edge of an interval begins it.
    passed = (data.time - data.time.min()) * SECONDS / seconds
    return _average(data, np.floor(passed + 1e-4).astype(int))


def _average(data: Visibilities, bins: Int[np.ndarray, " n"]) -> Visibilities:
    swap = data.station1 > data.station2
    one = np.where(swap, data.station2, data.station1)
    two = np.where(swap, data.station1, data.station2)
    sign = np.where(swap, -1.0, 1.0)
    vis = np.where(swap, data.vis.conj(), data.vis)
    pairs, baseline = np.unique(np.stack([one, two], 1), axis=0, return_inverse=True)
    keys, group = np.unique(np.stack([bins, baseline.reshape(-1)], 1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    weight = data.sigma**-2.0
    total = np.bincount(group, weight)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, weight * values) / total

    middle = {
        label: (data.time[bins == label].min() + data.time[bins == label].max()) / 2
        for label in np.unique(bins).tolist()
    }
    return Visibilities(
        np.array([middle[label] for label in keys[:, 0].tolist()]),
        pairs[keys[:, 1], 0],
        pairs[keys[:, 1], 1],
        mean(sign * data.u),
        mean(sign * data.v),
        mean(np.real(vis)) + 1j * mean(np.imag(vis)),
        total**-0.5,
    )


def add_systematic(data: Visibilities, fraction: float) -> Visibilities:
    """`data` with an error budget of a `fraction` of each amplitude: `sigma^2 + (fraction |V|)^2`.

    For errors that do not close, such as polarimetric leakage, which averaging does not lower: add
    them after it. The EHT's imaging of M87 took 0.02 in its public pipeline (release 2019-D01-02),
    and surveyed from 0 on (The EHT Collaboration 2019, ApJL 875, L4, section 6); for the estimate
    see ApJL 875, L3, section 8.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    return data.replace(sigma=np.hypot(data.sigma, fraction * data.amplitude))


class Flux(NamedTuple):
    """Flux density in Jy, its thermal standard error, and the scatter of single visibilities."""

    value: float
    standard_error: float
    scatter: float


def total_flux(data: Visibilities, *, zero_baseline: float) -> Flux:
    """The flux density `S` that baselines shorter than `zero_baseline` wavelengths see.

    They resolve nothing of a compact source, and `S^2 = sum_i w_i (|V_i|^2 - 2 sigma_i^2) /
    sum_i w_i` with `w_i = sigma_i^-2` has no bias of noise, whatever the phases of the gains.
    It holds all that is smaller than the beam of these baselines: of M87 the jet too, which longer
    baselines resolve (see `rescale_zero_baselines`). `scatter`, the weighted standard deviation of
    the amplitudes, has the errors of gains besides noise.

    Raises `ValueError` where no baseline is that short, or noise leaves no flux.
    """
    short = data[_is_short(data, zero_baseline)]
    weight = short.sigma**-2.0
    power = np.average(short.amplitude**2 - 2 * short.sigma**2, weights=weight)
    if not power > 0:
        raise ValueError(
            f"data must have flux above the noise on zero baselines, got S^2 = {power:.3g} Jy^2 "
            f"of {len(short)} visibilities"
        )
    flux = float(np.sqrt(power))
    scatter = np.sqrt(np.average((short.amplitude - flux) ** 2, weights=weight))
    return Flux(flux, float(weight.sum() ** -0.5), float(scatter))


def rescale_zero_baselines(
    data: Visibilities, flux: float, *, zero_baseline: float
) -> Visibilities:
    """`data` in which baselines shorter than `zero_baseline` wavelengths see `flux` Jy in total.

    Their `V` and `sigma` are scaled by `flux` over `total_flux`, so that a model of the compact
    source need not hold extended emission, which only they see. The EHT took 0.6 Jy for M87
    (pipeline of release 2019-D01-02) and 1e8 wavelengths.
    """
    check_positive("flux", flux)
    short = _is_short(data, zero_baseline)
    scale = np.where(short, flux / total_flux(data, zero_baseline=zero_baseline).value, 1.0)
    return data.replace(vis=scale * data.vis, sigma=scale * data.sigma)


def _is_short(data: Visibilities, zero_baseline: float) -> np.ndarray:
    check_positive("zero_baseline", zero_baseline)
    short = data.uv_distance < zero_baseline
    if not short.any():
        raise ValueError(
            f"zero_baseline must be above the shortest baseline, {data.uv_distance.min():.4g} "
            f"wavelengths, got {zero_baseline:.4g}"
        )
    return short
