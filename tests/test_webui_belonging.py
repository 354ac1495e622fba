"""The page says beside a field which of its files were not made for each other, before anything starts."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tools import made_with
from tools._common import sha256_of
from webui import belonging
from webui.belonging import belonging_problems, training_choice
from webui.readers import CheckpointTable, Inspection
from webui.texts import TEXTS, say
from webui.training_tab import translated
from webui.workspace import Workspace


class Known(CheckpointTable):
    """Knows at once what is recorded in which file."""

    def __init__(self, records: dict[str, Any]) -> None:
        super().__init__()
        self.records = records

    def look_at(self, directory: Path, paths: Any) -> Inspection:
        return Inspection([{"made_with": self.records[path.name]} for path in paths if path.name in self.records])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two data sets, a codec each, a tokenizer, and a configuration of IndexTTS2's sizes."""
    workspace = Workspace.open(tmp_path)
    (tmp_path / "t.model").write_bytes(b"tokenizer")
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("train.jsonl", "val.jsonl"):
            (folder / file).touch()
        (folder / "codec.pt").write_text(name)
        record = made_with.record("embedded", sha256_of(folder / "codec.pt"), 1024, 21.5332,
                                  sha256_of(tmp_path / "t.model"), 1)
        (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": record}))
    (tmp_path / "indextts2.yaml").write_text("gpt: {start_mel_token: 8192, stop_mel_token: 8193}")
    for name in ("gpt.pth", "a.pth"):
        (tmp_path / name).touch()
    return workspace


def record_of(workspace: Workspace, name: str) -> made_with.MadeWith:
    return made_with.of_manifest(workspace.root / name / "train.jsonl")


@pytest.mark.parametrize(("form", "field", "said"), [
    ({}, None, ""), ({"tokenizer": "t.model"}, None, ""), ({"config": "one/config.yaml"}, None, ""),
    ({"val_manifests": "two/val.jsonl::am"}, "val_manifests", "codec_sha256 is .* in one/train.*, but .* in two/val"),
    ({"train_manifests": "one/train.jsonl\ntwo/train.jsonl"}, "train_manifests", "in two/train.jsonl"),
    ({"tokenizer": "one/codec.pt"}, "tokenizer", "tokenizer_sha256 is .* in one/train.jsonl, but .* in one/codec.pt"),
    ({"config": "indextts2.yaml"}, "config", "num_codes is 1024 in one/train.jsonl, but 8192 in indextts2.yaml"),
    ({"base_checkpoint": "gpt.pth"}, "base_checkpoint", "gpt.pth"),
    ({"base_checkpoint": "a.pth", "train_manifests": "two/train.jsonl", "val_manifests": "two/val.jsonl"},
     "base_checkpoint", "codec_sha256 is .* in two/train.jsonl, but .* in a.pth"),
    ({"base_checkpoint": "a.pth"}, None, ""),
    ({"base_checkpoint": "unread.pth"}, None, ""),
])
def test_the_training_form_compares_data_tokenizer_config_and_base(workspace: Workspace, form: dict[str, Any],
                                                                   field: str | None, said: str):
    table = Known({"gpt.pth": {}, "a.pth": record_of(workspace, "one")})
    form = {"output_dir": "out", "train_manifests": "one/train.jsonl", "val_manifests": "one/val.jsonl", **form}
    found = belonging_problems("training", form, workspace, table)
    assert list(found) == ([field] if field else [])
    for key, values in found.values():
        assert all(re.search(said, text.format(**values)) for text in TEXTS[key])


@pytest.mark.parametrize(("form", "said"), [
    ({}, ["one/train.jsonl: embedded codec, 1024 codes, 21.53 a second", "none, from scratch"]),
    ({"train_manifests": "one/train.jsonl::am@2\ntwo/train.jsonl::en"}, ["one/train.jsonl: embedded", "from scratch"]),
    ({"train_manifests": "newer/train.jsonl"}, ["newer/train.jsonl: IndexTTS-2.5, 8192 codes, 25 a second", "scratch"]),
    ({"train_manifests": "fork/train.jsonl"}, ["fork/train.jsonl; nothing beside it says", "scratch"]),
    ({"base_checkpoint": "a.pth"}, ["one/train", r"Weights:\*\* a\.pth", "Made for: embedded codec, 1024 codes"]),
    ({"base_checkpoint": "gpt.pth"}, ["one/train", r"gpt\.pth", "does not say for which codes"]),
    ({"base_checkpoint": "unread.pth"}, ["one/train", r"unread\.pth", "Reading it"]),
    ({"resume": True}, ["one/train", "Weights:.* those of the checkpoint"]),
    ({"resume": True, "train_manifests": ""}, ["Data and weights:.* those of the checkpoint"]),
])
def test_the_training_tab_says_which_kind_of_data_and_weights_are_chosen(
        workspace: Workspace, form: dict[str, Any], said: list[str]):
    newer = made_with.record("indextts2.5", "c" * 64, 8192, 25.0, "t" * 64, 2)
    for name, section in (("newer", {"dataset": newer}), ("fork", {})):
        (workspace.root / name).mkdir()
        (workspace.root / name / "config.yaml").write_text(yaml.safe_dump(section))
    if form.get("resume"):
        (workspace.root / "out").mkdir()
        (workspace.root / "out/latest.pth").touch()
    (workspace.root / "unread.pth").touch()
    table = Known({"gpt.pth": {}, "a.pth": record_of(workspace, "one")})
    form = {"output_dir": "out", "train_manifests": "one/train.jsonl", **form}
    found = training_choice(form, workspace, table)
    told = [say(key, "en", **translated(values, "en")) for key, values in found]
    assert len(told) == len(said) and all(map(re.search, said, told)), told


def test_the_released_weights_are_found_where_the_trainer_finds_them(workspace: Workspace,
                                                                     monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(belonging, "ROOT", workspace.root)
    (workspace.root / "fork").mkdir()
    (workspace.root / "checkpoints").mkdir()
    (workspace.root / "checkpoints/gpt.pth").touch()
    table = Known({"gpt.pth": {"features": "indextts2", "num_codes": 8192}})

    def keys(**form: str) -> list[str]:
        form = {"output_dir": "out", "train_manifests": "fork/train.jsonl", **form}
        return [key for key, _ in training_choice(form, workspace, table)][1:]

    assert keys() == ["chosen.scratch"]  # without a configuration of its own it is not taken
    (workspace.root / "checkpoints/config.yaml").touch()
    assert keys() == ["chosen.base_found", "chosen.base_made"]
    assert keys(config="indextts2.yaml") == keys(train_manifests="one/train.jsonl") == ["chosen.scratch"]


def test_a_resumed_run_reads_neither_the_default_data_nor_a_base(workspace: Workspace):
    (workspace.root / "out").mkdir()
    form = {"output_dir": "out", "base_checkpoint": "gpt.pth", "config": "indextts2.yaml", "resume": True}
    assert belonging_problems("training", form, workspace, Known({"gpt.pth": {}})) == {}  # no data is chosen
    form["train_manifests"] = "one/train.jsonl"
    found = belonging_problems("training", form, workspace, Known({"gpt.pth": {}}))
    assert list(found) == ["base_checkpoint", "config"]
    (workspace.root / "out/model_step1.pth").touch()
    form["train_manifests"] = ""
    assert belonging_problems("training", form, workspace, Known({"gpt.pth": {}})) == {}


@pytest.mark.parametrize(("kind", "form", "fields"), [
    ("synthesize", {"checkpoint": "a.pth", "codec": "one/codec.pt", "tokenizer": "t.model"}, []),
    ("synthesize", {"checkpoint": "a.pth", "codec": "two/codec.pt"}, ["codec"]),
    ("synthesize", {"checkpoint": "a.pth"}, ["checkpoint"]),  # the demo's codec
    ("synthesize", {"checkpoint": "a.pth", "codec": "one/codec.pt", "tokenizer": "two/codec.pt"}, ["tokenizer"]),
    ("evaluate", {"checkpoint": "a.pth", "codec": "one/codec.pt", "data_dir": "one"}, []),
    ("evaluate", {"checkpoint": "a.pth", "codec": "one/codec.pt", "data_dir": "two"}, ["data_dir"]),
    ("evaluate", {"checkpoint": "gpt.pth", "codec": "one/codec.pt", "data_dir": "two"}, ["data_dir"]),
    ("watch", {"watch": "out", "codec": "two/codec.pt"}, ["codec"]), ("export", {"checkpoint": "a.pth"}, []),
])
def test_the_listening_forms_compare_codec_tokenizer_and_data_with_the_checkpoint(
        workspace: Workspace, kind: str, form: dict[str, Any], fields: list[str]):
    (workspace.root / "out").mkdir()
    (workspace.root / "out/latest.pth").touch()
    record = record_of(workspace, "one")
    assert list(belonging_problems(kind, form, workspace, Known({"a.pth": record, "latest.pth": record}))) == fields


def test_a_config_that_cannot_be_read_is_a_problem_and_no_fault(workspace: Workspace):
    (workspace.root / "one/config.yaml").write_text("dataset: {")
    form = {"output_dir": "out", "train_manifests": "one/train.jsonl"}
    found = belonging_problems("training", form, workspace, Known({}))
    assert "one/config.yaml: cannot be read" in found["train_manifests"][1]["reason"]


def test_an_export_and_a_foreign_file_are_read_in_the_background(workspace: Workspace):
    record, table = record_of(workspace, "two"), CheckpointTable()
    torch.save({"model": {"w": torch.zeros(1)}, "made_with": record}, workspace.root / "a.pth")
    torch.save({"w": torch.zeros(1)}, workspace.root / "gpt.pth")
    said: dict[str, str] = {}
    for name in ("a.pth", "gpt.pth"):
        form = {"output_dir": "out", "train_manifests": "one/train.jsonl", "base_checkpoint": name}
        deadline = time.monotonic() + 60
        while name not in said and time.monotonic() < deadline:
            found = belonging_problems("training", form, workspace, table)
            said.update((name, key) for key, _ in found.values())
            time.sleep(0.1)
    assert said == {"a.pth": "do_not_belong", "gpt.pth": "weights_unknown"}
