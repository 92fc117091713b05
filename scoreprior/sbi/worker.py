"""What workers do: one call of a black box per draw, which never raises but replies.

A worker needs this package, and what the black box itself imports.
"""

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Status(IntEnum):
    """What became of a draw; numbers are those in a store."""

    PENDING = 0
    DONE = 1
    NOT_FINITE = 2
    ERROR = 3
    TIMEOUT = 4
    WRONG_SHAPE = 5
    WORKER_LOST = 6


class Reply(NamedTuple):
    """`value` is there if `status` is `DONE`, and `message` if not."""

    status: Status
    value: np.ndarray | None
    message: str


Call = Callable[[int, Any], Reply]
"""One call of a black box, `call(seed, theta)`."""


def simulate_batch(
    call: Call, seeds: Sequence[int], thetas: Sequence[Any], retries: int
) -> tuple[list[Reply], float]:
    """Replies to several draws, each tried `1 + retries` times with one seed, and their seconds."""
    start = time.perf_counter()
    replies = []
    for seed, theta in zip(seeds, thetas, strict=True):
        reply = call(seed, theta)
        for _ in range(retries):
            if reply.status == Status.DONE:
                break
            reply = call(seed, theta)
        replies.append(reply)
    return replies, time.perf_counter() - start


def call_here(function: Callable[[int, Any], Any], seed: int, theta: Any) -> Reply:
    """`function(seed, theta)` in this process."""
    try:
        return Reply(Status.DONE, np.asarray(function(seed, theta), dtype=float), "")
    except (Exception, SystemExit) as error:
        return Reply(Status.ERROR, None, f"{type(error).__name__}: {error}")


_PROCESSES: dict[subprocess.Popen[Any], Any] = {}  # those that run now, and what for


def _start(words: Sequence[str], owner: Any, **pipes: Any) -> subprocess.Popen[Any]:
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, **pipes
    )
    _PROCESSES[process] = owner
    return process


def _kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and those it started, which are of its session, and wait for it."""
    _PROCESSES.pop(process, None)
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def stop_processes(owner: Any) -> None:
    """Kill what this worker runs for `owner`, a pickled function or a command."""
    for process, other in list(_PROCESSES.items()):
        if other == owner:
            _kill(process)


class Child:
    """A process that calls a pickled function, and is killed when a call takes too long."""

    def __init__(self, payload: bytes):
        self.payload = payload
        # The script runs without this package, and `-P` keeps its folder out of the path.
        script = Path(__file__).with_name("child.py")
        self._process = _start([sys.executable, "-P", str(script)], payload)
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._is_loaded = False

    def call(self, seed: int, theta: Any, timeout: float) -> Reply:
        """The reply; raises `TimeoutError`, and `EOFError` where the process has died.

        Loading the function, which may import a lot, does not count as time of the first call.
        """
        if not self._is_loaded:
            self._send((sys.path, self.payload))
            if message := self._receive(None):
                return Reply(Status.ERROR, None, message)
            self._is_loaded = True
        self._send((seed, theta))
        value, message = self._receive(timeout)
        return Reply(Status.ERROR if message else Status.DONE, value, message)

    def stop(self) -> int:
        """Kill the process; its exit status, negative for a signal."""
        _kill(self._process)
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            try:
                pipe.close()
            except BrokenPipeError:  # of what was not sent to a dead process
                pass
        return self._process.returncode

    def _listen(self) -> None:
        pipe: Any = self._process.stdout
        try:
            while True:
                self._answers.put(pickle.load(pipe))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            self._answers.put(None)

    def _send(self, message: Any) -> None:
        pipe: Any = self._process.stdin
        try:
            pickle.dump(message, pipe)
            pipe.flush()
        except BrokenPipeError:
            raise EOFError from None

    def _receive(self, timeout: float | None) -> Any:
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if answer is None:
            raise EOFError
        return answer


_CHILDREN: dict[int, Child] = {}  # by thread: a thread of a worker waits for its own


def call_in_child(payload: bytes, timeout: float, seed: int, theta: Any) -> Reply:
    """The pickled function `payload` of `(seed, theta)`, in at most `timeout` seconds.

    It runs in a process that stays from call to call, and is replaced once it was killed or died.
    """
    thread = threading.get_ident()
    child = _CHILDREN.get(thread)
    if child is None or child.payload != payload:
        if child is not None:
            child.stop()
        child = _CHILDREN[thread] = Child(payload)
    try:
        return child.call(seed, theta, timeout)
    except TimeoutError:
        del _CHILDREN[thread]
        child.stop()
        return Reply(Status.TIMEOUT, None, f"no answer within {timeout:g} s")
    except EOFError:
        del _CHILDREN[thread]
        return Reply(Status.ERROR, None, f"the process died, exit status {child.stop()}")


def run_command(command: Sequence[str], timeout: float | None, seed: int, theta: Any) -> Reply:
    """Run a command: JSON `{"seed": ..., "theta": ...}` on its input, JSON numbers as its output.

    `{seed}` in the words of the command is the seed.
    """
    words = [word.replace("{seed}", str(seed)) for word in command]
    theta = {k: v.tolist() for k, v in theta.items()} if isinstance(theta, dict) else theta.tolist()
    try:
        process = _start(words, command, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return Reply(Status.ERROR, None, f"{type(error).__name__}: {error}")
    with process:
        try:
            text = json.dumps({"seed": seed, "theta": theta})
            output, errors = process.communicate(text, timeout)
        except subprocess.TimeoutExpired:
            return Reply(Status.TIMEOUT, None, f"no answer within {timeout:g} s")
        finally:
            _kill(process)
    if process.returncode:
        message = f"exit status {process.returncode}: {errors.strip()[-200:]}"
        return Reply(Status.ERROR, None, message)
    try:
        return Reply(Status.DONE, np.asarray(json.loads(output), dtype=float), "")
    except (ValueError, TypeError):
        message = f"the output must be JSON numbers, got {output.strip()[:100]!r}"
        return Reply(Status.ERROR, None, message)


__all__ = [
    "Call",
    "Reply",
    "Status",
    "call_here",
    "call_in_child",
    "run_command",
    "simulate_batch",
    "stop_processes",
]
