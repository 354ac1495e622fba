"""Disks and files that behave otherwise than ext4: the save counts, the row is read, or one error says what is wrong.

Each run is a process of its own in which a system call is refused as such a disk refuses it.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import load_checkpoint, read_jsonl, resumable_state, trainer, write_manifest
from fresh_process import AT_STEP_2, QUICK, data_args, errs, runs, step_of, train_in_process
from old_checkpoints import make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows, 5 validation rows, a tokenizer; to be spoiled."""
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The state of an ordinary run of 3 steps."""
    out = tmp_path_factory.mktemp("ordinary") / "out"
    runs(train_in_process(*data_args(make.HERE / "data"), *QUICK, "--output-dir", out))
    return resumable_state(load_checkpoint(out / "latest.pth"))


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if "[Warn]" in line]


# ---------------------------------------------------------------------------------------------------------------------
# Saving


REFUSE_DIRECTORY_FSYNC = """
import os, stat
real = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError({number}, os.strerror({number}))
    return real(descriptor)
os.fsync = fsync
"""


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP"])
def test_a_directory_that_cannot_be_synced_is_one_warning_and_the_save_counts(name, data, tmp_path, ordinary):
    """CIFS, sshfs, WSL."""
    before = REFUSE_DIRECTORY_FSYNC.replace("{number}", f"__import__('errno').{name}")
    output = runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary
    assert len(warnings(output)) == 1 and "sync" in warnings(output)[0]
    assert output.count("[Info] Saved ") == 2  # steps 2 and 3


def test_a_directory_that_cannot_be_opened_for_a_sync_is_one_warning(data, tmp_path, ordinary):
    before = """
import errno, os
real = os.open
def open_file(path, flags, *args, **options):
    if os.path.isdir(path) and not options:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(path, flags, *args, **options)
os.open = open_file
"""
    output = runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary
    assert len(warnings(output)) == 1


SPOIL_WRITES = """
import torch
save = torch.save
def spoil(content, target, *args, **options):
    save(content, target, *args, **options)
    weight = content["model"]["mel_head.weight"].contiguous().numpy().tobytes()
    handle = target if hasattr(target, "seek") else open(target, "r+b")
    handle.flush()
    name = getattr(handle, "name", None)
    written = open(name, "rb").read() if isinstance(name, (str, int)) or name is not None else handle.getvalue()
    at = written.index(weight) + len(weight) // 2
    end = handle.seek(0, 2)
    handle.seek(at)
    handle.write(bytes([written[at] ^ 0x10]))
    handle.seek(end)
    handle.flush()
torch.save = spoil
"""


def test_a_save_is_read_back_before_it_gets_its_name(data, tmp_path):
    """A disk that flips a bit between write and read is noticed: no file gets a final name, and the run says so."""
    out = tmp_path / "out"
    status, output = train_in_process(*data_args(data), *QUICK, "--output-dir", out, before=SPOIL_WRITES)
    assert status == 1 and "Traceback" not in output, output
    assert "Could not save" in output and "mel_head.weight" in output
    assert not list(out.glob("*.pth"))


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name_and_its_folder_after(data, tmp_path):
    before = """
import os
def told(real, what):
    def call(first, *args, **options):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        print(what, os.path.basename(path), flush=True)
        return real(first, *args, **options)
    return call
os.fsync, os.replace, os.rename = told(os.fsync, "SYNC"), told(os.replace, "RENAME"), told(os.rename, "RENAME")
"""
    output = runs(train_in_process(*data_args(data), *QUICK, "--max-steps", 2, "--output-dir", tmp_path / "out",
                                   before=before))
    calls = [line.split() for line in output.splitlines() if line.startswith(("SYNC ", "RENAME "))]
    at = next(i for i, (what, name) in enumerate(calls) if what == "RENAME" and "model_step2" in name)
    assert ["SYNC", calls[at][1]] in calls[:at] and calls[at + 1] == ["SYNC", "out"], calls


def test_a_disk_without_statistics_trains(data, tmp_path, ordinary):
    before = """
import errno, os
def refuse(path):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
os.statvfs = refuse
"""
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary


def test_a_disk_that_takes_no_advice_trains(data, tmp_path, ordinary):
    before = """
import errno, os
def refuse(*_):
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
os.posix_fadvise = refuse
"""
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary


# ---------------------------------------------------------------------------------------------------------------------
# The lock


REFUSE_LOCKS = """
import errno, fcntl, os
def refuse(*_):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
fcntl.lockf = fcntl.flock = refuse
"""


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_disk_without_locks_is_one_warning(name, data, tmp_path, ordinary):
    before = REFUSE_LOCKS.replace("{name}", name)
    output = runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary
    assert len(warnings(output)) == 1 and "lock" in warnings(output)[0]


@pytest.mark.parametrize("name", ["EACCES", "EAGAIN"])
def test_a_lock_that_somebody_holds_is_an_error(name, data, tmp_path):
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out",
                          before=REFUSE_LOCKS.replace("{name}", name)), "in use")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_a_disk_without_mappings_is_read_otherwise(data, tmp_path, ordinary):
    before = """
import errno, mmap, os
class Refused:
    def __new__(cls, *_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
mmap.mmap = Refused
"""
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary


def test_checkpoints_are_read_from_a_disk_without_mappings(data, tmp_path, ordinary):
    before = """
import torch
def refuse(*_, **__):
    raise RuntimeError("unable to mmap 512 bytes from file <x>: No such device (19)")
torch.UntypedStorage.from_file = refuse
"""
    args = [*data_args(data), *QUICK, "--output-dir", tmp_path / "out"]
    runs(train_in_process(*args, "--max-steps", 2, before=before))
    runs(train_in_process(*args, "--resume", "auto", before=before))
    assert step_of(tmp_path / "out") == 3


def many(data: Path, copies: int, name: str = "train") -> list[dict]:
    """The manifest's rows, `copies` times over with ids of their own."""
    rows = read_jsonl(data / f"{name}_pairs.jsonl")
    return [{**row, "id": f"{row['id']}_{number}"} for number in range(copies) for row in rows]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["text", "codes", "condition", "emo"])
def test_a_missing_shard_is_one_error_before_the_first_step(kind, split, data, tmp_path):
    """Whatever the number of rows: half of the rows are in another shard, which is there."""
    copy = data / f"{split}_other_{kind}.npy"
    shutil.copyfile(data / f"{split}_{kind}.npy", copy)
    rows = many(data, 60, split)
    key = {"text": "target_text_ids", "codes": "target_codes", "condition": "prompt_condition", "emo": "prompt_emo_vec"}
    for row in rows[::2]:
        row[f"{key[kind]}_path"] = copy.name
    write_manifest(data / f"{split}_pairs.jsonl", rows)
    copy.unlink()
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out")
    message = errs(done, copy.name, f"{split}_pairs.jsonl")
    assert len(message.splitlines()) < 8 and not warnings(done[1]) and "[Train]" not in done[1], done[1]
    assert not list((tmp_path / "out").glob("*.pth"))


def test_arrays_of_other_types_orders_and_versions_hold_the_same_numbers(data, tmp_path, ordinary):
    """As other programs write them: another integer type or byte order, Fortran's order, a header of version 2."""
    def change(name: str, array: np.ndarray, version: tuple[int, int] | None = None) -> None:
        with (data / name).open("wb") as handle:
            np.lib.format.write_array(handle, array, version=version)

    change("train_codes.npy", np.load(data / "train_codes.npy").astype(np.uint16), (2, 0))
    change("train_text.npy", np.load(data / "train_text.npy").astype(">i8"))
    change("train_condition.npy", np.asfortranarray(np.load(data / "train_condition.npy").astype(np.float64)))
    change("train_emo.npy", np.load(data / "train_emo.npy").astype(">f4").reshape(13, 1, 8), (3, 0))
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == ordinary


HANG_AFTER_STEP_2 = """
import os, signal, threading, time
hanging = threading.Event()
def hanging_version(real):
    def read(*args, **options):
        if hanging.is_set():
            time.sleep(600)
        return real(*args, **options)
    return read
os.pread = hanging_version(os.pread)
def stop():
    print(f"signal at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
def act():
    hanging.set()
    threading.Timer(0.5, stop).start()
""" + AT_STEP_2


def test_a_disk_that_hangs_blocks_neither_the_stop_nor_the_save(data, tmp_path):
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", "--epochs", 10**6,
                            "--max-steps", 10**6, before=HANG_AFTER_STEP_2, seconds=20)
    ended = time.time()
    assert done[0] == 143 and "Traceback" not in done[1], done
    signalled = float(done[1].partition("signal at ")[2].split()[0])
    assert ended - signalled < 3
    stopped = json.loads((tmp_path / "out" / "last_exit.json").read_text())
    assert stopped["reason"] == "stopped" and stopped["step"] == step_of(tmp_path / "out") >= 2


@pytest.mark.parametrize("name,status", [("SIGUSR1", 138), ("SIGUSR2", 140)])
def test_a_schedulers_warning_saves_and_sets_the_exit_status(name, status, data, tmp_path):
    before = f"import os, signal\ndef act(): os.kill(os.getpid(), signal.{name})\n{AT_STEP_2}"
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before)
    assert done[0] == status and "Traceback" not in done[1], done
    stopped = json.loads((tmp_path / "out" / "last_exit.json").read_text())
    assert stopped == {"reason": "stopped", "status": status, "step": 2}
    assert step_of(tmp_path / "out") == 2


def test_threads_read_headers_of_arrays_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Python 3.11 mixes up syntax trees that threads build side by side: a sound file was called damaged."""
    np.save(tmp_path / "codes.npy", np.arange(9))
    inside: list[int] = []
    most: list[int] = []
    read = np.lib.format.read_array_header_1_0

    def slowly(handle: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return read(handle)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slowly)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(trainer.ArrayFile, [str(tmp_path / "codes.npy")] * 32))
    assert max(most) == 1 and all(file.read(2, 3).tolist() == [2, 3, 4] for file in files)
