"""`Problem`: what it finds in a model, the densities of both forms, linearisation, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import mask, scale
from scipy.stats import norm

import oracles
from priors import build, draws, log_prob, mixture
from scoreprior.density import ScoreOnly
from scoreprior.flow import FixedGrid
from scoreprior.problem import Problem
from stats import assert_cov, assert_mean

pytestmark = pytest.mark.promotes_ranks

PRIOR = build(mixture())
A = jnp.array([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]])
Y = jnp.array([0.5, -1.0, 2.0])


def model(y=None):
    noise = numpyro.sample("noise", dist.HalfNormal(0.5))
    x = numpyro.sample("x", PRIOR)
    numpyro.deterministic("total", x.sum())
    numpyro.factor("penalty", -0.1 * noise)
    numpyro.sample("y", dist.Normal(A @ x + 1, noise).to_event(1), obs=y)


PROBLEM = Problem.from_model(model, y=Y)
POSITION = {"noise": jnp.array(-0.7), "x": jnp.array([0.3, -1.2])}


def test_sites_are_found_and_shown():
    sites = PROBLEM.sites
    kinds = [list(kind) for kind in sites[:4]]
    assert kinds == [["x"], ["noise"], ["y"], ["total"]]
    assert repr(PROBLEM) == (
        "Problem(model, priors=['x'], latents=['noise'], observed=['y'], "
        "deterministic=['total'], non-centred)"
    )
    assert repr(PROBLEM.centred()).endswith(" centred)")
    np.testing.assert_array_equal(sites.data["y"], Y)


def by_hand(position, centred):
    """Log prior and log likelihood, from the formulas."""
    noise = np.exp(position["noise"])
    x = position["x"] if centred else PRIOR.flow.to_data(position["x"])
    half_normal = np.log(2) + norm.logpdf(noise, scale=0.5) + position["noise"]
    of_x = log_prob(PRIOR, x) if centred else norm.logpdf(position["x"]).sum()
    likelihood = norm.logpdf(Y, A @ x + 1, noise).sum() - 0.1 * noise
    return half_normal + of_x, likelihood


@pytest.mark.parametrize("centred", [False, True])
def test_densities(centred):
    problem = PROBLEM.centred() if centred else PROBLEM
    log_prior, log_likelihood = by_hand(POSITION, centred)
    np.testing.assert_allclose(problem.log_prior(POSITION), log_prior, rtol=1e-10)
    np.testing.assert_allclose(problem.log_likelihood(POSITION), log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(
        problem.log_density(POSITION), log_prior + log_likelihood, rtol=1e-10
    )


def count_solves(function, position):
    """Loops left by the compiler: one per solve, and one more for a solve's transpose."""
    return jax.jit(function).lower(position).compile().as_text().count(" while(")


@pytest.mark.parametrize(("centred", "prior", "likelihood"), [(False, 0, 1), (True, 1, 0)])
def test_one_solve_per_evaluation(centred, prior, likelihood):
    problem = PROBLEM.centred() if centred else PROBLEM
    assert count_solves(problem.log_density, POSITION) == 1
    assert count_solves(jax.value_and_grad(problem.log_density), POSITION) == 2
    assert count_solves(problem.log_prior, POSITION) == prior
    assert count_solves(problem.log_likelihood, POSITION) == likelihood


@pytest.mark.parametrize("centred", [False, True])
def test_constrain_and_unconstrain_are_inverse(centred):
    problem = PROBLEM.centred() if centred else PROBLEM
    values = problem.constrain(POSITION)
    assert set(values) == {"x", "noise", "total"}
    np.testing.assert_allclose(values["noise"], np.exp(POSITION["noise"]))
    np.testing.assert_allclose(values["total"], values["x"].sum())
    expected = POSITION["x"] if centred else PRIOR.flow.to_data(POSITION["x"])
    np.testing.assert_allclose(values["x"], expected)
    fine = Problem.from_model(swap(model, build(mixture(), solver=FixedGrid(40))), y=Y)
    fine = fine.centred() if centred else fine
    back = fine.unconstrain(fine.constrain(POSITION))
    for name in POSITION:
        np.testing.assert_allclose(back[name], POSITION[name], atol=1e-4)


def swap(function, prior):
    """`function` with its site `x` drawn from `prior`."""

    def swapped(*args, **kwargs):
        with _Swap(prior):
            function(*args, **kwargs)

    return swapped


class _Swap(numpyro.primitives.Messenger):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def process_message(self, msg):
        if msg["name"] == "x" and msg["type"] == "sample":
            msg["fn"] = self.prior


@pytest.mark.parametrize("centred", [False, True])
def test_initial_positions_are_prior_draws(centred):
    problem = PROBLEM.centred() if centred else PROBLEM
    positions = jax.vmap(problem.initial)(jax.random.split(jax.random.key(0), 40_000))
    values = jax.vmap(problem.constrain)(positions)
    flow_draws = np.asarray(jax.vmap(PRIOR.flow.to_data)(positions["x"]))
    assert_mean(np.abs(values["noise"]), 0.5 * np.sqrt(2 / np.pi))
    if not centred:
        assert_mean(positions["x"], np.zeros(2))
        assert_cov(positions["x"], np.eye(2))
        np.testing.assert_allclose(values["x"], flow_draws)
    fresh = jax.random.normal(jax.random.key(1), (40_000, 2))
    spread = np.cov(jax.vmap(PRIOR.flow.to_data)(fresh), rowvar=False)
    assert_cov(values["x"], spread, bias=0.1)
    assert_mean(values["x"], oracles.moments(mixture())[0], bias=0.1)


def test_predicted_data_have_the_law_of_the_observed_site():
    values = {"x": jnp.array([1.0, -1.0]), "noise": jnp.array(0.4)}
    keys = jax.random.split(jax.random.key(0), 40_000)
    y = jax.vmap(lambda key: PROBLEM.predict(key, values)["y"])(keys)
    assert_mean(y, A @ values["x"] + 1)
    assert_cov(y, 0.16 * np.eye(3))


def test_computed_sites_in_a_plate_have_it_in_front():
    def model():
        with numpyro.plate("image", 2):
            x = numpyro.sample("x", PRIOR)
            numpyro.deterministic("flipped", x[..., ::-1])
            numpyro.deterministic("total", x.sum(-1))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=0.0)

    sites = Problem.from_model(model).sites
    assert sites.priors["x"].plates == ("image", None)
    plates = {name: site.plates for name, site in sites.deterministic.items()}
    assert plates["flipped"] == ("image", None)
    assert plates["total"] == ("image",)


def test_data_may_be_mapped_over():
    ys = jnp.stack([Y, 2 * Y])
    mapped = jax.vmap(lambda y: Problem.from_model(model, y=y).log_density(POSITION))(ys)
    single = [Problem.from_model(model, y=y).log_density(POSITION) for y in ys]
    np.testing.assert_allclose(mapped, single)


@pytest.mark.parametrize("centred", [False, True])
def test_two_priors_and_a_plate(centred):
    def model():
        a = numpyro.sample("a", PRIOR)
        with numpyro.plate("three", 3):
            b = numpyro.sample("b", PRIOR)
        numpyro.sample("y", dist.Normal(a.sum() + b.sum(), 1.0), obs=0.3)

    problem = Problem.from_model(model)
    problem = problem.centred() if centred else problem
    assert problem.sites.priors["b"].plates == ("three", None)
    x = draws(PRIOR, 4)
    position = {"a": x[0], "b": x[1:]}
    values = problem.constrain(position)
    of_x = sum(log_prob(PRIOR, row) for row in x) if centred else norm.logpdf(x).sum()
    total = values["a"].sum() + values["b"].sum()
    np.testing.assert_allclose(problem.log_density(position), of_x + norm.logpdf(0.3, total))


def test_a_mask_of_true_and_a_transform_keep_a_prior_site():
    shift = dist.transforms.AffineTransform(2.0, 3.0)
    shifted = dist.TransformedDistribution(PRIOR, shift)

    def model():
        numpyro.sample("a", PRIOR.mask(True))
        b = numpyro.sample("b", shifted)
        numpyro.sample("y", dist.Normal(b.sum(), 1.0), obs=0.3)

    problem = Problem.from_model(model)
    u = draws(PRIOR, 2)
    position = {"a": u[0], "b": u[1]}
    values = problem.constrain(position)
    np.testing.assert_allclose(values["b"], 2 + 3 * PRIOR.flow.to_data(u[1]))
    expected = norm.logpdf(u).sum() + norm.logpdf(0.3, values["b"].sum())
    np.testing.assert_allclose(problem.log_density(position), expected)


def test_latent_sites_of_a_scan_and_parameters():
    def model(y):
        weight = numpyro.param("weight", lambda key: jax.random.normal(key))
        x = numpyro.sample("x", PRIOR)

        def step(level, y):
            level = numpyro.sample("level", dist.LogNormal(level, 1.0))
            numpyro.sample("y", dist.Normal(weight * level, 1.0), obs=y)
            return level, None

        scan(step, x.sum(), y)

    problem = Problem.from_model(model, Y)
    weight = problem.sites.params["weight"]
    u, z = jnp.array([0.2, -0.1]), jnp.array([0.1, -0.4, 0.3])
    level = np.exp(z)
    start = np.concatenate([[PRIOR.flow.to_data(u).sum()], level[:2]])
    expected = norm.logpdf(u).sum() + norm.logpdf(z, start).sum()
    expected += norm.logpdf(Y, weight * level).sum()
    np.testing.assert_allclose(problem.log_density({"x": u, "level": z}), expected)


COV = jnp.array([[1.0, 0.4, 0.0], [0.4, 2.0, 0.1], [0.0, 0.1, 0.5]])
KEEP = jnp.array([True, False, True])


def observed(distribution):
    """A model whose site `y` has `distribution(x)`."""

    def model(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", distribution(x), obs=y)

    return Problem.from_model(model, Y)


LIKELIHOODS = {
    "Normal": (lambda x: dist.Normal(A @ x + 1, 0.5), 0.25 * jnp.eye(3)),
    "Independent": (lambda x: dist.Normal(A @ x + 1, Y**2).to_event(1), jnp.diag(Y**4)),
    "MultivariateNormal": (lambda x: dist.MultivariateNormal(A @ x + 1, COV), COV),
    "LowRank": (
        lambda x: dist.LowRankMultivariateNormal(A @ x + 1, jnp.ones((3, 1)), jnp.ones(3)),
        jnp.eye(3) + 1,
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_linearise_reads_the_observation_off_the_model(name):
    distribution, cov_y = LIKELIHOODS[name]
    problem = observed(distribution)
    x, v, w = draws(PRIOR, 2)[0], jnp.array([0.3, -0.7]), jnp.array([1.0, 2.0, -1.0])
    seen = problem.linearise({"x": x})
    np.testing.assert_allclose(seen.matrix(), A, atol=1e-12)
    np.testing.assert_allclose(seen.y, Y - 1, atol=1e-12)
    np.testing.assert_allclose(seen.cov_y(), cov_y, atol=1e-12)
    np.testing.assert_allclose(seen.A(v), A @ v, atol=1e-12)
    np.testing.assert_allclose(seen.A_transpose(w), A.T @ w, atol=1e-12)
    np.testing.assert_allclose(seen.mean(x), A @ x + 1)
    assert seen.is_linear(jax.random.key(0))
    # The Gaussian it describes has the likelihood of the model.
    residual = problem.log_likelihood({"x": POSITION["x"]})
    x = PRIOR.flow.to_data(POSITION["x"])
    np.testing.assert_allclose(seen.noise.log_prob(seen.y - A @ x), residual)


@pytest.mark.parametrize("inside", [False, True])
def test_masked_entries_carry_no_information(inside):
    missing = Y.at[1].set(jnp.nan)

    def model(y):
        x = numpyro.sample("x", PRIOR)
        if inside:
            numpyro.sample("y", dist.Normal(A @ x, 0.5).mask(KEEP).to_event(1), obs=y)
        else:
            with mask(mask=KEEP):
                numpyro.sample("y", dist.Normal(A @ x, 0.5), obs=y)

    problem = Problem.from_model(model, missing)
    seen = problem.linearise({"x": jnp.zeros(2)})
    np.testing.assert_allclose(seen.matrix(), jnp.where(KEEP[:, None], A, 0))
    np.testing.assert_allclose(seen.y, [Y[0], 0, Y[2]])
    np.testing.assert_array_equal(seen.mask, KEEP)
    gradient = jax.grad(problem.log_density)({"x": jnp.zeros(2)})
    assert np.all(np.isfinite(gradient["x"]))


def test_a_nonlinear_mean_is_linearised_at_the_point():
    problem = observed(lambda x: dist.Normal(jnp.tanh(A @ x), 0.5))
    x = jnp.array([0.2, -0.3])
    seen = problem.linearise({"x": x})
    slope = jnp.diag(1 - jnp.tanh(A @ x) ** 2) @ A
    np.testing.assert_allclose(seen.matrix(), slope, atol=1e-12)
    np.testing.assert_allclose(seen.y, Y - jnp.tanh(A @ x) + slope @ x, atol=1e-12)
    assert not seen.is_linear(jax.random.key(0))


def test_linearise_asks_which_site_and_crosses_jit():
    def model(y):
        a = numpyro.sample("a", PRIOR)
        b = numpyro.sample("b", PRIOR)
        numpyro.sample("y", dist.Normal(A @ a + A @ b, 0.5), obs=y)
        numpyro.sample("z", dist.Normal(a.sum(), 0.5), obs=1.0)

    problem = Problem.from_model(model, Y)
    a, b = draws(PRIOR, 2)
    with pytest.raises(ValueError, match=r"site must be one of \['y', 'z'\], got None"):
        problem.linearise({"a": a, "b": b})
    with pytest.raises(ValueError, match=r"prior must be one of \['a', 'b'\], got 'c'"):
        problem.linearise({"a": a, "b": b}, site="y", prior="c")
    with pytest.raises(ValueError, match=r"values must hold every latent site, \['b'\] missing"):
        problem.linearise({"a": a}, site="y", prior="a")

    @jax.jit
    def seen(b):
        return problem.linearise({"a": a, "b": b}, site="y", prior="a")

    np.testing.assert_allclose(seen(b).y, Y - A @ b)


def refused(sample, **kwargs):
    """A model whose extra site `z` is of no use."""

    def model():
        numpyro.sample("x", PRIOR)
        return sample(**kwargs)

    return model


def subsample():
    with numpyro.plate("rows", 10, subsample_size=3):
        numpyro.sample("z", dist.Normal())


def scaled():
    with scale(scale=2.0):
        numpyro.sample("z", PRIOR)


REFUSED = {
    "no ScorePrior": (
        lambda: numpyro.sample("z", dist.Normal()),
        r"no latent ScorePrior site.*its latent sites are: z \(Normal\)",
    ),
    "discrete": (
        refused(lambda: numpyro.sample("z", dist.Poisson(2.0))),
        r"latent site 'z' is discrete \(Poisson\).*sum it out",
    ),
    "improper": (
        refused(lambda: numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))),
        "latent site 'z' is improper",
    ),
    "masked": (
        refused(lambda: numpyro.sample("z", dist.Normal().expand([2]).mask(KEEP[:2]))),
        "latent site 'z' is masked",
    ),
    "subsampled": (refused(subsample), "plate 'rows' draws a random subsample, 3 of 10"),
    "scaled prior": (
        refused(scaled),
        "prior site 'z' is under numpyro.handlers.scale, got scale 2",
    ),
    "NaN data": (
        refused(lambda: numpyro.sample("z", dist.Normal(), obs=jnp.array([1.0, jnp.nan]))),
        "observed site 'z' has NaN in 1 of 2 entries: mask missing data",
    ),
    "NaN parameters": (
        refused(
            lambda: numpyro.sample("z", dist.Normal(0.0, jnp.nan, validate_args=False), obs=0.0)
        ),
        "observed site 'z' has a log density of NaN: check the parameters of its Normal",
    ),
    "data of another shape": (
        refused(lambda: numpyro.sample("z", dist.Normal(jnp.zeros(3)), obs=jnp.ones(2))),
        r"observed site 'z' needs data of shape \(3,\), got \(2,\)",
    ),
    "data that broadcast to pairs": (
        refused(lambda: numpyro.sample("z", dist.Normal(jnp.zeros(3)), obs=jnp.ones((3, 1)))),
        r"observed site 'z' needs data of shape \(3,\), got \(3, 1\)",
    ),
    "name of the noise": (
        refused(lambda: numpyro.sample("x_base", dist.Normal())),
        "site 'x_base' has the name that the noise of prior site 'x' takes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_no_use_are_refused(name):
    model, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        Problem.from_model(model)


def test_what_is_not_a_model_is_refused(as_user):
    with pytest.raises(TypeError, match="model must be a NumPyro model"):
        Problem.from_model(3)


def test_a_prior_without_density_has_no_centred_form():
    problem = Problem.from_model(swap(model, PRIOR.with_density(ScoreOnly())), y=Y)
    assert np.isfinite(problem.log_density(POSITION))
    with pytest.raises(NotImplementedError, match="ScoreOnly has no log_prob"):
        problem.centred()


def test_positions_of_another_problem_are_refused():
    with pytest.raises(ValueError, match=r"position must hold the sites \['noise', 'x'\]"):
        PROBLEM.log_density({"x": POSITION["x"]})


@pytest.mark.parametrize(
    ("distribution", "match"),
    [
        (lambda x: dist.Poisson(jnp.exp(A @ x)), "its distribution is Poisson, expected Normal"),
        (lambda x: dist.StudentT(3.0, A @ x), "its distribution is StudentT, expected Normal"),
    ],
)
def test_other_likelihoods_are_not_linearised(distribution, match):
    def model(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", distribution(x), obs=y)

    problem = Problem.from_model(model, jnp.array([1, 0, 2]))
    assert np.isfinite(problem.log_likelihood({"x": jnp.zeros(2)}))
    with pytest.raises(ValueError, match=match):
        problem.linearise({"x": jnp.zeros(2)})


def test_a_scaled_likelihood_is_not_linearised():
    def model(y):
        x = numpyro.sample("x", PRIOR)
        with scale(scale=0.5):
            numpyro.sample("y", dist.Normal(A @ x, 1.0), obs=y)

    with pytest.raises(ValueError, match="observed site 'y' is under numpyro.handlers.scale"):
        Problem.from_model(model, Y).linearise({"x": jnp.zeros(2)})
