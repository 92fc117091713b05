"""A denoiser of few coefficients made one of whole events: the rest is Gaussian."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior._util import check_count
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper
from scoreprior.gaussian import Moments


class Subspace(AbstractWrapper):
    """The denoiser of data whose leading coefficients have a law of their own.

    With moments `N(m, R diag(lam) R')` and coefficients `c = R' (x - m)`, those at the positions
    `index` are denoised together by `denoiser`, and each of the others as a Gaussian, independent
    of all:

        c_i  ->  D_S(c_S, sigma)_i  for i in S,     lam_i / (lam_i + sigma^2) c_i  for the others.

    Exact where data are so distributed and `denoiser` is exact. For smooth images a few hundred
    leading coefficients hold all that noise of level `sigma_min` leaves to be seen, and a network
    that acts on them alone costs one matrix product a layer, whatever the number of pixels. Noise
    is the same in every orthonormal basis, so the network is trained on coefficients, `project(x)`
    of the data, alone: at a fraction of the cost, with the same loss.

    **Arguments:** `denoiser` of events [k], `k = len(index)`, of zero mean unless `m` is not that
    of the data; `moments` of whole events; `index`, increasing positions in the flattened event of
    coefficients, as `leading` gives it.
    """

    denoiser: AbstractDenoiser
    moments: Moments
    index: tuple[int, ...] = eqx.field(static=True, converter=tuple)

    def __check_init__(self):
        index, size = np.asarray(self.index), self.moments.size
        if not (len(index) and (np.diff(index) > 0).all() and 0 <= index[0] <= index[-1] < size):
            raise ValueError(
                f"index must be increasing integers from 0 to {size - 1}, at least one, got "
                f"{self.index}"
            )

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        coefficients = self.moments.basis.analyse(x - self.moments.mean).ravel()
        shrunk = self.moments.eigenvalues / (self.moments.eigenvalues + sigma**2)
        rest = shrunk.ravel() * coefficients
        inner = self.denoiser(coefficients[self._positions], sigma, context)
        joined = rest.at[self._positions].set(inner, unique_indices=True, indices_are_sorted=True)
        return self.moments.mean + self.moments.basis.synthesise(joined.reshape(x.shape))

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        """That of the leading coefficients, and `-log N(c_i; 0, lam_i + sigma^2)` of the others."""
        coefficients = self.moments.basis.analyse(x - self.moments.mean).ravel()
        inner = self.denoiser.energy(coefficients[self._positions], sigma, context)
        variances = (self.moments.eigenvalues + sigma**2).ravel()
        each = (coefficients**2 / variances + jnp.log(2 * jnp.pi * variances)) / 2
        is_rest = np.ones(self.moments.size, bool)
        is_rest[self._positions] = False
        return inner + jnp.sum(jnp.where(is_rest, each, 0))

    def project(self, x: Event) -> Float[Array, " k"]:
        """The leading coefficients `c_S` of an event: what `denoiser` is trained on."""
        return self.moments.basis.analyse(x - self.moments.mean).ravel()[self._positions]

    @property
    def _positions(self) -> np.ndarray:
        return np.asarray(self.index)


def leading(moments: Moments, num: int) -> tuple[int, ...]:
    """Positions, in increasing order, of the `num` largest eigenvalues in the flattened event."""
    check_count("num", num)
    if num > moments.size:
        raise ValueError(f"num must be at most {moments.size}, of the event, got {num}")
    largest = np.argsort(-np.asarray(moments.eigenvalues).ravel(), kind="stable")[:num]
    return tuple(sorted(largest.tolist()))
