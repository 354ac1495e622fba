"""A form over one command line: its fields, the problems beside them, the command, Start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from webui import pipeline
from webui.commands import PROGRAMS, Field, Form, Problem, command_for, output_of, preview, problems, typed
from webui.jobs import start_job
from webui.page import QUIET, Page, refusal
from webui.panels import newest
from webui.texts import TEXTS, say
from webui.workspace import Refused

RESUME = Field("resume", "", "switch")  # the checkbox; the flag is resume_path's


class FormSection:
    """The inputs of one program, its command preview and what Start does. Fields are laid out by the tab: row()."""

    def __init__(self, page: Page, kind: str, tab: str) -> None:
        self.page, self.kind, self.tab = page, kind, tab
        self.fields = {field.name: field for field in PROGRAMS[kind].fields}
        self.inputs: dict[str, Any] = {}
        self.filled, self.untouched = gr.State({}), gr.State({})  # what was filled in; the form before any typing
        self.preview: Any = None
        self.check_on: list[Any] = []  # more triggers of a new check
        page.forms[kind] = self

    # Layout

    def row(self, *names: str) -> None:
        with gr.Row():
            for name in names:
                self.input(name)

    def input(self, name: str) -> None:
        key, field = f"{self.kind}.{name}", RESUME if name == "resume" else self.fields[name]
        options: dict[str, Any] = {"elem_id": f"{self.kind}-{name}", "interactive": True, "info": False}
        if field.type == "switch":
            self.inputs[name] = self.page.add(gr.Checkbox, key, value=False, **options)
        elif field.type == "choice":
            choices = [("chosen_for_you", ""), *((choice, choice) for choice in field.choices)]
            self.inputs[name] = self.page.add(gr.Dropdown, key, choices=choices, value="", **options)
        else:
            lines, max_lines = {"text": (3, 6), "manifests": (1, 4)}.get(field.type, (1, 1))
            self.inputs[name] = self.page.add(gr.Textbox, key, lines=lines, max_lines=max_lines, **options)

    def command_and_start(self, start_key: str) -> None:
        """The rest of the form, below its fields."""
        self.preview = self.page.add(gr.Textbox, "command", lines=2, max_lines=8, interactive=False, buttons=["copy"],
                                     elem_id=f"{self.kind}-command", elem_classes=["command"])
        start = self.page.button(start_key, variant="primary", elem_id=f"{self.kind}-start")
        notice = self.page.notice()
        inputs = list(self.inputs.values())
        self.page.refresh_after.append(start.click(self.start, [self.page.language, *inputs], [*inputs, notice],
                                                   **QUIET))

    @property
    def opened_into(self) -> list[Any]:
        """What open() gives values for."""
        return [self.filled, self.untouched, *self.inputs.values()]

    def connect(self, demo: gr.Blocks) -> None:
        page, inputs = self.page, list(self.inputs.values())
        tab, draft = page.tabs[self.tab], page.drafts[self.kind]
        tab.select(self.fill_empty, [page.clock, *self.opened_into], self.opened_into, **QUIET)
        # One event for every reason to check, so that an older answer cannot overtake a newer one.
        gr.on([*[part.change for part in inputs], page.language.change, tab.select, demo.load, *self.check_on],
              self.check, [page.clock, self.untouched, page.language, *inputs], [draft, *inputs, self.preview],
              trigger_mode="always_last", **QUIET)

    # Values

    def values(self, given: Sequence[Any]) -> Form:
        return dict(zip(self.inputs, given, strict=True))

    def empty(self, name: str) -> str | bool:
        return False if name == "resume" or self.fields[name].type == "switch" else ""

    def cleaned(self, values: Form) -> Form:
        """Values of a file or a browser as the inputs hold them; one that an input cannot hold is left out."""
        fits: Form = {}
        for name in self.inputs:
            value, field = values.get(name), RESUME if name == "resume" else self.fields[name]
            if field.type == "switch":
                fits[name] = value is True
            elif isinstance(value, list):
                fits[name] = "\n".join(map(str, value))
            else:
                fits[name] = typed(value) if not field.choices or typed(value) in field.choices else ""
        return fits

    def change(self, values: Form) -> list[Any]:
        """An update of each input: new values for some fields, as if the user had typed them."""
        return [gr.update(value=values[name]) if name in values else gr.skip() for name in self.inputs]

    def open(self, draft: Form) -> list[Any]:
        """What was typed in this browser; where nothing was, the form of what runs or ran last."""
        workspace, jobs = self.page.workspace, self.page.jobs()
        job = newest(jobs, [self.kind])
        form = self.cleaned(draft or (pipeline.form_of(self.kind, job.argv, workspace) if job else {}))
        offered = pipeline.suggestions(self.kind, workspace, pipeline.files_made(workspace, jobs))
        form = {name: form[name] or offered.get(name, self.empty(name)) for name in self.inputs}
        return [offered, {} if draft else form, *form.values()]

    def fill_empty(self, opened: str, filled: Form, untouched: Form, *given: Any) -> list[Any]:
        """Fills fields that are empty, or that still hold what was filled in, with what was made meanwhile."""
        if not opened:  # the draft is still on its way
            return [gr.skip()] * (2 + len(self.inputs))
        form, workspace = self.values(given), self.page.workspace
        offered = pipeline.suggestions(self.kind, workspace, pipeline.files_made(workspace, self.page.jobs()))
        new = {name: value for name, value in offered.items() if not form[name] or form[name] == filled.get(name)}
        new = {name: value for name, value in new.items() if value != form[name]}
        return [offered, {**form, **new} if form == untouched else untouched, *self.change(new)]

    # What is wrong, and Start

    def problems(self, form: Form) -> dict[str, Problem]:
        return problems(self.kind, form, self.page.workspace)

    def infos(self, language: str, form: Form, strict: bool = False) -> list[Any]:
        """An update of each input: its help, or what is wrong; that a field is empty only when strict."""
        found, updates = self.problems(form), []
        for name in self.inputs:
            problem, key = found.get(name), f"{self.kind}.{name}.info"
            if problem and (strict or problem[0] != "required"):
                updates.append(gr.update(info=say(problem[0], language, **problem[1]), elem_classes=["problem"]))
            else:
                updates.append(gr.update(info=say(key, language) if key in TEXTS else "", elem_classes=[]))
        return updates

    def check(self, opened: str, untouched: Form, language: str, *given: Any) -> list[Any]:
        """The draft, an update of each input, and the command.

        There is no draft where nothing was typed, so that this browser shows what runs when it comes back.
        """
        form = self.values(given)
        draft = gr.skip() if not opened else {} if form == untouched else form
        try:
            command = preview(command_for(self.kind, form, self.page.workspace))
        except Refused:
            command = say("command_blocked", language)
        return [draft, *self.infos(language, form), command]

    def start(self, language: str, *given: Any) -> list[Any]:
        form, workspace = self.values(given), self.page.workspace
        if self.problems(form):
            return [*self.infos(language, form, strict=True), f"✗ {say('not_started', language)}"]
        try:
            output = output_of(self.kind, form, workspace)
            title = f"{self.kind} {workspace.show(output) if output else ''}"
            start_job(workspace, self.kind, title, command_for(self.kind, form, workspace), output)
            notice = f"✓ {say('started', language)}"
        except Refused as refused:
            notice = refusal(refused, language)
        return [*self.infos(language, form), notice]
