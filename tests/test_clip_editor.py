"""Edits of a recordings.jsonl by hand: whole or not at all, taken back one by one, never a row lost; pages of its rows;
zip uploads; links to files."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tools import edit_recordings
from tools._common import ToolError
from tools.edit_recordings import Fault
from webui import clip_rows, command_lines, jobs, recorded_texts, served_files, takes
from webui.clip_rows import ON_A_PAGE, Version
from webui.uploads import AUDIO, TRANSCRIPTS
from webui.workspace import Refused, Workspace
from webui.zip_upload import unpack

RATE = 16000
RECORDINGS = "recordings.jsonl"


def sound(seconds: float = 1.0, pause: float | None = None, seed: int = 0) -> np.ndarray:
    """Noise, with a tenth of a second of silence in it, or without."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)
    if pause is not None:
        samples[round((pause - 0.1) * RATE) : round((pause + 0.1) * RATE)] = 0
    return samples


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Four rows: two of one speaker, one escaped, one that is not JSON between them."""
    rows = [{"id": f"r{i}", "text": f"ሰላም {i}", "audio": f"{i}.wav", "speaker": "b" if i == 3 else "a", "own": [i]}
            for i in range(4)]
    lines = [json.dumps(row, ensure_ascii=i == 1) for i, row in enumerate(rows)]
    path = tmp_path / RECORDINGS
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n", encoding="utf-8")
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", sound(2.0, 0.8, i), RATE, subtype="PCM_16")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def fault(call: Any, *args: Any) -> str:
    with pytest.raises(Fault) as caught:
        call(*args)
    return caught.value.kind


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def test_an_edit_changes_its_own_line_only_and_undo_brings_every_byte_back(recordings: Path):
    versions = [recordings.read_bytes()]
    for edit in (lambda: edit_recordings.set_text(recordings, "r1", " አዲስ \n ጽሑፍ"),
                 lambda: edit_recordings.leave_out(recordings, "r0"),
                 lambda: edit_recordings.split(recordings, "r2", 0.8, ["አንድ", "ሁለት"]),
                 lambda: edit_recordings.join_next(recordings, "r1"),
                 lambda: edit_recordings.add(recordings, recordings.parent / "3.wav", "ሦስት", "c")):
        edit()
        versions.append(recordings.read_bytes())
    texts = [(row["text"], row["speaker"]) for row in rows_of(recordings)]
    assert texts == [("አዲስ ጽሑፍ አንድ", "a"), ("ሁለት", "a"), ("ሰላም 3", "b"), ("ሦስት", "c")]
    assert versions[-1].split(b"\n")[2] == versions[0].split(b"\n")[4], "another row's line was written anew"
    for version in reversed(versions[:-1]):
        edit_recordings.undo(recordings)
        assert recordings.read_bytes() == version
    assert fault(edit_recordings.undo, recordings) == "nothing_to_undo"


def test_split_and_joined_sounds_are_those_of_the_recordings_sample_by_sample(recordings: Path):
    before = {path.name: path.read_bytes() for path in recordings.parent.glob("*.wav")}
    first, second = edit_recordings.split(recordings, "r0", 0.75, ["አንድ", "ሁለት"])
    rows = {row["id"]: row for row in rows_of(recordings)}
    parts = [soundfile.read(recordings.parent / rows[name]["audio"], dtype="int16")[0] for name in (first, second)]
    whole, _ = soundfile.read(recordings.parent / "0.wav", dtype="int16")
    assert np.array_equal(np.concatenate(parts), whole) and len(parts[0]) == 0.75 * RATE
    assert [rows[name]["duration"] for name in (first, second)] == [0.75, 1.25] and rows[first]["own"] == [0]

    joined = edit_recordings.join_next(recordings, first)
    row, = [row for row in rows_of(recordings) if row["id"] == joined]
    assert row["text"] == "አንድ ሁለት" and row["duration"] == 2.0
    assert np.array_equal(soundfile.read(recordings.parent / row["audio"], dtype="int16")[0], whole)
    assert {path.name: path.read_bytes() for path in recordings.parent.glob("*.wav")} == before


def test_a_cut_is_moved_into_the_pause_nearby(recordings: Path):
    assert 0.7 <= edit_recordings.quiet_place(recordings.parent / "0.wav", 1.1) <= 0.9


@pytest.mark.parametrize(("edit", "kind"), [
    (lambda path: edit_recordings.set_text(path, "r0", " \n"), "no_text"),
    (lambda path: edit_recordings.set_text(path, "r0", "ሀ", "another text"), "changed"),
    (lambda path: edit_recordings.set_text(path, "r", "ሀ"), "no_row"),
    (lambda path: edit_recordings.split(path, "r0", 1.95, ["ሀ", "ለ"]), "too_short"),
    (lambda path: edit_recordings.split(path, "r0", float("nan"), ["ሀ", "ለ"]), "too_short"),
    (lambda path: edit_recordings.split(path, "r0", 1, ["ሀ"]), "two_texts"),
    (lambda path: edit_recordings.join_next(path, "r2"), "not_alike"),
    (lambda path: edit_recordings.join_next(path, "r3"), "no_next"),
    (lambda path: edit_recordings.undo(path), "nothing_to_undo"),
    (lambda path: edit_recordings.undo(path.with_name("none.jsonl")), "no_file")])
def test_an_edit_that_makes_no_sense_is_refused_and_changes_nothing(recordings: Path, edit: Any, kind: str):
    before = recordings.read_bytes()
    assert fault(edit, recordings) == kind
    assert recordings.read_bytes() == before


def test_a_row_whose_sound_lies_elsewhere_is_not_cut(recordings: Path):
    recordings.write_text(recordings.read_text().replace("0.wav", "../0.wav"))
    with pytest.raises(ToolError, match="leads out of"):
        edit_recordings.split(recordings, "r0", 1, ["ሀ", "ለ"])


KILLED = """
import os, signal, sys
from pathlib import Path
from tools import edit_recordings
real, calls = os.replace, []
def replace(*paths):
    if sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
edit_recordings.leave_out(Path(sys.argv[1]), "r0")
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_within_an_edit_loses_no_row_and_the_edit_can_be_made_again_or_taken_back(recordings: Path, moment: str):
    before = recordings.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(recordings), moment], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    if moment == "before":
        assert recordings.read_bytes() == before and edit_recordings.last_edit_is_missing(recordings)
        assert fault(edit_recordings.undo, recordings) == "written_anew"
        assert edit_recordings.again(recordings) == 1
    assert [row["id"] for row in rows_of(recordings)] == ["r1", "r2", "r3"]
    edit_recordings.undo(recordings)
    assert recordings.read_bytes() == before


def test_a_torn_line_of_the_log_harms_nothing(recordings: Path):
    edit_recordings.set_text(recordings, "r0", "ሀ")
    log = edit_recordings.log_path(recordings)
    log.write_bytes(log.read_bytes() + b'{"action":"tex')
    edit_recordings.set_text(recordings, "r0", "ለ")
    edit_recordings.undo(recordings)
    assert rows_of(recordings)[0]["text"] == "ሀ"
    edit_recordings.undo(recordings)
    assert rows_of(recordings)[0]["text"] == "ሰላም 0"


def test_edits_are_made_again_on_a_file_that_was_written_anew(recordings: Path):
    original = recordings.read_bytes()
    edit_recordings.set_text(recordings, "r3", "ሀ")
    edit_recordings.set_text(recordings, "r3", "ለ")
    edit_recordings.leave_out(recordings, "r0")
    edited = recordings.read_bytes()
    assert not edit_recordings.last_edit_is_missing(recordings) and edit_recordings.again(recordings) == 0
    recordings.write_bytes(original)  # as another import does
    assert edit_recordings.last_edit_is_missing(recordings)
    assert edit_recordings.again(recordings) == 3 and recordings.read_bytes() == edited


def test_nobody_edits_while_a_program_works_in_the_folder(recordings: Path):
    holder = ("import fcntl, sys, time\nhandle = open(sys.argv[1], 'w')\nfcntl.lockf(handle, fcntl.LOCK_EX)\n"
              "handle.write('filter_dataset'); handle.flush()\nprint('held', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", holder, str(recordings.parent / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline()
        assert fault(edit_recordings.leave_out, recordings, "r0") == "in_use"
    finally:
        process.kill()
        process.communicate()


def test_two_editors_at_once_lose_nothing(recordings: Path):
    code = ("import sys; from pathlib import Path; from tools import edit_recordings\n"
            "for i in range(15): edit_recordings.set_text(Path(sys.argv[1]), sys.argv[2], f'{sys.argv[2]} {i}')")
    both = [subprocess.Popen([sys.executable, "-c", code, str(recordings), name], cwd=ROOT) for name in ("r0", "r3")]
    assert [process.wait() for process in both] == [0, 0]
    assert [row["text"] for row in rows_of(recordings)][::3] == ["r0 14", "r3 14"]
    for _ in range(30):
        edit_recordings.undo(recordings)
    assert [row["text"] for row in rows_of(recordings)][::3] == ["ሰላም 0", "ሰላም 3"]


def test_the_program_edits_from_the_command_line_without_torch(recordings: Path):
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tools.edit_recordings", str(recordings), *args], cwd=ROOT,
                              capture_output=True, text=True)

    assert "r0: split into r0-1 and r0-2" in run("--id", "r0", "--split-at", "1", "--texts", "ሀ", "ለ").stdout
    assert run("--undo").stdout == "[Info] taken back: split\n"
    failed = run("--leave-out")
    assert failed.returncode == 1 and failed.stderr == "[Error] --leave-out: --id must be given too\n"
    code = "import sys, webui.clip_rows, webui.takes\nprint({'torch', 'trainers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------------------
# Pages of rows, pictures


def test_rows_are_shown_in_pages_found_by_text_and_keep_their_line_numbers(recordings: Path):
    version = Version.of(recordings)
    assert [clip.number for clip in clip_rows.clips(version, "", 0)] == [1, 2, 4, 5]
    assert [clip.text("id") for clip in clip_rows.clips(version, "ሰላም 1", 0)] == ["r1"], "an escaped text is found too"
    assert clip_rows.count(version, "nothing") == 0 and clip_rows.clips(version, "nothing", 0) == []
    assert clip_rows.place_of(version, "", "r3") == 3 and clip_rows.place_of(version, "", "r9") is None
    assert clip_rows.clips(version, "", 0, 1)[0].seconds == 2.0


def test_a_data_set_of_100_000_rows_is_turned_over_searched_and_edited_quickly(tmp_path: Path):
    path = tmp_path / RECORDINGS
    path.write_text("".join(f'{{"id":"r{i}","text":"ጽሑፍ ቁጥር {i}","audio":"{i}.wav","duration":1}}\n'
                            for i in range(100_000)))
    started = time.process_time()
    version = Version.of(path)
    assert clip_rows.count(version, "") == 100_000
    assert len(clip_rows.clips(version, "", 99_000)) == ON_A_PAGE
    assert [clip.text("id") for clip in clip_rows.clips(version, "ቁጥር 77777", 0)] == ["r77777"]
    edit_recordings.set_text(path, "r99999", "ሌላ")
    assert clip_rows.place_of(Version.of(path), "", "r99999", 99_999) == 99_999
    assert time.process_time() - started < 5


def test_a_picture_of_a_clip_shows_its_pause_and_none_is_drawn_of_what_is_no_sound(recordings: Path):
    bars, seconds = clip_rows.peaks(Version.of(recordings.parent / "0.wav"))
    assert seconds == 2.0 and min(bars[:70]) > 0.5 and max(bars[86:106]) == 0
    assert clip_rows.picture(recordings) == "" and clip_rows.picture(None) == ""
    assert 'data-seconds="2.0000"' in clip_rows.picture(recordings.parent / "0.wav")


# ---------------------------------------------------------------------------------------------------------------------
# Recording


def test_a_recording_is_kept_as_a_row_under_a_name_of_its_own(tmp_path: Path):
    path, source = tmp_path / "voice" / RECORDINGS, tmp_path / "take.wav"
    soundfile.write(source, sound(), RATE, subtype="PCM_16")
    assert [edit_recordings.add(path, source, text) for text in ("አንድ", "ሁለት")] == ["recorded-0001", "recorded-0002"]
    edit_recordings.undo(path)
    assert edit_recordings.add(path, source, "ሦስት", "almaz") == "recorded-0003", "no sound is written over"
    assert [row["text"] for row in rows_of(path)] == ["አንድ", "ሦስት"]
    assert (path.parent / rows_of(path)[1]["audio"]).read_bytes() == source.read_bytes()


def test_sentences_that_are_recorded_or_skipped_do_not_come_again(tmp_path: Path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "ሀ"}\n\n{"text": "ለ"}\n{"text": "ሀ"}\nno json\n{"text": "ሐ"}\n')
    listed = recorded_texts.sentences(Version.of(texts))
    assert listed == ("ሀ", "ለ", "ሐ")
    assert recorded_texts.next_sentence(listed, {"ሀ"}, {"ለ"}) == "ሐ"
    assert recorded_texts.next_sentence(listed, {"ሀ", "ሐ"}, {"ለ"}) == ""


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, "good"), (0.01, "quiet"), (2.0, "loud")])
def test_the_level_of_a_recording_is_judged(tmp_path: Path, gain: float, verdict: str):
    soundfile.write(tmp_path / "a.wav", np.clip(sound() * gain, -1, 1), RATE, subtype="PCM_16")
    assert recorded_texts.loudness(tmp_path / "a.wav").verdict == verdict


# ---------------------------------------------------------------------------------------------------------------------
# Zip archives


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "workspace")


def wav_bytes() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(0.3), RATE, subtype="PCM_16", format="WAV")
    return buffer.getvalue()


def zipped(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, target in (links or {}).items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, target)
    return path


def test_a_zip_archive_is_unpacked_folders_and_all_judged_by_content_and_nothing_is_written_over(
        workspace: Workspace, tmp_path: Path):
    archive = zipped(tmp_path / "a.zip", {
        "set/wavs/1.wav": wav_bytes(), "set/metadata.csv": "1|ሰላም\n".encode(), "set/page.wav": b"<html>",
        "set/run.sh": b"rm -rf", "__MACOSX/set/._1.wav": b"x", "set/.hidden.wav": wav_bytes(), "../out.csv": b"1|a",
        "/root.csv": b"1|a", "set/../../up.csv": b"1|a", "c:/drive.csv": b"1|a", "back\\slash.csv": b"1|a"},
        {"set/link.csv": "/etc/passwd"})
    folder = workspace.root / "recordings"
    (folder / "set").mkdir(parents=True)
    (folder / "set/metadata.csv").write_text("mine")
    found = unpack(workspace, archive, "recordings", (*AUDIO, *TRANSCRIPTS), 200)
    assert (found.taken, found.there) == (["set/wavs/1.wav", "back\\slash.csv"], ["set/metadata.csv"])
    assert sorted(found.passed_over) == ["/root.csv", "c:/drive.csv", "set/link.csv", "set/page.wav", "set/run.sh"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file()) == [
        "a.zip", "workspace/recordings/back/slash.csv", "workspace/recordings/set/metadata.csv",
        "workspace/recordings/set/wavs/1.wav"]
    assert (folder / "set/metadata.csv").read_text() == "mine"


def test_a_zip_archive_that_swells_is_refused_and_leaves_no_part(workspace: Workspace, tmp_path: Path):
    archive = zipped(tmp_path / "bomb.zip", {"a.txt": b"a" * 60_000_000})
    assert archive.stat().st_size < 100_000
    with pytest.raises(Refused) as caught:
        unpack(workspace, archive, "recordings", (*AUDIO, *TRANSCRIPTS), 200)
    assert caught.value.key == "zip_too_large" and not [*workspace.root.rglob("*.txt")]


def test_what_is_no_zip_archive_is_said(workspace: Workspace, tmp_path: Path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(Refused) as caught:
        unpack(workspace, tmp_path / "a.zip", "recordings", AUDIO, 200)
    assert caught.value.key == "zip_damaged"


# ---------------------------------------------------------------------------------------------------------------------
# Links


def test_only_links_that_the_page_made_lead_to_files_and_only_to_those_of_the_workspace(workspace: Workspace,
                                                                                        tmp_path: Path):
    sound_file, page = workspace.root / "ድምፅ ?#%.wav", workspace.root / "a.html"
    sound_file.write_bytes(wav_bytes())
    page.write_text("<script>alert(1)</script>")
    (tmp_path / "outside.wav").write_bytes(b"x")
    os.symlink(tmp_path / "outside.wav", workspace.root / "link.wav")
    client = TestClient(Starlette(routes=[served_files.route(workspace, "secret")]))
    link = served_files.link_to(workspace, "secret", sound_file)
    answer = client.get("/" + link, headers={"Range": "bytes=0-3"})
    assert answer.status_code == 206 and answer.content == b"RIFF" and answer.headers["content-type"] == "audio/wav"
    answer = client.get("/" + served_files.link_to(workspace, "secret", page))
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    for path in (workspace.root / "link.wav", workspace.private / "secret.json", tmp_path / "outside.wav",
                 workspace.root / "none.wav"):
        assert served_files.link_to(workspace, "secret", path) == ""
    mark = link.split("/")[1]
    forged = served_files.signature("other", "a.html")
    for path in (f"made/{mark}/a.html", f"made/{forged}/a.html", "made//a.html",
                 f"made/{served_files.signature('secret', 'link.wav')}/link.wav",
                 f"made/{served_files.signature('secret', '.webui/auth.json')}/.webui/auth.json"):
        assert client.get("/" + path).status_code == 404


def test_a_link_needs_the_login_of_a_page_that_has_one(workspace: Workspace):
    (workspace.root / "a.wav").write_bytes(wav_bytes())
    app: Any = Starlette(routes=[served_files.route(workspace, "secret")])
    app.auth, app.cookie_id, app.tokens = {"almaz": "secret"}, "x", {"good": "almaz"}
    link = "/" + served_files.link_to(workspace, "secret", workspace.root / "a.wav")
    assert TestClient(app).get(link).status_code == 401
    assert TestClient(app, cookies={"access-token-x": "bad"}).get(link).status_code == 401
    assert TestClient(app, cookies={"access-token-unsecure-x": "good"}).get(link).status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# Takes and evaluations


def finished_job(workspace: Workspace, number: int, kind: str, form: dict[str, Any]) -> None:
    """What a job leaves behind that has ended well."""
    folder = workspace.private / "jobs" / f"20260101-000000-{number:06}-abcd"
    folder.mkdir(parents=True)
    output = command_lines.output_of(kind, form, workspace)
    (folder / "job.json").write_text(json.dumps({
        "kind": kind, "title": kind, "argv": command_lines.command_for(kind, form, workspace), "cwd": "/",
        "created": 1.7e9 + number, "output_dir": str(output)}))
    (folder / "process.json").write_text('{"program_pid": 1, "boot_id": "gone"}')
    (folder / "exit.json").write_text('{"status": 0, "ended": 1, "last_exit": {}}')


def spoken(workspace: Workspace) -> None:
    """Two takes of one checkpoint, one of them written over by the other, and two checkpoints side by side."""
    for name in ("listen/001.wav", "listen/002.wav", "listen/ab_001/a.wav", "listen/ab_001/b.wav"):
        (workspace.root / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.root / name).write_bytes(wav_bytes())
    form = {"checkpoint": "run/best.pth", "prompt": "p.wav", "text": "ሰላም <b>ለዓለም</b>"}
    for number, output in enumerate(("001", "001", "002")):
        finished_job(workspace, number, "synthesize", {**form, "output": f"listen/{output}.wav", "seed": number})
    finished_job(workspace, 3, "compare", {**form, "other": "run/latest.pth", "output_dir": "listen/ab_001"})


def test_takes_are_listed_newest_first_with_text_checkpoint_and_players(workspace: Workspace):
    spoken(workspace)
    found = takes.takes_of(jobs.list_jobs(workspace), workspace)
    assert [[workspace.show(path) for _, path in take.sounds] for take in found] == [
        ["listen/ab_001/a.wav", "listen/ab_001/b.wav"], ["listen/002.wav"], ["listen/001.wav"]]
    assert found[0].sounds[1][0] == "run/latest.pth" and found[0].text == "ሰላም <b>ለዓለም</b>"
    (workspace.root / "listen/002.wav").unlink()
    shown = takes.takes_html(found, lambda path: served_files.link_to(workspace, "secret", path), workspace, "en")
    assert shown.count("<audio") == 3 and "A: run/best.pth" in shown and "B: run/latest.pth" in shown
    assert "<b>" not in shown and "&lt;b&gt;ለዓለም" in shown


def test_an_evaluation_is_shown_worst_first_with_what_can_be_heard(workspace: Workspace):
    folder = workspace.root / "evaluation"
    folder.mkdir()
    for name in ("0001.wav", "0001_codec.wav", "0002.wav"):
        (folder / name).write_bytes(wav_bytes())
    rows = [{"name": f"000{i}", "text": f"<i>ሰላም {i}", "recording": "/etc/passwd", "synthesis": "ሰላ", "mcd": None,
             "rank": 1, "candidates": 12, "cer": {"synthesis": cer, "round_trip": 0.0}}
            for i, cer in ((1, 0.1), (2, 0.5), (3, None))]
    (folder / "results.json").write_text(json.dumps({"rows": rows, "checkpoint": "a.pth", "step": 3, "mcd": None,
                                                     "synthesis": {"texts": 3, "cer": 0.3}}))
    shown = takes.evaluation_html(folder, lambda path: served_files.link_to(workspace, "secret", path), "en")
    assert [shown.index(f"ሰላም {i}") for i in (3, 2, 1)] == sorted(shown.index(f"ሰላም {i}") for i in (1, 2, 3))
    assert shown.count("<audio") == 3 and "passwd" not in shown and "<i>" not in shown and "CER 0.500" in shown
    (folder / "results.json").write_text("[]")
    assert takes.evaluation_html(folder, str, "en") == ""


def test_what_was_exported_last_can_be_downloaded(workspace: Workspace):
    (workspace.root / "out/voice").mkdir(parents=True)
    (workspace.root / "out/gpt.pth").write_bytes(b"x")
    (workspace.root / "out/voice/gpt.pth").write_bytes(b"x")
    finished_job(workspace, 1, "export", {"checkpoint": "run/best.pth", "output": "out/gpt.pth"})
    assert takes.exported(jobs.list_jobs(workspace)) == [workspace.root / "out/gpt.pth"]
    finished_job(workspace, 2, "export_folder", {"checkpoint": "run/best.pth", "model_dir": "m",
                                                 "output_dir": "out/voice"})
    paths = takes.exported(jobs.list_jobs(workspace))
    assert paths == [workspace.root / "out/voice/gpt.pth"]
    shown = takes.download_html(paths, lambda path: served_files.link_to(workspace, "secret", path), workspace)
    assert "out/voice/gpt.pth (0.0 MB)" in shown
