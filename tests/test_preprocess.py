"""tools.preprocess: the same arrays however it is run, killed or divided; every bad input is named and counted."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from conftest import ROOT, TOKENIZER, read_jsonl, trainer
from test_signals import children_of, is_alive, needs_proc

from tools import build_pairs, features, preprocess, speech_codec, train_tokenizer
from tools._common import ToolError, sha256_of
from tools.amharic_text import TEXT_RULES, letters_of
from tools.made_with import of_manifest
from tools.sound_files import load_recording
from tools.speech_codec import SpeechCodec

CODEC = ROOT / "processed_data" / "speech_codec.pt"
WORDS = ["ሰላም", "ቤት", "ውሃ", "ልጅ", "መንገድ", "ፀሐይ", "አበባ", "ከተማ"]
FILES = ("codes.npy", "text_ids.npy", "condition.npy", "emo_vec.npy", "config.yaml", "skipped.jsonl",
         "utterances.jsonl")


def tone(seed: int, seconds: float = 0.4, rate: int = 22050) -> np.ndarray:
    """A made-up voice, different for every seed. float32 within -1 to 1."""
    rng = np.random.default_rng(seed)
    at = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(rng.uniform(100, 250) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(1, 4) * at))) / rate
    sound = sum(rng.uniform(0.1, 1) * np.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * sound + 0.01 * rng.standard_normal(len(at))).astype(np.float32)


def sentence(number: int) -> str:
    """A different one for every number below 512."""
    return " ".join(WORDS[number // 8**k % 8] for k in range(3))


def clip_row(folder: Path, number: int) -> dict[str, Any]:
    """Writes recording `number` of two speakers who take turns."""
    (folder / "wavs").mkdir(exist_ok=True)
    soundfile.write(folder / f"wavs/{number}.wav", tone(number, 0.3 + 0.02 * (number % 7)), 22050, subtype="PCM_16")
    return {"id": f"r{number}", "speaker": f"s{number % 2}", "text": sentence(number), "audio": f"wavs/{number}.wav"}


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """recordings.jsonl of the folder."""
    path = folder / "recordings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_recordings(folder: Path, count: int) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [clip_row(folder, number) for number in range(count)]
    write_rows(folder, rows)
    return rows


def arguments(recordings: Path, output: Path, *more: object) -> list[str]:
    """A small model; what comes later in `more` wins."""
    return [str(part) for part in (
        "--recordings", recordings / "recordings.jsonl", "--codec", CODEC, "--tokenizer", TOKENIZER, "--output-dir",
        output, "--model-dim", 16, "--prompts-per-speaker", 2, "--val-share", 0.2, *more)]


def run(recordings: Path, output: Path, *more: object) -> str:
    """preprocess within this process; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        preprocess.main(arguments(recordings, output, *more))
    return printed.getvalue()


def command(recordings: Path, output: Path, *more: object) -> list[str]:
    return [sys.executable, "-m", "tools.preprocess", *arguments(recordings, output, *more)]


def contents(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in FILES}


def resolved(output: Path) -> dict[str, dict[str, Any]]:
    """Every utterance with the numbers that its row points at, wherever they lie."""
    rows = {}
    for row in read_jsonl(output / "utterances.jsonl"):
        plain = {key: value for key, value in row.items() if not key.endswith(("_start", "_path"))}
        for name, start, length in (("codes", "codes", row["code_len"]), ("text_ids", "text_ids", row["text_len"]),
                                    ("condition", "condition", 32), ("emo_vec", "emo_vec", 1)):
            if f"{start}_start" in row:
                array = np.load(output / row.get(f"{name}_path", f"{name}.npy"))
                at = row[f"{start}_start"]
                plain[name] = array[at : at + length].tolist()
        rows[row["id"]] = plain
    return rows


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 recordings of two speakers. Read only."""
    folder = tmp_path_factory.mktemp("clips") / "recordings"
    make_recordings(folder, 24)
    return folder


@pytest.fixture(scope="module")
def single(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them. Read only."""
    output = tmp_path_factory.mktemp("single") / "data"
    run(clips, output, "--jobs", 1)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# The result


def test_arrays_are_what_codec_and_tokenizer_say(clips: Path, single: Path):
    codec, tokenizer = SpeechCodec.load(CODEC), train_tokenizer.load_tokenizer(TOKENIZER)
    rows = resolved(single)
    assert list(rows) == [f"r{number}" for number in range(24)]
    for number, row in enumerate(rows.values()):
        audio = load_recording(clips / f"wavs/{number}.wav", 22050)
        assert row["codes"] == codec.encode(audio).tolist()
        assert row["text"] == tokenizer.decode(row["text_ids"]) == sentence(number)
        if "condition" in row:
            assert row["split"] == "train"
            condition, emo_vec = codec.condition(audio, 16)
            assert np.array_equal(np.array(row["condition"], np.float32), condition.numpy())
            assert np.array_equal(np.array(row["emo_vec"], np.float32)[0], emo_vec.numpy())
    assert Counter(row["speaker"] for row in rows.values() if "condition" in row) == {"s0": 2, "s1": 2}
    config = yaml.safe_load((single / "config.yaml").read_text(encoding="utf-8"))
    assert config["gpt"]["model_dim"] == 16 and config["gpt"]["number_mel_codes"] == codec.config.num_codes + 2


def test_utterances_name_their_recordings_as_seen_from_the_output_folder(clips: Path, single: Path):
    named = {row["id"]: single / row["audio"] for row in read_jsonl(single / "utterances.jsonl")}
    assert len(named) == 24 and all(path.samefile(clips / "wavs" / f"{key[1:]}.wav") for key, path in named.items())


def test_the_trainer_reads_the_result(clips: Path, single: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(single, data)
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(data), "--pairs-per-target", "2"])
    model = trainer.model_config_from(yaml.safe_load((data / "config.yaml").read_text())["gpt"], "config.yaml")
    truth, seen = resolved(single), set()
    for split in ("train", "val"):
        manifest = data / f"{split}_pairs.jsonl"
        dataset = trainer.ManifestDataset([str(manifest)], model)
        for sample, pair in zip(dataset, read_jsonl(manifest), strict=True):
            target, prompt = truth[pair["target_id"]], truth[pair["prompt_id"]]
            assert sample.codes.tolist() == target["codes"] and sample.text_ids.tolist() == target["text_ids"]
            assert sample.condition.tolist() == prompt["condition"] and sample.emo_vec.tolist() == prompt["emo_vec"][0]
            seen.add(pair["target_id"])
    assert seen == set(truth)


def test_the_model_of_a_config_file_is_taken_over_with_its_limits(clips: Path, tmp_path: Path):
    config = tmp_path / "indextts2.yaml"
    config.write_text(yaml.safe_dump({"gpt": {"model_dim": 32, "layers": 2, "heads": 2, "max_text_tokens": 600,
                                              "max_mel_tokens": 8, "start_mel_token": 1024, "condition_type": "x"}}))
    printed = run(clips, tmp_path / "data", "--config", config, "--model-dim", 0)
    gpt = yaml.safe_load((tmp_path / "data/config.yaml").read_text())["gpt"]
    assert gpt["layers"] == 2 and gpt["condition_type"] == "x" and gpt["number_mel_codes"] == 1026
    assert np.load(tmp_path / "data/condition.npy").shape[1] == 32
    lengths = [row["code_len"] for row in read_jsonl(tmp_path / "data/utterances.jsonl")]
    assert max(lengths) == 9 and "x recording too long" in printed and "codes, the model takes 9" in printed


def test_the_model_of_another_codec_is_refused_and_never_rewritten(clips: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    own = {"model_dim": 32, "layers": 2, "heads": 2, "max_text_tokens": 600, "max_mel_tokens": 8}
    for numbers, said in (
            ({"number_mel_codes": 8194, "start_mel_token": 8192, "stop_mel_token": 8193}, "IndexTTS2's weights"),
            ({"number_mel_codes": 8194}, "gpt.number_mel_codes is 8194, these features need 1026"),
            ({"start_mel_token": 64}, "gpt.start_mel_token is 64, these features need 1024"),
            ({"stop_mel_token": None}, "gpt.stop_mel_token is None, these features need 1025")):
        config.write_text(yaml.safe_dump({"gpt": own | numbers}))
        with pytest.raises(ToolError, match=f"--config {config}: .*{said}"):
            run(clips, tmp_path / "data", "--config", config, "--model-dim", 0)
    assert not (tmp_path / "data/config.yaml").exists()


def test_what_the_data_was_made_with_stands_beside_it(single: Path):
    assert of_manifest(single / "train_pairs.jsonl") == {
        "features": "embedded", "codec_sha256": sha256_of(CODEC), "num_codes": 1024, "codes_per_second": 21.5332,
        "tokenizer_sha256": sha256_of(TOKENIZER), "text_rules": TEXT_RULES}


def test_pairs_are_not_built_over_shards_of_another_codec(clips: Path, tmp_path: Path):
    data = tmp_path / "data"
    for flags in (("--shard-index", 0), ("--merge",)):
        run(clips, data, "--num-shards", 1, *flags)
    shard = data / "shard_000_of_001/shard.json"
    shard.write_text(json.dumps(json.loads(shard.read_text()) | {"--codec": "0" * 64}))
    with pytest.raises(ToolError, match="codec_sha256 is .* in .*data/config.yaml, but 000000000000 in .*shard.json"):
        build_pairs.main(["--data-dir", str(data)])


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, several machines


@pytest.mark.parametrize("prompts", [2, 0])
def test_merged_shards_equal_the_single_run_row_for_row(clips: Path, single: Path, tmp_path: Path, prompts: int):
    flags = ("--num-shards", 3, "--prompts-per-speaker", prompts)
    for index in (2, 0, 1):
        run(clips, tmp_path / "data", *flags, "--shard-index", index)
    printed = run(clips, tmp_path / "data", *flags, "--merge")
    if prompts == 0:
        single = tmp_path / "single"
        run(clips, single, "--prompts-per-speaker", 0)
    merged, whole = resolved(tmp_path / "data"), resolved(single)
    assert merged == whole and list(merged) == list(whole)
    assert (tmp_path / "data/config.yaml").read_bytes() == (single / "config.yaml").read_bytes()
    assert len({row["codes_path"] for row in read_jsonl(tmp_path / "data/utterances.jsonl")}) == 3
    assert "24 utterances of 2 speakers, " in printed
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(tmp_path / "data")])
    model = trainer.model_config_from(yaml.safe_load((single / "config.yaml").read_text())["gpt"], "config.yaml")
    manifest = tmp_path / "data/train_pairs.jsonl"
    for sample, pair in zip(trainer.ManifestDataset([str(manifest)], model), read_jsonl(manifest),
                            strict=True):
        assert sample.codes.tolist() == whole[pair["target_id"]]["codes"]


def test_merge_names_every_shard_that_is_missing_or_was_made_otherwise(clips: Path, tmp_path: Path):
    output, flags = tmp_path / "data", ("--num-shards", 4)
    other = tmp_path / "other.pt"
    codec = SpeechCodec.load(CODEC)
    codec.window_mean += 1
    codec.save(other)
    run(clips, output, *flags, "--shard-index", 0)
    run(clips, output, *flags, "--shard-index", 1, "--codec", other, "--seed", 7)
    run(clips, output, *flags, "--shard-index", 3)
    codes = output / "shard_003_of_004/codes.npy"
    codes.write_bytes(codes.read_bytes()[:-4])
    with pytest.raises(ToolError) as error:
        run(clips, output, *flags, "--merge")
    assert "shard_001_of_004 was made with another --codec, --seed; " in str(error.value)
    assert "shard_002_of_004 is missing or unfinished; shard_003_of_004/codes.npy is not whole." in str(error.value)
    assert "shard_000" not in str(error.value) and not (output / "utterances.jsonl").exists()


@pytest.mark.parametrize("name", ["condition", "emo_vec"])
@pytest.mark.parametrize("damage", ["gone", "cut", "narrow"])
def test_merge_names_a_shard_whose_conditions_are_not_whole(clips: Path, tmp_path: Path, name: str, damage: str):
    output, flags = tmp_path / "data", ("--num-shards", 2, "--prompts-per-speaker", 0)
    for index in (0, 1):
        run(clips, output, *flags, "--shard-index", index)
    path = output / f"shard_001_of_002/{name}.npy"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        np.save(path, np.load(path)[:, 1:])
    with pytest.raises(ToolError, match=f": shard_001_of_002/{name}.npy is not whole. Run these shards again"):
        run(clips, output, *flags, "--merge")


def test_merge_names_a_shard_that_read_other_recordings_than_are_here(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 8)
    output, flags = tmp_path / "data", ("--num-shards", 2)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "in", elsewhere)  # the same recordings, but at another time and place
    run(tmp_path / "in", output, *flags, "--shard-index", 0, "--audio-dir", elsewhere)
    of_shard_1 = [row for row in rows if preprocess.shard_of(row["id"], 2) == 1]
    soundfile.write(elsewhere / of_shard_1[0]["audio"], tone(77, 0.6), 22050)
    run(tmp_path / "in", output, *flags, "--shard-index", 1, "--audio-dir", elsewhere)
    with pytest.raises(ToolError) as error:
        run(tmp_path / "in", output, *flags, "--merge")
    assert ("shard_001_of_002 was made from other recordings (another --audio-dir, or changed since: 1 have another "
            f"size, the first '{of_shard_1[0]['audio']}')") in str(error.value) and "shard_000" not in str(error.value)
    run(tmp_path / "in", output, *flags, "--shard-index", 1)
    run(tmp_path / "in", output, *flags, "--merge")
    assert all("size" not in row for row in read_jsonl(output / "utterances.jsonl"))


def test_merge_refuses_shards_of_older_recordings_and_lost_rows(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 8)
    output, flags = tmp_path / "data", ("--num-shards", 2)
    for index in (0, 1):
        run(tmp_path / "in", output, *flags, "--shard-index", index)
    write_rows(tmp_path / "in", [*rows, clip_row(tmp_path / "in", 8)])
    with pytest.raises(ToolError, match="shard_000_of_002 was made with another --recordings; shard_001"):
        run(tmp_path / "in", output, *flags, "--merge")
    write_rows(tmp_path / "in", rows)
    path = next(path for path in output.glob("shard_*/utterances.jsonl") if path.stat().st_size)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    doubled = json.dumps({**json.loads(lines[0]), "reason": "x", "detail": "x"})
    for shard, skipped in ((lines[1:], ""), (lines, doubled)):
        path.write_text("".join(shard), encoding="utf-8")
        path.with_name("skipped.jsonl").write_text(skipped)
        with pytest.raises(ToolError, match="is not whole|1 rows are not there exactly once, the first 'r"):
            run(tmp_path / "in", output, *flags, "--merge")
    assert not (output / "utterances.jsonl").exists()


def test_a_shard_without_recordings_merges(tmp_path: Path):
    make_recordings(tmp_path / "in", 4)
    assert len({preprocess.shard_of(f"r{i}", 9) for i in range(4)}) < 9
    for index in range(9):
        run(tmp_path / "in", tmp_path / "data", "--num-shards", 9, "--shard-index", index)
    run(tmp_path / "in", tmp_path / "data", "--num-shards", 9, "--merge")
    assert len(resolved(tmp_path / "data")) == 4


@pytest.mark.parametrize("flags", [("--shard-index", 0), ("--merge",), ("--num-shards", 2),
                                   ("--num-shards", 2, "--shard-index", 2), ("--jobs", -1), ("--val-share", 1),
                                   ("--num-shards", 2, "--shard-index", 0, "--merge")])
def test_flags_that_make_no_sense_are_refused(clips: Path, tmp_path: Path, flags: tuple):
    with pytest.raises(ToolError, match=f"{flags[0]}|{flags[-2:][0]}|--num-shards"):
        run(clips, tmp_path / "data", *flags)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Again and again


def test_only_new_and_changed_recordings_are_computed_and_removed_ones_leave(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "data"
    rows = make_recordings(folder, 12)
    run(folder, output)
    size = (folder / "wavs/4.wav").stat().st_size
    soundfile.write(folder / "wavs/4.wav", tone(99, 0.3 + 0.02 * 4), 22050, subtype="PCM_16")
    assert (folder / "wavs/4.wav").stat().st_size == size
    rows = [clip_row(folder, 50), *rows[:7], *rows[8:], clip_row(folder, 51)]
    write_rows(folder, rows)
    assert "codes: 3 of 13 recordings to compute" in run(folder, output)
    run(folder, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")
    assert [row["id"] for row in read_jsonl(output / "utterances.jsonl")] == [row["id"] for row in rows]


def test_another_codec_or_width_is_never_answered_from_older_work(clips: Path, single: Path, tmp_path: Path):
    output = tmp_path / "data"
    shutil.copytree(single, output)
    assert "condition: 4 of 4" in run(clips, output, "--model-dim", 20)
    assert np.load(output / "condition.npy").shape[1] == 20
    codec = SpeechCodec.load(CODEC)
    codec.codebook.copy_(codec.codebook.flip(0))
    codec.save(tmp_path / "other.pt")
    assert "codes: 24 of 24" in run(clips, output, "--codec", tmp_path / "other.pt")
    assert not np.array_equal(np.load(output / "codes.npy"), np.load(single / "codes.npy"))


def test_pairs_stay_while_the_arrays_do_and_go_before_they_change(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "data"
    rows = make_recordings(folder, 10)
    run(folder, output)
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(output)])
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("[a-z]*.*")}
    assert "to compute" not in run(folder, output)
    assert before == {name: (output / name).stat().st_mtime_ns for name in before} and "train_pairs.jsonl" in before
    write_rows(folder, rows[1:])
    assert "pairs of the old arrays are removed" in run(folder, output)
    assert not list(output.glob("*_pairs.jsonl"))
    for index in (0, 1):  # the same through shards: their arrays, too, are pointed into from above
        run(folder, output, "--num-shards", 2, "--shard-index", index)
    run(folder, output, "--num-shards", 2, "--merge")
    (output / "train_pairs.jsonl").write_text("{}\n")
    write_rows(folder, rows[3:])
    for index in (0, 1):
        run(folder, output, "--num-shards", 2, "--shard-index", index)
    assert not (output / "train_pairs.jsonl").exists() and not (output / "utterances.jsonl").exists()


def test_damaged_chunks_are_named_and_made_again(clips: Path, single: Path, tmp_path: Path):
    output = tmp_path / "data"
    shutil.copytree(single, output)
    first, second, *_ = sorted(output.glob("chunks/codes_*.npz"))
    first.write_bytes(first.read_bytes()[:-30])
    printed = run(clips, output)
    assert f"{first}: damaged" in printed and "codes: 4 of 24 recordings to compute" in printed
    assert contents(output) == contents(single)
    content = bytearray(second.read_bytes())
    content[content.index(b"codes.npy") + 150] ^= 1
    second.write_bytes(content)
    with pytest.raises(ToolError, match=f"{second}: damaged .*Delete it and run the same command again"):
        run(clips, output)


def test_recordings_that_were_missing_for_a_while_are_not_computed_again(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "data"
    make_recordings(folder, 12)
    flags = ("--prompts-per-speaker", 0)
    run(folder, output, *flags)
    before = contents(output)
    (folder / "wavs").rename(tmp_path / "unmounted")
    with pytest.raises(ToolError, match="no recording can be used. 12 x no such recording"):
        run(folder, output, *flags)
    (folder / "wavs").mkdir()
    for number in range(6):
        shutil.copy2(tmp_path / f"unmounted/{number}.wav", folder / "wavs")
    assert "6 x no such recording" in run(folder, output, *flags)
    shutil.copytree(tmp_path / "unmounted", folder / "wavs", dirs_exist_ok=True)
    assert "to compute" not in run(folder, output, *flags) and contents(output) == before


def test_another_codec_leaves_the_work_of_the_first_alone_and_unnamed_recordings_free_their_space(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "data"
    rows = make_recordings(folder, 12)
    run(folder, output)
    codec = SpeechCodec.load(CODEC)
    codec.window_mean += 1
    codec.save(tmp_path / "other.pt")
    run(folder, output, "--codec", tmp_path / "other.pt")
    assert "to compute" not in run(folder, output)
    before = set(output.glob("chunks/codes_*"))
    write_rows(folder, rows[4:])  # the recordings of the first of three chunks leave
    run(folder, output)
    after = set(output.glob("chunks/codes_*"))
    assert len(before) == 6 and after < before and len(after) == 5


def test_rows_in_any_order_read_each_chunk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, output = tmp_path / "in", tmp_path / "data"
    rows = make_recordings(folder, 24)
    run(folder, output, "--prompts-per-speaker", 0)
    random.Random(3).shuffle(rows)
    write_rows(folder, rows)
    read: list[str] = []
    load_chunk = features.FeatureCache.load_chunk

    def counting(cache: features.FeatureCache, path: Path) -> dict[str, list[np.ndarray]]:
        read.append(path.name)
        return load_chunk(cache, path)

    monkeypatch.setattr(features.FeatureCache, "load_chunk", counting)
    assert "to compute" not in run(folder, output, "--prompts-per-speaker", 0)
    assert sorted(read) == sorted(path.name for path in output.glob("chunks/*.npz")) and len(read) > 8
    run(folder, tmp_path / "fresh", "--prompts-per-speaker", 0)
    assert contents(output) == contents(tmp_path / "fresh")


def test_an_empty_chunk_of_a_power_cut_is_named_and_made_again(clips: Path, single: Path, tmp_path: Path):
    output = tmp_path / "data"
    shutil.copytree(single, output)
    first = min(output.glob("chunks/codes_*.npz"))
    first.write_bytes(b"")
    printed = run(clips, output)
    assert f"{first}: damaged (No data left in file); its recordings are computed again" in printed
    assert "codes: 4 of 24 recordings to compute" in printed and "damaged" not in run(clips, output)
    assert contents(output) == contents(single)


KILL_EVERYWHERE = '''
import os, shutil, signal, sys
from pathlib import Path
from tools import preprocess

before, work, points, *argv = sys.argv[1:]
countdown = [0]

def count(event, args):
    writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and countdown[0] and work in str(args[0]):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)

def run(at):
    """Exit status of preprocess in a process that is killed before its at-th write below `work` (0: never)."""
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        countdown[0] = at
        preprocess.main(argv)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def start_over():
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(before, work)

def names():
    return [name for name in ("codes.npy", "utterances.jsonl", "train_pairs.jsonl") if (Path(work) / name).exists()]

def same(name, folder):
    return (Path(work) / name).read_bytes() == (Path(folder) / name).read_bytes()

start_over()
assert run(0) == 0
shutil.copytree(work, work + "_whole")
files = [path.name for path in Path(work).iterdir() if path.is_file() and path.name != ".lock"]
total = 1
while start_over() or run(total) == -signal.SIGKILL:
    total += 8
for step in range(int(points)):
    start_over()
    at = 1 + step * (total - 2) // (int(points) - 1)
    if run(at) != -signal.SIGKILL:
        continue
    state = names()
    for rows in ("utterances.jsonl", "train_pairs.jsonl"):  # rows that are there fit the arrays that are there
        if rows in state:
            fits = before if rows == "train_pairs.jsonl" or same(rows, before) else work + "_whole"
            assert all(same(name, fits) for name in ("codes.npy", "text_ids.npy", "condition.npy", rows)), (at, rows)
    assert run(0) == 0
    assert all(same(name, work + "_whole") for name in files), at
    assert sorted(files) == sorted(p.name for p in Path(work).iterdir() if p.is_file() and p.name != ".lock"), at
    assert not (Path(work) / ".staging").exists() and not list(Path(work).glob("chunks/.*")), at
    print("killed", at, state, flush=True)
'''


def test_killed_before_any_write_it_leaves_rows_that_fit_their_arrays_and_goes_on_to_the_same_result(tmp_path: Path):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 10)
    run(folder, tmp_path / "before")
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(tmp_path / "before")])
    soundfile.write(folder / "wavs/3.wav", tone(77, 0.5), 22050, subtype="PCM_16")
    write_rows(folder, [clip_row(folder, 60), *rows[1:]])
    script = [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path / "before"), str(tmp_path / "work"), "24"]
    done = subprocess.run([*script, *arguments(folder, tmp_path / "work", "--jobs", 1)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed")]
    assert len(killed) > 12 and len({line.split(" ", 2)[2] for line in killed}) >= 3, done.stdout


@needs_proc
def test_killed_at_a_random_moment_it_takes_its_processes_along_and_goes_on_to_the_same_result(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "data"
    make_recordings(folder, 140)
    process = subprocess.Popen(command(folder, output, "--jobs", 2), cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(output.glob("chunks/*.npz")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    moment = random.uniform(0, 0.3)
    time.sleep(moment)
    children = children_of(process.pid)
    process.kill()
    process.wait()
    while any(is_alive(child) for child in children):
        assert time.monotonic() < limit, "worker processes outlive their parent"
        time.sleep(0.01)
    for data in (output, tmp_path / "fresh"):
        run(folder, data, "--jobs", 1)
    assert contents(output) == contents(tmp_path / "fresh"), f"killed {moment} s after the first chunk"


def test_several_processes_make_what_one_makes(tmp_path: Path):
    folder = tmp_path / "in"
    make_recordings(folder, 130)
    assert "130 of 130 recordings to compute, 2 at a time" in run(folder, tmp_path / "data", "--jobs", 2)
    run(folder, tmp_path / "one", "--jobs", 1)
    assert contents(tmp_path / "data") == contents(tmp_path / "one")


@pytest.mark.parametrize("most_bytes", [1000, 400_000])  # no chunk fits; chunks fit, condition.npy does not
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(clips: Path, tmp_path: Path, most_bytes: int):
    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))

    flags = ("--jobs", 1, "--prompts-per-speaker", 0, "--model-dim", 256)
    done = subprocess.run(command(clips, tmp_path / "data", *flags), cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=few_bytes)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written (File too large). Free some disk space" in done.stderr, done.stderr
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.name != ".lock"]
    assert all(path.suffix == ".npz" and not path.name.startswith(".") for path in left)
    assert bool(left) == (most_bytes > 1000) == ("to compute" not in run(clips, tmp_path / "data", *flags))
    run(clips, tmp_path / "fresh", *flags)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_two_runs_into_one_folder_are_refused(clips: Path, tmp_path: Path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdin and holder.stdout and holder.stdout.readline()
        with pytest.raises(ToolError, match="is in use by"):
            run(clips, tmp_path)
        holder.stdin.close()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_every_faulty_row_is_skipped_with_its_reason_and_the_good_ones_stay(tmp_path: Path):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 6)
    wavs, texts = folder / "wavs", iter(range(100, 200))

    def add(row_id: str, audio: str, text: str | None = None, **more: str) -> None:
        rows.append({"id": row_id, "speaker": "s0", "text": sentence(next(texts)) if text is None else text,
                     "audio": f"wavs/{audio}", **more})

    (wavs / "junk.wav").write_bytes(b"RIFF, or so it says")
    (wavs / "zero.wav").write_bytes(b"")
    (wavs / "notes.txt").write_bytes((wavs / "0.wav").read_bytes())
    (wavs / "folder.wav").mkdir()
    soundfile.write(wavs / "none.wav", np.zeros(0), 22050)
    soundfile.write(wavs / "silent.wav", np.zeros(22050), 22050)
    soundfile.write(wavs / "nan.wav", np.full(22050, np.nan), 22050, subtype="FLOAT")
    soundfile.write(wavs / "slow.wav", tone(1, 1, 4000), 4000)
    soundfile.write(wavs / "odd.wav", tone(1, 1, 44099), 44099)
    soundfile.write(wavs / "long.wav", np.tile(tone(1, 1, 8000), 20), 8000)
    soundfile.write(wavs / "hours.flac", np.zeros(8000 * 700, np.int16), 8000)
    soundfile.write(wavs / "stray.wav", tone(1), 22050)
    (folder / "other/deep").mkdir(parents=True)
    soundfile.write(folder / "other/deep/stray.FLAC", tone(1), 22050, format="FLAC")
    for name in ("junk.wav", "zero.wav", "notes.txt", "folder.wav", "none.wav", "silent.wav", "nan.wav", "slow.wav",
                 "odd.wav", "long.wav", "hours.flac", "gone.wav"):
        add(name, name)
    add("latin", "0.wav", "selam new")
    add("mixed", "0.wav", "ሰላም hello")
    add("blank", "0.wav", " ።")
    add("endless", "0.wav", "ሰላም " * 80)
    add("test", "0.wav", split="test")
    write_rows(folder, rows)
    printed = run(folder, tmp_path / "data")
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "data/skipped.jsonl")}
    assert reasons == {
        "junk.wav": "unreadable", "zero.wav": "unreadable", "notes.txt": "not a sound file's ending",
        "folder.wav": "no such recording", "none.wav": "empty recording", "silent.wav": "unusable sound",
        "nan.wav": "unusable sound", "slow.wav": "sample rate", "odd.wav": "sample rate",
        "long.wav": "recording too long", "hours.flac": "recording too long", "gone.wav": "no such recording",
        "latin": "not Ethiopic", "mixed": "letters without a token", "blank": "empty transcript",
        "endless": "text too long", "test": "other split",
    }
    assert [row["id"] for row in read_jsonl(tmp_path / "data/utterances.jsonl")] == [f"r{i}" for i in range(6)]
    assert "17 rows skipped" in printed and "[Warn]   2 x sample rate: " in printed
    assert f"{wavs}/gone.wav: No such file or directory" in printed and "stray.wav" in printed
    assert "2 sound files have no row" in printed and f"{folder}/other/deep/stray.FLAC, " in printed


def test_a_wav_that_was_cut_off_is_skipped_and_one_whose_size_nobody_knew_is_not(tmp_path: Path):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 4)
    whole = (folder / "wavs/3.wav").read_bytes()
    at = whole.index(b"data") + 4

    def sized(number: int) -> bytes:
        return whole[:at] + number.to_bytes(4, "little") + whole[at + 4 :]

    files = {"cut": whole[: len(whole) * 4 // 10], "piped": sized(0xFFFFFFFF), "by_sox": sized(0x7FFFF000),
             "with_header": sized(len(whole)), "tagged": whole + b"LIST\4\0\0\0abcd"}
    for name, content in files.items():
        (folder / f"wavs/{name}.wav").write_bytes(content)
    soundfile.write(folder / "wavs/large.wav", soundfile.read(folder / "wavs/3.wav")[0], 22050, format="RF64")
    rows += [{"id": name, "speaker": "s0", "text": sentence(90 + i), "audio": f"wavs/{name}.wav"}
             for i, name in enumerate([*files, "large"])]
    write_rows(folder, rows)
    run(folder, tmp_path / "data")
    skipped, = read_jsonl(tmp_path / "data/skipped.jsonl")
    assert (skipped["id"], skipped["reason"]) == ("cut", "cut off")
    assert f"the file ends {len(whole) - len(files['cut'])} bytes before its sound. Copy it again" in skipped["detail"]
    rows_by_id = resolved(tmp_path / "data")
    for name in ("piped", "by_sox", "with_header", "tagged", "large"):
        assert rows_by_id[name]["codes"] == rows_by_id["r3"]["codes"]


def test_what_is_no_sound_or_practically_silent_is_skipped(tmp_path: Path):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 6)
    rng = np.random.default_rng(1)
    voice, noise = tone(3, 1), rng.integers(-1, 2, 22050) / 2**15
    sounds = {"overflow": voice * np.float32(1e38), "huge": voice * np.float32(1e20), "integers": voice * 2**15,
              "hiss": noise, "offset": 0.2 + noise}
    for i, (name, sound) in enumerate(sounds.items()):
        soundfile.write(folder / f"{name}.wav", sound, 22050, subtype="FLOAT")
        rows.append({"id": name, "speaker": "s0", "text": sentence(90 + i), "audio": f"{name}.wav"})
    heard = {"whisper": voice * 0.03, "loud": voice * 9, "inverse": np.stack([voice, -voice], 1)}  # -45 dBFS; clips
    for name, sound in heard.items():
        soundfile.write(folder / f"{name}.wav", sound, 22050, subtype="FLOAT")
        rows.append({"id": name, "speaker": "s0", "text": sentence(100 + len(rows)), "audio": f"{name}.wav"})
    write_rows(folder, rows)
    printed = run(folder, tmp_path / "data")
    assert {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "data/skipped.jsonl")} == dict.fromkeys(
        sounds, "unusable sound")
    assert "where 1 is the loudest sound" in printed
    found = resolved(tmp_path / "data")
    assert np.mean(np.equal(found["whisper"]["codes"], found["loud"]["codes"])) > 0.8


@pytest.mark.parametrize(("name", "subtype"), [("wav", "GSM610"), ("au", "G723_24"), ("wav", "NMS_ADPCM_16")])
def test_a_telephone_recording_is_one_like_any_other(name: str, subtype: str, tmp_path: Path):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 6)
    soundfile.write(folder / f"call.{name}", tone(9, 9.0, 8000), 8000, subtype=subtype)
    rows.append({"id": "call", "speaker": "s0", "text": sentence(99), "audio": f"call.{name}"})
    write_rows(folder, rows)
    run(folder, tmp_path / "data")
    row = resolved(tmp_path / "data")["call"]
    assert 8.9 < row["duration"] < 9.1 and len(row["codes"]) == row["code_len"] > 190


def test_features_that_are_not_finite_are_never_kept(clips: Path, tmp_path: Path):
    codec = SpeechCodec.load(CODEC)
    codec.window_deviation.zero_()
    codec.save(tmp_path / "broken.pt")
    with pytest.raises(ToolError, match="a prompt's recording: .*its condition holds numbers that are not finite"):
        run(clips, tmp_path / "data", "--codec", tmp_path / "broken.pt")
    assert not list(tmp_path.glob("data/chunks/condition_*"))


@pytest.mark.parametrize(("rate", "channels", "name"), [(8000, 1, "a.wav"), (96000, 1, "a.flac"), (44100, 2, "a.ogg"),
                                                        (48000, 2, "a.wav"), (16000, 1, "really_flac.WAV")])
def test_sounds_of_8_to_96_khz_mono_or_stereo_give_the_codes_of_their_sound(tmp_path: Path, rate: int, channels: int,
                                                                            name: str):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 4)
    sound = np.repeat(tone(3, 0.5, rate)[:, None], channels, axis=1)
    kind = {"a.ogg": "OGG", "a.wav": "WAV"}.get(name, "FLAC")
    soundfile.write(folder / name, sound, rate, format=kind)
    write_rows(folder, [*rows, {"id": "x", "speaker": "s0", "text": sentence(90), "audio": name}])
    run(folder, tmp_path / "data")
    row = resolved(tmp_path / "data")["x"]
    assert row["codes"] == SpeechCodec.load(CODEC).encode(load_recording(folder / name, 22050)).tolist()
    assert abs(row["duration"] - 0.5) < 0.03 and abs(row["code_len"] - 0.5 * 21.5) <= 2


def test_paths_that_lead_out_of_the_audio_folder_are_never_read(tmp_path: Path):
    folder = tmp_path / "in"
    rows = make_recordings(folder, 4)
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, tone(9), 22050)
    (folder / "link.wav").symlink_to(secret)
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "inside.wav").symlink_to(folder / "wavs/0.wav")
    os.mkfifo(folder / "pipe.wav")
    tricks = {"absolute": str(secret), "up": "../secret.wav", "over": "wavs/../../secret.wav", "link": "link.wav",
              "through": "out/secret.wav", "null": "wavs/0.wav\0", "loop": "loop.wav", "pipe": "pipe.wav",
              "name": "x" * 300 + ".wav", "inside": "inside.wav", "whole": str(folder / "wavs/1.wav")}
    rows += [{"id": key, "speaker": "s0", "text": sentence(200 + i), "audio": audio}
             for i, (key, audio) in enumerate(tricks.items())]
    rows[-1]["split"] = "val"
    write_rows(folder, rows)
    run(folder, tmp_path / "data")
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "data/skipped.jsonl")}
    outside = ("absolute", "up", "over", "link", "through", "null")
    assert reasons == {**dict.fromkeys(outside, "outside the audio folder"),
                       **dict.fromkeys(("loop", "pipe", "name"), "no such recording")}
    assert set(resolved(tmp_path / "data")) == {"r0", "r1", "r2", "r3", "inside", "whole"}
    run(folder, tmp_path / "wider", "--audio-dir", tmp_path)  # now what is relative starts there
    assert set(resolved(tmp_path / "wider")) == {"absolute", "whole"}


@pytest.mark.parametrize(("lines", "message"), [
    ([{"id": "a", "text": "ቤት", "audio": "1.wav"}] * 2, "row 2: id 'a' is that of row 1 too. Make ids unique"),
    ([{"id": "a", "text": "ቤት"}], "line 1: missing audio"), (["{"], "line 1: not JSON"), ([], "holds no rows"),
    ([{"id": 1, "text": "ቤት", "audio": "1.wav"}], "row 1: id is 1, not a text"),
    ([{"id": "", "text": "ቤት", "audio": "1.wav"}], "row 1: id is '', not a text"),
    ([{"id": "a", "text": "ቤት", "audio": "1.wav", "speaker": None}], "row 1: speaker is None, not a text"),
    (['{"id": "\\ud800", "text": "ቤት", "audio": "1.wav"}'], "surrogates not allowed"),
    ([{"id": "a", "text": "hello", "audio": "1.wav"}], "no row can be used. 1 x not Ethiopic: "),
    ([{"id": "a", "text": "ቤት", "audio": "1.wav"}], "there is only one sentence"),
    ([{"id": "a", "text": "ቤት", "audio": "1.wav"}, {"id": "b", "text": "hello", "audio": "2.wav"}],
     "one sentence is left, and validation needs another. 1 x not Ethiopic: "),
    ([{"id": "a", "text": "ቤት", "audio": "1.wav"}, {"id": "b", "text": "ውሃ", "audio": "2.wav"}],
     "no recording can be used. 2 x no such recording: "),
])
def test_a_recordings_file_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path, lines: list, message: str):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / "recordings.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ToolError) as error:
        run(tmp_path, tmp_path / "data")
    assert message in str(error.value) and not (tmp_path / "data/utterances.jsonl").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (("--codec", "gone.pt"), "gone.pt: no such codec"), (("--tokenizer", "gone.m"), "gone.m: no such tokenizer"),
    (("--config", "gone.yaml"), "--config gone.yaml: cannot be read"), (("--config", TOKENIZER), "cannot be read"),
    (("--model-dim", 17), "heads"), (("--val-speakers", "s7"), "--val-speakers s7: no such speaker. There are s0, s1"),
    (("--recordings", "gone.jsonl"), "gone.jsonl: no such file"), (("--output-dir", CODEC), "codec.pt: File exists"),
])
def test_missing_and_unfit_inputs_are_named(clips: Path, tmp_path: Path, flags: tuple, message: str):
    with pytest.raises(ToolError, match=message):
        run(clips, tmp_path / "data", *flags)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def split_of(rows: Sequence[dict[str, Any]], speakers: Sequence[str] = (), share: float = 0.1) -> list[str]:
    keys = [letters_of(row["text"]) for row in rows]
    return preprocess.split_rows(rows, keys, speakers, share, 1234)


def test_spellings_of_one_sentence_are_never_on_both_sides():
    spellings = ["ሰላም ለዓለም።", "ሠላም ለአለም", "ሰላም ፣ ለዐለም ?", "«ሰላም»ለዓለም"]
    rows = [{"text": text} for number in range(300) for text in (sentence(number), f"{sentence(number)}።")]
    rows += [{"text": text} for text in spellings]
    splits = split_of(rows)
    assert all(splits[i] == splits[i + 1] for i in range(0, 600, 2)) and len(set(splits[-4:])) == 1
    assert 30 <= splits.count("val") <= 100


def test_added_recordings_move_no_sentence_to_the_other_side():
    rows = [{"text": sentence(number)} for number in range(400)]
    assert split_of(rows)[:200] == split_of(rows[:200])
    assert split_of(rows[::-1]) == split_of(rows)[::-1]


def test_there_is_always_a_sentence_to_validate_and_one_to_train():
    for count in (2, 3, 5):
        splits = split_of([{"text": sentence(number)} for number in range(count)], share=0.001)
        assert sorted(Counter(splits).items()) == [("train", count - 1), ("val", 1)]


def test_small_data_is_told_that_its_validation_may_move(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 4)
    said = "To keep it, mark its rows \"split\": \"val\""
    assert said in run(tmp_path / "in", tmp_path / "data", "--val-share", 0.001)
    rows[2]["split"] = "val"
    write_rows(tmp_path / "in", rows)
    assert said not in run(tmp_path / "in", tmp_path / "data", "--val-share", 0.001)


@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize(("split", "message"), [
    ("val", "no row is left for validation. 1 x unreadable: .*wavs/2.wav.*Mend these rows, mark others"),
    ("train", "no row is left to train on. 1 x unreadable: .*wavs/2.wav.*Mend these rows, mark fewer"),
])
def test_data_without_a_usable_row_on_one_side_is_refused(tmp_path: Path, shards: int, split: str, message: str):
    rows = make_recordings(tmp_path / "in", 6)
    for number, row in enumerate(rows):
        row["split"] = "val" if (number == 2) == (split == "val") else "train"
    write_rows(tmp_path / "in", rows)
    (tmp_path / "in/wavs/2.wav").write_bytes(b"no sound")
    for index in range(shards):
        run(tmp_path / "in", tmp_path / "data", "--num-shards", shards, "--shard-index", index)
    with pytest.raises(ToolError, match=message):
        run(tmp_path / "in", tmp_path / "data", *(("--num-shards", shards, "--merge") if shards else ()))
    assert not (tmp_path / "data/utterances.jsonl").exists()


def test_rows_that_are_all_validation_are_refused_before_any_sound_is_read(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 4)
    with pytest.raises(ToolError, match="no row is left to train on. Every row is validation. .*fewer --val-speakers"):
        run(tmp_path / "in", tmp_path / "data", "--val-speakers", "s0", "s1")
    write_rows(tmp_path / "in", [row | {"text": rows[0]["text"], "split": split}
                                 for row, split in zip(rows, ("val", "train", "train", "train"), strict=True)])
    with pytest.raises(ToolError, match="no row is left to train on. 3 x sentence of validation: "):
        run(tmp_path / "in", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_speaker_whose_training_rows_cannot_be_used_has_prompts_for_validation(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 10)
    for row in rows:
        row["split"] = "val" if row["speaker"] == "s1" and row["id"] != "r1" else "train"
    write_rows(tmp_path / "in", rows)
    (tmp_path / "in/wavs/1.wav").unlink()
    run(tmp_path / "in", tmp_path / "data")
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(tmp_path / "data")])
    assert len(read_jsonl(tmp_path / "data/val_pairs.jsonl")) == 4


def test_training_rows_with_a_sentence_of_marked_validation_are_left_out(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 8)
    rows[2]["split"], rows[5]["text"] = "val", rows[2]["text"] + "።"
    write_rows(tmp_path / "in", rows)
    run(tmp_path / "in", tmp_path / "data")
    splits = {row["id"]: row["split"] for row in read_jsonl(tmp_path / "data/utterances.jsonl")}
    assert splits == {f"r{i}": "val" if i == 2 else "train" for i in range(8) if i != 5}
    skipped, = read_jsonl(tmp_path / "data/skipped.jsonl")
    assert (skipped["id"], skipped["reason"], skipped["row"]) == ("r5", "sentence of validation", 6)


def test_validation_speakers_are_never_trained_on_and_have_prompts_of_their_own(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 12)
    rows[0]["text"] = rows[1]["text"]  # s0 says a sentence of s1
    write_rows(tmp_path / "in", rows)
    run(tmp_path / "in", tmp_path / "data", "--val-speakers", "s1")
    utterances = read_jsonl(tmp_path / "data/utterances.jsonl")
    assert {(row["speaker"], row["split"]) for row in utterances} == {("s0", "train"), ("s1", "val")}
    assert Counter(row["speaker"] for row in utterances if "condition_start" in row) == {"s0": 2, "s1": 2}
    assert [row["id"] for row in read_jsonl(tmp_path / "data/skipped.jsonl")] == ["r0"]
    with contextlib.redirect_stdout(io.StringIO()):
        build_pairs.main(["--data-dir", str(tmp_path / "data")])
    assert len(read_jsonl(tmp_path / "data/val_pairs.jsonl")) == 6


def test_rows_without_a_speaker_are_said_to_be_taken_for_one_voice(tmp_path: Path):
    rows = make_recordings(tmp_path / "in", 4)
    write_rows(tmp_path / "in", [{key: row[key] for key in ("id", "text", "audio")} for row in rows])
    assert "4 rows name no speaker: they are taken for one voice" in run(tmp_path / "in", tmp_path / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("arguments", ["preprocess", "build_pairs", "speech_codec train", "speech_codec encode",
                                       "speech_codec decode"])
def test_help_says_of_every_flag_what_it_is_and_its_default(arguments: str, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]):
    program, *command = arguments.split()
    shown: list[argparse.ArgumentParser] = []
    print_help = argparse.ArgumentParser.print_help

    def remember(parser: argparse.ArgumentParser, *more: Any) -> None:
        shown.append(parser)
        print_help(parser, *more)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", remember)
    with pytest.raises(SystemExit):
        {"preprocess": preprocess, "build_pairs": build_pairs, "speech_codec": speech_codec}[program].main(
            [*command, "--help"])
    assert f"first command:\n  python -m tools.{arguments} --" in capsys.readouterr().out
    for action in shown[0]._actions:
        assert action.help, action.option_strings
        if not action.required and action.nargs != 0:
            assert action.help.endswith(")"), action.option_strings
            if isinstance(action.default, (int, float)):
                assert action.help.endswith(f"({action.default:g})"), action.option_strings
