"""Runs of persistent and nested engines: the tree, interruption, resumption, warnings, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import scoreprior._run as run_module
from scoreprior.problem import Problem
from scoreprior.smc import NestedSampling, PersistentSMC, RandomWalkMoves, TemperedSMC
from test_smc_run import KEY, LINE, Interrupting, Y, assert_same, line, messages

pytestmark = pytest.mark.promotes_ranks

ENGINES = {
    "persistent": PersistentSMC(40, 3, 50, kernel=RandomWalkMoves()),
    "nested": NestedSampling(30, 3, 50, num_inner_steps=3, chunk_size=4),
}
PARTIAL = {
    "persistent": "interrupted at temperature .* of 1: .* not from the posterior",
    "nested": "interrupted with .* of the evidence in live points: .* wider than the posterior",
}
EXTRA = {"persistent": {"temperature_of_draw", "ancestor"}, "nested": set()}


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_survives_ctrl_c(name, monkeypatch, tmp_path):
    """One compiled problem: the run whole, interrupted, resumed, and of another key."""
    engine, of = ENGINES[name], Problem.from_model(line, Y)

    def draw(engine=engine, key=KEY, path=None):
        return engine.run(of, key, progress=False, checkpoint=path)

    reference = draw()
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

    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match=PARTIAL[name]):
        partial = draw(path=tmp_path / "run")
    monkeypatch.undo()
    assert partial.interrupted
    assert np.isnan(partial.extra["log_evidence"][1])
    assert partial.positions["x"].shape == (3, 50, 2)
    assert (
        partial.extra["step_size" if name == "persistent" else "stuck"][1].shape[1]
        < (record["step_size" if name == "persistent" else "stuck"].shape[1])
    )
    assert_same(draw(path=tmp_path / "run"), reference)
    # A finished run returns its draws without another step.
    assert_same(draw(path=tmp_path / "run"), reference)
    with pytest.raises(ValueError, match="differs in key"):
        draw(key=jax.random.key(9), path=tmp_path / "run")


def test_collapse_and_flat_likelihoods_are_reported():
    def model():
        numpyro.sample("x", LINE)
        numpyro.factor("nothing", jnp.zeros(()))

    engine = NestedSampling(3, 2, 20, num_inner_steps=1, max_remaining=0.5)
    found = messages(engine, Problem.from_model(model))
    assert any(re.match("collapsed cloud: .* raise num_live above 3", m) for m in found)
    assert any("of the slice moves found no point within the contour" in m for m in found)


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
        (TemperedSMC, {"num_ancestors": 1}, ValueError, "num_ancestors must be at least 2, got 1"),
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
