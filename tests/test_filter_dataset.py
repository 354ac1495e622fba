"""tools.filter_dataset: good recordings stay, each bad one goes for its own reason, copies are found."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import ROOT, read_jsonl

from tools import clip_measures, filter_dataset
from tools._common import ToolError

LETTERS = "ሰላም ለዓለም ቤት ውስጥ ነን ውሃ ጠጣ ልጁ ሄደ መንገድ ላይ ፀሐይ ወጣች አበባ ከተማ"
VOICES = [soundfile.read(path, dtype="float32") for path in sorted((ROOT / "processed_data" / "audio").glob("*.flac"))]
RATE = VOICES[0][1]


def text_of(number: int, letters: int) -> str:
    """Some words of about so many letters, different for every number."""
    words = LETTERS.split()
    text = " ".join(words[(number + k * (1 + number % 7)) % len(words)] for k in range(letters))
    return text[: letters + text[:letters].count(" ")].strip()


def coded(sound: np.ndarray, rate: int, **form: str) -> tuple[np.ndarray, int]:
    with tempfile.NamedTemporaryFile() as file:
        soundfile.write(file.name, sound, rate, **form)
        return soundfile.read(file.name, dtype="float32")


class Dataset:
    """A folder with a recordings.jsonl that grows."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []
        (folder / "audio").mkdir()

    def add(self, name: str, sound: np.ndarray, rate: int = RATE, text: str | None = None, **more: Any) -> None:
        soundfile.write(self.folder / "audio" / f"{name}.wav", sound, rate, subtype=more.pop("subtype", "PCM_16"))
        text = text_of(len(self.rows), round(10 * len(sound) / rate)) if text is None else text
        self.rows.append({"id": name, "text": text, "audio": f"audio/{name}.wav", "speaker": "s", **more})

    def filter(self, *flags: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Rows that are kept, and the reason for each of the others."""
        path = self.folder / "recordings.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        filter_dataset.main([str(path), *flags])
        return (read_jsonl(self.folder / "filtered.jsonl"),
                {row["id"]: row["reason"] for row in read_jsonl(self.folder / "rejected.jsonl")})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = Dataset(tmp_path)
    for number, (sound, rate) in enumerate(VOICES[:22]):
        made.add(f"good{number}", sound, rate)
    return made


def test_good_recordings_stay_as_they_are_also_those_of_a_telephone(dataset: Dataset) -> None:
    dataset.add("quiet", 0.05 * VOICES[22][0])
    telephone = VOICES[23][0][: len(VOICES[23][0]) // 3 * 3].reshape(-1, 3).mean(1)
    dataset.add("telephone", *coded(telephone, 8000, format="WAV", subtype="GSM610"),
                text=text_of(1, round(10 * len(VOICES[23][0]) / RATE)))
    rng = np.random.default_rng(0)
    dataset.add("some noise", VOICES[24][0] + 0.003 * rng.standard_normal(len(VOICES[24][0])).astype(np.float32))
    kept, rejected = dataset.filter()
    assert rejected == {}
    assert kept == dataset.rows


def test_each_bad_recording_goes_for_its_own_reason_and_the_report_lets_it_be_heard(dataset: Dataset) -> None:
    sound = VOICES[25][0]
    rng = np.random.default_rng(0)
    bad = {
        "clipped": ("clipped", np.clip(12 * sound, -0.8, 0.8)),
        "noisy": ("noisy", sound + 0.1 * rng.standard_normal(len(sound)).astype(np.float32)),
        "offset": ("DC offset", 0.5 * sound + 0.2), "whisper": ("too quiet", 0.004 * sound),
        "hum": ("no speech", 0.1 * np.sin(np.arange(2 * RATE) * 0.05).astype(np.float32)),
    }
    for name, (_, samples) in bad.items():
        dataset.add(name, samples)
    dataset.add("mismatch", VOICES[26][0], text=text_of(3, 90))
    dataset.add("empty", VOICES[27][0], text=" ")
    dataset.add("latin", VOICES[28][0], text="this is not <Amharic>")
    dataset.add("a", VOICES[29][0])
    dataset.rows.append({**dataset.rows[-1], "id": "b", "text": "ሌላ"})
    dataset.rows += [{**dataset.rows[0], "id": "again"}, {**dataset.rows[0], "id": "away", "audio": "audio/no.wav"}]
    before = {path: path.read_bytes() for path in (dataset.folder / "audio").iterdir()}
    kept, rejected = dataset.filter()
    assert rejected == {name: reason for name, (reason, _) in bad.items()} | {
        "mismatch": "text and sound do not match", "empty": "empty transcript", "latin": "not Ethiopic",
        "a": "several texts for one file", "b": "several texts for one file", "again": "two rows for one file",
        "away": "no such recording"}
    assert [row["id"] for row in kept] == [f"good{n}" for n in range(22)]
    report = (dataset.folder / "filter_report.html").read_text(encoding="utf-8")
    assert all(reason in report for reason in rejected.values()) and "this is not &lt;Amharic&gt;" in report
    assert report.count("<audio controls") >= 10 and report.count("<svg") == 4
    assert not re.search(r"(?:src|href)=\"(?!data:)", report) and "http" not in report
    assert before == {path: path.read_bytes() for path in (dataset.folder / "audio").iterdir()}


def test_texts_that_lose_signs_go_and_the_report_counts_what_was_found(dataset: Dataset,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    for number, sign in enumerate(("§", "☺", "WHO")):
        sound = VOICES[25 + number][0]
        dataset.add(sign, sound, text=f"{text_of(30 + number, round(10 * len(sound) / RATE))} {sign}")
    sound = VOICES[28][0]
    words = text_of(33, round(10 * len(sound) / RATE))
    dataset.add("cs", sound, text=f"{'ab, cd. ' * (len(words) // 4)}", language="cs")  # no sign of Amharic
    kept, rejected = dataset.filter()
    assert rejected == {"§": "signs that cannot be said"} and [row["id"] for row in kept[-3:]] == ["☺", "WHO", "cs"]
    detail, = (row["detail"] for row in read_jsonl(dataset.folder / "rejected.jsonl"))
    assert "§ cannot be said. Write the words that are said for it" in detail
    printed, report = capsys.readouterr().out, (dataset.folder / "filter_report.html").read_text(encoding="utf-8")
    for line in ("1 texts lose signs that cannot be said: § (1)", "have decoration, which is passed over: ☺ (1)",
                 "1 texts have Latin words, which stay as they are: WHO (1)"):
        assert line in printed and line in report


def test_copies_are_found_though_quieter_or_coded_again_and_the_loudest_stays(dataset: Dataset) -> None:
    first, second, third = (VOICES[n][0] for n in range(3))
    dataset.add("quieter", 0.3 * first, text=text_of(40, round(10 * len(first) / RATE)))
    dataset.add("mp3", *coded(0.8 * second, RATE, format="MP3"), text=text_of(41, round(10 * len(second) / RATE)))
    dataset.add("silence around", np.pad(0.9 * third, (RATE // 5, RATE // 4)),
                text=text_of(42, round(10 * len(third) / RATE)))
    _, rejected = dataset.filter()
    assert rejected == dict.fromkeys(["quieter", "mp3", "silence around"], "copy of a sound")


def test_a_sound_is_never_on_both_sides_of_the_split(dataset: Dataset) -> None:
    text = text_of(40, round(10 * len(VOICES[0][0]) / RATE))
    dataset.add("quiet copy", 0.3 * VOICES[0][0], text=text, split="val")
    kept, rejected = dataset.filter()
    assert rejected == {"good0": "sound of validation"}
    assert kept[-1]["id"] == "quiet copy"


def test_ends_without_speech_are_trimmed_by_the_detector_not_by_loudness(dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    rustle = (0.02 * rng.standard_normal(2 * RATE)).astype(np.float32)
    knock = np.zeros(2 * RATE, np.float32)
    knock[RATE // 2: RATE // 2 + 400] = 0.8 * rng.uniform(-1, 1, 400)  # louder than the voice
    speech = VOICES[25][0]
    dataset.add("ends", np.concatenate([knock, speech, rustle]), text=text_of(30, round(10 * len(speech) / RATE)))
    kept, rejected = dataset.filter("--least-snr", "5")
    assert rejected == {}
    row = kept[-1]
    assert row["audio"] == "trimmed/ends.flac" and abs(row["duration"] - len(speech) / RATE) < 0.7
    trimmed, rate = soundfile.read(dataset.folder / row["audio"], dtype="float32")
    assert rate == RATE and abs(len(trimmed) / RATE - row["duration"]) < 0.01
    assert [row["audio"] for row in kept[:-1]] == [row["audio"] for row in dataset.rows[:-1]]


def test_a_second_run_measures_nothing_and_gives_the_same(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataset.filter("--least-snr", "1")
    monkeypatch.setattr(filter_dataset, "measure_files", None)
    assert dataset.filter("--least-snr", "1") == first
    with pytest.raises(ToolError, match="not one recording is left. 22 x too short"):
        dataset.filter("--shortest", "29")
    assert not (dataset.folder / "filtered.jsonl").exists()  # an earlier run's would be taken for this one's


def test_prints_of_different_sentences_differ_and_of_copies_agree() -> None:
    prints = [clip_measures.print_of(sound, rate, clip_measures.frame_levels(sound, rate)) for sound, rate in VOICES]
    rng = np.random.default_rng(0)
    copies = [clip_measures.print_of(copy, rate, clip_measures.frame_levels(copy, rate)) for copy, rate in (
        coded(0.5 * sound + 0.001 * rng.standard_normal(len(sound)), rate, format="OGG") for sound, rate in VOICES)]
    pairs = clip_measures.alike(*(list(part) for part in zip(*prints, *copies, strict=True)))
    assert pairs == [(n, n + len(VOICES)) for n in range(len(VOICES))]


def copies_one_by_one(prints: list[str], seconds: list[float]) -> list[tuple[int, int]]:
    """What alike is to find: every pair of clips is looked at, the shorter one first."""
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 2) for text in prints]
    starts = [np.concatenate([print_, np.zeros((30, 2), np.uint8)])[:30] for print_ in rows]
    order, pairs = sorted(range(len(rows)), key=seconds.__getitem__), []
    for place, i in enumerate(order):
        for k in order[place + 1:]:
            differing = min(int(np.bitwise_count(starts[i][3:27] ^ starts[k][3 + shift: 27 + shift]).sum())
                            for shift in clip_measures.SHIFTS)
            if seconds[k] <= seconds[i] + clip_measures.SAME_LENGTH and differing <= 0.27 * 24 * 16:
                whole, worst = clip_measures.distance(rows[min(i, k)], rows[max(i, k)])
                pairs += [(min(i, k), max(i, k))] * (whole <= clip_measures.ALIKE
                                                     and worst <= clip_measures.ALIKE_THIRD)
    return sorted(pairs)


def planted_prints(rng: np.random.Generator) -> tuple[list[str], list[float]]:
    """Of random sounds, short ones too: four copies that begin elsewhere and differ in up to a third of their bits."""
    prints, seconds = [], []
    for _ in range(25):
        length = int(rng.integers(5, 60))
        sound = rng.integers(0, 2, (length + 8, 16))
        for _ in range(4):
            start, differing = rng.integers(0, 5), rng.uniform(0, 0.34)
            copy = sound[start: start + length] ^ (rng.random((length, 16)) < differing)
            prints.append(np.packbits(copy.astype(np.uint8), axis=1).tobytes().hex())
            seconds.append(0.064 * length + float(rng.uniform(0, 0.4)))
    return prints, seconds


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_those_that_a_comparison_of_every_pair_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prints, seconds = planted_prints(np.random.default_rng(seed))
    expected = copies_one_by_one(prints, seconds)
    assert 20 < len(expected) < 25 * 6  # some copies are too unlike
    for block in (1, 7, 1024):
        monkeypatch.setattr(clip_measures, "BLOCK", block)
        assert clip_measures.alike(prints, seconds) == expected


@pytest.mark.parametrize(("flags", "message"), [
    (["--shortest", "5", "--longest", "4"], "--shortest 5 --longest 4"), (["--most-repeats", "0"], "--most-repeats 0"),
    (["--most-clipped", "-1"], "--most-clipped -1"), (["--most-offset", "nan"], "--most-offset nan"),
])
def test_a_limit_that_is_none_is_one_error(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ToolError, match=message):
        filter_dataset.main([str(tmp_path / "recordings.jsonl"), *flags])
