"""The schedule ends where the run ends, and a short run shows as much as a long one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_checkpoint, read_jsonl
from fresh_process import QUICK, SETTINGS, data_args, runs, train_in_process
from old_checkpoints import make

DEFAULTS = ["--batch-size", "4", "--grad-accumulation", "1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows, 5 validation rows, a tokenizer; to be spoiled."""
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


def learning_rates(out: Path) -> list[float]:
    (metrics,) = out.glob("logs/run_*/metrics.jsonl")
    return [line["lr"] for line in read_jsonl(metrics) if line["kind"] == "train"]


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("epochs,max_steps,end", [(2, 200_000, 8), (40, 6, 6), (2, 8, 8), (2, 0, 8)])
def test_the_schedule_ends_at_the_smaller_of_max_steps_and_the_last_epochs_end(epochs, max_steps, end, data, tmp_path):
    out = tmp_path / "out"
    output = runs(train_in_process(*data_args(data), *SETTINGS, "--output-dir", out, "--epochs", epochs, "--max-steps",
                                   max_steps))
    assert load_checkpoint(out / "latest.pth")["scheduler"]["total_steps"] == end == len(learning_rates(out))
    assert learning_rates(out)[-1] == pytest.approx(0, abs=1e-12) and max(learning_rates(out)) > 0.9e-3
    if max_steps and max_steps != end:  # the start says both limits and which one holds
        start = output.partition("[Train]")[0]
        assert str(max_steps) in start and re.search(rf"\b{end}\b", start)


@pytest.mark.parametrize("limits,flag,other", [
    (["--epochs", "2", "--max-steps", "200000"], "--epochs", "--max-steps"),
    (["--epochs", "40", "--max-steps", "3"], "--max-steps", "--epochs")], ids=["epochs", "max_steps"])
def test_a_complete_run_names_the_limit_to_raise(limits, flag, other, data, tmp_path):
    args = [*data_args(data), *SETTINGS, "--output-dir", tmp_path / "out", *limits]
    runs(train_in_process(*args))
    again = runs(train_in_process(*args, "--resume", "auto"))
    (line,) = [line for line in again.splitlines() if "Training is complete" in line]
    assert flag in line and other not in line


def test_a_checkpoint_keeps_its_schedule_until_a_length_flag_is_typed(data, tmp_path):
    """One of an older trainer whose --max-steps lay beyond its epochs."""
    make.copy_run("fp32", tmp_path / "old")
    again = ["--resume", "auto", *make.BATCHES, "--output-dir", "fp32"]
    output = runs(train_in_process(*again, cwd=tmp_path / "old"))
    assert "lr at step" not in output
    output = runs(train_in_process(*again, "--epochs", 5, cwd=tmp_path / "old"))
    assert re.search(r"lr at step 16: \S+ -> \S+", output)


# ---------------------------------------------------------------------------------------------------------------------
# Small runs with defaults


@pytest.mark.parametrize("epochs", [3, 8, 30])
def test_every_run_prints_ten_train_lines_unless_log_interval_is_typed(epochs, data, tmp_path):
    """Or one a step, where there are fewer than ten steps; the interval is derived, never stored."""
    args = [*data_args(data), *DEFAULTS, "--output-dir", tmp_path / "out", "--epochs", epochs]
    lines = re.findall(r"^\[Train\]", runs(train_in_process(*args)), re.MULTILINE)
    assert len(lines) >= min(10, 4 * epochs) and len(lines) <= 60
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["config"]["log_interval"] in (0, 100, None)


def test_a_typed_log_interval_holds(data, tmp_path):
    output = runs(train_in_process(*data_args(data), *DEFAULTS, "--output-dir", tmp_path / "out", "--epochs", 8,
                                   "--log-interval", 16))
    assert re.findall(r"^\[Train\] epoch=\d+ step=(\d+)", output, re.MULTILINE) == ["16", "32"]


def test_a_small_run_validates_before_its_end(data, tmp_path):
    output = runs(train_in_process(*data_args(data), *DEFAULTS, "--output-dir", tmp_path / "out", "--epochs", 8))
    steps = [int(step) for step in re.findall(r"^\[Val\] epoch=\d+ step=(\d+)", output, re.MULTILINE)]
    assert steps[-1] == 32 and steps[0] < 32


# A second lasts an hour for every clock of the process.
FAST_CLOCK = """
import time
for name in ("monotonic", "perf_counter", "time"):
    real, start = getattr(time, name), getattr(time, name)()
    setattr(time, name, lambda real=real, start=start: start + 3600 * (real() - start))
"""


def saves(output: str) -> int:
    return output.count("[Info] Saved ")


def test_a_checkpoint_is_written_at_least_every_thirty_minutes(data, tmp_path):
    args = [*data_args(data), *QUICK, "--save-interval", 0, "--epochs", 400, "--max-steps", 400, "--log-interval", 100,
            "--val-interval", 100_000]
    output = runs(train_in_process(*args, "--output-dir", tmp_path / "default", before=FAST_CLOCK))
    assert saves(output) >= 2
    output = runs(train_in_process(*args, "--output-dir", tmp_path / "typed", "--save-minutes", 100_000,
                                   before=FAST_CLOCK))
    assert saves(output) == 1


def test_a_kill_after_the_first_validation_and_before_the_first_checkpoint_costs_no_more_than_its_steps(data, tmp_path):
    """The first best.pth comes with a checkpoint: alone it would be nothing that auto takes."""
    kill = """
import os, sys
write, saved = sys.stdout.write, []
def write_or_die(text):
    saved.extend(["Saved"] * ("[Info] Saved" in text))
    if saved and "[Train]" in text:
        os.kill(os.getpid(), 9)
    return write(text)
sys.stdout.write = write_or_die
"""
    args = [*data_args(data), *QUICK, "--max-steps", 100, "--epochs", 30, "--save-interval", 1000, "--val-interval", 2,
            "--resume", "auto", "--output-dir"]
    runs(train_in_process(*args, tmp_path / "whole"))
    assert train_in_process(*args, tmp_path / "killed", before=kill)[0] == -9
    assert (tmp_path / "killed" / "best.pth").exists()
    assert "Successfully resumed" in runs(train_in_process(*args, tmp_path / "killed"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth")["model"] for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_save_minutes_counts_since_the_last_save(data, tmp_path):
    args = [*data_args(data), *QUICK, "--save-interval", 0, "--epochs", 400, "--max-steps", 400, "--log-interval", 100,
            "--val-interval", 100_000, "--save-minutes"]
    few = saves(runs(train_in_process(*args, 600, "--output-dir", tmp_path / "few", before=FAST_CLOCK)))
    many = saves(runs(train_in_process(*args, 20, "--output-dir", tmp_path / "many", before=FAST_CLOCK)))
    assert few < many
