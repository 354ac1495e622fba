"""What a folder of recordings is: its listing and the tables in it become entries. Pure.

An entry is one utterance as the source tells it: which sound (and which part of it), which text, whose voice.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from tools._common import ToolError
from tools.sound_names import SoundNames, name_key, without_suffix
from tools.subtitles import seconds_of_time
from tools.transcript_tables import (
    MEANINGS,
    SAMPLE,
    Table,
    column_name,
)

SIDECARS = (".lab", ".txt", ".normalized.txt", ".original.txt", ".trn")  # the first of these that is there counts
CUES = (".srt", ".vtt")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".7z", ".rar", ".xz", ".parquet", ".arrow")
LANGUAGE_ENDING = re.compile(r"\.[a-z]{2,3}(?:-[a-z]{2,4})?$")
LAYOUTS = {
    "ljspeech": "a table of name|text or name|text|normalised text, with or without header",
    "common-voice": "TSV files with the columns client_id, path, sentence",
    "nemo": "JSON lines with audio_filepath, text; optional offset, duration",
    "f5-tts": "a table with the header audio_file|text",
    "gpt-sovits": "a table without header: path|speaker|language|text",
    "filelist": "other tables without header in which one column names sounds: path|speaker|text, or lines that start "
                "with a name (Kaldi's text, *.trans.txt)",
    "jsonl": "JSON lines (or one JSON array) with audio, text",
    "table": "CSV, TSV or XLSX whose header names the columns, such as audio, text, speaker",
    "folder": "sounds, each with a .txt, .lab, .srt or .vtt beside it, or alone",
}
VALIDATION = re.compile(r"(?:^|[^a-z])(?:val|valid|validation|dev|test|eval)(?:[^a-z]|$)")
TRAINING = re.compile(r"(?:^|[^a-z])train(?:ing)?(?:[^a-z]|$)")


@dataclass(frozen=True)
class Entry:
    """One utterance as the source names it. Times are in seconds; without `start` it is the whole file."""

    place: str
    """Where it says so, for messages."""
    audio: str
    text: str = ""
    speaker: str = ""
    language: str = ""
    split: str = ""
    id: str = ""
    start: float | None = None
    end: float | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Entries of a table


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def find_columns(table: Table, names: SoundNames) -> None:
    """For a table whose header does not say which column names the sounds: the one whose cells are sounds.

    With a header that names the text only, the header is completed. Without one, and where the first column names no
    sound, the text is the first column that reads like one.
    """
    first = [MEANINGS.get(column_name(cell), "") for cell in table.rows[0][1]]
    rows = [cells for _, cells in table.rows["text" in first:][:SAMPLE]]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    columns = [[cells[i] for cells in rows if len(cells) == width] for i in range(width)]
    found = [sum(names.has(cell, folder_of(table.name)) for cell in column[:20]) for column in columns]
    if not found or max(found) < min(20, len(columns[0])) / 2:
        return
    audio = found.index(max(found))
    if "text" in first and len(first) == width and first[audio] in ("", "id"):
        table.header = ["audio" if i == audio else "" if name == "audio" else name for i, name in enumerate(first)]
        table.named, table.rows = table.rows[0][1], table.rows[1:]
        return
    lengths = [sum(map(len, column)) if i != audio and sum(" " in cell for cell in column) > len(column) / 3 else 0
               for i, column in enumerate(columns)]
    if not found[0] and max(lengths):
        text = next(i for i, length in enumerate(lengths) if length >= 0.4 * max(lengths))
        table.guess = ["audio" if i == audio else "text" if i == text else "" for i in range(width)]


def like_head(table: Table, head: Table) -> Table:
    """A whole table, its columns as they were found from its first rows."""
    rows = table.rows[1:] if head.header and not table.header else table.rows
    return replace(table, header=head.header, named=head.named, guess=head.guess or head.columns, rows=rows)


def layout_of(table: Table) -> str:
    """"" for a table that is of no known layout."""
    if not table.header:
        if table.guess:
            return "filelist"
        known = {("audio", "text"): "ljspeech", ("audio", "text", "text2"): "ljspeech",
                 ("audio", "text", "speaker"): "filelist", ("audio", "speaker", "text"): "filelist",
                 ("audio", "speaker", "language", "text"): "gpt-sovits"}
        found = known.get(tuple(table.columns), "")
        return "filelist" if found and table.delimiter == " " else found
    named = {column_name(name) for name in table.named}
    sheet = table.name.rpartition(".")[2].lower() in ("xlsx", "xlsm")
    if {"client_id", "path", "sentence"} <= named:
        return "common-voice"
    if not table.delimiter and not sheet:
        return "nemo" if "audio_filepath" in named else "jsonl"
    if table.delimiter == "|":
        return "f5-tts" if named == {"audio_file", "text"} else \
            "ljspeech" if set(table.header) <= {"audio", "id", "text", ""} else "table"
    return "table"


def seconds_in(cell: str, scale: float = 1.0) -> float | None:
    """A number, with point or comma, or a time -> seconds; None for an empty cell. Raises: ValueError."""
    if not cell:
        return None
    try:
        value = float(cell.replace(",", ".")) * scale
    except ValueError:
        value = seconds_of_time(cell)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{cell!r} is no time")
    return value


def part_of(cells: dict[str, str]) -> tuple[float | None, float | None]:
    """(start, end) that a row names; (None, None) for the whole file. Raises: ValueError."""
    start, end, duration = (seconds_in(cells.get(name, "")) for name in ("start", "end", "duration"))
    if start is None:
        start = seconds_in(cells.get("start_ms", ""), 0.001)
    end = seconds_in(cells.get("end_ms", ""), 0.001) if end is None else end
    duration = seconds_in(cells.get("duration_ms", ""), 0.001) if duration is None else duration
    if end is None and duration:
        end = (start or 0.0) + duration
    if start is None and end is None:
        return None, None
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"it ends at {end:g} s and starts at {start or 0:g} s")
    return start or 0.0, end


def split_name(value: str) -> str:
    """train, val or "" for any name of a split."""
    lower = value.casefold()
    return "val" if VALIDATION.search(lower) else "train" if TRAINING.search(lower) else ""


def table_entries(table: Table, split: str = "") -> tuple[list[Entry], list[tuple[str, str]]]:
    """Entries of a table of known layout, and (place, what is wrong) of rows that are none."""
    header = table.columns
    if "audio" not in header:  # an id that is the name of a file
        header = ["audio" if meaning == "id" else meaning for meaning in header]
    entries, faults = [], list(table.faults)
    unit = "line" if table.delimiter or table.name.lower().endswith(("json", "jsonl", "manifest")) else "row"
    for number, cells in table.rows:
        place = f"{table.name}, {unit} {number}"
        if len(cells) > len(header) and not any(cells[len(header):]):
            cells = cells[: len(header)]
        if len(cells) > len(header):
            if header[-1] != "text" or table.delimiter == "|":
                faults.append((place, f"has {len(cells)} cells, not {len(header)}"))
                continue
            cells = [*cells[: len(header) - 1], " ".join(cells[len(header) - 1:])]  # the text has the delimiter
        named = {meaning: cell for meaning, cell in zip(header, cells, strict=False) if meaning}
        if not named.get("audio"):
            faults.append((place, "names no sound"))
            continue
        try:
            start, end = part_of(named)
        except ValueError as error:
            faults.append((place, f"{error}"))
            continue
        text = " ".join((named.get("text2") or named.get("text", "")).split())
        entries.append(Entry(place, named["audio"], text, named.get("speaker", ""),
                             named.get("language", "").lower(), split_name(named.get("split", "")) or split,
                             named.get("id", ""), start, end))
    return entries, faults


# ---------------------------------------------------------------------------------------------------------------------
# Which layout a source is


@dataclass
class Found:
    """What a source is, and how that is known."""

    layout: str
    reason: str
    tables: list[Table] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Tables that are not used, each with the reason."""


def share_found(table: Table, names: SoundNames) -> tuple[int, int]:
    """How many of the table's first names are sounds of the source, and how many were looked for."""
    sample = replace(table, rows=table.rows[:20], faults=[])
    entries = table_entries(sample)[0] if layout_of(table) else []
    return sum(names.has(entry.audio, folder_of(table.name)) for entry in entries), len(entries)


def describe(table: Table, names: SoundNames) -> str:
    """What a table is, in one line."""
    count, looked = share_found(table, names)
    signs = {"\t": "tabs", " ": "the first space"}.get(table.delimiter, table.delimiter)
    if table.header:
        columns = ", ".join(name for name, meaning in zip(table.named, table.header, strict=False) if meaning)
        form = f"header with {columns}"
    else:
        columns = "|".join(name or "-" for name in table.columns).replace("text2", "normalised text") \
            or "of no known kind"
        form = f"{len(table.rows[0][1])} columns ({columns}), no header"
    return f"{table.name} with {form}{f', parted by {signs}' if signs else ''}, {count} of {looked} first names found"


def is_split_of(tables: Sequence[Table]) -> bool:
    """Whether tables are the parts of one set, by their names."""
    return len(tables) > 1 and all(split_name(PurePosixPath(table.name).stem) for table in tables)


def choose_tables(tables: list[Table], layout: str) -> tuple[list[Table], list[str]]:
    """Which of several tables of one layout count, and why others do not. Raises: ValueError if that is not clear."""
    if layout == "common-voice":
        # validated.tsv holds train, dev and test and more; other and invalidated are not to be trained on.
        by_name = {PurePosixPath(table.name).stem.lower(): table for table in tables}
        if "validated" in by_name:
            return [by_name["validated"]], [f"{table.name}: validated.tsv holds all that is checked"
                                            for table in tables if table is not by_name["validated"]]
        tables = [table for table in tables if PurePosixPath(table.name).stem.lower() not in
                  ("other", "invalidated", "reported")] or tables
    if len(tables) == 1 or is_split_of(tables):
        return tables, []
    whole = [table for table in tables if not split_name(PurePosixPath(table.name).stem)]
    parts = [table for table in tables if table not in whole]
    if len(whole) == 1 and len(whole[0].rows) >= sum(len(table.rows) for table in parts):
        return whole, [f"{table.name}: {whole[0].name} is the larger" for table in parts]
    if len({table.name.rpartition("/")[0] for table in tables}) == len(tables):  # one in each speaker's folder
        return tables, []
    raise ValueError("several tables")


def count_sidecars(listing: Sequence[str], names: SoundNames) -> Counter[str]:
    """How many sounds have which kind of text beside them: "text", "cues", or "alone"."""
    cues, texts = beside(listing, names.sounds, CUES), beside(listing, names.sounds, SIDECARS)
    return Counter("cues" if sound in cues else "text" if sound in texts else "alone" for sound in names.sounds)


def stem_of_text(name: str) -> str:
    """speaker/1.normalized.txt -> speaker/1: the name that its sound has."""
    key = name_key(name)
    suffix = next((suffix for suffix in (*sorted(SIDECARS, key=len, reverse=True), *CUES) if key.endswith(suffix)), "")
    return key.removesuffix(suffix)


def stems_of_cues(name: str) -> list[str]:
    """lecture.am.srt -> lecture.am, lecture: what its sound may be called."""
    stem = stem_of_text(name)
    return list(dict.fromkeys([stem, LANGUAGE_ENDING.sub("", stem)]))


def beside(listing: Sequence[str], sounds: Iterable[str], suffixes: Sequence[str], language: str = ""
           ) -> dict[str, str]:
    """For each sound its text file: of the same name beside it, else the only one of that name anywhere. Of several,
    that of the `language`, then the one whose kind comes first."""
    by_stem: dict[str, list[str]] = {}
    by_last: dict[str, list[str]] = {}
    longest_first = sorted(suffixes, key=len, reverse=True)
    ranked = []
    for name in listing:
        suffix = next((suffix for suffix in longest_first if name.lower().endswith(suffix)), None)
        if suffix:
            spoken = LANGUAGE_ENDING.search(stem_of_text(name)) if suffix in CUES else None
            rank = 1 if not spoken else 0 if spoken[0] == f".{language}" else 2
            ranked.append((rank, suffixes.index(suffix), name))
    for _, _, name in sorted(ranked):
        for stem in stems_of_cues(name) if name.lower().endswith(CUES) else [stem_of_text(name)]:
            by_stem.setdefault(stem, []).append(name)
            by_last.setdefault(stem.rpartition("/")[2], []).append(name)
    found = {}
    for sound in sounds:
        stem = name_key(without_suffix(sound))
        near, far = by_stem.get(stem, []), by_last.get(stem.rpartition("/")[2], [])
        if near:
            found[sound] = near[0]
        elif len({folder_of(name) for name in far}) == 1:
            found[sound] = far[0]
    return found


def understood() -> str:
    return "Understood are " + "; ".join(f"{name}: {form}" for name, form in LAYOUTS.items())


def detect(source: str, listing: Sequence[str], tables: Sequence[Table], names: SoundNames, layout: str = "",
           only_tables: bool = False, unreadable: Sequence[str] = ()) -> Found:
    """What a source is, from its files' names and its tables. `layout` is the only one to look for, if given;
    `only_tables`: texts beside the sounds do not count; `unreadable`: what is wrong with files that may be tables.

    Raises: ToolError that lists what was found and what is understood, when that is nothing or not clear.
    """
    if not names.sounds:
        packed = [name for name in listing if name.lower().endswith(ARCHIVES)]
        remedy = f"Unpack {packed[0]}" if packed else \
            "Give the folder that holds the sounds, or name it as --audio-dir"
        raise ToolError(f"{source}: holds no sound file ({len(listing)} other files). {remedy}")
    for table in tables:
        if not table.header and table.rows:
            find_columns(table, names)
    good = []
    for table in tables:
        count, looked = share_found(table, names)
        # A prose text has a first word in every line, too.
        good += [table] if layout_of(table) and count > (looked / 2 if table.delimiter == " " else 0) else []
    if layout and layout != "folder":
        good = [table for table in good if layout_of(table) == layout]
    by_layout: dict[str, list[Table]] = {}
    for table in good:
        by_layout.setdefault(layout_of(table), []).append(table)
    seen = [describe(table, names) for table in tables if table.rows and table.delimiter != " "][:5]
    counts = count_sidecars(listing, names)
    beside_text = f"{counts['text']} of {len(names.sounds)} sounds with a text beside them, {counts['cues']} with cues"
    remedy = "Say which with --layout NAME, or give the table itself as SOURCE"
    if layout == "folder" or not by_layout:
        if not layout and seen and (only_tables or not counts["text"] + counts["cues"]):
            raise ToolError(f"{source}: not one of the first names of its tables is a sound of it. Found: "
                            f"{'; '.join(seen)}; {len(names.sounds)} sounds such as {min(names.sounds)!r}. Name the "
                            f"folder of the sounds as --audio-dir, or take --layout folder. {understood()}")
        if not layout and unreadable and not counts["text"] + counts["cues"]:
            raise ToolError(f"{source}: its texts may be in what cannot be read: {'; '.join(unreadable[:3])}; or take "
                            "--layout folder for sounds without texts")
        if layout and layout != "folder":
            raise ToolError(f"{source}: no {layout} in it. Found: {'; '.join([*seen, beside_text])}. {understood()}")
        return Found("folder", f"{beside_text}, {counts['alone']} alone")
    many_beside = not layout and not only_tables and counts["text"] + counts["cues"] > len(names.sounds) / 2
    if len(by_layout) > 1 or many_beside:
        raise ToolError(f"{source}: may be several things. Found: {'; '.join([*seen, beside_text])}. {remedy}. "
                        f"{understood()}")
    kind, found = next(iter(by_layout.items()))
    try:
        chosen, left_out = choose_tables(found, kind)
    except ValueError as error:
        raise ToolError(f"{source}: has {error} of one kind. Found: {'; '.join(seen)}. Give the one that counts as "
                        "SOURCE") from error
    more = f"; and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return Found(kind, "; ".join(describe(table, names) for table in chosen[:3]) + more, chosen, left_out)
