"""`DPS`: diffusion posterior sampling."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._typing import Event, Scalar, Sigma
from scoreprior._util import check_positive
from scoreprior.guide.base import AbstractTwist, Denoise
from scoreprior.observation import AbstractObservation


class DPS(AbstractTwist):
    """A step down the distance of the denoised event from the data (Chung et al. 2023).

        D_y = D - step grad_{x_t} |y - f(D)|

    The authors' code moves `x` by `-zeta grad |y - f(D)|` at every ancestral step, however long
    (algorithm 1 of the paper has the square of the norm): from `sigma` to `sigma_next` that is
    `step = zeta / (1 - sigma_next^2 / sigma^2)`, about `zeta num_levels / (2 log(sigma_max /
    sigma_min))` on a grid even in `log sigma`. The norm is not weighted by `cov_y`, so this is no
    posterior sampler. One vector-Jacobian product.

    As a twist it is `tau = -step / sigma^2 |y - f(D)|`, of which `D_y` follows the gradient:
    whatever the noise of the data, it gets ever surer of itself as `sigma` falls.

    **Arguments:** `step`, in data units squared per unit of the data.
    """

    step: Scalar = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_positive("step", self.step)

    def guide(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> Event:
        x_hat, _, towards = _approach(denoise, observation, x)
        return x_hat + self.step * towards

    def twist(
        self, denoise: Denoise, observation: AbstractObservation, x: Event, sigma: Sigma
    ) -> tuple[Scalar, Event]:
        _, distance, towards = _approach(denoise, observation, x)
        weight = self.step / sigma**2
        return -weight * distance, weight * towards


def _approach(
    denoise: Denoise, observation: AbstractObservation, x: Event
) -> tuple[Event, Scalar, Event]:
    """`D`, `|y - f(D)|` and minus its gradient."""

    def seen(x: Event) -> tuple[Array, Event]:
        x_hat = denoise(x)
        return observation.mean(x_hat), x_hat

    mean, pullback, x_hat = jax.vjp(seen, x, has_aux=True)
    error = observation.data - mean
    distance = jnp.sqrt(jnp.sum(error**2))
    # At distance zero the gradient of the norm is taken as zero.
    return x_hat, distance, pullback(error / jnp.where(distance > 0, distance, 1))[0]
