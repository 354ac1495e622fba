"""The weights of a training checkpoint alone, as IndexTTS2 loads them: a third of the size, no optimizer state.

The file holds {"model": tensors, "made_with": values}: tensors under IndexTTS2's names and order, float32, and what
their training data was made with (tools/made_with.py). It loads with weights_only=True. A run
that started from IndexTTS2's gpt.pth carries its conditioning modules along, and they are in the file too; without
them (trained from scratch) IndexTTS2 cannot use it, which is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tools._common import ToolError, atomic_path, info, make_parser, run_program, writing_to
from tools.made_with import of_checkpoint, of_older_keys, require_same
from tools.run_files import is_checkpoint_name
from trainers.train_gpt_v2 import CARRIED_PREFIXES, ResumeError, read_checkpoint

FIRST_COMMAND = "python -m tools.export_checkpoint training_output/best.pth --output gpt_amharic.pth"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("checkpoint", type=Path, help="a training checkpoint, such as training_output/best.pth")
    parser.add_argument("--output", type=Path, required=True, help="the file to write, such as gpt_amharic.pth")
    args = parser.parse_args(argv)
    if is_checkpoint_name(args.output.name):
        raise ToolError(f"--output {args.output}: a training writes files of this name, and could not go on from an "
                        "export. Choose another name, such as gpt_amharic.pth")
    try:
        checkpoint = read_checkpoint(args.checkpoint)
    except ResumeError as error:
        raise ToolError(str(error)) from error
    tensors, record = checkpoint["model"], of_checkpoint(checkpoint)
    require_same(f"{args.checkpoint} itself", record, "the manifests and tokenizer that it names",
                 of_older_keys(checkpoint), remedy="Take another checkpoint: this one was put together from two")
    if args.output.exists() and args.output.samefile(args.checkpoint):
        raise ToolError(f"--output {args.output}: that is the checkpoint itself. Choose another name")
    try:
        with writing_to(args.output), atomic_path(args.output, durable=True) as temporary:
            with temporary.open("wb") as handle:
                torch.save({"model": tensors, "made_with": record}, handle)
    except RuntimeError as error:  # PyTorch's own for a full disk
        raise ToolError(f"{args.output}: could not be written ({error}). Free some disk space") from error
    info(f"{args.output}: step {checkpoint['step']}, {len(tensors)} tensors, {args.output.stat().st_size / 1e6:.1f} MB")
    if not any(name.startswith(CARRIED_PREFIXES) for name in tensors):
        info("No conditioning modules in it: the run started from scratch, so IndexTTS2 cannot use this file")


if __name__ == "__main__":
    run_program(main)
