#!/usr/bin/env bash
# Installs what the tests need into .venv, once, and runs the linters and the tests.
# --slow runs those too that take over a minute each and have a smaller test of the same.
# Other arguments go to pytest: bash launch/test.sh tests/retrieval -x
# Two files at a time, as many tests wait for processes that they start; -n 0: one after another.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
exec .venv/bin/python -m pytest -p no:cacheprovider -n 2 --dist loadfile --no-loadscope-reorder "$@"
