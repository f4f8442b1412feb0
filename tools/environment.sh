#!/bin/sh
# Creates .venv from the first usable Python and installs the package, editable, at the versions of constraints.txt.
# Usage: tools/environment.sh VENV EXTRAS      (PYTHON=... chooses the interpreter)
set -u
venv=$1
extras=$2
log=$venv/install.log

say() { printf '%s\n' "$*" >&2; }
die() { say "Error: $*"; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
    without_venv=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python}; do
        new_enough "$candidate" || continue
        if has_venv "$candidate"; then python=$candidate; return; fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -n "$without_venv" ]; then
        die "$without_venv has no venv module; install it (on Debian and Ubuntu: apt-get install python3-venv) and try again."
    elif [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is not a Python 3.10 or newer."
    fi
    found=$(version_of python3)
    die "no Python 3.10 or newer was found (python3 is ${found:-missing}); install one, or name it: make PYTHON=/path/to/python3"
}

explain_failure() {
    tools/check_space.sh 200 || exit 1
    if grep -q 'No space left on device' "$log" 2>/dev/null; then
        die "the disk is full; the environment needs about 4 GB (10 GB where pip chooses CUDA builds)."
    elif grep -q -e 'NewConnectionError' -e 'NameResolutionError' -e 'Failed to establish a new connection' \
        -e 'ConnectTimeout' -e 'ReadTimeout' -e 'ConnectionResetError' -e 'ProxyError' -e 'Connection refused' -e 'SSLError' "$log" 2>/dev/null
    then
        die "the package index could not be reached; check the network (or pip's own configuration) and run make again."
    fi
    die "pip could not install the environment; its messages are above and in $log."
}

if ! { [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    find_python
    tools/check_space.sh 4000 || exit 1
    say "Creating $venv with $python ($(version_of "$python"))."
    "$python" -m venv --clear "$venv" || explain_failure
fi

say "Installing the versions of constraints.txt; the first time this takes some minutes."
rm -f "$log"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_REQUIRE_VIRTUALENV=0
pip() { "$venv/bin/python" -m pip "$@"; }
# The build backend is pinned too, hence installed first and used without an isolated, unpinned build environment.
pip install --log "$log" -c constraints.txt setuptools wheel &&
    pip install --log "$log" -c constraints.txt --no-build-isolation -e ".[$extras]" ||
    explain_failure
rm -f "$log"
