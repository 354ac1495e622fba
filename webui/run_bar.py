"""Tab 6: the next step after a run has ended, and its warnings."""

from __future__ import annotations

import html
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from tools.run_files import all_checkpoints
from webui.job_panel import newest
from webui.jobs import Job
from webui.page_base import QUIET, Page
from webui.run_history import Warnings
from webui.texts import say
from webui.workspace import Refused

SHOWN_WARNINGS = 6
MOST_LOGS = 16  # that are remembered
LISTEN = "() => document.getElementById('tab-listen-button')?.click()"
CSS = """
.startbar { z-index: 60 !important; } /* above the labels of plots */
.state-running, .state-starting, .state-finished, .state-stopped, .state-failed, .state-killed {
    border-left: 6px solid; border-radius: 6px; padding: 8px 12px !important; }
[class*="state-"] [class*="state-"] { border-left: 0; padding: 0 !important; } /* Gradio gives a class to both */
.state-running, .state-starting { background: #fef3c7; border-color: #d97706 !important; }
.state-finished { background: #dcfce7; border-color: #16a34a !important; }
.state-stopped { background: #dbeafe; border-color: #2563eb !important; }
.state-failed, .state-killed { background: #fee2e2; border-color: #dc2626 !important; }
.state-running *, .state-starting *, .state-finished *, .state-stopped *, .state-failed *, .state-killed * {
    color: #111827 !important; }
#training-warnings ul { margin: 0; padding: 8px 12px 8px 28px; list-style: disc; background: #fef3c7; color: #111827;
    border-left: 6px solid #d97706; border-radius: 6px; overflow-wrap: anywhere; font-size: 0.9rem; }
#training-warnings li.error { font-weight: 700; color: #7f1d1d; }
"""


def create_next_step(page: Page, output_dir: Any) -> None:
    """Below the state of the run: a button for what one would do now."""
    form = page.forms["training"]
    with gr.Row():
        go_on = page.button("after.go_on", variant="primary", visible=False, elem_id="training-go-on")
        listen = page.button("after.listen", visible=False, elem_id="training-to-listen")

    def look(jobs: Sequence[Job], language: str, typed_dir: str) -> list[Any]:
        try:
            folder = page.workspace.inside(typed_dir)
        except Refused:
            return [gr.update(visible=False)] * 2
        job = newest(jobs, ["training"], folder)
        key = next_of(job, bool(all_checkpoints(folder))) if job else ""
        return [gr.update(visible=bool(key), value=say(key or "after.go_on", language)),
                gr.update(visible=job is not None and job.state == "finished")]

    page.watch("training", [output_dir], [go_on, listen], look)
    # Two events, so that one sees what is ticked before it starts.
    ticked = go_on.click(lambda: form.change(form.after_start()), None, [*form.inputs.values()], **QUIET)
    page.refresh_after.append(ticked.then(form.start, [form.untouched, page.language, *form.inputs.values()],
                                          [*form.checked_into, form.notice], **QUIET))
    listen.click(None, None, None, js=LISTEN, **QUIET)


def next_of(job: Job, has_checkpoints: bool) -> str:
    """What the button after a run's end says: a key of TEXTS; "" where there is none. Pure."""
    if job.state in ("stopped", "killed"):
        return "after.go_on" if has_checkpoints else "after.again"
    return ("after.retry" if has_checkpoints else "after.again") if job.state == "failed" else ""


def create_warnings(page: Page, output_dir: Any) -> None:
    """What the run in the output directory has warned of, above its log."""
    shown = gr.HTML(elem_id="training-warnings", padding=False)
    known: OrderedDict[str, Warnings] = OrderedDict()
    lock = threading.Lock()  # several browsers ask at once

    def look(jobs: Sequence[Job], language: str, typed_dir: str) -> list[Any]:
        try:
            job = newest(jobs, ["training"], page.workspace.inside(typed_dir))
        except Refused:
            job = None
        if job is None:
            return [""]
        with lock:
            found = known.setdefault(job.id, Warnings(job.log)).update()
            while len(known) > MOST_LOGS:
                known.popitem(last=False)
        return [warnings_list(found, language)]

    page.watch("training", [output_dir], [shown], look)


def warnings_list(found: Sequence[tuple[str, int]], language: str) -> str:
    """HTML of the newest ones, escaped. Pure."""
    lines = []
    for text, count in found[:SHOWN_WARNINGS]:
        kind, _, said = text.partition(" ")
        times = f" (×{count})" if count > 1 else ""
        mark = ' class="error"' if kind == "[Error]" else ""
        lines.append(f"<li{mark}>{html.escape(said)}{times}</li>")
    if len(found) > SHOWN_WARNINGS:
        lines.append(f"<li>{html.escape(say('warnings.more', language, count=len(found) - SHOWN_WARNINGS))}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""
