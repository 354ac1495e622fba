"""What codes, conditions, text ids and weights were made with, so that what does not belong together is refused.

A data set says it in the `dataset:` section of the config.yaml beside its manifests, a checkpoint and an export under
"made_with". What one side does not record (a fork's data, released weights) is not compared. No torch in here.

  features          who made codes and conditions: "embedded" (tools.speech_codec), "indextts2" ...
  codec_sha256      of the codec file; codes of one codec are noise to another, which as a rule has as many
  num_codes         real codes are 0 to num_codes - 1
  codes_per_second
  tokenizer_sha256  of the SentencePiece model, or of the .tiktoken file
  text_rules        by which the transcripts were read (tools.text_rules); not recorded under version 1
  front_end         as whose front end texts are written for the tokenizer ("indextts2"); not recorded where as they are
  conditioning_sha256  of IndexTTS2's conditioning modules, which made conditions and emotion vectors, and are needed
                    with the weights (tools.indextts2_features); the embedded features have none
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools._common import ToolError
from tools.run_files import split_manifest

KEYS = {"features": str, "codec_sha256": str, "num_codes": int, "codes_per_second": float, "tokenizer_sha256": str,
        "text_rules": int, "front_end": str, "conditioning_sha256": str}
OF_SOUND = ("features", "codec_sha256", "num_codes", "codes_per_second", "conditioning_sha256")
"""All that matters where texts are written anew."""
EMBEDDED = "embedded"
INDEXTTS2 = "indextts2"
INDEXTTS25 = "indextts2.5"
FEATURES = (EMBEDDED, INDEXTTS2, INDEXTTS25)
"""What tools.preprocess makes."""
INDEXTTS2_CODES = 8192
MEND_YAML = "Mend it, or run tools.preprocess again"
REMEDY = ("Give files that belong together: the codec, the tokenizer and the data that these weights were trained "
          "with, or preprocess the recordings again for them")

MadeWith = dict[str, Any]
"""Those of KEYS that are recorded."""


def recorded(values: object) -> MadeWith:
    """Those of KEYS that a section of YAML or of a checkpoint has, each of its type; any other value is none."""
    found = values if isinstance(values, Mapping) else {}
    return {key: found[key] for key, kind in KEYS.items() if key in found and not isinstance(found[key], bool)
            and isinstance(found[key], (int, float) if kind is float else kind) and found[key] != ""}


def record(features: str, codec_sha256: str, num_codes: int, codes_per_second: float, tokenizer_sha256: str,
           text_rules: int, front_end: str = "", conditioning_sha256: str = "") -> MadeWith:
    """All of KEYS that there are, as a data set keeps them."""
    return recorded({"features": features, "codec_sha256": codec_sha256, "num_codes": num_codes,
                     "codes_per_second": round(codes_per_second, 4), "tokenizer_sha256": tokenizer_sha256,
                     "text_rules": text_rules, "front_end": front_end, "conditioning_sha256": conditioning_sha256})


def read_yaml(path: Path, remedy: str = MEND_YAML) -> dict[str, Any]:
    """{} where there is none, or no mapping in it. Raises: ToolError for a file that cannot be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolError(f"{path}: cannot be read ({' '.join(str(error).split())}). {remedy}") from error
    return content if isinstance(content, dict) else {}


def of_manifest(manifest: str | Path) -> MadeWith:
    """From the config.yaml beside it; the manifest may have a ::lang. Raises: ToolError."""
    return recorded(read_yaml(Path(split_manifest(str(manifest))[0]).with_name("config.yaml")).get("dataset"))


def of_config(config: Path) -> MadeWith:
    """What a YAML file for --config tells: its `dataset:` section, and the codes of its `gpt:` section.

    Raises: ToolError.
    """
    content = read_yaml(config)
    gpt, found = content.get("gpt"), recorded(content.get("dataset"))
    numbers = [gpt.get("start_mel_token"), gpt.get("stop_mel_token")] if isinstance(gpt, dict) else []
    whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    return found | {"num_codes": min(whole)} if len(whole) == 2 else found


def of_checkpoint(content: Mapping[str, Any]) -> MadeWith:
    """Of a checkpoint, an export or a base file, as torch.load gives them.

    Checkpoints of before "made_with" knew their tokenizer, and the codec of each manifest: it is told where the
    manifests agree.
    """
    found = of_older_keys(content)
    return found | recorded(content.get("made_with"))


def of_older_keys(content: Mapping[str, Any]) -> MadeWith:
    tokenizer, manifests = content.get("tokenizer"), content.get("manifests")
    train = manifests.get("train") if isinstance(manifests, Mapping) else None
    codecs = {entry.get("codec_sha256") for entry in train or () if isinstance(entry, Mapping)} - {None, ""}
    return recorded({"tokenizer_sha256": tokenizer.get("sha256") if isinstance(tokenizer, Mapping) else None,
                     "codec_sha256": codecs.pop() if len(codecs) == 1 else None})


def differences(name_a: str, a: MadeWith, name_b: str, b: MadeWith, keys: Sequence[str] = tuple(KEYS)) -> list[str]:
    """A sentence for each of the `keys` that both record, and that differs; both sides are named."""
    return [f"{key} is {shown(a[key])} in {name_a}, but {shown(b[key])} in {name_b}"
            for key in keys if key in a and key in b and not is_same(a[key], b[key])]


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4)
    return one == other


def shown(value: Any) -> str:
    """A digest by its beginning."""
    return f"{value[:12]}" if isinstance(value, str) else f"{value:g}"


def require_same(name_a: str, a: MadeWith, name_b: str, b: MadeWith, keys: Sequence[str] = tuple(KEYS),
                 remedy: str = REMEDY) -> None:
    """Raises: ToolError that names both sides, where they differ."""
    found = differences(name_a, a, name_b, b, keys)
    if found:
        raise ToolError(f"{'; '.join(found)}. {remedy}")
