"""Which version of the text rules a text is read by, and as whose front end it is then written for the tokenizer, for
every program; and what of a text no voice says.

  made anew   a tokenizer's texts, data: TEXT_RULES; but with a tokenizer that was trained under others, those
  in use      of a data set or checkpoint: the version that it records; none was recorded under version 1

A front end is recorded in the same places. Without one the tokenizer gets a text as it is read. A tokenizer's record is
the file of its name with the ending .yaml beside it: sha256 (of the model), text_rules, languages, and for one that
extends a released tokenizer front_end and extends (the sha256 of that one). No torch in here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools._common import ToolError, sha256_of
from tools.amharic_text import KNOWN_RULES, TEXT_RULES, Reading, shown
from tools.made_with import EMBEDDED, read_yaml

INDEXTTS2 = "indextts2"
FRONT_ENDS = ("", INDEXTTS2)
# What IndexTTS2's front end hands to its tokenizer: no semicolon, colon, bracket or quotation mark of any kind.
INDEXTTS2_MARKS = {ord(mark): plain for marks, plain in (
    ("።。", "."), ("፣፤፥:;：；，、", ","), ("！", "!"), ("？", "?"), ("—~～·", "-"), ("“”\"‘’()（）[]【】《》「」", "'"))
    for mark in marks}
CHINESE = re.compile("([\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff65-\uffdc"
                     "\U00020000-\U0002ffff])")  # and Japanese and Korean
REMEDY = "Mend it, or train the tokenizer again"
KINDS = {
    "lost": "lose signs that cannot be said",
    "passed over": "have decoration, which is passed over",
    "other script": "have words of other scripts, which stay as they are",
    "Latin": "have Latin words, which stay as they are",
}
LETTER_LOST = "\ufffd"  # stands for what a conversion could not read: no decoration
NAMED = 10  # signs or words in a line of a report


def language_of(row: Mapping[str, Any]) -> str:
    """Of the text of a recording or a pair; Amharic where the row names none."""
    return str(row.get("target_language") or row.get("language") or "am")


def known_rules(rules: object, source: str) -> int:
    """Raises: ToolError for a version that is none of this program's."""
    if type(rules) is not int or rules not in KNOWN_RULES:
        raise ToolError(f"{source}: made under text rules {rules}, and this program knows "
                        f"{' and '.join(map(str, KNOWN_RULES))}. Take a newer version of this program")
    return rules


def rules_of(record: Mapping[str, Any], source: str) -> int:
    """Those of a data set or checkpoint, whose `record` made_with gives. Raises: ToolError naming the source."""
    return known_rules(record.get("text_rules", 1), source)


def front_end_of(record: Mapping[str, Any], source: str) -> str:
    """That of a tokenizer's record, or of a data set or checkpoint, whose `record` made_with gives; "" for none.

    Raises: ToolError naming the source.
    """
    front_end = record.get("front_end") or ""
    if front_end not in FRONT_ENDS:
        raise ToolError(f"{source}: made for the front end {front_end}, and this program knows {INDEXTTS2}. Take a "
                        "newer version of this program")
    return str(front_end)


def written_for(front_end: str, text: str) -> str:
    """A text that was read aloud, as the tokenizer gets it.

    For IndexTTS2: pauses as . and , (it knows no Ethiopic mark, and no ; or :), capital letters, and Chinese characters
    one by one. In any language: a comma stays one.
    """
    if not front_end:
        return text
    return " ".join(CHINESE.sub(r" \1 ", text.translate(INDEXTTS2_MARKS).upper()).split())


def record_path(tokenizer: Path) -> Path:
    return tokenizer.with_suffix(".yaml")


def tokenizer_record(digest: str, rules: int, languages: Iterable[str], extends: str = "") -> str:
    """The record's text; `digest` is the model's SHA-256, `extends` that of the released tokenizer which it extends."""
    front_end = {"front_end": INDEXTTS2, "extends": extends} if extends else {}
    return yaml.safe_dump({"sha256": digest, "text_rules": rules, "languages": sorted(set(languages)), **front_end},
                          sort_keys=False)


def read_record(tokenizer: Path) -> dict[str, Any]:
    """{} where there is none, or another YAML file of this name. Raises: ToolError for one that cannot be read."""
    content = read_yaml(record_path(tokenizer), REMEDY)
    return content if {"sha256", "text_rules"} <= content.keys() else {}


def own_record(tokenizer: Path) -> dict[str, Any]:
    """As read_record. Raises: ToolError for a record that is another tokenizer's."""
    record, path = read_record(tokenizer), record_path(tokenizer)
    if record and record["sha256"] != sha256_of(tokenizer):
        raise ToolError(f"{path}: is the record of another tokenizer than {tokenizer}. Put back the one that belongs "
                        f"to it, or remove it to read texts by rules {TEXT_RULES}")
    return record


def rules_for_new(tokenizer: Path) -> int:
    """Those for data made anew with a tokenizer. Raises: ToolError for a record that is another tokenizer's."""
    return known_rules(own_record(tokenizer).get("text_rules", TEXT_RULES), str(record_path(tokenizer)))


def front_end_for_new(tokenizer: Path, features: str = EMBEDDED) -> str:
    """That for data made anew with a tokenizer: its record's, or, of a released tokenizer as it is, which has none,
    that of the `features`. Raises: ToolError for a record that is another tokenizer's, or an unknown front end."""
    record = own_record(tokenizer) or {"front_end": features if features in FRONT_ENDS else ""}
    return front_end_of(record, str(record_path(tokenizer)))


def findings(reading: Reading) -> dict[str, tuple[str, ...]]:
    """Signs and words of a text by KINDS.

    Lost are signs that a reader may well have said. Decoration (emoji, stars, hearts, ticks: symbols that are neither
    of mathematics nor of money) is passed over by readers, as quotation marks and brackets are, which are no finding at
    all. Words of other scripts are still in the text: whether they can be learned the tokenizer says.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for piece in reading.unsaid:
        category = unicodedata.category(piece[0])
        decoration = category in ("So", "Sk") and piece != LETTER_LOST
        found["other script" if category[0] in "LN" else "passed over" if decoration else "lost"].append(piece)
    return {kind: tuple(pieces) for kind, pieces in found.items()} | {"Latin": reading.latin}


def lost_signs(reading: Reading) -> str:
    """Those for which a row is not trained on, as a message shows them; "" for a text that says all."""
    return " ".join(map(shown, dict.fromkeys(findings(reading)["lost"])))


@dataclass
class Tally:
    """In how many texts signs and words of each of KINDS are; `rules` read them."""

    rules: int = TEXT_RULES
    texts: Counter[str] = field(default_factory=Counter)
    pieces: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})

    def add(self, reading: Reading) -> None:
        for kind, pieces in findings(reading).items():
            self.texts[kind] += bool(pieces)
            self.pieces[kind].update(dict.fromkeys(pieces, 1))  # in the order of the text

    def lines(self) -> list[str]:
        """A line for each kind that occurs, with the most frequent signs or words."""
        untold = [f"text rules {self.rules} do not tell which signs they lose: rows that have any are trained on"]
        return (untold if self.rules == 1 else []) + [f"{self.texts[kind]} texts {what}: " + ", ".join(
            f"{shown(piece)} ({count})" for piece, count in self.pieces[kind].most_common(NAMED))
            + (" ..." if len(self.pieces[kind]) > NAMED else "") for kind, what in KINDS.items() if self.texts[kind]]
