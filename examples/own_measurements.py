"""Bring your own measurements: a digit through a camera that is not known.

    python examples/own_measurements.py [--output own_measurements]

The camera blurs by an unknown width, adds an unknown background and unknown noise, and misses a
quarter of the pixels. Image and camera are inferred together, and checked. The page "Imaging" goes
through it; two minutes on two cores.
"""

import argparse
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreprior as sp
from scoreprior import check, operators
from scoreprior.plot import Predictions

# --8<-- [start:operator]
seen = np.random.default_rng(1).uniform(size=(8, 8)) > 0.25


def camera(width):
    """What the camera sees of an image: blurred, then one pixel in four lost."""
    return operators.Mask(seen) @ operators.GaussianBlur(width, (8, 8), operators.Zero())


# --8<-- [end:operator]


# --8<-- [start:model]
prior = sp.load("digits")  # pixels from 0 to 17


def model(y=None):
    """An image through the camera, all of whose constants are unknown."""
    width = numpyro.sample("width", dist.LogNormal(jnp.log(0.7), 0.3))  # in pixels
    background = numpyro.sample("background", dist.Normal(0.0, 3.0))
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    x = numpyro.sample("x", prior)
    clean = numpyro.deterministic("clean", camera(width)(x) + background)
    numpyro.sample("y", dist.Normal(clean, noise).to_event(1), obs=y)


# --8<-- [end:model]


def main() -> None:
    """Simulate, infer, check and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("own_measurements"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(8), 8)

    # --8<-- [start:dot]
    A = camera(0.9)
    x, y = jax.random.normal(keys[0], A.shape_in), jax.random.normal(keys[1], A.shape_out)
    np.testing.assert_allclose(jnp.vdot(y, A(x)), jnp.vdot(A.adjoint(y), x), rtol=1e-4)
    # --8<-- [end:dot]

    # --8<-- [start:prior]
    held_out = sp.load_images("digits") + jax.random.uniform(keys[2], (180, 8, 8))
    draws = prior.sample(keys[3], (180,))
    print(check.held_out_bits(prior, held_out, key=keys[6]).attrs)
    check.plot_draws(draws, held_out).savefig(output / "draws.png", dpi=110)
    check.plot_spectrum(check.spectrum(draws, held_out)).savefig(output / "spectrum.png", dpi=110)
    # --8<-- [end:prior]

    truth = held_out[12]
    clean = camera(0.9)(truth) + 2.0
    y = clean + 0.8 * jax.random.normal(keys[4], clean.shape)

    # --8<-- [start:infer]
    engine = sp.NUTS(num_warmup=300, num_samples=300, num_chains=4, max_tree_depth=6)
    tree = sp.infer(model, engine, key=keys[5], y=y)
    print(az.summary(tree, var_names=["width", "background", "noise"]))
    print("largest R-hat:", float(az.rhat(tree["posterior"].dataset)["x"].max()))
    tree.to_netcdf(output / "posterior.nc", engine="h5netcdf")
    # --8<-- [end:infer]

    # --8<-- [start:checks]
    panel = np.full((8, 8), np.nan)
    panel[seen] = y - 2.0
    picture = sp.plot_posterior_images(tree, "x", truth=truth, data=panel)
    picture.savefig(output / "posterior.png", dpi=150)

    posterior = tree["posterior"]
    predicted = np.asarray(posterior["clean"]).reshape(-1, y.size)
    camera_data = Predictions(y, predicted, np.full(y.shape, posterior["noise"].mean()))
    sp.plot_residuals({"camera": camera_data}).savefig(output / "residuals.png", dpi=110)
    print(f"chi-squared per pixel: {camera_data.chi_squared():.2f}")

    images = np.asarray(posterior["x"]).reshape(-1, 8, 8)
    alarm = check.out_of_distribution(prior, images[::60], key=keys[7])
    print("is the reconstruction a digit? p =", alarm.attrs["p_value"])
    # --8<-- [end:checks]


if __name__ == "__main__":
    main()
