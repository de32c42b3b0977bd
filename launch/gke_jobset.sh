#!/usr/bin/env bash
# Trains on TPUs or GPUs of the GKE cluster that kubectl is set to, by launch/gke_jobset.yaml.
#
#   launch/gke_jobset.sh build --image IMAGE --kind tpu|gpu       builds launch/Dockerfile, and pushes it
#   launch/gke_jobset.sh run   --name N --image IMAGE --accelerator tpu-v5-lite-podslice --topology 4x4 \
#       [--slices S] [--chips 4] [--times K] -- --config=configs/agcl.py --config.checkpoint_dir=gs://BUCKET/RUN
#   launch/gke_jobset.sh run   --name N --image IMAGE --accelerator nvidia-h100-80gb --nodes 4 [--chips 8] -- ...
#   launch/gke_jobset.sh show  (as run)             prints the JobSet that run would apply
#   launch/gke_jobset.sh tail  --name N             prints the first worker's output
#   launch/gke_jobset.sh stop  --name N             saves a checkpoint, and ends the training
#
# --chips: chips of one machine, 4 for most TPU pools, 8 for most GPU pools. With several slices the
# training gets --config.mesh.slice. --times: a training that fails is started again up to K times
# (default 10). `run` changes nothing if the JobSet exists already. --namespace and --service-account
# default to "default". The service account gives access to gs:// by workload identity, but TPU pods use
# the machine's network, so that the node pool's account counts there. --name and --image default to the
# environment variables AFMRL_NAME and AFMRL_IMAGE. --dry-run prints every command and runs none.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

name="${AFMRL_NAME:-}" image="${AFMRL_IMAGE:-}" kind="" accelerator="" topology="" nodes="" slices=1
chips="" times=10 namespace=default service_account=default

# json_list WORDS...: prints the words as a JSON list, which is YAML, too. Each $ is doubled, because
# Kubernetes replaces $(NAME) and reads $$ as $.
json_list() {
    local word list="" dollars='$$'
    for word in "$@"; do
        word="${word//\\/\\\\}"
        word="${word//\"/\\\"}"
        word="${word//$'\n'/\\n}"
        word="${word//$'\t'/\\t}"
        word="${word//'$'/$dollars}"
        list+="${list:+, }\"$word\""
    done
    printf '[%s]' "$list"
}

# fill_in KEY VALUE: replaces each __KEY__ in the variable `line`.
fill_in() {
    local mark="__$1__" done_with=""
    while [[ "$line" == *"$mark"* ]]; do
        done_with+="${line%%"$mark"*}$2"
        line="${line#*"$mark"}"
    done
    line="$done_with$line"
}

# Prints the template, filled in. A line that ends with "# tpu", "# gpu" or "# slices" is printed only for
# TPUs, for GPUs, or for several slices.
jobset() {
    local line condition hostnames="" i command
    command="$(json_list "${worker_command[@]}")"
    for ((i = 0; i < nodes; i++)); do
        hostnames+="${hostnames:+,}$name-worker-$slice-$i.$name"
    done
    while IFS= read -r line; do
        condition="${line##* # }"
        if [[ "$line" == *" # "* && "$condition" =~ ^(tpu|gpu|slices)$ ]]; then
            [[ "$condition" == "$kind" || ("$condition" == slices && "$slices" != 1) ]] || continue
            line="${line% # *}"
        fi
        [[ "$line" != \#* ]] || continue
        fill_in NAME "$name"
        fill_in NAMESPACE "$namespace"
        fill_in TIMES "$times"
        fill_in SLICES "$slices"
        fill_in NODES "$nodes"
        fill_in SERVICE_ACCOUNT "$service_account"
        fill_in ACCELERATOR "$accelerator"
        fill_in TOPOLOGY "$topology"
        fill_in IMAGE "$image"
        fill_in CHIPS "$chips"
        fill_in HOSTNAMES "$hostnames"
        fill_in COMMAND "$command" # last, so that a __KEY__ in the command stays as it is
        printf '%s\n' "$line"
    done <"$root/launch/gke_jobset.yaml"
}

# Checks the options that describe the machines, and sets kind, nodes, chips and slice.
machines() {
    local all=1 side
    need accelerator "the pool's, as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or nvidia-h100-80gb"
    need_count slices
    if [[ "$accelerator" == tpu* ]]; then
        kind=tpu
        [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
            fail "--topology is '$topology': say the pool's, as 4x4 or 4x4x4"
        [[ -z "$nodes" ]] || fail "--nodes is for GPUs: TPU machines follow from --topology and --chips"
        [[ -n "$chips" ]] || chips=4
        need_count chips
        for side in ${topology//x/ }; do all=$((all * side)); done
        ((all % chips == 0)) || fail "--topology $topology has $all chips, not a multiple of --chips $chips"
        nodes=$((all / chips))
    else
        kind=gpu
        [[ -z "$topology" && "$slices" == 1 ]] || fail "--topology and --slices are for TPUs: say --nodes"
        need nodes "how many machines"
        need_count nodes
        [[ -n "$chips" ]] || chips=8
        need_count chips
    fi
    slice=0
    # shellcheck disable=SC2016 # Kubernetes fills it in, by the variable of the JobSet
    ((slices == 1)) || slice='$(SLICE)'
}

read_arguments "build run show tail stop" \
    "name image kind accelerator topology nodes slices chips times namespace service-account" "" "$@"
case "$verb" in
    build)
        need image "what to call it, as us-docker.pkg.dev/PROJECT/REPOSITORY/afmrl_jax:1"
        [[ "$kind" == tpu || "$kind" == gpu ]] || fail "--kind is '$kind': say tpu or gpu"
        need_program docker "Docker"
        build_image "$kind" "$image"
        ;;
    run | show)
        need_name name
        need image "the image that build pushed"
        need_count times
        need_training
        machines
        slices_to_mesh "$slices"
        worker_command run "$kind" 0 # the JobSet restarts all workers together
        if [[ "$verb" == show ]]; then
            jobset
            exit
        fi
        need_program kubectl "kubectl (gcloud components install kubectl)"
        filled="$root/runs/$name.jobset.yaml"
        if [[ -z "$dry_run" ]]; then
            mkdir -p "$root/runs"
            jobset >"$filled"
        fi
        execute kubectl apply "--filename=$filled"
        ;;
    tail)
        need_name name
        need_program kubectl "kubectl (gcloud components install kubectl)"
        execute kubectl logs "--namespace=$namespace" --follow --tail=-1 \
            "--selector=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        ;;
    stop)
        need_name name
        need_program kubectl "kubectl (gcloud components install kubectl)"
        execute kubectl delete jobset "$name" "--namespace=$namespace" --ignore-not-found
        ;;
esac
