#!/usr/bin/env bash
# A small BLIP, adapted by UniAdapter, answers questions about clips and describes them.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m lavis_uniadapter.demo_qa_caption "$@"
