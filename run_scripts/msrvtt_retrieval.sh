#!/usr/bin/env bash
# MSR-VTT text-video retrieval (1k-A): train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark msrvtt_retrieval "$@"
