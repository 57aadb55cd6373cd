"""The count of instructions, for a processor that need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "instructions.py"


@pytest.mark.slow
def test_an_action_on_another_processor_is_the_sum_of_its_pieces() -> None:
    pytest.importorskip("rich")
    run = subprocess.run(
        [sys.executable, str(FILE), "--targets", "sapphirerapids"], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run.stdout.splitlines()]
    counts = {tuple(row[:-1]): float(row[-1]) for row in rows if row and row[-1].replace(".", "").isdigit()}
    parts = ("all with feedback: x + residual", "int8, int4: largest magnitude", "int8: codes and residual")
    assert counts["int8", "feedback", "13.02"] == pytest.approx(sum(counts[part,] for part in parts), abs=0.02)
    assert 0 < counts["topk(0.01)|int4", "decode", "4.02"] < counts["int8", "decode", "5.02"] < 1
