"""What every object of a kind must satisfy: one checker per noun.

Each raises `AssertionError` where a law is broken; `test_laws` plants a fault for each.
"""

import pickle

import jax
import jax.numpy as jnp
import numpy as np


def close(actual, expected, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def check_pytree(value, function):
    """`function(value)` survives flattening and crossing a `jit` boundary."""
    leaves, structure = jax.tree.flatten(value)
    expected = function(value)
    close(function(jax.tree.unflatten(structure, leaves)), expected)
    close(jax.jit(function)(value), expected)


def check_denoiser(denoiser, x, sigma):
    """One event in, one out; Tweedie's score; `jit`, `vmap` and single calls agree.

    `x` [n, *event], `n >= 2`, and `sigma > 0`.
    """
    sigma = jnp.asarray(sigma, x.dtype)
    outputs = jnp.stack([denoiser(event, sigma) for event in x])
    assert outputs.shape == x.shape
    assert outputs.dtype == x.dtype
    close(jax.vmap(denoiser, (0, None))(x, sigma), outputs)
    close(jax.vmap(denoiser)(x, jnp.full(len(x), sigma)), outputs)
    close(jnp.stack([denoiser.score(event, sigma) for event in x]), (outputs - x) / sigma**2)
    # Two events do not see one another, and the map is differentiable in the event.
    close(jax.vmap(denoiser, (0, None))(x[:1], sigma)[0], outputs[0])
    step = 1e-6
    direction = jnp.ones_like(x[0])
    slope = (
        denoiser(x[0] + step * direction, sigma) - denoiser(x[0] - step * direction, sigma)
    ) / (2 * step)
    close(jax.jvp(lambda e: denoiser(e, sigma), (x[0],), (direction,))[1], slope, 1e-5, 1e-6)
    check_pytree(denoiser, lambda d: d(x[0], sigma))


def check_exact_denoiser(denoiser, x, sigma):
    """`check_denoiser`, and the score and covariance are derivatives of the known log density."""
    check_denoiser(denoiser, x, sigma)
    gradient = jax.vmap(jax.grad(lambda e: denoiser.log_prob(e, sigma)))(x)
    close(jax.vmap(lambda e: denoiser.score(e, sigma))(x), gradient, 1e-8, 1e-9)
    size = x[0].size
    hessian = jax.hessian(lambda e: denoiser.log_prob(e, sigma))(x[0]).reshape(size, size)
    # Tweedie's second-order formula: Cov[X | x_t] = sigma^2 (I + sigma^2 grad grad log p).
    covariance = sigma**2 * (np.eye(size) + sigma**2 * hessian)
    close(denoiser.covariance(x[0], sigma), covariance, 1e-8, 1e-9)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9


def check_transform(transform, u, *, atol):
    """A NumPyro bijection: inverse, log-determinant, batching, tree round trip.

    `u` [n, *event]; `atol` is the error of the solver behind it.
    """
    x = transform(u)
    assert x.shape == u.shape
    close(transform.inv(x), u, 0, atol)
    close(transform(u[0]), x[0])
    close(transform(u.reshape(1, *u.shape))[0], x)
    log_det = transform.log_abs_det_jacobian(u, x)
    assert log_det.shape == u.shape[:1]
    size = u[0].size
    jacobians = jax.vmap(jax.jacfwd(transform))(u).reshape(-1, size, size)
    close(log_det, jnp.linalg.slogdet(jacobians)[1], 0, atol)
    assert bool(jnp.all(transform.domain(u)))
    assert bool(jnp.all(transform.codomain(x)))
    check_pytree(transform, lambda t: t(u))
    assert transform == jax.tree.unflatten(*jax.tree.flatten(transform)[::-1])


def check_distribution(prior, key):
    """The NumPyro protocol: shapes, draws, log density, and every way of carrying it about."""
    shape, axes = prior.event_shape, len(prior.event_shape)
    assert prior.batch_shape == ()
    assert prior.support.event_dim == axes
    x = prior.sample(key, (2, 3))
    assert x.shape == (2, 3, *shape)
    assert bool(jnp.all(prior.support(x)))
    close(prior.sample(key, (2, 3)), x)
    log_prob = prior.log_prob(x)
    assert log_prob.shape == (2, 3)
    assert len(np.unique(np.asarray(log_prob))) == 6
    flat = x.reshape(6, *shape)
    close(jnp.stack([prior.log_prob(event) for event in flat]), log_prob.ravel())
    close(jax.vmap(prior.log_prob)(flat), log_prob.ravel())
    drawn, intermediates = prior.sample_with_intermediates(key, (2, 3))
    close(drawn, x)
    assert not intermediates
    assert prior(rng_key=key).shape == shape
    check_pytree(prior, lambda p: p.log_prob(x))
    check_pytree(prior, lambda p: p.sample(key))
    _check_batching(prior, x, log_prob)
    copy = pickle.loads(pickle.dumps(prior))
    close(copy.log_prob(x), log_prob)
    assert copy.event_shape == shape


def _check_batching(prior, x, log_prob):
    expanded = prior.expand((2, 3))
    assert expanded.batch_shape == (2, 3)
    close(expanded.log_prob(x), log_prob)
    assert len(np.unique(np.asarray(expanded.sample(jax.random.key(1))))) == x.size
    event = expanded.to_event(1)
    assert event.event_shape == (3, *prior.event_shape)
    close(event.log_prob(x), log_prob.sum(1))
    keep = jnp.array([True, False, True])
    close(prior.expand((3,)).mask(keep).log_prob(x), jnp.where(keep, log_prob, 0.0))
    close(prior.mask(False).log_prob(x), jnp.zeros(()))
