"""Texts to the numbers that a model reads, by a SentencePiece model or by the .tiktoken file of IndexTTS-2.5.

In that file every line is a token in base64 and its rank, which is its id: a byte-level BPE, so no letter is unknown.
Special tokens are numbered behind the ranks; a text begins with its language's and a blank. Id 0, which is also the
start of a text, is "!" here: ids are never filtered by value. No torch in here.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import sentencepiece

from tools._common import ToolError
from tools.train_tokenizer import load_tokenizer
from trainers.train_gpt_v2 import LANGUAGES, TIKTOKEN_SPECIALS

FIRST_LANGUAGE = 2  # of the special tokens
LANGUAGE_TOKENS = 99  # the languages after them are spelled out
DOWNLOAD = "Give multilingual_zh_ja_yue_char_del.tiktoken of the folder of IndexTTS-2.5"
# GPT-2's words, in the signs that sign_of writes.
WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[a-z]+| ?1+| ?[^ a-z1\n]+|[ \n]+(?![^ \n])|[ \n]+")


class TextTokens(Protocol):
    """A tokenizer."""

    @property
    def size(self) -> int:
        """Ids are 0 to size - 1."""

    def encode(self, text: str, language: str) -> list[int]:
        """Ids of a text that was read aloud and written for its front end."""

    def unknown(self, text: str) -> list[str]:
        """What of it has no token, in the order of the alphabet."""


class SentencePieceTokens:
    """Of every language alike."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self.model, self.size = model, model.get_piece_size()

    def encode(self, text: str, language: str) -> list[int]:
        return self.model.encode(text)

    def unknown(self, text: str) -> list[str]:
        ids, unknown = self.model.encode(text), self.model.unk_id()
        if unknown not in ids:
            return []
        pieces = self.model.encode(text, out_type=str)
        return sorted({piece for piece, piece_id in zip(pieces, ids, strict=True) if piece_id == unknown})


def sign_of(character: str) -> str:
    """A sign of the kind that WORDS needs to know of a character: the letters of English endings are themselves."""
    kind = unicodedata.category(character)[0]
    if kind == "L":
        return character if character in "stmdrevl" else "a"
    if kind == "N":
        return "1"
    return (character if character == " " else "\n") if character.isspace() else "'" if character == "'" else "-"


class TiktokenTokens:
    """IndexTTS-2.5's."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """`ranks` has every byte. Ids are 0 to len(ranks) - 1."""
        self.ranks, self.size = ranks, len(ranks) + TIKTOKEN_SPECIALS
        self.of_word = lru_cache(maxsize=100_000)(self.merged)

    def encode(self, text: str, language: str) -> list[int]:
        number = LANGUAGES.index(language) if language in LANGUAGES else LANGUAGE_TOKENS
        if number < LANGUAGE_TOKENS:
            return [len(self.ranks) + FIRST_LANGUAGE + number, *self.ordinary(f" {text}")] if text else []
        return self.ordinary(f"<|{language}|> {text}") if text else []

    def unknown(self, text: str) -> list[str]:
        return []

    def ordinary(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        signs = "".join(map(sign_of, text))
        return [token for word in WORDS.finditer(signs)
                for token in self.of_word(text[word.start() : word.end()].encode())]

    def merged(self, word: bytes) -> tuple[int, ...]:
        """Begins with single bytes and joins, time and again, the first pair of the lowest rank; a word that is a
        token is one."""
        if word in self.ranks:
            return (self.ranks[word],)
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            found = [self.ranks.get(one + other, self.size) for one, other in zip(parts, parts[1:], strict=False)]
            place = found.index(min(found))
            if found[place] == self.size:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return tuple(self.ranks[part] for part in parts)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Raises: ToolError for a file that is missing, or not whole."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ToolError(f"{path}: no such tokenizer ({error.strerror}). {DOWNLOAD}") from error
    ranks = dict[bytes, int]()
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ToolError(f"{path}: not a .tiktoken file: line {number} is not a token in base64 and its rank. "
                            f"{DOWNLOAD}") from error
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or len(ranks) != len(lines) or set(ranks.values()) != set(range(len(ranks))):
        fault = f"byte {lacking[0]} has no token" if lacking else "a token or a rank is twice in it, or missing"
        raise ToolError(f"{path}: not a whole .tiktoken file ({fault}). {DOWNLOAD}")
    return ranks


def load_tokens(path: Path) -> TextTokens:
    """Raises: ToolError for a file that is missing, broken or no tokenizer."""
    if path.suffix == ".tiktoken":
        return TiktokenTokens(read_ranks(path))
    return SentencePieceTokens(load_tokenizer(path))
