"""Tiny data, a tiny model and helpers that run the trainer the way its users do: as a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# As `make test` has it: tests run side by side, and some fork, which threads of OpenMP do not live through.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from trainers import train_gpt_v2 as trainer  # noqa: E402

# A shell ignores SIGINT in what it starts in the background, and programs inherit that: here Ctrl-C must work.
signal.signal(signal.SIGINT, signal.default_int_handler)

TRAINER = ROOT / "trainers" / "train_gpt_v2.py"
TOKENIZER = ROOT / "tokenizers" / "amharic_extended_bpe.model"
GPT = {"model_dim": 32, "layers": 2, "heads": 2, "max_text_tokens": 30, "max_mel_tokens": 60, "number_text_tokens": 1,
       "number_mel_codes": 66, "start_mel_token": 64, "stop_mel_token": 65, "start_text_token": 0, "stop_text_token": 1}
MADE_WITH = {"num_codes": 64}
VOCAB = 50  # text ids of the tiny data; the shipped tokenizer has more


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """On the machine that decides what lands nothing may be missing: a skipped test fails there."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"skipped: {call.excinfo and call.excinfo.value}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the page first: the longest file, which keeps one of two processes busy for most of the time."""
    items.sort(key=lambda item: item.get_closest_marker("browser") is None)


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_rows(folder: Path, name: str, count: int, rng: np.random.Generator, shards: bool) -> list[dict[str, Any]]:
    """Writes random features, as shard arrays or (the fork's way) as four files an utterance; returns manifest rows."""
    rows, streams = [], {"text_ids": [], "codes": [], "condition": [], "emo_vec": []}
    starts = dict.fromkeys(streams, 0)
    for i in range(count):
        text = rng.integers(2, VOCAB, rng.integers(3, 12)).astype(np.int32)
        codes = rng.integers(0, 64, rng.integers(6, 30)).astype(np.int32)
        values = {"text_ids": text, "codes": codes,
                  "condition": rng.normal(0, 0.1, (32, GPT["model_dim"])).astype(np.float32),
                  "emo_vec": rng.normal(0, 0.1, GPT["model_dim"]).astype(np.float32)}
        row: dict[str, Any] = {"id": f"{name}{i}", "speaker": "s", "target_text": "ሰላም", "target_text_len": len(text),
                               "target_code_len": len(codes), "prompt_condition_len": 32}
        keys = {"text_ids": "target_text_ids", "codes": "target_codes", "condition": "prompt_condition",
                "emo_vec": "prompt_emo_vec"}
        for kind, value in values.items():
            value = value[None] if kind == "emo_vec" and shards else value
            if shards:
                row[f"{keys[kind]}_path"], row[f"{keys[kind]}_start"] = f"{name}_{kind}.npy", starts[kind]
                streams[kind].append(value)
                starts[kind] += len(value)
            else:
                row[f"{keys[kind]}_path"] = f"{name}{i}_{kind}.npy"
                np.save(folder / f"{name}{i}_{kind}.npy", value)
        rows.append(row)
    for kind, parts in streams.items():
        if parts:
            np.save(folder / f"{name}_{kind}.npy", np.concatenate(parts))
    return rows


def make_dataset(folder: Path, train_rows: int = 41, val_rows: int = 6, shards: bool = True) -> Path:
    """config.yaml, train_pairs.jsonl, val_pairs.jsonl and their arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for name, count in (("train", train_rows), ("val", val_rows)):
        write_manifest(folder / f"{name}_pairs.jsonl", make_rows(folder, name, count, rng, shards))
    (folder / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT, "dataset": MADE_WITH}))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set in shards: 41 training rows, 6 validation rows. Read only."""
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with four files an utterance, as the fork writes them. Read only."""
    return make_dataset(tmp_path_factory.mktemp("tiny_files") / "data", shards=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; for one module, since no other loop of events can run beside Playwright's."""
    import playwright.sync_api  # which only the tests of the page need

    chromium = shutil.which("chromium")
    if chromium is None:
        message = "no Chromium; as root: apt-get install chromium fontconfig fonts-sil-abyssinica"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with playwright.sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        yield browser
        browser.close()


def data_args(data: Path) -> list[str]:
    return ["--train-manifest", str(data / "train_pairs.jsonl"), "--val-manifest", str(data / "val_pairs.jsonl"),
            "--tokenizer", str(TOKENIZER)]


def run_trainer(*args: object, cwd: Path = ROOT, status: int | None = 0, **options: Any
                ) -> subprocess.CompletedProcess[str]:
    """Runs trainers/train_gpt_v2.py and checks its exit status (None: any)."""
    done = subprocess.run([sys.executable, str(TRAINER), *map(str, args)], cwd=cwd, text=True, capture_output=True,
                          timeout=300, **options)
    assert status is None or done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_of(*args: object, **options: Any) -> str:
    """The message of a trainer run that must fail as a user's mistake: exit status 1, no stack frames."""
    done = run_trainer(*args, status=1, **options)
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output
    return output


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint the way anybody may: nothing is unpickled, everything is verified."""
    return trainer.read_checkpoint(path)


def resumable_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Digests of everything a run's future depends on; equal digests mean equal bits."""
    keys = ("model", "optimizer", "scheduler", "scaler", "epoch", "step", "sample_in_epoch", "best", "last_val",
            "nonfinite", "tokens_seen", "nonfinite_rows", "suspect_rows", "left_out",
            "skips_told")
    return {key: trainer.digest_tree(checkpoint[key]) for key in keys if key in checkpoint}


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """All losses of a run, without what depends on the clock."""
    clock = ("tokens_per_second", "mfu")
    files = sorted(output_dir.glob("logs/run_*/metrics.jsonl"))
    assert len(files) == 1, files
    lines = [line for line in read_jsonl(files[0]) if line["kind"] != "save"]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


STOP_SIGNALS = trainer.STOP_SIGNALS


def call_trainer(*args: object, status: int = 0, on_event: Callable[..., None] = trainer.no_event) -> str:
    """The trainer's main() in this process, which saves the seconds of importing torch. Returns all that it printed."""
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            found = trainer.main([str(arg) for arg in args], on_event)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    output = printed.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert found == status, f"exit {found}\n{output}"
    return output


def mistake(*args: object) -> str:
    """What main() says about a user's mistake: one error, the last thing printed, exit status 1."""
    output = call_trainer(*args, status=1)
    before, error, message = output.partition("[Error] ")
    assert error and "[Error] " not in message, output
    return message
