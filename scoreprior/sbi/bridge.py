"""Bridges: Gaussians that make the way to a product of many factors easy.

With Gaussians `G_j` about the factors, and `G = prod_j G_j^w_j / Z_G`, a Gaussian too, the path

    p_r(z) = G_r(z) prod_j (q_{j,r}(z) / G_{j,r}(z))^w_j,

every law with noise of level `r` added, ends at the same product at `r = 0`. Where the factors are
Gaussian it is the posterior itself that diffuses: weights are even, and as few steps will do for
ten thousand observations as for one. The plain path, without `G`, narrows to the posterior of all
observations while each of them still is noise, and takes steps in proportion to `n`.

A posterior with tails wider than its Gaussian's would leave a path that has no normaliser. So
Gaussians are widened towards the prior, `G_j -> G_0 (G_j / G_0)^share`, until the tails of the path
fall off at all levels; `share = 0` is the plain path.

Errors of learned scores add up over observations, and may outweigh what the posterior pulls, on
any path. They move its centre; but they are bounded, and leave the slope of its tails.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._stack import Stack
from scoreprior._typing import Scalar
from scoreprior._util import is_traced
from scoreprior.denoise import Gaussian
from scoreprior.feynman_kac import Factor
from scoreprior.feynman_kac.composed import sum_over
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior

LEAST_GAIN = 1e-3
"""An observation adds at least this share of the prior's precision in every direction, in a bridge.

The prior itself is left as it is: so the precision of all is never below the prior's.
"""

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05)
"""Shares of what an observation adds to the prior's Gaussian: the first with tails is taken."""

NUM_CHECKED = 256
"""Posteriors by which the tails of very many are estimated."""

FAR = (6.0, 12.0)
"""Standard deviations of `G` between which tails are looked at."""

LEAST_SLOPE = 0.25
"""Of minus the score there, in units of the slope of `G`; the bridge may take as much."""


class Bridge(NamedTuple):
    """Gaussians about the factors of a product."""

    stack: Stack[Factor]  # G_j to the powers -w_j, and G
    log_scale: Scalar  # log Z_G
    num_repaired: int  # posteriors that were wider than the prior in some direction


def find_bridge(
    laws: Sequence[ScorePrior],
    exponents: Sequence[float],
    factors: tuple[Stack[Factor], ...],
    rows: np.ndarray | None = None,
) -> tuple[Bridge, float] | None:
    """The bridge of the largest share whose path has tails, and the share; `None` where none has.

    Tails that rise without the bridge too are not its fault.

    With `rows`, `factors` are the posteriors, the first of `laws`, and after them the priors: tails
    are estimated from the posteriors at these rows, and the Gaussians about them.
    """
    # Without a prior's Gaussian there is nothing to widen towards.
    for share in SHARES if min(exponents) < 0 else (1.0,):
        found = make_bridge(laws, exponents, share)
        path, of_bridge = tails(factors, found.stack, rows)
        if ((path >= LEAST_SLOPE) | (of_bridge >= -LEAST_SLOPE)).all():
            return found, share
    return None


def make_bridge(
    laws: Sequence[ScorePrior], exponents: Sequence[float], share: float = 1.0
) -> Bridge:
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
    covariances = np.stack([np.asarray(_covariance(law.flow.moments), float) for law in laws])
    precisions = np.linalg.inv(covariances + noise)
    num_repaired = 0
    if (weights < 0).any():
        lowest = int(weights.argmin())  # the prior of training
        base, base_pull = precisions[lowest], precisions[lowest] @ means[lowest]
        for index in np.flatnonzero(weights > 0):
            narrow, changed = narrowed(precisions[index], base)
            num_repaired += changed
            gain = share * (narrow @ means[index] - base_pull)
            precisions[index] = base + share * (narrow - base)
            means[index] = np.linalg.solve(precisions[index], base_pull + gain)
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


def _thinned(stack: Stack[Factor], rows: np.ndarray, scale: float) -> Stack[Factor]:
    """Those at `rows`, their exponents times `scale`."""
    taken = stack.take(rows)
    exponents = scale * taken.map(lambda factor: factor.exponent)
    return taken.rearrange(
        lambda factor, exponent: eqx.tree_at(lambda f: f.exponent, factor, exponent), exponents
    )


@eqx.filter_jit
def _covariance(moments: Moments) -> Array:
    return moments.covariance()


class Tails(NamedTuple):
    """Slopes of minus the score, in units of that of `G` [level, direction]."""

    path: np.ndarray  # the largest that errors of the scores leave possible
    bridge: np.ndarray  # what the bridge adds


def tails(
    factors: tuple[Stack[Factor], ...], bridge: Stack[Factor], rows: np.ndarray | None = None
) -> Tails:
    """Between `FAR` of `G` with the noise of the level, both ways along axes, at twenty levels.

    Axes are those of the curvature at the centre. The tails of a law are a slope times the distance
    and, if they come from another centre, an offset: errors of scores are taken to vary by half of
    it at most, and rounding as much as it may. For `rows` see `find_bridge`.
    """
    last, gaussians = bridge[bridge.size - 1], (bridge,)
    if rows is not None:
        posteriors, *priors = factors
        n = posteriors.size
        some, about = (_thinned(stack, rows, n / len(rows)) for stack in (posteriors, bridge))
        factors, gaussians = (some, *priors), (about, bridge.take(np.arange(n, bridge.size)))
    return Tails(*map(np.asarray, _tails(factors, gaussians, last.moments, last.sigma_min)))


@eqx.filter_jit
def _tails(
    factors: tuple[Stack[Factor], ...],
    bridge: tuple[Stack[Factor], ...],
    center: Moments,
    sigma_min: Scalar,
) -> tuple[Array, Array]:
    far = jnp.asarray(FAR, center.mean.dtype)
    # Of more observations than `sigma_min` allows, the clean variances may be negative.
    low, high = center.scales(sigma_min).min() / 3, 10 * center.scales(sigma_min).max()
    levels = jnp.geomspace(low, high, 20, dtype=far.dtype)

    def score(stacks: tuple[Stack[Factor], ...], u: Array, r: Scalar) -> Array:
        """The gradient of the log density in whitened `u` [size]."""
        sigma = jnp.sqrt(r**2 + sigma_min**2)
        z = center.colour(u.reshape(center.event_shape), sigma)
        total = sum_over(stacks, lambda f: f.exponent * f.score(z, r))
        return (center.scales(sigma) * center.basis.analyse(total)).ravel()

    def axes(r: Scalar) -> Array:
        """Directions of the curvature at the centre [size, size], the weakest among them."""
        origin = jnp.zeros(center.size, far.dtype)
        curvature = jax.jacfwd(lambda u: score((*factors, *bridge), u, r))(origin)
        return jnp.linalg.eigh((curvature + curvature.T) / 2)[1].T

    def along(axis: Array, r: Scalar) -> tuple[Array, Array]:
        def inwards(stacks: tuple[Stack[Factor], ...]) -> Array:
            return jax.vmap(lambda d: -score(stacks, d * axis, r) @ axis)(far)

        def slope(pulls: Array) -> Array:
            return (pulls[1] - pulls[0]) / (far[1] - far[0])

        of_bridge = inwards(bridge)
        path = inwards(factors) + of_bridge
        half_offset = jnp.abs(path[1] / far[1] - slope(path)) * far[1] / 2
        doubt = (half_offset + rounding(axis, r)) / (far[1] - far[0])
        return slope(path) + doubt, slope(of_bridge)

    def rounding(axis: Array, r: Scalar) -> Array:
        """Of the scores of all factors, along the axis."""
        sigma = jnp.sqrt(r**2 + sigma_min**2)
        z = center.colour((far[1] * axis).reshape(center.event_shape), sigma)
        weight = jnp.sqrt(sum_over((*factors, *bridge), lambda f: f.exponent**2))
        width = jnp.linalg.norm(center.scales(sigma).ravel() * axis)
        return jnp.finfo(z.dtype).eps * jnp.abs(z).max() * weight / sigma**2 * width

    def at_level(r: Scalar, axes: Array) -> tuple[Array, Array]:
        return jax.lax.map(lambda axis: along(axis, r), jnp.concatenate([axes, -axes]))

    return jax.vmap(at_level)(levels, jax.lax.map(axes, levels))


def narrowed(precision: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, bool]:
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


__all__ = ["NUM_CHECKED", "Bridge", "find_bridge", "make_bridge", "narrowed", "tails"]
