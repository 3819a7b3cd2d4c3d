#!/usr/bin/env bash
# MSR-VTT captioning: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark msrvtt_caption "$@"
