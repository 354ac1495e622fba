"""tools.export_checkpoint: the weights alone, in a file that IndexTTS2 and the trainer's --base-checkpoint read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MADE_WITH, TOKENIZER, call_trainer, data_args, load_checkpoint, trainer

from tools import export_checkpoint
from tools._common import ToolError, sha256_of


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
