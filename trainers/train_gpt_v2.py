"""Train the GPT of IndexTTS2 (text tokens -> semantic speech codes); whatever kills a run, the same command goes on.

    python trainers/train_gpt_v2.py --max-steps 200 --resume auto             two minutes on a laptop, the demo's data
    python trainers/train_gpt_v2.py --train-manifest my_data/train_pairs.jsonl \\
      --tokenizer tokenizers/amharic_extended_bpe.model --amp --resume auto   own data, of tools.build_pairs
    python trainers/train_gpt_v2.py --resume auto --eval-only                 losses of every validation row

The file is read top to bottom: a function stands above its callers. Its sections are

    1 settings   2 model   3 data   4 sample order   5 process and state of a run   6 optimisation   7 training step
    8 checkpoint file   9 saving   10 resuming   11 run

The life of a run: main() takes the lock of the output directory and removes last_exit.json; the newest valid
checkpoint is found and read; settings, data and model are prepared, and the checkpoint is applied; step after step is
read ahead, trained, logged, validated and saved; last_exit.json says how it ended. The sample order, the dropout masks
and the learning rate are pure functions of (seed, position), so a checkpoint holds no random-number state, and a
resumed run repeats the uninterrupted one bit for bit.

What a kill leaves, by its moment:

    before the first save      a log directory, which the next start moves to abandoned_TIMESTAMP/
    while a step is trained    the newest checkpoint; the resumed run cuts the log back to its step
    while a file is written    .model_stepN.pth.partial, which the next start removes; latest.pth is the file before
    between rename and links   model_stepN.pth, newer than latest.pth and therefore taken; links, deletions and best.pth
                               that were still owed are in it, and done at the next start
    while it resumes           what was there: nothing is changed before the checkpoint has been found to fit
    at any moment              no last_exit.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from json.encoder import encode_basestring_ascii
from operator import itemgetter
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
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint as recompute_in_backward

try:
    from orjson import loads as read_json
except ImportError:  # a rented machine's own Python: slower, else alike
    from json import loads as read_json  # type: ignore[assignment]

FORMAT_VERSION = 2  # of checkpoints; 1 is read too: it had validation_owed, and codec_sha256 instead of made_with
ARITHMETIC = 2  # raised when the same settings give other bits; said on resume
NAMES = ("IndexTTS2", "IndexTTS-2.5")
LORA_TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
MAX_WEIGHT = 1000  # of a training manifest
NO_TARGET_EMO = ("no target_emo_vec_path, which --emo-source target and mixed need. Preprocess with the emo_vec of "
                 "every utterance and build the pairs again, or take --emo-source prompt")
MAX_BAD_FRACTION = 0.01  # of a data set's rows may have unreadable feature files
NEW_ROW_NOISE = 0.1  # of rows of new text tokens, in standard deviations of the base's rows
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake that the user can mend. The message names the file, the place in it and the remedy."""


class ResumeError(UserError):
    """A checkpoint that cannot be resumed from."""


class ForeignCheckpoint(ResumeError):
    """A checkpoint of another trainer."""


class SaidByRank0(Exception):
    """This rank of a torchrun ends because of a fault that rank 0 reports."""


class BadFeatureFile(Exception):
    """A feature file that is missing or damaged; its row is skipped up to MAX_BAD_FRACTION."""


def first_line(error: BaseException) -> str:
    """The first sentence: what follows in PyTorch's messages is advice that does not fit here."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return re.split(r"(?<=[a-z]\.) ", text.splitlines()[0])[0][:300]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings


def setting(default: Any, help: str, lowest: float | None = None, highest: float | None = None, **options: Any) -> Any:
    """A TrainConfig field: its default, its flag's help, the numbers it may have, and what TYPES leaves unsaid."""
    factory = {"default_factory": list} if default == [] else {"default": default}
    return field(**factory, metadata={  # type: ignore[call-overload]
        "help": help, "lowest": lowest, "highest": highest, "options": options})


TYPES: dict[Any, dict[str, Any]] = {
    "str": {}, "list[str]": {"action": "append"}, "bool": {"action": argparse.BooleanOptionalAction},
    "int": {"type": int}, "int | None": {"type": int}, "float": {"type": float}}


@dataclass
class TrainConfig:
    """Every setting of a run; each field is the flag of the same name. 0 or None: chosen for you, and printed."""

    train_manifest: list[str] = setting([], "training pairs, JSON lines, optional ::lang or ::lang@weight (@3: three "
                                        "times an epoch; @0.1: a tenth, another one each time); repeatable "
                                        "(processed_data/train_pairs.jsonl)", metavar="PATH[::LANG[@WEIGHT]]")
    val_manifest: list[str] = setting([], "validation pairs, likewise (val_pairs.jsonl beside the first training "
                                      "manifest)", metavar="PATH[::LANG]")
    tokenizer: str = setting("", "SentencePiece model, or IndexTTS-2.5's .tiktoken file "
                             "(tokenizers/amharic_extended_bpe.model)", metavar="PATH")
    config: str = setting("", "IndexTTS2 YAML with a gpt: section (config.yaml beside the first training manifest, "
                          "else checkpoints/config.yaml)", metavar="PATH")
    base_checkpoint: str = setting("", "IndexTTS2 weights to start from, e.g. checkpoints/gpt.pth", metavar="PATH")
    output_dir: str = setting("training_output", "checkpoints, logs (training_output)", metavar="DIR")
    resume: str = setting("", "'auto' (newest valid checkpoint of the output directory) or a file", metavar="auto|PATH")
    batch_size: int = setting(0, "samples in a micro-batch (by the hardware)", 0)
    grad_accumulation: int = setting(0, "micro-batches in a step (to a global batch of 32)", 0)
    epochs: int = setting(10, "passes over the training data (10)", 1)
    learning_rate: float = setting(0.0, "peak (2e-5 with a base checkpoint, 1e-3 from scratch)", 0, 1)
    weight_decay: float = setting(0.01, "AdamW's, on matrices only (0.01)", 0)
    warmup_steps: int | None = setting(None, "linear warm-up (1000, at most a tenth of the run)", 0)
    max_steps: int = setting(0, "stop after this many steps (0 = no limit)", 0)
    log_interval: int | None = setting(None, "steps between [Train] lines (100, at most 1/10 of the run)", 1)
    val_interval: int | None = setting(None, "steps between validations; 0 = once per epoch (1000, at most half of the "
                                       "run)", 0)
    val_batch_size: int = setting(0, "samples in a validation batch (the batch size)", 0)
    max_val_batches: int = setting(200, "validation rows, in batches of the size the run began with, spread evenly "
                                   "over all rows (200; 0 = all)", 0)
    num_workers: int = setting(0, "threads that read data (by the hardware)", 0, 256)
    grad_clip: float = setting(1.0, "largest gradient norm (1.0; 0 = no clipping)", 0)
    text_loss_weight: float = setting(0.2, "weight of text_loss (0.2)", 0)
    mel_loss_weight: float = setting(0.8, "weight of mel_loss (0.8)", 0)
    amp: str = setting("off", "mixed precision; alone: bf16 where the hardware has it, else fp16", nargs="?",
                       const="auto", choices=("auto", "bf16", "fp16", "off"))
    grad_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, slower")
    save_interval: int = setting(1000, "steps between checkpoints, besides the first best one (1000; 0 = only at the "
                                 "end)", 0)
    save_minutes: float = setting(30.0, "and at least every so many minutes (30; 0 = by steps only)", 0)
    patience: int = setting(0, "stop after so many validations in a row without a better one (0 = never)", 0)
    keep_checkpoints: int = setting(3, "newest checkpoints kept (3; 0 = all)", 0)
    seed: int = setting(1234, "of the sample order, dropout and fresh weights (1234)", 0, 2**63 - 1)
    dropout: float = setting(0.1, "on embeddings and residuals (0.1)", 0, 1)
    eval_only: bool = setting(False, "print the [Val] line, write eval.jsonl, train nothing", action="store_true")
    accept_changed_data: bool = setting(False, "resume although the training data changed; the epoch starts anew",
                                        action="store_true")
    emo_source: str = setting("prompt", "whose emo_vec a pair takes: the prompt's, the target's, or one of the two, "
                              "drawn anew for every row and epoch (prompt)", choices=("prompt", "target", "mixed"))
    freeze_base_vocab: bool = setting(False, "leave the base checkpoint's text tokens as they are: --freeze base-text")
    freeze: list[str] = setting([], "tensors that are not trained: a pattern such as 'gpt.h.*.attn.*', or a set: "
                                "first:N (blocks), base-text, conditioning; repeatable", metavar="PATTERN")
    lr_scale: list[str] = setting([], "learning rate of tensors, as a multiple: the same patterns, and the set "
                                  "new-text, such as new-text=10; repeatable", metavar="PATTERN=FACTOR")
    lora_rank: int = setting(0, "train low-rank additions to the base checkpoint's matrices instead of these (0 = no); "
                             "rows of new text tokens are trained in full", 0, 4096)
    lora_alpha: float = setting(0.0, "LoRA's scale times its rank (twice the rank)", 0)
    lora_dropout: float = setting(0.0, "before LoRA's first matrix (0)", 0, 0.99)
    lora_targets: list[str] = setting([], "layers of a block that get one (attn.c_attn attn.c_proj mlp.c_fc "
                                      "mlp.c_proj)", nargs="+", action="store", choices=LORA_TARGETS, metavar="LAYER")
    compile: bool = setting(False, "torch.compile the model (with varlen attention only)")
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
    """Only the settings that were typed: {field name: value}. Raises: UserError for unknown flags, wrong types, and
    texts that a shell has spoilt."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for item in dataclasses.fields(TrainConfig):
        if item.metadata:
            flag = "--" + item.name.replace("_", "-")
            parser.add_argument(flag, help=item.metadata["help"], **{**TYPES[item.type], **item.metadata["options"]})
    typed = vars(parser.parse_args(argv))
    for name, value in typed.items():
        flag, texts = "--" + name.replace("_", "-"), value if isinstance(value, list) else [value]
        if "" in texts:
            raise UserError(f"{flag} is empty: a variable that is not set? Give a value, or leave the flag out")
        if any(isinstance(text, str) and text.endswith("\r") for text in texts):
            raise UserError(f"{flag} {value!r} ends in a carriage return: was the script saved with Windows line ends? "
                            "Save it with Unix ones")
        if isinstance(texts[0], str):  # "~" in quotes: no shell has replaced it
            typed[name] = list(map(os.path.expanduser, texts)) if texts is value else os.path.expanduser(value)
    return typed


def output_dir_of(typed: Mapping[str, Any]) -> Path:
    """--output-dir; `--resume PATH` alone goes on in that file's folder."""
    resume = typed.get("resume") or "auto"
    beside = TrainConfig().output_dir if resume == "auto" else Path(resume).parent
    return Path(typed.get("output_dir", beside))


def split_manifest(manifest: str) -> tuple[str, str | None, float]:
    """'a.jsonl::am@2' -> ('a.jsonl', 'am', 2.0). Only the last ::LANG or ::LANG@WEIGHT is a suffix, other '@' and '='
    belong to the path; a weight that is no number is NaN."""
    found = re.fullmatch(r"(.*)::([A-Za-z][A-Za-z-]*)(?:@([^:/]*))?", manifest, re.DOTALL)
    if not found:
        return manifest, None, 1.0
    path, language, weight = found.groups()
    is_number = weight is None or re.fullmatch(r"-?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", weight)
    return path, language.lower(), float(weight or 1) if is_number else math.nan


def config_problems(config: TrainConfig) -> list[str]:
    """Everything that is wrong with the settings themselves, before any file is opened."""
    problems = []
    for item in dataclasses.fields(config):
        value, lowest = getattr(config, item.name), item.metadata.get("lowest")
        highest = item.metadata.get("highest") or (2**63 - 1 if isinstance(value, int) else sys.float_info.max)
        if value is not None and lowest is not None and not lowest <= value <= highest:
            bound = f"most {highest}" if value > highest else f"least {lowest}"
            problems.append(f"--{item.name.replace('_', '-')} {value}: must be at {bound}")
    for manifest in config.train_manifest:
        if not 0 < split_manifest(manifest)[2] <= MAX_WEIGHT:
            problems.append(f"--train-manifest {manifest}: the weight behind @ must be a number above 0 and at most "
                            f"{MAX_WEIGHT}")
    problems += [f"--val-manifest {manifest}: validation reads every row once, it takes no weight"
                 for manifest in config.val_manifest if split_manifest(manifest)[2] != 1]
    if not config.lora_rank and (config.lora_alpha or config.lora_dropout or config.lora_targets):
        problems.append("--lora-alpha, --lora-dropout and --lora-targets go with --lora-rank")
    if config.dropout == 1:
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
    """Returns (largest batch size, reading threads) for a device."""
    if device_type != "cuda":
        return 16, 1  # the arithmetic needs every core
    sizes = ((70, 32), (36, 16), (20, 8), (14, 4), (0, 2))
    return next(batch_size for at_least_gib, batch_size in sizes if memory_gib >= at_least_gib), min(cpu_count, 16)


def split_global_batch(global_batch: int, largest_batch_size: int) -> tuple[int, int]:
    """Returns (batch_size, grad_accumulation) with the largest batch size that divides the global batch."""
    batch_size = next(b for b in range(max(1, min(global_batch, largest_batch_size)), 0, -1) if global_batch % b == 0)
    return batch_size, global_batch // batch_size


def choose_batch_split(batch_size: int, grad_accumulation: int, hardware_batch_size: int,
                       checkpoint_split: tuple[int, int, int] | None, same_device: bool, world_size: int = 1
                       ) -> tuple[int, int]:
    """(batch_size, grad_accumulation) of each process; 0 means not typed. A fresh run aims at a global batch of 32. A
    resumed one keeps that of checkpoint_split (batch_size, grad_accumulation, world_size) unless both are typed, and on
    the same device its split too: another changes the last bits. Raises: UserError for what does not divide it."""
    typed, share = batch_size or grad_accumulation, max(1, 32 // world_size)
    if batch_size and grad_accumulation:
        return batch_size, grad_accumulation
    if checkpoint_split is not None:
        if not typed and same_device and checkpoint_split[2] == world_size:
            return checkpoint_split[:2]
        share, rest = divmod(math.prod(checkpoint_split), world_size)
        if rest or (typed and share % typed):
            flag = "--batch-size" if batch_size else "--grad-accumulation"
            what = f"{world_size} processes do" if rest else f"{flag} {typed} does"
            raise UserError(f"{what} not divide the checkpoint's global batch {math.prod(checkpoint_split)}. Choose a "
                            "divisor, or type both --batch-size and --grad-accumulation to change the global batch")
    if not typed:
        return split_global_batch(share, hardware_batch_size)
    other = max(1, share // typed)
    if batch_size:
        return batch_size, other
    return other if checkpoint_split else min(hardware_batch_size, other), grad_accumulation


# ---------------------------------------------------------------------------------------------------------------------
# 2. Model: IndexTTS2's UnifiedVoice, the part that training uses; its tensor names are the checkpoint's


# The rows of IndexTTS-2.5's lang_embedding, by number; it has one more.
LANGUAGES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml "
    "cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am "
    "yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue minnan wuyu dialect zh/en en/zh common"
).split()


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and token numbers of the GPT: the `gpt:` section of IndexTTS2 (languages 0) or IndexTTS-2.5."""

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
    languages: int = 0  # rows of IndexTTS-2.5's lang_embedding

    @property
    def condition_shape(self) -> tuple[int, int]:
        """The perceiver's 32 latents; in IndexTTS-2.5 the speaker vector of CAM++."""
        return (1, 192) if self.languages else (32, self.model_dim)

    @property
    def leading_rows(self) -> int:
        """Before the text: the condition, and two rows for speed (zeros in IndexTTS-2.5)."""
        return self.condition_shape[0] + 2

    @property
    def code_count(self) -> int:
        """Real codes are 0 .. code_count - 1."""
        return min(self.start_mel_token, self.stop_mel_token)

    @property
    def max_code_len(self) -> int:
        return self.max_mel_tokens + 1


def model_config_from(gpt: Any, source: str, vocab_size: int | None = None) -> ModelConfig:
    """Reads a `gpt:` section; vocab_size (the tokenizer's) replaces number_text_tokens. Raises: UserError that lists
    every missing or wrong value."""
    if not isinstance(gpt, dict):
        raise UserError(f"{source}: no gpt: section. Use IndexTTS2's config.yaml, or the one beside the demo data")
    values = gpt if vocab_size is None else {**gpt, "number_text_tokens": vocab_size}
    problems, chosen = [], {}
    for item in dataclasses.fields(ModelConfig):
        value, lowest = values.get(item.name, item.default), 0 if item.name.endswith(("_token", "languages")) else 1
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
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
    return config


@dataclass
class PackedBatch:
    """Samples end to end in one flat sequence of `total` rows, no padding; B samples, D = model_dim.

    A sample's rows: C condition rows (ModelConfig.condition_shape), speed_emb[1], speed_emb[0], t + 2 text rows, c + 2
    mel rows. Scored are the first t + 1 text rows and the first c + 1 mel rows.
    """

    rows: list[int]  # data set rows, [B]
    lengths: list[int]  # rows of each sample, [B]
    longest: int  # of the lengths; what is compiled takes no list, for it would be compiled anew for each length of one
    text_counts: list[int]  # scored text rows of each sample, [B]
    mel_counts: list[int]
    condition: Tensor  # [B, 32, D] float32; [B, 1, 192] in IndexTTS-2.5
    emo_vec: Tensor  # [B, D] float32
    text_inputs: Tensor  # [sum(t + 2)]
    text_positions: Tensor
    text_languages: Tensor  # 0 in IndexTTS2, which has none
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
    bad_rows: dict[int, str] = field(default_factory=dict)  # data set row left out -> what is wrong with its files
    error: str = ""  # a row contradicts the manifest or the model

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return PackedBatch(**tree_map_only(Tensor, change, vars(self)))

    def to(self, device: torch.device) -> PackedBatch:
        return self.map_tensors(functools.partial(Tensor.to, device=device, non_blocking=True))


def lora_scale(rank: int, alpha: float) -> float:
    return (alpha or 2 * rank) / rank


Attention = Callable[[Tensor, PackedBatch], Tensor]


def dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout; on a CPU from 16 random bits a value, which are drawn in a seventh of the time of PyTorch's masks."""
    if x.device.type != "cpu" or not training or not p or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    limit, count = min(round(p * 2**16), 2**16 - 1), x.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return x * (bits.view(x.shape) >= limit - 2**15).to(x.dtype).mul_(2**16 / (2**16 - limit))


def product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of 256 queries at a time, all [B, H, T, h]: in 16 bits a CPU multiplies matrices so fast that
    this takes half the time of PyTorch's kernels."""
    q, k, v, shape = (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q.shape
    outputs, seen = [], 0
    for queries in q.split(256, dim=1):
        seen += queries.shape[1]
        unseen = q.new_full((queries.shape[1], seen), -math.inf).triu(1 + seen - queries.shape[1])
        outputs.append(torch.baddbmm(unseen, queries, k[:, :seen].mT).softmax(-1) @ v[:, :seen])
    return torch.cat(outputs, dim=1).view(shape)


def padded_attention(qkv: Tensor, batch: PackedBatch) -> Tensor:
    """The portable path: causal attention over groups of samples. qkv [total, 3, H, h] -> [total, H * h]."""
    _, _, heads, size = qkv.shape
    by_products, outputs = qkv.device.type == "cpu" and qkv.dtype != torch.float32, []
    parts = qkv.index_select(0, torch.cat([g.flatten() for g in batch.groups])).split([g.numel() for g in batch.groups])
    for group, part in zip(batch.groups, parts, strict=True):
        q, k, v = part.view(*group.shape, 3, heads, size).permute(2, 0, 3, 1, 4)
        with torch.autocast(qkv.device.type, enabled=False):
            attended = product_attention(q, k, v) if by_products else F.scaled_dot_product_attention(
                q, k, v, is_causal=True)
        outputs.append(attended.transpose(1, 2).reshape(-1, heads * size))
    return torch.cat(outputs).index_select(0, batch.ungroup)


def varlen_attention(qkv: Tensor, batch: PackedBatch) -> Tensor:
    """The same on CUDA devices of sm_80 and up, 16-bit types, without filling up."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    out: Any = varlen_attn(q, k, v, batch.cu_seqlens, batch.cu_seqlens, batch.longest, batch.longest,
                           window_size=(-1, 0))
    return out.flatten(1)


class LoRA(nn.Module):
    """What a low rank adds to a layer: scale * x A B. B starts at zero, so that training starts from the base."""

    def __init__(self, inputs: int, outputs: int, config: TrainConfig, generator: torch.Generator):
        super().__init__()
        self.scale, self.dropout = lora_scale(config.lora_rank, config.lora_alpha), config.lora_dropout
        self.A = nn.Parameter(torch.randn(inputs, config.lora_rank, generator=generator) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.zeros(config.lora_rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (dropped(x, self.dropout, self.training) @ self.A @ self.B)


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [in, out], y = x W + b."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))
        self.lora: LoRA | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.weight)
        return y if self.lora is None else y + self.lora(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.c_attn = Conv1D(config.model_dim, 3 * config.model_dim)
        self.c_proj = Conv1D(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, batch: PackedBatch, attention: Attention) -> Tensor:
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
        self.ln_1, self.attn = nn.LayerNorm(config.model_dim), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.model_dim), MLP(config)

    def forward(self, x: Tensor, batch: PackedBatch, attention: Attention, dropout: float) -> Tensor:
        x = x + dropped(self.attn(self.ln_1(x), batch, attention), dropout, self.training)
        return x + dropped(self.mlp(self.ln_2(x)), dropout, self.training)


class UnifiedVoiceGPT(nn.Module):
    """Text ids and a speaker condition in, logits for the next text token and the next code out.

    The constructor leaves the weights at PyTorch's defaults; init_fresh_weights or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0, grad_checkpointing: bool = False):
        super().__init__()
        dim = config.model_dim
        self.config, self.dropout, self.grad_checkpointing = config, dropout, grad_checkpointing
        self.attention: Attention = padded_attention
        self.text_embedding = nn.Embedding(config.number_text_tokens + 1, dim)
        self.mel_embedding = nn.Embedding(config.number_mel_codes, dim)
        self.gpt: Any = nn.ModuleDict({"h": nn.ModuleList(Block(config) for _ in range(config.layers)),
                                       "ln_f": nn.LayerNorm(dim)})
        self.mel_pos_embedding: Any = nn.ModuleDict({"emb": nn.Embedding(config.max_mel_tokens + 3, dim)})
        self.text_pos_embedding: Any = nn.ModuleDict({"emb": nn.Embedding(config.max_text_tokens + 2, dim)})
        self.final_norm = nn.LayerNorm(dim)
        self.text_head = nn.Linear(dim, config.number_text_tokens + 1)
        self.mel_head = nn.Linear(dim, config.number_mel_codes)
        if config.languages:
            self.spk_emb_proj = nn.Linear(config.condition_shape[1], dim)
            self.lang_embedding = nn.Embedding(config.languages, dim)
        else:
            self.speed_emb = nn.Embedding(2, dim)

    def embed(self, batch: PackedBatch) -> Tensor:
        """[total, D]: the sequence given to the transformer; the one place where IndexTTS-2.5 computes otherwise."""
        text = self.text_embedding(batch.text_inputs) + self.text_pos_embedding.emb(batch.text_positions)
        mel = self.mel_embedding(batch.mel_inputs) + self.mel_pos_embedding.emb(batch.mel_positions)
        if self.config.languages:
            text = text + self.lang_embedding(batch.text_languages)
            condition, speed = self.spk_emb_proj(batch.condition), text.new_zeros(2, self.config.model_dim)
        else:
            condition, speed = batch.condition, self.speed_emb.weight
        condition = condition + batch.emo_vec.unsqueeze(1)
        return torch.cat([condition.flatten(0, 1), speed, text, mel]).index_select(0, batch.pack_order)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Returns logits at the scored positions: text [sum(t + 1), V + 1] and mel [sum(c + 1), M]."""
        x = dropped(self.embed(batch), self.dropout, self.training)
        for block in self.gpt.h:
            run_block = functools.partial(recompute_in_backward, block, use_reentrant=False) if (
                self.grad_checkpointing and self.training) else block
            x = run_block(x, batch, self.attention, self.dropout)
        scored = self.final_norm(self.gpt.ln_f(x.index_select(0, torch.cat([batch.text_scored, batch.mel_scored]))))
        return self.text_head(scored[: len(batch.text_scored)]), self.mel_head(scored[len(batch.text_scored) :])


def token_losses(model: nn.Module, batch: PackedBatch, top1: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies in nats of every scored text token and code, and (with top1) where the code was the likeliest."""
    text_logits, mel_logits = (logits.float() for logits in model(batch))
    text = F.cross_entropy(text_logits, batch.text_targets, reduction="none")
    mel = F.cross_entropy(mel_logits, batch.mel_targets, reduction="none")
    return text, mel, mel_logits.detach().argmax(-1) == batch.mel_targets if top1 else mel.new_zeros(())


def sinusoids(times: Tensor, dim: int, rms: float = 0.02) -> Tensor:
    """[len(times), dim] sines and cosines of wavelengths from 2 pi to 20,000 pi, as in Attention Is All You Need."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, dim, 2) / dim)
    angles = times.float().unsqueeze(1) * frequencies
    return rms * math.sqrt(2) * torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]


def init_fresh_weights(model: UnifiedVoiceGPT, seed: int, codes_per_text_token: float) -> None:
    """IndexTTS2's initial distributions, but position tables that start as sinusoids of time: text position i gets the
    vector of code position i * codes_per_text_token, so that attention finds the spoken text sooner (knowledge.md)."""
    generator = torch.Generator().manual_seed(seed)
    projection_std, bound = 0.02 / math.sqrt(2 * model.config.layers), 1 / math.sqrt(model.config.model_dim)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("text_head.", "mel_head.")):
                weight.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias") or name == "speed_emb.weight":
                weight.zero_()
            elif re.search(r"(ln_1|ln_2|ln_f|final_norm)\.weight$", name):
                weight.fill_(1)
            else:
                weight.normal_(0, projection_std if name.endswith("c_proj.weight") else 0.02, generator=generator)
        for table, rate in ((model.text_pos_embedding.emb, codes_per_text_token), (model.mel_pos_embedding.emb, 1.0)):
            table.weight.copy_(sinusoids(torch.arange(len(table.weight)) * rate, model.config.model_dim))


# What the training loss never touches: carried from the base checkpoint unchanged.
CARRIED_PREFIXES = ("conditioning_encoder.", "perceiver_encoder.", "emo_conditioning_encoder.",
                    "emo_perceiver_encoder.", "emo_layer.", "emovec_layer.")
VOCAB_TENSORS = ("text_embedding.weight", "text_head.weight", "text_head.bias")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Data

KINDS = ("text_ids", "codes", "condition", "emo_vec", "target_emo_vec")  # the last one is for --emo-source mixed
NOT_FINITE_TWICE = "its loss was not finite twice"
CHECKED_ROWS = 1000  # rows with files of their own that are read before training starts
# What codes, conditions and text ids were made with; recorded beside manifests, in checkpoints and in exports.
MADE_WITH = {"features": "features", "codec_sha256": "codec", "num_codes": "number of codes",
             "codes_per_second": "codes a second", "tokenizer_sha256": "tokenizer", "text_rules": "text rules",
             "front_end": "front end", "conditioning_sha256": "conditioning modules"}


@dataclass(slots=True)
class Row:
    """One line of a manifest. parts: of each of KINDS the file, and where in it this utterance begins; a start of None
    means that the file holds this utterance alone."""

    number: int  # among the rows of all manifests
    id: str
    language: str  # "" where nothing tells it
    manifest: int
    line: int
    text_len: int
    code_len: int
    parts: tuple[tuple[str, int | None], ...]


@dataclass
class Sample:
    """What the model sees of one row: text_ids [t] and codes [c] int64, condition and emo_vec [D] float32."""

    text_ids: np.ndarray
    codes: np.ndarray
    condition: np.ndarray  # ModelConfig.condition_shape
    emo_vec: np.ndarray
    row: int = 0
    language: int = 0  # of LANGUAGES


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a dict. Raises: UserError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: no gpt: section. Use IndexTTS2's config.yaml")
    return content


def recorded_beside(manifest: Path) -> dict[str, Any]:
    """What a manifest was made with: the dataset: section of the config.yaml beside it. Raises: UserError."""
    beside = manifest.with_name("config.yaml")
    dataset = read_yaml(beside).get("dataset") if beside.is_file() else None
    return {key: dataset[key] for key in MADE_WITH if dataset.get(key)} if isinstance(dataset, dict) else {}


def recorded_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a checkpoint or an export of ours; nothing for other files."""
    if isinstance(content.get("made_with"), dict):
        return dict(content["made_with"])
    with contextlib.suppress(LookupError, TypeError, AttributeError):  # format 1, or somebody else's
        codecs = {part.get("codec_sha256") for part in content["manifests"]["train"]} - {None, ""}
        codec = {"codec_sha256": codecs.pop()} if len(codecs) == 1 else {}
        return {"tokenizer_sha256": content["tokenizer"]["sha256"], **codec}
    return {}


def compare_made_with(records: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
    """Compares records (what it is, its record) wherever two of them meet. Returns: everything that is known, and every
    contradiction with both of its sides and the remedy."""
    known: dict[str, tuple[str, Any]] = {}
    problems = []
    for name, record in records:
        for key, value in record.items():
            other, first = known.setdefault(key, (name, value))
            if first != value:
                problems.append(f"{other} ({MADE_WITH[key]} {str(first)[:12]}) does not match {name}, made with "
                                f"{str(value)[:12]}. Pass what belongs to it, or preprocess again")
    return {key: value for key, (_, value) in known.items()}, problems


@functools.cache
def row_keys(emo_source: str, no_prompt: bool, no_target: bool) -> tuple[Any, ...]:
    """Keys of a row's texts and of its numbers, what takes the values of both from it, and their types. A row that
    lacks one of the two emo_vecs takes the other, but for --emo-source target; with mixed there are keys of both."""
    usual = "target_emo_vec" if emo_source == "target" or no_prompt else "prompt_emo_vec"
    emo = (usual, usual if no_target else "target_emo_vec") if emo_source == "mixed" else (usual,)
    names = ("target_text_ids", "target_codes", "prompt_condition", *emo)
    texts = ("id", *(f"{name}_path" for name in names))
    numbers = ("target_text_len", "target_code_len", *(f"{name}_start" for name in names))
    return texts, numbers, itemgetter(*texts, *numbers), [*[str for _ in texts], *[int for _ in numbers]]


def parse_row(record: Any, emo_source: str) -> tuple[Any, ...]:
    """The values of row_keys; a start is -1 where the file holds this utterance alone. Raises: UserError that names
    what is missing or wrong in the row, without its place."""
    if not isinstance(record, dict):
        raise UserError("not a JSON object. Each line is one pair, as tools.build_pairs writes it")
    texts, numbers, *_ = row_keys(emo_source, not record.get("prompt_emo_vec_path"),
                                  not record.get("target_emo_vec_path"))
    missing = [key for key in ("id", *numbers[:2]) if record.get(key) in (None, "")]
    missing += [key for key in texts[1:] if not isinstance(record.get(key), str)]
    if missing == ["target_emo_vec_path"] and emo_source == "target":
        raise UserError(NO_TARGET_EMO)
    if missing:
        hint = ("A manifest of single clips? Pair it with tools.build_pairs" if "codes_path" in record else
                "Build the manifest with tools.build_pairs, or delete the line")
        raise UserError(f"missing {', '.join(missing)}. {hint}")
    for key in filter(record.__contains__, numbers):
        value, lowest = record[key], 1 if key.endswith("_len") else 0
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value < 2**63:
            raise UserError(f"{key} is {value!r}, not a whole number of at least {lowest} and below 2^63")
    return (str(record["id"]), *map(record.get, texts[1:]), *(record.get(key, -1) for key in numbers))


def usual_columns(records: Sequence[Any], emo_source: str) -> list[tuple[Any, ...]]:
    """The same of many rows, in columns; [] where parse_row has to look at each, as in few manifests of ours."""
    texts, _, take, types = row_keys(emo_source, False, False)
    try:
        columns = [*zip(*map(take, records), strict=True)]
    except (KeyError, TypeError):
        return []
    sound = all({*map(type, column)} == {kind} for column, kind in zip(columns, types, strict=False)) and all(
        map(all, columns[: len(texts) + 2])) and all(min(column) >= 0 and max(column) < 2**63
                                                     for column in columns[len(texts) :])
    return columns if sound else []


class Rows:
    """The rows of all manifests in columns, 120 bytes each; a Row is made when it is asked for."""

    def __init__(self, begin_with_language: bool = False) -> None:
        self.begin_with_language = begin_with_language  # texts of a .tiktoken file do
        self.blocks, self.ids, self.ends = list[np.ndarray](), bytearray(), array("q", [0])
        self.places = dict[Any, int]()  # what many rows share, numbered: manifest, language, folder, file of each kind
        self.digest = hashlib.sha256()  # of ids, lengths and order
        self.mix: list[tuple[int, float]] = []  # (rows, weight) of each manifest

    def extend(self, columns: Sequence[Any], lines: Sequence[int], languages: Sequence[str], manifest: int,
               folder: str) -> None:
        """Rows as usual_columns returns them."""
        ids, *files = columns[: len(columns) // 2]
        lengths = columns[len(columns) // 2 :]
        places = [self.places.setdefault(place, len(self.places))
                  for place in zip(repeat(manifest), languages, repeat(folder), *files, strict=False)]
        self.blocks.append(np.array([places, lines, *lengths], np.int64).T)
        names = [row_id.encode(errors="surrogatepass") for row_id in ids]
        self.ids += b"".join(names)
        self.ends.extend(accumulate(map(len, names), initial=self.ends.pop()))
        self.digest.update("".join([f"[{encode_basestring_ascii(row_id)}, {text_len}, {code_len}]" for row_id, text_len,
                                    code_len in zip(ids, *lengths[:2], strict=True)]).encode())

    def finish(self) -> None:
        """table: int64 [rows, columns]: number of the place, line, text_len, code_len, start of each kind."""
        self.table, self.files = np.concatenate(self.blocks), [*self.places]
        self.blocks.clear()

    def __getitem__(self, i: int) -> Row:
        place, line, text_len, code_len, *starts = self.table[i].tolist()
        manifest, language, folder, *files = self.files[place]
        row_id = self.ids[self.ends[i] : self.ends[i + 1]].decode(errors="surrogatepass")
        return Row(i, row_id, language, manifest, line, text_len, code_len, tuple(
            (os.path.join(folder, file), None if start < 0 else start)
            for file, start in zip(files, starts, strict=True)))


def read_manifest(manifest: str, rows: Rows, emo_source: str, progress: Callable[[str], None]) -> list[float]:
    """Adds a manifest's rows. Returns codes a second, over prompts that are targets too: what a fifth of them is below,
    the median, what a fifth is above (a length in whole seconds may be cut); [] where lengths tell nothing. Raises:
    UserError for a missing or empty file, and for a bad line with its number."""
    name, language, weight = split_manifest(manifest)
    path, folder, before, number = Path(name), os.path.dirname(Path(name)), len(rows.ends), len(rows.mix)
    seconds, codes, line, read, has_target_emo = {}, {}, 0, 0, False
    try:
        with path.open("rb", 2**18) as handle:
            while texts := handle.readlines(2**16):  # few enough to stay in the processor's cache: twice as fast
                lines: Any = range(read + 1, read + len(texts) + 1)
                try:
                    records = [*map(read_json, texts)]
                except ValueError:  # an empty line, NaN, a byte order mark; or json's own words for what is wrong
                    lines, records = [i for i in lines if not texts[i - read - 1].isspace()], []
                    for line in lines:
                        records.append(json.loads(texts[line - read - 1].decode("utf-8-sig")))
                columns, parsed = usual_columns(records, emo_source), list[tuple[Any, ...]]()
                for line in () if columns else lines:
                    parsed.append(parse_row(records[lines.index(line)], emo_source))
                own = [str(row.get("target_language") or row.get("language") or "").lower() for row in records]
                for token in dict.fromkeys(own) if rows.begin_with_language and language else ():
                    line = lines[own.index(token)]
                    if token in LANGUAGES and token != language:
                        raise UserError(f"its text begins with the token of {token!r}, the manifest was passed as "
                                        f"::{language}. Pass ::{token}, or no language")
                if records:
                    rows.extend(columns or [*zip(*parsed, strict=True)], lines,
                                [language] * len(own) if language else own, number, folder)
                for record in records if read <= 200_000 else ():  # enough to tell
                    if isinstance(record.get("prompt_duration"), (int, float)):
                        seconds[str(record.get("prompt_id"))] = record["prompt_duration"]
                    codes[str(record.get("target_id"))] = record["target_code_len"]
                has_target_emo = has_target_emo or any(record.get("target_emo_vec_path") for record in records)
                read += len(texts)
                if read % 2**14 < len(texts):
                    progress(f"{path}: {read} lines read")
    except UserError as error:
        raise UserError(f"{path}:{line}: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(f"{path}:{line}: broken JSON ({reason}). Mend or delete the line") from error
    except OSError as error:
        raise UserError(f"manifest {path}: {error.strerror}. Check --train-manifest and --val-manifest: "
                        "PATH, PATH::LANG, PATH::LANG@WEIGHT") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if len(rows.ends) == before:
        raise UserError(f"manifest {path}: no rows. Build it with tools.build_pairs")
    if emo_source == "mixed" and not has_target_emo:
        raise UserError(f"manifest {path}: {NO_TARGET_EMO}")
    both = [(codes[id], duration) for id, duration in seconds.items() if id in codes and duration > 0]
    rates = sorted(count / duration for count, duration in both)
    least = sorted(count / (duration + (duration % 1 == 0)) for count, duration in both)
    fifth = len(both) // 5
    rows.mix.append((len(rows.ends) - before, weight))
    return [rates[fifth], float(np.median(rates)), least[-1 - fifth] if fifth else rates[0]] if both else []


class ArrayFile:
    """A .npy file, read piece by piece: a page fault of a mapping on a disk that hangs would hold the interpreter.
    Raises: BadFeatureFile; UserError when this process may not open more files."""

    one_by_one = threading.Lock()  # Python 3.11 confuses syntax trees that threads build side by side, as a header's

    def __init__(self, path: str):
        self.path, formats = path, np.lib.format
        try:
            self.handle = open(path, "rb")
            start = io.BytesIO(self.handle.read(1 << 14))
            read_header = formats.read_array_header_1_0 if formats.read_magic(start)[0] == 1 else (
                formats.read_array_header_2_0)
            with self.one_by_one:
                self.shape, self.by_columns, self.dtype = read_header(start)
            self.offset, size = start.tell(), os.fstat(self.handle.fileno()).st_size
            needed = self.offset + math.prod(self.shape) * self.dtype.itemsize
            if self.dtype.hasobject or not self.shape or size < needed:
                raise ValueError(f"cut off: {size} bytes of {needed}" if self.shape else "no array of numbers in rows")
        except Exception as error:  # on a damaged header numpy's reader raises whatever its bytes make it meet
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise UserError(f"{path}: {first_line(error)}. Raise this limit of the process (ulimit -a shows it), "
                                "or merge the shards") from error
            raise BadFeatureFile(f"{path}: {first_line(error)}") from error

    def read(self, start: int, count: int) -> np.ndarray:
        """Rows start .. start + count - 1, fewer at the end of the array."""
        if self.by_columns and len(self.shape) > 1:
            return self.read_values(0, math.prod(self.shape)).reshape(self.shape[::-1]).T[start : start + count]
        width, count = math.prod(self.shape[1:]), max(0, min(count, self.shape[0] - start))
        return self.read_values(start * width, count * width).reshape(count, *self.shape[1:])

    def read_values(self, first: int, count: int) -> np.ndarray:
        at, pieces = self.offset + first * self.dtype.itemsize, []
        end = at + count * self.dtype.itemsize
        try:
            while at < end:
                pieces.append(os.pread(self.handle.fileno(), end - at, at))
                at += len(pieces[-1])
                if not pieces[-1]:
                    raise BadFeatureFile(f"{self.path}: cut off while it is trained on")
        except OSError as error:
            raise BadFeatureFile(f"{self.path}: {error.strerror}") from error
        return np.frombuffer(b"".join(pieces), self.dtype)


class ManifestDataset:
    """Rows of one or more manifests; item i is row i, item ~i the same with its target's emo_vec (--emo-source mixed).
    Several threads may read. Raises: UserError for bad manifests, and for files that many rows need."""

    def __init__(self, manifests: Sequence[str], model: ModelConfig, emo_source: str = "prompt",
                 progress: Callable[[str], None] = lambda text: None, begin_with_language: bool = False):
        self.model, self.rows, show_from = model, Rows(begin_with_language), time.monotonic() + 2
        self.progress = lambda text: progress(text) if time.monotonic() > show_from else None
        self.manifests: list[dict[str, Any]] = []
        self.rates: list[list[float]] = []  # codes a second
        self.shards: dict[str, ArrayFile] = {}
        self.highest_code, self.codes_seen = 0, 0  # of what is read at the start
        self.bad_rows: dict[int, str] = {}  # skipped, and why
        self.unreported: dict[int, str] = {}  # met by this process, not yet known to the others
        for manifest in manifests:
            self.rates.append(read_manifest(manifest, self.rows, emo_source, self.progress))
            path, language, _ = split_manifest(manifest)
            self.manifests.append({"path": path, "language": language, "rows": self.rows.mix[-1][0],
                                   "made_with": recorded_beside(Path(path))})
        self.rows.finish()
        self.mix = self.rows.mix
        self.languages = sorted({language for _, language, *_ in self.rows.files} - {""})
        # What validation tells apart, where there are several.
        self.parts = [part for group in (dict.fromkeys(manifest["path"] for manifest in self.manifests), self.languages)
                      if len(group) > 1 for part in group]
        most_text, most_codes = model.max_text_tokens, model.max_code_len
        long = np.flatnonzero((self.rows.table[:, 2:4] > [most_text, most_codes]).any(axis=1))
        if len(long):
            row = self.rows[long[0]]
            raise UserError(f"{self.place(row)}: {row.text_len} text tokens and {row.code_len} codes; the "
                            f"model takes at most {most_text} and {most_codes}. {len(long)} of {len(self)} rows are "
                            "too long: leave them out (tools.build_pairs has length limits)")
        unknown = [place[1] not in LANGUAGES and model.languages > 0 for place in self.rows.files]
        if any(unknown):
            row = self.rows[int(np.array(unknown)[self.rows.table[:, 0]].argmax())]
            raise UserError(f"{self.place(row)}: IndexTTS-2.5 has no language {row.language!r}. Name one of its own "
                            f"behind the manifest, such as PATH::am: {', '.join(LANGUAGES)}")
        for kind in KINDS if emo_source == "mixed" else KINDS[:4]:  # else the last is the one before it
            self.check_shards(kind)
        # The first rows that have files of their own are read before anything depends on them.
        own = np.flatnonzero((self.rows.table[:, 4:] < 0).any(axis=1))[:CHECKED_ROWS].tolist()
        with ThreadPoolExecutor(16) as pool:  # their disk may be far away
            samples = deque(pool.submit(self.__getitem__, row) for row in own)
            for row in own:
                try:
                    samples.popleft().result()  # and is let go
                except BadFeatureFile as error:
                    self.unreported[row] = str(error)

    def __len__(self) -> int:
        return len(self.rows.ends) - 1

    def place(self, row: Row) -> str:
        return f"{self.manifests[row.manifest]['path']}:{row.line}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of row ids, lengths and order, and of weights; never of paths, so that a data set may move."""
        digest = self.rows.digest.copy()
        if any(weight != 1 for _, weight in self.mix):
            digest.update(json.dumps(self.mix).encode())
        return digest.hexdigest()

    def check_shards(self, kind: str) -> None:
        """Opens every shard: one that is missing, or too short, or holds a wrong number, is an error at once."""
        at, table, places = KINDS.index(kind), self.rows.table, self.rows.files
        shared = np.flatnonzero(table[:, 4 + at] >= 0)
        used, of_row = np.unique(table[shared, 0], return_inverse=True)
        paths = [os.path.join(places[place][2], places[place][3 + at]) for place in used]
        number = {path: i for i, path in enumerate(dict.fromkeys(paths))}
        files = np.array([number[path] for path in paths])[of_row]
        order = files.argsort(kind="stable")
        for path, rows in zip(number, np.split(shared[order], np.diff(files[order]).nonzero()[0] + 1), strict=False):
            row, starts = self.rows[rows[0]], table[rows, 4 + at]
            self.progress(f"checking {path}")
            try:
                file = self.shards[path] = self.shards.get(path) or ArrayFile(path)
                self.check_type(file, row, kind)
                counts = table[rows, 2 + at] if at < 2 else np.full(len(rows), self.expected(row, kind)[0])
                beyond = starts > file.shape[0] - counts
                if beyond.any():
                    i = int(beyond.argmax())
                    raise UserError(f"{self.place(self.rows[rows[i]])}: {kind} {starts[i]} to {starts[i] + counts[i]} "
                                    f"lie beyond the end of {path} ({file.shape[0]} values). Manifest and arrays are "
                                    "not of one run of tools.preprocess")
                for first in range(0, file.shape[0] if at < 2 else 0, 2**22):
                    self.check_values(file.read(first, 2**22), kind, path, rows, starts, starts + counts, first)
            except BadFeatureFile as error:
                raise UserError(f"{self.place(row)}: {kind} of {len(rows)} of {len(self)} rows cannot be read: "
                                f"{error}. Bring the file back, or preprocess again") from error

    def check_values(self, values: np.ndarray, kind: str, path: str, rows: Any, starts: Any, ends: Any, first: int
                     ) -> None:
        """Raises: UserError for an id or code outside the model's that a row uses; rows lie at starts .. ends - 1 of
        the file, the values from `first` on."""
        what, limit, remedy = "text id", self.model.number_text_tokens, (
            "The manifest was made with another tokenizer: pass that one as --tokenizer, or preprocess again")
        if kind == "codes" and len(values):
            what, limit = "code", self.model.code_count
            remedy = "The config's number_mel_codes is not that of the codec"
            self.highest_code = max(self.highest_code, int(values.max()))
            self.codes_seen += len(values)
        wrong = first + np.flatnonzero((values < 0) | (values >= limit))
        following = np.append(wrong, 2**62)[wrong.searchsorted(starts)] if len(wrong) else ends
        for i in np.flatnonzero(following < ends)[:1]:
            raise UserError(f"{self.place(self.rows[rows[i]])}: {what} {values[following[i] - first]} is outside "
                            f"0..{limit - 1}. {remedy} ({path})")

    def expected(self, row: Row, kind: str) -> tuple[int, tuple[int, ...]]:
        """Rows of the array that an utterance has, and the shape of each."""
        count, width = self.model.condition_shape
        known = {"text_ids": (row.text_len, ()), "codes": (row.code_len, ()), "condition": (count, (width,))}
        return known.get(kind, (1, (self.model.model_dim,)))

    def check_type(self, file: ArrayFile, row: Row, kind: str) -> None:
        """Raises: UserError for an array that no utterance can be read from."""
        count, shape = self.expected(row, kind)
        wanted = (count, *shape) if count > 1 else shape
        found = file.shape if row.parts[KINDS.index(kind)][1] is None else (*wanted[:-1], *file.shape[1:])
        if not shape and (file.dtype.kind not in "iu" or len(file.shape) != 1):
            raise UserError(f"{self.place(row)}: {file.path} is {file.dtype} {list(file.shape)}, not a row of whole "
                            "numbers")
        if shape and (file.dtype.kind != "f" or found not in (wanted, (1, *wanted))):
            of = "" if file.dtype.kind == "f" else f" of {file.dtype}"
            raise UserError(f"{self.place(row)}: {file.path} holds {list(found)}{of}, the model needs {list(wanted)}. "
                            "Use the config the features were made for (--config)")

    def read_part(self, row: Row, kind: str) -> np.ndarray:
        """One utterance's values of a kind. Raises: BadFeatureFile; UserError where they contradict the manifest."""
        path, start = row.parts[KINDS.index(kind)]
        count, shape = self.expected(row, kind)
        if start is not None:
            values = self.shards[path].read(start, count)
        else:
            file = ArrayFile(path)
            self.check_type(file, row, kind)
            values = file.read(0, file.shape[0])
            file.handle.close()
        if shape:
            values = values.astype(np.float32).reshape((count, *shape) if kind == "condition" else shape)
            if not np.isfinite(values).all():
                raise BadFeatureFile(f"{path}: not finite")
            return values
        if len(values) != count:
            raise UserError(f"{self.place(row)}: the manifest says {count} {kind}, {path} has {len(values)}. "
                            "Preprocess the recording again")
        if start is None:
            self.check_values(values, kind, path, [row.number], np.array([0]), np.array([count]), 0)
        return values.astype(np.int64)

    def __getitem__(self, item: int) -> Sample:
        """Raises: BadFeatureFile; UserError where its files contradict the manifest or the model."""
        index, emo = (item, "emo_vec") if item >= 0 else (~item, "target_emo_vec")
        if index in self.bad_rows:
            raise BadFeatureFile(self.bad_rows[index])
        row = self.rows[index]
        text_ids, codes, condition, emo_vec = (self.read_part(row, kind) for kind in (*KINDS[:3], emo))
        language = LANGUAGES.index(row.language) if self.model.languages else 0
        return Sample(text_ids, codes, condition, emo_vec, index, language)

    def note_bad_rows(self, found: Mapping[int, str]) -> list[str]:
        """Remembers rows to leave out; returns one line for each new one. Raises: UserError above MAX_BAD_FRACTION."""
        new = {i: reason for i, reason in found.items() if i not in self.bad_rows}
        self.bad_rows.update(new)
        if len(self.bad_rows) > MAX_BAD_FRACTION * len(self):
            shown = "\n".join(f"  {self.place(self.rows[i])}: {reason} ({self.rows[i].id})"
                              for i, reason in list(self.bad_rows.items())[:5])
            raise UserError(f"{len(self.bad_rows)} of {len(self)} rows have missing or damaged feature files, or a "
                            f"loss that is not finite: more than {MAX_BAD_FRACTION:.0%}. Preprocess them again or drop "
                            f"the rows. The first:\n{shown}")
        return [f"{self.place(self.rows[i])}: skipped, {'' if reason == NOT_FINITE_TWICE else 'feature file '}{reason}"
                for i, reason in new.items()]


def near_equal_groups(lengths: Sequence[int], ratio: float = 1.25) -> list[list[int]]:
    """Sample numbers in groups whose longest is at most `ratio` times their shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and lengths[i] <= ratio * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def group_rows(lengths: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """PackedBatch.groups and .ungroup. Rows that fill a group up are causally behind every real row: never seen."""
    starts, offset = np.cumsum(lengths) - lengths, 0
    groups, ungroup = [], np.zeros(lengths.sum(), dtype=np.int64)
    for members in near_equal_groups(lengths.tolist()):
        columns = np.arange(lengths[members].max())
        is_real = columns < lengths[members, None]
        grid = np.where(is_real, starts[members, None] + columns, 0)
        ungroup[grid[is_real]] = offset + np.flatnonzero(is_real)
        offset += grid.size
        groups.append(torch.from_numpy(grid))
    return groups, torch.from_numpy(ungroup)


def end_to_end(pieces: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *pieces]))


def spans(*of_sample: tuple[Any, Any]) -> Tensor:
    """The numbers start .. start + count - 1 of every sample's (start, count), sample after sample."""
    table = np.stack(np.broadcast_arrays(*(value for span in of_sample for value in span)), axis=-1)
    return end_to_end([np.arange(start, start + count) for start, count in table.reshape(-1, 2).tolist()])


def collate_packed(samples: Sequence[Sample], model: ModelConfig) -> PackedBatch:
    """Lays samples end to end."""
    texts = [np.concatenate([[model.start_text_token], s.text_ids, [model.stop_text_token]]) for s in samples]
    mels = [np.concatenate([[model.start_mel_token], s.codes, [model.stop_mel_token]]) for s in samples]
    text_rows, mel_rows = (np.array([len(piece) for piece in pieces], dtype=np.int64) for pieces in (texts, mels))
    lengths, count = model.leading_rows + text_rows + mel_rows, model.condition_shape[0]
    first_text = np.cumsum(lengths) - lengths + model.leading_rows
    # Where its parts stand in cat(condition rows, 2 speed rows, text rows, mel rows).
    condition_at, speed_at = count * np.arange(len(samples)), count * len(samples)
    text_at = speed_at + 2 + np.cumsum(text_rows) - text_rows
    mel_at = speed_at + 2 + text_rows.sum() + np.cumsum(mel_rows) - mel_rows
    groups, ungroup = group_rows(lengths)
    condition = np.array([s.condition for s in samples], dtype=np.float32).reshape(-1, *model.condition_shape)
    emo_vec = np.array([s.emo_vec for s in samples], dtype=np.float32).reshape(-1, model.model_dim)
    return PackedBatch(
        rows=[s.row for s in samples], lengths=lengths.tolist(), longest=int(lengths.max(initial=0)),
        text_counts=(text_rows - 1).tolist(), mel_counts=(mel_rows - 1).tolist(),
        condition=torch.from_numpy(condition), emo_vec=torch.from_numpy(emo_vec),
        text_inputs=end_to_end(texts), text_positions=spans((0, text_rows)),
        text_languages=end_to_end([np.full(len(text), s.language) for text, s in zip(texts, samples, strict=True)]),
        mel_inputs=end_to_end(mels), mel_positions=spans((0, mel_rows)),
        pack_order=spans((condition_at, count), (speed_at + 1, 1), (speed_at, 1), (text_at, text_rows),
                         (mel_at, mel_rows)),
        text_scored=spans((first_text, text_rows - 1)), text_targets=end_to_end([text[1:] for text in texts]),
        mel_scored=spans((first_text + text_rows, mel_rows - 1)), mel_targets=end_to_end([mel[1:] for mel in mels]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), groups=groups, ungroup=ungroup)


def read_batch(data: ManifestDataset, items: Sequence[int], pinned: bool = False) -> PackedBatch:
    """Items of a data set end to end, in page-locked memory if pinned; what cannot be used is left out, and named."""
    samples, bad_rows, contradiction = list[Sample](), dict[int, str](), ""
    for item in items:
        try:
            samples.append(data[item])
        except BadFeatureFile as error:
            bad_rows[max(item, ~item)] = str(error)
        except UserError as error:
            contradiction = contradiction or str(error)
    batch = dataclasses.replace(collate_packed(samples, data.model), bad_rows=bad_rows, error=contradiction)
    return batch.map_tensors(Tensor.pin_memory) if pinned else batch


def blank_batch(config: ModelConfig, *lengths: tuple[int, int]) -> PackedBatch:
    """Samples of nothing, with these numbers of text ids and codes."""
    nothing = np.zeros(config.condition_shape), np.zeros(config.model_dim)
    return collate_packed([Sample(np.zeros(text_len, np.int64), np.zeros(code_len, np.int64), *nothing)
                           for text_len, code_len in lengths], config)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Sample order: pure functions of (seed, epoch, position)


def epoch_sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 .. num_samples - 1 that an epoch walks through; depends on nothing else."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


def shares_of(rows: int, weight: float) -> tuple[int, int]:
    """How often an epoch has every row of a manifest, and how many of them once more: 2.25 of 100 rows is (2, 25)."""
    whole, rest = divmod(weight, 1)
    return int(whole), round(rest * rows) or int(rest > 0)


def epoch_size(mix: Sequence[tuple[int, float]]) -> int:
    """Samples in an epoch over manifests of (rows, weight)."""
    return sum(whole * rows + more for rows, weight in mix for whole, more in [shares_of(rows, weight)])


def epoch_order(mix: Sequence[tuple[int, float]], seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order. What a weight has behind the point is another part in each epoch, until all
    rows of the manifest had their turn."""
    rows_of_epoch, first = [], 0
    for number, (rows, weight) in enumerate(mix):
        whole, more = shares_of(rows, weight)
        walk = np.random.Generator(np.random.PCG64([seed, number, 2])).permutation(rows) if more else np.arange(rows)
        once_more = walk[(epoch * more + np.arange(more)) % rows]
        rows_of_epoch.append(first + np.concatenate([np.tile(np.arange(rows), whole), once_more]))
        first += rows
    samples = np.concatenate(rows_of_epoch)
    return samples[epoch_sample_order(len(samples), seed, epoch)]


def split_micro_batches(indices: np.ndarray, batch_size: int) -> list[list[int]]:
    """Samples as micro-batches of at most batch_size."""
    return [indices[i : i + batch_size].tolist() for i in range(0, len(indices), batch_size)]


def draw_emo(rows: np.ndarray, config: TrainConfig, epoch: int) -> np.ndarray:
    """Rows as items: with --emo-source mixed, ~row where seed, epoch and row have it take its target's emo_vec."""
    if config.emo_source != "mixed" or not len(rows):
        return rows
    draws = np.random.Generator(np.random.PCG64([config.seed, epoch, 1])).random(int(rows.max()) + 1)
    return np.where(draws[rows] < 0.5, ~rows, rows)


def evenly_spread(num_samples: int, count: int) -> np.ndarray:
    """`count` of the samples 0 .. num_samples - 1, ascending and evenly spread; all of them for 0 or for too many."""
    if not count or count >= num_samples:
        return np.arange(num_samples)
    return np.arange(count) * num_samples // count


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


def last_step(position: Position, num_samples: int, config: TrainConfig) -> int:
    """The number of the step with which the last epoch ends."""
    if position.epoch >= config.epochs:
        return position.step
    return (position.step + math.ceil((num_samples - position.sample_in_epoch) / config.global_batch)
            + (config.epochs - position.epoch - 1) * math.ceil(num_samples / config.global_batch))


def end_of_run(position: Position, num_samples: int, config: TrainConfig) -> int:
    """The step at which the run ends: --max-steps, or the last epoch's end, whichever comes first."""
    to_the_end = last_step(position, num_samples, config)
    return min(config.max_steps, to_the_end) if config.max_steps else to_the_end


def steps_from(position: Position, mix: Sequence[tuple[int, float]], config: TrainConfig, rank: int = 0
               ) -> Iterator[list[list[int]]]:
    """Every step from a position to the end of the last epoch: one process's micro-batches, as items of the data set. A
    step takes the next global_batch samples, or what is left of the epoch; each process a part, which may be empty."""
    while position.epoch < config.epochs:
        epoch, order = position.epoch, draw_emo(epoch_order(mix, config.seed, position.epoch), config, position.epoch)
        while position.epoch == epoch:
            samples = order[position.sample_in_epoch : position.sample_in_epoch + config.global_batch]
            yield split_micro_batches(np.array_split(samples, config.world_size)[rank], config.batch_size)
            position = position.after_step(len(order), config.global_batch)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Process and state of a run


class Stopped(Exception):
    """A stop signal arrived; carries its number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Stop signals set a flag; a second SIGINT leaves at once."""

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

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def world_from(environ: Mapping[str, str]) -> World:
    """Reads torchrun's variables; without all of them the process is alone. Raises: UserError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in environ for name in names) or environ["WORLD_SIZE"] == "1":
        return World()
    texts = [environ[name] for name in names]
    rank, size, local_rank, local_size = (int(text) if text.isascii() and text.isdigit() else -1 for text in texts)
    if not (0 <= rank < size and 0 <= local_rank < local_size and {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys()):
        raise UserError(f"{', '.join(map('='.join, zip(names, texts, strict=True)))} (and MASTER_ADDR, MASTER_PORT): "
                        "not what torchrun sets. Start several processes with torchrun, or unset these variables")
    return World(rank, size, local_rank, local_size)


def no_event(*details: Any) -> None:
    """Only tests look at the events of Process."""


@dataclass
class Process:
    """This operating-system process: what stops it, where it prints, its place among the ranks.

    event(name, ...), for tests: ("step", run, batches) before a step's first forward pass, ("micro_step", run, batch)
    before each of them, ("step_done", run) before anything is logged, ("validation_batch", run, batch), ("logged", run)
    after a [Train] line, ("save", run) once a save is on its way.
    """

    stop: StopSignal
    console: Console
    world: World = World()
    event: Callable[..., None] = no_event
    run: Any = None  # the Run, once it is prepared

    def say(self, line: str) -> None:
        self.console.say(line)

    def check_stop(self) -> None:
        """Raises: Stopped; only in a lone process, as other ranks would wait for this one for ever."""
        if self.world.size == 1 and self.stop.signum:
            raise Stopped(self.stop.signum)

    def wait_for(self, future: Future[Any]) -> Any:
        """The result of what a thread does, looking at stop signals ten times a second. Raises: Stopped."""
        self.check_stop()
        while not wait([future], timeout=0.1).done:
            self.check_stop()
        return future.result()

    def in_thread(self, work: Callable[[], Any]) -> Any:
        """Does something in a thread that may hang on a disk; a stop is noticed meanwhile. Raises: Stopped."""
        pool = ThreadPoolExecutor(1, "preparation")
        try:
            return self.wait_for(pool.submit(work))
        finally:
            pool.shutdown(wait=False)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Where an error of one rank, or the same of all, ends all ranks. Raises: UserError on rank 0, which says it,
        once; SaidByRank0 elsewhere."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        errors = self.world.gather(error and str(error))
        failed = [f"on rank {rank}: {message}" for rank, message in enumerate(errors) if message]
        if failed:
            raise SaidByRank0 if self.world.rank > 0 else error or UserError(failed[0])

    def agree(self, *numbers: int, error: str = "") -> list[int]:
        """Sums numbers over the ranks; the place where all ranks stop, or fail, alike. Raises: Stopped once any rank
        got a signal; what failing_together raises once any has an error."""
        flags = [int(self.stop.signum == signum) for signum in STOP_SIGNALS]
        sums = self.world.add_up(torch.tensor([bool(error), *flags, *numbers])).tolist()
        if sums[0]:
            with self.failing_together():
                if error:
                    raise UserError(error)
        for signum, count in zip(STOP_SIGNALS, sums[1:], strict=False):
            if count:
                raise Stopped(signum)
        return sums[1 + len(flags) :]


def is_lost_contact(error: BaseException) -> bool:
    """Whether another rank went away, as gloo (a plain RuntimeError) and NCCL report it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextlib.contextmanager
def process_group(world: World) -> Iterator[None]:
    """gloo for what lives on the CPU (stop flags, token counts), NCCL for gradients on GPUs."""
    if world.size == 1:
        yield
        return
    if platform.system() == "Linux":  # a torchrun that is killed at once would leave its ranks behind, with the lock
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun started {world.local_size} processes, this machine has "
                            f"{torch.cuda.device_count()} GPUs. Start one process per GPU")
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # after a fault the others may be gone: nothing to say good-bye to


def flush_to_disk(path: Path) -> bool:
    """Waits until a file, or a directory's names, are on the disk; False where the file system has no such thing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM):
            raise
        return False
    return True


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
def writing_to(output_dir: Path) -> Iterator[None]:
    """Raises: UserError for an output directory that cannot be made or written to."""
    try:
        yield
    except OSError as error:
        remedy = ("Free some disk space and start again" if error.errno in FULL_DISK else
                  "Choose a directory you can write to")
        raise UserError(f"--output-dir {output_dir}: {error.strerror}. {remedy}") from error


@contextlib.contextmanager
def lock_output_dir(output_dir: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """One trainer per output directory, by a POSIX record lock: children do not inherit it, so what a killed run left
    behind never holds it. Raises: UserError that names the holder."""
    with writing_to(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = (output_dir / ".lock").open("a+")
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say(f"[Warn] --output-dir {output_dir} cannot be locked here ({error.strerror}): take care that only "
                    "one trainer works in it")
            else:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UserError(f"--output-dir {output_dir} is in use by {holder}. Stop that run, or choose another "
                                "directory") from error
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with writing_to(output_dir):
            handle.truncate(0)
            os.write(handle.fileno(), holder.encode())
        for leftover in output_dir.glob(".*.pth.partial"):  # only a killed save leaves them
            leftover.unlink()
        yield


def record_exit(path: Path, reason: str, status: int, process: Process) -> None:
    """Of several ranks the first one to fail knows why; the others only lose contact with it."""
    step = process.run.state.position.step if process.run else None
    if path.exists() or (process.world.rank > 0 and reason not in ("user_error", "crash")):
        return
    with contextlib.suppress(OSError), replacing(path) as partial:  # a full disk must not hide why the run ended
        partial.write_text(json.dumps({"reason": reason, "status": status, "step": step}) + "\n")


def explained(error: BaseException, output_dir: Path, process: Process) -> BaseException:
    """What is behind an error that nobody explained, in the user's terms; other errors as they are."""
    if isinstance(error, (Stopped, SaidByRank0, UserError)):
        return error
    if is_lost_contact(error) and (process.stop.signum or process.world.rank > 0):  # the others stopped first
        return Stopped(process.stop.signum) if process.stop.signum else SaidByRank0()
    if is_lost_contact(error):
        return UserError(f"another process of this run is gone ({first_line(error)}). The same command with --resume "
                         "auto goes on from the newest checkpoint")
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return UserError(f"--output-dir {output_dir}: {error.strerror}. Free some disk space and start again")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return UserError(f"not enough memory ({first_line(error)}). Close other programs, or lower --batch-size")
    return error


@contextlib.contextmanager
def exit_recorded(output_dir: Path, process: Process) -> Iterator[None]:
    """OUTPUT_DIR/last_exit.json: how this process ended; its absence means that it was killed. Raises: UserError,
    Stopped, SaidByRank0, or whatever a bug raises."""
    path = output_dir / "last_exit.json"
    if process.world.rank == 0:
        with writing_to(output_dir):
            path.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        known = explained(error, output_dir, process)
        reason = "stopped" if isinstance(known, Stopped) else "user_error" if isinstance(known, UserError) else "crash"
        status = 128 + known.signum if isinstance(known, Stopped) else 1
        if not isinstance(known, SaidByRank0):
            record_exit(path, "crash" if is_lost_contact(error) and reason == "user_error" else reason, status, process)
        if known is error:
            raise
        raise known from error
    record_exit(path, "finished", 0, process)


def ignore_os_errors(failure: threading.ExceptHookArgs) -> None:
    """Keeps TensorBoard's writer thread from printing stack frames on a full disk; MetricsLog sees that by itself."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


class MetricsLog:
    """metrics.jsonl (every value in full precision) and TensorBoard events of one run directory. While the disk is full
    lines wait in memory, and TensorBoard's events are left out."""

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.file = directory, (directory / "metrics.jsonl").open("ab", buffering=0)
        self.unwritten, self.lock = b"", threading.Lock()  # a checkpoint's writer flushes while training writes
        self.open_tensorboard(first_step)

    def open_tensorboard(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = ignore_os_errors
        self.tensorboard: Any = SummaryWriter(str(self.directory), purge_step=first_step)

    def write(self, kind: str, position: Position, values: Mapping[str, float], manifest: str = "") -> None:
        """kind is "train", "val", "val_part" (of one manifest) or "save"; the line is on its way to the disk when this
        returns."""
        line = {"kind": kind, "epoch": position.last_epoch, "step": position.step,
                **({"manifest": manifest} if manifest else {}), **values}
        with self.lock:
            self.unwritten += json.dumps(line).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk; flush() will try again, and report it
            self.write_lines()
        try:
            if self.tensorboard is None:
                self.open_tensorboard(position.step)
            for name, value in values.items():
                self.tensorboard.add_scalar("/".join(filter(None, (kind, manifest, name))), value, position.step)
        except OSError:
            self.tensorboard = None

    def write_lines(self) -> None:
        with self.lock:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def flush(self) -> None:
        """Everything so far is on the disk when this returns. Raises: OSError."""
        self.write_lines()
        flush_to_disk(self.directory / "metrics.jsonl")
        if (tensorboard := self.tensorboard) is not None:
            tensorboard.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the last save was refused too, and said so
            self.flush()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def cut_metrics(path: Path, last_step: int, validates_again: bool) -> list[str]:
    """Drops lines that a resumed run will write again, and a torn last line. Returns what was dropped."""
    if not path.exists():
        return []
    kept, dropped = list[str](), list[str]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        again = True  # unless it is a line of ours
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            record = json.loads(line if line.endswith("\n") else "torn")
            step, is_validation = record["step"], record["kind"].startswith("val")
            again = step > last_step or (validates_again and step == last_step and is_validation)
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
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()


@dataclass
class TrainState:
    """What a run remembers besides weights and optimizer; all of it is in every checkpoint."""

    position: Position = Position()
    schedule: Schedule = Schedule(0.0, 0, 0)
    best: dict[str, Any] | None = None  # {"step", "loss", "measured_on"} of the best validation
    last_val: dict[str, float] | None = None
    recent_checkpoints: list[str] = field(default_factory=list)
    rotated_out: list[str] = field(default_factory=list)  # deletions that the newest save still has to do
    run_dir: str = ""  # relative to the output directory
    base_vocab: int = 0  # text tokens of the base checkpoint, for --freeze-base-vocab
    first_batch_size: int = 0  # that the run began with: validation keeps its choice of rows
    tokens_seen: int = 0
    nonfinite_rows: list[int] = field(default_factory=list)  # whose loss was not finite since the last [Train] line
    suspect_rows: list[int] = field(default_factory=list)  # whose loss was so once before that
    left_out: list[int] = field(default_factory=list)  # whose loss was so again
    skips_told: int = 0  # skipped updates that a [Train] line was followed by
    validations_since_best: int = 0
    base_losses: dict[str, float] = field(default_factory=dict)  # mel_loss of each language before the first step


@dataclass
class PendingSave:
    """One checkpoint on its way to the disk, what becomes of the state once it is there, and what came of it."""

    path: Path
    links: list[Path]  # latest.pth, best.pth
    state: TrainState  # as saved
    is_best: bool
    validation_owed: bool
    values: dict[str, float] = field(default_factory=dict)  # seconds_blocked, bytes, seconds_written
    is_flushed: bool = True  # False: the file system cannot promise that the name outlives a power cut
    warnings: list[str] = field(default_factory=list)
    written: Future[None] = field(init=False)  # its error is why there is no checkpoint


@dataclass
class Run:
    """Everything the training loop works with."""

    config: TrainConfig
    output_dir: Path
    process: Process
    precision: Precision
    model: UnifiedVoiceGPT
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    carried: dict[str, Tensor]  # tensors of the base checkpoint that the loss does not use
    gpt_section: dict[str, Any]
    tokenizer: dict[str, Any]  # path, sha256, size
    made_with: dict[str, Any]
    train_data: ManifestDataset
    val_data: ManifestDataset
    state: TrainState
    threads: int
    ddp: DistributedDataParallel | None = None  # of the model, with several processes
    reader: Generator[list[Future[PackedBatch]]] | None = None  # of the training data, from where the run stands
    metrics: MetricsLog | None = None  # rank 0's
    lora_base: dict[str, Any] | None = None  # path and sha256 of the weights that LoRA adds to
    base_text_factor: float = 1.0  # of the learning rate, for the base's rows of VOCAB_TENSORS
    # [updates skipped for non-finite gradients, how many in a row now, the longest row]; on the device, read rarely
    nonfinite: Tensor = field(default_factory=lambda: torch.zeros(3))
    nonfinite_flags: list[tuple[list[int], Tensor]] = field(default_factory=list)  # (rows, [B] bool) since it was read
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint writer"))
    saving: PendingSave | None = None  # at most one in flight
    saved_step: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    save_retry_step: int = 0  # after a failed save
    warned_flush: bool = False
    profiler: Any = None

    @functools.cached_property
    def learned(self) -> set[str]:
        """Tensors that this run trains, or has trained before it was resumed: all that a checkpoint of LoRA holds."""
        return {name for name, weight in self.model.named_parameters() if weight.requires_grad}

    @property
    def end(self) -> int:
        """The number of its last step."""
        return end_of_run(self.state.position, epoch_size(self.train_data.mix), self.config)

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.state.validations_since_best

    @property
    def finished(self) -> bool:
        return self.state.position.step >= self.end or self.out_of_patience

    @property
    def log_interval(self) -> int:
        """At least ten [Train] lines in every run whose interval was not typed."""
        return self.config.log_interval or max(1, min(100, self.end // 10))

    @property
    def validation_due(self) -> bool:
        """At the end, and every interval; one that was not typed gives a short run two validations, 0 one an epoch."""
        interval, position = self.config.val_interval, self.state.position
        interval = max(1, min(1000, self.end // 2)) if interval is None else interval
        return position.step == self.end or (
            position.step % interval == 0 if interval else position.sample_in_epoch == 0)

    @property
    def validation_owed(self) -> bool:
        """A stop came between the step and its validation."""
        step, last_val = self.state.position.step, self.state.last_val
        return 0 < step <= self.end and self.validation_due and (last_val is None or last_val["step"] != step)

    def restart_reading(self) -> None:
        """From where the run stands now, when what was read ahead no longer holds."""
        if self.reader:
            self.reader.close()
        self.reader = None


# ---------------------------------------------------------------------------------------------------------------------
# 6. Optimisation: schedule, precision, device, AdamW

# Dense 16-bit peak of one device (vendors' data sheets), for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 125e12, "T4": 65e12,
              "V100": 125e12}


def get_lr(step: int, schedule: Schedule) -> float:
    """The learning rate of the optimizer step with this number (from 1)."""
    if step <= schedule.warmup_steps:
        return schedule.base_lr * step / schedule.warmup_steps
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, schedule.total_steps - schedule.warmup_steps))
    return schedule.base_lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_schedule(config: TrainConfig, position: Position, num_samples: int) -> Schedule:
    """It ends where the run ends."""
    total = end_of_run(position, num_samples, config)
    warmup = min(1000, total // 10) if config.warmup_steps is None else config.warmup_steps
    return Schedule(config.learning_rate, warmup, total)


def choose_precision(amp: str, device: torch.device) -> Precision:
    if amp == "auto":
        amp = "bf16" if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return Precision(device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp])


def use_glibc_heap() -> None:
    """Keeps freed memory in the process: on a CPU most of a small model's step goes into page faults otherwise."""
    if platform.libc_ver()[0] == "glibc":
        for threshold in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, 2**31 - 1)


def setup_device() -> torch.device:
    """Picks CUDA or the CPU and turns on TF32. Raises: UserError when the driver shows a GPU that torch cannot use;
    nobody trains on the CPU by accident."""
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
    return device


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What must stay the same for a bit-for-bit continuation."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "device": f"{device.type} {name}", "threads": torch.get_num_threads(),
            "world_size": world_size, "arithmetic": ARITHMETIC}


def choose_attention(model: UnifiedVoiceGPT, precision: Precision) -> str:
    """Takes the varlen path where the hardware has it and it agrees with the portable one. Returns what was chosen."""
    device, dtype = precision.device, precision.dtype
    if device.type != "cuda" or dtype is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "padded causal SDPA"
    batch = blank_batch(model.config, (9, 40), (9, 5)).to(device)
    shape = sum(batch.lengths), 3, model.config.heads, model.config.model_dim // model.config.heads
    qkv = torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    results = []
    try:
        for attention in (padded_attention, varlen_attention):
            leaf = qkv.clone().requires_grad_()
            out = attention(leaf, batch)
            out.float().square().sum().backward()
            results.append((out.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        return f"padded causal SDPA (varlen attention failed its check: {first_line(error)})"
    model.attention = varlen_attention
    return "varlen"


def use_deterministic_algorithms(model: UnifiedVoiceGPT, precision: Precision) -> str:
    """Strictly, if a step's kernels all have such a form; else PyTorch only warns, and flash attention's backward pass,
    which looks at that, gives other bits in each run. Returns what was chosen."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        with precision.autocast():
            text, mel, _ = token_losses(model, blank_batch(model.config, (1, 1)).to(precision.device))
        (text.sum() + mel.sum()).backward()
        return "deterministic"
    except RuntimeError as error:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return f"deterministic where it can be ({first_line(error)}): a resumed run may differ in the last bits"
    finally:
        model.zero_grad(set_to_none=True)


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The tensors of a pattern or of a named set; base-text and new-text are rows of VOCAB_TENSORS."""
    blocks = re.fullmatch(r"first:([0-9]+)", pattern)
    if blocks:
        return [name for name in names if name.startswith(tuple(f"gpt.h.{i}." for i in range(int(blocks[1]))))]
    sets = {"base-text": VOCAB_TENSORS, "new-text": VOCAB_TENSORS, "conditioning": ("spk_emb_proj.*",)}
    return [name for name in names for one in sets.get(pattern, (pattern,)) if fnmatch.fnmatchcase(name, one)]


def lr_factors(names: Sequence[str], config: TrainConfig, base_vocab: int, tokens: int = 0
               ) -> tuple[dict[str, float], float]:
    """What LoRA, --freeze (0) and --lr-scale make of the learning rate of every tensor, later rules win; and that of
    the base checkpoint's text rows (base_vocab of all tokens) as a part of their tensors'. Raises: UserError."""
    factors, rows = dict.fromkeys(names, 1.0), {"base-text": 1.0, "new-text": 1.0}
    if config.lora_rank:
        factors.update({name: 0.0 for name in names if ".lora." not in name and not (
            0 < base_vocab < tokens and name in VOCAB_TENSORS)})
    rules = [("--lr-scale", *text.rpartition("=")[::2]) for text in config.lr_scale] + [
        ("--freeze", pattern, "0") for pattern in config.freeze] + [
        ("--freeze-base-vocab", "base-text", "0")] * config.freeze_base_vocab
    for flag, pattern, text in rules:
        factor = float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", text) else math.nan
        if flag == "--lr-scale" and not (pattern and 0 < factor <= MAX_WEIGHT):
            raise UserError(f"{flag} {pattern}{'=' * bool(pattern)}{text}: give PATTERN=FACTOR, a number above 0 and "
                            f"at most {MAX_WEIGHT}, such as new-text=10")
        found = matching(pattern, names)
        if not found and pattern != "conditioning":  # IndexTTS2's is carried, never trained
            raise UserError(f"{flag} {pattern}: no tensor has such a name. Names are like {names[-1]}; sets are "
                            "first:N, base-text, new-text and conditioning")
        if pattern in rows and not base_vocab:
            what = flag if flag == "--freeze-base-vocab" else f"{flag} {pattern}"
            raise UserError(f"{what} goes with --base-checkpoint: the rows of that file's text tokens")
        if pattern == "new-text" and (not factor or base_vocab >= tokens > 0):
            raise UserError(f"{flag} new-text: " + ("the base checkpoint has every token of --tokenizer. Leave it out"
                            if factor else "rows of new tokens know nothing yet. Leave it out, or freeze 'text_*'"))
        if pattern in rows:
            rows[pattern] = factor
        else:
            factors.update(dict.fromkeys(filter(factors.get, found), factor))
    factors.update({name: factors[name] * rows["new-text"] for name in VOCAB_TENSORS if name in factors})
    if not any(factors.values()):
        raise UserError("--freeze leaves nothing to train. Name fewer tensors")
    return factors, rows["base-text"] / rows["new-text"]


def make_optimizer(model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
                   ) -> torch.optim.AdamW:
    """AdamW with a group for every factor of the learning rate; no weight decay on biases, norms and embeddings.
    Tensors of factor 0 need no gradient from here on."""
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and "embedding" not in name and name != "speed_emb.weight"
        factor = factors[name] if factors else 1.0
        parameter.requires_grad_(factor != 0)
        if factor:
            groups.setdefault((factor, is_matrix), []).append((name, parameter))
    return torch.optim.AdamW([{"params": params, "weight_decay": weight_decay if is_matrix else 0.0, "lr_scale": factor}
                              for (factor, is_matrix), params in groups.items() if params], lr=0.0, fused=True)


def step_flops(config: ModelConfig, batches: Sequence[PackedBatch]) -> float:
    """Floating-point operations of forward and backward: 6 per weight and row, and causal attention."""
    dim, layers = config.model_dim, config.layers
    return 6.0 * dim * sum(
        layers * sum(12 * dim * length + length**2 for length in batch.lengths) + sum(batch.text_counts) * (
            config.number_text_tokens + 1) + sum(batch.mel_counts) * config.number_mel_codes for batch in batches)


def peak_flops(precision: Precision) -> float:
    """The device's data-sheet peak; where it is unknown, the best rate of a large matrix product measured here."""
    device = precision.device
    if device.type == "cuda" and precision.dtype is not None:
        name = torch.cuda.get_device_name(device)
        known = next((flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
        if known:
            return known
    size, best = 4096 if device.type == "cuda" else 768, math.inf
    matrix = torch.ones(size, size, device=device, dtype=precision.dtype or torch.float32)
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
        if best > 0.1:  # fp16 on a CPU: a second and more for five, in which no signal is noticed
            break
    return 2 * size**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training step

ONE_SAMPLE_TOO_LARGE = ("out of GPU memory with one sample in a micro-batch. Use --grad-checkpointing, --amp, or leave "
                        "out the longest rows")


@dataclass
class StepStats:
    """One optimizer step; tensors stay on the device until they are logged. Losses and mel_top1 are this process's part
    of the token means, tokens and flops those of all processes."""

    text_loss: Tensor
    mel_loss: Tensor
    mel_top1: Tensor  # 0 in steps without a [Train] line
    grad_norm: Tensor
    lr: float
    tokens: int
    flops: float
    save_due: bool  # --save-minutes, by rank 0's clock


def read_ahead(run: Run, data: ManifestDataset, steps: Iterable[list[list[int]]]
               ) -> Generator[list[Future[PackedBatch]]]:
    """The micro-batches of one step after the other, which threads read while earlier steps are trained: at least the
    step after it, and one micro-batch a thread, are on their way. Its close() waits for no read: one may never return.
    """
    pool, pinned = ThreadPoolExecutor(run.threads, "reader"), run.precision.device.type == "cuda"
    pending = deque[list[Future[PackedBatch]]]()
    try:
        for step in steps:
            pending.append([pool.submit(read_batch, data, items, pinned) for items in step])
            if len(pending) > 1 and max(len(pending), sum(map(len, pending))) >= run.threads:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def share_bad_rows(run: Run, data: ManifestDataset) -> None:
    """Tells every rank the bad rows that any of them met, so that all count alike. Raises: UserError."""
    found, data.unreported = data.unreported, {}
    with run.process.failing_together():
        for bad_rows in run.process.world.gather(found):
            for line in data.note_bad_rows(bad_rows):
                run.process.say(f"[Warn] {line}")


def receive(run: Run, data: ManifestDataset, futures: Sequence[Future[PackedBatch]], *numbers: int
            ) -> tuple[list[PackedBatch], list[int]]:
    """Micro-batches that threads have read, on the device, and the sums over all ranks of the numbers, scored text
    rows, scored mel rows, rows and FLOPs. Raises: Stopped; UserError for rows that contradict the manifest."""
    batches = [run.process.wait_for(future) for future in futures]
    for batch in batches:
        data.unreported.update(batch.bad_rows)
    bad_rows, *sums = run.process.agree(
        len(data.unreported), *numbers, sum(sum(batch.text_counts) for batch in batches),
        sum(sum(batch.mel_counts) for batch in batches), sum(sum(batch.lengths) for batch in batches),
        int(step_flops(run.model.config, batches) * (2 / 3 if run.config.lora_rank else 1)),  # frozen: no gradients
        error=next((batch.error for batch in batches if batch.error), ""))
    if bad_rows:
        share_bad_rows(run, data)
    return [batch.to(run.precision.device) for batch in batches if batch.rows], sums


def backward(run: Run, batch: PackedBatch, text_tokens: int, mel_tokens: int, is_last: bool, weight: float = 1.0,
             top1: bool = True) -> tuple[Tensor, Tensor]:
    """Adds one micro-batch's gradients, of losses divided by the whole step's text_tokens and mel_tokens; the last one
    of a step exchanges them between the ranks. Returns: sums [3] of text losses, mel losses and (with top1) codes that
    were the likeliest, float64; the samples [B] whose losses are not finite."""
    with run.ddp.no_sync() if run.ddp and not is_last else contextlib.nullcontext():
        with run.precision.autocast():
            text, mel, right = token_losses(run.ddp or run.model, batch, top1)
            text_sum, mel_sum = text.sum(), mel.sum()
            loss = (run.config.text_loss_weight * text_sum / text_tokens
                    + run.config.mel_loss_weight * mel_sum / mel_tokens)
        loss = loss * (weight * run.process.world.size)  # DistributedDataParallel divides by the number of processes
        run.scaler.scale(loss).backward()
    sums = weight * torch.stack([text_sum.detach(), mel_sum.detach(), right.sum()]).double()
    parts = zip(text.detach().split(batch.text_counts), mel.detach().split(batch.mel_counts), strict=True)
    return sums, torch.stack([of_text.sum() + of_mel.sum() for of_text, of_mel in parts]).isfinite().logical_not()


def update(run: Run) -> Tensor:
    """Clips and updates; an update with non-finite gradients is skipped on the device. Returns the gradient norm."""
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    if not parameters:  # every sample of the step had a damaged file
        return torch.zeros(())
    if run.scaler.is_enabled():
        run.scaler.unscale_(run.optimizer)
    base_text = {name: weight.detach()[: run.state.base_vocab] for name, weight in run.model.named_parameters()
                 if name in VOCAB_TENSORS and weight.grad is not None and run.base_text_factor != 1}
    before = {name: rows.clone() for name, rows in base_text.items()}
    for name in base_text if run.base_text_factor == 0 else ():  # takes no part in clipping
        run.model.get_parameter(name).grad[: run.state.base_vocab] = 0  # type: ignore[index]
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
    for name, rows in base_text.items():
        rows.copy_(before[name].lerp(rows, run.base_text_factor))
    return grad_norm


def train_step(run: Run, futures: Sequence[Future[PackedBatch]]) -> StepStats:
    """One optimizer step over its micro-batches; the loss is the token mean over all of them, however they are split.
    Raises: Stopped between micro-batches, and torch.OutOfMemoryError; weights are then those of the step before."""
    config, process, step = run.config, run.process, run.state.position.step + 1
    save_due = process.world.rank == 0 and 0 < config.save_minutes <= (time.monotonic() - run.saved_at) / 60
    batches, (saves, text_tokens, mel_tokens, tokens, flops) = receive(run, run.train_data, futures, int(save_due))
    process.event("step", run, batches)
    text_tokens, mel_tokens = max(1, text_tokens), max(1, mel_tokens)
    lr = get_lr(step, run.state.schedule)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    totals, flags = torch.zeros(3, dtype=torch.float64, device=run.precision.device), []
    for micro_step, batch in enumerate(batches):
        process.check_stop()
        process.event("micro_step", run, batch)
        torch.manual_seed(dropout_seed(config.seed, step, micro_step, process.world.rank))
        sums, nonfinite = backward(run, batch, text_tokens, mel_tokens, is_last=micro_step == len(batches) - 1,
                                   top1=step % run.log_interval == 0)
        totals += sums
        flags.append((batch.rows, nonfinite))
    if run.ddp and not batches:
        # Without samples in this step: gradients are exchanged in the backward pass.
        idle = blank_batch(run.model.config, (1, 1)).to(run.precision.device)
        backward(run, idle, text_tokens, mel_tokens, is_last=True, weight=0.0)
    process.check_stop()
    grad_norm = update(run)
    run.nonfinite_flags += flags
    return StepStats(totals[0] / text_tokens, totals[1] / mel_tokens, totals[2] / mel_tokens, grad_norm, lr, tokens,
                     float(flops), bool(saves))


def split_after_out_of_memory(run: Run) -> None:
    """Halves the micro-batch, keeps the global batch. Raises: UserError when it is one sample already."""
    config = run.config
    if run.process.world.size > 1:
        raise UserError(f"out of GPU memory on rank {run.process.world.rank}. Start again with a smaller --batch-size "
                        "and --resume auto: the global batch stays")
    if config.batch_size == 1:
        raise UserError(ONE_SAMPLE_TOO_LARGE)
    batch_size, grad_accumulation = split_global_batch(config.global_batch, config.batch_size // 2)
    run.process.say(f"[Warn] Out of GPU memory: micro-batches of {batch_size} x {grad_accumulation} from now on, the "
                    f"same global batch of {config.global_batch}")
    run.config = dataclasses.replace(config, batch_size=batch_size, grad_accumulation=grad_accumulation)
    run.restart_reading()
    run.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()  # nothing without CUDA


def compile_model(model: UnifiedVoiceGPT) -> None:
    """Compiles it so that a resumed run, on another machine too, gets the same bits: no kernel is chosen for its speed,
    no sum cut up by the sizes of the first batch. Raises: UserError where each batch would be compiled anew."""
    import torch._inductor.config as inductor

    if model.attention is not varlen_attention:
        raise UserError("--compile works with varlen attention only: on a GPU of compute capability 8.0 and up, with "
                        "--amp. Leave it out, or type --no-compile")
    inductor.deterministic, inductor.split_reductions = True, False
    model.compile(dynamic=True)


def wrap_for_ranks(run: Run) -> None:
    """Wraps the model for several processes, which then start from rank 0's weights. Two backward passes of weight 0
    settle in which buckets gradients are exchanged: it would change after the first step, and a resumed run differ."""
    world, device = run.process.world, run.precision.device
    if world.size == 1:
        return
    run.ddp = DistributedDataParallel(run.model, device_ids=[world.local_rank] if device.type == "cuda" else None)
    run.model.train()
    for _ in range(2):
        backward(run, blank_batch(run.model.config, (1, 1)).to(device), 1, 1, is_last=True, weight=0.0)
        run.optimizer.zero_grad(set_to_none=True)


def in_halves(run: Run, data: ManifestDataset, batch: PackedBatch) -> list[PackedBatch]:
    """A batch that was too large for the GPU's memory as two. Raises: UserError for one sample."""
    if len(batch.rows) == 1:
        raise UserError(ONE_SAMPLE_TOO_LARGE)
    torch.cuda.empty_cache()  # nothing without CUDA
    middle = len(batch.rows) // 2
    run.process.say(f"[Warn] Out of GPU memory: a validation batch of {len(batch.rows)} is split in two")
    return [read_batch(data, draw_emo(np.array(rows), run.config, 0).tolist()).to(run.precision.device)
            for rows in (batch.rows[:middle], batch.rows[middle:])]


def validation_rows(run: Run) -> np.ndarray:
    """The fixed choice of rows that every validation of the run reads, evenly spread over all manifests."""
    size = run.config.val_batch_size or run.state.first_batch_size
    return evenly_spread(len(run.val_data), run.config.max_val_batches * size)


def add_losses(sums: Tensor, data: ManifestDataset, batch: PackedBatch, text: Tensor, mel: Tensor, right: Tensor
               ) -> None:
    """Adds to sums [1 + parts, 5]: text losses, mel losses, likeliest codes, text tokens, codes."""
    of_rows = [(data.manifests[data.rows[row].manifest]["path"], data.rows[row].language) for row in batch.rows]
    for number, part in enumerate(["", *data.parts]):  # "": of all
        inside = [float(not part or part in of_row) for of_row in of_rows]
        its_text, its_mel = (torch.from_numpy(np.repeat(inside, counts)).to(sums.device)
                             for counts in (batch.text_counts, batch.mel_counts))
        sums[number] += torch.stack([(text * its_text).sum(), (mel * its_mel).sum(), (right * its_mel).sum(),
                                     its_text.sum(), its_mel.sum()])


def eval_records(data: ManifestDataset, batch: PackedBatch, text: Tensor, mel: Tensor) -> Iterator[dict[str, Any]]:
    """The rows of eval.jsonl for one batch."""
    for row, of_text, of_mel in zip(
            batch.rows, text.split(batch.text_counts), mel.split(batch.mel_counts), strict=True):
        text_losses, mel_losses = of_text.tolist(), of_mel.tolist()
        yield {"id": data.rows[row].id, "text_loss": sum(text_losses) / len(text_losses),
               "mel_loss": sum(mel_losses) / len(mel_losses), "text_tokens": len(text_losses),
               "mel_tokens": len(mel_losses), "text_token_losses": text_losses, "mel_token_losses": mel_losses}


def evaluate(run: Run, on_row: Callable[[dict[str, Any]], None] | None = None) -> dict[str, dict[str, float]]:
    """Token means over the validation rows in their fixed order, without dropout: of all (""), of each of data.parts.
    on_row receives a dict for every row: id, mean and per-token losses, token counts. Raises: Stopped, UserError."""
    data, world, device = run.val_data, run.process.world, run.precision.device
    items = draw_emo(validation_rows(run), run.config, 0)  # the same at every validation
    batches = split_micro_batches(items, run.config.val_batch_size or run.config.batch_size)
    sums = torch.zeros(1 + len(data.parts), 5, dtype=torch.float64, device=device)
    run.model.eval()
    with contextlib.closing(read_ahead(run, data, ([batch] for batch in batches[world.rank :: world.size]))) as reader:
        for done in range(0, len(batches), world.size):
            todo, _ = receive(run, data, next(reader, []))
            while todo:
                batch = todo.pop(0)
                losses = None
                with contextlib.suppress(torch.OutOfMemoryError), torch.no_grad(), run.precision.autocast():
                    run.process.event("validation_batch", run, batch)
                    losses = token_losses(run.model, batch)
                if losses is None:
                    todo = in_halves(run, data, batch) + todo
                    continue
                add_losses(sums, data, batch, *losses)
                for record in eval_records(data, batch, *losses[:2]) if on_row else ():
                    on_row(record)  # type: ignore[misc]
            run.process.console.progress(f"validation: {min(len(batches), done + world.size)}/{len(batches)}")
    return {part: {"text_loss": text_sum / max(1, text_count), "mel_loss": mel_sum / max(1, mel_count),
                   "mel_top1": right_sum / max(1, mel_count)}
            for part, (text_sum, mel_sum, right_sum, text_count, mel_count) in zip(
                ["", *data.parts], world.add_up(sums).tolist(), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# 8. Checkpoint file: one writer, one reader

REQUIRED_KEYS = ("model", "optimizer", "epoch", "step")
COMPLETE_KEYS = ("config", "environment", "sample_in_epoch", "tokenizer", "train_data", "model_config", "manifests",
                 "recent_checkpoints", "rotated_out", "run_dir", "nonfinite", "best", "last_val")
# The order of names in IndexTTS2's files.
NAME_ORDER = (*CARRIED_PREFIXES[:2], "spk_emb_proj.", *CARRIED_PREFIXES[2:4], "text_embedding.", "lang_embedding.",
              *CARRIED_PREFIXES[4:], "mel_embedding.", "gpt.", "mel_pos_embedding.", "text_pos_embedding.",
              "final_norm.", "text_head.", "mel_head.", "speed_emb.")


def conditioning_record(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which modules make the conditions that these weights know, {} where the file has none: a SHA-256 over a line
    "NAME [SHAPE]" and the values as float32, little-endian, of each carried tensor by name."""
    digest, names = hashlib.sha256(), sorted(name for name in tensors if name.startswith(CARRIED_PREFIXES))
    for name in names:
        values = tensors[name].float().numpy().astype("<f4", copy=False)
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values).data.cast("B"))
    return {"conditioning_sha256": digest.hexdigest()} if names else {}


def in_name_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = [name for prefix in NAME_ORDER for name in tensors if name.startswith(prefix)]
    return {name: tensors[name] for name in (*known, *tensors)}


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


def make_digests(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The digests that a checkpoint carries: of every tensor, and of everything else."""
    tensors, rest = digest_tree({key: value for key, value in checkpoint.items() if key != "digests"})
    return {"algorithm": "sha256", "tensors": tensors, "rest": hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


def digest_problem(checkpoint: Mapping[str, Any]) -> str | None:
    """What differs from the digests inside, or None."""
    stored, found = checkpoint["digests"], make_digests(checkpoint)
    if stored == found:
        return None
    if not isinstance(stored, dict) or not isinstance(stored.get("tensors"), dict):
        return "its digests are unreadable"
    wrong = [path for path, digest in found["tensors"].items() if stored["tensors"].get(path) != digest]
    names = ", ".join(path.replace("str:", "").replace("int:", "").strip("/") for path in wrong[:3])
    return f"{len(wrong)} tensors differ from their digests ({names})" if wrong else "values differ from their digest"


def load_plain(path: Path, is_zip: bool) -> Any:
    """torch.load of tensors and plain values, mapped into memory and never unpickling code. numpy's arrays and torch's
    version are let through: the fork keeps them in its files."""
    rebuild = np.empty(0).__reduce__()[0]  # numpy's function that an unpickled array starts from
    plain_parts = [np.ndarray, np.dtype, np.dtypes.UInt32DType, rebuild,
                   (rebuild, "numpy.core.multiarray._reconstruct"), torch.torch_version.TorchVersion]
    if is_zip:  # the pickle is read through its checksum first, so that a damaged one is never parsed
        with zipfile.ZipFile(path) as archive:
            for name in (name for name in archive.namelist() if name.endswith(".pkl")):
                archive.read(name)
    load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
    with torch.serialization.safe_globals(plain_parts):  # type: ignore[arg-type]
        try:
            return load(mmap=is_zip)
        except (OSError, RuntimeError) as error:
            if not is_zip or ("mmap" not in str(error) and getattr(error, "errno", None) != errno.ENODEV):
                raise
            return load(mmap=False)  # from a disk without mappings


def read_torch_file(path: Path) -> Any:
    """Tensors and plain values of a file that anybody may have written. Raises: UserError."""
    is_zip = False
    try:
        is_zip = zipfile.is_zipfile(path)
        return load_plain(path, is_zip)
    except Exception as error:  # on damaged bytes torch's, pickle's and zipfile's readers raise whatever they meet
        if isinstance(error, MemoryError) or "alloc" in str(error):
            raise UserError(f"{path}: not enough memory to read it ({first_line(error)}). Free some") from error
        if isinstance(error, OSError):
            raise UserError(f"{path}: {error.strerror or first_line(error)}") from error
        reason = f" ({first_line(error)})" if is_zip else ""
        raise UserError(f"{path}: damaged or incomplete, not a readable PyTorch file{reason}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, verified, required keys first; its tensors stay mapped. Raises: ResumeError."""
    if not path.exists():
        raise ResumeError(f"Resume checkpoint not found: {path}")
    try:
        checkpoint = read_torch_file(path)
    except UserError as error:
        raise ResumeError(str(error)) from error
    if not isinstance(checkpoint, dict):
        raise ResumeError(f"{path}: holds no checkpoint")
    missing, incomplete = ([key for key in keys if key not in checkpoint] for keys in (REQUIRED_KEYS, COMPLETE_KEYS))
    if missing:
        raise ResumeError(f"Checkpoint missing required keys: {missing} ({path})")
    from_weights = f"start from its weights: --base-checkpoint {path}, with a new --output-dir"
    if "digests" not in checkpoint:
        raise ForeignCheckpoint(f"{path} was not written by this trainer (it has no digests). Instead {from_weights}")
    if checkpoint.get("format_version") not in (1, FORMAT_VERSION):
        raise ResumeError(f"{path} has format {checkpoint.get('format_version')}, this trainer reads {FORMAT_VERSION} "
                          "and earlier ones. Use the version of the trainer that wrote it")
    if problem := digest_problem(checkpoint):
        raise ResumeError(f"{path} is damaged: {problem}. Resume from another checkpoint")
    if incomplete:
        raise ResumeError(f"{path} lacks {', '.join(incomplete)}, without which a run cannot go on. Resume from "
                          f"another checkpoint, or {from_weights}")
    if not re.fullmatch(r"(logs/run_\w+)?", str(checkpoint["run_dir"])):  # we would write there
        raise ResumeError(f"{path}: its run directory {checkpoint['run_dir']!r} is none that this trainer makes. "
                          "Resume from another checkpoint")
    return checkpoint


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> tuple[int, bool]:
    """Writes under a temporary name, reads back and verifies, then renames. Returns: bytes, and whether the name is
    sure to outlive a power cut. Raises: OSError or RuntimeError (PyTorch's for a full disk); older files are intact."""
    with replacing(path) as partial:
        with partial.open("wb") as handle:
            torch.save({**checkpoint, "digests": make_digests(checkpoint)}, handle)
            handle.flush()
            flush_to_disk(partial)
            with contextlib.suppress(OSError, AttributeError):  # so that the disk is read, not the page cache
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            read_checkpoint(partial)
        except ResumeError as error:
            raise OSError(f"read back damaged: {error}") from error
        size = partial.stat().st_size
    return size, flush_to_disk(path.parent)


def link_checkpoint(target: Path, link: Path) -> None:
    """Makes `link` another name of `target`; a copy where the file system has no hard links."""
    with replacing(link) as partial:
        try:
            os.link(target, partial)
        except OSError:
            shutil.copyfile(target, partial)
    flush_to_disk(link.parent)


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
# 9. Saving: the state changes when a save succeeds

MAX_NONFINITE_STREAK = 10
LOWEST_FP16_SCALE = 1e-4
FORGOTTEN = 1.05  # times the base checkpoint's loss
# What stands in a checkpoint under its own name.
SAVED_STATE = [item.name for item in dataclasses.fields(TrainState) if item.name not in ("position", "schedule")]


def collect_nonfinite_rows(run: Run) -> None:
    """Moves what the device knows of losses that were not finite into the state, on every rank. Waits for it."""
    flags, run.nonfinite_flags = run.nonfinite_flags, []
    if run.nonfinite[0].item() == run.state.skips_told:
        return
    found = [row for rows, flagged in flags for row, bad in zip(rows, flagged.tolist(), strict=True) if bad]
    gathered = run.process.world.gather(found)  # a new list: the writer's thread may hold the old one
    run.state.nonfinite_rows = [*run.state.nonfinite_rows, *(row for rows in gathered for row in rows)]


def check_finite(run: Run) -> None:
    """Raises: UserError after too many non-finite gradients in a row. Waits for the device."""
    step = run.state.position.step
    if run.nonfinite[2].item() >= MAX_NONFINITE_STREAK:
        raise UserError(f"the gradients were not finite in {MAX_NONFINITE_STREAK} steps in a row, near step {step}. "
                        "Resume from an older checkpoint with a smaller --learning-rate, or with --amp off")
    if run.scaler.is_enabled() and run.scaler.get_scale() < LOWEST_FP16_SCALE:
        raise UserError(f"fp16's gradient scale fell below {LOWEST_FP16_SCALE:g} near step {step}: most updates are "
                        "skipped. Resume from an older checkpoint with --amp bf16 or --amp off")


def on_the_host(tensor: Tensor) -> Tensor:
    """A copy that stays as it is; from a GPU once this has waited for it. Into page-locked memory, which PyTorch keeps
    for the next save, it takes a thirtieth of the time."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    except RuntimeError:  # no more memory may be locked
        return tensor.to("cpu", copy=True)


def make_checkpoint(run: Run, state: TrainState) -> dict[str, Any]:
    """A snapshot of the run at an optimizer-step boundary: plain values, and CPU tensors that stay as they are."""
    position = state.position
    config = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in PER_PROCESS}
    model, optimizer, scaler, nonfinite = tree_map_only(Tensor, on_the_host, (
        run.model.state_dict(), run.optimizer.state_dict(),
        run.scaler.state_dict() if run.scaler.is_enabled() else None, run.nonfinite))
    if run.precision.device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "format_version": FORMAT_VERSION,
        "model": in_name_order({**run.carried, **model} if run.lora_base is None else {
            name: model[name] for name in model.keys() & run.learned}),
        "lora_base": run.lora_base,
        "optimizer": optimizer,
        "scheduler": {**dataclasses.asdict(state.schedule), "last_epoch": position.step,
                      "_last_lr": [get_lr(position.step, state.schedule)]},
        "scaler": scaler,
        "epoch": position.epoch, "step": position.step, "sample_in_epoch": position.sample_in_epoch,
        "manifests": {"train": run.train_data.manifests, "val": run.val_data.manifests},
        "train_data": {"fingerprint": run.train_data.fingerprint, "rows": len(run.train_data),
                       "epoch_size": epoch_size(run.train_data.mix)},
        "tokenizer": run.tokenizer, "model_config": run.gpt_section, "made_with": run.made_with, "config": config,
        **{name: getattr(state, name) for name in SAVED_STATE},
        "nonfinite": nonfinite, "environment": environment(run.precision.device, run.process.world.size),
    }


def plan_rotation(recent: Sequence[str], name: str, keep: int) -> tuple[list[str], list[str]]:
    """Returns (the run's checkpoints after saving `name`, those to delete); keep = 0 keeps all."""
    names = [other for other in recent if other != name] + [name]
    return (names[-keep:], names[:-keep]) if keep else (names, [])


def delete_rotated(output_dir: Path, state: TrainState) -> list[str]:
    """Deletes what the newest save has rotated out, only names that a run gives; a warning for each that stays."""
    warnings = []
    for name in state.rotated_out:
        try:
            if checkpoint_step(name) is not None:
                (output_dir / name).unlink(missing_ok=True)
        except OSError as error:
            warnings.append(f"[Warn] An old checkpoint stays, delete it by hand: {first_line(error)}")
    return warnings


def write_save(save: PendingSave, checkpoint: Mapping[str, Any], metrics: MetricsLog | None) -> None:
    """The writer's thread, which prints nothing and leaves the run alone: writes, links, deletes what rotated out, in
    this order, so that a kill leaves a resumable directory. Raises: OSError or RuntimeError."""
    started = time.perf_counter()
    try:
        if metrics:
            metrics.flush()
    except OSError as error:  # a log that somebody removed costs no checkpoint; a full disk has no room for it
        if error.errno in FULL_DISK:
            raise
        save.warnings.append(f"[Warn] The logs in {save.state.run_dir} cannot be written: {first_line(error)}")
    save.values["bytes"], save.is_flushed = write_checkpoint(save.path, checkpoint)
    try:
        for link in save.links:
            link_checkpoint(save.path, link)
    except OSError as error:  # no hard links, and no room for a copy
        save.warnings.append(f"[Error] Could not renew latest.pth or best.pth: {first_line(error)}. {save.path.name} "
                             "is complete, and --resume auto finds it")
    save.warnings += delete_rotated(save.path.parent, save.state)
    save.values["seconds_written"] = time.perf_counter() - started


def finish_save(run: Run, wait: bool = True) -> None:
    """Says, logs and remembers what came of the save in flight, if it has ended or `wait` is set."""
    save, say, state = run.saving, run.process.say, run.state
    if save is None or not (wait or save.written.done()):
        return
    run.saving = None
    try:
        save.written.result()
    except (OSError, RuntimeError) as error:
        say(f"[Error] Could not save {save.path}: {first_line(error)}. Earlier checkpoints are intact; free some disk "
            "space, the save will be tried again")
        if save.links:
            run.save_retry_step = state.position.step + max(1, run.config.save_interval // 10)
        return
    for warning in save.warnings:
        say(warning)
    if not save.is_flushed and not run.warned_flush:
        say(f"[Warn] {save.path.parent}: this file system cannot sync a directory. Checkpoints are whole; one that is "
            "seconds old may be lost in a power cut")
        run.warned_flush = True
    state.recent_checkpoints, state.rotated_out = save.state.recent_checkpoints, save.state.rotated_out
    state.best = save.state.best if save.is_best else state.best
    run.saved_step = save.state.position.step if save.links else run.saved_step
    owed = ", validation still owed: the resumed run validates first" if save.validation_owed else ""
    say(f"[Info] Saved {save.path} ({save.values['bytes'] / 1e6:.1f} MB in {save.values['seconds_written']:.1f} s, "
        f"training waited {save.values['seconds_blocked']:.1f} s{owed})")
    if run.metrics:
        run.metrics.write("save", save.state.position, save.values)


def start_save(run: Run, best: dict[str, Any] | None, is_checkpoint: bool = True) -> None:
    """Takes a snapshot and leaves the writing to a thread of rank 0; finish_save tells what came of it. Writes
    model_step{N}.pth, with latest.pth (and best.pth, if this is the best) as links; or best.pth alone."""
    started, name = time.perf_counter(), f"model_step{run.state.position.step}.pth"
    collect_nonfinite_rows(run)
    run.saved_at = time.monotonic()
    if run.process.world.rank > 0:
        run.saved_step, run.state.best = run.state.position.step, best or run.state.best
        return
    finish_save(run)
    check_finite(run)
    state, out = dataclasses.replace(run.state, best=best or run.state.best), run.output_dir
    links = ["latest.pth", *(["best.pth"] if best else [])] if is_checkpoint else []
    if is_checkpoint:
        state.recent_checkpoints, state.rotated_out = plan_rotation(state.recent_checkpoints, name,
                                                                    run.config.keep_checkpoints)
    save = PendingSave(out / (name if is_checkpoint else "best.pth"), [out / link for link in links], state,
                       best is not None, run.validation_owed)
    checkpoint = make_checkpoint(run, state)
    save.values["seconds_blocked"] = time.perf_counter() - started
    save.written, run.saving = run.writer.submit(write_save, save, checkpoint, run.metrics), save
    run.process.event("save", run)


def measured_on(run: Run) -> str:
    """What a validation loss depends on besides the model: rows, their choice, and the weights of the losses."""
    config = run.config
    parts = [run.val_data.fingerprint, len(validation_rows(run)), config.text_loss_weight, config.mel_loss_weight,
             *([config.emo_source] if config.emo_source != "prompt" else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def say_validation(run: Run, results: Mapping[str, Mapping[str, float]]) -> None:
    """Of all rows and, where there are several, of each manifest and language; which language is being forgotten."""
    position, say = run.state.position, run.process.say
    for part, values in results.items():
        name = f"  {part}" if part else f"epoch={position.last_epoch} step={position.step}"
        say(f"[Val] {name} text_loss={values['text_loss']:.6f} mel_loss={values['mel_loss']:.6f} "
            f"mel_top1={values['mel_top1']:.4f}")
    for language, known in run.state.base_losses.items():
        loss = results.get(language, {}).get("mel_loss", 0.0)
        if loss > FORGOTTEN * known:
            remedy = ("Give its manifest a larger weight" if language in run.train_data.languages else
                      f"Replay it (--train-manifest PATH::{language}@0.2)")
            say(f"[Warn] {language}: mel_loss {loss:.4f}, with the base checkpoint {known:.4f}: it is being forgotten. "
                f"{remedy}, or learn more slowly")


def measure_base(run: Run) -> None:
    """What the base checkpoint knows of each validation language, before the first step. Raises: Stopped."""
    languages = run.val_data.languages
    if run.config.base_checkpoint and run.state.position.step == 0 and len(languages) > 1:
        results = evaluate(run)
        say_validation(run, results)
        run.state.base_losses = {language: results[language]["mel_loss"] for language in languages}


def validate(run: Run) -> dict[str, Any] | None:
    """Validates and logs. Returns TrainState.best if this is the best so far. Raises: Stopped."""
    position, config, results, best = run.state.position, run.config, evaluate(run), run.state.best
    say_validation(run, results)
    values = results[""]
    loss = config.text_loss_weight * values["text_loss"] + config.mel_loss_weight * values["mel_loss"]
    if run.metrics:
        run.metrics.write("val", position, {**values, "loss": loss})
        for part in run.val_data.parts:
            run.metrics.write("val_part", position, results[part], part)
    run.state.last_val = {"step": position.step, "loss": loss, **values}
    # A loss that is not finite is never the best, and always beaten.
    is_best = math.isfinite(loss) and (best is None or not math.isfinite(best["loss"]) or loss < best["loss"])
    run.state.validations_since_best = 0 if is_best else run.state.validations_since_best + 1
    return {"step": position.step, "loss": loss, "measured_on": measured_on(run)} if is_best else None


# ---------------------------------------------------------------------------------------------------------------------
# 10. Resuming


@dataclass
class ResumePoint:
    """A verified checkpoint, and the path to show for it."""

    path: Path
    checkpoint: dict[str, Any]

    @property
    def position(self) -> Position:
        return Position(self.checkpoint["epoch"], self.checkpoint["sample_in_epoch"], self.checkpoint["step"])


# From a fork: RobelAdugna/Indextts_Am-V2 and JarodMica/index-tts give their checkpoints the names of ours. These files
# are read, never written to. Only the first one's have batch_idx; the other restarts an epoch that was interrupted.

FORK_FROZEN = 12_000  # text tokens that the first one freezes once the tokenizer has more


def read_fork(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Of a fork's checkpoint weights, Adam's moments by the tensors' names, plain values. Raises: ResumeError for a
    damaged file; LookupError, TypeError, ValueError or AttributeError for one that is no fork's."""
    with zipfile.ZipFile(path) as archive:  # no digests, but checksums
        damaged = archive.testzip()
    model, optimizer, schedule, beside = content["model"], content["optimizer"], content["scheduler"], content
    if damaged or not all(tensor.isfinite().all() for tensor in model.values()):
        raise ResumeError(f"{path} is damaged: {damaged or 'weights that are not finite'}. Use another checkpoint")
    (group,) = optimizer["param_groups"]
    names = [name for name in model if not name.endswith(".pos_enc.pe")]  # AdamW numbers parameters, not buffers
    moments = {names[number]: state for number, state in optimizer["state"].items()}
    if len(names) != len(group["params"]) or any(
            moment.shape != model[name].shape for name, state in moments.items()
            for moment in (state["exp_avg"], state["exp_avg_sq"])):
        raise ValueError("Adam's moments are not those of its tensors")
    if "batch_idx" in content and "batch_size" not in content:  # a model_step file: latest.pth tells it
        with contextlib.suppress(UserError):
            beside = read_torch_file(path.with_name("latest.pth"))
    counts = {"epoch": content["epoch"], "step": content["step"], "batch_idx": content.get("batch_idx", 0),
              "batch_size": beside.get("batch_size", 0), "grad_accumulation": beside.get("grad_accumulation", 0)}
    base_lr, lr, decay = float(schedule["base_lrs"][0]), float(schedule["_last_lr"][0]), float(group["weight_decay"])
    if any(type(count) is not int or count < 0 for count in counts.values()) or not 0 <= lr <= base_lr != 0:
        raise ValueError(f"{counts}, learning rate {lr:g} of {base_lr:g}")
    manifests = content.get("manifests") or content.get("extra", {}).get("manifests") or {"train": ()}
    freezes = "batch_idx" in content and len(model["text_head.bias"]) > FORK_FROZEN + 1
    return {**counts, "has_position": "batch_idx" in content, "lr": lr, "moments": moments,
            "model": {name: tensor for name, tensor in model.items() if name.startswith(NAME_ORDER)},
            "scaler": content.get("scaler"), "rows": sum(entry["count"] for entry in manifests["train"]),
            "base_vocab": FORK_FROZEN if freezes else 0,
            "config": {"learning_rate": base_lr, "weight_decay": decay, "freeze_base_vocab": freezes,
                       "base_checkpoint": str(path)}}


def read_resumable(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, or what read_fork makes of a fork's. Raises: ResumeError."""
    try:
        return read_checkpoint(path)
    except ForeignCheckpoint as foreign:
        try:
            return read_fork(path, read_torch_file(path))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ResumeError(f"{foreign}. Nor is it a fork's that can be gone on from: {first_line(error)}") from error


def settings_of_fork(typed: Mapping[str, Any], point: ResumePoint, device: torch.device) -> dict[str, Any]:
    """Returns the typed settings, and completes a fork's checkpoint for resolve_config: where the file holds no batch
    size it is what is typed, else that trainer's default."""
    fork, typed = point.checkpoint, dict(typed)
    batch, accumulation = fork["batch_size"], fork["grad_accumulation"]
    is_guessed = not batch and not typed.get("batch_size")
    if not batch:
        batch = typed.get("batch_size") or (32 if fork["has_position"] else 4)
        accumulation = typed.get("grad_accumulation") or (max(1, 32 // batch) if fork["has_position"] else 1)
        typed |= {"batch_size": batch, "grad_accumulation": accumulation}
    config = {**fork["config"], "batch_size": batch, "grad_accumulation": max(1, accumulation)}
    point.checkpoint = {**fork, "config": config, "is_guessed": is_guessed, "environment": environment(device, 1)}
    return typed


def position_of_fork(fork: Mapping[str, Any], rows: int) -> tuple[Position, str]:
    """Where the run goes on in this trainer's order of `rows` samples, and what that means."""
    batch, accumulation = fork["config"]["batch_size"], fork["config"]["grad_accumulation"]
    step, epoch, sample = fork["step"], fork["epoch"], fork["batch_idx"] * batch
    steps_an_epoch = max(1, math.ceil(rows / batch) // accumulation)
    done = step - epoch * steps_an_epoch
    if (sample == 0 and done < 0) if fork["has_position"] else 0 <= done <= steps_an_epoch:
        # By the steps: the first one's last file names the last epoch, also where --max-steps ended the run before.
        epoch, sample = step // steps_an_epoch, step % steps_an_epoch * accumulation * batch
    elif not fork["has_position"] or fork["is_guessed"]:
        return Position(epoch, 0, step), f"Epoch {epoch} starts anew, as the file does not tell how far it was"
    if sample >= rows:
        epoch, sample = epoch + 1, 0
    return Position(epoch, sample, step), f"Epoch {epoch} goes on " + (
        f"after {sample} of {rows} samples, in another order than before: some samples of this epoch come twice, "
        "others not at all" if sample else "with its first sample")


def schedule_of_fork(fork: Mapping[str, Any], warmup: int, total: int) -> Schedule | None:
    """Its file holds peak, step and rate: the given warm-up and length, if they lead to this rate, else one of them
    with a whole number for the other, else the shortest warm-up that goes with a whole length."""
    base_lr, lr, step = fork["config"]["learning_rate"], fork["lr"], fork["step"]
    share = math.acos(2 * lr / base_lr - 1) / math.pi  # of the decay, that lies behind
    pairs: list[tuple[float, float]] = [(warmup, total), (step * base_lr / lr if lr else step, total)]
    if share:
        solved = [(step - share * total) / (1 - share)] if share < 1 else []
        pairs += [(round(w), w + (step - w) / share) for w in (*solved, warmup, *range(step))]
    schedules = (Schedule(base_lr, round(w), round(t)) for w, t in pairs if w >= 0 and t >= 1)
    return next((s for s in schedules if abs(get_lr(step, s) - lr) <= 2e-15 * base_lr), None)


def fit_fork(run: Run, point: ResumePoint, typed: Mapping[str, Any]) -> None:
    """Makes a fork's checkpoint one that restore() takes; says how it goes on, and what does not."""
    fork, config, rows = point.checkpoint, run.config, epoch_size(run.train_data.mix)
    then, say = fork["config"], (lambda line: None) if config.eval_only else run.process.say
    own = [name for group in run.optimizer.param_groups for name in group["param_names"]]
    names = [name for name in own if name in fork["moments"]]
    optimizer = {"state": fork["moments"], "param_groups": [{"params": names, "param_names": names, "lr": 0.0}]}
    position, how = position_of_fork(fork, rows)
    say(f"[Info] {point.path} is a fork's. From it: weights, Adam's moments of {len(names)} of {len(own)} "
        f"tensors, step, learning rate. {how}")
    warmup = 1000 if config.warmup_steps is None else config.warmup_steps  # the forks' default
    total = config.max_steps or max(1, config.epochs * math.ceil(rows / then["batch_size"])
                                    // then["grad_accumulation"])
    found, changed = schedule_of_fork(fork, warmup, total), {"warmup_steps": -1, "max_steps": -1, "epochs": -1}
    if found and typed.get("warmup_steps", found.warmup_steps) == found.warmup_steps and (
            found.total_steps == total or not (typed.get("max_steps") or "epochs" in typed)):
        config = dataclasses.replace(config, warmup_steps=found.warmup_steps)
        if found.total_steps != total:
            left = math.ceil((found.total_steps - position.step) * config.global_batch / rows)
            config = dataclasses.replace(config, max_steps=found.total_steps,
                                         epochs=max(config.epochs, position.epoch + 1 + left))
        changed, run.config = {name: getattr(config, name) for name in changed}, config
        say(f"[Info] Its schedule goes on: warm-up {found.warmup_steps}, {found.total_steps} steps"
            + ("" if (found.warmup_steps, found.total_steps) == (warmup, total) else ", which its learning rate fits. "
               "If it was another, type --warmup-steps and --epochs or --max-steps"))
    if fork["is_guessed"]:
        say(f"[Warn] It does not hold its batch size: {then['batch_size']} x {then['grad_accumulation']} is taken, the "
            "default there. If that run had another, type --batch-size and --grad-accumulation")
    if fork["base_vocab"]:
        say(f"[Info] Its first {FORK_FROZEN} text tokens stay frozen, as there; --no-freeze-base-vocab trains them")
    say("[Warn] Not carried over: random numbers, order of samples, best loss, logs; weight decay on biases, norms and "
        "embeddings; dropout on attention probabilities. The fork's files keep their content, none is ever deleted")
    point.checkpoint = {
        **fork, "config": {**then, **changed}, "optimizer": optimizer, "tokenizer": run.tokenizer,
        "scheduler": dataclasses.asdict(found or Schedule(fork["lr"], 0, 2**62)),
        "epoch": position.epoch, "sample_in_epoch": position.sample_in_epoch,
        "train_data": {"fingerprint": run.train_data.fingerprint if fork["rows"] in (0, rows) else "", "rows": rows},
        "model_config": dataclasses.asdict(run.model.config), "made_with": {}, "nonfinite": torch.zeros(3),
        "last_val": {"step": position.step, "loss": math.nan},  # so that none is owed: its save has this file's name
        "best": None, "recent_checkpoints": [], "run_dir": time.strftime("logs/run_%Y%m%d_%H%M%S")}


def keep_forks_latest(run: Run) -> None:
    """Gives a fork's latest.pth another name too, before the first save takes that one."""
    latest, kept = run.output_dir / "latest.pth", run.output_dir / f"fork_latest_step{run.saved_step}.pth"
    if latest.is_file() and latest.stat().st_nlink == 1 and not kept.exists():
        link_checkpoint(latest, kept)
        run.process.say(f"[Info] The fork's latest.pth is {kept} too: the first save here takes the name latest.pth")


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
    steps = {latest: step_inside(latest), **{file: checkpoint_step(file.name) or 0 for file in files}}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def find_resumable(output_dir: Path, say: Callable[[str], None] = print) -> ResumePoint | None:
    """The newest valid checkpoint, None where there are no files; says what was skipped. Raises: ResumeError."""
    latest, skipped = output_dir / "latest.pth", list[str]()
    for path in candidates(output_dir):
        try:
            checkpoint = read_resumable(path)
            if checkpoint_step(path.name) in (None, checkpoint["step"]):
                for reason in skipped:
                    say(f"[Warn] Auto-resume: skipped {reason}")
                return ResumePoint(path, checkpoint)
            skipped.append(f"{path} was renamed: it holds step {checkpoint['step']}. To go on from it: --resume {path}")
        except ResumeError as error:
            skipped.append(str(error))
    if latest.is_symlink() and not latest.exists():
        skipped.append(f"{latest} links to a file that is not there (a disk that is not mounted?)")
    if not skipped:
        return None
    raise ResumeError(f"no valid checkpoint in {output_dir}: {'; '.join(skipped)}. Move these files away to start "
                      "afresh" + (", or --resume best.pth" if (output_dir / "best.pth").exists() else ""))


def read_explicit(path: Path) -> dict[str, Any]:
    """Reads the file that was typed. Raises: ResumeError that lists the valid ones beside it."""
    try:
        return read_resumable(path)
    except ResumeError as error:
        valid = []
        for other in list_checkpoints(path.parent):
            with contextlib.suppress(ResumeError):
                read_resumable(other)
                valid.append(str(other))
        hint = f". Valid checkpoints there: {', '.join(valid)}" if valid else f". No valid checkpoint in {path.parent}"
        raise ResumeError(f"{error}{hint}") from error


def open_resume(resume: str, output_dir: Path, say: Callable[[str], None]) -> ResumePoint | None:
    """Finds, announces and reads the checkpoint that --resume asks for. Raises: ResumeError."""
    if not resume:
        return None
    if resume == "auto":
        point = find_resumable(output_dir, say)
        if point is None:
            say(f"[Info] Auto-resume: no checkpoint in {output_dir}, starting from the beginning")
            return None
    else:
        point = ResumePoint(Path(resume), read_explicit(Path(resume)))
    say(f"[Info] Auto-resume: found checkpoint at {point.path}")
    say(f"[Info] Loading checkpoint from {point.path}...")
    return point


def refuse_other_checkpoints(output_dir: Path, point: ResumePoint | None, resume: str) -> None:
    """Raises: UserError where a run would mix its files with those of another."""
    links = (output_dir / "latest.pth", output_dir / "best.pth")
    first = next((path for path in (*list_checkpoints(output_dir), *links) if path.exists()), None)
    if first is None:
        return
    if not resume:
        raise UserError(f"{output_dir} already holds checkpoints ({first.name}). Add --resume auto to go on with "
                        "that run, or choose another --output-dir")
    if point is None:
        raise ResumeError(f"no model_step*.pth or latest.pth in {output_dir}, only {first.name}. Go on from it "
                          f"with --resume {first}, or move it away to start afresh")
    if point.path.resolve().parent != output_dir.resolve():
        raise UserError(f"{output_dir} already holds checkpoints of another run ({first.name}). Choose another "
                        f"--output-dir, or leave it out to go on in {point.path.parent}")


def find_resume_point(resume: str, output_dir: Path, process: Process) -> ResumePoint | None:
    """Rank 0 finds and announces what to resume from, the others read the same file. Raises: UserError."""
    point = None
    with process.failing_together():
        if process.world.rank == 0:
            point = open_resume(resume, output_dir, process.say)
            refuse_other_checkpoints(output_dir, point, resume)
    found = (str(point.path), point.checkpoint.get("digests")) if point else (None, None)
    path, digests = process.world.gather(found)[0]
    with process.failing_together():
        if process.world.rank > 0 and path:
            point = ResumePoint(Path(path), read_resumable(Path(path)))
            if point.checkpoint.get("digests") != digests:
                raise UserError(f"{path} is another file there than on rank 0. All machines need the same --output-dir")
    return point


def require_fit(run: Run, point: ResumePoint) -> None:
    """Raises: ResumeError with everything in which a checkpoint does not fit this run, each with its remedy."""
    checkpoint, tokenizer, problems = point.checkpoint, run.tokenizer, []
    shapes = {name: tuple(t.shape) for name, t in run.model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in checkpoint["model"].items() if not name.startswith(CARRIED_PREFIXES)}
    if run.lora_base and checkpoint.get("lora_base"):  # what it does not hold is the base's
        shapes = {name: shape for name, shape in shapes.items() if name in found or ".lora." in name}
    differing = [name for name in {**shapes, **found} if found.get(name) != shapes.get(name)]
    if differing:
        name = differing[0]
        problems.append(f"model: {len(differing)} tensors have another shape, e.g. {name} {found.get(name)} in the "
                        f"checkpoint, {shapes.get(name)} here. Resume with the --config, --tokenizer and --lora-rank "
                        "of the run")
    then, now = checkpoint["model_config"], dataclasses.asdict(run.model.config)
    changed = [f"{name} {then[name]} -> {value}" for name, value in now.items()
               if name in then and then[name] != value and name != "number_text_tokens"]
    if changed and not differing:
        problems.append(f"the model's config differs: {', '.join(changed)}. Resume with the --config of the run")
    if checkpoint["tokenizer"]["sha256"] != tokenizer["sha256"]:
        problems.append(f"tokenizer differs (sha256 {checkpoint['tokenizer']['sha256'][:12]} in the checkpoint, "
                        f"{tokenizer['sha256'][:12]} here). Pass --tokenizer {checkpoint['tokenizer']['path']} as it "
                        "was, or start a new run with --base-checkpoint")
    made_with = {key: value for key, value in recorded_in(checkpoint).items() if key != "tokenizer_sha256"}
    if "conditioning_sha256" in run.made_with and "conditioning_sha256" not in made_with:
        made_with |= conditioning_record(checkpoint["model"])
    problems += compare_made_with([("the data here", run.made_with), (f"{point.path}", made_with)])[1]
    any_data = run.config.eval_only or run.config.accept_changed_data
    if not any_data and run.train_data.fingerprint != checkpoint["train_data"]["fingerprint"]:
        problems.append("training data changed (row ids, lengths, order or weights). Pass the old --train-manifest, or "
                        "--accept-changed-data: weights, optimizer and step stay, the epoch's order starts anew")
    if problems:
        raise ResumeError(f"{point.path} does not fit this run: {'; '.join(problems)}")


def restore_model(run: Run, point: ResumePoint) -> None:
    """Copies the weights out of the mapped file; the position with them."""
    run.process.say("[Info] Restoring model state...")
    own = run.model.state_dict()
    with torch.no_grad():
        for name, tensor in point.checkpoint["model"].items():
            if name in own:
                own[name].copy_(tensor)
                run.learned.add(name)
            else:
                run.carried[name] = tensor.clone()
    run.state.position = point.position


def restore_optimizer(run: Run, saved: Mapping[str, Any]) -> None:
    """Adam's moments by the names of the tensors: what is trained, and how fast, may have changed."""
    run.process.say("[Info] Restoring optimizer state...")
    names = {number: name for group in saved["param_groups"]
             for number, name in zip(group["params"], group["param_names"], strict=True)}
    moments = {name: saved["state"][number] for number, name in names.items() if number in saved["state"]}
    wanted, first = run.optimizer.state_dict(), saved["param_groups"][0]
    for group in wanted["param_groups"]:
        group["lr"] = first["lr"] / first.get("lr_scale", 1.0) * group["lr_scale"]
    wanted["state"] = {number: tree_map_only(Tensor, Tensor.clone, moments[name]) for group in wanted["param_groups"]
                       for number, name in zip(group["params"], group["param_names"], strict=True) if name in moments}
    run.optimizer.load_state_dict(wanted)


def global_batch_of(checkpoint: Mapping[str, Any]) -> int:
    config = checkpoint["config"]
    return config["batch_size"] * config["grad_accumulation"] * checkpoint["environment"]["world_size"]


def restore_schedule(run: Run, checkpoint: Mapping[str, Any]) -> None:
    """Goes on with the saved schedule. It is recomputed only when a setting that it follows from, the global batch or
    the data changed; what that does to the learning rate is said."""
    say, saved, config = run.process.say, checkpoint.get("scheduler"), checkpoint["config"]
    say("[Info] Restoring scheduler state...")
    samples, data = epoch_size(run.train_data.mix), checkpoint["train_data"]
    wanted = make_schedule(run.config, run.state.position, samples)
    if not saved:
        say("[Warn] No scheduler state in the checkpoint: continuing with a fresh one")
        run.state.schedule = wanted
        return
    run.state.schedule = old = Schedule(saved["base_lr"], saved["warmup_steps"], saved["total_steps"])
    is_same = all(config[name] == getattr(run.config, name) for name in (
        "learning_rate", "warmup_steps", "max_steps", "epochs")) and (samples, run.config.global_batch) == (
        data.get("epoch_size", data["rows"]), global_batch_of(checkpoint))
    if not is_same and wanted != old:
        run.state.schedule, step = wanted, run.state.position.step
        say(f"[Info] lr at step {step}: {get_lr(step, old):.6e} -> {get_lr(step, wanted):.6e}")


def restore_best(run: Run, checkpoint: Mapping[str, Any]) -> None:
    """The best validation so far, unless what it was measured on has changed: unlike losses are not compared."""
    best, config, rows = checkpoint["best"], checkpoint["config"], len(run.val_data)
    if best is None:
        return
    if "measured_on" not in best:  # format 1: what is known of how it was measured
        cap = config["max_val_batches"] * (config["val_batch_size"] or config["batch_size"])
        then = (sum(part["rows"] for part in checkpoint["manifests"]["val"]), config["text_loss_weight"],
                config["mel_loss_weight"], not cap or cap >= rows)
        now = (rows, run.config.text_loss_weight, run.config.mel_loss_weight, len(validation_rows(run)) == rows)
        best = {**best, "measured_on": measured_on(run) if then == now and now[-1] else None}
    if best["measured_on"] == measured_on(run):
        run.state.best = best
    else:
        run.process.say("[Warn] Validation changed (rows, their choice, or the weights of the losses): the best loss "
                        f"so far, {best['loss']:.6f} at step {best['step']}, does not compare. The next one is best")


def restore(run: Run, point: ResumePoint) -> None:
    """Applies a checkpoint, cloned out of the mapped file: a deleted file frees its disk. Raises: ResumeError."""
    checkpoint, state, say = point.checkpoint, run.state, run.process.say
    require_fit(run, point)
    restore_model(run, point)
    restore_optimizer(run, checkpoint["optimizer"])
    for name in SAVED_STATE:
        if name in checkpoint and name != "best":
            setattr(state, name, checkpoint[name])
    state.first_batch_size = state.first_batch_size or checkpoint["config"]["batch_size"]
    state.recent_checkpoints = [name for name in state.recent_checkpoints if (run.output_dir / name).exists()]
    if checkpoint["train_data"]["fingerprint"] != run.train_data.fingerprint:
        say(f"[Warn] Training data changed: epoch {state.position.epoch} starts anew with {len(run.train_data)} rows")
        state.position = dataclasses.replace(state.position, sample_in_epoch=0)
        state.nonfinite_rows, state.suspect_rows, state.left_out = [], [], []
    run.train_data.bad_rows.update(dict.fromkeys(state.left_out, NOT_FINITE_TWICE))
    run.nonfinite = checkpoint["nonfinite"].clone().to(run.precision.device)
    state.skips_told = checkpoint.get("skips_told", int(run.nonfinite[0].item()))
    restore_schedule(run, checkpoint)
    say("[Info] Restoring gradient scaler state...")
    if run.scaler.is_enabled() and checkpoint.get("scaler"):
        run.scaler.load_state_dict(checkpoint["scaler"])
    elif run.scaler.is_enabled():
        say("[Warn] AMP enabled but no scaler state: continuing with a fresh one")
    run.saved_step = state.position.step
    say(f"[Info] ✅ Successfully resumed from {point.path}")
    say(f"[Info]    Epoch: {state.position.epoch}, Step: {state.position.step}")
    say(f"[Info]    Recent checkpoints: {len(state.recent_checkpoints)}")
    restore_best(run, checkpoint)


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
    folder = move_aside(output_dir, later, time.strftime("%Y%m%d_%H%M%S"))
    dropped = cut_metrics(output_dir / run.state.run_dir / "metrics.jsonl", step, run.validation_owed)
    if folder is None:
        return
    if dropped:
        (folder / "metrics.jsonl").write_text("".join(dropped), encoding="utf-8")
    link_checkpoint(resumed, output_dir / "latest.pth")
    best = output_dir / f"model_step{run.state.best['step']}.pth" if run.state.best else None
    if "best.pth" in later and best and best.exists():
        link_checkpoint(best, output_dir / "best.pth")
    run.process.say(f"[Info] Going back to step {step}: later checkpoints and log lines are now in {folder}")


def finish_links(run: Run, resumed: Path) -> None:
    """Does what a kill between a save and its links and deletions left undone."""
    state, best = run.state, run.output_dir / "best.pth"
    is_best = state.best is not None and state.best["step"] == state.position.step
    if is_best and (not best.exists() or step_inside(best) != state.position.step):
        link_checkpoint(resumed, best)
    for warning in delete_rotated(run.output_dir, state):
        run.process.say(warning)


def open_run_dir(run: Run, point: ResumePoint | None, resume: str) -> None:
    """Continues the run directory of a resumed run without doubled lines, or makes a new one."""
    output_dir, state = run.output_dir, run.state
    stamp = time.strftime("%Y%m%d_%H%M%S")
    if point is None:
        aside = move_aside(output_dir, ["logs"], stamp)
        if aside:
            run.process.say(f"[Info] Logs of a run that left no checkpoint are now in {aside}")
        state.run_dir = f"logs/run_{stamp}"
    elif point.path.resolve().parent != output_dir.resolve():
        state.run_dir = f"logs/run_{stamp}"  # a branch of a run in another directory
        state.recent_checkpoints, state.rotated_out = [], []
    else:
        if resume != "auto":
            go_back(run, point.path)
        if "moments" in point.checkpoint:
            keep_forks_latest(run)
        finish_links(run, point.path)
        cut_metrics(output_dir / state.run_dir / "metrics.jsonl", state.position.step, run.validation_owed)
    with writing_to(output_dir / state.run_dir):
        run.metrics = MetricsLog(output_dir / state.run_dir, state.position.step + 1)
    run.process.say(f"[Info] Logs: {output_dir / state.run_dir}")


# ---------------------------------------------------------------------------------------------------------------------
# 11. Run

TIKTOKEN_SPECIALS = 1673  # of IndexTTS-2.5: languages, events and times, numbered behind the ranks


def read_tokenizer(path: str) -> dict[str, Any]:
    """Path, sha256 and size of a SentencePiece model, or of IndexTTS-2.5's .tiktoken file. Raises: UserError."""
    import sentencepiece

    size = 0
    try:
        content = Path(path).read_bytes()
        if path.endswith(".tiktoken"):  # a line for every rank: the token in base64, and its number
            is_whole = re.fullmatch(rb"([A-Za-z0-9+/]+=* [0-9]+(\r?\n|\Z))+", content)
            size = len(content.splitlines()) + TIKTOKEN_SPECIALS if is_whole else 0
        elif content:
            size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    except OSError as error:
        raise UserError(f"--tokenizer {path}: {error.strerror}. tools.train_tokenizer makes one, IndexTTS-2.5 comes "
                        "with its own") from error
    except RuntimeError:
        size = 0
    if not size:
        raise UserError(f"--tokenizer {path}: not a SentencePiece model, which tools.train_tokenizer makes, nor the "
                        ".tiktoken file of IndexTTS-2.5")
    return {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "size": size}


def read_gpt_section(path: Path) -> Any:
    """The gpt: section of a YAML file for --config; that of IndexTTS-2.5 knows its languages. Raises: UserError."""
    content = read_yaml(path)
    section: Any = content.get("gpt")
    version = content.get("version", 2)
    is_25 = isinstance(section, dict) and isinstance(version, (int, float)) and version >= 2.5
    return {"languages": len(LANGUAGES) + 1, **section} if is_25 else section


def find_model_yaml(config: TrainConfig, checkpoint: Mapping[str, Any] | None) -> Path | None:
    """--config, else config.yaml beside the first manifest, else checkpoints/config.yaml; None: the checkpoint's.
    Raises: UserError when there is none."""
    if config.config:
        return Path(config.config)
    if checkpoint is not None and "moments" not in checkpoint:  # a fork's holds no config
        return None
    manifest = Path(split_manifest((config.train_manifest or config.val_manifest)[0])[0])
    if manifest.is_dir() or not manifest.exists():
        raise UserError(f"manifest {manifest}: " + (
            f"Is a directory. Name the file in it, such as {manifest / 'train_pairs.jsonl'}" if manifest.is_dir() else
            "No such file or directory. Check --train-manifest, which is PATH, PATH::LANG or PATH::LANG@WEIGHT; "
            "tools.build_pairs writes PATH"))
    beside = manifest.with_name("config.yaml")
    for path in (beside, Path("checkpoints/config.yaml")):
        if path.is_file():
            return path
    raise UserError(f"no model config: neither {beside} nor checkpoints/config.yaml exists. Pass --config")


def resolve_config(typed: Mapping[str, Any], checkpoint: Mapping[str, Any] | None, device: torch.device, world: World
                   ) -> tuple[TrainConfig, int]:
    """Typed settings first, then the checkpoint's, then the defaults and what the hardware suggests; and the number of
    reading threads. Raises: UserError that lists every contradiction."""
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    saved = {k: v for k, v in checkpoint["config"].items() if k in known} if checkpoint else {}
    asked = {k: v for k, v in typed.items() if v or k not in ("batch_size", "grad_accumulation", "learning_rate")}
    config = TrainConfig(**{**saved, **asked, "config": typed.get("config", "")})
    problems = config_problems(config)
    if problems:
        raise UserError("; ".join(problems))
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
    hardware_batch_size, threads = auto_hardware(device.type, memory, max(1, available_cores() // world.local_size))
    split, same_device = None, False
    if checkpoint:
        split = (saved["batch_size"], saved["grad_accumulation"], checkpoint["environment"]["world_size"])
        same_device = checkpoint["environment"]["device"] == environment(device, world.size)["device"]
    config.world_size = world.size
    config.batch_size, config.grad_accumulation = choose_batch_split(
        asked.get("batch_size", 0), asked.get("grad_accumulation", 0), hardware_batch_size, split, same_device,
        world.size)
    if not (config.eval_only and "val_manifest" in typed):
        config.train_manifest = config.train_manifest or ["processed_data/train_pairs.jsonl"]
        first = Path(split_manifest(config.train_manifest[0])[0])
        beside = first.with_name("val_pairs.jsonl")  # nobody's run is judged on the demo's voice unasked
        config.val_manifest = config.val_manifest or [str(beside)]
        is_unasked = "val_manifest" not in asked and config.val_manifest == [str(beside)]
        if is_unasked and first.exists() and not beside.is_file():
            raise UserError(f"no validation data: {beside} does not exist. Pass --val-manifest (tools.preprocess holds "
                            "sentences back for it)")
    config.tokenizer = config.tokenizer or "tokenizers/amharic_extended_bpe.model"
    found_yaml = find_model_yaml(config, checkpoint)
    config.config = str(found_yaml) if found_yaml else ""
    released = Path("checkpoints/gpt.pth")
    is_released = "config" not in typed and found_yaml == released.with_name("config.yaml")
    if not checkpoint and is_released and released.is_file():
        config.base_checkpoint = config.base_checkpoint or str(released)
    config.learning_rate = config.learning_rate or (2e-5 if config.base_checkpoint else 1e-3)
    return config, config.num_workers or threads


def say_changes(config: TrainConfig, checkpoint: Mapping[str, Any], device: torch.device, say: Callable[[str], None]
                ) -> None:
    """Names every setting, and everything of the machine, that differs from the checkpoint's."""
    for name, old in {"emo_source": "prompt", **checkpoint["config"]}.items():  # older checkpoints do not say it
        new = getattr(config, name, old)
        if new != old and name not in ("config", "base_checkpoint"):
            say(f"[Info] {name}: {old} -> {new}")
    old_batch = global_batch_of(checkpoint)
    if old_batch != config.global_batch:
        say(f"[Warn] The global batch changes from {old_batch} to {config.global_batch}: losses will differ from the "
            "run so far. The position is in samples, none is repeated or left out")
    for name, new in environment(device, config.world_size).items():
        old = checkpoint["environment"].get(name, 1)  # format 1 had no number of its arithmetic
        if old != new:
            say(f"[Warn] {name}: {old} -> {new}. Continuing bit for bit is promised only for the same one")


# Endings and beginnings that wrappers of a model leave in the names of its tensors.
WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+|(?<=\.)(base_layer|module|_orig_mod)\.")


def read_base_checkpoint(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors by plain names, and all, of IndexTTS2's gpt.pth, a fork's file or one of ours. Raises: UserError."""
    content = read_torch_file(path)
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if isinstance(tensors, dict) and tensors is content:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "made_with"}
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"--base-checkpoint {path}: holds no state dict. Use IndexTTS2's gpt.pth")
    lora = next((name for name in tensors if ".lora_" in name or ".lora." in name), None)
    if lora:
        raise UserError(f"--base-checkpoint {path}: holds what LoRA adds, not merged into its base ({lora}). Merge it "
                        "first, ours with tools.export_checkpoint")
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    bad = next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad:
        raise UserError(f"--base-checkpoint {path}: {bad} has values that are not finite. Use another file")
    return tensors, content


def check_lora_base(path: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Path and sha256 of the file that LoRA adds to. Raises: UserError where it is gone, or not the known one."""
    try:
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. LoRA adds to these weights, a checkpoint does not hold them: bring "
                        "the file back, or name it with --base-checkpoint where it is now") from error
    if known and digest != known["sha256"]:
        raise UserError(f"{path} (sha256 {digest[:12]}) is not the file that this LoRA was trained on (sha256 "
                        f"{known['sha256'][:12]}, then {known['path']}). Name that one with --base-checkpoint")
    return {"path": path, "sha256": digest}


def read_by_base(tokenizer: str, base_vocab: int) -> tuple[list[list[int]], list[int]]:
    """How the base's tokenizer, the first base_vocab pieces of this one, would read the new pieces: of each the ids of
    two or more base pieces, or []; and the ids of all base pieces that stand for text. Raises: UserError."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(Path(tokenizer).read_bytes())
    new = [piece.piece for piece in proto.pieces[base_vocab:]]
    del proto.pieces[base_vocab:]
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    try:
        base = SentencePieceProcessor(model_proto=proto.SerializeToString())
        parts = base.encode(new)
    except RuntimeError as error:
        raise UserError(f"--tokenizer {tokenizer}: its first {base_vocab} pieces, as many as the base checkpoint has, "
                        "are no tokenizer. Extend the base's with tools.train_tokenizer --extend") from error
    of_text = [i for i in range(base_vocab) if not (base.is_control(i) or base.is_unknown(i) or base.is_unused(i))]
    return [ids if len(ids) > 1 and base.unk_id() not in ids else [] for ids in parts], of_text


def start_new_rows(rows: Tensor, source: Tensor, parts: Sequence[list[int]], of_text: Sequence[int], seed: int) -> None:
    """Rows [new, ...] of pieces that the base does not have start from the mean of the base's rows (of `source`) of
    their parts, or of all text where they have none; a little noise tells them apart. knowledge.md has figures."""
    generator, text = torch.Generator().manual_seed(seed), source[list(of_text)].float()
    middle, spread = text.mean(0), NEW_ROW_NOISE * text.std(0)
    for row, ids in zip(rows, parts, strict=False):
        noise = spread * torch.randn(row.shape, generator=generator)
        row.copy_((source[ids].float().mean(0) if ids else middle) + noise)


def load_base_checkpoint(model: UnifiedVoiceGPT, tensors: Mapping[str, Tensor], path: Path, tokenizer: str, seed: int
                         ) -> tuple[dict[str, Tensor], int]:
    """Fills the model from a base checkpoint's tensors. Returns: the tensors to carry along, and the base's number of
    text tokens; whatever else is in the file (the inference wrapper's, old masks) is dropped. Raises: UserError that
    lists all missing tensors and wrong shapes.

    With a larger tokenizer the rows of new pieces start as start_new_rows says; the last row of each table, which no
    token uses, is not copied then.
    """
    is_25, base_vocab = "spk_emb_proj.weight" in tensors, len(tensors.get("text_embedding.weight", ())) - 1
    problems = []
    if is_25 != (model.config.languages > 0):
        raise UserError(f"--base-checkpoint {path} is of {NAMES[is_25]}, but --config of {NAMES[not is_25]}. Pass the "
                        "config.yaml, tokenizer and data that belong to it")
    is_larger = 0 < base_vocab < model.config.number_text_tokens
    parts, of_text = read_by_base(tokenizer, base_vocab) if is_larger else ([], [])
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            source = tensors.get(name)
            if source is None:
                problems.append(f"{name} is missing")
            elif name in VOCAB_TENSORS and source.shape == (base_vocab + 1, *weight.shape[1:]):
                overlap = base_vocab if is_larger else min(len(source), len(weight))
                weight[:overlap].copy_(source[:overlap])
                if is_larger:
                    start_new_rows(weight[overlap:], source, parts, of_text, seed)
            elif source.shape != weight.shape:
                problems.append(f"{name} is {list(source.shape)}, the config says {list(weight.shape)}")
            else:
                weight.copy_(source)
    if problems:
        raise UserError(f"--base-checkpoint {path} does not fit --config: {'; '.join(problems[:8])}"
                        + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""))
    carried = {name: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
               for name, t in tensors.items() if name.startswith(CARRIED_PREFIXES)}
    return carried, base_vocab


def check_padding(data: ManifestDataset, number: int) -> None:
    """Refuses codes of padding, which a fork's preprocessing leaves behind every clip but the longest of a batch: all
    have its length, so that rates differ, and end in one code; speech does so for a second. Raises: UserError."""
    rates, first, endings = data.rates[number], sum(rows for rows, _ in data.mix[:number]), []
    for row in first + evenly_spread(data.mix[number][0], 200):
        with contextlib.suppress(BadFeatureFile, UserError):  # said where the row is read for training
            endings.append(data.read_part(data.rows[row], "codes")[-75:])
    padded = sum(len(ending) == 75 and bool((ending == ending[0]).all()) for ending in endings)
    uneven = bool(rates) and rates[2] > 1.25 * rates[0]
    if uneven or padded > max(2, len(endings) // 10):
        signs = f"{rates[0]:.0f} to {rates[2]:.0f} codes a second" if uneven else (
            f"{padded} of {len(endings)} rows end in 75 or more times the same code")
        raise UserError(f"{data.manifests[number]['path']}: there is padding in its codes ({signs}). Preprocess its "
                        "recordings again, one at a time or with tools.preprocess")


def check_unrecorded(data: ManifestDataset, number: int, has_base: bool, say: Callable[[str], None]) -> None:
    """A manifest beside which nothing is recorded: ranges and rates must be possible. Raises: UserError."""
    path, rates, model = data.manifests[number]["path"], data.rates[number], data.model
    say(f"[Warn] {path}: nothing beside it records what its codes, conditions and text ids were made with "
        "(config.yaml, dataset:), so only ranges and rates are checked")
    if data.codes_seen > 1000 and data.highest_code < model.code_count // 2:
        raise UserError(f"{path}: the highest of {data.codes_seen} codes is {data.highest_code}, the model has "
                        f"{model.code_count}: they are another codec's. Preprocess with the features of these weights")
    check_padding(data, number)
    known = 25 if model.languages else 50
    if has_base and rates and model.code_count == 8192 and not 0.8 * known < rates[1] < 1.2 * known:
        raise UserError(f"{path}: {rates[1]:.1f} codes a second (median), {NAMES[model.languages > 0]} has {known}: "
                        "they are another codec's, or have padding in them. Preprocess with these weights' features")


def belongs_together(config: TrainConfig, tokenizer: Mapping[str, Any], datasets: Sequence[ManifestDataset],
                     base: Mapping[str, Any] | None, base_tensors: Mapping[str, Tensor] | None,
                     say: Callable[[str], None]) -> dict[str, Any]:
    """What is known of what data, tokenizer, model and base checkpoint (the whole file, and its tensors) were made
    with. Raises: UserError where two of them do not belong together."""
    base_name, of_base = f"--base-checkpoint {config.base_checkpoint}", recorded_in(base or {})
    records = [(manifest["path"], manifest["made_with"]) for data in datasets for manifest in data.manifests]
    if base and "conditioning_sha256" not in of_base and any("conditioning_sha256" in record for _, record in records):
        of_base.update(conditioning_record(base_tensors or {}))
    known, problems = compare_made_with([
        (f"--tokenizer {tokenizer['path']}", {"tokenizer_sha256": tokenizer["sha256"]}),
        (f"--config {config.config}" if config.config else "the checkpoint's config",
         {"num_codes": datasets[0].model.code_count}), *records, (base_name, of_base)])
    if problems:
        raise UserError("; ".join(problems))
    for path, made_with in records if base else ():
        if made_with.get("features") == "embedded" and not of_base.get("codec_sha256"):
            raise UserError(f"{path} was made with the embedded codec (features embedded), and {base_name} is not "
                            "recorded as made for that codec: its weights know other codes and conditions. Train from "
                            "scratch, or start from a checkpoint of such a run")
    for data in datasets:
        for number, manifest in enumerate(data.manifests):
            if not manifest["made_with"]:
                check_unrecorded(data, number, base is not None, say)
    return known


def build_model(config: TrainConfig, model_config: ModelConfig, train_data: ManifestDataset,
                base: Mapping[str, Tensor] | None, fresh: bool) -> tuple[UnifiedVoiceGPT, dict[str, Tensor], int]:
    """The model on the CPU, tensors carried along, and the base's vocabulary; from a checkpoint they come later."""
    model = UnifiedVoiceGPT(model_config, config.dropout, config.grad_checkpointing)
    carried, base_vocab = dict[str, Tensor](), 0
    if fresh:
        text_tokens, codes = train_data.rows.table[:, 2:4].sum(axis=0).tolist()
        init_fresh_weights(model, config.seed, codes / text_tokens)
    if base is not None:
        carried, base_vocab = load_base_checkpoint(model, base, Path(config.base_checkpoint), config.tokenizer,
                                                   config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    for name, layer in model.named_modules() if config.lora_rank else ():
        if isinstance(layer, Conv1D) and name.endswith(tuple(config.lora_targets or LORA_TARGETS)):
            inputs, outputs = layer.weight.shape
            layer.lora = LoRA(inputs, outputs, config, generator)
    return model, carried, base_vocab


def read_model_config(config: TrainConfig, checkpoint: Mapping[str, Any] | None, tokenizer: Mapping[str, Any]
                      ) -> tuple[ModelConfig, dict[str, Any]]:
    """Sizes of the model, and all of the gpt: section that they stand in. Raises: UserError."""
    section: Any = read_gpt_section(Path(config.config)) if config.config else (checkpoint or {}).get("model_config")
    source = f"--config {config.config}" if config.config else "the checkpoint's config"
    model_config, tokens = model_config_from(section, source, tokenizer["size"]), section.get("number_text_tokens")
    if config.tokenizer.endswith(".tiktoken") and tokenizer["size"] != tokens:
        raise UserError(f"--tokenizer {config.tokenizer} has {tokenizer['size']} tokens, {source} says {tokens}: it is "
                        "another model's. Pass the one beside the weights")
    return model_config, {**section, "number_text_tokens": tokenizer["size"]}


def read_base(config: TrainConfig, checkpoint: Mapping[str, Any] | None, process: Process
              ) -> tuple[dict[str, Tensor] | None, Mapping[str, Any] | None, dict[str, Any] | None]:
    """The base checkpoint's tensors and whole file, where a run begins with them or LoRA adds to them, and what LoRA
    remembers of it. Raises: UserError, Stopped."""
    tensors, content, lora_base = None, None, (checkpoint or {}).get("lora_base")
    if config.lora_rank and not config.base_checkpoint:
        raise UserError("--lora-rank goes with --base-checkpoint: the weights that it adds to")
    if config.lora_rank:
        lora_base = process.in_thread(lambda: check_lora_base(config.base_checkpoint, lora_base))
    if config.base_checkpoint and (checkpoint is None or config.lora_rank):
        tensors, content = read_base_checkpoint(Path(config.base_checkpoint))
    return tensors, content, lora_base


def open_data(manifests: Sequence[str], config: TrainConfig, model: ModelConfig, process: Process) -> ManifestDataset:
    """Raises: UserError, Stopped."""
    data = process.in_thread(lambda: ManifestDataset(
        manifests, model, config.emo_source, process.console.progress, config.tokenizer.endswith(".tiktoken")))
    process.console.end_progress()
    return data


def prepare(typed: Mapping[str, Any], point: ResumePoint | None, output_dir: Path, process: Process) -> Run:
    """Settings, data and model of a run; a checkpoint is applied. Raises: UserError, Stopped."""
    say, device, fork = process.say, setup_device(), point if point and "moments" in point.checkpoint else None
    typed = settings_of_fork(typed, fork, device) if fork else typed
    checkpoint = point.checkpoint if point else None
    config, threads = resolve_config(typed, checkpoint, device, process.world)
    if checkpoint and not config.eval_only:
        say_changes(config, checkpoint, device, say)
    say(f"[Info] Config: {config.config or (point.path if point else '')}")
    tokenizer = read_tokenizer(config.tokenizer)
    model_config, gpt_section = read_model_config(config, checkpoint, tokenizer)
    val_data = open_data(config.val_manifest, config, model_config, process)
    train_data = val_data if config.eval_only else open_data(config.train_manifest, config, model_config, process)
    datasets = [val_data] if config.eval_only else [train_data, val_data]
    for manifest in (manifest for data in datasets for manifest in data.manifests):
        say(f"[Info] {manifest['path']}: {manifest['rows']} rows")
    base, content, lora_base = read_base(config, checkpoint, process)
    made_with = belongs_together(config, tokenizer, datasets, fork.checkpoint if fork else content,
                                 fork.checkpoint["model"] if fork else base,
                                 say if point is None or fork else lambda line: None)
    model, carried, base_vocab = build_model(config, model_config, train_data, base, fresh=checkpoint is None)
    if base is not None and base_vocab < tokenizer["size"]:
        say(f"[Info] {tokenizer['size'] - base_vocab} text tokens are new; their rows start from means of the base's")
    base_vocab = base_vocab or (checkpoint or {}).get("base_vocab", 0)
    factors, base_text_factor = lr_factors([*dict(model.named_parameters())], config, base_vocab, tokenizer["size"])
    precision = choose_precision(config.amp, device)
    model.to(device)
    attention = choose_attention(model, precision)
    if device.type == "cuda":
        say(f"[Info] Algorithms: {use_deterministic_algorithms(model, precision)}")
    size, layout = sum(p.numel() for p in model.parameters()) / 1e6, NAMES[model_config.languages > 0]
    say(f"[Info] Model: {model_config.layers} layers x {model_config.model_dim}, {size:.1f} M parameters, layout of "
        f"{layout}, attention: {attention}")
    if checkpoint is None:
        say(f"[Info] Base checkpoint: {config.base_checkpoint or 'none, training from scratch'}")
    if base is not None and not carried:
        say("[Warn] The base checkpoint has no conditioning modules: the tools here can use what this run saves, "
            "IndexTTS2 cannot")
    scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
    state = TrainState(base_vocab=base_vocab, first_batch_size=config.batch_size)
    optimizer = make_optimizer(model, config.weight_decay, factors)
    run = Run(config, output_dir, process, precision, model, optimizer, scaler, carried, gpt_section, tokenizer,
              made_with, train_data, val_data, state, threads, base_text_factor=base_text_factor, lora_base=lora_base,
              nonfinite=torch.zeros(3, device=device))
    process.run = run
    if fork:
        fit_fork(run, fork, typed)
    if point and config.eval_only:
        require_fit(run, point)
        restore_model(run, point)
    elif point:
        restore(run, point)
    else:
        run.state.schedule = make_schedule(config, run.state.position, epoch_size(train_data.mix))
    if config.compile:
        compile_model(model)
    return run


def say_start(run: Run) -> None:
    """What was chosen: batches, what --freeze and --lr-scale left, the end of the run, validation, disk."""
    config, say = run.config, run.process.say
    to_the_end = last_step(run.state.position, epoch_size(run.train_data.mix), config)
    processes = f" x {config.world_size} processes" if config.world_size > 1 else ""
    say(f"[Info] Batch size {config.batch_size} x accumulation {config.grad_accumulation}{processes} = global batch "
        f"{config.global_batch}; {run.threads} reading thread{'s' * (run.threads > 1)}; peak learning rate "
        f"{config.learning_rate:g}")
    if run.base_text_factor != 1:
        say(f"[Info] The base checkpoint's {run.state.base_vocab} text tokens: learning rate of their tensors x "
            f"{run.base_text_factor:g}")
    counts = Counter({0.0: sum(p.numel() for p in run.model.parameters() if not p.requires_grad)})
    for group in run.optimizer.param_groups:
        counts[group["lr_scale"]] += sum(p.numel() for p in group["params"])
    for factor, count in sorted((+counts).items()) if len(+counts) > 1 else ():
        say(f"[Info] Learning rate x {factor:g}: {count / 1e6:.3f} M values{'' if factor else ', frozen'}")
    limit = f", --max-steps {config.max_steps}: the smaller one holds" if config.max_steps else ""
    say(f"[Info] The run ends at step {run.end}: {config.epochs} epochs end at step {to_the_end}{limit}")
    is_mix = any(weight != 1 for _, weight in run.train_data.mix)
    for manifest, (rows, weight) in zip(run.train_data.manifests, run.train_data.mix, strict=True):
        if is_mix:
            size = epoch_size([(rows, weight)])
            say(f"[Info] {manifest['path']}: weight {weight:g}, {size} samples of its {rows} rows in an epoch, "
                f"{size / epoch_size(run.train_data.mix):.1%} of it")
    say(f"[Info] Validation: {len(validation_rows(run))} of {len(run.val_data)} rows")
    if run.process.world.rank > 0:
        return
    is_whole = not run.config.lora_rank
    # Weights and, of what learns, Adam's two moments, each 4 bytes.
    size = sum(p.numel() * (12 if p.requires_grad else 4 * is_whole) for p in run.model.parameters()) + is_whole * sum(
        t.numel() * t.element_size() for t in run.carried.values())
    files = (config.keep_checkpoints or 1) + 2  # and best.pth, and the one being written
    needed, free = files * size, math.inf
    with contextlib.suppress(OSError):  # a file system that does not know
        free = shutil.disk_usage(run.output_dir).free
    level, hint = ("[Info]", "") if free > needed else ("[Warn]", "; free some, or lower --keep-checkpoints")
    say(f"{level} Disk: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB for {files} checkpoints{hint}")


class Meter:
    """Tokens per second and MFU between two log lines, validation and saves left out."""

    def __init__(self, peak: float):
        self.peak, self.steps, self.first = peak, 0, 0.0  # the first step's end, for the ETA
        self.restart()

    def restart(self) -> None:
        self.started, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def add(self, stats: StepStats) -> None:
        self.tokens, self.flops, self.steps = self.tokens + stats.tokens, self.flops + stats.flops, self.steps + 1
        self.first = self.first or time.perf_counter()

    def rates(self) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.started)
        return {"tokens_per_second": self.tokens / seconds, "mfu": self.flops / seconds / self.peak}

    def show_progress(self, run: Run) -> None:
        step, end, elapsed = run.state.position.step, max(1, run.end), time.perf_counter() - self.first
        seconds = round((end - step) * elapsed / (self.steps - 1)) if self.steps > 1 else None
        eta, about = ("?", "") if seconds is None else (
            datetime.timedelta(seconds=seconds), f", about {seconds} s left")
        filled = 30 * step // end
        run.process.console.progress(f"[{'#' * filled}{'.' * (30 - filled)}] step {step}/{end} ETA {eta}",
                                     f"training: {step}/{end}, {elapsed:.0f} s{about}")


def leave_out_nonfinite_rows(run: Run) -> None:
    """Tells updates skipped since the last [Train] line, and by which rows; a row whose loss is not finite for the
    second time is left out from here on, on every rank. Raises: UserError for too many."""
    state, say, rows, skips = run.state, run.process.say, run.train_data.rows, int(run.nonfinite[0].item())
    skipped, state.skips_told = skips - state.skips_told, skips
    if not skipped:
        return
    found, state.nonfinite_rows = Counter(state.nonfinite_rows), []
    scale = f"; fp16's scale is {run.scaler.get_scale():g} now" if run.scaler.is_enabled() else ""
    named = f"; their loss was not finite: {', '.join(rows[row].id for row in list(found)[:5])}" if found else ""
    say(f"[Warn] {skipped} updates skipped since the last line, for gradients that were not finite{scale}{named}")
    twice = [row for row, times in found.items() if times > 1 or row in state.suspect_rows]
    state.suspect_rows = sorted({*state.suspect_rows, *found} - {*twice})
    if twice:
        state.left_out = [*state.left_out, *twice]
        run.restart_reading()
        run.train_data.unreported.update(dict.fromkeys(twice, NOT_FINITE_TWICE))
        share_bad_rows(run, run.train_data)


def log_step(run: Run, stats: StepStats, meter: Meter) -> None:
    """Prints the [Train] line and writes metrics; the only place of the loop that waits for the device."""
    position = run.state.position
    parts = run.process.world.add_up(torch.stack([stats.text_loss, stats.mel_loss, stats.mel_top1]))
    text_loss, mel_loss, mel_top1 = parts.tolist()
    collect_nonfinite_rows(run)
    with run.process.failing_together():
        check_finite(run)
    run.process.say(f"[Train] epoch={position.last_epoch} step={position.step} text_loss={text_loss:.6f} "
                    f"mel_loss={mel_loss:.6f} mel_top1={mel_top1:.4f} lr={stats.lr:.3e}")
    if run.metrics:
        run.metrics.write("train", position, {
            "text_loss": text_loss, "mel_loss": mel_loss, "mel_top1": mel_top1, "lr": stats.lr,
            "grad_norm": stats.grad_norm.item(), "skipped_updates": int(run.nonfinite[0].item()), **meter.rates()})
    leave_out_nonfinite_rows(run)
    meter.restart()
    run.process.event("logged", run)


def after_step(run: Run, stats: StepStats, meter: Meter) -> None:
    """Log, validate, save, in this order. Raises: Stopped."""
    config, step = run.config, run.state.position.step
    meter.add(stats)
    meter.show_progress(run)
    finish_save(run, wait=False)
    if step % run.log_interval == 0:
        log_step(run, stats, meter)
    best = None
    if run.validation_due:
        if run.saving and run.saving.is_best:
            finish_save(run)  # whether there is a best.pth to beat is known then
        best = validate(run)
        meter.restart()
    retry = run.save_retry_step and step >= run.save_retry_step
    is_first = best and not (run.saving or run.state.recent_checkpoints)  # best.pth alone is nothing for auto to take
    due = (config.save_interval and step % config.save_interval == 0) or (
        run.finished or retry or stats.save_due or is_first)
    if due or best:
        run.save_retry_step = 0 if due else run.save_retry_step
        start_save(run, best, is_checkpoint=bool(due))
        meter.restart()


def save_or_say_so(run: Run) -> None:
    """Waits for the last save; other ranks for rank 0's, which torchrun might end. Raises: UserError when it failed."""
    finish_save(run)
    if run.state.position.step > run.saved_step:
        raise UserError(f"the last checkpoint could not be saved to {run.output_dir}; the run would go on from step "
                        f"{run.saved_step}. Free some disk space and resume")
    run.process.world.gather(None)


def train(run: Run) -> None:
    """The loop. Raises: Stopped, after the last complete step was saved."""
    state, data, process = run.state, run.train_data, run.process
    meter = Meter(peak_flops(run.precision) * process.world.size)
    try:
        if run.validation_owed:
            process.say(f"[Info] Step {state.position.step} still owes its validation")
            start_save(run, validate(run))
        measure_base(run)
        while not run.finished:
            if run.reader is None:
                steps = steps_from(state.position, data.mix, run.config, process.world.rank)
                run.reader = read_ahead(run, data, steps)
            stats = None
            with contextlib.suppress(torch.OutOfMemoryError):  # and with it goes what holds the step's tensors
                stats = train_step(run, next(run.reader))
            if stats is None:
                split_after_out_of_memory(run)
                continue
            state.position = state.position.after_step(epoch_size(data.mix), run.config.global_batch)
            state.tokens_seen += stats.tokens
            process.event("step_done", run)
            after_step(run, stats, meter)
            if run.profiler:
                run.profiler.step()
    except Stopped as stopped:
        process.console.end_progress()
        process.say(f"[Info] {stopped}: stopping at step {state.position.step}")
        finish_save(run)
        if state.position.step > run.saved_step:
            start_save(run, best=None)
        save_or_say_so(run)
        raise
    save_or_say_so(run)


def run_training(typed: Mapping[str, Any], output_dir: Path, process: Process) -> None:
    """From the command line to a finished run. Raises: UserError, Stopped."""
    resume, world, say = typed.get("resume", ""), process.world, process.say
    point = find_resume_point(resume, output_dir, process)
    with process.failing_together():
        run = prepare(typed, point, output_dir, process)
    for data in (run.train_data, run.val_data):
        share_bad_rows(run, data)
    state = run.state
    if run.finished and not run.validation_owed:
        limit = "--patience" if run.out_of_patience else (
            "--max-steps" if run.config.max_steps and state.position.step >= run.config.max_steps else "--epochs")
        say(f"[Info] Training is complete: epoch {state.position.epoch}, step {state.position.step}. Raise {limit} to "
            "go on")
        return
    wrap_for_ranks(run)
    say_start(run)
    if world.rank == 0:
        open_run_dir(run, point, resume)
    point = None  # else the resumed file stays mapped, and fills the disk after it was rotated out
    profiler: Any = contextlib.nullcontext()
    if run.config.profile and world.rank == 0:
        trace = output_dir / state.run_dir / "trace.json"
        profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=3, warmup=0, active=3, repeat=1),
                                          on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)))
    with profiler as run.profiler:
        try:
            train(run)
        finally:
            process.console.end_progress()
            run.restart_reading()
            run.writer.shutdown()
            if run.metrics:
                run.metrics.close()
    best = f", best validation loss {state.best['loss']:.6f} at step {state.best['step']}" if state.best else ""
    if run.out_of_patience:
        say(f"[Info] {state.validations_since_best} validations in a row were no better: stopped early (--patience)")
    say(f"[Info] Training complete: epoch {state.position.epoch}, step {state.position.step}{best}")


def run_evaluation(typed: Mapping[str, Any], output_dir: Path, process: Process) -> None:
    """--eval-only: the [Val] line, and eval.jsonl with a line per row. Raises: UserError, Stopped."""
    resume = typed.get("resume", "")
    if process.world.size > 1:
        raise UserError("--eval-only runs in one process: start it without torchrun")
    if not resume and not typed.get("base_checkpoint"):
        raise UserError("--eval-only needs weights: --resume auto, --resume PATH or --base-checkpoint PATH")
    point = open_resume(resume, output_dir, process.say)
    if point is None and not typed.get("base_checkpoint"):
        raise ResumeError(f"no checkpoint in {output_dir} to evaluate. Check --output-dir")
    with writing_to(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    run = prepare({"max_val_batches": 0, **typed}, point, output_dir, process)
    share_bad_rows(run, run.val_data)
    process.say(f"[Info] Validation: {len(validation_rows(run))} of {len(run.val_data)} rows")
    path = output_dir / "eval.jsonl"
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as handle:
        results = evaluate(run, lambda record: print(json.dumps(record, ensure_ascii=False), file=handle))
    say_validation(run, results)
    process.say(f"[Info] Losses of every row: {path}")


def main(argv: Sequence[str] | None = None, on_event: Callable[..., None] = no_event) -> int:
    """Returns the exit status: 0, 1 for a mistake that was explained, 128 + signal number when stopped."""
    stop = StopSignal()
    stop.install()
    with contextlib.suppress(ValueError, OSError):  # every shard stays open: as many files as may be asked for
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # closed: >&-
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(stop, sys.stdout)
    try:
        typed, world = parse_args(argv), world_from(os.environ)
        if world.rank > 0:
            console = Console(stop, open(os.devnull, "w"))
        process = Process(stop, console, world, on_event)
        output_dir, resume = output_dir_of(typed), typed.get("resume", "")
        if resume not in ("", "auto") and not Path(resume).is_file():  # before a directory is made
            if Path(resume).is_dir():
                raise UserError(f"--resume {resume}: Is a directory. To go on in it: --output-dir {resume} --resume "
                                "auto")
            read_explicit(Path(resume))  # says what is there instead
        if typed.get("eval_only"):
            run_evaluation(typed, output_dir, process)
            return 0
        lock = lock_output_dir(output_dir, console.say) if world.rank == 0 else contextlib.nullcontext()
        with process_group(world), lock, exit_recorded(output_dir, process):
            run_training(typed, output_dir, process)
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
    """Ends the process without Python's clean-up, which takes a second, waits for threads that may hang on a disk, and
    in which gloo's threads, which DDP keeps alive, sometimes abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader may be gone, the disk full
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
