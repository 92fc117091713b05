"""Denoisers from networks trained in another parameterisation and on another schedule.

Such a network sees `x_t = alpha(t) x + sigma(t) z`, `z ~ N(0, I)`. Dividing by `alpha` gives the
library's one coordinate: `x_t / alpha = x + level z` with `level = sigma(t) / alpha(t)`. So at
noise level `sigma` a network is evaluated at the time `t` with `sigma(t) / alpha(t) = sigma` and
at `alpha(t) x`, and what it predicts is turned into `D(x, sigma)`.

`net(x_t, t, context)` is any callable pytree, a Flax NNX module say; one that counts its time
otherwise (`999 t`, `log sigma`) is wrapped in a function that converts. Networks trained on scaled
data are moved to data units by `Rescaled`. A level that the schedule does not reach gives NaN, not
an extrapolation: ask `schedule.level_range`.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Context, Event, Scalar, Sigma
from scoreprior._util import check_count, check_positive
from scoreprior.denoise.base import AbstractDenoiser

Net = Callable[[Event, Scalar, Context], Event]


class AbstractSchedule(eqx.Module):
    """`x_t = alpha(t) x + sigma(t) z`; `sigma / alpha` is monotone in `t` on `time_range`.

    A subclass gives `alpha` and `sigma`; `find_time` may be replaced by a closed form.
    """

    @abstractmethod
    def alpha(self, t: Scalar) -> Scalar:
        """Factor of the clean event."""

    @abstractmethod
    def sigma(self, t: Scalar) -> Scalar:
        """Standard deviation of the noise."""

    @property
    def time_range(self) -> tuple[float, float]:
        """First and last time; one of them is the clean end."""
        return 0.0, 1.0

    def level(self, t: Scalar | float) -> Scalar:
        """`sigma(t) / alpha(t)`."""
        t = jnp.asarray(t, float)
        return self.sigma(t) / self.alpha(t)

    @property
    def level_range(self) -> tuple[Scalar, Scalar]:
        """Smallest and largest noise level, `alpha = 0` counting as infinity."""
        ends = self.level(self.time_range[0]), self.level(self.time_range[1])
        return jnp.minimum(*ends), jnp.maximum(*ends)

    def time(self, level: Sigma) -> Scalar:
        """The `t` with `sigma(t) / alpha(t) = level`; NaN outside `level_range` by over 1e-4."""
        level = jnp.asarray(level, float)
        low, high = self.level_range
        inside = (level >= low * (1 - 1e-4)) & (level <= high * (1 + 1e-4))
        return jnp.where(inside, self.find_time(level), jnp.nan)

    def find_time(self, level: Scalar) -> Scalar:
        """`time` without the check: bisection to float precision.

        A last Newton step from the bisected time carries the derivative with respect to `level`.
        """
        rises = self.level(self.time_range[1]) > self.level(self.time_range[0])

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2
            right = (self.level(middle) < level) == rises
            return jnp.where(right, middle, low), jnp.where(right, high, middle)

        start = tuple(jnp.asarray(t, level.dtype) for t in self.time_range)
        low, high = jax.lax.fori_loop(0, 60, halve, start)
        t = jax.lax.stop_gradient((low + high) / 2)
        value, slope = jax.jvp(self._log_level, (t,), (jnp.ones_like(t),))
        usable = jnp.isfinite(value) & jnp.isfinite(slope) & (slope != 0)
        step = (jnp.log(level) - value) / jnp.where(usable, slope, 1.0)
        return t + jnp.where(usable, step, 0.0)

    def _log_level(self, t: Scalar) -> Scalar:
        return jnp.log(self.sigma(t)) - jnp.log(self.alpha(t))


class VP(AbstractSchedule):
    """Variance preserving: `alpha = exp(-B/2)`, `sigma^2 = 1 - exp(-B)`.

    `B(t) = b0 t + (b1 - b0) t^2 / 2`, `b0` and `b1` being `beta_min` and `beta_max`
    (Song et al., ICLR 2021, eq. 33).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __check_init__(self):
        check_positive("beta_min", self.beta_min)
        check_positive("beta_max", self.beta_max)

    def _integral(self, t: Scalar) -> Scalar:
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _invert(self, integral: Scalar) -> Scalar:
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.exp(-self._integral(t) / 2)

    def sigma(self, t: Scalar) -> Scalar:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def find_time(self, level: Scalar) -> Scalar:
        return self._invert(jnp.log1p(level**2))


class SubVP(VP):
    """`alpha = exp(-B/2)`, `sigma = 1 - exp(-B)` (Song et al., ICLR 2021, eq. 29)."""

    def sigma(self, t: Scalar) -> Scalar:
        return -jnp.expm1(-self._integral(t))

    def find_time(self, level: Scalar) -> Scalar:
        return self._invert(2 * jnp.arcsinh(level / 2))


class VE(AbstractSchedule):
    """`alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^t`.

    The noise that networks are trained on in Song et al. (ICLR 2021); the variance of the paper's
    SDE is smaller by `sigma_min^2`.
    """

    sigma_min: float
    sigma_max: float

    def __check_init__(self):
        check_positive("sigma_min", self.sigma_min)
        check_positive("sigma_max", self.sigma_max)

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.ones_like(t)

    def sigma(self, t: Scalar) -> Scalar:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def find_time(self, level: Scalar) -> Scalar:
        return jnp.log(level / self.sigma_min) / jnp.log(self.sigma_max / self.sigma_min)


class Cosine(AbstractSchedule):
    """`alpha = cos(a) / cos(a_0)`, `a = (t + s)/(1 + s) pi/2`, `sigma^2 = 1 - alpha^2`.

    Nichol & Dhariwal, ICML 2021, eq. 17. `s = 0` is the trigonometric interpolant.
    """

    offset: float = 0.008

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    @property
    def _first(self) -> float:
        return self.offset * self._rate

    # Both are written so that nothing cancels at either end, in single precision too.
    def alpha(self, t: Scalar) -> Scalar:
        return jnp.sin((1 - t) * self._rate) / math.cos(self._first)

    def sigma(self, t: Scalar) -> Scalar:
        turned = t * self._rate
        return jnp.sqrt(jnp.sin(turned) * jnp.sin(turned + 2 * self._first)) / math.cos(self._first)

    def find_time(self, level: Scalar) -> Scalar:
        angle = jnp.arctan2(jnp.hypot(math.sin(self._first), level), math.cos(self._first))
        return (angle - self._first) / self._rate


class FlowMatching(AbstractSchedule):
    """`alpha = 1 - t`, `sigma = t`: rectified flow, conditional optimal transport.

    With `noise_first` time runs the other way, `alpha = t` (Lipman et al., ICLR 2023).
    """

    noise_first: bool = False

    def alpha(self, t: Scalar) -> Scalar:
        return t if self.noise_first else 1 - t

    def sigma(self, t: Scalar) -> Scalar:
        return 1 - t if self.noise_first else t

    def find_time(self, level: Scalar) -> Scalar:
        return 1 / (1 + level) if self.noise_first else level / (1 + level)


class Discrete(AbstractSchedule):
    """A decreasing table `alpha_bar` [num_times]: `alpha^2 = alpha_bar`, `sigma^2 = 1 - alpha_bar`.

    Times are the indices 0, ..., num_times - 1; between them the log level is linear.
    """

    alpha_bar: Float[Array, " num_times"] = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        bars = self.alpha_bar
        ordered = jnp.all(jnp.diff(bars) < 0) & (bars[0] < 1) & (bars[-1] > 0)
        if bars.ndim != 1 or bars.shape[0] < 2 or not bool(ordered):
            raise ValueError("alpha_bar must be a vector decreasing strictly within (0, 1)")

    @classmethod
    def ddpm(
        cls, num_times: int = 1000, *, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> "Discrete":
        """`alpha_bar = cumprod(1 - beta)`, `beta` linear (Ho et al., NeurIPS 2020)."""
        check_count("num_times", num_times, least=2)
        betas = jnp.linspace(beta_min, beta_max, num_times)
        return cls(jnp.exp(jnp.cumsum(jnp.log1p(-betas))))

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, float(self.alpha_bar.shape[0] - 1)

    def _table(self) -> Float[Array, " num_times"]:
        """`log(sigma / alpha)` at the times of the table."""
        return (jnp.log1p(-self.alpha_bar) - jnp.log(self.alpha_bar)) / 2

    def _log_level_at(self, t: Scalar) -> Scalar:
        return jnp.interp(t, jnp.arange(self.alpha_bar.shape[0], dtype=t.dtype), self._table())

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.sqrt(jax.nn.sigmoid(-2 * self._log_level_at(t)))

    def sigma(self, t: Scalar) -> Scalar:
        return jnp.sqrt(jax.nn.sigmoid(2 * self._log_level_at(t)))

    def find_time(self, level: Scalar) -> Scalar:
        times = jnp.arange(self.alpha_bar.shape[0], dtype=level.dtype)
        return jnp.interp(jnp.log(level), self._table(), times)


class AbstractPrediction(AbstractDenoiser):
    """A network with its schedule, as a denoiser."""

    net: Net
    schedule: AbstractSchedule

    @property
    def level_range(self) -> tuple[float | Scalar, float | Scalar]:
        return self.schedule.level_range

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        t = self.schedule.time(sigma).astype(x.dtype)
        x_t = self.schedule.alpha(t) * x
        return self.clean(x_t, t, self.net(x_t, t, context))

    @abstractmethod
    def clean(self, x_t: Event, t: Scalar, output: Event) -> Event:
        """`E[X | x_t]` from what the network returns at `x_t` and `t`."""


class CleanPrediction(AbstractPrediction):
    """`net = E[X | x_t]`."""

    def clean(self, x_t: Event, t: Scalar, output: Event) -> Event:
        return output


class NoisePrediction(AbstractPrediction):
    """`net = E[z | x_t]`: `D = (x_t - sigma net) / alpha` (Ho et al., NeurIPS 2020)."""

    def clean(self, x_t: Event, t: Scalar, output: Event) -> Event:
        return (x_t - self.schedule.sigma(t) * output) / self.schedule.alpha(t)


class ScorePrediction(AbstractPrediction):
    """`net = grad log p_t(x_t)`: `D = (x_t + sigma^2 net) / alpha` (Song et al., ICLR 2021)."""

    def clean(self, x_t: Event, t: Scalar, output: Event) -> Event:
        return (x_t + self.schedule.sigma(t) ** 2 * output) / self.schedule.alpha(t)


class VPrediction(AbstractPrediction):
    """`net = E[alpha z - sigma X | x_t]`: `D = (alpha x_t - sigma net) / (alpha^2 + sigma^2)`.

    Salimans & Ho, ICLR 2022, appendix D, there with `alpha^2 + sigma^2 = 1`.
    """

    def clean(self, x_t: Event, t: Scalar, output: Event) -> Event:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)


class VelocityPrediction(AbstractPrediction):
    """`net = E[alpha' X + sigma' z | x_t]`, primes being rates in `t`.

    `D = (sigma net - sigma' x_t) / (sigma alpha' - alpha sigma')`. The velocity of flow matching
    and stochastic interpolants, in the time of the schedule (Albergo et al. 2023, eq. 2.10 with a
    Gaussian end).
    """

    def clean(self, x_t: Event, t: Scalar, output: Event) -> Event:
        one = jnp.ones_like(t)
        alpha, alpha_rate = jax.jvp(self.schedule.alpha, (t,), (one,))
        sigma, sigma_rate = jax.jvp(self.schedule.sigma, (t,), (one,))
        return (sigma * output - sigma_rate * x_t) / (sigma * alpha_rate - alpha * sigma_rate)
