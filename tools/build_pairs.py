"""Prompt/target pairs for the GPT: train_pairs.jsonl and val_pairs.jsonl from the utterances that preprocess wrote.

Each utterance is the target of --prompts-per-target rows. Its prompt is another recording of the same speaker, drawn
from the prompts that have a condition, never the target itself. Rows have the fields of the IndexTTS2 fine-tuning
manifests, and *_start says where in each array the utterance begins. When no utterance is marked "val",
--validation-share of the texts becomes validation.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools._common import ToolError, info, make_parser, read_jsonl, run_program, write_jsonl

FIRST_COMMAND = "python -m tools.build_pairs --data-dir build/arrays"
UTTERANCE_KEYS = ["id", "speaker", "split", "text", "duration", "text_ids_start", "text_len", "codes_start", "code_len"]


def pair_row(prompt: dict[str, Any], target: dict[str, Any], shipped: set[str] | None) -> dict[str, Any]:
    """One manifest row. An audio path outside `shipped` (None = everything is there) is written as an empty string."""
    def audio(utterance: dict[str, Any]) -> str:
        path = utterance.get("audio", "")
        return path if shipped is None or path in shipped else ""

    return {
        "id": f"{target['id']}__{prompt['id']}", "speaker": target["speaker"],
        "language": target.get("language", "am"), "prompt_language": prompt.get("language", "am"),
        "target_language": target.get("language", "am"),
        "prompt_id": prompt["id"], "prompt_audio_path": audio(prompt), "prompt_duration": prompt["duration"],
        "prompt_condition_path": "condition.npy", "prompt_condition_start": prompt["condition_start"],
        "prompt_condition_len": prompt["condition_len"],
        "prompt_emo_vec_path": "emo_vec.npy", "prompt_emo_vec_start": prompt["emo_vec_start"],
        "target_id": target["id"], "target_audio_path": audio(target), "target_text": target["text"],
        "target_text_ids_path": "text_ids.npy", "target_text_ids_start": target["text_ids_start"],
        "target_text_len": target["text_len"],
        "target_codes_path": "codes.npy", "target_codes_start": target["codes_start"],
        "target_code_len": target["code_len"],
    }


def build_pairs(utterances: Sequence[dict[str, Any]], split: str, prompts_per_target: int, seed: int,
                shipped: set[str] | None = None) -> list[dict[str, Any]]:
    """Rows of one split in the utterances' order. The choice of prompts depends on the seed and the target's id only.

    Raises ToolError for a target whose speaker has no other recording to prompt with.
    """
    pools: dict[str, list[dict[str, Any]]] = {}
    for utterance in utterances:
        if "condition_start" in utterance:
            pools.setdefault(utterance["speaker"], []).append(utterance)
    rows = []
    for target in utterances:
        if target["split"] != split:
            continue
        others = [prompt for prompt in pools.get(target["speaker"], []) if prompt["id"] != target["id"]]
        if not others:
            raise ToolError(f"{target['id']}: speaker {target['speaker']!r} has no other recording to serve as prompt. "
                            "Raise --prompts-per-speaker of tools.preprocess, or remove the speaker")
        chosen = random.Random(f"{seed} {target['id']}").sample(others, min(prompts_per_target, len(others)))
        rows += [pair_row(prompt, target, shipped) for prompt in chosen]
    return rows


def hold_out_texts(utterances: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """The utterances with `share` of their texts, one at least, moved to "val" unless some are there already.

    All recordings of a text go together, and texts of prompts stay in training.
    """
    if any(row["split"] == "val" for row in utterances):
        return list(utterances)
    of_prompts = {row["text"] for row in utterances if "condition_start" in row}
    texts = sorted({row["text"] for row in utterances} - of_prompts)
    if not texts:
        raise ToolError("every text belongs to a prompt, so none is left for validation. Add recordings, mark some "
                        'with "split": "val", or lower --prompts-per-speaker of tools.preprocess')
    chosen = set(random.Random(seed).sample(texts, max(1, round(share * len(texts)))))
    return [row | {"split": "val"} if row["text"] in chosen else row for row in utterances]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--data-dir", type=Path, required=True, help="where preprocess wrote; gets the two manifests")
    parser.add_argument("--prompts-per-target", type=int, default=1)
    parser.add_argument("--validation-share", type=float, default=0.02, help="of the texts, if none is marked val")
    parser.add_argument("--seed", type=int, default=1234)
    args: argparse.Namespace = parser.parse_args(argv)
    if args.prompts_per_target < 1:
        raise ToolError(f"--prompts-per-target {args.prompts_per_target}: give 1 or more")
    if not 0 < args.validation_share < 1:
        raise ToolError(f"--validation-share {args.validation_share}: give a number between 0 and 1, such as 0.02")
    utterances = read_jsonl(args.data_dir / "utterances.jsonl", UTTERANCE_KEYS, "tools.preprocess writes it")
    utterances = hold_out_texts(utterances, args.validation_share, args.seed)
    for split, name in (("train", "train_pairs.jsonl"), ("val", "val_pairs.jsonl")):
        rows = build_pairs(utterances, split, args.prompts_per_target, args.seed)
        write_jsonl(args.data_dir / name, rows)
        info(f"{len(rows)} pairs -> {args.data_dir / name}")


if __name__ == "__main__":
    run_program(main)
