"""A run that is killed in a process of its own, as soon as its checkpoint holds so much."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from scoreprior._run import Checkpoint

SCRIPT = """
import importlib, sys
import conftest, jax
jax.config.update("jax_numpy_rank_promotion", "allow")
from killing import die_when
name, done, path, function, *args = sys.argv[1:]
die_when(int(done))
getattr(importlib.import_module(name), function)(*args, checkpoint=path)
"""


def die_when(done):
    """Kill this process as soon as `done` steps are stored."""
    save = Checkpoint.save

    def save_and_die(self, stored, state, chunks):
        save(self, stored, state, chunks)
        if stored == done:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint.save = save_and_die


def kill_a_run(name, done, path, *args, function="draw"):
    """Run `function(*args, checkpoint=path)` of test module `name` until `done` steps are stored.

    `args` are strings.
    """
    tests = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, str(done), str(path), function, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
