"""Amharic as a reader reads it aloud: text rules, version 2. One text in, a Reading out, nothing else touched.

The order of the passes, each of which leaves plainer text to the next:
  1. characters      NFC; invisible characters and combining marks vanish; one form for digits and wide characters
  2. sentence marks  ፡፡ ። ፨ ¡ ፡- ፦ and their kin as one of the six marks that a voice pauses at
  3. abbreviations   in full, with prefix and ending (tools/_amharic_abbreviations.py)
  4. numerals        in words, with the signs that belong to them (tools/_amharic_numbers.py, _amharic_signs.py)
  5. signs           & @ # + = in words
  6. Latin words     kept, spelled letter by letter, or left out and listed
  7. the rest        commas, colons, dashes and full stops as pauses; quotes and brackets go, as readers pass over
                     them; what is left, and words of other scripts, are listed as unsaid
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from tools._amharic_abbreviations import say_abbreviations
from tools._amharic_numbers import (
    ETHIOPIC,
    HAS_NUMERAL,
    LATIN,
    LETTERS,
    LONG_NUMERAL,
    STOP,
    Change,
    Notes,
    digit_words,
    ethiopic_to_digits,
    group_digits,
    part_words,
    say_dates_and_times,
    say_numbers,
    say_telephone,
)
from tools._amharic_signs import CURRENCIES, RANGE_OF_DAYS, say_measures, say_operators
from tools._amharic_text_1 import PUNCTUATION

LATIN_CHOICES = ("keep", "spell", "refuse")
YEAR_CHOICES = ("thousands", "hundreds")
LETTER_NAMES = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
    "ኤ ቢ ሲ ዲ ኢ ኤፍ ጂ ኤች አይ ጄ ኬ ኤል ኤም ኤን ኦ ፒ ኪው አር ኤስ ቲ ዩ ቪ ደብሊው ኤክስ ዋይ ዜድ").split(), strict=True))

# 1. Characters
ODD = re.compile(rf"[⁰¹²³⁴-⁹]+|[^ -~\n{ETHIOPIC}፡-፼{LATIN}]")
BLANK_LETTERS = "\u115f\u1160\u3164\uffa0\u2800"
OTHER_SCRIPTS_MARKS = {"٫": ".", "٬": ",", "،": "፣", "؛": "፤", "؟": "?", "۔": "።", "。": "።", "、": "፣", "٪": "%",
                       "№": "#", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2015": "—", "‚": ","}
COMPATIBLE = re.compile("[\u2100-\u214f\u2160-\u2188\u3300-\u33ff\ufb00-\ufb06\ufe50-\ufe6b\uff01-\uffef…"
                        "\U0001d400-\U0001d7ff\U0001f100-\U0001f1ff]")

# 2. Sentence marks
MARKS = {"፨": "። ", "፧": "? ", "¡": "! ", "¿": " ", "፦": "፣ ", "፠": " ", "‼": "! ", "⁇": "? ", "⁈": "? ", "⁉": "! ",
         "‽": "? "}
MARK = re.compile("፡፡+|::+|[:፡፥]\\s?[-–—]+(?=\\s|$|[ሀ-ፚ])|[" + "".join(MARKS) + "]")
APOSTROPHE = re.compile("(?<![0-9])['’‘ʼʻ`´]|['’‘ʼʻ`´](?![0-9])")
QUOTES = "\"'«»“”„‹›‘’"
PREFIX_QUOTE = re.compile(rf"(?<![{LETTERS}])([የበለከ])[{QUOTES}]+(?=[{LETTERS}0-9፩-፼])")
QUOTED_ENDING = re.compile(rf"(?<=[{LETTERS}0-9፩-፼])[{QUOTES}]+((?:ን|ና|ም|ስ|ው|ንና|ንም)(?![{LETTERS}]))")
OPENING_QUOTE = re.compile("(?<![^ (\\[\n])['‘`](?=[^ ])")

LABEL = re.compile(r"(^|[።?!\n] ?)(\(?(?:[0-9]{1,2}|[፩-፼]{1,2}|[ሀለሐ])[.)])(?= [ሀ-ፚ]{2})", re.MULTILINE)

# 5. Signs
COMMON_SIGNS = [
    ("sign", re.compile(r" ?& ?"), " እና "),
    ("sign", re.compile(r" ?@ ?"), " ኤት "),
    ("sign", re.compile(rf"#(?=[{LETTERS}])"), " ሃሽታግ "),
    ("sign", re.compile(r" ?± ?"), " ሲደመር ወይም ሲቀነስ "),
    ("sign", re.compile(rf"(?<=[{LETTERS})])(?: [+] |[+])(?=[{LETTERS}(])"), " ሲደመር "),
    ("sign", re.compile(r"[+]"), " ፕላስ "),
    ("sign", re.compile(rf"(?<=[{LETTERS})]) ?(?<!=)=(?!=) ?(?=[{LETTERS}(?])"), " እኩል ይሆናል "),
    ("sign", re.compile(rf"(?<=[{LETTERS})]) ?[×✕✖] ?"), " ሲባዛ በ"),
    ("sign", re.compile(rf"(?<=[{LETTERS})]) ?÷ ?"), " ሲካፈል ለ"),
    ("sign", re.compile(rf"(?<=[{LETTERS})]) − (?=[{LETTERS}(])"), " ሲቀነስ "),
    ("sign", re.compile("%"), " በመቶ "),
    ("sign", re.compile("‰"), " በሺህ "),
    ("degrees", re.compile(rf"[°º] ?C(?![{LATIN}])"), " ዲግሪ ሴንቲግሬድ "),
    ("degrees", re.compile(r"[°º]"), " ዲግሪ "),
    ("unit", re.compile(rf"(?<![{LATIN}])m³"), " ሜትር ኩብ "),
    ("unit", re.compile(rf"(?<![{LATIN}])m²"), " ካሬ ሜትር "),
    ("number", re.compile("²"), " ሁለት "),
    ("number", re.compile("³"), " ሦስት "),
    ("range", RANGE_OF_DAYS, r"\1 እስከ "),
]
MONEY = re.compile("[" + "".join(CURRENCIES) + "]")
NUMBER_SIGN = re.compile(r"# ?(?=\d)")
ABOUT = re.compile(r"[~≈] ?(?=\d)(?<!\d.)(?<!\d .)")

# 6. Latin
LATIN_WORD = re.compile(rf"[{LATIN}]+")
INITIALISM = re.compile(rf"(?<![{LATIN}])(?:[A-Z]\.){{2,}}(?:[A-Z](?![{LATIN}]))?")
TITLE = re.compile(rf"(?<![{LATIN}])(Dr|Mr|Mrs|Ms|Prof|Eng|St|No|Vol|vs|etc)\.(?= ?[{LETTERS}0-9])")
DOMAIN_DOT = re.compile(rf"(?<=[{LATIN}0-9])\.(?=[{LATIN}]{{2}})")

# 7. The rest
DASH = re.compile(
    rf"(?<=[{LETTERS})”»\"]) +[-–—]+(?: +(?=[“”«‹\"(]*[{LETTERS}])|(?=[“”«‹\"]))|(?<=[{LETTERS}]) ?—+ ?(?=[{LETTERS}])")
DOTS = re.compile(r"\.(?: ?\.)+")
LAST_STOP = re.compile(rf"([{LETTERS}][^{LETTERS}{STOP}\n]{{0,3}}){STOP}(?=[^{LETTERS}\n]*(?:\n|$))")
INITIAL = re.compile(rf"(?<![{LETTERS}])([{ETHIOPIC}]|{'|'.join(LETTER_NAMES.values())})\.(?= ?[{ETHIOPIC}])")
SILENT = set("\"'‘’`´ʼʻ/\\|_•·●▪◦‣►▶■□➢✓✔፡:-\n" + STOP)
BROKEN_LETTER = re.compile(rf"[{LETTERS}].[{LETTERS}]")  # በ|ላ: a font's letter that was lost on the way
LEFT = re.compile(rf"[\W\d_](?<![ {PUNCTUATION}])")
FOREIGN = re.compile(rf"[^\W\d_{LETTERS}]+")
SPACE = re.compile(r"\s+")
FOLD = re.compile(rf" ?([{PUNCTUATION}])[ {PUNCTUATION}]*")


@dataclass(frozen=True)
class Reading:
    """A text as it is spoken, and what became of what was written.

    `changes`: what each rule rewrote. `unsaid`: signs (left out) and words of other scripts (left in) that nothing
    says the sound of; a text with any does not say what its recording says. `latin`: the Latin words in it.
    """

    text: str
    changes: tuple[Change, ...] = ()
    unsaid: tuple[str, ...] = ()
    latin: tuple[str, ...] = ()


def is_invisible(character: str) -> bool:
    """True for what has no shape of its own: format and control characters, selectors of variants, blank letters."""
    return (unicodedata.category(character) in ("Cf", "Cc") or character in BLANK_LETTERS or character == "\u034f"
            or "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef")


def plain_character(match: re.Match[str]) -> str:
    """One odd character, or a run of raised digits, as the later passes know it."""
    character = match[0]
    if character in ("²", "³") and match.start() and match.string[match.start() - 1] in "mሜር.":
        return character
    if len(character) > 1 or (category := unicodedata.category(character)) == "No" and (
            unicodedata.normalize("NFKC", character) != character):
        plain = unicodedata.normalize("NFKC", character)
        return f" {plain}" if "⁄" in plain else f" {plain} "
    if character in OTHER_SCRIPTS_MARKS:
        return OTHER_SCRIPTS_MARKS[character]
    if character.isspace():
        return "\n" if character in "\u2028\u2029\x85" else " "
    if is_invisible(character) or category in ("Mn", "Me", "Mc"):
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if COMPATIBLE.match(character):
        return unicodedata.normalize("NFKC", character)
    return "\ue001" if character == STOP else character


def plain_characters(text: str, notes: Notes) -> str:
    """Pass 1. Invisible characters and combining marks go without a trace: they have no sound to lose."""
    text = notes.sub("character", ODD, plain_character, unicodedata.normalize("NFC", text))
    text = QUOTED_ENDING.sub(r"\1", PREFIX_QUOTE.sub(r"\1", text))
    return APOSTROPHE.sub("", OPENING_QUOTE.sub(" ", text))


def say_mark(match: re.Match[str]) -> str:
    """Pass 2."""
    mark = match[0]
    if mark in MARKS:
        return MARKS[mark]
    return "። " if mark[-1] in "፡:" else "፣ "


def say_numerals(text: str, notes: Notes, years: str) -> str:
    """A text with every numeral in words; `years`: "thousands", or "hundreds" for 1100 to 1999 by CLDR's year rule."""
    text = notes.sub("number", LONG_NUMERAL, lambda match: digit_words(match[0]), text)
    if not HAS_NUMERAL.search(text):
        return text
    text = say_telephone(text, notes)
    text = group_digits(text, notes)
    text = ethiopic_to_digits(text, notes)
    text = part_words(text, notes)
    text = say_dates_and_times(text, notes)
    text = say_measures(text, notes)
    text = say_operators(text, notes)
    return say_numbers(text, notes, years)


def say_signs(text: str, notes: Notes) -> str:
    """Pass 5."""
    for rule, pattern, words in COMMON_SIGNS:
        text = notes.sub(rule, pattern, words, text)
    return notes.sub("money", MONEY, lambda match: f" {CURRENCIES[match[0]]} ", text)


def say_latin(text: str, choice: str, notes: Notes) -> tuple[str, tuple[str, ...]]:
    """Pass 6: the text, and its Latin words."""
    text = notes.sub("Latin", INITIALISM, lambda match: match[0].replace(".", "") + STOP, text)
    text = notes.sub("Latin", TITLE, r"\1 ", text)
    text = notes.sub("Latin", DOMAIN_DOT, " ዶት ", text)
    words = tuple(LATIN_WORD.findall(text))
    if choice == "spell":
        text = notes.sub("Latin", LATIN_WORD, lambda match: f" {spelled(match[0])} ", text)
    elif choice == "refuse":
        text = notes.sub("Latin", LATIN_WORD, " ", text)
    return text, words


def spelled(word: str) -> str:
    """The Amharic names of a word's Latin letters; a letter without one as it is."""
    base = (unicodedata.normalize("NFKD", letter)[0].upper() for letter in word)
    return " ".join(LETTER_NAMES.get(letter, "") for letter in base).strip()


def say_pauses(text: str, notes: Notes) -> str:
    """Pass 7: dots, dashes, colons and commas as marks. An abbreviation's full stop counts where a line ends."""
    text = LAST_STOP.sub(r"\1።", text).replace(STOP, " ")
    text = notes.sub("pause", DASH, "፣ ", text)
    text = notes.sub("pause", DOTS, lambda match: "፣ " if re.match(rf"\s*[{LETTERS}]", match.string[match.end():][:9])
                     else "። ", text)
    text = notes.sub("initial", INITIAL, r"\1 ", text)
    text = re.sub(rf"(?<=[{LETTERS}]) ?:(?=\s|$)", "፣", text)
    return text.replace(".", "።").replace(",", "፣").replace(";", "፤")


def drop_silent(text: str, notes: Notes) -> tuple[str, tuple[str, ...]]:
    """The text without what readers pass over, and what of the rest could not be said.

    A sign without a sound goes. A word of another script stays, so that a tokenizer without pieces for it refuses the
    text, as it always did, and nobody trains on half a sentence.
    """
    unsaid: list[str] = []
    silent: dict[str, None] = {}

    def left(match: re.Match[str]) -> str:
        broken = match[0] in "|\\" and BROKEN_LETTER.match(match.string, match.start() - 1)
        if not broken and match[0] in SILENT or unicodedata.category(match[0]) in ("Ps", "Pe", "Pi", "Pf", "Pd"):
            silent[match[0]] = None
        else:
            unsaid.append(match[0])
        return " "

    unsaid += FOREIGN.findall(text)
    text = LEFT.sub(left, FOREIGN.sub(r" \g<0> ", text))
    silent.pop("\n", None)
    if silent:
        notes.append(Change("passed over", " ".join(silent), ""))
    return text, tuple(unsaid)


def read_amharic(text: str, latin: str = "keep", years: str = "thousands") -> Reading:
    """An Amharic text as it is spoken; see the passes above. `latin`: LATIN_CHOICES, `years`: YEAR_CHOICES."""
    notes = Notes()
    said = plain_characters(text, notes)
    said = notes.sub("mark", MARK, say_mark, said)
    said = notes.sub("label", LABEL, lambda match: match[1] + match[2][:-1].lstrip("(") + "፣ ", said)
    said = say_abbreviations(said, notes)
    if HAS_NUMERAL.search(said):
        said = notes.sub("sign", ABOUT, " በግምት ", notes.sub("sign", NUMBER_SIGN, " ቁጥር ", said))
        said = say_numerals(said, notes, years)
    said, latin_words = say_latin(say_signs(said, notes), latin, notes)
    said, unsaid = drop_silent(say_pauses(said, notes), notes)
    said = FOLD.sub(r"\1 ", SPACE.sub(" ", said).strip()).strip().lstrip(PUNCTUATION).strip()
    return Reading(said, tuple(notes), unsaid + (latin_words if latin == "refuse" else ()), latin_words)


def pass_through(text: str) -> Reading:
    """A text of another language: NFC, no invisible characters, one space between words; its own marks and numerals."""
    visible = "".join(character for character in unicodedata.normalize("NFC", text)
                      if character.isspace() or not is_invisible(character))
    return Reading(SPACE.sub(" ", visible).strip())
