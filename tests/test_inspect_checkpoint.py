"""tools.inspect_checkpoint: what it shows is what is in the files, and what --resume auto would do with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPT, ROOT, call_trainer, data_args, load_checkpoint, trainer

from tools import inspect_checkpoint
from tools._common import run_program

STEPS = ["model_step6.pth", "model_step4.pth", "model_step2.pth"]


@pytest.fixture(scope="session")
def run_to_inspect(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of 8 samples in a directory with a space in its name; checkpoints 2, 4 and 6. Read only."""
    output_dir = tmp_path_factory.mktemp("run to inspect") / "my run"
    call_trainer(*data_args(tiny), "--batch-size", 2, "--grad-accumulation", 4, "--save-interval", 2, "--val-interval",
                 4, "--epochs", 2, "--max-steps", 6, "--output-dir", output_dir)
    return output_dir


@pytest.fixture
def out(run_to_inspect: Path, tmp_path: Path) -> Path:
    """A copy whose latest.pth and best.pth are links to model_step6.pth."""
    folder = tmp_path / "my run"
    folder.mkdir()
    for name in STEPS:
        shutil.copyfile(run_to_inspect / name, folder / name)
    for name in ("latest.pth", "best.pth"):
        os.link(folder / STEPS[0], folder / name)
    return folder


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the program in this process, checks its exit status; returns what it printed and its complaints."""

    def call(*args: object, status: int) -> tuple[str, str]:
        found: Any = 0
        capsys.readouterr()
        try:
            run_program(lambda _: inspect_checkpoint.main([str(arg) for arg in args]))
        except SystemExit as end:
            found = end.code
        printed = capsys.readouterr()
        assert found == status, f"exit {found}\n{printed.out}\n{printed.err}"
        return printed.out, printed.err

    return call


@pytest.fixture
def report_of(inspect) -> Callable[..., dict[str, Any]]:
    return lambda *args, status: json.loads(inspect("--json", *args, status=status)[0])


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {Path(name).name: entry for entry in report["checkpoints"] for name in (entry["path"], *entry["aliases"])}


def test_the_command_prints_a_table_newest_first_and_what_auto_resume_takes(run_to_inspect):
    done = subprocess.run([sys.executable, "-m", "tools.inspect_checkpoint", str(run_to_inspect)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    header, *rows, resume = done.stdout.splitlines()
    assert header.split() == ["file", "step", "epoch", "position", "val", "loss", "best", "size", "format", "state"]
    assert [row.split()[0] for row in rows] == STEPS
    assert "model_step6.pth = latest.pth" in rows[0] and all(row.endswith("  verified") for row in rows)
    # 41 rows in steps of 8: the sixth step takes the last one, and the next epoch begins.
    assert "0 of 41" in rows[0] and "32 of 41" in rows[1] and "16 of 41" in rows[2]
    loss = load_checkpoint(run_to_inspect / "model_step4.pth")["last_val"]["loss"]
    assert rows[1].count(f"{loss:.6f}") == 2 and "  -  " in rows[2]
    assert resume.startswith(f"[Info] --resume auto takes {run_to_inspect / 'latest.pth'}: step 6, epoch 1, learning ")
    assert f"global batch 8, tokenizer amharic_extended_bpe.model, written by torch {torch.__version__}" in resume


def test_json_says_what_the_files_hold(out, report_of):
    report = report_of(out, status=0)
    assert report["resume"] == str(out / "latest.pth") and report["leftovers"] == []
    newest, middle, oldest = report["checkpoints"]
    assert newest["aliases"] == [str(out / "latest.pth"), str(out / "best.pth")] and middle["aliases"] == []
    for entry, name in zip(report["checkpoints"], STEPS, strict=True):
        content = load_checkpoint(out / name)
        same = ("step", "epoch", "sample_in_epoch", "last_val", "best", "format_version", "run_dir", "environment",
                "config", "tokenizer")
        assert {key: entry[key] for key in same} == {key: content[key] for key in same}
        assert entry["path"] == str(out / name) and entry["verified"] is True and entry["problem"] is None
        assert entry["num_rows"] == 41 and entry["global_batch"] == 8
        assert entry["lr"] == content["optimizer"]["param_groups"][0]["lr"]
        assert entry["bytes"] == (out / name).stat().st_size and entry["mtime"] == (out / name).stat().st_mtime
    assert oldest["last_val"] is None and middle["best"]["step"] == 4


def test_a_file_with_several_names_is_read_once(out, report_of, monkeypatch):
    read = []

    def note(path: Path) -> dict[str, Any]:
        read.append(path.name)
        return trainer.read_checkpoint(path)

    monkeypatch.setattr(inspect_checkpoint, "read_checkpoint", note)
    report_of(out, status=0)
    assert sorted(read) == sorted(STEPS)


def test_single_files_are_shown_with_their_resume_state(out, inspect):
    printed, _ = inspect(out / "best.pth", out / "model_step2.pth", status=0)
    assert [line.split()[0] for line in printed.splitlines()[1:3]] == ["best.pth", "model_step2.pth"]
    assert f"[Info] {out / 'model_step2.pth'}: step 2, epoch 0, learning rate" in printed
    assert "resume auto" not in printed


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """In the middle of a weight."""
    weight = load_checkpoint(path)["model"]["text_embedding.weight"].clone().numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)


def replace(content: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return spoil


def replace_by_fork(path: Path) -> None:
    """What the IndexTTS2 fork's trainer writes has no digests."""
    content = load_checkpoint(path)
    content = {key: content[key] for key in ("model", "optimizer", "scheduler", "scaler", "epoch", "step")}
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def replace_by_weights(path: Path) -> None:
    path.unlink()
    torch.save({"model": {"text_embedding.weight": torch.zeros(3, GPT["model_dim"])}}, path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILS = {
    "torn": (cut, "damaged or incomplete, not a readable PyTorch file"),
    "a flipped bit": (flip_a_bit, "tensors differ from their digests (model/text_embedding.weight)"),
    "empty": (replace(b""), "the file is empty"),
    "text": (replace("ሰላም\n".encode() * 100), "not a readable PyTorch file"),
    "of the fork": (replace_by_fork, "was not written by this trainer"),
    "weights only": (replace_by_weights, "missing required keys: ['optimizer', 'epoch', 'step']"),
    "a folder": (replace_by_folder, "not a file"),
}


@pytest.mark.parametrize("name", ["model_step4.pth", "latest.pth"])
@pytest.mark.parametrize("spoil,expected", SPOILS.values(), ids=SPOILS)
def test_what_is_broken_is_named_and_the_resume_choice_is_the_trainers(spoil, expected, name, out, inspect, report_of):
    """latest.pth is a link, so that spoiling it in place spoils all its names, and replacing it leaves the others."""
    spoil(out / name)
    report = report_of(out, status=1)
    entries = by_name(report)
    assert expected in entries[name]["problem"]
    broken = {other for other, entry in entries.items() if not entry["verified"]}
    assert broken == ({name} if not (out / name).is_file() or (out / name).stat().st_nlink == 1
                      else {"latest.pth", "best.pth", "model_step6.pth"})
    assert report["resume"] == str(trainer.find_resumable(out).path)
    printed, complaint = inspect(out, status=1)
    row = next(line for line in printed.splitlines() if name in line)
    assert expected in row and "verified" not in row
    assert "cannot be used: " in complaint and complaint.count("\n") == 1


def test_with_nothing_whole_it_says_that_auto_resume_would_stop(out, inspect, report_of):
    for name in STEPS:
        cut(out / name)
    assert report_of(out, status=1)["resume"] is None
    assert "--resume auto would stop with an error" in inspect(out, status=1)[0]


def test_a_broken_latest_of_its_own_comes_first_and_does_not_hide_the_others(out, report_of):
    (out / "latest.pth").unlink()
    (out / "latest.pth").write_bytes(b"PK")
    report = report_of(out, status=1)
    assert [Path(entry["path"]).name for entry in report["checkpoints"]] == ["latest.pth", *STEPS]
    assert report["checkpoints"][0]["step"] is None and report["resume"] == str(out / "model_step6.pth")


def test_leftovers_of_a_killed_save_are_listed_and_stay(out, inspect, report_of):
    leftover = out / ".model_step8.pth.partial"
    leftover.write_bytes(b"PK")
    report = report_of(out, status=0)
    assert report["leftovers"] == [str(leftover)] and len(report["checkpoints"]) == 3
    assert f"[Info] {leftover}: a save in progress, or left by a killed one" in inspect(out, status=0)[0]
    assert leftover.exists()


@pytest.mark.parametrize("name,expected", [
    ("empty", "empty: no checkpoint there"),
    ("nowhere", "nowhere: No such file or directory"),
    ("file/my run", "file/my run: Not a directory"),
])
def test_nothing_there_is_one_line_that_names_the_place(name, expected, tmp_path, inspect):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    printed, complaint = inspect("--json", tmp_path / name, status=1)
    assert json.loads(printed) == {"checkpoints": [], "resume": None, "leftovers": []}
    assert complaint.startswith(f"[Error] {tmp_path}/{expected}") and complaint.count("\n") == 1
    assert inspect(tmp_path / name, status=1) == ("", complaint)


def test_a_directory_among_files_is_refused(out, inspect):
    _, complaint = inspect(out / "best.pth", out, status=1)
    assert complaint == f"[Error] {out} is a directory. Give one directory, or files\n"


@pytest.fixture
def without_privileges() -> Iterator[Path]:
    """A folder that anybody may enter; as root, the test goes on as nobody."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)


def test_a_file_and_a_directory_that_may_not_be_read_are_named(without_privileges, inspect, report_of):
    path = without_privileges / "model_step4.pth"
    path.write_bytes(b"PK")
    path.chmod(0)
    assert report_of(without_privileges, status=1)["checkpoints"][0]["problem"] == f"{path}: Permission denied"
    without_privileges.chmod(0o300)
    assert inspect(without_privileges, status=1)[1].startswith(f"[Error] {without_privileges}: Permission denied")
    without_privileges.chmod(0)
    assert inspect(path, status=1)[1].startswith(f"[Error] {path}: Permission denied")
    without_privileges.chmod(0o700)


@pytest.mark.parametrize("during", ["model_step4.pth", "model_step2.pth"])
def test_a_checkpoint_that_a_running_trainer_rotates_out_is_not_called_broken(during, out, report_of, monkeypatch):
    def read(path: Path) -> dict[str, Any]:
        if path.name == during:
            (out / "model_step2.pth").unlink()
        return trainer.read_checkpoint(path)

    monkeypatch.setattr(inspect_checkpoint, "read_checkpoint", read)
    assert [entry["step"] for entry in report_of(out, status=0)["checkpoints"]] == [6, 4]


def test_a_long_verification_shows_progress_beside_the_json(out, inspect, monkeypatch):
    def read_slowly(path: Path) -> dict[str, Any]:
        time.sleep(2.2)
        return trainer.read_checkpoint(path)

    monkeypatch.setattr(inspect_checkpoint, "read_checkpoint", read_slowly)
    printed, progress = inspect("--json", out / "model_step4.pth", status=0)
    assert json.loads(printed)["checkpoints"][0]["step"] == 4
    assert f"[Progress] verifying {out / 'model_step4.pth'} (" in progress and "file 1 of 1" in progress
