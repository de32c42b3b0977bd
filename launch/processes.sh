#!/usr/bin/env bash
# Runs a command as N processes of one run on this machine, to try what a pod will do. The processes
# find each other by COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID.
#
#     bash launch/processes.sh N [--grace SECONDS] [--dry-run] -- COMMAND...
#     bash launch/processes.sh 4 -- .venv/bin/python -m afmrl_jax.main --config=configs/agcl.py
#     bash launch/restart.sh -- bash launch/processes.sh 4 -- COMMAND...   # all start again together
#
# --grace   after a process has failed, seconds that the others may take to notice it before they
#           are ended (default 75)
#
# On a machine with accelerators give each process one of them: use bash -c to set
# CUDA_VISIBLE_DEVICES=$PROCESS_ID in each. The status is 0 if all processes end with 0; otherwise the
# first final status (of a user's mistake), or else the first other one. Every process gets SIGTERM and
# SIGINT.
set -euo pipefail
set -m # each process gets its process group, so that Ctrl-C reaches it once, by the trap below

help() { sed -n '2,/^set -/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
die() {
    echo "processes.sh: $*; see --help" >&2
    exit 2
}

count="" grace=75 dry_run=""
while (($#)); do
    case "$1" in
    --help | -h) help && exit ;;
    --grace)
        [[ "${2-}" =~ ^[0-9]+$ ]] || die "$1 needs a whole number, not '${2-}'"
        grace="$2" && shift 2
        ;;
    --dry-run) dry_run=yes && shift ;;
    --) shift && break ;;
    -*) die "there is no option $1" ;;
    *)
        [[ -z "$count" ]] || break
        [[ "$1" =~ ^[1-9][0-9]*$ ]] || die "say first how many processes, not '$1'"
        count="$1" && shift
        ;;
    esac
done
[[ "$count" ]] || die "say how many processes"
(($#)) || die "give a command after --"

# Prints a port that no program listens on, below the range that the system uses for connections.
free_port() {
    local port
    while :; do
        port=$((10000 + RANDOM % 20000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

address="127.0.0.1:$(free_port)"
if [[ "$dry_run" ]]; then
    for ((index = 0; index < count; index++)); do
        echo "COORDINATOR_ADDRESS=$address NUM_PROCESSES=$count PROCESS_ID=$index ${*@Q} &"
    done
    exit
fi

# Each process's shell writes "INDEX STATUS" there when it ends.
pipe="$(mktemp -u)"
mkfifo "$pipe"
exec 3<>"$pipe"
rm "$pipe"

groups=() watcher=""
# shellcheck disable=SC2317,SC2329 # these are called by the traps
send() {
    local group
    for group in "${groups[@]}"; do
        kill -s "$1" -- "-$group" 2>/dev/null || true
    done
}
# shellcheck disable=SC2317,SC2329
end_all() { # kills all process groups, with the processes' worker processes
    groups+=(${watcher:+"$watcher"})
    send KILL
}
trap 'send TERM' TERM
trap 'send INT' INT
trap end_all EXIT

# one_process INDEX COMMAND...: runs the command as process number INDEX of the run.
one_process() {
    local index="$1" status=0
    shift
    trap : TERM INT # the command gets the signals itself; this shell stays to report its status
    # Hides bash's message about a killed command; a plainer message is printed below.
    { PROCESS_ID="$index" "$@" </dev/null 2>&4 3>&- 4>&- || status=$?; } 4>&2 2>/dev/null
    echo "$index $status" >&3
}

# Ends the remaining processes when the grace is over.
end_later() {
    sleep "$grace"
    echo "processes.sh: not all have ended within $grace s: ending them" >&2
    send TERM
    sleep 10
    send KILL
    for ((index = 0; index < count; index++)); do
        echo "$index 137" >&3
    done
}

export COORDINATOR_ADDRESS="$address" NUM_PROCESSES="$count"
for ((index = 0; index < count; index++)); do
    one_process "$index" "$@" &
    groups+=($!)
done

result=0
for ((left = count; left > 0; left--)); do
    read -r -u 3 index status
    ((status)) || continue
    ((status <= 128)) || echo "processes.sh: process $index ended by $(kill -l "$status")" >&2
    if ((result == 0 || (result == 75 || result > 128) && status != 75 && status < 128)); then
        result=$status
    fi
    if [[ -z "$watcher" ]]; then
        end_later &
        watcher=$!
    fi
done
exit "$result"
