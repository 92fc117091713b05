"""Compositions: powers and products of mixtures are mixtures, so everything is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import norm

from oracles import A_G, GAUSSIAN, MIXTURE, SD_G, Y_G, at_level
from scoreprior import compose
from scoreprior import feynman_kac as fk
from scoreprior.composition import Composition
from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.density import ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.guide import TMPD, Exceeds, Steering
from scoreprior.infer import infer
from scoreprior.mcmc import NUTS, Guided
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import FeynmanKac, TemperedSMC
from stats import assert_cov, assert_mean, require_power

KEY = jax.random.key(3)
SIGMA_MIN = 0.1


def prior(law, sigma_min=SIGMA_MIN, **settings):
    return ScorePrior(Flow(law, law.moments(), sigma_min=sigma_min, **settings))


def components(law):
    law = at_level(law, SIGMA_MIN)
    if isinstance(law, Gaussian):
        return [(1.0, np.asarray(law.law.mean), np.asarray(law.law.covariance()))]
    covariances = law._each(Moments.covariance)
    return list(zip(*map(np.asarray, (law.weights, law.components.mean, covariances)), strict=True))


def product(*laws):
    """Log normaliser of the product of `laws`, each at `SIGMA_MIN`, and the product."""
    logs, means, covariances = [], [], []
    for terms in itertools.product(*map(components, laws)):
        precision = sum(np.linalg.inv(C) for _, _, C in terms)
        C = np.linalg.inv(precision)
        mean = C @ sum(np.linalg.inv(C) @ m for _, m, C in terms)
        log = mean @ precision @ mean + np.linalg.slogdet(2 * np.pi * C)[1]
        for weight, m, C_i in terms:
            log += 2 * np.log(weight) - m @ np.linalg.inv(C_i) @ m
            log -= np.linalg.slogdet(2 * np.pi * C_i)[1]
        logs.append(log / 2), means.append(mean), covariances.append(C)
    log_z = np.logaddexp.reduce(logs)
    weights = jnp.exp(jnp.asarray(logs) - log_z)
    return log_z, GaussianMixture.full(weights, jnp.asarray(means), jnp.asarray(covariances))


GAUSSIAN_PRIOR, MIXTURE_PRIOR = prior(GAUSSIAN), prior(MIXTURE)
SQUARE = {"squared mixture": ({MIXTURE_PRIOR: 2.0}, (MIXTURE, MIXTURE))}
CASES = SQUARE | {
    "squared Gaussian": ({GAUSSIAN_PRIOR: 2.0}, (GAUSSIAN, GAUSSIAN)),
    "product": ({GAUSSIAN_PRIOR: 1.0, MIXTURE_PRIOR: 1.0}, (GAUSSIAN, MIXTURE)),
}


def model(law, seen=False):
    x = numpyro.sample("x", law)
    if seen:
        numpyro.sample("y", dist.Normal(A_G @ x, SD_G).to_event(1), obs=Y_G)


def truth(laws, seen):
    log_z, law = product(*laws)
    if not seen:
        return log_z, law
    noise = SD_G**2 * jnp.eye(1)
    return log_z + float(law.log_evidence(A_G, Y_G, noise)), law.posterior(A_G, Y_G, noise)


def run(law, seen=False, **settings):
    """Draws [n, 2], and evidences [group]."""
    engine = FeynmanKac(**{"num_particles": 2000, "num_groups": 10} | settings)
    draws = engine.run(Problem.from_model(model, law, seen), KEY, progress=False)
    x = np.asarray(draws.positions["x"])
    return x.reshape(-1, *x.shape[2:]), np.asarray(draws.extra["group_log_evidence"][1])


def check_normaliser(groups, log_z, *, error, power=0.25):
    """Within `error`, that of the steps, and five standard errors, none blind to `power`."""
    se = groups.std(ddof=1) / len(groups) ** 0.5
    require_power(se, power, bias=1.0)
    assert abs(groups.mean() - log_z) < error + 5 * se


def check_moments(x, law, *, share=1.0, bias=0.15):
    """`share` of the draws count as independent."""
    moments = law.moments()
    assert_mean(x, moments.mean, ess=share * len(x), bias=bias)
    assert_cov(x, moments.covariance(), ess=share * len(x), bias=bias)


@pytest.mark.parametrize("seen", [False, True], ids=["prior", "posterior"])
@pytest.mark.parametrize("name", CASES)
def test_the_law_and_the_normaliser_are_exact(name, seen):
    factors, laws = CASES[name]
    log_z, law = truth(laws, seen)
    x, groups = run(compose(factors), seen)
    check_normaliser(groups, log_z, error=0.02)
    check_moments(x, law, share=0.3, bias=0.25)


@pytest.mark.parametrize("seen", [False, True], ids=["prior", "posterior"])
def test_with_tempered_noise_the_law_of_one_mode_is_exact(seen):
    factors, laws = CASES["squared Gaussian"]
    log_z, law = truth(laws, seen)
    x, groups = run(compose(factors), seen, noise=fk.TemperedNoise())
    check_normaliser(groups, log_z, error=0.02)
    check_moments(x, law, share=0.3, bias=0.25)


def test_forty_steps_are_right_to_second_order():
    """A chain of first order is nine per cent off in the covariance."""
    x, groups = run(compose({GAUSSIAN_PRIOR: 1.0}), num_steps=40, num_particles=5000)
    check_moments(x, at_level(GAUSSIAN, SIGMA_MIN), bias=0.05)
    np.testing.assert_allclose(groups, 0.0, atol=1e-3)


def test_scores_added_without_weights_are_not_the_product():
    """The negative control: the same moves, all weights equal."""
    factors, laws = CASES["squared mixture"]
    composed = compose(factors).composed(100, control=fk.NoControl())
    state, _ = jax.jit(lambda key: fk.run(composed.model(), fk.Resampling(0.0), 8000, key))(KEY)
    law = product(*laws)[1]
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_moments(np.asarray(state.particles), law)


def grid_truth(factors, points=20_001):
    """Log normaliser, mean and variance of a one-dimensional composition, on a grid."""
    x = jnp.linspace(-12, 12, points)
    laws = [at_level(factor.flow.denoiser, factor.sigma_min) for factor in factors]
    terms = [jax.vmap(lambda x, law=law: law.log_prob(x, 0.0))(x[:, None]) for law in laws]
    log = sum(beta * term for beta, term in zip(factors.values(), terms, strict=True))
    density = np.exp(np.asarray(log))
    z = density.sum() * (x[1] - x[0])
    mean = (density * x).sum() / density.sum()
    return np.log(z), mean, (density * (x - mean) ** 2).sum() / density.sum()


def line(weights, means, sds):
    means, variances = jnp.asarray(means)[:, None], jnp.square(jnp.asarray(sds))[:, None]
    return prior(GaussianMixture.diagonal(jnp.asarray(weights), means, variances), sigma_max=30.0)


THREE = line([0.3, 0.2, 0.5], [-2.0, 0.5, 2.0], [0.4, 0.3, 0.7])
LEFT, RIGHT = line([0.5, 0.5], [1.5, -1.5], [0.9, 0.9]), line([0.3, 0.7], [-1.2, 1.6], [0.5, 0.6])
LINES = {
    "annealed": {THREE: 3.0},
    "flattened": {THREE: 0.5},
    "product": {LEFT: 1.0, RIGHT: 1.0},
    "geometric mean": {LEFT: 0.5, RIGHT: 0.5},
    "guidance": {LEFT: -1.0, RIGHT: 2.0},
}


@pytest.mark.filterwarnings("ignore:k-hat")
@pytest.mark.parametrize("name", LINES)
def test_one_dimension_within_two_hundredths_at_200_steps(name):
    """The unit problems of the notes on correctors, with variance control."""
    log_z, mean, variance = grid_truth(LINES[name])
    x, groups = run(compose(LINES[name]), num_steps=200)
    assert abs(groups.mean() - log_z) < 0.02
    check_normaliser(groups, log_z, error=0.01)
    assert_mean(x, [mean], ess=0.3 * len(x), bias=0.1)
    assert_cov(x, [[variance]], ess=0.3 * len(x), bias=0.15)


@pytest.mark.parametrize("control", [fk.VarianceControl(), fk.NoControl()], ids=repr)
@pytest.mark.parametrize("weight", [fk.Euler(), fk.KernelRatio()], ids=repr)
def test_every_weight_tends_to_the_truth(weight, control):
    factors = LINES["geometric mean"]
    settings = {"num_steps": 150, "num_particles": 1000}
    _, groups = run(compose(factors), weight=weight, control=control, **settings)
    log_z, *_ = grid_truth(factors)
    check_normaliser(groups, log_z, error=0.008, power=0.03)


def test_variance_control_flattens_the_weights():
    factors, laws = CASES["squared mixture"]
    log_z, _ = truth(laws, False)
    errors = {}
    for control in (fk.VarianceControl(), fk.NoControl()):
        _, groups = run(compose(factors), control=control)
        errors[type(control)] = np.sqrt(np.mean((groups - log_z) ** 2))
    assert 10 * errors[fk.VarianceControl] < errors[fk.NoControl]


def test_draws_and_density_of_the_distribution():
    factors, laws = CASES["product"]
    composition, (log_z, law) = compose(factors), product(*laws)
    x = composition.sample(KEY, (4, 2000))
    assert x.shape == (4, 2000, 2)
    check_moments(np.asarray(x).reshape(-1, 2), law, share=0.5, bias=0.25)
    points = x[0, :5]
    exact = jax.vmap(lambda x: law.log_prob(x, 0.0))(points) + log_z
    np.testing.assert_allclose(composition.log_prob(points), exact, atol=0.02)
    np.testing.assert_allclose(
        composition.log_ratio(points),
        composition.log_prob(points) - composition.reference.log_prob(points),
        atol=1e-10,
    )
    again = jax.jit(lambda law, x: law.log_prob(x))(composition, points)
    np.testing.assert_allclose(again, composition.log_prob(points), rtol=1e-10)
    assert "unnormalised" in repr(composition)


def test_a_reference_to_the_power_one_is_not_solved_for():
    first, second = CASES["product"][0]
    points = second.sample(KEY, (3,))
    scored = ScorePrior(first.flow, density=ScoreOnly())
    composition = compose({scored: 1.0, second: 1.0})
    expected = second.log_prob(points)
    np.testing.assert_allclose(composition.log_ratio(points), expected, rtol=1e-12)
    traced = jax.jit(lambda x: composition.log_ratio(x))(points)
    np.testing.assert_allclose(traced, expected, rtol=1e-10)
    np.testing.assert_array_equal(compose({scored: 1.0}).log_ratio(points), np.zeros(3))


def test_a_compiled_function_may_hold_a_composition():
    composition = compose(CASES["product"][0])
    points = jnp.zeros((3, 2))
    compiled = jax.jit(lambda x: composition.log_prob(x))(points)
    np.testing.assert_allclose(compiled, composition.log_prob(points), rtol=1e-10)


def small(factors):
    """The same factors with a short flow, for engines that solve it often."""
    flow = {"sigma_max": 10.0, "solver": FixedGrid(8)}
    return compose({prior(p.flow.denoiser, **flow): beta for p, beta in factors.items()})


def compilations(caplog, function):
    caplog.clear()
    with jax.log_compiles():
        function()
    return sum("Compiling" in record.getMessage() for record in caplog.records)


def test_a_second_composition_runs_the_program_of_the_first(caplog):
    """Of the same shapes; other data of a model are data, and a likelihood is compiled in."""

    def draw(shift, num_particles=50):
        law = GaussianMixture.full(
            MIXTURE.weights, MIXTURE.components.mean + shift, MIXTURE._each(Moments.covariance)
        )
        composed = compose({prior(law, solver=FixedGrid(8)): 2.0})
        engine = FeynmanKac(None, num_particles=num_particles, num_steps=60)
        return infer(lambda: model(composed), engine, key=KEY, progress=False)

    first = draw(0.0).posterior["x"].values.mean()
    assert compilations(caplog, lambda: draw(2.0)) < 2  # small change, none of the three programs
    assert abs(draw(2.0).posterior["x"].values.mean() - first - 2) < 0.5
    assert compilations(caplog, lambda: draw(2.0, 51)) >= 3


def test_values_of_a_composition_need_no_density(monkeypatch):
    problem = Problem.from_model(model, compose({MIXTURE_PRIOR: 2.0}))

    def solved(self, value):
        raise AssertionError("the density was asked for")

    monkeypatch.setattr(Composition, "log_ratio", solved)
    position = problem.initial(KEY)
    x = problem.constrain(position)["x"]
    np.testing.assert_allclose(x, MIXTURE_PRIOR.transforms[0](position["x"]))
    with pytest.raises(AssertionError, match="asked for"):
        problem.log_density(position)


def test_any_engine_solves_the_same_problem():
    factors, laws = CASES["squared Gaussian"]
    log_z, law = truth(laws, True)
    problem = Problem.from_model(model, small(factors), True)
    draws = TemperedSMC(500, num_groups=4).run(problem, KEY, progress=False)
    estimate, se = (float(draws.extra[name][1]) for name in ("log_evidence", "log_evidence_se"))
    assert abs(estimate - log_z) < 5 * se + 0.02
    assert se < 0.1
    u = draws.positions["x"]
    x = jax.vmap(jax.vmap(problem.constrain))(draws.positions)["x"]
    assert u.shape == x.shape
    check_moments(np.asarray(x).reshape(-1, 2), law, share=0.5, bias=0.35)


def test_in_a_numpyro_model_with_other_sites_and_plates():
    def scene(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with numpyro.plate("events", 2):
            x = numpyro.sample("x", small(CASES["product"][0]))
        numpyro.sample("y", dist.Normal(x, scale).to_event(2), obs=y)

    y = jnp.array([[0.3, -0.4], [0.9, 0.1]])
    problem = Problem.from_model(scene, y)
    position = problem.initial(KEY)
    values = problem.constrain(position)
    composition = problem.trace(values)["x"]["fn"].base_dist
    ratio = composition.log_ratio(values["x"]).sum()
    expected = norm.logpdf(y, values["x"], values["scale"]).sum() + ratio
    np.testing.assert_allclose(problem.log_likelihood(position), expected, rtol=1e-8)
    back = problem.unconstrain(values)
    np.testing.assert_allclose(back["x"], position["x"], atol=1e-3)
    tree = infer(scene, NUTS(5, 5, 1), y, key=KEY, progress=False)
    assert np.isfinite(tree.posterior["x"]).all()


def rare(law, tau):
    def event():
        x = numpyro.sample("x", law)
        numpyro.factor("event", jnp.where(x[0] > tau, 0.0, -jnp.inf))

    return event


def tail(law, tau):
    return sum(
        weight * norm.sf(tau, mean[0], np.sqrt(C[0, 0])) for weight, mean, C in components(law)
    )


@pytest.mark.parametrize("tau", [3.0, 3.4])
def test_rare_events_have_their_probability(tau):
    """By clouds of 1,000."""
    exact = float(tail(MIXTURE, tau))
    engine = FeynmanKac(Exceeds(lambda x: x[0], tau), 1000, 40, 100)
    problem = Problem.from_model(rare(MIXTURE_PRIOR, tau))
    draws = engine.run(problem, KEY, progress=False)
    ratio = np.exp(np.asarray(draws.extra["group_log_evidence"][1])) / exact
    check_normaliser(ratio, 1.0, error=0.02)
    assert (np.asarray(draws.positions["x"])[..., 0] > tau).all()


def test_a_condition_that_nothing_meets_is_an_error():
    problem = Problem.from_model(rare(MIXTURE_PRIOR, 60.0))
    with pytest.raises(FloatingPointError, match="zero at all 400 particles"):
        FeynmanKac(None, 100, 4, 20).run(problem, KEY, progress=False)


def test_steering_by_any_likelihood():
    """Counts of a Poisson law: nothing is Gaussian and nothing linear."""
    y = 4

    def counts():
        x = numpyro.sample("x", THREE)
        numpyro.sample("y", dist.Poisson(jnp.exp(x[0])), obs=y)

    points = jnp.linspace(-8, 8, 8001)
    law = at_level(THREE.flow.denoiser, SIGMA_MIN)
    log = jax.vmap(lambda x: law.log_prob(x[None], 0.0))(points)
    log = log + dist.Poisson(jnp.exp(points)).log_prob(y)
    weights = jax.nn.softmax(log)
    mean = float(weights @ points)
    log_z = float(jax.nn.logsumexp(log) + jnp.log(points[1] - points[0]))
    problem = Problem.from_model(counts)
    for guidance in (Steering(0.5), Steering(0.5, follow=False), None):
        draws = FeynmanKac(guidance, 2000, 10).run(problem, KEY, progress=False)
        groups = np.exp(np.asarray(draws.extra["group_log_evidence"][1]) - log_z)
        check_normaliser(groups, 1.0, error=0.01, power=0.05)
        x = np.asarray(draws.positions["x"]).reshape(-1, 1)
        assert_mean(x, [mean], ess=0.1 * len(x), bias=0.2)


def test_what_cannot_be_composed_is_refused():
    with pytest.raises(ValueError, match=r"sum to a positive number.*\[1.0, -1.5\]"):
        compose({MIXTURE_PRIOR: 1.0, GAUSSIAN_PRIOR: -1.5})
    with pytest.raises(ValueError, match="finite and not zero"):
        compose({MIXTURE_PRIOR: 0.0})
    with pytest.raises(ValueError, match="share an event shape"):
        compose({MIXTURE_PRIOR: 1.0, THREE: 1.0})
    with pytest.raises(TypeError, match="factors"):
        compose([MIXTURE_PRIOR])
    with pytest.raises(TypeError, match="factors"):
        compose({dist.Normal(): 1.0})
    narrow, wide = line([1.0], [0.0], [0.5]), line([1.0], [0.0], [2.0])
    with pytest.warns(UserWarning, match="may have no normaliser"):
        compose({wide: 2.0, narrow: -1.0})
    compose({narrow: 2.0, wide: -1.0})
    with pytest.raises(ValueError, match="num_steps must be at least"):
        compose({MIXTURE_PRIOR: 8.0}).composed(20)
    with pytest.raises(ValueError, match=r"noise must be TargetScore\(\) with weight KernelRatio"):
        compose({THREE: 2.0}).composed(200, weight=fk.KernelRatio(), noise=fk.TemperedNoise())


def test_engines_that_cannot_take_a_composition_say_so():
    law = compose(CASES["product"][0])
    problem = Problem.from_model(model, law, True)
    with pytest.raises(ValueError, match=r"'x' is a Composition.*non-centred"):
        problem.centred()
    with pytest.raises(ValueError, match="got a Composition.*FeynmanKac"):
        Guided(TMPD(), 10).run(problem, KEY)

    def both():
        model(MIXTURE_PRIOR, True)
        numpyro.factor("reward", 1.0)

    with pytest.raises(ValueError, match=r"no other factor of the density, got \['reward'\]"):
        FeynmanKac(TMPD()).run(Problem.from_model(both), KEY)
    no_data = Problem.from_model(model, MIXTURE_PRIOR)
    with pytest.raises(ValueError, match="needs an observed site or a factor"):
        FeynmanKac(Exceeds(lambda x: x[0], 1.0)).run(no_data, KEY)
    with pytest.raises(TypeError, match="control"):
        FeynmanKac(control=True)
    with pytest.raises(TypeError, match="weight"):
        FeynmanKac(weight="trapezoid")
    assert isinstance(law, Composition)
