"""The arithmetic as a whole: a short run's losses are the recorded ones.

Whatever changes a gradient, an update or a mask changes them: clipping, either loss's weight, weight decay and what it
spares, the schedule, dropout, accumulation, the sample order, the scaler. `python tests/test_golden_losses.py` records
them; it is run again only when the arithmetic is meant to change, and then the diff is read.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call_trainer, load_checkpoint, read_jsonl
from old_checkpoints import make

GOLDEN = Path(__file__).with_name("golden_losses.json")
PRECISIONS = {"fp32": [], "bf16": ["--amp", "bf16"], "fp16": ["--amp", "fp16"]}
# Three epochs of steps of 4, 4, 4 and 1 of 13 samples; every gradient norm is above the limit; the losses weigh so much
# that fp16 overflows at first.
SETTINGS = ["--batch-size", "2", "--grad-accumulation", "2", "--epochs", "3", "--learning-rate", "0.02",
            "--warmup-steps", "3", "--weight-decay", "2.5", "--grad-clip", "0.3", "--text-loss-weight", "0.9",
            "--mel-loss-weight", "1.7", "--dropout", "0.2", "--seed", "4321", "--log-interval", "1", "--val-interval",
            "5"]
# Relative, against other CPUs, which add up in another order. Found by lowering ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA
# and MKL_CBWR to AVX2 and to SSE4: 2e-7, 3e-4 and 3e-5; ten times that for the gradient's norm. Every fault above moves
# a float32 loss by far more than 1e-5 within these steps.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-4}
# Random numbers for masks come from MKL where PyTorch has it, from PyTorch itself elsewhere.
needs_mkl = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other dropout masks")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU, whose masks are others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def losses_of(output_dir: Path, precision: str) -> dict[str, Any]:
    """Trains, and returns what metrics.jsonl and the last checkpoint hold."""
    data = make.HERE / "data"
    call_trainer("--train-manifest", data / "train_pairs.jsonl", "--val-manifest", data / "val_pairs.jsonl",
                 "--tokenizer", data / "tokenizer.model", "--output-dir", output_dir, *SETTINGS, *PRECISIONS[precision])
    (metrics,) = output_dir.glob("logs/run_*/metrics.jsonl")
    lines = read_jsonl(metrics)
    train = [[line["text_loss"], line["mel_loss"], line["grad_norm"] if math.isfinite(line["grad_norm"]) else None,
              line["lr"]] for line in lines if line["kind"] == "train"]
    val = [[line["step"], line["text_loss"], line["mel_loss"], line["loss"]] for line in lines
           if line["kind"] == "val" and "manifest" not in line]
    scaler = load_checkpoint(output_dir / "latest.pth")["scaler"]
    return {"text_loss, mel_loss, grad_norm, lr": train, "step, text_loss, mel_loss, loss": val,
            "scale": scaler["scale"] if scaler else None}


@needs_mkl
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_losses_of_a_short_run_are_the_recorded_ones(precision: str, on_the_cpu, tmp_path: Path):
    expected, found = json.loads(GOLDEN.read_text())[precision], losses_of(tmp_path, precision)
    for name, rows in expected.items():
        if name == "scale":
            assert found["scale"] == rows
            continue
        assert len(found[name]) == len(rows)
        for number, (row, other) in enumerate(zip(rows, found[name], strict=True), 1):
            for column, value, here in zip(name.split(", "), row, other, strict=True):
                tolerance = TOLERANCES[precision] * (20 if column == "grad_norm" else 1)
                close = here is None if value is None else here == pytest.approx(value, rel=tolerance)
                assert close, f"line {number}: {column} is {here}, was {value}"


def test_the_short_run_is_one_in_which_clipping_and_the_scaler_matter():
    golden = json.loads(GOLDEN.read_text())
    for precision in ("fp32", "bf16"):
        norms = [row[2] for row in golden[precision]["text_loss, mel_loss, grad_norm, lr"]]
        assert min(norms) > 0.3 and max(norms) > 2 * min(norms)
    assert golden["fp16"]["scale"] < 65536


def main() -> None:
    golden = {}
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            golden[precision] = losses_of(Path(folder) / "out", precision)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
