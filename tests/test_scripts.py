"""The shell scripts: started from anywhere, stopped and killed as a rented machine does it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from conftest import ROOT, call_trainer, data_args, load_checkpoint, trainer
from test_signals import default_signals, read_until

SCRIPTS = ROOT / "scripts"
LOOP = SCRIPTS / "train_until_done.sh"
SETTINGS = ["--batch-size", "4", "--grad-accumulation", "2", "--log-interval", "1", "--save-interval", "5",
            "--val-interval", "1000"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")

# Does what PLAN says for its first, second, ... start; the last entry counts for all further ones. It notes its
# arguments in OUTPUT_DIR/starts.jsonl, and the signals it gets in OUTPUT_DIR/signals.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

args = sys.argv[1:]
out = Path(args[len(args) - args[::-1].index("--output-dir")])
if os.environ.get("RANK", "0") != "0":
    time.sleep(0.5)
with (out / "starts.jsonl").open("a") as starts:
    starts.write(json.dumps({"args": args, "rank": os.environ.get("RANK"), "world_size": os.environ.get("WORLD_SIZE"),
                             "cwd": os.getcwd()}) + "\\n")
number = sum(json.loads(line)["rank"] in (None, "0") for line in (out / "starts.jsonl").open()) - 1
plan = json.loads(os.environ["PLAN"])
do = plan[min(number, len(plan) - 1)]

def end(reason, status, step=None):
    text = json.dumps({"reason": reason, "status": status, "step": step})
    (out / "last_exit.json").write_text(text + "\\n")
    sys.exit(status)

def on_signal(signum, frame):
    with (out / "signals").open("a") as signals:
        signals.write(signal.Signals(signum).name + "\\n")
    time.sleep(1)  # a save; a second signal would fall into it
    end("stopped", 128 + signum, 77)

if "save" in do:
    saved = out / f"model_step{number + 1 if do['save'] == 'next' else do['save']}.pth"
    saved.write_text("")
    (out / "latest.pth").unlink(missing_ok=True)
    os.link(saved, out / "latest.pth")
if do.get("wait"):
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, on_signal)
    print("waiting", flush=True)
    time.sleep(120)
if do.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
if "reason" in do:
    end(do["reason"], do["status"])
sys.exit(do["status"])
"""


def environment(**changes: str) -> dict[str, str]:
    """This Python first in PATH, no pause before restarts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RESTART_WAIT": "0.1", **changes}


@contextlib.contextmanager
def started(script: Path, *args: object, env: dict[str, str] | None = None, cwd: Path = ROOT, **options: Any
            ) -> Iterator[subprocess.Popen[str]]:
    """A script in a session of its own; whatever still runs at the end is killed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "preexec_fn": default_signals,
               **options}
    process = subprocess.Popen([str(script), *map(str, args)], env=env or environment(), cwd=cwd,
                               start_new_session=True, **options)
    try:
        yield process
    finally:
        for pid in family_of(process.pid) if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def processes() -> list[tuple[int, int, str]]:
    """(process id, parent, command line) of everything that runs."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile
            if folder.name.isdigit():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found.append((int(folder.name), parent, (folder / "cmdline").read_text().replace("\0", " ")))
    return found


def children_of(parent: int, command: str) -> list[int]:
    """Process ids of the children whose command line contains `command`, in the order of their starts."""
    return sorted(pid for pid, its_parent, line in processes() if its_parent == parent and command in line)


def family_of(pid: int) -> list[int]:
    """A process and all its descendants; torchrun puts its processes into sessions of their own."""
    return [pid, *(member for child in children_of(pid, "") for member in family_of(child))]


def run_script(script: Path, *args: object, status: int, **options: Any) -> str:
    """Runs a script to its end and checks its exit status; returns all that it printed."""
    with started(script, *args, **options) as process:
        output = process.communicate(timeout=180)[0]
    assert process.returncode == status, f"exit {process.returncode}\n{output}"
    return output


def step_of(output_dir: Path) -> int:
    return load_checkpoint(output_dir / "latest.pth")["step"]


# ---------------------------------------------------------------------------------------------------------------------
# All scripts


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_sound_bash_and_shows_its_first_command(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text and re.search(rf"^#   (sbatch )?scripts/{script.name} ", text, re.MULTILINE)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_train_starts_and_goes_on_from_any_working_directory_with_blanks_in_paths(tiny, tmp_path):
    data = shutil.copytree(tiny, tmp_path / "my data")
    out = tmp_path / "my run"
    args = [*data_args(data), *SETTINGS, "--output-dir", out]
    output = run_script(SCRIPTS / "train.sh", *args, "--max-steps", 2, status=0, cwd=tmp_path)
    assert "starting from the beginning" in output and step_of(out) == 2
    link = tmp_path / "linked project"
    link.symlink_to(ROOT)
    output = run_script(link / "scripts" / "train.sh", *args, "--max-steps", 3, status=0, cwd=tmp_path)
    assert "    Epoch: 0, Step: 2\n" in output.replace("[Info]", "") and step_of(out) == 3


def test_relative_paths_mean_the_same_wherever_a_script_is_called(tmp_path):
    """The defaults, processed_data/ and tokenizers/, are relative too."""
    output = run_script(SCRIPTS / "train.sh", "--tokenizer", "nowhere.model", "--output-dir", tmp_path / "out",
                        status=1, cwd=tmp_path)
    assert "Config: processed_data/config.yaml" in output and "[Error] --tokenizer nowhere.model" in output


# ---------------------------------------------------------------------------------------------------------------------
# The loop's decisions, with a stand-in trainer


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes the environment in which the stand-in trainer follows a plan."""
    program = tmp_path / "stand in.py"
    program.write_text(STAND_IN)
    return lambda *plan, **more: environment(TRAINER=str(program), PLAN=json.dumps(plan), **more)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "my run"
    path.mkdir()
    return path


def starts(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]


FINISHED = {"reason": "finished", "status": 0}
KILLED = {"kill": True}
CRASHED = {"reason": "crash", "status": 1}


def save_and_die(step: int | str) -> dict[str, Any]:
    return {"save": step, "kill": True}


@pytest.mark.parametrize("plan,expected_starts,status", [
    ([FINISHED], 1, 0),
    ([KILLED, KILLED, FINISHED], 3, 0),
    ([CRASHED, FINISHED], 2, 0),
    ([{"reason": "stopped", "status": 143}, FINISHED], 2, 0),
    ([{"reason": "stopped", "status": 129}, FINISHED], 2, 0),
    ([{"reason": "stopped", "status": 130}], 1, 130),
    ([{"reason": "stopped", "status": 138}], 1, 138),  # SLURM's warning, to the trainer alone
    ([{"status": 130}], 1, 130),  # the second Ctrl+C
    ([{"reason": "user_error", "status": 1}], 1, 1),
    ([{"status": 1}], 1, 1),  # a mistake that was noticed before the output directory was opened
    ([KILLED], 4, 137),
    ([CRASHED], 4, 1),
    ([save_and_die(10), KILLED], 4, 137),
    ([KILLED, KILLED, KILLED, save_and_die(10), KILLED, KILLED, KILLED, FINISHED], 7, 137),
    ([KILLED, KILLED, KILLED, save_and_die(10), KILLED, KILLED, FINISHED], 7, 0),
    ([*(save_and_die(step) for step in range(10, 90, 10)), FINISHED], 9, 0),
    ([save_and_die(90), save_and_die(50), save_and_die(60), KILLED, KILLED, FINISHED], 6, 0),
], ids=str)
def test_the_loop_goes_on_stops_or_gives_up(plan, expected_starts, status, out, stand_in):
    output = run_script(LOOP, "--output-dir", out, status=status, env=stand_in(*plan))
    assert len(starts(out)) == expected_starts, output
    gave_up = f"Giving up; why it ended is in {out / 'train_until_done.log'}"
    assert (gave_up in output) == (expected_starts > 1 and status != 0)
    assert (out / "train_until_done.log").read_text() == output


def test_the_report_of_an_earlier_process_is_not_believed(out, stand_in):
    """The trainer is killed before it can remove last_exit.json itself."""
    (out / "last_exit.json").write_text('{"reason": "user_error", "status": 1, "step": null}\n')
    run_script(LOOP, "--output-dir", out, status=0, env=stand_in(KILLED, FINISHED))
    assert len(starts(out)) == 2


def test_all_arguments_reach_the_trainer_unchanged(out, stand_in, tmp_path):
    args = ["--train-manifest", "my data/pairs *.jsonl", "--seed", "", "--output-dir", str(out), "$(touch x)"]
    run_script(LOOP, *args, status=0, env=stand_in(KILLED, FINISHED), cwd=tmp_path)
    first, second = starts(out)
    assert first["args"] == ["--resume", "auto", *args] and first["cwd"] == str(ROOT)
    assert second["args"] == [*first["args"], "--resume", "auto", "--output-dir", str(out)]


def test_a_typed_checkpoint_is_gone_back_to_only_once(out, stand_in):
    """And without --output-dir its folder is the output directory, as for the trainer."""
    env = stand_in(KILLED, FINISHED)
    env["TRAINER"] = str(out / "typed.py")
    (out / "typed.py").write_text(Path(stand_in()["TRAINER"]).read_text().replace(
        "args = sys.argv[1:]", f"args = [*sys.argv[1:], '--output-dir', {str(out)!r}]"))
    run_script(LOOP, "--resume", out / "model_step5.pth", status=0, env=env)
    first, second = [start["args"][:-2] for start in starts(out)]
    assert first == ["--resume", "auto", "--resume", str(out / "model_step5.pth")]
    assert second == [*first, "--resume", "auto", "--output-dir", str(out)]


@pytest.mark.parametrize("name,status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138),
                                         ("SIGUSR2", 140)])
def test_a_signal_to_the_loop_is_passed_on_once_and_ends_it_after_the_save(name, status, out, stand_in):
    with started(LOOP, "--output-dir", out, env=stand_in({"wait": True})) as process:
        read_until(process, "waiting")
        process.send_signal(getattr(signal, name))
        output = process.communicate(timeout=60)[0]
    assert process.returncode == status, output
    assert (out / "signals").read_text() == f"{name}\n" and len(starts(out)) == 1
    assert json.loads((out / "last_exit.json").read_text())["step"] == 77


def test_a_signal_during_the_pause_ends_the_loop_at_once(out, stand_in):
    with started(LOOP, "--output-dir", out, env=stand_in(KILLED, RESTART_WAIT="600")) as process:
        read_until(process, "Going on in 600 s")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 143 and len(starts(out)) == 1


def test_a_signal_at_any_moment_ends_the_loop(out, stand_in):
    """The stand-in is killed and started again without a pause; the loop may be between any two of its commands."""
    rng, env = random.Random(5), stand_in(save_and_die("next"), RESTART_WAIT="0")
    for _ in range(20):
        with started(LOOP, "--output-dir", out, env=env) as process:
            read_until(process, "The trainer ended")
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGTERM)
            output = process.communicate(timeout=30)[0]
        assert process.returncode in (143, 137), output  # 137: the stand-in killed itself before the signal came


@contextlib.contextmanager
def on_a_terminal(*args: object, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], BinaryIO]]:
    """The loop as the foreground job of a terminal; yields it and the terminal's other end."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        default_signals()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    with open(master, "r+b", buffering=0) as terminal:
        with started(LOOP, *args, env=env, preexec_fn=take_terminal, **streams) as process:
            os.close(slave)
            yield process, terminal


def read_terminal_until(terminal: BinaryIO, text: bytes) -> None:
    read = b""
    while text not in read:
        read += terminal.read(4096)


def test_ctrl_c_at_a_terminal_reaches_the_trainer_once(out, stand_in):
    """A second SIGINT would make the trainer leave without a save."""
    with on_a_terminal("--output-dir", out, env=stand_in({"wait": True})) as (process, terminal):
        read_terminal_until(terminal, b"waiting")
        terminal.write(b"\x03")
        read_terminal_until(terminal, b"stopped, status 130, saved step 0")
        assert process.wait(timeout=60) == 130
    assert (out / "signals").read_text() == "SIGINT\n" and len(starts(out)) == 1


def test_a_closed_terminal_lets_the_trainer_save(out, stand_in):
    with on_a_terminal("--output-dir", out, env=stand_in({"wait": True})) as (process, terminal):
        read_terminal_until(terminal, b"waiting")
        terminal.close()
        assert process.wait(timeout=60) == 129
    assert (out / "signals").read_text() == "SIGHUP\n" and len(starts(out)) == 1
    assert "stopped, status 129" in (out / "train_until_done.log").read_text()


def test_a_signal_that_the_kernel_gives_to_another_thread_is_passed_on_too(out, stand_in):
    """Nor does one wake the main thread that comes just before it begins to wait."""
    with started(LOOP, "--output-dir", out, env=stand_in({"wait": True})) as process:
        read_until(process, "waiting")
        other = next(int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()
                     if task.name != str(process.pid))
        assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
        assert process.wait(timeout=60) == 143
    assert (out / "signals").read_text() == "SIGTERM\n" and len(starts(out)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The loop with the real trainer


def test_a_run_whose_trainer_is_killed_twice_and_stopped_once_is_finished_by_the_loop(tiny, tmp_path):
    out = tmp_path / "my run"
    args = [*data_args(tiny), *SETTINGS, "--epochs", 6, "--output-dir", out]
    with started(LOOP, *args, cwd=tmp_path) as process:
        for step, name, ending in ((6, "SIGKILL", "killed, status 137"), (17, "SIGKILL", "killed, status 137"),
                                   (27, "SIGTERM", "stopped, status 143")):
            read_until(process, rf"\[Train\] .* step={step} ")
            os.kill(children_of(process.pid, "train_gpt_v2.py")[0], getattr(signal, name))
            read_until(process, f"The trainer ended: {ending}, saved step ")
        output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert step_of(out) == 36 and "[Info] Training complete: epoch 6, step 36" in output
    assert json.loads((out / "last_exit.json").read_text()) == {"reason": "finished", "status": 0, "step": 36}


def test_sigterm_to_the_loop_saves_the_last_step(tiny, tmp_path):
    args = [*data_args(tiny), *SETTINGS, "--save-interval", 1000, "--epochs", 1000000, "--output-dir", tmp_path]
    with started(LOOP, *args) as process:
        read_until(process, r"\[Train\] .* step=6 ")
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    stopped_at = int(re.search(r"SIGTERM: stopping at step (\d+)", output)[1])  # type: ignore[index]
    assert stopped_at >= 6 and step_of(tmp_path) == stopped_at


@pytest.mark.parametrize("flags,complaint", [
    (["--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
    (["--tokenizer", "nowhere.model"], "[Error] --tokenizer nowhere.model"),
])
def test_a_mistake_ends_the_loop_at_once(flags, complaint, tiny, tmp_path):
    output = run_script(LOOP, *data_args(tiny), "--output-dir", tmp_path, *flags, status=1)
    assert complaint in output and "Going on" not in output


def test_a_directory_in_which_another_trainer_works_ends_the_loop_at_once(tiny, tmp_path):
    with trainer.lock_output_dir(tmp_path):
        output = run_script(LOOP, *data_args(tiny), "--output-dir", tmp_path, status=1)
    assert "in use by process" in output and "Going on" not in output


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_every_gpu_gets_a_process_that_knows_its_rank(out, stand_in):
    run_script(SCRIPTS / "train_multi_gpu.sh", "--output-dir", out, status=0,
               env=stand_in({"status": 0}, GPUS="2"))
    assert sorted(start["rank"] for start in starts(out)) == ["0", "1"]
    assert {start["world_size"] for start in starts(out)} == {"2"}


def test_without_a_gpu_several_are_refused_in_one_line(out):
    output = run_script(SCRIPTS / "train_multi_gpu.sh", "--output-dir", out, status=1,
                        env=environment(CUDA_VISIBLE_DEVICES=""))
    assert output == "[Error] PyTorch sees no GPU here. On a CPU use scripts/train.sh\n"


def test_under_torchrun_the_loop_goes_on_after_a_kill_and_believes_last_exit(out, stand_in):
    """torchrun's own exit status is 1 for a killed process and for a mistake alike."""
    plan = [save_and_die(5), {"reason": "user_error", "status": 1}]
    output = run_script(LOOP, "--output-dir", out, status=1, env=stand_in(*plan, GPUS="2"))
    assert "The trainer ended: killed, status 1, saved step 5" in output
    assert "The trainer ended: user_error, status 1" in output and "Giving up" not in output


def test_under_torchrun_a_killed_rank_is_followed_by_a_restart_that_finishes(tiny, tmp_path):
    args = [*data_args(tiny), *SETTINGS, "--grad-accumulation", 1, "--max-steps", 9, "--output-dir", tmp_path]
    with started(LOOP, *args, env=environment(GPUS="2")) as process:
        read_until(process, r"\[Train\] .* step=6 ")
        os.kill(children_of(children_of(process.pid, "torch.distributed.run")[0], "train_gpt_v2.py")[1], signal.SIGKILL)
        output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert "restart 1 of at most 3" in output and "Step: 5\n" in output and step_of(tmp_path) == 9


def test_under_torchrun_ctrl_c_at_a_terminal_gives_each_process_one_signal_and_time_to_save(out, stand_in):
    with on_a_terminal("--output-dir", out, env=stand_in({"wait": True}, GPUS="2")) as (process, terminal):
        read_terminal_until(terminal, b"waiting")
        read_terminal_until(terminal, b"waiting")
        terminal.write(b"\x03")
        read_terminal_until(terminal, b"The trainer ended: stopped, status 130")
        assert process.wait(timeout=60) == 130
    assert (out / "signals").read_text() == "SIGINT\n" * 2


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_slurms_warning_to_torchrun_reaches_its_processes_which_save_and_leave(name, tiny, tmp_path):
    """torchrun itself would die of it, and leave them behind."""
    args = [*data_args(tiny), *SETTINGS, "--grad-accumulation", 1, "--epochs", 1_000_000, "--output-dir", tmp_path]
    with started(SCRIPTS / "train.sh", *args, env=environment(GPUS="2")) as process:
        read_until(process, r"\[Train\] .* step=6 ")
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=120)
    assert json.loads((tmp_path / "last_exit.json").read_text()) == {
        "reason": "stopped", "status": 128 + getattr(signal, name), "step": step_of(tmp_path)}
    assert step_of(tmp_path) >= 6


def test_of_two_machines_one_is_killed_and_brought_back_and_the_run_is_finished(tiny, tmp_path):
    """Two loops on this machine, each with an agent of torchrun, that share the output directory."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        env = environment(NODES="2", GPUS="1", MAIN=f"127.0.0.1:{free.getsockname()[1]}")
    args = [LOOP, *data_args(tiny), *SETTINGS, "--grad-accumulation", 1, "--save-interval", 2, "--max-steps", 12,
            "--output-dir", tmp_path]
    with started(*args, env=env) as main:
        with started(*args, env=env):
            while not (tmp_path / "model_step4.pth").exists():
                time.sleep(0.05)
        with started(*args, env=env) as brought_back:
            outputs = [process.communicate(timeout=180)[0] for process in (main, brought_back)]
            assert (main.returncode, brought_back.returncode) == (0, 0), outputs
    assert step_of(tmp_path) == 12 and "Going on in" in outputs[0]


# ---------------------------------------------------------------------------------------------------------------------
# SLURM and Lightning AI, with the stand-in trainer


@pytest.fixture
def slurm(stand_in, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The environment of job 42; scontrol notes what it is asked for in `asked`."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    scontrol.chmod(0o755)

    def make(*plan: dict[str, Any], **more: str) -> dict[str, str]:
        env = stand_in(*plan, SLURM_JOB_ID="42", SLURM_SUBMIT_DIR=str(ROOT), **more)
        return {**env, "PATH": f"{scontrol.parent}{os.pathsep}{env['PATH']}"}

    return make


@pytest.mark.parametrize("name,status,asked", [("SIGUSR1", 138, "requeue 42\n"), ("SIGTERM", 143, "")])
def test_a_job_whose_time_is_up_saves_and_queues_again_and_a_cancelled_one_only_saves(
        name, status, asked, out, slurm, tmp_path):
    copy = shutil.copy(SCRIPTS / "slurm.sh", tmp_path / "slurm_script")  # as SLURM does
    with started(copy, "--output-dir", out, env=slurm({"wait": True}), cwd=tmp_path) as process:
        read_until(process, "waiting")
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=60)
    assert process.returncode == status and (out / "signals").read_text() == f"{name}\n"
    assert (tmp_path / "asked").exists() == bool(asked) and (not asked or (tmp_path / "asked").read_text() == asked)
    run_script(copy, "--output-dir", out, env=slurm({"status": 0}, FINISHED), cwd=tmp_path, status=0)
    assert len(starts(out)) == 2


def test_a_killed_trainer_of_a_job_is_started_again_and_gpus_are_taken_as_slurm_gives_them(out, slurm):
    run_script(SCRIPTS / "slurm.sh", "--output-dir", out, env=slurm(KILLED, FINISHED), status=0)
    run_script(SCRIPTS / "slurm.sh", "--output-dir", out, env=slurm(FINISHED, SLURM_GPUS_ON_NODE="2"), status=0)
    assert sorted(row["rank"] or "" for row in starts(out)) == ["", "", "0", "1"]


def test_a_job_submitted_elsewhere_says_so(out, slurm, tmp_path):
    output = run_script(SCRIPTS / "slurm.sh", env={**slurm(FINISHED), "SLURM_SUBMIT_DIR": str(tmp_path)}, status=1)
    assert "is not the project's folder" in output


@pytest.fixture
def studio(tmp_path: Path) -> Path:
    """The on_start.sh of a Studio whose home is tmp_path."""
    hook = tmp_path / ".lightning_studio" / "on_start.sh"
    hook.parent.mkdir()
    hook.write_text("#!/bin/bash\necho mine\n")
    return hook


def test_a_studio_that_goes_away_and_starts_again_goes_on_until_the_run_is_finished(out, stand_in, studio, tmp_path):
    own = studio.read_text()
    env = {**stand_in({"wait": True}, FINISHED), "HOME": str(tmp_path)}
    with started(SCRIPTS / "lightning.sh", "--output-dir", out, env=env) as process:
        read_until(process, "waiting")
    assert studio.read_text().startswith(own) and str(SCRIPTS / "lightning.sh") in studio.read_text()
    subprocess.run(["bash", studio], env=env, check=True, cwd=tmp_path)  # the Studio starts
    for _ in range(600):
        if studio.read_text() == own:
            break
        time.sleep(0.1)
    assert studio.read_text() == own and len(starts(out)) == 2
    assert starts(out)[1]["args"] == starts(out)[0]["args"]


def test_a_mistake_leaves_a_studio_as_it_was_and_without_a_studio_it_is_said(out, stand_in, studio, tmp_path):
    own, env = studio.read_text(), {**stand_in({"reason": "user_error", "status": 1}), "HOME": str(tmp_path)}
    run_script(SCRIPTS / "lightning.sh", "--output-dir", out, env=env, status=1)
    assert studio.read_text() == own
    output = run_script(SCRIPTS / "lightning.sh", env={**env, "HOME": str(out)}, status=1)
    assert "this is no Studio of Lightning AI" in output


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_shows_a_run_to_this_machine_only(tiny, tmp_path):
    out = tmp_path / "my run"
    call_trainer(*data_args(tiny), *SETTINGS, "--max-steps", 2, "--output-dir", out)
    with started(SCRIPTS / "tensorboard.sh", out, "--port", 0, cwd=tmp_path) as process:
        printed = read_until(process, "http://")
        url = re.search(r"http://127\.0\.0\.1:\d+/", printed)
        assert url, printed
        deadline = time.monotonic() + 60
        while not (runs := json.load(urllib.request.urlopen(f"{url[0]}data/runs"))) and time.monotonic() < deadline:
            time.sleep(0.2)
    assert runs == [path.name for path in (out / "logs").iterdir()]


def test_tensorboard_of_a_directory_that_is_not_there_is_an_error(tmp_path):
    output = run_script(SCRIPTS / "tensorboard.sh", tmp_path / "nowhere", status=1)
    assert output.startswith(f"[Error] {tmp_path / 'nowhere'}: no such directory")
