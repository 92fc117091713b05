"""Systematic resampling in fixed-point arithmetic: exact in single precision, for any number.

A float32 cumulative sum of a million weights is wrong by more than a weight, so searching it draws
particles of weight zero and misses others. Here only the expected offspring `e_i = n w_i` of each
particle is a float. Its fraction becomes an integer number of units of `2^-32`, and integers add up
without rounding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreprior._typing import Key

UNITS = 2.0**32


def systematic(
    rng_key: Key, weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " num_samples"]:
    """Sorted int32 indices of `num_samples` particles, drawn in proportion to `weights`.

    Systematic resampling (Carpenter, Clifford & Fearnhead 1999): with `C_i = sum_{j <= i} e_j`,
    `e_i = num_samples w_i / sum(w)` and one uniform `U`, particle `i` has
    `floor(C_i + U) - floor(C_{i-1} + U)` offspring, whose expectation is `e_i` and which differ
    from it by less than 1. A particle of weight zero is never drawn.

    `weights` are non-negative with a positive finite sum, normalised or not. The signature is that
    of blackjax's `resampling_fn`.
    """
    key_offset, key_slot = jax.random.split(rng_key)
    expected = weights * (num_samples / jnp.sum(weights))
    whole = jnp.floor(expected)
    fraction = ((expected - whole) * UNITS).astype(jnp.uint32)
    # Unsigned sums wrap at 2^32, and every wrap is one integer passed.
    after = jnp.cumsum(fraction, dtype=jnp.uint32) + jax.random.bits(key_offset, (), jnp.uint32)
    before = after - fraction
    counts = whole.astype(jnp.int32) + (after < before)
    counts = counts.at[jnp.argmax(weights)].add(jnp.sum(counts) == 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    # The rounding of e_i may leave one particle too many or too few: which one is left out, or
    # taken twice, is uniform among those drawn.
    surplus = (ends[-1] - num_samples).astype(weights.dtype)
    slot = jnp.arange(num_samples, dtype=jnp.int32)
    start = jax.random.uniform(key_slot, (), weights.dtype)
    shift = jnp.floor(start + slot.astype(weights.dtype) * (surplus / num_samples))
    rank = jnp.clip(slot + shift.astype(jnp.int32), 0, ends[-1] - 1)
    return jnp.searchsorted(ends, rank, side="right").astype(jnp.int32)
