"""The files of a training's output directory: their names and order, who holds it, and how its last run ended.

The rules that the page, the supervisor and the tools share with the trainer, which has its own version of each;
tests/test_run_files.py holds the two against each other. The standard library only: nobody should load torch for them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LATEST, BEST = "latest.pth", "best.pth"
OUTPUT_DIR = "training_output"  # unless one is given
MAX_WEIGHT = 1000  # of a training manifest, and of a learning rate's factor
INSPECTED = ("step", "epoch", "sample_in_epoch", "num_rows", "last_val", "best", "lr", "global_batch", "tokenizer",
             "format_version", "run_dir", "environment", "config", "made_with", "train_data", "lora_base")
"""What tools.inspect_checkpoint tells of a verified checkpoint; null for a damaged one."""


# Checkpoints


def checkpoint_step(name: str) -> int | None:
    """'model_step12.pth' -> 12; None for every other name."""
    match = re.fullmatch(r"model_step(\d+)\.pth", name)
    return int(match[1]) if match else None


def is_checkpoint_name(name: str) -> bool:
    """Whether a training writes files of this name."""
    return name in (LATEST, BEST) or checkpoint_step(name) is not None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The model_step files, newest first; [] where there is no directory."""
    files = [path for path in output_dir.glob("model_step*.pth")
             if checkpoint_step(path.name) is not None and path.exists()]  # a link to nowhere does not
    return sorted(files, key=lambda path: checkpoint_step(path.name) or 0, reverse=True)


def all_checkpoints(output_dir: Path) -> list[Path]:
    """list_checkpoints, then latest.pth and best.pth where they are."""
    links = (output_dir / LATEST, output_dir / BEST)
    return [*list_checkpoints(output_dir), *(path for path in links if path.exists())]


def resume_order(output_dir: Path, step_inside: Callable[[Path], float]) -> list[Path]:
    """The files that --resume auto tries, in its order: latest.pth and the model_step files, newest first.

    A file that is linked as both appears as latest.pth. A latest.pth of its own (copied, or its twin deleted) has the
    place of the step that is written in it: `step_inside` tells it, and math.inf for one that cannot be read.
    """
    files, latest = list_checkpoints(output_dir), output_dir / LATEST
    if not latest.exists():
        return files
    for number, file in enumerate(files):
        with suppress(FileNotFoundError):  # a running trainer has just rotated it out
            if file.samefile(latest):  # a save that was cut short before its link may have left newer ones
                return [*files[:number], latest, *files[number + 1 :]]
    step = step_inside(latest)
    newer = [file for file in files if (checkpoint_step(file.name) or 0) > step]
    return [*newer, latest, *files[len(newer) :]]


def resume_choice(output_dir: Path, entries: list[dict[str, Any]]) -> Path | None:
    """The file that --resume auto takes, where `entries` of tools.inspect_checkpoint tell which ones are verified."""
    by_path = {Path(name): entry for entry in entries for name in (entry["path"], *entry["aliases"])}

    def step_inside(path: Path) -> float:
        step = by_path[path]["step"] if path in by_path else None
        return math.inf if step is None else step

    def can_be_taken(path: Path) -> bool:
        """Whole, and not renamed: a name that promises a later step than is inside would win for ever."""
        entry = by_path.get(path, {"verified": False})
        return entry["verified"] and checkpoint_step(path.name) in (None, entry["step"])

    return next(filter(can_be_taken, resume_order(output_dir, step_inside)), None)


def newest_first(entry: dict[str, Any]) -> tuple[float, bool]:
    """Sort key for entries of tools.inspect_checkpoint. The step of a damaged file is that of its name; without one it
    comes before all."""
    names = [Path(name).name for name in (entry["path"], *entry["aliases"])]
    steps = [step for step in (entry["step"], *map(checkpoint_step, names)) if step is not None]
    return -(steps[0] if steps else math.inf), LATEST not in names


def foreign_checkpoints(output_dir: Path, resume: str) -> str:
    """Why a run with --resume `resume` ("" for none) may not write into this directory: "holds_checkpoints" (it would
    mix its files with theirs), "only_best" (auto finds nothing to go on from, but best.pth is there),
    "holds_other_checkpoints" (the one to resume lies elsewhere), or "" when it may."""
    if not all_checkpoints(output_dir):
        return ""
    if not resume:
        return "holds_checkpoints"
    if resume == "auto":
        return "" if resume_order(output_dir, lambda path: math.inf) else "only_best"
    return "" if Path(resume).resolve().parent == output_dir.resolve() else "holds_other_checkpoints"


# Command lines


def output_dir_from(output_dir: str | None, resume: str) -> Path:
    """--output-dir (None: not given), else the folder of --resume PATH, else training_output."""
    if output_dir is None and resume not in ("", "auto"):
        return Path(resume).parent
    return Path(OUTPUT_DIR if output_dir is None else output_dir)


def split_manifest(manifest: str) -> tuple[str, str | None, float]:
    """'a.jsonl::am@2' -> ('a.jsonl', 'am', 2.0). Only the last ::LANG or ::LANG@WEIGHT is a suffix, other '@' and '='
    belong to the path; a weight that is no number is NaN."""
    found = re.fullmatch(r"(.*)::([A-Za-z][A-Za-z-]*)(?:@([^:/]*))?", manifest, re.DOTALL)
    if not found:
        return manifest, None, 1.0
    path, language, weight = found.groups()
    is_number = weight is None or re.fullmatch(r"-?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", weight)
    return path, language.lower(), float(weight or 1) if is_number else math.nan


# Data


def data_fingerprint(manifests: Sequence[str]) -> tuple[str, int]:
    """(fingerprint, rows) of training manifests, as checkpoints keep them: sha256 of row ids, lengths and order, and of
    weights. Raises: OSError, ValueError, LookupError, TypeError for what is no manifest."""
    digest, mix = hashlib.sha256(), []
    for manifest in manifests:
        path, _, weight = split_manifest(manifest)
        count = 0
        with open(path, encoding="utf-8-sig") as handle:
            for text in handle:
                if text.strip():
                    row, count = json.loads(text), count + 1
                    digest.update(json.dumps([str(row["id"]), row["target_text_len"], row["target_code_len"]]).encode())
        mix.append((count, weight))
    if any(weight != 1 for _, weight in mix):
        digest.update(json.dumps(mix).encode())
    return digest.hexdigest(), sum(count for count, _ in mix)


# Processes


def read_last_exit(output_dir: Path, since: float = 0.0) -> dict[str, Any]:
    """How the last trainer there ended: reason (finished, stopped, user_error, crash), status, step (may be None).

    {} where it did not say: it was killed, still runs, or the file is torn or from before `since` (seconds since 1970).
    """
    path = output_dir / "last_exit.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_mtime >= since else None
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return content if isinstance(content.get("reason"), str) and isinstance(content.get("status"), int) else {}


def clear_last_exit(output_dir: Path) -> None:
    """So that what is there later is the next trainer's."""
    (output_dir / "last_exit.json").unlink(missing_ok=True)


def lock_holder(output_dir: Path) -> str | None:
    """What the trainer that holds OUTPUT_DIR/.lock wrote into it; None when nobody holds it.

    Only asks: taking the lock for a moment could turn a trainer away that starts just then.
    """
    try:
        with (output_dir / ".lock").open("rb") as handle:
            question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack("hhqqi4x", fcntl.fcntl(handle, fcntl.F_GETLK, question))
            if kind == fcntl.F_UNLCK:
                return None
            return handle.read(1000).decode(errors="replace").strip() or "another process"
    except OSError:  # no such file: nobody ever trained here
        return None
