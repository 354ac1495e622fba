"""Files of random weights, of the sizes that were released, for what makes IndexTTS2's features: their speed depends on
shapes alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tools.indextts2_modules import SemanticCodec, VoiceModules

EXTRACTOR = {"feature_size": 80, "num_mel_bins": 80, "padding_value": 1, "sampling_rate": 16000, "stride": 2}


@dataclass(frozen=True)
class ReleasedSizes:
    """w2v-BERT 2.0 as far as it is used, the conditioning modules of gpt.pth, MaskGCT's semantic codec."""

    hidden: int = 1024
    layers: int = 17
    heads: int = 16
    wide: int = 4096  # inner width of w2v-BERT's layers
    width: int = 512  # of the conformers
    blocks: int = 6
    codec: int = 384
    model_dim: int = 1280  # of the GPT

    @property
    def w2v_bert(self) -> dict[str, Any]:
        return {"model_type": "wav2vec2-bert", "hidden_size": self.hidden, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "intermediate_size": self.wide, "output_hidden_size": self.hidden,
                "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 31, "hidden_act": "swish",
                "left_max_position_embeddings": 64, "right_max_position_embeddings": 8,
                "position_embeddings_type": "relative_key", "add_adapter": False, "vocab_size": None}

    @property
    def config(self) -> dict[str, Any]:
        module = {"output_size": self.width, "input_layer": "conv2d2", "perceiver_mult": 2}
        return {
            "gpt": {"model_dim": self.model_dim, "condition_type": "conformer_perceiver",
                    "condition_module": {**module, "linear_units": 4 * self.width, "attention_heads": 8,
                                         "num_blocks": self.blocks},
                    "emo_condition_module": {**module, "linear_units": 2 * self.width, "attention_heads": 4,
                                             "num_blocks": -(-2 * self.blocks // 3)}},
            "semantic_codec": {"codebook_size": 8192, "hidden_size": self.hidden, "codebook_dim": 8,
                               "vocos_dim": self.codec, "vocos_intermediate_dim": 2048, "vocos_num_layers": 12}}


def random_values(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Small ones, and such as variances may have."""
    return {name: (0.02 * torch.randn(t.shape, generator=generator)).abs_() if name.endswith(("running_var", "_g"))
            else torch.ones(t.shape, dtype=t.dtype) if not t.is_floating_point() or "norm" in name
            else 0.02 * torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}


def make_parts(folder: Path, sizes: ReleasedSizes) -> dict[str, Path]:
    """The files that tools.indextts2_features.IndexTTS2Features takes, by part; 1.7 GB of them."""
    from safetensors.torch import save_file
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    names = {"config": "config.yaml", "gpt": "gpt.pth", "w2v_bert_stats": "stats.pt", "w2v_bert": "w2v_bert",
             "semantic_codec": "codec.safetensors"}
    parts = {name: folder / file for name, file in names.items()}
    parts["w2v_bert"].mkdir(parents=True)
    generator, config = torch.Generator().manual_seed(0), sizes.config
    with torch.device("meta"):
        w2v_bert = Wav2Vec2BertModel(Wav2Vec2BertConfig(**sizes.w2v_bert))
        codec, voice = SemanticCodec(config["semantic_codec"]), VoiceModules(config["gpt"], sizes.hidden, sizes.hidden)
    parts["config"].write_text(yaml.safe_dump(config))
    torch.save(random_values(voice, generator), parts["gpt"])
    torch.save({"mean": torch.zeros(sizes.hidden), "var": torch.ones(sizes.hidden)}, parts["w2v_bert_stats"])
    save_file(random_values(codec, generator), parts["semantic_codec"])
    save_file(random_values(w2v_bert, generator), parts["w2v_bert"] / "model.safetensors")
    for name, content in (("config", sizes.w2v_bert), ("preprocessor_config", EXTRACTOR)):
        (parts["w2v_bert"] / f"{name}.json").write_text(json.dumps(content))
    return parts
