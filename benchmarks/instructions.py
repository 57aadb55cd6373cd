"""How many instructions do inner loops of the CPU codecs take a value? `python benchmarks/instructions.py`

Compiles pieces of the loops for this machine, as wide as the loops are, and counts in what Numba made of them: of each piece
the stretch of machine code between two labels that has the most packed instructions, which is the body of its inner loop, or
all of it where no loop is left. A conversion counts as much as a move. No clock is read.
"""

import platform
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from rich.console import Console
from rich.table import Table

from commpress.kernels.cpu import cast, float8, sign, topk, two_bit
from commpress.kernels.cpu.blocks import block_of
from commpress.kernels.cpu.instructions import PROCESSOR, SIGN_BLOCK, widest

FLOATS, BYTES, HALVES = (types.Array(kind, 1, "C") for kind in (types.float32, types.uint8, types.uint16))
F, FOUR = types.float32, types.UniTuple(types.float32, 4)
LANES = {"x": 4, "y": 8, "z": 16}


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


PIECES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int, int]] = {
    "bf16: decode": (bf16_decode, (HALVES, FLOATS), 1, 0),
    "fp8: decode": (fp8_decode, (BYTES, F, FLOATS), 1, 0),
    "fp8: mean of 4": (fp8_mean, (FOUR, BYTES, BYTES, BYTES, BYTES, F, FLOATS), 1, 0),
    "all with feedback: x + residual": (add_residual, (FLOATS,) * 3, 1, 0),
    "sign, int2: mean size": (sign_mean, (FLOATS,), 0, SIGN_BLOCK),
    "int2: bits and both sizes": (int2_pack, (FLOATS, F, BYTES, BYTES), 0, SIGN_BLOCK),
    "int2: residual": (int2_residual, (FLOATS, FLOATS, F, F, F), 1, 0),
    "topk with feedback: sum": (topk_remember, (FLOATS,) * 3, 2, 0),
}
"""By name a piece, the types it takes, and how often it stores each value as float32, or the values of a whole block."""


def inner_loop(function: Callable[..., Any], signature: tuple[Any, ...]) -> list[str]:
    """The instructions of the stretch with the most packed ones."""
    compiled: Any = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    compiled.compile(signature)
    code = compiled.inspect_asm(compiled.signatures[0])
    stretches = re.split(r"^\.?\w+:.*$|^\s+j[a-z]+\s.*$", code, flags=re.MULTILINE)
    instructions = [re.findall(r"^\t([a-z]\w+\s+.*)$", s, re.MULTILINE) for s in stretches]
    return max(instructions, key=lambda lines: sum(bool(re.search(r"%[yz]mm", line)) for line in lines))


def main() -> None:
    """Count, and print the table."""
    table = Table(title=f"{PROCESSOR}, {platform.machine()}: instructions of inner loops")
    for column in ("piece", "instructions", "values", "instructions a value"):
        table.add_column(column, justify="left" if column == "piece" else "right")
    for name, (function, signature, stores, whole) in PIECES.items():
        lines = inner_loop(function, signature)
        stored = (re.match(r"vmov\w+\s+%([xyz])mm\d+, -?\d*\(", line) for line in lines)
        values = whole or sum(LANES[found[1]] for found in stored if found) // stores
        table.add_row(name, str(len(lines)), str(values), f"{len(lines) / values:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
