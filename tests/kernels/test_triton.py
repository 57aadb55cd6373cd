"""The kernels for CUDA, without a GPU: the bytes that they give, and the machine code that is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import slowly

CHECKS = Path(__file__).with_name("interpreted.py")
CODE = Path(__file__).with_name("triton_code.py")
SHARED = 48 * 1024
"""Bytes of shared memory that every GPU gives a program without being asked."""
DENSE = "bf16 fp16 fp8 fp8(e5m2) int8 int8(stochastic) int4 int4(stochastic) int2 sign"
RUNS = {
    # a name: specs, how many values each input of the sparse ones has, and the tier
    "few": ("bf16 int4 sign topk(0.1)|int4", "300", "not slow"),
    "dense": (DENSE, "", "slow or not slow"),
    "topk": ("topk(0.1)", "1 7 300 5000", "slow or not slow"),
    "topk in blocks": ("topk(0.05)|sign", "300 5000", "slow or not slow"),
    "topk of all": ("topk(1)", "300 2200", "slow or not slow"),
    "topk of some": ("topk(0.001)|fp16 topk(0.3)|int8", "257 4099", "slow or not slow"),
    "topk of two": ("topk(0.00003)", "70001", "not slow"),
}


@pytest.mark.parametrize(("specs", "lengths", "tier"), slowly(RUNS.values(), [RUNS["few"]]), ids=list(RUNS))
def test_kernels_on_the_interpreter_give_the_bytes_of_the_definition(specs: str, lengths: str, tier: str) -> None:
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
            "-m",
            tier,
            str(CHECKS),
        ],
        env={**environment, "TRITON_INTERPRET": "1", "SPECS": specs, "LENGTHS": lengths},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_machine_code_spills_nothing_fuses_nothing_and_moves_16_bytes_at_once(capability: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(CODE), capability],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    every = 9 * 4 + 7  # 16-bit casts have no recode
    topk = 3 * 9 + 2 + 3 + 3  # of many kernels: encode three times, one more with feedback, mean, clear
    assert len(rows) == every + topk
    for row in rows:
        assert row["stack"] == 0, row
        assert row["fused"] == 0, row
        assert row["shared"] <= SHARED, row
        assert row["wide"] > 0 or not row["streams"], row
