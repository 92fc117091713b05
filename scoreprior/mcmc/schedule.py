"""Step sizes that change from step to step."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from scoreprior._typing import Scalar
from scoreprior._util import check_positive


class AbstractSchedule(eqx.Module):
    """A step size for every step."""

    @abstractmethod
    def __call__(self, number: Int[Array, ""]) -> Scalar:
        """The size of step `number`, counted from 0, the first of the warm-up."""


class Constant(AbstractSchedule):
    """The same `step_size` always."""

    step_size: float = eqx.field(static=True)

    def __check_init__(self):
        check_positive("step_size", self.step_size)

    def __call__(self, number: Int[Array, ""]) -> Scalar:
        return jnp.asarray(self.step_size)  # weakly typed, so that it takes the type of the model


class Decaying(AbstractSchedule):
    """`step_size (1 + number / offset)^-power` (Welling & Teh 2011, section 4.2, rescaled).

    With `power` in (1/2, 1] the bias of `SGLD` vanishes in the limit of a long run; its draws then
    have unequal weight, proportional to the step sizes, which `sample_stats` holds.
    """

    step_size: float = eqx.field(static=True)
    offset: float = eqx.field(static=True, kw_only=True)
    power: float = eqx.field(static=True, default=0.55, kw_only=True)

    def __check_init__(self):
        check_positive("step_size", self.step_size)
        check_positive("offset", self.offset)
        if not 0 < self.power <= 1:
            raise ValueError(f"power must lie in (0, 1], got {self.power}")

    def __call__(self, number: Int[Array, ""]) -> Scalar:
        return self.step_size * (1 + number / self.offset) ** -self.power


def as_schedule(step_size: float | AbstractSchedule) -> AbstractSchedule:
    """`step_size` itself, or a number as a `Constant`; raises for anything else."""
    return step_size if isinstance(step_size, AbstractSchedule) else Constant(step_size)


__all__ = ["AbstractSchedule", "Constant", "Decaying", "as_schedule"]
