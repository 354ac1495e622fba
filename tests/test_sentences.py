"""tools.sentences: long texts are cut where a reader pauses, into parts that the model takes."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from conftest import ROOT

from tools.sentences import cut_at_pauses


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(("text", "longest", "parts"), [
    ("ሀ ለ። መ", 3, ["ሀ ለ። መ"]), ("", 3, []), ("  ሀ \n ለ ", 1, ["ሀ", "ለ"]),
    ("ሀ ለ። መ ሠ! ረ ሰ?", 5, ["ሀ ለ። መ ሠ!", "ረ ሰ?"]),  # at sentences
    ("Ab cd. Ef gh. Ij", 2, ["Ab cd.", "Ef gh.", "Ij"]), ("1.5 ሀ ለ", 2, ["1.5 ሀ", "ለ"]),
    ("ሀ ለ፣ መ ሠ፤ ረ ሰ", 3, ["ሀ ለ፣", "መ ሠ፤", "ረ ሰ"]),  # one sentence: at pauses
    ("ሀ ለ መ ሠ ረ ሰ ሸ", 6, ["ሀ ለ መ ሠ", "ረ ሰ ሸ"]),  # no pause: between words, about equally long
])
def test_texts_are_cut_at_sentences_else_at_pauses_else_between_words(text: str, longest: int, parts: list[str]):
    assert cut_at_pauses(text, words, longest) == parts


def test_a_word_that_is_too_long_is_a_part_of_its_own():
    assert cut_at_pauses("ሀ ለለለለለ። መ", len, 3) == ["ሀ", "ለለለለለ።", "መ"]


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_the_text_fit_the_limit_and_are_as_few_as_sentences_allow(seed: int):
    draw = random.Random(seed)
    sentences = [" ".join("ሀለመ"[draw.randrange(3)] * draw.randint(1, 3) for _ in range(draw.randint(1, 9))) + "።"
                 for _ in range(draw.randint(1, 40))]
    text, longest = " ".join(sentences), draw.randint(9, 30)
    parts = cut_at_pauses(text, words, longest)
    assert " ".join(parts) == text and max(map(words, parts)) <= longest
    assert all(part.endswith("።") for part in parts)
    greedy, room = 1, longest
    for sentence in sentences:
        greedy, room = (greedy, room - words(sentence)) if words(sentence) <= room else (
            greedy + 1, longest - words(sentence))
    assert len(parts) == greedy


def test_cutting_loads_no_torch():
    code = "import sys; import tools.sentences; assert not {'torch', 'numpy', 'trainers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
