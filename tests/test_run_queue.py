"""The queue of tab 6: runs start one after the other whoever is gone meanwhile, and never against the user's will."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from visitor import until

from webui import jobs, run_bar, run_history, run_queue
from webui.texts import say
from webui.workspace import Refused, Workspace

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="jobs are found through /proc")
# Stands in for the trainer: notes its start, stops at SIGTERM, ends with the status that somebody writes into its file.
RUN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
name, root = sys.argv[1], pathlib.Path(sys.argv[2])
with (root / "starts").open("a") as starts:
    starts.write(name + chr(10))
print("started", flush=True)
while not (root / f"{name}.end").exists():
    time.sleep(0.02)
print("[Error] as it was told")
sys.exit(int((root / f"{name}.end").read_text()))
"""
# A server of the page that starts one run, queues two more and is there until it is killed.
SERVER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from webui import jobs, run_queue
from webui.workspace import Workspace
workspace = Workspace.open(sys.argv[1])
for begin, name in ((jobs.start_job, "a"), (run_queue.queue_job, "b"), (run_queue.queue_job, "c")):
    begin(workspace, "training", f"training {{name}}", [sys.executable, "-c", {RUN!r}, name, sys.argv[1]],
          workspace.root / name)
print("ready", flush=True)
time.sleep(600)
"""


class Runs:
    """A workspace with stand-ins for trainings, by name."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace.open(root)

    def begin(self, begin: Callable[..., jobs.Job], *names: str) -> None:
        for name in names:
            argv = [sys.executable, "-c", RUN, name, str(self.workspace.root)]
            begin(self.workspace, "training", f"training {name}", argv, self.workspace.root / name)

    def start(self, *names: str) -> None:
        self.begin(jobs.start_job, *names)
        for name in names:
            until(lambda name=name: "started" in jobs.read_tail(self.job(name).log))

    def queue(self, *names: str) -> None:
        self.begin(run_queue.queue_job, *names)

    def end(self, name: str, status: int = 0) -> None:
        (self.workspace.root / f"{name}.end").write_text(str(status))
        until(lambda: self.job(name).over)

    def job(self, name: str) -> jobs.Job:
        return next(job for job in jobs.all_jobs(self.workspace) if job.title == f"training {name}")

    def states(self) -> dict[str, str]:
        return {job.title.removeprefix("training "): job.state for job in reversed(jobs.all_jobs(self.workspace))}

    def becomes(self) -> dict[str, str]:
        return {job.title.removeprefix("training "): what for job, what, _ in run_queue.outlook(
            jobs.all_jobs(self.workspace))}

    def runs(self, name: str) -> jobs.Job:
        """The job once its program has begun."""
        return until(lambda: "started" in jobs.read_tail((job := self.job(name)).log) and job)

    def waiter(self, name: str) -> int:
        return jobs.read_json(self.job(name).folder / "process.json")["supervisor_pid"]

    def kill_waiter(self, name: str) -> None:
        os.kill(pid := self.waiter(name), signal.SIGKILL)
        until(lambda: jobs.start_time_of(pid) is None)

    def starts(self) -> list[str]:
        return (self.workspace.root / "starts").read_text().split()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    found = Runs(tmp_path / "workspace")
    yield found
    for job in jobs.all_jobs(found.workspace):
        if job.in_queue:
            run_queue.take_out(found.workspace, job.id)
        jobs.kill_job(job)


def refused(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(Refused) as caught:
        call(*args)
    return caught.value.key


def patience() -> None:
    """As long as a process that waits needs to see that its turn has come."""
    time.sleep(run_queue.SECONDS + 0.5)


def test_queued_runs_start_in_order_one_at_a_time_without_their_server_and_after_one_that_failed(runs: Runs):
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(runs.workspace.root)], stdout=subprocess.PIPE,
                              text=True, start_new_session=True)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    os.killpg(server.pid, signal.SIGKILL)
    server.communicate()
    assert runs.states() == {"a": "running", "b": "waiting", "c": "waiting"}
    assert runs.becomes() == {"b": "waits", "c": "waits"}
    queued = runs.job("b").created
    runs.end("a")
    job = runs.runs("b")
    assert job.state == "running" and job.pid and job.created > queued
    assert runs.states() == {"a": "finished", "b": "running", "c": "waiting"}
    runs.end("b", status=1)
    assert runs.job("b").message() == ("job_failed", {"status": 1, "reason": "[Error] as it was told"})
    runs.runs("c")
    runs.end("c")
    assert runs.states() == {"a": "finished", "b": "failed", "c": "finished"} and runs.starts() == ["a", "b", "c"]
    until(lambda: jobs.start_time_of(runs.waiter("c")) is None)


def test_after_a_stop_by_hand_nothing_starts_until_somebody_says_so_or_another_run_has_ended(runs: Runs):
    runs.start("a")
    runs.queue("b", "c")
    jobs.stop_job(runs.job("a"))
    until(lambda: runs.job("a").over)
    patience()
    assert runs.states() == {"a": "stopped", "b": "waiting", "c": "waiting"}
    assert runs.becomes() == {"b": "held", "c": "held"}
    run_queue.start_queued(runs.workspace, runs.job("c").id)  # the later one, by hand
    runs.runs("c")
    run_queue.start_queued(runs.workspace, runs.job("c").id)  # clicked twice
    assert runs.becomes() == {"b": "waits"}
    runs.end("c")
    runs.runs("b")
    jobs.stop_job(runs.job("b"))  # one that was queued stops like any other
    until(lambda: runs.job("b").state == "stopped")


def test_what_was_taken_out_never_starts_and_leaves_nothing(runs: Runs):
    runs.start("a")
    runs.queue("b", "c")
    job, waiter = runs.job("b"), runs.waiter("b")
    run_queue.take_out(runs.workspace, job.id)
    assert not job.folder.exists() and runs.becomes() == {"c": "waits"}
    assert refused(run_queue.take_out, runs.workspace, job.id) == "no_such_job"
    assert refused(run_queue.start_queued, runs.workspace, job.id) == "no_such_job"
    runs.end("a")
    job = runs.runs("c")
    assert refused(run_queue.take_out, runs.workspace, job.id) == "queue_started" and job.folder.exists()
    until(lambda: jobs.start_time_of(waiter) is None)
    assert runs.starts() == ["a", "c"]


def test_a_folder_is_promised_to_one_run_only(runs: Runs):
    runs.start("a")
    assert refused(runs.queue, "a") == "directory_in_use"
    runs.queue("b")
    for begin in (runs.queue, runs.start):
        assert refused(begin, "b") == "directory_queued"
    assert refused(run_history.deletion_of, runs.workspace, runs.workspace.root / "b", {}) == "directory_queued"
    reads = [sys.executable, "-c", "", f"{runs.workspace.root}/base/best.pth"]
    run_queue.queue_job(runs.workspace, "training", "training d", reads, runs.workspace.root / "d")
    assert refused(run_history.deletion_of, runs.workspace, runs.workspace.root / "base", {}) == "directory_queued"
    assert runs.states() == {"a": "running", "b": "waiting", "d": "waiting"}
    history = run_history.RunHistory(runs.workspace).runs(jobs.list_jobs(runs.workspace))
    assert {run.folder.name: run.state for run in history} == runs.states()


@pytest.mark.parametrize("how", ["killed", "machine restarted"])
def test_without_the_process_that_waits_a_run_stays_listed_holds_nobody_up_and_starts_by_a_click(runs: Runs, how: str):
    runs.start("a")
    runs.queue("b", "c")
    runs.kill_waiter("b")
    if how == "machine restarted":
        runs.kill_waiter("c")
        for name in "abc":
            process = runs.job(name).folder / "process.json"
            jobs.write_json(process, {**jobs.read_json(process), "boot_id": "before"})
        assert runs.states() == {"a": "killed", "b": "not_started", "c": "not_started"}
        assert runs.becomes() == {"b": "not_started", "c": "not_started"}
    else:
        assert runs.states() == {"a": "running", "b": "not_started", "c": "waiting"}
        runs.end("a")
        runs.runs("c")
    run_queue.start_queued(runs.workspace, runs.job("b").id)
    if how == "killed":
        assert runs.becomes() == {"b": "waits"}
        runs.end("c")
    runs.runs("b")
    runs.end("b")
    assert runs.starts() == (["a", "b"] if how == "machine restarted" else ["a", "c", "b"])
    (runs.workspace.root / "a.end").write_text("0")


def test_two_servers_and_two_processes_that_wait_start_a_run_once(runs: Runs):
    runs.start("a")
    runs.queue("b")
    jobs.launch(runs.job("b").folder, "webui.run_queue")  # as from another machine that shares the folder
    clicks = [threading.Thread(target=run_queue.start_queued, args=(runs.workspace, runs.job("b").id))
              for _ in range(4)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    runs.end("a")
    runs.runs("b")
    patience()
    assert runs.starts() == ["a", "b"]


def test_a_program_that_cannot_be_started_is_a_failed_run_and_the_next_has_its_turn(runs: Runs):
    run_queue.queue_job(runs.workspace, "training", "training a", ["/no/such/program"], runs.workspace.root / "a")
    runs.queue("b")
    runs.runs("b")
    job = runs.job("a")
    assert job.state == "failed" and "/no/such/program" in job.message()[1]["reason"]


def job_of(name: str, state: str, **values: Any) -> jobs.Job:
    return jobs.Job(name, Path(name), "training", name, [], Path(name), 0.0, state, 1, 0, None, None, **values)


@pytest.mark.parametrize(("others", "expected"), [
    ([], "next"),
    ([job_of("x", "finished", ended=9.0)], "next"), ([job_of("x", "killed", ended=9.0)], "next"),
    ([job_of("x", "running")], "waits"), ([job_of("x", "stopped", ended=9.0), job_of("y", "starting")], "waits"),
    ([job_of("x", "stopped", ended=9.0)], "held"),
    ([job_of("x", "stopped", ended=4.0)], "next"),  # before it was put into the queue
    ([job_of("x", "stopped", ended=9.0), job_of("y", "failed", ended=10.0)], "next")])
def test_what_becomes_of_the_first_in_the_queue(others: list[jobs.Job], expected: str):
    first, second = job_of("z1", "waiting", queued=5.0), job_of("z2", "waiting", queued=6.0)
    found = run_queue.outlook([second, first, *others])
    assert [(job.id, becomes) for job, becomes, _ in found] == [
        ("z1", expected), ("z2", "held" if expected == "held" else "waits")]
    assert found[1][2] == (others if expected == "held" else [first])


@pytest.mark.parametrize("language", ["en", "am"])
def test_the_list_says_what_each_run_waits_for_and_escapes_names(language: str):
    rows = [("1", "<b>", "waits", "a & b"), ("2", "c", "next", ""), ("3", "d", "held", "e"),
            ("4", "f", "not_started", "")]
    shown = run_bar.queue_list(rows, language)
    assert "&lt;b&gt;" in shown and "a &amp; b" in shown and run_bar.queue_list([], language) == ""
    assert shown.count('data-act="take_out"') == 4 and shown.count('data-act="start"') == 2
    assert say("queue.rule", language) in shown
