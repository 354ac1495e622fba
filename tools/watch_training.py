"""Speaks the same sentences with every new checkpoint of a run, into its TensorBoard logs, until the run has finished:
what `python -m tools.synthesize --watch` does."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

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
from tools.run_files import LATEST, read_last_exit
from tools.text_rules import language_of
from trainers.train_gpt_v2 import ignore_os_errors

WATCHED_SENTENCES = 4
POLL_SECONDS = 2.0


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


def speak_checkpoint(synthesizer: Synthesizer, lines: Sequence[Line], folder: Path, sampling: Sampling) -> None:
    """Sound, picture and text of every line into TensorBoard events in `folder`, unless this checkpoint's are there."""
    from torch.utils.tensorboard import SummaryWriter

    step, listing = synthesizer.checkpoint["step"], folder / "spoken.jsonl"
    spoken = read_jsonl(listing, ["step", "made_with"], f"Delete {listing}") if listing.exists() else []
    mark = hashlib.sha256("".join(line_mark(synthesizer, line, sampling) for line in lines).encode()).hexdigest()
    if mark in [row["made_with"] for row in spoken]:
        return
    rate, started = synthesizer.sound.sample_rate, time.perf_counter()
    sounds = [waveform for _, waveform in synthesizer.speak(lines, sampling)]
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
          sampling: Sampling) -> None:
    """Speaks latest.pth, as `load` reads it, whenever it changes, until the run has finished: the lines of `lines_of`,
    or sentences of the run's own validation where it gives none. Raises: ToolError."""
    latest = output_dir / LATEST
    if not output_dir.is_dir():
        raise ToolError(f"{output_dir}: no such directory. Start the training first, or correct the path")
    info(f"watching {latest}; Ctrl+C ends it")
    seen = None
    while True:
        at_end = read_last_exit(output_dir).get("reason") == "finished"  # a run that was stopped may be resumed
        found = signature(latest)  # in this order, so that no checkpoint is missed
        if found and found != seen:
            seen = found
            try:
                synthesizer = load(latest)
            except UnreadableCheckpoint as error:  # half copied, or replaced while it was read
                if at_end:
                    raise
                info(f"{error}. Waiting for the next one")
                continue
            lines = lines_of(synthesizer) or validation_lines(synthesizer)
            speak_checkpoint(synthesizer, lines, output_dir / synthesizer.checkpoint["run_dir"] / "voice", sampling)
        elif at_end:
            info("the training has finished")
            return
        else:
            time.sleep(POLL_SECONDS)
