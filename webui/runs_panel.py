"""Below Tab 6's form: every run of the workspace, to show, clone, compare and delete."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from webui.checkpoints_tab import METRICS
from webui.command_lines import PROGRAMS, preview
from webui.job_panel import curves, legend
from webui.jobs import Job
from webui.page_base import QUIET, Page, megabytes, refusal, tell
from webui.readers import curve
from webui.run_bar import CSS as BAR_CSS
from webui.run_curves import PARTS, create_curve_plot, create_smoothing, is_smoothed, rows_of, with_raw
from webui.run_history import Run, RunHistory, clone_of, delete_run, deletion_of, form_of_run, jobs_of_run, log_part
from webui.run_plan import create_plan
from webui.spoken_samples import CSS as SAMPLES_CSS
from webui.texts import TEXTS, say
from webui.workspace import Refused

COLUMNS = ("run", "state", "steps", "best", "when")
MOST_RUNS = 200  # in the table
CLICKS = """element.addEventListener("click", event => {
    const button = event.target.closest("[data-act]");
    if (button) trigger("click", {act: button.dataset.act, run: button.dataset.run});
    if (button?.dataset.act === "clone")
        document.getElementById("training-output_dir")?.scrollIntoView({block: "center"});
})"""
CSS = BAR_CSS + SAMPLES_CSS + """
.chip { display: inline-block; padding: 0 10px; border-radius: 10px; white-space: nowrap; font-weight: 600;
    background: #e5e7eb; color: #1f2937; }
.chip.running, .chip.starting { background: #fef3c7; color: #713f12; }
.chip.finished { background: #dcfce7; color: #14532d; }
.chip.stopped { background: #dbeafe; color: #1e3a8a; }
.chip.failed, .chip.killed { background: #fee2e2; color: #7f1d1d; }
.cards table { width: 100%; border-collapse: collapse; }
.cards th, .cards td { text-align: left; padding: 6px 10px; vertical-align: middle;
    border: 0; border-bottom: 1px solid var(--border-color-primary); }
.cards table, .cards thead, .cards tbody, .cards tr { border: 0; }
.cards td.name { overflow-wrap: anywhere; font-weight: 600; }
.cards td.acts { white-space: nowrap; text-align: right; }
.cards tr.shown td { background: var(--background-fill-secondary); }
.cards button { padding: 3px 10px; margin: 1px; border-radius: 6px; font-size: 0.85rem;
    border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
    color: var(--button-secondary-text-color); }
.cards button[aria-pressed=true] { outline: 2px solid var(--button-primary-background-fill); font-weight: 700; }
.cards button:disabled { opacity: 0.45; }
.settings { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
.settings dt { font-weight: 600; }
.settings dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 700px) {
    .cards thead { display: none; }
    .cards tr { display: block; border: 1px solid var(--border-color-primary); border-radius: 8px;
        margin-bottom: 8px; padding: 6px; }
    .cards td { display: flex; justify-content: space-between; gap: 12px; border: 0; padding: 3px 6px; }
    .cards td[data-label]::before { content: attr(data-label); }
    .cards td.acts { display: block; text-align: left; white-space: normal; }
    .cards button { padding: 8px 12px; }
    .settings { grid-template-columns: 1fr; }
    .settings dd { margin-bottom: 6px; }
}
"""


def chip(state: str, language: str) -> str:
    return f'<span class="chip {state}">{html.escape(say(f"run_state.{state}", language))}</span>'


def table_of(runs: Sequence[tuple[str, Run]], shown: str, compared: Sequence[str], language: str) -> str:
    """HTML of our own texts, numbers and escaped names. Pure but for the time zone."""
    if not runs:
        return html.escape(say("runs.none", language))
    head = "".join(f"<th>{html.escape(say(f'runs.{name}', language))}</th>" for name in COLUMNS)
    rows = [row_of(name, run, name == shown, name in compared, language) for name, run in runs]
    return f"<table><thead><tr>{head}<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def row_of(name: str, run: Run, is_shown: bool, is_compared: bool, language: str) -> str:
    best = "" if run.best is None else say("runs.best_at", language, loss=f"{run.best:.4f}", step=run.best_step)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.when))
    cells = ["", chip(run.state, language), "" if run.step is None else str(run.step), html.escape(best), when]
    labels = [f'<td data-label="{html.escape(say(f"runs.{column}", language))}"><span>{cell}</span></td>'
              for column, cell in zip(COLUMNS[1:], cells[1:], strict=True)]
    acts = [("show", is_shown, False), ("compare", is_compared, False), ("clone", None, not run.jobs),
            ("delete", None, run.live)]
    buttons = "".join(
        f'<button type="button" data-act="{act}" data-run="{html.escape(name)}"'
        f"{'' if pressed is None else f' aria-pressed={str(pressed).lower()}'}{' disabled' if disabled else ''}>"
        f"{html.escape(say(f'runs.{act}', language))}</button>" for act, pressed, disabled in acts)
    mark = ' class="shown"' if is_shown else ""
    return f'<tr{mark}><td class="name">{html.escape(name)}</td>{"".join(labels)}<td class="acts">{buttons}</td></tr>'


def settings_of(run: Run, page: Page, language: str) -> str:
    """HTML: what was asked for, under the names that the form's fields have."""
    form = form_of_run(run.jobs, page.workspace)
    if not form:
        return html.escape(say("runs.no_settings", language))
    names = [field.name for field in PROGRAMS["training"].fields if field.name != "resume_path"]
    lines = [(say(f"training.{name}", language), "✓" if form[name] is True else str(form[name])) for name in names
             if name in form and f"training.{name}" in TEXTS and form[name] not in ("", False)]
    return '<dl class="settings">' + "".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd>" for label, value in lines) + "</dl>"


class RunsPanel:
    """The table of runs and what its buttons do."""

    def __init__(self, page: Page, form: Any) -> None:
        self.page, self.form = page, form
        self.history, self.lock = RunHistory(page.workspace), threading.Lock()  # several browsers ask at once
        page.prose("runs.heading", elem_id="runs-heading")
        self.table = gr.HTML(elem_id="runs-table", elem_classes=["cards"], js_on_load=CLICKS, padding=False)
        self.shown, self.compared, self.asked = gr.State(""), gr.State([]), gr.State("")
        self.create_question()
        self.notice = page.notice()
        self.create_comparison()
        self.create_detail()
        page.act(self.table.click, self.act, [page.language, self.shown, self.compared],
                 [self.shown, self.compared, self.asked, self.question, self.asks, self.notice, self.part,
                  *form.inputs.values()])

    def runs(self, jobs: Sequence[Job]) -> dict[str, Run]:
        """By the name of the directory, as a user would type it; newest first."""
        with self.lock:
            found = self.history.runs(jobs)
        return {self.page.workspace.show(run.folder): run for run in found[:MOST_RUNS]}

    # Layout

    def create_question(self) -> None:
        page = self.page
        with gr.Group(visible=False, elem_id="runs-question") as self.question:
            self.asks = gr.Markdown(elem_classes=["notice"])
            with gr.Row():
                yes = page.button("runs.yes", variant="stop", elem_id="runs-yes")
                no = page.button("checkpoints.cancel", elem_id="runs-no")
        self.yes = yes
        no.click(lambda: gr.update(visible=False), None, [self.question], **QUIET)

    def create_comparison(self) -> None:
        page = self.page
        with gr.Column(visible=False, elem_id="runs-compared") as compared:
            with gr.Row(elem_classes=["line"]):
                metric = page.add(gr.Dropdown, "checkpoints.metric", value="val_mel", interactive=True,
                                  choices=[(f"metric.{name}", name) for name in METRICS], elem_id="runs-metric")
                smoothing = create_smoothing(page, "runs")
            key = gr.HTML(elem_classes=["keys"], padding=False)
            plot = create_curve_plot(page, "runs.curves", PARTS, height=300, elem_id="runs-plot")

        def look(jobs: Sequence[Job], language: str, shown: str, chosen: list[str], name: str, weight: float
                 ) -> list[Any]:
            if not (shown or chosen):
                return [gr.update(visible=False), gr.skip(), gr.skip()]
            runs = self.runs(jobs)
            names = [run for run in dict.fromkeys([shown, *chosen]) if run in runs][:len(PARTS)]
            limit = max(60, 1500 // max(1, len(names)))
            rows = [row for number, run in zip(PARTS, names, strict=False) for row in rows_of(
                number, curve(page.reader(runs[run].folder).points(), *METRICS[name], 1 << 20),
                float(weight or 0) if is_smoothed(name, METRICS[name][0]) else 0.0, [], min(500, limit))]
            key = legend(names) if rows else html.escape(say("runs.no_curve", language))
            return [gr.update(visible=bool(names)), key, gr.update(visible=bool(rows), value=curves(
                rows, with_raw(PARTS)))]

        page.watch("training", [self.shown, self.compared, metric, smoothing], [compared, key, plot], look)

    def create_detail(self) -> None:
        page = self.page
        self.part = gr.State(-1)
        with gr.Column(visible=False, elem_id="runs-detail") as detail:
            title = gr.HTML(elem_id="runs-title", padding=False)
            settings = gr.HTML(elem_id="runs-settings", padding=False)
            command = page.add(gr.Textbox, "command", lines=2, max_lines=6, interactive=False, buttons=["copy"],
                               elem_id="runs-command", elem_classes=["command"])
            with gr.Row(elem_classes=["line"]):
                place = gr.Markdown(elem_id="runs-log-part")
                earlier = page.button("runs.earlier", size="sm", scale=0, min_width=120, elem_id="runs-earlier")
                later = page.button("runs.later", size="sm", scale=0, min_width=120, elem_id="runs-later")
            log = page.add(gr.Textbox, "runs.log", lines=12, max_lines=20, interactive=False, buttons=["copy"],
                           elem_id="runs-log", elem_classes=["log"])

        def look(jobs: Sequence[Job], language: str, shown: str, part: int) -> list[Any]:
            run = self.runs(jobs).get(shown) if shown else None
            if run is None:
                return [gr.update(visible=False), *[gr.skip()] * 7]
            own = jobs_of_run(page.workspace, run.folder, page.ended)
            text, number, count = log_part(own, part)
            heading = f"<h3>{html.escape(shown)} {chip(run.state, language)}</h3>"
            return [gr.update(visible=True), heading, settings_of(run, page, language),
                    gr.update(visible=bool(run.jobs), value=preview(run.jobs[0].argv) if run.jobs else ""),
                    say("runs.part" if own else "runs.no_log", language, number=number + 1, count=count),
                    gr.update(visible=count > 1, interactive=number > 0),
                    gr.update(visible=count > 1, interactive=number < count - 1),
                    gr.update(visible=bool(own), value=text)]

        page.watch("training", [self.shown, self.part], [detail, title, settings, command, place, earlier, later, log],
                   look)
        for button, by in ((earlier, -1), (later, 1)):
            page.act(button.click, partial(self.turn, by), [self.shown, self.part], [self.part])

    def turn(self, by: int, shown: str, part: int) -> int:
        """The part of the log before or after the one that is shown; -1 for the last, which grows."""
        run = self.runs(self.page.jobs()).get(shown)
        if run is None:
            return -1
        _, number, count = log_part(jobs_of_run(self.page.workspace, run.folder, self.page.ended), part)
        return max(0, number + by) if number + by < count - 1 else -1

    # What the buttons do

    def look_at_table(self, jobs: Sequence[Job], language: str, shown: str, compared: list[str]) -> list[Any]:
        return [table_of([*self.runs(jobs).items()], shown, compared, language)]

    def act(self, language: str, shown: str, compared: list[str], clicked: gr.EventData) -> list[Any]:
        """Values for shown, compared, asked, the question, its text, the notice, the part of the log, the form."""
        wanted = {"act": "", "run": "", **(clicked._data or {})}
        act, name = str(wanted["act"]), str(wanted["run"])
        run = self.runs(self.page.jobs()).get(name)
        hidden, same = gr.update(visible=False), self.form.change({})
        if run is None:  # it went meanwhile
            return [shown, compared, "", hidden, "", "", -1, *same]
        if act == "show":
            return ["" if shown == name else name, compared, "", hidden, "", "", -1, *same]
        if act == "compare":
            chosen = [other for other in compared if other != name] if name in compared else [*compared, name]
            return [shown, chosen, "", hidden, "", "", gr.skip(), *same]
        if act == "clone":
            return [shown, compared, "", hidden, "", *self.clone(run, language)]
        return [shown, compared, *self.ask(run, name, language), gr.skip(), *same]

    def clone(self, run: Run, language: str) -> list[Any]:
        """The notice, the part of the log, the form."""
        form = clone_of(run, self.page.workspace, [job.output_dir for job in self.page.jobs() if job.output_dir])
        if not form:
            return [f"✗ {say('runs.no_settings', language)}", gr.skip(), *self.form.change({})]
        return ["✓ " + tell(language, "runs.cloned", path=form["output_dir"]), gr.skip(),
                *self.form.change(self.form.cleaned(form))]

    def ask(self, run: Run, name: str, language: str) -> list[Any]:
        """Asked, the question, its text, the notice."""
        try:
            going = deletion_of(self.page.workspace, run.folder, self.page.ended)
        except Refused as refused:
            return ["", gr.update(visible=False), "", refusal(refused, language)]
        text = tell(language, "runs.confirm", path=name, checkpoints=len(going.checkpoints), jobs=len(going.jobs),
                    megabytes=megabytes(going.size), others=", ".join(path.name for path in going.others) or "-")
        if going.kept:
            text += "\n\n" + tell(language, "runs.kept", names=", ".join(going.kept[:10]))
        if going.users:
            text += "\n\n⚠ " + tell(language, "runs.used_by", names=", ".join(going.users))
        return [name, gr.update(visible=True), text, ""]

    def delete(self, asked: str, shown: str, compared: list[str], language: str) -> list[Any]:
        """Values for shown, compared, the question and the notice."""
        run = self.runs(self.page.jobs()).get(asked)
        left = ["" if shown == asked else shown, [name for name in compared if name != asked], gr.update(visible=False)]
        if run is None:
            return [*left, ""]
        try:
            gone = delete_run(self.page.workspace, run.folder, self.page.ended)
        except Refused as refused:
            return [shown, compared, gr.update(visible=False), refusal(refused, language)]
        self.history.scanned = float("-inf")
        return [*left, "✓ " + tell(language, "runs.deleted", path=asked, megabytes=megabytes(gone.size))]


def create_runs(page: Page) -> None:
    """Below everything else of Tab 6, which is there already."""
    with page.tabs["training"]:
        create_plan(page)
        panel = RunsPanel(page, page.forms["training"])
    page.watch("training", [panel.shown, panel.compared], [panel.table], panel.look_at_table)
    page.act(panel.yes.click, panel.delete, [panel.asked, panel.shown, panel.compared, page.language],
             [panel.shown, panel.compared, panel.question, panel.notice])
