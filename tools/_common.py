"""What every program of tools/ shares: errors of one line, whole-or-nothing output files, JSON lines, progress."""

from __future__ import annotations

import argparse
import codecs
import errno
import functools
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

try:
    from orjson import loads as read_json
except ImportError:  # benchmarks.gpu, on a rented machine's own Python: slower, else alike
    from json import loads as read_json  # type: ignore[assignment]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


class ToolError(Exception):
    """A fault that the user can mend. The message is one line: which file, which place in it, what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a program as Ctrl-C does, so that its temporary files go."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def run_program(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs main(None); what a user can mend, or a signal, ends the process with one line instead of stack frames.

    Exit status: 1 after a ToolError or a file that cannot be read or written; 130 after Ctrl-C, 143 after SIGTERM,
    141 when nobody reads standard output any more. A name that the terminal cannot show is printed escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = signal.getsignal(signal.SIGTERM)
    if handler == signal.SIG_DFL:  # one that was ignored at start stays so
        signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            main(None)
        except SystemExit as end:  # argparse's after the help
            if end.code:
                raise
        print(end="", flush=True)
    except ToolError as error:
        _end(f"[Error] {error}", 1)
    except KeyboardInterrupt as stop:
        _end("[Info] Stopped; files that were not finished have been removed",
             128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.errno is None:  # not the system's: a fault of ours
            raise
        _end(f"[Error] {describe_os_error(error)}", 1)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def remedy_for(error: OSError) -> str:
    """What helps against an error of the file system."""
    if error.errno in NO_SPACE:
        return "Free some disk space, then run the same command again"
    if error.errno in NO_RIGHT:
        return "Mend the rights of the file or its folder, or name another one, then run the same command again"
    return "Mend this or name another file, then run the same command again"


def describe_os_error(error: OSError) -> str:
    """One line: the file where it is known, the reason, the remedy."""
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror}. {remedy_for(error)}"


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


def counted(number: int, thing: str) -> str:
    """"1 speaker", "2 speakers"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


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
    except BrokenPipeError:  # of standard output, which run_program knows
        raise
    except OSError as error:
        raise ToolError(f"{error.filename or folder}: cannot be written ({error.strerror or error}). "
                        f"{remedy_for(error)}") from error


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; or no process id at all, so no file of ours
        return True
    return True


@functools.cache
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """Temporary files of killed processes by the name they would have got. Listed once: a folder may hold thousands."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob(".*.tmp*"):
        match = re.fullmatch(r"\.(.+)\.(\d+)\.tmp(\.[^.]*)?", path.name)
        if match and not _is_running(int(match[2])):
            found.setdefault(match[1] + (match[3] or ""), []).append(path)
    return found


@contextmanager
def atomic_path(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder and with the same suffix; it becomes `path` only on success.

    Removes what a killed process left of the same file. `durable`: it survives a power cut from then on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _leftovers(path.parent.resolve()).pop(path.name, []):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One compact JSON object per line; Ethiopic letters stay readable."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.writelines(encode(row) + "\n" for row in rows)


def _lines(path: Path, remedy: str) -> Iterator[bytes]:
    """One at a time. Raises: ToolError for what is not UTF-8."""
    start = 0
    with path.open("rb") as handle:
        for line in handle:  # a text may hold other line ends
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ToolError(f"{path}: not UTF-8 text at byte {start + error.start}. {remedy}") from error
            yield line if start else line.removeprefix(codecs.BOM_UTF8)
            start += len(line)


def _read_row(line: bytes) -> Any:
    """What json makes of it, or says is wrong with it; orjson is quick, and refuses some of what json takes."""
    try:
        row = read_json(line)
    except ValueError:
        row = json.loads(line)
    if b"\\u" in line:  # half of a surrogate pair could not be written again
        json.dumps(row, ensure_ascii=False).encode()
    return row


def read_jsonl(path: Path, required: Sequence[str], remedy: str,
               check: Callable[[dict[str, Any]], str] = lambda row: "") -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, each with the `required` keys. Raises ToolError naming file and line.

    `check` returns what is wrong with a row and what to do, "" for a good one.
    """
    if Path(path).is_dir():
        raise ToolError(f"{path}: is a directory, not a file. {remedy}")
    if not Path(path).is_file():
        raise ToolError(f"{path}: no such file. {remedy}")
    rows = []
    for number, line in enumerate(_lines(Path(path), remedy), 1):
        if line.isspace():
            continue
        try:
            row = _read_row(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ToolError(f"{path}, line {number}: not JSON ({reason}). {remedy}") from error
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing:
            raise ToolError(f"{path}, line {number}: missing {', '.join(missing)}. {remedy}")
        fault = check(row)
        if fault:
            raise ToolError(f"{path}, line {number}: {fault}")
        rows.append(row)
    if not rows:
        raise ToolError(f"{path}: holds no rows. {remedy}")
    return rows


def text_fault(row: dict[str, Any]) -> str:
    """For read_jsonl: "" when the row's text is a text."""
    return "" if isinstance(row["text"], str) else f'text is {row["text"]!r}, not a text. Put it in "quotation marks"'


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
