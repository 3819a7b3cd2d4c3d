# Sourced by the other scripts, from any folder: go to the repository, make or use a virtual
# environment, install the package once. The next call finds it installed and costs nothing.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        base_python="${PYTHON:-}"
        for candidate in python3.11 python3.10 python3; do
            [ -n "$base_python" ] || ! command -v "$candidate" >/dev/null || base_python="$candidate"
        done
        "${base_python:-python3}" - <<'CHECK' || exit 1
import sys
if not (3, 10) <= sys.version_info[:2] < (3, 12):
    sys.exit(
        f"Python {sys.version.split()[0]} found; this needs 3.10 or 3.11, which LAVIS's pinned "
        "dependencies have wheels for. Name one: PYTHON=/path/to/python3.11 bash run_scripts/..."
    )
CHECK
        echo "making .venv with $base_python"
        "$base_python" -m venv .venv
    fi
    VIRTUAL_ENV="$PWD/.venv"
fi
export VIRTUAL_ENV
PATH="$VIRTUAL_ENV/bin:$PATH"

# Installed when the marker has what setup.cfg says now, for this folder.
marker="$VIRTUAL_ENV/.lavis-uniadapter-installed"
wanted="$PWD $(cksum < setup.cfg)"
if [ "$(cat "$marker" 2>/dev/null)" != "$wanted" ]; then
    echo "installing lavis-uniadapter with its dependencies (PyTorch is several GB; minutes, once)"
    python -m pip install --quiet --disable-pip-version-check -e ".[test]"
    echo "$wanted" > "$marker"
fi
