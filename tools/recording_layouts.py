"""What a folder of recordings is: its listing and the tables in it become entries. Pure but for read_table.

An entry is one utterance as the source tells it: which sound (and which part of it), which text, whose voice.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tools._common import ToolError
from tools.recordings import SOUND_SUFFIXES
from tools.sound_decoder import FFMPEG_SUFFIXES, OTHER_SUFFIXES
from tools.subtitles import seconds_of_time

SOUNDS = SOUND_SUFFIXES | OTHER_SUFFIXES | FFMPEG_SUFFIXES
TABLES = {".csv", ".tsv", ".txt", ".list", ".lst", ".psv", ".json", ".jsonl", ".ndjson", ".manifest", ".xlsx", ".xlsm"}
SHEETS = {".xlsx", ".xlsm"}
SIDECARS = (".lab", ".txt", ".normalized.txt", ".original.txt", ".trn")  # the first of these that is there counts
CUES = (".srt", ".vtt")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".7z", ".rar", ".xz", ".parquet", ".arrow")
SOUND_FOLDERS = {"wavs", "wav", "clips", "audio", "audios", "sounds", "recordings", "flac", "mp3", "segments",
                 "audio_files"}
LANGUAGE_ENDING = re.compile(r"\.[a-z]{2,3}(?:-[a-z]{2,4})?$")
DELIMITERS = "|\t;,"
SAMPLE = 200  # rows of a table that its kind is told from
LARGEST_TABLE = 1 << 31  # bytes
HEAD = 1 << 18  # bytes of a table that its kind is told from
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
COLUMNS = {  # by meaning: names in the order of preference, as `column_name` writes them
    "audio": ["audio", "audio_file", "audio_filepath", "audio_path", "audio_filename", "wav_file", "wav_path", "wav",
              "wav_filename", "file_path", "filepath", "path", "file_name", "filename", "file", "clip", "sound",
              "sound_file", "recording", "recording_file", "mp3", "ድምፅ", "ድምጽ", "የድምፅ_ፋይል", "ፋይል"],
    "text": ["normalized_text", "normalised_text", "text_normalized", "normalized_transcription",
             "normalized_transcript", "text", "sentence", "raw_transcription", "transcript", "transcription",
             "transcripts", "raw_text", "utterance", "target_text", "words", "ጽሑፍ", "ጽሁፍ", "ዓረፍተ_ነገር"],
    "speaker": ["speaker", "speaker_id", "speaker_name", "client_id", "spk", "spk_id", "spkid", "reader", "voice",
                "narrator", "ተናጋሪ"],
    "language": ["language", "lang", "locale", "language_id", "ቋንቋ"],
    "split": ["split", "subset", "partition"],
    "id": ["id", "utt_id", "uttid", "utterance_id", "uid", "segment_id", "clip_id", "ተ_ቁ"],
    "start": ["start", "offset", "begin", "start_time", "start_sec", "start_seconds", "start_s", "onset"],
    "end": ["end", "stop", "end_time", "end_sec", "end_seconds", "end_s"],
    "duration": ["duration", "dur", "length_seconds", "duration_seconds", "duration_s", "duration_sec"],
    "start_ms": ["start_ms", "offset_ms", "begin_ms"],
    "end_ms": ["end_ms", "stop_ms"],
    "duration_ms": ["duration_ms"],
}
MEANINGS = {name: meaning for meaning, names in COLUMNS.items() for name in names}
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


@dataclass
class Table:
    """Rows of one file, all cells texts."""

    name: str
    rows: list[tuple[int, list[str]]]
    """(line or row number, cells)."""
    delimiter: str = ""
    """"" for JSON and sheets."""
    header: list[str] = field(default_factory=list)
    """Meanings of the columns ("" for unknown ones), if the first row names them."""
    named: list[str] = field(default_factory=list)
    """The header as it stands there."""
    guess: list[str] = field(default_factory=list)
    """Meanings of the columns of a table without header, once its sounds are known."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(place, what is wrong) of rows that cannot be read."""

    @property
    def columns(self) -> list[str]:
        """Meanings of the columns; [] for a table of no known kind."""
        return self.header or self.guess or (headerless_columns(self.rows[:SAMPLE]) if self.delimiter else [])


# ---------------------------------------------------------------------------------------------------------------------
# Names of sounds


def name_key(name: str) -> str:
    """Equal for names that differ in slashes, case and Unicode form only."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def without_suffix(name: str) -> str:
    """The name without a sound's ending; other dots stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SOUNDS else name


class SoundNames:
    """Finds the sound that a row names among those of the source."""

    def __init__(self, sounds: Sequence[str]):
        """`sounds` are paths relative to the source, with slashes."""
        self.sounds = set(sounds)
        self.by_name: dict[str, list[str]] = {}
        self.by_stem: dict[str, list[str]] = {}
        for sound in sounds:
            last = name_key(sound).rpartition("/")[2]
            self.by_name.setdefault(last, []).append(sound)
            self.by_stem.setdefault(without_suffix(last), []).append(sound)
        self.mended: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def find(self, name: str, folder: str = "") -> str:
        """The path of the sound that a table in `folder` calls `name`; what it took to find it is counted.

        Raises: LookupError saying why there is none.
        """
        exact = str(PurePosixPath(folder, name)) if folder else name
        if exact in self.sounds:
            return exact
        key = name_key(name.strip())
        last = key.rpartition("/")[2]
        if not last:
            raise LookupError("names no sound")
        found = self.by_name.get(last) or self.by_stem.get(last) or self.by_stem.get(without_suffix(last))
        if not found:
            raise LookupError(f"{name!r} is not there")
        best = self.nearest(found, key, folder)
        if len(best) > 1:
            raise LookupError(f"{name!r} may be {best[0]!r} or {best[1]!r}")
        self.note(name, best[0])
        return best[0]

    def has(self, name: str, folder: str = "") -> bool:
        """Whether `find` would find it."""
        mended, examples = self.mended.copy(), dict(self.examples)
        try:
            return bool(self.find(name, folder))
        except LookupError:
            return False
        finally:
            self.mended, self.examples = mended, examples

    @staticmethod
    def nearest(found: list[str], key: str, folder: str) -> list[str]:
        """Those of `found` that share most folders with the name, from the right; of these, those in the table's
        folder."""
        if len(found) == 1:
            return found
        wanted = [part for part in key.split("/")[:-1] if part not in (".", "")]

        def shared(sound: str) -> int:
            parts = name_key(sound).split("/")[:-1]
            count = 0
            while count < min(len(parts), len(wanted)) and parts[-1 - count] == wanted[-1 - count]:
                count += 1
            return count

        most = max(map(shared, found))
        best = [sound for sound in found if shared(sound) == most]
        endings = [sound for sound in best if name_key(sound).rpartition(".")[2] == key.rpartition(".")[2]]
        near = [sound for sound in endings or best
                if not folder or sound.startswith(f"{folder}/")
                and set(sound[len(folder) + 1:].lower().split("/")[:-1]) <= SOUND_FOLDERS]
        return near if len(near) == 1 else endings or best

    def note(self, name: str, sound: str) -> None:
        """Counts how a name differs from that of its sound."""
        parts, last = PurePosixPath(sound), name.strip().replace("\\", "/").rpartition("/")[2]
        written, there = without_suffix(last), without_suffix(parts.name)
        endings = last[len(written):], parts.name[len(there):]
        ways = ["Windows slashes"] if "\\" in name else []
        if not endings[0]:
            ways.append("no ending")
        elif endings[0].lower() != endings[1].lower():
            ways.append("another ending")
        if written != there and unicodedata.normalize("NFC", written) == unicodedata.normalize("NFC", there):
            ways.append("another Unicode form (NFC, NFD)")
        elif written != there or (endings[0] != endings[1] and endings[0].lower() == endings[1].lower()):
            ways.append("other case")
        folder = name_key(name).rpartition("/")[0].removeprefix("./").strip("/")
        if folder and not f"/{name_key(sound)}".endswith(f"/{folder}/{name_key(parts.name)}"):
            ways.append("another folder")
        for way in ways:
            self.mended[way] += 1
            self.examples.setdefault(way, f"{name!r} is {sound!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def decode(content: bytes, place: str) -> str:
    """Text of UTF-8 or UTF-16, with or without a byte order mark. Raises: ToolError naming the file."""
    encodings = ["utf-16"] if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig"]
    if encodings == ["utf-8-sig"] and content[:400].count(0) > len(content[:400]) // 8:  # no mark, but every other is 0
        encodings = ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
    try:
        return content.decode(encodings[0])
    except UnicodeDecodeError as error:
        raise ToolError(f"{place}: not {encodings[0].removesuffix('-sig').upper()} text at byte {error.start}. Save it "
                        "as UTF-8") from error


def unquoted(cell: str) -> str:
    """A cell as a spreadsheet quotes it, without its quotes; others as they are."""
    cell = cell.strip()
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def split_lines(content: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not empty. Only , and ; have cells over several lines; a space parts
    the first word from the rest."""
    if delimiter in "|\t ":
        lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        most = 1 if delimiter == " " else -1  # the name, and the rest
        return [(number, [unquoted(cell) for cell in line.strip().split(None if most > 0 else delimiter, most)])
                for number, line in enumerate(lines, 1) if line.strip()]
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True)
    return [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader
            if any(cell.strip() for cell in cells)]


def column_name(cell: str) -> str:
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", cell).strip().casefold()).strip("_")


def header_of(cells: Sequence[str]) -> list[str]:
    """The meaning of each column; [] where the row is no header. Of several columns for one meaning the best counts."""
    names = [column_name(cell) for cell in cells]
    header = [MEANINGS.get(name, "") for name in names]
    for meaning, order in COLUMNS.items():
        places = sorted((order.index(names[i]), i) for i, found in enumerate(header) if found == meaning)
        for _, i in places[1:]:
            header[i] = ""
    known = set(header) - {""}
    return header if len(known) >= 2 and known & {"audio", "id"} or known == {"audio"} and len(cells) == 1 else []


def best_delimiter(content: str) -> str:
    """The one that cuts the first lines into equally many cells, at least two; "" for none. A | or a tab is no part of
    a text, so they come first."""
    lines = [line for line in content[: 1 << 16].splitlines()[:SAMPLE] if line.strip()]
    if len(content) > 1 << 16:
        lines = lines[:-1]
    scores = {}
    for delimiter in DELIMITERS:
        rows = [len(cells) for _, cells in split_lines("\n".join(lines), delimiter)]
        usual, times = Counter(rows).most_common(1)[0] if rows else (1, 0)
        if usual > 1 and times >= 0.6 * len(rows):
            scores[delimiter] = times / len(rows)
    return max(scores, key=lambda delimiter: scores[delimiter] + (0.5 if delimiter in "|\t" else 0)) if scores else ""


def parse_table(name: str, content: str) -> Table | None:
    """A table of text; None for text that is none."""
    if content.lstrip()[:1] in ("{", "["):
        return parse_json(name, content)
    delimiter = best_delimiter(content) or " "
    try:
        rows = split_lines(content, delimiter)
    except csv.Error as error:
        raise ToolError(f"{name}: cannot be read as a table ({error}). Save it as UTF-8 CSV again") from error
    return with_header(Table(name, rows, delimiter))


def with_header(table: Table) -> Table:
    header = header_of(table.rows[0][1]) if table.rows else []
    if header:
        table.header, table.named = header, table.rows[0][1]
        table.rows = table.rows[1:]
    return table


def cell_of(value: Any) -> str:
    """A JSON or sheet value as a cell: numbers without .0, nothing as ""."""
    if value is None or isinstance(value, bool | dict | list):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).strip()


def parse_json(name: str, content: str) -> Table | None:
    """JSON lines or one array of objects; a row that cannot be read is a fault of the table."""
    table = Table(name, [])
    objects: list[tuple[int, Any]] = []
    if content.lstrip()[:1] == "[":
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return None
        objects = list(enumerate(found, 1)) if isinstance(found, list) else []
    else:
        for number, line in enumerate(content.split("\n"), 1):
            try:
                objects += [(number, json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                table.faults.append((f"{name}, line {number}", f"not JSON ({getattr(error, 'msg', error)})"))
    rows = [(number, row) for number, row in objects if isinstance(row, dict)]
    if not rows or len(table.faults) > len(rows):
        return None
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    table.named, table.header = keys, header_of(keys)
    if not table.header:
        return None
    for number, row in rows:
        cells = [cell_of(row["audio"].get("path") if key == "audio" and isinstance(row.get(key), dict)
                         else row.get(key)) for key in keys]
        table.rows.append((number, cells))
    return table


def read_sheet(path: Path, name: str, most_rows: int | None) -> Table | None:
    """The first sheet of an XLSX file that has a header we know. Raises: ToolError."""
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            for sheet in book.worksheets:
                cells = enumerate(sheet.iter_rows(values_only=True, max_row=most_rows), 1)
                rows = [(number, [cell_of(value) for value in row]) for number, row in cells]
                rows = [(number, row) for number, row in rows if any(row)]
                # The header may stand below a title.
                start = next((i for i, (_, row) in enumerate(rows[:10]) if header_of(row)), None)
                if start is not None:
                    return with_header(Table(name, rows[start:]))
        finally:
            book.close()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, SyntaxError,
            zipfile.BadZipFile, InvalidFileException) as error:
        raise ToolError(f"{name}: cannot be read as a spreadsheet ({error}). Save it as XLSX or CSV again, without a "
                        "password") from error
    return None


def read_table(path: Path, name: str, head: bool = False) -> Table | None:
    """The table in a file; None where there is none. `head`: its first rows only.

    Raises: ToolError for one that cannot be read.
    """
    if path.suffix.lower() in SHEETS:
        return read_sheet(path, name, SAMPLE if head else None)
    with path.open("rb") as file:
        content = file.read(HEAD if head else LARGEST_TABLE)
        if file.read(1) and not head:
            raise ToolError(f"{name}: larger than 2 GiB. Divide it")
    if head and len(content) == HEAD and content.lstrip()[:1] != b"[":
        content = content[: content.rindex(b"\n")] if b"\n" in content else b""
        content = content[: len(content) // 2 * 2] if b"\0" in content[:400] else content  # UTF-16
    elif head and len(content) == HEAD:
        return read_table(path, name)
    return parse_table(name, decode(content, name))


# ---------------------------------------------------------------------------------------------------------------------
# Entries of a table


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def is_label(values: Sequence[str]) -> bool:
    """Whether a column holds names of speakers, not texts: short, without spaces, few different ones."""
    filled = [value for value in values if value]
    return len(filled) >= 3 and not any(" " in value or len(value) > 40 for value in filled) \
        and len(set(filled)) <= max(1, len(filled) // 2)


def headerless_columns(rows: Sequence[tuple[int, list[str]]]) -> list[str]:
    """Meanings of the columns of a table without header, from its first rows; [] for an unknown one."""
    widths = Counter(len(cells) for _, cells in rows)
    width = widths.most_common(1)[0][0] if rows else 0
    if width == 3 and widths.get(4, 0) >= 0.2 * len(rows):
        width = 4
    column = [[cells[i] for _, cells in rows if len(cells) == width] for i in range(width)]
    if width == 2:
        return ["audio", "text"]
    if width == 3:
        if is_label(column[1]):
            return ["audio", "speaker", "text"]
        return ["audio", "text", "speaker" if is_label(column[2]) else "text2"]
    if width == 4 and all(re.fullmatch(r"[A-Za-z]{2,4}(?:[-_][A-Za-z]{2,4})?", cell) for cell in column[2]):
        return ["audio", "speaker", "language", "text"]
    return []


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
