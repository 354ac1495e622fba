"""Tabs 1 to 5, 7 and 8: one function each, made of the pieces in webui.page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tools.amharic_text import normalise
from webui import pipeline
from webui.commands import Form, Problem
from webui.dataset import EXAMPLE, SHOWN_FAULTS, read_dataset
from webui.forms import FormSection
from webui.jobs import Job, deletable, delete_checkpoint
from webui.page import QUIET, Page, beside, refusal, tell
from webui.panels import create_job_panel, create_plot, curves, legend, newest, reason_of
from webui.readers import curve, files_in, sample_points
from webui.texts import say
from webui.workspace import Refused, take_upload

MAX_UPLOAD_MB = 200
SHOWN_FILES = 200
COMPARED = [str(number) for number in range(1, 9)]  # runs in one plot, by number
METRICS = {"val_mel": ("val", "mel_loss"), "val_text": ("val", "text_loss"), "train_mel": ("train", "mel_loss"),
           "train_text": ("train", "text_loss")}


class ExportForm(FormSection):
    """An export never overwrites a file: it might be a checkpoint."""

    def problems(self, form: Form) -> dict[str, Problem]:
        found = super().problems(form)
        if "output" not in found and self.page.workspace.inside(str(form["output"])).exists():
            found["output"] = "file_in_the_way", {"path": form["output"]}
        return found


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}" if size < 1e9 else f"{size / 1e6:.0f}"


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


def create_recordings_tab(page: Page) -> None:
    with page.tab("recordings"):
        page.prose("recordings.intro")
        with gr.Row():
            with gr.Column():
                folder = page.add(gr.Textbox, "recordings.folder", value=pipeline.RECORDINGS, max_lines=1,
                                  elem_id="recordings-folder")
                upload = page.add(gr.File, "recordings.upload", file_count="multiple", file_types=[*pipeline.AUDIO],
                                  height=140, elem_id="recordings-upload")
                notice = page.notice()
                page.prose("recordings.by_hand", elem_classes=["missing"])
            with gr.Column():
                count = gr.Markdown(elem_id="recordings-count")
                table = page.add(gr.Dataframe, "recordings.table", interactive=False, max_height=330)
        with page.accordion("recordings.speak"), gr.Row():
            with gr.Column():
                create_form(page, "speak", "recordings", [["texts", "output_dir"], ["voices", "limit"]],
                            [["words_per_minute", "workers", "every_voice"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "recordings", ["speak"])

    def look(jobs: Sequence[Job], language: str, typed: str) -> list[Any]:
        path, problem = page.locate(language, typed)
        files = files_in(path, pipeline.AUDIO) if path else {}
        rows = [[name, f"{megabytes(size)} MB"] for name, size in itertools.islice(files.items(), SHOWN_FILES)]
        text = say("recordings.count", language, count=len(files), megabytes=megabytes(sum(files.values())))
        headers = [say("column.file", language), say("column.size", language)]
        return [problem, text if files else say("recordings.none", language), {"headers": headers, "data": rows}]

    def take(uploaded: list[str], typed: str, language: str) -> tuple[None, str]:
        return None, take_uploads(page, [Path(name) for name in uploaded], typed, language)

    page.watch("recordings", [folder], [folder, count, table], look)
    page.refresh_after.append(upload.upload(take, [upload, folder, page.language], [upload, notice], **QUIET))


def take_uploads(page: Page, uploaded: Sequence[Path], folder: str, language: str) -> str:
    """Takes what can be taken. Returns how many that were, which were there before, and what is wrong with others."""
    there, wrong = [], []
    for path in uploaded:
        try:
            take_upload(page.workspace, path, folder, pipeline.AUDIO, MAX_UPLOAD_MB)
        except Refused as refused:
            if refused.key == "file_in_the_way":
                there.append(path.name)
            else:
                wrong.append(refusal(refused, language))
    count = len(uploaded) - len(there) - len(wrong)
    lines = ["✓ " + tell(language, "recordings.uploaded", count=count, folder=folder)] if count else []
    if there:
        lines.append("✗ " + tell(language, "recordings.there", names=", ".join(there)))
    return "\n\n".join([*lines, *dict.fromkeys(wrong)])


def create_dataset_tab(page: Page) -> None:
    with page.tab("dataset"):
        page.prose("dataset.by_hand", elem_classes=["missing"])
        page.add(gr.Textbox, "dataset.example", value=EXAMPLE.rstrip(), lines=2, interactive=False, buttons=["copy"],
                 elem_classes=["command"])
        with gr.Row(elem_classes=["line"]):
            path = page.add(gr.Textbox, "dataset.path", max_lines=1, scale=4, elem_id="dataset-path")
            check = page.button("dataset.check", variant="primary", scale=1, elem_id="dataset-check")
        report = page.notice()
        table = page.add(gr.Dataframe, "dataset.table", interactive=False, wrap=True, visible=False,
                         elem_id="dataset-table")

    def look(jobs: Sequence[Job], language: str) -> list[Any]:
        """An empty box stands for the data set that the step before has made."""
        return [gr.update(placeholder=pipeline.files_made(page.workspace, jobs).get(
            "dataset", f"{pipeline.RECORDINGS}/recordings.jsonl"))]

    def read(typed: str, language: str) -> list[Any]:
        jobs_made = pipeline.files_made(page.workspace, page.jobs())
        typed = typed or jobs_made.get("dataset", f"{pipeline.RECORDINGS}/recordings.jsonl")
        try:
            found = read_dataset(page.workspace.inside(typed, must_exist=True), page.workspace)
        except Refused as refused:
            return [beside(refused, language), "", gr.update(visible=False)]
        lines = [say("dataset.summary", language, rows=found.rows, speakers=len(found.speakers),
                     validation=found.validation)]
        lines += [f"- ✗ {tell(language, 'dataset.bad_line', line=number, fault=say(key, language, **values))}"
                  for number, key, values in found.faults[:SHOWN_FAULTS]]
        if len(found.faults) > SHOWN_FAULTS:
            lines.append("- " + say("dataset.more", language, count=len(found.faults) - SHOWN_FAULTS))
        lines += [] if found.faults else [f"✓ {say('dataset.good', language)}"]
        headers = ["id", *(say(f"column.{name}", language) for name in ("speaker", "text", "file"))]
        shown = gr.update(visible=True, value={"headers": headers, "data": found.first})
        return [gr.update(info="", elem_classes=[]), "\n\n".join(lines), shown]

    page.watch("dataset", [], [path], look)
    check.click(read, [path, page.language], [path, report, table], **QUIET)


def create_corpus_tab(page: Page) -> None:
    with page.tab("corpus"):
        page.prose("corpus.intro")
        with gr.Row():
            with gr.Column():
                create_form(page, "corpus", "corpus", [["sources", "output_dir"], ["sequences"]],
                            [["validation_texts", "held_out_words", "seed"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "corpus", ["corpus"])
        with page.accordion("corpus.normalise"), gr.Row():
            written = page.add(gr.Textbox, "corpus.normalise_input", lines=2, max_length=2000,
                               elem_id="normalise-input")
            spoken = page.add(gr.Textbox, "corpus.normalise_output", lines=2, interactive=False, buttons=["copy"],
                              elem_id="normalise-output")
    written.change(lambda text: "\n".join(map(normalise, text.splitlines())), [written], [spoken],
                  trigger_mode="always_last", **QUIET)


def create_tokenizer_tab(page: Page) -> None:
    with page.tab("tokenizer"):
        page.prose("tokenizer.intro")
        with gr.Row():
            with gr.Column():
                create_form(page, "tokenizer", "tokenizer", [["texts"], ["output"], ["model_type", "vocab_size"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "tokenizer", ["tokenizer"])


def create_preprocess_tab(page: Page) -> None:
    with page.tab("preprocess"):
        page.prose("preprocess.intro")
        with gr.Row():
            with gr.Column():
                with page.accordion("preprocess.step_codec", open=True):
                    create_form(page, "codec", "preprocess", [["recordings", "output"]],
                                [["steps", "max_hours"], ["num_codes", "seed"]])
                with page.accordion("preprocess.step_features", open=True):
                    create_form(page, "preprocess", "preprocess",
                                [["recordings", "output_dir"], ["codec", "tokenizer"]],
                                [["model_dim", "config"], ["val_share", "val_speakers"],
                                 ["prompts_per_speaker", "jobs", "seed"]])
                with page.accordion("preprocess.step_pairs", open=True):
                    create_form(page, "pairs", "preprocess", [["data_dir"]],
                                [["min_prompt_seconds", "max_prompt_seconds"], ["pairs_per_target", "seed"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "preprocess", ["codec", "preprocess", "pairs"])


def create_checkpoints_tab(page: Page) -> tuple[Any, Any, Any]:
    """Returns the chosen checkpoint, the button that hands it to tab 8, and the notice."""
    with page.tab("checkpoints"):
        state = gr.Markdown(elem_id="checkpoints-state")
        table = page.add(gr.Dataframe, "checkpoints.table", interactive=False, max_height=420, wrap=True,
                         column_widths=["12%", "24%", "7%", "7%", "10%", "10%", "8%", "22%"],
                         elem_id="checkpoints-table")
        with gr.Row(elem_classes=["line"]):
            chosen = page.add(gr.Textbox, "checkpoints.chosen", max_lines=1, scale=4, elem_id="checkpoints-chosen")
            use = page.button("checkpoints.use", scale=1, elem_id="checkpoints-use")
            delete = page.button("checkpoints.delete", variant="stop", scale=1, elem_id="checkpoints-delete")
        with gr.Group(visible=False) as confirmation:
            question = gr.Markdown(elem_classes=["notice"])
            with gr.Row():
                yes = page.button("checkpoints.yes", variant="stop", elem_id="checkpoints-yes")
                cancel = page.button("checkpoints.cancel", elem_id="checkpoints-cancel")
        notice = page.notice()
        with page.accordion("checkpoints.export"), gr.Row():
            with gr.Column():
                form = ExportForm(page, "export", "checkpoints")
                form.row("checkpoint", "output")
                form.command_and_start("start")
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "checkpoints", ["export"])
        create_comparison(page)
        connect_deletion(page, chosen, (delete, yes, cancel), (confirmation, question, notice))

    def look(jobs: Sequence[Job], language: str) -> list[Any]:
        runs, rows = pipeline.find_runs(page.workspace, jobs), []
        for run in runs:
            found = page.checkpoints.look(run)
            name, unknown = page.workspace.show(run), sorted(found.verifying, reverse=True)
            rows += [[name, file, *[""] * 5, say("state.verifying", language)] for file in unknown]
            rows += [checkpoint_row(name, entry, language) for entry in found.checkpoints]
        text = say("checkpoints.counted", language, count=len(rows), runs=len(runs)) if runs else say(
            "checkpoints.none", language)
        headers = [say(f"column.{name}", language)
                   for name in ("run", "file", "step", "epoch", "loss", "best", "size", "state")]
        return [text, {"headers": headers, "data": rows}]

    def choose(event: gr.SelectData) -> list[str]:
        run, names, *_ = event.row_value
        return [f"{run}/{names.split(' = ')[0]}"] * 2

    table.select(choose, None, [chosen, form.inputs["checkpoint"]], **QUIET)
    page.watch("checkpoints", [], [state, table], look)
    return chosen, use, notice


def checkpoint_row(run: str, entry: dict[str, Any], language: str) -> list[str]:
    """A line of the table: run, names, step, epoch, validation loss, best loss, size, verified or what is wrong."""
    size = f"{megabytes(entry['bytes'])} MB" if entry.get("bytes") is not None else ""
    if not entry["verified"]:
        return [run, " = ".join(entry["names"]), "", "", "", "", size, f"✗ {reason_of(entry)}"]
    losses = [f"{value['loss']:.4f}" if value else "" for value in (entry["last_val"], entry["best"])]
    return [run, " = ".join(entry["names"]), str(entry["step"]), str(entry["epoch"]), *losses, size,
            f"✓ {say('state.verified', language)}"]


def connect_deletion(page: Page, chosen: Any, buttons: Sequence[Any], answers: Sequence[Any]) -> None:
    """Deleting the chosen checkpoint, after a question: the one that was asked about, whatever the box says by then."""
    (delete, yes, cancel), (confirmation, question, notice) = buttons, answers
    asked = gr.State("")

    def ask(typed: str, language: str) -> list[Any]:
        try:
            path = page.workspace.show(deletable(page.workspace, typed))
        except Refused as refused:
            return [beside(refused, language), gr.update(visible=False), "", "", ""]
        text = tell(language, "checkpoints.confirm", path=path)
        return [gr.update(info="", elem_classes=[]), gr.update(visible=True), text, "", path]

    def remove(path: str, language: str) -> list[Any]:
        try:
            gone = delete_checkpoint(page.workspace, path)
            text = "✓ " + tell(language, "checkpoints.deleted", names=", ".join(map(page.workspace.show, gone)))
        except Refused as refused:
            text = refusal(refused, language)
        return [gr.update(visible=False), text]

    delete.click(ask, [chosen, page.language], [chosen, confirmation, question, notice, asked], **QUIET)
    page.refresh_after.append(yes.click(remove, [asked, page.language], [confirmation, notice], **QUIET))
    gr.on([cancel.click, chosen.change], lambda: gr.update(visible=False), None, [confirmation], **QUIET)


def connect_use(page: Page, chosen: Any, use: Any, notice: Any) -> None:
    """Hands the checkpoint that tab 7 has chosen to tab 8."""
    checkpoint = page.forms["synthesize"].inputs["checkpoint"]

    def hand_over(typed: str, language: str) -> list[Any]:
        path, problem = page.locate(language, typed, must_exist=True)
        if path is None:
            return [problem, gr.skip(), ""]
        return [problem, typed, "✓ " + tell(language, "checkpoints.used", path=typed)]

    use.click(hand_over, [chosen, page.language], [chosen, checkpoint, notice], **QUIET)


def create_comparison(page: Page) -> None:
    """Curves of several runs in one plot."""
    with gr.Row():
        runs = page.add(gr.Dropdown, "checkpoints.runs", multiselect=True, interactive=True, scale=3,
                        elem_id="checkpoints-runs")
        metric = page.add(gr.Dropdown, "checkpoints.metric", choices=[(f"metric.{name}", name) for name in METRICS],
                          value="val_mel", interactive=True, elem_id="checkpoints-metric")
    key = gr.HTML(elem_classes=["keys"], padding=False)
    plot = create_plot(page, "checkpoints.curves", COMPARED, height=320, elem_id="checkpoints-plot")

    def look(jobs: Sequence[Job], language: str, chosen: list[str], name: str) -> list[Any]:
        present = {page.workspace.show(run): run for run in pipeline.find_runs(page.workspace, jobs)}
        found = ((run, curve(page.reader(present[run]).points(), *METRICS[name])) for run in chosen or present
                 if run in present)
        compared = dict(itertools.islice(((run, pairs) for run, pairs in found if pairs), len(COMPARED)))
        limit = max(50, 1000 // max(1, len(compared)))  # more points than a thousand make the plot drag
        rows = [(step, value, number) for pairs, number in zip(compared.values(), COMPARED, strict=False)
                for step, value in sample_points(pairs, min(500, limit))]
        return [gr.update(choices=list(present)), legend(list(compared)), curves(rows, COMPARED)]

    page.watch("checkpoints", [runs, metric], [runs, key, plot], look)


def create_listen_tab(page: Page) -> None:
    with page.tab("listen"):
        page.prose("listen.intro")
        with gr.Row():
            with gr.Column():
                create_form(page, "synthesize", "listen", [["text"], ["checkpoint", "prompt"], ["output"]],
                            [["codec", "tokenizer"], ["temperature", "top_k", "top_p"], ["takes", "seed", "greedy"]],
                            start="listen.start").check_when_read("checkpoint")
            with gr.Column(elem_classes=["live"]):
                audio = page.add(gr.Audio, "listen.audio", interactive=False, type="filepath", buttons=["download"],
                                 elem_id="listen-audio")
                picture = page.add(gr.Image, "listen.picture", interactive=False, type="filepath", format="png",
                                   buttons=["download", "fullscreen"], elem_id="listen-picture")
                create_job_panel(page, "listen", ["synthesize"])
        with page.accordion("listen.watch"), gr.Row():
            with gr.Column():
                create_form(page, "watch", "listen", [["watch"]],
                            [["text_file", "prompt"], ["codec", "takes"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "listen", ["watch"], name="watch")
        with page.accordion("listen.evaluate"), gr.Row():
            with gr.Column():
                create_form(page, "evaluate", "listen", [["checkpoint", "data_dir"], ["output_dir"]],
                            [["recordings", "codec"], ["recogniser"], ["texts", "takes"]]
                            ).check_when_read("checkpoint")
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "listen", ["evaluate"], name="evaluate")

    def look(jobs: Sequence[Job], language: str) -> list[Any]:
        job = newest([job for job in jobs if job.state == "finished"], ["synthesize"])
        if job is None or job.output_dir is None:
            return [None, None]
        return [page.file_shown(job.output_dir), page.file_shown(job.output_dir.with_suffix(".png"))]

    page.watch("listen", [], [audio, picture], look)
