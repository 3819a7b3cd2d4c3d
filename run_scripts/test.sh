#!/usr/bin/env bash
# Run the test suite and report its coverage; further arguments go to pytest (--no-cov is faster).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
[ "$DEPENDENCIES" != lavis ] || mypy # the types of one set of dependencies
exec python -m pytest -n 2 --cov "$@"
