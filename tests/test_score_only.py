"""Engines that follow a score: what they draw in closed form, and who needs a value."""

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
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M
from scoreprior.density import FlowDensity, ScoreGradient, ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.infer import infer
from scoreprior.mcmc import (
    NUTS,
    SGHMC,
    SGLD,
    SVGD,
    AnnealedLangevin,
    Decaying,
    FlatLikelihood,
    MomentLikelihood,
    PredictorCorrector,
)
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.sample import Heun
from scoreprior.smc import TemperedSMC
from stats import assert_cov, assert_masses, assert_mean

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(5)
SIGMA_MIN = 0.1
OUTSIDE = "outside 5 standard errors"


def build(denoiser, density=None):
    flow = Flow(denoiser, denoiser.moments(), sigma_min=SIGMA_MIN, solver=FixedGrid(1))
    return ScorePrior(flow, ScoreOnly() if density is None else density)


PRIOR, MIXED = build(GAUSSIAN), build(MIXTURE)


def line(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(A_G @ x, SD_G).to_event(1), obs=y)


PROBLEM = Problem.from_model(line, Y_G)
MEAN, COV = oracles.moments(oracles.posterior(PRIOR, A_G, Y_G, jnp.eye(1) * SD_G**2))
PRECISION = np.linalg.inv(COV)


def draw(engine, problem=PROBLEM, key=KEY, checkpoint=None):
    return engine.run(problem, key, progress=False, checkpoint=checkpoint)


def wide(density):
    """Plates, a mask, a scale, two latent sites, and a prior behind a further transform."""
    prior = build(GAUSSIAN, density)
    stretch = dist.transforms.LowerCholeskyAffine(jnp.full(2, 0.3), jnp.diag(jnp.array([2.0, 0.5])))
    mask = jnp.array([True, False, True])
    y = jnp.array([[0.4, -1.0], [1.0, 2.0], [-0.2, 0.1]])

    def model():
        width = numpyro.sample("width", dist.LogNormal(-0.5, 0.4))
        shift = numpyro.sample("shift", dist.Beta(2.0, 3.0))
        z = numpyro.sample("z", dist.TransformedDistribution(prior, [stretch]))
        with numpyro.plate("image", 3):
            x = numpyro.sample("x", prior)
            with numpyro.handlers.mask(mask=mask):
                numpyro.sample("y", dist.Normal(x + shift * z, width).to_event(1), obs=y)
        with numpyro.handlers.scale(scale=2.5):
            numpyro.factor("tilt", -jnp.sum(jnp.cos(x)) * width)

    return Problem.from_model(model)


def test_the_score_is_the_gradient_of_the_centred_density():
    valued, without = wide(FlowDensity()).centred(), wide(ScoreOnly()).centred(with_value=False)
    position = valued.initial(KEY)
    expected = jax.jit(jax.grad(valued.log_density))(position)
    scores = [jax.jit(problem.score) for problem in (valued, without)]
    for score in scores:
        found = score(position, SIGMA_MIN)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)
    # The level counts, for the prior sites and for nothing else.
    other = scores[1](position, 1.5)
    assert np.abs(other["x"] - expected["x"]).max() > 0.1
    np.testing.assert_allclose(other["width"], expected["width"], rtol=1e-9)


@pytest.mark.parametrize(
    ("density", "sigma"),
    [(ScoreOnly(), 1.25 * SIGMA_MIN), (FlowDensity(gradient=ScoreGradient(0.7)), 0.7)],
)
def test_the_level_is_that_of_the_gradient_policy(density, sigma):
    problem = wide(density).centred(with_value=False)
    position = problem.initial(KEY)
    score = jax.jit(problem.score)
    found, expected = score(position), score(position, sigma)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_the_score_in_the_non_centred_form():
    problem = PROBLEM
    position = problem.initial(KEY)
    expected = jax.jit(jax.grad(problem.log_density))(position)
    found = jax.jit(problem.score)(position)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=r"sigma must be None in the non-centred form.*got 0\.2"):
        problem.score(position, 0.2)


def sgld_covariance(h):
    """`C = (I - h P) C (I - h P) + 2 h I`."""
    return np.linalg.inv(PRECISION - h * PRECISION @ PRECISION / 2)


def sghmc_covariance(h, num_steps, friction):
    """The fixed point of `num_steps` linear steps on `(x, p)` from `p ~ N(0, I)`."""
    eye, zero = np.eye(2), np.zeros((2, 2))
    M = np.block([[eye, h * eye], [-h * PRECISION, (1 - friction * h) * eye]])
    noise = np.block([[zero, zero], [zero, 2 * friction * h * eye]])
    x = COV
    for _ in range(200):
        joint = np.block([[x, zero], [zero, eye]])
        for _ in range(num_steps):
            joint = M @ joint @ M.T + noise
        x = joint[:2, :2]
    return x


CHAINS = {"num_warmup": 25, "num_samples": 1, "num_chains": 45_000, "sigma": SIGMA_MIN}
FORMULAS = {
    "SGLD": (SGLD(step_size=0.2, **CHAINS), sgld_covariance(0.2)),
    "SGHMC": (
        SGHMC(step_size=0.2, num_steps=6, friction=1.5, **CHAINS),
        sghmc_covariance(0.2, 6, 1.5),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_stationary_law_at_a_finite_step_size(name):
    engine, covariance = FORMULAS[name]
    x = draw(engine).positions["x"][:, 0]
    assert_mean(x, MEAN)
    assert_cov(x, covariance)
    with pytest.raises(AssertionError, match=OUTSIDE):
        assert_cov(x, COV)


def test_a_decaying_step_size_takes_the_bias_away():
    schedule = Decaying(0.2, offset=1.0, power=1.0)
    settings = {**CHAINS, "num_warmup": 300, "num_chains": 4000}
    draws = draw(SGLD(step_size=schedule, **settings))
    np.testing.assert_allclose(draws.stats["step_size"], 0.2 / 301)
    constant = draw(SGLD(step_size=0.2, **settings)).positions["x"][:, 0]
    decayed = draws.positions["x"][:, 0]
    error = [np.abs(np.cov(x.T) - COV).max() for x in (decayed, constant)]
    assert error[0] < error[1] / 3


def test_chains_take_other_latent_sites_and_the_tree_is_like_any():
    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with numpyro.plate("image", 2):
            x = numpyro.sample("x", PRIOR)
            numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    y = jnp.array([[-1.2, 0.3], [1.5, -1.4]])
    engine = SGLD(50, 15, 8, step_size=1e-2)
    tree = infer(model, engine, y, key=KEY, progress=False)
    assert tree["posterior"]["x"].dims == ("chain", "draw", "image", "x_dim_0")
    assert (tree["posterior"]["scale"].values > 0).all()
    assert np.isfinite(tree["posterior"]["x"].values).all()
    assert "lp" not in tree["sample_stats"]


def phi(x, score):
    """The field of SVGD, written out."""
    difference = x[:, None] - x[None]
    squares = (difference**2).sum(-1)
    median = np.median(np.sqrt(squares[np.tril_indices(len(x), -1)]))
    length = median**2 / np.log(len(x))
    kernel = np.exp(-squares / length)
    repulsion = (2 / length) * (kernel[..., None] * difference).sum(1)
    return (kernel @ score + repulsion) / len(x), kernel.sum(0)


def test_svgd_ends_at_a_fixed_point_of_the_right_posterior():
    """No closed form is known for its law, but the fixed point can be checked in full.

    There `phi = 0` at every particle. Summed over particles the repulsion cancels by symmetry, so
    for a Gaussian the mean weighted by `sum_i k(x_i, x_j)` is that of the posterior: exactly, up
    to what remains of `phi`.
    """
    engine = SVGD(30, 600, step_size=0.1, sigma=SIGMA_MIN)
    draws = draw(engine)
    x = draws.positions["x"][0]
    field, weights = phi(x, -(x - MEAN) @ PRECISION)
    size = np.sqrt((field**2).mean())
    assert size < 1e-3
    weighted = weights @ (x - MEAN) / len(x) ** 2
    bound = np.linalg.norm(COV, 2) * np.linalg.norm(field.mean(0))
    assert np.linalg.norm(weighted) <= bound * (1 + 1e-6)
    # The plain mean differs from the weighted one only by the asymmetry of the cloud.
    assert (np.abs(x.mean(0) - MEAN) < 0.1 * np.sqrt(np.diag(COV))).all()
    # The spread is too small, as documented.
    assert (np.diag(np.cov(x.T)) < 1.02 * np.diag(COV)).all()
    prior = oracles.at_level(GAUSSIAN, SIGMA_MIN)
    wrong, _ = phi(x, np.asarray(jax.vmap(lambda x: prior.score(x, 0.0))(x)))
    assert np.sqrt((wrong**2).mean()) > 100 * size
    assert draws.extra["phi"][1][-1] < 1e-3 < draws.extra["phi"][1][0]


# Names of engines to their settings: 12,000 draws see a bias of a tenth.
N = 12_000
LANGEVIN = {"num_corrector_steps": 6, "step_size": 0.5, "batch_size": N}
LIMITS = {
    "Langevin, flat": AnnealedLangevin(N, 100, **LANGEVIN),
    "Langevin, moments": AnnealedLangevin(N, 100, likelihood=MomentLikelihood(), **LANGEVIN),
    "predictor": PredictorCorrector(N, 60, num_corrector_steps=0, batch_size=N),
    "predictor and corrector": PredictorCorrector(N, 60, predictor=Heun(), batch_size=N),
}
AWAY = {
    "Langevin, few steps": AnnealedLangevin(N, 10, num_corrector_steps=1, batch_size=N),
    "predictor, flat": PredictorCorrector(
        N, 60, num_corrector_steps=0, likelihood=FlatLikelihood(), batch_size=N
    ),
}


@pytest.mark.parametrize("name", [*LIMITS, *AWAY])
def test_a_gaussian_posterior_in_the_limit_of_many_levels(name):
    x = draw((LIMITS | AWAY)[name]).positions["x"][0]
    if name in LIMITS:
        assert_mean(x, MEAN, bias=0.1)
        assert_cov(x, COV, bias=0.1)
    else:
        with pytest.raises(AssertionError, match=OUTSIDE):
            assert_cov(x, COV, bias=0.1)


def images(y, mask):
    """Two images in a plate, some pixels of which are not seen."""
    prior = build(GAUSSIAN)

    def model():
        with numpyro.plate("image", 2):
            x = numpyro.sample("x", prior)
            with numpyro.plate("pixel", 2, dim=-2), numpyro.handlers.mask(mask=mask):
                numpyro.sample("y", dist.Normal(2.0 * x.T + 0.3, SD_G), obs=y)

    return Problem.from_model(model)


def test_images_in_a_plate_with_a_mask():
    y = jnp.array([[0.4, jnp.nan], [1.0, 2.0]])
    mask = jnp.isfinite(y)
    engine = PredictorCorrector(N, 60, num_corrector_steps=0, batch_size=N)
    x = draw(engine, images(y, mask)).positions["x"][0]
    for image in range(2):
        seen = np.asarray(mask[:, image])
        A = 2.0 * jnp.eye(2)[seen]
        data, cov_y = y[seen, image] - 0.3, SD_G**2 * jnp.eye(seen.sum())
        mean, covariance = oracles.moments(oracles.posterior(PRIOR, A, data, cov_y))
        assert_mean(x[:, image], mean, bias=0.1)
        assert_cov(x[:, image], covariance, bias=0.1)
    assert abs(np.corrcoef(x[:, 0, 0], x[:, 1, 0])[0, 1]) < 5 / np.sqrt(N)


def mixed(y):
    x = numpyro.sample("x", MIXED)
    numpyro.sample("y", dist.MultivariateNormal(A_M @ x, COV_M), obs=y)


@pytest.mark.parametrize("num_levels", [100, 12])
def test_langevin_on_a_mixture_whose_modes_touch(num_levels):
    """The likelihood is wrong on all levels but the last; with many, its error is forgotten."""
    exact = oracles.posterior(MIXED, A_M, Y_M, COV_M)
    mean, covariance = oracles.moments(exact)
    engine = AnnealedLangevin(N, num_levels, **LANGEVIN)
    x = draw(engine, Problem.from_model(mixed, Y_M)).positions["x"][0]
    if num_levels == 12:
        with pytest.raises(AssertionError, match=OUTSIDE):
            assert_cov(x, covariance, bias=0.1)
        return
    assert_mean(x, mean, bias=0.1)
    assert_cov(x, covariance, bias=0.1)
    assert_masses(np.exp(jax.vmap(exact.log_responsibilities)(x)), exact.weights)


class Interrupting(run_module.tqdm):
    """A progress bar during whose second update the user presses Ctrl-C."""

    def update(self, n=1):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        return super().update(n)


SMALL = {
    "SGLD": SGLD(4, 20, 3, step_size=0.1, chunk_size=8),
    "SVGD": SVGD(8, 24, step_size=0.1, chunk_size=8),
    "PredictorCorrector": PredictorCorrector(20, 5, batch_size=8),
}


@pytest.mark.parametrize("name", SMALL)
def test_an_interrupted_run_keeps_its_draws_and_resumes_bit_for_bit(name, monkeypatch, tmp_path):
    engine, reference = SMALL[name], draw(SMALL[name])
    assert not reference.interrupted
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted"):
        partial = draw(engine, checkpoint=tmp_path / "run")
    assert partial.interrupted
    if name != "SVGD":
        kept = partial.positions["x"]
        assert 0 < kept.shape[1] < reference.positions["x"].shape[1]
        np.testing.assert_array_equal(kept, reference.positions["x"][:, : kept.shape[1]])
    monkeypatch.undo()
    resumed = draw(engine, checkpoint=tmp_path / "run")
    for group in ("positions", "stats", "extra"):
        both = dict(getattr(resumed, group)), dict(getattr(reference, group))
        jax.tree.map(np.testing.assert_array_equal, *both)
    with pytest.raises(ValueError, match="is of another run, it differs in key"):
        draw(engine, key=jax.random.key(6), checkpoint=tmp_path / "run")


def test_the_batch_size_does_not_change_the_draws():
    one, other = (draw(PredictorCorrector(20, 5, batch_size=size)) for size in (8, 20))
    np.testing.assert_allclose(one.positions["x"], other.positions["x"], rtol=1e-9)


def test_steps_that_explode_are_reported():
    with pytest.warns(UserWarning, match=r"3 of 3 chains left for infinity.* lower step_size"):
        draws = draw(SGLD(800, 10, 3, step_size=1.0, chunk_size=8))
    assert draws.stats["diverging"].all()


@pytest.mark.parametrize("engine", [NUTS(centred=True), TemperedSMC(centred=True)])
def test_what_needs_a_value_names_what_does_not(engine):
    names = "SGLD, SGHMC, SVGD, PredictorCorrector or AnnealedLangevin"
    with pytest.raises(NotImplementedError, match=f"ScoreOnly has no log_prob.*{names}"):
        draw(engine)
    with pytest.raises(NotImplementedError, match="non-centred form"):
        PROBLEM.centred()


def test_a_score_that_is_not_finite_is_an_error():
    def model():
        x = numpyro.sample("x", PRIOR)
        numpyro.factor("nan", jnp.sum(jnp.sqrt(x - 1e3)))

    match = "score is not finite at 3 of 3 starting points, each a prior draw tried 20 times"
    with pytest.raises(ValueError, match=match):
        draw(SMALL["SGLD"], Problem.from_model(model))


def seen(mean, noise=lambda x: SD_G, law=dist.Normal):
    def model():
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", law(mean(x), noise(x)).to_event(1), obs=jnp.ones(2))

    return model


def shifted():
    far = dist.transforms.LowerCholeskyAffine(jnp.ones(2), jnp.eye(2))
    x = numpyro.sample("x", dist.TransformedDistribution(PRIOR, [far]))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(2))


def two_latents():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    seen(lambda x: x, lambda x: scale)()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (seen(jnp.sin), "PredictorCorrector needs a mean of observed site 'y' that is affine in"),
        (seen(lambda x: x, jnp.exp), "noise at observed site 'y' that does not depend on 'x'"),
        (seen(lambda x: x, law=dist.Laplace), "'y' cannot be linearised: .* Laplace"),
        (two_latents, r"no other latent site, got .*\['scale'\]: SGLD, SGHMC and SVGD"),
        (shifted, "needs a ScorePrior at prior site 'x', got one behind further transforms"),
    ],
)
def test_models_that_the_samplers_along_levels_refuse(model, match):
    with pytest.raises(ValueError, match=match):
        draw(SMALL["PredictorCorrector"], Problem.from_model(model))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SGLD(step_size=0.0), ValueError, "step_size must be a positive finite number"),
        (lambda: SGLD(step_size=1, sigma=-1), ValueError, "sigma must be a positive finite"),
        (
            lambda: SGLD(step_size=1.0, sigma=0.1, centred=False),
            ValueError,
            "sigma must be None with centred=False, got 0.1",
        ),
        (lambda: SGHMC(step_size=1.0, friction=-1), ValueError, "friction must be .* got -1"),
        (lambda: SGHMC(step_size=1.0, num_steps=0), ValueError, "num_steps must be at least 1"),
        (lambda: SVGD(1, step_size=0.1), ValueError, "num_particles must be at least 2, got 1"),
        (lambda: Decaying(0.1, offset=1.0, power=2), ValueError, "power must lie in .* got 2"),
        (lambda: AnnealedLangevin(step_size=2), ValueError, "step_size must be below 2, got 2"),
        (lambda: AnnealedLangevin(9, 1), ValueError, "num_levels must be at least 2, got 1"),
        (lambda: PredictorCorrector(predictor=3), TypeError, "predictor must be a sampler"),
        (lambda: PredictorCorrector(likelihood=3), TypeError, "likelihood must be an approx"),
    ],
)
def test_bad_settings(as_user, make, error, match):
    with pytest.raises(error, match=match):
        make()
