"""Pictures of annealing, a product and a posterior: of mixtures in a plane, and of digits.

    python examples/gallery.py --output gallery          # three minutes of one core

In the plane, priors are mixtures of normals, so the law is known at every noise level, and at the
end in closed form: whole powers and products of mixtures are mixtures, and so are posteriors. A
weighted cloud goes down the levels; beside it goes one that follows the same composed score and
ignores the weights. The program ends in checks: evidence, mean and masses of modes of the weighted
clouds are those of the closed form, and those of the others are not. The digits are of the bundled
prior; those of imaging are in `gallery_imaging.py`.
"""

import argparse
import itertools
import math
import time
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from gallery_imaging import imaging
from jax.scipy.special import logsumexp
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import scoreprior as sp
from scoreprior.denoise import Empirical, GaussianMixture
from scoreprior.feynman_kac import Composed, NoControl, Resampling, init, step, systematic
from scoreprior.guide import JFPS
from scoreprior.guide.twist import DataTwist
from scoreprior.observation import LinearObservation

SIGMA_MIN, SIGMA_MAX = 0.05, 20.0
NUM_GROUPS, NUM_PARTICLES, NUM_STEPS, NUM_DOTS = 16, 2000, 300, 400
SHOWN = (3.0, 1.5, 0.75, 0.4, 0.2, 0.0)
"""Noise levels of the panels, as nearly as the steps have them."""
KINDS = ("weighted", "weights ignored")
COLOURS = {"exact": "0.35", "weighted": "#0072B2", "weights ignored": "#D55E00"}


class Mixture(NamedTuple):
    """`weights` [K], `means` [K, 2] and `covariances` [K, 2, 2]."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    def noisy(self) -> "Mixture":
        """With noise of `sigma_min`: the law of a prior."""
        return self._replace(covariances=self.covariances + SIGMA_MIN**2 * np.eye(2))

    def law(self) -> GaussianMixture:
        """In single precision."""
        return GaussianMixture.full(*(jnp.asarray(part, jnp.float32) for part in self))


def ring() -> Mixture:
    """Six modes on a circle, the heavier the longer."""
    angle = np.arange(6) * np.pi / 3 + np.pi / 12
    out = np.stack([np.cos(angle), np.sin(angle)], 1)
    along = np.stack([-out[:, 1], out[:, 0]], 1)
    weights = np.array([0.05, 0.1, 0.15, 0.2, 0.2, 0.3])
    covariances = 0.2**2 * out[:, :, None] * out[:, None]
    lengths = (0.15 + 1.5 * weights)[:, None, None]
    return Mixture(weights, 2 * out, covariances + lengths**2 * along[:, :, None] * along[:, None])


def bars() -> Mixture:
    """Three upright bars."""
    means = np.array([[-1.6, 0.0], [0.3, 0.0], [1.6, 0.0]])
    covariance = np.diag([0.2**2, 1.5**2])
    return Mixture(np.array([0.5, 0.2, 0.3]), means, np.stack([covariance] * 3))


def product(first: Mixture, second: Mixture) -> Mixture:
    """The product of the densities, a mixture whose weights sum to its integral."""
    parts = []
    for i, j in itertools.product(range(len(first.weights)), range(len(second.weights))):
        (w, m, C), (v, n, D) = ([part[k] for part in law] for law, k in ((first, i), (second, j)))
        gain = C @ np.linalg.inv(C + D)
        distance = (n - m) @ np.linalg.inv(C + D) @ (n - m)
        overlap = np.exp(-distance / 2) / np.sqrt(np.linalg.det(2 * np.pi * (C + D)))
        covariance = gain @ D
        parts.append((w * v * overlap, m + gain @ (n - m), (covariance + covariance.T) / 2))
    return Mixture(*(np.stack(part) for part in zip(*parts, strict=True)))


class Case(NamedTuple):
    """A composition and what tilts it, with its exact law and log evidence."""

    title: str
    composition: sp.Composition
    truth: GaussianMixture
    log_evidence: float
    twist: DataTwist | None = None

    def chain(self, *, corrected: bool) -> Composed:
        """The Feynman-Kac model: the drift is the composed score, but for variance control."""
        control = None if corrected and self.twist is None else NoControl()
        seen = self.twist and self.twist.observation

        def log_likelihood(x: jax.Array) -> jax.Array:
            residual = seen.data - seen.mean(x)
            return seen.noise.log_prob(residual)

        return self.composition.composed(
            NUM_STEPS,
            control=control,
            twist=self.twist,
            log_likelihood=log_likelihood if seen else None,
        )

    def log_density(self, x: jax.Array, r: float) -> jax.Array:
        """What the cloud targets at level `r`, unnormalised."""
        if r == 0:
            return self.truth.log_prob(x)
        sigma = math.hypot(r, SIGMA_MIN)
        pairs = list(zip(self.composition.exponents, self.composition.priors, strict=True))
        total = sum(beta * prior.flow.denoiser.log_prob(x, sigma) for beta, prior in pairs)
        if self.twist is None:
            return total

        def denoise(x: jax.Array) -> jax.Array:
            return x + r**2 * pairs[0][1].flow.denoiser.score(x, sigma)

        return total + self.twist(denoise, x, jnp.asarray(r))[0]


def cases() -> dict[str, Case]:
    """The three problems in the plane."""
    one, two = (
        sp.ScorePrior(
            sp.Flow(part.law(), part.law().moments(), sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        )
        for part in (ring(), bars())
    )
    seen = LinearObservation(jnp.array([[1.0, 0.6]]), jnp.array([0.4]), jnp.array([[0.5**2]]))
    data = seen.A, seen.data, seen.noise.covariance()
    plain = ring().noisy().law()

    def case(title: str, factors: dict, factor_laws: list[Mixture]) -> Case:
        found = reduce(product, [law.noisy() for law in factor_laws])
        total = found.weights.sum()
        heard = found.weights > 1e-12 * total  # the rest is zero in single precision
        truth = Mixture(found.weights[heard] / total, found.means[heard], found.covariances[heard])
        truth = truth.law()
        return Case(title, sp.compose(factors), truth, float(np.log(total)))

    return {
        "annealing": case("Annealing: the ring to the power three", {one: 3.0}, [ring()] * 3),
        "product": case(
            "Product of the ring and three bars", {one: 1.0, two: 1.0}, [ring(), bars()]
        ),
        "posterior": Case(
            "Posterior: the ring, given one noisy datum",
            sp.compose({one: 1.0}),
            plain.posterior(*data),
            float(plain.log_evidence(*data)),
            DataTwist(JFPS(one.flow.moments), seen),
        ),
    }


class Clouds(NamedTuple):
    """Clouds after every step, the first included: particles [group, level, particle, 2]."""

    particles: np.ndarray
    log_weights: np.ndarray
    r: np.ndarray  # [level]

    def weights(self) -> np.ndarray:
        """Of the last clouds, [group, particle], with sums of one."""
        return np.asarray(jax.nn.softmax(jnp.asarray(self.log_weights[:, -1]), 1))


def go_down(case: Case, *, corrected: bool, key: jax.Array) -> Clouds:
    """Independent clouds; without correction the weights are kept, but nothing asks for them."""
    chain = case.chain(corrected=corrected)
    model, resampling = chain.model(), Resampling(0.5 if corrected else 0.0)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_start, key_steps = jax.random.split(key)

        def body(state, key):
            new, _ = step(model, resampling, state, key)
            return new, (new.particles, new.log_weights)

        start = init(model, NUM_PARTICLES, key_start)
        _, rest = jax.lax.scan(body, start, jax.random.split(key_steps, model.num_steps))
        first = start.particles, start.log_weights
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    particles, log_weights = jax.jit(jax.vmap(one))(jax.random.split(key, NUM_GROUPS))
    r = np.append(np.asarray(chain.levels.r), 0.0)
    if not corrected:
        log_weights = jnp.zeros_like(log_weights)
    return Clouds(np.asarray(particles), np.asarray(log_weights), r)


def strip(case: Case, found: dict[str, Clouds], key: jax.Array) -> Figure:
    """Clouds and contours of the exact law at some levels, and the masses of the modes at last."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, len(SHOWN) + 1)
    share = math.sqrt(float(jnp.sum(case.composition.exponents)))
    for (row, (name, clouds)), (column, level) in itertools.product(
        enumerate(found.items()), enumerate(SHOWN)
    ):
        k = int(np.argmin(np.abs(clouds.r - level)))
        r, colour = float(clouds.r[k]), COLOURS[name]
        half = 2.9 + 2.2 * r / share
        ax = figure.add_subplot(grid[row, column])
        weights = jax.nn.softmax(jnp.asarray(clouds.log_weights[0, k]))
        dots = clouds.particles[0, k][systematic(key, weights, NUM_DOTS)]
        ax.scatter(*dots.T, s=3, color=colour, alpha=0.6, linewidths=0)
        points = square(half, 121)
        density = np.exp(over(case, points, r))
        ax.contour(
            *np.moveaxis(points, -1, 0), density, regions(density), colors="0.2", linewidths=0.6
        )
        ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
        ax.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        ax.tick_params(labelsize=6, length=2, pad=1.5, labelbottom=row == 1, labelleft=column == 0)
        if row == 0:
            ax.set_title(f"noise {r:.2g}" if r else "no noise", fontsize=9)
        if column == 0:
            ax.set_ylabel(name, color=colour, fontsize=9)
    bars = figure.add_subplot(grid[:, -1])
    bars.set_title("masses of modes", fontsize=9)
    at = np.arange(len(ring().weights))
    shares = {"exact": exact_masses(case)} | {
        name: masses(clouds).mean(0) for name, clouds in found.items()
    }
    for offset, (name, values) in zip((-0.27, 0, 0.27), shares.items(), strict=True):
        bars.barh(at + offset, values, 0.25, color=COLOURS[name], label=name)
    bars.set(yticks=[], ylim=(at[-1] + 0.6, -1.7))
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(labelsize=6, length=2, pad=1.5)
    bars.legend(fontsize=7, frameon=False, loc="upper right", handlelength=1)
    figure.suptitle(case.title, fontsize=10)
    return figure


def square(half: float, size: int) -> np.ndarray:
    """Points of a grid [size, size, 2]."""
    return np.stack(np.meshgrid(*[np.linspace(-half, half, size, dtype=np.float32)] * 2), -1)


def over(case: Case, points: np.ndarray, r: float) -> np.ndarray:
    """Log density at `points` [*size, 2], largest value zero."""
    flat = jax.jit(jax.vmap(lambda x: case.log_density(x, r)))(points.reshape(-1, 2))
    return np.asarray(flat - flat.max()).reshape(points.shape[:-1])


def regions(density: np.ndarray) -> np.ndarray:
    """Levels of the smallest regions that hold 95, 75 and 35 % of the mass."""
    falling = np.sort(density.ravel())[::-1]
    mass = np.cumsum(falling) / falling.sum()
    return falling[np.searchsorted(mass, [0.95, 0.75, 0.35])]


def nearest(x: np.ndarray) -> np.ndarray:
    """The mode of the ring that is nearest to each point [*batch, 2]."""
    return np.argmin(((x[..., None, :] - ring().means) ** 2).sum(-1), -1)


def exact_masses(case: Case) -> np.ndarray:
    """Mass of the points nearest to each mode [mode], by a sum over a fine grid."""
    points = square(4.0, 401)
    mass = np.bincount(nearest(points).ravel(), np.exp(over(case, points, 0.0)).ravel())
    return mass / mass.sum()


def masses(clouds: Clouds) -> np.ndarray:
    """The same of the last clouds, [group, mode]."""
    weights, modes = clouds.weights(), nearest(clouds.particles[:, -1])
    return np.stack([(weights * (modes == k)).sum(1) for k in range(len(ring().weights))], 1)


def check(name: str, case: Case, found: dict[str, Clouds]) -> None:
    """Compare the last clouds with the closed form."""
    mean, exact = np.asarray(case.truth.moments().mean), exact_masses(case)
    for kind, clouds in found.items():
        means = np.einsum("gp,gpi->gi", clouds.weights(), clouds.particles[:, -1])
        off = np.abs(means.mean(0) - mean)
        z = (off / standard_error(means)).max()
        tv = np.abs(masses(clouds).mean(0) - exact).sum() / 2
        said = f"{name:10}{kind:16} mean off by {off.max():.3f} ({z:.1f} standard errors), "
        said += f"masses of modes by {tv:.4f} (total variation)"
        if kind == "weighted":
            groups = logsumexp(clouds.log_weights[:, -1], 1) - np.log(NUM_PARTICLES)
            ratio = np.exp(np.asarray(groups) - case.log_evidence)
            se, wrong = standard_error(ratio), ratio.mean() - 1
            print(f"{said}, evidence by {wrong:+.2%} +- {se:.2%}")
            assert z < 5, "the mean must be right"
            assert tv < 0.02, "the masses of modes must be right"
            assert abs(wrong) < 5 * se + 0.01, "the evidence must be right, to the error of steps"
        else:
            print(said)
            assert z > 10, "without weights the mean must be wrong"
            assert tv > 0.05, "without weights the masses of modes must be wrong"


def standard_error(groups: np.ndarray) -> np.ndarray:
    """Of the mean of independent groups, the first axis."""
    return groups.std(0, ddof=1) / np.sqrt(len(groups))


DIGITS_NOISE = 2.0
"""Standard deviation of the data, in grey levels."""


def class_prior(digit: int, like: sp.ScorePrior) -> sp.ScorePrior:
    """A blurred memory of the images of one digit: a kernel density estimate, no training."""
    bundle = load_digits()
    images = bundle.images[bundle.target == digit][:100] + 0.5
    law = Empirical(jnp.asarray(images, jnp.float32), 3.0)
    flow = sp.Flow(law, law.moments(), sigma_min=like.sigma_min, sigma_max=like.flow.sigma_max)
    return sp.ScorePrior(flow)


def sheet(rows: dict[str, np.ndarray]) -> Figure:
    """Rows of images [n, 8, 8], named."""
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.66 * count + 1.3, 0.68 * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), count)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=17)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(linewidth=0.5, color="0.6")
    return figure


def digits(folder: Path, key: jax.Array) -> None:
    """Pictures of the bundled prior, cooled, multiplied and conditioned."""
    key_draw, key_cool, key_three, key_both, key_data, key_post = jax.random.split(key, 6)
    prior = sp.load("digits")
    three = class_prior(3, prior)

    def draw(law: sp.ScorePrior | sp.Composition, key: jax.Array) -> np.ndarray:
        return np.asarray(law.sample(key, (12,)))

    plain = draw(prior, key_draw)
    cooled = {f"power {beta}": draw(sp.compose({prior: beta}), key_cool) for beta in (1.2, 2.0)}
    sheet({"prior": plain} | cooled).savefig(folder / "digits-annealing.png", dpi=110)
    both = draw(sp.compose({prior: 1.0, three: 1.0}), key_both)
    rows = {"digits": plain, "blurred threes": draw(three, key_three), "product": both}
    sheet(rows).savefig(folder / "digits-product.png", dpi=110)

    truth = sp.load_images("digits")[12] + 0.5
    y = truth[:4] + DIGITS_NOISE * jax.random.normal(key_data, (4, 8))

    def model(y: jax.Array) -> None:
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[:4], DIGITS_NOISE).to_event(2), obs=y)

    engine = sp.FeynmanKac(JFPS(prior.flow.moments), 250, 2, 60)
    tree = sp.infer(model, engine, y, key=key_post, progress=False)
    stats = tree["sample_stats"].to_dataset()
    print(
        f"digits: log evidence {float(stats['log_evidence']):.2f} +- "
        f"{float(stats['log_evidence_se']):.2f}"
    )
    data = jnp.concatenate([y, jnp.full((4, 8), jnp.nan)])
    figure = sp.plot_posterior_images(tree, "x", truth=truth, data=data)
    figure.savefig(folder / "digits-posterior.png", dpi=110)


def main() -> None:
    """Make the pictures, and check what is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gallery"), metavar="FOLDER")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for number, (name, case) in enumerate(cases().items()):
        key = jax.random.key(number)
        found = {kind: go_down(case, corrected=kind == "weighted", key=key) for kind in KINDS}
        strip(case, found, key).savefig(folder / f"{name}.png", dpi=110)
        check(name, case, found)
    digits(folder, jax.random.key(3))
    imaging(folder, jax.random.key(4))
    print(f"all checks passed, pictures in {folder} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
