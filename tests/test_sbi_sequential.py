"""Sequential rounds: truncation on laws in closed form, and runs that stop and go on."""

import functools
import sys
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import black_boxes
from scoreprior.denoise import Gaussian
from scoreprior.flow import Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior
from scoreprior.sbi import (
    NPSE,
    TSNPSE,
    AbstractSimulator,
    BlackBox,
    Parameters,
    SetEncoder,
    Simulations,
    TooManyFailures,
)
from scoreprior.sbi.sequential import Region, distance, draw_truncated
from scoreprior.sbi.simulators import seeds
from scoreprior.sbi.store import Arrived
from scoreprior.sbi.worker import Status
from stats import assert_mean

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(11)
train = sys.modules["scoreprior.train.fit"]  # `train.fit` itself is a function
PRIOR = dist.Normal(jnp.zeros(1), 1.0).to_event(1)
X_O = jnp.array([0.7])
SMALL = {
    "settings": {"width": 8, "num_blocks": 1},
    "training": {"num_steps": 20, "batch_size": 32, "progress": False},
}


def gaussian(sd, mean=(0.3, -0.2)):
    law = Moments(jnp.array(mean), jnp.asarray(sd) ** 2)
    return ScorePrior(Flow(Gaussian(law), law, sigma_min=1e-5, sigma_max=10.0))


def test_a_truncated_prior_is_the_prior_on_the_region():
    """`log q >= threshold` is an ellipse, of which the share of prior draws is counted by hand."""
    parameters = Parameters.of(dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    sd = jnp.array([0.4, 0.2])
    region = Region.of(gaussian(sd), KEY, 0.05)
    radius = -2 * (region.threshold - gaussian(sd).log_prob(jnp.array([0.3, -0.2])))
    np.testing.assert_allclose(radius, -2 * np.log(0.05), rtol=0.1)  # 95 % of a chi^2 of 2
    theta, acceptance = draw_truncated(parameters, region, KEY, 3000)
    squared = jnp.sum(((theta - jnp.array([[0.3, -0.2]])) / sd[None]) ** 2, 1)
    assert jnp.max(squared) <= radius * (1 + 1e-6)
    free = jax.random.normal(jax.random.key(1), (400_000, 2))
    inside = jnp.sum(((free - jnp.array([[0.3, -0.2]])) / sd[None]) ** 2, 1) <= radius
    share = float(inside.mean())
    assert abs(acceptance - share) < 5 * np.sqrt(share / (3000 / share)) + 1e-3
    assert_mean(theta, np.asarray(free[inside].mean(0)), bias=0.2)
    assert region(free[:1000]).tolist() == inside[:1000].tolist()


def test_distance_is_zero_for_one_law_and_the_shift_for_two():
    one, other = gaussian([0.4, 0.4]), gaussian([0.4, 0.4], (0.5, -0.2))
    assert distance(one, one, KEY) == 0
    np.testing.assert_allclose(distance(one, other, KEY), 0.5 / np.sqrt(2), rtol=0.15)


def simulate(key, theta):
    return theta + 0.05 * jax.random.normal(key, (1,))


def test_rounds_narrow_the_prior_and_stop_when_nothing_changes():
    """The posterior has sd 0.05, so a region of all its mass holds few prior draws."""
    training = {"num_steps": 60, "batch_size": 64, "progress": False}
    settings = {"width": 8, "num_blocks": 1}
    run = TSNPSE(PRIOR, simulate, 300, 5, tolerance=0.5, settings=settings, training=training)
    result = run.fit(jnp.array([0.7]), key=KEY)
    first, *later = result.rounds
    assert first.acceptance == 1
    assert np.isnan(first.change)
    assert 1 < len(result.rounds) < 5
    assert all(0.05 < r.acceptance < 0.25 for r in later)
    assert later[-1].change <= 0.5
    assert [r.num_simulations for r in later] == [300 * (i + 2) for i in range(len(later))]
    draws = result.posterior.sample(KEY, jnp.array([0.7]), 2000)
    assert abs(draws.mean() - 0.7) < 0.02
    assert abs(draws.std() - 0.05) < 0.01


# Simulators of any kind.


@dataclass
class InPython(AbstractSimulator):
    """`x ~ N(theta, 0.05^2)` one by one; `drawn` says which, and `trouble` comes after `num`."""

    trouble: type[BaseException] = KeyboardInterrupt
    num: int = -1
    drawn: list = field(default_factory=list)

    def identity(self, theta, key):
        return {"simulator": "in Python"}

    def run(self, theta, key, pending, shape):
        numbers = seeds(key, len(theta))
        for i in pending:
            if len(self.drawn) == self.num:
                raise self.trouble
            self.drawn.append(int(i))
            x = theta[i] + 0.05 * np.random.default_rng(numbers[i]).normal(size=1)
            yield Arrived(np.array([i]), np.array([Status.DONE], np.uint8), x[None], {})


class Training(Exception):
    """Raised where training would begin."""


@pytest.fixture
def untrained(monkeypatch):
    @functools.wraps(NPSE.fit)
    def fit(self, **settings):
        raise Training

    monkeypatch.setattr(NPSE, "fit", fit)


@pytest.fixture(scope="module")
def whole():
    """Two rounds without an interruption, and without a checkpoint."""
    return TSNPSE(PRIOR, InPython(), 60, 2, **SMALL).fit(X_O, key=KEY)


def assert_same(run, other):
    """All that was drawn and learnt, to the last bit."""
    np.testing.assert_array_equal(run.theta, other.theta)
    np.testing.assert_array_equal(run.x, other.x)
    np.testing.assert_array_equal(np.array(run.rounds), np.array(other.rounds))
    leaves = [jax.tree.leaves(r.posterior.denoiser) for r in (run, other)]
    for ours, its in zip(*leaves, strict=True):
        np.testing.assert_array_equal(ours, its)


def test_an_interrupted_run_returns_whole_rounds_and_goes_on_as_if_nothing_had_been(
    whole, tmp_path
):
    """Stopped by Ctrl-C in the first round and in the second, and by an error in the second."""
    simulator = InPython(num=25)
    rounds = TSNPSE(PRIOR, simulator, 60, 2, **SMALL)
    again = functools.partial(rounds.fit, X_O, key=KEY, checkpoint=tmp_path / "rounds")
    with pytest.raises(KeyboardInterrupt, match="before the end of the first round"):
        again()
    assert len(Simulations.load(tmp_path / "rounds" / "simulations-0001")) == 25
    simulator.num = 90
    part = again()
    assert part.interrupted
    assert [r.num_simulations for r in part.rounds] == [60]
    np.testing.assert_array_equal(part.x, whole.x[:60])
    simulator.trouble, simulator.num = OSError, 100
    with pytest.raises(OSError) as caught:
        again()
    np.testing.assert_array_equal(caught.value.done.x, part.x)
    assert "rounds kept in attribute done of this error: 1" in caught.value.__notes__[-1]
    simulator.num = -1
    assert_same(again(), whole)
    assert not again().interrupted
    assert simulator.drawn == [*range(60), *range(60)]


def test_more_rounds_are_added_to_those_of_a_checkpoint(whole, tmp_path):
    simulator = InPython()
    for num_rounds in (1, 2):
        rounds = TSNPSE(PRIOR, simulator, 60, num_rounds, **SMALL)
        made = rounds.fit(X_O, key=KEY, checkpoint=tmp_path / "rounds")
        assert len(simulator.drawn) == 60 * num_rounds
    assert_same(made, whole)


def test_training_that_is_done_is_not_done_again(whole, tmp_path, monkeypatch):
    steps, advance = [], train.advance

    def counted(run, state, num, evaluation):
        steps.append(num)
        return advance(run, state, num, evaluation)

    monkeypatch.setattr(train, "advance", counted)
    rounds = TSNPSE(PRIOR, InPython(), 60, 2, **SMALL)
    for _ in range(2):
        made = rounds.fit(X_O, key=KEY, checkpoint=tmp_path / "rounds")
        assert steps == [20, 20]
    assert_same(made, whole)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"x_o": X_O + 1}, "x_o"),
        ({"key": jax.random.key(12)}, "key"),
        ({"prior": dist.Normal(jnp.zeros(1), 2.0).to_event(1)}, "program of prior"),
        ({"num_simulations": 50}, "num_simulations"),
        ({"quantile": 0.01}, "quantile"),
        ({"settings": {"width": 9}}, "settings"),
        ({"training": {"num_steps": 21}}, "training"),
        ({"settings": {"embedding": SetEncoder((1,), key=KEY)}}, "arrays of settings"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, untrained, change, what):
    def fit(**change):
        given = {"prior": PRIOR, "simulate": simulator, "num_simulations": 60, "num_rounds": 2}
        given |= SMALL | change
        x_o, key = given.pop("x_o", X_O), given.pop("key", KEY)
        return TSNPSE(**given).fit(x_o, key=key, checkpoint=tmp_path / "rounds")

    simulator = InPython()
    with pytest.raises(Training):
        fit()
    with pytest.raises(ValueError, match=f"is of another run, it differs in:.* {what} "):
        fit(**change)
    simulator.num = 0
    with pytest.raises(Training):
        fit()  # and what is there stays
    assert len(simulator.drawn) == 60


def test_a_checkpoint_of_another_simulator_is_refused(tmp_path, untrained):
    def fit(simulator):
        TSNPSE(PRIOR, simulator, 60, 2).fit(X_O, key=KEY, checkpoint=tmp_path / "rounds")

    with pytest.raises(Training):
        fit(simulate)
    with pytest.raises(ValueError, match="program of simulator"):
        fit(lambda key, theta: simulate(key, theta) + 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint must be a folder, got the file"):
        TSNPSE(PRIOR, simulate, 60, 2).fit(X_O, key=KEY, checkpoint=tmp_path / "file")


def test_a_black_box_is_simulated_by_its_workers(untrained, tmp_path):
    logged = functools.partial(black_boxes.logged, str(tmp_path / "log"))
    rounds = TSNPSE(PRIOR, BlackBox(logged, num_workers=1), 12, 1)
    with pytest.raises(Training):
        rounds.fit(X_O, key=KEY, checkpoint=tmp_path / "rounds")
    made = Simulations.load(tmp_path / "rounds" / "simulations-0001")
    assert made.x.shape == (12, 1)
    assert len(set((tmp_path / "log").read_text().split())) == 12


def test_draws_that_fail_are_left_out_up_to_a_share(untrained, monkeypatch):
    def faulty(key, theta):
        return jnp.where(theta > 0.5, jnp.nan, simulate(key, theta))

    with pytest.raises(TooManyFailures, match="max_failures=0.1 of 60 allows"):
        TSNPSE(PRIOR, faulty, 60, 1).fit(X_O, key=KEY)
    seen = []
    monkeypatch.setattr(NPSE, "fit", lambda self, **settings: seen.append(self.x) or 1 / 0)
    with (
        pytest.warns(UserWarning, match="of 60 draws are left out"),
        pytest.raises(ZeroDivisionError),
    ):
        TSNPSE(PRIOR, faulty, 60, 1, max_failures=0.9).fit(X_O, key=KEY)
    assert 30 < len(seen[0]) < 60
    assert jnp.isfinite(seen[0]).all()


# Bad input.


@pytest.mark.parametrize(
    ("x_o", "message"),
    [
        (jnp.zeros(2), r"x_o must have the shape of a simulation, \(1,\), got \(2,\)"),
        (jnp.zeros(()), r"x_o must have the shape of a simulation, \(1,\), got \(\)"),
        (jnp.array([jnp.nan]), "x_o must be finite, got 1 of 1 entries"),
        (jnp.array([jnp.inf]), "x_o must be finite, got 1 of 1 entries"),
    ],
)
def test_observations_are_refused_before_any_long_work(as_user, untrained, tmp_path, x_o, message):
    """A function of JAX is not run, and another simulator once, for the shape of its `x`."""
    runs = []

    def counted(key, theta):
        jax.debug.callback(lambda _: runs.append(1), theta)
        return simulate(key, theta)

    simulator = InPython()
    for name, one in (("function", counted), ("other", simulator)):
        with pytest.raises(ValueError, match=message):
            TSNPSE(PRIOR, one, 60, 2).fit(x_o, key=KEY, checkpoint=tmp_path / name)
    jax.effects_barrier()
    assert not runs
    assert not (tmp_path / "function").exists()
    assert len(simulator.drawn) == ("shape" in message)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1), None),
        ((3, 1), None),
        ((4, 1), "x_o must hold from 1 to 3 items, as simulations, got 4"),
        ((0, 1), "x_o must hold from 1 to 3 items, as simulations, got 0"),
        ((1,), r"x_o must be a set of items \(1,\), got shape \(1,\)"),
        ((3, 2), r"x_o must be a set of items \(1,\), got shape \(3, 2\)"),
    ],
)
def test_an_observation_may_be_a_set_of_fewer_items(untrained, shape, message):
    def several(key, theta):
        return theta + jax.random.normal(key, (3, 1))

    settings = {"embedding": SetEncoder((1,), key=KEY)}
    with pytest.raises(ValueError if message else Training, match=message):
        TSNPSE(PRIOR, several, 60, 1, settings=settings).fit(jnp.zeros(shape), key=KEY)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_simulations": 2}, ValueError, "num_simulations must be at least 4, got 2"),
        ({"num_rounds": 0}, ValueError, "num_rounds must be at least 1, got 0"),
        ({"quantile": 0.0}, ValueError, r"quantile must lie in \(0, 1\), got 0"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be a positive finite number"),
        ({"max_failures": 1.0}, ValueError, r"max_failures must be a share in \[0, 1\), got 1"),
        ({"simulate": 3.0}, TypeError, "simulate must be a function of JAX, simulate.*got 3.0"),
        ({"settings": {"widht": 8}}, ValueError, r"settings must be .*'width'\], got \['widht'\]"),
        ({"settings": {"store": "a"}}, ValueError, r"settings must be among .* got \['store'\]"),
        ({"training": {"checkpoint": "a"}}, ValueError, r"training .* got \['checkpoint'\]"),
    ],
)
def test_rounds_that_are_refused(as_user, change, error, message):
    given = {"simulate": simulate, "num_simulations": 10, "num_rounds": 2} | change
    with pytest.raises(error, match=message):
        TSNPSE(PRIOR, **given)
