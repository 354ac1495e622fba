"""Makes the checkpoints of an older trainer that tests/test_old_checkpoints.py resumes, and what they must lead to.

    git worktree add /tmp/old COMMIT && python tests/old_checkpoints/make.py /tmp/old/trainers/train_gpt_v2.py

What lies here was written by the trainer of commit 0fd17f8 (format 1). It is never made again to please a new trainer:
a format that old runs still have must go on being read. Whoever wants another one adds a folder beside it.

data/         13 training rows, 5 validation rows and a tokenizer of their own (identity normalisation keeps it small)
fp32/ bf16/ fp16/   output directories of runs that SIGTERM stopped after step 6: in mid-epoch, warm-up unfinished, one
              validation behind them; fp16's scale has come down from where it started. latest.pth is left out, a link.
expected.json losses of every later step in full precision, sha256 of the final weights, and the environment (see
              environment_here) in which these bits are promised
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import yaml

HERE = Path(__file__).resolve().parent
GPT = {"model_dim": 8, "layers": 2, "heads": 2, "max_text_tokens": 12, "max_mel_tokens": 20, "number_text_tokens": 1,
       "number_mel_codes": 34, "start_mel_token": 32, "stop_mel_token": 33, "start_text_token": 0, "stop_text_token": 1}
BATCHES = ["--batch-size", "2", "--grad-accumulation", "2"]  # typed on resume too: another CPU would split otherwise
FLAGS = [*BATCHES, "--epochs", "4", "--learning-rate", "0.01", "--warmup-steps", "9", "--weight-decay", "0.5",
         "--log-interval", "1", "--val-interval", "5", "--save-interval", "7", "--seed", "99", "--num-workers", "0"]
# fp16's losses weigh so much that their gradients overflow at the scale a scaler starts with.
PRECISIONS = {"fp32": ["--text-loss-weight", "0.3", "--mel-loss-weight", "0.6"],
              "bf16": ["--text-loss-weight", "0.3", "--mel-loss-weight", "0.6", "--amp", "bf16"],
              "fp16": ["--text-loss-weight", "1.0", "--mel-loss-weight", "2.5", "--amp", "fp16"]}
STOP_STEP = 6


def make_data(folder: Path) -> None:
    """Random rows in shards, their config.yaml, and a tokenizer whose size the text ids stay below."""
    folder.mkdir()
    sentences, rng = [], np.random.default_rng(5)
    for _ in range(200):
        sentences.append("".join(rng.choice(list("ሀለሐመሠረሰሸቀበ "), 20)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, vocab_size=24,
                                             model_type="bpe", normalization_rule_name="identity",
                                             num_threads=1, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    for name, count in (("train", 13), ("val", 5)):
        rows, texts, codes = [], [], []
        for i in range(count):
            texts.append(rng.integers(2, 24, rng.integers(3, 12)).astype(np.int32))
            codes.append(rng.integers(0, 32, rng.integers(5, 20)).astype(np.int32))
            rows.append({
                "id": f"{name}{i}", "speaker": "s", "target_text": "ሰላም", "target_text_len": len(texts[-1]),
                "target_code_len": len(codes[-1]), "prompt_condition_len": 32,
                "target_text_ids_path": f"{name}_text.npy", "target_text_ids_start": sum(map(len, texts[:-1])),
                "target_codes_path": f"{name}_codes.npy", "target_codes_start": sum(map(len, codes[:-1])),
                "prompt_condition_path": f"{name}_condition.npy", "prompt_condition_start": 32 * i,
                "prompt_emo_vec_path": f"{name}_emo.npy", "prompt_emo_vec_start": i})
        np.save(folder / f"{name}_text.npy", np.concatenate(texts))
        np.save(folder / f"{name}_codes.npy", np.concatenate(codes))
        np.save(folder / f"{name}_condition.npy", rng.normal(0, 0.1, (32 * count, 8)).astype(np.float32))
        np.save(folder / f"{name}_emo.npy", rng.normal(0, 0.1, (count, 8)).astype(np.float32))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}_pairs.jsonl").write_text(lines, encoding="utf-8")
    dataset = {"features": "random numbers", "num_codes": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT, "dataset": dataset}))


class StopAfterStep(io.StringIO):
    """A standard output that sends SIGTERM to its own process when the line of a step is printed."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def write(self, text: str) -> int:
        if text.startswith("[Train]") and f" step={self.step} " in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)

    def reconfigure(self, **_: Any) -> None:
        pass


def environment_here() -> dict[str, Any]:
    """All that the last bits of a run on the CPU depend on."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = hashlib.sha256(" ".join(sorted(values.get("flags", "").split())).encode()).hexdigest()[:12]
        cpu = (f"{values.get('model name')}, family {values.get('cpu family')} model {values.get('model')} "
               f"stepping {values.get('stepping')}, flags {flags}")
    return {"torch": torch.__version__, "device": f"cpu {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(), "cpu": cpu}


def outcome_of(output_dir: Path) -> dict[str, Any]:
    """Losses of the steps after STOP_STEP, the final weights' sha256, and what else a run ends with."""
    checkpoint = torch.load(output_dir / "latest.pth", map_location="cpu", weights_only=True)
    (metrics,) = output_dir.glob("logs/run_*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    keys = {"train": ("text_loss", "mel_loss", "grad_norm", "lr", "skipped_updates"),
            "val": ("text_loss", "mel_loss", "loss")}
    losses = {kind: {str(line["step"]): {key: line[key] for key in wanted} for line in lines
                     if line["kind"] == kind and line["step"] > STOP_STEP and "manifest" not in line}
              for kind, wanted in keys.items()}
    weights = {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
               for name, tensor in checkpoint["model"].items()}
    best = {name: checkpoint["best"][name] for name in ("step", "loss")}
    return {"losses": losses, "weights": weights, "step": checkpoint["step"], "best": best,
            "tokens_seen": checkpoint["tokens_seen"], "recent_checkpoints": checkpoint["recent_checkpoints"],
            "scale": checkpoint["scaler"]["scale"] if checkpoint["scaler"] else None}


def copy_run(name: str, folder: Path) -> None:
    """The data and the output directory `name` under `folder`, with latest.pth as a save leaves it."""
    shutil.copytree(HERE / "data", folder / "data")
    shutil.copytree(HERE / name, folder / name)
    os.link(folder / name / f"model_step{STOP_STEP}.pth", folder / name / "latest.pth")


def main() -> None:
    spec = importlib.util.spec_from_file_location("old_trainer", sys.argv[1])
    assert spec and spec.loader
    trainer = importlib.util.module_from_spec(spec)
    sys.modules["old_trainer"] = trainer
    spec.loader.exec_module(trainer)
    torch.set_num_threads(1)
    os.chdir(HERE)  # relative paths: none of this machine's gets into a checkpoint
    if not Path("data").exists():
        make_data(Path("data"))
    expected: dict[str, Any] = {"environment": environment_here()}
    for name, flags in PRECISIONS.items():
        shutil.rmtree(name, ignore_errors=True)
        console, sys.stdout = sys.stdout, StopAfterStep(STOP_STEP)
        try:
            status = trainer.main(["--train-manifest", "data/train_pairs.jsonl", "--val-manifest",
                                   "data/val_pairs.jsonl", "--tokenizer", "data/tokenizer.model", "--output-dir", name,
                                   *FLAGS, *flags])
        finally:
            console, sys.stdout = sys.stdout, console
        assert status == 128 + signal.SIGTERM, console.getvalue()
        for path in Path(name).rglob("*"):
            if path.name in (".lock", "latest.pth", "last_exit.json") or "tfevents" in path.name:
                path.unlink()
        with tempfile.TemporaryDirectory() as folder:
            copy_run(name, Path(folder))
            os.chdir(folder)
            assert trainer.main(["--output-dir", name, "--resume", "auto", *BATCHES]) == 0
            expected[name] = outcome_of(Path(name))
            os.chdir(HERE)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
