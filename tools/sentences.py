"""Long texts in parts that a model takes at once, cut where a reader pauses. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

# A cut is made behind a mark and before a space: the end of a sentence, else a pause, else between any two words.
CUTS = tuple(re.compile(pattern) for pattern in ("(?<=[።!?.…。！？፨]) +", "(?<=[፤፥፣,;:；，、]) +", " +"))


def cut_at_pauses(text: str, count: Callable[[str], int], longest: int) -> list[str]:
    """A text in as few parts of at most `longest` tokens as its sentences allow, about equally long; `count` counts.

    A sentence that is too long is cut at its commas, or else between words. Together the parts are the text, with
    single spaces. A word that is too long is a part of its own, for the caller to refuse.
    """
    units = list(pieces_that_fit(" ".join(text.split()), count, longest, 0))
    parts = pack(units, count, longest)
    shortest, limit = 1, longest  # the least limit that gives no more parts: no part is a leftover of two words
    while shortest < limit:
        middle = (shortest + limit) // 2
        shortest, limit = (shortest, middle) if len(pack(units, count, middle)) <= len(parts) else (middle + 1, limit)
    return pack(units, count, limit)


def pieces_that_fit(text: str, count: Callable[[str], int], longest: int, level: int) -> Iterator[str]:
    """The sentences of a text; of one that is too long its clauses, of such a clause its words."""
    for piece in filter(None, CUTS[level].split(text)):
        if count(piece) <= longest or level == len(CUTS) - 1:
            yield piece
        else:
            yield from pieces_that_fit(piece, count, longest, level + 1)


def pack(units: Sequence[str], count: Callable[[str], int], longest: int) -> list[str]:
    """Units joined to parts in their order, as many in each as fit."""
    parts: list[str] = []
    for unit in units:
        joined = f"{parts[-1]} {unit}" if parts else unit
        if parts and count(joined) <= longest:
            parts[-1] = joined
        else:
            parts.append(unit)
    return parts
