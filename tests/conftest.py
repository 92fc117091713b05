"""Settings under which the whole suite runs.

Double precision, so that a tolerance measures the method and not the rounding; rank promotion is an
error, so that no shape is guessed; two host devices, so that parallel chains can be tried anywhere.
Most of the time goes into compiling programs that run once: XLA does it without optimising, in
half the time. Compiled programs are kept in `.jax_cache/`, for the next run. Where there are as
many workers as cores each keeps to one, as threads of one that wait for a core of the other's
make both slow.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

worker, num_workers = (os.environ.get(f"PYTEST_XDIST_WORKER{x}", "") for x in ("", "_COUNT"))
if worker and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    if int(num_workers) >= len(cores):
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax  # noqa: E402  (the flags are read when JAX starts)
import jaxtyping  # noqa: E402

# ArviZ imports NumPyro and swallows errors: with warnings as errors, half of it would be left.
import numpyro.distributions  # noqa: E402, F401

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def _memory_maps() -> Iterator[None]:
    """Let compiled programs go before they fill the process's table of memory maps.

    Each takes some twenty maps, and Linux allows 65,530: beyond that LLVM "cannot allocate memory",
    however much there is, and the worker dies.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _rank_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """NumPyro and blackjax promote ranks inside: tests of them are marked `promotes_ranks`."""
    if request.node.get_closest_marker("promotes_ranks") is None:
        yield
        return
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def as_user() -> Iterator[None]:
    """Without the annotation checks of the suite: errors are those that a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def stored_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of steps at which checkpoints are stored from now on."""
    from scoreprior._run import Checkpoint

    steps, save = [], Checkpoint.save

    def recorded(self, done, state, chunks):
        steps.append(done)
        save(self, done, state, chunks)

    monkeypatch.setattr(Checkpoint, "save", recorded)
    return steps
