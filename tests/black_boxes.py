"""Black boxes for the tests of simulations; workers import no more than this."""

import os
import signal
import time
from pathlib import Path

import numpy as np


def gaussian(seed, theta):
    """`x ~ N(theta, I/4)`."""
    return theta + 0.5 * np.random.default_rng(seed).normal(size=np.shape(theta))


def logged(path, seed, theta):
    """`gaussian`, slowly, with its seed in a file."""
    with open(path, "a") as file:
        file.write(f"{seed}\n")
    time.sleep(0.01)
    return gaussian(seed, theta)


def once(path, act, seed, theta):
    """`gaussian`, after `act()` the first time that `theta[0] > 0`, and in no process again."""
    if theta[0] > 0:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            act()
    return gaussian(seed, theta)


def kill_the_worker():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def fail():
    raise OSError("the disk is full")


def fail_once_each(folder, seed, theta):
    """`gaussian`, after a failure for each seed."""
    return once(Path(folder) / str(seed), fail, seed, np.abs(theta)) - np.abs(theta) + theta


def deadly(seed, theta):
    """`gaussian`, but every worker dies that tries a `theta[0] > 1`."""
    if theta[0] > 1:
        kill_the_worker()
    time.sleep(0.02)
    return gaussian(seed, theta)


def troubled(seed, theta):
    """`gaussian`, or one trouble of five by the size of `theta[0]`."""
    if theta[0] > 1.5:
        time.sleep(60)
    if theta[0] > 1:
        os._exit(3)
    if theta[0] > 0.5:
        raise ValueError(f"no root for theta[0] of {theta[0] > 0.5}")
    if theta[0] < -1.5:
        return np.full(2, np.inf)
    if theta[0] < -1:
        return np.zeros(3)
    print("what a black box prints is no answer")  # noqa: T201
    return gaussian(seed, theta)
