"""Speaking with released IndexTTS-2.5 weights, tiny and random: the sound, and the greedily chosen codes, are those of
the package indextts25-inference, whose own inference loads an exported folder as it is.

For the virtual environment of requirements-indextts.txt: `make test-indextts`.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import call_trainer, read_jsonl, trainer
from released_folder import CHANNELS, CONFIG, CONFIG_25, make_released_folder, make_released_folder_25
from released_sound import add_sound
from test_indextts2_features import make_babble
from test_indextts2_sound import RATE, TEXTS, error_of, write_voice

from tools import build_pairs, evaluate_voice, export_checkpoint, preprocess, synthesize
from tools.generation import Line, Sampling, Synthesizer, generate_codes
from tools.indextts2_sound import IndexTTS2Sound, IndexTTS25Sound
from tools.model_folder import TIKTOKEN
from tools.sound_files import load_recording

pytestmark = [pytest.mark.indextts,
              pytest.mark.skipif(find_spec("indextts25") is None, reason="`make test-indextts` has the package")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its emotion's latent is as wide as the released one, which the package cannot change."""
    return add_sound(make_released_folder_25(tmp_path_factory.mktemp("released") / "checkpoints", emo_width=1024))


@pytest.fixture(scope="module")
def sound(folder: Path) -> IndexTTS25Sound:
    return IndexTTS25Sound(folder, "cpu")


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    recordings, data = make_babble(root / "in", 8), root / "data"
    preprocess.main([*map(str, ("--features", "indextts2.5", "--model-dir", folder, "--tokenizer", folder / TIKTOKEN,
                                "--recordings", recordings / "recordings.jsonl", "--output-dir", data, "--device",
                                "cpu", "--prompts-per-speaker", 2, "--val-share", 0.3, "--jobs", 1))])
    build_pairs.main(["--data-dir", str(data)])
    return data


@pytest.fixture(scope="module")
def checkpoint(folder: Path, data: Path) -> Path:
    call_trainer("--train-manifest", data / "train_pairs.jsonl", "--tokenizer", folder / TIKTOKEN, "--base-checkpoint",
                 folder / "gpt.pth", "--output-dir", data / "out", "--max-steps", 3, "--batch-size", 2,
                 "--grad-accumulation", 1, "--learning-rate", 0.001)
    return data / "out" / "latest.pth"


def greedy_codes(engine: Any, synthesizer: Synthesizer, line: Line) -> tuple[list[int], list[int]]:
    """14 at most, as the package and as we choose them for a line."""
    found = engine.gpt.inference_speech(
        torch.tensor([line.text_ids]), torch.tensor([75]), line.prompt.emo_vec[None], line.prompt.condition,
        max_generate_length=14, do_sample=False, num_beams=1, repetition_penalty=1.0)[0].tolist()
    [spoken] = generate_codes(synthesizer.model, [line], Sampling(greedy=True, max_length=14))
    return [code for code in found if code < 8192], spoken.codes


def engine_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's own inference, whose GPT reads features of 1,024 values: here of ours."""
    from indextts25 import infer_v2_5
    from indextts25.gpt import model_v2

    encoder = model_v2.ConformerEncoder
    monkeypatch.setattr(model_v2, "ConformerEncoder", lambda input_size, **more: encoder(input_size=CHANNELS, **more))
    return infer_v2_5.IndexTTS2(str(folder / "config.yaml"), str(folder), device="cpu")


def test_the_packages_inference_loads_an_exported_folder_and_makes_the_same_codes_and_sound(
        folder, sound, checkpoint, tmp_path, monkeypatch):
    export_checkpoint.main([str(checkpoint), "--model-dir", str(folder), "--output-dir", str(tmp_path / "voice")])
    engine, synthesizer = engine_of(tmp_path / "voice", monkeypatch), Synthesizer(checkpoint, sound, None)
    path = write_voice(tmp_path / "a.wav", 3)
    voice = synthesizer.prompt(path)
    mel, style, content = (voice.sound[name][None] for name in ("mel", "style", "content"))
    audio = load_recording(path, 16000, trim=False)
    with torch.no_grad():
        inputs = engine.extract_features(audio.numpy(), sampling_rate=16000, return_tensors="pt")
        features = engine.get_emb(inputs["input_features"], inputs["attention_mask"])
        theirs = {"content": engine.s2mel.models["length_regulator"](features, ylens=torch.tensor([mel.shape[2]]))[0],
                  "emo_vec": engine.gpt.get_emovec(features, torch.tensor([1024]))[0]}
    assert (voice.sound["content"] - theirs["content"]).abs().max() < 1e-3
    assert (voice.emo_vec - theirs["emo_vec"]).abs().max() < 1e-4 and torch.equal(voice.condition, style)
    for text in TEXTS:
        line = synthesizer.line(text, voice, "test")
        tokens = engine.tokenizer.encode(f"<|am|> {text}", allowed_special="all")
        assert line.text_ids == tokens and line.language == trainer.LANGUAGES.index("am") == 75
        found, own = greedy_codes(engine, synthesizer, line)
        assert found == own and len(set(own)) > 1
        codes = torch.tensor(own)
        with torch.no_grad():
            rows = engine.semantic_codec.decode(codes[None])
            stretched = engine.s2mel.models["length_regulator"](rows, ylens=torch.tensor([int(rows.shape[1] * 1.72)]))
            whole = torch.cat([content, stretched], 1)
            torch.manual_seed(5)
            made = engine.s2mel.models["cfm"].inference(whole, torch.tensor([whole.shape[1]]), mel, style, None, 25,
                                                        inference_cfg_rate=0.7)
            expected = engine.bigvgan(made[:, :, mel.shape[2] :]).squeeze().clamp(-1, 1)
        heard = sound.waveform(codes, torch.zeros(0, 0), voice, 5)
        assert len(heard) == len(expected) == int(2 * len(codes) * 1.72) * 256 and 0.01 < heard.abs().mean() < 0.9
        assert (heard - expected).abs().max() < 1e-4
    engine.infer(str(path), TEXTS[0], str(tmp_path / "theirs.wav"), "am", max_mel_tokens=9)
    assert soundfile.info(tmp_path / "theirs.wav").frames


def test_the_package_loads_a_lora_that_was_merged_on_export_and_whose_base_had_moved(
        folder, data, sound, tmp_path, monkeypatch):
    base = tmp_path / "base.pth"
    base.write_bytes((folder / "gpt.pth").read_bytes())
    call_trainer("--train-manifest", data / "train_pairs.jsonl", "--tokenizer", folder / TIKTOKEN, "--base-checkpoint",
                 base, "--output-dir", tmp_path / "out", "--max-steps", 3, "--batch-size", 2, "--grad-accumulation", 1,
                 "--lora-rank", 4, "--learning-rate", 0.05, "--warmup-steps", 0)
    latest, moved = tmp_path / "out/latest.pth", base.rename(tmp_path / "moved.pth")
    export_checkpoint.main([str(latest), "--model-dir", str(folder), "--output-dir", str(tmp_path / "voice"),
                            "--base-checkpoint", str(moved)])
    engine, synthesizer = engine_of(tmp_path / "voice", monkeypatch), Synthesizer(latest, sound, None, moved)
    line = synthesizer.line(TEXTS[0], synthesizer.prompt(write_voice(tmp_path / "a.wav", 3)), "test")
    found, own = greedy_codes(engine, synthesizer, line)
    assert found == own and len(set(own)) > 1
    plain = torch.load(moved, weights_only=True)["gpt.h.0.mlp.c_fc.weight"]
    assert (engine.gpt.gpt.h[0].mlp.c_fc.weight - plain).abs().max() > 1e-3


def test_a_line_sounds_the_same_alone_and_beside_others(checkpoint, sound, tmp_path):
    synthesizer = Synthesizer(checkpoint, sound, None)
    voices = [synthesizer.prompt(write_voice(tmp_path / f"{i}.wav", i)) for i in range(2)]
    lines = [synthesizer.line(text, voices[i % 2], "test") for i, text in enumerate(TEXTS)]
    sampling = Sampling(max_length=12, seed=2)
    for line, (spoken, waveform) in zip(lines, list(synthesizer.speak(lines, sampling)), strict=True):
        [(alone, heard)] = synthesizer.speak([line], sampling)
        assert alone == spoken and torch.equal(heard, waveform)


def test_all_that_a_waveform_needs_moves_to_another_device_and_the_same_sound_comes_back(folder, sound, tmp_path):
    for kind, where in ((IndexTTS25Sound, folder), (IndexTTS2Sound, add_sound(make_released_folder(tmp_path / "two")))):
        other = kind(where, "cpu")
        assert 1e5 < other.size() < 1e8
        other.move(torch.device("meta"))
        parts = [part for part in vars(other).values() if isinstance(part, torch.nn.Module | torch.Tensor)]
        tensors = [t for part in parts for t in (part.state_dict().values() if isinstance(part, torch.nn.Module)
                                                 else [part])]
        assert {t.device.type for t in [*tensors, other.estimator.transformer.freqs_cis]} == {"meta"}
    layout = trainer.model_config_from({**CONFIG_25["gpt"], "languages": 107}, "test")
    voice, codes = sound.prompt(write_voice(tmp_path / "a.wav", 2), layout), torch.arange(9)
    before = sound.waveform(codes, torch.zeros(0, 0), voice, 1)
    sound.move(torch.device("cpu"))
    assert torch.equal(sound.waveform(codes, torch.zeros(0, 0), voice, 1), before)


def test_the_programs_speak_watch_and_judge(checkpoint, data, folder, tmp_path, capsys):
    write_voice(tmp_path / "a.wav", 1)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    voice = ["--checkpoint", str(checkpoint), "--prompt", str(tmp_path / "a.wav"), "--model-dir", str(folder),
             "--max-length", "9"]
    synthesize.main([*voice, "--text", TEXTS[0], "--output", str(tmp_path / "out.wav")])
    synthesize.main([*voice, "--text-file", str(tmp_path / "texts.txt"), "--output-dir", str(tmp_path / "lines")])
    first, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == RATE and len(first) and np.array_equal(first, soundfile.read(tmp_path / "lines/0001.wav")[0])
    assert len(read_jsonl(tmp_path / "lines/spoken.jsonl")) == 3
    synthesize.main(["--watch", str(checkpoint.parent), "--model-dir", str(folder), "--max-length", "6"])
    assert "step 3: " in capsys.readouterr().out and list(checkpoint.parent.glob("logs/run_*/voice/events.*"))
    evaluate_voice.main(["--checkpoint", str(checkpoint), "--model-dir", str(folder), "--output-dir",
                         str(tmp_path / "spoken"), "--data-dir", str(data), "--texts", "2", "--recogniser",
                         str(tmp_path / "r.pt"), "--json", str(tmp_path / "e.json"), "--max-length", "9"])
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["step"] == 3 and found["synthesis"]["texts"] and found["round_trip"]["cer"] is not None


def test_a_folder_of_the_other_model_and_a_codec_without_its_decoder_are_one_error(folder, checkpoint, sound, tmp_path):
    two = add_sound(make_released_folder(tmp_path / "two"))
    speak = ["--checkpoint", str(checkpoint), "--prompt", str(write_voice(tmp_path / "a.wav", 1)), "--text", TEXTS[0],
             "--output", str(tmp_path / "a.wav"), "--model-dir", str(two)]
    message = error_of(lambda: synthesize.main(speak))
    assert "features is indextts2.5 in" in message and "but indextts2 in --model-dir" in message
    message = error_of(lambda: sound.prompt(tmp_path / "a.wav", trainer.model_config_from(CONFIG["gpt"], "test")))
    assert "its GPT is IndexTTS-2.5's, 32 wide, the checkpoint's IndexTTS-2's" in message
    layout = {**CONFIG_25["gpt"], "languages": 107}
    message = error_of(lambda: IndexTTS2Sound(two, "cpu").prompt(
        tmp_path / "a.wav", trainer.model_config_from(layout, "test")))
    assert "its GPT is IndexTTS-2's, 32 wide, the checkpoint's IndexTTS-2.5's" in message
    other = copytree(folder, tmp_path / "other")
    content = torch.load(other / "codec.pth", weights_only=True)
    del content["model"]["decoder.0.embed.weight"]
    torch.save(content, other / "codec.pth")
    message = error_of(lambda: IndexTTS25Sound(other, "cpu"))
    assert "codec.pth: not the codec's decoder that" in message and "decoder.0.embed.weight" in message
