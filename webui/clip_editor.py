"""Tab 2: the clips of a data set, one by one, to hear, correct, split, join and leave out, by mouse and by keyboard."""

from __future__ import annotations

import contextlib
import html
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tools import edit_recordings
from tools._common import ToolError
from webui import clip_rows, pipeline
from webui.clip_rows import ON_A_PAGE, Clip, Version
from webui.jobs import Job, one_at_a_time
from webui.page_base import QUIET, Page, beside, refusal, tell
from webui.served_files import link_to
from webui.texts import TEXTS, say
from webui.workspace import Refused, as_text

MARK = "|"  # in a text: where the second clip begins
Chosen = dict[str, Any]  # "path", "id", "place" among what the search finds, "text"; {} for none
# Runs once. The sound and its picture come anew with every clip, so their events are caught further up.
KEYS = """
const bars = 960;
const visible = () => element.offsetParent !== null;
const press = (id) => document.getElementById(id)?.click();
const sound = () => element.querySelector("audio");
const move = (line, seconds) => {
    const wave = element.querySelector("svg.wave");
    const mark = wave?.querySelector("line." + line);
    if (!mark) return;
    const at = seconds === "" || isNaN(seconds) ? -9 : seconds / Number(wave.dataset.seconds) * bars;
    mark.setAttribute("x1", at); mark.setAttribute("x2", at);
};
element.addEventListener("timeupdate", (event) => move("at", event.target.currentTime), true);
element.addEventListener("click", (event) => {
    const wave = event.target.closest?.("svg.wave");
    if (!wave) return;
    const box = wave.getBoundingClientRect();
    const seconds = (event.clientX - box.left) / box.width * Number(wave.dataset.seconds);
    if (sound()) { sound().currentTime = seconds; sound().play(); }
    const field = document.querySelector("#clips-cut textarea, #clips-cut input");
    field.value = seconds.toFixed(2);
    field.dispatchEvent(new Event("input", {bubbles: true}));
});
document.addEventListener("input", (event) => {
    if (event.target.closest?.("#clips-cut")) move("cut", parseFloat(event.target.value));
});
const mark = () => {
    const place = element.querySelector(".hint")?.dataset.place;
    document.querySelectorAll("#clips-table tr.now").forEach(row => row.classList.remove("now"));
    const row = place && document.querySelector(`#clips-table tr[data-place="${place}"]`);
    if (row) { row.classList.add("now"); row.scrollIntoView({block: "nearest"}); }
};
watch("value", mark);
document.addEventListener("clips-shown", mark);
const toggle = () => { const player = sound(); if (player) player.paused ? player.play() : player.pause(); };
const keys = {ArrowDown: () => press("clips-next"), ArrowUp: () => press("clips-previous"), KeyP: toggle,
              KeyS: () => press("clips-split"), KeyJ: () => press("clips-join"), KeyZ: () => press("clips-undo"),
              Delete: () => press("clips-leave")};
document.addEventListener("keydown", (event) => {
    if (!visible() || event.ctrlKey || event.metaKey || event.isComposing) return;
    const inText = event.target.closest?.("#clips-text");
    let act = null;
    if (event.altKey) act = keys[event.code];
    else if (inText && event.key === "Enter" && !event.shiftKey) act = () => press("clips-save");
    if (!act) return;
    event.preventDefault(); event.stopPropagation();
    if (!event.repeat || event.code.startsWith("Arrow")) act();
}, true);
"""

# No gr.Dataframe: drawing its lines anew costs the browser more than all the rest.
LINES = """
element.addEventListener("click", (event) => {
    const row = event.target.closest?.("tr[data-place]");
    if (row) trigger("click", {place: Number(row.dataset.place)});
});
watch("value", () => document.dispatchEvent(new Event("clips-shown")));
"""


class ClipEditor:
    """What the handlers share: the page, and which file is edited."""

    def __init__(self, page: Page) -> None:
        self.page, self.workspace = page, page.workspace

    # Which file, which clip

    def default(self, jobs: Sequence[Job]) -> str:
        """What an empty box stands for."""
        made = pipeline.files_made(self.workspace, jobs)
        return made.get("recordings") or made.get("dataset") or f"{pipeline.RECORDINGS}/recordings.jsonl"

    def version(self, typed: str) -> Version:
        """Raises: Refused."""
        path = self.workspace.inside(typed or self.default(self.page.jobs()), must_exist=True)
        if path.is_dir():
            raise Refused("not_a_file", path=self.workspace.show(path))
        try:
            return Version.of(path)
        except OSError as error:
            raise Refused("not_readable", path=self.workspace.show(path)) from error

    def shown(self, version: Version, clip: Clip | None, place: int, autoplay: bool, language: str) -> list[Any]:
        """Values of chosen, player, text, cut and the number of the page."""
        number = str(place // ON_A_PAGE + 1)
        if clip is None:
            return ["", f'<p class="hint">{html.escape(say("clips.choose", language))}</p>', "", "", "1"]
        chosen = {"path": self.workspace.show(version.path), "id": clip.text("id"), "place": place,
                  "text": clip.row.get("text", "")}
        sound = clip_rows.sound_of(clip, version.path.parent, self.workspace)
        link = link_to(self.workspace, self.page.secret, sound) if sound else ""
        title = f"{clip.number} · {html.escape(clip.text('id'))} · {clip.seconds:.2f} s"
        if not link:
            missing = html.escape(say("dataset.no_audio", language, path=clip.text("audio")))
            hint = f'<p class="hint" data-place="{place}">{title}<br>✗ {missing}</p>'
            return [json.dumps(chosen), hint, clip.text("text"), "", number]
        play = " autoplay" if autoplay else ""
        return [json.dumps(chosen), f'<p class="hint" data-place="{place}">{title}</p>{clip_rows.picture(sound)}'
                f'<audio controls preload="auto"{play} src="{html.escape(link)}"></audio>',
                clip.text("text"), "", number]

    def at(self, version: Version, query: str, place: int, autoplay: bool, language: str) -> list[Any]:
        """shown() of the clip at a place; of the last where there are fewer."""
        total = clip_rows.count(version, query)
        place = max(0, min(place, total - 1))
        found = clip_rows.clips(version, query, place, 1)
        return self.shown(version, found[0] if found else None, place, autoplay, language)

    # Handlers

    def choose(self, place: int, typed: str, query: str, autoplay: bool, language: str) -> list[Any]:
        """shown(), and the notice."""
        try:
            return [*self.at(self.version(typed), query, place, autoplay, language), ""]
        except Refused as refused:
            return [*[gr.skip()] * 5, refusal(refused, language)]
        except OSError:
            return [*[gr.skip()] * 5, f"✗ {tell(language, 'not_readable', path=typed)}"]

    def edit(self, act: Callable[[Path, str, str], str], held: str, query: str, autoplay: bool, language: str,
             onward: int = 0) -> list[Any]:
        """Does something to the chosen clip, and shows the one whose id `act` returns, or the one `onward` from it.
        Of a row that is gone the place is shown."""
        chosen = chosen_of(held)
        try:
            path = self.workspace.inside(chosen.get("path", ""), must_exist=True) if chosen else None
            if path is None:
                return [*[gr.skip()] * 5, f"✗ {say('clips.choose', language)}"]
            with one_at_a_time(self.workspace):
                self.require_free(path)
                row_id = act(path, chosen["id"], chosen["text"])
            version, place = Version.of(path), chosen["place"]
            found = clip_rows.place_of(version, query, row_id, place) if row_id else None
            return [*self.at(version, query, place if found is None else found + onward, autoplay, language), ""]
        except Refused as refused:
            return [*[gr.skip()] * 5, refusal(refused, language)]
        except ToolError as error:
            return [*[gr.skip()] * 5, f"✗ {fault_text(error, language)}"]
        except OSError:
            return [*[gr.skip()] * 5, f"✗ {tell(language, 'not_writable', path=chosen.get('path', ''))}"]

    def require_free(self, path: Path) -> None:
        """Raises: Refused while a job of the page reads or writes the file."""
        for job in self.page.jobs():
            if job.live and (job.output_dir in (path, path.parent) or str(path) in job.argv):
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.created))
                raise Refused("directory_in_use", path=self.workspace.show(path), title=job.title, since=since,
                              pid=job.pid)

    def save(self, held: str, text: str, query: str, autoplay: bool, language: str) -> list[Any]:
        def act(path: Path, row_id: str, shown: str) -> str:
            edit_recordings.set_text(path, row_id, text, shown)
            return row_id

        if text == chosen_of(held).get("text"):  # only looked at
            return self.edit(lambda path, row_id, shown: row_id, held, query, autoplay, language, onward=1)
        return self.edit(act, held, query, autoplay, language, onward=1)

    def split(self, held: str, text: str, cut: str, query: str, autoplay: bool, language: str) -> list[Any]:
        def act(path: Path, row_id: str, shown: str) -> str:
            parts = [part.strip() for part in text.split(MARK)]
            if len(parts) != 2 or not all(parts):
                raise Refused("clips_mark_needed", mark=MARK)
            return edit_recordings.split(path, row_id, self.cut_of(path, chosen_of(held), parts, cut), parts)[0]

        return self.edit(act, held, query, autoplay, language)

    def cut_of(self, path: Path, chosen: Chosen, parts: Sequence[str], typed: str) -> float:
        """The second that was typed, else that of a pause near to where the letters say. Raises: Refused, ToolError."""
        if typed.strip():
            try:
                return float(typed.replace(",", "."))
            except ValueError:
                raise Refused("not_a_number", value=typed) from None
        version = Version.of(path)
        place = clip_rows.place_of(version, "", chosen["id"], chosen["place"])
        clip = clip_rows.clips(version, "", place, 1)[0] if place is not None else None
        sound = clip_rows.sound_of(clip, path.parent, self.workspace) if clip else None
        if clip is None or sound is None:
            raise Refused("no_such_file", path=chosen["id"])
        _, seconds = clip_rows.peaks(Version.of(sound))
        first, second = map(len, parts)
        return edit_recordings.quiet_place(sound, (seconds or clip.seconds) * first / (first + second))

    def join(self, held: str, query: str, autoplay: bool, language: str) -> list[Any]:
        return self.edit(lambda path, row_id, shown: edit_recordings.join_next(path, row_id), held, query, autoplay,
                         language)

    def leave_out(self, held: str, query: str, autoplay: bool, language: str) -> list[Any]:
        def act(path: Path, row_id: str, shown: str) -> str:
            edit_recordings.leave_out(path, row_id)
            return ""

        values, row_id = self.edit(act, held, query, autoplay, language), chosen_of(held).get("id", "")
        return values if values[-1] else [*values[:-1], f"✓ {tell(language, 'clips.left_out', id=row_id)}"]

    def undo(self, held: str, typed: str, query: str, autoplay: bool, language: str) -> list[Any]:
        undone: list[str] = []

        def act(path: Path, row_id: str, shown: str) -> str:
            edit = edit_recordings.undo(path)
            undone.append(edit.action)
            return str(edit_recordings.row_of(edit.before[0].encode(errors="replace")).get("id")) if edit.before else ""

        values = self.edit(act, held or self.of_file(typed), query, autoplay, language)
        done = f"✓ {say('clips.undone', language, action=say(f'clips.action.{undone[0]}', language))}" if undone else ""
        return [*values[:-1], values[-1] or done]

    def again(self, held: str, typed: str, query: str, autoplay: bool, language: str) -> list[Any]:
        made: list[int] = []

        def act(path: Path, row_id: str, shown: str) -> str:
            made.append(edit_recordings.again(path))
            return row_id

        values = self.edit(act, held or self.of_file(typed), query, autoplay, language)
        done = f"✓ {say('clips.made_again', language, count=made[0])}" if made else ""
        return [*values[:-1], values[-1] or done]

    def of_file(self, typed: str) -> str:
        """A chosen clip for what concerns the whole file."""
        with contextlib.suppress(Refused):
            return json.dumps({"path": self.workspace.show(self.version(typed).path), "id": "", "place": 0, "text": ""})
        return ""

    # What follows the file

    def look(self, jobs: Sequence[Job], language: str, typed: str, query: str, number: str) -> list[Any]:
        """The box of the file, the table, what is shown of how many, whether there are pages before and behind, and
        whether edits are to be made again."""
        default = self.default(jobs)
        nothing = ["", "", gr.update(interactive=False), gr.update(interactive=False),
                   gr.update(visible=False)]
        try:
            version = self.version(typed or default)
            total = clip_rows.count(version, query)
            page = page_number(number, total)
            rows = clip_rows.clips(version, query, page * ON_A_PAGE)
            missing = edits_missing(version)
        except Refused as refused:
            problem = beside(refused, language) if typed else gr.update(info="", elem_classes=[])
            return [{**problem, "placeholder": default}, *nothing]
        except OSError:
            return [gr.update(placeholder=default), *nothing]
        first = page * ON_A_PAGE
        counted = say("clips.counted", language, first=first + 1 if rows else 0, last=first + len(rows), count=total)
        return [gr.update(placeholder=default, info="", elem_classes=[]), table_html(rows, first, language), counted,
                gr.update(interactive=page > 0), gr.update(interactive=first + ON_A_PAGE < total),
                gr.update(visible=missing)]


def table_html(rows: Sequence[Clip], first: int, language: str) -> str:
    """The lines of a page, each with its place among what the search finds."""
    heads = "".join(f"<th>{html.escape(say(f'column.{name}', language))}</th>"
                    for name in ("number", "seconds", "speaker", "text"))
    lines = "".join(
        f'<tr data-place="{first + i}"><td>{clip.number}</td><td>{clip.seconds:.2f}</td>'
        f'<td>{html.escape(clip.text("speaker"))}</td><td lang="am">{html.escape(clip.text("text"))}</td></tr>'
        for i, clip in enumerate(rows))
    return f'<div class="lines"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def chosen_of(held: str) -> Chosen:
    """What the browser holds: of what it shows, whatever has been done in the meantime."""
    with contextlib.suppress(ValueError, TypeError, LookupError):
        chosen = json.loads(held)
        if isinstance(chosen["place"], int) and all(isinstance(chosen[name], str) for name in ("path", "id")):
            return chosen
    return {}


def page_number(typed: str, total: int) -> int:
    """From 0; the nearest that there is."""
    number = int(typed) - 1 if str(typed or "").strip().isdecimal() and len(str(typed)) < 9 else 0
    return max(0, min(number, (total - 1) // ON_A_PAGE))


def edits_missing(version: Version) -> bool:
    """Looked up again only when the file or its log has changed."""
    log = edit_recordings.log_path(version.path)
    return log.is_file() and clip_rows.cached_missing(version, Version.of(log))


def fault_text(error: ToolError, language: str) -> str:
    """What an edit was refused for, in the page's language where it has a text."""
    if isinstance(error, edit_recordings.Fault) and (key := f"clips.fault.{error.kind}") in TEXTS:
        return tell(language, key, **{name: as_text(Path(value).name if isinstance(value, Path) else value)
                                      if not isinstance(value, int | float) else value
                                      for name, value in error.values.items()})
    return tell(language, "tool_refuses", reason=as_text(error))


def create_clip_editor(page: Page) -> None:
    editor = ClipEditor(page)
    with page.accordion("clips.title", open=True), gr.Column(elem_id="clips"):
        with gr.Row(elem_classes=["line"]):
            path = page.add(gr.Textbox, "clips.path", max_lines=1, scale=3, elem_id="clips-path")
            query = page.add(gr.Textbox, "clips.search", max_lines=1, scale=2, elem_id="clips-search")
        with gr.Row(elem_classes=["line", "clips-pages"]):
            counted = gr.Markdown(elem_id="clips-counted")
            back = page.button("clips.page_back", size="sm", min_width=60, elem_id="clips-back")
            number = gr.Textbox("1", show_label=False, container=False, max_lines=1, min_width=60, elem_id="clips-page")
            forth = page.button("clips.page_forth", size="sm", min_width=60, elem_id="clips-forth")
        table = gr.HTML(elem_id="clips-table", padding=False, js_on_load=LINES)
        chosen = gr.Textbox(visible="hidden")
        with gr.Row():
            with gr.Column(scale=3):
                player = gr.HTML(elem_id="clips-player", padding=False, js_on_load=KEYS)
            with gr.Column(scale=4):
                text = page.add(gr.Textbox, "clips.text", lines=2, max_lines=6, elem_id="clips-text")
                with gr.Row(elem_classes=["line"]):
                    cut = page.add(gr.Textbox, "clips.cut", max_lines=1, elem_id="clips-cut")
                    autoplay = page.add(gr.Checkbox, "clips.autoplay", value=True, elem_id="clips-autoplay")
        with gr.Row(elem_classes=["clips-buttons"]):
            names = ("previous", "save", "next", "split", "join", "leave", "undo")
            buttons = {name: page.button(f"clips.{name}", size="sm", min_width=110, elem_id=f"clips-{name}",
                                         variant="primary" if name == "save" else "secondary") for name in names}
            again = page.button("clips.again", size="sm", visible=False, elem_id="clips-again")
        notice = page.notice()
        page.prose("clips.keys", elem_classes=["tips"])
    connect(page, editor, chosen, (path, query, number, autoplay), (player, text, cut, notice), buttons, again)
    page.watch("dataset", [path, query, number], [path, table, counted, back, forth, again], editor.look)

    def choose(typed: str, search: str, plays: bool, language: str, event: gr.EventData) -> list[Any]:
        place = event._data.get("place")
        return editor.choose(place if isinstance(place, int) else 0, typed, search, plays, language)

    table.click(choose, [path, query, autoplay, page.language], [chosen, player, text, cut, number, notice], **QUIET)
    for button, by in ((back, -1), (forth, 1)):
        page.act(button.click, lambda shown, by=by: str(max(1, (int(shown) if str(shown).isdecimal() else 1) + by)),
                 [number], [number])
    query.change(None, None, [number], js='() => "1"', **QUIET)


def connect(page: Page, editor: ClipEditor, chosen: Any, given: Sequence[Any], shown: Sequence[Any],
            buttons: dict[str, Any], again: Any) -> None:
    """What the buttons do."""
    path, query, number, autoplay = given
    player, text, cut, notice = shown
    outputs = [chosen, player, text, cut, number, notice]

    def step(by: int) -> Callable[..., list[Any]]:
        return lambda held, typed, search, plays, language: editor.choose(
            chosen_of(held).get("place", -1 if by > 0 else 0) + by, typed, search, plays, language)

    actions = (
        (buttons["previous"], step(-1), [chosen, path, query]), (buttons["next"], step(1), [chosen, path, query]),
        (buttons["save"], editor.save, [chosen, text, query]),
        (buttons["split"], editor.split, [chosen, text, cut, query]), (buttons["join"], editor.join, [chosen, query]),
        (buttons["leave"], editor.leave_out, [chosen, query]),
        (buttons["undo"], editor.undo, [chosen, path, query]), (again, editor.again, [chosen, path, query]))
    for button, act, inputs in actions:
        # What is pressed while an answer is on the way comes after it.
        page.act(button.click, act, [*inputs, autoplay, page.language], outputs, trigger_mode="always_last")
