"""Feynman-Kac models: the evidence without bias, guided posteriors against the closed form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp

import oracles
import scoreprior._run as run_module
from killing import kill_a_run
from oracles import A_G, A_M, COV_M, GAUSSIAN, MIXTURE, SD_G, Y_G, Y_M
from scoreprior import feynman_kac as fk
from scoreprior._psis import smooth
from scoreprior.compare import Clusters
from scoreprior.composition import compose
from scoreprior.flow import FixedGrid, Flow
from scoreprior.guide import NRLG, TMPD, DiffPIR, MCGDiff, PiGDM
from scoreprior.infer import infer
from scoreprior.mcmc import Guided
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.sample import Euler, HalfNoise, Heun
from scoreprior.smc import FeynmanKac, FeynmanKacModel, Resampling
from stats import GATE, assert_cov, assert_mean
from test_smc_run import Interrupting, messages
from two_priors import check_evidence, check_law

KEY = jax.random.key(7)
SIGMA_MIN = 0.1


# A Gaussian random walk seen in noise: the Kalman filter knows its evidence.
STEPS, WALK, SEEN = 6, 0.7, 0.5
DATA = jnp.array([0.3, -0.4, 0.9, 1.6, 1.2, 2.5, 2.1])


def kalman():
    mean, variance, total = 0.0, 1.0, 0.0
    for k, y in enumerate(np.asarray(DATA)):
        if k:
            variance = variance + WALK**2
        spread = variance + SEEN**2
        total += -0.5 * ((y - mean) ** 2 / spread + np.log(2 * np.pi * spread))
        gain = variance / spread
        mean, variance = mean + gain * (y - mean), variance * (1 - gain)
    return total, mean, variance


def log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - jnp.log(sd * jnp.sqrt(2 * jnp.pi))


def walk(log_eta=None, rejuvenate=None):
    """The bootstrap filter."""

    def init(key, n):
        x = jax.random.normal(key, (n,))
        return x, log_normal(DATA[0], x, SEEN), x**2

    def propagate(key, k, x, cache, log_weights):
        # The cache belongs to the particle.
        x = jnp.where(cache == x**2, x, jnp.nan) + WALK * jax.random.normal(key, x.shape)
        return x, log_normal(DATA[k + 1], x, SEEN), x**2

    return FeynmanKacModel(init, propagate, STEPS, log_eta, rejuvenate)


def look_ahead(k, x, cache):
    return 0.7 * log_normal(DATA[k + 1], x, WALK + SEEN)


def filtered(model, resampling, num_runs, num_particles=20):
    """Evidences [run] over the truth, and weighted means of the last particles times them."""

    def run(key):
        key, first = jax.random.split(key)
        state = fk.init(model, num_particles, first)
        step = lambda state, key: fk.step(model, resampling, state, key)
        state, info = jax.lax.scan(step, state, jax.random.split(key, STEPS))
        weights = jnp.exp(state.log_weights - kalman()[0])
        return weights.mean(), (weights * state.particles).mean(), info

    return jax.jit(jax.vmap(run))(jax.random.split(KEY, num_runs))


@pytest.mark.parametrize(
    ("resampling", "log_eta"),
    [
        (Resampling(0.5), None),
        (Resampling(1.0), None),
        (Resampling(0.0), None),
        (Resampling(1.0, first=1, last=4), None),
        (Resampling(1.0, function=lambda key, w, n: jax.random.choice(key, n, (n,), p=w)), None),
        (Resampling(0.7), look_ahead),
    ],
    ids=["adaptive", "always", "never", "interval", "multinomial", "look-ahead"],
)
def test_the_evidence_and_the_last_law_have_no_bias(resampling, log_eta):
    evidence, moment, info = filtered(walk(log_eta), resampling, 40_000)
    mean = kalman()[1]
    assert_mean(evidence, 1.0, bias=0.2)
    assert_mean(moment, mean, bias=0.2)
    share = float(info.resampled.mean())
    assert (share == 0) if resampling.threshold == 0 else (share > 0.2)


def test_a_weight_that_is_forgotten_biases_the_evidence():
    def reset(state, key):
        state = state._replace(log_weights=jnp.where(state.step == 3, 0.0, state.log_weights))
        return fk.step(walk(), Resampling(0.5), state, key)

    def run(key):
        key, first = jax.random.split(key)
        state, _ = jax.lax.scan(reset, fk.init(walk(), 20, first), jax.random.split(key, STEPS))
        return jnp.exp(state.log_weights - kalman()[0]).mean()

    evidence = jax.jit(jax.vmap(run))(jax.random.split(KEY, 20_000))
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        assert_mean(evidence, 1.0, bias=0.3)


def test_rejuvenation_leaves_the_law_as_it_is_and_renews_particles():
    """A static Gaussian, tempered in three steps, with exact draws as moves."""
    y, num_steps = 1.3, 3

    def potential(x):
        return log_normal(y, x, SEEN) / num_steps

    def renew(key, k, x, cache):
        precision = 1 + k / num_steps / SEEN**2
        mean = k / num_steps / SEEN**2 * y / precision
        return mean + jax.random.normal(key, x.shape) / jnp.sqrt(precision), cache

    def init(key, n):
        x = jax.random.normal(key, (n,))
        return x, jnp.zeros(n), None

    def propagate(key, k, x, cache, log_weights):
        return x, potential(x), cache

    model = FeynmanKacModel(init, propagate, num_steps, rejuvenate=renew)

    def run(key):
        key, first = jax.random.split(key)
        state = fk.init(model, 20, first)
        step = lambda state, key: fk.step(model, Resampling(1.0), state, key)
        state, _ = jax.lax.scan(step, state, jax.random.split(key, num_steps))
        return jnp.exp(logsumexp(state.log_weights) - jnp.log(20))

    evidence = jax.jit(jax.vmap(run))(jax.random.split(KEY, 20_000))
    truth = np.exp(log_normal(y, 0.0, np.sqrt(1 + SEEN**2)))
    assert_mean(evidence / truth, 1.0)


@pytest.mark.parametrize("num_particles", [100, 400])
def test_the_error_by_ancestors_is_that_of_repeated_runs(num_particles):
    """A static Gaussian, tempered in six steps, with moves that forget a little of their start.

    Resampling is multinomial, whose noise is the largest. Some 12 and 37 ancestors are left; the
    mean square of a t of 12 degrees of freedom is 1.2.
    """
    y, num_steps, num_runs = 1.3, 6, 400

    def moments(k):
        precision = 1 + k / num_steps / SEEN**2
        return k / num_steps / SEEN**2 * y / precision, precision**-0.5

    def move(key, k, x, cache):
        mean, sd = moments(k)
        return mean + 0.9 * (x - mean) + 0.19**0.5 * sd * jax.random.normal(key, x.shape), cache

    def propagate(key, k, x, cache, log_weights):
        return x, log_normal(y, x, SEEN) / num_steps, x

    def init(key, n):
        x = jax.random.normal(key, (n,))
        return x, jnp.zeros(n), x

    def multinomial(key, weights, n):
        return jax.random.choice(key, n, (n,), p=weights)

    model = FeynmanKacModel(init, propagate, num_steps, rejuvenate=move)
    resampling = Resampling(1.0, function=multinomial)

    def run(key):
        key, first, last = jax.random.split(key, 3)
        step = lambda state, key: fk.step(model, resampling, state, key)
        start = fk.init(model, num_particles, first)
        state, _ = jax.lax.scan(step, start, jax.random.split(key, num_steps))
        rows = multinomial(last, jax.nn.softmax(state.log_weights), num_particles)
        return state.particles[rows], state.ancestor[rows]

    x, ancestor = map(np.asarray, jax.jit(jax.vmap(run))(jax.random.split(KEY, num_runs)))
    clusters = [Clusters.of(row) for row in ancestor]
    se = np.array([of.mean_se(row[:, None])[0] for of, row in zip(clusters, x, strict=True)])
    independent = x.std(1) / np.sqrt(num_particles)
    error = x.mean(1) - moments(num_steps)[0]

    def mean_square(se):
        return np.mean((error / se) ** 2)

    limit = GATE * np.sqrt(2 / num_runs)
    assert abs(mean_square(se) - 1) < limit
    assert mean_square(independent) > 1 + 2 * limit


def build(denoiser):
    flow = Flow(denoiser, denoiser.moments(), sigma_min=SIGMA_MIN, solver=FixedGrid(1))
    return ScorePrior(flow)


GAUSSIAN_PRIOR, MIXTURE_PRIOR = build(GAUSSIAN), build(MIXTURE)


def line(y):
    x = numpyro.sample("x", GAUSSIAN_PRIOR)
    numpyro.sample("y", dist.Normal(A_G @ x, SD_G).to_event(1), obs=y)


def plane(y):
    x = numpyro.sample("x", MIXTURE_PRIOR)
    numpyro.sample("y", dist.MultivariateNormal(A_M @ x, COV_M), obs=y)


LINE, PLANE = Problem.from_model(line, Y_G), Problem.from_model(plane, Y_M)
COV_G = jnp.eye(1) * SD_G**2
TRUTHS = {
    "line": oracles.posterior(GAUSSIAN_PRIOR, A_G, Y_G, COV_G),
    "plane": oracles.posterior(MIXTURE_PRIOR, A_M, Y_M, COV_M),
}
EVIDENCES = {
    "line": float(oracles.at_level(GAUSSIAN, SIGMA_MIN).log_evidence(A_G, Y_G, COV_G)),
    "plane": float(oracles.at_level(MIXTURE, SIGMA_MIN).log_evidence(A_M, Y_M, COV_M)),
}


def check(draws, name, *, bias=0.05):
    """Mean, covariance and evidence, with standard errors from independent groups."""
    check_law(draws, draws.positions["x"].reshape(-1, 2), TRUTHS[name], bias=bias)
    check_evidence(draws, EVIDENCES[name], bias=bias)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    ("guidance", "bias"),
    [(TMPD(), 0.05), (DiffPIR(2.0), 0.1)],
    ids=["TMPD", "DiffPIR"],
)
def test_corrected_guidance_has_the_posterior_and_the_evidence(guidance, bias):
    draws = FeynmanKac(guidance, 400, 64, 150).run(PLANE, KEY, progress=False)
    check(draws, "plane", bias=bias)


@pytest.mark.promotes_ranks
def test_linear_data_are_whitened_once_and_the_step_is_the_same():
    def bent(y):
        x = numpyro.sample("x", MIXTURE_PRIOR)
        numpyro.sample("y", dist.MultivariateNormal(A_M @ x**2, COV_M), obs=y)

    engine = FeynmanKac(TMPD(), 8, 1, 10)
    assert engine._scheme.target(Problem.from_model(bent, Y_M)).chain.whitening is None
    chain = engine._scheme.target(PLANE).chain
    own = dataclasses.replace(chain, whitening=None)
    start = chain.init(KEY, 8)
    x, log_weights, _ = chain.propagate(KEY, jnp.asarray(5), start[0], start[2], start[1])
    expected, expected_weights, _ = own.propagate(KEY, jnp.asarray(5), start[0], start[2], start[1])
    np.testing.assert_allclose(x, expected, rtol=1e-9)
    np.testing.assert_allclose(log_weights, expected_weights, rtol=1e-9)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("name", ["line", "plane"])
def test_pinned_data_have_the_posterior_and_the_evidence(name):
    problem = {"line": LINE, "plane": PLANE}[name]
    draws = FeynmanKac(MCGDiff(), 2000, 64, 50).run(problem, KEY, progress=False)
    check_law(draws, draws.positions["x"].reshape(-1, 2), TRUTHS[name], bias=0.1)
    check_evidence(draws, EVIDENCES[name], bias=0.2)


@pytest.mark.promotes_ranks
def test_data_noisier_than_the_first_level_are_weighed_there():
    sd = 2 * GAUSSIAN_PRIOR.flow.sigma_max

    def model(y):
        x = numpyro.sample("x", GAUSSIAN_PRIOR)
        numpyro.sample("y", dist.Normal(x, jnp.array([sd, SD_G])).to_event(1), obs=y)

    y, noise = jnp.array([1.5 * sd, 0.4]), jnp.diag(jnp.array([sd, SD_G]) ** 2)
    truth = float(oracles.at_level(GAUSSIAN, SIGMA_MIN).log_evidence(jnp.eye(2), y, noise))
    problem = Problem.from_model(model, y)
    draws = FeynmanKac(MCGDiff(), 2000, 64, 50).run(problem, KEY, progress=False)
    check_evidence(draws, truth, bias=0.2)


@pytest.mark.promotes_ranks
def test_data_that_cannot_be_pinned_are_refused():
    def seen(mean):
        def model():
            x = numpyro.sample("x", GAUSSIAN_PRIOR)
            numpyro.sample("y", dist.Normal(mean(x), 1.0).to_event(1), obs=jnp.zeros(2))

        return Problem.from_model(model)

    def square():
        x = numpyro.sample("x", compose({GAUSSIAN_PRIOR: 2.0}))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros(2))

    with pytest.raises(ValueError, match="linear in the event"):
        FeynmanKac(MCGDiff()).run(seen(lambda x: x**2), KEY)
    with pytest.raises(ValueError, match="rows of the operator that are independent"):
        FeynmanKac(MCGDiff()).run(seen(lambda x: jnp.stack([x[0], x[0]])), KEY)
    with pytest.raises(ValueError, match=r"got a Composition.*such as TMPD\(\)"):
        FeynmanKac(MCGDiff()).run(Problem.from_model(square), KEY)
    with pytest.raises(ValueError, match="must be None with MCGDiff"):
        FeynmanKac(MCGDiff(), control=fk.VarianceControl()).run(LINE, KEY)


@pytest.mark.promotes_ranks
def test_for_a_gaussian_prior_weights_hardly_vary():
    draws = FeynmanKac(TMPD(), 400, 64, 150).run(LINE, KEY, progress=False)
    check(draws, "line")
    assert draws.extra["ess"][1].min() > 0.99 * 400
    assert not draws.extra["resampled"][1].any()


@pytest.mark.promotes_ranks
def test_masked_data_have_no_part_in_the_evidence():
    def model(y):
        x = numpyro.sample("x", GAUSSIAN_PRIOR)
        mean = jnp.stack([jnp.sum(x), 5.0 * x[0]])
        seen = dist.Normal(mean, SD_G).mask(jnp.array([True, False])).to_event(1)
        numpyro.sample("y", seen, obs=y)

    problem = Problem.from_model(model, jnp.append(Y_G, 40.0))
    draws = FeynmanKac(TMPD(), 400, 16, 150).run(problem, KEY, progress=False)
    check(draws, "line", bias=0.1)


@pytest.mark.promotes_ranks
def test_the_error_of_the_chain_is_of_second_order():
    """Of the evidence, where weights are constant and nothing else can be wrong."""

    def error(num_steps):
        draws = FeynmanKac(TMPD(), 1000, 100, num_steps).run(LINE, KEY, progress=False)
        return abs(float(draws.extra["log_evidence"][1]) - EVIDENCES["line"])

    coarse, fine = error(8), error(16)
    assert coarse > 0.005
    assert fine < coarse / 3


@pytest.mark.promotes_ranks
def test_guidance_alone_is_exact_for_a_gaussian_prior_and_not_for_a_mixture():
    def biased(problem, name, sampler):
        mean, cov = oracles.moments(TRUTHS[name])
        draws = Guided(TMPD(), 40_000, 200, sampler=sampler).run(problem, KEY, progress=False)
        x = draws.positions["x"][0]
        assert_mean(x, mean)
        assert_cov(x, cov)

    for sampler in (HalfNoise(), Heun()):
        biased(LINE, "line", sampler)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        biased(PLANE, "plane", HalfNoise())


@pytest.mark.promotes_ranks
def test_guided_counts_the_evaluations():
    for sampler, calls in ((Euler(), 1), (Heun(), 2), (HalfNoise(), 1)):
        engine = Guided(TMPD(), 2, 10, sampler=sampler)
        assert engine.extra(engine.prepare(LINE))["num_evaluations"][1] == 10 * calls + 1


ENGINE = FeynmanKac(TMPD(), 50, 2, 20, chunk_size=5)


def draw(checkpoint=None, engine=ENGINE, problem=PLANE):
    return engine.run(problem, KEY, progress=False, checkpoint=checkpoint)


def same(a, b):
    for ours, theirs in ((a.positions, b.positions), (a.stats, b.stats)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name, (_, values) in b.extra.items():
        np.testing.assert_array_equal(a.extra[name][1], values, err_msg=name)


@pytest.mark.promotes_ranks
def test_batches_change_only_the_rounding():
    batches = draw(engine=FeynmanKac(TMPD(), 50, 2, 20, batch_size=16))
    np.testing.assert_allclose(batches.positions["x"], draw().positions["x"], rtol=1e-8)


@pytest.mark.promotes_ranks
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    kill_a_run("test_feynman_kac", 10, tmp_path)
    same(draw(checkpoint=tmp_path), draw())
    with pytest.raises(ValueError, match="differs in guidance"):
        draw(tmp_path, FeynmanKac(PiGDM(1.0), 50, 2, 20))


@pytest.mark.promotes_ranks
def test_ctrl_c_has_no_draws_to_return_unless_all_levels_are_done(tmp_path, monkeypatch):
    stopped = "interrupted after 15 of 20 levels, .* no draws from the posterior"
    kept = re.escape(f"; {tmp_path} has them: run again to go on")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "tqdm", Interrupting)
        with pytest.raises(KeyboardInterrupt, match=f"^{stopped}$"):
            draw()
        with pytest.raises(KeyboardInterrupt, match=f"^{stopped}{kept}$"):
            draw(checkpoint=tmp_path)
        patch.setattr(Interrupting, "num_updates", 4)
        whole = draw()
    assert not whole.interrupted
    same(whole, draw())
    same(draw(checkpoint=tmp_path), whole)


@pytest.mark.promotes_ranks
def test_the_tree_has_evidence_and_record():
    tree = infer(PLANE, ENGINE, key=KEY, progress=False)
    stats = tree["sample_stats"].to_dataset()
    assert stats["log_evidence"].dims == stats["khat"].dims == ()
    for name in ("ess", "resampled", "log_evidence_increment", "unique_ancestors"):
        assert stats[name].dims == ("group", "step")
        assert stats[name].shape == (2, 20)


@pytest.mark.promotes_ranks
def test_trouble_is_reported_with_the_remedy():
    far = Problem.from_model(plane, jnp.array([60.0, -50.0]))
    with pytest.warns(UserWarning, match="raise num_particles above 20"):
        FeynmanKac(NRLG(), 20, 2, 8).run(far, KEY, progress=False)


@pytest.mark.promotes_ranks
def test_weights_with_a_heavy_tail_are_reported_though_no_ancestor_is_lost():
    """Never resampled, every particle is its own ancestor, and one group cannot disagree."""
    far = Problem.from_model(plane, jnp.array([60.0, -50.0]))
    (found,) = messages(FeynmanKac(NRLG(), 100, 1, 8, threshold=0.0), far)
    assert re.match(r"k-hat of the last weights is .*, above 0\.7: .*raise num_particles", found)
    assert not messages(FeynmanKac(TMPD(), 100, 1, 8, threshold=0.0), LINE)


def test_bad_settings_and_models_fail_before_any_work():
    for settings, message in [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"num_particles": 1}, "num_particles must be at least 2, got 1"),
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            FeynmanKac(**settings)

    def plated(y):
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", GAUSSIAN_PRIOR)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    def noisy(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        x = numpyro.sample("x", GAUSSIAN_PRIOR)
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    for engine in (ENGINE, Guided(TMPD())):
        with pytest.raises(ValueError, match="'x' must be one event of shape"):
            engine.run(Problem.from_model(plated, jnp.zeros((2, 2))), KEY)
        with pytest.raises(ValueError, match="needs one prior site.*'scale'"):
            engine.run(Problem.from_model(noisy, jnp.zeros(2)), KEY)


class Broken(TMPD):
    """With a covariance of the data that is none."""

    def predict(self, denoise, observation, x, sigma):
        x_hat, predicted = super().predict(denoise, observation, x, sigma)
        return x_hat, predicted._replace(covariance=-predicted.covariance)


@pytest.mark.promotes_ranks
def test_a_weight_that_is_not_a_number_stops_the_run():
    with pytest.raises(FloatingPointError, match="100 of 100 weights.*or Broken a matrix that is"):
        draw(engine=FeynmanKac(Broken(), 50, 2, 20))


def test_weights_that_differ_by_rounding_have_no_tail():
    """In single precision, where exponentials of some of them are equal, or of all but two."""
    rng = np.random.default_rng(0)
    for noise in (rng.normal(size=500), rng.integers(0, 2, 500)):
        weights, khat = smooth((78 + 1e-5 * noise).astype(np.float32))
        assert khat == 0
        np.testing.assert_allclose(weights, 1 / 500, rtol=1e-3)
