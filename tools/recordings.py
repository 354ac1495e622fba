"""recordings.jsonl: what the row of a recording must hold; one check for every program that reads or shows such a file.

Keys: id (unique), text, audio (relative to the file or to --audio-dir); optional speaker, language, split (train, val).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools._common import ToolError, read_jsonl

REQUIRED = ("id", "text", "audio")
KEYS = (*REQUIRED, "speaker", "language", "split")
SPLITS = ("train", "val")
REMEDY = 'Each line is an object such as {"id": "1", "speaker": "a", "text": "ሰላም", "audio": "1.wav"}'
SOUND_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
MESSAGES = {
    "missing": "missing {names}",
    "not_a_text": "{name} is {value}, not a text",
    "id_twice": "id {value} is that of row {first} too. Make ids unique",
    "other_split": "split is {value}, neither train nor val",
    "empty_text": "the transcript is empty. Write what is said",
}


class RowFault(NamedTuple):
    """What is wrong with a row: a key of MESSAGES and its values."""

    kind: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return MESSAGES[self.kind].format(**self.values)


class RowCheck:
    """Says of one row after the other what makes it none; for the ids of one file."""

    def __init__(self, required: Sequence[str] = REQUIRED) -> None:
        self.required = required
        self.seen: dict[str, int] = {}

    def __call__(self, number: int, row: dict[str, Any]) -> RowFault | None:
        missing = [key for key in self.required if key not in row]
        if missing:
            return RowFault("missing", {"names": ", ".join(missing)})
        for key in KEYS:
            value = row.get(key, "")
            if not isinstance(value, str) or (key in ("id", "audio") and key in row and not value):
                return RowFault("not_a_text", {"name": key, "value": repr(value)})
        if "id" in row and self.seen.setdefault(row["id"], number) != number:
            return RowFault("id_twice", {"value": repr(row["id"]), "first": self.seen[row["id"]]})
        return None


def why_left_out(row: dict[str, Any]) -> RowFault | None:
    """What keeps a row that RowCheck passed out of training and validation, without stopping a program."""
    if row.get("split", "train") not in SPLITS:
        return RowFault("other_split", {"value": repr(row["split"])})
    return None if row.get("text", " ").strip() else RowFault("empty_text", {})


def is_sound_name(name: str) -> bool:
    """Whether a file's name ends as a recording's does."""
    return Path(name).suffix.lower() in SOUND_SUFFIXES


def read_recordings(path: Path, required: Sequence[str] = REQUIRED, remedy: str = REMEDY) -> list[dict[str, Any]]:
    """All rows. Raises: ToolError naming file and row for the first that is none."""
    rows, check = read_jsonl(path, required, remedy), RowCheck(required)
    for number, row in enumerate(rows, 1):
        fault = check(number, row)
        if fault:
            raise ToolError(f"{path}, row {number}: {fault}" + (f". {REMEDY}" if fault.kind == "not_a_text" else ""))
    return rows
