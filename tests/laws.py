"""What every object of a kind must satisfy: one checker per noun.

Each raises `AssertionError` where a law is broken; `test_laws` plants a fault for each. Everything
runs compiled: op-by-op evaluation would spend its time on compiling single operations.
"""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def close(actual, expected, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def check_pytree(value, function):
    """`function(value)` is the same after flattening and after crossing a `jit` boundary."""
    expected = function(value)
    leaves, structure = jax.tree.flatten(value)
    close(function(jax.tree.unflatten(structure, leaves)), expected)
    close(jax.jit(function)(value), expected)


def check_denoiser(denoiser, x, sigma):
    """One event in, one out; Tweedie's score; batches and single calls agree; differentiable.

    `x` [n, *event], `n >= 2`, and `sigma > 0`.
    """
    sigma = jnp.asarray(sigma, x.dtype)
    direction, step = jnp.ones_like(x[0]), 1e-6

    @jax.jit
    def evaluate(denoiser, x, sigma):
        call = lambda event: denoiser(event, sigma)
        return {
            "single": jnp.stack([call(event) for event in x]),
            "batch": jax.vmap(denoiser, (0, None))(x, sigma),
            "levels": jax.vmap(denoiser)(x, jnp.full(len(x), sigma)),
            "score": jax.vmap(lambda event: denoiser.score(event, sigma))(x),
            "slope": jax.jvp(call, (x[0],), (direction,))[1],
            "ends": (call(x[0] + step * direction), call(x[0] - step * direction)),
        }

    out = evaluate(denoiser, x, sigma)
    assert out["single"].shape == x.shape
    assert out["single"].dtype == x.dtype
    close(out["batch"], out["single"])
    close(out["levels"], out["single"])
    close(out["score"], (out["single"] - x) / sigma**2)
    close(out["slope"], (out["ends"][0] - out["ends"][1]) / (2 * step), 1e-5, 1e-6)


def check_exact_denoiser(denoiser, x, sigma):
    """`check_denoiser`, and the score and covariance are derivatives of the known log density."""
    check_denoiser(denoiser, x, sigma)
    size = x[0].size

    @jax.jit
    def evaluate(denoiser, x, sigma):
        density = lambda event: denoiser.log_prob(event, sigma)
        return (
            jax.vmap(lambda event: denoiser.score(event, sigma))(x),
            jax.vmap(jax.grad(density))(x),
            denoiser.covariance(x[0], sigma),
            jax.hessian(density)(x[0]).reshape(size, size),
        )

    score, gradient, covariance, hessian = evaluate(denoiser, x, jnp.asarray(sigma, x.dtype))
    close(score, gradient, 1e-8)
    # Tweedie's second-order formula: Cov[X | x_t] = sigma^2 (I + sigma^2 grad grad log p).
    close(covariance, sigma**2 * (np.eye(size) + sigma**2 * hessian), 1e-8)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9


def check_guidance(guidance, denoiser, observation, x, sigma):
    """A guided denoiser is a denoiser, with the levels of its prior, and depends on the data."""
    guided = guidance(denoiser, observation)
    assert guided.level_range == denoiser.level_range
    check_denoiser(guided, x, sigma)
    check_pytree(guided, lambda g: g(x[0], sigma))
    other = eqx.tree_at(lambda g: g.observation.data, guided, observation.data + 1)
    assert np.abs(eqx.filter_jit(other)(x[0], sigma) - guided(x[0], sigma)).max() > 1e-6


def check_transform(transform, u, *, atol):
    """A NumPyro bijection: inverse, log-determinant, batching, tree round trip.

    `u` [n, *event]; `atol` is the error of the solver behind it.
    """
    size = u[0].size
    x = transform(u)
    assert x.shape == u.shape
    close(transform.inv(x), u, 0, atol)
    close(transform(u[0]), x[0])
    close(transform(u[None])[0], x)
    log_det = transform.log_abs_det_jacobian(u, x)
    assert log_det.shape == u.shape[:1]
    jacobians = jax.jit(jax.vmap(jax.jacfwd(transform)))(u).reshape(-1, size, size)
    close(log_det, jnp.linalg.slogdet(jacobians)[1], 0, atol)
    assert bool(jnp.all(transform.domain(u)))
    assert bool(jnp.all(transform.codomain(x)))
    check_pytree(transform, lambda t: t(u))
    assert transform == jax.tree.unflatten(*jax.tree.flatten(transform)[::-1])


def check_distribution(prior, key):
    """The NumPyro protocol: shapes, draws, log density, and every way of carrying it about."""
    shape = prior.event_shape
    assert prior.batch_shape == ()
    assert prior.support.event_dim == len(shape)
    x = prior.sample(key, (2, 3))
    assert x.shape == (2, 3, *shape)
    assert bool(jnp.all(prior.support(x)))
    log_prob = prior.log_prob(x)
    assert log_prob.shape == (2, 3)
    assert len(np.unique(np.asarray(log_prob))) == 6
    flat = x.reshape(6, *shape)
    close(jnp.stack([prior.log_prob(event) for event in flat]), log_prob.ravel())
    close(jax.vmap(prior.log_prob)(flat), log_prob.ravel())
    drawn, intermediates = prior.sample_with_intermediates(key, (2, 3))
    close(drawn, x)
    assert not intermediates
    check_pytree(prior, lambda p: p.log_prob(x))
    copy = pickle.loads(pickle.dumps(prior))
    close(copy.log_prob(x), log_prob)
    assert copy.event_shape == shape
    _check_batching(prior, x, log_prob)


def _check_batching(prior, x, log_prob):
    expanded = prior.expand((2, 3))
    assert expanded.batch_shape == (2, 3)
    close(expanded.log_prob(x), log_prob)
    assert len(np.unique(np.asarray(expanded.sample(jax.random.key(1))))) == x.size
    event = expanded.to_event(1)
    assert event.event_shape == (3, *prior.event_shape)
    close(event.log_prob(x), log_prob.sum(1))
    keep = jnp.array([[True, False, True], [False, True, True]])
    close(expanded.mask(keep).log_prob(x), jnp.where(keep, log_prob, 0.0))
    close(prior.mask(False).log_prob(x), jnp.zeros(()))


def check_operator(operator, key):
    """Linear, with the adjoint of the real inner product, a matrix and an SVD that agree with it.

    One image in, one out; batches and single calls agree, and so does the compiled operator after
    a tree round trip.
    """
    keys = jax.random.split(key, 3)

    def draw(key, shape, is_complex):
        parts = jax.random.normal(key, (2, *shape))
        return parts[0] + 1j * parts[1] if is_complex else parts[0]

    inner = lambda a, b: jnp.sum(a.conj() * b).real
    a, b = (draw(key, operator.shape_in, operator.complex_in) for key in keys[:2])

    @jax.jit
    def evaluate(operator, a, b):
        forward, svd = operator(a), operator.svd()
        data = draw(keys[2], forward.shape, jnp.iscomplexobj(forward))
        adjoint, s = operator.adjoint(data), svd.singular_values
        coefficients = svd.analyse(draw(keys[0], operator.shape_in, operator.complex_in))
        return {
            "single": jnp.stack([forward, operator(b)]),
            "batch": jax.vmap(operator)(jnp.stack([a, b])),
            "scaled": (operator(2.5 * a - b), 2.5 * forward - operator(b)),
            "inner": (inner(data, forward), inner(adjoint, a)),
            "batch_adjoint": (jax.vmap(operator.adjoint)(jnp.stack([data, -data])), adjoint),
            "matrix": (operator.materialise() @ a.ravel(), forward.ravel()),
            "svd": (svd.synthesise_data(s * svd.analyse(a)), forward),
            "svd_adjoint": (svd.synthesise(s * svd.analyse_data(data)), adjoint),
            "images": (svd.analyse(svd.synthesise(coefficients)), coefficients),
            "data": (svd.analyse_data(svd.synthesise_data(coefficients)), coefficients),
            "values": s,
        }

    out = evaluate(operator, a, b)
    assert out["single"][0].shape == operator.shape_out
    assert (out["values"] >= 0).all()
    close(out["batch"], out["single"])
    batch, adjoint = out["batch_adjoint"]
    close(batch, jnp.stack([adjoint, -adjoint]))
    assert adjoint.shape == operator.shape_in
    assert jnp.iscomplexobj(adjoint) == operator.complex_in
    for name in ("scaled", "inner", "matrix", "svd", "svd_adjoint", "images", "data"):
        np.testing.assert_allclose(*out[name], rtol=1e-8, atol=1e-8, err_msg=name)
    check_pytree(operator, lambda operator: operator(a))
