# Functions that the launchers share: reading arguments, running commands, or printing them with
# --dry-run. Sourced. Works with bash 3.2, the version of macOS.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dry_run=""     # "yes": print every command, run none
verb=""        # the sub-command
arguments=()   # the arguments after --, for the training
exec 3>&1      # a dry run prints there, also from inside $(...)

# Prints a sentence about the user's mistake, and exits with status 2.
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# Prints the script's head comment.
print_help() {
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

# quoted WORDS...: prints the words as a line that a shell (or Python's shlex) splits into the same words.
quoted() {
    local word line="" quote="'" inside="'\\''"
    for word in "$@"; do
        if [[ -z "$word" || "$word" == *[!A-Za-z0-9_@%+=:,./-]* ]]; then
            word="'${word//$quote/$inside}'"
        fi
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# execute COMMAND...: runs the command, or prints it in a dry run.
execute() {
    if [[ -n "$dry_run" ]]; then quoted "$@" >&3; else "$@"; fi
}

# need_program NAME PACKAGE: fails if the program is missing, unless this is a dry run. PACKAGE: what to
# install.
need_program() {
    [[ -n "$dry_run" ]] || command -v "$1" >/dev/null ||
        fail "$1 is not on the PATH: install $2, or add --dry-run to see what would be run"
}

# read_arguments "VERBS" "OPTIONS" "SWITCHES" ARGUMENTS...: sets `verb` and `arguments`. An option
# --some-name VALUE sets the variable some_name to VALUE, a switch sets it to yes. The caller sets the
# variables' defaults before.
read_arguments() {
    local verbs=" $1 " options=" $2 " switches=" $3 " key value
    shift 3
    while (($#)); do
        key="${1#--}"
        key="${key%%=*}"
        case "$1" in
            -h | --help) print_help && exit ;;
            --dry-run) dry_run=yes ;;
            --)
                shift
                arguments=("$@")
                break
                ;;
            --*=*)
                [[ "$options" == *" $key "* ]] || unknown_option "$key"
                value="${1#*=}"
                printf -v "${key//-/_}" '%s' "$value"
                ;;
            --*)
                if [[ "$switches" == *" $key "* ]]; then
                    printf -v "${key//-/_}" yes
                else
                    [[ "$options" == *" $key "* ]] || unknown_option "$key"
                    [[ $# -gt 1 && "$2" != --* ]] || fail "--$key needs a value: --$key VALUE"
                    printf -v "${key//-/_}" '%s' "$2"
                    shift
                fi
                ;;
            *)
                [[ "$verbs" == *" $1 "* ]] || fail "there is no sub-command '$1': use one of$verbs"
                [[ -z "$verb" ]] || fail "'$verb' and '$1' are two sub-commands: one at a time"
                verb="$1"
                ;;
        esac
        shift
    done
    [[ -n "$verb" ]] || fail "say what to do, one of$verbs(--help tells more)"
}

unknown_option() {
    fail "there is no option --$1 (see --help); what belongs to the training goes after --, as in" \
        "run ... -- --config=configs/agcl.py"
}

# need OPTION MEANING: fails if the option has no value.
need() {
    local variable="${1//-/_}"
    [[ -n "${!variable}" ]] || fail "--$1 is missing: $2"
}

# need_count OPTION: fails if the option is not a whole number of 1 or more.
need_count() {
    local variable="${1//-/_}"
    [[ "${!variable}" =~ ^[1-9][0-9]*$ ]] ||
        fail "--$1 is '${!variable}', but must be a whole number, 1 or more"
}

# need_name OPTION: fails if the option is no name for machines and pods, which get it; they would refuse
# it only later.
need_name() {
    need "$1" "what to call it"
    [[ "${!1}" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        fail "--$1 is '${!1}': use 1 to 40 lower-case letters, digits and -, a letter first"
}

need_training() {
    ((${#arguments[@]})) || fail "say after -- what to train, as in -- --config=configs/agcl.py"
}

# worker_command run|start KIND TIMES: sets the array `worker_command` to the command that trains on one
# worker, in the repository's root. Compiler flags that the user has set on this machine are passed on.
worker_command() {
    local variable users=()
    for variable in LIBTPU_INIT_ARGS XLA_FLAGS; do
        [[ -z "${!variable:-}" ]] || users+=("$variable=${!variable}")
    done
    worker_command=(bash launch/worker.sh "$1" --kind "$2" --times "$3" -- "${arguments[@]}")
    ((!${#users[@]})) || worker_command=(env "${users[@]}" "${worker_command[@]}")
}

# slices_to_mesh COUNT: adds --config.mesh.slice=COUNT to the training's arguments if COUNT is above 1 and
# the user has set no --config.mesh.slice.
slices_to_mesh() {
    local argument
    for argument in "${arguments[@]}"; do
        [[ "$argument" != --config.mesh.slice* ]] || return 0
    done
    (($1 == 1)) || arguments+=("--config.mesh.slice=$1")
}

# build_image KIND IMAGE [OPTION...]: builds launch/Dockerfile's target KIND and pushes it.
build_image() {
    local kind="$1" image="$2"
    shift 2
    execute docker build --file "$root/launch/Dockerfile" --target "$kind" --tag "$image" "$@" "$root"
    execute docker push "$image"
}
