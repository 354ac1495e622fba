"""Tab 1: recording by microphone, sentence by sentence, into a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tools import edit_recordings
from tools._common import ToolError
from webui import pipeline
from webui.clip_editor import fault_text
from webui.clip_rows import Version
from webui.jobs import Job, one_at_a_time
from webui.page_base import QUIET, Page, refusal, tell
from webui.recorded_texts import loudness, next_sentence, sentences, texts_recorded
from webui.texts import say
from webui.uploads import JUDGED, is_sound
from webui.workspace import Refused

FOLDER = "my_voice"
MOST_MEGABYTES = 60  # five minutes at the highest rate


class Recorder:
    """What the handlers share."""

    def __init__(self, page: Page) -> None:
        self.page, self.workspace = page, page.workspace

    def dataset(self, folder: str) -> Path:
        """Raises: Refused."""
        path = self.workspace.inside(folder or FOLDER)
        return self.workspace.inside(str(path / "recordings.jsonl"))

    def listed(self, typed: str) -> Sequence[str]:
        """All sentences; none where there is no list. Raises: Refused."""
        typed = typed or pipeline.files_made(self.workspace, self.page.jobs()).get("texts", "")
        if not typed:
            return ()
        path = self.workspace.inside(typed, must_exist=True)
        try:
            return sentences(Version.of(path))
        except OSError as error:
            raise Refused("not_readable", path=typed) from error

    def done(self, folder: str) -> frozenset[str]:
        """Raises: Refused."""
        with contextlib.suppress(OSError):
            return texts_recorded(Version.of(self.dataset(folder)))
        return frozenset()

    def onward(self, folder: str, texts: str, skipped: list[str]) -> str:
        """The next sentence. Raises: Refused."""
        return next_sentence(self.listed(texts), self.done(folder), set(skipped))

    # Handlers

    def load(self, folder: str, texts: str, skipped: list[str], language: str) -> list[Any]:
        """The sentence and the notice."""
        try:
            return [self.onward(folder, texts, skipped), ""]
        except Refused as refused:
            return [gr.skip(), refusal(refused, language)]

    def skip(self, sentence: str, folder: str, texts: str, skipped: list[str], language: str) -> list[Any]:
        """What is skipped, the sentence, no recording, the notice."""
        skipped = [*skipped, " ".join(sentence.split())]
        return [skipped, *self.load(folder, texts, skipped, language)[:1], None, ""]

    def measure(self, recorded: str | None, language: str) -> str:
        if not recorded:
            return ""
        try:
            found = loudness(sound_at(recorded))
        except Refused as refused:
            return refusal(refused, language)
        except (ToolError, OSError) as error:
            return f"✗ {tell(language, 'tool_refuses', reason=str(error))}"
        level = found.peak if found.verdict == "loud" else found.level
        return say(f"record.{found.verdict}", language, level=round(level), seconds=f"{found.seconds:.1f}")

    def keep(self, recorded: str | None, sentence: str, folder: str, speaker: str, texts: str, skipped: list[str],
             language: str) -> list[Any]:
        """The sentence, no recording, the notice."""
        try:
            if not recorded:
                raise Refused("record_nothing")
            path = self.dataset(folder)
            with one_at_a_time(self.workspace):
                row_id = edit_recordings.add(path, sound_at(recorded), sentence, speaker.strip())
            notice = "✓ " + tell(language, "record.kept", id=row_id, path=self.workspace.show(path))
            return [self.onward(folder, texts, skipped), None, notice]
        except Refused as refused:
            return [gr.skip(), gr.skip(), refusal(refused, language)]
        except ToolError as error:
            return [gr.skip(), gr.skip(), f"✗ {fault_text(error, language)}"]

    def look(self, jobs: Sequence[Job], language: str, folder: str, texts: str) -> list[str]:
        try:
            listed, done = self.listed(texts), self.done(folder)
        except Refused:
            return [""]
        left = len(listed) - len(done.intersection(listed))
        return [say("record.counted", language, done=len(done), left=left)] if listed or done else [""]


def sound_at(recorded: str) -> Path:
    """A recording that a browser sent, judged by what is in it. Raises: Refused."""
    path = Path(recorded)
    try:
        if path.stat().st_size > MOST_MEGABYTES * 1_000_000:
            raise Refused("upload_too_large", path=path.name, megabytes=MOST_MEGABYTES)
        with path.open("rb") as handle:
            start = handle.read(JUDGED)
    except OSError as error:
        raise Refused("not_readable", path=path.name) from error
    if not is_sound(start):
        raise Refused("upload_not_sound", path=path.name)
    return path


def create_recorder(page: Page) -> None:
    recorder = Recorder(page)
    with page.accordion("record.title") as fold:
        page.prose("record.intro")
        with gr.Row():
            with gr.Column(scale=2):
                folder = page.add(gr.Textbox, "record.folder", value=FOLDER, max_lines=1, elem_id="record-folder")
                speaker = page.add(gr.Textbox, "record.speaker", max_lines=1, elem_id="record-speaker")
                texts = page.add(gr.Textbox, "record.texts", max_lines=1, elem_id="record-texts")
                counted = gr.Markdown(elem_id="record-counted")
            with gr.Column(scale=3):
                sentence = page.add(gr.Textbox, "record.sentence", lines=2, max_lines=6, elem_id="record-sentence")
                audio = page.add(gr.Audio, "record.audio", sources=["microphone"], type="filepath",
                                 editable=False, buttons=[], elem_id="record-audio")
                level = gr.Markdown(elem_id="record-level")
                with gr.Row():
                    keep = page.button("record.keep", variant="primary", elem_id="record-keep")
                    retake = page.button("record.retake", elem_id="record-retake")
                    skip = page.button("record.skip", elem_id="record-skip")
                notice = page.notice()
    skipped = gr.State([])
    of_list = [folder, texts, skipped, page.language]
    gr.on([fold.expand, texts.submit, texts.blur, folder.blur], recorder.load, of_list, [sentence, notice], **QUIET)
    audio.change(recorder.measure, [audio, page.language], [level], **QUIET)
    retake.click(lambda: [None, "", ""], None, [audio, level, notice], **QUIET)
    page.act(skip.click, recorder.skip, [sentence, *of_list], [skipped, sentence, audio, notice])
    page.act(keep.click, recorder.keep, [audio, sentence, folder, speaker, texts, skipped, page.language],
             [sentence, audio, notice])
    page.watch("recordings", [folder, texts], [counted], recorder.look)
