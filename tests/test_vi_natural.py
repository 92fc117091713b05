"""Natural gradients of a normal guide: exact where the posterior is normal, curved where not."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
from oracles import A_M, COV_M, GAUSSIAN, MIXTURE, Y_M
from scoreprior import compose
from scoreprior.flow import FixedGrid, Flow
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.vi import ELBO, IWELBO, VI, FullRank, MeanField, NaturalGradient
from scoreprior.vi.frame import start
from scoreprior.vi.natural import _curvature, _Normal

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(5)
A, Y, SD = jnp.array([[1.0, 0.0]]), jnp.array([1.5]), 0.3


def build(denoiser, num_steps=1):
    return ScorePrior(
        Flow(denoiser, denoiser.moments(), sigma_min=0.1, solver=FixedGrid(num_steps))
    )


PRIOR, CURVED = build(GAUSSIAN), build(MIXTURE, 12)


def engine(num_steps=20, **options):
    return VI(FullRank(), num_steps, optimizer=NaturalGradient(**options))


def test_a_gaussian_posterior_is_found_in_few_steps():
    def model(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(A @ x, SD).to_event(1), obs=y)

    fitted = engine(60).fit(Problem.from_model(model, Y), KEY, progress=False)
    law = oracles.at_level(GAUSSIAN, 0.1)
    cov_y = jnp.eye(1) * SD**2
    truth = float(law.log_evidence(A, Y, cov_y))
    bounds = np.asarray(fitted.history)
    assert bounds[0] < truth - 1
    np.testing.assert_allclose(bounds[5:], truth, atol=0.05)
    np.testing.assert_allclose(bounds[50:], truth, atol=1e-3)
    # Through the affine map that the flow of a Gaussian is, the guide is the exact posterior.
    exact = law.posterior(A, Y, cov_y)
    normal = _Normal.of(fitted.params)
    slope = jax.jacfwd(PRIOR.flow.to_data)(normal.loc) @ normal.root
    np.testing.assert_allclose(PRIOR.flow.to_data(normal.loc), exact.law.mean, atol=2e-3)
    np.testing.assert_allclose(slope @ slope.T, exact.law.covariance(), rtol=5e-3)


def unknown_noise(y):
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    x = numpyro.sample("x", CURVED)
    numpyro.sample("y", dist.Normal(A_M @ x, scale).to_event(1), obs=y)


@pytest.mark.parametrize("is_near", [True, False], ids=["near the data", "far from them"])
def test_the_curvature_is_that_of_gauss_and_newton(is_near):
    """By hand: Hessians of the data and of the other site, in `x` and `log scale`."""
    problem = Problem.from_model(unknown_noise, Y_M)
    frame, _ = start(problem, KEY)
    root = jnp.array([[0.5, 0.0, 0.0], [0.2, 0.8, 0.0], [-0.1, 0.3, 0.4]])
    normal, e = _Normal(jnp.array([0.3, -0.2, 0.5]), root), jnp.array([0.4, -1.0, 0.2])
    position = frame.position(normal.loc + root @ e)
    x, scale = CURVED.flow.to_data(position["x"]), jnp.exp(position["scale"])
    # Residuals beyond the root of two bend the other way.
    residual = (0.5 if is_near else 3.0) * scale * jnp.array([1.0, -1.0])
    problem, precision = Problem.from_model(unknown_noise, A_M @ x + residual), 1 / scale**2
    given = jnp.zeros((3, 3))  # the sites by name: scale, x
    given = given.at[0, 0].set(2 * precision * residual @ residual + 1 / 0.5**2)
    given = given.at[1:, 1:].set(precision * A_M.T @ A_M)
    cross = 2 * precision * A_M.T @ residual
    given = given.at[0, 1:].set(cross).at[1:, 0].set(cross)
    values, axes = np.linalg.eigh(given)
    given = (axes * np.maximum(values, 0)) @ axes.T
    assert is_near == (values > 0).all()
    jacobian = jnp.eye(3).at[1:, 1:].set(jax.jacfwd(CURVED.flow.to_data)(position["x"]))
    expected = jacobian.T @ given @ jacobian + jnp.diag(jnp.array([0.0, 1.0, 1.0]))
    units = frame.scale[:, None] * root
    found = _curvature(problem, frame, normal, e)
    np.testing.assert_allclose(found, units.T @ expected @ units, rtol=1e-7, atol=1e-9)


def test_a_prior_of_positive_numbers_is_curved_in_their_logarithms():
    """`exp(x)` seen as `exp(A x)` times log-normal noise: the same problem in other words."""

    def plain(y):
        x = numpyro.sample("x", CURVED)
        numpyro.sample("y", dist.MultivariateNormal(A_M @ x, COV_M), obs=y)

    def positive(y):
        exp = dist.transforms.ExpTransform()
        x = numpyro.sample("x", dist.TransformedDistribution(CURVED, [exp]))
        numpyro.sample("y", dist.MultivariateNormal(A_M @ jnp.log(x), COV_M), obs=y)

    normal, e = _Normal(jnp.array([0.3, -0.2]), 0.5 * jnp.eye(2)), jnp.array([0.4, -1.0])
    found, expected = (
        _curvature(problem, start(problem, KEY)[0], normal, e)
        for problem in (Problem.from_model(model, Y_M) for model in (positive, plain))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@functools.cache
def bent():
    def model(y):
        x = numpyro.sample("x", CURVED)
        numpyro.sample("y", dist.MultivariateNormal(A_M @ x, COV_M), obs=y)

    return Problem.from_model(model, Y_M)


def test_the_mean_ends_where_the_gradient_vanishes():
    """The mean of the gradient over the guide, beside that of one moved by 5 % of its width."""
    problem = bent()
    # The last of so many draws a step that the mean hardly wanders.
    many = VI(FullRank(), 200, bound=ELBO(200), optimizer=NaturalGradient())
    fitted = many.fit(problem, KEY, progress=False)
    normal = _Normal.of(fitted.params)
    noise = jax.random.normal(jax.random.key(1), (40_000, 2))
    noise = jnp.concatenate([noise, -noise], 1).reshape(-1, 2)

    @jax.jit
    def gradients(loc):
        log_density = lambda e: problem.log_density(fitted.frame.position(loc + normal.root @ e))
        pairs = jax.lax.map(jax.grad(log_density), noise, batch_size=4000)
        return pairs.reshape(-1, 2, 2).mean(1)

    def length(loc):
        found = np.asarray(gradients(loc))
        errors = found.std(0) / np.sqrt(len(found))
        assert errors.max() < 0.002
        return np.linalg.norm(found.mean(0))

    # Rates that fall like one over the steps leave the mean a hundredth of a width from its end.
    assert length(normal.loc) < 0.02
    assert length(normal.loc + 0.05 * normal.root[:, 0]) > 0.04


def test_as_high_a_bound_as_adam_reaches():
    evidence = oracles.at_level(MIXTURE, 0.1).log_evidence(A_M, Y_M, COV_M)
    natural = engine(60).run(bent(), KEY, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "k-hat is")
        adam = VI(FullRank(), 1500).run(bent(), KEY, progress=False)
    found, reached = (float(run.extra["elbo"][1]) for run in (natural, adam))
    errors = np.hypot(*(float(run.extra["elbo_se"][1]) for run in (natural, adam)))
    assert found >= reached - 5 * errors - 0.01
    assert found <= float(evidence) + 5 * errors
    assert errors < 0.02


def test_a_resumed_fit_is_the_same_bit_for_bit(tmp_path):
    whole = engine().fit(bent(), KEY, progress=False)
    chunks = VI(FullRank(), 20, optimizer=NaturalGradient(), chunk_size=7)
    parts = chunks.fit(bent(), KEY, progress=False, checkpoint=tmp_path / "run")
    again = chunks.fit(bent(), KEY, progress=False, checkpoint=tmp_path / "run")
    for fitted in (parts, again):
        for mine, theirs in zip(
            jax.tree.leaves(fitted.params), jax.tree.leaves(whole.params), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    other = VI(FullRank(), 20, optimizer=NaturalGradient(decay=2.0), chunk_size=7)
    with pytest.raises(ValueError, match="optimizer"):
        other.fit(bent(), KEY, progress=False, checkpoint=tmp_path / "run")


def test_steps_through_a_density_that_is_not_finite_are_reported():
    def model(y):
        x = numpyro.sample("x", CURVED)
        numpyro.sample("y", dist.Normal(A_M @ x, 1.0).to_event(1), obs=y)
        numpyro.factor("wall", jnp.where(x[0] > 2.5, jnp.nan, 4 * x[0]))

    problem = Problem.from_model(model, Y_M)
    with pytest.warns(UserWarning, match="steps were skipped because the bound or its gradient"):
        fitted = engine(30).fit(problem, KEY, progress=False)
    assert np.isfinite(_Normal.of(fitted.params).root).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: VI(MeanField(), optimizer=NaturalGradient()),
            r"guide must be FullRank\(\) for a NaturalGradient, got MeanField",
        ),
        (
            lambda: VI(FullRank(), bound=IWELBO(8), optimizer=NaturalGradient()),
            "bound must be an ELBO of an even number of particles .* got IWELBO",
        ),
        (
            lambda: VI(FullRank(), bound=ELBO(7), optimizer=NaturalGradient()),
            r"even number of particles .* got ELBO\(num_particles=7\)",
        ),
        (
            lambda: VI(FullRank(), optimizer=NaturalGradient(9)),
            "num_curvatures must be at most the 8 particles of the bound, got 9",
        ),
        (
            lambda: VI(FullRank(), optimizer=NaturalGradient(), centred=True),
            "centred must be False for a NaturalGradient, got True",
        ),
        (lambda: NaturalGradient(0), "num_curvatures must be at least 1, got 0"),
        (lambda: NaturalGradient(decay=0.0), "decay must be a positive finite number, got 0.0"),
        (
            lambda: engine().fit(bent().centred(), KEY, progress=False),
            "problem must be in the non-centred form for a NaturalGradient",
        ),
    ],
)
def test_bad_settings(as_user, make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_composition_has_no_standard_noise(as_user):
    def model(y):
        x = numpyro.sample("x", compose({CURVED: 2.0}))
        numpyro.sample("y", dist.Normal(A_M @ x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="prior site 'x' is a Composition, whose noise is not"):
        engine().fit(Problem.from_model(model, Y_M), KEY, progress=False)
