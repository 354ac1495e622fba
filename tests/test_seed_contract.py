"""What users were told: the commands of the handbook word for word, every printed line, every failure, every file."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_trainer, data_args, load_checkpoint, metrics_of, mistake, read_jsonl, trainer

SETTINGS = ["--batch-size", "8", "--grad-accumulation", "1", "--log-interval", "1", "--save-interval", "2",
            "--val-interval", "3"]

AUTO_RESUME = """python trainers/train_gpt_v2.py \\
  --train-manifest processed_data/train_pairs.jsonl \\
  --val-manifest processed_data/val_pairs.jsonl \\
  --tokenizer tokenizers/amharic_extended_bpe.model \\
  --output-dir training_output \\
  --resume auto"""
RESUME_FROM_FILE = """python trainers/train_gpt_v2.py \\
  --train-manifest processed_data/train_pairs.jsonl \\
  --val-manifest processed_data/val_pairs.jsonl \\
  --tokenizer tokenizers/amharic_extended_bpe.model \\
  --output-dir training_output \\
  --resume training_output/model_step5000.pth"""
OPTIMAL_SETTINGS = """python trainers/train_gpt_v2.py \\
  --batch-size 32 \\
  --grad-accumulation 1 \\
  --num-workers 12 \\
  --amp \\
  --resume auto"""
CORRECT_DIRECTORY = "python trainers/train_gpt_v2.py --output-dir training_output --resume auto"
LESS_MEMORY = """python trainers/train_gpt_v2.py \\
  --batch-size 8 \\
  --grad-accumulation 4 \\
  --resume auto"""
START = """python trainers/train_gpt_v2.py \\
  --train-manifest processed_data/train_pairs.jsonl \\
  --val-manifest processed_data/val_pairs.jsonl \\
  --tokenizer tokenizers/amharic_extended_bpe.model \\
  --output-dir test_resume \\
  --epochs 10"""
START_AGAIN = """python trainers/train_gpt_v2.py \\
  --train-manifest processed_data/train_pairs.jsonl \\
  --val-manifest processed_data/val_pairs.jsonl \\
  --tokenizer tokenizers/amharic_extended_bpe.model \\
  --output-dir test_resume \\
  --resume auto"""


def resume_lines(path: str, epoch: int, step: int, recent: int) -> list[str]:
    return [f"[Info] Auto-resume: found checkpoint at {path}",
            f"[Info] Loading checkpoint from {path}...",
            "[Info] Restoring model state...",
            "[Info] Restoring optimizer state...",
            "[Info] Restoring scheduler state...",
            "[Info] Restoring gradient scaler state...",
            f"[Info] ✅ Successfully resumed from {path}",
            f"[Info]    Epoch: {epoch}, Step: {step}",
            f"[Info]    Recent checkpoints: {recent}"]


def in_order(output: str, expected: list[str]) -> list[str]:
    """The expected lines as they were printed, for comparison with `expected`."""
    return [line for line in output.splitlines() if line in expected]


# ---------------------------------------------------------------------------------------------------------------------
# The commands, word for word, on the data and the tokenizer that ship with the project


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like the repository, in which the commands are typed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("trainers", "processed_data", "tokenizers"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def argv_of(command: str) -> list[str]:
    python, *args = shlex.split(command.replace("\\\n", " "))
    assert python == "python"
    return [sys.executable, *args]


def default_signals() -> None:
    """In the child: as started from a user's shell, whatever this process ignores."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def type_command(command: str, folder: Path) -> tuple[int, str]:
    """Types a command in a terminal and presses Ctrl+C when its progress bar shows a step.

    Returns: exit status, and the lines printed (the bar, which the terminal overwrites, left out).
    """
    terminal, its_side = pty.openpty()
    process = subprocess.Popen(argv_of(command), cwd=folder, stdin=its_side, stdout=its_side, stderr=its_side,
                               preexec_fn=default_signals)
    os.close(its_side)
    shown, interrupted = b"", False
    while True:
        try:
            shown += os.read(terminal, 65_536)
        except OSError:  # the last writer is gone
            break
        if not interrupted and re.search(rb"\] step \d+/\d+ ETA", shown):
            interrupted = True
            process.send_signal(signal.SIGINT)
    os.close(terminal)
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    return process.wait(timeout=60), "\n".join(line.rpartition("\r")[2].rstrip() for line in lines)


def run_command(command: str, folder: Path, status: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv_of(command), cwd=folder, text=True, capture_output=True, timeout=300,
                          preexec_fn=default_signals)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_start_interrupt_and_start_again_prints_what_the_handbook_shows(checkout: Path):
    status, output = type_command(START, checkout)
    assert status == 130, output
    stopped_at = int(re.search(r"\[Info\] SIGINT: stopping at step (\d+)", output)[1])  # type: ignore[index]
    assert load_checkpoint(checkout / "test_resume" / "latest.pth")["step"] == stopped_at >= 1
    assert json.loads((checkout / "test_resume" / "last_exit.json").read_text()) == {
        "reason": "stopped", "status": 130, "step": stopped_at}

    status, output = type_command(START_AGAIN, checkout)
    assert status == 130, output
    expected = resume_lines("test_resume/latest.pth", 0, stopped_at, 1)
    assert in_order(output, expected) == expected, output
    assert load_checkpoint(checkout / "test_resume" / "latest.pth")["step"] > stopped_at
    assert load_checkpoint(checkout / "test_resume" / "latest.pth")["config"]["epochs"] == 10


def test_the_handbooks_other_commands_go_on_one_after_the_other(checkout: Path):
    """Auto-resume on nothing, the A100 settings, less memory, the right directory, a checkpoint by its name."""
    out = checkout / "training_output"
    not_found = run_command(RESUME_FROM_FILE, checkout, status=1)
    path = "training_output/model_step5000.pth"
    assert f"[Error] Failed to load checkpoint: Resume checkpoint not found: {path}" in not_found.stdout
    assert not_found.stderr.splitlines()[-1].startswith(
        f"RuntimeError: Resume failed: Resume checkpoint not found: {path}")
    assert not out.exists()

    status, output = type_command(AUTO_RESUME, checkout)
    assert status == 130 and "no checkpoint in training_output, starting from the beginning" in output, output
    for command, batches in ((OPTIMAL_SETTINGS, "32 x accumulation 1"), (LESS_MEMORY, "8 x accumulation 4"),
                             (CORRECT_DIRECTORY, "8 x accumulation 4")):
        before = load_checkpoint(out / "latest.pth")
        recent = len(before["recent_checkpoints"])
        status, output = type_command(command, checkout)
        assert status == 130, output
        expected = resume_lines("training_output/latest.pth", 0, before["step"], recent)
        assert in_order(output, expected) == expected, output
        assert f"[Info] Batch size {batches} = global batch 32" in output
        after = load_checkpoint(out / "latest.pth")
        assert after["step"] > before["step"] and after["config"]["train_manifest"] == [
            "processed_data/train_pairs.jsonl"]

    checkpoint = load_checkpoint(out / "latest.pth")
    del checkpoint["digests"]
    trainer.write_checkpoint(checkout / path, {
        **checkpoint, "step": 5000, "epoch": 12, "sample_in_epoch": 8320, "recent_checkpoints": ["model_step5000.pth"],
        "config": {**checkpoint["config"], "epochs": 20}})
    status, output = type_command(RESUME_FROM_FILE, checkout)
    assert status == 130, output
    expected = resume_lines(path, 12, 5000, 1)
    assert in_order(output, expected) == expected, output
    assert load_checkpoint(out / "latest.pth")["step"] > 5000


def test_the_documented_folder_structure(checkout: Path):
    """latest.pth, model_step files, logs/run_YYYYMMDD_HHMMSS with TensorBoard events and metrics.jsonl."""
    out = checkout / "test_resume"
    if not out.exists():
        type_command(START, checkout)
    assert (out / "latest.pth").is_file() and list(out.glob("model_step*.pth"))
    (run_dir,) = (out / "logs").iterdir()
    assert re.fullmatch(r"run_\d{8}_\d{6}", run_dir.name)
    assert list(run_dir.glob("events.out.tfevents.*")) and (run_dir / "metrics.jsonl").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Printed lines and checkpoint contents


@pytest.fixture(scope="module")
def first_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 4 steps with a validation at 3 and 4, and what it printed. Read only."""
    output_dir = tmp_path_factory.mktemp("first_run") / "out"
    return output_dir, call_trainer(*data_args(tiny), *SETTINGS, "--output-dir", output_dir, "--max-steps", 4)


@pytest.fixture
def out(first_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that run's output directory."""
    return shutil.copytree(first_run[0], tmp_path / "out")


def test_train_and_val_lines_have_six_decimals(first_run):
    number = r"\d+\.\d{6}"
    lines = first_run[1].splitlines()
    train = [line for line in lines if line.startswith("[Train]")]
    val = [line for line in lines if line.startswith("[Val]")]
    assert len(train) == 4 and len(val) == 2
    for step, line in enumerate(train, 1):
        assert re.fullmatch(rf"\[Train\] epoch=0 step={step} text_loss={number} mel_loss={number} mel_top1=\d\.\d+ "
                            r"lr=\d\.\d+e[-+]\d+", line)
    for step, line in zip((3, 4), val, strict=True):
        assert re.fullmatch(rf"\[Val\] epoch=0 step={step} text_loss={number} mel_loss={number} mel_top1=\d\.\d+", line)


def test_metrics_jsonl_carries_the_printed_values_in_full_precision(first_run):
    output_dir, output = first_run
    for record in metrics_of(output_dir):
        text_loss, mel_loss = record["text_loss"], record["mel_loss"]
        assert f"step={record['step']} text_loss={text_loss:.6f} mel_loss={mel_loss:.6f}" in output
        assert text_loss != round(text_loss, 6) or mel_loss != round(mel_loss, 6)


def test_the_first_lines_name_config_model_size_and_base(first_run, tiny):
    lines = first_run[1].splitlines()
    assert lines[0] == f"[Info] Config: {tiny / 'config.yaml'}"
    assert any(re.match(r"\[Info\] Model: 2 layers x 32, 0\.\d M parameters", line) for line in lines)
    assert "[Info] Base checkpoint: none, training from scratch" in lines
    assert "[Info] Batch size 8 x accumulation 1 = global batch 8; 1 reading thread; peak learning rate 0.001" in lines


def test_a_checkpoint_has_the_documented_contents(first_run, tiny):
    content = torch.load(first_run[0] / "latest.pth", map_location="cpu", weights_only=True)
    assert content.keys() >= {"model", "optimizer", "scheduler", "scaler", "epoch", "step", "recent_checkpoints",
                              "manifests"}
    assert (content["epoch"], content["step"], content["scaler"]) == (0, 4, None)
    assert content["recent_checkpoints"] == ["model_step2.pth", "model_step4.pth"]
    assert content["manifests"]["train"][0]["path"] == str(tiny / "train_pairs.jsonl")
    assert content["model"].keys() >= {
        "text_embedding.weight", "mel_embedding.weight", "gpt.h.0.attn.c_attn.weight", "gpt.ln_f.bias",
        "mel_pos_embedding.emb.weight", "final_norm.weight", "mel_head.bias", "speed_emb.weight"}
    assert {"exp_avg", "exp_avg_sq", "step"} <= content["optimizer"]["state"][0].keys()


def test_every_line_of_a_resume_is_printed_in_order(out):
    output = call_trainer("--output-dir", out, "--resume", "auto", "--max-steps", 6)
    expected = resume_lines(str(out / "latest.pth"), 0, 4, 2)
    assert in_order(output, expected) == expected
    assert "VALIDATION FAILED" not in output and "[Warn]" not in output and "[Error]" not in output


def test_a_path_alone_goes_on_in_its_folder_with_the_manifests_and_tokenizer_of_the_checkpoint(out, tiny):
    output = call_trainer("--resume", out / "model_step4.pth", "--max-steps", 6)
    expected = resume_lines(str(out / "model_step4.pth"), 0, 4, 2)
    assert in_order(output, expected) == expected
    assert f"[Info] {tiny / 'train_pairs.jsonl'}: 41 rows" in output
    assert load_checkpoint(out / "latest.pth")["step"] == 6


def test_a_finished_run_says_so_and_is_no_error(out):
    output = call_trainer("--output-dir", out, "--resume", "auto")
    assert "[Info] Training is complete: epoch 0, step 4. Raise --max-steps to go on" in output


@pytest.mark.parametrize("resume,message", [
    ("{out}/none.pth", "Resume checkpoint not found: {out}/none.pth"),
    ("{out}/keys.pth", "Checkpoint missing required keys: ['optimizer', 'step']"),
    ("{out}/text.pth", "{out}/text.pth: damaged or incomplete"),
])
def test_failures_are_printed_as_documented(resume, message, out):
    torch.save({"model": {}, "epoch": 1}, out / "keys.pth")
    (out / "text.pth").write_text("no checkpoint")
    output = call_trainer("--resume", resume.format(out=out), status=1)
    message = message.format(out=out)
    assert f"[Error] Failed to load checkpoint: {message}" in output
    assert output.splitlines()[-1].startswith(f"RuntimeError: Resume failed: {message}")


def test_a_missing_scaler_state_is_said_and_a_fresh_one_taken(tiny, tmp_path):
    args = ["--output-dir", tmp_path, *data_args(tiny), *SETTINGS]
    call_trainer(*args, "--amp", "bf16", "--max-steps", 2)
    output = call_trainer(*args, "--amp", "fp16", "--resume", "auto", "--max-steps", 4)
    assert "AMP enabled but no scaler state" in output and "[Info] amp: bf16 -> fp16" in output
    assert load_checkpoint(tmp_path / "latest.pth")["scaler"]["scale"] > 0
    again = call_trainer(*args, "--amp", "fp16", "--resume", "auto", "--max-steps", 6)
    assert "no scaler state" not in again


def test_a_missing_scheduler_state_is_said_and_a_fresh_one_taken(out):
    checkpoint = load_checkpoint(out / "model_step4.pth")
    del checkpoint["digests"]
    trainer.write_checkpoint(out / "model_step4.pth", {**checkpoint, "scheduler": None})
    output = call_trainer("--resume", out / "model_step4.pth", "--max-steps", 6)
    assert "[Warn] No scheduler state in the checkpoint: continuing with a fresh one" in output
    assert load_checkpoint(out / "latest.pth")["scheduler"]["total_steps"] == 6


def test_a_changed_schedule_is_recomputed_and_the_learning_rates_are_said(out):
    output = call_trainer("--output-dir", out, "--resume", "auto", "--max-steps", 8)
    number = r"\d\.\d+e[-+]\d+"
    assert re.search(rf"^\[Info\] lr at step 4: {number} -> {number}$", output, re.MULTILINE)
    assert "[Info] max_steps: 4 -> 8" in output
    again = call_trainer("--output-dir", out, "--resume", "auto", "--max-steps", 8)
    assert "lr at step" not in again


def test_flags_that_were_not_typed_come_from_the_checkpoint(tiny, tmp_path):
    call_trainer(*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--max-steps", 2, "--learning-rate", 3e-4,
                 "--seed", 77, "--dropout", 0, "--grad-clip", 0.5, "--weight-decay", 0.1, "--keep-checkpoints", 5)
    call_trainer("--output-dir", tmp_path, "--resume", "auto", "--max-steps", 3, "--grad-clip", 0.7)
    config = load_checkpoint(tmp_path / "latest.pth")["config"]
    assert {key: config[key] for key in ("learning_rate", "seed", "dropout", "grad_clip", "weight_decay",
                                         "keep_checkpoints", "batch_size", "save_interval", "max_steps")} == {
        "learning_rate": 3e-4, "seed": 77, "dropout": 0.0, "grad_clip": 0.7, "weight_decay": 0.1,
        "keep_checkpoints": 5, "batch_size": 8, "save_interval": 2, "max_steps": 3}


@pytest.mark.parametrize("typed,batches", [
    ([], "8 x accumulation 1 = global batch 8"),
    (["--batch-size", 4], "4 x accumulation 2 = global batch 8"),
    (["--grad-accumulation", 8], "1 x accumulation 8 = global batch 8"),
    (["--batch-size", 4, "--grad-accumulation", 3], "4 x accumulation 3 = global batch 12"),
])
def test_the_global_batch_stays_unless_both_factors_are_typed(typed, batches, out):
    output = call_trainer("--output-dir", out, "--resume", "auto", "--max-steps", 5, *typed)
    assert f"[Info] Batch size {batches}; " in output
    assert ("[Warn] The global batch changes from 8 to 12" in output) == (len(typed) == 4)


def test_evaluation_prints_a_val_line_and_writes_a_record_for_every_row(out, tiny):
    before = {path: path.read_bytes() for path in out.glob("*.pth")}
    output = call_trainer("--output-dir", out, "--resume", "auto", "--eval-only")
    assert re.search(r"^\[Val\] epoch=0 step=4 text_loss=\d\.\d{6} mel_loss=\d\.\d{6}", output, re.MULTILINE)
    assert {path: path.read_bytes() for path in out.glob("*.pth")} == before
    rows, records = read_jsonl(tiny / "val_pairs.jsonl"), read_jsonl(out / "eval.jsonl")
    assert [record["id"] for record in records] == [row["id"] for row in rows]
    for row, record in zip(rows, records, strict=True):
        assert record["text_tokens"] == row["target_text_len"] + 1 == len(record["text_token_losses"])
        assert record["mel_tokens"] == row["target_code_len"] + 1 == len(record["mel_token_losses"])
        assert record["mel_loss"] == pytest.approx(sum(record["mel_token_losses"]) / record["mel_tokens"])


# ---------------------------------------------------------------------------------------------------------------------
# Flags of the fork, and where settings come from


FORK_FLAGS = ["--train-manifest", "a.jsonl::am", "--train-manifest", "b.jsonl", "--val-manifest", "c.jsonl::am",
              "--val-manifest", "d.jsonl", "--tokenizer", "t.model", "--config", "checkpoints/config.yaml",
              "--base-checkpoint", "checkpoints/gpt.pth", "--output-dir", "o", "--batch-size", "4",
              "--grad-accumulation", "2", "--epochs", "3", "--learning-rate", "5e-5", "--weight-decay", "0.02",
              "--warmup-steps", "10", "--max-steps", "20", "--log-interval", "5", "--val-interval", "7",
              "--val-batch-size", "3", "--max-val-batches", "9", "--num-workers", "1", "--grad-clip", "0.9",
              "--text-loss-weight", "0.3", "--mel-loss-weight", "0.7", "--amp", "--grad-checkpointing", "--resume",
              "auto", "--save-interval", "11", "--keep-checkpoints", "2", "--seed", "5"]


def test_all_flags_of_the_fork_are_taken_with_their_meanings():
    typed = trainer.parse_args(FORK_FLAGS)
    assert typed == {
        "train_manifest": ["a.jsonl::am", "b.jsonl"], "val_manifest": ["c.jsonl::am", "d.jsonl"],
        "tokenizer": "t.model", "config": "checkpoints/config.yaml", "base_checkpoint": "checkpoints/gpt.pth",
        "output_dir": "o", "batch_size": 4, "grad_accumulation": 2, "epochs": 3, "learning_rate": 5e-5,
        "weight_decay": 0.02, "warmup_steps": 10, "max_steps": 20, "log_interval": 5, "val_interval": 7,
        "val_batch_size": 3, "max_val_batches": 9, "num_workers": 1, "grad_clip": 0.9, "text_loss_weight": 0.3,
        "mel_loss_weight": 0.7, "amp": "auto", "grad_checkpointing": True, "resume": "auto", "save_interval": 11,
        "keep_checkpoints": 2, "seed": 5}


def test_the_defaults_are_the_forks():
    defaults = trainer.TrainConfig()
    assert {name: getattr(defaults, name) for name in (
        "epochs", "weight_decay", "max_steps", "max_val_batches", "grad_clip",
        "text_loss_weight", "mel_loss_weight", "save_interval", "keep_checkpoints", "seed", "output_dir", "amp",
        "grad_checkpointing")} == {
        "epochs": 10, "weight_decay": 0.01, "max_steps": 0,
        "max_val_batches": 200, "grad_clip": 1.0, "text_loss_weight": 0.2, "mel_loss_weight": 0.8,
        "save_interval": 1000, "keep_checkpoints": 3, "seed": 1234, "output_dir": "training_output", "amp": "off",
        "grad_checkpointing": False}
    shown = {item.name: item.metadata["help"] for item in dataclasses.fields(trainer.TrainConfig) if item.metadata}
    assert "(100, at most 1/10 of the run)" in shown["log_interval"]
    assert "(1000, at most half of the run)" in shown["val_interval"]


def test_manifests_may_be_repeated_and_are_read_in_order(tiny, tmp_path):
    call_trainer(*data_args(tiny), "--train-manifest", f"{tiny / 'val_pairs.jsonl'}::am", *SETTINGS, "--output-dir",
                 tmp_path, "--max-steps", 1)
    manifests = load_checkpoint(tmp_path / "latest.pth")["manifests"]["train"]
    assert [(Path(m["path"]).name, m["language"], m["rows"]) for m in manifests] == [
        ("train_pairs.jsonl", None, 41), ("val_pairs.jsonl", "am", 6)]


@pytest.fixture
def released(tiny: Path, first_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the released model's checkpoints/config.yaml and checkpoints/gpt.pth."""
    shutil.copytree(tiny, tmp_path / "processed_data")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "tokenizers").symlink_to(ROOT / "tokenizers")
    shutil.move(tmp_path / "processed_data" / "config.yaml", tmp_path / "checkpoints" / "config.yaml")
    torch.save(load_checkpoint(first_run[0] / "latest.pth")["model"], tmp_path / "checkpoints" / "gpt.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_released_config_and_weights_are_found_in_checkpoints(released):
    output = call_trainer("--max-steps", 1)
    assert "[Info] Config: checkpoints/config.yaml" in output
    assert "[Info] Base checkpoint: checkpoints/gpt.pth" in output
    assert "peak learning rate 2e-05" in output  # the fine-tuning default
    shutil.rmtree(released / "checkpoints")  # neither read nor needed any more
    assert "Epoch: 0, Step: 1" in call_trainer("--resume", "auto", "--max-steps", 2)


def test_the_vocabulary_of_released_weights_that_were_found_can_be_frozen(released):
    call_trainer("--max-steps", 1, "--freeze-base-vocab", "--learning-rate", 0.1, "--warmup-steps", 0)
    base = torch.load(released / "checkpoints" / "gpt.pth")["text_embedding.weight"]
    trained = load_checkpoint(released / "training_output" / "latest.pth")["model"]["text_embedding.weight"]
    assert torch.equal(trained[:-1], base[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# last_exit.json


def last_exit(output_dir: Path) -> dict:
    return json.loads((output_dir / "last_exit.json").read_text())


def test_last_exit_tells_how_the_run_ended_and_is_absent_while_it_runs(tiny, tmp_path, monkeypatch):
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path]
    call_trainer(*args, "--max-steps", 2)
    assert last_exit(tmp_path) == {"reason": "finished", "status": 0, "step": 2}

    mistake(*args)  # no --resume
    assert last_exit(tmp_path) == {"reason": "user_error", "status": 1, "step": None}

    def stop_after_logging(event, run, *_):
        assert not (tmp_path / "last_exit.json").exists()
        if event == "logged":
            run.process.stop.receive(signal.SIGTERM)

    call_trainer(*args, "--resume", "auto", "--max-steps", 9, status=143, on_event=stop_after_logging)
    assert last_exit(tmp_path) == {"reason": "stopped", "status": 143, "step": 3}


def test_the_trainer_touches_nothing_outside_its_output_directory(tiny, tmp_path, monkeypatch):
    work = tmp_path / "work"
    (work / "package" / "__pycache__").mkdir(parents=True)
    (work / "package" / "__pycache__" / "module.pyc").write_bytes(b"cache")
    monkeypatch.chdir(work)
    data_before = {path: path.stat().st_mtime_ns for path in tiny.iterdir()}
    call_trainer(*data_args(tiny), *SETTINGS, "--output-dir", "out", "--max-steps", 1)
    assert {str(path.relative_to(work)) for path in work.rglob("*") if "out" not in path.relative_to(work).parts} == {
        "package", "package/__pycache__", "package/__pycache__/module.pyc"}
    assert {path: path.stat().st_mtime_ns for path in tiny.iterdir()} == data_before


