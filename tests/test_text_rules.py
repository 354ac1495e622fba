"""Which text rules a program reads by, in one place; signs that cannot be said are counted and never trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TOKENIZER, read_jsonl
from test_preprocess import clip_row, make_recordings, run, write_rows

from tools import build_pairs, evaluate_voice, speak, text_rules, train_tokenizer
from tools._common import ToolError, sha256_of
from tools.amharic_text import TEXT_RULES, letters_of, read_aloud
from tools.made_with import of_manifest

YEARS = "ዓ.ም. 2013,2014"  # version 1 spells it otherwise


def tokenizer_in(folder: Path, **record: Any) -> Path:
    """A copy of the shipped tokenizer; `record` replaces values of its record, None takes the whole away."""
    path = folder / "t.model"
    path.write_bytes(TOKENIZER.read_bytes())
    if record != {"record": None}:
        found = {"sha256": sha256_of(path), "text_rules": TEXT_RULES, "languages": ["am"]} | record
        text_rules.record_path(path).write_text(yaml.safe_dump(found))
    return path


# Which rules


def test_the_choice_of_rules_loads_no_torch() -> None:
    code = "import sys; import tools.text_rules; assert not {'torch', 'numpy', 'trainers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_data_made_anew_is_read_by_the_rules_of_its_tokenizer_and_else_by_todays(tmp_path: Path) -> None:
    assert text_rules.rules_for_new(tokenizer_in(tmp_path, record=None)) == TEXT_RULES
    assert [text_rules.rules_for_new(tokenizer_in(tmp_path, text_rules=rules)) for rules in (1, 2)] == [1, 2]
    text_rules.record_path(tmp_path / "t.model").write_text("gpt: {text_rules: 1}\n")  # somebody's other file
    assert text_rules.rules_for_new(tmp_path / "t.model") == TEXT_RULES


@pytest.mark.parametrize(("record", "message"), [
    ({"sha256": "0" * 64}, "t.yaml: is the record of another tokenizer than .*t.model"),
    ({"text_rules": 3}, "t.yaml: made under text rules 3, and this program knows 1 and 2. Take a newer version"),
    ({"text_rules": "new"}, "t.yaml: made under text rules new"), ({"text_rules": True}, "made under text rules True"),
])
def test_a_record_that_does_not_fit_is_one_clear_error(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    tokenizer = tokenizer_in(tmp_path, **record)
    with pytest.raises(ToolError, match=message):
        text_rules.rules_for_new(tokenizer)
    text_rules.record_path(tokenizer).write_text("sha256: [")
    with pytest.raises(ToolError, match="t.yaml: cannot be read .* train the tokenizer again"):
        text_rules.rules_for_new(tokenizer)


def test_what_records_no_rules_is_of_version_1_and_an_unknown_version_is_named() -> None:
    assert text_rules.rules_of({}, "a") == 1 and text_rules.rules_of({"text_rules": 2}, "a") == 2
    with pytest.raises(ToolError, match="a.pth: made under text rules 3, .* knows 1 and 2. Take a newer version"):
        text_rules.rules_of({"text_rules": 3}, "a.pth")


def test_the_shipped_tokenizer_and_data_record_todays_rules() -> None:
    assert text_rules.read_record(TOKENIZER) == {"sha256": sha256_of(TOKENIZER), "text_rules": TEXT_RULES,
                                                 "languages": ["am"]}
    assert text_rules.rules_for_new(TOKENIZER) == TEXT_RULES
    assert of_manifest(ROOT / "processed_data" / "train_pairs.jsonl")["text_rules"] == TEXT_RULES


# What no voice says


def test_signs_that_may_be_said_are_lost_and_decoration_is_passed_over() -> None:
    found = text_rules.findings(read_aloud("§ ሰላም ☺★ «ለዓለም» привет → WHO \ufffd"))
    assert found == {"lost": ("§", "→", "\ufffd"), "passed over": ("☺", "★"), "other script": ("привет",),
                     "Latin": ("WHO",)}
    assert text_rules.lost_signs(read_aloud("§ ሰላም § →")) == "§ →"
    assert not text_rules.lost_signs(read_aloud("ሰላም ☺★♥ «ለዓለም» (ቤት) – 5% ፨ 👍🏽 • №5"))


def test_the_tally_counts_texts_and_names_the_most_frequent_first() -> None:
    tally = text_rules.Tally()
    for text in ("ሰላም § §", "§ ቤት →", "ውሃ ☺", "ልጅ"):
        tally.add(read_aloud(text))
    assert tally.lines() == ["2 texts lose signs that cannot be said: § (2), → (1)",
                             "1 texts have decoration, which is passed over: ☺ (1)"]


# Other languages


def test_letters_of_another_language_are_its_own_and_no_amharic() -> None:
    assert letters_of("Dobrý den, je 5 %!", "cs") == letters_of("dobrý DEN je 5", "cs") == "dobrýdenje5"
    assert letters_of("हिन्दी, 5।", "hi") == "हिन्दी5" and letters_of("ሐ", "ti") == "ሐ" != letters_of("ሐ", "am-ET")
    row = {"target_text": "Dobrý den, pane!", "language": "cs"}
    assert evaluate_voice.said_in(row, 2) == "dobrýdenpane"
    assert evaluate_voice.words_of(row) == {"Dobrý", "den", "pane"}


def test_rows_are_read_in_the_language_they_name() -> None:
    rows: list[dict[str, str]] = [{}, {"language": ""}, {"language": "cs"}, {"language": "am", "target_language": "cs"}]
    assert [text_rules.language_of(row) for row in rows] == ["am", "am", "cs", "cs"]


# The tokenizer


def test_a_tokenizer_records_its_rules_and_languages_and_reads_no_czech_as_amharic(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "5 ቤት §"}, {"text": "Je 5, pane.", "language": "cs"},
            {"text": "ü", "language": "de", "split": "val"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer.main(["--texts", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "t.model")])
    assert text_rules.read_record(tmp_path / "t.model") == {
        "sha256": sha256_of(tmp_path / "t.model"), "text_rules": TEXT_RULES, "languages": ["am", "cs"]}
    tokenizer = train_tokenizer.load_tokenizer(tmp_path / "t.model")
    assert tokenizer.unk_id() not in tokenizer.encode("Je 5, pane.") and tokenizer.unk_id() in tokenizer.encode("ü")
    assert "1 texts lose signs that cannot be said: § (1)" in capsys.readouterr().out
    (tmp_path / "t.txt").write_text("Je 5, pane.\n")
    train_tokenizer.main(["--texts", str(tmp_path / "t.txt"), "--language", "cs", "--output",
                          str(tmp_path / "t.model")])
    assert text_rules.read_record(tmp_path / "t.model")["languages"] == ["cs"]


def test_a_record_never_takes_the_place_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ሰላም\n")
    (tmp_path / "config.yaml").write_text("gpt: {}\n")
    for name, message in (("config.model", "would replace .*config.yaml"), ("a.yaml", "another, such as .*a.model")):
        with pytest.raises(ToolError, match=message):
            train_tokenizer.main(["--texts", str(tmp_path / "t.txt"), "--output", str(tmp_path / name)])
    assert (tmp_path / "config.yaml").read_text() == "gpt: {}\n" and len(list(tmp_path.iterdir())) == 2


# Speaking, preprocess, pairs


def test_recordings_are_spoken_by_the_rules_and_in_the_language_that_are_asked_for() -> None:
    texts = [{"id": "a", "text": YEARS}, {"id": "b", "text": "5", "language": "cs"}]
    for rules in (1, 2):
        first, second = speak.plan_recordings(texts, ["am"], False, rules)
        assert first["spoken"] == read_aloud(YEARS, rules=rules).text and first["text"] == YEARS
        assert (second["spoken"], second["language"]) == ("5", "cs")
    marks = {speak.made_with(speak.plan_recordings(texts, ["am"], False, rules)[0], 175, TOKENIZER) for rules in (1, 2)}
    assert len(marks) == 2  # a sound of other rules is not taken for finished


def test_rows_that_lose_a_sign_are_left_out_named_and_counted_and_decoration_costs_none(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rows = make_recordings(folder, 6)
    for number, text in enumerate(("§ ሰላም ቤት", "ሰላም ☺ ★ ውሃ", "«ልጅ» (መንገድ)"), 6):
        rows.append(clip_row(folder, number) | {"text": text})
    write_rows(folder, rows)
    printed = run(folder, tmp_path / "data")
    skipped, = read_jsonl(tmp_path / "data/skipped.jsonl")
    assert (skipped["id"], skipped["reason"]) == ("r6", "signs that cannot be said")
    assert "row 7 (r6): § in '§ ሰላም ቤት'. Write the words that are said" in skipped["detail"]
    assert "1 texts lose signs that cannot be said: § (1)" in printed and "☺ (1), ★ (1)" in printed
    assert "1 x signs that cannot be said: " in printed
    texts = {row["id"]: row["text"] for row in read_jsonl(tmp_path / "data/utterances.jsonl")}
    assert texts["r7"] == "ሰላም ውሃ" and texts["r8"] == "ልጅ መንገድ" and "r6" not in texts


@pytest.mark.parametrize("rules", [1, 2])
def test_data_follows_the_rules_of_its_tokenizer_and_records_them(tmp_path: Path, rules: int) -> None:
    folder, data = tmp_path / "in", tmp_path / "data"
    rows = make_recordings(folder, 6)
    write_rows(folder, [*rows, clip_row(folder, 6) | {"text": YEARS}])
    printed = run(folder, data, "--tokenizer", tokenizer_in(tmp_path, text_rules=rules))
    assert ("text rules 1 do not tell which signs they lose" in printed) == (rules == 1)
    assert read_jsonl(data / "utterances.jsonl")[6]["text"] == read_aloud(YEARS, rules=rules).text
    assert of_manifest(data / "train_pairs.jsonl")["text_rules"] == rules
    build_pairs.main(["--data-dir", str(data)])
    config = (data / "config.yaml").read_text()
    (data / "config.yaml").write_text(config.replace(f"text_rules: {rules}", "text_rules: 3"))
    with pytest.raises(ToolError, match="data/config.yaml: made under text rules 3, and this program knows 1 and 2"):
        build_pairs.main(["--data-dir", str(data)])
    with pytest.raises(ToolError, match="t.yaml: made under text rules 3"):
        run(folder, data, "--tokenizer", tokenizer_in(tmp_path, text_rules=3))


def test_czech_rows_keep_their_marks_and_numerals_and_their_sentences_stay_on_one_side(tmp_path: Path) -> None:
    folder, data = tmp_path / "in", tmp_path / "data"
    make_recordings(folder, 6)
    czech = ["Dobrý den, pane 5!", "Dobrý den pane 5", "Kde je dům?", "dobrý den; pane 5", "Tady.", "Kde, dům"]
    rows = [clip_row(folder, number) | {"text": text, "language": "cs", "split": "val" if number in (0, 2) else "train"}
            for number, text in enumerate(czech)]
    write_rows(folder, rows)
    every = write_rows(tmp_path, [{**row, "split": "train"} for row in rows])
    train_tokenizer.main(["--texts", str(every), "--output", str(tmp_path / "t.model")])
    run(folder, data, "--tokenizer", tmp_path / "t.model")
    assert {row["id"]: row["text"] for row in read_jsonl(data / "utterances.jsonl")} == {
        f"r{number}": czech[number] for number in (0, 2, 4, 5)}
    assert {row["id"]: row["reason"] for row in read_jsonl(data / "skipped.jsonl")} == dict.fromkeys(
        ("r1", "r3"), "sentence of validation")
