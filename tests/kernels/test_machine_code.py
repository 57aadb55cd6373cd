"""The hot loops are made of vector instructions on every processor, whatever machine the test runs on.

Numba lowers each piece of a loop once, without optimising it. LLVM then compiles that for processors of several makers, and
what comes out must hold the vectors that the piece is written for, and no loop beside them that goes value by value. The same
is asked of the machine code that LLVM makes of it. No clock is read.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from loops_of import Loop, innermost
from packed import ARM, X86, Code, not_packed, taken_apart
from shared import filled

from commpress.kernels.table import KERNELS

PROCESSORS = {"haswell": X86, "znver3": X86, "skylake-avx512": X86, "sapphirerapids": X86, "neoverse-v2": ARM}
KINDS = {"narrow": ("haswell", "neoverse-v2"), "zen": ("znver3",), "wide": ("skylake-avx512", "sapphirerapids")}
"""Processors for which the loops are written alike."""
WIDTH = {X86: 8, ARM: 4}
"""How many 32-bit lanes a vector must have."""
FLOAT_ADD, FLOAT_MUL, FLOAT_SUB = "fadd", "fmul", "fsub"
INT_MUL = "mul"
PUT_FLOATS, PUT_BYTES, PUT_HALVES = "store float|i32", "store i8", "store i16"
LARGEST = "umax|smax"
COUNT = "icmp"
"""A comparison that is counted, in 64 bits: half as many lanes."""
DOUBLE_MUL, DOUBLE_SUB = "fmul double", "fsub double"
HALF = (COUNT, DOUBLE_MUL, DOUBLE_SUB)
"""What is done in 64 bits."""

PIECES = {
    "top_of": [LARGEST],
    "block_of, feedback": [FLOAT_ADD, PUT_FLOATS],
    "block_of, feedback and prologue": [FLOAT_ADD, FLOAT_MUL, PUT_FLOATS],
    "block_of, feedback and a momentum": [FLOAT_ADD, FLOAT_MUL, FLOAT_SUB, PUT_FLOATS],
    "block_of, bfloat16": ["shl", PUT_FLOATS],
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
    "bf16 read of four": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "fp16 read of four": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "fp8 read of four": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "topk search": [LARGEST],
    "topk largest": [LARGEST],
    "topk ties": [COUNT],
    "topk not finite": [COUNT],
    "topk positions": [COUNT],
    "topk collect": [COUNT, FLOAT_ADD, LARGEST],
    "topk whole": [FLOAT_MUL, PUT_FLOATS],
    "topk remember": [FLOAT_ADD, PUT_FLOATS, LARGEST],
    "randomk add": [FLOAT_ADD, PUT_FLOATS, LARGEST],
    "randomk places": ["add", PUT_FLOATS],
    "randomk all finite": [FLOAT_SUB, LARGEST],
    "rotate, steps 16 and 32": [FLOAT_MUL, FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate, steps 64 and 128": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate, steps 256 and 512": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate deal": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate collect": [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "rotate last": [FLOAT_MUL, PUT_FLOATS],
    "rotate settle": [FLOAT_SUB, PUT_FLOATS],
    "project": [FLOAT_MUL, FLOAT_ADD],
    "project, feedback": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "project_back": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "orthonormalize": [DOUBLE_MUL, DOUBLE_SUB],
    "expand, first rows": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "expand, first rows and feedback": [FLOAT_MUL, FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "expand, further rows": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "expand, further rows and feedback": [FLOAT_MUL, FLOAT_ADD, FLOAT_SUB, PUT_FLOATS],
    "prologue": [FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "apply_update": [FLOAT_MUL, PUT_FLOATS],
    "local_step": [FLOAT_MUL, PUT_FLOATS],
    "sync_payload": [FLOAT_MUL, PUT_FLOATS],
    "sync_apply": [FLOAT_MUL, PUT_FLOATS],
    "restore_local": [FLOAT_MUL, FLOAT_SUB, PUT_FLOATS],
    "estimate_momentum": [FLOAT_MUL, PUT_HALVES],
    "add_scaled": ["shl", FLOAT_MUL, FLOAT_ADD, PUT_FLOATS],
    "momentum_correction": [FLOAT_MUL, PUT_FLOATS],
    "momentum_ahead": [FLOAT_MUL, PUT_FLOATS],
    "fingerprint": [INT_MUL, "xor"],
    "keep, 2 bytes": [PUT_HALVES],
    "keep, 4 bytes": [PUT_FLOATS],
    "count_pruned, 2 bytes": [COUNT],
    "count_pruned, 4 bytes": [COUNT],
}
"""What each piece computes with vectors, as LLVM names it."""
PASS, KEPT = [FLOAT_ADD, FLOAT_MUL, PUT_FLOATS], [FLOAT_ADD, FLOAT_SUB, PUT_FLOATS]
"""What a prologue or a share takes, and what feedback takes."""
WHOLE = {
    "bf16 encode": [*PASS, *KEPT, PUT_HALVES],
    "int8 encode": [*PASS, *KEPT, LARGEST, PUT_BYTES],
    "int4 encode": [*PASS, *KEPT, LARGEST, PUT_BYTES],
    "e4m3 encode": [*PASS, *KEPT, LARGEST, PUT_BYTES],
    "int2 encode": [*PASS, *KEPT, "or", PUT_BYTES],
    "sign encode": [*PASS, *KEPT, "or", PUT_BYTES],
    "bf16 mean": PASS,
    "int8 mean": PASS,
    "int4 mean": PASS,
    "e4m3 mean": PASS,
    "int2 mean": [FLOAT_ADD, PUT_FLOATS],
    "sign mean": [FLOAT_ADD, PUT_FLOATS],
    "bf16 recode": [*PASS, *KEPT, PUT_HALVES],
    "int8 recode": [*PASS, *KEPT, LARGEST, PUT_BYTES],
    "int4 recode": [*PASS, *KEPT, LARGEST, PUT_BYTES],
    "e4m3 recode": [*PASS, *KEPT, LARGEST, PUT_BYTES],
    "int2 recode": [*KEPT, "or", PUT_BYTES],
    "sign recode": [*KEPT, "or", PUT_BYTES],
    "topk encode": [*PASS, COUNT, LARGEST],
    "topk mean": [PUT_FLOATS],
    "randomk encode": [*PASS, LARGEST],
    "randomk mean": [PUT_FLOATS],
    "randomk recode": [FLOAT_ADD, PUT_FLOATS, LARGEST],
    "rotate encode": [*PASS, *KEPT],
    "rotate mean": [*PASS, *KEPT],
}
"""What whole loops compute with vectors: by codec encode with a prologue and feedback, mean, and recode with feedback."""
ALIKE = {"encode": {"fp16"}, "mean": {"fp16"}, "recode": {"fp16", "rotate"}}
"""Codecs without a whole loop of their own for an op: `fp16` has that of `bf16`, `rotate` encodes its mean by its other two."""
EXEMPT = {
    "clear": "single places, those that were sent",
    "pack": "single places, which masks keep",
    "unpack": "single places, which masks keep",
}
"""Ops of the table whose loops cannot have vectors. All others, but for those in WHOLE, are pieces."""
QUICK = ("int8 write, feedback", "topk remember", "fp8 read of four")
SCALAR, BESIDE, REMAINDERS = "a sum in order", "a sum in order beside vectors", "remainders"
"""Loops that cannot be vectorised: what is looked for must be missing there, and what must not be there is found."""
ONE_BY_ONE = {
    "topk collect": "the places that pass the threshold, a few of a block, are counted and fetched; its other loops are pieces",
    "topk search": "histograms, whose bins are counted one by one",
    "orthonormalize": "sums in float64 of four sums each, in one order on all processors, for factors, which are small",
    "fingerprint": "the lanes are mixed one after another, once a call",
}
"""Pieces that have such loops on purpose."""
COPIES = ("project", "project, feedback", "project_back")
"""Pieces that copy their factors, which are small, value by value, once a call, and compute nothing value by value."""
SPARE = 7
"""How much more of single values machine code may have than LLVM's code: it copies the ends of loops. Twice in whole loops,
of which `topk collect` is one. What these do with the rest of a block, or only with NaN, has masks."""
STRAIGHT = 16
"""How many operations on single floats may stand outside the innermost loops: a block's scale, the last value."""
ARITHMETIC = r"= f(?:add|sub|mul|div|neg)(?: [a-z]+)* float "
SINGLE = re.compile(
    rf"{ARITHMETIC}|= load (?:float|i8|i16|i32),|^store (?:float|i8|i16|i32) |llvm\.vector\.reduce\.fadd"
)
"""Arithmetic, reads and writes of one value of a gradient, a residual or a payload, and sums in the order of the values."""


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest) -> str:
    """Each processor in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def codes(processor: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Code]:
    """All pieces for a processor. Those of a kind are compiled once, for all workers."""
    (kind,) = [kind for kind, alike in KINDS.items() if processor in alike]
    names = [*PIECES, SCALAR, BESIDE, REMAINDERS]
    place = filled(
        tmp_path_factory,
        f"pieces-{kind}",
        lambda folder: (folder / "codes").write_bytes(compile_for(KINDS[kind], names)),
    )
    return read((place / "codes").read_bytes())[processor]


def compile_for(processors: Sequence[str], pieces: Sequence[str]) -> bytes:
    """Compile pieces for processors of one kind in a process of their own, where Numba optimises nothing."""
    script = Path(__file__).with_name("pieces.py")
    environment = {**os.environ, "NUMBA_OPT": "0", "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, str(script), json.dumps({one: PROCESSORS[one] for one in processors}), *pieces]
    run = subprocess.run(command, env=environment, capture_output=True, timeout=280)
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout


def read(printed: bytes) -> dict[str, dict[str, Code]]:
    """Give by processor and piece what has been compiled: LLVM's code, optimised for it, and machine code."""
    found = json.loads(printed)
    return {processor: {piece: Code(*both) for piece, both in codes.items()} for processor, codes in found.items()}


def vectors(code: str, wanted: str, width: int) -> int:
    """How often an instruction stands in LLVM's code with vectors of at least `width` lanes."""
    lanes = r"<(?:vscale x )?(\d+) x "  # vscale: as many times as the processor's vectors are long
    if wanted.startswith("store "):
        pattern = rf"store {lanes}(?:{wanted.removeprefix('store ')})>"
    elif "max" in wanted:
        pattern = rf"llvm\.(?:{wanted})\.(?:nx)?v(\d+)i32"
    else:
        op, _, kind = wanted.partition(" ")
        pattern = rf"= {op}(?: [a-z]+)* {lanes}(?:{kind or 'float|i32|i16|i8'})>"
    return sum(int(found) >= width for found in re.findall(pattern, code))


def missing(codes: dict[str, Code], triple: str) -> list[str]:
    """What pieces do not compute with vectors of at least as many lanes as WIDTH says."""
    found = []
    for piece, code in codes.items():
        wanted = (PIECES | WHOLE).get(piece, [])
        width = {one: WIDTH[triple] // (2 if one in HALF else 1) for one in wanted}
        found += [f"{piece}: {one}" for one in wanted if not vectors(code.llvm, one, width[one])]
        found += [f"{piece}: {one} in machine code" for one in not_packed(code, wanted, triple)]
    return found


def apart(codes: dict[str, Code], triple: str) -> dict[str, list[str]]:
    """By piece what of its vectors has been taken apart in machine code."""
    whole = WHOLE.keys() | {"topk collect"}
    found = {
        piece: taken_apart(code, triple, SPARE * (2 if piece in whole else 1), may_mask=piece in WHOLE)
        for piece, code in codes.items()
    }
    return {piece: lines for piece, lines in found.items() if lines}


def one_by_one(code: str) -> list[str]:
    """What a piece does value by value, but for what vectors leave over: the rest of a row, and arrays that overlap."""
    loops = list(innermost(code))
    found = [line for loop in loops for line in singles(loop) if loop.packed or not loop.rest]
    inside = sum(bool(re.search(ARITHMETIC, line)) for loop in loops for line in loop.lines)
    outside = len(re.findall(ARITHMETIC, code)) - inside
    return found + ([f"{outside} operations outside of loops"] if outside > STRAIGHT else [])


def singles(loop: Loop) -> list[str]:
    return [line for line in loop.lines if SINGLE.search(line)]


def test_some_pieces_compute_with_vectors_and_nothing_value_by_value() -> None:
    (codes,) = read(compile_for(["haswell"], [*QUICK, BESIDE, REMAINDERS])).values()
    assert not missing(codes, X86)
    assert {piece for piece, code in codes.items() if one_by_one(code.llvm)} == {BESIDE}
    assert set(apart(codes, X86)) == {REMAINDERS}


def test_the_loops_of_every_op_are_pieces_or_are_named_with_a_reason() -> None:
    ops = {op for op, _, device in KERNELS if device == "cpu"} - {"encode", "mean", "recode"}
    covered = ops & {piece.partition(",")[0] for piece in PIECES}
    assert covered | EXEMPT.keys() == ops
    assert not covered & EXEMPT.keys()


@pytest.mark.slow
def test_each_piece_of_a_loop_computes_with_vectors(codes: dict[str, Code], processor: str) -> None:
    triple = PROCESSORS[processor]
    assert not missing(codes, triple), f"no vectors of {WIDTH[triple]} lanes on {processor}"


@pytest.mark.slow
def test_no_processor_takes_vectors_apart(codes: dict[str, Code], processor: str) -> None:
    found = apart(codes, PROCESSORS[processor])
    assert found.pop(REMAINDERS), f"single remainders were not found on {processor}"
    assert not found, f"vectors that {processor} has no instructions for"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["encode", "mean", "recode"])
def test_whole_loops_of_every_family_compute_with_vectors(op: str, kind: str) -> None:
    names = [name for name in WHOLE if name.endswith(f" {op}")]
    words = {word for known, word, device in KERNELS if (known, device) == (op, "cpu")}
    assert {f"{'e4m3' if word == 'fp8' else word} {op}" for word in words - ALIKE[op]} == set(names)
    for processor, codes in read(compile_for(KINDS[kind], names)).items():
        triple = PROCESSORS[processor]
        assert not missing(codes, triple), f"no vectors of {WIDTH[triple]} lanes on {processor}"
        assert not apart(codes, triple), f"vectors that {processor} has no instructions for"


@pytest.mark.slow
def test_no_loop_beside_the_vectors_goes_value_by_value(codes: dict[str, Code], processor: str) -> None:
    found = {piece: one_by_one(code.llvm) for piece, code in codes.items() if piece not in ONE_BY_ONE}
    assert found.pop(SCALAR), f"a sum in order was not found on {processor}"
    for piece in COPIES:
        found[piece] = [line for line in found[piece] if not re.search(r"= load |^store ", line)]
    assert found.pop(BESIDE), f"a sum in order beside vectors was not found on {processor}"
    assert not {piece: lines for piece, lines in found.items() if lines}, f"value by value on {processor}"


@pytest.mark.slow
def test_a_block_of_a_long_mean_goes_past_the_caches(codes: dict[str, Code]) -> None:
    assert re.search(r"store <64 x float> .*, align 64.*, !nontemporal", codes["put_block"].llvm)


@pytest.mark.slow
def test_a_block_is_asked_for_before_it_is_read_where_that_helps(codes: dict[str, Code], processor: str) -> None:
    for piece, streams in (("block_of, feedback", 2), ("block_of, feedback and prologue", 4)):
        asked = codes[piece].llvm.count("call void @llvm.prefetch")
        assert not asked if processor == "znver3" else asked >= streams


@pytest.mark.slow
def test_each_processor_packs_as_many_lanes_as_its_registers_hold(codes: dict[str, Code], processor: str) -> None:
    lanes = "64" if processor in KINDS["wide"] else "16"  # whatever the machine that compiles has
    assert set(re.findall(r"@llvm\.ctpop\.v(\d+)i32", codes["int2 pack"].llvm)) == {lanes}


@pytest.mark.slow
def test_loops_take_the_widest_vectors_that_there_are(codes: dict[str, Code], processor: str) -> None:
    lanes = 16 if processor in KINDS["wide"] else WIDTH[PROCESSORS[processor]]
    assert vectors(codes["widest"].llvm, FLOAT_ADD, lanes)


@pytest.mark.slow
def test_a_loop_of_single_values_is_found_out(codes: dict[str, Code]) -> None:
    assert "fadd" in codes[SCALAR].llvm
    assert not vectors(codes[SCALAR].llvm, FLOAT_ADD, 2)
