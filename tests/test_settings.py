"""Every flag of the trainer does something: a test fails when it is ignored.

TESTED names that test for each flag of --help; a flag without one fails test_every_flag_has_a_test.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import load_checkpoint, read_jsonl, resumable_state, trainer, write_manifest
from fresh_process import AT_STEP_2, SETTINGS, data_args, errs, runs, step_of, train_in_process
from old_checkpoints import make

TESTED = {
    "--train-manifest": "test_settings.py::test_manifests_are_those_that_were_typed",
    "--val-manifest": "test_settings.py::test_manifests_are_those_that_were_typed",
    "--tokenizer": "test_settings.py::test_the_tokenizer_is_the_one_that_was_typed",
    "--config": "test_settings.py::test_the_config_is_the_one_that_was_typed",
    "--base-checkpoint": "test_settings.py::test_base_weights_are_where_training_starts",
    "--output-dir": "test_settings.py::test_epochs_and_max_steps_end_the_run",
    "--resume": "test_settings.py::test_resume_goes_on_from_what_was_typed",
    "--batch-size": "test_settings.py::test_batch_size_and_accumulation_make_the_step",
    "--grad-accumulation": "test_settings.py::test_batch_size_and_accumulation_make_the_step",
    "--epochs": "test_settings.py::test_epochs_and_max_steps_end_the_run",
    "--learning-rate": "test_settings.py::test_the_learning_rate_rises_over_the_warm_up_to_its_peak",
    "--weight-decay": "test_golden_losses.py::test_the_losses_of_a_short_run_are_the_recorded_ones",
    "--warmup-steps": "test_settings.py::test_the_learning_rate_rises_over_the_warm_up_to_its_peak",
    "--max-steps": "test_settings.py::test_epochs_and_max_steps_end_the_run",
    "--log-interval": "test_settings.py::test_intervals_decide_what_is_logged_validated_and_saved",
    "--val-interval": "test_settings.py::test_intervals_decide_what_is_logged_validated_and_saved",
    "--save-interval": "test_settings.py::test_intervals_decide_what_is_logged_validated_and_saved",
    "--emo-source": "test_emo_source.py::test_target_trains_the_bits_that_rows_with_the_targets_alone_train",
    "--save-minutes": "test_schedule_and_small_runs.py::test_a_checkpoint_is_written_at_least_every_thirty_minutes",
    "--val-batch-size": "test_settings.py::test_the_validation_batch_has_the_size_that_was_typed",
    "--max-val-batches": "test_settings.py::test_a_validation_ends_after_the_batches_that_were_typed",
    "--num-workers": "test_settings.py::test_more_workers_are_more_threads_or_processes",
    "--grad-clip": "test_golden_losses.py::test_the_losses_of_a_short_run_are_the_recorded_ones",
    "--text-loss-weight": "test_golden_losses.py::test_the_losses_of_a_short_run_are_the_recorded_ones",
    "--mel-loss-weight": "test_golden_losses.py::test_the_losses_of_a_short_run_are_the_recorded_ones",
    "--amp": "test_settings.py::test_amp_alone_is_the_hardwares_best_and_off_is_float32",
    "--grad-checkpointing": "test_settings.py::test_gradient_checkpointing_recomputes_and_changes_no_bit",
    "--keep-checkpoints": "test_settings.py::test_as_many_checkpoints_are_kept_as_was_typed",
    "--seed": "test_settings.py::test_seed_and_dropout_change_what_is_trained",
    "--dropout": "test_settings.py::test_seed_and_dropout_change_what_is_trained",
    "--eval-only": "test_settings.py::test_eval_only_trains_nothing_and_writes_every_row",
    "--accept-changed-data": "test_settings.py::test_changed_data_are_accepted_only_when_that_is_typed",
    "--freeze": "test_parts.py::test_frozen_tensors_stay_bit_for_bit_and_the_others_learn",
    "--lr-scale":
        "test_parts.py::test_the_rows_of_new_tokens_learn_as_many_times_faster_as_was_asked_for",
    "--patience": "test_mixes.py::test_patience_ends_a_run_that_gets_no_better_and_more_patience_goes_on",
    "--lora-rank": "test_lora.py::test_its_checkpoint_holds_the_small_part_and_what_it_adds_to",
    "--lora-alpha": "test_lora.py::test_alpha_scales_what_is_added",
    "--lora-dropout": "test_lora.py::test_dropout_changes_what_is_learned",
    "--lora-targets": "test_lora.py::test_its_checkpoint_holds_the_small_part_and_what_it_adds_to",
    "--freeze-base-vocab": "test_settings.py::test_a_frozen_vocabulary_stays_and_the_rest_trains",
    "--compile": "test_settings.py::test_compile_is_asked_for_kernels_that_give_the_same_bits_again",
    "--profile": "test_settings.py::test_profile_writes_a_trace",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows, 5 validation rows, a tokenizer; to be changed."""
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


def train(out: Path, *args: object, data: Path = make.HERE / "data", **options: Any) -> str:
    """A run with SETTINGS, which has 4 steps an epoch. Returns what it printed."""
    return runs(train_in_process(*data_args(data), *SETTINGS, "--output-dir", out, *args, **options))


def lines_of(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    (metrics,) = out.glob("logs/run_*/metrics.jsonl")
    return [line for line in read_jsonl(metrics) if line["kind"] == kind and "manifest" not in line]


def losses_of(out: Path) -> list[float]:
    return [line["mel_loss"] for line in lines_of(out)]


def state_of(out: Path) -> dict[str, Any]:
    return resumable_state(load_checkpoint(out / "latest.pth"))


def test_every_flag_has_a_test():
    status, output = train_in_process("--help")
    flags = set(re.findall(r"^  (--[a-z-]+)", output, re.MULTILINE))
    assert status == 0 and len(flags) > 30
    assert flags <= TESTED.keys()
    for place in TESTED.values():
        file, _, name = place.partition("::")
        assert f"\ndef {name}(" in Path(__file__).with_name(file).read_text(encoding="utf-8"), place


# ---------------------------------------------------------------------------------------------------------------------
# What is trained on


def test_manifests_are_those_that_were_typed(data, tmp_path):
    write_manifest(data / "few.jsonl", read_jsonl(data / "train_pairs.jsonl")[:3])
    write_manifest(data / "one.jsonl", read_jsonl(data / "val_pairs.jsonl")[:1])
    runs(train_in_process("--train-manifest", data / "few.jsonl", "--train-manifest", f"{data / 'one.jsonl'}::am",
                          "--val-manifest", data / "one.jsonl", "--tokenizer", data / "tokenizer.model", *SETTINGS,
                          "--output-dir", tmp_path / "out", "--epochs", 1))
    checkpoint = load_checkpoint(tmp_path / "out" / "latest.pth")
    assert checkpoint["step"] == 1 and [entry["rows"] for entry in checkpoint["manifests"]["train"]] == [3, 1]
    assert [entry["language"] for entry in checkpoint["manifests"]["train"]] == [None, "am"]
    assert [entry["rows"] for entry in checkpoint["manifests"]["val"]] == [1]


def test_the_tokenizer_is_the_one_that_was_typed(data, tmp_path):
    train(tmp_path / "out", "--max-steps", 1, data=data)
    checkpoint = load_checkpoint(tmp_path / "out" / "latest.pth")
    content = (data / "tokenizer.model").read_bytes()
    assert checkpoint["tokenizer"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(checkpoint["model"]["text_head.weight"]) == checkpoint["tokenizer"]["size"] + 1 == 25


def test_the_config_is_the_one_that_was_typed(data, tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"gpt": {**make.GPT, "layers": 1}}))
    train(tmp_path / "out", "--max-steps", 1, "--config", tmp_path / "other.yaml", data=data)
    names = load_checkpoint(tmp_path / "out" / "latest.pth")["model"]
    assert "gpt.h.0.ln_1.weight" in names and "gpt.h.1.ln_1.weight" not in names


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights that no seed gives."""
    out = tmp_path_factory.mktemp("base") / "out"
    train(out, "--max-steps", 2, "--learning-rate", 0.1, "--warmup-steps", 0)
    return {name: tensor.clone() for name, tensor in load_checkpoint(out / "latest.pth")["model"].items()}


def test_base_weights_are_where_training_starts(base, tmp_path):
    torch.save(base, tmp_path / "base.pth")
    train(tmp_path / "out", "--max-steps", 1, "--base-checkpoint", tmp_path / "base.pth", "--learning-rate", 1e-30)
    model = load_checkpoint(tmp_path / "out" / "latest.pth")["model"]
    assert all(torch.equal(model[name], tensor) for name, tensor in base.items())


def test_a_frozen_vocabulary_stays_and_the_rest_trains(base, tmp_path):
    torch.save(base, tmp_path / "base.pth")
    args = ["--max-steps", 2, "--base-checkpoint", tmp_path / "base.pth", "--learning-rate", 0.1, "--warmup-steps", 0]
    train(tmp_path / "frozen", *args, "--freeze-base-vocab")
    train(tmp_path / "free", *args)
    frozen, free = (load_checkpoint(tmp_path / name / "latest.pth")["model"] for name in ("frozen", "free"))
    for name in ("text_embedding.weight", "text_head.weight"):
        assert torch.equal(frozen[name][:-1], base[name][:-1]) and not torch.equal(free[name][:-1], base[name][:-1])
    assert not torch.equal(frozen["mel_head.weight"], base["mel_head.weight"])
    norms = [lines_of(tmp_path / name)[0]["grad_norm"] for name in ("frozen", "free")]
    assert norms[0] < norms[1]  # what is frozen takes no part in clipping


def test_changed_data_are_accepted_only_when_that_is_typed(data, tmp_path):
    train(tmp_path / "out", "--max-steps", 2, data=data)
    write_manifest(data / "train_pairs.jsonl", read_jsonl(data / "train_pairs.jsonl")[:-1])
    again = ["--output-dir", tmp_path / "out", "--resume", "auto", "--max-steps", 3]
    errs(train_in_process(*again), "training data changed", "--accept-changed-data")
    runs(train_in_process(*again, "--accept-changed-data"))
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["train_data"]["rows"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# How long, how often


COUNT_BLOCKS = """
import torch
calls = []
gelu = torch.nn.functional.gelu
def counting(x, *args, **options):
    calls.extend([1] * torch.is_grad_enabled())
    return gelu(x, *args, **options)
torch.nn.functional.gelu = counting
def act():
    print("blocks", len(calls), flush=True)
{at_the_end}"""


def test_batch_size_and_accumulation_make_the_step(tmp_path):
    """13 rows: steps of 6 are 6, 6 and 1 of them, in micro-batches of at most the batch size."""
    before = COUNT_BLOCKS.format(at_the_end="""
main = trainer.main
def main_and_count(args):
    status = main(args)
    act()
    return status
trainer.main = main_and_count
""")
    for batch_size, accumulation, steps, micro_batches in ((1, 6, 3, 13), (3, 2, 3, 5), (6, 1, 3, 3), (4, 1, 4, 4)):
        out = tmp_path / f"{batch_size}x{accumulation}"
        output = train(out, "--batch-size", batch_size, "--grad-accumulation", accumulation, "--epochs", 1,
                       before=before)
        assert len(lines_of(out)) == steps and f"blocks {2 * micro_batches}\n" in output  # two layers


@pytest.mark.parametrize("args,step,epoch", [(["--epochs", 2], 8, 2), (["--epochs", 3, "--max-steps", 5], 5, 1)])
def test_epochs_and_max_steps_end_the_run(args, step, epoch, tmp_path):
    train(tmp_path / "out", *args)
    checkpoint = load_checkpoint(tmp_path / "out" / "latest.pth")
    assert (checkpoint["step"], checkpoint["epoch"]) == (step, epoch)


def test_the_learning_rate_rises_over_the_warm_up_to_its_peak(tmp_path):
    train(tmp_path / "out", "--epochs", 2, "--learning-rate", 0.004, "--warmup-steps", 4)
    rates = [line["lr"] for line in lines_of(tmp_path / "out")]
    assert rates[:4] == pytest.approx([0.001, 0.002, 0.003, 0.004]) and rates[4] < 0.004 and rates[-1] < 1e-9


def saved_steps(out: Path) -> set[int | None]:
    return {trainer.checkpoint_step(path.name) for path in out.glob("model_step*.pth")}


def test_intervals_decide_what_is_logged_validated_and_saved(tmp_path):
    out = tmp_path / "out"
    output = train(out, "--epochs", 2, "--log-interval", 3, "--val-interval", 5, "--save-interval", 6)
    assert [line["step"] for line in lines_of(out)] == [3, 6]
    assert [line["step"] for line in lines_of(out, "val")] == [5, 8]
    assert saved_steps(out) == {5, 6, 8}  # 5: the first best one
    assert re.findall(r"^\[Train\] epoch=\d step=(\d)", output, re.MULTILINE) == ["3", "6"]
    train(tmp_path / "epochs", "--epochs", 3, "--val-interval", 0, "--save-interval", 0)
    assert [line["step"] for line in lines_of(tmp_path / "epochs", "val")] == [4, 8, 12]
    assert saved_steps(tmp_path / "epochs") == {4, 12}


@pytest.mark.parametrize("keep,left", [(1, [8]), (2, [7, 8]), (0, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_as_many_checkpoints_are_kept_as_was_typed(keep, left, tmp_path):
    train(tmp_path / "out", "--epochs", 2, "--save-interval", 1, "--keep-checkpoints", keep)
    files = (tmp_path / "out").glob("model_step*.pth")
    assert sorted(int(path.stem.removeprefix("model_step")) for path in files) == left


def test_resume_goes_on_from_what_was_typed(tmp_path):
    out = tmp_path / "out"
    train(out, "--max-steps", 6)
    shutil.copytree(out, tmp_path / "copy")
    assert "Step: 6" in runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 7))
    output = runs(train_in_process("--resume", tmp_path / "copy" / "model_step4.pth", "--max-steps", 5))
    assert "Step: 4" in output and step_of(tmp_path / "copy") == 5
    for name in ("latest.pth", "model_step7.pth", "model_step6.pth"):
        (out / name).unlink()
    assert "Step: 4" in runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 5))
    for folder in (out, tmp_path / "copy"):
        assert [line["step"] for line in lines_of(folder)] == [1, 2, 3, 4, 5]  # none twice


# ---------------------------------------------------------------------------------------------------------------------
# Validation


COUNT_EVALUATIONS = """
import torch
sizes = []
cross_entropy = torch.nn.functional.cross_entropy
def counting(logits, *args, **options):
    if not torch.is_grad_enabled():
        sizes.append(len(logits))
    return cross_entropy(logits, *args, **options)
torch.nn.functional.cross_entropy = counting
main = trainer.main
def main_and_count(args):
    status = main(args)
    print("validated", len(sizes) // 2, "batches")
    return status
trainer.main = main_and_count
"""


@pytest.mark.parametrize("size,batches", [(2, 3), (5, 1), (0, 2)])
def test_the_validation_batch_has_the_size_that_was_typed(size, batches, tmp_path):
    """Of 5 rows; 0 is the batch size, 4."""
    output = train(tmp_path / "out", "--max-steps", 1, "--val-batch-size", size, before=COUNT_EVALUATIONS)
    assert f"validated {batches} batches" in output


def test_a_validation_ends_after_the_batches_that_were_typed(tmp_path):
    args = ["--batch-size", 2, "--grad-accumulation", 2, "--max-steps", 1]
    for most, batches in ((1, 1), (2, 2), (0, 3)):
        output = train(tmp_path / str(most), *args, "--max-val-batches", most, before=COUNT_EVALUATIONS)
        assert f"validated {batches} batches" in output


def test_eval_only_trains_nothing_and_writes_every_row(tmp_path):
    out = tmp_path / "out"
    train(out, "--max-steps", 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    output = runs(train_in_process("--output-dir", out, "--resume", "auto", "--eval-only"))
    assert "[Val]" in output and "[Train]" not in output
    assert [record["id"] for record in read_jsonl(out / "eval.jsonl")] == [f"val{i}" for i in range(5)]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")} == before


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


def test_seed_and_dropout_change_what_is_trained(tmp_path):
    for name, args in {"one": [], "again": [], "seed": ["--seed", 1], "dropout": ["--dropout", 0.5],
                       "none": ["--dropout", 0]}.items():
        train(tmp_path / name, "--max-steps", 2, *args)
    losses = {name: losses_of(tmp_path / name) for name in ("one", "again", "seed", "dropout", "none")}
    assert losses.pop("again") == losses["one"]
    firsts = [values[0] for values in losses.values()]
    assert len(set(firsts)) == 4  # of the first step, before any update


def test_without_dropout_the_seed_of_the_masks_does_not_matter(tmp_path):
    """Two micro-batches or one: the masks are all that could differ."""
    for batch_size, accumulation in ((2, 2), (4, 1)):
        train(tmp_path / str(batch_size), "--max-steps", 3, "--dropout", 0, "--batch-size", batch_size,
              "--grad-accumulation", accumulation)
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "4"), rel=1e-5)


def test_amp_alone_is_the_hardwares_best_and_off_is_float32(tmp_path):
    kinds = {"plain": [], "off": ["--amp", "off"], "alone": ["--amp"], "bf16": ["--amp", "bf16"],
             "fp16": ["--amp", "fp16"]}
    for name, args in kinds.items():
        train(tmp_path / name, "--max-steps", 2, *args)
    states = {name: state_of(tmp_path / name)["model"] for name in kinds}
    assert states["plain"] == states["off"] and states["alone"] == states["bf16"]  # a CPU has bfloat16
    assert len({json.dumps(states[name]) for name in ("off", "bf16", "fp16")}) == 3
    scalers = {name: load_checkpoint(tmp_path / name / "latest.pth")["scaler"] for name in kinds}
    assert scalers["fp16"]["scale"] > 0 and scalers["bf16"] is None and scalers["off"] is None


def test_gradient_checkpointing_recomputes_and_changes_no_bit(tmp_path):
    before = COUNT_BLOCKS.format(at_the_end=AT_STEP_2)
    plain = train(tmp_path / "plain", "--max-steps", 3, before=before)
    recomputed = train(tmp_path / "recomputed", "--max-steps", 3, "--grad-checkpointing", before=before)
    assert "blocks 4\n" in plain and "blocks 8\n" in recomputed
    assert state_of(tmp_path / "plain")["model"] == state_of(tmp_path / "recomputed")["model"]


def test_more_workers_are_more_threads_or_processes(tmp_path):
    before = f"""
import multiprocessing, threading
def act(): print("helpers", threading.active_count() + len(multiprocessing.active_children()), flush=True)
{AT_STEP_2}"""
    found = {}
    for workers in (1, 6):
        output = train(tmp_path / str(workers), "--max-steps", 8, "--num-workers", workers, before=before)
        found[workers] = int(re.search(r"helpers (\d+)", output)[1])  # type: ignore[index]
    assert found[6] > found[1]
    assert state_of(tmp_path / "1") == state_of(tmp_path / "6")


def test_compile_is_asked_for_kernels_that_give_the_same_bits_again(tmp_path):
    """Its own backend needs a C compiler and many seconds; that it is asked for the training step is enough."""
    before = """
import torch, torch._inductor.config as inductor
def compile_nothing(self, *args, **options):
    print("compiled", options, inductor.deterministic, inductor.split_reductions, flush=True)
torch.nn.Module.compile = compile_nothing
def as_on_a_gpu(model, precision):
    model.attention = trainer.varlen_attention = trainer.padded_attention
    return "varlen"
trainer.choose_attention = as_on_a_gpu
"""
    compiled = "compiled {'dynamic': True} True False"
    assert compiled in train(tmp_path / "out", "--max-steps", 1, "--compile", before=before)
    assert "compiled" not in train(tmp_path / "plain", "--max-steps", 1, before=before)
    args = [*data_args(make.HERE / "data"), *SETTINGS, "--output-dir", tmp_path / "cpu", "--compile"]
    errs(train_in_process(*args), "type --no-compile")


def test_profile_writes_a_trace(tmp_path):
    train(tmp_path / "out", "--max-steps", 7, "--profile")
    (trace,) = (tmp_path / "out").rglob("trace*.json")
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("flag,values", [
    ("--weight-decay", (0, 5)), ("--grad-clip", (0, 0.01)), ("--text-loss-weight", (0.1, 2)),
    ("--mel-loss-weight", (0.1, 2))])
def test_what_the_golden_losses_stand_for_matters_one_by_one(flag, values, tmp_path):
    """After two steps, so that a change of all gradients by one factor shows too."""
    losses = []
    for value in values:
        train(tmp_path / str(value), "--epochs", 2, "--learning-rate", 0.02, "--warmup-steps", 0, flag, value)
        losses.append(losses_of(tmp_path / str(value))[-1])
    assert not np.isclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("flag,value", [("--weight-decay", 5), ("--grad-clip", 0.001), ("--mel-loss-weight", 9),
                                        ("--text-loss-weight", 9), ("--dropout", 0.6), ("--learning-rate", 0.05)])
def test_what_is_typed_on_resume_counts(flag, value, half_a_run, tmp_path):
    """And is what a run with that setting from the checkpoint on computes, not what the checkpoint's settings do."""
    for name, args in {"plain": [], "typed": [flag, value]}.items():
        out = shutil.copytree(half_a_run, tmp_path / name)
        runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 7, *args))
    plain, typed = losses_of(tmp_path / "plain"), losses_of(tmp_path / "typed")
    assert plain[:4] == typed[:4] and not np.isclose(plain[-1], typed[-1], rtol=1e-5)


@pytest.fixture(scope="module")
def half_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of 4 steps. Read only."""
    out = tmp_path_factory.mktemp("half_a_run") / "out"
    train(out, "--max-steps", 4, "--learning-rate", 0.02, "--warmup-steps", 0)
    return out
