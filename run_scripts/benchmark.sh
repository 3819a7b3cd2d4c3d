# Sourced by the launcher of each benchmark: train its configuration, on all GPUs there are.
#
#   bash run_scripts/<benchmark>.sh [--options section.key=value ...]
#
# NPROC=2 before it starts that many processes instead. Evaluation alone is
#   python evaluate.py --cfg-path projects/uniadapter/eval/<benchmark>.yaml --adapter <folder>

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

train_benchmark() {
    local name="$1"
    shift
    : "${NPROC:=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
    if [ "$NPROC" = 1 ]; then
        exec python train.py --cfg-path "projects/uniadapter/train/$name.yaml" "$@"
    fi
    exec python -m torch.distributed.run --standalone --nproc_per_node="$NPROC" \
        train.py --cfg-path "projects/uniadapter/train/$name.yaml" "$@"
}
