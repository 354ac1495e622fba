"""Recordings and transcripts to the arrays that the trainer reads.

Reads recordings.jsonl: id, text, audio (relative to the file or to --audio-dir); optional speaker, language, split.
Writes into --output-dir:

  codes.npy, text_ids.npy     int32, all utterances end to end
  condition.npy, emo_vec.npy  float32 [32 * prompts, D] (IndexTTS-2.5: [prompts, 192]) and [prompts, D], for the prompt
                              recordings only; with --features of released weights emo_vec.npy has a row for every
                              utterance
  utterances.jsonl            one row per utterance: its split, its audio (relative to the output folder), where its
                              numbers start and how many they are
  config.yaml                 the model to train (gpt:) and what the data was made with (dataset:), which is compared
                              wherever data and weights meet
  skipped.jsonl               the rows that were left out, each with its reason
  chunks/                     what has been computed; deleting it costs time only

Prompts are --prompts-per-speaker recordings of each speaker from the training split. Validation are the rows marked
"split": "val" and all rows of --val-speakers; without either, --val-share of the sentences, by a hash of each (the one
next to the share where a small set has none below it, which a row added later may replace). A sentence of validation,
in whatever spelling and punctuation, is never in training.

--features embedded (tools.speech_codec) needs no download; --features indextts2 --model-dir FOLDER makes what the
released weights of IndexTTS-2 read, and keeps the folder's config.yaml but for the size of the tokenizer.

Run it again after a kill, or when recordings came, changed or left: it computes only what is missing, and the result
is that of a fresh run. When the arrays change, pairs built from older ones are removed, for their rows would point at
other sounds.

Several machines: the same command with --num-shards N and --shard-index 0 ... N-1 (SLURM: $SLURM_ARRAY_TASK_ID), each
into the same --output-dir, then once with --num-shards N --merge.

Skipped, counted and listed: recordings that are missing, unreadable, cut off, empty, under 0.1 s, practically
silent (under -60 dBFS), not a sound (samples beyond 100 or not finite), not of 8 to 96 kHz in steps of 25 Hz, without a
sound file's ending, outside the audio folder (.., links), over 600 s, or longer than the model takes; transcripts that
are empty, too long, not Ethiopic, or have letters that the tokenizer lacks or signs that cannot be said (decoration,
such as emoji and stars, is passed over and counted); training rows with a sentence of validation. Refused: lines that
are not JSON or lack a field, ids that occur twice, data without a training or a validation row.

Texts are read by the text rules of the tokenizer's record (the file with the ending .yaml beside it), without one by
today's, and written for the tokenizer as the front end of that record; the data records which.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import filecmp
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tools._common import (
    Progress,
    ToolError,
    counted,
    info,
    make_parser,
    read_jsonl,
    run_program,
    sha256_of,
    warn,
    write_jsonl,
    write_text,
    writing_to,
)
from tools.amharic_text import Reading, is_amharic, letters_of, read_aloud
from tools.features import (
    FORMAT,
    Clip,
    EmbeddedSource,
    FeatureCache,
    FeatureSource,
    fill_cache,
    find_clip,
)
from tools.indextts2_features import NAMES, IndexTTS2Source, require_indextts2
from tools.indextts2_modules import SPEAKER_VALUES
from tools.made_with import EMBEDDED, FEATURES, INDEXTTS2, INDEXTTS2_CODES, INDEXTTS25, read_yaml, record
from tools.model_folder import find_parts
from tools.recordings import is_sound_name, read_recordings, why_left_out
from tools.sound_files import Unusable
from tools.text_rules import Tally, front_end_for_new, language_of, lost_signs, rules_for_new, written_for
from tools.text_tokens import TextTokens, load_tokens
from tools.train_tokenizer import require_extension
from trainers.train_gpt_v2 import (
    LANGUAGES,
    ModelConfig,
    UserError,
    lock_output_dir,
    model_config_from,
    use_glibc_heap,
)

FIRST_COMMAND = ("python -m tools.preprocess --recordings build/recordings/recordings.jsonl "
                 "--codec processed_data/speech_codec.pt --tokenizer tokenizers/amharic_extended_bpe.model "
                 "--output-dir build/arrays")
ROWS = ("utterances.jsonl", "shard.json")  # what points into the arrays
SMALL_MODEL = {"model_dim": 256, "layers": 4, "heads": 4, "max_text_tokens": 200, "max_mel_tokens": 400}
ETHIOPIC = re.compile("[\u1200-\u139f\u2d80-\u2ddf\uab00-\uab2f]")


# ---------------------------------------------------------------------------------------------------------------------
# Texts and splits (pure, but for one warning)


def text_ids_of(text: str, tokenizer: TextTokens, place: str, front_end: str = "", language: str = "am") -> list[int]:
    """Token ids of a normalised transcript, without <s> and </s>. Raises ToolError for an empty or unknown text."""
    text = written_for(front_end, text)
    ids, unknown = tokenizer.encode(text, language), tokenizer.unknown(text)
    if not ids:
        raise ToolError(f"{place}: the transcript is empty. Write what is said, or remove the row")
    if unknown:
        letters = "Ethiopic letters" if language == "am" else "letters and marks that it has"
        spell = "Train" if ETHIOPIC.search("".join(unknown)) else f"Spell it in {letters}, or train"
        raise ToolError(f"{place}: the tokenizer has no piece for {' '.join(unknown)!r}. {spell} the tokenizer on "
                        "these transcripts (a released bpe.model: tools.train_tokenizer --extend)")
    return ids


def share_of(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def validation_sentences(keys: set[str], share: float, seed: int) -> set[str]:
    """About `share` of the sentences, each by its own hash, so that one added later moves no other. At least one: where
    no hash is below the share, the lowest, which one added later may replace; hence a warning.

    Raises: ToolError when none would be left to train on.
    """
    if len(keys) < 2:
        raise ToolError("there is only one sentence, and validation needs one that training has not. Add recordings")
    places = {key: share_of(f"{seed} {key}") for key in keys}
    chosen = {key for key in keys if places[key] < share}
    if not chosen:
        warn(f"so few sentences that --val-share {share:g} takes none: validation is the one nearest to it. When "
             "recordings are added, another one may take its place, and this one is then trained on. To keep it, mark "
             'its rows "split": "val"')
    return chosen or {min(keys, key=lambda key: places[key])}


def split_rows(rows: Sequence[dict[str, Any]], keys: Sequence[str], val_speakers: Sequence[str], share: float,
               seed: int) -> list[str]:
    """"train", "val" or "" (a training row whose sentence is in validation) for each row."""
    held_out = set(val_speakers)
    unknown = held_out - {row.get("speaker", "") for row in rows}
    if unknown:
        names = ", ".join(sorted({row.get("speaker", "") for row in rows})[:9])
        raise ToolError(f"--val-speakers {' '.join(sorted(unknown))}: no such speaker. There are {names}")
    marked = [row.get("split") == "val" or row.get("speaker", "") in held_out for row in rows]
    if not any(marked):
        chosen = validation_sentences(set(keys), share, seed)
        return ["val" if key in chosen else "train" for key in keys]
    sentences = {key for key, is_val in zip(keys, marked, strict=True) if is_val}
    return ["val" if is_val else "" if key in sentences else "train" for key, is_val in zip(keys, marked, strict=True)]


def choose_prompts(rows: Sequence[dict[str, Any]], trained: set[str], per_speaker: int, seed: int) -> list[int]:
    """Indices of the prompt recordings, ascending: `per_speaker` of each speaker (0 = all), drawn from the longer half,
    since a longer prompt says more about the voice. From the training split, where the speaker is among the `trained`.
    """
    speakers: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if row["split"] == "train" or row["speaker"] not in trained:
            speakers.setdefault(row["speaker"], []).append(index)
    if per_speaker == 0:
        return sorted(index for indices in speakers.values() for index in indices)
    prompts: list[int] = []
    for speaker, indices in speakers.items():
        longest_first = sorted(indices, key=lambda i: (-rows[i]["duration"], i))
        pool = longest_first[: max(per_speaker, len(indices) // 2)]
        prompts += random.Random(f"{seed} {speaker}").sample(pool, min(per_speaker, len(pool)))
    return sorted(prompts)


def shard_of(row_id: str, num_shards: int) -> int:
    """Which shard computes a row; depends on its id alone, so that added rows move no other one."""
    return int(share_of(row_id) * num_shards)


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what to compute, before any sound is read


@dataclass
class Item:
    """A row whose text can be used."""

    number: int
    row: dict[str, Any]
    text: str
    text_ids: list[int]
    split: str


@dataclass
class Plan:
    """Everything that follows from the command line and the texts; the same on every machine."""

    items: list[Item]
    skipped: list[dict[str, Any]]
    named: set[str]
    """Every audio path of the recordings file."""
    source: FeatureSource
    config: dict[str, Any]
    """The model to train (gpt:), and what else its config.yaml has."""
    model: ModelConfig
    audio_dir: Path
    made_with: dict[str, Any]


def text_ids_or_why_not(row: dict[str, Any], reading: Reading, place: str, model: ModelConfig,
                        tokenizer: TextTokens, front_end: str) -> list[int]:
    """Raises: Unusable."""
    text, lost, language = reading.text, lost_signs(reading), language_of(row)
    fault = why_left_out(row)
    if fault and fault.kind == "other_split":
        raise Unusable("other split", f"{place}: {fault}")
    if fault or not text:
        raise Unusable("empty transcript", f"{place}: the transcript is empty. Write what is said")
    if is_amharic(language) and not ETHIOPIC.search(text):
        raise Unusable("not Ethiopic", f"{place}: no Ethiopic letter in {row['text']!r}. Write Amharic in its letters")
    if model.languages and language.lower() not in LANGUAGES:
        raise Unusable("unknown language", f"{place}: IndexTTS-2.5 has no language {language!r}. Give one of "
                                           f"{', '.join(LANGUAGES)}")
    if lost:
        raise Unusable("signs that cannot be said", f"{place}: {lost} in {row['text']!r}. Write the words that are "
                                                    "said for it, or remove it")
    try:
        ids = text_ids_of(text, tokenizer, place, front_end, language.lower())
    except ToolError as error:
        raise Unusable("letters without a token", str(error)) from error
    if len(ids) > model.max_text_tokens:
        raise Unusable("text too long", f"{place}: {len(ids)} text tokens, the model takes {model.max_text_tokens}. "
                                        "Cut the recording into sentences")
    return ids


def skipped_row(number: int, row_id: str, reason: str, detail: str) -> dict[str, Any]:
    return {"row": number, "id": row_id, "reason": reason, "detail": detail}


def plan_items(rows: Sequence[dict[str, Any]], recordings: Path, model: ModelConfig, rules: int, front_end: str,
               tokenizer: TextTokens, args: argparse.Namespace) -> tuple[list[Item], list[dict[str, Any]]]:
    """All transcripts before any sound: a fault among them shows within seconds, not after hours of audio."""
    items, skipped, tally = [], [], Tally(rules)
    progress = Progress("transcripts", len(rows))
    for number, row in enumerate(rows, 1):
        reading = read_aloud(row["text"], language_of(row), rules)
        tally.add(reading)
        try:
            ids = text_ids_or_why_not(row, reading, f"{recordings}, row {number} ({row['id']})", model, tokenizer,
                                      front_end)
            items.append(Item(number, row, reading.text, ids, ""))
        except Unusable as fault:
            skipped.append(skipped_row(number, row["id"], fault.reason, fault.detail))
        progress.update(number)
    for line in tally.lines():
        warn(line)
    if not items:
        raise ToolError(f"{recordings}: no row can be used. {say_skipped(skipped)[0]}")
    keys = [letters_of(item.text, language_of(item.row), rules) for item in items]
    if skipped and len(set(keys)) < 2:
        raise ToolError(f"{recordings}: one sentence is left, and validation needs another. {say_skipped(skipped)[0]}")
    splits = split_rows([item.row for item in items], keys, args.val_speakers, args.val_share, args.seed)
    for item, split in zip(items, splits, strict=True):
        item.split = split
        if not split:
            skipped.append(skipped_row(item.number, item.row["id"], "sentence of validation", f"{recordings}, row "
                                       f"{item.number} ({item.row['id']}): validation has the sentence {item.text!r}"))
    if "train" not in splits:
        raise nothing_left(recordings, "train", skipped)
    return [item for item in items if item.split], skipped


def nothing_left(recordings: Path, split: str, skipped: Sequence[dict[str, Any]]) -> ToolError:
    """The error of data that has no row of a split; `skipped` are the rows that would have been of it."""
    why = "; ".join(say_skipped(skipped)) or "Every row is validation"
    if split == "train":
        return ToolError(f"{recordings}: no row is left to train on. {why}. Mend these rows, mark fewer "
                         '"split": "val", or name fewer --val-speakers')
    return ToolError(f"{recordings}: no row is left for validation. {why}. Mend these rows, mark others "
                     '"split": "val", or raise --val-share')


def languages_of(config: dict[str, Any]) -> dict[str, int]:
    """What the layout of IndexTTS-2.5, which the trainer knows by its version, adds to a gpt: section."""
    version = config.get("version", 2)
    return {"languages": len(LANGUAGES) + 1} if isinstance(version, (int, float)) and version >= 2.5 else {}


def read_model_config(config: Path | None) -> dict[str, Any]:
    """The model to train (gpt:, and its version if it has one): that of --config, else a small one.

    Raises: ToolError.
    """
    if config is None:
        return {"gpt": dict(SMALL_MODEL)}
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolError(f"--config {config}: cannot be read ({' '.join(str(error).split())}). Give a YAML file with a "
                        "gpt: section") from error
    section = content.get("gpt") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ToolError(f"--config {config}: no gpt: section. Give IndexTTS2's config.yaml, or one like that in "
                        "processed_data/")
    return {key: content[key] for key in ("gpt", "version") if key in content}


def complete_gpt_section(config: dict[str, Any], source: FeatureSource, vocab_size: int, place: str
                         ) -> tuple[dict[str, Any], ModelConfig]:
    """The section with tokenizer's and features' numbers in it. Raises: ToolError for a model that cannot be, or whose
    codes are not those of the features."""
    section, codes = config["gpt"], source.num_codes
    of_codes = {"number_mel_codes": codes + 2, "start_mel_token": codes, "stop_mel_token": codes + 1}
    differing = [f"gpt.{key} is {section[key]}, these features need {value}" for key, value in of_codes.items()
                 if section.get(key, value) != value]
    if differing:
        raise ToolError(f"{place}: {'; '.join(differing)}: it is the model of other codes. " + (
            "These features are not those of IndexTTS2's weights, which need data made with their own "
            "(--features indextts2 --model-dir FOLDER). " if INDEXTTS2_CODES in map(section.get, of_codes) else "") +
            f"To train from scratch leave {', '.join(of_codes)} out of it, or give the codec that they belong to as "
            "--codec")
    section = section | {"number_text_tokens": vocab_size}
    if source.name == EMBEDDED:  # of released weights, all else stays as it is
        section |= of_codes | {"start_text_token": 0, "stop_text_token": 1,
                               "mel_length_compression": source.samples_per_code}
    try:
        return section, model_config_from({**languages_of(config), **section}, place)
    except UserError as error:
        raise ToolError(str(error)) from error


def source_and_config(args: argparse.Namespace) -> tuple[FeatureSource, dict[str, Any], str]:
    """Where the features come from, the config.yaml of the model to train, and what names it in an error.

    Raises: ToolError.
    """
    if args.features != EMBEDDED:
        require_indextts2(args.model_dir, args.features)
        place = args.model_dir / "config.yaml"
        config = read_yaml(place)
        try:
            most_codes = model_config_from({**languages_of(config), **config["gpt"]}, str(place)).max_code_len
        except UserError as error:
            raise ToolError(str(error)) from error
        return IndexTTS2Source.of(args.model_dir, args.device, most_codes, args.features), config, str(place)
    config = read_model_config(args.config)
    section = config["gpt"]
    if args.model_dim:
        section["model_dim"] = args.model_dim
    width = section.get("model_dim")
    source = EmbeddedSource.of(args.codec, width if isinstance(width, int) else 0,
                               (1, SPEAKER_VALUES) if languages_of(config) else None)
    return source, config, f"--config {args.config}" if args.config else f"--model-dim {args.model_dim}"


def require_own_tokenizer(tokenizer: Path, own: Path) -> None:
    """For data of IndexTTS-2.5's weights, whose tokenizer knows every letter. Raises: ToolError for another."""
    if sha256_of(tokenizer) != sha256_of(own):
        raise ToolError(f"--tokenizer {tokenizer}: is not {own}, whose texts the weights learned. Give that one")


def make_plan(args: argparse.Namespace) -> Plan:
    """Reads and checks everything but the sounds. Raises: ToolError."""
    rows = read_recordings(args.recordings)
    tokenizer = load_tokens(args.tokenizer)
    source, config, place = source_and_config(args)
    if source.name == INDEXTTS2:
        require_extension(args.tokenizer, find_parts(args.model_dir, ("bpe",))["bpe"])
    if source.name == INDEXTTS25:
        require_own_tokenizer(args.tokenizer, find_parts(args.model_dir, ("tiktoken",))["tiktoken"])
    gpt, model = complete_gpt_section(config, source, tokenizer.size, place)
    rules, front_end = rules_for_new(args.tokenizer), front_end_for_new(args.tokenizer, source.name)
    items, skipped = plan_items(rows, args.recordings, model, rules, front_end, tokenizer, args)
    made_with = {
        "format": FORMAT, "--recordings": sha256_of(args.recordings), "--codec": source.sha256,
        "--tokenizer": sha256_of(args.tokenizer), "text rules": rules, "front end": front_end or None,
        "--num-shards": args.num_shards,
        "--seed": args.seed,
        "--config or --model-dim": [model.model_dim, model.max_text_tokens, model.max_mel_tokens,
                                     *(["2.5"] if model.languages else [])],
        "--prompts-per-speaker": args.prompts_per_speaker, "--val-share": args.val_share,
        "--val-speakers": sorted(args.val_speakers),
    }
    if source.name != EMBEDDED:
        made_with |= {"--features": source.name, "--model-dir": source.fingerprint("codes")}
    audio_dir = Path(os.path.realpath(args.audio_dir or args.recordings.parent))
    return Plan(items, skipped, {row["audio"] for row in rows}, source, {**config, "gpt": gpt}, model, audio_dir,
                made_with)


# ---------------------------------------------------------------------------------------------------------------------
# Features to files


@dataclass
class Part:
    """What one process or machine has worked out: rows, and the numbers they point into."""

    utterances: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    clips: list[Clip] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)
    text_ids: list[np.ndarray] = field(default_factory=list)
    """All three for each utterance; empty in a merge, whose shards have them."""
    streams: list[tuple[FeatureCache, list[Clip], tuple[str, ...]]] = field(default_factory=list)
    """The other arrays by name: of which clips they are, one after another, and where their features lie. Without
    conditions in a shard that leaves them to the merge."""
    in_use: list[tuple[FeatureCache, list[Clip]]] = field(default_factory=list)
    """For prune_caches."""


def find_clips(items: Sequence[Item], audio_dir: Path) -> tuple[dict[int, Clip], dict[int, tuple[str, str]]]:
    """By row number: the sound files, and (reason, detail) where there is none."""
    clips: dict[int, Clip] = {}
    faults: dict[int, tuple[str, str]] = {}
    progress = Progress("finding recordings", len(items))
    for done, item in enumerate(items, 1):
        try:
            clips[item.number] = find_clip(item.row["audio"], audio_dir)
        except Unusable as fault:
            faults[item.number] = fault.reason, fault.detail
        progress.update(done)
    return clips, faults


def work_out(plan: Plan, items: Sequence[Item], folder: Path, jobs: int) -> Part:
    """Codes of these items, and one row for each. Raises: ToolError."""
    clips, faults = find_clips(items, plan.audio_dir)
    cache = FeatureCache(folder / "chunks", "codes", plan.source)
    unusable = fill_cache(cache, list(clips.values()), plan.audio_dir, jobs)
    faults |= {number: unusable[clip] for number, clip in clips.items() if clip in unusable}
    usable = [number for number in clips if number not in faults]
    found = {usable[i]: (features["codes"], int(features["samples"][0]))
             for i, features in cache.read([clips[number] for number in usable])}
    sample_rate, most = plan.source.sample_rate, plan.model.max_code_len
    part, codes_start, ids_start = Part([], []), 0, 0
    for item in items:
        row, ids = item.row, np.array(item.text_ids, dtype=np.int32)
        if item.number not in faults:
            codes, samples = found[item.number]
            if len(codes) > most:
                faults[item.number] = "recording too long", (f"{plan.audio_dir / row['audio']}: {len(codes)} codes, "
                                                             f"the model takes {most}. Cut it into sentences")
        if item.number in faults:
            part.skipped.append(skipped_row(item.number, row["id"], *faults[item.number]))
            continue
        part.utterances.append({
            "id": row["id"], "speaker": row.get("speaker", ""), "language": language_of(row),
            "split": item.split, "text": item.text, "audio": row["audio"], "duration": round(samples / sample_rate, 3),
            "text_ids_start": ids_start, "text_len": len(ids), "codes_start": codes_start, "code_len": len(codes),
        })
        if plan.source.emo_vec_kind == "codes":
            part.utterances[-1]["emo_vec_start"] = len(part.utterances) - 1
        part.clips.append(clips[item.number])
        part.codes.append(codes)
        part.text_ids.append(ids)
        codes_start, ids_start = codes_start + len(codes), ids_start + len(ids)
    part.in_use.append((cache, [clips[number] for number in usable]))
    if plan.source.emo_vec_kind == "codes":
        part.streams.append((cache, part.clips, ("emo_vec",)))
    return part


def work_out_prompts(plan: Plan, part: Part, prompts: Sequence[int], folder: Path, jobs: int) -> None:
    """Conditions of the prompt recordings, and their places into these rows.

    Raises: ToolError for a prompt whose recording cannot be read (any more).
    """
    cache = FeatureCache(folder / "chunks", "condition", plan.source)
    try:
        clips = [find_clip(part.utterances[index]["audio"], plan.audio_dir) for index in prompts]
    except Unusable as fault:
        raise ToolError(f"a prompt's recording: {fault.detail}. The merge, too, needs the recordings") from fault
    for _, detail in fill_cache(cache, clips, plan.audio_dir, jobs).values():
        raise ToolError(f"a prompt's recording: {detail}. If it was changed meanwhile, run the same command again")
    names = ("condition", "emo_vec") if plan.source.emo_vec_kind == "condition" else ("condition",)
    count = plan.model.condition_shape[0]
    for rank, index in enumerate(prompts):
        part.utterances[index] |= {"condition_start": rank * count, "condition_len": count}
        if "emo_vec" in names:
            part.utterances[index]["emo_vec_start"] = rank
    part.in_use.append((cache, clips))
    part.streams.append((cache, clips, names))


def prune_caches(plan: Plan, part: Part) -> None:
    """To be called once the new arrays are published: till then, what looks useless may be all that is left."""
    for cache, clips in part.in_use:
        cache.prune(clips, plan.named)


@contextlib.contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: type) -> Iterator[Callable[[int, np.ndarray], None]]:
    """Yields put(row, values), which writes values from that row on into a new .npy file, never all in memory."""
    with path.open("wb") as handle:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        start, row_bytes = handle.tell(), np.dtype(dtype).itemsize * math.prod(shape[1:])

        def put(row: int, values: np.ndarray) -> None:
            handle.seek(start + row * row_bytes)
            handle.write(np.ascontiguousarray(values, dtype=dtype).data)

        yield put
        handle.flush()
        os.fsync(handle.fileno())


def save_arrays(staging: Path, part: Part, model: ModelConfig) -> None:
    """codes and text_ids [total] int32; condition [32 * clips, D] or [clips, 192] and emo_vec [clips, D] float32."""
    for name, parts in (("codes", part.codes), ("text_ids", part.text_ids)):
        if parts:
            with new_array(staging / f"{name}.npy", (sum(map(len, parts)),), np.int32) as put:
                for row, values in zip(part.utterances, parts, strict=True):
                    put(row[f"{name}_start"], values)
    for cache, clips, names in part.streams:
        with contextlib.ExitStack() as files:
            shapes = {name: model.condition_shape if name == "condition" else (1, model.model_dim) for name in names}
            puts = {name: files.enter_context(new_array(staging / f"{name}.npy", (count * len(clips), width),
                                                        np.float32)) for name, (count, width) in shapes.items()}
            for rank, features in cache.read(clips):
                for name, put in puts.items():
                    put(shapes[name][0] * rank, features[name])


def dataset_config(plan: Plan, tokenizer: Path, utterances: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """config.yaml: the model (`gpt:`, IndexTTS2's names), what else its own config.yaml has, and what the data was
    made with (`dataset:`)."""
    source, section = plan.source, plan.config.get("dataset")
    return {**plan.config, "dataset": {
        "sample_rate": source.sample_rate, **(section if isinstance(section, dict) else {}),
        "tokenizer": tokenizer.name, "codec": source.codec.name,
        **record(source.name, source.sha256, source.num_codes, source.sample_rate / source.samples_per_code,
                 plan.made_with["--tokenizer"], plan.made_with["text rules"], plan.made_with["front end"] or "",
                 source.conditioning_sha256),
        "speakers": sorted({row["speaker"] for row in utterances}),
    }}


@contextlib.contextmanager
def publishing(folder: Path, output_dir: Path) -> Iterator[Path]:
    """Yields a folder for the new files; they take the old ones' places when the block ends well.

    Rows must never point into arrays of another run. So when arrays or rows differ from those that are there, the rows
    and pairs that point into the old arrays go first, and the new rows come last: a kill leaves no rows, or good ones.
    """
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    with writing_to(folder):
        try:
            staging.mkdir(parents=True)
            yield staging
            replace_changed(staging, folder, output_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def replace_changed(staging: Path, folder: Path, output_dir: Path) -> None:
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name in ROWS, name))
    changed = [name for name in names if not same_content(staging / name, folder / name)]
    if any(name.endswith(".npy") or name in ROWS for name in changed):
        pointing = [output_dir / f"{name}.jsonl" for name in ("train_pairs", "val_pairs", "utterances")]
        if any(path.exists() for path in pointing[:2]):
            info("the data has changed: pairs of the old arrays are removed. Run tools.build_pairs again")
        for path in [*pointing, *(folder / name for name in ROWS)]:
            path.unlink(missing_ok=True)
    for name in names:
        if name in changed or not (folder / name).exists():
            os.replace(staging / name, folder / name)


def same_content(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


# ---------------------------------------------------------------------------------------------------------------------
# One machine, a shard, the merge


def choose_and_publish(plan: Plan, part: Part, args: argparse.Namespace) -> None:
    """The end of a single run and of a merge, which has conditions only to choose, not to compute, if all have one."""
    part.skipped += plan.skipped
    if not part.utterances:
        raise ToolError(f"no recording can be used. {'; '.join(say_skipped(part.skipped))}")
    planned = {item.row["id"]: item.split for item in plan.items}
    for split in ("train", "val"):
        if not any(row["split"] == split for row in part.utterances):
            lost = [row for row in part.skipped if planned.get(row["id"]) == split]
            raise nothing_left(args.recordings, split, lost)
    if not any("condition_start" in row for row in part.utterances):
        trained = {row["speaker"] for row in part.utterances if row["split"] == "train"}
        prompts = choose_prompts(part.utterances, trained, args.prompts_per_speaker, args.seed)
        work_out_prompts(plan, part, prompts, args.output_dir, args.jobs)
    with publishing(args.output_dir, args.output_dir) as staging:
        save_arrays(staging, part, plan.model)
        config = dataset_config(plan, args.tokenizer, part.utterances)
        write_text(staging / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))
        write_jsonl(staging / "skipped.jsonl", sorted(part.skipped, key=lambda row: row["row"]))
        output_dir = os.path.realpath(args.output_dir)  # pairs name recordings as seen from the folder they are in
        write_jsonl(staging / "utterances.jsonl", ({**row, "audio": os.path.relpath(plan.audio_dir / row["audio"],
                                                                                    output_dir)}
                                                   for row in part.utterances))
    prune_caches(plan, part)


def run_single(plan: Plan, args: argparse.Namespace) -> Part:
    part = work_out(plan, plan.items, args.output_dir, args.jobs)
    choose_and_publish(plan, part, args)
    return part


def shard_folder(output_dir: Path, index: int, num_shards: int) -> Path:
    return output_dir / f"shard_{index:03d}_of_{num_shards:03d}"


def run_shard(plan: Plan, args: argparse.Namespace) -> Part:
    """A shard's own arrays and rows; conditions only if every recording is a prompt, else the merge chooses them."""
    folder = shard_folder(args.output_dir, args.shard_index, args.num_shards)
    items = [item for item in plan.items if shard_of(item.row["id"], args.num_shards) == args.shard_index]
    part = work_out(plan, items, folder, args.jobs)
    if args.prompts_per_speaker == 0:
        # By the plan: whether the speaker's training rows of other shards can be used is not known here.
        trained = {item.row.get("speaker", "") for item in plan.items if item.split == "train"}
        prompts = choose_prompts(part.utterances, trained, 0, args.seed)
        work_out_prompts(plan, part, prompts, folder, args.jobs)
    with publishing(folder, args.output_dir) as staging:
        save_arrays(staging, part, plan.model)
        write_jsonl(staging / "skipped.jsonl", part.skipped)
        sizes = (clip.size for clip in part.clips)  # for the merge to compare
        write_jsonl(staging / "utterances.jsonl", ({**row, "size": size} for row, size in
                                                   zip(part.utterances, sizes, strict=True)))
        write_text(staging / "shard.json", json.dumps({"shard": args.shard_index, **plan.made_with}) + "\n")
    prune_caches(plan, part)
    return part


def read_lines(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """Like read_jsonl, but no row at all is well: a shard may have nothing to say."""
    if path.is_file() and not path.stat().st_size:
        return []
    return read_jsonl(path, required, "Run its shard again")


def read_shard(folder: Path, plan: Plan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Utterances and skipped rows of a finished shard, paths relative to the output folder.

    Raises: ToolError for a shard that is missing, was made otherwise, or whose arrays are not whole.
    """
    try:
        found = dict(json.loads((folder / "shard.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ToolError(f"{folder.name} is missing or unfinished") from error
    differing = [name for name, value in plan.made_with.items() if found.get(name) != value]
    if differing:
        raise ToolError(f"{folder.name} was made with another {', '.join(differing)}")
    utterances = read_lines(folder / "utterances.jsonl", ["id", "audio", "size", "code_len", "text_len"])
    prompts, vectors = (sum(key in row for row in utterances) for key in ("condition_start", "emo_vec_start"))
    count, width = plan.model.condition_shape
    shapes = {"codes": (sum(row["code_len"] for row in utterances),),
              "text_ids": (sum(row["text_len"] for row in utterances),),
              "condition": (count * prompts, width), "emo_vec": (vectors, plan.model.model_dim)}
    for name, shape in shapes.items():
        if shape[0] and array_shape(folder / f"{name}.npy") != shape:
            raise ToolError(f"{folder.name}/{name}.npy is not whole")
    changed = [row["audio"] for row in utterances if is_changed(row, plan.audio_dir)]
    if changed:
        raise ToolError(f"{folder.name} was made from other recordings (another --audio-dir, or changed since: "
                        f"{len(changed)} have another size, the first {changed[0]!r})")
    for row in utterances:
        del row["size"]
        row |= {"text_ids_path": f"{folder.name}/text_ids.npy", "codes_path": f"{folder.name}/codes.npy"}
        row |= {f"{name}_path": f"{folder.name}/{name}.npy" for name in ("condition", "emo_vec")
                if f"{name}_start" in row}
    return utterances, read_lines(folder / "skipped.jsonl", ["id", "reason", "detail"])


def array_shape(path: Path) -> tuple[int, ...]:
    """Of a .npy file; () for one that is missing or cut off."""
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, ValueError, EOFError):
        return ()


def is_changed(row: dict[str, Any], audio_dir: Path) -> bool:
    """Whether a recording has another size here than where its shard was made. One that is missing here has not: only
    prompts are read again."""
    try:
        return find_clip(row["audio"], audio_dir).size != row["size"]
    except Unusable:
        return False


def join_shards(plan: Plan, folders: Sequence[Path]) -> Part:
    """All shards' rows in the order of the recordings. Raises: ToolError that lists everything that is amiss."""
    rows, skipped, problems = {}, {}, []
    for folder in folders:
        try:
            utterances, left_out = read_shard(folder, plan)
        except ToolError as error:
            problems.append(str(error))
            continue
        rows.update({row["id"]: row for row in utterances})
        skipped.update({row["id"]: row for row in left_out})
    if not problems:
        ids = [item.row["id"] for item in plan.items]
        wrong = [row_id for row_id in ids if (row_id in rows) + (row_id in skipped) != 1]
        wrong += sorted((rows.keys() | skipped.keys()) - set(ids))
        problems += [f"{len(wrong)} rows are not there exactly once, the first {wrong[0]!r}"] if wrong else []
    if problems:
        raise ToolError(f"{folders[0].parent}: {'; '.join(problems)}. Run these shards again with the inputs and "
                        "settings of this command, then merge")
    ordered = [rows[item.row["id"]] for item in plan.items if item.row["id"] in rows]
    return Part(ordered, list(skipped.values()))


def merge(plan: Plan, args: argparse.Namespace) -> Part:
    folders = [shard_folder(args.output_dir, index, args.num_shards) for index in range(args.num_shards)]
    with contextlib.ExitStack() as locks:
        for folder in folders:
            if folder.is_dir():
                locks.enter_context(locked(folder))
        part = join_shards(plan, folders)
        choose_and_publish(plan, part, args)
    return part


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One preprocess or build_pairs per folder; also sweeps up what a killed one left.

    Raises: ToolError naming the other one.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_output_dir(folder))
        except UserError as error:
            raise ToolError(str(error).removeprefix("--output-dir ")) from error  # or a shard's folder, or --data-dir
        for leftover in [*folder.glob(".*.tmp.*"), *folder.glob("chunks/.*.tmp.*")]:
            leftover.unlink(missing_ok=True)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Summary and command line


def say_skipped(skipped: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each reason: how many, and the first two."""
    by_reason: dict[str, list[str]] = {}
    for row in skipped:
        by_reason.setdefault(row["reason"], []).append(row["detail"])
    most_first = sorted(by_reason.items(), key=lambda pair: -len(pair[1]))
    return [f"{len(details)} x {reason}: {' | '.join(details[:2])}" for reason, details in most_first]


def sounds_without_row(plan: Plan) -> list[str]:
    """Sound files of the audio folder, at any depth, that have no row."""
    known = {os.path.normpath(plan.audio_dir / audio) for audio in plan.named if "\0" not in audio}
    found = {os.path.join(folder, name) for folder, _, names in os.walk(plan.audio_dir) for name in names
             if is_sound_name(name)}
    strays = found - known
    return sorted(strays - {os.path.realpath(path) for path in known}) if strays else []  # a row may name a link


def say_summary(plan: Plan, part: Part, folder: Path) -> None:
    rows = part.utterances
    seconds, codes = sum(row["duration"] for row in rows), sum(row["code_len"] for row in rows)
    files = sorted({row.get("codes_path", "codes.npy") for row in rows})
    used = set().union(*(np.unique(np.load(folder / name)).tolist() for name in files))
    splits = collections.Counter(row["split"] for row in rows)
    info(f"{len(rows)} utterances of {counted(len({row['speaker'] for row in rows}), 'speaker')}, "
         f"{seconds / 3600:.2f} hours, {codes} codes "
         f"({codes / max(seconds, 1e-9):.1f} a second, {len(used)} of {plan.source.num_codes} in use)")
    prompts = sum("condition_start" in row for row in rows)
    sentences = len({row["text"] for row in rows if row["split"] == "val"})
    info(f"{splits['train']} for training, {splits['val']} for validation ({sentences} texts), {prompts} prompts")
    if part.skipped:
        warn(f"{len(part.skipped)} rows skipped, all of them in skipped.jsonl:")
        for line in say_skipped(part.skipped):
            warn(f"  {line}")
    nameless = sum(not row["speaker"] for row in rows)
    if nameless:
        warn(f"{nameless} rows name no speaker: they are taken for one voice")


def check_kind_of_features(args: argparse.Namespace) -> None:
    """Raises: ToolError naming a flag that is missing, or that goes with other features."""
    needed, others, remedy = "codec", ["model_dir"], "--features indextts2 and indextts2.5 take it"
    if args.features != EMBEDDED:
        needed, others = "model_dir", ["codec", "config", "model_dim"]
        remedy = "codec and model are those of the folder, leave it out"
    for name in others:
        if getattr(args, name):
            raise ToolError(f"--{name.replace('_', '-')} does not go with --features {args.features}: {remedy}")
    if not getattr(args, needed):
        raise ToolError(f"--features {args.features} needs --{needed.replace('_', '-')}" + (
            ", the codec that `python -m tools.speech_codec train` wrote" if needed == "codec" else
            f", the folder of {NAMES[args.features]}: `hf download IndexTeam/{NAMES[args.features]} --local-dir "
            "checkpoints`"))


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ToolError naming the flag."""
    for name in ("prompts_per_speaker", "jobs", "model_dim"):
        if getattr(args, name) < 0:
            raise ToolError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    if not 0 < args.val_share < 1:
        raise ToolError(f"--val-share {args.val_share}: give a number between 0 and 1, such as 0.02")
    check_kind_of_features(args)
    if args.num_shards < 0 or (args.merge and args.shard_index is not None):
        raise ToolError("give --num-shards N with --shard-index 0 ... N-1 for a part, or with --merge for the end")
    if bool(args.num_shards) != (args.merge or args.shard_index is not None):
        raise ToolError("--num-shards goes with --shard-index (one part) or --merge (the end), and they with it")
    if args.shard_index is not None and not 0 <= args.shard_index < args.num_shards:
        raise ToolError(f"--shard-index {args.shard_index}: there are shards 0 to {args.num_shards - 1}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--recordings", type=Path, required=True, help="the recordings.jsonl to read")
    parser.add_argument("--features", choices=FEATURES, default=EMBEDDED, help="of this project's own "
                        "codec, or of IndexTTS2's released weights (embedded)")
    parser.add_argument("--codec", type=Path, help="what `python -m tools.speech_codec train` wrote (embedded)")
    parser.add_argument("--model-dir", type=Path, help="folder of IndexTTS-2 or 2.5, whose config.yaml is the model to "
                                                       "train (indextts2)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda, for indextts2 (auto)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model of the transcripts' "
                        "letters; the .tiktoken file of IndexTTS-2.5")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets the files named above")
    parser.add_argument("--audio-dir", type=Path, help="holds all recordings (the folder of --recordings)")
    parser.add_argument("--config", type=Path, help="YAML whose gpt: section is the model to train, with the codec's "
                                                    "code count or none (a small one of width 256 that takes 200 text "
                                                    "tokens and 401 codes)")
    parser.add_argument("--model-dim", type=int, default=0, help="width D of the model, 0 = the config's (0)")
    parser.add_argument("--prompts-per-speaker", type=int, default=12, help="0 = every training recording (12)")
    parser.add_argument("--val-share", type=float, default=0.02, help="of sentences, if nothing is marked val (0.02)")
    parser.add_argument("--val-speakers", nargs="+", default=[], metavar="NAME", help="kept for validation (none)")
    parser.add_argument("--jobs", type=int, default=0, help="at most so many processes of one thread each, 0 = one per "
                                                            "core, on a GPU one (0)")
    parser.add_argument("--shard-index", type=int, help="compute only this part of --num-shards, from 0 (all)")
    parser.add_argument("--num-shards", type=int, default=0, help="parts to divide the work into, 0 = undivided (0)")
    parser.add_argument("--merge", action="store_true", help="check that all shards are there and join them")
    parser.add_argument("--seed", type=int, default=1234, help="of validation and prompts (1234)")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    use_glibc_heap()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = make_plan(args)
        is_shard = args.shard_index is not None
        folder = shard_folder(args.output_dir, args.shard_index, args.num_shards) if is_shard else args.output_dir
        with locked(folder):
            part = (run_shard if is_shard else merge if args.merge else run_single)(plan, args)
        say_summary(plan, part, folder)
        strays = [] if is_shard else sounds_without_row(plan)
        if strays:
            warn(f"{len(strays)} sound files have no row in {args.recordings}: {', '.join(strays[:3])}")
        next_step = "run the other shards, then --merge" if is_shard else f"tools.build_pairs --data-dir {folder}"
        info(f"-> {folder}; next: {next_step}")
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_program(main)
