#!/usr/bin/env bash
# VQAv2 with Visual Genome: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark vqav2 "$@"
