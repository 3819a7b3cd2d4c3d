#!/usr/bin/env bash
# MSRVTT-QA: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark msrvtt_qa "$@"
