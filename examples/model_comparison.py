"""Which blur made these data, and which noise? Bayes factors, checked against the closed form.

    python examples/model_comparison.py

A signal of 8 pixels has one of three shapes, with Gaussian variations: a mixture prior, whose exact
denoiser stands in for a trained network. It is seen through a blur of unknown width under noise of
unknown level. Every candidate is a NumPyro model with its own evidence `p(y)`; here the evidence is
also known in closed form, and the program fails where a log Bayes factor is more than five standard
errors from it. CPU, about a minute.
"""

import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import scoreprior as sp
from scoreprior.denoise import GaussianMixture
from scoreprior.smc import RandomWalkMoves

SIZE, SIGMA_MIN = 8, 0.05
TRUE = (1.2, 0.15)  # width of the blur, noise
CANDIDATES = (TRUE, (0.5, 0.15), (1.2, 0.4))


def shapes() -> GaussianMixture:
    """A bump to the left, a bump to the right, or a slope, each with independent variations."""
    grid = jnp.arange(SIZE, dtype=jnp.float32)
    bumps = [2 * jnp.exp(-0.5 * (grid - centre) ** 2) for centre in (2.0, 5.0)]
    means = jnp.stack([*bumps, 0.25 * grid])
    return GaussianMixture.diagonal(jnp.array([0.3, 0.3, 0.4]), means, 0.3**2 - SIGMA_MIN**2)


def blur(width: float) -> jax.Array:
    """The matrix of a Gaussian blur, rows of sum one."""
    grid = jnp.arange(SIZE, dtype=jnp.float32)
    kernel = jnp.exp(-0.5 * ((grid[:, None] - grid[None, :]) / width) ** 2)
    return kernel / kernel.sum(1, keepdims=True)


def model(prior: sp.ScorePrior, width: float, noise: float, y: jax.Array) -> None:
    """One candidate."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(blur(width) @ x, noise).to_event(1), obs=y)


def main() -> None:
    """Run every candidate, compare all with the best and check."""
    start = time.perf_counter()
    law = shapes()
    # The prior is the law of `X + sigma_min N`: variances of 0.3^2 in all.
    prior = sp.ScorePrior(sp.Flow(law, law.moments(), sigma_min=SIGMA_MIN, solver=sp.FixedGrid(8)))
    key_x, key_y, key = jax.random.split(jax.random.key(5), 3)
    true_width, true_noise = TRUE
    x = prior.sample(key_x)
    y = blur(true_width) @ x + true_noise * jax.random.normal(key_y, (SIZE,))

    engine = sp.PersistentSMC(150, 8, kernel=RandomWalkMoves())
    trees, exact = {}, {}
    level = GaussianMixture.diagonal(law.weights, law.components.mean, 0.3**2)
    for width, noise in CANDIDATES:
        candidate = width, noise
        trees[candidate] = sp.infer(model, engine, prior, width, noise, y, key=key, progress=False)
        exact[candidate] = level.log_evidence(blur(width), y, noise**2 * jnp.eye(SIZE))

    best = max(trees, key=lambda c: float(trees[c]["sample_stats"]["log_evidence"]))
    print(
        f"true: width {TRUE[0]}, noise {TRUE[1]}; most probable: width {best[0]}, noise {best[1]}"
    )
    for candidate, tree in trees.items():
        if candidate == best:
            continue
        found = sp.log_bayes_factor(trees[best], tree)
        truth = float(exact[best] - exact[candidate])
        print(
            f"{best} over {candidate}: log Bayes factor "
            f"{found.value:.2f} +- {found.se:.2f}, exactly {truth:.2f}"
        )
        assert abs(found.value - truth) <= 5 * found.se, "more than five standard errors off"
    print(f"all within five standard errors, after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
