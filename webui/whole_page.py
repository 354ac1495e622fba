"""The whole page: header, the tabs of the eight steps, looks."""

from __future__ import annotations

import copy
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from webui.checkpoints_tab import connect_use, create_checkpoints_tab
from webui.clip_css import CLIP_CSS
from webui.data_tabs import (
    MAX_UPLOAD_MB,
    create_dataset_tab,
    create_prepare_tab,
    create_recordings_tab,
)
from webui.home import create_home
from webui.listen_tab import create_listen_tab
from webui.page_base import Page
from webui.runs_panel import CSS as RUNS_CSS
from webui.runs_panel import create_runs
from webui.training_tab import create_training_tab
from webui.workspace import Workspace

# Fonts of the reader's own system: nothing comes from the internet.
FONTS = ["system-ui", "Noto Sans Ethiopic", "Abyssinica SIL", "Nyala", "Kefa", "sans-serif"]
MONO_FONTS = ["ui-monospace", "DejaVu Sans Mono", "Noto Sans Ethiopic", "monospace"]
QUIET_TEXT, QUIET_TEXT_DARK = "#52525b", "#c4c4cc"  # at least 4.5:1 on their grounds, as all colours here
THEME = gr.themes.Default(font=FONTS, font_mono=MONO_FONTS).set(
    body_text_color_subdued=QUIET_TEXT, body_text_color_subdued_dark=QUIET_TEXT_DARK,
    input_placeholder_color="#63636e", input_placeholder_color_dark="#b4b4bd",
    block_title_text_color="#3f3f46", block_label_text_color="#3f3f46",
    button_primary_background_fill="#c2410c", button_primary_background_fill_dark="#c2410c",
    button_primary_background_fill_hover="#9a3412", button_primary_background_fill_hover_dark="#9a3412",
    button_cancel_background_fill="#b91c1c", button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover="#991b1b", button_cancel_background_fill_hover_dark="#991b1b",
    link_text_color="#1d4ed8", link_text_color_dark="#93c5fd")
CSS = """
#header { align-items: center; }
#heading h1 { margin: 0; font-size: 1.4rem; }
.gradio-container {
    --step-done: #dcfce7; --step-done-text: #14532d; --step-demo: #e0e7ff; --step-demo-text: #312e81;
    --step-running: #fef3c7; --step-running-text: #713f12; --step-next: #ffedd5; --step-next-text: #7c2d12;
}
.dark .gradio-container, .dark.gradio-container, .dark {
    --step-done: #14532d; --step-done-text: #dcfce7; --step-demo: #312e81; --step-demo-text: #e0e7ff;
    --step-running: #713f12; --step-running-text: #fef3c7; --step-next: #7c2d12; --step-next-text: #ffedd5;
}
/* The tabs are the steps of the way. */
#steps > .tab-wrapper { height: auto; padding-bottom: 10px; }
#steps .tab-container { gap: 8px; height: auto; background: none; }
#steps .tab-container::after { display: none; }
#steps .tab-container button { border: 1px solid var(--border-color-primary); border-radius: 16px; height: 32px;
    padding: 2px 12px; color: var(--body-text-color); flex-shrink: 0; }
#steps .tab-container button.selected { outline: 2px solid var(--button-primary-background-fill); font-weight: 700; }
#steps .tab-container button.selected::after { display: none; }
#standing { align-items: baseline; gap: 4px 24px; }
#pipeline .next { margin: 0; font-weight: 600; }
/* Fields of a form: whole, half or a third of its width. */
.form:has(> .whole, > .half, > .third) { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); }
.form:has(> .whole, > .half, > .third) > * { grid-column: span 6; }
.form:has(> .whole, > .half, > .third) > .half { grid-column: span 3; }
.form:has(> .whole, > .half, > .third) > .third { grid-column: span 2; }
.problem .info-text, .problem [class*=info] { color: #b91c1c !important; font-weight: 600; }
.problem textarea, .problem input { border-color: #b91c1c !important; }
.command textarea, .log textarea { font-family: var(--font-mono); font-size: 0.8rem; }
.log textarea { white-space: pre-wrap; }
#recordings-upload [data-testid=block-label] { position: static; }
#listen-result img { max-width: 100%; max-height: 300px; }
/* Gradio's own player: 2.5 to 1 as it comes. */
.block time, .block .playback { color: var(--body-text-color-subdued) !important; }
#checkpoints-table .lines { max-height: 420px; overflow: auto; }
#checkpoints-table tr { cursor: pointer; }
#checkpoints-table button { text-align: left; overflow-wrap: anywhere; }
/* A curve of one point is a line without length: a dot. */
.mark-line path:not([d*="L"]) { stroke-width: 7px; stroke-linecap: round; }
/* The frame of a choice in a plot, where nothing is chosen, is a picture without a name. */
.role-mark:has(> path[d="M0,0h0v0h0Z"]) { display: none; }
#pipeline { padding: 0; }
.live { position: sticky; top: 8px; align-self: flex-start; }
/* Start, Stop and the state of the run stay in sight; nothing can stick in what hides its overflow by scrolling. */
.gradio-container { overflow: clip !important; }
.startbar { position: sticky; bottom: 0; z-index: 20; padding: 8px 0; align-items: center;
    background: var(--body-background-fill); border-top: 1px solid var(--border-color-primary); }
.startbar .status { flex: 1 1 100%; }
/* Gradio puts its own selector into the first of a list of dark ones only. */
.dark .problem .info-text { color: #fca5a5 !important; }
.dark .problem [class*=info] { color: #fca5a5 !important; }
input[type=checkbox]:not(:checked), input[type=radio]:not(:checked) { border-color: #71717a !important; }
.dark input[type=checkbox]:not(:checked) { border-color: #a1a1aa !important; }
.dark input[type=radio]:not(:checked) { border-color: #a1a1aa !important; }
.dark audio { color-scheme: dark; }
#theme { min-width: 44px; flex: 0 0 auto; }
#home .form { gap: 0; }
#home .row { gap: 8px; }
/* Gradio's own words have no Amharic. */
:lang(am) #recordings-upload button .wrap { font-size: 0; }
:lang(am) #recordings-upload button .wrap::after { content: "ፋይሎችን እዚህ ይጣሉ ወይም ጠቅ አድርገው ይምረጡ"; font-size: 1rem; }
#recordings-upload .or { color: inherit; }
@media (max-width: 640px) {
    #header { flex-wrap: wrap; }
    #heading { flex: 1 1 100%; min-width: 100% !important; }
    #steps .tab-container { flex-wrap: nowrap; overflow-x: auto; padding: 4px 2px; }
    #standing > * { min-width: 100% !important; }
    .live { position: static; }
    .form > .half { grid-column: span 6 !important; }
    .form > .third { grid-column: span 6 !important; }
    .row > .form { flex-wrap: wrap; }
    .row > .form > .block { min-width: 100% !important; }
}
.line { align-items: flex-end; }
.report { width: 100%; height: 70vh; border: 1px solid var(--border-color-primary); background: #fff; }
.prose.missing { border-left: 4px solid #f59e0b; padding-left: 10px; }
.tips { color: var(--body-text-color-subdued); }
.keys { padding: 0; }
.keys .key { margin-right: 1.5em; }
.bar { display: flex; gap: 10px; align-items: center; }
.bar progress { flex: 1; height: 14px; }
"""
CSS += CLIP_CSS


class QuickBlocks(gr.Blocks):
    """Gradio's, which makes a new component of each output of an event, even of one that is skipped: a look that
    finds nothing new took the server 0.2 s."""

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        outputs = block_fn.outputs
        if len(outputs) == 1 or not isinstance(predictions, (list, tuple)) or len(predictions) != len(outputs):
            return await super().postprocess_data(block_fn, predictions, state)
        told = [i for i, value in enumerate(predictions) if not (isinstance(value, dict) and value == gr.skip())]
        rest = copy.copy(block_fn)
        rest.outputs = [outputs[i] for i in told]
        values = [predictions[i] for i in told]
        found = await super().postprocess_data(rest, values[0] if len(told) == 1 else values, state) if told else []
        answers = dict(zip(told, found, strict=True))
        return [answers.get(i, gr.skip()) for i in range(len(outputs))]


def create_page(workspace: Workspace) -> tuple[gr.Blocks, Page]:
    with QuickBlocks(title="Amharic voice training", analytics_enabled=False, delete_cache=(3600, 86400),
                     fill_width=True) as demo:
        page = Page(workspace)
        page.create_header()
        create_home(page)
        with gr.Tabs(overflow_behavior="wrap", elem_id="steps"):
            create_recordings_tab(page)
            create_dataset_tab(page)
            create_prepare_tab(page)
            create_training_tab(page)
            create_runs(page)
            chosen = create_checkpoints_tab(page)
            create_listen_tab(page)
        connect_use(page, *chosen)
        page.connect(demo)
    quiet(demo)
    return demo, page


def quiet(demo: gr.Blocks) -> None:
    """Gradio's page tells the state of every event to each of its outputs, and looks for these in the tree of all
    components, one by one, at every answer: an idle page took most of a processor's time. One component is told."""
    first = next(iter(demo.blocks.values()))
    for event in demo.fns.values():
        event.show_progress_on = [first]  # type: ignore[list-item]


def launch_options(workspace: Workspace) -> dict[str, Any]:
    """Everything off that would let a browser reach more than the page, or the page reach the internet."""
    return {"theme": THEME, "css": CSS + RUNS_CSS, "allowed_paths": [],
            "blocked_paths": [str(workspace.private)], "max_file_size": f"{MAX_UPLOAD_MB}mb", "footer_links": [],
            "ssr_mode": False, "run_history": False, "mcp_server": False, "enable_monitoring": False, "pwa": False,
            "show_error": True, "inbrowser": False}


def only_for_hosts(server_name: str) -> dict[str, Any]:
    """launch(app_kwargs=...) of a page without a password: other websites cannot reach it by giving their own name
    this machine's address (DNS rebinding)."""
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", server_name]
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]}
