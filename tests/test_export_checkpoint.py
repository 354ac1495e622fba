"""tools.export_checkpoint: the weights alone, in a file that IndexTTS2 and the trainer's --base-checkpoint read."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MADE_WITH, TOKENIZER, call_trainer, data_args, load_checkpoint, make_dataset, trainer
from released_folder import CONFIG, EMO_WIDTH, gpt_tensors, train_bpe

from tools import export_checkpoint
from tools._common import ToolError, sha256_of
from tools.indextts2_features import conditioning_digest


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    call_trainer(*data_args(tiny), "--output-dir", out, "--max-steps", 1)
    return out / "best.pth"


def test_the_exported_file_holds_the_weights_bit_for_bit_and_starts_a_new_run(
        checkpoint: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exported = tmp_path / "gpt.pth"
    export_checkpoint.main([str(checkpoint), "--output", str(exported)])
    printed = capsys.readouterr().out
    assert "step 1" in printed and "IndexTTS2 cannot use this file" in printed
    content, expected = torch.load(exported, weights_only=True), load_checkpoint(checkpoint)["model"]
    assert list(content) == ["model", "made_with"] and list(content["model"]) == list(expected)
    assert content["made_with"] == {"tokenizer_sha256": sha256_of(TOKENIZER), **MADE_WITH}
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in expected.items())
    assert exported.stat().st_size < checkpoint.stat().st_size / 2
    output = call_trainer(*data_args(tiny), "--output-dir", tmp_path / "next", "--base-checkpoint", exported,
                          "--max-steps", 1)
    assert f"[Info] Base checkpoint: {exported}" in output


def test_an_export_says_what_its_data_was_made_with_and_refuses_a_checkpoint_of_two(checkpoint: Path, tmp_path: Path):
    content, made_with = torch.load(checkpoint, weights_only=True), {"features": "embedded", "num_codes": 64}
    content["made_with"] = made_with | {"unknown": 1}
    trainer.write_checkpoint(tmp_path / "a.pth", content)
    export_checkpoint.main([str(tmp_path / "a.pth"), "--output", str(tmp_path / "gpt.pth")])
    exported = torch.load(tmp_path / "gpt.pth", weights_only=True)["made_with"]
    assert exported == made_with | {"tokenizer_sha256": content["tokenizer"]["sha256"]}
    content["made_with"] |= {"tokenizer_sha256": "0" * 64}
    trainer.write_checkpoint(tmp_path / "b.pth", content)
    with pytest.raises(ToolError, match="tokenizer_sha256 is 000000000000 in .*b.pth itself, but .* that it names"):
        export_checkpoint.main([str(tmp_path / "b.pth"), "--output", str(tmp_path / "gpt2.pth")])
    assert not (tmp_path / "gpt2.pth").exists()


def test_a_forks_checkpoint_and_weights_alone_are_refused_with_what_to_give(checkpoint: Path, tmp_path: Path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({key: value for key, value in content.items() if key != "digests"}, tmp_path / "fork.pth")
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    for name, message in (("fork", "written by another trainer. Go on with it here first, by .* --resume .*fork.pth"),
                          ("weights", r"missing required keys: .* \(.*weights.pth\). Give a run.s own,")):
        with pytest.raises(ToolError, match=message):
            export_checkpoint.main([str(tmp_path / f"{name}.pth"), "--output", str(tmp_path / "gpt.pth")])
    assert not (tmp_path / "gpt.pth").exists()


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path):
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ToolError, match="damaged or incomplete"):
        export_checkpoint.main([str(damaged), "--output", str(tmp_path / "gpt.pth")])
    assert not (tmp_path / "gpt.pth").exists()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_an_export_never_replaces_the_checkpoint_it_reads(checkpoint: Path, tmp_path: Path, link):
    before, output = checkpoint.read_bytes(), tmp_path / "gpt.pth"
    link(output, checkpoint)
    with pytest.raises(ToolError, match="that is the checkpoint itself"):
        export_checkpoint.main([str(checkpoint), "--output", str(output)])
    assert checkpoint.read_bytes() == output.read_bytes() == before


@pytest.mark.parametrize("name", ["latest.pth", "best.pth", "model_step1.pth", "model_step0000007.pth"])
def test_an_export_never_takes_a_name_that_a_training_writes(checkpoint: Path, name: str):
    before = {path.name: path.read_bytes() for path in checkpoint.parent.glob("*.pth")}
    with pytest.raises(ToolError, match=f"{name}: a training writes files of this name.* Choose another name"):
        export_checkpoint.main([str(checkpoint), "--output", str(checkpoint.with_name(name))])
    assert {path.name: path.read_bytes() for path in checkpoint.parent.glob("*.pth")} == before


# A folder


@dataclasses.dataclass(frozen=True)
class OnReleased:
    """A model folder, of which only what an export reads is there, and the checkpoint of a step from its weights."""

    folder: Path
    checkpoint: Path

    def export(self, output_dir: Path, *args: object, checkpoint: Path | None = None) -> None:
        export_checkpoint.main([str(checkpoint or self.checkpoint), "--model-dir", str(self.folder), "--output-dir",
                                str(output_dir), *map(str, args)])

    def changed(self, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
        content = torch.load(self.checkpoint, weights_only=True)
        change(content)
        trainer.write_checkpoint(path, content)
        return path


@pytest.fixture(scope="module")
def on_released(tmp_path_factory: pytest.TempPathFactory) -> OnReleased:
    root = tmp_path_factory.mktemp("released")
    folder, data = root / "checkpoints", make_dataset(root / "data")
    (folder / "hf_cache/bigvgan").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    tensors = gpt_tensors(CONFIG, EMO_WIDTH, torch.Generator().manual_seed(0))
    torch.save(tensors, folder / "gpt.pth")
    train_bpe(folder / "bpe.model")
    for name in ("s2mel.pth", "LICENSE", "latest.pth", ".hidden", "hf_cache/bigvgan/config.json"):
        (folder / name).write_text(name)
    made_with = {"features": "indextts2", "num_codes": 8192, "conditioning_sha256": conditioning_digest(tensors)}
    config = {**CONFIG, "dataset": {**CONFIG["dataset"], **made_with}}
    (data / "config.yaml").write_text(yaml.safe_dump(config))
    call_trainer(*data_args(data), "--base-checkpoint", folder / "gpt.pth", "--output-dir", root / "out",
                 "--max-steps", 1)
    return OnReleased(folder, root / "out/latest.pth")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_exported_folder_has_weights_config_and_tokenizer_that_fit_and_the_rest_of_the_released_one(
        on_released: OnReleased, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]):
    on_released.export(tmp_path / "voice", "--dtype", dtype)
    voice, trained = tmp_path / "voice", load_checkpoint(on_released.checkpoint)["model"]
    tensors = torch.load(voice / "gpt.pth", weights_only=True)
    assert list(tensors) == list(gpt_tensors(CONFIG, EMO_WIDTH, torch.Generator()))  # as the released, nothing else
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert all(torch.equal(tensor, trained[name].to(kind)) for name, tensor in tensors.items())
    config = yaml.safe_load((voice / "config.yaml").read_text())
    assert config["gpt"] == {**CONFIG["gpt"], "number_text_tokens": len(tensors["text_embedding.weight"]) - 1}
    assert config["dataset"]["tokenizer_sha256"] == sha256_of(TOKENIZER) == sha256_of(voice / "bpe.model")
    assert config["dataset"]["features"] == "indextts2" and config["s2mel"] == CONFIG["s2mel"]
    assert "derivative work of the IndexTTS-2 weights" in (voice / "README.md").read_text()
    assert sorted(str(path.relative_to(voice)) for path in voice.rglob("*") if path.is_file()) == [
        "LICENSE", "README.md", "bpe.model", "bpe.yaml", "config.yaml", "gpt.pth", "hf_cache/bigvgan/config.json",
        "s2mel.pth"]
    assert (voice / "s2mel.pth").samefile(on_released.folder / "s2mel.pth")
    printed = capsys.readouterr().out
    assert "missing in it or not whole, as in --model-dir: wav2vec2bert" in printed and "`hf download" in printed


def test_copies_are_copies_and_where_hard_links_cannot_be_made_links_are_symbolic(
        on_released: OnReleased, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_released.export(tmp_path / "copied", "--copy")
    assert not (tmp_path / "copied/s2mel.pth").samefile(on_released.folder / "s2mel.pth")
    assert (tmp_path / "copied/s2mel.pth").read_text() == "s2mel.pth"
    monkeypatch.setattr(export_checkpoint.os, "link", lambda *paths: (_ for _ in ()).throw(OSError(18, "cross-device")))
    on_released.export(tmp_path / "linked")
    assert (tmp_path / "linked/s2mel.pth").readlink() == (on_released.folder / "s2mel.pth").resolve()


def test_a_folder_is_written_whole_or_not_at_all(on_released: OnReleased, tmp_path: Path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.txt").touch()
    with pytest.raises(ToolError, match="there: is there already. Choose another name, or remove it"):
        on_released.export(tmp_path / "there")
    (tmp_path / ".voice.999999999.tmp").mkdir()  # a killed export's

    def spoil(folder: Path, *more: str) -> None:
        content = torch.load(folder / "gpt.pth", weights_only=True)
        del content["gpt.h.1.ln_1.weight"]
        torch.save(content, folder / "gpt.pth")
        check(folder, *more)

    check = export_checkpoint.check_folder
    monkeypatch.setattr(export_checkpoint, "check_folder", spoil)
    with pytest.raises(ToolError, match="gpt.h.1.ln_1.weight is missing"):
        on_released.export(tmp_path / "voice")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def drop_conditioning(content: dict[str, Any]) -> None:
    for name in [name for name in content["model"] if name.startswith("perceiver_encoder.")]:
        del content["model"][name]


REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda content: content["made_with"].update(features="embedded"), "was trained on other codes .embedded features"),
    (lambda content: content["made_with"].update(num_codes=1024), "trained on other codes .indextts2 features, 1024"),
    (drop_conditioning, r"has no conditioning modules \(perceiver_encoder"),
    (lambda content: content["made_with"].update(conditioning_sha256="0" * 64), "but .* in its own conditioning"),
    (lambda content: content["model_config"].update(heads=1), "gpt.heads is 2 in .*config.yaml, but 1 in"),
    (lambda content: content["model"].pop("gpt.ln_f.bias"), "not the GPT that .* gpt.ln_f.bias is missing"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_weights_that_indextts2_cannot_speak_with_are_one_error_and_nothing_is_written(
        on_released: OnReleased, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str):
    path = on_released.changed(tmp_path / "a.pth", change)
    with pytest.raises(ToolError, match=message):
        on_released.export(tmp_path / "voice", checkpoint=path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_run_on_the_embedded_codec_another_tokenizer_and_another_folder_are_refused(
        checkpoint: Path, on_released: OnReleased, tmp_path: Path):
    with pytest.raises(ToolError, match="was trained on other codes .* 64 codes"):
        on_released.export(tmp_path / "voice", checkpoint=checkpoint)
    with pytest.raises(ToolError, match="tokenizer_sha256 is .* in --tokenizer .* Give the tokenizer of the run"):
        on_released.export(tmp_path / "voice", "--tokenizer", on_released.folder / "bpe.model")
    for flags, message in (([], "give --model-dir and --output-dir"),
                           (["--output", "a.pth", "--copy"], "--copy cannot be combined with --output")):
        with pytest.raises(ToolError, match=message):
            export_checkpoint.main([str(on_released.checkpoint), *flags])
    assert not (tmp_path / "voice").exists()


def test_a_folder_with_another_codec_than_the_trainings_is_refused(on_released: OnReleased, tmp_path: Path):
    other = dataclasses.replace(on_released, folder=tmp_path / "checkpoints")
    shutil.copytree(on_released.folder, other.folder)
    codec = other.folder / "hf_cache/semantic_codec_model.safetensors"
    codec.write_bytes((2).to_bytes(8, "little") + b"{}")
    trained = other.changed(tmp_path / "a.pth", lambda content: content["made_with"].update(codec_sha256="0" * 64))
    with pytest.raises(ToolError, match=f"is 000000000000 in .*, but .* in {codec}. Give the model folder"):
        other.export(tmp_path / "voice", checkpoint=trained)
    assert not (tmp_path / "voice").exists()


def test_a_half_download_is_named_by_the_export(on_released: OnReleased, tmp_path: Path, capsys):
    other = dataclasses.replace(on_released, folder=tmp_path / "checkpoints")
    shutil.copytree(on_released.folder, other.folder)
    (other.folder / "s2mel.pth").write_bytes(b"PK\x03\x04 half a file")
    other.export(tmp_path / "voice")
    assert "s2mel.pth" in capsys.readouterr().out.partition("missing in it or not whole")[2].partition("IndexTTS2")[0]
