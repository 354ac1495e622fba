"""What shows a job or a run: state, progress, Stop, log, curves."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from webui.jobs import Job, kill_job, load_job, read_tail, stop_job
from webui.page_base import Page, progress_text, tell
from webui.readers import Progress, progress_of
from webui.texts import say
from webui.words import in_words
from webui.workspace import Refused

SECONDS_TO_STOP = 10  # then the page offers to kill
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#475569")


def curves(rows: Sequence[tuple[int, float, str]], series: Sequence[str]) -> pd.DataFrame | None:
    """The value of a plot: rows of (step, value, name).

    A name without rows gets an empty one: a LinePlot knows only the names that it was first drawn with.
    """
    if not rows:
        return None
    missing = sorted({*series} - {name for *_, name in rows})
    return pd.DataFrame([*rows, *((rows[0][0], None, name) for name in missing)], columns=["step", "value", "series"])


def drawn(rows: Sequence[tuple[int, float, str]], series: Sequence[str]) -> dict[str, Any]:
    """The update of a plot; one without a curve is not shown."""
    return gr.update(value=curves(rows, series), visible=bool(rows))


def legend(series: Sequence[str]) -> str:
    """HTML: the plot's own legend does not fit below a low plot."""
    return " ".join(f'<span class="key"><span style="color: {colour}">■</span> {html.escape(name)}</span>'
                    for name, colour in zip(series, COLOURS, strict=False))


def create_plot(page: Page, key: str, series: Sequence[str], **options: Any) -> Any:
    plot = gr.LinePlot(visible=False, x="step", y="value", color="series", label=say(key, "en"), x_title=" ",
                       y_title=" ", colors_in_legend=[], color_map=dict(zip(series, COLOURS, strict=False)), **options)
    return page.labelled(plot, label=key)


def progress_bar(progress: Progress | None, language: str) -> str:
    """HTML of our own numbers and texts only."""
    if progress is None:
        return ""
    bar = f'<progress value="{progress.done}" max="{progress.total}"></progress>' if progress.total else ""
    return f'<div class="bar">{bar}<span>{html.escape(progress_text(progress, language))}</span></div>'


def jobs_of(jobs: Sequence[Job], kinds: Sequence[str], output_dir: Path | None = None) -> list[Job]:
    """Those of these kinds (and in this output directory). Pure."""
    return [job for job in jobs if job.kind in kinds and (output_dir is None or job.output_dir == output_dir)]


def first_running(jobs: Sequence[Job]) -> Job | None:
    """The first job that runs, else the first. Pure."""
    return next((job for job in jobs if job.live), jobs[0] if jobs else None)


def newest(jobs: Sequence[Job], kinds: Sequence[str], output_dir: Path | None = None) -> Job | None:
    """Of these kinds (and in this output directory) the newest job that runs, else the newest. Pure."""
    return first_running(jobs_of(jobs, kinds, output_dir))


def card(text: str, state: str = "") -> dict[str, Any]:
    """The update of a status: its text, in the colour of a job's state."""
    return gr.update(value=text, elem_classes=["status", *([f"state-{state}"] if state else [])])


def does_not_stop(job: Job, now: float) -> bool:
    """Whether a job still runs although it was asked to stop a while ago. Pure."""
    return job.live and job.stop_asked is not None and now - job.stop_asked > SECONDS_TO_STOP


class StopButtons:
    """Stop and Kill of a panel, which may stand in the bar of Start, after other buttons that belong there."""

    def __init__(self, page: Page, name: str, *others: Any) -> None:
        self.others = others
        self.stop = page.button("stop", variant="stop", visible=False, elem_id=f"{name}-stop", render=False)
        self.kill = page.button("kill", variant="secondary", visible=False, elem_id=f"{name}-kill", render=False)

    def render(self) -> None:
        for button in (*self.others, self.stop, self.kill):
            button.render()


def create_job_panel(page: Page, tab: str, kinds: Sequence[str], output_dir: Any = None,
                     above_log: Callable[[], None] = lambda: None, name: str = "",
                     buttons: StopButtons | None = None) -> None:
    """State, progress, Stop and log of the newest job of these kinds, in the folder that the box names, if given.

    Where several run, a list offers the others. name: of the panel, where a tab has several. buttons: where these
    stand elsewhere.
    """
    name = name or tab
    own = buttons or StopButtons(page, name)
    stop, kill = own.stop, own.kill
    # Takes any value: a job may end while its name is on the way.
    pick = page.add(gr.Dropdown, "shown_job", choices=[("newest_job", "")], value="", visible=False, interactive=True,
                    allow_custom_value=True, elem_id=f"{name}-job")
    status = gr.Markdown(elem_id=f"{name}-status", elem_classes=["status"])
    bar = gr.HTML(elem_id=f"{name}-progress", padding=False)
    if buttons is None:
        with gr.Row():
            own.render()
    above_log()
    log = page.add(gr.Textbox, "log", lines=12, max_lines=12, interactive=False, elem_id=f"{name}-log", visible=False,
                   elem_classes=["log"], buttons=["copy"])
    shown = gr.State("")

    def look(jobs: Sequence[Job], language: str, picked: str, *typed: str) -> list[Any]:
        try:
            own = jobs_of(jobs, kinds, page.workspace.inside(typed[0]) if typed else None)
        except Refused:
            own = []
        running = [job for job in own if job.live]
        names = [(f"{job.title} ({job.pid})", job.id) for job in running]
        still = picked if picked in [job.id for job in running] else ""
        offered = gr.update(choices=[(say("newest_job", language), ""), *names], visible=len(names) > 1,
                            **({} if still == picked else {"value": still}))
        job = next((job for job in running if job.id == still), first_running(own))
        if job is None:
            hidden = gr.update(visible=False)
            return [offered, "", card(say("no_job_yet", language)), "", hidden, hidden,
                    gr.update(value="", visible=False)]
        key, values = job.message()
        values = in_words(job.kind, values, language)
        state = f"**{page.name(job, language)}**: {tell(language, key, **values)}"
        progress = progress_bar(progress_of(job.log), language) if job.live else ""
        return [offered, job.id, card(state, job.state), progress, gr.update(visible=job.live),
                gr.update(visible=does_not_stop(job, time.time())), gr.update(value=read_tail(job.log), visible=True)]

    def end(how: Callable[[Job], None]) -> Callable[[str, str], None]:
        def end_shown(shown: str, picked: str) -> None:
            try:
                how(load_job(page.workspace, picked or shown))
            except Refused:  # it is gone, as was wanted
                return
            time.sleep(0.2)  # so that the look after this one often finds it stopped

        return end_shown

    page.watch(tab, [pick, *([output_dir] if output_dir else [])], [pick, shown, status, bar, stop, kill, log], look)
    for button, how in ((stop, stop_job), (kill, kill_job)):
        page.act(button.click, end(how), [shown, pick])


def reason_of(entry: dict[str, Any]) -> str:
    """Why a checkpoint cannot be used, without the folder it lies in."""
    return str(entry["problem"]).replace(f"{Path(entry['path']).parent}/", "").rstrip(".")
