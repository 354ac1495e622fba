"""The Web UI in a real browser: whatever is closed, reloaded or killed, a run goes on and the page finds it again.

Pictures of all tabs go to build/screenshots/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import ROOT, TOKENIZER, call_trainer, data_args, make_dataset
from visitor import PATIENCE, PICTURES, RATE, Server, Visitor, end_all_jobs, tone, until

from tools import build_pairs, preprocess, speech_codec
from webui import command_lines, jobs, pipeline
from webui.texts import TEXTS
from webui.workspace import MESSAGES, Workspace

TABS = ("1 Recordings", "2 Dataset", "3-5 Prepare", "6 Training", "7 Checkpoints", "8 Listen")
pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="jobs are found through /proc")]


# ---------------------------------------------------------------------------------------------------------------------
# A workspace, servers, visitors


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data, eight recordings, a codec of 64 codes, and "voice", a run of four steps."""
    root = tmp_path_factory.mktemp("workspace")
    data = make_dataset(root / "data")
    (root / "tokenizers").mkdir()
    shutil.copy(TOKENIZER, root / "tokenizers")
    (root / "recordings").mkdir()
    rows = []
    for index in range(8):
        soundfile.write(root / "recordings" / f"r{index}.wav", tone(index), RATE, subtype="PCM_16")
        rows.append({"id": f"r{index}", "speaker": "s", "text": "ሰላም ቤት" + " ውሃ" * index, "audio": f"r{index}.wav"})
    dataset = root / "recordings" / "recordings.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    speech_codec.main(["train", "--recordings", str(dataset), "--output", str(root / "codec.pt"), "--steps", "3",
                       "--num-codes", "64", "--pca-dim", "8", "--kmeans-iterations", "2", "--width", "16",
                       "--batch-size", "4", "--segment", "8"])
    call_trainer(*data_args(data), "--output-dir", root / "voice", "--max-steps", 4, "--save-interval", 2,
                 "--log-interval", 1, "--val-interval", 2)
    return root


@pytest.fixture(scope="module")
def server(workspace: Path) -> Iterator[Server]:
    server = Server(workspace)
    yield server
    server.end()


@pytest.fixture(autouse=True)
def no_jobs_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "workspace" in request.fixturenames:
        end_all_jobs(request.getfixturevalue("workspace"))


@pytest.fixture(scope="module")
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    """One for most tests: loading the page anew costs seconds."""
    visitor = Visitor(browser, server)
    yield visitor
    visitor.leave()


@pytest.fixture
def newcomer(browser: Any, server: Server) -> Iterator[Visitor]:
    visitor = Visitor(browser, server)
    yield visitor
    visitor.leave()


def fill_training(visitor: Visitor, output_dir: str, resume: bool = False, **values: object) -> None:
    """Tab 6 with the tiny data: a line every step, a checkpoint every ten, until it is stopped."""
    visitor.open("Training")
    visitor.fill("training", train_manifests="data/train_pairs.jsonl", val_manifests="data/val_pairs.jsonl",
                 tokenizer="tokenizers/amharic_extended_bpe.model", output_dir=output_dir, epochs=1_000_000,
                 batch_size=32, resume_path="")
    visitor.set_resume(resume)
    visitor.more_settings()
    visitor.fill("training", log_interval=1, save_interval=10, val_interval=5, **{"max_steps": "", **values})
    visitor.command("training", f"{output_dir} ", "--val-interval 5")


def logged(output_dir: Path) -> list[dict[str, Any]]:
    lines = [line for path in output_dir.glob("logs/run_*/metrics.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def steps_logged(output_dir: Path, kind: str = "train") -> list[int]:
    return [line["step"] for line in logged(output_dir) if line["kind"] == kind]


# ---------------------------------------------------------------------------------------------------------------------
# Tab 6


def test_a_newcomer_starts_stops_resumes_and_finishes_a_run(visitor: Visitor, workspace: Path):
    fill_training(visitor, "walk")
    visitor.sees("#training-resume-state", "A new run will be started")
    visitor.page.get_by_role("button", name="Start Training").click()
    visitor.reads("training-log", r"\[Train\] .*step=5 ")
    visitor.sees("#training-status", r"running \(process \d+\)")
    visitor.sees("#running", "Training walk step")
    until(lambda: visitor.points("training-mel_loss") > 5 and visitor.lines("training-mel_loss") == 2)
    visitor.sees("#training-memory", "this run")
    visitor.click("training-stop")
    step = int(re.search(r"stopped at step (\d+), can be resumed", visitor.sees(
        "#training-status", "can be resumed"))[1])  # type: ignore[index]
    assert json.loads((workspace / "walk" / "last_exit.json").read_text())["step"] == step

    # Start goes on with the run unless told otherwise.
    assert visitor.page.get_by_role("checkbox", name="Resume from checkpoint").is_checked()
    visitor.set_resume(False)
    visitor.sees("#training-output_dir.problem", "already holds checkpoints")
    visitor.click("training-start")
    visitor.sees(".notice", "Not started")
    visitor.set_resume(True)
    told = visitor.sees("#training-resume-state", "Will resume from walk/latest.pth")
    assert f"step {step}, epoch" in told and "verified" in told and re.search(r"loss \d+\.\d{4}", told)
    visitor.fill("training", max_steps=step + 12)
    visitor.command("training", f"--max-steps {step + 12}", "--resume auto")
    visitor.click("training-start")
    visitor.sees("#training-status", f"finished at step {step + 12}")
    assert f"Step: {step}\n" in visitor.reads("training-log", "Training complete")
    steps = steps_logged(workspace / "walk")
    assert steps == list(range(1, step + 13))
    until(lambda: visitor.points("training-mel_loss") == len(steps) + len(steps_logged(workspace / "walk", "val")))


def test_a_run_is_found_after_a_reload_in_another_browser_and_after_the_server_was_killed(
        browser: Any, workspace: Path, server: Server):
    first = Visitor(browser, server)
    fill_training(first, "long")
    first.click("training-start")
    first.reads("training-log", r"step=3 ")
    job = jobs.list_jobs(Workspace.open(workspace))[0]

    first.page.reload()
    first.sees("#training-status", f"running \\(process {job.pid}\\)")
    assert first.box("training-output_dir").input_value() == "long"

    second = Visitor(browser, server)
    second.open("Training")
    assert second.reads("training-output_dir", "long") and second.reads("training-epochs", "1000000")
    second.sees("#training-status", f"running \\(process {job.pid}\\)")
    second.click("training-start")
    second.sees(".notice", "long is in use by “training long”.*process")
    second.leave()

    first.page.evaluate("window.old = true")
    server.end(signal.SIGKILL)
    before = steps_logged(workspace / "long")[-1]
    until(lambda: steps_logged(workspace / "long")[-1] > before + 5)
    server.start()
    first.page.wait_for_function("window.old === undefined")  # the page comes back by itself
    first.sees("#training-status", f"running \\(process {job.pid}\\)")
    first.click("training-stop")
    first.sees("#training-status", "stopped at step")
    steps = steps_logged(workspace / "long")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > before + 5
    log = [int(step) for step in re.findall(r"^\[Train\] .* step=(\d+) ", job.log.read_text(), re.MULTILINE)]
    assert log == steps
    shown = [int(step) for step in re.findall(r"\[Train\] .* step=(\d+) ", first.reads("training-log", "Saved"))]
    assert shown == steps[-len(shown):] and len(shown) > 5
    curve = len(steps) + len(steps_logged(workspace / "long", "val"))
    if len(steps) <= 500:
        until(lambda: first.points("training-mel_loss") == curve)
    else:
        until(lambda: 500 <= first.points("training-mel_loss") <= 1000)
    first.leave()


def test_a_damaged_checkpoint_is_named_with_what_to_do(visitor: Visitor, workspace: Path):
    shutil.copytree(workspace / "voice", workspace / "damaged")
    newest = workspace / "damaged" / "model_step4.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    for name in ("model_step4.pth", "latest.pth"):
        (workspace / "damaged" / name).unlink()
        (workspace / "damaged" / name).write_bytes(content)
    fill_training(visitor, "damaged", resume=True)
    told = visitor.sees("#training-resume-state", "Will resume from damaged/model_step2.pth: step 2")
    assert re.search(r"Passed over, not usable: model_step4\.pth \(.*damaged", told)
    visitor.fill("training", resume_path="damaged/model_step4.pth")
    told = visitor.sees("#training-resume_path.problem", "cannot be used")
    assert "Choose another checkpoint" in told and "damaged" in told
    visitor.click("training-start")
    visitor.sees(".notice", "Not started")
    visitor.box("training-pick").click()
    visitor.page.get_by_role("option", name=re.compile("model_step2.pth: step 2")).click()
    visitor.command("training", "--resume", "damaged/model_step2.pth")
    visitor.sees("#training-resume-state", "Will resume from damaged/model_step2.pth: step 2")
    assert visitor.page.locator("#training-resume_path.problem").count() == 0


def test_start_goes_back_once_and_from_then_on_goes_on_with_the_run(visitor: Visitor, workspace: Path):
    shutil.copytree(workspace / "voice", workspace / "back")
    fill_training(visitor, "back", resume=True, max_steps=6)
    visitor.fill("training", resume_path="back/model_step2.pth")
    told = visitor.sees("#training-resume-state", "Will resume from back/model_step2.pth: step 2")
    assert "later checkpoints, up to step 4, will be moved" in told
    visitor.click("training-start")
    visitor.sees("#training-status", "finished at step 6")
    assert visitor.box("training-resume_path").input_value() == ""
    visitor.command("training", "--output-dir", "--resume auto")


def test_the_next_run_waits_in_a_list_and_starts_when_the_first_has_ended(visitor: Visitor, workspace: Path):
    add, listed = (visitor.page.locator(selector) for selector in ("#training-queue-add", "#training-queue li"))
    fill_training(visitor, "first")
    assert not add.is_visible()
    visitor.click("training-start")
    add.click()
    visitor.sees(".notice", "first is in use by “training first”")
    visitor.fill("training", output_dir="second", max_steps="many")
    add.click()
    visitor.sees("#training-max_steps.problem", "many is not a number")
    visitor.fill("training", max_steps=3)
    for name in ("second", "third"):
        visitor.fill("training", output_dir=name)
        visitor.command("training", f"{name} ", "--max-steps 3")
        add.click()
        visitor.sees("#training-status.state-waiting", f"{name}: waits in the queue")
    visitor.sees("#training-queue", "second – starts when first ends.*third – starts when second ends")
    listed.filter(has_text="third").locator("[data-act=take_out]").click()
    until(lambda: listed.count() == 1)
    visitor.fill("training", output_dir="second")
    first = next(job for job in jobs.list_jobs(Workspace.open(workspace)) if job.title == "training first")
    jobs.kill_job(first)  # as the machine would: nobody has stopped it by hand
    visitor.sees("#training-status", "second: finished at step 3")
    until(lambda: listed.count() == 0 and not add.is_visible())


def test_mistakes_are_said_beside_their_field_before_anything_starts(visitor: Visitor, workspace: Path):
    fill_training(visitor, "fresh")
    before = len(jobs.list_jobs(Workspace.open(workspace)))
    visitor.fill("training", train_manifests="data/nothing.jsonl", batch_size="many", epochs="2.5")
    visitor.sees("#training-train_manifests.problem", "data/nothing.jsonl: no such file")
    visitor.sees("#training-batch_size.problem", "many is not a number")
    visitor.sees("#training-epochs.problem", "2.5 is not a whole number")
    visitor.set_resume(True)
    visitor.fill("training", resume_path="voice/model_step9.pth")
    visitor.sees("#training-resume_path.problem", "Resume checkpoint not found: voice/model_step9.pth.*model_step4.pth")
    visitor.click("training-start")
    visitor.sees(".notice", "Not started")
    assert len(jobs.list_jobs(Workspace.open(workspace))) == before
    visitor.fill("training", train_manifests="data/train_pairs.jsonl")
    until(lambda: visitor.page.locator("#training-train_manifests.problem").count() == 0)


def test_a_form_is_checked_whatever_way_what_it_is_of_has_changed(visitor: Visitor, workspace: Path):
    fill_training(visitor, "fresh")
    config = workspace / "gone.yaml"
    config.write_text("gpt: {}")
    visitor.more_settings()
    visitor.fill("training", config="gone.yaml")
    until(lambda: visitor.page.locator("#training-config.problem").count() == 0)
    visitor.open("Listen")
    config.unlink()  # and the form is opened again
    visitor.open("Training")
    visitor.sees("#training-config.problem", "gone.yaml: no such file")
    visitor.fill("training", config="")
    visitor.command("training", "--train-manifest")
    visitor.box("training-amp").click()
    time.sleep(5)  # a long look at the list, and a slow press: the browser says "click" of no place
    option = visitor.page.get_by_role("option", name="bf16").bounding_box()
    visitor.page.mouse.move(option["x"] + 5, option["y"] + 5)
    visitor.page.mouse.down()
    time.sleep(0.5)
    visitor.page.mouse.up()
    visitor.command("training", "--amp bf16")
    visitor.page.evaluate("""() => {  // typed and started at once
        const box = document.querySelector("#training-train_manifests textarea");
        box.value = "";
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }""")
    visitor.click("training-start")
    visitor.sees(".notice", "Not started")
    visitor.sees("#training-train_manifests.problem", "Choose it: tabs 1 to 5 make it")
    time.sleep(1)
    assert "Choose it" in visitor.problem("training-train_manifests")


def test_presets_and_a_settings_file_fill_the_form(visitor: Visitor, workspace: Path):
    fill_training(visitor, "fresh")
    visitor.box("training-preset").click()
    visitor.page.get_by_role("option", name="GPU 16 GB").click()
    visitor.command("training", "--batch-size 4", "--grad-accumulation 8", "--amp", "--grad-checkpointing")
    visitor.fill("training", batch_size=5)
    for element in ("training-preset", "training-pick"):  # what merely loses the focus changes nothing
        visitor.page.locator(f"#{element} input").focus()
        visitor.page.keyboard.press("Tab")
    time.sleep(1)
    assert "--batch-size 5" in visitor.command("training", "--grad-accumulation 8")
    assert not visitor.page.get_by_role("checkbox", name="Resume from checkpoint").is_checked()
    visitor.page.locator("#training-preset input").focus()
    visitor.page.keyboard.press("ArrowUp")  # GPU 24 GB
    visitor.page.keyboard.press("Enter")
    visitor.command("training", "--batch-size 8", "--grad-accumulation 4")
    visitor.fill("training", batch_size=4)
    visitor.fill("training", epochs=7)
    visitor.box("training-file").fill("settings/mine")
    visitor.click("training-save")
    visitor.sees(".notice", "Saved as settings/mine.json")
    visitor.fill("training", epochs=9, batch_size="")
    visitor.command("training", "--epochs 9")
    visitor.click("training-load")
    assert "--batch-size 4" in visitor.command("training", "--epochs 7")
    visitor.box("training-file").fill("data/config.yaml")
    visitor.click("training-save")
    visitor.sees(".notice", "data/config.yaml.json")
    visitor.box("training-file").fill("../mine.json")
    visitor.click("training-load")
    visitor.sees(".notice", "outside the workspace")


# ---------------------------------------------------------------------------------------------------------------------
# The other tabs


def test_a_tokenizer_is_trained_and_handed_on_to_the_next_steps(visitor: Visitor, workspace: Path):
    visitor.open("Training")
    visitor.fill("training", tokenizer="")  # what is there is not replaced
    visitor.open("Tokenizer")
    assert visitor.reads("tokenizer-texts", "recordings/recordings.jsonl")
    visitor.fill("tokenizer", output="tokenizers/new.model")
    visitor.command("tokenizer", "tokenizers/new.model")
    visitor.click("tokenizer-start")
    visitor.sees("#tokenizer-status", "finished")
    assert (workspace / "tokenizers" / "new.model").stat().st_size > 1000
    visitor.open("Preprocess")
    visitor.reads("preprocess-tokenizer", "tokenizers/new.model")
    visitor.open("Training")
    visitor.reads("training-tokenizer", "tokenizers/new.model")
    (workspace / "tokenizers" / "new.model").unlink()


def test_what_one_step_of_a_tab_makes_the_next_step_takes(visitor: Visitor, workspace: Path):
    visitor.open("Preprocess")
    visitor.more_settings()
    visitor.fill("codec", recordings="recordings/recordings.jsonl", output="made/codec.pt", steps=1, num_codes=16)
    visitor.command("codec", "made/codec.pt", "--num-codes 16")
    visitor.click("codec-start")
    visitor.reads("preprocess-codec", r"^made/codec\.pt$")
    visitor.command("preprocess", "--codec", "made/codec.pt")


def test_a_checkpoint_is_chosen_in_the_table_and_speaks(visitor: Visitor, workspace: Path):
    for path in (workspace / "voice").glob("*.pth"):
        os.utime(path)  # the newest run is the first of the table
    visitor.open("Checkpoints")
    row = visitor.page.locator("#checkpoints-table tr").filter(has_text=re.compile(r"voice.*model_step4\.pth"))
    visitor.sees("#checkpoints-table tr", "voice.*model_step4.pth.*verified")
    row.locator("td").first.click()
    visitor.reads("checkpoints-chosen", "voice/model_step4.pth")
    visitor.click("checkpoints-use")
    visitor.sees(".notice", "Tab 8 now speaks with voice/model_step4.pth")
    visitor.open("Listen")
    visitor.reads("synthesize-checkpoint", "voice/model_step4.pth")
    visitor.more_settings()
    visitor.fill("synthesize", text="ሰላም ቤት", prompt="recordings/r1.wav", output="listen/hello.wav", codec="codec.pt",
                 tokenizer="tokenizers/amharic_extended_bpe.model")
    visitor.command("synthesize", "codec.pt", "--text=", "tokenizers/")
    visitor.click("synthesize-start")
    visitor.sees("#listen-status", "finished")
    picture = visitor.page.locator("#listen-result img")
    picture.wait_for()
    until(lambda: picture.evaluate("image => image.naturalWidth") > 10)
    sound = visitor.page.locator("#listen-result audio")
    assert sound.evaluate("sound => sound.play().then(() => sound.duration)") > 0.1
    assert soundfile.info(workspace / "listen" / "hello.wav").frames > 1000


def test_new_checkpoints_speak_and_the_voice_is_judged_in_numbers(visitor: Visitor, workspace: Path):
    spoken = workspace / "spoken"
    preprocess.main(["--recordings", str(workspace / "recordings" / "recordings.jsonl"), "--val-share", "0.5",
                     "--codec", str(workspace / "codec.pt"), "--tokenizer", str(TOKENIZER),
                     "--output-dir", str(spoken)])
    build_pairs.main(["--data-dir", str(spoken)])
    (workspace / "lines.txt").write_text("ሰላም\nቤት\n")
    visitor.open("Listen")
    visitor.more_settings()
    visitor.fill("watch", watch="voice", codec="codec.pt", text_file="lines.txt", prompt="recordings/r1.wav")
    visitor.click("watch-start")
    visitor.sees("#watch-status", "Spoken checkpoints.*finished")
    assert list((workspace / "voice").glob("logs/run_*/voice/events.*"))
    visitor.more_settings()
    visitor.fill("evaluate", checkpoint="voice/best.pth", data_dir="spoken", codec="codec.pt", texts="2", takes="2")
    visitor.command("evaluate", "tools.evaluate_voice", "evaluation/recogniser.pt", "--takes 2")
    visitor.click("evaluate-start")
    visitor.sees("#evaluate-status", r"Evaluation evaluation/\d+: finished")
    assert "(c) synthesis" in visitor.box("evaluate-log").input_value()


def test_a_checkpoint_is_exported_and_no_file_is_overwritten(visitor: Visitor, workspace: Path):
    visitor.open("Checkpoints")
    visitor.more_settings()
    visitor.fill("export", checkpoint="voice/best.pth", output="voice/latest.pth")
    visitor.sees("#export-output.problem", "voice/latest.pth exists already")
    visitor.fill("export", output="exported/gpt.pth")
    visitor.command("export", "tools.export_checkpoint", "exported/gpt.pth")
    visitor.click("export-start")
    visitor.sees("#checkpoints-status", "Export exported/gpt.pth: finished")
    assert 0 < (workspace / "exported" / "gpt.pth").stat().st_size < (workspace / "voice" / "best.pth").stat().st_size


def test_runs_are_compared_in_one_plot(visitor: Visitor, workspace: Path):
    for name in ("other", "third"):
        shutil.copytree(workspace / "voice" / "logs", workspace / "runs" / name / "logs")
    visitor.open("Checkpoints")
    chosen = visitor.page.locator("#checkpoints-runs input")
    for number, name in enumerate(("runs/other", "voice", "runs/third"), 1):
        chosen.fill(name)
        visitor.page.get_by_role("option", name=name).click()
        until(lambda number=number: (visitor.points("checkpoints-plot"), visitor.lines("checkpoints-plot")) == (
            2 * number, number))
    assert [key.strip(" ■") for key in visitor.page.locator(".keys .key:visible").all_inner_texts()] == [
        "runs/other", "voice", "runs/third"]


def test_a_checkpoint_is_deleted_only_after_a_question(visitor: Visitor, workspace: Path):
    shutil.copytree(workspace / "voice", workspace / "spare")
    target = workspace / "spare" / "model_step2.pth"
    visitor.open("Checkpoints")
    visitor.box("checkpoints-chosen").fill("spare/model_step2.pth")
    visitor.click("checkpoints-delete")
    visitor.sees(".notice", "Delete spare/model_step2.pth for good")
    visitor.click("checkpoints-cancel")
    visitor.page.locator("#checkpoints-yes").wait_for(state="hidden")
    assert target.exists()
    visitor.click("checkpoints-delete")
    visitor.click("checkpoints-yes")
    visitor.sees(".notice", "Deleted: spare/model_step2.pth")
    assert not target.exists() and (workspace / "spare" / "model_step4.pth").exists()


def test_recordings_are_uploaded_listed_and_limited_to_sound_files(visitor: Visitor, workspace: Path, tmp_path: Path):
    soundfile.write(tmp_path / "ሰላም.wav", tone(99), RATE)
    visitor.open("Recordings")
    visitor.fill("recordings", folder="uploads")
    visitor.sees("#recordings-count", "No recordings")
    visitor.page.locator("#recordings-upload input[type=file]").set_input_files(tmp_path / "ሰላም.wav")
    visitor.sees(".notice", "Files uploaded to uploads: 1")
    visitor.sees("#recordings-count", "Recordings and texts: 1")
    assert (workspace / "uploads" / "ሰላም.wav").read_bytes() == (tmp_path / "ሰላም.wav").read_bytes()
    (tmp_path / "page.html").write_text("<script>alert(1)</script>")
    visitor.page.locator("#recordings-upload input[type=file]").set_input_files(tmp_path / "page.html")
    visitor.sees("body", "Invalid file type|can be uploaded")
    assert [path.name for path in (workspace / "uploads").iterdir()] == ["ሰላም.wav"]


@pytest.fixture
def tidy(workspace: Path) -> Iterator[None]:
    """What a test makes is gone for the next: finished jobs hand on what they wrote."""
    jobs_before, files_before = set(workspace.glob(".webui/jobs/2*")), set(workspace.iterdir())
    yield
    for path in (set(workspace.glob(".webui/jobs/2*")) - jobs_before) | (set(workspace.iterdir()) - files_before):
        shutil.rmtree(path)


def test_a_folder_is_imported_what_it_is_is_said_and_it_is_handed_on(visitor: Visitor, workspace: Path, tidy: None):
    (workspace / "download" / "wavs").mkdir(parents=True)
    for index in range(2):
        shutil.copy(workspace / "recordings" / f"r{index}.wav", workspace / "download" / "wavs")
    (workspace / "download" / "metadata.csv").write_text("r0|ሰላም|ሰላም\nr1|ቤት|ቤት\nr2|ውሃ|ውሃ\n")
    visitor.open("Recordings")
    assert visitor.reads("import-source", "^recordings$")
    visitor.fill("import", source="download", output_dir="imported", speaker="አልማዝ በቀለ")
    visitor.command("import", "import_recordings", "download", "imported", "--speaker=አልማዝ በቀለ")
    visitor.click("import-start")
    told = visitor.sees("#import-summary", "Found: ljspeech: .*Recordings: 2, .*Left out: 1.*no such recording: 1")
    assert "speakers: 1; without text: 0" in told and "imported/recordings.jsonl" in told
    assert "ljspeech: metadata.csv" in visitor.reads("import-log", "2 recordings of 1 speaker")
    visitor.fill("import", source="recordings")
    visitor.sees("#import-output_dir.problem", "holds recordings that were not imported from this source.*imported_2")
    for tab, element in (("Tokenizer", "tokenizer-texts"), ("Preprocess", "preprocess-recordings")):
        visitor.open(tab)
        visitor.reads(element, "^imported/recordings.jsonl$")


def test_a_dataset_is_filtered_its_report_is_opened_and_it_is_handed_on(visitor: Visitor, workspace: Path,
                                                                        tidy: None):
    (workspace / "judged" / "audio").mkdir(parents=True)
    rows = [{"id": f"r{index}", "text": "ሰላም ቤት ውሃ", "audio": f"audio/r{index}.wav"} for index in range(3)]
    for index in range(2):
        shutil.copy(workspace / "recordings" / f"r{index}.wav", workspace / "judged" / "audio")
    (workspace / "judged" / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    visitor.open("Dataset")
    assert visitor.reads("filter-recordings", "^recordings/recordings.jsonl$")
    visitor.fill("filter", recordings="judged/recordings.jsonl", longest=0.1)
    visitor.sees("#filter-longest.problem", "too near")
    visitor.more_settings()
    visitor.fill("filter", longest=25, quietest=-60)
    visitor.command("filter", "tools.filter_dataset", "judged/recordings.jsonl", "--longest 25", "--quietest=-60")
    assert visitor.page.locator("#filter-report").is_disabled()
    visitor.click("filter-start")
    told = visitor.sees("#filter-summary", "Kept: [0-2]. Left out: [1-3].")
    assert "no such recording: 1" in told and "judged/rejected.jsonl" in told
    visitor.sees("#filter-status", "finished|not one recording is left")
    visitor.click("filter-report")
    report = visitor.page.frame_locator("#filter-frame iframe")
    report.get_by_role("heading", name=re.compile("[0-2] of 3 recordings kept")).wait_for()
    visitor.click("filter-close")
    visitor.page.locator("#filter-frame iframe").wait_for(state="detached")
    if "Kept: 0" not in told:
        for tab, element in (("Corpus", "collect-recordings"), ("Preprocess", "codec-recordings"),
                             ("Preprocess", "preprocess-recordings")):
            visitor.open(tab)
            visitor.reads(element, "^judged/filtered.jsonl$")


def test_own_transcripts_become_texts_for_the_tokenizer_under_a_new_name(visitor: Visitor, workspace: Path,
                                                                         tidy: None):
    visitor.open("Corpus")
    assert visitor.reads("collect-recordings", "^recordings/recordings.jsonl$")
    assert visitor.reads("collect-output", "^texts/own_001.jsonl$")
    visitor.click("collect-start")
    visitor.reads("corpus-log", "8 different texts of 8 rows")
    visitor.reads("collect-output", "^texts/own_002.jsonl$")
    visitor.fill("collect", output="texts/own_001.jsonl")
    visitor.sees("#collect-output.problem", "exists already and is left as it is")
    visitor.fill("collect", output="")
    visitor.open("Tokenizer")
    visitor.reads("tokenizer-texts", "^texts/own_001.jsonl$")


def test_what_is_made_of_a_typed_line_is_shown_with_what_cannot_be_said(visitor: Visitor):
    visitor.open("Prepare")
    visitor.unfold("Try how a text is read")
    visitor.box("normalise-input").fill("ዶ/ር አበበ ☎ Google\nሰላም")
    visitor.reads("normalise-output", "^ዶክተር አበበ Google\nሰላም$")
    told = visitor.sees("#normalise-lost", "line 1: nothing says ☎")
    assert "Latin words are kept as they are: Google" in told
    visitor.sees("#normalise-changes", "abbreviation.*ዶ/ር.*ዶክተር")
    visitor.box("normalise-input").fill("ሰላም")
    visitor.sees("#normalise-lost", "Everything in it can be said")
    visitor.page.locator("#normalise-changes").wait_for(state="hidden")


def test_a_dataset_is_checked_line_by_line(visitor: Visitor, workspace: Path):
    good = {"id": "1", "speaker": "s", "text": "ሰላም", "audio": "r0.wav"}
    lines = [good, {**good, "id": "2", "audio": "nothing.wav"}, {"id": "3", "audio": "r1.wav"},
             {**good, "id": "4", "audio": "/etc/passwd"}, good]
    (workspace / "recordings" / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + "oh\n")
    visitor.open("Dataset")
    assert visitor.reads("check-recordings", "recordings/recordings.jsonl")
    visitor.click("check-start")
    visitor.sees(".notice", "Recordings: 8, speakers: 1.*Every line is written as it should be")
    visitor.reads("check-log", "8 of 8 rows can be used: [0-9]+ for training")
    visitor.fill("check", recordings="recordings/mixed.jsonl")
    visitor.command("check", "recordings/mixed.jsonl")
    visitor.click("check-start")
    told = visitor.sees(".notice", "line 2: no such recording: nothing.wav")
    assert "line 3: without text" in told and "line 4: no such recording" in told
    assert "line 5: id '1' is that of line 1 too" in told and "line 6: not a JSON" in told


# ---------------------------------------------------------------------------------------------------------------------
# What must not happen


def test_a_child_that_logs_100_mb_swells_neither_page_nor_server(visitor: Visitor, workspace: Path, server: Server):
    visitor.open("Corpus")
    visitor.sees("#corpus-status", "Nothing has been started")
    memory = server.memory()
    code = "for i in range(10):\n for k in range(100_000): print(f'line {i}-{k} ' + 'x' * 90)\nprint('last line')"
    job = jobs.start_job(Workspace.open(workspace), "corpus", "corpus chatty", [sys.executable, "-c", code])
    visitor.sees("#corpus-status", "finished")
    assert job.log.stat().st_size > 100_000_000
    shown = visitor.reads("corpus-log", "last line$")
    assert len(shown) <= 65_536 and len(shown.splitlines()) <= 200
    assert server.memory() - memory < 100_000_000
    shutil.rmtree(job.folder)


def test_a_program_that_does_not_react_to_stop_can_be_killed_from_the_page(visitor: Visitor, workspace: Path):
    visitor.open("Corpus")
    code = ("import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "print('deaf', flush=True)\ntime.sleep(600)")
    job = jobs.start_job(Workspace.open(workspace), "corpus", "corpus deaf", [sys.executable, "-c", code])
    visitor.reads("corpus-log", "deaf")
    assert not visitor.page.locator("#corpus-kill").is_visible()
    visitor.click("corpus-stop")
    visitor.sees("#corpus-status", "stopping")
    visitor.click("corpus-kill")
    visitor.sees("#corpus-status", "SIGKILL")
    visitor.page.locator("#corpus-kill").wait_for(state="hidden")
    shutil.rmtree(job.folder)


PATH_TYPES = (*command_lines.PATHS, "manifests")
OUTSIDE = "../../outside.wav"


def test_no_form_of_any_tab_starts_with_a_path_that_leads_out_of_the_workspace(visitor: Visitor, workspace: Path):
    """A field of each form; of every field: test_no_field_leads_out_of_the_workspace."""
    before = len(jobs.list_jobs(Workspace.open(workspace)))
    tried = set()
    for step, tab in zip(pipeline.STEPS, TABS, strict=True):
        visitor.open(tab.partition(" ")[2])
        visitor.more_settings()
        kinds = [kind for kind, own in pipeline.STEP_OF.items() if own == step]
        if "compare" in kinds:
            visitor.unfold("A/B: two checkpoints say the same text")
        visitor.more_settings()  # a fold within a fold is there once the outer one is open
        names = {kind: next(field.name for field in command_lines.PROGRAMS[kind].fields if field.type in PATH_TYPES)
                 for kind in kinds}
        was = {kind: visitor.box(f"{kind}-{name}").input_value() for kind, name in names.items()}
        for kind, name in names.items():
            visitor.fill(kind, **{name: OUTSIDE})
        for kind, name in names.items():
            visitor.sees(f"#{kind}-{name}.problem", "outside the workspace")
            visitor.click(f"{kind}-start")
            visitor.command(kind, "(mend the marked fields first)")
            tried.add(kind)
        visitor.sees(".notice", "Not started")
        for kind, name in names.items():
            visitor.fill(kind, **{name: was[kind]})
    assert tried == set(pipeline.STEP_OF) and len(jobs.list_jobs(Workspace.open(workspace))) == before


def test_no_other_box_and_no_route_leads_out_of_the_workspace(visitor: Visitor, workspace: Path, server: Server):
    visitor.open("Recordings")
    visitor.fill("recordings", folder="/etc")
    visitor.sees("#recordings-folder.problem", "outside the workspace")
    visitor.fill("recordings", folder=".webui/jobs")
    visitor.sees("#recordings-folder.problem", "hidden")
    visitor.open("Checkpoints")
    visitor.box("checkpoints-chosen").fill("/etc/passwd")
    for button in ("use", "delete"):
        visitor.click(f"checkpoints-{button}")
        visitor.sees("#checkpoints-chosen.problem", "outside the workspace")
    secret = next((workspace / ".webui").glob("*.json"))
    for path in (Path("/etc/passwd"), secret, ROOT / "README.md", workspace / "data" / "train_pairs.jsonl"):
        status, content = server.get(f"/gradio_api/file={path}")
        assert status in (403, 404) and path.read_bytes()[:20] not in content, path


def log_in(browser: Any, server: Server, user: str, password: str, seen: str) -> Any:
    """Tries to, and waits for what is then to be seen."""
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_label("username").fill(user)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()
    page.locator(seen).first.wait_for(timeout=PATIENCE)
    return page


def test_a_public_page_asks_for_a_password_that_it_made_printed_and_kept(browser: Any, tmp_path: Path):
    """And where no share link can be made, it serves and names the tunnel."""
    printed = []
    for args in (["--server-name", "0.0.0.0"], ["--share"]):
        server = Server(tmp_path, *args, GRADIO_SHARE_SERVER_ADDRESS="127.0.0.1:9")
        try:
            printed.append(re.search(r"User: (\S+) +Password: (\S+)", server.printed).group(1, 2))  # type: ignore[union-attr]
            assert server.get("/config")[0] == 401 and server.get("/gradio_api/info")[0] == 401
            if "--share" in args:
                assert f"ssh -L {server.port}:127.0.0.1:{server.port}" in server.printed
                log_in(browser, server, *printed[0], "text=/No share link could be made.*ssh -L/").close()
                log_in(browser, server, printed[0][0], "wrong", "text=/incorrect/i").close()
        finally:
            server.end()
    assert printed[0] == printed[1] and len(printed[0][1]) >= 20
    assert stat.S_IMODE((tmp_path / ".webui" / "auth.json").stat().st_mode) == 0o600


def test_the_ui_process_imports_neither_torch_nor_the_trainer(tmp_path: Path):
    code = ("import sys; from webui.whole_page import create_page; from webui.workspace import Workspace\n"
            f"import webui_amharic; create_page(Workspace.open({str(tmp_path)!r}))\n"
            "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'trainers')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Languages and looks


def visible_texts(visitor: Visitor) -> set[str]:
    """Lines, and placeholders of empty boxes, that somebody can read now."""
    found = visitor.page.evaluate("""() => {
        const empty = [...document.querySelectorAll("textarea, input")].filter(box => box.offsetParent && !box.value);
        return [...document.body.innerText.split("\\n"), ...empty.map(box => box.placeholder)];
    }""")
    return {line.strip() for line in found if line.strip()}


def serious_findings(visitor: Visitor) -> list[str]:
    """What axe-core finds on the open tab: in this theme by all its rules, in the other one of colours."""
    found = []
    for options in ("", "runOnly: ['color-contrast'], "):
        found += visitor.page.evaluate(f"""axe.run(document, {{{options}resultTypes: ['violations'], selectors: false,
            preload: false}}).then(all => all.violations.filter(one => ["serious", "critical"].includes(one.impact))
            .flatMap(one => one.nodes.map(node => `${{one.id}}: ${{node.html.slice(0, 200)}}`)))""")
        visitor.page.evaluate("document.body.classList.toggle('dark')")
    return found


def test_every_tab_is_readable_in_both_languages_and_themes_and_nothing_comes_from_elsewhere(
        newcomer: Visitor, workspace: Path):
    """Every text changes with the language, and axe-core finds nothing serious."""
    import axe_playwright_python
    visitor = newcomer
    visitor.page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    visitor.page.add_style_tag(content="* { transition: none !important; animation: none !important; }")  # no half-way
    english = {en for en, am in TEXTS.values() if en != am and "{" not in en}
    PICTURES.mkdir(parents=True, exist_ok=True)
    visitor.open("Training")
    visitor.fill("training", output_dir="voice", epochs=5)
    names = [tab.inner_text() for tab in visitor.page.get_by_role("tab").all() if tab.is_visible()]
    assert names == list(TABS)
    for tab in TABS:
        visitor.open(tab.partition(" ")[2])
        visitor.more_settings()
        assert visible_texts(visitor) & english, "the comparison below would prove nothing"
        visitor.page.screenshot(path=PICTURES / f"{tab.lower().replace(' ', '_')}.png", full_page=True)
        assert serious_findings(visitor) == []
    visitor.page.locator("#language").get_by_text("አማርኛ").click()
    visitor.sees("#heading", "የአማርኛ")
    assert visitor.page.evaluate("document.documentElement.lang") == "am"
    for step in pipeline.STEPS:
        visitor.page.get_by_role("tab", name=TEXTS[f"tab.{step}"][1]).first.click()
        until(lambda: not visible_texts(visitor) & english)
        assert serious_findings(visitor) == []
        if step == "training":
            assert visitor.box("training-epochs").input_value() == "5"
            until(lambda: visitor.lines("training-mel_loss") == 2 and visitor.lines("training-lr") == 1)
        visitor.page.screenshot(path=PICTURES / f"{step}_amharic.png", full_page=True)
    visitor.click("theme")
    dark = visitor.page.evaluate("document.body.classList.contains('dark')")
    visitor.page.reload()
    visitor.sees("#heading", "የአማርኛ")
    until(lambda: visitor.page.evaluate("document.body.classList.contains('dark')") == dark)
    assert visitor.page.evaluate("document.documentElement.lang") == "am"
    assert visitor.elsewhere == []


def test_an_idle_page_lets_the_browser_sleep_and_still_shows_what_changes(newcomer: Visitor, workspace: Path,
                                                                          tidy: None):
    newcomer.open("Recordings")
    newcomer.fill("recordings", folder="arriving")
    newcomer.sees("#recordings-count", "No recordings")
    newcomer.page.wait_for_timeout(8000)  # whoever has just done something is shown everything at once
    asked: list[str] = []
    newcomer.page.on("request", lambda request: asked.append(request.url))
    newcomer.page.wait_for_timeout(5000)
    assert asked and all(re.search(r"/changed/\w+$", url) for url in asked)
    (workspace / "arriving").mkdir()
    soundfile.write(workspace / "arriving" / "r.wav", tone(3), RATE)
    newcomer.sees("#recordings-count", "Recordings and texts: 1")


def test_a_tab_that_is_chosen_while_the_page_opens_stays_chosen(newcomer: Visitor):
    newcomer.open("Training")
    time.sleep(3)  # until the browser remembers it
    newcomer.page.reload(wait_until="commit")
    newcomer.open("Listen")
    newcomer.sees("#pipeline", "Next|Every step")
    time.sleep(6)
    assert newcomer.page.locator("#tab-listen").is_visible()
    newcomer.page.reload()
    newcomer.sees("#pipeline", "Next|Every step")
    until(lambda: not newcomer.page.locator("#tab-recordings").is_visible())  # one of the two is remembered


def test_start_is_in_reach_on_a_phone_and_nothing_runs_off_its_edge(visitor: Visitor):
    reach = """() => {
        const box = document.getElementById("training-start")?.getBoundingClientRect();
        return box?.width > 0 && box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth;
    }"""
    visitor.open("Training")
    visitor.page.evaluate("scrollTo(0, 0)")
    until(lambda: visitor.page.evaluate(reach))
    try:
        visitor.page.set_viewport_size({"width": 390, "height": 844})
        until(lambda: visitor.page.evaluate(reach))
        for tab in TABS:
            visitor.open(tab.partition(" ")[2])
            visitor.page.screenshot(path=PICTURES / f"phone_{tab.lower().replace(' ', '_')}.png", full_page=True)
            assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390, tab  # nothing runs off
        narrow = """() => [...document.querySelectorAll(".whole, .half, .third")].filter(
            field => field.offsetParent && field.offsetWidth < 200).map(field => field.id)"""
        visitor.open("Training")
        visitor.more_settings()
        assert visitor.page.evaluate(narrow) == []  # each field has a line of its own
    finally:
        visitor.page.set_viewport_size({"width": 1400, "height": 1000})


def test_the_first_questions_show_the_way_and_the_demos_data_is_offered_only_then(visitor: Visitor, workspace: Path):
    for name in ("processed_data/train_pairs.jsonl", "processed_data/val_pairs.jsonl"):
        (workspace / name).parent.mkdir(exist_ok=True)
        shutil.copy(workspace / "data" / Path(name).name, workspace / name)
    visitor.unfold("Where do you begin?")
    visitor.page.locator("#home-have").get_by_text("recordings with their texts").click()
    visitor.page.locator("#home-model").get_by_text("IndexTTS-2, released weights").click()
    told = visitor.sees("#home-way", "hf download IndexTeam/IndexTTS-2 --local-dir")
    assert "3-5 Prepare" in told and "GB in all" in told
    visitor.open("Prepare")
    visitor.reads("prepare-model_dir", "^checkpoints$")
    visitor.page.locator("#home-have").get_by_text("the demo").click()
    visitor.sees("#home-way", "preset “Demo”.*Nothing has to be downloaded")
    until(lambda: "--step-demo" in visitor.page.locator("#pipeline").inner_html())
    (workspace / ".webui" / "way.json").unlink()
    shutil.rmtree(workspace / "processed_data")


def test_one_start_prepares_a_dataset_for_training(newcomer: Visitor, workspace: Path, tidy: None):
    visitor = newcomer  # whose forms are empty
    visitor.open("Prepare")
    visitor.more_settings()
    assert visitor.reads("prepare-recordings", "^recordings/recordings.jsonl$")
    visitor.fill("prepare", output_dir="ready", codec="codec.pt", val_share="0.3", model_dir="")
    visitor.command("prepare", "tools.prepare", "--codec", "codec.pt", "--val-share 0.3")
    visitor.click("prepare-start")
    visitor.sees("#prepare-status", "Prepare ready: finished")
    assert "[Step] 4/4 pairs" in visitor.box("prepare-log").input_value()
    visitor.open("Training")
    visitor.reads("training-train_manifests", "^ready/train_pairs.jsonl$")
    visitor.reads("training-tokenizer", "^ready/tokenizer.model$")
    visitor.open("Prepare")
    visitor.fill("prepare", val_share="0.4")
    visitor.sees("#prepare-output_dir.problem", "ready/utterances.jsonl is there already.*such as ready_2")
    visitor.page.get_by_role("checkbox", name="Replace what is there").first.check()
    visitor.command("prepare", "--val-share 0.4")


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_is_there_in_both_languages_with_the_same_values():
    for key, (english, amharic) in TEXTS.items():
        assert english.strip() and amharic.strip(), key
        assert placeholders(english) == placeholders(amharic), key
        if english != amharic:
            assert re.search("[\u1200-\u137f]", amharic), key
    assert {key: placeholders(TEXTS[key][0]) for key in MESSAGES}.items() <= {
        key: set(values) for key, values in MESSAGES.items()}.items() or all(
        placeholders(TEXTS[key][0]) <= set(values) for key, values in MESSAGES.items())


@pytest.mark.parametrize("kind", [kind for kind in command_lines.PROGRAMS if kind in pipeline.STEP_OF])
def test_a_form_is_read_back_from_its_command_line(kind: str, tmp_path: Path):
    examples = {"text": "-ሰላም = ዓለም", "line": "-ሰላም = ዓለም", "program": "in/a program", "words": "am am+f2",
                "int": "3", "float": "0.5", "switch": True, "manifests": "a/b.jsonl\nc.jsonl::am",
                "patterns": "first:2\n-x", "factors": "a=1\nb=2"}
    form = {field.name: field.choices[0] if field.choices else examples.get(field.type, f"in/{field.name}")
            for field in command_lines.PROGRAMS[kind].fields}
    if kind == "training":
        form["resume"] = True
    if kind in command_lines.SPEAKING:
        form.pop("codec")  # a model folder speaks instead
    workspace = Workspace.open(tmp_path)
    assert pipeline.form_of(kind, command_lines.command_for(kind, form, workspace), workspace) == form


def test_steps_are_done_by_what_they_made_and_the_next_is_after_the_furthest():
    steps = pipeline.states({"judged": "d/filtered.jsonl", "train_manifest": "d/train_pairs.jsonl"}, [])
    assert [step for step, state in steps.items() if state == "done"] == ["dataset", "prepare"]
    assert pipeline.next_step(steps) == "training"
    assert pipeline.next_step(dict.fromkeys(pipeline.STEPS, "open")) == "recordings"
    assert pipeline.next_step(dict.fromkeys(pipeline.STEPS, "done")) == ""
