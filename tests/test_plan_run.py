"""tools.plan_run: what it counts is what the trainer's model, its forward pass and its files have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GPT, TOKENIZER, call_trainer, data_args, read_jsonl

from tools import plan_run
from trainers import train_gpt_v2 as trainer

CONFIG = trainer.model_config_from({**GPT, "number_text_tokens": 400}, "config.yaml")
LAYOUTS = {"IndexTTS2": CONFIG, "IndexTTS-2.5": dataclasses.replace(CONFIG, languages=len(trainer.LANGUAGES) + 1)}
Planned = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(tiny: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    def plan(*args: Any, gpu: str = "a100-80gb") -> dict[str, Any]:
        plan_run.main([*map(str, args), "--train-manifest", str(tiny / "train_pairs.jsonl"), "--tokenizer",
                       str(TOKENIZER), "--gpu", gpu, "--json"])
        return dict(json.loads(capsys.readouterr().out))

    return plan


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_model(layout: str):
    model = trainer.UnifiedVoiceGPT(LAYOUTS[layout])
    assert plan_run.parameter_count(LAYOUTS[layout]) == sum(weight.numel() for weight in model.parameters())


class Kept(torch.autograd.Function):
    """Keeps what varlen attention keeps: queries, keys, values, its output, and a number for each row and head."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor) -> torch.Tensor:
        out = qkv[:, 0].flatten(1).clone()
        ctx.save_for_backward(qkv, out, torch.zeros(len(qkv), qkv.shape[2]))
        return out


def kept_bytes(config: trainer.ModelConfig, batch: trainer.PackedBatch, dtype: torch.dtype | None, recomputes: bool
               ) -> int:
    """What a forward pass on the CPU keeps for its backward pass, besides weights and the batch itself."""
    model = trainer.UnifiedVoiceGPT(config, grad_checkpointing=recomputes)
    model.attention = lambda qkv, batch: Kept.apply(qkv)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *vars(batch).values())
             if isinstance(tensor, torch.Tensor)}
    kept: dict[int, int] = {}
    casts = sum(2 * weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2 and (
        "head" in name or ".c_" in name)) if dtype else 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), trainer.Precision(
            torch.device("cpu"), dtype).autocast():
        losses = trainer.token_losses(model, batch)
    assert len(losses) == 3
    return sum(kept.values()) - (0 if recomputes else casts)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_are_within_a_tenth_of_what_a_forward_pass_keeps(layout: str, dtype: torch.dtype | None):
    config = dataclasses.replace(LAYOUTS[layout], model_dim=64, layers=3)
    rng = np.random.default_rng(0)
    samples = [trainer.Sample(rng.integers(0, 400, 25), rng.integers(0, 64, 55), np.zeros(
        config.condition_shape, np.float32), np.zeros(64, np.float32)) for _ in range(4)]
    batch = trainer.collate_packed(samples, config)
    counts = plan_run.MicroBatch(sum(batch.lengths), sum(batch.text_counts), sum(batch.mel_counts))
    planned = plan_run.kept_for_backward(config, counts, 4 if dtype is None else 2, False, False)
    assert planned == pytest.approx(kept_bytes(config, batch, dtype, False), rel=0.1)


def test_work_tokens_and_steps_are_those_that_the_trainer_counts(tiny: Path, planned: Planned):
    plan = planned("--epochs", 3)
    data = trainer.ManifestDataset([str(tiny / "train_pairs.jsonl")], CONFIG)
    batches = [trainer.collate_packed([data[i]], CONFIG) for i in range(len(data))]
    model = dataclasses.replace(CONFIG, number_text_tokens=trainer.read_tokenizer(str(TOKENIZER))["size"])
    assert plan["flops"] == pytest.approx(3 * trainer.step_flops(model, batches))
    assert plan["tokens"] == sum(sum(batch.lengths) for batch in batches)
    assert plan["steps"] == 3 * 2 and plan["samples"] == 41  # of 32


def test_batch_and_accumulation_are_the_trainers_own_choice(planned: Planned):
    for gpu, expected in (("a100-80gb", (32, 1)), ("l4", (8, 4)), ("t4", (4, 8))):
        plan = planned("--amp", gpu=gpu)
        assert (plan["batch_size"], plan["grad_accumulation"]) == expected
        assert plan["precision"] == ("fp16" if gpu == "t4" else "bf16") and plan["fits"]
    assert planned("--batch-size", 2)["grad_accumulation"] == 16


def test_checkpointing_and_less_width_need_less_memory(planned: Planned):
    full, half, recomputed = (planned(*flags)["memory"]["activations"] for flags in (
        (), ("--amp",), ("--amp", "--grad-checkpointing")))
    assert full > half > recomputed


def test_a_run_is_held_against_its_plan(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    call_trainer(*data_args(tiny), "--output-dir", tmp_path, "--max-steps", 4, "--log-interval", 1, "--batch-size", 2)
    plan_run.main(["--compare", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    for name in ("parameters", "samples in an epoch"):
        assert found["compared"][name][0] == found["compared"][name][1]
    for name, within in (("tokens a step", 0.1), ("bytes of a checkpoint", 0.2)):  # a tiny file is half names
        planned, measured = found["compared"][name]
        assert measured == pytest.approx(planned, rel=within), name
    assert found["batch_size"] == 2 and found["precision"] == "fp32" and not found["hours"]
    plan_run.main(["--compare", str(tmp_path)])
    assert "bytes of a checkpoint" in capsys.readouterr().out


def test_what_cannot_be_planned_is_said_in_a_line(tiny: Path, tmp_path: Path):
    manifest = str(tiny / "train_pairs.jsonl")
    for args, message in (
            (["--train-manifest", manifest], "give --train-manifest and --gpu"),
            (["--train-manifest", str(tmp_path / "no.jsonl"), "--gpu", "t4"], "no.jsonl: No such file"),
            (["--train-manifest", manifest, "--gpu", "t4", "--epochs", "0"], "--epochs 0: give 1 or more"),
            (["--compare", str(tmp_path)], "latest.pth: no such file")):
        with pytest.raises(plan_run.ToolError, match=message):
            plan_run.main(args)
    assert read_jsonl(tiny / "train_pairs.jsonl")
