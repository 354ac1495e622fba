#!/usr/bin/env bash
# Starts training, or goes on where the last run in the output directory stopped:
#
#   scripts/train.sh --output-dir training_output
#
# All arguments go to trainers/train_gpt_v2.py. The project's .venv is used where `make` has made one, else python3.
# It works in the project's folder, so relative paths mean the same wherever it is called from.
# GPUS=4 scripts/train.sh ... runs one process on each of 4 GPUs (scripts/train_multi_gpu.sh: on all of them).
# NODES=2 MAIN=10.0.0.1:29500 GPUS=4 scripts/train.sh ..., on each of 2 machines, of which MAIN names one and a free
# port, and which share the output directory and the data.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

python=.venv/bin/python
[[ -x $python ]] || python=python3
launcher=("$python")
if [[ -n ${GPUS:-} ]]; then
    # After a stop signal the processes get ten minutes to save before torchrun kills them.
    # SIGUSR1 and SIGUSR2, SLURM's warnings, would kill it; this way they reach the processes, which save and leave.
    launcher+=(-m torch.distributed.run --nproc-per-node "$GPUS" --shutdown-timeout 600
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2)
    if [[ -n ${NODES:-} ]]; then
        launcher+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${MAIN:?names no machine}" --rdzv-id run)
    else
        launcher+=(--standalone)
    fi
fi
exec "${launcher[@]}" "${TRAINER:-trainers/train_gpt_v2.py}" --resume auto "$@"
