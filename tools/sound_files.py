"""Reads recordings: what is no sound, or none worth training on, is named and refused. Writes WAV files.

Recordings are of 8 to 96 kHz (a multiple of 25 Hz) and at most 10 minutes. torch is loaded only where a waveform is
made.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import soundfile

from tools._common import ToolError, atomic_path

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_FILE = 600  # seconds; beyond, a file is not even read
BLOCK = 1 << 16  # frames read at a time, so that many channels are never all in memory
LOUDEST = 100.0  # of full scale (1); a file of larger numbers does not hold a sound
QUIETEST = 1e-3  # RMS, -60 dBFS: in 16 bits so quiet a sound has a third of its codes wrong; espeak-ng has -22
FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST"}
"""libsndfile's names of the containers whose end can be told from a cut."""
UNKNOWN_SIZE = 0x7FFF0000  # bytes; what a header of 32 bits says when its writer could not know
UNKNOWN_LENGTH = 1 << 62  # the same of 64 bits; and libsndfile's count of frames for a FLAC file that does not tell
LARGEST_PAGE = 65_307  # bytes of an Ogg page
LARGEST_MP3 = 1 << 28  # bytes; more than LONGEST_FILE at any rate
MP3_RATES = (44100, 48000, 32000)
MP3_KILOBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MP3_KILOBITS_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # of versions 2 and 2.5


class Unusable(ToolError):
    """Why a recording, or its row, cannot be used: a short reason to count by, and the details."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def path_within(audio: str, audio_dir: Path) -> Path:
    """Where a row's recording lies; `audio_dir` is free of links. Raises: Unusable for a path that leads out of it."""
    path = audio_dir / audio
    if "\0" in audio or not Path(os.path.realpath(path)).is_relative_to(audio_dir):
        raise Unusable("outside the audio folder", f"{path}: leads out of {audio_dir}. Copy the recording into it, or "
                                                   "name the folder that holds all recordings as --audio-dir")
    return path


def unreadable(path: Path, error: Exception) -> str:
    """The message for a recording that soundfile cannot open."""
    if not Path(path).is_file():
        return f"{path}: no such recording. Correct its path, or take the row out"
    return f"{path}: cannot be read as sound ({str(error).rstrip('.')}). Give a WAV, FLAC or OGG file"


def seconds_of(path: Path) -> float:
    """The length of a sound file; 0 for one that cannot be read, or does not say it."""
    try:
        header = soundfile.info(path)
    except (OSError, TypeError, soundfile.LibsndfileError):  # TypeError: headerless .raw
        return 0.0
    return header.duration if header.frames < UNKNOWN_LENGTH else 0.0


class Chunks(NamedTuple):
    """How the chunks of a sound file are laid out: the first one's place, name and size in bytes, the name of the one
    that holds the sound (b"": all chunks matter), whether the size counts its own header, and on what multiple of bytes
    the next one begins."""

    first: int
    name_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    sound: bytes
    counts_header: bool = False
    multiple: int = 2


CHUNKS = {b"RIFF": Chunks(12, 4, 4, "little", b"data"), b"RF64": Chunks(12, 4, 4, "little", b"data"),
          b"FORM": Chunks(12, 4, 4, "big", b"SSND"),
          b"caff": Chunks(8, 4, 8, "big", b"", multiple=1),  # the lengths of packets follow the sound
          b"riff": Chunks(40, 16, 8, "little", b"data", counts_header=True, multiple=8)}  # W64


def bytes_cut_off(path: Path) -> int:
    """How much of its sound a file of chunks (WAV, RF64, W64, AIFF, CAF) or an AU file lacks at the end; 0 for others,
    and where a program wrote into a pipe and could not know the size (it put 0 or the largest one)."""
    with Path(path).open("rb") as handle:
        magic, end = handle.read(4), os.fstat(handle.fileno()).st_size
        if magic in (b".snd", b"dns."):
            start, size = (int.from_bytes(handle.read(4), "big" if magic == b".snd" else "little") for _ in range(2))
            return max(0, start + size - end) if size < UNKNOWN_SIZE else 0
        if magic not in CHUNKS:
            return 0
        layout, wide = CHUNKS[magic], 0
        handle.seek(layout.first)
        length = layout.name_bytes + layout.size_bytes
        while len(header := handle.read(length)) == length:
            size, place = int.from_bytes(header[layout.name_bytes :], layout.order), handle.tell()
            size -= length if layout.counts_header and size else 0
            if header.startswith(b"ds64"):  # RF64's own sizes: of the file, then of the sound
                wide = int.from_bytes(handle.read(16)[8:], "little")
            if header.startswith(layout.sound):
                size = wide if wide and size == 0xFFFFFFFF else size
                known = size < (UNKNOWN_SIZE if layout.size_bytes == 4 and not wide else UNKNOWN_LENGTH)
                if layout.sound or not known or place + size > end:
                    return max(0, place + size - end) if known else 0
            if size < 0 or place + size >= end:  # a header that is damaged
                return 0
            handle.seek(place + size + -size % layout.multiple)
    return 0


def ends_within_ogg(path: Path) -> bool:
    """Whether an Ogg file lacks its end: its last page is not whole, or not marked as the last one."""
    with Path(path).open("rb") as handle:
        if handle.read(4) != b"OggS":
            return False
        end = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, end - 2 * LARGEST_PAGE))
        tail = handle.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def mp3_frame(header: bytes) -> tuple[int, int]:
    """(bytes, samples) of the MP3 frame that begins with these 4 bytes; (0, 0) for what begins none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:  # sync, layer III
        return 0, 0
    version, rate, bitrate = header[1] >> 3 & 3, header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or rate == 3 or bitrate in (0, 15):
        return 0, 0
    samples = 1152 if version == 3 else 576
    hertz = MP3_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    kilobits = (MP3_KILOBITS if version == 3 else MP3_KILOBITS_2)[bitrate - 1]
    return samples // 8 * kilobits * 1000 // hertz + (header[2] >> 1 & 1), samples


def mp3_samples(path: Path) -> tuple[int, bool]:
    """The samples that an MP3 file's frames add up to, 0 for another file, and whether the last of them is cut off."""
    content = Path(path).read_bytes() if path.stat().st_size < LARGEST_MP3 else b""
    place, total = 0, 0
    if content[:3] == b"ID3" and len(content) > 10:
        place = 10 + sum((byte & 127) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))
    while True:
        size, samples = mp3_frame(content[place : place + 4])
        if not size:
            return total, False  # the end, a tag, or no MP3 file at all
        if place + size > len(content):
            return total, total > 0
        place, total = place + size, total + samples


def check_recording(path: Path) -> int:
    """The sample rate. Raises: Unusable for a file that is not worth reading."""
    try:
        header, missing = soundfile.info(path), bytes_cut_off(path)
    except (OSError, TypeError, soundfile.LibsndfileError) as error:  # TypeError: headerless .raw
        raise Unusable("unreadable", unreadable(path, error)) from error
    if header.format not in FORMATS:
        raise Unusable("unreadable", f"{path}: {header.format_info}, a format in which half a file looks like a whole "
                                     "one. Convert it to WAV or FLAC")
    if not header.frames:
        raise Unusable("empty recording", f"{path}: holds no sound, or its header counts none. Record it again, or "
                                          "convert it to FLAC with a program that passes over the header")
    # Any odd rate, such as 44099 Hz, would take gigabytes to resample.
    if not 8000 <= header.samplerate <= 96000 or header.samplerate % 25:
        raise Unusable("sample rate", f"{path}: {header.samplerate} Hz. Convert it to 16, 22.05, 24, 44.1 or 48 kHz")
    if header.frames >= UNKNOWN_LENGTH:
        raise Unusable("unreadable", f"{path}: its header does not say how long it is. Convert it again")
    if header.frames / header.samplerate > LONGEST_FILE:
        raise Unusable("recording too long", f"{path}: {header.frames / header.samplerate / 60:.0f} minutes. Cut it "
                                             "into sentences")
    if missing > (0 if header.format == "CAF" else 100):  # some programs count the header in
        raise Unusable("cut off", f"{path}: the file ends {missing} bytes before its sound. Copy it again")
    told = re.search(rb"\nsample_count -i (\d+)", path.read_bytes()[:1024]) if header.format == "NIST" else None
    samples, within_frame = mp3_samples(path) if header.format == "MP3" else (0, False)
    if ends_within_ogg(path) or within_frame or (told and header.frames < int(told[1])):
        raise Unusable("cut off", f"{path}: the file ends before its sound. Copy it again")
    if samples > 1.02 * header.frames + 5000:
        raise Unusable("unreadable", f"{path}: its header tells {header.frames} samples, and it has about {samples}. "
                                     "Convert it to WAV or FLAC")
    return header.samplerate


def blocks_of(path: Path) -> Iterator[np.ndarray]:
    """The sound of a file [n, channels], float32, part by part. Raises: Unusable."""
    read = 0
    try:
        with soundfile.SoundFile(path) as file:
            # An MP3 would give other numbers in blocks; what cannot be seeked (GSM, G721, NMS) is read in no other way.
            frames = BLOCK if file.channels > 2 or not file.seekable() else -1
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                read += len(block)
                yield block
            told = file.frames
    except (OSError, soundfile.LibsndfileError) as error:
        raise Unusable("unusable sound", unreadable(path, error)) from error
    if read < told:
        raise Unusable("cut off", f"{path}: {read} of {told} samples can be read. Copy it again")


def read_mono(path: Path) -> np.ndarray:
    """The mean of all channels [samples], float32; the loudest one where they cancel each other. Raises: Unusable."""
    parts, sums, squares, count = [], np.zeros(1), np.zeros(1), 0
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks_of(path):
            parts.append(block.mean(1))
            if block.shape[1] > 1:
                with_mean = np.column_stack([block, parts[-1]])
                sums = sums + with_mean.sum(0, np.float64)
                squares = squares + np.einsum("nc,nc->c", with_mean, with_mean, dtype=np.float64)
                count += len(block)
        *power, of_mean = squares / max(1, count) - np.square(sums / max(1, count))  # without each channel's offset
    # Of channels that have nothing in common the mean keeps 1 / len(power) of their power.
    if power and of_mean < np.mean(power) / (2 * len(power)):
        loudest = int(np.argmax(power))
        parts = [block[:, loudest] for block in blocks_of(path)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def trim_silence(waveform: np.ndarray, sample_rate: int, threshold: float = 0.01, margin: float = 0.01) -> np.ndarray:
    """Cuts both ends where |sample| stays below `threshold` of the peak, keeping `margin` seconds. [n] -> [m].

    Trimming twice changes nothing.
    """
    loud = np.flatnonzero(np.abs(waveform) > threshold * np.max(np.abs(waveform), initial=0.0))
    if not len(loud):
        return waveform[:0]
    keep = round(margin * sample_rate)
    return waveform[max(0, loud[0] - keep) : loud[-1] + 1 + keep]


def load_recording(path: Path, sample_rate: int, trim: bool = True) -> Tensor:
    """A sound file -> mono waveform [samples] at `sample_rate`, silence trimmed or not.

    Raises: Unusable naming the file, for one that check_recording refuses or whose sound is none.
    """
    import torch
    import torchaudio

    rate, mono = check_recording(path), read_mono(path)
    if not np.isfinite(mono).all():
        raise Unusable("unusable sound", f"{path}: holds samples that are not finite numbers. Export the recording "
                                         "again")
    if np.abs(mono).max(initial=0) > LOUDEST:
        raise Unusable("unusable sound", f"{path}: has samples of {np.abs(mono).max():.3g}, where 1 is the loudest "
                                         "sound. Export the recording again")
    trimmed = trim_silence(mono, rate)
    if len(trimmed) < 0.1 * rate:
        raise Unusable("unusable sound", f"{path}: under 0.1 s of sound once silence is trimmed. Remove this recording")
    if trimmed.std() < QUIETEST:
        raise Unusable("unusable sound", f"{path}: practically silent, under -60 dBFS. Remove this recording")
    waveform = torch.from_numpy(np.ascontiguousarray(trimmed if trim else mono))
    return torchaudio.functional.resample(waveform, rate, sample_rate) if rate != sample_rate else waveform


def write_wav(path: Path, waveform: Tensor, sample_rate: int) -> None:
    """Mono 16-bit WAV of a waveform within -1 to 1."""
    buffer = io.BytesIO()  # so that a full disk is an OSError, as everywhere, and none of libsndfile's own
    soundfile.write(buffer, waveform.numpy(), sample_rate, subtype="PCM_16", format="WAV")
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
