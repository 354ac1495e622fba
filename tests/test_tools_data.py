"""The programs of tools/ that make data, and the demo set that ships: each test is named after its promise."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from tools import (
    _amharic_text_1,
    amharic_text,
    build_pairs,
    demo_data,
    preprocess,
    sound_files,
    speak,
    speech_codec,
    train_tokenizer,
)
from tools._common import ToolError, atomic_path, run_program, sha256_of
from tools.made_with import of_manifest
from tools.speech_codec import CodecConfig, SpeechCodec, codec_record

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "processed_data"
TOKENIZER = ROOT / "tokenizers" / "amharic_extended_bpe.model"
RATE = 22050


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    return {split: read_rows(DATA / f"{split}_pairs.jsonl") for split in ("train", "val")}


@pytest.fixture(scope="module")
def shipped_codec() -> SpeechCodec:
    return SpeechCodec.load(DATA / "speech_codec.pt")


def tones(seed: int, seconds: float = 1.0) -> np.ndarray:
    """A made-up voice: a gliding harmonic sound with noise, different for every seed. float32 within -1 to 1."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 120 * (1 + seed % 2) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(1, 4) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = sum(rng.uniform(0.1, 1) * np.sin(k * phase) / k for k in range(1, 12))
    return (0.1 * sound + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recordings.jsonl: two speakers, eight recordings each, real words for transcripts."""
    folder = tmp_path_factory.mktemp("recordings")
    words = ["ሰላም", "ቤት", "ውሃ", "ልጅ", "መንገድ", "ፀሐይ", "አበባ", "ከተማ"]
    rows = []
    for index in range(16):
        soundfile.write(folder / f"{index}.wav", tones(index), RATE, subtype="PCM_16")
        rows.append({"id": f"r{index}", "speaker": f"s{index % 2}", "text": f"{words[index // 2]} {words[index % 8]}",
                     "audio": f"{index}.wav"})
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny_codec(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of 32 codes, its decoder trained for three steps."""
    path = tmp_path_factory.mktemp("codec") / "codec.pt"
    speech_codec.main(["train", "--recordings", str(recordings / "recordings.jsonl"), "--output", str(path), "--steps",
                       "3", "--num-codes", "32", "--pca-dim", "8", "--kmeans-iterations", "3", "--width", "16",
                       "--batch-size", "4", "--segment", "8"])
    return path


def error_of(module, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a program as the command line does and returns its one line of error."""
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_program(module.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("[Error] ")
    return lines[0]


# The shipped demo set


def test_validation_texts_and_held_out_words_never_occur_in_training(pairs):
    training = "\n".join(row["target_text"] for row in pairs["train"])
    held_out = (DATA / "held_out_words.txt").read_text(encoding="utf-8").split()
    assert len(set(held_out)) == 600
    assert not [word for word in held_out if word in training]
    assert not [row["target_text"] for row in pairs["val"] if row["target_text"].rstrip("።") in training]


def test_held_out_words_stay_hidden_in_other_spellings_of_the_same_sounds(pairs):
    training = amharic_text.fold_homophones("\n".join(row["target_text"] for row in pairs["train"]))
    held_out = (DATA / "held_out_words.txt").read_text(encoding="utf-8").split()
    assert not [word for word in held_out if amharic_text.fold_homophones(word) in training]


def test_every_held_out_word_occurs_in_validation(pairs):
    words = {word for row in pairs["val"] for word in row["target_text"].rstrip("።").split()}
    assert set((DATA / "held_out_words.txt").read_text(encoding="utf-8").split()) <= words
    assert len(pairs["val"]) >= 200


def test_shipped_texts_are_many_and_spoken_by_two_voices(pairs):
    rows = pairs["train"] + pairs["val"]
    assert len({row["target_text"] for row in rows}) >= 6000
    assert len({row["speaker"] for row in pairs["val"]}) >= 2
    assert len({row["id"] for row in rows}) == len(rows)


def test_prompt_has_the_targets_voice_and_is_never_the_target(pairs):
    speaker_of = {row["target_id"]: row["speaker"] for row in pairs["train"]}
    for row in pairs["train"] + pairs["val"]:
        assert row["prompt_id"] != row["target_id"] and speaker_of[row["prompt_id"]] == row["speaker"]


def test_shipped_rows_tile_their_arrays_end_to_end(pairs):
    rows = sorted(pairs["train"] + pairs["val"], key=lambda row: row["target_codes_start"])
    for start, length, array in (("target_codes_start", "target_code_len", "codes.npy"),
                                 ("target_text_ids_start", "target_text_len", "text_ids.npy")):
        values = np.load(DATA / array, mmap_mode="r")
        ends = np.cumsum([row[length] for row in rows])
        assert values.dtype == np.int32 and values.ndim == 1 and ends[-1] == len(values)
        assert [row[start] for row in rows] == [0, *ends[:-1]]


def test_shipped_text_ids_spell_their_texts(pairs):
    tokenizer = train_tokenizer.load_tokenizer(TOKENIZER)
    ids = np.load(DATA / "text_ids.npy")
    for row in pairs["val"]:
        start = row["target_text_ids_start"]
        assert tokenizer.decode(ids[start : start + row["target_text_len"]].tolist()) == row["target_text"]


def test_shipped_codes_use_all_of_the_codebook(pairs):
    config = yaml.safe_load((DATA / "config.yaml").read_text(encoding="utf-8"))["gpt"]
    codes = np.load(DATA / "codes.npy")
    assert np.array_equal(np.unique(codes), np.arange(config["start_mel_token"]))


def test_shipped_config_fits_tokenizer_codec_and_lengths(pairs, shipped_codec):
    config = yaml.safe_load((DATA / "config.yaml").read_text(encoding="utf-8"))
    gpt, dataset = config["gpt"], config["dataset"]
    assert of_manifest(DATA / "train_pairs.jsonl") == {
        **codec_record(DATA / "speech_codec.pt", shipped_codec), "tokenizer_sha256": sha256_of(TOKENIZER),
        "text_rules": amharic_text.TEXT_RULES}
    rebuilt = demo_data.data_config(DATA / "speech_codec.pt", TOKENIZER, [])
    assert config == rebuilt | {"dataset": rebuilt["dataset"] | {"speakers": ["am", "am_f2"]}}
    assert list(dataset) == list(rebuilt["dataset"])
    assert gpt["number_text_tokens"] == train_tokenizer.load_tokenizer(TOKENIZER).get_piece_size()
    assert gpt["start_mel_token"] == shipped_codec.config.num_codes == gpt["number_mel_codes"] - 2
    assert dataset["sample_rate"] == shipped_codec.config.sample_rate
    rows = pairs["train"] + pairs["val"]
    assert max(row["target_text_len"] for row in rows) <= gpt["max_text_tokens"]
    assert max(row["target_code_len"] for row in rows) <= gpt["max_mel_tokens"]


def test_shipped_audio_is_named_only_where_it_exists(pairs):
    rows = pairs["train"] + pairs["val"]
    named = {row[key] for row in rows for key in ("prompt_audio_path", "target_audio_path")} - {""}
    assert named == {f"audio/{path.name}" for path in (DATA / "audio").iterdir()}
    assert all(row["prompt_audio_path"] for row in rows)
    assert sum(bool(row["target_audio_path"]) for row in pairs["val"]) == 12


def test_shipped_recordings_give_the_shipped_codes_and_conditions(pairs, shipped_codec):
    codes = np.load(DATA / "codes.npy")
    condition, emo_vec = np.load(DATA / "condition.npy"), np.load(DATA / "emo_vec.npy")
    assert condition.dtype == emo_vec.dtype == np.float32 and len(condition) == 32 * len(emo_vec)
    for row in [row for row in pairs["val"] if row["target_audio_path"]]:
        waveform = sound_files.load_recording(DATA / row["target_audio_path"], RATE)
        start = row["target_codes_start"]
        expected = codes[start : start + row["target_code_len"]]
        # Another processor may round a tie between two centroids differently, hence not quite all.
        assert np.mean(shipped_codec.encode(waveform).numpy() == expected) > 0.98
        prompt = sound_files.load_recording(DATA / row["prompt_audio_path"], RATE)
        rows, vector = shipped_codec.condition(prompt, condition.shape[1])
        start = row["prompt_condition_start"]
        np.testing.assert_allclose(rows, condition[start : start + row["prompt_condition_len"]], atol=1e-4)
        np.testing.assert_allclose(vector, emo_vec[row["prompt_emo_vec_start"]], atol=1e-4)


def test_shipped_data_stays_below_20_megabytes():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 20e6


def test_shipped_sources_say_that_the_voice_is_synthetic():
    text = (DATA / "SOURCES.txt").read_text(encoding="utf-8")
    assert "SYNTHETIC" in text and all(path.name in text for path in (DATA / "sources").iterdir())


# Text


@pytest.mark.parametrize(("numeral", "value"), [("፩", 1), ("፲", 10), ("፳፩", 21), ("፻", 100), ("፪፻", 200),
                                                ("፲፱፻፶", 1950), ("፳፻፲፪", 2012), ("፼", 10_000), ("፪፼፫፻፬", 20_304)])
def test_ethiopic_numerals_have_their_value(numeral, value):
    assert _amharic_text_1.ethiopic_number(numeral) == value


@pytest.mark.parametrize(("text", "expected"), [
    ("የሰው፡ልጅ፡ሁሉ።", "የሰው ልጅ ሁሉ።"), ("ቤት፤ህዝብ", "ቤት፤ ህዝብ"), ("አንቀጽ ፲፩", "አንቀጽ አሥራ አንድ"),
    ("3.5", "ሦስት ነጥብ አምስት"), ("በ፲፱፻፶", "በሺህ ዘጠኝ መቶ ሃምሳ"), ("3ኛ ፱ኛ", "ሦስተኛ ዘጠነኛ"), ("አለ\u135f", "አለ"),
     ("1,000 ብር", "ሺህ ብር"), ("(ሰላም) «ዓለም»", "ሰላም ዓለም"), ("ዓ.ም.", "ዓመተ ምሕረት።"),
    ("ሰላም ፡፡ ቤት", "ሰላም። ቤት"), ("", ""), ("።።", ""),
])
def test_normalised_text_is_as_spoken(text, expected):
    assert amharic_text.normalise(text) == expected
    assert amharic_text.normalise(expected) == expected


def test_numbers_read_as_words():
    assert _amharic_text_1.number_words(0) == "ዜሮ"
    assert _amharic_text_1.number_words(10) == "አሥር"
    assert _amharic_text_1.number_words(1999) == "ሺህ ዘጠኝ መቶ ዘጠና ዘጠኝ"
    assert _amharic_text_1.number_words(10**12 + 1).split()[0] == "አንድ"


def test_corpus_is_a_function_of_its_seed_and_keeps_validation_apart(tmp_path):
    arguments = ["build", "--sources", str(DATA / "sources"), "--sequences", "300", "--validation-texts", "20",
                 "--held-out-words", "48"]
    for name in ("a", "b"):
        amharic_text.main([*arguments, "--output-dir", str(tmp_path / name)])
    assert (tmp_path / "a/texts.jsonl").read_bytes() == (tmp_path / "b/texts.jsonl").read_bytes()
    rows = read_rows(tmp_path / "a/texts.jsonl")
    training = "\n".join(row["text"] for row in rows if row["split"] == "train")
    assert not [row for row in rows if row["split"] == "val" and row["text"].rstrip("።") in training]
    assert len({row["text"] for row in rows}) == len(rows)


def test_voices_take_turns_or_all_speak_every_text():
    texts = [{"id": "a", "text": "ሰላም"}, {"id": "b", "text": "ቤት"}]
    assert [row["id"] for row in speak.plan_recordings(texts, ["am", "am+f2"], False)] == ["a_am", "b_am_f2"]
    assert len(speak.plan_recordings(texts, ["am", "am+f2"], True)) == 4


def test_trimming_silence_twice_changes_nothing():
    padded = np.concatenate([np.zeros(5000), tones(1), np.zeros(3000)]).astype(np.float32)
    once = sound_files.trim_silence(padded, RATE)
    assert RATE <= len(once) < len(padded) - 7000
    assert np.array_equal(sound_files.trim_silence(once, RATE), once)
    assert len(sound_files.trim_silence(np.zeros(100, dtype=np.float32), RATE)) == 0


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speaking_twice_gives_the_same_trimmed_recordings(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": "a", "text": "-x ሰላም፤ ፳፫"}\n', encoding="utf-8")
    for name in ("1", "2"):
        speak.main(["--texts", str(tmp_path / "t.jsonl"), "--output-dir", str(tmp_path / name)])
    assert (tmp_path / "1/wavs/a_am.wav").read_bytes() == (tmp_path / "2/wavs/a_am.wav").read_bytes()
    waveform, rate = soundfile.read(tmp_path / "1/wavs/a_am.wav")
    assert rate == RATE and len(sound_files.trim_silence(waveform, rate)) == len(waveform)


# Tokenizer


def test_tokenizer_has_one_piece_per_letter_and_the_released_special_ids(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train_tokenizer.train_tokenizer(["ሰላም ለዓለም።", "ቤት"], "char", 0))
    tokenizer = train_tokenizer.load_tokenizer(path)
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<s>", "</s>", "<unk>"]
    assert tokenizer.encode("ፀሐይ?", out_type=str) == ["▁", "ፀ", "ሐ", "ይ", "?"]
    assert tokenizer.unk_id() not in tokenizer.encode(train_tokenizer.amharic_letters() + amharic_text.PUNCTUATION)
    assert train_tokenizer.train_tokenizer(["ሰላም ለዓለም።", "ቤት"], "char", 0) == path.read_bytes()


def test_tokenizer_whose_unknown_piece_is_the_start_token_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["ሰላም ለዓለም"]), model_prefix=str(tmp_path / "t"),
                                             model_type="char", use_all_vocab=True, minloglevel=2)
    with pytest.raises(ToolError, match="ids .1, 2, 0., not .0, 1, 2."):
        train_tokenizer.load_tokenizer(tmp_path / "t.model")


# Codec


def test_codec_round_trip_is_deterministic(tiny_codec):
    waveform = torch.from_numpy(tones(3))
    results = []
    for _ in range(2):
        codec = SpeechCodec.load(tiny_codec)
        codes = codec.encode(waveform)
        results.append((codes, codec.decode(codes, codec.mel_statistics(torch.from_numpy(tones(5))))))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert len(results[0][1]) == len(results[0][0]) * CodecConfig().samples_per_code
    assert abs(len(results[0][1]) - len(waveform)) <= CodecConfig().samples_per_code


def test_codec_training_is_a_function_of_its_seed(recordings, tiny_codec, tmp_path):
    speech_codec.main(["train", "--recordings", str(recordings / "recordings.jsonl"), "--output",
                       str(tmp_path / "again.pt"), "--steps", "3", "--num-codes", "32", "--pca-dim", "8",
                       "--kmeans-iterations", "3", "--width", "16", "--batch-size", "4", "--segment", "8"])
    assert (tmp_path / "again.pt").read_bytes() == tiny_codec.read_bytes()


def test_codes_do_not_depend_on_loudness(tiny_codec):
    codec = SpeechCodec.load(tiny_codec)
    waveform = torch.from_numpy(tones(4))
    assert torch.equal(codec.encode(waveform), codec.encode(waveform * 0.5))


@pytest.mark.parametrize("model_dim", [64, 256, 1280])
def test_condition_is_a_function_of_the_sound(tiny_codec, model_dim):
    codec = SpeechCodec.load(tiny_codec)
    waveform = torch.from_numpy(tones(6))
    condition, emo_vec = codec.condition(waveform, model_dim)
    assert condition.shape == (32, model_dim) and emo_vec.shape == (model_dim,)
    assert condition.dtype == emo_vec.dtype == torch.float32
    again, other = codec.condition(waveform.clone(), model_dim), codec.condition(torch.from_numpy(tones(7)), model_dim)
    assert torch.equal(condition, again[0]) and torch.equal(emo_vec, again[1])
    assert not torch.allclose(condition, other[0]) and not torch.allclose(emo_vec, other[1])


def test_decoder_refuses_start_and_stop_tokens(tiny_codec):
    codec = SpeechCodec.load(tiny_codec)
    with pytest.raises(ToolError, match="codes run from 1 to 33, but this codec knows 0 to 31"):
        codec.decode(torch.tensor([1, 33]), torch.zeros(2, 80))


def test_shipped_codec_gives_back_the_sound_it_was_given(pairs, shipped_codec):
    row = next(row for row in pairs["val"] if row["target_audio_path"])
    waveform = sound_files.load_recording(DATA / row["target_audio_path"], RATE)
    prompt = sound_files.load_recording(DATA / row["prompt_audio_path"], RATE)
    decoded = shipped_codec.decode(shipped_codec.encode(waveform), shipped_codec.mel_statistics(prompt))
    true, mel = shipped_codec.log_mel(waveform), shipped_codec.log_mel(decoded)[: len(shipped_codec.log_mel(waveform))]
    spread = (true - true.mean(0)).abs().mean()
    assert (mel - true[: len(mel)]).abs().mean() < 0.5 * spread


# Preprocess and pairs


@pytest.fixture(scope="module")
def processed(recordings: Path, tiny_codec: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same recordings processed twice."""
    folders = [tmp_path_factory.mktemp("arrays") for _ in range(2)]
    for folder in folders:
        preprocess.main(["--recordings", str(recordings / "recordings.jsonl"), "--codec", str(tiny_codec),
                         "--tokenizer", str(TOKENIZER), "--output-dir", str(folder), "--prompts-per-speaker", "2",
                         "--model-dim", "64"])
        build_pairs.main(["--data-dir", str(folder)])
    return folders


def test_preprocess_and_pairs_repeat_byte_for_byte(processed):
    names = sorted(path.name for path in processed[0].glob("[a-z]*.*"))
    assert names == ["codes.npy", "condition.npy", "config.yaml", "emo_vec.npy", "skipped.jsonl", "text_ids.npy",
                     "train_pairs.jsonl", "utterances.jsonl", "val_pairs.jsonl"]
    assert all((processed[0] / name).read_bytes() == (processed[1] / name).read_bytes() for name in names)


def test_pairs_without_marked_validation_hold_texts_out(processed):
    training, validation = (read_rows(processed[0] / f"{split}_pairs.jsonl") for split in ("train", "val"))
    assert validation and len(training) + len(validation) == 16
    assert not {row["target_text"] for row in training} & {row["target_text"] for row in validation}
    assert all(row["prompt_id"] != row["target_id"] for row in training + validation)


def test_codes_in_the_array_are_those_of_the_recording(processed, recordings, tiny_codec):
    row = read_rows(processed[0] / "utterances.jsonl")[5]
    codes = np.load(processed[0] / "codes.npy")[row["codes_start"] : row["codes_start"] + row["code_len"]]
    codec = SpeechCodec.load(tiny_codec)
    assert np.array_equal(codec.encode(sound_files.load_recording(recordings / row["audio"], RATE)).numpy(), codes)


def test_paths_of_recordings_that_do_not_ship_stay_empty():
    common = {"speaker": "s", "duration": 1.0, "text": "ቤት", "text_ids_start": 0, "text_len": 2, "codes_start": 0,
              "code_len": 9}
    prompt = common | {"id": "p", "split": "train", "audio": "audio/p.flac", "condition_start": 0, "condition_len": 32,
                       "emo_vec_start": 0}
    target = common | {"id": "t", "split": "val", "text": "ውሃ", "audio": "wavs/t.wav"}
    row, = build_pairs.build_pairs([prompt, target], "val", 1, 0, shipped={"audio/p.flac"})
    assert (row["prompt_audio_path"], row["target_audio_path"]) == ("audio/p.flac", "")


def test_held_out_recordings_cover_every_speaker():
    rows = [{"id": f"v{i}", "speaker": f"s{i % 2}", "split": "val"} for i in range(100)]
    chosen = demo_data.choose_held_out_recordings(rows, 12)
    assert len(chosen) == 12 and {row["speaker"] for row in chosen} == {"s0", "s1"}


# Faulty input: one line that names file, place and remedy, exit status 1


def test_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="half way"), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise ValueError("half way")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_command_line_shows_one_line_and_no_stack_frames(tmp_path):
    result = subprocess.run([sys.executable, "-m", "tools.build_pairs", "--data-dir", str(tmp_path)], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith(f"[Error] {tmp_path}/utterances.jsonl: no such file.")


def test_amharic_text_names_the_missing_source(tmp_path, monkeypatch, capsys):
    line = error_of(amharic_text, ["build", "--sources", tmp_path, "--output-dir", tmp_path], monkeypatch, capsys)
    assert "words_am.txt: no such file" in line


def test_amharic_text_names_the_byte_that_is_not_utf8(tmp_path, monkeypatch, capsys):
    (tmp_path / "words_am.txt").write_bytes("ቤት\n".encode("utf-16"))
    line = error_of(amharic_text, ["build", "--sources", tmp_path, "--output-dir", tmp_path], monkeypatch, capsys)
    assert "words_am.txt: not UTF-8 text at byte 0" in line


def test_amharic_text_refuses_held_out_words_that_do_not_fit(tmp_path, monkeypatch, capsys):
    argv = ["build", "--sources", DATA / "sources", "--output-dir", tmp_path, "--held-out-words", "10"]
    assert "do not fill 160 texts" in error_of(amharic_text, argv, monkeypatch, capsys)


def test_speak_says_how_to_install_espeak(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speak.shutil, "which", lambda name: None)
    argv = ["--texts", tmp_path / "none.jsonl", "--output-dir", tmp_path]
    assert "apt install espeak-ng" in error_of(speak, argv, monkeypatch, capsys)


def test_tokenizer_training_names_the_faulty_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.jsonl").write_text('{"text": "ሰላም"}\n{"txt": "ቤት"}\n', encoding="utf-8")
    line = error_of(train_tokenizer, ["--texts", tmp_path / "t.jsonl", "--output", tmp_path / "m"], monkeypatch, capsys)
    assert "t.jsonl, line 2: missing text" in line and not (tmp_path / "m").exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "other"])
def test_damaged_codec_file_is_named(tiny_codec, tmp_path, monkeypatch, capsys, damage):
    path = tmp_path / "codec.pt"
    if damage == "other":
        torch.save({"model": torch.zeros(1)}, path)
    else:
        path.write_bytes(tiny_codec.read_bytes()[:1000] if damage == "truncated" else b"hello")
    argv = ["encode", "--codec", path, "--input", "x.wav", "--output", tmp_path / "c.npy"]
    assert f"{path}: not a" in error_of(speech_codec, argv, monkeypatch, capsys)


@pytest.mark.parametrize(("content", "message"), [
    (b"not sound", "cannot be read as sound"), (None, "no such recording"), (np.zeros(RATE), "under 0.1 s of sound"),
])
def test_unusable_recording_is_named(tiny_codec, tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, RATE)
    argv = ["encode", "--codec", tiny_codec, "--input", path, "--output", tmp_path / "c.npy"]
    line = error_of(speech_codec, argv, monkeypatch, capsys)
    assert str(path) in line and message in line


def test_too_few_recordings_for_a_codebook_are_refused(recordings, tmp_path, monkeypatch, capsys):
    argv = ["train", "--recordings", recordings / "recordings.jsonl", "--output", tmp_path / "c.pt"]
    assert "too few for a codebook of 1024" in error_of(speech_codec, argv, monkeypatch, capsys)


def test_codes_file_of_the_wrong_kind_is_refused(tiny_codec, recordings, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "c.npy", np.zeros((2, 3), dtype=np.float32))
    argv = ["decode", "--codec", tiny_codec, "--input", tmp_path / "c.npy", "--prompt", recordings / "0.wav",
            "--output", tmp_path / "o.wav"]
    assert "holds float32 of shape (2, 3)" in error_of(speech_codec, argv, monkeypatch, capsys)


@pytest.mark.parametrize(("name", "message"), [
    ("archive.npz", "an archive of arrays. Give what `encode` wrote"), ("broken.npz", "not a .npy file of codes"),
    ("none.npy", "holds no codes"), ("empty.npy", "not a .npy file of codes"), ("gone.npy", "gone.npy: not a .npy"),
])
def test_codes_that_are_none_are_named(tiny_codec, recordings, tmp_path, monkeypatch, capsys, name, message):
    np.savez(tmp_path / "archive.npz", a=np.zeros(3, np.int32))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "archive.npz").read_bytes()[:-30])
    np.save(tmp_path / "none.npy", np.zeros(0, np.int32))
    (tmp_path / "empty.npy").touch()
    argv = ["decode", "--codec", tiny_codec, "--input", tmp_path / name, "--prompt", recordings / "0.wav",
            "--output", tmp_path / "o.wav"]
    line = error_of(speech_codec, argv, monkeypatch, capsys)
    assert f"{tmp_path / name}: " in line and message in line and not (tmp_path / "o.wav").exists()


def test_codes_are_written_under_the_very_name_that_was_asked_for(tiny_codec, recordings, tmp_path):
    speech_codec.main(["encode", "--codec", str(tiny_codec), "--input", str(recordings / "0.wav"), "--output",
                       str(tmp_path / "codes")])
    assert [path.name for path in tmp_path.iterdir()] == ["codes"] and np.load(tmp_path / "codes").ndim == 1


@pytest.mark.parametrize("change", [{"config": {"unknown": 1}}, {"config": {"width": 17}}, {"config": None},
                                    {"state": {}}, {"state": {"codebook": 3}}, {"state": [1]}])
def test_codec_file_with_other_contents_is_named(tiny_codec, tmp_path, change):
    torch.save(torch.load(tiny_codec, weights_only=True) | change, tmp_path / "codec.pt")
    with pytest.raises(ToolError, match="codec.pt: its settings and weights are no codec .*train` writes a codec"):
        SpeechCodec.load(tmp_path / "codec.pt")


@pytest.mark.parametrize(("command", "flags"), [("encode", ()), ("decode", ("--prompt", "0.wav"))])
def test_an_output_that_cannot_be_written_is_named(tiny_codec, recordings, tmp_path, monkeypatch, capsys, command,
                                                   flags):
    np.save(tmp_path / "c.npy", np.arange(9))
    (tmp_path / "file").touch()
    monkeypatch.chdir(recordings)
    argv = [command, "--codec", tiny_codec, "--input", tmp_path / "c.npy" if flags else "0.wav", *flags, "--output",
            tmp_path / "file/out"]
    assert f"{tmp_path}/file: cannot be written (File exists)" in error_of(speech_codec, argv, monkeypatch, capsys)


TINY = ("--steps", "3", "--num-codes", "32", "--pca-dim", "8", "--kmeans-iterations", "3", "--width", "16",
        "--batch-size", "4", "--segment", "8")


@pytest.mark.parametrize(("flag", "value"), [
    ("--max-hours", "0"), ("--max-hours", "nan"), ("--batch-size", "0"), ("--num-codes", "0"), ("--pca-dim", "0"),
    ("--pca-dim", "400"), ("--segment", "0"), ("--width", "0"), ("--steps", "0"), ("--kmeans-iterations", "-1"),
])
def test_codec_training_names_the_flag_that_makes_no_sense(recordings, tmp_path, monkeypatch, capsys, flag, value):
    argv = ["train", "--recordings", recordings / "recordings.jsonl", "--output", tmp_path / "c.pt", *TINY, flag, value]
    assert f"[Error] {flag} {value}: give " in error_of(speech_codec, argv, monkeypatch, capsys)


@pytest.mark.parametrize(("change", "message"), [
    ({"audio": 5}, "row 2: audio is 5, not a text"), ({"speaker": ["a"]}, "row 2: speaker is ['a'], not a text"),
    ({"audio": "../up.wav"}, "row 2: "), ({"audio": "link.wav"}, "row 2: "), ({"audio": "/etc/hosts"}, "row 2: "),
])
def test_codec_training_reads_its_own_folder_only(recordings, tmp_path, monkeypatch, capsys, change, message):
    folder = tmp_path / "in"
    shutil.copytree(recordings, folder)
    shutil.copy(recordings / "0.wav", tmp_path / "up.wav")
    (folder / "link.wav").symlink_to(tmp_path / "up.wav")
    rows = read_rows(folder / "recordings.jsonl")
    rows[1] |= change
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--recordings", folder / "recordings.jsonl", "--output", tmp_path / "c.pt", *TINY]
    line = error_of(speech_codec, argv, monkeypatch, capsys)
    assert message in line and ("not a text" in message or f"leads out of {folder}. Copy the recording into it" in line)


def test_codec_training_says_of_what_it_was_made(recordings, tmp_path, capsys):
    hours = sum(soundfile.info(recordings / f"{i}.wav").duration for i in range(16)) / 3600
    speech_codec.main(["train", "--recordings", str(recordings / "recordings.jsonl"), "--output",
                       str(tmp_path / "c.pt"), *TINY, "--max-hours", str(hours / 1.5), "--audio-dir", str(recordings)])
    assert "from 8 recordings of 0.0 hours (one in 2 of 16 recordings of 0.0 hours) -> " in capsys.readouterr().out


def test_codec_training_names_and_leaves_out_recordings_that_cannot_be_used(recordings, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(recordings, folder)
    rows = read_rows(folder / "recordings.jsonl")
    (folder / rows[1]["audio"]).write_bytes(b"no sound")
    (folder / rows[2]["audio"]).unlink()
    train = ["train", "--output", str(tmp_path / "c.pt"), *TINY, "--recordings"]
    speech_codec.main([*train, str(folder / "recordings.jsonl")])
    told = capsys.readouterr().out
    assert f"left out: {folder / rows[1]['audio']}: cannot be read" in told and "2 of 16 recordings are left" in told
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows[3:]]))
    expected = (tmp_path / "c.pt").read_bytes()
    speech_codec.main([*train, str(tmp_path / "good.jsonl"), "--audio-dir", str(folder)])
    assert (tmp_path / "c.pt").read_bytes() == expected
    for path in folder.glob("*.wav"):
        path.write_bytes(b"")
    with pytest.raises(ToolError, match="not one of 16 recordings can be used"):
        speech_codec.main([*train, str(folder / "recordings.jsonl")])


@pytest.mark.parametrize(("rate", "seconds", "message"), [(44099, 1, "44099 Hz. Convert it"), (4000, 1, "4000 Hz"),
                                                          (8000, 601, "10 minutes. Cut it into sentences")])
def test_recordings_that_would_take_gigabytes_are_refused_unread(tiny_codec, tmp_path, monkeypatch, capsys, rate,
                                                                 seconds, message):
    soundfile.write(tmp_path / "bad.flac", np.zeros(rate * seconds, np.int16), rate)
    argv = ["encode", "--codec", tiny_codec, "--input", tmp_path / "bad.flac", "--output", tmp_path / "c.npy"]
    assert f"{tmp_path}/bad.flac: {message}" in error_of(speech_codec, argv, monkeypatch, capsys)


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_channels_are_averaged_and_many_never_all_in_memory(tmp_path, monkeypatch, channels):
    monkeypatch.setattr(sound_files, "BLOCK", 1000)
    sound = np.stack([tones(i, 3) for i in range(channels)], 1)
    soundfile.write(tmp_path / "many.wav", sound, RATE, subtype="FLOAT")
    tracemalloc.start()
    mono = sound_files.read_mono(tmp_path / "many.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(mono, sound.mean(1)) and (channels < 3 or peak < 3 * mono.nbytes)


def test_quick_demo_data_never_replaces_the_shipped_set(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert "--quick would replace" in error_of(demo_data, ["--quick"], monkeypatch, capsys)


PROGRAMS = {path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
            } - {"train_until_done"}  # which has no flags


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_every_tool_shows_a_first_command_and_refuses_an_unknown_flag_in_one_line(
        program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    main = importlib.import_module(f"tools.{program}").main
    with pytest.raises(SystemExit) as helped:
        main(["--help"])
    assert helped.value.code == 0
    assert f"python -m tools.{program}" in capsys.readouterr().out.partition("first command:")[2]
    monkeypatch.setattr(sys, "argv", [program, "--no-such-flag=1"])
    with pytest.raises(SystemExit) as refused:
        run_program(main)
    said = capsys.readouterr().err
    assert refused.value.code == 1 and said.startswith("[Error] ") and said.count("\n") == 1
    assert f"`python -m tools.{program} --help` lists the flags" in said
