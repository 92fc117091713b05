"""The posterior of many observations, put together from the posteriors of each.

With a prior `p` and observations `x_1 ... x_n` independent given the parameters `z`,

    p(z | x_1..n)  =  p(z)^(1-n) prod_i p(z | x_i) / Z,      Z = p(x_1..n) / prod_i p(x_i),

a product of powers of diffusion models, which `Composition` and `FeynmanKac` sample without bias.
That sums of scores do so only where every posterior is Gaussian, if at all, is why other methods
(`sbi.scores`) are off even with exact scores (Linhart et al. 2024, "Diffusion posterior sampling
for simulation-based inference in tall data settings", lemma 3.1).

A **bridge** makes the way down the noise levels easy. With Gaussians `G_j` about the factors, and
`G = prod_j G_j^w_j / Z_G` their product, which is a Gaussian, the path

    p_r(z) = G_r(z) prod_j (q_{j,r}(z) / G_{j,r}(z))^w_j,

every law with noise of level `r` added, ends at the same product at `r = 0`. Where the factors are
Gaussian it is the posterior itself that diffuses: weights are even, and as few steps will do for
ten thousand observations as for one. The plain path, without `G`, narrows to the posterior of all
observations while each of them still is noise, and takes steps in proportion to `n`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._stack import Stack
from scoreprior._typing import Scalar
from scoreprior._util import is_traced
from scoreprior.composition import Composition
from scoreprior.denoise import Gaussian
from scoreprior.denoise.exact import AbstractExact
from scoreprior.feynman_kac import Composed, Factor
from scoreprior.flow import Flow, LogRatioTime, Multistep
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior

LEAST_GAIN = 1e-3
"""An observation adds at least this share of the prior's precision in every direction, in a bridge.

The prior itself is left as it is: so the precision of all is never below the prior's.
"""


class Bridge(NamedTuple):
    """Gaussians about the factors of a product."""

    stack: Stack[Factor]  # G_j to the powers -w_j, and G
    log_scale: Scalar  # log Z_G
    num_repaired: int  # posteriors that were wider than the prior in some direction


class Product(Composition):
    """`p(z)^(1-n) prod_i p(z | x_i) / Z` as a NumPyro distribution; build it with `sbi.compose`.

    All that holds of a `Composition` holds here: it is a prior site of any model, with any engine;
    `log_prob` is unnormalised, and the `log_evidence` of `FeynmanKac` without other data is
    `log p(x_1..n) - sum_i log p(x_i)`. That is how much better the observations fit one parameter
    than one each: far below what simulated data give, they do not belong together.

    **Attributes:** `priors`, the posteriors and after them the priors; `exponents`;
    `num_observations`; `bridge`, `None` for the plain path.
    """

    pytree_data_fields = ("bridge_stack", "log_scale")
    pytree_aux_fields = ("num_observations", "num_repaired")

    def __init__(
        self,
        posteriors: Sequence[ScorePrior],
        priors: Sequence[ScorePrior],
        exponents: Sequence[float],
        *,
        bridge: bool = True,
        validate_args: bool | None = None,
    ):
        self.num_observations = len(posteriors)
        laws = (*posteriors, *priors)
        self.bridge_stack, self.log_scale, self.num_repaired = None, None, 0
        if bridge:
            self.bridge_stack, self.log_scale, self.num_repaired = make_bridge(laws, exponents)
        super().__init__(laws, exponents, validate_args=validate_args)

    def composed(self, num_steps: int, **settings: Any) -> Composed:
        chain = super().composed(num_steps, **settings)
        if self.bridge_stack is None:
            return chain
        return chain.with_factors((self.bridge_stack,), self.log_scale)

    def _least_steps(self, low: float, high: float) -> int:
        return super()._least_steps(low, high) if self.bridge_stack is None else 1

    def __repr__(self) -> str:
        bridge = "no bridge" if self.bridge_stack is None else "bridge"
        if self.num_repaired:
            bridge += f" with {self.num_repaired} posteriors repaired"
        return (
            f"Product(event_shape={self.event_shape}, num_observations={self.num_observations}, "
            f"unnormalised, {bridge})"
        )


def compose(
    posteriors: Sequence[ScorePrior],
    prior: ScorePrior | AbstractExact | None,
    *,
    new_prior: ScorePrior | AbstractExact | None = None,
    bridge: bool = True,
) -> Product:
    """The posterior given all observations, from the posterior given each.

        product = sbi.compose([posterior.condition(x) for x in observations], parameters.law)

    Posteriors may come from different simulators, each with data of its own, as long as they share
    the parameters and the `prior` that they were trained with. Leaving one out of the list drops
    its observation.

    **Arguments:** `posteriors`, `p(z | x_i)`, at least one; `prior`, that of training, a
    `ScorePrior` or an exact denoiser, as `Parameters.law` is where it is known; `new_prior`, one
    that takes its place: `p_new(z) p(z)^(-n) prod_i p(z | x_i)`; `bridge`, whether to go by
    Gaussians with the moments of the flows, or by the plain path, which is free of them and needs
    many more steps.

    Flows get the noise levels and the solver of all together, so that they are solved side by side.
    Raises `ValueError` for no posterior, and for shapes or noise levels that disagree.
    """
    posteriors = list(posteriors)
    if not posteriors:
        raise ValueError("posteriors must hold at least one, the posterior of one observation")
    for index, one in enumerate(posteriors):
        if not isinstance(one, ScorePrior):
            raise TypeError(f"posteriors[{index}] must be a ScorePrior, got {type(one).__name__}")
    n = len(posteriors)
    given: list[tuple[Any, float]] = [(prior, 1.0 - n)]
    if new_prior is not None:
        given = [(prior, -float(n)), (new_prior, 1.0)]
    priors = [(_as_prior(law, posteriors[0]), power) for law, power in given if power != 0]
    shapes = {law.event_shape for law in (*posteriors, *(law for law, _ in priors))}
    if len(shapes) > 1:
        raise ValueError(
            f"posteriors and prior must share an event shape, the size of z, got {sorted(shapes)}"
        )
    laws = _alike([*posteriors, *(law for law, _ in priors)])
    exponents = [1.0] * n + [power for _, power in priors]
    return Product(laws[:n], laws[n:], exponents, bridge=bridge)


def _as_prior(law: Any, like: ScorePrior) -> ScorePrior:
    if isinstance(law, ScorePrior):
        return law
    if law is None:
        raise ValueError(
            "prior must be a ScorePrior or an exact denoiser, got None: this prior has no closed "
            "form with noise; train with drop > 0 and take posterior.prior(), the learned one"
        )
    if not isinstance(law, AbstractExact):
        raise TypeError(
            f"prior must be a ScorePrior or an exact denoiser, got {type(law).__name__}"
        )
    flow = like.flow
    levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    return ScorePrior(Flow(law, law.moments(), solver=flow.solver, **levels), like.density)


def _alike(laws: list[ScorePrior]) -> list[ScorePrior]:
    """The same denoisers and moments, with the noise levels and the solver of all together."""
    flows = [law.flow for law in laws]
    low, high = max(f.sigma_min for f in flows), max(f.sigma_max for f in flows)
    high = min([high, *(float(getattr(f.denoiser, "level_range", (0, high))[1]) for f in flows)])
    scales = np.sqrt([np.asarray(f.moments.eigenvalues, float).ravel() for f in flows])
    narrow = max(low, float(scales.min()))
    solver = Multistep(30, LogRatioTime(narrow, max(float(scales.max()), 2 * narrow)))
    return [
        ScorePrior(
            Flow(f.denoiser, f.moments, sigma_min=low, sigma_max=high, solver=solver), law.density
        )
        for f, law in zip(flows, laws, strict=True)
    ]


def make_bridge(laws: Sequence[ScorePrior], exponents: Sequence[float]) -> Bridge:
    """Gaussians with the moments of the flows, repaired so that their product has a covariance.

    A posterior that is wider than the prior in some direction, as sampling noise may make it, is
    narrowed there. That changes the path, and not where it ends.
    """
    if any(is_traced(law.flow.moments.mean) for law in laws):
        raise ValueError("bridge must be False where the moments of posteriors are traced by jax")
    shape, dtype = laws[0].event_shape, laws[0].flow.moments.mean.dtype
    sigma_min = laws[0].sigma_min
    noise = sigma_min**2 * np.eye(laws[0].flow.moments.size)
    weights = np.asarray(exponents, float)
    means = np.stack([np.asarray(law.flow.moments.mean, float).ravel() for law in laws])
    covariances = np.stack([np.asarray(law.flow.moments.covariance(), float) for law in laws])
    precisions = np.linalg.inv(covariances + noise)
    num_repaired = 0
    if (weights < 0).any():
        base = precisions[int(weights.argmin())]  # the prior of training
        for index in np.flatnonzero(weights > 0)[: len(weights) - 1]:
            precisions[index], changed = _narrowed(precisions[index], base)
            num_repaired += changed
    total = np.tensordot(weights, precisions, 1)
    pulls = np.einsum("nij,nj->ni", precisions, means)
    mean = np.linalg.solve(total, weights @ pulls)
    log_scale = weights @ _log_normals(mean, means, precisions) - _log_normal(0 * mean, total)
    means = np.concatenate([means, mean[None]])
    precisions = np.concatenate([precisions, total[None]])
    powers = jnp.asarray(np.append(-weights, 1.0), dtype)

    def factor(mean: Array, covariance: Array, power: Array) -> Factor:
        moments = Moments.dense(mean.reshape(shape), covariance)
        return Factor(Gaussian(moments), moments, jnp.asarray(sigma_min, dtype), power)

    clean = np.linalg.inv(precisions) - noise
    batched = jax.vmap(factor)(jnp.asarray(means, dtype), jnp.asarray(clean, dtype), powers)
    return Bridge(Stack.batched(batched, len(means)), jnp.asarray(log_scale, dtype), num_repaired)


def _narrowed(precision: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, bool]:
    """`precision`, raised to at least `(1 + LEAST_GAIN) base` in every direction."""
    root = np.linalg.cholesky(base)
    inverse = np.linalg.inv(root)
    values, vectors = np.linalg.eigh(inverse @ precision @ inverse.T)
    if values[0] >= 1 + LEAST_GAIN:
        return precision, False
    turned = root @ vectors
    return (turned * np.maximum(values, 1 + LEAST_GAIN)) @ turned.T, True


def _log_normals(x: np.ndarray, means: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    return np.asarray([_log_normal(x - m, P) for m, P in zip(means, precisions, strict=True)])


def _log_normal(x: np.ndarray, precision: np.ndarray) -> float:
    return float(np.linalg.slogdet(precision / (2 * np.pi))[1] - x @ precision @ x) / 2


__all__ = ["Bridge", "Product", "compose", "make_bridge"]
