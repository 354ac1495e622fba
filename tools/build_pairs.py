"""Prompt/target pairs for the GPT: train_pairs.jsonl and val_pairs.jsonl from the utterances that preprocess wrote.

Each utterance is the target of --pairs-per-target rows. Its prompt is another recording of the same speaker that says
another sentence, drawn from those that have a condition. Rows have the fields of the IndexTTS2 fine-tuning manifests,
and *_start says where in each array the utterance begins.

The draw depends on --seed, the target's id and the speaker's prompts. In training, pairs are then moved from the most
to the least used prompts until each is used as often as the mean of its speaker's prompts, give or take a tenth (or
one). Where sentences forbid that, no pair is left whose prompt is used over one time more than another that could take
its place. Validation pairs stay as drawn: those of old recordings do not change when new ones come, unless these change
the speaker's prompts, which tools.preprocess draws from the longer half.

The emo_vec of a pair is its prompt's or its target's, as --emo-source says. With --emo-source prompt rows have both
where all utterances have an emo_vec: every trainer takes the prompt's then, unless ours is told otherwise.

A folder of a fork's preprocessing (train_manifest.jsonl and val_manifest.jsonl, see tools/fork_manifests.py) is paired
alike.

Left out, counted and named: targets beyond --max-text-tokens or --max-codes, and speakers who have no prompt left: one
clip alone, or all prompts outside --min-prompt-seconds to --max-prompt-seconds.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools._common import Progress, ToolError, info, make_parser, read_jsonl, run_program, warn, write_jsonl, writing_to
from tools.amharic_text import TEXT_RULES, letters_of
from tools.fork_manifests import is_fork_folder, keep_apart, read_utterances
from tools.made_with import of_manifest, read_yaml, recorded, require_same
from tools.preprocess import locked, share_of
from tools.text_rules import language_of, rules_of

FIRST_COMMAND = "python -m tools.build_pairs --data-dir build/arrays"
REMEDY = "tools.preprocess writes it"
UTTERANCE_KEYS = ["id", "speaker", "split", "text", "duration", "text_ids_start", "text_len", "codes_start", "code_len"]


@dataclass(frozen=True)
class Limits:
    """What a pair may have at most."""

    text_tokens: float = math.inf
    codes: float = math.inf
    min_prompt_seconds: float = 0
    max_prompt_seconds: float = math.inf


def emo_fields(prompt: dict[str, Any], target: dict[str, Any], emo_source: str, seed: int) -> dict[str, Any]:
    """Where the emo_vec of a pair lies; for "both" its target's too. "mixed" depends on seed and pair alone."""
    if emo_source == "mixed":
        emo_source = "target" if share_of(f"{seed} emo {target['id']} {prompt['id']}") < 0.5 else "prompt"
    chosen = {"prompt": {"prompt": prompt}, "target": {"target": target},
              "both": {"prompt": prompt, "target": target}}[emo_source]
    return {key: value for name, row in chosen.items() for key, value in (
        (f"{name}_emo_vec_path", row.get("emo_vec_path", "emo_vec.npy")),
        (f"{name}_emo_vec_start", row["emo_vec_start"]))}


def pair_row(prompt: dict[str, Any], target: dict[str, Any], shipped: set[str] | None, emo_source: str = "prompt",
             seed: int = 0) -> dict[str, Any]:
    """One manifest row. An audio path outside `shipped` (None = everything is there) is written as an empty string."""
    def audio(utterance: dict[str, Any]) -> str:
        path = utterance.get("audio", "")
        return path if shipped is None or path in shipped else ""

    row = {
        "id": f"{target['id']}__{prompt['id']}", "speaker": target["speaker"],
        "language": target.get("language", "am"), "prompt_language": prompt.get("language", "am"),
        "target_language": target.get("language", "am"),
        "prompt_id": prompt["id"], "prompt_audio_path": audio(prompt),
        "prompt_duration": prompt.get("known_duration", prompt["duration"]),
        "prompt_condition_path": prompt.get("condition_path", "condition.npy"),
        "prompt_condition_start": prompt["condition_start"], "prompt_condition_len": prompt["condition_len"],
        **emo_fields(prompt, target, emo_source, seed),
        "target_id": target["id"], "target_audio_path": audio(target), "target_text": target["text"],
        "target_text_ids_path": target.get("text_ids_path", "text_ids.npy"),
        "target_text_ids_start": target["text_ids_start"], "target_text_len": target["text_len"],
        "target_codes_path": target.get("codes_path", "codes.npy"), "target_codes_start": target["codes_start"],
        "target_code_len": target["code_len"],
    }
    return {key: value for key, value in row.items() if value is not None}  # a fork's array holds one clip: no start


def with_keys(utterances: Sequence[dict[str, Any]], rules: int = TEXT_RULES) -> list[dict[str, Any]]:
    """The rows, each with its sentence in a form to compare; `rules` are those of their texts."""
    progress, rows = Progress("sentences", len(utterances)), []
    for done, row in enumerate(utterances, 1):
        rows.append(row if "key" in row else row | {"key": letters_of(row["text"], language_of(row), rules)})
        progress.update(done)
    return rows


def fits(prompt: dict[str, Any], target: dict[str, Any]) -> bool:
    """Whether a prompt may speak for a target: with its sentence or its very sound, the model would learn to copy."""
    return prompt["key"] != target["key"] and not (prompt.get("audio") and prompt["audio"] == target.get("audio"))


def draw_prompts(prompts: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]], per_target: int, seed: int
                 ) -> list[list[int]]:
    """For each target indices of its prompts, distinct; fewer than per_target where there are fewer. All fit it (nor is
    one the target itself)."""
    same_sentence: dict[str, list[int]] = {}
    same_sound: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        same_sentence.setdefault(prompt["key"], []).append(index)
        if prompt.get("audio"):
            same_sound.setdefault(prompt["audio"], []).append(index)

    def left_before(excluded: Sequence[int]) -> list[int]:
        return [index - rank for rank, index in enumerate(excluded)]

    of_sentence = {key: left_before(excluded) for key, excluded in same_sentence.items()}
    drawn = []
    for target in targets:
        before = of_sentence.get(target["key"], [])
        more = [i for i in same_sound.get(target.get("audio", ""), []) if prompts[i]["key"] != target["key"]]
        if more:
            before = left_before(sorted([*same_sentence.get(target["key"], []), *more]))
        left = len(prompts) - len(before)
        chosen = random.Random(f"{seed} {target['id']}").sample(range(left), min(per_target, left))
        # From the i-th of those that are left to the i-th of all.
        drawn.append([index + bisect.bisect_right(before, index) for index in chosen])
    return drawn


def even_out(drawn: list[list[int]], prompts: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
    """Moves targets from often to seldom used prompts, in place, until every use is within a tenth (or one) of the
    mean, or else until no move to a prompt that fits and is used two times less is left."""
    users: list[list[int]] = [[] for _ in prompts]
    for number, chosen in enumerate(drawn):
        for prompt in chosen:
            users[prompt].append(number)
    uses = [len(targets_of) for targets_of in users]
    mean = sum(uses) / max(1, len(uses))
    lowest, highest = min(0.9 * mean, mean - 1), max(1.1 * mean, mean + 1)
    least_first = [(count, prompt) for prompt, count in enumerate(uses)]
    heapq.heapify(least_first)
    for giver in sorted(range(len(prompts)), key=lambda prompt: -uses[prompt]):
        for number in users[giver]:
            while least_first[0][0] != uses[least_first[0][1]]:  # an entry of before a move
                heapq.heapreplace(least_first, (uses[least_first[0][1]], least_first[0][1]))
            least, taker = least_first[0]
            if uses[giver] - least < 2 or (uses[giver] <= highest and (least >= lowest or uses[giver] <= mean)):
                break
            if taker not in drawn[number] and fits(prompts[taker], targets[number]):
                drawn[number][drawn[number].index(giver)] = taker
                uses[giver], uses[taker] = uses[giver] - 1, uses[taker] + 1
    if uses and (min(uses) < lowest or max(uses) > highest):  # the least used one was barred, and hid the others
        even_out_around_barred(drawn, prompts, targets, uses)


def even_out_around_barred(drawn: list[list[int]], prompts: Sequence[dict[str, Any]],
                           targets: Sequence[dict[str, Any]], uses: list[int]) -> None:
    """Moves targets, in place, until none has a prompt that is used two times more than one that could take its place.

    Sentence by sentence: the prompts that say it are then set aside once, not for each target.
    """
    of_sentence: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        of_sentence.setdefault(target["key"], []).append(number)
    least_first = [(count, prompt) for prompt, count in enumerate(uses)]
    heapq.heapify(least_first)
    moved = True
    while moved:
        moved = False
        for numbers in of_sentence.values():
            saying_it: list[tuple[int, int]] = []
            for number in filter(drawn.__getitem__, numbers):
                giver = max(drawn[number], key=uses.__getitem__)
                taker = take_least(least_first, uses, uses[giver] - 2, saying_it, prompts, targets[number],
                                   drawn[number])
                if taker is None:
                    continue
                drawn[number][drawn[number].index(giver)] = taker
                uses[giver], uses[taker], moved = uses[giver] - 1, uses[taker] + 1, True
                for prompt in (giver, taker):
                    heapq.heappush(least_first, (uses[prompt], prompt))
            for entry in saying_it:
                heapq.heappush(least_first, entry)


def take_least(least_first: list[tuple[int, int]], uses: Sequence[int], most: int, saying_it: list[tuple[int, int]],
               prompts: Sequence[dict[str, Any]], target: dict[str, Any], has: Sequence[int]) -> int | None:
    """Takes the least used prompt that fits the target, is not among those it `has`, and has at most `most` uses, from
    the heap of (uses, prompt). Prompts with the target's sentence go from the heap to `saying_it`."""
    others, found = [], None
    while found is None and least_first and least_first[0][0] <= most:
        count, prompt = heapq.heappop(least_first)
        if count != uses[prompt]:  # an entry of before a move
            continue
        if prompts[prompt]["key"] == target["key"]:
            saying_it.append((count, prompt))
        elif prompt in has or not fits(prompts[prompt], target):
            others.append((count, prompt))
        else:
            found = prompt
    for entry in others:
        heapq.heappush(least_first, entry)
    return found


def by_speaker(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    speakers: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        speakers.setdefault(row["speaker"], []).append(row)
    return speakers


def why_no_target(row: dict[str, Any], limits: Limits) -> str:
    """The limit that a target breaks, or ""."""
    if row["text_len"] > limits.text_tokens:
        return "over --max-text-tokens"
    return "over --max-codes" if row["code_len"] > limits.codes else ""


def is_prompt(row: dict[str, Any], limits: Limits) -> bool:
    return "condition_start" in row and limits.min_prompt_seconds <= row["duration"] <= limits.max_prompt_seconds


def build_pairs(utterances: Sequence[dict[str, Any]], split: str, pairs_per_target: int, seed: int,
                shipped: set[str] | None = None, limits: Limits = Limits(), emo_source: str = "prompt"
                ) -> list[dict[str, Any]]:
    """Rows of one split in the utterances' order. Targets beyond the limits or without a prompt have none."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for rows in by_speaker(with_keys(utterances)).values():
        prompts = [row for row in rows if is_prompt(row, limits)]
        targets = [row for row in rows if row["split"] == split and not why_no_target(row, limits)]
        drawn = draw_prompts(prompts, targets, pairs_per_target, seed)
        if split == "train":
            even_out(drawn, prompts, targets)
        for target, chosen in zip(targets, drawn, strict=True):
            pairs[target["id"]] = [pair_row(prompts[i], target, shipped, emo_source, seed) for i in chosen]
    return [pair for row in utterances for pair in pairs.get(row["id"], [])]


def reasons_left_out(rows: Sequence[dict[str, Any]], paired: set[str], limits: Limits) -> collections.Counter[str]:
    """Why utterances of one speaker are no targets, with counts. `paired` are the ids of all that are."""
    prompts = sum(is_prompt(row, limits) for row in rows)
    reasons: collections.Counter[str] = collections.Counter()
    for row in rows:
        if row["id"] in paired:
            continue
        if len(rows) == 1:
            alone = "the speaker has one clip, and a prompt must be another one"
        elif prompts:
            alone = "no prompt of the speaker says another sentence; raise tools.preprocess --prompts-per-speaker"
        elif any("condition_start" in row for row in rows):
            alone = "no prompt of the speaker has --min-prompt-seconds to --max-prompt-seconds"
        else:
            alone = "no recording of the speaker has a condition; see skipped.jsonl"
        reasons[why_no_target(row, limits) or alone] += 1
    return reasons


def say_summary(utterances: Sequence[dict[str, Any]], pairs: dict[str, list[dict[str, Any]]], limits: Limits) -> None:
    """One line per speaker, and one more for what was left out."""
    paired = {pair["target_id"] for rows in pairs.values() for pair in rows}
    training, validation = by_speaker(pairs["train"]), by_speaker(pairs["val"])
    for speaker, rows in sorted(by_speaker(utterances).items()):
        uses = collections.Counter(pair["prompt_id"] for pair in training.get(speaker, []))
        often = f", each used {min(uses.values())} to {max(uses.values())} times in training" if uses else ""
        prompts = sum(is_prompt(row, limits) for row in rows)
        info(f"speaker {speaker!r}: {len(rows)} clips, {sum(row['duration'] for row in rows) / 3600:.2f} hours -> "
             f"{len(training.get(speaker, []))} training and {len(validation.get(speaker, []))} validation pairs, "
             f"{prompts} prompts{often}")
        for reason, count in reasons_left_out(rows, paired, limits).items():
            warn(f"speaker {speaker!r}: {count} clips left out: {reason}")


def check_utterances(utterances: Sequence[dict[str, Any]], path: Path) -> None:
    """What preprocess promises, in case the file was edited. Raises: ToolError naming the row."""
    sentences = {row["key"] for row in utterances if row["split"] == "val"}
    seen = set()
    for number, row in enumerate(utterances, 1):
        if row["id"] in seen:
            raise ToolError(f"{path}, row {number}: id {row['id']!r} occurs twice. Run tools.preprocess again")
        seen.add(row["id"])
        if row["split"] == "train" and row["key"] in sentences:
            raise ToolError(f"{path}, row {number} ({row['id']}): validation has the sentence of this training row, "
                            f"{row['text']!r}. Mark splits in the recordings file and run tools.preprocess again")


def choose_emo_source(utterances: Sequence[dict[str, Any]], asked: str, path: Path) -> str:
    """That of the rows: "both" for prompt where every utterance has an emo_vec. Raises: ToolError."""
    without = [row["id"] for row in utterances if "emo_vec_start" not in row]
    if asked != "prompt" and without:
        raise ToolError(f"--emo-source {asked}: {len(without)} of {len(utterances)} utterances have no emo_vec, "
                        f"{without[0]!r} first ({path}). Preprocess with the emo_vec of every utterance, or take "
                        "--emo-source prompt")
    return "both" if asked == "prompt" and not without else asked


def check_shards(data_dir: Path, utterances: Sequence[dict[str, Any]]) -> None:
    """What the rows point into was made as config.yaml says. Raises: ToolError naming both."""
    folders = {Path(row["codes_path"]).parent for row in utterances if "codes_path" in row}
    merged = of_manifest(data_dir / "utterances.jsonl")
    for path in sorted(data_dir / folder / "shard.json" for folder in folders):
        shard = read_yaml(path)  # JSON is YAML
        found = recorded({"codec_sha256": shard.get("--codec"), "tokenizer_sha256": shard.get("--tokenizer"),
                          "text_rules": shard.get("text rules"), "front_end": shard.get("front end")})
        require_same(str(data_dir / "config.yaml"), merged, str(path), found,
                     remedy="Run all shards again with the same files, then tools.preprocess --merge")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises: ToolError naming the flag."""
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--data-dir", type=Path, required=True, help="where preprocess wrote; gets the two manifests")
    parser.add_argument("--pairs-per-target", type=int, default=1, help="rows of each target (1)")
    parser.add_argument("--max-text-tokens", type=int, default=0, help="of a target, 0 = as preprocess let through (0)")
    parser.add_argument("--max-codes", type=int, default=0, help="of a target, 0 = as preprocess let through (0)")
    parser.add_argument("--min-prompt-seconds", type=float, default=0.0, help="shorter recordings are no prompts (0)")
    parser.add_argument("--max-prompt-seconds", type=float, default=0.0, help="nor are longer ones, 0 = no limit (0)")
    parser.add_argument("--emo-source", choices=["prompt", "target", "mixed"], default="prompt",
                        help="whose emo_vec a pair takes; mixed: half of the pairs the target's, for good, where the "
                        "trainer's own --emo-source mixed draws anew in every epoch (prompt)")
    parser.add_argument("--seed", type=int, default=1234, help="of the draw (1234)")
    args = parser.parse_args(argv)
    if args.pairs_per_target < 1:
        raise ToolError(f"--pairs-per-target {args.pairs_per_target}: give 1 or more")
    for name in ("max_text_tokens", "max_codes", "min_prompt_seconds", "max_prompt_seconds"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ToolError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    if 0 < args.max_prompt_seconds < args.min_prompt_seconds:
        raise ToolError("--min-prompt-seconds is above --max-prompt-seconds, so that no prompt is left")
    return args


@contextlib.contextmanager
def reserved(data_dir: Path) -> Iterator[None]:
    """Keeps tools.preprocess from publishing other arrays, here or in a shard, below the pairs that are being built.

    Raises: ToolError when one is running.
    """
    with contextlib.ExitStack() as locks:
        for folder in [data_dir, *sorted(data_dir.glob("shard_*_of_*/"))]:
            locks.enter_context(locked(folder))
        yield


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    path = args.data_dir / "utterances.jsonl"
    limits = Limits(args.max_text_tokens or math.inf, args.max_codes or math.inf, args.min_prompt_seconds,
                    args.max_prompt_seconds or math.inf)
    is_fork = is_fork_folder(args.data_dir)
    if not path.is_file() and not is_fork:  # a lock would make the folder
        raise ToolError(f"{path}: no such file. {REMEDY}")
    with reserved(args.data_dir):
        rules = rules_of(of_manifest(path), str(path.with_name("config.yaml")))
        utterances = with_keys(read_utterances(args.data_dir) if is_fork else
                               read_jsonl(path, UTTERANCE_KEYS, REMEDY), rules)
        utterances = keep_apart(utterances) if is_fork else utterances
        check_utterances(utterances, path)
        check_shards(args.data_dir, utterances)
        emo_source = choose_emo_source(utterances, args.emo_source, path)
        pairs = {split: build_pairs(utterances, split, args.pairs_per_target, args.seed, None, limits, emo_source)
                 for split in ("train", "val")}
        say_summary(utterances, pairs, limits)
        for split, rows in pairs.items():
            if not rows:
                raise ToolError(f"{args.data_dir}: not one {split} pair can be built. The lines above say what is left "
                                "out")
        with writing_to(args.data_dir):
            for split, rows in pairs.items():
                write_jsonl(args.data_dir / f"{split}_pairs.jsonl", rows)
                info(f"{len(rows)} pairs -> {args.data_dir / f'{split}_pairs.jsonl'}")


if __name__ == "__main__":
    run_program(main)
