"""Corrects a recordings.jsonl by hand, one edit at a time, each of which can be taken back.

  --id ID --text TEXT                              another text
  --id ID --leave-out                              without this row
  --id ID --split-at SECONDS --texts FIRST SECOND  two clips of one
  --id ID --join-next                              one clip of this one and the next
  --add SOUND --text TEXT [--speaker NAME]         a new row; the sound is copied into recorded/
  --undo                                           takes back the last edit, and again, up to the first
  --again                                          makes edits again that are missing, since another program (such as
                                                   tools.import_recordings) has written the file anew

The file is replaced whole or not at all; all other lines stay as they are, to the byte. No recording is changed: the
clips of a split or joined one are new FLAC files of its rate and depth in edited/. Every edit is in RECORDINGS's
.edits.jsonl, with the lines before and after it, before it is made: no row is ever lost.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tools._common import ToolError, atomic_path, info, make_parser, run_program, writing_to
from tools.pauses import levels_of, nearest_silence, silences_of
from tools.recordings import is_sound_name
from tools.run_files import lock_holder
from tools.sound_decoder import flac_bytes, open_sound, read_blocks
from tools.sound_files import LONGEST_FILE, check_recording, path_within

FIRST_COMMAND = "python -m tools.edit_recordings build/recordings/recordings.jsonl --undo"
SHORTEST = 0.2  # seconds of a clip that a split makes
REACH = 1.0  # seconds that the place of a cut may move to lie in a silence
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
BOM = b"\xef\xbb\xbf"
MESSAGES = {
    "no_file": "{path}: no such file. Give a recordings.jsonl",
    "no_row": "{path}: no row has the id {id}. It was edited meanwhile; look again",
    "changed": "{path}: the text of {id} was changed meanwhile. Look again",
    "no_text": "the text is empty. Write what is said, or leave the clip out",
    "too_short": "a clip of {id} would be shorter than {shortest} s: it has {seconds:.2f} s. Cut elsewhere",
    "two_texts": "give two texts, one for each clip",
    "too_long": "together they have more than {longest} s. Leave them apart",
    "no_next": "{id} is the last row. Choose the one before it",
    "not_alike": "{id} and {other} differ in {what}, so they cannot be one clip",
    "nothing_to_undo": "no edit is left to take back",
    "written_anew": "the last edit is not in {path}: the file was written anew, or the edit was cut short. Make the "
                    "edits again first (--again), or edit on",
    "log_damaged": "{path}, line {line}: is no edit. Move the file away; edits up to now can then not be taken back",
    "in_use": "{path} is in use: {holder}. Wait for its end",
}


class Fault(ToolError):
    """Why an edit is not made: a key of MESSAGES and its values."""

    def __init__(self, kind: str, **values: Any) -> None:
        super().__init__(MESSAGES[kind].format(**values))
        self.kind, self.values = kind, values


@dataclass(frozen=True)
class Edit:
    """Lines of the file that others take the place of; `line` counts from 0."""

    action: str
    line: int
    before: list[str]
    after: list[str]


def log_path(recordings: Path) -> Path:
    return recordings.with_name(f"{recordings.stem}.edits.jsonl")


def row_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def encoded(line: str) -> bytes:
    """A line of the log as it is in the file, even if that is not UTF-8."""
    return line.encode(errors="surrogateescape")


def row_of(line: bytes) -> dict[str, Any]:
    """{} for a line that holds no row."""
    try:
        row = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def clean(text: str) -> str:
    """As one line. Raises: Fault for a text without anything in it."""
    text = " ".join(text.encode(errors="ignore").decode().split())
    if not text:
        raise Fault("no_text")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The file and the log of its edits


class EditedFile:
    """The lines of a recordings.jsonl, while nobody else edits it."""

    def __init__(self, path: Path, log: BinaryIO) -> None:
        self.path, self.log = path, log
        self.lines = path.read_bytes().split(b"\n")

    def find(self, row_id: str) -> int:
        """The place of a row. Raises: Fault."""
        written = json.dumps(row_id, ensure_ascii=False).encode(errors="replace"), json.dumps(row_id).encode()
        for place, line in enumerate(self.lines):
            if any(part in line for part in written) and row_of(line).get("id") == row_id:
                return place
        raise Fault("no_row", path=self.path, id=row_id)

    def has(self, row_id: str) -> bool:
        with contextlib.suppress(Fault):
            return self.find(row_id) >= 0
        return False

    def new_ids(self, wanted: str, count: int) -> list[str]:
        """Names that no row has: WANTED-1, WANTED-2 ..."""
        free = (name for number in itertools.count(1) if not self.has(name := f"{wanted}-{number}"))
        return list(itertools.islice(free, count))

    def place_of(self, rows: Sequence[str], hint: int) -> int | None:
        """Where these lines follow one another."""
        wanted = [encoded(row) for row in rows]
        for place in itertools.chain([hint], (i for i, line in enumerate(self.lines) if line == wanted[0])):
            if self.lines[place : place + len(wanted)] == wanted:
                return place
        return None

    def is_made(self, edit: Edit) -> bool:
        if edit.after:
            return self.place_of(edit.after, edit.line) is not None
        return self.place_of(edit.before, edit.line) is None

    def write(self) -> None:
        with writing_to(self.path.parent), atomic_path(self.path, durable=True) as temporary:
            temporary.write_bytes(b"\n".join(self.lines))
            if self.path.exists():
                shutil.copymode(self.path, temporary)

    def make(self, action: str, line: int, count: int, rows: Sequence[dict[str, Any]]) -> None:
        """Replaces `count` lines by rows. The log comes first: what it lacks could not be taken back."""
        before = [part.decode(errors="surrogateescape") for part in self.lines[line : line + count]]
        edit = Edit(action, line, before, [row_line(row) for row in rows])
        with writing_to(self.path.parent):
            self.log.seek(0, os.SEEK_END)
            self.log.write(json.dumps(asdict(edit)).encode() + b"\n")
            self.log.flush()
            os.fsync(self.log.fileno())
        self.replace(edit.line, count, edit.after)
        self.write()

    def replace(self, line: int, count: int, rows: Sequence[str]) -> None:
        self.lines[line : line + count] = map(encoded, rows)

    def edits(self) -> list[tuple[int, Edit]]:
        """All that are in the log, with their places in it; a torn last one, of a killed program, is cut off."""
        self.log.seek(0)
        found, place = [], 0
        for line in self.log:
            if not line.endswith(b"\n"):
                self.log.truncate(place)
                break
            try:
                found.append((place, Edit(**json.loads(line))))
            except (ValueError, TypeError) as error:
                raise Fault("log_damaged", path=log_path(self.path), line=len(found) + 1) from error
            place += len(line)
        return found

    def undo(self) -> Edit:
        """Takes back the last edit. Raises: Fault."""
        edits = self.edits()
        if not edits:
            raise Fault("nothing_to_undo")
        place, edit = edits[-1]
        if not self.is_made(edit):
            raise Fault("written_anew", path=self.path)
        line = self.place_of(edit.after, edit.line) if edit.after else min(edit.line, len(self.lines))
        assert line is not None
        self.replace(line, len(edit.after), edit.before)
        self.write()
        self.log.truncate(place)
        return edit

    def again(self) -> int:
        """Makes the edits that are missing, in their order. Returns how many there were."""
        made = 0
        for _, edit in self.edits():
            line = self.place_of(edit.before, edit.line) if edit.before else None
            if edit.before and line is not None:
                self.replace(line, len(edit.before), edit.after)
                made += 1
            elif not edit.before and not self.is_made(edit):
                self.replace(len(self.lines) - (not self.lines[-1]), 0, edit.after)
                made += 1
        if made:
            self.write()
        return made


@contextlib.contextmanager
def editing(path: Path) -> Iterator[EditedFile]:
    """Raises: Fault where the file is not there, or another program works in its folder."""
    if not path.is_file():
        raise Fault("no_file", path=path)
    holder = lock_holder(path.parent)
    if holder:
        raise Fault("in_use", path=path, holder=holder)
    with writing_to(path.parent):
        log = log_path(path).open("a+b")
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        edited = EditedFile(path, log)
        edited.edits()  # cuts off a torn end, so that the next line is whole
        yield edited


def last_edit_is_missing(path: Path) -> bool:
    """Whether the file was written anew since it was edited, so that again() has something to make."""
    with contextlib.suppress(OSError, ValueError, TypeError), log_path(path).open("rb") as log:
        edits = [line for line in log if line.endswith(b"\n")]
        if edits:
            return not EditedFile(path, log).is_made(Edit(**json.loads(edits[-1])))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def set_text(path: Path, row_id: str, text: str, shown: str | None = None) -> None:
    """`shown` is the text that the user has seen. Raises: ToolError."""
    text = clean(text)
    with editing(path) as edited:
        line = edited.find(row_id)
        row = row_of(edited.lines[line])
        if shown is not None and row.get("text") != shown:
            raise Fault("changed", path=path, id=row_id)
        if row.get("text") != text:
            edited.make("text", line, 1, [{**row, "text": text}])


def leave_out(path: Path, row_id: str) -> None:
    """Raises: ToolError."""
    with editing(path) as edited:
        edited.make("leave_out", edited.find(row_id), 1, [])


def samples_of(path: Path) -> tuple[np.ndarray, Any]:
    """[frames, channels], float32, and the header. Raises: ToolError."""
    check_recording(path)
    sound = open_sound(path)
    return np.concatenate([*read_blocks(sound)]), sound


def quiet_place(path: Path, wanted: float) -> float:
    """The time, in seconds, near to `wanted` that lies in a silence; `wanted` itself where there is none.

    Raises: ToolError.
    """
    samples, sound = samples_of(path)
    seconds = len(samples) / sound.sample_rate
    silences = silences_of(levels_of([samples], sound.sample_rate))
    first, last = max(SHORTEST, wanted - REACH), min(seconds - SHORTEST, wanted + REACH)
    found = nearest_silence(silences, first, last, wanted) if first < last else None
    return round(wanted if found is None else found, 3)


def new_clip(folder: Path, row_id: str, content: bytes) -> str:
    """Writes edited/NAME.flac under a new name. Returns its path in the folder."""
    stem = re.sub(r"[^\w.-]+", "_", row_id).strip("._")[:80] or "clip"
    audio = next(name for number in itertools.count(1)
                 if not (folder / (name := f"edited/{stem}.{number}.flac")).exists())
    with writing_to(folder), atomic_path(folder / audio) as temporary:
        temporary.write_bytes(content)
    return audio


def split(path: Path, row_id: str, at: float, texts: Sequence[str], audio_dir: Path | None = None) -> list[str]:
    """Two clips of one, cut `at` seconds. Returns their ids. Raises: ToolError."""
    if len(texts) != 2:
        raise Fault("two_texts")
    texts, folder = [clean(text) for text in texts], Path(os.path.realpath(audio_dir or path.parent))
    with editing(path) as edited:
        line = edited.find(row_id)
        row = row_of(edited.lines[line])
        samples, sound = samples_of(path_within(row["audio"], folder))
        seconds = len(samples) / sound.sample_rate
        if not SHORTEST <= at <= seconds - SHORTEST:
            raise Fault("too_short", id=row_id, shortest=SHORTEST, seconds=seconds)
        cut, ids = round(at * sound.sample_rate), edited.new_ids(row_id, 2)
        rows = [{**row, "id": new_id, "text": text, "audio": new_clip(folder, row_id, flac_bytes(part, sound)),
                 "duration": round(len(part) / sound.sample_rate, 3)}
                for new_id, text, part in zip(ids, texts, (samples[:cut], samples[cut:]), strict=True)]
        if isinstance(row.get("start"), int | float):  # of a longer recording
            rows[1]["start"] = round(row["start"] + at, 3)
        edited.make("split", line, 1, rows)
        return ids


def join_next(path: Path, row_id: str, audio_dir: Path | None = None) -> str:
    """One clip of a row and the next. Returns its id. Raises: ToolError."""
    folder = Path(os.path.realpath(audio_dir or path.parent))
    with editing(path) as edited:
        line = edited.find(row_id)
        behind = next((place for place in range(line + 1, len(edited.lines)) if row_of(edited.lines[place])), None)
        if behind is None:
            raise Fault("no_next", id=row_id)
        rows = [row_of(edited.lines[place]) for place in (line, behind)]
        for what in ("speaker", "language", "split"):
            if rows[0].get(what, "") != rows[1].get(what, ""):
                raise Fault("not_alike", id=row_id, other=rows[1].get("id"), what=what)
        (first, sound), (second, other) = (samples_of(path_within(row["audio"], folder)) for row in rows)
        if (sound.sample_rate, sound.channels) != (other.sample_rate, other.channels):
            raise Fault("not_alike", id=row_id, other=rows[1].get("id"), what="rate or channels")
        seconds = (len(first) + len(second)) / sound.sample_rate
        if seconds > LONGEST_FILE:
            raise Fault("too_long", longest=LONGEST_FILE)
        finer = sound if sound.bits >= other.bits else other
        text = clean(f"{rows[0].get('text', '')} {rows[1].get('text', '')}")
        new_id, = edited.new_ids(row_id, 1)
        audio = new_clip(folder, row_id, flac_bytes(np.concatenate([first, second]), finer))
        edited.make("join", line, behind + 1 - line,
                    [{**rows[0], "id": new_id, "text": text, "audio": audio, "duration": round(seconds, 3)}])
        return new_id


def add(path: Path, sound: Path, text: str, speaker: str = "") -> str:
    """A new row at the end, with a copy of the sound. Makes the file where there is none. Returns its id.

    Raises: ToolError.
    """
    text, rate = clean(text), check_recording(sound)
    if not is_sound_name(sound.name):
        raise ToolError(f"{sound}: not the ending of a sound file. Give a WAV, FLAC or OGG file")
    samples, _ = samples_of(sound)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    with editing(path) as edited:
        taken = {recorded.stem for recorded in (path.parent / "recorded").glob("*")}
        row_id = next(name for number in itertools.count(1)
                      if (name := f"recorded-{number:04}") not in taken and not edited.has(name))
        audio = f"recorded/{row_id}{sound.suffix.lower()}"
        with writing_to(path.parent), atomic_path(path.parent / audio, durable=True) as temporary:
            shutil.copyfile(sound, temporary)
        row = {"id": row_id, "text": text, "audio": audio, **({"speaker": speaker} if speaker else {}),
               "duration": round(len(samples) / rate, 3)}
        if edited.lines[-1]:
            edited.lines.append(b"")
        edited.make("add", len(edited.lines) - 1, 0, [row])
        return row_id


def undo(path: Path) -> Edit:
    """Raises: ToolError."""
    with editing(path) as edited:
        return edited.undo()


def again(path: Path) -> int:
    """Raises: ToolError."""
    with editing(path) as edited:
        return edited.again()


# ---------------------------------------------------------------------------------------------------------------------
# The command line

ACTIONS = ("leave_out", "split_at", "join_next", "add", "undo", "again")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("recordings", type=Path, metavar="RECORDINGS", help="recordings.jsonl")
    parser.add_argument("--audio-dir", type=Path, help="holds all recordings (the folder of RECORDINGS)")
    parser.add_argument("--id", help="of the row to edit")
    parser.add_argument("--text", help="what is said")
    parser.add_argument("--speaker", default="", help="of the sound to add")
    parser.add_argument("--texts", nargs=2, metavar=("FIRST", "SECOND"), help="of the two clips")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--leave-out", action="store_true", help="take the row out")
    actions.add_argument("--split-at", type=float, metavar="SECONDS", help="cut the clip here")
    actions.add_argument("--join-next", action="store_true", help="make one clip of it and the next")
    actions.add_argument("--add", type=Path, metavar="SOUND", help="a recording that gets a row")
    actions.add_argument("--undo", action="store_true", help="take back the last edit")
    actions.add_argument("--again", action="store_true", help="make missing edits again")
    args = parser.parse_args(argv)
    action = next((name for name in ACTIONS if getattr(args, name) not in (None, False)), "text")
    needed = {"add": ["text"], "undo": [], "again": [], "text": ["id", "text"], "split_at": ["id", "texts"]}
    missing = [f"--{name}" for name in needed.get(action, ["id"]) if getattr(args, name) is None]
    if missing:
        raise ToolError(f"--{action.replace('_', '-')}: {' and '.join(missing)} must be given too")
    args.action = action
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    path = args.recordings
    if args.action == "text":
        set_text(path, args.id, args.text)
        info(f"{args.id}: its text is written")
    elif args.action == "leave_out":
        leave_out(path, args.id)
        info(f"{args.id}: left out; --undo takes that back")
    elif args.action == "split_at":
        info(f"{args.id}: split into {' and '.join(split(path, args.id, args.split_at, args.texts, args.audio_dir))}")
    elif args.action == "join_next":
        info(f"{args.id} and the next: joined as {join_next(path, args.id, args.audio_dir)}")
    elif args.action == "add":
        info(f"{args.add}: added as {add(path, args.add, args.text, args.speaker)}")
    elif args.action == "undo":
        info(f"taken back: {undo(path).action}")
    else:
        info(f"{again(path)} edits were missing and are made again")


if __name__ == "__main__":
    run_program(main)
