"""The whole way in a real browser: from a folder of recordings, dropped on an empty page, to a voice that is heard."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import test_webui_browser
from conftest import ROOT
from test_import_recordings import encode
from visitor import PICTURES, Server, Visitor, end_all_jobs, until

pytestmark = test_webui_browser.pytestmark
MOST_CLICKS, MOST_FIELDS = 12, 3


class Hand:
    """What somebody's hand does on the page, counted; what only makes the test shorter is not done through it."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor, self.clicks, self.fields = visitor, 0, 0

    def click(self, place: Any) -> None:
        place.click()
        self.clicks += 1

    def start(self, kind: str) -> None:
        self.click(self.visitor.page.locator(f"#{kind}-start"))

    def tab(self, name: str) -> None:
        self.visitor.open(name)
        self.clicks += 1

    def type(self, kind: str, **values: str) -> None:
        self.visitor.fill(kind, **values)
        self.fields += len(values)

    def drop(self, path: Path) -> None:
        self.visitor.page.locator("#recordings-upload input[type=file]").set_input_files(path)
        self.clicks += 1


def spoken() -> list[tuple[str, np.ndarray, int]]:
    """(text, samples, rate): what an Amharic voice says."""
    rows = [json.loads(line) for line in (ROOT / "processed_data/val_pairs.jsonl").read_text().splitlines()]
    files = {row["target_text"]: ROOT / "processed_data" / row["target_audio_path"]
             for row in rows if row["target_audio_path"]}
    return [(text, *soundfile.read(path, dtype="float32")) for text, path in files.items()]


def with_a_table(folder: Path) -> None:
    """wav and csv, in a folder of their own, as an archive of one holds them."""
    (folder / "my voice").mkdir()
    table = "file,transcript\n"
    for number, (text, sound, rate) in enumerate(spoken()[:10]):
        soundfile.write(folder / "my voice" / f"clip {number}.wav", sound, rate, subtype="PCM_16")
        table += f"clip {number}.wav,{text}\n"
    (folder / "my voice" / "metadata.csv").write_text(table)


def as_subtitles_have_it(seconds: float) -> str:
    return f"00:{int(seconds // 60):02}:{int(seconds) % 60:02},{int(seconds * 1000) % 1000:03}"


def with_texts_and_subtitles(folder: Path) -> None:
    """Short m4a beside .txt, and a long one beside .srt."""
    clips = spoken()[:10]
    for number, (text, sound, rate) in enumerate(clips[:4]):
        encode(folder / f"phone_{number}.m4a", "aac", rate, "mp4", sound=sound)
        (folder / f"phone_{number}.txt").write_text(text)
    cues, parts, at = [], [], 0.5
    for number, (text, sound, rate) in enumerate(clips[4:], 1):
        seconds = len(sound) / rate
        cues.append(f"{number}\n{as_subtitles_have_it(at)} --> {as_subtitles_have_it(at + seconds)}\n{text}\n")
        parts += [np.zeros(rate, np.float32) if parts else np.zeros(rate // 2, np.float32), sound]
        at += seconds + 1
    encode(folder / "talk.m4a", "aac", clips[0][2], "mp4", sound=np.concatenate(parts))
    (folder / "talk.srt").write_text("\n".join(cues))


@pytest.fixture
def visitor(browser: Any, tmp_path: Path) -> Iterator[Visitor]:
    server = Server(tmp_path / "workspace")
    visitor = Visitor(browser, server)
    yield visitor
    visitor.leave()
    end_all_jobs(tmp_path / "workspace")
    server.end()


@pytest.mark.parametrize("fill", [with_texts_and_subtitles, *([with_a_table] if os.environ.get("SOAK") else [])])
def test_a_dropped_folder_becomes_a_voice_that_is_heard_in_twelve_clicks(visitor: Visitor, tmp_path: Path,
                                                                         fill: Callable[[Path], None]):
    (tmp_path / "source").mkdir()
    fill(tmp_path / "source")
    archive = tmp_path / "recordings.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tmp_path / "source").rglob("*.*")):
            file.write(path, path.relative_to(tmp_path / "source"))
    hand = Hand(visitor)

    hand.click(visitor.page.locator("#home-have").get_by_text("recordings with their texts"))
    hand.drop(archive)
    visitor.reads("import-source", "^recordings$")
    hand.type("import", speaker="አልማዝ")
    visitor.command("import", "--speaker=አልማዝ")
    hand.start("import")
    visitor.sees("#import-summary", "Recordings: 10, ")

    hand.tab("Dataset")
    visitor.reads("filter-recordings", "^recordings_imported/recordings.jsonl$|recordings.jsonl$")
    hand.start("filter")
    visitor.sees("#filter-summary", "Kept: 10. ")

    hand.tab("Prepare")
    visitor.reads("prepare-recordings", "filtered.jsonl$")
    visitor.more_settings()
    visitor.fill("prepare", codec_steps=3, num_codes=64)  # minutes, for a sound that is worth hearing
    visitor.command("prepare", "--num-codes 64")
    hand.start("prepare")
    visitor.sees("#prepare-status", "finished")

    hand.tab("Training")
    visitor.reads("training-train_manifests", "train_pairs.jsonl$")
    visitor.more_settings()
    visitor.fill("training", max_steps=4, save_interval=2)
    visitor.command("training", "--max-steps 4")
    hand.start("training")
    visitor.sees("#training-status", "finished at step 4")

    hand.tab("Listen")
    visitor.reads("synthesize-checkpoint", "best.pth$|latest.pth$")
    visitor.reads("synthesize-prompt", r"\.(wav|flac)$")
    hand.type("synthesize", text="ሰላም ለዓለም")
    visitor.command("synthesize", "--text=")
    hand.start("synthesize")
    visitor.sees("#listen-status", "finished")
    sound = visitor.page.locator("#listen-result audio")
    until(lambda: sound.evaluate("sound => sound.play().then(() => sound.duration)") > 0.05)
    hand.clicks += 1  # on its triangle
    visitor.page.screenshot(path=PICTURES / f"walk_{fill.__name__}.png", full_page=True)
    assert hand.clicks <= MOST_CLICKS and hand.fields <= MOST_FIELDS, (hand.clicks, hand.fields)
