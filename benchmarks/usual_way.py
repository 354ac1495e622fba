"""The model as IndexTTS2's forks train it: padded batches and recomputed GPT-2 blocks, to compare the trainer with."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from trainers import train_gpt_v2 as trainer


class PlainBlocks(nn.Module):
    """A pre-norm stack of equal shape out of PyTorch's own layers."""

    def __init__(self, config: trainer.ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(
            config.model_dim, config.heads, 4 * config.model_dim, 0.1, functools.partial(F.gelu, approximate="tanh"),
            batch_first=True, norm_first=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for layer in self.layers:
            x = recompute_in_backward(layer, x, mask, is_causal=True, use_reentrant=False)  # type: ignore[assignment]
        return self.norm(x)


class TransformersBlocks(nn.Module):
    """transformers' GPT2Model with gradient checkpointing, as IndexTTS2 builds it."""

    def __init__(self, config: trainer.ModelConfig):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        length = config.max_text_tokens + config.max_mel_tokens + 64
        self.gpt = GPT2Model(GPT2Config(
            vocab_size=1, n_positions=length, n_embd=config.model_dim, n_layer=config.layers, n_head=config.heads,
            bos_token_id=None, eos_token_id=None, use_cache=False))
        self.gpt.gradient_checkpointing_enable()

    def forward(self, x: Tensor) -> Tensor:
        return self.gpt(inputs_embeds=x, use_cache=False).last_hidden_state


class PaddedGPT(nn.Module):
    """IndexTTS2's GPT over a right-padded batch; losses at scored positions, logits at all."""

    def __init__(self, config: trainer.ModelConfig, blocks: nn.Module):
        super().__init__()
        dim = config.model_dim
        self.config, self.blocks = config, blocks
        self.text = nn.Embedding(config.number_text_tokens + 1, dim)
        self.mel = nn.Embedding(config.number_mel_codes, dim)
        self.text_at = nn.Embedding(config.max_text_tokens + 2, dim)
        self.mel_at = nn.Embedding(config.max_mel_tokens + 3, dim)
        self.speed, self.norm = nn.Embedding(2, dim), nn.LayerNorm(dim)
        self.text_head = nn.Linear(dim, config.number_text_tokens + 1)
        self.mel_head = nn.Linear(dim, config.number_mel_codes)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        text, mel, count = batch["text"], batch["mel"], len(batch["text"])
        places = torch.arange(max(text.shape[1], mel.shape[1]), device=text.device)
        x = torch.cat([batch["condition"], self.speed.weight.expand(count, -1, -1),
                       self.text(text) + self.text_at(places[: text.shape[1]]),
                       self.mel(mel) + self.mel_at(places[: mel.shape[1]])], dim=1)
        x = self.norm(self.blocks(x)[:, 34:])
        text_logits, mel_logits = self.text_head(x[:, : text.shape[1]]), self.mel_head(x[:, text.shape[1] :])
        return (0.2 * F.cross_entropy(text_logits.flatten(0, 1).float(), batch["text_targets"].flatten())
                + 0.8 * F.cross_entropy(mel_logits.flatten(0, 1).float(), batch["mel_targets"].flatten()))


def padded(parts: Sequence[Any], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Inputs filled up with the stop token, and targets, -100 where nothing is scored. [B, longest + 2] each."""
    longest = max(map(len, parts)) + 2
    inputs, targets = torch.full((len(parts), longest), stop), torch.full((len(parts), longest), -100)
    for i, part in enumerate(parts):
        inputs[i, 0], inputs[i, 1 : len(part) + 1] = start, torch.from_numpy(part)
        targets[i, : len(part) + 1] = inputs[i, 1 : len(part) + 2]
    return inputs, targets


def padded_batch(samples: Sequence[Any], config: trainer.ModelConfig) -> dict[str, Tensor]:
    text, text_targets = padded([s.text_ids for s in samples], config.start_text_token, config.stop_text_token)
    mel, mel_targets = padded([s.codes for s in samples], config.start_mel_token, config.stop_mel_token)
    condition = torch.stack([torch.from_numpy(s.condition + s.emo_vec) for s in samples])
    return {"text": text, "text_targets": text_targets, "mel": mel, "mel_targets": mel_targets, "condition": condition}


def usual_blocks(config: trainer.ModelConfig) -> tuple[nn.Module, str]:
    if importlib.util.find_spec("transformers") is None:
        return PlainBlocks(config), "PyTorch's TransformerEncoderLayer (no transformers here)"
    try:
        return TransformersBlocks(config), f"transformers {importlib.metadata.version('transformers')}'s GPT2Model"
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return PlainBlocks(config), f"PyTorch's TransformerEncoderLayer (transformers: {trainer.first_line(error)})"
