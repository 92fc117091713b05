"""`Guided`: posterior draws by a sampler with a guided denoiser."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._typing import Event, Key
from scoreprior._util import check_count
from scoreprior.denoise import Noised
from scoreprior.guide import AbstractGuidance
from scoreprior.guide.linear import first_event
from scoreprior.mcmc.independent import AbstractIndependent
from scoreprior.problem import Problem
from scoreprior.problem.observed import ObservedEvent, observed_event
from scoreprior.sample import AbstractSampler, HalfNoise, LogGrid, solve

LAST_LEVEL = 0.1
"""The last level of noise on top of the event, in units of `sigma_min`."""


class Guided(AbstractIndependent):
    """Unconditional sampling with the denoiser of a posterior in place of the prior's.

    The error is that of `guidance`, and no number of steps removes it: for a Gaussian prior
    `TMPD()` and `MMPS()` are exact in the limit of many steps, for a prior with separate modes all
    methods misplace their masses. `FeynmanKac` corrects it by weights, at about the same cost.

    A draw starts given the data, as if the prior were its Gaussian moments. The noise that goes
    down is that on top of the `x` of the model, which has `sigma_min` itself; it ends at a tenth of
    `sigma_min`, with a draw replaced by its posterior mean.

    **Arguments:** `guidance`, a method of `scoreprior.guide`; `num_samples`; `num_steps`, levels
    even in the logarithm; `sampler`, of `scoreprior.sample`; `batch_size`: draws made side by side,
    which bounds memory and does not change the draws.
    """

    guidance: AbstractGuidance
    num_samples: int = eqx.field(static=True, default=1000)
    num_steps: int = eqx.field(static=True, default=100)
    sampler: AbstractSampler = eqx.field(default=HalfNoise(), kw_only=True)
    batch_size: int = eqx.field(static=True, default=1000, kw_only=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        if not isinstance(self.guidance, AbstractGuidance):
            raise TypeError(f"guidance must be a method such as TMPD(), got {self.guidance!r}")
        if not isinstance(self.sampler, AbstractSampler):
            raise TypeError(f"sampler must be a sampler such as HalfNoise(), got {self.sampler!r}")

    def prepare(self, problem: Problem) -> ObservedEvent:
        return observed_event(problem, type(self).__name__)

    def data(self, prepared: ObservedEvent) -> Any:
        return prepared.observation.data, prepared.observation.noise

    def draw(self, prepared: ObservedEvent, key: Key) -> Event:
        flow = prepared.prior.flow
        key_start, key_steps = jax.random.split(key)
        low, high = LAST_LEVEL * flow.sigma_min, (flow.sigma_max**2 - flow.sigma_min**2) ** 0.5
        levels = LogGrid(float(low), float(high))(self.num_steps)
        levels = levels.astype(flow.moments.mean.dtype)
        x, _ = first_event(
            flow.moments, prepared.observation, flow.sigma_min, levels[0] ** 2, key_start
        )
        denoiser = self.guidance(Noised(flow.denoiser, flow.sigma_min), prepared.observation)
        x = solve(denoiser, x, key=key_steps, sigmas=levels, sampler=self.sampler)
        return denoiser(x, levels[-1])

    def remedy(self) -> str:
        return f"raise num_steps above {self.num_steps}, or take another guidance or sampler"

    def extra(self, prepared: ObservedEvent) -> dict[str, Any]:
        """`num_evaluations`: calls of the denoiser per draw, those for its derivatives apart."""
        calls = self.sampler.num_evaluations(prepared.prior.flow.moments.mean)
        return {"num_evaluations": ((), jnp.asarray(calls * self.num_steps + 1))}


__all__ = ["Guided"]
