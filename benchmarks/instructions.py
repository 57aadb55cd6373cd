"""How many instructions do inner loops of the CPU codecs take a value? `python benchmarks/instructions.py`

Compiles pieces of the loops for this machine, as wide as the loops are, and counts in what Numba made of them: of each piece
the stretch of machine code between two labels that has the most packed instructions, which is the body of its inner loop, or
all of it where no loop is left. A conversion counts as much as a move. No clock is read.

`--targets sapphirerapids znver3` compiles the loops as they are written for these processors, and not for this machine, by
the passes that Numba runs, and prints the sums for encoding with feedback and decoding, too, beside the bytes that must move.
"""

import argparse
import os
import platform
import re
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from codec_cases import moved
from numba import njit, types
from rich.console import Console
from rich.table import Table

import commpress
from commpress.kernels.cpu import cast, float8, integer, sign, topk, two_bit
from commpress.kernels.cpu.blocks import block_of, put_block, top_of
from commpress.kernels.cpu.instructions import PROCESSOR, SIGN_BLOCK, reach_mask, widest

FLOATS, BYTES, HALVES = (types.Array(kind, 1, "C") for kind in (types.float32, types.uint8, types.uint16))
F, FOUR = types.float32, types.UniTuple(types.float32, 4)
LANES = {"x": 4, "y": 8, "z": 16}
STORED = r"vmov(?:[au]p|dq|nt)\w*\s+%([xyz])mm\d+, -?\d*\((?!%rsp)"
READ = r"v(?!p?broadcast)\w+\s+(?:\$\d+, )?-?\d*\((?!%r[is]p).*%([xyz])mm"
"""A vector that is stored, or read on the way into a register, but for constants and what a register had no room for."""
TRIPLE = "x86_64-unknown-linux-gnu"


def bf16_decode(halves: Any, out: Any) -> None:
    widest()
    cast._add(halves, np.float32(1), 256, True, out)


def fp8_decode(codes: Any, scale: Any, out: Any) -> None:
    widest()
    float8._add(scale, codes, float8.E4M3, np.float32(1), 256, True, out)


def fp8_mean(scales: Any, a: Any, b: Any, c: Any, d: Any, share: Any, out: Any) -> None:
    widest()
    float8._add_four(scales, a, b, c, d, float8.E4M3, share, 256, True, out)


def add_residual(x: Any, residual: Any, scratch: Any) -> Any:
    widest()
    return block_of(x, None, residual, 0, 256, scratch)[7]


def sign_mean(x: Any) -> Any:
    widest()
    return sign.sum_magnitudes(x)


def int2_pack(x: Any, mean: Any, signs: Any, sizes: Any) -> Any:
    widest()
    return two_bit._pack(x, SIGN_BLOCK, mean, signs, sizes)


def int2_residual(x: Any, residual: Any, mean: Any, low: Any, high: Any) -> None:
    widest()
    two_bit._keep_loss(x, residual, mean, low, high)


def topk_remember(x: Any, residual: Any, old: Any) -> Any:
    widest()
    return topk._remember(x, residual, old, 256)


def codes_of(bits: int, stochastic: bool = False) -> Callable[..., None]:
    def write(x: Any, residual: Any, codes: Any, top: Any) -> None:
        widest()
        integer._write(x, residual, codes, top, bits, stochastic)

    return write


def e5m2_codes(x: Any, residual: Any, codes: Any, peak: Any) -> None:
    widest()
    float8._write(x, residual, codes, peak, float8.E5M2)


def largest(x: Any) -> Any:
    widest()
    return top_of(x, 256)


def sign_bits(x: Any, codes: Any, scale: Any) -> None:
    widest()
    sign._write(x, None, codes, scale)


def sign_residual(x: Any, residual: Any, codes: Any, scale: Any) -> None:
    widest()
    sign._write(x, residual, codes, scale)


def decoding_of(bits: int) -> Callable[..., None]:
    def decode(scale: Any, codes: Any, out: Any) -> None:
        widest()
        integer._add(scale, codes, np.float32(1), bits, True, out)

    return decode


def sign_decode(pf: Any, pu: Any, out: Any) -> None:
    widest()
    sign._read(pf, pu, 1, 4096, 0, 8, np.float32(1), out)


def streamed(out: Any, o: Any, block: Any) -> None:
    widest()
    put_block(out, o, block, 256)


def topk_compare(x: Any, threshold: Any) -> Any:
    widest()
    return reach_mask(x, 0, threshold)


class Piece(NamedTuple):
    """A function and the types that it takes; each value is stored or read as float32 so often in its loop, or the function
    is one of so many values."""

    function: Callable[..., Any]
    signature: tuple[Any, ...]
    stores: int = 0
    reads: int = 0
    whole: int = 0


PIECES: dict[str, Piece] = {
    "bf16: decode": Piece(bf16_decode, (HALVES, FLOATS), stores=1),
    "fp8: decode": Piece(fp8_decode, (BYTES, F, FLOATS), stores=1),
    "fp8: mean of 4": Piece(fp8_mean, (FOUR, BYTES, BYTES, BYTES, BYTES, F, FLOATS), stores=1),
    "all with feedback: x + residual": Piece(add_residual, (FLOATS,) * 3, stores=1),
    "sign, int2: mean size": Piece(sign_mean, (FLOATS,), whole=SIGN_BLOCK),
    "int2: bits and both sizes": Piece(int2_pack, (FLOATS, F, BYTES, BYTES), whole=SIGN_BLOCK),
    "int2: residual": Piece(int2_residual, (FLOATS, FLOATS, F, F, F), stores=1),
    "int8, int4: largest magnitude": Piece(largest, (FLOATS,), reads=1),
    "int8: codes and residual": Piece(codes_of(8), (FLOATS, FLOATS, BYTES, types.int32), stores=1),
    "int4: codes and residual": Piece(codes_of(4), (FLOATS, FLOATS, BYTES, types.int32), stores=1),
    "int8(stochastic): codes and residual": Piece(codes_of(8, True), (FLOATS, FLOATS, BYTES, types.int32), stores=1),
    "int4(stochastic): codes and residual": Piece(codes_of(4, True), (FLOATS, FLOATS, BYTES, types.int32), stores=1),
    "fp8(e5m2): codes and residual": Piece(e5m2_codes, (FLOATS, FLOATS, BYTES, F), stores=1),
    "sign: bits": Piece(sign_bits, (FLOATS, BYTES, F), reads=1),
    "sign: residual": Piece(sign_residual, (FLOATS, FLOATS, BYTES, F), stores=1),
    "topk with feedback: sum": Piece(topk_remember, (FLOATS,) * 3, stores=2),
    "topk: comparison": Piece(topk_compare, (FLOATS, types.int32), whole=64),
    "int8: decode": Piece(decoding_of(8), (F, BYTES, FLOATS), stores=1),
    "int4: decode": Piece(decoding_of(4), (F, BYTES, FLOATS), stores=1),
    "sign: decode": Piece(sign_decode, (FLOATS, BYTES, FLOATS), stores=1),
    "all: write past the caches": Piece(streamed, (FLOATS, types.int64, FLOATS), stores=1),
}
SUM, WRITTEN = "all with feedback: x + residual", "all: write past the caches"
ROWS: dict[tuple[str, str], tuple[str, ...]] = {
    ("int8", "feedback"): (SUM, "int8, int4: largest magnitude", "int8: codes and residual"),
    ("int4", "feedback"): (SUM, "int8, int4: largest magnitude", "int4: codes and residual"),
    ("int8(stochastic)", "feedback"): (SUM, "int8, int4: largest magnitude", "int8(stochastic): codes and residual"),
    ("int4(stochastic)", "feedback"): (SUM, "int8, int4: largest magnitude", "int4(stochastic): codes and residual"),
    ("fp8(e5m2)", "feedback"): (SUM, "int8, int4: largest magnitude", "fp8(e5m2): codes and residual"),
    ("sign", "feedback"): (SUM, "sign, int2: mean size", "sign: bits", "sign: residual"),
    ("int2", "feedback"): (SUM, "sign, int2: mean size", "int2: bits and both sizes", "int2: residual"),
    ("topk(0.1)|sign", "feedback"): ("topk with feedback: sum", "topk: comparison"),
    ("topk(0.01)|int4", "feedback"): ("topk with feedback: sum", "topk: comparison"),
    ("int8", "decode"): ("int8: decode", WRITTEN),
    ("int4", "decode"): ("int4: decode", WRITTEN),
    ("sign", "decode"): ("sign: decode", WRITTEN),
    ("topk(0.1)|sign", "decode"): (WRITTEN,),
    ("topk(0.01)|int4", "decode"): (WRITTEN,),
}
"""By spec and action the pieces that every value goes through. The few values that top-k sends go through more."""


def inner_loop(code: str, stores: bool) -> list[str]:
    """The instructions of the stretch of machine code with the most packed ones, or with the most that store floats."""
    stretches = re.split(r"^\.?\w+:.*$|^\s+j[a-z]+\s.*$", code, flags=re.MULTILINE)
    instructions = [re.findall(r"^\t([a-z]\w+\s+.*)$", s, re.MULTILINE) for s in stretches]
    packed = STORED if stores else r".*%[yz]mm"
    return max(instructions, key=lambda lines: sum(bool(re.match(packed, line)) for line in lines))


def a_value(piece: Piece, code: str) -> tuple[int, int]:
    """How many instructions the piece takes, and for how many values."""
    lines = inner_loop(code, stores=bool(piece.stores))
    found = (re.match(STORED if piece.stores else READ, line) for line in lines)
    lanes = sum(LANES[one[1]] for one in found if one)
    return len(lines), piece.whole or lanes // (piece.stores or piece.reads)


def code_for_this_machine(piece: Piece) -> str:
    """The machine code that Numba makes here."""
    options = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: Any = njit(**options)(piece.function)
    compiled.compile(piece.signature)
    return str(compiled.inspect_asm(compiled.signatures[0]))


def counts_for(processor: str) -> dict[str, float]:
    """Instructions a value of each piece on another processor. Runs in a process of its own, where Numba optimises nothing."""
    from compiled_for import assembly, kind_of, lowered, write_for

    write_for(kind_of(processor, TRIPLE))
    counts = {}
    for name, piece in PIECES.items():
        lines, values = a_value(piece, assembly(lowered(piece.function, piece.signature), processor, TRIPLE))
        counts[name] = lines / values
    return counts


def show_here() -> None:
    """Print the table of this machine."""
    table = Table(title=f"{PROCESSOR}, {platform.machine()}: instructions of inner loops")
    for column in ("piece", "instructions", "values", "instructions a value"):
        table.add_column(column, justify="left" if column == "piece" else "right")
    for name, piece in PIECES.items():
        lines, values = a_value(piece, code_for_this_machine(piece))
        table.add_row(name, str(lines), str(values), f"{lines / values:.2f}")
    Console(width=120).print(table)


def show_targets(targets: list[str]) -> None:
    """Print the tables of other processors: pieces, and the actions that consist of them."""
    os.environ["NUMBA_OPT"] = "0"
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # loops are written for one kind a process
        found = dict(zip(targets, pool.map(counts_for, targets, chunksize=1), strict=True))
    pieces = Table(title="instructions a value of inner loops, as LLVM compiles them")
    actions = Table(title="instructions a value of an action, and the bytes that it must move")
    for table, first in ((pieces, ["piece"]), (actions, ["spec", "action", "bytes"])):
        for column in (*first, *targets):
            table.add_column(column, justify="left" if column in ("piece", "spec", "action") else "right")
    for name in PIECES:
        pieces.add_row(name, *(f"{found[t][name]:.2f}" for t in targets))
    for (spec, action), parts in ROWS.items():
        many = 1 << 20
        moves = moved(commpress.parse(spec), action, many) / many
        sums = (sum(found[t][name] for name in parts) for t in targets)
        actions.add_row(spec, action, f"{moves:.2f}", *(f"{s:.2f}" for s in sums))
    console = Console(width=120)
    console.print(pieces)
    console.print(actions)


def main() -> None:
    """Count, and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--targets", nargs="+", help="processors as LLVM names them, of x86-64; default this machine")
    chosen = options.parse_args()
    if chosen.targets:
        show_targets(chosen.targets)
    else:
        show_here()


if __name__ == "__main__":
    main()
