#!/usr/bin/env bash
# Trains in a Studio of Lightning AI until the run is finished, and goes on whenever the Studio starts again:
#
#   scripts/lightning.sh --output-dir training_output
#
# All arguments go to scripts/train_until_done.sh. A line in ~/.lightning_studio/on_start.sh, which a Studio runs at its
# start, starts this script again; it is taken out when the run is finished, at Ctrl+C, and at a mistake that a restart
# cannot mend. What is printed also goes to OUTPUT_DIR/train_until_done.log.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

hook=$HOME/.lightning_studio/on_start.sh
mark='# by scripts/lightning.sh'
if [[ ! -d ${hook%/*} ]]; then
    echo "[Error] ${hook%/*}: no such directory, so this is no Studio of Lightning AI. Use scripts/train_until_done.sh" >&2
    exit 1
fi

# The hook without our line, and with the arguments' line if there are any; replaced whole.
write_hook() {
    touch "$hook"
    { grep -vF -- "$mark" "$hook" || true; } > "$hook.new"
    if [[ $# -gt 0 ]]; then
        printf '%s\n' "nohup $(printf '%q ' "$@")> /dev/null 2>&1 & $mark" >> "$hook.new"
    fi
    mv -- "$hook.new" "$hook"
}

write_hook "$PWD/scripts/lightning.sh" "$@"
status=0
scripts/train_until_done.sh "$@" || status=$?
case $status in
    0 | 1 | 130) # finished, a mistake, Ctrl+C
        write_hook
        echo "[Info] The Studio's start does not start this training any more"
        ;;
esac
exit "$status"
