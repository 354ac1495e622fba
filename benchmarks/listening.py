"""What speaking beside a training costs it on this CPU: training steps a second with nobody speaking, with a speaker
that stands back as tools.synthesize --watch does, and with one that does not, in turns of a few steps.

Each runs in a session of its own, as the page starts them; speakers speak without a pause and are halted between their
turns. Printed are medians of the ratios of neighbouring turns, with quartiles: a noisy machine disturbs all alike.
Where all share one core (taskset -c 0), what a speaker takes of it is what the training loses.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tools.codes_to_sound import CODEC, CodecSound
from tools.generation import Sampling, Synthesizer
from tools.watch_training import stand_back, validation_lines, waveforms

TURNS = ("nobody", "stands back", "does not")
OWN = [sys.executable, "-m", "benchmarks.listening"]


def speak_on(checkpoint: Path, stands_back: bool) -> None:
    """Until it is killed; "ready" comes before the first sentence."""
    synthesizer = Synthesizer(checkpoint, CodecSound(CODEC), None)
    lines = validation_lines(synthesizer)
    if stands_back:
        stand_back()
    print("ready", flush=True)
    while True:
        waveforms(synthesizer, lines, Sampling())


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert any(line.startswith(word) for line in process.stdout), "it ended early"


def step_times(process: subprocess.Popen[str], times: list[float]) -> None:
    """Appends to `times` while the training runs."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[Train]"):
            times.append(time.monotonic())


def processor_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rates(times: list[float], speakers: dict[str, subprocess.Popen[str]], rounds: int, steps: int
          ) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Steps a second of every turn, by who spoke, and seconds of all turns of each."""
    found: dict[str, list[float]] = {name: [] for name in TURNS}
    lasted = dict.fromkeys(TURNS, 0.0)
    for number in range(rounds):
        for name in TURNS if number % 2 else reversed(TURNS):
            started = time.monotonic()
            if name in speakers:
                speakers[name].send_signal(signal.SIGCONT)
            first = len(times) + 1  # the step after the one in which the turn began
            while len(times) <= first + steps:
                time.sleep(0.01)
            if name in speakers:
                speakers[name].send_signal(signal.SIGSTOP)
            lasted[name] += time.monotonic() - started
            found[name].append(steps / (times[first + steps] - times[first]))
    return found, lasted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="first command:\n  OMP_NUM_THREADS=1 python -m benchmarks.listening")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--speak", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stand-back", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.speak:
        speak_on(args.speak, args.stand_back)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "out" / "latest.pth"
        train = [sys.executable, "trainers/train_gpt_v2.py", "--output-dir", str(checkpoint.parent), "--batch-size",
                 "1", "--grad-accumulation", "1", "--log-interval", "1", "--save-interval", "100000", "--epochs", "100"]
        subprocess.run([*train, "--max-steps", "1"], check=True, stdout=subprocess.DEVNULL)
        options: Any = {"start_new_session": True, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen([*train, "--resume", "auto", "--max-steps", "100000"], **options)]
        speakers: dict[str, subprocess.Popen[str]] = {}
        try:
            for name, more in (("stands back", ["--stand-back"]), ("does not", [])):
                speakers[name] = subprocess.Popen([*OWN, "--speak", str(checkpoint), *more], **options)
                processes.append(speakers[name])
                wait_for(speakers[name], "ready")
                speakers[name].send_signal(signal.SIGSTOP)
            times: list[float] = []
            threading.Thread(target=step_times, args=(processes[0], times), daemon=True).start()
            while len(times) < 20:
                time.sleep(0.5)
            taken = {name: -processor_seconds(speaker) for name, speaker in speakers.items()}
            found, lasted = rates(times, speakers, args.rounds, args.steps)
            taken = {name: taken[name] + processor_seconds(speaker) for name, speaker in speakers.items()}
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    print(f"{args.rounds} rounds, {statistics.median(found['nobody']):.2f} steps a second while nobody speaks")
    for name in TURNS[1:]:
        ratios = [one / other for one, other in zip(found[name], found["nobody"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"a speaker that {name}: {middle:.3f} of that (quartiles {low:.3f} to {high:.3f}), takes "
              f"{taken[name] / lasted[name]:.4f} of a core")


if __name__ == "__main__":
    main()
