"""`DiffPIR`: denoising diffusion models for plug-and-play image restoration."""

import equinox as eqx
import jax.numpy as jnp

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.guide.base import AbstractGaussianGuidance, Denoise, Predicted, operator
from scoreprior.observation import AbstractObservation


class DiffPIR(AbstractGaussianGuidance):
    """The proximal point of the data around the denoised event (Zhu et al. 2023, eq. 12b).

        D_y = argmin_x (y - A x)' cov_y^-1 (y - A x) + weight / sigma^2 |x - D|^2

    that is `p(x | x_t) ~ N(D, sigma^2 / weight I)`: `S = cov_y + sigma^2 / weight A A'` and
    `B = A / weight`. No derivative of the denoiser. A nonlinear `f` is linearised at `D`.

    **Arguments:** `weight`: the paper's `lambda`, 1 to 25 there.
    """

    weight: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_positive("weight", self.weight)

    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        x_hat = denoise(x)
        A = operator(observation, x_hat)
        covariance = observation.noise.covariance() + sigma**2 / self.weight * A @ A.T
        mean = observation.mean(x_hat).ravel()
        return x_hat, Predicted(mean, A, A / self.weight, covariance)
