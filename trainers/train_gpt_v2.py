"""Train the GPT of IndexTTS2 (text tokens -> semantic speech codes); whatever kills a run, the same command goes on.

Two minutes on a laptop CPU, with the data that ships with the project:

    python trainers/train_gpt_v2.py --max-steps 200 --output-dir training_output --resume auto

Fine-tune the real model on one GPU; type the same line again after any interruption:

    python trainers/train_gpt_v2.py \\
      --train-manifest processed_data/train_pairs.jsonl --val-manifest processed_data/val_pairs.jsonl \\
      --tokenizer tokenizers/amharic_extended_bpe.model --config checkpoints/config.yaml \\
      --base-checkpoint checkpoints/gpt.pth --output-dir training_output --amp --resume auto

Losses of every validation row, without training:

    python trainers/train_gpt_v2.py --output-dir training_output --resume auto --eval-only

Reading order: configuration, data, sample order, model, schedule and precision, checkpoints, processes, training, main.
The sample order, the dropout masks and the learning rate are pure functions of (seed, position), so a checkpoint holds
no random-number state and a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing.connection
import multiprocessing.process
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Read when torch loads OpenMP: threads that spin for long while they wait slow each other down on a CPU in shared use.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from torch.utils.data import DataLoader, Dataset

FORMAT_VERSION = 1
REQUIRED_KEYS = ("model", "optimizer", "epoch", "step")
CONDITION_ROWS = 32  # the perceiver's latents
LEADING_ROWS = CONDITION_ROWS + 2  # and the two speed rows
TARGET_GLOBAL_BATCH = 32
MAX_BAD_FRACTION = 0.01  # of a data set's rows may have unreadable feature files
MAX_NONFINITE_STREAK = 10
MAX_WORKER_DEATHS = 3  # in a row, without a batch between them
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What numpy's, zipfile's and torch's readers have been seen to raise on damaged bytes, or may raise.
DAMAGED_FILE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, SyntaxError,
                TypeError, ValueError, pickle.UnpicklingError, struct.error, tokenize.TokenError, zipfile.BadZipFile,
                zlib.error)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKED_ROWS = 1000  # rows with files of their own that are opened before training starts
# Dense 16-bit peak of one device (vendors' data sheets), for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 125e12, "T4": 65e12,
              "V100": 125e12}


class UserError(Exception):
    """A mistake that the user can mend. The message names the file, the place in it and the remedy."""


class ResumeError(UserError):
    """A checkpoint that cannot be resumed from."""


class SaidByRank0(Exception):
    """This rank of a torchrun ends because of a fault that rank 0 reports."""


class BadFeatureFile(Exception):
    """A feature file that is missing or damaged; its row is skipped up to MAX_BAD_FRACTION."""


def first_line(error: BaseException) -> str:
    """The first sentence: what follows in PyTorch's messages is advice that does not fit here."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
    return re.split(r"(?<=[a-z]\.) ", text.strip().splitlines()[0])[0][:300]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings


def setting(default: Any, help: str, **argparse_options: Any) -> Any:
    """A TrainConfig field whose command-line flag has this help text and these argparse options."""
    factory = {"default_factory": list} if default == [] else {"default": default}
    return field(**factory, metadata={"help": help, "options": argparse_options})  # type: ignore[call-overload]


@dataclass
class TrainConfig:
    """Every setting of a run; each field is the flag of the same name. 0 or None: chosen for you, and printed."""

    train_manifest: list[str] = setting([], "training pairs, JSON lines, optional ::lang; repeatable "
                                        "(processed_data/train_pairs.jsonl)", action="append", metavar="PATH[::LANG]")
    val_manifest: list[str] = setting([], "validation pairs, likewise (processed_data/val_pairs.jsonl)",
                                      action="append", metavar="PATH[::LANG]")
    tokenizer: str = setting("", "SentencePiece model (tokenizers/amharic_extended_bpe.model)", metavar="PATH")
    config: str = setting("", "IndexTTS2 YAML with a gpt: section (config.yaml beside the first train manifest, "
                          "else checkpoints/config.yaml)", metavar="PATH")
    base_checkpoint: str = setting("", "IndexTTS2 weights to start from, e.g. checkpoints/gpt.pth", metavar="PATH")
    output_dir: str = setting("training_output", "checkpoints, logs (training_output)", metavar="DIR")
    resume: str = setting("", "'auto' (newest valid checkpoint of the output directory) or a file", metavar="auto|PATH")
    batch_size: int = setting(0, "samples in a micro-batch (by the hardware)", type=int)
    grad_accumulation: int = setting(0, "micro-batches in a step (to a global batch of 32)", type=int)
    epochs: int = setting(10, "passes over the training data (10)", type=int)
    learning_rate: float = setting(0.0, "peak learning rate (2e-5 with a base checkpoint, 1e-3 from scratch)",
                                   type=float)
    weight_decay: float = setting(0.01, "AdamW's, on matrices only (0.01)", type=float)
    warmup_steps: int | None = setting(None, "linear warm-up (1000, at most a tenth of the run)", type=int)
    max_steps: int = setting(0, "stop after this many steps; the schedule's length too (0 = no limit)", type=int)
    log_interval: int = setting(100, "steps between [Train] lines (100)", type=int)
    val_interval: int = setting(1000, "steps between validations (1000; 0 = once per epoch)", type=int)
    val_batch_size: int = setting(0, "samples in a validation batch (the batch size)", type=int)
    max_val_batches: int = setting(200, "batches in a validation (200; 0 = all)", type=int)
    num_workers: int = setting(0, "data loading processes (by the hardware)", type=int)
    grad_clip: float = setting(1.0, "largest gradient norm (1.0; 0 = no clipping)", type=float)
    text_loss_weight: float = setting(0.2, "weight of text_loss (0.2)", type=float)
    mel_loss_weight: float = setting(0.8, "weight of mel_loss (0.8)", type=float)
    amp: str = setting("off", "mixed precision; alone: bf16 where the hardware has it, else fp16", nargs="?",
                       const="auto", choices=("auto", "bf16", "fp16", "off"))
    grad_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, slower",
                                       action=argparse.BooleanOptionalAction)
    save_interval: int = setting(1000, "steps between checkpoints (1000; 0 = only at the end)", type=int)
    keep_checkpoints: int = setting(3, "newest checkpoints kept (3; 0 = all)", type=int)
    seed: int = setting(1234, "of the sample order, dropout and fresh weights (1234)", type=int)
    dropout: float = setting(0.1, "on embeddings and residuals (0.1)", type=float)
    eval_only: bool = setting(False, "print the [Val] line, write eval.jsonl, train nothing", action="store_true")
    accept_changed_data: bool = setting(False, "resume although the training data changed; the epoch starts anew",
                                        action="store_true")
    freeze_base_vocab: bool = setting(False, "leave the base checkpoint's text tokens as they are",
                                      action=argparse.BooleanOptionalAction)
    compile: bool = setting(False, "torch.compile the model", action=argparse.BooleanOptionalAction)
    profile: bool = setting(False, "write a torch.profiler trace of steps 4 to 6 of this process", action="store_true")
    world_size: int = 1  # processes; torchrun's, not a flag

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step."""
        return self.batch_size * self.grad_accumulation * self.world_size


# Settings of one process, not of the run: a resumed run does not inherit them.
PER_PROCESS = ("resume", "output_dir", "eval_only", "accept_changed_data", "profile", "world_size")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. {Path(self.prog).name} --help lists the flags")


def parse_args(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns only the settings that were typed: {field name: value}.

    Raises: UserError for unknown flags and values of the wrong type.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for item in dataclasses.fields(TrainConfig):
        if item.metadata:
            flag = "--" + item.name.replace("_", "-")
            parser.add_argument(flag, help=item.metadata["help"], **item.metadata["options"])
    return vars(parser.parse_args(argv))


def config_problems(config: TrainConfig) -> list[str]:
    """Everything that is wrong with the settings themselves, before any file is opened."""
    problems = []
    at_least = {"batch_size": 0, "grad_accumulation": 0, "epochs": 1, "weight_decay": 0, "max_steps": 0,
                "learning_rate": 0, "log_interval": 1, "val_interval": 0, "val_batch_size": 0, "max_val_batches": 0,
                "num_workers": 0, "grad_clip": 0, "text_loss_weight": 0, "mel_loss_weight": 0, "save_interval": 0,
                "keep_checkpoints": 0, "seed": 0, "warmup_steps": 0, "dropout": 0}
    for name, lowest in at_least.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= lowest):
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    if config.dropout >= 1:
        problems.append(f"--dropout {config.dropout}: must be below 1")
    if config.text_loss_weight + config.mel_loss_weight == 0:
        problems.append("--text-loss-weight and --mel-loss-weight are both 0: nothing would be learned")
    if config.accept_changed_data and not config.resume:
        problems.append("--accept-changed-data goes with --resume")
    return problems


def available_cores() -> int:
    """Those that this process may use: a SLURM job has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_hardware(device_type: str, memory_gib: float, cpu_count: int) -> tuple[int, int]:
    """Returns (largest batch size, data workers) for a device."""
    if device_type != "cuda":
        return 16, 0  # the arithmetic needs every core
    for at_least_gib, batch_size in ((70, 32), (36, 16), (20, 8), (14, 4)):
        if memory_gib >= at_least_gib:
            return batch_size, min(cpu_count, 16)
    return 2, min(cpu_count, 16)


def split_global_batch(global_batch: int, largest_batch_size: int) -> tuple[int, int]:
    """Returns (batch_size, grad_accumulation) with the largest batch size that divides the global batch."""
    batch_size = max(b for b in range(1, min(global_batch, max(largest_batch_size, 1)) + 1) if global_batch % b == 0)
    return batch_size, global_batch // batch_size


def choose_batch_split(batch_size: int, grad_accumulation: int, hardware_batch_size: int,
                       checkpoint_split: tuple[int, int, int] | None, same_device: bool, world_size: int = 1
                       ) -> tuple[int, int]:
    """Returns (batch_size, grad_accumulation) of each process; 0 means not typed.

    checkpoint_split is its (batch_size, grad_accumulation, world_size). A resumed run keeps its global batch unless
    both are typed, and on the same device its split too, since another split changes the last bits.
    Raises: UserError when what was typed, or the number of processes, does not divide the checkpoint's global batch.
    """
    if batch_size and grad_accumulation:
        return batch_size, grad_accumulation
    one, share = batch_size or grad_accumulation, max(1, TARGET_GLOBAL_BATCH // world_size)
    if checkpoint_split is None:
        if batch_size:
            return batch_size, max(1, share // batch_size)
        if grad_accumulation:
            return min(hardware_batch_size, max(1, share // grad_accumulation)), grad_accumulation
        return split_global_batch(share, hardware_batch_size)
    global_batch = math.prod(checkpoint_split)
    if not one and same_device and checkpoint_split[2] == world_size:
        return checkpoint_split[:2]
    share, rest = divmod(global_batch, world_size)
    if rest or (one and share % one):
        flag = "--batch-size" if batch_size else "--grad-accumulation"
        what = f"{world_size} processes do" if rest else f"{flag} {one} does"
        raise UserError(f"{what} not divide the checkpoint's global batch {global_batch}. Choose a divisor, or type "
                        "both --batch-size and --grad-accumulation to change the global batch")
    if not one:
        return split_global_batch(share, hardware_batch_size)
    return (one, share // one) if batch_size else (share // one, one)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Model: IndexTTS2's UnifiedVoice, the part that training uses; its tensor names are the checkpoint's


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and token numbers of the GPT: IndexTTS2's `gpt:` section."""

    model_dim: int
    layers: int
    heads: int
    max_text_tokens: int
    max_mel_tokens: int
    number_text_tokens: int
    number_mel_codes: int
    start_text_token: int = 0
    stop_text_token: int = 1
    start_mel_token: int = 8192
    stop_mel_token: int = 8193

    @property
    def code_count(self) -> int:
        """Real codes are 0 .. code_count - 1."""
        return min(self.start_mel_token, self.stop_mel_token)

    @property
    def max_code_len(self) -> int:
        return self.max_mel_tokens + 1


def model_config_from(gpt: Any, source: str, vocab_size: int | None = None) -> ModelConfig:
    """Reads a `gpt:` section; vocab_size (the tokenizer's) replaces number_text_tokens.

    Raises: UserError that lists every missing or wrong value.
    """
    if not isinstance(gpt, dict):
        raise UserError(f"{source}: no gpt: section. Use IndexTTS2's config.yaml, or the one beside the demo data")
    values = dict(gpt) if vocab_size is None else {**gpt, "number_text_tokens": vocab_size}
    problems, chosen = [], {}
    for item in dataclasses.fields(ModelConfig):
        value = values.get(item.name, item.default)
        lowest = 0 if item.name.endswith("_token") else 1
        if value is dataclasses.MISSING:
            problems.append(f"gpt.{item.name} is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            problems.append(f"gpt.{item.name} is {value!r}, not a whole number of at least {lowest}")
        chosen[item.name] = value
    if not problems:
        config = ModelConfig(**chosen)
        if config.model_dim % config.heads:
            problems.append(f"gpt.model_dim {config.model_dim} is not a multiple of gpt.heads {config.heads}")
        if max(config.start_mel_token, config.stop_mel_token) >= config.number_mel_codes:
            problems.append("gpt.start_mel_token and gpt.stop_mel_token must be below gpt.number_mel_codes")
        if not problems:
            return config
    raise UserError(f"{source}: " + "; ".join(problems))


@dataclass
class PackedBatch:
    """Samples end to end in one flat sequence of `total` rows, no padding; B samples, D = model_dim.

    A sample's rows: 32 condition rows, speed_emb[1], speed_emb[0], t + 2 text rows, c + 2 mel rows. Scored are the
    first t + 1 text rows and the first c + 1 mel rows.
    """

    rows: list[int]  # data set rows, [B]
    bad_rows: dict[int, str]  # data set row -> what is wrong with its files
    error: str  # a row contradicts the manifest or the model; "" if none does
    lengths: list[int]  # rows of each sample, [B]
    text_counts: list[int]  # scored text rows of each sample, [B]
    mel_counts: list[int]
    condition: Tensor  # [B, 32, D] float32
    emo_vec: Tensor  # [B, D] float32
    text_inputs: Tensor  # [sum(t + 2)]
    text_positions: Tensor
    mel_inputs: Tensor  # [sum(c + 2)]
    mel_positions: Tensor
    pack_order: Tensor  # [total] into cat(condition rows, 2 speed rows, text rows, mel rows)
    text_scored: Tensor  # flat rows, [sum(t + 1)]
    text_targets: Tensor
    mel_scored: Tensor  # flat rows, [sum(c + 1)]
    mel_targets: Tensor
    cu_seqlens: Tensor  # [B + 1] int32
    groups: list[Tensor]  # flat rows [g, longest] of samples of near-equal length, filled up on the right
    ungroup: Tensor  # [total] into the groups' rows end to end

    def to(self, device: torch.device) -> PackedBatch:
        move = functools.partial(Tensor.to, device=device, non_blocking=True)
        return self.map_tensors(move)

    def pin_memory(self) -> PackedBatch:
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {"groups": [change(group) for group in self.groups]}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = change(value)
        return dataclasses.replace(self, **changed)


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [in, out], y = x W + b."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def padded_attention(qkv: Tensor, batch: PackedBatch) -> Tensor:
    """The portable path: causal SDPA over groups of samples. qkv [total, 3, H, h] -> [total, H * h]."""
    _, _, heads, size = qkv.shape
    dtype, outputs = qkv.dtype, []
    if qkv.device.type == "cpu":  # its float32 kernels are twice as fast as the 16-bit ones
        qkv = qkv.float()
    for rows in batch.groups:
        grouped = qkv.index_select(0, rows.flatten()).view(*rows.shape, 3, heads, size)
        q, k, v = grouped.permute(2, 0, 3, 1, 4)
        with torch.autocast(qkv.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs.append(attended.transpose(1, 2).reshape(-1, heads * size))
    return torch.cat(outputs).index_select(0, batch.ungroup).to(dtype)


def varlen_attention(qkv: Tensor, batch: PackedBatch) -> Tensor:
    """The same on CUDA devices of sm_80 and up, 16-bit types, without filling up."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    longest = max(batch.lengths)
    out: Any = varlen_attn(q, k, v, batch.cu_seqlens, batch.cu_seqlens, longest, longest, window_size=(-1, 0))
    return out.flatten(1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.c_attn = Conv1D(config.model_dim, 3 * config.model_dim)
        self.c_proj = Conv1D(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, batch: PackedBatch, attention: Callable[[Tensor, PackedBatch], Tensor]) -> Tensor:
        qkv = self.c_attn(x).view(len(x), 3, self.heads, -1)
        return self.c_proj(attention(qkv, batch))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = Conv1D(config.model_dim, 4 * config.model_dim)
        self.c_proj = Conv1D(4 * config.model_dim, config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm GPT-2 block, dropout on both residual branches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.model_dim)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.model_dim)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, batch: PackedBatch, attention: Callable[[Tensor, PackedBatch], Tensor],
                dropout: float) -> Tensor:
        x = x + F.dropout(self.attn(self.ln_1(x), batch, attention), dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), dropout, self.training)


class GPTStack(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.model_dim)


class PositionTable(nn.Module):
    def __init__(self, length: int, dim: int):
        super().__init__()
        self.emb = nn.Embedding(length, dim)


class UnifiedVoiceGPT(nn.Module):
    """Text ids and a speaker condition in, logits for the next text token and the next code out.

    The constructor leaves the weights at PyTorch's defaults; init_fresh_weights or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0, grad_checkpointing: bool = False):
        super().__init__()
        dim = config.model_dim
        self.config, self.dropout, self.grad_checkpointing = config, dropout, grad_checkpointing
        self.attention: Callable[[Tensor, PackedBatch], Tensor] = padded_attention
        self.text_embedding = nn.Embedding(config.number_text_tokens + 1, dim)
        self.mel_embedding = nn.Embedding(config.number_mel_codes, dim)
        self.gpt = GPTStack(config)
        self.mel_pos_embedding = PositionTable(config.max_mel_tokens + 3, dim)
        self.text_pos_embedding = PositionTable(config.max_text_tokens + 2, dim)
        self.final_norm = nn.LayerNorm(dim)
        self.text_head = nn.Linear(dim, config.number_text_tokens + 1)
        self.mel_head = nn.Linear(dim, config.number_mel_codes)
        self.speed_emb = nn.Embedding(2, dim)

    def embed(self, batch: PackedBatch) -> Tensor:
        """[total, D]: the sequence given to the transformer."""
        condition = batch.condition + batch.emo_vec.unsqueeze(1)
        text = self.text_embedding(batch.text_inputs) + self.text_pos_embedding.emb(batch.text_positions)
        mel = self.mel_embedding(batch.mel_inputs) + self.mel_pos_embedding.emb(batch.mel_positions)
        rows = torch.cat([condition.flatten(0, 1), self.speed_emb.weight, text, mel])
        return rows.index_select(0, batch.pack_order)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Returns logits at the scored positions: text [sum(t + 1), V + 1] and mel [sum(c + 1), M]."""
        x = F.dropout(self.embed(batch), self.dropout, self.training)
        for block in self.gpt.h:
            run_block = functools.partial(recompute_in_backward, block, use_reentrant=False) if (
                self.grad_checkpointing and self.training) else block
            x = run_block(x, batch, self.attention, self.dropout)
        scored = torch.cat([x.index_select(0, batch.text_scored), x.index_select(0, batch.mel_scored)])
        scored = self.final_norm(self.gpt.ln_f(scored))
        return self.text_head(scored[: len(batch.text_scored)]), self.mel_head(scored[len(batch.text_scored) :])


def token_losses(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies in nats of every scored text token and code, and whether the code was the likeliest one."""
    text_logits, mel_logits = model(batch)
    text = F.cross_entropy(text_logits.float(), batch.text_targets, reduction="none")
    mel = F.cross_entropy(mel_logits.float(), batch.mel_targets, reduction="none")
    return text, mel, mel_logits.detach().argmax(-1) == batch.mel_targets


def summed_losses(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the micro-batch of what token_losses returns; the caller divides by the whole step's token counts."""
    text, mel, right = token_losses(model, batch)
    return text.sum(), mel.sum(), right.sum()


def sinusoids(times: Tensor, dim: int, rms: float = 0.02) -> Tensor:
    """[len(times), dim] sines and cosines of wavelengths from 2 pi to 20,000 pi, as in Attention Is All You Need."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, dim, 2) / dim)
    angles = times.float().unsqueeze(1) * frequencies
    return rms * math.sqrt(2) * torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]


def init_fresh_weights(model: UnifiedVoiceGPT, seed: int, codes_per_text_token: float) -> None:
    """IndexTTS2's initial distributions, except that the position tables start as sinusoids of time.

    Text position i and code position i * codes_per_text_token get the same vector, so that attention finds the text
    that is being spoken sooner (knowledge.md has figures).
    """
    generator = torch.Generator().manual_seed(seed)
    projection_std = 0.02 / math.sqrt(2 * model.config.layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("text_head.weight", "text_head.bias", "mel_head.weight", "mel_head.bias"):
                bound = 1 / math.sqrt(model.config.model_dim)
                weight.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias") or name == "speed_emb.weight":
                weight.zero_()
            elif re.search(r"(ln_1|ln_2|ln_f|final_norm)\.weight$", name):
                weight.fill_(1)
            else:
                std = projection_std if name.endswith("c_proj.weight") else 0.02
                weight.normal_(0, std, generator=generator)
        for table, rate in ((model.text_pos_embedding, codes_per_text_token), (model.mel_pos_embedding, 1.0)):
            times = torch.arange(table.emb.num_embeddings) * rate
            table.emb.weight.copy_(sinusoids(times, model.config.model_dim))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Data


def read_model_yaml(path: Path) -> dict[str, Any]:
    """The whole YAML file as a dict. Raises: UserError."""
    try:
        with path.open(encoding="utf-8") as handle:
            content = yaml.safe_load(handle)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: no gpt: section. Use IndexTTS2's config.yaml")
    return content


@dataclass(slots=True)
class Row:
    """One line of a manifest. A start of None means that the file holds this utterance alone."""

    id: str
    place: str  # "manifest:line", for messages
    text_len: int
    code_len: int
    text_path: str
    text_start: int | None
    codes_path: str
    codes_start: int | None
    condition_path: str
    condition_start: int | None
    emo_path: str
    emo_start: int | None


@dataclass
class Sample:
    """What the model sees of one row: text_ids [t] and codes [c] int64, condition [32, D] and emo_vec [D] float32."""

    text_ids: np.ndarray
    codes: np.ndarray
    condition: np.ndarray
    emo_vec: np.ndarray
    row: int = 0


@dataclass
class BrokenRow:
    """A row that cannot be used: its feature file is damaged, or (fatal) contradicts the manifest or the model."""

    row: int
    reason: str
    fatal: bool


def split_language(manifest: str) -> tuple[str, str | None]:
    """'a.jsonl::am' -> ('a.jsonl', 'am'); only ::lang is a suffix, '@' and '=' belong to the path."""
    path, separator, language = manifest.rpartition("::")
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z-]*", language):
        return path, language.lower()
    return manifest, None


def recorded_sha256(manifest: Path, name: str) -> str:
    """Of the tokenizer or codec (name) that a manifest was made with: dataset.NAME_sha256 of the config.yaml beside it.

    "" where none is recorded. Raises: UserError.
    """
    beside = manifest.with_name("config.yaml")
    dataset = read_model_yaml(beside).get("dataset") if beside.is_file() else None
    return str(dataset.get(f"{name}_sha256") or "") if isinstance(dataset, dict) else ""


def parse_row(record: Any, place: str, folder: Path) -> Row:
    """Raises: UserError that names what is missing or wrong in the row."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: not a JSON object. Each line is one pair, as tools.build_pairs writes it")
    emo = "prompt_emo_vec" if record.get("prompt_emo_vec_path") else "target_emo_vec"
    paths = ("target_text_ids", "target_codes", "prompt_condition", emo)
    missing = [key for key in ("id", "target_text_len", "target_code_len") if record.get(key) in (None, "")]
    missing += [f"{name}_path" for name in paths if not isinstance(record.get(f"{name}_path"), str)]
    if missing:
        hint = ("A manifest of single clips? Pair it with tools.build_pairs" if "codes_path" in record else
                "Build the manifest with tools.build_pairs, or delete the line")
        raise UserError(f"{place}: missing {', '.join(missing)}. {hint}")
    numbers = ["target_text_len", "target_code_len"] + [f"{name}_start" for name in paths if f"{name}_start" in record]
    for key in numbers:
        value, lowest = record[key], 1 if key.endswith("_len") else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise UserError(f"{place}: {key} is {value!r}, not a whole number of at least {lowest}")
    located: list[Any] = []
    for name in paths:
        # Interned: a shard's name stands in every row.
        located += [sys.intern(str(folder / record[f"{name}_path"])), record.get(f"{name}_start")]
    return Row(str(record["id"]), place, record["target_text_len"], record["target_code_len"], *located)


def read_manifest(path: Path, check_stop: Callable[[], None]) -> list[Row]:
    """Raises: UserError for a missing or empty file, and for a bad line with its number."""
    rows = []
    try:
        with path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if number % 1000 == 0:
                    check_stop()
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{place}: broken JSON ({error.msg} at column {error.colno}). "
                                    "Mend or delete the line") from error
                rows.append(parse_row(record, place, path.parent))
    except OSError as error:
        raise UserError(f"manifest {path}: {error.strerror}. Check --train-manifest and --val-manifest") from error
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise UserError(f"manifest {path}: no rows. Build it with tools.build_pairs")
    return rows


def value_out_of_range(kind: str, value: int, limit: int) -> str:
    if kind == "text":
        return (f"text id {value} is outside 0..{limit - 1}. The manifest was made with another tokenizer: pass that "
                "one as --tokenizer, or preprocess again")
    return f"code {value} is outside 0..{limit - 1}. The config's number_mel_codes is not that of the codec"


class ManifestDataset(Dataset):
    """Rows of one or more manifests; item i is a Sample, or a BrokenRow."""

    def __init__(self, manifests: Sequence[str], model: ModelConfig, check_stop: Callable[[], None]):
        self.model = model
        self.rows: list[Row] = []
        self.manifests: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        for manifest in manifests:
            path, language = split_language(manifest)
            rows = read_manifest(Path(path), check_stop)
            self.rows += rows
            self.manifests.append({"path": path, "language": language, "rows": len(rows),
                                   "codec_sha256": recorded_sha256(Path(path), "codec")})
        self.check_lengths()
        self.check_shards()
        self.bad_rows: dict[int, str] = {}  # skipped so far, and why
        self.bad_rows_at_start: dict[int, str] = {}
        self.unreported: dict[int, str] = {}  # met by this process, not yet known to the others
        with_own_files = [i for i, row in enumerate(self.rows) if row.codes_start is None or row.text_start is None]
        for i in with_own_files[:CHECKED_ROWS]:
            check_stop()
            broken = self[i]
            if isinstance(broken, BrokenRow):
                if broken.fatal:
                    raise UserError(broken.reason)
                self.bad_rows_at_start[i] = broken.reason

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of row ids, lengths and order; never of paths, so that a data set may move."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.id, row.text_len, row.code_len]).encode())
        return digest.hexdigest()

    def check_lengths(self) -> None:
        longest_text, longest_codes = self.model.max_text_tokens, self.model.max_code_len
        long = [row for row in self.rows if row.text_len > longest_text or row.code_len > longest_codes]
        if long:
            row = long[0]
            raise UserError(f"{row.place}: {row.text_len} text tokens and {row.code_len} codes; the model takes at "
                            f"most {longest_text} and {longest_codes}. {len(long)} of {len(self.rows)} rows are too "
                            "long: leave them out (tools.build_pairs has length limits)")

    def check_shards(self) -> None:
        """Bounds and value range of every shard array, at once. Raises: UserError that names the row."""
        limits = {"text": self.model.number_text_tokens, "codes": self.model.code_count}
        for kind, limit in limits.items():
            by_file: dict[str, list[Row]] = {}
            for row in self.rows:
                if getattr(row, f"{kind}_start") is not None:
                    by_file.setdefault(getattr(row, f"{kind}_path"), []).append(row)
            for path, rows in by_file.items():
                self.check_shard(path, rows, kind, limit)

    def check_shard(self, path: str, rows: list[Row], kind: str, limit: int) -> None:
        if not Path(path).is_file():
            return  # a bad feature file, counted when its rows are read
        try:
            array = self.open_array(path, shard=True)
        except BadFeatureFile:
            return  # likewise
        starts = np.array([row.text_start if kind == "text" else row.codes_start for row in rows])
        ends = starts + [row.text_len if kind == "text" else row.code_len for row in rows]
        outside = np.flatnonzero(ends > len(array))
        if len(outside):
            i = int(outside[0])
            raise UserError(f"{rows[i].place}: {kind} {starts[i]} to {ends[i]} lie beyond the end of {path} "
                            f"({len(array)} values). Manifest and arrays are not of one run of tools.preprocess")
        wrong = np.flatnonzero((np.asarray(array) < 0) | (np.asarray(array) >= limit))
        for at in wrong:
            hit = np.flatnonzero((starts <= at) & (at < ends))
            if len(hit):
                place = rows[int(hit[0])].place
                raise UserError(f"{place}: {value_out_of_range(kind, int(array[at]), limit)} ({path})")

    def open_array(self, path: str, shard: bool) -> np.ndarray:
        """Raises: BadFeatureFile."""
        if path in self.arrays:
            return self.arrays[path]
        try:
            array = np.load(path, mmap_mode="r" if shard else None, allow_pickle=False)
        except (OSError, MemoryError, *DAMAGED_FILE) as error:
            raise BadFeatureFile(f"{path}: {first_line(error)}") from error
        if not isinstance(array, np.ndarray):
            raise BadFeatureFile(f"{path}: not a .npy array")
        if shard:
            self.arrays[path] = array
        return array

    def read_ids(self, row: Row, kind: str, path: str, start: int | None, length: int, limit: int) -> np.ndarray:
        array = self.open_array(path, shard=start is not None)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise UserError(f"{row.place}: {path} is {array.dtype} {list(array.shape)}, not a row of whole numbers")
        values = array[start or 0 : (start or 0) + length].astype(np.int64)
        if len(values) != length or (start is None and len(array) != length):
            raise UserError(f"{row.place}: the manifest says {length} {kind}, {path} has {len(array)}. "
                            "Preprocess the recording again")
        if values.min() < 0 or values.max() >= limit:
            worst = int(values.min() if values.min() < 0 else values.max())
            raise UserError(f"{row.place}: {value_out_of_range(kind, worst, limit)} ({path})")
        return values

    def read_vectors(self, row: Row, path: str, start: int | None, shape: tuple[int, ...]) -> np.ndarray:
        array = self.open_array(path, shard=start is not None)
        if start is not None:
            array = array[start : start + (shape[0] if len(shape) == 2 else 1)]
        values = np.array(array, dtype=np.float32)
        if len(shape) == 1:
            values = values.reshape(-1)
        if values.shape != shape:
            raise UserError(f"{row.place}: {path} holds {list(values.shape)}, the model needs {list(shape)}. "
                            "Use the config the features were made for")
        if not np.isfinite(values).all():
            raise BadFeatureFile(f"{path}: not finite")
        return values

    def __getitem__(self, index: int) -> Sample | BrokenRow:
        row, model = self.rows[index], self.model
        try:
            return Sample(
                self.read_ids(row, "text", row.text_path, row.text_start, row.text_len, model.number_text_tokens),
                self.read_ids(row, "codes", row.codes_path, row.codes_start, row.code_len, model.code_count),
                self.read_vectors(row, row.condition_path, row.condition_start, (CONDITION_ROWS, model.model_dim)),
                self.read_vectors(row, row.emo_path, row.emo_start, (model.model_dim,)),
                index)
        except (BadFeatureFile, UserError) as error:  # returned: an exception from a worker would lose its shape
            return BrokenRow(index, str(error), fatal=isinstance(error, UserError))

    def note_bad_rows(self, found: dict[int, str]) -> list[str]:
        """Remembers skipped rows; returns one line for each new one. Raises: UserError above MAX_BAD_FRACTION."""
        new = {i: reason for i, reason in found.items() if i not in self.bad_rows}
        self.bad_rows.update(new)
        lines = [f"{self.rows[i].place}: skipped, feature file {reason}" for i, reason in new.items()]
        if len(self.bad_rows) > MAX_BAD_FRACTION * len(self):
            shown = "\n".join(f"  {self.rows[i].place}: {reason}" for i, reason in list(self.bad_rows.items())[:5])
            raise UserError(f"{len(self.bad_rows)} of {len(self)} rows have missing or damaged feature files, more "
                            f"than {MAX_BAD_FRACTION:.0%}. Preprocess them again or drop the rows. The first:\n{shown}")
        return lines


def near_equal_groups(lengths: Sequence[int], ratio: float = 1.25) -> list[list[int]]:
    """Sample numbers in groups whose longest is at most `ratio` times their shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and lengths[i] <= ratio * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def group_rows(lengths: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """PackedBatch.groups and .ungroup. Rows that fill a group up are causally behind every real row: never seen."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    groups, ungroup, offset = [], np.zeros(int(starts[-1]), dtype=np.int64), 0
    for members in near_equal_groups(lengths):
        longest = max(lengths[i] for i in members)
        grid = np.zeros((len(members), longest), dtype=np.int64)
        for at, i in enumerate(members):
            grid[at, : lengths[i]] = np.arange(starts[i], starts[i + 1])
            ungroup[starts[i] : starts[i + 1]] = offset + at * longest + np.arange(lengths[i])
        offset += grid.size
        groups.append(torch.from_numpy(grid))
    return groups, torch.from_numpy(ungroup)


def collate_packed(samples: Sequence[Sample | BrokenRow], model: ModelConfig) -> PackedBatch:
    """Lays samples end to end; broken rows are left out and named in bad_rows."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    broken = [sample for sample in samples if isinstance(sample, BrokenRow)]
    speed_at = CONDITION_ROWS * len(good)
    text_at = speed_at + 2
    mel_at = text_at + sum(len(s.text_ids) + 2 for s in good)
    names = ("text_inputs", "text_positions", "mel_inputs", "mel_positions", "pack_order", "text_scored",
             "text_targets", "mel_scored", "mel_targets")
    parts: dict[str, list[Any]] = {name: [np.zeros(0, dtype=np.int64)] for name in names}
    flat = 0
    for i, s in enumerate(good):
        t, c = len(s.text_ids), len(s.codes)
        text = np.concatenate([[model.start_text_token], s.text_ids, [model.stop_text_token]])
        mel = np.concatenate([[model.start_mel_token], s.codes, [model.stop_mel_token]])
        text_row = flat + LEADING_ROWS
        mel_row = text_row + t + 2
        parts["text_inputs"].append(text)
        parts["text_positions"].append(np.arange(t + 2))
        parts["mel_inputs"].append(mel)
        parts["mel_positions"].append(np.arange(c + 2))
        parts["pack_order"] += [CONDITION_ROWS * i + np.arange(CONDITION_ROWS), [speed_at + 1, speed_at],
                                text_at + np.arange(t + 2), mel_at + np.arange(c + 2)]
        parts["text_scored"].append(text_row + np.arange(t + 1))
        parts["text_targets"].append(text[1:])
        parts["mel_scored"].append(mel_row + np.arange(c + 1))
        parts["mel_targets"].append(mel[1:])
        text_at, mel_at, flat = text_at + t + 2, mel_at + c + 2, mel_row + c + 2
    lengths = [LEADING_ROWS + len(s.text_ids) + 2 + len(s.codes) + 2 for s in good]
    groups, ungroup = group_rows(lengths)
    condition = np.array([s.condition for s in good], dtype=np.float32).reshape(-1, CONDITION_ROWS, model.model_dim)
    emo_vec = np.array([s.emo_vec for s in good], dtype=np.float32).reshape(-1, model.model_dim)
    return PackedBatch(
        rows=[s.row for s in good], bad_rows={b.row: b.reason for b in broken if not b.fatal},
        error=next((b.reason for b in broken if b.fatal), ""), lengths=lengths,
        text_counts=[len(s.text_ids) + 1 for s in good], mel_counts=[len(s.codes) + 1 for s in good],
        condition=torch.from_numpy(condition), emo_vec=torch.from_numpy(emo_vec),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), groups=groups, ungroup=ungroup,
        **{name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()})


def idle_batch(config: ModelConfig) -> PackedBatch:
    """One sample of nothing, for a rank without samples in a step: gradients are exchanged in the backward pass."""
    condition = np.zeros((CONDITION_ROWS, config.model_dim), np.float32)
    sample = Sample(np.zeros(1, np.int64), np.zeros(1, np.int64), condition, condition[0])
    return collate_packed([sample], config)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Sample order: pure functions of (seed, epoch, position)


def epoch_sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 .. num_samples - 1 that an epoch walks through; depends on nothing else."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


def step_sample_indices(order: np.ndarray, sample_in_epoch: int, global_batch: int) -> np.ndarray:
    """The samples of one step: the next global_batch of the epoch, or what is left of it."""
    return order[sample_in_epoch : sample_in_epoch + global_batch]


def rank_slice(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """One process's contiguous part of a step's samples; the parts differ by at most one sample, and may be empty."""
    return np.array_split(indices, world_size)[rank]


def split_micro_batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """A step's samples as micro-batches of at most batch_size."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def dropout_seed(seed: int, step: int, micro_step: int, rank: int = 0) -> int:
    """Every micro-batch draws its dropout masks from a seed of its own, so any step can be recomputed alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {micro_step} {rank}".encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps done, `sample_in_epoch` samples of `epoch` consumed."""

    epoch: int = 0
    sample_in_epoch: int = 0
    step: int = 0

    @property
    def last_epoch(self) -> int:
        """The epoch whose samples the last step consumed."""
        return self.epoch - 1 if self.step and self.sample_in_epoch == 0 else self.epoch

    def after_step(self, num_samples: int, global_batch: int) -> Position:
        consumed = self.sample_in_epoch + global_batch
        if consumed >= num_samples:
            return Position(self.epoch + 1, 0, self.step + 1)
        return Position(self.epoch, consumed, self.step + 1)


def remaining_steps(position: Position, num_samples: int, global_batch: int, epochs: int) -> int:
    """Steps until the end of the last epoch."""
    if position.epoch >= epochs:
        return 0
    return (math.ceil((num_samples - position.sample_in_epoch) / global_batch)
            + (epochs - position.epoch - 1) * math.ceil(num_samples / global_batch))


def step_micro_batches(order: np.ndarray, position: Position, config: TrainConfig, rank: int = 0) -> list[np.ndarray]:
    """The micro-batches that one process runs in the step after `position`; none where samples are too few."""
    indices = step_sample_indices(order, position.sample_in_epoch, config.global_batch)
    return split_micro_batches(rank_slice(indices, rank, config.world_size), config.batch_size)


def micro_batches_from(position: Position, num_samples: int, config: TrainConfig, rank: int = 0
                       ) -> Iterator[list[int]]:
    """Sample indices of every micro-batch of one process from a position to the end of the last epoch."""
    while position.epoch < config.epochs:
        order = epoch_sample_order(num_samples, config.seed, position.epoch)
        epoch = position.epoch
        while position.epoch == epoch:
            for micro_batch in step_micro_batches(order, position, config, rank):
                yield micro_batch.tolist()
            position = position.after_step(num_samples, config.global_batch)


def count_micro_steps(position: Position, num_samples: int, config: TrainConfig, rank: int = 0) -> int:
    """How many micro-batches one process runs in the step after `position`."""
    samples = np.arange(min(config.global_batch, num_samples - position.sample_in_epoch))
    return len(split_micro_batches(rank_slice(samples, rank, config.world_size), config.batch_size))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Process and state of a run


class Stopped(Exception):
    """A stop signal arrived; carries its number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP set a flag that check() turns into Stopped; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.interrupts = 0

    def install(self) -> None:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup, a background job: stays ignored
                signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: object = None) -> None:
        self.interrupts += signum == signal.SIGINT
        if self.interrupts == 2:
            os._exit(128 + signal.SIGINT)
        self.signum = self.signum or signum

    def check(self) -> None:
        if self.signum:
            raise Stopped(self.signum)


def die_with_parent(signum: signal.Signals) -> None:
    if platform.system() == "Linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signum))


def start_worker(worker: int, trainer_pid: int) -> None:
    """Data workers: Ctrl+C reaches the whole process group, and only the trainer decides what it means.

    They die with the trainer. PyTorch's watchdog alone is not enough: it takes the parent that it finds for the
    trainer, and that is process 1 when the trainer was killed while its worker started.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    if multiprocessing.get_start_method() == "fork" and os.getppid() != trainer_pid:
        os._exit(1)


@dataclass(frozen=True)
class World:
    """The processes that train one model together, as torchrun tells; one alone has no process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_rank_0(self, value: Any) -> Any:
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def world_from(environ: Mapping[str, str]) -> World:
    """Reads torchrun's variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in environ for name in names) or environ["WORLD_SIZE"] == "1":
        return World()
    rank, size, local_rank, local_size = (int(environ[name]) for name in names)
    return World(rank, size, local_rank, local_size)


@contextlib.contextmanager
def process_group(world: World) -> Iterator[None]:
    """gloo for what lives on the CPU (stop flags, token counts), NCCL for gradients on GPUs."""
    if world.size == 1:
        yield
        return
    die_with_parent(signal.SIGTERM)  # a torchrun that is killed at once would leave its ranks behind, with the lock
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun started {world.local_size} processes, this machine has "
                            f"{torch.cuda.device_count()} GPUs. Start one process per GPU")
        torch.cuda.set_device(world.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()  # after a fault the others may be gone: nothing to say good-bye to


@contextlib.contextmanager
def same_on_all_ranks(world: World) -> Iterator[None]:
    """For faults that every rank finds at the same point: rank 0 says them, once."""
    try:
        yield
    except UserError as error:
        if world.rank > 0:
            raise SaidByRank0 from error
        raise


def is_lost_contact(error: BaseException) -> bool:
    """Whether another rank went away, as gloo (a plain RuntimeError) and NCCL report it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Console:
    """Flushed lines, with a progress bar under them on a terminal. A lost output counts as SIGHUP."""

    def __init__(self, stop: StopSignal, out: TextIO):
        self.stop, self.out, self.bar = stop, out, ""
        self.progress_due = 0.0

    def write(self, text: str) -> None:
        try:
            self.out.write(text)
            self.out.flush()
        except OSError as error:
            if error.errno in FULL_DISK:  # output goes to a file there: what does not fit is dropped
                return
            # The reader is gone: a closed pipe, a lost terminal.
            self.out = open(os.devnull, "w")
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                self.stop.receive(signal.SIGHUP)

    def say(self, line: str) -> None:
        blank = "\r" + " " * len(self.bar) + "\r" if self.bar else ""
        self.write(f"{blank}{line}\n{self.bar}")

    def progress(self, text: str, line: str = "") -> None:
        """`text` as a bar on a terminal; elsewhere `line` (or `text`) every ten seconds, as the tools print it."""
        if not self.out.isatty():
            if time.monotonic() >= self.progress_due:
                self.progress_due = time.monotonic() + 10
                self.say(f"[Progress] {line or text}")
        else:
            columns = shutil.get_terminal_size().columns - 1
            longest, self.bar = len(self.bar), text[:columns]
            self.write(f"\r{self.bar.ljust(min(longest, columns))}")

    def end_progress(self) -> None:
        if self.bar:
            self.bar = ""
            self.write("\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; it takes its place when the block ends well, and is gone otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # replacing one link by another to the same file leaves both names


@contextlib.contextmanager
def writable(output_dir: Path) -> Iterator[None]:
    """Raises: UserError for an output directory that cannot be made or written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: {error.strerror}. Choose a directory you can write to") from error


@contextlib.contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """One trainer per output directory. Raises: UserError that names the holder.

    A POSIX record lock: children do not inherit it, so data workers of a killed run never hold it.
    """
    with writable(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = (output_dir / ".lock").open("a+")
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise UserError(f"--output-dir {output_dir} is in use by {holder}. Stop that run, or choose another "
                            "directory") from error
        handle.truncate(0)
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        try:
            os.write(handle.fileno(), holder.encode())
        except OSError as error:
            raise UserError(f"--output-dir {output_dir}: {error.strerror}. Free some disk space and "
                            "start again") from error
        for leftover in output_dir.glob(".*.pth.partial"):  # only a killed save leaves them
            leftover.unlink()
        yield


def ignore_os_errors(failure: threading.ExceptHookArgs) -> None:
    """Keeps TensorBoard's writer thread from printing stack frames on a full disk; MetricsLog sees that by itself."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


class MetricsLog:
    """metrics.jsonl (every value in full precision) and TensorBoard events of one run directory.

    While the disk is full lines wait in memory, and TensorBoard's events are left out.
    """

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.file = (directory / "metrics.jsonl").open("ab", buffering=0)
        self.unwritten = b""
        self.lock = threading.Lock()  # a checkpoint's writer flushes while training writes
        self.tensorboard: Any = None
        self.open_tensorboard(first_step)

    def open_tensorboard(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = ignore_os_errors
        self.tensorboard = SummaryWriter(str(self.directory), purge_step=first_step)

    def write(self, kind: str, position: Position, values: dict[str, float]) -> None:
        """kind is "train", "val" or "save"; the line is on its way to the disk when this returns."""
        line = {"kind": kind, "epoch": position.last_epoch, "step": position.step, **values}
        with self.lock:
            self.unwritten += json.dumps(line).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk; flush() will try again, and report it
            self.write_lines()
        try:
            if self.tensorboard is None:
                self.open_tensorboard(position.step)
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, position.step)
        except OSError:
            self.tensorboard = None

    def write_lines(self) -> None:
        with self.lock:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def flush(self) -> None:
        """Everything so far is on the disk when this returns. Raises: OSError."""
        self.write_lines()
        os.fsync(self.file.fileno())
        tensorboard = self.tensorboard
        if tensorboard is not None:
            tensorboard.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the last save was refused too, and said so
            self.flush()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def cut_metrics(path: Path, last_step: int, validation_owed: bool) -> list[str]:
    """Drops lines that a resumed run will write again, and a torn last line. Returns what was dropped."""
    if not path.exists():
        return []
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else {"step": math.inf}
        except json.JSONDecodeError:
            record = {"step": math.inf}
        again = record["step"] > last_step or (
            validation_owed and record["step"] == last_step and record["kind"] == "val")
        (dropped if again else kept).append(line)
    if dropped:
        with replacing(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
    return dropped


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to base_lr, then half a cosine to 0 at total_steps."""

    base_lr: float
    warmup_steps: int
    total_steps: int


@dataclass
class Precision:
    """What autocast and the gradient scaler need to know."""

    device: torch.device
    dtype: torch.dtype | None = None  # None: float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def needs_scaler(self) -> bool:
        return self.dtype == torch.float16


@dataclass
class TrainState:
    """What a run remembers besides weights and optimizer; all of it is in every checkpoint."""

    position: Position = Position()
    schedule: Schedule | None = None
    best: dict[str, float] | None = None  # {"step", "loss"} of the best validation
    last_val: dict[str, float] | None = None
    validation_owed: bool = False
    recent_checkpoints: list[str] = field(default_factory=list)
    rotated_out: list[str] = field(default_factory=list)  # deletions that the newest save still has to do
    run_dir: str = ""  # relative to the output directory
    base_vocab: int = 0  # text tokens of the base checkpoint, for --freeze-base-vocab
    tokens_seen: int = 0


@dataclass
class Save:
    """One checkpoint on its way to the disk, then what came of it."""

    path: Path
    links: list[Path]  # latest.pth, best.pth
    delete: list[Path]  # rotated out
    position: Position
    best: dict[str, float] | None  # what best.pth holds after this save; None: the save is not the best
    validation_owed: bool
    rotation_before: tuple[list[str], list[str]]  # recent_checkpoints and rotated_out, should the disk refuse
    seconds_blocked: float = 0.0
    seconds_written: float = 0.0
    bytes: int = 0
    error: Exception | None = None
    link_error: Exception | None = None
    written: Future[None] | None = None


@dataclass
class Run:
    """Everything the training loop works with."""

    config: TrainConfig
    output_dir: Path
    precision: Precision
    model: UnifiedVoiceGPT
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    carried: dict[str, Tensor]  # tensors of the base checkpoint that the loss does not use
    gpt_section: dict[str, Any]
    tokenizer: dict[str, Any]  # path, sha256, size
    train_data: ManifestDataset
    val_data: ManifestDataset
    state: TrainState
    console: Console
    stop: StopSignal
    workers: int
    world: World = World()
    ddp: DistributedDataParallel | None = None  # of the model, with several processes
    metrics: MetricsLog | None = None  # rank 0's
    frozen: dict[str, Tensor] = field(default_factory=dict)  # first rows of VOCAB_TENSORS, for --freeze-base-vocab
    # [updates skipped for non-finite gradients, how many in a row now, the longest row]; on the device, read rarely
    nonfinite: Tensor = field(default_factory=lambda: torch.zeros(3))
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint writer"))
    saving: Save | None = None  # at most one in flight
    saved_step: int = 0
    best_saved: dict[str, float] | None = None  # TrainState.best of best.pth
    save_retry_step: int = 0  # after a failed save
    profiler: Any = None

    def share(self, *numbers: int) -> list[int]:
        """Sums numbers over the ranks. Raises: Stopped, on every rank once any of them got a signal."""
        if self.world.size == 1:
            self.stop.check()
            return list(numbers)
        flags = [int(self.stop.signum == signum) for signum in STOP_SIGNALS]
        flagged, sums = self.world.add_up(torch.tensor([*flags, *numbers])).split([len(flags), len(numbers)])
        if flagged.any():
            raise Stopped(STOP_SIGNALS[int(flagged.argmax())])
        return sums.tolist()

    def check_stop(self) -> None:
        """Between shared points only a lone process may stop: the others of a torchrun would wait for it for ever."""
        if self.world.size == 1:
            self.stop.check()

    @property
    def finished(self) -> bool:
        position, config = self.state.position, self.config
        return position.epoch >= config.epochs or bool(config.max_steps and position.step >= config.max_steps)

    @property
    def current_schedule(self) -> Schedule:
        assert self.state.schedule is not None  # set before training starts
        return self.state.schedule


def make_loader(run: Run, data: ManifestDataset, batches: Iterator[list[int]]
                ) -> tuple[Iterator[PackedBatch], list[multiprocessing.process.BaseProcess]]:
    """Returns the batches, and the processes that make them."""
    others = multiprocessing.active_children()
    cuda = run.precision.device.type == "cuda"
    loader = iter(DataLoader(data, batch_sampler=batches, num_workers=run.workers, pin_memory=cuda,  # type: ignore
                             collate_fn=functools.partial(collate_packed, model=data.model),
                             worker_init_fn=functools.partial(start_worker, trainer_pid=os.getpid())))
    if run.workers:  # PyTorch's own handler would raise for a killed worker anywhere, in the middle of an update too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return loader, [worker for worker in multiprocessing.active_children() if worker not in others]


def kill_workers() -> None:
    """Ends all data workers at once: one that waits for a lock of a killed one would never leave by itself."""
    for worker in multiprocessing.active_children():
        worker.kill()


def load_batches(run: Run, data: ManifestDataset, batches: Callable[[], Iterator[list[int]]]) -> Iterator[PackedBatch]:
    """Collated batches in order; goes on with new data workers where one was killed.

    Raises: UserError when they die again and again.
    """
    done = deaths = 0
    while True:
        loader, workers = make_loader(run, data, itertools.islice(batches(), done, None))
        try:
            for batch in loader:
                yield batch
                done, deaths = done + 1, 0
            return
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:  # a death as its pipe tells it
            if not workers or not multiprocessing.connection.wait([w.sentinel for w in workers], timeout=1):
                raise
            reason = first_line(error)
        deaths += 1
        kill_workers()
        if deaths == MAX_WORKER_DEATHS:
            raise UserError(f"data workers died {deaths} times in a row ({reason}). If the machine ran out of memory, "
                            "use fewer: --num-workers 1")
        run.console.say(f"[Warn] A data worker died ({reason}); going on with new ones")


def say_bad_rows(run: Run, data: ManifestDataset, bad_rows: dict[int, str]) -> None:
    for line in data.note_bad_rows(bad_rows):
        run.console.say(f"[Warn] {line}")


def take_batch(run: Run, data: ManifestDataset, loader: Iterator[PackedBatch]) -> PackedBatch:
    """The next batch on the device. Raises: Stopped; UserError for rows that contradict the manifest."""
    run.check_stop()
    batch = next(loader)
    if batch.error:
        raise UserError(batch.error)
    if run.world.size == 1:
        say_bad_rows(run, data, batch.bad_rows)
    else:
        data.unreported.update(batch.bad_rows)
    return batch.to(run.precision.device)


def share_bad_rows(run: Run, data: ManifestDataset) -> None:
    """Tells every rank the bad rows that any of them met, so that all count alike."""
    if run.world.size > 1:
        with same_on_all_ranks(run.world):
            for bad_rows in run.world.gather(data.unreported):
                say_bad_rows(run, data, bad_rows)
        data.unreported = {}


# ---------------------------------------------------------------------------------------------------------------------
# 6. Optimisation: schedule, precision, device, AdamW


def get_lr(step: int, schedule: Schedule) -> float:
    """The learning rate of the optimizer step with this number (from 1)."""
    if step <= schedule.warmup_steps:
        return schedule.base_lr * step / schedule.warmup_steps
    decay_steps = max(1, schedule.total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    return schedule.base_lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_schedule(config: TrainConfig, position: Position, num_samples: int) -> Schedule:
    """The length is --max-steps when given, else the last epoch's end."""
    to_the_end = position.step + remaining_steps(position, num_samples, config.global_batch, config.epochs)
    total = config.max_steps or to_the_end
    warmup = min(1000, total // 10) if config.warmup_steps is None else config.warmup_steps
    return Schedule(config.learning_rate, warmup, total)


def choose_precision(amp: str, device: torch.device) -> Precision:
    if amp == "auto":
        has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if has_bf16 else "fp16"
    return Precision(device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp])


def use_glibc_heap() -> None:
    """Keeps freed memory in the process: on a CPU most of a small model's step goes into page faults otherwise."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def setup_device() -> torch.device:
    """Picks CUDA or the CPU and turns on TF32 and deterministic algorithms.

    Raises: UserError when the driver shows a GPU that torch cannot use; nobody trains on the CPU by accident.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    gpus = Path("/proc/driver/nvidia/gpus")
    driver_shows_gpu = (gpus.is_dir() and any(gpus.iterdir())) or Path("/usr/lib/wsl/lib/nvidia-smi").exists()
    if not torch.cuda.is_available():
        if driver_shows_gpu and not hidden:
            raise UserError(f"the driver shows an NVIDIA GPU but torch {torch.__version__} cannot use it (driver too "
                            "old for its CUDA?). Update the driver, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU")
        use_glibc_heap()
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        raise UserError(f"torch {torch.__version__} cannot compute on {torch.cuda.get_device_name()}: "
                        f"{first_line(error)}. Use a newer card, or set CUDA_VISIBLE_DEVICES=-1") from error
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def choose_attention(model: UnifiedVoiceGPT, precision: Precision) -> str:
    """Takes the varlen path where the hardware has it and it agrees with the portable one. Returns what was chosen."""
    device, dtype = precision.device, precision.dtype
    if device.type != "cuda" or dtype is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "padded causal SDPA"
    config = model.config
    sample = Sample(np.zeros(9, np.int64), np.zeros(40, np.int64), np.zeros((CONDITION_ROWS, config.model_dim)),
                    np.zeros(config.model_dim))
    short = dataclasses.replace(sample, codes=sample.codes[:5])
    batch = collate_packed([sample, short], config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    size = config.model_dim // config.heads
    qkv = torch.randn(sum(batch.lengths), 3, config.heads, size, device=device, dtype=dtype, generator=generator)
    results = []
    try:
        for attention in (padded_attention, varlen_attention):
            leaf = qkv.clone().requires_grad_()
            out = attention(leaf, batch)
            out.float().square().sum().backward()
            results.append((out.detach(), leaf.grad))
        for portable, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, portable, rtol=0.05, atol=0.05)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        return f"padded causal SDPA (varlen attention failed its check: {first_line(error)})"
    model.attention = varlen_attention
    return "varlen"


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and embeddings."""
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and "embedding" not in name and name != "speed_emb.weight"
        (decayed if is_matrix else others).append((name, parameter))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def step_flops(config: ModelConfig, batches: Sequence[PackedBatch]) -> float:
    """Floating-point operations of forward and backward: 6 per weight and row, and causal attention."""
    dim, flops = config.model_dim, 0.0
    for batch in batches:
        flops += 6 * 12 * config.layers * dim**2 * sum(batch.lengths)
        flops += 6 * config.layers * dim * sum(length**2 for length in batch.lengths)
        flops += 6 * dim * sum(batch.text_counts) * (config.number_text_tokens + 1)
        flops += 6 * dim * sum(batch.mel_counts) * config.number_mel_codes
    return flops


def peak_flops(precision: Precision) -> float:
    """The device's data-sheet peak; where it is unknown, the best rate of a large matrix product measured here."""
    device = precision.device
    if device.type == "cuda" and precision.dtype is not None:
        name = torch.cuda.get_device_name(device)
        known = next((flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
        if known:
            return known
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.ones(size, size, device=device, dtype=precision.dtype or torch.float32)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
        if best > 0.1:  # fp16 on a CPU: a second and more for five, in which no signal is noticed
            break
    return 2 * size**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training step


@dataclass
class StepStats:
    """One optimizer step; tensors stay on the device until they are logged.

    Losses and mel_top1 are this process's part of the token means, tokens and flops those of all processes.
    """

    text_loss: Tensor
    mel_loss: Tensor
    mel_top1: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int
    flops: float


def backward(run: Run, batch: PackedBatch, text_tokens: int, mel_tokens: int, is_last: bool, weight: float = 1.0
             ) -> Tensor:
    """Adds one micro-batch's gradients; the last one of a step exchanges them. Returns sums as summed_losses does."""
    waits = run.ddp.no_sync() if run.ddp and not is_last else contextlib.nullcontext()
    with waits:
        with run.precision.autocast():
            text_sum, mel_sum, right = summed_losses(run.ddp or run.model, batch)
            loss = (run.config.text_loss_weight * text_sum / text_tokens
                    + run.config.mel_loss_weight * mel_sum / mel_tokens)
        loss = loss * (weight * run.world.size)  # DistributedDataParallel divides by the number of processes
        run.scaler.scale(loss).backward()
    return weight * torch.stack([text_sum.detach(), mel_sum.detach(), right]).double()


def apply_gradients(run: Run) -> Tensor:
    """Clips and updates; an update with non-finite gradients is skipped on the device. Returns the gradient norm."""
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    if not parameters:  # every sample of the step had a damaged file
        return torch.zeros(())
    if run.scaler.is_enabled():
        run.scaler.unscale_(run.optimizer)
    for name, rows in run.frozen.items():
        run.model.get_parameter(name).grad[: len(rows)] = 0  # type: ignore[index]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if run.config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.grad_clip, grad_norm)
    found_inf = (~torch.isfinite(grad_norm)).float()
    counted = found_inf
    if run.scaler.is_enabled():  # fp16 overflows while the scale comes down are how fp16 works
        counted = found_inf * (run.scaler.scale(torch.ones_like(found_inf)) <= 1)
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        run.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # fused AdamW looks at it
        run.optimizer.step()
    streak = (run.nonfinite[1] + 1) * counted
    run.nonfinite = torch.stack([run.nonfinite[0] + found_inf, streak, torch.maximum(run.nonfinite[2], streak)])
    with torch.no_grad():
        for name, rows in run.frozen.items():
            run.model.get_parameter(name)[: len(rows)] = rows
    return grad_norm


def train_step(run: Run, batches: Sequence[PackedBatch]) -> StepStats:
    """One optimizer step over its micro-batches; the loss is the token mean over all of them, however they are split.

    Raises: Stopped between micro-batches, and torch.OutOfMemoryError; weights are then those of the step before.
    """
    config, device, step = run.config, run.precision.device, run.state.position.step + 1
    text_tokens, mel_tokens, tokens, flops = run.share(
        sum(sum(batch.text_counts) for batch in batches), sum(sum(batch.mel_counts) for batch in batches),
        sum(sum(batch.lengths) for batch in batches), int(step_flops(run.model.config, batches)))
    text_tokens, mel_tokens = max(1, text_tokens), max(1, mel_tokens)
    lr = get_lr(step, run.current_schedule)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    batches = [batch for batch in batches if batch.rows]
    for micro_step, batch in enumerate(batches):
        run.check_stop()
        torch.manual_seed(dropout_seed(config.seed, step, micro_step, run.world.rank))
        totals += backward(run, batch, text_tokens, mel_tokens, is_last=micro_step == len(batches) - 1)
    if run.ddp and not batches:
        backward(run, idle_batch(run.model.config).to(device), text_tokens, mel_tokens, is_last=True, weight=0.0)
    run.check_stop()
    grad_norm = apply_gradients(run)
    return StepStats(totals[0] / text_tokens, totals[1] / mel_tokens, totals[2] / mel_tokens, grad_norm, lr, tokens,
                     flops)


def distribute(run: Run) -> None:
    """Wraps the model for several processes, which then start from rank 0's weights.

    Two backward passes of weight 0 settle in which buckets gradients are exchanged. It would change after the first
    step otherwise, and a resumed run would add up in another order than the one without a stop.
    """
    if run.world.size == 1:
        return
    device = run.precision.device
    run.ddp = DistributedDataParallel(run.model, device_ids=[run.world.local_rank] if device.type == "cuda" else None)
    run.model.train()
    for _ in range(2):
        backward(run, idle_batch(run.model.config).to(device), 1, 1, is_last=True, weight=0.0)
        run.optimizer.zero_grad(set_to_none=True)


def check_finite(run: Run) -> None:
    """Raises: UserError after too many non-finite gradients in a row. Waits for the device."""
    if run.nonfinite[2].item() >= MAX_NONFINITE_STREAK:
        raise UserError(f"the gradients were not finite in {MAX_NONFINITE_STREAK} steps in a row, near step "
                        f"{run.state.position.step}. Resume from an older checkpoint with a smaller --learning-rate, "
                        "or with --amp off")


def eval_records(data: ManifestDataset, batch: PackedBatch, text: list[float], mel: list[float]
                 ) -> Iterator[dict[str, Any]]:
    """The rows of eval.jsonl for one batch."""
    text_at = mel_at = 0
    for row, text_count, mel_count in zip(batch.rows, batch.text_counts, batch.mel_counts, strict=True):
        text_losses, mel_losses = text[text_at : text_at + text_count], mel[mel_at : mel_at + mel_count]
        text_at, mel_at = text_at + text_count, mel_at + mel_count
        yield {"id": data.rows[row].id, "text_loss": sum(text_losses) / text_count,
               "mel_loss": sum(mel_losses) / mel_count, "text_tokens": text_count, "mel_tokens": mel_count,
               "text_token_losses": text_losses, "mel_token_losses": mel_losses}


def evaluate(run: Run, max_batches: int, on_row: Callable[[dict[str, Any]], None] | None = None) -> dict[str, float]:
    """Token means over the validation rows in their fixed order, without dropout.

    on_row receives a dict for every row: id, mean and per-token losses, token counts. Raises: Stopped.
    """
    data, size, world = run.val_data, run.config.val_batch_size or run.config.batch_size, run.world
    chunks = split_micro_batches(np.arange(len(data)), size)
    chunks = chunks[:max_batches] if max_batches else chunks
    own = chunks[world.rank :: world.size]
    loader = load_batches(run, data, lambda: (chunk.tolist() for chunk in own))
    sums = torch.zeros(5, dtype=torch.float64, device=run.precision.device)
    run.model.eval()
    for done in range(math.ceil(len(chunks) / world.size)):
        run.share()
        batch = take_batch(run, data, loader) if done < len(own) else None
        if batch is None or not batch.rows:
            continue
        with torch.no_grad(), run.precision.autocast():
            text, mel, right = token_losses(run.model, batch)
        counts = torch.tensor([len(text), len(mel)], device=sums.device)
        sums += torch.cat([torch.stack([text.double().sum(), mel.double().sum(), right.double().sum()]), counts])
        if on_row:
            for record in eval_records(data, batch, text.tolist(), mel.tolist()):
                on_row(record)
        run.console.progress(f"validation: {min(len(chunks), (done + 1) * world.size)}/{len(chunks)}")
    share_bad_rows(run, data)
    text_sum, mel_sum, right_sum, text_count, mel_count = world.add_up(sums).tolist()
    return {"text_loss": text_sum / max(1, text_count), "mel_loss": mel_sum / max(1, mel_count),
            "mel_top1": right_sum / max(1, mel_count)}


def say_validation(console: Console, position: Position, values: dict[str, float]) -> None:
    console.say(f"[Val] epoch={position.last_epoch} step={position.step} text_loss={values['text_loss']:.6f} "
                f"mel_loss={values['mel_loss']:.6f} mel_top1={values['mel_top1']:.4f}")


def validate(run: Run) -> bool:
    """Validates, logs, remembers the best. Returns whether this is the best so far. Raises: Stopped."""
    position = run.state.position
    run.state.validation_owed = True
    values = evaluate(run, run.config.max_val_batches)
    loss = run.config.text_loss_weight * values["text_loss"] + run.config.mel_loss_weight * values["mel_loss"]
    say_validation(run.console, position, values)
    if run.metrics:
        run.metrics.write("val", position, {**values, "loss": loss})
    run.state.validation_owed = False
    run.state.last_val = {"step": position.step, "loss": loss, **values}
    if run.state.best is None or loss < run.state.best["loss"]:
        run.state.best = {"step": position.step, "loss": loss}
        return True
    return False


def split_after_out_of_memory(run: Run) -> None:
    """Halves the micro-batch, keeps the global batch. Raises: UserError when it is one sample already."""
    config = run.config
    if run.world.size > 1:
        raise UserError(f"out of GPU memory on rank {run.world.rank}. Start again with a smaller --batch-size and "
                        "--resume auto: the global batch stays")
    if config.batch_size == 1:
        raise UserError("out of GPU memory with one sample in a micro-batch. Use --grad-checkpointing, --amp, or leave "
                        "out the longest rows")
    batch_size, grad_accumulation = split_global_batch(config.global_batch, config.batch_size // 2)
    run.console.say(f"[Warn] Out of GPU memory: micro-batches of {batch_size} x {grad_accumulation} from now on, the "
                    f"same global batch of {config.global_batch}")
    run.config = dataclasses.replace(config, batch_size=batch_size, grad_accumulation=grad_accumulation)
    run.optimizer.zero_grad(set_to_none=True)
    if run.precision.device.type == "cuda":
        torch.cuda.empty_cache()


def step_if_memory_suffices(run: Run, batches: Sequence[PackedBatch]) -> StepStats | None:
    """None when the GPU ran out of memory; the exception, which holds the step's tensors, is gone by then."""
    try:
        return train_step(run, batches)
    except torch.OutOfMemoryError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# 8. Checkpoint file: one writer, one reader


# What the training loss never touches: carried from the base checkpoint unchanged.
CARRIED_PREFIXES = ("conditioning_encoder.", "perceiver_encoder.", "emo_conditioning_encoder.",
                    "emo_perceiver_encoder.", "emo_layer.", "emovec_layer.")
# The order of names in IndexTTS2's files.
NAME_ORDER = (*CARRIED_PREFIXES[:4], "text_embedding.", *CARRIED_PREFIXES[4:], "mel_embedding.", "gpt.",
              "mel_pos_embedding.", "text_pos_embedding.", "final_norm.", "text_head.", "mel_head.", "speed_emb.")
VOCAB_TENSORS = ("text_embedding.weight", "text_head.weight", "text_head.bias")


def in_name_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def rank(name: str) -> int:
        return next((i for i, prefix in enumerate(NAME_ORDER) if name.startswith(prefix)), len(NAME_ORDER))

    return {name: tensors[name] for name in sorted(tensors, key=rank)}


def check_pickle(path: Path) -> None:
    """Reads the file's pickle through its checksum, so that a damaged one is never parsed. Raises: BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                archive.read(name)


def read_torch_file(path: Path) -> Any:
    """Reads tensors and plain values, mapped into memory and never unpickling code. Raises: UserError.

    numpy's arrays and torch's version are let through: the fork keeps them in its files.
    """
    rebuild = np.empty(0).__reduce__()[0]  # numpy's function that an unpickled array starts from
    plain_parts = [np.ndarray, np.dtype, np.dtypes.UInt32DType, rebuild,
                   (rebuild, "numpy.core.multiarray._reconstruct"), torch.torch_version.TorchVersion]
    try:
        if zipfile.is_zipfile(path):
            check_pickle(path)
        with torch.serialization.safe_globals(plain_parts):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except DAMAGED_FILE as error:
        reason = f" ({first_line(error)})" if zipfile.is_zipfile(path) else ""
        raise UserError(f"{path}: damaged or incomplete, not a readable PyTorch file{reason}") from error


def digest_tree(value: Any, path: str = "") -> tuple[dict[str, str], Any]:
    """Returns sha256 of every tensor by its path, and the rest in a canonical form that JSON can hold."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        digest = hashlib.sha256(f"{value.dtype} {list(value.shape)} ".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
        return {path: digest.hexdigest()}, "tensor"
    if isinstance(value, dict):
        items = [(f"{type(key).__name__}:{key}", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{type(value).__name__}:{i}", item) for i, item in enumerate(value)]
    else:
        return {}, f"{type(value).__name__}:{value!r}"
    digests, rest = {}, []
    for key, item in items:
        inner_digests, inner_rest = digest_tree(item, f"{path}/{key}")
        digests.update(inner_digests)
        rest.append([key, inner_rest])
    return digests, rest


def make_digests(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The digests that a checkpoint carries: of every tensor, and of everything else."""
    tensors, rest = digest_tree({key: value for key, value in checkpoint.items() if key != "digests"})
    return {"algorithm": "sha256", "tensors": tensors, "rest": hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


def digest_problem(checkpoint: dict[str, Any]) -> str | None:
    """What differs from the digests inside, or None."""
    stored, found = checkpoint["digests"], make_digests(checkpoint)
    if stored == found:
        return None
    if not isinstance(stored, dict) or not isinstance(stored.get("tensors"), dict):
        return "its digests are unreadable"
    wrong = [path for path, digest in found["tensors"].items() if stored["tensors"].get(path) != digest]
    names = ", ".join(path.replace("str:", "").replace("int:", "").strip("/") for path in wrong[:3])
    return f"{len(wrong)} tensors differ from their digests ({names})" if wrong else "values differ from their digest"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads and verifies one of our checkpoints; its tensors stay mapped from the file.

    Raises: ResumeError. Required keys are checked before anything else.
    """
    if not path.exists():
        raise ResumeError(f"Resume checkpoint not found: {path}")
    try:
        checkpoint = read_torch_file(path)
    except UserError as error:
        raise ResumeError(str(error)) from error
    if not isinstance(checkpoint, dict):
        raise ResumeError(f"{path}: holds no checkpoint")
    missing = [key for key in REQUIRED_KEYS if key not in checkpoint]
    if missing:
        raise ResumeError(f"Checkpoint missing required keys: {missing} ({path})")
    if "digests" not in checkpoint:
        raise ResumeError(f"{path} was not written by this trainer (it has no digests; a checkpoint of the IndexTTS2 "
                          f"fork?). Start from its weights instead: --base-checkpoint {path}, with a new --output-dir")
    if checkpoint.get("format_version") != FORMAT_VERSION:
        raise ResumeError(f"{path} has format {checkpoint.get('format_version')}, this trainer reads {FORMAT_VERSION}. "
                          "Use the version of the trainer that wrote it")
    problem = digest_problem(checkpoint)
    if problem:
        raise ResumeError(f"{path} is damaged: {problem}. Resume from another checkpoint")
    if not re.fullmatch(r"(logs/run_\w+)?", str(checkpoint["run_dir"])):  # we would write there
        raise ResumeError(f"{path}: its run directory {checkpoint['run_dir']!r} is none that this trainer makes. "
                          "Resume from another checkpoint")
    return checkpoint


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> int:
    """Writes under a temporary name, reads back and verifies, then renames. Returns bytes.

    Raises: OSError or RuntimeError (PyTorch's own for a full disk); the partial file is gone, older ones are intact.
    """
    with replacing(path) as partial:
        with partial.open("wb") as handle:
            torch.save({**checkpoint, "digests": make_digests(checkpoint)}, handle)
            handle.flush()
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            read_checkpoint(partial)
        except ResumeError as error:
            raise OSError(f"read back damaged: {error}") from error
        size = partial.stat().st_size
    fsync_directory(path.parent)
    return size


def link_checkpoint(target: Path, link: Path) -> None:
    """Makes `link` another name of `target`; a copy where the file system has no hard links."""
    with replacing(link) as partial:
        try:
            os.link(target, partial)
        except OSError:
            shutil.copyfile(target, partial)
    fsync_directory(link.parent)


def checkpoint_step(name: str) -> int | None:
    """'model_step12.pth' -> 12; None for every other name."""
    match = re.fullmatch(r"model_step(\d+)\.pth", name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """model_step files, newest first."""
    files = [path for path in output_dir.glob("model_step*.pth")
             if checkpoint_step(path.name) is not None and path.exists()]  # a link to nowhere does not
    return sorted(files, key=lambda path: checkpoint_step(path.name) or 0, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# 9. Saving


def map_tree(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tree(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tree(item, change) for item in value)
    return value


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What must stay the same for a bit-for-bit continuation."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "device": f"{device.type} {name}", "threads": torch.get_num_threads(),
            "world_size": world_size}


def make_checkpoint(run: Run) -> dict[str, Any]:
    """A snapshot of the run at an optimizer-step boundary: plain values, and CPU tensors that stay as they are."""
    state, position = run.state, run.state.position
    config = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in PER_PROCESS}
    model, optimizer, scaler, nonfinite = map_tree(
        (run.model.state_dict(), run.optimizer.state_dict(),
         run.scaler.state_dict() if run.scaler.is_enabled() else None, run.nonfinite),
        lambda tensor: tensor.detach().to("cpu", copy=True))
    return {
        "format_version": FORMAT_VERSION,
        "model": in_name_order({**run.carried, **model}),
        "optimizer": optimizer,
        "scheduler": {**dataclasses.asdict(run.current_schedule), "last_epoch": position.step,
                      "_last_lr": [get_lr(position.step, run.current_schedule)]},
        "scaler": scaler,
        "epoch": position.epoch, "step": position.step, "sample_in_epoch": position.sample_in_epoch,
        "recent_checkpoints": state.recent_checkpoints, "rotated_out": state.rotated_out,
        "manifests": {"train": run.train_data.manifests, "val": run.val_data.manifests},
        "train_data": {"fingerprint": run.train_data.fingerprint, "rows": len(run.train_data)},
        "tokenizer": run.tokenizer, "model_config": run.gpt_section, "config": config,
        "best": state.best, "last_val": state.last_val, "validation_owed": state.validation_owed,
        "run_dir": state.run_dir, "base_vocab": state.base_vocab, "tokens_seen": state.tokens_seen,
        "nonfinite": nonfinite, "environment": environment(run.precision.device, run.world.size),
    }


def plan_rotation(recent: Sequence[str], name: str, keep: int) -> tuple[list[str], list[str]]:
    """Returns (the run's checkpoints after saving `name`, those to delete); keep = 0 keeps all."""
    names = [other for other in recent if other != name] + [name]
    return (names[-keep:], names[:-keep]) if keep else (names, [])


def rotated_files(run: Run) -> list[Path]:
    """What the newest save has to delete; only names that a run gives."""
    return [run.output_dir / name for name in run.state.rotated_out if checkpoint_step(name) is not None]


def write_save(save: Save, checkpoint: dict[str, Any], metrics: MetricsLog | None) -> None:
    """Writes, links, deletes what rotated out: in this order, so that a kill leaves a resumable directory. No console:
    this is the writer's thread."""
    started = time.perf_counter()
    try:
        if metrics:
            metrics.flush()
        save.bytes = write_checkpoint(save.path, checkpoint)
    except (OSError, RuntimeError) as error:
        save.error = error
        return
    try:
        for link in save.links:
            link_checkpoint(save.path, link)
    except OSError as error:  # no hard links, and no room for a copy
        save.link_error = error
    for path in save.delete:
        path.unlink(missing_ok=True)
    save.seconds_written = time.perf_counter() - started


def finish_save(run: Run, wait: bool = True) -> None:
    """Says and logs what came of the save in flight, if it has ended or `wait` is set."""
    save = run.saving
    if save is None or save.written is None or not (wait or save.written.done()):
        return
    run.saving = None
    save.written.result()  # raises what only a bug can raise
    state, say = run.state, run.console.say
    if save.error is not None:
        say(f"[Error] Could not save {save.path}: {first_line(save.error)}. Earlier checkpoints are intact; free some "
            "disk space, the save will be tried again")
        state.recent_checkpoints, state.rotated_out = save.rotation_before
        if state.best is save.best:
            state.best = run.best_saved
        if save.links:
            run.save_retry_step = state.position.step + max(1, run.config.save_interval // 10)
        return
    if save.link_error is not None:
        say(f"[Error] Could not renew latest.pth or best.pth: {first_line(save.link_error)}. {save.path.name} is "
            "complete, and --resume auto finds it")
    run.best_saved = save.best or run.best_saved
    if save.links:
        run.saved_step = save.position.step
    owed = ", validation still owed: the resumed run validates first" if save.validation_owed else ""
    say(f"[Info] Saved {save.path} ({save.bytes / 1e6:.1f} MB in {save.seconds_written:.1f} s, training waited "
        f"{save.seconds_blocked:.1f} s{owed})")
    if run.metrics:
        run.metrics.write("save", save.position, {"seconds_blocked": save.seconds_blocked, "bytes": save.bytes,
                                                  "seconds_written": save.seconds_written})


def start_save(run: Run, name: str, links: Sequence[str], is_best: bool) -> None:
    """Takes a snapshot and leaves the writing to a thread; waits for the save before this one.

    Only rank 0 writes. What came of the save is known after finish_save.
    """
    state, out, started = run.state, run.output_dir, time.perf_counter()
    if run.world.rank > 0:
        run.saved_step = state.position.step
        return
    finish_save(run)
    check_finite(run)
    rotation_before = state.recent_checkpoints, state.rotated_out
    if links:
        state.recent_checkpoints, state.rotated_out = plan_rotation(state.recent_checkpoints, name,
                                                                    run.config.keep_checkpoints)
    save = Save(out / name, [out / link for link in links], rotated_files(run) if links else [], state.position,
                state.best if is_best else None, state.validation_owed, rotation_before)
    checkpoint = make_checkpoint(run)
    save.seconds_blocked = time.perf_counter() - started
    save.written = run.writer.submit(write_save, save, checkpoint, run.metrics)
    run.saving = save


def save_checkpoint(run: Run, is_best: bool) -> None:
    """Starts to write model_step{N}.pth; latest.pth (and best.pth) are linked to it once it is whole."""
    name = f"model_step{run.state.position.step}.pth"
    start_save(run, name, ["latest.pth", *(["best.pth"] if is_best else [])], is_best)


# ---------------------------------------------------------------------------------------------------------------------
# 10. Resuming


def step_inside(path: Path) -> float:
    """The step that an unverified file claims; a damaged one counts as the newest."""
    try:
        content = read_torch_file(path)
    except UserError:
        return math.inf
    return content["step"] if isinstance(content, dict) and isinstance(content.get("step"), int) else math.inf


def candidates(output_dir: Path) -> list[Path]:
    """latest.pth and the model_step files, newest first; a file that is linked as both appears as latest.pth."""
    files = list_checkpoints(output_dir)
    latest = output_dir / "latest.pth"
    if not latest.exists():
        return files
    twin = next((file for file in files if file.samefile(latest)), None)
    if twin is not None:  # a save that was cut short before its link may have left newer files
        return [latest if file == twin else file for file in files]
    step = step_inside(latest)
    older = [file for file in files if (checkpoint_step(file.name) or 0) <= step]
    return [file for file in files if file not in older] + [latest] + older


@dataclass
class Found:
    """A verified checkpoint, the path to show for it, and the candidates that were skipped, with reasons."""

    path: Path
    checkpoint: dict[str, Any]
    skipped: list[str]


def find_resumable(output_dir: Path) -> Found | None:
    """The newest valid checkpoint, or None where there is none at all.

    Raises: ResumeError when there are files but none is valid.
    """
    skipped: list[str] = []
    for path in candidates(output_dir):
        try:
            return Found(path, read_checkpoint(path), skipped)
        except ResumeError as error:
            skipped.append(str(error))
    if skipped:
        raise ResumeError(f"no valid checkpoint in {output_dir}: {'; '.join(skipped)}. Move these files away to start "
                          "afresh" + (", or --resume best.pth" if (output_dir / "best.pth").exists() else ""))
    return None


def read_explicit(path: Path) -> dict[str, Any]:
    """Reads the file that was typed. Raises: ResumeError that lists the valid ones beside it."""
    try:
        return read_checkpoint(path)
    except ResumeError as error:
        valid = []
        for other in list_checkpoints(path.parent):
            with contextlib.suppress(ResumeError):
                read_checkpoint(other)
                valid.append(str(other))
        hint = f". Valid checkpoints there: {', '.join(valid)}" if valid else f". No valid checkpoint in {path.parent}"
        raise ResumeError(f"{error}{hint}") from error


def open_resume(resume: str, output_dir: Path, say: Callable[[str], None]) -> Found | None:
    """Finds, announces and reads the checkpoint that --resume asks for. Raises: ResumeError."""
    if not resume:
        return None
    if resume == "auto":
        found = find_resumable(output_dir)
        if found is None:
            say(f"[Info] Auto-resume: no checkpoint in {output_dir}, starting from the beginning")
            return None
        for reason in found.skipped:
            say(f"[Warn] Auto-resume: skipped {reason}")
    else:
        found = Found(Path(resume), read_explicit(Path(resume)), [])
    say(f"[Info] Auto-resume: found checkpoint at {found.path}")
    say(f"[Info] Loading checkpoint from {found.path}...")
    return found


def refuse_other_checkpoints(output_dir: Path, found: Found | None, resume: str) -> None:
    """Raises: UserError where a run would mix its files with those of another."""
    present = [*list_checkpoints(output_dir), *(output_dir / n for n in ("latest.pth", "best.pth")
                                                if (output_dir / n).exists())]
    if not present:
        return
    if not resume:
        raise UserError(f"{output_dir} already holds checkpoints ({present[0].name}). Add --resume auto to go on with "
                        "that run, or choose another --output-dir")
    if found is None:
        raise ResumeError(f"no model_step*.pth or latest.pth in {output_dir}, only {present[0].name}. Go on from it "
                          f"with --resume {present[0]}, or move it away to start afresh")
    if found.path.resolve().parent != output_dir.resolve():
        raise UserError(f"{output_dir} already holds checkpoints of another run ({present[0].name}). Choose another "
                        f"--output-dir, or leave it out to go on in {found.path.parent}")


def validate_checkpoint(checkpoint: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokenizer_sha256: str,
                        train_fingerprint: str, accept_changed_data: bool) -> list[str]:
    """Everything in which a checkpoint does not fit this run, each with its remedy."""
    problems = []
    found = {name: tuple(t.shape) for name, t in checkpoint["model"].items()
             if not name.startswith(CARRIED_PREFIXES) and name in shapes}
    differing = [name for name in shapes if found.get(name) != shapes[name]]
    if differing:
        name = differing[0]
        problems.append(f"model: {len(differing)} tensors have another shape, e.g. {name} {found.get(name)} in the "
                        f"checkpoint, {shapes[name]} here. Resume with the --config and --tokenizer of the run")
    if checkpoint["tokenizer"]["sha256"] != tokenizer_sha256:
        problems.append(f"tokenizer differs (sha256 {checkpoint['tokenizer']['sha256'][:12]} in the checkpoint, "
                        f"{tokenizer_sha256[:12]} here). Pass --tokenizer {checkpoint['tokenizer']['path']} as it was, "
                        "or start a new run with --base-checkpoint")
    if checkpoint["train_data"]["fingerprint"] != train_fingerprint and not accept_changed_data:
        problems.append("training data changed (row ids, lengths or order). Pass the old --train-manifest, or "
                        "--accept-changed-data: weights, optimizer and step stay, the epoch's order starts anew")
    return problems


def require_fit(run: Run, found: Found, accept_changed_data: bool) -> None:
    """Raises: ResumeError with every problem at once."""
    shapes = {name: tuple(t.shape) for name, t in run.model.state_dict().items()}
    problems = validate_checkpoint(found.checkpoint, shapes, run.tokenizer["sha256"], run.train_data.fingerprint,
                                   accept_changed_data)
    if problems:
        raise ResumeError(f"{found.path} does not fit this run: {'; '.join(problems)}")


def position_of(checkpoint: dict[str, Any]) -> Position:
    return Position(checkpoint["epoch"], checkpoint["sample_in_epoch"], checkpoint["step"])


def restore_model(model: UnifiedVoiceGPT, carried: dict[str, Tensor], checkpoint: dict[str, Any],
                  say: Callable[[str], None]) -> None:
    say("[Info] Restoring model state...")
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in checkpoint["model"].items():
            if name in own:
                own[name].copy_(tensor)
            else:
                carried[name] = tensor.clone()


def restore_schedule(run: Run, checkpoint: dict[str, Any], say: Callable[[str], None]) -> None:
    """Goes on with the same schedule; a changed one is recomputed, and what that does to the learning rate is said."""
    say("[Info] Restoring scheduler state...")
    wanted = make_schedule(run.config, run.state.position, len(run.train_data))
    saved = checkpoint.get("scheduler")
    step = run.state.position.step
    if not saved:
        say("[Warn] No scheduler state in the checkpoint: continuing with a fresh one")
    else:
        old = Schedule(saved["base_lr"], saved["warmup_steps"], saved["total_steps"])
        if old != wanted:
            say(f"[Info] lr at step {step}: {get_lr(step, old):.6e} -> {get_lr(step, wanted):.6e}")
    run.state.schedule = wanted


def restore(run: Run, found: Found) -> None:
    """Applies a verified checkpoint, cloned out of the mapped file, so that a deleted file frees its disk.

    Raises: ResumeError with every problem at once.
    """
    checkpoint, config, say, device = found.checkpoint, run.config, run.console.say, run.precision.device
    require_fit(run, found, config.accept_changed_data)
    restore_model(run.model, run.carried, checkpoint, say)
    say("[Info] Restoring optimizer state...")
    run.optimizer.load_state_dict(map_tree(checkpoint["optimizer"], Tensor.clone))
    for group in run.optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = config.weight_decay
    state = run.state
    state.position = position_of(checkpoint)
    if checkpoint["train_data"]["fingerprint"] != run.train_data.fingerprint:
        say(f"[Warn] Training data changed: epoch {state.position.epoch} starts anew with {len(run.train_data)} rows")
        state.position = dataclasses.replace(state.position, sample_in_epoch=0)
    for name in ("best", "last_val", "validation_owed", "run_dir", "base_vocab", "tokens_seen"):
        setattr(state, name, checkpoint[name])
    own = [name for name in checkpoint["recent_checkpoints"] if (run.output_dir / name).exists()]
    state.recent_checkpoints, state.rotated_out = own, list(checkpoint["rotated_out"])
    run.nonfinite = checkpoint["nonfinite"].clone().to(device)
    restore_schedule(run, checkpoint, say)
    say("[Info] Restoring gradient scaler state...")
    if run.scaler.is_enabled() and checkpoint.get("scaler"):
        run.scaler.load_state_dict(checkpoint["scaler"])
    elif run.scaler.is_enabled():
        say("[Warn] AMP enabled but no scaler state: continuing with a fresh one")
    run.saved_step, run.best_saved = state.position.step, state.best
    say(f"[Info] ✅ Successfully resumed from {found.path}")
    say(f"[Info]    Epoch: {state.position.epoch}, Step: {state.position.step}")
    say(f"[Info]    Recent checkpoints: {len(state.recent_checkpoints)}")


def restore_weights_only(run: Run, found: Found) -> None:
    """--eval-only needs a checkpoint's weights and tokenizer to fit, not its training data."""
    require_fit(run, found, accept_changed_data=True)
    restore_model(run.model, run.carried, found.checkpoint, run.console.say)
    run.state.position = position_of(found.checkpoint)


def move_aside(output_dir: Path, names: Sequence[str], stamp: str) -> Path | None:
    """Moves files into abandoned_TIMESTAMP/ of the output directory. Returns the folder, or None for no files."""
    present = [name for name in names if (output_dir / name).exists()]
    if not present:
        return None
    taken = len(list(output_dir.glob(f"abandoned_{stamp}*")))  # by starts within the same second
    folder = output_dir / (f"abandoned_{stamp}_{taken + 1}" if taken else f"abandoned_{stamp}")
    for name in present:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(output_dir / name, folder / name)
    return folder


def go_back(run: Run, resumed: Path) -> None:
    """Moves what lies after an explicitly chosen older checkpoint into abandoned_TIMESTAMP/, and relinks latest.pth."""
    step, output_dir = run.state.position.step, run.output_dir
    later = [path.name for path in list_checkpoints(output_dir) if (checkpoint_step(path.name) or 0) > step]
    for name in ("latest.pth", "best.pth"):
        path = output_dir / name
        if path.exists() and not path.samefile(resumed) and step_inside(path) > step:
            later.append(name)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    folder = move_aside(output_dir, later, stamp)
    dropped = cut_metrics(output_dir / run.state.run_dir / "metrics.jsonl", step, run.state.validation_owed)
    if folder is None:
        return
    if dropped:
        (folder / "metrics.jsonl").write_text("".join(dropped), encoding="utf-8")
    link_checkpoint(resumed, output_dir / "latest.pth")
    best = output_dir / f"model_step{run.state.best['step']}.pth" if run.state.best else None
    if "best.pth" in later and best and best.exists():
        link_checkpoint(best, output_dir / "best.pth")
    run.console.say(f"[Info] Going back to step {step}: later checkpoints and log lines are now in {folder}")


def finish_links(run: Run, resumed: Path) -> None:
    """Does what a kill between a save and its links and deletions left undone."""
    state, best = run.state, run.output_dir / "best.pth"
    is_best = state.best is not None and state.best["step"] == state.position.step
    if is_best and (not best.exists() or step_inside(best) != state.position.step):
        link_checkpoint(resumed, best)
    for path in rotated_files(run):
        path.unlink(missing_ok=True)


def load_base_checkpoint(model: UnifiedVoiceGPT, path: Path) -> tuple[dict[str, Tensor], int]:
    """Fills the model from IndexTTS2's gpt.pth (or the fork's, or our own, checkpoints).

    Returns: the tensors to carry along, and the base's number of text tokens. Whatever else is in the file (the
    inference wrapper's gpt.wte and inference_model, old transformers' masks) is dropped.
    With another vocabulary size the overlapping rows are copied and the rest stays fresh.
    Raises: UserError that lists all missing tensors and wrong shapes.
    """
    content = read_torch_file(path)
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"--base-checkpoint {path}: holds no state dict. Use IndexTTS2's gpt.pth")
    problems = []
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            source = tensors.get(name)
            if source is None:
                problems.append(f"{name} is missing")
            elif name in VOCAB_TENSORS and source.shape[1:] == weight.shape[1:]:
                overlap = min(len(source), len(weight))
                weight[:overlap].copy_(source[:overlap])
            elif source.shape != weight.shape:
                problems.append(f"{name} is {list(source.shape)}, the config says {list(weight.shape)}")
            else:
                weight.copy_(source)
    if problems:
        raise UserError(f"--base-checkpoint {path} does not fit --config: {'; '.join(problems[:8])}"
                        + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""))
    carried = {name: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
               for name, t in tensors.items() if name.startswith(CARRIED_PREFIXES)}
    return carried, len(tensors["text_embedding.weight"]) - 1


# ---------------------------------------------------------------------------------------------------------------------
# 11. Run


def resolve_output_dir(typed: dict[str, Any]) -> Path:
    resume = typed.get("resume", "")
    if "output_dir" in typed or resume in ("", "auto"):
        return Path(typed.get("output_dir", TrainConfig().output_dir))
    return Path(resume).parent


def find_model_yaml(config: TrainConfig, checkpoint: dict[str, Any] | None) -> Path | None:
    """--config, else config.yaml beside the first manifest, else checkpoints/config.yaml; None: the checkpoint's.

    Raises: UserError when there is none.
    """
    if config.config:
        return Path(config.config)
    if checkpoint is not None:
        return None
    manifests = config.train_manifest
    if config.eval_only and config.val_manifest:
        manifests = manifests or config.val_manifest
    beside = Path(split_language(manifests[0])[0]).parent / "config.yaml"
    for path in (beside, Path("checkpoints/config.yaml")):
        if path.is_file():
            return path
    raise UserError(f"no model config: neither {beside} nor checkpoints/config.yaml exists. Pass --config")


def resolve_config(typed: dict[str, Any], checkpoint: dict[str, Any] | None, device: torch.device, world: World
                   ) -> tuple[TrainConfig, int]:
    """Typed settings first, then the checkpoint's, then the defaults and what the hardware suggests.

    Returns: the settings, and the number of data workers.
    Raises: UserError that lists every contradiction.
    """
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    saved = {k: v for k, v in checkpoint["config"].items() if k in known} if checkpoint else {}
    zero_means_chosen = ("batch_size", "grad_accumulation", "learning_rate")
    asked = {k: v for k, v in typed.items() if v or k not in zero_means_chosen}
    config = TrainConfig(**{**saved, **asked, "config": typed.get("config", "")})
    problems = config_problems(config)
    if problems:
        raise UserError("; ".join(problems))
    is_cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if is_cuda else 0.0
    hardware_batch_size, workers = auto_hardware(device.type, memory, max(1, available_cores() // world.local_size))
    here = environment(device, world.size)
    same_device = bool(checkpoint) and checkpoint["environment"]["device"] == here["device"]  # type: ignore[index]
    split = (saved["batch_size"], saved["grad_accumulation"],
             checkpoint["environment"]["world_size"]) if checkpoint else None
    config.batch_size, config.grad_accumulation = choose_batch_split(
        asked.get("batch_size", 0), asked.get("grad_accumulation", 0), hardware_batch_size, split, same_device,
        world.size)
    config.world_size = world.size
    if not (config.eval_only and "val_manifest" in typed):
        config.train_manifest = config.train_manifest or ["processed_data/train_pairs.jsonl"]
    config.val_manifest = config.val_manifest or ["processed_data/val_pairs.jsonl"]
    config.tokenizer = config.tokenizer or "tokenizers/amharic_extended_bpe.model"
    found_yaml = find_model_yaml(config, checkpoint)
    config.config = str(found_yaml) if found_yaml else ""
    released = Path("checkpoints/gpt.pth")
    is_released = "config" not in typed and found_yaml == released.with_name("config.yaml")
    if not checkpoint and is_released and released.is_file():
        config.base_checkpoint = config.base_checkpoint or str(released)
    config.learning_rate = config.learning_rate or (2e-5 if config.base_checkpoint else 1e-3)
    return config, config.num_workers or workers


def say_changes(config: TrainConfig, checkpoint: dict[str, Any], device: torch.device,
                say: Callable[[str], None]) -> None:
    """Names every setting, and everything of the machine, that differs from the checkpoint's."""
    for name, old in checkpoint["config"].items():
        new = getattr(config, name, old)
        if new != old and name not in ("config", "base_checkpoint"):
            say(f"[Info] {name}: {old} -> {new}")
    old_batch = (checkpoint["config"]["batch_size"] * checkpoint["config"]["grad_accumulation"]
                 * checkpoint["environment"]["world_size"])
    if old_batch != config.global_batch:
        say(f"[Warn] The global batch changes from {old_batch} to {config.global_batch}: losses will differ from the "
            "run so far. The position is in samples, none is repeated or left out")
    for name, new in environment(device, config.world_size).items():
        old = checkpoint["environment"].get(name)
        if old != new:
            say(f"[Warn] {name}: {old} -> {new}. Continuing bit for bit is promised only for the same one")


def read_tokenizer(path: str) -> dict[str, Any]:
    """Returns path, sha256 and size of a SentencePiece model. Raises: UserError."""
    import sentencepiece

    try:
        content = Path(path).read_bytes()
        size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size() if content else 0
    except OSError as error:
        raise UserError(f"--tokenizer {path}: {error.strerror}. tools.train_tokenizer makes one") from error
    except RuntimeError:
        size = 0
    if not size:
        raise UserError(f"--tokenizer {path}: not a SentencePiece model. tools.train_tokenizer makes one")
    return {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "size": size}


def check_tokenizer(manifests: Sequence[str], tokenizer: dict[str, Any]) -> None:
    """Compares with the one that each manifest was made with, where that is recorded. Raises: UserError."""
    for manifest in manifests:
        path = Path(split_language(manifest)[0])
        recorded = recorded_sha256(path, "tokenizer")
        if recorded and recorded != tokenizer["sha256"]:
            raise UserError(f"--tokenizer {tokenizer['path']} (sha256 {tokenizer['sha256'][:12]}) does not match "
                            f"{manifest}, made with {recorded[:12]} ({path.with_name('config.yaml')}). Pass that one, "
                            "or preprocess again")


def load_gpt_section(config: TrainConfig, checkpoint: dict[str, Any] | None, vocab_size: int
                     ) -> tuple[dict[str, Any], ModelConfig]:
    """The `gpt:` section with the tokenizer's size in it, as a dict and checked. Raises: UserError."""
    if config.config:
        section, source = read_model_yaml(Path(config.config)).get("gpt"), f"--config {config.config}"
    else:
        assert checkpoint is not None
        section, source = checkpoint["model_config"], "the checkpoint's config"
    model_config = model_config_from(section, source, vocab_size)
    return {**(section or {}), "number_text_tokens": vocab_size}, model_config


def build_model(config: TrainConfig, model_config: ModelConfig, train_data: ManifestDataset | None, fresh: bool
                ) -> tuple[UnifiedVoiceGPT, dict[str, Tensor], int]:
    """The model on the CPU, tensors carried along, and the base's vocabulary; from a checkpoint they come later."""
    model = UnifiedVoiceGPT(model_config, config.dropout, config.grad_checkpointing)
    if not fresh:
        return model, {}, 0
    ratio = 1.0
    if train_data is not None:
        ratio = sum(row.code_len for row in train_data.rows) / sum(row.text_len for row in train_data.rows)
    init_fresh_weights(model, config.seed, ratio)
    if not config.base_checkpoint:
        return model, {}, 0
    return model, *load_base_checkpoint(model, Path(config.base_checkpoint))


def say_model(config: TrainConfig, model: UnifiedVoiceGPT, carried: dict[str, Tensor], attention: str,
              checkpoint: Found | None, say: Callable[[str], None]) -> None:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    shape = model.config
    say(f"[Info] Model: {shape.layers} layers x {shape.model_dim}, {size:.1f} M parameters, attention: {attention}")
    if checkpoint is None:
        say(f"[Info] Base checkpoint: {config.base_checkpoint or 'none, training from scratch'}")
        if config.base_checkpoint and not carried:
            say("[Warn] The base checkpoint has no conditioning modules: the tools here can use what this run saves, "
                "IndexTTS2 cannot")


def say_batches(config: TrainConfig, workers: int, say: Callable[[str], None]) -> None:
    processes = f" x {config.world_size} processes" if config.world_size > 1 else ""
    say(f"[Info] Batch size {config.batch_size} x accumulation {config.grad_accumulation}{processes} = global batch "
        f"{config.global_batch}; {workers} data workers; peak learning rate {config.learning_rate:g}")


def open_run_dir(run: Run, found: Found | None, resume: str) -> None:
    """Continues the run directory of a resumed run without doubled lines, or makes a new one."""
    output_dir, state = run.output_dir, run.state
    stamp = time.strftime("%Y%m%d_%H%M%S")
    if found is None:
        aside = move_aside(output_dir, ["logs"], stamp)
        if aside:
            run.console.say(f"[Info] Logs of a run that left no checkpoint are now in {aside}")
        state.run_dir = f"logs/run_{stamp}"
    elif found.path.resolve().parent != output_dir.resolve():
        state.run_dir = f"logs/run_{stamp}"  # a branch of a run in another directory
        state.recent_checkpoints, state.rotated_out = [], []
    else:
        if resume != "auto":
            go_back(run, found.path)
        finish_links(run, found.path)
        cut_metrics(output_dir / state.run_dir / "metrics.jsonl", state.position.step, state.validation_owed)
    run.metrics = MetricsLog(output_dir / state.run_dir, state.position.step + 1)
    run.console.say(f"[Info] Logs: {output_dir / state.run_dir}")


def say_disk(run: Run) -> None:
    """Compares the free disk with what the kept checkpoints will need: weights and Adam's two moments, each 4 bytes."""
    trained = sum(p.numel() for p in run.model.parameters()) * 12
    carried = sum(t.numel() * t.element_size() for t in run.carried.values())
    files = (run.config.keep_checkpoints or 1) + 2  # and best.pth, and the one being written
    free, needed = shutil.disk_usage(run.output_dir).free, files * (trained + carried)
    level, hint = ("[Info]", "") if free > needed else ("[Warn]", "; free some, or lower --keep-checkpoints")
    run.console.say(f"{level} Disk: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB for {files} checkpoints{hint}")


def write_eval(run: Run) -> None:
    """--eval-only: the [Val] line, and eval.jsonl with a line per row."""
    path = run.output_dir / "eval.jsonl"
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as handle:
        values = evaluate(run, run.config.max_val_batches,
                          lambda record: print(json.dumps(record, ensure_ascii=False), file=handle))
    say_validation(run.console, run.state.position, values)
    run.console.say(f"[Info] Losses of every row: {path}")


def make_profiler(run: Run) -> Any:
    trace = run.output_dir / run.state.run_dir / "trace.json"
    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=3, warmup=0, active=3, repeat=1),
                                  on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)))


def prepare(typed: dict[str, Any], found: Found | None, output_dir: Path, stop: StopSignal, console: Console,
            world: World) -> Run:
    """Settings, data and model of a run; a checkpoint is applied. Raises: UserError, Stopped."""
    checkpoint = found.checkpoint if found else None
    device = setup_device()
    config, workers = resolve_config(typed, checkpoint, device, world)
    if checkpoint and not config.eval_only:
        say_changes(config, checkpoint, device, console.say)
    console.say(f"[Info] Config: {config.config or (found.path if found else '')}")
    tokenizer = read_tokenizer(config.tokenizer)
    gpt_section, model_config = load_gpt_section(config, checkpoint, tokenizer["size"])
    check_tokenizer([*config.train_manifest, *config.val_manifest], tokenizer)
    val_data = ManifestDataset(config.val_manifest, model_config, stop.check)
    train_data = val_data if config.eval_only else ManifestDataset(config.train_manifest, model_config, stop.check)
    datasets = [val_data] if config.eval_only else [train_data, val_data]
    for data in datasets:
        for manifest in data.manifests:
            console.say(f"[Info] {manifest['path']}: {manifest['rows']} rows")
    model, carried, base_vocab = build_model(config, model_config, train_data, fresh=checkpoint is None)
    precision = choose_precision(config.amp, device)
    model.to(device)
    attention = choose_attention(model, precision)
    say_model(config, model, carried, attention, found, console.say)
    say_batches(config, workers, console.say)
    stop.check()
    run = Run(config, output_dir, precision, model, make_optimizer(model, config.weight_decay),
              torch.amp.GradScaler(device.type, enabled=precision.needs_scaler), carried, gpt_section, tokenizer,
              train_data, val_data, TrainState(base_vocab=base_vocab), console, stop, workers, world,
              nonfinite=torch.zeros(3, device=device))
    for data in datasets:
        say_bad_rows(run, data, data.bad_rows_at_start)
    if found and config.eval_only:
        restore_weights_only(run, found)
    elif found:
        restore(run, found)
    else:
        run.state.schedule = make_schedule(config, run.state.position, len(train_data))
    if config.compile:
        model.compile(dynamic=True)
    return run


def run_evaluation(typed: dict[str, Any], output_dir: Path, stop: StopSignal, console: Console) -> None:
    """--eval-only. Raises: UserError, Stopped."""
    if not typed.get("resume") and not typed.get("base_checkpoint"):
        raise UserError("--eval-only needs weights: --resume auto, --resume PATH or --base-checkpoint PATH")
    found = open_resume(typed.get("resume", ""), output_dir, console.say)
    if found is None and not typed.get("base_checkpoint"):
        raise ResumeError(f"no checkpoint in {output_dir} to evaluate. Check --output-dir")
    with writable(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_eval(prepare({"max_val_batches": 0, **typed}, found, output_dir, stop, console, World()))


def choose_checkpoint(typed: dict[str, Any], output_dir: Path, console: Console, world: World) -> Found | None:
    """Rank 0 finds and announces what to resume from, the others read the same file. Raises: UserError."""
    found = None
    if world.rank == 0:
        resume = typed.get("resume", "")
        found = open_resume(resume, output_dir, console.say)
        refuse_other_checkpoints(output_dir, found, resume)
    path = world.from_rank_0(str(found.path) if found else None)
    return found if world.rank == 0 or path is None else Found(Path(path), read_checkpoint(Path(path)), [])


def prepare_everywhere(typed: dict[str, Any], found: Found | None, output_dir: Path, stop: StopSignal,
                       console: Console, world: World) -> Run:
    """prepare() on every rank. Raises: UserError on all of them when any failed; rank 0 says it, once."""
    run, error = None, None
    try:
        run = prepare(typed, found, output_dir, stop, console, world)
        if run.config.freeze_base_vocab and not run.state.base_vocab:
            raise UserError("--freeze-base-vocab goes with --base-checkpoint: that file's tokens stay frozen")
    except UserError as caught:
        error = caught
    errors = world.gather(str(error) if error else None)
    failed = [rank for rank, message in enumerate(errors) if message]
    if run is not None and not failed:
        return run
    if world.rank > 0:
        raise SaidByRank0
    raise error or UserError(f"on rank {failed[0]}: {errors[failed[0]]}")


def is_due(position: Position, interval: int) -> bool:
    """Every `interval` steps; 0 means at the end of each epoch."""
    return position.step % interval == 0 if interval else position.sample_in_epoch == 0


class Meter:
    """Tokens per second and MFU between two log lines, validation and saves left out."""

    def __init__(self, peak: float):
        self.peak = peak
        self.first: tuple[float, int] | None = None  # (time, steps done), for the ETA
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        self.started, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def add(self, stats: StepStats) -> None:
        self.tokens += stats.tokens
        self.flops += stats.flops
        self.steps += 1
        self.first = self.first or (time.perf_counter(), self.steps)

    def rates(self) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.started)
        return {"tokens_per_second": self.tokens / seconds, "mfu": self.flops / seconds / self.peak}

    def show_progress(self, run: Run) -> None:
        position, config = run.state.position, run.config
        left = remaining_steps(position, len(run.train_data), config.global_batch, config.epochs)
        left = min(left, config.max_steps - position.step) if config.max_steps else left
        assert self.first is not None
        done = self.steps - self.first[1]
        elapsed = time.perf_counter() - self.first[0]
        seconds = round(left * elapsed / done) if done else 0
        eta, about = (datetime.timedelta(seconds=seconds), f", about {seconds} s left") if done else ("?", "")
        total = position.step + left
        filled = 30 * position.step // max(1, total)
        run.console.progress(f"[{'#' * filled}{'.' * (30 - filled)}] step {position.step}/{total} ETA {eta}",
                             f"training: {position.step}/{total}, {elapsed:.0f} s{about}")


def log_step(run: Run, stats: StepStats, meter: Meter) -> None:
    """Prints the [Train] line and writes metrics; the only place of the loop that waits for the device."""
    position = run.state.position
    parts = run.world.add_up(torch.stack([stats.text_loss, stats.mel_loss, stats.mel_top1]))
    text_loss, mel_loss, mel_top1 = parts.tolist()
    with same_on_all_ranks(run.world):
        check_finite(run)
    share_bad_rows(run, run.train_data)
    run.console.say(f"[Train] epoch={position.last_epoch} step={position.step} text_loss={text_loss:.6f} "
                    f"mel_loss={mel_loss:.6f} mel_top1={mel_top1:.4f} lr={stats.lr:.3e}")
    if run.metrics:
        run.metrics.write("train", position, {
            "text_loss": text_loss, "mel_loss": mel_loss, "mel_top1": mel_top1, "lr": stats.lr,
            "grad_norm": stats.grad_norm.item(), "skipped_updates": int(run.nonfinite[0].item()), **meter.rates()})
    meter.restart()


def after_step(run: Run, stats: StepStats, meter: Meter) -> None:
    """Log, validate, save, in this order. Raises: Stopped."""
    state, config = run.state, run.config
    position = state.position
    meter.add(stats)
    meter.show_progress(run)
    finish_save(run, wait=False)
    if position.step % config.log_interval == 0:
        log_step(run, stats, meter)
    is_best = False
    if is_due(position, config.val_interval) or run.finished:
        if run.saving and run.saving.best:
            finish_save(run)  # whether there is a best.pth to beat is known then
        is_best = validate(run)
        meter.restart()
    retry = run.save_retry_step and position.step >= run.save_retry_step
    if (config.save_interval and position.step % config.save_interval == 0) or run.finished or retry:
        run.save_retry_step = 0
        save_checkpoint(run, is_best)
        meter.restart()
    elif is_best:
        start_save(run, "best.pth", [], is_best)
        meter.restart()


def unsaved_error(run: Run) -> UserError:
    return UserError(f"the last checkpoint could not be saved to {run.output_dir}; the run would go on from step "
                     f"{run.saved_step}. Free some disk space and resume")


def train(run: Run) -> None:
    """The loop. Raises: Stopped, after the last complete step was saved."""
    state, data, world = run.state, run.train_data, run.world
    meter = Meter(peak_flops(run.precision) * world.size)
    loader: Iterator[PackedBatch] | None = None
    try:
        if state.validation_owed:
            run.console.say(f"[Info] Step {state.position.step} still owes its validation")
            save_checkpoint(run, validate(run))
        while not run.finished:
            position, config = state.position, run.config
            if loader is None:
                batches = functools.partial(micro_batches_from, position, len(data), config, world.rank)
                loader = load_batches(run, data, batches)
            micro_steps = count_micro_steps(position, len(data), config, world.rank)
            stats = step_if_memory_suffices(run, [take_batch(run, data, loader) for _ in range(micro_steps)])
            if stats is None:
                split_after_out_of_memory(run)
                loader = None
                continue
            state.position = position.after_step(len(data), config.global_batch)
            state.tokens_seen += stats.tokens
            after_step(run, stats, meter)
            if run.profiler:
                run.profiler.step()
    except Stopped as stopped:
        run.console.end_progress()
        run.console.say(f"[Info] {stopped}: stopping at step {state.position.step}")
        finish_save(run)
        if state.position.step > run.saved_step:
            save_checkpoint(run, is_best=False)
        finish_save(run)
        if state.position.step > run.saved_step:
            raise unsaved_error(run) from stopped
        world.gather(None)
        raise
    finish_save(run)
    if run.saved_step < state.position.step:
        raise unsaved_error(run)
    world.gather(None)  # nobody leaves while rank 0 still writes: torchrun might end it then


def run_training(typed: dict[str, Any], output_dir: Path, stop: StopSignal, console: Console, ending: Ending,
                 world: World) -> None:
    """From the command line to a finished run. Raises: UserError, Stopped."""
    found = choose_checkpoint(typed, output_dir, console, world)
    run = prepare_everywhere(typed, found, output_dir, stop, console, world)
    ending.run = run
    if run.finished and not run.state.validation_owed:
        console.say(f"[Info] Training is complete: epoch {run.state.position.epoch}, step {run.state.position.step}. "
                    "Raise --max-steps or --epochs to go on")
        return
    if run.config.freeze_base_vocab:
        rows = run.state.base_vocab
        run.frozen = {name: run.model.get_parameter(name).detach()[:rows].clone() for name in VOCAB_TENSORS}
    distribute(run)
    if world.rank == 0:
        say_disk(run)
        open_run_dir(run, found, typed.get("resume", ""))
    found = None  # else the resumed file stays mapped, and fills the disk after it was rotated out
    profiler = make_profiler(run) if run.config.profile and world.rank == 0 else contextlib.nullcontext()
    with profiler as run.profiler:
        try:
            train(run)
        finally:
            run.console.end_progress()
            run.writer.shutdown()
            kill_workers()
            if run.metrics:
                run.metrics.close()
    best = run.state.best
    console.say(f"[Info] Training complete: epoch {run.state.position.epoch}, step {run.state.position.step}"
                + (f", best validation loss {best['loss']:.6f} at step {best['step']}" if best else ""))


@dataclass
class Ending:
    """How this process ended, for OUTPUT_DIR/last_exit.json; its absence means that the process was killed."""

    output_dir: Path
    world: World
    run: Run | None = None

    @property
    def path(self) -> Path:
        return self.output_dir / "last_exit.json"

    def clear(self) -> None:
        if self.world.rank == 0:
            self.path.unlink(missing_ok=True)

    def write(self, reason: str, status: int) -> None:
        """Of several ranks the first one to fail knows why; the others only lose contact with it."""
        if self.path.exists() or (self.world.rank > 0 and reason not in ("user_error", "crash")):
            return
        step = self.run.state.position.step if self.run else None
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
            with replacing(self.path) as partial:
                partial.write_text(json.dumps({"reason": reason, "status": status, "step": step}) + "\n")


@contextlib.contextmanager
def recorded(ending: Ending, stop: StopSignal) -> Iterator[None]:
    """Writes last_exit.json. Raises: UserError, Stopped, SaidByRank0, or whatever a bug raises."""
    try:
        yield
        ending.write("finished", 0)
    except Stopped as stopped:
        ending.write("stopped", 128 + stopped.signum)
        raise
    except SaidByRank0:
        raise
    except UserError:
        ending.write("user_error", 1)
        raise
    except Exception as error:
        if is_lost_contact(error) and stop.signum:  # the others stopped first
            ending.write("stopped", 128 + stop.signum)
            raise Stopped(stop.signum) from error
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            ending.write("user_error", 1)
            raise UserError(f"--output-dir {ending.output_dir}: {error.strerror}. Free some disk space and start "
                            "again") from error
        if not is_lost_contact(error):
            ending.write("crash", 1)
            raise
        if ending.world.rank > 0:
            raise SaidByRank0 from error
        ending.write("crash", 1)
        raise UserError(f"another process of this run is gone ({first_line(error)}). The same command with --resume "
                        "auto goes on from the newest checkpoint") from error
    except BaseException:
        ending.write("crash", 1)
        raise


def train_and_record(typed: dict[str, Any], output_dir: Path, stop: StopSignal, console: Console, world: World) -> None:
    """Holds the output directory's lock and records how the process ended. Raises: as recorded() does."""
    ending = Ending(output_dir, world)
    with process_group(world), lock_output_dir(output_dir) if world.rank == 0 else contextlib.nullcontext():
        ending.clear()
        with recorded(ending, stop):
            run_training(typed, output_dir, stop, console, ending, world)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a mistake that was explained, 128 + signal number when stopped."""
    stop, world = StopSignal(), world_from(os.environ)
    stop.install()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    console = Console(stop, sys.stdout if world.rank == 0 else open(os.devnull, "w"))
    try:
        typed = parse_args(argv)
        output_dir, resume = resolve_output_dir(typed), typed.get("resume", "")
        if resume not in ("", "auto") and not Path(resume).exists():
            read_explicit(Path(resume))  # says what is there instead, before a directory is made
        if typed.get("eval_only") and world.size > 1:
            raise UserError("--eval-only runs in one process: start it without torchrun")
        if typed.get("eval_only"):
            run_evaluation(typed, output_dir, stop, console)
        else:
            train_and_record(typed, output_dir, stop, console, world)
        return 0
    except Stopped as stopped:
        return 128 + stopped.signum
    except SaidByRank0:
        return 1
    except ResumeError as error:
        console.say(f"[Error] Failed to load checkpoint: {error}")
        print(f"RuntimeError: Resume failed: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"[Error] {error}", file=sys.stderr)
        return 1


def leave(status: int) -> NoReturn:
    """Ends the process without Python's clean-up: that takes a second, and gloo's threads, which DDP keeps alive,
    sometimes abort in the midst of it ("terminate called without an active exception")."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader may be gone, the disk full
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
