"""Tab 7: a voice folder for IndexTTS2's own inference, and links to what was exported or chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from webui.command_form import FormSection
from webui.command_lines import Form, Problem
from webui.job_panel import create_job_panel
from webui.jobs import Job
from webui.page_base import Page
from webui.takes import download_html, exported
from webui.voices import linker
from webui.workspace import Refused


class FolderForm(FormSection):
    """The program writes no folder over another."""

    def problems(self, form: Form) -> dict[str, Problem]:
        found = super().problems(form)
        if "output_dir" not in found:
            folder = self.page.workspace.inside(str(form["output_dir"]))
            if folder.is_dir() and any(folder.iterdir()):
                found["output_dir"] = "file_in_the_way", {"path": form["output_dir"]}
        return found


def create_folder_export(page: Page) -> Any:
    """Returns the input that holds the checkpoint."""
    with page.accordion("exports.folder"), gr.Row():
        with gr.Column():
            page.prose("exports.folder_intro")
            form = FolderForm(page, "export_folder", "checkpoints")
            form.row("checkpoint", "model_dir")
            form.row("output_dir", "tokenizer")
            form.row("dtype", "copy")
            form.command_and_start("start")
        with gr.Column(elem_classes=["live"]):
            create_job_panel(page, "checkpoints", ["export_folder"], name="export_folder")
    return form.inputs["checkpoint"]


def create_downloads(page: Page, chosen: Any) -> None:
    """Of the checkpoint that is chosen, and of the newest export."""
    shown = gr.HTML(elem_id="downloads", padding=False)

    def look(jobs: Sequence[Job], language: str, typed: str) -> list[str]:
        paths = exported(jobs)
        try:
            paths = [page.workspace.inside(typed, must_exist=True), *paths] if typed else paths
        except Refused:
            pass
        return [download_html(list(dict.fromkeys(paths)), linker(page), page.workspace)]

    page.watch("checkpoints", [chosen], [shown], look)
