"""Clips, takes and microphones of the Web UI in a real browser. Pictures go to build/screenshots/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from test_clip_editor import spoken
from visitor import PICTURES, RATE, Server, Visitor, tone, until

from webui.workspace import Workspace

pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="jobs are found through /proc")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six recordings, and takes that jobs of earlier days have left."""
    workspace = Workspace.open(tmp_path_factory.mktemp("workspace"))
    folder = workspace.root / "recordings"
    folder.mkdir()
    rows = []
    for index in range(6):
        soundfile.write(folder / f"r{index}.wav", tone(index), RATE, subtype="PCM_16")
        rows.append({"id": f"r{index}", "speaker": "s", "text": f"ሰላም ቤት {index}", "audio": f"r{index}.wav"})
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spoken(workspace)
    return workspace.root


@pytest.fixture(scope="module")
def visitor(browser: Any, workspace: Path) -> Iterator[Visitor]:
    server = Server(workspace)
    visitor = Visitor(browser, server)
    yield visitor
    visitor.leave()
    server.end()


def rows_of(workspace: Path) -> list[dict[str, Any]]:
    text = (workspace / "recordings/recordings.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_clips_are_corrected_split_joined_and_left_out_by_keyboard_and_every_edit_is_taken_back(
        visitor: Visitor, workspace: Path):
    before, page = rows_of(workspace), visitor.page
    visitor.open("Dataset")
    page.locator("#clips-table tr").filter(has_text="ሰላም ቤት 1").click()
    visitor.sees("#clips-player .hint", "r1 .* 2.00 s")
    until(lambda: page.evaluate("document.querySelector('#clips-player audio').duration") == 2)
    assert page.locator("#clips-player svg.wave").count() == 1

    visitor.box("clips-text").fill("ሰላም ቤት አንድ")
    page.keyboard.press("Enter")
    visitor.sees("#clips-player .hint", "r2 ")
    assert rows_of(workspace)[1]["text"] == "ሰላም ቤት አንድ"

    visitor.box("clips-text").fill("ሰላም ቤት ሁለት")  # without the mark
    page.keyboard.press("Alt+s")
    visitor.sees(".notice", "Put one | in the text")
    visitor.box("clips-text").fill("ሰላም | ቤት ሁለት")
    page.locator("#clips-player svg.wave").click(position={"x": 100, "y": 20})
    cut = float(visitor.reads("clips-cut", r"0\.\d\d"))
    page.keyboard.press("Alt+s")
    visitor.sees("#clips-player .hint", "r2-1 ")
    assert [(row["text"], row["duration"]) for row in rows_of(workspace)[2:4]] == [("ሰላም", cut), ("ቤት ሁለት", 2 - cut)]
    page.screenshot(path=PICTURES / "clips.png", full_page=True)

    page.keyboard.press("Alt+j")
    visitor.sees("#clips-player .hint", "r2-1-1 .* 2.00 s")
    page.keyboard.press("Alt+Delete")
    visitor.sees(".notice", "r2-1-1 is left out")
    visitor.sees("#clips-counted", "1 to 5 of 5")
    for row_id in ("r2-1-1", "r2-1", "r2", "r1"):
        page.keyboard.press("Alt+z")
        visitor.sees("#clips-player .hint", f"{row_id} ")
    assert rows_of(workspace) == before
    visitor.box("clips-search").fill("ቤት 4")
    visitor.sees("#clips-counted", "1 to 1 of 1")


def test_takes_and_two_checkpoints_side_by_side_are_heard_again_and_a_voice_is_uploaded(visitor: Visitor,
                                                                                        workspace: Path):
    visitor.open("Listen")
    visitor.sees("#takes", "A: run/best.pth.*B: run/latest.pth.*002.wav.*001.wav")
    page = visitor.page
    address = page.locator("#takes audio").first.get_attribute("src")
    assert page.evaluate("(address) => fetch(address).then(answer => answer.status)", address) == 200
    assert page.evaluate("(address) => fetch(address).then(answer => answer.status)",
                         address.replace("a.wav", "b.wav")) == 404
    page.get_by_role("button", name=re.compile("Another voice")).first.click()
    page.locator("#synthesize-voice input[type=file]").set_input_files(workspace / "recordings/r3.wav")
    visitor.reads("synthesize-prompt", "prompts/r3.flac")
    visitor.sees(".notice", "Kept as prompts/r3.flac")
    until(lambda: page.locator("#synthesize-prompt-player audio").count() == 1)
    page.screenshot(path=PICTURES / "takes.png", full_page=True)
