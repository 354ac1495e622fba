"""Sound files of every format, whole, cut off, with headers that lie: read whole or refused, never silently wrong."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tools import sound_files
from tools.sound_files import Unusable, load_recording, read_mono

RATE = 16000
TELEPHONE = {("AIFF", "GSM610"), ("WAV", "GSM610"), ("W64", "GSM610"), ("WAV", "G721_32"), ("AU", "G721_32"),
             ("AU", "G723_24"), ("AU", "G723_40"), ("WAV", "NMS_ADPCM_16"), ("WAV", "NMS_ADPCM_24"),
             ("WAV", "NMS_ADPCM_32")}  # cannot be seeked
COMMON = {("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("FLAC", "PCM_16"),
          ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "ULAW"),
          ("CAF", "ALAC_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("NIST", "PCM_16")}


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    """Without silence at either end."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.cos(2 * np.pi * 440 * times) + 0.02 * np.cos(2 * np.pi * 1333 * times)).astype(np.float32)


def written(folder: Path, sound: np.ndarray, name: str, subtype: str, rate: int = RATE) -> Path:
    path = folder / f"{name}_{subtype}.{name.lower()}"
    soundfile.write(path, sound, rate, format=name, subtype=subtype)
    return path


def can_be_written(name: str, subtype: str) -> bool:
    """libsndfile lists some that it only reads."""
    try:
        soundfile.write(io.BytesIO(), np.zeros(100), 8000, format=name, subtype=subtype)
    except soundfile.LibsndfileError:
        return name == "SD2"  # not into memory, for it makes two files
    return True


EVERY_FORMAT = [(name, subtype) for name in soundfile.available_formats()
                for subtype in soundfile.available_subtypes(name) if can_be_written(name, subtype)]


def test_telephone_formats_longer_than_a_block_are_read_whole(tmp_path: Path):
    sound = tone(10)  # seconds; more than sound_files.BLOCK
    for name, subtype in sorted(TELEPHONE):
        heard = load_recording(written(tmp_path, sound, name, subtype), RATE).numpy()
        assert 0 <= len(heard) - len(sound) < 1000, (name, subtype)
        assert np.corrcoef(heard[: len(sound)], sound)[0, 1] > 0.9, (name, subtype)


@pytest.mark.parametrize(("name", "subtype"), EVERY_FORMAT)
def test_every_format_is_read_whole_or_refused_and_a_part_of_a_file_is_never_taken_for_it(
        name: str, subtype: str, tmp_path: Path):
    sound = tone(1)
    path = written(tmp_path, sound, name, subtype)
    content = path.read_bytes()
    try:
        heard = load_recording(path, RATE).numpy()
    except Unusable as refused:
        assert (name, subtype) not in TELEPHONE | COMMON and str(refused).startswith(f"{path}: ")
        assert str(refused).count("\n") == 0
    else:
        assert len(sound) <= len(heard) < len(sound) + 1000
        assert np.corrcoef(heard[: len(sound)], sound)[0, 1] > 0.9
    for part in (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
        path.write_bytes(content[: round(part * len(content))])
        with pytest.raises(Unusable, match="^" + str(path)):
            load_recording(path, RATE)


@pytest.mark.parametrize(("name", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
                                               ("FLAC", "PCM_16")])
def test_a_long_compressed_file_that_ends_early_is_cut_off(name: str, subtype: str, tmp_path: Path):
    path = written(tmp_path, tone(20), name, subtype)
    content = path.read_bytes()
    ends = [len(content) // 2, round(0.99 * len(content)), len(content) - 5]
    ends += [content.rfind(b"OggS")] if name == "OGG" else []
    for end in ends:
        path.write_bytes(content[:end])
        with pytest.raises(Unusable):
            load_recording(path, RATE)


def put(content: bytes, after: bytes, distance: int, value: bytes) -> bytes:
    """The content with other bytes at a distance from where a chunk's name begins."""
    place = content.index(after) + distance
    return content[:place] + value + content[place + len(value) :]


@pytest.mark.parametrize(("name", "lie"), [
    ("WAV", lambda content: put(content, b"data", 4, bytes(4))),
    ("WAV", lambda content: put(content, b"data", 4, b"\xff" * 4)),
    ("WAV", lambda content: put(content, b"data", 4, struct.pack("<I", 0x7FFFFFFF))),
    ("WAV", lambda content: put(put(content, b"data", 4, bytes(4)), b"RIFF", 4, bytes(4))),
    ("AIFF", lambda content: put(content, b"SSND", 4, bytes(4))),
    ("AIFF", lambda content: put(content, b"COMM", 10, bytes(4))),
    ("AU", lambda content: put(content, b".snd", 8, bytes(4))),
    ("AU", lambda content: put(content, b".snd", 8, b"\xff" * 4)),
    ("W64", lambda content: put(content, b"data", 16, bytes(8))),
    ("RF64", lambda content: put(content, b"ds64", 8, bytes(24))),
    ("CAF", lambda content: put(content, b"data", 4, bytes(8))),
    ("CAF", lambda content: put(content, b"data", 4, b"\xff" * 8)),
    ("FLAC", lambda content: put(content, b"fLaC", 21, bytes([content[21] & 0xF0, 0, 0, 0, 0]))),
])
def test_a_header_that_does_not_know_the_size_costs_no_sound_silently(name: str, lie: Callable[[bytes], bytes],
                                                                      tmp_path: Path):
    sound = tone(5)
    path = written(tmp_path, sound, name, "PCM_16")
    path.write_bytes(lie(path.read_bytes()))
    try:
        heard = load_recording(path, RATE).numpy()
    except Unusable as refused:
        assert str(refused).startswith(f"{path}: ") and sound_files.seconds_of(path) < 6
    else:
        assert abs(len(heard) - len(sound)) < 10 and np.corrcoef(heard, sound[: len(heard)])[0, 1] > 0.9


@pytest.mark.parametrize("name", ["WAV", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3"])
def test_a_header_with_wrong_bytes_is_read_or_refused_and_never_ends_the_program(name: str, tmp_path: Path):
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(name, "PCM_16")
    path = written(tmp_path, tone(0.5), name, subtype)
    content = path.read_bytes()
    for place in range(0, 112, 4):
        for wrong in (bytes(8), b"\xff" * 8, b"\1" + bytes(7), bytes(7) + b"\1"):
            path.write_bytes(content[:place] + wrong + content[place + 8 :])
            with contextlib.suppress(Unusable):
                assert len(load_recording(path, RATE)) < 10 * RATE
            assert sound_files.seconds_of(path) >= 0


def test_an_mp3_of_changing_bit_rate_whose_header_is_lost_is_refused_rather_than_read_by_half(tmp_path: Path):
    noise = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32)
    sound = np.concatenate([tone(10), 0.3 * noise.clip(-1, 1)])
    path = written(tmp_path, sound, "MP3", "MPEG_LAYER_III")
    content = path.read_bytes()
    assert len(load_recording(path, RATE)) >= len(sound) - 1
    first, _ = sound_files.mp3_frame(content[:4])
    path.write_bytes(content[first:])
    with pytest.raises(Unusable, match="its header tells"):
        load_recording(path, RATE)


@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_channels_of_opposite_phase_do_not_silence_each_other(offset: float, tmp_path: Path):
    sound = tone(1)
    stereo = np.stack([0.9 * sound + offset, -sound + offset], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, RATE, subtype="FLOAT")
    assert np.allclose(read_mono(tmp_path / "stereo.wav"), stereo[:, 1])


def test_channels_that_agree_or_have_nothing_in_common_are_averaged(tmp_path: Path):
    rng = np.random.default_rng(0)
    for stereo in (np.stack([tone(1), 0.5 * tone(1)], 1), 0.1 * rng.standard_normal((RATE, 2)).clip(-1, 1),
                   np.stack([tone(1), 0 * tone(1)], 1)):
        soundfile.write(tmp_path / "stereo.wav", stereo, RATE, subtype="FLOAT")
        assert np.array_equal(read_mono(tmp_path / "stereo.wav"), stereo.astype(np.float32).mean(1))


def test_of_seven_channels_one_voice_is_heard(tmp_path: Path):
    for signs in ([1] * 7, [1, -1, 1, -1, 1, -1, 0], [0, 0, 0, 1, 0, 0, 0]):
        soundfile.write(tmp_path / "seven.wav", tone(5)[:, None] * np.array(signs), RATE, subtype="FLOAT")
        heard = load_recording(tmp_path / "seven.wav", RATE).numpy()
        assert len(heard) == 5 * RATE and abs(np.corrcoef(heard, tone(5))[0, 1]) > 0.99
