"""What is in a checkpoint, or in an output directory's checkpoints, and is it whole?

Prints a table, newest first: step, epoch, position (samples of the epoch done, of all rows), validation loss, best
validation loss, size, format, and "verified" or what is wrong. Every digest is computed again, by the trainer's own
reader. For a directory it also says which file --resume auto would take, and what a killed save left behind.
--json prints the same for programs. Exit status 0: all is verified; 1: something is broken, or nothing is there.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tools._common import ToolError, info, make_parser, run_program
from tools.made_with import MadeWith, of_checkpoint
from tools.run_files import INSPECTED, all_checkpoints, newest_first, resume_choice
from trainers.train_gpt_v2 import ForeignCheckpoint, ResumeError, read_checkpoint, read_resumable

FIRST_COMMAND = "python -m tools.inspect_checkpoint training_output"
HEADER = ("file", "step", "epoch", "position", "val loss", "best", "size", "format", "state")


def contents_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a verified checkpoint that tell where its run stands; keys: INSPECTED."""
    config, environment = checkpoint["config"], checkpoint["environment"]
    return {
        "step": checkpoint["step"], "epoch": checkpoint["epoch"], "sample_in_epoch": checkpoint["sample_in_epoch"],
        "num_rows": checkpoint["train_data"]["rows"], "train_data": checkpoint["train_data"],
        "last_val": checkpoint["last_val"], "best": checkpoint["best"], "lr": checkpoint["scheduler"]["_last_lr"][0],
        "global_batch": config["batch_size"] * config["grad_accumulation"] * environment["world_size"],
        "tokenizer": checkpoint["tokenizer"], "format_version": checkpoint["format_version"],
        "run_dir": checkpoint["run_dir"], "environment": environment, "config": config,
        "made_with": of_checkpoint(checkpoint), "lora_base": checkpoint.get("lora_base"),
    }


def contents_of_any(path: Path) -> dict[str, Any]:
    """Of a checkpoint of ours, or of a fork's that can be gone on from. Raises: ResumeError."""
    try:
        return contents_of(read_checkpoint(path))
    except ForeignCheckpoint:
        fork = read_resumable(path)
        return {"step": fork["step"], "epoch": fork["epoch"], "num_rows": fork["rows"] or None, "lr": fork["lr"],
                "format_version": "a fork's", "config": fork["config"], "made_with": {}}


def made_with_of_weights(path: Path) -> MadeWith:
    """Of an export or a base file, which are no checkpoints; {} where it is not recorded."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError):
        return {}
    return of_checkpoint(content) if isinstance(content, dict) else {}


def inspect_file(names: Sequence[Path]) -> dict[str, Any] | None:
    """Reads and verifies one file; `names` are all its paths. Returns None for a file that is gone by now."""
    path, *aliases = names
    entry: dict[str, Any] = {"path": str(path), "aliases": [str(alias) for alias in aliases],
                             **dict.fromkeys(INSPECTED)}
    try:
        stat = path.stat()
        entry |= {"bytes": stat.st_size, "mtime": stat.st_mtime}
        if not path.is_file():
            raise ResumeError(f"{path}: not a file")
        if stat.st_size == 0:
            raise ResumeError(f"{path}: the file is empty")
        return entry | contents_of_any(path) | {"verified": True, "problem": None}
    except FileNotFoundError:
        return None
    except ResumeError as error:
        if not path.exists():
            return None
        if str(error).startswith("Checkpoint missing required keys"):
            entry["made_with"] = made_with_of_weights(path)
        return entry | {"verified": False, "problem": str(error)}


def group_names(paths: Sequence[Path]) -> list[list[Path]]:
    """Paths that are one file (hard or symbolic links) in one list, the most telling name first."""
    groups: dict[tuple[int, int], list[Path]] = {}
    for path in paths:
        with suppress(FileNotFoundError):  # a running trainer has just rotated it out
            stat = path.stat()
            groups.setdefault((stat.st_dev, stat.st_ino), []).append(path)
    return list(groups.values())


@contextmanager
def ticking(text: str) -> Iterator[None]:
    """Says on stderr what takes so long: after two seconds, then every ten."""
    finished, start = threading.Event(), time.monotonic()

    def tick() -> None:
        pause = 2.0
        while not finished.wait(pause):
            pause = 10.0
            print(f"[Progress] {text}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def inspect_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One entry per file, newest first; one whose step cannot be known comes before all."""
    groups, entries = group_names(paths), []
    for number, names in enumerate(groups, 1):
        size = human_size(names[0].stat().st_size) if names[0].exists() else ""
        with ticking(f"verifying {names[0]} ({size}, file {number} of {len(groups)})"):
            entry = inspect_file(names)
        if entry is not None:
            entries.append(entry)
    return sorted(entries, key=newest_first)


def inspect(paths: Sequence[Path]) -> dict[str, Any]:
    """The report: checkpoints, the file that --resume auto would take, leftovers of killed saves.

    Raises: ToolError for a path that cannot be looked at, and for a directory among several paths.
    """
    output_dir = paths[0]
    try:
        for path in paths:
            path.stat()
            if path.is_dir() and len(paths) > 1:
                raise ToolError(f"{path} is a directory. Give one directory, or files")
        if not output_dir.is_dir():
            return {"checkpoints": inspect_files(paths), "resume": None, "leftovers": []}
        leftovers = [name for name in os.listdir(output_dir) if name.startswith(".") and name.endswith(".pth.partial")]
        entries = inspect_files(all_checkpoints(output_dir))
        chosen = resume_choice(output_dir, entries)
    except OSError as error:
        raise ToolError(f"{error.filename}: {error.strerror}. Give checkpoint files or the --output-dir of a run, and "
                        "as a user who may read them") from error
    return {"checkpoints": entries, "resume": str(chosen) if chosen else None,
            "leftovers": [str(output_dir / name) for name in sorted(leftovers)]}


def human_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"


def table_row(entry: dict[str, Any]) -> list[str]:
    names = [Path(name).name for name in (entry["path"], *entry["aliases"])]
    size = human_size(entry["bytes"])
    if not entry["verified"]:
        reason = entry["problem"].removeprefix(entry["path"]).lstrip(": ").removeprefix("is ")
        return [" = ".join(names), "?", "?", "?", "?", "?", size, "?", reason]
    losses = [f"{value['loss']:.6f}" if value else "-" for value in (entry["last_val"], entry["best"])]
    position = f"{entry['sample_in_epoch']} of {entry['num_rows']}" if entry["environment"] else "-"
    return [" = ".join(names), str(entry["step"]), str(entry["epoch"]), position, *losses, size,
            str(entry["format_version"]), "verified"]


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def resume_state(entry: dict[str, Any]) -> str:
    """What a run that goes on from here starts with, in one line."""
    environment = entry["environment"]
    if not environment:
        return (f"step {entry['step']}, epoch {entry['epoch']}, learning rate {entry['lr']:.4g}, written by a fork's "
                "trainer")
    base = entry["lora_base"]
    lora = f", LoRA of rank {entry['config']['lora_rank']} on {base['path']}" if base else ""
    return (f"step {entry['step']}, epoch {entry['epoch']}, learning rate {entry['lr']:.4g}, global batch "
            f"{entry['global_batch']}, tokenizer {Path(entry['tokenizer']['path']).name}{lora}, written by torch "
            f"{environment['torch']} on {environment['device']} (threads {environment['threads']}, processes "
            f"{environment['world_size']})")


def print_report(report: dict[str, Any], path: Path) -> None:
    entries = report["checkpoints"]
    for line in format_table([HEADER, *map(table_row, entries)]) if entries else ():
        print(line)
    for leftover in report["leftovers"]:
        info(f"{leftover}: a save in progress, or left by a killed one; the next start removes it")
    if not path.is_dir():
        for entry in entries:
            if entry["verified"]:
                info(f"{entry['path']}: {resume_state(entry)}")
    elif report["resume"]:
        chosen = next(e for e in entries if report["resume"] in (e["path"], *e["aliases"]))
        info(f"--resume auto takes {report['resume']}: {resume_state(chosen)}")
    elif entries:
        info("--resume auto would stop with an error: no latest.pth or model_step*.pth is whole")


def plain(value: Any) -> Any:
    """JSON has no numbers that are not finite: a loss that was none is null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an output directory, or checkpoint files")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"checkpoints": [], "resume": None, "leftovers": []}
    try:
        report = inspect(args.paths)
    finally:
        if args.json:  # also beside an error message, so that a program always finds its object
            print(json.dumps(plain(report), ensure_ascii=False, allow_nan=False))
    if not args.json:
        print_report(report, args.paths[0])
    broken = [entry for entry in report["checkpoints"] if not entry["verified"]]
    if not report["checkpoints"]:
        raise ToolError(f"{args.paths[0]}: no checkpoint there (latest.pth, best.pth, model_step*.pth). Check the "
                        "path, or start training")
    if broken:
        raise ToolError(f"{len(broken)} of {len(report['checkpoints'])} files cannot be used: "
                        + ", ".join(entry["path"] for entry in broken))


if __name__ == "__main__":
    run_program(main)
