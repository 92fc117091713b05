"""The black hole in M87, from the public data of the Event Horizon Telescope.

    python examples/m87.py --data SR1_M87_2017_101_lo_hops_netcal_StokesI.csv [--quick] [--gains]

The file is in the release "First M87 EHT Results: Calibrated Data" (2019-D01-01,
doi:10.25739/g85n-f134), public domain, in its folder `csv`: 11 April 2017, the low band.

1. Reduction. Visibilities are averaged coherently over scans, which end with a gap of over 60
   seconds, those under an SNR of 2 are flagged, and 2 % of each amplitude are added to its noise
   for errors that do not close. What no station's gain can change is kept: closure phases and log
   closure amplitudes, a minimal set of each in every scan, with their full covariance. Closures
   with a zero baseline (ALMA-APEX, JCMT-SMA) are left out: these see 1.2 Jy, half of it from a jet
   that all others resolve.
2. Model. A diffusion prior of radio sources (`sp.load("radio")`, of simulated rings, crescents,
   disks, doubles and blobs) over images of 32 x 32 pixels of 4 micro-arcseconds, of unit flux and
   with the centroid in the middle: closures know neither the total flux nor the position, and a
   source that is free to wander takes every pixel with it.
3. Rehearsal. A simulated crescent, seen at the same places through the same noise and through
   unknown gains of all stations, is to be found again.
4. The data. Tempered SMC, of several clouds that know nothing of one another, and variational
   inference. Chi-squared of both data products; diameter, width and asymmetry of the ring in every
   draw, beside what the EHT published; the evidence of rings against that of featureless blobs.

With `--gains` amplitudes take the place of log closure amplitudes, and the gains of all stations in
all scans and the total flux are latent variables of the model.

Writes `m87.png` and `m87.nc` (an ArviZ DataTree). Published: EHT Collaboration (2019), ApJL 875, L1
to L6 (diameter 42 +- 3 micro-arcseconds, brighter in the south).
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from radio_sources import SHAPES, simulate_shape, to_image

import scoreprior as sp
from scoreprior import interferometry, likelihood
from scoreprior.interferometry import Closures, Ring, Visibilities
from scoreprior.operators import Interferometer
from scoreprior.smc import HMCMoves
from scoreprior.vi import LowRank

MICROARCSECOND = np.pi / 180 / 3600 / 1e6
PIXEL, NUM_PIXELS = 4.0, 32
"""Micro-arcseconds, and how many of them on a side."""
GAP, MIN_SNR, SYSTEMATIC, ZERO_BASELINE = 60.0, 2.0, 0.02, 1e8
"""Seconds, sd, share of an amplitude, wavelengths."""
LOG_GAIN_SD, LOG_GAIN_SD_LMT = 0.1, 0.3
"""A priori, of the log of an amplitude gain; the LMT's pointing was poor (paper III)."""
COMPACT_FLUX = 0.6
"""Jy: of the simulation, and about the median of the prior with `--gains` (paper IV)."""
CENTROID_SD = 2.0
"""Micro-arcseconds: how near to the middle of the image its centroid is."""
NUM_STEPS = 12  # of the solver, from noise to image
FEATURES = {
    "diameter": "42 +- 3",
    "width": "below 20",
    "orientation": "150 to 200",
    "asymmetry": "",
    "central_brightness": "below 0.1 to 0.5",
}
"""Of `measure_ring`, with the published ranges (papers I, IV and VI), in micro-arcseconds and
degrees east of north."""
DOTS: dict[str, Any] = {"fmt": ".", "ms": 3, "lw": 0.7}


class Data(NamedTuple):
    """Visibilities as they are fitted, with their closures."""

    visibilities: Visibilities
    phases: Closures
    amplitudes: Closures


class Settings(NamedTuple):
    """How long to run."""

    clouds: int  # for the data; two for the rehearsal and for the evidences
    particles: int  # of each
    moves: int  # at most, at every temperature
    leapfrog: int  # steps of a move
    vi_steps: int
    measured: int  # draws whose rings are measured


FULL, QUICK = Settings(4, 64, 8, 16, 3000, 200), Settings(2, 16, 4, 8, 500, 20)


def reduce(raw: Visibilities) -> Data:
    """Average, flag, add the error budget and form closures."""
    scans = interferometry.average_scans(raw, gap=GAP)
    flagged = interferometry.flag(scans, min_snr=MIN_SNR)
    return close(interferometry.add_systematic(flagged, SYSTEMATIC))


def close(data: Visibilities) -> Data:
    """Minimal sets of closures, without those that have a zero baseline."""
    phases = interferometry.closure_phases(data, zero_baseline=ZERO_BASELINE)
    amplitudes = interferometry.log_closure_amplitudes(data, zero_baseline=ZERO_BASELINE)
    return Data(data, *(each[each.shortest >= ZERO_BASELINE] for each in (phases, amplitudes)))


def instrument(data: Visibilities) -> Interferometer:
    """What the array makes of an image."""
    shape = (NUM_PIXELS, NUM_PIXELS)
    return Interferometer(data.u, data.v, PIXEL * MICROARCSECOND, shape)


def put_in_the_middle(image: jax.Array) -> None:
    """A factor for the centroid of an image of unit flux, of which the data know nothing."""
    axis = PIXEL * (np.arange(NUM_PIXELS) - (NUM_PIXELS - 1) / 2)
    centroid = jnp.stack([image.sum(1) @ axis, image.sum(0) @ axis])
    law = dist.Normal(centroid, CENTROID_SD).to_event(1)
    numpyro.sample("centroid", law, obs=jnp.zeros(2))


def closure_problem(prior: sp.ScorePrior, data: Data) -> sp.Problem:
    """An image of unit flux, from closures alone."""
    see = instrument(data.visibilities)

    def model(phases: Any, amplitudes: Any) -> None:
        image = to_image(numpyro.sample("z", prior))
        put_in_the_middle(image)
        vis = see(image)
        numpyro.sample("phases", likelihood.ClosurePhases(vis, data.phases), obs=phases)
        law = likelihood.LogClosureAmplitudes(vis, data.amplitudes)
        numpyro.sample("amplitudes", law, obs=amplitudes)

    return sp.Problem.from_model(model, data.phases.value, data.amplitudes.value)


def gain_problem(prior: sp.ScorePrior, data: Data) -> sp.Problem:
    """An image, its flux, and the gain of every station in every scan."""
    vis = data.visibilities
    see, fitted = instrument(vis), vis.uv_distance >= ZERO_BASELINE
    times = [np.stack([vis.time.astype(str), code], 1) for code in (vis.station1, vis.station2)]
    names, which = np.unique(np.concatenate(times), axis=0, return_inverse=True)
    one, two = which.reshape(2, -1)
    gain_sd = np.where(names[:, 1] == "LM", LOG_GAIN_SD_LMT, LOG_GAIN_SD)

    def model(phases: Any, amplitude: Any) -> None:
        flux = numpyro.sample("flux", dist.LogNormal(np.log(COMPACT_FLUX), 0.3))
        log_gain = numpyro.sample("log_gain", dist.Normal(0.0, gain_sd).to_event(1))
        image = to_image(numpyro.sample("z", prior))
        put_in_the_middle(image)
        seen = see(flux * image)
        numpyro.sample("phases", likelihood.ClosurePhases(seen, data.phases), obs=phases)
        # Noise adds sigma^2 to the square of an amplitude, in the direction of its phase.
        power = jnp.abs(seen) ** 2 * jnp.exp(2 * (log_gain[one] + log_gain[two])) + vis.sigma**2
        law = dist.Normal(jnp.sqrt(power)[fitted], vis.sigma[fitted])
        numpyro.sample("amplitude", law.to_event(1), obs=amplitude)

    return sp.Problem.from_model(model, data.phases.value, vis.amplitude[fitted])


def load_prior(context: str | None = None) -> sp.ScorePrior:
    """The prior of radio sources, of all or of one kind, with fewer solver steps."""
    scale = {"pixel_micro_arcseconds": PIXEL}
    prior = sp.load("radio", context=context, expect=scale)
    if prior.event_shape != (NUM_PIXELS, NUM_PIXELS):
        raise ValueError(
            f"the prior must be of {NUM_PIXELS} x {NUM_PIXELS} pixels, got {prior.event_shape}"
        )
    flow = prior.flow
    solver = dataclasses.replace(flow.solver, num_steps=NUM_STEPS)
    levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    coarse = sp.Flow(flow.denoiser, flow.moments, solver=solver, **levels)
    return sp.ScorePrior(coarse, prior.density)


def smc(settings: Settings, clouds: int = 2) -> sp.TemperedSMC:
    """Long moves: clouds that lag behind the temperature are too narrow, all alike."""
    return sp.TemperedSMC(
        settings.particles,
        clouds,
        kernel=HMCMoves(settings.leapfrog, dense_mass=False),
        target_ess=0.6,
        max_moves=settings.moves,
        max_autocorrelation=0.1,
    )


def simulate(data: Visibilities, key: jax.Array) -> tuple[np.ndarray, Data]:
    """A crescent of unit flux, seen at the same places, noise and all, through unknown gains.

    The first that has a ring of 30 to 55 micro-arcseconds as `measure` defines it: of the thickest
    and the faintest there is nothing to measure.
    """
    key_source, key_data = jax.random.split(key)
    draw = jax.vmap(simulate_shape, (0, None))
    several = draw(jax.random.split(key_source, 20), jnp.asarray(SHAPES.index("crescent"))).image
    diameters = measure(np.asarray(several)).diameter
    truth = several[int(np.argmax((diameters > 30) & (diameters < 55)))]
    seen = COMPACT_FLUX * np.asarray(instrument(data)(truth), complex)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key_data)))
    ends = [list(zip(data.time, code, strict=True)) for code in (data.station1, data.station2)]
    gains = {
        end: np.exp(LOG_GAIN_SD * random.normal() + 2j * np.pi * random.uniform())
        for end in sorted({*ends[0], *ends[1]})
    }
    one, two = (np.array([gains[end] for end in column]) for column in ends)
    noise = data.sigma * (random.normal(size=(2, len(data))).T @ np.array([1, 1j]))
    measured = data.replace(vis=one * two.conj() * seen + noise)
    return np.asarray(truth), close(interferometry.flag(measured, min_snr=MIN_SNR))


def images_of(tree: Any, most: int = 200) -> np.ndarray:
    """Draws of the image of unit flux, [draw, row, col], evenly spaced."""
    z = np.asarray(tree["posterior"]["z"]).reshape(-1, NUM_PIXELS, NUM_PIXELS)
    rows = np.linspace(0, len(z) - 1, min(most, len(z))).astype(int)
    return np.asarray(jax.vmap(to_image)(z[rows]))


def in_the_middle(image: np.ndarray) -> np.ndarray:
    """Shifted by whole pixels, its centroid to the middle."""
    middle = np.arange(NUM_PIXELS) - (NUM_PIXELS - 1) / 2
    shift = [-int(np.rint(image.sum(axis) @ middle)) for axis in (1, 0)]
    return np.roll(image, shift, (0, 1))


def measure(images: np.ndarray) -> Ring:
    """Features of the ring in each, [draw]; NaN where there is none."""
    found = []
    for image in images:
        try:
            ring = interferometry.measure_ring(image, PIXEL, radii=(5.0, 50.0))
        except ValueError:
            ring = Ring((np.nan, np.nan), *[np.nan] * (len(Ring._fields) - 1))
        found.append(ring._replace(orientation=np.rad2deg(ring.orientation)))
    return Ring(*(np.array(column) for column in zip(*found, strict=True)))


def chi_squared(images: np.ndarray, data: Data) -> tuple[float, float]:
    """Of closure phases and of log closure amplitudes, per datum, means over draws."""
    vis = np.asarray(jax.vmap(instrument(data.visibilities))(images), complex)
    return tuple(
        float(np.mean([each.chi_squared(one) for one in vis]) / len(each))
        for each in (data.phases, data.amplitudes)
    )


def print_chi_squared(images: np.ndarray, data: Data) -> None:
    """Both, on a line."""
    print(
        "  chi-squared of phases, log amplitudes {:.2f} {:.2f}".format(*chi_squared(images, data))
    )


def rehearse(prior: sp.ScorePrior, data: Data, settings: Settings, key: jax.Array) -> None:
    """Find a simulated crescent again; say what the intervals cover."""
    key_data, key = jax.random.split(key)
    truth, simulated = simulate(data.visibilities, key_data)
    tree = sp.infer(closure_problem(prior, simulated), smc(settings), key=key)
    images = images_of(tree)
    low, high = np.quantile(images, [0.05, 0.95], axis=0)
    there = in_the_middle(truth)
    lit = there > 0.1 * there.max()
    covered = (low <= there) & (there <= high)
    print("rehearsal with a simulated crescent")
    print_chi_squared(images, simulated)
    share = f"{covered[lit].mean():.0%} of {lit.sum()} that are lit"
    print(f"  pixels within their 90 % interval     {share}")
    true, found = (measure(x) for x in (truth[None], images_of(tree, settings.measured)))
    for name in ("diameter", "width", "asymmetry"):
        low, high = np.nanquantile(getattr(found, name), [0.05, 0.95])
        is_in = "covers" if low <= getattr(true, name)[0] <= high else "misses"
        print(f"  {name:<12}{low:6.2f} to {high:6.2f} {is_in} {getattr(true, name)[0]:.2f}")


def report(name: str, tree: Any, data: Data, settings: Settings) -> Ring:
    """Print chi-squared and what is measured on every draw, with its R-hat over chains."""
    images = images_of(tree)
    found = measure(images_of(tree, settings.measured))
    print(name)
    print_chi_squared(images, data)
    print(f"  draws with a ring                     {np.isfinite(found.diameter).mean():.0%}")
    chains = tree["posterior"].sizes["chain"]
    for feature, published in FEATURES.items():
        values = getattr(found, feature)
        line = f"{np.nanmean(values):6.2f} +- {np.nanstd(values):5.2f}"
        if chains > 1:
            rows = values[: len(values) // chains * chains].reshape(chains, -1)
            line += f"  R-hat {az.rhat(rows):.2f}"
        print(f"  {feature:<20}{line}    published: {published or '-'}")
    return found


def evidence(data: Data, settings: Settings, key: jax.Array) -> None:
    """Rings and crescents against featureless blobs."""
    found = {}
    for name in ("ring", "blob"):
        problem = closure_problem(load_prior(name), data)
        stats = sp.infer(problem, smc(settings), key=key)["sample_stats"]
        found[name] = float(stats["log_evidence"]), float(stats["log_evidence_se"])
        print("  log evidence, {:<24}{:8.1f} +- {:.1f}".format(name, *found[name]))
    print(f"  log Bayes factor, ring over blob      {found['ring'][0] - found['blob'][0]:8.1f}")


def picture(path: Path, tree: Any, data: Data, title: str) -> None:
    """Mean, standard deviation and draws, above data and what the draws predict."""
    from matplotlib.figure import Figure

    images = images_of(tree)
    panels = {"Mean": images.mean(0), "Standard deviation": images.std(0)}
    panels |= {
        f"Draw {i + 1}": images[k]
        for i, k in enumerate(np.linspace(0, len(images) - 1, 4).astype(int))
    }
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=[1, 1.25])
    reach = PIXEL * NUM_PIXELS / 2
    for ax, (name, image) in zip(above.subplots(1, len(panels)), panels.items(), strict=True):
        ax.imshow(image, cmap="afmhot", vmin=0, extent=(reach, -reach, -reach, reach))
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
    above.axes[0].plot([55, 15], [-55, -55], color="white", lw=2)
    above.axes[0].text(35, -50, "40 µas", color="white", ha="center", va="bottom", fontsize=8)
    above.suptitle(title, fontsize=10)
    left, middle, right = below.subplots(1, 3)
    vis = np.asarray(jax.vmap(instrument(data.visibilities))(images), complex)
    amplitude_panel(left, vis, data.visibilities)
    for ax, each, unit in ((middle, data.phases, np.rad2deg(1)), (right, data.amplitudes, 1.0)):
        predicted = each(vis)
        gap = each.value - predicted
        gap = np.angle(np.exp(1j * gap)) if each.is_phase else gap
        centre, spread = (
            unit * np.quantile(each.value - gap, [0.5, 0.05, 0.95], axis=0),
            unit * each.sd,
        )
        ax.errorbar(centre[0], unit * each.value, spread, color="#3b6ea5", **DOTS)
        ends = np.array([centre[0].min(), centre[0].max()])
        ax.plot(ends, ends, color="black", lw=0.7)
        name = "closure phase, degrees" if each.is_phase else "log closure amplitude"
        ax.set(xlabel=f"{name}: posterior median", ylabel="measured")
    figure.savefig(path, dpi=130)


def amplitude_panel(ax: Any, vis: np.ndarray, data: Visibilities) -> None:
    """Amplitudes by length of baseline; gains and flux are free, so the draws are scaled to fit."""
    long = data.uv_distance >= ZERO_BASELINE
    length = data.uv_distance[long] / 1e9
    predicted = np.abs(vis[:, long])
    weight = predicted / data.sigma[long] ** 2
    scale = (weight * data.amplitude[long]).sum(1) / (weight * predicted).sum(1)
    low, high = np.quantile(scale[:, None] * predicted, [0.05, 0.95], axis=0)
    ax.vlines(length, low, high, color="#d95f0e", lw=2.5, alpha=0.5, label="posterior, 90 %")
    amplitude, sd = data.amplitude[long], data.sigma[long]
    ax.errorbar(length, amplitude, sd, label="measured", color="black", **DOTS)
    ax.set(xlabel="baseline, 10⁹ wavelengths", ylabel="amplitude, Jy", yscale="log")
    ax.legend(frameon=False, fontsize=8)


def main() -> None:
    """Reduce, rehearse, infer, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Stokes I file of the release")
    parser.add_argument("--output", type=Path, default=Path("m87"), help="name of the results")
    parser.add_argument("--quick", action="store_true", help="small clouds, short chains")
    parser.add_argument("--gains", action="store_true", help="amplitudes and gains, not closures")
    options = parser.parse_args()
    settings, started = QUICK if options.quick else FULL, time.perf_counter()
    data = reduce(interferometry.read_eht_csv(options.data))
    print(
        *data, interferometry.total_flux(data.visibilities, zero_baseline=ZERO_BASELINE), sep="\n"
    )
    prior = load_prior()
    keys = jax.random.split(jax.random.key(2017), 4)

    rehearse(prior, data, settings, keys[0])
    problem = (gain_problem if options.gains else closure_problem)(prior, data)
    tree = sp.infer(problem, smc(settings, settings.clouds), key=keys[1])
    found = report("M87, tempered SMC", tree, data, settings)
    fitted = sp.infer(problem, sp.VI(LowRank(16), settings.vi_steps, 200), key=keys[2])
    report("M87, variational inference", fitted, data, settings)
    evidence(data, settings, keys[3])

    diameter = f"{np.nanmean(found.diameter):.1f} ± {np.nanstd(found.diameter):.1f} µas"
    title = f"M87, 11 April 2017: diameter {diameter}"
    picture(options.output.with_suffix(".png"), tree, data, title)
    tree.to_netcdf(options.output.with_suffix(".nc"), engine="h5netcdf")
    print(f"{options.output}.png, {options.output}.nc, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
