"""What speaks in a folder like the released ones: s2mel, CAM++ and BigVGAN, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from released_folder import CHANNELS, CONFIG, randomised, shapes_of
from torch import nn

from tools.indextts2_sound import latent_layers, length_regulator, namespaced, package_modules

SPECTRUM = {"n_fft": 1024, "win_length": 1024, "hop_length": 256, "n_mels": 80, "fmin": 0, "fmax": "None"}
S2MEL: dict[str, Any] = {
    "preprocess_params": {"sr": 22050, "spect_params": SPECTRUM}, "dit_type": "DiT", "reg_loss_type": "l1",
    "style_encoder": {"dim": 192},
    "length_regulator": {"channels": 16, "is_discrete": False, "in_channels": CHANNELS, "content_codebook_size": 8,
                         "sampling_ratios": [1, 1, 1, 1], "vector_quantize": False, "n_codebooks": 1,
                         "quantizer_dropout": 0.0, "f0_condition": False, "n_f0_bins": 512},
    "DiT": {"hidden_dim": 16, "num_heads": 2, "depth": 3, "class_dropout_prob": 0.1, "block_size": 8192,
            "in_channels": 80, "style_condition": True, "final_layer_type": "wavenet", "target": "mel",
            "content_dim": 16, "content_codebook_size": 8, "content_type": "discrete", "f0_condition": False,
            "n_f0_bins": 512, "content_codebooks": 1, "is_causal": False, "long_skip_connection": True,
            "zero_prompt_speech_token": False, "time_as_token": False, "style_as_token": False,
            "uvit_skip_connection": True, "add_resblock_in_transformer": False},
    "wavenet": {"hidden_dim": 16, "num_layers": 2, "kernel_size": 5, "dilation_rate": 1, "p_dropout": 0.2,
                "style_condition": True},
}
BIGVGAN: dict[str, Any] = {
    "resblock": "1", "upsample_rates": [4, 4, 2, 2, 2, 2], "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
    "upsample_initial_channel": 64, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
    "use_tanh_at_final": False, "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True,
    "n_fft": 1024, "num_mels": 80, "hop_size": 256, "win_size": 1024, "sampling_rate": 22050, "fmin": 0, "fmax": None,
}


def add_sound(folder: Path, seed: int = 1) -> Path:
    """Adds to a folder of released_folder what IndexTTS2, or IndexTTS-2.5, speaks with. Tensors of both have the names
    of IndexTTS2's package, whose modules have weight norm."""
    package, generator = package_modules("indextts2"), torch.Generator().manual_seed(seed)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    args, dim = namespaced(S2MEL), CONFIG["gpt"]["model_dim"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bigvgan = package.BigVGAN(package.AttrDict(BIGVGAN), use_cuda_kernel=False)
    modules: dict[str, nn.Module] = {"cfm": package.CFM(args),
                                     "length_regulator": length_regulator(package, args.length_regulator)}
    if config["version"] < 2.5:
        sizes = {"0.weight": torch.empty(8, dim), "1.weight": torch.empty(8, 8), "2.weight": torch.empty(CHANNELS, 8)}
        modules["gpt_layer"] = latent_layers(sizes)
        campplus = trained_like(package.CAMPPlus(feat_dim=80, embedding_size=192), generator)
        torch.save(campplus, folder / "hf_cache/campplus_cn_common.bin")
    torch.save({"net": {name: trained_like(module, generator) for name, module in modules.items()}},
               folder / "s2mel.pth")
    (folder / "hf_cache/bigvgan").mkdir()
    torch.save({"generator": bigvgan.state_dict()}, folder / "hf_cache/bigvgan/bigvgan_generator.pt")
    (folder / "hf_cache/bigvgan/config.json").write_text(json.dumps(BIGVGAN))
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "s2mel": S2MEL}, sort_keys=False))
    return folder


def trained_like(module: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random parameters; buffers (positions, running means) as the module makes them."""
    parameters = dict(module.named_parameters())
    return {**shapes_of(module), **randomised({name: p.detach() for name, p in parameters.items()}, generator)}
