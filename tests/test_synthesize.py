"""Speaking with a checkpoint: cached generation is the trainer's model, lines do not disturb each other, a run can be
watched, and a faulty input is one clear error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import GPT, ROOT, TOKENIZER, TRAINER, call_trainer, data_args, read_jsonl, write_manifest
from released_folder import CONFIG, CONFIG_25

from tools import (
    build_pairs,
    compare_checkpoints,
    generation,
    preprocess,
    speech_codec,
    synthesize,
    watch_training,
)
from tools._common import ToolError, sha256_of
from tools.amharic_text import TEXT_RULES, read_aloud
from tools.codes_to_sound import CodecSound, Prompt
from tools.generation import Line, Sampling, Synthesizer, choose_codes, generate_codes
from tools.model_folder import FOR_SOUND, FOR_SOUND_25, files_in, parts_of
from trainers import train_gpt_v2 as trainer

RATE = 22050
WORDS = ["ሰላም", "ቤት", "ውሃ", "ልጅ", "መንገድ", "ፀሐይ", "አበባ", "ከተማ"]


def tones(seed: int, seconds: float = 1.0) -> np.ndarray:
    """A gliding harmonic sound with noise, different for every seed. float32 within -1 to 1."""
    rng = np.random.default_rng(seed)
    clock = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(150 * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(1, 4) * clock))) / RATE
    sound = sum(rng.uniform(0.1, 1) * np.sin(k * phase) / k for k in range(1, 12))
    return (0.1 * sound + 0.01 * rng.standard_normal(len(clock))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A data set of 24 short sounds of two voices in one folder, and the output directory of three training steps."""

    data: Path
    output_dir: Path

    @property
    def codec(self) -> Path:
        return self.data / "speech_codec.pt"

    @property
    def checkpoint(self) -> Path:
        return self.output_dir / "latest.pth"

    def arguments(self) -> list[str]:
        """What every call of the program needs."""
        return ["--checkpoint", str(self.checkpoint), "--prompt", str(self.data / "0.wav"), "--codec", str(self.codec)]


def make_trained(folder: Path) -> Trained:
    """From sounds to a checkpoint with the programs that a user would run."""
    made, rows = Trained(folder / "data", folder / "out"), []
    made.data.mkdir()
    for i in range(24):
        soundfile.write(made.data / f"{i}.wav", tones(i, 0.8 + 0.05 * (i % 5)), RATE, subtype="PCM_16")
        rows.append({"id": f"r{i}", "speaker": f"s{i % 2}", "audio": f"{i}.wav", "split": "train" if i < 18 else "val",
                     "text": f"{WORDS[i % 8]} {WORDS[(i // 3) % 8]} {WORDS[(i // 5) % 8]}"})
    recordings = made.data / "recordings.jsonl"
    recordings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    speech_codec.main(["train", "--recordings", str(recordings), "--output", str(made.codec), "--steps", "3",
                       "--num-codes", "64", "--pca-dim", "8", "--kmeans-iterations", "3", "--width", "16",
                       "--batch-size", "4", "--segment", "8"])
    preprocess.main(["--recordings", str(recordings), "--codec", str(made.codec), "--tokenizer", str(TOKENIZER),
                     "--output-dir", str(made.data), "--prompts-per-speaker", "2", "--model-dim", "32"])
    build_pairs.main(["--data-dir", str(made.data)])
    (made.data / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT}))
    call_trainer(*data_args(made.data), "--output-dir", made.output_dir, "--max-steps", 3, "--batch-size", 4,
                 "--grad-accumulation", 1, "--learning-rate", 0.01)
    return made


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Read only."""
    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def model() -> trainer.UnifiedVoiceGPT:
    """A model with large random weights, so that every code depends on all that comes before it."""
    config = trainer.model_config_from({**GPT, "number_text_tokens": 50}, "conftest")
    model = trainer.UnifiedVoiceGPT(config)
    trainer.init_fresh_weights(model, 5, 2.0)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3, generator=generator)
            if name == "mel_head.bias":
                weight[config.stop_mel_token] = STOP_BIAS
    return model.double().eval().requires_grad_(False)


def make_line(length: int, seed: int = 0) -> Line:
    """A line of `length` text ids in a voice of its own."""
    rng = np.random.default_rng([seed, length])
    prompt = Prompt(torch.from_numpy(rng.normal(0, 0.5, (32, 32)).astype(np.float32)),
                    torch.from_numpy(rng.normal(0, 0.5, 32).astype(np.float32)), {"statistics": torch.zeros(2, 80)})
    return Line(f"{seed} {length}", rng.integers(2, 50, length).tolist(), prompt)


STOP_BIAS = 1.0  # lets lines end at different lengths
LINES = [make_line(length) for length in (5, 30, 1, 12, 29, 2)]


def sample_of(line: Line, codes: list[int]) -> trainer.Sample:
    return trainer.Sample(np.array(line.text_ids), np.array(codes, dtype=np.int64), line.prompt.condition.numpy(),
                          line.prompt.emo_vec.numpy())


# Generation


def test_cached_logits_are_those_of_the_trainers_forward_pass_at_every_position(model):
    codes = np.random.default_rng(1).integers(0, 64, (len(LINES), 60))
    single = trainer.UnifiedVoiceGPT(model.config)
    single.load_state_dict(model.state_dict())
    rows, ends = generation.prefix_rows(model, LINES)
    cache = generation.KVCache(model, len(LINES), int(ends.max()) + 60)
    every = torch.arange(len(LINES))
    with torch.no_grad():
        expected = [single(trainer.collate_packed([sample_of(line, row.tolist())], model.config))[1]
                    for line, row in zip(LINES, codes, strict=True)]
        x = generation.extend(model, cache, rows, torch.zeros_like(ends))[every, ends - 1]
        for step in range(61):
            logits = model.mel_head(model.final_norm(model.gpt.ln_f(x)))
            for b in range(len(LINES)):
                torch.testing.assert_close(logits[b].float(), expected[b][step], atol=2e-5, rtol=1e-5)
            if step < 60:
                row = model.mel_embedding(torch.from_numpy(codes[:, step]))
                row = row + model.mel_pos_embedding.emb(torch.tensor(step + 1))
                x = generation.extend(model, cache, row[:, None], ends + step)[:, 0]


def greedy_by_recomputing_everything(model: trainer.UnifiedVoiceGPT, line: Line) -> list[int]:
    codes: list[int] = []
    while len(codes) < model.config.max_code_len:
        _, logits = model(trainer.collate_packed([sample_of(line, codes)], model.config))
        logits[-1, model.config.start_mel_token] = -torch.inf
        code = int(logits[-1].argmax())
        if code == model.config.stop_mel_token:
            break
        codes.append(code)
    return codes


def test_greedy_codes_are_those_of_computing_everything_anew(model):
    single = trainer.UnifiedVoiceGPT(model.config)
    single.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = [greedy_by_recomputing_everything(single, line) for line in LINES]
    spoken = generate_codes(model, LINES, Sampling(greedy=True))
    assert [line.codes for line in spoken] == expected
    assert len({len(codes) for codes in expected}) > 2 and any(line.stopped for line in spoken)


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(seed=3), Sampling(
    temperature=2.0, top_k=0, top_p=1.0, seed=4), Sampling(repetition_penalty=1.5, seed=5)])
def test_a_line_gets_the_same_codes_alone_and_beside_any_others(model, sampling):
    together = generate_codes(model, LINES, sampling)
    assert [generate_codes(model, [line], sampling)[0] for line in LINES] == together
    assert generate_codes(model, LINES[::-1], sampling) == together[::-1]
    assert generate_codes(model, [*LINES[:2], *[make_line(30, seed) for seed in range(1, 9)]], sampling
                          )[:2] == together[:2]


def test_the_seed_chooses_the_take(model):
    takes = [generate_codes(model, LINES, Sampling(temperature=1.5, top_p=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert takes[0] == takes[1] != takes[2]


def test_of_several_takes_the_likeliest_that_ended_itself_is_kept(model):
    sampling = Sampling(temperature=1.5, top_p=1.0, max_length=12, seed=5)
    takes = [generate_codes(model, LINES, dataclasses.replace(sampling, seed=seed)) for seed in (5, 6, 7)]
    kept = generation.likeliest_takes(model, LINES, dataclasses.replace(sampling, takes=3))
    for line, *choices in zip(kept, *takes, strict=True):
        ended = [take for take in choices if take.stopped] or choices
        assert line == max(ended, key=lambda take: take.log_probability / (len(take.codes) + take.stopped))
    assert all(kept != take for take in takes)


def test_the_log_probability_of_a_line_is_the_models_own_of_its_codes_and_its_end(model):
    single, stop = trainer.UnifiedVoiceGPT(model.config), model.config.stop_mel_token
    single.load_state_dict(model.state_dict())
    for line, spoken in zip(LINES, generate_codes(model, LINES, Sampling(temperature=1.5, top_p=1.0)), strict=True):
        with torch.no_grad():
            logits = single(trainer.collate_packed([sample_of(line, spoken.codes)], model.config))[1]
        choices = [*range(model.config.code_count), stop]
        logits = torch.full_like(logits, -torch.inf).index_copy(1, torch.tensor(choices), logits[:, choices])
        said = torch.tensor([*spoken.codes, stop][: len(spoken.codes) + spoken.stopped])
        expected = logits.log_softmax(1)[torch.arange(len(said)), said].sum()
        assert spoken.log_probability == pytest.approx(float(expected), abs=1e-3)


def test_lines_of_one_batch_do_not_share_their_draws():
    takes = [(LINES[0], 1), (LINES[1], 1), (LINES[0], 2)]
    draws = [generation.draws_of(line, seed, 5).tolist() for line, seed in takes]
    assert len({draw for row in draws for draw in row}) == 15
    assert generation.draws_of(LINES[0], 1, 9)[:5].tolist() == draws[0]


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-9)])
def test_the_narrowest_settings_are_greedy(model, sampling):
    assert generate_codes(model, LINES, sampling) == generate_codes(model, LINES, Sampling(greedy=True))


def test_no_line_is_longer_than_asked_and_one_that_was_cut_off_says_so(model):
    spoken = generate_codes(model, LINES, Sampling(temperature=1.5, top_p=1.0, max_length=4))
    assert max(len(line.codes) for line in spoken) == 4
    assert all(line.stopped == (len(line.codes) < 4) for line in spoken)


def test_only_real_codes_are_spoken(model):
    wild = Sampling(temperature=100.0, top_k=0, top_p=1.0)
    codes = [code for line in generate_codes(model, LINES, wild) for code in line.codes]
    assert set(codes) <= set(range(64)) and len(set(codes)) > 30


def drawn(logits: list[float], sampling: Sampling, repeated: tuple[int, ...] = ()) -> list[float]:
    """How often each code is chosen over an even grid of draws."""
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    mask = torch.zeros(10_000, len(logits), dtype=torch.bool)
    mask[:, list(repeated)] = True
    rows = torch.tensor(logits, dtype=torch.float64).expand(10_000, -1)
    return (torch.bincount(choose_codes(rows, mask, grid, sampling), minlength=len(logits)) / 10_000).tolist()


LOGS = [float(np.log(share)) for share in (0.1, 0.5, 0.15, 0.25)]
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0)


@pytest.mark.parametrize(("sampling", "expected"), [
    (PLAIN, [0.1, 0.5, 0.15, 0.25]),
    (dataclasses.replace(PLAIN, temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    (dataclasses.replace(PLAIN, top_k=2), [0, 2 / 3, 0, 1 / 3]),
    (dataclasses.replace(PLAIN, top_p=0.7), [0, 2 / 3, 0, 1 / 3]),
    (dataclasses.replace(PLAIN, top_p=0.76), [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),
    (dataclasses.replace(PLAIN, top_k=3, top_p=0.8), [0, 2 / 3, 0, 1 / 3]),
    (dataclasses.replace(PLAIN, greedy=True), [0, 1, 0, 0]),
])
def test_codes_are_drawn_with_the_shares_that_the_settings_leave_them(sampling, expected):
    assert drawn(LOGS, sampling) == pytest.approx(expected, abs=2e-4)


def test_the_repetition_penalty_lowers_codes_that_the_line_has_whatever_their_sign():
    penalised = dataclasses.replace(PLAIN, repetition_penalty=2.0)
    expected = torch.tensor([0.5, -2.0, 0.5]).softmax(0).tolist()
    assert drawn([1.0, -1.0, 0.5], penalised, (0, 1)) == pytest.approx(expected, abs=2e-4)


# The program


def run_program(*args: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tools.synthesize", *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, **options)


def error_of(*args: object) -> str:
    with pytest.raises(ToolError) as stop:
        synthesize.main([str(arg) for arg in args])
    assert "\n" not in str(stop.value)
    return str(stop.value)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_one_text_becomes_a_recording_and_a_picture_and_the_speed_is_told(trained, tmp_path):
    done = run_program(*trained.arguments(), "--text", "ሰላም ቤት", "--output", tmp_path / "hello.wav")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "real-time factor" in done.stdout and "ሰላም ቤት" in done.stdout
    waveform, rate = soundfile.read(tmp_path / "hello.wav")
    assert rate == RATE and len(waveform) > 0 and (tmp_path / "hello.png").stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 2


def test_two_checkpoints_say_one_text_each_as_it_would_alone_and_no_sound_is_written_over(trained, tmp_path):
    other, rest = trained.output_dir / "model_step1.pth", ["--text", "ቤት ውሃ", "--max-length", "10"]
    arguments = [*trained.arguments(), "--other", str(other), *rest, "--output-dir", str(tmp_path)]
    compare_checkpoints.main(arguments)
    for name, checkpoint in (("a", trained.checkpoint), ("b", other)):
        synthesize.main([*trained.arguments(), "--checkpoint", str(checkpoint), *rest, "--output",
                         str(tmp_path / "alone.wav")])
        assert (tmp_path / f"{name}.wav").read_bytes() == (tmp_path / "alone.wav").read_bytes()
    with pytest.raises(ToolError, match="has a.wav already"):
        compare_checkpoints.main(arguments)


@pytest.fixture
def lines_file(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("ሰላም\n\nቤት ውሃ\nልጅ መንገድ ፀሐይ\n", encoding="utf-8")
    return path


def test_lines_of_a_file_sound_as_they_do_alone(trained, lines_file, tmp_path):
    synthesize.main([*trained.arguments(), "--text-file", str(lines_file), "--output-dir", str(tmp_path / "out")])
    assert [row["name"] for row in read_jsonl(tmp_path / "out/spoken.jsonl")] == ["0001", "0003", "0004"]
    synthesize.main([*trained.arguments(), "--text", "ቤት ውሃ", "--output", str(tmp_path / "alone.wav")])
    assert (tmp_path / "alone.wav").read_bytes() == (tmp_path / "out/0003.wav").read_bytes()


def test_only_new_and_changed_lines_are_spoken_again(trained, lines_file, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [*trained.arguments(), "--text-file", str(lines_file), "--output-dir", str(out)]
    synthesize.main(argv)
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    synthesize.main(argv)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == first
    assert "3 of 3 lines are there already" in capsys.readouterr().out
    lines_file.write_text("ሰላም\n\nአበባ\nልጅ መንገድ ፀሐይ\n", encoding="utf-8")
    (out / "0004.wav").unlink()
    synthesize.main(argv)
    assert "1 of 3 lines are there already" in capsys.readouterr().out
    again = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert again["0001.wav"] == first["0001.wav"] and again["0003.wav"] != first["0003.wav"]
    synthesize.main([*argv, "--seed", "1"])
    assert "already" not in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_with_the_same_files(trained, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"{a} {b}\n" for a in WORDS for b in WORDS[:5]), encoding="utf-8")
    argv = [*trained.arguments(), "--text-file", str(lines), "--max-length", "3"]
    command = [sys.executable, "-m", "tools.synthesize", *argv, "--output-dir", str(tmp_path / "killed")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "killed/spoken.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    done = run_program(*argv, "--output-dir", tmp_path / "killed")
    assert done.returncode == 0 and "of 40 lines are there already" in done.stdout, done.stdout
    synthesize.main([*argv, "--output-dir", str(tmp_path / "whole")])
    left = {name: digest for name, digest in hashes(tmp_path / "killed").items() if not name.startswith(".")}
    assert left == hashes(tmp_path / "whole") and len(left) > 40


def text_of(tokens: int) -> str:
    """A text of exactly so many tokens: the tokenizer has one for each letter and one for the start of a word."""
    return "ሰ" * (tokens - 1)


def test_lines_of_an_interrupted_other_take_are_not_taken_for_those_of_the_first(trained, lines_file, tmp_path,
                                                                                monkeypatch):
    out = tmp_path / "out"
    argv = [*trained.arguments(), "--text-file", str(lines_file), "--output-dir", str(out)]
    synthesize.main(argv)
    first, write = hashes(out), synthesize.write_sound

    def write_and_stop(*args):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthesize, "write_sound", write_and_stop)
        synthesize.main([*argv, "--seed", "1"])
    synthesize.main(argv)
    assert hashes(out) == first


def test_an_empty_sound_file_is_spoken_again(trained, lines_file, tmp_path):
    out = tmp_path / "out"
    argv = [*trained.arguments(), "--text-file", str(lines_file), "--output-dir", str(out)]
    synthesize.main(argv)
    first = hashes(out)
    (out / "0001.wav").write_bytes(b"")
    synthesize.main(argv)
    assert hashes(out) == first


def test_a_large_model_speaks_fewer_lines_at_once():
    small = trainer.model_config_from({**GPT, "number_text_tokens": 50}, "conftest")
    large = dataclasses.replace(small, model_dim=1280, layers=24, heads=20, max_text_tokens=600, max_mel_tokens=1815)
    assert [generation.lines_at_once(config, config.max_code_len) for config in (small, large)] == [16, 1]
    assert generation.lines_at_once(large, 100) == 5


def test_texts_as_long_as_the_model_allows_are_spoken_and_longer_words_refused(trained, tmp_path):
    output = ["--output", tmp_path / "a.wav"]
    synthesize.main([str(arg) for arg in [*trained.arguments(), *output, "--text", text_of(30), "--max-length", 3]])
    message = error_of(*trained.arguments(), *output, "--text", f"ሰላም። {text_of(31)}።")
    word = "ሰ" * 20
    assert message == f"--text: the word that begins with {word!r} is 32 tokens, the model takes 30. Split it"


def test_a_long_text_is_spoken_sentence_by_sentence_with_pauses_whatever_is_beside_it(trained):
    synthesizer = Synthesizer(trained.checkpoint, CodecSound(trained.codec), None)
    prompt, sampling = synthesizer.prompt(trained.data / "0.wav"), Sampling(max_length=4, seed=3)
    sentences = ["ሰላም ቤት ውሃ ልጅ።", "መንገድ ፀሐይ አበባ!", "ከተማ ሰላም ውሃ፣ ልጅ።"]
    long = synthesizer.line(" ".join(sentences), prompt, "--text")
    assert len(long.text_ids) > GPT["max_text_tokens"] and long.text == " ".join(sentences)
    assert [part.text for part in long.parts] == [" ".join(sentences[:2]), sentences[2]]
    short = [synthesizer.line(part.text, prompt, "--text") for part in long.parts]
    assert not any(line.parts for line in short)
    (whole, sound), *alone = synthesizer.speak([long, *short], sampling)
    assert whole.codes == alone[0][0].codes + alone[1][0].codes
    silence = torch.zeros(round(generation.PAUSE * synthesizer.sound.sample_rate))
    assert torch.equal(sound, torch.cat([alone[0][1], silence, alone[1][1]]))
    silent = generation.joined([(generation.Spoken([], True), torch.zeros(0)), alone[0]], 5)
    assert not silent[0].stopped and len(silent[1]) == 5 + len(alone[0][1])


# IndexTTS2's sound; what needs its package is in test_indextts2_sound.py


def test_latents_are_what_the_model_knows_before_each_code_whoever_chose_them(model):
    spoken = generate_codes(model, LINES, Sampling(max_length=20, seed=1))
    assert len({len(line.codes) for line in spoken}) > 1
    for line, found in zip(LINES, spoken, strict=True):
        expected = generation.latents_of(model, line, torch.tensor(found.codes, dtype=torch.int64))
        assert found.latents.shape == (len(found.codes), 32)
        assert torch.allclose(found.latents, expected, atol=1e-6)


@pytest.mark.parametrize(("config", "own", "parts", "package"), [
    (CONFIG, "IndexTTS-2", FOR_SOUND, "indextts"), (CONFIG_25, "IndexTTS-2.5", FOR_SOUND_25, "indextts25")])
def test_a_model_folder_that_is_not_whole_is_one_list_and_a_missing_package_one_line(
        trained, tmp_path, monkeypatch, config, own, parts, package):
    voice = ["--checkpoint", trained.checkpoint, "--prompt", trained.data / "0.wav", "--text", "ሰላም", "--output",
             tmp_path / "a.wav", "--model-dir", tmp_path / "checkpoints"]
    assert "no such folder" in error_of(*voice)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    message = error_of(*voice)
    for name in ("gpt.pth", "wav2vec2bert_stats.pt", "s2mel.pth", "w2v-bert-2.0", "campplus_cn_common.bin", "bigvgan"):
        assert name in message
    assert f"`hf download IndexTeam/{own} " in message and "`hf download funasr/campplus" in message
    for name in parts[1:]:
        part = parts_of(config)[name]
        for path in files_in(part, folder / part.place):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((2).to_bytes(8, "little") + b"{}")  # an empty .safetensors file, else anything
    monkeypatch.setitem(sys.modules, package, None)
    message = error_of(*voice)
    assert message.endswith("Install them with `pip install -r requirements-indextts.txt`") and "\n" not in message
    assert (ROOT / "requirements-indextts.txt").is_file()


def test_a_codec_and_a_model_folder_cannot_be_combined(trained, tmp_path):
    argv = [*trained.arguments(), "--text", "ሰላም", "--output", tmp_path / "a.wav"]
    assert "--codec cannot be combined with --model-dir" in error_of(*argv, "--model-dir", tmp_path)
    assert "--device cuda: the embedded codec works on the CPU" in error_of(*argv, "--device", "cuda")


@pytest.mark.parametrize(("text", "message"), [
    ("hello", "--text: the tokenizer has no piece for 'hello'"), ("  ", "--text: the transcript is empty"),
    ("“።”", "--text: the transcript is empty"), ("ሰላም мир", "no piece for 'мир'"),
])
def test_a_text_that_the_model_cannot_read_is_named(trained, tmp_path, text, message):
    assert message in error_of(*trained.arguments(), "--text", text, "--output", tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())


def test_a_text_of_another_language_is_not_asked_for_in_ethiopic_letters(trained, tmp_path):
    message = error_of(*trained.arguments(), "--language", "cs", "--text", "ano", "--output", tmp_path / "a.wav")
    assert "no piece for 'ano'. Spell it in letters and marks that it has" in message


def test_a_faulty_line_of_a_file_is_named_before_anything_is_spoken(trained, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("ሰላም\nhello\n", encoding="utf-8")
    message = error_of(*trained.arguments(), "--text-file", lines, "--output-dir", tmp_path / "out")
    assert f"{lines}, line 2: the tokenizer has no piece for 'hello'" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "No such file"), ("ሰላም".encode("utf-16"), "not UTF-8 text at byte 0"), (b" \n\n", "holds no line to speak"),
])
def test_an_unusable_text_file_is_named(trained, tmp_path, content, message):
    lines = tmp_path / "lines.txt"
    if content is not None:
        lines.write_bytes(content)
    line = error_of(*trained.arguments(), "--text-file", lines, "--output-dir", tmp_path / "out")
    assert str(lines) in line and message in line


@pytest.mark.parametrize(("content", "message"), [
    (b"not sound", "cannot be read as sound"), (b"", "cannot be read as sound"), (None, "no such recording"),
    (np.zeros(RATE), "under 0.1 s of sound"), (tones(1, 0.3), "0.30 s of sound say too little about a voice"),
])
def test_an_unusable_prompt_is_named(trained, tmp_path, content, message):
    path = tmp_path / "prompt.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, RATE)
    argv = ["--checkpoint", trained.checkpoint, "--codec", trained.codec, "--prompt", path, "--text", "ሰላም"]
    line = error_of(*argv, "--output", tmp_path / "a.wav")
    assert str(path) in line and message in line and not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--temperature", "0"], "--temperature 0.0: give a number above 0, or --greedy"),
    (["--temperature", "nan"], "--temperature nan"), (["--top-p", "1.5"], "--top-p 1.5"),
    (["--top-p", "0"], "--top-p 0"),
    (["--top-k", "-1"], "--top-k -1"), (["--repetition-penalty", "0"], "--repetition-penalty 0"),
    (["--max-length", "62"], "--max-length 62: this model speaks at most 61 codes"),
])
def test_senseless_settings_are_refused(trained, tmp_path, flags, message):
    assert message in error_of(*trained.arguments(), "--text", "ሰላም", "--output", tmp_path / "a.wav", *flags)


@pytest.mark.parametrize(("flags", "message"), [
    ([], "nothing to speak: give --text, --text-file or --watch"),
    (["--text", "ሰላም"], "--text: --output and --checkpoint and --prompt must be given too"),
    (["--text-file", "a", "--prompt", "p", "--checkpoint", "c"], "--output-dir must be given too"),
    (["--text", "ሰላም", "--output", "a.wav", "--prompt", "p", "--checkpoint", "c", "--output-dir", "d"],
     "--output-dir cannot be combined with --text"),
    (["--watch", "d", "--checkpoint", "c"], "--checkpoint cannot be combined with --watch"),
    (["--watch", "d", "--text-file", "c"], "--prompt must be given too"),
    (["--text", "ሰላም", "--output", "a.mp3", "--prompt", "p", "--checkpoint", "c"], "a.mp3: must end in .wav"),
    (["--watch", "nowhere"], "nowhere: no such directory. Start the training first"),
])
def test_flags_that_do_not_fit_together_are_refused(flags, message):
    assert message in error_of(*flags)


def test_files_that_do_not_fit_together_are_refused(trained, tmp_path):
    argv = ["--checkpoint", trained.checkpoint, "--prompt", trained.data / "0.wav", "--text", "ሰላም", "--output",
            tmp_path / "a.wav"]
    said = error_of(*argv)
    assert f"num_codes is 64 in {trained.checkpoint}, but 1024 in --codec processed_data/speech_codec.pt. Give" in said
    (tmp_path / "t.model").write_bytes(preprocess_tokenizer())
    said = error_of(*argv, "--codec", trained.codec, "--tokenizer", tmp_path / "t.model")
    assert f"tokenizer_sha256 is {sha256_of(TOKENIZER)[:12]} in {trained.checkpoint}, but " in said
    assert f"in --tokenizer {tmp_path / 't.model'}. Give the tokenizer that the checkpoint was trained with" in said
    cut = tmp_path / "cut.pth"
    cut.write_bytes(trained.checkpoint.read_bytes()[:5000])
    assert str(cut) in error_of("--checkpoint", cut, *argv[2:], "--codec", trained.codec)


def preprocess_tokenizer() -> bytes:
    from tools.train_tokenizer import train_tokenizer

    return train_tokenizer(["ሰላም ለዓለም"], "char", 0)


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_another_codec_of_as_many_codes_is_refused(trained, tmp_path):
    codec = speech_codec.SpeechCodec.load(trained.codec)
    codec.codebook.copy_(codec.codebook.flip(0))
    codec.save(tmp_path / "other.pt")
    content = torch.load(trained.checkpoint, weights_only=True)
    other = CodecSound(tmp_path / "other.pt")
    Synthesizer(trained.checkpoint, other, TOKENIZER)  # data of a program that does not record it
    content["manifests"]["train"][0]["codec_sha256"] = sha256_of(trained.codec)
    trainer.write_checkpoint(tmp_path / "a.pth", content)
    Synthesizer(tmp_path / "a.pth", CodecSound(trained.codec), TOKENIZER)
    with pytest.raises(ToolError, match="codec_sha256 is .* in .*a.pth, but .* in --codec .*other.pt. Give the codec"):
        Synthesizer(tmp_path / "a.pth", other, TOKENIZER)


@pytest.mark.parametrize(("made_with", "rules"), [({}, 1), ({"text_rules": 1}, 1), ({"text_rules": TEXT_RULES}, 2)])
def test_a_checkpoint_reads_by_the_text_rules_it_was_trained_under(trained, tmp_path, capsys, made_with, rules):
    content = torch.load(trained.checkpoint, weights_only=True)
    content["made_with"] = made_with
    trainer.write_checkpoint(tmp_path / "a.pth", content)
    synthesizer = Synthesizer(tmp_path / "a.pth", CodecSound(trained.codec), TOKENIZER)
    prompt = synthesizer.prompt(trained.data / "0.wav")
    text = "በ5 ዓ.ም."
    assert synthesizer.line(text, prompt, "here").text == read_aloud(text, rules=rules).text
    synthesizer.line("ሰላም ☺", prompt, "here")
    assert ("here: not said: ☺" in capsys.readouterr().out) == (rules == 2)


def test_a_checkpoint_of_unknown_text_rules_is_one_clear_error(trained, tmp_path):
    content = torch.load(trained.checkpoint, weights_only=True)
    content["made_with"] = {"text_rules": TEXT_RULES + 1}
    trainer.write_checkpoint(tmp_path / "a.pth", content)
    said = error_of("--checkpoint", tmp_path / "a.pth", *trained.arguments()[2:], "--text", "ሰላም", "--output",
                    tmp_path / "a.wav")
    assert f"a.pth: made under text rules {TEXT_RULES + 1}, and this program knows 1 and 2. Take a newer" in said


def test_a_text_of_another_language_is_not_read_as_amharic(trained, tmp_path):
    argv = [*trained.arguments(), "--text", "5", "--output", tmp_path / "a.wav", "--max-length", 9]
    assert "no piece for '5'" in error_of(*argv, "--language", "cs")
    synthesizer = Synthesizer(trained.checkpoint, CodecSound(trained.codec), None)
    assert synthesizer.line("5", synthesizer.prompt(trained.data / "0.wav"), "here", "am-ET").text == "አምስት"
    data = tmp_path / "data"
    shutil.copytree(trained.data, data)
    rows = read_jsonl(data / "val_pairs.jsonl")
    write_manifest(data / "val_pairs.jsonl", [row | {"target_text": "5", "target_language": "cs"} for row in rows])
    synthesizer.checkpoint["manifests"] = {"val": [{"path": str(data / "val_pairs.jsonl")}]}
    with pytest.raises(ToolError, match="no piece for '5'"):
        watch_training.validation_lines(synthesizer)


def test_a_checkpoint_knows_the_codec_of_its_training_data(trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(trained.data, data)
    (data / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT, "dataset": {"codec_sha256": "0" * 64}}))
    call_trainer(*data_args(data), "--output-dir", tmp_path / "out", "--max-steps", 1)
    done = run_program("--checkpoint", tmp_path / "out/latest.pth", "--prompt", data / "0.wav", "--codec",
                       trained.codec, "--text", "ሰላም", "--output", tmp_path / "a.wav")
    assert done.returncode == 1 and f"codec_sha256 is 000000000000 in {tmp_path}/out/latest.pth, but" in done.stderr


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_file(trained, tmp_path):
    done = run_program(*trained.arguments(), "--text", "ሰላም", "--output", tmp_path / "a.wav",
                       preexec_fn=small_files_only)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"[Error] {tmp_path}: cannot be written" in done.stderr and not (tmp_path / "a.wav").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# Watching a training


def events_of(folder: Path) -> dict[str, list[int]]:
    """Steps of every sound and picture that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    shown = {f"audio {tag}": [event.step for event in events.Audio(tag)] for tag in events.Tags()["audio"]}
    return shown | {f"image {tag}": [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def watching(trained: Trained, output_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.synthesize", "--watch", str(output_dir), "--codec", str(trained.codec),
               "--max-length", "10"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process: subprocess.Popen[str], found: Callable[[str], bool]) -> str:
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if found(line):
            return read
    raise AssertionError(f"the program ended early:\n{read}")


def test_every_new_checkpoint_of_a_run_is_spoken_until_the_run_has_finished(trained, tmp_path):
    out, command = tmp_path / "out", [*map(str, [*data_args(trained.data), "--output-dir", tmp_path / "out"]),
                                      "--batch-size", "4", "--grad-accumulation", "1", "--resume", "auto"]
    call_trainer(*command, "--max-steps", 2, "--save-interval", 1, "--learning-rate", 0.01)
    (out / "last_exit.json").unlink()  # as while a run goes on
    voice = next(out.glob("logs/run_*")) / "voice"
    with watching(trained, out) as process:
        read_until(process, lambda line: "step 2: 4 sentences" in line)
        (out / "latest.pth").unlink()  # not written through: it is another name of model_step2.pth
        (out / "latest.pth").write_bytes((out / "model_step1.pth").read_bytes()[:5000])  # half copied
        read_until(process, lambda line: "Waiting for the next one" in line)
        assert process.poll() is None
        (out / "latest.pth").unlink()
        done = subprocess.run([sys.executable, str(TRAINER), *command, "--max-steps", "4", "--save-interval", "4"],
                              cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "step 4: 4 sentences" in rest and "the training has finished" in rest, rest
    shown = events_of(voice)
    assert [2, 4] in shown.values() and {step for steps in shown.values() for step in steps} == {2, 4}, shown
    with watching(trained, out) as process:  # nothing is shown twice
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "sentences" not in rest and events_of(voice) == shown


def test_ctrl_c_ends_the_watching_of_a_run_without_checkpoints(trained, tmp_path):
    with watching(trained, tmp_path) as process:
        read_until(process, lambda line: "watching" in line)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output


def test_a_damaged_checkpoint_of_a_finished_run_is_an_error(trained, tmp_path):
    shutil.copytree(trained.output_dir, tmp_path / "out")
    (tmp_path / "out/latest.pth").write_bytes(b"hello")
    assert "latest.pth" in error_of("--watch", tmp_path / "out", "--codec", trained.codec)


def test_watching_on_a_full_disk_is_one_clear_error(trained, tmp_path):
    shutil.copytree(trained.output_dir, tmp_path / "out")
    done = run_program("--watch", tmp_path / "out", "--codec", trained.codec, preexec_fn=small_files_only)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "voice: cannot be written" in done.stderr


def test_watched_sentences_can_be_given(trained, tmp_path, lines_file):
    shutil.copytree(trained.output_dir, tmp_path / "out")
    synthesize.main(["--watch", str(tmp_path / "out"), "--codec", str(trained.codec), "--text-file", str(lines_file),
                     "--prompt", str(trained.data / "0.wav")])
    shown = events_of(next((tmp_path / "out").glob("logs/run_*")) / "voice")
    assert sorted(shown) == sorted(f"{kind} sentence_{i}" for kind in ("audio", "image") for i in (1, 2, 3))


def test_sentences_whose_prompt_is_too_short_are_not_watched(trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(trained.data, data)
    rows = read_jsonl(data / "val_pairs.jsonl")
    for row in rows[1:]:
        row["prompt_duration"] = 0.4
    write_manifest(data / "val_pairs.jsonl", rows)
    synthesizer = Synthesizer(trained.checkpoint, CodecSound(trained.codec), None)
    synthesizer.checkpoint["manifests"] = {"val": [{"path": str(data / "val_pairs.jsonl")}]}
    assert [line.text for line in watch_training.validation_lines(synthesizer)] == [rows[0]["target_text"]]
    write_manifest(data / "val_pairs.jsonl", rows[1:])
    with pytest.raises(ToolError, match="0.5 s of sound"):
        watch_training.validation_lines(synthesizer)


def test_the_synthesizer_is_what_other_programs_build_on(trained):
    synthesizer = Synthesizer(trained.checkpoint, CodecSound(trained.codec), None)
    line = synthesizer.line("ሰላም", synthesizer.prompt(trained.data / "0.wav"), "here")
    assert synthesizer.model.speed_emb.weight.dtype == torch.float64  # see generate_codes
    (spoken, waveform), = synthesizer.speak([line], Sampling(max_length=5))
    assert len(waveform) == len(spoken.codes) * synthesizer.sound.codec.config.samples_per_code
