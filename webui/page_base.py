"""What every tab is built on: labels in two languages, and what follows the workspace by one event.

The server keeps no state of its own but caches: what runs is read from the workspace, what a user typed is in that
user's browser. Handlers answer at once (queue=False) and never wait for a program.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from webui import pipeline
from webui.belonging import DataRows
from webui.jobs import Ended, Job, list_jobs
from webui.readers import CheckpointTable, Machine, MetricsReader, Progress, progress_of
from webui.served_files import logged_in
from webui.texts import LANGUAGES, TEXTS, say
from webui.workspace import Refused, Workspace, load_or_make_secret

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
CHANGED = "changed"  # the path that says whether a window shows what there is
WINDOWS = 200  # of which the server remembers what they show
OPEN_PANEL = '[...document.querySelectorAll("[role=tabpanel]")].find(panel => panel.offsetParent)'
# The forms that can be seen compare their fields with what was checked last.
RECHECK = f"""() => {OPEN_PANEL}?.querySelectorAll("[id$=-recheck]").forEach(button => button.click())"""
# Every two seconds the page asks, at next to no cost, whether what it shows is still so; only if not, or if somebody
# has just done something, does Gradio compare all components. These listeners stand for an event of each field: what
# Gradio's page takes to open grows with the number of components times that of events. What was typed is checked before
# a click does anything. A log box stays at its end, unless its reader has scrolled up. A tab that is chosen before the
# page has opened stays chosen.
FOLLOW = f"""() => {{
    let soon, typed = false;
    window.lastAct = window.tabOpened = 0;
    const look = () => {{
        typed = false;
        if (window.pageOpen) document.getElementById("look").click();
    }};
    const follow = event => {{
        if (event.type === "click" && !event.isTrusted) return;  // one of the page's own
        if (event.type === "click" && typed) ({RECHECK})();
        if (event.target.closest?.("[role=tab]")) window.tabOpened = Date.now();
        typed = event.type === "input" || typed && event.type !== "click";
        window.lastAct = Date.now();
        clearTimeout(soon);
        soon = setTimeout(look, 200);
    }};
    for (const kind of ["input", "change", "click", "pointerup", "keyup", "drop", "visibilitychange"])
        addEventListener(kind, follow, true);
    addEventListener("pointerdown", event => {{ window.tabChosen ||= !!event.target.closest?.("[role=tab]"); }}, true);
    const followLog = box => {{
        if (box.atEnd === undefined) {{
            box.atEnd = true;
            box.addEventListener("scroll", () => {{
                box.atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 30;
            }});
        }}
        if (box.atEnd) box.scrollTop = box.scrollHeight;
    }};
    const same = async () => Date.now() > window.lastAct + 4000
        && await (await fetch(`{CHANGED}/${{window.pageId}}`)).text() === "no";
    setInterval(async () => {{
        document.querySelectorAll(".log textarea").forEach(followLog);
        if (!document.hidden && !await same().catch(() => false)) look();
    }}, 2000);
}}"""
# gr.Tabs(selected=...) is lost on a page that is still being built: clicks the tab until it is open.
SHOW_TAB = """async (view) => {
    const button = () => document.getElementById(`tab-${view.tab}-button`);
    for (let i = 0; i < 50 && view.tab && !window.tabChosen && button()?.ariaSelected !== "true"; i++) {
        if (i % 5 === 0) button()?.click();
        await new Promise(resolve => setTimeout(resolve, 100));
    }
    window.pageOpen = true;
    return String(Date.now());
}"""
SET_LANGUAGE = "(language) => { document.documentElement.lang = language; }"
SWITCH_THEME = """() => {
    const dark = document.body.classList.toggle("dark");
    localStorage.setItem("amharic-voice-theme", dark ? "dark" : "light");
}"""
KEEP_THEME = """() => {
    const kept = localStorage.getItem("amharic-voice-theme");
    if (kept) document.body.classList.toggle("dark", kept === "dark");
}"""
MARKDOWN = re.compile(r"([\\`*_\[\]<>~|$&#])")
Look = Callable[..., Sequence[Any]]


def plain(value: Any) -> Any:
    """A value that Markdown shows as it is."""
    return MARKDOWN.sub(r"\\\1", value) if isinstance(value, str) else value


def tell(language: str, key: str, **values: Any) -> str:
    """The text of a key for a component that reads Markdown; the values are shown as they are."""
    return say(key, language, **{name: plain(value) for name, value in values.items()})


def refusal(refused: Refused, language: str) -> str:
    return f"✗ {tell(language, refused.key, **refused.values)}"


def beside(refused: Refused, language: str) -> dict[str, Any]:
    """The update of a box whose content was refused."""
    return gr.update(info=say(refused.key, language, **refused.values), elem_classes=["problem"])


def duration(seconds: float) -> str:
    """3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}" if size < 1e9 else f"{size / 1e6:.0f}"


def digest(value: Any) -> str:
    """Equal for values that look the same on the page."""
    if isinstance(value, dict):
        value = {name: digest(part) for name, part in value.items()}
    text = value.to_json() if isinstance(value, pd.DataFrame) else repr(value)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Watcher:
    """Components that follow what happens in the workspace, while their tab is open."""

    tab: str | None  # None: always
    inputs: list[Any]
    outputs: list[Any]
    look: Look  # (jobs, language, *inputs) -> a value for each output


@dataclass
class Window:
    """What an open page was shown last, and for which tab, language and typed values."""

    asked: tuple[str, str, list[Any]]
    seen: dict[str, str]


class Page:
    """What the tabs of one page share. Built once; every browser gets the same components."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.secret = load_or_make_secret(workspace)
        self.checkpoints, self.machine, self.rows = CheckpointTable(), Machine(), DataRows()
        self.metrics: dict[Path, MetricsReader] = {}
        self.ended: Ended = {}
        self.banner: dict[str, str] = {}  # language -> what went wrong at the start
        self.labels: list[tuple[Any, Callable[[str], dict[str, Any]]]] = []
        self.notices: list[Any] = []
        self.watchers: list[Watcher] = []
        self.forms: dict[str, Any] = {}
        self.tabs: dict[str, gr.Tab] = {}
        self.view = gr.BrowserState({}, storage_key="amharic-voice-view", secret=self.secret)
        # Outside the tabs: what lies in a closed tab is neither loaded nor saved.
        self.drafts = {kind: gr.BrowserState({}, storage_key=f"amharic-voice-{kind}", secret=self.secret)
                       for kind in pipeline.STEP_OF}
        self.windows: OrderedDict[str, Window] = OrderedDict()
        self.home: Any = None  # the first questions, and what holds them
        self.way: list[Any] = []
        self.language: Any = None
        self.window: Any = None  # places among an event's inputs for what with_open_tab() finds
        self.open_tab: Any = None
        self.follow: Any = None  # what FOLLOW clicks
        self.clock: Any = None  # empty until the page has been opened
        self.acted: Any = None  # changes when something was done
        self.asked: Any = None  # what the browser has packed for one of asks
        self.asks: list[tuple[Callable[..., Any], list[Any], list[Any]]] = []  # handler, inputs, outputs
        self.made: Any = None  # changes when a program has made something that forms offer

    # Labels

    def labelled(self, component: Any, choices: Sequence[tuple[str, str]] = (), **keys: str) -> Any:
        """Registers the texts of a component (attribute -> key) for the language switch; choices are (key, value)."""

        def texts(language: str) -> dict[str, Any]:
            named = [(say(key, language) if key in TEXTS else key, value) for key, value in choices]
            return {**{name: say(key, language) for name, key in keys.items()}, **({"choices": named} if named else {})}

        self.labels.append((component, texts))
        return component

    def add(self, make: Callable[..., Any], key: str, info: bool = True, choices: Sequence[tuple[str, str]] = (),
            **options: Any) -> Any:
        """A component with the label KEY and, where there are such texts, KEY.info and KEY.placeholder."""
        keys = {"label": key, "info": f"{key}.info", "placeholder": f"{key}.placeholder"}
        keys = {attribute: text for attribute, text in keys.items() if text in TEXTS and (info or attribute != "info")}
        if choices:
            options["choices"] = [(say(text, "en") if text in TEXTS else text, value) for text, value in choices]
        component = make(**{name: say(text, "en") for name, text in keys.items()}, **options)
        return self.labelled(component, choices, **keys)

    def button(self, key: str, **options: Any) -> Any:
        return self.labelled(gr.Button(say(key, "en"), **options), value=key)

    def prose(self, key: str, **options: Any) -> Any:
        return self.labelled(gr.Markdown(say(key, "en"), **options), value=key)

    def notice(self) -> Any:
        """A line for what came of a click."""
        self.notices.append(gr.Markdown(elem_classes=["notice"]))
        return self.notices[-1]

    def tab(self, name: str) -> Any:
        self.tabs[name] = self.labelled(gr.Tab(say(f"tab.{name}", "en"), id=name, elem_id=f"tab-{name}"),
                                        label=f"tab.{name}")
        return self.tabs[name]

    def accordion(self, key: str, open: bool = False, **options: Any) -> Any:
        return self.labelled(gr.Accordion(say(key, "en"), open=open, **options), label=key)

    def switch_language(self, view: dict[str, Any], language: str) -> list[Any]:
        updates = [gr.update(**texts(language)) for _, texts in self.labels]
        return [*updates, *[""] * len(self.notices), {**view, "language": language}]

    def act(self, event: Callable[..., Any] | list[Any], handle: Callable[..., Any], inputs: Sequence[Any],
            outputs: Sequence[Any] = (), **options: Any) -> Any:
        """Connects a handler of an event, or of several, after whose answer the page looks at what has changed."""

        @functools.wraps(handle)
        def handled(*given: Any) -> list[Any]:
            answer = handle(*given)
            values = [answer] if len(outputs) == 1 else answer if outputs else []
            return [*values, str(time.time())]

        connect = functools.partial(gr.on, event) if isinstance(event, list) else event
        return connect(handled, [*inputs], [*outputs, self.acted], **QUIET, **options)

    def ask(self, event: Callable[..., Any], handle: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any],
            js: str = "given => given") -> None:
        """act() for many inputs, which the browser packs into one box: with each event Gradio's page updates all
        components that have ever been an input of one, and is slower with each Start."""
        self.asks.append((handle, list(inputs), list(outputs)))
        event(None, [part for part in inputs if not part.stateful], [self.asked], **QUIET,
              js=f"(...given) => JSON.stringify([{len(self.asks) - 1}, ...({js})(given), Date.now()])")

    def answer(self, states: Sequence[Any], outputs: Sequence[Any], packed: str, *kept: Any) -> list[Any]:
        """A value for each of all asks' outputs, from what the browser has packed and the server's states."""
        number, *given, _ = json.loads(packed)
        handle, inputs, own = self.asks[number]
        boxes, held = iter(given), dict(zip(states, kept, strict=True))
        found = handle(*(held[part] if part.stateful else next(boxes) for part in inputs))
        told = dict(zip(own, [found] if len(own) == 1 else found, strict=True))
        return [*(told.get(part, gr.skip()) for part in outputs), str(time.time())]

    # The workspace

    def jobs(self) -> list[Job]:
        return list_jobs(self.workspace, ended=self.ended)

    def locate(self, language: str, typed: str, must_exist: bool = False) -> tuple[Path | None, dict[str, Any]]:
        """The path in a box that belongs to no form, and the update of that box: what is wrong with it, or nothing."""
        try:
            return self.workspace.inside(typed, must_exist), gr.update(info="", elem_classes=[])
        except Refused as refused:
            return None, beside(refused, language)

    # What follows the workspace

    def watch(self, tab: str | None, inputs: Sequence[Any], outputs: Sequence[Any], look: Look) -> None:
        self.watchers.append(Watcher(tab, list(inputs), list(outputs), look))

    def reader(self, output_dir: Path) -> MetricsReader:
        """The shared reader of a run's metrics; a new one for every folder that somebody is just typing."""
        if not (output_dir / "logs").is_dir():
            return MetricsReader(output_dir)
        return self.metrics.setdefault(output_dir, MetricsReader(output_dir))

    def look(self, open_tab: str, language: str, given: list[Any]) -> dict[str, Any]:
        """What each output should show, by the watcher's and the output's number; nothing for those of closed tabs."""
        jobs, found = self.jobs(), dict[str, Any]()
        for number, watcher in enumerate(self.watchers):
            own, given = given[:len(watcher.inputs)], given[len(watcher.inputs):]
            if watcher.tab in (None, open_tab):
                found |= {f"{number}.{place}": value for place, value in enumerate(watcher.look(jobs, language, *own))}
        return found

    def tick_packed(self, packed: str, *states: Any) -> list[Any]:
        """A tick, from what the browser has packed and the server's states."""
        window, open_tab, language, *boxes, _ = json.loads(packed)
        given, kept = iter(boxes), iter(states)
        return self.tick(window, open_tab, language, *(next(kept if part.stateful else given)
                                                       for watcher in self.watchers for part in watcher.inputs))

    def tick(self, window: str, open_tab: str, language: str, *given: Any) -> list[Any]:
        """One value for each watcher's outputs; gr.skip() for what its browser shows already."""
        asked = (open_tab, language, list(given))
        found, last = self.look(*asked), self.windows.pop(window, None)
        seen, marks = last.seen if last else {}, {place: digest(value) for place, value in found.items()}
        self.windows[window] = Window(asked, {**seen, **marks})
        while len(self.windows) > WINDOWS:
            self.windows.popitem(last=False)
        places = [f"{number}.{place}" for number, watcher in enumerate(self.watchers)
                  for place in range(len(watcher.outputs))]
        return [found[place] if place in found and seen.get(place) != marks[place] else gr.skip() for place in places]

    def has_changed(self, window: str) -> bool:
        """Whether a tick would show that window anything new."""
        last = self.windows.get(window)
        return last is None or any(last.seen.get(place) != digest(value)
                                   for place, value in self.look(*last.asked).items())

    def route(self) -> Route:
        """What FOLLOW asks. It tells nothing about the workspace but to who knows a window's name."""
        def answer(request: Request) -> Response:
            if not logged_in(request):
                return PlainTextResponse("log in first", 401)
            return PlainTextResponse("yes" if self.has_changed(request.path_params["window"]) else "no",
                                     headers={"Cache-Control": "no-store"})

        return Route(f"/{CHANGED}/{{window}}", answer)

    # The page as a whole

    def create_header(self) -> None:
        # First of all: Gradio's page looks for a component from the beginning, at every use.
        self.window, self.open_tab, self.acted, self.made, self.packed, self.asked = (
            gr.Textbox(visible="hidden") for _ in range(6))
        self.follow = gr.Button(visible="hidden", elem_id="look")
        self.clock = gr.Textbox(visible="hidden", elem_id="clock")
        with gr.Row(elem_id="header"):
            self.prose("heading", elem_id="heading")
            self.language = gr.Radio([("English", "en"), ("አማርኛ", "am")], value="en", show_label=False,
                                     container=False, elem_id="language", min_width=220, scale=0)
            theme = self.button("theme", elem_id="theme", size="sm", scale=0)
            theme.click(None, None, None, js=SWITCH_THEME, **QUIET)
        with gr.Row(elem_id="standing"):
            way, running = gr.HTML(elem_id="pipeline", padding=False), gr.Markdown(elem_id="running")
        banner = gr.Markdown()
        self.watch(None, [], [banner, way, running, self.made], self.look_at_header)

    def look_at_header(self, jobs: Sequence[Job], language: str) -> list[str]:
        made = pipeline.files_made(self.workspace, jobs)
        steps = pipeline.states(made, jobs)
        following = pipeline.next_step(steps)
        told = say("pipeline_next", language, tab=say(f"tab.{following}", language),
                   why=say(f"next.{following}", language)) if following else say("pipeline_all_done", language)
        way = f'<style>{marks_of_steps(steps, following)}</style><p class="next">{html.escape(told)}</p>'
        live = [f"**{self.name(job, language)}** {plain(self.brief(job, language))}" for job in jobs if job.live]
        running = f"{say('runs_now', language)} {' · '.join(live)}" if live else say("nothing_runs", language)
        return [self.banner.get(language, ""), way, running,
                digest([form.offered(made) for form in self.forms.values()])]

    def name(self, job: Job, language: str) -> str:
        """The kind of a job in words, and what it writes."""
        where = self.workspace.show(job.output_dir) if job.output_dir else job.title.partition(" ")[2]
        return f"{say(f'kind.{job.kind}', language)} {plain(where)}".strip()

    def brief(self, job: Job, language: str) -> str:
        progress = progress_of(job.log)
        return progress_text(progress, language) if progress else ""

    def connect(self, demo: gr.Blocks) -> None:
        """The events of the whole page, once all tabs are there."""
        forms = list(self.forms.values())
        for form in forms:
            form.connect()
        labels = [component for component, _ in self.labels]
        # One event opens everything, and the clock starts only then: no draft is overwritten by a half-open page.
        demo.load(self.open, [self.view, *self.drafts.values()],
                  [self.language, *self.way, self.home, *(part for form in forms for part in form.opened_into)],
                  **QUIET).then(None, [self.view], [self.clock], js=SHOW_TAB, **QUIET)
        self.language.change(None, [self.language], None, js=SET_LANGUAGE, **QUIET)
        demo.load(None, None, None, js=KEEP_THEME, **QUIET)
        demo.load(None, None, None, js=FOLLOW, **QUIET)
        self.act(self.language.change, self.switch_language, [self.view, self.language],
                 [*labels, *self.notices, self.view])
        gr.on([tab.select for tab in self.tabs.values()], self.note_tab,
              [self.window, self.open_tab, self.clock, self.view], [self.view, self.acted], js=with_open_tab(4),
              trigger_mode="always_last", **QUIET)
        gr.on([self.made.change, self.acted.change], None, None, None, js=f"() => setTimeout({RECHECK}, 20)", **QUIET)
        states = list(dict.fromkeys(part for _, inputs, _ in self.asks for part in inputs if part.stateful))
        outputs = list(dict.fromkeys(part for *_, own in self.asks for part in own))
        self.asked.change(functools.partial(self.answer, states, outputs), [self.asked, *states],
                          [*outputs, self.acted], trigger_mode="multiple", **QUIET)
        # The browser packs what a tick looks at into one box, as for ask(), but for what only the server knows.
        looked_at = [part for watcher in self.watchers for part in watcher.inputs]
        boxes = [self.window, self.open_tab, self.language, *(part for part in looked_at if not part.stateful)]
        pack = f"""(...given) => {{
            if (Date.now() < window.lastAct + 4000) setTimeout({RECHECK}, 20);
            return JSON.stringify([...({with_open_tab(len(boxes))})(...given), Date.now()]);
        }}"""
        gr.on([self.follow.click, self.clock.change, self.acted.change], None, boxes, [self.packed], js=pack, **QUIET)
        # One event for all, never two at once: an older answer cannot overtake a newer one.
        self.packed.change(self.tick_packed, [self.packed, *(part for part in looked_at if part.stateful)],
                           [part for watcher in self.watchers for part in watcher.outputs],
                           trigger_mode="always_last", **QUIET)

    def note_tab(self, window: str, open_tab: str, opened: str, view: dict[str, Any]) -> list[Any]:
        """The view with the open tab, for the next visit, and a look at it; not before this visit's is open."""
        if not opened or open_tab not in pipeline.STEPS:
            return [gr.skip(), gr.skip()]
        return [{**view, "tab": open_tab}, str(time.time())]

    def open(self, view: dict[str, Any], *drafts: dict[str, Any]) -> list[Any]:
        """Language, tab and forms as this browser left them."""
        language = view.get("language") if view.get("language") in LANGUAGES else LANGUAGES[0]
        jobs = self.jobs()
        made = pipeline.files_made(self.workspace, jobs)
        filled = [form.open(draft, language, jobs, made)
                  for form, draft in zip(self.forms.values(), drafts, strict=True)]
        return [language, *self.first_answers(jobs), *(value for values in filled for value in values)]

    def first_answers(self, jobs: Sequence[Job]) -> list[Any]:
        """The answers to the first questions, and whether these are open: until there is an answer, or a run."""
        way = pipeline.load_way(self.workspace)
        opened = not way and not pipeline.find_runs(self.workspace, jobs)
        return [way.get("have"), way.get("model", "scratch"), gr.update(open=opened)]


def on_choice(page: Page, dropdown: Any, choose: Callable[..., list[Any]], inputs: Sequence[Any],
              outputs: Sequence[Any]) -> None:
    """Calls choose(value, *inputs) for the outputs when somebody chooses. A drop-down that merely loses the focus says
    "input" too, as it does for a choice by keyboard: only another value than before counts. "select" is the mouse's."""
    with dropdown.parent:  # a state between two tabs would count as one, and give the later ones each other's names
        before = gr.State(dropdown.value)

    def by_mouse(choice: gr.SelectData, *given: Any) -> list[Any]:
        return [*choose(choice.value, *given), choice.value]

    def by_keyboard(value: Any, last: Any, *given: Any) -> list[Any]:
        return [gr.skip()] * (len(outputs) + 1) if value == last else [*choose(value, *given), value]

    page.act(dropdown.select, by_mouse, inputs, [*outputs, before])
    page.ask(dropdown.input, by_keyboard, [dropdown, before, *inputs], [*outputs, before])


def marks_of_steps(steps: dict[str, str], following: str) -> str:
    """CSS that marks the tabs: what is done, what is the demo's, what runs, what comes next. Pure."""
    marks = {"done": "✓", "demo": "◇", "running": "▶"}
    rules = []
    for step, state in steps.items():
        kind = state if state in marks else "next" if step == following else ""
        if kind:
            rules.append(f"#tab-{step}-button {{ background: var(--step-{kind}) !important; "
                         f"color: var(--step-{kind}-text) !important; }}")
            rules.append(f'#tab-{step}-button::before {{ content: "{marks.get(kind, "→")}"; margin-right: 6px; }}')
    return " ".join(rules)


def with_open_tab(inputs: int) -> str:
    """JavaScript that puts this window's name first among an event's inputs and the open tab's second. Asked of the
    page itself: selections that follow each other closely reach the server in any order."""
    return f"""(...given) => {{
        const panel = {OPEN_PANEL};
        given[0] = window.pageId ??= Math.random().toString(36).slice(2);
        given[1] = panel ? panel.id.replace("tab-", "") : "";
        return given.slice(0, {inputs});
    }}"""


def progress_text(progress: Progress, language: str) -> str:
    """ "step 5 of 20 · about 0:01:10 left" """
    of_whole = ""
    if progress.step:
        number, _, name = progress.step.partition(" ")
        done, _, total = number.partition("/")
        of_whole = say("part_of", language, done=done, total=total, name=say(f"part.{name}", language))
        if not progress.name:
            return of_whole
    if progress.name == "training":
        text = say("step_of" if progress.total else "step_only", language, done=progress.done, total=progress.total)
    else:
        text = f"{progress.name}: {say('progress_of', language, done=progress.done, total=progress.total)}"
    if progress.seconds_left is not None:
        text += " · " + say("seconds_left", language, time=duration(progress.seconds_left))
    return f"{of_whole} · {text}" if of_whole else text
