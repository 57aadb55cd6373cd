"""Compiles pieces of the hot loops for processors: `NUMBA_OPT=0 python pieces.py '{"haswell": "x86_64-linux-gnu"}' top_of`.

It takes processors of one kind with their triples, and names of pieces, and prints by processor and piece, as JSON, LLVM's
optimised code and the machine code that is made of it. A process lowers the pieces as the loops are written for one kind.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from compiled_for import both, kind_of, lowered, write_for

from commpress.kernels.cpu import (
    cast,
    fingerprint,
    float8,
    integer,
    low_rank,
    model,
    optim,
    random_k,
    rotate,
    scatter,
    sign,
    topk,
    two_bit,
)
from commpress.kernels.cpu.blocks import block_of, put_block, run_prologue, top_of
from commpress.kernels.cpu.instructions import sum_magnitudes, widest

FLOATS, BYTES = types.Array(types.float32, 1, "C"), types.Array(types.uint8, 1, "C")
BFLOATS, HALVES = types.Array(types.uint16, 1, "C"), types.Array(types.int16, 1, "C")
INTS, WORDS = types.Array(types.int32, 1, "C"), types.Array(types.uint32, 1, "C")
LONGS, KEPT = types.Array(types.int64, 1, "C"), types.Array(types.int8, 1, "C")
MATRIX, BATCH = types.Array(types.float32, 2, "C"), types.Array(types.float32, 3, "C")
F, INT, NONE = types.float32, types.int64, types.none
STEPS, AHEAD = types.Tuple((FLOATS, FLOATS, F, F, F)), types.Tuple((FLOATS, F))


def in_order(x: Any, residual: Any) -> Any:
    """A sum whose order is fixed."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    return total


def in_order_beside(x: Any, y: Any) -> Any:
    """A loop of vectors, and behind it one that cannot have any."""
    for i in range(x.size):
        y[i] += x[i]
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


def widely(x: Any, residual: Any, o: Any, scratch: Any) -> Any:
    """A block with feedback, in a function that asks for wide vectors."""
    widest()
    return block_of(x, None, residual, o, 256, scratch)[7]


PIECES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "top_of": (lambda x: top_of(x, 256), (FLOATS,)),
    "block_of, feedback": (lambda x, r, o, s: block_of(x, None, r, o, 256, s)[7], (FLOATS, FLOATS, INT, FLOATS)),
    "block_of, feedback and prologue": (
        lambda x, p, r, o, s: block_of(x, p, r, o, 256, s)[7],
        (FLOATS, STEPS, FLOATS, INT, FLOATS),
    ),
    "block_of, feedback and a momentum": (
        lambda x, p, r, o, s: block_of(x, p, r, o, 256, s)[7],
        (FLOATS, AHEAD, FLOATS, INT, FLOATS),
    ),
    "block_of, bfloat16": (lambda x, o, s: block_of(x, None, None, o, 256, s)[7], (BFLOATS, INT, FLOATS)),
    "put_block": (lambda out, o, block: put_block(out, o, block, 256), (FLOATS, INT, FLOATS)),
    "widest": (widely, (FLOATS, FLOATS, INT, FLOATS)),
    "int8 write": (lambda x, c, top: integer._write(x, None, c, top, 8, False), (FLOATS, BYTES, types.int32)),
    "int8 write, feedback": (
        lambda x, r, c, top: integer._write(x, r, c, top, 8, False),
        (FLOATS, FLOATS, BYTES, types.int32),
    ),
    "int4 write": (lambda x, c, top: integer._write(x, None, c, top, 4, False), (FLOATS, BYTES, types.int32)),
    "int4 write, feedback": (
        lambda x, r, c, top: integer._write(x, r, c, top, 4, False),
        (FLOATS, FLOATS, BYTES, types.int32),
    ),
    "int8 write, stochastic, feedback": (
        lambda x, r, c, top: integer._write(x, r, c, top, 8, True),
        (FLOATS, FLOATS, BYTES, types.int32),
    ),
    "int4 write, stochastic, feedback": (
        lambda x, r, c, top: integer._write(x, r, c, top, 4, True),
        (FLOATS, FLOATS, BYTES, types.int32),
    ),
    "int8 read": (lambda scale, c, share, out: integer._add(scale, c, share, 8, False, out), (F, BYTES, F, FLOATS)),
    "int4 read": (lambda scale, c, share, out: integer._add(scale, c, share, 4, False, out), (F, BYTES, F, FLOATS)),
    "e4m3 write, feedback": (
        lambda x, r, c, peak: float8._write(x, r, c, peak, float8.E4M3),
        (FLOATS, FLOATS, BYTES, F),
    ),
    "e5m2 write, feedback": (
        lambda x, r, c, peak: float8._write(x, r, c, peak, float8.E5M2),
        (FLOATS, FLOATS, BYTES, F),
    ),
    "fp8 read": (
        lambda pf, pu, share, out: float8._read(pf, pu, 2, 4096, 0, 8, float8.E4M3, share, 256, out),
        (FLOATS, BYTES, F, FLOATS),
    ),
    "sum_magnitudes": (lambda x: sum_magnitudes(x), (FLOATS,)),
    "sign write, feedback": (sign._write, (FLOATS, FLOATS, BYTES, F)),
    "sign read": (lambda pf, pu, share, out: sign._read(pf, pu, 2, 4096, 0, 8, share, out), (FLOATS, BYTES, F, FLOATS)),
    "int2 pack": (lambda x, mean, c, d: two_bit._pack(x, 1024, mean, c, d), (FLOATS, F, BYTES, BYTES)),
    "int2 feedback": (two_bit._keep_loss, (FLOATS, FLOATS, F, F, F)),
    "int2 read": (
        lambda pf, pu, share, out: two_bit._read(pf, pu, 2, 4096, 0, 8, 1024, share, out),
        (FLOATS, BYTES, F, FLOATS),
    ),
    "bf16 write, feedback": (lambda x, r, h: cast._encode_block(x, r, h, 1024), (FLOATS, FLOATS, BFLOATS)),
    "fp16 write, feedback": (lambda x, r, h: cast._encode_block(x, r, h, 1024), (FLOATS, FLOATS, HALVES)),
    "bf16 read": (lambda h, share, out: cast._read(h, 2, 4096, 0, share, 1024, out), (BFLOATS, F, FLOATS)),
    "fp16 read": (lambda h, share, out: cast._read(h, 2, 4096, 0, share, 1024, out), (HALVES, F, FLOATS)),
    "bf16 read of four": (lambda h, share, out: cast._read(h, 4, 4096, 0, share, 256, out), (BFLOATS, F, FLOATS)),
    "fp16 read of four": (lambda h, share, out: cast._read(h, 4, 4096, 0, share, 256, out), (HALVES, F, FLOATS)),
    "fp8 read of four": (
        lambda pf, pu, share, out: float8._read(pf, pu, 4, 4096, 0, 8, float8.E4M3, share, 256, out),
        (FLOATS, BYTES, F, FLOATS),
    ),
    "topk largest": (topk._largest, (INTS,)),
    "topk ties": (topk._count_ties, (INTS, types.int32)),
    "topk not finite": (topk._not_finite, (INTS,)),
    "topk positions": (
        lambda a, threshold, o, index, at: topk._positions(a, threshold, o, False, index, at),
        (FLOATS, types.int32, INT, LONGS, INT),
    ),
    "topk collect": (
        topk._collect,
        (FLOATS, NONE, FLOATS, types.int32, INT, INT, INT),
    ),
    "topk whole": (lambda x, p: topk._whole(x, p, None), (FLOATS, STEPS)),
    "topk remember": (lambda a, r, old: topk._remember(a, r, old, 256), (FLOATS, FLOATS, FLOATS)),
    "randomk add": (random_k._add, (FLOATS, FLOATS, FLOATS)),
    "randomk places": (random_k._place, (INT, INTS, INTS, WORDS, INTS, INTS)),
    "rotate, steps 16 and 32": (rotate._first_steps, (FLOATS, FLOATS, FLOATS)),
    "rotate, steps 64 and 128": (lambda x: rotate._steps(x, 64), (FLOATS,)),
    "rotate, steps 256 and 512": (lambda x: rotate._steps(x, 256), (FLOATS,)),
    "rotate deal": (rotate._deal, (FLOATS, FLOATS)),
    "rotate collect": (rotate._collect, (FLOATS, FLOATS)),
    "rotate last": (rotate._last, (FLOATS, FLOATS, FLOATS)),
    "rotate settle": (rotate._settle, (FLOATS, FLOATS, FLOATS)),
    "project": (low_rank._project, (FLOATS, NONE, MATRIX, MATRIX, INT, INT, INT)),
    "project, feedback": (low_rank._project, (FLOATS, FLOATS, MATRIX, MATRIX, INT, INT, INT)),
    "project_back": (low_rank._project_back, (FLOATS, MATRIX, MATRIX, INT, INT, INT)),
    "orthonormalize": (low_rank._orthonormalize, (BATCH,)),
    "expand, first rows": (low_rank._write, (FLOATS,) * 5 + (F,) * 4),
    "expand, first rows and feedback": (low_rank._write_and_keep, (FLOATS,) * 6 + (F,) * 4),
    "expand, further rows": (low_rank._add, (FLOATS,) * 5 + (F,) * 4),
    "expand, further rows and feedback": (low_rank._add_and_take, (FLOATS,) * 6 + (F,) * 4),
    "prologue": (run_prologue, (FLOATS, STEPS)),
    "apply_update": (optim.LOOPS["apply_update"].py_func, (FLOATS, FLOATS, FLOATS, F, F)),
    "local_step": (optim.LOOPS["local_step"].py_func, (FLOATS,) * 6 + (F,) * 5),
    "sync_payload": (optim.LOOPS["sync_payload"].py_func, (FLOATS,) * 5 + (F,) * 5),
    "sync_apply": (optim.LOOPS["sync_apply"].py_func, (FLOATS,) * 6 + (F,) * 3),
    "restore_local": (optim.LOOPS["restore_local"].py_func, (FLOATS,) * 3 + (F,)),
    "estimate_momentum": (optim.LOOPS["estimate_momentum"].py_func, (FLOATS, BFLOATS, F, F)),
    "add_scaled": (optim.LOOPS["add_scaled"].py_func, (FLOATS, BFLOATS, F)),
    "momentum_correction": (optim.LOOPS["momentum_correction"].py_func, (FLOATS,) * 3 + (F,) * 3),
    "momentum_ahead": (optim.LOOPS["momentum_ahead"].py_func, (FLOATS,) * 2 + (F,)),
    "fingerprint": (fingerprint._hash, (WORDS, WORDS, INT)),
    "keep, 2 bytes": (model._keep, (HALVES, KEPT)),
    "keep, 4 bytes": (model._keep, (INTS, KEPT)),
    "count_pruned, 2 bytes": (model._count, (HALVES, KEPT, types.int16)),
    "count_pruned, 4 bytes": (model._count, (INTS, KEPT, types.int32)),
    "randomk all finite": (random_k._all_finite, (FLOATS, FLOATS)),
    "topk search": (topk.kth_largest, (INTS, INT, types.int32)),
    "a sum in order": (in_order, (FLOATS, NONE)),
    "a sum in order beside vectors": (in_order_beside, (FLOATS, FLOATS)),
}


STORED = {  # by codec its loops, and the arrays of a payload
    "bf16": (cast.cast_encode, cast.cast_mean, cast.cast_recode, (BFLOATS,)),
    "int8": (*integer.LOOPS["int8"], (FLOATS, BYTES)),
    "int4": (*integer.LOOPS["int4"], (FLOATS, BYTES)),
    "e4m3": (*float8.LOOPS["e4m3"], (FLOATS, BYTES)),
    "int2": (two_bit.int2_encode, two_bit.int2_mean, two_bit.int2_recode, (FLOATS, BYTES)),
    "sign": (sign.sign_encode, sign.sign_mean, sign.sign_recode, (FLOATS, BYTES)),
}
DRAW = WORDS, INTS
DRAWS = types.Array(types.uint32, 2, "C"), types.Array(types.int32, 2, "C")
GIVEN = types.Array(types.float32, 2, "A"), INT, INT, INTS, INTS, *DRAWS, types.boolean
WHOLE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **{f"{name} encode": (e, (FLOATS, STEPS, FLOATS, *coded, INT, INT)) for name, (e, _, _, coded) in STORED.items()},
    **{f"{name} mean": (m, (*coded, INT, INT, FLOATS, INT, INT)) for name, (_, m, _, coded) in STORED.items()},
    **{
        f"{name} recode": (r, (*coded, INT, INT, FLOATS, *coded, INT, INT, INT))
        for name, (_, _, r, coded) in STORED.items()
    },
    "topk encode": (topk._collect, (FLOATS, STEPS, FLOATS, types.int32, INT, INT, INT)),
    "topk mean": (scatter.fill_zeros, (FLOATS, INT, INT)),
    "randomk encode": (
        random_k.randomk_take,
        (FLOATS, STEPS, FLOATS, INT, INT, INTS, INTS, *DRAW, types.boolean, FLOATS, INT, INT),
    ),
    "randomk mean": (random_k.randomk_mean, (*GIVEN, FLOATS, INT, INT)),
    "randomk recode": (random_k.randomk_recode, (*GIVEN, FLOATS, *DRAW, types.boolean, FLOATS, INT, INT)),
    "rotate encode": (rotate.rotate_forth, (FLOATS, STEPS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)),
    "rotate mean": (rotate.rotate_back, (FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)),
}
"""Whole loops, with feedback and a prologue where they take them. A last, shorter block goes value by value in most."""


WRITTEN = {
    "remainders": """
        define void @remainders(ptr %x, ptr %i) {
          %a = load <8 x float>, ptr %x
          %b = frem <8 x float> %a, <float 3.0, float 5.0, float 3.0, float 5.0, float 3.0, float 5.0, float 3.0, float 5.0>
          store <8 x float> %b, ptr %x
          %c = load <8 x i32>, ptr %i
          %d = udiv <8 x i32> <i32 77, i32 77, i32 77, i32 77, i32 77, i32 77, i32 77, i32 77>, %c
          store <8 x i32> %d, ptr %i
          ret void
        }""",
}
"""Vectors in LLVM's code, for which processors have no instructions."""


def main() -> None:
    """Compile the pieces that are asked for."""
    processors: dict[str, str] = json.loads(sys.argv[1])
    (kind,) = {kind_of(*one) for one in processors.items()}
    write_for(kind)
    once = {name: WRITTEN.get(name) or lowered(*(PIECES | WHOLE)[name]) for name in sys.argv[2:]}
    found = {
        processor: {name: both(code, processor, triple) for name, code in once.items()}
        for processor, triple in processors.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
