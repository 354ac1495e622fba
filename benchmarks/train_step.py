"""How long a training step of the demo takes on this CPU, and what keeping freed memory in the process is worth.

Steps of the same batches alternate between the settings, so that a noisy machine disturbs all of them alike; medians
and their ratios are printed.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from pathlib import Path

import torch
import yaml

from trainers import train_gpt_v2 as trainer

DATA = Path("processed_data")


def use_default_heap() -> None:
    """glibc's own thresholds again: large blocks are mapped anew, and page-faulted, every time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 128 * 1024)
        libc.mallopt(-1, 128 * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="first command:\n  python -m benchmarks.train_step")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=24)
    args = parser.parse_args()
    gpt = yaml.safe_load((DATA / "config.yaml").read_text(encoding="utf-8"))["gpt"]
    config = trainer.model_config_from(gpt, "config.yaml")
    data = trainer.ManifestDataset([str(DATA / "train_pairs.jsonl")], config)
    model = trainer.UnifiedVoiceGPT(config)
    trainer.init_fresh_weights(model, 0, 2.5)
    optimizer = trainer.make_optimizer(model, 0.01)
    batch = trainer.collate_packed([data[i] for i in range(args.batch_size)], config)
    settings = {"fp32, heap kept": (None, trainer.use_glibc_heap), "bf16, heap kept": (torch.bfloat16,
                trainer.use_glibc_heap), "fp32, default heap": (None, use_default_heap)}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(args.rounds):
        for name, (dtype, choose_heap) in settings.items():
            choose_heap()
            for _ in range(2):  # the first one settles the heap, the second one counts
                started = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                with trainer.Precision(torch.device("cpu"), dtype).autocast():
                    text, mel, _ = trainer.token_losses(model, batch)
                (text.sum() / 500 + mel.sum() / 1000).backward()
                optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    tokens = sum(batch.lengths)
    best = statistics.median(seconds["bf16, heap kept"])
    print(f"{tokens} tokens a step, {torch.get_num_threads()} threads, medians of {args.rounds} interleaved rounds")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:20} {median:6.3f} s  {tokens / median:8,.0f} tokens/s  {median / best:5.2f} x the bf16 step")


if __name__ == "__main__":
    main()
