"""A dataset to the manifests that training reads, in one go: texts, tokenizer, codec, features, pairs.

Runs tools.collect_corpus, train_tokenizer, speech_codec, preprocess and build_pairs in this order, and prints the
command of each before it starts. Everything goes into --output-dir:

  texts.jsonl, tokenizer.model   only where no --tokenizer is given, and not for IndexTTS-2.5, which has its own
  speech_codec.pt                only for --features embedded without --codec
  codes.npy ... utterances.jsonl, config.yaml, train_pairs.jsonl, val_pairs.jsonl
  prepare.json                   which command made what

Run it again after a kill, or when recordings came, changed or left: what is done stays. Tokenizer and codec are never
made anew in the same folder, for data and checkpoints go with theirs; other settings for them need another folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools._common import ToolError, info, make_parser, run_program, write_text
from tools.made_with import EMBEDDED, FEATURES, INDEXTTS2, INDEXTTS25
from tools.model_folder import TIKTOKEN

FIRST_COMMAND = "python -m tools.prepare --recordings my_recordings/filtered.jsonl --output-dir my_data"
RECORD = "prepare.json"


@dataclass(frozen=True)
class Step:
    """A program of tools/, its arguments, and the file that it makes once and for all (None: it goes on by itself)."""

    name: str
    program: str
    argv: list[str]
    kept: Path | None = None

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", f"tools.{self.program}", *self.argv])


def typed(args: argparse.Namespace, *names: str) -> list[str]:
    """The flags of these settings that were given."""
    found: list[str] = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def plan(args: argparse.Namespace) -> list[Step]:
    """What is to be done, in order. Pure."""
    folder: Path = args.output_dir
    steps: list[Step] = []
    tokenizer = args.tokenizer or (args.model_dir / TIKTOKEN if args.features == INDEXTTS25 else None)
    if tokenizer is None:
        texts, tokenizer = folder / "texts.jsonl", folder / "tokenizer.model"
        steps.append(Step("texts", "collect_corpus", [str(args.recordings), "--output", str(texts)], texts))
        kind = typed(args, "model_type", "vocab_size")
        if args.features == INDEXTTS2:
            kind = ["--extend", str(args.model_dir / "bpe.model"), *typed(args, "target_size")]
        steps.append(Step("tokenizer", "train_tokenizer", ["--texts", str(texts), "--output", str(tokenizer), *kind],
                          tokenizer))
    source = ["--features", args.features, "--model-dir", str(args.model_dir)]
    if args.features == EMBEDDED:
        codec = args.codec or folder / "speech_codec.pt"
        source = ["--codec", str(codec)]
        if args.codec is None:
            rows = ["--recordings", str(args.recordings), *typed(args, "audio_dir")]
            steps.append(Step("codec", "speech_codec", ["train", *rows, "--output", str(codec),
                                                        *typed(args, "num_codes"), *(["--steps", str(
                                                            args.codec_steps)] if args.codec_steps else [])], codec))
    shared = typed(args, "audio_dir", "config", "val_share", "val_speakers", "prompts_per_speaker", "jobs", "seed")
    steps.append(Step("features", "preprocess", ["--recordings", str(args.recordings), *source, "--tokenizer",
                                                 str(tokenizer), "--output-dir", str(folder), *shared]))
    steps.append(Step("pairs", "build_pairs", ["--data-dir", str(folder), *typed(args, "seed")]))
    return steps


def read_record(path: Path) -> dict[str, str]:
    """Name of a step -> the command that made its file; {} where there is none. Raises: ToolError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: cannot be read ({error}). Delete it, or give another --output-dir") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ToolError(f"{path}: is no record of tools.prepare. Delete it, or give another --output-dir")
    return found


def done(step: Step, record: dict[str, str]) -> bool:
    """Whether a step's file is there and is kept. Raises: ToolError for one that other settings made."""
    if step.kept is None or not step.kept.exists():
        return False
    if record.get(step.name) != step.command:
        made = f"was made by `{record[step.name]}`" if step.name in record else "was not made by tools.prepare"
        raise ToolError(f"{step.kept}: {made}, and data and checkpoints go with it. Give another --output-dir, or "
                        f"--{'codec' if step.name == 'codec' else 'tokenizer'} with the file to use")
    return True


def run(steps: Sequence[Step], folder: Path) -> None:
    """Raises: ToolError of the step that fails; those before it stay done."""
    record = read_record(folder / RECORD)
    kept = [done(step, record) for step in steps]  # before anything is computed
    for number, (step, is_done) in enumerate(zip(steps, kept, strict=True), 1):
        print(f"[Step] {number}/{len(steps)} {step.name}", flush=True)
        if is_done:
            info(f"{step.kept} is there and stays")
            continue
        info(step.command)
        importlib.import_module(f"tools.{step.program}").main(step.argv)
        if step.kept:
            record[step.name] = step.command
            write_text(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises: ToolError naming the flag."""
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--recordings", type=Path, required=True, help="recordings.jsonl, or filtered.jsonl beside it")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets the files named above")
    parser.add_argument("--features", choices=FEATURES, default=EMBEDDED, help="as of tools.preprocess (embedded)")
    parser.add_argument("--model-dir", type=Path, help="folder of IndexTTS-2 or 2.5, for their features")
    parser.add_argument("--tokenizer", type=Path, help="one that is there (one is made of the texts)")
    parser.add_argument("--model-type", choices=["char", "bpe", "unigram"], help="of the new tokenizer (char)")
    parser.add_argument("--vocab-size", type=int, help="pieces of a new bpe or unigram tokenizer (2000)")
    parser.add_argument("--target-size", type=int, help="pieces of the tokenizer that extends IndexTTS-2's (its "
                        "own and 3000, or as many as the texts give)")
    parser.add_argument("--codec", type=Path, help="one that is there (one is trained on the recordings)")
    parser.add_argument("--codec-steps", type=int, help="optimizer steps of the new codec (3000)")
    parser.add_argument("--num-codes", type=int, help="size of the new codec's codebook (1024)")
    parser.add_argument("--audio-dir", type=Path, help="holds all recordings (the folder of --recordings)")
    parser.add_argument("--config", type=Path, help="YAML whose gpt: section is the model to train (a small one)")
    parser.add_argument("--val-share", type=float, help="of sentences, if nothing is marked val (0.02)")
    parser.add_argument("--val-speakers", nargs="+", metavar="NAME", help="kept for validation (none)")
    parser.add_argument("--prompts-per-speaker", type=int, help="0 = every training recording (12)")
    parser.add_argument("--jobs", type=int, help="processes, 0 = one per core (0)")
    parser.add_argument("--seed", type=int, help="of validation, prompts and pairs (1234)")
    args = parser.parse_args(argv)
    if (args.features != EMBEDDED) != bool(args.model_dir):
        raise ToolError("--features indextts2 and indextts2.5 need --model-dir, their folder; embedded takes none")
    embedded = args.features == EMBEDDED
    for names, allowed, why in (
            (("codec", "config"), embedded, "--features embedded"),
            (("codec_steps", "num_codes"), embedded and not args.codec, "a new codec for --features embedded"),
            (("model_type", "vocab_size"), embedded and not args.tokenizer, "a new tokenizer for --features embedded"),
            (("target_size",), args.features == INDEXTTS2 and not args.tokenizer,
             "a new tokenizer for --features indextts2")):
        for name in names:
            if getattr(args, name) is not None and not allowed:
                raise ToolError(f"--{name.replace('_', '-')}: goes only with {why}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    run(plan(args), args.output_dir)
    info(f"-> {args.output_dir}; next: trainers/train_gpt_v2.py --train-manifest "
         f"{args.output_dir / 'train_pairs.jsonl'}")


if __name__ == "__main__":
    run_program(main)
