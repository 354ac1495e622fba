"""The sounds of a plan become files of the output folder: linked, converted, or cut; what was done outlives a kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tools._common import Progress, atomic_path, write_text, writing_to
from tools.pauses import LEVEL_STEP, clips_of, levels_of, move_edges, speech_of
from tools.preprocess import skipped_row
from tools.recording_layouts import Entry
from tools.recording_plan import Job, Plan
from tools.recordings import is_sound_name
from tools.sound_decoder import Sound, cut, flac_bytes, open_sound, read_blocks
from tools.sound_files import LONGEST_FILE, Unusable, check_recording

MADE_BY = "import/1"  # counted up when clips are cut otherwise, so that older ones are not used
SHORT_END = 0.25  # seconds that a row may name beyond the end, or leave of a file that it names whole


# ---------------------------------------------------------------------------------------------------------------------
# What has been worked out


class Cache:
    """Lines of [key, value], appended as things are done; a kill costs the last one. Used by many threads.

    A key begins with its kind: cues, speech (where to cut), clip, file (what lies in audio/), empty (rows that were
    written without text), typed, transcript.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.values: dict[str, Any] = {}
        self.used: set[str] = set()
        if path.is_file():
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, TypeError):  # the last line of a killed run
                    key, value = json.loads(line)
                    self.values[str(key)] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = path.open("ab")
        self.handle.write(b"\n")

    def get(self, key: Sequence[Any]) -> Any:
        name = json.dumps(key, ensure_ascii=False)
        self.used.add(name)
        return self.values.get(name)

    def put(self, key: Sequence[Any], value: Any) -> None:
        name = json.dumps(key, ensure_ascii=False)
        with self.lock:
            self.used.add(name)
            self.values[name] = value
            self.handle.write(json.dumps([name, value], ensure_ascii=False).encode() + b"\n")
            self.handle.flush()

    def close(self) -> None:
        self.handle.close()

    def prune(self) -> None:
        """Keeps what this run asked for, and what people or their programs wrote."""
        self.close()
        write_text(self.path, "".join(json.dumps([name, value], ensure_ascii=False) + "\n"
                                      for name, value in self.values.items()
                                      if name in self.used or name.startswith(('["typed"', '["transcript"'))))

    def of_kind(self, kind: str) -> Iterator[tuple[list[Any], Any]]:
        """(key, value) of everything of a kind."""
        start = f'["{kind}"'
        return ((json.loads(name), value) for name, value in self.values.items() if name.startswith(start))


# ---------------------------------------------------------------------------------------------------------------------
# Sounds


@dataclass
class Clip:
    """A part of a sound that becomes a row. `last` None: to the end; both None: the whole file."""

    number: int
    entry: Entry
    first: int | None = None
    last: int | None = None


@dataclass
class Work:
    """What the workers share."""

    plan: Plan
    cache: Cache
    output_dir: Path
    shortest: float
    longest: float
    linked: Counter[str] = field(default_factory=Counter)
    stopping: threading.Event = field(default_factory=threading.Event)


def stamp_of(path: Path, sound: str) -> list[Any]:
    """Changes when the file does."""
    status = path.stat()
    return [sound, status.st_size, status.st_mtime_ns]


def watched(sound: Sound, name: str, work: Work) -> Iterator[np.ndarray]:
    """The blocks of a sound; a long one shows how far it is, and ends when the run does."""
    progress, frames = Progress(name, max(1, round(sound.seconds))), 0
    for block in read_blocks(sound):
        if work.stopping.is_set():
            raise CancelledError
        frames += len(block)
        yield block
        progress.update(min(progress.total, frames // sound.sample_rate), "seconds of sound")


def cue_clips(job: Job, sound: Sound, stamp: list[Any], work: Work) -> tuple[list[Clip], list[Unusable]]:
    """Clips whose edges lie in silence; and cues that reach beyond the end."""
    cues = job.cues or []
    key = ["cues", MADE_BY, *stamp, [[cue.start, cue.end, cue.text, cue.speaker] for cue in cues]]
    found = work.cache.get(key)
    if found is None:
        levels = levels_of(watched(sound, f"pauses of {job.sound}", work), sound.sample_rate)
        seconds = len(levels) * LEVEL_STEP
        inside = [replace(cue, end=min(cue.end, seconds)) for cue in cues if cue.end <= seconds + 2 * SHORT_END]
        found = [seconds, [[cue.start, cue.end, cue.text, cue.speaker] for cue in move_edges(inside, levels)]]
        work.cache.put(key, found)
    seconds, moved = found
    faults = [Unusable("beyond the end", f"{job.place}: the cue at {cue.start:.2f} s ends at {cue.end:.2f} s, but "
                                         f"{job.sound} has {seconds:.2f} s. Mend its times")
              for cue in cues if cue.end > seconds + 2 * SHORT_END]
    rate = sound.sample_rate
    return [Clip(job.number, Entry(job.place, job.sound, text, speaker), round(start * rate), round(end * rate))
            for start, end, text, speaker in moved if end - start >= 0.1], faults


def speech_clips(job: Job, sound: Sound, stamp: list[Any], work: Work) -> tuple[list[Clip], list[Unusable]]:
    """A long sound without text, cut at pauses; what stands alone and is too short is named once."""
    number, entry = job.entries[0]
    key = ["speech", MADE_BY, *stamp, work.shortest, work.longest]
    found = work.cache.get(key)
    if found is None:
        probabilities, levels = speech_of(watched(sound, f"speech in {job.sound}", work), sound.sample_rate)
        found = clips_of(probabilities, levels, work.shortest, work.longest)
        work.cache.put(key, found)
    spans, alone = found
    faults = [Unusable("too short to stand alone", f"{job.sound}: {alone} stretches of speech under {work.shortest:g} "
                                                   "s, far from others")] if alone else []
    if not spans and not alone:
        faults = [Unusable("no speech", f"{job.sound}: no speech was found in {sound.seconds:.0f} s")]
    rate = sound.sample_rate
    return [Clip(number, entry, round(start * rate), round(end * rate)) for start, end in spans], faults


def entry_clips(job: Job, sound: Sound) -> tuple[list[Clip], list[tuple[int, Entry, Unusable]]]:
    """Clips of rows; a part that leaves next to nothing of the file is the whole of it."""
    clips, faults = [], []
    for number, entry in job.entries:
        start, end = entry.start, entry.end
        if start == 0 and (end is None or sound.seconds and abs(sound.seconds - end) <= SHORT_END):
            start = None
        if start is None:
            if sound.seconds > LONGEST_FILE:
                faults.append((number, entry, Unusable(
                    "recording too long", f"{entry.place}: one text for the {sound.seconds / 60:.0f} minutes of "
                                          f"{job.sound}. Put subtitles (.srt, .vtt) beside it, or times into the row")))
                continue
            clips.append(Clip(number, entry))
            continue
        if sound.seconds and max(start, (end or 0) - SHORT_END) >= sound.seconds:
            faults.append((number, entry, beyond_the_end(entry, job.sound, sound.seconds)))
            continue
        rate = sound.sample_rate
        clips.append(Clip(number, entry, round(start * rate), None if end is None else round(end * rate)))
    return clips, faults


def beyond_the_end(entry: Entry, name: str, seconds: float) -> Unusable:
    until = "" if entry.end is None else f" to {entry.end:.2f} s"
    return Unusable("beyond the end", f"{entry.place}: names {entry.start or 0:.2f}{until}, but {name} has "
                                      f"{seconds:.2f} s. Mend the times")


def clip_times(clip: Clip, rate: int) -> str:
    """What a part is called: its times in milliseconds."""
    until = "end" if clip.last is None else f"{round(clip.last / rate * 1000):08d}"
    return f"{round((clip.first or 0) / rate * 1000):08d}_{until}"


def write_parts(clips: Sequence[Clip], sound: Sound, name: str, stamp: list[Any], work: Work
                ) -> tuple[list[tuple[Clip, str, float]], list[tuple[Clip, Unusable]]]:
    """FLAC clips of parts, those that are not there yet, in one pass: (clip, path in the output folder, seconds)."""
    done: dict[int, tuple[str, float]] = {}
    missing, faults = [], []
    for i, clip in enumerate(clips):
        audio = f"audio/{work.plan.names[name]}/{clip_times(clip, sound.sample_rate)}.flac"
        known = work.cache.get(["clip", MADE_BY, *stamp, clip.first, clip.last])
        if known and known[0] == audio and size_of(work.output_dir / audio) == known[1]:
            done[i] = (audio, known[2])
        else:
            missing.append((i, audio))
    spans = [(clips[i].first or 0, last_frame(clips[i])) for i, _ in missing]
    if missing:
        for k, samples in cut(watched(sound, f"cutting {name}", work), spans):
            i, audio = missing[k]
            clip, seconds = clips[i], len(samples) / sound.sample_rate
            short = clip.last is not None and spans[k][1] - spans[k][0] - len(samples) > SHORT_END * sound.sample_rate
            if short or not len(samples):
                faults.append((clip, beyond_the_end(clip.entry, name, spans[k][0] / sound.sample_rate + seconds)))
                done[i] = ("", 0.0)
                continue
            if seconds > LONGEST_FILE:
                faults.append((clip, Unusable("recording too long", f"{clip.entry.place}: {seconds / 60:.0f} minutes. "
                                                                    "Cut it into sentences")))
                done[i] = ("", 0.0)
                continue
            remember_file(audio, work)
            size = write_clip(work.output_dir / audio, flac_bytes(samples, sound))
            work.cache.put(["clip", MADE_BY, *stamp, clip.first, clip.last], [audio, size, seconds])
            done[i] = (audio, seconds)
        faults += [(clips[i], beyond_the_end(clips[i].entry, name, sound.seconds))
                   for i, _ in missing if i not in done]
    return [(clip, *done[i]) for i, clip in enumerate(clips) if done.get(i, ("",))[0]], faults


def last_frame(clip: Clip) -> int:
    return 1 << 62 if clip.last is None else clip.last


def remember_file(audio: str, work: Work) -> None:
    """What lies in audio/ without this is not ours, and never deleted."""
    if not work.cache.get(["file", audio]):
        work.cache.put(["file", audio], 1)


def size_of(path: Path) -> int:
    """-1 for a file that is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def write_clip(path: Path, content: bytes) -> int:
    """Returns the size. Raises: ToolError when there is no room."""
    with writing_to(path.parent), atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def write_whole(sound: Sound, name: str, stamp: list[Any], work: Work) -> tuple[str, float]:
    """A whole file as (path in the output folder, seconds): linked, or as FLAC where only ffmpeg reads it."""
    if not sound.by_ffmpeg and is_sound_name(name):
        check_recording(sound.path)  # as preprocess will
        audio = f"audio/{name}"
        remember_file(audio, work)
        work.linked[place_file(sound.path, work.output_dir / audio)] += 1
        return audio, sound.seconds
    audio = f"audio/{name}.flac"
    known = work.cache.get(["clip", MADE_BY, *stamp, None, None])
    if known and known[0] == audio and size_of(work.output_dir / audio) == known[1]:
        return audio, known[2]
    parts, frames = [], 0
    for block in watched(sound, f"converting {name}", work):
        parts.append(block)
        frames += len(block)
        if frames > LONGEST_FILE * sound.sample_rate:  # the header did not say so
            raise Unusable("recording too long", f"{name}: over {LONGEST_FILE // 60} minutes. Cut it into sentences")
    remember_file(audio, work)
    size = write_clip(work.output_dir / audio, flac_bytes(np.concatenate(parts), sound))
    work.cache.put(["clip", MADE_BY, *stamp, None, None], [audio, size, frames / sound.sample_rate])
    return audio, frames / sound.sample_rate


def place_file(source: Path, target: Path) -> str:
    """Makes `target` a link to the source's file, or a copy where links are not possible: "linked" or "copied"."""
    real = Path(os.path.realpath(source))
    status = real.stat()
    if target.exists():
        there = target.stat()
        if os.path.samestat(there, status):
            return "linked"
        if (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            return "copied"
    with writing_to(target.parent), atomic_path(target) as temporary:
        try:
            os.link(real, temporary)
            return "linked"
        except OSError:  # another file system, one without links, or no right to
            shutil.copyfile(real, temporary)
            shutil.copystat(real, temporary)
            return "copied"


def run_job(job: Job, work: Work) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one sound and what is skipped of it. Raises: ToolError when nothing can be written."""
    names, skipped = work.plan.names, []
    path = work.plan.source.root / job.sound
    try:
        sound = open_sound(path)
        stamp = stamp_of(path, job.sound)
        clips: list[Clip]
        if job.cues is not None:
            clips, faults = cue_clips(job, sound, stamp, work)
            skipped += [skipped_row(job.number, names[job.sound], fault.reason, fault.detail) for fault in faults]
        elif len(job.entries) == 1 and not job.entries[0][1].text and job.entries[0][1].start is None \
                and (sound.seconds > work.longest or not sound.seconds and sound.by_ffmpeg):
            clips, faults = speech_clips(job, sound, stamp, work)
            skipped += [skipped_row(job.number, names[job.sound], fault.reason, fault.detail) for fault in faults]
        else:
            clips, problems = entry_clips(job, sound)
            skipped += [skipped_row(number, entry.id or names[job.sound], fault.reason, fault.detail)
                        for number, entry, fault in problems]
        parts = [clip for clip in clips if clip.first is not None]
        written, problems_of_parts = write_parts(parts, sound, job.sound, stamp, work)
        skipped += [skipped_row(clip.number, clip.entry.id or names[job.sound], fault.reason, fault.detail)
                    for clip, fault in problems_of_parts]
        for clip in clips:
            if clip.first is None:
                written.append((clip, *write_whole(sound, job.sound, stamp, work)))
    except Unusable as fault:
        return [], [skipped_row(number, entry.id or names[job.sound], fault.reason, fault.detail)
                    for number, entry in job.entries or [(job.number, Entry("", job.sound))]]
    return [row_of(clip, audio, seconds, sound.sample_rate, names[job.sound]) for clip, audio, seconds in written], \
        skipped


def row_of(clip: Clip, audio: str, seconds: float, rate: int, name: str) -> dict[str, Any]:
    entry = clip.entry
    row: dict[str, Any] = {"number": clip.number, "wanted_id": entry.id,
                           "id": name if clip.first is None else f"{name}/{clip_times(clip, rate)}",
                           "text": entry.text, "audio": audio, "speaker": entry.speaker, "language": entry.language,
                           "split": entry.split, "duration": round(seconds, 3)}
    if clip.first is not None:
        row |= {"source": entry.audio, "start": round(clip.first / rate, 3)}
    return row


def run_jobs(work: Work, jobs: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All sounds, some at a time; rows and skipped in the order of the source."""
    rows, skipped = [], []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(run_job, job, work) for job in work.plan.jobs]
            progress = Progress("importing", len(futures))
            for done, future in enumerate(futures, 1):
                found, left_out = future.result()
                rows += found
                skipped += left_out
                progress.update(done, f"{len(rows)} rows, {len(skipped)} skipped")
        finally:
            work.stopping.set()  # after an error or a signal some are at work
            pool.shutdown(cancel_futures=True)
    return sorted(rows, key=lambda row: (row["number"], row.get("start", 0))), skipped
