"""Runs of TemperedSMC: the tree, interruption and resumption, warnings and errors."""

import functools
import os
import re
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import scoreprior._run as run_module
from killing import kill_a_run
from scoreprior.denoise import Gaussian
from scoreprior.density import ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import HMCMoves, RandomWalkMoves, TemperedSMC
from scoreprior.smc.report import pool_evidence

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(3)


def gaussian(shape, density=None):
    law = Gaussian(Moments(jnp.zeros(shape), jnp.ones(shape)))
    return ScorePrior(Flow(law, law.law, sigma_min=0.1, solver=FixedGrid(1)), density)


LINE = gaussian((2,))
ENGINE = TemperedSMC(64, 3)
Y = jnp.array([1.5, -2.0])
NUM_TRACES = [0]


def line(y):
    NUM_TRACES[0] += 1
    noise = numpyro.sample("noise", dist.LogNormal(-2.0, 0.3))
    x = numpyro.sample("x", LINE)
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


@functools.cache
def problem():
    """One object, so that its compiled programs are shared."""
    return Problem.from_model(line, Y)


def draw(engine=ENGINE, key=KEY, checkpoint=None, y=None):
    of = problem() if y is None else Problem.from_model(line, y)
    return engine.run(of, key, progress=False, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def reference():
    jax.config.update("jax_numpy_rank_promotion", "allow")
    return draw()


def assert_same(draws, expected):
    for group in ("positions", "stats", "extra"):
        jax.tree.map(np.testing.assert_array_equal, dict(getattr(draws, group)),
                     dict(getattr(expected, group)))  # fmt: skip


def test_the_record_belongs_together(reference):
    record = {name: values for name, (_, values) in reference.extra.items()}
    temperature, steps = record["temperature"], record["temperature"].shape[1]
    assert steps > 5
    assert (np.diff(temperature, axis=1) >= 0).all()
    assert (temperature[:, -1] == 1).all()
    total = record["log_evidence_increment"].sum(1)
    np.testing.assert_allclose(total, record["group_log_evidence"], rtol=1e-10)
    before = np.c_[np.ones(3, bool), temperature[:, :-1] < 1]
    assert ((record["num_moves"] >= 2) == before).all()
    np.testing.assert_allclose(record["ess"][:, 0], 0.9 * 64, rtol=1e-3)
    assert (record["unique_ancestors"] <= record["unique_parents"][:, :1]).all()
    lp = jax.vmap(jax.vmap(problem().log_density))(reference.positions)
    np.testing.assert_allclose(lp, reference.stats["lp"], rtol=1e-10)


def test_one_compilation_for_all_temperatures():
    draw()
    draw()
    before = NUM_TRACES[0]
    draw(key=jax.random.key(4))
    assert NUM_TRACES[0] == before


def test_particles_moved_in_batches_are_the_same(reference):
    draws = draw(TemperedSMC(64, 3, batch_size=16))
    np.testing.assert_allclose(draws.positions["x"], reference.positions["x"], rtol=1e-6)


def test_the_tree(tmp_path):
    tree = infer(line, ENGINE, Y, key=KEY, progress=False, num_prior=5)
    assert dict(tree["posterior"].sizes) == {"chain": 3, "draw": 64, "x_dim_0": 2}
    stats = tree["sample_stats"]
    assert stats["log_evidence"].dims == stats["log_evidence_se"].dims == ()
    assert stats["group_log_evidence"].dims == ("group",)
    for name in (
        "temperature", "ess", "acceptance_rate", "step_size", "num_moves", "autocorrelation",
        "log_evidence_increment", "unique_parents", "unique_ancestors",
    ):  # fmt: skip
        assert stats[name].dims == ("group", "step")
    for name in ("lp", "group_of_draw", "ancestor"):
        assert stats[name].dims == ("chain", "draw")
    assert tree.attrs["interrupted"] == 0
    assert "TemperedSMC(num_particles=64, num_groups=3, kernel=HMCMoves(" in tree.attrs["engine"]
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as stored:
        xr.testing.assert_equal(stored["sample_stats"].dataset, stats.dataset)


def test_the_evidence_of_groups_is_averaged():
    found = pool_evidence(np.log([1.0, 2.0, 3.0]) - 5, True)
    np.testing.assert_allclose(found["log_evidence"][1], np.log(2.0) - 5)
    np.testing.assert_allclose(found["log_evidence_se"][1], np.sqrt(0.5 / 6))
    single = pool_evidence(np.array([-3.0]), True)
    assert single["log_evidence"][1] == -3.0
    assert np.isnan(single["log_evidence_se"][1])


class Interrupting(run_module.tqdm):
    """A progress bar during whose third update the user presses Ctrl-C."""

    num_updates = 3

    def update(self, n=1):
        self.count = getattr(self, "count", 0) + 1
        if self.count == self.num_updates:
            # Where the shell ignores Ctrl-C, as in the background, Python would too.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        return super().update(n)


def test_ctrl_c_returns_a_cloud_that_is_no_posterior(reference, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    reached = reference.extra["temperature"][1][:, 2].min()
    match = f"interrupted at temperature {reached:.3g} of 1: .* not from the posterior"
    with pytest.warns(UserWarning, match=match):
        draws = draw(checkpoint=tmp_path / "run")
    assert draws.interrupted
    assert np.isnan(draws.extra["log_evidence"][1])
    assert draws.positions["x"].shape == reference.positions["x"].shape
    found, full = draws.extra["ess"][1], reference.extra["ess"][1]
    np.testing.assert_array_equal(found, full[:, :3])
    monkeypatch.undo()
    assert_same(draw(checkpoint=tmp_path / "run"), reference)


def test_ctrl_c_at_the_prior_has_nothing_to_return(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("scoreprior.smc.tempered._advance", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before the first temperature"):
        draw()


def test_a_killed_run_resumes_bit_for_bit(reference, tmp_path, stored_steps):
    kill_a_run("test_smc_run", 3, tmp_path / "run")
    assert_same(draw(checkpoint=tmp_path / "run"), reference)
    remaining = list(range(4, reference.extra["temperature"][1].shape[1] + 1))
    assert stored_steps == remaining
    # A finished run returns its draws without another step.
    assert_same(draw(checkpoint=tmp_path / "run"), reference)
    assert stored_steps == remaining


def test_more_temperatures_may_be_asked_of_a_stopped_run(reference, tmp_path):
    match = "max_temperatures = 2 reached at temperature .* raise max_temperatures"
    with pytest.warns(UserWarning, match=match):
        draws = draw(TemperedSMC(64, 3, max_temperatures=2), checkpoint=tmp_path / "run")
    assert not draws.interrupted
    assert np.isnan(draws.extra["log_evidence"][1])
    assert_same(draw(checkpoint=tmp_path / "run"), reference)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"engine": TemperedSMC(65, 3)}, r"differs in .*num_particles \(64 there, 65 here\)"),
        ({"engine": TemperedSMC(64, 3, kernel=HMCMoves(4))}, "differs in kernel"),
        ({"key": jax.random.key(9)}, "differs in key"),
        ({"y": Y + 1e-6}, "differs in data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(reference, tmp_path, change, match):
    with pytest.warns(UserWarning, match="max_temperatures"):
        draw(TemperedSMC(64, 3, max_temperatures=1), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=match):
        draw(checkpoint=tmp_path / "run", **change)


def test_the_bar_shows_temperature_and_effective_sample_size(capfd):
    ENGINE.run(problem(), KEY)
    bar = capfd.readouterr().err
    assert "temperature 1, ESS" in bar
    assert "moves" in bar


def test_a_collapsed_cloud_is_reported():
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.sample("y", dist.Normal(x, 1e-3).to_event(1), obs=Y)

    found = messages(TemperedSMC(6, 3), Problem.from_model(model))
    assert any(re.match("collapsed cloud: .*from only .*raise num_particles", m) for m in found)


def test_groups_that_disagree_are_reported():
    """Nine tenths of the posterior is where 2 % of the prior draws are."""

    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("rare", jnp.where(x[0] > 2, 6.0, 0.0))

    found = messages(TemperedSMC(12, 16), Problem.from_model(model))
    assert any(re.match("groups disagree on the log evidence.*raise num_p", m) for m in found)


def messages(engine, of):
    """Warnings of a run, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run(of, KEY, progress=False)
    found = [str(warning.message) for warning in caught]
    assert len(found) == len(set(found))
    return found


class Reckless(RandomWalkMoves):
    """Starts with steps that are never accepted."""

    def first_step_size(self, size):
        return 1e6


def test_particles_that_do_not_move_are_reported():
    engine = TemperedSMC(64, 3, kernel=Reckless(), max_moves=2)
    found = messages(engine, problem())
    assert any(
        re.match("the acceptance rate fell to 0 .*raise max_moves above 2", m) for m in found
    )


def test_a_prior_draw_where_the_likelihood_is_nan_is_an_error():
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("root", jnp.sqrt(x[0] + 1.5))

    with pytest.raises(
        ValueError, match="log likelihood is NaN or plus infinity at .* of 192 prior"
    ):
        draw_of(model)


def test_data_that_are_impossible_are_an_error():
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("nothing", jnp.where(x[0] > 100, 0.0, -jnp.inf))

    with pytest.raises(ValueError, match="minus infinity at all 64 prior draws of 3 of 3 groups"):
        draw_of(model)


def draw_of(model):
    return ENGINE.run(Problem.from_model(model), KEY, progress=False)


def test_the_centred_form_needs_a_density():
    prior = gaussian((2,), ScoreOnly())

    def model():
        numpyro.sample("x", prior)

    with pytest.raises(NotImplementedError, match="ScoreOnly has no log_prob"):
        infer(model, TemperedSMC(centred=True), key=KEY, progress=False)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_particles": 1}, ValueError, "num_particles must be at least 4, got 1"),
        ({"num_particles": 10.0}, TypeError, "num_particles must be an int, got 10.0"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"max_moves": 1}, ValueError, "max_moves must be at least 2, got 1"),
        ({"max_temperatures": 0}, ValueError, "max_temperatures must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"target_ess": 1.0}, ValueError, "target_ess must be between 0 and 1, got 1.0"),
        ({"target_ess": float("nan")}, ValueError, "target_ess must be between 0 and 1, got nan"),
        ({"max_autocorrelation": 0.0}, ValueError, "max_autocorrelation must be between 0 and 1"),
        ({"kernel": "hmc"}, TypeError, r"kernel must be moves such as HMCMoves\(\), got 'hmc'"),
    ],
)
def test_bad_settings(as_user, settings, error, match):
    with pytest.raises(error, match=match):
        TemperedSMC(**settings)


@pytest.mark.parametrize(
    ("moves", "settings", "match"),
    [
        (HMCMoves, {"num_leapfrog": 0}, "num_leapfrog must be at least 1, got 0"),
        (HMCMoves, {"target_accept": 1.0}, "target_accept must be between 0 and 1, got 1.0"),
        (HMCMoves, {"jitter": 1.0}, "jitter must be between 0 and 1, got 1.0"),
        (RandomWalkMoves, {"target_accept": 0.0}, "target_accept must be between 0 and 1, got 0.0"),
    ],
)
def test_bad_moves(as_user, moves, settings, match):
    with pytest.raises(ValueError, match=match):
        moves(**settings)
