"""Tab 6: the runs that wait, the next step after a run has ended, and its warnings."""

from __future__ import annotations

import html
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from tools.run_files import all_checkpoints
from webui.job_panel import jobs_of, newest
from webui.jobs import Job
from webui.page_base import QUIET, Page, refusal
from webui.run_history import Warnings
from webui.run_queue import outlook, start_queued, take_out
from webui.texts import say
from webui.workspace import Refused

SHOWN_WARNINGS = 6
MOST_LOGS = 16  # that are remembered
QUEUE_CLICKS = """element.addEventListener("click", event => {
    const button = event.target.closest("[data-act]");
    if (button) trigger("click", {act: button.dataset.act, job: button.dataset.job});
})"""
LISTEN = "() => document.getElementById('tab-listen-button')?.click()"
CSS = """
.startbar { z-index: 60 !important; } /* above the labels of plots */
.state-running, .state-starting, .state-finished, .state-stopped, .state-failed, .state-killed, .state-waiting,
.state-not_started {
    border-left: 6px solid; border-radius: 6px; padding: 8px 12px !important; }
[class*="state-"] [class*="state-"] { border-left: 0; padding: 0 !important; } /* Gradio gives a class to both */
.state-running, .state-starting { background: #fef3c7; border-color: #d97706 !important; }
.state-finished { background: #dcfce7; border-color: #16a34a !important; }
.state-stopped { background: #dbeafe; border-color: #2563eb !important; }
.state-failed, .state-killed { background: #fee2e2; border-color: #dc2626 !important; }
.state-waiting, .state-not_started { background: #e5e7eb; border-color: #6b7280 !important; }
.state-running *, .state-starting *, .state-finished *, .state-stopped *, .state-failed *, .state-killed *,
.state-waiting *, .state-not_started * {
    color: #111827 !important; }
#training-queue ol { margin: 4px 0; padding-left: 24px; list-style: decimal; }
#training-queue li { margin: 4px 0; overflow-wrap: anywhere; }
#training-queue p { margin: 0; font-size: 0.9rem; }
#training-queue button { padding: 3px 10px; margin: 1px; border-radius: 6px; font-size: 0.85rem;
    border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
    color: var(--button-secondary-text-color); }
#training-warnings ul { margin: 0; padding: 8px 12px 8px 28px; list-style: disc; background: #fef3c7; color: #111827;
    border-left: 6px solid #d97706; border-radius: 6px; overflow-wrap: anywhere; font-size: 0.9rem; }
#training-warnings li.error { font-weight: 700; color: #7f1d1d; }
"""


def create_queue(page: Page, form: Any, add: Any) -> None:
    """Below Start: the runs that wait, with what may be done with each. `add` puts the form's run among them; there is
    something to wait for only while a run is alive."""
    listed = gr.HTML(elem_id="training-queue", js_on_load=QUEUE_CLICKS, padding=False)
    acts = {"start": start_queued, "take_out": take_out}

    def look(jobs: Sequence[Job], language: str) -> list[Any]:
        alive = any(job.live for job in jobs_of(jobs, ["training"]))
        rows = [(job.id, page.workspace.show(job.output_dir or ""), becomes,
                 ", ".join(page.workspace.show(other.output_dir or "") for other in others))
                for job, becomes, others in outlook(jobs)]
        return [gr.update(visible=alive), queue_list(rows, language)]

    def act(language: str, clicked: gr.EventData) -> str:
        wanted = {"act": "", "job": "", **(clicked._data or {})}
        try:
            if wanted["act"] in acts:
                acts[wanted["act"]](page.workspace, str(wanted["job"]))
        except Refused as refused:
            return refusal(refused, language)
        return ""

    page.watch("training", [], [add, listed], look)
    page.ask(add.click, form.queue, form.given, [*form.checked_into, form.notice])
    page.act(listed.click, act, [page.language], [form.notice])


def queue_list(rows: Sequence[tuple[str, str, str, str]], language: str) -> str:
    """HTML of the queue: id, name, what becomes of it and the runs that this depends on, escaped. Pure."""
    lines = []
    for job_id, name, becomes, others in rows:
        why = say(f"queue.{becomes}", language, **({"runs": others} if others else {}))
        buttons = " ".join(
            f'<button type="button" data-act="{act}" data-job="{html.escape(job_id)}">'
            f"{html.escape(say(f'queue.{act}', language))}</button>"
            for act in ("start", "take_out") if act == "take_out" or becomes in ("held", "not_started"))
        lines.append(f"<li><b>{html.escape(name)}</b> – {html.escape(why)} {buttons}</li>")
    if not lines:
        return ""
    heading, rule = (html.escape(say(f"queue.{key}", language)) for key in ("heading", "rule"))
    return f"<b>{heading}</b><ol>{''.join(lines)}</ol><p>{rule}</p>"


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
    page.ask(ticked.then, form.start, form.given, [*form.checked_into, form.notice])
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
