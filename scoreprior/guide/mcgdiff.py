"""MCGDiff: the noise of linear data taken for noise of the diffusion."""

import equinox as eqx


class MCGDiff(eqx.Module):
    """Linear data pinned where the diffusion has their noise (Cardoso et al. 2023).

    A twist of `FeynmanKac` alone, and no denoiser. In the singular basis of the operator, whitened,
    a datum is `y_i = x_i + tau_i n`: what coordinate `i` is at noise level `tau_i`. So particles
    are led to it as if the prior were flat, pinned there, and go on freely; see `smc.pinned`. No
    derivative of the denoiser is taken. The twist knows nothing of the prior, so that far more
    particles are needed than with `TMPD()`. For data that are linear, and independent of one
    another.
    """


__all__ = ["MCGDiff"]
