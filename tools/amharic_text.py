"""Amharic text: normalisation for speech, and the demo corpus of short texts.

  normalise   reads text from standard input, writes it ready to be spoken and tokenised
  build       cuts the sources into short texts, split into training and validation

`build` promises: a validation text occurs in no training text, and neither does a held-out word, not even inside
a longer word or in another spelling of the same sounds.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tools._common import ToolError, info, make_parser, run_program, write_jsonl, write_text

FIRST_COMMAND = "echo 'በ፲፱፻፶ ዓ.ም፤ሰላም' | python -m tools.amharic_text normalise"
BUILD_COMMAND = "python -m tools.amharic_text build --output-dir build"

TEXT_RULES = 1
ETHIOPIC_DIGITS = {chr(0x1369 + i): i + 1 for i in range(9)} | {chr(0x1372 + i): 10 * (i + 1) for i in range(9)}
HUNDRED, TEN_THOUSAND = "፻", "፼"
NUMERAL = re.compile(rf"([0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|[{''.join(ETHIOPIC_DIGITS)}{HUNDRED}{TEN_THOUSAND}]+)(ኛ?)")
UNITS = ["ዜሮ", "አንድ", "ሁለት", "ሦስት", "አራት", "አምስት", "ስድስት", "ሰባት", "ስምንት", "ዘጠኝ"]
TENS = ["", "አሥር", "ሃያ", "ሠላሳ", "አርባ", "ሃምሳ", "ስድሳ", "ሰባ", "ሰማንያ", "ዘጠና"]
SCALES = [(10**9, "ቢሊዮን"), (10**6, "ሚሊዮን"), (1000, "ሺህ"), (100, "መቶ")]
LONGEST_NUMERAL = 15  # characters; a longer one is read one by one
CASE_ENDINGS = tuple("ንምናስ")  # of the object, too, and, as for
DOTTED_NUMERALS = re.compile(r"[0-9]+(?:\.[0-9]+){2,}")  # a date such as 12.05.2015
# One letter, perhaps after a prefix (በ ለ ከ የ): before a slash in front of a word, before a full stop in front of
# one more letter. ኛ is none: it ends an ordinal.
ABBREVIATION = re.compile("(?<![ሀ-ፚ])([በለከየ]?(?!ኛ)[ሀ-ፚ])(?:/(?=[ሀ-ፚ])|[.](?=[ሀ-ፚ](?![ሀ-ፚ])))")

PUNCTUATION = "፣፤፥።?!"
OTHER_MARKS = str.maketrans("፦,፧;፡:", "፣፣?፤  ")
PER_CENT = str.maketrans(dict.fromkeys("%٪％﹪", " በመቶ "))
UNHEARD = dict.fromkeys(map(ord, "’'\u135d\u135e\u135f"))
# Letters that espeak-ng's Amharic voice does not know: it reads out their code points instead.
UNSPOKEN_LETTERS = set("ሇቇቐቑቒቓቔቕቖቘቚቛቜቝኇኯዏዯጏጟፇፘፙፚ")


def ethiopic_number(numeral: str) -> int:
    """The value of an Ethiopic numeral such as ፲፱፻፶ (1950): digits, then multipliers ፻ (100) and ፼ (10,000)."""
    total = hundreds = group = 0
    for character in numeral:
        if character == HUNDRED:
            hundreds, group = hundreds + (group or 1) * 100, 0
        elif character == TEN_THOUSAND:
            total, hundreds, group = (total + hundreds + group or 1) * 10_000, 0, 0
        else:
            group += ETHIOPIC_DIGITS[character]
    return total + hundreds + group


def number_words(value: int) -> str:
    """A number from 0 up, in Amharic words; from a thousand billion on, digit by digit."""
    if value >= 10**12:
        return " ".join(UNITS[int(digit)] for digit in str(value))
    if value < 10:
        return UNITS[value]
    if 10 < value < 20:
        return f"አሥራ {UNITS[value - 10]}"
    if value < 100:
        tens, units = divmod(value, 10)
        return TENS[tens] + (f" {UNITS[units]}" if units else "")
    size, name = next((size, name) for size, name in SCALES if value >= size)
    count, rest = divmod(value, size)
    head = name if count == 1 and size <= 1000 else f"{number_words(count)} {name}"
    return head + (f" {number_words(rest)}" if rest else "")


def ordinal_words(words: str) -> str:
    """Number words with the ending ኛ: a final letter of the sixth order moves to the first (ሦስት -> ሦስተኛ)."""
    stem, last = words[:-1], words[-1]
    sixth_order = ord(last) % 8 == 5
    return stem + {"ኝ": "ነ", "ህ": ""}.get(last, chr(ord(last) - 5) if sixth_order else last) + "ኛ"


def plain_digits(text: str) -> str:
    """Digits of all scripts but Ethiopic as 0 to 9; raised, circled and fraction numbers stand apart (m³ -> m 3)."""
    parts = []
    for category, characters in itertools.groupby(text, unicodedata.category):
        part = "".join(characters)
        if category == "Nd":
            part = "".join(str(unicodedata.decimal(digit)) for digit in part)
        elif category == "No" and unicodedata.normalize("NFKC", part) != part:
            part = f" {unicodedata.normalize('NFKC', part)} "
        parts.append(part)
    return "".join(parts)


def _numeral_to_words(match: re.Match[str]) -> str:
    """The words of one match of NUMERAL, apart from a word or numeral behind it; endings such as ኛ and ን stay."""
    numeral, ordinal = match.groups()
    if numeral[0] in "0123456789":
        whole, _, fraction = numeral.replace(",", "").partition(".")
        telephone = whole[0] == "0" and len(whole) > 2  # but not the 05 of a date
        one_by_one = telephone or len(whole) > LONGEST_NUMERAL
        words = " ".join(UNITS[int(digit)] for digit in whole) if one_by_one else number_words(int(whole))
        words += "".join([" ነጥብ", *(f" {UNITS[int(digit)]}" for digit in fraction)]) if fraction else ""
    elif len(numeral) > LONGEST_NUMERAL:
        words = " ".join(number_words(ethiopic_number(character)) for character in numeral)
    else:
        words = number_words(ethiopic_number(numeral))
    if ordinal:
        return ordinal_words(words)
    behind = match.string[match.end() : match.end() + 2]
    if behind[:1] in CASE_ENDINGS and not unicodedata.category(behind[1:] or " ").startswith("L"):
        return words
    return words + (" " if behind and unicodedata.category(behind[0])[0] in "LN" else "")


def normalise(text: str) -> str:
    """Text as it is spoken: numerals in words (በ፫ኛ -> በሦስተኛ), one space between words, one after each mark.

    The old word separator ፡ becomes a space, ፦ becomes ፣, ፡፡ becomes ። and % becomes በመቶ; quotes, brackets, marks of
    length and control characters go; abbreviations lose their slash or full stops (ዓ.ም, ት/ቤት), other slashes part
    words and other full stops part sentences. A numeral of more than 15 digits, or of more than two with a 0 in front
    (a telephone number), is read digit by digit. Letters are never respelled.
    """
    text = plain_digits(unicodedata.normalize("NFC", text)).translate(UNHEARD)
    text = re.sub("፡፡|::", "።", text)
    text = ABBREVIATION.sub(r"\1", text)
    text = DOTTED_NUMERALS.sub(lambda date: date[0].replace(".", " "), text)
    text = NUMERAL.sub(_numeral_to_words, text.translate(PER_CENT))
    text = text.translate(OTHER_MARKS).replace(".", "።")
    text = "".join(c if c in PUNCTUATION or unicodedata.category(c)[0] in "LM" else " " for c in text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(rf" ?([{PUNCTUATION}])[ {PUNCTUATION}]*", r"\1 ", text)
    return text.strip().lstrip(PUNCTUATION).strip()


# Letters of equal sound: from, to, how many orders.
ONE_SPELLING = {source + i: target + i for source, target, orders in (
    (0x1210, 0x1200, 7), (0x1280, 0x1200, 7), (0x1220, 0x1230, 8), (0x12D0, 0x12A0, 7), (0x1340, 0x1338, 7)
) for i in range(orders)}
FIRST_ORDERS = {ord("ሃ"): "ሀ", ord("ኣ"): "አ"}


def fold_homophones(text: str) -> str:
    """One spelling per sound (ሐ ኀ -> ሀ, ሠ -> ሰ, ዐ -> አ, ፀ -> ጸ): for comparing words, never for training text."""
    return text.translate(ONE_SPELLING).translate(FIRST_ORDERS)


def letters_of(text: str) -> str:
    """What of a text can be heard: letters, one spelling per sound, no spaces, no punctuation."""
    return fold_homophones("".join(c for c in normalise(text) if c not in PUNCTUATION and c != " "))


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


def normalise_stream(source: BinaryIO) -> None:
    """Prints every line of UTF-8 text as it is spoken. Raises ToolError naming a line that is not UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # the text is the product: never escaped for a terminal
    for number, line in enumerate(source, 1):
        try:
            print(normalise(line.decode()))
        except UnicodeDecodeError as error:
            raise ToolError(f"standard input, line {number}: not UTF-8 text at byte {error.start}. Give it UTF-8, for "
                            "example through iconv -t UTF-8") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("normalise", help="standard input to standard output, line by line",
                        epilog=parser.epilog, formatter_class=parser.formatter_class)
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
    args = parser.parse_args(argv)
    if args.command == "normalise":
        normalise_stream(sys.stdin.buffer)
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
