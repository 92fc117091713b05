"""`JFPS`: Jacobian-free posterior sampling, with the covariance of a Gaussian prior."""

import jax

from scoreprior._typing import Event, Sigma
from scoreprior.gaussian import Moments
from scoreprior.guide.base import AbstractGaussianGuidance, Denoise, Predicted, operator
from scoreprior.observation import AbstractObservation


class JFPS(AbstractGaussianGuidance):
    """`p(x | x_t) ~ N(D, C sigma^2 (C + sigma^2 I)^-1)`, with the covariance `C` of the data.

    The mean is that of the denoiser, the covariance that of a Gaussian prior with the same second
    moments; so `B = A C (C + sigma^2 I)^-1` needs no derivative of the denoiser. Exact for a
    Gaussian prior. The covariance is one of those that Rozet et al. (2024, section 4.2) compare,
    who keep the derivative of the denoiser.

    **Arguments:** `moments` of the data; their mean is not used.
    """

    moments: Moments

    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        x_hat = denoise(x)
        A = operator(observation, x_hat)
        gain = self.moments.eigenvalues / (self.moments.eigenvalues + sigma**2)
        rows = A.reshape(-1, *x.shape)
        B = jax.vmap(lambda row: self.moments.apply(gain, row))(rows).reshape(A.shape)
        covariance = observation.noise.covariance() + sigma**2 * B @ A.T
        return x_hat, Predicted(observation.mean(x_hat).ravel(), A, B, covariance)
