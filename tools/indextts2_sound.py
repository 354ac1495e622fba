"""IndexTTS2's sound of codes: s2mel makes a mel spectrogram of codes and the GPT's latents in the prompt's voice, and
BigVGAN makes sound of that. Beside it IndexTTS-2.5's, which reads no latents: codes become features by the decoder of
its codec, twice as many, and the prompt's own features stand before them.

The modules are those of the packages indextts2-inference and indextts25-inference (requirements-indextts.txt), taken
one by one: their front ends do not read Amharic. They are filled from the files of the released folder, with every
weight that they have; nothing is downloaded. The prompt's features are ours (tools.indextts2_features).
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn

from tools._common import Progress, ToolError, info, sha256_of
from tools.codes_to_sound import Prompt, long_enough
from tools.indextts2_features import (
    NAMES,
    PROMPT_SAMPLES,
    SAMPLE_RATE,
    IndexTTS2Features,
    choose_device,
    conditioning_digest,
    conditioning_of,
    own_remedy,
    read_tensors,
    reason_of,
    require_indextts2,
    section_of,
    unreadable,
)
from tools.indextts2_modules import HOP, CodeProjection
from tools.made_with import INDEXTTS2, INDEXTTS25, read_yaml, recorded
from tools.model_folder import PARTS, find_parts, parts_of
from tools.sound_files import load_recording
from trainers.train_gpt_v2 import ModelConfig

PACKAGES = {INDEXTTS2: "indextts", INDEXTTS25: "indextts25"}
MODULES = {"mel_spectrogram": "s2mel.modules.audio", "BigVGAN": "s2mel.modules.bigvgan.bigvgan",
           "AttrDict": "s2mel.modules.bigvgan.env", "CAMPPlus": "s2mel.modules.campplus.DTDNN",
           "CFM": "s2mel.modules.flow_matching", "InterpolateRegulator": "s2mel.modules.length_regulator"}
FRAMES_PER_ROW = 1.72  # frames of mel for a row of features, as IndexTTS2's inference counts them
STEPS, GUIDANCE = 25, 0.7  # of flow matching, likewise
LONGEST_MEL = 8192  # frames of prompt and line together
SPEAKER = 192  # values of CAM++
COMPUTED = (".freqs", ".input_pos")  # buffers that are not read from files


def package_modules(name: str) -> SimpleNamespace:
    """The modules that are used of the package of IndexTTS2 or 2.5. Raises: ToolError where it, or what it needs, is
    not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    places = {**MODULES, "EnhancedCodec": "codec.models"} if name == INDEXTTS25 else MODULES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports; it would silence others for good
            return SimpleNamespace(**{kind: getattr(importlib.import_module(f"{PACKAGES[name]}.{place}"), kind)
                                      for kind, place in places.items()})
    except ImportError as error:
        raise ToolError(f"--model-dir: {NAMES[name]}'s sound is made by packages that are not installed ({error}). "
                        "Install them with `pip install -r requirements-indextts.txt`") from error


# ---------------------------------------------------------------------------------------------------------------------
# Files to modules


def namespaced(value: Any) -> Any:
    """Sections of YAML with attributes for keys, as the package reads them."""
    if isinstance(value, Mapping):
        return SimpleNamespace(**{str(key): namespaced(item) for key, item in value.items()})
    return value


def nested_tensors(path: Path, *keys: str) -> dict[str, Tensor]:
    """Tensors of a PyTorch file, under keys of keys. Raises: ToolError."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise unreadable(path, reason_of(error)) from error
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise unreadable(path, f"it holds no tensors under {'.'.join(keys)}" if keys else "it holds no tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With every pair of weight_g and weight_v as the weight that they stand for."""
    plain = {name: t for name, t in tensors.items() if not name.endswith(("weight_g", "weight_v"))}
    for name in (name for name in tensors if name.endswith("weight_v") and f"{name[:-1]}g" in tensors):
        direction, size = tensors[name], tensors[f"{name[:-1]}g"]
        plain[name[:-2]] = direction * (size / direction.flatten(1).norm(dim=1).view(size.shape))
    return plain


def filled(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], path: Path, config: Path, what: str
           ) -> nn.Module:
    """A module of the package, ready for use. Raises: ToolError where `config` describes none, or `path` another."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's weight norm is an old one
            module = build()
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError,
            AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolError(f"{config}: no {what} can be made by it ({reason}). Take the released file") from error
    shapes = {name: t.shape for name, t in module.state_dict().items() if not name.endswith(COMPUTED)}
    missing = [name for name in shapes if name not in tensors]
    differing = [f"{name} is {list(tensors[name].shape)}, not {list(shape)}" for name, shape in shapes.items()
                 if name in tensors and tensors[name].shape != shape]
    infinite = [name for name in shapes if not missing and not differing and not tensors[name].isfinite().all()]
    problems = [f"{len(names)} tensors {said}, the first: {names[0]}" for said, names in (
        ("are missing", missing), ("have another shape", differing), ("hold values that are not finite", infinite))
        if names]
    if problems:
        raise ToolError(f"{path}: not the {what} that {config} describes: {'; '.join(problems)}. Download it again")
    module.load_state_dict({name: tensors[name].to(t.dtype) for name, t in module.state_dict().items()
                            if name in shapes}, strict=False)
    return module.eval().requires_grad_(False)


def length_regulator(package: SimpleNamespace, section: SimpleNamespace) -> nn.Module:
    """By s2mel.length_regulator of config.yaml, what it leaves out as in IndexTTS2."""
    optional = {"in_channels": None, "vector_quantize": False, "n_codebooks": 1, "quantizer_dropout": 0.0,
                "f0_condition": False, "n_f0_bins": 512}
    return package.InterpolateRegulator(
        channels=section.channels, sampling_ratios=section.sampling_ratios, is_discrete=section.is_discrete,
        codebook_size=section.content_codebook_size,
        **{name: getattr(section, name, default) for name, default in optional.items()})


def latent_layers(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """s2mel's gpt_layer: linear layers of the sizes that the file has."""
    weights = [tensors[f"{i}.weight"] for i in range(3)]
    return nn.Sequential(*(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights))


def vocoder(build: Callable[[Any], nn.Module], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """BigVGAN as `build` makes it of its settings, without weight norm, and these. Raises: ToolError."""
    config, path = folder / "config.json", folder / "bigvgan_generator.pt"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(config, " ".join(str(error).split())[:200]) from error
    return filled(lambda: build(settings), folded(nested_tensors(path, "generator")), path, config, "BigVGAN"), settings


# ---------------------------------------------------------------------------------------------------------------------
# Sound


def flow(estimator: nn.Module, noise: Tensor, prompt_mel: Tensor, content: Tensor, style: Tensor) -> Tensor:
    """From noise [1, n_mels, T] to a mel, in STEPS equal steps along the estimator's direction, which GUIDANCE leads
    away from what it would be without a voice. The first P frames are given, prompt_mel [1, n_mels, P].

    content [1, T, channels], style [1, SPEAKER]. What is made of the first P frames means nothing.
    """
    known = prompt_mel.shape[2]
    beginning = torch.zeros_like(noise)
    beginning[:, :, :known] = prompt_mel
    given = [torch.cat([part, torch.zeros_like(part)]) for part in (beginning, style, content)]
    x, length = noise.clone(), torch.tensor([noise.shape[2]], device=noise.device)
    times = torch.linspace(0, 1, STEPS + 1, device=noise.device)
    time = times[0]
    for step in range(STEPS):
        x[:, :, :known] = 0
        size = times[step + 1] - time
        directions = estimator(torch.cat([x, x]), given[0], length, time.expand(2), given[1], given[2])
        x = x + size * ((1 + GUIDANCE) * directions[:1] - GUIDANCE * directions[1:])
        time = time + size
    return x


class ReleasedSound:
    """What the SoundDecoders of the two released folders share. What they keep of a prompt: mel [n_mels, P], style
    [SPEAKER], content [P, channels]."""

    name: str
    """Of FEATURES."""
    reads_latents: bool
    codec_part: str
    """Of the model folder."""
    samples_per_code: int
    folds: bool
    """Whether the package's modules have no weight norm."""
    remedy = ("Give the model folder whose features its training data was made with as --model-dir (for data of the "
              "embedded codec: that --codec instead)")

    def __init__(self, model_dir: Path, device: str) -> None:
        """Raises: ToolError with all that is missing, or is not as it should be."""
        require_indextts2(model_dir, self.name, self.remedy)
        device, parts = choose_device(device), find_parts(model_dir, (
            "config", "gpt", "w2v_bert_stats", "w2v_bert", self.codec_part, "s2mel", "campplus", "bigvgan"))
        self.package, path = package_modules(self.name), parts["config"]
        config = read_yaml(path)
        size = sum(parts_of(config)[name].megabytes for name in parts) / 1000
        info(f"--model-dir {model_dir}: loading {NAMES[self.name]}'s sound ({size:.1f} GB in full size) on {device}")
        self.flag, self.device = f"--model-dir {model_dir}", torch.device(device)
        self.model_dim = section_of(config, "gpt", path).get("model_dim")
        self.features = IndexTTS2Features(parts, device)
        self._take_s2mel(parts["s2mel"], section_of(config, "s2mel", path), path)
        self._take_rest(parts, section_of(config, "semantic_codec", path))
        bigvgan, settings = vocoder(self._vocoder, parts["bigvgan"])
        self.bigvgan = bigvgan.to(self.device)
        self._take_mel(section_of(config, "s2mel.preprocess_params", path), settings, path)
        codec, codes = sha256_of(parts[self.codec_part]), section_of(config, "semantic_codec", path)["codebook_size"]
        self.record = recorded({"features": self.name, "codec_sha256": codec, "num_codes": codes,
                                "codes_per_second": SAMPLE_RATE / self.samples_per_code,
                                "conditioning_sha256": conditioning_digest(conditioning_of(parts["gpt"]))})
        files = [parts["s2mel"], *(parts["bigvgan"] / name for name in PARTS["bigvgan"].files)]
        self.digest = " ".join([codec, *map(sha256_of, files)])
        self.prompts: dict[Path, Prompt] = {}

    # What differs between the two

    def _take_rest(self, parts: Mapping[str, Path], codec: Mapping[str, Any]) -> None:
        """What makes features of codes, and a style of sound; `codec` is semantic_codec: of config.yaml. Raises:
        ToolError."""
        raise NotImplementedError

    def _regulator(self, section: SimpleNamespace) -> nn.Module:
        raise NotImplementedError

    def _vocoder(self, settings: Any) -> nn.Module:
        """Without weight norm."""
        raise NotImplementedError

    def stretched(self, x: Tensor, frames: Tensor) -> Tensor:
        """[1, c, channels] -> [1, frames, content channels]; `frames` is [1]."""
        raise NotImplementedError

    def voice_of(self, audio: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a prompt's sound [samples] and features [T, channels]: the GPT's condition [C, values], the style
        [1, SPEAKER] and what is stretched to its content, [1, c, channels]."""
        raise NotImplementedError

    def said(self, codes: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What is stretched to the content of a line, [1, c, channels], and how many frames it gets, [1]."""
        raise NotImplementedError

    # What they share

    def _take_s2mel(self, path: Path, section: Mapping[str, Any], config: Path) -> None:
        """Raises: ToolError."""
        args = namespaced(section)
        tensors = {name: nested_tensors(path, "net", name) for name in ("cfm", "length_regulator")}
        tensors = {name: folded(part) for name, part in tensors.items()} if self.folds else tensors
        cfm: Any = filled(lambda: self.package.CFM(args), tensors["cfm"], path, config, "s2mel")
        self.regulator = filled(lambda: self._regulator(args.length_regulator), tensors["length_regulator"], path,
                                config, "s2mel").to(self.device)
        self.estimator = cfm.estimator.to(self.device)
        self.estimator.setup_caches(max_batch_size=1, max_seq_length=LONGEST_MEL)

    def _moved(self) -> dict[str, Any]:
        """Modules and tensors by the names of their attributes; not the features, which only prompts need."""
        return {name: value for name, value in vars(self).items() if isinstance(value, (nn.Module, Tensor))}

    def move(self, device: torch.device) -> None:
        for name, value in self._moved().items():
            setattr(self, name, value.to(device))
        self.estimator.transformer.max_seq_length = -1  # its positions are no buffers, and are made anew
        self.estimator.setup_caches(max_batch_size=1, max_seq_length=LONGEST_MEL)
        self.device = device

    def size(self) -> int:
        return sum(sum(t.nbytes for t in value.state_dict().values()) if isinstance(value, nn.Module) else value.nbytes
                   for value in self._moved().values())

    def _take_mel(self, section: Mapping[str, Any], vocoder: Mapping[str, Any], path: Path) -> None:
        """The mel spectrogram that s2mel makes and BigVGAN reads. Raises: ToolError where they differ."""
        try:
            spectrum = section["spect_params"]
            fmax = None if spectrum.get("fmax", "None") in (None, "None") else 8000  # as IndexTTS2 reads it
            self.mel_settings = {"n_fft": spectrum["n_fft"], "win_size": spectrum["win_length"],
                                 "hop_size": spectrum["hop_length"], "num_mels": spectrum["n_mels"],
                                 "sampling_rate": section["sr"], "fmin": spectrum.get("fmin", 0), "fmax": fmax}
        except (KeyError, TypeError, AttributeError) as error:
            raise ToolError(f"{path}: s2mel.preprocess_params has no {error}. {own_remedy(path)}") from error
        differing = [f"{key} {vocoder.get(key)}, not {value}" for key, value in self.mel_settings.items()
                     if vocoder.get(key) != value]
        if differing:
            raise ToolError(f"{path}: its BigVGAN reads other mel spectrograms ({'; '.join(differing)}). "
                            f"Download {PARTS['bigvgan'].repository}")
        self.sample_rate, self.n_mels = self.mel_settings["sampling_rate"], self.mel_settings["num_mels"]

    def mel(self, waveform: Tensor) -> Tensor:
        """[samples] -> [1, n_mels, frames]."""
        return self.package.mel_spectrogram(waveform[None].float(), **self.mel_settings, center=False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        return self.mel(waveform)[0].T

    @torch.no_grad()
    def prompt(self, path: Path, model: ModelConfig) -> Prompt:
        name = INDEXTTS25 if model.languages else INDEXTTS2
        if name != self.name or model.model_dim != self.model_dim:
            raise ToolError(f"{self.flag}: its GPT is {NAMES[self.name]}'s, {self.model_dim} wide, the checkpoint's "
                            f"{NAMES[name]}'s, {model.model_dim} wide. {self.remedy}")
        if path not in self.prompts:
            audio = long_enough(load_recording(path, SAMPLE_RATE, trim=False), SAMPLE_RATE, path)[:PROMPT_SAMPLES]
            seconds = PROMPT_SAMPLES / SAMPLE_RATE
            heard = load_recording(path, self.sample_rate, trim=False)[: round(seconds * self.sample_rate)]
            features = self.features.features(audio)[0]
            mel = self.mel(heard.to(self.device))
            condition, style, x = self.voice_of(audio, features)
            kept = {"mel": mel, "style": style, "content": self.stretched(x, torch.tensor([mel.shape[2]]))}
            self.prompts[path] = Prompt(condition.cpu(), self.features.voice.emo_vec(features).cpu(),
                                        {name: value[0].cpu().contiguous() for name, value in kept.items()})
        return self.prompts[path]

    @torch.no_grad()
    def waveform(self, codes: Tensor, latents: Tensor, prompt: Prompt, seed: int) -> Tensor:
        if not len(codes):
            return torch.zeros(0)
        mel, style, content = (prompt.sound[name][None].to(self.device) for name in ("mel", "style", "content"))
        content = torch.cat([content, self.stretched(*self.said(codes.to(self.device), latents.to(self.device)))], 1)
        noise = torch.randn(1, self.n_mels, content.shape[1], generator=torch.Generator().manual_seed(seed))
        made = flow(self.estimator, noise.to(self.device), mel, content, style)[:, :, mel.shape[2] :]
        return self.bigvgan(made)[0, 0].clamp(-1, 1).cpu()

    def mels_to_learn_from(self, codes: Sequence[Tensor], prompts: Sequence[Path],
                           recordings: Sequence[Path | None]) -> list[Tensor]:
        """Of the recordings themselves, which the sound of codes comes close to: to decode hours of codes would take
        longer than the training."""
        mels, progress = [], Progress("reading training recordings", len(recordings))
        for path in recordings:
            if path is None:
                raise ToolError("a training recording is missing, which the recogniser learns from. Give the "
                                "recordings.jsonl that names them as --recordings")
            mels.append(self.log_mel(load_recording(path, self.sample_rate, trim=False)).half())
            progress.update(len(mels))
        return mels


class IndexTTS2Sound(ReleasedSound):
    """Of IndexTTS-2: its s2mel hears the codes and the GPT's latents."""

    name, reads_latents, folds = INDEXTTS2, True, False
    codec_part, samples_per_code = "semantic_codec", 2 * HOP

    def _take_rest(self, parts: Mapping[str, Path], codec: Mapping[str, Any]) -> None:
        path, config, prefix = parts["semantic_codec"], parts["config"], "quantizer.quantizers.0."
        tensors = read_tensors(path)
        projection = {name.removeprefix(f"{prefix}out_project."): t for name, t in tensors.items()
                      if name.startswith(f"{prefix}out_project.")}
        self.codebook = tensors[f"{prefix}codebook.weight"].to(self.device)  # IndexTTS2Features has checked it
        channels = self.features.mean.shape[0]
        self.out_project = filled(lambda: CodeProjection(self.codebook.shape[1], channels), projection, path, path,
                                  "semantic codec's out_project").to(self.device)
        layer, s2mel = nested_tensors(parts["s2mel"], "net", "gpt_layer"), parts["s2mel"]
        self.gpt_layer = filled(lambda: latent_layers(layer), layer, s2mel, config, "s2mel").to(self.device)
        reads, makes = layer["0.weight"].shape[1], layer["2.weight"].shape[0]
        if (reads, makes) != (self.model_dim, channels):
            raise ToolError(f"{s2mel}: its gpt_layer makes {makes} values of {reads}, {config} has gpt.model_dim "
                            f"{self.model_dim} and features of {channels}. {own_remedy(config)}")
        self.campplus = filled(lambda: self.package.CAMPPlus(feat_dim=80, embedding_size=SPEAKER),
                               nested_tensors(parts["campplus"]), parts["campplus"], config, "CAM++").to(self.device)

    def _regulator(self, section: SimpleNamespace) -> nn.Module:
        return length_regulator(self.package, section)

    def _vocoder(self, settings: Any) -> nn.Module:
        module = self.package.BigVGAN(self.package.AttrDict(settings), use_cuda_kernel=False)
        module.remove_weight_norm()
        return module

    def embedding_of(self, codes: Tensor) -> Tensor:
        """[c] -> [1, c, channels], as the features were."""
        return self.out_project(self.codebook[codes])[None]

    def stretched(self, x: Tensor, frames: Tensor) -> Tensor:
        return self.regulator(x, ylens=frames.to(self.device), n_quantizers=3, f0=None)[0]

    def voice_of(self, audio: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        filters = torchaudio.compliance.kaldi.fbank(audio[None], num_mel_bins=80, dither=0,
                                                    sample_frequency=SAMPLE_RATE).to(self.device)
        style = self.campplus((filters - filters.mean(0))[None])
        return self.features.voice.condition(features), style, self.embedding_of(self.features.codec(features))

    def said(self, codes: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        frames = (torch.tensor([len(codes)]) * FRAMES_PER_ROW).long()
        return self.embedding_of(codes) + self.gpt_layer(latents[None]), frames


class IndexTTS25Sound(ReleasedSound):
    """Of IndexTTS-2.5: codes are decoded to features, 50 a second, and s2mel hears these alone."""

    name, reads_latents, folds = INDEXTTS25, False, True
    codec_part, samples_per_code = "codec", 4 * HOP

    def _take_rest(self, parts: Mapping[str, Path], codec: Mapping[str, Any]) -> None:
        path, config = parts["codec"], parts["config"]
        self.codec: Any = filled(lambda: self.package.EnhancedCodec(**codec), folded(nested_tensors(path, "model")),
                                 path, config, "codec's decoder").to(self.device)

    def _regulator(self, section: SimpleNamespace) -> nn.Module:
        return self.package.InterpolateRegulator(
            channels=section.channels, sampling_ratios=section.sampling_ratios, in_channels=section.in_channels,
            codebook_size=section.content_codebook_size)

    def _vocoder(self, settings: Any) -> nn.Module:
        return self.package.BigVGAN(self.package.AttrDict(settings))

    def stretched(self, x: Tensor, frames: Tensor) -> Tensor:
        return self.regulator(x, ylens=frames.to(self.device))

    def voice_of(self, audio: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        style = self.features.speaker(audio.to(self.device))[None]
        return style, style, features[None]

    def said(self, codes: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        features = self.codec.decode(codes[None])
        return features, torch.tensor([int(features.shape[1] * FRAMES_PER_ROW)])
