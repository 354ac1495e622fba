"""Several languages in one run: weights of manifests, validation by language, forgetting; and stopping early."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_checkpoint, read_jsonl, write_manifest
from fresh_process import SETTINGS, errs, runs, train_in_process
from old_checkpoints import make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows and 5 validation rows; beside them two more languages of the same arrays."""
    folder = shutil.copytree(make.HERE / "data", tmp_path / "data")
    for name in ("train", "val"):
        rows = read_jsonl(folder / f"{name}_pairs.jsonl")
        for language in ("en", "zh"):
            write_manifest(folder / f"{name}_{language}.jsonl",
                           [{**row, "id": f"{language}_{row['id']}"} for row in rows])
    return folder


def mixed(data: Path, en: object = 0.5, zh: object = 2) -> list[object]:
    return ["--train-manifest", f"{data}/train_pairs.jsonl::am", "--train-manifest", f"{data}/train_en.jsonl::en@{en}",
            "--train-manifest", f"{data}/train_zh.jsonl::zh@{zh}", "--val-manifest", data / "val_pairs.jsonl",
            "--tokenizer", data / "tokenizer.model", *SETTINGS, "--epochs", 2]


def train_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[Train]")]


def test_a_mix_that_was_killed_goes_on_bit_for_bit_and_its_plan_is_printed(data, tmp_path):
    whole = runs(train_in_process(*mixed(data), "--output-dir", tmp_path / "whole"))
    assert "train_pairs.jsonl: weight 1, 13 samples of its 13 rows in an epoch, 28.9% of it" in whole
    assert "train_en.jsonl: weight 0.5, 6 samples of its 13 rows in an epoch, 13.3% of it" in whole
    assert "train_zh.jsonl: weight 2, 26 samples of its 13 rows in an epoch, 57.8% of it" in whole
    assert "2 epochs end at step 24" in whole  # 13 + 6 + 26 samples in batches of 4

    out = tmp_path / "killed"
    kill = "import os, signal\ndef act(): os.kill(os.getpid(), signal.SIGKILL)\n"
    for step in (5, 14):  # in the first and in the second epoch
        at_step = ("import sys\nwrite = sys.stdout.write\n" + kill +
                   f"sys.stdout.write = lambda text: (act() if ' step={step} ' in text else None, write(text))[1]\n")
        status, _ = train_in_process(*mixed(data), "--output-dir", out, "--resume", "auto", before=at_step)
        assert status == -9
    rest = runs(train_in_process(*mixed(data), "--output-dir", out, "--resume", "auto"))
    assert train_lines(rest) == train_lines(whole)[-len(train_lines(rest)) :] and 10 <= len(train_lines(rest)) < 20
    one, other = (load_checkpoint(folder / "latest.pth")["model"] for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_changed_weight_counts_as_changed_data(data, tmp_path):
    args = ["--output-dir", tmp_path / "out", "--resume", "auto", "--max-steps"]
    runs(train_in_process(*mixed(data), *args, 3))
    errs(train_in_process(*mixed(data, en=0.25), *args, 6), "training data changed", "or weights",
         "--accept-changed-data")
    output = runs(train_in_process(*mixed(data, en=0.25), *args, 6, "--accept-changed-data"))
    assert "epoch 0 starts anew" in output


@pytest.mark.parametrize("weight", ["0", "-1", "1e9", "nan", "", "half"])
def test_a_weight_that_is_none_is_one_error_that_names_the_manifest(data, tmp_path, weight):
    errs(train_in_process(*mixed(data, en=weight), "--output-dir", tmp_path / "out"), f"train_en.jsonl::en@{weight}",
         "above 0 and at most 1000")


def test_a_weight_without_a_language_is_told_how_a_weight_is_written(data, tmp_path):
    args = ["--tokenizer", data / "tokenizer.model", "--output-dir", tmp_path / "out"]
    for manifests in ([f"{data}/train_pairs.jsonl@0.5"], [data / "train_pairs.jsonl", f"{data}/train_en.jsonl@0.5"]):
        typed = [part for manifest in manifests for part in ("--train-manifest", manifest)]
        errs(train_in_process(*typed, *args), "jsonl@0.5: No such file", "PATH::LANG@WEIGHT")


def test_validation_takes_no_weight(data, tmp_path):
    errs(train_in_process(*mixed(data), "--val-manifest", f"{data}/val_en.jsonl::en@2", "--output-dir",
                          tmp_path / "out"), "--val-manifest", "takes no weight")


def test_a_language_that_the_base_knew_and_that_gets_worse_is_warned_of(data, tmp_path):
    """The base knows en; then am alone is trained, with other codes."""
    arguments = ["--tokenizer", data / "tokenizer.model", *SETTINGS, "--dropout", 0, "--warmup-steps", 1]
    runs(train_in_process("--train-manifest", data / "train_en.jsonl", "--val-manifest", data / "train_en.jsonl",
                          *arguments, "--epochs", 80, "--learning-rate", 0.03, "--output-dir", tmp_path / "base"))
    rows = read_jsonl(data / "train_pairs.jsonl")
    write_manifest(data / "train_am.jsonl", [{**row, "target_codes_start": other["target_codes_start"],
                                              "target_code_len": other["target_code_len"]}
                                             for row, other in zip(rows, rows[1:] + rows[:1], strict=True)])
    output = runs(train_in_process(
        "--train-manifest", f"{data}/train_am.jsonl::am", "--val-manifest", f"{data}/train_am.jsonl::am",
        "--val-manifest", f"{data}/train_en.jsonl::en", *arguments, "--base-checkpoint", tmp_path / "base/latest.pth",
        "--learning-rate", 0.03, "--epochs", 10, "--val-interval", 20, "--output-dir", tmp_path / "out"))
    assert output.index("[Val] epoch=0 step=0 ") < output.index("[Train]")  # what the base knows
    for part in ("en", "am", "train_am.jsonl"):
        assert len(re.findall(rf"\[Val\]   \S*{re.escape(part)} text_loss=", output)) == 3
    assert "[Warn] en: mel_loss " in output and "::en@0.2" in output and "[Warn] am:" not in output
    (metrics,) = (tmp_path / "out").glob("logs/run_*/metrics.jsonl")
    assert {"en", "am"} <= {line.get("manifest") for line in read_jsonl(metrics)}
    output = runs(train_in_process(
        "--train-manifest", f"{data}/train_am.jsonl::am", "--train-manifest", f"{data}/train_am.jsonl::en@0.1",
        "--val-manifest", f"{data}/train_am.jsonl::am", "--val-manifest", f"{data}/train_en.jsonl::en", *arguments,
        "--base-checkpoint", tmp_path / "base/latest.pth", "--learning-rate", 0.03, "--epochs", 5, "--val-interval", 20,
        "--output-dir", tmp_path / "replayed"))
    assert re.search(r"\[Warn\] en: mel_loss .* Give its manifest a larger weight, or", output)


def test_patience_ends_a_run_that_gets_no_better_and_more_patience_goes_on(data, tmp_path):
    args = ["--train-manifest", data / "train_pairs.jsonl", "--val-manifest", data / "val_pairs.jsonl", "--tokenizer",
            data / "tokenizer.model", *SETTINGS, "--output-dir", tmp_path / "out", "--val-interval", 2, "--resume",
            "auto", "--learning-rate", 1e-30, "--patience"]
    output = runs(train_in_process(*args, 3))
    assert "3 validations in a row were no better: stopped early (--patience)" in output
    assert "Training complete: epoch 2, step 8, best validation loss " in output and "at step 2" in output
    assert "Raise --patience to go on" in runs(train_in_process(*args, 3))
    assert "Training complete: epoch 3, step 12" in runs(train_in_process(*args, 5))
    runs(train_in_process(*args, 0))
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["step"] == 16
