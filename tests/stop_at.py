"""Notes which samples every step of the real trainer consumes, and sends it one signal at a chosen moment.

python stop_at.py MOMENT STEP SIGNAL SAMPLES_FILE TRAINER_ARGUMENTS... runs it so; run_stopping() does in a process that
does not have to import PyTorch first.

Under torchrun the signal goes to rank 1, and every rank notes its samples: rank R > 0 in SAMPLES_FILE.R.

MOMENT: none, mid_epoch (between the forward passes of step STEP), epoch_end (the first one, before anything is logged),
after_save (of step STEP), validation (before the second batch of the first validation at or after STEP).
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainers import train_gpt_v2 as trainer


def watch(moment: str, at_step: int, signal_name: str, samples_file: str) -> Callable[..., None]:
    """What main() tells its events to."""
    signum = getattr(signal, signal_name, 0)
    rank, signalled = os.environ.get("RANK", "0"), "1" if "RANK" in os.environ else "0"
    samples = open(samples_file if rank == "0" else f"{samples_file}.{rank}", "a")
    sent, validated = [], []

    def is_the_moment(event: str, run: Any) -> bool:
        done = run.state.position.step
        if event == "validation_batch":
            validated.append(done)
        return (moment, event) in {
            ("mid_epoch", "micro_step"), ("epoch_end", "step_done"), ("after_save", "save"),
            ("validation", "validation_batch")} and {
            "mid_epoch": done + 1 == at_step, "epoch_end": run.state.position.sample_in_epoch == 0,
            "after_save": done == at_step, "validation": done >= at_step and validated.count(done) == 2}[moment]

    def on_event(event: str, run: Any, *details: Any) -> None:
        if event == "step":
            rows = [row for batch in details[0] for row in batch.rows]
            print(run.state.position.step + 1, *rows, file=samples, flush=True)
        if not sent and rank == signalled and is_the_moment(event, run):
            sent.append(True)
            os.kill(os.getpid(), signum)

    return on_event


if __name__ == "__main__":
    moment, step, signal_name, samples_file, *argv = sys.argv[1:]
    trainer.leave(trainer.main(argv, watch(moment, int(step), signal_name, samples_file)))
