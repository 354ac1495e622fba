"""Several processes under torchrun: the same run as one process, the same bits after a stop or a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    TRAINER,
    data_args,
    error_of,
    load_checkpoint,
    metrics_of,
    read_jsonl,
    resumable_state,
    write_manifest,
)
from test_resume_exactly import run_stopping, samples_by_step
from test_signals import children_of, needs_proc

STOP_AT = ROOT / "tests" / "stop_at.py"


def torchrun(processes: int, program: Path, *args: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            *map(str, [program, *args])]


def run_torchrun(processes: int, program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun(processes, program, *args), cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_args(data: Path, out: Path, batch_size: int, accumulation: int, *more: object) -> list[object]:
    """41 samples in steps of 8: the last step of an epoch has one sample."""
    return [*data_args(data), "--output-dir", out, "--batch-size", batch_size, "--grad-accumulation", accumulation,
            "--epochs", 2, "--log-interval", 1, "--val-interval", 4, "--val-batch-size", 2, "--save-interval", 3, *more]


def samples_of_ranks(path: Path, processes: int) -> dict[int, list[int]]:
    """Every step's samples, rank after rank."""
    files = [path, *(Path(f"{path}.{rank}") for rank in range(1, processes))]
    parts = [samples_by_step(file) for file in files if file.exists()]
    return {step: [row for part in parts for row in part.get(step, [])] for step in parts[0]}


def last_exit(out: Path) -> dict:
    return json.loads((out / "last_exit.json").read_text())


def assert_same_run(out: Path, expected: Path) -> None:
    found, wanted = (resumable_state(load_checkpoint(folder / "latest.pth")) for folder in (out, expected))
    assert found == wanted
    assert metrics_of(out) == metrics_of(expected)


@pytest.fixture(scope="module")
def two_processes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two processes: out/ and samples."""
    folder = tmp_path_factory.mktemp("two")
    done = run_torchrun(2, STOP_AT, "none", 0, "", folder / "samples", *run_args(tiny, folder / "out", 2, 2))
    assert done.returncode == 0, done.stderr
    assert "2 processes = global batch 8" in done.stdout and done.stdout.count("[Train] epoch=0 step=1 ") == 1
    return folder


def test_a_stop_signal_to_one_of_two_processes_saves_and_the_resumed_run_is_bit_identical(
        two_processes: Path, tiny: Path, tmp_path: Path):
    args = run_args(tiny, tmp_path / "out", 2, 2)
    stopped = run_torchrun(2, STOP_AT, "mid_epoch", 5, "SIGTERM", tmp_path / "samples", *args)
    assert stopped.returncode != 0 and "[Info] SIGTERM: stopping at step 5" in stopped.stdout, stopped.stderr
    assert last_exit(tmp_path / "out") == {"reason": "stopped", "status": 143, "step": 5}
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["step"] == 5
    resumed = run_torchrun(2, STOP_AT, "none", 0, "", tmp_path / "samples", *args, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert last_exit(tmp_path / "out") == {"reason": "finished", "status": 0, "step": 12}
    assert_same_run(tmp_path / "out", two_processes / "out")
    assert samples_of_ranks(tmp_path / "samples", 2) == samples_of_ranks(two_processes / "samples", 2)


def trainer_processes(agent: subprocess.Popen) -> list[int]:
    return [pid for pid in children_of(agent.pid) if b"train_gpt_v2.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@needs_proc
def test_a_killed_rank_of_four_ends_the_run_and_the_same_command_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path):
    """The last step of an epoch has one sample for four ranks."""
    whole = run_torchrun(4, TRAINER, *run_args(tiny, tmp_path / "whole", 2, 1))
    assert whole.returncode == 0, whole.stderr
    args = run_args(tiny, tmp_path / "out", 2, 1, "--resume", "auto")
    with subprocess.Popen(torchrun(4, TRAINER, *args), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as agent:
        assert agent.stdout is not None
        printed = ""
        for line in agent.stdout:
            printed += line
            if " step=7 " in line:
                os.kill(trainer_processes(agent)[2], signal.SIGKILL)
        assert agent.wait(timeout=60) != 0
    assert "train_gpt_v2.py\", line" not in printed, printed  # no stack frames of ours
    assert last_exit(tmp_path / "out")["reason"] in ("crash", "stopped")
    resumed = run_torchrun(4, TRAINER, *args)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@needs_proc
def test_when_torchrun_itself_is_killed_its_ranks_save_and_leave(tiny: Path, tmp_path: Path):
    args = [*run_args(tiny, tmp_path, 2, 2), "--epochs", 1_000_000, "--save-interval", 1000]
    with subprocess.Popen(torchrun(2, TRAINER, *args), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as agent:
        assert agent.stdout is not None
        next(line for line in agent.stdout if " step=5 " in line)
        agent.kill()
        printed = agent.stdout.read()  # ends when the ranks have left
    stopped = last_exit(tmp_path)
    assert (stopped["reason"], stopped["status"]) == ("stopped", 143), printed
    assert load_checkpoint(tmp_path / "latest.pth")["step"] == stopped["step"] >= 5


@pytest.fixture(scope="module")
def one_by_eight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_by_eight")
    args = run_args(tiny, folder / "out", 1, 8, "--dropout", 0)
    assert run_stopping(folder / "samples", [str(arg) for arg in args]) == 0
    return folder


IN_A_FOLDER_OF_ITS_RANK = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.chdir(sys.argv.pop(1) + os.environ["RANK"])
from trainers import train_gpt_v2 as trainer
trainer.leave(trainer.main(sys.argv[1:]))
"""


def test_machines_that_do_not_share_the_output_directory_go_on_from_one_file_or_not_at_all(
        two_processes: Path, tiny: Path, tmp_path: Path):
    """The second one has an older file under the same name."""
    shutil.copytree(two_processes / "out", tmp_path / "machine0" / "out")
    (tmp_path / "machine1" / "out").mkdir(parents=True)
    older = sorted((two_processes / "out").glob("model_step*.pth"), key=lambda path: path.stat().st_mtime)[0]
    shutil.copy(older, tmp_path / "machine1" / "out" / "latest.pth")
    program = tmp_path / "program.py"
    program.write_text(IN_A_FOLDER_OF_ITS_RANK)
    args = run_args(tiny, Path("out"), 2, 2, "--epochs", 3, "--resume", "auto")
    done = run_torchrun(2, program, tmp_path / "machine", *args)
    assert done.returncode == 1 and "[Train]" not in done.stdout
    assert "on rank 1: out/latest.pth is another file there than on rank 0" in done.stderr


def test_a_run_moves_from_1x8_to_4x2_to_8x1_to_two_processes_with_the_same_samples_and_losses(
        one_by_eight: Path, tiny: Path, tmp_path: Path):
    samples, out = tmp_path / "samples", tmp_path / "out"
    for until, (batch_size, accumulation) in {3: (1, 8), 6: (4, 2), 9: (8, 1)}.items():
        args = run_args(tiny, out, batch_size, accumulation, "--dropout", 0, "--resume", "auto")
        assert run_stopping(samples, [str(arg) for arg in args], "after_save", until, "SIGTERM") == 143
        assert load_checkpoint(out / "latest.pth")["step"] == until
    done = run_torchrun(2, STOP_AT, "none", 0, "", samples,
                        *run_args(tiny, out, 4, 1, "--dropout", 0, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert "world_size: 1 -> 2" in done.stdout and "The global batch changes" not in done.stdout
    assert samples_of_ranks(samples, 2) == samples_by_step(one_by_eight / "samples")
    found, expected = metrics_of(out), metrics_of(one_by_eight / "out")
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in ("text_loss", "mel_loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line, other)


def test_a_run_of_two_processes_goes_on_in_one_with_the_same_global_batch(two_processes: Path, tiny: Path,
                                                                         tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(two_processes / "out", out)
    args = [str(arg) for arg in run_args(tiny, out, 2, 4, "--epochs", 3, "--resume", "auto")]
    assert run_stopping(tmp_path / "samples", args) == 0
    assert [len(rows) for rows in samples_by_step(tmp_path / "samples").values()] == [8, 8, 8, 8, 8, 1]


@pytest.fixture
def many_files(tiny_files: Path, tmp_path: Path) -> Path:
    """The tiny data three times over, so that one bad row is below the limit."""
    data = tmp_path / "data"
    shutil.copytree(tiny_files, data)
    rows = read_jsonl(data / "train_pairs.jsonl")
    write_manifest(data / "train_pairs.jsonl", [{**row, "id": f"{row['id']}_{i}"} for i in range(3) for row in rows])
    return data


BREAK_AND_TRAIN = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from trainers import train_gpt_v2 as trainer
prepare = trainer.prepare
def prepare_then_break(*args):
    run = prepare(*args)
    rows = run.train_data.rows
    broken = rows[90]
    broken.parts = tuple((path + ".gone" * (path.endswith("codes.npy")), start) for path, start in broken.parts)
    take = trainer.Rows.__getitem__
    trainer.Rows.__getitem__ = lambda of, i: broken if of is rows and i == 90 else take(of, i)
    return run
trainer.prepare = prepare_then_break
trainer.leave(trainer.main(sys.argv[1:]))
"""


def test_a_damaged_file_that_one_rank_meets_is_named_once_and_all_go_on(many_files: Path, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(BREAK_AND_TRAIN)
    done = run_torchrun(2, program, *data_args(many_files), "--output-dir", tmp_path / "out", "--epochs", 1,
                        "--batch-size", 1, "--grad-accumulation", 1, "--log-interval", 1, "--val-interval", 100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train_pairs.jsonl:91: skipped, feature file") == 1
    losses = [line["mel_loss"] for line in metrics_of(tmp_path / "out") if line["kind"] == "train"]
    assert len(losses) == 62 and np.isfinite(losses).all()


LEAVE = f"""
import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
from trainers import train_gpt_v2 as trainer
atexit.register(print, "clean-up")
sys.stdout.write("last words")
trainer.leave(3)
"""


def test_the_trainer_ends_without_the_clean_up_in_which_gloos_threads_may_abort(tmp_path: Path):
    """The abort itself comes once in hundreds of runs, on a busy machine."""
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "last words", "")


OUT_OF_MEMORY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from trainers import train_gpt_v2 as trainer
calls = []
def run_out(event, *_):
    calls.append(event)
    if os.environ["RANK"] == "1" and calls.count("micro_step") == 5:
        raise torch.OutOfMemoryError("CUDA out of memory")
trainer.leave(trainer.main(sys.argv[1:], run_out))
"""


def test_out_of_memory_on_a_rank_is_an_error_with_the_remedy(tiny: Path, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(OUT_OF_MEMORY)
    started = time.monotonic()
    done = run_torchrun(2, program, *run_args(tiny, tmp_path / "out", 2, 2))
    assert done.returncode != 0 and time.monotonic() - started < 120
    assert "[Error] out of GPU memory on rank 1. Start again with a smaller --batch-size" in done.stderr
    assert last_exit(tmp_path / "out")["reason"] == "user_error"


def test_a_mistake_is_said_once_however_many_processes_make_it(tiny: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    (data / "val_pairs.jsonl").write_text("{}\n")
    done = run_torchrun(2, TRAINER, *run_args(data, tmp_path / "out", 2, 2))
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("val_pairs.jsonl:1: missing") == 1
    assert last_exit(tmp_path / "out")["reason"] == "user_error"


def test_evaluation_asks_for_one_process(two_processes: Path, tiny: Path):
    as_torchrun = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    message = error_of(*data_args(tiny), "--output-dir", two_processes / "out", "--resume", "auto", "--eval-only",
                       env=as_torchrun)
    assert "--eval-only runs in one process" in message
