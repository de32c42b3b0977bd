#!/usr/bin/env bash
# Trains on several TPU slices of a cluster that xpk made; the data-centre network joins the slices.
#
#   launch/multislice_xpk.sh build --image IMAGE                          builds launch/Dockerfile, and pushes it
#   launch/multislice_xpk.sh run   --name N --cluster C --type v5litepod-256 --slices 2 --image IMAGE \
#       [--times K] -- --config=configs/agcl.py --config.batch=8192 \
#       --config.eval.batch=512 --config.checkpoint_dir=gs://BUCKET/RUN
#   launch/multislice_xpk.sh list  --cluster C
#   launch/multislice_xpk.sh stop  --name N --cluster C                   saves a checkpoint, and ends the training
#
# `run` gives the training --config.mesh.slice, so that only gradients cross between slices. It changes
# nothing if a workload of that name exists. --times: a workload that fails is started again up to K times
# (default 10). --zone Z and --project P default to gcloud's settings. --name, --cluster, --type, --image,
# --zone and --project default to the environment variables AFMRL_NAME, AFMRL_CLUSTER, ... --dry-run
# prints every command and runs none.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

name="${AFMRL_NAME:-}" cluster="${AFMRL_CLUSTER:-}" type="${AFMRL_TYPE:-}" image="${AFMRL_IMAGE:-}"
zone="${AFMRL_ZONE:-}" project="${AFMRL_PROJECT:-}" slices="" times=10

run() {
    local listed
    listed="$(execute xpk workload list "${where[@]}" "--filter-by-job=^$name\$")"
    if [[ $'\n'"$listed" == *$'\n'"$name "* ]]; then
        echo "There is a workload $name on $cluster already: stop it first, or choose another --name."
        return
    fi
    slices_to_mesh "$slices"
    worker_command run tpu 0 # the cluster restarts all workers together
    execute xpk workload create "${where[@]}" "--workload=$name" "--tpu-type=$type" \
        "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$times" \
        --restart-on-user-code-failure --termination-grace-period-seconds=300 \
        "--command=$(quoted "${worker_command[@]}")"
}

read_arguments "build run list stop" "name cluster type slices image times zone project" "" "$@"
if [[ "$verb" == build ]]; then
    need image "what to call it, as us-docker.pkg.dev/PROJECT/REPOSITORY/afmrl_jax:1"
    need_program docker "Docker"
    build_image tpu "$image" --build-arg RUN_AS=root # only root may use the TPUs there
    exit
fi
need cluster "the xpk cluster (xpk cluster create makes one)"
where=("--cluster=$cluster")
[[ -z "$zone" ]] || where+=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
need_program xpk "xpk (pip install xpk)"
case "$verb" in
    run)
        need_name name
        need type "what each slice is, as v5litepod-256"
        need_count slices
        need image "the image that build pushed"
        need_count times
        need_training
        run
        ;;
    list) execute xpk workload list "${where[@]}" ;;
    stop)
        need_name name
        execute xpk workload delete "${where[@]}" "--workload=$name" --force
        ;;
esac
