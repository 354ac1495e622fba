"""The lines of benchmarks.gpu's table, each measured by a function of its own; runs as a worker of that program.

A worker measures lines in their order and prints each as "@line " and a JSON object. An exception becomes the line's
text. After a fault of the device nothing else can be measured in the same process: the worker leaves, and a new one
goes on with the next line.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_trainer
from benchmarks import usual_way as usual
from benchmarks.gpu_trainer import Sizes
from trainers import train_gpt_v2 as trainer

GIB = 2**30
SAVE_STEP = 8  # of the runs that are killed
# The trainer takes the first, and the second where a kernel has no deterministic form.
DETERMINISM = {"as the trainer sets it": (True, False), "warning only": (True, True), "off": (False, False)}


class CannotMeasure(Exception):
    """A capability that is missing; the message says which."""


@dataclass
class Outcome:
    """What a line says. passed: of a line that is a check, else None."""

    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None


@dataclass
class Bench:
    """What the lines of one worker share; the run is prepared when the first line needs it."""

    sizes: Sizes
    scratch: Path
    output: Path
    seconds_left: float = math.inf  # of the whole program, when the worker started
    started: float = field(default_factory=time.monotonic)
    samples_per_second: float = 0.0  # that the fastest step eats
    so_far: Outcome | None = None  # of the line that is measured now
    started_trainers: list[gpu_trainer.Driven] = field(default_factory=list)  # by that line

    @functools.cached_property
    def data(self) -> Path:
        folder = self.scratch / "data"
        if not folder.exists():
            gpu_trainer.make_data(folder, self.sizes)
        return folder

    @functools.cached_property
    def run(self) -> trainer.Run:
        return self.make_run()

    def make_run(self, **typed: Any) -> trainer.Run:
        """A run as the trainer prepares it, on the fastest 16-bit type that the device has."""
        stop = trainer.StopSignal()
        process = trainer.Process(stop, trainer.Console(stop, sys.stdout))
        flags = gpu_trainer.settings(self.data, self.scratch / "unused", "auto")
        return trainer.prepare({**flags, "batch_size": self.sizes.batch_sizes[0], "grad_accumulation": 1,
                                "log_interval": 100, **typed}, None, self.scratch / "unused", process)

    def tell(self, outcome: Outcome) -> None:
        """What a line has found before its end; it stands in the table if the rest fails or takes too long."""
        self.so_far = outcome
        print("\n@so_far " + json.dumps(dataclasses.asdict(outcome)), flush=True)

    def drive(self, mode: str, at: int, flags: Sequence[str], launcher: Sequence[str] = (),
              environment: Mapping[str, str] | None = None) -> gpu_trainer.Driven:
        """Starts a trainer, which ends with the line at the latest."""
        self.started_trainers.append(gpu_trainer.drive(mode, at, flags, launcher, environment))
        return self.started_trainers[-1]

    @contextmanager
    def folders(self, *names: str) -> Iterator[None]:
        """Output directories of trainers: none is there before or afterwards, for they are large."""
        def remove() -> None:
            for driven in self.started_trainers:
                driven.end()
            for name in names:
                shutil.rmtree(self.scratch / name, ignore_errors=True)

        remove()
        try:
            yield
        finally:
            remove()

    def drop_run(self) -> None:
        """Frees the memory of the run; the next line that needs one prepares another."""
        if "run" in self.__dict__:
            self.__dict__.pop("run").restart_reading()
        free_memory()

    def time_left(self) -> float:
        return self.seconds_left - (time.monotonic() - self.started)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def needs_gpu(what: str) -> None:
    if not torch.cuda.is_available():
        raise CannotMeasure(f"no CUDA device ({what})")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def dtype_name(dtype: torch.dtype | None) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Timing a step: the one place


@dataclass
class Timing:
    """Means of one step."""

    seconds: float
    tokens: float  # real rows
    flops: float
    peak_bytes: int

    def figures(self, peak_flops: float) -> dict[str, float]:
        return {"step_seconds": self.seconds, "tokens_per_second": self.tokens / self.seconds,
                "mfu": self.flops / self.seconds / peak_flops, "peak_gib": self.peak_bytes / GIB}


def time_steps(step: Callable[[], tuple[float, float]], device: torch.device, steps: int, warm_up: int = 3) -> Timing:
    """Times steps as training takes them: the device is waited for at both ends only. step() gives tokens and FLOP."""
    for _ in range(warm_up):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    started = time.perf_counter()
    done = [step() for _ in range(steps)]
    wait(device)
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Timing(seconds, sum(tokens for tokens, _ in done) / steps, sum(flops for _, flops in done) / steps, peak)


def trainer_step(run: trainer.Run) -> tuple[float, float]:
    """One optimizer step as train() takes it, read ahead by threads."""
    if run.reader is None:
        steps = trainer.steps_from(run.state.position, run.train_data.mix, run.config)
        run.reader = trainer.read_ahead(run, run.train_data, steps)
    stats = trainer.train_step(run, next(run.reader))
    run.state.position = run.state.position.after_step(len(run.train_data), run.config.global_batch)
    run.nonfinite_flags = []
    return stats.tokens, stats.flops


def set_batch_size(run: trainer.Run, batch_size: int) -> None:
    run.config = dataclasses.replace(run.config, batch_size=batch_size, grad_accumulation=1)
    run.restart_reading()


def set_precision(run: trainer.Run, amp: str) -> str:
    """Returns the attention path that the trainer takes for it."""
    device = run.precision.device
    run.precision = trainer.choose_precision(amp, device)
    run.scaler = torch.amp.GradScaler(device.type, enabled=run.precision.dtype == torch.float16)
    run.model.attention = trainer.padded_attention
    return trainer.choose_attention(run.model, run.precision)


def steps_or_none(run: trainer.Run, batch_size: int, steps: int, warm_up: int = 3) -> Timing | None:
    """None where the batch does not fit into the GPU's memory."""
    set_batch_size(run, batch_size)
    try:
        return time_steps(lambda: trainer_step(run), run.precision.device, steps, warm_up)
    except torch.OutOfMemoryError:
        pass
    run.optimizer.zero_grad(set_to_none=True)
    run.restart_reading()
    free_memory()
    return None


def sample_batch(run: trainer.Run, count: int) -> trainer.PackedBatch:
    samples = [run.train_data[i] for i in range(count)]
    return trainer.collate_packed(samples, run.model.config).to(run.precision.device)


def gradients(run: trainer.Run, batch: trainer.PackedBatch) -> list[Tensor]:
    """Of one micro-batch, dropout masks always the same."""
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    trainer.backward(run, batch, sum(batch.text_counts), sum(batch.mel_counts), is_last=True)
    found = [p.grad for p in run.model.parameters() if p.grad is not None]
    run.optimizer.zero_grad(set_to_none=True)
    return found


@contextmanager
def determinism(name: str) -> Iterator[None]:
    """One of DETERMINISM; afterwards what was set before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    enabled, warn_only = DETERMINISM[name]
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def heard_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Every warning, also those that PyTorch gives once a process."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield heard
    finally:
        torch.set_warn_always(always)


# ---------------------------------------------------------------------------------------------------------------------
# What the machine is


def printed_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def file_system(path: Path) -> str:
    """Type of the file system that a path is on, where /proc tells."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    fitting = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(fitting)[1] if fitting else "unknown"


def machine(bench: Bench) -> Outcome:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    free = shutil.disk_usage(bench.scratch).free / 1e9
    figures: dict[str, Any] = {
        "python": platform.python_version(), "cores": trainer.available_cores(), "memory_gib": round(memory, 1),
        "disk": f"{bench.scratch} {file_system(bench.scratch)}", "disk_free_gb": round(free, 1),
        **{name: version_of(name) for name in ("torch", "triton", "numpy", "transformers", "tensorboard")}}
    texts = [f"Python {figures['python']}, torch {torch.__version__}, triton {figures['triton']}, numpy "
             f"{figures['numpy']}, transformers {figures['transformers']}",
             f"{figures['cores']} cores, {memory:.0f} GiB; {figures['disk']}, {free:.0f} GB free"]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        driver = printed_by("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm",
                            "--format=csv,noheader")
        figures.update(card=card.name, gpus=torch.cuda.device_count(), card_gib=round(card.total_memory / GIB, 1),
                       capability=f"{card.major}.{card.minor}", multiprocessors=card.multi_processor_count,
                       driver=driver.splitlines()[0] if driver else "unknown", cuda=torch.version.cuda,
                       cudnn=torch.backends.cudnn.version(),
                       nccl=".".join(map(str, torch.cuda.nccl.version())))
        texts.insert(0, f"{figures['gpus']} x {card.name}, {figures['card_gib']} GiB, compute capability "
                     f"{figures['capability']}, {card.multi_processor_count} multiprocessors; driver, power limit, "
                     f"clock: {figures['driver']}; CUDA {figures['cuda']}, cuDNN {figures['cudnn']}, NCCL "
                     f"{figures['nccl']}")
    return Outcome("\n".join(texts), figures)


def matrix_rate(side: int, dtype: torch.dtype, device: torch.device, repeats: int = 20) -> float:
    """FLOP a second of square matrix products of random numbers."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        left @ right
    wait(device)
    return 2 * side**3 * repeats / (time.perf_counter() - started)


def matrix(bench: Bench) -> Outcome:
    """The highest rates that anything here can reach, and whether TF32 is on."""
    device = trainer.setup_device()
    side, rates = bench.sizes.matrix, {}
    for dtype in (torch.bfloat16, torch.float16):
        rates[dtype_name(dtype)] = matrix_rate(side, dtype, device)
    as_set = torch.get_float32_matmul_precision()
    rates["fp32 as the trainer sets it"] = matrix_rate(side // 2, torch.float32, device)
    torch.set_float32_matmul_precision("highest")
    rates["fp32 without TF32"] = matrix_rate(side // 2, torch.float32, device)
    torch.set_float32_matmul_precision(as_set)
    texts = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in rates.items())
    gain = rates["fp32 as the trainer sets it"] / rates["fp32 without TF32"]
    faster = gain > 1.5 if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else None
    peak = trainer.peak_flops(trainer.choose_precision("auto", device))
    return Outcome(f"TFLOP/s: {texts} (TF32 {'on' if gain > 1.5 else 'off'}); MFU counts with {peak / 1e12:.4g}",
                   {"tflops": {name: rate / 1e12 for name, rate in rates.items()}, "peak_tflops": peak / 1e12}, faster)


# ---------------------------------------------------------------------------------------------------------------------
# Whether every path runs


def attended(attention: trainer.Attention, qkv: Tensor, batch: trainer.PackedBatch, weights: Tensor
             ) -> tuple[Tensor, Tensor]:
    """Output and gradient of one attention, float32."""
    leaf = qkv.detach().clone().requires_grad_()
    out = attention(leaf, batch)
    out.backward(weights.to(out.dtype))
    assert leaf.grad is not None
    return out.detach().float(), leaf.grad.float()


def attention_step(*arguments: Any) -> tuple[float, float]:
    attended(*arguments)
    return 0.0, 0.0


def relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def attention(bench: Bench) -> Outcome:
    """The varlen path against the portable one, both against float32, at the lengths and heads of training."""
    run = bench.run
    device, config = run.precision.device, run.model.config
    batch = sample_batch(run, bench.sizes.batch_sizes[-1])
    generator = torch.Generator(device).manual_seed(0)
    exact = torch.randn(sum(batch.lengths), 3, config.heads, config.model_dim // config.heads, device=device,
                        generator=generator)
    weights = torch.randn(len(exact), config.model_dim, device=device, generator=generator)
    reference = attended(trainer.padded_attention, exact, batch, weights)
    errors: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    results = {}
    half = exact.to(run.precision.dtype or torch.bfloat16)
    for name, path in (("portable", trainer.padded_attention), ("varlen", trainer.varlen_attention)):
        try:
            results[name] = attended(path, half, batch, weights)
            errors[name] = [relative_error(*pair) for pair in zip(results[name], reference, strict=True)]
            seconds[name] = time_steps(functools.partial(attention_step, path, half, batch, weights), device, 5).seconds
        except (RuntimeError, TypeError, ImportError) as error:
            errors[name] = trainer.first_line(error)
    figures = {"errors": errors, "seconds": seconds, "rows": len(exact), "chosen": trainer.choose_attention(
        run.model, run.precision)}
    if "varlen" not in results:
        return Outcome(f"the trainer takes: {figures['chosen']}; varlen could not be measured: {errors['varlen']}"
                       f"{varlen_signature()}; the portable path runs", figures,
                       False if varlen_expected(run) else None)
    worst = [float((a - b).abs().max()) for a, b in zip(results["varlen"], results["portable"], strict=True)]
    figures["worst_difference"] = worst
    good = all(error < 0.02 for error in errors["varlen"]) and run.model.attention is trainer.varlen_attention
    texts = [f"{name} {errors[name][0]:.1e} forward, {errors[name][1]:.1e} backward, {1e3 * seconds[name]:.2f} ms"
             for name in results]
    return Outcome(f"{len(exact)} rows: relative errors against float32, and both ways of one layer: "
                   f"{'; '.join(texts)}; worst difference of the two {worst[0]:.1e}, {worst[1]:.1e}; the trainer "
                   f"takes: {figures['chosen']}", figures, good)


def varlen_expected(run: trainer.Run) -> bool:
    return run.precision.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def varlen_signature() -> str:
    """What this PyTorch's varlen_attn takes, where calling it has failed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
        return f" (its parameters: {', '.join(inspect.signature(varlen_attn).parameters)})"
    except (ImportError, ValueError, TypeError):
        return ""


def precisions(bench: Bench) -> Outcome:
    """Steps in bf16, fp16 with a scaler, and fp32; losses of the same weights agree."""
    run, steps, batch_size = bench.run, bench.sizes.steps, bench.sizes.batch_sizes[0]
    figures: dict[str, Any] = {}
    batch = sample_batch(run, batch_size)
    before = run.precision
    for amp in ("off", "bf16", "fp16"):
        path = set_precision(run, amp)
        run.model.eval()
        with torch.no_grad(), run.precision.autocast():
            _, mel, _ = trainer.token_losses(run.model, batch)
        figures[dtype_name(run.precision.dtype)] = {"loss": mel.double().mean().item(), "attention": path}
    for amp in ("off", "bf16", "fp16"):
        set_precision(run, amp)
        skipped = run.nonfinite[0].item()
        timing = steps_or_none(run, batch_size, steps)
        of = figures[dtype_name(run.precision.dtype)]
        of.update(step_seconds=timing.seconds if timing else None, skipped=run.nonfinite[0].item() - skipped)
        if run.scaler.is_enabled():
            of["scale"] = run.scaler.get_scale()
    set_precision(run, dtype_name(before.dtype) if before.dtype else "off")
    exact = figures["fp32"]["loss"]
    good = all(abs(of["loss"] - exact) < 0.01 * exact and of["skipped"] < steps + 3 and of["step_seconds"] is not None
               for of in figures.values())
    parts = [f"{name} {of['loss']:.4f}, " + ("out of memory" if of["step_seconds"] is None else
             f"{of['step_seconds']:.4f} s") + (f", scale {of['scale']:g}, {of['skipped']:g} of {steps + 3} skipped"
                                               if "scale" in of else "") for name, of in figures.items()]
    return Outcome(f"loss of equal weights, and step at batch {batch_size}: {'; '.join(parts)}", figures, good)


def same_bits(bench: Bench) -> Outcome:
    """Whether the gradients of a batch are the same bits every time, and which operations warn that they are not."""
    run = bench.run
    batch, texts = sample_batch(run, bench.sizes.batch_sizes[0]), []
    figures: dict[str, Any] = {}
    with heard_warnings() as heard:
        gradients(run, batch)
        run.model.train()
        set_batch_size(run, bench.sizes.batch_sizes[0])
        trainer_step(run)
    warned = sorted({trainer.first_line(Exception(str(w.message))) for w in heard if "determin" in str(w.message)})
    for name in DETERMINISM:
        with determinism(name):
            try:
                first = gradients(run, batch)
                differing = max(sum(not torch.equal(a, b) for a, b in zip(first, gradients(run, batch), strict=True))
                                for _ in range(3))
                figures[name] = differing
                texts.append(f"{name}: " + ("equal" if differing == 0 else f"{differing} of {len(first)} differ"))
            except RuntimeError as error:
                figures[name] = trainer.first_line(error)
                texts.append(f"{name}: {figures[name]}")
            first = []
    free_memory()
    figures["warnings"] = warned
    return Outcome("gradients of one batch, four times: " + "; ".join(texts)
                   + ("; warned of: " + " | ".join(warned) if warned else ""), figures,
                   figures["as the trainer sets it"] == 0)


def deterministic_cost(bench: Bench) -> Outcome:
    run, sizes = bench.run, bench.sizes
    seconds: dict[str, list[float]] = {name: [] for name in DETERMINISM}
    failed = {}
    for _ in range(3):
        for name in DETERMINISM:
            with determinism(name):
                try:
                    timing = steps_or_none(run, sizes.batch_sizes[0], max(2, sizes.steps // 2), warm_up=2)
                    seconds[name] += [timing.seconds] if timing else []
                except RuntimeError as error:
                    failed[name] = trainer.first_line(error)
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    if "off" not in medians:
        raise CannotMeasure("a step does not fit into memory")
    texts = [f"{name} {median:.4f} s ({median / medians['off'] - 1:+.1%})" for name, median in medians.items()]
    return Outcome(f"step at batch {sizes.batch_sizes[0]}: " + ", ".join(texts + [f"{name}: {why}" for name, why in
                                                                                  failed.items()]),
                   {"step_seconds": medians, "failed": failed})


def checkpointing(bench: Bench) -> Outcome:
    run, batch_size = bench.run, bench.sizes.batch_sizes[0]
    batch = sample_batch(run, batch_size)
    figures: dict[str, Any] = {}
    found: dict[str, list[Tensor]] = {}
    ways = {"without": False, "with": True}
    for name, run.model.grad_checkpointing in ways.items():  # before any step changes the weights
        found[name] = gradients(run, batch)
    error = max(relative_error(a, b) for a, b in zip(found["with"], found["without"], strict=True) if b.norm() > 0)
    equal = sum(torch.equal(a, b) for a, b in zip(found["with"], found["without"], strict=True))
    count, found = len(found["with"]), {}
    free_memory()
    for name, run.model.grad_checkpointing in ways.items():
        timing = steps_or_none(run, batch_size, bench.sizes.steps)
        figures[name] = timing.figures(1.0) if timing else None
    run.model.grad_checkpointing = False
    figures.update(worst_relative_difference=error, equal=equal)
    parts = [f"{name} " + (f"{of['step_seconds']:.4f} s, {of['peak_gib']:.1f} GiB" if of else "out of memory")
             for name, of in figures.items() if name in ("with", "without")]
    return Outcome(f"batch {batch_size}: {'; '.join(parts)}; {equal} of {count} gradients are the same "
                   f"bits, the others differ by at most {error:.1e}", figures, error < 0.02)


def synchronisations(bench: Bench) -> Outcome:
    """How often the host waits for the device within a step, and where."""
    needs_gpu("host-device synchronisation")
    run = bench.run
    set_batch_size(run, bench.sizes.batch_sizes[0])
    trainer_step(run)
    with heard_warnings() as heard:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in heard:
        if "called a synchronizing" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return Outcome(f"{sum(places.values())} in a step" + (": " + ", ".join(f"{place} ({count})" for place, count in
                                                          sorted(places.items(), key=lambda item: -item[1])[:8])
                                                          if places else ""), {"places": places})


def memory_plan(bench: Bench) -> Outcome:
    """One micro-batch of each size, weights' moments there, against what tools.plan_run says that it takes."""
    from tools.plan_run import MicroBatch, memory_of

    run, figures = bench.run, {}  # type: ignore[var-annotated]
    trainer_step(run)
    parameters = sum(weight.numel() for weight in run.model.parameters())
    for size in bench.sizes.batch_sizes:
        batch = sample_batch(run, size)
        planned = memory_of(run.model.config, parameters, MicroBatch(
            sum(batch.lengths), sum(batch.text_counts), sum(batch.mel_counts)),
            4 if run.precision.dtype is None else 2, run.config)
        free_memory()
        try:
            gradients(run, batch)
            peak = torch.cuda.max_memory_allocated() if run.precision.device.type == "cuda" else 0
        except torch.OutOfMemoryError:
            peak = 0
        figures[size] = {"planned_gib": (sum(planned.values()) - planned["CUDA"]) / GIB, "peak_gib": peak / GIB}
    text = "; ".join(f"batch {size}: planned {of['planned_gib']:.2f} GiB, " + (
        f"measured {of['peak_gib']:.2f}, {of['peak_gib'] / of['planned_gib']:.2f} of it" if of["peak_gib"] else
        "not measured") for size, of in figures.items())
    return Outcome(text, {"batch": figures})


# ---------------------------------------------------------------------------------------------------------------------
# How fast


Timings = dict[int, dict[str, float] | None]  # by batch size; None: out of memory


def describe(timings: Timings) -> str:
    return "; ".join(f"batch {size}: " + ("out of memory" if of is None else
                     f"{of['tokens_per_second']:,.0f} tokens/s, MFU {of['mfu']:.3f}, {of['step_seconds']:.4f} s, peak "
                     f"{of['peak_gib']:.1f} GiB") for size, of in timings.items())


def eager(bench: Bench) -> Outcome:
    run = bench.run
    timings: Timings = {}
    peak = trainer.peak_flops(run.precision)
    for size in bench.sizes.batch_sizes:
        timing = steps_or_none(run, size, bench.sizes.steps)
        timings[size] = timing.figures(peak) if timing else None
        if timing:
            bench.samples_per_second = max(bench.samples_per_second, size / timing.seconds)
    return Outcome(f"{dtype_name(run.precision.dtype)}: {describe(timings)}", {"batch": timings})


def require_compiler() -> None:
    needs_gpu("--compile")
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise CannotMeasure("torch.compile needs a C compiler, and there is none")


def compiled(bench: Bench) -> Outcome:
    require_compiler()
    run, timings = bench.make_run(compile=True), {}  # type: ignore[var-annotated]
    seconds: dict[int, float] = {}
    for size in reversed(bench.sizes.batch_sizes):  # the largest first: it is the one that matters, and time may end
        started = time.perf_counter()
        fits = steps_or_none(run, size, 1) is not None  # sizes on both sides of some bounds are compiled apart
        seconds[size] = time.perf_counter() - started
        timing = steps_or_none(run, size, bench.sizes.steps) if fits else None
        timings[size] = timing.figures(trainer.peak_flops(run.precision)) if timing else None
        bench.tell(compiled_outcome(run, timings, seconds))
    return compiled_outcome(run, timings, seconds)


def compiled_outcome(run: trainer.Run, timings: Timings, seconds: dict[int, float]) -> Outcome:
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values())
    first = ", ".join(f"{value:.1f} s at batch {size}" for size, value in seconds.items())
    return Outcome(f"{dtype_name(run.precision.dtype)}: {describe(timings)}; the first four steps {first}; {graphs} "
                   f"graphs compiled, {breaks} breaks",
                   {"batch": dict(timings), "first_steps_seconds": dict(seconds), "graphs": graphs, "breaks": breaks})


def loader(bench: Bench) -> Outcome:
    """Samples a second of the reading threads, against what the fastest step eats."""
    run, size = bench.run, bench.sizes.batch_sizes[-1]
    if not bench.samples_per_second:
        timing = steps_or_none(run, bench.sizes.batch_sizes[0], bench.sizes.steps)
        bench.samples_per_second = bench.sizes.batch_sizes[0] / timing.seconds if timing else 0.0
    set_batch_size(run, size)
    steps = trainer.steps_from(run.state.position, run.train_data.mix, run.config)
    reader = trainer.read_ahead(run, run.train_data, steps)
    for future in next(reader):  # the threads start
        future.result()
    started, read = time.perf_counter(), 0
    while time.perf_counter() - started < 2 and read < 20 * len(run.train_data):
        read += sum(len(future.result().rows) for future in next(reader))
    rate = read / (time.perf_counter() - started)
    reader.close()
    eats = bench.samples_per_second
    return Outcome(f"{rate:,.0f} samples/s with {run.threads} threads, {rate / eats if eats else math.nan:.1f} times "
                   f"what the fastest step eats ({eats:,.0f})",
                   {"samples_per_second": rate, "eaten_per_second": eats, "threads": run.threads}, rate > eats)


def profile(bench: Bench) -> Outcome:
    """Where the time of a step goes; trace.json.gz for Perfetto or chrome://tracing, and kernels.txt."""
    run = bench.run
    device = run.precision.device
    size = next((size for size in reversed(bench.sizes.batch_sizes) if steps_or_none(run, size, 1, 2)), None)
    if size is None:
        raise CannotMeasure("a step does not fit into memory")
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    started = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(2):
            trainer_step(run)
        wait(device)
        seconds = time.perf_counter() - started
    trace = bench.output / "trace.json.gz"
    found.export_chrome_trace(str(trace))
    costs = {}
    for event in found.key_averages():
        is_kernel = str(getattr(event, "device_type", "")).endswith("CUDA")
        is_span = getattr(event, "is_user_annotation", False) or event.key.startswith("Optimizer.step#")
        if is_kernel == (device.type == "cuda") and not is_span:  # a span's kernels are counted themselves
            own = getattr(event, "self_device_time_total", None) if is_kernel else event.self_cpu_time_total
            costs[event.key] = (float(own or 0), event.count)
    total = max(1e-9, sum(cost for cost, _ in costs.values()))
    ranked = sorted(costs.items(), key=lambda item: -item[1][0])
    lines = [f"{cost / total:6.1%} {cost / 2000:9.3f} ms/step {count // 2:6} calls/step  {name[:140]}"
             for name, (cost, count) in ranked[:60]]
    (bench.output / "kernels.txt").write_text("\n".join(lines) + "\n")
    busy = total / 1e6 / seconds
    top = "\n".join(f"{cost / total:6.1%} {name[:100]}" for name, (cost, _) in ranked[:12])
    return Outcome(f"batch {size}, {device.type} busy {busy:.0%} of two steps (slowed by the profiler), "
                   f"{trace.name} {trace.stat().st_size / 1e6:.1f} MB; by kernel:\n{top}",
                   {"busy": busy, "kernels": {name: cost / total for name, (cost, _) in ranked[:60]}})


def usual_way(bench: Bench) -> Outcome:
    """The step as IndexTTS2's forks take it: padded, GPT-2 blocks recomputed, AdamW, gradients clipped."""
    run = bench.run
    config, data, precision, peak = run.model.config, run.train_data, run.precision, trainer.peak_flops(run.precision)
    bench.drop_run()
    del run
    free_memory()
    blocks, name = usual.usual_blocks(config)
    model = usual.PaddedGPT(config, blocks).to(precision.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    order = trainer.epoch_sample_order(len(data), 1234, 0)
    timings: Timings = {}
    for size in bench.sizes.batch_sizes:
        batches = []
        for chosen in trainer.split_micro_batches(order, size)[: bench.sizes.steps]:
            samples: list[Any] = [data[i] for i in chosen]
            packed = trainer.collate_packed(samples, config)
            batches.append((usual.padded_batch(samples, config), sum(packed.lengths),
                            trainer.step_flops(config, [packed])))
        taken = iter(range(10**9))

        def step(batches: list[Any] = batches, taken: Iterator[int] = taken) -> tuple[float, float]:
            batch, tokens, flops = batches[next(taken) % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            with precision.autocast():
                loss = model({key: value.to(precision.device, non_blocking=True) for key, value in batch.items()})
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return tokens, flops

        try:
            with determinism("off"):  # as the forks have it
                timings[size] = time_steps(step, precision.device, bench.sizes.steps, 2).figures(peak)
        except torch.OutOfMemoryError:
            timings[size] = None
        free_memory()
    return Outcome(f"{dtype_name(precision.dtype)}, {name}, recomputed: {describe(timings)}",
                   {"batch": timings, "blocks": name})


def features(bench: Bench) -> Outcome:
    """tools.preprocess --features indextts2 on this device, with random weights of the released sizes."""
    if version_of("transformers") == "none":
        raise CannotMeasure("transformers is not installed")
    from benchmarks.features import seconds_of_parts
    from benchmarks.random_weights import make_parts
    from tools.indextts2_features import IndexTTS2Features

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with bench.folders("released"):
        made = IndexTTS2Features(make_parts(bench.scratch / "released", bench.sizes.released), device)
        figures = {seconds: dict(seconds_of_parts(made, seconds, rounds=8)) for seconds in (3.0, 6.0, 12.0)}
    texts = [f"recordings of {seconds:g} s {of['an utterance'] / seconds * 3600:.0f} s (w2v-BERT "
             f"{of['filter bank and w2v-BERT'] / seconds * 3600:.0f})" for seconds, of in figures.items()]
    return Outcome(f"codes and emotion vectors of an hour of speech, one process: {', '.join(texts)}; a prompt's "
                   f"condition {1e3 * figures[12.0]['a prompt, once more']:.0f} ms", {"seconds": figures})


# ---------------------------------------------------------------------------------------------------------------------
# The trainer as a process


def process_flags(bench: Bench, output: str, amp: str, config: Path | None = None, **typed: Any) -> list[str]:
    flags = gpu_trainer.settings(bench.data, bench.scratch / output, amp)
    if config:
        flags["config"] = str(config)
    return [*gpu_trainer.as_flags({**flags, **typed}), *bench.sizes.batch_flags]


def train_lines(output_dir: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps, without what depends on the clock."""
    (path,) = output_dir.glob("logs/run_*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    clock = ("tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] == "train"]


def require_disk(bench: Bench, layers: int, files: int) -> None:
    gpt = bench.sizes.gpt
    weights = 12 * layers * gpt["model_dim"] ** 2 + 2 * gpt["model_dim"] * (
        gpt["number_text_tokens"] + gpt["number_mel_codes"])
    needed, free = 12 * weights * files * 1.1, shutil.disk_usage(bench.scratch).free
    if free < needed:
        raise CannotMeasure(f"{free / 1e9:.0f} GB free in {bench.scratch}, {needed / 1e9:.0f} GB needed; --scratch "
                            "names another folder")


def fewer_layers(bench: Bench, layers: int) -> Path:
    """A config.yaml of a shallower model."""
    path = bench.scratch / f"config_{layers}_layers.yaml"
    text = re.sub(r"(?m)^  layers: \d+$", f"  layers: {layers}", (bench.data / "config.yaml").read_text())
    path.write_text(text)
    return path


def killed_and_resumed(bench: Bench, amp: str, layers: int, timed: bool = False, compiled: bool = False
                       ) -> tuple[dict[str, Any], list[str]]:
    """Kills a run after a save, resumes it, and compares it with one that nobody stopped.

    timed: nothing runs beside the killed run, whose second save and steps are measured. compiled: by --compile, and
    each process finds no kernels that another has compiled, as on another machine.
    Returns: figures, and what differs.
    """
    config = fewer_layers(bench, layers) if layers != bench.sizes.gpt["layers"] else None
    typed: dict[str, Any] = {"compile": True} if compiled else {}

    def flags(output: str, **more: Any) -> list[str]:
        return process_flags(bench, output, amp, config, **typed, **more)

    say = functools.partial(print, flush=True)

    def drive(mode: str, at: int, cache: str, flags: list[str]) -> gpu_trainer.Driven:
        return bench.drive(mode, at, flags, environment={
            f"{name}_CACHE_DIR": str(bench.scratch / cache / name) for name in ("TORCHINDUCTOR", "TRITON")})

    say(f"{amp}, {layers} layers: a run that is killed once step {SAVE_STEP} is saved")
    save = drive("kill2" if timed else "kill", SAVE_STEP, "cache1", flags("killed", save_interval=SAVE_STEP)
                 ).report(status=-9)
    if save["error"]:
        raise RuntimeError(f"the save failed: {save['error']}")
    del save["output"]
    if timed:
        bench.tell(Outcome(describe_save(save).strip(), save))
    last = save["saved"] + 2
    say(f"{amp}: killed after step {save['step']}; resuming, beside a run that nobody stops")
    resumed = drive("until", last, "cache2", flags("killed", resume="auto"))
    reference = drive("until", last, "cache3", flags("whole"))
    after, undisturbed = resumed.report(), reference.report()
    if f"Step: {save['saved']}\n" not in after["output"]:
        raise RuntimeError("the resumed run did not go on from the saved step")
    differing = [part for part, digest in undisturbed["digests"].items() if after["digests"][part] != digest]
    losses = [train_lines(bench.scratch / name) for name in ("killed", "whole")]
    if losses[0] != losses[1]:
        step = next((a["step"] for a, b in zip(*losses, strict=False) if a != b), "?")
        differing.append(f"losses from step {step}")
    return {**save, "seconds_to_resume": after["first_step_at"] - resumed.started, "layers": layers,
            "seconds_to_start": undisturbed["first_step_at"] - reference.started, "differs": differing,
            "skipped": undisturbed["skipped"]}, differing


def resume_bf16(bench: Bench) -> Outcome:
    """A run stopped by SIGKILL and resumed, and what its save and its resumption cost."""
    amp, layers = "bf16", bench.sizes.gpt["layers"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise CannotMeasure("no bf16 before compute capability 8.0")
    require_disk(bench, layers, 2)
    with bench.folders("killed", "whole"):
        figures, differing = killed_and_resumed(bench, amp, layers, timed=True)
    return Outcome(f"{describe_resume(figures, differing)}\n{describe_save(figures)}", figures, not differing)


def describe_resume(figures: dict[str, Any], differing: list[str]) -> str:
    verdict = f"differs in {', '.join(differing)}" if differing else (
        "the same bits (weights, optimizer, scaler, losses)")
    return (f"{figures['layers']} layers, SIGKILL in step {figures['step'] + 1}, resumed from step {figures['saved']}: "
            f"{verdict}; "
            f"{figures['seconds_to_resume']:.1f} s from the command to the first step, the file in the page cache (a "
            f"fresh start {figures['seconds_to_start']:.1f} s, beside it)")


def describe_save(figures: dict[str, Any]) -> str:
    """Adds what saves cost of a run: one every 1000 steps, or every 30 minutes if those are sooner."""
    alone, beside = figures["step_alone"], figures["step_beside"]
    lost = figures["seconds_blocked"]
    if beside and alone:
        lost += max(0.0, beside - alone) * figures["steps_beside"]
    between = min(1000 * alone, 1800.0) if alone else 1800.0
    figures.update(seconds_lost=lost, cost_of_run=lost / between)
    slower = f"{beside / alone - 1:+.1%} for {figures['steps_beside']} steps" if beside and alone else "not seen"
    return (f"save of {figures['bytes'] / 1e9:.2f} GB: training waits {figures['seconds_blocked']:.2f} s, written "
            f"and verified in {figures['seconds_written']:.1f} s; steps beside it {slower} (alone "
            f"{alone or math.nan:.3f} s, global batch {figures['global_batch']}); {lost / between:.2%} of a run that "
            f"saves every {between:.0f} s")


def resume_fp16(bench: Bench) -> Outcome:
    """The same with the gradient scaler; on fewer layers where time is short."""
    layers = bench.sizes.gpt["layers"]
    if bench.time_left() < 240:
        layers = max(1, layers // 4)
    require_disk(bench, layers, 2)
    with bench.folders("killed", "whole"):
        figures, differing = killed_and_resumed(bench, "fp16", layers)
    return Outcome(describe_resume(figures, differing), figures, not differing)


def resume_compiled(bench: Bench) -> Outcome:
    """The same with --compile, on few layers, for each of three processes compiles."""
    require_compiler()
    layers = max(1, bench.sizes.gpt["layers"] // 6)
    require_disk(bench, layers, 2)
    with bench.folders("killed", "whole", "cache1", "cache2", "cache3"):
        figures, differing = killed_and_resumed(bench, "auto", layers, compiled=True)
    return Outcome(describe_resume(figures, differing), figures, not differing)


def out_of_memory(bench: Bench) -> Outcome:
    """The trainer beside a ballast that leaves room for half a micro-batch."""
    with bench.folders("oom"):
        report = bench.drive("oom", 6, process_flags(bench, "oom", "auto")).report()
        lines = train_lines(bench.scratch / "oom")
    before, after = report["batch_size"]
    said = "Out of GPU memory: micro-batches of" in report["output"]
    finite = len(lines) == 6 and all(math.isfinite(line["mel_loss"]) for line in lines)
    del report["output"]
    simulated = " (simulated: no GPU)" if report["simulated"] else (
        f"; ballast {report['ballast'] / GIB:.1f} GiB, activations of a step {report['activations'] / GIB:.1f} GiB")
    text = f"micro-batches of {before} became {after}, global batch {report['global_batch']}, went on to step 6"
    return Outcome((text if said and finite else "did not split" if not said else "losses are not finite") + simulated,
                   report, said and finite and after < before)


def several_processes(bench: Bench) -> Outcome:
    """Several processes under NCCL: all ranks hold the same weights after some steps."""
    needs_gpu("NCCL")
    count = torch.cuda.device_count()
    if count == 1:
        return Outcome("one GPU")
    return ranks_agree(bench, count)


def ranks_agree(bench: Bench, count: int) -> Outcome:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with bench.folders("ranks"):
        status, reports, output = bench.drive("until", 5, process_flags(bench, "ranks", "auto"), launcher).reports()
    if status or len(reports) != count:
        raise RuntimeError(f"torchrun ended with {status}: " + " / ".join(output.splitlines()[-3:])[-600:])
    equal = all(report["digests"]["weights"] == reports[0]["digests"]["weights"] for report in reports)
    seconds = statistics.median(reports[0]["step_seconds"])
    return Outcome(f"{count} processes: weights {'equal' if equal else 'differ'} after 5 steps, {seconds:.3f} s a step",
                   {"processes": count, "step_seconds": seconds}, equal)


# ---------------------------------------------------------------------------------------------------------------------
# The worker

FUNCTIONS: dict[str, Callable[[Bench], Outcome]] = {
    function.__name__: function for function in (
        machine, matrix, attention, precisions, same_bits, deterministic_cost, checkpointing, memory_plan,
        synchronisations, eager, loader, profile, usual_way, compiled, features, resume_bf16, resume_fp16,
        resume_compiled, out_of_memory, several_processes)}
DEVICE_FAULT = re.compile(r"CUDA error|device-side assert|illegal memory|AcceleratorError|CUBLAS_STATUS|CUDNN_STATUS")


def measure(name: str, bench: Bench) -> tuple[Outcome, bool]:
    """Returns the line, and whether this process can go on. Whatever goes wrong is the line's text."""
    try:
        return FUNCTIONS[name](bench), True
    except CannotMeasure as missing:
        return Outcome(f"could not be measured: {missing}"), True
    except Exception as error:  # of code that meets its first GPU: the other lines must not suffer
        traceback.print_exc(file=sys.stdout)
        kind = type(error).__name__
        reason = f"could not be measured: {kind}: {trainer.first_line(error)}"
        found = Outcome(reason, passed=False)
        if bench.so_far:
            found = Outcome(f"{reason}; until then: {bench.so_far.text}", bench.so_far.figures, passed=False)
        return found, not DEVICE_FAULT.search(f"{kind} {error}")


def work(names: Sequence[str], sizes: Sizes, scratch: Path, output: Path, seconds_left: float) -> None:
    """Measures lines and prints them, until a fault of the device."""
    bench = Bench(sizes, scratch, output, seconds_left)
    for name in names:
        print(f"@start {name}", flush=True)
        bench.so_far = None
        started = time.perf_counter()
        outcome, can_go_on = measure(name, bench)
        print("\n@line " + json.dumps({"name": name, "seconds": time.perf_counter() - started,
                                       **dataclasses.asdict(outcome)}), flush=True)
        if not can_go_on:
            break
        free_memory()
    trainer.leave(0)


if __name__ == "__main__":
    lines, tiny, *rest = sys.argv[1:]
    work(lines.split(","), gpu_trainer.TINY if tiny == "tiny" else gpu_trainer.REAL, Path(rest[0]), Path(rest[1]),
         float(rest[2]))
