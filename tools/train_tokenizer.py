"""Trains a SentencePiece tokenizer on transcripts.

`--model-type char` (the demo) makes one piece of every Ethiopic letter; bpe or unigram make --vocab-size pieces.
Ids 0, 1, 2 are <s>, </s>, <unk>, as in the released IndexTTS2 tokenizer, where 0 and 1 start and stop the text. All
letters of the Amharic alphabet and the punctuation get a piece even if no transcript has them.

Beside --output a file with the ending .yaml records the model's sha256, the version of the text rules that its texts
were read by, and their languages: data made with this tokenizer is read by the same rules.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from tools._common import ToolError, atomic_path, info, make_parser, read_jsonl, run_program, text_fault, warn
from tools.amharic_text import PUNCTUATION, TEXT_RULES, read_aloud
from tools.text_rules import Tally, language_of, read_record, record_path, tokenizer_record

FIRST_COMMAND = "python -m tools.train_tokenizer --texts build/texts.jsonl --output build/tokenizer.model"


def amharic_letters() -> str:
    """The assigned letters of the basic Ethiopic block, ሀ to ፚ."""
    return "".join(chr(c) for c in range(0x1200, 0x135B) if unicodedata.category(chr(c)) == "Lo")


def train_tokenizer(texts: Sequence[str], model_type: str, vocab_size: int) -> bytes:
    """The bytes of a SentencePiece model. `texts` are normalised; `vocab_size` is ignored for characters."""
    buffer = io.BytesIO()
    size: dict[str, Any] = {"use_all_vocab": True} if model_type == "char" else {"vocab_size": vocab_size}
    longest = max(len(text.encode()) for text in texts)
    if longest > 4192:  # SentencePiece would drop what is longer, without a word
        size["max_sentence_length"] = longest
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=buffer, model_type=model_type, character_coverage=1.0,
            required_chars=amharic_letters() + PUNCTUATION, bos_id=0, eos_id=1, unk_id=2, pad_id=-1, num_threads=1,
            minloglevel=2, **size,
        )
    except RuntimeError as error:
        raise ToolError(f"SentencePiece cannot train a {model_type} model of {vocab_size} pieces: "
                        f"{str(error).splitlines()[-1].strip()} Change --vocab-size or give more text") from error
    return buffer.getvalue()


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Reads a SentencePiece model. Raises ToolError when it is missing, broken, or its ids 0, 1, 2 differ from ours."""
    if not Path(path).is_file():
        raise ToolError(f"{path}: no such tokenizer. `python -m tools.train_tokenizer` writes one")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ToolError(f"{path}: not a SentencePiece model. `python -m tools.train_tokenizer` writes one") from error
    ids = (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if ids != (0, 1, 2):
        raise ToolError(f"{path}: <s>, </s>, <unk> have ids {ids}, not (0, 1, 2), so an unknown letter would read as a "
                        "start or stop of the text. Train the tokenizer with `python -m tools.train_tokenizer`")
    return tokenizer


def read_texts(path: Path) -> list[dict[str, Any]]:
    """Rows with a text: JSON lines, or the lines of a .txt file. Raises: ToolError naming file and line."""
    if path.suffix.lower() != ".txt":
        return read_jsonl(path, ["text"], 'Each line is an object such as {"id": "1", "text": "ሰላም"}', text_fault)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ToolError(f"{path}: not UTF-8 text at byte {error.start}. Save it as UTF-8, one text a line") from error
    return [{"text": line} for line in lines if line.strip()]


def check_output(path: Path) -> None:
    """Raises: ToolError where the record would take the place of another file."""
    record = record_path(path)
    if record == path:
        raise ToolError(f"--output {path}: the ending .yaml is for the tokenizer's record. Give another, such as "
                        f"{path.with_suffix('.model')}")
    if record.exists() and not read_record(path):
        raise ToolError(f"--output {path}: its record would replace {record}, which is none. Give another name")


def texts_to_learn(rows: Sequence[dict[str, Any]], default: str) -> tuple[list[str], set[str]]:
    """The training rows' texts as they are spoken, and their languages (`default` where a row names none)."""
    texts, languages, tally = [], set(), Tally()
    for row in rows:
        if row.get("split", "train") == "train":
            language = language_of({"language": default} | row)
            reading = read_aloud(row["text"], language, TEXT_RULES)
            texts.append(reading.text)
            languages.add(language)
            tally.add(reading)
    for line in tally.lines():
        warn(line)
    return texts, languages


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--texts", type=Path, required=True,
                        help="JSON lines with text, of which split val is left out; or .txt, a text a line")
    parser.add_argument("--output", type=Path, required=True, help="the SentencePiece model to write")
    parser.add_argument("--language", default="am", help="of texts whose rows name none (am)")
    parser.add_argument("--model-type", choices=["char", "bpe", "unigram"], default="char",
                        help="char: a piece is a letter; bpe and unigram: a piece is some letters long (char)")
    parser.add_argument("--vocab-size", type=int, default=2000, help="pieces of bpe and unigram models (2000)")
    args: argparse.Namespace = parser.parse_args(argv)
    check_output(args.output)
    rows = read_texts(args.texts)
    texts, languages = texts_to_learn(rows, args.language)
    if not any(texts):
        raise ToolError(f"{args.texts}: holds no text to learn from; of {len(rows)} rows {len(texts)} are for training "
                        '(split "train", or no split). Add some')
    model = train_tokenizer(texts, args.model_type, args.vocab_size)
    with atomic_path(args.output) as temporary, atomic_path(record_path(args.output)) as record:
        temporary.write_bytes(model)
        record.write_text(tokenizer_record(hashlib.sha256(model).hexdigest(), TEXT_RULES, languages), encoding="utf-8")
    info(f"{load_tokenizer(args.output).get_piece_size()} pieces from {len(texts)} texts -> {args.output}")


if __name__ == "__main__":
    run_program(main)
