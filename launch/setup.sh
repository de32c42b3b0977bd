# Makes .venv in the repository's root and installs what is pinned; sourced by local.sh and test.sh.
# A second call is instant: a stamp in .venv names what was installed, from which files, and where.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Prints the first Python of a supported version that runs and can make an environment. A name on
# the PATH is not enough: version managers put names there that do nothing.
find_python() {
    local python
    local works='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
    for python in python3.11 python3.12 python3.13 python3; do
        if "$python" -c "$works" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "No Python 3.11, 3.12 or 3.13 with venv was found on the PATH: install one" \
        "(Debian, Ubuntu: apt install python3 python3-venv) and start again." >&2
    return 1
}

# Shows standard input on one line that overwrites itself, on a terminal; nothing elsewhere.
one_line() {
    local line
    while IFS= read -r line; do
        [[ ! -t 1 ]] || printf '\r\033[K%.78s' "$line"
    done
    [[ ! -t 1 ]] || printf '\r\033[K'
}

# Installs with uv where it is there, which takes a fifth of pip's time. Bytecode is made behind it,
# on all cores: pip takes one, and uv leaves it to the first program, which would be slow.
install() {
    local installer=(.venv/bin/python -m pip install --no-compile --progress-bar off
        --disable-pip-version-check)
    ! command -v uv >/dev/null || installer=(uv pip install --python .venv/bin/python)
    if ! "${installer[@]}" "$@" 2>&1 | tee -a .venv/install.log | one_line; then
        tail -n 15 .venv/install.log >&2
        echo "The installation failed; all that was said is in $PWD/.venv/install.log" >&2
        return 1
    fi
    # Packages hold a few files for other Pythons, which cannot be compiled.
    .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
}

# setup base | EXTRA: installs the program and, where one is named, what an extra of setup.cfg adds.
setup() {
    local extra="$1" key python target
    # The folder is part of it: an environment that was moved does not find the program.
    key="$({ pwd && cat requirements.txt setup.cfg; } | sha256sum | cut -c1-16)"
    [[ ! -e ".venv/installed-$extra-$key" ]] || return 0
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # no environment, or half of one
        python="$(find_python)"
        "$python" -m venv --clear .venv
    fi
    echo "Installing into $PWD/.venv (once, a minute or two) ..."
    [[ "$extra" == base ]] && target=. || target=".[$extra]"
    install -r requirements.txt -e "$target"
    touch ".venv/installed-base-$key" ".venv/installed-$extra-$key"
}
