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

# Every command names the environment: `python3 -m uv pip` would otherwise write into python3's own.
environment=$PWD/.venv-lowest
target=$environment/bin/python
uv venv --quiet --clear --python "$python" "$environment"
uv pip install --quiet --python "$target" --resolution lowest-direct \
    --reinstall-package scoreprior --group test .
uv pip list --quiet --python "$target" |
    grep -iE '^(arviz|blackjax|equinox|jax|numpy|numpyro|optax) '
"$environment/bin/pytest" -m smoke -n0
