"""`NRLG`: noise-refined likelihood guidance."""

import equinox as eqx
import jax.numpy as jnp

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.guide.base import AbstractGaussianGuidance, Denoise, Predicted, operator
from scoreprior.observation import AbstractObservation


class NRLG(AbstractGaussianGuidance):
    """`p(x | x_t) ~ N(x_t, sigma^2 I)`, as if the prior were flat (Wang, Liu & Wei 2025).

    The likelihood score has a closed form, with `mean = f(x_t)`, `B = weight A` and
    `S = cov_y + sigma^2 A A'`, and needs no derivative of the denoiser. For `weight = 1` it is that
    of Meng & Kabashima (2022); Wang et al. refine the predicted noise by it, which is to add it to
    the score of the network. It pulls too hard at levels above the scale of the data. A nonlinear
    `f` is linearised at `x_t`.

    **Arguments:** `weight`, a factor of the likelihood score.
    """

    weight: Scalar = eqx.field(default=1.0, converter=jnp.asarray)

    def __check_init__(self):
        check_positive("weight", self.weight)

    def predict(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Event, Predicted]:
        A = operator(observation, x)
        covariance = observation.noise.covariance() + sigma**2 * A @ A.T
        return denoise(x), Predicted(observation.mean(x).ravel(), A, self.weight * A, covariance)
