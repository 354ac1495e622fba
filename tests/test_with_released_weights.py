"""The whole way with a folder in the released format: recordings, features, pairs, a killed run, an exported voice."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from conftest import load_checkpoint
from fresh_process import runs, train_in_process
from released_folder import make_released_folder
from test_indextts2_features import make_babble

from tools import build_pairs, export_checkpoint, preprocess, train_tokenizer
from tools.indextts2_features import read_tensors
from tools.made_with import of_checkpoint

KILL_AT_STEP_4 = ("import os, sys\nwrite = sys.stdout.write\n"
                  "sys.stdout.write = lambda text: (os.kill(os.getpid(), 9) if ' step=4 ' in text else None, "
                  "write(text))[1]")


def test_from_a_folder_of_recordings_to_a_voice_that_loads_strictly_with_a_kill_between(tmp_path: Path):
    model_dir = make_released_folder(tmp_path / "checkpoints")
    recordings, data = make_babble(tmp_path / "in", 8), tmp_path / "data"
    tokenizer = tmp_path / "am.model"
    base_pieces = yaml.safe_load((model_dir / "config.yaml").read_text())["gpt"]["number_text_tokens"]
    train_tokenizer.main(["--texts", str(recordings / "recordings.jsonl"), "--extend", str(model_dir / "bpe.model"),
                          "--target-size", str(base_pieces + 360), "--output", str(tokenizer)])
    preprocess.main(["--features", "indextts2", "--model-dir", str(model_dir), "--recordings",
                     str(recordings / "recordings.jsonl"), "--tokenizer", str(tokenizer), "--output-dir", str(data),
                     "--prompts-per-speaker", "2", "--val-share", "0.2", "--device", "cpu", "--jobs", "1"])
    build_pairs.main(["--data-dir", str(data)])
    command = ["--train-manifest", data / "train_pairs.jsonl", "--tokenizer", tokenizer, "--base-checkpoint",
               model_dir / "gpt.pth", "--emo-source", "target", "--batch-size", 2, "--grad-accumulation", 1,
               "--save-interval", 3, "--log-interval", 1, "--max-steps", 5, "--resume", "auto", "--output-dir"]
    whole = runs(train_in_process(*command, tmp_path / "whole"))
    assert "text tokens are new; their rows start from means" in whole
    assert train_in_process(*command, tmp_path / "run", before=KILL_AT_STEP_4)[0] == -9
    runs(train_in_process(*command, tmp_path / "run"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "run"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])

    export_checkpoint.main([str(tmp_path / "run/latest.pth"), "--model-dir", str(model_dir), "--output-dir",
                            str(tmp_path / "voice")])
    exported = read_tensors(tmp_path / "voice/gpt.pth")
    assert all(torch.equal(exported[name], other["model"][name]) for name in other["model"])
    config = yaml.safe_load((tmp_path / "voice/config.yaml").read_text())
    assert config["gpt"]["number_text_tokens"] == len(exported["text_head.bias"]) - 1 == base_pieces + 360
    assert (tmp_path / "voice/bpe.model").read_bytes() == tokenizer.read_bytes()
    assert of_checkpoint(other).items() <= config["dataset"].items()
