"""The command line: `scoreprior demo` restores a handwritten digit and says how sure it is.

The demo is a user of the library like any other: it loads a prior, writes a NumPyro model, infers
it and summarises the answer. Everything is in grey levels.
"""

import argparse
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from scoreprior import __version__
from scoreprior.flow import Flow
from scoreprior.infer import infer
from scoreprior.io import load, load_images
from scoreprior.mcmc import NUTS
from scoreprior.plot import plot_posterior_images
from scoreprior.prior import ScorePrior

Image = Float[Array, "_row _col"]

NUM_STEPS = 6
"""Solver steps: a draw is 0.04 grey levels (rms) off the exact flow, with ten steps 0.01."""


class Observation(NamedTuple):
    """What is seen of an image: `forward(image)`, shown as `panel(data)`, NaN where hidden."""

    description: str
    forward: Callable[[Image], Image]
    panel: Callable[[Image], Image]


def blur(x: Image) -> Image:
    """Binomial blur, weights 1, 2, 1 along each axis, edges repeated."""

    def along_rows(x: Image) -> Image:
        padded = jnp.pad(x, ((1, 1), (0, 0)), mode="edge")
        return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4

    return along_rows(along_rows(x).T).T


def upper_half(x: Image) -> Image:
    """The upper rows."""
    return x[: x.shape[0] // 2]


def halve(x: Image) -> Image:
    """Means over 2x2 squares."""
    rows, cols = x.shape
    return x.reshape(rows // 2, 2, cols // 2, 2).mean((1, 3))


def hide_below(y: Image) -> Image:
    """The data with as many rows below that nobody saw."""
    return jnp.concatenate([y, jnp.full_like(y, jnp.nan)])


OBSERVATIONS = {
    "restore": Observation("blurred, lower half hidden", lambda x: upper_half(blur(x)), hide_below),
    "inpaint": Observation("lower half hidden", upper_half, hide_below),
    "deblur": Observation("blurred", blur, lambda y: y),
    "superres": Observation("means over 2x2 pixels", halve, lambda y: y),
}


def demo(arguments: argparse.Namespace) -> None:
    """Restore a held-out digit together with the noise level, and report."""
    observation = OBSERVATIONS[arguments.problem]
    prior = _coarse(load("digits"))
    key_truth, key_data, key = jax.random.split(jax.random.key(arguments.seed), 3)
    truth = _as_continuous(load_images("digits")[arguments.digit], prior.sigma_min, key_truth)
    clean = observation.forward(truth)
    y = clean + arguments.noise * jax.random.normal(key_data, clean.shape)

    def model(y: Image | None = None) -> None:
        noise = numpyro.sample("noise", dist.HalfNormal(5.0))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(observation.forward(x), noise).to_event(2), obs=y)

    task = f"held-out digit {arguments.digit}, {observation.description}, noise {arguments.noise:g}"
    print(f"scoreprior {__version__}: {task}")
    print("inferring 64 pixels and the noise level by NUTS; the first step compiles\n", flush=True)
    tree, seconds, notes = _timed_infer(model, _engine(arguments), key=key, y=y)

    print("\n" + summarise(tree, np.asarray(truth), arguments.noise))
    print(f"  {'time':<34}{seconds[0]:.0f} s, of which {seconds[1]:.0f} s compiling\n")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    figure = plot_posterior_images(
        tree, "x", truth=truth, data=observation.panel(y), title=task.capitalize()
    )
    netcdf, png = arguments.output / "posterior.nc", arguments.output / "posterior.png"
    tree.to_netcdf(netcdf, engine="h5netcdf")
    figure.savefig(png, dpi=200)
    print(f"wrote {netcdf} and {png}")


def summarise(tree: Any, truth: np.ndarray, noise: float) -> str:
    """A table of the posterior in `tree` (sites `x` and `noise`) against the truth."""
    posterior, stats = tree["posterior"].dataset, tree["sample_stats"].dataset
    r_hat, ess = az.rhat(posterior), az.ess(posterior)
    levels = np.asarray(posterior["noise"]).ravel()
    images = np.asarray(posterior["x"]).reshape(-1, *truth.shape)
    low, high = np.quantile(images, [0.05, 0.95], axis=0)
    covered = int(((low <= truth) & (truth <= high)).sum())
    share = covered / truth.size
    error = math.sqrt(np.mean((images.mean(0) - truth) ** 2))
    interval = "{:.2f} to {:.2f}".format(*np.quantile(levels, [0.05, 0.95]))
    rows = {
        "noise level, true": f"{noise:.2f}",
        "noise level, inferred": f"{levels.mean():.2f} +- {levels.std(ddof=1):.2f}",
        "  its 90 % interval": interval,
        "pixels within their 90 % interval": f"{covered} of {truth.size} ({share:.0%})",
        "error of the posterior mean (rms)": f"{error:.2f}",
        "  expected from the posterior sd": f"{math.sqrt(np.mean(images.var(0, ddof=1))):.2f}",
        "largest R-hat, pixels": f"{float(r_hat['x'].max()):.3f}",
        "largest R-hat, noise level": f"{float(r_hat['noise']):.3f}",
        "smallest ESS, pixels": f"{float(ess['x'].min()):.0f} of {len(images)} draws",
        "smallest ESS, noise level": f"{float(ess['noise']):.0f} of {len(images)} draws",
        "divergences": f"{int(stats['diverging'].sum())}",
    }
    return "\n".join(f"  {name:<34}{value}" for name, value in rows.items())


def _engine(arguments: argparse.Namespace) -> NUTS:
    return NUTS(
        arguments.num_warmup,
        arguments.num_samples,
        arguments.num_chains,
        target_accept=0.8,
        max_tree_depth=5,
    )


def _timed_infer(*args: Any, **kwargs: Any) -> tuple[Any, tuple[float, float], list[str]]:
    """The tree, seconds in all and seconds of compilation, and warnings as text."""
    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/backend_compile"):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            tree = infer(*args, **kwargs)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    seconds = time.perf_counter() - start, sum(compiling)
    return tree, seconds, [str(warning.message) for warning in caught]


def _coarse(prior: ScorePrior) -> ScorePrior:
    """The prior with fewer solver steps, for speed."""
    flow = prior.flow
    solver = dataclasses.replace(flow.solver, num_steps=NUM_STEPS)
    bounds = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    return ScorePrior(Flow(flow.denoiser, flow.moments, **bounds, solver=solver))


def _as_continuous(image: Image, sigma: float, key: Array) -> Image:
    """Whole grey levels as the prior knows them: dequantised, at its smallest noise level."""
    key_grey, key_noise = jax.random.split(key)
    grey = image + jax.random.uniform(key_grey, image.shape)
    return grey + sigma * jax.random.normal(key_noise, image.shape)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    rule = f"at least {least}" if most is None else f"from {least} to {most}"

    def convert(text: str) -> int:
        number = int(text) if text.removeprefix("-").isdecimal() else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return number

    return convert


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def _make_folder(path: Path) -> str | None:
    """Make the folder `path`, and say what is wrong where that, or writing to it, fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        return (
            f"argument --output: must be a folder that can be written to, got {str(path)!r} "
            f"({error.strerror})"
        )
    return None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("scoreprior", description="Diffusion models as priors for Bayesian models.")
    parser.add_argument("--version", action="version", version=f"scoreprior {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="restore a handwritten digit, with its uncertainty",
        description="Take a digit that no training has seen, damage it, and infer the image "
        "together with the noise level. Prints a summary and writes posterior.nc (an ArviZ "
        "DataTree) and posterior.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=demo)
    add = command.add_argument
    add("--digit", type=_whole(0, 179), default=12, metavar="INDEX", help="which of 180 images")
    add("--problem", choices=OBSERVATIONS, default="restore", help=_describe_problems())
    add("--noise", type=_positive, default=2.0, help="noise level, in grey levels of 0 to 16")
    add("--seed", type=_whole(0), default=0, help="seed of the data and of the chains")
    add("--output", type=Path, default="outputs/demo", metavar="FOLDER", help="where to write")
    add("--num-warmup", type=_whole(1), default=300, metavar="N", help="warm-up steps per chain")
    add("--num-samples", type=_whole(4), default=300, metavar="N", help="draws per chain")
    add("--num-chains", type=_whole(2), default=4, metavar="N", help="chains, side by side")
    return parser


def _describe_problems() -> str:
    return "; ".join(f"{name}: {each.description}" for name, each in OBSERVATIONS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad arguments leave with exit code 2 and one line on stderr."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if wrong := _make_folder(parsed.output):
        parser.error(wrong)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt as interrupt:
        print(f"stopped: {interrupt or 'by Ctrl-C'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
