"""`PredictorCorrector` and `AnnealedLangevin`: posterior draws along falling noise levels.

At each level `sigma` of a grid from `sigma_max` to `sigma_min` the target is

    pi_sigma(x_t) ~ p_sigma(x_t) p(y | x_t),

with the score of `p_sigma` from the denoiser and `p(y | x_t)` approximated (see `noised`). The last
target is the posterior itself. Draws are independent of one another.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.mcmc.independent import AbstractIndependent
from scoreprior.mcmc.linear import LinearProblem, linear_problem
from scoreprior.mcmc.noised import (
    AbstractNoisedLikelihood,
    FlatLikelihood,
    MomentLikelihood,
    first_draw,
    level,
)
from scoreprior.problem import Problem
from scoreprior.sample import AbstractSampler, HalfNoise, LogGrid, Stage


class AbstractAnnealed(AbstractIndependent):
    """Independent draws, each carried down `num_levels` levels even in `log sigma`.

    On every level after the first, `num_corrector_steps` Langevin steps `x + h s + sqrt(2 h) n`
    follow the score `s` of `pi_sigma`, with

        h = step_size / (1 / sigma^2 + L),

    `L` the largest curvature of `log p(y | x_t)`. The denominator bounds the curvature of
    `log pi_sigma` where it is concave, so steps are stable for `step_size < 2`.
    """

    num_levels: eqx.AbstractVar[int]
    num_corrector_steps: eqx.AbstractVar[int]
    step_size: eqx.AbstractVar[float]
    likelihood: eqx.AbstractVar[AbstractNoisedLikelihood]

    def __check_init__(self):
        check_count("num_levels", self.num_levels, least=2)
        check_positive("step_size", self.step_size)
        if self.step_size >= 2:
            raise ValueError(f"step_size must be below 2, got {self.step_size}")
        if not isinstance(self.likelihood, AbstractNoisedLikelihood):
            raise TypeError(
                "likelihood must be an approximation such as MomentLikelihood(), got "
                f"{self.likelihood!r}"
            )

    @abstractmethod
    def predict(
        self, problem: LinearProblem, sigma: Scalar, below: Scalar, x: Array, memory: Any, key: Key
    ) -> tuple[Array, Any]:
        """`x` from level `sigma` to the level `below` it, and the memory for the next step."""

    @abstractmethod
    def remember(self, x: Array) -> Any:
        """The memory before the first step."""

    def prepare(self, problem: Problem) -> LinearProblem:
        """Raises unless the model has one prior site, seen linearly in known Gaussian noise."""
        return linear_problem(problem, type(self).__name__)

    def data(self, prepared: LinearProblem) -> Any:
        return prepared.A, prepared.y, prepared.cov_y

    def draw(self, prepared: LinearProblem, key: Key) -> Array:
        flow = prepared.flow
        sigmas = LogGrid(flow.sigma_min, flow.sigma_max)(self.num_levels - 1)
        return _descend(self, prepared, sigmas.astype(prepared.y.dtype), key)

    def remedy(self) -> str:
        return (
            f"lower step_size below {self.step_size}, or raise num_levels above {self.num_levels}"
        )


class PredictorCorrector(AbstractAnnealed):
    """Reverse diffusion with Langevin corrections (Song et al. 2021, algorithm 2), of a posterior.

    From level to level a `predictor` of `scoreprior.sample` makes one step with the denoiser
    `x_t + sigma^2 grad log pi_sigma(x_t)` in place of the prior's; then come the corrector steps.
    The predictor is right as far as `p(y | x_t)` is: for a Gaussian prior and `MomentLikelihood()`
    draws are exact in the limit of many levels, with no correction. For other priors the error of
    `p(y | x_t)` at high levels stays: masses of separate modes are not to be relied on
    (`TemperedSMC` weights them).

    **Arguments:** `num_samples`; `num_levels`; `num_corrector_steps` per level; `step_size` of the
    corrector, a pure number below 2, which is `2 r^2` for Song et al.'s signal-to-noise ratio `r`.
    Theirs divides norms of noise and score at each point; here `h` is one number per level, so
    that a step does not depend on the draw. `predictor`, `likelihood`; `batch_size`: draws made
    side by side, which bounds memory and does not change the draws.
    """

    num_samples: int = eqx.field(static=True, default=1000)
    num_levels: int = eqx.field(static=True, default=200)
    num_corrector_steps: int = eqx.field(static=True, default=1, kw_only=True)
    step_size: float = eqx.field(static=True, default=0.1, kw_only=True)
    predictor: AbstractSampler = eqx.field(default=HalfNoise(), kw_only=True)
    likelihood: AbstractNoisedLikelihood = eqx.field(default=MomentLikelihood(), kw_only=True)
    batch_size: int = eqx.field(static=True, default=1000, kw_only=True)

    def __check_init__(self):
        check_count("num_corrector_steps", self.num_corrector_steps, least=0)
        if not isinstance(self.predictor, AbstractSampler):
            raise TypeError(
                f"predictor must be a sampler such as HalfNoise(), got {self.predictor!r}"
            )

    def remember(self, x: Array) -> Any:
        return self.predictor.init(x)

    def predict(
        self, problem: LinearProblem, sigma: Scalar, below: Scalar, x: Array, memory: Any, key: Key
    ) -> tuple[Array, Any]:
        def denoise(x: Array, at: Scalar) -> Array:
            here = level(self.likelihood, problem, at)
            return x + at**2 * (problem.prior_score(x, at) + here.score(x))

        shape = (self.predictor.num_noises, *x.shape)
        noise = jax.random.normal(key, shape, x.dtype)
        return self.predictor.step(Stage(denoise, sigma, below, noise), x, memory)


class AnnealedLangevin(AbstractAnnealed):
    """Langevin dynamics down the noise levels (Song & Ermon 2019), of a posterior.

    With a likelihood at every level, as Jalal et al. (NeurIPS 2021). The step size is proportional
    to `sigma^2` where the data are weak, as in algorithm 1 of Song & Ermon. Nothing but these steps
    moves a draw: whatever `likelihood`, draws are exact for an exact score in the limit of many
    steps per level and a small `step_size`, where the posterior has one mode or modes that touch.
    Masses of modes between which no step leads at low levels are those of the approximation at the
    level where they part. With `r` the `step_size`, `M` steps per level and `q` the ratio of
    successive levels, variances lag behind the levels by a fraction `log(1 / q) / (M r)` and
    directions no wider than `sigma_min` are too wide by about `r / 2`.

    **Arguments:** as those of `PredictorCorrector`.
    """

    num_samples: int = eqx.field(static=True, default=1000)
    num_levels: int = eqx.field(static=True, default=200)
    num_corrector_steps: int = eqx.field(static=True, default=5, kw_only=True)
    step_size: float = eqx.field(static=True, default=0.3, kw_only=True)
    likelihood: AbstractNoisedLikelihood = eqx.field(default=FlatLikelihood(), kw_only=True)
    batch_size: int = eqx.field(static=True, default=1000, kw_only=True)

    def __check_init__(self):
        check_count("num_corrector_steps", self.num_corrector_steps)

    def remember(self, x: Array) -> Any:
        return ()

    def predict(
        self, problem: LinearProblem, sigma: Scalar, below: Scalar, x: Array, memory: Any, key: Key
    ) -> tuple[Array, Any]:
        return x, memory


def _descend(
    engine: AbstractAnnealed, problem: LinearProblem, sigmas: Float[Array, " levels"], key: Key
) -> Array:
    """One draw."""
    key_start, key_steps = jax.random.split(key)
    x = first_draw(problem, level(engine.likelihood, problem, sigmas[0]), key_start)

    def step(carry: tuple[Array, Any], row: tuple[Scalar, Scalar, Key]) -> tuple[Any, None]:
        (x, memory), (sigma, below, key) = carry, row
        key_predictor, key_corrector = jax.random.split(key)
        x, memory = engine.predict(problem, sigma, below, x, memory, key_predictor)
        return (_correct(engine, problem, below, x, key_corrector), memory), None

    rows = sigmas[:-1], sigmas[1:], jax.random.split(key_steps, len(sigmas) - 1)
    return jax.lax.scan(step, (x, engine.remember(x)), rows)[0][0]


def _correct(
    engine: AbstractAnnealed, problem: LinearProblem, sigma: Scalar, x: Array, key: Key
) -> Array:
    here = level(engine.likelihood, problem, sigma)
    h = engine.step_size / (1 / sigma**2 + here.curvature)

    def step(x: Array, key: Key) -> tuple[Array, None]:
        score = problem.prior_score(x, sigma) + here.score(x)
        return x + h * score + jnp.sqrt(2 * h) * jax.random.normal(key, x.shape, x.dtype), None

    return jax.lax.scan(step, x, jax.random.split(key, engine.num_corrector_steps))[0]


__all__ = ["AbstractAnnealed", "AnnealedLangevin", "PredictorCorrector"]
