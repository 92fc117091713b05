"""Priors as bijections of a standard normal, against SciPy and their own densities."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from numpyro.distributions import transforms

from laws import check_transform
from scoreprior.denoise import BlurredUniform
from scoreprior.sbi import ProbabilityIntegral, SoftUniform, gaussianise
from scoreprior.sbi.soft import BLUR, HALF
from scoreprior.sbi.transforms import soften
from stats import assert_cov, assert_mean

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(29)
FACTOR = jnp.array([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 0.5]])
DENSE = dist.MultivariateNormal(jnp.arange(3.0), FACTOR @ FACTOR.T)

# With SciPy's own quantiles, where it has the law.
SCALARS = {
    "normal": (dist.Normal(1, 2), st.norm(1, 2)),
    "lognormal": (dist.LogNormal(1.0, 0.5), st.lognorm(0.5, scale=np.e)),
    "uniform": (dist.Uniform(-1.0, 3.0), st.uniform(-1, 4)),
    "loguniform": (dist.LogUniform(1.0, 10.0), st.loguniform(1, 10)),
    "exponential": (dist.Exponential(2.0), st.expon(scale=0.5)),
    "pareto": (dist.Pareto(2.0, 3.0), st.pareto(3, scale=2)),
    "weibull": (dist.Weibull(2.0, 1.5), st.weibull_min(1.5, scale=2)),
    "gompertz": (dist.Gompertz(0.7, 1.5), st.gompertz(0.7, scale=1 / 1.5)),
    "gumbel": (dist.Gumbel(1.0, 2.0), st.gumbel_r(1, 2)),
    "half normal": (dist.HalfNormal(2.0), st.halfnorm(scale=2)),
    "half Cauchy": (dist.HalfCauchy(2.0), st.halfcauchy(scale=2)),
    "Cauchy": (dist.Cauchy(1.0, 2.0), st.cauchy(1, 2)),
    "Laplace": (dist.Laplace(1.0, 2.0), st.laplace(1, 2)),
    "logistic": (dist.Logistic(1.0, 2.0), st.logistic(1, 2)),
    "soft Laplace": (dist.SoftLaplace(1.0, 2.0), st.hypsecant(1, 2)),
    "asymmetric Laplace": (dist.AsymmetricLaplace(1.0, 2.0, 0.7), st.laplace_asymmetric(0.7, 1, 2)),
    "truncated": (dist.TruncatedNormal(0.5, 2.0, low=-1.5, high=4.5), st.truncnorm(-1, 2, 0.5, 2)),
    "left truncated": (dist.TruncatedNormal(0.5, 2.0, low=2.5), st.truncnorm(1, np.inf, 0.5, 2)),
    "right truncated": (dist.TruncatedNormal(0.5, 2.0, high=2.5), st.truncnorm(-np.inf, 1, 0.5, 2)),
    "power": (dist.DoublyTruncatedPowerLaw(-2.0, 1.0, 2.0), st.truncpareto(1, 2)),
    "beta": (dist.Beta(2.0, 3.0), st.beta(2, 3)),
    "horned beta": (dist.Beta(0.5, 0.5), st.beta(0.5, 0.5)),
    "gamma": (dist.Gamma(2.0, 3.0), st.gamma(2, scale=1 / 3)),
    "steep gamma": (dist.Gamma(0.3, 3.0), st.gamma(0.3, scale=1 / 3)),
    "chi2": (dist.Chi2(50.0), st.chi2(50)),
    "inverse gamma": (dist.InverseGamma(3.0, 2.0), None),
    "Student": (dist.StudentT(3.0, 1.0, 2.0), st.t(3, 1, 2)),
    "heavy Student": (dist.StudentT(0.7), st.t(0.7)),
    "light Student": (dist.StudentT(100.0), st.t(100)),
}
VECTORS = {
    "vector": dist.Normal(jnp.arange(3.0), 0.5).to_event(1),
    "expanded": dist.LogNormal(0.5, jnp.array([0.5, 2.0])).expand([3, 2]).to_event(2),
    "dense": DENSE,
    "low rank": dist.LowRankMultivariateNormal(jnp.arange(3.0), FACTOR[:, :1], jnp.ones(3)),
    "walk": dist.GaussianRandomWalk(0.7, 4),
    "box": dist.Uniform(-1.0, jnp.array([1.0, 2.0])).to_event(1),
    "gammas": dist.Gamma(jnp.array([0.5, 3.0]), 2.0).expand([2, 2]).to_event(2),
    "transformed": dist.TransformedDistribution(
        DENSE,
        [
            transforms.ExpTransform(),
            transforms.PowerTransform(-0.5),
            transforms.AffineTransform(1.0, jnp.array([1.0, -2.0, 3.0])),
            transforms.PermuteTransform(jnp.array([2, 0, 1])),
        ],
    ),
}
ZS = jnp.array([-4.0, -2.5, -1.0, -1e-3, 0.0, 0.3, 1.7, 3.6])


@pytest.mark.parametrize("name", [*SCALARS, *VECTORS])
def test_change_of_variables_gives_the_density_of_the_prior(name):
    prior = SCALARS[name][0] if name in SCALARS else VECTORS[name]
    transform, shape = gaussianise(prior), prior.event_shape
    z = jax.random.normal(KEY, (4, *shape)) if shape else ZS
    size = z[0].size

    @jax.jit
    def densities(z):
        theta = transform(z)
        jacobians = jax.vmap(jax.jacfwd(transform))(z).reshape(-1, size, size)
        normal = jax.scipy.stats.norm.logpdf(z).reshape(-1, size).sum(1)
        return normal - jnp.linalg.slogdet(jacobians)[1], prior.log_prob(theta)

    np.testing.assert_allclose(*densities(z), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["uniform", "Cauchy", "truncated", "gamma", "Student", *VECTORS])
def test_gaussianise_gives_a_bijection(name):
    prior = SCALARS[name][0] if name in SCALARS else VECTORS[name]
    transform = gaussianise(prior)
    check_transform(transform, jax.random.normal(KEY, (4, *prior.event_shape)), atol=1e-9)
    copy, z = pickle.loads(pickle.dumps(transform)), jnp.zeros(prior.event_shape)
    np.testing.assert_array_equal(copy(z), transform(z))
    assert transform.domain.event_dim == transform.codomain.event_dim == prior.event_dim


KNOWN = {name: pair for name, pair in SCALARS.items() if pair[1] is not None}
# Without a tail of their own, 1 - F loses its digits where F is near one.
LOSSY = {"asymmetric Laplace", "power"}


def reference(law, z):
    """Quantiles each from its own side."""
    return np.where(z < 0, law.ppf(st.norm.cdf(z)), law.isf(st.norm.cdf(-z)))


@pytest.mark.parametrize("name", KNOWN)
def test_quantiles_and_their_inverse_equal_those_of_scipy(name):
    prior, law = KNOWN[name]
    z = np.append(np.asarray(ZS), [-7.0, 4.0 if name in LOSSY else 7.0])
    transform, theta = gaussianise(prior), reference(law, z)
    # SciPy's half normal and truncated laws lose digits in the far tails themselves.
    rtol = 1e-2 if "half" in name or "truncated" in name else 1e-9
    np.testing.assert_allclose(transform(jnp.asarray(z)), theta, rtol=rtol, atol=1e-9)
    inner = np.abs(z) < 4.5
    back = transform.inv(jnp.asarray(theta[inner]))
    np.testing.assert_allclose(back, z[inner], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in SCALARS if name not in LOSSY])
def test_single_precision_keeps_both_tails(name):
    prior = SCALARS[name][0]
    single = jax.tree.map(lambda leaf: jnp.float32(leaf), prior)
    z = jnp.array([-6.0, -3.0, 0.2, 3.0, 6.0], jnp.float32)
    theta = gaussianise(single)(z)
    assert theta.dtype == jnp.float32
    expected = gaussianise(prior)(z.astype(float))
    np.testing.assert_allclose(theta, expected, rtol=2e-5, atol=1e-6)
    back = gaussianise(single).inv(theta)
    log_det = gaussianise(single).log_abs_det_jacobian(z, theta)
    assert back.dtype == log_det.dtype == jnp.float32
    # Only as far as the spacing of numbers at theta lets z be seen.
    resolution = np.spacing(np.abs(np.asarray(theta))) * np.exp(-np.asarray(log_det, float))
    is_seen = resolution < 1e-2
    assert is_seen.sum() >= 3
    assert np.all(np.abs(back - z)[is_seen] <= (1e-5 + 8 * resolution)[is_seen])


def test_own_quantiles_lose_the_upper_tail_in_single_precision():
    z, prior = jnp.float32(6.0), dist.Exponential(jnp.float32(2.0))
    assert prior.icdf(jax.scipy.special.ndtr(z)) == jnp.inf
    exact = KNOWN["exponential"][1].isf(st.norm.sf(6))
    np.testing.assert_allclose(gaussianise(prior)(z), exact, rtol=1e-5)


def test_single_precision_far_in_a_truncated_tail():
    prior = dist.TruncatedNormal(jnp.float32(0.0), jnp.float32(1.0), low=jnp.float32(30.0))
    z = jnp.array([-2.0, 0.0, 2.0], jnp.float32)
    # There the law is exponential with rate 30, to 1/900.
    excess = -np.log(st.norm.sf(np.asarray(z, float))) / 30
    np.testing.assert_allclose(gaussianise(prior)(z) - 30, excess, rtol=6e-3, atol=1e-5)


def test_draws_have_the_moments_and_correlations_of_the_prior():
    mean = np.array([0.5, 3.0, 1.0])
    transform = gaussianise(dist.Exponential(jnp.asarray(1 / mean)).to_event(1))
    draws = transform(jax.random.normal(KEY, (100_000, 3)))
    assert_mean(draws, mean)
    assert_cov(draws, np.diag(mean**2), bias=0.1)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean(draws, 1.05 * mean)


def test_ends_of_the_support_are_infinite_and_beyond_is_nan():
    box = gaussianise(dist.Uniform(-1.0, 3.0))
    expected = [-np.inf, np.inf, np.nan, np.nan]
    np.testing.assert_array_equal(box.inv(jnp.array([-1.0, 3.0, -1.1, 3.1])), expected)
    for prior, outside in [(dist.Gamma(2.0, 1.0), -1.0), (dist.Beta(2.0, 2.0), 1.5)]:
        assert jnp.isnan(gaussianise(prior).inv(outside))
    student = gaussianise(dist.StudentT(jnp.float32(0.7)))
    np.testing.assert_array_equal(student(jnp.float32([12.0, -12.0])), [np.inf, -np.inf])


SOLVED = {"gamma": dist.Gamma(1.5, 2.0), "beta": dist.Beta(1.5, 2.0), "Student": dist.StudentT(3.0)}


@pytest.mark.parametrize("prior", SOLVED.values(), ids=SOLVED)
def test_solved_quantiles_have_derivatives_of_both_orders(prior):
    transform, z, step = gaussianise(prior), 0.7, 1e-4
    ends = [transform(z + step), transform(z), transform(z - step)]
    slope = jax.jit(jax.grad(lambda z: transform(z)))
    np.testing.assert_allclose(slope(z), (ends[0] - ends[2]) / (2 * step), rtol=1e-6)
    curvature = (ends[0] - 2 * ends[1] + ends[2]) / step**2
    np.testing.assert_allclose(jax.hessian(transform)(z), curvature, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(transform.inv)(ends[1]) * slope(z), 1.0, rtol=1e-10)
    batch = jax.vmap(jax.grad(transform))(ZS)
    np.testing.assert_allclose(batch, [slope(each) for each in ZS], rtol=1e-9)


def test_derivatives_in_the_parameters_are_true_or_refused():
    gamma = lambda shape, rate: gaussianise(dist.Gamma(shape, rate))
    forward, back = lambda a, b: gamma(a, b)(0.7), lambda a, b: gamma(a, b).inv(0.7)
    for function in (forward, back):
        for argument in (0, 1):
            moved = lambda h, i=argument, f=function: f(1.5 + h * (i == 0), 2.0 + h * (i == 1))
            difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(
                jax.grad(function, argument)(1.5, 2.0), difference, rtol=1e-7
            )
    with pytest.raises(ValueError, match="with respect to a and b not supported"):
        jax.grad(lambda a: gaussianise(dist.Beta(a, 2.0))(0.7))(1.5)
    with pytest.raises(NotImplementedError, match="StudentT are not differentiable in df"):
        jax.grad(lambda df: gaussianise(dist.StudentT(df))(0.7))(3.0)


NONE = {
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.zeros(2), 1.0)
    ),
    "folded": dist.FoldedDistribution(dist.Normal(0.0, 1.0)),
    "folded within": dist.TransformedDistribution(
        dist.Normal(0.0, 1.0),
        transforms.ComposeTransform([transforms.AbsTransform(), transforms.ExpTransform()]),
    ),
    "masked": dist.Normal(0.0, 1.0).mask(False),
    "other dimensions": dist.ZeroSumNormal(1.0, (3,)),
    "simplex": dist.Dirichlet(jnp.ones(3)),
    "discrete": dist.Poisson(2.0),
    "point": dist.Delta(1.0),
    "no quantiles": dist.VonMises(0.0, 1.0),
    "within": dist.VonMises(jnp.zeros(2), 1.0).to_event(1),
    "improper": dist.ImproperUniform(dist.constraints.real, (), ()),
}


@pytest.mark.parametrize("prior", NONE.values(), ids=NONE)
def test_what_has_no_bijection_gives_none(prior):
    assert gaussianise(prior) is None


@pytest.mark.usefixtures("as_user")
def test_what_is_no_distribution_is_an_error():
    with pytest.raises(TypeError, match="must be a NumPyro distribution, got <function"):
        gaussianise(lambda: None)


def test_integrals_of_different_laws_differ():
    one, other = ProbabilityIntegral(dist.Beta(0.5, 0.5)), ProbabilityIntegral(dist.Beta(0.5, 0.6))
    assert one == ProbabilityIntegral(dist.Beta(0.5, 0.5))
    assert one != other
    assert one != ProbabilityIntegral(dist.Gamma(0.5, 0.5))


# Boxes with soft edges.

SOFT = BlurredUniform(jnp.asarray(-HALF), jnp.asarray(HALF), jnp.asarray(BLUR))
EDGES = jnp.array([-2.2, -1.9, -1.72, -1.6, -0.5, 0.0, 1e-9, 0.7, 1.7, 1.9, 2.2])


@pytest.mark.parametrize(
    "prior",
    [
        dist.Uniform(-1.0, 3.0),
        dist.LogUniform(1.0, 10.0),
        dist.Uniform(0.0, 1.0).expand([3]).to_event(1),
    ],
    ids=["uniform", "loguniform", "expanded"],
)
def test_soft_coordinates_have_the_law_of_a_blurred_box(prior):
    transform, shape = soften(prior), prior.event_shape
    z = jnp.broadcast_to(EDGES.reshape(-1, *[1] * len(shape)), (11, *shape))
    slope = jax.jvp(transform, (z,), (jnp.ones_like(z),))[1]
    density = jax.vmap(SOFT.log_prob)(z.ravel()).reshape(z.shape) - jnp.log(slope)
    expected = prior.log_prob(transform(z))
    np.testing.assert_allclose(density.reshape(11, -1).sum(1), expected, rtol=1e-8, atol=1e-10)
    check_transform(transform, z, atol=1e-9)


def test_soft_quantiles_are_those_of_uniform_plus_normal():
    """By a million draws of the sum, and of the wrong sum."""
    keys = jax.random.split(KEY)
    box = jax.random.uniform(keys[0], (1_000_000,), minval=-HALF, maxval=HALF)
    normal = jax.random.normal(keys[1], box.shape)
    u = SoftUniform(dist.Uniform(0.0, 1.0))
    powers = lambda values: jnp.stack([values, values**2, values**20], 1)
    expected = 1 / np.array([2, 3, 21])
    assert_mean(powers(u(box + BLUR * normal)), expected)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean(powers(u(box + 2 * BLUR * normal)), expected)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-9), (jnp.float32, 3e-6)])
def test_soft_edges_keep_their_digits(dtype, rtol):
    """The way back from what is left of the box, down to the smallest numbers."""
    unit = SoftUniform(dist.Uniform(dtype(0.0), dtype(1.0)))
    theta = jnp.asarray([1e-30, 1e-12, 1e-4, 0.01, 0.3, 0.5, 0.9], dtype)
    z = unit.inv(theta)
    assert z.dtype == dtype
    np.testing.assert_allclose(unit(z), theta, rtol=100 * rtol)
    slope = jax.vmap(jax.grad(unit.inv))(theta)
    log_det = unit.log_abs_det_jacobian(z, theta)
    np.testing.assert_allclose(jnp.log(slope), -log_det, rtol=10 * rtol)


def test_soft_coordinates_end_at_the_support():
    box = SoftUniform(dist.Uniform(-1.0, 3.0))
    expected = [-np.inf, np.inf, np.nan, np.nan]
    np.testing.assert_array_equal(box.inv(jnp.array([-1.0, 3.0, -1.1, 3.1])), expected)
    assert box == SoftUniform(dist.Uniform(-1.0, 3.0))
    assert box != SoftUniform(dist.Uniform(-1.0, 2.0))
    assert soften(dist.Normal(0.0, 1.0)) is None
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(box))(EDGES), box(EDGES))
