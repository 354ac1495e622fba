"""Sentences to record, which of them are done, and how loud a recording is."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.edit_recordings import row_of
from tools.pauses import levels_of
from tools.sound_files import check_recording, read_mono
from webui.clip_rows import Version

MOST_SENTENCES = 100_000
LONGEST_SENTENCE = 300  # letters that one reads in a breath or two
QUIET, LOUD = -35.0, -1.0  # dB of full scale: of speech, and of the loudest sample


@dataclass(frozen=True)
class Loudness:
    level: float
    """Of the speech, dB of full scale."""
    peak: float
    """Of the loudest sample, dB of full scale."""
    seconds: float

    @property
    def verdict(self) -> str:
        """"quiet", "loud" or "good"."""
        return "loud" if self.peak > LOUD else "quiet" if self.level < QUIET else "good"


def loudness(path: Path) -> Loudness:
    """Raises: ToolError for what is no recording."""
    rate, mono = check_recording(path), read_mono(path)
    levels = levels_of([mono[:, None]], rate)
    peak = 20 * math.log10(max(1e-6, float(np.abs(mono).max(initial=0))))
    return Loudness(float(np.percentile(levels, 90)), peak, len(mono) / rate)


@functools.lru_cache(maxsize=2)
def sentences(version: Version) -> tuple[str, ...]:
    """The lines of a text file, or the texts of JSON lines, each once; long ones are left out. Raises: OSError."""
    is_json = version.path.suffix == ".jsonl"
    found: dict[str, None] = {}
    with version.path.open("rb") as lines:
        for line in lines:
            said = row_of(line).get("text", "") if is_json else line.decode("utf-8-sig", errors="replace")
            text = " ".join(str(said).split())
            if 0 < len(text) <= LONGEST_SENTENCE:
                found[text] = None
            if len(found) == MOST_SENTENCES:
                break
    return tuple(found)


@functools.lru_cache(maxsize=2)
def texts_recorded(version: Version) -> frozenset[str]:
    """Raises: OSError."""
    with version.path.open("rb") as lines:
        return frozenset(str(row_of(line).get("text", "")) for line in lines)


def next_sentence(listed: Sequence[str], done: Collection[str], skipped: Collection[str]) -> str:
    """The first that is neither done nor skipped; "" behind the last. Pure."""
    return next((text for text in listed if text not in done and text not in skipped), "")
