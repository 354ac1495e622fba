"""The soak in its short form, and proofs that it notices what it is there to notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SOAK = ROOT / "tests" / "soak.py"
SEED = 38  # bf16 and two data workers for the kills, plain fp32 for the signals


def run_soak(program: list[str], tmp_path: Path, **numbers: int) -> tuple[int, str, dict]:
    """Returns the exit status, what was printed, and the table's rows by name (of equal names the first)."""
    wanted = {"kills": 0, "signals": 0, "flips": 0, "truncations": 0, **numbers}
    flags = [text for name, number in wanted.items() for text in (f"--{name}", str(number))]
    done = subprocess.run([sys.executable, *program, *flags, "--json", str(tmp_path / "soak.json")], cwd=ROOT,
                          text=True, capture_output=True, timeout=600)
    output = done.stdout + done.stderr
    assert (tmp_path / "soak.json").exists(), output
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    return done.returncode, output, {row["what"].strip(): row for row in reversed(rows)}


def test_kills_signals_and_damage_leave_no_trace(tmp_path):
    status, output, rows = run_soak([str(SOAK)], tmp_path, kills=10, signals=8, flips=50, truncations=20, seed=SEED)
    assert status == 0, output
    assert rows["kills"]["count"] >= 10 and rows["signals"]["count"] >= 8
    assert rows["flips"]["count"] == 50 and rows["truncations"]["count"] == 20
    assert rows["save"]["count"] >= 4, "no third of the kills was inside a save"


SABOTAGED = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import soak
trainer = soak.trainer
trainer.dropout_seed = lambda seed, step, micro_step, rank=0: 1000 * os.getpid() + step
trainer.digest_problem = lambda checkpoint: None
record = trainer.record_exit
trainer.record_exit = lambda path, reason, *rest: reason == "stopped" or record(path, reason, *rest)
sys.exit(soak.main(sys.argv[1:]))
"""


def test_the_soak_notices_randomness_of_a_process_a_stop_without_record_and_a_reader_that_checks_nothing(tmp_path):
    status, output, rows = run_soak(["-c", SABOTAGED], tmp_path, kills=1, signals=3, flips=20, seed=SEED)
    assert status == 1, output
    for kind, words in (("kills", "differs from the uninterrupted run"), ("signals", "left last_exit.json None"),
                        ("flips", "altered state was loaded")):
        assert words in " ".join(rows[kind]["faults"]), output
