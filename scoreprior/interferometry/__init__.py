"""Interferometric data, in NumPy: from a file of visibilities to closure quantities; rings.

    data = read_eht_csv(path)
    data = add_systematic(average_scans(data, gap=60.0), 0.02)
    phases = closure_phases(data, zero_baseline=1e8)
    phases = phases[phases.shortest >= 1e8]

`scoreprior.likelihood` makes likelihoods of them.
"""

from scoreprior.interferometry.closure import (
    Closures,
    closure_phases,
    log_closure_amplitudes,
    trivial_closure_phases,
)
from scoreprior.interferometry.read import read_eht_csv
from scoreprior.interferometry.reduce import (
    Flux,
    add_systematic,
    average_scans,
    average_seconds,
    flag,
    rescale_zero_baselines,
    total_flux,
)
from scoreprior.interferometry.ring import Ring, measure_ring
from scoreprior.interferometry.visibilities import Visibilities

__all__ = [
    "Closures",
    "Flux",
    "Ring",
    "Visibilities",
    "add_systematic",
    "average_scans",
    "average_seconds",
    "closure_phases",
    "flag",
    "log_closure_amplitudes",
    "measure_ring",
    "read_eht_csv",
    "rescale_zero_baselines",
    "total_flux",
    "trivial_closure_phases",
]
