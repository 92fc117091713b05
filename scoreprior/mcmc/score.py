"""`SGLD` and `SGHMC`: chains that follow a score and never ask for a density.

There is no acceptance step, so the law of the draws differs from the posterior by an error of the
order of the step size. What they sample is the law whose score the denoiser states: for the centred
form and an exact denoiser, the posterior under the prior of `X + sigma N`.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from scoreprior._run import Draws
from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.mcmc.chains import AbstractChains
from scoreprior.mcmc.schedule import AbstractSchedule, as_schedule
from scoreprior.mcmc.start import PRIOR_DRAWS, AbstractInit
from scoreprior.problem import Problem


class ScoreChain(NamedTuple):
    """The state of one chain: there is no log density in it."""

    position: dict[str, Array]


class AbstractScoreChains(AbstractChains):
    """Chains that advance by `Problem.score` at noise level `sigma`."""

    step_size: eqx.AbstractVar[float | AbstractSchedule]
    sigma: eqx.AbstractVar[float | None]

    def __check_init__(self):
        as_schedule(self.step_size)
        check_sigma(self.sigma, self.centred)

    @abstractmethod
    def move(
        self, key: Key, position: dict[str, Array], score: Callable[..., Any], step_size: Scalar
    ) -> dict[str, Array]:
        """One chain one step on; `score(position, minibatch)` as blackjax calls it."""

    def form(self, problem: Problem) -> Problem:
        return problem.centred(with_value=False) if self.centred else problem

    def begin(self, problem: Problem, key: Key, init: AbstractInit) -> ScoreChain:
        return ScoreChain(start_by_score(problem, self.sigma, key, self.num_chains, init))

    def start(self, position: dict[str, Array], logdensity_fn: Callable[..., Any]) -> ScoreChain:
        return ScoreChain(position)

    def first(self, problem: Problem, chains: Any, key: Key) -> Any:
        return chains

    def step(
        self, problem: Problem, state: Any, key: Key, number: Int[Array, ""]
    ) -> tuple[Any, dict[str, Any]]:
        step_size = as_schedule(self.step_size)(number)

        def score(position: dict[str, Array], minibatch: Any) -> dict[str, Array]:
            return problem.score(position, self.sigma)

        def move(key: Key, position: dict[str, Array]) -> dict[str, Array]:
            return self.move(key, position, score, step_size)

        positions = jax.vmap(move)(jax.random.split(key, self.num_chains), state.position)
        stats = {
            "diverging": ~all_finite(positions),
            "step_size": jnp.full((self.num_chains,), step_size),
        }
        return ScoreChain(positions), {"positions": positions, "stats": stats}

    def describe(self, outputs: dict[str, dict[str, np.ndarray]]) -> str:
        stats = outputs["stats"]
        lost = int(stats["diverging"][-1].sum())
        return f"step size {stats['step_size'][-1, 0]:.3g}" + (f", {lost} diverged" if lost else "")

    def warn(self, draws: Draws) -> None:
        lost = draws.stats["diverging"].any(1)
        if lost.any():
            warnings.warn(
                f"{int(lost.sum())} of {len(lost)} chains left for infinity, and their draws are "
                f"not finite: the steps are unstable, lower step_size below {self.step_size}",
                stacklevel=3,
            )

    def _settings(self, problem: Problem, key: Key, start: Any) -> dict[str, Any]:
        settings = super()._settings(problem, key, start)
        return {**settings, "step_size": repr(self.step_size)}


class SGLD(AbstractScoreChains):
    """Langevin dynamics without acceptance, by blackjax (Welling & Teh 2011, eq. 4).

        x' = x + h s(x) + sqrt(2 h) n,        n ~ N(0, I),

    with `s` the score of the posterior and `h` the step size (Welling & Teh write `h = eps / 2`).
    The data are used whole, so the only error is that of the discretisation, of order `h`: for a
    Gaussian posterior of precision `P` the draws have covariance `(P - h P^2 / 2)^-1`, and the
    chain explodes for `h > 2 / max eig(P)`. Successive draws are strongly correlated.

    **Arguments:** `num_warmup`, `num_samples`: steps per chain; `num_chains`. `step_size`: `h`, a
    number or a schedule such as `Decaying(...)`, in the squared units of the position. `sigma`: the
    noise level of the prior's score, in data units; by default see `Problem.score`. `centred`: move
    `x`, the reason for this engine, rather than its noise. `chunk_size`: steps between two updates
    of the progress bar and of the checkpoint; it does not change the draws.

    Chains start where `init` says, by default at prior draws. Raises `ValueError` where the score
    is not finite there. Chains that diverge keep their infinite draws, are marked in `sample_stats`
    and reported.
    """

    num_warmup: int = eqx.field(static=True, default=1000)
    num_samples: int = eqx.field(static=True, default=1000)
    num_chains: int = eqx.field(static=True, default=4)
    step_size: float | AbstractSchedule = eqx.field(static=True, kw_only=True)
    sigma: float | None = eqx.field(static=True, default=None, kw_only=True)
    centred: bool = eqx.field(static=True, default=True, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=100, kw_only=True)

    def move(
        self, key: Key, position: dict[str, Array], score: Callable[..., Any], step_size: Scalar
    ) -> dict[str, Array]:
        return blackjax.sgld.build_kernel()(key, position, score, None, step_size)


class SGHMC(AbstractScoreChains):
    """Hamiltonian dynamics with friction, without acceptance, by blackjax (Chen et al. 2014).

    Each draw starts from a fresh momentum `p ~ N(0, I)` and makes `num_steps` Euler steps

        x' = x + h p,        p' = (1 - alpha h) p + h s(x) + sqrt(2 alpha h) n,

    with `s` the score of the posterior. The error is of order `h` (`alpha` does not remove it: the
    explicit Euler step puts energy in), larger than that of `SGLD` per step but with draws less
    correlated.

    **Arguments:** as those of `SGLD`, where `step_size` is in the units of the position;
    `num_steps` per draw; `friction`: `alpha`, in units of one over time, zero at least.
    """

    num_warmup: int = eqx.field(static=True, default=200)
    num_samples: int = eqx.field(static=True, default=1000)
    num_chains: int = eqx.field(static=True, default=4)
    step_size: float | AbstractSchedule = eqx.field(static=True, kw_only=True)
    num_steps: int = eqx.field(static=True, default=10, kw_only=True)
    friction: float = eqx.field(static=True, default=1.0, kw_only=True)
    sigma: float | None = eqx.field(static=True, default=None, kw_only=True)
    centred: bool = eqx.field(static=True, default=True, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=25, kw_only=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        if not 0 <= self.friction < float("inf"):
            raise ValueError(f"friction must be finite and at least 0, got {self.friction}")

    def move(
        self, key: Key, position: dict[str, Array], score: Callable[..., Any], step_size: Scalar
    ) -> dict[str, Array]:
        kernel = blackjax.sghmc.build_kernel(alpha=self.friction)
        return kernel(key, position, score, None, step_size, self.num_steps)


def check_sigma(sigma: float | None, centred: bool) -> None:
    """Raise `ValueError` unless `sigma` is a noise level, or `None`, that `centred` allows."""
    if sigma is None:
        return
    check_positive("sigma", sigma)
    if not centred:
        raise ValueError(f"sigma must be None with centred=False, got {sigma}")


def start_by_score(
    problem: Problem,
    sigma: float | None,
    key: Key,
    num: int,
    init: AbstractInit = PRIOR_DRAWS,
) -> dict[str, Array]:
    """Positions [num, *site] where `init` says, with a finite score.

    A draw where it is not finite is drawn again; then raises `ValueError`.
    """
    positions = init.positions(problem, key, num)
    good = _has_score(problem, sigma, positions)
    for attempt in range(1, init.max_attempts):
        if good.all():
            return positions
        again = init.positions(problem, jax.random.fold_in(key, attempt), num)
        also = _has_score(problem, sigma, again)
        positions = jax.tree.map(
            lambda old, new, good=good: _where(good, old, new), positions, again
        )
        good = good | also
    if not good.all():
        raise ValueError(
            f"the score is not finite at {int((~good).sum())} of {num} starting points, "
            f"{init.origin(np.asarray(~good))}: check the data for NaN, the units of the noise, "
            "and the denoiser at its smallest noise level"
        )
    return positions


def all_finite(tree: Any) -> Bool[Array, " n"]:
    """Whether all entries of each row of `tree`, leaves [n, ...], are finite."""
    rows = [jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(1) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(rows).all(0)


def _where(condition: Array, new: Array, old: Array) -> Array:
    return jnp.where(condition.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


@eqx.filter_jit
def _has_score(
    problem: Problem, sigma: float | None, positions: dict[str, Array]
) -> Bool[Array, " n"]:
    return all_finite(jax.vmap(lambda position: problem.score(position, sigma))(positions))


__all__ = ["SGHMC", "SGLD", "AbstractScoreChains"]
