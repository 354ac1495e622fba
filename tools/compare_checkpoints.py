"""Speaks one text with two checkpoints, in the same voice and with the same settings, to hear which is better.

Writes a.wav (--checkpoint), b.wav (--other) and their pictures into --output-dir. The same seed draws for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools._common import ToolError, info, make_parser, run_program
from tools.codes_to_sound import add_sound_arguments, sound_of
from tools.generation import Synthesizer, add_sampling_arguments, sampling_of
from tools.synthesize import synthesize

FIRST_COMMAND = ("python -m tools.compare_checkpoints --checkpoint training_output/best.pth "
                 "--other training_output/latest.pth --text 'ሰላም ለዓለም' "
                 "--prompt processed_data/audio/new026_am.flac --output-dir build/ab")
NAMES = ("a", "b")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the one that says a.wav")
    parser.add_argument("--other", type=Path, required=True, help="the one that says b.wav")
    parser.add_argument("--text", required=True, help="the text to speak")
    parser.add_argument("--prompt", type=Path, required=True, help="a recording of the voice to speak in")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets the two sounds")
    add_sound_arguments(parser, "the training data")
    parser.add_argument("--tokenizer", type=Path, help="of both (each checkpoint's own)")
    parser.add_argument("--language", default="am", help="of --text (am)")
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    there = [name for name in NAMES if (args.output_dir / f"{name}.wav").exists()]
    if there:
        raise ToolError(f"--output-dir {args.output_dir}: has {there[0]}.wav already. Choose another folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    sampling, sound = sampling_of(args), sound_of(args)
    for name, checkpoint in zip(NAMES, (args.checkpoint, args.other), strict=True):
        info(f"{name}: {checkpoint}")
        synthesize(Synthesizer(checkpoint, sound, args.tokenizer), args.text, args.prompt,
                   args.output_dir / f"{name}.wav", sampling, args.language)


if __name__ == "__main__":
    run_program(main)
