"""Losses for events seen only in white noise: `y = x + level N(0, I)`.

Down to the level of the noise the denoiser is known without bias. Above it, noisy data are data
like others: `y` with more noise on top is `x` in noise of a greater level (`Ambient`). At it, risk
can be told without the truth (`SURE`). Below it nothing here is unbiased; `learn.EM` goes there by
posterior draws, and `SUREScore` by posterior means, which spread too little.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._typing import Context, Event, Key, Scalar
from scoreprior._util import check_positive
from scoreprior.denoise.base import AbstractDenoiser, Noised
from scoreprior.train.loss import AbstractLoss


class Ambient(AbstractLoss):
    """A loss for clean events, made one for noisy events: exact above their noise.

    `loss` is that of the denoiser of `Y = X + level N`, which follows from the denoiser `D` of `X`
    by `denoise.Noised`, at noise `r` on top of `y` and `sigma^2 = r^2 + level^2`:

        D_Y(y_r, r) = (r / sigma)^2 D(y_r, sigma) + (level / sigma)^2 y_r .

    Denoising score matching of `Y` is then the loss of Daras, Dimakis & Daskalakis ("Consistent
    diffusion meets Tweedie", ICML 2024), and in expectation least at the exact `D` at every level
    above `level`. Levels below are not trained, and `D` there is what the network makes of it; the
    levels and the metric of `loss` are of `r`. The weight of `D` in it falls as `(r / sigma)^4`
    towards `level`, where the data do not tell.

    **Arguments:** `loss` of `Y`, such as `DenoisingLoss(LogUniform(0.1, 100.0), Residual(moments))`
    with the moments of the *noisy* events; `level` of the noise that the data have.
    """

    loss: AbstractLoss
    level: float

    def __check_init__(self) -> None:
        check_positive("level", self.level)

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        return self.loss(Noised(denoiser, jnp.asarray(self.level, x.dtype)), x, u, context, key=key)


class SURE(AbstractLoss):
    """Stein's unbiased estimate of the risk of denoising `y`, per entry and unit of noise.

    With `h = D(., level)` and one Rademacher vector `v` for the divergence (Stein, Ann. Stat. 9,
    1981; the trace by Ramani, Blu & Unser, IEEE Trans. Image Process. 17, 2008),

        |h(y) - y|^2 / (n level^2) + 2 v' dh/dy v / n - 1,

    of mean `E|h(y) - x|^2 / (n level^2)`, which is least at the exact denoiser at `level`. Nothing
    is said of other levels. Training data are the noisy events. A flexible network can make the
    divergence very negative at the events at hand: watch the loss on held-out events.

    **Arguments:** `level` of the noise that the data have.
    """

    level: float

    def __check_init__(self) -> None:
        check_positive("level", self.level)

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        return self.risk(denoiser, x, context, key)[0]

    def risk(
        self, denoiser: AbstractDenoiser, y: Event, context: Context, key: Key
    ) -> tuple[Scalar, Event]:
        """The estimate, and the denoised event."""
        level = jnp.asarray(self.level, y.dtype)
        v = jax.random.rademacher(key, y.shape, y.dtype)

        def denoise(y: Array) -> Array:
            return denoiser(y, level, context)

        h, push = jax.jvp(denoise, (y,), (v,))
        misfit = jnp.mean((h - y) ** 2) / level**2
        return misfit + 2 * jnp.mean(v * push) - 1, h


class SUREScore(AbstractLoss):
    """`SURE` at the level of the noise, and a loss of the denoised events (Aali et al. 2023).

        SURE(D; y) + weight loss(D; h(y)),     h(y) = D(y, level),

    with no gradient through `h(y)`: in the second term it stands for a clean event. The form is
    that of arXiv:2305.01166, whose network denoises and scores at once; the weight, and that the
    gradient stops, are choices made here.

    **Biased**: posterior means spread less than events. For `x ~ N(0, lam)` their variance is
    `lam^2 / (lam + level^2)`, half of `lam` at a signal-to-noise ratio of 1, and a prior trained on
    them is as much too narrow; at the level of the noise itself, the two terms disagree. `learn.EM`
    draws where this takes means, and for levels above the noise `Ambient` has no bias.

    **Arguments:** `level` of the noise that the data have; `loss` for clean events, such as
    `DenoisingLoss(...)`; `weight`.
    """

    level: float
    loss: AbstractLoss
    weight: float = eqx.field(default=1.0, kw_only=True)

    def __check_init__(self) -> None:
        check_positive("level", self.level)
        check_positive("weight", self.weight)

    def __call__(
        self, denoiser: AbstractDenoiser, x: Event, u: Scalar, context: Context, *, key: Key
    ) -> Scalar:
        key_risk, key_loss = jax.random.split(key)
        risk, h = SURE(self.level).risk(denoiser, x, context, key_risk)
        clean = jax.lax.stop_gradient(h)
        return risk + self.weight * self.loss(denoiser, clean, u, context, key=key_loss)
