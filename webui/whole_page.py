"""The whole page: header, eight tabs, looks."""

from __future__ import annotations

from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from webui.checkpoints_tab import connect_use, create_checkpoints_tab
from webui.data_tabs import (
    MAX_UPLOAD_MB,
    create_corpus_tab,
    create_dataset_tab,
    create_preprocess_tab,
    create_recordings_tab,
    create_tokenizer_tab,
)
from webui.listen_tab import create_listen_tab
from webui.page_base import Page
from webui.runs_panel import CSS as RUNS_CSS
from webui.runs_panel import create_runs
from webui.training_tab import create_training_tab
from webui.workspace import Workspace

# Fonts of the reader's own system: nothing comes from the internet.
FONTS = ["system-ui", "Noto Sans Ethiopic", "Abyssinica SIL", "Nyala", "Kefa", "sans-serif"]
MONO_FONTS = ["ui-monospace", "DejaVu Sans Mono", "Noto Sans Ethiopic", "monospace"]
CSS = """
#header { align-items: center; }
#heading h1 { margin: 0; font-size: 1.4rem; }
#pipeline .step { display: inline-block; white-space: nowrap; line-height: 1.4; }
#pipeline .step { padding: 2px 8px; border-radius: 10px; border: 1px solid var(--border-color-primary); }
#pipeline .step.done { background: #dcfce7; color: #14532d; }
#pipeline .step.done::before { content: "✓ "; }
#pipeline .step.running { background: #fef3c7; color: #78350f; }
#pipeline .step.running::before { content: "▶ "; }
#pipeline .next { margin-left: 1em; font-weight: 600; }
#pipeline { line-height: 2; }
.problem .info-text, .problem [class*=info] { color: #b91c1c !important; font-weight: 600; }
.problem textarea, .problem input { border-color: #b91c1c !important; }
.command textarea, .log textarea { font-family: var(--font-mono); font-size: 0.8rem; }
.log textarea { white-space: pre-wrap; }
#recordings-upload [data-testid=block-label], #listen-picture [data-testid=block-label] { position: static; }
#checkpoints-table .table-wrap { overflow-x: auto; }
#checkpoints-table .table-wrap > .upload-container { min-width: 960px; }
/* A curve of one point is a line without length: a dot. */
.mark-line path:not([d*="L"]) { stroke-width: 7px; stroke-linecap: round; }
#pipeline { padding: 0; }
#running { margin-top: -8px; }
.live { position: sticky; top: 8px; align-self: flex-start; }
.line { align-items: flex-end; }
.report { width: 100%; height: 70vh; border: 1px solid var(--border-color-primary); background: #fff; }
.prose.missing { border-left: 4px solid #f59e0b; padding-left: 10px; }
.tips { color: var(--body-text-color-subdued); }
.keys { padding: 0; }
.keys .key { margin-right: 1.5em; }
.bar { display: flex; gap: 10px; align-items: center; }
.bar progress { flex: 1; height: 14px; }
.dark #pipeline .step.done { background: #14532d; color: #dcfce7; }
.dark #pipeline .step.running { background: #78350f; color: #fef3c7; }
"""


def create_page(workspace: Workspace) -> tuple[gr.Blocks, Page]:
    with gr.Blocks(title="Amharic voice training", analytics_enabled=False, delete_cache=(3600, 86400),
                   fill_width=True) as demo:
        page = Page(workspace)
        page.create_header()
        with gr.Tabs() as tabs:
            create_recordings_tab(page)
            create_dataset_tab(page)
            create_corpus_tab(page)
            create_tokenizer_tab(page)
            create_preprocess_tab(page)
            create_training_tab(page)
            create_runs(page)
            chosen = create_checkpoints_tab(page)
            create_listen_tab(page)
        connect_use(page, *chosen)
        page.connect(demo, tabs)
    return demo, page


def launch_options(workspace: Workspace) -> dict[str, Any]:
    """Everything off that would let a browser reach more than the page, or the page reach the internet."""
    return {"theme": gr.themes.Default(font=FONTS, font_mono=MONO_FONTS), "css": CSS + RUNS_CSS, "allowed_paths": [],
            "blocked_paths": [str(workspace.private)], "max_file_size": f"{MAX_UPLOAD_MB}mb", "footer_links": [],
            "ssr_mode": False, "run_history": False, "mcp_server": False, "enable_monitoring": False, "pwa": False,
            "show_error": True, "inbrowser": False}


def only_for_hosts(server_name: str) -> dict[str, Any]:
    """launch(app_kwargs=...) of a page without a password: other websites cannot reach it by giving their own name
    this machine's address (DNS rebinding)."""
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", server_name]
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]}
