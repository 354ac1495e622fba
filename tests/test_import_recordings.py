"""tools.import_recordings: folders as people have them become recordings.jsonl, or an error that says what is amiss."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import openpyxl
import pytest
import soundfile
from conftest import ROOT, read_jsonl

from tools import import_recordings, pauses, sound_decoder, subtitles
from tools._common import ToolError
from tools.recording_plan import list_folder
from tools.sound_files import check_recording
from tools.sound_names import SoundNames
from tools.subtitles import Cue
from tools.transcript_tables import read_table

TEXTS = ["ሰላም ለዓለም።", "ቤት ውስጥ ነን።", "ውሃ ጠጣ።", "ልጁ ሄደ።"]
NAMES = ["u0", "u1", "u2", "u3"]
RATE = 16000


def noise(seed: int, seconds: float = 0.4, rate: int = RATE) -> np.ndarray:
    """16-bit samples, different for every seed."""
    return (np.random.default_rng(seed).standard_normal(round(seconds * rate)) * 3000).astype(np.int16)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


def write_sounds(folder: Path, names: Sequence[str] = NAMES, ending: str = ".wav") -> Path:
    for seed, name in enumerate(names):
        write(folder / f"{name}{ending}", noise(seed), format="WAV" if ending.lower() == ".wav" else None)
    return folder


def lines_of(form: str, names: Sequence[str] = NAMES) -> str:
    return "".join(form.format(name=name, text=text, n=n) + "\n"
                   for n, (name, text) in enumerate(zip(names, TEXTS, strict=True)))


def bring_in(source: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs the program; the rows that it wrote into OUT, beside the source's folder."""
    output = out_of(source)
    import_recordings.main([str(source), "--output-dir", str(output), *flags])
    return read_jsonl(output / "recordings.jsonl")


def out_of(source: Path) -> Path:
    return (source if source.is_dir() else source.parent).parent / "out"


def skipped_of(source: Path) -> dict[str, int]:
    reasons = [row["reason"] for row in read_jsonl(out_of(source) / "skipped.jsonl")]
    return {reason: reasons.count(reason) for reason in reasons}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def files_of(folder: Path, without: Sequence[str] = (".lock", "import_cache.jsonl")) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in without}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def ljspeech(folder: Path) -> None:
    write_sounds(folder / "wavs")
    (folder / "metadata.csv").write_text(lines_of("{name}|{n} 12|{text}"), encoding="utf-8")


def ljspeech_of_two_columns_with_bom_and_crlf(folder: Path) -> None:
    write_sounds(folder / "wavs")
    (folder / "metadata.csv").write_bytes(("\ufeff" + lines_of("{name}|{text}").replace("\n", "\r\n")).encode())


def ljspeech_with_header(folder: Path) -> None:
    write_sounds(folder / "wavs")
    (folder / "metadata.csv").write_text("id|transcription|normalized_transcription\n" + lines_of("{name}|1|{text}"),
                                         encoding="utf-8")


def common_voice(folder: Path) -> None:
    write_sounds(folder / "clips", ending=".mp3")
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tlocale\n"
    rows = lines_of("s{n}\t{name}.mp3\tx\t{text}\t2\tam")
    (folder / "validated.tsv").write_text(header + rows, encoding="utf-8")
    (folder / "train.tsv").write_text(header + rows.split("\n")[0] + "\n", encoding="utf-8")
    (folder / "invalidated.tsv").write_text(header + "s9\tu0.mp3\tx\twrong\t0\tam\n", encoding="utf-8")


def nemo(folder: Path) -> None:
    write(folder / "audio" / "all.wav", np.concatenate([noise(n) for n in range(4)]))
    rows = [{"audio_filepath": "/data/audio/all.wav", "offset": 0.4 * n, "duration": 0.4, "text": text}
            for n, text in enumerate(TEXTS)]
    (folder / "manifest.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sounds_with_texts(folder: Path) -> None:
    write_sounds(folder)
    for n, name in enumerate(NAMES):
        (folder / f"{name}{'.lab' if n % 2 else '.txt'}").write_text(TEXTS[n] + "\n", encoding="utf-8")


def sounds_and_texts_in_two_trees(folder: Path) -> None:
    write_sounds(folder / "wav48" / "p1")
    (folder / "txt" / "p1").mkdir(parents=True)
    for name, text in zip(NAMES, TEXTS, strict=True):
        (folder / "txt" / "p1" / f"{name}.txt").write_text(text, encoding="utf-16")


def f5_tts(folder: Path) -> None:
    write_sounds(folder / "wavs")
    (folder / "metadata.csv").write_text("audio_file|text\n" + lines_of("wavs/{name}.wav|{text}"), encoding="utf-8")


def gpt_sovits(folder: Path) -> None:
    write_sounds(folder / "raw")
    (folder / "train.list").write_text(lines_of("D:\\data\\raw\\{name}.wav|s{n}|AM|{text}"), encoding="utf-8")


def json_lines(folder: Path) -> None:
    write_sounds(folder)
    lines = lines_of('{{"audio":"{name}.wav","text":"{text}","voice":"v"}}')
    (folder / "all.jsonl").write_text(lines, encoding="utf-8")


def json_array(folder: Path) -> None:
    write_sounds(folder)
    rows = [{"file": f"{name}.wav", "sentence": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    (folder / "all.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")


def excel_csv_in_utf16(folder: Path) -> None:
    write_sounds(folder)
    lines = "File name;Text;Speaker\r\n" + lines_of('{name}.wav;"{text}";አበበ')
    (folder / "t.csv").write_bytes(lines.encode("utf-16"))


def spreadsheet_with_title(folder: Path) -> None:
    write_sounds(folder / "sound")
    book = openpyxl.Workbook()
    rows = [[n, name, TEXTS[n]] for n, name in enumerate(NAMES)]
    for row in (["Our transcripts"], ["No", "File", "Transcript"], *rows):
        book.active.append(row)
    book.save(folder / "texts.xlsx")


def kaldi(folder: Path) -> None:
    write_sounds(folder / "train" / "wav")
    (folder / "train" / "text").write_text(lines_of("{name} {text}"), encoding="utf-8")
    (folder / "train" / "utt2spk").write_text(lines_of("{name} s{n}"), encoding="utf-8")


def seven_columns_without_header(folder: Path) -> None:
    write_sounds(folder / "audio" / "train")
    (folder / "train.tsv").write_text(lines_of("{n}7\t{name}.wav\t{text}\tx\tሰ ላ ም\t640{n}\tMALE"), encoding="utf-8")


LAYOUTS = {"ljspeech": [ljspeech, ljspeech_of_two_columns_with_bom_and_crlf, ljspeech_with_header],
           "common-voice": [common_voice], "nemo": [nemo], "folder": [sounds_with_texts, sounds_and_texts_in_two_trees],
           "f5-tts": [f5_tts], "gpt-sovits": [gpt_sovits], "jsonl": [json_lines, json_array],
           "table": [excel_csv_in_utf16, spreadsheet_with_title], "filelist": [kaldi, seven_columns_without_header]}


@pytest.mark.parametrize(("layout", "make"), [(name, make) for name, makes in LAYOUTS.items() for make in makes])
def test_every_layout_is_recognised_and_its_texts_belong_to_its_sounds(
        source: Path, layout: str, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make(source)
    before = files_of(source)
    rows = bring_in(source)
    assert f"sounds; {layout}: " in capsys.readouterr().out
    assert [row["text"] for row in rows] == TEXTS
    assert len({row["id"] for row in rows}) == 4
    for n, row in enumerate(rows):
        samples, rate = soundfile.read(out_of(source) / row["audio"], dtype="int16")
        if not row["audio"].endswith(".mp3"):
            assert rate == RATE and np.array_equal(samples, noise(n)), row
    assert files_of(source) == before


def test_common_voice_takes_validated_clips_and_the_clients_as_speakers(source: Path) -> None:
    common_voice(source)
    assert [(row["speaker"], row["language"]) for row in bring_in(source)] == [(f"s{n}", "am") for n in range(4)]


def test_tables_named_after_splits_are_all_taken_and_mark_validation(source: Path) -> None:
    write_sounds(source / "wavs")
    lines = lines_of("wavs/{name}.wav|{text}").splitlines(keepends=True)
    (source / "metadata_train.csv").write_text("audio_file|text\n" + "".join(lines[:3]), encoding="utf-8")
    (source / "metadata_eval.csv").write_text("audio_file|text\n" + lines[3], encoding="utf-8")
    assert sorted((row["text"], row["split"]) for row in bring_in(source)) == sorted(
        zip(TEXTS, ["train", "train", "train", "val"], strict=True))


def test_what_may_be_several_things_is_refused_and_layout_decides(source: Path) -> None:
    sounds_with_texts(source)
    (source / "metadata.csv").write_text(lines_of("{name}|ሌላ {text}"), encoding="utf-8")
    with pytest.raises(ToolError, match="may be several things.*metadata.csv.*4 of 4 sounds with a text.*--layout"):
        bring_in(source)
    assert [row["text"] for row in bring_in(source, "--layout", "folder")] == TEXTS
    assert bring_in(source, "--layout", "ljspeech")[0]["text"] == f"ሌላ {TEXTS[0]}"
    assert bring_in(source / "metadata.csv")[0]["text"] == f"ሌላ {TEXTS[0]}"


@pytest.mark.parametrize(("names", "content", "message"), [
    ([], "a|b\n", "holds no sound file"),
    (NAMES, "file,text\nx.wav,ሰላም\n", "not one of the first names .*x|not one of the first names"),
    (NAMES, "a,b\nc,d\n", "Understood are ljspeech"),
])
def test_what_is_not_recognised_is_one_error_that_lists_what_is(source: Path, names: list[str], content: str,
                                                                message: str) -> None:
    write_sounds(source, names)
    (source / "table.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ToolError, match=message):
        bring_in(source)


def test_sounds_in_another_folder_are_named_by_audio_dir(source: Path, tmp_path: Path) -> None:
    write_sounds(tmp_path / "elsewhere" / "x")
    table = source / "manifest.jsonl"
    table.write_text(lines_of('{{"audio_filepath":"/mnt/x/{name}.wav","text":"{text}"}}'), encoding="utf-8")
    assert [row["text"] for row in bring_in(table, "--audio-dir", str(tmp_path / "elsewhere"))] == TEXTS


# ---------------------------------------------------------------------------------------------------------------------
# Names and rows


@pytest.mark.parametrize(("written", "found", "way"), [
    ("wavs\\a.wav", "wavs/a.wav", "Windows slashes"), ("a", "wavs/a.wav", "no ending"),
    ("A.WAV", "wavs/a.wav", "other case"), ("a.wav", "wavs/a.flac", "another ending"),
    ("/home/me/set/wavs/a.wav", "wavs/a.wav", "another folder"),
    (unicodedata.normalize("NFD", "é.wav"), unicodedata.normalize("NFC", "é.wav"), "another Unicode form"),
])
def test_names_that_differ_are_found_and_said(written: str, found: str, way: str) -> None:
    names = SoundNames([found, "wavs/other.wav"])
    assert names.find(written) == found
    assert any(way in said for said in names.mended)


def test_a_name_that_fits_two_sounds_is_no_guess(source: Path) -> None:
    for folder in ("a", "b"):
        write_sounds(source / folder, ["u0"])
    write_sounds(source / "a", ["u1"])
    (source / "t.csv").write_text("file,text\nu0.wav,ሰላም\na/u0.wav,ቤት\nu1.wav,ውሃ\n", encoding="utf-8")
    assert {row["id"]: row["text"] for row in bring_in(source)} == {"a/u0": "ቤት", "a/u1": "ውሃ"}
    assert skipped_of(source) == {"no such recording": 1}


def test_bad_rows_are_named_and_counted_and_the_others_come_through(source: Path) -> None:
    write_sounds(source, ["good", "twice", "same"])
    (source / "empty.wav").touch()
    (source / "noise.wav").write_bytes(b"no sound at all" * 50)
    (source / "half.wav").write_bytes((source / "good.wav").read_bytes()[:5000])
    rows = ["good.wav,ሰላም,", "missing.wav,ሰላም,", ",ሰላም,", "empty.wav,ቤት,", "noise.wav,ቤት,", "half.wav,ቤት,",
            "twice.wav,ቤት,", "twice.wav,ውሃ,", "same.wav,ልጅ,", "same.wav,ልጅ,", "good.wav,ሰላም,9", "good.wav,ሰላም,x"]
    (source / "t.csv").write_text("file,text,start\n" + "\n".join(rows) + "\n", encoding="utf-8")
    assert [row["id"] for row in bring_in(source)] == ["good", "same"]
    assert skipped_of(source) == {
        "no such recording": 1, "row that cannot be read": 2, "empty file": 1, "unreadable": 1, "cut off": 1,
        "several texts for one recording": 2, "two rows for one recording": 1, "beyond the end": 1}


def test_the_whole_is_never_given_for_a_part(source: Path) -> None:
    write(source / "a.wav", noise(0, 3))
    rows = [{"audio_filepath": "a.wav", "duration": 1.0, "text": "ሰላም"},
            {"audio_filepath": "a.wav", "offset": 1.5, "text": "ቤት"},
            {"audio_filepath": "a.wav", "duration": 2.9, "text": "ውሃ"}]
    (source / "m.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert [(row["text"], row["duration"], row.get("start")) for row in bring_in(source)] == [
        ("ሰላም", 1.0, 0.0), ("ቤት", 1.5, 1.5), ("ውሃ", 3.0, None)]


@pytest.mark.parametrize(("subtype", "dtype", "kept"), [("PCM_16", "int16", "PCM_16"), ("PCM_24", "int32", "PCM_24"),
                                                        ("FLOAT", "float32", "PCM_24"), ("ULAW", "int16", "PCM_16")])
def test_clips_have_the_samples_of_the_source(source: Path, subtype: str, dtype: str, kept: str) -> None:
    sound = np.stack([noise(0, 2, 11025), noise(1, 2, 11025)], 1)
    write(source / "a.wav", sound / 32768 if subtype == "FLOAT" else sound, 11025, subtype=subtype)
    (source / "t.csv").write_text("file,text,start,end\na.wav,ሰላም,0.4,1.4\n", encoding="utf-8")
    path = out_of(source) / bring_in(source)[0]["audio"]
    header = soundfile.info(path)
    assert (header.samplerate, header.channels, header.subtype, header.frames) == (11025, 2, kept, 11025)
    whole = soundfile.read(source / "a.wav", dtype=dtype)[0]
    part = soundfile.read(path, dtype=dtype)[0]
    first = round(0.4 * 11025)
    assert np.allclose(part, whole[first: first + 11025], atol=0 if subtype != "FLOAT" else 1e-6)


def test_ids_of_the_source_are_kept_where_they_are_unique(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sounds(source)
    (source / "t.jsonl").write_text("".join(json.dumps({"id": name, "audio": f"{audio}.wav", "text": "ሰላም"}) + "\n"
                                            for name, audio in zip([7, "x", "x", ""], NAMES, strict=True)))
    assert [row["id"] for row in bring_in(source)] == ["7", "u1", "u2", "u3"]
    assert "2 rows have an id that occurs twice" in capsys.readouterr().out


def test_speakers_come_from_a_folder_or_an_option(source: Path) -> None:
    for speaker in ("abebe", "sara"):
        write_sounds(source / speaker / "wavs", ["1"])
    assert [row["speaker"] for row in bring_in(source, "--speaker-from", "folder")] == ["abebe", "sara"]
    assert [row["speaker"] for row in bring_in(source, "--speaker", "one")] == ["one", "one"]


def test_oddities_of_spreadsheets_and_editors(source: Path) -> None:
    """Quotes, the delimiter inside a text, empty cells, empty lines, a tab in a text, another encoding."""
    write_sounds(source)
    cases = {
        "a.csv": 'file,text\n\nu0.wav,"ሰላም, ""ለዓለም"""\nu1.wav,\n,,\n',
        "b.tsv": 'file\ttext\nu0.wav\tሰላም,\t"ለዓለም"\nu1.wav\t\n',
        "c.csv": 'ፋይል;ጽሑፍ\r\nu0.wav;"ሰላም, ""ለዓለም"""\r\nu1.wav;\r\n',
    }
    for name, content in cases.items():
        table = source / name
        table.write_text(content, encoding="utf-8")
        assert [row["text"] for row in bring_in(table)] == ['ሰላም, "ለዓለም"', ""], name
        table.unlink()
    table = source / "d.csv"
    table.write_bytes("file,text\nu0.wav,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ToolError, match="d.csv: not UTF-8 text at byte 20"):
        bring_in(table)


@pytest.mark.parametrize("make", [b"not a zip", b"PK\x03\x04broken", b""])
def test_a_broken_spreadsheet_is_one_line(tmp_path: Path, make: bytes) -> None:
    (tmp_path / "a.xlsx").write_bytes(make)
    with pytest.raises(ToolError, match="cannot be read as a spreadsheet"):
        read_table(tmp_path / "a.xlsx", "a.xlsx")


def test_hidden_files_links_and_names_that_are_no_text(source: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    write_sounds(source, ["a"])
    (source / "._a.wav").write_bytes(b"macOS")
    (source / "__MACOSX").mkdir()
    write_sounds(tmp_path / "disk", ["b"])
    (source / "linked").symlink_to(tmp_path / "disk")
    (source / "linked" / "round").symlink_to(source)
    (Path(os.fsdecode(os.fsencode(source) + b"/\xff.wav"))).write_bytes((source / "a.wav").read_bytes())
    os.mkfifo(source / "pipe.wav")
    assert [row["id"] for row in bring_in(source)] == ["a", "linked/b"]
    said = capsys.readouterr().out
    assert "2 hidden files are left out" in said and "1 files have names that are no text" in said


def test_the_output_is_no_part_of_the_source(source: Path) -> None:
    write_sounds(source)
    for _ in range(2):
        import_recordings.main([str(source), "--output-dir", str(source / "dataset")])
        assert len(read_jsonl(source / "dataset" / "recordings.jsonl")) == 4
    with pytest.raises(ToolError, match="is where the recordings are"):
        import_recordings.main([str(source), "--output-dir", str(source)])


def test_a_foreign_file_in_the_output_is_left_alone(source: Path) -> None:
    write_sounds(source)
    foreign = write(out_of(source) / "audio" / "mine.wav", noise(9))
    bring_in(source)
    (source / "u3.wav").unlink()
    assert len(bring_in(source)) == 3
    assert foreign.is_file() and not (out_of(source) / "audio" / "u3.wav").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def encode(path: Path, codec: str, rate: int, kind: str, seconds: float = 1.0, sound: np.ndarray | None = None) -> None:
    """A tone, or the sound that is given."""
    if sound is None:
        sound = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)
    frame = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], "fltp", "mono")
    frame.sample_rate = rate
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout, stream.bit_rate = "mono", 12200 if "amr" in codec else 64000
        fifo = av.AudioFifo()
        for part in av.AudioResampler(stream.format.name, "mono", rate).resample(frame):
            fifo.write(part)
        while part := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


FORMATS = [("a.m4a", "aac", 16000, "mp4"), ("a.aac", "aac", 44100, "adts"), ("a.webm", "libopus", 48000, "webm"),
           ("a.3gp", "libopencore_amrnb", 8000, "3gp"), ("a.amr", "libopencore_amrnb", 8000, "amr"),
           ("a.wma", "wmav2", 44100, "asf"), ("a.mp4", "aac", 22050, "mp4")]


@pytest.mark.parametrize(("name", "codec", "rate", "kind"), FORMATS)
def test_phone_formats_become_flac_at_their_rate_and_halves_are_named(source: Path, name: str, codec: str, rate: int,
                                                                      kind: str) -> None:
    encode(source / name, codec, rate, kind)
    (source / f"half_{name}").write_bytes((source / name).read_bytes()[: (source / name).stat().st_size // 2])
    row, = bring_in(source)
    header = soundfile.info(out_of(source) / row["audio"])
    assert (header.samplerate, header.format, row["id"]) == (rate, "FLAC", "a")
    assert abs(header.duration - 1) < 0.1
    assert set(skipped_of(source)) <= {"cut off", "unreadable"} and skipped_of(source)


def test_the_content_decides_not_the_ending(source: Path) -> None:
    encode(source / "phone.m4a", "aac", 16000, "mp4")
    (source / "phone.m4a").rename(source / "phone.wav")
    write(source / "really.mp3", noise(0), format="WAV")
    rows = {row["id"]: row["audio"] for row in bring_in(source)}
    assert rows == {"phone": "audio/phone.wav.flac", "really": "audio/really.mp3"}
    for audio in rows.values():
        check_recording(out_of(source) / audio)


def test_every_format_of_libsndfile_can_be_cut(source: Path) -> None:
    cases = [("a.wav", "GSM610"), ("b.wav", "G721_32"), ("c.wav", "NMS_ADPCM_16"), ("d.aiff", "GSM610"),
             ("e.w64", "GSM610"), ("f.au", "ULAW"), ("g.wav", "IMA_ADPCM"), ("h.ogg", "VORBIS"),
             ("i.mp3", "MPEG_LAYER_III"), ("j.caf", "ALAC_16")]
    for name, subtype in cases:
        write(source / name, noise(0, 2, 8000), 8000, subtype=subtype)
    (source / "t.csv").write_text("file,text,start,end\n" + "".join(f"{name},ሰላም,0.5,1.25\n" for name, _ in cases),
                                  encoding="utf-8")
    rows = bring_in(source)
    assert [row["duration"] for row in rows] == [0.75] * len(cases)
    assert all(soundfile.info(out_of(source) / row["audio"]).frames == 6000 for row in rows)


def test_floats_beyond_full_scale_are_turned_down_and_numbers_that_are_no_sound_refused(source: Path) -> None:
    sound = noise(0, 2) / 32768
    write(source / "loud.wav", 3 * sound / np.abs(sound).max(), subtype="FLOAT")
    write(source / "wrong.wav", sound * 32768, subtype="FLOAT")
    (source / "t.csv").write_text("file,text,start\nloud.wav,ሰላም,1\nwrong.wav,ቤት,1\n", encoding="utf-8")
    clip = soundfile.read(out_of(source) / bring_in(source)[0]["audio"])[0]
    assert np.allclose(clip, sound[RATE:] / np.abs(sound[RATE:]).max(), atol=1e-6)
    assert skipped_of(source) == {"unusable sound": 1}


def test_many_channels_and_opposite_phase() -> None:
    sound = noise(0).astype(np.float32) / 32768
    assert np.array_equal(sound_decoder.mono_of(np.stack([sound, -sound], 1)), sound)
    header = sound_decoder.Sound(Path("x"), RATE, 9, 0.4, 16, False)
    content = sound_decoder.flac_bytes(np.repeat(sound[:, None], 9, axis=1), header)
    assert content[:4] == b"fLaC"


# ---------------------------------------------------------------------------------------------------------------------
# Cues


SRT = """1\r
00:00:01,000 --> 00:00:02,500\r
<i>ሰላም</i> {\\an8}ለዓለም።\r
\r
2\r
00:00:02,600 --> 00:00:03,000\r
- ቤት።\r
\r
3\r
00:00:05,000 --> 00:00:06,000\r
♪ [ሙዚቃ] ♪\r
\r
4\r
00:00:07,000 --> 00:00:10,000\r
አንድ።\r
\r
5\r
00:00:08,000 --> 00:00:11,000\r
ሁለት።\r
\r
6\r
00:01:00,000 --> 00:01:03,000\r
መጨረሻ።\r
"""


def test_cues_are_cleaned_joined_and_dropped() -> None:
    cues, faults = subtitles.read_cues(SRT)
    kept, overlapping = subtitles.without_overlaps(cues)
    assert subtitles.join_cues(kept) == [Cue(1, 3, "ሰላም ለዓለም። ቤት።"), Cue(60, 63, "መጨረሻ።")]
    assert len(faults) == 1 and "no words" in faults[0]
    assert len(overlapping) == 2 and all("same time" in fault for fault in overlapping)


def test_vtt_has_notes_styles_voices_and_short_times() -> None:
    content = ("WEBVTT\n\nNOTE x --- y\n\nSTYLE\n::cue {}\n\n00:01.000 --> 00:04.000 line:90%\n<v አበበ>ሰላም &amp; "
               "<00:02.000><c.yellow>ደህና</c>\n\nid\n01:00:00.000 --> 01:00:04.000\n<v ሳራ>እሺ\n")
    assert subtitles.read_cues(content) == ([Cue(1, 4, "ሰላም & ደህና", "አበበ"), Cue(3600, 3604, "እሺ", "ሳራ")], [])


def test_edges_move_into_silence_and_never_into_a_word() -> None:
    """Sound from 1 to 2, 2.5 to 4, 4.05 to 5 s; the pause of 0.05 s is the closure of a consonant."""
    levels = np.full(600, -70.0)
    for start, end in ((1, 2), (2.5, 4), (4.05, 5)):
        levels[round(start * 100): round(end * 100)] = -20.0
    moved = pauses.move_edges([Cue(1.1, 2.1, "a"), Cue(2.6, 4.0, "b"), Cue(4.0, 4.8, "c")], levels)
    assert [(round(cue.start, 2), round(cue.end, 2)) for cue in moved] == [(0.85, 2.15), (2.35, 4.0), (4.0, 5.15)]


def test_a_lecture_with_subtitles_becomes_clips_of_its_cues(source: Path) -> None:
    sound = np.zeros(20 * RATE, np.int16)
    for n, at in enumerate((2, 6, 10)):
        sound[at * RATE: (at + 3) * RATE] = noise(n, 3)
    write(source / "talk.flac", sound)
    cues = [(2.1, 4.9, "አንድ።"), (5.9, 9.0, "ሁለት።"), (10, 13.1, "ሦስት።"), (25, 27, "በኋላ።")]
    (source / "talk.am.srt").write_text("".join(
        f"{n}\n00:00:{start:06.3f} --> 00:00:{end:06.3f}\n{text}\n\n".replace(".", ",", 2)
        for n, (start, end, text) in enumerate(cues)), encoding="utf-8-sig")
    rows = bring_in(source)
    assert [row["text"] for row in rows] == ["አንድ።", "ሁለት።", "ሦስት።"]
    for row, at in zip(rows, (2, 6, 10), strict=True):
        assert at - 0.4 <= row["start"] <= at and at + 3 <= row["start"] + row["duration"] <= at + 3.4
        samples = soundfile.read(out_of(source) / row["audio"], dtype="int16")[0]
        first = round(row["start"] * RATE)
        assert np.array_equal(samples, sound[first: first + len(samples)])
    assert skipped_of(source) == {"beyond the end": 1}


@pytest.mark.parametrize("given", ["talk.wav", "talk.am.srt"])
def test_one_recording_is_a_source_with_what_lies_beside_it(source: Path, given: str) -> None:
    write(source / "talk.wav", noise(0, 5))
    write(source / "other.wav", noise(1))
    (source / "talk.am.srt").write_text("1\n00:00:01,000 --> 00:00:03,000\nሰላም።\n", encoding="utf-8")
    assert [(row["source"], row["text"]) for row in bring_in(source / given)] == [("talk.wav", "ሰላም።")]


# ---------------------------------------------------------------------------------------------------------------------
# Speech without cues


@pytest.fixture(scope="module")
def speech() -> tuple[np.ndarray, int, list[tuple[float, float]]]:
    """Spoken sentences with pauses of 1.2 s: samples, rate, where speech is (seconds)."""
    parts, spans, at = [], [], 0
    for path in sorted((ROOT / "processed_data" / "audio").glob("*.flac"))[:8]:
        samples, rate = soundfile.read(path, dtype="int16")
        spans.append((at / rate, (at + len(samples)) / rate))
        parts += [samples, np.zeros(round(1.2 * rate), np.int16)]
        at += len(samples) + len(parts[-1])
    return np.concatenate(parts), rate, spans


def test_a_long_recording_is_cut_at_its_pauses(source: Path, speech: tuple[np.ndarray, int, list[tuple[float, float]]]
                                               ) -> None:
    samples, rate, spans = speech
    write(source / "talk.ogg", samples, rate)
    rows = bring_in(source)
    assert [row["text"] for row in rows] == [""] * len(rows)
    assert all(2 <= row["duration"] <= 15 for row in rows)
    for start, end in spans:  # every sentence lies whole in one clip, but for the fading of its edges
        assert any(row["start"] <= start + 0.15 and end - 0.25 <= row["start"] + row["duration"] for row in rows)
    assert sum(row["duration"] for row in rows) < len(samples) / rate - 4


def test_clips_keep_to_their_lengths_whatever_the_pauses() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.1, 0.5):
        probabilities = (rng.random(4000) > share).astype(float)
        clips, alone = pauses.clips_of(probabilities, rng.normal(-20, 3, 4000), 2, 15)
        assert all(1.9 <= end - start <= 15.1 for start, end in clips)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(clips, clips[1:], strict=False))
    assert pauses.clips_of(np.zeros(500), np.zeros(500), 2, 15) == ([], 0)
    lonely = np.zeros(500)
    lonely[200:220] = 1
    assert pauses.clips_of(lonely, np.zeros(500), 2, 15) == ([], 1)


def test_a_long_sound_without_speech_is_named(source: Path) -> None:
    write(source / "hum.wav", (noise(0, 20) // 100))
    write(source / "short.wav", noise(1, 3))
    assert [row["id"] for row in bring_in(source)] == ["short"]
    assert skipped_of(source) == {"no speech": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Texts that come later, and runs that come again


def test_a_transcriber_fills_texts_once_and_its_failures_are_named(source: Path, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    write_sounds(source)
    program = tmp_path / "say it.py"
    log = tmp_path / "log"
    program.write_text(f"import sys, pathlib\nname = pathlib.Path(sys.argv[-1]).stem\n"
                       f"open({str(log)!r}, 'a').write(name)\n"
                       "assert pathlib.Path(sys.argv[-1]).is_file() and sys.argv[1] == '--x y'\n"
                       "sys.exit('no idea') if name == 'u2' else print(' ሰላም\\n', name)\n", encoding="utf-8")
    command = f"'{sys.executable}' '{program}' '--x y'"
    rows = bring_in(source, "--transcriber", command)
    assert [row["text"] for row in rows] == ["ሰላም u0", "ሰላም u1", "", "ሰላም u3"]
    assert "audio/u2.wav: ended with status 1 (no idea)" in capsys.readouterr().out
    assert bring_in(source, "--transcriber", command) == rows
    assert log.read_text() == "u0u1u2u3u2"
    assert bring_in(source) == rows  # what it said stays without it
    with pytest.raises(ToolError, match="cannot be started"):
        bring_in(source, "--transcriber", "no-such-program")


def test_typed_texts_survive_new_files_and_files_that_are_away_for_a_while(source: Path) -> None:
    write_sounds(source, ["a", "b"])
    rows = bring_in(source)
    rows[0]["text"] = "የተጻፈ"
    path = out_of(source) / "recordings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "a.wav").rename(source / "a.away")
    write_sounds(source, ["c"])
    assert [row["id"] for row in bring_in(source)] == ["b", "c"]
    (source / "a.away").rename(source / "a.wav")
    assert {row["id"]: row["text"] for row in bring_in(source)} == {"a": "የተጻፈ", "b": "", "c": ""}


def test_a_run_again_changes_nothing_and_a_changed_source_is_followed(source: Path, tmp_path: Path) -> None:
    nemo(source)
    write_sounds(source / "audio", ["more"])
    table = source / "manifest.json"
    bring_in(source)
    before = files_of(out_of(source))
    times = {path: path.stat().st_mtime_ns for path in out_of(source).rglob("*.flac")}
    bring_in(source)
    assert files_of(out_of(source)) == before
    assert times == {path: path.stat().st_mtime_ns for path in out_of(source).rglob("*.flac")}
    write(source / "audio" / "all.wav", np.concatenate([noise(n + 4) for n in range(4)]))
    table.write_text(table.read_text() + json.dumps({"audio_filepath": "more.wav", "text": "አዲስ"}))
    bring_in(source)
    changed = files_of(out_of(source))
    shutil.rmtree(out_of(source))
    bring_in(source)
    assert files_of(out_of(source)) == changed != before


def test_a_killed_run_is_finished_by_the_next_one(source: Path, tmp_path: Path,
                                                  speech: tuple[np.ndarray, int, list[tuple[float, float]]]) -> None:
    samples, rate, _ = speech
    for n in range(3):
        write(source / f"talk{n}.wav", np.roll(samples, 1000 * n)[: 16 * rate], rate)
    command = [sys.executable, "-m", "tools.import_recordings", str(source), "--output-dir"]
    wait_for = tmp_path / "killed" / "audio"
    for kind in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.DEVNULL)
        count = len(list(wait_for.rglob("*.flac")))
        while process.poll() is None and len(list(wait_for.rglob("*.flac"))) <= count:
            time.sleep(0.01)
        process.send_signal(kind)
        assert process.wait(30) in (-signal.SIGKILL, 128 + signal.SIGTERM, 0)
        assert not (tmp_path / "killed" / "recordings.jsonl").exists() or process.returncode == 0
    for folder in ("killed", "fresh"):
        import_recordings.main([str(source), "--output-dir", str(tmp_path / folder)])
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "fresh")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(source: Path, tmp_path: Path) -> None:
    nemo(source)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        disk = tmp_path / "limited"  # no right to mount: a limit on the size of files does the same
        limit = "ulimit -f 8; "
    else:
        limit = ""
    command = f"{limit}exec {sys.executable} -m tools.import_recordings {source} --output-dir {disk}"
    try:
        write(source / "audio" / "all.wav", np.concatenate([noise(n, 3) for n in range(4)]))
        rows = [{"audio_filepath": "all.wav", "offset": 3 * n, "duration": 3, "text": text}
                for n, text in enumerate(TEXTS)]
        (source / "manifest.json").write_text("\n".join(json.dumps(row) for row in rows))
        result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert re.search(r"cannot be written .*Free some disk space", result.stderr)
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True)


def test_the_listing_follows_each_folder_once(tmp_path: Path) -> None:
    write_sounds(tmp_path / "a" / "b", ["x"])
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    assert list_folder(tmp_path, tmp_path / "out")[0] == ["a/b/x.wav"]


# ---------------------------------------------------------------------------------------------------------------------
# What strangers brought


def test_a_table_in_each_speakers_folder_with_the_same_names(source: Path) -> None:
    for speaker in ("abebe", "sara"):
        write_sounds(source / speaker / "wavs")
        (source / speaker / "metadata.csv").write_text(lines_of(f"{{name}}|{{text}} {speaker}"), encoding="utf-8")
    rows = bring_in(source, "--speaker-from", "folder")
    assert [(row["id"], row["speaker"]) for row in rows] == [(f"{speaker}/{name}", speaker)
                                                             for speaker in ("abebe", "sara") for name in NAMES]
    for row in rows:
        assert row["text"].endswith(row["speaker"]) and row["audio"].startswith(f"audio/{row['speaker']}/")


def test_a_header_that_names_the_text_only_is_completed_from_the_sounds(source: Path) -> None:
    write_sounds(source / "x")
    (source / "t.csv").write_text("name;transcript\n" + lines_of("{name};{text}"), encoding="utf-8")
    assert [row["text"] for row in bring_in(source)] == TEXTS
    assert skipped_of(source) == {}


def test_captions_that_roll_say_nothing_twice() -> None:
    content = ("WEBVTT\nKind: captions\n\n00:00.000 --> 00:02.000\n \nአንድ<00:01.000><c> ሁለት</c>\n\n"
               "00:02.000 --> 00:02.010\nአንድ ሁለት\n \n\n00:02.010 --> 00:04.000\nአንድ ሁለት\nሦስት\n\n"
               "00:04.000 --> 00:04.010\nሦስት\n \n\n00:04.010 --> 00:06.000\nሦስት\nአራት\n")
    cues = subtitles.read_cues(content)[0]
    assert cues == [Cue(0, 2.01, "አንድ ሁለት"), Cue(2.01, 4.01, "ሦስት"), Cue(4.01, 6, "አራት")]
    twice = ("1\n00:00:00,000 --> 00:00:02,000\nአዎ\n \n2\n00:00:02,000 --> 00:00:04,000\nአዎ\n\n"
             "3\n00:00:04,000 --> 00:00:06,000\nእሺ")
    assert [cue.text for cue in subtitles.read_cues(twice)[0]] == ["አዎ", "አዎ", "እሺ"]


def test_texts_that_cannot_be_read_are_no_sounds_without_text(source: Path) -> None:
    write_sounds(source)
    (source / "metadata.csv").write_bytes("u0|caf\xe9\n".encode("latin-1"))
    with pytest.raises(ToolError, match="texts may be in what cannot be read: metadata.csv: not UTF-8 text at byte 6"):
        bring_in(source)
    assert [row["text"] for row in bring_in(source, "--layout", "folder")] == [""] * 4


def test_what_is_named_like_a_sound_and_not_read_is_said(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sounds(source, ["a", "b"])
    (source / "a.TextGrid").touch()
    (source / "b.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (source / "orphan.txt").write_text("ሰላም")
    assert [row["id"] for row in bring_in(source)] == ["a"]
    said = capsys.readouterr().out
    assert "1 files are named like a sound and are not read: a.TextGrid" in said
    assert "1 texts have no sound of their name: orphan.txt" in said
    assert skipped_of(source) == {"unreadable text": 1}


def test_packed_sounds_are_to_be_unpacked(source: Path) -> None:
    (source / "clips.tar.gz").touch()
    for path in (source, source / "clips.tar.gz"):
        with pytest.raises(ToolError, match="Unpack"):
            bring_in(path)


def test_a_header_of_size_0_is_read_to_the_end(source: Path) -> None:
    content = bytearray(write(source / "a.wav", noise(0)).read_bytes())
    place = content.index(b"data") + 4
    content[place: place + 4] = bytes(4)
    (source / "a.wav").write_bytes(content)
    row, = bring_in(source)
    assert np.array_equal(soundfile.read(out_of(source) / row["audio"], dtype="int16")[0], noise(0))


def test_an_mp3_in_blocks_has_the_samples_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp3", noise(0, 3), format="MP3")
    monkeypatch.setattr(sound_decoder, "BLOCK", 5000)
    read = np.concatenate(list(sound_decoder.read_blocks(sound_decoder.open_sound(path))))
    assert np.allclose(read[:, 0], soundfile.read(path, dtype="float32")[0], atol=1e-5)
