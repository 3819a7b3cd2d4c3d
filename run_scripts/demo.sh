#!/usr/bin/env bash
# Train a small BLIP on stills, adapt it to video by UniAdapter: demo.sh [retrieval|qa|caption].
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec uniadapter demo "$@"
