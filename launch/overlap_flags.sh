# Compiler flags that overlap collectives with compute; sourced by worker.sh.
# Only flags that are off by default: jaxlib 0.10 and libtpu 0.0.42 already overlap all-gathers (the
# "async collective fusion" of older recipes), so setting those flags gives the same program.
# shellcheck shell=bash

# add_flags VARIABLE FLAG...: puts the flags before the value of VARIABLE and exports it. A flag that the
# user has set in VARIABLE is not added.
add_flags() {
    local variable="$1" flag users ours=""
    users="${!variable:-}"
    shift
    for flag in "$@"; do
        [[ " $users " == *" ${flag%%=*}"[=\ ]* ]] || ours+="$flag "
    done
    users="$ours$users"
    export "$variable=${users% }"
}

# overlap_flags tpu | gpu
overlap_flags() {
    local tpu=(
        # Splits an all-reduce into a start and a done, with other work in between. Gradients of data
        # replicas are all-reduced; without this flag and the next, every chip waits for them.
        --xla_enable_async_all_reduce=true
        # That other work is matrix products: each product carries a piece of the all-reduce.
        --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
    )
    local gpu=(
        # Orders the program so that a collective starts early and its result is awaited late. (XLA
        # still accepts the flags for pipelined collectives of older recipes, but ignores them.)
        --xla_gpu_enable_latency_hiding_scheduler=true
    )
    if [[ "$1" == tpu ]]; then
        add_flags LIBTPU_INIT_ARGS "${tpu[@]}"
    else
        add_flags XLA_FLAGS "${gpu[@]}"
    fi
}
