"""The frozen modules of IndexTTS2 that turn sound into what its GPT reads, under the names of the released files.

All work on one recording, without a batch dimension: padding would change the results. T rows are 50 a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FRAME, HOP, FFT = 400, 160, 512  # samples at 16 kHz
MEL_BINS = 80
HEAD = 64  # width of a perceiver's head


# ---------------------------------------------------------------------------------------------------------------------
# Filter bank (Kaldi's), and the rows that w2v-BERT reads


def mel_filters() -> Tensor:
    """[257, 80], float64: triangles that are even in mel, from 20 to 8,000 Hz."""
    def to_mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hertz / 700)

    low, high = (float(to_mel(torch.tensor(hertz, dtype=torch.float64))) for hertz in (20.0, 8000.0))
    corners = torch.linspace(low, high, MEL_BINS + 2, dtype=torch.float64)
    places = to_mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * 16000 / FFT)[:, None]
    rising = (places - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - places) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)


def frame_count(samples: int) -> int:
    return max(0, 1 + (samples - FRAME) // HOP)


def code_count(samples: int) -> int:
    """Codes of a recording at 16 kHz: two frames each, and none of padding."""
    return frame_count(samples) // 2


def filter_bank(audio: Tensor, scale: float = 2**15) -> Tensor:
    """Mono [samples] within -1 to 1 at 16 kHz -> log-mel [frames, 80] as Kaldi makes it, float32."""
    frames = audio.mul(scale).double().unfold(0, FRAME, HOP)
    frames = frames - frames.mean(1, keepdim=True)
    frames = torch.cat([frames[:, :1] * (1 - 0.97), frames[:, 1:] - 0.97 * frames[:, :-1]], 1)
    frames = frames * torch.hann_window(FRAME, periodic=False, dtype=torch.float64).pow(0.85)
    spectrum = torch.fft.rfft(frames, FFT).to(torch.complex64)  # as transformers' extractor keeps it
    power = spectrum.to(torch.complex128).abs().square()
    return (power @ mel_filters()).clamp_min(1.192092955078125e-07).log().float()


def rows_of(audio: Tensor, padding: float) -> tuple[Tensor, Tensor]:
    """Mono [samples] -> rows [T, 160] of two frames, each bin normalised over the recording, and which are whole [T].

    An odd last frame is paired with `padding`, and its row is not whole. Equal to the last bit to what transformers'
    extractor makes, hence numpy with time as its contiguous axis, which it sums in another order than others.
    """
    mel = filter_bank(audio).T.contiguous().numpy().T
    mel = (mel - mel.mean(0)) / np.sqrt(mel.var(0, ddof=1) + 1e-7)
    whole = torch.arange(math.ceil(len(mel) / 2)) < len(mel) // 2
    padded = np.concatenate([mel, np.full((len(mel) % 2, MEL_BINS), padding, np.float32)])
    return torch.from_numpy(padded.reshape(-1, 2 * MEL_BINS)), whole


# ---------------------------------------------------------------------------------------------------------------------
# Semantic codec (RepCodec of MaskGCT): features to codes


class ConvNeXtBlock(nn.Module):
    """[1, C, T] -> [1, C, T]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).transpose(1, 2))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).transpose(1, 2)


class CodecBackbone(nn.Module):
    """[1, C, T] -> [1, T, width]."""

    def __init__(self, channels: int, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(channels, width, 7, padding=3)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXtBlock(width, inner) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        return self.final_layer_norm(x.transpose(1, 2))


class CodeProjection(nn.Module):
    """A weight-normalised pointwise convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(width, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(width, channels, 1))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(1, 2), keepdim=True)
        return F.linear(x, weight[:, :, 0], self.bias)


class SemanticCodec(nn.Module):
    """features [T, channels] -> codes [T], int64: encoder and quantizer, whose decoder nobody needs here.

    Cut from the files of MaskGCT; DECODER are the beginnings of names that are left out.
    """

    DECODER: tuple[str, ...] = ("decoder.", "quantizer.quantizers.0.out_project.")

    def __init__(self, section: Mapping[str, Any]) -> None:
        """`section` is semantic_codec: of config.yaml. Raises: KeyError."""
        super().__init__()
        channels, width = section["hidden_size"], section["vocos_dim"]
        self.encoder = nn.Sequential(
            CodecBackbone(channels, width, section["vocos_intermediate_dim"], section["vocos_num_layers"]),
            nn.Linear(width, channels))
        quantizer = nn.ModuleDict({"in_project": CodeProjection(channels, section["codebook_dim"]),
                                   "codebook": nn.Embedding(section["codebook_size"], section["codebook_dim"])})
        self.quantizer = nn.ModuleDict({"quantizers": nn.ModuleList([quantizer])})

    def forward(self, features: Tensor) -> Tensor:
        quantizer: Any = self.quantizer["quantizers"][0]  # type: ignore[index]
        vectors = quantizer["in_project"](self.encoder(features.T[None])[0])
        return (F.normalize(vectors) @ F.normalize(quantizer["codebook"].weight).T).argmax(1)


class EnhancedCodec(SemanticCodec):
    """IndexTTS-2.5's: features [T, channels] -> codes [ceil(T / 2)], int64."""

    DECODER = (*SemanticCodec.DECODER, "up.")

    def __init__(self, section: Mapping[str, Any]) -> None:
        super().__init__(section)
        self.down = nn.Conv1d(section["hidden_size"], section["hidden_size"], 3, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.gelu(self.down(features.T[None]))[0].T)


# ---------------------------------------------------------------------------------------------------------------------
# CAM++: the speaker vector of IndexTTS-2.5. Tensors keep their batch dimension of 1: [1, channels, (bins,) time]

SPEAKER_VALUES = 192
SEGMENT = 100  # rows over which a layer looks around


class Normed(nn.Sequential):
    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.add_module("batchnorm", nn.BatchNorm1d(channels, affine=affine))


class SpeakerBlock(nn.Module):
    """Residual, over bins and time; halves the bins where it has a shortcut."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, (stride, 1), 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1, (stride, 1), bias=False), nn.BatchNorm2d(width)
                                      ) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SpeakerHead(nn.Module):
    """[1, 80, T] -> [1, 320, T]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(SpeakerBlock(width, 2), SpeakerBlock(width, 1))
        self.layer2 = nn.Sequential(SpeakerBlock(width, 2), SpeakerBlock(width, 1))
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, (2, 1), 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x[:, None])))))
        return F.relu(self.bn2(self.conv2(x))).flatten(1, 2)


class ContextMask(nn.Module):
    """[1, 128, T] -> [1, 32, T], scaled by what the whole and the segment around are like."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1, self.linear2 = nn.Conv1d(channels, channels // 2, 1), nn.Conv1d(channels // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        segments = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True).repeat_interleave(SEGMENT, -1)
        context = x.mean(-1, keepdim=True) + segments[..., : x.shape[-1]]
        return self.linear_local(x) * self.linear2(F.relu(self.linear1(context))).sigmoid()


class SpeakerLayer(nn.Module):
    """[1, channels, T] -> [1, channels + 32, T]."""

    def __init__(self, channels: int, growth: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1, self.linear1 = Normed(channels), nn.Conv1d(channels, 4 * growth, 1, bias=False)
        self.nonlinear2, self.cam_layer = Normed(4 * growth), ContextMask(4 * growth, growth, dilation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear1(F.relu(self.nonlinear1(x)))
        return torch.cat([x, self.cam_layer(F.relu(self.nonlinear2(y)))], 1)


class Projection(nn.Module):
    """A pointwise convolution, or of `size` and `stride`, and a norm before it (`first`) or behind it."""

    def __init__(self, channels: int, width: int, size: int = 1, stride: int = 1, first: bool = False,
                 affine: bool = True) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, width, size, stride, size // 2, bias=False)
        self.nonlinear, self.first = Normed(channels if first else width, affine), first

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.nonlinear(x))) if self.first else self.nonlinear(self.linear(x))


class CAMPlusPlus(nn.Module):
    """Sound -> speaker vector [192]."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.xvector, growth, width = SpeakerHead(), nn.Sequential(), 32, 128
        self.xvector.add_module("tdnn", Projection(320, width, 5, 2))
        for number, (layers, dilation) in enumerate(((12, 1), (24, 2), (16, 2)), 1):
            block = nn.Sequential()
            for index in range(layers):
                block.add_module(f"tdnnd{index + 1}", SpeakerLayer(width + index * growth, growth, dilation))
            width += layers * growth
            self.xvector.add_module(f"block{number}", block)
            self.xvector.add_module(f"transit{number}", Projection(width, width // 2, first=True))
            width //= 2
        self.xvector.add_module("out_nonlinear", Normed(width))
        self.xvector.add_module("dense", Projection(2 * width, SPEAKER_VALUES, affine=False))

    def forward(self, audio: Tensor) -> Tensor:
        """Mono [samples] within -1 to 1 at 16 kHz; at least 3 frames."""
        mel = filter_bank(audio.cpu(), 1.0).to(audio.device)
        parts: Any = self.xvector
        x = F.relu(parts.tdnn(self.head((mel - mel.mean(0)).T[None])))
        for number in (1, 2, 3):
            x = parts.get_submodule(f"transit{number}")(parts.get_submodule(f"block{number}")(x))
        x = F.relu(parts.out_nonlinear(x))
        return parts.dense(torch.cat([x.mean(-1), x.std(-1)], -1)[..., None])[0, :, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Conditioning modules of gpt.pth: features to condition and emo_vec


class Places(nn.Module):
    """The table of positions, which is saved with the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", torch.empty(1, 5000, width))


class Subsampling(nn.Module):
    """features [T, channels] -> rows [(T - 1) // 2, width] and their positions, of the same shape."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, width, 3, 2), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(width * ((channels - 1) // 2), width))
        self.pos_enc = Places(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.out(self.conv(x[None, None])[0].transpose(0, 1).flatten(1))  # (channel, bin) of each row
        return x * math.sqrt(x.shape[1]), self.pos_enc.pe[0, : len(x)]  # type: ignore[index]


class RelativeAttention(nn.Module):
    """Self-attention whose scores add the key's position, [T, width] -> [T, width]. It is not shifted to a relative
    one: so the released weights were trained."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(width, width) for _ in range(4))
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.empty(heads, width // heads)) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v, p = (part.view(len(x), self.heads, -1).transpose(0, 1) for part in (
            self.linear_q(x), self.linear_k(x), self.linear_v(x), self.linear_pos(places)))
        scores = (q + self.pos_bias_u[:, None]) @ k.mT + (q + self.pos_bias_v[:, None]) @ p.mT
        mixed = (scores / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.linear_out(mixed.transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class ConvolutionModule(nn.Module):
    """[T, width] -> [T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise_conv = nn.Conv1d(width, width, 15, padding=7, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise_conv(F.glu(self.pointwise_conv1(x.T[None]), 1))[0]
        return self.pointwise_conv2(F.silu(self.norm(y.T)).T[None])[0].T


class ConformerBlock(nn.Module):
    """[T, width] -> [T, width]."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.feed_forward = RelativeAttention(width, heads), FeedForward(width, inner)
        self.conv_module = ConvolutionModule(width)
        self.norm_ff, self.norm_mha, self.norm_conv, self.norm_final = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), places)
        x = x + self.conv_module(self.norm_conv(x))
        return self.norm_final(x + self.feed_forward(self.norm_ff(x)))


class Conformer(nn.Module):
    """features [T, channels] -> [(T - 1) // 2, width]."""

    def __init__(self, channels: int, section: Mapping[str, Any]) -> None:
        """`section` is condition_module: or emo_condition_module: of config.yaml. Raises: KeyError."""
        super().__init__()
        width = section["output_size"]
        self.embed = Subsampling(channels, width)
        self.after_norm = nn.LayerNorm(width)
        self.encoders = nn.ModuleList(ConformerBlock(width, section["linear_units"], section["attention_heads"])
                                      for _ in range(section["num_blocks"]))

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.embed(x)
        for block in self.encoders:
            x = block(x, places)
        return self.after_norm(x)


class LatentAttention(nn.Module):
    """Latents [n, width] look at themselves and at the context [T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, HEAD * heads, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD * heads, bias=False)
        self.to_out = nn.Linear(HEAD * heads, width, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        parts = self.to_q(latents), *self.to_kv(torch.cat([latents, context])).chunk(2, -1)
        q, k, v = (part.view(len(part), self.heads, HEAD).transpose(0, 1) for part in parts)
        mixed = (q @ k.mT / math.sqrt(HEAD)).softmax(-1) @ v
        return self.to_out(mixed.transpose(0, 1).flatten(1))


class GatedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) * self.gamma


class Perceiver(nn.Module):
    """context [T, O] -> latents [n, width]."""

    def __init__(self, width: int, latents: int, section: Mapping[str, Any]) -> None:
        super().__init__()
        context, heads = section["output_size"], section["attention_heads"]
        inner = int(width * section["perceiver_mult"] * 2 / 3)
        self.proj_context = nn.Linear(context, width) if context != width else nn.Identity()
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([LatentAttention(width, heads), nn.Sequential(
                nn.Linear(width, 2 * inner), GatedGELU(), nn.Linear(inner, width))]) for _ in range(2))
        self.norm = RMSNorm(width)

    def forward(self, context: Tensor) -> Tensor:
        context, latents = self.proj_context(context), self.latents
        layer: Any
        for layer in self.layers:
            latents = layer[0](latents, context) + latents
            latents = layer[1](latents) + latents
        return self.norm(latents)


class VoiceModules(nn.Module):
    """Those of gpt.pth that the training loss never touches."""

    def __init__(self, gpt: Mapping[str, Any], channels: int, emo_width: int, conditions: bool = True) -> None:
        """`gpt` is the section of config.yaml; `channels` those of the features, `emo_width` that of the emotion's
        latent (1,024). IndexTTS-2.5 has no modules for `conditions`. Raises: KeyError."""
        super().__init__()
        width, of_emotion = gpt["model_dim"], gpt["emo_condition_module"]
        if conditions:
            self.conditioning_encoder = Conformer(channels, gpt["condition_module"])
            self.perceiver_encoder = Perceiver(width, 32, gpt["condition_module"])
        self.emo_conditioning_encoder = Conformer(channels, of_emotion)
        self.emo_perceiver_encoder = Perceiver(emo_width, 1, of_emotion)
        self.emo_layer, self.emovec_layer = nn.Linear(width, width), nn.Linear(emo_width, width)

    def condition(self, features: Tensor) -> Tensor:
        """[T, channels] -> [32, model_dim]."""
        return self.perceiver_encoder(self.conditioning_encoder(features))

    def emo_vec(self, features: Tensor) -> Tensor:
        """[T, channels] -> [model_dim]."""
        latent = self.emo_perceiver_encoder(self.emo_conditioning_encoder(features))[0]
        return self.emo_layer(self.emovec_layer(latent))
