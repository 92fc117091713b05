"""A likelihood fitted to simulations, of which a posterior network can be taught without end.

A network trained on few simulations soon knows them by heart. What a simulator does is often the
simpler thing to learn: a mixture density network `p(x | z)` (Bishop, "Mixture density networks",
1994) fitted to the same simulations makes as many pairs as training wants. A posterior taught by
draws of a fitted likelihood is due to Wiqvist, Frellsen and Picchini, "Sequential neural posterior
and likelihood approximation", 2021. The likelihood may be wrong: held-out simulations choose
between that posterior and one trained on the simulations alone.
"""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count
from scoreprior.sbi.embed import Standardise
from scoreprior.sbi.parameters import Parameters
from scoreprior.train import adamw

BATCH_SIZE, NUM_EVALUATIONS = 256, 40
"""Of the fit of a likelihood."""

LEAST_INSIDE = 0.1
"""Share of pairs within the range of the simulations below which a likelihood is of no use."""


class MixtureDensity(eqx.Module):
    """`p(y | z) = sum_k w_k(z) N(y; m_k(z), (L_k(z) L_k(z)')^-1)` of features `y` [num_features].

    Weights, means and triangular `L_k` with a positive diagonal come from a network of `z` [size].
    """

    net: eqx.nn.MLP
    num_components: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        num_features: int,
        *,
        num_components: int,
        width: int,
        depth: int,
        key: Key,
        dtype: Any = None,
    ):
        self.num_components, self.num_features = num_components, num_features
        outputs = num_components * (1 + num_features + num_features * (num_features + 1) // 2)
        self.net = eqx.nn.MLP(size, outputs, width, depth, jax.nn.silu, dtype=dtype, key=key)

    def _parts(self, z: Float[Array, " size"]) -> tuple[Array, Array, Array]:
        """Log weights [k], means [k, num_features] and `L` [k, num_features, num_features]."""
        num, size = self.num_components, self.num_features
        logits, mean, factor = jnp.split(self.net(z).reshape(num, -1), [1, 1 + size], axis=1)
        rows, columns = np.tril_indices(size)
        entries = jnp.where(jnp.asarray(rows == columns)[None], jnp.exp(factor), factor)
        lower = jnp.zeros((num, size, size), factor.dtype).at[:, rows, columns].set(entries)
        return jax.nn.log_softmax(logits[:, 0]), mean, lower

    def log_prob(self, y: Float[Array, " num_features"], z: Float[Array, " size"]) -> Scalar:
        """Log density of `y` given `z`, nats."""
        log_weights, mean, lower = self._parts(z)
        white = jnp.einsum("kij,ki->kj", lower, y[None] - mean)
        log_det = jnp.sum(jnp.log(jnp.diagonal(lower, axis1=1, axis2=2)), 1)
        log_normal = log_det - jnp.sum(white**2, 1) / 2 - self.num_features / 2 * np.log(2 * np.pi)
        return jax.nn.logsumexp(log_weights + log_normal)

    def sample(self, key: Key, z: Float[Array, " size"]) -> Float[Array, " num_features"]:
        """One draw of `y` given `z`."""
        choose, draw = jax.random.split(key)
        log_weights, mean, lower = self._parts(z)
        k = jax.random.categorical(choose, log_weights)
        noise = jax.random.normal(draw, mean.shape[1:], mean.dtype)
        return mean[k] + jax.scipy.linalg.solve_triangular(lower[k], noise, trans=1, lower=True)


class Surrogate(eqx.Module):
    """How a likelihood is fitted to simulations, and how many pairs are drawn of it.

    **Arguments:** `num_components` of the mixture; `width` and `depth` of its network; `num_steps`,
    by default those of the posterior network; `num_pairs` at most; `max_features`, the largest
    number of values of an observation for which it is tried, for a covariance has its square.
    """

    num_components: int = eqx.field(static=True, default=4)
    width: int = eqx.field(static=True, default=128)
    depth: int = eqx.field(static=True, default=3)
    num_steps: int | None = eqx.field(static=True, default=None)
    num_pairs: int = eqx.field(static=True, default=300_000)
    max_features: int = eqx.field(static=True, default=64)

    def __check_init__(self):
        for name in ("num_components", "width", "depth", "num_pairs", "max_features"):
            check_count(name, getattr(self, name))
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps)

    def pairs(
        self,
        parameters: Parameters,
        standardise: Standardise,
        z: tuple[Float[Array, "n size"], Float[Array, "m size"]],
        x: tuple[Float[Array, "n *x"], Float[Array, "m *x"]],
        *,
        num_steps: int,
        num_pairs: int,
        key: Key,
    ) -> tuple[Float[Array, "l size"], Float[Array, "l *x"]] | None:
        """Parameters from the prior and data of the likelihood fitted to `z` and `x`.

        These are simulations of training and held out, and `standardise` is fitted to the former.
        Pairs with an `x` beyond the range of training are left out, which for a given `x` leaves
        the law of `z` as it is. `None` for more features than `max_features`, and, with a warning,
        where the likelihood has no finite density of held-out simulations or hardly any pair in
        range.
        """
        varies = jnp.flatnonzero(standardise.low < standardise.high)
        if not 0 < len(varies) <= self.max_features:
            return None
        dtype = z[0].dtype
        features = tuple(
            jax.vmap(standardise)(each).reshape(len(each), -1)[:, varies].astype(dtype)
            for each in x
        )
        init, train, draw = jax.random.split(key, 3)
        start = MixtureDensity(
            parameters.size,
            len(varies),
            num_components=self.num_components,
            width=self.width,
            depth=self.depth,
            key=init,
            dtype=dtype,
        )
        steps = num_steps if self.num_steps is None else self.num_steps
        likelihood, loss = _fit(start, features, z, train, steps)
        num = min(num_pairs, self.num_pairs)
        made = _draw(likelihood, parameters, standardise, varies, draw, num)
        z_made, x_made, inside = (np.asarray(each) for each in made)
        if np.isfinite(loss) and inside.mean() > LEAST_INSIDE:
            return jnp.asarray(z_made[inside]), jnp.asarray(x_made[inside])
        warnings.warn(
            f"the surrogate likelihood is left out: its mean log density of held-out simulations "
            f"is {-float(loss):.3g}, and {inside.mean():.0%} of its draws are in their range",
            stacklevel=3,
        )
        return None


@eqx.filter_jit
def _draw(
    likelihood: MixtureDensity,
    parameters: Parameters,
    standardise: Standardise,
    varies: Int[Array, " num_features"],
    key: Key,
    num: int,
) -> tuple[Array, Array, Array]:
    """`z` [num, size], `x` [num, *x] and whether a pair is of use, [num]."""
    low, mean = standardise.low, standardise.mean

    def one(key: Key) -> tuple[Array, Array, Array]:
        prior, data = jax.random.split(key)
        z = parameters.to_vector(parameters.sample(prior)).astype(mean.dtype)
        features = likelihood.sample(data, z)
        y = jnp.zeros(mean.size, mean.dtype).at[varies].set(features).reshape(mean.shape)
        inside = jnp.all((y >= low) & (y <= standardise.high)) & jnp.all(jnp.isfinite(z))
        return z, mean + standardise.scale * y, inside

    return jax.lax.map(one, jax.random.split(key, num), batch_size=min(num, BATCH_SIZE))


@eqx.filter_jit
def _fit(start: MixtureDensity, y: Any, z: Any, key: Key, num_steps: int) -> tuple[Any, Scalar]:
    """The likelihood of the lowest of `NUM_EVALUATIONS` held-out losses, and that loss."""
    optimiser = adamw(num_steps)
    params, static = eqx.partition(start, eqx.is_inexact_array)
    length = -(-num_steps // NUM_EVALUATIONS)

    def loss(params: Any, y: Array, z: Array) -> Scalar:
        return -jnp.mean(jax.vmap(eqx.combine(params, static).log_prob)(y, z))

    def step(carry: Any, key: Key) -> tuple[Any, None]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(z[0]))
        gradient = jax.grad(loss)(params, y[0][rows], z[0][rows])
        updates, state = optimiser.update(gradient, state, params)
        return (eqx.apply_updates(params, updates), state), None

    def round_(carry: Any, key: Key) -> tuple[Any, None]:
        at, best, lowest = carry
        at, _ = jax.lax.scan(step, at, jax.random.split(key, length))
        value = loss(at[0], y[1], z[1])
        better = value < lowest
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), at[0], best)
        return (at, best, jnp.where(better, value, lowest)), None

    carry = (params, optimiser.init(params)), params, jnp.asarray(jnp.inf, z[0].dtype)
    keys = jax.random.split(key, NUM_EVALUATIONS)
    (_, best, lowest), _ = jax.lax.scan(round_, carry, keys)
    return eqx.combine(best, static), lowest
