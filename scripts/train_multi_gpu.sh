#!/usr/bin/env bash
# Trains on all GPUs of this machine with torchrun, one process each; starts, or goes on where the last run stopped:
#
#   scripts/train_multi_gpu.sh --output-dir training_output
#   GPUS=2 scripts/train_multi_gpu.sh --output-dir training_output    # on two of them
#
# All arguments go to trainers/train_gpt_v2.py. The global batch stays that of one GPU: each process takes its share.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

if [[ -z ${GPUS:-} ]]; then
    python=.venv/bin/python
    [[ -x $python ]] || python=python3
    GPUS=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [[ $GPUS == 0 ]]; then
        echo "[Error] PyTorch sees no GPU here. On a CPU use scripts/train.sh" >&2
        exit 1
    fi
fi
export GPUS
exec scripts/train.sh "$@"
