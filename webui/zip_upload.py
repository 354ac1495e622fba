"""A zip archive of recordings and texts that a browser brought: unpacked into the workspace, file by file.

Its names are not trusted: no path leads out of the folder, links and hidden files are passed over, each file is judged
by its content like one that is uploaded alone, and the bytes are counted as they come, whatever the archive says.
"""

from __future__ import annotations

import contextlib
import stat
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from webui.uploads import JUDGED, TRANSCRIPTS, is_sound, is_transcript
from webui.workspace import Refused, Workspace, is_text_name

ENDING = ".zip"
MOST_FILES = 50_000
TIMES_LARGER = 20  # unpacked than packed, at most: sound is hardly packed at all
BLOCK = 1 << 20


@dataclass
class Unpacked:
    """Names in the archive."""

    taken: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    """Were in the folder before, and are left as they were."""
    passed_over: list[str] = field(default_factory=list)
    """Not of a kind that can be imported."""


def unpack(workspace: Workspace, uploaded: Path, folder: str, suffixes: Collection[str], megabytes: int) -> Unpacked:
    """Into a folder of the workspace, folders and all. No file of it is larger than `megabytes`, all together are at
    most TIMES_LARGER the archive's size. Raises: Refused."""
    target, found = workspace.inside(folder), Unpacked()
    room = TIMES_LARGER * max(uploaded.stat().st_size, 1_000_000)
    try:
        with zipfile.ZipFile(uploaded) as archive:
            files = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(files) > MOST_FILES:
                raise Refused("zip_too_large", path=uploaded.name)
            for entry in files:
                path = place_in(target, entry, suffixes)
                if path is None:
                    if not hidden(entry):
                        found.passed_over.append(entry.filename)
                    continue
                room -= take(workspace, archive, entry, path, min(room, megabytes * 1_000_000), found)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:  # of a password, too
        raise Refused("zip_damaged", path=uploaded.name) from error
    except OSError as error:
        raise Refused("not_writable", path=workspace.show(target)) from error
    return found


def hidden(entry: zipfile.ZipInfo) -> bool:
    """Of a system's own, such as .DS_Store."""
    parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def place_in(target: Path, entry: zipfile.ZipInfo, suffixes: Collection[str]) -> Path | None:
    """Where a file of the archive belongs; None for one that is not taken. Pure."""
    name = entry.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if link or hidden(entry) or name.startswith("/") or ":" in name or not is_text_name(name) or not parts:
        return None
    return target.joinpath(*parts) if Path(name).suffix.lower() in suffixes else None


def take(workspace: Workspace, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, most: int,
         found: Unpacked) -> int:
    """Unpacks one file, or notes why not. Returns its bytes. Raises: Refused, OSError, what zipfile raises."""
    path = workspace.inside(str(path))  # a link in the folder may lead elsewhere
    with archive.open(entry) as source:
        start = source.read(JUDGED)
        suffix = path.suffix.lower()
        if not (is_transcript(start, suffix) if suffix in TRANSCRIPTS else is_sound(start)):
            found.passed_over.append(entry.filename)
            return len(start)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("xb")  # never over a file that is there
        except FileExistsError:
            found.there.append(entry.filename)
            return len(start)
        try:
            with handle:
                size = copy(source, handle, start, most)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
    if size > most:
        path.unlink()
        raise Refused("zip_too_large", path=entry.filename)
    found.taken.append(entry.filename)
    return size


def copy(source: IO[bytes], handle: IO[bytes], start: bytes, most: int) -> int:
    """Copies at most `most` bytes and a block. Returns how many there were."""
    size, block = 0, start
    while block and size <= most:
        handle.write(block)
        size += len(block)
        block = source.read(BLOCK)
    return size
