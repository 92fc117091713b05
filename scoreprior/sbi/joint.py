"""One network for parameters and data together, from which any conditional is drawn.

The joint vector is `v = (z, c)`, the parameters' vector and the standardised observation, and the
network the `JointDenoiser` of `scoreprior.sbi.masked`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from scoreprior._typing import Key
from scoreprior._util import check_count, check_positive, size_of
from scoreprior.denoise import AbstractDenoiser
from scoreprior.gaussian import Dense, Moments
from scoreprior.nn import ResidualMLP
from scoreprior.prior import ScorePrior
from scoreprior.sbi import saved
from scoreprior.sbi.amortise import split
from scoreprior.sbi.embed import Standardise
from scoreprior.sbi.masked import DrawMask, JointDenoiser, JointLoss, Masked, Unobserved
from scoreprior.sbi.pairs import Source, pairs
from scoreprior.sbi.parameters import THETA, Parameters, from_vectors
from scoreprior.sbi.posterior import check_range, conditioned, push
from scoreprior.train import History, LogUniform, adamw, fit

X = "x"
"""The name of the observation among the sites."""


class JointPosterior(eqx.Module):
    """Any conditional of the joint law of parameters and data, from one network.

    What is observed is a dict: `"x"`, the observation [*x] with NaN where an entry is missing, and
    the prior's sites by name (`"theta"` for a distribution), with NaN likewise. `{}` is the joint
    law, `{"x": x_o}` the posterior, `{"theta": theta}` the likelihood.

    `standardise` and `range_z` are the ranges of observations and of `z` in training; the latter is
    `None`, and observed parameters are not compared with it, in what was saved without it.
    """

    parameters: Parameters
    denoiser: AbstractDenoiser
    standardise: Standardise
    moments: Moments
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    history: History | None = None
    range_z: Standardise | None = None

    @property
    def size(self) -> int:
        """Number of entries of the joint vector."""
        return self.parameters.size + self.standardise.mean.size

    def context(self, observed: Mapping[str, Any]) -> Masked:
        """The joint vector and its mask.

        Raises `ValueError` for unknown names, for shapes, for values that are infinite or outside
        the prior, and for a site whose coordinates depend on one that is not observed; warns where
        observed entries lie outside the range of training, as `Posterior.context` does.
        """
        names = self.parameters.names
        if unknown := sorted(set(observed) - {*names, X}):
            raise ValueError(f"observed must have keys among {[*names, X]}, got {unknown}")
        x = jnp.asarray(observed.get(X, jnp.full_like(self.standardise.mean, jnp.nan)))
        if x.shape != self.standardise.mean.shape:
            raise ValueError(f"x must have shape {self.standardise.mean.shape}, got {x.shape}")
        for name, value in observed.items():
            if num := int(jnp.sum(jnp.isinf(jnp.asarray(value)))):
                raise ValueError(
                    f"{name} must be finite, or NaN where it is missing, got {num} of "
                    f"{jnp.size(value)} values infinite"
                )
        z, is_given = self._vector(observed)
        self._check_ranges(x, z, is_given)
        c = self.standardise(x).ravel()
        vector, mask = jnp.concatenate([z, c]), jnp.concatenate([is_given, ~jnp.isnan(c)])
        if mask.all():
            raise ValueError("observed must leave an entry to be inferred, got all of them")
        return Masked(jnp.where(mask, vector, 0.0), mask)

    def _check_ranges(self, x: Array, z: Array, is_given: Array) -> None:
        """Warn where what is observed lies outside the range of training."""
        if self.range_z is not None:
            outside = self.range_z.outside(z)
            for name, part in self._parts().items():
                seen = is_given[part]
                check_range(z[part][seen], outside[part][seen], name=name)
        seen = ~jnp.isnan(x)
        check_range(x[seen], self.standardise.outside(x)[seen], name=X)

    def _parts(self) -> dict[str, slice]:
        """Where the sites are in `z`."""
        ends = np.cumsum([size_of(shape) for shape in self.parameters.shapes]).tolist()
        starts = [0, *ends[:-1]]
        return dict(zip(self.parameters.names, map(slice, starts, ends), strict=True))

    def _vector(self, observed: Mapping[str, Any]) -> tuple[Array, Array]:
        """`z`, and which of its entries the observed values fix."""
        # What is not observed is filled in twice: entries that agree do not depend on it.
        fillings = (self._fill(observed, level) for level in (0.0, 0.5))
        (first, num_given), (second, _) = fillings
        bad = ~(jnp.isfinite(first) | jnp.isfinite(second))
        for name, part in self._parts().items():
            if name in observed and bad[part].any():
                raise ValueError(
                    f"{name} must lie inside the support of the prior, got {observed[name]}, with "
                    f"{int(bad[part].sum())} of {bad[part].size} values at its edge or outside"
                )
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
        return self._law(self.context(observed))

    def _law(self, context: Masked) -> ScorePrior:
        index = jnp.flatnonzero(~context.observed)
        denoiser = Unobserved(self.denoiser, context, index)
        covariance = self.moments.covariance()[jnp.ix_(index, index)]
        first = Moments.dense(self.moments.mean[index], covariance)
        return conditioned(denoiser, first, (self.sigma_min, self.sigma_max))

    def sample(self, key: Key, observed: Mapping[str, Any], num: int) -> dict[str, Array]:
        """`num` draws of everything given what is observed: sites and `"x"`, each [num, ...]."""
        check_count("num", num)
        context = self.context(observed)
        flow = self._law(context).flow
        index = jnp.flatnonzero(~context.observed)
        noise = jax.random.normal(key, (num, *flow.event_shape), self.moments.mean.dtype)
        drawn = push(flow, noise)
        full = jnp.broadcast_to(context.value, (num, self.size)).at[:, index].set(drawn)
        z, c = full[:, : self.parameters.size], full[:, self.parameters.size :]
        theta = from_vectors(self.parameters, z)
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
        if self.range_z is not None:
            parts["range of z"] = saved.ranges(self.range_z)
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
            range_z = Standardise(*parts["range of z"]) if "range of z" in parts else None
            moments = parts["moments"]
            return cls(parameters, denoiser, standardise, moments, low, high, history, range_z)

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
        progress: bool = True,
    ):
        check_positive("sigma_min", sigma_min)
        check_positive("sigma_max", sigma_max)
        self.parameters = prior if isinstance(prior, Parameters) else Parameters.of(prior)
        if X in self.parameters.names:
            raise ValueError(f"prior must have no site {X!r}, the name of the observation")
        source = Source(num_simulations, key, store, progress)
        self.z, self.x = pairs(self.parameters, simulations, source)
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
            range_z=Standardise.fit(self.z[within]),
        )
