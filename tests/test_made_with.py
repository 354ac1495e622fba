"""tools.made_with: what both sides record is compared, what differs names both, what is not recorded is let through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, trainer

from tools import made_with
from tools._common import ToolError

ALL = made_with.record("embedded", "a" * 64, 1024, 21.533203125, "b" * 64, 1, "indextts2", "d" * 64)


def test_a_record_holds_every_key_but_those_without_a_value_and_survives_yaml(tmp_path: Path):
    assert list(ALL) == list(made_with.KEYS)
    plain = made_with.record("embedded", "a" * 64, 1024, 21.533203125, "b" * 64, 1)
    assert plain == {key: value for key, value in ALL.items() if key not in ("front_end", "conditioning_sha256")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": ALL | {"name": "x"}}))
    for manifest in ("train_pairs.jsonl", "train_pairs.jsonl::am"):
        assert made_with.of_manifest(f"{tmp_path}/{manifest}") == ALL


@pytest.mark.parametrize("content", ["", "[]", "dataset: 5", "dataset:", "gpt: {}", "dataset: {codec_sha256: ''}",
                                     "dataset: {num_codes: many, text_rules: true, codec_sha256: 5}"])
def test_what_is_not_recorded_or_no_value_is_none(content: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(content)
    assert made_with.of_manifest(tmp_path / "m.jsonl") == {} == made_with.of_manifest(tmp_path / "nowhere/m.jsonl")


def test_a_record_that_cannot_be_read_is_one_error(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("dataset: {")
    with pytest.raises(ToolError, match="config.yaml: cannot be read") as raised:
        made_with.of_manifest(tmp_path / "m.jsonl")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("key", "other", "said"), [
    ("features", "indextts2", "features is embedded in A, but indextts2 in B"),
    ("codec_sha256", "c" * 64, "codec_sha256 is aaaaaaaaaaaa in A, but cccccccccccc in B"),
    ("num_codes", 8192, "num_codes is 1024 in A, but 8192 in B"),
    ("codes_per_second", 25.0, "codes_per_second is 21.5332 in A, but 25 in B"),
    ("tokenizer_sha256", "c" * 64, "tokenizer_sha256 is bbbbbbbbbbbb in A, but cccccccccccc in B"),
    ("text_rules", 2, "text_rules is 1 in A, but 2 in B"),
    ("front_end", "another", "front_end is indextts2 in A, but another in B"),
])
def test_every_key_that_differs_is_named_with_both_sides(key: str, other: Any, said: str):
    assert made_with.differences("A", ALL, "B", ALL | {key: other}) == [said]
    unknown = {name: value for name, value in ALL.items() if name != key}
    assert made_with.differences("A", ALL, "B", unknown) == made_with.differences("A", ALL, "B", ALL) == []
    with pytest.raises(ToolError, match=f"^{said}. Give files that belong together"):
        made_with.require_same("A", ALL, "B", ALL | {key: other})


def test_a_checkpoint_of_before_tells_its_codec_where_its_manifests_agree():
    def checkpoint(*codecs: str) -> dict[str, Any]:
        return {"tokenizer": {"sha256": "t"}, "manifests": {"train": [{"codec_sha256": codec} for codec in codecs]}}

    assert made_with.of_checkpoint(checkpoint("a", "a", "")) == {"tokenizer_sha256": "t", "codec_sha256": "a"}
    for codecs in ((), ("",), ("a", "b")):
        assert made_with.of_checkpoint(checkpoint(*codecs)) == {"tokenizer_sha256": "t"}
    new = checkpoint("a") | {"made_with": {"codec_sha256": "new", "num_codes": 5}}
    assert made_with.of_checkpoint(new) == {"tokenizer_sha256": "t", "codec_sha256": "new", "num_codes": 5}
    for foreign in ({}, {"manifests": None, "tokenizer": "x", "made_with": []}, {"manifests": {"train": [None]}}):
        assert made_with.of_checkpoint(foreign) == {}


def test_a_config_tells_the_codes_of_its_model(tmp_path: Path):
    path = tmp_path / "indextts2.yaml"
    path.write_text(yaml.safe_dump({"gpt": {"start_mel_token": 8192, "stop_mel_token": 8193}}))
    assert made_with.of_config(path) == {"num_codes": 8192}
    assert made_with.of_config(ROOT / "processed_data/config.yaml")["codec_sha256"]
    path.write_text("gpt: {start_mel_token: x}")
    assert made_with.of_config(path) == {}


def test_nobody_loads_torch_to_compare():
    code = "import sys; import tools.made_with; assert not {'torch', 'numpy', 'trainers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_trainer_which_has_its_own_version_decides_alike(tmp_path: Path):
    assert list(trainer.MADE_WITH) == list(made_with.KEYS)
    changed = [ALL | {key: other} for key, other in (("features", "indextts2"), ("codec_sha256", "c" * 64),
               ("num_codes", 8192), ("codes_per_second", 25.0), ("tokenizer_sha256", "c" * 64), ("text_rules", 2),
               ("conditioning_sha256", "c" * 64))]
    for other in (ALL, {}, {"num_codes": 1024}, *changed):
        problems = trainer.compare_made_with([("A", ALL), ("B", other)])[1]
        assert len(problems) == len(made_with.differences("A", ALL, "B", other))
        assert all("A (" in problem and "match B" in problem for problem in problems)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": other}))
        assert trainer.recorded_beside(tmp_path / "pairs.jsonl") == made_with.of_manifest(tmp_path / "pairs.jsonl")
    manifests = {"train": [{"codec_sha256": "a"}, {"codec_sha256": ""}]}
    two = {"train": [{"codec_sha256": "a"}, {"codec_sha256": "b"}]}
    for content in ({"made_with": ALL}, {"tokenizer": {"sha256": "t"}, "manifests": manifests}, {"model": {}},
                    {"tokenizer": {"sha256": "t"}, "manifests": two}):
        assert trainer.recorded_in(content) == made_with.of_checkpoint(content)
