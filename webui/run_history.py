"""Every training run of the workspace, as the page's jobs and the files of output directories tell of it: what it was
asked for, how it ended, how far it came, its whole log; what deleting it takes away. No component of the page here."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.run_files import all_checkpoints, lock_holder, read_last_exit
from webui import pipeline
from webui.command_lines import Form, preview
from webui.jobs import Ended, Job, all_jobs, holder_of, one_at_a_time, plain_text
from webui.readers import MetricsFile, newest_of
from webui.workspace import Refused, Workspace

LOG_PART = 1 << 16  # bytes of a log in one part
SCAN_SECONDS = 10  # between two looks for output directories that nobody started from here
READ_SECONDS = 0.15  # of reading metrics in one look
STATE_OF_REASON = {"finished": "finished", "stopped": "stopped", "user_error": "failed", "crash": "failed"}
# What a trainer writes into its output directory, besides checkpoints.
FOLDERS, FILES = ("logs",), ("last_exit.json", "eval.jsonl", ".lock")
WARNING = re.compile(rb"^\[(?:Warn|Error)\] .*$", re.MULTILINE)
READ_AT_ONCE = 4 << 20  # bytes of a log that are searched for warnings in one look
MOST_WARNINGS = 50


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class Summary(MetricsFile):
    """Of a metrics.jsonl the last step and the best validation, read on like MetricsFile; no other line is kept."""

    def start_again(self) -> None:
        super().start_again()
        self.step: int | None = None
        self.best: tuple[float, int] | None = None
        """The lowest weighted validation loss, and its step."""

    def take(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            if b'"val"' in line:
                self.take_validation(line)
        for line in reversed(lines):
            with contextlib.suppress(ValueError, LookupError, TypeError):  # the rest of a crash of the machine
                self.step = int(json.loads(line)["step"])
                return

    def take_validation(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            point = json.loads(line)
            loss, step = float(point["loss"]), int(point["step"])
            if point["kind"] == "val" and math.isfinite(loss) and loss < (self.best or (math.inf,))[0]:
                self.best = loss, step


@dataclass(frozen=True)
class Run:
    """A training run: its output directory, and the page's jobs that worked in it."""

    folder: Path
    jobs: tuple[Job, ...] = ()  # newest first
    state: str = "unknown"  # a job's, or unknown (a fork's files)
    step: int | None = None
    best: float | None = None
    best_step: int | None = None
    when: float = 0.0  # of its last sign of life, seconds since 1970

    @property
    def live(self) -> bool:
        return self.state in ("starting", "running")


class RunHistory:
    """All runs, looked at again and again at little cost: folders every SCAN_SECONDS, of metrics only what is new."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.summaries: dict[Path, Summary] = {}
        self.folders: list[Path] = []
        self.known: frozenset[tuple[str, str]] = frozenset()
        self.scanned = -math.inf

    def runs(self, jobs: Sequence[Job]) -> list[Run]:
        """Newest first. Long metrics are read over some calls."""
        asked = frozenset((job.id, job.state) for job in jobs if job.kind == "training")
        if asked != self.known or time.monotonic() - self.scanned > SCAN_SECONDS:
            self.folders = pipeline.find_runs(self.workspace, jobs)
            self.known, self.scanned = asked, time.monotonic()
        by_folder: dict[Path, list[Job]] = {folder: [] for folder in self.folders}
        for job in jobs:
            if job.kind == "training" and job.output_dir:
                by_folder.setdefault(job.output_dir, []).append(job)
        until = time.monotonic() + READ_SECONDS
        found = [self.run(folder, own, time.monotonic() < until) for folder, own in by_folder.items()]
        return sorted(found, key=lambda run: (run.live, run.when), reverse=True)

    def run(self, folder: Path, jobs: Sequence[Job], reads: bool) -> Run:
        path = newest_of(folder.glob("logs/run_*/metrics.jsonl"))
        summary = self.summaries.get(folder)
        if path and (summary is None or summary.path != path):
            summary = self.summaries[folder] = Summary(path)
        if path and summary and reads:
            summary.update()
        changed = max((modified(name) for name in (path, folder / "last_exit.json", folder) if name), default=0.0)
        best, best_step = (summary.best if path and summary else None) or (None, None)
        return Run(folder, tuple(jobs), state_of_run(folder, jobs, path), (summary.step if path and summary else None)
                   or (jobs[0].step if jobs else None), best, best_step,
                   max(changed, jobs[0].created) if jobs else changed)


def modified(path: Path) -> float:
    """0 for a file that is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def state_of_run(folder: Path, jobs: Sequence[Job], metrics: Path | None) -> str:
    """That of the newest job, unless somebody went on with the run elsewhere since."""
    now = next((job.state for job in jobs if not job.over), "")
    if now:
        return now
    if lock_holder(folder):
        return "running"
    ended = modified(jobs[0].folder / "exit.json") if jobs else 0.0
    later = max(modified(metrics) if metrics else 0.0, modified(folder / "last_exit.json"))
    if jobs and later <= ended + 5:
        return jobs[0].state
    reason = read_last_exit(folder).get("reason")
    return STATE_OF_REASON.get(str(reason), "failed") if reason else "killed" if metrics else (
        jobs[0].state if jobs else "unknown")


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def form_of_run(jobs: Sequence[Job], workspace: Workspace) -> Form:
    """What a run was asked for, from its jobs, newest first: a job that went on with it keeps what it did not name."""
    form: Form = {}
    for job in reversed(jobs):
        own = pipeline.form_of("training", job.argv, workspace)
        form = {**form, **own} if own.get("resume") else own
    return form


def clone_of(run: Run, workspace: Workspace, taken: Iterable[Path]) -> Form:
    """The settings of a run for another one, in a directory of its own. {} where nobody started it from here."""
    form = form_of_run(run.jobs, workspace)
    if not form:
        return {}
    fresh = fresh_name(run.folder, {*taken})
    return {**form, "output_dir": workspace.show(fresh), "resume": False, "resume_path": ""}


def fresh_name(folder: Path, taken: set[Path]) -> Path:
    """voice -> voice_2, voice_2 -> voice_3: the first that nothing has."""
    stem, number = re.fullmatch(r"(.+?)(?:_(\d{1,6}))?", folder.name, re.DOTALL).groups()  # type: ignore[union-attr]
    count = int(number or 1) + 1
    while (name := folder.with_name(f"{stem}_{count}")) in taken or name.exists():
        count += 1
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def jobs_of_run(workspace: Workspace, folder: Path, ended: Ended) -> list[Job]:
    """All of them, however old, oldest first."""
    return [job for job in reversed(all_jobs(workspace, ended)) if job.kind == "training" and job.output_dir == folder]


def log_part(jobs: Sequence[Job], part: int = -1) -> tuple[str, int, int]:
    """A part of the run's logs, one after the other, each below a line with its time and command; -1: the end.

    Returns the text, the number of the part from 0, and how many there are.
    """
    sizes = [size_of(job.log) for job in jobs]
    count = max(1, -(-sum(sizes) // LOG_PART))
    number = count - 1 if part < 0 else min(part, count - 1)
    start, end = number * LOG_PART, (number + 1) * LOG_PART
    if number == count - 1:
        start, end = max(0, sum(sizes) - LOG_PART), sum(sizes)
    texts, at = [], 0
    for job, size in zip(jobs, sizes, strict=True):
        if at + size >= start and at <= end:
            if at >= start:
                texts.append(f"── {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(job.created))}  "
                             f"{preview(job.argv)}")
            texts.append(plain_text(lines_between(job.log, max(0, start - at), min(size, end - at))))
        at += size
    return "\n".join(filter(None, texts)), number, count


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def lines_between(path: Path, start: int, end: int) -> bytes:
    """The lines that begin between two places of a file, whole."""
    try:
        with path.open("rb") as handle:
            if start:
                handle.seek(start - 1)
                handle.readline(LOG_PART)
            content = handle.read(max(0, end - handle.tell()))
            return content if content.endswith(b"\n") or not content else content + handle.readline(LOG_PART)
    except OSError:
        return b""


@dataclass
class Warnings:
    """The [Warn] and [Error] lines of one log, read on from where the last look stopped; each kind once."""

    log: Path
    offset: int = 0
    found: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Without its numbers -> as it was said last, and how often; the newest last."""

    def update(self) -> list[tuple[str, int]]:
        """Newest first."""
        try:
            with self.log.open("rb") as handle:
                handle.seek(self.offset)
                chunk = handle.read(READ_AT_ONCE)
        except OSError:
            chunk = b""
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in WARNING.findall(whole):
            text = plain_text(line)
            kind = re.sub(r"\d+(\.\d+)?", "#", text)
            count = self.found.pop(kind, ("", 0))[1]
            self.found[kind] = text, count + 1
        for kind in list(self.found)[:-MOST_WARNINGS]:
            del self.found[kind]
        return list(reversed(self.found.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Deleting


@dataclass(frozen=True)
class Deletion:
    """What would go, and what would stay."""

    folder: Path
    checkpoints: list[Path]
    others: list[Path]  # logs and small files of the trainer
    jobs: list[Job]
    size: int  # bytes, of names that are links to one file once
    kept: list[str]  # names in the directory that no trainer writes
    users: list[str]  # output directories of runs that were started from what goes


def deletion_of(workspace: Workspace, folder: Path, ended: Ended) -> Deletion:
    """Raises: Refused while somebody works in the directory or with what is in it."""
    holder = holder_of(workspace, folder)
    if holder:
        raise Refused(holder[0], **holder[1])
    jobs = all_jobs(workspace, ended)
    user = next((job for job in jobs if not job.over and names_folder(job, folder)), None)
    if user and user.in_queue:
        raise Refused("directory_queued", path=workspace.show(folder), title=user.title)
    if user:
        raise Refused("run_in_use", path=workspace.show(folder), title=user.title, pid=user.pid)
    checkpoints = all_checkpoints(folder)
    others = [path for name in (*FOLDERS, *FILES) if (path := folder / name).exists() or path.is_symlink()]
    others += sorted(folder.glob("abandoned_*"))
    going = {path.name for path in (*checkpoints, *others)}
    try:
        kept = sorted(entry.name for entry in os.scandir(folder) if entry.name not in going)
    except OSError:  # it was never made
        kept = []
    return Deletion(folder, checkpoints, others, [job for job in jobs if job.kind == "training"
                                                  and job.output_dir == folder],
                    sum(sizes_of([*checkpoints, *others]).values()), kept,
                    sorted({workspace.show(job.output_dir) for job in jobs if job.kind == "training" and job.output_dir
                            and job.output_dir != folder and names_folder(job, folder)}))


def names_folder(job: Job, folder: Path) -> bool:
    """Whether a command line reads something of the directory."""
    return any(part == str(folder) or part.startswith(f"{folder}{os.sep}") for part in job.argv)


def sizes_of(paths: Iterable[Path]) -> dict[tuple[int, int], int]:
    """Bytes by device and inode."""
    sizes = {}
    for path in paths:
        folder = path.is_dir() and not path.is_symlink()
        for file in (path.rglob("*") if folder else [path]):
            with contextlib.suppress(OSError):
                status = file.lstat()
                sizes[status.st_dev, status.st_ino] = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return sizes


def delete_run(workspace: Workspace, folder: Path, ended: Ended) -> Deletion:
    """Deletes what a trainer wrote there, and what the page kept of it. Returns what is gone. Raises: Refused."""
    with one_at_a_time(workspace):
        gone = deletion_of(workspace, folder, ended)
        try:
            for path in (*gone.checkpoints, *gone.others):
                remove(path)
            for job in gone.jobs:
                remove(job.folder)
            if folder.is_dir() and not gone.kept:
                folder.rmdir()
        except OSError as error:
            raise Refused("not_writable", path=workspace.show(folder)) from error
    return gone


def remove(path: Path) -> None:
    """Raises: OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
