"""An energy in place of a score: a scalar network whose gradient is the score.

With moments `N(m, R diag(lam) R')`, `a = sqrt(lam + sigma^2)`, the whitened event
`u = R diag(1 / a) R' (x - m)` and a network `F(u)` from events to events, energies here read

    E(x, sigma) = |u|^2 / 2 - gain(u),      grad_x E = R diag(1 / a) R' (u - grad_u gain) :

that of Gaussian data, and what the network adds to it. Such a score is conservative whatever the
weights, and differences of log densities at one noise level cost two evaluations. The price is a
gradient inside each call, and a second derivative in training.
"""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.gaussian import Moments


class AbstractGain(eqx.Module):
    """How a network's output becomes a scalar."""

    @abstractmethod
    def __call__(self, u: Event, output: Event) -> Scalar:
        """The energy below the Gaussian one, given whitened `u` and the scaled output at `u`."""


class InnerProduct(AbstractGain):
    """`gain = <u, S F(u)>`, with `S = R diag(sqrt(lam) / sigma) R'`.

    The form of PITA (Akhound-Sadegh et al., "Progressive inference-time annealing of diffusion
    models", 2025), with the inner product in whitened units, so that `F` itself enters the denoiser
    with the scale that it has in `Network`.
    """

    def __call__(self, u: Event, output: Event) -> Scalar:
        return jnp.vdot(u, output)


class SquaredDistance(AbstractGain):
    """`gain = <u, S F(u)> - |S F(u)|^2 / 2`, so that `E = |u - S F(u)|^2 / 2` is not negative.

    A squared distance to the network's output, as in Salimans & Ho ("Should EBMs model the energy
    or the score?", 2021) and Du et al. ("Reduce, reuse, recycle", ICML 2023). `S` as for
    `InnerProduct`, to which it is equal to first order in `F`.
    """

    def __call__(self, u: Event, output: Event) -> Scalar:
        return jnp.vdot(u, output) - jnp.sum(output**2) / 2


class EnergyNetwork(AbstractDenoiser):
    """A denoiser whose score is minus the gradient of a network's energy.

        E(x, sigma) = |u|^2 / 2 - gain(u, S F),       F = net(u, log(sigma / s) / 4, context)
        D(x, sigma) = m + R diag(lam / a^2) R' (x - m) + sigma^2 R diag(1 / a) R' grad_u gain,

    letters as in the module's head, with `s^2 = mean(lam)` and `S = R diag(sqrt(lam) / sigma) R'`.
    A network that returns zeros gives Gaussian data. `energy` is `-log p_sigma` up to a constant
    for each `sigma` and context, which training leaves free: energies of two levels, or of two
    contexts, must not be compared.

    **Arguments:** `net(x, log_sigma, context)` and `moments`, as for `Network`; its second
    derivative must exist (`nn.ResidualMLP` and `nn.UNet` are smooth). `gain`, `InnerProduct()` or
    `SquaredDistance()`.
    """

    net: Callable[[Event, Scalar, Context], Event]
    moments: Moments
    gain: AbstractGain = InnerProduct()

    def __check_init__(self):
        if not isinstance(self.gain, AbstractGain):
            raise TypeError(f"gain must be InnerProduct() or SquaredDistance(), got {self.gain!r}")

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        # Not x + sigma^2 score, which loses the digits of D where sigma is large.
        return self.moments.denoise(x, sigma) + sigma**2 * self._residual_score(x, sigma, context)

    def score(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        lam = self.moments.eigenvalues
        gaussian = self.moments.apply(1 / (lam + sigma**2), x - self.moments.mean)
        return self._residual_score(x, sigma, context) - gaussian

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        u = self.moments.apply(1 / self.moments.scales(sigma), x - self.moments.mean)
        return jnp.sum(u**2) / 2 - self._gain(u, sigma, context)

    def log_level(self, sigma: Sigma) -> Scalar:
        """`log(sigma / s) / 4`, `s^2` the mean variance: what the network is told of `sigma`."""
        return jnp.log(sigma / jnp.sqrt(jnp.mean(self.moments.eigenvalues))) / 4

    def _gain(self, u: Event, sigma: Sigma, context: Context) -> Scalar:
        scale = jnp.sqrt(self.moments.eigenvalues) / sigma
        output = self.net(u, self.log_level(sigma), context)
        return self.gain(u, self.moments.apply(scale, output))

    def _residual_score(self, x: Event, sigma: Sigma, context: Context) -> Event:
        """`R diag(1 / a) R' grad_u gain`: what the score adds to that of Gaussian data."""
        whiten = 1 / self.moments.scales(sigma)
        u = self.moments.apply(whiten, x - self.moments.mean)
        return self.moments.apply(whiten, jax.grad(self._gain)(u, sigma, context))
