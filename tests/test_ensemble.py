"""Engines with a warm-up in one piece: right posteriors, stated bias, resuming, refusals."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import oracles
import scoreprior._run as run_module
from oracles import A_G, A_M, COV_M, SD_G, Y_G, Y_M
from scoreprior._run import Checkpoint
from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.mcmc import MCLMC, MEADS, AdjustedMCLMC, ChEES
from scoreprior.mcmc.ensemble import _revive
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from stats import GATE, chain_ess
from test_posterior import GAUSSIAN, MIXTURE, build, check_two_priors, two_priors

pytestmark = pytest.mark.promotes_ranks

EXACT = {
    "ChEES": ChEES(150, 120, 256, chunk_size=120),
    "MEADS": MEADS(400, 150, 256, chunk_size=150),
    "AdjustedMCLMC": AdjustedMCLMC(150, 150, 256, mean_steps=3.0, chunk_size=150),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_posterior_of_a_gaussian_and_a_mixture_prior(name):
    tree = infer(two_priors(None), EXACT[name], Y_G, Y_M, key=jax.random.key(1), progress=False)
    check_two_priors(tree)
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check_two_priors(tree, scale=0.9)


SIZE = 4  # numbers in both images of the two priors
LARGEST = 0.08  # relative bias that may go unseen


def check_bias(tree, desired_energy_var):
    """Means and covariances lie within the bias that MCLMC states, and five standard errors.

    To first order a perturbation `delta` of the log density shifts the mean of `f` by
    `-cov(f, delta)`, at most `sd(f) sd(delta)`.
    """
    step_size = tree["sample_stats"]["step_size"].values.mean()
    distance = SIZE * np.sqrt(desired_energy_var) / step_size
    laws = {
        "g": oracles.posterior(build(GAUSSIAN), A_G, Y_G, jnp.eye(1) * SD_G**2),
        "m": oracles.posterior(build(MIXTURE), A_M, Y_M, COV_M),
    }
    for name, law in laws.items():
        chains = tree["posterior"][name].values
        mean, covariance = oracles.moments(law)
        centred = chains - mean
        products = (centred[..., :, None] * centred[..., None, :]).reshape(*chains.shape[:2], -1)
        values = np.concatenate([centred, products], -1)
        truth = np.concatenate([np.zeros(2), covariance.reshape(-1)])
        sd = values.std((0, 1))
        allowed = distance * sd + GATE * sd / np.sqrt(chain_ess(values))
        assert (allowed <= LARGEST * sd).all(), "no power"
        assert (np.abs(values.mean((0, 1)) - truth) <= allowed).all(), "more bias than stated"


@pytest.mark.slow
def test_the_bias_of_mclmc_is_what_it_states():
    engine = MCLMC(600, 160, 128, desired_energy_var=1e-5, thinning=4, chunk_size=160)
    model, key = two_priors(None), jax.random.key(1)
    tree = infer(model, engine, Y_G, Y_M, key=key, progress=False)
    check_bias(tree, 1e-5)
    # A step far too large: a bias, which the check sees and the engine warns of.
    engine = MCLMC(0, 150, 128, step_size=4.0, thinning=4, chunk_size=150)
    with pytest.warns(UserWarning, match=r"draws are more biased than that: take a smaller step"):
        tree = infer(model, engine, Y_G, Y_M, key=key, progress=False)
    with pytest.raises(AssertionError, match="more bias than stated"):
        check_bias(tree, 1e-5)


LAW = Gaussian(Moments(jnp.zeros(2), jnp.ones(2)))
PAIR = ScorePrior(Flow(LAW, LAW.law, sigma_min=0.1, solver=FixedGrid(1)))
KEY = jax.random.key(3)
SMALL = {
    "ChEES": ChEES(40, 12, 4, chunk_size=5),
    "MEADS": MEADS(40, 12, 16, chunk_size=5),
    "MCLMC": MCLMC(60, 12, 2, thinning=3, chunk_size=5),
    "AdjustedMCLMC": AdjustedMCLMC(60, 12, 2, chunk_size=5),
}


def pair(y):
    x = numpyro.sample("x", PAIR)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@functools.cache
def problem():
    return Problem.from_model(pair, jnp.array([0.5, -1.0]))


def draw(engine, checkpoint=None, of=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so short a run is no good
        return engine.run(of or problem(), KEY, progress=False, checkpoint=checkpoint)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", SMALL)
def test_a_stopped_run_resumes_bit_for_bit_without_another_warm_up(name, tmp_path, monkeypatch):
    engine, save = SMALL[name], Checkpoint.save
    reference = draw(engine)

    # As soon as the warm-up is stored, then in the draws.
    for last in (0, 5):

        def stopping(self, done, state, chunks, last=last):
            save(self, done, state, chunks)
            if done == last:
                raise Stopped

        monkeypatch.setattr(Checkpoint, "save", stopping)
        with pytest.raises(Stopped):
            draw(engine, tmp_path / "run")
        # What the next calls must not do.
        monkeypatch.setattr(jax, "block_until_ready", None)
    monkeypatch.setattr(Checkpoint, "save", save)
    resumed = draw(engine, tmp_path / "run")
    for kind in ("positions", "stats"):
        first, second = getattr(reference, kind), getattr(resumed, kind)
        assert first.keys() == second.keys()
        for site in first:
            np.testing.assert_array_equal(first[site], second[site], err_msg=site)


def test_ctrl_c_in_the_warm_up_says_so(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.jax, "block_until_ready", interrupt)
    with pytest.raises(KeyboardInterrupt, match="in the warm-up, before the first draw"):
        draw(SMALL["MCLMC"])


def test_the_bar_tells_that_the_warm_up_is_running(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        SMALL["MCLMC"].run(problem(), KEY)
    said = capsys.readouterr().err
    assert "warm-up:   0%" in said
    assert "60/60" in said
    assert "energy change" in said


def test_an_energy_error_over_the_steps_of_a_draw():
    """Three steps of a draw: n_steps counts them, energy_change is their root mean square."""
    fine = draw(MCLMC(0, 12, 2, step_size=0.3, thinning=1, chunk_size=12)).stats
    coarse = draw(MCLMC(0, 12, 2, step_size=1.2, thinning=3, chunk_size=12)).stats
    assert (coarse["n_steps"] == 3).all()
    assert (fine["step_size"] == 0.3).all()
    # The error of one step of a second-order scheme grows at least with the cube of its size.
    growth = coarse["energy_change"].mean() / fine["energy_change"].mean()
    assert growth > 4**3 / 2


def test_a_chain_that_met_a_huge_error_goes_on():
    """The slice comes back from blackjax as NaN, after which no step would be accepted."""
    engine = SMALL["MEADS"]
    chain = engine.start({"x": jnp.array([0.3, -0.2])}, lambda p: -0.5 * (p["x"] ** 2).sum())
    cliff = functools.partial(engine.kernel, logdensity_fn=lambda p: -1e6 * (p["x"] ** 2).sum())
    tuned = {"step_size": 1.0, "scale": np.ones(2), "alpha": 0.5, "delta": 0.25}
    tuned = jax.tree.map(jnp.asarray, tuned)
    new, stats = cliff(KEY, chain, tuned=tuned)
    assert stats["diverging"]
    np.testing.assert_allclose(new.slice, (chain.slice + 1.25) % 2 - 1)
    np.testing.assert_array_equal(new.position["x"], chain.position["x"])


def test_chains_stopped_in_the_warm_up_go_on_from_others():
    engine = SMALL["MEADS"]
    positions = {"x": jnp.arange(8.0).reshape(4, 2)}
    chains = jax.vmap(lambda p: engine.start(p, lambda p: p["x"].sum()))(positions)
    slices = jnp.array([0.1, jnp.nan, jnp.nan, 0.4])
    new = _revive(KEY, chains._replace(slice=slices))
    assert jnp.isfinite(new.slice).all()
    assert set(np.asarray(new.position["x"][:, 0]).tolist()) == {0.0, 6.0}
    np.testing.assert_array_equal(new.logdensity, new.position["x"].sum(1))
    np.testing.assert_array_equal(new.slice[::3], slices[::3])


def test_a_warm_up_without_a_result_is_refused():
    class Broken(MCLMC):
        def tune_one(self, key, chain, logdensity_fn, start):
            return chain, start._replace(step_size=jnp.where(chain.position["x"][0] < 0, 1.0, 0.0))

    with pytest.raises(
        ValueError, match=r"failed: step_size is not positive and finite for \d of 9"
    ):
        draw(Broken(60, 12, 9))


@pytest.mark.parametrize(
    ("build_engine", "message"),
    [
        (lambda: ChEES(num_chains=1), "num_chains must be at least 2, got 1"),
        (lambda: ChEES(num_warmup=0), "num_warmup must be at least 1, got 0"),
        (lambda: ChEES(target_accept=1.0), r"target_accept must be between 0 and 1, got 1\.0"),
        (lambda: ChEES(learning_rate=0.0), "learning_rate must be a positive finite number"),
        (lambda: ChEES(thinning=0), "thinning must be at least 1, got 0"),
        (lambda: MEADS(num_chains=18), "num_chains must be a multiple of num_folds = 4.* got 18"),
        (lambda: MEADS(num_chains=8), "at least 4 chains in each fold, got 8"),
        (lambda: MEADS(step_size_multiplier=-1.0), "step_size_multiplier must be a positive"),
        (lambda: MCLMC(num_warmup=20), "num_warmup must be 0 or at least 50, got 20"),
        (lambda: MCLMC(desired_energy_var=0.0), "desired_energy_var must be a positive"),
        (lambda: MCLMC(step_size=-1.0), "step_size must be a positive finite number"),
        (lambda: AdjustedMCLMC(mean_steps=1.0), r"mean_steps must be at least 1\.2, got 1\.0"),
        (lambda: AdjustedMCLMC(chunk_size=0), "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_settings(build_engine, message):
    with pytest.raises(ValueError, match=message):
        build_engine()


@pytest.mark.parametrize("engine", [MCLMC(), AdjustedMCLMC()], ids=["MCLMC", "AdjustedMCLMC"])
def test_one_number_is_too_few_for_a_momentum_of_constant_length(engine):
    with pytest.raises(ValueError, match="at least 2 numbers, got 1: take NUTS"):
        engine.start({"x": jnp.ones(1)}, lambda position: position["x"].sum())
