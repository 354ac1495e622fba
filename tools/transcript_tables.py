"""Tables of transcripts: CSV and its kin, JSON lines, spreadsheets; with or without a header. Pure but for read_table.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools._common import ToolError

TABLES = {".csv", ".tsv", ".txt", ".list", ".lst", ".psv", ".json", ".jsonl", ".ndjson", ".manifest", ".xlsx", ".xlsm"}
SHEETS = {".xlsx", ".xlsm"}
DELIMITERS = "|\t;,"
SAMPLE = 200  # rows of a table that its kind is told from
LARGEST_TABLE = 1 << 31  # bytes
HEAD = 1 << 18  # bytes of a table that its kind is told from
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
