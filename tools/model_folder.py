"""A folder of released IndexTTS weights: what is in it, and where the models that belong to it are looked for.

IndexTTS2's own inference takes gpt.pth and its kin from the folder, and four models of other makers from the folder's
hf_cache/, whose layout was first that of the Hugging Face cache and is plain today. Both are searched, then the user's
own Hugging Face cache. No torch in here.
"""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools._common import ToolError
from tools.made_with import read_yaml

OWN, OWN_25 = "IndexTeam/IndexTTS-2", "IndexTeam/IndexTTS-2.5"
TIKTOKEN = "multilingual_zh_ja_yue_char_del.tiktoken"
LARGEST_HEADER = 100_000_000  # bytes of a safetensors header


@dataclass(frozen=True)
class Part:
    """One model. With several files it is a folder, else a file."""

    repository: str
    files: tuple[str, ...]
    """In the repository."""
    megabytes: float
    place: str
    """In the model folder, where IndexTTS2 keeps it."""
    config_key: str = ""
    """Of config.yaml, where it may name another place."""


PARTS = {
    "config": Part(OWN, ("config.yaml",), 0.01, "config.yaml"),
    "gpt": Part(OWN, ("gpt.pth",), 3480, "gpt.pth", "gpt_checkpoint"),
    "bpe": Part(OWN, ("bpe.model",), 0.5, "bpe.model", "dataset.bpe_model"),
    "w2v_bert_stats": Part(OWN, ("wav2vec2bert_stats.pt",), 0.01, "wav2vec2bert_stats.pt", "w2v_stat"),
    "s2mel": Part(OWN, ("s2mel.pth",), 1200, "s2mel.pth", "s2mel_checkpoint"),
    "feat1": Part(OWN, ("feat1.pt",), 0.1, "feat1.pt", "spk_matrix"),
    "feat2": Part(OWN, ("feat2.pt",), 0.4, "feat2.pt", "emo_matrix"),
    "qwen": Part(OWN, ("qwen0.6bemo4-merge/config.json", "qwen0.6bemo4-merge/model.safetensors"), 1190,
                 "qwen0.6bemo4-merge", "qwen_emo_path"),
    "w2v_bert": Part("facebook/w2v-bert-2.0", ("config.json", "preprocessor_config.json", "model.safetensors"), 2320,
                     "hf_cache/w2v-bert-2.0"),
    "semantic_codec": Part("amphion/MaskGCT", ("semantic_codec/model.safetensors",), 177,
                           "hf_cache/semantic_codec_model.safetensors"),
    "campplus": Part("funasr/campplus", ("campplus_cn_common.bin",), 28, "hf_cache/campplus_cn_common.bin"),
    "bigvgan": Part("nvidia/bigvgan_v2_22khz_80band_256x", ("config.json", "bigvgan_generator.pt"), 450,
                    "hf_cache/bigvgan"),
}
# Of a folder of IndexTTS-2.5.
PARTS_25 = {name: replace(part, repository=OWN_25) if part.repository == OWN else part for name, part in PARTS.items()
            if name not in ("bpe", "semantic_codec", "qwen")} | {
    "gpt": replace(PARTS["gpt"], repository=OWN_25, megabytes=3260),
    "codec": Part(OWN_25, ("codec.pth",), 607, "codec.pth"),
    "tiktoken": Part(OWN_25, (TIKTOKEN,), 0.9, TIKTOKEN),
}
FOR_FEATURES_25 = ("config", "gpt", "tiktoken", "w2v_bert_stats", "w2v_bert", "codec", "campplus")
FOR_FEATURES = ("config", "gpt", "bpe", "w2v_bert_stats", "w2v_bert", "semantic_codec")
FOR_SOUND = ("config", "gpt", "bpe", "w2v_bert_stats", "w2v_bert", "semantic_codec", "s2mel", "campplus", "bigvgan",
             "feat1", "feat2")
FOR_SOUND_25 = ("config", "gpt", "tiktoken", "w2v_bert_stats", "w2v_bert", "codec", "s2mel", "campplus", "bigvgan",
                "feat1", "feat2")


def recognised(model_dir: Path) -> str:
    """"indextts2" or "indextts2.5", by config.yaml. Raises: ToolError for any other folder."""
    whole = (f"`{own_download(model_dir)}` downloads IndexTTS-2, "
             f"`{own_download(model_dir, repository=OWN_25)}` IndexTTS-2.5")
    if not model_dir.is_dir():
        raise ToolError(f"--model-dir {model_dir}: no such folder. {whole}")
    path = model_dir / "config.yaml"
    if not path.is_file():
        raise ToolError(f"--model-dir {model_dir}: holds no config.yaml, so no released IndexTTS model. {whole}")
    config = read_yaml(path, whole)
    if str(config.get("version")).startswith("2.5"):
        return "indextts2.5"
    if "dvae_checkpoint" in config or "vqvae" in config or str(config.get("version")).startswith("1"):
        raise ToolError(f"--model-dir {model_dir}: IndexTTS 1 or 1.5, whose codes are others. {whole}")
    lacking = [name for name in ("semantic_codec", "s2mel") if not isinstance(config.get(name), dict)]
    gpt = config.get("gpt")
    lacking += [f"gpt.{name}" for name in ("condition_module", "emo_condition_module")
                if not isinstance(gpt, dict) or not isinstance(gpt.get(name), dict)]
    if lacking:
        raise ToolError(f"{path}: has no {', '.join(lacking)}, so it is not IndexTTS-2's. {whole}")
    return "indextts2"


def parts_of(config: Mapping[str, Any]) -> dict[str, Part]:
    return PARTS_25 if str(config.get("version")).startswith("2.5") else PARTS


def own_download(model_dir: Path, files: Sequence[str] = (), repository: str = OWN) -> str:
    return f"hf download {shlex.join([repository, *files, '--local-dir', str(model_dir)])}"


def download_lines(names: Sequence[str], model_dir: Path) -> list[str]:
    """The commands that bring parts to where find_parts, and IndexTTS2 itself, find them; one for each repository."""
    files: dict[str, list[str]] = {}
    parts = parts_of(read_yaml(model_dir / "config.yaml"))
    for name in names:
        files.setdefault(parts[name].repository, []).extend(parts[name].files)
    own = [own_download(model_dir, files.pop(name), name) for name in (OWN, OWN_25) if name in files]
    return own + [f"hf download {shlex.join([repository, *wanted, '--cache-dir', str(model_dir / 'hf_cache')])}"
                  for repository, wanted in files.items()]


def find_parts(model_dir: Path, names: Sequence[str]) -> dict[str, Path]:
    """Where each of these PARTS lies: a file, or a folder for a part of several files.

    Raises: ToolError that lists all that are missing or not whole, with repositories, sizes and download lines.
    """
    config = read_yaml(model_dir / "config.yaml")
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in names:
        part = parts_of(config)[name]
        fault = f"{model_dir / place_in(part, config)} is missing"
        for place in places_of(part, model_dir, config):
            files = files_in(part, place)
            absent = [path for path in files if not path.is_file()]
            if absent:
                fault = f"{absent[0]} is missing" if len(absent) < len(files) else fault
                continue
            broken = [path for path in files if not is_whole(path)]
            if not broken:
                found[name] = place
                break
            fault = f"{broken[0]} is not whole"
        if name not in found:
            size = f"{part.megabytes / 1000:.2f} GB" if part.megabytes >= 1000 else f"{part.megabytes:g} MB"
            missing[name] = f"{fault} ({part.repository}, {size})"
    if missing:
        lines = " and ".join(f"`{line}`" for line in download_lines(list(missing), model_dir))
        raise ToolError(f"--model-dir {model_dir}: {'; '.join(missing.values())}. Looked in this folder, its hf_cache "
                        f"and {user_cache()}. Download with {lines}")
    return found


def place_in(part: Part, config: Mapping[str, Any]) -> str:
    named: Any = config
    for key in part.config_key.split("."):
        named = named.get(key) if isinstance(named, Mapping) else None
    return named if isinstance(named, str) and named else part.place


def places_of(part: Part, model_dir: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Where a part may lie, the most likely place first."""
    yield model_dir / place_in(part, config)
    for cache in (model_dir / "hf_cache", user_cache()):
        for snapshot in snapshots(cache, part.repository):
            folder = snapshot / part.files[0]
            yield folder if len(part.files) == 1 else folder.parent


def files_in(part: Part, place: Path) -> list[Path]:
    return [place] if len(part.files) == 1 else [place / Path(name).name for name in part.files]


def user_cache() -> Path:
    """The user's Hugging Face cache, by the variables that name it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def snapshots(cache: Path, repository: str) -> list[Path]:
    """The versions of a repository in a Hugging Face cache: the current one, then the others by name."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    try:
        current = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        current = ""
    found = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    return sorted(found, key=lambda path: path.name != current)


def is_whole(path: Path) -> bool:
    """False for a file that was cut off (.safetensors, torch's zip files), is empty, or is a pointer to one that was
    not downloaded."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        if head.startswith(b"PK"):
            return zipfile.is_zipfile(handle)
        if path.suffix != ".safetensors":
            return size > 0 and not head.startswith(b"version ")
        length = int.from_bytes(head, "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            return False
        try:
            header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)
