"""Tab 8: speaking with a checkpoint, with every new one of a run, and judging a voice in numbers."""

from __future__ import annotations

import gradio as gr

from webui.command_form import create_form
from webui.job_panel import create_job_panel
from webui.page_base import Page
from webui.voices import (
    create_comparison_of_two,
    create_evaluation_table,
    create_result,
    create_takes,
    create_voice_picker,
)


def create_listen_tab(page: Page) -> None:
    with page.tab("listen"):
        page.prose("listen.intro")
        with gr.Row():
            with gr.Column():
                create_form(page, "synthesize", "listen", [["text"], ["checkpoint", "prompt"], ["output"]],
                            [["codec", "model_dir"], ["tokenizer"], ["temperature", "top_k", "top_p"],
                             ["takes", "seed"], ["language", "greedy"]],
                            start="listen.start").check_when_read("checkpoint")
                create_voice_picker(page, "synthesize")
            with gr.Column(elem_classes=["live"]):
                create_result(page)
                create_job_panel(page, "listen", ["synthesize"])
        create_takes(page)
        create_comparison_of_two(page)
        with page.accordion("listen.watch"), gr.Row():
            with gr.Column():
                create_form(page, "watch", "listen", [["watch"]],
                            [["text_file", "prompt"], ["codec", "model_dir"], ["language", "takes"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "listen", ["watch"], name="watch")
        with page.accordion("listen.evaluate"), gr.Row():
            with gr.Column():
                create_form(page, "evaluate", "listen", [["checkpoint", "data_dir"], ["output_dir"]],
                            [["recordings", "codec"], ["model_dir", "recogniser"], ["texts", "takes"]]
                            ).check_when_read("checkpoint")
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "listen", ["evaluate"], name="evaluate")
        create_evaluation_table(page)
