"""tools.prepare: one command from a dataset to manifests; it goes on where it was stopped and makes nothing anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, read_jsonl
from test_signals import children_of, needs_proc

from tools import preprocess, speech_codec
from tools._common import ToolError
from tools.prepare import main, parse, plan

SHORT = ("--codec-steps", "2", "--num-codes", "256", "--jobs", "1", "--val-share", "0.3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for number in range(6):
        at = np.arange(10 * 22050) / 22050  # together as many codes as a codec has
        sound = 0.2 * np.sin(2 * np.pi * (120 + 20 * number) * at) * (1 + np.sin(9 * at))
        noise = 0.05 * np.random.default_rng(number).standard_normal(len(at))
        soundfile.write(folder / f"{number}.wav", sound + noise, 22050)
        rows.append({"id": str(number), "speaker": "s", "text": "ሰላም ቤት" + " ውሃ" * number, "audio": f"{number}.wav"})
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "recordings.jsonl"


def test_one_command_makes_what_training_reads_and_goes_on_where_it_was_stopped(
        dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "my_data"
    command = ["--recordings", str(dataset), "--output-dir", str(out), *SHORT]

    def stopped(argv: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "main", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    kept = {name: (out / name).read_bytes() for name in ("texts.jsonl", "tokenizer.model", "speech_codec.pt")}
    assert not (out / "utterances.jsonl").exists()
    monkeypatch.setattr(speech_codec, "main", stopped)  # not trained again
    capsys.readouterr()
    main(command)
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("[Step]")] == [
        "[Step] 1/5 texts", "[Step] 2/5 tokenizer", "[Step] 3/5 codec", "[Step] 4/5 features", "[Step] 5/5 pairs"]
    assert f"{out / 'speech_codec.pt'} is there and stays" in told
    assert kept == {name: (out / name).read_bytes() for name in kept}
    assert len(read_jsonl(out / "train_pairs.jsonl")) + len(read_jsonl(out / "val_pairs.jsonl")) == 6
    with pytest.raises(ToolError, match="Give another --output-dir, or --codec"):
        main([*command, "--codec-steps", "3"])


def test_each_model_has_its_own_steps(dataset: Path, tmp_path: Path):
    def steps(*flags: str) -> list[str]:
        argv = ["--recordings", str(dataset), "--output-dir", str(tmp_path), *flags]
        return [step.program for step in plan(parse(argv))]

    assert steps("--tokenizer", "t.model", "--codec", "c.pt") == ["preprocess", "build_pairs"]
    assert steps("--features", "indextts2.5", "--model-dir", "m") == ["preprocess", "build_pairs"]
    assert steps("--features", "indextts2", "--model-dir", "m") == ["collect_corpus", "train_tokenizer", "preprocess",
                                                                    "build_pairs"]
    extended = plan(parse(["--recordings", "r", "--output-dir", "o", "--features", "indextts2", "--model-dir", "m"]))
    assert extended[1].argv[-2:] == ["--extend", "m/bpe.model"]
    for flags, named in ((("--features", "indextts2"), "--model-dir"), (("--target-size", "9"), "--target-size"),
                         (("--features", "indextts2", "--model-dir", "m", "--codec", "c.pt"), "--codec"),
                         (("--tokenizer", "t.model", "--vocab-size", "9"), "--vocab-size")):
        with pytest.raises(ToolError, match=named):
            steps(*flags)


def test_a_file_that_it_did_not_make_is_never_taken_for_its_own(dataset: Path, tmp_path: Path):
    (tmp_path / "tokenizer.model").write_text("somebody else's")
    with pytest.raises(ToolError, match="tokenizer.model: was not made by tools.prepare"):
        main(["--recordings", str(dataset), "--output-dir", str(tmp_path), *SHORT])
    assert not (tmp_path / "texts.jsonl").exists()


@needs_proc
def test_a_stop_does_not_wait_for_what_its_processes_are_computing(tmp_path: Path):
    (tmp_path / "slow.py").write_text("""
import time
from tools._common import run_program
from tools.features import compute_chunks

def main(argv):
    for _ in compute_chunks(time.sleep, [[60]] * 6, 2, lambda chunk: chunk[0]):
        pass

if __name__ == "__main__":
    run_program(main)
""")
    program = subprocess.Popen([sys.executable, str(tmp_path / "slow.py")], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(children_of(program.pid)) < 3:  # two workers, and who looks after what they share
        assert program.poll() is None
        time.sleep(0.05)
    asked = time.monotonic()
    program.send_signal(signal.SIGINT)
    assert "Stopped" in program.communicate(timeout=50)[0] and program.returncode == 130
    assert time.monotonic() - asked < 20
