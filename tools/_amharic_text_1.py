"""Amharic text rules, version 1, as they were: data, tokenizers and checkpoints made under them keep their spelling.

Nothing here is mended: `normalise` gives byte for byte what it gave when those were made. Version 2 takes over in
tools/_amharic_reading.py.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

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
