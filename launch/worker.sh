#!/usr/bin/env bash
# Runs on every worker, whichever launcher is used: the other launchers call it.
#
#   launch/worker.sh install --extra tpu|cuda12|cuda13      installs the program and its JAX into .venv
#   launch/worker.sh run   --kind tpu|gpu [--times K] -- --config=configs/agcl.py ...
#   launch/worker.sh start --kind tpu|gpu [--times K] -- --config=configs/agcl.py ...
#   launch/worker.sh tail | stop
#
# `run` trains in the foreground. It sets the compiler's flags (launch/overlap_flags.sh; flags that you
# have set in LIBTPU_INIT_ARGS and XLA_FLAGS win), and launch/restart.sh restarts a training that fails, at
# most K times (default 3). `start` does the same in the background; the output goes to runs/worker.log,
# which `tail` follows. `stop` sends SIGTERM and waits until the checkpoint is saved.
# --dry-run prints every command and runs none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/commands.sh
source launch/commands.sh

kind="" times=3 extra=""
log=runs/worker.log pid_file=runs/worker.pid

# Succeeds if the training that `start` started still runs; sets `pid`.
running() {
    [[ -z "$dry_run" && -e "$pid_file" ]] || return 1
    pid="$(cat "$pid_file")"
    # The number alone is not enough: another program may have got it since.
    [[ "$(ps -p "$pid" -o args= 2>/dev/null)" == *launch/restart.sh* ]]
}

# Sets `training`: the flags, the restarts and the program as one command.
training_command() {
    [[ "$kind" == tpu || "$kind" == gpu ]] || fail "--kind is '$kind': say tpu or gpu"
    [[ "$times" =~ ^[0-9]+$ ]] || fail "--times is '$times', but must be a whole number, 0 or more"
    need_training
    local python=.venv/bin/python
    [[ -x "$python" ]] || python=python3
    # shellcheck source=launch/overlap_flags.sh
    source launch/overlap_flags.sh
    overlap_flags "$kind"
    training=(bash launch/restart.sh --times "$times" -- "$python" -m afmrl_jax.main "${arguments[@]}")
    if [[ "$kind" == tpu ]]; then
        training=(env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" "${training[@]}")
    else
        training=(env "XLA_FLAGS=$XLA_FLAGS" "${training[@]}")
    fi
}

read_arguments "install run start tail stop" "kind times extra" "" "$@"
case "$verb" in
    install)
        need extra "tpu, cuda12 or cuda13, as in setup.cfg"
        [[ "$extra" =~ ^(tpu|cuda12|cuda13)$ ]] || fail "--extra is '$extra': say tpu, cuda12 or cuda13"
        # shellcheck source=launch/setup.sh
        source launch/setup.sh
        if ! find_python >/dev/null 2>&1; then # TPU VMs have Python 3.10; uv installs a newer one
            # Newer Ubuntus protect even the user's packages. The variable permits the installation; older
            # versions of pip would refuse the flag --break-system-packages.
            execute env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
            execute "$HOME/.local/bin/uv" python install 3.12
            PATH="$HOME/.local/bin:$PATH"
        fi
        if [[ -n "$dry_run" ]]; then
            execute bash -c "source launch/setup.sh && setup $extra"
        else
            setup "$extra"
        fi
        ;;
    run)
        training_command
        [[ -z "$dry_run" ]] || { execute "${training[@]}" && exit; }
        exec "${training[@]}" 3>&-
        ;;
    start)
        training_command
        if running; then
            echo "The training runs already, as process $pid: follow it with tail, or stop it first."
            exit
        fi
        [[ -z "$dry_run" ]] || { execute nohup "${training[@]}" && exit; }
        mkdir -p runs
        nohup "${training[@]}" >>"$log" 2>&1 </dev/null 3>&- &
        echo $! >"$pid_file"
        echo "The training runs as process $!; its output goes to $PWD/$log"
        ;;
    tail)
        if running; then
            exec tail -n 100 --pid="$pid" -F "$log"
        fi
        execute tail -n 100 "$log"
        ;;
    stop)
        if ! running; then
            echo "No training runs here."
            exit
        fi
        kill -TERM "$pid"
        for ((i = 0; i < 600; i++)); do
            running || break
            sleep 1
        done
        if running; then
            echo "Process $pid still runs 10 minutes after SIGTERM; kill -KILL $pid loses what is not saved." >&2
            exit 1
        fi
        echo "The training has stopped; the same command goes on from its last checkpoint."
        ;;
esac
