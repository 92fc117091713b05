import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import black_boxes
from scoreprior.sbi import (
    BlackBox,
    Command,
    JaxSimulator,
    Simulations,
    TooManyFailures,
    simulate,
)
from scoreprior.sbi.cluster import connect
from scoreprior.sbi.journal import Arrived, Journal
from scoreprior.sbi.simulators import seeds
from scoreprior.sbi.store import Table
from scoreprior.sbi.worker import Status
from stats import assert_cov, assert_mean

KEY = jax.random.key(3)
PRIOR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
quiet = functools.partial(simulate, key=KEY, progress=False)
left_out = pytest.warns(UserWarning, match="draws are left out")
pytestmark = pytest.mark.promotes_ranks


def gaussian(key, theta):
    return theta + 0.5 * jax.random.normal(key, (2,))


def model():
    a = numpyro.sample("a", dist.Normal(2.0, 1.0))
    with numpyro.plate("three", 3):
        b = numpyro.sample("b", dist.Normal(a, 0.5))
    numpyro.deterministic("sum", b.sum())


def assert_same(a, b, rtol=0.0):
    """Equal draws, whose numbers are equal too."""
    assert np.array_equal(a.index, b.index)
    jax.tree.map(np.testing.assert_array_equal, a.theta, b.theta)
    np.testing.assert_allclose(a.x, b.x, rtol=rtol, atol=rtol)


def one_by_one(function, simulations, key=KEY):
    """`x` of all draws by a loop here."""
    _, x_key = jax.random.split(key)
    numbers = np.array(seeds(x_key, simulations.num))[simulations.index]
    thetas = np.asarray(simulations.theta)
    return np.stack([function(int(s), t) for s, t in zip(numbers, thetas, strict=True)])


@pytest.fixture(scope="module")
def client():
    with connect(None, 2) as client:
        yield client


# In JAX


def test_pairs_follow_the_joint_law():
    made = quiet(PRIOR, gaussian, 40_000)
    pairs = np.concatenate([made.theta, made.x], axis=1)
    one = np.eye(2)
    assert_mean(pairs, np.zeros(4))
    assert_cov(pairs, np.block([[one, one], [one, 1.25 * one]]))


def test_a_model_gives_a_dict_of_its_latent_sites():
    made = quiet(model, lambda key, t: t["a"] + t["b"].sum() + jax.random.normal(key), 40_000)
    assert made.theta.keys() == {"a", "b"}
    rows = np.column_stack([made.theta["a"], made.theta["b"][:, 0], made.x])
    assert_mean(rows, [2.0, 2.0, 8.0])
    assert_cov(rows, [[1.0, 1.0, 4.0], [1.0, 1.25, 4.25], [4.0, 4.25, 16 + 0.75 + 1]])


def test_a_draw_depends_on_the_key_and_its_number_only(monkeypatch):
    assert jax.local_device_count() == 2
    made = quiet(PRIOR, gaussian, 41)
    assert_same(made, quiet(PRIOR, JaxSimulator(gaussian, chunk_size=3), 41), rtol=1e-14)
    longer = quiet(PRIOR, gaussian, 1500)
    np.testing.assert_allclose(longer.x[:41], made.x, rtol=1e-14)
    assert np.array_equal(longer.theta[:41], made.theta)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert_same(made, quiet(PRIOR, gaussian, 41), rtol=1e-14)
    assert not np.isin(made.x, simulate(PRIOR, gaussian, 41, key=jax.random.key(4)).x).any()
    noise = quiet(PRIOR, lambda key, theta: jax.random.normal(key, (2,)), 1500)
    assert len(np.unique(noise.x)) == len(np.unique(noise.theta)) == 3000


def test_seeds_are_of_the_key_and_the_number_of_the_draw():
    made = seeds(KEY, 2000)
    assert made[:5] == seeds(KEY, 5)
    assert len(set(made)) == 2000
    assert not set(made) & set(seeds(jax.random.key(4), 2000))
    assert 0 <= min(made) < 2**21 < 2**31 - 2**21 < max(made) < 2**31


def test_every_device_takes_its_share():
    seen = set()

    def where(device):
        seen.add(int(device))
        return np.float64(0.0)

    def spy(key, theta):
        try:
            device = jax.lax.axis_index("draw")
        except NameError:  # where only the shape is asked for
            return jnp.zeros(())
        shape = jax.ShapeDtypeStruct((), float)
        return jax.pure_callback(where, shape, device, vmap_method="sequential")

    quiet(PRIOR, spy, 8)
    assert seen == {0, 1}


def test_draws_that_are_not_finite_are_left_out_and_counted(tmp_path):
    def faulty(key, theta):
        return jnp.where(theta[0] > 1, jnp.array([jnp.nan, 0.0]), gaussian(key, theta))

    with left_out:
        made = quiet(PRIOR, faulty, 500, max_failures=0.3, store=tmp_path / "store")
    everything = quiet(PRIOR, gaussian, 500)
    good = np.flatnonzero(everything.theta[:, 0] <= 1)
    assert np.array_equal(made.index, good)
    np.testing.assert_allclose(made.x, everything.x[good], rtol=1e-14)
    assert made.num_nan == 500 - len(good) > 0
    assert (made.num_failed, made.num_pending) == (0, 0)
    assert f"{made.num_nan} left out: NaN or infinite x" in repr(made)
    again = Simulations.load(tmp_path / "store")
    assert_same(again, made)
    assert again.left_out == made.left_out


def test_too_many_failures_are_an_error_that_keeps_what_succeeded():
    def faulty(key, theta):
        return jnp.where(theta[0] > 0, jnp.nan, theta[0])

    with pytest.raises(TooManyFailures, match=r"max_failures=0.1 of 200 allows: \d+ with NaN") as e:
        quiet(PRIOR, faulty, 200)
    kept = e.value.simulations
    assert len(kept) + kept.num_nan == 200
    assert np.array_equal(kept.x, kept.theta[:, 0])


def test_when_nothing_succeeds_the_error_says_what_to_do():
    calls = []

    def faulty(key, theta):
        jax.debug.callback(lambda _: calls.append(1), theta)
        return theta * jnp.nan

    with pytest.raises(ValueError, match="none of the first 16: 16 with NaN.*by hand"):
        quiet(PRIOR, JaxSimulator(faulty, chunk_size=16), 10_000, max_failures=0.9)
    jax.effects_barrier()
    assert len(calls) == 16


def test_a_bar_counts_draws_unless_it_is_not_wanted(capsys):
    simulate(PRIOR, gaussian, 40, key=KEY)
    assert "40/40" in capsys.readouterr().err
    quiet(PRIOR, gaussian, 40)
    assert capsys.readouterr().err == ""


# The store


def test_a_store_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "store"
    drawn = []

    def counted(key, theta):
        jax.debug.callback(lambda _: drawn.append(1), theta)
        return gaussian(key, theta)

    counted = JaxSimulator(counted, chunk_size=8)
    path.mkdir()
    first = quiet(PRIOR, counted, 16, store=path)
    longer = quiet(PRIOR, counted, 2500, store=path)
    shorter = quiet(PRIOR, counted, 7, store=path)
    jax.effects_barrier()
    assert len(drawn) == 2504  # the last chunk is filled up
    whole = quiet(PRIOR, gaussian, 2500)
    assert_same(longer, whole, rtol=1e-14)
    assert_same(first, quiet(PRIOR, gaussian, 16), rtol=1e-14)
    assert_same(shorter, quiet(PRIOR, gaussian, 7), rtol=1e-14)
    assert_same(Simulations.load(path), longer)


def test_a_store_without_a_value_goes_on_with_fewer_draws_and_then_with_more(tmp_path, monkeypatch):
    """Stopped before its first value, and again with a journal that ends in half a record."""
    path = tmp_path / "store"
    run = JaxSimulator.run

    def interrupted(self, *arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(JaxSimulator, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(PRIOR, gaussian, 60, store=path)
    monkeypatch.setattr(JaxSimulator, "run", run)
    assert_same(quiet(PRIOR, gaussian, 8, store=path), quiet(PRIOR, gaussian, 8), rtol=1e-14)
    (path / "arrived").write_bytes(bytes(5))
    assert len(Simulations.load(path)) == 8
    whole = quiet(PRIOR, gaussian, 60)
    assert_same(quiet(PRIOR, gaussian, 60, store=path), whole, rtol=1e-14)
    assert_same(Simulations.load(path), whole, rtol=1e-14)


def test_a_store_keeps_sites_of_any_name(tmp_path):
    def named():
        numpyro.sample("inner/a", dist.Normal())
        numpyro.sample("inner", dist.Poisson(3.0))

    made = quiet(named, lambda key, t: t["inner/a"] + t["inner"], 30, store=tmp_path / "store")
    assert_same(Simulations.load(tmp_path / "store"), made)
    assert made.theta["inner"].dtype == int


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("key", {"key": jax.random.key(4)}),
        ("program of prior", {"prior": dist.Normal(jnp.zeros(2), 2.0).to_event(1)}),
        ("theta", {"prior": model, "simulator": lambda key, theta: theta["b"]}),
        ("program of simulator", {"simulator": lambda key, theta: gaussian(key, theta) + 1}),
        ("simulator", {"simulator": BlackBox(black_boxes.gaussian)}),
    ],
)
def test_a_store_of_another_run_is_refused(tmp_path, what, change):
    arguments = {"prior": PRIOR, "simulator": gaussian, "num": 5, "key": KEY, "progress": False}
    simulate(**arguments, store=tmp_path / "store")
    with pytest.raises(ValueError, match=f"belongs to another run.*{what}.* differ: .*here"):
        simulate(**arguments | change, store=tmp_path / "store")
    assert len(Simulations.load(tmp_path / "store")) == 5


@pytest.mark.parametrize("constant", [2.0, np.full(2, 2.0)])
def test_a_black_box_is_known_by_its_code_and_what_it_captures(constant):
    from scoreprior.sbi.fingerprint import code_of

    def make(factor):
        def inner(seed, theta):
            return factor * theta

        return inner

    assert code_of(make(constant)) == code_of(make(constant + 0))
    assert code_of(make(constant)) != code_of(make(constant + 1))
    assert code_of(functools.partial(make, constant)) != code_of(functools.partial(make, 3.0))
    assert code_of(lambda seed, theta: theta) != code_of(lambda seed, theta: theta + 1)


def test_ctrl_c_returns_what_has_arrived(tmp_path, monkeypatch):
    add, calls = Table.add, []

    def interrupted(self, arrived):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        add(self, arrived)

    monkeypatch.setattr(Table, "add", interrupted)
    simulator = JaxSimulator(gaussian, chunk_size=8)
    # A process that was started in the background may ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        made = quiet(PRIOR, simulator, 100, store=tmp_path / "store")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (len(made), made.num_pending) == (24, 76)
    assert "76 not made yet" in repr(made)
    assert_same(Simulations.load(tmp_path / "store"), made)
    assert_same(
        quiet(PRIOR, simulator, 100, store=tmp_path / "store"), quiet(PRIOR, simulator, 100)
    )


# On a cluster


@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_a_black_box_gives_what_a_loop_would(client, batch_size):
    box = BlackBox(black_boxes.gaussian, scheduler=client, batch_size=batch_size)
    made = quiet(PRIOR, box, 60)
    assert np.array_equal(made.index, np.arange(60))
    assert np.array_equal(made.x, one_by_one(black_boxes.gaussian, made))
    assert np.array_equal(made.theta, quiet(PRIOR, gaussian, 60).theta)


def test_a_scheduler_is_found_at_its_address(client):
    box = BlackBox(black_boxes.gaussian, scheduler=client.scheduler.address)
    made = quiet(PRIOR, box, 20)
    assert np.array_equal(made.x, one_by_one(black_boxes.gaussian, made))


def test_a_black_box_sees_the_sites_of_a_model(client):
    box = BlackBox(lambda seed, t: t["a"] + t["b"].sum(), scheduler=client)
    made = quiet(model, box, 20)
    np.testing.assert_allclose(made.x, made.theta["a"] + made.theta["b"].sum(1), rtol=1e-14)


def test_a_worker_killed_in_mid_run_changes_nothing(client, tmp_path):
    kill = functools.partial(black_boxes.once, tmp_path / "killed", black_boxes.kill_the_worker)
    workers = set(client.nthreads())
    made = quiet(PRIOR, BlackBox(kill, scheduler=client, batch_size=5), 60)
    assert (tmp_path / "killed").exists()
    assert set(client.nthreads()) != workers
    assert np.array_equal(made.index, np.arange(60))
    assert np.array_equal(made.x, one_by_one(black_boxes.gaussian, made))


def test_only_the_draw_that_kills_workers_is_given_up(client, monkeypatch):
    client.wait_for_workers(2)
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    box = BlackBox(black_boxes.deadly, scheduler=client, batch_size=4)
    with left_out:
        made = quiet(PRIOR, box, 8, max_failures=0.9)
    theta = quiet(PRIOR, gaussian, 8).theta
    assert (theta[:, 0] > 1).sum() == 1
    assert np.array_equal(made.index, np.flatnonzero(theta[:, 0] <= 1))
    assert made.left_out == {"workers lost": 1}
    assert np.array_equal(made.x, one_by_one(black_boxes.gaussian, made))


def test_each_trouble_is_counted_and_the_rest_is_kept(client, tmp_path):
    box = BlackBox(black_boxes.troubled, scheduler=client, timeout=1.0)
    with left_out:
        made = quiet(PRIOR, box, 40, max_failures=0.9, store=tmp_path / "store")
    first = np.asarray(quiet(PRIOR, gaussian, 40).theta[:, 0])
    good = (first >= -1) & (first <= 0.5)
    expected = {
        "NaN or infinite x": (first < -1.5).sum(),
        "errors": ((first > 0.5) & (first <= 1.5)).sum(),
        "timeouts": (first > 1.5).sum(),
        "x of another shape": ((first >= -1.5) & (first < -1)).sum(),
    }
    assert min(expected.values()) > 0
    assert made.left_out == expected
    assert np.array_equal(made.index, np.flatnonzero(good))
    assert np.array_equal(made.x, one_by_one(black_boxes.gaussian, made))
    for part in ("ValueError: no root", "exit status 3", "no answer within 1 s", "shape (3,)"):
        assert any(part in message for message in made.messages.values()), part
    again = Simulations.load(tmp_path / "store")
    assert (again.left_out, again.messages) == (made.left_out, made.messages)


def test_retries_have_the_same_seed(client, tmp_path):
    flaky = functools.partial(black_boxes.fail_once_each, tmp_path)
    made = quiet(PRIOR, BlackBox(flaky, scheduler=client, retries=1), 20)
    assert np.array_equal(made.index, np.arange(20))
    np.testing.assert_allclose(made.x, one_by_one(black_boxes.gaussian, made), atol=1e-14)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="none of the first 3: 3.*OSError: the disk is full"):
        quiet(PRIOR, BlackBox(flaky, scheduler=client), 20)


PROGRAM = """
import json, sys
asked = json.load(sys.stdin)
seed, (a, b) = asked["seed"], asked["theta"]
assert seed == int(sys.argv[1])
if a > 1.5: sys.exit("too large")
if a > 1: print("hello")
print(json.dumps([[a + b], [seed]]))
"""


def test_a_command_reads_and_writes_json(client):
    command = Command([sys.executable, "-S", "-c", PROGRAM, "{seed}"], scheduler=client)
    with left_out:
        made = quiet(PRIOR, command, 40, max_failures=0.5)
    _, x_key = jax.random.split(KEY)
    expected = np.column_stack([made.theta.sum(1), np.array(seeds(x_key, 40))[made.index]])
    np.testing.assert_allclose(made.x[..., 0], expected, rtol=1e-15)
    first = np.asarray(quiet(PRIOR, gaussian, 40).theta[:, 0])
    assert np.array_equal(made.index, np.flatnonzero(first <= 1))
    text = " ".join(made.messages.values())
    assert "exit status 1: too large" in text
    assert "must be JSON numbers, got 'hello" in text


def test_a_command_is_killed_after_its_time(client, tmp_path):
    script = f"sleep 60 & echo $! >> {tmp_path}/pids; wait"
    command = Command(["sh", "-c", script], scheduler=client, timeout=0.3)
    with pytest.raises(ValueError, match="none of the first 1: 1 with timeouts"):
        quiet(PRIOR, command, 2)
    for pid in (tmp_path / "pids").read_text().split():
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_journal_keeps_every_whole_record(tmp_path):
    x = np.arange(6.0).reshape(3, 2)
    records = [
        Arrived(np.array([4]), np.array([Status.ERROR], np.uint8), None, {4: "no, and no"}),
        Arrived(np.array([0, 2, 5]), np.full(3, Status.DONE, np.uint8), x, {}),
    ]
    path = tmp_path / "journal"
    for record in records:
        Journal(path).add(record)

    def read():
        return list(Journal(path))

    def same(found):
        for one, record in zip(found, records, strict=False):
            jax.tree.map(np.testing.assert_array_equal, one._asdict(), record._asdict())
        return len(found)

    whole = path.read_bytes()
    assert same(read()) == 2
    for cut in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(cut)
        assert same(read()) == 1
    for broken in (whole[:5], bytes(12)):
        path.write_bytes(broken)
        assert read() == []
    Journal(path).clear()
    assert read() == []


# A process of its own, for a local cluster that dies with it

KILLED = """
import functools, os, signal, sys
import conftest, jax
jax.config.update("jax_numpy_rank_promotion", "allow")
import black_boxes, test_sbi_simulate as tests
from scoreprior.sbi import store
where = sys.argv[3]
if where == "journal":
    store.SHARE_OF_TIME = 1e-9  # arrays are written once
add, write = store.Store.add, store._write
tables = []

def die():
    if tables and tables[-1].num_done >= 40:
        print(tables[-1].num_done, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

def add_and_die(self, arrived):
    tables.append(self._table)
    add(self, arrived)
    die()

def write_and_die(array, values, rows):
    die()
    write(array, values, rows)

store.Store.add = add_and_die
if where == "arrays":
    store._write = write_and_die
if __name__ == "__main__":
    function = functools.partial(black_boxes.logged, sys.argv[2])
    box = tests.BlackBox(function, num_workers=1, batch_size=4)
    tests.quiet(tests.PRIOR, box, 200, store=sys.argv[1])
"""


@pytest.mark.parametrize("where", ["journal", "arrays"])
def test_a_killed_run_resumes_and_loses_nothing(client, tmp_path, where):
    """Killed after a draw that the journal alone has, and before arrays are written."""
    tests = Path(__file__).parent
    log = tmp_path / "log"
    with open(tmp_path / "out", "w+") as out:  # a pipe would be open until its workers are gone
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(log), where],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    told = (tmp_path / "out").read_text()
    assert child.returncode == -signal.SIGKILL, told
    stored = Simulations.load(tmp_path / "store")
    assert 40 <= len(stored) == int(told.splitlines()[-1]) < 200
    log.write_text("")
    box = BlackBox(functools.partial(black_boxes.logged, str(log)), scheduler=client)
    made = quiet(PRIOR, box, 200, store=tmp_path / "store")
    assert np.array_equal(made.index, np.arange(200))
    assert np.array_equal(made.x, one_by_one(black_boxes.gaussian, made))
    _, x_key = jax.random.split(KEY)
    numbers = np.array(seeds(x_key, 200))
    missing = np.setdiff1d(np.arange(200), stored.index)
    assert sorted(map(int, log.read_text().split())) == sorted(numbers[missing])


# Errors


def observed():
    a = numpyro.sample("a", dist.Normal())
    numpyro.sample("y", dist.Normal(a, 1.0), obs=1.0)


def empty():
    numpyro.deterministic("a", 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num": 0}, ValueError, "num must be at least 1, got 0"),
        ({"max_failures": 1.0}, ValueError, r"max_failures must be a share in \[0, 1\), got 1.0"),
        ({"prior": 3.0}, TypeError, "prior must be a NumPyro distribution or model, got 3.0"),
        (
            {"prior": dist.Normal(jnp.zeros(2))},
            ValueError,
            r"batch shape \(2,\): use to_event\(1\)",
        ),
        ({"prior": observed}, ValueError, r"model without observed sites, got \['y'\]"),
        ({"prior": empty}, ValueError, r"model with latent sites.*got \['a'\]"),
        ({"prior": lambda y: y}, ValueError, "model that runs without arguments, got TypeError"),
        (
            {"prior": dist.ImproperUniform(dist.constraints.real, (), (2,))},
            ValueError,
            "prior must be one that can be drawn from",
        ),
        ({"prior": dist.LogNormal(800.0, 1.0)}, ValueError, "prior must have finite draws, got 7"),
        ({"simulator": 3.0}, TypeError, "simulator must be a function of JAX"),
        (
            {"prior": dist.Normal(jnp.zeros(3)).to_event(1)},
            ValueError,
            r"simulator must accept draws of the prior; theta of shape \(3,\) fails",
        ),
        (
            {"simulator": lambda key, theta: float(theta[0])},
            ValueError,
            "a function that is not JAX is a BlackBox",
        ),
        (
            {"simulator": lambda key, theta: {"x": theta}},
            ValueError,
            "simulator must return one array of numbers",
        ),
        (
            {"simulator": BlackBox(functools.partial(black_boxes.once, threading.Lock(), None))},
            TypeError,
            "cannot be pickled",
        ),
    ],
)
def test_bad_arguments_are_named(as_user, change, error, message):
    arguments = {"prior": PRIOR, "simulator": gaussian, "num": 7, "key": KEY, "progress": False}
    with pytest.raises(error, match=message):
        simulate(**arguments | change)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: JaxSimulator(3), TypeError, "function must be callable"),
        (lambda: JaxSimulator(gaussian, chunk_size=0), ValueError, "chunk_size must be at least 1"),
        (lambda: BlackBox("run"), TypeError, "function must be callable"),
        (lambda: BlackBox(max, timeout=0.0), ValueError, "timeout must be a positive"),
        (lambda: BlackBox(max, retries=-1), ValueError, "retries must be at least 0, got -1"),
        (lambda: BlackBox(max, num_workers=0), ValueError, "num_workers must be at least 1"),
        (
            lambda: BlackBox(max, num_workers=1, scheduler="tcp://host:1"),
            ValueError,
            "num_workers is that of a local cluster",
        ),
        (lambda: Command("run"), TypeError, "command must be a list of words"),
        (lambda: Command([]), TypeError, "command must be a list of words"),
    ],
)
def test_bad_simulators_are_named(as_user, make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_is_no_store_is_named(tmp_path):
    import zarr

    with pytest.raises(ValueError, match="must be a Zarr group of simulations"):
        Simulations.load(tmp_path / "absent")
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="must be a Zarr group of simulations"):
        quiet(PRIOR, gaussian, 5, store=tmp_path / "file")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(ValueError, match="must have the format .*, got None"):
        quiet(PRIOR, gaussian, 5, store=tmp_path / "other")


@pytest.mark.parametrize("package", ["distributed", "zarr"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    make = {"distributed": lambda: BlackBox(black_boxes.gaussian), "zarr": lambda: gaussian}
    with pytest.raises(ImportError, match=r"scoreprior\[sbi\]"):
        quiet(PRIOR, make[package](), 5, store=tmp_path / "store")
