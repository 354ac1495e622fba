"""The way from recordings to a voice: how far the workspace has come, and what one step hands to the next."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tools.run_files import all_checkpoints
from webui.command_lines import PROGRAMS, Form
from webui.jobs import Job
from webui.readers import files_in
from webui.workspace import Refused, Workspace, is_text_name

STEPS = ("recordings", "dataset", "corpus", "tokenizer", "preprocess", "training", "checkpoints", "listen")
STEP_OF = {"speak": "recordings", "corpus": "corpus", "tokenizer": "tokenizer", "codec": "preprocess",
           "preprocess": "preprocess", "pairs": "preprocess", "training": "training", "export": "checkpoints",
           "synthesize": "listen", "watch": "listen", "evaluate": "listen"}
AUDIO = (".wav", ".flac", ".ogg", ".mp3")
RECORDINGS = "recordings"  # where uploads go

# What makes a step done: one of these files (names below) is there.
MADE_BY = {"recordings": "recording", "dataset": "dataset", "corpus": "texts", "tokenizer": "tokenizer",
           "preprocess": "train_manifest", "training": "checkpoint", "checkpoints": "checkpoint", "listen": "sound"}
# An empty field is filled with the first of these files that is there.
HANDED_ON = {
    ("speak", "texts"): ("texts",),
    ("tokenizer", "texts"): ("texts", "dataset"),
    ("codec", "recordings"): ("dataset",),
    ("preprocess", "recordings"): ("dataset",),
    ("preprocess", "codec"): ("codec",),
    ("preprocess", "tokenizer"): ("tokenizer",),
    ("pairs", "data_dir"): ("features",),
    ("training", "train_manifests"): ("train_manifest",),
    ("training", "val_manifests"): ("val_manifest",),
    ("training", "tokenizer"): ("tokenizer",),
    ("export", "checkpoint"): ("checkpoint",),
    ("synthesize", "checkpoint"): ("checkpoint",),
    ("synthesize", "prompt"): ("recording",),
    ("synthesize", "codec"): ("codec",),
    ("watch", "watch"): ("run",),
    ("watch", "codec"): ("codec",),
    ("evaluate", "checkpoint"): ("checkpoint",),
    ("evaluate", "data_dir"): ("pairs",),
    ("evaluate", "codec"): ("codec",),
}
NEW_FILES = {
    ("speak", "output_dir"): "synthetic_recordings",
    ("corpus", "output_dir"): "corpus",
    ("tokenizer", "output"): "tokenizers/my_tokenizer.model",
    ("codec", "output"): "my_data/speech_codec.pt",
    ("preprocess", "output_dir"): "my_data",
    ("training", "output_dir"): "training_output",
    ("export", "output"): "exported/gpt_{number}.pth",
    ("synthesize", "output"): "listen/{number}.wav",
    ("evaluate", "output_dir"): "evaluation",
    ("evaluate", "recogniser"): "evaluation/recogniser.pt",
}


def candidates(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Where each kind of file may be, the best place first: what finished jobs wrote, then the usual places. Pure."""
    outputs: dict[str, list[str]] = {kind: [] for kind in PROGRAMS}
    for job in jobs:
        if job.output_dir and (job.state == "finished" or job.kind == "training"):
            outputs.setdefault(job.kind, []).append(str(job.output_dir))
    spoken = [*outputs["speak"], RECORDINGS]
    paired = [*outputs["pairs"], "processed_data"]
    trained = [*outputs["training"], "training_output"]
    return {
        "dataset": [f"{folder}/recordings.jsonl" for folder in spoken],
        "texts": [f"{folder}/texts.jsonl" for folder in [*outputs["corpus"], "corpus"]],
        "tokenizer": [*outputs["tokenizer"], "tokenizers/amharic_extended_bpe.model"],
        "codec": [*outputs["codec"], "processed_data/speech_codec.pt"],
        "features": [f"{folder}/utterances.jsonl" for folder in outputs["preprocess"]],
        "train_manifest": [f"{folder}/train_pairs.jsonl" for folder in paired],
        "val_manifest": [f"{folder}/val_pairs.jsonl" for folder in paired],
        "checkpoint": [f"{folder}/{name}" for folder in trained for name in ("best.pth", "latest.pth")],
        "sound": outputs["synthesize"],
    }


def first_there(workspace: Workspace, paths: Iterable[str]) -> Path | None:
    for path in paths:
        try:
            return workspace.inside(path, must_exist=True)
        except Refused:
            continue
    return None


def files_made(workspace: Workspace, jobs: Sequence[Job]) -> dict[str, str]:
    """The files that the steps have made so far, as a user would type their paths."""
    found = {name: first_there(workspace, paths) for name, paths in candidates(jobs).items()}
    folders = [job.output_dir / "wavs" for job in jobs if job.kind == "speak" and job.output_dir]
    found["recording"] = next(itertools.chain.from_iterable(
        recordings_in(folder) for folder in [workspace.root / RECORDINGS, *folders,
                                             workspace.root / "processed_data" / "audio"]), None)
    for folder, file in (("features", "features"), ("pairs", "train_manifest"), ("run", "checkpoint")):
        path = found[file]
        found[folder] = path.parent if path else None
    return {name: workspace.show(path) for name, path in found.items() if path}


def recordings_in(folder: Path) -> Iterator[Path]:
    """Sound files of a folder, by name; none for one that is not there."""
    return (folder / name for name in files_in(folder, AUDIO))


def find_runs(workspace: Workspace, jobs: Sequence[Job]) -> list[Path]:
    """Output directories of training runs, newest first: those of jobs, and those at most two levels deep."""
    found = {job.output_dir for job in jobs if job.kind == "training" and job.output_dir}
    level = [workspace.root]
    for _ in range(2):
        level = [Path(entry.path) for folder in level for entry in folders_in(folder)]
        found.update(level)
    changed = {folder: max(marks) for folder in found if (marks := marks_of_run(folder))}
    return sorted(changed, key=lambda folder: (-changed[folder], folder))


def folders_in(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name[0] != "." and is_text_name(entry.name)
                    and entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def marks_of_run(folder: Path) -> list[float]:
    """When the checkpoints and logs of a run appeared; [] for another kind of folder."""
    paths = [*all_checkpoints(folder), *folder.glob("logs/run_*")]
    return [status_of(path).st_mtime for path in paths]


def status_of(path: Path) -> os.stat_result:
    """All zero for a file that is gone this moment: a running trainer removes its older checkpoints."""
    try:
        return path.stat()
    except OSError:
        return os.stat_result([0] * 10)


def suggestions(kind: str, workspace: Workspace, made: dict[str, str]) -> Form:
    """Values for fields that are empty."""
    form: Form = {name: made[file] for (program, name), files in HANDED_ON.items() if program == kind
                  for file in reversed(files) if file in made}
    for (program, name), path in NEW_FILES.items():
        if program == kind:
            numbered = (path.format(number=f"{number:03}") for number in itertools.count(1))
            form[name] = next(new for new in numbered if new == path or not (workspace.root / new).exists())
    return form


def states(made: dict[str, str], jobs: Sequence[Job]) -> dict[str, str]:
    """Of every step: "running", "done" or "open". Pure."""
    running = {STEP_OF.get(job.kind) for job in jobs if job.live}
    return {step: "running" if step in running else "done" if MADE_BY[step] in made else "open" for step in STEPS}


def next_step(steps: dict[str, str]) -> str:
    """The step after the furthest one that is done; "" after the last. Pure."""
    done = [index for index, step in enumerate(STEPS) if steps[step] == "done"]
    return ([*STEPS, ""][done[-1] + 1]) if done else STEPS[0]


def form_of(kind: str, argv: Sequence[str], workspace: Workspace) -> Form:
    """The form that made a job's command line: commands.command() backwards, paths as a user would type them."""
    program = PROGRAMS[kind]
    fields = {field.flag: field for field in program.fields}
    form: Form = {}
    if tuple(argv[1:1 + len(program.argv)]) != program.argv:  # not made here
        return form
    field = fields.get("")  # an argument without a flag
    form |= {field.name: ""} if field else {}
    for argument in argv[1 + len(program.argv):]:
        flag, equals, value = argument.partition("=")
        if flag in fields and (equals or argument in fields):
            field = fields[flag]
            earlier = [*form[field.name].splitlines()] if field.type == "manifests" and field.name in form else []
            form[field.name] = True if field.type == "switch" else value
        elif field is None:
            continue
        elif field.type == "manifests":
            form[field.name] = "\n".join([*earlier, workspace.show(argument)])
        else:
            form[field.name] = " ".join([*form[field.name].split(), workspace.show(argument)])
    if kind == "training":
        if "amp" in form:
            form["amp"] = form["amp"] or "auto"
        form["resume"] = "resume_path" in form
        form["resume_path"] = form.get("resume_path", "").removeprefix("auto")
    return form
