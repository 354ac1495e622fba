"""The newcomer's walk (`make demo`): train a speech GPT on Amharic, kill it, resume it exactly, hear what it learned.

Everything goes into demo_output/, which is made anew. Runs on a CPU; four to eight minutes on two cores.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools._common import ToolError, info, make_parser, read_jsonl, run_program, write_jsonl
from tools.mel_picture import mel_picture
from tools.sound_files import load_recording, write_wav
from tools.speech_codec import SpeechCodec

FIRST_COMMAND = "python -m tools.demo"
ROOT = Path(__file__).resolve().parent.parent
DATA = Path("processed_data")
NEW_WORDS = "new"  # ids of the validation rows whose every word is unseen in training start so
MODEL_FLAGS = ["--batch-size", "24", "--grad-accumulation", "1", "--learning-rate", "1.5e-3", "--dropout", "0"]


def trainer_command(*flags: object) -> list[str]:
    return [sys.executable, "trainers/train_gpt_v2.py", *map(str, flags)]


def run_trainer(command: Sequence[str], on_line: Callable[[str, subprocess.Popen[str]], None] | None = None) -> int:
    """Runs the trainer, shows its lines, and hands each to on_line. Returns the exit status."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                if on_line:
                    on_line(line, process)
        except KeyboardInterrupt:
            process.terminate()  # SIGTERM reached this process alone
            raise
    return process.returncode


def must_run(command: Sequence[str]) -> None:
    """Raises: ToolError when the command fails."""
    status = run_trainer(command)
    if status:
        raise ToolError(f"{' '.join(command[1:])} ended with status {status}. Its lines above say why")


def newest_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl."""
    path = max(output_dir.glob("logs/run_*/metrics.jsonl"))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def faster_precision(output: Path) -> list[str]:
    """Times a few training steps in fp32 and bf16; returns the faster one's flags."""
    rates = {}
    for name, flags in (("fp32", ["--amp", "off"]), ("bf16", ["--amp", "bf16"])):
        folder = output / f"timing_{name}"
        must_run(trainer_command(*MODEL_FLAGS, *flags, "--output-dir", folder, "--max-steps", 8, "--log-interval", 2,
                                 "--max-val-batches", 1))
        rates[name] = max(line["tokens_per_second"] for line in newest_metrics(folder) if line["kind"] == "train")
        shutil.rmtree(folder)
    best = max(rates, key=lambda name: rates[name])
    info("tokens per second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()) + f"; taking {best}")
    return ["--amp", "bf16"] if best == "bf16" else ["--amp", "off"]


def train_with_a_kill(output: Path, precision: Sequence[str], steps: int) -> tuple[int, int]:
    """Trains to the end with one SIGKILL on the way; returns (steps computed twice, of those with equal bits).

    The killed process had gone beyond its newest checkpoint, so the resumed one computes some steps again.
    """
    save_at = steps // 20 * 10  # a step whose line is printed, and some lines before the kill
    kill_at = save_at + max(10, min(40, steps // 40 * 10))
    command = trainer_command("--output-dir", output, *MODEL_FLAGS, *precision, "--max-steps", steps, "--log-interval",
                              10, "--val-interval", 100, "--save-interval", save_at, "--resume", "auto")
    info(" ".join(["python", *command[1:]]))

    def kill_when_due(line: str, process: subprocess.Popen[str]) -> None:
        if f" step={kill_at} " in line:
            process.send_signal(signal.SIGKILL)

    if run_trainer(command, kill_when_due) != -signal.SIGKILL:
        raise ToolError("the training ended before it could be killed. Its lines above say why")
    first = {(line["kind"], line["step"]): line for line in newest_metrics(output)}
    info(f"Killed with SIGKILL after step {kill_at}, last saved at step {save_at}. Now the same command again:")
    must_run(command)
    second = {(line["kind"], line["step"]): line for line in newest_metrics(output)}
    twice = [key for key in first if key[1] > save_at and key in second]
    fields = ("text_loss", "mel_loss", "mel_top1", "grad_norm", "lr")
    equal = sum(all(first[key].get(f) == second[key].get(f) for f in fields) for key in twice)
    info(f"Computed twice, before the kill and after the resume: {len(twice)} logged steps, {equal} equal in every bit")
    return len(twice), equal


def absolute_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose feature paths no longer depend on the manifest's folder."""
    paths = ("target_text_ids_path", "target_codes_path", "prompt_condition_path", "prompt_emo_vec_path")
    return [{**row, **{key: str((ROOT / DATA / row[key]).resolve()) for key in paths}} for row in rows]


def shuffle_texts(rows: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """The same rows, every one with the text of another one of the same voice."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    shuffled: list[dict[str, Any]] = [{} for _ in rows]
    for speaker in {row["speaker"] for row in rows}:
        same = [i for i in order if rows[i]["speaker"] == speaker]
        for i, other in zip(same, same[1:] + same[:1], strict=True):
            text = {key: value for key, value in rows[other].items() if key.startswith("target_text")}
            shuffled[i] = {**rows[i], **text}
    return shuffled


def top1_of(rows: Sequence[dict[str, Any]], name: str, output: Path, checkpoint: Path) -> float:
    """Share of codes that the checkpoint predicts right on these rows."""
    folder = output / "evaluation" / name
    manifest = folder / "pairs.jsonl"
    write_jsonl(manifest, absolute_rows(rows))
    found: list[float] = []

    def read_top1(line: str, process: object) -> None:
        if line.startswith("[Val]"):
            found.append(float(line.split("mel_top1=")[1]))

    command = trainer_command("--eval-only", "--resume", checkpoint, "--val-manifest", manifest, "--output-dir", folder)
    if run_trainer(command, read_top1) or not found:
        raise ToolError("the evaluation failed. Its lines above say why")
    return found[0]


def code_sequences(rows: Sequence[dict[str, Any]], start: int, stop: int) -> list[list[int]]:
    """Each row's codes between a start and a stop token, as the model is scored on them."""
    codes = np.load(DATA / "codes.npy", mmap_mode="r")
    return [[start, *codes[row["target_codes_start"] :][: row["target_code_len"]].tolist(), stop] for row in rows]


def bigram_top1(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> float:
    """Top-1 of the best guess that knows only the code before: each code's likeliest successor in training."""
    successors: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for sequence in train:
        for before, after in zip(sequence, sequence[1:], strict=False):
            successors[before][after] += 1
    likeliest = {before: counter.most_common(1)[0][0] for before, counter in successors.items()}
    pairs = [pair for sequence in held_out for pair in zip(sequence, sequence[1:], strict=False)]
    return sum(likeliest.get(before) == after for before, after in pairs) / len(pairs)


def shipped_rows(split: str) -> list[dict[str, Any]]:
    return read_jsonl(DATA / f"{split}_pairs.jsonl", ["id"], "Check out processed_data/ again")


def rows_of_new_words() -> list[dict[str, Any]]:
    return [row for row in shipped_rows("val") if row["id"].startswith(NEW_WORDS)]


def judge(output: Path, checkpoint: Path) -> None:
    """Prints the model's held-out top-1 beside what it must beat."""
    train, held_out = shipped_rows("train"), rows_of_new_words()
    codec = SpeechCodec.load(DATA / "speech_codec.pt")
    start, stop = codec.config.num_codes, codec.config.num_codes + 1
    sequences = code_sequences(train, start, stop)
    used = len({code for sequence in sequences for code in sequence[1:-1]})
    info(f"Held out: {len(held_out)} texts of words that no training text has; {used} of {codec.config.num_codes} "
         f"codes in use, {codec.config.codes_per_second:.1f} codes a second")
    right = top1_of(held_out, "held_out", output, checkpoint)
    shuffled = top1_of(shuffle_texts(held_out), "shuffled_texts", output, checkpoint)
    bigram = bigram_top1(sequences, code_sequences(held_out, start, stop))
    info(f"Next code right (top-1): the model {right:.3f}, the model given shuffled texts {shuffled:.3f}, "
         f"code bigrams {bigram:.3f}")


def speak(output: Path, checkpoint: Path) -> None:
    """Speaks one unseen sentence, beside its true recording and the codec's round trip of that."""
    row = next(row for row in rows_of_new_words() if row["target_audio_path"])
    codec = SpeechCodec.load(DATA / "speech_codec.pt")
    spoken, prompt = DATA / row["target_audio_path"], DATA / row["prompt_audio_path"]
    command = [sys.executable, "-m", "tools.synthesize", "--checkpoint", str(checkpoint), "--text", row["target_text"],
               "--prompt", str(prompt), "--greedy", "--output", str(output / "sentence_by_the_model.wav")]
    subprocess.run(command, cwd=ROOT, check=True)
    true = load_recording(spoken, codec.config.sample_rate)
    statistics = codec.mel_statistics(load_recording(prompt, codec.config.sample_rate))
    round_trip = codec.decode(codec.encode(true), statistics)
    write_wav(output / "sentence_by_the_codec.wav", round_trip, codec.config.sample_rate)
    write_wav(output / "sentence_true.wav", true, codec.config.sample_rate)
    model_sound = load_recording(output / "sentence_by_the_model.wav", codec.config.sample_rate)
    sounds = {"by the model, from text": model_sound, "by the codec, from the true codes": round_trip,
              "true recording": true}
    mel_picture([(title, codec.log_mel(sound)) for title, sound in sounds.items()], output / "sentence.png")


def where_to_look_next(output: Path) -> None:
    info(f"Listen:  {output}/sentence_by_the_model.wav (never seen in training), sentence_by_the_codec.wav, "
         "sentence_true.wav")
    info(f"Look:    {output}/sentence.png; tensorboard --logdir {output}/training/logs")
    info("Next:    python -m tools.synthesize --help speaks your own text; README.md and knowledge.md go on from here")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--steps", type=int, default=500, help="training steps (500)")
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"),
                        help="made anew; gets the runs, the sounds and the picture (demo_output)")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    output: Path = args.output_dir
    shutil.rmtree(output, ignore_errors=True)
    precision = faster_precision(output)
    twice, equal = train_with_a_kill(output / "training", precision, args.steps)
    checkpoint = output / "training" / "best.pth"
    judge(output, checkpoint)
    speak(output, checkpoint)
    where_to_look_next(output)
    if equal < twice:
        raise ToolError(f"{twice - equal} steps differed after the resume. Please report it with your CPU and versions")


if __name__ == "__main__":
    run_program(main)
