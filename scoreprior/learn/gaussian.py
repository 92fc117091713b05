"""The Gaussian prior that makes measurements most likely, by expectation maximisation.

For `x ~ N(m, C)` and `y_i = A_i x_i + N(0, V_i)` the posterior of every event is Gaussian,

    K_i = C A_i' (A_i C A_i' + V_i)^-1,     mu_i = m + K_i (y_i - A_i m),
    S_i = (I - K_i A_i) C (I - K_i A_i)' + K_i V_i K_i',

and the next prior is that whose moments are the mean of the posteriors' (Dempster, Laird & Rubin,
J. R. Stat. Soc. B 39, 1977; as the start of a diffusion prior, Rozet et al., NeurIPS 2024,
appendix):

    m <- mean_i mu_i,     C <- mean_i S_i + (mu_i - m)(mu_i - m)' .

For a structure of `C` the step goes to the likeliest moments of that structure, in closed form for
every structure here. The likelihood never falls, but for a `Dense` that shrinks.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from scoreprior._typing import Scalar
from scoreprior._util import check_count
from scoreprior.gaussian import AbstractStructure, Dense, Moments
from scoreprior.guide.base import log_normal, operator
from scoreprior.learn.measurements import Measurements


class GaussianFit(NamedTuple):
    """Moments of unseen events, and how they were found."""

    moments: Moments
    log_evidence: Float[Array, " num_steps_and_one"]  # mean log p(y_i) before each step, and after


class _Totals(NamedTuple):
    """Means over measurements; `mean` and `square` of `mu_i - m`."""

    mean: Float[Array, " size"]
    square: Float[Array, "size size"]
    covariance: Float[Array, "size size"]
    log_evidence: Scalar


def fit_gaussian(
    measurements: Measurements,
    structure: AbstractStructure,
    *,
    num_steps: int,
    start: Moments | None = None,
    batch_size: int = 64,
) -> GaussianFit:
    """The likeliest Gaussian prior of `measurements`, by `num_steps` steps.

    Look whether `log_evidence`, in nats per measurement, has stopped rising: the steps are short
    where little is seen. A step costs, per measurement of `m` entries of an event of `size`, of
    order `size^2 m` operations, and memory of `batch_size` matrices of the size of the event.

    **Arguments:** `structure` of the covariance: `Diagonal()`, `Fourier()`, `LowRank(rank)`,
    `Isotropic()`, or `Dense(shrinkage)` with a number, 0 for the likeliest; `start`, by default of
    zero mean and one variance, that of the data as the operator sees it.
    """
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    if isinstance(structure, Dense) and structure.shrinkage is None:
        raise ValueError(
            "structure must be Dense(shrinkage) with a number: the estimate of Ledoit and Wolf "
            "needs the events themselves, got shrinkage None"
        )
    if start is not None and start.event_shape != measurements.event_shape:
        raise ValueError(
            f"start must be of events of shape {measurements.event_shape}, got {start.event_shape}"
        )
    moments = _start(measurements) if start is None else start
    trace = []
    for _ in range(num_steps):
        totals = _expectation(moments, measurements, batch_size)
        trace.append(totals.log_evidence)
        moments = _maximisation(moments, totals, structure)
    trace.append(_expectation(moments, measurements, batch_size).log_evidence)
    return GaussianFit(moments, jnp.stack(trace))


def log_evidence(moments: Moments, measurements: Measurements, *, batch_size: int = 64) -> Scalar:
    """Mean over measurements of `log N(y_i; A_i m, A_i C A_i' + V_i)`, in nats."""
    check_count("batch_size", batch_size)
    return _expectation(moments, measurements, batch_size).log_evidence


def _start(measurements: Measurements) -> Moments:
    """`N(0, s^2 I)` with `s^2 = sum |y_i|^2 / sum tr(A_i A_i')`, the trace by one probe each."""

    def trace(i: Int[Array, ""]) -> Scalar:
        seen = measurements.observation(i)
        v = jax.random.rademacher(
            jax.random.fold_in(jax.random.key(0), i), measurements.event_shape, measurements.dtype
        )
        return jnp.sum(seen.mean(v) ** 2)

    traces = jax.lax.map(trace, jnp.arange(len(measurements)), batch_size=64)
    variance = jnp.sum(measurements.data**2) / jnp.sum(traces)
    mean = jnp.zeros(measurements.event_shape, measurements.dtype)
    return Moments(mean, jnp.full_like(mean, variance))


@eqx.filter_jit
def _expectation(moments: Moments, measurements: Measurements, batch_size: int) -> _Totals:
    """The moments of all posteriors, batch by batch."""
    num = len(measurements)
    size = min(batch_size, num)
    C = moments.covariance()

    def one(i: Int[Array, ""]) -> _Totals:
        seen = measurements.observation(i)
        A = operator(seen, moments.mean)
        variance = seen.noise.eigenvalues.ravel()
        error = (seen.data - seen.mean(moments.mean)).ravel()
        S = A @ C @ A.T + jnp.diag(variance)
        K = cho_solve((jnp.linalg.cholesky(S), True), A @ C).T
        kept = jnp.eye(len(C), dtype=C.dtype) - K @ A
        # A sum of squares stays positive where a difference would round below zero.
        covariance = kept @ C @ kept.T + K * variance[None] @ K.T
        mean = K @ error
        # An absent entry is zero with the noise's variance: not a datum, so its density goes.
        absent = jnp.where(seen.present.ravel(), 0, jnp.log(2 * jnp.pi * variance) / 2)
        evidence = log_normal(error, jnp.zeros_like(error), S) + jnp.sum(absent)
        return _Totals(mean, jnp.outer(mean, mean), covariance, evidence)

    def add(total: _Totals, start: Int[Array, ""]) -> tuple[_Totals, None]:
        index = start + jnp.arange(size)
        weight = (index < num).astype(C.dtype) / num
        each = jax.vmap(one)(jnp.minimum(index, num - 1))
        return jax.tree.map(lambda t, e: t + jnp.tensordot(weight, e, 1), total, each), None

    shapes = jax.eval_shape(one, jnp.zeros((), int))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zero, jnp.arange(0, num, size))[0]


@eqx.filter_jit
def _maximisation(moments: Moments, totals: _Totals, structure: AbstractStructure) -> Moments:
    """The likeliest moments of `structure`: those fitted to points with the moments found."""
    shift = totals.mean
    covariance = totals.covariance + totals.square - jnp.outer(shift, shift)
    values, vectors = jnp.linalg.eigh((covariance + covariance.T) / 2)
    # Points m +- sqrt(d lam_k) v_k have mean m and covariance sum_k lam_k v_k v_k'.
    offsets = (vectors * jnp.sqrt(len(values) * jnp.maximum(values, 0))[None]).T
    points = (moments.mean.ravel() + shift)[None] + jnp.concatenate([offsets, -offsets])
    return structure.fit(points.reshape(-1, *moments.event_shape))
