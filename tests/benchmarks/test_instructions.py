"""The count of instructions, for processors that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "instructions.py"
TARGETS = "haswell", "sapphirerapids"
SUM, SIZE = "all with feedback: x + residual", "sign, int2: mean size"
PARTS = {
    ("int8", "feedback", "13.02"): (SUM, "int8, int4: largest magnitude", "int8: codes and residual"),
    ("sign", "feedback", "12.13"): (SUM, SIZE, "sign: bits", "sign: residual"),
    ("int2", "feedback", "12.26"): (SUM, SIZE, "int2: bits and both sizes", "int2: residual"),
}


@pytest.fixture(scope="module")
def printed() -> str:
    """What the command prints for both targets."""
    return said({})


def said(environment: dict[str, str]) -> str:
    pytest.importorskip("rich")
    command = [sys.executable, str(FILE), "--targets", *TARGETS]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_an_action_on_another_processor_is_the_sum_of_its_pieces(printed: str) -> None:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    found = {tuple(row[:-2]): row[-2:] for row in rows if row and row[-1].replace(".", "").isdigit()}
    for at in range(len(TARGETS)):
        counts = {key: float(row[at]) for key, row in found.items()}
        for action, parts in PARTS.items():
            assert counts[action] == pytest.approx(sum(counts[part,] for part in parts), abs=0.03)
        assert 0 < counts["topk(0.01)|int4", "decode", "4.02"] < counts["int8", "decode", "5.02"] < 1
    for action in PARTS:  # registers of half as many lanes
        few, many = (float(count) for count in reversed(found[action]))
        assert 1.8 * few < many < 3 * few


@pytest.mark.slow
def test_the_counts_do_not_depend_on_the_machine_that_compiles(printed: str) -> None:
    assert said({"NUMBA_CPU_NAME": "nehalem"}) == printed, "counted on a processor without AVX-512"
