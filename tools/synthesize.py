"""Speaks texts in the voice of a prompt recording: checkpoint + text + prompt -> WAV, and a picture of its mel.

  one text     --checkpoint F --prompt F --text T --output F.wav
  many lines   --checkpoint F --prompt F --text-file F --output-dir D: 0001.wav, 0002.wav ... and spoken.jsonl. The same
               command again goes on where it was stopped, and speaks only lines that are new or changed.
  a training   --watch OUTPUT_DIR: speaks the same validation sentences with every new checkpoint of a run into its
               TensorBoard logs, until the run has finished

Codes are drawn one by one, several lines at once, then the embedded codec turns codes into sound. What a line sounds
like depends on checkpoint, text, prompt, settings and seed, never on the lines spoken beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from tools._common import (
    Progress,
    ToolError,
    atomic_path,
    info,
    make_parser,
    read_jsonl,
    run_program,
    sha256_of,
    warn,
    write_jsonl,
    writing_to,
)
from tools.amharic_text import normalise
from tools.preprocess import text_ids_of
from tools.run_files import LATEST, read_last_exit
from tools.sound_files import load_recording, write_wav
from tools.speech_codec import SpeechCodec
from tools.train_tokenizer import load_tokenizer
from trainers.train_gpt_v2 import (
    LEADING_ROWS,
    Block,
    ModelConfig,
    ResumeError,
    Sample,
    UnifiedVoiceGPT,
    collate_packed,
    ignore_os_errors,
    model_config_from,
    read_checkpoint,
)

FIRST_COMMAND = ("python -m tools.synthesize --checkpoint training_output/best.pth --text 'ሰላም ለዓለም' "
                 "--prompt processed_data/audio/new026_am.flac --output hello.wav")
SHORTEST_PROMPT = 0.5  # seconds
LINES_AT_ONCE = 16  # at most
CACHE_BYTES = 2 << 30  # of their keys and values
WATCHED_SENTENCES = 4
POLL_SECONDS = 2.0
# Anchor colours from quiet to loud.
COLOURS = np.array([(0, 0, 20), (60, 15, 110), (180, 50, 90), (250, 140, 40), (255, 250, 190)], dtype=float)


# Generation


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


@dataclass
class Prompt:
    """A voice to speak in: condition [32, D], emo_vec [D] and the codec's mel statistics [2, n_mels], float32."""

    condition: Tensor
    emo_vec: Tensor
    statistics: Tensor


@dataclass
class Line:
    """A normalised text, its ids and its voice."""

    text: str
    text_ids: list[int]
    prompt: Prompt


@dataclass
class Spoken:
    """The codes of a line; not `stopped` when --max-length came before the stop token."""

    codes: list[int]
    stopped: bool
    log_probability: float = field(default=0.0, compare=False)
    """Of all codes and the stop token together, at temperature 1."""

    @property
    def likelihood(self) -> tuple[bool, float]:
        """To compare takes of a line by: one that ended itself first, then the mean log-probability."""
        return self.stopped, self.log_probability / max(1, len(self.codes) + self.stopped)


class KVCache:
    """Keys and values of every block for B sequences of different lengths, each [L, B, rows, H, h].

    A sequence's rows begin at 0. What lies beyond its end gets no attention and is overwritten as it grows; it must be
    finite all the same, since 0 times NaN is NaN.
    """

    def __init__(self, model: UnifiedVoiceGPT, sequences: int, rows: int) -> None:
        config = model.config
        shape = (config.layers, sequences, rows, config.heads, config.model_dim // config.heads)
        self.keys, self.values = (torch.zeros(shape, dtype=model.speed_emb.weight.dtype) for _ in range(2))


def lines_at_once(config: ModelConfig, longest: int) -> int:
    """How many lines of `longest` codes are spoken together: as many as CACHE_BYTES hold, at least one. Pure."""
    rows = LEADING_ROWS + config.max_text_tokens + 2 + longest
    of_a_line = 2 * config.layers * rows * config.model_dim * torch.float64.itemsize
    return max(1, min(LINES_AT_ONCE, CACHE_BYTES // of_a_line))


def extend(model: UnifiedVoiceGPT, cache: KVCache, rows: Tensor, starts: Tensor) -> Tensor:
    """Passes the next n rows [B, n, D] of every sequence through the blocks; sequence b has starts[b] rows so far.

    Returns the blocks' output [B, n, D], before the final norms.
    """
    sequences, n, dim = rows.shape
    places = starts[:, None] + torch.arange(n)
    longest = int(places.max()) + 1
    visible = torch.arange(longest) <= places[..., None]
    x = rows.reshape(-1, dim)
    for block, keys, values in zip(model.gpt.h, cache.keys, cache.values, strict=True):
        assert isinstance(block, Block)
        qkv = block.attn.c_attn(block.ln_1(x)).view(sequences, n, 3, *keys.shape[2:])
        keys[torch.arange(sequences)[:, None], places] = qkv[:, :, 1]
        values[torch.arange(sequences)[:, None], places] = qkv[:, :, 2]
        attended = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys[:, :longest].transpose(1, 2),
                                                  values[:, :longest].transpose(1, 2), attn_mask=visible[:, None])
        x = x + block.attn.c_proj(attended.transpose(1, 2).reshape(-1, dim))
        x = x + block.mlp(block.ln_2(x))
    return x.view(rows.shape)


def prefix_rows(model: UnifiedVoiceGPT, lines: Sequence[Line]) -> tuple[Tensor, Tensor]:
    """What the model reads before the first code, from the prompt to the start token: [B, longest, D], lengths [B]."""
    no_codes = np.zeros(0, dtype=np.int64)
    samples = [Sample(np.array(line.text_ids, dtype=np.int64), no_codes, line.prompt.condition.numpy(),
                      line.prompt.emo_vec.numpy()) for line in lines]
    batch = collate_packed(samples, model.config)
    rows = model.embed(batch).to(model.speed_emb.weight.dtype).split(batch.lengths)
    without_stop = [sequence[:-1] for sequence in rows]
    return torch.nn.utils.rnn.pad_sequence(without_stop, batch_first=True), torch.tensor(batch.lengths) - 1


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


def draws_of(line: Line, seed: int, count: int) -> np.ndarray:
    """[count] numbers from [0, 1) that depend on the seed and the line's text only."""
    digest = hashlib.sha256(f"{seed} {line.text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest)).random(count)


@torch.no_grad()
def generate_codes(model: UnifiedVoiceGPT, lines: Sequence[Line], sampling: Sampling) -> list[Spoken]:
    """Codes of every line, up to the stop token or the greatest length.

    In float64, as load_model gives it, the lines beside a line move its logits by 1e-14: never enough for another code.
    """
    config = model.config
    longest = sampling.max_length or config.max_code_len
    rows, ends = prefix_rows(model, lines)
    cache = KVCache(model, len(lines), int(ends.max()) + longest)
    every = torch.arange(len(lines))
    x = extend(model, cache, rows, torch.zeros_like(ends))[every, ends - 1]
    uniform = torch.tensor(np.array([draws_of(line, sampling.seed, longest) for line in lines]))
    repeated = torch.zeros(len(lines), config.number_mel_codes, dtype=torch.bool)
    never = torch.ones(config.number_mel_codes, dtype=torch.bool)  # a start in mid-speech, and rows without a code
    never[: config.code_count] = never[config.stop_mel_token] = False
    spoken = [Spoken([], False) for _ in lines]
    for step in range(longest):
        logits = model.mel_head(model.final_norm(model.gpt.ln_f(x))).masked_fill(never, -torch.inf)
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
        row = model.mel_embedding(chosen) + model.mel_pos_embedding.emb(torch.tensor(step + 1))
        x = extend(model, cache, row[:, None], ends + step)[:, 0]
    return spoken


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


def load_model(path: Path) -> tuple[UnifiedVoiceGPT, dict[str, Any]]:
    """A verified checkpoint as a float64 model in evaluation mode, and the checkpoint. Raises: UnreadableCheckpoint."""
    try:
        checkpoint = read_checkpoint(path)
    except ResumeError as error:
        raise UnreadableCheckpoint(str(error)) from error
    model = UnifiedVoiceGPT(model_config_from(checkpoint["model_config"], str(path)))
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in checkpoint["model"].items() if name in own})
    return model.double().eval().requires_grad_(False), checkpoint


def require_codec(path: Path, recorded: Sequence[str]) -> None:
    """`recorded` are the sha256 of the codecs that data was made with, "" where none is known: codes of one codec are
    noise to another, which as a rule has as many. Raises: ToolError."""
    known = [sha256 for sha256 in recorded if sha256]
    if known and sha256_of(path) not in known:
        raise ToolError(f"{path}: not the codec that the data was made with (sha256 {known[0][:12]}). Give that one as "
                        "--codec")


class Synthesizer:
    """A checkpoint, the tokenizer and the codec that it was trained with."""

    model: UnifiedVoiceGPT
    tokenizer: sentencepiece.SentencePieceProcessor
    codec: SpeechCodec

    def __init__(self, checkpoint_path: Path, codec_path: Path, tokenizer_path: Path | None) -> None:
        """Raises: ToolError when a file is missing or damaged, or one does not fit the others."""
        self.model, self.checkpoint = load_model(checkpoint_path)
        path = tokenizer_path or Path(self.checkpoint["tokenizer"]["path"])
        self.tokenizer = load_tokenizer(path)
        if sha256_of(path) != self.checkpoint["tokenizer"]["sha256"]:
            raise ToolError(f"{path}: not the tokenizer that the checkpoint was trained with. Give that one as "
                            "--tokenizer")
        self.codec = SpeechCodec.load(codec_path)
        require_codec(codec_path, [manifest.get("codec_sha256", "")
                                   for manifest in self.checkpoint["manifests"]["train"]])
        codes = self.codec.config.num_codes
        if codes != self.model.config.code_count:
            raise ToolError(f"{codec_path}: has {codes} codes, the checkpoint {self.model.config.code_count}. Give the "
                            "codec that its training data was made with as --codec")
        self.digest = f"{checkpoint_digest(self.checkpoint)} {sha256_of(codec_path)}"

    def prompt(self, path: Path) -> Prompt:
        """Raises: ToolError for a recording that is unreadable or too short."""
        rate = self.codec.config.sample_rate
        waveform = load_recording(path, rate)
        if len(waveform) < SHORTEST_PROMPT * rate:
            raise ToolError(f"{path}: {len(waveform) / rate:.2f} s of sound say too little about a voice. Give a "
                            f"prompt of at least {SHORTEST_PROMPT} s, better 3")
        condition, emo_vec = self.codec.condition(waveform, self.model.config.model_dim)
        return Prompt(condition, emo_vec, self.codec.mel_statistics(waveform))

    def line(self, text: str, prompt: Prompt, place: str) -> Line:
        """`place` is for the message. Raises: ToolError for a text that the model cannot read."""
        text = normalise(text)
        text_ids = text_ids_of(text, self.tokenizer, place)
        longest = self.model.config.max_text_tokens
        if len(text_ids) > longest:
            raise ToolError(f"{place}: {len(text_ids)} tokens, the model takes {longest}. Split it")
        return Line(text, text_ids, prompt)

    def speak(self, lines: Sequence[Line], sampling: Sampling) -> Iterator[tuple[Spoken, Tensor]]:
        """Codes and waveform [samples] of every line, lines_at_once() together. Raises: ToolError."""
        config = self.model.config
        problems = sampling_problems(sampling, config.max_code_len)
        if problems:
            raise ToolError("; ".join(problems))
        together = lines_at_once(config, sampling.max_length or config.max_code_len)
        for start in range(0, len(lines), together):
            part = lines[start : start + together]
            for line, spoken in zip(part, likeliest_takes(self.model, part, sampling), strict=True):
                codes = torch.tensor(spoken.codes, dtype=torch.int64)
                yield spoken, self.codec.decode(codes, line.prompt.statistics)


# Files


def mel_image(mels: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Log-mels [frames, n_mels] under each other, low frequencies at the bottom, each with its title."""
    loudest = max(float(mel.max()) for _, mel in mels)
    width, height, title_height = 2 * max(len(mel) for _, mel in mels), 2 * mels[0][1].shape[1], 18
    picture = Image.new("RGB", (width, len(mels) * (height + title_height)), "white")
    for i, (title, mel) in enumerate(mels):
        level = ((mel.numpy().T[::-1] - loudest) / 9 + 1).clip(0, 1) * (len(COLOURS) - 1)  # 9 nepers, 78 dB
        lower = np.minimum(level.astype(int), len(COLOURS) - 2)
        share = (level - lower)[..., None]
        pixels = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
        image = Image.fromarray(pixels.astype(np.uint8)).resize((2 * len(mel), height))
        picture.paste(image, (0, i * (height + title_height) + title_height))
        ImageDraw.Draw(picture).text((4, i * (height + title_height) + 3), title, fill="black")
    return picture


def mel_picture(mels: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """mel_image as a PNG file."""
    with atomic_path(path) as temporary:
        mel_image(mels).save(temporary)


def speed(waveform_seconds: float, seconds: float) -> str:
    factor = f", real-time factor {seconds / waveform_seconds:.2f}" if waveform_seconds else ""
    return f"{waveform_seconds:.2f} s of sound in {seconds:.2f} s{factor}"


def write_sound(synthesizer: Synthesizer, waveform: Tensor, path: Path) -> Path:
    """The WAV and, beside it, the picture, whose path is returned. Raises: ToolError."""
    picture = path.with_suffix(".png")
    with writing_to(path.parent):
        mel_picture([("synthesis", synthesizer.codec.log_mel(waveform))], picture)
        write_wav(path, waveform, synthesizer.codec.config.sample_rate)
    return picture


def synthesize(synthesizer: Synthesizer, text: str, prompt: Path, output: Path, sampling: Sampling) -> None:
    """One text into one file. Raises: ToolError."""
    line = synthesizer.line(text, synthesizer.prompt(prompt), "--text")
    started = time.perf_counter()
    spoken, waveform = next(synthesizer.speak([line], sampling))
    seconds = time.perf_counter() - started
    if not spoken.codes:
        raise ToolError("the model stopped before the first code: it is not trained far enough for this text")
    picture = write_sound(synthesizer, waveform, output)
    cut = "" if spoken.stopped else ", cut off: the model did not stop before the greatest length"
    info(f"“{line.text}”: {len(spoken.codes)} codes{cut}, "
         f"{speed(len(waveform) / synthesizer.codec.config.sample_rate, seconds)} -> {output}, {picture}")


def given_lines(synthesizer: Synthesizer, text_file: Path, prompt: Path) -> dict[str, Line]:
    """The lines of a text file by their numbers. Raises: ToolError."""
    voice = synthesizer.prompt(prompt)
    return {f"{number:04d}": synthesizer.line(text, voice, f"{text_file}, line {number}")
            for number, text in enumerate(read_lines(text_file), 1) if text.strip()}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, empty ones too. Raises: ToolError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ToolError(f"{path}: not UTF-8 text at byte {error.start}. Save it as UTF-8") from error
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}. --text-file is a text file with one line to speak per line"
                        ) from error
    if not any(line.strip() for line in lines):
        raise ToolError(f"{path}: holds no line to speak. Write one per line")
    return lines


def made_with(synthesizer: Synthesizer, line: Line, sampling: Sampling) -> str:
    """Equal for two lines only if they sound the same."""
    prompt = [getattr(line.prompt, name).numpy().tobytes() for name in ("condition", "emo_vec", "statistics")]
    settings = json.dumps([synthesizer.digest, line.text, asdict(sampling)])
    return hashlib.sha256(settings.encode() + b"".join(prompt)).hexdigest()


def holds_sound(path: Path) -> bool:
    """Whether a WAV file has more than its header: after a power cut it may be empty."""
    try:
        return path.stat().st_size > 44
    except OSError:
        return False


def speak_into(folder: Path, synthesizer: Synthesizer, lines: dict[str, Line], sampling: Sampling
               ) -> list[dict[str, Any]]:
    """Speaks lines, by file name, into folder/NAME.wav with its picture, and lists them in folder/spoken.jsonl.

    Lines that the folder already has, made with the same checkpoint, prompt and settings, are left as they are. What it
    has of other ones is taken off the list first: its files are about to be replaced. A line without a single code gets
    no files. Returns the rows of spoken.jsonl. Raises: ToolError.
    """
    listing = folder / "spoken.jsonl"
    wanted = {name: made_with(synthesizer, line, sampling) for name, line in lines.items()}
    rows: dict[str, dict[str, Any]] = {}
    if listing.exists():
        found = read_jsonl(listing, ["name", "made_with", "codes"], f"Delete {listing} to speak everything anew")
        rows = {row["name"]: row for row in found if wanted.get(row["name"]) == row["made_with"]
                and (not row["codes"] or holds_sound(folder / f"{row['name']}.wav"))}
        with writing_to(folder):
            if not rows:
                listing.unlink()
            elif len(rows) < len(found):
                write_jsonl(listing, rows.values())
    missing = [name for name in lines if name not in rows]
    if len(missing) < len(lines):
        info(f"{len(lines) - len(missing)} of {len(lines)} lines are there already")
    progress, total, started = Progress("speaking", len(missing)), 0.0, time.perf_counter()
    sounds = synthesizer.speak([lines[name] for name in missing], sampling)
    for done, (name, (spoken, waveform)) in enumerate(zip(missing, sounds, strict=True), 1):
        if spoken.codes:
            write_sound(synthesizer, waveform, folder / f"{name}.wav")
        seconds = len(waveform) / synthesizer.codec.config.sample_rate
        total += seconds
        rows[name] = {"name": name, "text": lines[name].text, "codes": len(spoken.codes), "stopped": spoken.stopped,
                      "seconds": round(seconds, 3), "made_with": wanted[name]}
        if done % LINES_AT_ONCE == 0 or done == len(missing):
            with writing_to(folder):
                write_jsonl(listing, [rows[name] for name in lines if name in rows])
        progress.update(done)
    if missing:
        info(f"{len(missing)} lines: {speed(total, time.perf_counter() - started)} -> {folder}")
    return [rows[name] for name in lines]


def synthesize_file(synthesizer: Synthesizer, text_file: Path, prompt: Path, folder: Path, sampling: Sampling) -> None:
    """Every line of a text file into a folder, named after its line number. Raises: ToolError."""
    rows = speak_into(folder, synthesizer, given_lines(synthesizer, text_file, prompt), sampling)
    cut_off = [row["name"] for row in rows if not row["stopped"]]
    if cut_off:
        warn(f"cut off, since the model did not stop before the greatest length: {', '.join(cut_off)}")
    silent = [row["name"] for row in rows if not row["codes"]]
    if silent:
        raise ToolError(f"the model stopped before the first code of {', '.join(silent)}: it is not trained far enough "
                        "for these lines. The others are spoken")


# Watching a training


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever a file is replaced or written to; None while there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def has_long_prompt(row: dict[str, Any]) -> bool:
    """Whether a manifest row's prompt is long enough to speak in its voice; training takes shorter ones too."""
    return row.get("prompt_duration", math.inf) >= SHORTEST_PROMPT


def validation_lines(synthesizer: Synthesizer) -> list[Line]:
    """WATCHED_SENTENCES of the run's validation rows, evenly spaced, in the voices of their prompts' recordings."""
    lines: list[tuple[str, Path]] = []
    for manifest in synthesizer.checkpoint["manifests"]["val"]:
        path = Path(manifest["path"])
        rows = read_jsonl(path, ["target_text"], "Start in the folder in which the training was started")
        found = [(row["target_text"], path.parent / row.get("prompt_audio_path", "")) for row in rows
                 if has_long_prompt(row)]
        lines += [(text, prompt) for text, prompt in found if prompt.is_file()]
    if not lines:
        raise ToolError(f"{path}: no row names a prompt recording that exists and has {SHORTEST_PROMPT} s of sound. "
                        "Give --text-file and --prompt")
    count = min(WATCHED_SENTENCES, len(lines))
    chosen = [lines[i * len(lines) // count] for i in range(count)]
    return [synthesizer.line(text, synthesizer.prompt(prompt), str(prompt)) for text, prompt in chosen]


def speak_checkpoint(synthesizer: Synthesizer, lines: Sequence[Line], folder: Path, sampling: Sampling) -> None:
    """Sound, picture and text of every line into TensorBoard events in `folder`, unless this checkpoint's are there."""
    from torch.utils.tensorboard import SummaryWriter

    step, listing = synthesizer.checkpoint["step"], folder / "spoken.jsonl"
    spoken = read_jsonl(listing, ["step", "made_with"], f"Delete {listing}") if listing.exists() else []
    mark = hashlib.sha256("".join(made_with(synthesizer, line, sampling) for line in lines).encode()).hexdigest()
    if mark in [row["made_with"] for row in spoken]:
        return
    rate, started = synthesizer.codec.config.sample_rate, time.perf_counter()
    sounds = [waveform for _, waveform in synthesizer.speak(lines, sampling)]
    seconds = time.perf_counter() - started
    threading.excepthook = ignore_os_errors  # the writer's thread; flush reports what it met
    with writing_to(folder):
        # What was shown for this step and later ones is out of date: the run has gone back.
        writer = SummaryWriter(str(folder), purge_step=step)
        for number, (line, waveform) in enumerate(zip(lines, sounds, strict=True), 1):
            writer.add_text(f"sentence_{number}", line.text, step)
            if len(waveform):
                writer.add_audio(f"sentence_{number}", waveform[None], step, rate)
                image = mel_image([(f"step {step}", synthesizer.codec.log_mel(waveform))])
                writer.add_image(f"sentence_{number}", np.array(image), step, dataformats="HWC")
        writer.flush()
        writer.close()
        write_jsonl(listing, [*spoken, {"step": step, "made_with": mark}])
    silent = sum(not len(waveform) for waveform in sounds)
    note = f", {silent} silent: the model stopped before the first code" if silent else ""
    info(f"step {step}: {len(lines)} sentences{note}, {speed(sum(map(len, sounds)) / rate, seconds)} -> {folder}")


def watch(args: argparse.Namespace, sampling: Sampling) -> None:
    """Speaks latest.pth whenever it changes, until the run has finished. Raises: ToolError."""
    output_dir, latest = args.watch, args.watch / LATEST
    if not output_dir.is_dir():
        raise ToolError(f"{output_dir}: no such directory. Start the training first, or correct the path")
    info(f"watching {latest}; Ctrl+C ends it")
    seen = None
    while True:
        at_end = read_last_exit(output_dir).get("reason") == "finished"  # a run that was stopped may be resumed
        found = signature(latest)  # in this order, so that no checkpoint is missed
        if found and found != seen:
            seen = found
            try:
                synthesizer = Synthesizer(latest, args.codec, args.tokenizer)
            except UnreadableCheckpoint as error:  # half copied, or replaced while it was read
                if at_end:
                    raise
                info(f"{error}. Waiting for the next one")
                continue
            lines = (list(given_lines(synthesizer, args.text_file, args.prompt).values()) if args.text_file
                     else validation_lines(synthesizer))
            speak_checkpoint(synthesizer, lines, output_dir / synthesizer.checkpoint["run_dir"] / "voice", sampling)
        elif at_end:
            info("the training has finished")
            return
        else:
            time.sleep(POLL_SECONDS)


# The command line

MODES = {"watch": [], "text_file": ["output_dir", "checkpoint", "prompt"], "text": ["output", "checkpoint", "prompt"]}


def flag_problem(args: argparse.Namespace) -> str:
    """What is wrong with the choice of flags, or an empty string."""
    def flags(names: Sequence[str]) -> str:
        return " and ".join("--" + name.replace("_", "-") for name in names)

    given = [name for name in ("watch", "text_file", "text", "output_dir", "output", "checkpoint", "prompt")
             if getattr(args, name) is not None]
    mode = next((name for name in MODES if name in given), None)
    if mode is None:
        return "nothing to speak: give --text, --text-file or --watch"
    missing = [name for name in MODES[mode] if name not in given]
    if mode == "watch" and ("text_file" in given) != ("prompt" in given):
        missing = ["prompt" if "text_file" in given else "text_file"]
    if missing:
        return f"{flags(given)}: {flags(missing)} must be given too"
    surplus = [name for name in given if name not in [mode, *MODES[mode]]]
    surplus = [name for name in surplus if mode != "watch" or name not in ("text_file", "prompt")]
    return f"{flags(surplus)} cannot be combined with {flags([mode])}" if surplus else ""


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--checkpoint", type=Path, help="best.pth, latest.pth or a model_step file")
    parser.add_argument("--prompt", type=Path, help="a recording of the voice to speak in")
    parser.add_argument("--text", help="Amharic text to speak")
    parser.add_argument("--output", type=Path, help="WAV file; the picture goes beside it as .png")
    parser.add_argument("--text-file", type=Path, help="UTF-8, one text per line")
    parser.add_argument("--output-dir", type=Path, help="gets the lines' files")
    parser.add_argument("--watch", type=Path, metavar="OUTPUT_DIR",
                        help="a training's output directory; --text-file and --prompt replace the validation sentences")
    parser.add_argument("--codec", type=Path, default=Path("processed_data/speech_codec.pt"),
                        help="the one that the training data was made with (processed_data/speech_codec.pt)")
    parser.add_argument("--tokenizer", type=Path, help="the checkpoint's, unless it was moved")
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    problem, sampling = flag_problem(args), sampling_of(args)
    if problem:
        raise ToolError(problem)
    if args.output and args.output.suffix != ".wav":
        raise ToolError(f"--output {args.output}: must end in .wav")
    if args.watch:
        watch(args, sampling)
        return
    synthesizer = Synthesizer(args.checkpoint, args.codec, args.tokenizer)
    if args.text_file:
        synthesize_file(synthesizer, args.text_file, args.prompt, args.output_dir, sampling)
    else:
        synthesize(synthesizer, args.text, args.prompt, args.output, sampling)


if __name__ == "__main__":
    run_program(main)
