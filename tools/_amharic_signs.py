"""Numerals with signs, version 2 of the Amharic text rules: money, measures, sums, ranges and scores.

What stands around a numeral is said in words; the numerals themselves stay digits for tools/_amharic_numbers.py.
"""

from __future__ import annotations

import re

from tools._amharic_numbers import (
    CASES,
    ETHIOPIC,
    FIRST,
    LATIN,
    LETTERS,
    NUMBER,
    SCALE_WORDS,
    Notes,
    attach,
    with_ending,
)

CURRENCIES = {"$": "ዶላር", "€": "ዩሮ", "£": "ፓውንድ", "¥": "የን", "₹": "ሩፒ", "₦": "ናይራ", "¢": "ሳንቲም", "₽": "ሩብል",
              "₺": "ሊራ", "₿": "ቢትኮይን"}
CODES = {"USD": "ዶላር", "US$": "ዶላር", "ETB": "ብር", "Birr": "ብር", "birr": "ብር", "Br": "ብር", "EUR": "ዩሮ",
         "GBP": "ፓውንድ"}
SCALE_LETTERS = {"K": "ሺህ", "M": "ሚሊዮን", "B": "ቢሊዮን", "bn": "ቢሊዮን", "m": "ሚሊዮን"}
UNIT_NAMES = {
    "km/h": "ኪሎ ሜትር በሰዓት", "kph": "ኪሎ ሜትር በሰዓት", "m/s": "ሜትር በሰከንድ", "km²": "ካሬ ኪሎ ሜትር", "m²": "ካሬ ሜትር",
    "cm²": "ካሬ ሴንቲ ሜትር", "m³": "ሜትር ኩብ", "km": "ኪሎ ሜትር", "cm": "ሴንቲ ሜትር", "mm": "ሚሊ ሜትር", "kg": "ኪሎ ግራም",
    "mg": "ሚሊ ግራም", "ml": "ሚሊ ሊትር", "mL": "ሚሊ ሊትር", "kWh": "ኪሎ ዋት ሰዓት", "kW": "ኪሎ ዋት", "MW": "ሜጋ ዋት",
    "GW": "ጊጋ ዋት", "MB": "ሜጋ ባይት", "GB": "ጊጋ ባይት", "KB": "ኪሎ ባይት", "TB": "ቴራ ባይት", "ha": "ሄክታር", "Hz": "ኸርዝ",
    "kHz": "ኪሎ ኸርዝ", "MHz": "ሜጋ ኸርዝ", "m": "ሜትር", "g": "ግራም", "l": "ሊትር", "L": "ሊትር",
}

# Money, per cent, degrees, units

SIGNS = "".join(CURRENCIES)
AMOUNT = rf"{NUMBER}(?: ?[-–] ?{NUMBER})?+"
SCALED = rf"(?: ?({SCALE_WORDS})(?![{LETTERS}])| ?(bn|[KMBm])(?![{LETTERS}]))?"
MONEY_BEFORE = re.compile(rf"(US ?\$|(?<![{LETTERS}])(?:USD|ETB|EUR|GBP|Br) |[{SIGNS}]) ?({AMOUNT}){SCALED}"
                          rf"(?: ?(?:ዶላር|ዩሮ|ፓውንድ)(?=$|[^{ETHIOPIC}]))?((?:{CASES})(?![{LETTERS}])|)")
MONEY_BEHIND = re.compile(rf"(?<=\d) ?([{SIGNS}]|(?:USD|ETB|EUR|GBP|Br|Birr|birr)(?![{LETTERS}]))([{ETHIOPIC}]*)")
CENTS = re.compile(rf"{FIRST}(?<![-–])(\d++(?:,\d{{3}})*+)\.(\d\d) (ብር|ዶላር|ዩሮ)(?![{ETHIOPIC}])(?! ?[-–])")
CENTS_BEHIND = re.compile(rf"(?<![{ETHIOPIC}])([በለከየ]?)ብር (\d++(?:,\d{{3}})*+)\.(\d\d)"
                          rf"(?!\d|[.,]\d| ?(?:{SCALE_WORDS}))")
RATE_OF_MONEY = re.compile(rf"(\d (?:ዶላር|ዩሮ|ፓውንድ|ብር))/(?=[{ETHIOPIC}])(?!ብር|ዶላር|ዩሮ|ሳንቲም|በ(?!ርሜል))")
PER = {"%": "በመቶ", "‰": "በሺህ"}
PER_BEHIND = re.compile(rf"(?<=\d) ?([%‰])([{ETHIOPIC}]*)")
PER_BEFORE = re.compile(rf"([%‰])({NUMBER})")
DEGREES = re.compile(rf"(?<=\d) ?[°º](?: ?([CF](?![{LATIN}])|[ሴፋ](?![{ETHIOPIC}])\.?))?([{ETHIOPIC}]*)")
SCALES_OF_HEAT = {"C": " ሴንቲግሬድ", "ሴ": " ሴንቲግሬድ", "F": " ፋራናይት", "ፋ": " ፋራናይት"}
MINUTES = re.compile(r"(?<=\d)([′″])")
UNITS_BEHIND = re.compile(r"(?:(?<=\d) ?|(?<=ሺህ) |(?<=ሚሊዮን) |(?<=ሚሊየን) |(?<=ቢሊዮን) |(?<=ቢሊየን) )"
                          rf"({'|'.join(map(re.escape, sorted(UNIT_NAMES, key=len, reverse=True)))})"
                          rf"(?![{LATIN}²³/\d])([{ETHIOPIC}]*)")


def amount_words(whole: str, name: str, cents: str) -> str:
    """3.75 birr as three birr with 75 cents: what a cashier and a newsreader say."""
    return f"{whole} {name} ከ{int(cents)} ሳንቲም" if whole != "0" else f"{int(cents)} ሳንቲም"


def say_money(match: re.Match[str]) -> str:
    """An amount with its sign in front: the currency goes behind it, and behind ሚሊዮን."""
    sign, amount, scale, letter, ending = match.groups()
    name = CURRENCIES.get(sign.strip()[-1]) or CODES[sign.strip()]
    scale = scale or SCALE_LETTERS.get(letter or "")
    if not scale and (cents := re.fullmatch(r"([\d,]+)\.(\d\d)", amount)) and sign[-1] in "$€":
        return amount_words(cents[1], name, cents[2]) + ending
    return amount + (f" {scale}" if scale else "") + " " + attach(name, ending)


def say_measures(text: str, notes: Notes) -> str:
    """Money, per cent, degrees and units in words, behind their number."""
    text = notes.sub("money", MONEY_BEFORE, say_money, text)
    text = notes.sub("money", MONEY_BEHIND,
                     lambda match: " " + with_ending((CURRENCIES | CODES)[match[1]], match[2]), text)
    text = notes.sub("money", CENTS, lambda match: amount_words(match[1], match[3], match[2]), text, ".")
    text = notes.sub("rate", RATE_OF_MONEY, r"\1 በ", text, "/")
    text = notes.sub("money", CENTS_BEHIND, lambda match: match[1] + amount_words(match[2], "ብር", match[3]), text, ".")
    text = notes.sub("per cent", PER_BEHIND, lambda match: " " + with_ending(PER[match[1]], match[2]), text, "%‰")
    text = notes.sub("per cent", PER_BEFORE, lambda match: f"{match[2]} {PER[match[1]]} ", text, "%‰")
    text = notes.sub("degrees", DEGREES, lambda match: " " + with_ending(
        "ዲግሪ" + SCALES_OF_HEAT.get((match[1] or "")[:1], ""), match[2]), text, "°º")
    text = notes.sub("degrees", MINUTES, lambda match: {"′": " ደቂቃ ", "″": " ሰከንድ "}[match[1]], text, "′″")
    return notes.sub("unit", UNITS_BEHIND, lambda match: " " + with_ending(UNIT_NAMES[match[1]], match[2]), text)


# Sums, signs, ranges, scores

OPERATORS = {"+": " ሲደመር ", "-": " ሲቀነስ ", "−": " ሲቀነስ ", "–": " ሲቀነስ ", "×": " ሲባዛ በ", "*": " ሲባዛ በ", "x": " ሲባዛ በ",
             "X": " ሲባዛ በ", "÷": " ሲካፈል ለ", "/": " ሲካፈል ለ"}
SUM = re.compile(rf"{FIRST}(?<![-−–+×*xX÷/])(?<![-−–+×*xX÷/] ){NUMBER}(?: ?[-−–+×*xX÷/] ?{NUMBER})++(?= ?=)")
OPERATOR = re.compile(rf" ?([-−–+×*xX÷/]) ?(?={NUMBER})")
SIZE = re.compile(rf"(?<=\d) ?(?:[xX]|×(?= ?{NUMBER} (?:ሜትር|ሴንቲ|ሚሊ|ኪሎ|ካሬ))) ?(?=\d)")
SLASH = re.compile(r"(?<=\d) ?/ ?(?=\d)")
TIMES = re.compile(r"(?<=\d) ?\* ?(?=\d)")
COMPARED = {">": "ይበልጣል", "<": "ያንሳል", "≥": "ይበልጣል ወይም እኩል ነው", "≤": "ያንሳል ወይም እኩል ነው"}
LIMITED = {">": "በላይ", "<": "በታች", "≥": "ጀምሮ", "≤": "ያልበለጠ"}
MORE = re.compile(rf"{FIRST}({NUMBER}) ?([<>≤≥]) ?({NUMBER})")
MORE_THAN = re.compile(rf"([<>≤≥]) ?({NUMBER})")
TEMPERATURE = re.compile(rf"(?<![\d{LETTERS})])(?<!እስከ )[-−–]({NUMBER})(?= ዲግሪ)")
APART_NEGATIVE = re.compile(rf"(?<![{ETHIOPIC}])([በለከየ]) [-−–](?=\d)")
NEGATIVE = re.compile(rf"(?:(?<![\d{LETTERS})])|(?<=(?<![{ETHIOPIC}])[በለከየ]))[-−–](?=\d)")
# Names that a number follows; a hyphen in between is no minus. A word of one letter is such a name, too (ቱ -154).
NAMED = re.compile(rf"(?:ኮቪድ|ኮሮና|ቫይረስ|ቦይንግ|ኤርባስ|አፖሎ|ሚግ|ሱኮይ|[{LATIN}]|(?<![{ETHIOPIC}])(?![በለከ] )[{ETHIOPIC}]) $")
RANGE = re.compile(rf"{FIRST}(?<![-–])({NUMBER}) ?[-–—~] ?({NUMBER})(?! ?[-–]\d)")
RANGE_OF_MEASURES = re.compile(r"(\d(?:ኛ| በመቶ| በሺህ| ሰዓት| ሰዓት ተኩል| ደቂቃ| ተኩል| ብር| ዶላር| ዲግሪ(?: ሴንቲግሬድ| ፋራናይት)?))"
                               r" ?[-–—] ?(?=\d|[በለከየ]\d)")
MONTHS = ("መስከረም|ጥቅምት|ኅዳር|ህዳር|ሕዳር|ታኅሣሥ|ታህሳስ|ታኅሳስ|ታህሣሥ|ጥር|የካቲት|መጋቢት|ሚያዝያ|ሚያዚያ|ግንቦት|ሰኔ|ሐምሌ|ሀምሌ|ነሐሴ|ነሀሴ"
          "|ጳጉሜን|ጳጉሜ|ጃንዋሪ|ጃንዩዌሪ|ፌብሯሪ|ማርች|ኤፕሪል|ሜይ|ጁን|ጁላይ|ኦገስት|ሴፕቴምበር|ኦክቶበር|ኖቬምበር|ዲሴምበር")
DAYS = "ሰኞ|ማክሰኞ|ረቡዕ|ሐሙስ|ሀሙስ|ዓርብ|አርብ|ቅዳሜ|እሑድ|እሁድ"
RANGE_OF_DATES = re.compile(rf"(\d(?: ቀን)?) ?[-–—] ?(?=(?:{MONTHS})(?![{ETHIOPIC}]))")
RANGE_OF_DAYS = re.compile(rf"(?<![{ETHIOPIC}])([በለከየ]?(?:{DAYS}|{MONTHS})) ?[-–—] ?"
                           rf"(?=(?:{DAYS}|{MONTHS})(?![{ETHIOPIC}]))")
MONTH_BEFORE = re.compile(f"(?:{MONTHS}) ?$")
AIRCRAFT = re.compile(rf"(?:ቦይንግ|ኤርባስ|(?<![{ETHIOPIC}])ኤ|(?<![{LATIN}])[AB]) ?$")
SCORE_NEAR = re.compile(rf"ሸ[ነን][ፈፉፋፌፍፎፏ]|ጨዋታ|አቻ(?!ም)|መለያ ምት|(?<![{ETHIOPIC}])(?:በ?ድል(?!ድ)|ውጤት|ግብ(?![ርፅጽ])"
                        rf"|ጎል(?![ማበ])|ረ(?:ታ|ቱ|ታች|ትቶ|ትታ)(?![{ETHIOPIC}]))")


def say_sum(match: re.Match[str]) -> str:
    """The signs between the numbers of a sum in words."""
    return OPERATOR.sub(lambda sign: OPERATORS[sign[1]], match[0])


def say_range(match: re.Match[str]) -> str:
    """እስከ from a lower number to a higher one, ለ between the two numbers of a score."""
    first, last = (float(number.replace(",", "")) for number in match.groups())
    near = match.string[max(0, match.start() - 40) : match.end() + 40]
    whole = not {",", "."} & set(match[0])
    before = match.string[max(0, match.start() - 12) : match.start()]
    if AIRCRAFT.search(before):
        return f"{match[1]} {match[2]}"
    played = SCORE_NEAR.search(near) is not None
    score = whole and before[-1:] != "ከ" and not MONTH_BEFORE.search(before) and (
        (max(first, last) <= 20 and (first >= last or played)) or (played and last <= first <= 200))
    return f"{match[1]} {'ለ' if score else 'እስከ '}{match[2]}"


def say_negative(match: re.Match[str]) -> str:
    """A minus in front of a number, but not the hyphen of a name (ኮቪድ -19)."""
    return match[0] if NAMED.search(match.string[max(0, match.start() - 10) : match.start()]) else "አሉታዊ "


def say_operators(text: str, notes: Notes) -> str:
    """Signs between numbers and in front of one, in words."""
    text = notes.sub("sum", SUM, say_sum, text, "=")
    text = SLASH.sub(" ", notes.sub("size", SIZE, " በ", text))
    text = notes.sub("comparison", MORE, lambda match: f"{match[1]} ከ{match[3]} {COMPARED[match[2]]}", text, "<>≤≥")
    text = notes.sub("comparison", MORE_THAN, lambda match: f" ከ{match[2]} {LIMITED[match[1]]} ", text, "<>≤≥")
    text = notes.sub("range", RANGE, say_range, text, "-–—~")
    text = notes.sub("range", RANGE_OF_MEASURES, r"\1 እስከ ", text, "-–—")
    text = notes.sub("range", RANGE_OF_DATES, r"\1 እስከ ", text, "-–—")
    text = notes.sub("sign", TIMES, " ሲባዛ በ", text, "*")
    text = notes.sub("minus", APART_NEGATIVE, r"\1አሉታዊ ", text, "-−–")
    text = notes.sub("minus", TEMPERATURE, r"ከዜሮ በታች \1", text, "-−–")
    text = notes.sub("minus", NEGATIVE, say_negative, text, "-−–")
    return text

