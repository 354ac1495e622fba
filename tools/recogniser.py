"""A small speech recogniser that is trained in minutes: it writes down the letters that it hears."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools._common import Progress, ToolError, atomic_path, writing_to

FORMAT = "recogniser/1"
EPOCHS, BATCH, SAVE_EVERY = 2, 32, 100


# Letters


def edit_distance(heard: str, said: str) -> int:
    """Letters to replace, add and take away between two texts."""
    row = list(range(len(said) + 1))
    for i, letter in enumerate(heard, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def error_rate(heard: Sequence[str], said: Sequence[str]) -> float:
    """CER over all texts together."""
    wrong = sum(edit_distance(h, s) for h, s in zip(heard, said, strict=True))
    return wrong / sum(map(len, said))


# The recogniser


class Recogniser(nn.Module):
    """Log-mels to letters: two convolutions that make one frame of four, a two-way GRU, and CTC's blank as class 0."""

    def __init__(self, letters: str, n_mels: int, width: int = 160) -> None:
        super().__init__()
        self.letters = letters
        self.convolutions = nn.ModuleList(nn.Conv1d(size, width, 5, stride=2, padding=2) for size in (n_mels, width))
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, len(letters) + 1)

    def forward(self, mels: Tensor) -> Tensor:
        """Mean-free log-mels [B, frames, n_mels] -> log-probabilities [B, ceil(frames / 4), classes]."""
        x = mels.transpose(1, 2)
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        x = F.dropout(x.transpose(1, 2), 0.1, self.training)
        return self.head(self.gru(x)[0]).log_softmax(-1)

    @torch.no_grad()
    def hear(self, mel: Tensor) -> str:
        """Log-mel [frames, n_mels] -> the likeliest letters; none for no frames."""
        if not len(mel):
            return ""
        classes = self(mean_free(mel)[None])[0].argmax(-1).tolist()
        return "".join(self.letters[c - 1] for c, before in zip(classes, [0, *classes], strict=False)
                       if c and c != before)


def mean_free(mel: Tensor) -> Tensor:
    """Loudness and the sound of the room go with the mean."""
    return mel.float() - mel.float().mean(0)


def training_batches(lengths: Sequence[int], epoch: int) -> list[list[int]]:
    """Clips of nearly equal length together, the batches in an order of the epoch's own."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [batches[i] for i in np.random.default_rng(epoch).permutation(len(batches))]


def equal_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of equal length together, BATCH at most."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[batches[-1][0]] == lengths[i] and len(batches[-1]) < BATCH:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def ctc_loss(recogniser: Recogniser, mels: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
    """The mean over the clips of nats per letter; clips too short for their text count as 0."""
    scores = recogniser(nn.utils.rnn.pad_sequence([mean_free(mel) for mel in mels], batch_first=True))
    targets = [[recogniser.letters.index(letter) + 1 for letter in text] for text in texts]
    return F.ctc_loss(scores.transpose(0, 1), torch.tensor([t for target in targets for t in target]),
                      torch.tensor([-(-len(mel) // 4) for mel in mels]), torch.tensor([len(t) for t in targets]),
                      zero_infinity=True)


def train_recogniser(recogniser: Recogniser, mels: Sequence[Tensor], texts: Sequence[str], done: int, path: Path,
                     state: dict[str, Any]) -> None:
    """Trains from step `done` to the end, and saves every SAVE_EVERY steps and at the end. Adam, half-cosine rate."""
    batches = [batch for epoch in range(EPOCHS) for batch in training_batches([len(mel) for mel in mels], epoch)]
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=1.0, weight_decay=0.01)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    progress, average = Progress("training the recogniser", len(batches)), 0.0
    recogniser.train()
    for step in range(done, len(batches)):
        torch.manual_seed(step)  # dropout depends on the step alone, however often the training was stopped
        warm = min(1.0, (step + 1) / 200)
        optimizer.param_groups[0]["lr"] = 2e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        loss = ctc_loss(recogniser, [mels[i] for i in batches[step]], [texts[i] for i in batches[step]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(recogniser.parameters(), 1.0)
        optimizer.step()
        average = 0.98 * average + 0.02 * loss.item() if step > done else loss.item()
        progress.update(step + 1, f"CTC loss {average:.2f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(batches):
            save_recogniser(path, state | {"done": step + 1, "complete": step + 1 == len(batches),
                                           "weights": recogniser.state_dict(), "optimizer": optimizer.state_dict()})


def save_recogniser(path: Path, state: dict[str, Any]) -> None:
    """Raises: ToolError when the disk refuses."""
    buffer = io.BytesIO()
    torch.save({key: value for key, value in state.items() if key != "optimizer" or not state["complete"]}, buffer)
    with writing_to(path.parent), atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_recogniser(path: Path, made_with: str) -> dict[str, Any] | None:
    """What save_recogniser wrote; None where there is none. Raises: ToolError."""
    if not path.exists():
        return None
    remedy = "Delete it, and a new one is trained, or name another file with --recogniser"
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, OSError) as error:
        raise ToolError(f"{path}: not a readable recogniser. {remedy}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ToolError(f"{path}: not a recogniser ({FORMAT}). {remedy}")
    if state["made_with"] != made_with:
        raise ToolError(f"{path}: was trained on other data or for another codec. {remedy}")
    return state
