# Compiler flags that overlap collectives with compute; sourced by worker.sh.
# Only what is off by default: jaxlib 0.10 and libtpu 0.0.42 already overlap all-gathers (the "async
# collective fusion" of older recipes), and setting those flags compiles to the same program.
# shellcheck shell=bash

# add_flags VARIABLE FLAG...: puts flags before what VARIABLE holds and exports it; a flag that the
# user has set there, to whatever value, is left alone.
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
        # All-reduces become a start and a done, with other work between ...
        --xla_enable_async_all_reduce=true
        # ... which are matrix products, a piece of the all-reduce in each. The gradients of data
        # replicas are all-reduced; without the two flags every chip waits for them.
        --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
    )
    local gpu=(
        # Orders the program so that a collective starts early and its result is awaited late. (The
        # pipelined collectives of older recipes are accepted, but no longer do anything.)
        --xla_gpu_enable_latency_hiding_scheduler=true
    )
    if [[ "$1" == tpu ]]; then
        add_flags LIBTPU_INIT_ARGS "${tpu[@]}"
    else
        add_flags XLA_FLAGS "${gpu[@]}"
    fi
}
