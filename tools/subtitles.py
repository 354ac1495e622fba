"""SRT and WebVTT: cues, and clips made of them. Pure functions."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?")
TIMES = re.compile(rf"\s*({TIME.pattern})\s*-->\s*({TIME.pattern})")
VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>", re.IGNORECASE)
MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}|\{[yY]:[^{}]*\}|\[[^\[\]]*\]|[♪♫♬♩]|^\s*(?:>>+|[-–—])\s*", re.MULTILINE)
SENTENCE_END = ("።", "፡፡", "::", "፧", "?", "!", ".", "…")
OVERLAP = 0.2  # seconds that two cues may share: they part in the middle
SHORT = 3.0  # seconds: a shorter clip takes the next cue in
CLOSE = 0.6  # seconds of pause at most between cues that are joined
LONGEST_JOINED = 10.0  # seconds: one cue may be longer, some together are not


@dataclass(frozen=True)
class Cue:
    """What is said between two times, in seconds."""

    start: float
    end: float
    text: str
    speaker: str = ""


def seconds_of_time(text: str) -> float:
    """01:02:03,450 or 02:03.45 -> seconds. Raises: ValueError."""
    match = TIME.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no time")
    hours, minutes, seconds, fraction = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}")


def clean_cue(text: str) -> str:
    """Without tags, entities, notes, [sounds], and a (sound) that is all there is. Spaces are single."""
    text = " ".join(MARKUP.sub(" ", html.unescape(text)).split())
    return "" if re.fullmatch(r"\([^()]*\)", text) or not re.search(r"\w", text) else text


def raw_cues(content: str) -> list[tuple[str, list[str]]]:
    """(line of times, lines of text) of every cue. A text ends at an empty line or before the next times; a line of
    spaces is part of it."""
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if "-->" in line]
    cues = []
    for start, following in zip(starts, [*starts[1:], len(lines)], strict=False):  # without starts there is one more
        text = lines[start + 1: following]
        if "" in text:
            text = text[: text.index("")]
        elif following < len(lines) and text and text[-1].strip().isdigit():  # the number of the next one
            text.pop()
        cues.append((lines[start].strip(), text))
    return cues


def read_cues(content: str) -> tuple[list[Cue], list[str]]:
    """The cues of an SRT or VTT file in the order of time, and what is wrong with those that were left out."""
    cues, faults = [], []
    for line, text in raw_cues(content):
        times = TIMES.match(line)
        if not times:
            faults.append(f"{line!r} is no pair of times")
            continue
        start, end = seconds_of_time(times[1]), seconds_of_time(times[6])
        voice, said = VOICE.search("\n".join(text)), [clean_cue(part) for part in text]
        if not clean_cue(" ".join(said)):
            faults.append(f"cue at {times[1]} has no words")
        elif end <= start:
            faults.append(f"cue at {times[1]} ends before it starts")
        else:
            cues.append(Cue(start, end, "\n".join(part for part in said if part), voice[1].strip() if voice else ""))
    cues.sort(key=lambda cue: (cue.start, cue.end))
    return [replace(cue, text=clean_cue(cue.text.replace("\n", " "))) for cue in unrolled(cues)], faults


def unrolled(cues: Sequence[Cue]) -> list[Cue]:
    """Automatic captions that roll (each cue shows the last line again, above its own) without what was shown before;
    others as they are. Lines are parted by \\n."""
    lines_of = [cue.text.split("\n") for cue in cues]
    rolls = [i > 0 and cue.start - cues[i - 1].end < CLOSE and lines_of[i][0] == lines_of[i - 1][-1]
             for i, cue in enumerate(cues)]
    if sum(rolls) < max(2, 0.3 * len(cues)):
        return list(cues)
    kept: list[Cue] = []
    for cue, lines, rolling in zip(cues, lines_of, rolls, strict=True):
        lines = lines[rolling:]
        if lines:
            kept.append(replace(cue, text="\n".join(lines)))
        else:
            kept[-1] = replace(kept[-1], end=max(kept[-1].end, cue.end))
    return kept


def without_overlaps(cues: Sequence[Cue]) -> tuple[list[Cue], list[str]]:
    """Cues that share time with no other; and why the others were left out.

    A repeated cue (a drop shadow) is one. Two that share a little part in the middle of it.
    """
    unique: list[Cue] = []
    for cue in cues:
        if not any(cue.text == other.text and cue.start < other.end for other in unique[-3:]):
            unique.append(cue)
    dropped: set[int] = set()
    latest = 0
    for i in range(1, len(unique)):
        if min(unique[latest].end, unique[i].end) - unique[i].start > OVERLAP:
            dropped |= {latest, i}
        if unique[i].end >= unique[latest].end:
            latest = i
    kept = [cue for i, cue in enumerate(unique) if i not in dropped]
    for i in range(1, len(kept)):
        before, after = kept[i - 1], kept[i]
        if before.end > after.start:
            middle = (before.end + after.start) / 2
            kept[i - 1] = Cue(before.start, middle, before.text, before.speaker)
            kept[i] = Cue(middle, after.end, after.text, after.speaker)
    faults = [f"cue at {unique[i].start:.2f} s is spoken at the same time as another" for i in sorted(dropped)]
    return kept, faults


def ends_sentence(text: str) -> bool:
    return text.rstrip("\"'»”’) ").endswith(SENTENCE_END)


def join_cues(cues: Sequence[Cue]) -> list[Cue]:
    """Neighbours become one clip where one is short, or a sentence goes on (if this file ends sentences at all), the
    pause between them is short and the speaker the same."""
    punctuated = sum(ends_sentence(cue.text) for cue in cues) >= 0.2 * len(cues)
    joined: list[Cue] = []
    for cue in cues:
        last = joined[-1] if joined else None
        if last and cue.speaker == last.speaker and cue.start - last.end <= CLOSE \
                and cue.end - last.start <= LONGEST_JOINED \
                and (last.end - last.start < SHORT or cue.end - cue.start < SHORT / 2
                     or punctuated and not ends_sentence(last.text)):
            joined[-1] = Cue(last.start, cue.end, f"{last.text} {cue.text}", last.speaker)
        else:
            joined.append(cue)
    return joined
