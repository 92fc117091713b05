"""Parameters of a simulator as one real vector, against a change of variables by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from scoreprior.denoise import BlurredUniform, Gaussian, GaussianMixture
from scoreprior.sbi import Parameters
from scoreprior.sbi.parameters import from_vectors
from scoreprior.sbi.soft import BLUR
from stats import assert_cov, assert_mean

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(3)
COVARIANCE = jnp.array([[2.0, 0.5], [0.5, 1.0]])


def chain():
    """Each site's law depends on the sites before it."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    mean = numpyro.sample("mean", dist.Normal(2.0, scale))
    numpyro.deterministic("twice", 2 * mean)
    with numpyro.plate("items", 3):
        numpyro.sample("width", dist.Weibull(scale, jnp.exp(mean / 4)))


def boxes():
    """Uniform sites, the edges of one of which depend on the other, beside a normal one."""
    share = numpyro.sample("share", dist.LogUniform(0.5, 2.0))
    numpyro.sample("mean", dist.Normal(2.0, share))
    with numpyro.plate("items", 2):
        numpyro.sample("width", dist.Uniform(-share, 3.0))


MIXTURE = dist.MixtureSameFamily(
    dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-1.0, 2.0]), 0.5)
)


def mixed():
    """Maps of a normal that are no affine ones, and sites that are no maps of a normal."""
    scale = numpyro.sample("scale", dist.Gamma(2.0, 1.0))
    numpyro.sample("share", dist.Weibull(scale, 2.0))
    numpyro.sample("mixture", MIXTURE)
    with numpyro.plate("pairs", 2):
        numpyro.sample("pair", dist.MultivariateNormal(scale * jnp.ones(2), COVARIANCE))
    numpyro.sample(
        "positive", dist.TransformedDistribution(MIXTURE, dist.transforms.ExpTransform())
    )


PRIORS = {
    "normal": dist.Normal(1.0, 2.0),
    "multivariate": dist.MultivariateNormal(jnp.array([1.0, -1.0]), COVARIANCE),
    "uniform": dist.Uniform(jnp.array([-1.0, 0.0]), jnp.array([1.0, 5.0])).to_event(1),
    "chain": chain,
    "boxes": boxes,
    "mixed": mixed,
}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())


def flat(theta):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(theta)])


def density(prior, theta):
    """`log p(theta)`, by NumPyro itself."""
    if isinstance(prior, dist.Distribution):
        return prior.log_prob(theta)
    return numpyro.infer.util.log_density(prior, (), {}, theta)[0]


@every_prior
def test_vectors_and_parameters_are_one_to_one(prior):
    parameters = Parameters.of(prior)
    theta = parameters.sample(KEY)
    z = parameters.to_vector(theta)
    assert z.shape == (parameters.size,)
    np.testing.assert_allclose(flat(parameters.from_vector(z)), flat(theta), rtol=1e-10)


@every_prior
def test_density_follows_the_change_of_variables(prior):
    parameters = Parameters.of(prior)
    z = 0.7 * jax.random.normal(KEY, (parameters.size,))
    jacobian = jax.jacfwd(lambda z: flat(parameters.from_vector(z)))(z)
    log_det = jnp.linalg.slogdet(jacobian)[1]
    expected = density(prior, parameters.from_vector(z)) + log_det
    np.testing.assert_allclose(parameters.log_det(z), log_det, rtol=1e-9)
    np.testing.assert_allclose(parameters.log_prob(z), expected, rtol=1e-9)
    if parameters.law is not None:
        np.testing.assert_allclose(parameters.log_prob(z), parameters.law.log_prob(z), rtol=1e-9)


def test_a_chain_of_dependent_sites_is_standard_normal():
    """And its sites are not, in coordinates that forget what they depend on."""
    parameters = Parameters.of(chain)
    assert parameters.names == ("scale", "mean", "width")
    assert parameters.size == 5
    assert isinstance(parameters.law, Gaussian)
    keys = jax.random.split(KEY, 45_000)
    theta = jax.vmap(parameters.sample)(keys)
    z = jax.vmap(parameters.to_vector)(theta)
    assert_mean(z, 0.0)
    assert_cov(z, np.eye(5))
    forgetful = (theta["mean"] - 2.0)[:, None]
    with pytest.raises(AssertionError, match="covariance"):
        assert_cov(forgetful, np.eye(1))


@dataclasses.dataclass
class Wide:
    """A model that cannot be hashed, as dataclasses cannot."""

    scale: float

    def __call__(self):
        numpyro.sample("a", dist.Normal(1.0, self.scale))


def test_models_of_any_kind_have_parameters():
    parameters = Parameters.of(Wide(3.0))
    z = jnp.asarray([[0.5], [-1.0]])
    np.testing.assert_allclose(from_vectors(parameters, z)["a"], [2.5, -2.0], rtol=1e-12)


def test_uniform_sites_are_blurred_boxes_of_variance_one():
    parameters = Parameters.of(boxes)
    assert isinstance(parameters.law, BlurredUniform)
    np.testing.assert_array_equal(parameters.law.high > 0, [True, False, True, True])
    keys = jax.random.split(KEY, 45_000)
    z = jax.vmap(parameters.to_vector)(jax.vmap(parameters.sample)(keys))
    assert_mean(z, 0.0)
    assert_cov(z, np.eye(4))
    # Fourth moments tell a box from a normal law.
    fourth = 9 / 5 + 6 / 5 * (2 * BLUR**2 - BLUR**4)
    assert_mean(z**4, [fourth, 3.0, fourth, fourth])


def test_the_law_is_said_only_where_it_is_known():
    mixture = dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])),
        dist.MultivariateNormal(jnp.array([[-2.0, 0.0], [2.0, 1.0]]), COVARIANCE),
    )
    parameters = Parameters.of(mixture)
    z = jnp.array([0.4, -1.2])
    assert isinstance(parameters.law, GaussianMixture)
    np.testing.assert_allclose(parameters.law.log_prob(z), mixture.log_prob(z), rtol=1e-10)
    np.testing.assert_allclose(parameters.log_prob(z), mixture.log_prob(z), rtol=1e-10)
    assert Parameters.of(dist.Dirichlet(jnp.ones(3))).law is None


def observed():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)


def discrete():
    numpyro.sample("k", dist.Poisson(2.0))


def improper():
    numpyro.sample("u", dist.ImproperUniform(dist.constraints.real, (), ()))


def subsampled():
    with numpyro.plate("items", 10, subsample_size=2):
        numpyro.sample("a", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (3.0, TypeError, "prior must be a NumPyro distribution or a model"),
        (
            dist.Normal(jnp.zeros(2), 1.0),
            ValueError,
            r"no batch shape, got \(2,\): .*to_event\(1\)",
        ),
        (observed, ValueError, "the observed site 'y'"),
        (discrete, ValueError, "the discrete site 'k'"),
        (improper, ValueError, "the improper site 'u'"),
        (subsampled, ValueError, "no subsample, got plate 'items'"),
        (lambda: None, ValueError, "must have a latent site"),
    ],
)
def test_priors_that_are_refused(as_user, prior, error, message):
    with pytest.raises(error, match=message):
        Parameters.of(prior)


def test_values_that_are_refused(as_user):
    parameters = Parameters.of(chain)
    with pytest.raises(ValueError, match=r"z must have shape \(5,\), got \(4,\)"):
        parameters.from_vector(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"theta must be a dict with the keys .*'width'"):
        parameters.to_vector({"scale": 1.0})
    theta = parameters.sample(KEY) | {"width": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"shape \(3,\) at site 'width', got \(2,\)"):
        parameters.to_vector(theta)
