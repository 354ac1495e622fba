"""The whole way with a folder in the released format: recordings, features, pairs, a killed run, an exported voice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_checkpoint
from fresh_process import runs, train_in_process
from released_folder import CONFIG, CONFIG_25, make_released_folder, make_released_folder_25
from test_indextts2_features import make_babble

from tools import build_pairs, export_checkpoint, preprocess, train_tokenizer
from tools._common import ToolError
from tools.indextts2_features import NAMES, read_tensors
from tools.made_with import of_checkpoint
from tools.model_folder import TIKTOKEN

KILL_AT_STEP_4 = ("import os, sys\nwrite = sys.stdout.write\n"
                  "sys.stdout.write = lambda text: (os.kill(os.getpid(), 9) if ' step=4 ' in text else None, "
                  "write(text))[1]")


@pytest.mark.parametrize("features", ["indextts2", "indextts2.5"])
def test_from_a_folder_of_recordings_to_a_voice_that_loads_strictly_with_a_kill_between(tmp_path: Path, features: str):
    is_25 = features == "indextts2.5"
    model_dir = (make_released_folder_25 if is_25 else make_released_folder)(tmp_path / "checkpoints")
    recordings, data = make_babble(tmp_path / "in", 8), tmp_path / "data"
    tokenizer, new_tokens = (model_dir / TIKTOKEN, 0) if is_25 else (tmp_path / "am.model", 360)
    base_tokens = yaml.safe_load((model_dir / "config.yaml").read_text())["gpt"]["number_text_tokens"]
    if not is_25:
        train_tokenizer.main(["--texts", str(recordings / "recordings.jsonl"), "--extend",
                              str(model_dir / "bpe.model"), "--target-size", str(base_tokens + new_tokens), "--output",
                              str(tokenizer)])
    preprocess.main(["--features", features, "--model-dir", str(model_dir), "--recordings",
                     str(recordings / "recordings.jsonl"), "--tokenizer", str(tokenizer), "--output-dir", str(data),
                     "--prompts-per-speaker", "2", "--val-share", "0.2", "--device", "cpu", "--jobs", "1"])
    build_pairs.main(["--data-dir", str(data)])
    command = ["--train-manifest", data / "train_pairs.jsonl", "--tokenizer", tokenizer, "--base-checkpoint",
               model_dir / "gpt.pth", "--emo-source", "target", "--batch-size", 2, "--grad-accumulation", 1,
               "--save-interval", 3, "--log-interval", 1, "--max-steps", 5, "--resume", "auto", "--output-dir"]
    whole = runs(train_in_process(*command, tmp_path / "whole"))
    assert ("layout of IndexTTS-2.5" if is_25 else "text tokens are new; their rows start from means") in whole
    assert train_in_process(*command, tmp_path / "run", before=KILL_AT_STEP_4)[0] == -9
    runs(train_in_process(*command, tmp_path / "run"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "run"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])

    export_checkpoint.main([str(tmp_path / "run/latest.pth"), "--model-dir", str(model_dir), "--output-dir",
                            str(tmp_path / "voice")])
    exported = read_tensors(tmp_path / "voice/gpt.pth")
    assert all(torch.equal(exported[name], other["model"][name]) for name in other["model"])
    config = yaml.safe_load((tmp_path / "voice/config.yaml").read_text())
    assert config["gpt"]["number_text_tokens"] == len(exported["text_head.bias"]) - 1 == base_tokens + new_tokens
    assert (tmp_path / "voice" / (TIKTOKEN if is_25 else "bpe.model")).read_bytes() == tokenizer.read_bytes()
    assert of_checkpoint(other).items() <= config["dataset"].items()
    assert config["version"] == (2.5 if is_25 else 2.0)
    assert f"work of the {NAMES[features]} weights by bilibili" in (tmp_path / "voice/README.md").read_text()
    refuses_what_does_not_belong_to_it(tmp_path / "run/latest.pth", model_dir, tmp_path / "bad", is_25)


def refuses_what_does_not_belong_to_it(checkpoint: Path, model_dir: Path, root: Path, is_25: bool) -> None:
    """Nothing is exported with the folder of the other model, or another tokenizer."""
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG if is_25 else CONFIG_25))
    name = "IndexTTS-2.5" if is_25 else "IndexTTS-2"
    other = root / ("other.tiktoken" if is_25 else "other.model")
    other.write_bytes((model_dir / (TIKTOKEN if is_25 else "bpe.model")).read_bytes() + (b"enp6 258\n" * is_25))
    for flags, said in ((["--model-dir", root], f"others. Give the folder of {name} that the training started from"),
                        (["--model-dir", model_dir, "--tokenizer", other], "tokenizer_sha256 is .* in --tokenizer")):
        with pytest.raises(ToolError, match=said):
            export_checkpoint.main([str(checkpoint), *map(str, flags), "--output-dir", str(root / "voice")])
    assert not (root / "voice").exists()
