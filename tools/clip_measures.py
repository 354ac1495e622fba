"""What can be measured of one clip, and how alike two are. Pure but for measure_file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools._common import Progress
from tools.pauses import QUIET, STEP, decibels, speech_of, speech_runs
from tools.sound_decoder import mono_of, open_sound, read_blocks
from tools.sound_files import LONGEST_FILE, Unusable

FRAME = 0.02  # seconds to one level
FULL = 0.999  # of the peak: samples that a clipped wave stays at
LOWEST, HIGHEST = 300.0, 3300.0  # Hz of a print: what a telephone leaves of a voice
BANDS = 17  # of a print: a bit for each but one
SLICE, HOP = 0.256, 0.064  # seconds: what a row of a print covers, and from row to row
ALIKE = 0.27  # of bits that differ at most between prints of one sound; two sentences of a voice differ by 0.38 or more
ALIKE_THIRD = 0.3  # the same for the worst third of them
SHIFTS = range(-3, 4)  # rows by which the start of a copy may differ
COMPARED = 24  # rows at the start of all prints that are compared at first
SAME_LENGTH = 0.3  # seconds that copies of a sound may differ by
BLOCK = 256  # clips that are compared at a time


@dataclass(frozen=True)
class Measures:
    """Of one clip. Levels are in dB of full scale."""

    seconds: float
    level: float
    """Of the louder half of its frames: the voice."""
    snr: float
    """dB from the quietest twentieth of its frames to the loudest tenth."""
    clipped: float
    """Share of samples that lie in the flat top of a clipped wave."""
    offset: float
    """Mean of all samples."""
    speech_start: float
    """Seconds; speech_end is 0 where there is no speech."""
    speech_end: float
    print: str
    """Of its spectrum's shape over time, hexadecimal; loudness and coding hardly change it."""
    print_seconds: float
    """Seconds between its first and its last loud frame."""

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}


def frame_levels(sound: np.ndarray, rate: int) -> np.ndarray:
    """[n] -> level of every FRAME seconds [frames], at least one."""
    size = max(1, round(FRAME * rate))
    padded = np.pad(sound, (0, -len(sound) % size))
    return decibels(np.square(padded.reshape(-1, size)).mean(1))


def clipped_share(sound: np.ndarray) -> float:
    """Samples in runs of three and more at the peak, of all; a peak under half of full scale is no clipping of ours to
    see, but one at any level from there on is."""
    peak = np.abs(sound).max(initial=0)
    if peak < 0.5:
        return 0.0
    flat = np.concatenate([[0], (np.abs(sound) >= FULL * peak).astype(np.int8), [0]])
    turns = np.flatnonzero(np.diff(flat)).reshape(-1, 2)
    lengths = turns[:, 1] - turns[:, 0]
    return float(lengths[lengths >= 3].sum() / len(sound))


def print_of(sound: np.ndarray, rate: int, levels: np.ndarray) -> tuple[str, float]:
    """(print, seconds that it covers): for every HOP and band whether it stands out more from the next band than a row
    before. Silence at the ends does not count."""
    loud = np.flatnonzero(levels > levels.max() - 30)
    size = max(1, round(FRAME * rate))
    sound = sound[loud[0] * size: (loud[-1] + 1) * size]
    covered = len(sound) / rate
    window, hop = round(SLICE / 4 * rate), round(HOP / 2 * rate)
    sound = np.pad(sound, (0, max(0, round(2 * SLICE * rate) - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop] * np.hanning(window)
    power = np.square(np.abs(np.fft.rfft(frames, axis=1)))
    edges = np.geomspace(LOWEST, HIGHEST, BANDS + 1) * window / rate
    bands = np.stack([power[:, int(low): max(int(low) + 1, int(high))].mean(1)
                      for low, high in zip(edges, edges[1:], strict=False)], 1)
    smooth = np.stack([np.convolve(band, np.hanning(9)[1:-1], "valid") for band in bands.T], 1)[::2]
    shape = np.diff(10 * np.log10(smooth + 1e-7 * smooth.max() + 1e-20), axis=1)
    return np.packbits(np.diff(shape, axis=0) > 0, axis=1).tobytes().hex(), covered


def measure(sound: np.ndarray, rate: int) -> Measures:
    """[n], float32, of at least one sample."""
    offset, clipped = float(sound.mean()), clipped_share(sound)
    sound = sound - offset  # which has no voice of its own
    levels = frame_levels(sound, rate)
    power = 10 ** (levels[levels >= np.median(levels)] / 10)
    probabilities, _ = speech_of([np.pad(sound, (0, rate // 20))[:, None]], rate)
    runs = speech_runs(probabilities)
    print_bits, covered = print_of(sound, rate, levels)
    return Measures(len(sound) / rate, float(max(QUIET, 10 * np.log10(power.mean()))),
                    float(np.percentile(levels, 90) - np.percentile(levels, 5)), clipped, offset,
                    runs[0][0] * STEP if runs else 0.0,
                    min(runs[-1][1] * STEP, len(sound) / rate) if runs else 0.0, print_bits, covered)


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    """Mono samples [n], float32, and the rate. Raises: Unusable."""
    header = open_sound(path)
    if header.seconds > LONGEST_FILE:
        raise Unusable("recording too long", f"{path}: {header.seconds / 60:.0f} minutes. Cut it into sentences")
    return mono_of(np.concatenate(list(read_blocks(header)))), header.sample_rate


def measure_files(paths: Sequence[Path]) -> list[dict[str, Any] | tuple[str, str]]:
    """Measures as JSON of each file, or (reason, detail) why there are none. Runs in a worker process."""
    found: list[dict[str, Any] | tuple[str, str]] = []
    for path in paths:
        try:
            found.append(measure(*read_sound(path)).as_json())
        except Unusable as fault:
            found.append((fault.reason, fault.detail))
    return found


def distance(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Share of differing bits of two prints [rows, bytes] at the best of SHIFTS, in all and in the worst third: two
    clips that begin alike (a jingle) are no copies."""
    best = (1.0, 1.0)
    for shift in SHIFTS:
        a, b = one[max(0, shift):], other[max(0, -shift):]
        rows = min(len(a), len(b))
        if rows >= 3:
            shares = np.bitwise_count(a[:rows] ^ b[:rows]).sum(1) / (BANDS - 1)
            best = min(best, (float(shares.mean()), max(float(part.mean()) for part in np.array_split(shares, 3))))
    return best


def alike(prints: Sequence[str], seconds: Sequence[float], progress: Progress | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of clips that hold one sound: equally long ones whose prints differ in few bits."""
    if not prints:
        return []
    width = (BANDS - 1) // 8
    bits = [np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, width) for text in prints]
    reach = max(SHIFTS)
    starts = np.zeros((len(bits), COMPARED + 2 * reach, width), np.uint8)
    for i, rows in enumerate(bits):
        starts[i, : len(rows)] = rows[: starts.shape[1]]
    order = np.argsort(seconds, kind="stable")
    lengths, packed = np.asarray(seconds)[order], starts[order].reshape(len(bits), -1)
    ends = np.searchsorted(lengths, lengths + SAME_LENGTH, side="right")
    pairs = []
    for first in range(0, len(bits), BLOCK):
        last = min(first + BLOCK, len(bits))
        # Bits as 1 and -1: two clips' product is the bits that agree less those that differ.
        signs = np.unpackbits(packed[first: ends[last - 1]], axis=1).astype(np.float32) * 2 - 1
        moved = [signs[:, (reach + shift) * (BANDS - 1):][:, : COMPARED * (BANDS - 1)] for shift in SHIFTS]
        close = np.zeros((last - first, len(signs)), bool)
        for shifted in moved:
            close |= moved[reach][: last - first] @ shifted.T >= (1 - 2 * ALIKE) * COMPARED * (BANDS - 1)
        for i, k in zip(*np.nonzero(np.triu(close, 1)), strict=True):
            if first + k < ends[first + i]:
                one, other = sorted((int(order[first + i]), int(order[first + k])))
                whole, worst = distance(bits[one], bits[other])
                if whole <= ALIKE and worst <= ALIKE_THIRD:
                    pairs.append((one, other))
        if progress:
            progress.update(last)
    return sorted(pairs)
