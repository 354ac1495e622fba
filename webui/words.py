"""What programs say, in the words of the page: fields where they name flags, in its reader's language."""

from __future__ import annotations

import re
from typing import Any

from webui.command_lines import PROGRAMS
from webui.texts import TEXTS, say

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
DIFFERENCE = re.compile(r"(\w+) is (\S+) in (.+), but (\S+) in (.+)")  # as tools.made_with.differences() says it


def in_words(kind: str, values: dict[str, Any], language: str) -> dict[str, Any]:
    """The values of a problem for a reader: programs speak of flags, and of what is recorded by its key. Pure."""
    words = dict(values)
    for name in ("wanted", "found"):
        if (key := f"file.{words.get(name)}") in TEXTS:
            words[name] = say(key, language)
    if "reason" in words:
        words["reason"] = named_by_fields(kind, words["reason"], language)
    if "differences" in words:
        found = [DIFFERENCE.fullmatch(part) for part in words["differences"].split("; ")]
        words["differences"] = "; ".join(say("differs", language, what=say(f"made.{part[1]}", language), a=part[3],
                                             of_a=part[2], b=part[5], of_b=part[4]) for part in found if part)
    return words


def named_by_fields(kind: str, text: str, language: str) -> str:
    """A program's words with the label of the field in the place of its flag, where the form has one. Pure."""
    labels = {field.flag: key for field in PROGRAMS[kind].fields if field.flag and (
        key := f"{kind}.{field.name}") in TEXTS} if kind in PROGRAMS else {}
    return FLAG.sub(lambda found: f"“{say(labels[found[0]], language)}”" if found[0] in labels else found[0], text)
