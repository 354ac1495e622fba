"""The weights of a training checkpoint, without its optimizer state.

  a voice   CKPT --model-dir checkpoints --output-dir voice: a folder that IndexTTS2's own inference, its packages and
            vLLM load as it is. gpt.pth (tensors by name, as the released one), the model folder's config.yaml with
            our number of text tokens, our tokenizer as bpe.model (of IndexTTS-2.5 its own .tiktoken file), the
            licence's notice, and links to the rest of the model folder. It is loaded strictly before it gets its name;
            whole or not at all.
  a file    CKPT --output gpt_amharic.pth: {"model": tensors, "made_with": values}, for --base-checkpoint

Tensors have IndexTTS2's names and order, float32 unless --dtype says otherwise, and load with weights_only=True. What
the training data was made with (tools/made_with.py) is kept: in the file, or in the folder's config.yaml under
dataset:, since vLLM takes every entry of gpt.pth for a tensor. A run that started from IndexTTS2's gpt.pth carries its
conditioning modules along; without them (trained from scratch) IndexTTS2 cannot use the weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tools._common import (
    Progress,
    ToolError,
    atomic_path,
    info,
    is_running,
    make_parser,
    run_program,
    sha256_of,
    sync,
    writing_to,
)
from tools.generation import add_base_argument, trained_checkpoint, weights_of
from tools.indextts2_features import NAMES, conditioning_digest, made, read_tensors, require_indextts2, section_of
from tools.indextts2_modules import VoiceModules
from tools.made_with import (
    INDEXTTS2,
    INDEXTTS2_CODES,
    INDEXTTS25,
    MadeWith,
    of_checkpoint,
    of_older_keys,
    read_yaml,
    require_same,
)
from tools.model_folder import (
    FOR_SOUND,
    FOR_SOUND_25,
    TIKTOKEN,
    download_lines,
    files_in,
    find_parts,
    is_whole,
    parts_of,
    place_in,
)
from tools.preprocess import languages_of
from tools.run_files import is_checkpoint_name
from tools.text_rules import record_path
from tools.text_tokens import load_tokens
from trainers.train_gpt_v2 import (
    CARRIED_PREFIXES,
    ModelConfig,
    UnifiedVoiceGPT,
    UserError,
    in_name_order,
    model_config_from,
)

FIRST_COMMAND = ("python -m tools.export_checkpoint training_output/best.pth --model-dir checkpoints "
                 "--output-dir voice")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WRITTEN = {"gpt": "gpt.pth", "config": "config.yaml", "bpe": "bpe.model", "tiktoken": TIKTOKEN}
SCRATCH = "the run started from scratch, so IndexTTS2 cannot use"
README = """# A fine-tuned {model}

Made from step {step} of a training of {name}. `gpt.pth` and `{tokenizer}` belong together, and `config.yaml` to them.

This is a derivative work of the {model} weights by bilibili. It is used, and may be passed on, only under the
bilibili Model Use License Agreement; keep a copy of it beside these files
(https://github.com/index-tts/index-tts, files LICENSE and LICENSE_ZH.txt). The agreement demands this notice:

> Any modifications made to the original model in this Derivative Work are not endorsed, warranted, or guaranteed by the
> original right-holder of the original model, and the original right-holder disclaims all liability related to this
> Derivative Work.

{front_end} Hand it texts as `tools.synthesize` writes them, or speak with
`python -m tools.synthesize --checkpoint CHECKPOINT --model-dir FOLDER`.
"""
FRONT_END = {
    INDEXTTS2: "IndexTTS2's own front end takes Amharic for Chinese.",
    INDEXTTS25: "The language of Amharic is `am`. IndexTTS-2.5's own front end reads none of its numerals, dates and "
                "abbreviations,\nand its own inference places codes one position too late (the package "
                "indextts25-inference mends that).",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("checkpoint", type=Path, help="a training checkpoint, such as training_output/best.pth")
    parser.add_argument("--model-dir", type=Path, help="the released folder that the training started from")
    parser.add_argument("--output-dir", type=Path, help="the folder to write, such as voice; with --model-dir")
    parser.add_argument("--output", type=Path, help="the file to write instead, such as gpt_amharic.pth")
    parser.add_argument("--tokenizer", type=Path, help="the checkpoint's, if it was moved; with --model-dir")
    add_base_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")
    parser.add_argument("--copy", action="store_true", help="copy the rest of the model folder instead of linking it")
    args = parser.parse_args(argv)
    problem = flag_problem(args)
    if problem:
        raise ToolError(problem)
    checkpoint = trained_checkpoint(args.checkpoint)
    record = of_checkpoint(checkpoint)
    require_same(f"{args.checkpoint} itself", record, "the manifests and tokenizer that it names",
                 of_older_keys(checkpoint), remedy="Take another checkpoint: this one was put together from two")
    (export_file if args.output else export_folder)(args, checkpoint, record)


def flag_problem(args: argparse.Namespace) -> str:
    """What is wrong with the choice of flags, or an empty string."""
    if args.output is None:
        if args.model_dir is None or args.output_dir is None:
            return "give --model-dir and --output-dir for a folder, or --output for a file"
        return ""
    of_folder = [flag for flag, given in (("--model-dir", args.model_dir), ("--output-dir", args.output_dir),
                                          ("--tokenizer", args.tokenizer), ("--copy", args.copy)) if given]
    if of_folder:
        return f"{of_folder[0]} cannot be combined with --output: one writes a folder, the other a file"
    if is_checkpoint_name(args.output.name):
        return (f"--output {args.output}: a training writes files of this name, and could not go on from an export. "
                "Choose another name, such as gpt_amharic.pth")
    return ""


def save(content: Any, path: Path) -> None:
    """Raises: ToolError."""
    try:
        with path.open("wb") as handle:
            torch.save(content, handle)
    except RuntimeError as error:  # PyTorch's own for a full disk
        raise ToolError(f"{path}: could not be written ({error}). Free some disk space") from error


def tensors_of(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All of IndexTTS2's tensors, in its order. Raises: ToolError where the dtype cannot hold one's values."""
    tensors = {name: tensor.to(dtype) for name, tensor in in_name_order(weights).items()}
    beyond = [name for name, tensor in tensors.items() if dtype == torch.float16 and not tensor.isfinite().all()]
    if beyond:
        raise ToolError(f"--dtype fp16: {beyond[0]} has values that it cannot hold. Take bf16 or fp32")
    return tensors


def export_file(args: argparse.Namespace, checkpoint: dict[str, Any], record: MadeWith) -> None:
    """Raises: ToolError."""
    if args.output.exists() and args.output.samefile(args.checkpoint):
        raise ToolError(f"--output {args.output}: that is the checkpoint itself. Choose another name")
    tensors = tensors_of(weights_of(checkpoint, args.base_checkpoint), DTYPES[args.dtype])
    with writing_to(args.output), atomic_path(args.output, durable=True) as temporary:
        save({"model": tensors, "made_with": record}, temporary)
    info(f"{args.output}: step {checkpoint['step']}, {len(tensors)} tensors, {args.output.stat().st_size / 1e6:.1f} MB")
    if not any(name.startswith(CARRIED_PREFIXES) for name in tensors):
        info(f"No conditioning modules in it: {SCRATCH} this file")


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def export_folder(args: argparse.Namespace, checkpoint: dict[str, Any], record: MadeWith) -> None:
    """Raises: ToolError with what of checkpoint, tokenizer and model folder does not belong together."""
    model = model_config_from(checkpoint["model_config"], str(args.checkpoint))
    kind = INDEXTTS25 if model.languages else INDEXTTS2
    require_indextts2(args.model_dir, kind, f"Give the folder of {NAMES[kind]} that the training started from")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise ToolError(f"--output-dir {args.output_dir}: is there already. Choose another name, or remove it")
    info(f"{args.checkpoint}: step {checkpoint['step']}; does it fit tokenizer and model folder?")
    weights = weights_of(checkpoint, args.base_checkpoint)
    require_indextts2_run(args.checkpoint, model, weights, record)
    tokenizer = own_tokenizer(args, checkpoint, record)
    tokenizer_name = WRITTEN["tiktoken" if kind == INDEXTTS25 else "bpe"]
    source = args.model_dir / "config.yaml"
    config = exported_config(read_yaml(source), model.number_text_tokens, record)
    require_same_sizes(args, config, model)
    require_same_codec(args, kind, record)
    check_conditioning(args.checkpoint, weights, record)
    tensors = tensors_of(weights, DTYPES[args.dtype])
    check_names_and_shapes(config, {name: list(t.shape) for name, t in tensors.items()}, str(args.checkpoint), source)
    with writing_to(args.output_dir), new_folder(args.output_dir) as folder:
        info(f"writing {sum(t.nbytes for t in tensors.values()) / 1e6:.1f} MB of weights")
        save(tensors, folder / WRITTEN["gpt"])
        sync(folder / WRITTEN["gpt"])
        (folder / WRITTEN["config"]).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        (folder / "README.md").write_text(README.format(
            model=NAMES[kind], step=checkpoint["step"], name=args.checkpoint.name, tokenizer=tokenizer_name,
            front_end=FRONT_END[kind]))
        shutil.copyfile(tokenizer, folder / tokenizer_name)
        if record_path(tokenizer).is_file():
            shutil.copyfile(record_path(tokenizer), record_path(folder / tokenizer_name))
        add_rest(args.model_dir, folder, args.copy)
        check_folder(folder, tokenizer_name)
    size = (args.output_dir / WRITTEN["gpt"]).stat().st_size / 1e6
    info(f"{args.output_dir}: step {checkpoint['step']}, gpt.pth with {len(tensors)} tensors of {args.dtype}, "
         f"{size:.1f} MB. A derivative work of {NAMES[kind]}'s weights: README.md there says what its licence asks for")
    parts = parts_of(config)
    missing = [name for name in (FOR_SOUND_25 if kind == INDEXTTS25 else (*FOR_SOUND, "qwen")) if not all(
        path.is_file() and is_whole(path)
        for path in files_in(parts[name], args.output_dir / place_in(parts[name], config)))]
    if missing:
        info("missing in it or not whole, as in --model-dir: " + ", ".join(parts[name].place for name in missing)
             + ". IndexTTS2 fetches models of other makers itself; all come with "
             + " and ".join(f"`{line}`" for line in download_lines(missing, args.output_dir)))


def require_indextts2_run(path: Path, model: ModelConfig, weights: Mapping[str, Tensor], record: MadeWith) -> None:
    """Raises: ToolError for a run on other codes, or one without conditioning modules."""
    kind = INDEXTTS25 if model.languages else INDEXTTS2
    features = record.get("features", kind)  # a fork's data records nothing
    codes = record.get("num_codes", model.code_count)
    if features != kind or codes != INDEXTTS2_CODES:
        raise ToolError(f"{path}: was trained on other codes ({features} features, {codes} codes), which "
                        f"{NAMES[kind]}'s sound does not know. Speak with it by tools.synthesize --codec, or train on "
                        f"data of preprocess --features {kind}")
    needed = [prefix for prefix in CARRIED_PREFIXES if not model.languages or prefix.startswith("emo")]
    missing = [prefix for prefix in needed if not any(name.startswith(prefix) for name in weights)]
    if missing:
        raise ToolError(f"{path}: has no conditioning modules ({missing[0]}*): {SCRATCH} it. Train with "
                        f"--base-checkpoint {WRITTEN['gpt']} of the model folder")


def own_tokenizer(args: argparse.Namespace, checkpoint: Mapping[str, Any], record: MadeWith) -> Path:
    """The run's tokenizer; of IndexTTS-2.5 it is the model folder's. Raises: ToolError where it is gone or another
    one."""
    is_25 = "tiktoken" in parts_of(read_yaml(args.model_dir / "config.yaml"))
    path = args.tokenizer or (find_parts(args.model_dir, ["tiktoken"])["tiktoken"] if is_25 else
                              Path(checkpoint["tokenizer"]["path"]))
    size, remedy = load_tokens(path).size, "Give the tokenizer of the run as --tokenizer"
    require_same(str(args.checkpoint), record, f"--tokenizer {path}", {"tokenizer_sha256": sha256_of(path)},
                 remedy=remedy)
    if size != checkpoint["model_config"]["number_text_tokens"]:
        raise ToolError(f"--tokenizer {path}: has {size} pieces, {args.checkpoint} "
                        f"{checkpoint['model_config']['number_text_tokens']}. {remedy}")
    return path


def exported_config(config: Mapping[str, Any], tokens: int, record: MadeWith) -> dict[str, Any]:
    """The model folder's, with our number of text tokens, the names of what is written, and the record. Pure."""
    dataset = config.get("dataset")
    bpe = {"bpe_model": WRITTEN["bpe"]} if "bpe" in parts_of(config) else {}
    return {**config, "gpt": {**config["gpt"], "number_text_tokens": tokens}, "gpt_checkpoint": WRITTEN["gpt"],
            "dataset": {**(dataset if isinstance(dataset, dict) else {}), **bpe, **record}}


def sizes_of(config: Mapping[str, Any], source: Path) -> ModelConfig:
    """Of the GPT of a model folder's config.yaml. Raises: ToolError."""
    try:
        return model_config_from({**languages_of(dict(config)), **config["gpt"]}, str(source))
    except UserError as error:
        raise ToolError(str(error)) from error


def require_same_sizes(args: argparse.Namespace, config: Mapping[str, Any], trained: ModelConfig) -> None:
    """Of the GPT; heads, for one, show in no tensor's shape. Raises: ToolError."""
    path = args.model_dir / "config.yaml"
    released = sizes_of(config, path)
    differing = [f"gpt.{name} is {value} in {path}, but {getattr(trained, name)} in {args.checkpoint}"
                 for name, value in vars(released).items() if value != getattr(trained, name)]
    if differing:
        raise ToolError(f"{'; '.join(differing)}. Give the model folder that the training started from")


def require_same_codec(args: argparse.Namespace, kind: str, record: MadeWith) -> None:
    """Of the codec, where the model folder has one: it goes into the exported folder. Raises: ToolError."""
    part = "codec" if kind == INDEXTTS25 else "semantic_codec"
    try:
        codec = find_parts(args.model_dir, [part])[part]
    except ToolError:
        return
    require_same(str(args.checkpoint), record, str(codec), {"codec_sha256": sha256_of(codec)}, ("codec_sha256",),
                 "Give the model folder that the training started from")


def check_conditioning(path: Path, tensors: Mapping[str, Tensor], record: MadeWith) -> None:
    """Raises: ToolError where the modules are not those that made the training data's conditions."""
    if "conditioning_sha256" in record:
        require_same(f"the data that {path} was trained on", record, "its own conditioning modules",
                     {"conditioning_sha256": conditioning_digest(tensors)}, ("conditioning_sha256",),
                     "Take another checkpoint: this one was put together from two")


def check_names_and_shapes(config: Mapping[str, Any], found: Mapping[str, list[int]], place: str, source: Path) -> None:
    """What a strict load asks for. Raises: ToolError."""
    gpt, channels = config["gpt"], section_of(config, "semantic_codec", source)["hidden_size"]
    emo_width = found.get("emo_perceiver_encoder.latents", [1, 1024])[-1]
    model_config = sizes_of(config, source)
    modules = (made(lambda: VoiceModules(gpt, channels, emo_width, not model_config.languages), source),
               made(lambda: UnifiedVoiceGPT(model_config), source))
    shapes = {name: list(t.shape) for module in modules for name, t in module.state_dict().items()}
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in shapes]
    problems += [f"{name} is {found[name]}, not {shape}" for name, shape in shapes.items()
                 if name in found and found[name] != shape]
    if problems:
        raise ToolError(f"{place}: not the GPT that {source} describes: {'; '.join(problems[:3])}"
                        f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}. Give the model folder that "
                        "the training started from")


def check_folder(folder: Path, tokenizer: str) -> None:
    """Reads back what was written, as IndexTTS2 would. Raises: ToolError."""
    config = read_yaml(folder / WRITTEN["config"])
    tensors = read_tensors(folder / WRITTEN["gpt"])
    check_names_and_shapes(config, {name: list(t.shape) for name, t in tensors.items()},
                           str(folder / WRITTEN["gpt"]), folder / WRITTEN["config"])
    size = load_tokens(folder / tokenizer).size
    if size != config["gpt"]["number_text_tokens"]:
        raise ToolError(f"{folder / tokenizer}: has {size} pieces, config.yaml another number. Export again")


def rest_of(model_dir: Path) -> list[Path]:
    """Files of a model folder, from it, that an exported one needs too: all that lie in it, and its models in folders.

    Not what an export writes anew, not hidden files, not a training's checkpoints.
    """
    config = read_yaml(model_dir / "config.yaml")
    parts = parts_of(config)
    replaced = {*WRITTEN.values(), "README.md", *(Path(place_in(parts[name], config)).name for name in WRITTEN
                                                  if name in parts)}
    found = [path for path in sorted(model_dir.iterdir()) if path.is_file() and not path.name.startswith(".")
             and path.name not in replaced and not is_checkpoint_name(path.name)]
    folders = {"hf_cache", *(Path(place_in(part, config)).parts[0] for part in parts.values() if len(part.files) > 1)}
    for name in sorted(folders):
        found += [path for path in sorted((model_dir / name).rglob("*")) if path.is_file()]
    return [path.relative_to(model_dir) for path in found]


def add_rest(model_dir: Path, folder: Path, copy: bool) -> None:
    """Links of the rest of the model folder, hard ones where the file system has them, or copies."""
    names = rest_of(model_dir)
    progress = Progress("copying" if copy else "linking", len(names))
    for done, name in enumerate(names, 1):
        source, target = (model_dir / name).resolve(), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(source, target)
        else:
            link(source, target)
        progress.update(done)


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        target.symlink_to(source)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path`, which gets its name only on success."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        number = leftover.name.split(".")[-2]
        if number.isdigit() and not is_running(int(number)):  # a killed export's
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    run_program(main)
