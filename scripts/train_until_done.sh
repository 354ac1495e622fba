#!/usr/bin/env bash
# Trains until the run is finished, and starts the trainer again whatever killed it meanwhile:
#
#   scripts/train_until_done.sh --output-dir training_output
#   GPUS=8 nohup scripts/train_until_done.sh --output-dir training_output > /dev/null &
#
# All arguments go to scripts/train.sh. It ends when the run is finished, at Ctrl+C, at a mistake that a restart cannot
# mend, and after three restarts in a row that saved no new step; tools/train_until_done.py has the rules.
# The output also goes to OUTPUT_DIR/train_until_done.log. RESTART_WAIT: seconds before a restart (10).
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "$python" -m tools.train_until_done "$@"
