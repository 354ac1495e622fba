"""What the public forks' trainers and preprocessing leave behind goes on here: checkpoints, manifests, Arrow folders.

The checkpoints are written as their trainers write them (their save code was run in development, with the same result
here): one AdamW group over all parameters in the order of the model's, a transformers cosine schedule, numpy's
random-number state. "A" is RobelAdugna/Indextts_Am-V2, "B" JarodMica/index-tts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    GPT,
    ROOT,
    TOKENIZER,
    call_trainer,
    data_args,
    load_checkpoint,
    make_dataset,
    mistake,
    read_jsonl,
    resumable_state,
    trainer,
    write_manifest,
)

from tools import build_pairs, fork_manifests
from tools._common import ToolError

ROWS, BATCH, ACCUMULATION, WARMUP, EPOCHS, PEAK = 41, 4, 2, 3, 3, 1e-3
STEPS_AN_EPOCH = math.ceil(ROWS / BATCH) // ACCUMULATION  # the forks drop what is left of an epoch
TOTAL = EPOCHS * math.ceil(ROWS / BATCH) // ACCUMULATION
SETTINGS = ["--epochs", EPOCHS, "--warmup-steps", WARMUP]
B_SETTINGS = [*SETTINGS, "--batch-size", BATCH, "--grad-accumulation", ACCUMULATION]


def fork_lr(step: int, warmup: int = WARMUP, total: int = TOTAL) -> float:
    """transformers.get_cosine_schedule_with_warmup after this many scheduler.step()."""
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def fork_model(vocab_rows: int) -> dict[str, torch.Tensor]:
    """A state dict in the forks' order: conditioning modules with their saved `pe` buffers first."""
    config = trainer.model_config_from(GPT, "GPT", vocab_rows - 1)
    model, generator = trainer.UnifiedVoiceGPT(config), torch.Generator().manual_seed(3)
    trainer.init_fresh_weights(model, 5, 2.0)
    carried = {"conditioning_encoder.embed.conv.0.weight": (4, 1, 3, 3),
               "conditioning_encoder.embed.pos_enc.pe": (1, 9, 4), "perceiver_encoder.latents": (32, 32),
               "emo_conditioning_encoder.embed.pos_enc.pe": (1, 9, 4),
               "emo_perceiver_encoder.norm.gamma": (8,), "emo_layer.weight": (32, 32), "emovec_layer.weight": (32, 8)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in carried.items()}
    return trainer.in_name_order({**model.state_dict(), **made})


def moment_of(number: int) -> float:
    return 1e-4 * (number + 1)


def fork_content(step: int, flavour: str, lr: float | None = None, **more: Any) -> dict[str, Any]:
    """What both trainers save at every --save-interval; flavour "A" adds the position."""
    vocab = trainer.read_tokenizer(str(TOKENIZER))["size"]
    model = fork_model(vocab + 1)
    names = [name for name in model if not name.endswith(".pos_enc.pe")]
    trained = [i for i, name in enumerate(names) if not name.startswith(trainer.CARRIED_PREFIXES)]
    lr = fork_lr(step) if lr is None else lr
    group = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02, "amsgrad": False, "maximize": False,
             "foreach": None, "capturable": False, "differentiable": False, "fused": None, "initial_lr": PEAK,
             "params": list(range(len(names)))}
    state = {i: {"step": torch.tensor(float(step)), "exp_avg": torch.full_like(model[names[i]], moment_of(i)),
                 "exp_avg_sq": torch.full_like(model[names[i]], moment_of(i) ** 2)} for i in trained}
    content = {"model": model, "optimizer": {"state": state, "param_groups": [group]},
               "scheduler": {"base_lrs": [PEAK], "last_epoch": step, "_step_count": step + 1, "_last_lr": [lr],
                             "lr_lambdas": [{}]},
               "scaler": None, "epoch": step // STEPS_AN_EPOCH, "step": step,
               "recent_checkpoints": [f"/gone/model_step{step}.pth"]}
    if flavour == "A":
        content["batch_idx"] = step % STEPS_AN_EPOCH * ACCUMULATION
    return content | more


MANIFESTS = {"train": [{"path": "train_pairs.jsonl", "count": ROWS, "languages": ["am"]}], "val": []}


def write_fork(folder: Path, step: int, flavour: str, **more: Any) -> Path:
    """Both files of one save, model_step{N}.pth and latest.pth. Returns the folder."""
    folder.mkdir(exist_ok=True)
    extra = {"type": "step", **({"manifests": MANIFESTS, "tokenizer": str(TOKENIZER)} if flavour == "A" else {})}
    content = fork_content(step, flavour, **more)
    torch.save({**content, "extra": extra}, folder / f"model_step{step}.pth")
    if flavour == "A":
        rng = {"torch_cpu": torch.get_rng_state(), "torch_cuda": None, "numpy": np.random.get_state(),
               "python": random.getstate()}
        content |= {"manifests": MANIFESTS, "rng_state": rng, "batch_size": BATCH, "grad_accumulation": ACCUMULATION,
                    "pytorch_version": torch.__version__, "cuda_version": None, "cuda_peak_memory": 0}
    torch.save(content, folder / "latest.pth")
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of single clips in files of their own; nothing beside them is recorded."""
    folder = make_dataset(tmp_path_factory.mktemp("fork") / "data", ROWS, 6, shards=False)
    (folder / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT, "dataset": {"sample_rate": 24000}}))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize(("flavour", "resume"), [
    ("A", "auto"), ("A", "latest.pth"), ("A", "model_step8.pth"), ("B", "auto"), ("B", "model_step8.pth")])
def test_a_forks_checkpoint_goes_on_with_moments_step_rate_and_position(flavour, resume, data, tmp_path):
    out = write_fork(tmp_path / "out", 8, flavour)
    before = {path.name: digest(path) for path in out.glob("*.pth")}
    seen: dict[str, Any] = {}

    def look(event: str, run: Any = None, *_: Any) -> None:
        if event == "step" and not seen:
            named = {name: run.optimizer.state[tensor] for name, tensor in run.model.named_parameters()}
            seen.update(position=run.state.position, moments={
                name: (state["exp_avg"].unique().tolist(), state["exp_avg_sq"].unique().tolist(), state["step"].item())
                for name, state in named.items()})
            seen["weights"] = {name: tensor.detach().clone() for name, tensor in run.model.named_parameters()}
            seen["decay"] = [group["weight_decay"] for group in run.optimizer.param_groups]

    where = ["--resume", "auto", "--output-dir", out] if resume == "auto" else ["--resume", out / resume]
    output = call_trainer(*data_args(data), *where, *(B_SETTINGS if flavour == "B" else SETTINGS), "--log-interval", 1,
                          on_event=look)
    model = fork_model(len(seen["weights"]["text_embedding.weight"]))
    names = [name for name in model if not name.endswith(".pos_enc.pe")]
    for name, (first, second, steps) in seen["moments"].items():
        expected = moment_of(names.index(name))
        assert (first, second) == (pytest.approx([expected]), pytest.approx([expected**2])) and steps == 8, name
        assert torch.equal(seen["weights"][name], model[name])
    assert seen["position"] == trainer.Position(1, 3 * BATCH * ACCUMULATION, 8) and seen["decay"] == [0.02, 0.0]
    for step in (9, 10, 11):
        assert f"step={step} " in output and f"lr={fork_lr(step):.3e}" in output
    assert "[Info] ✅ Successfully resumed from" in output and "[Info]    Epoch: 1, Step: 8" in output
    assert "after 24 of 41 samples" in output and f"schedule goes on: warm-up {WARMUP}, {TOTAL} steps" in output
    assert "Not carried over: random numbers" in output and "[Info] lr at step" not in output
    now = {digest(path) for path in out.rglob("*.pth")}
    assert set(before.values()) <= now and digest(out / "model_step8.pth") == before["model_step8.pth"]
    assert digest(out / "fork_latest_step8.pth") == before["latest.pth"]
    ours = load_checkpoint(out / "latest.pth")
    assert ours["step"] > 8 and torch.equal(ours["model"]["emo_layer.weight"], model["emo_layer.weight"])
    assert list(ours["model"]) == list(model)


def test_a_run_from_a_fork_that_is_stopped_or_killed_is_bit_identical_to_the_one_that_is_not(data, tmp_path):
    whole, cut = (write_fork(tmp_path / name, 8, "A") for name in ("whole", "cut"))
    args = [*data_args(data), *SETTINGS, "--resume", "auto", "--save-interval", 2]
    call_trainer(*args, "--output-dir", whole)

    def killed(event: str, run: Any = None, *_: Any) -> None:
        if event == "step_done":
            os._exit(9)

    def stopped(event: str, run: Any = None, *_: Any) -> None:
        if event == "step_done" and run.state.position.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    child = os.fork()
    if not child:
        call_trainer(*args, "--output-dir", cut, on_event=killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not trainer.list_checkpoints(cut)[1:]  # before the first save: the fork's latest.pth is still the newest
    call_trainer(*args, "--output-dir", cut, status=143, on_event=stopped)
    call_trainer(*args, "--output-dir", cut)
    one, other = (load_checkpoint(folder / "latest.pth") for folder in (whole, cut))
    assert resumable_state(one) == resumable_state(other)


def test_the_forks_files_are_never_rotated_away_nor_written_over(data: Path, tmp_path: Path):
    out = write_fork(tmp_path / "out", 8, "A")
    shutil.copy(out / "model_step8.pth", out / "model_step4.pth")
    before = {path.name: digest(path) for path in out.glob("*.pth")}
    call_trainer(*data_args(data), *SETTINGS, "--resume", "auto", "--output-dir", out, "--save-interval", 1,
                 "--keep-checkpoints", 1, "--val-interval", 2)
    for name in ("model_step4.pth", "model_step8.pth"):
        assert digest(out / name) == before[name]
    assert digest(out / "fork_latest_step8.pth") == before["latest.pth"]
    elsewhere = tmp_path / "elsewhere"
    call_trainer(*data_args(data), *SETTINGS, "--resume", out / "model_step8.pth", "--output-dir", elsewhere,
                 "--max-steps", 9)
    assert not (elsewhere / "fork_latest_step8.pth").exists()
    assert digest(out / "model_step8.pth") == before["model_step8.pth"]


def position(flavour: str, step: int, epoch: int, batch_idx: int = 0, guessed: bool = False) -> tuple[Any, str]:
    return trainer.position_of_fork({"config": {"batch_size": BATCH, "grad_accumulation": ACCUMULATION}, "step": step,
                                     "epoch": epoch, "batch_idx": batch_idx, "has_position": flavour == "A",
                                     "is_guessed": guessed}, ROWS)


@pytest.mark.parametrize(("args", "epoch", "sample", "said"), [
    (("A", 8, 1, 6), 1, 24, "Epoch 1 goes on after 24 of 41 samples"),
    (("A", 10, 2, 0), 2, 0, "Epoch 2 goes on with its first sample"),
    (("A", 5, 0, 11), 1, 0, "Epoch 1 goes on with its first sample"),
    (("A", 7, 10, 0), 1, 16, "after 16 of 41"),  # the last file of --max-steps 7 names the last epoch
    (("A", 8, 1, 6, True), 1, 0, "Epoch 1 starts anew"),
    (("B", 8, 1), 1, 24, "after 24 of 41"),
    (("B", 15, 2), 3, 0, "Epoch 3 goes on with its first sample"),
    (("B", 14, 1), 1, 0, "Epoch 1 starts anew"),  # it had been interrupted, and began the epoch again
])
def test_the_position_is_that_of_the_file_or_of_its_steps_or_the_epoch_starts_anew(args, epoch, sample, said):
    found, how = position(*args)
    assert (found.epoch, found.sample_in_epoch, found.step) == (epoch, sample, args[1]) and said in how


@pytest.mark.parametrize("step", [1, 2, 3, 4, 9, 15, 16])
def test_the_schedule_is_found_from_one_rate_and_what_is_known(step: int):
    fork = {"config": {"learning_rate": PEAK}, "lr": fork_lr(step), "step": step}
    for known in ((WARMUP, TOTAL), (WARMUP, 999), (1000, TOTAL)):
        found = trainer.schedule_of_fork(fork, *known)
        assert trainer.get_lr(step, found) == pytest.approx(fork_lr(step), rel=1e-12, abs=1e-18)
    if WARMUP < step < TOTAL:
        assert trainer.schedule_of_fork(fork, WARMUP, 999) == trainer.Schedule(PEAK, WARMUP, TOTAL)
        assert trainer.schedule_of_fork(fork, 1000, TOTAL) == trainer.Schedule(PEAK, WARMUP, TOTAL)


def test_a_rate_that_no_schedule_has_is_gone_on_from_with_the_settings_here_and_said(data: Path, tmp_path: Path):
    out = write_fork(tmp_path / "out", 8, "A", lr=PEAK * 0.3183)
    output = call_trainer(*data_args(data), "--resume", "auto", "--output-dir", out, "--max-steps", 9)
    assert "[Info] lr at step 8: 3.183000e-04 -> " in output and "schedule goes on" not in output


def test_a_longer_run_is_said_with_what_it_does_to_the_rate_and_a_planned_stop_goes_on(data: Path, tmp_path: Path):
    out = write_fork(tmp_path / "out", 7, "A", lr=0.0, epoch=EPOCHS, batch_idx=0)  # --max-steps 7 ended it
    output = call_trainer(*data_args(data), "--resume", "auto", "--output-dir", out, "--max-steps", 9,
                          "--warmup-steps", 3)
    assert "[Info] lr at step 7: 0.000000e+00 -> " in output and load_checkpoint(out / "latest.pth")["step"] == 9


def test_what_the_file_does_not_hold_of_the_batch_is_typed_or_that_trainers_default_and_said(data, tmp_path):
    out = write_fork(tmp_path / "out", 8, "B")
    output = call_trainer(*data_args(data), "--resume", "auto", "--output-dir", out, "--max-steps", 9)
    assert "does not hold its batch size: 4 x 1 is taken" in output and "global batch 4;" in output
    out = write_fork(tmp_path / "alone", 8, "A")
    (out / "latest.pth").unlink()
    output = call_trainer(*data_args(data), "--resume", out / "model_step8.pth", "--batch-size", 4, "--max-steps", 9)
    assert "does not hold" not in output and "Batch size 4 x accumulation 8" in output and "after 24 of 41" in output


def test_changed_data_are_refused_and_another_model_or_tokenizer_too(data: Path, tmp_path: Path):
    out = write_fork(tmp_path / "out", 8, "A")
    fewer = shutil.copytree(data, tmp_path / "fewer")
    write_manifest(fewer / "train_pairs.jsonl", read_jsonl(data / "train_pairs.jsonl")[1:])
    message = mistake(*data_args(fewer), "--resume", "auto", "--output-dir", out)
    assert "training data changed" in message and "--accept-changed-data" in message
    content = fork_content(8, "A")
    content["model"]["text_head.bias"] = content["model"]["text_head.bias"][:-1]
    content["optimizer"]["state"] = {}
    torch.save(content, out / "latest.pth")
    assert "text_head.bias" in mistake(*data_args(data), "--resume", "auto", "--output-dir", out)


def test_data_of_the_embedded_codec_are_refused(data: Path, tmp_path: Path):
    out, other = write_fork(tmp_path / "out", 8, "A"), shutil.copytree(data, tmp_path / "embedded")
    record = {"features": "embedded", "num_codes": 64}
    (other / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT, "dataset": record}))
    assert "embedded codec" in mistake(*data_args(other), "--resume", "auto", "--output-dir", out)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["of_nobody", "of_numpy"])
def test_nothing_but_numpys_arrays_is_unpickled(kind: str, data: Path, tmp_path: Path):
    hidden = Malicious(tmp_path / "hacked") if kind == "of_nobody" else np.random.RandomState(3)
    out = tmp_path / "out"
    out.mkdir()
    torch.save(fork_content(8, "A", rng_state={"numpy": hidden}), out / "latest.pth")
    before = digest(out / "latest.pth")
    message = mistake(*data_args(data), *SETTINGS, "--resume", "auto", "--output-dir", out)
    assert "latest.pth" in message and not (tmp_path / "hacked").exists()
    assert digest(out / "latest.pth") == before and not list(out.glob("model_step*"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda content: content["optimizer"]["param_groups"][0]["params"].pop(), "moments are not those of its tensors"),
    (lambda content: content["optimizer"]["state"].update({3: content["optimizer"]["state"].popitem()[1]}),
     "moments are not those of its tensors"),
    (lambda content: content["optimizer"]["param_groups"].append({}), "too many values"),
    (lambda content: content["scheduler"].pop("base_lrs"), "base_lrs"),
    (lambda content: content.update(scheduler=None), "NoneType"),
    (lambda content: content.update(batch_idx=-1), "batch_idx"),
])
def test_what_is_no_forks_checkpoint_is_refused_with_the_way_to_use_its_weights(spoil, said, data, tmp_path):
    content = fork_content(8, "A")
    spoil(content)
    torch.save(content, tmp_path / "latest.pth")
    message = mistake(*data_args(data), *SETTINGS, "--resume", tmp_path / "latest.pth")
    assert said in message and f"--base-checkpoint {tmp_path / 'latest.pth'}, with a new --output-dir" in message


def test_weights_that_are_not_finite_are_refused(data: Path, tmp_path: Path):
    content = fork_content(8, "A")
    content["model"]["mel_head.bias"][5] = math.nan
    torch.save(content, tmp_path / "latest.pth")
    assert "not finite" in mistake(*data_args(data), *SETTINGS, "--resume", tmp_path / "latest.pth")


def test_a_flipped_byte_is_found_and_auto_takes_the_older_file(data: Path, tmp_path: Path):
    out = write_fork(tmp_path / "out", 8, "A")
    write_fork(out, 9, "A")
    for name in ("latest.pth", "model_step9.pth"):
        flip_a_byte(out / name)
    output = call_trainer(*data_args(data), *SETTINGS, "--resume", "auto", "--output-dir", out, "--max-steps", 9)
    assert "model_step9.pth is damaged" in output and "resumed from " + str(out / "model_step8.pth") in output


def test_the_base_vocabulary_that_a_fork_froze_stays_frozen(monkeypatch, data: Path, tmp_path: Path):
    monkeypatch.setattr(trainer, "FORK_FROZEN", 20)
    out = write_fork(tmp_path / "out", 8, "A")
    args = [*data_args(data), *SETTINGS, "--resume", out / "model_step8.pth", "--max-steps", 10]
    output = call_trainer(*args, "--output-dir", tmp_path / "frozen")
    assert "first 20 text tokens stay frozen" in output
    then = fork_content(8, "A")["model"]["text_embedding.weight"]
    now = load_checkpoint(tmp_path / "frozen" / "latest.pth")["model"]["text_embedding.weight"]
    assert torch.equal(now[:20], then[:20]) and not torch.equal(now[20:50], then[20:50])
    call_trainer(*args, "--output-dir", tmp_path / "trained", "--no-freeze-base-vocab")
    now = load_checkpoint(tmp_path / "trained" / "latest.pth")["model"]["text_embedding.weight"]
    assert not torch.equal(now[:20], then[:20])


def test_evaluation_reads_a_forks_checkpoint(data: Path, tmp_path: Path):
    out = write_fork(tmp_path / "out", 8, "B")
    output = call_trainer(*data_args(data), "--resume", "auto", "--output-dir", out, "--eval-only")
    assert " step=8 text_loss=" in output and len(read_jsonl(out / "eval.jsonl")) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def speech(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 64, count).astype(np.int32)


def fork_clips(folder: Path, seconds: list[Any], rng: np.random.Generator, codes: list[np.ndarray] | None = None,
               absolute: bool = False, first: int = 0) -> list[dict[str, Any]]:
    """Clips as the forks' preprocessing saves them: four arrays each, in folders by kind. Returns manifest rows."""
    rows = []
    for i, duration in enumerate(seconds):
        clip = f"JA_spk{i % 2}_{first + i:04}"
        arrays = {"text_ids": rng.integers(2, 50, 5).astype(np.int32),
                  "codes": speech(rng, round(50 * (duration or 1)) - 1) if codes is None else codes[i],
                  "condition": rng.normal(0, 0.1, (32, 32)).astype(np.float32),
                  "emo_vec": rng.normal(0, 0.1, 32).astype(np.float32)}
        paths = {}
        for kind, array in arrays.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{clip}.npy", array)
            paths[f"{kind}_path"] = str(folder / kind / f"{clip}.npy") if absolute else f"{kind}/{clip}.npy"
        rows.append({"id": clip, "audio_path": f"wavs/{clip}.wav", "text": f"clip number {first + i} of them",
                     "speaker": "", "language": "", "duration": duration, "text_len": 5,
                     "code_len": len(arrays["codes"]), "condition_len": 32, **paths})
    return rows


def write_clips(folder: Path, training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    write_manifest(folder / "train_manifest.jsonl", training)
    write_manifest(folder / "val_manifest.jsonl", validation)
    config = {"gpt": GPT | {"max_mel_tokens": 400}, "dataset": {"sample_rate": 24000}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def trained(folder: Path, out: Path) -> str:
    return call_trainer("--train-manifest", f"{folder / 'train_pairs.jsonl'}::am", "--tokenizer", TOKENIZER,
                        "--output-dir", out, "--max-steps", 1, "--save-interval", 0)


def test_clips_whose_arrays_are_all_gone_are_one_error_and_no_pairs(tmp_path: Path):
    folder = tmp_path / "made"
    write_clips(folder, fork_clips(folder, [1.1, 1.2, 1.4, 2.3], np.random.default_rng(1)), [])
    shutil.rmtree(folder / "codes")
    with pytest.raises(ToolError, match="not one clip's codes can be read, such as codes/.* Bring the arrays back"):
        build_pairs.main(["--data-dir", str(folder)])
    assert not (folder / "train_pairs.jsonl").exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_single_clips_are_paired_and_train_also_after_their_folder_has_moved(absolute: bool, tmp_path: Path, capsys):
    rng = np.random.default_rng(1)
    folder = tmp_path / "made"
    clips = fork_clips(folder, [1.1, 1.2, None, 1.4, 2.3, 2.4], rng, absolute=absolute)
    moved = tmp_path / "moved"
    write_clips(folder, clips, fork_clips(folder, [1.5, 1.6], rng, absolute=absolute, first=6)).rename(moved)
    build_pairs.main(["--data-dir", str(moved)])
    training, validation = (read_jsonl(moved / f"{split}_pairs.jsonl") for split in ("train", "val"))
    assert len(training) == 6 and {pair["target_id"] for pair in validation} == {"JA_spk0_0006", "JA_spk1_0007"}
    for pair in training + validation:
        assert pair["speaker"] in ("spk0", "spk1") and pair["speaker"] in pair["prompt_id"]
        assert not any(key.endswith("_start") for key in pair) and pair["target_codes_path"].startswith("codes/")
        assert ("prompt_duration" in pair) == (pair["prompt_id"] != "JA_spk0_0002")
    output = trained(moved, tmp_path / "out")
    assert "nothing beside it records" in output and "Saved" in output


def test_a_paired_manifest_of_a_fork_trains_as_it_is(tmp_path: Path):
    rng = np.random.default_rng(2)
    clips = fork_clips(tmp_path, [1.1 + 0.1 * i for i in range(8)], rng, absolute=True)
    pairs = [{"id": f"{target['id']}__{prompt['id']}", "speaker": "spk", "prompt_id": prompt["id"],
              "prompt_audio_path": prompt["audio_path"], "prompt_condition_path": prompt["condition_path"],
              "prompt_condition_len": 32, "prompt_emo_vec_path": prompt["emo_vec_path"] if i % 2 else "",
              "prompt_duration": prompt["duration"], "target_id": target["id"],
              "target_audio_path": target["audio_path"], "target_text": target["text"],
              "target_text_ids_path": target["text_ids_path"], "target_text_len": 5,
              "target_codes_path": target["codes_path"], "target_code_len": target["code_len"],
              "target_emo_vec_path": target["emo_vec_path"]}
             for i, (target, prompt) in enumerate(zip(clips, clips[1:] + clips[:1], strict=True))]
    write_clips(tmp_path, clips, [])
    for split in ("train", "val"):
        write_manifest(tmp_path / f"{split}_pairs.jsonl", pairs)
    assert "Saved" in trained(tmp_path, tmp_path / "out")


def test_without_validation_clips_every_fiftieth_is_one_and_no_sentence_is_in_both(tmp_path: Path, capsys):
    rng = np.random.default_rng(3)
    clips = fork_clips(tmp_path, [1.1 + 0.01 * i for i in range(60)], rng)
    (write_clips(tmp_path, clips, []) / "val_manifest.jsonl").unlink()
    build_pairs.main(["--data-dir", str(tmp_path)])
    assert [pair["target_id"] for pair in read_jsonl(tmp_path / "val_pairs.jsonl")] == [clips[0]["id"], clips[50]["id"]]
    again = fork_clips(tmp_path, [1.1, 1.2, 1.3], rng, first=60)
    again[0]["text"] = clips[7]["text"]
    build_pairs.main(["--data-dir", str(write_clips(tmp_path, clips, again))])
    assert {pair["target_id"] for pair in read_jsonl(tmp_path / "val_pairs.jsonl")} == {row["id"] for row in again[1:]}
    assert "1 validation clips left out: their sentences are trained on" in capsys.readouterr().out


@pytest.mark.parametrize(("spoil", "said"), [
    ({"audio_path": "wavs/0001.wav"}, 'line 1: no speaker, and none in the name of audio_path. Add "speaker"'),
    ({"code_len": 0}, "line 1: code_len is 0"), ({"codes_path": None}, "line 1: codes_path is None"),
])
def test_a_clip_that_cannot_be_paired_is_an_error_with_its_line(spoil: dict[str, Any], said: str, tmp_path: Path):
    clips = fork_clips(tmp_path, [1.1, 1.2, 1.3, 1.4], np.random.default_rng(4))
    with pytest.raises(ToolError) as error:
        build_pairs.main(["--data-dir", str(write_clips(tmp_path, [clips[0] | spoil, *clips[1:]], []))])
    assert "train_manifest.jsonl" in str(error.value) and said in str(error.value)


# Padding


def clips_of(seconds: list[float], batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Codes as the forks' preprocessing saves them of padded batches: as many as the longest clip of its batch has."""
    counts = [round(50 * length) - 1 for length in seconds]
    longest = [max(counts[i // batch * batch : i // batch * batch + batch]) for i in range(len(counts))]
    return [np.concatenate([speech(rng, count), np.full(to - count, 7, np.int32)])
            for count, to in zip(counts, longest, strict=True)]


def lengths(rng: np.random.Generator, low: float, high: float, count: int = 40) -> list[float]:
    return [round(float(length), 2) for length in rng.uniform(low, high, count)]


@pytest.mark.parametrize("known", [True, False], ids=["lengths recorded", "lengths unknown"])
@pytest.mark.parametrize(("low", "high", "batch"), [(1, 6, 8), (1, 6, 2), (2, 4, 8), (1, 3, 4)])
def test_padded_codes_are_refused_with_the_remedy(low: float, high: float, batch: int, known: bool, tmp_path: Path):
    rng = np.random.default_rng(5)
    seconds = lengths(rng, low, high)
    clips = fork_clips(tmp_path, seconds, rng, clips_of(seconds, batch, rng))
    clips = clips if known else [clip | {"duration": None} for clip in clips]
    with pytest.raises(ToolError) as error:
        build_pairs.main(["--data-dir", str(write_clips(tmp_path, clips, []))])
    message = str(error.value)
    assert "there is padding in the codes" in message and "Preprocess these recordings again" in message
    # The pairs that the fork's own tool makes of them, in the trainer.
    (tmp_path / "pairs").mkdir()
    with pytest.MonkeyPatch.context() as blind:
        blind.setattr(fork_manifests, "without_padding", lambda utterances, data_dir: utterances)
        build_pairs.main(["--data-dir", str(tmp_path)])
    if known or (low, high) == (1, 6):
        said = mistake("--train-manifest", tmp_path / "train_pairs.jsonl", "--tokenizer", TOKENIZER,
                       "--output-dir", tmp_path / "out")
        assert "there is padding in its codes" in said and "Preprocess its recordings again" in said


@pytest.mark.parametrize("kind", ["plain", "a second of silence", "whole seconds", "one length for all", "unknown"])
def test_honest_codes_are_no_padding(kind: str, tmp_path: Path, capsys):
    rng = np.random.default_rng(6)
    seconds = [3.0] * 40 if kind == "one length for all" else lengths(rng, 1, 6)
    codes = [speech(rng, round(50 * length) - 1) for length in seconds]
    if kind == "a second of silence":
        codes = [np.concatenate([array, np.full(int(rng.integers(5, 60)), 52, np.int32)]) for array in codes]
        seconds = [(len(array) + 1) / 50 for array in codes]
    clips = fork_clips(tmp_path, seconds, rng, codes)
    if kind in ("whole seconds", "unknown"):
        clips = [clip | {"duration": int(clip["duration"]) if kind == "whole seconds" else None} for clip in clips]
    build_pairs.main(["--data-dir", str(write_clips(tmp_path, clips, []))])
    assert "left out" not in capsys.readouterr().out and len(read_jsonl(tmp_path / "train_pairs.jsonl")) == 39
    assert "Saved" in trained(tmp_path, tmp_path / "out")


def test_a_few_clips_with_more_codes_than_sound_are_left_out_and_named(tmp_path: Path, capsys):
    rng = np.random.default_rng(7)
    clips = fork_clips(tmp_path, lengths(rng, 1, 6), rng)
    clips[3]["duration"] = 0.5
    build_pairs.main(["--data-dir", str(write_clips(tmp_path, clips, []))])
    assert f"{clips[3]['id']} left out" in capsys.readouterr().out
    assert clips[3]["id"] not in (tmp_path / "train_pairs.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Arrow folders


def test_arrow_folders_become_pairs_that_train(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from tools import convert_arrow

    rng, clips = np.random.default_rng(8), []
    for part in (0, 1, 10):
        rows = [{"text_ids": rng.integers(2, 50, rng.integers(3, 9)).astype(np.int16),
                 "codes": rng.integers(0, 64, rng.integers(6, 20)).astype(np.int16),
                 "condition": rng.normal(size=(32, 32)).astype(np.float16),
                 "emo_vec": rng.normal(size=32).astype(np.float16)}
                for _ in range(5)]
        clips += rows
        half = pyarrow.float16()
        kinds = {"text_ids": pyarrow.list_(pyarrow.int16()), "codes": pyarrow.list_(pyarrow.int16()),
                 "condition": pyarrow.list_(pyarrow.list_(half)), "emo_vec": pyarrow.list_(half)}
        table = pyarrow.table({name: pyarrow.array([[*row[name]] for row in rows], kind)
                               for name, kind in kinds.items()})
        (tmp_path / "in" / f"part_{part}").mkdir(parents=True)
        with pyarrow.OSFile(str(tmp_path / "in" / f"part_{part}" / "data-00000-of-00001.arrow"), "wb") as sink, \
                pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    out = tmp_path / "arrays"
    convert_arrow.main(["--input", str(tmp_path / "in"), "--output-dir", str(out)])
    pairs = read_jsonl(out / "val_pairs.jsonl") + read_jsonl(out / "train_pairs.jsonl")
    arrays = {kind: np.load(out / f"{kind}.npy") for kind in convert_arrow.KINDS}
    assert len(pairs) == len(clips) == 15
    for pair, clip in zip(pairs, clips, strict=True):
        for kind, key in convert_arrow.KINDS.items():
            start = pair[f"{key}_start"]
            found = arrays[kind][start : start + (1 if kind == "emo_vec" else len(clip[kind]))]
            assert np.array_equal(found.reshape(clip[kind].shape), clip[kind])
    (out / "config.yaml").write_text(yaml.safe_dump({"gpt": GPT}))
    assert "Saved" in trained(out, tmp_path / "out")
    (tmp_path / "in" / "part_1" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(ToolError, match="part_1/data-00000-of-00001.arrow: cannot be read"):
        convert_arrow.main(["--input", str(tmp_path / "in"), "--output-dir", str(out)])
    with pytest.raises(ToolError, match="holds no part_0"):
        convert_arrow.main(["--input", str(out), "--output-dir", str(out)])


def test_without_pyarrow_one_line_says_what_to_install(monkeypatch, tmp_path: Path):
    from tools import convert_arrow

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ToolError, match="pip install pyarrow"):
        convert_arrow.main(["--input", str(tmp_path), "--output-dir", str(tmp_path)])


def test_inspect_checkpoint_tells_a_forks_files_and_which_one_auto_would_take(tmp_path: Path):
    folder = write_fork(tmp_path / "fork", 8, "A")
    done = subprocess.run([sys.executable, "-m", "tools.inspect_checkpoint", folder], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert f"--resume auto takes {folder}/latest.pth: step 8" in done.stdout and "a fork's trainer" in done.stdout
    report = json.loads(subprocess.run([sys.executable, "-m", "tools.inspect_checkpoint", folder, "--json"], cwd=ROOT,
                                       capture_output=True, text=True, check=True).stdout)
    assert all(entry["verified"] and entry["step"] == 8 for entry in report["checkpoints"])
