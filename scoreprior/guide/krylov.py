"""The law of a few combinations of data, without a matrix of data by data.

For `S = cov_y + sigma^2 A J A'` and the error `e = y - f(D)` of the denoised event, conjugate
gradients find `S^-1 e` in the Krylov space spanned by `e, S e, S^2 e, ...`. With an orthonormal
basis `Q` of it (Arnoldi 1951), made by one vector-Jacobian product per row,

    Q y ~ N(Q f(D), Q S Q'),        e' Q' (Q S Q')^-1 Q e = e' v,

`v` that of conjugate gradients, since `e` is in the space. Further rows are made in the same way
from fixed random directions, each less its part in the space so far. The `m - k` data outside of
`Q` have no error, and of `log det S` they are given the part

    (m - k) u' log(S) u,

the mean over these directions `u`, of unit length, with the logarithm by the quadrature of the
Krylov space of `u` (stochastic Lanczos; Ubaru, Chen & Saad 2017); without such directions, that of
the noise. Nothing is drawn: the law is a function of `x`.

`J` of a network is not symmetric. As in `TMPD`, of `sigma^2 Q A J A' Q'` only the symmetric part
counts, and of that the negative eigenvalues as zero, so that the law is one for any `J`. Where the
space of a direction ends before its iterations, a random direction takes the next one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior.gaussian import Moments
from scoreprior.guide.base import Denoise, Predicted, compress
from scoreprior.observation import AbstractObservation

Rows = tuple[Float[Array, "k m"], Float[Array, "k n"], Float[Array, "k n"]]
"""`Q`, `Q A` and `Q A J`."""


def predict(
    denoise: Denoise,
    observation: AbstractObservation,
    x: Event,
    sigma: Sigma,
    num_iterations: int,
    num_probes: int,
) -> tuple[Event, Predicted]:
    """`D`, and the law of `num_iterations (1 + num_probes)` combinations of the data, or of all."""
    x_hat, push = jax.linearize(denoise, x)
    mean, see = jax.linearize(observation.mean, x_hat)
    pull, pull_operator = jax.linear_transpose(push, x), jax.linear_transpose(see, x_hat)
    noise = observation.noise
    error = (observation.data - mean).ravel()
    size = min(error.size, num_iterations * (1 + num_probes))
    probes = jax.random.normal(jax.random.key(0), (size + 1, error.size), error.dtype)

    def extend(i: Array, carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
        (Q, A, B), q = carry
        row = pull_operator(q.reshape(mean.shape))[0]
        pulled = pull(row)[0]
        Q, A, B = Q.at[i].set(q), A.at[i].set(row.ravel()), B.at[i].set(pulled.ravel())
        image = noise.apply(noise.eigenvalues, q.reshape(mean.shape)) + sigma**2 * see(pulled)
        following = _outside(Q, image.ravel())
        ended = _length(following) <= jnp.sqrt(jnp.finfo(x.dtype).eps) * _length(image)
        restart = ended | ((i + 1) % num_iterations == 0)
        return (Q, A, B), _unit(jnp.where(restart, _outside(Q, probes[i]), following))

    def zeros(length: int) -> Array:
        return jnp.zeros((size, length), error.dtype)

    first = _unit(jnp.where(_length(error) > 0, error, probes[-1]))
    rows = zeros(error.size), zeros(x.size), zeros(x.size)
    (Q, A, B), _ = jax.lax.fori_loop(0, size, extend, (rows, first))
    spread = sigma**2 * B @ A.T
    values, vectors = jnp.linalg.eigh((spread + spread.T) / 2)
    spread = (vectors * jnp.maximum(values, 0)[None]) @ vectors.T
    noise_seen = compress(noise, Q)
    S = (noise_seen + noise_seen.T) / 2 + spread
    rest = error.size - size
    if rest == 0:
        log_det = jnp.zeros((), S.dtype)
    elif num_probes == 0:
        log_det = _log_det_of_rest(noise, noise_seen)
    else:
        blocks = [
            slice(p * num_iterations, (p + 1) * num_iterations) for p in range(1, 1 + num_probes)
        ]
        logs = [_log_at_first(S[block, block]) for block in blocks]
        log_det = rest * jnp.mean(jnp.stack(logs))
    log_rest = -0.5 * (log_det + rest * jnp.log(2 * jnp.pi))
    return x_hat, Predicted(Q @ mean.ravel(), A, B, S, Q, log_rest)


def _log_at_first(S: Float[Array, "k k"]) -> Scalar:
    """The first diagonal entry of `log S`."""
    values, vectors = jnp.linalg.eigh(S)
    return jnp.sum(vectors[0] ** 2 * jnp.log(values))


def _log_det_of_rest(noise: Moments, seen: Float[Array, "k k"]) -> Scalar:
    """`log det cov_y - log det(Q cov_y Q')`."""
    return jnp.sum(jnp.log(noise.eigenvalues)) - jnp.linalg.slogdet(seen)[1]


def _outside(Q: Float[Array, "k m"], w: Float[Array, " m"]) -> Float[Array, " m"]:
    """The part of `w` that is orthogonal to the rows of `Q`, twice against rounding."""
    for _ in range(2):
        w = w - Q.T @ (Q @ w)
    return w


def _length(w: Array) -> Scalar:
    return jnp.sqrt(jnp.sum(w**2))


def _unit(w: Float[Array, " m"]) -> Float[Array, " m"]:
    length = _length(w)
    return w / jnp.where(length > 0, length, 1)


__all__ = ["predict"]
