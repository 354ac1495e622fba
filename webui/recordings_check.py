"""What is in a recordings.jsonl, for the page to show, and which of its lines cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.recordings import RowCheck, is_sound_name, why_left_out
from webui.workspace import Refused, Workspace, as_text

SHOWN_ROWS, SHOWN_FAULTS = 50, 20
EXAMPLE = """{"id": "a1", "speaker": "almaz", "text": "ሰላም ለዓለም።", "audio": "a1.wav"}
{"id": "a2", "speaker": "almaz", "text": "እንኳን ደህና መጡ።", "audio": "a2.wav", "split": "val"}
"""


@dataclass
class Dataset:
    rows: int = 0
    speakers: set[str] = field(default_factory=set)
    validation: int = 0
    first: list[list[str]] = field(default_factory=list)
    """id, speaker, text and audio of the first rows."""
    faults: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    """Line number, key of TEXTS and its values."""


def read_dataset(path: Path, workspace: Workspace) -> Dataset:
    """Raises: Refused for what is no file of JSON lines at all."""
    if path.is_dir():
        raise Refused("not_a_file", path=workspace.show(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused("not_readable", path=workspace.show(path)) from error
    found = read_lines(content.split(b"\n"), path.parent, workspace)
    if found.faults and not found.rows:
        raise Refused("not_json_lines", path=workspace.show(path))
    return found


def read_lines(lines: Sequence[bytes], folder: Path, workspace: Workspace) -> Dataset:
    """`folder` is where the recordings' names start."""
    found, check = Dataset(), RowCheck()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            found.faults.append((number, "dataset.not_json", {}))
            continue
        found.rows += 1
        found.speakers.add(str(row.get("speaker", "")))
        found.validation += row.get("split") == "val"
        if len(found.first) < SHOWN_ROWS:
            found.first.append([as_text(row.get(name, "")) for name in ("id", "speaker", "text", "audio")])
        fault = check(number, row) or why_left_out(row)
        if fault:
            values = {name: as_text(value) for name, value in fault.values.items()}
            found.faults.append((number, f"dataset.{fault.kind}", values))
        elif not is_recording(folder / row["audio"], workspace):
            found.faults.append((number, "dataset.no_audio", {"path": as_text(row["audio"])}))
        elif not is_sound_name(row["audio"]):
            found.faults.append((number, "dataset.not_sound", {"path": as_text(row["audio"])}))
    return found


def is_recording(path: Path, workspace: Workspace) -> bool:
    """Says nothing about files outside the workspace."""
    try:
        return workspace.inside(str(path)).is_file()
    except Refused:
        return False
