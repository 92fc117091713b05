#!/usr/bin/env bash
# Install the oldest Python and the oldest direct dependencies that pyproject.toml allows, with the
# package as a wheel, into .venv-lowest, and run the tests marked `smoke` against it.
set -euo pipefail
cd "$(dirname "$0")/.."

uv() { python3 -m uv "$@"; }

oldest=$(sed -n 's/^requires-python = ">=\([0-9.]*\)"$/\1/p' pyproject.toml)
python=$(uv python find --no-project "$oldest" 2>/dev/null) ||
    python=$(PYENV_VERSION=$oldest pyenv which "python$oldest" 2>/dev/null) || {
    echo "SKIPPED: no Python $oldest on this machine, so the lower bounds were not tried"
    exit 0
}

export VIRTUAL_ENV=$PWD/.venv-lowest
uv venv --quiet --clear --python "$python" "$VIRTUAL_ENV"
uv pip install --quiet --resolution lowest-direct --reinstall-package scoreprior --group test .
uv pip list --quiet | grep -iE '^(arviz|blackjax|equinox|jax|numpy|numpyro|optax) '
"$VIRTUAL_ENV/bin/pytest" -m smoke -n0
