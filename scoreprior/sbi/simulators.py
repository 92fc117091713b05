"""Simulators: what draws `x` given `theta`, and where that happens.

Each draw has a key, or a seed, of its own, which depends on the key of the run and the number of
the draw only. So do the draws, then, whatever the devices, workers, batches and order.
"""

import abc
import functools
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from scoreprior._typing import Key
from scoreprior._util import check_count, check_positive
from scoreprior.sbi import child, cluster
from scoreprior.sbi.cluster import remote
from scoreprior.sbi.fingerprint import code_of, name_of
from scoreprior.sbi.journal import Arrived
from scoreprior.sbi.worker import Call, Status
from scoreprior.train.identity import digest, program

if TYPE_CHECKING:
    from distributed import Client


class AbstractSimulator(abc.ABC):
    """What draws `x` given `theta`."""

    @abc.abstractmethod
    def identity(self, theta: PyTree[np.ndarray], key: Key) -> Mapping[str, Any]:
        """What must agree for a run to be resumed, as JSON; raises for a simulator of no use.

        `theta` are leaves [num, ...].
        """

    @abc.abstractmethod
    def run(
        self,
        theta: PyTree[np.ndarray],
        key: Key,
        pending: np.ndarray,
        shape: tuple[int, ...] | None,
    ) -> Generator[Arrived]:
        """Simulate the draws `pending`, and yield them as they arrive.

        `theta` are leaves [num, ...] and `shape` is that of `x`, where an earlier run knows it.
        """

    def shape(self, theta: PyTree[np.ndarray], key: Key) -> tuple[int, ...] | None:
        """That of `x`, where it is known without a draw; `theta` are leaves [num, ...]."""
        return None


@dataclass(frozen=True)
class JaxSimulator(AbstractSimulator):
    """`function(key, theta) -> x` in JAX, compiled, and vmapped over draws on all local devices.

    `theta` is one draw from the prior, an array or a dict, and `x` one array of numbers.

    **Arguments:** `chunk_size`, how many draws are made at once, and so between two steps of the
    progress bar, all devices together.
    """

    function: Callable[[Key, Any], Any]
    _: KW_ONLY
    chunk_size: int = 1024

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"function must be callable, function(key, theta), got {self.function!r}"
            )
        check_count("chunk_size", self.chunk_size)

    def identity(self, theta: PyTree[np.ndarray], key: Key) -> dict[str, Any]:
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), theta)
        self._check(first, key)
        return {
            "simulator": f"{name_of(self.function)} in JAX",
            "platform": jax.default_backend(),
            "program of simulator": program(self.function, key, first),
            "arrays of simulator": digest(self.function),
        }

    def shape(self, theta: PyTree[np.ndarray], key: Key) -> tuple[int, ...]:
        return self._check(jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), theta), key)

    def run(
        self,
        theta: PyTree[np.ndarray],
        key: Key,
        pending: np.ndarray,
        shape: tuple[int, ...] | None,
    ) -> Generator[Arrived]:
        mesh = Mesh(np.array(jax.local_devices()), ("draw",))
        # One size for all chunks, so one program; rows that fill up the last one are dropped.
        size = -(-min(self.chunk_size, len(pending)) // mesh.size) * mesh.size
        split = NamedSharding(mesh, PartitionSpec("draw"))
        for start in range(0, len(pending), size):
            index = pending[start : start + size]
            filled = np.resize(index, size)
            rows = jax.tree.map(operator.itemgetter(filled), theta)
            here = jax.device_put((filled, rows), split)
            x = np.asarray(_simulate(self.function, mesh, key, *here))[: len(index)]
            yield Arrived(index, np.full(len(index), Status.DONE, np.uint8), x, {})

    def _check(self, theta: PyTree[Array], key: Key) -> tuple[int, ...]:
        """The shape of one `x`, found without a draw."""
        where = f"theta of shape {jax.tree.map(jnp.shape, theta)}"
        try:
            made = eqx.filter_eval_shape(self.function, key, theta)
        except Exception as error:
            raise ValueError(
                f"simulator must accept draws of the prior; {where} fails: {error}; a function "
                "that is not JAX is a BlackBox"
            ) from error
        if not isinstance(made, jax.ShapeDtypeStruct) or not _is_real(made.dtype):
            raise ValueError(
                f"simulator must return one array of numbers, got {made} for {where}; a function "
                "that is not JAX is a BlackBox"
            )
        return made.shape


def _is_real(dtype: Any) -> bool:
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


@eqx.filter_jit
def _simulate(
    function: Callable[[Key, Any], Any],
    mesh: Mesh,
    key: Key,
    index: Int[Array, " n"],
    theta: PyTree[Array],
) -> Array:
    """`x` [n, *x] of some draws, each device its share, without a word between them."""

    def share(key: Key, index: Array, theta: PyTree[Array]) -> Array:
        def one(i: Array, theta: PyTree[Array]) -> Array:
            return function(jax.random.fold_in(key, i), theta)

        return jax.vmap(one)(index, theta).astype(float)

    draws = PartitionSpec("draw")
    return jax.shard_map(
        share, mesh=mesh, in_specs=(PartitionSpec(), draws, draws), out_specs=draws, check_vma=False
    )(key, index, theta)


@dataclass(frozen=True)
class AbstractBlackBox(AbstractSimulator):
    """What runs on the workers of a Dask cluster: `BlackBox` says what the arguments are."""

    _: KW_ONLY
    timeout: float | None = None
    retries: int = 0
    scheduler: "str | Client | None" = None
    num_workers: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        cluster.import_distributed()
        check_count("retries", self.retries, least=0)
        if self.timeout is not None:
            check_positive("timeout", self.timeout)
        for name in ("num_workers", "batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.scheduler is not None and self.num_workers is not None:
            raise ValueError(
                "num_workers is that of a local cluster and so needs scheduler=None, got "
                f"num_workers={self.num_workers} and scheduler={self.scheduler!r}"
            )

    @abc.abstractmethod
    def _call(self) -> Call:
        """What a worker does for one draw."""

    @abc.abstractmethod
    def _owner(self) -> Any:
        """For whom workers have started processes, which are killed in the end."""

    def run(
        self,
        theta: PyTree[np.ndarray],
        key: Key,
        pending: np.ndarray,
        shape: tuple[int, ...] | None,
    ) -> Generator[Arrived]:
        num, call = len(jax.tree.leaves(theta)[0]), self._call()
        thetas = [jax.tree.map(operator.itemgetter(i), theta) for i in range(num)]
        dtype = np.dtype(jnp.result_type(float))
        job = cluster.Job(
            call, self.retries, self.batch_size, thetas, seeds(key, num), shape, dtype
        )
        with cluster.connect(self.scheduler, self.num_workers) as client:
            try:
                yield from cluster.run(client, job, pending)
            finally:
                if client.status == "running":
                    client.run(remote.stop_processes, self._owner(), on_error="ignore")


@dataclass(frozen=True)
class BlackBox(AbstractBlackBox):
    """Any Python callable `function(seed, theta) -> x`, run by the workers of a Dask cluster.

    `seed` is an integer in [0, 2^31), `theta` a NumPy array or a dict of them, `x` an array of
    numbers or what NumPy makes one of. The workers are processes of this machine unless `scheduler`
    says where else; then a script that calls `simulate` needs the guard
    `if __name__ == "__main__":`, as processes import it anew.

    A draw that raises, or is not there after `timeout` seconds, is tried again `retries` times,
    **with the same seed**: a new one would change the law of `x` given `theta` to that of the runs
    that succeed. So retries are for failures from outside, such as a full disk. A draw whose worker
    dies is made by another worker, and given up when several have died of it alone.

    A worker calls the function in a process of its own, which imports what the function needs once
    and stays from draw to draw. It is replaced after a timeout or a crash. What the function
    captures travels with every batch of draws: load what is large inside of it, and keep it.

    **Arguments:** `timeout`, seconds for one draw; `scheduler`, the address of a Dask scheduler or
    a `distributed.Client`, whose workers need no more than NumPy and what the function imports;
    `num_workers`, of the local cluster, one per core when `None`; `batch_size`, draws per task,
    such that a task takes half a second when `None`.
    """

    function: Callable[[int, Any], Any] = field(kw_only=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"function must be callable, function(seed, theta), got {self.function}"
            )
        super().__post_init__()

    def identity(self, theta: PyTree[np.ndarray], key: Key) -> dict[str, Any]:
        try:
            _pickled(self.function)
        except Exception as error:
            raise TypeError(
                f"function must be one that can be sent to workers, got {name_of(self.function)}, "
                f"which cannot be pickled: {error}"
            ) from error
        return {
            "simulator": f"{name_of(self.function)}, a black box",
            "code of simulator": code_of(self.function),
        }

    def _call(self) -> Call:
        script = Path(child.__file__).read_text()
        return functools.partial(
            remote.call_in_child, script, _pickled(self.function), self.timeout
        )

    def _owner(self) -> bytes:
        return _pickled(self.function)


@dataclass(frozen=True)
class Command(AbstractBlackBox):
    """An external command, run once per draw by the workers of a Dask cluster.

    It reads the JSON object `{"seed": ..., "theta": ...}` from its standard input, where `theta` is
    a number, nested lists, or an object of them by site, and writes `x` as JSON numbers, in nested
    lists, to its standard output. In the words of the command `{seed}` stands for the seed. An exit
    status other than 0 is a failure. After `timeout` seconds it is killed, with all it started.

    The other arguments are those of `BlackBox`.
    """

    command: Sequence[str] = field(kw_only=False)

    def __post_init__(self) -> None:
        words = self.command
        if isinstance(words, str) or not words or not all(isinstance(w, str) for w in words):
            raise TypeError(f"command must be a list of words, such as ['./run'], got {words!r}")
        super().__post_init__()

    def identity(self, theta: PyTree[np.ndarray], key: Key) -> dict[str, Any]:
        return {"simulator": f"the command {list(self.command)}"}

    def _call(self) -> Call:
        return functools.partial(remote.run_command, tuple(self.command), self.timeout)

    def _owner(self) -> tuple[str, ...]:
        return tuple(self.command)


def seeds(key: Key, num: int) -> list[int]:
    """Seeds of draws `0 .. num`: 31 random bits each, which fit any program's integer."""

    def one(i: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, i), dtype=jnp.uint32) >> 1

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(num))).tolist()


def _pickled(function: Callable[..., Any]) -> bytes:
    from distributed.protocol.pickle import dumps

    return dumps(function)


__all__ = ["AbstractSimulator", "BlackBox", "Command", "JaxSimulator", "seeds"]
