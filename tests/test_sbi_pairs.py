"""A simulator in place of simulations: what is trained on is what `simulate` gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import black_boxes
from scoreprior.sbi import (
    NPSE,
    BlackBox,
    JaxSimulator,
    JointNPSE,
    Parameters,
    Simulations,
    TooManyFailures,
    simulate,
)

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(7)

LOC, SD, NOISE = jnp.array([1.0, -2.0]), jnp.array([2.0, 0.5]), 0.3
A = jnp.array([[1.0, 0.5], [0.0, 1.0], [0.7, -1.0]])
PRIOR = dist.Normal(LOC, SD).to_event(1)
PAIR = jnp.ones((20, 2)), jnp.ones((20, 3))


def simulator(key, theta):
    return A @ theta + NOISE * jax.random.normal(key, (3,))


def model_prior():
    numpyro.sample("theta", PRIOR)


@pytest.mark.parametrize("kind", [NPSE, JointNPSE])
@pytest.mark.parametrize("prior", [PRIOR, Parameters.of(PRIOR)], ids=["law", "parameters"])
@pytest.mark.parametrize("given", [simulator, JaxSimulator(simulator)], ids=["function", "wrapped"])
def test_a_simulator_gives_what_simulating_first_would(kind, prior, given):
    made = kind(prior, given, num_simulations=30, key=KEY)
    before = kind(PRIOR, simulate(PRIOR, simulator, 30, key=KEY, progress=False))
    np.testing.assert_array_equal(made.z, before.z)
    np.testing.assert_array_equal(made.x, before.x)


def test_a_simulator_sees_the_sites_of_a_model():
    parameters = Parameters.of(model_prior)
    made = NPSE(parameters, lambda key, theta: theta["theta"], num_simulations=30, key=KEY)
    np.testing.assert_allclose(made.x, LOC + SD * made.z, rtol=1e-12)


def test_a_simulator_is_run_once_and_its_draws_are_kept(tmp_path):
    runs = []

    def counted(key, theta):
        jax.debug.callback(lambda _: runs.append(1), theta)
        return simulator(key, theta)

    arguments = {"num_simulations": 32, "key": KEY, "store": tmp_path / "store"}
    made = NPSE(PRIOR, counted, **arguments)
    again = NPSE(PRIOR, counted, **arguments)
    jax.effects_barrier()
    assert len(runs) == 32
    np.testing.assert_array_equal(again.x, made.x)
    np.testing.assert_array_equal(Simulations.load(tmp_path / "store").x, made.x)


@pytest.mark.parametrize("kind", [NPSE, JointNPSE])
def test_the_bar_of_a_simulator_may_be_left_out(kind, capsys):
    kind(PRIOR, simulator, num_simulations=30, key=KEY)
    assert "30/30" in capsys.readouterr().err
    kind(PRIOR, simulator, num_simulations=30, key=KEY, progress=False)
    assert capsys.readouterr().err == ""


def test_a_black_box_is_run_by_its_workers_and_once(tmp_path):
    logged = functools.partial(black_boxes.logged, str(tmp_path / "log"))
    made = NPSE(PRIOR, BlackBox(logged, num_workers=1), num_simulations=12, key=KEY)
    assert made.x.shape == (12, 2)
    assert len((tmp_path / "log").read_text().split()) == 12
    before = simulate(PRIOR, simulator, 12, key=KEY, progress=False)
    np.testing.assert_array_equal(made.z, NPSE(PRIOR, before).z)


def test_failures_of_a_simulator_are_those_of_simulate():
    def faulty(key, theta, least):
        return jnp.where(theta[0] < least, jnp.nan, simulator(key, theta))

    with pytest.warns(UserWarning, match="of 400 draws are left out .* with NaN or infinite x"):
        made = NPSE(PRIOR, lambda k, t: faulty(k, t, -2.0), num_simulations=400, key=KEY)
    assert 360 <= len(made.x) == len(made.z) < 400
    with pytest.raises(TooManyFailures, match="max_failures=0.1 of 400 allows") as error:
        NPSE(PRIOR, lambda k, t: faulty(k, t, 1.0), num_simulations=400, key=KEY)
    kept = error.value.simulations
    np.testing.assert_allclose(NPSE(PRIOR, kept).x, kept.x)


def test_an_interrupted_simulator_leaves_what_was_drawn(monkeypatch):
    run = JaxSimulator.run

    def interrupted(self, *arguments):
        yield next(run(self, *arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(JaxSimulator, "run", interrupted)
    with pytest.warns(UserWarning, match="8 simulations are trained on, and 22 of 30 were not"):
        made = NPSE(PRIOR, JaxSimulator(simulator, chunk_size=8), num_simulations=30, key=KEY)
    assert made.x.shape == (8, 3)


@pytest.mark.parametrize("kind", [NPSE, JointNPSE])
@pytest.mark.parametrize(
    ("given", "arguments", "error", "message"),
    [
        (simulator, {}, ValueError, "num_simulations and key must be .* got no num_.* and no key"),
        (simulator, {"num_simulations": 9}, ValueError, "with a simulator, got no key for <func"),
        (simulator, {"key": KEY}, ValueError, "with a simulator, got no num_simulations for <"),
        (simulator, {"num_simulations": 0, "key": KEY}, ValueError, "num_sim.* at least 1, got 0"),
        ("pair", {"key": KEY}, ValueError, "key must be given with a simulator only, got .* tuple"),
        (
            "pair",
            {"num_simulations": 9, "store": "a"},
            ValueError,
            "num_simulations and store must",
        ),
        (3.0, {}, TypeError, r"the pair \(theta, x\), .* or be a simulator, got float"),
    ],
)
def test_simulators_and_simulations_are_told_apart(as_user, kind, given, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(PRIOR, PAIR if given == "pair" else given, **arguments)
