"""The README's example runs as printed, and its commands are the two it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALL = "python3 -m pip install uv && python3 -m uv run"
COMMANDS = [f"{INSTALL} scoreprior demo", f"{INSTALL} pytest"]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_commands_are_the_two_promised():
    assert "".join(blocks("bash")).splitlines() == COMMANDS


@pytest.mark.slow
@pytest.mark.smoke
def test_the_example_runs_as_printed(tmp_path):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 24
    # Neither the settings of this suite nor the working tree: what a reader's machine has.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    row = re.search(r"^noise +(\S+) +(\S+)", run.stdout, flags=re.MULTILINE)
    assert row, run.stdout
    mean, sd = float(row[1]), float(row[2])
    assert abs(mean - 1.5) < 5 * sd
    assert 0 < sd < 0.75
