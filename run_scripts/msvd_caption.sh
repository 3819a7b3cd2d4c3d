#!/usr/bin/env bash
# MSVD captioning: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark msvd_caption "$@"
