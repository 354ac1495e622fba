"""Where somebody begins: two questions, and the way from there, with what is to be downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from tools._common import ToolError
from tools.model_folder import (
    FOR_FEATURES,
    FOR_FEATURES_25,
    FOR_SOUND,
    OWN,
    OWN_25,
    PARTS,
    PARTS_25,
    find_parts,
    own_download,
)
from tools.model_folder import recognised as model_in
from webui import pipeline
from webui.jobs import Job
from webui.page_base import Page, tell
from webui.texts import say
from webui.workspace import Refused, Workspace

STEPS_OF = {
    "texts": ("way.import", "way.filter", "way.prepare", "way.train", "way.listen"),
    "alone": ("way.transcribe", "way.filter", "way.prepare", "way.train", "way.listen"),
    "demo": ("way.demo_train", "way.listen"),
    "fork": ("way.fork_train", "way.listen"),
}
RELEASED = {"indextts2": (OWN, PARTS, (*FOR_FEATURES, *FOR_SOUND)),
            "indextts2.5": (OWN_25, PARTS_25, FOR_FEATURES_25)}


def way_text(have: str, model: str, workspace: Workspace, language: str) -> str:
    """Markdown: the steps, and what is still to be downloaded."""
    if have == "demo":
        model = "scratch"  # its codes are those of the demo's own codec
        if not (workspace.root / pipeline.DEMO["train_manifest"]).is_file():
            return f"⚠ {tell(language, 'way.no_demo', path=workspace.root)}"
    steps = [f"{number}. {say(key, language)}" for number, key in enumerate(STEPS_OF[have], 1)]
    return "\n".join([*steps, "", download_text(model, workspace, language)])


def download_text(model: str, workspace: Workspace, language: str) -> str:
    """What a model needs from elsewhere, with the command that brings it; that it is there, where it is."""
    if model not in RELEASED:
        return say("way.no_download", language)
    repository, parts, names = RELEASED[model]
    folder = workspace.root / "checkpoints"
    try:
        if model_in(folder) == model:
            find_parts(folder, list(dict.fromkeys(names)))
            return f"✓ {tell(language, 'way.there', path='checkpoints')}"
    except (ToolError, OSError):
        pass
    gigabytes = sum(parts[name].megabytes for name in dict.fromkeys(names)) / 1000
    command = own_download(folder, (), repository)
    return say("way.download", language, size=f"{gigabytes:.1f}") + f"\n\n```\n{command}\n```\n"


def create_home(page: Page) -> None:
    """Above the tabs; open until it has been answered."""
    with page.accordion("home", open=True, elem_id="home") as page.home:
        page.prose("home.intro")
        with gr.Row():
            have = page.add(gr.Radio, "home.have", choices=[(f"home.have.{name}", name) for name in pipeline.HAVE],
                            elem_id="home-have", interactive=True)
            model = page.add(gr.Radio, "home.model", value="scratch", elem_id="home-model", interactive=True,
                             choices=[(f"home.model.{name}", name) for name in pipeline.MODELS])
        told = gr.Markdown(elem_id="home-way")
        notice = page.notice()
    page.way = [have, model]

    def answer(have: str | None, model: str, language: str) -> str:
        if have is None:
            return ""
        try:
            pipeline.save_way(page.workspace, have, model)
        except OSError:
            return f"✗ {tell(language, 'not_writable', path=page.workspace.show(page.workspace.private))}"
        return ""

    def look(jobs: Sequence[Job], language: str) -> list[Any]:
        way = pipeline.load_way(page.workspace)
        if "have" not in way:
            return [""]
        try:
            return [way_text(way["have"], way.get("model", "scratch"), page.workspace, language)]
        except Refused:
            return [""]

    page.watch(None, [], [told], look)
    page.act([have.input, model.input], answer, [have, model, page.language], [notice], trigger_mode="always_last")
