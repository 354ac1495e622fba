"""Says in numbers whether a checkpoint says the right thing, on validation texts.

A small recogniser is trained once, in minutes, and kept: it writes down the letters that it hears. Its letter error
rate (CER) on

  (a) true recordings      what its own mistakes cost
  (b) codec round trip     and what the codec costs: no checkpoint can be expected to do better
  (c) synthesis            what the checkpoint says by itself, from the text and a prompt

is the share of letters that are wrong, missing or too many. All three are heard as waveforms, (b) and (c) through the
same codec and vocoder. The recogniser learns from the codec's decodings of all training codes: those ship with every
data set, so (b) and (c) sound like what it learned from, and (a) proved easier for it still. With IndexTTS2's sound
(--model-dir) it learns from the training recordings, and (b) is the true codes with the checkpoint's latents. Letters
that sound alike count as equal, spaces and punctuation make no sound.

Beside that, the synthesis is compared with 12 round trips of the same voice, the true text's and the 11 nearest to it
in length, by mel-cepstral distortion after dynamic time warping (MCD): the true one should be the nearest, rank 1.

Texts all of whose words are new, in no training text, are taken first. The same command again goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from tools._common import (
    Progress,
    ToolError,
    info,
    make_parser,
    read_jsonl,
    run_program,
    write_text,
    writing_to,
)
from tools.amharic_text import TEXT_RULES, letters_of
from tools.codes_to_sound import SHORTEST_PROMPT, SoundDecoder, add_sound_arguments, sound_of
from tools.generation import Synthesizer, add_base_argument, add_sampling_arguments, has_long_prompt, sampling_of
from tools.made_with import OF_SOUND, of_checkpoint, of_manifest, require_same
from tools.recogniser import FORMAT, Recogniser, error_rate, read_recogniser, train_recogniser
from tools.recordings import read_recordings
from tools.sound_files import load_recording, write_wav
from tools.speech_codec import cosine_basis
from tools.synthesize import speak_into
from tools.text_rules import language_of, rules_of
from trainers.train_gpt_v2 import use_glibc_heap

FIRST_COMMAND = ("python -m tools.evaluate_voice --checkpoint demo_output/training/best.pth "
                 "--output-dir build/evaluation")
MOST_CODES = 600_000  # of the training data; a longer one is thinned out evenly
CANDIDATES = 12
CEPSTRA = 13
KINDS = ("true", "round_trip", "synthesis")
RESULTS = "results.json"  # in --output-dir


# The data set


class VoiceData:
    """Manifests, codes and recordings of a data set, and the SoundDecoder that they are for."""

    def __init__(self, folder: Path, sound: SoundDecoder, recordings: Path | None) -> None:
        """Raises: ToolError when something is missing or damaged."""
        self.folder, self.sound, self.recordings = folder, sound, {}
        self.made_with, self.config = of_manifest(folder / "train_pairs.jsonl"), folder / "config.yaml"
        self.rules = rules_of(self.made_with, str(self.config))
        require_same(str(self.config), self.made_with, sound.flag, sound.record,
                     remedy=f"{sound.remedy}, or the folder of the data that it belongs to as --data-dir")
        keys = ["target_id", "target_text", "target_codes_path", "target_code_len", "prompt_id", "speaker"]
        self.train, self.val = (read_jsonl(folder / f"{split}_pairs.jsonl", keys, "`python -m tools.build_pairs` "
                                           "writes it") for split in ("train", "val"))
        if recordings:
            found = read_recordings(recordings, ["id", "audio"], "`python -m tools.speak` writes such a file")
            self.recordings = {row["id"]: recordings.parent / row["audio"] for row in found}
        self.arrays: dict[Path, np.ndarray] = {}

    def recording(self, row: dict[str, Any], part: str) -> Path | None:
        """The file of a row's "target" or "prompt", if there is one."""
        named = row.get(f"{part}_audio_path")
        path = self.recordings.get(row[f"{part}_id"]) or (self.folder / named if named else None)
        return path if path and path.is_file() else None

    def prompt(self, row: dict[str, Any]) -> Path:
        """Raises: ToolError when the prompt's recording is missing."""
        path = self.recording(row, "prompt")
        if not path:
            raise ToolError(f"{self.folder}: the recording of prompt {row['prompt_id']!r} is missing. Give the "
                            "recordings.jsonl that names it as --recordings")
        return path

    def codes(self, row: dict[str, Any]) -> Tensor:
        """A row's true codes, int64. Raises: ToolError when their file is damaged or too short."""
        path, start = self.folder / row["target_codes_path"], row.get("target_codes_start") or 0
        try:
            if path not in self.arrays:
                self.arrays[path] = np.load(path, mmap_mode="r")
            codes = self.arrays[path][start : start + row["target_code_len"]].astype(np.int64)
        except (OSError, ValueError, EOFError) as error:
            raise ToolError(f"{path}: not a readable .npy file of codes. Preprocess again") from error
        if len(codes) < row["target_code_len"] or codes.max() >= self.sound.record["num_codes"]:
            raise ToolError(f"{path}: does not hold the codes of {row['target_id']!r} in {self.sound.flag}. "
                            f"Preprocess again. {self.sound.remedy}")
        return torch.from_numpy(codes)

    def training_rows(self) -> list[dict[str, Any]]:
        """All of them, or every n-th of a large data set."""
        return self.train[:: math.ceil(sum(row["target_code_len"] for row in self.train) / MOST_CODES)]

    def mels_to_learn_from(self, rows: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Log-mels [frames, n_mels] of the rows' speech, in half precision."""
        return self.sound.mels_to_learn_from([self.codes(row) for row in rows], [self.prompt(row) for row in rows],
                                             [self.recording(row, "target") for row in rows])


def said_in(row: dict[str, Any], rules: int) -> str:
    """The letters of a row's text that can be heard; `rules` are the text rules of its data set."""
    return letters_of(row["target_text"], language_of(row), rules)


def choose_rows(val: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]], count: int, rules: int = TEXT_RULES
                ) -> tuple[list[dict[str, Any]], int]:
    """`count` validation rows of different texts, evenly spaced, and how many of them have only unseen words.

    Texts without a letter that can be heard are left out.
    """
    known = {word for row in train for word in words_of(row)}
    different = list({row["target_text"]: row for row in val if said_in(row, rules)}.values())
    new = [row for row in different if not known.intersection(words_of(row))]
    rest = [row for row in different if known.intersection(words_of(row))]
    chosen = spread(new, count) + spread(rest, max(0, count - len(new)))
    return chosen, min(count, len(new))


def words_of(row: dict[str, Any]) -> set[str]:
    """Without punctuation, which every language has of its own."""
    return set("".join(" " if unicodedata.category(c)[0] == "P" else c for c in row["target_text"]).split())


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` of the rows, or all if there are fewer, evenly spaced."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


def obtain_recogniser(path: Path, data: VoiceData) -> Recogniser:
    """The recogniser of the data's training rows and codec: read, trained to its end, or trained. Raises: ToolError."""
    rows = data.training_rows()
    texts = [said_in(row, data.rules) for row in rows]
    made_with = hashlib.sha256(f"{data.sound.digest} {[(row['target_id'], row['target_code_len']) for row in rows]} "
                               f"{texts}".encode()).hexdigest()
    state = read_recogniser(path, made_with) or {
        "format": FORMAT, "made_with": made_with, "letters": "".join(sorted(set("".join(texts)))), "done": 0,
        "complete": False}
    torch.manual_seed(0)
    recogniser = Recogniser(state["letters"], data.sound.n_mels)
    if "weights" in state:
        recogniser.load_state_dict(state["weights"])
    if not state["complete"]:
        train_recogniser(recogniser, data.mels_to_learn_from(rows), texts, state["done"], path, state)
        info(f"recogniser of {len(rows)} clips -> {path}")
    return recogniser.eval().requires_grad_(False)


# Mel-cepstral distortion


def cepstra(mel: Tensor) -> np.ndarray:
    """Log-mel [frames, n_mels] -> [frames, CEPSTRA] in dB: the Euclidean distance of two rows is their MCD.

    10 sqrt(2) / ln 10 times the distance of the coefficients of cos(k w), k = 1 .. CEPSTRA (Kubichek 1993); loudness,
    k = 0, is left out.
    """
    n_mels = mel.shape[1]
    basis = cosine_basis(CEPSTRA + 1, n_mels, 0.0)[1:] * math.sqrt(2 / n_mels)
    return (10 * math.sqrt(2) / math.log(10) * (mel.float() @ basis.T)).numpy()


def dtw_distance(probe: np.ndarray, reference: np.ndarray) -> float:
    """Mean distance along the best time-warping path from probe [n, d] to reference [m, d].

    Sakoe and Chiba's symmetric form: a diagonal step counts twice, so every path weighs n + m. One anti-diagonal after
    the other.
    """
    n, m = len(probe), len(reference)
    squares = (probe**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * probe @ reference.T
    distances = np.sqrt(squares.clip(0))
    costs = np.full((n + m - 1, n), np.inf)  # [i + j, i]
    for i in range(n):
        costs[i : i + m, i] = distances[i]
    before, last = np.full(n, np.inf), np.full(n, np.inf)
    last[0] = 2 * costs[0, 0]
    for cost in costs[1:]:
        total = last + cost
        total[1:] = np.minimum(total[1:], last[:-1] + cost[1:])
        total[1:] = np.minimum(total[1:], before[:-1] + 2 * cost[1:])
        before, last = last, total
    return float(last[-1]) / (n + m)


def candidates_of(row: dict[str, Any], rows: Sequence[dict[str, Any]], rules: int = TEXT_RULES
                  ) -> list[dict[str, Any]]:
    """The row itself and the CANDIDATES - 1 rows of its voice and other texts that are nearest to it in length."""
    said = said_in(row, rules)
    same_voice = {other["target_id"]: other for other in rows if other["speaker"] == row["speaker"]}  # not its pairs
    nearest = sorted(same_voice.values(), key=lambda other: (
        abs(other["target_code_len"] - row["target_code_len"]), other["target_id"]))
    others = (other for other in nearest if said_in(other, rules) != said)
    return [row, *itertools.islice(others, CANDIDATES - 1)]


# Evaluation


def read_wav(path: Path) -> Tensor:
    """A WAV that this program wrote, [samples]."""
    try:
        return torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    except (OSError, soundfile.LibsndfileError) as error:
        raise ToolError(f"{path}: cannot be read as sound. Delete it, and it is spoken again") from error


def synthesised_mels(synthesizer: Synthesizer, data: VoiceData, rows: Sequence[dict[str, Any]], args: argparse.Namespace
                     ) -> list[Tensor]:
    """Log-mels [frames, n_mels] of what the checkpoint says; no frames where it stopped at once."""
    prompts = {path: synthesizer.prompt(path) for path in {data.prompt(row) for row in rows}}
    lines = {f"{number:04d}": synthesizer.line(row["target_text"], prompts[data.prompt(row)], row["target_id"],
                                               language_of(row)) for number, row in enumerate(rows, 1)}
    spoken = speak_into(args.output_dir, synthesizer, lines, sampling_of(args))
    return [data.sound.log_mel(read_wav(args.output_dir / f"{line['name']}.wav")) if line["codes"]
            else torch.zeros(0, data.sound.n_mels) for line in spoken]


def round_trips(synthesizer: Synthesizer, data: VoiceData, rows: Sequence[dict[str, Any]], kept: dict[str, Path]
                ) -> list[Tensor]:
    """Log-mels [frames, n_mels] of the rows' true codes as one can hear them: decoded to a waveform. Those of `kept`,
    by their ids, are written there."""
    mels, progress = [], Progress("decoding validation codes", len(rows))
    for done, row in enumerate(rows, 1):
        prompt = synthesizer.prompt(data.prompt(row))
        waveform = synthesizer.say_codes(data.codes(row), row["target_text"], prompt, row["target_id"],
                                         language_of(row))
        mels.append(data.sound.log_mel(waveform))
        if row["target_id"] in kept:
            write_wav(kept[row["target_id"]], waveform, data.sound.sample_rate)
        progress.update(done)
    return mels


def rank_of(mel: Tensor, row: dict[str, Any], data: VoiceData, round_trips: dict[str, np.ndarray]
            ) -> tuple[int, int, float]:
    """The true text's rank, out of how many, and its MCD in dB. Silence is the last of all."""
    names = [other["target_id"] for other in candidates_of(row, data.val, data.rules)]
    if not len(mel):
        return len(names), len(names), math.nan
    probe = cepstra(mel)
    true, *others = (dtw_distance(probe, round_trips[name]) for name in names)
    return 1 + sum(other <= true for other in others), len(names), float(true)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as plain values. Raises: ToolError."""
    data = VoiceData(args.data_dir, sound_of(args), args.recordings)
    rows, unseen = choose_rows(list(filter(has_long_prompt, data.val)), data.train, args.texts, data.rules)
    if not rows:
        raise ToolError(f"{args.data_dir}: no validation row has a text that can be heard and a prompt of at least "
                        f"{SHORTEST_PROMPT} s. Run tools.build_pairs with --min-prompt-seconds {SHORTEST_PROMPT}")
    synthesizer = Synthesizer(args.checkpoint, data.sound, args.tokenizer, args.base_checkpoint)
    require_same(str(args.checkpoint), of_checkpoint(synthesizer.checkpoint), str(data.config), data.made_with,
                 OF_SOUND)  # its texts are written anew, by the checkpoint's tokenizer
    synthesis = synthesised_mels(synthesizer, data, rows, args)
    recogniser = obtain_recogniser(args.recogniser, data)
    needed = {other["target_id"]: other for row in rows for other in candidates_of(row, data.val, data.rules)}
    names = {row["target_id"]: f"{number:04d}" for number, row in enumerate(rows, 1)}
    kept = {target: args.output_dir / f"{name}_codec.wav" for target, name in names.items()}
    of_true_codes = dict(zip(needed, round_trips(synthesizer, data, list(needed.values()), kept), strict=True))
    of_cepstra = {name: cepstra(mel) for name, mel in of_true_codes.items()}
    results = []
    progress = Progress("listening", len(rows))
    for done, (row, mel) in enumerate(zip(rows, synthesis, strict=True), 1):
        true = data.recording(row, "target")
        rank, of, mcd = rank_of(mel, row, data, of_cepstra)
        results.append({
            "name": names[row["target_id"]], "recording": str(true) if true else None,
            "id": row["target_id"], "text": row["target_text"], "said": said_in(row, data.rules),
            "true": recogniser.hear(data.sound.log_mel(load_recording(true, data.sound.sample_rate))) if true else None,
            "round_trip": recogniser.hear(of_true_codes[row["target_id"]]), "synthesis": recogniser.hear(mel),
            "rank": rank, "candidates": of, "mcd": None if math.isnan(mcd) else round(mcd, 3)})
        results[-1]["cer"] = {kind: round(error_rate([results[-1][kind]], [results[-1]["said"]]), 4)
                              for kind in KINDS if results[-1][kind] is not None}
        progress.update(done)
    return summary(results) | {"checkpoint": str(args.checkpoint), "step": synthesizer.checkpoint["step"],
                               "texts_of_unseen_words": unseen, "sampling": asdict(sampling_of(args)), "rows": results}


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """CER of each kind of sound, and how the ranks came out."""
    rates = {}
    for kind in KINDS:
        heard = [row for row in results if row[kind] is not None]
        rates[kind] = {"texts": len(heard), "cer": round(error_rate([row[kind] for row in heard], [
            row["said"] for row in heard]), 4) if heard else None}
    ranks, distances = [row["rank"] for row in results], [row["mcd"] for row in results if row["mcd"] is not None]
    return {**rates, "rank1": ranks.count(1) / len(ranks), "mean_rank": round(sum(ranks) / len(ranks), 3),
            "candidates": min(row["candidates"] for row in results),
            "mcd": round(sum(distances) / len(distances), 3) if distances else None}


def table(result: dict[str, Any]) -> str:
    names = {"true": "(a) true recordings", "round_trip": "(b) codec round trip", "synthesis": "(c) synthesis"}
    lines = [f"{'':22}{'texts':>6}{'CER':>9}"]
    for kind, name in names.items():
        cer = "-" if result[kind]["cer"] is None else f"{result[kind]['cer']:.4f}"
        lines.append(f"{name:22}{result[kind]['texts']:>6}{cer:>9}")
    lines.append(f"rank 1 in {result['rank1']:.3f} of the texts, mean rank {result['mean_rank']:.2f} of "
                 f"{result['candidates']}, MCD {result['mcd'] or math.nan:.2f} dB")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth, latest.pth or a model_step file")
    parser.add_argument("--output-dir", type=Path, required=True,
                        help="gets the spoken texts (NNNN.wav) and the codec's round trips (NNNN_codec.wav)")
    parser.add_argument("--data-dir", type=Path, default=Path("processed_data"),
                        help="holds train_pairs.jsonl and val_pairs.jsonl (processed_data)")
    add_sound_arguments(parser, "the data")
    parser.add_argument("--tokenizer", type=Path, help="the checkpoint's, unless it was moved")
    add_base_argument(parser)
    parser.add_argument("--recordings", type=Path, help="recordings.jsonl, if the manifests do not name the recordings")
    parser.add_argument("--recogniser", type=Path, default=Path("build/recogniser.pt"),
                        help="trained when it is not there (build/recogniser.pt)")
    parser.add_argument("--texts", type=int, default=100, help="validation texts to judge (100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"all results, text by text (OUTPUT_DIR/{RESULTS})")
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    if args.texts < 1:
        raise ToolError(f"--texts {args.texts}: give 1 or more")
    use_glibc_heap()
    result = evaluate(args)
    info(f"{args.checkpoint}, step {result['step']}; {result['texts_of_unseen_words']} of {len(result['rows'])} texts "
         "have no word of the training texts")
    print(table(result), flush=True)
    path = args.json or args.output_dir / RESULTS
    with writing_to(path.parent):
        write_text(path, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
