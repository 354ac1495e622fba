"""Trains until the run is finished, and starts the trainer again whatever killed it meanwhile.

All arguments go to scripts/train.sh. It ends when the run is finished, at Ctrl+C, at a mistake that a restart cannot
mend, and after three restarts in a row that saved no new step. Ctrl+C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 (SLURM's
warnings) sent to this program are passed on to the trainer, which saves; then both end. A SIGTERM or SIGHUP to the
trainer alone is followed by a restart.
The output also goes to OUTPUT_DIR/train_until_done.log. RESTART_WAIT: seconds before a restart (10).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tools._common import ToolError, run_program
from tools.run_files import LATEST, checkpoint_step, clear_last_exit, list_checkpoints, output_dir_from, read_last_exit

TRAIN = str(Path(__file__).resolve().parent.parent / "scripts" / "train.sh")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
BY_A_PERSON_OR_SCHEDULER = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # Ctrl+C; SLURM: the time is up
MAX_RESTARTS = 3  # in a row, without a new step


class ArgumentReader(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ToolError(message)


def output_dir_of(arguments: Sequence[str]) -> Path:
    """Where the trainer will write; scripts/train.sh adds --resume auto."""
    reader = ArgumentReader(add_help=False, allow_abbrev=False)
    reader.add_argument("--output-dir")
    reader.add_argument("--resume", default="auto")
    typed = reader.parse_known_args(arguments)[0]
    return output_dir_from(typed.output_dir, typed.resume)


def how_it_ended(last_exit: Mapping[str, Any], status: int, torchrun: bool) -> tuple[str, int]:
    """Returns (reason, exit status) of a trainer; "killed" where it left no last_exit.json and no other explanation.

    status is the process's own. It is 1 under torchrun for a killed process too.
    """
    if last_exit:
        return last_exit["reason"], last_exit["status"]
    if status == 0:
        return "finished", 0  # --help, --eval-only
    if status == 1 and not torchrun:
        return "user_error", 1  # a mistake that was noticed before the output directory was opened
    if status == 128 + signal.SIGINT:
        return "stopped", status  # the second Ctrl+C
    return "killed", status


def goes_on(reason: str, status: int) -> bool:
    """Whether another start makes sense: after a kill, a crash, a SIGTERM or SIGHUP that the machine has sent."""
    return reason in ("killed", "crash") or (reason == "stopped" and status - 128 not in BY_A_PERSON_OR_SCHEDULER)


def saved_step(output_dir: Path) -> int:
    """The step of latest.pth, by the name that it is linked to; where it has no links the highest there is, or 0."""
    files = list_checkpoints(output_dir)
    for path in files:
        with suppress(FileNotFoundError):
            if path.samefile(output_dir / LATEST):
                return checkpoint_step(path.name) or 0
    return checkpoint_step(files[0].name) or 0 if files else 0


class Supervisor:
    """Runs one trainer at a time, in a process group of its own, so that a Ctrl+C reaches it once, from here."""

    def __init__(self, log: BinaryIO):
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.stop_signal: int | None = None
        self.to_pass_on: list[int] = []
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup: stays ignored, by the trainer too
                signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: object = None) -> None:
        self.stop_signal = self.stop_signal or signum
        self.to_pass_on.append(signum)
        self.pass_on()

    def pass_on(self) -> None:
        while self.process and self.to_pass_on:
            self.process.send_signal(self.to_pass_on.pop(0))

    def write(self, output: bytes) -> None:
        for stream in (self.log, sys.stdout.buffer):
            with suppress(OSError):  # a full disk, a closed terminal: training goes on
                stream.write(output)
                stream.flush()

    def say(self, line: str) -> None:
        self.write(line.encode(errors="backslashreplace") + b"\n")

    def copy_output(self, process: subprocess.Popen[bytes]) -> None:
        while output := process.stdout.read1():  # type: ignore[union-attr]
            self.write(output)

    def run(self, command: Sequence[str]) -> int:
        """Returns the exit status once the process is gone; that of a killed one is 128 + the signal's number."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, process_group=0)
        self.process = process
        self.pass_on()  # what came while it was being started
        copier = threading.Thread(target=self.copy_output, args=[process], daemon=True)
        copier.start()
        # A wait without end would miss a signal that comes just before it, or that the other thread is given.
        while (status := process.poll()) is None:
            time.sleep(0.1)
        self.process = None
        copier.join(timeout=5)  # what a killed trainer started may still hold the pipe
        return status if status >= 0 else 128 - status

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stop_signal and time.monotonic() < end:
            time.sleep(min(0.1, seconds))


def train_until_done(supervisor: Supervisor, arguments: Sequence[str], output_dir: Path, wait: float) -> int:
    """Returns the exit status."""
    first_step, restarts = saved_step(output_dir), 0
    command = [TRAIN, *arguments]
    while True:
        clear_last_exit(output_dir)
        status = supervisor.run(command)
        reason, status = how_it_ended(read_last_exit(output_dir), status, torchrun=bool(os.environ.get("GPUS")))
        step = saved_step(output_dir)
        supervisor.say(f"[Info] The trainer ended: {reason}, status {status}, saved step {step}")
        if supervisor.stop_signal or not goes_on(reason, status):
            return status
        restarts = restarts if step == first_step else 0
        if restarts == MAX_RESTARTS:
            supervisor.say(f"[Error] {restarts} restarts in a row saved no new step (still {step}). Giving up; why it "
                           f"ended is in {supervisor.log.name}. Where the machine itself goes away so often, a lower "
                           "--save-interval gets further")
            return status or 1
        first_step, restarts = step, restarts + 1
        supervisor.say(f"[Info] Going on in {wait:g} s, restart {restarts} of at most {MAX_RESTARTS} without a new "
                       "step")
        supervisor.pause(wait)
        if supervisor.stop_signal:
            return 128 + supervisor.stop_signal
        # Not back again to the file of a typed --resume PATH.
        command = [TRAIN, *arguments, "--resume", "auto", "--output-dir", str(output_dir)]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    output_dir = output_dir_of(arguments)
    try:
        wait = float(os.environ.get("RESTART_WAIT", 10))
    except ValueError as error:
        raise ToolError(f"RESTART_WAIT is {os.environ['RESTART_WAIT']!r}. Give seconds, such as 10") from error
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        log = (output_dir / "train_until_done.log").open("ab", buffering=0)
    except OSError as error:
        raise ToolError(f"--output-dir {output_dir}: {error.strerror}. Choose a directory you can write to") from error
    with log:
        sys.exit(train_until_done(Supervisor(log), arguments, output_dir, wait))


if __name__ == "__main__":
    run_program(main)
