"""`Composition`: products of powers of diffusion models, as one NumPyro distribution."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from scoreprior._stack import Stack
from scoreprior._typing import Key
from scoreprior._util import is_traced
from scoreprior.denoise.base import energy_of
from scoreprior.feynman_kac import (
    AbstractControl,
    AbstractNoise,
    AbstractWeight,
    Composed,
    Factor,
    Levels,
    Resampling,
    TargetScore,
    Trapezoid,
    VarianceControl,
    run,
    systematic,
)
from scoreprior.prior import ScorePrior
from scoreprior.sample import LogGrid

NUM_PARTICLES, NUM_STEPS = 1000, 200
LARGEST_CHECKED = 2000
"""Entries of an event up to which a dense precision matrix is looked at."""


class Composition(dist.Distribution):
    """`p(x) = prod_i q_i(x)^beta_i / Z`, with the `q_i` diffusion models; build it with `compose`.

    Nothing is retrained. Powers above one sharpen a prior (annealing, low temperature), a product
    of several asks for what all of them find likely, `{conditional: w, unconditional: 1 - w}` is
    classifier-free guidance with its weights. The law is that of the densities that `ScorePrior`
    has, at `sigma_min`, not a sum of scores at every noise level, which is the score of nothing.

    `log_prob` is **unnormalised**: `sum_i beta_i log q_i(x)`, one flow solve each, without `log Z`,
    which `FeynmanKac` estimates as `log_evidence` of a model with no data. `sample` draws by a
    cloud of weighted particles going down the noise levels (Feynman-Kac correctors with variance
    control, see `feynman_kac.composed`): draws of one call depend on one another, and have the
    right law as far as the cloud is large.

    In a NumPyro model it is a prior site: `Problem` writes it as one of its factors, the
    `reference`, times a density ratio that counts to the likelihood. So all engines apply, their
    evidence is that of data and composition, `Z p(y)`, and `FeynmanKac` needs no density at all.
    Its weights, and those of `sample`, take the scores of all levels for those of one law that
    diffuses: of a trained network, of which that is not quite true, the law differs from that of
    the densities, the more the further exponents are from one (see Validation). `EnergyRatio` has
    no such error.

    Priors of one kind, as those of one network with different contexts, are evaluated together.

    **Attributes:** `priors`, `exponents`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("stacks", "exponents")
    pytree_aux_fields = ("places",)

    def __init__(
        self,
        priors: Iterable[ScorePrior],
        exponents: Float[Array, " factor"] | Iterable[float],
        *,
        validate_args: bool | None = None,
    ):
        priors = tuple(priors)
        self.places, self.stacks = zip(*Stack.group(priors), strict=True)
        self.exponents = jnp.asarray(exponents, priors[0].flow.moments.mean.dtype)
        super().__init__((), priors[0].event_shape, validate_args=validate_args)

    @property
    def priors(self) -> tuple[ScorePrior, ...]:
        found: dict[int, ScorePrior] = {}
        for places, stack in zip(self.places, self.stacks, strict=True):
            found.update(zip(places, stack.items(), strict=True))
        return tuple(found[index] for index in range(len(found)))

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def reference(self) -> ScorePrior:
        """The factor with the largest exponent, the first of several."""
        return self.priors[self._largest]

    @property
    def _largest(self) -> int:
        return 0 if is_traced(self.exponents) else int(np.asarray(self.exponents).argmax())

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        """`sum_i beta_i log q_i(value)`, without the normaliser, nats [*batch]."""
        return self._weighted(value, self.exponents)

    def log_ratio(self, value: Array) -> Array:
        """`log_prob(value)` less that of the `reference`, which is not solved for twice."""
        if is_traced(self.exponents):
            return self._weighted(value, self.exponents.at[0].add(-1))
        exponents = np.array(self.exponents)
        exponents[self._largest] -= 1
        return self._weighted(value, exponents)

    def _weighted(self, value: Array, exponents: Any) -> Array:
        """`sum_i beta_i log q_i(value)`; factors to the power zero are left out."""
        if not is_traced(exponents):
            exponents = np.asarray(exponents)  # inside `jax.jit`, an entry of a JAX array is traced
        shape = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
        total = jnp.zeros(shape, self.exponents.dtype)
        for places, stack in zip(self.places, self.stacks, strict=True):
            chosen = list(range(len(places)))
            if not is_traced(exponents):
                chosen = [i for i in chosen if exponents[places[i]] != 0]
            if not chosen:
                continue
            some = stack if len(chosen) == len(places) else stack.take(np.asarray(chosen))
            beta = jnp.asarray(exponents)[np.asarray(places)[chosen]]
            terms = some.map(lambda prior, b: b * prior.log_prob(value), beta)
            total = total + jnp.sum(terms, 0)
        return total

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws [*sample_shape, *event] from clouds of at least 1,000 particles, 200 steps each."""
        draws = _draw(self.composed(NUM_STEPS), math.prod(sample_shape), key)
        return draws.reshape(*sample_shape, *self.event_shape)

    def composed(
        self,
        num_steps: int,
        *,
        weight: AbstractWeight | None = None,
        control: AbstractControl | None = None,
        noise: AbstractNoise | None = None,
        **tilt: Any,
    ) -> Composed:
        """The Feynman-Kac model of this law; `tilt` are the last arguments of `Composed`.

        Raises `ValueError` where `num_steps` is too small for the steps to be stable, for a weight
        that needs energies where a factor has none, and for a ratio of kernels with `noise`.
        """
        flows = [stack[0].flow for stack in self.stacks]  # levels are alike in a stack
        low = self._lowest(min(flow.sigma_min for flow in flows))
        high = max(flow.sigma_max for flow in flows)
        weight, control = weight or Trapezoid(), control or VarianceControl()
        noise = noise or TargetScore()
        if weight.needs_energy:
            self._check_energies(weight)
        if not weight.is_rate and not isinstance(noise, TargetScore):
            raise ValueError(
                f"noise must be TargetScore() with weight {type(weight).__name__}(), a ratio of "
                f"kernels, got {noise!r}: take Trapezoid() or Euler()"
            )
        num_steps = self._checked_steps(num_steps, low, high)
        sigmas = LogGrid(low, high)(num_steps).astype(self.exponents.dtype)
        levels = Levels.full_noise(low, sigmas)
        return Composed(self.factors(), levels, weight, control, noise, **tilt)

    def _lowest(self, sigma_min: float) -> float:
        """Down to which scale the levels on top of `sigma_min` are even in their logarithm."""
        return sigma_min

    def _checked_steps(self, num_steps: int, low: float, high: float) -> int:
        least = self._least_steps(low, high)
        if num_steps < least:
            raise ValueError(
                f"num_steps must be at least {least} for noise levels from {high:g} to "
                f"{low:g} and exponents {self._listed()}, got {num_steps}"
            )
        return num_steps

    def _least_steps(self, low: float, high: float) -> int:
        """How many keep a step from overshooting the narrowest mode."""
        if is_traced(self.exponents) or self._listed() == [1.0]:
            return 1
        return steps_for(float(np.abs(np.asarray(self.exponents)).sum()), low, high)

    def factors(self) -> tuple[Stack[Factor], ...]:
        """The factors of a Feynman-Kac model, stacks of those of a kind."""
        dtype = self.exponents.dtype

        def factor(prior: ScorePrior, beta: Array) -> Factor:
            flow = prior.flow
            return Factor(flow.denoiser, flow.moments, jnp.asarray(flow.sigma_min, dtype), beta)

        return tuple(
            stack.rearrange(factor, self.exponents[np.asarray(places)])
            for places, stack in zip(self.places, self.stacks, strict=True)
        )

    def _check_energies(self, weight: AbstractWeight) -> None:
        for i, prior in enumerate(self.priors):
            flow = prior.flow
            try:
                jax.eval_shape(energy_of(flow.denoiser), flow.moments.mean, flow.sigma_min)
            except NotImplementedError as error:
                raise ValueError(
                    f"weight {type(weight).__name__}() needs an energy of every factor, and factor "
                    f"{i}, {prior}, has none: {error}; or take weight=Trapezoid(), which needs "
                    "scores alone"
                ) from error

    def _listed(self) -> list[float]:
        return [round(float(beta), 6) for beta in self.exponents]

    def __repr__(self) -> str:
        exponents = "traced" if is_traced(self.exponents) else self._listed()
        return (
            f"Composition(event_shape={self.event_shape}, exponents={exponents}, unnormalised, "
            f"of {list(self.priors)})"
        )


def steps_for(pull: float, low: float, high: float) -> int:
    """How many levels, even in their logarithm, a pull of `pull / r^2` towards a mode needs.

    A step multiplies the distance from a narrow mode by `1 - pull (1 - r'^2 / r^2)`.
    """
    return math.ceil(2 * math.log(high / low) / -math.log1p(-min(0.5, 1 / pull) + 1e-9))


def compose(factors: Mapping[ScorePrior, float]) -> Composition:
    """The law `prod_i q_i^beta_i / Z`, from `{prior: exponent, ...}`.

        compose({digits: 2.0})                             # lower temperature
        compose({digits: 0.5, strokes: 0.5})               # geometric average
        compose({digits: 1.0, strokes: 1.0})               # product of experts
        compose({ones: 1.5, digits: -0.5})                 # classifier-free guidance

    Priors share an event shape; each keeps its noise level. Raises `ValueError` for exponents that
    do not sum to a positive number, which no normaliser has, and warns where the Gaussians with the
    moments of the factors say that the product is not normalisable.
    """
    if not isinstance(factors, Mapping) or not factors:
        raise TypeError(f"factors must be a dict of priors and exponents, got {factors!r}")
    for prior in factors:
        if not isinstance(prior, ScorePrior):
            raise TypeError(f"the keys of factors must be ScorePriors, got {prior!r}")
    shapes = {prior.event_shape for prior in factors}
    if len(shapes) > 1:
        raise ValueError(f"the priors of factors must share an event shape, got {sorted(shapes)}")
    exponents = np.asarray([float(beta) for beta in factors.values()])
    if not np.isfinite(exponents).all() or (exponents == 0).any():
        raise ValueError(f"exponents must be finite and not zero, got {exponents.tolist()}")
    if exponents.sum() <= 0:
        raise ValueError(
            "exponents must sum to a positive number, since all factors have the same noise far "
            f"out, got {exponents.tolist()}"
        )
    priors = tuple(factors)
    if (exponents < 0).any() and not _normalisable(priors, exponents):
        warnings.warn(
            f"exponents {exponents.tolist()} may have no normaliser: the product of Gaussians with "
            "the moments of the factors has none, and draws would be of nothing; take a negative "
            "exponent nearer to zero, or a wider factor for it",
            stacklevel=2,
        )
    return Composition(priors, exponents)


def _normalisable(priors: tuple[ScorePrior, ...], exponents: np.ndarray) -> bool:
    size = priors[0].flow.moments.size
    if size > LARGEST_CHECKED:
        return True
    precision = np.zeros((size, size))
    for prior, beta in zip(priors, exponents, strict=True):
        covariance = np.asarray(prior.flow.moments.covariance(), float)
        precision += beta * np.linalg.inv(covariance + prior.sigma_min**2 * np.eye(size))
    return bool(np.linalg.eigvalsh((precision + precision.T) / 2)[0] > 0)


@eqx.filter_jit
def _draw(composed: Composed, size: int, key: Key) -> Float[Array, "size *event"]:
    """Draws of equal weight, in random order."""
    key_run, key_draw, key_order = jax.random.split(key, 3)
    model = composed.seeded(jax.random.fold_in(key, 3)).model()
    state, _ = run(model, Resampling(), max(size, NUM_PARTICLES), key_run)
    rows = systematic(key_draw, jax.nn.softmax(state.log_weights), len(state.log_weights))
    return state.particles[jax.random.permutation(key_order, rows)[:size]]


__all__ = ["Composition", "compose", "steps_for"]
