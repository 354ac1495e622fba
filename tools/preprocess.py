"""Recordings and transcripts to the arrays that the trainer reads.

Reads recordings.jsonl (id, text, audio relative to the file; optional speaker, language, split). Writes into
--output-dir:

  codes.npy, text_ids.npy     int32, all utterances end to end
  condition.npy, emo_vec.npy  float32 [32 * prompts, D] and [prompts, D], for the prompt recordings only
  utterances.jsonl            one row per utterance: where its numbers start and how many they are

Prompts are --prompts-per-speaker recordings of each speaker, taken from the training split.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from tools._common import (
    Progress,
    ToolError,
    atomic_path,
    info,
    make_parser,
    read_jsonl,
    run_program,
    write_jsonl,
)
from tools.amharic_text import normalise
from tools.speech_codec import SpeechCodec, load_recording
from tools.train_tokenizer import load_tokenizer
from trainers.train_gpt_v2 import use_glibc_heap

FIRST_COMMAND = ("python -m tools.preprocess --recordings build/recordings/recordings.jsonl "
                 "--codec processed_data/speech_codec.pt --tokenizer tokenizers/amharic_extended_bpe.model "
                 "--output-dir build/arrays")
CONDITION_ROWS = 32


def choose_prompts(rows: Sequence[dict[str, Any]], durations: Sequence[float], per_speaker: int,
                   seed: int) -> set[int]:
    """Indices of the prompt recordings: `per_speaker` of each speaker (0 = all), drawn from the longer half of the
    training split, since a longer prompt says more about the voice."""
    speakers: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if row.get("split", "train") == "train":
            speakers.setdefault(row.get("speaker", ""), []).append(index)
    if per_speaker == 0:
        return {index for indices in speakers.values() for index in indices}
    prompts: set[int] = set()
    for speaker, indices in sorted(speakers.items()):
        if len(indices) < 2:
            raise ToolError(f"speaker {speaker!r} has {len(indices)} training recording, and a prompt must differ from "
                            "its target. Add recordings or remove the speaker")
        longest_first = sorted(indices, key=lambda i: (-durations[i], i))
        pool = longest_first[: max(per_speaker, len(indices) // 2)]
        prompts.update(random.Random(f"{seed} {speaker}").sample(pool, min(per_speaker, len(pool))))
    return prompts


def text_ids_of(text: str, tokenizer: sentencepiece.SentencePieceProcessor, place: str) -> list[int]:
    """Token ids of a normalised transcript, without <s> and </s>. Raises ToolError for an empty or unknown text."""
    ids = tokenizer.encode(text)
    if not ids:
        raise ToolError(f"{place}: the transcript is empty. Write what is said, or remove the row")
    if tokenizer.unk_id() in ids:
        pieces = tokenizer.encode(text, out_type=str)
        unknown = sorted({piece for piece, piece_id in zip(pieces, ids, strict=True) if piece_id == tokenizer.unk_id()})
        raise ToolError(f"{place}: the tokenizer has no piece for {' '.join(unknown)!r}. Spell it in "
                        "Ethiopic letters, or train the tokenizer on these transcripts")
    return ids


def save_array(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, array)


def check_ids(rows: Sequence[dict[str, Any]], recordings: Path) -> None:
    """Ids must be unique: pairs and checkpoints refer to utterances by them."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row["id"] in seen:
            raise ToolError(f"{recordings}, row {number}: id {row['id']!r} is that of row {seen[row['id']]} too. Make "
                            "ids unique")
        seen[row["id"]] = number


def preprocess(rows: Sequence[dict[str, Any]], recordings: Path, codec: SpeechCodec,
               tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Utterance rows (without prompts), codes [total] and text ids [total], both int32."""
    utterances, all_codes = [], []
    codes_start = ids_start = 0
    texts = [normalise(row["text"]) for row in rows]
    # All transcripts first: a fault among them shows within seconds, not after hours of audio.
    all_ids = [text_ids_of(text, tokenizer, f"{recordings}, row {number} ({row['id']})")
               for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1)]
    progress = Progress("preprocessing", len(rows))
    for number, (row, text, ids) in enumerate(zip(rows, texts, all_ids, strict=True), 1):
        waveform = load_recording(recordings.parent / row["audio"], codec.config.sample_rate)
        codes = codec.encode(waveform).numpy().astype(np.int32)
        utterances.append({
            "id": row["id"], "speaker": row.get("speaker", ""), "language": row.get("language", "am"),
            "split": row.get("split", "train"), "text": text, "audio": row["audio"],
            "duration": round(len(waveform) / codec.config.sample_rate, 3), "text_ids_start": ids_start,
            "text_len": len(ids), "codes_start": codes_start, "code_len": len(codes),
        })
        all_codes.append(codes)
        codes_start, ids_start = codes_start + len(codes), ids_start + len(ids)
        progress.update(number)
    return utterances, np.concatenate(all_codes), np.concatenate(all_ids, dtype=np.int32)


def prompt_arrays(utterances: Sequence[dict[str, Any]], prompts: set[int], folder: Path, codec: SpeechCodec,
                  model_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """condition [32 * prompts, D] and emo_vec [prompts, D], float32; writes each prompt's place into its row."""
    conditions, emo_vecs = [], []
    progress = Progress("prompt conditions", len(prompts))
    for rank, index in enumerate(sorted(prompts)):
        waveform = load_recording(folder / utterances[index]["audio"], codec.config.sample_rate)
        condition, emo_vec = codec.condition(waveform, model_dim)
        utterances[index] |= {"condition_start": rank * CONDITION_ROWS, "condition_len": len(condition),
                              "emo_vec_start": rank}
        conditions.append(condition)
        emo_vecs.append(emo_vec)
        progress.update(rank + 1)
    return torch.cat(conditions).numpy(), torch.stack(emo_vecs).numpy()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model-dim", type=int, default=256, help="width D of the model to train")
    parser.add_argument("--prompts-per-speaker", type=int, default=12, help="0 = every training recording")
    parser.add_argument("--seed", type=int, default=1234)
    args: argparse.Namespace = parser.parse_args(argv)
    use_glibc_heap()
    rows = read_jsonl(args.recordings, ["id", "text", "audio"],
                      'Each line is an object such as {"id": "1", "speaker": "a", "text": "ሰላም", "audio": "1.wav"}')
    check_ids(rows, args.recordings)
    codec, tokenizer = SpeechCodec.load(args.codec), load_tokenizer(args.tokenizer)
    utterances, codes, text_ids = preprocess(rows, args.recordings, codec, tokenizer)
    durations = [row["duration"] for row in utterances]
    prompts = choose_prompts(rows, durations, args.prompts_per_speaker, args.seed)
    condition, emo_vec = prompt_arrays(utterances, prompts, args.recordings.parent, codec, args.model_dim)
    for name, array in (("codes", codes), ("text_ids", text_ids), ("condition", condition), ("emo_vec", emo_vec)):
        save_array(args.output_dir / f"{name}.npy", array)
    write_jsonl(args.output_dir / "utterances.jsonl", utterances)
    info(f"{len(rows)} utterances, {sum(durations) / 60:.0f} minutes, {len(codes)} codes, {len(np.unique(codes))} of "
         f"{codec.config.num_codes} in use, {len(prompts)} prompts -> {args.output_dir}")


if __name__ == "__main__":
    run_program(main)
