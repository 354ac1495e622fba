"""Tab 6: the trainer's form, what will be resumed, and the live run of the output directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from tools._common import ToolError
from tools.run_files import all_checkpoints, lock_holder
from webui import pipeline
from webui.belonging import resume_problems, training_choice
from webui.command_form import FormSection, Memory
from webui.command_lines import PRESETS, Form, Problem, command_for, lines_of, typed
from webui.job_panel import StopButtons, create_job_panel, newest, reason_of
from webui.jobs import Job, holder_of, start_job, stop_job
from webui.page_base import Page, on_choice, plain, refusal, tell
from webui.readers import Inspection, Point, loss_of, overfit, tensorboard_url
from webui.run_bar import create_next_step, create_queue, create_warnings
from webui.run_curves import create_curves
from webui.run_queue import queue_job
from webui.spoken_samples import create_samples
from webui.texts import TEXTS, say
from webui.workspace import Refused, load_settings, save_settings

PRESET_FIELDS = sorted({name for preset in PRESETS.values() for name in preset})
DEMO_DATA = {"train_manifests": pipeline.DEMO["train_manifest"], "val_manifests": pipeline.DEMO["val_manifest"],
             "tokenizer": pipeline.DEMO["tokenizer"]}
# What only one Start is meant to do.
ONCE = {"eval_only": False, "accept_changed_data": False, "profile": False}
RESUME_AUTO = {"resume": True, "resume_path": "", **ONCE}


class TrainingForm(FormSection):
    """The trainer's form; a checkpoint that is known to be damaged is a problem of the field that leads to it.

    Once a run was started, Start goes on with it from its newest checkpoint: a path that was typed to go back would
    throw away at the next Start what was trained since.
    """

    def form_of_last(self, job: Job) -> Form:
        """Of a run that has finished only where it is: its limits would end the next one too."""
        form = super().form_of_last(job)
        kept = {"output_dir": form.get("output_dir")} if job.state == "finished" else form
        return {**kept, **RESUME_AUTO}  # what was accepted for one Start is asked about again

    def after_start(self) -> Form:
        return RESUME_AUTO

    def queue(self, memory: Memory, language: str, *given: Any) -> list[Any]:
        """What start() does, for a run that waits until those before it have ended."""
        return self.submit(queue_job, "queued", memory, language, *given)

    def problems(self, form: Form) -> dict[str, Problem]:
        found, workspace = super().problems(form), self.page.workspace
        if found.get("output_dir", ("",))[0] in ("holds_checkpoints", "holds_other_checkpoints", "only_best") and (
                holder_of(workspace, workspace.inside(typed(form["output_dir"])))):
            del found["output_dir"]  # they are being written just now; Start names the holder
        if found or not form.get("resume"):
            return found or self.without_data(form)
        if typed(form.get("resume_path")):
            path = workspace.inside(typed(form["resume_path"]))
            entry = self.page.checkpoints.look_up(path)
            if entry and not entry["verified"]:
                return {"resume_path": ("resume_broken", {"path": workspace.show(path), "reason": reason_of(entry)})}
            return self.against(form, entry)
        output_dir = workspace.inside(typed(form["output_dir"]))
        if not all_checkpoints(output_dir):
            return self.without_data(form)
        if lock_holder(output_dir):  # its files are being written; Start names the holder
            return {}
        seen = self.page.checkpoints.look(output_dir)
        if seen.checkpoints and not seen.resume and not seen.verifying:
            reason = "; ".join(reason_of(entry) for entry in seen.checkpoints if not entry["verified"])
            return {"output_dir": ("none_valid", {"path": workspace.show(output_dir), "reason": reason})}
        return self.against(form, entry_of(seen)) if not seen.verifying else {}

    def without_data(self, form: Form) -> dict[str, Problem]:
        """A new run is of data and a tokenizer that somebody has chosen; the program would take the demo's."""
        return {name: ("data_needed", {}) for name in ("train_manifests", "tokenizer") if not lines_of(form.get(name))}

    def against(self, form: Form, entry: dict[str, Any] | None) -> dict[str, Problem]:
        """What does not fit the checkpoint that is gone on from; nothing is said before it has been read."""
        if entry is None:
            return {}
        name = self.page.workspace.show(entry["path"])
        return resume_problems(form, self.page.workspace, entry, name, self.page.rows)


def entry_of(found: Inspection) -> dict[str, Any] | None:
    """The checkpoint that "auto" goes on from; None where there is none."""
    name = Path(found.resume).name if found.resume else None
    return next((entry for entry in found.checkpoints if name in entry["names"]), None)


def create_training_tab(page: Page) -> None:
    with page.tab("training"), gr.Row():
        with gr.Column(scale=5, min_width=420):
            form = TrainingForm(page, "training", "training")
            preset = page.add(gr.Dropdown, "training.preset", value="", interactive=True, elem_id="training-preset",
                              choices=[("preset.none", ""), *((f"preset.{name}", name) for name in PRESETS)])
            with gr.Group():
                form.row("train_manifests", "val_manifests")
                form.row("tokenizer")
                form.row("output_dir")
            with gr.Group():
                form.row("learning_rate", "epochs")
                form.row("batch_size", "grad_accumulation")
                form.row("num_workers", "amp")
            with page.accordion("more_settings"), gr.Group():
                form.row("max_steps", "warmup_steps", "seed")
                form.row("save_interval", "save_minutes", "keep_checkpoints")
                form.row("val_interval", "patience", "log_interval")
                form.row("config", "base_checkpoint")
                form.row("dropout", "emo_source", "grad_checkpointing")
            with page.accordion("training.rare"), gr.Group():
                form.row("weight_decay", "grad_clip")
                form.row("text_loss_weight", "mel_loss_weight")
                form.row("val_batch_size", "max_val_batches")
                form.row("freeze_base_vocab", "compile")
                form.row("eval_only", "profile")
            with page.accordion("training.parts"), gr.Group():
                form.row("freeze", "lr_scale")
                form.row("lora_rank", "lora_alpha", "lora_dropout")
                form.row("lora_targets")
            pick, told = create_resume_section(page, form)
            create_choice(page, form)
            add = page.button("queue.add", visible=False, render=False, elem_id="training-queue-add")
            buttons = StopButtons(page, "training", add)
            form.command_and_start("training.start", buttons.render)
            create_queue(page, form, add)
            form.check_when_read("base_checkpoint")
            connect_resume(page, form, pick, told)
            create_settings_file(page, form)
            page.prose("training.tips", elem_classes=["tips"])
        with gr.Column(scale=6, min_width=480, elem_classes=["live"]):
            output_dir = form.inputs["output_dir"]
            create_job_panel(page, "training", ["training"], output_dir, lambda: create_live_section(page, output_dir),
                             buttons=buttons)

    def fill(name: str, *given: Any) -> list[Any]:
        return form.change(preset_values(form, name or "", form.values(given)))

    on_choice(page, preset, fill, [*form.inputs.values()], [*form.inputs.values()])


def create_choice(page: Page, form: TrainingForm) -> None:
    """Which kind of data and weights are chosen."""
    told = gr.Markdown(elem_id="training-choice", elem_classes=["status"])
    names = ("train_manifests", "config", "base_checkpoint", "output_dir", "resume")

    def look(jobs: Sequence[Job], language: str, *given: Any) -> list[Any]:
        try:
            found = training_choice(dict(zip(names, given, strict=True)), page.workspace, page.checkpoints)
        except (Refused, ToolError):  # said beside the field
            return [""]
        return ["\n\n".join(tell(language, key, **translated(values, language)) for key, values in found)]

    inputs = [form.inputs[name] for name in names]
    page.watch("training", inputs, [told], look)


def translated(values: dict[str, Any], language: str) -> dict[str, Any]:
    """With the name of the kind of features for a reader, where it is known."""
    key = f"features.{values.get('features')}"
    return {**values, "features": say(key, language)} if key in TEXTS else values


def create_resume_section(page: Page, form: TrainingForm) -> tuple[Any, Any]:
    """The seed's two controls, the list of valid checkpoints, and what a start would go on from."""
    with gr.Group():
        form.input("resume")
        form.input("resume_path")
        form.input("accept_changed_data")
        pick = page.add(gr.Dropdown, "training.pick", interactive=True, elem_id="training-pick", value="",
                        choices=[("training.pick_auto", "")])
    return pick, gr.Markdown(elem_id="training-resume-state", elem_classes=["status"])


def connect_resume(page: Page, form: TrainingForm, pick: Any, told: Any) -> None:
    def look(jobs: Sequence[Job], language: str, output_dir: str, resume: bool, resume_path: str) -> list[Any]:
        try:
            folder = page.workspace.inside(output_dir)
        except Refused:
            return [gr.skip(), ""]
        job = newest(jobs, ["training"], folder)
        if job and job.live:  # verifying its checkpoints now would only slow it down
            return [gr.skip(), say("resume.running", language)]
        found = page.checkpoints.look(folder)
        choices = [(say("training.pick_auto", language), ""),
                   *((pick_label(entry, language), f"{page.workspace.show(folder)}/{entry['names'][0]}")
                     for entry in found.checkpoints if entry["verified"])]
        return [gr.update(choices=choices), resume_text(page, folder, found, resume, resume_path, language)]

    def choose(path: str) -> list[Any]:
        return form.change({"resume": True, "resume_path": path or ""})

    inputs = [form.inputs[name] for name in ("output_dir", "resume", "resume_path")]
    page.watch("training", inputs, [pick, told], look)
    form.check_on.append(told)  # a verification has ended
    on_choice(page, pick, choose, [], [*form.inputs.values()])


def pick_label(entry: dict[str, Any], language: str) -> str:
    return say("training.pick_option", language, name=" = ".join(entry["names"]), step=entry["step"],
               epoch=entry["epoch"], loss=loss_of(entry["last_val"]))


def resume_text(page: Page, folder: Path, found: Inspection, resume: bool, resume_path: str, language: str) -> str:
    """What a start would go on from, or why it could not; what is wrong with a path is said beside its box."""
    if not resume:  # beside the folder it is said if that holds checkpoints
        return "" if all_checkpoints(folder) else say("resume.off", language)
    if resume_path.strip():
        try:
            path = page.workspace.inside(resume_path, must_exist=True)
        except Refused:
            return ""
        entry = page.checkpoints.look_up(path)
    elif found.verifying:
        path, entry = folder, None
    elif found.resume is None:
        return "" if found.checkpoints else tell(language, "resume.nothing", path=page.workspace.show(folder))
    else:
        path, entry = Path(found.resume), entry_of(found)
    if entry is None:
        return "… " + tell(language, "resume.verifying", names=", ".join(found.verifying) or path.name)
    if not entry["verified"]:
        return ""
    lines = [] if resume_path.strip() else [
        tell(language, "resume.skipped", path=other["names"][0], reason=reason_of(other))
        for other in found.checkpoints if not other["verified"]]
    lines.append(tell(language, "resume.will", path=page.workspace.show(path), step=entry["step"],
                      epoch=entry["epoch"], loss=loss_of(entry["last_val"])))
    newest_step = max((other["step"] for other in found.checkpoints if other["verified"]), default=0)
    if path.parent == folder and entry["step"] < newest_step:
        lines.append(say("resume.goes_back", language, step=newest_step))
    return "\n\n".join(lines)


def preset_values(form: TrainingForm, name: str, current: Form) -> Form:
    """Values for the fields that presets know; those that this one leaves out are emptied. The demo brings its data
    where none is chosen."""
    values = form.cleaned(PRESETS.get(name, {}))
    data = {} if name != "demo" or any(lines_of(current.get(field)) for field in DEMO_DATA) else DEMO_DATA
    return {field: values[field] for field in PRESET_FIELDS} | data


def create_settings_file(page: Page, form: TrainingForm) -> None:
    """Saving the form as a JSON file of the workspace, and loading one."""
    with gr.Row(elem_classes=["line"]):
        path = page.add(gr.Textbox, "training.file", value="training_settings.json", max_lines=1, scale=3,
                        elem_id="training-file")
        save = page.button("training.save", scale=2, min_width=120, elem_id="training-save")
        load = page.button("training.load", scale=2, min_width=120, elem_id="training-load")
    notice = page.notice()

    def write(name: str, language: str, *given: Any) -> str:
        try:
            saved = save_settings(page.workspace, name, form.kind, form.values(given))
        except Refused as refused:
            return refusal(refused, language)
        return "✓ " + tell(language, "training.saved", path=page.workspace.show(saved))

    def read(name: str, language: str) -> list[Any]:
        try:
            values = load_settings(page.workspace, name, form.kind, list(form.inputs))
        except Refused as refused:
            return [*form.change({}), refusal(refused, language)]
        return [*form.change(form.cleaned(values)), "✓ " + tell(language, "training.loaded", path=name)]

    page.ask(save.click, write, [path, page.language, *form.inputs.values()], [notice])
    page.act(load.click, read, [path, page.language], [*form.inputs.values(), notice])


def create_live_section(page: Page, output_dir: Any) -> None:
    """Curves, memory and TensorBoard of the run in the output directory."""
    create_next_step(page, output_dir)
    create_curves(page, output_dir)
    create_samples(page, output_dir)
    warning = gr.Markdown(elem_id="training-overfit")
    machine = gr.Markdown(elem_id="training-memory")
    create_tensorboard(page, output_dir)
    create_warnings(page, output_dir)

    def look(jobs: Sequence[Job], language: str, typed_dir: str) -> list[Any]:
        try:
            folder = page.workspace.inside(typed_dir)
        except Refused:
            folder = page.workspace.private  # where no run is
        points, job = page.reader(folder).points(), newest(jobs, ["training"], folder)
        memory = page.machine.memory(job.pid if job and job.live else None)
        return [overfit_text(points, language), memory_text(memory, language)]

    page.watch("training", [output_dir], [warning, machine], look)


def overfit_text(points: Sequence[Point], language: str) -> str:
    found = overfit(points)
    return "" if found is None else "⚠ " + say(
        "training.overfit", language, best=f"{found.best:.4f}", best_step=found.best_step, last=f"{found.last:.4f}",
        last_step=found.last_step)


def memory_text(memory: dict[str, Any], language: str) -> str:
    used = (memory["total"] - memory["available"]) / 1e9  # whole: it changes all the time, and each change is a tick
    parts = [say("training.memory", language, used=f"{used:.0f}", total=f"{memory['total'] / 1e9:.0f}")]
    if memory["process"]:
        parts.append(say("training.memory_process", language, used=gigabytes(memory["process"])))
    parts += [say("training.memory_gpu", language, name=plain(gpu["name"]), used=gigabytes(gpu["used"]),
                  total=gigabytes(gpu["total"]), busy=gpu["busy_percent"]) for gpu in memory["gpus"]]
    return " · ".join(parts if memory["gpus"] else [*parts, say("training.no_gpu", language)])


def gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.1f}"


def create_tensorboard(page: Page, output_dir: Any) -> None:
    """TensorBoard as a job of its own, on this machine's loopback address."""
    with gr.Row(equal_height=True):
        start = page.button("training.tensorboard", scale=1, elem_id="training-tensorboard")
        stop = page.button("training.tensorboard_stop", scale=1, visible=False, elem_id="training-tensorboard-stop")
    link = gr.Markdown(elem_id="training-tensorboard-link")
    notice = page.notice()

    def running(jobs: Sequence[Job], typed_dir: str) -> Job | None:
        folder = page.workspace.inside(typed_dir)
        return next((job for job in jobs if job.kind == "tensorboard" and job.live and str(folder) in job.argv), None)

    def begin(typed_dir: str, language: str) -> str:
        try:
            folder = page.workspace.inside(typed_dir)
            if not (folder / "logs").is_dir():
                return say("training.tensorboard_no_logs", language)
            if running(page.jobs(), typed_dir) is None:
                start_job(page.workspace, "tensorboard", f"tensorboard {page.workspace.show(folder)}",
                          command_for("tensorboard", {"logdir": str(folder)}, page.workspace))
        except Refused as refused:
            return refusal(refused, language)
        return ""

    def end(typed_dir: str) -> None:
        job = running(page.jobs(), typed_dir)
        if job:
            stop_job(job)

    def look(jobs: Sequence[Job], language: str, typed_dir: str) -> list[Any]:
        try:
            job = running(jobs, typed_dir)
        except Refused:
            job = None
        if job is None:
            return [gr.update(visible=True), gr.update(visible=False), ""]
        url = tensorboard_url(job.log)
        if url is None:
            return [gr.update(visible=False), gr.update(visible=True), say("training.tensorboard_starts", language)]
        port = urlsplit(url).port
        text = say("training.tensorboard_at", language, url=url,
                   tunnel=f"`ssh -L {port}:127.0.0.1:{port} USER@HOST`")
        return [gr.update(visible=False), gr.update(visible=True), text]

    page.watch("training", [output_dir], [start, stop, link], look)
    page.act(start.click, begin, [output_dir, page.language], [notice])
    page.act(stop.click, end, [output_dir])
