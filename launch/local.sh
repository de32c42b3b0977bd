#!/usr/bin/env bash
# Installs everything into .venv, once, and trains the shipped base on the built-in catalogue.
# Arguments pass through: bash launch/local.sh --config.steps=50 --config.init_from=
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup base
# Asks for huge pages for a step's memory; otherwise the CPU zeroes it one small page at a time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m afmrl_jax.main --config=configs/agcl.py --config.init_from=base \
  --config.steps=200 "$@"
