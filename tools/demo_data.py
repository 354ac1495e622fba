"""Rebuilds the demo set: texts, recordings, codec, tokenizer, arrays, pairs, in one go (`make demo-data`).

Everything large stays in the work folder; processed_data/ and tokenizers/ get what ships. espeak-ng must be installed.
Unchanged inputs on the same machine and versions give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import yaml

from tools import amharic_text, preprocess, speak, speech_codec, train_tokenizer
from tools._common import (
    ToolError,
    atomic_path,
    info,
    make_parser,
    read_jsonl,
    run_program,
    sha256_of,
    write_jsonl,
    write_text,
)
from tools.amharic_text import TEXT_RULES
from tools.build_pairs import UTTERANCE_KEYS, build_pairs
from tools.speech_codec import codec_record
from tools.text_rules import record_path
from tools.train_tokenizer import load_tokenizer

FIRST_COMMAND = ("python -m tools.demo_data --quick --sequences 200 --decoder-steps 50 "
                 "--work-dir build --output-dir build/data --tokenizer-dir build")
TOKENIZER_NAME = "amharic_extended_bpe.model"
HELD_OUT_RECORDINGS = 12


def run_steps(args: argparse.Namespace) -> None:
    """The pipeline as its users would type it, every step into the work folder."""
    work, sources = args.work_dir, args.sources
    quick = ["--validation-texts", "20", "--held-out-words", "48"] if args.quick else []
    codec = ["--num-codes", "64", "--kmeans-iterations", "5"] if args.quick else []
    steps: list[tuple[Any, list[str | Path]]] = [
        (amharic_text, ["build", "--sources", sources, "--output-dir", work, "--sequences", args.sequences, *quick]),
        (speak, ["--texts", work / "texts.jsonl", "--output-dir", work / "recordings"]),
        (train_tokenizer, ["--texts", work / "texts.jsonl", "--output", work / TOKENIZER_NAME]),
        (speech_codec, ["train", "--recordings", work / "recordings/recordings.jsonl", "--output",
                        work / "speech_codec.pt", "--steps", args.decoder_steps, *codec]),
        (preprocess, ["--recordings", work / "recordings/recordings.jsonl", "--codec", work / "speech_codec.pt",
                      "--tokenizer", work / TOKENIZER_NAME, "--output-dir", work / "arrays"]),
    ]
    for module, arguments in steps:
        argv = [str(argument) for argument in arguments]
        info(f"python -m {module.__name__} {' '.join(argv)}")
        module.main(argv)


def choose_held_out_recordings(utterances: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` validation recordings to ship, evenly spaced, so that every speaker and kind of text is among them."""
    validation = [row for row in utterances if row["split"] == "val"]
    validation.sort(key=lambda row: (row["speaker"], row["id"]))
    return [validation[i * len(validation) // count] for i in range(min(count, len(validation)))]


def ship_recordings(rows: Sequence[dict[str, Any]], arrays: Path, output: Path) -> set[str]:
    """Writes these rows' recordings as FLAC, names the copies in the rows' "audio", returns those names."""
    names = set()
    for row in rows:
        waveform, sample_rate = soundfile.read(arrays / row["audio"], dtype="int16")
        row["audio"] = f"audio/{row['id']}.flac"
        with atomic_path(output / row["audio"]) as temporary:
            soundfile.write(temporary, waveform, sample_rate, format="FLAC", subtype="PCM_16")
        names.add(row["audio"])
    return names


def data_config(codec_path: Path, tokenizer: Path, utterances: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """config.yaml: the model (`gpt:`, IndexTTS2's names) and what the data was made with (`dataset:`)."""
    codec = speech_codec.SpeechCodec.load(codec_path)
    codes = codec.config.num_codes
    return {
        "gpt": {
            "model_dim": 256, "layers": 4, "heads": 4, "max_text_tokens": 200, "max_mel_tokens": 400,
            "number_text_tokens": load_tokenizer(tokenizer).get_piece_size(), "number_mel_codes": codes + 2,
            "start_mel_token": codes, "stop_mel_token": codes + 1, "start_text_token": 0, "stop_text_token": 1,
            "mel_length_compression": codec.config.samples_per_code,
        },
        "dataset": {
            "name": "Amharic words in a synthetic voice",
            "tokenizer": TOKENIZER_NAME, "codec": codec_path.name,
            **codec_record(codec_path, codec), "tokenizer_sha256": sha256_of(tokenizer), "text_rules": TEXT_RULES,
            "sample_rate": codec.config.sample_rate,
            "speakers": sorted({row["speaker"] for row in utterances}),
            "recorded_by": "espeak-ng, Amharic voice: speech synthesis, not a human voice",
            "licences": {
                "udhr_am.txt": "Universal Declaration of Human Rights, United Nations: free to reproduce",
                "words_am.txt": "GNU Aspell Amharic word list: public domain",
                "names_am.txt": "Unicode CLDR: Unicode-3.0",
                "recordings": "made by this project, under its licence",
            },
        },
    }


def ship(args: argparse.Namespace) -> None:
    """From the work folder to the output and tokenizer folders."""
    arrays, output = args.work_dir / "arrays", args.output_dir
    utterances = read_jsonl(arrays / "utterances.jsonl", UTTERANCE_KEYS, "Run `make demo-data` again")
    shipped = [row for row in utterances if "condition_start" in row]
    shipped += choose_held_out_recordings(utterances, HELD_OUT_RECORDINGS)
    names = ship_recordings(shipped, arrays, output)
    for stale in set((output / "audio").glob("*.flac")) - {output / name for name in names}:
        stale.unlink()
    for split in ("train", "val"):
        rows = build_pairs(utterances, split, pairs_per_target=1, seed=1234, shipped=names)
        write_jsonl(output / f"{split}_pairs.jsonl", rows)
        info(f"{len(rows)} pairs -> {output / f'{split}_pairs.jsonl'}")
    copies = [(arrays / f"{name}.npy", output) for name in ("codes", "text_ids", "condition", "emo_vec")]
    copies += [(args.work_dir / "speech_codec.pt", output), (args.work_dir / "held_out_words.txt", output)]
    tokenizer = args.work_dir / TOKENIZER_NAME
    copies += [(tokenizer, args.tokenizer_dir), (record_path(tokenizer), args.tokenizer_dir)]
    for source, folder in copies:
        with atomic_path(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
    config = data_config(output / "speech_codec.pt", args.tokenizer_dir / TOKENIZER_NAME, utterances)
    write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--work-dir", type=Path, default=Path("demo_data_work"),
                        help="gets everything large: recordings, all arrays (demo_data_work)")
    parser.add_argument("--sources", type=Path, default=Path("processed_data/sources"),
                        help="folder with udhr_am.txt, words_am.txt and names_am.txt (processed_data/sources)")
    parser.add_argument("--output-dir", type=Path, default=Path("processed_data"),
                        help="gets the arrays, pairs, codec and config.yaml that ship (processed_data)")
    parser.add_argument("--tokenizer-dir", type=Path, default=Path("tokenizers"),
                        help=f"gets {TOKENIZER_NAME} and its record (tokenizers)")
    parser.add_argument("--sequences", type=int, default=11_500,
                        help="random word sequences beside phrases and names (11500)")
    parser.add_argument("--decoder-steps", type=int, default=3000, help="training steps of the codec's decoder (3000)")
    parser.add_argument("--quick", action="store_true", help="a tiny codec and validation set, to try the pipeline")
    args = parser.parse_args(argv)
    if args.quick and args.output_dir.resolve() == Path("processed_data").resolve():
        raise ToolError("--quick would replace the shipped processed_data. Give --output-dir and --tokenizer-dir")
    run_steps(args)
    ship(args)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    info(f"{size / 1e6:.1f} MB in {args.output_dir}, tokenizer in {args.tokenizer_dir}")


if __name__ == "__main__":
    run_program(main)
