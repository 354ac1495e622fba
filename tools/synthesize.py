"""Speaks texts in the voice of a prompt recording: checkpoint + text + prompt -> WAV, and a picture of its mel.

  one text     --checkpoint F --prompt F --text T --output F.wav
  many lines   --checkpoint F --prompt F --text-file F --output-dir D: 0001.wav, 0002.wav ... and spoken.jsonl. The same
               command again goes on where it was stopped, and speaks only lines that are new or changed.
  a training   --watch OUTPUT_DIR: speaks the same validation sentences with every new checkpoint of a run into its
               TensorBoard logs, until the run has finished; beside one that runs here it takes of processor and GPU
               only what is free, and says where it speaks

Codes are drawn one by one, several lines at once, then the embedded codec turns codes into sound, or for IndexTTS2's
codes (--model-dir) its s2mel and BigVGAN. What a line sounds like depends on checkpoint, text, prompt, settings and
seed, never on the lines spoken beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools._common import (
    Progress,
    ToolError,
    info,
    make_parser,
    read_jsonl,
    run_program,
    warn,
    write_jsonl,
    writing_to,
)
from tools.codes_to_sound import add_sound_arguments, sound_of
from tools.generation import (
    LINES_AT_ONCE,
    Line,
    Sampling,
    Synthesizer,
    add_base_argument,
    add_sampling_arguments,
    line_mark,
    sampling_of,
    speed,
)
from tools.mel_picture import mel_picture
from tools.sound_files import write_wav
from tools.watch_training import stand_back_beside, watch

FIRST_COMMAND = ("python -m tools.synthesize --checkpoint training_output/best.pth --text 'ሰላም ለዓለም' "
                 "--prompt processed_data/audio/new026_am.flac --output hello.wav")


# Files


def write_sound(synthesizer: Synthesizer, waveform: Tensor, path: Path) -> Path:
    """The WAV and, beside it, the picture, whose path is returned. Raises: ToolError."""
    picture = path.with_suffix(".png")
    with writing_to(path.parent):
        mel_picture([("synthesis", synthesizer.sound.log_mel(waveform))], picture)
        write_wav(path, waveform, synthesizer.sound.sample_rate)
    return picture


def synthesize(synthesizer: Synthesizer, text: str, prompt: Path, output: Path, sampling: Sampling,
               language: str = "am") -> None:
    """One text into one file. Raises: ToolError."""
    line = synthesizer.line(text, synthesizer.prompt(prompt), "--text", language)
    started = time.perf_counter()
    spoken, waveform = next(synthesizer.speak([line], sampling))
    seconds = time.perf_counter() - started
    if not spoken.codes:
        raise ToolError("the model stopped before the first code: it is not trained far enough for this text")
    picture = write_sound(synthesizer, waveform, output)
    cut = "" if spoken.stopped else ", cut off: the model did not stop before the greatest length"
    info(f"“{line.text}”: {len(spoken.codes)} codes{cut}, "
         f"{speed(len(waveform) / synthesizer.sound.sample_rate, seconds)} -> {output}, {picture}")


def given_lines(synthesizer: Synthesizer, text_file: Path, prompt: Path, language: str = "am") -> dict[str, Line]:
    """The lines of a text file by their numbers. Raises: ToolError."""
    voice = synthesizer.prompt(prompt)
    return {f"{number:04d}": synthesizer.line(text, voice, f"{text_file}, line {number}", language)
            for number, text in enumerate(read_lines(text_file), 1) if text.strip()}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, empty ones too. Raises: ToolError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ToolError(f"{path}: not UTF-8 text at byte {error.start}. Save it as UTF-8") from error
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}. --text-file is a text file with one line to speak per line"
                        ) from error
    if not any(line.strip() for line in lines):
        raise ToolError(f"{path}: holds no line to speak. Write one per line")
    return lines


def holds_sound(path: Path) -> bool:
    """Whether a WAV file has more than its header: after a power cut it may be empty."""
    try:
        return path.stat().st_size > 44
    except OSError:
        return False


def speak_into(folder: Path, synthesizer: Synthesizer, lines: dict[str, Line], sampling: Sampling
               ) -> list[dict[str, Any]]:
    """Speaks lines, by file name, into folder/NAME.wav with its picture, and lists them in folder/spoken.jsonl.

    Lines that the folder already has, made with the same checkpoint, prompt and settings, are left as they are. What it
    has of other ones is taken off the list first: its files are about to be replaced. A line without a single code gets
    no files. Returns the rows of spoken.jsonl. Raises: ToolError.
    """
    listing = folder / "spoken.jsonl"
    wanted = {name: line_mark(synthesizer, line, sampling) for name, line in lines.items()}
    rows: dict[str, dict[str, Any]] = {}
    if listing.exists():
        found = read_jsonl(listing, ["name", "made_with", "codes"], f"Delete {listing} to speak everything anew")
        rows = {row["name"]: row for row in found if wanted.get(row["name"]) == row["made_with"]
                and (not row["codes"] or holds_sound(folder / f"{row['name']}.wav"))}
        with writing_to(folder):
            if not rows:
                listing.unlink()
            elif len(rows) < len(found):
                write_jsonl(listing, rows.values())
    missing = [name for name in lines if name not in rows]
    if len(missing) < len(lines):
        info(f"{len(lines) - len(missing)} of {len(lines)} lines are there already")
    progress, total, started = Progress("speaking", len(missing)), 0.0, time.perf_counter()
    sounds = synthesizer.speak([lines[name] for name in missing], sampling)
    for done, (name, (spoken, waveform)) in enumerate(zip(missing, sounds, strict=True), 1):
        if spoken.codes:
            write_sound(synthesizer, waveform, folder / f"{name}.wav")
        seconds = len(waveform) / synthesizer.sound.sample_rate
        total += seconds
        rows[name] = {"name": name, "text": lines[name].text, "codes": len(spoken.codes), "stopped": spoken.stopped,
                      "seconds": round(seconds, 3), "made_with": wanted[name]}
        if done % LINES_AT_ONCE == 0 or done == len(missing):
            with writing_to(folder):
                write_jsonl(listing, [rows[name] for name in lines if name in rows])
        progress.update(done)
    if missing:
        info(f"{len(missing)} lines: {speed(total, time.perf_counter() - started)} -> {folder}")
    return [rows[name] for name in lines]


def synthesize_file(synthesizer: Synthesizer, text_file: Path, prompt: Path, folder: Path, sampling: Sampling,
                    language: str = "am") -> None:
    """Every line of a text file into a folder, named after its line number. Raises: ToolError."""
    rows = speak_into(folder, synthesizer, given_lines(synthesizer, text_file, prompt, language), sampling)
    cut_off = [row["name"] for row in rows if not row["stopped"]]
    if cut_off:
        warn(f"cut off, since the model did not stop before the greatest length: {', '.join(cut_off)}")
    silent = [row["name"] for row in rows if not row["codes"]]
    if silent:
        raise ToolError(f"the model stopped before the first code of {', '.join(silent)}: it is not trained far enough "
                        "for these lines. The others are spoken")


def speak_training(args: argparse.Namespace, sampling: Sampling) -> None:
    """Every checkpoint of a training; all is kept on the CPU meanwhile. Raises: ToolError."""
    from tools.indextts2_features import choose_device

    stand_back_beside(args.watch)
    device = choose_device(args.device or "auto") if args.model_dir else "cpu"
    sound = sound_of(args, "cpu")

    def load(checkpoint: Path) -> Synthesizer:
        return Synthesizer(checkpoint, sound, args.tokenizer, args.base_checkpoint)

    def lines_of(synthesizer: Synthesizer) -> list[Line] | None:
        return list(given_lines(synthesizer, args.text_file, args.prompt, args.language).values()
                    ) if args.text_file else None

    watch(args.watch, load, lines_of, sampling, torch.device(device))


# The command line

MODES = {"watch": [], "text_file": ["output_dir", "checkpoint", "prompt"], "text": ["output", "checkpoint", "prompt"]}


def flag_problem(args: argparse.Namespace) -> str:
    """What is wrong with the choice of flags, or an empty string."""
    def flags(names: Sequence[str]) -> str:
        return " and ".join("--" + name.replace("_", "-") for name in names)

    given = [name for name in ("watch", "text_file", "text", "output_dir", "output", "checkpoint", "prompt")
             if getattr(args, name) is not None]
    mode = next((name for name in MODES if name in given), None)
    if mode is None:
        return "nothing to speak: give --text, --text-file or --watch"
    missing = [name for name in MODES[mode] if name not in given]
    if mode == "watch" and ("text_file" in given) != ("prompt" in given):
        missing = ["prompt" if "text_file" in given else "text_file"]
    if missing:
        return f"{flags(given)}: {flags(missing)} must be given too"
    surplus = [name for name in given if name not in [mode, *MODES[mode]]]
    surplus = [name for name in surplus if mode != "watch" or name not in ("text_file", "prompt")]
    return f"{flags(surplus)} cannot be combined with {flags([mode])}" if surplus else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--checkpoint", type=Path, help="best.pth, latest.pth or a model_step file")
    parser.add_argument("--prompt", type=Path, help="a recording of the voice to speak in")
    parser.add_argument("--text", help="the text to speak")
    parser.add_argument("--output", type=Path, help="WAV file; the picture goes beside it as .png")
    parser.add_argument("--text-file", type=Path, help="UTF-8, one text per line")
    parser.add_argument("--output-dir", type=Path, help="gets the lines' files")
    parser.add_argument("--watch", type=Path, metavar="OUTPUT_DIR",
                        help="a training's output directory; --text-file and --prompt replace the validation sentences")
    add_sound_arguments(parser, "the training data")
    parser.add_argument("--tokenizer", type=Path, help="the checkpoint's, unless it was moved")
    add_base_argument(parser)
    parser.add_argument("--language", default="am", help="of --text and --text-file; only Amharic is turned into "
                        "words, by the text rules that the checkpoint was trained under (am)")
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    problem, sampling = flag_problem(args), sampling_of(args)
    if problem:
        raise ToolError(problem)
    if args.output and args.output.suffix != ".wav":
        raise ToolError(f"--output {args.output}: must end in .wav")
    if args.watch:
        speak_training(args, sampling)
        return
    synthesizer = Synthesizer(args.checkpoint, sound_of(args), args.tokenizer, args.base_checkpoint)
    if args.text_file:
        synthesize_file(synthesizer, args.text_file, args.prompt, args.output_dir, sampling, args.language)
    else:
        synthesize(synthesizer, args.text, args.prompt, args.output, sampling, args.language)


if __name__ == "__main__":
    run_program(main)
