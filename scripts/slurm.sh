#!/usr/bin/env bash
# A SLURM job that trains until the run is finished, however often its time runs out or another job takes its place:
#
#   sbatch scripts/slurm.sh --output-dir training_output
#   sbatch --gpus=4 --time=08:00:00 scripts/slurm.sh --output-dir training_output
#
# Submit it in the project's folder. All arguments go to scripts/train_until_done.sh. Five minutes before the time is up
# SLURM sends SIGUSR1: the trainer saves, and the job is put into the queue again. A preempted job or one whose node
# fails SLURM itself puts there. scancel ends it. What it prints goes on in slurm-JOB.log.
#SBATCH --job-name=train-gpt
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

# SLURM runs a copy of this file: where it was submitted is the project's folder.
cd -- "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -x scripts/train_until_done.sh ]]; then
    echo "[Error] $PWD is not the project's folder. Submit the job there: sbatch scripts/slurm.sh" >&2
    exit 1
fi
if [[ ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
    export GPUS=$SLURM_GPUS_ON_NODE
fi

time_is_up='' signalled=''
scripts/train_until_done.sh "$@" &
training=$!
trap 'time_is_up=yes signalled=yes; kill -USR1 "$training"' USR1
trap 'signalled=yes; kill -TERM "$training"' TERM
while # a signal ends the waiting, not the training
    signalled='' status=0
    wait "$training" || status=$?
    [[ $signalled ]]
do :; done
# 128 + SIGUSR1: stopped by the warning, and saved.
if [[ $time_is_up && $status == 138 ]]; then
    echo "[Info] The time is up: job ${SLURM_JOB_ID:-?} goes into the queue again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
