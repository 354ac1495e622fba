"""Every bad input gives one error that names the file, the place in it and a remedy; exit status 1, no stack frames."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import (
    GPT,
    MADE_WITH,
    TOKENIZER,
    TRAINER,
    call_trainer,
    data_args,
    error_of,
    load_checkpoint,
    make_dataset,
    mistake,
    read_jsonl,
    trainer,
    write_manifest,
)

QUICK = ["--batch-size", "8", "--grad-accumulation", "1", "--epochs", "1", "--max-steps", "2"]
Spoil = Callable[[Path], Any]  # takes the data folder; may return arguments to add


@pytest.fixture
def data(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data in shards, to be spoiled."""
    return shutil.copytree(tiny, tmp_path / "data")


@pytest.fixture
def data_files(tiny_files: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data with four files an utterance, to be spoiled."""
    return shutil.copytree(tiny_files, tmp_path / "data")


@pytest.fixture(scope="session")
def small_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run of two steps of 8 samples. Read only."""
    output_dir = tmp_path_factory.mktemp("small_run") / "out"
    call_trainer(*data_args(tiny), *QUICK, "--output-dir", output_dir)
    return output_dir


def change_row(line: int, name: str = "train_pairs.jsonl", **changes: Any) -> Spoil:
    """Changes keys of one manifest line (from 1); None removes the key."""
    def spoil(data: Path) -> None:
        rows = read_jsonl(data / name)
        rows[line - 1] = {k: v for k, v in {**rows[line - 1], **changes}.items() if v is not None}
        write_manifest(data / name, rows)

    return spoil


def replace_line(line: int, text: str) -> Spoil:
    def spoil(data: Path) -> None:
        lines = (data / "train_pairs.jsonl").read_text(encoding="utf-8").splitlines()
        lines[line - 1] = text
        (data / "train_pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return spoil


def change_array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda data: np.save(data / name, change(np.load(data / name)))


def put(at: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return change


def write_config(**changes: Any) -> Spoil:
    """Changes keys of the gpt: section; None removes the key."""
    section = {k: v for k, v in {**GPT, **changes}.items() if v is not None}
    return lambda data: (data / "config.yaml").write_text(yaml.safe_dump({"gpt": section}))


def write_file(name: str, content: bytes) -> Spoil:
    return lambda data: (data / name).write_bytes(content)


def both(*spoils: Spoil) -> Spoil:
    return lambda data: [spoil(data) for spoil in spoils] and None


def complaint(data: Path, spoil: Spoil) -> str:
    extra = spoil(data)
    extra = extra if isinstance(extra, list) else []
    return mistake(*data_args(data), "--output-dir", data.parent / "out", *QUICK, *extra)


def complains(name: str, spoil: Spoil, *expected: str) -> Any:
    return pytest.param(spoil, expected, id=name.replace(" ", "_"))


SINGLE_CLIP = json.dumps({"id": "c1", "text": "ሰላም", "text_ids_path": "t.npy", "codes_path": "c.npy", "text_len": 5,
                          "code_len": 9, "condition_path": "k.npy", "emo_vec_path": "e.npy"})

MANIFESTS = [
    complains("missing file", lambda data: (data / "train_pairs.jsonl").unlink(),
              "train_pairs.jsonl", "No such file", "Check --train-manifest"),
    complains("missing validation file", lambda data: (data / "val_pairs.jsonl").unlink(),
              "val_pairs.jsonl", "No such file", "--val-manifest"),
    complains("empty file", write_file("train_pairs.jsonl", b""),
              "train_pairs.jsonl", "no rows", "tools.build_pairs"),
    complains("only blank lines", write_file("train_pairs.jsonl", b"\n\n  \n"),
              "train_pairs.jsonl", "no rows", "tools.build_pairs"),
    complains("broken JSON", replace_line(3, '{"id": "x", "target_text_len": 5'),
              "train_pairs.jsonl:3: broken JSON", "column", "Mend or delete the line"),
    complains("two rows in one line", replace_line(7, '{"id": 1} {"id": 2}'),
              "train_pairs.jsonl:7: broken JSON", "column 11", "Mend or delete the line"),
    complains("not a JSON object", replace_line(4, "[1, 2]"),
              "train_pairs.jsonl:4: not a JSON object", "tools.build_pairs"),
    complains("not UTF-8", write_file("train_pairs.jsonl", '{"id": "ሰላም"}'.encode("utf-16")),
              "train_pairs.jsonl", "not UTF-8", "byte 0"),
    complains("missing key", change_row(5, target_codes_path=None),
              "train_pairs.jsonl:5: missing target_codes_path", "tools.build_pairs"),
    complains("all missing keys at once", change_row(5, id=None, target_text_len=None, prompt_emo_vec_path=None),
              "train_pairs.jsonl:5: missing", "id", "target_text_len", "emo_vec_path", "tools.build_pairs"),
    complains("missing key of a validation row", change_row(2, "val_pairs.jsonl", target_text_len=None),
              "val_pairs.jsonl:2: missing target_text_len"),
    complains("length that is no number", change_row(6, target_text_len="seven"),
              "train_pairs.jsonl:6: target_text_len is 'seven'", "whole number"),
    complains("length of 0", change_row(6, target_code_len=0),
              "train_pairs.jsonl:6: target_code_len is 0", "at least 1"),
    complains("negative start", change_row(6, target_codes_start=-3),
              "train_pairs.jsonl:6: target_codes_start is -3", "at least 0"),
    complains("manifest of single clips", write_file("train_pairs.jsonl", SINGLE_CLIP.encode()),
              "train_pairs.jsonl:1: missing", "single clips", "tools.build_pairs"),
    complains("text longer than the model takes", change_row(9, target_text_len=31),
              "train_pairs.jsonl:9: 31 text tokens", "at most 30 and 61", "1 of 41 rows", "leave them out"),
    complains("codes longer than the model takes", change_row(9, target_code_len=62),
              "train_pairs.jsonl:9:", "62 codes", "at most 30 and 61", "leave them out"),
]

SHARDS = [
    complains("row beyond the end of its array", change_row(11, target_codes_start=1_000_000),
              "train_pairs.jsonl:11:", "1000000", "beyond the end of", "train_codes.npy", "tools.preprocess"),
    complains("array shorter than its rows", change_array("train_text_ids.npy", lambda array: array[:-1]),
              "train_pairs.jsonl:41:", "beyond the end of", "train_text_ids.npy", "tools.preprocess"),
    complains("code out of range", change_array("train_codes.npy", put(0, 64)),
              "train_pairs.jsonl:1: code 64 is outside 0..63", "train_codes.npy", "number_mel_codes"),
    complains("code out of range in the last row", change_array("train_codes.npy", put(-1, -1)),
              "train_pairs.jsonl:41: code -1 is outside 0..63", "train_codes.npy"),
    complains("text id out of range", change_array("val_text_ids.npy", put(0, 70_000)),
              "val_pairs.jsonl:1: text id 70000 is outside 0..", "another tokenizer", "--tokenizer"),
    complains("codes that are no whole numbers", change_array("train_codes.npy", lambda array: array + 0.5),
              "train_pairs.jsonl:", "train_codes.npy is float", "whole numbers"),
    complains("conditions of another width", change_array("train_condition.npy", lambda array: array[:, :16]),
              "train_pairs.jsonl:", "train_condition.npy holds [32, 16], the model needs [32, 32]", "Use the config"),
    complains("emotion vectors of another width", change_array("train_emo_vec.npy", lambda array: array[:, :16]),
              "train_pairs.jsonl:", "train_emo_vec.npy holds [16], the model needs [32]", "Use the config"),
]

FILES = [
    complains("fewer codes than the manifest says", change_array("train4_codes.npy", lambda array: array[:-1]),
              "train_pairs.jsonl:5: the manifest says", "codes", "train4_codes.npy has", "Preprocess"),
    complains("more text ids than the manifest says", change_array("train4_text_ids.npy", lambda a: np.append(a, 3)),
              "train_pairs.jsonl:5: the manifest says", "text", "train4_text_ids.npy has", "Preprocess"),
    complains("code out of range", change_array("train4_codes.npy", put(2, 65)),
              "train_pairs.jsonl:5: code 65 is outside 0..63", "train4_codes.npy", "number_mel_codes"),
    complains("text id out of range", change_array("val3_text_ids.npy", put(0, -5)),
              "val_pairs.jsonl:4: text id -5 is outside 0..", "val3_text_ids.npy", "another tokenizer"),
    complains("condition of another width", change_array("train4_condition.npy", lambda array: array[:, :16]),
              "train_pairs.jsonl:5:", "train4_condition.npy holds [32, 16]", "needs [32, 32]", "Use the config"),
]

CONFIGS = [
    complains("no gpt section", write_file("config.yaml", b"dataset: {name: x}\n"),
              "config.yaml: no gpt: section", "IndexTTS2's config.yaml"),
    complains("empty", write_file("config.yaml", b""), "config.yaml: no gpt: section", "IndexTTS2's config.yaml"),
    complains("not YAML", write_file("config.yaml", b"gpt: [1, 2\nlayers: }"), "config.yaml: not a YAML file", "line"),
    complains("not there", lambda data: ["--config", str(data / "other.yaml")], "other.yaml", "No such file"),
    complains("not beside the manifest either", lambda data: (data / "config.yaml").unlink(),
              "no model config", "config.yaml", "Pass --config"),
    complains("every wrong value at once", write_config(layers=0, heads="two", model_dim=None, max_mel_tokens=1.5),
              "config.yaml:", "gpt.layers is 0", "gpt.heads is 'two'", "gpt.model_dim is missing",
              "gpt.max_mel_tokens is 1.5"),
    complains("width that the heads do not divide", write_config(heads=3),
              "config.yaml: gpt.model_dim 32 is not a multiple of gpt.heads 3"),
    complains("start token beyond the codes", write_config(number_mel_codes=64),
              "config.yaml: gpt.start_mel_token and gpt.stop_mel_token must be below gpt.number_mel_codes"),
]


def tokenizer_of_the_data(sha256: str) -> Spoil:
    section = {"gpt": GPT, "dataset": {"tokenizer_sha256": sha256}}
    return lambda data: (data / "config.yaml").write_text(yaml.safe_dump(section))


def other_tokenizer(content: bytes) -> Spoil:
    def spoil(data: Path) -> list[str]:
        (data / "other.model").write_bytes(content)
        return ["--tokenizer", str(data / "other.model")]

    return spoil


TOKENIZERS = [
    complains("other than the data's", tokenizer_of_the_data("0123456789abcdef" * 4),
              str(TOKENIZER), "does not match", "train_pairs.jsonl", "made with 0123456789ab", "preprocess again"),
    complains("not a SentencePiece model", other_tokenizer(b"{\"vocab\": {}}"),
              "other.model: not a SentencePiece model", "tools.train_tokenizer"),
    complains("empty file", other_tokenizer(b""), "other.model: not a SentencePiece model", "tools.train_tokenizer"),
    complains("cut short", other_tokenizer(TOKENIZER.read_bytes()[:100_000]),
              "other.model: not a SentencePiece model", "tools.train_tokenizer"),
    complains("not there", lambda data: ["--tokenizer", str(data / "none.model")],
              "none.model", "No such file", "tools.train_tokenizer"),
]


def flags(*args: str) -> Spoil:
    return lambda data: list(args)


FLAGS = [
    complains("unknown flag", flags("--batchsize", "4"), "--batchsize", "--help lists the flags"),
    complains("abbreviated flag", flags("--learning", "1"), "--learning", "--help lists the flags"),
    complains("stray argument", flags("training_output"), "training_output", "--help lists the flags"),
    complains("wrong type", flags("--epochs", "many"), "--epochs", "'many'", "--help lists the flags"),
    complains("missing value", flags("--resume"), "--resume", "expected one argument", "--help"),
    complains("unknown precision", flags("--amp", "fp8"), "--amp", "'fp8'", "bf16"),
    complains("negative number", flags("--learning-rate", "-1"), "--learning-rate -1.0: must be at least 0"),
    complains("not a number", flags("--grad-clip", "nan"), "--grad-clip nan: must be at least 0"),
    complains("dropout of everything", flags("--dropout", "1"), "--dropout 1.0: must be below 1"),
    complains("nothing to learn", flags("--text-loss-weight", "0", "--mel-loss-weight", "0"),
              "--text-loss-weight", "--mel-loss-weight", "nothing would be learned"),
    complains("every wrong value at once", flags("--epochs", "0", "--log-interval", "0", "--seed", "-1"),
              "--epochs 0: must be at least 1", "--log-interval 0: must be at least 1", "--seed -1"),
    complains("accepting changed data without resume", flags("--accept-changed-data"),
              "--accept-changed-data goes with --resume"),
    complains("freezing a base that is not there", flags("--freeze-base-vocab"),
              "--freeze-base-vocab goes with --base-checkpoint"),
    complains("freezing a base that is not there, fresh start", flags("--freeze-base-vocab", "--resume", "auto"),
              "--freeze-base-vocab goes with --base-checkpoint"),
    complains("evaluation without weights", flags("--eval-only"), "--eval-only needs weights", "--resume auto",
              "--base-checkpoint"),
]


def assert_says(message: str, expected: tuple[str, ...]) -> None:
    for words in expected:
        assert words in message, f"{words!r} is not in: {message}"


@pytest.mark.parametrize("spoil,expected", MANIFESTS)
def test_a_bad_manifest_is_named_with_its_line(spoil: Spoil, expected: tuple[str, ...], data: Path):
    assert_says(complaint(data, spoil), expected)


@pytest.mark.parametrize("spoil,expected", SHARDS)
def test_shards_that_contradict_the_manifest_are_named_with_the_line(spoil: Spoil, expected, data: Path):
    assert_says(complaint(data, spoil), expected)


@pytest.mark.parametrize("spoil,expected", FILES)
def test_files_that_contradict_the_manifest_are_named_with_the_line(spoil: Spoil, expected, data_files: Path):
    assert_says(complaint(data_files, spoil), expected)


@pytest.mark.parametrize("spoil,expected", CONFIGS)
def test_a_bad_config_is_named(spoil: Spoil, expected, data: Path):
    assert_says(complaint(data, spoil), expected)


@pytest.mark.parametrize("spoil,expected", TOKENIZERS)
def test_a_bad_tokenizer_is_named(spoil: Spoil, expected, data: Path):
    assert_says(complaint(data, spoil), expected)


@pytest.mark.parametrize("spoil,expected", FLAGS)
def test_bad_flags_are_named_with_the_remedy(spoil: Spoil, expected, data: Path):
    assert_says(complaint(data, spoil), expected)


@pytest.mark.parametrize("args,expected", [
    (["--learning-rat", "1"], ["[Error] ", "--learning-rat", "train_gpt_v2.py --help"]),
    (["--train-manifest", "nowhere/train.jsonl", "--config", "{data}/config.yaml", "--output-dir", "{data}/../out"],
     ["[Error] manifest nowhere/train.jsonl: No such file", "Check --train-manifest"]),
])
def test_the_command_itself_fails_the_same_way(args: list[str], expected: list[str], data: Path):
    output = error_of(*[arg.replace("{data}", str(data)) for arg in args], "--val-manifest", data / "val_pairs.jsonl")
    assert_says(output, tuple(expected))
    assert output.count("[Error]") == 1


def test_a_mistake_does_not_leave_checkpoints_or_logs(data: Path):
    complaint(data, replace_line(3, "{"))
    assert {path.name for path in (data.parent / "out").iterdir()} <= {".lock", "last_exit.json"}


# ---------------------------------------------------------------------------------------------------------------------
# The output directory


@pytest.mark.parametrize("extra", [[], ["--eval-only", "--base-checkpoint", "{run}/latest.pth"]],
                         ids=["training", "evaluation"])
def test_an_output_directory_that_cannot_be_made_is_an_error(extra: list[str], tiny: Path, small_run: Path,
                                                             tmp_path: Path):
    (tmp_path / "file").write_text("")
    extra = [arg.replace("{run}", str(small_run)) for arg in extra]
    message = mistake(*data_args(tiny), *extra, "--output-dir", tmp_path / "file" / "out")
    assert_says(message, (f"--output-dir {tmp_path / 'file' / 'out'}", "Not a directory", "Choose a directory"))


@pytest.fixture
def busy_dir(tiny: Path, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """An output directory in which another process trains, and that process's id."""
    command = [sys.executable, str(TRAINER), *data_args(tiny), "--output-dir", str(tmp_path / "out"), "--epochs",
               "10000", "--log-interval", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("[Train]") for line in process.stdout)  # reads up to the first one
        yield tmp_path / "out", process.pid
        process.kill()


def test_a_directory_in_which_another_process_trains_is_refused_and_the_process_named(tiny: Path, busy_dir):
    output_dir, pid = busy_dir
    message = mistake(*data_args(tiny), "--output-dir", output_dir, "--resume", "auto")
    assert_says(message, (f"--output-dir {output_dir} is in use by process {pid} on ", "since", "Stop that run",
                          "another directory"))
    assert not (output_dir / "last_exit.json").exists()  # that one is still running


def test_a_batch_size_that_does_not_divide_the_global_batch_is_refused_on_resume(tiny: Path, small_run: Path):
    args = [*data_args(tiny), "--output-dir", small_run, "--resume", "auto"]
    for flag in ("--batch-size", "--grad-accumulation"):
        message = mistake(*args, flag, "3")
        assert_says(message, (f"{flag} 3 does not divide the checkpoint's global batch 8", "Choose a divisor"))


# ---------------------------------------------------------------------------------------------------------------------
# Manifest paths


@pytest.mark.parametrize("typed,path,language", [
    ("a.jsonl", "a.jsonl", None),
    ("a.jsonl::am", "a.jsonl", "am"),
    ("a.jsonl::AM", "a.jsonl", "am"),
    ("a=b@c/v=2@x.jsonl", "a=b@c/v=2@x.jsonl", None),
    ("a=b@c/v=2@x.jsonl::zh-cn", "a=b@c/v=2@x.jsonl", "zh-cn"),
    ("s3::am/a.jsonl", "s3::am/a.jsonl", None),
    ("a::b.jsonl", "a::b.jsonl", None),
])
def test_only_a_language_behind_two_colons_is_cut_off_a_manifest_path(typed: str, path: str, language: str | None):
    assert trainer.split_manifest(typed) == (path, language, 1.0)


def test_a_run_reads_manifests_whose_paths_contain_equals_and_at_signs(data: Path):
    folder = data.rename(data.parent / "lr=1@home")
    manifest = (folder / "train_pairs.jsonl").rename(folder / "pairs@v=2.jsonl")
    call_trainer("--train-manifest", f"{manifest}::am", "--val-manifest", folder / "val_pairs.jsonl", "--tokenizer",
                 TOKENIZER, "--output-dir", data.parent / "out", *QUICK)
    manifests = load_checkpoint(data.parent / "out" / "latest.pth")["manifests"]
    assert manifests["train"] == [{"path": str(manifest), "language": "am", "rows": 41, "made_with": MADE_WITH}]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged feature files


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_not_finite(path: Path) -> None:
    np.save(path, np.full_like(np.load(path), np.nan))


DAMAGES = {
    "missing": ("codes", Path.unlink),
    "empty": ("text_ids", lambda path: path.write_bytes(b"")),
    "cut in half": ("condition", cut_in_half),
    "zeros": ("codes", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "not an array": ("text_ids", lambda path: path.write_text("<html>404</html>")),
    "not finite": ("emo_vec", make_not_finite),
}


@pytest.fixture(scope="session")
def data_120(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training rows with four files each: one bad row is less than one percent. Read only."""
    return make_dataset(tmp_path_factory.mktemp("data_120") / "data", train_rows=120, shards=False)


@pytest.mark.parametrize("kind,damage", DAMAGES.values(), ids=[name.replace(" ", "_") for name in DAMAGES])
def test_one_damaged_feature_file_of_120_is_skipped_and_named(kind: str, damage, data_120: Path, tmp_path: Path):
    data = shutil.copytree(data_120, tmp_path / "data")
    damage(data / f"train17_{kind}.npy")
    output = call_trainer(*data_args(data), "--output-dir", tmp_path / "out", "--batch-size", 30,
                          "--grad-accumulation", 1, "--epochs", 1)
    warnings = [line for line in output.splitlines() if "skipped" in line]
    assert len(warnings) == 1 and warnings[0].startswith("[Warn] ")
    assert f"{data / 'train_pairs.jsonl'}:18: skipped" in warnings[0] and f"train17_{kind}.npy" in warnings[0]
    lengths = [32 + 2 + row["target_text_len"] + 2 + row["target_code_len"] + 2
               for row in read_jsonl(data / "train_pairs.jsonl")]
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["tokens_seen"] == sum(lengths) - lengths[17]


def test_more_than_one_percent_of_damaged_feature_files_is_an_error_that_names_them(data_120: Path, tmp_path: Path):
    data = shutil.copytree(data_120, tmp_path / "data")
    cut_in_half(data / "train17_codes.npy")
    cut_in_half(data / "train80_emo_vec.npy")
    message = mistake(*data_args(data), "--output-dir", tmp_path / "out")
    assert_says(message, ("2 of 120 rows", "more than 1%", "Preprocess them again or drop the rows",
                          "train_pairs.jsonl:18:", "train17_codes.npy", "train_pairs.jsonl:81:", "train80_emo_vec.npy"))


@pytest.mark.parametrize("kind", ["codes", "text_ids", "condition", "emo_vec"])
@pytest.mark.parametrize("damage", [Path.unlink, cut_in_half], ids=["missing", "cut_in_half"])
def test_a_damaged_shard_spoils_all_its_rows_and_is_an_error(kind: str, damage, data: Path):
    damage(data / f"train_{kind}.npy")
    message = mistake(*data_args(data), "--output-dir", data.parent / "out", *QUICK)
    assert_says(message, ("of 41 rows", f"train_{kind}.npy", "train_pairs.jsonl:"))


@pytest.mark.filterwarnings("ignore")
def test_a_feature_file_with_any_bit_of_its_header_flipped_never_ends_in_stack_frames(data_files: Path):
    """Whatever the bit, the row is whole, skipped, or refused with its place."""
    model = trainer.model_config_from(GPT, "test", 50)
    path = data_files / "val0_codes.npy"
    original = path.read_bytes()
    for at in range(80):  # the header
        for bit in range(8):
            path.write_bytes(original[:at] + bytes([original[at] ^ 1 << bit]) + original[at + 1 :])
            try:
                trainer.ManifestDataset([str(data_files / "val_pairs.jsonl")], model)
            except trainer.UserError as error:
                assert "val_pairs.jsonl:1" in str(error)
