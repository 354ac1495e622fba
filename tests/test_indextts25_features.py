"""tools.preprocess --features indextts2.5 and the layout of IndexTTS-2.5 with the embedded codec.

The golden values were made by the public code (index-tts at ee40fa7: EnhancedCodec.quantize, CAMPPlus with torchaudio's
Kaldi filter bank) and by tiktoken 0.14.0.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, TOKENIZER, call_trainer, read_jsonl, trainer
from released_folder import CHANNELS, CONFIG_25, make_released_folder, make_released_folder_25
from test_indextts2_features import babble, make_babble
from test_preprocess import CODEC

from tools import build_pairs, preprocess, synthesize
from tools._common import ToolError, sha256_of
from tools.indextts2_features import IndexTTS2Features, conditioning_digest
from tools.indextts2_modules import frame_count
from tools.made_with import of_manifest
from tools.model_folder import FOR_FEATURES_25, TIKTOKEN, find_parts
from tools.text_tokens import load_tokens

GOLDEN = json.loads((ROOT / "tests/golden_features25.json").read_text())
TEXTS = ("ሰላም ለዓለም፣ 12 ጊዜ።", "!", "It's  2 dogs'll ፩፪\n ", " ሰላም ላም")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of IndexTTS-2.5. Read only."""
    return make_released_folder_25(tmp_path_factory.mktemp("released") / "checkpoints")


@pytest.fixture(scope="module")
def features(released: Path) -> IndexTTS2Features:
    return IndexTTS2Features(find_parts(released, FOR_FEATURES_25), "cpu", check=True)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_babble(tmp_path_factory.mktemp("recordings") / "in", 8)


def run(recordings: Path, output: Path, *more: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess.main([str(part) for part in (
            "--recordings", recordings / "recordings.jsonl", "--output-dir", output, "--prompts-per-speaker", 2,
            "--val-share", 0.2, "--jobs", 1, *more)])


def of_folder(folder: Path, features: str = "indextts2.5", tokenizer: Path | None = None) -> tuple[Any, ...]:
    return ("--features", features, "--model-dir", folder, "--tokenizer", tokenizer or folder / TIKTOKEN,
            "--device", "cpu")


def train(data: Path, tokenizer: Path, output: Path, *more: object) -> tuple[Any, ...]:
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(data)])
    return ("--train-manifest", data / "train_pairs.jsonl", "--val-manifest", data / "val_pairs.jsonl", "--tokenizer",
            tokenizer, "--batch-size", 2, "--grad-accumulation", 1, "--max-steps", 3, "--output-dir", output, *more)


def test_the_speaker_vector_is_that_of_the_public_code(features: IndexTTS2Features):
    found = features.arrays(torch.from_numpy(babble(4, 1.3)), "condition")["condition"]
    assert found.shape == (1, 192) and found.dtype == np.float32
    assert np.abs(found[0, ::12] - GOLDEN["speaker"]).max() < 1e-4


@pytest.mark.parametrize("rows", [60, 61])
def test_the_codes_are_those_of_the_public_code(features: IndexTTS2Features, rows: int):
    values = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(rows))
    assert features.codec(values).tolist() == GOLDEN[f"codes of {rows}"] and len(set(GOLDEN["codes of 60"])) > 20


def test_a_code_is_of_four_whole_frames(features: IndexTTS2Features):
    for samples in (8000, 8160, 8320, 8480):
        found = features.arrays(torch.from_numpy(babble(1, samples / 16000)), "codes")
        assert len(found["codes"]) == frame_count(samples) // 4 and found["emo_vec"].shape == (1, 32)


def test_texts_are_read_as_tiktoken_reads_them(released: Path):
    tokens = load_tokens(released / TIKTOKEN)
    assert [tokens.encode(text, language) for text in TEXTS for language in ("am", "yue")] == GOLDEN["texts"]
    assert tokens.encode("ሰላም", "am")[0] == tokens.size - trainer.TIKTOKEN_SPECIALS + 2 + 75
    assert tokens.encode("a!", "am")[-1] == 0, "! is id 0, and stays"


def test_from_the_folder_to_a_trained_checkpoint(recordings: Path, released: Path, tmp_path: Path):
    data, output = tmp_path / "data", tmp_path / "run"
    run(recordings, data, *of_folder(released))
    rows = read_jsonl(data / "utterances.jsonl")
    prompts = [row for row in rows if "condition_start" in row]
    assert {row["condition_len"] for row in prompts} == {1}
    assert np.load(data / "condition.npy").shape == (len(prompts), 192)
    assert np.load(data / "emo_vec.npy").shape == (len(rows), 32)
    ours = yaml.safe_load((data / "config.yaml").read_text())
    assert ours["version"] == 2.5 and ours["gpt"] == CONFIG_25["gpt"]
    record = of_manifest(data / "train_pairs.jsonl")
    assert record.pop("text_rules") and record == {
        "features": "indextts2.5", "codec_sha256": sha256_of(released / "codec.pth"), "num_codes": 8192,
        "codes_per_second": 25.0, "tokenizer_sha256": sha256_of(released / TIKTOKEN),
        "conditioning_sha256": conditioning_digest(torch.load(released / "gpt.pth", weights_only=True))}
    call_trainer(*train(data, released / TIKTOKEN, output, "--base-checkpoint", released / "gpt.pth"))
    checkpoint = torch.load(output / "latest.pth", weights_only=True)
    before = torch.load(released / "gpt.pth", weights_only=True)
    assert checkpoint["model"].keys() == before.keys() and checkpoint["made_with"]["features"] == "indextts2.5"
    moved = (checkpoint["model"]["lang_embedding.weight"] != before["lang_embedding.weight"]).any(1).nonzero()
    assert moved.flatten().tolist() == [trainer.LANGUAGES.index("am")]


def test_the_embedded_codecs_data_in_25s_layout_trains_and_speaks(recordings: Path, tmp_path: Path):
    config, data, output = tmp_path / "config.yaml", tmp_path / "data", tmp_path / "run"
    config.write_text(yaml.safe_dump({"version": 2.5, "gpt": {
        "model_dim": 32, "layers": 2, "heads": 2, "max_text_tokens": 200, "max_mel_tokens": 60}}))
    run(recordings, data, "--codec", CODEC, "--tokenizer", TOKENIZER, "--config", config)
    condition = np.load(data / "condition.npy")
    assert condition.shape == (4, 192) and condition.std() > 0.01 and np.load(data / "emo_vec.npy").shape == (4, 32)
    assert yaml.safe_load((data / "config.yaml").read_text())["version"] == 2.5
    call_trainer(*train(data, TOKENIZER, output))
    soundfile.write(tmp_path / "prompt.wav", babble(3, 1.0), 16000)
    with contextlib.redirect_stdout(io.StringIO()):
        synthesize.main(["--checkpoint", str(output / "latest.pth"), "--codec", str(CODEC), "--prompt",
                         str(tmp_path / "prompt.wav"), "--text", "ሰላም", "--output", str(tmp_path / "a.wav"),
                         "--max-length", "5"])
    assert (tmp_path / "a.wav").stat().st_size


def test_a_folder_of_the_other_model_is_refused(recordings: Path, released: Path, tmp_path: Path):
    two = make_released_folder(tmp_path / "two")
    for folder, features, said in ((two, "indextts2.5", "two: IndexTTS-2,.*--features indextts2$"),
                                   (released, "indextts2", "IndexTTS-2.5,.*folder of IndexTTS-2, or")):
        with pytest.raises(ToolError, match=said):
            run(recordings, tmp_path / "data", *of_folder(folder, features, TOKENIZER))


def test_another_tokenizer_than_the_folders_is_refused(recordings: Path, released: Path, tmp_path: Path):
    with pytest.raises(ToolError, match="is not .*tiktoken, whose texts the weights learned"):
        run(recordings, tmp_path / "data", *of_folder(released, tokenizer=TOKENIZER))
    whole = (released / TIKTOKEN).read_bytes().splitlines(keepends=True)
    for content, said in ((whole[3:], "byte"), ([*whole, whole[0]], "twice"),
                          ([b"?? 0\n"], "not a .tiktoken file"), ([b"IQ== x\n"], "line 1 is not a token"), (
                              [b"IQ== 0\n", b"half"], "line 2 is not a token")):
        path = tmp_path / "bad.tiktoken"
        path.write_bytes(b"".join(content))
        with pytest.raises(ToolError, match=said):
            load_tokens(path)
    with pytest.raises(ToolError, match="no such tokenizer"):
        load_tokens(tmp_path / "none.tiktoken")


@pytest.mark.parametrize("name, key, said", [
    ("codec.pth", "down.weight", "codec.pth: not the semantic codec.*missing, the first: down.weight"),
    ("hf_cache/campplus_cn_common.bin", "xvector.tdnn.linear.weight", "not CAM\\+\\+.*missing"),
    ("gpt.pth", "emo_layer.weight", "gpt.pth: not the GPT.*missing, the first: emo_layer.weight")])
def test_a_tensor_that_is_missing_is_named(recordings: Path, released: Path, tmp_path: Path, name: str, key: str,
                                           said: str):
    folder = shutil.copytree(released, tmp_path / "m")
    tensors = torch.load(folder / name, weights_only=True)
    tensors.get("model", tensors).pop(key)
    torch.save(tensors, folder / name)
    with pytest.raises(ToolError, match=said):
        run(recordings, tmp_path / "data", *of_folder(folder))


def test_what_is_missing_is_named_with_the_repository_of_25(recordings: Path, released: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(released / "config.yaml", folder)
    with pytest.raises(ToolError) as error:
        run(recordings, tmp_path / "data", *of_folder(folder, tokenizer=released / TIKTOKEN))
    for part in ("gpt.pth is missing (IndexTeam/IndexTTS-2.5, 3.26 GB)", "codec.pth is missing",
                 "funasr/campplus, 28 MB",
                 f"hf download IndexTeam/IndexTTS-2.5 gpt.pth {TIKTOKEN} wav2vec2bert_stats.pt codec.pth"):
        assert part in str(error.value), part


def test_a_language_that_25_does_not_know_is_left_out(recordings: Path, released: Path, tmp_path: Path):
    folder = shutil.copytree(recordings, tmp_path / "in")
    rows = read_jsonl(folder / "recordings.jsonl")
    rows[0]["language"] = "tlh"
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, tmp_path / "data", *of_folder(released))
    skipped = read_jsonl(tmp_path / "data/skipped.jsonl")
    assert [row["reason"] for row in skipped] == ["unknown language"]
