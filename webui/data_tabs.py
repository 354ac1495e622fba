"""Tabs 1 to 5, from recordings to pairs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tools._amharic_reading import Reading
from tools.amharic_text import read_aloud, shown
from webui import pipeline
from webui.clip_editor import create_clip_editor
from webui.command_form import FormSection, create_form
from webui.data_summaries import filter_summary, import_summary, is_newer, report_frame
from webui.job_panel import create_job_panel, newest
from webui.jobs import Job
from webui.page_base import QUIET, Page, megabytes, refusal, tell
from webui.readers import files_in
from webui.recorder import create_recorder
from webui.recordings_check import EXAMPLE, SHOWN_FAULTS, read_dataset
from webui.texts import TEXTS, say
from webui.uploads import AUDIO, TRANSCRIPTS, take_upload
from webui.workspace import Refused
from webui.zip_upload import ENDING, unpack

MAX_UPLOAD_MB = 200
SHOWN_FILES = 200
SHOWN_THERE = 20
MAX_REPORT_MB = 60
REPORT = "filter_report.html"
FRESH_SECONDS = 300


def create_recordings_tab(page: Page) -> None:
    with page.tab("recordings"):
        page.prose("recordings.intro")
        with gr.Row():
            with gr.Column():
                folder = page.add(gr.Textbox, "recordings.folder", value=pipeline.RECORDINGS, max_lines=1,
                                  elem_id="recordings-folder")
                # Which files can be taken is judged here, and said in the page's language.
                upload = page.add(gr.File, "recordings.upload", file_count="multiple", height=140,
                                  elem_id="recordings-upload")
                notice = page.notice()
            with gr.Column():
                count = gr.Markdown(elem_id="recordings-count")
                table = page.add(gr.Dataframe, "recordings.table", interactive=False, max_height=330, visible=False)
        with page.accordion("recordings.import", open=True):
            page.prose("recordings.import_intro")
            with gr.Row():
                with gr.Column():
                    create_form(page, "import", "recordings", [["source", "output_dir"], ["speaker", "layout"]],
                                [["speaker_from", "language"], ["transcriber", "audio_dir"],
                                 ["shortest", "longest", "jobs"]])
                with gr.Column(elem_classes=["live"]):
                    found = gr.Markdown(elem_id="import-summary", render=False)
                    create_job_panel(page, "recordings", ["import"], above_log=found.render, name="import")
        create_recorder(page)
        with page.accordion("recordings.speak"), gr.Row():
            with gr.Column():
                create_form(page, "speak", "recordings", [["texts", "output_dir"], ["voices", "limit"]],
                            [["words_per_minute", "workers", "rules"], ["every_voice"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "recordings", ["speak"])

    def look(jobs: Sequence[Job], language: str, typed: str) -> list[Any]:
        path, problem = page.locate(language, typed)
        files = files_in(path, (*AUDIO, *TRANSCRIPTS)) if path else {}
        rows = [[name, f"{megabytes(size)} MB"] for name, size in itertools.islice(files.items(), SHOWN_FILES)]
        text = say("recordings.count", language, count=len(files), megabytes=megabytes(sum(files.values())))
        headers = [say("column.file", language), say("column.size", language)]
        shown = gr.update(value={"headers": headers, "data": rows}, visible=bool(rows))
        return [problem, text if files else say("recordings.none", language), shown]

    def take(uploaded: list[str], typed: str, language: str) -> tuple[None, str]:
        return None, take_uploads(page, [Path(name) for name in uploaded], typed, language)

    def summarise(jobs: Sequence[Job], language: str) -> list[str]:
        job = newest(jobs, ["import"])
        return [import_summary(job, page.workspace, language) if job else ""]

    page.watch("recordings", [folder], [folder, count, table], look)
    page.watch("recordings", [], [found], summarise)
    page.act(upload.upload, take, [upload, folder, page.language], [upload, notice])


def take_uploads(page: Page, uploaded: Sequence[Path], folder: str, language: str) -> str:
    """Takes what can be taken. Returns how many that were, which were there before, and what is wrong with others."""
    there, wrong, count = [], [], 0
    for path in uploaded:
        try:
            if path.suffix.lower() == ENDING:
                found = unpack(page.workspace, path, folder, (*AUDIO, *TRANSCRIPTS), MAX_UPLOAD_MB)
                there += found.there
                wrong += ["✗ " + tell(language, "zip.passed_over", path=path.name, count=len(found.passed_over),
                                      example=found.passed_over[0])] if found.passed_over else []
                count += len(found.taken)
            else:
                take_upload(page.workspace, path, folder, (*AUDIO, *TRANSCRIPTS), MAX_UPLOAD_MB)
                count += 1
        except Refused as refused:
            if refused.key == "file_in_the_way":
                there.append(path.name)
            else:
                wrong.append(refusal(refused, language))
    lines = ["✓ " + tell(language, "recordings.uploaded", count=count, folder=folder)] if count else []
    if there:
        names = [*there[:SHOWN_THERE], *["…"] * (len(there) > SHOWN_THERE)]
        lines.append("✗ " + tell(language, "recordings.there", names=", ".join(names)))
    return "\n\n".join([*lines, *dict.fromkeys(wrong)])


def create_filter(page: Page) -> None:
    """What of a dataset is good enough, and the report about it."""
    with gr.Row():
        with gr.Column():
            form = create_form(page, "filter", "dataset", [["recordings"], ["shortest", "longest", "least_snr"]],
                               [["quietest", "most_clipped", "most_offset"],
                                ["most_deviation", "least_ethiopic", "most_repeats"],
                                ["most_silence", "audio_dir", "jobs"]])
        with gr.Column(elem_classes=["live"]):
            found = gr.Markdown(elem_id="filter-summary", render=False)
            create_job_panel(page, "dataset", ["filter"], above_log=found.render, name="filter")
    with gr.Row():
        opens = page.button("filter.report", interactive=False, elem_id="filter-report")
        closes = page.button("filter.close", visible=False, elem_id="filter-close")
    notice = page.notice()
    frame = gr.HTML(elem_id="filter-frame", padding=False)
    box = form.inputs["recordings"]

    def look(jobs: Sequence[Job], language: str, typed: str) -> list[Any]:
        try:
            recordings = page.workspace.inside(typed, must_exist=True)
            summary = filter_summary(recordings, page.workspace, language)
        except (Refused, OSError):
            return ["", gr.update(interactive=False)]
        return [summary, gr.update(interactive=recordings.with_name(REPORT).is_file())]

    def open_report(typed: str, language: str) -> list[Any]:
        try:
            recordings = page.workspace.inside(typed, must_exist=True)
            path = page.workspace.inside(str(recordings.with_name(REPORT)), must_exist=True)
            if path.stat().st_size > MAX_REPORT_MB * 1e6:
                return [f"✗ {tell(language, 'filter.too_large', path=page.workspace.show(path))}", "", gr.skip()]
            return ["", report_frame(path), gr.update(visible=True)]
        except Refused as refused:
            return [refusal(refused, language), "", gr.skip()]
        except OSError:
            return [f"✗ {tell(language, 'not_readable', path=REPORT)}", "", gr.skip()]

    page.watch("dataset", [box], [found, opens], look)
    # A run that ends shows its report by itself.
    ended = gr.Textbox(visible="hidden", elem_id="filter-ended")
    page.watch("dataset", [], [ended], lambda jobs, language: [just_ended(newest(jobs, ["filter"]))])
    ended.change(lambda name, *given: open_report(*given) if name else [gr.skip()] * 3, [ended, box, page.language],
                 [notice, frame, closes], **QUIET)
    opens.click(open_report, [box, page.language], [notice, frame, closes], **QUIET)
    closes.click(lambda: ["", gr.update(visible=False)], None, [frame, closes], **QUIET)


def just_ended(job: Job | None) -> str:
    """The id of a job that has finished within the last minutes; "" for another."""
    fresh = job and job.state == "finished" and is_newer(job.folder / "exit.json", time.time() - FRESH_SECONDS)
    return job.id if job and fresh else ""


def create_dataset_tab(page: Page) -> None:
    with page.tab("dataset"):
        create_clip_editor(page)
        with page.accordion("dataset.filter", open=True):
            page.prose("dataset.filter_intro")
            create_filter(page)
        with page.accordion("dataset.check_section", open=True):
            page.prose("dataset.check_intro")
            create_check(page)
        with page.accordion("dataset.by_hand"):
            page.prose("dataset.by_hand_how")
            page.add(gr.Textbox, "dataset.example", value=EXAMPLE.rstrip(), lines=2, interactive=False,
                     buttons=["copy"], elem_classes=["command"])


def create_check(page: Page) -> None:
    """What preprocess would make of a dataset: the program's own check, and at once the lines that are none."""
    with gr.Row():
        with gr.Column():
            form = FormSection(page, "check", "dataset")
            with gr.Group():
                form.row("recordings")
            with page.accordion("more_settings"), gr.Group():
                form.row("tokenizer", "codec")
                form.row("audio_dir", "jobs")
            start = form.command_and_start("dataset.check")
            report = page.notice()
        with gr.Column(elem_classes=["live"]):
            create_job_panel(page, "dataset", ["check"], name="check")
    table = page.add(gr.Dataframe, "dataset.table", interactive=False, wrap=True, visible=False,
                     elem_id="dataset-table")

    def read(typed: str, language: str) -> list[Any]:
        try:
            found = read_dataset(page.workspace.inside(typed, must_exist=True), page.workspace)
        except Refused as refused:  # said beside the field, or here, if it is no dataset
            return [refusal(refused, language), gr.update(visible=False)]
        lines = [say("dataset.summary", language, rows=found.rows, speakers=len(found.speakers),
                     validation=found.validation)]
        lines += [f"- ✗ {tell(language, 'dataset.bad_line', line=number, fault=say(key, language, **values))}"
                  for number, key, values in found.faults[:SHOWN_FAULTS]]
        if len(found.faults) > SHOWN_FAULTS:
            lines.append("- " + say("dataset.more", language, count=len(found.faults) - SHOWN_FAULTS))
        lines += [] if found.faults else [f"✓ {say('dataset.good', language)}"]
        headers = ["id", *(say(f"column.{name}", language) for name in ("speaker", "text", "file"))]
        shown = gr.update(visible=True, value={"headers": headers, "data": found.first})
        return ["\n\n".join(lines), shown]

    start.click(read, [form.inputs["recordings"], page.language], [report, table], **QUIET)


def create_prepare_tab(page: Page) -> None:
    """Tabs 3 to 5: one Start for all of it, and the single steps below a fold."""
    with page.tab("prepare"):
        page.prose("prepare.intro")
        with gr.Row():
            with gr.Column():
                create_form(page, "prepare", "prepare", [["recordings", "output_dir"], ["features", "model_dir"]],
                            [["tokenizer", "target_size"], ["codec"], ["codec_steps", "num_codes"],
                             ["val_share", "val_speakers"], ["prompts_per_speaker", "config"],
                             ["audio_dir", "jobs", "seed"]])
            with gr.Column(elem_classes=["live"]):
                create_job_panel(page, "prepare", ["prepare"])
        with page.accordion("corpus.normalise"):
            create_reader(page)
        with page.accordion("prepare.corpus", elem_id="single-corpus"):
            create_corpus_steps(page)
        with page.accordion("prepare.tokenizer_step", elem_id="single-tokenizer"):
            create_tokenizer_step(page)
        with page.accordion("prepare.preprocess", elem_id="single-preprocess"):
            create_preprocess_steps(page)


def create_corpus_steps(page: Page) -> None:
    page.prose("corpus.intro")
    with gr.Row():
        with gr.Column():
            with page.accordion("corpus.own", open=True):
                create_form(page, "collect", "prepare", [["recordings", "output"]], [["tokenizer"]])
            with page.accordion("corpus.demo"):
                create_form(page, "corpus", "prepare", [["sources", "output_dir"], ["sequences"]],
                            [["validation_texts", "held_out_words", "seed"]])
        with gr.Column(elem_classes=["live"]):
            create_job_panel(page, "prepare", ["collect", "corpus"], name="corpus")


def create_reader(page: Page) -> None:
    """What becomes of a text that somebody types: as it is spoken, what was changed and what cannot be said."""
    with gr.Row():
        written = page.add(gr.Textbox, "corpus.normalise_input", lines=2, max_lines=8, max_length=2000,
                           elem_id="normalise-input")
        spoken = page.add(gr.Textbox, "corpus.normalise_output", lines=2, max_lines=8, interactive=False,
                          buttons=["copy"], elem_id="normalise-output")
    lost = gr.Markdown(elem_id="normalise-lost")
    changes = page.add(gr.Dataframe, "corpus.changes", interactive=False, wrap=True, visible=False, max_height=330,
                       elem_id="normalise-changes")

    def read(text: str, language: str) -> list[Any]:
        readings = [read_aloud(line) for line in (text or "").splitlines()]
        rows = [[str(number), rule_name(change.rule, language), shown(change.before), shown(change.after)]
                for number, reading in enumerate(readings, 1) for change in reading.changes]
        headers = [say(f"column.{name}", language) for name in ("line", "rule", "written", "spoken")]
        return ["\n".join(reading.text for reading in readings), losses(readings, language),
                gr.update(visible=bool(rows), value={"headers": headers, "data": rows})]

    gr.on([written.change, page.language.change], read, [written, page.language], [spoken, lost, changes],
          trigger_mode="always_last", **QUIET)


def rule_name(rule: str, language: str) -> str:
    return say(key, language) if (key := f"rule.{rule}") in TEXTS else rule


def losses(readings: Sequence[Reading], language: str) -> str:
    """Markdown: the signs that nothing says, and the Latin words, of each line; that all is said, where it is."""
    lines = []
    for number, reading in enumerate(readings, 1):
        for key, found in (("corpus.unsaid", reading.unsaid), ("corpus.latin", reading.latin)):
            if found:
                lines.append("- " + tell(language, key, line=number, found="  ".join(map(shown, found))))
    if not lines and any(reading.text for reading in readings):
        return f"✓ {say('corpus.all_said', language)}"
    return "\n".join(lines)


def create_tokenizer_step(page: Page) -> None:
    page.prose("tokenizer.intro")
    with gr.Row():
        with gr.Column():
            create_form(page, "tokenizer", "prepare", [["texts"], ["output"], ["model_type", "vocab_size"]],
                        [["extend", "target_size"], ["language"]])
        with gr.Column(elem_classes=["live"]):
            create_job_panel(page, "prepare", ["tokenizer"], name="tokenizer")


def create_preprocess_steps(page: Page) -> None:
    page.prose("preprocess.intro")
    with gr.Row():
        with gr.Column():
            with page.accordion("preprocess.step_codec", open=True):
                create_form(page, "codec", "prepare", [["recordings", "output"]],
                            [["steps", "max_hours"], ["num_codes", "seed"]])
            with page.accordion("preprocess.step_features", open=True):
                create_form(page, "preprocess", "prepare",
                            [["recordings", "output_dir"], ["codec", "tokenizer"], ["features", "model_dir"]],
                            [["model_dim", "config"], ["val_share", "val_speakers"],
                             ["prompts_per_speaker", "jobs", "seed"]])
            with page.accordion("preprocess.step_pairs", open=True):
                create_form(page, "pairs", "prepare", [["data_dir"]],
                            [["min_prompt_seconds", "max_prompt_seconds"],
                             ["pairs_per_target", "emo_source", "seed"]])
        with gr.Column(elem_classes=["live"]):
            create_job_panel(page, "prepare", ["codec", "preprocess", "pairs"], name="preprocess")
