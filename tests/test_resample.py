"""Systematic resampling: expected offspring, weights of zero, single precision, large numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.smc.resampling import systematic as blackjax_systematic

from scoreprior.smc import systematic
from stats import require_power

GATE = 5.0


def offspring(resample, weights, num_samples, num_repeats, num_groups):
    """Offspring of random groups of particles, [repeat, group], and what it should be."""
    label = jax.random.randint(jax.random.key(0), weights.shape, 0, num_groups)

    @jax.jit
    def many(keys, weights):
        def one(key):
            chosen = resample(key, weights, num_samples)
            return jnp.zeros(num_groups, jnp.int32).at[label[chosen]].add(1)

        return jax.lax.map(one, keys)

    counts = np.asarray(many(jax.random.split(jax.random.key(1), num_repeats), weights))
    weights, label = np.asarray(weights, float), np.asarray(label)
    return counts, num_samples * np.bincount(label, weights, num_groups) / weights.sum()


def assert_law(resample, weights, num_samples, *, num_repeats, num_groups=5, bias=0.02):
    """Mean offspring are `num_samples * weights`, within five standard errors of repeats."""
    counts, expected = offspring(resample, weights, num_samples, num_repeats, num_groups)
    se = counts.std(0) / np.sqrt(num_repeats)
    rounding = 1e-6 * expected  # that of the weights themselves
    assert (np.abs(counts.mean(0) - expected) <= GATE * se + rounding).all(), "biased offspring"
    require_power(se, expected, bias=bias)


def uneven(n, dtype, spread=2.0):
    """Log-normal weights, a tenth of them zero, and the last ones too."""
    key, key_zero = jax.random.split(jax.random.key(2))
    weights = jnp.exp(spread * jax.random.normal(key, (n,)))
    weights = jnp.where(jax.random.uniform(key_zero, (n,)) < 0.1, 0.0, weights)
    weights = weights.at[-max(n // 100, 1) :].set(0.0)
    return (weights / weights.sum()).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("n", "num_samples"), [(60, 60), (1000, 300), (300, 1000)])
def test_expected_offspring(n, num_samples, dtype):
    weights = uneven(n, dtype)
    assert_law(systematic, weights, num_samples, num_repeats=4000, bias=0.06 if n == 60 else 0.02)
    # Each particle has its expectation rounded up or down.
    chosen = systematic(jax.random.key(3), weights, num_samples)
    counts = np.bincount(chosen, minlength=n)
    assert np.abs(counts - num_samples * np.asarray(weights, float)).max() < 1 + 1e-3


def test_expected_offspring_of_a_million_particles_in_single_precision():
    weights = uneven(1_000_000, jnp.float32)
    assert_law(systematic, weights, 1_000_000, num_repeats=40, num_groups=100, bias=0.01)


def flattened(key, weights, num_samples):
    """A biased resampler: weights to the power 0.98."""
    return systematic(key, weights**0.98, num_samples)


def clamped(key, weights, num_samples):
    """A biased resampler: the offset is not random."""
    ends = jnp.cumsum(weights)
    grid = jnp.arange(num_samples, dtype=weights.dtype) / num_samples
    return jnp.clip(jnp.searchsorted(ends, grid), 0, len(weights) - 1)


@pytest.mark.parametrize("biased", [flattened, clamped])
def test_the_law_catches_a_biased_resampler(biased):
    with pytest.raises(AssertionError, match="biased offspring"):
        assert_law(biased, uneven(1000, jnp.float32), 1000, num_repeats=4000)


@pytest.mark.parametrize("n", [2, 1000, 100_000])
def test_a_particle_of_weight_zero_is_never_drawn(n):
    weights = uneven(n, jnp.float32) if n > 2 else jnp.array([1.0, 0.0], jnp.float32)
    keys = jax.random.split(jax.random.key(4), 200)
    drawn = jax.jit(lambda w: jax.lax.map(lambda key: w[systematic(key, w, n)].min(), keys))
    assert drawn(weights).min() > 0


@pytest.mark.promotes_ranks
def test_the_sum_in_single_precision_draws_weights_of_zero():
    """What is guarded against: it happens to the resampler of blackjax at this size."""
    weights = uneven(1_000_000, jnp.float32, spread=0.5)
    keys = jax.random.split(jax.random.key(5), 10)

    @functools.partial(jax.jit, static_argnums=0)
    def smallest(resample, weights):
        return jax.lax.map(lambda key: weights[resample(key, weights, len(weights))].min(), keys)

    assert smallest(systematic, weights).min() > 0
    assert smallest(blackjax_systematic, weights).min() == 0


def test_indices_are_sorted_32_bit_and_complete():
    weights = jnp.full(1000, 1e-3, jnp.float32)
    chosen = systematic(jax.random.key(6), weights, 1000)
    assert chosen.dtype == jnp.int32
    np.testing.assert_array_equal(np.unique(chosen), np.arange(1000))
    assert (np.diff(chosen) >= 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_weights_need_no_normalisation(scale):
    weights = uneven(1000, jnp.float32)
    chosen = systematic(jax.random.key(7), weights, 1000)
    scaled = systematic(jax.random.key(7), weights * jnp.float32(scale), 1000)
    assert np.mean(np.asarray(chosen) != np.asarray(scaled)) < 1e-2


def test_a_single_particle_takes_all():
    weights = jnp.zeros(1000, jnp.float32).at[321].set(1.0)
    for num_samples in (1, 1000):
        chosen = systematic(jax.random.key(8), weights, num_samples)
        np.testing.assert_array_equal(chosen, np.full(num_samples, 321))
