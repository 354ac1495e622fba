"""What a training will need, before it is started: tokens, work, memory, batch, hours, checkpoints, disk.

Reads the config.yaml of the model and the lengths in the manifests, no sounds and no arrays. Batch size and
accumulation are the trainer's own choice, by its own functions, unless they are given. Memory is that of one process:
weights, gradients, Adam's two moments, the matrices in 16 bits, and what the largest micro-batch of the first epoch
keeps for its backward pass; 1 GiB more is for CUDA itself. Hours are those of the training steps at 30, 40 and 50 % of
the card's data-sheet peak.

--compare OUTPUT_DIR holds the metrics and the newest checkpoint of a run against its plan; all settings are then the
run's. --json prints the plan for programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tools._common import ToolError, info, make_parser, read_jsonl, run_program, warn
from tools.run_files import LATEST
from trainers.train_gpt_v2 import (
    NAMES,
    PEAK_FLOPS,
    ModelConfig,
    Rows,
    TrainConfig,
    UnifiedVoiceGPT,
    UserError,
    auto_hardware,
    available_cores,
    choose_batch_split,
    epoch_order,
    epoch_size,
    model_config_from,
    read_gpt_section,
    read_manifest,
    read_tokenizer,
    read_torch_file,
    split_manifest,
    step_flops,
)

FIRST_COMMAND = "python -m tools.plan_run --train-manifest processed_data/train_pairs.jsonl --gpu a100-80gb --amp"
GIB = 2**30
CUDA_ITSELF = 1.0  # GiB: its context, libraries and what its allocator cannot use
DISK_RATE = 1e9  # bytes a second, written and read back: a rented machine's NVMe
UTILISATIONS = (0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Card:
    """A GPU as torch sees it: memory in GiB; dense peaks with sums in 32 bits, FLOP a second (data sheets)."""

    name: str
    gib: float
    flops: float  # in 16 bits
    flops_fp32: float  # in TF32, where it has that
    has_bf16: bool = True


CARDS = {
    "a100-40gb": Card("A100 40 GB", 39.4, PEAK_FLOPS["A100"], 156e12),
    "a100-80gb": Card("A100 80 GB", 79.2, PEAK_FLOPS["A100"], 156e12),
    "h100": Card("H100 80 GB", 79.2, PEAK_FLOPS["H100"], 494e12),
    "h200": Card("H200", 139.8, PEAK_FLOPS["H200"], 494e12),
    "l4": Card("L4", 22.0, PEAK_FLOPS["L4"], 60e12),
    "l40s": Card("L40S", 44.4, PEAK_FLOPS["L40S"], 183e12),
    "t4": Card("T4", 14.6, PEAK_FLOPS["T4"], 8.1e12, has_bf16=False),
    "rtx3090": Card("RTX 3090", 23.6, 71e12, 35.6e12),
    "rtx4090": Card("RTX 4090", 23.5, 165e12, 82.6e12),
    "rtx5090": Card("RTX 5090", 31.4, 209.5e12, 104.8e12),
}


@dataclass
class Plan:
    """Counts are those of one epoch, `steps` and `flops` those of the run; memory and files in bytes."""

    rows: int
    samples: int
    tokens: int
    text_tokens: int
    codes: int
    epochs: int
    steps: int
    flops: float
    layers: int
    model_dim: int
    layout: str
    parameters: int
    precision: str
    batch_size: int
    grad_accumulation: int
    memory: dict[str, int]
    memory_total: int
    gpu: str
    gpu_memory: float
    fits: bool
    hours: dict[str, float]
    """By the share of the card's peak, in percent."""
    checkpoint_bytes: int
    checkpoint_seconds: float
    disk_bytes: int


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic (pure)


def parameter_count(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in UnifiedVoiceGPT(model).parameters())


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the packed sequence, and how many of them are scored."""

    rows: int
    text_scored: int
    mel_scored: int

    def logits(self, model: ModelConfig) -> int:
        return self.text_scored * (model.number_text_tokens + 1) + self.mel_scored * model.number_mel_codes


def kept_for_backward(model: ModelConfig, batch: MicroBatch, width: int, has_dropout: bool, recomputes: bool) -> int:
    """Bytes that forward passes keep; width: bytes of a number in matrix products (2 or 4). The residual stream, the
    norms' inputs and the losses are float32; attention keeps queries, keys, values and its output."""
    dim, scored = model.model_dim, batch.text_scored + batch.mel_scored
    block = dim * (2 * 4 + (1 + 3 + 1 + 1 + 4 + 4) * width + 2 * has_dropout) + 4 * model.heads
    blocks = (block + 4 * dim * (model.layers - 1) if recomputes else block * model.layers) + dim * has_dropout
    return batch.rows * blocks + scored * dim * (2 * 4 + width) + 4 * batch.logits(model)


def memory_of(model: ModelConfig, parameters: int, batch: MicroBatch, width: int, config: TrainConfig
              ) -> dict[str, int]:
    """Bytes on the GPU at the start of the backward pass, where they are most; logits are there in float32 and in their
    own width besides."""
    matrices = 12 * model.layers * model.model_dim**2 + model.model_dim * (
        model.number_text_tokens + 1 + model.number_mel_codes)
    kept = kept_for_backward(model, batch, width, config.dropout > 0, config.grad_checkpointing)
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "moments": 8 * parameters,
            "16-bit weights": 2 * matrices if width == 2 else 0,
            "activations": kept + batch.logits(model) * (4 + width), "CUDA": int(CUDA_ITSELF * GIB)}


def largest_micro_batch(model: ModelConfig, lengths: np.ndarray, order: np.ndarray, config: TrainConfig) -> MicroBatch:
    """That of the first epoch with the most rows. lengths: [rows, 2] text tokens and codes."""
    in_order = lengths[order]
    rows = np.add.reduceat(in_order.sum(axis=1), np.arange(0, len(order), config.batch_size))
    first = int(rows.argmax()) * config.batch_size
    chosen = in_order[first : first + config.batch_size]
    text, codes = chosen.sum(axis=0).tolist()
    return MicroBatch(text + codes + len(chosen) * (model.leading_rows + 4), text + len(chosen), codes + len(chosen))


def flops_of_epoch(model: ModelConfig, lengths: np.ndarray, mix: Sequence[tuple[int, float]]) -> float:
    """By the trainer's own count."""
    total, first = 0.0, 0
    for rows, weight in mix:
        text, codes = lengths[first : first + rows].T
        packed: Any = SimpleNamespace(lengths=text + codes + model.leading_rows + 4, text_counts=text + 1,
                                      mel_counts=codes + 1)
        total += step_flops(model, [packed]) * epoch_size([(rows, weight)]) / rows
        first += rows
    return total


def plan_of(model: ModelConfig, lengths: np.ndarray, mix: Sequence[tuple[int, float]], config: TrainConfig,
            card: Card | None, parameters: int) -> Plan:
    """config has batch size and accumulation; card: None for a CPU."""
    samples, order = epoch_size(mix), epoch_order(mix, config.seed, 0)
    text, codes = lengths[order].sum(axis=0).tolist()
    steps = math.ceil(samples / config.global_batch) * config.epochs
    whole = flops_of_epoch(model, lengths, mix) * config.epochs
    if config.max_steps:
        whole, steps = whole * min(1.0, config.max_steps / steps), min(steps, config.max_steps)
    width = 4 if config.amp == "off" else 2
    memory = memory_of(model, parameters, largest_micro_batch(model, lengths, order, config), width, config)
    size, total = 12 * parameters, sum(memory.values())
    peak = 0.0 if card is None else card.flops if width == 2 else card.flops_fp32
    precision = "fp32" if width == 4 else config.amp if config.amp in ("bf16", "fp16") else (
        "bf16" if card is None or card.has_bf16 else "fp16")
    return Plan(
        rows=len(lengths), samples=samples, tokens=text + codes + samples * (model.leading_rows + 4), text_tokens=text,
        codes=codes, epochs=config.epochs, steps=steps, flops=whole, layers=model.layers, model_dim=model.model_dim,
        layout=NAMES[model.languages > 0], parameters=parameters, precision=precision, batch_size=config.batch_size,
        grad_accumulation=config.grad_accumulation, memory=memory, memory_total=total,
        gpu=card.name if card else "", gpu_memory=card.gib * GIB if card else 0.0,
        fits=card is None or total <= card.gib * GIB,
        hours={f"{share:.0%}": whole / (peak * share) / 3600 for share in UTILISATIONS} if peak else {},
        checkpoint_bytes=size, checkpoint_seconds=2 * size / DISK_RATE,
        disk_bytes=size * ((config.keep_checkpoints or 1) + 2))  # and best.pth, and the one being written


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_lengths(manifests: Sequence[str]) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """[rows, 2] text tokens and codes of all manifests, and the rows and weight of each. Raises: UserError."""
    rows, due = Rows(), time.monotonic() + 2

    def tell(text: str) -> None:
        nonlocal due
        if time.monotonic() > due:
            due = time.monotonic() + 10
            print(f"[Progress] {text}", file=sys.stderr, flush=True)

    for manifest in manifests:
        read_manifest(manifest, rows, "prompt", tell)
    rows.finish()
    return rows.table[:, 2:4], rows.mix


def settings_of(args: argparse.Namespace, card: Card) -> TrainConfig:
    """With the trainer's own choice of batch size and accumulation for this card."""
    config = TrainConfig(train_manifest=args.train_manifest, epochs=args.epochs, max_steps=args.max_steps, amp=args.amp,
                         dropout=args.dropout, grad_checkpointing=args.grad_checkpointing,
                         keep_checkpoints=args.keep_checkpoints)
    largest, _ = auto_hardware("cuda", card.gib, available_cores())
    config.batch_size, config.grad_accumulation = choose_batch_split(args.batch_size, args.grad_accumulation, largest,
                                                                     None, False)
    return config


def plan_new(args: argparse.Namespace) -> Plan:
    """Raises: UserError."""
    card, manifest = CARDS[args.gpu], Path(split_manifest(args.train_manifest[0])[0])
    source = args.config or manifest.with_name("config.yaml")
    vocab = read_tokenizer(args.tokenizer)["size"] if args.tokenizer else None
    lengths, mix = read_lengths(args.train_manifest)
    model = model_config_from(read_gpt_section(source), str(source), vocab)
    return plan_of(model, lengths, mix, settings_of(args, card), card, parameter_count(model))


def card_named(device: str) -> Card | None:
    """That of an environment's "cuda NVIDIA A100-SXM4-80GB"; None where it is no card of ours."""
    words = device.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("-", " ").split()
    found = [key for key in CARDS if key.split("-")[0] in words]
    return CARDS[next((key for key in found if key.split("-")[-1] in words), found[0])] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# A run against its plan


def median_of(lines: Sequence[dict[str, Any]], kind: str, name: str) -> float:
    values = [line[name] for line in lines if line.get("kind") == kind and name in line]
    return statistics.median(values) if values else math.nan


def compare(output_dir: Path, args: argparse.Namespace) -> tuple[Plan, dict[str, tuple[float, float]]]:
    """The plan that a run had, and of each figure what was planned and what was measured. Raises: UserError,
    ToolError."""
    path = output_dir / LATEST
    if not path.is_file():
        raise ToolError(f"{path}: no such file. Give the output directory of a run that has saved a checkpoint")
    checkpoint = read_torch_file(path)
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    try:
        config = TrainConfig(**{key: value for key, value in checkpoint["config"].items() if key in known})
        config.world_size = checkpoint["environment"]["world_size"]
        device, log_dir, step = checkpoint["environment"]["device"], checkpoint["run_dir"], checkpoint["step"]
        model = model_config_from(checkpoint["model_config"], str(path), checkpoint["tokenizer"]["size"])
    except (KeyError, TypeError) as error:
        raise ToolError(f"{path}: not a checkpoint of this trainer ({error} is missing)") from error
    lines = read_jsonl(output_dir / log_dir / "metrics.jsonl", ["kind", "step"], "The run's log is needed too")
    lengths, mix = read_lengths(args.train_manifest or config.train_manifest)
    card = CARDS[args.gpu] if args.gpu else card_named(device)
    plan = plan_of(model, lengths, mix, config, card, parameter_count(model))
    speed, mfu = median_of(lines, "train", "tokens_per_second"), median_of(lines, "train", "mfu")
    tokens = plan.tokens / math.ceil(plan.samples / config.global_batch)
    figures = {
        "parameters": (plan.parameters, sum(weight.numel() for weight in checkpoint["model"].values())),
        "samples in an epoch": (plan.samples, checkpoint["train_data"]["epoch_size"]),
        "tokens a step": (tokens, checkpoint["tokens_seen"] / max(1, step)),
        "bytes of a checkpoint": (plan.checkpoint_bytes, path.stat().st_size),
        "seconds of a save": (plan.checkpoint_seconds, median_of(lines, "save", "seconds_written")),
        "hours of the run": (plan.hours.get(f"{UTILISATIONS[1]:.0%}", math.nan), tokens * plan.steps / speed / 3600),
        "share of the peak": (UTILISATIONS[1], mfu)}
    return plan, figures


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def say_plan(plan: Plan) -> None:
    info(f"Data: {plan.rows:,} rows, {plan.samples:,} samples in an epoch: {plan.tokens / 1e6:,.1f} M tokens, of these "
         f"{plan.text_tokens / 1e6:,.1f} M of text and {plan.codes / 1e6:,.1f} M codes")
    info(f"Model: {plan.layers} layers x {plan.model_dim}, {plan.parameters / 1e6:,.1f} M parameters, layout of "
         f"{plan.layout}")
    info(f"Batch size {plan.batch_size} x accumulation {plan.grad_accumulation} = global batch "
         f"{plan.batch_size * plan.grad_accumulation}; {plan.steps:,} steps in {plan.epochs} epochs, {plan.flops:.2g} "
         "FLOP")
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in plan.memory.items() if size)
    of_card = f" of the {plan.gpu}'s {plan.gpu_memory / GIB:.1f}" if plan.gpu else ""
    info(f"Memory: {parts} = {plan.memory_total / GIB:.1f}{of_card} GiB, in {plan.precision}")
    if not plan.fits:
        warn("that is more than the card has: the trainer would split micro-batches. Give --grad-checkpointing, or a "
             "smaller --batch-size")
    if plan.hours:
        info("Hours of training steps: " + ", ".join(f"{hours:,.1f} at {share} of the peak" for share, hours in
                                                      plan.hours.items()))
    free = shutil.disk_usage(".").free
    info(f"Checkpoint: {plan.checkpoint_bytes / 1e9:.2f} GB, about {plan.checkpoint_seconds:.0f} s at 1 GB/s, during "
         f"which training goes on; {plan.disk_bytes / 1e9:.1f} GB of disk for all, {free / 1e9:.0f} GB are free here")


def say_comparison(figures: dict[str, tuple[float, float]]) -> None:
    info(f"{'':24}{'planned':>16}{'measured':>16}{'ratio':>8}")
    for name, (planned, measured) in figures.items():
        ratio = measured / planned if planned else math.nan
        info(f"{name:24}{planned:16,.5g}{measured:16,.5g}{ratio:8.2f}".replace("nan", "  -"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises: ToolError naming the flag."""
    parser, default = make_parser(__doc__, FIRST_COMMAND), TrainConfig()
    parser.add_argument("--train-manifest", action="append", default=[], metavar="PATH[::LANG[@WEIGHT]]",
                        help="as the trainer's; repeatable")
    parser.add_argument("--config", type=Path, help="YAML with a gpt: section (config.yaml beside the first manifest)")
    parser.add_argument("--tokenizer", default="", help="whose size the model takes (the config's number)")
    parser.add_argument("--gpu", choices=CARDS, help="the card to plan for")
    parser.add_argument("--epochs", type=int, default=default.epochs, help=f"({default.epochs})")
    parser.add_argument("--max-steps", type=int, default=0, help="0 = no limit (0)")
    parser.add_argument("--batch-size", type=int, default=0, help="0 = the trainer's choice (0)")
    parser.add_argument("--grad-accumulation", type=int, default=0, help="0 = the trainer's choice (0)")
    parser.add_argument("--amp", nargs="?", const="auto", default="off", choices=["auto", "bf16", "fp16", "off"],
                        help="as the trainer's (off)")
    parser.add_argument("--dropout", type=float, default=default.dropout, help=f"({default.dropout:g})")
    parser.add_argument("--grad-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--keep-checkpoints", type=int, default=default.keep_checkpoints,
                        help=f"({default.keep_checkpoints})")
    parser.add_argument("--compare", type=Path, metavar="OUTPUT_DIR", help="hold a run against its plan")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    if not args.compare and not (args.train_manifest and args.gpu):
        raise ToolError("give --train-manifest and --gpu, or --compare with the output directory of a run")
    for name, least in (("epochs", 1), ("max_steps", 0), ("batch_size", 0), ("grad_accumulation", 0),
                        ("keep_checkpoints", 0)):
        if getattr(args, name) < least:
            raise ToolError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        plan, figures = compare(args.compare, args) if args.compare else (plan_new(args), {})
    except UserError as error:
        raise ToolError(str(error)) from error
    if args.json:
        print(json.dumps({**asdict(plan), **({"compared": figures} if figures else {})}))
        return
    say_plan(plan)
    if figures:
        say_comparison(figures)


if __name__ == "__main__":
    run_program(main)
