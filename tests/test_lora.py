"""LoRA: small checkpoints that need their base, exact resume, and a merge that changes no loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call_trainer, load_checkpoint, read_jsonl, trainer
from fresh_process import SETTINGS, data_args, errs, runs, train_in_process
from old_checkpoints import make

from tools import export_checkpoint, generation, inspect_checkpoint, synthesize
from tools._common import ToolError

KILL_AT_STEP_5 = ("import os, sys\nwrite = sys.stdout.write\n"
                  "sys.stdout.write = lambda text: (os.kill(os.getpid(), 9) if ' step=5 ' in text else None, "
                  "write(text))[1]")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


@pytest.fixture
def base(data: Path, tmp_path: Path) -> Path:
    """Weights in the released form, with a module that training never touches."""
    runs(train_in_process(*data_args(data), *SETTINGS, "--max-steps", 3, "--output-dir", tmp_path / "first"))
    tensors = load_checkpoint(tmp_path / "first" / "latest.pth")["model"]
    torch.save({"emo_layer.weight": torch.ones(8, 8), **tensors}, tmp_path / "base.pth")
    return tmp_path / "base.pth"


def lora(data: Path, base: Path, *flags: object) -> list[object]:
    return [*data_args(data), *SETTINGS, "--max-steps", 7, "--base-checkpoint", base, "--lora-rank", 4,
            "--lora-dropout", 0.1, "--learning-rate", 0.01, "--resume", "auto", *flags, "--output-dir"]


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_a_lora_run_that_was_killed_goes_on_bit_for_bit(data, base, tmp_path, precision):
    args = lora(data, base, "--amp", precision)
    runs(train_in_process(*args, tmp_path / "whole"))
    assert train_in_process(*args, tmp_path / "killed", before=KILL_AT_STEP_5)[0] == -9
    runs(train_in_process(*args, tmp_path / "killed"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "killed"))
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_its_checkpoint_holds_the_small_part_and_what_it_adds_to(data, base, tmp_path, capsys):
    runs(train_in_process(*lora(data, base, "--lora-targets", "attn.c_attn", "mlp.c_fc"), tmp_path / "out"))
    checkpoint = load_checkpoint(tmp_path / "out" / "latest.pth")
    assert {*checkpoint["model"]} == {f"gpt.h.{i}.{layer}.lora.{part}" for i in range(2) for part in "AB"
                                      for layer in ("attn.c_attn", "mlp.c_fc")}
    assert checkpoint["lora_base"]["path"] == str(base) and len(checkpoint["lora_base"]["sha256"]) == 64
    names = [name for group in checkpoint["optimizer"]["param_groups"] for name in group["param_names"]]
    assert all(".lora." in name for name in names)
    inspect_checkpoint.main([str(tmp_path / "out")])
    assert f"LoRA of rank 4 on {base}," in capsys.readouterr().out


def test_the_base_stays_frozen_whatever_the_rate_of_its_names(data, base, tmp_path):
    output = runs(train_in_process(*lora(data, base, "--lr-scale", "gpt.*=2"), tmp_path / "out"))
    assert "Learning rate x 2: " in output and "Learning rate x 1: " not in output
    assert all(".lora." in name for name in load_checkpoint(tmp_path / "out" / "latest.pth")["model"])


def test_the_start_says_how_little_disk_its_checkpoints_take(data, base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * base.stat().st_size))
    args = ["--base-checkpoint", base, "--max-steps", 1, "--output-dir"]
    for name, level, flags in (("whole", "[Warn]", []), ("lora", "[Info]", ["--lora-rank", 1])):
        output = call_trainer(*data_args(data), *SETTINGS, *args, tmp_path / name, *flags)
        assert f"{level} Disk: " in output


def test_a_checkpoint_of_it_is_no_base(data, base, tmp_path):
    runs(train_in_process(*lora(data, base), tmp_path / "out"))
    errs(train_in_process(*data_args(data), *SETTINGS, "--base-checkpoint", tmp_path / "out" / "latest.pth",
                          "--output-dir", tmp_path / "next"), "holds what LoRA adds", "tools.export_checkpoint")


def test_merged_weights_have_the_losses_of_the_run_and_carry_what_the_base_carried(data, base, tmp_path):
    runs(train_in_process(*lora(data, base), tmp_path / "out"))
    latest = tmp_path / "out" / "latest.pth"
    merged = generation.weights_of(load_checkpoint(latest))
    assert merged.keys() == torch.load(base).keys() and torch.equal(merged["emo_layer.weight"], torch.ones(8, 8))
    torch.save(merged, tmp_path / "merged.pth")
    weights = {"out": ["--resume", latest], "merged": ["--base-checkpoint", tmp_path / "merged.pth"],
               "base": ["--base-checkpoint", base]}
    losses = {}
    for name, flags in weights.items():
        runs(train_in_process(*data_args(data), "--eval-only", *flags, "--output-dir", tmp_path / name))
        losses[name] = torch.tensor([loss for row in read_jsonl(tmp_path / name / "eval.jsonl")
                                     for loss in row["text_token_losses"] + row["mel_token_losses"]])
    torch.testing.assert_close(losses["merged"], losses["out"], atol=1e-5, rtol=0)
    assert (losses["base"] - losses["out"]).abs().max() > 1e-3


def test_alpha_scales_what_is_added(data, base, tmp_path):
    """Trained alike but for the scale: B's first step is the learning rate, whatever the scale."""
    changes = []
    for alpha in (4, 12):
        args = lora(data, base, "--lora-alpha", alpha, "--lora-dropout", 0, "--warmup-steps", 0)
        args[args.index("--max-steps") + 1] = 1
        runs(train_in_process(*args, tmp_path / f"out{alpha}"))
        merged = generation.weights_of(load_checkpoint(tmp_path / f"out{alpha}" / "latest.pth"))
        changes.append(merged["gpt.h.1.mlp.c_proj.weight"] - torch.load(base)["gpt.h.1.mlp.c_proj.weight"])
    assert changes[1].abs().mean().item() == pytest.approx(3 * changes[0].abs().mean().item(), rel=0.05)


def test_dropout_changes_what_is_learned(data, base, tmp_path):
    learned = []
    for dropout in (0, 0.5):
        runs(train_in_process(*lora(data, base, "--lora-dropout", dropout), tmp_path / f"out{dropout}"))
        learned.append(load_checkpoint(tmp_path / f"out{dropout}" / "latest.pth")["model"]["gpt.h.0.mlp.c_fc.lora.B"])
    assert not torch.equal(*learned)


def test_without_its_base_it_says_which_file_is_needed_and_goes_on_where_that_is_now(data, base, tmp_path):
    runs(train_in_process(*lora(data, base), tmp_path / "whole"))
    short = lora(data, base)
    short[short.index("--max-steps") + 1] = 4
    runs(train_in_process(*short, tmp_path / "out", "--save-interval", 4, "--epochs", 4))
    moved = base.rename(tmp_path / "moved.pth")
    resume = ["--resume", "auto", "--max-steps", 7, "--output-dir", tmp_path / "out"]
    message = errs(train_in_process(*resume), "base.pth", "No such file", "--base-checkpoint")
    assert "Traceback" not in message
    errs(train_in_process(*resume, "--base-checkpoint", tmp_path / "first" / "latest.pth"),
         "is not the file that this LoRA was trained on")
    runs(train_in_process(*resume, "--base-checkpoint", moved))
    with pytest.raises(ToolError, match=r"base\.pth: No such file"):
        generation.weights_of(load_checkpoint(tmp_path / "whole" / "latest.pth"))
    generation.weights_of(load_checkpoint(tmp_path / "whole" / "latest.pth"), moved)


def test_the_embeddings_of_a_new_vocabulary_are_trained_in_full(data, base, tmp_path):
    tensors = torch.load(base)
    for name in trainer.VOCAB_TENSORS:
        tensors[name] = tensors[name][:-4].clone()
    torch.save(tensors, base)
    args = lora(data, base)
    runs(train_in_process(*args, tmp_path / "whole"))
    assert train_in_process(*args, tmp_path / "killed", before=KILL_AT_STEP_5)[0] == -9
    runs(train_in_process(*args, tmp_path / "killed"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth")["model"] for name in ("whole", "killed"))
    assert {name for name in one if ".lora." not in name} == {*trainer.VOCAB_TENSORS}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["text_head.bias"][: len(tensors["text_head.bias"])], tensors["text_head.bias"])


@pytest.mark.parametrize("flags,words", [
    (["--lora-rank", 4], ["--lora-rank goes with --base-checkpoint"]),
    (["--lora-alpha", 8], ["go with --lora-rank"]),
    (["--lora-rank", -1], ["--lora-rank -1", "at least 0"]),
    (["--lora-rank", 4, "--lora-targets", "attn.q"], ["attn.q"]),
])
def test_a_lora_that_cannot_be_meant_is_one_error(data, tmp_path, flags, words):
    errs(train_in_process(*data_args(data), *SETTINGS, *flags, "--output-dir", tmp_path / "out"), *words)


def test_another_rank_on_resume_is_refused(data, base, tmp_path):
    runs(train_in_process(*lora(data, base), tmp_path / "out"))
    errs(train_in_process(*data_args(data), "--resume", "auto", "--max-steps", 9, "--lora-rank", 2, "--output-dir",
                          tmp_path / "out"), "another shape", "--lora-rank")


def test_an_export_is_merged_and_asks_for_the_base_where_that_is_gone(data, base, tmp_path):
    runs(train_in_process(*lora(data, base), tmp_path / "out"))
    latest, exported = tmp_path / "out" / "latest.pth", tmp_path / "gpt_merged.pth"
    export_checkpoint.main([str(latest), "--output", str(exported)])
    merged, found = generation.weights_of(load_checkpoint(latest)), torch.load(exported, weights_only=True)["model"]
    assert [*found] == [*merged] and all(torch.equal(found[name], merged[name]) for name in merged)
    assert trainer.read_base_checkpoint(exported)[0].keys() == torch.load(base).keys()
    inspect_checkpoint.main([str(latest)])
    moved, again = base.rename(tmp_path / "moved.pth"), tmp_path / "again.pth"
    with pytest.raises(ToolError, match=r"base\.pth: No such file.*--base-checkpoint"):
        export_checkpoint.main([str(latest), "--output", str(again)])
    export_checkpoint.main([str(latest), "--output", str(again), "--base-checkpoint", str(moved)])
    assert again.read_bytes() == exported.read_bytes()
    model, _ = generation.load_model(latest, moved)
    assert torch.equal(model.gpt.h[1].mlp.c_fc.weight, merged["gpt.h.1.mlp.c_fc.weight"].double())
    speak = ["--checkpoint", str(latest), "--codec", str(ROOT / "processed_data/speech_codec.pt"), "--prompt", "a.wav",
             "--text", "a", "--output", "a.wav", "--base-checkpoint"]
    with pytest.raises(ToolError, match="is not the file that this LoRA was trained on.*--base-checkpoint"):
        synthesize.main([*speak, str(exported)])
    speak[1] = str(tmp_path / "first/latest.pth")
    with pytest.raises(ToolError, match=r"--base-checkpoint .*moved\.pth: the checkpoint is no LoRA.* Leave it out"):
        synthesize.main([*speak, str(moved)])
