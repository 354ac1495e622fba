"""Rows, gradients, scales and weights that are not finite are told, counted, left out or refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_checkpoint, read_jsonl, resumable_state, write_manifest
from fresh_process import QUICK, data_args, errs, runs, runs_or_errs, train_in_process
from old_checkpoints import make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows, 5 validation rows, a tokenizer; to be spoiled."""
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


def train_lines(out: Path) -> list[dict]:
    (metrics,) = out.glob("logs/run_*/metrics.jsonl")
    return [line for line in read_jsonl(metrics) if line["kind"] == "train"]


# ---------------------------------------------------------------------------------------------------------------------
# Rows whose loss is not finite


LONG = ["--batch-size", "13", "--grad-accumulation", "1", "--log-interval", "1", "--save-interval", "10",
        "--val-interval", "1000", "--warmup-steps", "0", "--learning-rate", "0.001"]


def poison(data: Path, copies: int, bad: list[int]) -> list[str]:
    """130 rows (for copies = 10), those with the numbers `bad` pointing to features of 3e38. Returns the bad ids."""
    emo = np.load(data / "train_emo.npy")
    np.save(data / "train_emo.npy", np.concatenate([emo, np.full((1, 8), 3e38, np.float32)]))
    rows = read_jsonl(data / "train_pairs.jsonl")
    rows = [{**row, "id": f"{row['id']}_{number}"} for number in range(copies) for row in rows]
    for number in bad:
        rows[number]["prompt_emo_vec_start"] = 13
    write_manifest(data / "train_pairs.jsonl", rows)
    return [rows[number]["id"] for number in bad]


def test_a_row_whose_loss_is_not_finite_is_named_then_left_out_and_stays_so(data, tmp_path):
    """One of 130; steps of 13, so that 12 neighbours lose an update with it, once or twice and no more."""
    (name,) = poison(data, 10, [44])
    out = tmp_path / "out"
    args = [*data_args(data), *LONG, "--output-dir", out]
    output = runs(train_in_process(*args, "--epochs", 5, "--max-steps", 30))
    assert name in output.partition("[Train] epoch=2")[0]
    assert any(line.startswith("[Warn]") and name in line for line in output.splitlines())
    skipped = {line["step"]: line["skipped_updates"] for line in train_lines(out)}
    assert 1 <= skipped[30] <= 2 and skipped[20] == skipped[30]
    assert all(np.isfinite(line["grad_norm"]) for line in train_lines(out) if line["step"] > 20)
    runs(train_in_process(*args, "--resume", "auto", "--epochs", 5, "--max-steps", 40))
    assert train_lines(out)[-1]["skipped_updates"] == skipped[30]


def test_a_skipped_update_is_told_with_the_next_train_line(data, tmp_path):
    (name,) = poison(data, 10, [44])
    output = runs(train_in_process(*data_args(data), *LONG, "--output-dir", tmp_path / "out", "--epochs", 1,
                                   "--log-interval", 5))
    told = [number for number, line in enumerate(output.splitlines()) if name in line]
    trains = [number for number, line in enumerate(output.splitlines()) if line.startswith("[Train]")]
    assert told and any(abs(one - other) <= 2 for one in told for other in trains)


def test_many_rows_whose_loss_is_not_finite_are_an_error_that_names_some(data, tmp_path):
    """Six of 13: more than one percent."""
    names = poison(data, 1, [0, 2, 4, 6, 8, 10])
    message = errs(train_in_process(*data_args(data), *LONG, "--output-dir", tmp_path / "out", "--batch-size", 1,
                                    "--epochs", 9), "finite")
    assert any(name in message for name in names)


def test_an_fp16_overflow_while_the_scale_comes_down_is_no_rows_fault(data, tmp_path):
    out = tmp_path / "out"
    output = runs(train_in_process(*data_args(data), *LONG, "--output-dir", out, "--amp", "fp16", "--text-loss-weight",
                                   5, "--mel-loss-weight", 12, "--batch-size", 4, "--epochs", 8))
    assert train_lines(out)[-1]["skipped_updates"] >= 2
    assert not re.search(r"\btrain\d+\b", output)
    for line in train_lines(out)[12:]:
        assert np.isfinite(line["grad_norm"])


# ---------------------------------------------------------------------------------------------------------------------
# The scale of fp16


def test_an_fp16_scale_that_only_sinks_ends_in_an_error(data, tmp_path):
    """Every other row overflows at any scale, so that ten in a row never happen."""
    poison(data, 1, [0, 2, 4, 6, 8, 10])
    done = train_in_process(*data_args(data), *LONG, "--output-dir", tmp_path / "out", "--batch-size", 1, "--amp",
                            "fp16", "--epochs", 12)
    errs(done, "finite" if "finite" in done[1].rpartition("[Error]")[2] else "scale")


def test_losses_that_no_scale_can_hold_end_in_an_error(data, tmp_path):
    done = train_in_process(*data_args(data), *LONG, "--output-dir", tmp_path / "out", "--batch-size", 4, "--amp",
                            "fp16", "--epochs", 60, "--mel-loss-weight", "1e30")
    errs(done, "finite" if "finite" in done[1].rpartition("[Error]")[2] else "scale")


# ---------------------------------------------------------------------------------------------------------------------
# Base checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a short run."""
    out = tmp_path_factory.mktemp("base") / "out"
    runs(train_in_process(*data_args(make.HERE / "data"), *QUICK, "--output-dir", out))
    return {name: tensor.clone() for name, tensor in load_checkpoint(out / "latest.pth")["model"].items()}


def from_base(tensors: object, data: Path, out: Path):
    torch.save(tensors, out.with_suffix(".pth"))
    return train_in_process(*data_args(data), *QUICK, "--output-dir", out, "--base-checkpoint", out.with_suffix(".pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_weights_that_are_not_finite_are_refused(value, base, data, tmp_path):
    spoiled = {**base, "mel_head.bias": base["mel_head.bias"].clone()}
    spoiled["mel_head.bias"][3] = value
    errs(from_base(spoiled, data, tmp_path / "out"), "--base-checkpoint", "mel_head.bias", "finite")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models_are_understood(prefix, base, data, tmp_path):
    runs(from_base(base, data, tmp_path / "plain"))
    runs(from_base({"model": {prefix + name: tensor for name, tensor in base.items()}}, data, tmp_path / "wrapped"))
    plain, wrapped = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("plain", "wrapped"))
    assert resumable_state(wrapped) == resumable_state(plain)


def test_un_merged_lora_names_are_understood_or_named(base, data, tmp_path):
    tensors = {}
    for name, tensor in base.items():
        if name.endswith("c_attn.weight"):
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.base_layer.weight"] = tensor
            tensors[f"{stem}.lora_A.default.weight"] = torch.ones(2, 8)
            tensors[f"{stem}.lora_B.default.weight"] = torch.ones(24, 2)
        else:
            tensors[name.replace("c_attn.bias", "c_attn.base_layer.bias")] = tensor
    runs_or_errs(from_base(tensors, data, tmp_path / "out"), "lora")


def test_last_exit_of_such_an_error_is_the_users(base, data, tmp_path):
    from_base({"mel_head.bias": base["mel_head.bias"]}, data, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "last_exit.json").read_text())["reason"] == "user_error"
