"""A released tokenizer that is extended by Amharic: what it knew it reads as before, and the new pieces are used."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from conftest import GPT, ROOT, TOKENIZER, call_trainer, data_args, load_checkpoint, mistake, read_jsonl, trainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_model import prepare
from test_preprocess import CODEC, clip_row, write_rows
from test_tools_text import run_tool

from tools import build_pairs, made_with, preprocess, text_rules, train_tokenizer
from tools._common import ToolError, sha256_of
from tools.amharic_text import TEXT_RULES
from tools.codes_to_sound import CodecSound
from tools.generation import Synthesizer
from tools.text_tokens import load_tokens

LATIN = [line.upper() for line in re.findall(r"[A-Za-z][A-Za-z ,.!?'-]{20,200}", (ROOT / "knowledge.md").read_text())]
CHINESE = ["你好世界", "语音合成很有意思", "今天天气很好"] * 20
AMHARIC = list(dict.fromkeys(row["target_text"] for row in read_jsonl(ROOT / "processed_data/train_pairs.jsonl")
                             ))[:1500]


def make_base(path: Path, model_type: str = "bpe", size: int = 400) -> Path:
    """A tiny tokenizer like the released one: capital Latin letters and Chinese, no Ethiopic."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LATIN[:-100] + CHINESE), model_writer=buffer, model_type=model_type, vocab_size=size,
        bos_id=0, eos_id=1, unk_id=2, pad_id=-1, num_threads=1, minloglevel=2, character_coverage=1.0)
    path.write_bytes(buffer.getvalue())
    return path


def pieces_of(path: Path) -> list[tuple[str, float, int]]:
    return [(piece.piece, piece.score, piece.type) for piece in ModelProto.FromString(path.read_bytes()).pieces]


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A base, the same extended to 1,200 pieces by the program, and what this printed. Read only."""
    folder = tmp_path_factory.mktemp(request.param)
    base, texts = make_base(folder / "bpe.model", request.param), folder / "t.txt"
    texts.write_text("\n".join([*AMHARIC, "IBM እና WHO፣ 5 ቤት፤ ok?"]))
    done = run_tool("tools.train_tokenizer", "--texts", texts, "--extend", base, "--target-size", 1200, "--output",
                    folder / "am.model")
    return base, folder / "am.model", done.stdout


def test_ids_pieces_scores_and_types_of_the_base_stay_and_new_ones_are_appended(pair):
    base, extended, _ = pair
    old, new = pieces_of(base), pieces_of(extended)
    assert new[: len(old)] == old and len(new) == 1200
    added = new[len(old) :]
    assert len({piece for piece, *_ in new}) == 1200 and {kind for *_, kind in added} == {1}
    assert all(re.fullmatch("▁?[ሀ-ፚ]+", piece) for piece, *_ in added)
    assert {piece for piece, *_ in added} >= set(train_tokenizer.amharic_letters())


def test_text_without_the_new_letters_is_cut_exactly_as_by_the_base(pair):
    base, extended = map(load, pair[:2])
    draw = random.Random(1)
    strange = ["".join(draw.choices("ABC abc,.!?'-12你好ÉЖ☺\u00a0", k=40)) for _ in range(300)]
    for text in LATIN + CHINESE + strange + ["", " ", "A"]:
        assert base.encode(text) == extended.encode(text)
    # Beside the new letters, too.
    for text in LATIN[:200]:
        both = extended.encode(f"{text} ሰላም {text}")
        assert both[: len(base.encode(text))] == base.encode(text) == both[-len(base.encode(text)) :]


def test_new_pieces_are_used_as_by_the_tokenizer_that_learned_them(pair):
    base, extended, _ = pair
    tokenizer, count = load(extended), len(pieces_of(base))
    texts = [" ".join(re.findall("[ሀ-ፚ]+", text)) for text in AMHARIC]
    used = {i for text in texts for i in tokenizer.encode(text)}
    multi = [i for i in range(count, 1200) if len(tokenizer.id_to_piece(i).strip("▁")) > 1]
    assert len(multi) > 300 and len(used & set(multi)) > 0.8 * len(multi)
    kind = train_tokenizer.EXTENDABLE[ModelProto.FromString(base.read_bytes()).trainer_spec.model_type]
    written = [text_rules.written_for("indextts2", text) for text in [*AMHARIC, "እና ቤት OK ? አምስት"]]
    letters = "".join(sorted(train_tokenizer.amharic_letters()))
    runs = [" ".join(re.findall(f"[{letters}]+", text)) for text in written]
    alone = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer.sentencepiece_model(
        runs, kind, letters, vocab_size=804, normalization_rule_name="identity"))
    same = sum(alone.encode(text, out_type=str) == tokenizer.encode(text, out_type=str) for text in runs)
    assert same > 0.97 * len(runs)  # the program learned from a few words more


def test_nothing_of_the_corpus_is_unknown_every_line_comes_back_and_pieces_a_word_are_told(pair):
    base, extended, printed = pair
    tokenizer = load(extended)
    for text in AMHARIC:
        written = text_rules.written_for("indextts2", text)
        ids = tokenizer.encode(written)
        assert tokenizer.unk_id() not in ids and tokenizer.decode(ids) == written
    assert re.search(r"Before: \d\.\d\d pieces a word, \d\d% of them unknown. After: \d\.\d\d pieces a word, none "
                     "unknown; all 1501 texts come back whole", printed)
    after = float(printed.split("After: ")[1].split()[0])
    assert after < 4.5  # letters alone: more


def test_the_record_names_base_rules_and_front_end(pair):
    base, extended, _ = pair
    assert text_rules.read_record(extended) == {
        "sha256": sha256_of(extended), "text_rules": TEXT_RULES, "languages": ["am"], "front_end": "indextts2",
        "extends": sha256_of(base)}
    assert text_rules.front_end_for_new(extended) == "indextts2"


def test_a_tokenizer_that_does_not_extend_the_bases_is_refused_for_its_weights(pair, tmp_path: Path):
    base, extended, _ = pair
    train_tokenizer.require_extension(base, base)
    train_tokenizer.require_extension(extended, base)
    other = ModelProto.FromString(extended.read_bytes())
    other.pieces[7].piece, other.pieces[8].piece = other.pieces[8].piece, other.pieces[7].piece
    (tmp_path / "other.model").write_bytes(other.SerializeToString())
    for tokenizer, place in ((tmp_path / "other.model", 7), (TOKENIZER, 3)):
        with pytest.raises(ToolError, match=f"--tokenizer .*{tokenizer.name}: does not extend .*bpe.model, whose piece "
                                            f"{place} is .* Make one with"):
            train_tokenizer.require_extension(tokenizer, base)
    with pytest.raises(ToolError, match="does not extend .*am.model, whose piece 400 is"):
        train_tokenizer.require_extension(base, extended)


def refusal(tmp_path: Path, base: Path, texts: str = "\n".join(AMHARIC[:200]), size: int = 1000, *flags: str) -> str:
    (tmp_path / "t.txt").write_text(texts)
    with pytest.raises(ToolError) as raised:
        train_tokenizer.main(["--texts", str(tmp_path / "t.txt"), "--extend", str(base), "--target-size", str(size),
                              "--output", str(tmp_path / "o.model"), *flags])
    assert not (tmp_path / "o.model").exists() and "\n" not in str(raised.value)
    return str(raised.value)


def test_without_a_size_a_few_texts_give_as_many_pieces_as_they_can(tmp_path: Path):
    base, size = make_base(tmp_path / "bpe.model"), {}
    for count in (30, 60):
        (tmp_path / "t.txt").write_text("\n".join(AMHARIC[:count]))
        train_tokenizer.main(["--texts", str(tmp_path / "t.txt"), "--extend", str(base), "--output",
                              str(tmp_path / f"{count}.model")])
        size[count] = len(train_tokenizer.pieces_in(tmp_path / f"{count}.model"))
    assert 700 < size[30] < size[60] < 400 + train_tokenizer.NEW_PIECES
    most = re.search(r"at most (\d+)", refusal(tmp_path, base, "\n".join(AMHARIC[:30]), 90000))
    assert most and size[30] == int(most[1])


def test_a_base_that_is_no_model_a_size_that_is_none_or_texts_without_new_letters_are_one_error(tmp_path: Path):
    base = make_base(tmp_path / "bpe.model")
    (tmp_path / "no.model").write_bytes(b"no model")
    assert re.fullmatch("--extend .*no.model: not a SentencePiece model. Give IndexTTS2's bpe.model",
                        refusal(tmp_path, tmp_path / "no.model"))
    assert re.fullmatch("--extend .*none.model: no such tokenizer. Give IndexTTS2's bpe.model",
                        refusal(tmp_path, tmp_path / "none.model"))
    assert "not a unigram or BPE model" in refusal(tmp_path, TOKENIZER)  # of single letters
    for size in (1, 400):
        assert "the base has 400 pieces already. Give more, such as 3400" in refusal(tmp_path, base, size=size)
    assert "has a piece for every letter of these texts" in refusal(tmp_path, base, "\n".join(LATIN[:50]))
    assert re.search("--target-size 450: with these texts give at least 7.., 400 of the base and 3.. letters among",
                     refusal(tmp_path, base, size=450))
    assert re.search(r"--target-size 90000: with these texts give at most \d+,", refusal(tmp_path, base, size=90000))
    assert "goes with --extend" in refusal_of("--texts", "t.txt", "--output", "o.model", "--target-size", "1000")
    assert "are for a tokenizer from scratch" in refusal(tmp_path, base, "ሰላም", 1000, "--model-type", "bpe")
    before = base.read_bytes()
    message = refusal_of("--texts", str(tmp_path / "t.txt"), "--extend", str(base), "--target-size", "1000",
                         "--output", str(base))
    assert "is the base itself" in message and base.read_bytes() == before


def refusal_of(*argv: str) -> str:
    with pytest.raises(ToolError) as raised:
        train_tokenizer.main(list(argv))
    return str(raised.value)


# The front end


@pytest.mark.parametrize(("text", "written"), [
    ("ሰላም፣ እንዴት ነህ? ጥሩ፤ ደህና፥ ነው።", "ሰላም, እንዴት ነህ? ጥሩ, ደህና, ነው."), ("ok ሰላም WHO", "OK ሰላም WHO"),
    ("Dobrý den, pane: „je“ to; straße!", "DOBRÝ DEN, PANE, „JE' TO, STRASSE!"), ("привет", "ПРИВЕТ"),
    ("你好，世界。", "你 好 , 世 界 ."), ("", ""),
])
def test_texts_are_written_for_indextts2_as_its_own_front_end_writes_them(text: str, written: str):
    assert text_rules.written_for("indextts2", text) == written
    assert text_rules.written_for("indextts2", written) == written
    assert text_rules.written_for("", text) == text


def test_the_front_end_is_the_tokenizers_or_else_that_of_released_features(tmp_path: Path):
    path = tmp_path / "t.model"
    path.write_bytes(TOKENIZER.read_bytes())
    assert [text_rules.front_end_for_new(path, features) for features in ("embedded", "indextts2", "indextts2.5")] == [
        "", "indextts2", ""]
    record: dict[str, Any] = {"sha256": sha256_of(path), "text_rules": 2}
    text_rules.record_path(path).write_text(yaml.safe_dump(record))
    assert text_rules.front_end_for_new(path, "indextts2") == ""  # one's own, from scratch
    text_rules.record_path(path).write_text(yaml.safe_dump(record | {"front_end": "another"}))
    with pytest.raises(ToolError, match="t.yaml: made for the front end another, .* Take a newer version"):
        text_rules.front_end_for_new(path)


def test_the_front_end_goes_from_the_tokenizer_into_data_and_checkpoint_and_is_used_when_speaking(
        pair: tuple[Path, Path, str], tmp_path: Path):
    _, extended, _ = pair
    texts = ["ሰላም፣ ok።", "ቤት ነው፤ WHO?", "Je ne sais", "መንገድ"]
    (tmp_path / "in").mkdir()
    rows = [clip_row(tmp_path / "in", i) | {"text": text, "split": "train"} for i, text in enumerate(texts)]
    rows[2] |= {"language": "fr"}
    rows[3] |= {"split": "val"}
    write_rows(tmp_path / "in", rows)
    preprocess.main(["--recordings", str(tmp_path / "in/recordings.jsonl"), "--codec", str(CODEC), "--tokenizer",
                     str(extended), "--output-dir", str(tmp_path / "out"), "--model-dim", "32"])
    found, ids = read_jsonl(tmp_path / "out/utterances.jsonl"), np.load(tmp_path / "out/text_ids.npy")
    tokenizer = load(extended)
    assert [tokenizer.decode(ids[row["text_ids_start"] :][: row["text_len"]].tolist()) for row in found] == [
        "ሰላም, OK.", "ቤት ነው, WHO?", "JE NE SAIS", "መንገድ"]
    assert [row["text"] for row in found] == texts
    build_pairs.main(["--data-dir", str(tmp_path / "out")])
    call_trainer("--train-manifest", tmp_path / "out/train_pairs.jsonl", "--tokenizer", extended, "--output-dir",
                 tmp_path / "run", "--max-steps", 1, "--batch-size", 2)
    checkpoint = tmp_path / "run/latest.pth"
    assert made_with.of_manifest(tmp_path / "out/utterances.jsonl")["front_end"] == "indextts2" == (
        load_checkpoint(checkpoint)["made_with"]["front_end"])
    synthesizer = Synthesizer(checkpoint, CodecSound(CODEC), None)
    voice = synthesizer.prompt(ROOT / "processed_data/audio/new026_am.flac")
    assert [synthesizer.line(text, voice, "", row.get("language", "am")).text_ids for text, row in zip(
        texts, rows, strict=True)] == [ids[row["text_ids_start"] :][: row["text_len"]].tolist() for row in found]
    line = synthesizer.line("ሰላም ነው። " * 70, voice, "")
    assert len(line.text_ids) < 200 or line.parts  # the model's limit
    assert len(line.parts) > 1 and max(len(part.text_ids) for part in line.parts) <= 120


# What the trainer makes of it: rows of new pieces


def test_new_rows_start_from_means_of_the_bases_rows_never_from_another_pieces_or_the_unused_one(
        pair: tuple[Path, Path, str], tiny: Path, tmp_path: Path):
    base, extended, _ = pair
    count, config = len(pieces_of(base)), trainer.model_config_from(GPT, "test", len(pieces_of(base)))
    model = trainer.UnifiedVoiceGPT(config)
    trainer.init_fresh_weights(model, 3, 2.0)
    with torch.no_grad():
        for name in trainer.VOCAB_TENSORS:
            model.get_parameter(name)[3:count] += 0.5
            model.get_parameter(name)[count] = 100.0  # no token's
    torch.save({"model": model.state_dict()}, tmp_path / "gpt.pth")
    flags = ["--base-checkpoint", tmp_path / "gpt.pth", "--tokenizer", extended]
    runs = [prepare(tiny, tmp_path / name, *flags, *more) for name, more in (
        ("a", ()), ("b", ()), ("c", ("--seed", 5)))]
    for name in trainer.VOCAB_TENSORS:
        old, new = model.get_parameter(name), runs[0].model.get_parameter(name)
        assert torch.equal(new[:count], old[:count]) and len(new) == 1201
        mean, spread, added = old[3:count].mean(0), old[3:count].std(0), new[count:1200]
        assert ((added - mean).abs() < 0.6 * spread).all() and not torch.equal(added[0], added[1])
        assert len(added.unique(dim=0)) == 800 and new[1200].abs().max() < 1
        assert torch.equal(new, runs[1].model.get_parameter(name))
        assert not torch.equal(new, runs[2].model.get_parameter(name))


def test_a_new_piece_that_the_base_could_spell_starts_from_the_mean_of_its_parts(tmp_path: Path):
    proto = ModelProto.FromString(make_base(tmp_path / "base.model").read_bytes())
    count = len(proto.pieces)
    for piece in ("▁QQJX", "XZQ", "QሰX", "▁ሰ"):
        proto.pieces.add(piece=piece, score=-1000)
    (tmp_path / "t.model").write_bytes(proto.SerializeToString())
    parts, of_text = trainer.read_by_base(str(tmp_path / "t.model"), count)
    base = load(tmp_path / "base.model")
    assert [base.id_to_piece(ids) for ids in parts] == [["▁", "Q", "Q", "J", "X"], ["X", "Z", "Q"], [], []]
    assert of_text == list(range(3, count))
    rows, source = torch.zeros(5, 4), torch.randn(count + 1, 4)
    trainer.start_new_rows(rows, source, parts, of_text, seed=1)
    noise = 0.6 * source[3:count].std(0)
    for row, ids in zip(rows, [*parts[:2], of_text, of_text], strict=False):
        assert ((row - source[ids].mean(0)).abs() < noise).all()
    assert not rows[4].any()


def test_a_tokenizer_whose_first_pieces_are_none_of_a_base_is_refused(tiny: Path, tmp_path: Path):
    model = trainer.UnifiedVoiceGPT(trainer.model_config_from(GPT, "test", 2))
    trainer.init_fresh_weights(model, 3, 2.0)
    torch.save({"model": model.state_dict()}, tmp_path / "gpt.pth")
    message = mistake(*data_args(tiny), "--output-dir", tmp_path / "out", "--base-checkpoint", tmp_path / "gpt.pth")
    assert "its first 2 pieces, as many as the base checkpoint has, are no tokenizer" in message


@pytest.mark.parametrize(("text", "remedy"), [
    ("ቤት", "no piece for '.*'. Train the tokenizer on these transcripts .a released bpe.model: .* --extend"),
    ("привет", "no piece for '.*'. Spell it in Ethiopic letters, or train the tokenizer"),
])
def test_a_base_as_it_is_does_not_ask_for_ethiopic_letters_where_these_are_what_it_lacks(pair, text: str, remedy: str):
    with pytest.raises(ToolError, match=remedy):
        preprocess.text_ids_of(text, load_tokens(pair[0]), "row 1")
