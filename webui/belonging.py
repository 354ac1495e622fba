"""Files of a form that were not made for each other, said beside the field before anything starts.

The programs refuse them too. Data sets are read here, checkpoints by the background command of CheckpointTable: until
it has answered nothing is said.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools._common import ToolError, sha256_of
from tools.made_with import EMBEDDED, KEYS, OF_SOUND, MadeWith, differences, of_config, of_manifest
from tools.run_files import LATEST, all_checkpoints, data_fingerprint, lock_holder, split_manifest
from webui.command_lines import Form, Problem, lines_of, typed
from webui.readers import CheckpointTable
from webui.workspace import ROOT, Workspace

AT_ONCE = 10_000_000  # bytes of manifests that are read while somebody waits
OF_MODEL = ("features", "num_codes", "codes_per_second")
"""What a model's configuration decides."""
TRAIN_MANIFEST, CODEC = ROOT / "processed_data/train_pairs.jsonl", ROOT / "processed_data/speech_codec.pt"
CHECKPOINT_FIELD = {"synthesize": "checkpoint", "evaluate": "checkpoint", "watch": "watch"}


def problem_of(name_a: str, a: MadeWith, name_b: str, b: MadeWith, keys: Sequence[str] = tuple(KEYS)) -> Problem | None:
    found = differences(name_a, a, name_b, b, keys)
    return ("do_not_belong", {"differences": "; ".join(found)}) if found else None


@functools.lru_cache(maxsize=64)
def digest_at(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def digest(path: Path, key: str) -> MadeWith:
    """{key: sha256} of a file as it is now; {} for one that is not there."""
    try:
        status = path.stat()
        return {key: digest_at(path, status.st_size, status.st_mtime_ns)}
    except OSError:
        return {}


def checkpoint_record(path: Path, table: CheckpointTable) -> MadeWith | None:
    """None while it is not known, and for one that a trainer is about to replace: reading it would only slow that
    down."""
    if not path.is_file() or lock_holder(path.parent):
        return None
    found = table.look_at(path.parent, [path]).checkpoints
    return found[0]["made_with"] if found else None


def training_problems(form: Form, workspace: Workspace, table: CheckpointTable) -> dict[str, Problem]:
    """Of Tab 6: the manifests among each other, and with tokenizer, --config and --base-checkpoint. The form's paths
    are known to be in the workspace."""
    goes_on = bool(form.get("resume")) and bool(all_checkpoints(workspace.inside(typed(form.get("output_dir")))))
    named = [(name, workspace.inside(split_manifest(line)[0])) for name in ("train_manifests", "val_manifests")
             for line in lines_of(form.get(name))]
    if not named:  # on resume the checkpoint names them
        return {}
    found: list[tuple[str, Problem | None]] = []
    (_, first), *others = named
    data, data_name = of_manifest(first), workspace.show(first)
    for name, path in others:
        found.append((name, problem_of(data_name, data, workspace.show(path), of_manifest(path))))
    if typed(form.get("tokenizer")):
        path = workspace.inside(typed(form.get("tokenizer")))
        found.append(("tokenizer", problem_of(data_name, data, workspace.show(path), digest(path, "tokenizer_sha256"))))
    if typed(form.get("config")):
        path = workspace.inside(typed(form.get("config")))
        found.append(("config", problem_of(data_name, data, workspace.show(path), of_config(path), OF_MODEL)))
    if typed(form.get("base_checkpoint")) and not goes_on:  # on resume it is not read
        path = workspace.inside(typed(form.get("base_checkpoint")))
        found.append(("base_checkpoint", base_problem(data_name, data, workspace.show(path),
                                                      checkpoint_record(path, table))))
    return {name: problem for name, problem in reversed(found) if problem}


def resume_problems(form: Form, workspace: Workspace, entry: dict[str, Any], name: str, rows: DataRows
                    ) -> dict[str, Problem]:
    """In what the checkpoint (an entry of CheckpointTable, shown as `name`) does not fit the data and the tokenizer of
    the form; what the form leaves to the checkpoint fits, and what is not recorded is not compared."""
    found: dict[str, Problem] = {}
    tokenizer, then = typed(form.get("tokenizer")), (entry["tokenizer"] or {}).get("sha256")
    if tokenizer and then:
        now = digest(workspace.inside(tokenizer), "tokenizer_sha256").get("tokenizer_sha256", then)
        if now != then:
            found["tokenizer"] = "tokenizer_differs", {"path": Path(entry["tokenizer"]["path"]).name, "then": then[:12],
                                                       "now": now[:12]}
    lines = [f"{workspace.inside(split_manifest(line)[0])}{line[len(split_manifest(line)[0]):]}"
             for line in lines_of(form.get("train_manifests"))]
    if not lines:
        return found
    data, shown_as = of_manifest(lines[0]), workspace.show(split_manifest(lines[0])[0])
    differing = problem_of(shown_as, data, name, entry["made_with"] or {}, [key for key in KEYS if key !=
                                                                           "tokenizer_sha256"])
    if differing:
        found["train_manifests"] = differing
    elif not form.get("accept_changed_data") and not form.get("eval_only"):
        now_rows, known = rows.look(lines), entry.get("train_data") or {}
        if now_rows and known.get("fingerprint") and known["fingerprint"] != now_rows[0]:
            found["train_manifests"] = "data_changed", {"then": known["rows"], "now": now_rows[1]}
    return found


class DataRows:
    """Fingerprints of training data, by files' sizes and times; of large ones worked out in the background."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[str, int] | None] = {}
        self.lock = threading.Lock()

    def look(self, lines: Sequence[str]) -> tuple[str, int] | None:
        """(fingerprint, rows) of manifests with absolute paths; None while it is not known, or cannot be."""
        try:
            marks = [(line, (status := Path(split_manifest(line)[0]).stat()).st_size, status.st_mtime_ns)
                     for line in lines]
        except OSError:
            return None
        key = tuple(marks)
        with self.lock:
            if key in self.known:
                return self.known[key]
            self.known = {**dict(list(self.known.items())[-7:]), key: None}
        work = threading.Thread(target=self.read, args=(key, list(lines)), daemon=True)
        work.start()
        if sum(size for _, size, _ in marks) < AT_ONCE:
            work.join()
        return self.known.get(key)

    def read(self, key: Any, lines: list[str]) -> None:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # the trainer says what is wrong
            self.known[key] = data_fingerprint(lines)


def training_choice(form: Form, workspace: Workspace, table: CheckpointTable) -> list[Problem]:
    """What Tab 6 would train on what, in words: keys of TEXTS and their values. Raises: Refused, ToolError."""
    goes_on = bool(form.get("resume")) and bool(all_checkpoints(workspace.inside(typed(form.get("output_dir")))))
    lines = lines_of(form.get("train_manifests"))
    if not lines:
        return [("chosen.resumed" if goes_on else "chosen.no_data", {})]
    manifest = workspace.inside(split_manifest(lines[0])[0])
    data = of_manifest(manifest)
    found = [("chosen.data" if data.get("features") else "chosen.data_unknown",
              {"path": workspace.show(manifest), **choice_values(data)})]
    if goes_on:
        return [*found, ("chosen.weights_resumed", {})]
    base, is_found = base_of(form, manifest, workspace)
    if base is None:
        return [*found, ("chosen.scratch", {})]
    record = checkpoint_record(base, table) if base.is_file() else {}
    key = "chosen.base_found" if is_found else "chosen.base"
    values = {"path": workspace.show(base), **choice_values(record or {})}
    if record is None:
        return [*found, (key, values), ("chosen.reading", {})]
    return [*found, (key, values), ("chosen.base_made" if record.get("features") else "chosen.base_unknown", values)]


def choice_values(record: MadeWith) -> dict[str, str]:
    """What is recorded, for a reader; "?" for what is not."""
    rate = record.get("codes_per_second")
    return {"features": record.get("features", "?"), "codec": record.get("codec_sha256", "?")[:12],
            "codes": str(record.get("num_codes", "?")), "rate": "?" if rate is None else f"{rate:.4g}"}


def base_of(form: Form, manifest: Path, workspace: Workspace) -> tuple[Path | None, bool]:
    """The base checkpoint, and whether it is one that the trainer finds: checkpoints/gpt.pth, where the model is that
    of checkpoints/config.yaml."""
    if typed(form.get("base_checkpoint")):
        return workspace.inside(typed(form.get("base_checkpoint"))), False
    released = ROOT / "checkpoints" / "gpt.pth"
    is_taken = not typed(form.get("config")) and not manifest.with_name("config.yaml").is_file() and (
        released.with_name("config.yaml").is_file() and released.is_file())
    return (released if is_taken else None), is_taken


def base_problem(data_name: str, data: MadeWith, name: str, record: MadeWith | None) -> Problem | None:
    """None for one that is not read yet. One of which nothing is known must not be spoiled by this data."""
    if record is None:
        return None
    if data.get("features") == EMBEDDED and "codec_sha256" not in record:
        return "weights_unknown", {"path": name, "data": data_name}
    return problem_of(data_name, data, name, record)


def voice_problems(kind: str, form: Form, workspace: Workspace, table: CheckpointTable) -> dict[str, Problem]:
    """Of Tab 8: the codec, the tokenizer and the data set to judge by, with the checkpoint."""
    field = CHECKPOINT_FIELD[kind]
    path = workspace.inside(typed(form.get(field)))
    record = checkpoint_record(path / LATEST if kind == "watch" else path, table)
    codec = workspace.inside(typed(form.get("codec"))) if typed(form.get("codec")) else CODEC
    of_codec = digest(codec, "codec_sha256")
    found: list[tuple[str, Problem | None]] = []
    if kind == "evaluate":
        config = workspace.inside(typed(form.get("data_dir"))) / "config.yaml"
        data = of_manifest(config)
        found.append(("data_dir", problem_of(workspace.show(config), data, workspace.show(codec), of_codec)))
        found.append(("data_dir", problem_of(workspace.show(config), data, workspace.show(path), record or {},
                                             OF_SOUND)))
    if typed(form.get("model_dir")):  # sound comes from the folder, which the program compares
        return {}
    found.append(("codec" if typed(form.get("codec")) else field,
                  problem_of(workspace.show(path), record or {}, workspace.show(codec), of_codec)))
    if typed(form.get("tokenizer")):
        tokenizer = workspace.inside(typed(form.get("tokenizer")))
        found.append(("tokenizer", problem_of(workspace.show(path), record or {}, workspace.show(tokenizer),
                                              digest(tokenizer, "tokenizer_sha256"))))
    return {name: problem for name, problem in reversed(found) if problem}


def belonging_problems(kind: str, form: Form, workspace: Workspace, table: CheckpointTable) -> dict[str, Problem]:
    """For a form whose fields are well by themselves; {} for programs that are not named here."""
    try:
        if kind == "training":
            return training_problems(form, workspace, table)
        return voice_problems(kind, form, workspace, table) if kind in CHECKPOINT_FIELD else {}
    except ToolError as error:  # a config.yaml that cannot be read
        field = {"training": "train_manifests", "evaluate": "data_dir"}.get(kind, "checkpoint")
        return {field: ("record_unreadable", {"reason": str(error)})}
