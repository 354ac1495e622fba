"""What every program of tools/ shares: errors of one line, whole-or-nothing output files, JSON lines, progress."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class ToolError(Exception):
    """A fault that the user can mend. The message is one line: which file, which place in it, what to do."""


def run_program(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs main(None); a ToolError or a Ctrl-C ends the process with one line instead of stack frames."""
    try:
        main(None)
    except ToolError as error:
        print(f"[Error] {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("[Info] Stopped; files that were not finished have been removed", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


class OneLineParser(argparse.ArgumentParser):
    """Takes flags by their whole name only; a mistake is a ToolError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ToolError(f"{message}. `{self.prog} --help` lists the flags")


def make_parser(doc: str | None, first_command: str) -> OneLineParser:
    """A parser whose help opens with the module's docstring and ends with a first command to try."""
    module = first_command.rpartition("python -m ")[2].split()[0]
    return OneLineParser(prog=f"python -m {module}", description=doc, epilog=f"first command:\n  {first_command}",
                         formatter_class=argparse.RawDescriptionHelpFormatter)


def info(message: str) -> None:
    """Prints one flushed line, so that a log file or a browser tab shows it at once."""
    print(f"[Info] {message}", flush=True)


def warn(message: str) -> None:
    """Prints one flushed line about something that was skipped or looks wrong."""
    print(f"[Warn] {message}", flush=True)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Around writes into a folder: a full disk or a missing right becomes a ToolError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ToolError(f"{error.filename or folder}: cannot be written ({error.strerror or error}). Free some disk "
                        "space or mend the folder's rights, then run the same command again") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder and with the same suffix; it becomes `path` only on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One compact JSON object per line; Ethiopic letters stay readable."""
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    write_text(path, "".join(lines))


def read_jsonl(path: Path, required: Sequence[str], remedy: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, each with the `required` keys. Raises ToolError naming file and line."""
    if not Path(path).is_file():
        raise ToolError(f"{path}: no such file. {remedy}")
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except UnicodeDecodeError as error:
        raise ToolError(f"{path}: not UTF-8 text at byte {error.start}. {remedy}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ToolError(f"{path}, line {number}: not JSON ({error.msg}). {remedy}") from error
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing:
            raise ToolError(f"{path}, line {number}: missing {', '.join(missing)}. {remedy}")
        rows.append(row)
    if not rows:
        raise ToolError(f"{path}: holds no rows. {remedy}")
    return rows


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Progress:
    """Prints "[Progress] name: done/total" after two seconds, then every ten, and at the end of a long wait."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.start = time.monotonic()
        self.due = self.start + 2.0

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now < self.due and (done < self.total or now - self.start < 2.0):
            return
        self.due = now + 10.0
        remaining = (now - self.start) / max(done, 1) * (self.total - done)
        text = f"[Progress] {self.name}: {done}/{self.total}, {now - self.start:.0f} s, about {remaining:.0f} s left"
        print(text + (f", {note}" if note else ""), flush=True)
