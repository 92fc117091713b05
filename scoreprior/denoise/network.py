"""A neural denoiser: a network under Gaussian preconditioning."""

from collections.abc import Callable

import jax.numpy as jnp

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.gaussian import Moments


class Network(AbstractDenoiser):
    """The preconditioned network of EDM, generalised from one variance to Gaussian moments.

    With moments `N(m, R diag(lam) R')`, `a = sqrt(lam + sigma^2)` and `s^2 = mean(lam)`,

        D(x, sigma) = m + R diag(lam / a^2) R' (x - m) + R diag(sigma sqrt(lam) / a) R' F
        F = net(R diag(1 / a) R' (x - m), log(sigma / s) / 4, context) .

    The first two terms are the denoiser of Gaussian data, so the network learns what is not
    Gaussian; its input has unit covariance and keeps the layout of an event (ZCA), and its ideal
    output has unit variance in every direction where the data carry no more than Gaussian
    information. For `Isotropic` moments this is table 1 of Karras et al. (NeurIPS 2022). Where
    `lam = 0`, `D` is `m`.

    On the 8x8 digits isotropic moments generalise best, measured in `examples/train_digits.py`;
    the flow around the denoiser has moments of its own.

    **Arguments:** `net(x, log_sigma, context)`, any callable pytree from [*event] to [*event] in
    whitened units, such as `nn.ResidualMLP` or a Flax NNX module; `moments` of the clean data in
    data units, held fixed in training.
    """

    net: Callable[[Event, Scalar, Context], Event]
    moments: Moments

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        scales = self.moments.scales(sigma)
        centred = self.moments.basis.analyse(x - self.moments.mean)
        whitened = self.moments.basis.synthesise(centred / scales)
        output = self.net(whitened, self.log_level(sigma), context)
        residual = self.output_scale(sigma) * self.moments.basis.analyse(output)
        kept = self.moments.eigenvalues / scales**2 * centred
        return self.moments.mean + self.moments.basis.synthesise(kept + residual)

    def residual(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        """`R diag(sigma sqrt(lam) / a) R' F`: what the network adds to Gaussian data's denoiser."""
        basis, scales = self.moments.basis, self.moments.scales(sigma)
        whitened = basis.synthesise(basis.analyse(x - self.moments.mean) / scales)
        output = self.net(whitened, self.log_level(sigma), context)
        return basis.synthesise(self.output_scale(sigma) * basis.analyse(output))

    def log_level(self, sigma: Sigma) -> Scalar:
        """`log(sigma / s) / 4`, `s^2` the mean variance: what the network is told of `sigma`."""
        scale = jnp.sqrt(jnp.mean(self.moments.eigenvalues))
        return jnp.log(sigma / scale) / 4

    def output_scale(self, sigma: Sigma) -> Event:
        """`sigma sqrt(lam / (lam + sigma^2))`: standard deviations of the residual, [*event]."""
        return sigma * jnp.sqrt(self.moments.eigenvalues) / self.moments.scales(sigma)
