"""Tab 6: what the newest checkpoint of a run says, beside the recordings of the same sentences.

`python -m tools.synthesize --watch` (tab 8) writes them into TensorBoard's files. Those are read here without its
package: records of (length, checksum, protocol buffer, checksum), of which the few fields below are wanted.
"""

from __future__ import annotations

import base64
import functools
import html
import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from tools.run_files import split_manifest
from webui.command_lines import lines_of
from webui.jobs import Job
from webui.page_base import Page
from webui.readers import newest_of
from webui.run_history import form_of_run
from webui.texts import say
from webui.workspace import Refused, Workspace

MOST_BYTES = 64 << 20  # of an events file: one checkpoint's few sentences
MOST_OF_A_SOUND = 4 << 20
MOST_ROWS = 20_000  # of a validation list, in which the originals are looked for
TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".mp3": "audio/mpeg", ".m4a": "audio/mp4"}
CSS = """
#training-samples .sample { margin: 0 0 10px; }
#training-samples .sample p { margin: 0 0 4px; overflow-wrap: anywhere; }
#training-samples .sample div { display: flex; flex-wrap: wrap; gap: 4px 16px; }
#training-samples label { display: inline-flex; align-items: center; gap: 6px; font-size: 0.85rem; }
#training-samples audio { height: 34px; width: 250px; max-width: 100%; }
"""


@dataclass
class Spoken:
    """What one checkpoint said."""

    step: int = -1
    sounds: dict[str, bytes] = field(default_factory=dict)
    """WAV files by the sentence's name."""
    texts: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard's files


def fields_of(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: int of a varint, bytes of all others. Raises: ValueError."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 0:
            value: Any
            value, at = varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7)
            if size is None:
                if key & 7 != 2:
                    raise ValueError("not a protocol buffer")
                size, at = varint(message, at)
            value, at = message[at:at + size], at + size
        yield key >> 3, value


def varint(message: bytes, at: int) -> tuple[int, int]:
    """The number there, and the place after it. Raises: ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        value, at = value | (message[at] & 127) << shift, at + 1
        if message[at - 1] < 128:
            return value, at
    raise ValueError("a torn number")


def records_of(content: bytes) -> Iterator[bytes]:
    """The whole records of an events file; a torn one ends it."""
    at = 0
    while at + 16 <= len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        if at + 16 + size > len(content):
            return
        yield content[at + 12:at + 12 + size]
        at += 16 + size


def first(message: bytes, number: int, otherwise: Any = b"") -> Any:
    return next((value for found, value in fields_of(message) if found == number), otherwise)


def spoken_in(content: bytes) -> Spoken:
    """The sounds and texts of the newest step in an events file. Raises: ValueError."""
    spoken = Spoken()
    for event in records_of(content):
        step = first(event, 2, 0)
        for number, value in fields_of(first(event, 5)):
            if number != 1 or step < spoken.step:
                continue
            if step > spoken.step:
                spoken = Spoken(step)
            name = first(value, 1).decode(errors="replace")
            sound, text = first(first(value, 6), 4), first(first(value, 8), 8)
            if sound:
                spoken.sounds[name] = sound
            elif text:
                spoken.texts[name.removesuffix("/text_summary")] = text.decode(errors="replace")
    return spoken


@functools.lru_cache(maxsize=4)
def read_spoken(path: Path, size: int, changed: int) -> Spoken:
    """Of a file as it is now; nothing of one that is no events file."""
    try:
        return spoken_in(path.read_bytes()) if size <= MOST_BYTES else Spoken()
    except (OSError, ValueError):
        return Spoken()


def newest_spoken(run: Path) -> Spoken:
    """What the newest checkpoint of the run in this directory said: every one has a file of its own."""
    path = newest_of(run.glob("logs/run_*/voice/events.out.tfevents.*"))
    try:
        return read_spoken(path, path.stat().st_size, path.stat().st_mtime_ns) if path else Spoken()
    except OSError:
        return Spoken()


# ---------------------------------------------------------------------------------------------------------------------
# The originals


@functools.lru_cache(maxsize=8)
def recordings_at(manifest: Path, changed: int) -> dict[str, Path]:
    """Text -> recording, of the first rows of a list of pairs."""
    found: dict[str, Path] = {}
    with suppress(OSError), manifest.open("rb") as lines:
        for line in itertools.islice(lines, MOST_ROWS):
            with suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                found.setdefault(row["target_text"], manifest.parent / row["target_audio_path"])
    return found


def originals(jobs: Sequence[Job], workspace: Workspace) -> dict[str, Path]:
    """Text -> recording, of the validation of the run that these jobs, newest first, are of."""
    found: dict[str, Path] = {}
    for line in lines_of(form_of_run(jobs, workspace).get("val_manifests")) or ["processed_data/val_pairs.jsonl"]:
        with suppress(Refused, OSError):
            path = workspace.inside(split_manifest(line)[0], must_exist=True)
            found = {**recordings_at(path, path.stat().st_mtime_ns), **found}
    return found


@functools.lru_cache(maxsize=32)
def sound_at(path: Path, changed: int) -> bytes:
    """b"" for one that cannot be shown."""
    try:
        return path.read_bytes() if path.stat().st_size <= MOST_OF_A_SOUND else b""
    except OSError:
        return b""


def original_of(text: str, recordings: dict[str, Path], workspace: Workspace) -> tuple[bytes, str]:
    """The recording of a sentence and its type; (b"", "") where there is none in the workspace."""
    try:
        path = workspace.inside(str(recordings[text]), must_exist=True)
        return sound_at(path, path.stat().st_mtime_ns), TYPES[path.suffix.lower()]
    except (LookupError, Refused, OSError):
        return b"", ""


# ---------------------------------------------------------------------------------------------------------------------
# The page


def player(label: str, sound: bytes, kind: str) -> str:
    source = f"data:{kind};base64,{base64.b64encode(sound).decode()}"
    return f'<label>{html.escape(label)} <audio controls preload="none" src="{source}"></audio></label>'


def samples_html(spoken: Spoken, recordings: dict[str, Path], workspace: Workspace, language: str) -> str:
    parts = [f"<h4>{html.escape(say('samples.heading', language, step=spoken.step))}</h4>"]
    for name, sound in sorted(spoken.sounds.items()):
        text = spoken.texts.get(name, name)
        players = [player(say("samples.generated", language), sound, "audio/wav")]
        original, kind = original_of(text, recordings, workspace)
        if original:
            players.append(player(say("samples.original", language), original, kind))
        parts.append(f'<div class="sample"><p>{html.escape(text)}</p><div>{"".join(players)}</div></div>')
    return "".join(parts)


def create_samples(page: Page, output_dir: Any) -> None:
    """Hidden until there are sounds."""
    shown = gr.HTML(visible=False, elem_id="training-samples", padding=False)

    def look(jobs: Sequence[Job], language: str, typed_dir: str) -> list[Any]:
        try:
            folder = page.workspace.inside(typed_dir)
        except Refused:
            return [gr.update(visible=False)]
        spoken = newest_spoken(folder)
        if not spoken.sounds:
            return [gr.update(visible=False)]
        own = [job for job in jobs if job.kind == "training" and job.output_dir == folder]
        return [gr.update(visible=True, value=samples_html(spoken, originals(own, page.workspace), page.workspace,
                                                           language))]

    page.watch("training", [output_dir], [shown], look)
