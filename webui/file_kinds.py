"""What a file is, by its content, so that a README is not taken for a checkpoint. No torch; nothing is unpickled."""

from __future__ import annotations

import functools
import json
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

from webui.command_lines import PROGRAMS, Form, Problem, lines_of, split_manifest, typed
from webui.uploads import is_sound, is_transcript
from webui.workspace import Workspace

READ = 1 << 16  # bytes
CHECKPOINT = {"model", "optimizer", "step", "epoch"}  # without these nothing goes on
MOST_PICKLED = 64_000_000  # bytes of a file's structure; the numbers lie beside it
TEXTS_OF_ALL_KINDS = ("recordings", "json_lines", "text")
UNKNOWN = "other"  # its program judges it: a damaged checkpoint, for instance
WANTED: dict[tuple[str, str], tuple[str, ...]] = {
    **{("training", name): ("manifest",) for name in ("train_manifests", "val_manifests")},
    ("training", "base_checkpoint"): ("weights", "checkpoint"),
    ("training", "resume_path"): ("checkpoint", "weights"),  # what it lacks is said when it has been read
    **{(kind, "config"): ("config",) for kind in ("training", "preprocess")},
    **{(kind, "recordings"): ("recordings", "json_lines") for kind in ("filter", "check", "codec", "preprocess",
                                                                       "prepare", "evaluate")},
    **{(kind, "texts"): TEXTS_OF_ALL_KINDS for kind in ("speak", "tokenizer")},
    ("watch", "text_file"): TEXTS_OF_ALL_KINDS,
    ("tokenizer", "extend"): ("tokenizer",),
    **{(kind, "tokenizer"): ("tokenizer",) for kind in ("collect", "check", "preprocess", "training", "synthesize")},
    **{(kind, "codec"): ("codec",) for kind in ("check", "preprocess", "synthesize", "watch", "evaluate")},
    **{(kind, "checkpoint"): ("checkpoint", "weights") for kind in ("export", "synthesize", "evaluate")},
    **{(kind, "prompt"): ("sound",) for kind in ("synthesize", "watch")},
}
"""(form, field) -> what belongs there."""


def strings_of_pickle(content: bytes) -> set[str]:
    """All texts of a pickle, which is walked through but not executed."""
    try:
        return {value for _, value, _ in pickletools.genops(content) if isinstance(value, str)}
    except (ValueError, IndexError, pickle.UnpicklingError):
        return set()


def kind_of_torch_file(path: Path) -> str:
    """"checkpoint", "codec", "weights"; UNKNOWN for another archive, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"), "")
            if not name or archive.getinfo(name).file_size > MOST_PICKLED:
                return UNKNOWN
            found = strings_of_pickle(archive.read(name))
    except (OSError, zipfile.BadZipFile, EOFError, ValueError):
        return UNKNOWN
    if found >= CHECKPOINT:
        return "checkpoint"
    return "codec" if any(text.startswith("speech_codec/") for text in found) else "weights"


def kind_of_text(start: str) -> str:
    """Of a text that begins so. Pure."""
    first = next((line for line in start.splitlines() if line.strip()), "")
    if re.fullmatch(r"[A-Za-z0-9+/]+=* [0-9]+", first.strip()):
        return "tokenizer"  # .tiktoken
    try:
        row = json.loads(first)
    except ValueError:
        return "config" if re.search(r"^gpt:", start, re.MULTILINE) else "text"
    if not isinstance(row, dict):
        return "text"
    if any(name.startswith("target_") for name in row):
        return "manifest"
    return "recordings" if row.keys() >= {"text", "audio"} else "json_lines"


@functools.lru_cache(maxsize=256)
def kind_at(path: Path, size: int, changed: int) -> str:
    """kind_of() of a file as it is at a moment. Raises: OSError."""
    with path.open("rb") as handle:
        start = handle.read(READ)
    if start.startswith(b"PK\3\4"):
        return kind_of_torch_file(path)
    if start[:1] == b"\n" and start[2:3] == b"\n" and b"\x15" in start[:64]:
        return "tokenizer"  # SentencePiece's list of pieces
    if start[8:9] == b"{" and path.suffix == ".safetensors":
        return "weights"
    if is_sound(start):
        return "sound"
    if not start or not is_transcript(start, ""):
        return UNKNOWN
    return kind_of_text(start.decode("utf-8-sig", errors="replace"))


def kind_of(path: Path) -> str:
    """A key of TEXTS without its "file."; UNKNOWN also for what cannot be read."""
    try:
        status = path.stat()
        return kind_at(path, status.st_size, status.st_mtime_ns) if path.is_file() else UNKNOWN
    except OSError:
        return UNKNOWN


def kind_problems(kind: str, form: Form, workspace: Workspace) -> dict[str, Problem]:
    """The fields of a form that hold a file of another kind. The form's paths are known to be in the workspace."""
    found: dict[str, Problem] = {}
    for field in PROGRAMS[kind].fields:
        wanted = WANTED.get((kind, field.name))
        lines = lines_of(form.get(field.name)) if field.type == "manifests" else [typed(form.get(field.name))]
        for text in (split_manifest(line)[0] for line in lines if line and wanted):
            is_kind = kind_of(workspace.inside(text))
            if wanted and is_kind not in (*wanted, UNKNOWN):
                found.setdefault(field.name, ("not_a_kind", {"path": text, "wanted": wanted[0], "found": is_kind}))
    return found
