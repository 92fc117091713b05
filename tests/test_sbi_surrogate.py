"""Likelihoods fitted to simulations, and what a posterior network gains by their draws."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from scoreprior.sbi import NPSE, Parameters, Standardise, Surrogate, amortise
from scoreprior.sbi.amortise import beside
from scoreprior.sbi.conditional import ConditionalLoss, Observed
from scoreprior.sbi.surrogate import MixtureDensity
from scoreprior.train import LogUniform
from stats import assert_mean

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(8)
SMALL = {"width": 32, "num_blocks": 2}
PRIOR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)


def untrained(num_components, num_features, size=3):
    return MixtureDensity(
        size, num_features, num_components=num_components, width=16, depth=1, key=KEY
    )


@pytest.mark.parametrize("num_components", [1, 3])
def test_the_density_is_normalised_and_that_of_the_draws(num_components):
    """In two dimensions by a sum over a grid, which has the moments of 100,000 draws."""
    law, z = untrained(num_components, 2), jnp.array([0.3, -1.0, 0.5])
    line = jnp.linspace(-15, 15, 601)
    grid = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
    masses = jnp.exp(jax.vmap(lambda y: law.log_prob(y, z))(grid)) * (line[1] - line[0]) ** 2
    np.testing.assert_allclose(masses.sum(), 1, atol=1e-6)
    draws = jax.vmap(lambda key: law.sample(key, z))(jax.random.split(KEY, 100_000))
    for power in (lambda y: y, lambda y: y**2, lambda y: y[:, :1] * y[:, 1:]):
        assert_mean(power(draws), np.asarray((masses[:, None] * power(grid)).sum(0)))


def test_a_mixture_is_fitted_and_drawn_from_as_it_is():
    """Two lines about `z`, of weights that depend on it: the pairs are those of the simulator."""
    standard = scipy.stats.norm

    def weight(z):
        return standard.cdf(2 * z)

    def simulate(rng, z):
        side = np.where(rng.random(len(z)) < weight(z), 1.0, -1.0)
        return z + 2 * side + 0.3 * rng.normal(size=len(z))

    rng = np.random.default_rng(0)
    z = rng.normal(size=8000)
    x = np.stack([simulate(rng, z), np.ones_like(z)], 1)  # the second says nothing
    z, x = jnp.asarray(z)[:, None], jnp.asarray(x)
    within, out = slice(1000, None), slice(1000)
    made = Surrogate(num_components=2, width=32).pairs(
        Parameters.of(dist.Normal(0.0, 1.0)),
        Standardise.fit(x[within]),
        (z[within], z[out]),
        (x[within], x[out]),
        num_steps=2000,
        num_pairs=100_000,
        key=KEY,
    )
    assert made is not None
    seen, (z, x) = np.asarray(x[within, 0]), map(np.asarray, made)
    assert (x[:, 1] == 1).all()
    assert 99_000 < len(x) < 100_000
    # Only the edges of what was seen are cut off.
    assert seen.min() <= x[:, 0].min()
    assert x[:, 0].max() <= seen.max()
    low, high = z[:, 0] < -0.5, z[:, 0] > 0.5
    for rows in (low, high):
        upper = x[rows, 0] > z[rows, 0]
        np.testing.assert_allclose(upper.mean(), weight(z[rows, 0]).mean(), atol=0.02)
        left = x[rows, 0] - z[rows, 0] - np.where(upper, 2.0, -2.0)
        np.testing.assert_allclose((left.mean(), left.std()), (0, 0.3), atol=0.02)


def curved(key, num):
    """A product and a square, in noise that depends on the parameters."""
    draw, noise = jax.random.split(key)
    theta = jax.random.normal(draw, (num, 2))
    mean = jnp.stack([theta.prod(1), theta[:, 0] ** 2, theta[:, 1]], 1)
    spread = 0.2 * jnp.exp(0.5 * theta[:, :1])
    return theta, mean + spread * jax.random.normal(noise, (num, 3))


def losses(simulations, tests, **settings):
    """Of denoising the parameters of `tests` [n], four noises each."""
    npse = NPSE(PRIOR, simulations, **SMALL)
    denoiser = npse.fit(key=KEY, num_steps=1500, progress=False, **settings).denoiser
    loss = ConditionalLoss(LogUniform(*denoiser.levels))

    @jax.jit
    @jax.vmap
    def one(theta, x, key):
        u, *keys = jax.random.split(key, 5)
        levels = jax.random.uniform(u, (4,), minval=0.001, maxval=0.999)
        each = [
            loss(denoiser, theta, level, Observed(x), key=k)
            for level, k in zip(levels, keys, strict=True)
        ]
        return jnp.mean(jnp.stack(each))

    return np.asarray(one(*tests, jax.random.split(KEY, len(tests[0]))))


def test_few_simulations_teach_more_by_a_likelihood_fitted_to_them():
    """By the loss of 10,000 tests; a likelihood that is not fitted leaves training as it is."""
    simulations, tests = curved(KEY, 500), curved(jax.random.fold_in(KEY, 1), 10_000)
    alone = losses(simulations, tests, surrogate=None)
    taught = losses(simulations, tests, surrogate=Surrogate(width=64))
    gain = alone - taught
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    unfitted = losses(simulations, tests, surrogate=Surrogate(width=64, num_steps=1))
    np.testing.assert_allclose(unfitted, alone)


SIDE, SLOPE, NOISE = 1.5, 0.5, 0.2


def with_two_signs(key, num):
    """`x = s (SIDE + SLOPE theta) + noise`, with a sign `s` of chance."""
    draw, sign, noise = jax.random.split(key, 3)
    theta = jax.random.normal(draw, (num, 1))
    s = jnp.where(jax.random.bernoulli(sign, 0.5, (num, 1)), 1.0, -1.0)
    return theta, s * (SIDE + SLOPE * theta) + NOISE * jax.random.normal(noise, (num, 1))


def errors_at(law, x):
    """Of a mean and a standard deviation, in units of the true one, from the law on a grid."""
    grid = np.linspace(-5, 5, 201)
    normal = scipy.stats.norm.pdf
    likelihood = sum(normal(x, s * (SIDE + SLOPE * grid), NOISE) for s in (-1, 1))

    def moments(masses):
        masses = masses / masses.sum()
        mean = masses @ grid
        return mean, np.sqrt(masses @ (grid - mean) ** 2)

    (mean, sd), (found, found_sd) = (moments(normal(grid) * p) for p in (likelihood, law(grid)))
    return max(abs(found - mean) / sd, abs(found_sd / sd - 1))


def test_simulations_alone_are_taken_where_the_likelihood_is_wrong():
    """One Gaussian does not know the sign; the posterior does."""
    theta, x = with_two_signs(KEY, 8000)
    prior = dist.Normal(jnp.zeros(1), 1.0).to_event(1)
    posterior = NPSE(prior, (theta, x), **SMALL).fit(
        key=KEY, num_steps=2000, peak=3e-3, surrogate=Surrogate(1, width=32), progress=False
    )
    for x_o in (1.0, -1.8):

        def learned(grid, x_o=x_o):
            law = posterior.condition(jnp.array([x_o]))
            log_q = jax.jit(lambda z: jax.vmap(law.log_prob)(z))(jnp.asarray(grid)[:, None])
            return np.exp(np.asarray(log_q)) / scipy.stats.norm.pdf(grid)

        def one_gaussian(grid, x_o=x_o):
            return scipy.stats.norm.pdf(x_o, 0, np.hypot(SIDE + SLOPE * grid, NOISE))

        assert errors_at(learned, x_o) < 0.15
        assert errors_at(one_gaussian, x_o) > 0.5


def weights(posterior):
    return jax.tree.leaves(eqx.filter(posterior.denoiser.net, eqx.is_array))


def same(a, b):
    return all(bool((x == y).all()) for x, y in zip(weights(a), weights(b), strict=True))


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    """In one network or the other; another key leads elsewhere."""
    npse = NPSE(PRIOR, curved(KEY, 200), **SMALL)
    path = tmp_path / "run.safetensors"
    settings = {"num_steps": 20, "batch_size": 16, "progress": False, "least_gain": -jnp.inf}
    whole = npse.fit(key=KEY, checkpoint=path, **settings)
    assert path.exists()
    assert beside(path).exists()
    assert same(whole, npse.fit(key=KEY, checkpoint=path, **settings))
    for each in (path, beside(path)):
        each.unlink()
        assert same(whole, npse.fit(key=KEY, checkpoint=path, **settings))
    assert not same(whole, npse.fit(key=jax.random.key(1), **settings))


def test_observations_of_many_values_and_useless_likelihoods_are_left_out(monkeypatch):
    """The former by a rule, the latter with a warning: training is that on simulations alone."""
    npse = NPSE(PRIOR, curved(KEY, 200), **SMALL)
    settings = {"num_steps": 20, "batch_size": 16, "progress": False, "least_gain": -jnp.inf}
    alone = npse.fit(key=KEY, surrogate=None, **settings)
    assert same(alone, npse.fit(key=KEY, surrogate=Surrogate(max_features=2), **settings))
    assert not same(alone, npse.fit(key=KEY, surrogate=Surrogate(max_features=3), **settings))
    monkeypatch.setattr("scoreprior.sbi.surrogate.LEAST_INSIDE", 1.0)
    with pytest.warns(UserWarning, match="surrogate likelihood is left out: its mean log density"):
        assert same(alone, npse.fit(key=KEY, **settings))


def test_a_second_training_that_fails_leaves_the_first(monkeypatch):
    npse = NPSE(PRIOR, curved(KEY, 200), **SMALL)
    settings = {"num_steps": 20, "batch_size": 16, "progress": False, "least_gain": -jnp.inf}
    alone = npse.fit(key=KEY, surrogate=None, **settings)
    fits = iter((amortise.fit, failing))
    monkeypatch.setattr(amortise, "fit", lambda *args, **given: next(fits)(*args, **given))
    with pytest.warns(UserWarning, match="taught by a surrogate is left out: training loss"):
        assert same(alone, npse.fit(key=KEY, **settings))


def failing(*_, **__):
    raise FloatingPointError("training loss is not finite")


@pytest.mark.parametrize("name", ["num_components", "width", "num_pairs", "num_steps"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .* got 0"):
        Surrogate(**{name: 0})
