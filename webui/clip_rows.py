"""The rows of a recordings.jsonl, page by page, and the picture of a clip: quick for 100,000 rows.

Only the places of the lines are kept in memory, and what a search has found; a page's rows are read when it is shown.
"""

from __future__ import annotations

import array
import functools
import html
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tools.edit_recordings import last_edit_is_missing, row_of
from tools.sound_files import seconds_of
from webui.workspace import Refused, Workspace, as_text

ON_A_PAGE = 50
BARS = 240  # of a clip's picture
LONGEST_PICTURE = 700  # seconds
HEIGHT = 60


@dataclass(frozen=True)
class Version:
    """A file as it is at a moment: what was read of another version is not looked up."""

    path: Path
    changed: int
    size: int

    @classmethod
    def of(cls, path: Path) -> Version:
        """Raises: OSError."""
        stat = path.stat()
        return cls(path, stat.st_mtime_ns, stat.st_size)


@dataclass(frozen=True)
class Clip:
    number: int
    """Of its line, from 1."""
    row: dict[str, Any]
    seconds: float

    def text(self, name: str) -> str:
        return as_text(self.row.get(name) or "")


@functools.lru_cache(maxsize=4)
def lines_of(version: Version) -> array.array[int]:
    """Where the lines that are not empty begin; the number of each line is in the odd places. Raises: OSError."""
    places, at = array.array("Q"), 0
    with version.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                places.extend((at, number))
            at += len(line)
    return places


@functools.lru_cache(maxsize=8)
def found_by(version: Version, query: str) -> array.array[int]:
    """As lines_of(), of the rows whose text, id or speaker holds the query. Raises: OSError."""
    if not query:
        return lines_of(version)
    places, at, wanted = array.array("Q"), 0, query.casefold()
    with version.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = row_of(line)
            if any(wanted in str(row.get(name, "")).casefold() for name in ("text", "id", "speaker")):
                places.extend((at, number))
            at += len(line)
    return places


def count(version: Version, query: str) -> int:
    """Raises: OSError."""
    return len(found_by(version, query)) // 2


def clips(version: Version, query: str, first: int, number: int = ON_A_PAGE) -> list[Clip]:
    """Those from place `first` (from 0) of what the search finds. Raises: OSError."""
    places = found_by(version, query)[2 * first : 2 * (first + number)]
    rows = []
    with version.path.open("rb") as handle:
        for at, line in zip(places[::2], places[1::2], strict=True):
            handle.seek(at)
            row = row_of(handle.readline())
            rows.append(Clip(line, row, seconds_in(row, version.path.parent)))
    return rows


def place_of(version: Version, query: str, row_id: str, hint: int = 0) -> int | None:
    """The place of a row among what the search finds, looked for near `hint` first. Raises: OSError."""
    places = found_by(version, query)
    total = len(places) // 2
    nearby = range(max(0, hint - 2), min(total, hint + 3))
    written = json.dumps(row_id, ensure_ascii=False).encode(errors="replace"), json.dumps(row_id).encode()
    with version.path.open("rb") as handle:
        for place in itertools.chain(nearby, range(total)):
            handle.seek(places[2 * place])
            line = handle.readline()
            if any(part in line for part in written) and row_of(line).get("id") == row_id:
                return place
    return None


@functools.lru_cache(maxsize=8)
def cached_missing(recordings: Version, log: Version) -> bool:
    """Whether the last edit of the log is missing in the file."""
    return last_edit_is_missing(recordings.path)


def seconds_in(row: dict[str, Any], folder: Path) -> float:
    """As the row says, else as its sound's header does; 0 where neither tells."""
    told = row.get("duration")
    if isinstance(told, int | float) and not isinstance(told, bool):
        return float(told)
    audio = row.get("audio")
    return seconds_of(folder / audio) if isinstance(audio, str) and "\0" not in audio else 0.0


def sound_of(clip: Clip, folder: Path, workspace: Workspace) -> Path | None:
    """The clip's sound, where it is in the workspace."""
    audio = clip.row.get("audio")
    try:
        path = workspace.inside(str(folder / audio), must_exist=True) if isinstance(audio, str) else None
    except Refused:
        return None
    return path if path and path.is_file() else None


@functools.lru_cache(maxsize=64)
def peaks(version: Version) -> tuple[tuple[float, ...], float]:
    """The loudest sample, 0 to 1, of each of BARS parts, and the seconds; ((), 0) for what cannot be read."""
    found = np.zeros(BARS)
    try:
        with soundfile.SoundFile(version.path) as file:
            total, at = file.frames, 0
            if not 0 < total <= LONGEST_PICTURE * file.samplerate:
                return (), 0.0
            while len(block := file.read(1 << 16, dtype="float32", always_2d=True)):
                bars = np.minimum(BARS - 1, (at + np.arange(len(block))) * BARS // total)
                np.maximum.at(found, bars, np.abs(block).max(1))
                at += len(block)
            return tuple(np.nan_to_num(found / max(found.max(), 1e-6)).round(3).tolist()), total / file.samplerate
    except (OSError, TypeError, soundfile.LibsndfileError):
        return (), 0.0


def picture(path: Path | None) -> str:
    """SVG of a clip's waveform, with a line for where it plays and one for where it is to be cut."""
    try:
        bars, seconds = peaks(Version.of(path)) if path else ((), 0.0)
    except OSError:
        bars, seconds = (), 0.0
    if not bars:
        return ""
    half = HEIGHT / 2
    tall = [max(1.0, bar * half) for bar in bars]
    drawn = "".join(f"M{i * 4 + 2} {half - tip:.1f}V{half + tip:.1f}" for i, tip in enumerate(tall))
    return (f'<svg class="wave" data-seconds="{seconds:.4f}" viewBox="0 0 {BARS * 4} {HEIGHT}" '
            f'preserveAspectRatio="none" role="img" aria-label="{html.escape(path.name if path else "")}">'
            f'<path d="{drawn}"/><line class="at" x1="-9" x2="-9" y1="0" y2="{HEIGHT}"/>'
            f'<line class="cut" x1="-9" x2="-9" y1="0" y2="{HEIGHT}"/></svg>')
