#!/usr/bin/env bash
# MSVD-QA: train and test by UniAdapter.
source "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh"
train_benchmark msvd_qa "$@"
