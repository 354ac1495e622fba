"""Seconds that tools.preprocess --features indextts2 computes for an hour of speech, and the memory of one process.

  python -m benchmarks.features --model-dir checkpoints [--device cuda]

Sounds are noise: what they are costs nothing. Seconds are the processor's on the CPU, the clock's on a GPU.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tools.indextts2_features import SAMPLE_RATE, IndexTTS2Features, choose_device
from tools.indextts2_modules import rows_of
from tools.model_folder import FOR_FEATURES, find_parts


@torch.inference_mode()
def seconds_of_parts(features: IndexTTS2Features, seconds: float, rounds: int) -> Iterator[tuple[str, float]]:
    """What each part takes for a recording of so many seconds; the mean of `rounds` after one to warm up."""
    audio = 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    clock = time.process_time if features.device.type == "cpu" else time.perf_counter
    hidden = features.features(audio)[0]
    parts: dict[str, Callable[[], object]] = {
        "filter bank": lambda: rows_of(audio, 1.0),
        "filter bank and w2v-BERT": lambda: features.features(audio)[0].cpu(),
        "codes": lambda: features.codec(hidden).cpu(), "emo_vec": lambda: features.voice.emo_vec(hidden).cpu(),
        "condition": lambda: features.voice.condition(hidden).cpu(),
        "an utterance": lambda: features.arrays(audio, "codes"),
        "a prompt, once more": lambda: features.arrays(audio, "condition")}
    for name, work in parts.items():
        work()
        start = clock()
        for _ in range(rounds):
            work()
        yield name, (clock() - start) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=6.0, help="of one recording (6)")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up (3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = choose_device(args.device)
    features = IndexTTS2Features(find_parts(args.model_dir, FOR_FEATURES), device)
    for name, seconds in seconds_of_parts(features, args.seconds, args.rounds):
        print(f"{name}: {seconds:.3f} s for {args.seconds:g} s, {seconds / args.seconds * 3600:.0f} s an hour",
              flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{device}, one process: {peak:.1f} GB at most, most of it mapped files that processes share")


if __name__ == "__main__":
    main()
