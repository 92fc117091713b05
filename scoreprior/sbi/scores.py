"""Composite scores: what the literature samples the posterior of many observations by.

For posteriors `p(z | x_i)`, `i = 1 ... n`, with noised scores `s_i`, and a prior with score `s_0`,
each class puts them together into one score for each noise level `sigma`, and is a denoiser with
it, `D = z + sigma^2 s`, so that every sampler of `scoreprior.sample` applies. None has the law of
the product, even with exact scores, unless all factors are Gaussian; `FeynmanKac` on a
`sbi.Product` has. They are here to be compared with.
"""

import warnings
from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreprior._stack import Stack
from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import check_count, check_positive, is_traced
from scoreprior.composition import Composition
from scoreprior.denoise import AbstractDenoiser
from scoreprior.feynman_kac import Factor
from scoreprior.feynman_kac.composed import sum_over
from scoreprior.feynman_kac.minibatch import level_key
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior
from scoreprior.sbi.bridge import narrowed
from scoreprior.sbi.compose import Product


class AbstractComposite(AbstractDenoiser):
    """A score put together from those of the factors of a `Product`."""

    posteriors: tuple[Stack[Factor], ...]
    priors: tuple[Stack[Factor], ...]
    num_observations: int = eqx.field(static=True)

    def __init__(self, product: Product):
        if not isinstance(product, Product):
            raise TypeError(
                f"product must be what sbi.compose(...) returns, got {type(product).__name__}"
            )
        n = product.num_observations
        laws, exponents = product.priors, product.exponents
        self.num_observations = n
        self.posteriors = Composition(laws[:n], exponents[:n]).factors()
        self.priors = Composition(laws[n:], exponents[n:]).factors() if laws[n:] else ()

    @property
    def stacks(self) -> tuple[Stack[Factor], ...]:
        return (*self.posteriors, *self.priors)

    @abstractmethod
    def composite(self, z: Event, sigma: Scalar) -> Event:
        """The score at noise level `sigma` [*event]."""

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        sigma = jnp.asarray(sigma, x.dtype)
        return x + sigma**2 * self.composite(x, sigma)


def _score(factor: Factor, z: Event, sigma: Scalar) -> Event:
    """Of the factor's clean law with noise `sigma`, its own `sigma_min` apart."""
    return (factor.denoiser(z, sigma) - z) / sigma**2


class Sum(AbstractComposite):
    """`(1 - n) s_0 + sum_i s_i`, the score of the product of noised laws, which is no diffusion."""

    def composite(self, z: Event, sigma: Scalar) -> Event:
        return sum_over(self.stacks, lambda f: f.exponent * _score(f, z, sigma))


class GAUSS(AbstractComposite):
    """Scores averaged by precisions (Linhart et al. 2024, eq. 13 and algorithm 1).

        s = Lambda^-1 sum_j w_j P_j s_j,      P_j = C_j^-1 + I / sigma^2,   Lambda = sum_j w_j P_j,

    over posteriors (`w = 1`) and prior (`w = 1 - n`), `C_j` the covariances of the moments of the
    flows. Exact where all factors are Gaussian.

    `Lambda` has to be positive definite, and need not be where posteriors are wider than the prior
    in some direction, as estimates may make them. Then such covariances are cut to the prior's
    there; their number is `num_repaired`, and a warning.
    """

    num_repaired: int = eqx.field(static=True)

    def __init__(self, product: Product):
        super().__init__(product)
        self.num_repaired = 0
        if not self.priors or is_traced(product.priors[0].flow.moments.mean):
            return
        n = product.num_observations
        laws, lowest = product.priors, int(np.argmin(np.asarray(product.exponents)))
        inverses = [np.linalg.inv(np.asarray(law.flow.moments.covariance(), float)) for law in laws]
        total = np.tensordot(np.asarray(product.exponents, float), np.stack(inverses), 1)
        if np.linalg.eigvalsh(total)[0] > 0:  # then Lambda is positive definite at every sigma
            return
        repaired = [narrowed(inverse, inverses[lowest]) for inverse in inverses[:n]]
        self.num_repaired = sum(changed for _, changed in repaired)
        warnings.warn(
            f"{self.num_repaired} of {n} posteriors are wider than the prior in some direction: "
            "GAUSS takes the prior's covariance there",
            stacklevel=4,
        )
        narrow = [_narrow(law, inverse) for law, (inverse, _) in zip(laws, repaired, strict=False)]
        self.posteriors = Composition(narrow, product.exponents[:n]).factors()

    def composite(self, z: Event, sigma: Scalar) -> Event:
        def precision(factor: Factor) -> Float[Array, "size size"]:
            # Times sigma^2, which cancels and keeps it finite at both ends.
            inverse = jnp.linalg.inv(factor.moments.covariance())
            return jnp.eye(z.size, dtype=z.dtype) + sigma**2 * inverse

        return _averaged(self.stacks, precision, z, sigma)


class JAC(AbstractComposite):
    """`GAUSS` with the covariances of Tweedie's formula at the point (Linhart et al. 2024, eq. 14).

    `P_j^-1 = sigma^2 dD_j/dz`, symmetrised: one Jacobian of every denoiser per evaluation. Brittle
    with learned scores, as published.
    """

    def composite(self, z: Event, sigma: Scalar) -> Event:
        def precision(factor: Factor) -> Float[Array, "size size"]:
            def flat(v: Array) -> Array:
                return factor.denoiser(v.reshape(z.shape), sigma).ravel()

            jacobian = jax.jacfwd(flat)(z.ravel())
            return jnp.linalg.inv((jacobian + jacobian.T) / 2)

        return _averaged(self.stacks, precision, z, sigma)


def _narrow(law: ScorePrior, precision: np.ndarray) -> ScorePrior:
    """`law` with the moments of `precision` about its mean."""
    flow, mean = law.flow, law.flow.moments.mean
    moments = Moments.dense(mean, jnp.asarray(np.linalg.inv(precision), mean.dtype))
    levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max, "solver": flow.solver}
    return ScorePrior(Flow(flow.denoiser, moments, **levels))


def _averaged(stacks: tuple[Stack[Factor], ...], precision: Any, z: Event, sigma: Scalar) -> Event:
    def term(factor: Factor) -> tuple[Array, Array]:
        weighted = factor.exponent * precision(factor)
        return weighted, weighted @ _score(factor, z, sigma).ravel()

    total, pull = sum_over(stacks, term)
    return jnp.linalg.solve(total, pull).reshape(z.shape)


class AbstractWithTime(AbstractComposite):
    """Uses the time of the variance-preserving process of the papers, `t` in [0, 1].

    `alpha(t)^2 = exp(-rate t^2)`, so `t = sqrt(log(1 + sigma^2) / rate)`, with `z` in units of the
    standard deviations of the prior; later than 1 counts as 1.
    """

    rate: float

    def __init__(self, product: Product, *, rate: float = 16.0):
        check_positive("rate", rate)
        super().__init__(product)
        self.rate = rate

    def time(self, sigma: Scalar) -> Scalar:
        return jnp.minimum(jnp.sqrt(jnp.log1p(sigma**2) / self.rate), 1.0)

    def fading_prior(self, factor: Factor, z: Event, sigma: Scalar) -> Event:
        """`(1 - t) grad_z log p(alpha z)`: the clean prior at the point of that process."""
        alpha = jax.lax.rsqrt(1 + sigma**2)
        return (1 - self.time(sigma)) * alpha * _score(factor, alpha * z, factor.sigma_min)


class FNPSE(AbstractWithTime):
    """`(1 - n) (1 - t) grad log p(z) + sum_i s_i` (Geffner et al. 2023, eq. 7).

    For `annealed_langevin`. With posteriors of sets of up to `m` observations it is PF-NPSE.
    """

    def composite(self, z: Event, sigma: Scalar) -> Event:
        total = sum_over(self.posteriors, lambda f: f.exponent * _score(f, z, sigma))
        if not self.priors:
            return total
        fading = sum_over(self.priors, lambda f: f.exponent * self.fading_prior(f, z, sigma))
        return total + fading


class Damped(AbstractWithTime):
    """Damped errors and mini-batches (Arruda et al. 2025, "Compositional amortized inference").

        s = s_p + d(t) n / M sum_{i in B} (s_i - s_p),   s_p = (1 - t) grad log p,   d(t) = d_1^t,

    `B` a new set of `M = batch_size` observations at every noise level, all of them where `None`;
    `d_1 = last` in (0, 1].
    """

    last: float
    batch_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        product: Product,
        *,
        last: float = 1e-2,
        batch_size: int | None = None,
        rate: float = 16.0,
    ):
        if not 0 < last <= 1:
            raise ValueError(f"last must lie in (0, 1], got {last}")
        super().__init__(product, rate=rate)
        if len(self.posteriors) != 1:
            raise ValueError(
                "Damped draws its mini-batches from posteriors of one kind, got "
                f"{len(self.posteriors)} kinds: take flows of the same noise levels and solver"
            )
        if len(self.priors) != 1 or self.priors[0].size != 1:
            raise ValueError(
                "Damped needs the prior of training alone, at more than one observation, got "
                f"{sum(stack.size for stack in self.priors)} priors"
            )
        if batch_size is not None:
            check_count("batch_size", batch_size)
            if batch_size > self.num_observations:
                raise ValueError(
                    f"batch_size must be at most the {self.num_observations} observations, got "
                    f"{batch_size}"
                )
        self.last, self.batch_size = last, batch_size

    def composite(self, z: Event, sigma: Scalar) -> Event:
        (posteriors,), n = self.posteriors, self.num_observations
        prior = self.fading_prior(self.priors[0][0], z, sigma)
        size = n if self.batch_size is None else self.batch_size
        if size < n:
            batch = jax.random.choice(
                level_key(jax.random.key(0), sigma), n, (size,), replace=False
            )
            posteriors = posteriors.take(batch)
        gains = sum_over((posteriors,), lambda f: _score(f, z, sigma) - prior)
        return prior + self.last ** self.time(sigma) * n / size * gains


@eqx.filter_jit
def annealed_langevin(
    score: AbstractWithTime,
    num_samples: int,
    *,
    key: Key,
    sigma_max: float,
    sigma_min: float,
    num_levels: int = 400,
    num_steps: int = 5,
    step_size: float = 0.5,
) -> Float[Array, "num_samples *event"]:
    """Unadjusted Langevin at falling noise (Geffner et al. 2023, algorithm 1; as they set it).

    In the variance-preserving coordinate `alpha z`, from `N(0, I / n)`, `num_steps` steps

        z <- z + delta s + sqrt(2 delta) N,    delta = step_size (1 - g) / sqrt(g)

    at each of `num_levels` times, even between those of `sigma_max` and `sigma_min`; `g` is the
    ratio of `alpha^2` of a level to that of the level below.
    """
    event = score.posteriors[0][0].moments.mean
    times = jnp.linspace(
        score.time(jnp.asarray(sigma_max)), score.time(jnp.asarray(sigma_min)), num_levels + 1
    )
    squares = jnp.exp(-score.rate * times**2).astype(event.dtype)  # alpha^2

    def level(z: Event, inputs: Any) -> tuple[Event, None]:
        key, square, below = inputs
        ratio = square / below
        delta, alpha = step_size * (1 - ratio) / jnp.sqrt(ratio), jnp.sqrt(square)
        sigma = jnp.sqrt((1 - square) / square)

        def move(z: Event, key: Key) -> tuple[Event, None]:
            slope = score.composite(z / alpha, sigma) / alpha
            noise = jax.random.normal(key, z.shape, z.dtype)
            return z + delta * slope + jnp.sqrt(2 * delta) * noise, None

        return jax.lax.scan(move, z, jax.random.split(key, num_steps))[0], None

    def one(key: Key) -> Event:
        first, rest = jax.random.split(key)
        z = jax.random.normal(first, event.shape, event.dtype) / jnp.sqrt(score.num_observations)
        keys = jax.random.split(rest, num_levels)
        z, _ = jax.lax.scan(level, z, (keys, squares[:-1], squares[1:]))
        return z / jnp.sqrt(squares[-2])

    return jax.vmap(one)(jax.random.split(key, num_samples))


__all__ = [
    "FNPSE",
    "GAUSS",
    "JAC",
    "AbstractComposite",
    "AbstractWithTime",
    "Damped",
    "Sum",
    "annealed_langevin",
]
