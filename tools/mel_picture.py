"""Pictures of log-mel spectrograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from tools._common import atomic_path

# Anchor colours from quiet to loud.
COLOURS = np.array([(0, 0, 20), (60, 15, 110), (180, 50, 90), (250, 140, 40), (255, 250, 190)], dtype=float)


def mel_image(mels: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Log-mels [frames, n_mels] under each other, low frequencies at the bottom, each with its title."""
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
    return picture


def mel_picture(mels: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """mel_image as a PNG file."""
    with atomic_path(path) as temporary:
        mel_image(mels).save(temporary)
