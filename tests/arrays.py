"""A made-up interferometer and source, for tests of visibilities and closures."""

from itertools import combinations

import numpy as np

from scoreprior.interferometry import Visibilities

UAS = np.pi / 180 / 3600 / 1e6
"""One micro-arcsecond in radians."""


def positions(names, seed=0):
    """Station positions in wavelengths; names that end in the same letter are neighbours."""
    rng = np.random.default_rng(seed)
    sites: dict[str, np.ndarray] = {}
    found = {}
    for name in names:
        site = sites.setdefault(name[-1], rng.normal(scale=3e9, size=2))
        found[name] = site + rng.normal(scale=1e5, size=2)
    return found


def visibility(u, v, sky):
    """`sum_k I_k exp(-2 pi i (u l_k + v m_k))` of points `(I, l, m)`, by the formula."""
    flux, east, north = np.transpose(sky)
    return (flux * np.exp(-2j * np.pi * (np.outer(u, east) + np.outer(v, north)))).sum(-1)


SKY = [(0.5, 0.0, 0.0), (0.3, 20 * UAS, 5 * UAS), (0.2, -10 * UAS, 18 * UAS)]


def observe(names, times, *, sigma=0.01, sky=SKY, seed=0, noise=True, drop=(), turn=False):
    """Visibilities of `sky` on all baselines but `drop`, at `times` (hours), as the sky turns."""
    rng = np.random.default_rng(seed + 1)
    sites = positions(names, seed)
    columns = []
    for time in times:
        angle = 2 * np.pi * time / 24
        rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        for a, b in combinations(names, 2):
            if (a, b) in drop:
                continue
            a, b = (b, a) if turn and rng.random() < 0.5 else (a, b)
            columns.append((time, a, b, *(rotate @ (sites[a] - sites[b]))))
    time, one, two, u, v = (np.array(column) for column in zip(*columns, strict=True))
    vis = visibility(u, v, sky)
    sigma = np.broadcast_to(sigma, vis.shape)
    if noise:
        vis = vis + sigma * (rng.normal(size=vis.shape) + 1j * rng.normal(size=vis.shape))
    return Visibilities(time, one, two, u, v, vis, sigma)


def with_gains(data, seed=0):
    """`data` with a complex gain per station and time: any phase, amplitudes from 0.3 to 3."""
    rng = np.random.default_rng(seed)
    gains: dict[tuple[str, float], complex] = {}

    def gain(code, time):
        value = np.exp(rng.uniform(-1.2, 1.2) + 1j * rng.uniform(-np.pi, np.pi))
        return gains.setdefault((code, time), value)

    rows = zip(data.station1.tolist(), data.station2.tolist(), data.time.tolist(), strict=True)
    factor = np.array([gain(a, t) * np.conj(gain(b, t)) for a, b, t in rows])
    return data.replace(vis=factor * data.vis, sigma=np.abs(factor) * data.sigma)
