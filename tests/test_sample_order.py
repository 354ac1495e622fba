"""The decisions of the trainer that are pure functions."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import trainer

Position, Schedule = trainer.Position, trainer.Schedule


def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = trainer.epoch_sample_order(1000, seed=5, epoch=3)
    assert sorted(order) == list(range(1000))
    np.random.seed(99)
    assert (trainer.epoch_sample_order(1000, seed=5, epoch=3) == order).all()
    assert (trainer.epoch_sample_order(1000, seed=5, epoch=4) != order).any()
    assert (trainer.epoch_sample_order(1000, seed=6, epoch=3) != order).any()


def test_the_order_is_the_one_that_existing_checkpoints_were_trained_with():
    assert trainer.epoch_sample_order(10, seed=1234, epoch=0).tolist() == [8, 9, 5, 0, 2, 6, 4, 7, 1, 3]


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_steps_from_any_position_go_on_exactly_where_the_whole_run_would_be(split):
    config = trainer.TrainConfig(batch_size=split[0], grad_accumulation=split[1], epochs=3, seed=1)
    whole = list(trainer.steps_from(Position(), [(41, 1.0)], config))
    position = Position()
    for step in range(9):
        assert list(trainer.steps_from(position, [(41, 1.0)], config)) == whole[step:]
        position = position.after_step(41, config.global_batch)


def test_without_weights_several_manifests_are_one_order_as_ever():
    assert trainer.epoch_order([(30, 1.0), (11, 1.0)], 5, 3).tolist() == trainer.epoch_sample_order(41, 5, 3).tolist()


def test_a_whole_weight_repeats_every_row_and_a_fraction_takes_another_part_in_each_epoch():
    mix = [(10, 2.0), (40, 0.25), (8, 1.5)]
    assert trainer.epoch_size(mix) == 20 + 10 + 12
    parts = []
    for epoch in range(4):
        order = trainer.epoch_order(mix, 7, epoch).tolist()
        assert len(order) == 42 and sorted(order)[:20] == sorted([*range(10)] * 2)
        assert all(order.count(row) in (1, 2) for row in range(50, 58))
        parts.append([row for row in order if 10 <= row < 50])
        assert len(set(parts[-1])) == 10
    assert sorted(sum(parts, [])) == list(range(10, 50))  # all had their turn before any comes again
    assert trainer.epoch_order(mix, 7, 2).tolist() == trainer.epoch_order(mix, 7, 2).tolist()
    assert trainer.epoch_order(mix, 8, 2).tolist() != trainer.epoch_order(mix, 7, 2).tolist()


def test_a_weight_however_small_leaves_a_sample_of_its_manifest():
    assert trainer.epoch_size([(10, 0.001)]) == 1 and len(trainer.epoch_order([(10, 0.001)], 1, 0)) == 1


def test_no_step_crosses_an_epoch_and_its_last_step_takes_what_is_left():
    config = trainer.TrainConfig(batch_size=4, grad_accumulation=2, epochs=2)
    position = Position(0, 40, 5)
    assert position.after_step(41, config.global_batch) == Position(1, 0, 6)
    last = int(trainer.epoch_sample_order(41, config.seed, 0)[40])
    assert next(trainer.steps_from(position, [(41, 1.0)], config)) == [[last]]


def test_a_changed_global_batch_repeats_and_drops_no_sample():
    before, after = (trainer.TrainConfig(batch_size=size, grad_accumulation=1, epochs=1) for size in (4, 6))
    position = Position().after_step(41, 4).after_step(41, 4)
    first = list(trainer.steps_from(Position(), [(41, 1.0)], before))[:2]
    rest = list(trainer.steps_from(position, [(41, 1.0)], after))
    assert sorted(sum(sum(first + rest, []), [])) == list(range(41))
    assert trainer.last_step(position, 41, after) == position.step + len(rest)


def test_every_micro_step_has_its_own_dropout_seed():
    seeds = {trainer.dropout_seed(seed, step, micro_step, rank)
             for seed in range(3) for step in range(20) for micro_step in range(4) for rank in range(3)}
    assert len(seeds) == 3 * 20 * 4 * 3


def test_the_learning_rate_warms_up_linearly_and_ends_at_zero_on_half_a_cosine():
    schedule = Schedule(base_lr=1.0, warmup_steps=10, total_steps=110)
    assert trainer.get_lr(5, schedule) == 0.5
    assert trainer.get_lr(10, schedule) == 1.0
    assert trainer.get_lr(60, schedule) == pytest.approx(0.5)
    assert trainer.get_lr(110, schedule) == 0.0
    assert trainer.get_lr(500, schedule) == 0.0
    assert trainer.get_lr(1, Schedule(1.0, 0, 10)) < 1.0


def test_the_schedule_ends_where_the_run_ends_at_max_steps_or_the_last_epoch_whichever_comes_first():
    config = trainer.TrainConfig(batch_size=4, grad_accumulation=1, epochs=10, learning_rate=1e-3)
    assert trainer.make_schedule(config, Position(), 41) == Schedule(1e-3, 11, 110)
    config.max_steps = 30
    assert trainer.make_schedule(config, Position(), 41) == Schedule(1e-3, 3, 30)
    config.max_steps = 200_000
    assert trainer.make_schedule(config, Position(), 41) == Schedule(1e-3, 11, 110)
    config.max_steps, config.warmup_steps = 0, 7
    assert trainer.make_schedule(config, Position(3, 8, 35), 41) == Schedule(1e-3, 7, 110)


@pytest.mark.parametrize("typed,hardware,checkpoint,same_device,world_size,expected", [
    ((0, 0), 32, None, False, 1, (32, 1)),
    ((0, 0), 8, None, False, 1, (8, 4)),
    ((6, 0), 32, None, False, 1, (6, 5)),
    ((0, 4), 32, None, False, 1, (8, 4)),
    ((3, 5), 32, None, False, 1, (3, 5)),
    ((0, 0), 32, (8, 4, 1), False, 1, (32, 1)),
    ((0, 0), 32, (8, 4, 1), True, 1, (8, 4)),
    ((16, 0), 32, (8, 4, 1), True, 1, (16, 2)),
    ((0, 8), 32, (8, 4, 1), True, 1, (4, 8)),
    ((5, 5), 32, (8, 4, 1), True, 1, (5, 5)),
    ((0, 0), 10, (3, 7, 1), False, 1, (7, 3)),
    ((0, 0), 32, None, False, 4, (8, 1)),
    ((0, 0), 2, None, False, 4, (2, 4)),
    ((4, 0), 32, None, False, 4, (4, 2)),
    ((0, 0), 32, None, False, 64, (1, 1)),
    ((0, 0), 32, (8, 4, 1), True, 4, (8, 1)),
    ((0, 0), 4, (32, 1, 1), True, 2, (4, 4)),
    ((0, 0), 32, (4, 1, 8), True, 8, (4, 1)),
    ((0, 0), 16, (4, 1, 8), True, 1, (16, 2)),
    ((2, 0), 16, (4, 1, 8), True, 4, (2, 4)),
])
def test_batch_split(typed, hardware, checkpoint, same_device, world_size, expected):
    assert trainer.choose_batch_split(*typed, hardware, checkpoint, same_device, world_size) == expected


@pytest.mark.parametrize("typed,world_size,what", [((0, 0), 3, "3 processes do not divide"),
                                                   ((5, 0), 2, "--batch-size 5 does not divide"),
                                                   ((0, 3), 4, "--grad-accumulation 3 does not divide")])
def test_a_split_that_would_change_the_global_batch_is_refused(typed, world_size, what):
    with pytest.raises(trainer.UserError, match=what):
        trainer.choose_batch_split(*typed, 32, (8, 4, 1), True, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_ranks_of_a_torchrun_share_every_step_among_them_in_order(world_size):
    config = trainer.TrainConfig(batch_size=2, grad_accumulation=3, epochs=2, world_size=world_size)
    order, position = trainer.epoch_sample_order(41, 1234, 0), Position()
    while position.epoch == 0:
        parts = [next(trainer.steps_from(position, [(41, 1.0)], config, rank)) for rank in range(world_size)]
        together = [i for part in parts for micro_batch in part for i in micro_batch]
        assert together == order[position.sample_in_epoch :][: config.global_batch].tolist()
        assert max(map(len, parts)) <= 3 and all(len(m) <= 2 for part in parts for m in part)
        position = position.after_step(41, config.global_batch)


def test_the_hardware_decides_batch_size_and_reading_threads():
    assert trainer.auto_hardware("cuda", 79.2, 12) == (32, 12)
    assert trainer.auto_hardware("cuda", 39.4, 12) == (16, 12)
    assert trainer.auto_hardware("cuda", 22.5, 8) == (8, 8)
    assert trainer.auto_hardware("cuda", 14.7, 4) == (4, 4)
    assert trainer.auto_hardware("cpu", 0, 2) == (16, 1)


def test_rotation_keeps_the_newest_and_names_only_the_runs_own_files():
    recent: list[str] = []
    for step in (10, 20, 30, 40):
        recent, dropped = trainer.plan_rotation(recent, f"model_step{step}.pth", keep=3)
    assert recent == ["model_step20.pth", "model_step30.pth", "model_step40.pth"]
    assert dropped == ["model_step10.pth"]
    assert trainer.plan_rotation(recent, "model_step40.pth", keep=3) == (recent, [])
    assert trainer.plan_rotation(["a"], "b", keep=0) == (["a", "b"], [])


def test_only_a_language_is_cut_off_a_manifest_path():
    assert trainer.split_manifest("a=b@c.jsonl") == ("a=b@c.jsonl", None, 1.0)
    assert trainer.split_manifest("a.jsonl::AM") == ("a.jsonl", "am", 1.0)
    assert trainer.split_manifest("x::1/a.jsonl") == ("x::1/a.jsonl", None, 1.0)
    assert trainer.split_manifest("x::en@2/a.jsonl::am@0.25") == ("x::en@2/a.jsonl", "am", 0.25)


def test_samples_are_grouped_by_near_equal_length():
    groups = trainer.near_equal_groups([100, 10, 110, 12, 125, 126])
    assert groups == [[1, 3], [0, 2, 4], [5]]
