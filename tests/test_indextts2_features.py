"""tools.preprocess --features indextts2: what the public code makes, however it is run; every other folder is refused.

golden_features.json was made by the public code (index-tts at ee40fa7: ConformerEncoder, PerceiverResampler, RepCodec;
transformers 5.24.0: SeamlessM4TFeatureExtractor and Wav2Vec2BertModel, hidden state 17) on the folder of
make_released_folder, seed 0, and the sounds of SOUNDS: all codes, every 8th row and column of the condition, every 4th
value of emo_vec. At the released sizes, with random weights, features, codes, condition and emo_vec were equal bit for
bit.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, TOKENIZER, call_trainer, mistake, read_jsonl, trainer
from released_folder import CONFIG, W2V_BERT, make_released_folder, move_to_cache, train_bpe, w2v_bert_tensors
from safetensors.torch import load_file, save_file
from test_preprocess import CODEC, contents, resolved, sentence, tone, write_rows
from test_signals import needs_proc

from tools import build_pairs, model_folder, preprocess
from tools._common import ToolError, sha256_of
from tools.amharic_text import TEXT_RULES
from tools.indextts2_features import IndexTTS2Features, conditioning_digest, read_tensors
from tools.indextts2_modules import SemanticCodec, code_count, rows_of
from tools.indextts2_sound import nested_tensors
from tools.made_with import of_manifest
from tools.model_folder import FOR_FEATURES, find_parts
from tools.sound_files import load_recording

GOLDEN = json.loads((ROOT / "tests/golden_features.json").read_text())
SOUNDS = {"even": (1, 1.2), "odd": (2, 0.81), "over 15 s": (3, 15.6)}
W2V_FILE, CODEC_FILE = "hf_cache/w2v-bert-2.0/model.safetensors", "hf_cache/semantic_codec_model.safetensors"


def babble(seed: int, seconds: float) -> np.ndarray:
    """Short tones of changing loudness at 16 kHz, in 16 bits, float32."""
    rng, parts, length = np.random.default_rng(seed), [], round(seconds * 16000)
    while sum(map(len, parts)) < length:
        parts.append(tone(int(rng.integers(1000)), rng.uniform(0.05, 0.25), 16000) * rng.uniform(0.02, 2))
    return (np.concatenate(parts)[:length] * 32767).astype(np.int16).astype(np.float32) / 32768


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, whose tokenizer reads the texts here. Read only."""
    folder = make_released_folder(tmp_path_factory.mktemp("released") / "checkpoints")
    shutil.copyfile(TOKENIZER, folder / "bpe.model")
    return folder


@pytest.fixture(scope="module")
def features(released: Path) -> IndexTTS2Features:
    return IndexTTS2Features(find_parts(released, FOR_FEATURES), "cpu", check=True)


def make_babble(folder: Path, count: int) -> Path:
    """Recordings of two speakers, of even and odd numbers of frames, with silence around them."""
    (folder / "wavs").mkdir(parents=True)
    rows = []
    for number in range(count):
        sound = np.concatenate([np.zeros(1600), babble(number, 0.3 + 0.01 * (number % 5)), np.zeros(1600)])
        soundfile.write(folder / f"wavs/{number}.wav", sound, 16000, subtype="PCM_16")
        rows.append({"id": f"r{number}", "speaker": f"s{number % 2}", "text": sentence(number),
                     "audio": f"wavs/{number}.wav"})
    write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_babble(tmp_path_factory.mktemp("recordings") / "in", 12)


def arguments(recordings: Path, model_dir: Path, output: Path, *more: object) -> list[str]:
    return [str(part) for part in (
        "--features", "indextts2", "--model-dir", model_dir, "--recordings", recordings / "recordings.jsonl",
        "--tokenizer", TOKENIZER, "--output-dir", output, "--prompts-per-speaker", 2, "--val-share", 0.2,
        "--device", "cpu", *more)]


def run(*args: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        preprocess.main(arguments(*args))
    return printed.getvalue()


@pytest.fixture(scope="module")
def single(recordings: Path, released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them. Read only."""
    output = tmp_path_factory.mktemp("single") / "data"
    run(recordings, released, output, "--jobs", 1)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("name", SOUNDS)
def test_codes_condition_and_emotion_are_those_of_the_public_code(features: IndexTTS2Features, name: str):
    golden, audio = GOLDEN[name], torch.from_numpy(babble(*SOUNDS[name]))
    found = features.arrays(audio, "codes")
    assert found["codes"].dtype == np.int32 and found["codes"].tolist() == golden["codes"]
    assert np.abs(found["emo_vec"][0, ::4] - golden["emo_vec"]).max() < 1e-4
    condition = features.arrays(audio, "condition")["condition"]
    assert condition.shape == (32, 32) and np.abs(condition[::8, ::8] - golden["condition"]).max() < 1e-4


def test_the_codec_gives_the_codes_of_the_public_one_for_rows_that_have_nothing_in_common(features: IndexTTS2Features):
    rows = torch.randn(60, 24, generator=torch.Generator().manual_seed(5))
    assert features.codec(rows).tolist() == GOLDEN["codes of noise"] and len(set(GOLDEN["codes of noise"])) > 40


@pytest.mark.parametrize("samples", [1600, 4000, 4160, 5003])
def test_the_filter_bank_is_that_of_the_public_extractor_bit_for_bit(samples: int):
    from transformers import SeamlessM4TFeatureExtractor

    audio = babble(samples, samples / 16000)
    theirs = SeamlessM4TFeatureExtractor(padding_value=1)(audio, sampling_rate=16000, return_tensors="np")
    rows, whole = rows_of(torch.from_numpy(audio), 1.0)
    assert np.array_equal(rows.numpy(), theirs["input_features"][0])
    assert whole.tolist() == theirs["attention_mask"][0].astype(bool).tolist()
    assert sum(whole) == code_count(samples) == (1 + (samples - 400) // 160) // 2


def test_a_prompt_is_heard_for_15_seconds_and_its_codes_are_of_the_whole(features: IndexTTS2Features):
    audio = torch.from_numpy(babble(8, 15.3))
    long, cut = (features.arrays(sound, "codes") for sound in (audio, audio[: 15 * 16000]))
    assert len(long["codes"]) == code_count(len(audio)) == 764 > len(cut["codes"]) == 749
    assert np.array_equal(long["emo_vec"], cut["emo_vec"])
    assert np.array_equal(features.arrays(audio, "condition")["condition"],
                          features.arrays(audio[: 15 * 16000], "condition")["condition"])


# ---------------------------------------------------------------------------------------------------------------------
# The way


def test_padding_is_never_a_code_and_every_utterance_has_its_emotion(recordings: Path, single: Path,
                                                                     features: IndexTTS2Features):
    rows = resolved(single)
    assert len(rows) == 12 and {len(row["codes"]) for row in rows.values()} == {24, 25, 26}
    for number, row in enumerate(rows.values()):
        audio = load_recording(recordings / f"wavs/{number}.wav", 16000, trim=False)
        assert row["duration"] == round(soundfile.info(recordings / f"wavs/{number}.wav").duration, 3), "trimmed"
        alone = features.arrays(audio, "codes")
        assert row["codes"] == alone["codes"].tolist() and len(row["codes"]) == code_count(len(audio))
        assert row["emo_vec"] == alone["emo_vec"].tolist()
        if "condition" in row:
            assert row["condition"] == features.arrays(audio, "condition")["condition"].tolist()
    assert sum("condition" in row for row in rows.values()) == 4 and len(np.load(single / "emo_vec.npy")) == 12


def test_the_models_config_is_kept_but_for_the_size_of_the_tokenizer(single: Path, released: Path):
    theirs, ours = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (released, single))
    record = of_manifest(single / "train_pairs.jsonl")
    tensors = torch.load(released / "gpt.pth", weights_only=True)
    assert record == {
        "features": "indextts2", "codec_sha256": sha256_of(released / CODEC_FILE), "num_codes": 8192,
        "codes_per_second": 50.0, "tokenizer_sha256": sha256_of(TOKENIZER), "text_rules": TEXT_RULES,
        "conditioning_sha256": conditioning_digest(tensors)}
    assert ours["gpt"].pop("number_text_tokens") != theirs["gpt"].pop("number_text_tokens")
    assert theirs["dataset"].items() <= ours["dataset"].items()
    assert {**ours, "dataset": 0} == {**theirs, "dataset": 0}


def test_the_trainer_starts_from_the_folder_and_refuses_the_weights_of_another(single: Path, released: Path,
                                                                               tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(single, data)
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(data)])
    other = {name: t + 1 if name == "emo_layer.bias" else t for name, t in read_tensors(released / "gpt.pth").items()}
    torch.save({"model": other}, tmp_path / "other.pth")
    command = ("--train-manifest", data / "train_pairs.jsonl", "--val-manifest", data / "val_pairs.jsonl",
               "--tokenizer", TOKENIZER, "--batch-size", 2, "--grad-accumulation", 1, "--max-steps", 1)
    said = mistake(*command, "--base-checkpoint", tmp_path / "other.pth", "--output-dir", tmp_path / "no")
    assert "conditioning modules" in said and "other.pth" in said and "train_pairs.jsonl" in said
    output = tmp_path / "run"
    call_trainer(*command, "--base-checkpoint", released / "gpt.pth", "--output-dir", output)
    checkpoint = torch.load(output / "latest.pth", weights_only=True)
    digest = conditioning_digest(checkpoint["model"])
    assert digest == checkpoint["made_with"]["conditioning_sha256"] == of_manifest(data / "x")["conditioning_sha256"]
    assert trainer.conditioning_record(checkpoint["model"]) == {"conditioning_sha256": digest}
    config = yaml.safe_load((data / "config.yaml").read_text())
    config["dataset"]["conditioning_sha256"] = "0" * 64
    (data / "config.yaml").write_text(yaml.safe_dump(config))
    assert "conditioning modules" in mistake(*command, "--output-dir", output, "--resume", "auto")


def test_workers_make_what_one_process_makes(recordings: Path, released: Path, single: Path, tmp_path: Path):
    assert "2 at a time" in run(recordings, released, tmp_path / "data", "--jobs", 2)
    assert contents(tmp_path / "data") == contents(single)


def test_merged_shards_equal_the_single_run(recordings: Path, released: Path, single: Path, tmp_path: Path):
    for flags in (("--shard-index", 1), ("--shard-index", 0), ("--merge",)):
        run(recordings, released, tmp_path / "data", "--jobs", 1, "--num-shards", 2, *flags)
    merged = resolved(tmp_path / "data")
    assert merged == resolved(single) and sum("emo_vec" in row for row in merged.values()) == 12
    assert (tmp_path / "data/config.yaml").read_bytes() == (single / "config.yaml").read_bytes()
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(tmp_path / "data")])


@needs_proc
def test_killed_it_goes_on_with_the_same_command(recordings: Path, released: Path, single: Path, tmp_path: Path):
    output = tmp_path / "data"
    command = [sys.executable, "-m", "tools.preprocess", *arguments(recordings, released, output, "--jobs", 1)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(output.glob("chunks/codes_*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    said = run(recordings, released, output, "--jobs", 1)
    assert "of 12 recordings to compute" not in said or "codes: 12 of 12" not in said
    assert contents(output) == contents(single)


def test_what_is_computed_is_known_by_its_sounds_and_weights(recordings: Path, released: Path, single: Path,
                                                             tmp_path: Path):
    moved, output = tmp_path / "moved", tmp_path / "data"
    shutil.copytree(single, output)
    shutil.copytree(recordings, moved)
    for path in moved.glob("wavs/*"):
        os.utime(path, (1, 1))
    soundfile.write(moved / "wavs/3.wav", babble(77, 0.5), 16000)
    assert "codes: 1 of 12 recordings" in run(moved, released, output, "--jobs", 1)
    other = tmp_path / "other"
    shutil.copytree(released, other)
    tensors = torch.load(other / "gpt.pth", weights_only=True)
    torch.save({name: t + 1 if name.startswith("gpt.") else t for name, t in tensors.items()}, other / "gpt.pth")
    assert "to compute" not in run(moved, other, output, "--jobs", 1)  # fine-tuned, with the same conditioning modules
    torch.save(tensors | {"emo_layer.bias": tensors["emo_layer.bias"] + 1}, other / "gpt.pth")
    assert "codes: 12 of 12 recordings" in run(moved, other, output, "--jobs", 1)


def test_a_recording_that_the_model_cannot_take_is_left_out_before_it_is_computed(released: Path, tmp_path: Path):
    folder = make_babble(tmp_path / "in", 6)
    for name, samples in (("2", 400 + 243 * 160 - 1), ("1", 400 + 243 * 160)):  # 121 codes, and 122
        soundfile.write(folder / f"wavs/{name}.wav", babble(5, samples / 16000), 16000)
    run(folder, released, tmp_path / "data", "--jobs", 1)
    assert {row["id"]: row["code_len"] for row in read_jsonl(tmp_path / "data/utterances.jsonl")}["r2"] == 121
    skipped = read_jsonl(tmp_path / "data/skipped.jsonl")
    assert [(row["id"], row["reason"]) for row in skipped] == [("r1", "recording too long")]
    assert "2.5 s, the model takes 2.5. Cut it into sentences" in skipped[0]["detail"]


# ---------------------------------------------------------------------------------------------------------------------
# Where the parts lie


def test_what_is_missing_is_one_list_before_anything_is_computed(recordings: Path, released: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    folder = tmp_path / "check points"
    folder.mkdir()
    shutil.copy(released / "config.yaml", folder)
    with pytest.raises(ToolError) as error:
        run(recordings, folder, tmp_path / "data")
    said = str(error.value)
    for part in ("gpt.pth is missing (IndexTeam/IndexTTS-2, 3.48 GB)", "bpe.model is missing",
                 "wav2vec2bert_stats.pt is missing",
                 "hf_cache/w2v-bert-2.0 is missing (facebook/w2v-bert-2.0, 2.32 GB)",
                 "semantic_codec_model.safetensors is missing (amphion/MaskGCT, 177 MB)",
                 f"`hf download IndexTeam/IndexTTS-2 gpt.pth bpe.model wav2vec2bert_stats.pt --local-dir '{folder}'`",
                 "`hf download facebook/w2v-bert-2.0 config.json preprocessor_config.json model.safetensors "
                 f"--cache-dir '{folder}/hf_cache'`", "`hf download amphion/MaskGCT semantic_codec/model.safetensors "
                 f"--cache-dir '{folder}/hf_cache'`", str(tmp_path / "nothing")):
        assert part in said, part
    assert "\n" not in said and not (tmp_path / "data/chunks").exists()


@pytest.mark.parametrize("place", ["hf_cache", "HF_HUB_CACHE", "HF_HOME", "home"])
def test_every_layout_of_the_caches_is_searched(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                place: str):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = {"hf_cache": tmp_path / "m/hf_cache", "HF_HUB_CACHE": tmp_path / "hub", "HF_HOME": tmp_path / "hf/hub",
             "home": tmp_path / "home/.cache/huggingface/hub"}[place]
    if place.startswith("HF"):
        monkeypatch.setenv(place, str(cache if place == "HF_HUB_CACHE" else cache.parent))
    shutil.copytree(released, tmp_path / "m")
    move_to_cache(tmp_path / "m", cache, "0123abc")
    stale = cache / "models--facebook--w2v-bert-2.0/snapshots/000"
    stale.mkdir()
    (stale / "config.json").write_text("{}")  # half a download
    found = find_parts(tmp_path / "m", FOR_FEATURES)
    assert found["w2v_bert"] == cache / "models--facebook--w2v-bert-2.0/snapshots/0123abc"
    assert found["semantic_codec"] == cache / ("models--amphion--MaskGCT/snapshots/0123abc/semantic_codec/"
                                               "model.safetensors")


def test_the_config_may_name_other_files(released: Path, tmp_path: Path):
    shutil.copytree(released, tmp_path / "m")
    config = copy.deepcopy(CONFIG) | {"gpt_checkpoint": "tuned.pth"}
    config["dataset"]["bpe_model"] = "am.model"
    (tmp_path / "m/config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "m/gpt.pth").rename(tmp_path / "m/tuned.pth")
    (tmp_path / "m/bpe.model").rename(tmp_path / "m/am.model")
    found = find_parts(tmp_path / "m", ("gpt", "bpe"))
    assert [path.name for path in found.values()] == ["tuned.pth", "am.model"]


def test_nobody_loads_torch_to_look_into_a_folder():
    code = "import sys; import tools.model_folder; assert not {'torch', 'numpy', 'trainers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad folders


def change_config(**changes: Any) -> Callable[[Path], None]:
    """By dotted names, with __ for a dot; None takes a key away."""
    def change(folder: Path) -> None:
        config = copy.deepcopy(CONFIG)
        for name, value in changes.items():
            *sections, key = name.split("__")
            section = config
            for part in sections:
                section = section[part]
            section[key] = value
            if value is None:
                del section[key]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return change


def cut(name: str, size: int = -7) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
    return change


def change_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
                   ) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / name
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        new = {key: t.contiguous() for key, t in change(tensors).items()}
        save_file(new, path) if path.suffix == ".safetensors" else torch.save(new, path)
    return changed


def another_w2v_bert(folder: Path) -> None:
    settings = W2V_BERT | {"hidden_size": 32, "output_hidden_size": 32}
    save_file(w2v_bert_tensors(settings, torch.Generator()), folder / W2V_FILE)
    (folder / W2V_FILE).with_name("config.json").write_text(json.dumps(settings))


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.half() for name, t in tensors.items()}


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


BAD = {
    "2.5": (change_config(version=2.5), "IndexTTS-2.5, whose codes"),
    "1.5": (change_config(version=1.5, semantic_codec=None, dvae_checkpoint="dvae.pth"), "IndexTTS 1 or 1.5"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "holds no config.yaml.*`hf download IndexTeam"),
    "no folder": (shutil.rmtree, "no such folder.*downloads IndexTTS-2, `hf download IndexTeam/IndexTTS-2.5 "),
    "foreign config": (change_config(s2mel=None, gpt__condition_module=None),
                       "has no s2mel, gpt.condition_module, so it is not IndexTTS-2's"),
    "config that is no YAML": (write("config.yaml", b"gpt: {"), "config.yaml: cannot be read"),
    "config without a number": (change_config(gpt__condition_module__linear_units=None), "linear_units is missing"),
    "config of text": (change_config(gpt__condition_module__num_blocks="six"), "no modules can be made"),
    "other condition": (change_config(gpt__condition_type="gst"), "gpt.condition_type is of gst, not conformer_"),
    "model that cannot be": (change_config(gpt__heads=5), "model_dim 32 is not a multiple of gpt.heads 5"),
    "half gpt.pth": (cut("gpt.pth"), "gpt.pth is not whole .IndexTeam/IndexTTS-2, 3.48 GB.*`hf download"),
    "half w2v-BERT": (cut(W2V_FILE), "model.safetensors is not whole .facebook/w2v-bert-2.0"),
    "half header": (cut(W2V_FILE, 50), "model.safetensors is not whole"),
    "empty codec": (cut(CODEC_FILE, 0), "semantic_codec_model.safetensors is not whole"),
    "pointer": (write("wav2vec2bert_stats.pt", b"version https://git-lfs\noid 1\n"), "stats.pt is not whole"),
    "page instead of file": (write("gpt.pth", b"<html>Not found</html>"), "gpt.pth: not a f.*.a web page, or"),
    "settings that are none": (write("hf_cache/w2v-bert-2.0/config.json", b"[]"), "config.json: not a file of weights"),
    "another w2v-BERT": (another_w2v_bert, "its features are 32 wide, .*semantic_codec.hidden_size 24"),
    "wrong w2v-BERT shapes": (change_tensors(W2V_FILE, lambda t: {name: x[..., :-1] for name, x in t.items()}),
                              "not w2v-BERT 2.0: .*have another shape, the first: .* not"),
    "small w2v-BERT": (write("hf_cache/w2v-bert-2.0/config.json", json.dumps(
        W2V_BERT | {"num_hidden_layers": 12}).encode()), "not w2v-BERT 2.0 .wav2vec2-bert, 12 layers"),
    "wav2vec 2": (write("hf_cache/w2v-bert-2.0/config.json", b'{"model_type": "wav2vec2"}'), "not w2v-BERT 2.0"),
    "fp16 w2v-BERT": (change_tensors(W2V_FILE, half), "are not float32"),
    "no conditioning modules": (change_tensors("gpt.pth", lambda t: {
        name: x for name, x in t.items() if name.startswith("gpt.")}), "has no conditioning modules"),
    "one module missing": (change_tensors("gpt.pth", lambda t: {
        name: x for name, x in t.items() if not name.startswith("emovec_layer")}),
        "not the GPT that config.yaml describes: 2 tensors are missing, the first: emovec_layer.weight"),
    "deeper module": (change_config(gpt__condition_module__num_blocks=3), "are missing, the first: conditioning_enc"),
    "unknown tensor": (change_tensors("gpt.pth", lambda t: t | {"emo_layer.lora_A": torch.ones(1)}),
                       "1 tensors are unknown, the first: emo_layer.lora_A"),
    "fp16 gpt.pth": (change_tensors("gpt.pth", half), "are not float32, as the features need them"),
    "nan": (change_tensors("gpt.pth", lambda t: t | {"emo_layer.bias": t["emo_layer.bias"] * torch.nan}),
            "1 tensors hold values that are not finite, the first: emo_layer.bias"),
    "stats shape": (change_tensors("wav2vec2bert_stats.pt", lambda t: t | {"var": t["var"][:-1]}),
                    r"stats.pt: var is torch.float32 \[23\], not float32 \[24\]"),
    "stats without variance": (change_tensors("wav2vec2bert_stats.pt", lambda t: t | {"var": -t["var"]}),
                               "no variances"),
    "another codec": (change_tensors(CODEC_FILE, lambda t: {f"model.{name}": x for name, x in t.items()}),
                      r"not the semantic codec .* are missing.* unknown, the first: [^ ]*\. Down"),
    "a codec that PyTorch wrote": (lambda folder: shutil.copy(folder / "gpt.pth", folder / CODEC_FILE),
                                   "model.safetensors: not a file of weights that can be read .no .safetensors file"),
    "w2v-BERT without settings": (lambda folder: (folder / "hf_cache/w2v-bert-2.0/preprocessor_config.json").unlink(),
                                  "preprocessor_config.json is missing .facebook/w2v-bert-2.0, 2.32 GB"),
    "embedded codec": (lambda folder: shutil.copy(CODEC, folder / "wav2vec2bert_stats.pt"), "holds no tensors by name"),
    "pickled object": (lambda folder: torch.save({"x": Surprise()}, folder / "gpt.pth"), "gpt.pth: not a f.*plain te"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_error_before_any_sound_is_read(recordings: Path, released: Path, tmp_path: Path, name: str,
                                                            capsys: pytest.CaptureFixture[str],
                                                            monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    change, said = BAD[name]
    shutil.copytree(released, tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(ToolError, match=said) as error:
        run(recordings, tmp_path / "m", tmp_path / "data")
    assert "\n" not in str(error.value) and str(tmp_path / "m") in str(error.value)
    assert not (tmp_path / "data").exists() and "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "said"), [
    (("--features", "indextts2"), "--features indextts2 needs --model-dir, the folder of IndexTTS-2: `hf download"),
    (("--features", "indextts2", "--model-dir", "m", "--codec", "c.pt"), "--codec does not go with --features indext"),
    (("--features", "indextts2", "--model-dir", "m", "--config", "c"), "--config does not go with --features indext"),
    (("--features", "indextts2", "--model-dir", "m", "--model-dim", "8"), "--model-dim does not go with"),
    (("--codec", "c.pt", "--model-dir", "m"), "--model-dir does not go with --features embedded: --features indextts2"),
    ((), "--features embedded needs --codec, the codec that"),
    (("--features", "indextts3", "--model-dir", "m"), "invalid choice"),
])
def test_flags_that_do_not_go_together_are_named(flags: tuple[str, ...], said: str, tmp_path: Path):
    with pytest.raises(ToolError, match=said):
        preprocess.parse(["--recordings", "r", "--tokenizer", "t", "--output-dir", str(tmp_path), *flags])


@pytest.mark.parametrize("device", ["cuda:9", "tpu", "meta", "mps"])
def test_a_device_that_is_not_there_is_named(recordings: Path, released: Path, tmp_path: Path, device: str):
    with pytest.raises(ToolError, match=f"--device {device}: n"):
        run(recordings, released, tmp_path / "data", "--device", device)


def test_every_part_that_sound_needs_is_in_the_table():
    assert set(FOR_FEATURES) < set(model_folder.FOR_SOUND) < set(model_folder.PARTS)
    assert SemanticCodec.DECODER


def test_a_tokenizer_that_does_not_extend_the_folders_is_refused(released: Path, tmp_path: Path):
    folder = shutil.copytree(released, tmp_path / "checkpoints")
    train_bpe(folder / "bpe.model")
    with pytest.raises(ToolError, match=r"does not extend .*bpe\.model.*--extend"):
        run(make_babble(tmp_path / "babble", 4), folder, tmp_path / "data", "--jobs", 1)


def test_a_web_page_as_part_of_the_sound_is_said_to_be_one(tmp_path: Path):
    (tmp_path / "bigvgan_generator.pt").write_text("<html>Not found</html>")
    with pytest.raises(ToolError, match="bigvgan_generator.pt: not a file of weights that can be read .a web page, or"):
        nested_tensors(tmp_path / "bigvgan_generator.pt", "generator")
