#!/usr/bin/env bash
# Run the test suite; further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
# OpenMP threads that wait by spinning would hold up the tests beside them.
export OMP_WAIT_POLICY=PASSIVE
exec python -m pytest -n 2 "$@"
