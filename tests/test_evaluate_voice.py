"""Judging a checkpoint in numbers: the measures are what they say, the recogniser learns, and goes on where it was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, read_jsonl, trainer
from test_synthesize import Trained, trained  # noqa: F401

from tools import evaluate_voice, generation
from tools import recogniser as recogniser_module
from tools._common import ToolError
from tools.codes_to_sound import CodecSound
from tools.evaluate_voice import candidates_of, cepstra, choose_rows, dtw_distance, letters_of
from tools.recogniser import Recogniser, edit_distance, train_recogniser

# Measures


@pytest.mark.parametrize(("heard", "said", "expected"), [
    ("", "", 0), ("ሰላም", "ሰላም", 0), ("", "ሰላም", 3), ("ሰላም", "", 3), ("ሰለም", "ሰላም", 1), ("ሰላ", "ሰላም", 1),
    ("አሰላም", "ሰላም", 1), ("ላምሰ", "ሰላም", 2),
])
def test_edit_distance_counts_wrong_missing_and_added_letters(heard, said, expected):
    assert edit_distance(heard, said) == expected


def test_only_what_can_be_heard_counts():
    assert letters_of("ሠላም፣ ዓለም።") == letters_of("ሰላም አለም") == "ሰላምአለም"


def distance_by_definition(probe: np.ndarray, reference: np.ndarray) -> float:
    """The same dynamic programme, cell by cell."""
    total = np.full((len(probe) + 1, len(reference) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(probe, 1):
        for j, b in enumerate(reference, 1):
            cost = np.linalg.norm(a - b)
            total[i, j] = min(total[i - 1, j] + cost, total[i, j - 1] + cost, total[i - 1, j - 1] + 2 * cost)
    return total[-1, -1] / (len(probe) + len(reference))


@pytest.mark.parametrize("frames", [1, 2, 17, 40])
def test_dtw_over_anti_diagonals_equals_the_definition(frames):
    rng = np.random.default_rng(frames)
    probe, references = rng.normal(size=(frames, 5)), [rng.normal(size=(m, 5)) for m in (1, 9, 40, 17)]
    expected = [distance_by_definition(probe, reference) for reference in references]
    assert [dtw_distance(probe, reference) for reference in references] == pytest.approx(expected, rel=1e-9)


def test_dtw_forgives_tempo_and_nothing_else():
    sound = np.random.default_rng(0).normal(size=(30, 13))
    slow, other = sound.repeat(2, axis=0), np.random.default_rng(1).normal(size=(30, 13))
    distances = [dtw_distance(sound, reference) for reference in (sound, slow, other)]
    assert distances[:2] == pytest.approx([0, 0], abs=1e-6) and distances[2] > 1


def test_mcd_is_the_root_mean_square_difference_of_smooth_spectra_in_db_without_loudness():
    bins = (torch.arange(80) + 0.5) / 80 * torch.pi
    shape = torch.cos(3 * bins) * 0.2  # nepers
    a, b = cepstra(torch.zeros(1, 80)), cepstra((shape + 5.0)[None])
    expected = 20 / np.log(10) * float(shape.square().mean().sqrt())
    assert float(np.linalg.norm(a - b)) == pytest.approx(expected, rel=1e-4)


def row_of(name: str, text: str, speaker: str = "a", length: int = 10) -> dict:
    return {"target_id": name, "target_text": text, "speaker": speaker, "target_code_len": length}


def test_candidates_are_the_true_text_first_and_the_nearest_in_length_of_the_same_voice():
    rows = [row_of(f"r{i}", f"t{i}", "ab"[i % 2], 10 + i) for i in range(60)]
    rows.append(row_of("same", "t20!", "a", 30))  # another recording of what sounds the same is no wrong answer
    rows += rows[:20]  # several pairs of a target are one candidate
    chosen = [row["target_id"] for row in candidates_of(rows[20], rows)]
    assert chosen[0] == "r20" and len(chosen) == 12 and "same" not in chosen
    assert sorted(chosen) == sorted(f"r{i}" for i in range(10, 34, 2))


def test_texts_of_unseen_words_come_first():
    train = [row_of("t", "ሰላም ቤት።")]
    val = [row_of("a", "ሰላም ውሃ"), row_of("b", "ልጅ ውሃ"), row_of("c", "ልጅ ውሃ"), row_of("d", "አበባ"), row_of("e", "!")]
    rows, unseen = choose_rows(val, train, 2)
    assert [row["target_text"] for row in rows] == ["ልጅ ውሃ", "አበባ"] and unseen == 2
    rows, unseen = choose_rows(val, train, 9)
    assert [row["target_text"] for row in rows] == ["ልጅ ውሃ", "አበባ", "ሰላም ውሃ"] and unseen == 2


# The recogniser


def made_up_language(count: int) -> tuple[list[torch.Tensor], list[str]]:
    """Log-mels in which each of four letters is a peak of its own, at any tempo, with noise; and what they say."""
    rng, mels, texts = random.Random(0), [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        text = "".join(rng.choice("ሀለመሰ") for _ in range(rng.randint(2, 5)))
        frames = [letter for letter in text for _ in range(rng.randint(10, 16))]
        mel = torch.randn(len(frames), 80, generator=generator) * 0.3
        for at, letter in enumerate(frames):
            mel[at, 20 * "ሀለመሰ".index(letter) :][:20] += 3
        mels.append(mel.half())
        texts.append(text)
    return mels, texts


def fresh_state() -> dict:
    return {"format": recogniser_module.FORMAT, "made_with": "x", "letters": "ሀለመሰ", "done": 0, "complete": False}


def small_recogniser() -> Recogniser:
    torch.manual_seed(0)
    return Recogniser("ሀለመሰ", 80, width=24)


def test_the_recogniser_learns_to_write_what_it_hears(tmp_path, monkeypatch):
    monkeypatch.setattr(recogniser_module, "EPOCHS", 12)
    mels, texts = made_up_language(500)
    recogniser = small_recogniser()
    before = recogniser_module.error_rate([recogniser.eval().hear(mel) for mel in mels[450:]], texts[450:])
    train_recogniser(recogniser, mels[:450], texts[:450], 0, tmp_path / "r.pt", fresh_state())
    heard = [recogniser.eval().hear(mel) for mel in mels[450:]]
    # Two equal letters in a row cannot be told from one long one.
    assert before > 0.5 and recogniser_module.error_rate(heard, texts[450:]) < 0.2
    distinct = [(h, t) for h, t in zip(heard, texts[450:], strict=True) if all(a != b for a, b in zip(t, t[1:],
                                                                                                  strict=False))]
    assert sum(h == t for h, t in distinct) > 0.9 * len(distinct)


def test_a_training_that_was_stopped_anywhere_ends_with_the_same_recogniser(tmp_path, monkeypatch):
    monkeypatch.setattr(recogniser_module, "SAVE_EVERY", 2)
    mels, texts = made_up_language(150)
    train_recogniser(whole := small_recogniser(), mels, texts, 0, tmp_path / "whole.pt", fresh_state())

    class Killed(Exception):
        pass

    def die(path: Path, state: dict, save=recogniser_module.save_recogniser) -> None:
        save(path, state)
        if state["done"] == 4:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(recogniser_module, "save_recogniser", die)
        train_recogniser(small_recogniser(), mels, texts, 0, tmp_path / "r.pt", fresh_state())
    state = recogniser_module.read_recogniser(tmp_path / "r.pt", "x")
    assert state is not None and state["done"] == 4 and not state["complete"]
    resumed = small_recogniser()
    resumed.load_state_dict(state["weights"])
    train_recogniser(resumed, mels, texts, 4, tmp_path / "r.pt", state)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    final = recogniser_module.read_recogniser(tmp_path / "r.pt", "x")
    assert final is not None and final["complete"] and "optimizer" not in final


def test_silence_is_heard_as_nothing():
    assert small_recogniser().eval().hear(torch.zeros(0, 80)) == ""


# The program


def arguments(made: Trained, folder: Path) -> list[str]:
    return ["--checkpoint", str(made.checkpoint), "--data-dir", str(made.data), "--codec", str(made.codec),
            "--texts", "5", "--output-dir", str(folder / "out"), "--recogniser", str(folder / "recogniser.pt"),
            "--json", str(folder / "result.json"), "--max-length", "20"]


def error_of(argv: list[str]) -> str:
    with pytest.raises(ToolError) as stop:
        evaluate_voice.main(argv)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_a_checkpoint_is_judged_and_the_second_time_nothing_is_made_again(trained, tmp_path, capsys):  # noqa: F811
    evaluate_voice.main(arguments(trained, tmp_path))
    first = capsys.readouterr().out
    for name in ("(a) true recordings", "(b) codec round trip", "(c) synthesis", "rank 1 in", "real-time factor"):
        assert name in first
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 5 and result["step"] == 3 and result["sampling"]["max_length"] == 20
    for kind, key in (("true", "true"), ("round_trip", "round_trip"), ("synthesis", "synthesis")):
        wrong = sum(edit_distance(row[key], row["said"]) for row in result["rows"])
        assert result[kind] == {"texts": 5, "cer": round(wrong / sum(len(row["said"]) for row in result["rows"]), 4)}
    assert result["rank1"] == sum(row["rank"] == 1 for row in result["rows"]) / 5
    assert all(1 <= row["rank"] <= row["candidates"] == 3 for row in result["rows"])
    spoken = read_jsonl(tmp_path / "out/spoken.jsonl")
    assert [row["text"] for row in spoken] == [row["text"] for row in result["rows"]]
    for row in result["rows"]:  # what the page lets one hear
        assert Path(row["recording"]).is_file() and (tmp_path / f"out/{row['name']}_codec.wav").stat().st_size > 44
        assert row["cer"]["synthesis"] == round(edit_distance(row["synthesis"], row["said"]) / len(row["said"]), 4)
    stamps = {path: path.stat().st_mtime_ns for path in [*tmp_path.glob("out/*"), tmp_path / "recogniser.pt"]
              if not path.stem.endswith("_codec")}
    evaluate_voice.main(arguments(trained, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == result
    assert "5 of 5 lines are there already" in capsys.readouterr().out


def test_the_true_codes_themselves_have_rank_one(trained, tmp_path, monkeypatch):  # noqa: F811
    """With the true codes in the place of generated ones, the program's own measures must be satisfied."""
    data = evaluate_voice.VoiceData(trained.data, CodecSound(trained.codec), None)
    codes = {row["target_text"]: data.codes(row).tolist() for row in data.val}
    monkeypatch.setattr(generation, "generate_codes", lambda model, lines, sampling: [
        generation.Spoken(codes[line.text], True) for line in lines])
    evaluate_voice.main(arguments(trained, tmp_path))
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["rank1"] == 1.0 and result["synthesis"] == result["round_trip"] and result["mcd"] < 0.5


def test_recordings_are_found_through_their_list(trained, tmp_path):  # noqa: F811
    """The manifests' own paths lead nowhere once they are moved."""
    for name in ("train_pairs.jsonl", "val_pairs.jsonl", "codes.npy"):
        (tmp_path / name).write_bytes((trained.data / name).read_bytes())
    argv = arguments(trained, tmp_path)
    argv[argv.index("--data-dir") + 1] = str(tmp_path)
    assert "is missing. Give the recordings.jsonl that names it as --recordings" in error_of(argv)
    evaluate_voice.main([*argv, "--recordings", str(trained.data / "recordings.jsonl")])
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["true"]["texts"] == 5


def test_a_recogniser_of_other_data_is_refused(trained, tmp_path):  # noqa: F811
    path = tmp_path / "recogniser.pt"
    recogniser_module.save_recogniser(path, fresh_state())
    assert f"{path}: was trained on other data or for another codec" in error_of(arguments(trained, tmp_path))
    torch.save({"model": torch.zeros(1)}, path)
    assert f"{path}: not a recogniser" in error_of(arguments(trained, tmp_path))
    path.write_bytes(b"hello")
    assert f"{path}: not a readable recogniser" in error_of(arguments(trained, tmp_path))


def test_codes_that_are_missing_or_not_of_this_codec_are_named(trained, tmp_path):  # noqa: F811
    for path in trained.data.iterdir():
        if path.name != "codes.npy":
            (tmp_path / path.name).symlink_to(path)
    argv = arguments(trained, tmp_path)
    argv[argv.index("--data-dir") + 1] = str(tmp_path)
    codes = np.load(trained.data / "codes.npy")
    for content, message in ((codes[:50], "does not hold the codes of"), (codes + 64, "does not hold the codes of")):
        np.save(tmp_path / "codes.npy", content)
        assert message in error_of(argv)
    (tmp_path / "codes.npy").write_bytes(b"hello")
    assert "codes.npy: not a readable .npy file of codes" in error_of(argv)


def test_data_of_another_codec_than_the_checkpoints_is_refused(trained, tmp_path):  # noqa: F811
    for path in trained.data.iterdir():
        if path.name != "config.yaml":
            (tmp_path / path.name).symlink_to(path)
    argv = arguments(trained, tmp_path)
    argv[argv.index("--data-dir") + 1] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": {"codec_sha256": "0" * 64}}))
    assert f"codec_sha256 is 000000000000 in {tmp_path / 'config.yaml'}, but " in error_of(argv)
    message = error_of(argv)
    assert f"in --codec {trained.codec}. Give the codec that its training data was made with" in message
    assert message.endswith(", or the folder of the data that it belongs to as --data-dir")
    (tmp_path / "config.yaml").write_text("")  # nothing recorded; the checkpoint's is
    content = torch.load(trained.checkpoint, weights_only=True)
    content["made_with"] = {"num_codes": 65}
    trainer.write_checkpoint(tmp_path / "a.pth", content)
    argv[argv.index("--checkpoint") + 1] = str(tmp_path / "a.pth")
    assert f"num_codes is 65 in {tmp_path / 'a.pth'}, but 64 in --codec {trained.codec}" in error_of(argv)


@pytest.mark.parametrize(("flags", "message"), [
    (["--texts", "0"], "--texts 0: give 1 or more"), (["--data-dir", "nowhere"], "train_pairs.jsonl: no such file"),
    (["--checkpoint", "nowhere.pth"], "nowhere.pth"), (["--top-p", "2"], "--top-p 2"),
    (["--recordings", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
])
def test_senseless_input_is_named(trained, tmp_path, flags, message):  # noqa: F811
    assert message in error_of([*arguments(trained, tmp_path), *flags])


def test_the_shipped_data_can_be_read():
    data = evaluate_voice.VoiceData(ROOT / "processed_data", CodecSound(ROOT / "processed_data/speech_codec.pt"), None)
    rows, unseen = choose_rows(data.val, data.train, 100)
    assert len(rows) == unseen == 100 and len({row["speaker"] for row in rows}) == 2
    assert all(data.prompt(row).is_file() and len(candidates_of(row, data.val)) == 12 for row in rows)
    assert len(data.training_rows()) == len(data.train)
