"""--emo-source: a pair takes the emo_vec of its prompt, of its target, or of one of them by seed, epoch and row."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    GPT,
    call_trainer,
    data_args,
    load_checkpoint,
    make_dataset,
    mistake,
    read_jsonl,
    resumable_state,
    trainer,
    write_manifest,
)

MODEL = trainer.model_config_from(GPT, "test", vocab_size=50)
SPLITS = ("train", "val")


def change_rows(data: Path, change: Any) -> None:
    for name in SPLITS:
        path = data / f"{name}_pairs.jsonl"
        write_manifest(path, [change(row, i) for i, row in enumerate(read_jsonl(path))])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with an emo_vec for each target, too. Read only."""
    data = make_dataset(tmp_path_factory.mktemp("both") / "data")
    rng = np.random.default_rng(8)
    np.save(data / "targets.npy", rng.normal(0, 0.1, (100, GPT["model_dim"])).astype(np.float32))
    change_rows(data, lambda row, i: row | {"target_emo_vec_path": "targets.npy", "target_emo_vec_start": 2 * i})
    return data


def with_targets_alone(both: Path, folder: Path) -> Path:
    shutil.copytree(both, folder)
    change_rows(folder, lambda row, i: {key: value for key, value in row.items()
                                        if not key.startswith("prompt_emo_vec")})
    return folder


def train(data: Path, out: Path, *flags: object) -> str:
    return call_trainer(*data_args(data), "--output-dir", out, "--batch-size", 4, "--grad-accumulation", 2, "--epochs",
                        3, "--val-interval", 3, *flags)


def samples(data: Path, emo_source: str, items: np.ndarray) -> list[np.ndarray]:
    dataset = trainer.ManifestDataset([str(data / "train_pairs.jsonl")], MODEL, emo_source)
    return [dataset[item].emo_vec for item in items.tolist()]


def test_prompt_takes_the_prompts_target_the_targets_and_mixed_about_half_of_each(both: Path):
    rows = np.arange(41)
    of_prompts, of_targets = np.load(both / "train_emo_vec.npy"), np.load(both / "targets.npy")[:82:2]
    assert np.array_equal(samples(both, "prompt", rows), of_prompts)
    assert np.array_equal(samples(both, "target", rows), of_targets)
    config = trainer.TrainConfig(emo_source="mixed", seed=3)
    items = trainer.draw_emo(rows, config, 0)
    assert 10 < (items < 0).sum() < 31
    assert np.array_equal(samples(both, "mixed", items), np.where((items < 0)[:, None], of_targets, of_prompts))
    dataset = trainer.ManifestDataset([str(both / "train_pairs.jsonl")], MODEL, "mixed")
    assert [dataset[item].row for item in items.tolist()] == rows.tolist()


def test_the_draw_is_a_function_of_seed_epoch_and_row_alone():
    def draw(rows: np.ndarray, seed: int, epoch: int) -> list[int]:
        return trainer.draw_emo(rows, trainer.TrainConfig(emo_source="mixed", seed=seed), epoch).tolist()

    whole = draw(np.arange(1000), 1, 0)
    np.random.seed(99)
    assert draw(np.arange(1000), 1, 0) == whole and draw(np.arange(300), 1, 0) == whole[:300]
    assert draw(np.array([5, 900, 7]), 1, 0) == [whole[5], whole[900], whole[7]]
    assert len({tuple(draw(np.arange(1000), seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    plain = trainer.TrainConfig(seed=1)
    assert trainer.draw_emo(np.arange(5), plain, 0).tolist() == [0, 1, 2, 3, 4]


def test_target_trains_the_bits_that_rows_with_the_targets_alone_train(both: Path, tmp_path: Path):
    train(both, tmp_path / "a", "--emo-source", "target", "--max-steps", 3)
    train(with_targets_alone(both, tmp_path / "data"), tmp_path / "b", "--max-steps", 3)
    train(both, tmp_path / "c", "--max-steps", 3)
    a, b, c = (load_checkpoint(tmp_path / name / "latest.pth") for name in "abc")
    assert a["config"]["emo_source"] == "target" and c["config"]["emo_source"] == "prompt"
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    assert a["last_val"] == b["last_val"] != c["last_val"]


def test_a_mixed_run_that_was_stopped_goes_on_bit_for_bit_with_the_same_validation(both: Path, tmp_path: Path):
    train(both, tmp_path / "whole", "--emo-source", "mixed", "--val-batch-size", 2, "--save-interval", 4,
          "--keep-checkpoints", 0)
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/model_step4.pth", tmp_path / "parts")
    printed = train(both, tmp_path / "parts", "--resume", "auto")
    assert "Epoch: 0, Step: 4" in printed and "emo_source" not in printed
    whole, parts = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "parts"))
    assert resumable_state(whole) == resumable_state(parts) and whole["step"] == 18


def test_a_changed_source_is_said_on_resume_and_its_validation_is_not_compared(both: Path, tmp_path: Path):
    train(both, tmp_path / "out", "--max-steps", 3)
    printed = train(both, tmp_path / "out", "--resume", "auto", "--max-steps", 6, "--emo-source", "target")
    assert "[Info] emo_source: prompt -> target" in printed and "[Warn] Validation changed" in printed
    assert "emo_source" not in train(both, tmp_path / "out", "--resume", "auto", "--max-steps", 8)
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["config"]["emo_source"] == "target"


@pytest.mark.parametrize(("source", "place"), [("target", "val_pairs.jsonl:1: "), ("mixed", "val_pairs.jsonl: ")])
def test_a_manifest_without_emo_vecs_of_targets_is_one_error(tiny: Path, tmp_path: Path, source: str, place: str):
    message = mistake(*data_args(tiny), "--output-dir", tmp_path / "out", "--emo-source", source)
    assert place in message and "no target_emo_vec_path, which --emo-source target and mixed need" in message
    assert "take --emo-source prompt" in message


def test_mixed_takes_the_one_emo_vec_that_a_row_has(both: Path, tmp_path: Path):
    """As tools.build_pairs --emo-source mixed leaves them."""
    data = tmp_path / "data"
    shutil.copytree(both, data)
    change_rows(data, lambda row, i: {key: value for key, value in row.items()
                                      if not key.startswith(("prompt", "target")[i % 2] + "_emo_vec")})
    rows = np.arange(41)
    assert np.array_equal(samples(data, "mixed", rows), samples(data, "mixed", ~rows))
    assert np.array_equal(samples(data, "mixed", rows), samples(data, "prompt", rows))
