"""Whatever a shell, an editor, a launcher, a moved file or a limit does to a run: the run that was meant, or one error.

Each case is run for real, by a process of its own. "runs" means: to the end, exit status 0, the checkpoint holds what
an ordinary run's would. "error" means: one [Error] line that names what is wrong, exit status 1, no stack frames.

| what is strange                                                        | what must happen                            |
|------------------------------------------------------------------------|---------------------------------------------|
| **The shell**                                                          |                                             |
| a path with blanks, Ethiopic letters, quotes and a line break          | runs                                        |
| a name that begins with a dash, behind `=` / behind a blank            | runs / error                                |
| a slash at the end of --output-dir or of a manifest                    | runs, resumes                               |
| `~` that no shell expanded                                             | the home directory, or error                |
| an unset variable: --output-dir, --resume, --train-manifest, --config, | error that names the flag                   |
|   --tokenizer or --base-checkpoint ""                                  |                                             |
| a script with Windows line ends: the last argument ends in \\r         | taken without it, or error; no such folder  |
| a flag twice                                                           | the last one counts                         |
| --flag=value                                                           | runs                                        |
| dashes and minus signs of a word processor, a decimal comma, 1e3 steps,| error that names the value                  |
|   a thousands separator                                                |                                             |
| --resume with a folder / with AUTO                                     | goes on there, or error; nothing written    |
|                                                                        |   beside the folder                         |
| relative paths, and a resume from another working directory            | error that names the path that is not there |
| started through a link to the script, with python -OO, few environment | runs                                        |
|   variables, another working directory                                 |                                             |
| **Numbers**                                                            |                                             |
| --learning-rate 1e99, 2, inf, nan                                      | error                                       |
| --learning-rate 0 and -0                                               | the default, printed                        |
| --seed 2^63 and 2^64                                                   | error                                       |
| --batch-size, --epochs, --log-interval far beyond the data             | runs                                        |
| --max-steps or --epochs below what the checkpoint has                  | nothing to do, says so, changes no file     |
| one training row, one validation row                                   | runs                                        |
| **Text editors**                                                       |                                             |
| a manifest or config.yaml with a byte order mark                       | runs                                        |
| Windows line ends, blank lines at the end, no line end at the end      | runs                                        |
| line separators (U+2028, U+0085) inside a text                         | runs                                        |
| a NUL byte, a last line that breaks off                                | error that names the line                   |
| a gzip-compressed manifest, a directory                                | error                                       |
| a number of 30 digits, a length of 12.0                                | error that names the line                   |
| config.yaml edited before a resume                                     | the checkpoint's counts                     |
| an edited --config typed on resume: fewer layers, other heads, other   | error                                       |
|   stop token                                                           |                                             |
| metrics.jsonl with garbage, with JSON that is no record                | runs                                        |
| **Files moved, linked, copied, lost**                                  |                                             |
| the data folder moved before a resume, without / with the new path     | error that names the old one / runs         |
| the output directory moved, or a symbolic link                         | runs                                        |
| the output directory a link to nowhere, a file, /dev/null, a name too  | error                                       |
|   long, below /proc                                                    |                                             |
| shards that are symbolic links                                         | runs                                        |
| a manifest on standard input                                           | error: its arrays are not beside it         |
| a checkpoint copied away alone                                         | runs there                                  |
| a checkpoint through a symbolic or hard link in its folder             | runs                                        |
| --resume best.pth                                                      | goes back to that step                      |
| latest.pth a link to nowhere, nothing else there                       | error, not a fresh start                    |
| latest.pth a link to nowhere, model_step files there                   | goes on from the newest                     |
| a checkpoint renamed to a later step                                   | later starts do not return to it            |
| a checkpoint of other data among a run's own                           | named: error, or stepped over               |
| file times in the wrong order, the clock set back                      | the highest step counts                     |
| the log directory removed, before a resume / while running             | runs                                        |
| a file called logs                                                     | error                                       |
| the output directory removed while running                             | error or a whole checkpoint, never a loss   |
|                                                                        |   that nobody is told                       |
| a shard cut short while it is trained on                               | error, or what it held before; never zeros, |
|                                                                        |   never killed by a signal                  |
| **Launchers**                                                          |                                             |
| RANK alone; SLURM's variables without torchrun                         | runs as one process                         |
| WORLD_SIZE=abc, 0, or RANK beyond it; torchrun's variables without an  | error                                       |
|   address                                                              |                                             |
| OMP_NUM_THREADS=0 and abc; CUDA_VISIBLE_DEVICES empty                  | runs                                        |
| LC_ALL=C, ASCII output and Ethiopic paths, then resumed under UTF-8    | runs                                        |
| no HOME, a TMPDIR that is not there                                    | runs                                        |
| SIGCHLD ignored, one core, lowest priority                             | runs                                        |
| **Limits and descriptors**                                             |                                             |
| 64 open files and more shards than that / a hard limit above it        | error that names the limit, or runs / runs  |
| too little memory for the model                                        | error                                       |
| standard input closed; standard output closed at the start; a full     | runs                                        |
|   disk under it; standard error closed                                 |                                             |
| umask 0777                                                             | runs, or error                              |

Elsewhere: a limit on file sizes, a full disk, files without links (test_checkpoint_files.py); two trainers in one
directory, damaged files (test_bad_input.py); a terminal that closes, a pipe that breaks (test_signals.py).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TRAINER, load_checkpoint, read_jsonl, resumable_state, write_manifest
from fresh_process import AT_STEP_2, QUICK, data_args, errs, runs, runs_or_errs, step_of, train_in_process
from old_checkpoints import make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """13 training rows, 5 validation rows, a tokenizer; to be spoiled."""
    return shutil.copytree(make.HERE / "data", tmp_path / "data")


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an ordinary run of 3 steps, which saved at 2 and 3. Read only."""
    out = tmp_path_factory.mktemp("ordinary") / "out"
    runs(train_in_process(*data_args(make.HERE / "data"), *QUICK, "--output-dir", out))
    return out


@pytest.fixture(scope="module")
def five_steps(ordinary: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The state of that run after it was resumed for two steps more."""
    out = shutil.copytree(ordinary, tmp_path_factory.mktemp("five_steps") / "out")
    runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 5))
    return resumable_state(load_checkpoint(out / "latest.pth"))


@pytest.fixture
def out(ordinary: Path, tmp_path: Path) -> Path:
    """A copy of the ordinary run's output directory, latest.pth a link as a run leaves it."""
    out = shutil.copytree(ordinary, tmp_path / "out")
    (out / "latest.pth").unlink()
    os.link(out / "model_step3.pth", out / "latest.pth")
    return out


def is_ordinary(output_dir: Path, ordinary: Path) -> bool:
    return resumable_state(load_checkpoint(output_dir / "latest.pth")) == resumable_state(
        load_checkpoint(ordinary / "latest.pth"))


# ---------------------------------------------------------------------------------------------------------------------
# The shell


def test_paths_may_hold_blanks_ethiopic_quotes_and_line_breaks(data, tmp_path, ordinary):
    strange = data.rename(tmp_path / "my data 'ሰላም' \"ዓለም\" \n#1 $HOME; &")
    out = tmp_path / "ውጤት  1\n"
    runs(train_in_process(*data_args(strange), *QUICK, "--output-dir", out, "--max-steps", 2))
    runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 3))
    assert step_of(out) == 3


def test_a_name_that_begins_with_a_dash(data, tmp_path):
    data.rename(tmp_path / "-data")
    args = [f"--train-manifest={'-data/train_pairs.jsonl'}", "--val-manifest=-data/val_pairs.jsonl",
            "--tokenizer=-data/tokenizer.model", *QUICK]
    runs(train_in_process(*args, "--output-dir=-out", cwd=tmp_path))
    assert step_of(tmp_path / "-out") == 3
    errs(train_in_process(*args, "--output-dir", "-out", cwd=tmp_path), "--output-dir", "expected one argument")


def test_a_slash_at_the_end(data, tmp_path):
    out = tmp_path / "out"
    args = [f"{arg}/" if arg.endswith("jsonl") else arg for arg in data_args(data)]
    runs(train_in_process(*args, *QUICK, "--output-dir", f"{out}/", "--max-steps", 2))
    runs(train_in_process("--output-dir", f"{out}//", "--resume", "auto", "--max-steps", 3))
    assert step_of(out) == 3


def test_a_tilde_that_no_shell_expanded_is_the_home_directory_or_an_error(data, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", "~/out", cwd=tmp_path, env={"HOME": str(home)})
    if runs_or_errs(done, "~"):
        assert step_of(home / "out") == 3
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("flag", ["--output-dir", "--resume", "--train-manifest", "--val-manifest", "--config",
                                  "--tokenizer", "--base-checkpoint"])
def test_an_empty_value_of_an_unset_variable_is_an_error(flag, data, tmp_path):
    (tmp_path / "work").mkdir()
    args = [*data_args(data), *QUICK, "--output-dir", tmp_path / "out", flag, ""]
    errs(train_in_process(*args, cwd=tmp_path / "work"), flag)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("flag,value", [("--output-dir", "out"), ("--resume", "auto"), ("--max-steps", "3")])
def test_a_carriage_return_of_a_windows_script_gets_into_no_name(flag, value, data, tmp_path):
    args = [*data_args(data), *QUICK, "--output-dir", "out", flag, f"{value}\r"]
    if runs_or_errs(train_in_process(*args, cwd=tmp_path), value):
        assert step_of(tmp_path / "out") == 3
    assert not (tmp_path / "out\r").exists()


def test_the_last_of_a_flag_typed_twice_counts_and_an_equals_sign_is_the_same(data, tmp_path):
    runs(train_in_process(*data_args(data), *QUICK, f"--output-dir={tmp_path / 'out'}", "--max-steps=5",
                          "--max-steps=2"))
    assert step_of(tmp_path / "out") == 2


@pytest.mark.parametrize("args", [
    ["--learning-rate", "−0.001"], ["–-max-steps", "3"], ["—max-steps", "3"], ["--learning-rate", "1,5e-3"],
    ["--max-steps", "1e3"], ["--max-steps", "1,000"], ["--max-steps", "3.0"], ["--epochs", "፫"]],
    ids=["minus", "en_dash", "em_dash", "comma", "exponent", "thousands", "fraction", "ethiopic"])
def test_what_a_word_processor_makes_of_flags_and_numbers_is_named(args, data, tmp_path):
    errs(train_in_process(*data_args(data), "--output-dir", tmp_path / "out", *args), args[0] if "max" in args[0]
         and not args[0].startswith("--") else args[1])
    assert not (tmp_path / "out").exists()


def test_resuming_from_a_folder_goes_on_in_it_or_is_an_error_and_writes_nothing_beside_it(out):
    beside = {path.name for path in out.parent.iterdir()}
    if runs_or_errs(train_in_process("--resume", out, "--max-steps", 5), "out"):
        assert step_of(out) == 5
    assert {path.name for path in out.parent.iterdir()} == beside


def test_auto_in_capitals_is_auto_or_an_error_that_tells(data, out):
    if runs_or_errs(train_in_process("--output-dir", out, "--resume", "AUTO", "--max-steps", 5), "AUTO"):
        assert step_of(out) == 5


def test_relative_paths_and_a_resume_from_another_working_directory(data, tmp_path):
    runs(train_in_process(*data_args("data"), *QUICK, "--output-dir", "out", cwd=tmp_path))
    (tmp_path / "elsewhere").mkdir()
    errs(train_in_process("--output-dir", "../out", "--resume", "auto", "--max-steps", 5, cwd=tmp_path / "elsewhere"),
         "data/")
    runs(train_in_process("--output-dir", "../out", "--resume", "auto", "--max-steps", 5, *data_args(data),
                          cwd=tmp_path / "elsewhere"))
    assert step_of(tmp_path / "out") == 5


def test_a_linked_script_a_bare_environment_another_directory_and_python_without_assertions(data, tmp_path, ordinary):
    (tmp_path / "train").symlink_to(TRAINER)
    command = [sys.executable, "-OO", str(tmp_path / "train"), *data_args(data), *QUICK, "--output-dir",
               str(tmp_path / "out")]
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, encoding="utf-8")
    runs((done.returncode, done.stdout + done.stderr))
    assert is_ordinary(tmp_path / "out", ordinary)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("value", ["1e99", "2", "inf", "nan", "-1e-3"])
def test_a_learning_rate_that_cannot_be_meant_is_an_error(value, data, tmp_path):
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", f"--learning-rate={value}"),
         "--learning-rate")


@pytest.mark.parametrize("value", ["0", "-0", "0e9"])
def test_a_learning_rate_of_0_means_the_default_which_is_printed(value, data, tmp_path):
    output = runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out",
                                   f"--learning-rate={value}"))
    assert "peak learning rate 0.001" in output


@pytest.mark.parametrize("value", [2**63, 2**64, -1])
def test_a_seed_beyond_63_bits_is_an_error(value, data, tmp_path):
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", f"--seed={value}"), "--seed")


def test_the_largest_seed_trains(data, tmp_path):
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", "--seed", 2**63 - 1))


def test_numbers_far_beyond_the_data_are_taken(data, tmp_path):
    runs(train_in_process(*data_args(data), "--output-dir", tmp_path / "out", "--batch-size", 10**6,
                          "--grad-accumulation", 1, "--epochs", 10**12, "--max-steps", 2, "--log-interval", 10**12,
                          "--save-interval", 10**12, "--val-interval", 10**12, "--keep-checkpoints", 10**6))
    checkpoint = load_checkpoint(tmp_path / "out" / "latest.pth")
    assert (checkpoint["step"], checkpoint["epoch"]) == (2, 2)


@pytest.mark.parametrize("limit", [["--max-steps", "2"], ["--epochs", "1", "--max-steps", "0"]])
def test_a_limit_below_what_is_done_leaves_everything_as_it_is(limit, data, tmp_path):
    out = tmp_path / "out"
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", out, "--max-steps", 5))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    output = runs(train_in_process("--output-dir", out, "--resume", "auto", *limit))
    assert "complete" in output and limit[0] in output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")} == before


def test_one_training_row_and_one_validation_row_train(data, tmp_path):
    for name in ("train", "val"):
        write_manifest(data / f"{name}_pairs.jsonl", read_jsonl(data / f"{name}_pairs.jsonl")[:1])
    runs(train_in_process(*data_args(data), "--output-dir", tmp_path / "out", "--epochs", 3))
    assert load_checkpoint(tmp_path / "out" / "latest.pth")["epoch"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Text editors


@pytest.mark.parametrize("name", ["train_pairs.jsonl", "config.yaml"])
def test_a_byte_order_mark_does_no_harm(name, data, tmp_path, ordinary):
    (data / name).write_bytes("\ufeff".encode() + (data / name).read_bytes())
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    assert is_ordinary(tmp_path / "out", ordinary)


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r\n"), lambda text: text + b"\n \n\t\r\n\n", lambda text: text.rstrip(b"\n")],
    ids=["windows_line_ends", "blank_lines", "no_line_end"])
def test_line_ends_and_blank_lines_do_no_harm(change, data, tmp_path, ordinary):
    for name in ("train_pairs.jsonl", "val_pairs.jsonl", "config.yaml"):
        if name != "config.yaml" or b"\t" not in change(b"\n"):  # YAML knows no tabs
            (data / name).write_bytes(change((data / name).read_bytes()))
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    assert is_ordinary(tmp_path / "out", ordinary)


def test_line_separators_inside_a_text_end_no_line(data, tmp_path, ordinary):
    rows = [{**row, "target_text": "ሰላም\u2028ዓለም\u0085\x0b"} for row in read_jsonl(data / "train_pairs.jsonl")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (data / "train_pairs.jsonl").write_text(text, encoding="utf-8")
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    assert is_ordinary(tmp_path / "out", ordinary)


@pytest.mark.parametrize("change,word", [
    (lambda text: text + bytes(512), "train_pairs.jsonl:14"), (lambda text: text[:-40], "train_pairs.jsonl:13"),
    (gzip.compress, "train_pairs.jsonl")], ids=["NUL", "breaks_off", "gzip"])
def test_a_manifest_that_a_crash_or_a_packer_changed_is_named(change, word, data, tmp_path):
    (data / "train_pairs.jsonl").write_bytes(change((data / "train_pairs.jsonl").read_bytes()))
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"), word)


@pytest.mark.parametrize("key,value", [
    ("target_codes_start", 10**30), ("target_text_ids_start", 10**30), ("prompt_condition_start", 10**30),
    ("prompt_emo_vec_start", 10**30), ("target_code_len", 10**30), ("target_code_len", 12.0),
    ("target_text_len", True)])
def test_a_number_in_a_row_that_is_out_of_all_bounds_is_named(value, key, data, tmp_path):
    rows = read_jsonl(data / "train_pairs.jsonl")
    rows[6][key] = value
    write_manifest(data / "train_pairs.jsonl", rows)
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"), "train_pairs.jsonl:7")


def edit_config(data: Path, **changes: int) -> None:
    config = yaml.safe_load((data / "config.yaml").read_text())
    config["gpt"].update(changes)
    (data / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_config_that_was_edited_before_a_resume_does_not_count_unless_it_is_typed(data, tmp_path, five_steps):
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    edit_config(data, layers=3, heads=4)
    runs(train_in_process("--output-dir", tmp_path / "out", "--resume", "auto", "--max-steps", 5))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == five_steps


@pytest.mark.parametrize("changes", [{"layers": 1}, {"layers": 3}, {"heads": 4},
                                     {"start_mel_token": 33, "stop_mel_token": 32}, {"model_dim": 16}],
                         ids=["fewer_layers", "more_layers", "heads", "tokens", "width"])
def test_an_edited_config_that_is_typed_on_resume_is_an_error(changes, data, out):
    edit_config(data, **changes)
    errs(train_in_process(*data_args(data), "--output-dir", out, "--resume", "auto", "--max-steps", 5, "--config",
                          data / "config.yaml"), "--config")
    assert step_of(out) == 3


@pytest.mark.parametrize("garbage", [b"\xff\x00garbage\n", b"5\n", b"null\n", b"[]\n", b'{"loss": 1}\n',
                                     b'{"step": null, "kind": "train"}\n', b'{"step": "x", "kind": "train"}\n',
                                     b'{"kind": "train", "step": 3', b"\x00" * 600],
                         ids=["bytes", "number", "null", "list", "no_step", "step_null", "step_text", "torn", "zeros"])
def test_garbage_in_metrics_jsonl_does_not_stop_a_resume(garbage, out, five_steps):
    (metrics,) = out.glob("logs/run_*/metrics.jsonl")
    metrics.write_bytes((garbage if garbage.endswith(b"\n") else b"") + metrics.read_bytes() + garbage)
    runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 5))
    assert resumable_state(load_checkpoint(out / "latest.pth")) == five_steps
    found = re.findall(rb'"kind": "train", "epoch": \d, "step": (\d)', metrics.read_bytes())
    assert found == [b"1", b"2", b"3", b"4", b"5"]


# ---------------------------------------------------------------------------------------------------------------------
# Files moved, linked, copied, lost


def test_data_that_moved_before_a_resume(data, tmp_path, five_steps):
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    moved = data.rename(tmp_path / "moved")
    again = ["--output-dir", tmp_path / "out", "--resume", "auto", "--max-steps", 5]
    errs(train_in_process(*again), str(data))
    runs(train_in_process(*again, *data_args(moved)))
    assert resumable_state(load_checkpoint(tmp_path / "out" / "latest.pth")) == five_steps


def test_an_output_directory_that_moved_or_is_a_link(out, tmp_path, five_steps):
    moved = out.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    runs(train_in_process("--output-dir", tmp_path / "link", "--resume", "auto", "--max-steps", 5))
    assert resumable_state(load_checkpoint(moved / "latest.pth")) == five_steps
    assert len(list(moved.glob("logs/run_*"))) == 1


@pytest.mark.parametrize("place", ["dangling", "file", "/dev/null", "/proc/out", "x" * 300])
def test_an_output_directory_that_cannot_be_one_is_an_error(place, data, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "file").write_text("")
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / place), "--output-dir")


def test_shards_that_are_links_are_read(data, tmp_path, ordinary):
    (tmp_path / "store").mkdir()
    for path in data.glob("*.npy"):
        path.rename(tmp_path / "store" / path.name)
        path.symlink_to(tmp_path / "store" / path.name)
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out"))
    assert is_ordinary(tmp_path / "out", ordinary)


def test_a_manifest_on_standard_input_is_an_error_since_its_arrays_are_not_beside_it(data, tmp_path):
    manifest = str(data / "train_pairs.jsonl")
    args = [*data_args(data), *QUICK, "--output-dir", tmp_path / "out", "--config", data / "config.yaml"]
    args[1] = "/dev/stdin"
    errs(train_in_process(*args, before=f"import os; os.dup2(os.open({manifest!r}, os.O_RDONLY), 0)"), "/dev/")


def test_a_manifest_that_is_a_directory_is_an_error(data, tmp_path):
    args = [*data_args(data), *QUICK, "--output-dir", tmp_path / "out"]
    args[1] = str(data)
    errs(train_in_process(*args), str(data), "directory")


def test_a_checkpoint_that_was_copied_away_alone_goes_on_there(out, tmp_path, five_steps):
    (tmp_path / "copy").mkdir()
    shutil.copyfile(out / "latest.pth", tmp_path / "copy" / "latest.pth")
    shutil.copyfile(out / "model_step3.pth", tmp_path / "mine.pth")
    runs(train_in_process("--output-dir", tmp_path / "copy", "--resume", "auto", "--max-steps", 5))
    runs(train_in_process("--resume", tmp_path / "mine.pth", "--output-dir", tmp_path / "new", "--max-steps", 5))
    for folder in ("copy", "new"):
        assert resumable_state(load_checkpoint(tmp_path / folder / "latest.pth")) == five_steps
    assert step_of(out) == 3


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_a_checkpoint_in_its_folder_is_that_checkpoint(link, out, five_steps):
    link(out / "model_step3.pth", out / "newest.pth")
    runs(train_in_process("--resume", out / "newest.pth", "--max-steps", 5))
    assert resumable_state(load_checkpoint(out / "latest.pth")) == five_steps
    assert (out / "newest.pth").exists() and len(list(out.glob("logs/run_*"))) == 1


def test_resuming_from_best_goes_back_to_its_step(data, tmp_path):
    out = tmp_path / "out"
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", out, "--val-interval", 2, "--max-steps", 5,
                          "--learning-rate", 0.3, "--warmup-steps", 0))
    best = load_checkpoint(out / "best.pth")["step"]
    assert best < 5
    output = runs(train_in_process("--resume", out / "best.pth", "--learning-rate", 0.001, "--max-steps", 6))
    assert f"Step: {best}" in output and step_of(out) == 6
    assert load_checkpoint(out / "best.pth")["best"]["step"] == load_checkpoint(out / "latest.pth")["best"]["step"]


def test_a_latest_that_links_to_nowhere_is_no_fresh_start(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "latest.pth").symlink_to(tmp_path / "unmounted" / "model_step9.pth")
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", out, "--resume", "auto"), "latest.pth")


def test_a_latest_that_links_to_nowhere_is_stepped_over(out, five_steps):
    (out / "latest.pth").unlink()
    (out / "latest.pth").symlink_to(out / "gone.pth")
    runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 5))
    assert resumable_state(load_checkpoint(out / "latest.pth")) == five_steps


def test_later_starts_do_not_return_to_a_checkpoint_that_was_renamed(out):
    os.rename(out / "model_step2.pth", out / "model_step200.pth")
    again = ["--output-dir", out, "--resume", "auto", "--max-steps"]
    runs_or_errs(train_in_process(*again, 5), "model_step200.pth")
    if step_of(out) == 5:
        assert "Step: 5" in runs(train_in_process(*again, 6))
        assert step_of(out) == 6


def test_a_checkpoint_of_other_data_among_a_runs_own_is_named(data, out, tmp_path):
    write_manifest(data / "train_pairs.jsonl", read_jsonl(data / "train_pairs.jsonl")[:-1])
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "other", "--max-steps", 6))
    shutil.copyfile(tmp_path / "other" / "model_step6.pth", out / "model_step6.pth")
    done = train_in_process(*data_args(make.HERE / "data"), "--output-dir", out, "--resume", "auto", "--max-steps", 5)
    if runs_or_errs(done, "model_step6.pth"):
        assert "model_step6.pth" in done[1] and step_of(out) == 5


def test_the_highest_step_counts_whatever_the_clock_says(out, five_steps):
    for path, when in ((out / "model_step2.pth", 2e9), (out / "model_step3.pth", 1e9)):
        os.utime(path, (when, when))
    before = "import time\nnow = time.time\ntime.time = lambda: now() - 4e8\n"
    runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 5, before=before))
    assert resumable_state(load_checkpoint(out / "latest.pth")) == five_steps


def test_removed_logs_are_made_anew(out, five_steps):
    shutil.rmtree(out / "logs")
    runs(train_in_process("--output-dir", out, "--resume", "auto", "--max-steps", 5))
    assert resumable_state(load_checkpoint(out / "latest.pth")) == five_steps
    (metrics,) = out.glob("logs/run_*/metrics.jsonl")
    assert [line["step"] for line in read_jsonl(metrics) if line["kind"] == "train"] == [4, 5]


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_called_logs_is_an_error_that_names_it(resume, data, out, tmp_path):
    if not resume:
        out = tmp_path / "new"
        out.mkdir()
    shutil.rmtree(out / "logs", ignore_errors=True)
    (out / "logs").write_text("notes")
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", out, *(["--resume", "auto"] if resume else []),
                            "--max-steps", 5)
    runs_or_errs(done, "logs")
    assert list(out.rglob("logs"))


def test_logs_that_are_removed_while_training_do_not_stop_it(data, tmp_path):
    out = tmp_path / "out"
    before = f"import shutil\ndef act(): shutil.rmtree({str(out / 'logs')!r})\n{AT_STEP_2}"
    status, output = train_in_process(*data_args(data), *QUICK, "--output-dir", out, "--max-steps", 8, before=before)
    assert status == 0 and "Traceback" not in output, output
    assert step_of(out) == 8 and (out / "model_step4.pth").exists()


def test_an_output_directory_that_is_removed_while_training_is_not_passed_over(data, tmp_path):
    out = tmp_path / "out"
    before = f"import shutil\ndef act(): shutil.rmtree({str(out)!r})\n{AT_STEP_2}"
    status, output = train_in_process(*data_args(data), *QUICK, "--output-dir", out, "--max-steps", 8, before=before)
    assert "Traceback" not in output, output
    if status == 0:
        assert step_of(out) == 8
    else:
        assert status == 1 and "could not be saved" in output.lower() and str(out) in output, output


@pytest.mark.parametrize("name", ["train_codes.npy", "train_condition.npy"])
def test_a_shard_that_is_cut_short_while_it_is_trained_on_is_an_error(name, data, tmp_path):
    """As when tools.preprocess writes into the folder again."""
    rows = read_jsonl(data / "train_pairs.jsonl")
    write_manifest(data / "train_pairs.jsonl", [{**row, "id": f"{row['id']}_{n}"} for n in range(20) for row in rows])
    args = [*data_args(data), *QUICK, "--save-interval", 0, "--max-steps", 60, "--output-dir"]
    runs(train_in_process(*args, tmp_path / "whole"))
    before = f"import os\ndef act(): os.truncate({str(data / name)!r}, 128)\n{AT_STEP_2}"
    if runs_or_errs(train_in_process(*args, tmp_path / "cut", before=before), name):  # it was in memory
        assert is_ordinary(tmp_path / "cut", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@pytest.mark.parametrize("env", [
    {"RANK": "0"}, {"RANK": "3", "WORLD_SIZE": "4"}, {"LOCAL_RANK": "1"}, {"WORLD_SIZE": "abc"},
    {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODELIST": "n1"}],
    ids=["rank", "rank_and_size", "local_rank", "size", "slurm"])
def test_half_of_a_launchers_variables_is_one_process(env, data, tmp_path, ordinary):
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", env=env)
    if runs_or_errs(done, next(iter(env))):
        assert is_ordinary(tmp_path / "out", ordinary)


@pytest.mark.parametrize("changes", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"RANK": "5"}, {"RANK": "-1"},
                                     {"RANK": ""}, {"LOCAL_WORLD_SIZE": "0"}, {}],
                         ids=["abc", "no_process", "rank_beyond", "negative", "empty", "no_local", "no_address"])
def test_a_launchers_variables_that_make_no_sense_are_an_error(changes, data, tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": None,
           "MASTER_PORT": None, **changes}
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", env=env, seconds=8)
    errs(done, next(iter(changes), "MASTER_ADDR"))


@pytest.mark.parametrize("threads", ["0", "abc"])
def test_thread_counts_that_openmp_refuses_do_no_harm(threads, data, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TRAINER), *data_args(data), *QUICK, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    runs((done.returncode, done.stdout + done.stderr))
    assert step_of(tmp_path / "out") == 3


def test_an_ascii_locale_and_ethiopic_paths_then_resumed_under_utf_8(data, tmp_path):
    folder = data.rename(tmp_path / "ዳታ")
    rows = [{**row, "id": f"ሰ{row['id']}"} for row in read_jsonl(folder / "train_pairs.jsonl")]
    write_manifest(folder / "train_pairs.jsonl", rows)
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(TRAINER), *data_args(folder), *QUICK, "--output-dir", str(tmp_path / "ውጤት")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    runs((done.returncode, done.stdout + done.stderr))
    runs(train_in_process("--output-dir", tmp_path / "ውጤት", "--resume", "auto", "--max-steps", 5))
    assert step_of(tmp_path / "ውጤት") == 5


def test_no_home_and_no_temporary_directory(data, tmp_path, ordinary):
    env = {"HOME": None, "TMPDIR": str(tmp_path / "none"), "USER": None, "LOGNAME": None, "XDG_CACHE_HOME": None}
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", env=env))
    assert is_ordinary(tmp_path / "out", ordinary)


def test_ignored_children_one_core_and_the_lowest_priority(data, tmp_path, ordinary):
    before = """
import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.nice(19)
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
"""
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", "--num-workers", 2,
                          before=before))
    assert is_ordinary(tmp_path / "out", ordinary)


# ---------------------------------------------------------------------------------------------------------------------
# Limits and descriptors


def in_shards_of_one(data: Path, copies: int) -> None:
    """Spreads every row over shard files of its own, `copies` times over."""
    rows = []
    for row in read_jsonl(data / "train_pairs.jsonl"):
        lengths = {"target_text_ids": row["target_text_len"], "target_codes": row["target_code_len"],
                   "prompt_condition": 32, "prompt_emo_vec": 1}
        for number in range(copies):
            new = {**row, "id": f"{row['id']}_{number}"}
            for key, length in lengths.items():
                start, name = row[f"{key}_start"], f"{row['id']}_{number}_{key}.npy"
                np.save(data / name, np.load(data / row[f"{key}_path"])[start : start + length])
                new |= {f"{key}_path": name, f"{key}_start": 0}
            rows.append(new)
    write_manifest(data / "train_pairs.jsonl", rows)


@pytest.mark.parametrize("hard", [64, 4096])
def test_fewer_open_files_than_shards(hard, data, tmp_path):
    in_shards_of_one(data, 2)
    before = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))"
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", "--max-steps", 8,
                            before=before)
    if hard == 64:
        if not runs_or_errs(done, "open files"):
            assert "preprocess" not in done[1].lower() and "damaged" not in done[1].lower()
    else:
        runs(done)
        assert step_of(tmp_path / "out") == 8


def test_too_little_memory_for_the_model_is_an_error(data, tmp_path):
    edit_config(data, model_dim=1024, layers=24)
    for path in data.glob("*_condition.npy"):
        np.save(path, np.zeros((len(np.load(path)), 1024), np.float32))
    for path in data.glob("*_emo.npy"):
        np.save(path, np.zeros((len(np.load(path)), 1024), np.float32))
    before = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 300_000_000, -1))
"""
    errs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before), "memory")


@pytest.mark.parametrize("before", [
    "import os; os.close(0)", "import os; os.close(2)", "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"],
    ids=["input_closed", "error_closed", "output_full"])
def test_descriptors_that_are_closed_or_full_do_no_harm(before, data, tmp_path, ordinary):
    runs(train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out", before=before))
    assert is_ordinary(tmp_path / "out", ordinary)


def test_an_output_that_is_closed_at_the_start(data, tmp_path):
    command = [sys.executable, str(TRAINER), *data_args(data), *QUICK, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"})
    runs((done.returncode, done.stderr))
    assert step_of(tmp_path / "out") == 3


def test_a_umask_that_forbids_everything(data, tmp_path):
    done = train_in_process(*data_args(data), *QUICK, "--output-dir", tmp_path / "out",
                            before="import os; os.umask(0o777)")
    if runs_or_errs(done, str(tmp_path / "out")):
        assert step_of(tmp_path / "out") == 3
