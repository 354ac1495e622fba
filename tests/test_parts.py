"""Parts of the model that are frozen or learn at another rate: --freeze and --lr-scale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_checkpoint, trainer
from fresh_process import SETTINGS, data_args, errs, runs, train_in_process
from old_checkpoints import make

NAMES = ["text_embedding.weight", "gpt.h.0.ln_1.weight", "gpt.h.0.attn.c_attn.weight", "gpt.h.1.ln_1.weight",
         "gpt.h.11.ln_1.weight", "text_head.weight", "text_head.bias", "mel_head.weight"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


@pytest.fixture
def base(data: Path, tmp_path: Path) -> Path:
    """Weights whose vocabulary has four tokens less than the tokenizer."""
    runs(train_in_process(*data_args(data), *SETTINGS, "--max-steps", 1, "--output-dir", tmp_path / "first"))
    tensors = load_checkpoint(tmp_path / "first" / "latest.pth")["model"]
    for name in trainer.VOCAB_TENSORS:
        tensors[name] = tensors[name][:-4].clone()
    torch.save(tensors, tmp_path / "base.pth")
    return tmp_path / "base.pth"


def factors(*, freeze=(), lr_scale=(), base_vocab: int = 5, tokens: int = 0):
    config = trainer.TrainConfig(freeze=list(freeze), lr_scale=list(lr_scale))
    return trainer.lr_factors(NAMES, config, base_vocab, tokens)


def test_a_pattern_or_a_set_names_the_tensors_that_one_expects():
    changed, _ = factors(freeze=["first:1", "mel_head*"], lr_scale=["gpt.h.1.*=0.5"])
    assert {name: factor for name, factor in changed.items() if factor != 1} == {
        "gpt.h.0.ln_1.weight": 0, "gpt.h.0.attn.c_attn.weight": 0, "mel_head.weight": 0, "gpt.h.1.ln_1.weight": 0.5}
    changed, base_text = factors(lr_scale=["new-text=10"])
    assert base_text == 0.1 and all(changed[name] == 10 for name in trainer.VOCAB_TENSORS)
    assert factors(freeze=["base-text"])[1] == 0


@pytest.mark.parametrize("wrong, said", [
    ({"freeze": ["new-text"]}, "--freeze new-text: rows of new tokens know nothing yet"),
    ({"lr_scale": ["new-text=10"], "tokens": 5}, "--lr-scale new-text: the base checkpoint has every token"),
    ({"lr_scale": ["mel_*"]}, "--lr-scale mel_.: give PATTERN=FACTOR"),
    ({"lr_scale": ["=3"]}, "--lr-scale 3: give PATTERN=FACTOR"),
])
def test_a_part_that_cannot_be_meant_is_named_as_it_was_typed(wrong, said):
    with pytest.raises(trainer.UserError, match=said):
        factors(**wrong)


def test_the_table_has_no_line_for_what_is_not_there(data, tmp_path):
    output = runs(train_in_process(*data_args(data), *SETTINGS, "--max-steps", 1, "--lr-scale", "mel_*=2",
                                   "--output-dir", tmp_path / "out"))
    assert "Learning rate x 2: " in output and "Learning rate x 0: " not in output


def test_frozen_tensors_stay_bit_for_bit_and_the_others_learn(data, base, tmp_path):
    output = runs(train_in_process(*data_args(data), *SETTINGS, "--max-steps", 3, "--base-checkpoint", base,
                                   "--freeze", "first:1", "--freeze", "base-text", "--output-dir", tmp_path / "out"))
    assert "Learning rate x 0: " in output and "frozen" in output
    before, after = torch.load(base), load_checkpoint(tmp_path / "out" / "latest.pth")["model"]
    for name, tensor in before.items():
        rows = len(tensor) if name in trainer.VOCAB_TENSORS else None
        is_frozen = name.startswith("gpt.h.0.") or rows is not None
        rows = rows and rows - 1  # the base's last row is none of its tokens
        assert torch.equal(after[name][:rows], tensor[:rows]) == is_frozen, name


def test_the_rows_of_new_tokens_learn_as_many_times_faster_as_was_asked_for(data, base, tmp_path):
    """Adam's first step is the learning rate itself, whatever the gradient."""
    moved = {}
    for name, flags in (("plain", []), ("scaled", ["--lr-scale", "new-text=10"])):
        runs(train_in_process(*data_args(data), *SETTINGS, "--max-steps", 1, "--base-checkpoint", base, *flags,
                              "--warmup-steps", 1, "--learning-rate", 1e-4, "--weight-decay", 0, "--output-dir",
                              tmp_path / name))
        runs(train_in_process(*data_args(data), *SETTINGS, "--max-steps", 1, "--base-checkpoint", base, *flags,
                              "--warmup-steps", 1, "--learning-rate", 1e-30, "--weight-decay", 0, "--output-dir",
                              tmp_path / f"{name}_start"))
        one, start = (load_checkpoint(tmp_path / folder / "latest.pth")["model"]["text_head.bias"]
                      for folder in (name, f"{name}_start"))
        moved[name] = (one - start).abs()
    known = len(torch.load(base)["text_head.bias"]) - 1
    assert torch.allclose(moved["scaled"][:known], moved["plain"][:known], rtol=1e-3)
    assert torch.allclose(moved["scaled"][known:], 10 * moved["plain"][known:], rtol=1e-3)


@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_a_run_with_frozen_and_scaled_parts_that_was_killed_goes_on_bit_for_bit(data, base, tmp_path, precision):
    args = [*data_args(data), *SETTINGS, "--max-steps", 7, "--base-checkpoint", base, "--amp", precision, "--freeze",
            "gpt.h.0.mlp.*", "--lr-scale", "new-text=3", "--lr-scale", "mel_*=0.5", "--resume", "auto", "--output-dir"]
    runs(train_in_process(*args, tmp_path / "whole"))
    kill = ("import os, signal, sys\nwrite = sys.stdout.write\n"
            "sys.stdout.write = lambda text: (os.kill(os.getpid(), 9) if ' step=5 ' in text else None, write(text))[1]")
    assert train_in_process(*args, tmp_path / "killed", before=kill)[0] == -9
    runs(train_in_process(*args, tmp_path / "killed"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "killed"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_what_was_frozen_may_be_trained_later_with_the_moments_that_are_known(data, base, tmp_path):
    args = [*data_args(data), *SETTINGS, "--base-checkpoint", base, "--output-dir", tmp_path / "out", "--resume",
            "auto"]
    runs(train_in_process(*args, "--max-steps", 2, "--freeze", "gpt.h.*"))
    moments = load_checkpoint(tmp_path / "out" / "latest.pth")["optimizer"]
    assert not [name for group in moments["param_groups"] for name in group["param_names"] if name.startswith("gpt.h.")]
    output = runs(train_in_process(*args, "--max-steps", 4, "--freeze", "first:1"))
    assert "[Info] freeze: ['gpt.h.*'] -> ['first:1']" in output
    after = load_checkpoint(tmp_path / "out" / "latest.pth")["optimizer"]
    steps = {name: after["state"][number]["step"].item() for group in after["param_groups"]
             for number, name in zip(group["params"], group["param_names"], strict=True)}
    assert steps["gpt.h.1.ln_1.weight"] == 2 and steps["mel_head.weight"] == 4


@pytest.mark.parametrize("flags,words", [
    (["--freeze", "*"], ["leaves nothing to train"]),
    (["--freeze", "gpt.blocks.*"], ["--freeze gpt.blocks.*", "no tensor has such a name", "first:N"]),
    (["--freeze", "base-text"], ["--freeze base-text", "--base-checkpoint"]),
    (["--lr-scale", "mel_head.*"], ["--lr-scale", "PATTERN=FACTOR"]),
    (["--lr-scale", "mel_head.*=0"], ["above 0"]),
    (["--lr-scale", "mel_head.*=nan"], ["above 0"]),
    (["--lr-scale", "mel_head.*=-3"], ["above 0"]),
])
def test_a_part_that_cannot_be_meant_is_one_error(data, tmp_path, flags, words):
    errs(train_in_process(*data_args(data), *SETTINGS, *flags, "--output-dir", tmp_path / "out"), *words)
