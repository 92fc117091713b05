"""Drift control: an extra drift, solved from the cloud, that flattens the weights."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class AbstractControl(eqx.Module):
    """How much of each of `num_bases` basis drifts `b_j` is added."""

    num_bases: ClassVar[int]

    @abstractmethod
    def solve(
        self,
        log_weights: Float[Array, " particle"],
        rate: Float[Array, " particle"],
        response: Float[Array, "particle basis"],
    ) -> Float[Array, " basis"]:
        """Coefficients `theta`, from rates `g` of the log weights and `H_j = dg/dtheta_j`."""


class NoControl(AbstractControl):
    """No extra drift."""

    num_bases: ClassVar[int] = 0

    def solve(
        self,
        log_weights: Float[Array, " particle"],
        rate: Float[Array, " particle"],
        response: Float[Array, "particle basis"],
    ) -> Float[Array, " basis"]:
        return jnp.zeros(0, rate.dtype)


class VarianceControl(AbstractControl):
    """The drift that makes the variance of the weights least ("DriftLite", Ren et al. 2025).

    Of all drifts `theta_1 S + theta_2 S_G`, `S` the composed score and `S_G` that of an isotropic
    Gaussian with its moments, it takes

        theta = argmin Var_W[g + theta . H],        H_j = grad log p . b_j + div b_j,

    least squares over the weighted cloud. As `H` has mean zero under the target whatever `theta`,
    the law does not change, only the weights. `div S` is by one Rademacher probe per particle: one
    Jacobian-vector product of every denoiser per step. The authors solve for the step ahead; here
    `theta` comes from the step before, so that it does not depend on the noise that it multiplies,
    and costs nothing more.
    """

    num_bases: ClassVar[int] = 2

    def solve(
        self,
        log_weights: Float[Array, " particle"],
        rate: Float[Array, " particle"],
        response: Float[Array, "particle basis"],
    ) -> Float[Array, " basis"]:
        weights = jax.nn.softmax(log_weights)
        rate = rate - weights @ rate
        response = response - (weights @ response)[None]
        weighted = response.T * weights[None]
        values, vectors = jnp.linalg.eigh(weighted @ response)
        # The bases are parallel where the target is Gaussian: then only their sum is known.
        known = values > 1e3 * jnp.finfo(values.dtype).eps * values[-1]
        inverse = jnp.where(known, 1 / jnp.where(known, values, 1.0), 0.0)
        return -vectors @ (inverse * (vectors.T @ (weighted @ rate)))


__all__ = ["AbstractControl", "NoControl", "VarianceControl"]
