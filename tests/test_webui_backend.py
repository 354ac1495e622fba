"""What the Web UI's pages stand on: jobs that outlive everything, command lines, readers, the workspace's walls."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import soundfile
from conftest import ROOT, TOKENIZER, call_trainer, data_args, make_dataset, read_jsonl, trainer

from tools import (
    build_pairs,
    check_dataset,
    filter_dataset,
    import_recordings,
    model_folder,
    preprocess,
    recording_layouts,
    run_files,
    sound_names,
    speak,
    train_tokenizer,
    transcript_tables,
)
from tools._common import Progress as ToolProgress
from tools._common import ToolError
from tools.amharic_text import read_aloud
from tools.recordings import read_recordings
from webui import command_lines, job_panel, jobs, page_base, pipeline, readers
from webui.recordings_check import read_dataset
from webui.texts import TEXTS
from webui.uploads import AUDIO, SHEETS, TRANSCRIPTS, take_upload
from webui.workspace import (
    MESSAGES,
    Refused,
    Workspace,
    is_loopback,
    load_or_make_credentials,
    load_or_make_secret,
    load_settings,
    save_settings,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="jobs are found through /proc")


def field_names(kind: str) -> list[str]:
    """The names of a form's fields; "training" has resume (bool) and resume_path (str) among them."""
    return [field.name for field in command_lines.PROGRAMS[kind].fields] + ["resume"] * (kind == "training")


def read_runs(output_dir: Path) -> list[readers.Point]:
    """All points of the newest run in an output directory, oldest first, at once."""
    reader = readers.MetricsReader(output_dir)
    points, before = reader.points(), -1
    while reader.file and reader.file.offset > before:
        before, points = reader.file.offset, reader.points()
    return points


def verified(table: readers.CheckpointTable, directory: Path) -> readers.Inspection:
    """What the table says once nothing is being verified any more."""
    wait_for(lambda: not table.look(directory).verifying)
    return table.look(directory)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "workspace")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


SLEEPER = python("import time; print('started', flush=True); time.sleep(60)")


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def ended(workspace: Workspace, job: jobs.Job) -> jobs.Job:
    """The job once it is over."""
    return wait_for(lambda: next((now for now in [jobs.load_job(workspace, job.id)] if not now.live), None))


def process_of(job: jobs.Job) -> dict[str, Any]:
    return json.loads((job.folder / "process.json").read_text())


def refusal(call: Callable[..., Any], *args: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(Refused) as caught:
        call(*args)
    return caught.value.key, caught.value.values


@pytest.fixture
def sleeper(workspace: Workspace):
    """A job that runs until somebody ends it."""
    job = jobs.start_job(workspace, "speak", "a long one", SLEEPER, workspace.root / "out")
    wait_for(lambda: "started" in jobs.read_tail(job.log))
    yield job
    if job.folder.exists():
        jobs.kill_job(job)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def test_the_ui_process_imports_no_torch_no_trainer_and_no_gradio():
    code = ("import sys, webui.command_lines, webui.jobs, webui.readers, webui.workspace\n"
            "print({'torch', 'numpy', 'gradio', 'trainers'} & set(sys.modules))")
    assert subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


STARTER = f"""
import pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from webui import jobs
from webui.workspace import Workspace
for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
program = '''
import pathlib, signal, sys, time
print([signal.getsignal(s) != signal.SIG_IGN for s in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)], flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
print("finished after all", flush=True)
'''
workspace = Workspace.open(sys.argv[1])
job = jobs.start_job(workspace, "training", "t", [sys.executable, "-c", program, sys.argv[1] + "/go"])
print(job.id, flush=True)
time.sleep(600)
"""


def test_a_job_outlives_the_server_that_started_it_and_its_whole_process_group(workspace: Workspace):
    server = subprocess.Popen([*python(STARTER), str(workspace.root)], stdout=subprocess.PIPE, text=True,
                              start_new_session=True)
    assert server.stdout is not None
    job_id = server.stdout.readline().strip()
    os.killpg(server.pid, signal.SIGKILL)
    server.communicate()
    job = jobs.load_job(workspace, job_id)
    assert job.state == "running" and [found.id for found in jobs.list_jobs(workspace)] == [job_id]
    (workspace.root / "go").touch()
    job = ended(workspace, job)
    assert (job.state, job.status) == ("finished", 0)
    # Stop signals that the server ignored (nohup, a background shell) still reach the program.
    assert jobs.read_tail(job.log) == "[True, True, True]\nfinished after all"
    process = process_of(job)
    wait_for(lambda: jobs.start_time_of(process["supervisor_pid"]) is None)


def test_a_killed_program_is_told_from_one_that_failed(workspace: Workspace, sleeper: jobs.Job):
    os.kill(process_of(sleeper)["program_pid"], signal.SIGKILL)
    job = ended(workspace, sleeper)
    assert (job.state, job.message()) == ("killed", ("job_killed", {"signal": "SIGKILL"}))
    code = "import sys; print('[Error] no such voice'); print('and more'); sys.exit(3)"
    job = ended(workspace, jobs.start_job(workspace, "speak", "t", python(code)))
    assert job.message() == ("job_failed", {"status": 3, "reason": "[Error] no such voice"})


def test_a_stop_is_told_from_an_end_of_another_kind(workspace: Workspace, sleeper: jobs.Job):
    assert sleeper.message() == ("job_running", {"pid": sleeper.pid})
    jobs.stop_job(sleeper)
    job = ended(workspace, sleeper)
    assert (job.state, job.message()) == ("stopped", ("job_stopped", {}))
    jobs.stop_job(job)  # pressed again in another browser: nothing happens
    jobs.kill_job(job)


ENDINGS = [
    ("training", "stopped", 143, "stopped"), ("training", None, -15, "stopped"),  # the latter before it was set up
    ("training", "user_error", 1, "failed"), ("training", "crash", 1, "failed"),
    ("training", "finished", 0, "finished"),
    ("speak", None, 130, "stopped"), ("speak", None, 143, "stopped"), ("speak", None, -2, "stopped"),
    ("speak", None, 1, "failed"), ("speak", None, -9, "killed"), ("speak", None, -11, "killed")]


@pytest.mark.parametrize("kind,reason,status,state", ENDINGS)
def test_after_stop_only_an_end_by_that_stop_is_called_stopped(workspace: Workspace, kind: str, reason: str | None,
                                                               status: int, state: str):
    job = jobs.start_job(workspace, kind, "t", python("print('[Error] no space left'); raise SystemExit(1)"))
    ended(workspace, job)
    last_exit = {"reason": reason, "status": status, "step": 7} if reason else {}
    (job.folder / "stop").touch()
    (job.folder / "exit.json").write_text(json.dumps({"status": status, "ended": time.time(), "last_exit": last_exit}))
    job = jobs.load_job(workspace, job.id)
    assert job.state == state
    if state == "failed":
        assert job.message() == ("job_failed", {"status": 1, "reason": "[Error] no space left"})


def test_a_full_disk_keeps_nobody_from_stopping_or_killing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    code = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
    job = jobs.start_job(workspace, "speak", "t", python(code + "print('up', flush=True)\nwhile True: time.sleep(1)"))
    wait_for(lambda: "up" in jobs.read_tail(job.log))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "touch", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        jobs.stop_job(job)
    wait_for(lambda: "heard" in jobs.read_tail(job.log))
    jobs.stop_job(job)  # there is room again
    job = jobs.load_job(workspace, job.id)
    assert job.message()[0] == "job_stopping" and job.stop_asked is not None  # from which Kill is offered
    assert (job.folder / "stop").stat().st_size == 0
    jobs.kill_job(job)
    ended(workspace, job)


def test_a_program_that_starts_late_is_not_lost(workspace: Workspace, sleeper: jobs.Job):
    process = process_of(sleeper)
    (sleeper.folder / "process.json").unlink()
    content = jobs.read_json(sleeper.folder / "job.json")
    jobs.write_json(sleeper.folder / "job.json", {**content, "created": time.time() - 100})
    assert jobs.load_job(workspace, sleeper.id).message() == ("job_lost", {})
    jobs.write_json(sleeper.folder / "process.json", process)
    assert jobs.load_job(workspace, sleeper.id).message() == ("job_running", {"pid": sleeper.pid})
    os.kill(process["supervisor_pid"], signal.SIGKILL)
    jobs.kill_job(sleeper)
    assert ended(workspace, sleeper).state == "killed"


def test_a_program_that_does_not_react_to_stop_can_be_killed_with_its_children(workspace: Workspace):
    code = ("import signal, subprocess, sys, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
            "time.sleep(60)")
    job = jobs.start_job(workspace, "training", "t", python(code))
    child = int(wait_for(lambda: jobs.read_tail(job.log)))
    jobs.stop_job(job)
    job = jobs.load_job(workspace, job.id)
    assert job.live and job.message()[0] == "job_stopping"
    jobs.kill_job(job)
    assert ended(workspace, job).message() == ("job_killed", {"signal": "SIGKILL"})
    wait_for(lambda: jobs.start_time_of(child) is None)


def test_a_sigterm_to_what_looks_after_a_program_reaches_the_program(workspace: Workspace, sleeper: jobs.Job):
    os.kill(process_of(sleeper)["supervisor_pid"], signal.SIGTERM)
    found = ended(workspace, sleeper)
    assert found.state == "killed" and found.message() == ("job_killed", {"signal": "SIGTERM"})


def test_without_its_supervisor_a_program_still_runs_can_be_stopped_and_its_end_is_found(workspace: Workspace,
                                                                                         sleeper: jobs.Job):
    supervisor = process_of(sleeper)["supervisor_pid"]
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: jobs.start_time_of(supervisor) is None)
    assert jobs.load_job(workspace, sleeper.id).state == "running"
    jobs.stop_job(sleeper)
    job = ended(workspace, sleeper)
    assert (job.state, job.status, job.message()) == ("killed", None, ("job_lost", {}))


@pytest.mark.parametrize("reason,status,state", [("stopped", 143, "stopped"), ("finished", 0, "finished"),
                                                 ("crash", 1, "failed")])
def test_a_lost_training_job_ended_as_last_exit_says_even_after_a_later_run_replaced_it(
        workspace: Workspace, sleeper: jobs.Job, reason: str, status: int, state: str):
    process = process_of(sleeper)
    for who in ("supervisor_pid", "program_pid"):
        os.kill(process[who], signal.SIGKILL)
        wait_for(lambda who=who: jobs.start_time_of(process[who]) is None)
    last_exit = workspace.root / "out" / "last_exit.json"
    last_exit.parent.mkdir()
    last_exit.write_text(json.dumps({"reason": reason, "status": status, "step": 7}))
    for _ in range(2):
        job = jobs.load_job(workspace, sleeper.id)
        assert (job.state, job.status, job.step) == (state, status, 7)
        last_exit.unlink(missing_ok=True)  # as the next run does


@pytest.mark.parametrize("change", [{"boot_id": "another"}, {"program_start": 1, "supervisor_start": 1}])
def test_after_a_reboot_or_under_a_reused_process_id_a_job_is_not_taken_for_running(
        workspace: Workspace, sleeper: jobs.Job, change: dict[str, Any]):
    process = process_of(sleeper)
    (sleeper.folder / "process.json").write_text(json.dumps({**process, **change}))
    jobs.stop_job(sleeper)  # must not signal a stranger
    assert jobs.load_job(workspace, sleeper.id).state == "killed"
    assert jobs.start_time_of(process["program_pid"]) == process["program_start"]
    os.killpg(process["program_pid"], signal.SIGKILL)


@pytest.mark.parametrize("name", ["job", "process", "exit"])
@pytest.mark.parametrize("content", ["", '{"pid": 1', "[]", "7"])
def test_torn_files_of_a_job_harm_no_other_job(workspace: Workspace, name: str, content: str):
    folder = workspace.private / "jobs" / "20260101-000000-000000-abcd"
    folder.mkdir(parents=True)
    parts = {"job": {"kind": "speak", "title": "t", "argv": [], "cwd": "/", "created": 0.0, "output_dir": None},
             "process": {"program_pid": 1, "program_start": 1, "boot_id": "before"},
             "exit": {"status": 0, "ended": 1.0, "last_exit": None}}
    for part, value in parts.items():
        (folder / f"{part}.json").write_text(json.dumps(value))
    (folder / f"{name}.json").write_text(content)
    found = [job.state for job in jobs.list_jobs(workspace)]
    assert found == {"job": [], "exit": ["killed"]}.get(name, ["finished"])


def test_a_job_folder_deleted_by_hand_is_gone_and_its_supervisor_leaves(workspace: Workspace, sleeper: jobs.Job):
    process = process_of(sleeper)
    shutil.rmtree(sleeper.folder)
    assert jobs.list_jobs(workspace) == []
    assert refusal(jobs.load_job, workspace, sleeper.id)[0] == "no_such_job"
    jobs.stop_job(sleeper)
    os.kill(process["program_pid"], signal.SIGTERM)
    wait_for(lambda: jobs.start_time_of(process["supervisor_pid"]) is None)


@pytest.mark.parametrize("job_id", ["", "..", "../../etc", "20260101-000000-000000-abcd", None])
def test_only_ids_of_jobs_open_a_folder(workspace: Workspace, job_id: Any):
    assert refusal(jobs.load_job, workspace, job_id)[0] == "no_such_job"


def test_a_second_start_in_the_same_directory_is_refused_with_the_name_of_the_holder(workspace: Workspace,
                                                                                    sleeper: jobs.Job):
    out = workspace.root / "out"
    key, values = refusal(jobs.start_job, workspace, "training", "another", SLEEPER, out)
    assert key == "directory_in_use"
    assert (values["path"], values["title"], values["pid"]) == ("out", "a long one", sleeper.pid)
    assert len(jobs.list_jobs(workspace)) == 1
    jobs.kill_job(sleeper)
    ended(workspace, sleeper)
    assert ended(workspace, jobs.start_job(workspace, "speak", "t", python(""), out)).state == "finished"


def test_of_many_starts_at_once_one_gets_the_directory(workspace: Workspace):
    started: list[jobs.Job] = []

    def start() -> None:
        try:
            started.append(jobs.start_job(workspace, "speak", "t", SLEEPER, workspace.root / "out"))
        except Refused as refused:
            assert refused.key == "directory_in_use"

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (job,) = started
    jobs.kill_job(job)


def test_a_program_that_cannot_be_started_leaves_no_job(workspace: Workspace):
    key, values = refusal(jobs.start_job, workspace, "speak", "t", ["/no/such/program"])
    assert key == "start_failed" and "/no/such/program" in values["reason"]
    assert jobs.list_jobs(workspace) == []


def test_jobs_are_listed_newest_first_and_live_ones_never_drop_out(workspace: Workspace, sleeper: jobs.Job):
    later = [jobs.start_job(workspace, "speak", "t", python("")) for _ in range(3)]
    for job in later:
        ended(workspace, job)
    assert [job.id for job in jobs.list_jobs(workspace, limit=2)] == [later[2].id, later[1].id, sleeper.id]


def old_job(workspace: Workspace, number: int, kind: str, output: str, status: int = 0) -> str:
    """A job that ended long ago; a higher number is a later one. Returns its id."""
    folder = workspace.private / "jobs" / f"20260101-000000-{number:06}-abcd"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"kind": kind, "title": kind, "argv": [], "cwd": "/", "created": number,
                                                 "output_dir": str(workspace.root / output)}))
    (folder / "exit.json").write_text(json.dumps({"status": status, "ended": number, "last_exit": {}}))
    os.utime(folder, (number, number))
    return folder.name


def test_what_a_step_made_is_listed_however_many_jobs_came_later(workspace: Workspace):
    run, codec = old_job(workspace, 1, "training", "run"), old_job(workspace, 2, "codec", "codec.pt")
    failed = old_job(workspace, 3, "codec", "codec.pt", status=1)
    for number in range(10, 70):
        old_job(workspace, number, "synthesize", f"listen/{number}.wav")
        old_job(workspace, number + 100, "synthesize", "listen/again.wav")
    listed = jobs.list_jobs(workspace)
    assert [job.id for job in listed if job.kind != "synthesize"] == [failed, codec, run]
    # A step that was done again and again takes no more than its part, one with many results keeps each.
    assert sum(job.output_dir == workspace.root / "listen/again.wav" for job in listed) == 50
    assert sum(job.kind == "synthesize" for job in listed) == 110
    assert [job.id for job in listed] == sorted((job.id for job in listed), reverse=True)


def test_a_job_that_is_over_is_read_only_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    old_job(workspace, 1, "codec", "codec.pt")
    over: jobs.Ended = {}
    before = jobs.list_jobs(workspace, ended=over)
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "read_json", None)
        assert jobs.list_jobs(workspace, ended=over) == before
    jobs.write_json(before[0].folder / "exit.json", {"status": 1, "ended": 2.0})
    assert [job.state for job in jobs.list_jobs(workspace, ended=over)] == ["failed"]
    shutil.rmtree(before[0].folder)
    assert jobs.list_jobs(workspace, ended=over) == []


def test_a_child_that_logs_100_mb_does_not_stall_and_its_tail_is_read_in_little_memory(workspace: Workspace):
    code = "import sys\nfor i in range(100): sys.stdout.buffer.write((b'%d ' % i + b'x' * 96 + b'\\n') * 10200)"
    job = ended(workspace, jobs.start_job(workspace, "speak", "chatty", python(code)))
    assert job.state == "finished" and job.log.stat().st_size > 100e6
    tracemalloc.start()
    tail = jobs.read_tail(job.log)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tail.splitlines()) == 200 and set(tail.splitlines()) == {"99 " + "x" * 96}
    assert peak < 2e6
    job.log.unlink()


def test_a_tail_is_plain_text(tmp_path: Path):
    log = tmp_path / "log.txt"
    assert jobs.read_tail(log) == ""
    log.write_bytes(b"whole\r\n 10%\r 50%\r100%\n\x1b[31mred\x1b[0m\x07 \xff\xe1\x88\xb0\n 1%\r 2%\r")
    assert jobs.read_tail(log) == "whole\n100%\nred \N{REPLACEMENT CHARACTER}\u1230\n 2%"
    log.write_bytes(b"cut off here\n" + b"last\n" * 3)
    assert jobs.read_tail(log, max_bytes=20) == "last\nlast\nlast"
    assert jobs.read_tail(log, max_lines=2) == "last\nlast"
    log.write_bytes(b" 1%\r" * 1_000_000)
    assert jobs.read_tail(log) == " 1%"


# ---------------------------------------------------------------------------------------------------------------------
# A real training run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with tiny data and an output directory of two checkpoints. Copy it before changing it."""
    root = tmp_path_factory.mktemp("trained")
    make_dataset(root / "data")
    call_trainer(*data_args(root / "data"), "--output-dir", root / "out", "--max-steps", 10, "--save-interval", 5,
                 "--log-interval", 1, "--batch-size", 8, "--grad-accumulation", 1)
    shutil.copy(TOKENIZER, root / "t.model")
    return root


TRAINING = {"train_manifests": "data/train_pairs.jsonl", "val_manifests": "data/val_pairs.jsonl",
            "tokenizer": "t.model", "output_dir": "out", "max_steps": 100_000,
            "batch_size": 8.0, "grad_accumulation": 1, "log_interval": "1", "epochs": 100_000, "learning_rate": None,
            "amp": ""}


def step_of(job: jobs.Job) -> int:
    progress = readers.progress_of(job.log)
    return progress.done if progress else 0


def test_stop_saves_says_at_which_step_and_the_same_form_with_resume_goes_on(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "w")
    workspace = Workspace.open(tmp_path / "w")
    form = {**TRAINING, "resume": True}
    assert command_lines.problems("training", form, workspace) == {}
    argv = command_lines.command_for("training", form, workspace)
    out = command_lines.output_of("training", form, workspace)
    assert out is not None
    job = jobs.start_job(workspace, "training", "tiny", argv, out)
    wait_for(lambda: step_of(job) > 20 or not jobs.load_job(workspace, job.id).live)
    assert step_of(job) > 20, jobs.read_tail(job.log)
    assert str(job.pid) in str(run_files.lock_holder(out))
    assert refusal(jobs.delete_checkpoint, workspace, "out/latest.pth")[0] == "directory_in_use"
    assert refusal(jobs.deletable, workspace, "out/latest.pth")[0] == "directory_in_use"
    jobs.stop_job(job)
    job = ended(workspace, job)
    step = trainer.read_checkpoint(out / "latest.pth")["step"]
    assert step > 20 and job.message() == ("job_stopped_at_step", {"step": step}) and job.status == 143
    assert "Successfully resumed" in jobs.read_tail(job.log, max_lines=10**6, max_bytes=10**8)
    assert [point["step"] for point in read_runs(out) if point["kind"] == "train"] == list(range(1, step + 1))
    # The last run's file goes with the next start; what this job did is known from its own folder.
    (out / "last_exit.json").unlink()
    assert jobs.load_job(workspace, job.id).message() == ("job_stopped_at_step", {"step": step})


def test_a_trainer_started_in_a_terminal_holds_its_directory(workspace: Workspace):
    """lockf as the trainer does it, in another process."""
    out = workspace.root / "out"
    out.mkdir()
    code = ("import fcntl, sys\nhandle = open(sys.argv[1], 'a+')\nfcntl.lockf(handle, fcntl.LOCK_EX)\n"
            "handle.write('process 5 on host, since noon')\nhandle.flush()\nprint('held', flush=True)\n"
            "sys.stdin.read()")
    assert jobs.holder_of(workspace, out) is None
    holder = subprocess.Popen([*python(code), str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert refusal(jobs.start_job, workspace, "training", "t", SLEEPER, out) == (
        "directory_locked", {"path": "out", "holder": "process 5 on host, since noon"})
    holder.communicate()
    assert jobs.holder_of(workspace, out) is None


def test_checkpoints_are_verified_once_in_the_background_and_a_damaged_one_is_named(trained: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out)
    table = readers.CheckpointTable()
    assert table.look(tmp_path / "nothing") == readers.Inspection()
    first = table.look(out)
    assert first.checkpoints == [] and set(first.verifying) >= {"model_step10.pth", "model_step5.pth"}
    known = verified(table, out)
    assert known.resume == str(out / "latest.pth") and known.verifying == []
    assert all(entry["verified"] and entry["step"] in (5, 10) for entry in known.checkpoints)
    assert table.look(out) == known and not table.running
    for name in ("latest.pth", "model_step10.pth"):  # copies of the same content, or links to it
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (out / name).write_bytes(content)
    assert "model_step5.pth" not in table.look(out).verifying
    damaged = verified(table, out)
    assert damaged.resume == str(out / "model_step5.pth")
    broken = [entry for entry in damaged.checkpoints if not entry["verified"]]
    assert broken and all("model_step10" in entry["problem"] or "latest" in entry["problem"] for entry in broken)
    entry = table.look_up(out / "model_step5.pth")
    assert entry is not None and entry["step"] == 5


def test_an_inspection_that_fails_says_why_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "latest.pth").write_bytes(b"x")
    monkeypatch.setattr(readers, "ROOT", tmp_path)  # where there is no such tool
    table = readers.CheckpointTable()
    found = verified(table, tmp_path)
    assert found.verifying == [] and found.resume is None and table.running is None
    (entry,) = found.checkpoints
    assert not entry["verified"] and "inspect_checkpoint" in entry["problem"] and entry["bytes"] == 1


def test_a_checkpoint_is_deleted_under_all_its_names_and_nothing_else_is(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "w", ignore=shutil.ignore_patterns("latest.pth"))
    workspace = Workspace.open(tmp_path / "w")
    out = workspace.root / "out"
    os.link(out / "model_step10.pth", out / "latest.pth")
    assert refusal(jobs.delete_checkpoint, workspace, "out/last_exit.json")[0] == "not_a_checkpoint"
    assert refusal(jobs.delete_checkpoint, workspace, "../w2/latest.pth")[0] == "path_outside"
    for call in (jobs.deletable, jobs.delete_checkpoint):  # the question and the deed
        assert refusal(call, workspace, "t.model")[0] == "not_a_checkpoint"
        assert refusal(call, workspace, "out/model_step7.pth")[0] == "no_such_file"
    assert jobs.deletable(workspace, "out/model_step10.pth") == out / "model_step10.pth"
    gone = jobs.delete_checkpoint(workspace, "out/model_step10.pth")
    assert sorted(path.name for path in gone) == ["latest.pth", "model_step10.pth"]
    assert command_lines.names_in(out) == ["model_step5.pth", "best.pth"]


def test_tensorboard_listens_on_loopback_and_says_where(workspace: Workspace):
    (workspace.root / "logs").mkdir()
    argv = command_lines.command_for("tensorboard", {"logdir": "logs"}, workspace)
    job = jobs.start_job(workspace, "tensorboard", "t", argv)
    try:
        url = wait_for(lambda: readers.tensorboard_url(job.log))
        assert is_loopback(url.split("/")[2].split(":")[0])
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"TensorBoard" in answer.read()
        jobs.stop_job(job)
        assert ended(workspace, job).state in ("stopped", "finished")
    finally:
        jobs.kill_job(job)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


class Parsed(Exception):
    """Carries what a program's own parser made of a command line."""


def parsed_by_the_program(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the real main() up to the moment when it has parsed its arguments."""
    assert argv[:2] == [sys.executable, "-m"]
    parse = argparse.ArgumentParser.parse_args

    def stop_there(parser: argparse.ArgumentParser, args: Any = None) -> Any:
        raise Parsed(vars(parse(parser, args)))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_there)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(argv[2]).main(argv[3:])
    monkeypatch.undo()
    return caught.value.args[0]


# What does not go with the other fields: tried in tests of their own.
NOT_TOGETHER = {"tokenizer": ("model_type", "vocab_size"), "preprocess": ("model_dir",),
                "prepare": ("model_dir", "target_size", "codec"), "synthesize": ("model_dir",),
                "watch": ("model_dir",), "evaluate": ("model_dir",)}
NOT_TOGETHER["compare"] = ("model_dir",)


def filled(kind: str, workspace: Workspace) -> dict[str, Any]:
    """A form with every field filled in, and its files in the workspace."""
    (workspace.root / "folder").mkdir(exist_ok=True)
    (workspace.root / "file").touch()
    (workspace.root / "a program").touch(mode=0o755)
    values = {"int": 100.0, "float": 0.5, "switch": True, "words": "am am+f2", "text": "--\u1230\u120b\u121d$(ls)",
              "line": "-\u1230\u120b\u121d $(ls)", "file": "file", "directory": "folder", "path": "folder",
              "program": "a program", "new_directory": "new", "manifests": "file::am\n\n./file\n",
              "new_file": "new/output", "model_folder": "folder", "patterns": "first:2\n\nbase-text\n",
              "factors": "new-text=10\n*.ln_?.weight=0.5"}
    form = {}
    for field in command_lines.PROGRAMS[kind].fields:
        value = (" ".join(field.choices[:2]) if field.type == "words" and field.choices else
                 field.choices[-1] if field.choices else values[field.type])
        value = "embedded" if field.name == "features" else value
        value = min(value, field.maximum) if field.type in ("int", "float") else value
        form[field.name] = f"{value}{field.suffixes[0]}" if field.suffixes else value
    form |= {name: "" for name in NOT_TOGETHER.get(kind, ())}
    return form | ({"longest": 30.5} if kind in command_lines.LENGTHS else {})


@pytest.mark.parametrize("kind", sorted(set(command_lines.PROGRAMS) - {"training", "tensorboard"}))
def test_every_program_accepts_the_command_line_of_its_form(kind: str, workspace: Workspace,
                                                            monkeypatch: pytest.MonkeyPatch):
    form = filled(kind, workspace)
    assert command_lines.problems(kind, form, workspace) == {}
    parsed = parsed_by_the_program(command_lines.command_for(kind, form, workspace), monkeypatch)
    root = workspace.root
    expected = {"switch": True, "words": ["am", "am+f2"], "text": form.get("text"),
                "file": root / "file", "directory": root / "folder", "path": root / "folder",
                "program": f"'{root}/a program'", "new_directory": root / "new"}
    for field in command_lines.PROGRAMS[kind].fields:
        value = expected.get(field.type, form[field.name])
        value = root / value if field.type == "new_file" else value
        value = [value] if kind in ("inspect", "collect") and not field.flag else value
        value = int(value or 0) if field.name == "rules" or field.type == "int" else value
        value = None if field.name in NOT_TOGETHER.get(kind, ()) else value
        assert parsed["paths" if kind == "inspect" else field.name] == value


def test_an_empty_field_shows_what_the_program_chooses(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    shown = {}
    for kind, program in command_lines.PROGRAMS.items():
        if kind in ("training", "tensorboard"):
            continue
        form = {name: value for name, value in filled(kind, workspace).items()
                if next(field.required for field in program.fields if field.name == name)}
        chosen = parsed_by_the_program(command_lines.command_for(kind, form, workspace), monkeypatch)
        shown |= {f"{kind}.{field.name}": chosen[field.name] for field in program.fields
                  if field.type in ("int", "float", "words") and f"{kind}.{field.name}.placeholder" in TEXTS}
    settings = trainer.TrainConfig()
    fields = command_lines.PROGRAMS["training"].fields
    shown |= {f"training.{field.name}": getattr(settings, field.name) for field in fields
              if field.type == "int" and getattr(settings, field.name)}
    told = {key: re.match(r"-?[a-z0-9.+ ]+", TEXTS[f"{key}.placeholder"][0]) for key, value in shown.items() if value}
    expected = {key: " ".join(value) if isinstance(value, list) else f"{value:g}"
                for key, value in shown.items() if value}
    assert {key: found and found[0].strip() for key, found in told.items()} == expected


def test_the_trainer_accepts_the_command_line_of_the_training_form(workspace: Workspace):
    form = {**filled("training", workspace), "resume": True}
    argv = command_lines.command_for("training", form, workspace)
    assert argv[:2] == [sys.executable, "trainers/train_gpt_v2.py"]
    file = str(workspace.root / "file")
    ints = {name: 100 for name in (
        "batch_size", "grad_accumulation", "epochs", "num_workers", "max_steps", "seed", "warmup_steps",
        "save_interval", "val_interval", "log_interval", "keep_checkpoints", "patience", "lora_rank",
        "val_batch_size", "max_val_batches")}
    floats = dict.fromkeys(("weight_decay", "grad_clip", "text_loss_weight", "mel_loss_weight"), 0.5)
    switches = dict.fromkeys(("profile", "eval_only", "accept_changed_data"), True)
    switches |= dict.fromkeys(("grad_checkpointing", "freeze_base_vocab", "compile"), False)
    assert trainer.parse_args(argv[2:]) == {
        "train_manifest": [f"{file}::am", file], "val_manifest": [f"{file}::am", file], "tokenizer": file,
        "output_dir": str(workspace.root / "new"), "learning_rate": 0.5, "amp": "off", "config": file,
        "base_checkpoint": file, "resume": file, "save_minutes": 0.5, "dropout": 0.5,
        "lora_alpha": 0.5, "lora_dropout": 0.5, "lora_targets": ["attn.c_attn", "attn.c_proj"], "emo_source": "mixed",
        "freeze": ["first:2", "base-text"], "lr_scale": ["new-text=10", "*.ln_?.weight=0.5"],
        **ints, **floats, **switches}
    assert command_lines.LORA_TARGETS == trainer.LORA_TARGETS


@pytest.mark.parametrize("form,flags", [
    ({"resume": True}, ["--resume", "auto"]),
    ({"resume": True, "resume_path": " x/model_step5.pth "}, ["--resume", "x/model_step5.pth"]),
    ({"resume": False, "resume_path": "x.pth"}, []),
    ({"amp": True, "resume": True}, ["--amp", "--resume", "auto"]),
    ({"amp": "auto"}, ["--amp"]), ({"amp": "bf16"}, ["--amp", "bf16"]), ({"amp": False}, []),
    ({"learning_rate": 2e-5, "batch_size": 8.0, "epochs": "10"},
     ["--learning-rate", "2e-05", "--batch-size", "8", "--epochs", "10"]),
    ({"num_workers": 0}, ["--num-workers", "0"]),
    ({"compile": "no", "grad_checkpointing": "yes"}, ["--grad-checkpointing", "--no-compile"]),
    ({"accept_changed_data": True}, []),
    ({"accept_changed_data": True, "resume": True}, ["--accept-changed-data", "--resume", "auto"]),
    *(({**dict.fromkeys(field_names("training"), empty), "resume": False}, []) for empty in ("", " ", None)),
    ({"train_manifests": [], "val_manifests": ["", " "]}, []),
])
def test_an_empty_field_emits_no_flag_and_resume_without_a_path_is_auto(form: dict[str, Any], flags: list[str]):
    argv = command_lines.training_command(form)
    assert argv[2:] == flags
    trainer.parse_args(argv[2:])


@pytest.mark.parametrize("name", sorted(command_lines.PRESETS))
def test_presets_are_values_that_the_form_and_the_trainer_accept(name: str, workspace: Workspace):
    form = command_lines.PRESETS[name]
    assert set(form) <= set(field_names("training"))
    assert command_lines.problems("training", {**form, "output_dir": "out"}, workspace) == {}
    settings = trainer.TrainConfig(**trainer.parse_args(command_lines.training_command(form)[2:]))
    assert trainer.config_problems(settings) == []


def test_every_flag_of_the_trainer_has_a_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        trainer.parse_args(["--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    fields = {field.flag for field in command_lines.PROGRAMS["training"].fields}
    assert fields <= flags and len(flags) > 30
    assert flags - fields <= {"--lora-alpha", "--lora-dropout", "--lora-targets"}


def test_every_number_of_every_form_has_bounds_that_are_said_in_plain_numbers(workspace: Workspace):
    tried = 0
    for kind, program in command_lines.PROGRAMS.items():
        for field in program.fields:
            if field.type not in ("int", "float"):
                continue
            tried += 1
            assert math.isfinite(field.minimum) and math.isfinite(field.maximum), (kind, field.name)
            for text, key in (("1" + 20 * "0", "too_large"), ("-1" + 20 * "0", "too_small")):
                found = command_lines.problems(kind, {field.name: text}, workspace)[field.name]
                assert found[0] == key and "e+" not in TEXTS[key][0].format(**found[1]), (kind, field.name)
    assert tried > 60


def test_the_form_and_the_trainer_agree_on_the_smallest_number_of_each_setting(workspace: Workspace):
    for field in command_lines.PROGRAMS["training"].fields:
        if field.type in ("int", "float"):
            smallest, largest = int(field.minimum), field.maximum
            beside = {"lora_rank": 1} if field.name in ("lora_alpha", "lora_dropout") else {}
            accepted = trainer.TrainConfig(**beside | {field.name: smallest})
            assert trainer.config_problems(accepted) == [], field.name
            assert trainer.config_problems(dataclasses.replace(accepted, **{field.name: smallest - 1})), field.name
            form = {"output_dir": "out", field.name: smallest - 1}
            assert command_lines.problems("training", form, workspace)[field.name][0] == "too_small"
            assert trainer.config_problems(trainer.TrainConfig(**beside | {field.name: largest})) == [], field.name


def test_what_the_form_and_the_trainer_say_of_weights_and_factors_is_the_same():
    assert run_files.MAX_WEIGHT == trainer.MAX_WEIGHT
    for suffix in ("", "::am", "::am@0.2", "::am@1000", "::am@1e3", "::am@0", "::am@-1", "::am@1e9", "::am@x", "::am@"):
        settings = trainer.TrainConfig(train_manifest=[f"a.jsonl{suffix}"])
        field = next(field for field in command_lines.PROGRAMS["training"].fields if field.name == "train_manifests")
        with contextlib.nullcontext() if not trainer.config_problems(settings) else pytest.raises(Refused):
            command_lines.check_weight(field, f"a.jsonl{suffix}")
    scale = next(field for field in command_lines.PROGRAMS["training"].fields if field.name == "lr_scale")
    for text in ("w=1", "w=1000", "w=1001", "w=0", "w=-1", "w=1e-2", "w=nan", "w", "w=", "w=.5"):
        try:
            trainer.lr_factors(["w"], trainer.TrainConfig(lr_scale=[text]), 0)
            expected: Any = contextlib.nullcontext()
        except trainer.UserError:
            expected = pytest.raises(Refused)
        with expected:
            command_lines.check_pattern(scale, text)


def test_the_preview_runs_in_a_shell_as_the_job_runs(workspace: Workspace):
    text = "--it's $(touch /tmp/owned) `x`\n\u1230\u120b\u121d"
    argv = command_lines.command("synthesize", {"checkpoint": f"{ROOT}/a b.pth", "text": text})
    shown = command_lines.preview(argv)
    assert shown.startswith(f"cd {ROOT} && python -m tools.synthesize --checkpoint 'a b.pth'")
    echo = f'import os, sys; print(ascii((os.getcwd(), sys.argv[1:])))  # {ROOT}'
    script = shown.replace("python -m tools.synthesize", f"{sys.executable} -c {command_lines.shlex.quote(echo)}")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii((str(ROOT), ["--checkpoint", "a b.pth", f"--text={text}"]))


@pytest.mark.parametrize("form,field,key", [
    ({"output_dir": ""}, "output_dir", "required"),
    ({"batch_size": "four"}, "batch_size", "not_a_number"),
    ({"batch_size": "nan"}, "batch_size", "not_a_number"),
    ({"batch_size": "1_0"}, "batch_size", "not_a_number"),
    ({"batch_size": 1.5}, "batch_size", "not_whole"),
    ({"epochs": 0}, "epochs", "too_small"),
    ({"learning_rate": -1e-5}, "learning_rate", "too_small"),
    ({"learning_rate": "inf"}, "learning_rate", "not_a_number"),
    ({"amp": "int8"}, "amp", "not_a_choice"),
    ({"tokenizer": "none.model"}, "tokenizer", "no_such_file"),
    ({"tokenizer": "data"}, "tokenizer", "not_a_file"),
    ({"train_manifests": "data/train_pairs.jsonl\nnone.jsonl::am"}, "train_manifests", "no_such_file"),
    ({"train_manifests": "data/train_pairs.jsonl::am@0"}, "train_manifests", "bad_weight"),
    ({"train_manifests": "data/train_pairs.jsonl::am@1001"}, "train_manifests", "bad_weight"),
    ({"train_manifests": "data/train_pairs.jsonl\ndata/val_pairs.jsonl::en@x"}, "train_manifests", "bad_weight"),
    ({"val_manifests": "data/val_pairs.jsonl::am@2"}, "val_manifests", "weight_of_validation"),
    ({"lr_scale": "new-text=10\nnew-text"}, "lr_scale", "bad_factor"),
    ({"lr_scale": "new-text=0"}, "lr_scale", "bad_factor"), ({"lr_scale": "=2"}, "lr_scale", "bad_factor"),
    ({"freeze": "first:2=0.5"}, "freeze", "factor_of_freeze"), ({"lora_rank": 4097}, "lora_rank", "too_large"),
    ({"lora_targets": "attn.c_attn attn.q"}, "lora_targets", "not_a_choice"),
    ({"lora_dropout": 1}, "lora_dropout", "too_large"),
    ({"lora_alpha": 16, "output_dir": "new"}, "lora_alpha", "goes_with_lora"),
    ({"lora_targets": "mlp.c_fc", "lora_rank": 0, "output_dir": "new"}, "lora_targets", "goes_with_lora"),
    ({"dropout": 1}, "dropout", "too_large"), ({"emo_source": "both"}, "emo_source", "not_a_choice"),
    ({"output_dir": "t.model"}, "output_dir", "not_a_directory"),
    ({"output_dir": "t.model/x"}, "output_dir", "not_writable"),
    ({}, "output_dir", "holds_checkpoints"),
    ({"resume": True, "resume_path": "out/model_step9.pth"}, "resume_path", "resume_missing"),
    ({"resume_path": "out/model_step5.pth"}, "resume_path", "resume_unchecked"),
    ({"resume": True, "resume_path": "elsewhere/latest.pth"}, "output_dir", "holds_other_checkpoints"),
    ({"resume": True, "output_dir": "elsewhere_best"}, "output_dir", "only_best"),
])
def test_what_can_be_known_before_training_starts_is_said_at_its_field(trained: Path, form: dict[str, Any], field: str,
                                                                       key: str):
    for name in ("elsewhere/latest.pth", "elsewhere_best/best.pth"):
        (trained / name).parent.mkdir(exist_ok=True)
        (trained / name).touch()
    found = command_lines.problems("training", {**TRAINING, **form}, Workspace(trained))
    assert list(found) == [field] and found[field][0] == key
    assert set(found[field][1]) == set(MESSAGES[key])


@pytest.mark.parametrize("form", [{"resume": True}, {"resume": True, "resume_path": "out/model_step5.pth"},
                                  {"resume": True, "lora_dropout": 0.1},
                                  {"output_dir": "fresh", "lora_rank": 8, "lora_alpha": 16, "lora_targets": "mlp.c_fc"},
                                  {"output_dir": "fresh/new"}, {"output_dir": "fresh", "resume": True}])
def test_a_form_without_mistakes_has_no_problems(trained: Path, form: dict[str, Any]):
    assert command_lines.problems("training", {**TRAINING, **form}, Workspace(trained)) == {}


# ---------------------------------------------------------------------------------------------------------------------
# The walls of the workspace

PATH_FIELDS = [(kind, field.name) for kind, program in sorted(command_lines.PROGRAMS.items())
               for field in program.fields if field.type in (*command_lines.PATHS, "manifests")]
ESCAPES = {"..": "path_outside", "../workspace2/x": "path_outside", "/etc/passwd": "path_outside", "/": "path_outside",
           "folder/../../x": "path_outside", "link_out/passwd": "path_outside", "link_file": "path_outside",
           ".webui/auth.json": "path_hidden", "folder/../.webui": "path_hidden", "link_in/auth.json": "path_hidden",
           ".git/config": "path_hidden", "a\0b": "path_impossible", "x" * 5000: "path_impossible",
           "link_loop": "path_impossible"}


@pytest.fixture
def walled(workspace: Workspace) -> Workspace:
    """A workspace with ways out of it."""
    root = workspace.root
    (root / "folder").mkdir()
    (root.parent / "workspace2").mkdir()
    load_or_make_credentials(workspace)
    for link, target in (("link_out", "/etc"), ("link_file", "/etc/passwd"), ("link_in", ".webui"),
                         ("link_loop", "link_loop")):
        (root / link).symlink_to(target)
    return workspace


@pytest.mark.parametrize("kind,name", PATH_FIELDS)
def test_no_field_leads_out_of_the_workspace(kind: str, name: str, walled: Workspace):
    for path, key in ESCAPES.items():
        form = {name: path, "resume": True}
        assert command_lines.problems(kind, form, walled)[name][0] == key, path
        assert refusal(command_lines.command_for, kind, form, walled)[0] == key, path
        if command_lines.PROGRAMS[kind].output == name:
            assert refusal(command_lines.output_of, kind, form, walled)[0] == key, path


def test_settings_uploads_and_deletions_stay_inside_too(walled: Workspace, tmp_path: Path):
    upload = tmp_path / "voice.wav"
    upload.write_bytes(WAV)
    for path in ESCAPES:
        for call in (lambda p: save_settings(walled, p, "training", {}), lambda p: walled.inside(p),
                     lambda p: load_settings(walled, p, "training", []), lambda p: jobs.delete_checkpoint(walled, p),
                     lambda p: take_upload(walled, upload, p, [".wav"], 1)):
            assert refusal(call, path)[0].startswith("path_"), path
    left = sorted(path.name for path in walled.root.iterdir())
    assert left == [".webui", "folder", "link_file", "link_in", "link_loop", "link_out"]


def test_only_an_executable_file_of_the_workspace_transcribes(workspace: Workspace):
    for name, mode in (("listen.sh", 0o755), ("notes.txt", 0o644)):
        (workspace.root / name).touch(mode=mode)
    (workspace.root / "recordings").mkdir()
    form = {"source": "recordings", "output_dir": "new"}
    found = {text: command_lines.problems("import", {**form, "transcriber": text}, workspace).get("transcriber")
             for text in ("listen.sh", "notes.txt", "recordings", "/bin/sh", "sh -c id", "listen.sh --fast")}
    assert {text: problem and problem[0] for text, problem in found.items()} == {
        "listen.sh": None, "notes.txt": "not_executable", "recordings": "not_a_file", "/bin/sh": "path_outside",
        "sh -c id": "no_such_file", "listen.sh --fast": "no_such_file"}


@pytest.mark.parametrize("kind,short,long,field", [
    ("import", "", "", None), ("import", "", "6", None), ("import", "", "5.9", "longest"), ("import", "5", "", None),
    ("import", "5.1", "", "shortest"), ("import", "4", "11", "longest"), ("import", "0.5", "1.5", None),
    ("filter", "", "", None), ("filter", "", "0.5", None), ("filter", "1", "1", "longest"),
    ("filter", "30", "", "shortest"), ("filter", "30", "31", None)])
def test_lengths_that_a_program_refuses_together_are_said_beside_the_field(workspace: Workspace, kind: str, short: str,
                                                                           long: str, field: str | None):
    (workspace.root / "file").touch()
    form = {"source": "file", "recordings": "file", "output_dir": "new", "shortest": short, "longest": long}
    found = command_lines.problems(kind, form, workspace)
    assert {name: key for name, (key, _) in found.items()} == ({field: "lengths_too_near"} if field else {})
    argv = command_lines.command_for(kind, form, workspace)[3:]
    with contextlib.nullcontext() if field is None else pytest.raises(ToolError, match="--shortest"):
        (import_recordings if kind == "import" else filter_dataset).parse(argv)


@pytest.mark.parametrize("form,said", [
    ({}, {}), ({"model_type": "bpe", "vocab_size": 300}, {}), ({"extend": "bpe.model", "target_size": 300}, {}),
    ({"target_size": 300}, {"target_size": "goes_with_extend"}),
    ({"extend": "bpe.model"}, {}),
    ({"extend": "bpe.model", "target_size": 300, "vocab_size": 9}, {"vocab_size": "not_with_extend"}),
    ({"extend": "none.model", "target_size": 300}, {"extend": "no_such_file"}),
    ({"output": "there.model"}, {"output": "file_in_the_way"})])
def test_what_a_tokenizer_cannot_be_made_with_is_said_beside_the_field(workspace: Workspace, form: dict[str, Any],
                                                                       said: dict[str, str]):
    for name in ("texts.jsonl", "bpe.model", "there.model"):
        (workspace.root / name).touch()
    form = {"texts": "texts.jsonl", "output": "new.model", **form}
    found = command_lines.problems("tokenizer", form, workspace)
    assert {name: key for name, (key, _) in found.items()} == said
    argv = command_lines.command_for("tokenizer", form, workspace)[3:]
    if "target_size" in said or "vocab_size" in said:
        with pytest.raises(ToolError, match="goes with --extend|from scratch"):
            train_tokenizer.main(argv)


def test_a_tokenizer_that_is_there_is_not_offered_to_be_replaced(workspace: Workspace):
    assert pipeline.suggestions("tokenizer", workspace, {})["output"] == "tokenizers/my_tokenizer_001.model"
    (workspace.root / "tokenizers").mkdir()
    (workspace.root / "tokenizers/my_tokenizer_001.model").touch()
    assert pipeline.suggestions("tokenizer", workspace, {})["output"] == "tokenizers/my_tokenizer_002.model"


@pytest.fixture
def for_features(workspace: Workspace) -> dict[str, Any]:
    """A form of preprocess, its files in the workspace, and released weights of two kinds."""
    for name in ("recordings.jsonl", "codec.pt", "t.model", "c.yaml"):
        (workspace.root / name).touch()
    for name, version in (("half", 2.0), ("newer", 2.5)):
        (workspace.root / name).mkdir()
        (workspace.root / name / "config.yaml").write_text(json.dumps({
            "version": version, "semantic_codec": {}, "s2mel": {},
            "gpt": {"condition_module": {}, "emo_condition_module": {}}}))
    return {"recordings": "recordings.jsonl", "tokenizer": "t.model", "output_dir": "new", "codec": "codec.pt"}


@pytest.mark.parametrize("form,said", [
    ({}, {}), ({"features": "embedded", "config": "c.yaml", "model_dim": 64}, {}),
    ({"codec": ""}, {"codec": "required"}), ({"model_dir": "half"}, {"model_dir": "not_with_features"}),
    ({"features": "indextts2"}, {"model_dir": "folder_needed"}),
    ({"features": "indextts2", "model_dir": "half"}, {"model_dir": "tool_refuses"}),
    ({"features": "indextts2", "model_dir": "nowhere"}, {"model_dir": "tool_refuses"}),
    ({"features": "indextts2", "model_dir": "newer"}, {"model_dir": "other_model"}),
    ({"features": "indextts2", "model_dir": "codec.pt"}, {"model_dir": "not_a_directory"}),
    ({"features": "indextts2", "model_dir": "half", "model_dim": 64},
     {"model_dim": "not_with_features", "model_dir": "tool_refuses"}),
    ({"features": "indextts2", "model_dir": "half", "config": "c.yaml"},
     {"config": "not_with_features", "model_dir": "tool_refuses"})])
def test_what_a_kind_of_features_needs_is_said_beside_the_field(workspace: Workspace, for_features: dict[str, Any],
                                                                form: dict[str, Any], said: dict[str, str]):
    found = command_lines.problems("preprocess", {**for_features, **form}, workspace)
    assert {name: key for name, (key, _) in found.items()} == said
    for key, values in found.values():
        assert set(values) == set(MESSAGES[key]) and all(text.format(**values) for text in TEXTS[key])


def test_a_model_folder_that_is_not_whole_is_explained_with_the_lines_that_download_the_rest(
        workspace: Workspace, for_features: dict[str, Any]):
    form = {**for_features, "features": "indextts2"}
    told = {folder: next(iter(command_lines.problems("preprocess", {**form, "model_dir": folder},
                                                     workspace)["model_dir"][1].values()))
            for folder in ("", "nowhere", "half")}
    for (folder, text), rest in zip(told.items(), ("", "", "gpt.pth bpe.model wav2vec2bert_stats.pt "), strict=True):
        place = workspace.root / (folder or "checkpoints")
        assert f"hf download IndexTeam/IndexTTS-2 {rest}--local-dir {place}" in text
    assert "gpt.pth is missing (IndexTeam/IndexTTS-2, 3.48 GB)" in told["half"]
    assert f"hf download facebook/w2v-bert-2.0 config.json preprocessor_config.json model.safetensors --cache-dir " \
           f"{workspace.root / 'half/hf_cache'}" in told["half"]


def test_a_whole_model_folder_is_taken_and_the_codec_that_the_page_filled_in_is_not_passed_on(
        workspace: Workspace, for_features: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    folder = workspace.root / "checkpoints"
    shutil.copytree(workspace.root / "half", folder)
    for name in model_folder.FOR_FEATURES[1:]:
        for path in model_folder.files_in(part := model_folder.PARTS[name], folder / part.place):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\2" + bytes(7) + b"{}")  # a .safetensors file without tensors, too
    with zipfile.ZipFile(folder / "gpt.pth", "w") as archive:
        archive.writestr("data.pkl", "")
    form = {**for_features, "features": "indextts2", "model_dir": "checkpoints"}
    assert command_lines.problems("preprocess", form, workspace) == {}
    parsed = parsed_by_the_program(command_lines.command_for("preprocess", form, workspace), monkeypatch)
    assert (parsed["features"], parsed["codec"]) == ("indextts2", None)
    preprocess.check_kind_of_features(argparse.Namespace(**parsed))
    (folder / "gpt.pth").write_bytes((folder / "gpt.pth").read_bytes()[:-30])
    found = command_lines.problems("preprocess", form, workspace)
    assert "gpt.pth is not whole" in found["model_dir"][1]["reason"]


@pytest.mark.parametrize("kind,name", [("preprocess", "features"), ("pairs", "emo_source"), ("training", "emo_source"),
                                       ("speak", "rules")])
def test_the_choices_are_those_of_the_program(kind: str, name: str, capsys: pytest.CaptureFixture[str]):
    field = next(field for field in command_lines.PROGRAMS[kind].fields if field.name == name)
    program = {"preprocess": preprocess, "pairs": build_pairs, "training": trainer, "speak": speak}[kind]
    with pytest.raises(SystemExit):
        (trainer.parse_args if kind == "training" else program.main)(["--help"])
    assert f"{field.flag} {{{','.join(field.choices)}}}" in capsys.readouterr().out


def test_filter_takes_the_outermost_number_of_each_of_its_fields(workspace: Workspace):
    """And a negative one is not taken for a flag."""
    (workspace.root / "file").touch()
    for field in command_lines.PROGRAMS["filter"].fields:
        for number in {field.minimum, field.maximum, -1e-3} if field.type in ("int", "float") else ():
            form = {"recordings": "file", field.name: number}
            if math.isfinite(number) and command_lines.problems("filter", form, workspace) == {}:
                parsed = filter_dataset.parse(command_lines.command_for("filter", form, workspace)[3:])
                assert getattr(parsed, field.name) == number


def finished(kind: str, output: Path) -> jobs.Job:
    return jobs.Job(kind, output, kind, kind, [], output, 0.0, "finished", 1, 0, None, None)


def test_the_newest_dataset_and_the_newest_texts_are_gone_on_with():
    one, two, texts = Path("/w/one"), Path("/w/two"), Path("/w/texts.jsonl")
    history = [finished("filter", one / "recordings.jsonl"), finished("import", one)]
    assert pipeline.candidates(history)["dataset"][0] == "/w/one/filtered.jsonl"
    assert pipeline.candidates(history)["recordings"][0] == "/w/one/recordings.jsonl"
    assert pipeline.candidates(history[1:])["judged"] == ["recordings/recordings.jsonl"]  # the filter comes next
    history = [finished("import", two), *history]
    assert pipeline.candidates(history)["dataset"][0] == "/w/two/recordings.jsonl"
    made = [finished("corpus", Path("/w/corpus")), finished("collect", texts)]
    found = pipeline.candidates(made)
    assert found["texts"] == [str(texts)] and found["demo_texts"][0] == "/w/corpus/texts.jsonl"


def test_a_side_step_never_swaps_the_data_of_the_main_way():
    own, voice = Path("/w/own"), Path("/w/voice")
    history = [finished("filter", voice / "recordings.jsonl"), finished("speak", voice), finished("import", own)]
    found = pipeline.candidates(history)
    assert found["dataset"][0] == "/w/own/recordings.jsonl" and found["recordings"][0] == "/w/own/recordings.jsonl"
    assert found["dataset"][-2:] == ["/w/voice/filtered.jsonl", "/w/voice/recordings.jsonl"]  # where nothing else is


def test_what_is_the_demos_is_neither_filled_in_nor_called_done_before_it_was_chosen(workspace: Workspace):
    for name in pipeline.DEMO.values():
        (workspace.root / name).parent.mkdir(exist_ok=True)
        (workspace.root / name).touch()

    def seen() -> tuple[dict[str, str], dict[str, str]]:
        made = pipeline.files_made(workspace, [])
        return pipeline.suggestions("training", workspace, made), pipeline.states(made, [])

    form, steps = seen()
    assert form == {"output_dir": "training_output"} and set(steps.values()) == {"open"}
    assert pipeline.next_step(steps) == "recordings"
    pipeline.save_way(workspace, "demo", "scratch")
    form, steps = seen()
    assert form["train_manifests"] == pipeline.DEMO["train_manifest"] and pipeline.next_step(steps) == "training"
    assert {step for step, state in steps.items() if state == "demo"} == {"prepare"}


def test_a_new_run_is_of_data_that_somebody_has_chosen(workspace: Workspace, page: Any):
    form = page.forms["training"]
    empty = {name: form.empty(name) for name in form.inputs} | {"output_dir": "out"}
    assert form.problems(empty) == {"train_manifests": ("data_needed", {}), "tokenizer": ("data_needed", {})}
    assert set(form.problems({**empty, "resume": True})) == {"train_manifests", "tokenizer"}  # nothing to go on from


def test_kept_and_rejected_rows_are_those_of_one_run(workspace: Workspace):
    from webui.data_summaries import filter_summary
    recordings, kept, rejected = (workspace.root / f"{name}.jsonl" for name in ("recordings", "filtered", "rejected"))
    assert filter_summary(recordings, workspace, "en") == ""
    rejected.write_text('{"row": 1, "id": "a", "reason": "noisy"}\n{"row": 2, "id": "b", "reason": "new <b>"}\n')
    kept.write_text('{"id": "c"}\n')
    told = filter_summary(recordings, workspace, "am").replace("\\", "")
    assert "የተቀበሉ፦ 1። የተተዉ፦ 2" in told and "- ጫጫታ ያለበት፦ 1" in told and "- new <b>፦ 1" in told
    os.utime(kept, (0, 0))  # of an earlier run; this one kept nothing
    assert "Kept: 0. Left out: 2." in filter_summary(recordings, workspace, "en")
    rejected.write_text("")
    os.utime(kept)
    assert filter_summary(recordings, workspace, "en").startswith("**Kept: 1. Left out: 0.**")


def test_a_report_is_shown_in_a_frame_of_its_own_in_which_nothing_runs(tmp_path: Path):
    from webui.data_summaries import report_frame
    (tmp_path / "filter_report.html").write_text('<p class="x">ሰላም</p>"><script>alert(1)</script>')
    frame = report_frame(tmp_path / "filter_report.html")
    assert frame.startswith('<iframe sandbox="" ') and frame.count("<") == 2 and frame.count(">") == 2
    assert "default-src &#x27;none&#x27;" in frame and "ሰላም" in frame


def test_every_rule_of_reading_has_a_name_in_both_languages():
    lines = (ROOT / "tests" / "amharic_text_cases.tsv").read_text(encoding="utf-8").splitlines()
    rules = {change.rule for line in lines for cell in line.split("\t") for change in read_aloud(cell).changes}
    assert len(rules) > 20 and {f"rule.{rule}" for rule in rules} <= set(TEXTS)


def test_a_file_that_would_be_written_over_is_a_problem_and_is_not_offered(workspace: Workspace):
    (workspace.root / "recordings.jsonl").touch()
    (workspace.root / "texts").mkdir()
    (workspace.root / "texts" / "own_001.jsonl").touch()
    form = {"recordings": "recordings.jsonl", "output": "texts/own_001.jsonl"}
    assert command_lines.problems("collect", form, workspace) == {
        "output": ("file_in_the_way", {"path": "texts/own_001.jsonl"})}
    assert pipeline.suggestions("collect", workspace, {})["output"] == "texts/own_002.jsonl"


def test_what_an_earlier_start_made_is_replaced_only_when_that_is_ticked(workspace: Workspace):
    data = workspace.root / "my_data"
    for path in (workspace.root / "recordings.jsonl", data / "utterances.jsonl", data / "train_pairs.jsonl"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    form = {"recordings": "recordings.jsonl", "output_dir": "my_data", "codec": "c.pt", "tokenizer": "t.model"}
    argv = command_lines.command_for("preprocess", form, workspace)
    job = dataclasses.replace(finished("preprocess", data), argv=argv, created=time.time() + 1)
    run = dataclasses.replace(finished("training", workspace.root / "run"), title="training run",
                              argv=["--train-manifest", str(data / "train_pairs.jsonl")])

    def found(**changed: Any) -> dict[str, Any]:
        return pipeline.in_the_way("preprocess", {**form, **changed}, workspace, lambda: [run, job])

    assert found() == {}  # the same again
    values = {"path": "my_data/utterances.jsonl", "users": "training run", "free": "my_data_2"}
    assert found(val_share="0.1") == {"output_dir": ("would_replace", values)}
    assert found(val_share="0.1", replace=True) == {} == found(output_dir="other")
    os.utime(workspace.root / "recordings.jsonl", (job.created + 9, job.created + 9))  # recordings came
    assert list(found()) == ["output_dir"]
    in_place = pipeline.in_the_way("pairs", {"data_dir": "my_data"}, workspace, lambda: [run])
    assert in_place == {"data_dir": ("would_replace_here", {"path": "my_data/train_pairs.jsonl",
                                                            "users": "training run"})}


def test_no_suggested_name_is_that_of_something_made(workspace: Workspace):
    for kind in ("codec", "synthesize", "evaluate", "export", "collect", "tokenizer"):
        field = next(field for field in command_lines.PROGRAMS[kind].fields
                     if field.name == command_lines.PROGRAMS[kind].output)
        name = pipeline.suggestions(kind, workspace, {})[field.name]
        (workspace.root / name).parent.mkdir(exist_ok=True)
        (workspace.root / name).touch()
        assert field.fresh or kind in pipeline.LEFT_BY
        assert not (workspace.root / pipeline.suggestions(kind, workspace, {})[field.name]).exists()


def test_files_are_judged_by_their_content_where_they_are_chosen(workspace: Workspace, trained: Path):
    from webui.file_kinds import kind_of, kind_problems
    places = {"README.md": ROOT / "README.md", "codec.pt": ROOT / "processed_data" / "speech_codec.pt",
              "t.model": TOKENIZER, "run.pth": trained / "out" / "latest.pth", "c.yaml": trained / "data/config.yaml",
              "pairs.jsonl": trained / "data" / "train_pairs.jsonl"}
    for name, path in places.items():
        shutil.copy(path, workspace.root / name)
    (workspace.root / "a.wav").write_bytes(WAV)
    (workspace.root / "rows.jsonl").write_text('{"id": "1", "text": "ሰላም", "audio": "a.wav"}\n')
    (workspace.root / "damaged.pth").write_bytes((workspace.root / "run.pth").read_bytes()[:5000])
    kinds = {path.name: kind_of(path) for path in workspace.root.iterdir() if path.is_file()}
    assert kinds == {"README.md": "text", "codec.pt": "codec", "t.model": "tokenizer", "run.pth": "checkpoint",
                     "c.yaml": "config", "pairs.jsonl": "manifest", "a.wav": "sound", "rows.jsonl": "recordings",
                     "damaged.pth": "other"}
    for kind, name, good, bad in (("training", "resume_path", "run.pth", "codec.pt"),
                                  ("training", "tokenizer", "t.model", "README.md"),
                                  ("training", "train_manifests", "pairs.jsonl::am@2", "rows.jsonl"),
                                  ("synthesize", "checkpoint", "run.pth", "README.md"),
                                  ("synthesize", "prompt", "a.wav", "rows.jsonl"),
                                  ("preprocess", "codec", "codec.pt", "run.pth"),
                                  ("preprocess", "recordings", "rows.jsonl", "pairs.jsonl")):
        assert kind_problems(kind, {name: good}, workspace) == {}
        (found,) = kind_problems(kind, {name: bad}, workspace).items()
        assert found[0] == name and found[1][0] == "not_a_kind" and f"file.{found[1][1]['found']}" in TEXTS
    assert kind_problems("training", {"resume_path": "damaged.pth"}, workspace) == {}  # its reader says more


def test_what_a_checkpoint_does_not_fit_is_said_before_start_and_changed_data_have_a_way_out(trained: Path,
                                                                                            tmp_path: Path):
    from webui.belonging import DataRows, resume_problems
    shutil.copytree(trained, tmp_path / "w")
    workspace = Workspace.open(tmp_path / "w")
    entry = verified(readers.CheckpointTable(), workspace.root / "out").checkpoints[0]

    def found(**form: Any) -> dict[str, Any]:
        return resume_problems({**TRAINING, "resume": True, **form}, workspace, entry, "out/latest.pth", DataRows())

    assert found() == {}
    manifest = workspace.root / "data" / "train_pairs.jsonl"
    assert run_files.data_fingerprint([str(manifest)])[0] == entry["train_data"]["fingerprint"]
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[1:]))
    rows = entry["train_data"]["rows"]
    assert found() == {"train_manifests": ("data_changed", {"then": rows, "now": rows - 1})}
    assert found(accept_changed_data=True) == {} == found(train_manifests="")
    assert found(train_manifests="data/train_pairs.jsonl::am@2")["train_manifests"][0] == "data_changed"
    (workspace.root / "t.model").write_bytes(TOKENIZER.read_bytes() + b" ")
    assert found()["tokenizer"][0] == "tokenizer_differs"


def test_programs_words_are_shown_with_the_names_of_fields_in_the_language_of_the_page():
    from webui.words import in_words
    said = in_words("training", {"reason": "Pass --accept-changed-data, or --other-flag"}, "am")["reason"]
    assert said == f"Pass “{TEXTS['training.accept_changed_data'][1]}”, or --other-flag"
    told = in_words("training", {"differences": "num_codes is 8 in a, but 9 in b; text_rules is 1 in a, but 2 in b"},
                    "en")["differences"]
    assert told == "number of codes: a has 8, b has 9; text rules: a has 1, b has 2"


def test_recordings_of_another_source_are_not_replaced_by_an_import(workspace: Workspace):
    for folder in ("a", "b", "made", "made_2"):
        (workspace.root / folder).mkdir()
    form = {"source": "a", "output_dir": "made"}
    assert pipeline.in_the_way("import", form, workspace, list) == {}
    (workspace.root / "made" / "recordings.jsonl").touch()
    wrong = {"output_dir": ("holds_recordings", {"path": "made", "free": "made_3"})}
    assert pipeline.in_the_way("import", form, workspace, list) == wrong  # written by hand, or in a terminal
    job = jobs.start_job(workspace, "import", "import made", [*python("print(1)"), str(workspace.root / "a")],
                         workspace.root / "made")
    made = [ended(workspace, job)]
    assert pipeline.in_the_way("import", form, workspace, lambda: made) == {}
    assert pipeline.in_the_way("import", {**form, "source": "b"}, workspace, lambda: made) == wrong


def test_an_output_file_of_another_kind_is_never_overwritten(workspace: Workspace):
    (workspace.root / "train_gpt_v2.py").touch()
    found = command_lines.problems("tokenizer", {"texts": "train_gpt_v2.py", "output": "train_gpt_v2.py"}, workspace)
    assert found == {"output": ("wrong_suffix", {"path": "train_gpt_v2.py", "suffixes": ".model"})}


WAV = b"RIFF\x24\0\0\0WAVEfmt "


@pytest.mark.parametrize("start,sound", [
    (WAV, True), (b"RF64\xff\xff\xff\xffWAVEds64", True), (b"fLaC\0\0\0\x22", True), (b"OggS\0\2", True),
    (b"ID3\4\0", True), (b"\xff\xfb\x90\x64", True), (b"\xff\xf3\x40", True), (b"\xff\xe3\x40", True),
    (b"RIFF\x24\0\0\0AVI LIST", True), (b"\0\0\0\x20ftypM4A ", True), (b"\0\0\0\x14ftyp3gp4", True),
    (b"\x1aE\xdf\xa3\x9f", True), (b"#!AMR\n", True), (b"0&\xb2u\x8ef\xcf\x11\xa6", True),
    (b"FORM\0\0\0\x2eAIFF", True), (b"RIFF\x24\0\0\0WEBPVP8 ", False), (b"\x7fELF\2\1", False), (b"#!/bin/sh\n", False),
    (b"\x89PNG\r\n", False), (b"\xff\xd8\xff\xe0", False), (b"<html>", False), (b"PK\3\4", False),
    (b"\xff", False), (b"", False)])
def test_an_upload_is_judged_by_its_content_not_by_its_name(workspace: Workspace, tmp_path: Path, start: bytes,
                                                            sound: bool):
    upload = tmp_path / "voice.wav"
    upload.write_bytes(start)
    if sound:
        assert take_upload(workspace, upload, "new", [".wav"], 1).read_bytes() == start
    else:
        assert refusal(take_upload, workspace, upload, "new", [".wav"], 1) == (
            "upload_not_sound", {"path": "voice.wav"})
        assert not (workspace.root / "new").exists()


@pytest.mark.parametrize("name,content,taken", [
    ("m.csv", "id|ሰላም\r\n".encode(), True), ("m.csv", "id\tሰላም".encode("utf-16"), True),
    ("m.xlsx", b"PK\3\4\x14", True), ("a.srt", b"1\n00:00", True), ("a.lab", b"", True),
    ("m.csv", b"PK\3\4\x14", False), ("m.xlsx", b"a,b\n", False), ("a.txt", b"\x7fELF\2\1\1\0", False),
    ("a.json", WAV, False)])
def test_texts_and_tables_are_judged_by_their_content_too(workspace: Workspace, tmp_path: Path, name: str,
                                                          content: bytes, taken: bool):
    (tmp_path / name).write_bytes(content)
    if taken:
        assert take_upload(workspace, tmp_path / name, "new", TRANSCRIPTS, 1).read_bytes() == content
    else:
        assert refusal(take_upload, workspace, tmp_path / name, "new", TRANSCRIPTS, 1) == (
            "upload_not_text", {"path": name})


def test_uploads_take_what_import_reads():
    assert set(AUDIO) == sound_names.SOUNDS and len(set(AUDIO)) == len(AUDIO)
    read = transcript_tables.TABLES | {*recording_layouts.CUES, *recording_layouts.SIDECARS}
    assert set(TRANSCRIPTS) == {Path(f"a{suffix}").suffix for suffix in read}
    assert set(SHEETS) == transcript_tables.SHEETS and set(command_lines.LAYOUTS) == set(recording_layouts.LAYOUTS)


@pytest.fixture
def built(workspace: Workspace) -> Any:
    """(what Gradio serves, what the handlers of the tabs work with): a page without a browser."""
    from webui.whole_page import create_page
    return create_page(workspace)


@pytest.fixture
def page(built: Any) -> Any:
    return built[1]


def test_a_window_is_asked_to_look_again_when_something_changed_and_only_then(workspace: Workspace, page: Any):
    typed = [""] * sum(len(watcher.inputs) for watcher in page.watchers)
    assert page.has_changed("one")  # nobody knows what it shows
    page.tick("one", "recordings", "en", *typed)
    assert not page.has_changed("one") and page.has_changed("other")
    (workspace.root / pipeline.RECORDINGS).mkdir()
    (workspace.root / pipeline.RECORDINGS / "r.wav").write_bytes(b"RIFF")
    assert page.has_changed("one")
    page.tick("one", "recordings", "en", *typed)
    assert not page.has_changed("one")
    page.tick("one", "listen", "en", *typed)
    (workspace.root / pipeline.RECORDINGS / "s.wav").write_bytes(b"RIFF")  # listed in a tab that is closed now
    assert not page.has_changed("one")


def test_whether_something_changed_is_told_only_to_who_has_logged_in(page: Any):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    app: Any = Starlette(routes=[page.route()])
    assert TestClient(app).get("/changed/nobody").text == "yes"
    app.auth, app.cookie_id, app.tokens = {"almaz": "secret"}, "x", {"good": "almaz"}
    assert TestClient(app).get("/changed/nobody").status_code == 401
    assert TestClient(app, cookies={"access-token-x": "good"}).get("/changed/nobody").text == "yes"


def test_the_server_remembers_what_the_last_windows_show(page: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_base, "WINDOWS", 2)
    typed = [""] * sum(len(watcher.inputs) for watcher in page.watchers)
    for window in ("one", "two", "one", "three"):
        page.tick(window, "dataset", "en", *typed)
    assert page.has_changed("two") and not page.has_changed("one") and not page.has_changed("three")


def test_the_page_stays_small_for_what_it_takes_to_open_grows_with_components_times_events(built: Any):
    config = built[0].get_config_file()
    assert len(config["components"]) <= 950
    assert sum(len(event["targets"]) for event in config["dependencies"]) <= 200  # was 543, and 5 s instead of 3


def test_no_event_but_a_preset_by_mouse_gives_the_server_many_boxes_for_the_page_gets_slower_with_each(built: Any):
    config = built[0].get_config_file()
    boxes = {part["id"] for part in config["components"] if not part["type"].endswith("state")}
    many = [event["targets"] for event in config["dependencies"]
            if event["backend_fn"] and len(boxes & {*event["inputs"]}) > 6]
    assert [[name for _, name in targets] for targets in many] == [["select"]]


def test_what_is_asked_with_many_boxes_reaches_its_handler_and_the_answer_its_boxes_alone(
        page: Any, monkeypatch: pytest.MonkeyPatch):
    states = list(dict.fromkeys(part for _, inputs, _ in page.asks for part in inputs if part.stateful))
    outputs = list(dict.fromkeys(part for *_, own in page.asks for part in own))
    for number, (_, inputs, own) in enumerate(page.asks):
        given, called = {part: f"box {i}" for i, part in enumerate(inputs)}, []

        def handle(*values: str, own: Any = own, called: Any = called) -> Any:
            called.extend(values)
            return [f"to {i}" for i in range(len(own))] if len(own) > 1 else "to 0"

        packed = json.dumps([number, *(given[part] for part in inputs if not part.stateful), 1])
        with monkeypatch.context() as patch:
            patch.setattr(page, "asks", [*page.asks[:number], (handle, inputs, own)])
            *told, acted = page.answer(states, outputs, packed, *(given.get(state, "none") for state in states))
        assert called == list(given.values()) and float(acted) > 0
        assert {part: value for part, value in zip(outputs, told, strict=True) if value != gr.skip()} == {
            part: f"to {i}" for i, part in enumerate(own)}


def test_a_field_that_opens_as_it_was_made_is_told_nothing_and_any_other_all_that_differs(built: Any, page: Any):
    config = {part["id"]: part["props"] for part in built[0].get_config_file()["components"]}
    for form in page.forms.values():
        for language in ("en", "am"):
            opened = form.open({}, language, [], {})
            for (name, box), update in zip(form.inputs.items(), opened[1:-1], strict=True):
                shows = {**config[box._id], **update}
                assert shows.get("info", "") == form.help(name, language), name
                assert "problem" not in shows["elem_classes"], name
                assert shows["value"] == form.empty(name) or update["value"] == shows["value"], name
        told = [update for update in form.open({}, "en", [], {})[1:-1] if len(update) > 1]
        assert all("value" in update for update in told), form.kind
    training = page.forms["training"]
    opened = dict(zip(training.inputs, training.open({"epochs": "0"}, "en", [], {})[1:], strict=False))
    assert opened["epochs"]["elem_classes"][-1] == "problem" and opened["epochs"]["value"] == "0"


def test_an_output_that_is_skipped_costs_the_server_no_new_component(built: Any, monkeypatch: pytest.MonkeyPatch):
    tick = next(event for event in built[0].fns.values() if len(event.outputs) > 100 and event.fn is not None
                and "tick" in event.name)
    made = []
    new = gr.Markdown.__init__
    monkeypatch.setattr(gr.Markdown, "__init__", lambda self, *args, **options: (made.append(1),
                                                                               new(self, *args, **options))[1])
    at = next(i for i, part in enumerate(tick.outputs) if isinstance(part, gr.Markdown))
    for value, expected, built_new in ((gr.skip(), gr.skip(), 0), ("said", "said", 0),
                                       (gr.update(value="said"), {**gr.update(value="said")}, 1)):
        answer = [gr.skip()] * len(tick.outputs)
        answer[at] = value
        made.clear()
        shown = asyncio.run(built[0].postprocess_data(tick, answer, None))
        assert shown[at] == expected and len(made) == built_new
        assert shown[:at] + shown[at + 1:] == [gr.skip()] * (len(shown) - 1)
    with pytest.raises(ValueError, match="output"):  # too few: Gradio's own error
        asyncio.run(built[0].postprocess_data(tick, answer[1:], None))


def test_what_the_browser_packs_reaches_each_watcher_in_its_place(page: Any, monkeypatch: pytest.MonkeyPatch):
    given = [part for watcher in page.watchers for part in watcher.inputs]
    boxes = [f"box {i}" for i, part in enumerate(given) if not part.stateful]
    states = [f"state {i}" for i, part in enumerate(given) if part.stateful]
    monkeypatch.setattr(page, "tick", lambda *asked: asked)
    asked = page.tick_packed(json.dumps(["one", "training", "am", *boxes, 1]), *states)
    assert states and asked == ("one", "training", "am", *(
        f"{'state' if part.stateful else 'box'} {i}" for i, part in enumerate(given)))


def test_what_a_step_has_made_fills_an_empty_box_but_not_what_somebody_typed(workspace: Workspace, page: Any):
    form = page.forms["collect"]
    opened = form.open({}, "en", [], {})
    memory, output = opened[0], list(form.inputs).index("output")
    typed = [update.get("value", form.empty(name)) for name, update in zip(form.inputs, opened[1:], strict=False)]
    assert typed[output] == "texts/own_001.jsonl"
    (workspace.root / "texts").mkdir()
    (workspace.root / "texts" / "own_001.jsonl").write_text('{"text": "ሰላም"}\n', encoding="utf-8")
    later, draft, *shown = form.check("now", memory, "en", *typed)
    assert shown[output]["value"] == "texts/own_002.jsonl" and later.filled["output"] == "texts/own_002.jsonl"
    assert draft == {}
    kept, draft, *shown = form.check("now", later, "en", *typed)  # typed since, as it was before
    assert "value" not in shown[output] and draft["output"] == "texts/own_001.jsonl"
    assert "problem" in shown[output]["elem_classes"] and kept.filled == later.filled
    assert "__type__" in form.check("", later, "en", *typed)[0]  # skipped: the draft is still on its way


def test_nothing_but_tabs_lies_between_the_tabs(built: Any):
    """Gradio counts a state there as a tab, and gives those after it each other's names."""
    import gradio as gr
    (tabs,) = (block for block in built[0].blocks.values() if isinstance(block, gr.Tabs))
    assert len(tabs.children) > 5 and all(isinstance(child, gr.Tab) for child in tabs.children)


def test_the_checkpoint_that_was_asked_about_is_deleted_whatever_the_box_says_by_then(
        workspace: Workspace, built: Any):
    (workspace.root / "run").mkdir()
    for name in ("latest.pth", "model_step5.pth", "README.md"):
        (workspace.root / "run" / name).touch()
    handlers = {handler.name: handler for handler in built[0].fns.values() if handler.name in ("ask", "remove")}
    box, asked = handlers["ask"].inputs[0], handlers["ask"].outputs[-1]
    assert handlers["remove"].inputs[0] is asked and asked is not box
    _, confirmation, question, _, path = handlers["ask"].fn("./run/model_step5.pth", "en")
    assert confirmation["visible"] and question.startswith("Delete run/model\\_step5.pth for good?")
    assert "Deleted" in handlers["remove"].fn(path, "en")[1]
    assert sorted(file.name for file in (workspace.root / "run").iterdir()) == ["README.md", "latest.pth"]
    # No question about what is refused anyway; and none stays open when the box has changed.
    problem, confirmation, question, _, path = handlers["ask"].fn("run/README.md", "en")
    assert "is no checkpoint" in problem["info"] and (confirmation["visible"], question, path) == (False, "", "")
    hides = [handler for handler in built[0].fns.values() if (box._id, "change") in handler.targets]
    assert [handler.fn()["visible"] for handler in hides] == [False]


def test_of_an_upload_all_that_can_be_is_taken_and_the_rest_is_named(workspace: Workspace, tmp_path: Path, page: Any):
    from webui.data_tabs import take_uploads
    paths = [tmp_path / f"{name}.wav" for name in "abcx"]
    for path in paths:
        path.write_bytes(b"no sound" if path.stem == "x" else WAV)
    (workspace.root / "new").mkdir()
    (workspace.root / "new" / "b.wav").write_bytes(b"mine")
    told = take_uploads(page, paths, "new", "en").replace("\\", "")
    assert "✓ Files uploaded to new: 2." in told and "Left as they are, since they were there already: b.wav." in told
    assert "x.wav: what is in it is no" in told
    assert sorted(path.name for path in (workspace.root / "new").iterdir()) == ["a.wav", "b.wav", "c.wav"]
    assert (workspace.root / "new" / "b.wav").read_bytes() == b"mine"


def test_uploads_keep_their_name_are_limited_and_overwrite_nothing(workspace: Workspace, tmp_path: Path):
    upload = tmp_path / "voice.WAV"
    upload.write_bytes(WAV.ljust(2_000_000, b"x"))
    taken = take_upload(workspace, upload, "recordings/new", [".wav"], 2)
    assert taken == workspace.root / "recordings/new/voice.WAV" and taken.stat().st_size == 2_000_000
    assert refusal(take_upload, workspace, upload, "recordings/new", [".wav"], 2)[0] == "file_in_the_way"
    assert refusal(take_upload, workspace, upload, "recordings", [".wav"], 1)[0] == "upload_too_large"
    assert refusal(take_upload, workspace, upload, "recordings", [".flac"], 2)[0] == "upload_type"


def test_password_and_secret_are_random_private_and_kept_for_the_next_start(workspace: Workspace, tmp_path: Path):
    user, password = load_or_make_credentials(workspace)
    secret = load_or_make_secret(workspace)
    assert len(password) >= 20 and len(secret) >= 32
    again = Workspace.open(workspace.root)
    assert load_or_make_credentials(again) == (user, password) and load_or_make_secret(again) == secret
    modes = {path.name: oct(path.stat().st_mode & 0o777)
             for path in [workspace.private, *workspace.private.iterdir()]}
    assert modes == {".webui": "0o700", "auth.json": "0o600", "secret.json": "0o600"}
    other = Workspace.open(tmp_path / "other")
    assert load_or_make_credentials(other)[1] != password and load_or_make_secret(other) != secret
    (workspace.private / "auth.json").write_text('{"user": "')  # torn: a new one
    assert load_or_make_credentials(workspace)[1] != password


@pytest.mark.parametrize("host,loopback", [
    (None, True), ("localhost", True), ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True),
    ("0.0.0.0", False), ("::", False), ("", False), ("192.168.1.5", False), ("example.org", False),
    ("localhost.evil", False)])
def test_only_loopback_addresses_go_without_a_password(host: str | None, loopback: bool):
    assert is_loopback(host) is loopback


def test_a_form_comes_back_from_its_file_as_it_was_saved(workspace: Workspace):
    form = {"output_dir": "\u1230\u120b\u121d", "batch_size": 8, "amp": True, "learning_rate": None}
    path = save_settings(workspace, "settings/mine", "training", form)
    assert path == workspace.root / "settings/mine.json"
    assert load_settings(workspace, "settings/mine.json", "training", form) == form
    assert load_settings(workspace, "settings/mine", "training", ["amp"]) == {"amp": True}
    save_settings(workspace, "settings/mine", "training", {**form, "amp": False})
    assert load_settings(workspace, "settings/mine", "training", ["amp"]) == {"amp": False}
    assert refusal(load_settings, workspace, "settings/mine", "preprocess", form)[0] == "not_settings"
    assert refusal(load_settings, workspace, "none", "training", form)[0] == "no_such_file"
    (workspace.root / "last_exit.json").write_text('{"step": 1}')
    assert refusal(save_settings, workspace, "last_exit.json", "training", form)[0] == "file_in_the_way"
    assert refusal(load_settings, workspace, "last_exit.json", "training", form)[0] == "not_settings"


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def metrics_line(step: int, kind: str = "train", **values: float) -> bytes:
    return json.dumps({"kind": kind, "epoch": 0, "step": step, "text_loss": 1 / step, **values}).encode() + b"\n"


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "out/logs/run_20260101_000000/metrics.jsonl"
    path.parent.mkdir(parents=True)
    return path


def steps(reader: readers.MetricsReader) -> list[int]:
    return [point["step"] for point in reader.points()]


def test_metrics_are_read_on_and_a_torn_last_line_waits_for_its_rest(metrics: Path):
    reader = readers.MetricsReader(metrics.parents[2])
    assert steps(reader) == []
    line = metrics_line(3)
    with metrics.open("ab", buffering=0) as file:
        file.write(metrics_line(1) + b"no JSON\n" + metrics_line(2, "val") + line[:9])
        assert steps(reader) == [1, 2] == steps(reader)
        file.write(line[9:])
        assert steps(reader) == [1, 2, 3]
        assert reader.points() == read_runs(metrics.parents[2])
    assert {point["run"] for point in reader.points()} == {"run_20260101_000000"}


def test_only_the_newest_run_of_a_directory_is_drawn(metrics: Path):
    """Killed before its first checkpoint and started again, a run leaves a folder whose steps begin at 1 too."""
    reader = readers.MetricsReader(metrics.parents[2])
    metrics.write_bytes(metrics_line(1) + metrics_line(2))
    assert steps(reader) == [1, 2]
    again = metrics.parents[1] / "run_20260101_000500" / metrics.name
    again.parent.mkdir()
    again.write_bytes(metrics_line(1))
    os.utime(metrics, (1, 1))
    assert steps(reader) == [1] and reader.points()[0]["run"] == again.parent.name
    os.utime(again, (0, 0))  # the older one was resumed, and goes on
    assert steps(reader) == [1, 2]


def test_files_that_the_page_cannot_name_are_left_out(workspace: Workspace):
    folder = workspace.root / "recordings"
    folder.mkdir()
    for name in (b"a.WAV", "ሰላም.mp3".encode(), b"old\xff.wav", b".hidden.wav", b"notes.txt"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(b"12345")
    (folder / "gone.wav").symlink_to("nowhere")
    assert list(readers.files_in(folder, (".wav", ".mp3")).items()) == [("a.WAV", 5), ("ሰላም.mp3", 5)]
    (folder / "b.wav").touch()
    assert list(readers.files_in(folder, (".wav", ".mp3"))) == ["a.WAV", "b.wav", "ሰላም.mp3"]
    assert readers.files_in(folder / "nothing", (".wav",)) == {}
    (workspace.root / "link").symlink_to(os.fsdecode(os.fsencode(folder) + b"/old\xff.wav"))
    for typed in ("link", "recordings/\udcff"):
        key, values = refusal(workspace.inside, typed, True)
        assert json.dumps(values, ensure_ascii=False).encode() and key in ("path_impossible", "no_such_file")


def test_a_folder_of_many_recordings_is_not_read_at_every_look(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    (workspace.root / "a.wav").touch()
    monkeypatch.setattr(readers.time, "monotonic", lambda: 5.0)
    assert readers.files_in(workspace.root, (".wav",)) == {"a.wav": 0}
    monkeypatch.setattr(readers.os, "scandir", None)
    assert readers.files_in(workspace.root, (".wav",)) == {"a.wav": 0}


@pytest.mark.parametrize("content,key", [
    (None, "not_a_file"), (b"fLaC\0\0\n\xff\xfe\n", "not_json_lines"), (b"a.wav\thello\n", "not_json_lines")])
def test_what_is_no_dataset_at_all_is_said_once(workspace: Workspace, content: bytes | None, key: str):
    path = workspace.root / "dataset"
    path.mkdir() if content is None else path.write_bytes(content)
    assert refusal(read_dataset, path, workspace) == (key, {"path": "dataset"})


def test_a_dataset_with_names_that_are_no_text_can_be_shown(workspace: Workspace):
    path = workspace.root / "recordings.jsonl"
    path.write_text('{"id": "1", "text": "t", "audio": "\\udcff.wav"}\n')
    found = read_dataset(path, workspace)
    assert found.faults == [(1, "dataset.no_audio", {"path": "?.wav"})] and found.first[0][3] == "?.wav"


def test_check_and_preprocess_leave_out_the_same_rows_for_the_same_reasons(tmp_path: Path,
                                                                            capsys: pytest.CaptureFixture[str]):
    rate = 22050
    sound = {name: 0.2 * np.sin(np.arange(round(seconds * rate)) * (0.05 + 0.001 * number)) for number, (name, seconds)
             in enumerate((("a", 1), ("b", 1), ("c", 1), ("long", 19), ("tick", 0.05)))}
    sound["silent"] = np.zeros(rate)
    for name, samples in sound.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, rate)
    (tmp_path / "letter.wav").write_text("no sound")
    texts = {"a": "ሰላም ቤት", "b": "ውሃ ሰላም", "c": "ቤት ውሃ", "long": "ሰላም ሰላም", "tick": "ቤት", "silent": "ውሃ ውሃ",
             "letter": "ቤት ቤት", "gone": "ሰላም ውሃ", "latin": "hello", "empty": " ", "wordy": "ሰላም " * 80,
             "twice": "ሰላም ቤት",
             "sign": "ሰላም ☎ ቤት"}
    rows = [{"id": name, "text": text, "audio": f"{name if name in sound or name in ('letter', 'gone') else 'c'}.wav",
             **({"split": "val"} if name in ("a",) else {})} for name, text in texts.items()]
    recordings = tmp_path / "recordings.jsonl"
    recordings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec, out = ROOT / "processed_data" / "speech_codec.pt", tmp_path / "out"
    preprocess.main(["--recordings", str(recordings), "--codec", str(codec), "--tokenizer", str(TOKENIZER),
                     "--output-dir", str(out)])
    expected = {(row["id"], row["reason"]) for row in read_jsonl(out / "skipped.jsonl")}
    for flags in (["--codec", str(codec), "--tokenizer", str(TOKENIZER)], []):
        usable, skipped = check_dataset.check(check_dataset.parse([str(recordings), *flags]))
        assert {(row["id"], row["reason"]) for row in skipped} == expected and len(expected) == 10
        assert {item.row["id"] for item in usable} == {"a", "b", "c"}
    check_dataset.main([str(recordings)])
    assert "3 of 13 rows can be used: 2 for training, 1 for validation" in capsys.readouterr().out


def test_the_page_finds_in_a_dataset_what_the_tools_refuse_or_leave_out(workspace: Workspace):
    for name in ("1.wav", "notes.txt"):
        (workspace.root / name).touch()
    good = {"id": "a", "text": "t", "audio": "1.wav"}
    kinds = {"missing": {"id": "b", "text": "t"}, "not_a_text": good | {"id": 5}, "id_twice": good,
             "other_split": good | {"id": "c", "split": "test"}, "empty_text": good | {"id": "d", "text": " "},
             "no_audio": good | {"id": "e", "audio": "2.wav"}, "not_sound": good | {"id": "f", "audio": "notes.txt"}}
    path = workspace.root / "recordings.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, *kinds.values()])))
    found = read_dataset(path, workspace).faults
    assert [(line, key) for line, key, _ in found] == [(2 + i, f"dataset.{kind}") for i, kind in enumerate(kinds)]
    for _, key, values in found:
        assert all(text.format(**values) for text in TEXTS[key])
    for kind in ("missing", "not_a_text", "id_twice"):
        path.write_text("\n".join(map(json.dumps, [good, kinds[kind]])))
        with pytest.raises(ToolError, match=str(path)):
            read_recordings(path)


@pytest.mark.parametrize("rest", [[], [5], [5, 6, 7, 8, 9, 10, 11, 12]])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_resume_that_cut_the_file_takes_its_points_back(metrics: Path, rest: list[int], replaced: bool):
    """Also when the file has grown past its old length by the time somebody looks."""
    reader = readers.MetricsReader(metrics.parents[2])
    metrics.write_bytes(b"".join(metrics_line(step, lr=0.1) for step in range(1, 9)))
    assert steps(reader) == list(range(1, 9))
    content = b"".join([*(metrics_line(step, lr=0.1) for step in range(1, 5)), *(metrics_line(step) for step in rest)])
    target = metrics.with_name("partial") if replaced else metrics
    target.write_bytes(content)
    target.replace(metrics)
    assert steps(reader) == [1, 2, 3, 4, *rest] and reader.points() == read_runs(metrics.parents[2])
    shutil.rmtree(metrics.parents[1])
    assert steps(reader) == []


def test_a_long_history_is_read_in_bounded_portions_and_thinned_but_keeps_every_validation(
        metrics: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "READ_AT_ONCE", 1000)
    monkeypatch.setattr(readers, "MAX_TRAIN_POINTS", 100)
    metrics.write_bytes(b"".join(metrics_line(step) + metrics_line(step, "val") * (step % 50 == 0)
                                 for step in range(1, 1001)))
    reader = readers.MetricsReader(metrics.parents[2])
    assert 0 < len(reader.points()) < 20
    points = read_runs(metrics.parents[2])
    assert [point["step"] for point in points if point["kind"] == "val"] == list(range(50, 1001, 50))
    train = [point["step"] for point in points if point["kind"] == "train"]
    assert train[0] == 1 and 990 <= train[-1] <= 1000 and 50 <= len(train) <= 201 and train == sorted(train)


def test_a_sampled_curve_keeps_its_ends_and_its_spikes():
    pairs = [(step, math.sin(step)) for step in range(10_000)]
    pairs[1234] = (1234, 50.0)
    pairs[5678] = (5678, -50.0)
    sampled = readers.sample_points(pairs, 500)
    assert len(sampled) <= 500 and sampled == sorted(sampled)
    assert {pairs[0], pairs[-1], pairs[1234], pairs[5678]} <= set(sampled)
    assert readers.sample_points(pairs[:500], 500) == pairs[:500]
    points = [{"kind": "train", "step": i, "lr": value} for i, value in enumerate([1.0, math.nan, math.inf, None, 2])]
    assert readers.curve(points, "train", "lr") == [(0, 1.0), (4, 2.0)] and readers.curve(points, "val", "lr") == []


def validated(val: list[float], train: list[float]) -> list[readers.Point]:
    """A validation every ten steps, two training lines before each."""
    return [point for number, (of_val, of_train) in enumerate(zip(val, train, strict=True), 1) for point in (
        {"kind": "train", "step": 10 * number - 5, "mel_loss": of_train + 0.3},
        {"kind": "train", "step": 10 * number, "mel_loss": of_train - 0.3},
        {"kind": "val", "step": 10 * number, "mel_loss": of_val})]


@pytest.mark.parametrize("val,train,warned", [
    ([5, 4, 4.1, 4.2, 4.3], [5, 4, 3, 2, 1], True), ([4, 4.1, 4.2, 4.3], [4, 3, 2, 1], True),
    ([5, 4, 4.1, 4.2], [5, 4, 3, 2], False),  # only two worse ones
    ([5, 4, 4.1, 4.2, 4.3], [5, 4, 4, 4, 4.1], False),  # training does not fall either: a learning rate too high
    ([5, 4, 4.1, 3.9, 4.0], [5, 4, 3, 2, 1], False), ([5, 4, 4, 4, 4], [5, 4, 3, 2, 1], False),
    ([5, 4, 3, 2, 1], [5, 4, 3, 2, 1], False), ([5, 4, math.nan, 4.1, 4.2, 4.3], [5, 4, 3, 3, 2, 1], True),
    ([], [], False), ([4], [4], False)])
def test_a_run_that_learns_by_heart_is_told_from_one_that_does_not(val: list[float], train: list[float], warned: bool):
    found = readers.overfit(validated(val, train))
    assert (found is not None) == warned
    if found:
        assert (found.best, found.last, found.last_step) == (4, 4.3, 10 * len(val))


def test_no_warning_where_nothing_was_logged_between_validations():
    points = [point for point in validated([4, 5, 6, 7], [4, 3, 2, 1]) if point["kind"] == "val"]
    assert readers.overfit(points) is None


def test_the_page_says_what_helps_when_validation_rises_while_training_falls(workspace: Workspace, page: Any):
    log = workspace.root / "out/logs/run_1/metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(point) + "\n" for point in validated([4, 5, 6, 7], [4, 3, 2, 1])))
    (look,) = [watcher.look for watcher in page.watchers
               if "training-overfit" in [component.elem_id for component in watcher.outputs]]
    told = look([], "en", "out")[0]
    assert "7.0000 at step 40, but 4.0000 at step 10" in told and "dropout" in told and "Patience" in told
    assert "4.0000" in look([], "am", "out")[0] and look([], "en", "elsewhere")[0] == ""


def test_progress_is_read_from_what_the_programs_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    progress = ToolProgress("reading recordings", 200)
    progress.start, progress.due = progress.start - 10, 0.0
    progress.update(50, "loss 0.1")
    log = tmp_path / "log.txt"
    assert readers.progress_of(log) is None
    log.write_text(capsys.readouterr().out)
    assert readers.progress_of(log) == readers.Progress("reading recordings", 50, 200, 30)
    train = "[Train] epoch=0 step={} text_loss=1.0 mel_loss=1.0 mel_top1=0.1 lr=1e-3\n"
    log.write_text(train.format(7))
    assert readers.progress_of(log) == readers.Progress("training", 7, None, None)
    log.write_text("[Progress] training: 7/40, 5 s, about 90 s left\n" + train.format(9))
    assert readers.progress_of(log) == readers.Progress("training", 9, 40, 90)
    log.write_text("[Progress] training: 1/40, 0 s\n[Progress] validation: 3/9\n")
    assert readers.progress_of(log) == readers.Progress("validation", 3, 9, None)
    log.write_text(log.read_text() + train.format(2))
    assert readers.progress_of(log) == readers.Progress("training", 2, 40, None)


def test_memory_of_machine_process_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf 'NVIDIA A100, 1000, 81920, 97\\nNVIDIA GB10, [N/A], [N/A], 3\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine = readers.Machine()
    memory = machine.memory(os.getpid())
    assert 0 < memory["process"] < memory["total"] and 0 < memory["available"] <= memory["total"]
    assert wait_for(lambda: machine.memory()["gpus"]) == [
        {"name": "NVIDIA A100", "used": 1000 << 20, "total": 81920 << 20, "busy_percent": 97},
        {"name": "NVIDIA GB10", "used": None, "total": None, "busy_percent": 3}]
    assert machine.memory(2**22 + 1)["process"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Panels


def test_of_several_jobs_of_a_kind_the_newest_that_runs_comes_first(workspace: Workspace, sleeper: jobs.Job):
    later = ended(workspace, jobs.start_job(workspace, "speak", "t", python(""), workspace.root / "other"))
    found = jobs.list_jobs(workspace)
    assert job_panel.newest(found, ["speak"]) == sleeper == job_panel.first_running(job_panel.jobs_of(found, ["speak"]))
    assert job_panel.newest(found, ["speak"], workspace.root / "other") == later
    assert job_panel.newest(found, ["corpus"]) is None


def test_a_legend_names_only_the_runs_that_have_a_curve(workspace: Workspace, page: Any):
    for name in ("empty", "full"):
        (workspace.root / name / "logs" / "run_1").mkdir(parents=True)
    (workspace.root / "full/logs/run_1/metrics.jsonl").write_bytes(metrics_line(1, "val", mel_loss=2.0))
    look = next(watcher.look for watcher in page.watchers if watcher.tab == "checkpoints" and len(watcher.inputs) == 2)
    choices, key, drawn = look([], "en", [], "val_mel")
    assert sorted(choices["choices"]) == ["empty", "full"] and "full" in key and "empty" not in key
    assert drawn["value"].dropna().values.tolist() == [[1, 2.0, "1"]]


def test_every_job_that_runs_can_be_stopped_from_its_panel(workspace: Workspace, sleeper: jobs.Job, page: Any):
    panels = [watcher.look for watcher in page.watchers if watcher.tab == "recordings" and len(watcher.outputs) == 7]
    (look,) = [look for look in panels if look(jobs.list_jobs(workspace), "en", "")[1] == sleeper.id]  # the voice's
    offered, shown, *_ = look(jobs.list_jobs(workspace), "en", "")
    assert offered["visible"] is False
    second = jobs.start_job(workspace, "speak", "another", SLEEPER, workspace.root / "other")
    offered, shown, *_ = look(jobs.list_jobs(workspace), "en", "")
    assert shown == second.id and offered["visible"] is True
    assert [job_id for _, job_id in offered["choices"]] == ["", second.id, sleeper.id]
    assert look(jobs.list_jobs(workspace), "en", sleeper.id)[1] == sleeper.id
    jobs.kill_job(jobs.load_job(workspace, sleeper.id))
    ended(workspace, sleeper)
    offered, shown, *_ = look(jobs.list_jobs(workspace), "en", sleeper.id)
    assert shown == second.id and offered["value"] == "" and offered["visible"] is False
    jobs.kill_job(second)


# ---------------------------------------------------------------------------------------------------------------------
# The server


def start_server(workspace: Workspace, temporary: Path, *args: str) -> tuple[subprocess.Popen[str], str]:
    """webui_amharic.py and its address."""
    temporary.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "webui_amharic.py", "--workspace", str(workspace.root), "--server-port", str(port)]
    server = subprocess.Popen([*command, *args], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "TMPDIR": str(temporary)})
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("[Info] Ready"):
            return server, f"http://127.0.0.1:{port}/"
    raise AssertionError("the server ended")


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_page_without_a_password_answers_only_to_names_of_this_machine(workspace: Workspace, tmp_path: Path):
    """Or a website could give its own name this machine's address, and press Start."""
    server, url = start_server(workspace, tmp_path / "tmp")
    try:
        assert status_of(url) == status_of(url, Host="127.0.0.1:8080") == status_of(url, Host="localhost:1") == 200
        assert status_of(url, Host="[::1]:7860") == 200  # the ports are those of tunnels
        for path in ("", "config", "gradio_api/upload", "gradio_api/run/predict"):
            assert status_of(url + path, Host="evil.example") == status_of(url + path, Host="") == 400
    finally:
        server.kill()
        server.communicate()
    server, url = start_server(workspace, tmp_path / "tmp", "--auth", "almaz:secret")
    try:
        assert status_of(url, Host="voice.example") == 200  # it asks for the password
    finally:
        server.kill()
        server.communicate()


def test_uploads_of_a_killed_server_are_removed_and_those_of_a_running_one_are_not(tmp_path: Path):
    code = ("import sys, webui_amharic as w; from pathlib import Path; w.YOUNG = -1\n"
            "print(w.os.environ['GRADIO_TEMP_DIR'], flush=True); sys.stdin.read(1)\n"
            "w.remove_abandoned_folders(Path(sys.argv[1])); print('done', flush=True); sys.stdin.read()")

    def start() -> tuple[subprocess.Popen[str], Path]:
        server = subprocess.Popen([*python(code), str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)})
        assert server.stdout is not None
        return server, Path(server.stdout.readline().strip())

    (killed, left), (running, kept) = start(), start()
    (left / "voice.wav").touch()
    (tmp_path / "webui-amharic-link").symlink_to(ROOT)
    killed.kill()
    killed.communicate()
    assert left.is_dir() and kept.is_dir()
    other, own = start()
    assert other.stdin is not None and other.stdout is not None
    other.stdin.write("x")
    other.stdin.flush()
    assert other.stdout.readline() == "done\n"
    assert not left.exists() and kept.is_dir() and own.is_dir() and (ROOT / "README.md").exists()
    for server in (other, running):
        server.communicate()
    assert not kept.exists() and not own.exists()


def test_a_loss_that_was_no_number_is_shown_as_that():
    assert readers.loss_of(None) == "-" and readers.loss_of(None, "") == ""
    assert readers.loss_of({"loss": None}) == "nan" and readers.loss_of({"loss": 1.23456}) == "1.2346"


@pytest.mark.parametrize("kind", ["synthesize", "watch", "evaluate"])
def test_a_model_folder_speaks_instead_of_the_codec_and_what_it_lacks_is_said(
        kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    (tmp_path / "run").mkdir()
    for name in ("run/latest.pth", "codec.pt", "voice.wav"):
        (tmp_path / name).touch()
    form = {"checkpoint": "run/latest.pth", "watch": "run", "data_dir": "run", "output_dir": "out", "text": "ሰላም",
            "prompt": "voice.wav", "output": "hello.wav", "codec": "codec.pt", "model_dir": "run"}
    argv = command_lines.command(kind, form)
    assert argv[argv.index("--model-dir") + 1] == "run" and "--codec" not in argv
    found = command_lines.problems(kind, form, Workspace(tmp_path))
    assert [*found] == ["model_dir"] and found["model_dir"][0] == "tool_refuses"
    (tmp_path / "run/config.yaml").write_text("version: 2.5")
    key, values = command_lines.problems(kind, form, Workspace(tmp_path))["model_dir"]
    assert key == "tool_refuses" and "codec.pth is missing (IndexTeam/IndexTTS-2.5" in values["reason"]
    assert "model_dir" not in command_lines.problems(kind, {**form, "model_dir": ""}, Workspace(tmp_path))


def test_the_prompt_is_a_recording_of_the_data_set_that_a_voice_can_be_taken_from(tmp_path: Path):
    for name in ("phone.m4a", "clip.wav"):
        (tmp_path / name).touch()
    rows = ["not JSON", *(json.dumps({"id": name, "audio": name}) for name in ("phone.m4a", "gone.wav", "clip.wav"))]
    (tmp_path / "recordings.jsonl").write_text("\n".join(rows))
    found = pipeline.first_of_dataset(Workspace(tmp_path), tmp_path / "recordings.jsonl")
    assert found == tmp_path / "clip.wav"
    assert pipeline.first_of_dataset(Workspace(tmp_path), None) is None
