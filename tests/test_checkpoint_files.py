"""Checkpoint files: complete, verified, never lost; damage is detected, named and stepped over."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from conftest import (
    GPT,
    ROOT,
    call_trainer,
    data_args,
    error_of,
    load_checkpoint,
    metrics_of,
    mistake,
    read_jsonl,
    resumable_state,
    run_trainer,
    trainer,
    write_manifest,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SETTINGS = ["--batch-size", "8", "--grad-accumulation", "1", "--log-interval", "1", "--save-interval", "2",
            "--val-interval", "4"]
ALL_FILES = ["best.pth", "latest.pth", "model_step4.pth", "model_step6.pth", "model_step8.pth"]
KEYS = {"model", "optimizer", "scheduler", "scaler", "epoch", "step", "recent_checkpoints", "manifests"}


def same_file(a: Path, b: Path) -> bool:
    return a.samefile(b)


def names(output_dir: Path) -> set[str]:
    """All files and folders of an output directory but the lock."""
    return {path.name for path in output_dir.iterdir()} - {".lock"}


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.glob("*.pth"))


def load_plainly(path: Path) -> dict[str, Any]:
    """Reads a checkpoint with PyTorch alone."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@pytest.fixture(scope="session")
def finished_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints 4, 6 and 8, validated at 4 and 8. Read only."""
    output_dir = tmp_path_factory.mktemp("finished_run") / "out"
    call_trainer(*data_args(tiny), *SETTINGS, "--output-dir", output_dir, "--max-steps", 8)
    assert checkpoints(output_dir) == ALL_FILES
    return output_dir


@pytest.fixture
def out(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, links kept."""
    copies: dict[int, str] = {}

    def copy(source: str, target: str) -> None:
        inode = os.stat(source).st_ino
        if inode in copies:
            os.link(copies[inode], target)
        else:
            copies[inode] = shutil.copyfile(source, target)

    return shutil.copytree(finished_run, tmp_path / "out", copy_function=copy)


def go_on(data: Path, output_dir: Path, *args: object, **options: Any) -> str:
    """Continues a run by the newest checkpoint for two steps more."""
    return call_trainer(*data_args(data), "--output-dir", output_dir, "--resume", "auto", "--max-steps", 10, *args,
                        **options)


def cut(path: Path, part: float = 0.6) -> None:
    """Truncates a file, under all its names."""
    os.truncate(path, int(path.stat().st_size * part))


def flip_bit_of(path: Path, name: str) -> None:
    """Flips one bit in the middle of a weight, in the file, under all its names."""
    weight = load_plainly(path)["model"][name]
    needle = weight.clone().numpy().tobytes()
    content = bytearray(path.read_bytes())
    at = content.index(needle) + len(needle) // 2
    content[at] ^= 0x40
    with path.open("r+b") as handle:
        handle.write(content)


# ---------------------------------------------------------------------------------------------------------------------
# What is in a checkpoint, and what lies beside it


def test_every_file_loads_with_pytorch_alone_and_has_the_same_complete_keys(tiny, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    write = trainer.write_checkpoint

    def write_and_keep(path: Path, checkpoint: dict[str, Any]) -> tuple[int, bool]:
        written = write(path, checkpoint)
        shutil.copyfile(path, kept / f"{checkpoint['step']}_{path.name}")
        return written

    monkeypatch.setattr(trainer, "write_checkpoint", write_and_keep)
    call_trainer(*data_args(tiny), *SETTINGS, "--output-dir", tmp_path / "out", "--max-steps", 5, "--val-interval", 3)
    files = [*kept.iterdir(), *(tmp_path / "out").glob("*.pth")]
    assert {path.name for path in files} == {
        "2_model_step2.pth", "3_best.pth", "4_model_step4.pth", "5_model_step5.pth",  # best.pth of step 3: its own file
        "model_step2.pth", "model_step4.pth", "model_step5.pth", "latest.pth", "best.pth"}
    contents = [load_plainly(path) for path in files]
    for content in contents:
        assert content.keys() == contents[0].keys() and content.keys() >= KEYS
        assert content["model"].keys() == contents[0]["model"].keys()
        assert len(content["optimizer"]["state"]) == len(contents[0]["optimizer"]["state"]) > 0
        assert trainer.digest_problem(content) is None


def test_latest_is_a_hard_link_to_the_newest_checkpoint_and_no_temporary_names_stay(finished_run, out, tiny):
    for output_dir, step in ((finished_run, 8), (out, 10)):
        if step == 10:
            go_on(tiny, out)
        assert same_file(output_dir / "latest.pth", output_dir / f"model_step{step}.pth")
        assert same_file(output_dir / "best.pth", output_dir / f"model_step{step}.pth")
        assert not [name for name in names(output_dir) if name.startswith(".")]


def test_linking_again_to_the_same_file_leaves_no_temporary_name(out):
    before = names(out)
    trainer.link_checkpoint(out / "model_step8.pth", out / "latest.pth")
    assert names(out) == before and same_file(out / "latest.pth", out / "model_step8.pth")


def test_where_the_file_system_has_no_links_latest_is_a_copy(tiny, tmp_path, monkeypatch):
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path]
    call_trainer(*args, "--max-steps", 4)
    assert not same_file(tmp_path / "latest.pth", tmp_path / "model_step4.pth")
    assert (tmp_path / "latest.pth").read_bytes() == (tmp_path / "model_step4.pth").read_bytes()
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    output = call_trainer(*args, "--resume", "auto", "--max-steps", 6)
    assert f"found checkpoint at {tmp_path / 'latest.pth'}" in output
    assert load_checkpoint(tmp_path / "latest.pth")["step"] == 6


def test_a_copy_that_the_disk_refuses_leaves_the_old_latest_and_no_temporary_name(out, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_a_copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:1000])
        refuse()

    before = (out / "latest.pth").read_bytes()
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", half_a_copy)
    with pytest.raises(OSError, match="No space left"):
        trainer.link_checkpoint(out / "model_step4.pth", out / "latest.pth")
    assert (out / "latest.pth").read_bytes() == before
    assert not [name for name in names(out) if name.startswith(".")]


@pytest.mark.parametrize("keep,expected", [(1, [10]), (3, [6, 8, 10]), (0, [4, 6, 8, 10])])
def test_the_last_checkpoints_are_kept(keep, expected, tiny, out):
    go_on(tiny, out, "--keep-checkpoints", keep)
    assert sorted(int(path.stem[len("model_step") :]) for path in out.glob("model_step*.pth")) == expected
    assert load_checkpoint(out / "latest.pth")["recent_checkpoints"] == [f"model_step{step}.pth" for step in expected]


def test_files_that_the_run_does_not_know_are_never_deleted(tiny, out):
    unknown = ("my_model.pth", "model_step1.pth", "model_step3.pth", "model_step2_backup.pth", "model_step.pth",
               "model.pth", "notes.txt", "model_step5.pth.old")
    for name in unknown:
        shutil.copyfile(out / "model_step4.pth", out / name)
    before = {name: (out / name).read_bytes() for name in unknown}
    go_on(tiny, out, "--max-steps", 16)
    assert {name: (out / name).read_bytes() for name in unknown} == before
    assert {path.name for path in out.glob("model_step*.pth")} - set(unknown) == {
        "model_step12.pth", "model_step14.pth", "model_step16.pth"}


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_stops_neither_a_save_nor_a_resume(
        tiny, out, monkeypatch):
    unlink = Path.unlink

    def refuse(path: Path, **options: Any) -> None:
        if path.name == "model_step4.pth":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    output = go_on(tiny, out)
    told = f"[Warn] An old checkpoint stays, delete it by hand: [Errno 1] Operation not permitted: '{out}/model_step4"
    assert told in output and "Could not save" not in output
    assert (out / "model_step4.pth").exists() and (out / "model_step10.pth").exists()
    again = go_on(tiny, out, "--max-steps", 12)  # the kill may have come before the deletion: it is tried once more
    assert told in again and "Step: 10" in again and (out / "model_step12.pth").exists()


def test_leftovers_of_a_killed_save_are_removed(tiny, out):
    for name in (".model_step10.pth.partial", ".latest.pth.partial", ".best.pth.partial"):
        (out / name).write_bytes(b"half a checkpoint")
    go_on(tiny, out)
    assert not [name for name in names(out) if name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint a run goes on from


def test_auto_resume_with_nothing_there_starts_afresh_and_says_so(tiny, tmp_path):
    output = call_trainer(*data_args(tiny), "--output-dir", tmp_path / "new", "--resume", "auto", "--max-steps", 1)
    assert f"[Info] Auto-resume: no checkpoint in {tmp_path / 'new'}, starting from the beginning" in output
    assert load_checkpoint(tmp_path / "new" / "latest.pth")["step"] == 1


def test_a_lost_latest_is_replaced_by_the_newest_checkpoint_and_nothing_is_deleted(tiny, out):
    (out / "latest.pth").unlink()
    output = go_on(tiny, out, "--max-steps", 8)
    assert f"[Info] Auto-resume: found checkpoint at {out / 'model_step8.pth'}" in output
    assert "Training is complete" in output
    assert checkpoints(out) == ["best.pth", "model_step4.pth", "model_step6.pth", "model_step8.pth"]
    go_on(tiny, out)
    assert load_checkpoint(out / "latest.pth")["step"] == 10


def test_a_truncated_newest_checkpoint_is_stepped_over_and_named(tiny, out, finished_run):
    cut(out / "latest.pth")  # and model_step8.pth, the same file
    output = go_on(tiny, out, "--max-steps", 8)
    assert f"[Warn] Auto-resume: skipped {out / 'latest.pth'}: damaged or incomplete" in output
    assert f"[Info] Auto-resume: found checkpoint at {out / 'model_step6.pth'}" in output
    assert "Epoch: 1, Step: 6" in output
    assert resumable_state(load_checkpoint(out / "latest.pth")) == resumable_state(
        load_checkpoint(finished_run / "latest.pth"))
    assert metrics_of(out) == metrics_of(finished_run)


def test_a_truncated_latest_that_is_a_file_of_its_own_is_stepped_over_and_named(tiny, out):
    (out / "latest.pth").unlink()
    shutil.copyfile(out / "model_step8.pth", out / "latest.pth")
    cut(out / "latest.pth")
    output = go_on(tiny, out)
    assert f"[Warn] Auto-resume: skipped {out / 'latest.pth'}: damaged or incomplete" in output
    assert f"[Info] Auto-resume: found checkpoint at {out / 'model_step8.pth'}" in output
    assert same_file(out / "latest.pth", out / "model_step10.pth")


def test_a_partial_file_under_a_final_name_is_stepped_over_and_named(tiny, out):
    shutil.copyfile(out / "model_step8.pth", out / "model_step10.pth")
    cut(out / "model_step10.pth")
    output = go_on(tiny, out)
    assert f"[Warn] Auto-resume: skipped {out / 'model_step10.pth'}: damaged or incomplete" in output
    assert f"[Info] Auto-resume: found checkpoint at {out / 'latest.pth'}" in output
    assert load_checkpoint(out / "model_step10.pth")["step"] == 10


def test_a_save_killed_before_its_link_is_found(tiny, out):
    """The newest file wins, although latest.pth still names the one before."""
    (out / "latest.pth").unlink()
    os.link(out / "model_step6.pth", out / "latest.pth")
    output = go_on(tiny, out, "--max-steps", 8)
    assert f"[Info] Auto-resume: found checkpoint at {out / 'model_step8.pth'}" in output


def test_one_flipped_bit_in_a_weight_is_named_and_auto_resume_falls_back(tiny, out):
    flip_bit_of(out / "latest.pth", "gpt.h.1.attn.c_attn.weight")
    output = go_on(tiny, out)
    assert (f"[Warn] Auto-resume: skipped {out / 'latest.pth'} is damaged: 1 tensors differ from their digests "
            "(model/gpt.h.1.attn.c_attn.weight)") in output
    assert f"[Info] Auto-resume: found checkpoint at {out / 'model_step6.pth'}" in output


def test_one_flipped_bit_under_an_explicit_path_is_an_error_that_lists_the_valid_files(tiny, out):
    flip_bit_of(out / "model_step8.pth", "mel_head.weight")
    before = names(out)
    message = mistake(*data_args(tiny), "--output-dir", out, "--resume", out / "model_step8.pth")
    assert "model/mel_head.weight" in message
    valid = message.splitlines()[0].partition("Valid checkpoints there: ")[2]
    assert valid == f"{out / 'model_step6.pth'}, {out / 'model_step4.pth'}"
    assert names(out) - {"last_exit.json"} == before - {"last_exit.json"}


@pytest.mark.parametrize("spoil", [cut, lambda path: flip_bit_of(path, "mel_head.weight")], ids=["cut", "bit_flipped"])
def test_the_valid_file_that_an_error_names_can_be_resumed_although_latest_is_damaged(spoil, tiny, out):
    spoil(out / "latest.pth")
    call_trainer(*data_args(tiny), "--resume", out / "model_step6.pth", "--max-steps", 8)
    assert load_checkpoint(out / "latest.pth")["step"] == 8
    (aside,) = out.glob("abandoned_*")
    assert {"latest.pth", "model_step8.pth"} <= names(aside)


def test_only_broken_files_is_an_error_that_names_them_all_and_deletes_none(tiny, out):
    (out / "latest.pth").unlink()
    (out / "model_step4.pth").write_bytes(b"")
    (out / "model_step6.pth").write_text("<html>502 Bad Gateway</html>")
    cut(out / "model_step8.pth")
    before = names(out)
    output = call_trainer(*data_args(tiny), "--output-dir", out, "--resume", "auto", status=1)
    assert output.splitlines()[-1].startswith(f"RuntimeError: Resume failed: no valid checkpoint in {out}: ")
    for name in ("model_step4.pth", "model_step6.pth", "model_step8.pth"):
        assert f"{out / name}: damaged or incomplete" in output
    assert names(out) - {"last_exit.json"} == before - {"last_exit.json"}


def test_a_directory_that_holds_checkpoints_is_refused_without_resume(tiny, out):
    before = names(out)
    message = mistake(*data_args(tiny), "--output-dir", out)
    assert f"{out} already holds checkpoints" in message
    assert "--resume auto" in message and "another --output-dir" in message
    assert names(out) - {"last_exit.json"} == before - {"last_exit.json"}


def test_going_back_moves_later_checkpoints_and_log_lines_aside(tiny, out, finished_run):
    lines = read_jsonl(next(out.glob("logs/run_*/metrics.jsonl")))
    output = call_trainer(*data_args(tiny), "--resume", out / "model_step4.pth", "--max-steps", 8)
    (aside,) = out.glob("abandoned_*")
    assert f"[Info] Going back to step 4: later checkpoints and log lines are now in {aside}" in output
    assert {"model_step6.pth", "model_step8.pth"} <= names(aside)
    assert load_checkpoint(aside / "model_step8.pth")["step"] == 8
    assert read_jsonl(aside / "metrics.jsonl") == [line for line in lines if line["step"] > 4]
    assert metrics_of(out) == metrics_of(finished_run)  # trained again, written once
    again, abandoned = load_checkpoint(out / "latest.pth"), load_checkpoint(aside / "latest.pth")
    assert resumable_state(again) == resumable_state(abandoned)


def test_a_run_that_was_led_back_and_killed_at_once_does_not_return_to_the_abandoned_checkpoints(
        tiny, out, monkeypatch):
    def crash(run: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer, "train", crash)
        call_trainer(*data_args(tiny), "--resume", out / "model_step4.pth", "--max-steps", 8)
    assert json.loads((out / "last_exit.json").read_text()) == {"reason": "crash", "status": 1, "step": 4}
    assert "Epoch: 0, Step: 4" in go_on(tiny, out, "--max-steps", 5)


def test_the_best_checkpoint_of_the_time_before_is_there_after_going_back(tiny, out, monkeypatch):
    assert load_checkpoint(out / "model_step4.pth")["best"]["step"] == 4
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"": {"text_loss": 99.0, "mel_loss": 99.0, "mel_top1": 0.0}})
    call_trainer(*data_args(tiny), "--resume", out / "model_step4.pth", "--max-steps", 6)
    assert load_checkpoint(out / "latest.pth")["best"]["step"] == 4
    assert load_checkpoint(out / "best.pth")["step"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Damage of any kind


@pytest.fixture(scope="session")
def small_checkpoint(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all its keys and few weights, so that most bits are structure, not weights."""
    content = load_checkpoint(finished_run / "latest.pth")
    del content["digests"]
    content["model"] = {name: t for name, t in content["model"].items() if t.numel() < 100}
    states = content["optimizer"]["state"].items()
    content["optimizer"]["state"] = {i: state for i, state in states if state["exp_avg"].numel() < 100}
    path = tmp_path_factory.mktemp("small") / "model_step8.pth"
    trainer.write_checkpoint(path, content)
    return path


@pytest.mark.parametrize("run_dir", ["../elsewhere", "logs/../../elsewhere", "/tmp/elsewhere", "logs"])
def test_a_checkpoint_that_somebody_made_up_leads_nobody_out_of_the_output_directory(small_checkpoint, tmp_path,
                                                                                    run_dir):
    content = load_checkpoint(small_checkpoint)
    content |= {"run_dir": run_dir}
    del content["digests"]
    torch.save({**content, "digests": trainer.make_digests(content)}, tmp_path / "latest.pth")
    with pytest.raises(trainer.ResumeError, match=f"run directory '{run_dir}' is none that this trainer makes"):
        load_checkpoint(tmp_path / "latest.pth")


def digest_or_error(path: Path) -> Any:
    """The digest of what was loaded; "detected" for a ResumeError. Every other exception fails the test."""
    try:
        return trainer.digest_tree(trainer.read_checkpoint(path))
    except trainer.ResumeError as error:
        assert str(path) in str(error)
        return "detected"


def test_a_flipped_bit_anywhere_is_detected_or_harmless(small_checkpoint, tmp_path):
    whole, content = digest_or_error(small_checkpoint), small_checkpoint.read_bytes()
    rng, damaged = random.Random(5), tmp_path / "model_step8.pth"
    for _ in range(60):
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        assert digest_or_error(damaged) in ("detected", whole), f"bit {bit} of byte {at}"


def test_a_flipped_bit_in_the_table_of_contents_is_detected_or_harmless(small_checkpoint, tmp_path):
    """The zip directory says how records are stored; a wrong bit there sends readers into strange places."""
    whole, content = digest_or_error(small_checkpoint), small_checkpoint.read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data.pkl"))
    damaged = tmp_path / "model_step8.pth"
    for at in range(entry, entry + 46):
        for bit in range(8):
            damaged.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            assert digest_or_error(damaged) in ("detected", whole), f"bit {bit} of byte {at}"


def test_a_truncated_file_is_detected_wherever_it_ends(small_checkpoint, tmp_path):
    content, damaged = small_checkpoint.read_bytes(), tmp_path / "model_step8.pth"
    rng = random.Random(6)
    for size in [0, 1, 100, len(content) - 1, *(rng.randrange(len(content)) for _ in range(16))]:
        damaged.write_bytes(content[:size])
        assert digest_or_error(damaged) == "detected", size


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_anything_else_is_detected(tmp_path):
    path = tmp_path / "model_step8.pth"
    for first in range(256):
        for rest in (b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(100)):
            path.write_bytes(bytes([first]) + rest)
            assert digest_or_error(path) == "detected", (first, rest)


def test_a_folder_under_a_checkpoint_name_is_an_error(tiny, out):
    (out / "model_step9.pth").mkdir()
    assert f"{out / 'model_step9.pth'}: Is a directory" in mistake(
        *data_args(tiny), "--output-dir", out, "--resume", out / "model_step9.pth")
    assert f"[Info] Auto-resume: found checkpoint at {out / 'latest.pth'}" in go_on(tiny, out, "--max-steps", 8)


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("flag", ["--resume", "--base-checkpoint"])
def test_code_inside_a_checkpoint_never_runs(flag, tiny, tmp_path):
    path = tmp_path / "evil" / "model_step1.pth"
    path.parent.mkdir()
    torch.save({"model": Malicious(tmp_path / "ran"), "optimizer": {}, "epoch": 0, "step": 1}, path)
    message = mistake(*data_args(tiny), "--output-dir", tmp_path / "out", flag, path)
    assert str(path) in message and not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def allow_small_files_only() -> None:
    """In the trainer's process: no file may grow beyond 64 KiB, so logs can be written and checkpoints cannot."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))


def test_a_full_disk_stops_neither_training_nor_the_next_start(tiny, out, finished_run):
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    assert min(map(len, before.values())) > 2 * 65_536
    args = [*data_args(tiny), "--output-dir", out, "--resume", "auto", "--max-steps", 12]
    done = run_trainer(*args, status=1, preexec_fn=allow_small_files_only)
    assert f"[Error] Could not save {out / 'model_step10.pth'}" in done.stdout
    assert "Earlier checkpoints are intact" in done.stdout
    assert "[Train] epoch=1 step=11 " in done.stdout and "[Train] epoch=1 step=12 " in done.stdout
    assert "the last checkpoint could not be saved" in done.stderr and "from step 8" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((out / "last_exit.json").read_text())["reason"] == "user_error"
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before
    assert not [name for name in names(out) if name.startswith(".")]
    output = call_trainer(*args)
    assert "Epoch: 1, Step: 8" in output
    assert [line["step"] for line in metrics_of(out) if line["kind"] == "train"] == list(range(1, 13))


FULL_FROM_10_TO_20 = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from trainers import train_gpt_v2 as trainer
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
def on_event(event, run, *_):
    if event == "step_done":
        full = 10 <= run.state.position.step < 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]) if full else limits)
sys.exit(trainer.main(sys.argv[1:], on_event))
"""


def test_a_disk_without_room_for_one_byte_of_log_stops_nothing_and_no_line_is_lost(tiny, tmp_path):
    """Checkpoints, metrics, TensorBoard events and the file that takes the standard output: all refused for a while."""
    args = [*map(str, [*data_args(tiny), *SETTINGS]), "--max-steps", "24"]
    call_trainer(*args, "--output-dir", tmp_path / "roomy")
    with (tmp_path / "printed").open("wb") as printed:
        status = subprocess.run([sys.executable, "-c", FULL_FROM_10_TO_20, *args, "--output-dir", tmp_path / "full"],
                                stdout=printed, stderr=subprocess.STDOUT, timeout=300).returncode
    output = (tmp_path / "printed").read_text()
    assert status == 0 and "Traceback" not in output, output
    assert "step=9 " in output and "step=24 " in output
    assert metrics_of(tmp_path / "full") == metrics_of(tmp_path / "roomy")
    full, roomy = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("full", "roomy"))
    assert resumable_state(full) == resumable_state(roomy)
    assert full["recent_checkpoints"] == ["model_step20.pth", "model_step22.pth", "model_step24.pth"]


def allow_no_files() -> None:
    """In the trainer's process: nothing can be written to any file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_a_start_on_a_full_disk_is_a_clear_error_and_harms_nothing(tiny, out):
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    output = error_of(*data_args(tiny), "--output-dir", out, "--resume", "auto", "--max-steps", 10,
                      preexec_fn=allow_no_files)
    assert f"[Error] --output-dir {out}: File too large. Free some disk space" in output
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before
    assert not [name for name in names(out) if name.startswith(".")]
    assert "Epoch: 1, Step: 8" in go_on(tiny, out)


def test_training_goes_on_while_a_snapshot_is_written_and_only_one_save_is_in_flight(tiny, out, monkeypatch):
    """The disk takes its time with step 10 until step 13 is done; the next save waits for it, the end for all."""
    step_13, events, snapshots = threading.Event(), [], {}
    make, write = trainer.make_checkpoint, trainer.write_checkpoint

    def note_snapshot(*args: Any) -> dict[str, Any]:
        snapshot = make(*args)
        snapshots[snapshot["step"]] = resumable_state(snapshot)
        return snapshot

    def write_slowly(path: Path, checkpoint: dict[str, Any]) -> tuple[int, bool]:
        events.append(f"writing {path.name}")
        if path.name == "model_step10.pth":
            assert step_13.wait(60), "training waited for the disk"
        written = write(path, checkpoint)
        events.append(f"wrote {path.name}")
        return written

    def note_step(event: str, run: Any, *_: Any) -> None:
        if event == "logged" and run.state.position.step == 13:
            step_13.set()

    monkeypatch.setattr(trainer, "make_checkpoint", note_snapshot)
    monkeypatch.setattr(trainer, "write_checkpoint", write_slowly)
    output = go_on(tiny, out, "--max-steps", 17, "--save-interval", 5, "--val-interval", 100, on_event=note_step)
    assert events == [f"{verb} model_step{step}.pth" for step in (10, 15, 17) for verb in ("writing", "wrote")]
    assert output.index("step=13 ") < output.index("[Info] Saved")
    for step in (10, 15, 17):
        assert resumable_state(load_checkpoint(out / f"model_step{step}.pth")) == snapshots[step]


def test_every_save_tells_how_long_training_waited_how_long_it_took_and_how_big_it_is(tiny, out):
    go_on(tiny, out, "--max-steps", 12)
    (folder,) = out.glob("logs/run_*")
    saves = [line for line in read_jsonl(folder / "metrics.jsonl") if line["kind"] == "save"]
    assert [line["step"] for line in saves] == [2, 4, 6, 8, 10, 12]
    for line in saves[-2:]:
        assert line["bytes"] == (out / f"model_step{line['step']}.pth").stat().st_size
        assert line["seconds_written"] > 0 and line["seconds_blocked"] > 0
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("seconds_blocked", "seconds_written", "bytes"):
        assert [event.step for event in events.Scalars(f"save/{name}")] == [2, 4, 6, 8, 10, 12]


def refuse_saves(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The disk refuses the next saves halfway, as torch.save reports it, then it is free again."""
    save, left = torch.save, [times]

    def save_unless_full(content: Any, handle: Any) -> None:
        if left[0]:
            left[0] -= 1
            handle.write(bytes(10_000))
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
        save(content, handle)

    monkeypatch.setattr(torch, "save", save_unless_full)


def test_a_failed_save_is_tried_again_and_nothing_is_deleted_meanwhile(tiny, out, monkeypatch):
    refuse_saves(monkeypatch, 1)
    output = go_on(tiny, out, "--max-steps", 39, "--save-interval", 20, "--val-interval", 100)
    assert f"[Error] Could not save {out / 'model_step20.pth'}" in output
    retried = re.search(r"\[Info\] Saved \S+/(model_step2\d\.pth)", output)[1]  # a few steps later
    assert checkpoints(out) == ["best.pth", "latest.pth", retried, "model_step39.pth", "model_step8.pth"]
    assert load_checkpoint(out / "latest.pth")["recent_checkpoints"] == [
        "model_step8.pth", retried, "model_step39.pth"]


def test_what_counts_as_best_is_what_best_holds_although_the_disk_refused_a_save(tiny, out, monkeypatch):
    losses = {10: 1.0, 14: 2.0}  # both better than the best so far, at step 8; the save of step 10 is refused

    def evaluate(run: Any, *_: object) -> dict[str, dict[str, float]]:
        return {"": dict.fromkeys(("text_loss", "mel_loss", "mel_top1"), losses[run.state.position.step])}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    refuse_saves(monkeypatch, 1)
    go_on(tiny, out, "--max-steps", 14, "--save-interval", 10, "--val-interval", 10)
    assert load_checkpoint(out / "latest.pth")["best"].items() >= {"step": 14, "loss": 2.0}.items()
    assert load_checkpoint(out / "best.pth")["step"] == 14


def test_a_latest_that_cannot_be_renewed_stops_nothing(tiny, out, monkeypatch):
    """No hard links on this file system, and no room for copies."""
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "link", refuse)
        full.setattr(shutil, "copyfile", refuse)
        output = go_on(tiny, out)
    assert "[Error] Could not renew latest.pth" in output and load_checkpoint(out / "latest.pth")["step"] == 8
    assert f"found checkpoint at {out / 'model_step10.pth'}" in go_on(tiny, out, "--max-steps", 12)


def test_a_stop_whose_save_fails_is_an_error(tiny, out, monkeypatch):
    refuse_saves(monkeypatch, 100)

    def stop_after_logging(event, run, *_):
        if event == "logged":
            run.process.stop.receive(15)

    output = call_trainer(*data_args(tiny), "--output-dir", out, "--resume", "auto", "--max-steps", 20,
                          "--save-interval", 100, "--val-interval", 100, status=1, on_event=stop_after_logging)
    assert "[Info] SIGTERM: stopping at step 9" in output and "the last checkpoint could not be saved" in output
    assert json.loads((out / "last_exit.json").read_text()) == {"reason": "user_error", "status": 1, "step": 9}


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint remembers


def test_the_best_validation_is_kept_over_a_resume(tiny, out, monkeypatch):
    best, file = load_checkpoint(out / "latest.pth")["best"], (out / "best.pth").read_bytes()
    assert best["step"] == 8
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"": {"text_loss": 99.0, "mel_loss": 99.0, "mel_top1": 0.0}})
    output = go_on(tiny, out, "--max-steps", 12)
    assert "text_loss=99.000000" in output
    assert load_checkpoint(out / "latest.pth")["best"] == best
    assert (out / "best.pth").read_bytes() == file
    assert f"best validation loss {best['loss']:.6f} at step 8" in output


LINES = ["ሰላም ለዓለም", "አዲስ አበባ ከተማ", "ልጆች ትምህርት ቤት ሄዱ", "ቡና ጠጣሁ", "ዝናብ ይዘንባል", "መልካም ቀን ይሁንልህ", "እንኳን ደህና መጣህ"]


def make_tokenizer(path: Path, lines: list[str]) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(path.with_suffix("")), vocab_size=60, model_type="bpe",
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2)
    return path


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two SentencePiece models of the same size with other pieces."""
    folder = tmp_path_factory.mktemp("tokenizers")
    first = make_tokenizer(folder / "first.model", LINES)
    second = make_tokenizer(folder / "second.model", [*LINES, "ጤና ይስጥልኝ"])
    sizes = [sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size() for path in (first, second)]
    assert sizes[0] == sizes[1] and first.read_bytes() != second.read_bytes()
    return first, second


@pytest.fixture
def own_tokenizer_run(tiny, tokenizers, tmp_path) -> tuple[Path, list[Any]]:
    """A run of 2 steps with the first tokenizer on a copy of the data; its output directory and arguments."""
    data = shutil.copytree(tiny, tmp_path / "data")
    args = [*data_args(data), "--tokenizer", tokenizers[0], "--output-dir", tmp_path / "out"]
    call_trainer(*args, *SETTINGS, "--max-steps", 2)
    return data, args


def test_a_tokenizer_of_the_same_size_with_other_pieces_is_refused(own_tokenizer_run, tokenizers, tmp_path):
    message = mistake(*own_tokenizer_run[1], "--tokenizer", tokenizers[1], "--resume", "auto")
    assert "tokenizer differs (sha256 " in message and f"Pass --tokenizer {tokenizers[0]}" in message


def test_all_that_does_not_fit_is_listed_at_once_with_remedies(own_tokenizer_run, tokenizers, tmp_path):
    data, args = own_tokenizer_run
    write_manifest(data / "train_pairs.jsonl", read_jsonl(data / "train_pairs.jsonl")[::-1])
    (tmp_path / "deeper.yaml").write_text(yaml.safe_dump({"gpt": {**GPT, "layers": 3}}))
    message = mistake(*args, "--tokenizer", tokenizers[1], "--config", tmp_path / "deeper.yaml", "--resume", "auto")
    for words in ("gpt.h.2.", "--config", "tokenizer differs", "--tokenizer", "training data changed",
                  "--train-manifest", "--accept-changed-data"):
        assert words in message, message


@pytest.mark.parametrize("change", [
    lambda rows: rows[::-1], lambda rows: rows[:-1], lambda rows: rows + [{**rows[0], "id": "new"}],
    lambda rows: [{**rows[0], "id": "renamed"}, *rows[1:]],
    lambda rows: [{**rows[0], "target_code_len": rows[0]["target_code_len"] - 1}, *rows[1:]],
], ids=["order", "a_row_less", "a_row_more", "an_id", "a_length"])
def test_changed_training_data_is_refused_unless_accepted(change, tiny, out, tmp_path):
    data = shutil.copytree(tiny, tmp_path / "data")
    rows = change(read_jsonl(data / "train_pairs.jsonl"))
    write_manifest(data / "train_pairs.jsonl", rows)
    args = [*data_args(data), "--output-dir", out, "--resume", "auto", "--max-steps", 9]
    message = mistake(*args)
    assert "training data changed (row ids, lengths, order or weights)" in message
    assert "--accept-changed-data" in message
    output = call_trainer(*args, "--accept-changed-data")
    assert f"[Warn] Training data changed: epoch 1 starts anew with {len(rows)} rows" in output
    checkpoint = load_checkpoint(out / "latest.pth")
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["sample_in_epoch"]) == (9, 1, 8)


def test_training_data_may_move(tiny, out, finished_run, tmp_path):
    data = shutil.copytree(tiny, tmp_path / "moved" / "elsewhere")
    assert "Epoch: 1, Step: 8" in go_on(data, out)
    manifests = load_checkpoint(out / "latest.pth")["manifests"]
    assert manifests["train"][0]["path"] == str(data / "train_pairs.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Files of other trainers


@pytest.fixture
def fork_checkpoint(finished_run: Path, tmp_path: Path) -> Path:
    """What the IndexTTS2 fork's trainer writes: the same weights, random-number states, no digests."""
    content = load_plainly(finished_run / "latest.pth")
    path = tmp_path / "fork" / "model_step8.pth"
    path.parent.mkdir()
    torch.save({"model": content["model"], "optimizer": content["optimizer"], "scheduler": {"last_epoch": 8},
                "scaler": None, "epoch": 0, "step": 8, "recent_checkpoints": [str(path)],
                "manifests": {"train": ["train_pairs.jsonl"], "val": ["val_pairs.jsonl"]},
                "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}},
               path)
    return path


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_checkpoint_of_the_fork_is_refused_with_the_way_to_use_its_weights(resume, fork_checkpoint, tiny):
    message = mistake(*data_args(tiny), "--output-dir", fork_checkpoint.parent, "--resume",
                      "auto" if resume == "auto" else fork_checkpoint)
    assert f"--base-checkpoint {fork_checkpoint}" in message and "new --output-dir" in message


def test_a_checkpoint_of_the_fork_is_taken_as_base(fork_checkpoint, tiny, tmp_path):
    output = call_trainer(*data_args(tiny), "--output-dir", tmp_path / "out", "--base-checkpoint", fork_checkpoint,
                          "--max-steps", 1, "--learning-rate", 1e-30, "--warmup-steps", 0)
    assert f"[Info] Base checkpoint: {fork_checkpoint}" in output
    expected = trainer.read_torch_file(fork_checkpoint)["model"]
    found = load_checkpoint(tmp_path / "out" / "latest.pth")["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_missing_required_keys_are_named_before_anything_else(tiny, tmp_path):
    path = tmp_path / "model_step3.pth"
    torch.save({"model": {}, "epoch": 0, "format_version": 99}, path)
    output = call_trainer(*data_args(tiny), "--output-dir", tmp_path, "--resume", path, status=1)
    assert "[Error] Failed to load checkpoint: Checkpoint missing required keys: ['optimizer', 'step']" in output
    assert output.splitlines()[-1].startswith(
        "RuntimeError: Resume failed: Checkpoint missing required keys: ['optimizer', 'step']")


def test_a_checkpoint_of_a_later_format_is_refused_with_the_remedy(tiny, out, monkeypatch):
    known, content = trainer.FORMAT_VERSION, load_checkpoint(out / "model_step8.pth")
    with monkeypatch.context() as later:
        later.setattr(trainer, "FORMAT_VERSION", known + 1)
        trainer.write_checkpoint(out / "model_step9.pth", {**content, "format_version": known + 1})
    message = mistake(*data_args(tiny), "--output-dir", out, "--resume", out / "model_step9.pth")
    assert f"has format {known + 1}, this trainer reads {known}" in message and "version of the trainer" in message


def test_a_path_that_does_not_exist_is_an_error_that_lists_the_valid_files_and_makes_no_directory(tiny, out):
    output = call_trainer(*data_args(tiny), "--resume", out / "model_step5.pth", status=1)
    assert f"[Error] Failed to load checkpoint: Resume checkpoint not found: {out / 'model_step5.pth'}" in output
    assert str(out / "model_step8.pth") in output
    call_trainer(*data_args(tiny), "--resume", out / "nowhere" / "latest.pth", status=1)
    assert not (out / "nowhere").exists()


