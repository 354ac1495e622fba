"""Codes to sound, behind one small interface: the embedded codec here, s2mel and BigVGAN of IndexTTS2 or 2.5 in
tools.indextts2_sound. One of them, chosen by flags, is all that generation and its programs know of."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tools._common import Progress, ToolError, sha256_of
from tools.made_with import INDEXTTS25, MadeWith
from tools.model_folder import recognised
from tools.recogniser import equal_batches
from tools.sound_files import load_recording
from tools.speech_codec import SpeechCodec, codec_record
from trainers.train_gpt_v2 import ModelConfig

SHORTEST_PROMPT = 0.5  # seconds
CODEC = Path("processed_data/speech_codec.pt")


@dataclass
class Prompt:
    """A voice to speak in: condition [32, D] (in IndexTTS-2.5's layout [1, 192]) and emo_vec [D] for the GPT, float32,
    and what its decoder keeps of it."""

    condition: Tensor
    emo_vec: Tensor
    sound: dict[str, Tensor]


class SoundDecoder(Protocol):
    """Makes prompts of recordings, and sound of codes."""

    device: torch.device
    """Where the GPT is wanted too."""
    sample_rate: int
    n_mels: int
    reads_latents: bool
    """Whether `waveform` needs the GPT's latents."""
    flag: str
    """As messages name it."""
    remedy: str
    """For codes of another one."""
    record: MadeWith
    """What the codes and conditions must have been made with."""
    digest: str
    """Equal only where codes sound the same."""

    def move(self, device: torch.device) -> None:
        """What `waveform` needs, to another device; prompts are made before."""

    def size(self) -> int:
        """Bytes that `move` moves."""

    def prompt(self, path: Path, model: ModelConfig) -> Prompt:
        """Of a recording, kept for the next time. Raises: ToolError for one that is unreadable or too short, or where
        no condition for this model can be made."""

    def waveform(self, codes: Tensor, latents: Tensor, prompt: Prompt, seed: int) -> Tensor:
        """codes [c], int64, and what the GPT knew before each one [c, D] -> [samples]. `seed` chooses its noise."""

    def log_mel(self, waveform: Tensor) -> Tensor:
        """[samples] -> [frames, n_mels]."""

    def mels_to_learn_from(self, codes: Sequence[Tensor], prompts: Sequence[Path],
                           recordings: Sequence[Path | None]) -> list[Tensor]:
        """Log-mels of clips that sound like what the codes of clips become, in half precision to halve the memory:
        [frames, n_mels] each. Raises: ToolError."""


def long_enough(waveform: Tensor, sample_rate: int, path: Path) -> Tensor:
    """The waveform of a prompt. Raises: ToolError."""
    seconds = len(waveform) / sample_rate
    if seconds < SHORTEST_PROMPT:
        raise ToolError(f"{path}: {seconds:.2f} s of sound say too little about a voice. Give a prompt of at least "
                        f"{SHORTEST_PROMPT} s, better 3")
    return waveform


class CodecSound:
    """The SoundDecoder of an embedded codec. What it keeps of a prompt are its mel statistics [2, n_mels]."""

    device, reads_latents = torch.device("cpu"), False
    remedy = "Give the codec that its training data was made with as --codec"

    def __init__(self, path: Path) -> None:
        """Raises: ToolError for a file that is missing or damaged."""
        self.codec, self.flag, self.digest = SpeechCodec.load(path), f"--codec {path}", sha256_of(path)
        self.record = codec_record(path, self.codec)
        self.sample_rate, self.n_mels = self.codec.config.sample_rate, self.codec.config.n_mels
        self.prompts: dict[tuple[Path, ModelConfig], Prompt] = {}

    def move(self, device: torch.device) -> None:
        assert device == self.device, "it works on the CPU"

    def size(self) -> int:
        return 0

    def prompt(self, path: Path, model: ModelConfig) -> Prompt:
        if (path, model) not in self.prompts:
            waveform = long_enough(load_recording(path, self.sample_rate), self.sample_rate, path)
            self.prompts[path, model] = Prompt(*self.codec.condition(waveform, model.model_dim, model.condition_shape),
                                               {"statistics": self.codec.mel_statistics(waveform)})
        return self.prompts[path, model]

    def waveform(self, codes: Tensor, latents: Tensor, prompt: Prompt, seed: int) -> Tensor:
        return self.codec.decode(codes, prompt.sound["statistics"])

    def log_mel(self, waveform: Tensor) -> Tensor:
        return self.codec.log_mel(waveform)

    def mels_to_learn_from(self, codes: Sequence[Tensor], prompts: Sequence[Path],
                           recordings: Sequence[Path | None]) -> list[Tensor]:
        """The codec's decodings, without a vocoder."""
        statistics = {path: self.codec.mel_statistics(load_recording(path, self.sample_rate)) for path in set(prompts)}
        mels: dict[int, Tensor] = {}
        progress = Progress("decoding training codes", len(codes))
        for numbers in equal_batches([len(clip) for clip in codes]):
            with torch.no_grad():
                decoded = self.codec.decode_mel(torch.stack([codes[i] for i in numbers]),
                                                torch.stack([statistics[prompts[i]] for i in numbers])).half()
            mels.update(zip(numbers, decoded, strict=True))
            progress.update(len(mels))
        return [mels[i] for i in range(len(codes))]


def add_sound_arguments(parser: argparse.ArgumentParser, made: str) -> None:
    """`made` says what was made with the codec or the folder."""
    parser.add_argument("--codec", type=Path, help=f"the one that {made} was made with ({CODEC})")
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="instead of a codec: the folder of IndexTTS-2 or "
                        f"2.5 whose features {made} was made with; needs requirements-indextts.txt")
    parser.add_argument("--device", help="auto, cpu or cuda, with --model-dir (auto)")


def sound_of(args: argparse.Namespace, device: str | None = None) -> SoundDecoder:
    """As the flags choose it, on `device` instead of --device. Raises: ToolError."""
    if args.model_dir is None:
        if args.device is not None:
            raise ToolError(f"--device {args.device}: the embedded codec works on the CPU. Leave it out, or give "
                            "--model-dir")
        return CodecSound(CODEC if args.codec is None else args.codec)
    if args.codec is not None:
        raise ToolError("--codec cannot be combined with --model-dir: codes are the codec's or IndexTTS2's. Give the "
                        "one that the training data was made with")
    from tools.indextts2_sound import IndexTTS2Sound, IndexTTS25Sound  # which import half a gigabyte of packages

    kind = IndexTTS25Sound if recognised(args.model_dir) == INDEXTTS25 else IndexTTS2Sound
    return kind(args.model_dir, device or args.device or "auto")
