"""A model folder like the released IndexTTS-2: its names, layouts and kinds of files, tiny and with random weights."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import yaml
from conftest import trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.indextts2_modules import CAMPlusPlus, EnhancedCodec, SemanticCodec, VoiceModules
from tools.model_folder import PARTS, TIKTOKEN

CHANNELS = 24  # of features; 1,024 in the released ones
EMO_WIDTH = 20  # 1,024 too
CONFIG: dict[str, Any] = {
    "dataset": {"bpe_model": "bpe.model", "sample_rate": 24000, "squeeze": False},
    "gpt": {
        "model_dim": 32, "max_mel_tokens": 120, "max_text_tokens": 60, "heads": 2, "use_mel_codes_as_input": True,
        "mel_length_compression": 1024, "layers": 2, "number_text_tokens": 40, "number_mel_codes": 8194,
        "start_mel_token": 8192, "stop_mel_token": 8193, "start_text_token": 0, "stop_text_token": 1,
        "train_solo_embeddings": False, "condition_type": "conformer_perceiver",
        "condition_module": {"output_size": 16, "linear_units": 24, "attention_heads": 2, "num_blocks": 2,
                             "input_layer": "conv2d2", "perceiver_mult": 2},
        "emo_condition_module": {"output_size": 12, "linear_units": 16, "attention_heads": 1, "num_blocks": 1,
                                 "input_layer": "conv2d2", "perceiver_mult": 2},
    },
    "semantic_codec": {"codebook_size": 8192, "hidden_size": CHANNELS, "codebook_dim": 8, "vocos_dim": 16,
                       "vocos_intermediate_dim": 32, "vocos_num_layers": 2},
    "s2mel": {"preprocess_params": {"sr": 22050}},
    "gpt_checkpoint": "gpt.pth", "w2v_stat": "wav2vec2bert_stats.pt", "s2mel_checkpoint": "s2mel.pth",
    "emo_matrix": "feat2.pt", "spk_matrix": "feat1.pt", "emo_num": [3, 17, 2, 8, 4, 5, 10, 24],
    "qwen_emo_path": "qwen0.6bemo4-merge/",
    "vocoder": {"type": "bigvgan", "name": "nvidia/bigvgan_v2_22khz_80band_256x"}, "version": 2.0,
}
W2V_BERT: dict[str, Any] = {
    "architectures": ["Wav2Vec2BertModel"], "model_type": "wav2vec2-bert", "hidden_size": CHANNELS,
    "num_hidden_layers": 19, "num_attention_heads": 2, "intermediate_size": 32, "feature_projection_input_dim": 160,
    "conv_depthwise_kernel_size": 5, "left_max_position_embeddings": 6, "right_max_position_embeddings": 2,
    "position_embeddings_type": "relative_key", "hidden_act": "swish", "add_adapter": False, "vocab_size": None,
    "output_hidden_size": CHANNELS,
}
EXTRACTOR = {"feature_extractor_type": "SeamlessM4TFeatureExtractor", "feature_size": 80, "num_mel_bins": 80,
             "padding_side": "right", "padding_value": 1, "return_attention_mask": True, "sampling_rate": 16000,
             "stride": 2}


TOKENS_25 = (" ሰላም", "ላም", " ")  # beside the bytes
CONFIG_25: dict[str, Any] = {
    **{key: value for key, value in CONFIG.items() if key != "qwen_emo_path"},
    "gpt": {**{key: value for key, value in CONFIG["gpt"].items() if key != "condition_module"},
            "max_text_tokens": 400, "number_text_tokens": 256 + len(TOKENS_25) - 1 + trainer.TIKTOKEN_SPECIALS},
    "version": 2.5,
}


def randomised(shapes: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Values of about the size that trained ones have: norms near 1, weights by their fan-in."""
    values = {}
    for name, tensor in shapes.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name.lower() and name.endswith(("weight", "gamma")):
            values[name] = 1 + 0.1 * noise
        elif name.endswith("num_batches_tracked"):
            values[name] = torch.tensor(1)
        elif name.endswith("running_var"):
            values[name] = noise.abs() + 0.5
        elif name.endswith(("weight_g", "gamma")):
            values[name] = noise.abs() + 0.1
        elif tensor.ndim < 2:
            values[name] = 0.1 * noise
        else:
            values[name] = noise / tensor[0].numel() ** 0.5
    return values


def shapes_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def gpt_tensors(config: Mapping[str, Any], emo_width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Everything that gpt.pth has, in its order."""
    channels, gpt = config["semantic_codec"]["hidden_size"], config["gpt"]
    model = trainer.UnifiedVoiceGPT(trainer.model_config_from(gpt, "config.yaml"), 0.0, False)
    with torch.device("meta"):
        voice = VoiceModules(gpt, channels, emo_width)
    return trainer.in_name_order(randomised({**shapes_of(voice), **shapes_of(model)}, generator))


def codec_tensors(section: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Encoder and quantizer, and the decoder that features do not need."""
    with torch.device("meta"):
        shapes = shapes_of(SemanticCodec(section))
    return randomised({**shapes, **decoder_shapes(section)}, generator)


def decoder_shapes(section: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a semantic codec, beside encoder and quantizer."""
    with torch.device("meta"):
        shapes = shapes_of(SemanticCodec(section))
    decoder = {f"decoder.{name.removeprefix('encoder.')}": t for name, t in shapes.items() if name.startswith("enc")}
    width, dim = section["hidden_size"], section["codebook_dim"]
    out = {"weight_g": torch.empty(width, 1, 1), "weight_v": torch.empty(width, dim, 1), "bias": torch.empty(width)}
    return {**decoder, **{f"quantizer.quantizers.0.out_project.{name}": t for name, t in out.items()}}


def w2v_bert_tensors(settings: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    with torch.device("meta"):
        shapes = shapes_of(Wav2Vec2BertModel(Wav2Vec2BertConfig(**settings)))
    return randomised(shapes, generator)


def train_bpe(path: Path) -> None:
    """A tokenizer as the released one: upper-case Latin, ids 0, 1 and 2 for <s>, </s> and <unk>."""
    words = ["HELLO WORLD", "A SMALL HOUSE NEAR THE RIVER", "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG", "SING, VOICE."]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 9), model_writer=model, vocab_size=CONFIG["gpt"]["number_text_tokens"],
        model_type="bpe", bos_id=0, eos_id=1, unk_id=2, pad_id=-1, minloglevel=2)
    path.write_bytes(model.getvalue())


def make_released_folder(folder: Path, seed: int = 0, config: Mapping[str, Any] = CONFIG,
                         w2v_bert: Mapping[str, Any] = W2V_BERT, emo_width: int = EMO_WIDTH) -> Path:
    """Everything that features need, where IndexTTS2 keeps it today; and the small matrices."""
    generator = torch.Generator().manual_seed(seed)
    cache = folder / "hf_cache"
    (cache / "w2v-bert-2.0").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    train_bpe(folder / "bpe.model")
    torch.save(gpt_tensors(config, emo_width, generator), folder / "gpt.pth")
    channels = config["semantic_codec"]["hidden_size"]
    torch.save({"mean": 0.1 * torch.randn(channels, generator=generator),
                "var": torch.rand(channels, generator=generator) + 0.5}, folder / "wav2vec2bert_stats.pt")
    save_file(codec_tensors(config["semantic_codec"], generator), cache / "semantic_codec_model.safetensors")
    save_file(w2v_bert_tensors(w2v_bert, generator), cache / "w2v-bert-2.0/model.safetensors")
    (cache / "w2v-bert-2.0/config.json").write_text(json.dumps(dict(w2v_bert)))
    (cache / "w2v-bert-2.0/preprocessor_config.json").write_text(json.dumps(EXTRACTOR))
    torch.save(torch.randn(73, 192, generator=generator), folder / "feat1.pt")
    torch.save(torch.randn(73, config["gpt"]["model_dim"], generator=generator), folder / "feat2.pt")
    return folder


def make_released_folder_25(folder: Path, seed: int = 0, emo_width: int = EMO_WIDTH) -> Path:
    """The same of IndexTTS-2.5."""
    make_released_folder(folder, seed)
    for name in ("bpe.model", "hf_cache/semantic_codec_model.safetensors"):
        (folder / name).unlink()
    generator, gpt, section = torch.Generator().manual_seed(seed), CONFIG_25["gpt"], CONFIG_25["semantic_codec"]
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG_25, sort_keys=False))
    languages = {"languages": len(trainer.LANGUAGES) + 1}
    model = trainer.UnifiedVoiceGPT(trainer.model_config_from({**languages, **gpt}, "config.yaml"), 0.0, False)
    with torch.device("meta"):
        voice, codec, speaker = VoiceModules(gpt, CHANNELS, emo_width, False), EnhancedCodec(section), CAMPlusPlus()
    tensors = randomised({**shapes_of(voice), **shapes_of(model)}, generator)
    torch.save(trainer.in_name_order(tensors), folder / "gpt.pth")
    up = {f"up.{name}": t for name, t in shapes_of(codec.down).items()}
    decoder = randomised(decoder_shapes(section), torch.Generator().manual_seed(seed))
    torch.save({"model": {**randomised({**shapes_of(codec), **up}, generator), **decoder}}, folder / "codec.pth")
    torch.save(randomised(shapes_of(speaker), generator), folder / "hf_cache/campplus_cn_common.bin")
    tokens = dict.fromkeys([b"!", *(bytes([byte]) for byte in range(256)), *(word.encode() for word in TOKENS_25)])
    (folder / TIKTOKEN).write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank
                                             for rank, token in enumerate(tokens)))
    return folder


def move_to_cache(folder: Path, cache: Path, revision: str = "0123abc") -> None:
    """Puts the models of other makers where `hf download` puts them: models--OWNER--NAME/snapshots/REVISION/."""
    for name in ("w2v_bert", "semantic_codec"):
        part = PARTS[name]
        repository = cache / f"models--{part.repository.replace('/', '--')}"
        target = repository / "snapshots" / revision / part.files[0]
        target = target if len(part.files) == 1 else target.parent
        target.parent.mkdir(parents=True)
        shutil.move(folder / part.place, target)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(revision)
