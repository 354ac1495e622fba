"""Being stopped: every signal saves, whatever the moment; what kills at once loses nothing that was saved."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    STOP_SIGNALS,
    TRAINER,
    call_trainer,
    data_args,
    load_checkpoint,
    metrics_of,
    read_jsonl,
    resumable_state,
)

SETTINGS = ["--batch-size", "4", "--grad-accumulation", "2", "--log-interval", "1", "--save-interval", "5",
            "--val-interval", "7"]
ENDLESS = ["--epochs", "1000000"]


def default_signals() -> None:
    """In the child: as started from a user's shell, whatever this process ignores."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


def ignore_hangup() -> None:
    """In the child: what nohup does."""
    default_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def training(*args: object, program: tuple[str, ...] = (str(TRAINER),), prepare: Callable[[], None] = default_signals
             ) -> Iterator[subprocess.Popen[str]]:
    """A trainer process of a group of its own; what it prints comes through its stdout."""
    command = [sys.executable, *program, *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=prepare, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Reads up to the first line in which the pattern is found."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if re.search(pattern, line):
            return read
    raise AssertionError(f"the trainer ended before it printed {pattern!r}:\n{read}")


def rest_of(process: subprocess.Popen[str], seconds: float = 60) -> str:
    """Waits for the end of the process; returns what it still printed."""
    output = process.communicate(timeout=seconds)[0]
    assert "Traceback" not in output, output
    return output


def last_exit(output_dir: Path) -> dict:
    return json.loads((output_dir / "last_exit.json").read_text())


def step_of(output_dir: Path) -> int:
    return load_checkpoint(output_dir / "latest.pth")["step"]


def process_state(pid: int) -> tuple[str, int]:
    """(state letter, parent) of a process; ("X", 0) for one that is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def children_of(pid: int) -> list[int]:
    """Process ids of its children."""
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [process for process in processes if process_state(process)[1] == pid]


def is_alive(pid: int) -> bool:
    return process_state(pid)[0] not in "XZ"


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")


# ---------------------------------------------------------------------------------------------------------------------
# Signals that ask


@pytest.mark.parametrize("name,status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138),
                                         ("SIGUSR2", 140)])
def test_a_signal_saves_the_last_complete_step_and_sets_the_exit_status(name: str, status: int, tiny: Path,
                                                                        tmp_path: Path):
    with training(*data_args(tiny), *SETTINGS, *ENDLESS, "--output-dir", tmp_path) as process:
        read_until(process, r"\[Train\] .* step=6 ")
        process.send_signal(getattr(signal, name))
        output = rest_of(process)
    assert process.returncode == status, output
    stopped_at = int(re.search(rf"\[Info\] {name}: stopping at step (\d+)", output)[1])  # type: ignore[index]
    assert stopped_at >= 6 and step_of(tmp_path) == stopped_at
    assert last_exit(tmp_path) == {"reason": "stopped", "status": status, "step": stopped_at}
    assert max(line["step"] for line in metrics_of(tmp_path)) == stopped_at


NEVER_READ = f"""
import os, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from trainers import train_gpt_v2 as trainer
read, done, after = os.pread, [], int(sys.argv.pop(1))
def pread(descriptor, count, offset):
    done.append(1)
    if len(done) > after:
        if len(done) == after + 1:
            print("a read that never returns", flush=True)
        threading.Event().wait()
    return read(descriptor, count, offset)
os.pread = pread
trainer.leave(trainer.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name,status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_disk_that_hangs_while_data_is_awaited_blocks_neither_the_stop_nor_the_save(name: str, status: int,
                                                                                      tiny: Path, tmp_path: Path):
    args = [*data_args(tiny), *SETTINGS, *ENDLESS, "--output-dir", tmp_path, "--save-interval", 1000]
    with training(*args, program=("-c", NEVER_READ, "300")) as process:
        read = read_until(process, "a read that never returns")
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(getattr(signal, name))
        output = read + rest_of(process)
        assert time.monotonic() - started < 5
    assert process.returncode == status, output
    stopped_at = int(re.search(rf"\[Info\] {name}: stopping at step (\d+)", output)[1])  # type: ignore[index]
    assert stopped_at > 0 and step_of(tmp_path) == stopped_at


def test_a_disk_that_hangs_during_data_preparation_does_not_hold_up_a_stop(tiny: Path, tmp_path: Path):
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path]
    with training(*args, program=("-c", NEVER_READ, "1")) as process:
        read_until(process, "a read that never returns")
        process.send_signal(signal.SIGTERM)
        output = rest_of(process)
    assert process.returncode == 143, output
    assert last_exit(tmp_path) == {"reason": "stopped", "status": 143, "step": None}


def test_a_signal_during_data_preparation_is_noticed_there(tiny: Path, tmp_path: Path):
    """The manifest is a pipe with no end, so that preparation lasts until the signal arrives."""
    row = (tiny / "train_pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "config.yaml").write_text((tiny / "config.yaml").read_text())
    os.mkfifo(tmp_path / "pairs.jsonl")
    args = [*data_args(tiny), "--output-dir", tmp_path / "out"]
    args[1] = str(tmp_path / "pairs.jsonl")
    with training(*args) as process:
        with contextlib.suppress(BrokenPipeError), open(tmp_path / "pairs.jsonl", "w", encoding="utf-8") as pipe:
            for _ in range(20):  # far enough for the progress to be told
                pipe.write(row * 1000)
            process.send_signal(signal.SIGTERM)
            for _ in range(1000):
                pipe.write(row * 1000)
        output = rest_of(process)
    assert process.returncode == 143, output
    assert last_exit(tmp_path / "out") == {"reason": "stopped", "status": 143, "step": None}
    assert not list((tmp_path / "out").glob("*.pth"))


HANGING_SAVE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from trainers import train_gpt_v2 as trainer
def hang(content, handle):
    handle.write(bytes(5000))
    handle.flush()
    print("half saved", flush=True)
    time.sleep(600)
trainer.torch.save = hang
sys.exit(trainer.main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_leaves_at_once_and_what_is_on_disk_stays_valid(tiny: Path, tmp_path: Path):
    args = [*data_args(tiny), *SETTINGS, *ENDLESS, "--output-dir", tmp_path, "--val-interval", 1000, "--save-interval",
            1000]
    call_trainer(*args, "--max-steps", 5)
    args += ["--resume", "auto", "--max-steps", 0]
    with training(*args, program=("-c", HANGING_SAVE)) as process:
        read_until(process, r"\[Train\] .* step=8 ")
        process.send_signal(signal.SIGINT)
        read_until(process, "half saved")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert time.monotonic() - started < 5
    assert list(tmp_path.glob(".*.partial")) and step_of(tmp_path) == 5
    output = call_trainer(*args, "--max-steps", 6)
    assert "Epoch: 0, Step: 5" in output and step_of(tmp_path) == 6
    assert not list(tmp_path.glob(".*.partial"))


@pytest.fixture
def no_default_actions() -> Iterator[None]:
    """A signal that comes before or after the trainer's main() does not end the test run."""
    before = {signum: signal.signal(signum, lambda *_: None) for signum in STOP_SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_signals_at_random_moments_all_save(no_default_actions, tiny: Path, tmp_path: Path):
    """Real signals to this process while the trainer's main() runs in it; each start goes on where the last one was."""
    rng, stopped_at = random.Random(11), 5
    args = [*data_args(tiny), *SETTINGS, *ENDLESS, "--output-dir", tmp_path, "--resume", "auto", "--max-steps"]
    started = time.monotonic()
    call_trainer(*args, stopped_at)
    seconds = time.monotonic() - started
    for number in range(8):
        signum = STOP_SIGNALS[number % len(STOP_SIGNALS)]
        timer = threading.Timer(rng.uniform(0.01, 2 * seconds), os.kill, (os.getpid(), signum))
        timer.start()
        output = call_trainer(*args, 0, status=128 + signum)
        timer.join()
        stop = last_exit(tmp_path)
        assert (stop["reason"], stop["status"]) == ("stopped", 128 + signum)
        if stop["step"]:
            assert step_of(tmp_path) == stop["step"] >= stopped_at, output
            stopped_at = stop["step"]
    assert stopped_at > 5
    (metrics,) = tmp_path.glob("logs/run_*/metrics.jsonl")
    assert [line["step"] for line in read_jsonl(metrics) if line["kind"] == "train"] == list(range(1, stopped_at + 1))


# ---------------------------------------------------------------------------------------------------------------------
# A lost terminal


def test_a_closed_output_counts_as_a_hangup(tiny: Path, tmp_path: Path):
    with training(*data_args(tiny), *SETTINGS, *ENDLESS, "--output-dir", tmp_path) as process:
        read_until(process, r"\[Train\] .* step=3 ")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 129
    stop = last_exit(tmp_path)
    assert (stop["reason"], stop["status"]) == ("stopped", 129) and step_of(tmp_path) == stop["step"] >= 3


def test_under_nohup_a_hangup_and_a_closed_output_are_ignored(tiny: Path, tmp_path: Path):
    with training(*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--max-steps", 40, "--epochs", 100,
                  prepare=ignore_hangup) as process:
        read_until(process, r"\[Train\] .* step=3 ")
        process.send_signal(signal.SIGHUP)
        read_until(process, r"\[Train\] .* step=6 ")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    assert last_exit(tmp_path) == {"reason": "finished", "status": 0, "step": 40}


# ---------------------------------------------------------------------------------------------------------------------
# A kill


def test_three_kills_at_random_moments_end_in_the_bits_of_the_uninterrupted_run(tiny: Path, tmp_path: Path):
    """A checkpoint at every step, so that most kills fall into a save."""
    args = [*data_args(tiny), *SETTINGS, "--save-interval", 1, "--epochs", 6]
    call_trainer(*args, "--output-dir", tmp_path / "whole")
    last_step = step_of(tmp_path / "whole")
    rng, out = random.Random(12), tmp_path / "killed"
    for part in range(3):
        kill_at = rng.randint(part * last_step // 4 + 3, (part + 1) * last_step // 4)
        with training(*args, "--output-dir", out, "--resume", "auto") as process:
            read_until(process, rf"\[Train\] .* step={kill_at} ")
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not (out / "last_exit.json").exists()
    call_trainer(*args, "--output-dir", out, "--resume", "auto")
    assert resumable_state(load_checkpoint(out / "latest.pth")) == resumable_state(
        load_checkpoint(tmp_path / "whole" / "latest.pth"))
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert sorted(path.name for path in out.glob("*.pth")) == sorted(
        path.name for path in (tmp_path / "whole").glob("*.pth"))


def test_a_restart_right_after_a_kill_gets_the_lock(tiny: Path, tmp_path: Path):
    args = [*data_args(tiny), *SETTINGS, *ENDLESS, "--output-dir", tmp_path, "--save-interval", 1]
    with training(*args, "--num-workers", 2) as process:
        read_until(process, r"\[Train\] .* step=3 ")
        process.send_signal(signal.SIGKILL)
        process.wait()
        output = call_trainer(*args, "--resume", "auto", "--num-workers", 0, "--max-steps", 30)
    assert "in use by" not in output and step_of(tmp_path) == 30


@needs_proc
def test_reading_threads_leave_no_process_and_the_same_bits_whatever_their_number(tiny: Path, tmp_path: Path):
    args = [*data_args(tiny), *SETTINGS, "--epochs", 6]
    call_trainer(*args, "--output-dir", tmp_path / "one", "--num-workers", 1)
    with training(*args, "--output-dir", tmp_path / "five", "--num-workers", 5) as process:
        read_until(process, r"\[Train\] .* step=2 ")
        assert children_of(process.pid) == []
        output = rest_of(process)
    assert process.returncode == 0, output
    assert resumable_state(load_checkpoint(tmp_path / "five" / "latest.pth")) == resumable_state(
        load_checkpoint(tmp_path / "one" / "latest.pth"))
    assert metrics_of(tmp_path / "five") == metrics_of(tmp_path / "one")
