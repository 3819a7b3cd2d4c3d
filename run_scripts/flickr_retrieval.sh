#!/usr/bin/env bash
# Flickr30K image-text retrieval: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark flickr_retrieval "$@"
