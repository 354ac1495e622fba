"""What the trainer does on this machine's GPU: one table that says whether every CUDA path runs, whether a killed run
resumes to the same bits, and how fast training, saving, resuming and reading are.

    make gpu PYTHON=python3                      all of it, under eight minutes on one A100 or H100
    python -m benchmarks.gpu --tiny              the program itself, on a CPU, in a minute or two
    python -m benchmarks.gpu --lines eager,resume_bf16

It needs no network, no virtual environment and no data: only torch (2.11 or later), numpy, PyYAML, sentencepiece and
tensorboard, which the trainer needs too; transformers, if it is there, for the comparison with the usual way. Writes
TABLE.txt, table.json, kernels.txt and trace.json.gz (two steps, for Perfetto) to --output; TABLE.txt and table.json
grow line by line, so that a run that is cut off leaves what it has measured.

A line that could not be measured says why. Exit status: 0 unless a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {"torch": "torch", "numpy": "numpy", "yaml": "PyYAML", "sentencepiece": "sentencepiece",
          "tensorboard": "tensorboard"}


@dataclass(frozen=True)
class Line:
    """A line of the table. Lines of one group share a process, and with it the model."""

    title: str
    group: str
    seconds: float  # after which it is given up


# In the order in which they are measured: what matters most comes before time may run out.
LINES = {
    "machine": Line("Machine", "model", 90),  # and the first import of torch
    "matrix": Line("Matrix products", "model", 30),
    "attention": Line("Varlen attention", "model", 90),
    "precisions": Line("bf16, fp16, fp32", "model", 60),
    "same_bits": Line("Same bits twice", "model", 60),
    "deterministic_cost": Line("Deterministic algorithms cost", "model", 60),
    "eager": Line("Speed, eager", "model", 90),
    "loader": Line("Reading", "model", 20),
    "profile": Line("Profile", "model", 60),
    "checkpointing": Line("Gradient checkpointing", "model", 40),
    "memory_plan": Line("Peak memory against the plan", "model", 40),
    "synchronisations": Line("Host waits for the GPU", "model", 20),
    "usual_way": Line("The usual way", "model", 90),
    "resume_bf16": Line("Killed and resumed, bf16; saves", "processes", 200),
    "out_of_memory": Line("Out of memory", "processes", 90),
    "several_processes": Line("Several processes, NCCL", "processes", 90),
    "resume_fp16": Line("Killed and resumed, fp16", "processes", 200),
    "compiled": Line("Speed, compiled", "compiled", 400),  # it reports as it goes, and takes what time is left
}
NOT_BUILT = {"features": "Features per hour of speech"}


@dataclass
class Result:
    """What came of a line. passed: of a check, else None."""

    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None
    seconds: float = 0.0


def not_measured(reason: str, so_far: Result | None = None, passed: bool | None = None) -> Result:
    if so_far is None or not so_far.text:
        return Result(f"could not be measured: {reason}", passed=passed)
    return Result(f"{so_far.text}\nthe rest could not be measured: {reason}", so_far.figures, passed)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def best_mfu(results: dict[str, Result]) -> float | None:
    batches = [of for name in ("eager", "compiled") if name in results
               for of in results[name].figures.get("batch", {}).values() if of]
    return max((of["mfu"] for of in batches), default=None)


def aims(results: dict[str, Result]) -> dict[str, str]:
    """Each aim: reached, not reached, or not measured."""
    def verdict(reached: bool | None, figure: str) -> str:
        return "not measured" if reached is None else f"{'reached' if reached else 'NOT reached'} ({figure})"

    empty = not_measured("")
    mfu = best_mfu(results)
    cost = results.get("resume_bf16", empty).figures.get("cost_of_run")
    resumes = {name: results[name].figures["differs"] for name in ("resume_bf16", "resume_fp16")
               if "differs" in results.get(name, empty).figures}
    equal = all(not differing for differing in resumes.values()) if resumes else None
    return {"MFU >= 0.5 on real tokens, 16 bit": verdict(mfu is not None and mfu >= 0.5 if mfu is not None else None,
                                                         f"{mfu or 0:.3f}"),
            "saves cost <= 1 % of the run": verdict(cost <= 0.01 if cost is not None else None, f"{cost or 0:.2%}"),
            "bit-identical resume": verdict(equal, ", ".join(resumes))}


def speed_ratios(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Real tokens a second of ours over the usual way's, by batch size."""
    usual = results["usual_way"].figures.get("batch", {}) if "usual_way" in results else {}
    return {name: {size: of["tokens_per_second"] / usual[size]["tokens_per_second"]
                   for size, of in results[name].figures.get("batch", {}).items() if of and usual.get(size)}
            for name in ("eager", "compiled") if name in results}


def table_text(results: dict[str, Result], heading: str) -> str:
    verdicts = {True: "ok", False: "FAILED", None: ""}
    lines = [heading, ""]
    for name, result in results.items():
        title = LINES[name].title if name in LINES else NOT_BUILT[name]
        first, *others = result.text.splitlines() or [""]
        lines.append(f"{title:32} {verdicts[result.passed]:6} {first}  [{result.seconds:.0f} s]")
        lines += [f"{'':39} {other}" for other in others]
    for name, ratios in speed_ratios(results).items():
        if ratios:
            shown = ", ".join(f"batch {size}: {ratio:.2f}" for size, ratio in ratios.items())
            lines.append(f"{'Against the usual way, ' + name:32} {'':6} times its real tokens/s: {shown}")
    lines += ["", *(f"Aim: {aim}: {verdict}" for aim, verdict in aims(results).items())]
    return "\n".join(lines) + "\n"


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_table(output: Path, results: dict[str, Result], heading: str) -> None:
    write_whole(output / "TABLE.txt", table_text(results, heading))
    content = {"heading": heading, "lines": {name: asdict(result) for name, result in results.items()},
               "against_the_usual_way": speed_ratios(results), "aims": aims(results)}
    write_whole(output / "table.json", json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def worker_command(names: Sequence[str], arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_lines", ",".join(names), *arguments]


class Worker:
    """A process that measures lines; what it prints is passed on, and its @start and @line messages are taken out."""

    def __init__(self, names: Sequence[str], arguments: Sequence[str]):
        # A session of its own, so that the trainers that it starts can be ended with it.
        self.process = subprocess.Popen(worker_command(names, arguments), cwd=ROOT,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        errors="replace", start_new_session=True, bufsize=1)
        self.messages: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.put(line.rstrip())
        self.messages.put(None)

    def next_message(self, deadline: float, what: str) -> str | None:
        """The next @ message; None when the process has ended. Raises: TimeoutError past the deadline."""
        started, told = time.monotonic(), time.monotonic()
        while time.monotonic() < deadline:
            try:
                line = self.messages.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    print(f"[Progress] {what}: {told - started:.0f} s", flush=True)
                continue
            if line is None or line.startswith(("@start ", "@so_far ", "@line ")):
                return line
            if line.strip():
                print(f"    {line}", flush=True)
        raise TimeoutError

    def end(self) -> int:
        """Ends it with all that it has started. Returns its exit status, negative for a signal."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.process.wait()


def measure_group(names: Sequence[str], arguments: Sequence[str], deadline: float, on_result: Any,
                  patience: float = 1.0) -> None:
    """Measures lines in workers; a line that ends its process, or hangs, costs no other line.

    patience: by which each line's limit is multiplied.
    """
    waiting = list(names)
    while waiting:
        if time.monotonic() >= deadline:
            for name in waiting:
                on_result(name, not_measured("no time left; --minutes gives more, --lines chooses"))
            return
        started, measured, so_far = time.monotonic(), 0, Result("")
        worker = Worker(waiting, [*arguments, f"{deadline - started:.0f}"])
        try:
            while waiting:
                name = waiting[0]
                allowed = patience * LINES[name].seconds
                limit = min(deadline, started + allowed)
                message = worker.next_message(limit, LINES[name].title)
                if message is None:
                    break
                if message.startswith("@start "):
                    started, so_far = time.monotonic(), Result("")
                    continue
                if message.startswith("@so_far "):
                    so_far = Result(**json.loads(message.removeprefix("@so_far ")))
                    continue
                found = json.loads(message.removeprefix("@line "))
                on_result(found.pop("name"), Result(**found))
                del waiting[0]
                started, measured = time.monotonic(), measured + 1
            else:
                return
            # It leaves with 0 after a fault of the device that it has reported.
            if (status := worker.process.wait()) or not measured:
                on_result(waiting.pop(0), not_measured(f"its process ended with status {status}", so_far, passed=False))
        except TimeoutError:
            over = "no time left" if time.monotonic() >= deadline else f"not done in {allowed:.0f} s"
            on_result(waiting.pop(0), not_measured(over, so_far))
        finally:
            worker.end()


# ---------------------------------------------------------------------------------------------------------------------
# The program


def missing_packages() -> list[str]:
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def choose_scratch(output: Path, typed: str) -> Path:
    """Where checkpoints of up to 8 GB go: what was typed, else the roomier of the temporary and the output folder."""
    if typed:
        Path(typed).mkdir(parents=True, exist_ok=True)
        return Path(typed)
    return max((Path(tempfile.gettempdir()), output), key=lambda folder: shutil.disk_usage(folder).free)


def chosen_lines(typed: str, parser: argparse.ArgumentParser) -> list[str]:
    names = typed.split(",") if typed else list(LINES)
    unknown = [name for name in names if name not in LINES]
    if unknown:
        parser.error(f"--lines {', '.join(unknown)}: there are {', '.join(LINES)}")
    return [name for name in LINES if name in names]


def gpu_problem() -> str | None:
    """Asks torch in a process of its own: this one stays without a context on the GPU."""
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__, torch.cuda.is_available())"],
                          capture_output=True, text=True)
    if done.returncode:
        return "torch cannot be imported: " + (done.stderr.strip().splitlines() or ["?"])[-1]
    version, available = done.stdout.split()[-2:]
    return None if available == "True" else (
        f"torch {version} sees no CUDA device. `python -m benchmarks.gpu --tiny` tries the program on a CPU")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="first command:\n  python -m benchmarks.gpu --tiny")
    parser.add_argument("--output", default="build/gpu", metavar="DIR", help="where the table goes (build/gpu)")
    parser.add_argument("--scratch", default="", metavar="DIR", help="for checkpoints while it runs, up to 15 GB "
                        "(the roomier of the system's temporary folder and --output)")
    parser.add_argument("--lines", default="", metavar="A,B", help="only these lines: " + ", ".join(LINES))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all lines together (8)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny data; runs without a GPU")
    args = parser.parse_args(argv)
    names, missing = chosen_lines(args.lines, parser), missing_packages()
    problem = f"missing here: {', '.join(missing)}" if missing else None if args.tiny else gpu_problem()
    if problem:
        print(f"[Error] {sys.executable}: {problem}", file=sys.stderr)
        return 1
    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    scratch_in = choose_scratch(output, args.scratch)
    heading = f"benchmarks.gpu{' --tiny' if args.tiny else ''}, {time.strftime('%Y-%m-%d %H:%M')}"
    results: dict[str, Result] = {}

    def on_result(name: str, result: Result) -> None:
        results[name] = result
        ordered = {key: results[key] for key in LINES if key in results}
        write_table(output, ordered, heading)
        print(f"[{time.monotonic() - began:4.0f} s] {LINES[name].title}: {result.text}", flush=True)

    began = time.monotonic()
    for signum in (signal.SIGTERM, signal.SIGINT):  # so that workers and scratch files go
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_", dir=scratch_in) as scratch:
        arguments = ["tiny" if args.tiny else "real", scratch, str(output)]
        for group in dict.fromkeys(LINES[name].group for name in names):
            measure_group([name for name in names if LINES[name].group == group], arguments,
                          began + 60 * args.minutes, on_result, patience=3.0 if args.tiny else 1.0)
    results = {key: results[key] for key in LINES if key in results}
    results.update({name: Result("not built") for name in NOT_BUILT})
    heading += f", {time.monotonic() - began:.0f} s"
    write_table(output, results, heading)
    print(f"\n{(output / 'TABLE.txt').read_text(encoding='utf-8')}\n{output}", flush=True)
    return 1 if any(result.passed is False for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
