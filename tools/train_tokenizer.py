"""Trains a SentencePiece tokenizer on transcripts.

`--model-type char` (the demo) makes one piece of every Ethiopic letter; bpe or unigram make --vocab-size pieces.
Ids 0, 1, 2 are <s>, </s>, <unk>, as in the released IndexTTS2 tokenizer, where 0 and 1 start and stop the text. All
letters of the Amharic alphabet and the punctuation get a piece even if no transcript has them.

--extend makes a released tokenizer (IndexTTS2's bpe.model) read Amharic: its ids, pieces and scores stay, and pieces of
letters that it lacks are appended up to --target-size. A text without such letters is cut as before, so that released
weights know what they read. Texts are then written as that model's front end expects: pauses as . and , and capital
letters.

Beside --output a file with the ending .yaml records the model's sha256, the version of the text rules that its texts
were read by, their languages, and what it extends: data made with this tokenizer is read by the same rules.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tools._common import (
    Progress,
    ToolError,
    atomic_path,
    info,
    make_parser,
    read_jsonl,
    run_program,
    text_fault,
    warn,
)
from tools.amharic_text import PUNCTUATION, TEXT_RULES, read_aloud
from tools.text_rules import INDEXTTS2, Tally, language_of, read_record, record_path, tokenizer_record, written_for

SPACE = "▁"
EXTENDABLE = {1: "unigram", 2: "bpe"}  # types of SentencePiece's models
FIRST_COMMAND = "python -m tools.train_tokenizer --texts build/texts.jsonl --output build/tokenizer.model"


def amharic_letters() -> str:
    """The assigned letters of the basic Ethiopic block, ሀ to ፚ."""
    return "".join(chr(c) for c in range(0x1200, 0x135B) if unicodedata.category(chr(c)) == "Lo")


def sentencepiece_model(texts: Sequence[str], model_type: str, required: str, **options: Any) -> bytes:
    """Trains SentencePiece. `required` characters get a piece. Raises: RuntimeError."""
    buffer = io.BytesIO()
    longest = max(len(text.encode()) for text in texts)
    if longest > 4192:  # SentencePiece would drop what is longer, without a word
        options["max_sentence_length"] = longest
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=buffer, model_type=model_type, character_coverage=1.0,
        required_chars=required, bos_id=0, eos_id=1, unk_id=2, pad_id=-1, num_threads=1, minloglevel=2, **options)
    return buffer.getvalue()


def train_tokenizer(texts: Sequence[str], model_type: str, vocab_size: int) -> bytes:
    """The bytes of a SentencePiece model. `texts` are normalised; `vocab_size` is ignored for characters."""
    size: dict[str, Any] = {"use_all_vocab": True} if model_type == "char" else {"vocab_size": vocab_size}
    try:
        return sentencepiece_model(texts, model_type, amharic_letters() + PUNCTUATION, **size)
    except RuntimeError as error:
        raise ToolError(f"SentencePiece cannot train a {model_type} model of {vocab_size} pieces: "
                        f"{str(error).splitlines()[-1].strip()} Change --vocab-size or give more text") from error


# A tokenizer that extends another

NEW_PIECES = 3000  # or as many as the texts give, where no size is typed


class TooManyPieces(ToolError):
    def __init__(self, message: str, most: int) -> None:
        """`most`: the greatest size that the texts give."""
        super().__init__(message)
        self.most = most


def letters_to_add(base: sentencepiece.SentencePieceProcessor, texts: Sequence[str]) -> str:
    """Those of the texts that the base has no piece for, and with them all of the alphabet; "" when it has all of the
    texts'. `texts` are as the base's own normaliser leaves them."""
    known = {base.id_to_piece(i) for i in range(base.get_piece_size())} | {SPACE}
    found = set().union(*texts) - known
    return "".join(sorted(found | (set(amharic_letters()) - known))) if found else ""


def learn_new_pieces(proto: ModelProto, texts: Sequence[str], letters: str, count: int) -> list[tuple[str, float]]:
    """`count` pieces made of `letters` alone, perhaps with the space before them, and their scores beside the base's.

    No text without these letters can be cut otherwise than before, whatever the scores, and one with them is cut as by
    the tokenizer that learned them. BPE merges by rank, and the parts of a piece are among the pieces before it; a
    unigram model adds log-probabilities, so pieces with a space are corrected by how much likelier the base finds it.
    Raises: TooManyPieces, or ToolError, for a count that the texts cannot give.
    """
    spec, size = proto.trainer_spec, len(proto.pieces)
    runs = [" ".join(re.sub(f"[^{re.escape(letters)}]", " ", text).split()) for text in texts]
    try:
        learned = ModelProto.FromString(sentencepiece_model(
            list(filter(None, runs)), EXTENDABLE[spec.model_type], letters, vocab_size=count + 4,  # <s> </s> <unk> ▁
            normalization_rule_name="identity", treat_whitespace_as_suffix=spec.treat_whitespace_as_suffix))
    except RuntimeError as error:
        highest = re.search(r"value <= (\d+)", str(error))
        most = size + int(highest[1]) - 4 if highest else 0
        bound = f"at most {most}" if most else f"at least {size + len(letters)}"
        message = (f"--target-size {size + count}: with these texts give {bound}, {size} of the base and "
                   f"{len(letters)} letters among them")
        raise (TooManyPieces(message, most) if most else ToolError(message)) from error
    base_scores = {piece.piece: piece.score for piece in proto.pieces}
    scores = {piece.piece: piece.score for piece in learned.pieces if piece.type == piece.NORMAL}
    space = scores.pop(SPACE)
    if spec.model_type == spec.BPE:
        lowest = min(base_scores.values())
        return [(piece, lowest - rank) for rank, piece in enumerate(scores, 1)]
    return [(piece, score + (base_scores[SPACE] - space if SPACE in piece else 0)) for piece, score in scores.items()]


def extend_tokenizer(content: bytes, texts: Sequence[str], target_size: int | None, name: str) -> bytes:
    """A SentencePiece model with pieces for letters that it lacks; `texts` are normalised, `name` is for messages.

    target_size: None for NEW_PIECES more than it has, or fewer if the texts give no more.

    Raises: ToolError for a model that cannot be extended, texts that need no extension, or an unfit size.
    """
    base, proto = sentencepiece.SentencePieceProcessor(model_proto=content), ModelProto.FromString(content)
    size = len(proto.pieces)
    if proto.trainer_spec.model_type not in EXTENDABLE or base.piece_to_id(SPACE) == base.unk_id():
        raise ToolError(f"--extend {name}: not a unigram or BPE model with a piece for the space. Give IndexTTS2's "
                        "bpe.model")
    if target_size is not None and target_size <= size:
        raise ToolError(f"--target-size {target_size}: the base has {size} pieces already. Give more, such as "
                        f"{size + 3000}")
    normal = [base.normalize(text) for text in texts]
    letters = letters_to_add(base, normal)
    if not letters:
        raise ToolError(f"--extend {name}: has a piece for every letter of these texts, so that nothing would be "
                        "extended. Take it as it is, or give Amharic texts")
    try:
        pieces = learn_new_pieces(proto, normal, letters, (target_size or size + NEW_PIECES) - size)
    except TooManyPieces as error:
        if target_size is not None:
            raise
        pieces = learn_new_pieces(proto, normal, letters, error.most - size)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def pieces_in(path: Path) -> Sequence[Any]:
    """Raises: ToolError for what is no tokenizer of ours."""
    load_tokenizer(path)
    return ModelProto.FromString(path.read_bytes()).pieces


def require_extension(tokenizer: Path, base: Path) -> None:
    """For data of released weights: their tokenizer as it is, or one that extends it. Raises: ToolError for another."""
    own, known = pieces_in(tokenizer), pieces_in(base)
    differing = next((i for i, piece in enumerate(known) if i >= len(own) or own[i] != piece), None)
    if differing is not None:
        raise ToolError(f"--tokenizer {tokenizer}: does not extend {base}, whose piece {differing} is "
                        f"{known[differing].piece!r}: the weights would read other texts than they learned. Make one "
                        "with `python -m tools.train_tokenizer --extend`")


def say_extension(base: bytes, extended: bytes, texts: Sequence[str]) -> None:
    """Pieces a word before and after. Raises: ToolError for a text that the extended tokenizer loses a part of."""
    before, after = (sentencepiece.SentencePieceProcessor(model_proto=content) for content in (base, extended))
    words, counts, unknown, progress = 0, [0, 0], 0, Progress("checking texts", len(texts))
    for done, text in enumerate(texts, 1):
        old, new = before.encode(text), after.encode(text)
        plain = after.normalize(text).replace(SPACE, " ").strip()
        if after.unk_id() in new or after.decode(new) != plain:
            raise ToolError(f"the extended tokenizer reads {text!r} as {after.decode(new)!r}. Leave this text out")
        words, unknown = words + len(plain.split()), unknown + old.count(before.unk_id())
        counts = [counts[0] + len(old), counts[1] + len(new)]
        progress.update(done)
    share = f", {unknown / max(1, counts[0]):.0%} of them unknown" if unknown else ""
    info(f"Before: {counts[0] / words:.2f} pieces a word{share}. After: {counts[1] / words:.2f} pieces a word, none "
         f"unknown; all {len(texts)} texts come back whole")


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


def read_base(path: Path) -> bytes:
    """The bytes of a tokenizer to extend. Raises: ToolError."""
    try:
        load_tokenizer(path)
    except ToolError as error:
        place, _, reason = str(error).partition(": ")
        raise ToolError(f"--extend {place}: {reason.partition('. ')[0]}. Give IndexTTS2's bpe.model") from error
    return path.read_bytes()


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


def texts_to_learn(rows: Sequence[dict[str, Any]], default: str, front_end: str = "") -> tuple[list[str], set[str]]:
    """The training rows' texts as the tokenizer will get them, and their languages (`default` where a row names
    none)."""
    texts, languages, tally, progress = [], set(), Tally(), Progress("texts", len(rows))
    for done, row in enumerate(rows, 1):
        if row.get("split", "train") == "train":
            language = language_of({"language": default} | row)
            reading = read_aloud(row["text"], language, TEXT_RULES)
            texts.append(written_for(front_end, reading.text))
            languages.add(language)
            tally.add(reading)
        progress.update(done)
    for line in tally.lines():
        warn(line)
    return texts, languages


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--texts", type=Path, required=True,
                        help="JSON lines with text, of which split val is left out; or .txt, a text a line")
    parser.add_argument("--output", type=Path, required=True, help="the SentencePiece model to write")
    parser.add_argument("--language", default="am", help="of texts whose rows name none (am)")
    parser.add_argument("--model-type", choices=["char", "bpe", "unigram"],
                        help="char: a piece is a letter; bpe and unigram: a piece is some letters long (char)")
    parser.add_argument("--vocab-size", type=int, help="pieces of bpe and unigram models (2000)")
    parser.add_argument("--extend", type=Path, metavar="MODEL",
                        help="a released SentencePiece model to extend, such as checkpoints/bpe.model (none)")
    parser.add_argument("--target-size", type=int, metavar="N", help="pieces of the extended model, the base's among "
                        f"them (the base's and {NEW_PIECES}, or as many as the texts give)")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.extend is None and args.target_size is not None:
        raise ToolError("--target-size goes with --extend, which names what to extend")
    if args.extend and (args.model_type or args.vocab_size):
        raise ToolError("--model-type and --vocab-size are for a tokenizer from scratch: one that extends another has "
                        "that one's type, and --target-size pieces")
    check_output(args.output)
    base = read_base(args.extend) if args.extend else None
    if base and args.output.exists() and args.output.samefile(args.extend):
        raise ToolError(f"--output {args.output}: is the base itself. Give another name")
    rows = read_texts(args.texts)
    texts, languages = texts_to_learn(rows, args.language, INDEXTTS2 if base else "")
    if not any(texts):
        raise ToolError(f"{args.texts}: holds no text to learn from; of {len(rows)} rows {len(texts)} are for training "
                        '(split "train", or no split). Add some')
    info(f"learning pieces from {len(texts)} texts")
    if base:
        model = extend_tokenizer(base, texts, args.target_size, str(args.extend))
        say_extension(base, model, texts)
    else:
        model = train_tokenizer(texts, args.model_type or "char", args.vocab_size or 2000)
    extends = hashlib.sha256(base).hexdigest() if base else ""
    with atomic_path(args.output) as temporary, atomic_path(record_path(args.output)) as record:
        temporary.write_bytes(model)
        record.write_text(tokenizer_record(hashlib.sha256(model).hexdigest(), TEXT_RULES, languages, extends),
                          encoding="utf-8")
    info(f"{load_tokenizer(args.output).get_piece_size()} pieces from {len(texts)} texts -> {args.output}")


if __name__ == "__main__":
    run_program(main)
