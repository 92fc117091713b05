"""The likelihood of a noisy event, for a linear-Gaussian observation.

The `x` of a model lives at noise level `sigma_min`; at a higher level `x_t = x + r N` with
`r^2 = sigma^2 - sigma_min^2`. Samplers that go down the levels need `p(y | x_t)`, the mean of
`N(y; A x, cov_y)` over `p(x | x_t)`, which is known only for a Gaussian prior. Here

    p(x | x_t) ~ N(m + K (x_t - m), r^2 K),

with `K` diagonal in the basis of the moments of the flow and `m` their mean, so that

    p(y | x_t) ~ N(A m + B (x_t - m), S),        B = A K,   S = cov_y + r^2 A K A'.

At `sigma_min`, `K = I` and `r = 0`: whatever the approximation, the last level is exact.
"""

from abc import abstractmethod
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key, Scalar
from scoreprior.flow import Flow
from scoreprior.mcmc.linear import LinearProblem


class AbstractNoisedLikelihood(eqx.Module):
    """An approximation of `p(x | x_t)`, by its gain `K`."""

    @abstractmethod
    def gain(self, flow: Flow, sigma: Scalar) -> Event:
        """The diagonal of `K` in the basis of the moments, [*event]."""


class FlatLikelihood(AbstractNoisedLikelihood):
    """`K = I`, as if the prior of `x` were flat: `N(y; A x_t, cov_y + r^2 A A')`.

    That of Jalal et al. ("Robust compressed sensing MRI with deep generative priors", NeurIPS
    2021), whose free `gamma_t` it sets to `r` where `A A' = I`, and of Meng & Kabashima ("Diffusion
    model based posterior sampling for noisy linear inverse problems", 2022). It pulls too hard at
    levels above the scale of the data.
    """

    def gain(self, flow: Flow, sigma: Scalar) -> Event:
        return jnp.ones_like(flow.moments.eigenvalues)


class MomentLikelihood(AbstractNoisedLikelihood):
    """`K = (C + sigma_min^2 I) (C + sigma^2 I)^-1`, as if the prior were its Gaussian moments.

    Exact at every level for a Gaussian prior. It takes the mean and the covariance `C` of the flow
    only, so it costs no derivative of the denoiser.
    """

    def gain(self, flow: Flow, sigma: Scalar) -> Event:
        eigenvalues = flow.moments.eigenvalues
        return (eigenvalues + flow.sigma_min**2) / (eigenvalues + sigma**2)


class Level(NamedTuple):
    """`p(y | x_t)` at one noise level, for flattened `x_t` [n] and `y` [m].

    It does not depend on `x_t`: under `vmap` over draws it is computed once.
    """

    sigma: Scalar
    B: Float[Array, "m n"]
    chol_S: Float[Array, "m m"]
    pull: Float[Array, "n m"]  # B' S^-1
    residual: Float[Array, " m"]  # y - A m
    mean: Float[Array, " n"]
    curvature: Scalar  # the largest eigenvalue of B' S^-1 B

    def score(self, x: Array) -> Array:
        """`grad log p(y | x_t)` at a site value `x` of any shape."""
        error = self.residual - self.B @ (x.ravel() - self.mean)
        return (self.pull @ error).reshape(x.shape)


def level(likelihood: AbstractNoisedLikelihood, linear: LinearProblem, sigma: Scalar) -> Level:
    """`p(y | x_t)` of `linear` at `sigma`."""
    flow, A = linear.flow, linear.A
    moments = flow.moments
    rows = A.reshape(-1, *moments.event_shape)
    gain = likelihood.gain(flow, sigma)
    B = jax.vmap(lambda row: moments.apply(gain, row))(rows).reshape(A.shape)
    S = linear.cov_y + (sigma**2 - flow.sigma_min**2) * B @ A.T
    chol = jnp.linalg.cholesky((S + S.T) / 2)
    whitened = solve_triangular(chol, B, lower=True)
    small = whitened @ whitened.T if A.shape[0] <= A.shape[1] else whitened.T @ whitened
    mean = jnp.broadcast_to(moments.mean, linear.shape).ravel()
    residual = linear.y - A @ mean
    pull = cho_solve((chol, True), B).T
    return Level(sigma, B, chol, pull, residual, mean, jnp.linalg.eigvalsh(small)[-1])


def first_draw(linear: LinearProblem, level: Level, key: Key) -> Array:
    """A draw from `N(x_t; m, C + sigma^2 I) p(y | x_t)`, by Matheron's rule."""
    key_prior, key_noise = jax.random.split(key)
    moments = linear.flow.moments
    num_events = level.mean.size // moments.size
    keys = jax.random.split(key_prior, num_events)
    x = jax.vmap(lambda key: moments.sample(key, level.sigma))(keys).ravel()
    noise = jax.random.normal(key_noise, level.residual.shape, x.dtype)
    y = level.B @ (x - level.mean) + level.chol_S @ noise

    def spread(row: Array) -> Array:
        events = row.reshape(num_events, *moments.event_shape)
        variances = moments.eigenvalues + level.sigma**2
        return jax.vmap(lambda event: moments.apply(variances, event))(events).ravel()

    cross = jax.vmap(spread)(level.B)
    evidence = level.chol_S @ level.chol_S.T + cross @ level.B.T
    step = jnp.linalg.solve(evidence, level.residual - y)
    return (x + cross.T @ step).reshape(linear.shape)


__all__ = ["AbstractNoisedLikelihood", "FlatLikelihood", "MomentLikelihood"]
