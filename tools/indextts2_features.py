"""Codes, conditions and emotion vectors as IndexTTS2's weights know them, from a folder of released files.

Sound at 16 kHz -> filter bank -> w2v-BERT 2.0, cut after its 17th layer -> scaled by the released statistics: features,
50 rows a second. Codes are MaskGCT's semantic codec of them; condition (32 rows) and emo_vec are made by the
conditioning modules of gpt.pth from the first 15 s. One recording at a time: padding would change the results.

Files are read as they are: float32, every tensor that is needed there and of its shape, none that is unknown. Their
tensors stay mapped, so that processes share them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tools._common import ToolError, info, sha256_of
from tools.indextts2_modules import (
    FRAME,
    HOP,
    SPEAKER_VALUES,
    CAMPlusPlus,
    EnhancedCodec,
    SemanticCodec,
    VoiceModules,
    rows_of,
)
from tools.made_with import INDEXTTS2, INDEXTTS25, read_yaml
from tools.model_folder import FOR_FEATURES, FOR_FEATURES_25, PARTS, PARTS_25, download_lines, find_parts, recognised
from trainers.train_gpt_v2 import CARRIED_PREFIXES

SAMPLE_RATE = 16000
LAYERS = 17  # of w2v-BERT's 24
PROMPT_SAMPLES = 15 * SAMPLE_RATE
SECTIONS = ("semantic_codec", "gpt.condition_module", "gpt.emo_condition_module")
SECTIONS_25 = ("semantic_codec", "gpt.emo_condition_module")
NAMES = {INDEXTTS2: "IndexTTS-2", INDEXTTS25: "IndexTTS-2.5"}
FORMAT = 1  # of what is computed; counted up when the results change


# ---------------------------------------------------------------------------------------------------------------------
# Files to modules


def tensors_of_safetensors(path: Path) -> dict[str, Tensor]:
    """Mapped. Raises: ValueError for a file of another kind; OSError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError("no .safetensors file: " + str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or PyTorch file, mapped; of {"model": tensors} those. Raises: ToolError."""
    try:
        if path.suffix == ".safetensors":
            return tensors_of_safetensors(path)
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise unreadable(path, reason_of(error)) from error
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise unreadable(path, "it holds no tensors by name")
    return tensors


def reason_of(error: Exception) -> str:
    """In a line. PyTorch itself advises to run the code in a file that is no plain tensors."""
    if isinstance(error, pickle.UnpicklingError):
        return "a web page, or another file that PyTorch did not write of plain tensors"
    return " ".join(str(error).split())[:200]


def unreadable(path: Path, reason: str) -> ToolError:
    return ToolError(f"{path}: not a file of weights that can be read ({reason}). Download it again")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, what: str, check: bool) -> nn.Module:
    """Gives a module that was made on the meta device its tensors, as they are. `check`: reads all of them.

    Raises: ToolError with everything in which they are not the module's.
    """
    shapes = {name: list(t.shape) for name, t in module.state_dict().items()}
    dtypes = {name: t.dtype for name, t in module.state_dict().items()}
    found = {name: list(t.shape) for name, t in tensors.items()}
    missing = [name for name in shapes if name not in found]
    unknown = [name for name in found if name not in shapes]
    differing = [f"{name} is {found[name]}, not {shapes[name]}" for name in shapes
                 if name in found and found[name] != shapes[name]]
    coarse = [f"{name} is {t.dtype}" for name, t in tensors.items() if name in shapes and t.dtype != dtypes[name]]
    infinite = [name for name, t in tensors.items() if check and not coarse and not t.isfinite().all()]
    faults = {"are missing": missing, "are unknown": unknown, "have another shape": differing,
              "are not float32, as the features need them": coarse, "hold values that are not finite": infinite}
    problems = [f"{len(names)} tensors {said}, the first: {names[0]}" for said, names in faults.items() if names]
    if problems:
        raise ToolError(f"{path}: not {what}: {'; '.join(problems)}. Download the released file again")
    module.load_state_dict(dict(tensors), assign=True)
    return module.eval().requires_grad_(False)


def load_w2v_bert(folder: Path, check: bool) -> tuple[nn.Module, float]:
    """The model up to its LAYERS-th layer, and what an odd last frame is paired with. Raises: ToolError."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    settings, extractor = (read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    expected = {"feature_size": 80, "num_mel_bins": 80, "sampling_rate": SAMPLE_RATE, "stride": 2}
    differing = [f"{key} {extractor.get(key)}" for key, value in expected.items() if extractor.get(key, value) != value]
    layers = settings.get("num_hidden_layers", 24)
    if settings.get("model_type") != "wav2vec2-bert" or not isinstance(layers, int) or layers < LAYERS or differing:
        raise ToolError(f"{folder}: not w2v-BERT 2.0 ({settings.get('model_type')}, {layers} layers"
                        f"{''.join(f', {part}' for part in differing)}). Download facebook/w2v-bert-2.0")
    try:
        config = Wav2Vec2BertConfig(**settings | {"num_hidden_layers": LAYERS, "apply_spec_augment": False})
        with torch.device("meta"):
            model = Wav2Vec2BertModel(config)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolError(f"{folder / 'config.json'}: no such model can be made ({reason}). Download "
                        "facebook/w2v-bert-2.0 again") from error
    path = folder / "model.safetensors"
    later = tuple(f"encoder.layers.{index}." for index in range(LAYERS, layers))
    tensors = {name: t for name, t in read_tensors(path).items() if not name.startswith(later)}
    return fill(model, tensors, path, "w2v-BERT 2.0", check), float(extractor.get("padding_value", 1.0))


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, " ".join(str(error).split())[:200]) from error
    if not isinstance(content, dict):
        raise unreadable(path, "it holds no settings by name")
    return content


def load_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """mean and deviation, [channels]. Raises: ToolError."""
    found = read_tensors(path)
    for name in ("mean", "var"):
        if name not in found or found[name].shape != (channels,) or found[name].dtype != torch.float32:
            what = f"{found[name].dtype} {list(found[name].shape)}" if name in found else "missing"
            raise ToolError(f"{path}: {name} is {what}, not float32 [{channels}]. Download IndexTTS-2's again")
    if not (found["mean"].isfinite().all() and found["var"].isfinite().all() and (found["var"] > 0).all()):
        raise ToolError(f"{path}: holds values that are not finite, or no variances. Download IndexTTS-2's again")
    return found["mean"], found["var"].sqrt()


def conditioning_of(path: Path) -> dict[str, Tensor]:
    """The tensors of gpt.pth that make conditions and emotion vectors. Raises: ToolError where there are none."""
    tensors = {name: t for name, t in read_tensors(path).items() if name.startswith(CARRIED_PREFIXES)}
    if not tensors:
        raise ToolError(f"{path}: has no conditioning modules ({CARRIED_PREFIXES[0]}* and its kin), which make "
                        "conditions and emotion vectors. Give the folder that was downloaded")
    return tensors


def conditioning_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the conditioning modules among a model's tensors: for each, by name, a line "NAME [SHAPE]" and its
    values as float32, little-endian. "" where there are none."""
    digest, names = hashlib.sha256(), sorted(name for name in tensors if name.startswith(CARRIED_PREFIXES))
    for name in names:
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        values = tensors[name].float().numpy().astype("<f4", copy=False)
        digest.update(np.ascontiguousarray(values).data.cast("B"))
    return digest.hexdigest() if names else ""


def section_of(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A section of config.yaml by its dotted name. Raises: ToolError."""
    section: Any = config
    for key in name.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    if not isinstance(section, dict):
        raise ToolError(f"{path}: has no {name} section. {own_remedy(path)}")
    return section


def own_remedy(path: Path) -> str:
    return f"Download it with `{download_lines(['config'], path.parent)[0]}`"


def made(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """A module on the meta device by the numbers of config.yaml. Raises: ToolError."""
    try:
        with torch.device("meta"):
            return build()
    except KeyError as error:
        raise ToolError(f"{path}: {error.args[0]} is missing from one of {', '.join(SECTIONS)}. {own_remedy(path)}"
                        ) from error
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolError(f"{path}: no modules can be made by {', '.join(SECTIONS)} ({reason}). {own_remedy(path)}"
                        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Sound to features


class IndexTTS2Features:
    """The tools.features.Features of the released weights."""

    def __init__(self, parts: Mapping[str, Path], device: str, check: bool = False) -> None:
        """Raises: ToolError naming the file that is not what it should be."""
        path = parts["config"]
        config = read_yaml(path)
        w2v_bert, self.padding = load_w2v_bert(parts["w2v_bert"], check)
        channels = int(w2v_bert.config.hidden_size)  # type: ignore[union-attr, arg-type]
        codec = section_of(config, "semantic_codec", path)
        self.is_25 = "semantic_codec" not in parts
        gpt = {**section_of(config, "gpt", path), **{name.partition(".")[2]: section_of(config, name, path)
                                                     for name in (SECTIONS_25 if self.is_25 else SECTIONS)[1:]}}
        if codec.get("hidden_size") != channels:
            raise ToolError(f"{parts['w2v_bert']}: its features are {channels} wide, {path} has semantic_codec."
                            f"hidden_size {codec.get('hidden_size')}. Download facebook/w2v-bert-2.0")
        for name, expected in (("condition_type", "conformer_perceiver"), ("condition_module", "conv2d2"),
                               ("emo_condition_module", "conv2d2"))[2 * self.is_25 :]:
            found = gpt.get(name) if name == "condition_type" else gpt[name].get("input_layer")
            if found != expected:
                raise ToolError(f"{path}: gpt.{name} is of {found}, not {expected} as IndexTTS-2's. {own_remedy(path)}")
        voice = conditioning_of(parts["gpt"])
        latents = voice.get("emo_perceiver_encoder.latents")
        emo_width = int(latents.shape[-1]) if latents is not None and latents.ndim else 1024
        kind, codec_path = ((EnhancedCodec, parts["codec"]) if self.is_25 else (SemanticCodec, parts["semantic_codec"]))
        of_codec = {name: t for name, t in read_tensors(codec_path).items() if not name.startswith(kind.DECODER)}
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
        self.mean, self.deviation = (t.to(self.device) for t in
                                     load_statistics(parts["w2v_bert_stats"], channels))
        self.w2v_bert = w2v_bert.to(self.device)
        self.codec = fill(made(lambda: kind(codec), path), of_codec, codec_path,
                          f"the semantic codec that {path.name} describes", check).to(self.device)
        modules = made(lambda: VoiceModules(gpt, channels, emo_width, not self.is_25), path)
        self.voice: Any = fill(modules, voice, parts["gpt"], f"the GPT that {path.name} describes", check
                               ).to(self.device)
        self.speaker: Any = fill(made(CAMPlusPlus, path), read_tensors(parts["campplus"]), parts["campplus"],
                                 "CAM++ of funasr/campplus", check).to(self.device) if self.is_25 else None

    def features(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Mono [samples] at 16 kHz -> features [T, channels], 50 a second, and which of them are whole [T]."""
        rows, whole = rows_of(audio, self.padding)
        hidden = self.w2v_bert(rows[None].to(self.device), attention_mask=whole[None].long().to(self.device))
        return (hidden.last_hidden_state[0] - self.mean) / self.deviation, whole

    @torch.inference_mode()
    def arrays(self, audio: Tensor, kind: str) -> dict[str, np.ndarray]:
        """kind "codes": codes [c] and emo_vec [1, D]; "condition": condition [32, D].

        Codes are made from the whole recording, condition and emo_vec from its first 15 s. An odd last frame, which is
        padded, is heard (as in IndexTTS2's inference), but gets no code. In IndexTTS-2.5 the condition is the speaker
        vector [1, 192], and a code needs two whole rows.
        """
        beginning = audio[:PROMPT_SAMPLES]
        if kind == "condition" and self.is_25:
            return {"condition": self.speaker(beginning.to(self.device)).cpu().numpy()[None]}
        if kind == "condition":
            return {"condition": self.voice.condition(self.features(beginning)[0]).cpu().numpy()}
        features, whole = self.features(audio)
        codes = self.codec(features).cpu()[: int(whole.sum()) // (1 + self.is_25)].numpy().astype(np.int32)
        if len(beginning) < len(audio):
            features = self.features(beginning)[0]
        return {"codes": codes, "emo_vec": self.voice.emo_vec(features).cpu().numpy()[None]}


def choose_device(device: str) -> str:
    """Raises: ToolError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ToolError(f"--device {device}: no such device. Give auto, cpu or cuda") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ToolError(f"--device {device}: not on this machine. Give auto or cpu")
    return device


@dataclass(frozen=True)
class IndexTTS2Source:
    """The tools.features.FeatureSource of a folder of released files."""

    parts: tuple[tuple[str, Path], ...]
    device: str
    codec: Path
    sha256: str
    """Of the semantic codec."""
    conditioning_sha256: str
    model_sha256: str
    """Of all that the features depend on."""
    num_codes: int
    model_dim: int
    most_samples: int
    """Of a recording whose codes the model takes."""

    name: str
    """"indextts2" or "indextts2.5"."""

    sample_rate = SAMPLE_RATE
    trims, emo_vec_kind = False, "codes"
    worth_a_process = 4  # loading takes as long as so many recordings
    largest_chunk = 16

    @property
    def samples_per_code(self) -> int:
        return (4 if self.name == INDEXTTS25 else 2) * HOP

    @property
    def condition_shape(self) -> tuple[int, int]:
        return (1, SPEAKER_VALUES) if self.name == INDEXTTS25 else (32, self.model_dim)

    @property
    def jobs(self) -> int:
        return 1 if self.device.startswith("cuda") else 0

    @classmethod
    def of(cls, model_dir: Path, device: str, most_codes: int, name: str = INDEXTTS2) -> IndexTTS2Source:
        """Finds, reads and checks every file. Raises: ToolError with all that is missing, or is not as it should be."""
        require_indextts2(model_dir, name)
        is_25 = name == INDEXTTS25
        device, parts = choose_device(device), find_parts(model_dir, FOR_FEATURES_25 if is_25 else FOR_FEATURES)
        needed = sum((PARTS_25 if is_25 else PARTS)[part].megabytes for part in parts) / 1000
        info(f"--model-dir {model_dir}: checking {NAMES[name]}'s files ({needed:.1f} GB); then features on {device}")
        IndexTTS2Features(parts, "cpu", check=True)
        config = read_yaml(parts["config"])
        files = [*(parts["w2v_bert"] / name for name in PARTS["w2v_bert"].files), parts["w2v_bert_stats"],
                 *([parts["campplus"]] if is_25 else []), parts["codec" if is_25 else "semantic_codec"]]
        conditioning = conditioning_digest(conditioning_of(parts["gpt"]))
        sections = {section: section_of(config, section, parts["config"])
                    for section in (SECTIONS_25 if is_25 else SECTIONS)}
        codec = sha256_of(files[-1])
        content = json.dumps([FORMAT, sections, [sha256_of(path) for path in files[:-1]], codec, conditioning])
        frames = 4 if is_25 else 2  # of a code
        most_samples = FRAME + (frames * most_codes + frames - 1) * HOP - 1
        return cls(tuple(parts.items()), device, files[-1], codec, conditioning,
                   hashlib.sha256(content.encode()).hexdigest(), sections["semantic_codec"]["codebook_size"],
                   config["gpt"]["model_dim"], most_samples, name)

    def fingerprint(self, kind: str) -> str:
        return hashlib.sha256(f"{self.name} {self.model_sha256} {kind}".encode()).hexdigest()

    def load(self) -> IndexTTS2Features:
        return IndexTTS2Features(dict(self.parts), self.device)


def require_indextts2(model_dir: Path, name: str, remedy: str = "") -> None:
    """Raises: ToolError for a folder of anything else than `name`."""
    found = recognised(model_dir)
    if found != name:
        raise ToolError(f"--model-dir {model_dir}: {NAMES[found]}, whose codes, conditions and texts are others. "
                        f"{remedy or f'Give a folder of {NAMES[name]}, or --features {found}'}")
