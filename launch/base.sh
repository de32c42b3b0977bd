#!/usr/bin/env bash
# Trains the base that ships with the package, and writes its folder: bash launch/base.sh runs/base
# An hour or more on two CPU cores. The same command again goes on where the last one stopped.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

workdir="${1:?say where the run is kept: bash launch/base.sh runs/base}"
folder=afmrl_jax/assets/base
setup base
# Asks for huge pages for a step's memory; otherwise the CPU zeroes it one small page at a time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
.venv/bin/python -m afmrl_jax.main --config=configs/pretrain.py --workdir="$workdir" "${@:2}"
.venv/bin/python -m afmrl_jax.main --config=configs/export.py --config.checkpoint="$workdir" \
  --config.out="$folder" --config.dtype=bfloat16
cat >> "$folder/README.md" <<'END'

## How it was made

`bash launch/base.sh runs/base` trained it and wrote this folder. Its listings are those of a world
of products (`data.path=world`), none of which is in the built-in catalogue; the evaluation above is
of families that training never showed. `init_from=base` starts an encoder or a generator from it.
END
