"""Manifests of single clips that the IndexTTS2 fine-tuning forks' preprocessing wrote, as utterances for build_pairs.

    train_manifest.jsonl, val_manifest.jsonl   a clip a line, with four small arrays each: *_path, *_len, no *_start

Paths are relative to the manifest's folder, or absolute; where such a one leads nowhere (the data have moved), the file
of the same name in the folder of the same name beside the manifest is taken. Without a speaker the file name's first
part is it, as the forks have it ("JA_" in front is passed over). A length that is not recorded is that of the sound,
where that is found.

Their preprocessing works on padded batches and saves the codes of the padding too: every clip but the longest of its
batch then has more codes than its sound, all clips of the batch have equally many, and they end in one code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools._common import Progress, ToolError, info, read_jsonl, warn
from tools.sound_files import seconds_of

NAMES = {"train": "train_manifest.jsonl", "val": "val_manifest.jsonl"}
KEYS = ["id", "text_ids_path", "text_len", "codes_path", "code_len", "condition_path", "emo_vec_path"]
REMEDY = "Give a manifest that a fork's preprocessing wrote"
AGAIN = ("Preprocess these recordings again with tools.preprocess, or with the fork's preprocessing one at a time "
         "(--batch-size 1)")
CODES_PER_SECOND = 50  # of IndexTTS2
LONG_ENDING = 75  # codes: 1.5 s of one code; a clip ends in a second of silence at most
SHORT_ENDING = 25
SAMPLED = 500  # clips whose codes are read


def is_fork_folder(data_dir: Path) -> bool:
    return (data_dir / NAMES["train"]).is_file() and not (data_dir / "utterances.jsonl").is_file()


def fault_of(row: dict[str, Any]) -> str:
    """For read_jsonl: what is wrong with a row, and what to do."""
    for key in ("text_len", "code_len"):
        if type(row[key]) is not int or row[key] < 1:
            return f"{key} is {row[key]!r}, not a whole number of at least 1. Take the line out"
    for key in KEYS:
        if key.endswith("_path") and not (isinstance(row[key], str) and row[key]):
            return f"{key} is {row[key]!r}, not a path. {REMEDY}"
    return "" if speaker_of(row) else 'no speaker, and none in the name of audio_path. Add "speaker" to the lines'


def speaker_of(row: dict[str, Any]) -> str:
    name = re.match(r"(?:JA_)?([^_]+)_", Path(str(row.get("audio_path") or "")).stem)
    return str(row.get("speaker") or (name[1] if name else ""))


def array_path(value: str, data_dir: Path) -> str:
    """As it stands in a manifest of this folder."""
    path = Path(value)
    beside = Path(*path.parts[-2:])
    return beside.as_posix() if path.is_absolute() and not path.is_file() and (data_dir / beside).is_file() else value


def recorded_seconds(row: dict[str, Any], data_dir: Path) -> float | None:
    """The clip's length; None where neither row nor sound tells it."""
    seconds = row.get("duration")
    if isinstance(seconds, (int, float)) and 0 < seconds < math.inf:
        return float(seconds)
    audio = data_dir / str(row.get("audio_path") or "")
    return (seconds_of(audio) if audio.is_file() else 0.0) or None


def utterance(row: dict[str, Any], split: str, data_dir: Path) -> dict[str, Any]:
    """A row of tools.preprocess's utterances.jsonl; a start of None: the file holds this clip alone."""
    known = recorded_seconds(row, data_dir)
    paths = {key: array_path(row[key], data_dir) for key in KEYS if key.endswith("_path")}
    text = str(row.get("text") or "")
    return {"id": str(row["id"]), "speaker": speaker_of(row), "split": split, "text": text,
            "audio": str(row.get("audio_path") or ""), "known_duration": known,
            "duration": known or row["code_len"] / CODES_PER_SECOND, **paths,
            **dict.fromkeys(("text_ids_start", "codes_start", "condition_start", "emo_vec_start")),
            "text_len": row["text_len"], "code_len": row["code_len"], "condition_len": row.get("condition_len") or 32,
            **({"language": row["language"]} if row.get("language") else {}),
            **({} if text else {"key": f"clip {row['id']}"})}


def read_utterances(data_dir: Path) -> list[dict[str, Any]]:
    """Both manifests' clips, without those of which the codes hold padding. Raises: ToolError."""
    rows: dict[str, dict[str, Any]] = {}
    for split, name in NAMES.items():
        path = data_dir / name
        if split == "train" or (path.is_file() and path.stat().st_size):
            found = read_jsonl(path, KEYS, REMEDY, fault_of)
            progress = Progress(f"clips of {name}", len(found))
            for done, row in enumerate(found, 1):
                rows.setdefault(str(row["id"]), utterance(row, split, data_dir))
                progress.update(done)
    utterances = without_padding(list(rows.values()), data_dir)
    if all(row["split"] == "train" for row in utterances):
        for row in utterances[::50]:
            row["split"] = "val"
        info(f"{data_dir / NAMES['val']} has no clips: every 50th of the training clips is for validation")
    return utterances


def keep_apart(utterances: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the validation clips whose sentence is trained on too; rows have their `key`."""
    trained = {row["key"] for row in utterances if row["split"] == "train"}
    kept = [row for row in utterances if row["split"] == "train" or row["key"] not in trained]
    if len(kept) < len(utterances):
        warn(f"{len(utterances) - len(kept)} validation clips left out: their sentences are trained on")
    return kept


def longer_than_sound(utterances: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clips whose codes last over a quarter of a second longer than their sound. Lengths that are all whole may have
    been cut to that."""
    timed = [row for row in utterances if row["known_duration"]]
    slack = 0.25 + all(row["known_duration"] % 1 == 0 for row in timed)
    return [row for row in timed if row["code_len"] > CODES_PER_SECOND * (1.01 * row["known_duration"] + slack)]


def ending_in_one_code(utterances: Sequence[dict[str, Any]], data_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Of a spread choice of clips those that end in LONG_ENDING times one code, or in SHORT_ENDING where the clip
    before or after has as many codes; and how many were read."""
    places = range(0, len(utterances), max(1, len(utterances) // SAMPLED))
    found, read, progress = [], 0, Progress("codes", len(places))
    for place in places:
        row = utterances[place]
        try:
            codes = np.load(data_dir / row["codes_path"], allow_pickle=False)
        except (OSError, ValueError):  # the trainer names it, and leaves the clip out
            continue
        around = [utterances[i]["code_len"] for i in (place - 1, place + 1) if 0 <= i < len(utterances)]
        ending = SHORT_ENDING if row["code_len"] in around else LONG_ENDING
        read += 1
        if len(codes) > ending and (codes[-ending:] == codes[-1]).all():
            found.append(row)
        progress.update(read)
    return found, read


def without_padding(utterances: list[dict[str, Any]], data_dir: Path) -> list[dict[str, Any]]:
    """Leaves out single clips that are longer than their sound, and names them. Raises: ToolError for more."""
    longer = longer_than_sound(utterances)
    ending, read = ending_in_one_code(utterances, data_dir)
    if utterances and not read:
        raise ToolError(f"{data_dir}: not one clip's codes can be read, such as {utterances[0]['codes_path']}. Bring "
                        "the arrays back, to where the manifest says or to a folder of that name beside it")
    if len(longer) > max(2, len(utterances) // 100) or len(ending) > max(2, read // 10):
        first = (longer or ending)[0]
        raise ToolError(
            f"{data_dir}: there is padding in the codes. {len(longer)} of {len(utterances)} clips have more codes than "
            f"sound, {len(ending)} of {read} end in one code, such as {first['id']}: {first['code_len']} codes"
            + (f" for {first['known_duration']:g} s" if first["known_duration"] else "") + f". {AGAIN}")
    for row in longer:
        warn(f"{row['id']} left out: {row['code_len']} codes for {row['known_duration']:g} s, so there is padding in "
             f"them, or the length is wrong. {AGAIN}")
    gone = {row["id"] for row in longer}
    return [row for row in utterances if row["id"] not in gone]
