"""Train a U-Net prior on images of your own, 32x32 or 64x64, whole or cropped from larger ones.

Images are an array [n, row, col] or [n, channel, row, col] in a file of NumPy's, in any units:

    python examples/train_unet.py --images images.npy --size 32 --output prior

writes the folder that `scoreprior.load` reads. Every hundredth image, two at least, is held out. A
run that was stopped goes on, by the same command, from the checkpoint beside the output, which is
written at each evaluation. `--bfloat16` computes the network in that type, on accelerators that are
faster in it; CPUs mostly are not. `--metadata` is kept with the prior, such as
`'{"pixel_micro_arcseconds": 4.0}'`.

Noise levels run from a hundredth of the standard deviation of the pixels, the `--sigma-min` of the
prior's density, to a hundred times it. Moments are stationary, `Fourier()`, from 4,096 crops.

Memory grows with the batch: with widths 32, 64, 64 in single precision the gradient takes 7 MB per
image at 32x32 and 28 MB at 64x64 (XLA's count for CPUs), so 0.4 and 1.8 GB for a batch of 64.

The prior is saved with the log density by eight fixed probes of the trace. The exact trace, that of
`prior.with_density(FlowDensity())`, takes a derivative per pixel at every step of the flow.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from scoreprior import io, nn
from scoreprior.denoise import Network
from scoreprior.density import FlowDensity, Hutchinson
from scoreprior.flow import Flow
from scoreprior.gaussian import Fourier, Moments
from scoreprior.prior import ScorePrior
from scoreprior.train import DenoisingLoss, LogUniform, RandomCrop, Residual, adamw, fit


def read(path: Path, size: int) -> np.ndarray:
    """The images, checked."""
    images = np.load(path, allow_pickle=False)
    if images.ndim not in (3, 4) or len(images) < 4 or min(images.shape[-2:]) < size:
        raise ValueError(
            "--images must hold at least 4 images, [n, row, col] or [n, channel, row, col], of at "
            f"least {size} x {size} pixels, got an array {images.shape}"
        )
    bad = int((~np.isfinite(images)).sum())
    if bad:
        raise ValueError(f"--images must be finite, got {bad} entries NaN or infinite")
    return images.astype(np.float32)


def main() -> None:
    """Train, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the prior")
    parser.add_argument("--size", type=int, default=32, help="rows and columns of an event")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--sigma-min", type=float, help="in the units of the images")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--evaluate-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--metadata", type=json.loads, default={}, metavar="JSON")
    options = parser.parse_args()
    images = jnp.asarray(read(options.images, options.size))
    crop = RandomCrop((options.size, options.size))
    moments = Moments.fit(crop.crops(jax.random.key(0), images, 4096), Fourier((-2, -1)))
    scale = float(jnp.sqrt(jnp.mean(moments.eigenvalues)))
    sigma_min = scale / 100 if options.sigma_min is None else options.sigma_min
    sigma_max = 100 * scale
    net = nn.UNet(moments.event_shape, widths=tuple(options.widths), key=jax.random.key(1))
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(net) if hasattr(leaf, "size"))
    print(
        f"{len(images)} images, {num_weights:,} weights, sigma {sigma_min:.3g} to {sigma_max:.3g}"
    )
    num_held_out = max(2, len(images) // 100)
    found = fit(
        Network(nn.MixedPrecision(net) if options.bfloat16 else net, moments),
        images[num_held_out:],
        DenoisingLoss(LogUniform(sigma_min, sigma_max), Residual(moments)),
        key=jax.random.key(2),
        num_steps=options.steps,
        batch_size=options.batch,
        held_out=images[:num_held_out],
        optimiser=adamw(options.steps),
        evaluate_every=options.evaluate_every,
        dequantise=crop,
        checkpoint=options.output.with_name(f"{options.output.name}.safetensors"),
    )
    net = found.denoiser.net
    net = net.net if options.bfloat16 else net
    flow = Flow(Network(net, moments), moments, sigma_min=sigma_min, sigma_max=sigma_max)
    prior = ScorePrior(flow, FlowDensity(Hutchinson(8)))
    io.save(options.output, prior, metadata=options.metadata)
    print(f"held-out loss {np.nanmin(found.history.held_out_loss):.4f} at step {found.best_step}")


if __name__ == "__main__":
    main()
