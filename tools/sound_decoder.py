"""Sound of any common format, block by block: what soundfile reads, and the rest (m4a, aac, mp4, webm, 3gp, wma, amr)
through ffmpeg's libraries.

These come with PyAV (`av`, BSD): its wheels carry them for Linux, macOS and Windows, it has releases every few months,
and its version is pinned like that of every other requirement. The ffmpeg program would have to be installed by hand,
is of another version on every machine, and gives faults as free text instead of errors.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile

from tools.sound_files import (
    BLOCK,
    FORMATS,
    LOUDEST,
    UNKNOWN_LENGTH,
    Unusable,
    bytes_cut_off,
    ends_within_ogg,
    mp3_samples,
)

FFMPEG_SUFFIXES = {".m4a", ".aac", ".mp4", ".m4b", ".m4v", ".mov", ".webm", ".weba", ".mkv", ".mka", ".3gp", ".3gpp",
                   ".3g2", ".wma", ".wmv", ".asf", ".amr", ".awb", ".ac3", ".avi", ".mp2", ".mpeg", ".mpg", ".ape",
                   ".wv", ".tta", ".spx"}
OTHER_SUFFIXES = {".aifc", ".snd", ".sph", ".nist", ".rf64", ".voc", ".avr", ".pvf", ".8svx"}  # that soundfile reads
FINE = {"PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAC_20", "ALAC_24", "ALAC_32"}  # more than 16 bits
FINE_SAMPLES = {"s32", "s32p", "s64", "s64p"}  # of ffmpeg; its lossy decoders give floats
MOST_CHANNELS = 8  # of FLAC
MISSING_END = 0.5  # seconds less than the header says: a file that was cut off


@dataclass(frozen=True)
class Sound:
    """What the header of a sound file says."""

    path: Path
    sample_rate: int
    channels: int
    seconds: float
    """0 where the header does not say."""
    bits: int
    """16 or 24: what a FLAC copy needs to lose nothing."""
    by_ffmpeg: bool


def open_sound(path: Path) -> Sound:
    """Reads the header; the content decides, not the ending. Raises: Unusable naming the file, also for one that is cut
    off, as far as its form tells, or of a rate that preprocess refuses."""
    try:
        if not path.stat().st_size:
            raise Unusable("empty file", f"{path}: has no bytes. Copy it again")
        missing = bytes_cut_off(path)
    except OSError as error:
        raise Unusable("unreadable", f"{path}: cannot be read ({error.strerror}). Mend its rights, or copy it again"
                       ) from error
    try:
        header = soundfile.info(path)
    except (OSError, TypeError, soundfile.LibsndfileError) as error:  # TypeError: headerless .raw
        sound = open_with_ffmpeg(path, str(error))
    else:
        if not header.frames:  # a program that wrote into a pipe could not fill the size in; ffmpeg reads to the end
            return open_with_ffmpeg(path, "its header counts no samples")
        if header.format not in FORMATS:
            raise Unusable("unreadable", f"{path}: {header.format_info}, a format in which half a file looks like a "
                                         "whole one. Convert it to WAV or FLAC")
        if missing > 100 or ends_within_ogg(path) or (header.format == "MP3" and mp3_samples(path)[1]):
            raise Unusable("cut off", f"{path}: the file ends before its sound. Copy it again")
        seconds = header.frames / header.samplerate if header.frames < UNKNOWN_LENGTH else 0.0
        bits = 24 if header.subtype in FINE else 16
        sound = Sound(path, header.samplerate, header.channels, seconds, bits, False)
    if not 8000 <= sound.sample_rate <= 96000 or sound.sample_rate % 25:
        raise Unusable("sample rate", f"{path}: {sound.sample_rate} Hz. Convert it to 16, 22.05, 24, 44.1 or 48 kHz")
    return sound


def open_with_ffmpeg(path: Path, reason: str) -> Sound:
    """Raises: Unusable; `reason` is what soundfile had to say."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise Unusable("no sound in it", f"{path}: has no sound track. Take its row out")
            stream = container.streams.audio[0]
            if stream.codec_context is None or not stream.rate or not stream.channels or stream.format is None:
                raise Unusable("unreadable", f"{path}: its sound track is of no known kind. Convert it to WAV or FLAC")
            seconds = 0.0
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration:
                seconds = container.duration / 1e6
            bits = 24 if stream.format.name in FINE_SAMPLES else 16
            return Sound(path, stream.rate, stream.channels, seconds, bits, True)
    except (av.FFmpegError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise Unusable("unreadable", f"{path}: cannot be read as sound ({reason.rstrip('.')}; {said}). Copy it again, "
                                     "or convert it to WAV or FLAC") from error


def read_blocks(sound: Sound) -> Iterator[np.ndarray]:
    """The samples from start to end as blocks [n, channels], float32; 16 and 24 bits are exact in it.

    Raises: Unusable naming the file where it cannot be read to its end.
    """
    frames = 0
    for block in read_with_ffmpeg(sound) if sound.by_ffmpeg else read_with_soundfile(sound):
        if not np.isfinite(block).all():
            raise Unusable("unusable sound", f"{sound.path}: holds samples that are not finite numbers. Export the "
                                             "recording again")
        if np.abs(block).max(initial=0) > LOUDEST:
            raise Unusable("unusable sound", f"{sound.path}: has samples of {np.abs(block).max():.3g}, where 1 is the "
                                             "loudest sound. Export the recording again")
        frames += len(block)
        yield block
    if not frames:
        raise Unusable("empty recording", f"{sound.path}: holds no sound. Record it again")
    missing = sound.seconds - frames / sound.sample_rate
    if missing > max(MISSING_END, 0.01 * sound.seconds):  # a header may be a little off
        raise Unusable("cut off", f"{sound.path}: the file ends {missing:.1f} s before its sound. Copy it again")


class ForwardFile(soundfile.SoundFile):
    """Read from start to end only: soundfile seeks behind every block otherwise, which makes clicks in an MP3 and which
    GSM, G721 and NMS ADPCM cannot."""

    def seekable(self) -> bool:
        return False


def read_with_soundfile(sound: Sound) -> Iterator[np.ndarray]:
    try:
        with ForwardFile(sound.path) as file:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield block
    except (OSError, soundfile.LibsndfileError) as error:
        raise Unusable("unreadable", f"{sound.path}: cannot be read to its end ({str(error).rstrip('.')}). Copy it "
                                     "again") from error


def read_with_ffmpeg(sound: Sound) -> Iterator[np.ndarray]:
    try:
        with av.open(str(sound.path), metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            # A stream may change its form on the way, as AAC does when its upper half sets in.
            resampler = av.AudioResampler("fltp", stream.layout, sound.sample_rate)
            for frame in container.decode(stream):
                for part in resampler.resample(frame):
                    yield np.ascontiguousarray(part.to_ndarray().T)
            for part in resampler.resample(None):
                yield np.ascontiguousarray(part.to_ndarray().T)
    except (av.FFmpegError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise Unusable("unreadable", f"{sound.path}: cannot be read to its end ({said}). Copy it again, or convert it "
                                     "to WAV or FLAC") from error


def cut(blocks: Iterable[np.ndarray], parts: list[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
    """Each part's place in `parts` and its samples [n, channels], in one pass, in the order of their ends.

    `parts` are (first frame, frame behind the last) and may overlap. One that reaches beyond the end comes short.
    """
    order = sorted(range(len(parts)), key=lambda i: parts[i])
    held: dict[int, list[np.ndarray]] = {}
    at = upcoming = 0
    for block in blocks:
        end = at + len(block)
        while upcoming < len(order) and parts[order[upcoming]][0] < end:
            held[order[upcoming]] = []
            upcoming += 1
        for i in [*held]:
            first, last = parts[i]
            held[i].append(block[max(0, first - at) : last - at])
            if last <= end:
                yield i, np.concatenate(held.pop(i))
        at = end
    for i, pieces in held.items():
        yield i, np.concatenate(pieces)


def mono_of(block: np.ndarray) -> np.ndarray:
    """[n, channels] -> [n]: the mean, or the loudest channel where they cancel each other out (opposite phase)."""
    mean = block.mean(1)
    energies = np.square(block).mean(0)
    cancelled = block.shape[1] > 1 and np.square(mean).mean() < 0.02 * energies.max(initial=0)
    return block[:, int(energies.argmax())] if cancelled else mean


def flac_bytes(samples: np.ndarray, sound: Sound) -> bytes:
    """Samples [n, channels], float32, as a FLAC file of the source's rate and depth; bit for bit those of one of 16 or
    24 bits. Floats beyond 1 are turned down, not clipped; more than 8 channels become one."""
    if samples.shape[1] > MOST_CHANNELS:
        samples = mono_of(samples)[:, None]
    samples = samples / max(1.0, np.abs(samples).max(initial=0))
    full = 1 << (sound.bits - 1)
    whole = np.clip(np.rint(samples.astype(np.float64) * full), -full, full - 1).astype(np.int32)
    buffer = io.BytesIO()  # so that a full disk is an OSError, as everywhere, and none of libsndfile's own
    values = whole.astype(np.int16) if sound.bits == 16 else whole << 8
    soundfile.write(buffer, values, sound.sample_rate, subtype=f"PCM_{sound.bits}", format="FLAC")
    return buffer.getvalue()
