"""The queue of training runs: one at a time, in the order in which they were asked for.

A queued run is a job like any other (webui.jobs) whose supervisor, `python -m webui.run_queue FOLDER`, first waits for
its turn; it needs neither the page nor its server. When a run has finished or failed the next one starts by itself.
After a stop by hand none does until somebody asks for it, or another run has ended since: who stops a run may want to
mend something. Where the process that waits is gone, as after a restart of the machine, the run stays in the list and
starts by a click.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from webui.jobs import (
    Ended,
    Job,
    all_jobs,
    launch,
    load_job,
    main,
    one_at_a_time,
    start_job,
    supervise,
    this_process,
)
from webui.workspace import Refused, Workspace, read_json, write_json

SECONDS = 2  # between two looks of one that waits
queue_job = partial(start_job, queued=True)


def outlook(jobs: Sequence[Job]) -> list[tuple[Job, str, list[Job]]]:
    """Every queued run in its order, what becomes of it, and which runs that depends on. Pure.

    "waits": for the end of these runs. "next": it starts now. "held": the last run was stopped by hand, and nobody has
    asked for this one since. "not_started": no process waits for its turn any more.
    """
    runs = [job for job in jobs if job.kind == "training"]
    before = [job for job in runs if job.live]
    last = max((job for job in runs if job.over), key=lambda job: job.ended, default=None)
    found: list[tuple[Job, str, list[Job]]] = []
    for job in sorted((job for job in runs if job.in_queue), key=lambda job: job.id):
        if job.state == "not_started":
            found.append((job, "not_started", []))
        elif not before and last and by_hand(last) and last.ended > (job.queued or 0):
            found.append((job, "held", [last]))
        else:
            found.append((job, "waits" if before else "next", before))
            before = [job]
    return found


def by_hand(job: Job) -> bool:
    """Whether somebody stopped or killed a run, on the page or by a signal that it obeyed."""
    return job.state == "stopped" or job.stop_asked is not None


# ---------------------------------------------------------------------------------------------------------------------
# The process that waits


def supervise_in_turn(folder: Path, report_start: Callable[[], None]) -> None:
    """Waits for the turn of the folder's run, then supervises it; ends when it was taken out of the queue."""
    workspace = Workspace(folder.parents[2])
    ended: Ended = {}
    write_json(folder / "process.json", this_process())
    report_start()
    while (folder / "job.json").exists():
        with contextlib.suppress(OSError):  # a full disk: perhaps there is room at the next look
            if take_turn(workspace, folder, ended):
                return
        time.sleep(SECONDS)


def take_turn(workspace: Workspace, folder: Path, ended: Ended) -> bool:
    """Runs the program to its end if it is its turn. Returns whether there is nothing to wait for any more.

    Nobody else starts a run between the look and the start, which hands the lock back.
    """
    with contextlib.ExitStack() as lock:
        lock.enter_context(one_at_a_time(workspace))
        found = {job.folder: becomes for job, becomes, _ in outlook(all_jobs(workspace, ended))}
        if found.get(folder) == "next":
            run(folder, lock.close)
            return True
        return folder not in found


def run(folder: Path, report_start: Callable[[], None]) -> None:
    """A program that cannot be started is a run that failed, and makes way for the next one."""
    try:
        supervise(folder, report_start)
    except OSError as error:
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"[Error] {error}\n")
        write_json(folder / "exit.json", {"status": 1, "ended": time.time(), "last_exit": {}})


# ---------------------------------------------------------------------------------------------------------------------
# What a user does with a queued run


def start_queued(workspace: Workspace, job_id: str) -> None:
    """Asks for it again: it starts as soon as no run is alive. Raises: Refused for a job that is gone."""
    with one_at_a_time(workspace):
        job = load_job(workspace, job_id)
        if not job.in_queue:  # it has started meanwhile, as was wanted
            return
        try:
            asked = read_json(job.folder / "job.json")
            write_json(job.folder / "job.json", {**asked, "queued": time.time()})
            if job.state == "not_started":
                launch(job.folder, "webui.run_queue")
        except OSError as error:
            raise Refused("start_failed", reason=str(error)) from error


def take_out(workspace: Workspace, job_id: str) -> None:
    """Takes it out of the queue, with all that was kept of it. Raises: Refused for one that has started."""
    with one_at_a_time(workspace):
        job = load_job(workspace, job_id)
        if not job.in_queue:
            raise Refused("queue_started", title=job.title)
        try:
            (job.folder / "job.json").unlink()  # first: without it the folder is no job, whatever happens now
            shutil.rmtree(job.folder)
        except OSError as error:
            raise Refused("not_writable", path=workspace.show(job.folder)) from error


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), supervise_in_turn))
