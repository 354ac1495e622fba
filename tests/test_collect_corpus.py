"""tools.collect_corpus: transcripts become the text to train a tokenizer on, and a report tells what is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKENIZER, read_jsonl

from tools import collect_corpus, train_tokenizer
from tools._common import ToolError, sha256_of
from tools.amharic_text import TEXT_RULES, normalise

ROWS = [{"text": "ሰላም  ለዓለም።"}, {"text": "5 ቤት"}, {"text": "ሰላም ለዓለም"}, {"text": "ሰላም ለዓለም።"}, {"text": " "},
        {"text": "« »"}, {"text": "ውሃ ok"}, {"text": "ልጅ", "split": "val"}, {"text": "Hi 5!", "language": "en"}]
TEXTS = ["ሰላም ለዓለም።", "አምስት ቤት", "ሰላም ለዓለም", "ውሃ ok", "Hi 5!"]


def write_rows(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    lines = (json.dumps({"id": str(n), "audio": f"{n}.wav", **row}) + "\n" for n, row in enumerate(rows))
    path.write_text("".join(lines))
    return path


def collect(*arguments: Path | str) -> None:
    collect_corpus.main([str(argument) for argument in arguments])


def test_every_transcript_of_training_is_there_once_as_it_is_spoken(tmp_path: Path) -> None:
    collect(write_rows(tmp_path / "recordings.jsonl"), "--output", tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines() == TEXTS
    collect(tmp_path, "--output", tmp_path / "corpus.jsonl")
    rows = read_jsonl(tmp_path / "corpus.jsonl")
    assert [row["text"] for row in rows] == TEXTS and [row["language"] for row in rows] == ["am"] * 4 + ["en"]


def test_several_files_become_one_corpus(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / "a.jsonl", [{"text": "ሰላም"}]),
             write_rows(tmp_path / "b.jsonl", [{"text": "ቤት"}] * 2)]
    collect(*files, "--output", tmp_path / "new" / "corpus.txt")
    assert (tmp_path / "new" / "corpus.txt").read_text(encoding="utf-8") == "ሰላም\nቤት\n"


def test_the_report_tells_lengths_characters_and_unknown_ones(tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    recordings = write_rows(tmp_path / "recordings.jsonl")
    collect(recordings, "--output", tmp_path / "corpus.txt")
    said = capsys.readouterr().out
    assert "5 different texts of 9 rows; left out: 1 without text, 1 of validation, 1 repeated, 1 with nothing" in said
    assert f"nothing is spoken in 1 texts, such as that of {recordings}, row 6" in said
    assert "characters in a text: 5 to 9, half have up to 7, 95 of 100 up to 9" in said
    assert "  5 |######################################## 2\n" in said and "  8 |#################### 1\n" in said
    assert "  ም 5 ለ 4 " in said
    assert "5 characters are unknown to the Amharic alphabet" in said
    assert f"k (U+006B) 1 times, first in {recordings}, row 7" in said
    collect(recordings, "--output", tmp_path / "corpus.txt", "--tokenizer", TOKENIZER)
    assert f"5 characters are unknown to {TOKENIZER}" in capsys.readouterr().out


def test_signs_that_cannot_be_said_and_latin_words_are_counted_in_the_report(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings = write_rows(tmp_path / "recordings.jsonl", [{"text": "ሰላም §"}, {"text": "§ ቤት → ☺"}, {"text": "ውሃ TV"}])
    collect(recordings, "--output", tmp_path / "corpus.txt")
    said = capsys.readouterr().out
    assert "2 texts lose signs that cannot be said: § (2), → (1)" in said and "passed over: ☺ (1)" in said
    assert f"leaves out the rows that lose signs, such as {recordings}, row 1, {recordings}, row 2: write" in said
    assert "1 texts have Latin words, which stay as they are: TV (1)" in said
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8") == "ሰላም\nቤት\nውሃ TV\n"


def test_a_corpus_of_another_language_says_how_to_train_on_it(tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    czech = {"text": "Je 5, pane!", "language": "cs"}
    recordings = write_rows(tmp_path / "recordings.jsonl", [czech])
    collect(recordings, "--output", tmp_path / "corpus.txt")
    assert f"--texts {tmp_path / 'corpus.txt'} --language cs --output" in capsys.readouterr().out
    write_rows(recordings, [czech, {"text": "5 ቤት"}])
    collect(recordings, "--output", tmp_path / "corpus.txt")
    assert "does not say which texts are am and which cs" in capsys.readouterr().out
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8") == "Je 5, pane!\nአምስት ቤት\n"
    collect(recordings, "--output", tmp_path / "corpus.jsonl")
    assert "does not say" not in capsys.readouterr().out


def test_a_corpus_for_a_tokenizer_is_read_by_its_rules(tmp_path: Path) -> None:
    tokenizer = tmp_path / "old.model"
    tokenizer.write_bytes(TOKENIZER.read_bytes())
    tokenizer.with_suffix(".yaml").write_text(f"sha256: {sha256_of(tokenizer)}\ntext_rules: 1\n")
    recordings = write_rows(tmp_path / "recordings.jsonl", [{"text": "ዓ.ም. 2013,2014"}])
    for flags, rules in (((), TEXT_RULES), (("--tokenizer", tokenizer), 1)):
        collect(recordings, "--output", tmp_path / "corpus.txt", *flags)
        assert (tmp_path / "corpus.txt").read_text(encoding="utf-8") == normalise("ዓ.ም. 2013,2014", rules) + "\n"


def test_bars_are_of_round_numbers_and_count_every_text() -> None:
    for lengths in ([7], [1, 2, 3], [10, 110, 111], list(range(1, 2000, 7))):
        lines = collect_corpus.histogram(lengths)
        assert len(lines) <= collect_corpus.BARS + 1
        assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == len(lengths)


def test_the_corpus_trains_a_tokenizer_as_the_transcripts_do(tmp_path: Path) -> None:
    recordings = write_rows(tmp_path / "recordings.jsonl", [{"text": text} for text in ("ሰላም ለዓለም።", "ቤት", "ok")])
    collect(recordings, "--output", tmp_path / "corpus.txt")
    models = []
    for texts in (recordings, tmp_path / "corpus.txt"):
        train_tokenizer.main(["--texts", str(texts), "--output", str(tmp_path / "a.model")])
        models.append((tmp_path / "a.model").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": ""}, {"text": "ልጅ", "split": "val"}], "no text to learn from: of 2 rows 1 have none, 1 are of val"),
    ([{"text": 5}], "line 1: text is 5"), ([], "holds no rows"),
    ([{"no": "text"}], "missing text"),
])
def test_bad_input_is_one_error_and_nothing_is_written(tmp_path: Path, rows: list[dict[str, Any]],
                                                       message: str) -> None:
    recordings = write_rows(tmp_path / "recordings.jsonl", rows)
    with pytest.raises(ToolError, match=message):
        collect(recordings, "--output", tmp_path / "corpus.txt")
    with pytest.raises(ToolError, match="is a file of recordings"):
        collect(write_rows(tmp_path / "b.jsonl"), "--output", tmp_path / "b.jsonl")
    assert not (tmp_path / "corpus.txt").exists()


def test_a_text_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes("ሰላም".encode("utf-16"))
    with pytest.raises(ToolError, match="corpus.txt: not UTF-8 text at byte 0"):
        train_tokenizer.main(["--texts", str(tmp_path / "corpus.txt"), "--output", str(tmp_path / "a.model")])
