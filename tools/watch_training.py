"""Speaks the same sentences with every new checkpoint of a run, into its TensorBoard logs, until the run has finished:
what `python -m tools.synthesize --watch` does.

Beside a training that runs on this machine it stands back. Its processor time is what nobody else wants. On the card it
holds nothing between two checkpoints, takes only memory that is free, and not longer than SHARE of the time.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools._common import ToolError, info, read_jsonl, write_jsonl, writing_to
from tools.codes_to_sound import SHORTEST_PROMPT
from tools.generation import (
    Line,
    Sampling,
    Synthesizer,
    UnreadableCheckpoint,
    has_long_prompt,
    line_mark,
    speed,
)
from tools.mel_picture import mel_image
from tools.run_files import LATEST, lock_holder, read_last_exit
from tools.text_rules import language_of
from trainers.train_gpt_v2 import ignore_os_errors

WATCHED_SENTENCES = 4
POLL_SECONDS = 2.0
PATIENCE = 60.0  # seconds for which memory of the card is waited for
SHARE = 0.01  # of the time on the card, beside a training
WORKING_BYTES = 2 << 30  # of the card, beside weights, keys and values
HEADROOM = 0.05  # of the card, which stays free for the training to grow
CPU = torch.device("cpu")


# Beside a training


def stand_back_beside(output_dir: Path) -> bool:
    """Where a training holds the directory; whether one does."""
    is_training = lock_holder(output_dir) is not None
    if is_training:
        stand_back()
    return is_training


def stand_back() -> None:
    """Every thread of this process, and what they start, gets the processor when nobody else wants it, and a quarter
    of the cores at most."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // 4)))
    if not hasattr(os, "SCHED_IDLE"):  # macOS
        os.nice(19)
        return
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    if os.getsid(0) == os.getpid():  # as the page starts it; sessions compete as one each, whatever is in them
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def place_to_speak(free: int, total: int, needed: int, waited: float, rest: float) -> tuple[str, str]:
    """Where a checkpoint is spoken, "cuda", "cpu" or "wait", and why, for the reader. Pure.

    free, total, needed: bytes of the card; waited: seconds so far; rest: seconds for which the card is still the
    training's alone.
    """
    if rest > 0:
        return "cpu", f"the card is left to the training for another {rest:.0f} s"
    wanted = needed + int(HEADROOM * total)
    has = f"{free / 1e9:.1f} GB of the card are free, {wanted / 1e9:.1f} wanted"
    if wanted <= free:
        return "cuda", has
    return ("wait" if waited < PATIENCE and wanted <= total else "cpu"), has


class Card:
    """A GPU on which others may work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rest_until = device, -float("inf")

    def place(self, needed: int, is_training: bool) -> str:
        """"cuda" or "cpu", after waiting for memory."""
        started, told = time.monotonic(), False
        while True:
            now, (free, total) = time.monotonic(), torch.cuda.mem_get_info(self.device)
            rest = self.rest_until - now if is_training else 0.0
            place, why = place_to_speak(free, total, needed, now - started, rest)
            if place != "wait":
                info(f"speaking on {'the CPU' if place == 'cpu' else self.device}: {why}")
                return place
            if not told:
                info(f"waiting for memory, {PATIENCE:.0f} s at most: {why}")
            told = True
            time.sleep(POLL_SECONDS)

    def speak(self, synthesizer: Synthesizer, lines: Sequence[Line], sampling: Sampling, is_training: bool
              ) -> list[Tensor]:
        """Waveforms, made on the card where that can be. The card is as free as before, then. Raises: ToolError."""
        if self.place(synthesizer.size() + WORKING_BYTES, is_training) == "cpu":
            return waveforms(synthesizer, lines, sampling)
        started = time.monotonic()
        try:
            synthesizer.move(self.device)
            return waveforms(synthesizer, lines, sampling)
        except torch.OutOfMemoryError:
            info("the card's memory was taken meanwhile: speaking on the CPU")
        finally:
            synthesizer.move(CPU)
            torch.cuda.empty_cache()
            now = time.monotonic()
            self.rest_until = now + (now - started) / SHARE
        return waveforms(synthesizer, lines, sampling)


def waveforms(synthesizer: Synthesizer, lines: Sequence[Line], sampling: Sampling) -> list[Tensor]:
    return [waveform for _, waveform in synthesizer.speak(lines, sampling)]


# Checkpoints


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever a file is replaced or written to; None while there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def validation_lines(synthesizer: Synthesizer) -> list[Line]:
    """WATCHED_SENTENCES of the run's validation rows, evenly spaced, in the voices of their prompts' recordings."""
    lines: list[tuple[str, Path, str]] = []
    for manifest in synthesizer.checkpoint["manifests"]["val"]:
        path = Path(manifest["path"])
        rows = read_jsonl(path, ["target_text"], "Start in the folder in which the training was started")
        found = [(row["target_text"], path.parent / row.get("prompt_audio_path", ""), language_of(row)) for row in rows
                 if has_long_prompt(row)]
        lines += [line for line in found if line[1].is_file()]
    if not lines:
        raise ToolError(f"{path}: no row names a prompt recording that exists and has {SHORTEST_PROMPT} s of sound. "
                        "Give --text-file and --prompt")
    count = min(WATCHED_SENTENCES, len(lines))
    chosen = [lines[i * len(lines) // count] for i in range(count)]
    return [synthesizer.line(text, synthesizer.prompt(prompt), str(prompt), language)
            for text, prompt, language in chosen]


def speak_checkpoint(synthesizer: Synthesizer, lines: Sequence[Line], folder: Path, sampling: Sampling,
                     speak: Callable[[Synthesizer, Sequence[Line], Sampling], list[Tensor]] = waveforms) -> None:
    """Sound, picture and text of every line into TensorBoard events in `folder`, unless this checkpoint's are there."""
    from torch.utils.tensorboard import SummaryWriter

    step, listing = synthesizer.checkpoint["step"], folder / "spoken.jsonl"
    spoken = read_jsonl(listing, ["step", "made_with"], f"Delete {listing}") if listing.exists() else []
    mark = hashlib.sha256("".join(line_mark(synthesizer, line, sampling) for line in lines).encode()).hexdigest()
    if mark in [row["made_with"] for row in spoken]:
        return
    rate, started = synthesizer.sound.sample_rate, time.perf_counter()
    sounds = speak(synthesizer, lines, sampling)
    seconds = time.perf_counter() - started
    threading.excepthook = ignore_os_errors  # the writer's thread; flush reports what it met
    with writing_to(folder):
        # What was shown for this step and later ones is out of date: the run has gone back.
        writer = SummaryWriter(str(folder), purge_step=step)
        for number, (line, waveform) in enumerate(zip(lines, sounds, strict=True), 1):
            writer.add_text(f"sentence_{number}", line.text, step)
            if len(waveform):
                writer.add_audio(f"sentence_{number}", waveform[None], step, rate)
                image = mel_image([(f"step {step}", synthesizer.sound.log_mel(waveform))])
                writer.add_image(f"sentence_{number}", np.array(image), step, dataformats="HWC")
        writer.flush()
        writer.close()
        write_jsonl(listing, [*spoken, {"step": step, "made_with": mark}])
    silent = sum(not len(waveform) for waveform in sounds)
    note = f", {silent} silent: the model stopped before the first code" if silent else ""
    info(f"step {step}: {len(lines)} sentences{note}, {speed(sum(map(len, sounds)) / rate, seconds)} -> {folder}")


def watch(output_dir: Path, load: Callable[[Path], Synthesizer], lines_of: Callable[[Synthesizer], list[Line] | None],
          sampling: Sampling, device: torch.device = CPU) -> None:
    """Speaks latest.pth, as `load` reads it onto the CPU, whenever it changes, until the run has finished: the lines of
    `lines_of`, or sentences of the run's own validation where it gives none; on `device` where it is free. Raises:
    ToolError."""
    latest, card = output_dir / LATEST, Card(device) if device != CPU else None

    def speak(synthesizer: Synthesizer, lines: Sequence[Line], sampling: Sampling) -> list[Tensor]:
        if card is None:
            return waveforms(synthesizer, lines, sampling)
        return card.speak(synthesizer, lines, sampling, stand_back_beside(output_dir))

    if not output_dir.is_dir():
        raise ToolError(f"{output_dir}: no such directory. Start the training first, or correct the path")
    info(f"watching {latest}; Ctrl+C ends it")
    seen = None
    while True:
        at_end = read_last_exit(output_dir).get("reason") == "finished"  # a run that was stopped may be resumed
        found = signature(latest)  # in this order, so that no checkpoint is missed
        if found and found != seen:
            seen = found
            stand_back_beside(output_dir)
            try:
                synthesizer = load(latest)
            except UnreadableCheckpoint as error:  # half copied, or replaced while it was read
                if at_end:
                    raise
                info(f"{error}. Waiting for the next one")
                continue
            lines = lines_of(synthesizer) or validation_lines(synthesizer)
            speak_checkpoint(synthesizer, lines, output_dir / synthesizer.checkpoint["run_dir"] / "voice", sampling,
                             speak)
        elif at_end:
            info("the training has finished")
            return
        else:
            time.sleep(POLL_SECONDS)
