"""Every kernel draws from the right posterior, from wherever its chains start."""

import functools
import re
from pathlib import Path

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.mcmc.slice import SliceState

import oracles
import scoreprior as sp
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M
from scoreprior._run import Checkpoint
from scoreprior._slice import slice_line
from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.mcmc import (
    HMC,
    MALA,
    Barker,
    DynamicHMC,
    EllipticalSlice,
    GivenValues,
    GuideDraws,
    LatentGaussian,
    PriorDraws,
    RandomWalk,
    Slice,
)
from scoreprior.mcmc.gaussian_prior import log_factor, standardisation
from scoreprior.mcmc.start import start_chains
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from stats import (
    assert_cov,
    assert_cov_of_chains,
    assert_masses,
    assert_mean_of_chains,
    assert_proportion,
    chain_ess,
)

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(5)


def build(denoiser, num_steps=8):
    return ScorePrior(
        Flow(denoiser, denoiser.moments(), sigma_min=0.1, solver=FixedGrid(num_steps))
    )


GAUSS, MIX = build(GAUSSIAN, 1), build(MIXTURE)


def two_priors(y_g, y_m):
    g = numpyro.sample("g", GAUSS)
    m = numpyro.sample("m", MIX)
    numpyro.sample("y_g", dist.Normal(A_G @ g, SD_G).to_event(1), obs=y_g)
    numpyro.sample("y_m", dist.MultivariateNormal(A_M @ m, COV_M), obs=y_m)


def unknown_scale(y):
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with numpyro.plate("image", len(y)):
        x = numpyro.sample("x", MIX)
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


Y = jnp.array([[-1.2, 0.3], [1.5, -1.4]])


@functools.cache
def problem(model):
    """One object for each model, so that its compiled programs are shared."""
    data = {two_priors: (Y_G, Y_M), unknown_scale: (Y,), line: (LINE_Y,)}
    return Problem.from_model(model, *data[model])


@functools.cache
def constrain(of):
    return jax.jit(jax.vmap(jax.vmap(of.constrain)))


def draws(of, engine):
    result = engine.run(of, KEY, progress=False)
    return result, jax.tree.map(np.asarray, constrain(of)(result.positions))


def check_two_priors(values, bias, scale=1.0):
    """Against the closed form for noise levels `scale` times those of the model."""
    exact_g = oracles.posterior(GAUSS, A_G, Y_G, jnp.eye(1) * (scale * SD_G) ** 2)
    exact_m = oracles.posterior(MIX, A_M, Y_M, scale**2 * COV_M)
    for chains, exact in ((values["g"], exact_g), (values["m"], exact_m)):
        mean, covariance = oracles.moments(exact)
        assert_mean_of_chains(chains, mean, bias=bias)
        assert_cov_of_chains(chains, covariance, bias=bias)
    m = values["m"]
    memberships = np.exp(jax.vmap(exact_m.log_responsibilities)(m.reshape(-1, 2)))
    ess = chain_ess(memberships.reshape(*m.shape[:2], 2)).min()
    assert_masses(memberships, exact_m.weights, ess=ess, bias=bias)


# Kernels differ in the effective size of as many draws, and so in the bias that a test can see.
KERNELS = {
    # At 0.8 some trajectories would take half a period: they negate `x`, and keep its square.
    "HMC": (HMC(150, 300, 64, num_leapfrog=3, target_accept=0.9), 0.13),
    "DynamicHMC": (DynamicHMC(150, 300, 64, num_leapfrog=3), 0.13),
    "MALA": (MALA(150, 400, 64), 0.15),
    "Barker": (Barker(200, 400, 128), 0.15),
    "RandomWalk": (RandomWalk(300, 500, 256, dense_mass=True), 0.2),
    "Slice": (Slice(150, 400, 128), 0.15),
    "EllipticalSlice": (EllipticalSlice(100, 500, 128), 0.2),
    "LatentGaussian": (LatentGaussian(150, 500, 128), 0.2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_posterior_of_a_gaussian_and_a_mixture_prior(name):
    engine, bias = KERNELS[name]
    of = problem(two_priors)
    result, values = draws(of, engine)
    check_two_priors(values, bias)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_two_priors(values, bias, scale=0.7)
    last = {site: jnp.asarray(leaf[0, -1]) for site, leaf in result.positions.items()}
    np.testing.assert_allclose(result.stats["lp"][0, -1], of.log_density(last), rtol=1e-10)
    assert not result.stats.get("diverging", np.zeros(1)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [EllipticalSlice(200, 500, 256), LatentGaussian(200, 500, 256)], ids=repr
)
def test_a_latent_scale_keeps_its_own_prior(engine):
    _, values = draws(problem(unknown_scale), engine)
    scale = values["scale"][..., None]

    def check(location, width):
        exact = oracles.UnknownScale(MIX, Y, location, width, num_points=1001)
        mean, variance = exact.scale_moments()
        assert_mean_of_chains(scale, mean, bias=0.15)
        assert_cov_of_chains(scale, variance, bias=0.25)
        assert_mean_of_chains(values["x"], exact.mean(), bias=0.2)

    check(-0.5, 0.5)
    # What is drawn when the kernel's standard normal is taken for the prior of log scale.
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check(0.0, 1.0)


NAN_ENGINES = [
    EllipticalSlice(50, 100, 64),
    LatentGaussian(50, 100, 64),
    Slice(50, 100, 64),
    RandomWalk(100, 600, 64),
]


@pytest.mark.parametrize("engine", NAN_ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_density_of_nan_is_refused_and_reported(engine):
    """The likelihood is `exp(x_0)` below 0.5 and NaN above: a truncated normal about 1."""

    def model(undefined):
        x = numpyro.sample("x", LINE)
        numpyro.factor("tilt", jnp.where(x[0] < 0.5, x[0], undefined))

    with pytest.warns(UserWarning, match="NaN at a proposal of .* return minus infinity") as caught:
        result, values = draws(Problem.from_model(model, jnp.nan), engine)
    diverging = result.stats["diverging"]
    assert f"of {diverging.sum()} of {diverging.size} draws" in str(caught[0].message)
    assert 0 < diverging.sum() < diverging.size
    # The variance of x is 1.01, that of the prior at its lowest level.
    sd = np.sqrt(1.01)
    end = (0.5 - 1.01) / sd
    mean = 1.01 - sd * np.exp(jax.scipy.stats.norm.logpdf(end) - jax.scipy.stats.norm.logcdf(end))
    assert (values["x"][..., 0] < 0.5).all()
    assert_mean_of_chains(values["x"][..., :1], mean, bias=0.2)
    # Minus infinity is a value like any other.
    if not isinstance(engine, LatentGaussian):
        quiet, _ = draws(Problem.from_model(model, -jnp.inf), engine)
        np.testing.assert_array_equal(quiet.positions["x"], result.positions["x"])
        assert not quiet.stats["diverging"].any()


@pytest.mark.parametrize("hole", [(0.2, 0.8), (2.5, np.inf)], ids=["inside", "outside"])
def test_a_slice_counts_its_densities_and_sees_every_nan(hole):
    """A normal with a hole of NaN, met only in shrinking or, mostly, only in stepping out."""
    seen, found = [], []

    def at(t):
        value = jnp.where((t > hole[0]) & (t < hole[1]), jnp.nan, -0.5 * t**2)
        seen.append(float(value))
        return SliceState({"x": t}, value)

    with jax.disable_jit():
        for key in jax.random.split(KEY, 12):
            seen.clear()
            start, width = SliceState({"x": jnp.zeros(())}, jnp.zeros(())), jnp.array(3.0)
            new, moved, stats = slice_line(key, start, at, width, 4)
            assert stats["n_steps"] == len(seen)
            assert stats["diverging"] == np.isnan(seen).any()
            found.append(bool(stats["diverging"]))
            assert moved
            assert new.logdensity == seen[-1]
    assert 0 < sum(found) < len(found)


def test_an_ellipse_ends_at_a_mode_to_which_no_other_point_is_equal():
    """In single precision the level of a mode of height `1e8` is the mode, up to `u = 0.98`."""
    mode, calls = jnp.array([1.0, -0.5], jnp.float32), []

    def peak(position):
        calls.append(position)
        assert len(calls) < 500, "no point is inside"
        return jnp.float32(1e8) - 1e10 * jnp.sum((position["x"] - mode) ** 2)

    engine = EllipticalSlice()
    with jax.disable_jit():  # so that a loop without an end can be counted
        for seed in range(3):
            chain = engine.start({"x": mode}, peak)
            calls.clear()
            new, _, stats = engine.move(jax.random.key(seed), chain, peak, jnp.ones(()))
            assert new.logdensity == chain.logdensity == jnp.float32(1e8)
            assert stats["n_steps"] == len(calls)


def test_the_factor_times_the_normal_is_the_posterior():
    of = problem(unknown_scale)
    location, scale = standardisation(of, KEY)
    # The median and half the central 68 % of 1000 draws of N(-0.5, 0.5^2): standard errors of
    # sqrt(pi / 2 n) and about 1 / sqrt(n) standard deviations.
    assert abs(location["scale"] + 0.5) < 5 * 0.5 * np.sqrt(np.pi / 2000)
    assert abs(scale["scale"] / 0.5 - 0.9945) < 5 / np.sqrt(1000)
    assert not location["x"].any()
    assert (scale["x"] == 1).all()
    factor = log_factor(of, location, scale)
    ws = jax.vmap(of.initial)(jax.random.split(KEY, 5))
    zs = jax.tree.map(lambda w, m, s: m + s * w, ws, location, scale)
    normal = sum(jax.scipy.stats.norm.logpdf(w).sum(tuple(range(1, w.ndim))) for w in ws.values())
    constant = jax.vmap(factor)(ws) + normal - jax.vmap(of.log_density)(zs)
    np.testing.assert_allclose(constant, constant[0], rtol=1e-12)
    # Where all latent sites are noise of priors, the factor is the likelihood.
    of = problem(two_priors)
    ws = jax.vmap(of.initial)(jax.random.split(KEY, 5))
    constant = jax.vmap(log_factor(of, *standardisation(of, KEY)))(ws)
    constant -= jax.vmap(of.log_likelihood)(ws)
    np.testing.assert_allclose(constant, constant[0], rtol=1e-10)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize("engine", [HMC(num_leapfrog=1), MALA(), Barker(), RandomWalk()], ids=repr)
def test_steps_have_the_learned_covariance(engine, dense):
    """Where the density is flat every proposal is accepted and its covariance is seen."""
    sd = jnp.array([0.1, 10.0])
    learned = jnp.outer(sd, sd) * jnp.array([[1.0, 0.8], [0.8, 1.0]]) if dense else sd**2
    flat = lambda position: 0.0 * position["x"].sum()
    chain = engine.start({"x": jnp.zeros(2)}, flat)

    def moved(key):
        return engine.kernel(key, chain, flat, jnp.asarray(0.5), learned)[0].position["x"]

    steps = jax.jit(jax.vmap(moved))(jax.random.split(KEY, 60_000))
    assert_cov(steps, 0.25 * (learned if dense else jnp.diag(learned)))


def test_slices_are_as_wide_as_the_posterior():
    """A normal of very different scales: the learned ones make lines through it alike."""
    sd, engine = jnp.array([0.1, 10.0]), Slice()
    density = lambda position: -0.5 * jnp.sum((position["x"] / sd) ** 2)

    def one(key, learned):
        key_start, key = jax.random.split(key)
        start = engine.start({"x": sd * jax.random.normal(key_start, (2,))}, density)
        chain, _, stats = engine.kernel(key, start, density, jnp.asarray(2.5), learned)
        return chain.position["x"] / sd, stats["n_steps"]

    run = jax.jit(jax.vmap(one, (0, None)))
    moved, cost = run(jax.random.split(KEY, 12_000), sd**2)
    assert_cov(moved, jnp.eye(2), bias=0.1)
    _, unscaled = run(jax.random.split(KEY, 1000), jnp.ones(2))
    assert cost.mean() < unscaled.mean() - 5 * unscaled.std() / jnp.sqrt(len(unscaled))


def test_the_energy_is_that_of_the_draw():
    """`energy + lp` is the kinetic energy, whose mean is half the number of coordinates."""
    result, _ = draws(problem(line), HMC(60, 400, 64, num_leapfrog=2, target_accept=0.9))
    assert result.stats["acceptance_rate"].mean() < 0.95
    kinetic = (result.stats["energy"] + result.stats["lp"])[..., None]
    assert_mean_of_chains(kinetic, 1.5, bias=0.1)


def test_the_numbers_of_leapfrog_steps_are_uniform_and_shared():
    result, _ = draws(problem(line), DynamicHMC(0, 400, 3, num_leapfrog=3, step_size=0.1))
    steps = result.stats["n_steps"]
    assert (steps == steps[:1]).all()
    numbers, counts = np.unique(steps[0], return_counts=True)
    np.testing.assert_array_equal(numbers, [1, 2, 3, 4, 5])
    assert_proportion(counts, 400, np.full(5, 0.2), bias=0.2)


# Resuming


LINE = build(Gaussian(Moments(jnp.zeros(2), jnp.ones(2))), 1)
LINE_Y = jnp.array([0.5, -1.0])


def line(y):
    noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.3))
    x = numpyro.sample("x", LINE)
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


RESUMED = [
    DynamicHMC(10, 10, 2, num_leapfrog=3, chunk_size=6),
    Barker(10, 10, 2, chunk_size=6),
    Slice(10, 10, 2, chunk_size=6),
    EllipticalSlice(10, 10, 2, chunk_size=6),
    LatentGaussian(10, 10, 2, chunk_size=6),
]


@pytest.mark.parametrize("engine", RESUMED, ids=lambda engine: type(engine).__name__)
def test_a_stopped_run_resumes_bit_for_bit(engine, tmp_path, monkeypatch):
    of = problem(line)
    expected = engine.run(of, KEY, progress=False)
    save = Checkpoint.save

    def save_and_fail(self, done, state, chunks):
        save(self, done, state, chunks)
        if done == 12:
            raise RuntimeError("the power is gone")

    monkeypatch.setattr(Checkpoint, "save", save_and_fail)
    with pytest.raises(RuntimeError, match="the power is gone"):
        engine.run(of, KEY, progress=False, checkpoint=tmp_path / "run")
    monkeypatch.undo()
    resumed = engine.run(of, KEY, progress=False, checkpoint=tmp_path / "run")
    for ours, theirs in ((resumed.positions, expected.positions), (resumed.stats, expected.stats)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Where chains start


ROWS = {
    "noise": np.array([0.5, 0.6, 0.7, 0.8]),
    "x": np.array([[0.1, 0.2], [-1.0, 0.0], [0.3, 2.0], [1.0, 1.0]]),
}


def as_tree(rows):
    rows = {name: value.reshape(2, 2, *value.shape[1:]) for name, value in rows.items()}
    return az.from_dict({"posterior": {**rows, "other": np.zeros((2, 2))}})


class Guide:
    """Draws that are counted; of the first `num_bad` calls, the last chain's is NaN."""

    def __init__(self, num_bad=0):
        self.num_bad, self.calls = num_bad, 0

    def sample(self, key, num):
        self.calls += 1
        noise = jax.random.normal(key, (num, 3))
        if self.calls <= self.num_bad:
            noise = noise.at[-1].set(jnp.nan)
        return {"noise": noise[:, 0], "x": noise[:, 1:]}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("source", [ROWS, as_tree(ROWS), as_tree(ROWS)["posterior"].dataset],
                         ids=["arrays", "tree", "dataset"])  # fmt: skip
def test_chains_start_at_given_values(source, centred):
    of = problem(line)
    of = of.centred() if centred else of
    for num_chains, rows in ((2, [0, 2]), (4, [0, 1, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])):
        positions = GivenValues(source).positions(of, KEY, num_chains)
        values = jax.vmap(of.constrain)(positions)
        for name, expected in ROWS.items():
            np.testing.assert_allclose(values[name], expected[rows], rtol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_chains_start_at_draws_of_a_guide(centred):
    of = problem(line)
    drawn = Guide().sample(KEY, 3)
    expected = jax.vmap(of.constrain)(drawn)
    of = of.centred() if centred else of
    values = jax.vmap(of.constrain)(GuideDraws(Guide()).positions(of, KEY, 3))
    for name in expected:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-9)


@pytest.mark.parametrize("kind", [MALA, EllipticalSlice])
def test_an_engine_starts_where_it_is_told(kind, monkeypatch):
    of = problem(line)
    seen = {}
    first = kind.first

    def record(self, problem, chains, key):
        seen.update(chains.position)
        return first(self, problem, chains, key)

    monkeypatch.setattr(kind, "first", record)
    step = {"step_size": 0.1} if kind is MALA else {}
    kind(0, 1, 4, init=GivenValues(ROWS), **step).run(of, KEY, progress=False)
    values = jax.vmap(of.constrain)(seen)
    np.testing.assert_allclose(values["x"], ROWS["x"], rtol=1e-9)
    np.testing.assert_allclose(values["noise"], ROWS["noise"], rtol=1e-9)


def test_a_bad_draw_of_a_guide_is_drawn_again():
    of, guide = problem(line), Guide(num_bad=2)
    states = start_chains(of, blackjax.nuts.init, KEY, 3, GuideDraws(guide))
    assert np.isfinite(states.logdensity).all()
    assert guide.calls == 3
    with pytest.raises(ValueError, match="1 of 3 .*each a draw of the guide tried 20 times"):
        start_chains(of, blackjax.nuts.init, KEY, 3, GuideDraws(Guide(num_bad=99)))


def test_a_given_row_without_a_density_is_named():
    rows = {**ROWS, "noise": np.array([0.5, 0.6, -1.0, 0.8])}
    with pytest.raises(ValueError, match=r"1 of 4 .*rows \[2\] of the values given"):
        MALA(1, 1, 4, init=GivenValues(rows)).run(problem(line), KEY, progress=False)


def test_a_checkpoint_knows_where_its_chains_started(tmp_path):
    of = problem(line)
    engine = MALA(0, 2, 2, step_size=0.1, init=GivenValues(ROWS))
    engine.run(of, KEY, progress=False, checkpoint=tmp_path / "run")
    other = MALA(0, 2, 2, step_size=0.1, init=GivenValues({**ROWS, "x": ROWS["x"] + 1e-3}))
    with pytest.raises(ValueError, match="differs in init "):
        other.run(of, KEY, progress=False, checkpoint=tmp_path / "run")


class Wrong:
    def __init__(self, **drawn):
        self.drawn = drawn

    def sample(self, key, num):
        return self.drawn


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: GivenValues(3), TypeError, "values must be a mapping .*got 3"),
        (lambda: GivenValues({}), TypeError, "values must be a mapping"),
        (lambda: GivenValues({"x": np.zeros((2, 2)), "noise": np.ones(3)}), ValueError,
         r"one leading axis of the same length.*\(2, 2\)"),
        (lambda: GivenValues({"noise": 1.0}), ValueError, "one leading axis"),
        (lambda: GivenValues({"x": ROWS["x"]}), ValueError, r"\['noise'\] missing"),
        (lambda: GivenValues({**ROWS, "x": ROWS["x"][:, :1]}), ValueError,
         r"site 'x' of shape \[n, 2\], got \[4, 1\]"),
        (lambda: GuideDraws(3), TypeError, r"a method sample\(key, num\), got 3"),
        (lambda: GuideDraws(Wrong(x=0.0)), ValueError, r"must draw the sites \['noise', 'x'\]"),
        (lambda: GuideDraws(Wrong(x=np.zeros((4, 3)), noise=np.ones(4))), ValueError,
         r"site 'x' of shape \[4, 2\], got \[4, 3\]"),
        (lambda: "prior", TypeError, "init must be PriorDraws.*got 'prior'"),
    ],
)  # fmt: skip
def test_bad_starts_fail_before_any_compilation(as_user, monkeypatch, build, error, match):
    monkeypatch.setattr("scoreprior.mcmc.start._states", None)
    with pytest.raises(error, match=match):
        MALA(1, 1, 4, init=build()).run(problem(line), KEY, progress=False)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: HMC(num_leapfrog=0), "num_leapfrog must be at least 1, got 0"),
        (lambda: DynamicHMC(num_leapfrog=0), "num_leapfrog must be at least 1, got 0"),
        (lambda: MALA(target_accept=0.0), "target_accept must be between 0 and 1, got 0.0"),
        (lambda: Barker(step_size=0.0), "step_size must be a positive finite number, got 0.0"),
        (lambda: RandomWalk(num_samples=0), "num_samples must be at least 1, got 0"),
        (lambda: Slice(max_expansions=0), "max_expansions must be at least 1, got 0"),
        (lambda: LatentGaussian(target_accept=2.0), "target_accept must be between 0 and 1"),
        (lambda: LatentGaussian(step_size=-1.0), "step_size must be a positive finite number"),
        (lambda: LatentGaussian(centred=True), "LatentGaussian needs the non-centred form"),
        (lambda: EllipticalSlice(centred=True), "EllipticalSlice needs the non-centred form"),
    ],
)
def test_bad_settings(as_user, build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_centred_problem_is_refused_where_the_prior_must_be_normal():
    with pytest.raises(ValueError, match="EllipticalSlice needs the non-centred form"):
        EllipticalSlice().run(problem(line).centred(), KEY, progress=False)


def test_prior_draws_are_the_default():
    of = problem(line)
    runs = [MALA(0, 2, 2, step_size=0.1, **init).run(of, KEY, progress=False)
            for init in ({}, {"init": PriorDraws()})]  # fmt: skip
    np.testing.assert_array_equal(runs[0].positions["x"], runs[1].positions["x"])


# The loop of a user


def test_the_loop_of_the_documentation_draws_the_posterior():
    text = (Path(__file__).parents[1] / "docs" / "how-to-choose.md").read_text()
    section = text.split("## Your own loop", 1)[1]
    code = re.search(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)[1]

    def model(y):
        g = numpyro.sample("g", GAUSS)
        numpyro.sample("y", dist.Normal(A_G @ g, SD_G).to_event(1), obs=y)

    names = {"sp": sp, "model": model, "y": Y_G}
    exec(code, names)
    chains = names["draws"]["g"][:, 100:]
    mean, covariance = oracles.moments(oracles.posterior(GAUSS, A_G, Y_G, jnp.eye(1) * SD_G**2))
    assert_mean_of_chains(chains, mean, bias=0.12)
    assert_cov_of_chains(chains, covariance, bias=0.15)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean_of_chains(chains, oracles.moments(oracles.at_level(GAUSSIAN, 0.1))[0])
