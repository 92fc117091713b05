"""`CorrectedDraws`: posterior draws by guided diffusion with weights."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from scoreprior._typing import Event, Key
from scoreprior._util import check_count
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.feynman_kac import Levels, Resampling, run
from scoreprior.flow import FixedGrid, Flow, LogTime
from scoreprior.gaussian import Moments
from scoreprior.guide import TMPD
from scoreprior.guide.base import AbstractGaussianTwist
from scoreprior.observation import AbstractObservation
from scoreprior.sample import LogGrid
from scoreprior.smc.twisted import Twisted


class CorrectedDraws(eqx.Module):
    """One draw per measurement, from a cloud whose weights correct the guidance.

    Twisted sequential Monte Carlo, as in `smc.FeynmanKac` (see there, and `smc.twisted`), one cloud
    for every measurement: the draw has the law of the posterior up to the error of the steps and a
    bias of order `1 / num_particles`, for any prior. It is the event with noise `sigma_min`, which
    is therefore far below what there is to resolve. The cost of a draw is that of `num_particles`
    guided ones, and memory goes to matrices of data by event for every particle.

    **Arguments:** `moments` of the events, such as those of `fit_gaussian`, from which a cloud
    starts; the levels, `num_steps` between `sigma_max` and `sigma_min`, even in the logarithm;
    `num_particles`; `guidance`, any whose law of the data is Gaussian.
    """

    moments: Moments
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)
    guidance: AbstractGaussianTwist = TMPD()

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        check_count("num_particles", self.num_particles)
        LogGrid(self.sigma_min, self.sigma_max)
        if not isinstance(self.guidance, AbstractGaussianTwist):
            raise TypeError(f"guidance must have a Gaussian law of the data, got {self.guidance!r}")

    def __call__(
        self, denoiser: AbstractDenoiser, observation: AbstractObservation, key: Key
    ) -> Event:
        key_run, key_pick = jax.random.split(key)
        # The flow holds denoiser and levels; it is not solved.
        flow = Flow(
            denoiser,
            self.moments,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            solver=FixedGrid(1, LogTime()),
        )
        model = Twisted(flow, observation, self.guidance, self._levels(), None).model()
        state, _ = run(model, Resampling(), self.num_particles, key_run)
        return state.particles[jax.random.categorical(key_pick, state.log_weights)]

    def _levels(self) -> Levels:
        sigmas: Float[Array, " levels"] = LogGrid(self.sigma_min, self.sigma_max)(self.num_steps)
        return Levels.half_noise(self.sigma_min, sigmas.astype(self.moments.mean.dtype))
