"""Counts of photons over a background."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions.util import validate_sample

from scoreprior._util import is_traced


class PhotonCounts(dist.Poisson):
    """Independent Poisson counts of rate `exposure * intensity + background`.

    `intensity` is what the instrument sees of the model, `A(x)`, per unit of `exposure` (a time, an
    effective area, or both); `background` is in counts, and may be a latent of the model. All
    broadcast.

    Raises `ValueError` where a rate is not a positive finite number. Inside a JAX transformation,
    where values are not known, the log density is NaN where a rate is negative, and minus infinity
    for a count where it is zero: a prior that is positive, or a background, keeps rates above it.
    """

    def __init__(
        self,
        intensity: Any,
        exposure: Any = 1.0,
        background: Any = 0.0,
        *,
        validate_args: bool | None = None,
    ):
        rate = jnp.asarray(exposure * jnp.asarray(intensity) + background)
        if not is_traced(rate):
            bad = ~(jnp.isfinite(rate) & (rate > 0))
            if bad.any():
                raise ValueError(
                    "exposure * intensity + background must be positive and finite, got "
                    f"{rate[bad][0]} ({int(bad.sum())} of {rate.size} rates): a prior of positive "
                    "images or a positive background keeps it so"
                )
        super().__init__(rate, validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        # Poisson's formula has a value for a negative rate and a count of zero.
        return jnp.where(self.rate < 0, jnp.nan, super().log_prob(value))
