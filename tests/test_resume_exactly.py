"""Uninterrupted and stopped-and-resumed runs are the same run, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import signal
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, data_args, load_checkpoint, metrics_of, resumable_state, run_trainer, trainer
from fresh_process import train_in_process

FACTORS = {
    "moment": ("mid_epoch", "epoch_end", "after_save", "validation"),
    "accumulation": (1, 3),
    "workers": (0, 2),
    "precision": ("fp32", "bf16", "fp16"),
    "signal": ("SIGINT", "SIGTERM", "SIGKILL"),
    "resume": ("auto", "path"),
}
# Every pair of values of two factors occurs in these; `make soak` runs all 288.
NUMBER_OF_CASES = 20
STOP_STEP = {"mid_epoch": 5, "epoch_end": 0, "after_save": 6, "validation": 4}


@cache
def covering_cases() -> list[tuple]:
    """A pairwise covering set, greedily, then filled up to NUMBER_OF_CASES; the same in every run."""
    everything = list(itertools.product(*FACTORS.values()))
    if os.environ.get("SOAK"):
        return everything
    random.Random(0).shuffle(everything)

    def pairs(case: tuple) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, everything))
    chosen: list[tuple] = []
    while len(chosen) < NUMBER_OF_CASES:
        best = max((case for case in everything if case not in chosen), key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    assert not missing
    return chosen


def run_args(data: Path, output_dir: Path, accumulation: int, workers: int, precision: str) -> list[str]:
    amp = [] if precision == "fp32" else ["--amp", precision]
    return [*data_args(data), "--output-dir", str(output_dir), "--batch-size", "2", "--grad-accumulation",
            str(accumulation), "--num-workers", str(workers), "--epochs", "2", "--log-interval", "1", "--val-interval",
            "4", "--val-batch-size", "2", "--save-interval", "3", *amp]


def run_stopping(samples: Path, args: list[str], moment: str = "none", step: int = 0, signal_name: str = "") -> int:
    """Runs the trainer to its end, or until it has been sent a signal; see stop_at.py. Returns: its exit status."""
    watched = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import stop_at
main, on_event = trainer.main, stop_at.watch({moment!r}, {step}, {signal_name!r}, {str(samples)!r})
trainer.main = lambda args: main(args, on_event)
"""
    status, printed = train_in_process(*args, before=watched, seconds=300)
    assert status != "hangs" and "Traceback" not in printed, printed
    return int(status)


def samples_by_step(path: Path) -> dict[int, list[int]]:
    """The samples of each step; a step that a kill made the run repeat counts as it was last done."""
    lines = [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture(scope="session")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """The run nobody stopped, for each accumulation and precision, made once (the worker count must not matter)."""
    @cache
    def run(accumulation: int, precision: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("uninterrupted")
        args = run_args(tiny, folder / "out", accumulation, 0, precision)
        assert run_stopping(folder / "samples", args) == 0
        return folder / "out", folder / "samples"

    return run


@pytest.mark.parametrize("moment,accumulation,workers,precision,signal_name,resume", covering_cases())
def test_a_stopped_and_resumed_run_is_bit_identical_to_the_uninterrupted_one(
        moment, accumulation, workers, precision, signal_name, resume, tiny, uninterrupted, tmp_path):
    expected_dir, expected_samples = uninterrupted(accumulation, precision)
    out, samples = tmp_path / "out", tmp_path / "samples"
    args = run_args(tiny, out, accumulation, workers, precision)
    status = run_stopping(samples, args, moment, STOP_STEP[moment], signal_name)
    signum = getattr(signal, signal_name)
    assert status == (-signum if signal_name == "SIGKILL" else 128 + signum)
    newest = max(out.glob("model_step*.pth"), key=lambda path: int(path.stem.removeprefix("model_step")))
    assert run_stopping(samples, [*args, "--resume", "auto" if resume == "auto" else str(newest)]) == 0

    expected, found = load_checkpoint(expected_dir / "latest.pth"), load_checkpoint(out / "latest.pth")
    assert resumable_state(found) == resumable_state(expected)
    assert metrics_of(out) == metrics_of(expected_dir)
    assert samples_by_step(samples) == samples_by_step(expected_samples)
    assert resumable_state(load_checkpoint(out / "best.pth"))["model"] == resumable_state(
        load_checkpoint(expected_dir / "best.pth"))["model"]


def test_every_epoch_sees_every_sample_once_and_no_step_crosses_an_epoch(uninterrupted):
    for accumulation, steps_per_epoch in ((1, 21), (3, 7)):
        steps = samples_by_step(uninterrupted(accumulation, "fp32")[1])
        assert sorted(steps) == list(range(1, 2 * steps_per_epoch + 1))
        for epoch in range(2):
            numbers = range(epoch * steps_per_epoch + 1, (epoch + 1) * steps_per_epoch + 1)
            assert sorted(row for number in numbers for row in steps[number]) == list(range(41))


def test_a_planned_stop_at_max_steps_goes_on_when_the_limit_is_raised(tiny, tmp_path):
    args = [*data_args(tiny), "--output-dir", tmp_path, "--batch-size", 4, "--grad-accumulation", 1,
            "--log-interval", 1, "--val-interval", 100]
    run_trainer(*args, "--max-steps", 15)
    resumed = run_trainer(*args, "--resume", "auto", "--max-steps", 40)
    steps = [line["step"] for line in metrics_of(tmp_path) if line["kind"] == "train"]
    assert steps == list(range(1, 41))
    assert "[Info] lr at step 15: " in resumed.stdout
    again = run_trainer(*args, "--resume", "auto", "--max-steps", 40)
    assert "Training is complete" in again.stdout and "[Train]" not in again.stdout


def test_a_changed_global_batch_goes_on_at_the_very_next_sample(tiny, tmp_path):
    def args(batch_size: int, accumulation: int) -> list[str]:
        return [*run_args(tiny, tmp_path / "out", accumulation, 0, "fp32"), "--batch-size", str(batch_size), "--resume",
                "auto"]

    samples = tmp_path / "samples"
    assert run_stopping(samples, args(4, 2), "after_save", 3, "SIGTERM") == 143
    assert run_stopping(samples, args(4, 3)) == 0
    order = trainer.epoch_sample_order(41, 1234, 0).tolist()
    steps = samples_by_step(samples)
    assert [steps[step] for step in range(1, 6)] == [order[:8], order[8:16], order[16:24], order[24:36], order[36:]]
    assert [len(steps[step]) for step in range(6, 10)] == [12, 12, 12, 5] and max(steps) == 9
