"""The process in which a black box runs: a script, which imports no package.

Messages are pickles, one after another: `(sys.path, function)` first, answered by what went wrong
or ""; then `(seed, theta)`, answered by `(value, message)`. When the input ends, because the worker
is gone, so does the process, even in the middle of a call.
"""

import os
import pickle
import queue
import sys
import threading
from typing import Any, BinaryIO


def main() -> None:
    """Answer until killed."""
    # What the function prints must not mix with the answers: it goes to the errors.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sys.path[:], payload = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        import numpy as np

        function = pickle.loads(payload)
    except (Exception, SystemExit) as error:
        return _answer(answers, f"{type(error).__name__}: {error}")
    _answer(answers, "")
    while True:
        seed, theta = requests.get()
        try:
            value, message = np.asarray(function(seed, theta), dtype=float), ""
        except (Exception, SystemExit) as error:
            value, message = None, f"{type(error).__name__}: {error}"
        _answer(answers, (value, message))


def _listen(requests: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            requests.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)


def _answer(answers: BinaryIO, message: Any) -> None:
    pickle.dump(message, answers)
    answers.flush()


if __name__ == "__main__":
    main()
