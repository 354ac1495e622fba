"""Own transcripts become text to train a tokenizer on, with a report of what is in them.

Reads one or more recordings.jsonl (or folders that hold one) and writes every different transcript once, as it is
spoken (`python -m tools.amharic_text normalise`): a line each, or rows of id, text and language where --output ends in
.jsonl. Rows of split val and rows without text are left out.

The report shows how many texts came from where, how long they are, how often each character occurs, and which are
unknown: to the Amharic alphabet and its punctuation, or to a tokenizer that you name, with the first row of each. It
counts the texts with Latin words and those that lose signs that cannot be said: tools.preprocess leaves these out.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools._common import (
    Progress,
    ToolError,
    info,
    make_parser,
    read_jsonl,
    run_program,
    text_fault,
    warn,
    write_jsonl,
    write_text,
    writing_to,
)
from tools.amharic_text import PUNCTUATION, TEXT_RULES, Reading, read_aloud
from tools.text_rules import Tally, language_of, lost_signs, rules_for_new
from tools.train_tokenizer import amharic_letters, load_tokenizer

FIRST_COMMAND = "python -m tools.collect_corpus build/recordings/recordings.jsonl --output build/corpus.txt"
REMEDY = "`python -m tools.import_recordings` writes such a file"
BARS = 12  # of the histogram of lengths
SHOWN = 40  # characters a line; unknown ones that are listed
RARE = 3  # a character that occurs less often is hardly learned


@dataclass
class Corpus:
    """Different texts in the order of their first rows, and what became of the other rows."""

    texts: dict[str, str] = field(default_factory=dict)
    """Text -> the row that has it first, for messages."""
    rows: int = 0
    empty: int = 0
    validation: int = 0
    silent: list[str] = field(default_factory=list)
    """Rows whose text has nothing that is spoken."""
    languages: dict[str, str] = field(default_factory=dict)
    """Text -> its language."""
    losing: list[str] = field(default_factory=list)
    """Rows whose text loses signs."""
    tally: Tally = field(default_factory=Tally)

    @property
    def repeated(self) -> int:
        return self.rows - self.empty - self.validation - len(self.silent) - len(self.texts)


def spoken(row: dict[str, Any], rules: int) -> Reading:
    """The transcript as the tokenizer gets it; only Amharic is turned into words."""
    return read_aloud(row["text"], language_of(row), rules)


def collect(sources: Sequence[tuple[Path, Sequence[dict[str, Any]]]], rules: int) -> Corpus:
    """All rows of all files, each different text once, read by these text rules."""
    corpus = Corpus(tally=Tally(rules))
    progress = Progress("reading texts", sum(len(rows) for _, rows in sources))
    for path, rows in sources:
        for number, row in enumerate(rows, 1):
            corpus.rows += 1
            progress.update(corpus.rows)
            if row.get("split", "train") != "train":
                corpus.validation += 1
            elif not row["text"].strip():
                corpus.empty += 1
            else:
                take(corpus, spoken(row, rules), language_of(row), f"{path}, row {number}")
    return corpus


def take(corpus: Corpus, reading: Reading, language: str, place: str) -> None:
    """One more text."""
    corpus.tally.add(reading)
    if lost_signs(reading):
        corpus.losing.append(place)
    if reading.text:
        corpus.texts.setdefault(reading.text, place)
        corpus.languages.setdefault(reading.text, language)
    else:
        corpus.silent.append(place)


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """How often each character but the space occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    del counts[" "]
    return counts


def unknown_characters(corpus: Corpus, counts: Counter[str], known: set[str]) -> list[tuple[str, int, str]]:
    """(character, how often, the first row that has it) of those that are not known, most frequent first."""
    unknown = {character for character in counts if character not in known}
    first: dict[str, str] = {}
    for text, place in corpus.texts.items():
        for character in unknown.intersection(text):
            first.setdefault(character, place)
    return [(character, count, first[character]) for character, count in counts.most_common() if character in unknown]


def known_to(tokenizer: Path, characters: Iterable[str]) -> set[str]:
    """The characters that a tokenizer has pieces for. Raises: ToolError for a tokenizer that cannot be read."""
    model = load_tokenizer(tokenizer)
    return {character for character in characters if model.unk_id() not in model.encode(character)}


def histogram(lengths: Sequence[int]) -> list[str]:
    """Lines "20 to 39 |#### 123" from the shortest to the longest, each of a round number of characters."""
    width = next(width for power in range(9) for width in (10**power, 2 * 10**power, 5 * 10**power)
                 if (max(lengths) - min(lengths)) // width < BARS)
    counts = Counter(length // width for length in lengths)
    digits, most = len(str(max(lengths))), max(counts.values())
    bars = []
    for i in range(min(counts), max(counts) + 1):
        until = f" to {(i + 1) * width - 1:>{digits}}" if width > 1 else ""
        bars.append(f"{i * width:>{digits}}{until} |{'#' * round(40 * counts[i] / most)} {counts[i]}")
    return bars


def say_report(corpus: Corpus, tokenizer: Path | None) -> None:
    lengths = sorted(map(len, corpus.texts))
    counts = count_characters(corpus.texts)
    left_out = {"without text": corpus.empty, "of validation": corpus.validation, "repeated": corpus.repeated,
                "with nothing that is spoken": len(corpus.silent)}
    said = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    info(f"{len(corpus.texts)} different texts of {corpus.rows} rows" + (f"; left out: {said}" if said else ""))
    if corpus.silent:
        warn(f"nothing is spoken in {len(corpus.silent)} texts, such as that of {corpus.silent[0]}")
    for line in corpus.tally.lines():
        warn(line)
    if corpus.losing:
        warn(f"tools.preprocess leaves out the rows that lose signs, such as {', '.join(corpus.losing[:3])}: write the "
             "words that are said for them, or remove them")
    words = sum(len(text.split()) for text in corpus.texts)
    info(f"{words} words, {counts.total()} characters without spaces, {len(counts)} different ones")
    info(f"characters in a text: {lengths[0]} to {lengths[-1]}, half have up to {statistics.median_low(lengths)}, 95 "
         f"of 100 up to {lengths[int(0.95 * len(lengths))]}")
    for line in histogram(lengths):
        info(f"  {line}")
    info("how often each character occurs:")
    ordered = counts.most_common()
    for start in range(0, len(ordered), SHOWN // 2):
        info("  " + " ".join(f"{character} {count}" for character, count in ordered[start: start + SHOWN // 2]))
    rare = [character for character, count in ordered if count < RARE]
    if rare:
        info(f"{len(rare)} characters occur less than {RARE} times: {' '.join(rare[:SHOWN])}")
    known = known_to(tokenizer, counts) if tokenizer else set(amharic_letters() + PUNCTUATION)
    whom = str(tokenizer) if tokenizer else "the Amharic alphabet and its punctuation"
    unknown = unknown_characters(corpus, counts, known)
    if not unknown:
        info(f"every character is known to {whom}")
        return
    warn(f"{len(unknown)} characters are unknown to {whom}:")
    for character, count, place in unknown[:SHOWN]:
        warn(f"  {character} (U+{ord(character):04X}) {count} times, first in {place}")


def read_sources(paths: Sequence[Path]) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Raises: ToolError naming file and row."""
    found = []
    for path in paths:
        file = path / "recordings.jsonl" if path.is_dir() else path
        found.append((file, read_jsonl(file, ["text"], REMEDY, text_fault)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("recordings", type=Path, nargs="+", metavar="RECORDINGS",
                        help="recordings.jsonl, or the folder that holds it")
    parser.add_argument("--output", type=Path, required=True, help="the text to write, such as corpus.txt")
    parser.add_argument("--tokenizer", type=Path, help="whose unknown characters to show, and by whose text "
                                                              "rules to read (none)")
    args: argparse.Namespace = parser.parse_args(argv)
    sources = read_sources(args.recordings)
    if args.output.resolve() in [file.resolve() for file, _ in sources]:
        raise ToolError(f"--output {args.output}: is a file of recordings. Give another name, such as corpus.txt")
    corpus = collect(sources, rules_for_new(args.tokenizer) if args.tokenizer else TEXT_RULES)
    if not corpus.texts:
        raise ToolError(f"{args.recordings[0]}: holds no text to learn from: of {corpus.rows} rows {corpus.empty} have "
                        f"none, {corpus.validation} are of validation. Type the texts in, or give --transcriber to "
                        "tools.import_recordings")
    say_report(corpus, args.tokenizer)
    with writing_to(args.output.parent):
        if args.output.suffix == ".jsonl":
            write_jsonl(args.output, ({"id": str(number), "text": text, "language": language}
                                      for number, (text, language) in enumerate(corpus.languages.items(), 1)))
        else:
            write_text(args.output, "".join(f"{text}\n" for text in corpus.texts))
    languages = sorted(set(corpus.languages.values()))
    if args.output.suffix != ".jsonl" and len(languages) > 1:
        warn(f"{args.output} does not say which texts are {' and which '.join(languages)}, and tools.train_tokenizer "
             "will read all as one language: better give --output an ending .jsonl")
    flag = f" --language {languages[0]}" if args.output.suffix != ".jsonl" and languages != ["am"] else ""
    info(f"-> {args.output}; next: tools.train_tokenizer --texts {args.output}{flag} --output "
         f"{args.output.with_name('tokenizer.model')}")


if __name__ == "__main__":
    run_program(main)
