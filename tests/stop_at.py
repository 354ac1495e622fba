"""Runs the real trainer, notes which samples every step consumes, and sends it one signal at a chosen moment.

python stop_at.py MOMENT STEP SIGNAL SAMPLES_FILE TRAINER_ARGUMENTS...

Under torchrun the signal goes to rank 1, and every rank notes its samples: rank R > 0 in SAMPLES_FILE.R.

MOMENT: none, mid_epoch (between the forward passes of step STEP), epoch_end (the first one, before anything is logged),
after_save (of step STEP), validation (before the second batch of the first validation at or after STEP).
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainers import train_gpt_v2 as trainer


def main() -> int:
    moment, step, signal_name, samples_file, *argv = sys.argv[1:]
    at_step, signum = int(step), getattr(signal, signal_name, 0)
    sent = []
    rank, signalled = os.environ.get("RANK", "0"), "1" if "RANK" in os.environ else "0"

    def send_once() -> None:
        if not sent and rank == signalled:
            sent.append(True)
            os.kill(os.getpid(), signum)

    def wrap(name: str, before=None, after=None) -> None:
        original = getattr(trainer, name)

        def wrapped(*args, **kwargs):
            if before:
                before(*args)
            result = original(*args, **kwargs)
            if after:
                after(*args)
            return result

        setattr(trainer, name, wrapped)

    current = []
    samples = open(samples_file if rank == "0" else f"{samples_file}.{rank}", "a")

    def note_step(run, batches) -> None:
        current[:] = [run.state.position.step + 1]
        rows = [row for batch in batches for row in batch.rows]
        print(current[0], *rows, file=samples, flush=True)

    wrap("train_step", before=note_step)
    if moment == "mid_epoch":
        wrap("summed_losses", before=lambda *_: current == [at_step] and send_once())
    elif moment == "epoch_end":
        wrap("after_step", before=lambda run, *_: run.state.position.sample_in_epoch == 0 and send_once())
    elif moment == "after_save":
        wrap("save_checkpoint", after=lambda run, *_: run.state.position.step == at_step and send_once())
    elif moment == "validation":
        calls: list[int] = []

        def before_batch(model, batch) -> None:
            if not model.training:
                calls.append(current[0])
                if current[0] >= at_step and calls.count(current[0]) == 2:
                    send_once()

        wrap("token_losses", before=before_batch)
    return trainer.main(argv)


if __name__ == "__main__":
    trainer.leave(main())
