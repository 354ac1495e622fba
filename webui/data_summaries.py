"""What the programs of Tabs 1 and 2 found, in a few lines: from their logs and the files that they wrote."""

from __future__ import annotations

import functools
import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webui.jobs import Job
from webui.page_base import tell
from webui.texts import TEXTS, say
from webui.workspace import Workspace, as_text

LOG_START = 1 << 16  # bytes in which a program says what its source is
FOUND = re.compile(r"^\[Info\] .*: \d+ sounds; ([a-z0-9-]+): (.*)$", re.MULTILINE)


@dataclass
class Rows:
    """What the lines of a file of rows hold, counted."""

    count: int = 0
    seconds: float = 0.0
    speakers: set[str] = field(default_factory=set)
    empty: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def count_rows(path: Path) -> Rows:
    """Nothing for a file that is not there. Read again only when it has changed."""
    try:
        stat = path.stat()
        return count_rows_at(path, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return Rows()


@functools.lru_cache(maxsize=8)
def count_rows_at(path: Path, changed: int, size: int) -> Rows:
    """count_rows() of a file as it is at a moment. Raises: OSError."""
    found = Rows()
    with path.open("rb") as lines:
        for row in objects_in(lines):
            found.count += 1
            seconds = row.get("duration", 0)
            found.seconds += seconds if isinstance(seconds, int | float) else 0
            found.speakers.add(str(row.get("speaker", "")))
            found.empty += not str(row.get("text", "")).strip()
            found.reasons[str(row.get("reason", ""))] += 1
    return found


def objects_in(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def start_of(log: Path) -> str:
    try:
        with log.open("rb") as handle:
            return handle.read(LOG_START).decode(errors="replace")
    except OSError:
        return ""


def reason_counts(reasons: Counter[str], language: str) -> list[str]:
    """A line of Markdown for each, the most frequent first; a reason without a translation as the program says it."""
    named = [(say(key, language) if (key := f"reason.{reason}") in TEXTS else reason, count)
             for reason, count in reasons.most_common()]
    return [tell(language, "reason_count", reason=as_text(reason), count=count) for reason, count in named]


def import_summary(job: Job, workspace: Workspace, language: str) -> str:
    """Markdown: what the source is, as soon as that is known, and what became of it."""
    lines, folder = [], job.output_dir
    found = FOUND.search(start_of(job.log))
    if found:
        lines.append(tell(language, "import.found", layout=found[1], reason=as_text(found[2])))
    if folder is None or job.live:
        return "\n\n".join(lines)
    rows_path, skipped_path = folder / "recordings.jsonl", folder / "skipped.jsonl"
    if job.state == "finished":
        rows, path = count_rows(rows_path), as_text(workspace.show(rows_path))
        lines.append(tell(language, "import.rows", rows=rows.count, hours=f"{rows.seconds / 3600:.2f}",
                          speakers=len(rows.speakers), empty=rows.empty))
        lines += [tell(language, "import.untyped", path=path)] if rows.empty else []
        lines += [tell(language, "import.written", path=path)] if rows.empty < rows.count else []
    if is_newer(skipped_path, job.created):
        skipped, path = count_rows(skipped_path), as_text(workspace.show(skipped_path))
        told = tell(language, "import.skipped", count=skipped.count, path=path)
        lines += ["\n".join([told, "", *reason_counts(skipped.reasons, language)])] if skipped.count else []
    return "\n\n".join(lines)


def filter_summary(recordings: Path, workspace: Workspace, language: str) -> str:
    """Markdown: how many of the recordings are kept, and why others are not; "" before they were filtered.

    Raises: Refused where a link leads out of the workspace.
    """
    kept_path, rejected_path = (workspace.inside(str(recordings.with_name(f"{name}.jsonl")))
                                for name in ("filtered", "rejected"))
    if not rejected_path.is_file():
        return ""
    rejected = count_rows(rejected_path)
    # Written in this order; where no row was kept, the filtered.jsonl there is of an earlier run.
    whole = is_newer(kept_path, rejected_path.stat().st_mtime)
    kept = count_rows(kept_path) if whole else Rows()
    lines = [tell(language, "filter.rows", kept=kept.count, rejected=rejected.count)]
    if kept.count:
        lines.append(tell(language, "filter.written", path=as_text(workspace.show(kept_path))))
    if rejected.count:
        told = tell(language, "filter.rejected", path=as_text(workspace.show(rejected_path)))
        lines.append("\n".join([told, "", *reason_counts(rejected.reasons, language)]))
    return "\n\n".join(lines)


def report_frame(path: Path) -> str:
    """HTML that shows a report in a frame of its own, in which nothing runs and nothing is loaded from elsewhere.

    Raises: OSError.
    """
    report = path.read_text(encoding="utf-8", errors="replace")
    policy = ("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
              "media-src data:\">")
    return f'<iframe sandbox="" class="report" title="{path.name}" srcdoc="{html.escape(policy + report)}"></iframe>'


def is_newer(path: Path, moment: float) -> bool:
    """Whether a file was written after a moment (seconds since 1970)."""
    try:
        return path.stat().st_mtime >= moment
    except OSError:
        return False
