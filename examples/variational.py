"""Fit a guide to the posterior of a half-hidden digit, check it, save it and draw from it again.

    python examples/variational.py

The upper half of a digit drawn from the prior is seen with noise of three grey levels. Non-centred
variational inference with a full-rank normal takes about half a minute on two cores. It ends in
checks against what must hold whatever the digit: the ELBO is below the importance-weighted estimate
of the evidence, the fit explains the visible pixels to within their noise, and a saved guide gives
the same draws.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreprior as sp

NOISE = 3.0
"""Standard deviation of the data, in grey levels from 0 to 17."""

PRIOR = sp.load("digits")


def model(y: jax.Array) -> None:
    """A digit of which the upper half is seen."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x[:4], NOISE).to_event(2), obs=y)


def main() -> None:
    """Fit, draw, check."""
    key_x, key_y, key_fit, key_draw = jax.random.split(jax.random.key(1), 4)
    truth = PRIOR.sample(key_x)
    y = truth[:4] + NOISE * jax.random.normal(key_y, (4, 8))

    problem = sp.Problem.from_model(model, y)
    fitted = sp.VI(sp.vi.FullRank(), num_steps=800, num_samples=1000).fit(problem, key_fit)
    tree = sp.infer(model, fitted, y, key=key_draw)

    stats = tree["sample_stats"]
    elbo, elbo_se = float(stats["elbo"]), float(stats["elbo_se"])
    log_evidence, khat = float(stats["log_evidence"]), float(stats["khat"])
    print(f"ELBO {elbo:.2f} +- {elbo_se:.2f}, log evidence {log_evidence:.2f}, k-hat {khat:.2f}")

    x = tree["posterior"]["x"].values[0]  # [draw, 8, 8]
    residual = float(np.sqrt(np.mean((x.mean(0)[:4] - np.asarray(y)) ** 2))) / NOISE
    spread = float(x[:, 4:].std(0).mean() / x[:, :4].std(0).mean())
    print(f"residual of the seen half: {residual:.2f} noise levels")
    print(f"the hidden half is {spread:.1f} times as uncertain as the seen one")

    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder) / "guide")
        again = sp.vi.FittedGuide.load(Path(folder) / "guide", problem)
    same = jnp.array_equal(again.sample(key_draw, 5)["x"], fitted.sample(key_draw, 5)["x"])

    assert elbo < log_evidence, "the ELBO must not exceed the evidence"
    assert 0.3 < residual < 1.3, f"the residual must be about the noise, got {residual}"
    assert spread > 1.2, f"the hidden half must be less certain, got {spread}"
    assert same, "a saved guide must give the same draws"
    print("all checks passed")


if __name__ == "__main__":
    main()
