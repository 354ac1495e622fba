"""What runs and machines say about themselves: metrics, progress, memory, checkpoints. Nothing here blocks the page."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tools.run_files import INSPECTED, all_checkpoints, newest_first, resume_choice
from webui.jobs import last_error, read_tail
from webui.workspace import ROOT, is_text_name

Point = dict[str, Any]  # a metrics.jsonl line: kind (of KINDS), epoch, step, text_loss, mel_loss, ...; and "run"
KINDS = ("train", "val", "val_part")  # the last of one manifest or language of the validation
READ_AT_ONCE = 16 << 20  # bytes of metrics in one call
MAX_TRAIN_POINTS = 5_000  # kept in memory for one run
PROGRESS = re.compile(r"^\[Progress\] (.+?): (\d+)/(\d+)(?:, \d+ s)?(?:, about (\d+) s left)?", re.MULTILINE)
STEP = re.compile(r"^\[Step\] (\d+/\d+ \w+)$", re.MULTILINE)
TRAIN_STEP = re.compile(r"^\[Train\] epoch=\d+ step=(\d+) ", re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class MetricsFile:
    """One metrics.jsonl, read on from where the last call stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start_again()

    def start_again(self) -> None:
        self.points: list[Point] = []
        self.offset, self.last_line = 0, b""

    def update(self) -> None:
        """Reads what is new, READ_AT_ONCE at most; everything again where a resume cut or replaced the file."""
        try:
            with self.path.open("rb") as handle:
                handle.seek(self.offset - len(self.last_line))
                if handle.read(len(self.last_line)) != self.last_line:
                    self.start_again()
                    handle.seek(0)
                chunk = handle.read(READ_AT_ONCE)
        except OSError:  # moved aside with the rest of its run
            return self.start_again()
        whole = chunk[: chunk.rfind(b"\n") + 1]  # a torn last line waits for its rest
        if not whole:
            return
        self.offset += len(whole)
        lines = whole.splitlines(keepends=True)
        self.last_line = lines[-1]
        self.take(lines)

    def take(self, lines: Sequence[bytes]) -> None:
        """Keeps what is new of the file; of a portion with very many training lines only some are looked at."""
        every = max(1, len(lines) // MAX_TRAIN_POINTS)
        wanted = [line for number, line in enumerate(lines) if number % every == 0 or b'"val' in line]
        self.points += points_of(wanted, self.path.parent.name)
        if len(self.points) > 2 * MAX_TRAIN_POINTS:
            train = [point for point in self.points if point["kind"] == "train"]
            dropped = {id(point) for point in train[1::2]}
            self.points = [point for point in self.points if id(point) not in dropped]


def points_of(lines: Iterable[bytes], run: str) -> list[Point]:
    """The metrics lines among the lines."""
    points = []
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:  # a crash of the machine left something else there
            continue
        if isinstance(point, dict) and point.get("kind") in KINDS and isinstance(point.get("step"), int):
            points.append({**point, "run": run})
    return points


class MetricsReader:
    """The metrics of one output directory, read on where the last call stopped.

    A resume cuts the file: what was cut disappears here too, the rest is read again.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.file: MetricsFile | None = None
        self.lock = threading.Lock()  # several browsers ask at once

    def points(self) -> list[Point]:
        """All points so far, oldest first. At most 16 MB of a run are read in a call: a long one takes some calls.

        A resumed run goes on in its own file; a file of another run, killed before it saved, is passed over.

        Of a very long run every second training point is left out, again and again, so that memory stays bounded.
        """
        with self.lock:
            path = newest_of(self.output_dir.glob("logs/run_*/metrics.jsonl"))
            if path is None:
                self.file = None
                return []
            if self.file is None or self.file.path != path:
                self.file = MetricsFile(path)
            self.file.update()
            return list(self.file.points)


def newest_of(paths: Iterable[Path]) -> Path | None:
    """The one that was written last; of one moment the last by name."""
    written = []
    for path in paths:
        with contextlib.suppress(OSError):  # moved aside this moment
            written.append((path.stat().st_mtime_ns, path))
    return max(written)[1] if written else None


def loss_of(validation: dict[str, Any] | None, without: str = "-") -> str:
    """A validation loss in a line of text; one that was no number is null in the reports of inspect_checkpoint."""
    if not validation:
        return without
    return "nan" if validation["loss"] is None else f"{validation['loss']:.4f}"


def curve(points: Sequence[Point], kind: str, name: str, limit: int = 500) -> list[tuple[int, float]]:
    """(step, value) of one metric, finite values only, sampled to at most `limit`."""
    values = [(point["step"], point.get(name)) for point in points if point["kind"] == kind]
    return sample_points([(step, float(value)) for step, value in values
                          if isinstance(value, (int, float)) and math.isfinite(value)], limit)


@dataclass(frozen=True)
class Overfit:
    """The speech loss of validation at its best and now, with their steps."""

    best: float
    best_step: int
    last: float
    last_step: int


def overfit(points: Sequence[Point], validations: int = 3) -> Overfit | None:
    """What says that a model learns its training data by heart; None where nothing does. Pure.

    Each of the last `validations` is above the best, while the mean training loss before the last one is below that
    before the best.
    """
    of_val, of_train = (curve(points, kind, "mel_loss", len(points)) for kind in ("val", "train"))
    if len(of_val) <= validations:
        return None
    best = min(range(len(of_val)), key=lambda index: of_val[index][1])
    (best_step, lowest), (last_step, last) = of_val[best], of_val[-1]
    if not all(loss > lowest for _, loss in of_val[-validations:]):
        return None

    def before(index: int) -> float:
        """Mean training loss since the validation before this one; NaN where nothing was logged."""
        since = of_val[index - 1][0] if index else -1
        losses = [loss for step, loss in of_train if since < step <= of_val[index][0]]
        return sum(losses) / len(losses) if losses else math.nan

    fell = before(len(of_val) - 1) < before(best)
    return Overfit(lowest, best_step, last, last_step) if fell else None


def sample_points(pairs: Sequence[tuple[int, float]], limit: int = 500) -> list[tuple[int, float]]:
    """At most `limit` (4 or more) of the pairs: the first, the last, the lowest and highest of each stretch between."""
    if len(pairs) <= limit:
        return list(pairs)
    inner, stretches = pairs[1:-1], (limit - 2) // 2
    sampled = [pairs[0]]
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        chosen = {min(range(len(stretch)), key=lambda k: stretch[k][1]), max(range(len(stretch)),
                                                                            key=lambda k: stretch[k][1])}
        sampled += [stretch[k] for k in sorted(chosen)]
    return [*sampled, pairs[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def files_in(folder: Path, suffixes: tuple[str, ...]) -> dict[str, int]:
    """Name -> bytes, by name, of the files with these endings that the page can show; {} where there is no folder.

    A folder of thousands is read when a file comes or goes, and else every ten seconds, in case that one grows.
    """
    try:
        return files_at(folder, suffixes, folder.stat().st_mtime_ns, int(time.monotonic() / 10))
    except OSError:
        return {}


@functools.lru_cache(maxsize=16)
def files_at(folder: Path, suffixes: tuple[str, ...], changed: int, moment: int) -> dict[str, int]:
    """files_in() at a moment. Raises: OSError."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.lower().endswith(suffixes) and name[0] != "." and is_text_name(name):
                with contextlib.suppress(OSError):  # a file that is gone this moment, a link to nowhere
                    found.append((name, entry.stat().st_size))
    return dict(sorted(found))


# ---------------------------------------------------------------------------------------------------------------------
# Progress


@dataclass(frozen=True)
class Progress:
    """How far a program is, from its last "[Progress] name: done/total, ..., about N s left" or [Train] line."""

    name: str
    done: int
    total: int | None
    seconds_left: float | None
    step: str = ""
    """Of a program of several steps: "2/5 tokenizer"."""


def progress_of(log: Path) -> Progress | None:
    """None before the program has said anything about its progress."""
    return parse_progress(read_tail(log, max_lines=5000, max_bytes=1 << 18))


def parse_progress(text: str) -> Progress | None:
    """The last progress that a log tells."""
    begun = list(STEP.finditer(text))
    if begun:
        found = parse_progress(text[begun[-1].end():]) or Progress("", 0, None, None)
        return replace(found, step=begun[-1][1])
    told = list(PROGRESS.finditer(text))
    steps = list(TRAIN_STEP.finditer(text))
    if steps and (not told or steps[-1].start() > told[-1].start()):
        of_training = [found for found in told if found[1] == "training"]
        known = progress_from(of_training[-1]) if of_training else Progress("training", 0, None, None)
        return replace(known, done=int(steps[-1][1]))
    return progress_from(told[-1]) if told else None


def progress_from(found: re.Match[str]) -> Progress:
    name, done, total, left = found.groups()
    return Progress(name, int(done), int(total), float(left) if left else None)


def tensorboard_url(log: Path) -> str | None:
    """Where the TensorBoard that writes this log is listening; None until it says so."""
    found = re.search(r"TensorBoard \S+ at (http://\S+)", read_tail(log))
    return found[1] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# The machine


class BackgroundCommand:
    """A short-lived command whose output is picked up when it has ended; it writes to files, so it never stalls."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.stdout: IO[bytes] = tempfile.TemporaryFile()
        self.stderr: IO[bytes] = tempfile.TemporaryFile()
        self.process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.stdout,
                                        stderr=self.stderr, env={**os.environ, "PYTHONUTF8": "1"})

    def result(self) -> tuple[str, str] | None:
        """(standard output, standard error) once it has ended; only the first call that finds it so gets them."""
        if self.process.poll() is None:
            return None
        texts = []
        for file in (self.stdout, self.stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return texts[0], texts[1]


GPU_QUERY = ["--query-gpu=name,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits"]


class Machine:
    """Memory of the machine, its GPUs and a process."""

    def __init__(self) -> None:
        self.nvidia_smi = shutil.which("nvidia-smi")
        self.query: BackgroundCommand | None = None
        self.asked = -math.inf
        self.gpus: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def memory(self, pid: int | None = None) -> dict[str, Any]:
        """Bytes: {"total", "available", "process": int | None, "gpus": [{"name", "used", "total", "busy_percent"}]}.

        GPUs are asked every five seconds in the background; the list is empty until the first answer.
        """
        machine = kib_fields(Path("/proc/meminfo"))
        process = kib_fields(Path(f"/proc/{pid}/status")) if pid else {}
        with self.lock:
            self.ask_gpus()
            gpus = list(self.gpus)
        return {"total": machine.get("MemTotal", 0), "available": machine.get("MemAvailable", 0),
                "process": process.get("VmRSS"), "gpus": gpus}

    def ask_gpus(self) -> None:
        answer = self.query.result() if self.query else None
        if answer:
            self.query, self.gpus = None, parse_gpus(answer[0])
        if self.nvidia_smi and self.query is None and time.monotonic() - self.asked > 5:
            self.query, self.asked = BackgroundCommand([self.nvidia_smi, *GPU_QUERY]), time.monotonic()


def kib_fields(path: Path) -> dict[str, int]:
    """{name: bytes} of the "Name:  123 kB" lines of a file in /proc; {} for a process that is gone."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def parse_gpus(csv: str) -> list[dict[str, Any]]:
    """Lines of nvidia-smi (GPU_QUERY), MiB and percent. What a driver does not tell ("[N/A]") is None."""
    gpus = []
    for line in csv.splitlines():
        name, *numbers = (part.strip() for part in line.split(","))
        if len(numbers) == 3:
            used, total, busy = (int(number) if number.isdecimal() else None for number in numbers)
            gpus.append({"name": name, "used": used and used << 20, "total": total and total << 20,
                         "busy_percent": busy})
    return gpus


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

FileKey = tuple[int, int, int, int]  # device, inode, size, modification time in nanoseconds


@dataclass(frozen=True)
class Inspection:
    """What is known of a directory's checkpoints at this moment."""

    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """Entries of tools.inspect_checkpoint --json, newest first; "names" are the file's names in the directory."""
    resume: str | None = None
    """The path that --resume auto would take, among those verified so far."""
    verifying: list[str] = field(default_factory=list)
    """Names of files that are still being read; [] when all is known."""


class CheckpointTable:
    """Verified contents of checkpoints: each file is read once, by a subprocess, until it changes."""

    def __init__(self) -> None:
        self.known: dict[FileKey, dict[str, Any]] = {}
        # One at a time: each loads PyTorch and reads gigabytes.
        self.running: tuple[BackgroundCommand, dict[str, FileKey]] | None = None
        self.lock = threading.Lock()

    def look(self, directory: Path) -> Inspection:
        """At once; starts a verification in the background where a file is new."""
        return self.look_at(directory, all_checkpoints(directory))

    def look_up(self, path: Path) -> dict[str, Any] | None:
        """The entry of one file, by any of its names; None while it is being verified, or when it is not there."""
        found = self.look_at(path.parent, sorted({*all_checkpoints(path.parent), path}))
        return next((entry for entry in found.checkpoints if path.name in entry["names"]), None)

    def look_at(self, directory: Path, paths: Sequence[Path]) -> Inspection:
        with self.lock:
            self.collect()
            files = files_of(paths)
            new = {str(names[0]): key for key, names in files.items() if key not in self.known}
            if new and self.running is None:
                argv = [sys.executable, "-m", "tools.inspect_checkpoint", "--json", "--", *new]
                self.running = BackgroundCommand(argv), new
            known = {key: self.known[key] for key in files if key in self.known}
        entries = sorted((entry_for(entry, files[key]) for key, entry in known.items()), key=newest_first)
        chosen = resume_choice(directory, entries)
        return Inspection(entries, str(chosen) if chosen else None, [Path(name).name for name in new])

    def collect(self) -> None:
        """Takes in what a verification that has ended found; a file that changed meanwhile is read again later."""
        command, asked = self.running or (None, {})
        answer = command.result() if command else None
        if answer is None:
            return
        self.running = None
        try:
            entries = {entry["path"]: entry for entry in json.loads(answer[0])["checkpoints"]}
        except (ValueError, KeyError, TypeError):  # it did not get as far as its report
            entries = {}
        unchanged = {path: key for path, key in asked.items() if key in files_of([Path(path)])}
        if not entries and unchanged == asked:  # not for a file that was rotated out meanwhile: nobody can read these
            entries = {path: unseen_entry(key, last_error(answer[1])) for path, key in asked.items()}
        self.known |= {key: entries[path] for path, key in unchanged.items() if path in entries}


def unseen_entry(key: FileKey, reason: str) -> dict[str, Any]:
    """The entry of a file that could not be inspected, for want of memory for instance."""
    return {**dict.fromkeys(INSPECTED), "bytes": key[2], "mtime": key[3] / 1e9, "verified": False, "problem": reason}


def files_of(paths: Sequence[Path]) -> dict[FileKey, list[Path]]:
    """Which names are one file; model_step names come before latest.pth and best.pth."""
    files: dict[FileKey, list[Path]] = {}
    for path in sorted(paths, key=lambda path: (not path.name.startswith("model_step"), path.name)):
        try:
            stat = path.stat()
        except OSError:  # rotated out this moment
            continue
        files.setdefault((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), []).append(path)
    return files


def entry_for(entry: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """The entry with the names that the file has now."""
    return {**entry, "path": str(paths[0]), "aliases": [str(path) for path in paths[1:]],
            "names": [path.name for path in paths]}
