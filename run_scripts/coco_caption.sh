#!/usr/bin/env bash
# COCO captioning: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark coco_caption "$@"
