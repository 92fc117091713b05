"""What workers do: one call of a black box per draw, which never raises but replies.

Its functions are sent to workers by value, and it imports nothing but NumPy: a worker need not have
this package, nor take the time to import it. Functions sent with one task are not those of the
next, so what must last from task to task has a place of its own in the process, `_lasting()`.
"""

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

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


Reply = tuple[int, np.ndarray | None, str]
"""A status, a value where that is `DONE`, and a message where it is not."""

Call = Callable[[int, Any], Reply]
"""One call of a black box, `call(seed, theta)`."""


def simulate_batch(
    call: Call, retries: int, seeds: Sequence[int], thetas: Sequence[Any]
) -> tuple[list[Reply], float]:
    """Replies to several draws, each tried `1 + retries` times with one seed, and their seconds."""
    start = time.perf_counter()
    replies = []
    for seed, theta in zip(seeds, thetas, strict=True):
        reply = call(seed, theta)
        for _ in range(retries):
            if reply[0] == Status.DONE:
                break
            reply = call(seed, theta)
        replies.append(reply)
    return replies, time.perf_counter() - start


def stop_processes(owner: Any) -> None:
    """Kill what this worker runs for `owner`, a pickled function or a command."""
    for process, other in list(_lasting().processes.items()):
        if other == owner:
            _kill(process)


def _lasting() -> Any:
    """What lasts: processes with their owners, and children by thread."""
    place = types.ModuleType("_scoreprior_lasting")
    place.__dict__.update(processes={}, children={})
    return sys.modules.setdefault(place.__name__, place)


def _start(words: Sequence[str], owner: Any, **pipes: Any) -> Any:
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, **pipes
    )
    _lasting().processes[process] = owner
    return process


def _kill(process: Any) -> None:
    """Kill a process and those it started, which are of its session, and wait for it."""
    _lasting().processes.pop(process, None)
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _done(value: Any) -> Reply:
    return int(Status.DONE), np.asarray(value, dtype=float), ""


def _failed(message: str, status: Status = Status.ERROR) -> Reply:
    return int(status), None, message


class Child:
    """A process that calls a pickled function.

    It can be killed when a call takes too long, and takes no worker with it when it crashes.
    """

    def __init__(self, script: str, payload: bytes):
        self.payload = payload
        self._process = _start([sys.executable, "-c", script], payload)
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._is_loaded = False

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended, by what happened since the last call."""
        return self._process.poll() is not None

    def call(self, seed: int, theta: Any, timeout: float | None) -> Reply:
        """The reply; raises `TimeoutError`, and `EOFError` where the process has died.

        Loading the function, which may import a lot, does not count as time of the first call.
        """
        if not self._is_loaded:
            self._send((sys.path, self.payload))
            if message := self._receive(None):
                return _failed(message)
            self._is_loaded = True
        self._send((seed, theta))
        value, message = self._receive(timeout)
        return _failed(message) if message else _done(value)

    def stop(self) -> int:
        """Kill the process; its exit status, negative for a signal."""
        _kill(self._process)
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):  # of what was not sent to a dead process
                pipe.close()
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


def call_in_child(
    script: str, payload: bytes, timeout: float | None, seed: int, theta: Any
) -> Reply:
    """The pickled function `payload` of `(seed, theta)`, in at most `timeout` seconds.

    It runs in a process of the Python `script`, which stays from call to call, and is replaced once
    it was killed or died.
    """
    children, thread = _lasting().children, threading.get_ident()
    child = children.get(thread)
    if child is None or child.payload != payload or child.is_dead:
        if child is not None:
            child.stop()
        child = children[thread] = Child(script, payload)
    try:
        return child.call(seed, theta, timeout)
    except TimeoutError:
        del children[thread]
        child.stop()
        return _failed(f"no answer within {timeout:g} s", Status.TIMEOUT)
    except EOFError:
        del children[thread]
        return _failed(f"the process died, exit status {child.stop()}")


def run_command(command: Sequence[str], timeout: float | None, seed: int, theta: Any) -> Reply:
    """Run a command: JSON `{"seed": ..., "theta": ...}` on its input, JSON numbers as its output.

    `{seed}` in the words of the command is the seed.
    """
    words = [word.replace("{seed}", str(seed)) for word in command]
    theta = {k: v.tolist() for k, v in theta.items()} if isinstance(theta, dict) else theta.tolist()
    try:
        process = _start(words, command, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return _failed(f"{type(error).__name__}: {error}")
    with process:
        try:
            text = json.dumps({"seed": seed, "theta": theta})
            output, errors = process.communicate(text, timeout)
        except subprocess.TimeoutExpired:
            return _failed(f"no answer within {timeout:g} s", Status.TIMEOUT)
        finally:
            _kill(process)
    if process.returncode:
        message = f"exit status {process.returncode}: {errors.strip()[-200:]}"
        return _failed(message)
    try:
        return _done(json.loads(output))
    except (ValueError, TypeError):
        message = f"the output must be JSON numbers, got {output.strip()[:100]!r}"
        return _failed(message)


__all__ = [
    "Call",
    "Reply",
    "Status",
    "call_in_child",
    "run_command",
    "simulate_batch",
    "stop_processes",
]
