"""The report of filter_dataset: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

BARS = 30
STYLE = """
body { font-family: system-ui, "Noto Sans Ethiopic", sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }
td.number { text-align: right } figure { display: inline-block; margin: 1rem 2rem 0 0 } figcaption { font-size: .9rem }
audio { height: 2rem } .kept { fill: #4a7ebb } .rejected { fill: #d9534f } text { font-size: 10px; fill: #555 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1c1c1c } text { fill: #aaa } }
"""


class Player(NamedTuple):
    """A clip that can be heard in the report."""

    name: str
    text: str
    reason: str
    flac: bytes


def histogram(title: str, unit: str, kept: Sequence[float], rejected: Sequence[float]) -> str:
    """An SVG figure: bars of kept rows with rejected ones on top. What lies far out is counted in the last bars."""
    values = sorted([*kept, *rejected])
    if not values:
        return ""
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    width = (high - low) / BARS or 1.0

    def counts(numbers: Sequence[float]) -> Counter[int]:
        return Counter(min(BARS - 1, max(0, int((number - low) / width))) for number in numbers)

    good, bad = counts(kept), counts(rejected)
    most = max(good[i] + bad[i] for i in range(BARS))
    bars = []
    for i in range(BARS):
        heights = [100 * good[i] / most, 100 * bad[i] / most]
        hint = (f"<title>{low + i * width:.3g} to {low + (i + 1) * width:.3g} {unit}: {good[i]} kept, {bad[i]} rejected"
                "</title>")
        bars.append(f'<rect class="kept" x="{10 * i}" y="{100 - heights[0]:.1f}" width="9" height="{heights[0]:.1f}">'
                    f'{hint}</rect><rect class="rejected" x="{10 * i}" y="{100 - sum(heights):.1f}" width="9" '
                    f'height="{heights[1]:.1f}">{hint}</rect>')
    return (f'<figure><svg width="300" height="115" role="img" aria-label="{html.escape(title)}">{"".join(bars)}'
            f'<text x="0" y="112">{low:.3g}</text><text x="300" y="112" text-anchor="end">{high:.3g} {unit}</text>'
            f"</svg><figcaption>{html.escape(title)}</figcaption></figure>")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers stand at the right."""
    lines = ["".join(f'<td class="number">{cell}</td>' if isinstance(cell, int | float)
                     else f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return (f"<table><tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"
            + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")


def players(clips: Sequence[Player]) -> str:
    lines = [f"<tr><td>{html.escape(clip.reason)}</td><td>{html.escape(clip.name)}</td><td lang=\"am\">"
             f"{html.escape(clip.text)}</td><td><audio controls preload=\"none\" src=\"data:audio/flac;base64,"
             f"{base64.b64encode(clip.flac).decode()}\"></audio></td></tr>" for clip in clips]
    return f"<table><tr><th>Why</th><th>Clip</th><th>Text</th><th>Sound</th></tr>{''.join(lines)}</table>"


def page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """Sections of (heading, HTML); empty ones are left out."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in parts if content)
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style></head>'
            f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n")
