"""The way from recordings to a voice: how far the workspace has come, and what one step hands to the next."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tools.model_folder import TIKTOKEN
from tools.run_files import all_checkpoints, split_manifest
from webui.command_lines import LINES, PROGRAMS, Form, Problem, command_for, typed
from webui.jobs import Job
from webui.readers import files_in
from webui.workspace import Refused, Workspace, is_text_name, read_json, write_json

STEPS = ("recordings", "dataset", "prepare", "training", "checkpoints", "listen")
STEP_OF = {"import": "recordings", "speak": "recordings", "filter": "dataset", "check": "dataset",
           **dict.fromkeys(("prepare", "collect", "corpus", "tokenizer", "codec", "preprocess", "pairs"), "prepare"),
           "training": "training", "export": "checkpoints", "synthesize": "listen",
           "watch": "listen", "evaluate": "listen"}
PROMPTS = (".wav", ".flac", ".ogg", ".mp3")  # sounds that a voice is taken from
RECORDINGS = "recordings"  # where uploads go
HAVE = ("texts", "alone", "demo", "fork")  # what somebody begins with: recordings with texts, recordings alone ...
MODELS = ("indextts2.5", "indextts2", "scratch")
LOOKED_AT = 100  # rows of a data set, for a recording that may be a prompt

# What makes a step done: one of these files (names below) is there.
MADE_BY = {"recordings": "recordings", "dataset": "judged", "prepare": "train_manifest",
           "training": "checkpoint", "checkpoints": "checkpoint", "listen": "sound"}
# What comes with the project. It fills a field only once somebody has chosen the demo.
DEMO = {"tokenizer": "tokenizers/amharic_extended_bpe.model", "codec": "processed_data/speech_codec.pt",
        "train_manifest": "processed_data/train_pairs.jsonl", "val_manifest": "processed_data/val_pairs.jsonl"}
# An empty field is filled with the first of these files that is there.
HANDED_ON = {
    ("import", "source"): ("uploads",),
    ("speak", "texts"): ("demo_texts",),
    ("filter", "recordings"): ("recordings",),
    ("check", "recordings"): ("dataset",),
    ("check", "tokenizer"): ("tokenizer",),
    ("check", "codec"): ("codec",),
    ("prepare", "recordings"): ("dataset",),
    ("collect", "recordings"): ("dataset",),
    ("tokenizer", "texts"): ("texts", "dataset", "demo_texts"),
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
OWN, SYNTHETIC = ("import", "filter"), ("speak",)  # write a dataset; the newest own one is gone on with, if any
WEIGHTS = "checkpoints"  # where released weights are downloaded to
# What goes with the model that was chosen at the first question.
FOR_MODEL: dict[tuple[str, str], Form] = {
    ("indextts2", "tokenizer"): {"extend": f"{WEIGHTS}/bpe.model"},
    **{("indextts2", kind): {"features": "indextts2", "model_dir": WEIGHTS} for kind in ("prepare", "preprocess")},
    ("indextts2.5", "prepare"): {"features": "indextts2.5", "model_dir": WEIGHTS},
    ("indextts2", "training"): {"base_checkpoint": f"{WEIGHTS}/gpt.pth"},
    ("indextts2.5", "preprocess"): {"features": "indextts2.5", "model_dir": WEIGHTS,
                                    "tokenizer": f"{WEIGHTS}/{TIKTOKEN}"},
    ("indextts2.5", "training"): {"base_checkpoint": f"{WEIGHTS}/gpt.pth", "tokenizer": f"{WEIGHTS}/{TIKTOKEN}"},
    **{("indextts2", kind): {"model_dir": WEIGHTS} for kind in ("synthesize", "watch", "evaluate")},
}
NEW_FILES = {
    ("import", "output_dir"): "my_recordings",
    ("speak", "output_dir"): "synthetic_recordings",
    ("collect", "output"): "texts/own_{number}.jsonl",
    ("corpus", "output_dir"): "corpus",
    ("tokenizer", "output"): "tokenizers/my_tokenizer_{number}.model",
    ("codec", "output"): "codecs/my_codec_{number}.pt",
    ("prepare", "output_dir"): "my_data",
    ("preprocess", "output_dir"): "my_features",
    ("training", "output_dir"): "training_output",
    ("export", "output"): "exported/gpt_{number}.pth",
    ("synthesize", "output"): "listen/{number}.wav",
    ("evaluate", "output_dir"): "evaluation/{number}",
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


def candidates(jobs: Sequence[Job], demo: bool = False) -> dict[str, list[str]]:
    """Where each kind of file may be, the best place first: what finished jobs wrote, then the usual places; a
    synthetic voice's after the own ones, the demo's last. Pure."""
    made = [(job.kind, str(job.output_dir)) for job in jobs
            if job.output_dir and (job.state == "finished" or job.kind == "training")]

    def outputs(*kinds: str) -> list[str]:
        return [output for kind, output in made if kind in kinds]

    def datasets(own: Sequence[str]) -> list[str]:
        aside = outputs(*SYNTHETIC)
        found = [dataset_of(kind, output) for kind, output in made if kind in (*own, *SYNTHETIC)]
        first = [path for path in found if str(Path(path).parent) not in aside]
        return [*first, f"{RECORDINGS}/recordings.jsonl", *(path for path in found if path not in first)]

    prepared = outputs("prepare")
    paired, trained = outputs("pairs", "prepare"), [*outputs("training"), "training_output"]
    corpora = [f"{folder}/texts.jsonl" for folder in [*outputs("corpus"), "corpus"]]
    found = {
        "recordings": datasets(["import"]), "judged": datasets(["filter"]), "dataset": datasets(OWN),
        "texts": outputs("collect"), "demo_texts": corpora,
        "tokenizer": [f"{output}/tokenizer.model" if output in prepared else output
                      for output in outputs("tokenizer", "prepare")],
        "codec": [f"{output}/speech_codec.pt" if output in prepared else output
                  for output in outputs("codec", "prepare")],
        "features": [f"{folder}/utterances.jsonl" for folder in outputs("preprocess", "prepare")],
        "train_manifest": [f"{folder}/train_pairs.jsonl" for folder in paired],
        "val_manifest": [f"{folder}/val_pairs.jsonl" for folder in paired],
        "checkpoint": [f"{folder}/{name}" for folder in trained for name in ("best.pth", "latest.pth")],
        "sound": outputs("synthesize"),
    }
    return {name: [*paths, *([DEMO[name]] if demo and name in DEMO else [])] for name, paths in found.items()}


def is_demo(workspace: Workspace, jobs: Sequence[Job]) -> bool:
    """Whether somebody has chosen the demo: at the first question, or by training on its data."""
    manifest = str(workspace.root / DEMO["train_manifest"])
    return load_way(workspace).get("have") == "demo" or any(
        job.kind == "training" and any(part.startswith(manifest) for part in job.argv) for job in jobs)


def load_way(workspace: Workspace) -> dict[str, str]:
    """The answers to the first questions: {"have": one of HAVE, "model": one of MODELS}; {} before that."""
    found = read_json(workspace.private / "way.json")
    allowed = {"have": HAVE, "model": MODELS}
    return {name: found[name] for name, values in allowed.items() if found.get(name) in values}


def save_way(workspace: Workspace, have: str, model: str) -> None:
    """Raises: OSError."""
    write_json(workspace.private / "way.json", {"have": have, "model": model})


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
    demo = is_demo(workspace, jobs)
    found = {name: first_there(workspace, paths) for name, paths in candidates(jobs, demo).items()}
    folders = [job.output_dir / "wavs" for job in jobs if job.kind == "speak" and job.output_dir]
    others = itertools.chain.from_iterable(
        recordings_in(folder) for folder in [workspace.root / RECORDINGS, *folders,
                                             *([workspace.root / "processed_data" / "audio"] if demo else [])])
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
    form |= FOR_MODEL.get((load_way(workspace).get("model", ""), kind), {})
    for (program, name), path in NEW_FILES.items():
        if program == kind:
            numbered = (path.format(number=f"{number:03}") for number in itertools.count(1))
            form[name] = next(new for new in numbered if new == path or not (workspace.root / new).exists())
    return form


# Of a form: the field that says where it writes, and what an earlier Start has left there; ".": the file itself.
# collect, tokenizer, codec and others write a file under a new name each time (Field.fresh).
LEFT_BY = {"import": ("output_dir", "recordings.jsonl"), "speak": ("output_dir", "recordings.jsonl"),
           "filter": ("recordings", "../filtered.jsonl"), "corpus": ("output_dir", "texts.jsonl"),
           "prepare": ("output_dir", "utterances.jsonl"), "preprocess": ("output_dir", "utterances.jsonl"),
           "pairs": ("data_dir", "train_pairs.jsonl"),
           "evaluate": ("output_dir", "")}
IN_PLACE = ("filter", "pairs")  # write beside what they read: no other name helps


def in_the_way(kind: str, form: Form, workspace: Workspace, jobs: Callable[[], Sequence[Job]]) -> dict[str, Problem]:
    """What an earlier Start has made and this one would replace. Raises: Refused for a path that is none."""
    if kind not in LEFT_BY or form.get("replace"):
        return {}
    field, left = LEFT_BY[kind]
    place = workspace.inside(typed(form[field]))
    made = place.parent / left[3:] if left.startswith("../") else place / left if left else place
    if not holds_files(made) if made.is_dir() else not made.exists():
        return {}
    history = jobs()
    earlier = next((job for job in history if job.kind == kind and job.output_dir == place), None)
    if earlier and does_the_same(earlier, kind, form, workspace):
        return {}
    free = next(name for number in itertools.count(2) if not (name := place.with_name(f"{place.name}_{number}")
                                                              ).exists())
    if kind == "import":
        return {field: ("holds_recordings", {"path": workspace.show(place), "free": workspace.show(free)})}
    users = ", ".join(dict.fromkeys(job.title for job in history if job is not earlier and uses(job, kind, made)))
    values = {"path": workspace.show(made), "users": users or "–"}
    if kind in IN_PLACE:
        return {field: ("would_replace_here", values)}
    return {field: ("would_replace", {**values, "free": workspace.show(free)})}


def does_the_same(job: Job, kind: str, form: Form, workspace: Workspace) -> bool:
    """Whether a new Start would only go on with a job, or make the same again: typed texts and finished parts are kept.
    An import is known by its source, the others by the whole command and by what they read being older."""
    if kind == "import":
        return str(workspace.inside(typed(form["source"]))) in job.argv
    if job.argv[1:] != command_for(kind, form, workspace)[1:]:
        return False
    read = typed(form.get("recordings")) or typed(form.get("texts"))
    return job.state != "finished" or not read or status_of(workspace.inside(read)).st_mtime <= job.created


def uses(job: Job, kind: str, made: Path) -> bool:
    """Whether a job has read what another of this kind made: a file, or what lies in its folder."""
    folder = made if kind == "filter" or made.is_dir() else made.parent
    return job.kind != kind and any(Path(split_manifest(part)[0]) == folder or folder in Path(
        split_manifest(part)[0]).parents for part in job.argv if part.startswith("/")) and job.output_dir != made


def states(made: dict[str, str], jobs: Sequence[Job]) -> dict[str, str]:
    """Of every step: "running", "done", "demo" (what it makes is the demo's, nobody made it here) or "open". Pure."""
    running = {STEP_OF.get(job.kind) for job in jobs if job.live}
    found = {}
    for step in STEPS:
        file = made.get(MADE_BY[step])
        state = "open" if file is None else "demo" if file in DEMO.values() else "done"
        found[step] = "running" if step in running else state
    return found


def next_step(steps: dict[str, str]) -> str:
    """The step after the furthest one that is done; "" after the last. Pure."""
    done = [index for index, step in enumerate(STEPS) if steps[step] in ("done", "demo")]
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
        negated = fields.get(f"--{argument[5:]}") if argument.startswith("--no-") else None
        if negated and negated.type == "yes_no":
            form[negated.name], field = "no", None
        elif flag in fields and (equals or argument in fields):
            field = fields[flag]
            earlier = [*form[field.name].splitlines()] if field.type in LINES and field.name in form else []
            alone = {"switch": True, "yes_no": "yes"}.get(field.type)
            form[field.name] = alone or ("\n".join([*earlier, value]) if equals else value)
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
