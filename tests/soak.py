"""Kills, signals and damaged files without end: does every run end in the bits of the run that nobody disturbed?

    python tests/soak.py [--kills 200] [--signals 50] [--flips 1000] [--truncations 200] [--seed N] [--jobs 2]
                         [--json PATH]

kills        SIGKILLs of the trainer: at least a third inside a save (its temporary file was left behind), others while
             it resumes (some twice in a row) or at any moment. The same command goes on until it finishes. Weights,
             optimizer, position, metrics and the set of checkpoints must be those of the uninterrupted run; no step
             whose "Saved" line was printed may be lost.
signals      SIGINT, SIGTERM and SIGHUP in every phase. Each must save, set the exit status and write last_exit.json;
             the finished run must be the uninterrupted one. A signal that comes before main() has begun is not counted.
flips        One flipped bit in a real checkpoint, half of them anywhere, half in its headers and its pickle.
truncations  The file ends early. Both: refused with a ResumeError, or exactly what was written is loaded.

A run whose settings (accumulation, workers, precision, save interval) are drawn from the seed is one "life". Most of
its processes are forks of this one, which has torch and the trainer imported but has computed nothing: what runs in
them, and gets the signal, is the trainer's main() without the seconds of importing torch. Every tenth process, each
uninterrupted run and every other last process is `python trainers/train_gpt_v2.py` itself.
The exit status is 0 only if everything held. The seed repeats the settings and aims, not the microsecond of a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # in every process: no pool of threads that a fork would lose

import numpy as np
import torch
import torch._dynamo  # with the next one: what a trainer imports late, imported once
import torch.utils.tensorboard  # noqa: F401
from conftest import (
    STOP_SIGNALS,
    TRAINER,
    data_args,
    load_checkpoint,
    make_dataset,
    metrics_of,
    resumable_state,
    trainer,
)

VAL_INTERVAL = 4
ORPHANS_LEAVE = 30.0  # seconds in which all that a killed trainer started must be gone
PATIENCE = 300.0  # seconds without the awaited line, or until the end of a process that was told to stop
STRIKES_PER_LIFE = 11
RETRIES = 5  # of an aim that was missed
PHASES = ("start", "data preparation", "warm-up", "resume", "training", "validation", "save")
FRESH_PHASES = PHASES[:3]  # of a process that finds no checkpoint


class Fault(Exception):
    """A promise was broken."""


# ---------------------------------------------------------------------------------------------------------------------
# One trainer process


class Process:
    """A trainer in a session of its own; all that it prints goes to a file."""

    def __init__(self, argv: list[str], printed: Path, fresh: bool):
        self.printed, self.started = printed, time.monotonic()
        self.status: int | None = None
        printed.touch()
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the child has its default actions
        self.pid = os.fork()
        if self.pid == 0:
            become_trainer(argv, printed, fresh)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def poll(self) -> int | None:
        """The exit status, minus the signal's number for a death by signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def text(self) -> str:
        return self.printed.read_text(encoding="utf-8", errors="replace")

    def until(self, ready: Callable[[], bool]) -> bool:
        """Waits until it is ready; False when the process ended first. Raises: Fault after PATIENCE."""
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None:
            if ready():
                return True
            if time.monotonic() > deadline:
                raise Fault(f"hangs for {PATIENCE:.0f} s, having printed {self.printed}")
            time.sleep(0.001)
        return False

    def wait(self) -> int:
        self.until(lambda: False)
        assert self.status is not None
        return self.status


def become_trainer(argv: list[str], printed: Path, fresh: bool) -> NoReturn:
    """In the child: started as from a user's shell, whatever this process ignores."""
    status = 1
    try:
        os.setsid()
        output = os.open(printed, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if fresh:
            os.execv(sys.executable, [sys.executable, str(TRAINER), *argv])
        status = trainer.main(argv)
        sys.stdout.flush()
    except BaseException:  # nothing of the child may return into the parent's frames
        traceback.print_exc()
    finally:
        os._exit(status)


@contextlib.contextmanager
def running(argv: list[str], printed: Path, fresh: bool) -> Iterator[Process]:
    process = Process(argv, printed, fresh)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)


def members(sessions: set[int]) -> list[int]:
    """Processes of these sessions that are alive; none where there is no /proc."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "XZ":
                alive.append(int(stat.parent.name))
    return alive


# ---------------------------------------------------------------------------------------------------------------------
# Phases, as a reader of the output sees them


def steps_in(pattern: str, printed: str) -> list[int]:
    return [int(step) for step in re.findall(pattern, printed)]


def trained_steps(printed: str) -> list[int]:
    return steps_in(r"(?m)^\[Train\] .* step=(\d+) ", printed)


def partial_saves(out: Path) -> list[Path]:
    return list(out.glob(".*.pth.partial"))


def phase_of(printed: str, saving: bool, resuming: bool) -> str:
    """Where a trainer is that has printed this; resuming: there was a checkpoint when it started."""
    steps = trained_steps(printed)
    if saving:
        return "save"
    if not steps:
        if resuming:
            return "resume"
        return "warm-up" if "[Info] Model: " in printed else "data preparation" if "[Info] " in printed else "start"
    validated = steps_in(r"(?m)^\[Val\] .* step=(\d+) ", printed)
    return "validation" if steps[-1] % VAL_INTERVAL == 0 and steps[-1] not in validated else "training"


@dataclass
class Pace:
    """Seconds, as seen so far."""

    startup: dict[bool, float] = field(default_factory=lambda: {False: 0.4, True: 4.0})  # to the first [Train] line
    to_main: float = 0.01  # until the handlers of a fork are installed and nothing is printed yet

    def learn(self, strike: Strike) -> None:
        if strike.aim == "start" and not strike.fresh:
            self.to_main *= {"before main": 1.4, "data preparation": 0.7}.get(strike.phase, 1.0)


def reach(aim: str, process: Process, out: Path, pace: Pace, fresh: bool, rng: random.Random) -> bool:
    """Waits for a random moment of the phase; False when the process ended first."""
    startup = pace.startup[fresh]
    if aim == "any":
        return process.until(after(rng.uniform(0, startup + 1.0)))
    if aim in ("start", "resume"):
        return process.until(after(pace.to_main if aim == "start" else rng.uniform(0, startup)))
    if aim in FRESH_PHASES:
        line, longest = ("[Info] ", 0.02) if aim == "data preparation" else ("[Info] Model: ", 0.1)
        return process.until(lambda: line in process.text()) and process.until(after(rng.uniform(0, longest)))
    if not process.until(lambda: bool(trained_steps(process.text()))):
        return False
    pace.startup[fresh] = time.monotonic() - process.started
    lines = rng.randint(1, 5)
    if not process.until(lambda: len(trained_steps(process.text())) >= lines):
        return False
    if aim == "save":
        return process.until(lambda: bool(partial_saves(out))) and process.until(after(rng.uniform(0, 0.03)))
    found = process.until(lambda: phase_of(process.text(), bool(partial_saves(out)), True) == aim)
    return found and process.until(after(rng.uniform(0, 0.03 if aim == "validation" else 0.01)))


def after(seconds: float) -> Callable[[], bool]:
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() >= moment


# ---------------------------------------------------------------------------------------------------------------------
# One life: a run that is struck again and again


@dataclass
class Strike:
    """One signal to one trainer process."""

    aim: str
    phase: str
    signum: int
    fresh: bool
    seconds: float  # from the signal to the end of the process
    resumed_step: int | None = None  # where this process took the run up
    steps_repeated: int = 0  # by this process, of those that the one before had done


@dataclass(frozen=True)
class Settings:
    accumulation: int
    workers: int
    precision: str
    save_interval: int

    def args(self, data: Path, out: Path) -> list[str]:
        """33 steps of 4 samples."""
        amp = [] if self.precision == "fp32" else ["--amp", self.precision]
        numbers = {"batch-size": 4 // self.accumulation, "grad-accumulation": self.accumulation, "epochs": 3,
                   "num-workers": self.workers, "log-interval": 1, "val-interval": VAL_INTERVAL, "val-batch-size": 2,
                   "save-interval": self.save_interval}
        flags = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
        return [*data_args(data), "--output-dir", str(out), "--resume", "auto", *flags, *amp]


def settings_of(number: int, seed: int) -> Settings:
    """Life by life through all combinations, in an order drawn from the seed."""
    everything = [Settings(*values) for values in itertools.product((1, 2), (0, 2), ("fp32", "bf16", "fp16"),
                                                                    (1, 2, 3))]
    random.Random(f"settings {seed}").shuffle(everything)
    return everything[number % len(everything)]


def aims_of(kind: str, count: int, rng: random.Random) -> list[str]:
    """The moments of one life, as phases to strike in."""
    if kind == "kills":
        groups = [["save"]] * 5 + [["any"]] * 3 + [["resume", "resume"], ["resume"]]
        rng.shuffle(groups)
        return [aim for group in groups for aim in group][:count]
    later = ["resume", "training", "validation", "save"]
    aims = [*later, *(rng.choice(later) for _ in range(count - len(PHASES)))]
    rng.shuffle(aims)
    return [*FRESH_PHASES, *aims][:max(count, 1)]


class Life:
    """A run that is struck at every aim, then finished and compared with the uninterrupted one.

    Raises: Fault, with the folder in which everything lies.
    """

    def __init__(self, kind: str, number: int, seed: int, data: Path, folder: Path):
        self.kind, self.number, self.folder = kind, number, folder
        self.rng = random.Random(f"{kind} {seed} {number}")
        self.settings = settings_of(number + (7 if kind == "signals" else 0), seed)
        self.whole, self.out = folder / "whole", folder / "out"
        self.args, self.whole_args = self.settings.args(data, self.out), self.settings.args(data, self.whole)
        self.pace = Pace()
        self.strikes: list[Strike] = []
        self.processes = 0
        self.sessions: set[int] = set()  # of all trainers; whatever they start is a member
        self.safe_step = self.reached_step = 0  # saved for sure, and trained, by all processes so far

    def live(self, count: int) -> list[Strike]:
        self.folder.mkdir(parents=True)
        with running(self.whole_args, self.folder / "whole.txt", fresh=True) as process:
            self.expect_end(process)
        tries = [(aim, RETRIES) for aim in aims_of(self.kind, count, self.rng)]
        while tries:
            aim, left = tries.pop(0)
            strike = self.strike(aim)
            if strike is None:
                break  # the run reached its end
            self.strikes.append(strike)
            self.pace.learn(strike)
            print(f"[{self.kind}, life {self.number}] {signal.Signals(strike.signum).name} in phase: {strike.phase}",
                  flush=True)
            if strike.phase != aim != "any" and left:
                tries.insert(0, (aim, left - 1))  # at once: later there is no fresh start to strike in
        else:
            with running(self.args, self.next_output(), fresh=self.number % 2 == 1) as process:
                self.expect_end(process)
                self.note_progress(process.text())
        self.compare()
        return self.strikes

    def next_output(self) -> Path:
        self.processes += 1
        return self.folder / f"printed_{self.processes:02}.txt"

    def strike(self, aim: str) -> Strike | None:
        """Starts a trainer and strikes it; None when it reached the end of the run first."""
        signum = signal.SIGKILL if self.kind == "kills" else STOP_SIGNALS[len(self.strikes) % 3]
        fresh = (self.number + self.processes) % 10 == 9
        resuming, before = (self.out / "latest.pth").exists(), self.latest_step()
        with running(self.args, self.next_output(), fresh) as process:
            self.sessions.add(process.pid)
            if not reach(aim, process, self.out, self.pace, fresh, self.rng):
                self.expect_end(process)
                self.note_progress(process.text())
                return None
            phase = phase_of(process.text(), bool(partial_saves(self.out)), resuming)
            struck = time.monotonic()
            os.kill(process.pid, signum)
            status = process.wait()
            strike = Strike(aim, phase, signum, fresh, time.monotonic() - struck)
            if status == 0:
                self.expect_end(process)
                self.note_progress(process.text())
                return None
            check = self.check_kill if self.kind == "kills" else self.check_stop
            check(strike, process, before)
            self.note_progress(process.text(), strike)
        return strike

    def latest_step(self) -> int | None:
        latest = self.out / "latest.pth"
        return load_checkpoint(latest)["step"] if latest.exists() else None

    def last_exit(self) -> dict[str, Any] | None:
        path = self.out / "last_exit.json"
        return json.loads(path.read_text()) if path.exists() else None

    def fail(self, message: str, process: Process) -> NoReturn:
        tail = "\n    ".join(process.text().splitlines()[-6:])
        raise Fault(f"{message} (exit status {process.status}, {self.settings}, {process.printed}):\n    {tail}")

    def check_kill(self, strike: Strike, process: Process, before: int | None) -> None:
        if process.status != -signal.SIGKILL:
            self.fail("ended by itself", process)
        if self.last_exit() is not None:
            self.fail("last_exit.json although it was killed", process)
        if strike.phase == "save" and not partial_saves(self.out):
            strike.phase = "training"  # the save was over before the signal came

    def check_stop(self, strike: Strike, process: Process, before: int | None) -> None:
        printed, stop = process.text(), self.last_exit()
        if process.status in (-strike.signum, 1) and "[Info] " not in printed and "[Error] " not in printed:
            strike.phase = "before main"  # Python itself, or its import of torch, was struck
            return
        if strike.phase == "validation" and "validation still owed" not in printed:
            strike.phase = "training"
        name, status = signal.Signals(strike.signum).name, 128 + strike.signum
        if process.status != status or "Traceback" in printed or "[Error] " in printed:
            self.fail(f"{name} in phase {strike.phase} gave another end than {status}", process)
        if stop is None or (stop["reason"], stop["status"]) != ("stopped", status):
            self.fail(f"{name} in phase {strike.phase} left last_exit.json {stop}", process)
        expected = stop["step"] or before
        if self.latest_step() != expected or (expected or 0) < max(trained_steps(printed), default=0):
            self.fail(f"{name} in phase {strike.phase} at step {stop['step']} left {self.latest_step()} in latest.pth",
                      process)

    def note_progress(self, printed: str, strike: Strike | None = None) -> None:
        """Raises: Fault when the process took the run up before a step that was saved for sure."""
        resumed = steps_in(r"(?m)^\[Info\]    Epoch: \d+, Step: (\d+)$", printed)
        step = 0 if "no checkpoint in" in printed else resumed[0] if resumed else None
        if step is not None and step < self.safe_step:
            raise Fault(f"step {self.safe_step} was saved, the run was taken up at {step}: {self.folder}")
        if strike and step is not None:
            strike.resumed_step, strike.steps_repeated = step, max(0, self.reached_step - step)
        if step is not None:
            self.reached_step = step
        saved = steps_in(r"(?m)^\[Info\] Saved \S*model_step(\d+)\.pth", printed)
        self.safe_step = max([self.safe_step, *saved])
        self.reached_step = max([self.reached_step, *trained_steps(printed)])

    def expect_end(self, process: Process) -> None:
        if process.wait() != 0 or not re.search("Training (is )?complete", process.text()):
            self.fail("did not finish", process)

    def compare(self) -> None:
        """Raises: Fault unless the struck run is the uninterrupted one, bit for bit."""
        exit_now = self.last_exit()
        if exit_now is None or exit_now["reason"] != "finished":
            raise Fault(f"last_exit.json of the finished run says {exit_now}: {self.folder}")
        names = {path.name for path in self.whole.glob("*.pth")}
        compared = names if self.kind == "kills" else {"latest.pth"}  # a stop's own checkpoint shifts which are kept
        if self.kind == "kills" and {path.name for path in self.out.glob("*.pth")} != names:
            raise Fault(f"other checkpoints than the uninterrupted run's: {self.folder}")
        if partial_saves(self.out):
            raise Fault(f"temporary files stayed: {self.folder}")
        wrong = [f"{name} ({', '.join(keys)})" for name in sorted(compared) if (keys := self.differing(name))]
        if "model" in self.differing("best.pth"):
            wrong.append("the weights of best.pth")
        if metrics_of(self.out) != metrics_of(self.whole):
            wrong.append("metrics.jsonl")
        if wrong:
            raise Fault(f"differs from the uninterrupted run: {'; '.join(wrong)}: {self.settings} {self.folder}")

    def expect_no_orphans(self) -> None:
        """Raises: Fault when a process outlives its trainer; it is ended then."""
        deadline = time.monotonic() + ORPHANS_LEAVE
        while (orphans := members(self.sessions)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if orphans:
            raise Fault(f"{len(orphans)} processes outlived their trainer by {ORPHANS_LEAVE:.0f} s: {self.settings} "
                        f"{self.folder}")

    def differing(self, name: str) -> list[str]:
        expected = resumable_state(load_checkpoint(self.whole / name))
        found = resumable_state(load_checkpoint(self.out / name))
        return [key for key, value in expected.items() if found[key] != value]


def live(kind: str, number: int, count: int, seed: int, data: Path, work: Path) -> list[Strike]:
    """One life, in a process of the pool. Its folder is deleted only if all was well."""
    folder = work / f"{kind}_{number}"
    life = Life(kind, number, seed, data, folder)
    try:
        strikes = life.live(count)
    finally:
        life.expect_no_orphans()
    shutil.rmtree(folder)
    return strikes


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


def make_small_checkpoint(data: Path, folder: Path) -> Path:
    """A real checkpoint of two steps."""
    args = [*data_args(data), "--output-dir", str(folder / "out"), "--batch-size", "4", "--max-steps", "2"]
    with running(args, folder / "printed.txt", fresh=False) as process:
        if process.wait() != 0:
            raise Fault(f"no checkpoint to damage:\n{process.text()}")
    return folder / "out" / "model_step2.pth"


def structure_bytes(path: Path) -> np.ndarray:
    """Offsets of all bytes that are not a tensor's: zip headers, the pickle, the table of contents."""
    content = path.read_bytes()
    is_structure = np.ones(len(content), dtype=bool)
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                lengths = content[record.header_offset + 26 : record.header_offset + 30]
                start = record.header_offset + 30 + sum(np.frombuffer(lengths, "<u2").tolist())
                is_structure[start : start + record.file_size] = False
    return np.flatnonzero(is_structure)


def state_or_refusal(path: Path) -> Any:
    """Digests of all that was loaded, or "refused". Whatever else the reader raises is a fault of its own."""
    try:
        return trainer.digest_tree(trainer.read_checkpoint(path))
    except trainer.ResumeError:
        return "refused"


def damage(kind: str, number: int, count: int, seed: int, checkpoint: Path, work: Path) -> Counter[str]:
    """Damages the checkpoint `count` times. Returns how often it was refused, and loaded as written.

    Raises: Fault when altered state is loaded.
    """
    rng, content = random.Random(f"{kind} {seed} {number}"), checkpoint.read_bytes()
    whole, structure = state_or_refusal(checkpoint), structure_bytes(checkpoint)
    damaged, found = work / f"{kind}_{number}.pth", Counter[str]()
    for i in range(count):
        if kind == "truncations":
            size = rng.randrange(len(content))
            what, spoilt = f"cut at byte {size}", content[:size]
        else:
            at = int(rng.choice(structure)) if i % 2 else rng.randrange(len(content))
            bit = rng.randrange(8)
            what, spoilt = f"bit {bit} of byte {at} flipped", content[:at] + bytes([content[at] ^ 1 << bit]) + content[
                at + 1 :]
        damaged.unlink(missing_ok=True)  # an earlier one may still be mapped
        damaged.write_bytes(spoilt)
        try:
            state = state_or_refusal(damaged)
        except Exception as error:
            raise Fault(f"{damaged}: {what}: {type(error).__name__} instead of a ResumeError: {error}") from error
        if state not in ("refused", whole):
            raise Fault(f"{damaged}: {what}: altered state was loaded")
        found["refused" if state == "refused" else "loaded as written"] += 1
    damaged.unlink(missing_ok=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The whole soak


@dataclass
class Tally:
    """Results of one kind so far."""

    kind: str
    wanted: int
    strikes: list[Strike] = field(default_factory=list)
    damaged: Counter[str] = field(default_factory=Counter)
    tasks: int = 0  # submitted
    done: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self.faults.append(str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}")
        elif self.kind in ("kills", "signals"):
            self.strikes += future.result()
        else:
            self.damaged += future.result()
        self.done += 1

    @property
    def phases(self) -> Counter[str]:
        return Counter(strike.phase for strike in self.strikes)

    @property
    def count(self) -> int:
        return sum(self.damaged.values()) + len(self.strikes) - self.phases["before main"]

    @property
    def missing(self) -> str:
        """What the wanted number still lacks; "" for nothing."""
        if self.count < self.wanted:
            return f"{self.count} of {self.wanted}"
        if self.kind == "kills" and 3 * self.phases["save"] < self.wanted:
            return f"{self.phases['save']} inside a save"
        lacking = [phase for phase in PHASES if self.kind == "signals" and not self.phases[phase]]
        return f"none in phase {lacking[0]}" if lacking and self.wanted >= len(PHASES) else ""

    def rows(self) -> list[dict[str, Any]]:
        """Lines of the table: this kind, and what it consists of."""
        faults = [*self.faults, *([f"only {self.missing}"] if self.missing else [])]
        lives = self.kind in ("kills", "signals")
        result = f"{self.done - len(self.faults)} of {self.done} runs bit-identical" if lives else (
            "all refused or loaded as written")
        worst = self.worst(self.strikes) if lives else f"{sum('altered' in fault for fault in self.faults)} altered"
        lines = [{"what": self.kind, "count": self.count, "result": "FAILED" if faults else result, "worst": worst,
                  "faults": faults}]
        for what, count in self.damaged.items():
            lines.append({"what": f"  {what}", "count": count})
        for phase, count in self.phases.most_common():
            of_phase = [strike for strike in self.strikes if strike.phase == phase]
            note = {"before main": "not counted", "resume": f"{self.twice_in_a_row} pairs in a row"}.get(phase, "")
            lines.append({"what": f"  {phase}", "count": count, "result": note, "worst": self.worst(of_phase)})
        if lives:
            of_its_own = [strike for strike in self.strikes if strike.fresh]
            lines.append({"what": "  not forked", "count": len(of_its_own), "result": "of all phases, in a process "
                          "that was started as users do", "worst": self.worst(of_its_own)})
        return lines

    @property
    def twice_in_a_row(self) -> int:
        pairs = itertools.pairwise(strike.phase for strike in self.strikes)
        return sum(pair == ("resume", "resume") for pair in pairs)

    def worst(self, strikes: Sequence[Strike]) -> str:
        if self.kind == "kills":
            return f"{max((strike.steps_repeated for strike in strikes), default=0)} steps repeated"
        return f"{max((strike.seconds for strike in strikes), default=0.0):.1f} s from signal to exit"


def plan(tally: Tally) -> tuple[int, int]:
    """(tasks, strikes or damages in each) for a wanted number."""
    size = STRIKES_PER_LIFE if tally.kind in ("kills", "signals") else 50
    tasks = math.ceil(tally.wanted / size)
    return tasks, math.ceil(tally.wanted / tasks) if tasks else 0


def soak(tallies: Sequence[Tally], seed: int, jobs: int, work: Path) -> None:
    """Fills the tallies; lives go on until their number and their share of saves or phases is met."""
    data = make_dataset(work / "data", val_rows=24)
    checkpoint = make_small_checkpoint(data, work)
    waiting: dict[Future[Any], Tally] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:

        def submit(tally: Tally, size: int) -> None:
            lives = tally.kind in ("kills", "signals")
            function, material = (live, data) if lives else (damage, checkpoint)
            waiting[pool.submit(function, tally.kind, tally.tasks, size, seed, material, work)] = tally
            tally.tasks += 1

        for tally in tallies:
            tasks, size = plan(tally)
            for i in range(tasks):
                submit(tally, size if tally.kind in ("kills", "signals") else min(size, tally.wanted - i * size))
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                tally = waiting.pop(future)
                tally.add(future)
                print(f"[soak] {tally.kind}: {tally.count} of {tally.wanted}, {len(tally.faults)} faults", flush=True)
                tasks, size = plan(tally)
                if tally not in waiting.values() and tally.missing and not tally.faults and tally.tasks < 3 * tasks + 2:
                    submit(tally, size)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    keys = ("what", "count", "result", "worst")
    lines = [("what", "how many", "result", "worst"), *([str(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    for what, *others in lines:
        cells = [text.ljust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([what.ljust(widths[0]), *cells]).rstrip())
    for row in rows:
        for fault in row.get("faults", []):
            print(f"[Fault] {row['what']}: {fault}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in {"kills": 200, "signals": 50, "flips": 1000, "truncations": 200, "jobs": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"({number})")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"), help="(drawn, and printed)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    print(f"[soak] seed {args.seed}; {args.kills} kills, {args.signals} signals, {args.flips} flips, "
          f"{args.truncations} truncations; {args.jobs} jobs", flush=True)
    started, begun = time.monotonic(), datetime.datetime.now().isoformat(" ", "seconds")
    work = Path(tempfile.mkdtemp(prefix="soak_"))
    tallies = [Tally(kind, getattr(args, kind)) for kind in ("kills", "signals", "flips", "truncations")]
    try:
        soak([tally for tally in tallies if tally.wanted], args.seed, args.jobs, work)
    except BrokenProcessPool:
        tallies[0].faults.append("a process of the soak itself died, perhaps while reading a damaged file")
    rows = [row for tally in tallies if tally.wanted or tally.faults for row in tally.rows()]
    summary = {"seed": args.seed, "begun": begun, "seconds": round(time.monotonic() - started), "jobs": args.jobs,
               "cores": os.cpu_count(), "machine": platform.machine(), "torch": str(torch.__version__), "rows": rows}
    print(f"[soak] {begun}, seed {args.seed}, {summary['seconds']} s, {summary['cores']} cores")
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    if any(row.get("faults") for row in rows):
        print(f"[soak] What the failed runs left: {work}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
