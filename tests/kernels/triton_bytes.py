"""Counts the bytes that kernels for CUDA read and write, on Triton's interpreter, against the least that must move.

    TRITON_INTERPRET=1 python tests/kernels/triton_bytes.py [SPEC ...]

A row an op: bytes a value that have to come from memory and go there, each counted once however often a kernel touches it
(what it needs again is in the cache), the least of them, and bytes that are touched. `test_triton.py` runs it.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from codec_cases import moved

from commpress.comm.codecs import parse
from commpress.comm.prologue import Prologue
from commpress.kernels.triton import float8, integer, sign, two_bit

N = 1 << 13
FAMILIES: dict[str, Any] = {"int8": integer, "int4": integer, "fp8": float8, "sign": sign, "int2": two_bit}


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """How many bytes an op reads and writes in memory, and how many its kernels touch, those of the cache among them."""
    touched: dict[str, list[np.ndarray]] = {"load": [], "store": []}
    patches = []
    for kind, found in touched.items():
        name = f"create_masked_{kind}"
        real = getattr(InterpreterBuilder, name)

        def noted(
            self: Any, places: Any, *more: Any, real: Any = real, found: list[np.ndarray] = found, kind: str = kind
        ) -> Any:
            mask = more[0] if kind == "load" else more[1]
            width = places.get_element_ty().primitive_bitwidth // 8
            starts = np.broadcast_to(places.data, np.shape(places.data))[np.asarray(mask.data, dtype=bool)]
            found.append((starts.reshape(-1, 1).astype(np.uint64) + np.arange(width, dtype=np.uint64)).reshape(-1))
            return real(self, places, *more)

        patches.append(mock.patch.object(InterpreterBuilder, name, noted))
    with patches[0], patches[1]:
        run()
    every = [np.concatenate(found) for found in touched.values()]
    return sum(len(np.unique(found)) for found in every), sum(map(len, every))


def ops(spec: str) -> dict[str, Callable[[], object]]:
    """What starts each op of a codec on N values, by the name that the benchmarks give it."""
    codec, family = parse(spec), FAMILIES[spec]
    x, residual, out = (torch.ones(N, dtype=torch.float32, device="cpu") for _ in range(3))
    before = Prologue(x.clone(), x.clone(), 1.0, 0.5, 0.5)
    payload = torch.zeros(codec.nbytes(N), dtype=torch.uint8, device="cpu")
    four = payload.repeat(4)
    return {
        "encode": partial(family.encode, codec, x, None, None, payload),
        "feedback": partial(family.encode, codec, x, residual, None, payload),
        "momentum": partial(family.encode, codec, x, residual, before, payload),
        "mean of 4": partial(family.mean, codec, four, 4, out),
        "recode 4": partial(family.recode, codec, four, N, 4, None, payload),
    }


def main(specs: list[str]) -> None:
    """Print a line of JSON for each op of each codec."""
    for spec in specs or FAMILIES:
        for op, run in ops(spec).items():
            memory, touched = (number / N for number in counted(run))
            row = {"spec": spec, "op": op, "memory": memory, "least": moved(parse(spec), op, N) / N, "touched": touched}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
