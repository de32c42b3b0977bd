#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster. This folder must be on a disk that all nodes share. Install the
# program in it once, on a node: launch/worker.sh install --extra cuda13 (or cuda12).
#
#   launch/gpu_slurm.sh run  --name N --nodes 4 [--gpus 8] [--time 24:00:00] [--per gpu|node] [--partition P] \
#       [--account A] [--times K] -- --config=configs/agcl.py --workdir=runs/agcl
#   launch/gpu_slurm.sh tail --name N
#   launch/gpu_slurm.sh stop --name N         saves a checkpoint, and ends the training
#
# `run` submits launch/gpu_slurm.sbatch, unless you have a job of that name waiting or running. --gpus:
# GPUs of one node. By default each GPU has a process; --per node starts one process per node, which
# drives all its GPUs. 120 seconds before --time is over the training gets SIGTERM and saves, and the job
# queues again to continue; so it does if Slurm takes its nodes away. --times: a training that fails is
# started again up to K times (default 3). Its output goes to runs/N.log. --dry-run prints every command
# and runs none.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

name="${AFMRL_NAME:-}" nodes="" gpus=8 time=24:00:00 per=gpu partition="${AFMRL_PARTITION:-}"
account="${AFMRL_ACCOUNT:-}" times=3

run() {
    local tasks=1 known
    known="$(execute squeue --me --noheader "--name=$name" --format=%i)"
    if [[ -n "$known" ]]; then
        echo "Job $known of yours is called $name already: follow it with tail, or stop it first."
        return
    fi
    [[ "$per" == node ]] || tasks="$gpus"
    local options=(--parsable "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$tasks"
        "--gpus-per-node=$gpus" "--time=$time" --exclusive --mem=0 --requeue --signal=TERM@120
        --open-mode=append "--chdir=$root" "--output=$root/runs/$name.log")
    [[ -z "$partition" ]] || options+=("--partition=$partition")
    [[ -z "$account" ]] || options+=("--account=$account")
    # Slurm silently drops a job whose log it can't open.
    execute mkdir -p "$root/runs"
    execute sbatch "${options[@]}" "$root/launch/gpu_slurm.sbatch" "$per" "$times" "${arguments[@]}"
}

read_arguments "run tail stop" "name nodes gpus time per partition account times" "" "$@"
need_name name
case "$verb" in
    run)
        need nodes "how many machines"
        need_count nodes
        need_count gpus
        need_count times
        [[ "$per" == gpu || "$per" == node ]] || fail "--per is '$per': say gpu or node"
        need_training
        need_program sbatch "Slurm, or start this on the cluster's login node"
        run
        ;;
    tail) execute tail -n 100 -F "$root/runs/$name.log" ;;
    stop)
        need_program scancel "Slurm, or start this on the cluster's login node"
        # Running jobs get a signal. Waiting jobs get none, so they are cancelled.
        execute scancel --me "--name=$name" --state=PENDING
        execute scancel --me "--name=$name" --signal=TERM
        ;;
esac
