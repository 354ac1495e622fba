"""Amharic numerals in words, version 2 of the text rules: words, endings, and what is written with digits alone.

Sources of the tables: the spellings of version 1 (the demo's tokenizer and voice know them); Unicode CLDR's rules
for Amharic (common/rbnf/am.xml) for the order of words, ሺህ and መቶ without አንድ, and years by hundreds. CLDR's tens
("two ten" for twenty), its ባዶ for zero and its foreign words above a million are nobody's speech and left out.

Each step rewrites one kind of numeral into plainer ones, so that later steps are short; tools/_amharic_reading.py has
their order. Every pattern is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools._amharic_text_1 import LONGEST_NUMERAL, SCALES, TENS, UNITS, ethiopic_number, ordinal_words

ETHIOPIC = "\u1200-\u135a\u1380-\u138f\u2d80-\u2dde\uab01-\uab2e\U0001e7e0-\U0001e7fe"
LATIN = "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿ"
LETTERS = ETHIOPIC + LATIN
NUMBER = r"\d++(?:,\d{3}(?!\d))*+(?:\.\d++)?+"
FIRST = r"(?<!\d)(?<!\d[.,])"  # where a numeral begins
STOP = "\ue000"  # a full stop that ends an abbreviation, and a sentence only where the line ends
TRILLION = (10**12, "ትሪሊዮን")

# Before a numeral, joined to it: in, for, from, of, and their distributives. Other words stand apart.
PREFIXES = frozenset(["በ", "ለ", "ከ", "የ", "በየ", "ለየ", "ከየ", "የየ", "እየ"])
CASES = "(?:ንና|ንም|ምና|ን|ም|ና|ስ)?"
PLURALS = "(?:ዎች|ዎቹ|ኦች|ኦቹ|ቶች|ቶቹ|ሮች|ሮቹ|ዶች|ዶቹ|ኞች|ኞቹ)"
ORDINAL_ENDING = f"[ተረደነኘ]?ኛ(?:[ውዉዋ]|ዎች|ዎቹ|ነት|ነቱ)?{CASES}"
STRONG_ENDING = f"(?:{ORDINAL_ENDING}|(?:{PLURALS}|[ውዉዋ]|[ቱሩዱኙሁ]|[ቷሯዷኟ]|[ታራዳኛ](?:ችን|ችሁ|ቸው)){CASES})"
ENDING = re.compile(f"{STRONG_ENDING}|(?:[ትርድኝ]{CASES}|ንና|ንም|ምና|ን|ም|ና|ስ)")
ORDINAL = re.compile("[ተረደነኘ]?(ኛ.*)")

SCALE_WORDS = "ሺህ|ሺ|ሚሊዮን|ሚሊየን|ቢሊዮን|ቢሊየን|ትሪሊዮን|ትሪሊየን"
# Books of the Bible as references shorten them; in full they stand for themselves.
BOOKS = {
    "ዘፍ": "ዘፍጥረት", "ዘጸ": "ዘጸአት", "ዘፀ": "ዘፀአት", "ዘሌ": "ዘሌዋውያን", "ዘኁ": "ዘኁልቁ", "ዘኍ": "ዘኍልቍ", "ዘዳ": "ዘዳግም",
    "ኢያ": "ኢያሱ", "መሳ": "መሳፍንት", "ሩት": "ሩት", "ሳሙ": "ሳሙኤል", "ነገ": "ነገሥት", "ዜና": "ዜና መዋዕል", "ዕዝ": "ዕዝራ",
    "ነህ": "ነህምያ", "አስ": "አስቴር", "ኢዮ": "ኢዮብ", "መዝ": "መዝሙር", "ምሳ": "ምሳሌ", "መክ": "መክብብ", "ኢሳ": "ኢሳይያስ",
    "ኤር": "ኤርምያስ", "ሕዝ": "ሕዝቅኤል", "ዳን": "ዳንኤል", "ሆሴ": "ሆሴዕ", "አሞ": "አሞጽ", "ዮና": "ዮናስ", "ሚክ": "ሚክያስ",
    "ሚል": "ሚልክያስ", "ማቴ": "ማቴዎስ", "ማር": "ማርቆስ", "ሉቃ": "ሉቃስ", "ዮሐ": "ዮሐንስ", "ሐዋ": "የሐዋርያት ሥራ", "ሮሜ": "ሮሜ",
    "ቆሮ": "ቆሮንቶስ", "ገላ": "ገላትያ", "ኤፌ": "ኤፌሶን", "ፊልጵ": "ፊልጵስዩስ", "ቆላ": "ቆላስይስ", "ተሰ": "ተሰሎንቄ",
    "ጢሞ": "ጢሞቴዎስ", "ቲቶ": "ቲቶ", "ፊል": "ፊልሞና", "ዕብ": "ዕብራውያን", "ያዕ": "ያዕቆብ", "ጴጥ": "ጴጥሮስ", "ይሁ": "ይሁዳ",
    "ራእ": "ራእይ", "ራዕ": "ራእይ",
}
FULL_BOOKS = [*BOOKS.values(), "ወንጌል", "መዝሙረ ዳዊት", "ዳዊት", "ቁርዓን", "ቁርኣን", "ሱራ", "ምዕራፍ"]
BOOK_NAMES = BOOKS | {name: name for name in FULL_BOOKS} | {"ምዕ": "ምዕራፍ"}


@dataclass(frozen=True)
class Change:
    """One thing that a rule rewrote."""

    rule: str
    before: str
    after: str


class Notes(list[Change]):
    """What the rules changed in one text, in the order of the rules."""

    def sub(self, rule: str, pattern: re.Pattern[str], new: str | Callable[[re.Match[str]], str], text: str,
            signs: str = "") -> str:
        """pattern.sub that notes every replacement. `signs`: no match is without one of them; spares long texts."""
        if signs and not any(sign in text for sign in signs):
            return text

        def replace(match: re.Match[str]) -> str:
            said = match.expand(new) if isinstance(new, str) else new(match)
            if said.strip() != match[0].strip():
                self.append(Change(rule, match[0].strip(), said.replace(STOP, "").strip()))
            return said

        return pattern.sub(replace, text)


# Words


def number_words(value: int) -> str:
    """A number of 0 to 10**15 - 1 in Amharic words, thousands and hundreds without አንድ in front."""
    if value < 10:
        return UNITS[value]
    if 10 < value < 20:
        return f"አሥራ {UNITS[value - 10]}"
    if value < 100:
        tens, units = divmod(value, 10)
        return TENS[tens] + (f" {UNITS[units]}" if units else "")
    size, name = next((size, name) for size, name in [TRILLION, *SCALES] if value >= size)
    count, rest = divmod(value, size)
    head = name if count == 1 and size <= 1000 else f"{number_words(count)} {name}"
    return head + (f" {number_words(rest)}" if rest else "")


def digit_words(digits: str) -> str:
    """Every digit of a text on its own; what is no digit parts nothing more than a space does."""
    return " ".join(UNITS[int(character)] for character in digits if character.isdigit())


def year_words(value: int) -> str:
    """1100 to 1999 by CLDR's rule for years: so many hundreds (አሥራ ዘጠኝ መቶ ...)."""
    return number_words(value // 100) + " መቶ" + (f" {number_words(value % 100)}" if value % 100 else "")


def numeral_words(numeral: str, years: str = "thousands") -> str:
    """The words of digits with perhaps commas between thousands and a decimal point."""
    whole, _, fraction = numeral.partition(".")
    grouped, whole = "," in whole, whole.replace(",", "")
    if len(whole) > LONGEST_NUMERAL or (whole[0] == "0" and len(whole) > 2) or (len(whole) > 12 and not grouped):
        words = digit_words(whole)
    elif years == "hundreds" and not grouped and not fraction and re.fullmatch("1[1-9][0-9]{2}", whole):
        words = year_words(int(whole))
    else:
        words = number_words(int(whole))
    return f"{words} ነጥብ {digit_words(fraction)}" if fraction else words


def fraction_words(part: int, whole: int) -> str:
    """1/2 ግማሽ, 1/4 ሩብ, 3/4 ሦስት አራተኛ."""
    named = {(1, 2): "ግማሽ", (1, 4): "ሩብ"}.get((part, whole))
    return named or f"{number_words(part)} {ordinal_words(number_words(whole))}"


def attach(words: str, ending: str) -> str:
    """Words with an ending as it is spoken: 2ቱ ሁለቱ, 10ሩ አሥሩ, 100ው መቶው, 1990ዎቹ ...ዘጠናዎቹ, 12ተኛ አሥራ ሁለተኛ.

    A consonant without a vowel takes the vowel of the ending; an ending that begins with that consonant replaces it.
    """
    if not ending:
        return words
    if ordinal := ORDINAL.fullmatch(ending):
        return ordinal_words(words) + ordinal[1][1:]
    stem, last, first = words[:-1], ord(words[-1]), ord(ending[0])
    family, consonant = last - last % 8, last % 8 == 5
    if words.endswith("ሺህ") and ending[0] in "ዎኦ":
        return stem + "ዎ" + ending[1:]
    if consonant and first - first % 8 == family and not (first == last and ending[0] in "ንምስ"):
        return stem + ending
    if ending[0] in "ቱሩዱኙሁቷሯዷኟ":  # another word's definite ending: 20ቱ is ሃያው
        ending = ("ው" if first % 8 == 1 else "ዋ") + ending[1:]
    vowel = {"ው": 1, "ዉ": 1, "ዎ": 6, "ኦ": 6, "ዋ": 7}.get(ending[0])
    if consonant and vowel is not None:
        return stem + chr(family + vowel) + ending[1:]
    if ending[0] in "ቶሮዶኞታራዳትርድኝ":  # belongs to no word of this sound: a word of its own
        return f"{words} {ending}"
    return words + ending


def with_ending(words: str, ending: str) -> str:
    """Words and the letters that stood behind their sign: an ending joins, a word stands apart."""
    return attach(words, ending) if ENDING.fullmatch(ending) else f"{words} {ending}".strip()


# Telephone numbers, codes, groups of digits

PHONE = re.compile(r"(?<![\d.,])(?<!\d )(?:\(?\+ ?\d{1,3}\)?(?:[ -]?\(0\))?(?:[ -]?\d){6,12}"
                   r"|\(0\d{2,3}\)[ -]?\d{2,7}(?:[ -]\d{2,7}){0,3}|0\d{2,3}(?:[ /-]\d{2,7}){1,4}|0\d(?:[ -]\d\d){4}"
                   r"|0\d{7,10}|251[ -]?\d(?:[ -]?\d){6,9})(?![\d,]|\.\d)")
SERVICE_CODE = re.compile(r"(?<![\d*])\*\d++(?:\*\d++)*+#")
CODE_BEFORE = re.compile(r"(?:ስልክ|ሞባይል|ፋክስ|አጭር|ነፃ (?:የስልክ )?መስመር|ነጻ (?:የስልክ )?መስመር|SMS|ሰሌዳ)"
                         rf"(?:[^\d።?!]{{0,16}}|[^\d።?!]{{0,4}}[\d -]{{3,16}}(?: ወይም | እና |[፣,/] ?))[{ETHIOPIC}]?$")
ACCOUNT_BEFORE = re.compile(rf"(?:[ሂሒ]ሳብ|መለያ|መታወቂያ)(?: ቁጥር)?[^\d።?!]{{0,6}}[{ETHIOPIC}]?$")
CODE_BEHIND = re.compile(r" (?:ላይ |ቁጥር |[^ ]{1,4} ብለው )?(?:ይደውሉ|ደውሉ|ደውል|በመደወል|መደወል|ደውለው|ይላኩ|ላኩ|ላክ|በመላክ|መላክ)")
CODE = re.compile(r"(?<![\d.,:/+-])\d{3,16}(?![\d:/%]|[.,]\d)")
MARKED = re.compile(r"(?<![\d.,፣])[1-9]\d{0,2}(?:፣\d{3})++(?![\d፣])")
SPACED = re.compile(r"(?<![\d.,:/+-])(?<!(?<!\d)\d )(?<!(?<!\d)\d\d )(?<!(?<!\d)\d{3} )"
                    r"[1-9]\d{0,2}(?: \d{3})++(?![\d:/-]|,\d| \d{1,3}(?!\d))")
APOSTROPHES = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:['’]\d{3})++(?!\d)")
DOTTED = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:\.\d{3}){2,}+|[1-9]\d{0,2}(?:\.\d{3})++(?=,\d{1,2}(?!\d))"
                    r"|[1-9]\d{0,2}\.000|[1-9]\d{0,2}\.\d{3}(?= ?(?:ብር|ዶላር|ሰዎች)))(?:,(\d{1,2}))?(?![\d]|[.,]\d)")
COMMAS = re.compile(r"(?<![\d.,])\d++(?:,\d++)++(?:\.\d++)?+")
NO_CENTS = re.compile(r"(?<=\d)\.(?:00(?![\d.])(?!\.\d)|-(?!\d))")
MEASURE_BEHIND = re.compile(" ?(?:ሚሊዮን|ሚሊየን|ቢሊዮን|ቢሊየን|%|በመቶ|ኪሎ|ሜትር|ዲግሪ|°)")
BARE_POINT = re.compile(r"(?<![^ (\[\n+$€£=-])\.(?=\d)")


def say_telephone(text: str, notes: Notes) -> str:
    """Telephone numbers, *804# and the numbers that one dials or writes to, digit by digit."""
    def phone(match: re.Match[str]) -> str:
        plus = "ፕላስ " if "+" in match[0] else ""
        long = sum(map(str.isdigit, match[0])) >= 7
        return plus + digit_words(match[0].replace("(0)", "")) if long else match[0]

    def code(match: re.Match[str]) -> str:
        before = match.string[max(0, match.start() - 40) : match.start()]
        behind = match.string[match.end() : match.end() + 24]
        dialled = CODE_BEFORE.search(before) or (len(match[0]) < 6 and CODE_BEHIND.match(behind))
        return digit_words(match[0]) if dialled or (len(match[0]) > 4 and ACCOUNT_BEFORE.search(before)) else match[0]

    text = notes.sub("telephone", PHONE, phone, text)
    text = notes.sub("code", SERVICE_CODE, lambda match: "ኮከብ " + " ኮከብ ".join(
        map(digit_words, match[0][1:-1].split("*"))) + " መሰላል", text, "*")
    return notes.sub("code", CODE, code, text)


def group_digits(text: str, notes: Notes) -> str:
    """One spelling for numbers: 10 000, 1.000.000 and 10'000 with commas, 2013,2014 as a list, .5 as 0.5."""
    def commas(match: re.Match[str]) -> str:
        whole, point, fraction = match[0].partition(".")
        parts = whole.split(",")
        decimal = parts[0] == "0" or (len(parts[-1]) < 3 and MEASURE_BEHIND.match(match.string, match.end()))
        if len(parts) == 2 and not point and decimal:
            return ".".join(parts)
        if parts[0][0] != "0" and len(parts[0]) < 4 and all(len(part) == 3 for part in parts[1:]):
            return match[0]
        return "፣ ".join(parts) + point + fraction

    text = notes.sub("groups", APOSTROPHES, lambda match: re.sub("['’]", ",", match[0]), text, "'’")
    text = notes.sub("groups", DOTTED, lambda match: match[1].replace(".", ",") + (f".{match[2]}" if match[2] else ""),
                     text, ".")
    text = notes.sub("groups", MARKED, lambda match: match[0].replace("፣", ","), text, "፣")
    text = notes.sub("list", COMMAS, commas, text, ",")
    text = notes.sub("groups", SPACED, lambda match: match[0].replace(" ", ","), text, " ")
    return NO_CENTS.sub("", BARE_POINT.sub("0.", text))


# Ethiopic numerals, letters beside digits

ETHIOPIC_NUMERAL = re.compile("[፩-፼]++")
RUN = re.compile(rf"(?<![{LETTERS}])[{LETTERS}]++")
APART_ORDINAL = re.compile(rf"(?<=\d)(?: ?[-–]? ?)({ORDINAL_ENDING})(?![{LETTERS}])")
APART_ENDING = re.compile(rf"(?<=\d) ({STRONG_ENDING}|ና(?= \d))(?![{LETTERS}])")
HYPHEN_ENDING = re.compile(rf"(?<=\d)[-–]({STRONG_ENDING})(?![{LETTERS}])")
SCORE_WITH_HYPHENS = re.compile(r"(?<=\d) ?[-–]ለ[-–] ?(?=\d)")
APART_PREFIX = re.compile(rf"(?<![{LETTERS}])([በለከየ]) (?=\d)")


def ethiopic_to_digits(text: str, notes: Notes) -> str:
    """፲፱፻፶ as 1950; a very long one sign by sign."""
    def digits(match: re.Match[str]) -> str:
        signs = [match[0]] if len(match[0]) <= LONGEST_NUMERAL else list(match[0])
        before, behind = match.string[max(0, match.start() - 1) : match.start()], match.string[match.end() :][:1]
        value = " ".join(str(ethiopic_number(sign)) for sign in signs)
        return " " * before.isdecimal() + value + " " * behind.isdecimal()

    return notes.sub("Ethiopic numeral", ETHIOPIC_NUMERAL, digits, text) if ETHIOPIC_NUMERAL.search(text) else text


def part_words(text: str, notes: Notes) -> str:
    """Words and digits apart (ኮቪድ19, 5km, 3ለ1), but endings and prefixes joined (88 ኛ, በ 2013, 1990-ዎቹ)."""
    def part(match: re.Match[str]) -> str:
        run, string = match[0], match.string
        behind_digit = match.start() > 0 and string[match.start() - 1].isdecimal()
        before_digit = string[match.end() : match.end() + 1].isdecimal()
        if behind_digit and before_digit and run in "xX":
            return " በ"
        if behind_digit and before_digit and run in PREFIXES:
            return f" {run}"
        if behind_digit and ENDING.fullmatch(run):
            return run + " " * before_digit
        return " " * behind_digit + run + " " * (before_digit and run not in PREFIXES)

    text = notes.sub("words and digits", RUN, part, text)
    text = notes.sub("ending", APART_ORDINAL, r"\1", text)
    text = notes.sub("ending", APART_ENDING, r"\1", text)
    text = notes.sub("ending", HYPHEN_ENDING, r"\1", text)
    return APART_PREFIX.sub(r"\1", SCORE_WITH_HYPHENS.sub(" ለ", text))


# Dates, verses, times, fractions

CHAIN = re.compile(rf"{FIRST}\d++(?:([./-])\d++)(?:\1\d++)++(?!\d)")
TIME = re.compile(r"(?<![\d.,/])(?<!\d[:፡])(\d{1,2})[:፡](\d{2})(?:[:፡](\d{2}))?(?![\d:፡]|[.,]\d)"
                  rf"(?: ?[ሰሠ][ዓአኣ]ት(ታት|[{ETHIOPIC}]{{0,2}})(?![{ETHIOPIC}]))?")
POINT_TIME = re.compile(rf"(ጠዋቱ|ጥዋቱ|ማለዳው|ቀኑ|ረፋዱ|ሰዓት በኋላ|ምሽቱ|ማታው|ሌሊቱ) (\d{{1,2}})\.([0-5]\d)"
                        rf"(?= ?[ሰሠ][ዓአኣ]ት(?![{ETHIOPIC}]))")
HOUR_BEFORE = re.compile(rf"(?<![{ETHIOPIC}])በ?[ሰሠ][ዓአኣ]ት[፡:፣]? ?$")
RATIO_NEAR = re.compile("ጥምርታ|ሬሾ|ሚዛን|ስኬል")
RACE_TIME = re.compile(rf"(?<![\d:፡.,/-])(\d{{1,2}})[:፡]([0-5]\d)(?:(\.\d{{1,3}})(?: ?ደቂቃ)?| ?ደቂቃ)(?![{ETHIOPIC}\d])")
BOOK = "|".join(sorted(BOOK_NAMES, key=len, reverse=True))
VERSE = re.compile(rf"(?<![{ETHIOPIC}])(?:(?:(?<!\d)([123]) )?([በለከየ]?)({BOOK})\.? ?|(?<![\d:.,]))"
                   r"(\d{1,3}) ?([:፡፥]) ?(\d{1,3})(?: ?[-–] ?(\d{1,3}))?(?![\d:])")
PAIR = re.compile(r"(?<![\d:፡])(\d++) ?[:፡፥] ?(\d++)(?![\d:፡])")
FRACTION = re.compile(rf"(?<![\d/⁄.,-])(?:(\d+) )?(\d{{1,3}})([/⁄])(\d{{1,3}})(?![\d/⁄]|[.,]\d)([{ETHIOPIC}]*)")
NO_FRACTION = re.compile("(?:አንቀጽ|አንቀፅ|ቁጥር|አዋጅ|ደንብ|መመሪያ|መዝገብ|ገጽ|ገፅ|ቤት|ዓመት|ቀን)[^።]{0,3}$")


def is_date(parts: Sequence[str]) -> bool:
    """True for day, month, year (month, day, year) or year, month, day."""
    first, second, third = map(int, parts)
    short = len(parts[0]) <= 2 and len(parts[1]) <= 2 and 0 < first and 0 < second
    return (short and len(parts[2]) in (2, 4) and min(first, second) <= 13 and max(first, second) <= 31) or (
        len(parts[0]) == 4 and 0 < second <= 13 and 0 < third <= 31 and len(parts[1]) <= 2 and len(parts[2]) <= 2)


def say_chain(match: re.Match[str]) -> str:
    """Three numbers or more with one sign between: a date, a version (2.0.1), a line-up (4-3-3), a file's number."""
    parts = match[0].split(match[1])
    if len(parts) == 3 and all(len(part) <= 4 for part in parts) and is_date(parts):
        return " ".join(str(int(part)) for part in parts)
    if match[1] == "-" and sum(map(len, parts)) >= 9:
        return digit_words(match[0])
    return (" ነጥብ " if match[1] == "." else " ").join(parts)


def say_verse(match: re.Match[str]) -> str:
    """Chapter and verse: behind a book, or with ፥ between them."""
    letter, prefix, book, chapter, mark, verse, last = match.groups()
    if not book and mark != "፥":
        return match[0]
    book_name = BOOK_NAMES[book].removeprefix("የ" if prefix else "") if book else ""
    name = (f"{letter}ኛ " if letter else "") + f"{prefix}{book_name} " if book else ""
    chapter_word = "" if book in ("ምዕራፍ", "ምዕ") else "ምዕራፍ "
    return f"{name}{chapter_word}{int(chapter)} ቁጥር {int(verse)}" + (f" እስከ {int(last)}" if last else "")


def say_time(match: re.Match[str]) -> str:
    """8:30 as ስምንት ሰዓት ተኩል, with a word for hour that follows; a ratio or more than a day's hours stays."""
    hour, minute, second, ending = match.groups()
    near = match.string[max(0, match.start() - 16) : match.end() + 12]
    named = HOUR_BEFORE.search(match.string[max(0, match.start() - 7) : match.start()])
    if int(hour) > 24 or int(minute) > 59 or RATIO_NEAR.search(near):
        return match[0]
    words = f"{int(hour)}" if named and not second else f"{int(hour)} ሰዓት"
    exact = int(second or 0) > 0
    words += {0: "", 30: " ተኩል"}.get(int(minute) if not exact else -1, f" ከ{int(minute)} ደቂቃ")
    words += f" ከ{int(second)} ሰከንድ" if exact else ""
    return attach(words, ending) if ending and ENDING.fullmatch(ending) else words + (
        f" {ending}" if ending and ending != "ታት" else "")


def say_race_time(match: re.Match[str]) -> str:
    """Minutes and seconds: 4:09.08, or before a word for minute."""
    minutes, seconds, fraction = match.groups()
    return f"{minutes} ደቂቃ ከ{int(seconds)}{fraction or ''} ሰከንድ"


def say_fraction(match: re.Match[str]) -> str:
    """½ and 1/2; a year's or a paragraph's slash is none and only parts."""
    whole, part, sign, parts, ending = match.groups()
    before = match.string[max(0, match.start() - 16) : match.start()]
    plain = part[0] != "0" and 0 < int(part) < int(parts) and (int(parts) <= 10) and not NO_FRACTION.search(before)
    lead = f"{whole} " if whole else ""
    if sign == "/" and not plain and not (ending.startswith("ኛ") and int(part) and int(parts)):
        return match[0]
    if ending.startswith("ኛ"):
        return f"{lead}{number_words(int(part))} {attach(number_words(int(parts)), ending)}"
    words = fraction_words(int(part), int(parts))
    if whole:
        words = "ተኩል" if words == "ግማሽ" else f"ከ{words}"
    return lead + (attach(words, ending) if ENDING.fullmatch(ending) else f"{words} {ending}")


def say_dates_and_times(text: str, notes: Notes) -> str:
    """Dates, verses, times, ratios and fractions as plainer numbers and words."""
    text = notes.sub("date", CHAIN, say_chain, text, "./-")
    text = notes.sub("verse", VERSE, say_verse, text, ":፡፥")
    text = notes.sub("time", POINT_TIME, r"\1 \2:\3", text, ".")
    text = notes.sub("time", RACE_TIME, say_race_time, text, ":፡")
    text = notes.sub("time", TIME, say_time, text, ":፡")
    text = notes.sub("ratio", PAIR, r"\1 ለ\2", text, ":፡፥")
    return notes.sub("fraction", FRACTION, say_fraction, text, "/⁄")


# Numbers

HAS_NUMERAL = re.compile("[0-9፩-፼]")
LONG_NUMERAL = re.compile(rf"(?<![\d.,+{LETTERS}])\d{{30,}}+(?![.,{LETTERS}])")
LETTERS_BEFORE = re.compile(rf"[{LETTERS}]+$")
SAID_NUMBER = re.compile(rf"({NUMBER})([{LETTERS}]*)")
MEASURED = re.compile(rf" (?:{SCALE_WORDS}|ብር|ዶላር|ዩሮ|ኪሎ|ሜትር|በመቶ|ሰዎች|ሰው|ሄክታር|ቶን|ኩንታል|ሊትር|ግራም|ካሬ|ዲግሪ)")


def say_numbers(text: str, notes: Notes, years: str) -> str:
    """Every number that is left, with its ending. After another number መቶ and ሺህ are አንድ መቶ and አንድ ሺህ."""
    end = -2

    def say(match: re.Match[str]) -> str:
        nonlocal end
        mode = years if not MEASURED.match(match.string, match.end()) else "thousands"
        words = numeral_words(match[1], mode)
        if match.start() == end + 1 and match.string[end] == " " and words.split(" ")[0] in ("መቶ", "ሺህ"):
            words = f"አንድ {words}"
        end = match.end() if not match[2] else -2
        before = LETTERS_BEFORE.search(match.string, max(0, match.start() - 4), match.start())
        if before and before[0] not in PREFIXES:
            words = f" {words}"
        return with_ending(words, match[2]) if match[2] else words

    return notes.sub("number", SAID_NUMBER, say, text)
