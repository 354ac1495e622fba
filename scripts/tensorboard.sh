#!/usr/bin/env bash
# Shows the loss curves of an output directory in the browser, for this machine only (http://127.0.0.1:6006):
#
#   scripts/tensorboard.sh training_output
#
# Further arguments go to TensorBoard, such as --port 6007. From elsewhere: ssh -L 6006:127.0.0.1:6006 MACHINE
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

output_dir=${1:-training_output}
shift || true
if [[ ! -d $output_dir ]]; then
    echo "[Error] $output_dir: no such directory. Usage: scripts/tensorboard.sh OUTPUT_DIR" >&2
    exit 1
fi
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "$python" -m tensorboard.main --logdir "$output_dir/logs" --host 127.0.0.1 "$@"
