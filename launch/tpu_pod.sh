#!/usr/bin/env bash
# Trains on one slice of Cloud TPUs (one machine or several), which a queued resource provides.
#
#   launch/tpu_pod.sh create  --name N --zone Z --type v5litepod-16 [--spot] [--runtime R]   waits until the slice is ready
#   launch/tpu_pod.sh install --name N --zone Z                          installs this folder's program on all workers
#   launch/tpu_pod.sh run     --name N --zone Z [--times K] -- --config=configs/agcl.py --config.checkpoint_dir=gs://BUCKET/RUN
#   launch/tpu_pod.sh tail    --name N --zone Z [--worker 0|1|...|all]   prints a worker's output
#   launch/tpu_pod.sh stop    --name N --zone Z                          saves a checkpoint, and ends the training
#   launch/tpu_pod.sh delete  --name N --zone Z                          gives the slice back, which costs money until then
#
# `create` uses an existing slice of that name, and replaces one that was taken away (spot) or could not
# be provided. `run` starts the same command on all workers in the background, so that your connection
# may break. --times: a training that fails is started again up to K times (default 3). The same `run`
# after `stop`, or on another slice, continues from the last checkpoint: give agcl and sft
# --config.checkpoint_dir=gs://BUCKET/RUN, and other programs a --workdir that all workers share.
# --project P defaults to gcloud's setting. --poll: seconds between looks at the queue (default 30).
# --name, --zone, --type and --project default to the environment variables AFMRL_NAME, AFMRL_ZONE,
# AFMRL_TYPE and AFMRL_PROJECT. --dry-run prints every command and runs none.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

name="${AFMRL_NAME:-}" zone="${AFMRL_ZONE:-}" type="${AFMRL_TYPE:-}" project="${AFMRL_PROJECT:-}"
runtime="" spot="" times=3 worker=0 poll=30

# runtime_of TYPE: prints the software version that Google's guide recommends for a type of TPU.
runtime_of() {
    case "$1" in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "--type is '$1': say --runtime VERSION too, for it is none of v4-, v5litepod-, v5p-, v6e-" ;;
    esac
}

queued() {
    local action="$1"
    shift
    execute gcloud compute tpus queued-resources "$action" "$name" "${where[@]}" "$@"
}

# Prints the state of the queued resource, or ABSENT. Any error but NOT_FOUND is printed, and fails.
state_of_queue() {
    local output
    if ! output="$(queued describe '--format=value(state.state)' 2>&1)"; then
        [[ "$output" == *NOT_FOUND* ]] || { printf '%s\n' "$output" >&2 && return 1; }
        output=ABSENT
    fi
    printf '%s\n' "${output##*$'\n'}"
}

on_workers() { # WORKER COMMAND
    execute gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet "--worker=$1" "--command=$2"
}

create() {
    local state
    local options=("--accelerator-type=$type" "--runtime-version=$runtime")
    [[ -z "$spot" ]] || options+=(--spot)
    state="$(state_of_queue)"
    case "$state" in
        SUSPENDED | FAILED)
            echo "$name is $state: it is given back and asked for again." >&2
            queued delete --force --quiet
            state=ABSENT
            ;;
    esac
    if [[ "$state" == ABSENT || -n "$dry_run" ]]; then
        queued create "--node-id=$name" "${options[@]}"
        state="$(state_of_queue)"
    fi
    while [[ -z "$dry_run" && "$state" != ACTIVE ]]; do
        case "$state" in
            SUSPENDED | FAILED | ABSENT)
                echo "$name became $state: see gcloud compute tpus queued-resources describe $name" >&2
                return 1
                ;;
        esac
        echo "$name is $state; the next look is in $poll seconds." >&2
        sleep "$poll"
        state="$(state_of_queue)"
    done
}

install() {
    local archive="${TMPDIR:-/tmp}/afmrl_jax-$name.tar.gz"
    local parts=(LICENSE README.md afmrl_jax configs launch pyproject.toml requirements.txt setup.cfg)
    execute tar -czf "$archive" -C "$root" --exclude=__pycache__ "${parts[@]}"
    execute gcloud compute tpus tpu-vm scp "$archive" "$name:afmrl_jax.tar.gz" "${where[@]}" --quiet \
        --worker=all
    on_workers all "mkdir -p afmrl_jax && tar -xzf afmrl_jax.tar.gz -C afmrl_jax && bash afmrl_jax/launch/worker.sh install --extra tpu"
}

read_arguments "create install run tail stop delete" "name zone type project runtime times worker poll" \
    spot "$@"
need_name name
need zone "where the slice is, as us-west4-a"
need_count poll
where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
need_program gcloud "the Google Cloud CLI (https://cloud.google.com/sdk)"
case "$verb" in
    create)
        need type "which slice, as v5litepod-16"
        [[ -n "$runtime" ]] || runtime="$(runtime_of "$type")"
        create
        ;;
    install) install ;;
    run)
        need_training
        need_count times
        worker_command start tpu "$times"
        on_workers all "cd afmrl_jax && $(quoted "${worker_command[@]}")"
        ;;
    tail)
        [[ "$worker" =~ ^([0-9]+|all)$ ]] || fail "--worker is '$worker': say 0, 1, ... or all"
        on_workers "$worker" "bash afmrl_jax/launch/worker.sh tail"
        ;;
    stop) on_workers all "bash afmrl_jax/launch/worker.sh stop" ;;
    delete) queued delete --force --quiet ;;
esac
