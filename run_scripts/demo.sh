#!/usr/bin/env bash
# Train a small BLIP on stills, adapt it to video by UniAdapter, show what it cost and gained.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m lavis_uniadapter.demo "$@"
