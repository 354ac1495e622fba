"""The way from recordings to a voice: how far the workspace has come, and what one step hands to the next."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tools.run_files import all_checkpoints
from webui.command_lines import LINES, PROGRAMS, Form, Problem, typed
from webui.jobs import Job
from webui.readers import files_in
from webui.workspace import Refused, Workspace, is_text_name

STEPS = ("recordings", "dataset", "corpus", "tokenizer", "preprocess", "training", "checkpoints", "listen")
STEP_OF = {"import": "recordings", "speak": "recordings", "filter": "dataset", "collect": "corpus",
           "corpus": "corpus", "tokenizer": "tokenizer", "codec": "preprocess", "preprocess": "preprocess",
           "pairs": "preprocess", "training": "training", "export": "checkpoints", "synthesize": "listen",
           "watch": "listen", "evaluate": "listen"}
PROMPTS = (".wav", ".flac", ".ogg", ".mp3")  # sounds that a voice is taken from
RECORDINGS = "recordings"  # where uploads go
LOOKED_AT = 100  # rows of a data set, for a recording that may be a prompt

# What makes a step done: one of these files (names below) is there.
MADE_BY = {"recordings": "recordings", "dataset": "judged", "corpus": "texts", "tokenizer": "tokenizer",
           "preprocess": "train_manifest", "training": "checkpoint", "checkpoints": "checkpoint", "listen": "sound"}
# An empty field is filled with the first of these files that is there.
HANDED_ON = {
    ("import", "source"): ("uploads",),
    ("speak", "texts"): ("demo_texts",),
    ("filter", "recordings"): ("recordings",),
    ("collect", "recordings"): ("dataset",),
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
DATASETS = ("import", "filter", "speak")  # write one; the newest is gone on with
NEW_FILES = {
    ("import", "output_dir"): "my_recordings",
    ("speak", "output_dir"): "synthetic_recordings",
    ("collect", "output"): "texts/own_{number}.jsonl",
    ("corpus", "output_dir"): "corpus",
    ("tokenizer", "output"): "tokenizers/my_tokenizer_{number}.model",
    ("codec", "output"): "my_data/speech_codec.pt",
    ("preprocess", "output_dir"): "my_data",
    ("training", "output_dir"): "training_output",
    ("export", "output"): "exported/gpt_{number}.pth",
    ("synthesize", "output"): "listen/{number}.wav",
    ("evaluate", "output_dir"): "evaluation",
    ("evaluate", "recogniser"): "evaluation/recogniser.pt",
}
# A whole voice, and two checkpoints.
STEP_OF |= {"export_folder": "checkpoints", "compare": "listen"}
HANDED_ON |= {
    ("export_folder", "checkpoint"): ("checkpoint",),
    ("compare", "checkpoint"): ("checkpoint",),
    ("compare", "prompt"): ("recording",),
    ("compare", "codec"): ("codec",),
}
NEW_FILES |= {
    ("export_folder", "output_dir"): "exported/voice_{number}",
    ("compare", "output_dir"): "listen/ab_{number}",
}


def candidates(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Where each kind of file may be, the best place first: what finished jobs wrote, then the usual places. Pure."""
    made = [(job.kind, str(job.output_dir)) for job in jobs
            if job.output_dir and (job.state == "finished" or job.kind == "training")]

    def outputs(*kinds: str) -> list[str]:
        return [output for kind, output in made if kind in kinds]

    datasets = {kind: [dataset_of(kind, output) for kind, output in made if kind in kinds] for kind, kinds in (
        ("recordings", ("import", "speak")), ("judged", ("filter", "speak")), ("dataset", DATASETS))}
    paired = [*outputs("pairs"), "processed_data"]
    trained = [*outputs("training"), "training_output"]
    return {
        **{kind: [*paths, f"{RECORDINGS}/recordings.jsonl"] for kind, paths in datasets.items()},
        "texts": [*(output if kind == "collect" else f"{output}/texts.jsonl" for kind, output in made
                    if kind in ("collect", "corpus")), "corpus/texts.jsonl"],
        "demo_texts": [f"{folder}/texts.jsonl" for folder in [*outputs("corpus"), "corpus"]],
        "tokenizer": [*outputs("tokenizer"), "tokenizers/amharic_extended_bpe.model"],
        "codec": [*outputs("codec"), "processed_data/speech_codec.pt"],
        "features": [f"{folder}/utterances.jsonl" for folder in outputs("preprocess")],
        "train_manifest": [f"{folder}/train_pairs.jsonl" for folder in paired],
        "val_manifest": [f"{folder}/val_pairs.jsonl" for folder in paired],
        "checkpoint": [f"{folder}/{name}" for folder in trained for name in ("best.pth", "latest.pth")],
        "sound": outputs("synthesize"),
    }


def dataset_of(kind: str, output: str) -> str:
    """The recordings.jsonl that a job wrote, or what it left of one."""
    return str(Path(output).with_name("filtered.jsonl")) if kind == "filter" else f"{output}/recordings.jsonl"


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
    others = itertools.chain.from_iterable(
        recordings_in(folder) for folder in [workspace.root / RECORDINGS, *folders,
                                             workspace.root / "processed_data" / "audio"])
    found["recording"] = first_of_dataset(workspace, found["dataset"]) or next(others, None)
    for folder, file in (("features", "features"), ("pairs", "train_manifest"), ("run", "checkpoint")):
        path = found[file]
        found[folder] = path.parent if path else None
    uploads = workspace.root / RECORDINGS
    found["uploads"] = uploads if holds_files(uploads) else None
    return {name: workspace.show(path) for name, path in found.items() if path}


def first_of_dataset(workspace: Workspace, dataset: Path | None) -> Path | None:
    """A recording of the first rows: a clip of one speaker, where an upload may be a lecture of an hour."""
    rows: list[bytes] = []
    if dataset is None:
        return None
    with contextlib.suppress(OSError), dataset.open("rb") as lines:
        rows = list(itertools.islice(lines, LOOKED_AT))
    for row in rows:
        with contextlib.suppress(ValueError, TypeError, KeyError, Refused):
            path = dataset.parent / json.loads(row)["audio"]
            if path.suffix.lower() in PROMPTS:
                workspace.inside(str(path), must_exist=True)
                return path
    return None


def holds_files(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name[0] != "." for entry in entries)
    except OSError:
        return False


def recordings_in(folder: Path) -> Iterator[Path]:
    """Sound files of a folder, by name; none for one that is not there."""
    return (folder / name for name in files_in(folder, PROMPTS))


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


def in_the_way(kind: str, form: Form, workspace: Workspace, jobs: Callable[[], Sequence[Job]]) -> dict[str, Problem]:
    """What is there already, of another source, and would be replaced. Raises: Refused for a path that is none."""
    if kind != "import":
        return {}
    folder = workspace.inside(typed(form["output_dir"]))
    if not (folder / "recordings.jsonl").exists():
        return {}
    earlier = next((job for job in jobs() if job.kind == kind and job.output_dir == folder), None)
    if earlier and str(workspace.inside(typed(form["source"]))) in earlier.argv:
        return {}  # the same again: only what is new is worked on, and typed texts are kept
    free = next(name for number in itertools.count(2) if not (name := folder.with_name(f"{folder.name}_{number}")
                                                              ).exists())
    return {"output_dir": ("holds_recordings", {"path": workspace.show(folder), "free": workspace.show(free)})}


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
            earlier = [*form[field.name].splitlines()] if field.type in LINES and field.name in form else []
            form[field.name] = True if field.type == "switch" else "\n".join([*earlier, value]) if equals else value
        elif field is None:
            continue
        elif field.type in LINES:
            form[field.name] = "\n".join([*earlier, workspace.show(argument)])
        elif field.type == "program":
            form[field.name] = workspace.show(" ".join(shlex.split(argument)))
        else:
            form[field.name] = " ".join([*form[field.name].split(), workspace.show(argument)])
    if kind == "training":
        if "amp" in form:
            form["amp"] = form["amp"] or "auto"
        form["resume"] = "resume_path" in form
        form["resume_path"] = form.get("resume_path", "").removeprefix("auto")
    return form
