"""Forms to command lines: which fields each program's form has, the argv they make, and what is wrong with them.

A form is a dict of field name -> str | bool | int | float | list[str] | None as the page's inputs hold it. An empty
field emits no flag, so that the program chooses.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools._common import ToolError
from tools.amharic_text import KNOWN_RULES
from tools.made_with import EMBEDDED, FEATURES, INDEXTTS2, INDEXTTS25
from tools.model_folder import (
    FOR_FEATURES,
    FOR_FEATURES_25,
    FOR_SOUND,
    FOR_SOUND_25,
    find_parts,
    own_download,
    recognised,
)
from tools.run_files import MAX_WEIGHT, all_checkpoints, foreign_checkpoints, split_manifest
from webui.workspace import ROOT, Refused, Workspace

Form = dict[str, Any]
Problem = tuple[str, dict[str, Any]]  # a key of MESSAGES and its values
MAX_TEXT = 2000  # characters of a text to speak
NAME = re.compile(r"[^-\s]\S*")  # not to be taken for a flag
LINES = ("manifests", "patterns", "factors")  # several values, one a line, the flag before each
PATHS = ("file", "directory", "path", "model_folder", "program", "new_file", "new_directory")


@dataclass(frozen=True)
class Field:
    """One input of a form.

    type: "text", "line" (a text without line breaks), "words" (blank-separated names, of `choices` if any), "int",
    "float", "choice", "switch" (True emits the flag alone), "yes_no" (--flag or --no-flag; an empty one leaves it to
    program and checkpoint), "patterns" (one a line, the flag before each), "factors" (patterns, each with =FACTOR),
    "file", "directory" and "path" (either of them; must exist), "model_folder" (a directory; what it lacks is said with
    how to get it), "program" (an executable file), "manifests" (existing files, one a line, each with an optional
    ::lang or ::lang@weight), "new_file" and "new_directory" (are written; may exist).
    """

    name: str
    flag: str
    type: str
    required: bool = False
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()  # of a new_file: so that a slip of the hand overwrites no file of another kind
    fresh: bool = False  # of a new_file that the program would write over


@dataclass(frozen=True)
class Program:
    argv: tuple[str, ...]
    fields: tuple[Field, ...]
    output: str | None = None  # the field whose directory or file the job holds while it runs


def whole(name: str, flag: str, minimum: float, maximum: float) -> Field:
    return Field(name, flag, "int", minimum=minimum, maximum=maximum)


def yes_no(name: str, flag: str) -> Field:
    return Field(name, flag, "yes_no", choices=("yes", "no"))


# Bounds keep a slip of the hand from taking the machine down; where a program has narrower ones, they are its.
MANY = 1_000_000_000  # steps, rows
PROCESSES = 4 * (os.cpu_count() or 1)  # each loads PyTorch
SEED = whole("seed", "--seed", 0, 2**32 - 1)
LAYOUTS = ("ljspeech", "common-voice", "nemo", "f5-tts", "gpt-sovits", "filelist", "jsonl", "table", "folder")
# Form: its field of the shortest and of the longest, what is chosen where they are empty, and how many times longer.
LENGTHS = {"import": ("shortest", 2.0, "longest", 15.0, 3.0), "filter": ("shortest", 0.4, "longest", 30.0, 1.0)}
EMO_SOURCES = ("prompt", "target", "mixed")
LORA_TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # as the trainer has them
PROGRAMS: dict[str, Program] = {
    "import": Program(("-m", "tools.import_recordings"), (
        Field("source", "", "path", required=True),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("speaker", "--speaker", "line"),
        Field("speaker_from", "--speaker-from", "choice", choices=("column", "folder")),
        Field("layout", "--layout", "choice", choices=LAYOUTS),
        Field("language", "--language", "line"),
        # Not any command: who has the page's password shall run no more than what the machine's owner put there.
        Field("transcriber", "--transcriber", "program"),
        Field("audio_dir", "--audio-dir", "directory"),
        Field("shortest", "--shortest", "float", minimum=0.5, maximum=200),
        Field("longest", "--longest", "float", minimum=1.5, maximum=600),
        whole("jobs", "--jobs", 0, PROCESSES)), "output_dir"),
    "filter": Program(("-m", "tools.filter_dataset"), (
        Field("recordings", "", "file", required=True),
        Field("audio_dir", "--audio-dir", "directory"),
        Field("shortest", "--shortest", "float", minimum=0.01, maximum=600),
        Field("longest", "--longest", "float", minimum=0.01, maximum=600),
        Field("quietest", "--quietest", "float", minimum=-120, maximum=0),
        Field("most_clipped", "--most-clipped", "float", minimum=0, maximum=1),
        Field("least_snr", "--least-snr", "float", minimum=-100, maximum=100),
        Field("most_offset", "--most-offset", "float", minimum=0, maximum=1),
        Field("most_deviation", "--most-deviation", "float", minimum=0, maximum=1000),
        Field("least_ethiopic", "--least-ethiopic", "float", minimum=0, maximum=1),
        whole("most_repeats", "--most-repeats", 1, MANY),
        Field("most_silence", "--most-silence", "float", minimum=0, maximum=600),
        whole("jobs", "--jobs", 0, PROCESSES)), "recordings"),
    "check": Program(("-m", "tools.check_dataset"), (
        Field("recordings", "", "file", required=True),
        Field("tokenizer", "--tokenizer", "file"),
        Field("codec", "--codec", "file"),
        Field("audio_dir", "--audio-dir", "directory"),
        whole("jobs", "--jobs", 0, PROCESSES))),
    "speak": Program(("-m", "tools.speak"), (
        Field("texts", "--texts", "file", required=True),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("voices", "--voices", "words"),
        whole("words_per_minute", "--words-per-minute", 80, 450),
        Field("every_voice", "--every-voice", "switch"),
        whole("limit", "--limit", 0, MANY),
        whole("workers", "--workers", 1, PROCESSES),
        Field("rules", "--rules", "choice", choices=tuple(map(str, KNOWN_RULES)))), "output_dir"),
    "prepare": Program(("-m", "tools.prepare"), (
        Field("recordings", "--recordings", "file", required=True),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("features", "--features", "choice", choices=FEATURES),
        Field("model_dir", "--model-dir", "model_folder"),
        Field("tokenizer", "--tokenizer", "file"),
        whole("target_size", "--target-size", 1, 1_000_000),
        Field("codec", "--codec", "file"),
        whole("codec_steps", "--codec-steps", 1, 10_000_000),
        whole("num_codes", "--num-codes", 2, 65_536),
        Field("audio_dir", "--audio-dir", "directory"),
        Field("config", "--config", "file"),
        Field("val_share", "--val-share", "float", minimum=0.0001, maximum=0.9999),
        Field("val_speakers", "--val-speakers", "words"),
        whole("prompts_per_speaker", "--prompts-per-speaker", 0, 1_000_000),
        whole("jobs", "--jobs", 0, PROCESSES),
        SEED), "output_dir"),
    "collect": Program(("-m", "tools.collect_corpus"), (
        Field("recordings", "", "path", required=True),
        Field("output", "--output", "new_file", required=True, suffixes=(".jsonl", ".txt"), fresh=True),
        Field("tokenizer", "--tokenizer", "file")), "output"),
    "corpus": Program(("-m", "tools.amharic_text", "build"), (
        Field("sources", "--sources", "directory"),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        whole("sequences", "--sequences", 0, 10_000_000),
        whole("validation_texts", "--validation-texts", 0, 1_000_000),
        whole("held_out_words", "--held-out-words", 0, 1_000_000),
        SEED), "output_dir"),
    "tokenizer": Program(("-m", "tools.train_tokenizer"), (
        Field("texts", "--texts", "file", required=True),
        Field("output", "--output", "new_file", required=True, suffixes=(".model",), fresh=True),
        Field("model_type", "--model-type", "choice", choices=("char", "bpe", "unigram")),
        whole("vocab_size", "--vocab-size", 1, 1_000_000),
        Field("extend", "--extend", "file"),
        whole("target_size", "--target-size", 1, 1_000_000),
        Field("language", "--language", "line")), "output"),
    "codec": Program(("-m", "tools.speech_codec", "train"), (
        Field("recordings", "--recordings", "file", required=True),
        Field("output", "--output", "new_file", required=True, suffixes=(".pt",), fresh=True),
        whole("steps", "--steps", 1, 10_000_000),
        Field("max_hours", "--max-hours", "float", minimum=0.01, maximum=100_000),
        whole("num_codes", "--num-codes", 2, 65_536),
        whole("pca_dim", "--pca-dim", 1, 1024),
        whole("kmeans_iterations", "--kmeans-iterations", 1, 10_000),
        whole("width", "--width", 1, 4096),
        whole("batch_size", "--batch-size", 1, 4096),
        whole("segment", "--segment", 1, 4096),
        SEED), "output"),
    "preprocess": Program(("-m", "tools.preprocess"), (
        Field("recordings", "--recordings", "file", required=True),
        Field("features", "--features", "choice", choices=FEATURES),
        Field("codec", "--codec", "file"),
        Field("model_dir", "--model-dir", "model_folder"),
        Field("tokenizer", "--tokenizer", "file", required=True),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("audio_dir", "--audio-dir", "directory"),
        Field("config", "--config", "file"),
        whole("model_dim", "--model-dim", 0, 16_384),
        whole("prompts_per_speaker", "--prompts-per-speaker", 0, 1_000_000),
        Field("val_share", "--val-share", "float", minimum=0.0001, maximum=0.9999),
        Field("val_speakers", "--val-speakers", "words"),
        whole("jobs", "--jobs", 0, PROCESSES),
        SEED), "output_dir"),
    "pairs": Program(("-m", "tools.build_pairs"), (
        Field("data_dir", "--data-dir", "directory", required=True),
        whole("pairs_per_target", "--pairs-per-target", 1, 1000),
        whole("max_text_tokens", "--max-text-tokens", 0, 100_000),
        whole("max_codes", "--max-codes", 0, 1_000_000),
        Field("min_prompt_seconds", "--min-prompt-seconds", "float", minimum=0, maximum=600),
        Field("max_prompt_seconds", "--max-prompt-seconds", "float", minimum=0, maximum=600),
        Field("emo_source", "--emo-source", "choice", choices=EMO_SOURCES),
        SEED), "data_dir"),
    "training": Program(("trainers/train_gpt_v2.py",), (
        Field("train_manifests", "--train-manifest", "manifests"),
        Field("val_manifests", "--val-manifest", "manifests"),
        Field("tokenizer", "--tokenizer", "file"),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("learning_rate", "--learning-rate", "float", minimum=0, maximum=1),
        whole("batch_size", "--batch-size", 0, 4096),
        whole("grad_accumulation", "--grad-accumulation", 0, 65_536),
        whole("epochs", "--epochs", 1, 1_000_000),
        whole("num_workers", "--num-workers", 0, 256),
        Field("amp", "--amp", "choice", choices=("auto", "bf16", "fp16", "off")),
        Field("config", "--config", "file"),
        Field("base_checkpoint", "--base-checkpoint", "file"),
        whole("max_steps", "--max-steps", 0, MANY),
        whole("warmup_steps", "--warmup-steps", 0, MANY),
        whole("save_interval", "--save-interval", 0, MANY),
        whole("val_interval", "--val-interval", 0, MANY),
        whole("log_interval", "--log-interval", 1, MANY),
        Field("save_minutes", "--save-minutes", "float", minimum=0, maximum=1_000_000),
        whole("patience", "--patience", 0, 1_000_000),
        Field("dropout", "--dropout", "float", minimum=0, maximum=0.99),
        whole("keep_checkpoints", "--keep-checkpoints", 0, 1_000_000),
        SEED,
        Field("emo_source", "--emo-source", "choice", choices=EMO_SOURCES),
        Field("freeze", "--freeze", "patterns"),
        Field("lr_scale", "--lr-scale", "factors"),
        Field("lora_rank", "--lora-rank", "int", minimum=0, maximum=4096),
        Field("lora_alpha", "--lora-alpha", "float", minimum=0, maximum=1_000_000),
        Field("lora_dropout", "--lora-dropout", "float", minimum=0, maximum=0.99),
        Field("lora_targets", "--lora-targets", "words", choices=LORA_TARGETS),
        yes_no("grad_checkpointing", "--grad-checkpointing"),
        Field("weight_decay", "--weight-decay", "float", minimum=0, maximum=100),
        Field("grad_clip", "--grad-clip", "float", minimum=0, maximum=1_000_000),
        Field("text_loss_weight", "--text-loss-weight", "float", minimum=0, maximum=1000),
        Field("mel_loss_weight", "--mel-loss-weight", "float", minimum=0, maximum=1000),
        whole("val_batch_size", "--val-batch-size", 0, 4096),
        whole("max_val_batches", "--max-val-batches", 0, MANY),
        yes_no("freeze_base_vocab", "--freeze-base-vocab"),
        yes_no("compile", "--compile"),
        Field("profile", "--profile", "switch"),
        Field("eval_only", "--eval-only", "switch"),
        Field("accept_changed_data", "--accept-changed-data", "switch"),
        Field("resume_path", "--resume", "file")), "output_dir"),
    "inspect": Program(("-m", "tools.inspect_checkpoint"), (
        Field("path", "", "directory", required=True),)),
    "export": Program(("-m", "tools.export_checkpoint"), (
        Field("checkpoint", "", "file", required=True),
        Field("output", "--output", "new_file", required=True, suffixes=(".pth",), fresh=True)), "output"),
    "synthesize": Program(("-m", "tools.synthesize"), (
        Field("checkpoint", "--checkpoint", "file", required=True),
        Field("text", "--text", "text", required=True),
        Field("prompt", "--prompt", "file", required=True),
        Field("output", "--output", "new_file", required=True, suffixes=(".wav",), fresh=True),
        Field("codec", "--codec", "file"),
        Field("model_dir", "--model-dir", "model_folder"),
        Field("tokenizer", "--tokenizer", "file"),
        Field("language", "--language", "line"),
        Field("temperature", "--temperature", "float", minimum=0.01, maximum=10),
        whole("top_k", "--top-k", 0, 1_000_000),
        Field("top_p", "--top-p", "float", minimum=0.01, maximum=1),
        Field("repetition_penalty", "--repetition-penalty", "float", minimum=0.01, maximum=100),
        Field("greedy", "--greedy", "switch"),
        whole("takes", "--takes", 1, 100),
        SEED), "output"),
    "watch": Program(("-m", "tools.synthesize"), (
        Field("watch", "--watch", "directory", required=True),
        Field("text_file", "--text-file", "file"),
        Field("prompt", "--prompt", "file"),
        Field("codec", "--codec", "file"),
        Field("model_dir", "--model-dir", "model_folder"),
        Field("language", "--language", "line"),
        whole("takes", "--takes", 1, 100))),
    "evaluate": Program(("-m", "tools.evaluate_voice"), (
        Field("checkpoint", "--checkpoint", "file", required=True),
        Field("data_dir", "--data-dir", "directory", required=True),
        Field("recordings", "--recordings", "file"),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("codec", "--codec", "file"),
        Field("model_dir", "--model-dir", "model_folder"),
        Field("recogniser", "--recogniser", "new_file", suffixes=(".pt",)),
        whole("texts", "--texts", 1, 1_000_000),
        whole("takes", "--takes", 1, 100)), "output_dir"),
    "tensorboard": Program(("-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0"), (
        Field("logdir", "--logdir", "directory", required=True),)),
}
PROGRAMS |= {  # of a whole voice, and of two checkpoints
    "export_folder": Program(("-m", "tools.export_checkpoint"), (
        Field("checkpoint", "", "file", required=True),
        Field("model_dir", "--model-dir", "directory", required=True),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("tokenizer", "--tokenizer", "file"),
        Field("dtype", "--dtype", "choice", choices=("fp32", "bf16", "fp16")),
        Field("copy", "--copy", "switch")), "output_dir"),
    "compare": Program(("-m", "tools.compare_checkpoints"), (
        Field("checkpoint", "--checkpoint", "file", required=True),
        Field("other", "--other", "file", required=True),
        Field("text", "--text", "text", required=True),
        Field("prompt", "--prompt", "file", required=True),
        Field("output_dir", "--output-dir", "new_directory", required=True),
        Field("codec", "--codec", "file"),
        Field("model_dir", "--model-dir", "model_folder"),
        Field("language", "--language", "line"),
        Field("temperature", "--temperature", "float", minimum=0.01, maximum=10),
        Field("takes", "--takes", "int", minimum=1, maximum=100),
        SEED), "output_dir"),
}
SPEAKING = ("synthesize", "compare", "watch", "evaluate")
NEEDED_TO_SPEAK = {INDEXTTS2: FOR_SOUND, INDEXTTS25: FOR_SOUND_25}
NEEDED_FOR_FEATURES = {INDEXTTS2: FOR_FEATURES, INDEXTTS25: FOR_FEATURES_25}
# Form values for Tab 6: as many steps of as many samples as `make demo` takes, then knowledge.md's.
PRESETS: dict[str, Form] = {
    "demo": {"batch_size": 24, "grad_accumulation": 1, "learning_rate": 0.0015, "max_steps": 500, "log_interval": 10,
             "save_interval": 50, "val_interval": 50},
    "a100_80gb": {"batch_size": 32, "grad_accumulation": 1, "num_workers": 12, "amp": "auto"},
    "gpu_24gb": {"batch_size": 8, "grad_accumulation": 4, "amp": "auto"},
    "gpu_16gb": {"batch_size": 4, "grad_accumulation": 8, "amp": "auto", "grad_checkpointing": "yes"},
}


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def command(kind: str, form: Form) -> list[str]:
    """The argv list for a form whose paths are taken as they are. Pure."""
    if kind == "preprocess" and typed(form.get("features")) not in ("", EMBEDDED):
        form = {**form, "codec": ""}  # the page fills it in; released features have their own
    if kind in SPEAKING and typed(form.get("model_dir")):
        form = {**form, "codec": ""}  # likewise: sound comes from the folder
    return training_command(form) if kind == "training" else command_of(PROGRAMS[kind], form)


def training_command(form: Form) -> list[str]:
    """The trainer's argv; "Resume from checkpoint" with an empty path is --resume auto. Pure.

    amp may be a checkbox: True is the hardware's best type, as --amp alone.
    """
    path = typed(form.get("resume_path"))
    form = {**form, "resume_path": (path or "auto") if form.get("resume") else "",
            "accept_changed_data": bool(form.get("resume")) and form.get("accept_changed_data") is True,
            "amp": "auto" if form.get("amp") is True else form.get("amp")}
    return command_of(PROGRAMS["training"], form)


def command_of(program: Program, form: Form) -> list[str]:
    argv = [sys.executable, *program.argv]
    for field in program.fields:
        argv += arguments(field, form.get(field.name))
    return argv


def arguments(field: Field, value: Any) -> list[str]:
    """The part of a command line that one field adds."""
    if field.type == "switch":
        return [field.flag] if value is True else []
    if field.type in LINES:
        return [part for line in lines_of(value) for part in (
            [f"{field.flag}={line}"] if line.startswith("-") else [field.flag, line])]
    text = typed(value)
    if not text:
        return []
    if field.type == "yes_no":
        return [field.flag if text == "yes" else f"--no-{field.flag[2:]}"]
    if field.type == "words":
        return [field.flag, *text.split()]
    if field.type == "program":
        return [field.flag, shlex.quote(text)]  # the program takes a command
    if field.type in ("text", "line") or text.startswith("-"):
        return [f"{field.flag}={text}"]
    if field.name == "amp" and text == "auto":
        return [field.flag]
    return [field.flag, text] if field.flag else [text]


def typed(value: Any) -> str:
    """An input's value as a user would type it; "" for an empty one. A number box hands over 8 as 8.0."""
    if value is None or value is False:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value).strip()


def lines_of(value: Any) -> list[str]:
    """The filled lines of a text box, or of a list."""
    lines = value if isinstance(value, (list, tuple)) else str(value or "").splitlines()
    return [str(line).strip() for line in lines if str(line).strip()]


def preview(argv: Sequence[str]) -> str:
    """The command for people to copy, from any directory; never executed by us."""
    # The cd makes the paths below it relative, as the handbook writes them.
    shown = ["python", *(part.removeprefix(f"{ROOT}{os.sep}") for part in argv[1:])]
    return f"cd {shlex.quote(str(ROOT))} && {shlex.join(shown)}"


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def resolve(kind: str, form: Form, workspace: Workspace) -> Form:
    """The same form with absolute paths inside the workspace. Raises: Refused for the first one that is not."""
    resolved = dict(form)
    for field in PROGRAMS[kind].fields:
        value = form.get(field.name)
        if field.type == "manifests":
            resolved[field.name] = [absolute_manifest(line, workspace) for line in lines_of(value)]
        elif field.type in PATHS and typed(value):
            resolved[field.name] = str(workspace.inside(typed(value)))
    return resolved


def absolute_manifest(line: str, workspace: Workspace) -> str:
    path, *_ = split_manifest(line)
    return f"{workspace.inside(path)}{line[len(path):]}"


def command_for(kind: str, form: Form, workspace: Workspace) -> list[str]:
    """What Start runs: command(kind, resolve(...)). Raises: Refused."""
    return command(kind, resolve(kind, form, workspace))


def output_of(kind: str, form: Form, workspace: Workspace) -> Path | None:
    """The path for start_job's output_dir. Raises: Refused."""
    name = PROGRAMS[kind].output
    return workspace.inside(typed(form.get(name))) if name else None


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def problems(kind: str, form: Form, workspace: Workspace) -> dict[str, Problem]:
    """Everything that can be known before starting: {field name: (key of MESSAGES, values)}; {} when all is well."""
    found: dict[str, Problem] = {}
    for field in PROGRAMS[kind].fields:
        try:
            check_field(field, form.get(field.name), workspace)
        except Refused as refused:
            found[field.name] = refused.key, refused.values
    if kind == "training" and not found:
        try:
            check_output_dir(form, workspace)
        except Refused as refused:
            field_name = "resume_path" if refused.key.startswith("resume") else "output_dir"
            found[field_name] = refused.key, refused.values
    if kind == "training" and not found:
        found = lora_problems(form)
    if kind in LENGTHS and not found:
        found = length_problems(form, *LENGTHS[kind])
    if kind == "tokenizer" and not found:
        found = extension_problems(form)
    if kind in ("prepare", "preprocess") and not found:
        found = feature_problems(kind, form, workspace)
    if kind in SPEAKING and typed(form.get("model_dir")) and not found:
        found = model_folder_problems(typed(form.get("model_dir")), NEEDED_TO_SPEAK, workspace)
    return found


def lora_problems(form: Form) -> dict[str, Problem]:
    """Of a training form whose fields are well by themselves: what goes with a LoRA rank, which on resume may be the
    checkpoint's."""
    if form.get("resume") or float(typed(form.get("lora_rank")) or 0):
        return {}
    names = [name for name in ("lora_alpha", "lora_dropout") if float(typed(form.get(name)) or 0)]
    names += ["lora_targets"] if typed(form.get("lora_targets")) else []
    return {name: ("goes_with_lora", {}) for name in names}


def extension_problems(form: Form) -> dict[str, Problem]:
    """Of a tokenizer whose fields are well by themselves: what goes with --extend and what does not."""
    if not typed(form.get("extend")):
        return {"target_size": ("goes_with_extend", {})} if typed(form.get("target_size")) else {}
    return {name: ("not_with_extend", {}) for name in ("model_type", "vocab_size") if typed(form.get(name))}


def feature_problems(kind: str, form: Form, workspace: Workspace) -> dict[str, Problem]:
    """Of prepare and preprocess, whose fields are well by themselves: what the kind of features needs, and the model
    folder."""
    features = typed(form.get("features")) or EMBEDDED
    if features == EMBEDDED:
        has_codec = kind == "prepare" or typed(form.get("codec"))  # prepare trains one
        found: dict[str, Problem] = {} if has_codec else {"codec": ("required", {})}
        wrong = ["model_dir", "target_size"]
    else:
        needed = {features: NEEDED_FOR_FEATURES[features]}
        found = model_folder_problems(typed(form.get("model_dir")), needed, workspace)
        wrong = ["config", "model_dim", *(["codec", "codec_steps", "num_codes"] if kind == "prepare" else [])]
    if kind == "prepare" and (features == INDEXTTS25 or typed(form.get("tokenizer"))):
        wrong.append("target_size")
    if kind == "prepare" and typed(form.get("codec")):
        wrong += ["codec_steps", "num_codes"]
    return {**found, **{name: ("not_with_features", {"features": features}) for name in wrong if typed(form.get(name))}}


def model_folder_problems(text: str, needed: Mapping[str, Sequence[str]], workspace: Workspace) -> dict[str, Problem]:
    """What is missing in the folder, with the lines that download it, as the program would say it; `needed` are the
    parts for each of the released models that it may be of."""
    if not text:
        return {"model_dir": ("folder_needed", {"download": own_download(workspace.root / "checkpoints")})}
    folder = workspace.inside(text)
    try:
        found = recognised(folder)
        if found not in needed:
            return {"model_dir": ("other_model", {"path": text, "found": found, "features": ", ".join(needed)})}
        find_parts(folder, needed[found])
    except ToolError as error:
        return {"model_dir": ("tool_refuses", {"reason": str(error)})}
    except OSError:
        return {"model_dir": ("not_readable", {"path": text})}
    return {}


def length_problems(form: Form, short: str, shortest: float, long: str, longest: float, times: float
                    ) -> dict[str, Problem]:
    """Of two lengths in seconds that are numbers, or empty: these are chosen."""
    least = float(typed(form.get(short)) or shortest)
    most = float(typed(form.get(long)) or longest)
    if most >= times * least and most > least:
        return {}
    return {long if typed(form.get(long)) else short: ("lengths_too_near", {"longest": most, "shortest": least,
                                                                            "minimum": times * least})}


def check_field(field: Field, value: Any, workspace: Workspace) -> None:
    """Raises: Refused."""
    filled = bool(lines_of(value)) if field.type in LINES else bool(typed(value))
    if not filled:
        if field.required:
            raise Refused("required")
    elif field.type == "manifests":
        for line in lines_of(value):
            check_path(field, split_manifest(line)[0], workspace)
            check_weight(field, line)
    elif field.type in LINES:
        for line in lines_of(value):
            check_pattern(field, line)
    elif field.type in PATHS:
        check_path(field, typed(value), workspace)
    elif field.type in ("int", "float"):
        check_number(field, typed(value))
    elif field.choices and value is not True and not (
            {*typed(value).split()} if field.type == "words" else {typed(value)}) <= {*field.choices}:
        raise Refused("not_a_choice", value=typed(value), choices=", ".join(field.choices))
    elif field.type == "words" and not all(map(NAME.fullmatch, typed(value).split())):
        raise Refused("not_a_name", value=typed(value))
    elif field.type in ("text", "line") and len(typed(value)) > MAX_TEXT:
        raise Refused("text_too_long", maximum=MAX_TEXT)
    elif field.type == "line" and not typed(value).isprintable():
        raise Refused("not_a_line")


def check_weight(field: Field, line: str) -> None:
    """Raises: Refused."""
    weight = split_manifest(line)[2]
    if not 0 < weight <= MAX_WEIGHT:
        raise Refused("bad_weight", value=line, maximum=MAX_WEIGHT)
    if field.name == "val_manifests" and weight != 1:
        raise Refused("weight_of_validation", value=line)


def check_pattern(field: Field, line: str) -> None:
    """Which tensors there are only the trainer knows. Raises: Refused."""
    pattern, equals, factor = line.rpartition("=")
    if field.type == "patterns" and equals:
        raise Refused("factor_of_freeze", value=line)
    if field.type == "factors" and not (pattern and re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", factor)
                                        and 0 < float(factor) <= MAX_WEIGHT):
        raise Refused("bad_factor", value=line, maximum=MAX_WEIGHT)


def check_number(field: Field, text: str) -> None:
    """Raises: Refused."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in text:
        raise Refused("not_a_number", value=text)
    if field.type == "int" and not re.fullmatch(r"[+-]?[0-9]+", text):
        raise Refused("not_whole", value=text)
    if number < field.minimum:
        raise Refused("too_small", value=shortened(text), minimum=typed(float(field.minimum)))
    if number > field.maximum:
        raise Refused("too_large", value=shortened(text), maximum=typed(float(field.maximum)))


def shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}…"


def check_path(field: Field, text: str, workspace: Workspace) -> None:
    """Raises: Refused."""
    path = workspace.inside(text)
    if field.suffixes and path.suffix not in field.suffixes:
        raise Refused("wrong_suffix", path=text, suffixes=" ".join(field.suffixes))
    if field.type in ("directory", "model_folder", "new_directory") and path.exists() and not path.is_dir():
        raise Refused("not_a_directory", path=text)
    if field.type in ("manifests", "file", "program", "new_file") and path.is_dir():
        raise Refused("not_a_file", path=text)
    if field.type == "directory" and not path.exists():
        raise Refused("no_such_directory", path=text)
    if field.type in ("manifests", "file", "path", "program") and not path.exists():
        if field.flag == "--resume":
            raise Refused("resume_missing", path=text, present=", ".join(names_in(path.parent)) or "-")
        raise Refused("no_such_file", path=text)
    if field.type == "program" and not os.access(path, os.X_OK):
        raise Refused("not_executable", path=text)
    if field.fresh and path.exists():
        raise Refused("file_in_the_way", path=text)
    if field.type in ("new_directory", "new_file"):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
            raise Refused("not_writable", path=workspace.show(existing))


def names_in(directory: Path) -> list[str]:
    """Of the checkpoints there."""
    return [path.name for path in all_checkpoints(directory)]


def check_output_dir(form: Form, workspace: Workspace) -> None:
    """What the trainer would refuse about checkpoints that are there, or are not. Raises: Refused."""
    output_dir = workspace.inside(typed(form.get("output_dir")))
    resume_path = typed(form.get("resume_path"))
    if resume_path and not form.get("resume"):
        raise Refused("resume_unchecked", path=resume_path)
    resume = (str(workspace.inside(resume_path)) if resume_path else "auto") if form.get("resume") else ""
    reason = foreign_checkpoints(output_dir, resume)
    if reason:
        raise Refused(reason, path=workspace.show(output_dir), example=names_in(output_dir)[0])
