"""One network for parameters and data together, from which any conditional is drawn.

The joint vector is `v = (z, c)`, the parameters' vector and the standardised observation. A mask
says which entries are observed; the network denoises the others given those, after Gloeckler et
al., "All-in-one simulation-based inference" (ICML 2024), with a residual perceptron in place of a
transformer and a Gaussian under it:

    D(v, sigma, m) = m + C (C + S)^-1 (v - m) + diag(t) F,     S_i = 0 if observed, else sigma^2

for the joint Gaussian `N(m, C)`, exact for a linear Gaussian model, with `t` the standard
deviations that this Gaussian leaves.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import check_count, check_positive
from scoreprior.denoise import AbstractDenoiser
from scoreprior.gaussian import Dense, Moments
from scoreprior.nn import ResidualMLP
from scoreprior.prior import ScorePrior
from scoreprior.sbi import saved
from scoreprior.sbi.amortise import split
from scoreprior.sbi.embed import Standardise
from scoreprior.sbi.pairs import Source, pairs
from scoreprior.sbi.parameters import THETA, Parameters
from scoreprior.sbi.posterior import conditioned, push
from scoreprior.train import AbstractLevels, AbstractLoss, History, LogUniform, adamw, fit

X = "x"
"""The name of the observation among the sites."""


class Masked(NamedTuple):
    """What is observed of a joint vector: `value` [size] where `observed` [size]."""

    value: Float[Array, " size"]
    observed: Bool[Array, " size"]


class DrawMask(eqx.Module):
    """Masks of training, each kind with probability 1/5 (Gloeckler et al. 2024, section 3.3).

    Nothing observed; the data; the parameters; every entry with probability 0.3, or 0.7. Where all
    would be observed, none is.
    """

    num_parameters: int = eqx.field(static=True)

    def __call__(self, key: Key, value: Float[Array, " size"]) -> Masked:
        kind, few, many = jax.random.split(key, 3)
        is_data = jnp.arange(value.size) >= self.num_parameters
        masks = jnp.stack(
            [
                jnp.zeros(value.size, bool),
                is_data,
                ~is_data,
                jax.random.bernoulli(few, 0.3, (value.size,)),
                jax.random.bernoulli(many, 0.7, (value.size,)),
            ]
        )
        mask = masks[jax.random.randint(kind, (), 0, len(masks))]
        return Masked(value, mask & ~mask.all())


class JointDenoiser(AbstractDenoiser):
    """The formula above: observed entries go in and come out as they are.

    `moments` of the joint vector; `levels`, those of the noise in training.
    """

    net: ResidualMLP
    mean: Float[Array, " size"]
    covariance: Float[Array, "size size"]
    levels: tuple[float, float] = eqx.field(static=True)

    @property
    def level_range(self) -> tuple[float, float]:
        return self.levels

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        if not isinstance(context, Masked):
            raise ValueError(f"context must be a Masked, got {type(context).__name__}")
        x = jnp.where(context.observed, context.value, x)
        gaussian, spread = self.gaussian(x, sigma, context.observed)
        variance = jnp.where(context.observed, 0, sigma**2) + jnp.diagonal(self.covariance)
        whitened = (x - self.mean) / jnp.sqrt(variance)
        level = jnp.log(jnp.asarray(sigma)) / 4
        output = self.net(whitened, level, context.observed.astype(x.dtype))
        return jnp.where(context.observed, context.value, gaussian + spread * output)

    def gaussian(
        self, x: Event, sigma: Sigma, observed: Bool[Array, " size"]
    ) -> tuple[Event, Event]:
        """Mean and standard deviations of the clean vector if it were Gaussian, [size] each."""
        # Observed entries have the smallest noise that leaves the matrix well conditioned.
        tiny = 1e-5 * jnp.mean(jnp.diagonal(self.covariance))
        noise = jnp.where(observed, tiny, sigma**2)
        factor = cho_factor(self.covariance + jnp.diag(noise), lower=True)
        gain = cho_solve(factor, self.covariance).T
        mean = self.mean + gain @ (x - self.mean)
        # C - C (C + S)^-1 C = C (C + S)^-1 S, whose diagonal has no cancellation.
        return mean, jnp.sqrt(jnp.diagonal(gain) * noise)


class JointLoss(AbstractLoss):
    """Denoising loss of the entries that are not observed, in units of the network's output."""

    levels: AbstractLevels

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        sigma = self.levels(u)
        noisy = x + sigma * jax.random.normal(key, x.shape, x.dtype)
        observed = context.observed  # type: ignore[union-attr]
        _, spread = denoiser.gaussian(noisy, sigma, observed)  # type: ignore[attr-defined]
        error = (denoiser(noisy, sigma, context) - x) / spread
        return jnp.mean(jnp.where(observed, 0.0, error**2))


class Unobserved(AbstractDenoiser):
    """A joint denoiser with its observed entries fixed: that of the entries `index` [k]."""

    denoiser: AbstractDenoiser
    context: Masked
    index: Int[Array, " k"]

    @property
    def level_range(self) -> tuple[float | Scalar, float | Scalar]:
        return self.denoiser.level_range

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        if context is not None:
            raise ValueError("context is already fixed in Unobserved; pass context=None")
        value = self.context.value.at[self.index].set(x)
        return self.denoiser(value, sigma, self.context)[self.index]


class JointPosterior(eqx.Module):
    """Any conditional of the joint law of parameters and data, from one network.

    What is observed is a dict: `"x"`, the observation [*x] with NaN where an entry is missing, and
    the prior's sites by name (`"theta"` for a distribution), with NaN likewise. `{}` is the joint
    law, `{"x": x_o}` the posterior, `{"theta": theta}` the likelihood.
    """

    parameters: Parameters
    denoiser: AbstractDenoiser
    standardise: Standardise
    moments: Moments
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    history: History | None = None

    @property
    def size(self) -> int:
        """Number of entries of the joint vector."""
        return self.parameters.size + self.standardise.mean.size

    def context(self, observed: Mapping[str, Any]) -> Masked:
        """The joint vector and its mask.

        Raises `ValueError` for unknown names, for shapes, and for a site whose coordinates depend
        on one that is not observed.
        """
        names = self.parameters.names
        if unknown := sorted(set(observed) - {*names, X}):
            raise ValueError(f"observed must have keys among {[*names, X]}, got {unknown}")
        x = jnp.asarray(observed.get(X, jnp.full_like(self.standardise.mean, jnp.nan)))
        if x.shape != self.standardise.mean.shape:
            raise ValueError(f"x must have shape {self.standardise.mean.shape}, got {x.shape}")
        z, is_given = self._vector(observed)
        c = self.standardise(x).ravel()
        vector, mask = jnp.concatenate([z, c]), jnp.concatenate([is_given, ~jnp.isnan(c)])
        if mask.all():
            raise ValueError("observed must leave an entry to be inferred, got all of them")
        return Masked(jnp.where(mask, vector, 0.0), mask)

    def _vector(self, observed: Mapping[str, Any]) -> tuple[Array, Array]:
        """`z`, and which of its entries the observed values fix."""
        # What is not observed is filled in twice: entries that agree do not depend on it.
        fillings = (self._fill(observed, level) for level in (0.0, 0.5))
        (first, num_given), (second, _) = fillings
        fixed = first == second
        if num_given != int(jnp.sum(fixed)):
            raise ValueError(
                "observed parameters must have coordinates of their own, independent of parameters "
                f"that are not observed, got {num_given} observed values of {list(observed)}"
            )
        return first, fixed

    def _fill(self, observed: Mapping[str, Any], level: float) -> tuple[Array, int]:
        """`z` of the observed values among others, whose own `z` is `level`; how many there are."""
        parameters = self.parameters
        theta = parameters.from_vector(jnp.full(parameters.size, level))
        theta, num_given = theta if parameters.is_model else {THETA: theta}, 0
        for name in observed.keys() & theta.keys():
            given = jnp.asarray(observed[name])
            if given.shape != theta[name].shape:
                raise ValueError(f"{name} must have shape {theta[name].shape}, got {given.shape}")
            theta[name] = jnp.where(jnp.isnan(given), theta[name], given)
            num_given += int(jnp.sum(~jnp.isnan(given)))
        return parameters.to_vector(theta if parameters.is_model else theta[THETA]), num_given

    def condition(self, observed: Mapping[str, Any]) -> ScorePrior:
        """The law of the entries that are not observed, in the order of the joint vector [k]."""
        context = self.context(observed)
        index = jnp.flatnonzero(~context.observed)
        denoiser = Unobserved(self.denoiser, context, index)
        covariance = self.moments.covariance()[jnp.ix_(index, index)]
        first = Moments.dense(self.moments.mean[index], covariance)
        return conditioned(denoiser, first, (self.sigma_min, self.sigma_max))

    def sample(self, key: Key, observed: Mapping[str, Any], num: int) -> dict[str, Array]:
        """`num` draws of everything given what is observed: sites and `"x"`, each [num, ...]."""
        check_count("num", num)
        flow = self.condition(observed).flow
        context = self.context(observed)
        index = jnp.flatnonzero(~context.observed)
        noise = jax.random.normal(key, (num, *flow.event_shape), self.moments.mean.dtype)
        drawn = push(flow, noise)
        full = jnp.broadcast_to(context.value, (num, self.size)).at[:, index].set(drawn)
        z, c = full[:, : self.parameters.size], full[:, self.parameters.size :]
        theta = jax.vmap(self.parameters.from_vector)(z)
        theta = theta if self.parameters.is_model else {THETA: theta}
        shape = self.standardise.mean.shape
        x = c.reshape(num, *shape) * self.standardise.scale[None] + self.standardise.mean[None]
        return {**theta, X: x}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was learnt to the folder `path`, as `Posterior.save` does."""
        denoiser = self.denoiser
        if type(denoiser) is not JointDenoiser:
            raise TypeError(
                f"denoiser must be that of JointNPSE.fit to be saved, got {type(denoiser).__name__}"
            )
        parts = {
            "net": denoiser.net,
            "joint": (denoiser.mean, denoiser.covariance, denoiser.levels),
            "standardise": saved.ranges(self.standardise),
            "moments": self.moments,
            "settings": (self.sigma_min, self.sigma_max),
        }
        saved.write(path, saved.JOINT, parts, self.parameters, self.history)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        prior: dist.Distribution | Callable[[], Any] | Parameters,
    ) -> "JointPosterior":
        """The posterior saved in the folder `path`, bit for bit; errors as `Posterior.load`."""

        def build(parts: dict[str, Any], parameters: Parameters, history: Any) -> JointPosterior:
            denoiser = JointDenoiser(parts["net"], *parts["joint"])
            standardise = Standardise(*parts["standardise"])
            low, high = parts["settings"]
            return cls(parameters, denoiser, standardise, parts["moments"], low, high, history)

        return saved.read(path, saved.JOINT, prior, build)


class JointNPSE(eqx.Module):
    """Trains one network for every conditional; arguments as those of `NPSE`."""

    parameters: Parameters
    z: Float[Array, "n size"]
    x: Float[Array, "n *x"]
    width: int = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)

    def __init__(
        self,
        prior: dist.Distribution | Callable[[], Any] | Parameters,
        simulations: Any,
        *,
        num_simulations: int | None = None,
        key: Key | None = None,
        store: str | os.PathLike[str] | None = None,
        width: int = 128,
        num_blocks: int = 3,
        dropout: float = 0.1,
        sigma_min: float = 3e-3,
        sigma_max: float = 10.0,
    ):
        check_positive("sigma_min", sigma_min)
        check_positive("sigma_max", sigma_max)
        self.parameters = prior if isinstance(prior, Parameters) else Parameters.of(prior)
        if X in self.parameters.names:
            raise ValueError(f"prior must have no site {X!r}, the name of the observation")
        self.z, self.x = pairs(self.parameters, simulations, Source(num_simulations, key, store))
        self.width, self.num_blocks, self.dropout = width, num_blocks, dropout
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def fit(
        self,
        *,
        key: Key,
        num_steps: int = 20_000,
        batch_size: int = 256,
        peak: float = 1e-3,
        weight_decay: float = 0.1,
        held_out: float = 0.1,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> JointPosterior:
        """Train; arguments as those of `NPSE.fit`."""
        split_key, init, train = jax.random.split(key, 3)
        within, out = split(split_key, len(self.z), held_out)
        standardise = Standardise.fit(self.x[within])
        c = jax.vmap(standardise)(self.x).reshape(len(self.x), -1)
        joint = jnp.concatenate([self.z, c], 1)
        moments = Moments.fit(joint[within], Dense(0.0))
        mlp = ResidualMLP(
            joint.shape[1:],
            width=self.width,
            num_blocks=self.num_blocks,
            context_size=joint.shape[1],
            dropout=self.dropout,
            joins_context=True,
            key=init,
        )
        spread = jnp.std(joint[within], 0)
        levels = self.sigma_min * float(spread.min()), self.sigma_max * float(spread.max())
        if not levels[0] > 0:
            raise ValueError("x must vary in every feature, got one that is constant")
        denoiser = JointDenoiser(mlp, moments.mean, moments.covariance(), levels)
        trained = fit(
            denoiser,
            joint[within],
            JointLoss(LogUniform(*levels)),
            key=train,
            num_steps=num_steps,
            batch_size=batch_size,
            context=joint[within],
            held_out=joint[out],
            held_out_context=joint[out],
            optimiser=adamw(num_steps, peak=peak, weight_decay=weight_decay),
            patience=patience,
            augment_context=DrawMask(self.parameters.size),
            checkpoint=checkpoint,
            progress=progress,
        )
        return JointPosterior(
            parameters=self.parameters,
            denoiser=trained.denoiser,
            standardise=standardise,
            moments=moments,
            sigma_min=levels[0],
            sigma_max=levels[1],
            history=trained.history,
        )
