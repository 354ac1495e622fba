"""Tab 6: what a training will need on a card, before it is started, as `python -m tools.plan_run` says it."""

from __future__ import annotations

import html
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from webui.command_lines import PROGRAMS, Form, arguments, command_of, lines_of, preview, resolve, typed
from webui.command_lines import Program as CommandProgram
from webui.jobs import Job, last_error
from webui.page_base import Page, refusal
from webui.readers import BackgroundCommand
from webui.texts import say
from webui.workspace import ROOT, Refused

SECONDS = 120  # that a plan may take: it reads all lengths
MOST_PLANS = 8  # that are remembered
CARDS = {"a100-40gb": "A100 40 GB", "a100-80gb": "A100 80 GB", "h100": "H100 80 GB", "h200": "H200", "l4": "L4",
         "l40s": "L40S", "t4": "T4", "rtx3090": "RTX 3090", "rtx4090": "RTX 4090", "rtx5090": "RTX 5090"}
# Fields of the trainer's form that a plan depends on.
PLANNED = ("train_manifests", "config", "tokenizer", "epochs", "max_steps", "batch_size", "grad_accumulation", "amp",
           "dropout", "grad_checkpointing", "keep_checkpoints")
GIB = 2**30


def plan_command(form: Form, card: str, page: Page) -> list[str]:
    """Raises: Refused for a path outside the workspace."""
    resolved = resolve("training", {name: form.get(name) for name in PLANNED}, page.workspace)
    argv = command_of(CommandProgram(("-m", "tools.plan_run", "--json", "--gpu", card), ()), {})
    for field in PROGRAMS["training"].fields:
        if field.name in PLANNED and resolved.get(field.name) not in ("no", None):
            argv += arguments(field, resolved[field.name])
    return argv


class Plans:
    """Plans by their command: each is made once, in the background."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, ...], tuple[BackgroundCommand, float]] = {}
        self.made: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()
        self.lock = threading.Lock()

    def of(self, argv: Sequence[str]) -> dict[str, Any] | None:
        """The plan, or {"error": why there is none}; None while it is being made."""
        key = tuple(argv)
        with self.lock:
            if key in self.made:
                return self.made[key]
            if key not in self.running:
                if self.running:  # one at a time: each loads PyTorch
                    self.collect(*next(iter(self.running.items())))
                    return None
                self.running[key] = BackgroundCommand(argv), time.monotonic()
            self.collect(key, self.running[key])
            return self.made.get(key)

    def collect(self, key: tuple[str, ...], started: tuple[BackgroundCommand, float]) -> None:
        command, since = started
        late = time.monotonic() - since > SECONDS
        if late:
            command.process.kill()
            command.process.wait()
        answer = command.result()
        if answer is None:
            return
        del self.running[key]
        try:
            plan = json.loads(answer[0])
        except ValueError:
            plan = {"error": last_error(answer[1]) or "-"}
        self.made[key] = {"late": SECONDS} if late else plan if isinstance(plan, dict) else {"error": "-"}
        while len(self.made) > MOST_PLANS:
            self.made.popitem(last=False)


def price_of(text: str) -> float | None:
    """A price per hour as typed; None for none. Raises: Refused."""
    try:
        price = float(typed(text).replace(",", ".")) if typed(text) else None
    except ValueError:
        price = math.nan
    if price is not None and not 0 <= price < 1e6:
        raise Refused("not_a_number", value=typed(text))
    return price


def plan_html(plan: dict[str, Any], price: float | None, language: str) -> str:
    """HTML of numbers and our own texts."""
    hours = sorted(plan["hours"].values())
    lines = [("plan.steps", f"{plan['steps']:,} ({plan['epochs']} × {plan['samples']:,})"),
             ("plan.batch", f"{plan['batch_size']} × {plan['grad_accumulation']}, {plan['precision']}")]
    if hours:
        lines.insert(0, ("plan.hours", between(hours)))
        if price is not None:
            lines.insert(1, ("plan.price", between([hour * price for hour in hours])))
    memory = f"{plan['memory_total'] / GIB:.1f} / {plan['gpu_memory'] / GIB:.1f} GiB {'✓' if plan['fits'] else '✗'}"
    lines += [("plan.memory", memory), ("plan.disk", f"{plan['disk_bytes'] / 1e9:.1f} GB"),
              ("plan.model", f"{plan['parameters'] / 1e6:,.1f} M")]
    told = "".join(f"<dt>{html.escape(say(key, language))}</dt><dd>{html.escape(value)}</dd>" for key, value in lines)
    warning = "" if plan["fits"] else f"<p>⚠ {html.escape(say('plan.too_large', language))}</p>"
    return f'<dl class="settings">{told}</dl>{warning}<p>{html.escape(say("plan.why", language))}</p>'


def between(values: Sequence[float]) -> str:
    return " – ".join(f"{value:,.1f}" if value >= 1 else f"{value:.2g}" for value in (values[0], values[-1]))


def create_plan(page: Page) -> None:
    """Folded up below the form; nothing where the program is not there."""
    if not (ROOT / "tools" / "plan_run.py").is_file():
        return
    form = page.forms["training"]
    with page.accordion("plan"):
        with gr.Row(elem_classes=["line"]):
            card = page.add(gr.Dropdown, "plan.card", choices=[(name, key) for key, name in CARDS.items()],
                            value="a100-80gb", interactive=True, elem_id="plan-card")
            price = page.add(gr.Textbox, "plan.per_hour", max_lines=1, elem_id="plan-price")
            make = page.button("plan.make", elem_id="plan-make")
            take = page.button("plan.take", visible=False, elem_id="plan-take")
        told = gr.HTML(elem_id="plan-told", padding=False)
        notice = page.notice()
    asked, plans = gr.State([]), Plans()

    def ask(language: str, card: str, *given: Any) -> list[Any]:
        values = form.values(given)
        if not lines_of(values.get("train_manifests")):
            return [[], f"✗ {say('plan.no_data', language)}"]
        if form.problems(values).keys() & set(PLANNED):
            return [[], f"✗ {say('command_blocked', language)}"]
        try:
            return [plan_command(values, card if card in CARDS else "a100-80gb", page), ""]
        except Refused as refused:
            return [[], refusal(refused, language)]

    def look(jobs: Sequence[Job], language: str, argv: list[str], per_hour: str) -> list[Any]:
        if not argv:
            return ["", gr.update(visible=False)]
        plan = plans.of(argv)
        if plan is None:
            return [f"… {html.escape(say('plan.making', language))}", gr.update(visible=False)]
        if "hours" not in plan:
            why = say("plan.late", language, seconds=plan["late"]) if "late" in plan else plan["error"]
            return [f"✗ {html.escape(why)}<br><code>{html.escape(preview(argv))}</code>", gr.update(visible=False)]
        try:
            return [plan_html(plan, price_of(per_hour), language), gr.update(visible=True)]
        except Refused as refused:
            return [html.escape(say(refused.key, language, **refused.values)), gr.update(visible=False)]

    def fill(argv: list[str]) -> list[Any]:
        plan = plans.of(argv) if argv else None
        names = ("batch_size", "grad_accumulation")
        return form.change({name: str(plan[name]) for name in names} if plan and "hours" in plan else {})

    page.watch("training", [asked, price], [told, take], look)
    page.ask(make.click, ask, [page.language, card, *form.inputs.values()], [asked, notice])
    page.act(take.click, fill, [asked], [*form.inputs.values()])
