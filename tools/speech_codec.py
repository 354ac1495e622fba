"""The embedded speech codec: recordings to codes and back, trained on the user's own audio in minutes on a CPU.

  train    learns a codec from recordings.jsonl (id, speaker, audio; rows of split "val" are left out)
  encode   one recording -> codes (.npy, int32)
  decode   codes + a prompt recording in the wanted voice -> a recording

Recordings are those that tools.sound_files reads; `train` takes them from one folder only.

Encoder: log-mel spectrogram (22.05 kHz, 80 Slaney bins, hop 256), mean over the recording removed, 4 frames stacked
into one vector, PCA to 48 dimensions, nearest of 1024 k-means centroids: 21.5 codes a second. Decoder: a small
convolutional network from codes and the prompt's mel statistics to a log-mel spectrogram, then Griffin-Lim.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import random
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from tools._common import Progress, ToolError, atomic_path, info, make_parser, run_program, sha256_of, warn, writing_to
from tools.made_with import EMBEDDED, MadeWith
from tools.recordings import read_recordings
from tools.sound_files import Unusable, load_recording, path_within, seconds_of, write_wav
from trainers.train_gpt_v2 import use_glibc_heap

FIRST_COMMANDS = {
    "train": "python -m tools.speech_codec train --recordings build/recordings/recordings.jsonl "
             "--output build/speech_codec.pt",
    "encode": "python -m tools.speech_codec encode --codec processed_data/speech_codec.pt "
              "--input processed_data/audio/new026_am.flac --output build/codes.npy",
    "decode": "python -m tools.speech_codec decode --codec processed_data/speech_codec.pt --input build/codes.npy "
              "--prompt processed_data/audio/new026_am.flac --output build/decoded.wav",
}
TRAIN_REMEDY = "`python -m tools.speech_codec train` writes a codec"
FORMAT = "speech_codec/1"
MEL_FLOOR = math.log(1e-5)  # of log_mel
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class CodecConfig:
    """Everything a codec file needs besides its weights."""

    sample_rate: int = 22050
    """Hz; recordings are resampled to it."""
    n_fft: int = 1024
    """Window of the spectrogram, in samples."""
    hop: int = 256
    """Samples from frame to frame."""
    n_mels: int = 80
    """Mel bins of one frame."""
    stack: int = 4
    """Frames that make one code."""
    pca_dim: int = 48
    """Dimensions in which the nearest centroid is sought."""
    num_codes: int = 1024
    """Size of the codebook."""
    width: int = 192
    """Channels of the decoder."""
    blocks: int = 5
    """Residual blocks of the decoder."""

    @property
    def samples_per_code(self) -> int:
        return self.hop * self.stack

    @property
    def codes_per_second(self) -> float:
        return self.sample_rate / self.samples_per_code


class ResidualBlock(nn.Module):
    """[B, C, T] -> [B, C, T]: a dilated convolution over time, then a pointwise one."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.wide = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(self.wide(self.norm(x))))


class MelDecoder(nn.Module):
    """Codes and prompt statistics to log-mel. It learns what to add to the centroids and the prompt's mean."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, frame = config.width, config.n_mels
        self.embedding = nn.Embedding(config.num_codes, width)
        self.from_centroid = nn.Linear(config.pca_dim, width)
        self.from_statistics = nn.Sequential(nn.Linear(2 * frame, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*(ResidualBlock(width, 1 + i % 2) for i in range(config.blocks)))
        self.to_frames = nn.Conv1d(width, config.stack * frame, 1)
        self.smooth = nn.Sequential(nn.Conv1d(frame, 96, 5, padding=2), nn.GELU(), nn.Conv1d(96, frame, 5, padding=2))
        for name, parameter in self.named_parameters():
            if name.startswith(("to_frames.", "smooth.2.")):
                nn.init.zeros_(parameter)

    def forward(self, codes: Tensor, centroids: Tensor, coarse: Tensor, statistics: Tensor) -> Tensor:
        """codes [B, T], centroids [B, T, pca_dim], coarse [B, T*stack, n_mels] (the centroids as mean-free log-mel),
        statistics [B, 2, n_mels] -> log-mel [B, T*stack, n_mels]."""
        x = self.embedding(codes) + self.from_centroid(centroids)
        x = x + self.from_statistics(statistics.flatten(1) / 4).unsqueeze(1)
        x = self.to_frames(self.blocks(x.transpose(1, 2))).transpose(1, 2)
        mel = coarse + statistics[:, :1] + x.reshape(coarse.shape)
        return mel + self.smooth(mel.transpose(1, 2)).transpose(1, 2)


class SpeechCodec(nn.Module):
    """encode, decode and condition; see the module's docstring for the method."""

    pca_mean: Tensor
    pca_basis: Tensor
    codebook: Tensor
    window_mean: Tensor
    window_deviation: Tensor
    window: Tensor
    mel_filters: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        stacked = config.stack * config.n_mels
        self.register_buffer("pca_mean", torch.zeros(stacked))
        self.register_buffer("pca_basis", torch.zeros(stacked, config.pca_dim))
        self.register_buffer("codebook", torch.zeros(config.num_codes, config.pca_dim))
        self.register_buffer("window_mean", torch.zeros(2 * config.n_mels))
        self.register_buffer("window_deviation", torch.ones(2 * config.n_mels))
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        filters = torchaudio.functional.melscale_fbanks(
            config.n_fft // 2 + 1, 0.0, config.sample_rate / 2, config.n_mels, config.sample_rate, "slaney", "slaney"
        )
        self.register_buffer("mel_filters", filters, persistent=False)
        self.decoder = MelDecoder(config)

    # Sound to numbers

    def log_mel(self, waveform: Tensor) -> Tensor:
        """[samples] -> natural-log mel magnitudes [frames, n_mels], frames padded to a multiple of `stack`."""
        c = self.config
        spectrum = torch.stft(waveform, c.n_fft, c.hop, window=self.window, pad_mode="constant", return_complex=True)
        mel = torch.log((spectrum.abs().T @ self.mel_filters).clamp_min(1e-5))
        missing = -len(mel) % c.stack
        return torch.cat([mel, mel[-1:].expand(missing, -1)]) if missing else mel

    def stacked(self, mel: Tensor) -> Tensor:
        """Log-mel [frames, n_mels] -> [codes, stack*n_mels] with the recording's mean removed."""
        return (mel - mel.mean(0)).reshape(len(mel) // self.config.stack, -1)

    def quantise(self, mel: Tensor) -> Tensor:
        """Log-mel [frames, n_mels] -> codes [frames/stack], int64."""
        return nearest((self.stacked(mel) - self.pca_mean) @ self.pca_basis, self.codebook)

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """[samples] at config.sample_rate -> codes [ceil(frames/stack)], int64, 0 to num_codes-1."""
        return self.quantise(self.log_mel(waveform))

    @torch.no_grad()
    def mel_statistics(self, waveform: Tensor) -> Tensor:
        """[samples] -> [2, n_mels]: mean and deviation over time of the log-mel; what `decode` needs of a prompt."""
        return statistics_of(self.log_mel(waveform))

    @torch.no_grad()
    def condition(self, waveform: Tensor, model_dim: int, shape: tuple[int, int] | None = None
                  ) -> tuple[Tensor, Tensor]:
        """A prompt [samples] -> (condition [32, model_dim], emo_vec [model_dim]), float32. Of `shape` [1, W], as in
        IndexTTS-2.5, the condition is one row of the whole prompt.

        Row i holds mean and deviation of the log-mel within the i-th of 32 overlapping windows of a quarter of the
        prompt; emo_vec those of the whole prompt. Both are scaled by the training corpus and turned by a fixed cosine
        basis, so equal sound gives equal numbers.
        """
        mel = self.log_mel(waveform)
        count, width = shape or (32, model_dim)
        parts = quarter_windows(mel, count) if count > 1 else [mel]
        rows = torch.stack([statistics_of(part).flatten() for part in parts])
        whole = statistics_of(mel).flatten()
        scaled = [(x - self.window_mean) / self.window_deviation for x in (rows, whole)]
        return (scaled[0] @ cosine_basis(2 * self.config.n_mels, width, 0.0) * 0.1,
                scaled[1] @ cosine_basis(2 * self.config.n_mels, model_dim, 0.5) * 0.1)

    # Numbers to sound

    def coarse_mel(self, codes: Tensor) -> Tensor:
        """codes [..., T] -> their centroids as mean-free log-mel [..., T*stack, n_mels]."""
        vectors = self.codebook[codes] @ self.pca_basis.T + self.pca_mean
        return vectors.reshape(*codes.shape[:-1], -1, self.config.n_mels)

    def decode_mel(self, codes: Tensor, statistics: Tensor) -> Tensor:
        """codes [B, T], statistics [B, 2, n_mels] -> log-mel [B, T*stack, n_mels]."""
        return self.decoder(codes, self.codebook[codes], self.coarse_mel(codes), statistics)

    @torch.no_grad()
    def decode(self, codes: Tensor, statistics: Tensor) -> Tensor:
        """codes [T], mel_statistics of a prompt [2, n_mels] -> waveform [T * samples_per_code], within -1 to 1."""
        if not len(codes):
            return torch.zeros(0)
        if int(codes.min()) < 0 or int(codes.max()) >= self.config.num_codes:
            raise ToolError(f"codes run from {int(codes.min())} to {int(codes.max())}, but this codec knows 0 to "
                            f"{self.config.num_codes - 1}. Take away start and stop tokens, or take the codec that "
                            "made them")
        mel = sharpened(self.decode_mel(codes.long()[None], statistics[None])[0])
        return self.mel_to_waveform(mel, len(codes) * self.config.samples_per_code)

    def mel_to_waveform(self, mel: Tensor, length: int, iterations: int = 60) -> Tensor:
        """Log-mel [frames, n_mels] -> waveform [length] by pseudo-inverse filters and Griffin-Lim. Deterministic."""
        c = self.config
        magnitude = (mel.exp() @ torch.linalg.pinv(self.mel_filters)).clamp_min(1e-6).T
        waveform = torchaudio.functional.griffinlim(
            magnitude, self.window, c.n_fft, c.hop, c.n_fft, power=1.0, n_iter=iterations, momentum=0.99,
            length=(len(mel) - 1) * c.hop, rand_init=False,
        )
        waveform = F.pad(waveform, (0, max(0, length - len(waveform))))[:length]
        return waveform / waveform.abs().max().clamp_min(1.0)

    # Files

    def save(self, path: Path) -> None:
        """Writes config and weights; the decoder's in half precision, so that the file stays small."""
        state = {name: tensor.half() if name.startswith("decoder.") else tensor
                 for name, tensor in self.state_dict().items()}
        # Through memory: a file saved by path carries that path's name inside, and would differ from run to run.
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "config": asdict(self.config), "state": state}, buffer)
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> SpeechCodec:
        """Reads what `save` wrote, on the CPU, in evaluation mode. Raises ToolError naming the file."""
        if not Path(path).is_file():
            raise ToolError(f"{path}: no such codec. {TRAIN_REMEDY}")
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
            raise ToolError(f"{path}: not a readable codec file. {TRAIN_REMEDY}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ToolError(f"{path}: not a codec file ({FORMAT}). {TRAIN_REMEDY}")
        try:
            codec = cls(CodecConfig(**content["config"]))
            codec.load_state_dict({name: tensor.float() for name, tensor in content["state"].items()})
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ToolError(f"{path}: its settings and weights are no codec ({reason}). {TRAIN_REMEDY}") from error
        return codec.eval().requires_grad_(False)


def codec_record(path: Path, codec: SpeechCodec) -> MadeWith:
    """What data made with this codec, read from `path`, was made with, so far as the codec decides it."""
    config = codec.config
    return {"features": EMBEDDED, "codec_sha256": sha256_of(path), "num_codes": config.num_codes,
            "codes_per_second": round(config.codes_per_second, 4)}


# Pure helpers


def statistics_of(mel: Tensor) -> Tensor:
    """Log-mel [frames, n_mels] -> mean and deviation over time [2, n_mels]."""
    return torch.stack([mel.mean(0), mel.std(0, unbiased=False)])


def sharpened(mel: Tensor, power: float = 1.1) -> Tensor:
    """Log-mel [frames, n_mels] with its contrasts raised at equal energy: a decoder leaves them a little flat."""
    sharp = power * mel
    return sharp + (torch.logsumexp(2 * mel.flatten(), 0) - torch.logsumexp(2 * sharp.flatten(), 0)) / 2


def mel_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """L1 of log-mels [B, frames, n_mels] and, at half weight, of their steps over time and over frequency, for fewer
    blurred contrasts. Loud bins weigh more: they are what one hears."""
    error, weight = predicted - true, (true - MEL_FLOOR + 0.1) / 7
    over_time, over_bins = error.diff(dim=1).abs() * weight[:, 1:], error.diff(dim=2).abs() * weight[:, :, 1:]
    return (error.abs() * weight).mean() + 0.5 * (over_time.mean() + over_bins.mean())


def quarter_windows(mel: Tensor, count: int = 32) -> list[Tensor]:
    """`count` evenly spaced windows of a quarter of the frames, the first at the start and the last at the end."""
    size = max(1, len(mel) // 4)
    return [mel[start : start + size] for start in (round(i * (len(mel) - size) / (count - 1)) for i in range(count))]


def cosine_basis(rows: int, columns: int, shift: float) -> Tensor:
    """[rows, columns] of the discrete cosine transform (type II for shift 0, IV for 1/2), orthonormal if rows fit."""
    k = torch.arange(rows, dtype=torch.float64)[:, None] + shift
    n = torch.arange(columns, dtype=torch.float64)[None] + 0.5
    return (torch.cos(math.pi / columns * k * n) * math.sqrt(2 / columns)).float()


def nearest(vectors: Tensor, codebook: Tensor, chunk: int = 256) -> Tensor:
    """Index of the nearest codebook row for each vector: [N, d], [K, d] -> [N], int64."""
    half_norms = codebook.square().sum(1) / 2
    return torch.cat([(part @ codebook.T - half_norms).argmax(1) for part in vectors.split(chunk)])


def fit_pca(vectors: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """[N, D] -> mean [D] and the leading eigenvectors [D, dimensions], each with its largest entry positive."""
    mean = vectors.double().mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in vectors.split(65536):
        centred = part.double() - mean
        covariance += centred.T @ centred
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :dimensions]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return mean.float(), (basis * largest.sign()).float()


def fit_kmeans(vectors: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm: [N, d] -> centroids [count, d]. A centroid that nobody chose moves to a random vector."""
    codebook = vectors[torch.randperm(len(vectors), generator=generator)[:count]].clone()
    progress = Progress("k-means", iterations)
    for iteration in range(iterations):
        chosen = nearest(vectors, codebook)
        sizes = torch.bincount(chosen, minlength=count)
        sums = torch.zeros(count, vectors.shape[1], dtype=torch.float64).index_add_(0, chosen, vectors.double())
        codebook = (sums / sizes.clamp_min(1)[:, None]).float()
        empty = (sizes == 0).nonzero()[:, 0]
        codebook[empty] = vectors[torch.randint(len(vectors), (len(empty),), generator=generator)]
        progress.update(iteration + 1)
    return codebook


# Training


def load_mels(codec: SpeechCodec, paths: Sequence[Path]) -> list[Tensor | Unusable]:
    """Log-mels [frames, n_mels] of all recordings, in half precision to halve the memory, or why there is none. One
    recording a core at a time: the tensors of one are too small to be shared out."""
    def read(path: Path) -> Tensor | Unusable:
        try:
            return codec.log_mel(load_recording(path, codec.config.sample_rate)).half()
        except Unusable as fault:
            return fault

    mels, threads = [], torch.get_num_threads()
    progress = Progress("reading recordings", len(paths))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for mel in pool.map(read, paths):
                mels.append(mel)
                progress.update(len(mels))
    finally:
        torch.set_num_threads(threads)
    return mels


def fit_quantiser(codec: SpeechCodec, mels: Sequence[Tensor], iterations: int, generator: torch.Generator) -> None:
    """Sets PCA, codebook and the scale of the condition from the training recordings."""
    vectors = torch.cat([codec.stacked(mel.float()) for mel in mels])
    if len(vectors) < 4 * codec.config.num_codes:
        raise ToolError(f"the recordings make only {len(vectors)} codes, too few for a codebook of "
                        f"{codec.config.num_codes}. Record more, or lower --num-codes to {len(vectors) // 4} or less")
    mean, basis = fit_pca(vectors, codec.config.pca_dim)
    codec.pca_mean.copy_(mean)
    codec.pca_basis.copy_(basis)
    codec.codebook.copy_(fit_kmeans((vectors - mean) @ basis, codec.config.num_codes, iterations, generator))
    some = mels[:: max(1, len(mels) // 500)]
    windows = torch.stack([statistics_of(w).flatten() for mel in some for w in quarter_windows(mel.float(), 8)])
    codec.window_mean.copy_(windows.mean(0))
    codec.window_deviation.copy_(windows.std(0).clamp_min(1e-2))


def train_decoder(codec: SpeechCodec, mels: Sequence[Tensor], speakers: Sequence[str], steps: int, batch_size: int,
                  segment: int, generator: torch.Generator) -> None:
    """Fits the decoder to the true log-mels, mel_loss, Adam with a half-cosine rate. The statistics come from another
    recording of the same speaker, as they will in use. `segment` is in codes; shorter recordings are left out."""
    stack = codec.config.stack
    codes = [codec.quantise(mel.float()) for mel in mels]
    statistics = torch.stack([statistics_of(mel.float()) for mel in mels])
    usable = [i for i, c in enumerate(codes) if len(c) >= segment]
    if not usable:
        raise ToolError(f"no recording is as long as --segment {segment} codes. Lower --segment")
    by_speaker: dict[str, list[int]] = {}
    for index, speaker in enumerate(speakers):
        by_speaker.setdefault(speaker, []).append(index)
    chooser = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    optimizer = torch.optim.AdamW(codec.decoder.parameters(), lr=1.0, weight_decay=0.01)
    progress, average = Progress("decoder", steps), 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = 2e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = [chooser.choice(usable) for _ in range(batch_size)]
        starts = [chooser.randint(0, len(codes[i]) - segment) for i in chosen]
        batch = torch.stack([codes[i][s : s + segment] for i, s in zip(chosen, starts, strict=True)])
        target = torch.stack([mels[i][s * stack : (s + segment) * stack] for i, s in zip(chosen, starts, strict=True)])
        prompts = [chooser.choice(by_speaker[speakers[i]]) for i in chosen]
        loss = mel_loss(codec.decode_mel(batch, statistics[prompts]), target.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.decoder.parameters(), 1.0)
        optimizer.step()
        average = 0.99 * average + 0.01 * loss.item() if step else loss.item()
        progress.update(step + 1, f"loss {average:.4f}")


def train(rows: Sequence[dict[str, Any]], paths: Sequence[Path], args: argparse.Namespace) -> SpeechCodec:
    """A codec trained on the rows' recordings, which lie at `paths`; unusable ones are named and left out.

    Raises: ToolError when none is left.
    """
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    codec = SpeechCodec(CodecConfig(num_codes=args.num_codes, pca_dim=args.pca_dim, width=args.width))
    found = load_mels(codec, paths)
    faults = [mel for mel in found if isinstance(mel, Unusable)]
    for fault in faults[:SHOWN_FAULTS]:
        warn(f"left out: {fault}")
    if len(faults) == len(found):
        raise ToolError(f"not one of {len(found)} recordings can be used. The lines above say why")
    if faults:
        warn(f"{len(faults)} of {len(found)} recordings are left out")
    mels = [mel for mel in found if not isinstance(mel, Unusable)]
    with torch.no_grad():
        fit_quantiser(codec, mels, args.kmeans_iterations, generator)
    speakers = [row.get("speaker", "") for row, mel in zip(rows, found, strict=True) if not isinstance(mel, Unusable)]
    train_decoder(codec, mels, speakers, args.steps, args.batch_size, args.segment, generator)
    return codec.eval().requires_grad_(False)


# Command line


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recordings", type=Path, required=True, help="JSON lines: audio (relative path), speaker")
    parser.add_argument("--audio-dir", type=Path, help="holds all recordings (the folder of --recordings)")
    parser.add_argument("--output", type=Path, required=True, help="the codec file, such as speech_codec.pt")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of the decoder (3000)")
    parser.add_argument("--max-hours", type=float, default=10, help="takes every 2nd, 3rd ... recording of more (10)")
    parser.add_argument("--num-codes", type=int, default=1024, help="size of the codebook (1024)")
    parser.add_argument("--pca-dim", type=int, default=48, help="dimensions in which the nearest code is sought (48)")
    parser.add_argument("--kmeans-iterations", type=int, default=25, help="passes of k-means over all recordings (25)")
    parser.add_argument("--width", type=int, default=192, help="channels of the decoder (192)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step of the decoder (16)")
    parser.add_argument("--segment", type=int, default=24, help="codes per training sample of the decoder (24)")
    parser.add_argument("--seed", type=int, default=1234, help="of k-means, weights and training samples (1234)")


def check_train_arguments(args: argparse.Namespace) -> None:
    """Raises: ToolError naming the flag."""
    for name in ("steps", "num_codes", "pca_dim", "width", "batch_size", "segment"):
        if getattr(args, name) < 1:
            raise ToolError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    if args.kmeans_iterations < 0:
        raise ToolError(f"--kmeans-iterations {args.kmeans_iterations}: give 0 or more")
    if not args.max_hours > 0:
        raise ToolError(f"--max-hours {args.max_hours:g}: give a number above 0, such as 10")
    most = CodecConfig.stack * CodecConfig.n_mels
    if args.pca_dim > most:
        raise ToolError(f"--pca-dim {args.pca_dim}: give {most} at most, for a code is made of {most} numbers")


def training_rows(recordings: Path, audio_dir: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The rows to train on and where their recordings lie. Raises: ToolError naming the row."""
    rows, paths = [], []
    found = read_recordings(recordings, ["audio"], "`python -m tools.speak` writes such a file")
    for number, row in enumerate(found, 1):
        if row.get("split", "train") != "train":
            continue
        try:
            paths.append(path_within(row["audio"], audio_dir))
        except Unusable as fault:
            raise ToolError(f"{recordings}, row {number}: {fault}") from fault
        rows.append(row)
    if not rows:
        raise ToolError(f"{recordings}: every row is of split val, so none is left to train on. Mark some train")
    return rows, paths


def run_train(args: argparse.Namespace) -> None:
    check_train_arguments(args)
    rows, paths = training_rows(args.recordings, Path(os.path.realpath(args.audio_dir or args.recordings.parent)))
    seconds = [seconds_of(path) for path in paths]
    step = max(1, math.ceil(sum(seconds) / 3600 / args.max_hours))
    codec = train(rows[::step], paths[::step], args)
    with writing_to(args.output.parent):
        codec.save(args.output)
    thinned = f" (one in {step} of {len(rows)} recordings of {sum(seconds) / 3600:.1f} hours)" if step > 1 else ""
    info(f"codec of {sum(p.numel() for p in codec.decoder.parameters()) / 1e6:.1f} M decoder weights from "
         f"{len(rows[::step])} recordings of {sum(seconds[::step]) / 3600:.1f} hours{thinned} -> {args.output}")


def run_encode(args: argparse.Namespace) -> None:
    codec = SpeechCodec.load(args.codec)
    codes = codec.encode(load_recording(args.input, codec.config.sample_rate))
    with writing_to(args.output.parent), atomic_path(args.output) as temporary, temporary.open("wb") as handle:
        np.save(handle, codes.numpy().astype(np.int32))  # a handle, for np.save would add .npy to another name
    info(f"{len(codes)} codes -> {args.output}")


def read_codes(path: Path) -> Tensor:
    """Codes of a .npy file [n], int64. Raises: ToolError naming the file."""
    try:
        codes = np.load(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ToolError(f"{path}: not a .npy file of codes ({error})") from error
    if not isinstance(codes, np.ndarray):
        raise ToolError(f"{path}: not a .npy file of codes, but an archive of arrays. Give what `encode` wrote")
    if codes.ndim != 1 or codes.dtype.kind not in "iu":
        raise ToolError(f"{path}: holds {codes.dtype} of shape {codes.shape}, not a row of integer codes")
    if not len(codes):
        raise ToolError(f"{path}: holds no codes. `encode` makes some from a recording")
    return torch.from_numpy(codes.astype(np.int64))


def run_decode(args: argparse.Namespace) -> None:
    codec, codes = SpeechCodec.load(args.codec), read_codes(args.input)
    statistics = codec.mel_statistics(load_recording(args.prompt, codec.config.sample_rate))
    waveform = codec.decode(codes, statistics)
    with writing_to(args.output.parent):
        write_wav(args.output, waveform, codec.config.sample_rate)
    info(f"{len(waveform) / codec.config.sample_rate:.2f} s -> {args.output}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMANDS["encode"])
    subparsers = parser.add_subparsers(dest="command", required=True)
    purposes = {"train": "learn a codec from recordings", "encode": "recording to codes",
                "decode": "codes and prompt to recording"}
    commands = {name: subparsers.add_parser(name, help=purpose, description=purpose,
                                            epilog=f"first command:\n  {FIRST_COMMANDS[name]}",
                                            formatter_class=argparse.RawDescriptionHelpFormatter)
                for name, purpose in purposes.items()}
    add_train_arguments(commands["train"])
    for name, source, result in (("encode", "a recording", "codes, a .npy file"),
                                 ("decode", "codes, a .npy file", "a WAV file")):
        commands[name].add_argument("--codec", type=Path, required=True, help="what `train` wrote")
        commands[name].add_argument("--input", type=Path, required=True, help=source)
        commands[name].add_argument("--output", type=Path, required=True, help=result)
    commands["decode"].add_argument("--prompt", type=Path, required=True, help="a recording of the wanted voice")
    args = parser.parse_args(argv)
    use_glibc_heap()
    {"train": run_train, "encode": run_encode, "decode": run_decode}[args.command](args)


if __name__ == "__main__":
    run_program(main)
