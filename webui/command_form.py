"""A form over one command line: its fields, the problems beside them, the command, Start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from webui import pipeline
from webui.belonging import belonging_problems, checkpoint_record
from webui.command_lines import (
    LINES,
    PROGRAMS,
    Field,
    Form,
    Problem,
    command_for,
    output_of,
    preview,
    problems,
    typed,
)
from webui.file_kinds import kind_problems
from webui.job_panel import newest
from webui.jobs import Job, start_job
from webui.page_base import QUIET, Page, refusal
from webui.texts import LANGUAGES, TEXTS, say
from webui.words import in_words
from webui.workspace import Refused

# Boxes that are no flags: "resume" is resume_path's, "replace" lets a form replace what an earlier Start has made.
BOXES = {name: Field(name, "", "switch") for name in ("resume", "replace")}
WIDTHS = {1: "whole", 2: "half", 3: "third"}  # of a field, by how many there are in its row
UNTYPED = ("required", "data_needed")  # said only once Start was clicked


@dataclass
class Memory:
    """What a browser's form was filled with by itself, and all its values before anything was typed."""

    filled: Form
    untouched: Form


class FormSection:
    """The inputs of one program, its command preview and what Start does. Fields are laid out by the tab: row()."""

    def __init__(self, page: Page, kind: str, tab: str) -> None:
        self.page, self.kind, self.tab = page, kind, tab
        self.fields = {field.name: field for field in PROGRAMS[kind].fields}
        self.inputs: dict[str, Any] = {}
        self.widths: dict[str, str] = {}  # style classes
        self.memory = gr.State(Memory({}, {}))
        self.preview: Any = None
        self.check_on: list[Any] = []  # what a check depends on besides the inputs
        page.forms[kind] = self

    # Layout

    def row(self, *names: str) -> None:
        """Fields beside each other, by style: a gr.Row for each would double the number of components."""
        for name in names:
            self.input(name, WIDTHS[len(names)])

    def input(self, name: str, width: str = "whole") -> None:
        key, field = f"{self.kind}.{name}", self.field(name)
        self.widths[name] = width
        options: dict[str, Any] = {"elem_id": f"{self.kind}-{name}", "elem_classes": [width], "interactive": True,
                                   "info": False}
        if field.type == "switch":
            self.inputs[name] = self.page.add(gr.Checkbox, key, value=False, **options)
        elif field.choices and field.type != "words":
            choices = [("chosen_for_you", ""), *((f"choice.{choice}" if f"choice.{choice}" in TEXTS else choice, choice)
                                                 for choice in field.choices)]
            self.inputs[name] = self.page.add(gr.Dropdown, key, choices=choices, value="", **options)
        else:
            lines, max_lines = (3, 6) if field.type == "text" else (1, 4) if field.type in LINES else (1, 1)
            self.inputs[name] = self.page.add(gr.Textbox, key, value="", lines=lines, max_lines=max_lines, **options)
        self.inputs[name].info = self.help(name, LANGUAGES[0])

    def command_and_start(self, start_key: str, beside_start: Callable[[], None] = lambda: None) -> Any:
        """The rest of the form, below its fields. Returns the button."""
        if self.kind in pipeline.LEFT_BY:
            self.inputs["replace"] = self.page.add(gr.Checkbox, "replace", value=False, visible=False,
                                                   elem_id=f"{self.kind}-replace")
        self.preview = self.page.add(gr.Textbox, "command", lines=2, max_lines=8, interactive=False, buttons=["copy"],
                                     elem_id=f"{self.kind}-command", elem_classes=["command"])
        self.packed = gr.Textbox(visible="hidden")  # what was sent to be checked last, as for a tick
        with gr.Row(elem_classes=["startbar"]):
            start = self.page.button(start_key, variant="primary", elem_id=f"{self.kind}-start")
            beside_start()
        notice = self.notice = self.page.notice()
        noted = f"""given => {{
            (window.tried ??= {{}}).{self.kind} = JSON.stringify(given.slice(1));
            return given;
        }}"""
        self.page.ask(start.click, self.start, self.given, [*self.checked_into, notice], noted)
        self.recheck = gr.Button(visible="hidden", elem_id=f"{self.kind}-recheck")  # there while the form can be seen
        return start

    @property
    def given(self) -> list[Any]:
        """What Start is called with."""
        return [self.memory, self.page.language, *self.inputs.values()]

    @property
    def shown(self) -> list[Any]:
        """What shown_as() gives updates for."""
        return [*self.inputs.values(), self.preview]

    @property
    def opened_into(self) -> list[Any]:
        """What open() gives values for."""
        return [self.memory, *self.shown]

    @property
    def checked_into(self) -> list[Any]:
        """What check() gives values for, but for the memory: one that Start was given may be an older one."""
        return [self.page.drafts[self.kind], *self.shown]

    def connect(self) -> None:
        """A change of several inputs at once is one check, and what changes where it cannot be seen is checked when
        it can: each event costs the browser a look at all components of the page."""
        page = self.page
        gr.on([self.recheck.click, *[part.change for part in self.check_on]], None,
              [page.clock, page.language, *self.inputs.values(), page.made, *self.check_on], [self.packed],
              js=f"""(...given) => JSON.stringify([
                  JSON.stringify(given.slice(2, {2 + len(self.inputs)})) === window.tried?.{self.kind},
                  ...given, window.tabOpened])""", **QUIET)
        # One event for every reason to check, so that an older answer cannot overtake a newer one.
        self.packed.change(self.check_packed, [self.memory, self.packed],
                           [self.memory, *self.checked_into, page.acted], trigger_mode="always_last", **QUIET)

    # Values

    def values(self, given: Sequence[Any]) -> Form:
        return dict(zip(self.inputs, given, strict=True))

    def field(self, name: str) -> Field:
        return BOXES.get(name) or self.fields[name]

    def empty(self, name: str) -> str | bool:
        return False if self.field(name).type == "switch" else ""

    def cleaned(self, values: Form) -> Form:
        """Values of a file or a browser as the inputs hold them; one that an input cannot hold is left out."""
        fits: Form = {}
        for name in self.inputs:
            value, field = values.get(name), self.field(name)
            if field.type == "switch":
                fits[name] = value is True and name != "replace"  # a permission for one Start
            elif field.type == "yes_no" and value is True:  # as older settings files have it
                fits[name] = "yes"
            elif isinstance(value, list):
                fits[name] = "\n".join(map(str, value))
            else:
                fits[name] = typed(value) if not field.choices or typed(value) in field.choices else ""
        return fits

    def change(self, values: Form) -> list[Any]:
        """An update of each input: new values for some fields, as if the user had typed them."""
        return [gr.update(value=values[name]) if name in values else gr.skip() for name in self.inputs]

    def form_of_last(self, job: Job) -> Form:
        """The form of the job that runs or ran last, where nothing was typed in this browser."""
        return pipeline.form_of(self.kind, job.argv, self.page.workspace)

    def without_made(self, form: Form) -> Form:
        """A last job's form without the names of files that it made and that none may be written over."""
        return {name: value for name, value in form.items() if not self.field(name).fresh
                or not (self.page.workspace.root / value).exists()}

    def offered(self, made: dict[str, str]) -> Form:
        """What an empty field is filled with: files that other steps have made, and names for new ones."""
        return pipeline.suggestions(self.kind, self.page.workspace, made)

    def open(self, draft: Form, language: str, jobs: Sequence[Job], made: dict[str, str]) -> list[Any]:
        """What was typed in this browser; where nothing was, the form of what runs or ran last."""
        job, offered = newest(jobs, [self.kind]), self.offered(made)
        form = self.cleaned(draft or self.without_made(self.form_of_last(job) if job else {}))
        form = {name: form[name] or offered.get(name, self.empty(name)) for name in self.inputs}
        filled = {name: value for name, value in form.items() if value != self.empty(name)}
        *updates, command = self.shown_as(language, form, filled)
        # Updates that change nothing cost as much as others: on the server a new component each.
        as_made = [self.as_made(name, LANGUAGES[0]) for name in self.inputs]
        return [Memory(offered, {} if draft else form),
                *(gr.skip() if new == old else new for new, old in zip(updates, as_made, strict=True)), command]

    def made_meanwhile(self, form: Form, filled: Form, offered: Form) -> Form:
        """New values of fields that hold what was filled in before, or nothing as before. Pure."""
        new = {name: value for name, value in offered.items() if form[name] == filled.get(name, "") != value}
        return new | {name: self.empty(name) for name, value in filled.items()  # of a model that is not chosen any more
                      if name not in offered and form.get(name) == value}

    def draft(self, form: Form, memory: Memory) -> Form:
        """None where nothing was typed, so that this browser shows what runs when it comes back."""
        return {} if form == memory.untouched else form

    # What is wrong, and Start

    def problems(self, form: Form) -> dict[str, Problem]:
        """Of each field by itself, and where there are none, of files that are there or do not belong together."""
        workspace = self.page.workspace
        return (problems(self.kind, form, workspace)
                or kind_problems(self.kind, form, workspace)
                or pipeline.in_the_way(self.kind, form, workspace, self.page.jobs)
                or belonging_problems(self.kind, form, workspace, self.page.checkpoints))

    def check_when_read(self, name: str) -> None:
        """A new check when the checkpoint in this field has been read in the background."""
        known = gr.Textbox(visible="hidden")

        def look(jobs: Sequence[Job], language: str, path: str) -> list[Any]:
            try:
                return [json.dumps(checkpoint_record(self.page.workspace.inside(path), self.page.checkpoints))]
            except Refused:
                return [""]

        self.page.watch(self.tab, [self.inputs[name]], [known], look)
        self.check_on.append(known)

    def shown_as(self, language: str, form: Form, values: Form, strict: bool = False) -> list[Any]:
        """Updates of the inputs (new values for some; their help, or what is wrong; that a field is empty only when
        strict) and of the command."""
        found, updates = self.problems(form), []
        said = {name: problem for name, problem in found.items() if strict or problem[0] not in UNTYPED}
        for name in self.inputs:
            update = self.as_made(name, language)
            if name == "replace":
                update["visible"] = bool(form.get(name)) or any(key.startswith("would_replace")
                                                                for key, _ in found.values())
            elif name in said:
                update["info"] = self.said(said[name], language)
                update["elem_classes"] = [self.widths[name], "problem"]
            if name in values:
                update["value"] = values[name]
            updates.append(update)
        command = say("command_blocked", language) if said else preview(
            command_for(self.kind, form, self.page.workspace))
        return [*updates, command]

    def help(self, name: str, language: str) -> str:
        key = f"{self.kind}.{name}.info"
        return say(key, language) if key in TEXTS else ""

    def as_made(self, name: str, language: str) -> dict[str, Any]:
        """The update of an input without a problem; in the first language it leaves the input as it was made."""
        if name == "replace":
            return gr.update(visible=False)
        return gr.update(info=self.help(name, language), elem_classes=[self.widths[name]])

    def said(self, problem: Problem, language: str) -> str:
        """A problem in the language of the page, which names fields where a program names flags."""
        key, values = problem
        return say(key, language, **in_words(self.kind, values, language))

    def check_packed(self, memory: Memory, packed: str) -> list[Any]:
        """What check() returns, and a word to the page where fields were filled in. What is missing stays said while
        the form is as it was when Start was clicked."""
        tried, opened, language, *given = json.loads(packed)
        checked = self.check(opened, memory, language, *given[:len(self.inputs)], strict=tried)
        return [*checked, str(time.time()) if any("value" in update for update in checked[2:-1]) else gr.skip()]

    def check(self, opened: str, memory: Memory, language: str, *given: Any, strict: bool = False) -> list[Any]:
        """What to remember, the draft, an update of each input, and the command."""
        form = self.values(given)
        if not opened:  # the draft is still on its way
            return [gr.skip(), gr.skip(), *self.shown_as(language, form, {}, strict)]
        offered = self.offered(pipeline.files_made(self.page.workspace, self.page.jobs()))
        new = self.made_meanwhile(form, memory.filled, offered)
        remembered = Memory(offered, {**form, **new} if form == memory.untouched else memory.untouched)
        form = {**form, **new}
        return [remembered, self.draft(form, remembered), *self.shown_as(language, form, new, strict)]

    def after_start(self) -> Form:
        """Values that the form gets once its program has been started."""
        return {"replace": False} if "replace" in self.inputs else {}

    def start(self, memory: Memory, language: str, *given: Any) -> list[Any]:
        return self.submit(start_job, "started", memory, language, *given)

    def submit(self, begin: Callable[..., Job], said: str, memory: Memory, language: str, *given: Any) -> list[Any]:
        """Checks the form and has begin(), which is called like start_job(), take its command line."""
        form, workspace = self.values(given), self.page.workspace
        draft, new = self.draft(form, memory), {}
        if self.problems(form):
            return [draft, *self.shown_as(language, form, {}, strict=True), f"✗ {say('not_started', language)}"]
        try:
            output = output_of(self.kind, form, workspace)
            title = f"{self.kind} {workspace.show(output) if output else ''}"
            begin(workspace, self.kind, title, command_for(self.kind, form, workspace), output)
            notice, new = f"✓ {say(said, language, time=time.strftime('%H:%M:%S'))}", self.after_start()
        except Refused as refused:
            notice = refusal(refused, language)
        form = {**form, **new}
        return [draft and form, *self.shown_as(language, form, new), notice]


def create_form(page: Page, kind: str, tab: str, rows: Sequence[Sequence[str]], more: Sequence[Sequence[str]] = (),
                start: str = "start") -> FormSection:
    """A program's form: rows of fields, the rarer ones behind "More settings", the command and Start."""
    form = FormSection(page, kind, tab)
    with gr.Group():
        for names in rows:
            form.row(*names)
    if more:
        with page.accordion("more_settings"), gr.Group():
            for names in more:
                form.row(*names)
    form.command_and_start(start)
    return form
