#!/usr/bin/env bash
# DiDeMo paragraph-video retrieval: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark didemo_retrieval "$@"
