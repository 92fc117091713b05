"""Time to import the library beyond importing NumPyro, each in fresh processes.

    python examples/benchmarks/import_time.py [--quick]

Medians over alternating runs, so that both see the same state of the machine. Processor time beside
wall time, because wall time grows with whatever else the machine does. Half a minute.
"""

import os
import statistics
import subprocess
import sys
import time

from common import arguments, show, write

MODULES = ("numpyro", "scoreprior")


def import_seconds(module: str) -> tuple[float, float]:
    """Wall and processor time of a fresh interpreter that imports `module` and stops."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    wall, after = time.perf_counter() - start, os.times()
    user = after.children_user - before.children_user
    return wall, user + after.children_system - before.children_system


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "import_time").parse_args()
    repeats = 3 if options.quick else 7
    times: dict[str, list[tuple[float, float]]] = {module: [] for module in MODULES}
    for module in MODULES:  # fill the file cache
        import_seconds(module)
    for _ in range(repeats):
        for module in MODULES:
            times[module].append(import_seconds(module))
    medians = {
        module: [statistics.median(kind) for kind in zip(*pairs, strict=True)]
        for module, pairs in times.items()
    }
    beyond = [b - a for a, b in zip(medians["numpyro"], medians["scoreprior"], strict=True)]
    rows = [*([f"`import {module}`", *medians[module]] for module in MODULES), ["beyond", *beyond]]
    show(f"Median of {repeats} fresh processes", ["seconds", "wall", "processor"], rows)
    write(options.output, {"seconds": times, "median": medians, "beyond_numpyro": beyond})


if __name__ == "__main__":
    main()
