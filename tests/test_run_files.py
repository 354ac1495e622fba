"""tools.run_files decides as the trainer does, over the same directories."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, trainer

from tools import run_files

# The trainer's side.


def trainer_order(output_dir: Path) -> list[Path]:
    """What --resume auto tries."""
    return trainer.candidates(output_dir)


def trainer_refuses(output_dir: Path, resume: str) -> bool:
    """Whether a run would not be let into this directory, because of the checkpoints there."""
    order = trainer_order(output_dir) if resume == "auto" else [Path(resume)] if resume else []
    try:
        trainer.refuse_other_checkpoints(output_dir, trainer.ResumePoint(order[0], {}) if order else None, resume)
    except trainer.UserError:
        return True
    return False


def trainer_output_dir(typed: dict[str, Any]) -> Path:
    return trainer.output_dir_of(typed)


def trainer_last_exit(output_dir: Path, reason: str, status: int) -> None:
    """Writes down how a run without a step ended."""
    stop = trainer.StopSignal()
    process = trainer.Process(stop, trainer.Console(stop, sys.stdout))
    trainer.record_exit(output_dir / "last_exit.json", reason, status, process)


def hold_lock(output_dir: Path) -> None:
    """In a process of its own: returns when it holds the directory, and lets go when its standard input ends."""
    with trainer.lock_output_dir(output_dir):
        print("held", flush=True)
        sys.stdin.read()


# Both.


def written_step(path: Path) -> float:
    """What tools give to resume_order."""
    try:
        return torch.load(path, weights_only=True)["step"]
    except Exception:
        return math.inf


def layout(folder: Path, steps: list[int], latest: str = "", best: str = "") -> Path:
    """model_step files of these steps; latest.pth and best.pth: "link:STEP", "symlink:STEP", "copy:STEP" (a file of
    its own), "damaged" or "" for none."""
    folder.mkdir(parents=True)
    for step in steps:
        torch.save({"step": step}, folder / f"model_step{step}.pth")
    for name, kind in (("latest.pth", latest), ("best.pth", best)):
        how, _, step_text = kind.partition(":")
        twin = folder / f"model_step{step_text}.pth"
        if how == "link":
            os.link(twin, folder / name)
        elif how == "symlink":
            (folder / name).symlink_to(twin.name)
        elif how == "copy":
            torch.save({"step": int(step_text)}, folder / name)
        elif how == "damaged":
            (folder / name).write_bytes(b"PK\3\4 torn")
    return folder


LAYOUTS: list[tuple[list[int], str, str]] = [
    ([], "", ""), ([], "", "copy:3"), ([], "copy:3", ""), ([5, 10, 20], "", ""), ([5, 10, 20], "link:20", "link:10"),
    ([5, 10, 20], "link:10", ""), ([9, 10, 100], "symlink:100", ""), ([5, 10, 20], "copy:10", ""),
    ([5, 10, 20], "copy:12", ""), ([5, 10, 20], "copy:30", ""), ([5, 10, 20], "damaged", ""),
    ([5, 10, 20], "symlink:11", ""), ([5], "copy:1", "damaged"),
]


@pytest.mark.parametrize(("steps", "latest", "best"), LAYOUTS)
def test_the_order_of_resume_auto_is_the_trainers(steps: list[int], latest: str, best: str, tmp_path: Path):
    out = layout(tmp_path / "out", steps, latest, best)
    (out / "model_step7.pth.partial").touch()
    (out / "model_stepX.pth").touch()
    (out / "notes.pth").touch()
    (out / "model_step8.pth").symlink_to("nowhere")
    assert run_files.resume_order(out, written_step) == trainer_order(out)
    assert run_files.list_checkpoints(out) == [out / f"model_step{step}.pth" for step in sorted(steps, reverse=True)]


@pytest.mark.parametrize(("steps", "latest", "best"), LAYOUTS)
def test_directories_with_other_checkpoints_are_refused_as_the_trainer_does(steps: list[int], latest: str, best: str,
                                                                            tmp_path: Path):
    out = layout(tmp_path / "out", steps, latest, best)
    elsewhere = layout(tmp_path / "elsewhere", [4])
    resumes = ["", "auto", str(elsewhere / "model_step4.pth"), str(tmp_path / "elsewhere/../out/model_step5.pth")]
    for resume in resumes:
        assert bool(run_files.foreign_checkpoints(out, resume)) == trainer_refuses(out, resume), resume


def test_the_verified_file_that_auto_takes_is_found_in_a_report(tmp_path: Path):
    out = layout(tmp_path / "out", [5, 10, 20], "link:20")

    def entry(step: int, verified: bool, *names: str) -> dict[str, Any]:
        return {"path": str(out / names[0]), "aliases": [str(out / name) for name in names[1:]],
                "step": step if verified else None, "verified": verified}

    entries = [entry(20, False, "model_step20.pth", "latest.pth"), entry(10, True, "model_step10.pth", "best.pth"),
               entry(5, True, "model_step5.pth")]
    assert run_files.resume_choice(out, entries) == out / "model_step10.pth"
    entries[0] |= {"verified": True, "step": 20}
    assert run_files.resume_choice(out, entries) == out / "latest.pth"
    assert run_files.resume_choice(out, entries[2:]) == out / "model_step5.pth"
    assert run_files.resume_choice(out, []) is None
    random.Random(0).shuffle(entries)
    assert [e["path"][-6:] for e in sorted(entries, key=run_files.newest_first)] == ["20.pth", "10.pth", "p5.pth"]


@pytest.mark.parametrize("typed", [
    {}, {"output_dir": "a"}, {"resume": "auto"}, {"resume": "b/latest.pth"}, {"resume": "best.pth"},
    {"resume": "b/latest.pth", "output_dir": "a"}, {"resume": "auto", "output_dir": ""}, {"resume": ""},
])
def test_the_output_directory_follows_from_the_flags_as_in_the_trainer(typed: dict[str, str]):
    assert run_files.output_dir_from(typed.get("output_dir"), typed.get("resume", "")) == trainer_output_dir(typed)


@pytest.mark.parametrize("typed", ["a.jsonl", "a.jsonl::am", "a.jsonl::AM", "x::1/a.jsonl", "a=b@c.jsonl", "::am",
                                   "a::b::zh-CN", "a.jsonl::", "a.jsonl::am\n", "a.jsonl::en@0.1", "a.jsonl::en@-3",
                                   "a::en@2::am@1e2", "a::en@2/b.jsonl", "a::en@2::9", "a.jsonl::en@", "a::en@x"])
def test_a_manifests_language_and_weight_are_split_off_as_in_the_trainer(typed: str):
    assert repr(run_files.split_manifest(typed)) == repr(trainer.split_manifest(typed))  # NaN differs from itself


def test_how_a_run_ended_is_read_as_the_trainer_wrote_it(tmp_path: Path):
    for reason, status in (("finished", 0), ("stopped", 143), ("user_error", 1), ("crash", 1)):
        run_files.clear_last_exit(tmp_path)
        assert run_files.read_last_exit(tmp_path) == {}
        trainer_last_exit(tmp_path, reason, status)
        assert run_files.read_last_exit(tmp_path) == {"reason": reason, "status": status, "step": None}
    assert run_files.read_last_exit(tmp_path, since=time.time() + 60) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", json.dumps({"reason": "finished"}),
                                     json.dumps({"reason": 1, "status": 0}), "\xff"])
def test_a_torn_last_exit_is_none(content: str, tmp_path: Path):
    (tmp_path / "last_exit.json").write_bytes(content.encode("latin-1"))
    assert run_files.read_last_exit(tmp_path) == {}


def test_who_holds_a_directory_is_asked_without_taking_it(tmp_path: Path):
    assert run_files.lock_holder(tmp_path) is None
    code = f"import sys, pathlib, test_run_files; test_run_files.hold_lock(pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=ROOT, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert f"process {process.pid} " in str(run_files.lock_holder(tmp_path))
        process.communicate("")
    assert run_files.lock_holder(tmp_path) is None


def test_nobody_loads_torch_for_these_rules():
    code = "import sys; import tools.run_files; assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
