# Sourced by the other scripts, from any folder: go to the repository, make or use a virtual
# environment, install the package once. The next call finds it installed and costs nothing.
#
# DEPENDENCIES=lavis    LAVIS's own pins, in .venv         (the default on Python 3.10 and 3.11)
# DEPENDENCIES=modern   current versions, in .venv-modern  (the default from Python 3.12 on)
# PYTHON=...            the Python to make the environment with

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

# "3.11" of a Python; nothing of one that does not run.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

case "${DEPENDENCIES:-}" in
    lavis) folder=.venv candidates="python3.11 python3.10" ;;
    modern) folder=.venv-modern candidates="python3.13 python3.12 python3.11 python3.10" ;;
    "") folder="" candidates="python3.11 python3.10 python3.13 python3.12" ;;
    *) fail "DEPENDENCIES is '$DEPENDENCIES'; it must be lavis or modern." ;;
esac

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
elif [ -x "${folder:-.venv}/bin/python" ]; then
    python="$PWD/${folder:-.venv}/bin/python"
elif [ -n "${PYTHON:-}" ]; then
    python="$PYTHON"
else
    python=python3
    for candidate in $candidates; do
        # a name on PATH may be a stand-in that runs nothing
        if [ -n "$(version_of "$candidate")" ]; then
            python="$candidate"
            break
        fi
    done
fi
version="$(version_of "$python")"

case "$version" in
    3.10 | 3.11) DEPENDENCIES="${DEPENDENCIES:-lavis}" ;;
    3.12 | 3.13)
        DEPENDENCIES="${DEPENDENCIES:-modern}"
        [ "$DEPENDENCIES" = modern ] || fail "$python is Python $version, and LAVIS's own pins have" \
            "wheels for 3.10 and 3.11. Take DEPENDENCIES=modern, or name another Python:" \
            "PYTHON=/path/to/python3.11"
        ;;
    "") fail "'$python' does not run. Name a Python of 3.10 to 3.13: PYTHON=/path/to/python3.11" ;;
    *) fail "$python is Python $version; this needs 3.10 to 3.13." \
        "Name one: PYTHON=/path/to/python3.11" ;;
esac
case "$DEPENDENCIES" in
    lavis) folder=.venv ;;
    modern) folder=.venv-modern ;;
esac

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x "$folder/bin/python" ]; then
        echo "making $folder with $python (Python $version)"
        "$python" -m venv "$folder"
    fi
    VIRTUAL_ENV="$PWD/$folder"
fi
export VIRTUAL_ENV DEPENDENCIES
PATH="$VIRTUAL_ENV/bin:$PATH"

# Installed when the marker has what setup.cfg and the constraints say now, for this folder.
marker="$VIRTUAL_ENV/.lavis-uniadapter-installed"
wanted="$DEPENDENCIES $PWD $(cat setup.cfg "constraints/$DEPENDENCIES.txt" | cksum)"
installed="$(cat "$marker" 2>/dev/null || true)"
case "$installed" in
    "lavis "* | "modern "*)
        [ "${installed%% *}" = "$DEPENDENCIES" ] || fail "$VIRTUAL_ENV has the set" \
            "'${installed%% *}', and DEPENDENCIES is '$DEPENDENCIES'. Leave it by 'deactivate' (each" \
            "set then has an environment of its own), or set DEPENDENCIES=${installed%% *}"
        ;;
esac
if [ "$installed" != "$wanted" ]; then
    echo "installing lavis-uniadapter with the set '$DEPENDENCIES' (PyTorch is several GB; minutes, once)"
    pip_install() {
        python -m pip install --quiet --disable-pip-version-check "$@"
    }
    if [ "$DEPENDENCIES" = lavis ]; then
        pip_install -e ".[test]" -c constraints/lavis.txt
    else
        pip_install -r constraints/modern.txt
        pip_install --no-deps -e . salesforce-lavis==1.0.2
    fi
    echo "$wanted" > "$marker"
fi
