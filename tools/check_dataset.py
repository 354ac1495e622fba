"""Which recordings of a dataset tools.preprocess would take, and why not the others, before a codec or a tokenizer is
made. Writes nothing.

It is preprocess's own check of texts, splits and sounds. Without --tokenizer every letter is known and counts as a
token, as with the usual tokenizer of letters; without --codec lengths are those of a codec with the usual frames.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools._common import Progress, ToolError, info, make_parser, run_program, warn
from tools.amharic_text import TEXT_RULES
from tools.features import Clip, chunk_size, compute_chunks
from tools.made_with import EMBEDDED
from tools.preprocess import (
    Item,
    find_clips,
    nothing_left,
    plan_items,
    read_model_config,
    say_skipped,
    skipped_row,
)
from tools.recordings import read_recordings
from tools.sound_files import Unusable, load_recording
from tools.speech_codec import CodecConfig, SpeechCodec
from tools.text_rules import front_end_for_new, rules_for_new
from tools.text_tokens import TextTokens, load_tokens
from trainers.train_gpt_v2 import ModelConfig, available_cores, model_config_from

FIRST_COMMAND = "python -m tools.check_dataset my_recordings/recordings.jsonl"
LARGEST_CHUNK, WORTH_A_PROCESS = 128, 64  # recordings
SHOWN = 20  # rows that are named


class AnyLetters:
    """Stands for a tokenizer that is not made yet: a token for each letter, whatever it is."""

    size = 2

    def encode(self, text: str, language: str) -> list[int]:
        return [1] * (len(text) + 1 if text else 0)

    def unknown(self, text: str) -> list[str]:
        return []


def codes_in(samples: int, config: CodecConfig) -> int:
    """Of a recording of so many samples, as the codec counts them."""
    return math.ceil((samples // config.hop + 1) / config.stack)


def measure(clips: Sequence[Clip], audio_dir: Path, config: CodecConfig) -> list[int | tuple[str, str]]:
    """Samples of each clip as preprocess reads it, or (reason, detail). Runs in a worker process."""
    found: list[int | tuple[str, str]] = []
    for clip in clips:
        try:
            found.append(len(load_recording(audio_dir / clip.audio, config.sample_rate)))
        except Unusable as fault:
            found.append((fault.reason, fault.detail))
    return found


def sound_faults(items: Sequence[Item], audio_dir: Path, config: CodecConfig, most_codes: int, jobs: int
                 ) -> dict[int, tuple[str, str]]:
    """By row number: (reason, detail) of the recordings that cannot be used."""
    clips, faults = find_clips(items, audio_dir)
    numbers = list(clips)
    jobs = min(jobs or available_cores(), max(1, len(numbers) // WORTH_A_PROCESS))
    size = chunk_size(len(numbers), jobs, LARGEST_CHUNK)
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    compute = functools.partial(measure, audio_dir=audio_dir, config=config)
    progress, done = Progress("recordings", len(numbers)), 0
    for chunk, results in compute_chunks(compute, chunks, jobs, lambda part: [clips[number] for number in part]):
        for number, result in zip(chunk, results, strict=True):
            if isinstance(result, tuple):
                faults[number] = result
            elif (count := codes_in(result, config)) > most_codes:
                faults[number] = "recording too long", (f"{audio_dir / clips[number].audio}: {count} codes, the model "
                                                        f"takes {most_codes}. Cut it into sentences")
        done += len(chunk)
        progress.update(done)
    return faults


def model_of(args: argparse.Namespace) -> ModelConfig:
    """Raises: ToolError, UserError."""
    gpt = read_model_config(args.config)["gpt"]
    return model_config_from({**gpt, "number_text_tokens": 2, "number_mel_codes": 4, "start_mel_token": 2,
                              "stop_mel_token": 3}, str(args.config or "the small model"))


def check(args: argparse.Namespace) -> tuple[list[Item], list[dict[str, Any]]]:
    """The usable rows, and the others as preprocess writes them to skipped.jsonl. Raises: ToolError."""
    rows = read_recordings(args.recordings)
    tokenizer: TextTokens = load_tokens(args.tokenizer) if args.tokenizer else AnyLetters()
    rules = rules_for_new(args.tokenizer) if args.tokenizer else TEXT_RULES
    front_end = front_end_for_new(args.tokenizer, EMBEDDED) if args.tokenizer else ""
    model = model_of(args)
    items, skipped = plan_items(rows, args.recordings, model, rules, front_end, tokenizer, args)
    config = SpeechCodec.load(args.codec).config if args.codec else CodecConfig()
    audio_dir = Path(os.path.realpath(args.audio_dir or args.recordings.parent))
    faults = sound_faults(items, audio_dir, config, model.max_code_len, args.jobs)
    skipped += [skipped_row(item.number, item.row["id"], *faults[item.number]) for item in items
                if item.number in faults]
    usable = [item for item in items if item.number not in faults]
    for split in ("train", "val"):
        if not any(item.split == split for item in usable):
            raise nothing_left(args.recordings, split, skipped)
    return usable, sorted(skipped, key=lambda row: row["row"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("recordings", type=Path, metavar="RECORDINGS", help="recordings.jsonl")
    parser.add_argument("--audio-dir", type=Path, help="holds all recordings (the folder of RECORDINGS)")
    parser.add_argument("--tokenizer", type=Path, help="whose letters and lengths count (any letter)")
    parser.add_argument("--codec", type=Path, help="whose frames count (the usual ones)")
    parser.add_argument("--config", type=Path, help="YAML whose gpt: section is the model to train (a small one)")
    parser.add_argument("--val-share", type=float, default=0.02, help="of sentences, if nothing is marked val (0.02)")
    parser.add_argument("--val-speakers", nargs="+", default=[], metavar="NAME", help="kept for validation (none)")
    parser.add_argument("--jobs", type=int, default=0, help="processes, 0 = one per core (0)")
    parser.add_argument("--seed", type=int, default=1234, help="of validation (1234)")
    args = parser.parse_args(argv)
    if args.jobs < 0 or not 0 < args.val_share < 1:
        raise ToolError("--jobs: give 0 or more; --val-share: a number between 0 and 1, such as 0.02")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    usable, skipped = check(parse(argv))
    splits = [item.split for item in usable]
    for row in skipped[:SHOWN]:
        warn(f"row {row['row']} ({row['id']}): {row['reason']}: {row['detail']}")
    if skipped:
        warn(f"{len(skipped)} rows would be left out:")
        for line in say_skipped(skipped):
            warn(f"  {line.partition(':')[0]}")
    info(f"{len(usable)} of {len(usable) + len(skipped)} rows can be used: {splits.count('train')} for training, "
         f"{splits.count('val')} for validation")


if __name__ == "__main__":
    run_program(main)
