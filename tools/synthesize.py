"""Speaks a text in the voice of a prompt recording: checkpoint + text + prompt -> WAV, and a picture of its mel.

The likeliest code at every step (greedy), then the embedded codec turns codes into sound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from tools._common import ToolError, atomic_path, info, make_parser, run_program, sha256_of
from tools.amharic_text import normalise
from tools.preprocess import text_ids_of
from tools.speech_codec import SpeechCodec, load_recording, write_wav
from tools.train_tokenizer import load_tokenizer
from trainers.train_gpt_v2 import (
    ModelConfig,
    ResumeError,
    Sample,
    UnifiedVoiceGPT,
    collate_packed,
    model_config_from,
    read_checkpoint,
)

FIRST_COMMAND = ("python -m tools.synthesize --checkpoint training_output/best.pth --text 'ሰላም ለዓለም' "
                 "--prompt processed_data/audio/new026_am.flac --output hello.wav")
# Anchor colours from quiet to loud.
COLOURS = np.array([(0, 0, 20), (60, 15, 110), (180, 50, 90), (250, 140, 40), (255, 250, 190)], dtype=float)


def load_model(path: Path) -> tuple[UnifiedVoiceGPT, dict[str, Any]]:
    """A verified checkpoint as a model in evaluation mode, and the checkpoint. Raises: ToolError."""
    try:
        checkpoint = read_checkpoint(path)
    except ResumeError as error:
        raise ToolError(str(error)) from error
    model = UnifiedVoiceGPT(model_config_from(checkpoint["model_config"], str(path)))
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in checkpoint["model"].items() if name in own})
    return model.eval().requires_grad_(False), checkpoint


def generate_codes(model: UnifiedVoiceGPT, text_ids: Sequence[int], condition: np.ndarray, emo_vec: np.ndarray
                   ) -> list[int]:
    """Greedy codes for text_ids [t], condition [32, D], emo_vec [D], up to the stop token or the model's limit.

    The whole sequence is computed anew for each code: simple, and quick enough for short sentences.
    """
    config: ModelConfig = model.config
    codes: list[int] = []
    while len(codes) < config.max_code_len:
        sample = Sample(np.array(text_ids), np.array(codes, dtype=np.int64), condition, emo_vec)
        _, mel_logits = model(collate_packed([sample], config))
        mel_logits[-1, config.start_mel_token] = -torch.inf  # a start in mid-speech means nothing
        code = int(mel_logits[-1].argmax())
        if code == config.stop_mel_token:
            break
        codes.append(code)
    return codes


def mel_picture(mels: Sequence[tuple[str, torch.Tensor]], path: Path) -> None:
    """Log-mels [frames, n_mels] under each other, low frequencies at the bottom, each with its title, as a PNG."""
    loudest = max(float(mel.max()) for _, mel in mels)
    width, height, title_height = 2 * max(len(mel) for _, mel in mels), 2 * mels[0][1].shape[1], 18
    picture = Image.new("RGB", (width, len(mels) * (height + title_height)), "white")
    for i, (title, mel) in enumerate(mels):
        level = ((mel.numpy().T[::-1] - loudest) / 9 + 1).clip(0, 1) * (len(COLOURS) - 1)  # 9 nepers, 78 dB
        lower = np.minimum(level.astype(int), len(COLOURS) - 2)
        share = (level - lower)[..., None]
        pixels = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
        image = Image.fromarray(pixels.astype(np.uint8)).resize((2 * len(mel), height))
        picture.paste(image, (0, i * (height + title_height) + title_height))
        ImageDraw.Draw(picture).text((4, i * (height + title_height) + 3), title, fill="black")
    with atomic_path(path) as temporary:
        picture.save(temporary)


def check_tokenizer(path: Path, checkpoint: dict[str, Any]) -> None:
    if sha256_of(path) != checkpoint["tokenizer"]["sha256"]:
        raise ToolError(f"{path}: not the tokenizer that the checkpoint was trained with. Give that one as --tokenizer")


def synthesize(args: argparse.Namespace) -> None:
    """The program's work, from files to files. Raises: ToolError."""
    model, checkpoint = load_model(args.checkpoint)
    tokenizer_path = args.tokenizer or Path(checkpoint["tokenizer"]["path"])
    tokenizer = load_tokenizer(tokenizer_path)
    check_tokenizer(tokenizer_path, checkpoint)
    codec = SpeechCodec.load(args.codec)
    if codec.config.num_codes != model.config.code_count:
        raise ToolError(f"{args.codec}: has {codec.config.num_codes} codes, the checkpoint {model.config.code_count}. "
                        "Give the codec that its training data was made with as --codec")
    prompt = load_recording(args.prompt, codec.config.sample_rate)
    text = normalise(args.text)
    text_ids = text_ids_of(text, tokenizer, "--text")
    if len(text_ids) > model.config.max_text_tokens:
        raise ToolError(f"--text: {len(text_ids)} tokens, the model takes {model.config.max_text_tokens}. Split it")
    condition, emo_vec = codec.condition(prompt, model.config.model_dim)
    started = time.perf_counter()
    codes = generate_codes(model, text_ids, condition.numpy(), emo_vec.numpy())
    waveform = codec.decode(torch.tensor(codes, dtype=torch.int64), codec.mel_statistics(prompt))
    seconds, spoken = time.perf_counter() - started, len(waveform) / codec.config.sample_rate
    if not codes:
        raise ToolError("the model stopped before the first code: it is not trained far enough for this text")
    write_wav(args.output, waveform, codec.config.sample_rate)
    picture = args.output.with_suffix(".png")
    mel_picture([("synthesis", codec.log_mel(waveform))], picture)
    info(f"“{text}”: {len(codes)} codes, {spoken:.2f} s of sound in {seconds:.2f} s -> {args.output}, {picture}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth, latest.pth or a model_step file")
    parser.add_argument("--text", required=True, help="Amharic text to speak")
    parser.add_argument("--prompt", type=Path, required=True, help="a recording of the voice to speak in")
    parser.add_argument("--output", type=Path, required=True, help="WAV file; the picture goes beside it as .png")
    parser.add_argument("--codec", type=Path, default=Path("processed_data/speech_codec.pt"))
    parser.add_argument("--tokenizer", type=Path, help="the checkpoint's, unless it was moved")
    synthesize(parser.parse_args(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    run_program(main)
