"""Command lines that outlive the page, the browser and the server: a folder each in WORKSPACE/.webui/jobs/.

A small supervisor process (`python -m webui.jobs FOLDER`, the standard library only) starts the program in a session
of its own, waits for it, and writes down what happened. Nobody reads a pipe: the program writes its own log file.

    job.json      what was asked for: kind, title, argv, cwd, created, output_dir; of one that is or was in the queue
                  (webui.run_queue) also when it was asked for last
    process.json  the program's and the supervisor's process ids, start times and the machine's boot id; in the queue
                  there is no program yet
    stop          empty; its time is when a stop was asked for
    exit.json     exit status (null: nobody was there to see it), end time, the trainer's last_exit.json
    log.txt       standard output and standard error

Linux (and WSL2): processes are identified through /proc.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.run_files import all_checkpoints, is_checkpoint_name, lock_holder, read_last_exit
from webui.workspace import ROOT, Refused, Workspace, read_json, write_json

LIVE = ("starting", "running")
QUEUED = ("waiting", "not_started")
STARTING_SECONDS = 30  # a job without a process after this time never had one
STOP_STATUSES = {sign for signum in (signal.SIGINT, signal.SIGTERM) for sign in (-signum, 128 + signum)}
MOST_OF_A_KIND = 200  # jobs in a list, besides those that run
JOB_ID = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{4}")
# Colours and cursor movements, and control characters that are no line ends or tabs.
NOT_TEXT = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Job:
    """A job as its folder showed it when it was loaded; load_job() again shows what has changed."""

    id: str
    folder: Path
    kind: str
    title: str
    argv: list[str]
    output_dir: Path | None
    created: float  # seconds since 1970; of one that was in the queue, its start
    state: str  # starting | running | finished | failed | stopped | killed; in the queue: waiting | not_started
    pid: int | None  # of the program
    status: int | None  # exit status; negative: the signal that killed it; None: running, or nobody was there to see it
    step: int | None  # of a training run's last_exit.json
    stop_asked: float | None
    queued: float | None = None  # when it was put into the queue, or asked for again by a click
    ended: float = 0.0  # seconds since 1970, of one that is over

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def in_queue(self) -> bool:
        return self.state in QUEUED

    @property
    def over(self) -> bool:
        return not self.live and not self.in_queue

    def message(self) -> tuple[str, dict[str, Any]]:
        """Key of MESSAGES ("job_...") and its values: the state in words, such as "stopped at step N"."""
        if self.state in ("starting", *QUEUED):
            return f"job_{self.state}", {}
        if self.state == "running":
            return "job_stopping" if self.stop_asked else "job_running", {"pid": self.pid}
        if self.state == "finished":
            return ("job_finished_at_step", {"step": self.step}) if self.step else ("job_finished", {})
        if self.state == "stopped":
            if self.step:
                return "job_stopped_at_step", {"step": self.step}
            return ("job_stopped_before_training" if self.kind == "training" else "job_stopped"), {}
        if self.state == "failed":
            return "job_failed", {"status": self.status, "reason": last_error(read_tail(self.log))}
        if self.status is None:
            return "job_lost", {}
        return "job_killed", {"signal": next((s.name for s in signal.Signals if s == -self.status), -self.status)}


Ended = dict[Path, tuple[int, Job]]
"""Jobs that are over, by folder, each with the time of the folder's last change."""


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def boot_id() -> str:
    """Changes when the machine starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_time_of(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's; None for one that is gone or only waits to be buried.

    With the boot id it tells a process from a later one with the same number.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(process: dict[str, Any], who: str) -> bool:
    """`process` is the content of process.json; `who` is "program" or "supervisor"."""
    pid, started = process.get(f"{who}_pid"), process.get(f"{who}_start")
    return isinstance(pid, int) and started is not None and process.get("boot_id") == boot_id() and (
        start_time_of(pid) == started)


# ---------------------------------------------------------------------------------------------------------------------
# The supervisor


def own_last_exit(job: dict[str, Any], started: float) -> dict[str, Any]:
    """What the trainer said at its end; {} unless this job's process, started then, said it."""
    return read_last_exit(Path(job["output_dir"]), started) if job["output_dir"] else {}


def this_process() -> dict[str, Any]:
    """What process.json says of this process, which looks after a job."""
    return {"supervisor_pid": os.getpid(), "supervisor_start": start_time_of(os.getpid()), "boot_id": boot_id()}


def supervise(folder: Path, report_start: Callable[[], None]) -> None:
    """Runs the folder's program to its end, through hangups and other people's signals; SIGTERM is passed on."""
    job = read_json(folder / "job.json")
    program: subprocess.Popen[bytes] | None = None
    asked = False

    def pass_on(signum: int, frame: object) -> None:
        nonlocal asked
        if signum == signal.SIGTERM:
            asked = True
            if program is not None:
                program.terminate()

    # Handlers, because ignored signals would stay ignored in the program.
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, pass_on)
    with (folder / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), 2)  # our own faults are told there too
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        started = time.time()
        program = subprocess.Popen(job["argv"], cwd=job["cwd"], env=environment, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if asked:  # while it was being started
        program.terminate()
    try:
        write_json(folder / "process.json", {
            "program_pid": program.pid, "program_start": start_time_of(program.pid), **this_process(),
            "started": started})
    except OSError:  # nobody would ever find it again
        program.kill()
        raise
    report_start()
    while (status := program.poll()) is None:  # a wait without end would miss a signal that comes just before it
        time.sleep(0.1)
    ending = {"status": status, "ended": time.time(), "last_exit": own_last_exit(job, started)}
    while folder.is_dir():
        try:
            return write_json(folder / "exit.json", ending)
        except OSError:  # a full disk: whoever looks sees a running job until there is room
            time.sleep(5)


def main(folder: Path, work: Callable[[Path, Callable[[], None]], None] = supervise) -> int:
    """Leaves a supervisor behind in a session of its own. Returns once it has reported its start, or failed to."""
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(write_end)
        return 0 if os.read(read_end, 1) else 1
    os.close(read_end)
    os.setsid()

    def report_start() -> None:
        os.write(write_end, b"1")
        os.close(write_end)

    work(folder, report_start)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Starting and finding jobs


@contextlib.contextmanager
def one_at_a_time(workspace: Workspace) -> Iterator[Path]:
    """Yields the jobs folder; two Starts at once, from two browsers or two servers, follow one another."""
    folder = workspace.private / "jobs"
    for directory in (workspace.private, folder):
        directory.mkdir(mode=0o700, exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder


def new_job_id(now: float) -> str:
    """Sorts by time, also over the hour in which clocks are put back."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{int(now % 1 * 1e6):06d}-{secrets.token_hex(2)}"


def start_job(workspace: Workspace, kind: str, title: str, argv: Sequence[str], output_dir: Path | None = None,
              queued: bool = False) -> Job:
    """Starts argv detached; it runs when this returns (about a tenth of a second), or, queued, waits for its turn.

    Raises: Refused when a job that is not over, or a trainer started elsewhere, works in the same output directory.
    """
    with one_at_a_time(workspace) as jobs:
        holder = holder_of(workspace, output_dir) if output_dir else None
        if holder:
            raise Refused(holder[0], **holder[1])
        now = time.time()
        job_id = new_job_id(now)
        folder = jobs / job_id
        try:
            folder.mkdir(mode=0o700)
            write_json(folder / "job.json", {
                "kind": kind, "title": title, "argv": list(argv), "cwd": str(ROOT), "created": now,
                "output_dir": str(output_dir) if output_dir else None, "queued": now if queued else None})
            launch(folder, "webui.run_queue" if queued else "webui.jobs")
        except OSError as error:  # no such program, a full disk, or the workspace is gone
            shutil.rmtree(folder, ignore_errors=True)
            raise Refused("start_failed", reason=str(error)) from error
        return load_job(workspace, job_id)


def launch(folder: Path, module: str) -> None:
    """Leaves the supervisor of a job behind, the main() of a module. Raises: OSError with the reason."""
    done = subprocess.run([sys.executable, "-m", module, str(folder)], cwd=ROOT,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(last_error(read_tail(folder / "log.txt")))


def job_from(folder: Path) -> Job | None:
    """None for a folder that is gone or damaged. Writes down an end that nobody was there to see."""
    asked, process = read_json(folder / "job.json"), read_json(folder / "process.json")
    if not {"kind", "title", "argv", "cwd", "created", "output_dir"} <= asked.keys():
        return None
    ending = ending_of(folder, process)
    in_queue = bool(asked.get("queued")) and "program_pid" not in process and not ending
    if not ending and not in_queue and not may_be_alive(asked, process):
        # The supervisor may have written it just before it left.
        ending = ending_of(folder, process) or settle(folder, asked, process)
    last_exit, status = ending.get("last_exit") or {}, ending.get("status")
    stop_asked = stop_asked_at(folder)
    state = queued_state(process) if in_queue else state_of(process, ending, last_exit, bool(stop_asked))
    return Job(
        id=folder.name, folder=folder, kind=asked["kind"], title=asked["title"], argv=asked["argv"],
        output_dir=Path(asked["output_dir"]) if asked["output_dir"] else None,
        created=process.get("started", asked["created"]) if asked.get("queued") else asked["created"],
        state=state, pid=process.get("program_pid"), status=last_exit.get("status") if status is None else status,
        step=last_exit.get("step"), stop_asked=stop_asked, queued=asked.get("queued"), ended=ending.get("ended", 0.0))


def queued_state(process: dict[str, Any]) -> str:
    """Whether a process waits for the turn of a run in the queue; none does after the machine was started anew."""
    return "waiting" if is_running(process, "supervisor") else "not_started"


def may_be_alive(asked: dict[str, Any], process: dict[str, Any]) -> bool:
    """Whether the program runs, or its supervisor is about to start it or to write down its end."""
    if not process:
        return time.time() - asked["created"] < STARTING_SECONDS
    return is_running(process, "program") or is_running(process, "supervisor")


def stop_asked_at(folder: Path) -> float | None:
    """Seconds since 1970; None: nobody asked."""
    try:
        return (folder / "stop").stat().st_mtime
    except OSError:
        return None


def ending_of(folder: Path, process: dict[str, Any]) -> dict[str, Any]:
    """exit.json; {} also for one that was settled before a slow supervisor had started its program after all."""
    ending = read_json(folder / "exit.json")
    return {} if process and ending.get("never_started") else ending


def settle(folder: Path, asked: dict[str, Any], process: dict[str, Any]) -> dict[str, Any]:
    """The end of a job whose supervisor is gone too; kept, since a later run replaces last_exit.json."""
    last_exit = own_last_exit(asked, process.get("started", math.inf))
    ending = {"status": None, "ended": time.time(), "last_exit": last_exit, "never_started": not process}
    with contextlib.suppress(OSError):
        write_json(folder / "exit.json", ending)
    return ending


def state_of(process: dict[str, Any], ending: dict[str, Any], last_exit: dict[str, Any], stop_asked: bool) -> str:
    """The state that the files of a job tell; `ending` is {} while it may be alive."""
    if not ending:
        return "running" if process else "starting"
    status, reason = ending.get("status"), last_exit.get("reason")
    if status == 0 or (status is None and reason == "finished"):
        return "finished"
    # A trainer that was asked to stop may yet fail to save; a tool writes no last_exit.json.
    if reason == "stopped" or (stop_asked and not reason and status in STOP_STATUSES):
        return "stopped"
    if status is None:
        return "failed" if reason else "killed"
    return "killed" if status < 0 else "failed"


def job_in(folder: Path, ended: Ended) -> Job | None:
    """job_from(), but one of `ended` is not read again: its folder's time changes with every file that comes."""
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return None
    known = ended.get(folder)
    if known and known[0] == changed:
        return known[1]
    job = job_from(folder)
    if job and job.over and time.time_ns() - changed > 1e9:  # the time of a second change may be the same
        ended[folder] = changed, job
    return job


def all_jobs(workspace: Workspace, ended: Ended | None = None) -> list[Job]:
    """Newest first. `ended` remembers from call to call what need not be read again."""
    ended = {} if ended is None else ended
    folders = [path for path in (workspace.private / "jobs").glob("*") if JOB_ID.fullmatch(path.name)]
    found = (job_in(folder, ended) for folder in sorted(folders, reverse=True))
    return [job for job in found if job]


def list_jobs(workspace: Workspace, limit: int = 50, ended: Ended | None = None) -> list[Job]:
    """Newest first, as worth_showing() chooses."""
    return worth_showing(all_jobs(workspace, ended), limit)


def worth_showing(jobs: Sequence[Job], limit: int) -> list[Job]:
    """All jobs that are not over; of each kind the newest `limit`, and, however old, what made the output directories
    that the page knows: of each directory the newest job and the newest that finished. Pure."""
    shown: list[Job] = []
    places: set[tuple[Any, ...]] = set()
    counts = dict.fromkeys((job.kind for job in jobs), 0)
    for job in jobs:
        marks = {(job.kind, job.output_dir), (job.kind, job.output_dir, job.state == "finished")}
        known = marks <= places
        places |= marks
        if not job.over or counts[job.kind] < (limit if known else MOST_OF_A_KIND):
            counts[job.kind] += job.over
            shown.append(job)
    return shown


def load_job(workspace: Workspace, job_id: str) -> Job:
    """Raises: Refused for an id that is not one of the workspace's jobs."""
    job = job_from(workspace.private / "jobs" / job_id) if JOB_ID.fullmatch(str(job_id or "")) else None
    if job is None:
        raise Refused("no_such_job", job=str(job_id))
    return job


def holder_of(workspace: Workspace, output_dir: Path) -> tuple[str, dict[str, Any]] | None:
    """Who works in this directory, or will: a key of MESSAGES and its values; None: nobody."""
    for job in all_jobs(workspace):
        if job.in_queue and job.output_dir == output_dir:
            return "directory_queued", {"path": workspace.show(output_dir), "title": job.title}
        if job.live and job.output_dir == output_dir:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.created))
            return "directory_in_use", {"path": workspace.show(output_dir), "title": job.title, "since": since,
                                        "pid": job.pid}
    locked_by = lock_holder(output_dir)
    return ("directory_locked", {"path": workspace.show(output_dir), "holder": locked_by}) if locked_by else None


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


def stop_job(job: Job) -> None:
    """Asks the program to end: SIGTERM for training, which saves; SIGINT for tools, which remove unfinished files."""
    process = read_json(job.folder / "process.json")
    if not is_running(process, "program"):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(process["program_pid"], signal.SIGTERM if job.kind in ("training", "tensorboard") else signal.SIGINT)
    if job.stop_asked is None:
        with contextlib.suppress(OSError):  # an empty file has room on a full disk, as a rule
            (job.folder / "stop").touch()


def kill_job(job: Job) -> None:
    """SIGKILL to the program and its children."""
    process = read_json(job.folder / "process.json")
    if is_running(process, "program"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process["program_pid"], signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# Files of jobs


def read_tail(path: Path, max_lines: int = 200, max_bytes: int = 65536) -> str:
    """The end of a text file as plain text, "" for a missing one; a progress line shows only its last state."""
    try:
        with path.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - max_bytes))
            content = handle.read(max_bytes)
    except OSError:
        return ""
    if size > max_bytes and b"\n" in content:
        content = content.partition(b"\n")[2]  # the first line is not whole
    return plain_text(content, max_lines)


def plain_text(content: bytes, max_lines: int = 0) -> str:
    """Lines of a log as plain text, the last `max_lines` (0: all); a progress line shows only its last state."""
    lines = content.decode(errors="replace").replace("\r\n", "\n").rstrip("\n").split("\n")
    return "\n".join(NOT_TEXT.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in lines[-max_lines:])


def last_error(log: str) -> str:
    """The line that says why: the last [Error], else the last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("[Error]")]
    return (errors or lines or [""])[-1]


def deletable(workspace: Workspace, text: str) -> Path:
    """Raises: Refused for what is no checkpoint of ours, and while somebody works in its directory."""
    path = workspace.inside(text, must_exist=True)
    if not is_checkpoint_name(path.name) or not path.is_file():
        raise Refused("not_a_checkpoint", path=workspace.show(path))
    holder = holder_of(workspace, path.parent)
    if holder:
        raise Refused(holder[0], **holder[1])
    return path


def delete_checkpoint(workspace: Workspace, text: str) -> list[Path]:
    """Deletes a checkpoint, under all the names it has in its directory. Returns the names that are gone.

    Raises: Refused for what is not deletable().
    """
    with one_at_a_time(workspace):
        path = deletable(workspace, text)
        names = [name for name in all_checkpoints(path.parent) if name.samefile(path)]
        try:
            for name in names:
                name.unlink()
        except OSError as error:
            raise Refused("not_writable", path=workspace.show(path)) from error
    return names


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
