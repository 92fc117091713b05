"""The amortised posterior: one network, conditioned on any observation, as a `ScorePrior`."""

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PyTree

from scoreprior._typing import Key
from scoreprior._util import check_count, is_traced
from scoreprior.denoise import AbstractDenoiser, Conditioned
from scoreprior.flow import Flow
from scoreprior.gaussian import Dense, Moments
from scoreprior.prior import ScorePrior
from scoreprior.sbi import saved
from scoreprior.sbi.conditional import Observed
from scoreprior.sbi.embed import Standardise
from scoreprior.sbi.parameters import Parameters, from_vectors
from scoreprior.solver import AbstractSolver, LogRatioTime, Multistep
from scoreprior.train import History

NUM_PILOT = 512
"""Draws of which the moments of a posterior are made."""

NUM_TOGETHER = 64
"""Posteriors whose pilot draws are made side by side."""

NUM_STEPS = 20
"""Of the flow: draws of `two_moons` are off by 0.0015 standard deviations, densities by 0.006."""

INSIDE = (str(Path(__file__).parents[1]), str(Path(eqx.__file__).parent))
"""Files that a warning is not about: it names the line of the caller."""

LOWEST = 5.0
"""Where the grid of noise levels becomes linear, in units of the smallest one."""


class Posterior(eqx.Module):
    """`p(z | x)` for any observation `x`, and `p(theta | x)` in the parameters of the prior.

    `z` is the vector of `parameters`; `denoiser(z, sigma, context)` takes `context(x)`.
    Densities are those of `z` with noise of standard deviation `sigma_min`. `moments` are those of
    `z` under the prior, `standardise` the range of the observations in training.
    """

    parameters: Parameters
    denoiser: AbstractDenoiser
    standardise: Standardise
    moments: Moments
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    max_items: int | None = eqx.field(static=True, default=None)
    can_drop: bool = eqx.field(static=True, default=False)
    solver: AbstractSolver | None = None
    history: History | None = None

    def context(self, x_o: Float[Array, "..."]) -> Observed:
        """What the denoiser is told of `x_o` [*x], or of a set [n, *x] with `n <= max_items`.

        Raises `ValueError` for another shape or for values that are not finite, and warns when
        `x_o` lies outside the range of training: there a network says nothing that one may trust.
        """
        x = jnp.asarray(x_o, self.standardise.mean.dtype)
        shape = self.standardise.mean.shape
        known = jnp.asarray(True) if self.can_drop else None
        if self.max_items is None:
            if x.shape != shape:
                raise ValueError(f"x_o must have shape {shape}, got {x.shape}")
            check_range(x, self.standardise.outside(x))
            return Observed(x, None, known)
        if x.shape[1:] != shape or x.ndim != len(shape) + 1:
            raise ValueError(f"x_o must be a set of shape [n, *{shape}], got {x.shape}")
        num = x.shape[0]
        if not 1 <= num <= self.max_items:
            raise ValueError(
                f"x_o must hold from 1 to {self.max_items} items, as in training, got {num}"
            )
        outside = jax.vmap(self.standardise.outside)(x)
        check_range(x, outside.any(0))
        padded = jnp.concatenate([x, jnp.zeros((self.max_items - num, *shape), x.dtype)])
        return Observed(padded, jnp.arange(self.max_items) < num, known)

    def condition(self, x_o: Float[Array, "..."]) -> ScorePrior:
        """The posterior of `z` given `x_o`, a distribution for any model and engine.

        Its flow is whitened by the moments of the posterior itself, of `NUM_PILOT` draws through
        a flow that is whitened by those of the prior.
        """
        return self._score_prior(self.context(x_o))

    def condition_all(
        self, x_o: Float[Array, "n ..."], *, num_pilot: int = NUM_PILOT
    ) -> list[ScorePrior]:
        """`condition` of each of `x_o` [n, *x], or of sets of one size, solved side by side.

        For `sbi.compose` of thousands. `num_pilot` draws make the moments of each: a few times as
        many as parameters do where posteriors are near Gaussian.
        """
        x = jnp.asarray(x_o, self.standardise.mean.dtype)
        if x.ndim < 1 or len(x) == 0:
            raise ValueError(f"x_o must hold at least one observation, got shape {x.shape}")
        check_count("num_pilot", num_pilot, least=2)
        contexts = jax.vmap(self.context)(x)
        items = x.reshape(-1, *self.standardise.mean.shape)
        check_range(x, jax.vmap(self.standardise.outside)(items))
        solver = (
            default_solver(self.moments, self.sigma_min) if self.solver is None else self.solver
        )
        options = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "solver": solver}
        start = Flow(Conditioned(self.denoiser, contexts), self.moments, **options)
        own = _all_moments(start, contexts, num_pilot)
        return [
            ScorePrior(Flow(Conditioned(self.denoiser, context), moments, **options))
            for context, moments in zip(_unstacked(contexts), _unstacked(own), strict=True)
        ]

    def prior(self) -> ScorePrior:
        """The prior of `z` as the network has learnt it; needs `drop > 0` in training."""
        if not self.can_drop:
            raise ValueError(
                "prior() needs a network that was trained with drop > 0, got drop = 0; where the "
                "prior is known in closed form it is parameters.law"
            )
        shape = self.standardise.mean.shape
        some = () if self.max_items is None else (self.max_items,)
        mask = None if self.max_items is None else jnp.ones(some, bool)
        blank = jnp.broadcast_to(self.standardise.mean, (*some, *shape))
        return self._score_prior(Observed(blank, mask, jnp.asarray(False)))

    def sample(self, key: Key, x_o: Float[Array, "..."], num: int) -> PyTree[Array]:
        """`num` draws of `theta` given `x_o`: an array [num, ...], or a dict of them."""
        check_count("num", num)
        flow = self.condition(x_o).flow
        noise = jax.random.normal(key, (num, self.parameters.size), self.moments.mean.dtype)
        return from_vectors(self.parameters, push(flow, noise))

    def log_prob(self, theta: PyTree[Array], x_o: Float[Array, "..."]) -> Float[Array, " num"]:
        """Log density of draws `theta`, [num, ...] or a dict of them, given `x_o`, nats [num].

        That of `z` over the Jacobian of `theta`; minus infinity is for `theta` at the very edge of
        the support.
        """
        z = jax.vmap(self.parameters.to_vector)(theta)
        log_det = jax.vmap(self.parameters.log_det)(z)
        return self.condition(x_o).log_prob(z) - log_det

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was learnt to the folder `path`, replacing a posterior saved there before.

        `config.json` and `model.safetensors`, as for priors. The prior is code, and so is an
        embedding that is none of `sbi.embed`: `load` takes them. Raises `TypeError` for a denoiser
        that is not that of `NPSE.fit`, and `FileExistsError` where `path` is something else.
        """
        parts = {
            **saved.amortised_parts(self.denoiser, self.max_items),
            "standardise": saved.ranges(self.standardise),
            "moments": self.moments,
            "solver": self.solver,
            "settings": (self.sigma_min, self.sigma_max, self.max_items, self.can_drop),
        }
        saved.write(path, saved.POSTERIOR, parts, self.parameters, self.history)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        prior: dist.Distribution | Callable[[], Any] | Parameters,
        *,
        embedding: Callable[..., Array] | None = None,
    ) -> "Posterior":
        """The posterior saved in the folder `path`, bit for bit.

        **Arguments:** `prior`, the one of training; `embedding`, one built with the arguments of
        that of training, whose weights are replaced: for those of `sbi.embed` it may be left out.

        Raises `FileNotFoundError` where nothing is there, and `ValueError` for a folder that is not
        a saved posterior or was damaged, and for another prior or embedding, saying what differs.
        """

        def build(parts: dict[str, Any], parameters: Parameters, history: Any) -> Posterior:
            sigma_min, sigma_max, max_items, can_drop = parts["settings"]
            standardise = Standardise(*parts["standardise"])
            return cls(
                parameters,
                saved.amortised(parts, standardise, max_items, embedding),
                standardise,
                parts["moments"],
                sigma_min,
                sigma_max,
                max_items,
                can_drop,
                parts["solver"],
                history,
            )

        return saved.read(path, saved.POSTERIOR, prior, build)

    def _score_prior(self, context: Observed) -> ScorePrior:
        levels = (self.sigma_min, self.sigma_max)
        denoiser = Conditioned(self.denoiser, context)
        return conditioned(denoiser, self.moments, levels, self.solver)


def conditioned(
    denoiser: AbstractDenoiser,
    moments: Moments,
    levels: tuple[float, float],
    solver: AbstractSolver | None = None,
) -> ScorePrior:
    """The law that `denoiser` draws between two noise levels, whitened by its own moments.

    Those are of `NUM_PILOT` draws of a flow whitened by `moments`, in which the law may be narrow
    and far from the centre.
    """
    if solver is None:
        solver = default_solver(moments, levels[0])
    options = {"sigma_min": levels[0], "sigma_max": levels[1], "solver": solver}
    own = _moments(Flow(denoiser, moments, **options), NUM_PILOT)
    return ScorePrior(Flow(denoiser, own, **options))


def default_solver(moments: Moments, sigma_min: float) -> Multistep:
    """One solver for all observations, so that a program compiled for one serves all.

    A posterior may be much narrower than the prior, whose `moments` these are: steps are spread
    evenly in `log sigma` down to `LOWEST` times `sigma_min`.
    """
    low = LOWEST * sigma_min
    high = float(np.sqrt(np.max(np.asarray(moments.eigenvalues))))
    return Multistep(NUM_STEPS, LogRatioTime(low, max(high, 2 * low)))


@eqx.filter_jit
def push(flow: Flow, noise: Float[Array, "num size"]) -> Float[Array, "num size"]:
    """Draws of the flow from noise, in groups of equal size that bound the memory.

    On a processor what the network makes of a group stays in the cache of a core.
    """
    at_once = 512 if jax.default_backend() == "cpu" else 65_536
    num = len(noise)
    size = math.ceil(num / math.ceil(num / at_once))
    groups = jnp.pad(noise, ((0, -num % size), (0, 0))).reshape(-1, size, noise.shape[1])
    return jax.lax.map(jax.vmap(flow.to_data), groups).reshape(-1, noise.shape[1])[:num]


@eqx.filter_jit
def _moments(flow: Flow, num: int) -> Moments:
    """Of `num` draws, without an error of sampling where the law is Gaussian.

    Few draws of many parameters are shrunk towards equal variances, which others need not be.

    Draws of a law that is off the centre `m` of the flow stop short of it, since the noise at
    `sigma_max` is centred there too: where `C` is its covariance, by the share

        rho = ((C + sigma_min^2) / (C + sigma_max^2))^(1/2)

    of the way, for which the mean makes up. Once more from there, for laws that are not Gaussian.
    """
    noise = _matched_noise(num, flow.event_shape, flow.moments.mean.dtype)
    structure = Dense(0.0 if num > 2 * flow.moments.size else None)
    for _ in range(2):
        own, center = structure.fit(jax.vmap(flow.to_data)(noise)), flow.moments.mean
        rho = own.scales(flow.sigma_min) / own.scales(flow.sigma_max)
        mean = center + own.apply(1 / (1 - rho), own.mean - center)
        own = eqx.tree_at(lambda m: m.mean, own, mean)
        flow = eqx.tree_at(lambda f: f.moments, flow, own)
    return flow.moments


@eqx.filter_jit
def _all_moments(flow: Flow, contexts: Observed, num: int) -> Moments:
    """`_moments` [n, ...] of the laws given each of the contexts [n, ...]."""

    def one(context: Observed) -> Moments:
        return _moments(eqx.tree_at(lambda f: f.denoiser.context, flow, context), num)

    return jax.lax.map(one, contexts, batch_size=NUM_TOGETHER)


def _matched_noise(
    num: int, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "num *event"]:
    """Noise whose sample has the mean and the covariance of `N(0, I)`, if it is large enough.

    The flow of a Gaussian law is affine, and so its moments are exact (second-order exact draws:
    Pham, Mon. Weather Rev. 129, 2001). All posteriors get the same noise: what would be an error of
    sampling is the same in each, and would add up in the product of very many.
    """
    noise = jax.random.normal(jax.random.key(0), (num, *shape), dtype)
    size = noise[0].size
    if num <= size:
        return noise
    flat = noise.reshape(num, size)
    flat = flat - flat.mean(0)[None]
    root = jnp.linalg.cholesky(flat.T @ flat / num)
    flat = jax.scipy.linalg.solve_triangular(root, flat.T, lower=True).T
    return flat.reshape(noise.shape)


def _unstacked(tree: Any) -> list[Any]:
    """Pytrees [...] of one of arrays [n, ...]."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    rows = zip(*leaves, strict=True)
    return [jax.tree.unflatten(structure, list(map(jnp.asarray, row))) for row in rows]


def check_range(x: Array, outside: Any, *, name: str = "x_o") -> None:
    """Raise where `x` is not finite; warn where features lie outside the range of training."""
    if is_traced(x) or is_traced(outside):
        return
    bad = int(jnp.sum(~jnp.isfinite(x)))
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {x.size} values NaN or infinite")
    num = int(jnp.sum(outside))
    if num:
        warnings.warn(
            f"{name} lies outside the range of the training simulations in {num} of {outside.size} "
            "features: the network extrapolates, and its posterior may be wrong without a sign",
            skip_file_prefixes=INSIDE,
        )
