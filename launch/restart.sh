#!/usr/bin/env bash
# Runs a command, and starts it again if that may help: if it ended by a signal (killed, out of memory,
# a runtime that aborts) or with status 75 (another process of the run is gone).
#
#     bash launch/restart.sh [--times K] [--wait SECONDS] [--dry-run] -- COMMAND...
#     bash launch/restart.sh --times 5 -- bash launch/local.sh --config.steps=5000
#
# --times   maximal number of restarts (default 3)
# --wait    pause before each restart, in seconds (default 10)
#
# Ends with the command's last status. Status 0 is success; any other status below 128 except 75 is
# final, such as 2 for a user's mistake. SIGTERM and SIGINT are passed on to the command, and the status
# that it then ends with is final, too. The same command is run each time: it must resume by itself.
set -euo pipefail
set -m # the command gets its process group, so that Ctrl-C reaches it once, by the trap below

help() { sed -n '2,/^set -/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
die() {
    echo "restart.sh: $*; see --help" >&2
    exit 2
}

times=3 pause=10 dry_run=""
while (($#)); do
    case "$1" in
    --help | -h) help && exit ;;
    --times | --wait)
        [[ "${2-}" =~ ^[0-9]+$ ]] || die "$1 needs a whole number, not '${2-}'"
        if [[ "$1" == --times ]]; then times="$2"; else pause="$2"; fi
        shift 2
        ;;
    --dry-run) dry_run=yes && shift ;;
    --) shift && break ;;
    -*) die "there is no option $1" ;;
    *) break ;;
    esac
done
(($#)) || die "give a command after --"

if [[ "$dry_run" ]]; then
    echo "up to $((times + 1)) times, with a pause of $pause s: ${*@Q}"
    exit
fi

child="" stop_signal="" signalled=""
# shellcheck disable=SC2317,SC2329 # called by the traps
pass_on() {
    stop_signal="$1" signalled=yes
    [[ -z "$child" ]] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Waits for $child, even if signals arrive meanwhile, and sets `status` to its status.
wait_for_child() {
    while :; do
        signalled="" status=0
        wait "$child" 2>/dev/null || status=$?
        [[ "$signalled" ]] || break
    done
    child=""
}

for ((again = 0; ; again++)); do
    "$@" <&0 &
    child=$!
    # A signal may have come before the child existed.
    [[ -z "$stop_signal" ]] || kill -s "$stop_signal" "$child" 2>/dev/null || true
    wait_for_child
    ended="status $status"
    ((status <= 128)) || ended="signal $(kill -l "$status" 2>/dev/null || echo "$status")"
    case "$status" in
    75 | 12[89] | 1[3-9]? | 2??) ;;
    *) exit "$status" ;;
    esac
    if [[ "$stop_signal" || "$status" == 129 || "$status" == 130 || "$status" == 143 ]]; then
        exit "$status"
    fi
    if ((again >= times)); then
        echo "restart.sh: ended with $ended, and was started again $times times: giving up" >&2
        exit "$status"
    fi
    echo "restart.sh: ended with $ended: starting again in $pause s ($((again + 1)) of $times)" >&2
    sleep "$pause" &
    child=$!
    wait_for_child
    [[ -z "$stop_signal" ]] || exit 143
done
