"""The kernels for CUDA, without a GPU: the bytes that they give, and the machine code that is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("interpreted.py")
CODE = Path(__file__).with_name("triton_code.py")
SHARED = 48 * 1024
"""Bytes of shared memory that every GPU gives a program without being asked."""
SPECS = "bf16 fp16 fp8 fp8(e5m2) int8 int8(stochastic) int4 int4(stochastic) int2 sign"
ALL: dict[int, list[str] | None] = {80: None, 90: None, 100: None}
QUICK: dict[int, list[str] | None] = {
    90: None,
    80: ["int8 prologue", "fp8 recode", "bf16 mean", "sign feedback", "int2 prologue"],
    100: ["int4(stochastic) recode", "fp8 prologue", "fp16 feedback", "sign recode", "int2 encode"],
}
"""Kernels by compute capability, None for all: of the others a member of each family, and each op."""


def test_kernels_on_the_interpreter_give_the_bytes_of_the_definition() -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--durations=4",
            str(CHECKS),
        ],
        env={**environment, "TRITON_INTERPRET": "1", "SPECS": SPECS},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("kernels", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["most", "all"])
def test_machine_code_spills_nothing_fuses_nothing_and_moves_16_bytes_at_once(
    kernels: dict[int, list[str] | None], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    wanted = [str(number) if some is None else f"{number}:{','.join(some)}" for number, some in kernels.items()]
    done = subprocess.run(
        [sys.executable, str(CODE), *wanted],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    every = 9 * 4 + 7  # 16-bit casts have no recode
    assert len(rows) == sum(every if some is None else len(some) for some in kernels.values())
    for row in rows:
        assert row["stack"] == 0, row
        assert row["fused"] == 0, row
        assert row["shared"] <= SHARED, row
        assert row["wide"] > 0, row
