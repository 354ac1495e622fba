"""Tab 7: checkpoints of all runs, what is in them, deleting, exporting, handing one to tab 8; runs compared."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any

import gradio as gr

from webui import pipeline
from webui.command_form import FormSection
from webui.command_lines import Form, Problem
from webui.exports import create_downloads, create_folder_export
from webui.job_panel import create_job_panel, create_plot, drawn, legend, reason_of
from webui.jobs import Job, deletable, delete_checkpoint
from webui.page_base import QUIET, Page, beside, megabytes, refusal, tell
from webui.readers import curve, loss_of, sample_points
from webui.texts import say
from webui.workspace import Refused

COMPARED = [str(number) for number in range(1, 9)]  # runs in one plot, by number
COLUMNS = ("run", "file", "step", "epoch", "loss", "best", "size", "state")
CLICKS = """element.addEventListener("click", event => {
    const button = event.target.closest("tr")?.querySelector("[data-checkpoint]");
    if (button) trigger("click", {checkpoint: button.dataset.checkpoint});
})"""  # "path" would make it an uploaded file for Gradio
METRICS = {"val_mel": ("val", "mel_loss"), "val_text": ("val", "text_loss"), "train_mel": ("train", "mel_loss"),
           "train_text": ("train", "text_loss")}


class ExportForm(FormSection):
    """An export never overwrites a file: it might be a checkpoint."""

    def problems(self, form: Form) -> dict[str, Problem]:
        found = super().problems(form)
        if "output" not in found and self.page.workspace.inside(str(form["output"])).exists():
            found["output"] = "file_in_the_way", {"path": form["output"]}
        return found


def create_checkpoints_tab(page: Page) -> tuple[Any, Any, Any]:
    """Returns the chosen checkpoint, the button that hands it to tab 8, and the notice."""
    with page.tab("checkpoints"):
        state = gr.Markdown(elem_id="checkpoints-state")
        table = gr.HTML(elem_id="checkpoints-table", elem_classes=["cards"], js_on_load=CLICKS, padding=False)
        with gr.Row(elem_classes=["line"]):
            chosen = page.add(gr.Textbox, "checkpoints.chosen", max_lines=1, scale=4, elem_id="checkpoints-chosen")
            use = page.button("checkpoints.use", scale=1, elem_id="checkpoints-use")
            delete = page.button("checkpoints.delete", variant="stop", scale=1, elem_id="checkpoints-delete")
        create_downloads(page, chosen)
        with gr.Group(visible=False) as confirmation:
            question = gr.Markdown(elem_classes=["notice"])
            with gr.Row():
                yes = page.button("checkpoints.yes", variant="stop", elem_id="checkpoints-yes")
                cancel = page.button("checkpoints.cancel", elem_id="checkpoints-cancel")
        notice = page.notice()
        with page.accordion("checkpoints.export"), gr.Row():
            with gr.Column():
                form = ExportForm(page, "export", "checkpoints")
                form.row("checkpoint", "output")
                form.command_and_start("start")
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "checkpoints", ["export"])
        of_folder = create_folder_export(page)
        create_comparison(page)
        connect_deletion(page, chosen, (delete, yes, cancel), (confirmation, question, notice))

    def look(jobs: Sequence[Job], language: str) -> list[Any]:
        runs, rows = pipeline.find_runs(page.workspace, jobs), []
        for run in runs:
            found = page.checkpoints.look(run)
            name, unknown = page.workspace.show(run), sorted(found.verifying, reverse=True)
            rows += [[name, file, *[""] * 5, say("state.verifying", language)] for file in unknown]
            rows += [checkpoint_row(name, entry, language) for entry in found.checkpoints]
        text = say("checkpoints.counted", language, count=len(rows), runs=len(runs)) if runs else say(
            "checkpoints.none", language)
        return [text, table_of(rows, language)]

    def choose(clicked: gr.EventData) -> list[str]:
        return [str((clicked._data or {}).get("checkpoint", ""))] * 3

    page.act(table.click, choose, [], [chosen, form.inputs["checkpoint"], of_folder])
    page.watch("checkpoints", [], [state, table], look)
    return chosen, use, notice


def table_of(rows: Sequence[Sequence[str]], language: str) -> str:
    """HTML of our own texts, numbers and escaped names; a click anywhere in a line chooses its checkpoint. Pure."""
    labels = [html.escape(say(f"column.{name}", language)) for name in COLUMNS]
    lines = []
    for run, names, *others in rows:
        path = html.escape(f"{run}/{names.split(' = ')[0]}")
        cells = [html.escape(run), f'<button type="button" data-checkpoint="{path}">{html.escape(names)}</button>',
                 *map(html.escape, others)]
        lines.append("<tr>" + "".join(f'<td data-label="{label}"><span>{cell}</span></td>'
                                      for label, cell in zip(labels, cells, strict=True)) + "</tr>")
    head = "".join(f"<th>{label}</th>" for label in labels)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="lines">{table}</div>' if rows else ""


def checkpoint_row(run: str, entry: dict[str, Any], language: str) -> list[str]:
    """A line of the table: run, names, step, epoch, validation loss, best loss, size, verified or what is wrong."""
    size = f"{megabytes(entry['bytes'])} MB" if entry.get("bytes") is not None else ""
    if not entry["verified"]:
        return [run, " = ".join(entry["names"]), "", "", "", "", size, f"✗ {reason_of(entry)}"]
    losses = [loss_of(value, "") for value in (entry["last_val"], entry["best"])]
    return [run, " = ".join(entry["names"]), str(entry["step"]), str(entry["epoch"]), *losses, size,
            f"✓ {say('state.verified', language)}"]


def connect_deletion(page: Page, chosen: Any, buttons: Sequence[Any], answers: Sequence[Any]) -> None:
    """Deleting the chosen checkpoint, after a question: the one that was asked about, whatever the box says by then."""
    (delete, yes, cancel), (confirmation, question, notice) = buttons, answers
    asked = gr.State("")

    def ask(typed: str, language: str) -> list[Any]:
        try:
            path = page.workspace.show(deletable(page.workspace, typed))
        except Refused as refused:
            return [beside(refused, language), gr.update(visible=False), "", "", ""]
        text = tell(language, "checkpoints.confirm", path=path)
        return [gr.update(info="", elem_classes=[]), gr.update(visible=True), text, "", path]

    def remove(path: str, language: str) -> list[Any]:
        try:
            gone = delete_checkpoint(page.workspace, path)
            text = "✓ " + tell(language, "checkpoints.deleted", names=", ".join(map(page.workspace.show, gone)))
        except Refused as refused:
            text = refusal(refused, language)
        return [gr.update(visible=False), text]

    delete.click(ask, [chosen, page.language], [chosen, confirmation, question, notice, asked], **QUIET)
    page.act(yes.click, remove, [asked, page.language], [confirmation, notice])
    gr.on([cancel.click, chosen.change], lambda: gr.update(visible=False), None, [confirmation], **QUIET)


def connect_use(page: Page, chosen: Any, use: Any, notice: Any) -> None:
    """Hands the checkpoint that tab 7 has chosen to tab 8."""
    checkpoint = page.forms["synthesize"].inputs["checkpoint"]

    def hand_over(typed: str, language: str) -> list[Any]:
        path, problem = page.locate(language, typed, must_exist=True)
        if path is None:
            return [problem, gr.skip(), ""]
        return [problem, typed, "✓ " + tell(language, "checkpoints.used", path=typed)]

    page.act(use.click, hand_over, [chosen, page.language], [chosen, checkpoint, notice])


def create_comparison(page: Page) -> None:
    """Curves of several runs in one plot."""
    with gr.Row():
        runs = page.add(gr.Dropdown, "checkpoints.runs", multiselect=True, interactive=True, scale=3,
                        elem_id="checkpoints-runs")
        metric = page.add(gr.Dropdown, "checkpoints.metric", choices=[(f"metric.{name}", name) for name in METRICS],
                          value="val_mel", interactive=True, elem_id="checkpoints-metric")
    key = gr.HTML(elem_classes=["keys"], padding=False)
    plot = create_plot(page, "checkpoints.curves", COMPARED, height=320, elem_id="checkpoints-plot")

    def look(jobs: Sequence[Job], language: str, chosen: list[str], name: str) -> list[Any]:
        present = {page.workspace.show(run): run for run in pipeline.find_runs(page.workspace, jobs)}
        found = ((run, curve(page.reader(present[run]).points(), *METRICS[name])) for run in chosen or present
                 if run in present)
        compared = dict(itertools.islice(((run, pairs) for run, pairs in found if pairs), len(COMPARED)))
        limit = max(50, 1000 // max(1, len(compared)))  # more points than a thousand make the plot drag
        rows = [(step, value, number) for pairs, number in zip(compared.values(), COMPARED, strict=False)
                for step, value in sample_points(pairs, min(500, limit))]
        return [gr.update(choices=list(present)), legend(list(compared)), drawn(rows, COMPARED)]

    page.watch("checkpoints", [runs, metric], [runs, key, plot], look)
