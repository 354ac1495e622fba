"""The folder that the Web UI may read and write, and what it keeps there for itself in .webui/ (mode 0700)."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Every text that these modules ask the page to show, with the values that belong into it.
MESSAGES: dict[str, tuple[str, ...]] = {
    # Paths
    "path_empty": (),
    "path_impossible": ("path",),  # a NUL byte, a name that is too long, a loop of links
    "path_outside": ("path", "root"),
    "path_hidden": ("path",),  # a name that starts with a dot, .webui among them
    "no_such_file": ("path",),
    "no_such_directory": ("path",),
    "not_a_file": ("path",),
    "not_a_directory": ("path",),
    "wrong_suffix": ("path", "suffixes"),
    "not_readable": ("path",),
    "not_writable": ("path",),
    # Fields
    "required": (),
    "not_a_number": ("value",),
    "not_whole": ("value",),
    "too_small": ("value", "minimum"),
    "too_large": ("value", "maximum"),
    "not_a_choice": ("value", "choices"),
    "not_a_name": ("value",),
    "text_too_long": ("maximum",),
    "not_a_line": (),  # line breaks, or what cannot be seen
    "not_executable": ("path",),
    "goes_with_extend": (),
    "goes_with_lora": (),
    "not_with_extend": (),
    "not_with_features": ("features",),
    "folder_needed": ("download",),
    "other_model": ("path", "found", "features"),
    "tool_refuses": ("reason",),  # as the program says it
    "lengths_too_near": ("shortest", "longest", "minimum"),
    "holds_recordings": ("path", "free"),  # of another source; a folder that is not there yet
    "would_replace": ("path", "users", "free"),  # users: jobs that have read it
    "would_replace_here": ("path", "users"),
    "data_needed": (),
    "not_a_kind": ("path", "wanted", "found"),  # kinds of tools' files, keys of TEXTS without "file."
    "tokenizer_differs": ("path", "then", "now"),  # digests
    "data_changed": ("then", "now"),  # rows
    # Training
    "holds_checkpoints": ("path", "example"),  # resume it, or choose another directory
    "holds_other_checkpoints": ("path", "example"),  # of another run than the one to resume
    "only_best": ("path", "example"),
    "resume_missing": ("path", "present"),
    "resume_unchecked": ("path",),
    # Jobs
    "directory_in_use": ("path", "title", "since", "pid"),
    "directory_locked": ("path", "holder"),  # by a trainer that was not started here
    "directory_queued": ("path", "title"),  # a run in the queue will write there or read from it
    "queue_started": ("title",),
    "start_failed": ("reason",),
    "run_in_use": ("path", "title", "pid"),  # a program reads from it
    "no_such_job": ("job",),
    "job_waiting": (),
    "job_not_started": (),
    "job_starting": (),
    "job_running": ("pid",),
    "job_stopping": ("pid",),
    "job_finished": (),
    "job_finished_at_step": ("step",),
    "job_stopped": (),
    "job_stopped_at_step": ("step",),  # and can be resumed
    "job_stopped_before_training": (),
    "job_failed": ("status", "reason"),
    "job_killed": ("signal",),
    "job_lost": (),  # the machine or the process went away without a word; a training run can be resumed
    "bad_weight": ("value", "maximum"),
    "weight_of_validation": ("value",),
    "bad_factor": ("value", "maximum"),
    "factor_of_freeze": ("value",),
    # Files
    "not_a_checkpoint": ("path",),
    "not_settings": ("path",),
    "file_in_the_way": ("path",),
    "upload_type": ("path", "suffixes"),
    "upload_too_large": ("path", "megabytes"),
    "not_json_lines": ("path",),
    "upload_not_sound": ("path",),  # whatever its name says
    "upload_not_text": ("path",),
    "zip_damaged": ("path",),
    "zip_too_large": ("path",),
    # The clips of a data set
    "clips_mark_needed": ("mark",),
    "record_nothing": (),
}


class Refused(Exception):
    """Something the page must not do, or the user must mend: a key of MESSAGES and the values for its text."""

    def __init__(self, key: str, **values: Any) -> None:
        assert set(values) == set(MESSAGES[key]), (key, values)
        super().__init__(key, values)
        self.key, self.values = key, values


def as_text(value: object) -> str:
    """As text that a browser can be sent: a file name that is not UTF-8, or half a character, becomes "?"."""
    return str(value).encode(errors="replace").decode()


def is_text_name(name: str) -> bool:
    """Whether the page can show a file's name; old zip archives make names that are not UTF-8."""
    return as_text(name) == name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when it is missing, torn, unreadable or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Any, mode: int = 0o600) -> None:
    """Whole or not at all, readable by this user only. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8") as handle:
            json.dump(content, handle, ensure_ascii=False, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Workspace:
    """Everything that a form may name lies in `root`, a resolved directory; by default the repository."""

    root: Path

    @classmethod
    def open(cls, directory: Path | str = ROOT) -> Workspace:
        """Makes the directory and its .webui/ where they are missing. Raises: OSError."""
        root = Path(directory).expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        workspace = cls(root)
        workspace.private.mkdir(mode=0o700, exist_ok=True)
        workspace.private.chmod(0o700)
        return workspace

    @property
    def private(self) -> Path:
        """Jobs, password and secret; no field and no file route reaches it."""
        return self.root / ".webui"

    def inside(self, text: str, must_exist: bool = False) -> Path:
        """A path as typed, relative to the workspace or absolute, with links resolved; "~" is a letter like any other.

        Raises: Refused for a path outside the workspace, for a hidden one (.webui/, .git/), and for a missing one
        where it must exist.
        """
        typed = as_text(text or "").strip()
        if not typed:
            raise Refused("path_empty")
        try:
            path = (self.root / typed).resolve()
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as error:
            raise Refused("path_impossible", path=typed) from error
        if not path.is_relative_to(self.root):
            raise Refused("path_outside", path=typed, root=str(self.root))
        if not is_text_name(str(path.relative_to(self.root))):  # behind a link
            raise Refused("path_impossible", path=typed)
        if any(part.startswith(".") for part in path.relative_to(self.root).parts):
            raise Refused("path_hidden", path=typed)
        if must_exist and not exists:
            raise Refused("no_such_file", path=typed)
        return path

    def show(self, path: Path | str) -> str:
        """The path as a user would type it: relative to the workspace where it lies in it."""
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def load_or_make_credentials(workspace: Workspace) -> tuple[str, str]:
    """(user, password) for a public address: random at the first start, the same ones at the next."""
    path = workspace.private / "auth.json"
    saved = read_json(path)
    if all(isinstance(saved.get(key), str) and saved[key] for key in ("user", "password")):
        return saved["user"], saved["password"]
    made = {"user": f"amharic-{secrets.token_hex(3)}", "password": secrets.token_urlsafe(18)}
    write_json(path, made)
    return made["user"], made["password"]


def load_or_make_secret(workspace: Workspace) -> str:
    """The secret that encrypts drafts of forms in the browser's storage (gr.BrowserState)."""
    path = workspace.private / "secret.json"
    saved = read_json(path)
    if isinstance(saved.get("secret"), str) and saved["secret"]:
        return saved["secret"]
    secret = secrets.token_urlsafe(32)
    write_json(path, {"secret": secret})
    return secret


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches a server bound to `host` (None: Gradio's own default, 127.0.0.1)."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def save_settings(workspace: Workspace, text: str, kind: str, form: dict[str, Any]) -> Path:
    """Writes a form as JSON to the file that was typed (.json is added). Raises: Refused."""
    path = settings_path(workspace, text)
    if path.exists() and not is_settings(read_json(path)):
        raise Refused("file_in_the_way", path=workspace.show(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kind": kind, "form": form}, mode=0o644)
    except OSError as error:
        raise Refused("not_writable", path=workspace.show(path)) from error
    return path


def load_settings(workspace: Workspace, text: str, kind: str, fields: Collection[str]) -> dict[str, Any]:
    """The saved values of `fields`; what is not in the file is left out. Raises: Refused."""
    path = settings_path(workspace, text)
    if not path.is_file():
        raise Refused("no_such_file", path=workspace.show(path))
    saved = read_json(path)
    if not is_settings(saved) or saved["kind"] != kind:
        raise Refused("not_settings", path=workspace.show(path))
    plain = (str, bool, int, float, list, type(None))
    return {name: value for name, value in saved["form"].items() if name in fields and isinstance(value, plain)}


def settings_path(workspace: Workspace, text: str) -> Path:
    path = workspace.inside(text)
    return path if path.suffix == ".json" else workspace.inside(f"{path}.json")


def is_settings(content: dict[str, Any]) -> bool:
    return isinstance(content.get("kind"), str) and isinstance(content.get("form"), dict)
