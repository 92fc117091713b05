"""`ScorePrior`: a score-based diffusion model as a NumPyro distribution.

It is a `TransformedDistribution` of a standard normal, so `TransformReparam` and `NeuTraReparam`
apply, with a `log_prob` that solves the flow once and follows its density policy.
"""

import copy
import functools
import warnings
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from scoreprior._typing import Context, Key, Scalar, Sigma
from scoreprior.denoise import Conditioned
from scoreprior.density import AbstractDensity, FlowDensity, ScoreGradient
from scoreprior.flow import Flow


class ProbabilityFlow(Transform):
    """A `Flow` with its density policy as a NumPyro transform from noise to data.

    `log_abs_det_jacobian` follows the policy, so distributions that NumPyro builds out of this
    transform keep the policy's value and gradient.
    """

    def __init__(self, flow: Flow, density: AbstractDensity):
        self.arrays, self.static = _partition((flow, density))

    @property
    def flow(self) -> Flow:
        return eqx.combine(self.arrays, self.static.tree)[0]

    @property
    def density(self) -> AbstractDensity:
        return eqx.combine(self.arrays, self.static.tree)[1]

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.flow.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        return self.domain

    def __call__(self, x: Array) -> Array:
        return _over_batch(_to_data, self.flow, x)

    def _inverse(self, y: Array) -> Array:
        return _over_batch(_to_noise, self.flow, y)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        base = jax.scipy.stats.norm.logpdf(x)
        event_axes = tuple(range(-len(self.flow.event_shape), 0))
        return jnp.sum(base, axis=event_axes) - self.log_prob(y)

    def log_prob(self, value: Array) -> Array:
        """`log p` of data `[*batch, *event]`, by the density policy."""
        return _over_batch(_log_prob, self.flow, value, self.density)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self.arrays,), (("arrays",), {"static": self.static})

    def eq(self, other: object, static: bool = False) -> Any:
        if not isinstance(other, ProbabilityFlow) or self.static != other.static:
            return False
        return eqx.tree_equal(self.arrays, other.arrays)


class ScorePrior(dist.TransformedDistribution):
    """A diffusion model as a distribution over data: draws, log density and gradient.

    `sample` pushes standard-normal noise through the probability flow; `log_prob(x)` is the log
    density, in nats, of `X + sigma_min N` under `density`. Everything is in data units.

    **Arguments:** `flow`, a `Flow`; `density`, a policy: `FlowDensity()`, `BoundDensity(...)`,
    `EnergyDensity()` or `ScoreOnly()`; `validate_args`, as everywhere in NumPyro.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        flow: Flow,
        density: AbstractDensity | None = None,
        *,
        validate_args: bool | None = None,
    ):
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a scoreprior.Flow, got {type(flow).__name__}")
        density = FlowDensity() if density is None else density
        if not isinstance(density, AbstractDensity):
            raise TypeError(f"density must be a density policy, got {density!r}")
        shape = flow.event_shape
        dtype = flow.moments.mean.dtype
        noise = dist.Normal(jnp.zeros((), dtype), jnp.ones((), dtype)).expand(shape)
        noise = noise.to_event(len(shape))
        super().__init__(noise, ProbabilityFlow(flow, density), validate_args=validate_args)

    @property
    def flow(self) -> Flow:
        return self.transforms[0].flow

    @property
    def density(self) -> AbstractDensity:
        return self.transforms[0].density

    @property
    def sigma_min(self) -> float:
        """The noise level at which the density is defined, in data units."""
        return self.flow.sigma_min

    def with_density(self, density: AbstractDensity) -> "ScorePrior":
        """The same prior under another density policy."""
        return ScorePrior(self.flow, density, validate_args=self._validate_args)

    def with_context(self, context: Context) -> "ScorePrior":
        """The same prior given another context, one that the conditional denoiser was trained with.

        The flow keeps its moments, so that the noise `u` of both priors is one space. Raises
        `TypeError` unless the denoiser of the flow is a `denoise.Conditioned`.
        """
        denoiser = self.flow.denoiser
        if not isinstance(denoiser, Conditioned):
            raise TypeError(
                "with_context needs a prior whose denoiser is a denoise.Conditioned, got "
                f"{type(denoiser).__name__}"
            )
        given = jax.tree.map(jnp.asarray, context)
        flow = eqx.tree_at(lambda f: f.denoiser, self.flow, Conditioned(denoiser.denoiser, given))
        return ScorePrior(flow, self.density, validate_args=self._validate_args)

    def sample_with_intermediates(
        self, key: Key | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        # No intermediates: log_prob stays the one definition of the density.
        return self.sample(key, sample_shape), []

    @validate_sample
    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        return self.transforms[0].log_prob(value)

    def score(self, value: Float[Array, "*batch_and_event"], sigma: Sigma) -> Array:
        """`grad_x log p_sigma(x)` by the denoiser, [*batch, *event]; `sigma` in data units."""
        return _over_batch(_score, self.flow, value, jnp.asarray(sigma))

    def standard_error(self, value: Float[Array, "*batch_and_event"]) -> Array:
        """Standard error of `log_prob` from the probes of a `Hutchinson` trace, nats [*batch]."""
        density = self.density
        if not isinstance(density, FlowDensity):
            raise TypeError(f"standard_error needs a FlowDensity, got {density!r}")
        return _over_batch(_standard_error, self.flow, value, density)

    def check_consistency(
        self,
        value: Float[Array, "*batch_and_event"],
        sigma: float | None = None,
        *,
        warn_above: float = 0.3,
    ) -> Array:
        """Relative distance `|s(x, sigma) - grad log p(x)| / |grad log p(x)|`, [*batch].

        `grad log p` is taken through the flow. `sigma` defaults to the level of the prior's
        `ScoreGradient`, or that of a default one. Warns when the median exceeds `warn_above`: a
        kernel that follows this score will reject often.
        """
        density = self.density
        if not isinstance(density, FlowDensity):
            raise TypeError(f"check_consistency needs a FlowDensity, got {density!r}")
        if sigma is None:
            sigma = (density.gradient or ScoreGradient()).level(self.flow)
        through_flow = FlowDensity(density.trace)
        distances = _over_batch(_inconsistency, self.flow, value, through_flow, jnp.asarray(sigma))
        median = float(jnp.median(distances))
        if not median <= warn_above:
            warnings.warn(
                f"the score at sigma = {sigma:.3g} differs from the gradient of the flow density "
                f"by {median:.0%} (median of {distances.size} points): choose another sigma for "
                "ScoreGradient, or differentiate through the flow with FlowDensity()",
                stacklevel=2,
            )
        return distances

    def __repr__(self) -> str:
        flow = self.flow
        denoiser = type(flow.denoiser).__name__
        return (
            f"ScorePrior(event_shape={self.event_shape}, denoiser={denoiser}, "
            f"sigma_min={flow.sigma_min:g}, sigma_max={flow.sigma_max:g}, "
            f"density={type(self.density).__name__})"
        )

    @classmethod
    def infer_shapes(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ScorePrior takes its shapes from its flow")


@promote_batch_shape.register
def _promote(prior: ScorePrior) -> ScorePrior:
    """NumPyro's `scan` stacks every array over time: the prior itself does not change with it."""
    mean = prior.flow.moments.mean
    extra = mean.ndim - len(prior.event_shape)
    promoted = copy.copy(jax.tree.map(lambda leaf: leaf[(0,) * extra], prior))
    promoted._batch_shape = mean.shape[:extra]
    return promoted


class _Static:
    """The part of a module that is not arrays, hashable so that compiled code is found again."""

    def __init__(self, tree: Any):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self.identity = (tuple(leaves), structure)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def _partition(tree: Any) -> tuple[Any, _Static]:
    arrays, rest = eqx.partition(jax.tree.map(_as_pytree, tree), eqx.is_array)
    return arrays, _Static(rest)


def _as_pytree(leaf: Any) -> Any:
    """NumPy arrays become JAX arrays, and a `functools.partial` a pytree of its arguments.

    NumPyro's Flax modules arrive as such a partial, holding their parameters.
    """
    if isinstance(leaf, functools.partial):
        return jax.tree_util.Partial(leaf.func, *leaf.args, **leaf.keywords)
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


@eqx.filter_jit
def _over_batch(function: Any, flow: Flow, value: Array, *args: Any) -> Array:
    """Map `function(flow, event, *args)` over the leading axes of `value`.

    One module-level jit, found again by the hash of everything that is not an array: eager calls
    do not recompile.
    """
    shape = flow.event_shape
    batch = _batch_shape(jnp.shape(value), shape)
    dtype = jnp.result_type(value, flow.moments.mean)
    events = jnp.asarray(value, dtype).reshape(-1, *shape)
    out = jax.vmap(lambda x: function(flow, x, *args))(events)
    return out.reshape(*batch, *out.shape[1:])


def _batch_shape(shape: tuple[int, ...], event_shape: tuple[int, ...]) -> tuple[int, ...]:
    batch_ndim = len(shape) - len(event_shape)
    if batch_ndim < 0 or shape[batch_ndim:] != event_shape:
        expected = ", ".join(["...", *map(str, event_shape)])
        raise ValueError(f"value must have shape ({expected}), got {shape}")
    return shape[:batch_ndim]


def _to_data(flow: Flow, u: Array) -> Array:
    return flow.to_data(u)


def _to_noise(flow: Flow, x: Array) -> Array:
    return flow.to_noise(x)


def _log_prob(flow: Flow, x: Array, density: AbstractDensity) -> Scalar:
    return density.log_prob(flow, x)


def _standard_error(flow: Flow, x: Array, density: FlowDensity) -> Scalar:
    return density.standard_error(flow, x)


def _score(flow: Flow, x: Array, sigma: Scalar) -> Array:
    return (flow.denoiser(x, sigma) - x) / sigma**2


def _inconsistency(flow: Flow, x: Array, density: FlowDensity, sigma: Scalar) -> Scalar:
    gradient = jax.grad(lambda x: density.log_prob(flow, x))(x)
    return jnp.linalg.norm(_score(flow, x, sigma) - gradient) / jnp.linalg.norm(gradient)
