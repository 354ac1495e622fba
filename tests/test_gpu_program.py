"""`make gpu` has to be right the first time it meets a GPU: its logic, on a CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import gpu, gpu_lines, gpu_trainer, usual_way

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def run_program(*args: object, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *map(str, args)], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole program but the second precision, which takes long on a CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    printed = run_program("--tiny", "--output", folder / "out", "--scratch", folder / "scratch", "--lines",
                          ",".join(name for name in gpu.LINES if name != "resume_fp16"))
    assert not any((folder / "scratch").iterdir()), "scratch files are left"
    return folder / "out", printed


def test_one_command_answers_every_line_and_writes_text_json_and_trace(tiny_table: tuple[Path, str]) -> None:
    output, printed = tiny_table
    lines = json.loads((output / "table.json").read_text())["lines"]
    for name, line in lines.items():
        assert line["text"], name
        assert line["passed"] is not False, line
        if name not in ("synchronisations", "several_processes", "attention", "resume_compiled", "compiled"):
            assert "could not be measured" not in line["text"], line
        elif name != "attention":
            assert "could not be measured: no CUDA device" in line["text"]
    assert {name for name in gpu.LINES if name not in lines} == {"resume_fp16"}
    table = (output / "TABLE.txt").read_text()
    assert table in printed
    assert "Features" in table and "Aim: bit-identical resume: reached (resume_bf16)" in table
    assert "Against the usual way, eager" in table
    assert (output / "trace.json.gz").stat().st_size > 1000 and (output / "kernels.txt").read_text()


def test_the_killed_run_is_resumed_and_its_save_is_measured(tiny_table: tuple[Path, str]) -> None:
    figures = json.loads((tiny_table[0] / "table.json").read_text())["lines"]["resume_bf16"]["figures"]
    assert figures["differs"] == [] and figures["step"] >= gpu_lines.SAVE_STEP
    assert figures["bytes"] > 100_000 and figures["seconds_to_resume"] > 0
    assert figures["seconds_lost"] >= figures["seconds_blocked"]


def test_out_of_memory_splits_the_micro_batch_and_goes_on(tiny_table: tuple[Path, str]) -> None:
    line = json.loads((tiny_table[0] / "table.json").read_text())["lines"]["out_of_memory"]
    assert line["figures"]["batch_size"] == [4, 2] and "simulated" in line["text"]


def test_the_ballast_leaves_room_for_half_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None, "empty_cache": None,
                        "memory_allocated": 1000, "max_memory_allocated": 3000, "mem_get_info": (5000, 9000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    driver = gpu_trainer.Driver("oom", 6)
    run: Any = SimpleNamespace(precision=gpu_lines.trainer.Precision(torch.device("cpu")))
    driver.fill_memory(run)
    assert driver.ballast.numel() == 5000 - 0.6 * 2000


def test_every_line_has_a_function_of_its_own() -> None:
    assert set(gpu.LINES) == set(gpu_lines.FUNCTIONS)


def test_an_exception_of_one_line_is_its_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = gpu_lines.Bench(gpu_trainer.TINY, tmp_path, tmp_path)

    def fails(error: Exception) -> tuple[gpu_lines.Outcome, bool]:
        def raise_it(bench: gpu_lines.Bench) -> gpu_lines.Outcome:
            raise error
        monkeypatch.setitem(gpu_lines.FUNCTIONS, "eager", raise_it)
        return gpu_lines.measure("eager", bench)

    outcome, can_go_on = fails(ValueError("what went wrong"))
    assert outcome.text == "could not be measured: ValueError: what went wrong"
    assert outcome.passed is False and can_go_on
    bench.so_far = gpu_lines.Outcome("the first half", {"a": 1})
    outcome, _ = fails(ValueError("what went wrong"))
    assert outcome.text.endswith("what went wrong; until then: the first half") and outcome.figures == {"a": 1}
    outcome, can_go_on = fails(gpu_lines.CannotMeasure("no such card"))
    assert outcome.text == "could not be measured: no such card" and outcome.passed is None and can_go_on
    outcome, can_go_on = fails(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert outcome.passed is False and not can_go_on, "nothing can be measured in that process any more"


def measure_with(script: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> dict[str, gpu.Result]:
    """Three lines of a stand-in for the worker: Python that has the waiting lines in `names`."""
    monkeypatch.setattr(gpu, "LINES", {name: gpu.Line(name, "model", 1.0) for name in ("one", "two", "three")})
    preamble = ("import json, os, sys, time; names = sys.argv[1].split(',')\n"
                "def start(name): print('@start ' + name, flush=True)\n"
                "def line(name): print('@line ' + json.dumps({'name': name, 'text': 'done'}), flush=True)\n")
    monkeypatch.setattr(gpu, "worker_command", lambda names, arguments: [
        sys.executable, "-c", preamble + script, ",".join(names)])
    results: dict[str, gpu.Result] = {}
    gpu.measure_group(["one", "two", "three"], [], time.monotonic() + seconds, results.__setitem__)
    return results


@pytest.mark.parametrize(("accident", "text"), [
    ("os.kill(os.getpid(), 11)", "could not be measured: its process ended with status -11"),
    ("time.sleep(60)", "could not be measured: not done in 1 s"),
    ("line(name); os._exit(0)", "done"),  # it has reported a fault of the device, and left
])
def test_a_line_that_kills_or_hangs_its_process_costs_no_other(accident: str, text: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"for name in names:\n start(name)\n if name == 'two': {accident}\n line(name)"
    results = measure_with(script, monkeypatch)
    assert {name: result.text for name, result in results.items()} == {"one": "done", "two": text, "three": "done"}


def test_what_a_line_found_before_it_was_given_up_stands_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ("for name in names:\n start(name)\n"
              " if name == 'two':\n"
              "  print('@so_far ' + json.dumps({'text': 'half', 'figures': {'a': 1}}), flush=True); time.sleep(60)\n"
              " line(name)")
    results = measure_with(script, monkeypatch)
    assert results["two"].text == "half\nthe rest could not be measured: not done in 1 s"
    assert results["two"].figures == {"a": 1} and results["three"].text == "done"


def test_lines_for_which_no_time_is_left_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    results = measure_with("for name in names:\n start(name)\n if name == 'two': time.sleep(60)\n line(name)",
                           monkeypatch, seconds=0.6)
    assert results["one"].text == "done"
    assert "no time left" in results["two"].text and "no time left" in results["three"].text
    assert not any(result.passed is False for result in results.values())


@pytest.fixture
def resumed_badly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gpu_lines.Bench:
    """Trainer processes that are made up: the resumed one has another optimizer and another loss."""
    class Made:
        started = 0.0

        def __init__(self, mode: str, flags: list[str]):
            self.mode, self.is_resumed = mode, "--resume" in flags
            folder = Path(flags[flags.index("--output-dir") + 1]) / "logs" / "run_1"
            folder.mkdir(parents=True, exist_ok=True)
            loss = 2.0 if self.is_resumed else 1.0
            (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 7, "mel_loss": loss}) + "\n")

        def report(self, status: int = 0) -> dict[str, Any]:
            if self.mode == "kill2":
                return {"step": 9, "saved": 8, "error": "", "bytes": 1, "seconds_blocked": 1.0, "seconds_written": 2.0,
                        "step_alone": 0.5, "step_beside": 0.6, "steps_beside": 10, "global_batch": 32, "output": ""}
            return {"first_step_at": 1.0, "skipped": 0, "output": "Step: 8\n",
                    "digests": {"weights": "a", "optimizer": "c" if self.is_resumed else "b"}}

        def end(self) -> None:
            pass

    monkeypatch.setattr(gpu_trainer, "drive", lambda mode, at, flags, launcher, environment: Made(mode, flags))
    return gpu_lines.Bench(gpu_trainer.TINY, tmp_path, tmp_path)


def test_a_resume_to_other_bits_fails_its_check_and_names_what_differs(resumed_badly: gpu_lines.Bench) -> None:
    outcome = gpu_lines.resume_bf16(resumed_badly)
    assert outcome.passed is False and "differs in optimizer, losses from step 7" in outcome.text
    assert outcome.figures["seconds_lost"] == pytest.approx(1.0 + 10 * 0.1)
    assert outcome.figures["cost_of_run"] == pytest.approx(2.0 / 500)
    results = {"resume_bf16": gpu.Result(outcome.text, outcome.figures, outcome.passed)}
    assert gpu.aims(results)["bit-identical resume"] == "NOT reached (resume_bf16)"
    assert gpu.aims(results)["saves cost <= 1 % of the run"] == "reached (0.40%)"


def test_aims_and_ratios_follow_from_the_figures() -> None:
    def speed(tokens: float, mfu: float) -> gpu.Result:
        return gpu.Result("", {"batch": {"8": {"tokens_per_second": tokens, "mfu": mfu}, "32": None}})

    results = {"eager": speed(300.0, 0.4), "compiled": speed(600.0, 0.55), "usual_way": speed(100.0, 0.1)}
    assert gpu.speed_ratios(results) == {"eager": {"8": 3.0}, "compiled": {"8": 6.0}}
    assert gpu.aims(results) == {"MFU >= 0.5 on real tokens, 16 bit": "reached (0.550)",
                                 "saves cost <= 1 % of the run": "not measured",
                                 "bit-identical resume": "not measured"}
    assert "batch 8: 6.00" in gpu.table_text(results, "heading")


def test_without_a_gpu_or_a_package_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert "sees no CUDA device. `python -m benchmarks.gpu --tiny`" in run_program(status=1)
    monkeypatch.setitem(gpu.NEEDED, "no_such_module", "no-such-package")
    assert gpu.main(["--tiny"]) == 1
    assert "missing here: no-such-package" in capsys.readouterr().err


def test_the_tokenizer_has_as_many_pieces_as_the_real_one(tmp_path: Path) -> None:
    gpu_trainer.make_tokenizer(tmp_path / "tokenizer.model", 12000)
    assert gpu_lines.trainer.read_tokenizer(str(tmp_path / "tokenizer.model"))["size"] == 12000


def test_the_usual_way_scores_what_the_trainer_scores() -> None:
    """A padded batch has the packed one's targets, at the same inputs."""
    rng = np.random.default_rng(0)
    config = gpu_lines.trainer.model_config_from(gpu_trainer.TINY.gpt, "tiny")
    samples = [gpu_lines.trainer.Sample(rng.integers(2, 50, t), rng.integers(0, 64, c), np.zeros((32, 32), np.float32),
                                        np.zeros(32, np.float32)) for t, c in ((4, 9), (7, 20), (2, 6))]
    packed, batch = gpu_lines.trainer.collate_packed(samples, config), usual_way.padded_batch(samples, config)
    for kind, targets in (("text", packed.text_targets), ("mel", packed.mel_targets)):
        scored = batch[f"{kind}_targets"] != -100
        assert torch.equal(batch[f"{kind}_targets"][scored], targets)
        assert torch.equal(batch[kind][:, 1:][scored[:, :-1]], targets)
    model = usual_way.PaddedGPT(config, usual_way.PlainBlocks(config))
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
