"""Speaking with released IndexTTS-2 weights, by the package's own modules with tiny random weights: the same sound as
its inference makes, lines do not disturb each other, and it loads exported folders.

For the virtual environment of requirements-indextts.txt: `make test-indextts`.
"""

from __future__ import annotations

import json
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import TOKENIZER, call_trainer, load_checkpoint, make_rows, read_jsonl, trainer, write_manifest
from released_folder import CONFIG, gpt_tensors, make_released_folder
from released_sound import add_sound

from tools import evaluate_voice, export_checkpoint, synthesize
from tools._common import ToolError
from tools.generation import Sampling, Synthesizer, latents_of
from tools.indextts2_sound import IndexTTS2Sound
from tools.made_with import INDEXTTS2

pytestmark = [pytest.mark.indextts,
              pytest.mark.skipif(find_spec("indextts") is None, reason="`make test-indextts` has the package")]
RATE = 22050
TEXTS = ["ሰላም ቤት", "ውሃ ልጅ መንገድ", "አበባ"]


def write_voice(path: Path, seed: int, seconds: float = 1.3) -> Path:
    rng, clock = np.random.default_rng(seed), np.arange(round(seconds * RATE)) / RATE
    sound = sum(rng.uniform(0.1, 1) * np.sin(2 * np.pi * k * 140 * clock) / k for k in range(1, 9))
    soundfile.write(path, (0.1 * sound + 0.01 * rng.standard_normal(len(clock))).astype(np.float32), RATE)
    return path


def error_of(call) -> str:
    with pytest.raises(ToolError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def train_on(folder: Path, data: Path, record: dict) -> Path:
    """Three steps from the folder's gpt.pth on random data; returns the checkpoint."""
    data.mkdir()
    rng = np.random.default_rng(7)
    for name, count in (("train", 20), ("val", 6)):
        rows = make_rows(data, name, count, rng, True)
        for i, row in enumerate(rows):
            voice = write_voice(data / f"{name}{i}.wav", i)
            row.update(target_id=f"{name}{i}", prompt_id=f"{name}{i}", target_text=TEXTS[i % 3],
                       target_audio_path=voice.name, prompt_audio_path=voice.name, prompt_duration=1.3)
        write_manifest(data / f"{name}_pairs.jsonl", rows)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (data / "config.yaml").write_text(yaml.safe_dump({**config, "dataset": {**config["dataset"], **record}}))
    call_trainer("--train-manifest", data / "train_pairs.jsonl", "--val-manifest", data / "val_pairs.jsonl",
                 "--tokenizer", TOKENIZER, "--base-checkpoint", folder / "gpt.pth", "--output-dir", data / "out",
                 "--max-steps", 3, "--batch-size", 4, "--grad-accumulation", 1)
    return data / "out" / "latest.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_sound(make_released_folder(tmp_path_factory.mktemp("released") / "checkpoints"))


@pytest.fixture(scope="module")
def sound(folder: Path) -> IndexTTS2Sound:
    return IndexTTS2Sound(folder, "cpu")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, sound: IndexTTS2Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on(folder, tmp_path_factory.mktemp("run") / "data", sound.record)


def test_sound_is_what_the_packages_own_inference_makes_of_the_same_codes_latents_and_noise(folder, sound, tmp_path):
    """Its steps one by one, with its RepCodec and its solver; equal up to the order of sums."""
    from indextts.s2mel.modules.flow_matching import CFM
    from indextts.utils.maskgct.models.codec.kmeans.repcodec_model import RepCodec
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    config = OmegaConf.load(folder / "config.yaml")
    codec = RepCodec(cfg=config.semantic_codec).eval()
    codec.load_state_dict(load_file(folder / "hf_cache/semantic_codec_model.safetensors"))
    cfm = CFM(config.s2mel).eval()
    cfm.load_state_dict(torch.load(folder / "s2mel.pth", weights_only=True)["net"]["cfm"], strict=False)
    cfm.estimator.setup_caches(max_batch_size=1, max_seq_length=8192)
    prompt = sound.prompt(write_voice(tmp_path / "a.wav", 3), trainer.model_config_from(CONFIG["gpt"], "test"))
    generator = torch.Generator().manual_seed(1)
    codes, latents = torch.randint(0, 8192, (25,), generator=generator), torch.randn(25, 32, generator=generator)
    mel, style, content = (prompt.sound[name][None] for name in ("mel", "style", "content"))
    with torch.no_grad():
        said = codec.quantizer.vq2emb(codes[None, None]).transpose(1, 2) + sound.gpt_layer(latents[None])
        lengths = (torch.LongTensor([25]) * 1.72).long()
        stretched = sound.regulator(said, ylens=lengths, n_quantizers=3, f0=None)[0]
        whole = torch.cat([content, stretched], 1)
        torch.manual_seed(5)
        made = cfm.inference(whole, torch.LongTensor([whole.shape[1]]), mel, style, None, 25, inference_cfg_rate=0.7)
        expected = sound.bigvgan(made[:, :, mel.shape[2] :]).squeeze().clamp(-1, 1)
    found = sound.waveform(codes, latents, prompt, 5)
    assert len(found) == 43 * 256 and 0.01 < found.abs().mean() < 0.9
    assert (found - expected).abs().max() < 1e-4
    features = sound.features.features(torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, 16000)).float())[0]
    with torch.no_grad():
        own_codes, quantized = codec.quantize(features[None])
    assert torch.equal(sound.features.codec(features), own_codes[0])
    assert (sound.embedding_of(own_codes[0]) - quantized).abs().max() < 1e-5


def test_loading_tries_no_network_and_takes_no_text_front_end(folder, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    IndexTTS2Sound(folder, "cpu")
    assert not {"nemo_text_processing", "deepspeed", "pynini"} & set(sys.modules)


def test_a_line_sounds_the_same_alone_and_beside_others_and_latents_are_the_gpts(checkpoint, sound, tmp_path):
    synthesizer = Synthesizer(checkpoint, sound, None)
    voices = [synthesizer.prompt(write_voice(tmp_path / f"{i}.wav", i)) for i in range(2)]
    assert synthesizer.prompt(tmp_path / "0.wav") is voices[0]  # kept between lines
    lines = [synthesizer.line(text, voices[i % 2], "test") for i, text in enumerate(TEXTS)]
    sampling = Sampling(max_length=12, seed=2)
    together = list(synthesizer.speak(lines, sampling))
    for line, (spoken, waveform) in zip(lines, together, strict=True):
        [(alone, heard)] = synthesizer.speak([line], sampling)
        assert alone == spoken and torch.equal(heard, waveform) and spoken.latents.shape == (len(spoken.codes), 32)
        forced = latents_of(synthesizer.model, line, torch.tensor(spoken.codes, dtype=torch.int64))
        assert torch.allclose(forced, spoken.latents, atol=1e-6)
    other = next(synthesizer.speak(lines[:1], Sampling(max_length=12, seed=3)))[1]
    assert other.shape != together[0][1].shape or not torch.equal(other, together[0][1])


def speak_texts(checkpoint: Path, folder: Path, tmp_path: Path) -> tuple[np.ndarray, int]:
    """The program says the first of TEXTS to out.wav, and all of them to lines/. Returns out.wav and its rate."""
    write_voice(tmp_path / "a.wav", 1)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    voice = ["--checkpoint", str(checkpoint), "--prompt", str(tmp_path / "a.wav"), "--model-dir", str(folder),
             "--max-length", "9"]
    synthesize.main([*voice, "--text", TEXTS[0], "--output", str(tmp_path / "out.wav")])
    synthesize.main([*voice, "--text-file", str(tmp_path / "texts.txt"), "--output-dir", str(tmp_path / "lines")])
    first, rate = soundfile.read(tmp_path / "out.wav")
    return first, rate


def test_the_program_speaks_a_text_a_file_and_watches_a_run(checkpoint, folder, tmp_path, capsys):
    first, rate = speak_texts(checkpoint, folder, tmp_path)
    again, _ = soundfile.read(tmp_path / "lines/0001.wav")
    assert rate == RATE and len(first) and np.array_equal(first, again) and (tmp_path / "out.png").stat().st_size
    assert [row["name"] for row in read_jsonl(tmp_path / "lines/spoken.jsonl")] == ["0001", "0002", "0003"]
    synthesize.main(["--watch", str(checkpoint.parent), "--model-dir", str(folder), "--max-length", "6"])
    assert "step 3: 4 sentences" in capsys.readouterr().out
    assert list(checkpoint.parent.glob("logs/run_*/voice/events.*"))


def test_evaluate_voice_judges_a_checkpoint_by_indextts2s_sound(checkpoint, folder, tmp_path):
    evaluate_voice.main(["--checkpoint", str(checkpoint), "--model-dir", str(folder), "--output-dir",
                         str(tmp_path / "spoken"), "--data-dir", str(checkpoint.parent.parent), "--texts", "2",
                         "--recogniser", str(tmp_path / "r.pt"), "--json", str(tmp_path / "e.json"),
                         "--max-length", "9"])
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["step"] == 3 and found["synthesis"]["texts"] == 2 and found["round_trip"]["cer"] is not None


def test_files_that_are_not_the_released_ones_are_one_error(folder, tmp_path, checkpoint):
    other = copytree(folder, tmp_path / "other")
    content = torch.load(other / "s2mel.pth", weights_only=True)
    del content["net"]["cfm"]["estimator.conv1.weight"]
    torch.save(content, other / "s2mel.pth")
    message = error_of(lambda: IndexTTS2Sound(other, "cpu"))
    assert "s2mel.pth: not the s2mel that" in message and "estimator.conv1.weight" in message
    torch.save(gpt_tensors(yaml.safe_load((folder / "config.yaml").read_text()), 20,
                           torch.Generator().manual_seed(99)), other / "gpt.pth")
    (other / "s2mel.pth").unlink()
    (other / "s2mel.pth").hardlink_to(folder / "s2mel.pth")
    message = error_of(lambda: Synthesizer(checkpoint, IndexTTS2Sound(other, "cpu"), None))
    assert "conditioning_sha256 is" in message and "Give the model folder whose features" in message


# Exported folders


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose conditioning modules have the released widths, which the package cannot change; a run on it."""
    root = tmp_path_factory.mktemp("wide")
    folder, codec = root / "checkpoints", {**CONFIG["semantic_codec"], "hidden_size": 1024}
    config = {**CONFIG, "semantic_codec": codec}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    torch.save(gpt_tensors(config, 1024, torch.Generator().manual_seed(4)), folder / "gpt.pth")
    return folder, train_on(folder, root / "data", {"features": INDEXTTS2, "num_codes": 8192})


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 5e-5), ("bf16", 0.2)])
def test_the_package_loads_an_exported_folder_strictly_and_has_the_same_losses(wide, tmp_path, dtype, tolerance):
    from indextts.gpt.model_v2 import UnifiedVoice
    from indextts.utils.checkpoint import load_checkpoint as package_loads
    from omegaconf import OmegaConf

    folder, checkpoint = wide
    export_checkpoint.main([str(checkpoint), "--model-dir", str(folder), "--output-dir", str(tmp_path / "voice"),
                            "--dtype", dtype])
    config = OmegaConf.load(tmp_path / "voice/config.yaml")
    theirs = UnifiedVoice(**config.gpt).eval()
    package_loads(theirs, str(tmp_path / "voice" / config.gpt_checkpoint))  # strict
    content = load_checkpoint(checkpoint)
    ours = trainer.UnifiedVoiceGPT(trainer.model_config_from(content["model_config"], "test")).eval()
    ours.load_state_dict({name: content["model"][name] for name in ours.state_dict()})
    rng = np.random.default_rng(3)
    sample = trainer.Sample(rng.integers(2, 50, 11), rng.integers(0, 8192, 23),
                            rng.normal(0, 0.3, (32, 32)).astype(np.float32), rng.normal(0, 0.3, 32).astype(np.float32))
    with torch.no_grad():
        text, mel, _ = trainer.token_losses(ours, trainer.collate_packed([sample], ours.config))
        expected = losses_of(theirs, sample)
    assert (torch.cat([text, mel]) - expected).abs().max() < tolerance


def losses_of(theirs: torch.nn.Module, sample: trainer.Sample) -> torch.Tensor:
    """Per-token losses of text and codes by the package's model."""
    text_ids, codes = (torch.from_numpy(np.asarray(values))[None].long() for values in (sample.text_ids, sample.codes))
    pad = torch.nn.functional.pad
    text, text_targets = theirs.build_aligned_inputs_and_targets(pad(text_ids, (0, 1), value=1), 0, 1)
    mel, mel_targets = theirs.build_aligned_inputs_and_targets(pad(codes, (0, 1), value=8193), 8192, 8193)
    speed = theirs.speed_emb(torch.tensor([[1, 0]]))
    voice = torch.from_numpy(sample.condition)[None] + torch.from_numpy(sample.emo_vec)
    text_rows = theirs.text_embedding(text) + theirs.text_pos_embedding(text)
    mel_rows = theirs.mel_embedding(mel) + theirs.mel_pos_embedding(mel)
    logits = theirs.get_logits(torch.cat([voice, speed], 1), text_rows, theirs.text_head, mel_rows, theirs.mel_head)
    return torch.cat([torch.nn.functional.cross_entropy(found, targets, reduction="none")[0, :-1]
                      for found, targets in zip(logits, (text_targets, mel_targets), strict=True)])
