"""For benchmarks.gpu: random data of realistic lengths, and the trainer as a process under a driver.

    python -m benchmarks.gpu_trainer MODE STEP TRAINER_ARGUMENTS...

MODE: until (leaves once STEP is logged, without saving), kill (SIGKILL in the midst of a step, once the save of STEP is
on the disk), kill2 (once a second save, which is measured, is there too), oom (fills the GPU's memory after step 2, so
that the batch no longer fits, and leaves once STEP is logged). What it saw is one line, "@report " and a JSON object.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.random_weights import ReleasedSizes
from trainers import train_gpt_v2 as trainer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_TOKENIZER = ROOT / "tokenizers" / "amharic_extended_bpe.model"
REPORT = "@report "


# ---------------------------------------------------------------------------------------------------------------------
# Random data


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model's `gpt:` section, lengths of samples (from, to), and how much of it."""

    gpt: dict[str, int]
    text: tuple[int, int]  # tokens
    codes: tuple[int, int]
    rows: int
    prompts: int
    batch_sizes: tuple[int, ...]
    steps: int  # that a timing takes
    matrix: int  # side of the matrix products that are timed
    batch_flags: tuple[str, ...] = ()  # of trainer processes; none: as the trainer chooses
    released: ReleasedSizes = ReleasedSizes()  # of what makes features


REAL = Sizes({"model_dim": 1280, "layers": 24, "heads": 20, "max_text_tokens": 600, "max_mel_tokens": 1815,
              "number_text_tokens": 12000, "number_mel_codes": 8194, "start_mel_token": 8192, "stop_mel_token": 8193},
             text=(20, 120), codes=(150, 700), rows=1024, prompts=256, batch_sizes=(8, 16, 32), steps=8, matrix=8192)
TINY = Sizes({"model_dim": 32, "layers": 2, "heads": 2, "max_text_tokens": 30, "max_mel_tokens": 60,
              "number_text_tokens": 400, "number_mel_codes": 66, "start_mel_token": 64, "stop_mel_token": 65},
             text=(3, 12), codes=(6, 40), rows=40, prompts=4, batch_sizes=(2, 4), steps=2, matrix=64,
             batch_flags=("--batch-size", "4", "--grad-accumulation", "1"),
             released=ReleasedSizes(hidden=24, layers=17, heads=2, wide=32, width=16, blocks=1, codec=16,
                                    model_dim=32))


def make_tokenizer(path: Path, size: int) -> None:
    """The shipped tokenizer with pieces added up to `size`: messages of its format may be joined end to end."""
    import sentencepiece

    content = SHIPPED_TOKENIZER.read_bytes()
    known = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    for number in range(known, size):
        text = f"piece{number}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(number))
        content += b"\x0a" + bytes([len(piece)]) + piece
    path.write_bytes(content)


def make_data(folder: Path, sizes: Sizes) -> None:
    """config.yaml, tokenizer.model, train_pairs.jsonl, val_pairs.jsonl and shards of random numbers."""
    folder.mkdir(parents=True)
    gpt, rng = sizes.gpt, np.random.default_rng(1)
    make_tokenizer(folder / "tokenizer.model", gpt["number_text_tokens"])
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "gpt": gpt, "dataset": {"features": "random numbers", "num_codes": gpt["start_mel_token"]}}))
    text_lengths = rng.integers(sizes.text[0], sizes.text[1] + 1, sizes.rows)
    code_lengths = np.clip((text_lengths * rng.uniform(4.5, 7.0, sizes.rows)).astype(int), *sizes.codes)
    text_starts, code_starts = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (text_lengths, code_lengths))
    dim = gpt["model_dim"]
    for name, values in {
            "text_ids": rng.integers(2, gpt["number_text_tokens"], text_starts[-1], dtype=np.int32),
            "codes": rng.integers(0, gpt["start_mel_token"], code_starts[-1], dtype=np.int32),
            "condition": 0.1 * rng.standard_normal((sizes.prompts * 32, dim), dtype=np.float32),
            "emo_vec": 0.1 * rng.standard_normal((sizes.prompts, dim), dtype=np.float32)}.items():
        np.save(folder / f"{name}.npy", values)
    rows = [{"id": f"row{i}", "target_text_len": int(text_lengths[i]), "target_code_len": int(code_lengths[i]),
             "target_text_ids_path": "text_ids.npy", "target_text_ids_start": int(text_starts[i]),
             "target_codes_path": "codes.npy", "target_codes_start": int(code_starts[i]),
             "prompt_condition_path": "condition.npy", "prompt_condition_start": 32 * (i % sizes.prompts),
             "prompt_emo_vec_path": "emo_vec.npy", "prompt_emo_vec_start": i % sizes.prompts}
            for i in range(sizes.rows)]
    for name, chosen in (("train", rows), ("val", rows[:8])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{name}_pairs.jsonl").write_text(text)


def settings(data: Path, output_dir: Path, amp: str) -> dict[str, Any]:
    """Settings of the trainer that every measurement shares; the run ends when the benchmark ends it."""
    return {"train_manifest": [str(data / "train_pairs.jsonl")], "val_manifest": [str(data / "val_pairs.jsonl")],
            "tokenizer": str(data / "tokenizer.model"), "config": str(data / "config.yaml"),
            "output_dir": str(output_dir), "epochs": 100_000, "max_steps": 100_000, "learning_rate": 1e-4,
            "warmup_steps": 1, "log_interval": 1, "val_interval": 1_000_000, "save_interval": 0, "save_minutes": 0.0,
            "keep_checkpoints": 1, "amp": amp}


def as_flags(typed: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in typed.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value[0] if isinstance(value, list) else value)]
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# The driver: what happens inside the trainer's process


def state_digests(run: trainer.Run) -> dict[str, str]:
    """sha256 of what a run's future depends on; equal digests mean equal bits."""
    parts = {"weights": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
             "scaler": run.scaler.state_dict(), "position": dataclasses.asdict(run.state.position)}
    return {name: hashlib.sha256(json.dumps(trainer.digest_tree(part)).encode()).hexdigest()
            for name, part in parts.items()}


def gpu_memory(run: trainer.Run) -> tuple[int, int]:
    """Bytes that tensors take now, and took at most since the last call."""
    torch.cuda.synchronize()
    now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return now, most


@dataclass
class Driver:
    """Receives the trainer's events, and ends the process at the chosen moment."""

    mode: str
    at: int
    first_step_at: float = 0.0  # time.time()
    began: float = 0.0  # of what is timed now
    alone: list[float] = field(default_factory=list)  # seconds of steps without a save beside them
    beside: list[float] = field(default_factory=list)
    save: trainer.PendingSave | None = None
    first_save: trainer.PendingSave | None = None  # page-locks memory, which the next ones find
    ballast: Any = None
    split_from: int = 0  # batch size before the memory was filled
    notes: dict[str, Any] = field(default_factory=dict)

    def report(self, **values: Any) -> None:
        print(f"\n{REPORT}{json.dumps({**self.notes, **values})}", flush=True)

    def on_event(self, name: str, run: trainer.Run, *details: Any) -> None:
        if name == "step" and not self.first_step_at:
            self.first_step_at = self.notes["first_step_at"] = time.time()
        if name == "logged":
            self.note_step()
        {"until": self.until, "kill": self.kill, "kill2": self.kill, "oom": self.oom}[self.mode](name, run, *details)
        if name in ("logged", "save"):
            self.began = time.perf_counter()

    def note_step(self) -> None:
        """Logging has waited for the device. A step in which a save ended counts on neither side."""
        if self.began and self.save is None:
            self.alone.append(time.perf_counter() - self.began)
        elif self.save is not None and not self.save.written.done():
            self.beside.append(time.perf_counter() - self.began)

    def until(self, name: str, run: trainer.Run, *details: Any) -> None:
        if name == "logged" and run.state.position.step == self.at:
            self.report(digests=state_digests(run), step_seconds=self.alone,
                        skipped=int(run.nonfinite[0].item()))
            trainer.leave(0)

    def kill(self, name: str, run: trainer.Run, *details: Any) -> None:
        if name == "save" and self.save is None:
            run.config = dataclasses.replace(run.config, save_interval=0)  # no other save while this one is measured
            if self.mode == "kill" or self.first_save:
                self.save = run.saving
            self.first_save = self.first_save or run.saving
        first = self.first_save
        if name == "logged" and first and self.save is None and first.written.done():
            run.config = dataclasses.replace(run.config, save_interval=1)
        if name != "micro_step" or self.save is None or not self.save.written.done():
            return
        steady = self.alone[len(self.alone) // 2 :]
        values = {"bytes": 0, "seconds_written": 0.0, **self.save.values}
        self.report(step=run.state.position.step, saved=self.save.state.position.step,
                    error=str(self.save.written.exception() or ""), **values,
                    step_alone=statistics.median(steady) if steady else None,
                    step_beside=statistics.fmean(self.beside) if self.beside else None, steps_beside=len(self.beside),
                    global_batch=run.config.global_batch)
        os.kill(os.getpid(), signal.SIGKILL)

    def oom(self, name: str, run: trainer.Run, *details: Any) -> None:
        step, on_gpu = run.state.position.step, run.precision.device.type == "cuda"
        if name == "step" and step == 1 and on_gpu:
            gpu_memory(run)
        if name == "step" and step == 2 and not self.split_from:
            self.split_from = run.config.batch_size
            if on_gpu:
                self.fill_memory(run)
        if name == "micro_step" and step == 2 and not on_gpu and 2 * len(details[0].rows) > self.split_from:
            raise torch.OutOfMemoryError("simulated: no GPU")
        if name == "logged" and step == self.at:
            self.report(batch_size=[self.split_from, run.config.batch_size], global_batch=run.config.global_batch,
                        simulated=not on_gpu)
            trainer.leave(0)

    def fill_memory(self, run: trainer.Run) -> None:
        """Leaves 0.6 of what the last step's activations took: half a micro-batch fits, a whole one does not."""
        now, most = gpu_memory(run)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        size = int(free - 0.6 * (most - now))
        self.notes.update(activations=most - now, ballast=size)
        if size > 0:
            self.ballast = torch.empty(size, dtype=torch.uint8, device=run.precision.device)


# ---------------------------------------------------------------------------------------------------------------------
# Seen from outside


@dataclass
class Driven:
    """A trainer's process under a driver."""

    process: subprocess.Popen[str]
    started: float

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def reports(self) -> tuple[int, list[dict[str, Any]], str]:
        """Waits. Returns the exit status, the driver's reports, and all that was printed."""
        output, _ = self.process.communicate()
        reports = [json.loads(line[len(REPORT) :]) for line in output.splitlines() if line.startswith(REPORT)]
        return self.process.returncode, reports, output

    def report(self, status: int = 0) -> dict[str, Any]:
        """The one report of a process that had to end with this status. Raises: RuntimeError with its last lines."""
        found, reports, output = self.reports()
        if found != status or not reports:
            lines = [line for line in output.splitlines() if line.strip() and not line.startswith(REPORT)]
            raise RuntimeError(f"the trainer ended with {found}, not {status}: " + " / ".join(lines[-3:])[-600:])
        return {**reports[0], "output": output}


def drive(mode: str, at: int, flags: Sequence[str], launcher: Sequence[str] = (),
          environment: Mapping[str, str] | None = None) -> Driven:
    """Starts the trainer under the driver; launcher: what stands before the module's name (torchrun's arguments)."""
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu_trainer", mode, str(at), *flags]
    started = time.time()
    return Driven(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env={**os.environ, **(environment or {})}), started)


def main() -> int:
    mode, at, *argv = sys.argv[1:]
    return trainer.main(argv, Driver(mode, int(at)).on_event)


if __name__ == "__main__":
    trainer.leave(main())
