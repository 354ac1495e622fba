"""Validation and best.pth: rows of every manifest, like compared with like, never a NaN."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, load_checkpoint, read_jsonl, write_manifest
from fresh_process import QUICK, data_args, errs, runs, runs_or_errs, train_in_process
from old_checkpoints import make

from tools import inspect_checkpoint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows, 5 validation rows, a tokenizer; to be spoiled."""
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


def vals(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[Val]")]


def val_records(out: Path) -> list[dict]:
    (metrics,) = out.glob("logs/run_*/metrics.jsonl")
    return [line for line in read_jsonl(metrics) if line["kind"] == "val" and "manifest" not in line]


# ---------------------------------------------------------------------------------------------------------------------
# A NaN


def test_a_validation_of_nan_is_never_the_best_and_is_beaten_by_the_next(data, tmp_path, capsys):
    """Validation rows whose loss overflows, mended between two starts."""
    out, good = tmp_path / "out", np.load(data / "val_emo.npy")
    np.save(data / "val_emo.npy", np.full_like(good, 3e38))
    args = [*data_args(data), *QUICK, "--output-dir", out, "--val-interval", 1]
    train_in_process(*args)
    assert not (out / "best.pth").exists()
    assert load_checkpoint(out / "latest.pth")["best"] is None

    inspect_checkpoint.main([str(out), "--json"])
    json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    np.save(data / "val_emo.npy", good)
    runs(train_in_process(*args, "--resume", "auto", "--max-steps", 5))
    best = load_checkpoint(out / "best.pth")["best"]
    assert math.isfinite(best["loss"]) and best["step"] >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Rows of every manifest


@pytest.fixture
def two(data: Path) -> Path:
    """A second validation manifest beside the first, of five rows more."""
    rows = [{**row, "id": f"second_{row['id']}"} for row in read_jsonl(data / "val_pairs.jsonl")]
    write_manifest(data / "second_pairs.jsonl", rows)
    return data


def test_a_capped_validation_takes_rows_of_every_manifest_and_says_how_many(two, tmp_path):
    out, second = tmp_path / "out", two / "second_pairs.jsonl"
    runs(train_in_process(*data_args(two), "--val-manifest", second, *QUICK, "--output-dir", out))
    output = runs(train_in_process(*data_args(two), "--val-manifest", second, "--output-dir", out, "--resume", "auto",
                                   "--eval-only", "--max-val-batches", 1, "--val-batch-size", 4))
    ids = [record["id"] for record in read_jsonl(out / "eval.jsonl")]
    assert len(ids) == 4 and sum(name.startswith("second_") for name in ids) == 2
    assert ids[0] != "val1" or ids[1] != "val2"  # spread over the rows, not their head
    assert "4 of 10" in output


def test_a_validation_prints_a_line_for_every_manifest_besides_the_total(two, tmp_path):
    output = runs(train_in_process(*data_args(two), "--val-manifest", two / "second_pairs.jsonl", *QUICK,
                                   "--output-dir", tmp_path / "out"))
    total = [line for line in vals(output) if re.match(r"\[Val\] epoch=0 step=3 text_loss=[\d.]+ mel_loss=", line)]
    assert len(total) == 1 and len(vals(output)) == 3
    for name in ("val_pairs", "second_pairs"):
        assert sum(name in line for line in vals(output)) == 1


def test_one_manifest_alone_has_one_line(data, tmp_path):
    assert len(vals(runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out")))) == 1


def test_the_choice_of_rows_is_the_same_in_every_validation(two, tmp_path):
    """With a learning rate of next to nothing the loss stays what it is."""
    out = tmp_path / "out"
    runs(train_in_process(*data_args(two), "--val-manifest", two / "second_pairs.jsonl", *QUICK, "--output-dir", out,
                          "--max-val-batches", 1, "--val-interval", 1, "--learning-rate", 1e-30))
    losses = [line["loss"] for line in val_records(out)]
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Like with like


def best_after(args: list, out: Path) -> dict:
    runs(train_in_process(*args, "--resume", "auto", "--max-steps", 5))
    return load_checkpoint(out / "latest.pth")["best"]


def test_a_best_of_other_loss_weights_is_measured_again_or_dropped(data, tmp_path):
    args = [*data_args(data), *QUICK, "--output-dir", tmp_path / "out"]
    runs(train_in_process(*args))
    before = load_checkpoint(tmp_path / "out" / "latest.pth")["best"]
    after = best_after([*args, "--text-loss-weight", 2, "--mel-loss-weight", 8], tmp_path / "out")
    assert after["loss"] == pytest.approx(10 * before["loss"], rel=0.1)


def test_a_best_of_other_validation_data_is_measured_again_or_dropped(data, tmp_path):
    """The first validation is easy, since its row was trained on; the second is not."""
    out = tmp_path / "out"
    one = write_manifest(data / "one_pairs.jsonl", read_jsonl(data / "train_pairs.jsonl")[:1])
    train = ["--train-manifest", one, "--val-manifest", one, "--tokenizer", data / "tokenizer.model"]
    runs(train_in_process(*train, *QUICK, "--output-dir", out, "--max-steps", 40, "--epochs", 60, "--learning-rate",
                          0.03, "--dropout", 0, "--save-interval", 1000))
    before = load_checkpoint(out / "latest.pth")["best"]["loss"]
    train[3] = data / "val_pairs.jsonl"
    runs(train_in_process(*train, "--output-dir", out, "--resume", "auto", "--max-steps", 42))
    last, after = val_records(out)[-1], load_checkpoint(out / "latest.pth")["best"]
    assert last["loss"] > before + 0.5
    assert after["loss"] > before + 0.5


def test_an_unchanged_validation_keeps_its_best(data, tmp_path):
    """After the resume a learning rate of 1 makes everything worse."""
    args = [*data_args(data), *QUICK, "--output-dir", tmp_path / "out", "--val-interval", 1, "--warmup-steps", 0]
    runs(train_in_process(*args))
    before = load_checkpoint(tmp_path / "out" / "latest.pth")["best"]
    runs(train_in_process(*args, "--resume", "auto", "--max-steps", 5, "--learning-rate", 1))
    assert val_records(tmp_path / "out")[-1]["loss"] > before["loss"]
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["best"] == before
    assert load_checkpoint(tmp_path / "out" / "best.pth")["step"] == before["step"]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


SMALL_MEMORY_IN_VALIDATION = """
import torch
cross_entropy = torch.nn.functional.cross_entropy
def limited(logits, targets, *args, **options):
    if not torch.is_grad_enabled() and len(targets) > 30:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return cross_entropy(logits, targets, *args, **options)
torch.nn.functional.cross_entropy = limited
"""


def test_a_validation_that_runs_out_of_memory_splits_its_batches(data, tmp_path):
    args = [*data_args(data), *QUICK]
    runs(train_in_process(*args, "--output-dir", tmp_path / "large"))
    output = runs(train_in_process(*args, "--output-dir", tmp_path / "small", before=SMALL_MEMORY_IN_VALIDATION))
    assert "memory" in output.lower()
    (large,), (small,) = val_records(tmp_path / "large"), val_records(tmp_path / "small")
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)


def test_a_validation_row_that_is_too_large_alone_is_an_error_with_a_remedy(data, tmp_path):
    before = SMALL_MEMORY_IN_VALIDATION.replace("> 30", "> 1")
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before), "memory", "--")


# ---------------------------------------------------------------------------------------------------------------------
# Whose validation


def test_without_val_manifest_the_one_beside_the_training_manifest_is_taken(data, tmp_path):
    """The working directory has the demo's processed_data/."""
    assert (ROOT / "processed_data" / "val_pairs.jsonl").exists()
    args = data_args(data)
    runs(train_in_process(*args[:2], *args[4:], *QUICK, "--output-dir", tmp_path / "out", cwd=ROOT))
    (manifest,) = load_checkpoint(tmp_path / "out" / "latest.pth")["manifests"]["val"]
    assert Path(manifest["path"]).samefile(data / "val_pairs.jsonl")


def test_the_demos_voice_never_judges_somebody_elses(data, tmp_path):
    """Whose features have the demo's width, so that they would fit."""
    (data / "val_pairs.jsonl").unlink()
    demo = yaml.safe_load((ROOT / "processed_data" / "config.yaml").read_text())["gpt"]
    width = demo["model_dim"]
    (data / "config.yaml").write_text(yaml.safe_dump({"gpt": {**demo, "layers": 1}}))
    np.save(data / "train_condition.npy", np.zeros((32 * 13, width), np.float32))
    np.save(data / "train_emo.npy", np.zeros((13, width), np.float32))
    args = ["--train-manifest", data / "train_pairs.jsonl", "--output-dir", tmp_path / "out", "--batch-size", 4,
            "--grad-accumulation", 1, "--max-steps", 1]
    done = train_in_process(*args, cwd=ROOT)
    if runs_or_errs(done, "--val-manifest"):
        assert not vals(done[1]) and not (tmp_path / "out" / "best.pth").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Codecs that do not belong together


def made_with(data: Path, codec: str) -> Path:
    config = yaml.safe_load((data / "config.yaml").read_text())
    (data / "config.yaml").write_text(yaml.safe_dump({**config, "dataset": {"codec_sha256": codec * 64}}))
    return data


def test_training_and_validation_data_of_two_codecs_are_refused(data, tmp_path):
    made_with(data, "a")
    other = made_with(shutil.copytree(make.HERE / "data", tmp_path / "other"), "b")
    for extra in (["--val-manifest", other / "val_pairs.jsonl"], ["--train-manifest", other / "train_pairs.jsonl"]):
        errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", *extra), "codec",
             "aaaaaaaa", "bbbbbbbb")


def test_another_codec_on_resume_is_refused(data, tmp_path):
    made_with(data, "a")
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    made_with(data, "b")
    errs(train_in_process("--output-dir", tmp_path / "out", "--resume", "auto", "--max-steps", 5), "codec", "aaaaaaaa",
         "bbbbbbbb")


def test_a_base_checkpoint_made_for_another_codec_is_refused(data, tmp_path):
    made_with(data, "a")
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    made_with(data, "b")
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "new", "--base-checkpoint",
                          tmp_path / "out" / "latest.pth"), "codec")
