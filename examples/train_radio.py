"""Train the prior of radio sources that ships with the package.

    python examples/train_radio.py --output radio --checkpoint radio.ckpt

simulates images (`radio_sources.py`), trains and writes the folder that `scoreprior.load` reads,
with a picture of draws beside simulated images; started again with the same arguments it goes on
from the checkpoint. `--quick` is the same in a minute, for tests.

The prior is of `z` [32, 32], and the image in units of its total flux is `softplus(z) / sum
softplus(z)`. Simulated images are smooth: 256 of the 1024 coefficients of a separable eigenbasis
leave a variance of 0.0015 per pixel, well below the `SIGMA_MIN**2 = 0.01` of the noise at which the
density is defined. A residual perceptron acts on these 256 alone, and the others are Gaussian.

The network is told the group of a source, one of ring, disk, double and blob, or nothing (zeros) in
a share of all steps, so that the same weights give the prior and the prior of each group.

What mattered, as a bound on the log density of held-out images in nats after 3,000 steps on 40,000
images, without the group and with it, and how often the group that makes an image most probable is
its own:

    Residual loss, log-uniform levels: 532.6, 533.9, 85 %
    Relative loss, log-uniform levels: 625.6, 628.3, 90 %
    Relative loss, log-normal levels: 625.1, 627.8, 94 % (kept)

The weights kept, 635,264 of them, took 13 minutes, the images included, on two cores with other
work beside it, and give -0.954 +- 0.006 bits per dimension on 512 held-out images by the bound,
-0.957 +- 0.006 given the group, where the Gaussian with the same moments gives -0.625 +- 0.009.
Draws cost -0.892 +- 0.003: they are a little rougher than the images.
"""

import argparse
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from radio_sources import (
    FLOOR,
    GROUP_OF_SHAPE,
    GROUPS,
    PEAK,
    draw_page,
    floor_share,
    simulate_many,
    to_image,
    to_z,
)

from scoreprior import check, io, nn
from scoreprior.denoise import Conditioned, Network, Subspace, leading
from scoreprior.density import BoundDensity
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments, Separable
from scoreprior.prior import ScorePrior
from scoreprior.train import DenoisingLoss, LogNormal, Relative, adamw, fit

SIGMA_MIN = 0.1
"""Noise level of the density, in units of `z`: a tenth of the brightness of a faint pixel."""

NUM_COEFFICIENTS = 256


class Drop(eqx.Module):
    """Zeroes a context with probability `rate` (Ho & Salimans, 2021, arXiv:2207.12598)."""

    rate: float

    def __call__(self, key: Array, context: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, self.rate), 0.0, context)


class Simulated:
    """Simulated sources: `z` [n, 32, 32], one-hot groups [n, 4], and the share of the floor."""

    def __init__(self, key: Array, num: int):
        sources = simulate_many(key, num)
        convert = jax.jit(jax.vmap(lambda image: (to_z(image), floor_share(image))))
        chunks = [convert(part) for part in np.array_split(sources.image, -(-num // 2000))]
        self.z = np.concatenate([np.asarray(z) for z, _ in chunks])
        self.floor_share = np.concatenate([np.asarray(share) for _, share in chunks])
        self.shape, self.diameter = sources.shape, sources.diameter
        group = np.asarray(GROUP_OF_SHAPE)[sources.shape]
        self.context = np.eye(len(GROUPS), dtype=np.float32)[group]


def untrained(moments: Moments, *, width: int, num_blocks: int) -> Subspace:
    """The denoiser before training: that of a Gaussian with these moments."""
    index = leading(moments, NUM_COEFFICIENTS)
    net = nn.ResidualMLP(
        (len(index),),
        width=width,
        num_blocks=num_blocks,
        context_size=len(GROUPS),
        joins_context=True,
        key=jax.random.key(1),
    )
    eigenvalues = moments.eigenvalues.ravel()[np.asarray(index)]
    return Subspace(Network(net, Moments(jnp.zeros_like(eigenvalues), eigenvalues)), moments, index)


def train(
    denoiser: Subspace, training: Simulated, held_out: Simulated, arguments: argparse.Namespace
) -> Subspace:
    """The denoiser with the lowest held-out loss; only its leading coefficients are trained on."""
    project = jax.jit(jax.vmap(denoiser.project))

    def coefficients(z: np.ndarray) -> np.ndarray:
        parts = np.array_split(z, -(-len(z) // 2000))
        return np.concatenate([np.asarray(project(part)) for part in parts])

    inner = denoiser.denoiser
    result = fit(
        inner,
        coefficients(training.z),
        DenoisingLoss(LogNormal(2.0, 1.7), Relative(inner.moments)),
        key=jax.random.key(2),
        num_steps=arguments.steps,
        batch_size=256,
        context=training.context,
        held_out=coefficients(held_out.z),
        held_out_context=held_out.context,
        optimiser=adamw(arguments.steps, peak=arguments.rate),
        evaluate_every=min(1000, arguments.steps),
        augment_context=Drop(0.4),
        checkpoint=arguments.checkpoint,
        progress=arguments.progress,
    )
    for row in zip(*result.history, strict=True):
        print("step {:6d}  train {:.4f}  held out {:.4f}".format(*row))
    print(f"kept step {result.best_step}")
    return Subspace(result.denoiser, denoiser.moments, denoiser.index)


def largest_level(moments: Moments) -> float:
    """Ten standard deviations of the leading coefficient.

    There the flow's start is right for each group, too: its mean and variances differ from those of
    all by one hundredth of the noise's and less.
    """
    return 10 * float(jnp.sqrt(moments.eigenvalues.max()))


def report(prior: ScorePrior, held_out: Simulated, num: int) -> dict[str, str]:
    """Bits per pixel at `SIGMA_MIN`, by the bound, of the prior and of its Gaussian moments."""
    z, context = held_out.z[:num], held_out.context[:num]
    bound, key = prior.with_density(BoundDensity(256)), jax.random.key(3)
    tree = check.held_out_bits(bound, z, key=key, num_draws=num)
    found = {
        "Gaussian with the same moments": in_bits(tree["held_out"]["gaussian"].values),
        "no context": in_bits(tree["held_out"]["bits"].values),
        "draws": in_bits(tree["draws"]["bits"].values),
    }
    bits = np.zeros(num)
    for i, one_hot in enumerate(np.eye(len(GROUPS), dtype=np.float32)):
        of_group = context.argmax(1) == i
        given = bound.with_context(one_hot)
        tree = check.held_out_bits(given, z[of_group], key=key, num_draws=10)
        bits[of_group] = tree["held_out"]["bits"].values
    found["given the group"] = in_bits(bits)
    for name, value in found.items():
        print(f"bits per dimension, {name}: {value}")
    return found


def in_bits(bits: np.ndarray) -> str:
    """Mean and standard error."""
    return f"{bits.mean():.4f} +- {bits.std(ddof=1) / np.sqrt(len(bits)):.4f}"


def compare_draws(prior: ScorePrior, held_out: Simulated, path: Path) -> None:
    """A picture: simulated sources, draws of the prior, draws given ring and given blob."""
    images, titles = [np.asarray(jax.vmap(to_image)(held_out.z[:16]))], ["simulated"] * 16
    one_hot = np.eye(len(GROUPS), dtype=np.float32)
    priors = {"draw": prior} | {
        f"given {name}": prior.with_context(one_hot[GROUPS.index(name)]) for name in GROUPS
    }
    for i, (name, each) in enumerate(priors.items()):
        z = each.sample(jax.random.key(10 + i), (16,))
        images.append(np.asarray(jax.vmap(to_image)(z)))
        titles += [name] * 16
    draw_page(np.concatenate(images), path, titles)


def describe(bits: dict[str, str], shares: np.ndarray) -> dict[str, Any]:
    """What a user of the prior should know of it."""
    rows = np.eye(len(GROUPS)).tolist()
    return {
        "title": "Radio sources, 32x32 pixels of 4 micro-arcseconds",
        "units": "z, with the image in units of its total flux softplus(z) / sum(softplus(z)), "
        "[row, col], row 0 north, column 0 east",
        "pixel_micro_arcseconds": 4.0,
        "contexts": dict(zip(GROUPS, rows, strict=True)),
        "training_data": "simulated by examples/radio_sources.py: rings, crescents, disks, double "
        "sources, elliptical Gaussians and random blobs in equal parts, smoothed by beams of 8 to "
        "20 micro-arcseconds, within 10 of the centre of the field",
        "floor": f"z = softplus^-1({PEAK} I / max(I) + {FLOOR}); the floor adds "
        f"{shares.mean():.1%} to the flux on average, at most {np.quantile(shares, 0.99):.1%} for "
        "99 % of the images",
        "licence": "Apache-2.0",
        "made_by": "examples/train_radio.py",
        "bits_per_dimension": {"at_sigma": SIGMA_MIN, **bits},
        "limits": "sources within the field, of the shapes named and no finer than their beams",
    }


def main() -> None:
    """Simulate, train, report on held-out images and save the prior with a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("radio"))
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a minute, for tests")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.images = 200, 2000

    training = Simulated(jax.random.key(0), arguments.images)
    held_out = Simulated(jax.random.key(1), min(2048, arguments.images))
    print(f"simulated {len(training.z)} images")
    moments = Moments.fit(training.z[:50_000], Separable())
    start = untrained(moments, width=arguments.width, num_blocks=arguments.blocks)
    denoiser = train(start, training, held_out, arguments)
    anything = jnp.zeros(len(GROUPS), jnp.float32)
    flow = Flow(
        Conditioned(denoiser, anything),
        moments,
        sigma_min=SIGMA_MIN,
        sigma_max=largest_level(moments),
    )
    prior = ScorePrior(flow)
    bits = report(prior, held_out, 64 if arguments.quick else 512)
    io.save(arguments.output, prior, metadata=describe(bits, training.floor_share))
    np.save(arguments.output / "held_out.npy", held_out.z[:64].astype(np.float16))
    compare_draws(prior, held_out, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
