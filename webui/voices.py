"""Tab 8: a voice to speak in, by upload or microphone; takes; two checkpoints side by side; an evaluation to hear."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tools._common import ToolError, atomic_path
from tools.edit_recordings import samples_of
from tools.sound_decoder import flac_bytes
from webui.command_form import create_form
from webui.job_panel import create_job_panel, newest
from webui.jobs import Job
from webui.page_base import Page, refusal, tell
from webui.recorder import sound_at
from webui.served_files import link_to
from webui.takes import evaluation_html, player, result_html, takes_html, takes_of
from webui.texts import say
from webui.workspace import Refused, Workspace, as_text

FOLDER = "prompts"


def keep_prompt(workspace: Workspace, uploaded: Path) -> Path:
    """A FLAC copy of a sound of any common format, under a new name in prompts/. Raises: Refused, ToolError."""
    samples, sound = samples_of(sound_at(str(uploaded)))
    stem = re.sub(r"[^\w.-]+", "_", uploaded.stem).strip("._")[:60] or "voice"
    names = itertools.chain([f"{stem}.flac"], (f"{stem}_{number}.flac" for number in itertools.count(2)))
    target = next(path for name in names if not (path := workspace.inside(f"{FOLDER}/{name}")).exists())
    try:
        with atomic_path(target) as temporary:
            temporary.write_bytes(flac_bytes(samples, sound))
    except OSError as error:
        raise Refused("not_writable", path=workspace.show(target)) from error
    return target


def create_voice_picker(page: Page, kind: str) -> None:
    """Below a form: what its prompt sounds like, and another one from a file or the microphone."""
    prompt = page.forms[kind].inputs["prompt"]
    heard = gr.HTML(elem_id=f"{kind}-prompt-player", padding=False)
    with page.accordion("voices.other"):
        audio = page.add(gr.Audio, "voices.audio", sources=["upload", "microphone"], type="filepath", editable=False,
                         buttons=[], elem_id=f"{kind}-voice")
    notice = page.notice()

    def take(uploaded: str | None, language: str) -> list[Any]:
        if not uploaded:
            return [gr.skip(), gr.skip(), ""]
        try:
            path = page.workspace.show(keep_prompt(page.workspace, Path(uploaded)))
        except Refused as refused:
            return [gr.skip(), None, refusal(refused, language)]
        except ToolError as error:
            return [gr.skip(), None, f"✗ {tell(language, 'tool_refuses', reason=as_text(error))}"]
        return [path, None, "✓ " + tell(language, "voices.kept", path=path)]

    def look(jobs: Sequence[Job], language: str, typed: str) -> list[str]:
        try:
            path = page.workspace.inside(typed, must_exist=True)
        except Refused:
            return [""]
        return [player(say("voices.heard", language), path, linker(page)) if path.is_file() else ""]

    page.act([audio.upload, audio.stop_recording], take, [audio, page.language], [prompt, audio, notice])
    page.watch("listen", [prompt], [heard], look)


def linker(page: Page) -> Any:
    return lambda path: link_to(page.workspace, page.secret, path)


def create_comparison_of_two(page: Page) -> None:
    with page.accordion("voices.compare"), gr.Row():
        with gr.Column():
            create_form(page, "compare", "listen", [["text"], ["checkpoint", "other"], ["prompt"], ["output_dir"]],
                        [["codec", "model_dir"], ["temperature", "takes", "seed"], ["language"]])
            create_voice_picker(page, "compare")
        with gr.Column(elem_classes=["live"]):
            create_job_panel(page, "listen", ["compare"], name="compare")


def create_result(page: Page) -> None:
    """What was spoken last."""
    result = gr.HTML(elem_id="listen-result", padding=False)

    def look(jobs: Sequence[Job], language: str) -> list[str]:
        job = newest([job for job in jobs if job.state == "finished"], ["synthesize"])
        return [result_html(job.output_dir, linker(page), language) if job and job.output_dir else ""]

    page.watch("listen", [], [result], look)


def create_takes(page: Page) -> None:
    """All that was spoken here, the newest first."""
    with page.accordion("takes.title", open=True):
        shown = gr.HTML(elem_id="takes", padding=False)

    def look(jobs: Sequence[Job], language: str) -> list[str]:
        return [takes_html(takes_of(jobs, page.workspace), linker(page), page.workspace, language)]

    page.watch("listen", [], [shown], look)


def create_evaluation_table(page: Page) -> None:
    shown = gr.HTML(elem_id="evaluation-table", padding=False)

    def look(jobs: Sequence[Job], language: str) -> list[str]:
        job = newest([job for job in jobs if job.state == "finished"], ["evaluate"])
        if job is None or job.output_dir is None:
            return [""]
        try:
            folder = page.workspace.inside(str(job.output_dir), must_exist=True)
        except Refused:
            return [""]
        return [evaluation_html(folder, linker(page), language)
                or f'<p class="meta">{html.escape(say("evaluation.none", language))}</p>']

    page.watch("listen", [], [shown], look)
