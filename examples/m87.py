"""The black hole in M87, from the public data of the Event Horizon Telescope.

    python examples/m87.py --data SR1_M87_2017_101_lo_hops_netcal_StokesI.csv [--output m87] [--quick]

The file is in the release "First M87 EHT Results: Calibrated Data" (2019-D01-01,
doi:10.25739/g85n-f134), public domain, folder `csv`: Stokes I of 11 April 2017, low band.

1. Reduction. Visibilities are averaged coherently over scans (a gap of over 60 seconds ends one),
   those under an SNR of 2 are flagged, and 2 % of each amplitude are added to its noise for errors
   that do not close. What no station's gain can change is kept: closure phases and log closure
   amplitudes, a minimal set of each for every scan, with their full covariance. Closures with a
   zero baseline (ALMA-APEX, JCMT-SMA) are left out: they see 1.2 Jy, of which half is a jet that
   the others resolve.
2. The model. A diffusion prior of radio sources (`sp.load("radio")`, trained on simulated rings,
   crescents, disks, doubles and blobs) over images of 32 x 32 pixels of 4 micro-arcseconds, of unit
   flux: closures know nothing of the total flux, nor of the position.
3. A rehearsal. A simulated crescent, seen at the same places with the same noise and with the gains
   of every station unknown, has to be found again: its pixels and its diameter within the intervals
   that say so.
4. The data. Posterior by tempered SMC, chi-squared of both data products, diameter, width and
   asymmetry of the ring in every draw, beside what the EHT published; the same by variational
   inference, for comparison; and the evidence of rings against featureless blobs.

With `--gains` visibility amplitudes take the place of log closure amplitudes, and the gains of all
stations in all scans, and the total flux, are latent variables of the model.

Writes `m87.png` and `m87.nc` (an ArviZ DataTree). Published: EHT Collaboration (2019), ApJL 875, L1
to L6; diameter 42 +- 3 micro-arcseconds, brighter in the south.
"""

import argparse
import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from radio_sources import SHAPES, simulate_shape, to_image

import scoreprior as sp
from scoreprior import interferometry, likelihood
from scoreprior.interferometry import Closures, Visibilities
from scoreprior.operators import Interferometer

MICROARCSECOND = np.pi / 180 / 3600 / 1e6
PIXEL, NUM_PIXELS = 4.0, 32
ZERO_BASELINE = 1e8
"""Wavelengths: shorter baselines see what the others resolve."""
GAP, MIN_SNR, SYSTEMATIC = 60.0, 2.0, 0.02
GAIN_SD = {"LM": 0.3}
"""Prior standard deviation of log gains; 0.1 for the other stations (paper III, table 3)."""
PUBLISHED = "42 +- 3"


class Data(NamedTuple):
    """Visibilities as they are fitted, and their closures."""

    visibilities: Visibilities
    phases: Closures
    amplitudes: Closures


def reduce(raw: Visibilities) -> Data:
    """Average, flag, add the error budget, form closures."""
    scans = interferometry.average_scans(raw, gap=GAP)
    data = interferometry.add_systematic(
        interferometry.flag(scans, min_snr=MIN_SNR), SYSTEMATIC
    )
    return closures(data)


def closures(data: Visibilities) -> Data:
    """Minimal sets of closures, without those that have a zero baseline."""
    phases = interferometry.closure_phases(data, zero_baseline=ZERO_BASELINE)
    amplitudes = interferometry.log_closure_amplitudes(data, zero_baseline=ZERO_BASELINE)
    keep = [each[each.shortest >= ZERO_BASELINE] for each in (phases, amplitudes)]
    return Data(data, *keep)


def build_model(prior: sp.ScorePrior, data: Data) -> Any:
    """Image to closures."""
    see = instrument(data)

    def model(phases: Any = None, amplitudes: Any = None) -> None:
        image = to_image(numpyro.sample("z", prior))
        numpyro.deterministic("image", image)
        vis = see(image)
        numpyro.sample("phases", likelihood.ClosurePhases(vis, data.phases), obs=phases)
        law = likelihood.LogClosureAmplitudes(vis, data.amplitudes)
        numpyro.sample("amplitudes", law, obs=amplitudes)

    return model
