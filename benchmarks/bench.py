"""What the trainer costs on a CPU, in one table: ratios first, medians of interleaved rounds with their quartiles.

    python -m benchmarks.bench                   all of it: under fifteen minutes on two cores that nothing else uses
    python -m benchmarks.bench --only step       one part: step, length, batch, save, resume, loader, manifests

What is compared takes turns, so that a noisy machine disturbs all of it alike: a step that settles the heap, then one
that counts. Data are random numbers in the sizes of IndexTTS2 (12,000 text tokens, 8,194 codes, about 400 rows a
sample), the model is 4 layers of 256. The usual way is that of IndexTTS2's forks: batches filled up, GPT-2 blocks
recomputed, float32 (their --amp is for CUDA), the C library's heap as it comes.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import gpu_lines, gpu_trainer, usual_way
from trainers import train_gpt_v2 as trainer

CODES_A_SECOND, CODES_A_TEXT_TOKEN = 25, 5
SECONDS, BATCH_SIZES = (2, 5, 10, 20, 30), (1, 4, 16, 64)
PARTS_OF_AN_EPOCH = (10, 50, 99)  # steps, of 100
SMALL = {"model_dim": 256, "layers": 4, "heads": 4}
STEP = dataclasses.replace(gpu_trainer.REAL, gpt={**gpu_trainer.REAL.gpt, **SMALL}, text=(20, 90), codes=(150, 480),
                           rows=256, prompts=64, batch_sizes=(8,), batch_flags=("--batch-size", "8",
                                                                                "--grad-accumulation", "1"))
SHORT = dataclasses.replace(STEP, text=(3, 12), codes=(6, 40), rows=2000, batch_flags=(
    "--batch-size", "20", "--grad-accumulation", "1"))
Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one step in each round: seconds on the clock, and of all cores."""

    wall: list[float]
    cpu: list[float]


def use_default_heap() -> None:
    """glibc's own thresholds again: large blocks are mapped anew, and page-faulted, every time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 128 * 1024)
        libc.mallopt(-1, 128 * 1024)


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, Times]:
    times = {name: Times([], []) for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            step()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
        print(f"[Progress] round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    return times


def spread(values: Iterable[float]) -> str:
    """Median [lower and upper quartile]."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} [{ordered[len(ordered) // 4]:.2f} {ordered[3 * len(ordered) // 4]:.2f}]"


def ratios(of: Sequence[float], to: Sequence[float], factor: float = 1.0) -> str:
    """How many times as fast, round by round."""
    return spread(factor * other / own for own, other in zip(of, to, strict=True))


def trainer_step(run: trainer.Run, samples: Sequence[Any], amp: str) -> Step:
    """A whole optimizer step of the trainer, without a [Train] line and without reading."""
    ready: Future[trainer.PackedBatch] = Future()
    ready.set_result(trainer.collate_packed(samples, run.model.config))

    def step() -> None:
        trainer.use_glibc_heap()
        gpu_lines.set_precision(run, amp)
        trainer.train_step(run, [ready])
        run.nonfinite_flags = []

    return step


def usual_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor],
               choose_heap: Callable[[], None]) -> Step:
    def step() -> None:
        choose_heap()
        model(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def rows_of(samples: Sequence[Any], config: trainer.ModelConfig) -> int:
    return sum(trainer.collate_packed(samples, config).lengths)


def measure_step(scratch: Path, rounds: int) -> list[str]:
    run = gpu_lines.Bench(STEP, scratch, scratch).run
    config, cpu = run.model.config, torch.device("cpu")
    samples: list[Any] = [run.train_data[i] for i in range(8)]
    blocks, name = usual_way.usual_blocks(config)
    usual = usual_way.PaddedGPT(config, blocks).train()
    adam = torch.optim.AdamW(usual.parameters(), lr=1e-5)
    padded = usual_way.padded_batch(samples, config)
    peaks: list[float] = []
    steps = {"usual": usual_step(usual, adam, padded, use_default_heap),
             "usual, equal heap": usual_step(usual, adam, padded, trainer.use_glibc_heap),
             "fp32": trainer_step(run, samples, "off"), "bf16": trainer_step(run, samples, "bf16"),
             "peak": lambda: peaks.append(trainer.peak_flops(trainer.Precision(cpu, None)))}
    times = take_turns(steps, rounds)
    flops = trainer.step_flops(config, [trainer.collate_packed(samples, config)])
    rows = rows_of(samples, config)
    lines = [f"8 samples, {rows} rows; the usual way: {name}"]
    for own in ("fp32", "bf16"):
        used = spread(flops / seconds / peak for seconds, peak in zip(times[own].wall, peaks[1::2], strict=True))
        lines.append(f"{own}: {ratios(times[own].wall, times['usual'].wall)} x the usual way, "
                     f"{ratios(times[own].wall, times['usual, equal heap'].wall)} x with an equal heap; "
                     f"in CPU time {ratios(times[own].cpu, times['usual'].cpu)}; {used} of the fp32 matrix peak")
    lines += [f"  {own}: {rows / statistics.median(times[own].wall):,.0f} real tokens/s, "
              f"{spread(times[own].wall)} s a step" for own in times if own != "peak"]
    return lines


def samples_of(seconds: float, count: int, config: trainer.ModelConfig) -> list[trainer.Sample]:
    rng, codes = np.random.default_rng(0), int(seconds * CODES_A_SECOND)
    return [trainer.Sample(rng.integers(2, config.number_text_tokens, codes // CODES_A_TEXT_TOKEN),
                           rng.integers(0, config.code_count, codes),
                           np.zeros(config.condition_shape, np.float32), np.zeros(config.model_dim, np.float32), row)
            for row in range(count)]


def measure_sizes(scratch: Path, rounds: int, chosen: dict[str, tuple[float, int]], to: str) -> list[str]:
    """Real tokens/s in fp32 of batches by name, (seconds of each sample, how many), against the one named `to`."""
    run = gpu_lines.Bench(STEP, scratch, scratch).run
    samples = {name: samples_of(*of, run.model.config) for name, of in chosen.items()}
    rows = {name: rows_of(of, run.model.config) for name, of in samples.items()}
    times = take_turns({name: trainer_step(run, of, "off") for name, of in samples.items()}, rounds)
    return [f"{name}: {ratios(times[name].wall, times[to].wall, rows[name] / rows[to])} x the tokens/s of {to}; "
            f"{rows[name] / statistics.median(times[name].wall):,.0f} tokens/s" for name in chosen]


def measure_lengths(scratch: Path, rounds: int) -> list[str]:
    """Batches of about 2,400 codes."""
    chosen = {f"{s} s": (float(s), max(1, round(2400 / s / CODES_A_SECOND))) for s in SECONDS}
    return measure_sizes(scratch, rounds, chosen, "10 s")


def measure_batches(scratch: Path, rounds: int) -> list[str]:
    return measure_sizes(scratch, rounds, {f"{n} of 5 s": (5.0, n) for n in BATCH_SIZES}, "16 of 5 s")


def measure_save(scratch: Path, rounds: int) -> list[str]:
    """One run, killed after its save and resumed."""
    figures, differing = gpu_lines.killed_and_resumed(gpu_lines.Bench(STEP, scratch, scratch), "bf16", 4, timed=True)
    return [gpu_lines.describe_save(figures), gpu_lines.describe_resume(figures, differing)]


def measure_resume(scratch: Path, rounds: int) -> list[str]:
    """From the command to the first step, at several places of an epoch of 100 steps."""
    bench = gpu_lines.Bench(SHORT, scratch, scratch)
    for step in PARTS_OF_AN_EPOCH:
        flags = gpu_lines.process_flags(bench, "run", "bf16", max_steps=step, resume="auto")
        status, _, output = bench.drive("until", 10**9, flags).reports()
        if status:
            raise RuntimeError(output[-2000:])
        shutil.copytree(scratch / "run", scratch / f"at{step}")
    seconds: dict[int, list[float]] = {step: [] for step in PARTS_OF_AN_EPOCH}
    for number in range(rounds):
        for step, found in seconds.items():
            flags = gpu_lines.process_flags(bench, f"at{step}", "bf16", resume="auto", max_steps=100 + number)
            resumed = bench.drive("until", step + 1, flags)
            found.append(resumed.report()["first_step_at"] - resumed.started)
        print(f"[Progress] round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    first = PARTS_OF_AN_EPOCH[0]
    return [f"at {step} % of an epoch: {ratios(found, seconds[first])} x as fast as at {first} %; {spread(found)} s "
            "from the command to the first step" for step, found in seconds.items()]


def measure_loader(scratch: Path, rounds: int) -> list[str]:
    return [gpu_lines.loader(gpu_lines.Bench(STEP, scratch, scratch)).text]


def measure_manifests(scratch: Path, rounds: int) -> list[str]:
    if not importlib.util.find_spec("benchmarks.scale"):
        return ["not built"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.scale", "--rows", "100000", "--scratch", str(scratch)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


PARTS = {"step": ("Training step against the usual way", measure_step), "length": ("Length of samples",
         measure_lengths), "batch": ("Batch size", measure_batches), "save": ("Save", measure_save),
         "resume": ("Resume", measure_resume), "loader": ("Reading", measure_loader),
         "manifests": ("Manifests", measure_manifests)}


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    bits = [name for name in ("avx512_bf16", "amx_bf16") if names and name in Path("/proc/cpuinfo").read_text()]
    return (f"{time.strftime('%Y-%m-%d %H:%M')}, {trainer.available_cores()} cores ({', '.join(names[:1] + bits)}), "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="first command:\n  python -m benchmarks.bench --only step")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeatable (all)")
    args = parser.parse_args(argv)
    table, began = [machine()], time.monotonic()
    for name in args.only or PARTS:
        title, measure = PARTS[name]
        print(f"[Progress] {title}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="bench_") as scratch:
            table += ["", f"{title} (load {os.getloadavg()[0]:.1f})", *(
                f"    {line}" for text in measure(Path(scratch), args.rounds) for line in text.splitlines())]
    print("\n".join([*table, "", f"{time.monotonic() - began:.0f} s, load at the end {os.getloadavg()[0]:.1f}"]))
    return 0


if __name__ == "__main__":
    trainer.leave(main())
