"""Faults that other trainers have, and the test that keeps each of them away from this one.

The fork (IndexTTS2, Amharic), seen by running it:

F1   a resume inside an epoch goes on with the very next sample of the same permutation
     test_resume_exactly.py::test_a_stopped_and_resumed_run_is_bit_identical_to_the_uninterrupted_one
     test_sample_order.py::test_steps_from_any_position_go_on_exactly_where_the_whole_run_would_be
F2   a resume at an epoch's end goes on in the same order
     test_resume_exactly.py::test_a_stopped_and_resumed_run_is_bit_identical_to_the_uninterrupted_one
     test_sample_order.py::test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone
F3   a planned stop goes on when --max-steps is raised
     test_resume_exactly.py::test_a_planned_stop_at_max_steps_goes_on_when_the_limit_is_raised
F4   a healthy resume gives no alarm and waits for nothing
     test_regressions.py::test_a_healthy_resume_raises_no_alarm_and_waits_for_nothing
F5   a save that was killed costs nothing: an older file is used, a partial one is named
     test_checkpoint_files.py::test_a_partial_file_under_a_final_name_is_stepped_over_and_named
     test_checkpoint_files.py::test_leftovers_of_a_killed_save_are_removed
     test_soak.py::test_kills_signals_and_damage_leave_no_trace
F6   a lost latest.pth: the newest checkpoint is used, unknown files are never deleted
     test_checkpoint_files.py::test_a_lost_latest_is_replaced_by_the_newest_checkpoint_and_nothing_is_deleted
     test_checkpoint_files.py::test_files_that_the_run_does_not_know_are_never_deleted
F7   a truncated latest.pth: an older file is used, and this is said
     test_checkpoint_files.py::test_a_truncated_newest_checkpoint_is_stepped_over_and_named
     test_checkpoint_files.py::test_a_truncated_latest_that_is_a_file_of_its_own_is_stepped_over_and_named
F8   one flipped bit is found when the file is read, and named
     test_checkpoint_files.py::test_one_flipped_bit_in_a_weight_is_named_and_auto_resume_falls_back
     test_checkpoint_files.py::test_one_flipped_bit_under_an_explicit_path_is_an_error_that_lists_the_valid_files
     test_checkpoint_files.py::test_a_flipped_bit_anywhere_is_detected_or_harmless
F9   a full disk: earlier checkpoints stay, training goes on, the save is tried again, a restart works
     test_checkpoint_files.py::test_a_full_disk_stops_neither_training_nor_the_next_start
     test_checkpoint_files.py::test_a_failed_save_is_tried_again_and_nothing_is_deleted_meanwhile
F10  SIGTERM saves and exits with 143
     test_signals.py::test_a_signal_saves_the_last_complete_step_and_sets_the_exit_status
F11  the best validation loss and best.pth outlive a resume
     test_checkpoint_files.py::test_the_best_validation_is_kept_over_a_resume
F12  a tokenizer of the same size with other pieces is refused
     test_checkpoint_files.py::test_a_tokenizer_of_the_same_size_with_other_pieces_is_refused
F13  every checkpoint is complete
     test_checkpoint_files.py::test_every_file_loads_with_pytorch_alone_and_has_the_same_complete_keys
F14  no step crosses an epoch
     test_resume_exactly.py::test_every_epoch_sees_every_sample_once_and_no_step_crosses_an_epoch
     test_sample_order.py::test_no_step_crosses_an_epoch_and_its_last_step_takes_what_is_left
F15  a child of the page that logs 100 MB never stalls
     test_webui_backend.py::test_a_child_that_logs_100_mb_does_not_stall_and_its_tail_is_read_in_little_memory
     test_webui_browser.py::test_a_child_that_logs_100_mb_swells_neither_page_nor_server
F16  a sample's loss is that of the sample alone, whatever its neighbours
     test_model.py::test_a_samples_losses_equal_the_plain_description_whatever_its_batch_neighbours
F17  frozen embedding rows stay as they are
     test_model.py::test_frozen_base_tokens_are_bit_identical_after_training_and_after_a_resume
     test_model.py::test_weight_decay_leaves_biases_norms_and_embeddings_alone
F18  only ::lang is a suffix of a manifest's path
     test_bad_input.py::test_only_a_language_behind_two_colons_is_cut_off_a_manifest_path
     test_bad_input.py::test_a_run_reads_manifests_whose_paths_contain_equals_and_at_signs
F19  nothing outside the output directory is touched
     test_model.py::test_training_touches_nothing_outside_its_output_directory
F20  the same gradient however a step is split
     test_model.py::test_one_loss_and_one_gradient_however_the_step_is_split

Complaints of users elsewhere:

C1   samples skipped one by one on resume, for 28 hours (transformers#11284)
     test_regressions.py::test_a_resume_reads_none_of_the_samples_that_the_run_has_passed
C2   a jump of the loss after a resume (transformers#33336, ms-swift#6049)
     test_resume_exactly.py::test_a_stopped_and_resumed_run_is_bit_identical_to_the_uninterrupted_one
C3   out of memory only on resume (nanoGPT#158, axolotl#219)
     test_regressions.py::test_a_resume_reads_checkpoints_on_the_cpu_mapped_from_the_file
     test_regressions.py::test_a_resumed_run_needs_no_more_memory_than_a_fresh_one
C4   an incomplete newest checkpoint blocks auto-resume (transformers#35782, #35525)
     test_checkpoint_files.py::test_a_partial_file_under_a_final_name_is_stepped_over_and_named
C5   checkpoints fill the disk (F5-TTS#208, ms-swift#6392)
     test_checkpoint_files.py::test_the_last_checkpoints_are_kept
     test_regressions.py::test_a_resumed_run_lets_go_of_the_file_it_came_from
     test_regressions.py::test_a_start_says_how_much_disk_the_checkpoints_will_need_and_warns_when_it_is_too_little
C6   weights_only=True refuses one's own checkpoint (transformers#34631)
     test_checkpoint_files.py::test_every_file_loads_with_pytorch_alone_and_has_the_same_complete_keys
C7   NaN after tokens were added (transformers#14416)
     test_model.py::test_a_larger_tokenizer_keeps_the_base_rows_and_trains_to_finite_losses
C8   a SIGTERM handler that only the step boundary looked at (goodfire-ai/spd#677)
     test_soak.py::test_kills_signals_and_damage_leave_no_trace
     test_signals.py::test_a_signal_during_data_preparation_is_noticed_there
C9   progress is lost when the page is reloaded (text-generation-webui#3360)
     test_webui_browser.py::test_a_run_is_found_after_a_reload_in_another_browser_and_after_the_server_was_killed
C10  a Stop button that sticks, a Resume button that vanishes (kohya_ss#2749, unsloth#8150)
     test_webui_backend.py::test_a_program_that_does_not_react_to_stop_can_be_killed_with_its_children
     test_webui_browser.py::test_a_program_that_does_not_react_to_stop_can_be_killed_from_the_page
     test_webui_browser.py::test_a_newcomer_starts_stops_resumes_and_finishes_a_run
C11  share links without authentication (stable-diffusion-webui#2571)
     test_webui_browser.py::test_a_public_page_asks_for_a_password_that_it_made_printed_and_kept

Found by the soak:

S1   starts that were stopped before their first save, within one second, do not stand in each other's way
     test_regressions.py::test_three_starts_in_one_second_that_leave_no_checkpoint_keep_all_their_logs
S2   data workers that outlive their trainer: there are none, threads read
     test_signals.py::test_reading_threads_leave_no_process_and_the_same_bits_whatever_their_number

Public reports whose symptom showed on this project when it was tried:

R1   a /dev/shm that is too small (pytorch#5040, PaddleSpeech#790): threads read, nothing lives there
     test_signals.py::test_reading_threads_leave_no_process_and_the_same_bits_whatever_their_number
R2   SIGTERM while data is awaited (pytorch#26072, pocket-tts#277)
     test_signals.py::test_a_disk_that_hangs_while_data_is_awaited_blocks_neither_the_stop_nor_the_save
     test_disks.py::test_a_disk_that_hangs_blocks_neither_the_stop_nor_the_save
R3   a directory that cannot be synced (borg#1287, WSL#2557)
     test_disks.py::test_a_directory_that_cannot_be_synced_is_one_warning_and_the_save_counts
R4   a disk without locks (SModels#37, cargo#3666)
     test_disks.py::test_a_disk_without_locks_is_one_warning
R5   a disk without mappings (numpy#9894)
     test_disks.py::test_a_disk_without_mappings_is_read_otherwise
     test_disks.py::test_checkpoints_are_read_from_a_disk_without_mappings
R6   a first validation that is not a number (Lightning#2636)
     test_validation.py::test_a_validation_of_nan_is_never_the_best_and_is_beaten_by_the_next
R7   one bad row takes its neighbours with it, and nobody says so (TTS#390, deepspeech.pytorch#485)
     test_numbers.py::test_a_row_whose_loss_is_not_finite_is_named_then_left_out_and_stays_so
R8   an fp16 scale that sinks for ever (fairseq#2488, insightface#2277)
     test_numbers.py::test_an_fp16_scale_that_only_sinks_ends_in_an_error
R9   validation reads the head of the first manifest (Megatron-LM#29, Megatron-Bridge#618)
     test_validation.py::test_a_capped_validation_takes_rows_of_every_manifest_and_says_how_many
R10  unlike validations compared after a resume (transformers#24839, llm.c#710)
     test_validation.py::test_a_best_of_other_loss_weights_is_measured_again_or_dropped
     test_validation.py::test_a_best_of_other_validation_data_is_measured_again_or_dropped
R11  --max-steps beyond the epochs (adaptor#15, DiffSinger#214)
     test_schedule_and_small_runs.py::test_the_schedule_ends_at_the_smaller_of_max_steps_and_the_last_epochs_end
R12  another codec on resume, or two mixed (RVC#535, GPT-SoVITS#2197)
     test_validation.py::test_another_codec_on_resume_is_refused
     test_validation.py::test_training_and_validation_data_of_two_codecs_are_refused
R13  names of wrapped models (DeepLearningExamples#291, F5-TTS#459)
     test_numbers.py::test_names_of_wrapped_models_are_understood
R14  the best chosen on the demo's voice (StyleTTS2FineTune#15)
     test_validation.py::test_the_demos_voice_never_judges_somebody_elses
R15  SLURM's SIGUSR1 (Lightning#1455, submitit#1615)
     test_signals.py::test_a_signal_saves_the_last_complete_step_and_sets_the_exit_status
     test_scripts.py::test_slurms_warning_to_torchrun_reaches_its_processes_which_save_and_leave
R16  a short run without one [Train] line (F5-TTS#83, piper#664)
     test_schedule_and_small_runs.py::test_every_run_prints_ten_train_lines_unless_log_interval_is_typed
R17  out of memory in validation
     test_validation.py::test_a_validation_that_runs_out_of_memory_splits_its_batches
R18  a missing shard
     test_disks.py::test_a_missing_shard_is_one_error_before_the_first_step
R24  another codec's codes under released weights (index-tts#22, #687)
     test_validation.py::test_a_base_checkpoint_made_for_another_codec_is_refused
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import GPT, ROOT, call_trainer, data_args, load_checkpoint, make_dataset, trainer

SETTINGS = ["--batch-size", "4", "--grad-accumulation", "1", "--log-interval", "1", "--save-interval", "2",
            "--val-interval", "4", "--warmup-steps", "1"]


# ---------------------------------------------------------------------------------------------------------------------
# The table above


def rows_of_the_table() -> dict[str, list[tuple[str, str]]]:
    """{"F1": [(file, test), ...], ...}"""
    rows: dict[str, list[tuple[str, str]]] = {}
    for line in (__doc__ or "").splitlines():
        if row := re.match(r"([A-Z]\d+) +\w", line):
            rows[row[1]] = []
        elif test := re.fullmatch(r" {5}(test_\w+\.py)::(test_\w+)", line):
            rows[list(rows)[-1]].append((test[1], test[2]))
    return rows


def test_every_row_of_the_table_names_tests_that_exist():
    rows = rows_of_the_table()
    assert set(rows) >= {f"F{number}" for number in range(1, 21) if number != 15} | {f"C{n}" for n in range(1, 9)}
    missing = []
    for row, tests in rows.items():
        assert tests, row
        for file, test in tests:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            if test not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
                missing.append(f"{row}: {file}::{test}")
    assert not missing


# ---------------------------------------------------------------------------------------------------------------------
# Promises that no other file keeps


def test_a_healthy_resume_raises_no_alarm_and_waits_for_nothing(tiny, tmp_path, monkeypatch):
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--max-steps", 8]
    call_trainer(*args, "--epochs", 1)
    torch.save({}, tmp_path / "notes.pt")  # somebody's file in the same directory is no reason for alarm either
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    output = call_trainer(*args, "--resume", "auto", "--max-steps", 10)
    assert "step=10 " in output
    assert not re.search(r"\[Warn\]|\[Error\]|fail|invalid|mismatch|damaged|skipped", output, re.IGNORECASE), output
    assert not naps


def test_a_resume_reads_none_of_the_samples_that_the_run_has_passed(tiny, tmp_path, monkeypatch):
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--epochs", 1]
    call_trainer(*args, "--max-steps", 8)
    read, opened = trainer.ManifestDataset.__getitem__, []

    def note(data: Any, index: int) -> Any:
        if len(data) == 41:  # the training data
            opened.append(index)
        return read(data, index)

    monkeypatch.setattr(trainer.ManifestDataset, "__getitem__", note)
    call_trainer(*args, "--max-steps", 0, "--resume", "auto")
    assert opened == trainer.epoch_sample_order(41, 1234, 0)[32:].tolist()


def test_a_resume_reads_checkpoints_on_the_cpu_mapped_from_the_file(tiny, tmp_path, monkeypatch):
    """On a GPU whatever is loaded there first is memory that the fresh run never needed."""
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path]
    call_trainer(*args, "--max-steps", 2)
    load, calls = torch.load, []

    def note(*positional: Any, **options: Any) -> Any:
        calls.append((options["map_location"], options["mmap"]))
        return load(*positional, **options)

    monkeypatch.setattr(torch, "load", note)
    call_trainer(*args, "--max-steps", 4, "--resume", "auto")
    assert calls and set(calls) == {("cpu", True)}


PEAK_OF_OWN_MEMORY = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from trainers import train_gpt_v2 as trainer
peak = 0
def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
assert trainer.main(sys.argv[1:]) == 0
print("peak", peak)
"""


@pytest.fixture(scope="session")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with a table of 400,000 positions: a model of 51 MB whose steps take no time."""
    data = make_dataset(tmp_path_factory.mktemp("long") / "data", train_rows=8)
    (data / "config.yaml").write_text(yaml.safe_dump({"gpt": {**GPT, "max_mel_tokens": 400_000}}))
    return data


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_resumed_run_needs_no_more_memory_than_a_fresh_one(long_data, tmp_path):
    """Pages that are mapped from the checkpoint do not count: the system may take them back at any time."""
    args = [*data_args(long_data), "--output-dir", str(tmp_path / "out"), "--batch-size", "4", "--max-steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peaks = []
    for extra in (["2"], ["4", "--resume", "auto"]):
        done = subprocess.run([sys.executable, "-c", PEAK_OF_OWN_MEMORY, *args, *extra], text=True, timeout=300,
                              capture_output=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    fresh, resumed = peaks
    assert resumed <= fresh + 20, f"MiB: {fresh:.0f} fresh, {resumed:.0f} resumed"  # a copy of the weights is 51


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are read from /proc")
def test_a_resumed_run_lets_go_of_the_file_it_came_from(tiny, tmp_path, monkeypatch):
    """A file that is mapped still fills the disk after it was deleted."""
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--keep-checkpoints", 1]
    call_trainer(*args, "--max-steps", 2)
    mapped = []

    def note(event: str, *_: Any) -> None:
        if event != "logged":
            return
        maps = Path("/proc/self/maps").read_text().splitlines()
        found = {line.split(maxsplit=5)[5] for line in maps if str(tmp_path) in line}
        mapped.append([path for path in found if ".partial" not in path])  # a save is read back meanwhile

    call_trainer(*args, "--max-steps", 8, "--resume", "auto", on_event=note)
    assert len(mapped) == 6 and not any(mapped), mapped[-1]


DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.parametrize("free,level", [(10**12, "[Info]"), (10**6, "[Warn]")])
def test_a_start_says_how_much_disk_the_checkpoints_will_need_and_warns_when_it_is_too_little(
        free, level, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 10**12 - free, free))
    output = call_trainer(*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--max-steps", 1)
    (line,) = [line for line in output.splitlines() if " Disk: " in line]
    assert line.startswith(level) and f"{free / 1e9:.1f} GB free" in line
    assert ("--keep-checkpoints" in line) == (level == "[Warn]")


def test_three_starts_in_one_second_that_leave_no_checkpoint_keep_all_their_logs(tiny, tmp_path, monkeypatch):
    """As when a supervisor starts a run again and again that is killed at once."""
    args = [*data_args(tiny), *SETTINGS, "--output-dir", tmp_path, "--resume", "auto"]
    clock = time.strftime
    monkeypatch.setattr(time, "strftime", lambda text, *moment: clock(text, *moment or (time.gmtime(0),)))

    def stop_at_once(event: str, *_: Any) -> None:
        raise trainer.Stopped(15)

    for _ in range(3):
        call_trainer(*args, status=143, on_event=stop_at_once)
    call_trainer(*args, "--max-steps", 2)
    assert load_checkpoint(tmp_path / "latest.pth")["step"] == 2
    assert len(list(tmp_path.glob("abandoned_*/logs/run_*"))) == 3
    assert len(list(tmp_path.glob("logs/run_*"))) == 1
