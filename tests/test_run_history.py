"""The page's run history: every run is found with what it was asked for and how it ended, its whole log can be read,
and deleting it takes what is the training's and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from webui import command_lines, jobs, readers, run_bar, run_curves, run_history, run_plan, spoken_samples
from webui.workspace import Refused, Workspace

STARTED = 1_800_000_000.0


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path)


def make_job(workspace: Workspace, output_dir: str, number: int = 0, status: int | None = 0, log: str = "",
             last_exit: dict[str, Any] | None = None, kind: str = "training", **form: Any) -> jobs.Job:
    """A job that is over, started `number` seconds after the first one."""
    folder = workspace.private / "jobs" / f"20270115-080000-{number:06d}-abcd"
    folder.mkdir(parents=True)
    argv = command_lines.command_for(kind, {"output_dir": output_dir, **form}, workspace)
    (folder / "job.json").write_text(json.dumps({
        "kind": kind, "title": f"training {output_dir}", "argv": argv, "cwd": "/", "created": STARTED + number,
        "output_dir": str(workspace.root / output_dir)}))
    (folder / "process.json").write_text(json.dumps({"program_pid": 1, "program_start": -1, "supervisor_pid": 1,
                                                     "supervisor_start": -1, "boot_id": "-", "started": STARTED}))
    (folder / "exit.json").write_text(json.dumps({"status": status, "ended": STARTED, "last_exit": last_exit or {}}))
    (folder / "log.txt").write_text(log)
    return jobs.load_job(workspace, folder.name)


def write_metrics(folder: Path, *lines: tuple[str, int, float], run: str = "run_20270115_080000") -> Path:
    path = folder / "logs" / run / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for kind, step, loss in lines:
            part = {"manifest": "am"} if kind == "val_part" else {}
            file.write(json.dumps({"kind": kind, "epoch": 0, "step": step, "mel_loss": loss, "loss": loss, **part})
                       + "\n")
    return path


def runs_of(workspace: Workspace) -> dict[str, run_history.Run]:
    found = run_history.RunHistory(workspace).runs(jobs.list_jobs(workspace))
    return {workspace.show(run.folder): run for run in found}


def test_runs_of_the_page_of_a_terminal_and_failed_ones_are_found_with_steps_and_best_loss(workspace: Workspace):
    make_job(workspace, "page", last_exit={"reason": "finished", "status": 0, "step": 30})
    make_job(workspace, "never", number=1, status=2)
    for name in ("page", "deep/terminal"):
        write_metrics(workspace.root / name, ("train", 10, 5.0), ("val", 10, 4.5), ("val_part", 10, 0.1),
                      ("val", 20, 4.0), ("val", 25, float("nan")), ("val", 30, 4.2), ("train", 31, 1.0))
    (workspace.root / "data").mkdir()
    found = runs_of(workspace)
    assert set(found) == {"page", "never", "deep/terminal"}
    for name in ("page", "deep/terminal"):
        assert (found[name].step, found[name].best, found[name].best_step) == (31, 4.0, 20)
    assert found["never"].state == "failed" and found["never"].step is None


def test_a_cut_and_a_growing_metrics_file_are_followed(workspace: Workspace):
    path = write_metrics(workspace.root / "run", ("val", 1, 3.0), ("val", 2, 2.0))
    summary = run_history.Summary(path)
    summary.update()
    assert (summary.step, summary.best) == (2, (2.0, 2))
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    write_metrics(workspace.root / "run", ("val", 2, 2.5))
    with path.open("a") as file:
        file.write('{"kind": "val", "step": 3, "lo')  # torn
    summary.update()
    summary.update()
    assert (summary.step, summary.best) == (2, (2.5, 2))


@pytest.mark.parametrize(("reason", "state"), [("finished", "finished"), ("stopped", "stopped"), (None, "killed"),
                                               ("user_error", "failed"), ("crash", "failed")])
def test_a_run_of_a_terminal_tells_its_state_by_its_files(workspace: Workspace, reason: str | None, state: str):
    write_metrics(workspace.root / "run", ("train", 1, 1.0))
    if reason:
        (workspace.root / "run" / "last_exit.json").write_text(json.dumps({"reason": reason, "status": 1, "step": 1}))
    assert runs_of(workspace)["run"].state == state


def test_who_went_on_with_a_run_elsewhere_is_believed_rather_than_its_last_job(workspace: Workspace):
    job = make_job(workspace, "run", status=-9)
    path = write_metrics(workspace.root / "run", ("train", 1, 1.0))
    ended = (job.folder / "exit.json").stat().st_mtime
    os.utime(path, (ended - 10, ended - 10))
    assert runs_of(workspace)["run"].state == "killed"
    (workspace.root / "run" / "last_exit.json").write_text(json.dumps({"reason": "stopped", "status": 0, "step": 1}))
    os.utime(workspace.root / "run" / "last_exit.json", (ended + 100, ended + 100))
    assert runs_of(workspace)["run"].state == "stopped"


def test_a_clone_has_the_settings_of_all_starts_and_a_directory_that_nobody_uses(workspace: Workspace):
    for name in ("data.jsonl", "tokenizer.model"):
        (workspace.root / name).touch()
    given = {"train_manifests": "data.jsonl", "tokenizer": "tokenizer.model"}
    make_job(workspace, "run", 0, seed="1", **given)
    make_job(workspace, "run", 1, learning_rate="0.5", batch_size="4", **given)  # a new start: the seed is gone
    make_job(workspace, "run", 2, resume=True, learning_rate="0.1", max_steps="9")
    make_job(workspace, "run_3", 3)
    (workspace.root / "run_2").mkdir()
    (run,) = [run for name, run in runs_of(workspace).items() if name == "run"]
    form = run_history.clone_of(run, workspace, [workspace.root / "run_3"])
    assert form == {**given, "learning_rate": "0.1", "batch_size": "4", "max_steps": "9", "output_dir": "run_4",
                    "resume": False, "resume_path": ""}
    write_metrics(workspace.root / "foreign", ("train", 1, 1.0))
    assert run_history.clone_of(runs_of(workspace)["foreign"], workspace, []) == {}


def test_the_log_of_all_starts_can_be_read_part_by_part_without_losing_a_line(workspace: Workspace,
                                                                             monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_history, "LOG_PART", 1000)
    lines = [f"[Train] line {number}" for number in range(300)]
    for number, own in enumerate((lines[:120], [], lines[120:])):
        make_job(workspace, "run", number, log="".join(f"{line}\n" for line in own), seed=str(number))
    make_job(workspace, "other", 9, log="of another run\n")
    found = run_history.jobs_of_run(workspace, workspace.root / "run", {})
    _, last, count = run_history.log_part(found)
    assert last == count - 1 and count > 4
    parts = [run_history.log_part(found, number)[0].splitlines() for number in range(count)]
    said = [line for part in parts[:-1] for line in part if not line.startswith("──")]
    assert said == lines[:len(said)] and len(said) + len(parts[-1]) >= 300
    assert parts[-1][-1] == lines[-1]
    headings = [line for part in parts for line in part if line.startswith("──")]
    assert [f"--seed {number}" in line for number, line in enumerate(dict.fromkeys(headings))] == [True] * 3
    assert run_history.log_part([]) == ("", 0, 1)


def test_warnings_come_newest_first_each_kind_once_whatever_its_numbers(tmp_path: Path):
    log = tmp_path / "log.txt"
    log.write_text("[Info] ok\n[Warn] 3 updates skipped, scale 0.5\n[Train] [Warn] not this\n[Error] disk\n"
                   "[Warn] 4 upda")
    warnings = run_history.Warnings(log)
    assert warnings.update() == [("[Error] disk", 1), ("[Warn] 3 updates skipped, scale 0.5", 1)]
    with log.open("a") as file:
        file.write("tes skipped, scale 2\n")
    assert warnings.update() == [("[Warn] 4 updates skipped, scale 2", 2), ("[Error] disk", 1)]
    assert warnings.update() == [("[Warn] 4 updates skipped, scale 2", 2), ("[Error] disk", 1)]
    assert run_history.Warnings(tmp_path / "none").update() == []


def test_deleting_takes_what_the_training_and_the_page_wrote_and_says_what_stays(workspace: Workspace):
    job = make_job(workspace, "run")
    folder = workspace.root / "run"
    write_metrics(folder, ("train", 1, 1.0))
    (folder / "model_step1.pth").write_bytes(b"x" * 1000)
    os.link(folder / "model_step1.pth", folder / "latest.pth")
    (folder / "notes.txt").write_text("mine")
    (folder / "abandoned_20270115_080000").mkdir()
    outside = workspace.root / "elsewhere"
    outside.mkdir()
    (outside / "kept.txt").touch()
    (folder / "abandoned_link").symlink_to(outside)
    make_job(workspace, "child", 5, base_checkpoint="run/latest.pth")
    found = run_history.deletion_of(workspace, folder, {})
    assert [path.name for path in found.checkpoints] == ["model_step1.pth", "latest.pth"]
    assert found.kept == ["notes.txt"] and found.users == ["child"] and 1000 < found.size < 2000
    run_history.delete_run(workspace, folder, {})
    assert [path.name for path in folder.iterdir()] == ["notes.txt"] and not job.folder.exists()
    assert (outside / "kept.txt").exists()
    (folder / "notes.txt").unlink()
    write_metrics(folder, ("train", 1, 1.0))
    run_history.delete_run(workspace, folder, {})
    assert not folder.exists()


def test_a_run_that_is_held_or_read_is_not_deleted(workspace: Workspace):
    folder = workspace.root / "run"
    write_metrics(folder, ("train", 1, 1.0))
    (folder / "latest.pth").touch()
    job = jobs.start_job(workspace, "watch", "watch run", [sys.executable, "-c", "import time; time.sleep(60)",
                                                           "--watch", str(folder)])
    try:
        with pytest.raises(Refused, match="run_in_use"):
            run_history.delete_run(workspace, folder, {})
    finally:
        jobs.kill_job(job)
    while jobs.load_job(workspace, job.id).live:
        time.sleep(0.05)
    pid = os.fork()
    if pid == 0:  # a lock of this process would not be seen by itself
        with (folder / ".lock").open("w") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX)
            time.sleep(60)
        os._exit(0)
    try:
        while runs_of(workspace)["run"].state != "running":
            time.sleep(0.05)
        with pytest.raises(Refused, match="directory_locked"):
            run_history.deletion_of(workspace, folder, {})
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert (folder / "latest.pth").exists()


def test_a_smoothed_line_starts_unbiased_and_keeps_a_constant():
    assert run_curves.smoothed([(1, 2.0), (2, 2.0), (3, 2.0)], 0.9) == [(n, pytest.approx(2.0)) for n in (1, 2, 3)]
    assert run_curves.smoothed([(1, 1.0), (2, 5.0)], 0.5) == [(1, pytest.approx(1)), (2, pytest.approx(11 / 3))]
    assert run_curves.rows_of("train", [(1, 1.0)], 0, []) == [(1, 1.0, "train")]
    assert [name for *_, name in run_curves.rows_of("train", [(1, 1.0)], 0.5, [])] == ["raw train", "train"]
    zoomed = run_curves.rows_of("train", [(step, 0.0) for step in range(10_000)], 0, [100, 200])
    assert [step for step, *_ in zoomed] == list(range(100, 201))


def test_parts_of_the_validation_are_lines_of_their_own(workspace: Workspace):
    write_metrics(workspace.root / "run", ("train", 1, 9.0), ("val", 1, 3.0), ("val_part", 1, 2.0))
    points = readers.MetricsReader(workspace.root / "run").points()
    *_, parts = run_curves.drawing(points, 0.0, [])
    assert run_curves.part_names(points) == ["am"]
    assert parts[parts.value.notna()].values.tolist() == [[1, 2.0, "1"]]


def test_a_long_metrics_file_is_read_in_short_looks_and_no_line_of_it_is_kept(workspace: Workspace):
    line = json.dumps({"kind": "train", "epoch": 0, "step": 1_000_000, "text_loss": 1.234567, "mel_loss": 2.345678,
                       "mel_top1": 0.1, "lr": 1e-5, "tokens_per_second": 12345.678}) + "\n"
    path = workspace.root / "run" / "logs" / "run_20270115_080000" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line * 300_000)
    summary, looks = run_history.Summary(path), []
    while summary.offset < path.stat().st_size:
        started = time.process_time()
        summary.update()
        looks.append(time.process_time() - started)
    assert summary.step == 1_000_000 and max(looks) < 1.0 and summary.points == []


def test_what_the_newest_checkpoint_says_is_read_from_tensorboards_files_beside_its_original(workspace: Workspace):
    import torch
    from torch.utils.tensorboard import SummaryWriter

    folder = workspace.root / "run" / "logs" / "run_20270115_080000" / "voice"
    for step in (100, 200):  # as tools.watch_training writes them, a file for each checkpoint
        writer = SummaryWriter(str(folder), purge_step=step)
        writer.add_text("sentence_1", "ሰላም <b>", step)
        writer.add_audio("sentence_1", torch.full((1, 10 * step), 0.1), step, 22050)
        writer.close()
        for path in folder.iterdir():
            os.utime(path, (step, step)) if path.stat().st_mtime > 1000 else None
    spoken = spoken_samples.newest_spoken(workspace.root / "run")
    assert spoken.step == 200 and spoken.texts == {"sentence_1": "ሰላም <b>"}
    assert spoken.sounds["sentence_1"].startswith(b"RIFF") and len(spoken.sounds["sentence_1"]) == 44 + 2 * 2000
    (workspace.root / "a.wav").write_bytes(b"original")
    (workspace.root / "val.jsonl").write_text(json.dumps({"target_text": "ሰላም <b>", "target_audio_path": "a.wav"}))
    job = make_job(workspace, "run", val_manifests="val.jsonl::am")
    recordings = spoken_samples.originals([job], workspace)
    shown = spoken_samples.samples_html(spoken, recordings, workspace, "en")
    assert shown.count("<audio") == 2 and "step 200" in shown and "ሰላም &lt;b&gt;" in shown
    outside = {"ሰላም <b>": Path("/etc/passwd")}
    assert spoken_samples.samples_html(spoken, outside, workspace, "en").count("<audio") == 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 100, b"\x10" + b"\0" * 11 + b"\xff" * 20])
def test_a_file_that_only_has_the_name_of_tensorboards_says_nothing(workspace: Workspace, content: bytes):
    folder = workspace.root / "run" / "logs" / "run_1" / "voice"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1").write_bytes(content)
    assert spoken_samples.newest_spoken(workspace.root / "run").sounds == {}


def test_a_state_offers_its_next_step(workspace: Workspace):
    for number, (status, last_exit, saved, started) in enumerate([
            (143, {"reason": "stopped", "status": 143, "step": 3}, "after.go_on", "after.again"),
            (-9, {}, "after.go_on", "after.again"), (1, {}, "after.retry", "after.again"), (0, {}, "", "")]):
        job = make_job(workspace, "run", number, status=status, last_exit=last_exit)
        assert (run_bar.next_of(job, True), run_bar.next_of(job, False)) == (saved, started), job.state


def test_warnings_are_shown_as_text_with_how_many_more_there_are():
    shown = run_bar.warnings_list([("[Error] <script>", 2), *[(f"[Warn] {word}", 1) for word in "abcdefg"]], "en")
    assert '<li class="error">&lt;script&gt; (×2)</li>' in shown and "and 2 more" in shown and "<li>e</li>" in shown
    assert run_bar.warnings_list([], "am") == ""


PLAN = {"hours": {"30%": 40.0, "50%": 24.0}, "steps": 1185, "epochs": 3, "samples": 12620, "batch_size": 32,
        "grad_accumulation": 1, "precision": "bf16", "memory_total": 90 * 2**30, "gpu_memory": 79 * 2**30,
        "fits": False, "disk_bytes": 5_000_000_000, "parameters": 4_000_000}


def made(plans: run_plan.Plans, argv: list[str]) -> dict[str, Any]:
    while (plan := plans.of(argv)) is None:
        time.sleep(0.05)
    return plan


def test_a_plan_is_made_once_in_the_background_and_its_error_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); print('{json.dumps(PLAN)}'.replace('False', 'false'))"
    plans, argv = run_plan.Plans(), [sys.executable, "-c", code]
    started = time.monotonic()
    assert plans.of(argv) is None and time.monotonic() - started < 1
    assert made(plans, argv) == PLAN == made(plans, argv) and (tmp_path / "runs").read_text() == "x"
    failed = made(plans, [sys.executable, "-c", "import sys; sys.exit('[Error] no config.yaml')"])
    assert failed == {"error": "[Error] no config.yaml"}
    monkeypatch.setattr(run_plan, "SECONDS", 0.2)
    assert made(plans, [sys.executable, "-c", "import time; time.sleep(60)"]) == {"late": 0.2}


def test_a_plan_tells_hours_price_memory_and_disk():
    shown = run_plan.plan_html(PLAN, 1.5, "en")
    assert "24.0 – 40.0" in shown and "36.0 – 60.0" in shown and "90.0 / 79.0 GiB ✗" in shown and "5.0 GB" in shown
    assert "More than the card has" in shown and "Price" not in run_plan.plan_html({**PLAN, "fits": True}, None, "en")
    assert run_plan.price_of(" 1,25 ") == 1.25 and run_plan.price_of("") is None
    for wrong in ("many", "-1", "nan", "1e9"):
        with pytest.raises(Refused, match="not_a_number"):
            run_plan.price_of(wrong)


def test_the_command_of_a_plan_has_what_it_depends_on_and_the_cards_are_the_programs(workspace: Workspace):
    page = types.SimpleNamespace(workspace=workspace)
    form = {"train_manifests": "a.jsonl::am", "epochs": "3", "amp": "auto", "seed": "4", "output_dir": "x",
            "grad_checkpointing": False}
    argv = run_plan.plan_command(form, "l4", page)  # type: ignore[arg-type]
    assert argv[1:] == ["-m", "tools.plan_run", "--json", "--gpu", "l4", "--train-manifest",
                        f"{workspace.root}/a.jsonl::am", "--epochs", "3", "--amp"]
    assert set(run_plan.CARDS) == set(pytest.importorskip("tools.plan_run").CARDS)
