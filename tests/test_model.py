"""The model against a slow, plain reading of its description, and what a training step promises."""

from __future__ import annotations

import functools
import math
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    GPT,
    call_trainer,
    data_args,
    load_checkpoint,
    make_dataset,
    metrics_of,
    read_jsonl,
    trainer,
)

SMALL = trainer.model_config_from(GPT, "test", vocab_size=50)


def random_model(seed: int = 0, dropout: float = 0.0) -> trainer.UnifiedVoiceGPT:
    """A model whose weights are large enough for every part to matter."""
    model = trainer.UnifiedVoiceGPT(SMALL, dropout)
    trainer.init_fresh_weights(model, seed, 2.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.empty_like(weight).normal_(0, 0.1, generator=generator))
    return model


def random_samples(lengths: list[tuple[int, int]], seed: int = 0) -> list[trainer.Sample]:
    rng = np.random.default_rng(seed)
    return [trainer.Sample(rng.integers(0, 50, t), rng.integers(0, 64, c),
                           rng.normal(0, 1, (32, 32)).astype(np.float32), rng.normal(0, 1, 32).astype(np.float32), i)
            for i, (t, c) in enumerate(lengths)]


def plain_losses(weights: dict[str, torch.Tensor], sample: trainer.Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses of one sample alone, from the format's description, in float64 and without any shortcut."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    text = torch.tensor([0, *sample.text_ids, 1])
    mel = torch.tensor([64, *sample.codes, 65])
    condition = torch.from_numpy(sample.condition).double() + torch.from_numpy(sample.emo_vec).double()
    x = torch.cat([
        condition, w["speed_emb.weight"][1:], w["speed_emb.weight"][:1],
        w["text_embedding.weight"][text] + w["text_pos_embedding.emb.weight"][: len(text)],
        w["mel_embedding.weight"][mel] + w["mel_pos_embedding.emb.weight"][: len(mel)]])
    size = 32 // 2
    mask = torch.full((len(x), len(x)), -math.inf, dtype=torch.float64).triu(1)
    for i in range(2):
        p = f"gpt.h.{i}."
        qkv = norm(x, p + "ln_1") @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]
        q, k, v = qkv.split(32, dim=1)
        heads = []
        for head in range(2):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size) + mask
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, 1) @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        inner = norm(x, p + "ln_2") @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"]
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + gelu @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    x = norm(norm(x, "gpt.ln_f"), "final_norm")[34:]
    text_rows, mel_rows = x[: len(text)], x[len(text) :]
    text_logits = text_rows @ w["text_head.weight"].T + w["text_head.bias"]
    mel_logits = mel_rows @ w["mel_head.weight"].T + w["mel_head.bias"]
    return (F.cross_entropy(text_logits[:-1], text[1:], reduction="none"),
            F.cross_entropy(mel_logits[:-1], mel[1:], reduction="none"))


LENGTHS = [(3, 40), (12, 5), (1, 1), (25, 50), (8, 8), (30, 61), (2, 30)]


@pytest.mark.parametrize("composition", [[0], [5], [0, 1, 2, 3, 4, 5, 6], [6, 3, 1], [2, 2, 5]])
def test_a_samples_losses_equal_the_plain_description_whatever_its_batch_neighbours(composition):
    model, samples = random_model(), random_samples(LENGTHS)
    batch = trainer.collate_packed([samples[i] for i in composition], SMALL)
    with torch.no_grad():
        text, mel, _ = trainer.token_losses(model.eval(), batch)
    weights = model.state_dict()
    expected = [plain_losses(weights, samples[i]) for i in composition]
    torch.testing.assert_close(text.double(), torch.cat([e[0] for e in expected]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mel.double(), torch.cat([e[1] for e in expected]), atol=1e-5, rtol=1e-5)


def test_tensor_names_and_shapes_are_indextts2s():
    state = trainer.UnifiedVoiceGPT(SMALL).state_dict()
    assert len(state) == 12 * SMALL.layers + 13
    assert state["text_embedding.weight"].shape == (51, 32)
    assert state["text_pos_embedding.emb.weight"].shape == (32, 32)
    assert state["mel_pos_embedding.emb.weight"].shape == (63, 32)
    assert state["gpt.h.1.attn.c_attn.weight"].shape == (32, 96)
    assert state["gpt.h.1.mlp.c_proj.weight"].shape == (128, 32)
    assert state["mel_head.weight"].shape == (66, 32)


def test_recomputed_activations_change_no_gradient():
    batch = trainer.collate_packed(random_samples(LENGTHS), SMALL)
    gradients = []
    for recompute in (False, True):
        model = random_model(dropout=0.1).train()
        model.grad_checkpointing = recompute
        torch.manual_seed(3)
        text, mel, _ = trainer.token_losses(model, batch)
        (text.sum() + mel.sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def prepare(data: Path, out: Path, *flags: object) -> trainer.Run:
    """A run that is ready to train, in this process."""
    typed = trainer.parse_args([*data_args(data), "--output-dir", str(out), *map(str, flags)])
    stop = trainer.StopSignal()
    out.mkdir(parents=True, exist_ok=True)
    run = trainer.prepare(typed, None, out, trainer.Process(stop, trainer.Console(stop, sys.stderr)))
    run.state.run_dir = "logs/run_test"
    return run


def first_batches(run: trainer.Run) -> list[Future[trainer.PackedBatch]]:
    """The micro-batches of the first step, as a reading thread hands them over."""
    step = next(trainer.steps_from(trainer.Position(), run.train_data.mix, run.config))
    futures: list[Future[trainer.PackedBatch]] = [Future() for _ in step]
    for future, rows in zip(futures, step, strict=True):
        future.set_result(trainer.read_batch(run.train_data, rows))
    return futures


def test_one_loss_and_one_gradient_however_the_step_is_split(tiny, tmp_path):
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        run = prepare(tiny, tmp_path, "--batch-size", batch_size, "--grad-accumulation", accumulation, "--dropout", 0)
        stats = trainer.train_step(run, first_batches(run))
        results.append((stats, [p.grad.clone() for p in run.model.parameters() if p.grad is not None]))
    (whole, whole_gradients), *others = results
    for stats, gradients in others:
        assert stats.text_loss.item() == pytest.approx(whole.text_loss.item(), rel=1e-6)
        assert stats.mel_loss.item() == pytest.approx(whole.mel_loss.item(), rel=1e-6)
        for gradient, expected in zip(gradients, whole_gradients, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_masks_have_the_asked_for_share_keep_the_mean_and_depend_on_the_seed_alone(dtype: torch.dtype):
    ones = torch.ones(999, 257, dtype=dtype)
    for share in (0.1, 0.5, 0.9):
        torch.manual_seed(5)
        found = trainer.dropped(ones, share, True)
        assert found.dtype == dtype and float((found == 0).float().mean()) == pytest.approx(share, abs=0.005)
        assert found.unique().tolist() == pytest.approx([0, 1 / (1 - share)], rel=0.005)
        torch.manual_seed(5)
        assert trainer.dropped(ones, share, True).equal(found) and not trainer.dropped(ones, share, True).equal(found)
    assert trainer.dropped(ones, 0.1, False).equal(ones) and trainer.dropped(ones, 0.0, True).equal(ones)
    assert trainer.dropped(ones, 0.9999, True).isfinite().all()


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
def test_attention_by_products_is_causal_attention(length: int):
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 3, length, 8, requires_grad=True)
    outputs = [attend(*inputs) for attend in (
        trainer.product_attention, functools.partial(F.scaled_dot_product_attention, is_causal=True))]
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), inputs)[0] for out in outputs))


def test_a_logged_steps_top1_is_its_own_whatever_the_log_interval(tiny, tmp_path):
    found = []
    for interval in (1, 3):
        out = tmp_path / str(interval)
        call_trainer(*data_args(tiny), "--output-dir", out, "--max-steps", 6, "--log-interval", interval,
                     "--learning-rate", 0.02, "--warmup-steps", 1)
        lines = read_jsonl(next(out.glob("logs/run_*/metrics.jsonl")))
        found.append({line["step"]: line["mel_top1"] for line in lines if line["kind"] == "train"})
    assert found[1] == {step: found[0][step] for step in (3, 6)} and all(found[1].values())


def test_weight_decay_leaves_biases_norms_and_embeddings_alone():
    optimizer = trainer.make_optimizer(trainer.UnifiedVoiceGPT(SMALL), 0.5)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
    assert {name.split(".")[-1] for name in decayed["param_names"]} == {"weight"}
    assert "text_head.weight" in decayed["param_names"]
    for name in ("text_embedding.weight", "mel_pos_embedding.emb.weight", "speed_emb.weight", "final_norm.weight"):
        assert name in others["param_names"]


def weights_of(run: trainer.Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_an_update_with_non_finite_gradients_is_skipped_and_ten_in_a_row_are_an_error(tiny, tmp_path, monkeypatch, amp):
    run = prepare(tiny, tmp_path, "--batch-size", 4, "--grad-accumulation", 1, "--amp", amp)
    batches = first_batches(run)
    trainer.train_step(run, batches)
    before, moments = weights_of(run), trainer.digest_tree(run.optimizer.state_dict()["state"])
    plain = trainer.token_losses
    monkeypatch.setattr(trainer, "token_losses", lambda *args: tuple(x * math.nan for x in plain(*args)))
    for _ in range(9):
        trainer.train_step(run, batches)
        trainer.check_finite(run)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    assert trainer.digest_tree(run.optimizer.state_dict()["state"]) == moments
    assert run.nonfinite.tolist() == [9, 9, 9]
    trainer.train_step(run, batches)
    with pytest.raises(trainer.UserError, match="10 steps in a row"):
        trainer.check_finite(run)


def test_fp16_overflows_count_only_once_the_scale_is_down_to_one(tiny, tmp_path, monkeypatch):
    run = prepare(tiny, tmp_path, "--batch-size", 4, "--grad-accumulation", 1, "--amp", "fp16")
    batches = first_batches(run)
    before = weights_of(run)
    plain = trainer.token_losses
    monkeypatch.setattr(trainer, "token_losses", lambda *args: tuple(x * math.inf for x in plain(*args)))
    for _ in range(17):  # 65536 halves to 0.5
        trainer.train_step(run, batches)
    assert run.scaler.get_scale() == 0.5
    assert run.nonfinite[0] == 17 and run.nonfinite[2] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_out_of_memory_splits_the_micro_batch_keeps_the_samples_and_saves_the_split(tiny, tmp_path):
    seen: list[int] = []

    def small_memory(event: str, run: Any, *details: Any) -> None:
        if event == "micro_step" and len(details[0].rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test)")
        seen.extend(details[0].rows if event == "micro_step" else ())

    call_trainer(*data_args(tiny), "--output-dir", tmp_path, "--epochs", 1, "--batch-size", 8, "--grad-accumulation", 1,
                 "--log-interval", 1, on_event=small_memory)
    assert sorted(seen) == list(range(41))
    config = load_checkpoint(tmp_path / "latest.pth")["config"]
    assert (config["batch_size"], config["grad_accumulation"]) == (2, 4)
    assert [line["step"] for line in metrics_of(tmp_path) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("moment", ["micro_step", "validation_batch"])
def test_out_of_memory_with_one_sample_is_an_error_with_the_remedy(tiny, tmp_path, moment):
    def no_memory(event: str, *_: Any) -> None:
        if event == moment:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test)")

    output = call_trainer(*data_args(tiny), "--output-dir", tmp_path, "--batch-size", 2, "--grad-accumulation", 1,
                          "--max-steps", 1, status=1, on_event=no_memory)
    assert "[Error] out of GPU memory with one sample" in output and "--grad-checkpointing" in output


def test_a_validation_that_runs_out_of_memory_is_split_like_a_step_and_gives_the_same_losses(tiny, tmp_path):
    def small_memory(event: str, run: Any, *details: Any) -> None:
        if event == "validation_batch" and len(details[0].rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test)")

    losses = []
    for name, on_event in (("roomy", trainer.no_event), ("tight", small_memory)):
        out = tmp_path / name
        call_trainer(*data_args(tiny), "--output-dir", out, "--max-steps", 1, "--val-batch-size", 6, on_event=on_event)
        losses.append(load_checkpoint(out / "latest.pth")["last_val"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A base checkpoint like IndexTTS2's: 50 text tokens, conditioning tensors, leftovers of the inference wrapper."""
    tensors = dict(random_model().state_dict())
    tensors["emo_layer.weight"] = torch.randn(32, 32)
    tensors["conditioning_encoder.embed.pos_enc.pe"] = torch.randn(1, 50, 8)
    leftovers = {"gpt.wte.weight": torch.randn(3, 3), "inference_model.lm_head.0.weight": torch.randn(3)}
    path = tmp_path / "gpt.pth"
    torch.save({"model": {**tensors, **leftovers}}, path)
    return path, tensors


def fine_tune(data: Path, out: Path, base_path: Path, *flags: object) -> dict[str, torch.Tensor]:
    call_trainer(*data_args(data), "--output-dir", out, "--base-checkpoint", base_path, "--max-steps", 3,
                 "--batch-size", 4, "--learning-rate", 0.01, "--weight-decay", 0.1, *flags)
    return load_checkpoint(out / "latest.pth")["model"]


def test_tensors_that_the_loss_does_not_use_are_carried_through_unchanged_in_indextts2s_order(tiny, tmp_path, base):
    path, tensors = base
    model = fine_tune(tiny, tmp_path / "out", path)
    for name in ("emo_layer.weight", "conditioning_encoder.embed.pos_enc.pe"):
        assert torch.equal(model[name], tensors[name])
    assert set(model) == set(tensors)
    names = list(model)
    assert names[:4] == ["conditioning_encoder.embed.pos_enc.pe", "text_embedding.weight", "emo_layer.weight",
                         "mel_embedding.weight"]
    assert names[-3:] == ["mel_head.weight", "mel_head.bias", "speed_emb.weight"]


def test_a_larger_tokenizer_keeps_the_base_rows_and_trains_to_finite_losses(tiny, tmp_path, base):
    path, tensors = base
    run = prepare(tiny, tmp_path / "out", "--base-checkpoint", path)
    embedding = run.model.state_dict()["text_embedding.weight"]
    assert len(embedding) > 51
    assert torch.equal(embedding[:50], tensors["text_embedding.weight"][:50])
    assert not torch.equal(embedding[50], tensors["text_embedding.weight"][50])  # no token's row there
    assert torch.isfinite(embedding).all()
    model = fine_tune(tiny, tmp_path / "out", path)
    assert all(torch.isfinite(tensor).all() for tensor in model.values())


def test_frozen_base_tokens_are_bit_identical_after_training_and_after_a_resume(tiny, tmp_path, base):
    path, tensors = base
    out = tmp_path / "out"
    fine_tune(tiny, out, path, "--freeze-base-vocab")
    call_trainer("--output-dir", out, "--resume", "auto", "--max-steps", 5)
    model = load_checkpoint(out / "latest.pth")["model"]
    for name in trainer.VOCAB_TENSORS:
        assert torch.equal(model[name][:50], tensors[name][:50])
    assert not torch.equal(model["mel_head.weight"], tensors["mel_head.weight"])


@pytest.mark.parametrize("flavour", ["bare", "fork"])
def test_every_flavour_of_base_checkpoint_loads_without_unpickling_code(tiny, tmp_path, base, flavour):
    path, tensors = base
    content: Any = tensors
    if flavour == "fork":
        rng_state = {"numpy": np.random.get_state(), "python": (3, tuple(range(625)), None), "torch_cpu":
                     torch.get_rng_state()}
        content = {"model": tensors, "optimizer": {}, "epoch": 1, "step": 2, "rng_state": rng_state,
                   "pytorch_version": torch.__version__}
    torch.save(content, path)
    run = prepare(tiny, tmp_path / "out", "--base-checkpoint", path)
    assert torch.equal(run.model.state_dict()["mel_head.weight"], tensors["mel_head.weight"])


def test_eval_only_gives_the_same_losses_per_row_in_any_batch_composition(tiny, tmp_path, base):
    path, tensors = base
    results = []
    for size in (1, 4, 6):
        out = tmp_path / f"eval{size}"
        call_trainer("--eval-only", "--base-checkpoint", path, *data_args(tiny), "--output-dir", out,
                     "--val-batch-size", size)
        results.append(read_jsonl(out / "eval.jsonl"))
        assert not list(out.glob("*.pth")) and not (out / "logs").exists()
    assert [row["id"] for row in results[0]] == [f"val{i}" for i in range(6)]
    for rows in results[1:]:
        for row, alone in zip(rows, results[0], strict=True):
            assert row["mel_token_losses"] == pytest.approx(alone["mel_token_losses"], abs=1e-5)
            assert row["text_loss"] == pytest.approx(sum(alone["text_token_losses"]) / alone["text_tokens"], abs=1e-5)
            assert len(row["mel_token_losses"]) == row["mel_tokens"]


def test_files_in_shards_and_files_per_utterance_train_the_same_bits(tiny, tiny_files, tmp_path):
    states = []
    for data in (tiny, tiny_files):
        out = tmp_path / str(len(states))
        call_trainer(*data_args(data), "--output-dir", out, "--max-steps", 3)
        states.append(trainer.digest_tree(load_checkpoint(out / "latest.pth")["model"]))
    assert states[0] == states[1]


def test_metrics_hold_losses_top1_lr_gradient_norm_speed_and_mfu(tiny, tmp_path):
    call_trainer(*data_args(tiny), "--output-dir", tmp_path, "--max-steps", 2, "--log-interval", 1)
    lines = read_jsonl(next(tmp_path.glob("logs/run_*/metrics.jsonl")))
    train, val = (next(line for line in lines if line["kind"] == kind) for kind in ("train", "val"))
    assert {"epoch", "step", "text_loss", "mel_loss", "mel_top1", "lr", "grad_norm", "tokens_per_second",
            "mfu"} <= set(train)
    assert 0 < train["mfu"] < 1 and train["tokens_per_second"] > 0
    assert {"text_loss", "mel_loss", "mel_top1", "loss"} <= set(val)
    assert list(tmp_path.glob("logs/run_*/events.out.tfevents.*"))


def test_training_touches_nothing_outside_its_output_directory(tmp_path, monkeypatch):
    data = make_dataset(tmp_path / "data")
    cache = tmp_path / "__pycache__" / "kept.pyc"
    cache.parent.mkdir()
    cache.write_bytes(b"x")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    call_trainer(*data_args(data), "--output-dir", "out", "--max-steps", 1)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
             if path.is_file() and tmp_path / "out" not in path.parents}
    assert after == before


def test_the_gpt_section_is_checked_in_one_go():
    with pytest.raises(trainer.UserError) as error:
        trainer.model_config_from({**GPT, "layers": 0, "heads": "two"}, "here")
    assert "gpt.layers" in str(error.value) and "gpt.heads" in str(error.value)


def test_a_gpu_that_torch_cannot_use_is_an_error_not_a_cpu_run(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(trainer, "Path", lambda path: tmp_path if "nvidia/gpus" in path else Path(path))
    (tmp_path / "0000:00:1e.0").mkdir()
    with pytest.raises(trainer.UserError, match="CUDA_VISIBLE_DEVICES=-1"):
        trainer.setup_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert trainer.setup_device().type == "cpu"


def test_algorithms_are_deterministic_strictly_unless_a_kernel_has_no_such_form(monkeypatch):
    model, precision = random_model(), trainer.Precision(torch.device("cpu"))
    try:
        assert trainer.use_deterministic_algorithms(model, precision) == "deterministic"
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert all(p.grad is None for p in model.parameters())

        def refuse(*_: Any) -> Any:
            raise RuntimeError("attention_backward does not have a deterministic implementation, but you set ...")

        monkeypatch.setattr(trainer, "token_losses", refuse)
        said = trainer.use_deterministic_algorithms(model, precision)
        assert said.startswith("deterministic where it can be (attention_backward does not") and "last bits" in said
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
