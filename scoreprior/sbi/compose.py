"""The posterior of many observations, put together from the posteriors of each.

With a prior `p` and observations `x_1 ... x_n` independent given the parameters `z`,

    p(z | x_1..n)  =  p(z)^(1-n) prod_i p(z | x_i) / Z,      Z = p(x_1..n) / prod_i p(x_i),

a product of powers of diffusion models, which `Composition` and `FeynmanKac` sample without bias.
That sums of scores do so only where every posterior is Gaussian, if at all, is why other methods
(`sbi.scores`) are off even with exact scores (Linhart et al. 2024, "Diffusion posterior sampling
for simulation-based inference in tall data settings", lemma 3.1).

On the way from noise to data the cloud goes by a `bridge` of Gaussians.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scoreprior._stack import Stack
from scoreprior._util import is_traced
from scoreprior.composition import Composition, steps_for
from scoreprior.denoise.exact import AbstractExact
from scoreprior.feynman_kac import (
    AbstractControl,
    AbstractWeight,
    Composed,
    Factor,
    MiniBatched,
    NoControl,
)
from scoreprior.flow import Flow, LogRatioTime, Multistep
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior
from scoreprior.sbi.bridge import NUM_CHECKED, Bridge, find_bridge, make_bridge, tails
from scoreprior.sbi.conditional import Amortised
from scoreprior.sbi.confined import confine
from scoreprior.sbi.posterior import INSIDE

STEP_MULTIPLE = 20
"""Of steps that are more than was asked for, so that one program serves several data sets."""


class Product(Composition):
    """`p(z)^(1-n) prod_i p(z | x_i) / Z` as a NumPyro distribution; build it with `sbi.compose`.

    All that holds of a `Composition` holds here: it is a prior site of any model, with any engine;
    `log_prob` is unnormalised, and the `log_evidence` of `FeynmanKac` without other data is
    `log p(x_1..n) - sum_i log p(x_i)`. That is how much better the observations fit one parameter
    than one each: far below what simulated data give, they do not belong together.

    `FeynmanKac` takes more steps than it was asked for, with a warning, where the path of a product
    needs them: a bridge of small share, or none.

    Each factor has the noise `sigma_min`, which is to be small against the width of the posterior
    of one observation, and need not be against that of all.

    **Attributes:** `priors`, the posteriors and after them the priors; `exponents`;
    `num_observations`; `share` of the bridge, 0 for the plain path.
    """

    pytree_data_fields = ("bridge_stack", "log_scale")
    pytree_aux_fields = ("batch_size", "num_observations", "num_repaired", "share")

    def __init__(
        self,
        posteriors: Sequence[ScorePrior],
        priors: Sequence[ScorePrior],
        exponents: Sequence[float],
        *,
        bridge: bool = True,
        batch_size: int | None = None,
        validate_args: bool | None = None,
    ):
        self.num_observations, self.batch_size = len(posteriors), batch_size
        laws = (*posteriors, *priors)
        self.bridge_stack, self.log_scale, self.num_repaired, self.share = None, None, 0, 0.0
        super().__init__(laws, exponents, validate_args=validate_args)
        if not bridge:
            return
        factors, rows = self._seen()
        found = find_bridge(laws, exponents, factors, rows)
        if found is not None:
            (self.bridge_stack, self.log_scale, self.num_repaired), self.share = found
        elif batch_size is not None:
            raise ValueError(
                f"batch_size must be None where posteriors have tails too wide for a bridge, got "
                f"{batch_size}"
            )
        if min(exponents) < 0:
            plain = make_bridge(laws, exponents, 0.0)  # Gaussians that are all the prior's
            self._check_tails(float(tails(factors, plain.stack, rows).path.min()), plain)

    def _seen(self) -> tuple[tuple[Stack[Factor], ...], np.ndarray | None]:
        """Factors to know the tails by; of very many, those of the posteriors at some rows."""
        n = self.num_observations
        if self.batch_size is None or n <= NUM_CHECKED:
            return self.factors(), None
        return _split(self), np.random.default_rng(0).choice(n, NUM_CHECKED, replace=False)

    def _check_tails(self, slope: float, plain: Bridge) -> None:
        """Warn of tails of the plain path that rise, `slope` in units of the prior's."""
        if self.bridge_stack is None:
            self.num_repaired = plain.num_repaired
        if slope < 0:
            warnings.warn(
                f"the product of {self.num_observations} posteriors may have no normaliser: far "
                "out, scores of posteriors less those of the prior grow outwards, by "
                f"{-slope:.2g} times what the prior's grows inwards, and draws would be of "
                f"nothing; {plain.num_repaired} of the posteriors are wider than the prior in some "
                "direction: check the prior, train for longer, or compose fewer observations",
                stacklevel=5,
            )

    def composed(
        self,
        num_steps: int,
        *,
        weight: AbstractWeight | None = None,
        control: AbstractControl | None = None,
        **settings: Any,
    ) -> Composed:
        stack, log_scale = self.bridge_stack, self.log_scale
        if stack is None or log_scale is None:
            return super().composed(num_steps, weight=weight, control=control, **settings)
        if self.batch_size is not None:
            _check_for_batches(weight, control, settings.get("rejuvenation"))
            control = NoControl()
        chain = super().composed(num_steps, weight=weight, control=control, **settings)
        chain = chain.with_factors((stack,), log_scale)
        if self.batch_size is None:
            return chain
        n = self.num_observations
        posteriors, *priors = _split(self)
        fields = {field.name: getattr(chain, field.name) for field in dataclasses.fields(chain)}
        return MiniBatched(
            **fields,
            pairs=(posteriors, stack.take(np.arange(n))),
            rest=(*priors, stack.take(np.arange(n, stack.size))),
            num_in_batch=self.batch_size,
            seed=jax.random.key(0),
        )

    def _lowest(self, sigma_min: float) -> float:
        if self.bridge_stack is None:
            return sigma_min
        center = self.bridge_stack[self.bridge_stack.size - 1].moments
        narrowest = math.sqrt(float(np.min(np.asarray(center.eigenvalues))) + sigma_min**2)
        return min(sigma_min, narrowest / 3)

    def _checked_steps(self, num_steps: int, low: float, high: float) -> int:
        """As many as the path needs, which nobody knows before the posteriors are there."""
        least = self._least_steps(low, high)
        if num_steps >= least:
            return num_steps
        enough = STEP_MULTIPLE * math.ceil(least / STEP_MULTIPLE)
        warnings.warn(
            f"num_steps is raised from {num_steps} to {enough}: {self} needs {least} steps, for a "
            "particle not to overshoot on its way",
            skip_file_prefixes=INSIDE,
        )
        return enough

    def _least_steps(self, low: float, high: float) -> int:
        if self.bridge_stack is None:
            return super()._least_steps(low, high)
        if self.share == 1:
            return 1
        # One observation of variance v, at level r, less its Gaussian of variance v_G <= v / share:
        # r^2 / (v + r^2) - r^2 / (v_G + r^2) is largest where r^2 = sqrt(v v_G).
        root = math.sqrt(self.share)
        return steps_for(1 + self.num_observations * (1 - root) / (1 + root), low, high)

    def __repr__(self) -> str:
        bridge = "no bridge" if self.bridge_stack is None else f"bridge of share {self.share:g}"
        if self.num_repaired:
            bridge += f" with {self.num_repaired} posteriors repaired"
        return (
            f"Product(event_shape={self.event_shape}, num_observations={self.num_observations}, "
            f"unnormalised, {bridge})"
        )


def compose(
    posteriors: Sequence[ScorePrior],
    prior: ScorePrior | AbstractExact | None,
    *,
    new_prior: ScorePrior | AbstractExact | None = None,
    bridge: bool = True,
    batch_size: int | None = None,
) -> Product:
    """The posterior given all observations, from the posterior given each.

        product = sbi.compose([posterior.condition(x) for x in observations], parameters.law)

    Posteriors may come from different simulators, each with data of its own, as long as they share
    the parameters and the `prior` that they were trained with. Leaving one out of the list drops
    its observation.

    **Arguments:** `posteriors`, `p(z | x_i)`, at least one; `prior`, that of training, a
    `ScorePrior` or an exact denoiser, as `Parameters.law` is where it is known; `new_prior`, one
    that takes its place: `p_new(z) p(z)^(-n) prod_i p(z | x_i)`; `bridge`, whether to go by
    Gaussians with the moments of the flows, or by the plain path, which is free of them and needs
    many more steps; `batch_size`, how many observations, at least 2, a step of `FeynmanKac` looks
    at, all of them where `None`: for thousands of observations, of one network.

    Flows get the noise levels and the solver of all together, so that they are solved side by side.
    Learned posteriors go over to a `prior` that is known and not normal where that has less than
    one draw in ten thousand, see `sbi.confined`: beyond its edges they would have no product.
    Raises `ValueError` for no posterior, and for shapes or noise levels that disagree; warns where
    the product seems to have no normaliser.
    """
    posteriors = list(posteriors)
    if not posteriors:
        raise ValueError("posteriors must hold at least one, the posterior of one observation")
    for index, one in enumerate(posteriors):
        if not isinstance(one, ScorePrior):
            raise TypeError(f"posteriors[{index}] must be a ScorePrior, got {type(one).__name__}")
    n = len(posteriors)
    given: list[tuple[Any, float]] = [(prior, 1.0 - n)]
    if new_prior is not None:
        given = [(prior, -float(n)), (new_prior, 1.0)]
    names = ("prior", "new_prior")
    priors = [
        (_as_prior(name, law, posteriors[0]), power)
        for name, (law, power) in zip(names, given, strict=False)
        if power != 0
    ]
    shapes = {law.event_shape for law in (*posteriors, *(law for law, _ in priors))}
    if len(shapes) > 1:
        raise ValueError(
            f"posteriors and prior must share an event shape, the size of z, got {sorted(shapes)}"
        )
    if priors:
        if isinstance(prior, AbstractExact):
            _check_training(posteriors, prior.moments())
        posteriors = confine(posteriors, prior)
    laws = _alike([*posteriors, *(law for law, _ in priors)])
    exponents = [1.0] * n + [power for _, power in priors]
    if batch_size is not None:
        _check_batches(batch_size, laws[:n], bridge)
    return Product(laws[:n], laws[n:], exponents, bridge=bridge, batch_size=batch_size)


def _check_training(posteriors: list[ScorePrior], prior: Moments) -> None:
    """Warn of a prior that is far from the draws that networks of `NPSE` were trained on."""
    found = (getattr(law.flow.denoiser, "denoiser", None) for law in posteriors)
    networks = {id(each): each for each in found if isinstance(each, Amortised)}
    for network in networks.values():
        trained = network.regression.prior
        if is_traced(trained.mean) or is_traced(prior.mean):
            continue
        seen, given = (
            (np.asarray(m.mean, float), np.sqrt(np.diag(np.asarray(m.covariance(), float))))
            for m in (trained, prior)
        )
        shift = np.abs(given[0] - seen[0]) / seen[1]
        ratio = np.maximum(given[1] / seen[1], seen[1] / given[1])
        if (shift > 0.5).any() or (ratio > 1.5).any():
            told = [f"{np.round(m, 2)} +- {np.round(sd, 2)}" for m, sd in (given, seen)]
            warnings.warn(
                "prior must be the law of z that the network was trained on, for draws of the "
                f"prior posterior.parameters.law, got {told[0]} where these were {told[1]}: the "
                "product divides by another prior",
                skip_file_prefixes=INSIDE,
            )


def _check_batches(batch_size: int, posteriors: list[ScorePrior], bridge: bool) -> None:
    n, kinds = len(posteriors), len(Stack.group(posteriors))
    if not 2 <= batch_size <= n:
        raise ValueError(
            f"batch_size must be from 2 to the number of observations, {n}, got {batch_size}"
        )
    if not bridge:
        raise ValueError("bridge must be True with a batch_size, got False")
    if kinds > 1:
        raise ValueError(f"posteriors must be of one network with a batch_size, got {kinds} kinds")


def _check_for_batches(
    weight: AbstractWeight | None, control: AbstractControl | None, rejuvenation: Any
) -> None:
    if rejuvenation is not None:
        raise ValueError(
            "rejuvenation must be None with mini-batches, whose law is not that of all "
            f"observations, got {rejuvenation!r}"
        )
    if control is not None and control.num_bases > 0:
        raise ValueError(
            "control must be None or NoControl() with mini-batches, whose noise it would fit, got "
            f"{control!r}"
        )
    if weight is not None and not weight.is_rate:
        raise ValueError(
            "weight must be Trapezoid() or Euler() with mini-batches, of which only a rate is "
            f"known, got {type(weight).__name__}()"
        )


def _split(product: Product) -> tuple[Stack[Factor], ...]:
    """The factors of the posteriors, which are of one kind, and those of the priors."""
    n = product.num_observations
    first, *rest = product.factors()
    if first.size > n:  # a prior of the same network stands after the posteriors
        rest = [first.take(np.arange(n, first.size)), *rest]
    return (first.take(np.arange(n)), *rest)


def _as_prior(name: str, law: Any, like: ScorePrior) -> ScorePrior:
    if isinstance(law, ScorePrior):
        return law
    if law is None:
        raise ValueError(
            f"{name} must be a ScorePrior or an exact denoiser, got None: this prior has no closed "
            "form with noise; train with drop > 0 and take posterior.prior(), the learned one"
        )
    if not isinstance(law, AbstractExact):
        raise TypeError(
            f"{name} must be a ScorePrior or an exact denoiser, a law of z, got "
            f"{type(law).__name__}; that of the prior of training is posterior.parameters.law"
        )
    flow = like.flow
    levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    return ScorePrior(Flow(law, law.moments(), solver=flow.solver, **levels), like.density)


def _alike(laws: list[ScorePrior]) -> list[ScorePrior]:
    """The same denoisers and moments, with the noise levels and the solver of all together.

    The scales of the solver are powers of the root of two, so that a program compiled for the
    observations of one data set often serves others.
    """
    flows = [law.flow for law in laws]
    low, high = max(f.sigma_min for f in flows), max(f.sigma_max for f in flows)
    high = min([high, *(float(getattr(f.denoiser, "level_range", (0, high))[1]) for f in flows)])
    scales = np.sqrt([np.asarray(f.moments.eigenvalues, float).ravel() for f in flows])
    narrow, wide = (
        float(2 ** (np.round(2 * np.log2(s)) / 2)) for s in (scales.min(), scales.max())
    )
    narrow = max(low, narrow)
    solver = Multistep(30, LogRatioTime(narrow, max(wide, 2 * narrow)))
    return [
        ScorePrior(
            Flow(f.denoiser, f.moments, sigma_min=low, sigma_max=high, solver=solver), law.density
        )
        for f, law in zip(flows, laws, strict=True)
    ]


__all__ = ["Product", "compose"]
