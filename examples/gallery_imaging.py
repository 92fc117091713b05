"""Pictures of imaging for the gallery: a digit seen through a blur, and a check of its prior.

`python examples/gallery.py` makes them with all others.
"""

from pathlib import Path

import jax
import numpyro
import numpyro.distributions as dist
from train_digits import split_digits

import scoreprior as sp
from scoreprior import check, operators
from scoreprior.guide import MMPS

NOISE = 1.0
"""Of the blurred digit, in grey levels."""


def deblurring(folder: Path, key: jax.Array) -> None:
    """The posterior of a digit seen through a blur, as guidance has it."""
    key_data, key_post = jax.random.split(key)
    prior = sp.load("digits")
    blur = operators.GaussianBlur(1.2, (8, 8), operators.Zero())
    truth = sp.load_images("digits")[3] + 0.5
    y = blur(truth) + NOISE * jax.random.normal(key_data, (8, 8))

    def model(y: jax.Array) -> None:
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(blur(x), NOISE).to_event(2), obs=y)

    tree = sp.infer(model, sp.Guided(MMPS(4), 200, 60), y, key=key_post, progress=False)
    figure = sp.plot_posterior_images(tree, "x", truth=truth, data=y)
    figure.savefig(folder / "imaging-posterior.png", dpi=110)


def copies(folder: Path, key: jax.Array) -> None:
    """Draws of the prior beside the training images that they are nearest to."""
    key_draws, key_grey, key_noise = jax.random.split(key, 3)
    prior = sp.load("digits")
    draws, training = prior.sample(key_draws, (180,)), split_digits().train + 0.5
    held_out = sp.load_images("digits") + jax.random.uniform(key_grey, (180, 8, 8))
    held_out += prior.sigma_min * jax.random.normal(key_noise, held_out.shape)
    tree = check.memorisation(draws, training, held_out)
    check.plot_nearest(draws, training, tree).savefig(folder / "imaging-nearest.png", dpi=110)
    print(f"prior check: {tree.attrs['share_nearer']:.2f} nearer, p = {tree.attrs['p_value']:.2f}")


def imaging(folder: Path, key: jax.Array) -> None:
    """Both."""
    key_posterior, key_check = jax.random.split(key)
    deblurring(folder, key_posterior)
    copies(folder, key_check)
