"""tools.build_pairs: prompts of the same voice and another sentence, used evenly; what is left out is named."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl

from tools import build_pairs
from tools._common import ToolError

LETTERS = "ለመረሰቀበተነከወዘየደገጠፈ"


def utterance(number: int, speaker: str, prompt: bool = False, **more: Any) -> dict[str, Any]:
    """Row `number`, whose sentence is its own."""
    row = {"id": f"{speaker}{number}", "speaker": speaker, "language": "am", "split": "train",
           "text": "".join(LETTERS[number // 16**k % 16] for k in range(4)), "audio": f"wavs/{number}.wav",
           "duration": 2.0 + number % 10, "text_ids_start": 4 * number, "text_len": 4 + number % 5,
           "codes_start": 99 * number, "code_len": 40 + number % 50}
    if prompt:
        row |= {"condition_start": 32 * number, "condition_len": 32, "emo_vec_start": number}
    return row | more


def corpus(count: int = 60, prompts: int = 5) -> list[dict[str, Any]]:
    """Two speakers with `count` utterances each, the first of them prompts and the last tenth validation."""
    return [utterance(1000 * s + i, f"s{s}", i < prompts, split="val" if i >= 0.9 * count else "train")
            for s in range(2) for i in range(count)]


def run(folder: Path, rows: Sequence[dict[str, Any]], *flags: object) -> tuple[str, list[dict], list[dict]]:
    """build_pairs as its users call it: what it printed, training and validation pairs."""
    (folder / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        build_pairs.main(["--data-dir", str(folder), *map(str, flags)])
    training, validation = (read_jsonl(folder / f"{split}_pairs.jsonl") for split in ("train", "val"))
    return printed.getvalue(), training, validation


def uses(pairs: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(pair["prompt_id"] for pair in pairs)


def test_rows_point_to_prompt_and_target_wherever_these_lie(tmp_path: Path):
    prompt = utterance(3, "a", True, condition_path="shard_1/condition.npy", emo_vec_path="shard_1/emo_vec.npy")
    target = utterance(4, "a", codes_path="shard_2/codes.npy", text_ids_path="shard_2/text_ids.npy")
    _, training, validation = run(tmp_path, [prompt, target, utterance(5, "a", split="val")])
    assert training == [{
        "id": "a4__a3", "speaker": "a", "language": "am", "prompt_language": "am", "target_language": "am",
        "prompt_id": "a3", "prompt_audio_path": "wavs/3.wav", "prompt_duration": 5.0,
        "prompt_condition_path": "shard_1/condition.npy", "prompt_condition_start": 96, "prompt_condition_len": 32,
        "prompt_emo_vec_path": "shard_1/emo_vec.npy", "prompt_emo_vec_start": 3, "target_id": "a4",
        "target_audio_path": "wavs/4.wav", "target_text": target["text"],
        "target_text_ids_path": "shard_2/text_ids.npy", "target_text_ids_start": 16, "target_text_len": 8,
        "target_codes_path": "shard_2/codes.npy", "target_codes_start": 396, "target_code_len": 44,
    }]
    assert validation[0]["target_codes_path"] == "codes.npy" and validation[0]["prompt_id"] == "a3"


@pytest.mark.parametrize("per_target", [1, 3, 9])
def test_prompts_are_distinct_others_of_the_same_voice(tmp_path: Path, per_target: int):
    rows = corpus()
    _, training, validation = run(tmp_path, rows, "--pairs-per-target", per_target)
    speaker = {row["id"]: row["speaker"] for row in rows}
    for pair in training + validation:
        assert speaker[pair["prompt_id"]] == pair["speaker"] == speaker[pair["target_id"]]
        assert pair["prompt_id"] != pair["target_id"]
    of_target = Counter(pair["target_id"] for pair in training + validation)
    is_prompt = {row["id"] for row in rows if "condition_start" in row}
    assert of_target == {row["id"]: min(per_target, 4 if row["id"] in is_prompt else 5) for row in rows}
    assert len({pair["id"] for pair in training + validation}) == len(training) + len(validation)


def test_a_prompt_never_says_the_targets_sentence_in_any_spelling(tmp_path: Path):
    rows = [utterance(0, "a", True, text="ሰላም ለዓለም"), utterance(1, "a", True, text="ቤት"),
            utterance(2, "a", text="ሠላም ለአለም።"), utterance(3, "a", split="val")]
    _, training, _ = run(tmp_path, rows, "--pairs-per-target", 5)
    assert {(pair["target_id"], pair["prompt_id"]) for pair in training} == {("a0", "a1"), ("a1", "a0"), ("a2", "a1")}


@pytest.mark.parametrize(("count", "prompts", "per_target"), [(60, 5, 1), (60, 5, 3), (400, 12, 1), (30, 30, 1),
                                                              (3, 3, 1), (500, 3, 2)])
def test_training_uses_every_prompt_of_a_speaker_nearly_equally_often(count: int, prompts: int, per_target: int):
    rows = corpus(count, prompts)
    pairs = build_pairs.build_pairs([row | {"split": "train"} for row in rows], "train", per_target, 1234)
    counted = uses(pairs)
    for speaker in ("s0", "s1"):
        of_speaker = [counted[row["id"]] for row in rows if row["speaker"] == speaker and "condition_start" in row]
        mean = sum(of_speaker) / prompts
        assert max(of_speaker) <= max(1.1 * mean, mean + 1) and min(of_speaker) >= min(0.9 * mean, mean - 1)
    for pair in pairs:
        assert pair["prompt_id"] != pair["target_id"]
    assert len({pair["id"] for pair in pairs}) == len(pairs)


def test_evening_out_gives_no_target_the_same_prompt_twice():
    rows = [row | {"key": row["text"]} for row in corpus(24, 3) if row["speaker"] == "s0"]
    drawn = [[0, 1] for _ in range(20)]
    build_pairs.even_out(drawn, rows[:3], rows[4:])
    assert all(len(set(chosen)) == 2 for chosen in drawn)
    counted = Counter(prompt for chosen in drawn for prompt in chosen)
    assert sorted(counted) == [0, 1, 2] and max(counted.values()) - min(counted.values()) <= 3


def test_the_draw_alone_would_not_be_even():
    rows = [row | {"key": row["text"]} for row in corpus(400, 12) if row["speaker"] == "s0"]
    drawn = build_pairs.draw_prompts(rows[:12], rows, 1, 1234)
    counted = Counter(prompt for chosen in drawn for prompt in chosen)
    assert max(counted.values()) > 1.1 * 400 / 12


def test_a_recording_is_never_its_own_prompt_under_another_id(tmp_path: Path):
    rows = [*corpus(10, 5), utterance(11, "s0", True, id="dup", audio="wavs/0.wav")]
    for per_target in (1, 9):
        _, training, validation = run(tmp_path, rows, "--pairs-per-target", per_target)
        assert all(pair["prompt_audio_path"] != pair["target_audio_path"] for pair in training + validation)
        assert {"dup", "s00"} <= {pair["target_id"] for pair in training}


def random_rows(seed: int) -> tuple[list[dict[str, Any]], int]:
    """Utterances of which few sentences are frequent and some share their sound, and how many of them are prompts."""
    rng = random.Random(seed)
    sentences = rng.choices(range(20), [rng.random() ** 3 for _ in range(20)], k=rng.randint(12, 120))
    rows = [{"id": f"x{i}", "key": f"sentence {key}", "audio": f"{rng.randrange(200)}.wav"}
            for i, key in enumerate(sentences)]
    return rows, rng.randint(1, 12)


@pytest.mark.parametrize("seed", range(20))
def test_evening_out_leaves_no_target_whose_prompt_is_used_two_times_more_than_another_that_fits(seed: int):
    rows, count = random_rows(seed)
    prompts, per_target = rows[:count], 1 + seed % 3
    drawn = build_pairs.draw_prompts(prompts, rows, per_target, seed)
    before = [len(chosen) for chosen in drawn]
    build_pairs.even_out(drawn, prompts, rows)
    counted = Counter(prompt for chosen in drawn for prompt in chosen)
    mean = counted.total() / count
    even = all(min(0.9 * mean, mean - 1) <= counted[i] <= max(1.1 * mean, mean + 1) for i in range(count))
    assert before == [len(set(chosen)) for chosen in drawn]
    for chosen, target in zip(drawn, rows, strict=True):
        assert all(build_pairs.fits(prompts[prompt], target) for prompt in chosen)
        free = [i for i in range(count) if i not in chosen and build_pairs.fits(prompts[i], target)]
        assert even or all(counted[prompt] - counted[i] < 2 for prompt in chosen for i in free)


def test_prompts_that_say_a_frequent_sentence_do_not_keep_the_others_uneven():
    rows = [utterance(i, "a", key="often" if i < 4 else f"prompt {i}") for i in range(12)]
    rows += [utterance(i, "a", key="often" if i < 312 else f"target {i}") for i in range(12, 372)]
    drawn = build_pairs.draw_prompts(rows[:12], rows, 1, 1234)
    build_pairs.even_out(drawn, rows[:12], rows)
    counted = Counter(prompt for chosen in drawn for prompt in chosen)
    assert [counted[i] for i in range(12)] == [17] * 4 + [38] * 8


@pytest.mark.parametrize("seed", range(20))
def test_the_draw_is_one_of_a_list_of_all_that_fit(seed: int):
    rows, count = random_rows(seed)
    for target, chosen in zip(rows, build_pairs.draw_prompts(rows[:count], rows, 2, seed), strict=True):
        fitting = [i for i in range(count) if build_pairs.fits(rows[i], target)]
        places = random.Random(f"{seed} {target['id']}").sample(range(len(fitting)), min(2, len(fitting)))
        assert chosen == [fitting[place] for place in places]


def test_pairs_are_a_function_of_the_seed(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again = (run(tmp_path / name, corpus())[1:] for name in "ab")
    other = run(tmp_path / "b", corpus(), "--seed", 7)[1:]
    assert first == again != other
    assert (tmp_path / "a/val_pairs.jsonl").read_bytes() != (tmp_path / "b/val_pairs.jsonl").read_bytes()


def test_validation_pairs_stay_when_recordings_are_added(tmp_path: Path):
    rows = corpus()
    _, _, before = run(tmp_path, rows)
    added = [utterance(5000 + i, "s0", split="val" if i % 2 else "train") for i in range(200)]
    _, _, after = run(tmp_path, [*rows, *added])
    assert before == [pair for pair in after if pair["target_id"] in {row["id"] for row in rows}]
    assert len(after) == len(before) + 100


def test_targets_and_prompts_beyond_the_limits_are_left_out_and_counted(tmp_path: Path):
    printed, training, validation = run(tmp_path, corpus(), "--max-text-tokens", 6, "--max-codes", 80,
                                        "--min-prompt-seconds", 3, "--max-prompt-seconds", 5)
    for pair in training + validation:
        assert pair["target_text_len"] <= 6 and pair["target_code_len"] <= 80 and 3 <= pair["prompt_duration"] <= 5
    rows = corpus()
    kept = [row for row in rows if row["text_len"] <= 6 and row["code_len"] <= 80]
    assert {pair["target_id"] for pair in training + validation} == {row["id"] for row in kept}
    long_text = sum(row["text_len"] > 6 and row["speaker"] == "s0" for row in rows)
    assert f"[Warn] speaker 's0': {long_text} clips left out: over --max-text-tokens" in printed
    assert "clips left out: over --max-codes" in printed and ", 3 prompts, each used " in printed


def test_a_speaker_without_a_prompt_is_named_and_left_out(tmp_path: Path):
    alone = utterance(7001, "alone", True)
    mute = [utterance(7100 + i, "mute") for i in range(3)]
    short = [utterance(7200 + i, "short", i == 0, duration=1.0) for i in range(3)]
    parrots = [utterance(7300 + i, "parrot", i == 0, text="ሰላም") for i in range(2)]
    rows = [*corpus(), alone, *mute, *short, *parrots]
    printed, training, _ = run(tmp_path, rows, "--min-prompt-seconds", 2)
    assert {pair["speaker"] for pair in training} == {"s0", "s1"}
    for line in ("speaker 'alone': 1 clips left out: the speaker has one clip, and a prompt must be another one",
                 "speaker 'mute': 3 clips left out: no recording of the speaker has a condition",
                 "speaker 'short': 3 clips left out: no prompt of the speaker has --min-prompt-seconds",
                 "speaker 'parrot': 2 clips left out: no prompt of the speaker says another sentence"):
        assert f"[Warn] {line}" in printed


def test_the_summary_counts_every_speaker(tmp_path: Path):
    printed, training, _ = run(tmp_path, corpus())
    often = uses([pair for pair in training if pair["speaker"] == "s1"]).values()
    hours = sum(row["duration"] for row in corpus() if row["speaker"] == "s1") / 3600
    assert (f"[Info] speaker 's1': 60 clips, {hours:.2f} hours -> 54 training and 6 validation pairs, 5 prompts, each "
            f"used {min(often)} to {max(often)} times in training") in printed


@pytest.mark.parametrize(("change", "message"), [
    ({"id": "s00"}, "row 60: id 's00' occurs twice"),
    ({"text": utterance(0, "s0")["text"] + "።"}, r"row 1 \(s00\): validation has the sentence of this training row"),
    ({"split": None}, ""),
])
def test_edited_utterances_that_break_the_promises_are_refused(tmp_path: Path, change: dict, message: str):
    rows = corpus()
    rows[59] |= change
    if not message:
        del rows[59]["split"]
        message = "utterances.jsonl, line 60: missing split"
    with pytest.raises(ToolError, match=message):
        run(tmp_path, rows)
    assert not (tmp_path / "train_pairs.jsonl").exists()


@pytest.mark.parametrize("flags", [("--pairs-per-target", 0), ("--max-codes", -1), ("--max-prompt-seconds", "nan"),
                                   ("--min-prompt-seconds", 5, "--max-prompt-seconds", 4)])
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, flags: tuple):
    with pytest.raises(ToolError, match=flags[0]):
        run(tmp_path, corpus(), *flags)


def test_no_pair_at_all_is_an_error_that_leaves_older_pairs_alone(tmp_path: Path):
    run(tmp_path, corpus())
    before = (tmp_path / "train_pairs.jsonl").read_bytes()
    with pytest.raises(ToolError, match="not one val pair can be built"):
        run(tmp_path, [row | {"split": "train"} for row in corpus()])
    assert (tmp_path / "train_pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize("folder", [".", "shard_000_of_002"])
def test_pairs_are_not_built_while_preprocess_works_there_or_in_a_shard(tmp_path: Path, folder: str):
    run(tmp_path, corpus())
    before = (tmp_path / "train_pairs.jsonl").read_bytes()
    (tmp_path / folder).mkdir(exist_ok=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / folder / ".lock")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdin and holder.stdout and holder.stdout.readline()
        with pytest.raises(ToolError, match=f"^{tmp_path / folder} is in use by .*Stop that run"):
            run(tmp_path, corpus(40))
        assert (tmp_path / "train_pairs.jsonl").read_bytes() == before
        holder.stdin.close()


def test_a_mistyped_folder_is_named_and_not_made(tmp_path: Path):
    with pytest.raises(ToolError, match="gone/utterances.jsonl: no such file. tools.preprocess writes it"):
        build_pairs.main(["--data-dir", str(tmp_path / "gone")])
    assert not list(tmp_path.iterdir())


def emo_of(pair: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("_emo_vec", ""): value for key, value in pair.items() if "emo_vec" in key}


@pytest.mark.parametrize(("flags", "shares"), [
    ((), {"both": 1}), (("--emo-source", "target"), {"target": 1}),
    (("--emo-source", "mixed"), {"prompt": 0.5, "target": 0.5}),
])
def test_the_emo_vec_of_a_pair_is_the_prompts_the_targets_or_half_of_each(tmp_path: Path, flags, shares):
    rows = [row | {"emo_vec_start": 7 * i} for i, row in enumerate(corpus())]
    start = {row["id"]: row["emo_vec_start"] for row in rows}
    _, training, validation = run(tmp_path, rows, *flags)
    taken: Counter[str] = Counter()
    for pair in training + validation:
        prompt = {"prompt_path": "emo_vec.npy", "prompt_start": start[pair["prompt_id"]]}
        target = {"target_path": "emo_vec.npy", "target_start": start[pair["target_id"]]}
        kinds = {"both": prompt | target, "prompt": prompt, "target": target}
        taken.update(kind for kind, fields in kinds.items() if emo_of(pair) == fields)
    assert {kind: count / 120 for kind, count in taken.items()} == pytest.approx(shares, abs=0.15)
    assert run(tmp_path, rows, *flags)[1:] == (training, validation)
    if "mixed" in flags:
        assert list(map(emo_of, run(tmp_path, rows, *flags, "--seed", 5)[1])) != list(map(emo_of, training))


def test_pairs_of_data_with_the_prompts_emo_vecs_alone_are_as_they_were_and_target_is_refused(tmp_path: Path):
    _, training, validation = run(tmp_path, corpus())
    assert not any("target_emo_vec_path" in pair for pair in training + validation)
    for source in ("target", "mixed"):
        with pytest.raises(ToolError, match=f"--emo-source {source}: 110 of 120 utterances have no emo_vec, 's05' first"
                                            ".* take --emo-source prompt"):
            run(tmp_path, corpus(), "--emo-source", source)
    assert read_jsonl(tmp_path / "train_pairs.jsonl") == training
