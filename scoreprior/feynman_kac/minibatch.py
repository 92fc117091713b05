"""Products of very many factors: a few of them at every step, without bias in the weights.

With factors `q_i` to the power one, `i = 1 ... n`, and Gaussians `G_i` about them, let `e_i` be the
differences of their scores and `a` the score of everything else, of which the product of all `G_i`
is a part. A set `B` of `M` factors, new at every level, gives

    S = a + n/M sum_B e_i,
    |a + sum_i e_i|^2 ~ |a|^2 + 2 n/M a . sum_B e_i + n/M sum_B |e_i|^2
                        + n (n-1) / (M (M-1)) sum_{i != j in B} e_i . e_j,

the latter without bias, and so the rate of the log weight. Where factors are near their Gaussians,
what is left to chance is small. The noise of `S` in the move and of the rate in the exponent leaves
an error of first order in the steps. All particles of a cloud see the same batches, whose chance
their spread does not show: the batches of every group of `FeynmanKac` are its own, and the spread
of the groups does.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior._stack import Stack
from scoreprior._typing import Event, Key, Scalar
from scoreprior.feynman_kac.composed import Composed, Factor, sum_over


class MiniBatched(Composed):
    """A product of which `_sum` sees `rest`, and `batch_size` of the `pairs`.

    `pairs` are the factors, and the Gaussians about them, to the powers 1 and -1; `stacks`, as ever
    all factors, are looked at only once, for the first cloud. `seed` decides on the batches.
    """

    pairs: tuple[Stack[Factor], Stack[Factor]] = eqx.field(kw_only=True)
    rest: tuple[Stack[Factor], ...] = eqx.field(kw_only=True)
    num_in_batch: int = eqx.field(static=True, kw_only=True)
    seed: Key = eqx.field(kw_only=True)

    def seeded(self, key: Key) -> "MiniBatched":
        return dataclasses.replace(self, seed=key)

    def _sum(self, x: Event, r: Scalar) -> tuple[Event, Scalar]:
        """An estimate of `S`, and the number that makes the rate of `Scores` unbiased with it."""

        def term(factor: Factor) -> tuple[Event, Scalar]:
            score = factor.score(x, r)
            return factor.exponent * score, factor.exponent * jnp.sum(score**2)

        n, m = self.pairs[0].size, self.num_in_batch
        batch = jax.random.choice(level_key(self.seed, r), n, (m,), replace=False)
        scores, gaussian = (stack.take(batch).map(lambda f: f.score(x, r)) for stack in self.pairs)
        gains = scores - gaussian
        others, squares = sum_over(self.rest, term)
        squares = squares + n / m * (jnp.sum(scores**2) - jnp.sum(gaussian**2))
        total, own = jnp.sum(gains, 0), jnp.sum(gains**2)
        mixed = n * (n - 1) / (m * (m - 1)) * (jnp.sum(total**2) - own)
        square = jnp.sum(others**2) + 2 * n / m * jnp.sum(others * total) + n / m * own + mixed
        S = others + n / m * total
        return S, squares + jnp.sum(S**2) - square

    def _sum_with_energy(self, x: Event, r: Scalar) -> Any:
        raise NotImplementedError("mini-batches have no energy")


def level_key(seed: Key, sigma: Scalar) -> Key:
    """A key for each noise level, the same for all events there."""
    bits = jax.lax.bitcast_convert_type(sigma.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(seed, bits)


__all__ = ["MiniBatched", "level_key"]
