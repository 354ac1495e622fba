"""Tabs 7 and 8: what was spoken, to hear and to take home: takes, two checkpoints side by side, an evaluation as a
table, links to exported files. HTML of our own, in which every text and name is escaped."""

from __future__ import annotations

import functools
import html
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webui import pipeline
from webui.clip_rows import Version
from webui.jobs import Job
from webui.page_base import megabytes
from webui.texts import say
from webui.workspace import Workspace, as_text, read_json

SHOWN_TAKES = 30
SHOWN_TEXTS = 200  # of an evaluation
SHOWN_FILES = 12  # of an exported folder
RESULTS = "results.json"
NAMES = ("a", "b")  # of what tools.compare_checkpoints writes
KINDS = ("true", "round_trip", "synthesis")
Link = Callable[[Path], str]


@dataclass(frozen=True)
class Take:
    """A text that was spoken once, or by two checkpoints."""

    created: float
    text: str
    prompt: str
    sounds: tuple[tuple[str, Path], ...]
    """(checkpoint, file)."""


def takes_of(jobs: Sequence[Job], workspace: Workspace) -> list[Take]:
    """Newest first. Of a file that was written twice only the last take is there."""
    found, seen = [], set()
    for job in jobs:
        if job.kind not in ("synthesize", "compare") or job.state != "finished" or job.output_dir in seen:
            continue
        seen.add(job.output_dir)
        form = pipeline.form_of(job.kind, job.argv, workspace)
        assert job.output_dir is not None
        if job.kind == "synthesize":
            sounds: tuple[tuple[str, Path], ...] = ((str(form.get("checkpoint", "")), job.output_dir),)
        else:
            sounds = tuple((str(form.get(field, "")), job.output_dir / f"{name}.wav")
                           for field, name in zip(("checkpoint", "other"), NAMES, strict=True))
        found.append(Take(job.created, str(form.get("text", "")), str(form.get("prompt", "")), sounds))
    return found[:SHOWN_TAKES]


def player(name: str, path: Path, link: Link, download: bool = False) -> str:
    """A sound with its name above it; "" for a file that is gone."""
    address = link(path)
    if not address:
        return ""
    home = f' <a href="{html.escape(address)}" download="{html.escape(path.name)}">↓</a>' if download else ""
    return (f'<div class="sound"><span>{html.escape(name)}{home}</span>'
            f'<audio controls preload="none" src="{html.escape(address)}"></audio></div>')


def result_html(path: Path, link: Link, language: str) -> str:
    """A sound, and its spectrogram where tools.synthesize left one; "" for a file that is gone."""
    sound, picture = player(say("listen.audio", language), path, link, download=True), link(path.with_suffix(".png"))
    shown = f'<img alt="{html.escape(say("listen.picture", language))}" src="{html.escape(picture)}">'
    return sound + shown if picture else sound


def takes_html(takes: Sequence[Take], link: Link, workspace: Workspace, language: str) -> str:
    parts = []
    for take in takes:
        sounds = "".join(player(f"{mark}{name} → {workspace.show(path)}", path, link, download=True)
                         for mark, (name, path) in zip(("A: ", "B: ") if len(take.sounds) > 1 else ("",), take.sounds,
                                                       strict=True))
        if sounds:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(take.created))
            meta = html.escape(say("takes.meta", language, time=when, prompt=take.prompt))
            parts.append(f'<div class="take"><p class="said" lang="am">{html.escape(take.text)}</p>'
                         f'<p class="meta">{meta}</p><div class="sounds">{sounds}</div></div>')
    return f'<div class="takes">{"".join(parts)}</div>' if parts else (
        f'<p class="meta">{html.escape(say("takes.none", language))}</p>')


# ---------------------------------------------------------------------------------------------------------------------
# An evaluation


@functools.lru_cache(maxsize=4)
def results(version: Version) -> dict[str, Any]:
    """What tools.evaluate_voice wrote; {} for another file."""
    content = read_json(version.path)
    rows = content.get("rows")
    return content if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else {}


def rate(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def worst_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the share of wrong letters that the synthesis has. Pure."""
    def wrong(row: dict[str, Any]) -> float:
        cer = row.get("cer")
        found = cer.get("synthesis") if isinstance(cer, dict) else None
        return found if isinstance(found, int | float) else math.inf

    return sorted(rows, key=wrong, reverse=True)


def evaluation_html(folder: Path, link: Link, language: str) -> str:
    """A card for each text, the worst first; "" where nothing was evaluated."""
    try:
        found = results(Version.of(folder / RESULTS))
    except OSError:
        return ""
    rows = worst_first(found.get("rows", []))
    if not rows:
        return ""
    names = {kind: say(f"evaluation.{kind}", language) for kind in KINDS}
    rates = [f"{names[kind]}: {rate(found.get(kind, {}).get('cer'))}" for kind in KINDS]
    head = say("evaluation.head", language, checkpoint=as_text(found.get("checkpoint", "")), step=found.get("step", ""),
               rates=" · ".join(rates), mcd=rate(found.get("mcd")), shown=min(len(rows), SHOWN_TEXTS), count=len(rows))
    parts = [f'<p class="meta">{html.escape(head)}</p>']
    for row in rows[:SHOWN_TEXTS]:
        name, cer = Path(as_text(row.get("name", ""))).name, row.get("cer", {})
        files = {"true": row.get("recording"), "round_trip": folder / f"{name}_codec.wav",
                 "synthesis": folder / f"{name}.wav"}
        sounds = "".join(player(f"{names[kind]} · CER {rate(cer.get(kind))}", Path(str(path)), link)
                         for kind, path in files.items() if path)
        meta = say("evaluation.row", language, cer=rate(cer.get("synthesis")), mcd=rate(row.get("mcd")),
                   rank=row.get("rank", "-"), candidates=row.get("candidates", "-"))
        heard = say("evaluation.heard", language, heard=as_text(row.get("synthesis") or "-"))
        parts.append(f'<div class="take"><p class="said" lang="am">{html.escape(as_text(row.get("text", "")))}</p>'
                     f'<p class="meta">{html.escape(meta)}<br>{html.escape(heard)}</p>'
                     f'<div class="sounds">{sounds}</div></div>')
    return f'<div class="takes">{"".join(parts)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# Files to take home


def download_html(paths: Sequence[Path], link: Link, workspace: Workspace) -> str:
    """Links with sizes; what is gone is left out."""
    parts = []
    for path in paths:
        address = link(path)
        if address and path.is_file():
            name = f"↓ {workspace.show(path)} ({megabytes(path.stat().st_size)} MB)"
            parts.append(f'<a class="download" href="{html.escape(address)}" download="{html.escape(path.name)}">'
                         f"{html.escape(name)}</a>")
    return f'<div class="downloads">{"".join(parts)}</div>' if parts else ""


def exported(jobs: Sequence[Job]) -> list[Path]:
    """The files of the newest export that finished."""
    job = next((job for job in jobs if job.kind in ("export", "export_folder") and job.state == "finished"), None)
    if job is None or job.output_dir is None:
        return []
    try:
        return [job.output_dir] if job.kind == "export" else sorted(
            path for path in job.output_dir.iterdir() if path.is_file())[:SHOWN_FILES]
    except OSError:
        return []


