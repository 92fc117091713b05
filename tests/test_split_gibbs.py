"""`SplitGibbs`: its stationary law in closed form, smoothed and not, with other latent sites."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
import scoreprior._run as run_module
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M, at_level
from scoreprior.denoise import AbstractDenoiser
from scoreprior.density import ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.infer import infer
from scoreprior.mcmc import SplitGibbs
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from stats import assert_cov, assert_masses, assert_mean, assert_mean_of_chains

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(8)
RHO = 0.7
OUTSIDE = "outside 5 standard errors"


def build(denoiser, sigma_min):
    flow = Flow(denoiser, denoiser.moments(), sigma_min=sigma_min, solver=FixedGrid(1))
    return ScorePrior(flow, ScoreOnly())


def line(prior):
    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(A_G @ x, SD_G).to_event(1), obs=y)

    return Problem.from_model(model, Y_G)


def smoothed(law, posterior, rho):
    """Mean and covariance of the clean half, of `law`, where `posterior` is that of the noisy."""
    mean, cov = oracles.moments(law)
    noisy_mean, noisy_cov = posterior
    K = cov @ np.linalg.inv(cov + rho**2 * np.eye(len(mean)))
    return mean + K @ (noisy_mean - mean), K @ noisy_cov @ K.T + rho**2 * K


def draw(engine, problem, checkpoint=None):
    return engine.run(problem, KEY, progress=False, checkpoint=checkpoint)


# Chains forget their start by a factor of 0.75 per sweep: after 25 nothing is left of it.
MANY = {"num_warmup": 25, "num_samples": 1, "num_chains": 12_000, "num_steps": 12}


def test_the_clean_half_has_the_law_that_the_docstring_states():
    law = at_level(GAUSSIAN, 0.1)
    noisy = oracles.moments(at_level(law, RHO).posterior(A_G, Y_G, SD_G**2 * jnp.eye(1)))
    mean, cov = smoothed(law, noisy, RHO)
    problem = line(build(GAUSSIAN, 0.1))
    x = draw(SplitGibbs(RHO, **MANY, rho_max=1.0), problem).positions["x"][:, 0]
    assert_mean(x, mean, bias=0.1)
    assert_cov(x, cov, bias=0.1)
    exact = oracles.moments(law.posterior(A_G, Y_G, SD_G**2 * jnp.eye(1)))
    with pytest.raises(AssertionError, match=OUTSIDE):
        assert_mean(x, exact[0], bias=0.1)
    with pytest.raises(AssertionError, match=OUTSIDE):
        assert_cov(x, exact[1], bias=0.1)


def test_without_rho_min_the_draws_are_of_the_posterior():
    """A mixture, whose levels below `sigma_min` the clean half takes."""
    sigma_min = 0.6
    problem = Problem.from_model(plane, build(MIXTURE, sigma_min), Y_M)
    exact = at_level(MIXTURE, sigma_min).posterior(A_M, Y_M, COV_M)
    x = draw(SplitGibbs(**MANY, rho_max=1.5), problem).positions["x"][:, 0]
    mean, cov = oracles.moments(exact)
    assert_mean(x, mean, bias=0.1)
    assert_cov(x, cov, bias=0.1)
    assert_masses(np.exp(jax.vmap(exact.log_responsibilities)(x)), exact.weights)
    wrong = MIXTURE.posterior(A_M, Y_M, COV_M)
    with pytest.raises(AssertionError, match=OUTSIDE):
        assert_cov(x, oracles.moments(wrong)[1], bias=0.1)


def plane(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.MultivariateNormal(A_M @ x, COV_M), obs=y)


A_S = jnp.array([[1.0, 0.2], [-0.3, 1.0], [1.0, 0.5], [0.4, -0.8], [0.1, 0.9], [-1.0, 0.6]])
Y_S = jnp.array([1.4, -0.6, 2.0, 1.5, -0.8, -0.4])


def unknown(prior, y):
    """The gain and the offset of the operator and the scale of the noise are unknown."""
    gain = numpyro.sample("gain", dist.Normal(1.0, 0.4))
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(gain * (A_S @ x) + 0.3, scale).to_event(1), obs=y)


def on_a_grid(law, num=61):
    """Weights of `gain` and `scale` on a grid given the data, and means of the event given both."""
    gains, logs = jnp.linspace(-0.8, 2.8, num), jnp.linspace(-2.5, 1.5, num)
    gain, log_scale = (grid.ravel() for grid in jnp.meshgrid(gains, logs))

    def at(gain, log_scale):
        observation = gain * A_S, Y_S - 0.3, jnp.exp(2 * log_scale) * jnp.eye(6)
        log_prior = -0.5 * (((gain - 1) / 0.4) ** 2 + ((log_scale + 0.5) / 0.5) ** 2)
        posterior = law.posterior(*observation).moments()
        return log_prior + law.log_evidence(*observation), posterior.mean

    log_weights, means = jax.jit(jax.vmap(at))(gain, log_scale)
    return jax.nn.softmax(log_weights), jnp.stack([gain, jnp.exp(log_scale)], 1), means


# A few trajectories in tens of thousands leave a noise level that is very low.
@pytest.mark.filterwarnings("ignore:.* sweeps diverged")
@pytest.mark.parametrize("rho_min", [None, RHO])
def test_the_gain_and_the_noise_are_drawn_with_the_event(rho_min):
    """Against a grid: first and second moments of the nuisances, and the mean of the event."""
    sigma_min = 0.6 if rho_min is None else 0.1
    prior = build(GAUSSIAN, sigma_min)
    law = at_level(GAUSSIAN, sigma_min)
    noisy = law if rho_min is None else at_level(law, RHO)
    weights, nuisances, means = on_a_grid(noisy)
    mean = weights @ means
    if rho_min is not None:
        mean, _ = smoothed(law, (np.asarray(mean), np.eye(2)), RHO)
    problem = Problem.from_model(unknown, prior, Y_S)
    settings = {"rho_max": 1.0, "num_steps": 12, "num_nuts_steps": 2, "target_accept": 0.9}
    draws = draw(SplitGibbs(rho_min, 80, 20, 500, **settings), problem)
    found = np.stack([draws.positions["gain"], np.exp(draws.positions["scale"])], -1)
    assert_mean_of_chains(found, weights @ nuisances, bias=0.15)
    assert_mean_of_chains(found**2, weights @ nuisances**2, bias=0.15)
    assert_mean_of_chains(draws.positions["x"], mean, bias=0.15)
    # The smoothing counts: the posterior without it has another noise level.
    other, nuisances, _ = on_a_grid(GAUSSIAN)
    with pytest.raises(AssertionError, match=OUTSIDE):
        assert_mean_of_chains(found, other @ nuisances, bias=0.15)


def test_the_conditional_is_the_density_less_that_of_the_prior():
    prior = ScorePrior(build(GAUSSIAN, 0.1).flow)
    problem = Problem.from_model(unknown, prior, Y_S).centred()
    position = problem.initial(KEY)
    expected = problem.log_density(position) - prior.log_prob(position["x"])
    np.testing.assert_allclose(problem.log_conditional(position), expected, rtol=1e-9)
    without = Problem.from_model(unknown, build(GAUSSIAN, 0.1), Y_S).centred(with_value=False)
    np.testing.assert_allclose(without.log_conditional(position), expected, rtol=1e-9)


def images(y, mask):
    """Two images in a plate, some pixels of which are not seen."""
    prior = build(GAUSSIAN, 0.1)

    def model():
        with numpyro.plate("image", 2):
            x = numpyro.sample("x", prior)
            with numpyro.plate("pixel", 2, dim=-2), numpyro.handlers.mask(mask=mask):
                numpyro.sample("y", dist.Normal(2.0 * x.T + 0.3, SD_G), obs=y)

    return Problem.from_model(model)


def test_images_in_a_plate_with_a_mask():
    y = jnp.array([[0.4, jnp.nan], [1.0, 2.0]])
    mask = jnp.isfinite(y)
    x = draw(SplitGibbs(RHO, **MANY, rho_max=1.0), images(y, mask)).positions["x"][:, 0]
    law = at_level(GAUSSIAN, 0.1)
    for image in range(2):
        seen = np.asarray(mask[:, image])
        data = 2.0 * jnp.eye(2)[seen], y[seen, image] - 0.3, SD_G**2 * jnp.eye(seen.sum())
        mean, cov = smoothed(law, oracles.moments(at_level(law, RHO).posterior(*data)), RHO)
        assert_mean(x[:, image], mean, bias=0.1)
        assert_cov(x[:, image], cov, bias=0.1)
    assert abs(np.corrcoef(x[:, 0, 0], x[:, 1, 0])[0, 1]) < 5 / np.sqrt(len(x))


def test_rho_falls_in_the_warm_up_and_then_stays():
    engine = SplitGibbs(0.3, 4, 3, 2, rho_max=0.8, decay=0.7, num_steps=2)
    problem = line(build(GAUSSIAN, 0.1))
    draws = draw(engine, problem)
    np.testing.assert_allclose(draws.stats["rho"], 0.3)
    state = engine.first(problem, engine.begin(engine.form(problem), KEY, engine.init), KEY)
    for number, rho in enumerate([0.8, 0.56, 0.392, 0.3, 0.3]):
        _, outputs = engine.step(engine.form(problem), state, KEY, jnp.asarray(number))
        np.testing.assert_allclose(outputs["stats"]["rho"], rho)


class Interrupting(run_module.tqdm):
    """A progress bar during whose second update the user presses Ctrl-C."""

    def update(self, n=1):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        return super().update(n)


@pytest.mark.filterwarnings("ignore:.* sweeps diverged")
def test_an_interrupted_run_keeps_its_draws_and_resumes_bit_for_bit(monkeypatch, tmp_path):
    problem = Problem.from_model(unknown, build(GAUSSIAN, 0.1), Y_S)
    engine = SplitGibbs(RHO, 4, 20, 3, rho_max=1.0, num_steps=2, max_tree_depth=2, chunk_size=8)
    reference = draw(engine, problem)
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted"):
        partial = draw(engine, problem, tmp_path / "run")
    kept = partial.positions["scale"]
    assert 0 < kept.shape[1] < 20
    np.testing.assert_array_equal(kept, reference.positions["scale"][:, : kept.shape[1]])
    monkeypatch.undo()
    resumed = draw(engine, problem, tmp_path / "run")
    for group in ("positions", "stats"):
        both = getattr(resumed, group), getattr(reference, group)
        jax.tree.map(np.testing.assert_array_equal, *both)
    other = SplitGibbs(0.8, 4, 20, 3, rho_max=1.0, num_steps=2, max_tree_depth=2)
    with pytest.raises(ValueError, match=r"is of another run, it differs in rho_min \(0.7 there"):
        draw(other, problem, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.* sweeps diverged")
def test_the_tree_holds_the_event_and_the_nuisances_in_their_own_space():
    engine = SplitGibbs(RHO, 4, 5, 2, rho_max=1.0, num_steps=2, max_tree_depth=2)
    tree = infer(unknown, engine, build(GAUSSIAN, 0.1), Y_S, key=KEY, progress=False)
    assert tree["posterior"]["x"].shape == (2, 5, 2)
    assert (tree["posterior"]["scale"].values > 0).all()
    assert tree["sample_stats"]["log_likelihood"].shape == (2, 5)


GAUSS = build(GAUSSIAN, 0.1)


def seen(mean, noise=lambda x: 1.0, prior=lambda shift: GAUSS, extra=lambda x, shift: None):
    def model():
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", prior(shift))
        extra(x, shift)
        numpyro.sample("y", dist.Normal(mean(x), noise(x)).to_event(1), obs=jnp.ones(2))

    return model


def moved(shift):
    flow = Flow(Moved(GAUSSIAN, shift), GAUSSIAN.moments(), sigma_min=0.1, solver=FixedGrid(1))
    return ScorePrior(flow, ScoreOnly())


class Moved(AbstractDenoiser):
    inner: AbstractDenoiser
    shift: jax.Array

    def __call__(self, x, sigma, context=None):
        return self.shift + self.inner(x - self.shift, sigma)


def two_data():
    x = numpyro.sample("x", GAUSS)
    for name in ("y", "w"):
        numpyro.sample(name, dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(2))


class Floor(AbstractDenoiser):
    """A denoiser that is defined from 0.1 up."""

    @property
    def level_range(self):
        return 0.1, np.inf

    def __call__(self, x, sigma, context=None):
        return GAUSSIAN(x, sigma)


def floored():
    flow = Flow(Floor(), GAUSSIAN.moments(), sigma_min=0.1, sigma_max=10.0, solver=FixedGrid(1))
    x = numpyro.sample("x", ScorePrior(flow, ScoreOnly()))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(2))


def factor(x, shift):
    numpyro.factor("tilt", -jnp.sum(x**4))


def site(x, shift):
    numpyro.sample("other", dist.Normal(x[0], 1.0))


SPLIT = SplitGibbs(0.5)


@pytest.mark.parametrize(
    ("engine", "model", "match"),
    [
        (SPLIT, two_data, r"one observed site, got prior sites \['x'\] and .*\['y', 'w'\]"),
        (SPLIT, seen(jnp.square), "mean of observed site 'y' that is affine in 'x'"),
        (SPLIT, seen(lambda x: x, lambda x: jnp.exp(x)), "in the mean of 'y' alone"),
        (SPLIT, seen(lambda x: x, extra=factor), "in the mean of 'y' alone"),
        (SPLIT, seen(lambda x: x, extra=site), "in the mean of 'y' alone"),
        (SPLIT, seen(lambda x: x, prior=moved), "prior at site 'x' that does not depend on other"),
        (
            SplitGibbs(),
            floored,
            "rho_min must be given for a denoiser .* 0.1 up, .* got None",
        ),
        (SplitGibbs(0.01, 20), seen(lambda x: x), r"num_warmup must be at least 46, .* got 20"),
        (SplitGibbs(20.0), seen(lambda x: x), "rho_max must lie below sigma_max .* got 20"),
    ],
)
def test_models_that_cannot_be_treated_fail_before_any_work(engine, model, match):
    with pytest.raises(ValueError, match=match):
        draw(engine, Problem.from_model(model))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rho_min": -1.0}, "rho_min must be a positive finite number, got -1.0"),
        ({"rho_min": 0.5, "rho_max": 0.2}, "rho_max must be at least rho_min = 0.5, got 0.2"),
        ({"decay": 1.0}, "decay must be between 0 and 1, got 1.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_nuts_steps": 0}, "num_nuts_steps must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        SplitGibbs(**settings)
