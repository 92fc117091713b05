"""Black boxes on a Dask cluster: batches of draws out, replies in, in whatever order.

A batch is a task. When its worker dies Dask gives it to another one, and gives up when several
died. Its draws are tried once more in the end, one by one while nothing else runs: what was beside
a deadly draw is not given up with it.
"""

import functools
import importlib.util
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scoreprior.sbi.journal import Arrived
from scoreprior.sbi.worker import Call, Reply, Status

if TYPE_CHECKING:
    from distributed import Client

TASK_SECONDS = 0.5
MAX_BATCH = 1000
IGNORE_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
NUM_AHEAD = 2  # tasks sent to each thread of a worker, so that none waits for the next one


def _load_apart() -> Any:
    spec: Any = importlib.util.spec_from_file_location(
        "_scoreprior_worker", Path(__file__).with_name("worker.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


remote = _load_apart()
"""`worker`, loaded such that no other process can import it: so its functions travel by value."""


class Job(NamedTuple):
    """One simulator at work.

    `thetas` and `seeds` are those of all draws, by number; `shape` is that of `x` as far as known.
    """

    call: Call
    retries: int
    batch_size: int | None
    thetas: Sequence[Any]
    seeds: Sequence[int]
    shape: tuple[int, ...] | None
    dtype: np.dtype


@contextmanager
def connect(scheduler: Any, num_workers: int | None) -> "Iterator[Client]":
    """A client of `scheduler`, which is an address or the client itself.

    Where it is `None`, of a cluster of `num_workers` local processes, for a while.
    """
    distributed = import_distributed()
    if isinstance(scheduler, distributed.Client):
        yield scheduler
    elif scheduler is not None:
        with distributed.Client(scheduler, set_as_default=False) as client:
            yield client
    else:
        from dask import config

        # A local cluster forgets a worker that does not come back in this time after it died, which
        # a busy machine may well need to start it; and a cluster without workers waits for ever.
        with (
            config.set({"distributed.deploy.lost-worker-timeout": "1 day"}),
            distributed.LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                preload=[IGNORE_CTRL_C],
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            yield client


def import_distributed() -> Any:
    """The package, an extra; raises `ImportError`, naming the extra, where it is missing."""
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            "black boxes run on dask.distributed: pip install 'scoreprior[sbi]'"
        ) from error
    return distributed


def run(client: "Client", job: Job, pending: np.ndarray) -> Generator[Arrived]:
    """Simulate the draws `pending`, and yield them batch by batch as they arrive.

    Where `job.shape` is `None` draws are made one after another until there is a value, whose shape
    is that of `x`, so that it does not depend on what arrives first. Tasks that still run are
    cancelled when the iteration is given up.
    """
    from distributed import KilledWorker, as_completed

    waiting, suspects = deque(pending.tolist()), deque[int]()
    sent: dict[Any, list[int]] = {}
    pace, threads, shape = _Pace(job.batch_size), _Threads(client), job.shape
    simulate = functools.partial(remote.simulate_batch, job.call, job.retries)
    completed = as_completed(loop=client.loop)

    def send(index: list[int]) -> None:
        seeds, thetas = [job.seeds[i] for i in index], [job.thetas[i] for i in index]
        future = client.submit(simulate, seeds, thetas, pure=False)
        sent[future] = index
        completed.add(future)

    def top_up() -> bool:
        """Send what can be sent; whether it is a draw that is alone for the last time."""
        if suspects and not waiting and not sent:
            send([suspects.popleft()])
            return True
        while waiting and len(sent) < (1 if shape is None else NUM_AHEAD * threads.count()):
            size = 1 if shape is None else min(pace.batch(), len(waiting))
            send([waiting.popleft() for _ in range(size)])
        return False

    try:
        is_last = top_up()
        for future in completed:
            index = sent.pop(future)
            replies: list[Reply] = []
            try:
                replies, seconds = future.result()
                pace.note(len(index), seconds)
            except KilledWorker as error:
                if is_last:
                    message = f"several workers died of it: {error}"
                    replies = [(int(Status.WORKER_LOST), None, message)]
                else:
                    suspects += index
            if replies:
                arrived, shape = _arrived(index, replies, shape, job.dtype)
                yield arrived
            is_last = top_up()
    finally:
        if client.status == "running":
            client.cancel(list(sent))


def _arrived(
    index: list[int], replies: list[Reply], shape: tuple[int, ...] | None, dtype: np.dtype
) -> tuple[Arrived, tuple[int, ...] | None]:
    """Replies as rows, and the shape of `x` if it is known now."""
    status = np.array([reply[0] for reply in replies], np.uint8)
    messages = {i: text for i, (_, _, text) in zip(index, replies, strict=True) if text}
    if shape is None:
        shape = next((value.shape for _, value, _ in replies if value is not None), None)
    if shape is None:
        return Arrived(np.array(index), status, None, messages), None
    x = np.full((len(index), *shape), np.nan, dtype)
    for row, (i, (_, value, _)) in enumerate(zip(index, replies, strict=True)):
        if value is None:
            continue
        if value.shape == shape:
            # What is too large for the type of x becomes infinite, and is counted as that.
            with np.errstate(over="ignore"):
                x[row] = value
        else:
            status[row] = Status.WRONG_SHAPE
            messages[i] = f"x of shape {value.shape}, others are of shape {shape}"
    return Arrived(np.array(index), status, x, messages), shape


class _Pace:
    """Draws per task, such that a task takes about `TASK_SECONDS`; one until a time is known."""

    def __init__(self, batch_size: int | None):
        self._batch_size = batch_size
        self._seconds = 0.0  # per draw
        self._is_known = False

    def batch(self) -> int:
        if self._batch_size is not None:
            return self._batch_size
        if not self._is_known:
            return 1
        return int(np.clip(TASK_SECONDS / max(self._seconds, 1e-9), 1, MAX_BATCH))

    def note(self, num: int, seconds: float) -> None:
        new = seconds / num
        # The first draws pay for imports and compilation, so the latest ones count most.
        self._seconds = (self._seconds + new) / 2 if self._is_known else new
        self._is_known = True


class _Threads:
    """How many draws can be made at once: asked now and then, for workers come and go."""

    def __init__(self, client: "Client"):
        self._client = client
        self._time = -np.inf
        self._count = 1

    def count(self) -> int:
        if time.perf_counter() > self._time + 1:
            threads: Any = self._client.nthreads()
            self._count = max(sum(threads.values()), 1)
            self._time = time.perf_counter()
        return self._count


__all__ = ["Job", "connect", "import_distributed", "remote", "run"]
