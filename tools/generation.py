"""Codes from text: a checkpoint's model draws one code after the other, several lines at once, with a cache of keys and
values; the SoundDecoder that it was trained for makes sound of them.

What a line sounds like depends on checkpoint, text, prompt, settings and seed, never on the lines spoken beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tools._common import ToolError, sha256_of, warn
from tools.amharic_text import read_aloud, shown
from tools.codes_to_sound import SHORTEST_PROMPT, Prompt, SoundDecoder
from tools.made_with import of_checkpoint, require_same
from tools.preprocess import text_ids_of
from tools.sentences import cut_at_pauses
from tools.text_rules import INDEXTTS2, front_end_of, rules_of, written_for
from tools.text_tokens import TextTokens, load_tokens
from trainers.train_gpt_v2 import (
    LANGUAGES,
    NAME_ORDER,
    Block,
    ForeignCheckpoint,
    ModelConfig,
    ResumeError,
    Sample,
    UnifiedVoiceGPT,
    UserError,
    check_lora_base,
    collate_packed,
    in_name_order,
    lora_scale,
    model_config_from,
    read_base_checkpoint,
    read_checkpoint,
)

LONGEST_PART = {INDEXTTS2: 120}  # text tokens: as its own inference cuts; 600, which it takes, are over 36 s of codes
PAUSE = 0.3  # seconds between the parts of a long text
LINES_AT_ONCE = 16  # at most
CACHE_BYTES = 2 << 30  # of their keys and values


# How the next code is chosen


@dataclass(frozen=True)
class Sampling:
    """How the next code is chosen."""

    temperature: float = 0.3
    """Below 1 likely codes become likelier."""
    top_k: int = 0
    """Only so many of the likeliest codes, 0 = all."""
    top_p: float = 0.8
    """Only the likeliest codes that hold this share of the probability."""
    repetition_penalty: float = 1.0
    """Logits of codes that the line already has are divided by it (multiplied where negative); 1 = off."""
    max_length: int = 0
    """Codes of a line at most, 0 = as many as the model knows positions for."""
    seed: int = 0
    """Chooses among the ways in which each line can be spoken."""
    greedy: bool = False
    """Always the likeliest code."""
    takes: int = 1
    """Every line is spoken with so many seeds, from `seed` on, and the take that the model finds likeliest is kept."""


def sampling_problems(sampling: Sampling, longest: int) -> list[str]:
    """What is wrong with the settings, for a model of `longest` codes."""
    problems = [f"--temperature {sampling.temperature}: give a number above 0, or --greedy"
                if not 0 < sampling.temperature < math.inf else "",
                f"--top-k {sampling.top_k}: give 1 or more, or 0 for all codes" if sampling.top_k < 0 else "",
                f"--top-p {sampling.top_p}: give a number above 0, at most 1" if not 0 < sampling.top_p <= 1 else "",
                f"--repetition-penalty {sampling.repetition_penalty}: give a number above 0, 1 for none"
                if not 0 < sampling.repetition_penalty < math.inf else "",
                f"--max-length {sampling.max_length}: this model speaks at most {longest} codes"
                if not 0 <= sampling.max_length <= longest else "",
                f"--takes {sampling.takes}: give 1 or more" if sampling.takes < 1 else "",
                f"--takes {sampling.takes}: --greedy speaks a line in one way only. Leave one of the two out"
                if sampling.greedy and sampling.takes > 1 else ""]
    return [problem for problem in problems if problem]


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    default = Sampling()
    group = parser.add_argument_group("how codes are drawn")
    group.add_argument("--greedy", action="store_true", help="always the likeliest code")
    group.add_argument("--temperature", type=float, default=default.temperature, metavar="T",
                       help=f"below 1 likely codes become likelier ({default.temperature})")
    group.add_argument("--top-k", type=int, default=default.top_k, metavar="N",
                       help=f"only the N likeliest codes, 0 = all ({default.top_k})")
    group.add_argument("--top-p", type=float, default=default.top_p, metavar="P",
                       help=f"only the likeliest codes that hold the share P of the probability ({default.top_p})")
    group.add_argument("--repetition-penalty", type=float, default=default.repetition_penalty, metavar="R",
                       help=f"above 1 codes that the line already has become rarer ({default.repetition_penalty})")
    group.add_argument("--max-length", type=int, default=default.max_length, metavar="N",
                       help="codes of a line at most (0 = as many as the model allows)")
    group.add_argument("--seed", type=int, default=default.seed, help=f"another one, another take ({default.seed})")
    group.add_argument("--takes", type=int, default=default.takes, metavar="N",
                       help=f"speak with N seeds, keep the take that the model finds likeliest ({default.takes}); "
                       "4 make fewer mistakes")


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.max_length, args.seed,
                    args.greedy, args.takes)


# Generation


@dataclass
class Line:
    """A normalised text, its ids and its voice."""

    text: str
    text_ids: list[int]
    prompt: Prompt
    language: int = 0
    """Of IndexTTS-2.5's."""
    parts: list[Line] = field(default_factory=list)
    """Of a text that is longer than the model takes: what is spoken one after the other."""


@dataclass
class Spoken:
    """The codes of a line; not `stopped` when --max-length came before the stop token."""

    codes: list[int]
    stopped: bool
    log_probability: float = field(default=0.0, compare=False)
    """Of all codes and the stop token together, at temperature 1."""
    latents: Tensor = field(default_factory=lambda: torch.zeros(0, 0), compare=False)
    """What the model knew before each code, [codes, D], float32."""

    @property
    def likelihood(self) -> tuple[bool, float]:
        """To compare takes of a line by: one that ended itself first, then the mean log-probability."""
        return self.stopped, self.log_probability / max(1, len(self.codes) + self.stopped)


def joined(parts: Sequence[tuple[Spoken, Tensor]], pause: int) -> tuple[Spoken, Tensor]:
    """The parts of a line with `pause` samples of silence between them. Without a code in each it has not stopped."""
    if len(parts) == 1:
        return parts[0]
    spoken = [part for part, _ in parts]
    sounds = [sound for _, waveform in parts for sound in (torch.zeros(pause), waveform)]
    return Spoken([code for part in spoken for code in part.codes], all(part.stopped and part.codes for part in spoken),
                  sum(part.log_probability for part in spoken)), torch.cat(sounds[1:])


class KVCache:
    """Keys and values of every block for B sequences of different lengths, each [L, B, rows, H, h].

    A sequence's rows begin at 0. What lies beyond its end gets no attention and is overwritten as it grows; it must be
    finite all the same, since 0 times NaN is NaN.
    """

    def __init__(self, model: UnifiedVoiceGPT, sequences: int, rows: int) -> None:
        config = model.config
        shape = (config.layers, sequences, rows, config.heads, config.model_dim // config.heads)
        like = model.mel_embedding.weight
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))


def lines_at_once(config: ModelConfig, longest: int) -> int:
    """How many lines of `longest` codes are spoken together: as many as CACHE_BYTES hold, at least one. Pure."""
    rows = config.leading_rows + config.max_text_tokens + 2 + longest
    of_a_line = 2 * config.layers * rows * config.model_dim * torch.float64.itemsize
    return max(1, min(LINES_AT_ONCE, CACHE_BYTES // of_a_line))


def extend(model: UnifiedVoiceGPT, cache: KVCache, rows: Tensor, starts: Tensor) -> Tensor:
    """Passes the next n rows [B, n, D] of every sequence through the blocks; sequence b has starts[b] rows so far.

    Returns the blocks' output [B, n, D], before the final norms.
    """
    sequences, n, dim = rows.shape
    places = starts[:, None] + torch.arange(n, device=rows.device)
    longest = int(places.max()) + 1
    visible = torch.arange(longest, device=rows.device) <= places[..., None]
    every = torch.arange(sequences, device=rows.device)[:, None]
    x = rows.reshape(-1, dim)
    for block, keys, values in zip(model.gpt.h, cache.keys, cache.values, strict=True):
        assert isinstance(block, Block)
        qkv = block.attn.c_attn(block.ln_1(x)).view(sequences, n, 3, *keys.shape[2:])
        keys[every, places] = qkv[:, :, 1]
        values[every, places] = qkv[:, :, 2]
        attended = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys[:, :longest].transpose(1, 2),
                                                  values[:, :longest].transpose(1, 2), attn_mask=visible[:, None])
        x = x + block.attn.c_proj(attended.transpose(1, 2).reshape(-1, dim))
        x = x + block.mlp(block.ln_2(x))
    return x.view(rows.shape)


def prefix_rows(model: UnifiedVoiceGPT, lines: Sequence[Line]) -> tuple[Tensor, Tensor]:
    """What the model reads before the first code, from the prompt to the start token: [B, longest, D], lengths [B]."""
    no_codes = np.zeros(0, dtype=np.int64)
    samples = [Sample(np.array(line.text_ids, dtype=np.int64), no_codes, line.prompt.condition.numpy(),
                      line.prompt.emo_vec.numpy(), language=line.language) for line in lines]
    like = model.mel_embedding.weight
    batch = collate_packed(samples, model.config).to(like.device)
    rows = model.embed(replace(batch, condition=batch.condition.to(like.dtype))).to(like.dtype).split(batch.lengths)
    without_stop = [sequence[:-1] for sequence in rows]
    return (torch.nn.utils.rnn.pad_sequence(without_stop, batch_first=True),
            torch.tensor(batch.lengths, device=like.device) - 1)


def choose_codes(logits: Tensor, repeated: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next code of every line [B] from logits [B, M]; `repeated` [B, M] marks codes that a line already has, and
    `uniform` [B] from [0, 1) is each line's draw."""
    penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = torch.where(repeated, penalised, logits)
    if sampling.greedy:
        return logits.argmax(1)
    ranked, codes = (logits / sampling.temperature).sort(dim=1, descending=True, stable=True)
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -torch.inf
    shares = ranked.softmax(1)
    likelier = shares.cumsum(1) - shares
    shares[likelier >= sampling.top_p] = 0
    reached = shares.cumsum(1)
    rank = (reached < uniform[:, None] * reached[:, -1:]).sum(1)
    return codes.gather(1, rank[:, None])[:, 0]


def known_after(model: UnifiedVoiceGPT, x: Tensor) -> Tensor:
    """The blocks' output as heads, and s2mel, read it."""
    return model.final_norm(model.gpt.ln_f(x))


def draws_of(line: Line, seed: int, count: int) -> np.ndarray:
    """[count] numbers from [0, 1) that depend on the seed and the line's text only."""
    digest = hashlib.sha256(f"{seed} {line.text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest)).random(count)


@torch.no_grad()
def generate_codes(model: UnifiedVoiceGPT, lines: Sequence[Line], sampling: Sampling) -> list[Spoken]:
    """Codes of every line, up to the stop token or the greatest length.

    In float64, as load_model gives it, the lines beside a line move its logits by 1e-14: never enough for another code.
    Codes are chosen on the CPU.
    """
    config, device = model.config, model.mel_embedding.weight.device
    longest = sampling.max_length or config.max_code_len
    rows, ends = prefix_rows(model, lines)
    cache = KVCache(model, len(lines), int(ends.max()) + longest)
    every, latents = torch.arange(len(lines)), []
    x = extend(model, cache, rows, torch.zeros_like(ends))[every.to(device), ends - 1]
    uniform = torch.tensor(np.array([draws_of(line, sampling.seed, longest) for line in lines]))
    repeated = torch.zeros(len(lines), config.number_mel_codes, dtype=torch.bool)
    never = torch.ones(config.number_mel_codes, dtype=torch.bool)  # a start in mid-speech, and rows without a code
    never[: config.code_count] = never[config.stop_mel_token] = False
    spoken = [Spoken([], False) for _ in lines]
    for step in range(longest):
        known = known_after(model, x)
        latents.append(known.float())
        logits = model.mel_head(known).cpu().masked_fill(never, -torch.inf)
        chosen = choose_codes(logits, repeated, uniform[:, step], sampling)
        gained = logits.log_softmax(1)[every, chosen]
        for line, code, log_probability in zip(spoken, chosen.tolist(), gained.tolist(), strict=True):
            if line.stopped:
                continue
            line.log_probability += log_probability
            line.stopped = code == config.stop_mel_token
            if not line.stopped:
                line.codes.append(code)
        if all(line.stopped for line in spoken):
            break
        repeated[every, chosen] = chosen != config.stop_mel_token
        row = model.mel_embedding(chosen.to(device)) + model.mel_pos_embedding.emb.weight[step + 1]
        x = extend(model, cache, row[:, None], ends + step)[:, 0]
    for number, line in enumerate(spoken):
        line.latents = torch.stack([known[number] for known in latents])[: len(line.codes)]
    return spoken


@torch.no_grad()
def latents_of(model: UnifiedVoiceGPT, line: Line, codes: Tensor) -> Tensor:
    """What the model knows before each of these codes [c], whoever chose them: [c, D], float32."""
    rows, ends = prefix_rows(model, [line])
    before = codes[:-1].to(rows.device)
    places = torch.arange(1, len(before) + 1, device=rows.device)
    of_codes = model.mel_embedding(before) + model.mel_pos_embedding.emb(places)
    whole = torch.cat([rows, of_codes[None]], 1)
    x = extend(model, KVCache(model, 1, whole.shape[1]), whole, torch.zeros_like(ends))[0]
    return known_after(model, x[int(ends) - 1 :]).float()[: len(codes)]


def likeliest_takes(model: UnifiedVoiceGPT, lines: Sequence[Line], sampling: Sampling) -> list[Spoken]:
    """Of every line the likeliest of its takes."""
    takes = [generate_codes(model, lines, replace(sampling, seed=sampling.seed + take))
             for take in range(sampling.takes)]
    return [max(of_line, key=lambda spoken: spoken.likelihood) for of_line in zip(*takes, strict=True)]


# A checkpoint with all that it needs to speak


def checkpoint_digest(checkpoint: dict[str, Any]) -> str:
    """Differs whenever anything in two checkpoints does."""
    return hashlib.sha256(json.dumps(checkpoint["digests"], sort_keys=True).encode()).hexdigest()


class UnreadableCheckpoint(ToolError):
    """A checkpoint file that is missing, damaged or not a checkpoint."""


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-checkpoint", type=Path, metavar="PATH", help="of a LoRA checkpoint: the file that it "
                        "adds to, where it was moved")


def weights_of(checkpoint: dict[str, Any], base: Path | None = None) -> dict[str, Tensor]:
    """All of IndexTTS2's tensors; those of a LoRA are added to `base`, or to the file that it names. Raises: ToolError
    where that is gone or another one, or where there is no LoRA to add."""
    known, learned, config = checkpoint.get("lora_base"), checkpoint["model"], checkpoint["config"]
    if base and not known:
        raise ToolError(f"--base-checkpoint {base}: the checkpoint is no LoRA, it holds all its weights. Leave it out")
    if not known:
        return learned
    try:
        check_lora_base(str(base or known["path"]), known)
        tensors, _ = read_base_checkpoint(base or Path(known["path"]))
    except UserError as error:
        raise ToolError(str(error)) from error
    tensors = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(NAME_ORDER)}
    tensors.update({name: tensor for name, tensor in learned.items() if ".lora." not in name})
    scale = lora_scale(config["lora_rank"], config["lora_alpha"])
    for name in (name.removesuffix(".lora.A") for name in learned if name.endswith(".lora.A")):
        product = learned[f"{name}.lora.A"] @ learned[f"{name}.lora.B"]
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + product * scale
    return in_name_order(tensors)


def trained_checkpoint(path: Path) -> dict[str, Any]:
    """A verified checkpoint of our trainer, for speaking and exporting. Raises: UnreadableCheckpoint."""
    try:
        return read_checkpoint(path)
    except ForeignCheckpoint as error:
        raise UnreadableCheckpoint(f"{path}: written by another trainer. Go on with it here first, by `python trainers/"
                                   f"train_gpt_v2.py --resume {path}` with a new --output-dir") from error
    except ResumeError as error:
        weights = ". Give a run's own, such as best.pth: a file of weights alone is none"
        raise UnreadableCheckpoint(f"{error}{weights if 'missing required keys' in str(error) else ''}") from error


def load_model(path: Path, base: Path | None = None) -> tuple[UnifiedVoiceGPT, dict[str, Any]]:
    """A verified checkpoint as a float64 model in evaluation mode, and the checkpoint. Raises: UnreadableCheckpoint,
    and ToolError as `weights_of` does."""
    checkpoint = trained_checkpoint(path)
    model = UnifiedVoiceGPT(model_config_from(checkpoint["model_config"], str(path)))
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in weights_of(checkpoint, base).items() if name in own})
    return model.double().eval().requires_grad_(False), checkpoint


class Synthesizer:
    """A checkpoint, the tokenizer that it was trained with, and the SoundDecoder that it was trained for."""

    model: UnifiedVoiceGPT
    tokenizer: TextTokens
    rules: int
    """Version of the text rules that the checkpoint's texts were read by."""
    front_end: str
    """As whose front end they were then written, "" for none."""

    def __init__(self, checkpoint_path: Path, sound: SoundDecoder, tokenizer_path: Path | None,
                 base_checkpoint: Path | None = None) -> None:
        """`base_checkpoint`: of a LoRA, where it was moved. Raises: ToolError when a file is missing or damaged, or one
        does not fit the others."""
        self.sound = sound
        self.model, self.checkpoint = load_model(checkpoint_path, base_checkpoint)
        record = of_checkpoint(self.checkpoint)
        self.rules = rules_of(record, str(checkpoint_path))
        self.front_end = front_end_of(record, str(checkpoint_path))
        path = tokenizer_path or Path(self.checkpoint["tokenizer"]["path"])
        self.tokenizer = load_tokens(path)
        require_same(str(checkpoint_path), record, f"--tokenizer {path}", {"tokenizer_sha256": sha256_of(path)},
                     remedy="Give the tokenizer that the checkpoint was trained with as --tokenizer")
        require_same(str(checkpoint_path), record, sound.flag, sound.record, remedy=sound.remedy)
        codes, own = sound.record["num_codes"], self.model.config.code_count
        if codes != own:
            raise ToolError(f"{sound.flag}: has {codes} codes, the checkpoint {own}. {sound.remedy}")
        self.model.to(sound.device)
        self.digest = f"{checkpoint_digest(self.checkpoint)} {sound.digest}"

    def move(self, device: torch.device) -> None:
        """Model and sound."""
        self.sound.move(device)
        self.model.to(device)

    def size(self) -> int:
        """Bytes of both, and of what speaking takes of keys and values."""
        return sum(t.nbytes for t in self.model.state_dict().values()) + self.sound.size() + CACHE_BYTES

    def prompt(self, path: Path) -> Prompt:
        """Raises: ToolError for a recording that is unreadable or too short."""
        return self.sound.prompt(path, self.model.config)

    def line(self, text: str, prompt: Prompt, place: str, language: str = "am") -> Line:
        """`place` is for the message, `language` the text's. Raises: ToolError for one that the model cannot read."""
        if self.model.config.languages and language.lower() not in LANGUAGES:
            raise ToolError(f"{place}: IndexTTS-2.5 has no language {language!r}. Give one of {', '.join(LANGUAGES)}")
        reading = read_aloud(text, language, self.rules)

        def ids_of(text: str) -> list[int]:
            return text_ids_of(text, self.tokenizer, place, self.front_end, language.lower())

        number = LANGUAGES.index(language.lower()) if self.model.config.languages else 0
        line = Line(reading.text, ids_of(reading.text), prompt, number)
        most = self.model.config.max_text_tokens
        longest = min(most, LONGEST_PART.get(self.front_end, most))
        if len(line.text_ids) > longest:
            cut = cut_at_pauses(line.text, lambda text: len(self.tokenizer.encode(
                written_for(self.front_end, text), language.lower())), longest)
            line.parts = [Line(part, ids_of(part), prompt, number) for part in cut]
            beyond = [part for part in line.parts if len(part.text_ids) > most]
            if beyond:
                raise ToolError(f"{place}: the word that begins with {beyond[0].text[:20]!r} is "
                                f"{len(beyond[0].text_ids)} tokens, the model takes {most}. Split it")
        if reading.unsaid:
            warn(f"{place}: not said: {' '.join(map(shown, reading.unsaid))}")
        return line

    def speak(self, lines: Sequence[Line], sampling: Sampling) -> Iterator[tuple[Spoken, Tensor]]:
        """Codes and waveform [samples] of every line, of long ones part by part. Raises: ToolError."""
        sounds = self.speak_parts([part for line in lines for part in line.parts or [line]], sampling)
        for line in lines:
            yield joined(list(itertools.islice(sounds, len(line.parts) or 1)),
                         round(PAUSE * self.sound.sample_rate))

    def speak_parts(self, lines: Sequence[Line], sampling: Sampling) -> Iterator[tuple[Spoken, Tensor]]:
        """The same of lines that the model takes at once, lines_at_once() together. Raises: ToolError."""
        config = self.model.config
        problems = sampling_problems(sampling, config.max_code_len)
        if problems:
            raise ToolError("; ".join(problems))
        together = lines_at_once(config, sampling.max_length or config.max_code_len)
        for start in range(0, len(lines), together):
            part = lines[start : start + together]
            for line, spoken in zip(part, likeliest_takes(self.model, part, sampling), strict=True):
                codes = torch.tensor(spoken.codes, dtype=torch.int64)
                yield spoken, self.sound.waveform(codes, spoken.latents, line.prompt,
                                                  noise_seed(line.text, sampling.seed))

    def say_codes(self, codes: Tensor, text: str, prompt: Prompt, place: str, language: str = "am") -> Tensor:
        """The waveform [samples] of codes [c] that the model did not choose itself, such as a recording's own; the text
        is read only where latents are. Raises: ToolError as `line` does."""
        latents = torch.zeros(len(codes), 0)
        if self.sound.reads_latents:
            latents = latents_of(self.model, self.line(text, prompt, place, language), codes)
        return self.sound.waveform(codes, latents, prompt, noise_seed(text, 0))


def noise_seed(text: str, seed: int) -> int:
    """Of what a SoundDecoder draws at random for a line: 63 bits."""
    return int.from_bytes(hashlib.sha256(f"sound {seed} {text}".encode()).digest()[:8]) >> 1


def has_long_prompt(row: dict[str, Any]) -> bool:
    """Whether a manifest row's prompt is long enough to speak in its voice; training takes shorter ones too."""
    return row.get("prompt_duration", math.inf) >= SHORTEST_PROMPT


def line_mark(synthesizer: Synthesizer, line: Line, sampling: Sampling) -> str:
    """Equal for two lines only if they sound the same."""
    voice = [line.prompt.condition, line.prompt.emo_vec, *line.prompt.sound.values()]
    settings = json.dumps([synthesizer.digest, line.text, asdict(sampling)])
    return hashlib.sha256(settings.encode() + b"".join(part.numpy().tobytes() for part in voice)).hexdigest()


def speed(waveform_seconds: float, seconds: float) -> str:
    factor = f", real-time factor {seconds / waveform_seconds:.2f}" if waveform_seconds else ""
    return f"{waveform_seconds:.2f} s of sound in {seconds:.2f} s{factor}"
