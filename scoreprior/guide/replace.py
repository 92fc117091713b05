"""`Replacement`: known entries are put in, and the rest is left to the prior."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from scoreprior._typing import Context, Event, Sigma
from scoreprior._util import check_finite, is_traced
from scoreprior.denoise.base import AbstractDenoiser, AbstractWrapper


class Replacement(AbstractWrapper):
    """Inpainting by replacement (Song et al., ICLR 2021; Lugmayr et al. 2022).

        D_y = values where mask, D elsewhere

    A sampler then carries the known entries along a noised path of their own, `values + sigma n`,
    as the published methods put it into every event; the noise is fresh at each step as far as the
    sampler makes it so. The resampling of RePaint, noise up and down again, is a sampler,
    `sample.Recurrent`: it lowers the error below and does not remove it.

    This is *not* the posterior: an unknown entry is denoised from the noisy `x_t` of the known ones
    and never from `values`, so correlations are lost at high noise and come in only as `sigma`
    falls, when most of the event is decided. Exact where known and unknown entries are independent;
    `TMPD`, and `EventGuidance` with `Equals`, keep the correlations that the denoiser knows.

    **Arguments:** `denoiser`; `mask` [*event], true where entries are known; `values` [*event] in
    data units, of which the others are not used. Raises `ValueError` for shapes that differ and for
    known values that are not finite.
    """

    denoiser: AbstractDenoiser
    mask: Bool[Array, "*event"] = eqx.field(converter=jnp.asarray)
    values: Event = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        if self.mask.shape != self.values.shape or self.mask.dtype != bool:
            raise ValueError(
                "mask must be Boolean, of the shape of values, "
                f"{self.values.shape}, got {self.mask.dtype} of shape {self.mask.shape}"
            )
        if not (is_traced(self.mask) or is_traced(self.values)):
            check_finite("values where mask", self.values[self.mask])

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        return jnp.where(self.mask, self.values, self.denoiser(x, sigma, context))
