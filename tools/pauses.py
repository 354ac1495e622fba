"""Where to cut a long recording: cue edges moved to silence nearby, and speech cut at its pauses.

The detector of speech is silero-vad (MIT), whose weights come inside its package; everything else is arithmetic on
arrays. torch is loaded only where speech is to be detected.
"""

from __future__ import annotations

import bisect
import functools
import math
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tools.sound_decoder import mono_of
from tools.subtitles import Cue

QUIET = -80.0  # dB of full scale: the floor of levels
LEVEL_STEP = 0.01  # seconds from level to level
REACH = 0.35  # seconds that the edge of a cue may move
SILENCE = 0.15  # seconds at least: the closure of a consonant is shorter
RATE = 16000  # Hz, of the detector
FRAME = 512  # samples at RATE to one probability: 32 ms
STEP = FRAME / RATE  # seconds from probability to probability
SPEECH, NO_SPEECH = 0.5, 0.35  # probability at which speech begins and ends
PAUSE = 0.7  # seconds without speech that always part two clips
NEAR = 2.0  # seconds of pause at most across which a short clip joins its neighbour
MARGIN = 0.15  # seconds of a pause that a clip keeps at each end, where there are as many

Span = tuple[int, int]
"""First frame, and the one behind the last."""


# ---------------------------------------------------------------------------------------------------------------------
# Levels, and edges of cues


def decibels(power: np.ndarray) -> np.ndarray:
    """Mean squares -> dB of full scale, not under QUIET."""
    return np.maximum(QUIET, 10 * np.log10(np.maximum(power, 1e-12)))


def levels_of(blocks: Iterable[np.ndarray], sample_rate: int) -> np.ndarray:
    """Blocks [n, channels] -> the level of every LEVEL_STEP seconds [steps], dB."""
    size = round(sample_rate * LEVEL_STEP)
    rest, parts = np.zeros(0, np.float32), []
    for block in blocks:
        mono = np.concatenate([rest, mono_of(block)])
        whole = len(mono) // size * size
        parts.append(decibels(np.square(mono[:whole].reshape(-1, size)).mean(1)))
        rest = mono[whole:]
    return np.concatenate([*parts, np.full(int(len(rest) > 0), QUIET)])


def silences_of(levels: np.ndarray) -> list[tuple[float, float]]:
    """(start, end) in seconds of every silence: a fifth of the way up from the quietest to the loudest, for long enough
    to be no part of a word. Before the start and behind the end there is some, too."""
    floor, speech = np.percentile(levels, [5, 90]) if len(levels) else (QUIET, QUIET)
    around = math.ceil(SILENCE / LEVEL_STEP)
    quiet = np.concatenate([np.ones(around), levels < floor + 0.2 * (speech - floor), np.ones(around)]).astype(np.int8)
    turns = np.flatnonzero(np.diff(quiet, prepend=0, append=0)).reshape(-1, 2)
    runs = (turns[turns[:, 1] - turns[:, 0] >= around] - around) * LEVEL_STEP
    return [(float(start), float(end)) for start, end in runs]


def nearest_silence(silences: Sequence[tuple[float, float]], first: float, last: float, wanted: float) -> float | None:
    """The time nearest to `wanted` that lies within a silence, well within if it can, and from `first` to `last`; None
    where there is none."""
    found = None
    at = max(0, bisect.bisect_left(silences, (first, 0.0)) - 1)
    for start, end in silences[at:]:
        if start > last:
            break
        inset = min(MARGIN, (end - start) / 2)
        time = min(max(wanted, start + inset, first), last) if wanted < start + inset \
            else max(min(wanted, end - inset, last), first)
        if start + inset / 5 <= time <= end - inset / 5 and (found is None or abs(time - wanted) < abs(found - wanted)):
            found = time
    return found


def move_edges(cues: Sequence[Cue], levels: np.ndarray) -> list[Cue]:
    """Cues whose edges lie in silence where there is some within REACH, else where they were; neighbours never
    overlap."""
    silences, seconds = silences_of(levels), len(levels) * LEVEL_STEP
    starts, ends = [cue.start for cue in cues], [cue.end for cue in cues]
    reach = [min(REACH, (cue.end - cue.start) / 3) for cue in cues]
    for i in range(len(cues) + 1):
        before, after = cues[i - 1] if i else None, cues[i] if i < len(cues) else None
        if before and after and after.start - before.end < 2 * LEVEL_STEP:  # one edge for both
            middle = (before.end + after.start) / 2
            found = nearest_silence(silences, before.end - reach[i - 1], after.start + reach[i], middle)
            if found is not None:
                ends[i - 1] = starts[i] = found
            continue
        room = min(REACH, (after.start - before.end) / 2) if before and after else REACH
        if before:
            found = nearest_silence(silences, before.end - reach[i - 1], before.end + room, before.end)
            ends[i - 1] = before.end if found is None else min(found, seconds)
        if after:
            found = nearest_silence(silences, after.start - room, after.start + reach[i], after.start)
            starts[i] = after.start if found is None else max(found, 0.0)
    return [Cue(start, end, cue.text, cue.speaker) for cue, start, end in zip(cues, starts, ends, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Speech, and clips of it


def speech_runs(probabilities: np.ndarray) -> list[Span]:
    """Frames of speech: begun at SPEECH, ended below NO_SPEECH; gaps and runs under a tenth of a second do not count.
    """
    runs: list[Span] = []
    begun = -1
    for i, probability in enumerate([*probabilities.tolist(), 0.0]):
        if begun < 0 and probability >= SPEECH:
            begun = i
        elif begun >= 0 and probability < NO_SPEECH:
            runs.append((begun, i))
            begun = -1
    merged: list[Span] = []
    for first, last in runs:
        if merged and first - merged[-1][1] <= 3:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return [run for run in merged if run[1] - run[0] > 3]


def halves(runs: list[Span], levels: np.ndarray, shortest: float) -> tuple[list[Span], list[Span]]:
    """Runs of a stretch that is too long -> those before and behind its longest pause; without one that leaves
    `shortest` seconds on both sides, its quietest frame parts them."""
    least, begin, end = round(shortest / STEP), runs[0][0], runs[-1][1]
    middle = (begin + end) / 2
    pauses = [(runs[i + 1][0] - runs[i][1], -abs(runs[i][1] - middle), i) for i in range(len(runs) - 1)
              if runs[i][1] - begin >= least and end - runs[i + 1][0] >= least]
    if pauses:
        i = max(pauses)[2] + 1
        return runs[:i], runs[i:]
    at = begin + least + int(levels[begin + least: end - least].argmin())
    before = [(first, min(last, at)) for first, last in runs if first < at]
    return before, [(max(first, at), last) for first, last in runs if last > at]


def clips_of(probabilities: np.ndarray, levels: np.ndarray, shortest: float, longest: float
             ) -> tuple[list[tuple[float, float]], int]:
    """Probability of speech and level of every STEP -> (start, end) of each clip in seconds, cut at pauses, and how
    many stretches of speech were left out because they stand alone and are shorter than `shortest` seconds."""
    runs, least, most = speech_runs(probabilities), shortest / STEP, longest / STEP - 2 * MARGIN / STEP
    stretches: list[list[Span]] = []
    for run in runs:
        if stretches and run[0] - stretches[-1][-1][1] < PAUSE / STEP:
            stretches[-1].append(run)
        else:
            stretches.append([run])
    spans: list[Span] = []
    todo = stretches[::-1]
    while todo:
        stretch = todo.pop()
        if stretch[-1][1] - stretch[0][0] > most:
            before, after = halves(stretch, levels, shortest)
            todo += [after, before]
        else:
            spans.append((stretch[0][0], stretch[-1][1]))
    spans = join_short(spans, least, most)
    alone = sum(last - first < least for first, last in spans)
    starts, ends = [first for first, _ in spans], [last for _, last in spans]
    clips = []
    for i, (first, last) in enumerate(spans):
        if last - first < least:
            continue
        room = first - (ends[i - 1] if i else 0), (starts[i + 1] if i + 1 < len(spans) else len(probabilities)) - last
        margins = [min(MARGIN / STEP, space / 2) for space in room]
        clips.append(((first - margins[0]) * STEP, (last + margins[1]) * STEP))
    return clips, alone


def join_short(spans: Sequence[Span], least: float, most: float) -> list[Span]:
    """Spans under `least` frames become part of the nearer neighbour, where that is NEAR and the whole not over `most`
    frames."""
    joined = list(spans)
    i = 0
    while i < len(joined):
        first, last = joined[i]
        if last - first >= least:
            i += 1
            continue
        ways = [(joined[k + 1][0] - joined[k][1], k) for k in (i - 1, i) if 0 <= k < len(joined) - 1
                and joined[k + 1][0] - joined[k][1] <= NEAR / STEP and joined[k + 1][1] - joined[k][0] <= most]
        if not ways:
            i += 1
            continue
        k = min(ways)[1]
        joined[k: k + 2] = [(joined[k][0], joined[k + 1][1])]
        i = k
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# The detector


def at_detector_rate(mono: np.ndarray, sample_rate: int) -> np.ndarray:
    """[n] -> [m] at RATE, float32."""
    import torch
    import torchaudio

    if sample_rate == RATE:
        return mono
    return torchaudio.functional.resample(torch.from_numpy(np.ascontiguousarray(mono)), sample_rate, RATE).numpy()


@functools.cache
def load_detector(thread: int) -> Any:
    """One for each thread: it remembers what it heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about its own format
        from silero_vad import load_silero_vad

        return load_silero_vad()


def speech_of(blocks: Iterable[np.ndarray], sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [n, channels] -> probability of speech and level in dB of every STEP seconds, two [frames]."""
    import torch

    detector = load_detector(threading.get_ident())
    detector.reset_states()
    probabilities: list[float] = []
    levels: list[np.ndarray] = []
    rest = np.zeros(0, np.float32)
    for block in blocks:
        sound = np.concatenate([rest, at_detector_rate(mono_of(block), sample_rate)])
        frames = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)
        with torch.inference_mode():
            probabilities += [float(detector(frame, RATE)) for frame in torch.from_numpy(np.ascontiguousarray(frames))]
        levels.append(decibels(np.square(frames).mean(1)))
        rest = sound[len(frames) * FRAME:]
    return np.array(probabilities), np.concatenate(levels) if levels else np.zeros(0)
