"""Amharic text: normalisation for speech, and the demo corpus of short texts.

  normalise   reads text from standard input, writes it ready to be spoken and tokenised; --explain says what it did
  build       cuts the sources into short texts, split into training and validation

`build` promises: a validation text occurs in no training text, and neither does a held-out word, not even inside
a longer word or in another spelling of the same sounds.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tools import _amharic_text_1
from tools._amharic_reading import LATIN_CHOICES, YEAR_CHOICES, Reading, pass_through, read_amharic
from tools._amharic_text_1 import PUNCTUATION
from tools._common import ToolError, info, make_parser, run_program, write_jsonl, write_text

FIRST_COMMAND = "echo 'በ፲፱፻፶ ዓ.ም፤ሰላም' | python -m tools.amharic_text normalise"
BUILD_COMMAND = "python -m tools.amharic_text build --output-dir build"

TEXT_RULES = 2  # the version of the rules; data, tokenizers and checkpoints made under 1 go on under 1
KNOWN_RULES = (1, TEXT_RULES)
# Letters that espeak-ng's Amharic voice does not know: it reads out their code points instead.
UNSPOKEN_LETTERS = set("ሇቇቐቑቒቓቔቕቖቘቚቛቜቝኇኯዏዯጏጟፇፘፙፚ")


def read_aloud(text: str, language: str = "am", rules: int = TEXT_RULES, latin: str = "keep",
               years: str = "thousands") -> Reading:
    """A text as it is spoken, with what was changed and what could not be said.

    `language`: a tag such as am or am-ET; only Amharic is read, other languages keep their own marks and numerals.
    `rules`: 2, or 1 for what was made under version 1 (which tells of no changes). `latin`: keep, spell or refuse
    (then the words are left out and unsaid). `years`: thousands (1990 is ሺህ ዘጠኝ መቶ ዘጠና) or hundreds (CLDR's year
    rule: አሥራ ዘጠኝ መቶ ዘጠና). Thousands is the default because four digits alone do not say whether they are a year or
    an amount, readers use both for years and one for amounts, and version 1 read so. Raises ToolError for a value that
    is none of these.
    """
    for name, value, choices in (("text rules", rules, KNOWN_RULES), ("latin", latin, LATIN_CHOICES),
                                 ("years", years, YEAR_CHOICES)):
        if value not in choices:
            raise ToolError(f"{name} {value!r} are unknown here; take {' or '.join(map(str, choices))}, or a newer "
                            "version of this program")
    if not is_amharic(language):
        return pass_through(text)
    return Reading(_amharic_text_1.normalise(text)) if rules == 1 else read_amharic(text, latin, years)


def is_amharic(language: str) -> bool:
    """Of a tag such as am, am-ET or amh."""
    return re.split("[-_]", language.lower())[0] in ("am", "amh")


def normalise(text: str, rules: int = TEXT_RULES) -> str:
    """An Amharic text as it is spoken: Ethiopic letters, Latin ones, single spaces and the marks of PUNCTUATION."""
    return read_aloud(text, rules=rules).text


def normalise_for(language: str, text: str, rules: int = TEXT_RULES) -> str:
    """A text of any language, ready to be tokenised; only Amharic is turned into words."""
    return read_aloud(text, language, rules).text


# Letters of equal sound: from, to, how many orders.
ONE_SPELLING = {source + i: target + i for source, target, orders in (
    (0x1210, 0x1200, 7), (0x1280, 0x1200, 7), (0x1220, 0x1230, 8), (0x12D0, 0x12A0, 7), (0x1340, 0x1338, 7)
) for i in range(orders)}
FIRST_ORDERS = {ord("ሃ"): "ሀ", ord("ኣ"): "አ"}


def fold_homophones(text: str) -> str:
    """One spelling per sound (ሐ ኀ -> ሀ, ሠ -> ሰ, ዐ -> አ, ፀ -> ጸ): for comparing words, never for training text."""
    return text.translate(ONE_SPELLING).translate(FIRST_ORDERS)


def letters_of(text: str, language: str = "am", rules: int = TEXT_RULES) -> str:
    """What of a text can be heard: letters, one spelling per sound, no spaces, no punctuation; of other languages than
    Amharic small letters, their marks and numerals."""
    said = read_aloud(text, language, rules).text
    if is_amharic(language):
        return fold_homophones("".join(c for c in said if c not in PUNCTUATION and c != " "))
    return "".join(c for c in said.casefold() if unicodedata.category(c)[0] in "LMN")


def is_speakable(text: str) -> bool:
    """True when every character is a space or an Ethiopic letter that the demo's voice knows."""
    return bool(text) and all(c == " " or ("\u1200" <= c <= "\u135a" and c not in UNSPOKEN_LETTERS) for c in text)


def split_evenly(words: Sequence[str], most: int = 5) -> list[str]:
    """Cuts a clause into texts of at most `most` words, as equal in length as possible."""
    parts = -(-len(words) // most)
    bounds = [round(i * len(words) / parts) for i in range(parts + 1)]
    return [" ".join(words[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def cut_into_phrases(lines: Sequence[str]) -> list[str]:
    """Distinct phrases of 2 to 5 words, cut at punctuation first. A phrase that ends a sentence keeps its ።."""
    phrases = []
    for line in lines:
        for clause, mark in re.findall(rf"([^{PUNCTUATION}]+)([{PUNCTUATION}]?)", normalise(line)):
            words = clause.split()
            if len(words) < 2 or not is_speakable(clause.strip()):
                continue
            parts = split_evenly(words)
            parts[-1] += "።" if mark == "።" else ""
            phrases += parts
    return list(dict.fromkeys(phrases))


def choose_held_out(words: Sequence[str], other_texts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` words of three letters or more whose sounds occur nowhere else, not even inside another word."""
    everything = "\n".join(fold_homophones(text) for text in [*words, *other_texts])
    candidates = [w for w in words if len(w) >= 3 and everything.count(fold_homophones(w)) == 1]
    if len(candidates) < count:
        raise ToolError(f"only {len(candidates)} words can be held out, not {count}. Lower --held-out-words")
    return sorted(rng.sample(candidates, count))


def check_enough_sequences(words: Sequence[str], count: int, taken: set[str]) -> None:
    """Raises: ToolError unless twice `count` sequences can be dealt; dealing the last ones would take for ever."""
    known = set(words)
    used = sum(1 < len(text.split()) < 6 and known.issuperset(text.split()) for text in taken)
    possible = sum(math.perm(len(words), size) for size in range(2, 6)) - used
    if 2 * count > possible:
        raise ToolError(f"{len(words)} words that are not held out are too few for {count} different sequences of 2 to "
                        f"5. Add words to words_am.txt, or lower --sequences (at most {max(0, possible // 2)})")


def deal_sequences(words: Sequence[str], count: int, taken: set[str], rng: random.Random) -> list[str]:
    """`count` distinct sequences of 2 to 5 words; words are dealt like cards, so all occur about equally often."""
    check_enough_sequences(words, count, taken)
    sequences: list[str] = []
    deck: list[str] = []
    while len(sequences) < count:
        size = rng.randint(2, 5)
        if len(deck) < size:
            deck = list(words)
            rng.shuffle(deck)
        hand, deck = deck[:size], deck[size:]
        text = " ".join(hand) + ("።" if rng.random() < 1 / 3 else "")
        if text.rstrip("።") not in taken:
            taken.add(text.rstrip("።"))
            sequences.append(text)
    return sequences


def build_corpus(words: Sequence[str], phrases: Sequence[str], names: Sequence[str], sequences: int,
                 validation_texts: int, held_out_words: int, seed: int) -> tuple[list[dict[str, str]], list[str]]:
    """Rows {id, split, text} and the held-out words. Four fifths of validation is made of held-out words only.

    The rest of validation are phrases and sequences of known words in combinations that training never shows.
    """
    rng = random.Random(seed)
    new_texts = validation_texts * 4 // 5
    if validation_texts < 5 or not 2 * new_texts <= held_out_words <= 5 * new_texts:
        raise ToolError(f"{held_out_words} held-out words do not fill {new_texts} texts of 2 to 5 words. "
                        "Take about 3 times --validation-texts as --held-out-words, and at least 5 texts")
    held_out = choose_held_out(words, [*phrases, *names], held_out_words, rng)
    hidden = set(held_out)
    known = [word for word in words if word not in hidden]
    shuffled = rng.sample(held_out, len(held_out))
    bounds = [round(i * len(shuffled) / new_texts) for i in range(new_texts + 1)]
    of_new_words = [" ".join(shuffled[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    half = (validation_texts - new_texts) // 2
    long_phrases = [phrase for phrase in phrases if len(phrase.split()) >= 3]
    if len(long_phrases) < half:
        raise ToolError(f"udhr_am.txt has {len(long_phrases)} phrases of three words or more, not {half}. Add text to "
                        "it, or lower --validation-texts")
    validation_phrases = rng.sample(long_phrases, half)
    taken = {text.rstrip("።") for text in [*phrases, *names, *of_new_words]}
    dealt = deal_sequences(known, validation_texts - new_texts - half, taken, rng)
    of_known_words = [*validation_phrases, *dealt]
    validation_bare = [text.rstrip("።") for text in of_known_words]
    training = [*phrases, *names, *deal_sequences(known, sequences, taken, rng)]
    training = [text for text in dict.fromkeys(training) if not any(bare in text for bare in validation_bare)]
    if not training:
        raise ToolError("no training text is left beside the validation texts. Add text to the sources, or raise "
                        "--sequences")
    rows = [{"id": f"t{i:05d}", "split": "train", "text": text} for i, text in enumerate(training)]
    rows += [{"id": f"new{i:03d}", "split": "val", "text": text} for i, text in enumerate(of_new_words)]
    rows += [{"id": f"known{i:03d}", "split": "val", "text": text} for i, text in enumerate(of_known_words)]
    return rows, held_out


def read_source(path: Path) -> list[str]:
    """The lines of a source text without its # comments. Raises ToolError when it is missing or not UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ToolError(f"{path}: no such file. --sources names the folder with udhr_am.txt, words_am.txt and "
                        "names_am.txt (processed_data/sources)") from error
    except UnicodeDecodeError as error:
        raise ToolError(f"{path}: not UTF-8 text at byte {error.start}. Save it as UTF-8") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


def read_lines(source: BinaryIO) -> Iterator[tuple[int, str]]:
    """The lines of UTF-8 text with their numbers from 1. Raises ToolError naming a line that is not UTF-8."""
    for number, line in enumerate(source, 1):
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ToolError(f"standard input, line {number}: not UTF-8 text at byte {error.start}. Give it UTF-8, for "
                            "example through iconv -t UTF-8") from error


def explanation(reading: Reading) -> list[str]:
    """What was changed in a text and what of it is not said, a line each."""
    lines = [f"    {change.rule}: {shown(change.before)} -> {shown(change.after)}" for change in reading.changes]
    if reading.unsaid:
        lines.append("    NOT SAID: " + " ".join(map(shown, reading.unsaid)))
    return lines + (["    Latin: " + " ".join(reading.latin)] if reading.latin else [])


def shown(text: str) -> str:
    """A piece of text for a line of a report; what cannot be seen as its code point."""
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text) or "nothing"


def normalise_stream(source: BinaryIO, args: argparse.Namespace) -> None:
    """Prints every line as it is spoken; with --explain also what was changed, what is not said, and the sums."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # the text is the product: never escaped for a terminal
    counts: Counter[str] = Counter()
    unsaid: Counter[str] = Counter()
    for number, line in read_lines(source):
        reading = read_aloud(line, args.language, args.rules, args.latin, args.years)
        if args.latin == "refuse" and reading.latin and not args.explain:
            raise ToolError(f"standard input, line {number}: Latin words ({' '.join(reading.latin[:5])}). Write them "
                            "in Ethiopic letters, or take --latin keep or spell")
        print(reading.text)
        counts.update(lines=1, changed=bool(reading.changes), losing=bool(reading.unsaid), Latin=bool(reading.latin))
        unsaid.update(reading.unsaid)
        if args.explain:
            print("\n".join(explanation(reading)) or "    nothing to change")
    if args.explain:
        info(f"{counts['lines']} lines: {counts['changed']} changed, {counts['losing']} losing signs or words, "
             f"{counts['Latin']} with Latin words")
        if unsaid:
            info("Not said: " + ", ".join(f"{shown(sign)} ({count})" for sign, count in unsaid.most_common(20)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    commands = parser.add_subparsers(dest="command", required=True)
    reader = commands.add_parser("normalise", help="standard input to standard output, line by line (the command that "
                                 "is meant when none is named)", epilog=parser.epilog,
                                 formatter_class=parser.formatter_class)
    reader.add_argument("--explain", action="store_true", help="show under each line what was changed and what is not "
                        "said, and the sums at the end")
    reader.add_argument("--language", default="am", help="of the text; only Amharic is turned into words (am)")
    reader.add_argument("--rules", type=int, choices=KNOWN_RULES, default=TEXT_RULES,
                        help=f"version of the Amharic rules; 1 for what was made under it ({TEXT_RULES})")
    reader.add_argument("--latin", choices=LATIN_CHOICES, default="keep",
                        help="Latin words: keep them, spell them letter by letter, or refuse the text (keep)")
    reader.add_argument("--years", choices=YEAR_CHOICES, default="thousands",
                        help="1990 as ሺህ ዘጠኝ መቶ ዘጠና, or by hundreds as አሥራ ዘጠኝ መቶ ዘጠና: do as your readers do "
                             "(thousands)")
    build = commands.add_parser("build", help="write texts.jsonl and held_out_words.txt",
                                epilog=f"first command:\n  {BUILD_COMMAND}", formatter_class=parser.formatter_class)
    build.add_argument("--sources", type=Path, default=Path("processed_data/sources"),
                       help="folder with udhr_am.txt, words_am.txt and names_am.txt (processed_data/sources)")
    build.add_argument("--output-dir", type=Path, required=True, help="gets texts.jsonl and held_out_words.txt")
    build.add_argument("--sequences", type=int, default=11_500, help="random sequences of 2 to 5 words (11500)")
    build.add_argument("--validation-texts", type=int, default=200, help="texts that training never sees (200)")
    build.add_argument("--held-out-words", type=int, default=600,
                       help="words that occur in validation texts only, 2 to 5 in each of four fifths of them (600)")
    build.add_argument("--seed", type=int, default=1234, help="another seed gives another choice of words (1234)")
    words = list(sys.argv[1:] if argv is None else argv)
    flags = words and words[0].startswith("--") and words[0] != "--help"
    args = parser.parse_args(["normalise", *words] if flags else words)
    if args.command == "normalise":
        normalise_stream(sys.stdin.buffer, args)
        return
    if args.sequences < 0:
        raise ToolError(f"--sequences is {args.sequences}; take 0 or more")
    words = sorted(w for w in set(read_source(args.sources / "words_am.txt")) if len(w) > 1 and is_speakable(w))
    phrases = cut_into_phrases(read_source(args.sources / "udhr_am.txt"))
    names = sorted({n for n in map(normalise, read_source(args.sources / "names_am.txt")) if is_speakable(n)})
    names = [name for name in names if len(name.split()) <= 5]
    rows, held_out = build_corpus(words, phrases, names, args.sequences, args.validation_texts, args.held_out_words,
                                  args.seed)
    write_jsonl(args.output_dir / "texts.jsonl", rows)
    write_text(args.output_dir / "held_out_words.txt", "\n".join(held_out) + "\n")
    validation = sum(row["split"] == "val" for row in rows)
    info(f"{len(rows) - validation} training texts ({len(phrases)} phrases, {len(names)} names), {validation} "
         f"validation texts, {len(held_out)} held-out words of {len(words)} -> {args.output_dir / 'texts.jsonl'}")


if __name__ == "__main__":
    run_program(main)
