"""Large data sets: what a row keeps in memory, and that rows in columns say and refuse what rows always did."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_jsonl

from benchmarks import scale
from trainers import train_gpt_v2 as trainer

MODEL = trainer.model_config_from(scale.MODEL, "config.yaml")


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 rows in three shards; all arrays hold zeros."""
    monkeypatch.setattr(scale, "ROWS_OF_A_SHARD", 100)
    return scale.make_manifest(tmp_path, 300)


def rewrite(manifest: Path, number: int, **values: Any) -> None:
    rows = read_jsonl(manifest)
    rows[number] |= values
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refusal(manifest: Path) -> str:
    with pytest.raises(trainer.UserError) as error:
        trainer.ManifestDataset([str(manifest)], MODEL)
    return str(error.value)


def test_a_row_is_what_its_line_says(manifest: Path):
    dataset = trainer.ManifestDataset([str(manifest), f"{manifest}::en"], MODEL)
    for i, line in ((0, 0), (299, 299), (417, 117)):
        row, record = dataset.rows[i], read_jsonl(manifest)[line]
        language = ["am", "en"][i // 300]
        assert (row.id, row.line, row.manifest, row.language) == (record["id"], line + 1, i // 300, language)
        assert (row.text_len, row.code_len) == (record["target_text_len"], record["target_code_len"])
        assert row.parts[1] == (str(manifest.parent / record["target_codes_path"]), record["target_codes_start"])
    assert len(dataset) == 600 and dataset.languages == ["am", "en"]


def test_many_rows_at_once_are_read_as_each_by_itself(manifest: Path, monkeypatch: pytest.MonkeyPatch):
    """Empty lines, NaN and rows that lack a start come in the middle; 300 rows are three reads of the file."""
    rewrite(manifest, 150, prompt_duration=float("nan"), target_language="EN")
    lines = manifest.read_text().splitlines()
    lines[200] = lines[200].replace(f'"target_codes_start": {json.loads(lines[200])["target_codes_start"]}, ', "")
    manifest.write_text("\n\n".join(lines[:160]) + "\n".join(["", *lines[160:]]))  # the last one without an end

    def read() -> tuple[Any, ...]:
        rows = trainer.Rows()
        rates = trainer.read_manifest(str(manifest), rows, "prompt", lambda text: None)
        rows.finish()
        return rates, rows.digest.hexdigest(), [rows[i] for i in range(len(rows.table))]

    at_once = read()
    monkeypatch.setattr(trainer, "usual_columns", lambda records, emo_source: [])
    assert read() == at_once
    rows = at_once[2]
    assert len(rows) == 300 and rows[150].language == "en" and rows[150].line == 301
    assert rows[200].parts[1][1] is None and rows[199].parts[1][1] is not None


@pytest.mark.parametrize("number,values,fault", [
    (0, {"target_text_len": 0}, ":1: target_text_len is 0, not a whole number of at least 1"),
    (140, {"id": ""}, ":141: missing id"), (299, {"target_code_len": "9"}, ":300: target_code_len is '9'"),
    (299, {"target_codes_path": 3}, ":300: missing target_codes_path"),
    (150, {"prompt_condition_start": -1}, ":151: prompt_condition_start is -1")])
def test_of_many_rows_read_at_once_the_bad_one_is_named(manifest: Path, number: int, values: dict[str, Any],
                                                        fault: str):
    rewrite(manifest, number, **values)
    assert fault in refusal(manifest)


def test_of_rows_that_begin_with_other_languages_the_first_is_named(manifest: Path):
    for number, language in ((40, "zh"), (20, "xx"), (30, "en"), (50, "ja")):  # the second is no language of the model
        rewrite(manifest, number, target_language=language)
    with pytest.raises(trainer.UserError, match=":31: its text begins with the token of 'en'"):
        trainer.read_manifest(f"{manifest}::am", trainer.Rows(True), "prompt", lambda text: None)


def test_the_fingerprint_is_that_of_ids_lengths_and_order(manifest: Path):
    rewrite(manifest, 7, id="ሰላም \" \\ \u0001", target_code_len=50)
    digest = hashlib.sha256()
    for row in read_jsonl(manifest):
        digest.update(json.dumps([row["id"], row["target_text_len"], row["target_code_len"]]).encode())
    assert trainer.ManifestDataset([str(manifest)], MODEL).fingerprint == digest.hexdigest()


def test_a_row_takes_less_than_150_bytes(manifest: Path):
    rows = trainer.ManifestDataset([str(manifest)], MODEL).rows
    assert rows.table.nbytes + len(rows.ids) + rows.ends.itemsize * len(rows.ends) < 150 * 300
    assert len(rows.files) == 3  # what all rows of a shard share


def test_rows_with_files_of_their_own_stand_among_those_of_shards(manifest: Path):
    np.save(manifest.with_name("own.npy"), np.full(60, 5))
    rows = read_jsonl(manifest)
    del rows[5]["target_codes_start"]
    rows[5]["target_codes_path"] = "own.npy"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = trainer.ManifestDataset([str(manifest)], MODEL)
    assert dataset[5].codes.tolist() == [5] * 60 and dataset[6].codes.tolist() == [0] * 60


@pytest.mark.parametrize("place,named", [(3 * 60 + 59, ":104: "), (42 * 60, ":143: ")])
def test_a_wrong_code_is_named_with_a_row_that_uses_it(manifest: Path, place: int, named: str):
    codes = np.load(manifest.parent / "shard_001_of_003/codes.npy", mmap_mode="r+")
    codes[place] = 64
    assert f"{manifest}{named}code 64 is outside 0..63" in refusal(manifest)


def test_a_wrong_code_that_no_row_uses_is_none(manifest: Path):
    rewrite(manifest, 3, target_code_len=59)
    codes = np.load(manifest.parent / "shard_000_of_003/codes.npy", mmap_mode="r+")
    codes[3 * 60 + 59] = -1
    assert len(trainer.ManifestDataset([str(manifest)], MODEL)) == 300


@pytest.mark.parametrize("values,fault", [
    ({"target_codes_start": 2**62}, ":18: codes 4611686018427387904 to"),
    ({"target_codes_start": 2**63}, ":18: target_codes_start is 9223372036854775808, not a whole number"),
    ({"target_codes_start": 2**70}, ":18: target_codes_start is 1.1805916207174113e+21, not a whole number"),
    ({"target_codes_start": True}, ":18: target_codes_start is True, not a whole number"),
    ({"target_code_len": 402}, ":18: 20 text tokens and 402 codes; the model takes at most")])
def test_a_number_that_cannot_be_is_named_with_its_line(manifest: Path, values: dict[str, Any], fault: str):
    rewrite(manifest, 17, **values)
    assert f"{manifest}{fault}" in refusal(manifest)


def test_what_only_the_slower_reader_takes_is_read(manifest: Path):
    rewrite(manifest, 17, prompt_duration=float("nan"))
    assert "NaN" in manifest.read_text()
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    assert len(trainer.ManifestDataset([str(manifest)], MODEL)) == 300


def test_without_orjson_the_same_is_read(manifest: Path, monkeypatch: pytest.MonkeyPatch):
    fast = trainer.ManifestDataset([str(manifest)], MODEL)
    monkeypatch.setattr(trainer, "read_json", json.loads)
    slow = trainer.ManifestDataset([str(manifest)], MODEL)
    assert slow.fingerprint == fast.fingerprint and np.array_equal(slow.rows.table, fast.rows.table)


def test_progress_is_told_after_two_seconds(manifest: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    trainer.ManifestDataset([str(manifest)], MODEL, progress=told.append)
    assert not told
    clock = iter(range(0, 100_000, 3))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    trainer.ManifestDataset([str(manifest)], MODEL, progress=told.append)
    assert "checking" in told[0] and "text_ids.npy" in told[0]
