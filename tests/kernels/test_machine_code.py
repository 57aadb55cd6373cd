"""The hot loops are made of vector instructions on every processor, whatever machine the test runs on.

Numba lowers each piece of a loop once, without optimising it. LLVM then compiles that for processors of several makers, and
what comes out must hold the vectors that the piece is written for. No clock is read.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROCESSORS = {
    "haswell": "x86_64-unknown-linux-gnu",
    "znver3": "x86_64-unknown-linux-gnu",
    "skylake-avx512": "x86_64-unknown-linux-gnu",
    "sapphirerapids": "x86_64-unknown-linux-gnu",
    "neoverse-v2": "aarch64-unknown-linux-gnu",
}
WIDTH = {"x86_64-unknown-linux-gnu": 8, "aarch64-unknown-linux-gnu": 4}
"""How many 32-bit lanes a vector must have."""
FLOAT_ADD, FLOAT_MUL, FLOAT_SUB = "fadd", "fmul", "fsub"
INT_MUL = "mul"
PUT_FLOATS, PUT_BYTES, PUT_HALVES = "store float|i32", "store i8", "store i16"
LARGEST = "umax|smax"

PIECES = {
    "top_of": [LARGEST],
    "block_of, feedback": [FLOAT_ADD, PUT_FLOATS],
    "block_of, feedback and prologue": [FLOAT_ADD, FLOAT_MUL, PUT_FLOATS],
    "block_of, bfloat16": ["shl", PUT_FLOATS],
    "block_of, float16": [PUT_FLOATS],
    "put_block": [PUT_FLOATS],
    "widest": [FLOAT_ADD, PUT_FLOATS],
    "int8 write": [FLOAT_MUL, FLOAT_ADD, PUT_BYTES],
    "int8 write, feedback": [FLOAT_MUL, FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "int4 write": [FLOAT_MUL, FLOAT_ADD, PUT_BYTES],
    "int4 write, feedback": [FLOAT_MUL, FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "int8 write, stochastic, feedback": [INT_MUL, "xor", FLOAT_MUL, FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "int4 write, stochastic, feedback": [INT_MUL, "xor", FLOAT_MUL, FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "int8 read": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "int4 read": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "e4m3 write, feedback": [FLOAT_MUL, FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "e5m2 write, feedback": [FLOAT_MUL, FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "fp8 read": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "sum_magnitudes": [FLOAT_ADD],
    "sign write, feedback": ["or", FLOAT_SUB, PUT_BYTES, PUT_FLOATS],
    "sign read": [FLOAT_ADD, PUT_FLOATS],
    "int2 pack": [FLOAT_ADD, "or", PUT_BYTES],
    "int2 feedback": [FLOAT_SUB, PUT_FLOATS],
    "int2 read": [FLOAT_ADD, PUT_FLOATS],
    "bf16 write, feedback": [FLOAT_SUB, PUT_HALVES, PUT_FLOATS],
    "fp16 write, feedback": [FLOAT_SUB, PUT_HALVES, PUT_FLOATS],
    "bf16 read": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "fp16 read": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "topk remember": [FLOAT_ADD, PUT_FLOATS, LARGEST],
    "randomk add": [FLOAT_ADD, PUT_FLOATS, LARGEST],
    "randomk places": ["add", PUT_FLOATS],
    "rotate, steps 16 and 32": [FLOAT_MUL, FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate, steps 64 and 128": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate, steps 256 and 512": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate deal": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate collect": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate last": [FLOAT_MUL, PUT_FLOATS],
    "rotate settle": [FLOAT_SUB, PUT_FLOATS],
    "powersgd write, feedback": [FLOAT_MUL, FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "powersgd add, feedback": [FLOAT_MUL, FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "apply_update": [FLOAT_MUL, PUT_FLOATS],
    "local_step": [FLOAT_MUL, PUT_FLOATS],
    "sync_payload": [FLOAT_MUL, PUT_FLOATS],
    "sync_apply": [FLOAT_MUL, PUT_FLOATS],
    "momentum_correction": [FLOAT_MUL, PUT_FLOATS],
    "momentum_ahead": [FLOAT_MUL, PUT_FLOATS],
}
"""What each piece computes with vectors, as LLVM names it."""
pytestmark = pytest.mark.slow
SCALAR = "a sum in order"
"""A loop that cannot be vectorised: what is looked for must be missing there."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """By processor and piece: LLVM's code, optimised for it."""
    script = Path(__file__).with_name("pieces.py")
    environment = {**os.environ, "NUMBA_OPT": "0", "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, str(script), json.dumps(PROCESSORS), *PIECES, SCALAR]
    run = subprocess.run(command, env=environment, capture_output=True, timeout=250)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def vectors(code: str, wanted: str, width: int) -> int:
    """How often an instruction stands in LLVM's code with vectors of at least `width` lanes."""
    lanes = r"<(?:vscale x )?(\d+) x "  # vscale: as many times as the processor's vectors are long
    if wanted.startswith("store "):
        pattern = rf"store {lanes}(?:{wanted.removeprefix('store ')})>"
    elif "max" in wanted:
        pattern = rf"llvm\.(?:{wanted})\.(?:nx)?v(\d+)i32"
    else:
        pattern = rf"= {wanted}(?: [a-z]+)* {lanes}(?:float|i32|i16|i8)>"
    return sum(int(found) >= width for found in re.findall(pattern, code))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_piece_of_a_loop_computes_with_vectors(compiled: dict[str, dict[str, str]], processor: str) -> None:
    width = WIDTH[PROCESSORS[processor]]
    missing = [
        f"{piece}: {wanted}"
        for piece, code in compiled[processor].items()
        for wanted in ([] if piece == SCALAR else PIECES[piece])
        if not vectors(code, wanted, width)
    ]
    assert not missing, f"no vectors of {width} lanes on {processor}"


def test_a_block_of_a_long_mean_goes_past_the_caches(compiled: dict[str, dict[str, str]]) -> None:
    for processor in PROCESSORS:
        assert re.search(r"store <64 x float> .*, align 64.*, !nontemporal", compiled[processor]["put_block"])


def test_a_block_is_asked_for_before_it_is_read(compiled: dict[str, dict[str, str]]) -> None:
    for processor in PROCESSORS:
        for piece, streams in (("block_of, feedback", 2), ("block_of, feedback and prologue", 4)):
            assert compiled[processor][piece].count("call void @llvm.prefetch") >= streams


def test_loops_take_the_widest_vectors_that_there_are(compiled: dict[str, dict[str, str]]) -> None:
    for processor, lanes in (("haswell", 8), ("skylake-avx512", 16), ("sapphirerapids", 16)):
        assert vectors(compiled[processor]["widest"], FLOAT_ADD, lanes)


def test_a_loop_of_single_values_is_found_out(compiled: dict[str, dict[str, str]]) -> None:
    for processor in PROCESSORS:
        code = compiled[processor][SCALAR]
        assert "fadd" in code
        assert not vectors(code, FLOAT_ADD, 2)
