"""How far a denoiser is from one whose score is a gradient.

The score of a density has a symmetric Jacobian, and so has its denoiser, `sigma^2 dD/dx` being a
covariance. A trained network's need not be symmetric; then path integrals of its score depend on
the path, and no density has that score.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import check_count
from scoreprior.denoise.base import AbstractDenoiser


class Asymmetry(NamedTuple):
    """The asymmetry of a Jacobian relative to its size, in [0, 2], and its standard error."""

    value: Scalar
    standard_error: Scalar


def asymmetry(
    denoiser: AbstractDenoiser,
    x_t: Float[Array, "n *event"],
    sigma: Sigma,
    *,
    key: Key,
    num_probes: int = 1,
    context: Context = None,
) -> Asymmetry:
    """`sqrt(E|J - J'|_F^2 / E|J|_F^2)`, `J = dD/dx`, over noisy events `x_t` at level `sigma`.

    0 for the gradient of an energy, 1.41 for a matrix of independent entries, 2 where there is
    nothing symmetric. By `num_probes` Rademacher vectors `v` per event (Hutchinson 1989),
    `E|Jv - J'v|^2 = |J - J'|_F^2` and `E|Jv|^2 = |J|_F^2`, one product with `J` and one with `J'`
    each: the measure of Chao et al. ("On investigating the conservative property of score-based
    models", ICML 2023), of the denoiser in place of the score, whose Jacobian at high noise is
    `-I / sigma^2` and hides what is asymmetric in it.

    `x_t` [n, *event], `n >= 2`, in data units, such as data with noise added; `context` is shared.
    The standard error is that of independent events, by the delta method; NaN where `value` is 0.
    """
    check_count("num_probes", num_probes)
    if x_t.shape[0] < 2:
        raise ValueError(f"x_t must hold at least two events, [n, *event], got shape {x_t.shape}")
    return _asymmetry(denoiser, x_t, jnp.asarray(sigma, x_t.dtype), key, num_probes, context)


def products(
    denoiser: AbstractDenoiser, x: Event, sigma: Sigma, context: Context, v: Event
) -> tuple[Event, Event]:
    """`J v` and `J'v`, `J = dD/dx` at one event."""

    def denoise(x: Event) -> Event:
        return denoiser(x, sigma, context)

    _, forward = jax.jvp(denoise, (x,), (v,))
    _, pullback = jax.vjp(denoise, x)
    return forward, pullback(v)[0]


@eqx.filter_jit
def _asymmetry(
    denoiser: AbstractDenoiser,
    x_t: Array,
    sigma: Scalar,
    key: Key,
    num_probes: int,
    context: Context,
) -> Asymmetry:
    def one(x: Event, key: Key) -> tuple[Scalar, Scalar]:
        def probe(v: Event) -> tuple[Scalar, Scalar]:
            forward, backward = products(denoiser, x, sigma, context, v)
            return jnp.sum((forward - backward) ** 2), jnp.sum(forward**2)

        probes = jax.random.rademacher(key, (num_probes, *x.shape), x.dtype)
        above, below = jax.vmap(probe)(probes)
        return above.mean(), below.mean()

    above, below = jax.vmap(one)(x_t, jax.random.split(key, x_t.shape[0]))
    square = above.mean() / below.mean()
    spread = jnp.std(above - square * below, ddof=1) / below.mean() / jnp.sqrt(x_t.shape[0])
    return Asymmetry(jnp.sqrt(square), spread / (2 * jnp.sqrt(square)))
