"""How Amharic is read aloud, version 2 of the rules: the table of cases, and what holds for every text."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools import _amharic_numbers, amharic_text
from tools._common import ToolError
from tools.amharic_text import normalise, normalise_for, read_aloud

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).parent / "amharic_text_cases.tsv"
LETTERS = _amharic_numbers.LETTERS
READABLE, WITH_OTHER_SCRIPTS = (re.compile(rf"(?:[{letters}]|[{amharic_text.PUNCTUATION}](?= |$)| (?! ))*")
                                for letters in (LETTERS, LETTERS + "а-я"))


def read_cases() -> list[tuple[str, str, str, str]]:
    """Input, spoken text, kind and source of every row; \\uXXXX in an input is a character that cannot be seen."""
    cases = []
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        written, spoken, kind, source = line.split("\t")
        cases.append((re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), written), spoken, kind, source))
    return cases


CASES = read_cases()
KINDS = sorted({kind for _, _, kind, _ in CASES})


@pytest.mark.parametrize("kind", KINDS)
def test_amharic_is_read_as_a_reader_reads_it(kind: str):
    wrong = [f"{written!r}: expected {spoken!r}, got {got!r}" for written, spoken, of, _ in CASES
             if of == kind and (got := normalise(written)) != spoken]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_hundreds_of_different_cases_with_their_sources():
    assert len({case[0] for case in CASES}) == len(CASES) >= 400
    assert all(spoken and source for _, spoken, _, source in CASES) and min(Counter(c[2] for c in CASES).values()) >= 3


def test_a_read_text_is_read_as_it_stands_and_holds_only_letters_and_marks():
    for _, spoken, _, _ in CASES:
        assert normalise(spoken) == spoken and READABLE.fullmatch(spoken), spoken


def test_no_case_of_the_table_loses_a_sign():
    assert not [written for written, *_ in CASES if read_aloud(written).unsaid]


def test_whatever_is_typed_only_letters_and_marks_come_out_and_stay_so():
    pieces = [*"0123456789፩፪፲፻፼ .,:;/-–=+×%$°½²#@&()«»\"'?!።፣፥፦፨፡¡…~<>^_|\\•\u200b\u0301", "ሀ", "በ", "ኛ", "ቱ", "ዎቹ",
              "ን", "ሰላም", "ዓ.ም.", "ት/ቤት", "ብር", "ሚሊዮን", "ሰዓት", "ዮሐ", "ሰኔ", "km", "WHO", "x", "я", "🙂", "+251", "00"]
    rng = random.Random(5)
    for number in range(3000):
        written = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 14)))
        options = {"latin": ("keep", "spell", "refuse")[number % 3], "years": ("thousands", "hundreds")[number % 2]}
        spoken = read_aloud(written, **options).text
        assert WITH_OTHER_SCRIPTS.fullmatch(spoken) and read_aloud(spoken, **options).text == spoken, repr(written)


@pytest.mark.parametrize("unit", [
    "፩", "1,", "1 000 ", "1.", "1-", "1/", "8:00-", "ሀ.", "ሀ/", "ዓ.ም. ", "ም/ጠ/ሚ/ር/", "ሀ", "$1 ", "1%", "½", "- ", ".",
    "፡", "a.", "🙂", "\u200b", "ሀ\u0301", "1=", "1+", "*1", "1ኛ ", "1<", "(",
])
def test_a_long_line_of_one_sign_is_read_in_one_pass(unit: str):
    """Patterns that look at every start for every end take minutes here."""
    assert READABLE.fullmatch(normalise((unit * 30_000)[:30_000]))


def test_a_line_of_100_000_digits_is_read_digit_by_digit():
    assert normalise("1" * 100_000) == " ".join(["አንድ"] * 100_000)
    assert normalise("1," * 50_000) == "፣ ".join(["አንድ"] * 50_000) + "፣"


# Versions, languages, choices


@pytest.mark.parametrize(("text", "expected"), [
    ("በ1983 ዓ.ም. 2013,2014", "በሺህ ዘጠኝ መቶ ሰማንያ ሦስት ዓም። ሁለት ሚሊዮን አሥራ ሦስት ሺህ ሁለት መቶ አንድ አራት"),
    ("ኮቪድ19 2ቱ", "ኮቪድአሥራ ዘጠኝ ሁለት ቱ"), ("ሰ\u200bላም ½", "ሰ ላም አንድ ሁለት"), ("ት/ቤት 5°C", "ትቤት አምስት C"),
    ("አለ\u0301 ፨ я", "አለ\u0301 я"),
])
def test_version_1_of_the_rules_reads_as_it_did_right_or_wrong(text: str, expected: str):
    assert normalise(text, rules=1) == expected == read_aloud(text, rules=1).text
    assert normalise(text, rules=2) != expected


def test_the_demo_set_reads_the_same_under_both_versions():
    texts = {json.loads(line)["target_text"] for line in
             (ROOT / "processed_data/val_pairs.jsonl").read_text(encoding="utf-8").splitlines()}
    texts |= set((ROOT / "processed_data/sources/udhr_am.txt").read_text(encoding="utf-8").splitlines()[1:])
    assert texts and not [text for text in texts if normalise(text, rules=1) != normalise(text)]


@pytest.mark.parametrize(("options", "message"), [
    ({"rules": 3}, "text rules 3 are unknown here; take 1 or 2"), ({"rules": 0}, "text rules 0"),
    ({"latin": "drop"}, "latin 'drop'"), ({"years": "both"}, "years 'both'"),
])
def test_a_version_or_choice_that_is_unknown_is_one_clear_error(options: dict[str, object], message: str):
    with pytest.raises(ToolError, match=message):
        read_aloud("ሰላም", **options)  # type: ignore[arg-type]


def test_other_languages_keep_their_marks_and_numerals():
    czech = "Dobrý den, je 5\u00a0% a\u00ad3.5; „ano“:  2013,2014"
    assert normalise_for("cs", czech) == "Dobrý den, je 5 % a3.5; „ano“: 2013,2014"
    assert normalise_for("cs", "u\u0301nor\ufeff\n") == "únor" and normalise_for("hi", "हि\u200bन्दी") == "हिन्दी"
    assert normalise_for("am-ET", "5") == normalise_for("AM", "5") == normalise_for("am", "5", 1) == "አምስት"
    assert read_aloud("5%", "cs").unsaid == ()


@pytest.mark.parametrize(("text", "expected"), [
    ("በ1983 ዓ.ም.", "በአሥራ ዘጠኝ መቶ ሰማንያ ሦስት ዓመተ ምሕረት።"), ("1990ዎቹ", "አሥራ ዘጠኝ መቶ ዘጠናዎቹ"), ("፲፱፻፶", "አሥራ ዘጠኝ መቶ ሃምሳ"),
    ("1100", "አሥራ አንድ መቶ"), ("1099", "ሺህ ዘጠና ዘጠኝ"), ("2015 ዓ.ም", "ሁለት ሺህ አሥራ አምስት ዓመተ ምሕረት"),
    ("1,990 ሰዎች", "ሺህ ዘጠኝ መቶ ዘጠና ሰዎች"), ("1500 ብር", "ሺህ አምስት መቶ ብር"), ("1990.5", "ሺህ ዘጠኝ መቶ ዘጠና ነጥብ አምስት"),
])
def test_years_by_hundreds_follow_cldr_up_to_1999_and_leave_amounts_alone(text: str, expected: str):
    assert read_aloud(text, years="hundreds").text == expected


def test_latin_words_are_kept_spelled_or_refused_and_always_counted():
    text = "የWHO ዘገባ በFacebook"
    assert read_aloud(text).text == text and read_aloud(text).latin == ("WHO", "Facebook")
    assert read_aloud("WHO ዘገባ", latin="spell").text == "ደብሊው ኤች ኦ ዘገባ"
    refused = read_aloud(text, latin="refuse")
    assert refused.text == "የ ዘገባ በ" and refused.unsaid == refused.latin == ("WHO", "Facebook")


# What was changed and what is lost


def test_what_cannot_be_said_is_listed_and_what_has_no_sound_is_not():
    reading = read_aloud("ሰላም ☺ «привет» § 5°C ★")
    assert reading.text == "ሰላም привет አምስት ዲግሪ ሴንቲግሬድ" and sorted(reading.unsaid) == ["§", "привет", "★", "☺"]
    assert read_aloud("ከዚህ በ|ላ | ሰላም").unsaid == ("|",)  # a letter of a font, lost on the way; and a table's bar
    assert not read_aloud("«ሰ\u200bላ\u0301ም» (ቤት)፨ – 5% ሕገ-ወጥ/ሌላ ¡ • \ufeff").unsaid


def test_every_change_is_told_with_what_stood_there():
    reading = read_aloud("በ2005 ዓ.ም. ኮቪድ19 $5 ሰ\u200bላም")
    changes = {(change.rule, change.before, change.after) for change in reading.changes}
    assert {("abbreviation", "ዓ.ም.", "ዓመተ ምሕረት"), ("number", "2005", "ሁለት ሺህ አምስት"), ("money", "$5", "5 ዶላር"),
            ("character", "\u200b", "")} <= changes
    assert read_aloud("ሰላም ለዓለም።").changes == ()


def run(*args: str, text: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "tools.amharic_text", *args], cwd=ROOT, input=text, text=True,
                          capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == status, done.stderr
    return done


def test_explain_shows_under_each_line_what_was_changed_and_counts_the_losses():
    lines = run("--explain", text="በ2005 ዓ.ም. ☺☺ WHO\nሰላም\nሰ\u200bላም\n").stdout.splitlines()
    assert lines[0] == "በሁለት ሺህ አምስት ዓመተ ምሕረት WHO" and "    abbreviation: ዓ.ም. -> ዓመተ ምሕረት" in lines
    assert "    NOT SAID: ☺ ☺" in lines and "    Latin: WHO" in lines and "    character: U+200B -> nothing" in lines
    assert lines[lines.index("ሰላም") + 1] == "    nothing to change"
    assert lines[-2:] == ["[Info] 3 lines: 2 changed, 1 losing signs or words, 1 with Latin words",
                          "[Info] Not said: ☺ (2)"]


def test_the_choices_of_the_rules_are_flags():
    assert run("normalise", "--rules", "1", text="ዓ.ም\n").stdout == "ዓም\n"
    spelled = run("normalise", "--years", "hundreds", "--latin", "spell", text="1990 TV\n").stdout
    assert spelled == "አሥራ ዘጠኝ መቶ ዘጠና ቲ ቪ\n"
    assert run("--language", "cs", text="5 %\n").stdout == "5 %\n"
    done = run("normalise", "--latin", "refuse", text="ሰላም\nየTV\n", status=1)
    assert done.stderr.startswith("[Error] standard input, line 2: Latin words (TV). ") and done.stdout == "ሰላም\n"
