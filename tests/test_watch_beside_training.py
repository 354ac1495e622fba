"""tools.synthesize --watch beside a training: it takes what is free of the card, and no processor that others want."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import watch_training
from tools.generation import Sampling
from tools.watch_training import PATIENCE, SHARE, Card, place_to_speak

GB = 10**9


@pytest.mark.parametrize(("free", "waited", "rest", "place", "why"), [
    (30, 0, 0, "cuda", "30.0 GB of the card are free, 24.0 wanted"),
    (24, PATIENCE, 0, "cuda", "24.0 wanted"),
    (23, 0, 0, "wait", "23.0 GB of the card are free, 24.0 wanted"),
    (23, PATIENCE, 0, "cpu", "23.0 GB of the card are free"),
    (30, 0, 0.5, "cpu", "left to the training for another 0 s"),
    (30, 0, 99, "cpu", "left to the training for another 99 s"),
])
def test_a_checkpoint_is_spoken_on_the_card_where_memory_for_it_and_for_the_training_to_grow_is_free(
        free: float, waited: float, rest: float, place: str, why: str):
    found, told = place_to_speak(free * GB, 80 * GB, 20 * GB, waited, rest)
    assert found == place and why in told


def test_a_card_that_is_too_small_for_it_is_not_waited_for():
    assert place_to_speak(1 * GB, 16 * GB, 16 * GB, 0, 0)[0] == "cpu"


class Speaker:
    """A Synthesizer that only says where it was moved to."""

    def __init__(self) -> None:
        self.moves: list[str] = []

    def size(self) -> int:
        return 8 * GB

    def move(self, device: torch.device) -> None:
        self.moves.append(device.type)


class Shared(Card):
    """A card that is "meta", with `free` bytes from one look to the next, and a clock that only sleeping and speaking
    move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
        super().__init__(torch.device("meta"))
        self.clock, self.free = 0.0, list(free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (
            self.free.pop(0) if len(self.free) > 1 else self.free[0], 80 * GB))
        monkeypatch.setattr(watch_training.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(watch_training.time, "sleep", self.pass_time)

    def pass_time(self, seconds: float) -> None:
        self.clock += seconds


def test_memory_is_waited_for_then_given_back_and_the_card_left_alone_for_a_hundred_times_as_long(monkeypatch, capsys):
    speaker, card = Speaker(), Shared(monkeypatch, 1 * GB, 1 * GB, 40 * GB)
    monkeypatch.setattr(watch_training, "waveforms", lambda *args: card.pass_time(7) or [torch.zeros(3)])
    card.speak(speaker, [], Sampling(), is_training=True)
    assert card.clock == 2 * watch_training.POLL_SECONDS + 7 and speaker.moves == ["meta", "cpu"]
    printed = capsys.readouterr().out
    assert printed.count("waiting for memory, 60 s at most: 1.0 GB of the card are free, 14.1 wanted") == 1
    assert "speaking on meta: 40.0 GB of the card are free" in printed
    card.pass_time(7 / SHARE - 1)
    card.speak(speaker, [], Sampling(), is_training=True)
    assert len(speaker.moves) == 2
    assert "speaking on the CPU: the card is left to the training for another 1 s" in capsys.readouterr().out
    card.speak(speaker, [], Sampling(), is_training=False)
    assert len(speaker.moves) == 4


def test_what_finds_no_memory_is_spoken_on_the_cpu(monkeypatch, capsys):
    speaker, card = Speaker(), Shared(monkeypatch, 1 * GB)
    monkeypatch.setattr(watch_training, "waveforms", lambda *args: [torch.ones(2)])
    assert card.speak(speaker, [], Sampling(), is_training=True)[0].tolist() == [1, 1]
    assert card.clock == PATIENCE and not speaker.moves
    assert "speaking on the CPU: 1.0 GB of the card are free" in capsys.readouterr().out

    def say(*args: object) -> list[torch.Tensor]:
        if speaker.moves[-1] == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [torch.ones(2)]

    monkeypatch.setattr(watch_training, "waveforms", say)
    card.free = [70 * GB]
    assert card.speak(speaker, [], Sampling(), is_training=True)[0].tolist() == [1, 1]
    assert speaker.moves == ["meta", "cpu"]
    assert "memory was taken meanwhile: speaking on the CPU" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux")
def test_every_thread_takes_the_processor_that_nobody_else_wants():
    child = os.fork()
    if not child:
        watch_training.stand_back()
        policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
        few = torch.get_num_threads() <= max(1, (os.cpu_count() or 1) // 4)
        os._exit(0 if policies == {os.SCHED_IDLE} and few else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("holder", "expected"), [(None, ["spoke"]), ("process 1", ["stood back", "spoke"])])
def test_it_stands_back_where_a_training_holds_the_directory(tmp_path: Path, monkeypatch, holder, expected):
    called: list[str] = []
    monkeypatch.setattr(watch_training, "stand_back", lambda: called.append("stood back"))
    monkeypatch.setattr(watch_training, "speak_checkpoint", lambda *args: called.append("spoke"))
    monkeypatch.setattr(watch_training, "lock_holder", lambda folder: holder)
    (tmp_path / "latest.pth").touch()
    (tmp_path / "last_exit.json").write_text('{"reason": "finished", "status": 0}')
    watch_training.watch(tmp_path, lambda path: SimpleNamespace(checkpoint={"run_dir": "logs"}),
                         lambda synthesizer: [synthesizer], Sampling())
    assert called == expected
