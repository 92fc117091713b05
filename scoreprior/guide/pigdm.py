"""`PiGDM`: pseudoinverse-guided diffusion models."""

import equinox as eqx
import jax.numpy as jnp

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.guide.base import AbstractGaussianGuidance, Denoise, Predicted, linearise
from scoreprior.observation import AbstractObservation


class PiGDM(AbstractGaussianGuidance):
    """`p(x | x_t) ~ N(D, r^2 I)` (Song, Vahdat, Mardani & Kautz 2023, eqs. 7 and 8).

    `S = cov_y + r^2 A A'` and `B = A dD/dx_t`, with `r^2 = s^2 sigma^2 / (s^2 + sigma^2)` for data
    of variance `s^2`: exact for a prior `N(m, s^2 I)`. Costs one vector-Jacobian product per datum.

    **Arguments:** `prior_variance`: `s^2`, in data units squared. It decides the result, and there
    is no default: the variance within a mode and that between modes are both wrong for a mixture.
    """

    prior_variance: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_positive("prior_variance", self.prior_variance)

    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        x_hat, mean, A, AJ = linearise(denoise, observation, x)
        variance = self.prior_variance * sigma**2 / (self.prior_variance + sigma**2)
        covariance = observation.noise.covariance() + variance * A @ A.T
        return x_hat, Predicted(mean, A, AJ, covariance)
