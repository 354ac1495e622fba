"""Runs that an older trainer left go on: with the masks of its arithmetic in float32 the same bits in the environment
where they were recorded, close elsewhere.

tests/old_checkpoints/make.py tells what is recorded, and by which trainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import call_trainer
from old_checkpoints import make

from trainers import train_gpt_v2 as trainer

EXPECTED = json.loads((make.HERE / "expected.json").read_text())
# Relative, for the losses of ten steps on another CPU, whose vectors of other width add up in another order. Found by
# lowering ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_CBWR to AVX2 and to SSE4: 2e-7, 3e-4 and 2e-5. (One rounding
# of a bfloat16 is 4e-3, of a float16 5e-4; a loss is the mean over some 40 tokens.) The gradient's norm moves ten times
# as much.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-4}


@pytest.fixture(autouse=True)
def on_one_thread_of_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """As it was recorded, also on a machine with a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    torch.set_num_threads(threads)


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Of losses by kind and step."""
    for kind, steps in expected.items():
        assert found[kind].keys() == steps.keys()
        for step, values in steps.items():
            for name, value in values.items():
                factor = 20 if name == "grad_norm" else 1
                assert found[kind][step][name] == pytest.approx(value, rel=factor * tolerance), (kind, step, name)


@pytest.mark.parametrize("precision", make.PRECISIONS)
def test_a_run_of_an_older_trainer_goes_on_as_it_would_have(precision: str, tmp_path: Path, monkeypatch):
    make.copy_run(precision, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "dropped", F.dropout)  # of arithmetic 1
    output = call_trainer("--output-dir", precision, "--resume", "auto", *make.BATCHES)
    assert f"Epoch: 1, Step: {make.STOP_STEP}" in output and "lr at step" not in output
    expected, found = EXPECTED[precision], make.outcome_of(tmp_path / precision)
    assert f"[Warn] arithmetic: 1 -> {trainer.ARITHMETIC}. Continuing bit for bit is promised only" in output
    if make.environment_here() == EXPECTED["environment"] and precision == "fp32":
        assert found == expected
    else:
        assert_close(found["losses"], expected["losses"], TOLERANCES[precision])
        assert (found["step"], found["scale"], found["best"]["step"]) == (
            expected["step"], expected["scale"], expected["best"]["step"])
