"""metrics.jsonl: no line doubled, none missing, whatever happens to the process or the disk."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import read_jsonl, trainer


def write_lines(path: Path, *lines: tuple[str, int]) -> None:
    path.write_text("".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in lines))


def test_lines_beyond_the_resumed_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, ("train", 1), ("train", 2), ("val", 2), ("train", 3))
    with path.open("a") as handle:
        handle.write('{"kind": "train", "st')
    dropped = trainer.cut_metrics(path, last_step=2, validates_again=False)
    assert [(line["kind"], line["step"]) for line in read_jsonl(path)] == [("train", 1), ("train", 2), ("val", 2)]
    assert len(dropped) == 2


def test_a_validation_that_will_be_repeated_leaves_no_second_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, ("train", 2), ("val", 2))
    trainer.cut_metrics(path, last_step=2, validates_again=True)
    assert [(line["kind"], line["step"]) for line in read_jsonl(path)] == [("train", 2)]


def test_lines_written_while_the_disk_is_full_reach_the_file_once_there_is_room(tmp_path):
    log = trainer.MetricsLog(tmp_path, first_step=1)
    position = trainer.Position(0, 4, 1)
    real_file = log.file
    log.file = open("/dev/full", "ab", buffering=0)
    log.write("train", position, {"text_loss": 1.5})
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
    log.file.close()
    log.file = real_file
    log.write("val", position, {"text_loss": 1.25})
    log.close()
    assert [line["text_loss"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1.5, 1.25]


def test_losses_keep_their_full_precision(tmp_path):
    log = trainer.MetricsLog(tmp_path, first_step=1)
    log.write("train", trainer.Position(0, 4, 1), {"text_loss": 0.1 + 0.2})
    log.close()
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["text_loss"] == 0.1 + 0.2
