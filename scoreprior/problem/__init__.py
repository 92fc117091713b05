"""`Problem`: the posterior that a NumPyro model with at least one `ScorePrior` asks for.

A *position* holds one unconstrained array per latent site. In the non-centred form, the default,
the position of a prior site is its noise `u ~ N(0, I)` and `x = flow.to_data(u)`: the prior is
exactly standard normal and no divergence is computed. In the centred form it is `x` itself, and
the prior enters by its density policy. Every other latent site lies behind NumPyro's bijection
`biject_to(support)` in both forms, with its log-determinant in the density.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to
from numpyro.handlers import reparam, seed, substitute, trace, uncondition
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import constrain_fn, potential_energy
from numpyro.primitives import Messenger

from scoreprior._typing import Key, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.composition import Composition
from scoreprior.problem.linearise import Observation, observe
from scoreprior.problem.score import ByScore
from scoreprior.problem.sites import Site, Sites, find_sites, peel

Position = Mapping[str, Array]
"""One unconstrained array per latent site, by its name."""

Values = Mapping[str, Array]
"""Values in the model's own space, by site name."""


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """A posterior problem, non-centred unless `centred()`; build it with `from_model`.

    Every method is a pure function of arrays, for one position: use `jax.jit` and `jax.vmap`.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sites: Sites
    is_centred: bool = False
    family: "Problem | None" = None

    @classmethod
    def from_model(cls, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Problem":
        """Run `model(*args, **kwargs)` once, on a prior draw, and find what it asks.

        Raises `ValueError`, naming the site, for a model without a latent `ScorePrior`, with
        discrete, improper or masked latent sites, with a randomly subsampled plate, or with data
        whose log density is NaN.
        """
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable, got {model!r}")
        return cls(model, args, kwargs, find_sites(model, args, kwargs))

    def with_data(self, /, *args: Any, **kwargs: Any) -> "Problem":
        """The problem of `model(*args, **kwargs)`, for compiled programs that many data sets share.

        Programs compiled for one problem made here run all the others made from the same problem
        whose arguments have the same shapes: arrays are inputs of the programs, while any other
        argument, a number too, is compiled in. What the model reads beside its arguments must stay
        as it is. Raises `ValueError` as `from_model` does, and for a model that cannot be traced
        without the values of its arrays, such as one that picks entries by a boolean mask.
        """
        sites = find_sites(self.model, args, kwargs)
        family = self.family or self
        problem = replace(self, args=args, kwargs=kwargs, sites=sites, family=family)
        problem._check_inputs()
        return problem

    def centred(self, *, with_value: bool = True) -> "Problem":
        """The same problem in the centred form.

        Raises what the density policy of a prior raises where it has no density (`ScoreOnly`), but
        with `with_value=False` asks for none: such a problem still has its `score` and its
        `log_likelihood`.
        """
        centred = self._centred
        if not with_value:
            return centred
        if self.sites.compositions:
            raise ValueError(
                f"prior site {self.sites.compositions[0]!r} is a Composition, from which no exact "
                "draws can start: use the non-centred form, centred=False"
            )
        jax.eval_shape(lambda: centred.log_prior(centred.initial(jax.random.key(0))))
        return centred

    @cached_property
    def _centred(self) -> "Problem":
        # One object, because compiled programs know a problem by its identity.
        return replace(self, is_centred=True)

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the sites in a position: prior sites, then the other latent sites."""
        return (*self.sites.priors, *self.sites.latents)

    def log_density(self, position: Position) -> Scalar:
        """Joint log density of latent sites and data, `log_prior + log_likelihood`."""
        return -potential_energy(self._model(), self.args, self.kwargs, self._named(position))

    def log_prior(self, position: Position) -> Scalar:
        """Log density of the latent sites at an unconstrained position, Jacobians included."""
        model = _Silence(self._model(), self._is_likelihood)
        return -potential_energy(model, self.args, self.kwargs, self._named(position))

    def log_likelihood(self, position: Position) -> Scalar:
        """Log density of the observed sites and `numpyro.factor`s given the latent sites."""
        model = _Silence(self._model(), lambda message: not self._is_likelihood(message))
        return -potential_energy(model, self.args, self.kwargs, self._named(position))

    def log_conditional(self, position: Position) -> Scalar:
        """Log density of the other latent sites and of the data, given the prior sites."""
        noise = {self._noise_name(name) for name in self.sites.priors}
        model = _Silence(self._model(), lambda message: message["name"] in noise)
        return -potential_energy(model, self.args, self.kwargs, self._named(position))

    def score(self, position: Position, sigma: Sigma | None = None) -> dict[str, Array]:
        """Gradient of the joint log density, without its value: one array per latent site.

        In the centred form the prior sites enter by the score of their denoiser at noise level
        `sigma`, in data units, whatever their density policy: no flow is solved, and a prior that
        is `ScoreOnly` has one too. `None` takes the level of the policy's `ScoreGradient`, or of a
        default one. For an exact denoiser it is the gradient of `log_density` at `sigma =
        sigma_min`. Not defined (NaN) with respect to what the parameters of a flow depend on.

        In the non-centred form there is nothing to replace, and `sigma` must be `None`.
        """
        if sigma is not None:
            check_positive("sigma", sigma)
            if not self.is_centred:
                raise ValueError(
                    f"sigma must be None in the non-centred form, whose prior is exactly standard "
                    f"normal, got {sigma}: take problem.centred(with_value=False)"
                )
        model = ByScore(self._model(), sigma) if self.is_centred else self._model()

        def log_density(position: Position) -> Scalar:
            return -potential_energy(model, self.args, self.kwargs, self._named(position))

        return jax.grad(log_density)(dict(position))

    def initial(self, key: Key) -> dict[str, Array]:
        """The position of a draw from the prior; of a composition, from its `reference`."""
        if self.is_centred and self.sites.compositions:
            free = replace(self, is_centred=False)
            return self.unconstrain(free.constrain(free.initial(key)))
        model = seed(self._model(weighted=False), key)
        sites = trace(model).get_trace(*self.args, **self.kwargs)
        drawn = {name: sites[self._noise_name(name)] for name in self.latent_names}
        return {
            name: biject_to(site["fn"].support).inv(site["value"]) for name, site in drawn.items()
        }

    def constrain(self, position: Position) -> dict[str, Array]:
        """Model-space values of latent and deterministic sites; prior sites hold `x`, not `u`."""
        named = self._named(position)
        model = self._model(weighted=False)
        values = constrain_fn(model, self.args, self.kwargs, named, return_deterministic=True)
        return {name: values[name] for name in (*self.latent_names, *self.sites.deterministic)}

    def unconstrain(self, values: Values) -> dict[str, Array]:
        """The position of model-space `values` of every latent site (others are ignored)."""
        sites = self.trace(values)
        return {name: self._unconstrain(sites[name]) for name in self.latent_names}

    def trace(self, values: Values) -> dict[str, Any]:
        """NumPyro's trace of the model with its latent sites at model-space `values`."""
        model = substitute(self._with_params(), data=self._latent(values))
        return trace(model).get_trace(*self.args, **self.kwargs)

    def predict(self, key: Key, values: Values) -> dict[str, Array]:
        """Data simulated for the observed sites, given model-space `values` of the latent sites."""
        data = {**self.sites.params, **self._latent(values)}
        model = substitute(seed(self.model, key), data=data)
        sites = trace(uncondition(model)).get_trace(*self.args, **self.kwargs)
        return {name: sites[name]["value"] for name in self.sites.observed}

    def linearise(
        self, values: Values, *, site: str | None = None, prior: str | None = None
    ) -> Observation:
        """The observed Gaussian `site` as `y = A x + N(0, cov_y)` around model-space `values`.

        `x` is the value of prior site `prior`; the other latent sites stay at `values`. Either name
        may be left out where the model has only one.
        """
        site = _only("site", site, self.sites.observed)
        prior = _only("prior", prior, self.sites.priors)
        return observe(self, self._latent(values), site, prior)

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", repr(self.model))
        kinds = zip(Sites._fields[:4], self.sites[:4], strict=True)
        found = ", ".join(f"{kind}={list(sites)}" for kind, sites in kinds if sites)
        return f"Problem({name}, {found}, {'centred' if self.is_centred else 'non-centred'})"

    def _check_inputs(self) -> None:
        def everything(problem: Problem) -> Any:
            position = problem.initial(jax.random.key(0))
            values = problem.constrain(position)
            return problem.log_density(position), problem.predict(jax.random.key(0), values)

        try:
            hash(tuple(leaf for leaf in jax.tree.leaves(self) if not eqx.is_array(leaf)))
            eqx.filter_eval_shape(everything, self)
        except (TypeError, IndexError) as error:
            raise ValueError(
                "the arguments of the model cannot be inputs of a compiled program: arrays must do "
                "without their values being known, and all else must be hashable; use "
                f"Problem.from_model for every data set ({error})"
            ) from error

    def _with_params(self) -> Callable[..., Any]:
        # Parameters keep the values found first; a key drawn inside the model is always the same.
        model = seed(self.model, jax.random.key(0), hide_types=["sample", "plate", "control_flow"])
        return substitute(model, data=self.sites.params)

    def _model(self, *, weighted: bool = True) -> Callable[..., Any]:
        """`weighted=False` leaves out the densities of compositions, which values do without."""
        model = self._with_params()
        if self.is_centred:
            return model
        return reparam(model, config=dict.fromkeys(self.sites.priors, _FromNoise(weighted)))

    def _noise_name(self, name: str) -> str:
        """The name under which NumPyro keeps the position of site `name`."""
        return f"{name}_base" if name in self.sites.priors and not self.is_centred else name

    def _named(self, position: Position) -> dict[str, Array]:
        if set(position) != set(self.latent_names):
            raise ValueError(
                f"position must hold the sites {sorted(self.latent_names)}, got {sorted(position)}"
            )
        return {self._noise_name(name): value for name, value in position.items()}

    def _latent(self, values: Values) -> dict[str, Array]:
        if missing := [name for name in self.latent_names if name not in values]:
            raise ValueError(f"values must hold every latent site, {missing} missing")
        return {name: values[name] for name in self.latent_names}

    def _is_likelihood(self, message: dict[str, Any]) -> bool:
        # NumPyro adds the log-determinant of a bijection as an observed factor of this name.
        log_dets = {f"_{self._noise_name(name)}_log_det" for name in self.latent_names}
        return message["is_observed"] and message["name"] not in log_dets

    def _unconstrain(self, site: dict[str, Any]) -> Array:
        if self._noise_name(site["name"]) == site["name"]:
            return biject_to(site["fn"].support).inv(jnp.asarray(site["value"]))
        value = jnp.asarray(site["value"])
        base, _ = peel(site["fn"])
        base = base.reference if isinstance(base, Composition) else base
        for transform in reversed(base.transforms):
            value = transform.inv(value)
        return value


def _flatten(problem: Problem) -> tuple[tuple[Any, ...], Any]:
    """Of a problem made by `with_data`, its arguments; all else is equal within its family.

    Any other problem is one piece, known by its identity.
    """
    if problem.family is None:
        return (), problem
    sites = problem.sites
    kinds = tuple(tuple(kind.values()) for kind in sites[:4])
    inputs = (problem.args, problem.kwargs, sites.data, sites.params)
    return inputs, (problem.family, problem.is_centred, kinds, sites.compositions)


def _unflatten(static: Any, inputs: tuple[Any, ...]) -> Problem:
    if isinstance(static, Problem):
        return static
    family, is_centred, kinds, compositions = static
    args, kwargs, data, params = inputs
    priors, latents, observed, computed = ({site.name: site for site in kind} for kind in kinds)
    sites = Sites(priors, latents, observed, computed, data, params, compositions)
    return Problem(family.model, args, kwargs, sites, is_centred, family)


jax.tree_util.register_pytree_node(Problem, _flatten, _unflatten)


class _FromNoise(TransformReparam):
    """`TransformReparam` that also looks under a mask of `True`, and at compositions.

    Their density ratio to the reference is a factor of the model, if it is to be `weighted`.
    """

    def __init__(self, weighted: bool):
        self.weighted = weighted

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> Any:
        base, _ = peel(fn)
        composition = base if isinstance(base, Composition) else None
        base = base if composition is None else composition.reference
        batch_shape = fn.shape()[: len(fn.shape()) - base.event_dim]
        plain = base.expand(batch_shape).to_event(fn.event_dim - base.event_dim)
        kept, value = super().__call__(name, plain, obs)
        if composition is not None and self.weighted:
            ratio = composition.log_ratio(value)
            ratio = ratio.sum(tuple(range(-(fn.event_dim - base.event_dim), 0)))
            numpyro.factor(f"{name}_composition", ratio)
        return kept, value


class _Silence(Messenger):
    """Takes the sites for which `silent(message)` holds out of the density, at no cost."""

    def __init__(self, fn: Callable[..., Any], silent: Callable[[dict[str, Any]], bool]):
        super().__init__(fn)
        self.silent = silent

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and self.silent(msg):
            msg["fn"] = msg["fn"].mask(False)


def _only(argument: str, name: str | None, sites: Mapping[str, Site]) -> str:
    if name is None and len(sites) == 1:
        return next(iter(sites))
    if name is None or name not in sites:
        raise ValueError(f"{argument} must be one of {list(sites)}, got {name!r}")
    return name


__all__ = ["Observation", "Position", "Problem", "Site", "Sites", "Values"]
