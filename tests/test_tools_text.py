"""Texts, the synthetic voice, the tokenizer, what all programs of tools/ share: a test is named after its promise."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tools import _common, amharic_text, demo, speak, train_tokenizer
from tools._common import ToolError, atomic_path, read_jsonl, writing_to

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "processed_data" / "sources"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def run_tool(*args: object, module: str = "", status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ARGS` and checks its exit status, and that nothing shows stack frames."""
    done = subprocess.run([sys.executable, *(["-m"] if not module else ["-c", module]), *map(str, args)], cwd=ROOT,
                          capture_output=True, encoding="utf-8", timeout=120, **options)
    assert done.returncode == status and "Traceback" not in done.stderr, f"{done.returncode}\n{done.stderr}"
    return done


def a_program(body: str) -> str:
    """Source of a program whose main() is `body`, run as the tools are."""
    return ("import os, signal, sys, time\nfrom pathlib import Path\n"
            f"from tools._common import ToolError, atomic_path, info, run_program\ndef main(argv):\n    {body}\n"
            "run_program(main)")


def write_texts(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Normalisation


@pytest.mark.parametrize(("text", "expected"), [
    ("12/05/2015", "አሥራ ሁለት አምስት ሁለት ሺህ አሥራ አምስት"), ("12.05.2015።", "አሥራ ሁለት አምስት ሁለት ሺህ አሥራ አምስት።"),
    ("3/4", "ሦስት አራት"), ("፫/፬", "ሦስት አራት"), ("5.ሰላም", "አምስት። ሰላም"), ("5ሰላም", "አምስት ሰላም"), ("5፭km", "አምስት አምስት km"),
    ("ሰላም.ለዓለም", "ሰላም። ለዓለም"), ("ወንድ/ሴት", "ወንድ ሴት"), ("ዓ.ም.ነው", "ዓም። ነው"), ("5ኛ.ሰላም", "አምስተኛ። ሰላም"),
    ("በ2015ዓ.ም", "በሁለት ሺህ አሥራ አምስት ዓም"), ("5'ሰላም", "አምስት ሰላም"),
])
def test_words_and_numerals_beside_each_other_are_never_glued(text: str, expected: str):
    assert amharic_text.normalise(text) == expected
    assert amharic_text.normalise(expected) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("ዓ.ም", "ዓም"), ("ዓ/ም", "ዓም"), ("እ.ኤ.አ", "እኤአ"), ("ት/ቤት", "ትቤት"), ("የት/ቤቱ", "የትቤቱ"), ("ጠ/ሚ/ር", "ጠሚር"),
    ("ወ/ሮ", "ወሮ"), ("በ3ኛው", "በሦስተኛው"), ("በ2015", "በሁለት ሺህ አሥራ አምስት"), ("2015ን", "ሁለት ሺህ አሥራ አምስትን"),
    ("5ና 6", "አምስትና ስድስት"), ("5ናስ", "አምስት ናስ"), ("3.5", "ሦስት ነጥብ አምስት"),
])
def test_abbreviations_prefixes_and_ordinals_stay_one_word(text: str, expected: str):
    assert amharic_text.normalise(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("50%", "ሃምሳ በመቶ"), ("50٪ነው", "ሃምሳ በመቶ ነው"), ("½", "አንድ ሁለት"), ("2½", "ሁለት አንድ ሁለት"), ("m³", "m ሦስት"),
    ("10¹²", "አሥር አሥራ ሁለት"), ("٣", "ሦስት"), ("３", "ሦስት"), ("②", "ሁለት"),
])
def test_what_a_reader_says_aloud_is_in_the_text(text: str, expected: str):
    assert amharic_text.normalise(text) == expected


def test_long_numerals_and_telephone_numbers_are_read_digit_by_digit():
    assert amharic_text.normalise("9" * 5000) == " ".join(["ዘጠኝ"] * 5000)
    assert amharic_text.normalise("፼" * 3000) == " ".join(["አሥር ሺህ"] * 3000)
    assert amharic_text.normalise("ስልክ 0911") == "ስልክ ዜሮ ዘጠኝ አንድ አንድ"
    assert amharic_text.normalise("05") == "አምስት"


def test_input_that_is_not_utf8_is_one_error_that_names_the_line():
    run = [sys.executable, "-m", "tools.amharic_text", "normalise"]
    done = subprocess.run(run, input="ሰላም 5\n".encode() + b"ab\xff\n", cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and done.stdout.decode() == "ሰላም አምስት\n"
    assert done.stderr.decode().splitlines()[0].startswith("[Error] standard input, line 2: not UTF-8 text at byte 2")
    assert len(done.stderr.splitlines()) == 1


def test_normalised_text_is_never_escaped_for_a_terminal():
    done = run_tool("tools.amharic_text", "normalise", input="ሰላም\n", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout == "ሰላም\n"


# The corpus


@pytest.fixture
def small_sources(tmp_path: Path) -> Path:
    """40 words, two phrases, one name."""
    folder = tmp_path / "sources"
    folder.mkdir()
    words = (SOURCES / "words_am.txt").read_text(encoding="utf-8").split("\n")[1:8000:200]
    (folder / "words_am.txt").write_text("\ufeff" + "\n".join(words), encoding="utf-8")
    (folder / "udhr_am.txt").write_text("ዙዙዙ ዡዡዡ ዢዢዢ።\nዣዣዣ ዤዤዤ ዥዥዥ።\n", encoding="utf-8")
    (folder / "names_am.txt").write_text("ዦዦዦ\n", encoding="utf-8")
    return folder


def build_argv(sources: Path, output: Path, sequences: int, validation: int, held_out: int) -> list[str]:
    return ["build", "--sources", str(sources), "--output-dir", str(output), "--sequences", str(sequences),
            "--validation-texts", str(validation), "--held-out-words", str(held_out)]


def test_a_small_word_list_is_refused_with_the_most_that_is_possible_or_built_without_empty_texts(
        small_sources: Path, tmp_path: Path):
    with pytest.raises(ToolError, match=r"too few for \d+ different sequences .* lower --sequences \(at most \d+\)"):
        amharic_text.main(build_argv(small_sources, tmp_path / "out", 500_000, 10, 30))
    assert not (tmp_path / "out").exists()
    amharic_text.main(build_argv(small_sources, tmp_path / "out", 50, 10, 30))
    rows = [json.loads(line) for line in (tmp_path / "out/texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 50 and all(row["text"].strip("። ") for row in rows)


@pytest.mark.parametrize(("known", "most"), [(0, 0), (1, 0), (2, 1), (3, 6), (4, 30)])
def test_dealing_ends_whatever_the_number_of_words(known: int, most: int):
    words = ["ሀሀ", "ለለ", "መመ", "ሰሰ"][:known]
    dealt = amharic_text.deal_sequences(words, most, set(), amharic_text.random.Random(0))
    assert len(dealt) == most and all(2 <= len(text.split()) <= 5 for text in dealt)
    with pytest.raises(ToolError, match=rf"at most {most}\)"):
        amharic_text.deal_sequences(words, most + 1, set(), amharic_text.random.Random(0))


@pytest.mark.parametrize(("numbers", "message"), [
    ((50, 10, -1), "do not fill 8 texts"), ((-1, 10, 30), "--sequences is -1"), ((50, 10, 41), "do not fill"),
    ((50, 50, 80), "words can be held out, not 80"),
])
def test_a_corpus_that_cannot_be_built_is_one_error(small_sources: Path, tmp_path: Path, numbers, message: str):
    with pytest.raises(ToolError, match=message):
        amharic_text.main(build_argv(small_sources, tmp_path / "out", *numbers))


def test_too_few_phrases_for_validation_are_named(small_sources: Path, tmp_path: Path):
    (small_sources / "udhr_am.txt").write_text("ዙዙዙ ዡዡዡ።\n", encoding="utf-8")
    with pytest.raises(ToolError, match="udhr_am.txt has 0 phrases of three words or more, not 1"):
        amharic_text.main(build_argv(small_sources, tmp_path / "out", 50, 10, 30))


# The synthetic voice


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", "a\0b", ".hidden", ".", "..", "", None, ["a"]])
def test_speaking_writes_only_into_its_output_folder(tmp_path: Path, name: object):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": "a", "text": "ሰላም"}, {"id": name, "text": "ሰላም"}])
    with pytest.raises(ToolError, match="t.jsonl, line 2: id .* cannot be part of a file name"):
        speak.main(["--texts", str(texts), "--output-dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_two_texts_with_one_id_are_refused(tmp_path: Path):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": name, "text": "ሰላም"} for name in ("1", "b", 1)])
    with pytest.raises(ToolError, match="t.jsonl, line 3: id '1' occurs a second time"):
        speak.main(["--texts", str(texts), "--output-dir", str(tmp_path / "out")])


def test_two_voices_with_one_file_name_are_refused_and_a_voice_never_leaves_the_folder(tmp_path: Path):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": "a", "text": "ሰላም"}])
    with pytest.raises(ToolError, match="would write the same files"):
        speak.main(["--texts", str(texts), "--output-dir", str(tmp_path), "--every-voice", "--voices", "am+f", "am_f"])
    assert speak.speaker_of("../x+f2") == ".._x_f2"


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--limit", "-46"]])
def test_a_number_that_speaking_cannot_take_is_refused(tmp_path: Path, flags: list[str]):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": "a", "text": "ሰላም"}])
    with pytest.raises(ToolError, match=f"{flags[0]} is {flags[1]}; take "):
        speak.main(["--texts", str(texts), "--output-dir", str(tmp_path), *flags])


@pytest.mark.parametrize("program", [speak, train_tokenizer])
@pytest.mark.parametrize("text", [7, None, ["ሰላም"]])
def test_a_text_that_is_no_text_is_named_by_its_line(tmp_path: Path, program, text: object):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": "a", "text": "ሰላም"}, {"id": "b", "text": text}])
    output = "--output-dir" if program is speak else "--output"
    with pytest.raises(ToolError, match="t.jsonl, line 2: text is .*, not a text"):
        program.main(["--texts", str(texts), output, str(tmp_path / "out")])


@needs_espeak
def test_speaking_goes_on_after_a_kill_and_gives_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                monkeypatch: pytest.MonkeyPatch):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": str(i), "text": f"ሰላም {i}"} for i in range(300)])
    command = [sys.executable, "-m", "tools.speak", "--texts", str(texts), "--output-dir", str(tmp_path / "killed")]
    with subprocess.Popen(command, cwd=ROOT) as process:
        finished = tmp_path / "killed" / speak.FINISHED
        while process.poll() is None and not (finished.exists() and finished.stat().st_size > 1000):
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / "killed/recordings.jsonl").exists(), "it ended before it could be killed"
    with finished.open("a") as log:
        log.write("\nhalf a li")
    spoken: list[str] = []
    real = speak.speak
    monkeypatch.setattr(speak, "speak", lambda text, *rest: (spoken.append(text), real(text, *rest)))
    speak.main(["--texts", str(texts), "--output-dir", str(tmp_path / "killed")])
    assert "recordings are there already" in capsys.readouterr().out and 0 < len(spoken) < 300
    speak.main(["--texts", str(texts), "--output-dir", str(tmp_path / "fresh")])
    first, second = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                     for folder in (tmp_path / "killed", tmp_path / "fresh"))
    assert first == second and len(first) == 301


@needs_espeak
def test_a_kill_never_keeps_the_sound_of_another_text_voice_or_speed(tmp_path: Path):
    out = tmp_path / "out"

    def sound_of(text: str, *flags: str) -> bytes:
        texts = write_texts(tmp_path / "t.jsonl", [{"id": "a", "text": text}, {"id": "b", "text": "።"}])
        with pytest.raises(ToolError, match="espeak-ng is silent on '።'"):
            speak.main(["--texts", str(texts), "--output-dir", str(out), "--voices", "am", *flags])
        return (out / "wavs/a_am.wav").read_bytes()

    sounds = [sound_of("ሰላም"), sound_of("ቤት"), sound_of("ቤት", "--words-per-minute", "300"), sound_of("ሰላም")]
    assert len(set(sounds[:3])) == 3 and sounds[3] == sounds[0]


@needs_espeak
def test_a_full_disk_while_speaking_is_one_error_with_the_remedy(tmp_path: Path):
    texts = write_texts(tmp_path / "t.jsonl", [{"id": "a", "text": "ሰላም ለዓለም"}])
    shim = tmp_path / "espeak-ng"  # the limit that stands for the full disk is ours alone
    shim.write_text(f'#!/bin/sh\nulimit -S -f unlimited\nexec {shutil.which("espeak-ng")} "$@"\n')
    shim.chmod(0o755)
    module = a_program("import resource; from tools import speak; resource.setrlimit(resource.RLIMIT_FSIZE, "
                       f"(9000, -1)); speak.main(['--texts', {str(texts)!r}, '--output-dir', "
                       f"{str(tmp_path / 'out')!r}])")
    done = run_tool(module=module, status=1, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.stderr.count("\n") == 1 and "cannot be written (File too large). Free some disk space" in done.stderr
    assert not list((tmp_path / "out/wavs").iterdir())


# The tokenizer


def test_a_tokenizer_without_texts_to_learn_from_is_refused(tmp_path: Path):
    for rows in ([{"text": "ሰላም", "split": "val"}], [{"text": "—"}]):
        texts = write_texts(tmp_path / "t.jsonl", rows)
        with pytest.raises(ToolError, match="t.jsonl: holds no text to learn from"):
            train_tokenizer.main(["--texts", str(texts), "--output", str(tmp_path / "t.model")])
    assert not (tmp_path / "t.model").exists()


def test_letters_of_a_very_long_text_get_pieces(tmp_path: Path):
    texts = write_texts(tmp_path / "t.jsonl", [{"text": "ሰላም"}, {"text": "ⶀⶁ " * 1500}])
    train_tokenizer.main(["--texts", str(texts), "--output", str(tmp_path / "t.model")])
    tokenizer = train_tokenizer.load_tokenizer(tmp_path / "t.model")
    assert tokenizer.unk_id() not in tokenizer.encode("ⶀⶁ")


# What all programs share


def test_a_killed_programs_temporary_file_goes_when_the_file_is_written_again(tmp_path: Path):
    dead = dead_process()
    names = [f".g.{dead}.tmp.pth", f".g.old.{dead}.tmp.pth", f".g.{os.getppid()}.tmp.pth", f".g.{dead}.tmp.npz",
             f".h.{dead}.tmp.pth", f".g.{dead}.pth", f"g.{dead}.tmp.pth"]
    left = [tmp_path / name for name in names]
    for path in left:
        path.write_text("half")
    with atomic_path(tmp_path / "g.pth", durable=True) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "g.pth", *left[1:]])
    assert (tmp_path / "g.pth").read_text() == "whole"


def test_sigterm_ends_a_program_as_ctrl_c_does(tmp_path: Path):
    body = (f"with atomic_path(Path({str(tmp_path / 'a')!r})) as temporary: temporary.write_text('x'); "
            "os.kill(os.getpid(), SIGNAL); time.sleep(9)")
    for name, status in (("SIGTERM", 143), ("SIGINT", 130)):
        done = run_tool(module="import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                        + a_program(body.replace("SIGNAL", f"signal.{name}")), status=status)
        assert done.stderr == "[Info] Stopped; files that were not finished have been removed\n"
        assert not list(tmp_path.iterdir())


def test_sigterm_that_was_ignored_at_start_stays_ignored():
    module = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + a_program(
        "os.kill(os.getpid(), signal.SIGTERM); info('went on')")
    assert run_tool(module=module).stdout == "[Info] went on\n"


@pytest.mark.parametrize("body", ["[info('x' * 1000) for i in range(1000)]", "print('x' * 10)", "sys.exit(print('x'))"])
def test_a_reader_that_leaves_ends_a_program_quietly(body: str):
    command = [sys.executable, "-c", a_program(f"time.sleep(0.3); {body}")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141 and said == b""


def test_an_exit_status_outlives_a_reader_that_leaves():
    module = a_program("os.close(1); sys.exit(129)")
    assert run_tool(module=module, status=129).stderr == ""


def test_names_that_the_terminal_cannot_show_are_printed_escaped():
    done = run_tool(module=a_program("info('ሰላም'); raise ToolError('ሰላም')"), status=1,
                    env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert done.stdout == "[Info] \\u1230\\u120b\\u121d\n" and done.stderr == "[Error] \\u1230\\u120b\\u121d\n"


def test_a_file_that_cannot_be_used_is_one_line_with_the_reason(tmp_path: Path):
    done = run_tool("tools.train_tokenizer", "--texts", write_texts(tmp_path / "t.jsonl", [{"text": "ሰላም"}]),
                    "--output", tmp_path, status=1)
    assert done.stderr.startswith("[Error] ") and "Is a directory. " in done.stderr and done.stderr.count("\n") == 1
    done = run_tool(module=a_program("raise OSError(28, 'No space left on device', '/a/b')"), status=1)
    assert done.stderr == ("[Error] /a/b: No space left on device. Free some disk space, then run the same command "
                           "again\n")
    with pytest.raises(OSError, match="a fault of ours"):
        _common.run_program(lambda argv: (_ for _ in ()).throw(OSError("a fault of ours")))


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "Free some disk space"), (errno.EACCES, "Mend the rights"), (errno.EEXIST, "Mend this or name"),
])
def test_an_error_while_writing_says_the_remedy_that_fits(tmp_path: Path, number: int, remedy: str):
    with pytest.raises(ToolError, match=rf"{tmp_path}: cannot be written \({os.strerror(number)}\)\. {remedy}"), \
            writing_to(tmp_path):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(("content", "message"), [
    (b'{"a": 1}\n' + b"[" * 100_000, "line 2: not JSON .maximum recursion"), (b"{", "line 1: not JSON"),
    (b'{"a": ' + b"1" * 5000 + b"}", "line 1: not JSON"), (b"\xff", "not UTF-8 text at byte 0"),
    (b'{"a": "\\ud83d"}', "line 1: not JSON .*surrogates not allowed"), (b"", "holds no rows"),
    (b"[1]", "line 1: missing a"),
])
def test_a_file_that_is_no_json_lines_is_one_error(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(ToolError, match=f"r.jsonl[,:] {message}"):
        read_jsonl(tmp_path / "r.jsonl", ["a"], "Mend it")


def test_json_lines_may_begin_with_a_byte_order_mark_and_a_folder_is_called_one(tmp_path: Path):
    (tmp_path / "r.jsonl").write_text('\ufeff{"a": 1}\n', encoding="utf-8")
    assert read_jsonl(tmp_path / "r.jsonl", ["a"], "") == [{"a": 1}]
    with pytest.raises(ToolError, match="is a directory, not a file. Mend it"):
        read_jsonl(tmp_path, ["a"], "Mend it")


def test_a_stopped_demo_takes_its_trainer_along(monkeypatch: pytest.MonkeyPatch):
    def stop(line: str, process: subprocess.Popen[str]) -> None:
        started.append(process)
        raise _common.Terminated

    started: list[subprocess.Popen[str]] = []
    with pytest.raises(KeyboardInterrupt):
        demo.run_trainer([sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"], stop)
    assert started[0].returncode == -signal.SIGTERM


# The help of every program


class Captured(Exception):
    """Instead of parsing: the parser."""


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []

    def capture(parser: argparse.ArgumentParser, *args: object, **options: object) -> None:
        found.append(parser)
        raise Captured

    monkeypatch.setattr(_common.OneLineParser, "parse_args", capture)
    with pytest.raises(Captured):
        importlib.import_module(f"tools.{program}").main([])
    return found[0]


def flags_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every action of a parser and of its sub-commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from flags_of(command)
        else:
            yield action


def default_is_said(action: argparse.Action) -> bool:
    values = action.default if isinstance(action.default, list | tuple) else [action.default]
    said = (action.help or "").replace(",", "")
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return all(text in said or Path(text).name in said for text in texts)


PROGRAMS = {path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
            } - {"train_until_done"}  # it starts a training


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_help_says_what_every_flag_is_and_its_default(program: str, monkeypatch: pytest.MonkeyPatch):
    actions = list(flags_of(parser_of(program, monkeypatch)))
    assert not [action.dest for action in actions if not action.help]
    telling = [action for action in actions if action.default is not None and action.default is not False
               and action.default not in (argparse.SUPPRESS, [], "")]
    assert not [action.dest for action in telling if not default_is_said(action)]


def test_every_subcommand_of_amharic_text_shows_a_first_command(capsys: pytest.CaptureFixture[str]):
    for command in ("normalise", "build"):
        with pytest.raises(SystemExit):
            amharic_text.main([command, "--help"])
        first = capsys.readouterr().out.partition("first command:")[2]
        assert "python -m tools.amharic_text" in first and command in first
