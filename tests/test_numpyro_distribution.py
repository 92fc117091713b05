"""The prior as a NumPyro distribution: protocol, gradients, compositions, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints, transforms

from laws import (
    check_denoiser,
    check_distribution,
    check_exact_denoiser,
    check_pytree,
    check_transform,
    close,
)
from priors import (
    COARSE,
    PRIORS,
    SCORE,
    build,
    draws,
    gradient,
    log_prob,
    log_probs,
    mixture,
    score,
    stretched,
)
from scoreprior.denoise import Empirical, Gaussian
from scoreprior.density import BoundDensity, FlowDensity, Hutchinson, ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior

KEY = jax.random.key(0)


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]


@pytest.mark.parametrize("name", PRIORS)
def test_laws_of_the_denoisers(name):
    check = check_denoiser if name == "network" else check_exact_denoiser
    check(PRIORS[name].flow.denoiser, draws(PRIORS[name], 2), 0.5)


def test_laws_of_the_distribution(prior):
    check_distribution(prior, KEY)


@pytest.mark.parametrize("density", [SCORE, BoundDensity(4)])
def test_laws_of_the_distribution_under_other_policies(density):
    check_distribution(PRIORS["exact"].with_density(density), KEY)


@pytest.mark.parametrize("shape", [(), (1,), (1, 2, 1)])
def test_laws_hold_for_events_of_any_rank(shape):
    moments = Moments(jnp.full(shape, 0.3), jnp.full(shape, 2.0))
    prior = ScorePrior(Flow(Gaussian(moments), moments, sigma_min=0.1, solver=COARSE))
    check_distribution(prior, KEY)
    x = draws(prior, 2)
    expected = dist.Normal(0.3, jnp.sqrt(2.01)).log_prob(x).reshape(2, -1).sum(1)
    close(prior.log_prob(x), expected)


def test_laws_of_the_transform(prior):
    fine = build(prior.flow.denoiser, solver=FixedGrid(24))
    check_transform(fine.transforms[0], jax.random.normal(KEY, (2, *prior.event_shape)), atol=1e-3)


@pytest.mark.parametrize(
    "density", [FlowDensity(), SCORE, FlowDensity(Hutchinson(2), SCORE.gradient)]
)
def test_value_and_gradient_follow_the_policy(prior, density):
    x = draws(prior, 1)[0]
    policed = prior.with_density(density)
    value, reverse = jax.jit(jax.value_and_grad(policed.log_prob))(x)
    close(value, log_prob(policed, x))
    assert not np.allclose(score(prior, x), gradient(prior, x), rtol=1e-3)
    close(reverse, gradient(prior, x) if density.gradient is None else score(prior, x))
    close(jax.jit(jax.jacfwd(policed.log_prob))(x), reverse)
    twice = jax.jit(jax.grad(lambda e: policed.expand((2,)).log_prob(jnp.stack([e, e])).sum()))
    close(twice(x), 2 * reverse)


def test_hessian_follows_the_policy(prior):
    x = draws(prior, 1)[0]
    scored = prior.with_density(SCORE)
    of_score = jax.jit(jax.jacfwd(lambda e: score(prior, e)))(x)
    close(jax.jit(jax.hessian(scored.log_prob))(x), of_score)
    through_solver = jax.jit(jax.hessian(prior.log_prob))(x)
    step = 1e-5
    rows = [
        (gradient(prior, x + step * e) - gradient(prior, x - step * e)) / (2 * step)
        for e in jnp.eye(x.size).reshape(-1, *x.shape)
    ]
    close(through_solver, jnp.stack(rows).reshape(*x.shape, *x.shape), 1e-6, 1e-6)
    assert not np.allclose(through_solver, of_score, rtol=1e-2)


def test_parameters_are_differentiated_through_the_solver(prior):
    """Under `ScoreGradient` too, in reverse and forward mode, next to the score for the point."""
    x = draws(prior, 1)[0]
    arrays, static = eqx.partition(prior.flow, eqx.is_inexact_array)

    def total(arrays, x):
        return ScorePrior(eqx.combine(arrays, static), SCORE).log_prob(x)

    through_solver = lambda a: FlowDensity().log_prob(eqx.combine(a, static), x)
    by_hand = jax.jit(jax.grad(through_solver))(arrays)
    for_params, for_x = jax.jit(jax.grad(total, (0, 1)))(arrays, x)
    jax.tree.map(lambda a, b: close(a, b, 1e-7, 1e-9), for_params, by_hand)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(for_params)) > 1e-2
    close(for_x, score(prior, x))
    tangent = jax.tree.map(jnp.ones_like, (arrays, x))
    along = jax.jit(lambda a, x, t: jax.jvp(total, (a, x), t)[1])(arrays, x, tangent)
    parts = [leaf.sum() for leaf in jax.tree.leaves((for_params, for_x))]
    close(along, sum(parts), 1e-7)


def loops(function, *args):
    return jax.jit(function).lower(*args).compile().as_text().count(" while(")


def test_a_gradient_by_score_compiles_without_a_solve(prior):
    x = draws(prior, 1)[0]
    scored = prior.with_density(SCORE)
    assert loops(jax.grad(scored.log_prob), x) == 0
    assert loops(scored.log_prob, x) == 1
    assert loops(jax.value_and_grad(scored.log_prob), x) == 1
    assert loops(jax.grad(prior.log_prob), x) > 1
    assert loops(lambda u: prior.transforms[0](u), x) == 1


def compilations(caplog, function):
    caplog.clear()
    with jax.log_compiles():
        jax.block_until_ready(function())
    return sum("Compiling" in record.getMessage() for record in caplog.records)


def test_eager_calls_do_not_recompile(prior, caplog):
    x = draws(prior, 6)
    prior.log_prob(x[0]), prior.sample(KEY), prior.log_prob(x[:5])
    assert compilations(caplog, lambda: prior.log_prob(x[1])) == 0
    assert compilations(caplog, lambda: prior.sample(jax.random.key(4))) == 0
    # Nor do copies, priors built anew from equal parts, or other parameters.
    copy = jax.tree.unflatten(*jax.tree.flatten(prior)[::-1])
    rebuilt = ScorePrior(prior.flow, prior.density)
    other = stretched(prior, 1.01)
    for same in (copy, rebuilt, other):
        assert compilations(caplog, lambda same=same: same.log_prob(x[2])) == 0
    assert float(other.log_prob(x[2])) != float(prior.log_prob(x[2]))
    # The count sees a compilation where there is one.
    assert compilations(caplog, lambda: prior.log_prob(x[:5, None])) > 0


def test_a_point_does_not_see_its_neighbours(prior):
    x = draws(prior, 4)
    others = x.at[1:].multiply(3.0)
    assert prior.log_prob(x)[0] == prior.log_prob(others)[0]
    assert prior.log_prob(x)[1] != prior.log_prob(others)[1]


def test_vmap_over_priors(prior):
    """Stacked parameters give stacked densities: an ensemble."""
    x = draws(prior, 1)[0]
    arrays, static = eqx.partition(prior.flow, eqx.is_inexact_array)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 1.1 * a]), arrays)
    one = lambda a: ScorePrior(eqx.combine(a, static)).log_prob(x)
    by_hand = [one(jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(2)]
    close(jax.vmap(one)(stacked), jnp.stack(by_hand))


def test_repr_names_the_parts(prior):
    text = repr(prior)
    assert type(prior.flow.denoiser).__name__ in text
    assert str(prior.event_shape) in text
    assert "sigma_min=0.1" in text


# Compositions


@pytest.mark.promotes_ranks
def test_mixtures_of_priors(prior):
    other = stretched(prior, 1.2)
    probs = jnp.array([0.3, 0.7])
    x = draws(prior, 3)
    mixture = dist.MixtureGeneral(dist.Categorical(probs), [prior, other])
    parts = jnp.stack([log_probs(prior, x), log_probs(other, x)])
    close(mixture.log_prob(x), jax.scipy.special.logsumexp(parts, 0, probs[:, None]))
    assert mixture.sample(KEY, (5,)).shape == (5, *prior.event_shape)
    same = dist.MixtureSameFamily(dist.Categorical(probs), prior.expand((2,)))
    close(same.log_prob(x), log_probs(prior, x))
    assert same.event_shape == prior.event_shape


TRANSFORMS = {
    "exp": (transforms.ExpTransform(), constraints.positive),
    "affine": (transforms.AffineTransform(2.0, 3.0), constraints.real),
}


@pytest.mark.parametrize(
    ("name", "density"), [("exp", FlowDensity()), ("exp", SCORE), ("affine", SCORE)]
)
def test_transformed_prior(prior, name, density):
    """Change of variables by hand, with the value and the gradient of the policy."""
    transform, support = TRANSFORMS[name]
    policed = prior.with_density(density)
    law = dist.TransformedDistribution(policed, transform)
    x = draws(prior, 2)
    v = transform(x)

    def by_hand(v):
        x = transform.inv(v)
        return log_prob(policed, x) - transform.log_abs_det_jacobian(x, v).sum()

    close(law.log_prob(v), jnp.stack([by_hand(row) for row in v]), 1e-8)
    close(jax.jit(jax.grad(law.log_prob))(v[0]), jax.jit(jax.grad(by_hand))(v[0]), 1e-7, 1e-8)
    assert law.support == constraints.independent(support, len(prior.event_shape))
    drawn = law.sample(KEY, (3,))
    close(transform.inv(drawn), prior.sample(KEY, (3,)), 1e-7)
    assert bool(jnp.all(law.support(drawn)))
    check_pytree(law, lambda law: law.log_prob(v))


# Precision


def in_float32(prior):
    single = jax.tree.map(lambda a: a.astype(jnp.float32), prior.flow)
    return ScorePrior(single, prior.density)


def check_precision(prior):
    single, x = in_float32(prior), draws(prior, 2)
    narrow = x.astype(jnp.float32)
    assert single.log_prob(narrow).dtype == jnp.float32
    assert single.log_prob(x).dtype == jnp.float64
    assert prior.log_prob(narrow).dtype == jnp.float64
    close(single.log_prob(narrow), prior.log_prob(x), 1e-4, 1e-4)
    close(single.log_prob(x), prior.log_prob(x), 1e-5, 1e-5)
    assert single.transforms[0](narrow).dtype == jnp.float32
    # As any NumPyro distribution, it draws in the default precision.
    assert single.sample(KEY).dtype == dist.Normal(jnp.float32(0)).sample(KEY).dtype
    slope = jax.jit(jax.grad(single.log_prob))(narrow[0])
    assert slope.dtype == jnp.float32
    close(slope, gradient(prior, x[0]), 1e-4, 1e-4)


def test_float32_prior_in_double_precision_mode(prior):
    check_precision(prior.with_density(SCORE))


@pytest.mark.parametrize("density", [FlowDensity(), FlowDensity(Hutchinson(2))])
def test_float32_prior_under_other_policies(density):
    check_precision(PRIORS["exact"].with_density(density))


# Errors


def test_wrong_event_shape_is_named(prior):
    shape = prior.event_shape
    for wrong in ((3,) * len(shape), (*shape[:-1], shape[-1] * 2), (1, *shape[:-1], 1)):
        for call in (prior.log_prob, jax.jit(prior.log_prob), prior.transforms[0]):
            with pytest.raises(ValueError, match=r"must have shape \(\.\.\., .*2\), got"):
                call(jnp.zeros(wrong))


def test_validated_arguments(prior):
    checked = ScorePrior(prior.flow, validate_args=True)
    x = draws(prior, 1)[0]
    close(checked.log_prob(x), log_prob(prior, x))
    with pytest.warns(UserWarning, match="Out-of-support"):
        checked.log_prob(x.at[(0,) * x.ndim].set(jnp.nan))
    with pytest.raises(ValueError, match="must have shape"):
        checked.log_prob(jnp.concatenate([x, x], -1))
    assert checked.with_density(SCORE)._validate_args


def test_score_only_raises_and_still_draws(prior):
    silent = prior.with_density(ScoreOnly())
    close(silent.sample(KEY), prior.sample(KEY))
    x = draws(prior, 1)[0]
    close(silent.score(x, 0.3), score(prior, x))
    with pytest.raises(NotImplementedError, match="non-centred"):
        silent.log_prob(x)
    with pytest.raises(NotImplementedError, match="non-centred"):
        dist.TransformedDistribution(silent, transforms.ExpTransform()).log_prob(jnp.exp(x))


def test_bad_arguments_are_named(as_user):
    flow = PRIORS["exact"].flow
    with pytest.raises(TypeError, match="flow must be a scoreprior.Flow"):
        ScorePrior(mixture())
    with pytest.raises(TypeError, match="density must be a density policy"):
        ScorePrior(flow, "exact")
    with pytest.raises(NotImplementedError, match="shapes from its flow"):
        ScorePrior.infer_shapes()


# Consistency


def test_consistency_is_the_relative_distance_of_score_and_gradient(prior):
    x = draws(prior, 3)
    flow = jnp.stack([gradient(prior, e) for e in x])
    by_score = jnp.stack([score(prior, e) for e in x])
    norm = lambda v: jnp.sqrt(jnp.sum(v.reshape(3, -1) ** 2, 1))
    expected = norm(by_score - flow) / norm(flow)
    scored = prior.with_density(SCORE)
    close(scored.check_consistency(x, warn_above=jnp.inf), expected)
    close(prior.check_consistency(x, 0.3, warn_above=jnp.inf), expected)
    with pytest.warns(UserWarning, match=r"score at sigma = 0\.3 differs"):
        scored.check_consistency(x, warn_above=float(expected.min()) / 2)


def test_consistency_is_measured_at_the_level_of_a_default_score_gradient(prior):
    x = draws(prior, 2)
    default = prior.check_consistency(x, warn_above=jnp.inf)
    close(default, prior.check_consistency(x, 1.25 * prior.sigma_min, warn_above=jnp.inf))


def test_standard_errors_are_those_of_the_policy(prior):
    policy, x = FlowDensity(Hutchinson(3)), draws(prior, 2)
    expected = [policy.standard_error(prior.flow, e) for e in x]
    close(prior.with_density(policy).standard_error(x), expected)
    with pytest.raises(TypeError, match=r"standard_error needs a FlowDensity, got ScoreOnly"):
        prior.with_density(ScoreOnly()).standard_error(x)


def test_exact_score_is_consistent_on_a_fine_grid():
    """At `sigma_min`, where the score of the exact denoiser is the gradient of the density."""
    fine = build(mixture(), solver=FixedGrid(24))
    assert float(jnp.max(fine.check_consistency(draws(PRIORS["exact"], 3), 0.1))) < 0.02


def test_a_tiny_data_set_is_its_own_prior():
    """The empirical prior of one point is a Gaussian: every number in closed form."""
    point = Empirical(jnp.array([[1.0, -2.0]]), 0.5)
    flow = Flow(point, point.moments(), sigma_min=0.1, sigma_max=20.0, solver=COARSE)
    x = jnp.array([0.3, 0.4])
    expected = dist.Normal(point.data[0], jnp.sqrt(0.26)).log_prob(x).sum()
    close(ScorePrior(flow).log_prob(x), expected)
