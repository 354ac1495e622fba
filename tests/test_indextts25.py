"""IndexTTS-2.5's layout: one speaker row, language rows, tiktoken texts; and what does not belong to it is refused."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_checkpoint, read_jsonl, trainer, write_manifest
from fresh_process import SETTINGS, data_args, errs, runs, train_in_process
from old_checkpoints import make

GPT25 = {"model_dim": 32, "layers": 2, "heads": 2, "max_text_tokens": 30, "max_mel_tokens": 60,
         "number_text_tokens": 50, "number_mel_codes": 66, "start_mel_token": 64, "stop_mel_token": 65,
         "start_text_token": 0, "stop_text_token": 1, "languages": 107}
CONFIG25 = trainer.model_config_from(GPT25, "test")


def weights_of() -> dict[str, torch.Tensor]:
    """Random weights, large enough for every part to matter, and the same under every version of torch."""
    rng = np.random.default_rng(25)
    return {name: torch.from_numpy(rng.normal(0, 0.3, tensor.shape).astype(np.float32))
            for name, tensor in trainer.UnifiedVoiceGPT(CONFIG25).state_dict().items()}


def samples_of() -> list[trainer.Sample]:
    rng, samples = np.random.default_rng(5), []
    for row, (t, c, language) in enumerate([(3, 20, "am"), (12, 5, "en"), (1, 1, "common"), (20, 31, "yue")]):
        samples.append(trainer.Sample(rng.integers(2, 50, t), rng.integers(0, 64, c),
                                      rng.normal(0, 1, (1, 192)).astype(np.float32),
                                      rng.normal(0, 1, 32).astype(np.float32), row, trainer.LANGUAGES.index(language)))
    return samples


def test_per_token_losses_equal_the_public_classs():
    """golden_indextts25.json holds what indextts.gpt.model_v2_5.UnifiedVoice of index-tts (commit ee40fa7) made of
    these weights and samples, one at a time: its embeddings, language row and get_logits, cross entropies."""
    golden = json.loads((ROOT / "tests" / "golden_indextts25.json").read_text())
    model = trainer.UnifiedVoiceGPT(CONFIG25)
    model.load_state_dict(weights_of())
    with torch.no_grad():
        text, mel, _ = trainer.token_losses(model.eval(), trainer.collate_packed(samples_of(), CONFIG25))
    torch.testing.assert_close(text, torch.tensor(sum((sample["text"] for sample in golden), [])), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(mel, torch.tensor(sum((sample["codes"] for sample in golden), [])), atol=1e-5, rtol=1e-6)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training and 5 validation rows in 2.5's layout: a speaker vector of 192 values instead of 32 rows."""
    folder, rng = shutil.copytree(make.HERE / "data", tmp_path / "data"), np.random.default_rng(3)
    for name in ("train", "val"):
        rows = read_jsonl(folder / f"{name}_pairs.jsonl")
        np.save(folder / f"{name}_condition.npy", rng.normal(0, 1, (len(rows), 192)).astype(np.float32))
        write_manifest(folder / f"{name}_pairs.jsonl", [
            {**row, "target_language": "am", "prompt_condition_start": row["prompt_condition_start"] // 32,
             "prompt_condition_len": 1} for row in rows])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "version": 2.5}))
    return folder


def write_tiktoken(path: Path, ranks: int) -> Path:
    path.write_bytes(b"".join(base64.b64encode(bytes([65 + i])) + b" %d\n" % i for i in range(ranks)))
    return path


def test_a_run_in_25s_layout_says_so_and_goes_on_bit_for_bit_after_a_kill(data, tmp_path):
    args = [*data_args(data), *SETTINGS, "--max-steps", 7, "--resume", "auto", "--output-dir"]
    whole = runs(train_in_process(*args, tmp_path / "whole"))
    assert "[Info] Model: 2 layers x 8, " in whole and "layout of IndexTTS-2.5" in whole
    kill = ("import os, sys\nwrite = sys.stdout.write\n"
            "sys.stdout.write = lambda text: (os.kill(os.getpid(), 9) if ' step=5 ' in text else None, write(text))[1]")
    assert train_in_process(*args, tmp_path / "killed", before=kill)[0] == -9
    runs(train_in_process(*args, tmp_path / "killed"))
    one, other = (load_checkpoint(tmp_path / name / "latest.pth")["model"] for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["lang_embedding.weight"].shape == (107, 8) and "speed_emb.weight" not in one
    assert [*one][:3] == ["spk_emb_proj.weight", "spk_emb_proj.bias", "text_embedding.weight"]


def test_the_language_behind_a_manifest_decides_which_language_row_is_trained(data, tmp_path):
    args = [*SETTINGS, "--max-steps", 2, "--tokenizer", data / "tokenizer.model", "--val-manifest",
            data / "val_pairs.jsonl", "--learning-rate", 0.01, "--warmup-steps", 0]
    states = []
    for name, suffix in (("am", ""), ("yue", "::YUE")):
        runs(train_in_process("--train-manifest", f"{data}/train_pairs.jsonl{suffix}", *args, "--output-dir",
                              tmp_path / name))
        states.append(load_checkpoint(tmp_path / name / "latest.pth")["model"]["lang_embedding.weight"])
    moved = (states[0] != states[1]).any(1).nonzero().flatten().tolist()
    assert moved == [75, trainer.LANGUAGES.index("yue")]


@pytest.mark.parametrize("language", ["klingon", ""])
def test_a_language_that_25_does_not_know_is_one_error_at_once(data, tmp_path, language):
    rows = read_jsonl(data / "train_pairs.jsonl")
    rows[6]["target_language"] = language
    write_manifest(data / "train_pairs.jsonl", rows)
    errs(train_in_process(*data_args(data), *SETTINGS, "--output-dir", tmp_path / "out"), "train_pairs.jsonl:7",
         f"no language {language!r}", "PATH::am")


def test_weights_of_one_layout_with_the_config_of_the_other_are_refused_by_name(data, tmp_path):
    two = make.HERE / "data"
    for folder, name in ((two, "two"), (data, "two_and_a_half")):
        runs(train_in_process(*data_args(folder), *SETTINGS, "--max-steps", 1, "--output-dir", tmp_path / name))
    errs(train_in_process(*data_args(data), *SETTINGS, "--base-checkpoint", tmp_path / "two/latest.pth", "--output-dir",
                          tmp_path / "out"), "two/latest.pth is of IndexTTS2, but --config of IndexTTS-2.5")
    errs(train_in_process(*data_args(two), *SETTINGS, "--base-checkpoint", tmp_path / "two_and_a_half/latest.pth",
                          "--output-dir", tmp_path / "out"), "is of IndexTTS-2.5, but --config of IndexTTS2")
    message = errs(train_in_process(*data_args(data), *SETTINGS, "--config", two / "config.yaml", "--output-dir",
                                    tmp_path / "out"), "condition", "the model needs [32, 8]")
    assert "train" in message or "val" in message


def test_the_tiktoken_file_of_25_is_taken_and_another_one_is_refused(data, tmp_path):
    config = yaml.safe_load((data / "config.yaml").read_text())
    config["gpt"]["number_text_tokens"] = 30 + trainer.TIKTOKEN_SPECIALS
    (data / "config.yaml").write_text(yaml.safe_dump(config))
    args = [*data_args(data)[:4], *SETTINGS, "--max-steps", 2, "--output-dir", tmp_path / "out", "--tokenizer"]
    for ranks, name in ((29, "other.tiktoken"), (30, "multilingual.tiktoken")):
        write_tiktoken(data / name, ranks)
    errs(train_in_process(*args, data / "other.tiktoken"), "1702 tokens", "says 1703", "another model's")
    (data / "cut.tiktoken").write_bytes((data / "multilingual.tiktoken").read_bytes()[:-2] + b"?")
    errs(train_in_process(*args, data / "cut.tiktoken"), "not a SentencePiece model")
    joined = write_tiktoken(data / "joined.tiktoken", 90)  # many ways to part it, and none of them right
    joined.write_bytes(joined.read_bytes().replace(b"\n", b"") + b"?")
    errs(train_in_process(*args, joined), "not a SentencePiece model")
    errs(train_in_process(*args, data / "none.tiktoken"), "No such file", "IndexTTS-2.5 comes with its own")
    errs(train_in_process(args[0], f"{data}/train_pairs.jsonl::en", *args[2:], data / "multilingual.tiktoken"),
         "train_pairs.jsonl:1: its text begins with the token of 'am'", "Pass ::am")
    runs(train_in_process(*args, data / "multilingual.tiktoken"))
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["tokenizer"]["size"] == 1703
