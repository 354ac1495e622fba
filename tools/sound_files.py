"""Reads recordings: what is no sound, or none worth training on, is named and refused. Writes WAV files.

Recordings are of 8 to 96 kHz (a multiple of 25 Hz) and at most 10 minutes. torch is loaded only where a waveform is
made.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from tools._common import ToolError, atomic_path

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_FILE = 600  # seconds; beyond, a file is not even read
BLOCK = 1 << 16  # frames read at a time, so that many channels are never all in memory
LOUDEST = 100.0  # of full scale (1); a file of larger numbers does not hold a sound
QUIETEST = 1e-3  # RMS, -60 dBFS: in 16 bits so quiet a sound has a third of its codes wrong; espeak-ng has -22


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
    """The length of a sound file; 0 for one that cannot be read."""
    try:
        return soundfile.info(path).duration
    except (OSError, TypeError, soundfile.LibsndfileError):  # TypeError: headerless .raw
        return 0.0


def bytes_cut_off(path: Path) -> int:
    """How much of its sound a WAV file lacks at the end; 0 for other files, and where a program wrote into a pipe and
    could not know the size (it put 0 or the largest one)."""
    with Path(path).open("rb") as handle:
        form = handle.read(12)
        if form[:4] != b"RIFF" or form[8:] != b"WAVE":
            return 0
        end = os.fstat(handle.fileno()).st_size
        while len(chunk := handle.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return max(0, handle.tell() + size - end) if size < 0x7FFF0000 else 0
            handle.seek(size + size % 2, os.SEEK_CUR)
    return 0


def check_recording(path: Path) -> int:
    """The sample rate. Raises: Unusable for a file that is not worth reading."""
    try:
        header, missing = soundfile.info(path), bytes_cut_off(path)
    except (OSError, TypeError, soundfile.LibsndfileError) as error:  # TypeError: headerless .raw
        raise Unusable("unreadable", unreadable(path, error)) from error
    if not header.frames:
        raise Unusable("empty recording", f"{path}: holds no sound. Record it again")
    # Any odd rate, such as 44099 Hz, would take gigabytes to resample.
    if not 8000 <= header.samplerate <= 96000 or header.samplerate % 25:
        raise Unusable("sample rate", f"{path}: {header.samplerate} Hz. Convert it to 16, 22.05, 24, 44.1 or 48 kHz")
    if header.frames / header.samplerate > LONGEST_FILE:
        raise Unusable("recording too long", f"{path}: {header.frames / header.samplerate / 60:.0f} minutes. Cut it "
                                             "into sentences")
    if missing > 100:  # some programs count the header in
        raise Unusable("cut off", f"{path}: the file ends {missing} bytes before its sound. Copy it again")
    return header.samplerate


def read_mono(path: Path) -> np.ndarray:
    """The mean of all channels [samples], float32. Raises: Unusable."""
    parts = []
    try:
        with soundfile.SoundFile(path) as file:
            frames = BLOCK if file.channels > 2 else -1  # all: an MP3 would give other numbers in blocks
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                parts.append(block.mean(1))
    except (OSError, soundfile.LibsndfileError) as error:
        raise Unusable("unusable sound", unreadable(path, error)) from error
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


def load_recording(path: Path, sample_rate: int) -> Tensor:
    """A sound file -> mono waveform [samples] at `sample_rate`, silence trimmed.

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
    waveform = torch.from_numpy(np.ascontiguousarray(trimmed))
    return torchaudio.functional.resample(waveform, rate, sample_rate) if rate != sample_rate else waveform


def write_wav(path: Path, waveform: Tensor, sample_rate: int) -> None:
    """Mono 16-bit WAV of a waveform within -1 to 1."""
    buffer = io.BytesIO()  # so that a full disk is an OSError, as everywhere, and none of libsndfile's own
    soundfile.write(buffer, waveform.numpy(), sample_rate, subtype="PCM_16", format="WAV")
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
