"""Runs of persistent and nested engines: the tree, interruption, resumption, warnings, errors."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import scoreprior._run as run_module
from killing import kill_a_run
from scoreprior.problem import Problem
from scoreprior.smc import NestedSampling, PersistentSMC, RandomWalkMoves, TemperedSMC
from test_smc_run import KEY, LINE, Interrupting, Y, assert_same, line, messages

pytestmark = pytest.mark.promotes_ranks

ENGINES = {
    "persistent": PersistentSMC(40, 3, 50, kernel=RandomWalkMoves()),
    "nested": NestedSampling(30, 3, 50, num_inner_steps=6, chunk_size=4),
}
KILLED = {"persistent": 2, "nested": 8}  # steps stored
PARTIAL = {
    "persistent": "interrupted at temperature .* of 1: .* not from the posterior",
    "nested": "interrupted with .* of the evidence in live points: .* wider than the posterior",
}
EXTRA = {"persistent": {"temperature_of_draw", "ancestor"}, "nested": {"ancestor"}}


def draw(name, key=KEY, checkpoint=None, of=None):
    of = of or Problem.from_model(line, Y)
    return ENGINES[name].run(of, key, progress=False, checkpoint=checkpoint)


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_survives_ctrl_c_and_death(name, monkeypatch, tmp_path, stored_steps):
    """One compiled problem: the run whole, interrupted, killed, resumed, and of another key."""
    of = Problem.from_model(line, Y)
    reference = draw(name, of=of)
    record = {key: values for key, (_, values) in reference.extra.items()}
    lp = jax.vmap(jax.vmap(of.log_density))(reference.positions)
    np.testing.assert_allclose(lp, reference.stats["lp"], rtol=1e-9)
    assert set(reference.stats) == {"lp", "group_of_draw"} | EXTRA[name]
    assert reference.positions["x"].shape == (3, 50, 2)
    assert np.isfinite(record["log_evidence"])
    assert record["log_evidence_se"] > 0
    # Draws of a row are in no order, though they are resampled from ordered particles.
    likelihood = jax.vmap(jax.vmap(of.log_likelihood))(reference.positions)
    order = np.argsort(np.argsort(np.asarray(likelihood), 1), 1)
    lag = np.corrcoef(order[:, 1:].ravel(), order[:, :-1].ravel())[0, 1]
    assert abs(lag) < 5 / np.sqrt(147)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "tqdm", Interrupting)
        with pytest.warns(UserWarning, match=PARTIAL[name]):
            partial = draw(name, checkpoint=tmp_path / "run", of=of)
    assert partial.interrupted
    assert np.isnan(partial.extra["log_evidence"][1])
    assert partial.positions["x"].shape == (3, 50, 2)
    assert (
        partial.extra["step_size" if name == "persistent" else "stuck"][1].shape[1]
        < (record["step_size" if name == "persistent" else "stuck"].shape[1])
    )
    assert_same(draw(name, checkpoint=tmp_path / "run", of=of), reference)
    # A finished run returns its draws without another step.
    assert_same(draw(name, checkpoint=tmp_path / "run", of=of), reference)
    with pytest.raises(ValueError, match="differs in key"):
        draw(name, key=jax.random.key(9), checkpoint=tmp_path / "run", of=of)

    kill_a_run("test_smc_engines_run", KILLED[name], tmp_path / "killed", name)
    stored_steps.clear()
    assert_same(draw(name, checkpoint=tmp_path / "killed", of=of), reference)
    assert stored_steps[0] > KILLED[name]


def test_collapse_and_flat_likelihoods_are_reported():
    def model():
        numpyro.sample("x", LINE)
        numpyro.factor("nothing", jnp.zeros(()))

    engine = NestedSampling(3, 2, 20, num_inner_steps=1, max_remaining=0.5)
    found = messages(engine, Problem.from_model(model))
    assert any(re.match("collapsed cloud: .* raise num_live above 3", m) for m in found)
    assert any("of the slice moves found no point within the contour" in m for m in found)


def test_a_likelihood_of_nan_is_refused_and_reported():
    """The likelihood is `exp(x_0)` below 3 and NaN above, where the prior hardly ever is."""

    def model(undefined):
        x = numpyro.sample("x", LINE)
        numpyro.factor("tilt", jnp.where(x[0] < 3.0, x[0], undefined))

    engine = NestedSampling(30, 2, 50, num_inner_steps=3, max_remaining=0.3)
    with pytest.warns(UserWarning, match="NaN on the way of .* return minus infinity") as caught:
        found = engine.run(Problem.from_model(model, jnp.nan), KEY, progress=False)
    share = found.extra["diverging"][1]
    assert 0 < share.mean() < 0.5
    said = f"NaN on the way of {share.mean():.2g} of all slice moves, "
    assert any(said in str(warning.message) for warning in caught)
    # Minus infinity is a value like any other.
    of = Problem.from_model(model, -jnp.inf)
    assert not any("NaN" in message for message in messages(engine, of))
    with warnings.catch_warnings(action="ignore"):
        quiet = engine.run(of, KEY, progress=False)
    assert not quiet.extra["diverging"][1].any()
    np.testing.assert_array_equal(quiet.positions["x"], found.positions["x"])


@pytest.mark.parametrize(
    "engine",
    [
        TemperedSMC(60, 2, max_moves=8),
        TemperedSMC(60, 2, kernel=RandomWalkMoves(), max_moves=8),
        PersistentSMC(60, 2, max_moves=8),
    ],
    ids=["HMC", "random walk", "persistent"],
)
def test_moves_to_a_likelihood_of_nan_are_refused_and_reported(engine):
    """The likelihood is `exp(2 x_0)` below 3.5, beyond the prior draws, and NaN above."""

    def model(undefined):
        x = numpyro.sample("x", LINE)
        numpyro.factor("tilt", jnp.where(x[0] < 3.5, 2 * x[0], undefined))

    with pytest.warns(UserWarning, match="NaN at .* of all proposed moves.*minus infinity"):
        found = engine.run(Problem.from_model(model, jnp.nan), KEY, progress=False)
    num_moves = found.extra["num_moves"][1]
    assert (found.extra["diverging"][1] * num_moves).sum() > 0
    # A group that has arrived waits for the other.
    assert np.isfinite(found.extra["acceptance_rate"][1][num_moves > 0]).all()
    of = Problem.from_model(model, -jnp.inf)
    assert not any("NaN" in message for message in messages(engine, of))


def test_groups_that_disagree_are_reported():
    """A broad mode and a narrow one of e^9 times its mass, which some groups never meet."""

    def model():
        x = numpyro.sample("x", LINE)
        narrow = 14.0 - 200 * jnp.sum((x - 1.0) ** 2)
        numpyro.factor("modes", jnp.logaddexp(-2 * jnp.sum(x**2), narrow))

    found = messages(NestedSampling(25, 8, 20, num_inner_steps=4), Problem.from_model(model))
    disagree = "groups disagree on the log evidence, from .* raise num_inner_steps"
    assert any(re.match(disagree, m) for m in found)


def test_too_few_steps_are_reported():
    with pytest.warns(UserWarning, match="max_steps = 5 reached with 0.3 of .*; raise max_steps"):
        NestedSampling(max_steps=5)._warn_unfinished(False, 0.3)


@pytest.mark.parametrize("engine", [PersistentSMC(40, 3), NestedSampling(40, 3)])
def test_data_that_are_impossible_are_an_error(engine):
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("nothing", jnp.where(x[0] > 100, 0.0, -jnp.inf))

    name = "num_live" if isinstance(engine, NestedSampling) else "num_particles"
    with pytest.raises(ValueError, match=f"all .* draws of 3 of 3 groups: .* raise {name}"):
        engine.run(Problem.from_model(model), KEY, progress=False)


@pytest.mark.parametrize(
    ("engine", "settings", "error", "match"),
    [
        (TemperedSMC, {"num_ancestors": 300}, ValueError, "a proper divisor of num_particles = 10"),
        (TemperedSMC, {"num_ancestors": 1000}, ValueError, "proper divisor .*, got 1000"),
        (TemperedSMC, {"num_ancestors": 1}, ValueError, "num_ancestors must be at least 4, got 1"),
        (PersistentSMC, {"target_ess": 0.0}, ValueError, "target_ess must be a positive finite"),
        (PersistentSMC, {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        (PersistentSMC, {"kernel": "hmc"}, TypeError, "kernel must be moves such as"),
        (
            NestedSampling,
            {"num_delete": 500},
            ValueError,
            "num_delete must be below num_live",
        ),
        (NestedSampling, {"num_live": 1}, ValueError, "num_live must be at least 2, got 1"),
        (NestedSampling, {"num_inner_steps": 0}, ValueError, "num_inner_steps must be at least 1"),
        (NestedSampling, {"max_remaining": 1.0}, ValueError, "max_remaining must be between 0 and"),
    ],
)
def test_bad_settings(as_user, engine, settings, error, match):
    with pytest.raises(error, match=match):
        engine(**settings)
