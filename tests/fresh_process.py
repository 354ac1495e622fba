"""Real processes of the trainer without the seconds in which PyTorch is imported.

A server process imports the trainer once and forks: each child has its own environment, limits, descriptors and
working directory, can be spoiled by a few lines of Python before main() runs, and may die of a signal.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from conftest import ROOT, load_checkpoint

# For tests/old_checkpoints/data: 13 rows, an epoch of 4 steps.
SETTINGS = ["--batch-size", "4", "--grad-accumulation", "1", "--log-interval", "1", "--save-interval", "2",
            "--val-interval", "100", "--epochs", "4"]
QUICK = [*SETTINGS, "--max-steps", "3"]
# What to run before main(), behind a definition of act(): it calls that when the line of step 2 is printed.
AT_STEP_2 = """
import sys
write = sys.stdout.write
def write_and_act(text):
    if text.lstrip("\\r ").startswith("[Train]") and " step=2 " in text:
        act()
    return write(text)
sys.stdout.write = write_and_act
"""
Outcome = tuple[int | str, str]  # exit status, and all that was printed

SERVER = f"""
import json, os, resource, signal, sys, time, traceback
sys.path.insert(0, {str(ROOT)!r})
from trainers import train_gpt_v2 as trainer
import torch._dynamo, torch.utils.tensorboard  # which the optimizer and the metrics import later
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_DFL)

def child(job):
    os.setsid()
    os.chdir(job["cwd"])
    for name, value in job["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
    try:
        exec(job["before"], {{"trainer": trainer}})
        status = trainer.main(job["args"])
    except SystemExit as left:
        status = left.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status)

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        child(job)
    deadline, status = time.monotonic() + job["seconds"], None
    while status is None:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(found)
        elif time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = "hangs"
        else:
            time.sleep(0.01)
    os.write(3, (json.dumps(status) + "\\n").encode())
"""


@functools.cache
def server() -> tuple[subprocess.Popen[str], int]:
    """The server, and the descriptor on which it tells exit statuses."""
    reading, writing = os.pipe()
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}

    def move_pipe() -> None:
        os.dup2(writing, 3)

    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, text=True, env=environ,
                               pass_fds=(3, writing), preexec_fn=move_pipe)
    os.close(writing)
    atexit.register(process.kill)
    return process, reading


def train_in_process(*args: object, cwd: Path = ROOT, before: str = "", env: Mapping[str, str | None] | None = None,
                     seconds: float = 60) -> Outcome:
    """Runs the trainer in a process of its own, on the CPU and one thread, standard input empty.

    `before` is Python that runs in it just before main(), with `trainer` the trainer's module; env's None unsets.
    Returns: the exit status (negative: a signal's number; "hangs" after `seconds`), and all that it printed.
    """
    process, reading = server()
    with tempfile.NamedTemporaryFile() as output:
        job = {"args": [str(arg) for arg in args], "cwd": str(cwd), "env": dict(env or {}), "before": before,
               "output": output.name, "seconds": seconds}
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = b""
        while not answer.endswith(b"\n"):
            part = os.read(reading, 100)
            assert part, "the server of trainer processes is gone"
            answer += part
        return json.loads(answer), Path(output.name).read_text(encoding="utf-8", errors="replace")


def data_args(data: Path | str) -> list[str]:
    return ["--train-manifest", f"{data}/train_pairs.jsonl", "--val-manifest", f"{data}/val_pairs.jsonl",
            "--tokenizer", f"{data}/tokenizer.model"]


def runs(outcome: Outcome) -> str:
    """What a run printed that must end well."""
    status, output = outcome
    assert status == 0 and "Traceback" not in output and "[Error]" not in output, f"exit {status}\n{output}"
    return output


def errs(outcome: Outcome, *words: str) -> str:
    """The one error of a run that must end in one; case does not count in the words."""
    status, output = outcome
    assert status == 1 and "Traceback" not in output, f"exit {status}\n{output}"
    before, found, message = output.partition("[Error] ")
    assert found and "[Error] " not in message, output
    without_test_names = re.sub(r"/[^\s:]*/pytest-\d+/[^/\s:]*", "", message).lower()
    for word in words:
        text = message.lower() if "/" in word else without_test_names
        assert word.lower() in text, f"{word!r} is not in: {message}"
    return message


def runs_or_errs(outcome: Outcome, *words: str) -> bool:
    """Whether the run ended well; in one clear error otherwise."""
    if outcome[0] == 0:
        runs(outcome)
        return True
    errs(outcome, *words)
    return False


def step_of(output_dir: Path) -> int:
    return load_checkpoint(output_dir / "latest.pth")["step"]
