"""`DAPS`: down the noise levels, an event is denoised, fitted to the data and noised again."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from scoreprior._typing import Event, Key, Scalar
from scoreprior._util import check_count
from scoreprior.guide.linear import Linear
from scoreprior.mcmc.independent import AbstractIndependent
from scoreprior.mcmc.linear import LinearProblem, linear_problem
from scoreprior.problem import Problem
from scoreprior.sample import AbstractSampler, Heun, LogGrid, solve

LAST_LEVEL = 0.1
"""The last level of noise on top of the event, in units of `sigma_min`."""


class DAPS(AbstractIndependent):
    """Decoupled annealing (Zhang et al., CVPR 2025, algorithm 1), its inner step in closed form.

    With `r` the noise on top of the `x` of the model, down a grid, a draw `x_r` is

    1. denoised along the probability flow to `x_hat`, in `num_ode_steps` steps of `sampler`;
    2. exchanged for a draw of `N(x; x_hat, r^2 I) p(y | x)`, normalised;
    3. noised to the next level, `x + r_next n`. The last event of step 2 is returned.

    Two departures from the paper: for linear data step 2 is an exact draw, not Langevin dynamics,
    and the noise is that of the model, where the published code has a width of its own, narrower
    than the noise that it adds.

    **Approximate**, for every prior and in the limit of many levels too. `x_hat` has all the spread
    the prior and step 2 adds `r` to it, as if it had none. For a Gaussian prior of variance `c`
    and no data a level takes the variance `v` of `x_hat` to `c (v + r^2 + r_next^2) / (c +
    r_next^2)`, whose fixed point on a fine grid is `2 c`: where data say nothing, draws have twice
    the variance of the prior, and more with few levels (2.15 times with 100, 5.8 with 10). A
    datum as uncertain as the prior counts for too much; where data say all, draws come out right.
    Masses of modes are left where the first levels put them. `SplitGibbs` denoises by the reverse
    SDE instead, which is exact.

    **Arguments:** `num_samples`; `num_levels`, even in the logarithm; `num_ode_steps` per level;
    `sampler`, of `scoreprior.sample`, one without noise; `batch_size`: draws made side by side,
    which bounds memory and does not change the draws.
    """

    num_samples: int = eqx.field(static=True, default=1000)
    num_levels: int = eqx.field(static=True, default=100)
    num_ode_steps: int = eqx.field(static=True, default=5, kw_only=True)
    sampler: AbstractSampler = eqx.field(default=Heun(), kw_only=True)
    batch_size: int = eqx.field(static=True, default=1000, kw_only=True)

    def __check_init__(self):
        check_count("num_levels", self.num_levels, least=2)
        check_count("num_ode_steps", self.num_ode_steps)
        if not isinstance(self.sampler, AbstractSampler):
            raise TypeError(f"sampler must be a sampler such as Heun(), got {self.sampler!r}")
        if self.sampler.num_noises:
            raise ValueError(
                f"sampler must follow the probability flow, without noise, got {self.sampler!r}"
            )

    def prepare(self, problem: Problem) -> LinearProblem:
        """Raises unless the model has one prior site, seen linearly in known Gaussian noise."""
        return linear_problem(problem, type(self).__name__)

    def data(self, prepared: LinearProblem) -> Any:
        return prepared.A, prepared.y, prepared.cov_y

    def draw(self, prepared: LinearProblem, key: Key) -> Array:
        flow = prepared.flow
        low, high = LAST_LEVEL * flow.sigma_min, (flow.sigma_max**2 - flow.sigma_min**2) ** 0.5
        levels = LogGrid(low, high)(self.num_levels - 1).astype(prepared.y.dtype)
        below = jnp.append(levels[1:], 0)  # the last event gets no noise
        key_start, key_levels = jax.random.split(key)
        keys = jax.random.split(key_start, prepared.A.shape[1] // flow.moments.size)
        start = jax.vmap(lambda key: flow.moments.sample(key, flow.sigma_max))(keys)

        def anneal(x: Event, at: tuple[Scalar, Scalar, Key]) -> tuple[Event, None]:
            r, r_next, key = at
            key_fit, key_draw, key_noise = jax.random.split(key, 3)
            x_hat = self._denoised(prepared, x, r)
            draw = x_hat + r * jax.random.normal(key_draw, x.shape, x.dtype)
            linear = Linear(prepared.A @ x_hat.ravel(), prepared.A, r**2 * prepared.A)
            x, _ = linear.condition(key_fit, x_hat, draw, prepared.y, prepared.cov_y)
            return x + r_next * jax.random.normal(key_noise, x.shape, x.dtype), None

        keys = jax.random.split(key_levels, self.num_levels)
        x, _ = jax.lax.scan(anneal, start.reshape(prepared.shape), (levels, below, keys))
        return x

    def remedy(self) -> str:
        return f"raise num_levels above {self.num_levels}, or take another sampler"

    def extra(self, prepared: LinearProblem) -> dict[str, Any]:
        """`num_evaluations`: calls of the denoiser per draw."""
        per_step = self.sampler.num_evaluations(prepared.flow.moments.mean)
        total = per_step * self.num_ode_steps * self.num_levels
        return {"num_evaluations": ((), jnp.asarray(total))}

    def _denoised(self, prepared: LinearProblem, x: Event, r: Scalar) -> Event:
        """`x_hat`: down the flow from noise `r` on top of that of `sigma_min` to the latter."""
        flow = prepared.flow
        top, bottom = jnp.hypot(r, flow.sigma_min), jnp.asarray(flow.sigma_min, r.dtype)
        even = jnp.linspace(jnp.log(top), jnp.log(bottom), self.num_ode_steps + 1)
        sigmas = jnp.exp(even)
        events = x.reshape(-1, *flow.event_shape)
        unused = jax.random.key(0)  # the sampler takes no noise

        def one(x: Event) -> Event:
            return solve(flow.denoiser, x, key=unused, sigmas=sigmas, sampler=self.sampler)

        return jax.vmap(one)(events).reshape(x.shape)


__all__ = ["DAPS"]
