"""What lies in a source of recordings, and which utterances are to become of it, before any sound is read."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools._common import Progress, ToolError, warn
from tools.preprocess import skipped_row
from tools.recording_layouts import (
    ARCHIVES,
    CUES,
    SIDECARS,
    Entry,
    Found,
    beside,
    folder_of,
    is_split_of,
    like_head,
    split_name,
    stems_of_cues,
    table_entries,
    understood,
)
from tools.sound_names import SOUND_FOLDERS, SOUNDS, SoundNames, name_key, without_suffix
from tools.subtitles import Cue, join_cues, read_cues, without_overlaps
from tools.transcript_tables import TABLES, Table, decode, read_table

MOST_TABLES = 2000  # that are looked at
NO_TABLE = re.compile(r"(?i)(?:readme|licen[cs]e|copying|changelog|requirements)")


# ---------------------------------------------------------------------------------------------------------------------
# The source


@dataclass
class Source:
    """Where the sounds are, and what lies there."""

    root: Path
    listing: list[str]
    """Paths relative to root, with slashes, sorted; sounds and other files."""
    table: str = ""
    """Set where SOURCE is a table: the only one that counts."""
    hidden: int = 0
    unnameable: int = 0

    @functools.cached_property
    def sounds(self) -> list[str]:
        return [name for name in self.listing if os.path.splitext(name)[1].lower() in SOUNDS]


def list_folder(root: Path, without: Path) -> tuple[list[str], int, int]:
    """(paths of files relative to root, sorted; how many hidden ones; how many with names that are no text). Links are
    followed, no folder twice; `without` is left out. Raises: ToolError for a root that cannot be listed."""
    found: list[str] = []
    hidden = unnameable = 0
    seen: set[str] = set()
    todo = [""]
    progress, listed = Progress("listing", 1), 0
    while todo:
        folder = todo.pop()
        path = os.path.join(root, folder)
        real = os.path.realpath(path)
        if real in seen or real == str(without):
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise ToolError(f"{root}: cannot be listed ({error.strerror}). Mend its rights") from error
            warn(f"{path}: cannot be listed ({error.strerror}); left out")
            continue
        for entry in entries:
            listed += 1
            name = f"{folder}/{entry.name}".removeprefix("/")
            if entry.name.startswith((".", "~$")) or entry.name in ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"):
                hidden += 1
            elif not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
                unnameable += 1
            elif entry.is_dir():
                todo.append(name)
            elif entry.is_file():
                found.append(name)
        progress.total = listed + len(todo) + 1
        progress.update(listed)
    return sorted(found), hidden, unnameable


def open_source(path: Path, audio_dir: Path | None, output_dir: Path) -> Source:
    """Raises: ToolError for a source that is not there, or that the output would go into."""
    if not path.exists():
        raise ToolError(f"{path}: no such file or folder. Give the folder that holds the recordings")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in ARCHIVES:
        raise ToolError(f"{path}: a packed archive. Unpack it, and give the folder")
    if path.is_file() and suffix not in SOUNDS | TABLES | set(CUES):
        raise ToolError(f"{path}: neither a folder, nor a table, nor a sound. {understood()}")
    root = Path(os.path.realpath(audio_dir or (path if path.is_dir() else path.parent)))
    if not root.is_dir():
        raise ToolError(f"--audio-dir {audio_dir}: no such folder")
    output = Path(os.path.realpath(output_dir))
    if root == output or root.is_relative_to(output / "audio"):
        raise ToolError(f"--output-dir {output_dir}: is where the recordings are. Give another folder, such as dataset")
    listing, hidden, unnameable = list_folder(root, output)
    source = Source(root, listing, "", hidden, unnameable)
    if path.is_file() and suffix in TABLES and not is_sidecar(path.name, source):
        source.table = os.path.relpath(os.path.realpath(path), root).replace(os.sep, "/")
    elif path.is_file():
        return replace(source, listing=belonging(path.name, listing))
    return source


def belonging(name: str, listing: Sequence[str]) -> list[str]:
    """A sound with its texts, or a text with its sound: what lies beside it under its name."""
    def stems(other: str) -> set[str]:
        return {name_key(without_suffix(other))} if os.path.splitext(other)[1].lower() in SOUNDS \
            else set(stems_of_cues(other))

    texts = (*SIDECARS, *CUES)
    return [other for other in listing if other == name or stems(other) & stems(name)
            and (other.lower().endswith(texts) or os.path.splitext(name)[1].lower() not in SOUNDS)]


def is_sidecar(name: str, source: Source) -> bool:
    """Whether a .txt is the text of one sound."""
    return name.lower().endswith(SIDECARS) and name in beside([name], source.sounds, SIDECARS).values()


def tables_of(source: Source) -> tuple[list[Table], list[str]]:
    """The first rows of everything that may be a table, and what is wrong with those that cannot be read."""
    if source.table:
        table = read_table(source.root / source.table, source.table, head=True)
        if not table or not table.rows:
            raise ToolError(f"{source.table}: holds no table. {understood()}")
        return [table], []
    texts = set(beside(source.listing, source.sounds, SIDECARS).values())
    names = [name for name in source.listing if name not in texts
             and (os.path.splitext(name)[1].lower() in TABLES or name.rpartition("/")[2] == "text")
             and not NO_TABLE.match(name.rpartition("/")[2])]
    names.sort(key=lambda name: (name.count("/"), name))
    tables, unreadable = [], []
    for name in names[:MOST_TABLES]:
        try:
            table = read_table(source.root / name, name, head=True)
        except (ToolError, OSError) as error:
            unreadable.append(str(error))
            continue
        tables += [table] if table and table.rows else []
    if len(names) > MOST_TABLES:
        warn(f"{len(names)} files may be tables; only the first {MOST_TABLES} were looked at")
    return tables, unreadable


# ---------------------------------------------------------------------------------------------------------------------
# The plan: which utterances, before any sound is read


@dataclass
class Job:
    """One sound, and what becomes of it."""

    sound: str
    number: int
    """Place in the result."""
    entries: list[tuple[int, Entry]] = field(default_factory=list)
    cues: list[Cue] | None = None
    place: str = ""


@dataclass
class Plan:
    source: Source
    jobs: list[Job]
    skipped: list[dict[str, Any]]
    names: dict[str, str]
    """For each sound the id that its name makes."""


def ids_of(sounds: Sequence[str]) -> dict[str, str]:
    """An id for each sound: its path without ending and without folders such as wavs/; with these where two would be
    the same."""
    def short(sound: str) -> str:
        folders, slash, last = without_suffix(sound).rpartition("/")
        return "/".join([*(part for part in folders.split("/") if slash and part.lower() not in SOUND_FOLDERS), last])

    counts = Counter(short(sound) for sound in sounds)
    return {sound: short(sound) if counts[short(sound)] == 1 else sound for sound in sounds}


def split_of_table(table: Table, tables: Sequence[Table]) -> str:
    """train or val where each of several tables is one of them, by its name."""
    return split_name(os.path.splitext(os.path.basename(table.name))[0]) if is_split_of(tables) else ""


def plan_tables(source: Source, found: Found, names: SoundNames, ids: dict[str, str]) -> Plan:
    """Jobs from the rows of tables; rows without a sound, and several texts for one, are skipped."""
    plan = Plan(source, [], [], ids)
    numbered: list[tuple[int, Entry]] = []
    rows = 0
    for head in found.tables:
        table = read_table(source.root / head.name, head.name)
        assert table is not None  # its first rows were one
        table = like_head(table, head)
        entries, faults = table_entries(table, split_of_table(head, found.tables))
        for place, fault in faults:
            rows += 1
            plan.skipped.append(skipped_row(rows, "", "row that cannot be read", f"{place}: {fault}. Mend it"))
        folder = folder_of(table.name)
        progress = Progress("finding sounds", len(entries))
        for done, entry in enumerate(entries, 1):
            progress.update(done)
            rows += 1
            try:
                numbered.append((rows, replace(entry, audio=names.find(entry.audio, folder))))
            except LookupError as error:
                plan.skipped.append(skipped_row(rows, entry.id or entry.audio, "no such recording",
                                                f"{entry.place}: {error}. Correct the name, or take the row out"))
    speakers = kaldi_speakers(source)
    numbered = [(number, replace(entry, speaker=entry.speaker or speakers.get(ids[entry.audio].rpartition("/")[2], "")))
                for number, entry in numbered]
    numbered, repeated = without_repeats(numbered, ids)
    plan.skipped += repeated
    jobs: dict[str, Job] = {}
    for number, entry in numbered:
        jobs.setdefault(entry.audio, Job(entry.audio, number)).entries.append((number, entry))
    plan.jobs = list(jobs.values())
    return plan


def kaldi_speakers(source: Source) -> dict[str, str]:
    """Speakers by the names of their sounds, from Kaldi's utt2spk files."""
    speakers: dict[str, str] = {}
    for name in source.listing:
        if name.rpartition("/")[2] == "utt2spk":
            lines = (source.root / name).read_text(encoding="utf-8", errors="replace").splitlines()
            speakers.update((line.split()[0], line.split()[1]) for line in lines if len(line.split()) >= 2)
    return speakers


def without_repeats(numbered: Sequence[tuple[int, Entry]], ids: dict[str, str]
                    ) -> tuple[list[tuple[int, Entry]], list[dict[str, Any]]]:
    """Of rows for one sound and part: the first, if all have one text; none, if one of several texts must be wrong."""
    groups: dict[tuple[Any, ...], list[tuple[int, Entry]]] = {}
    for number, entry in numbered:
        groups.setdefault((entry.audio, entry.start, entry.end), []).append((number, entry))
    kept, skipped = [], []
    for (audio, *_), group in groups.items():
        texts = list(dict.fromkeys(entry.text for _, entry in group if entry.text))
        if len(texts) > 1:
            skipped += [skipped_row(number, entry.id or ids[audio], "several texts for one recording",
                                    f"{entry.place}: {audio!r} has the texts {texts[0]!r} and {texts[1]!r}. Take the "
                                    "wrong rows out") for number, entry in group]
            continue
        best = next((pair for pair in group if pair[1].text), group[0])
        kept.append(best)
        skipped += [skipped_row(number, entry.id or ids[audio], "two rows for one recording",
                                f"{entry.place}: {audio!r} is that of {best[1].place} too, with the same text")
                    for number, entry in group if number != best[0]]
    return sorted(kept), skipped


def plan_folder(source: Source, ids: dict[str, str], language: str) -> Plan:
    """Jobs from sounds and what lies beside them."""
    plan = Plan(source, [], [], ids)
    sounds = source.sounds
    cues, texts = beside(source.listing, sounds, CUES, language), beside(source.listing, sounds, SIDECARS)
    progress = Progress("reading texts", len(sounds))
    taken: dict[str, str] = {}
    for number, sound in enumerate(sounds, 1):
        progress.update(number)
        name = cues.get(sound) or texts.get(sound, "")
        job = Job(sound, number, place=name)
        if name and name in taken:
            plan.skipped.append(skipped_row(number, ids[sound], "two sounds for one text", f"{sound}: {name} belongs "
                                            f"to {taken[name]} already. Keep one of the two"))
            continue
        taken[name] = sound
        try:
            content = decode((source.root / name).read_bytes(), name) if name else ""
        except (ToolError, OSError) as error:
            plan.skipped.append(skipped_row(number, ids[sound], "unreadable text", str(error)))
            continue
        if sound in cues:
            job.cues, faults = plan_cues(content)
            plan.skipped += [skipped_row(number, ids[sound], "cue left out", f"{name}: {fault}") for fault in faults]
        else:
            job.entries = [(number, Entry(name or sound, sound, " ".join(content.split())))]
        plan.jobs.append(job)
    stems = {name_key(without_suffix(sound)) for sound in sounds}
    unknown = [name for name in source.listing if os.path.splitext(name)[1].lower() not in {*SOUNDS, *SIDECARS, *CUES}
               and name_key(os.path.splitext(name)[0]) in stems]
    if unknown:
        warn(f"{len(unknown)} files are named like a sound and are not read: {', '.join(unknown[:3])}. Texts are read "
             "from .txt, .lab, .srt and .vtt")
    unused = [name for name in source.listing if name.lower().endswith((*CUES, *SIDECARS)) and name not in taken
              and not NO_TABLE.match(name.rpartition("/")[2])]
    if unused:
        warn(f"{len(unused)} texts have no sound of their name: {', '.join(unused[:3])}")
    return plan


def plan_cues(content: str) -> tuple[list[Cue], list[str]]:
    """The clips that a file of cues asks for, before the sound is known; and why cues are left out."""
    cues, faults = read_cues(content)
    cues, overlapping = without_overlaps(cues)
    return join_cues(cues), faults + overlapping
