"""`make bench` works: its table on tiny sizes."""

from __future__ import annotations

import dataclasses
import re

import pytest

from benchmarks import bench, gpu_trainer


def test_the_table_has_a_ratio_for_every_thing_compared(monkeypatch: pytest.MonkeyPatch, capsys):
    tiny = dataclasses.replace(gpu_trainer.TINY, batch_sizes=(8,))
    monkeypatch.setattr(bench, "STEP", tiny)
    monkeypatch.setattr(bench, "CODES_A_SECOND", 1)
    parts = [flag for name in ("step", "length", "batch", "loader") for flag in ("--only", name)]
    assert bench.main([*parts, "--rounds", "2"]) == 0
    table = capsys.readouterr().out
    number = r"\d+\.\d\d \[\d+\.\d\d \d+\.\d\d\]"
    for name in ("fp32", "bf16"):
        assert re.search(rf"{name}: {number} x the usual way, {number} x with an equal heap; in CPU time {number}; "
                         rf"{number} of the fp32 matrix peak", table)
    assert re.search(r"10 s: 1\.00 \[1\.00 1\.00\] x", table)
    assert re.search(rf"30 s: {number} x the tokens/s of 10 s", table)
    assert re.search(rf"64 of 5 s: {number} x the tokens/s of 16 of 5 s", table)
    assert re.search(r"\d samples/s with \d+ thread", table)
    assert re.search(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d, \d+ cores", table)


def test_quartiles_stand_beside_the_median():
    assert bench.spread([4, 1, 3, 2, 5]) == "3.00 [2.00 4.00]"
    assert bench.ratios([1.0, 2.0], [2.0, 4.0]) == "2.00 [2.00 2.00]"
