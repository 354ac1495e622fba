"""How well the embedded codec gives speech back: PESQ and STOI on recordings that it was not trained on.

Each recording is encoded and decoded with the voice of its row's prompt, and compared with itself. Griffin-Lim on the
true mel spectrogram is shown too: no decoder can do better than that. Needs `pip install pesq pystoi`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

from tools._common import Progress, ToolError, make_parser, run_program
from tools.sound_files import load_recording
from tools.speech_codec import SpeechCodec

FIRST_COMMAND = "python -m benchmarks.codec_quality"


def scores(reference: Tensor, degraded: Tensor, sample_rate: int) -> tuple[float, float, float]:
    """Wide-band PESQ (16 kHz), narrow-band PESQ (8 kHz) and STOI of a waveform [samples] against its reference."""
    try:
        from pesq import pesq
        from pystoi import stoi
    except ImportError as error:
        raise ToolError(f"{error.name} is not installed. Install both measures: pip install pesq pystoi") from error
    pair = [waveform[: min(len(reference), len(degraded))] for waveform in (reference, degraded)]
    wide = [torchaudio.functional.resample(waveform, sample_rate, 16000).numpy() for waveform in pair]
    narrow = [torchaudio.functional.resample(waveform, sample_rate, 8000).numpy() for waveform in pair]
    return pesq(16000, *wide, "wb"), pesq(8000, *narrow, "nb"), stoi(pair[0].numpy(), pair[1].numpy(), sample_rate)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--data-dir", type=Path, default=Path("processed_data"))
    parser.add_argument("--codec", type=Path, default=None, help="default: speech_codec.pt of the data folder")
    parser.add_argument("--recordings-dir", type=Path, default=None,
                        help="folder with all validation recordings as wavs/ID.wav (demo_data_work/recordings); "
                        "without it the twelve that ship are used")
    args: argparse.Namespace = parser.parse_args(argv)
    codec = SpeechCodec.load(args.codec or args.data_dir / "speech_codec.pt")
    lines = (args.data_dir / "val_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if args.recordings_dir or row["target_audio_path"]]
    rate, table, errors = codec.config.sample_rate, [], []
    progress = Progress("recordings", len(rows))
    for done, row in enumerate(rows, 1):
        path = args.data_dir / row["target_audio_path"]
        if args.recordings_dir:
            path = args.recordings_dir / "wavs" / f"{row['target_id']}.wav"
        waveform = load_recording(path, rate)
        statistics = codec.mel_statistics(load_recording(args.data_dir / row["prompt_audio_path"], rate))
        codes, mel = codec.encode(waveform), codec.log_mel(waveform)
        with torch.no_grad():
            errors.append(float((codec.decode_mel(codes[None], statistics[None])[0] - mel).abs().mean()))
        decoded, copied = codec.decode(codes, statistics), codec.mel_to_waveform(mel, len(waveform))
        table.append([*scores(waveform, decoded, rate), *scores(waveform, copied, rate)])
        progress.update(done)
    codec_means, copy_means = np.split(np.mean(table, axis=0), 2)
    print(f"{len(rows)} recordings, log-mel L1 {np.mean(errors):.3f}")
    for name, means in (("codec", codec_means), ("Griffin-Lim on true mels", copy_means)):
        print(f"{name}: PESQ {means[0]:.2f} (wide band), {means[1]:.2f} (narrow band), STOI {means[2]:.3f}")


if __name__ == "__main__":
    run_program(main)
