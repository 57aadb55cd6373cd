"""Counts the bytes that kernels for CUDA read and write, on Triton's interpreter, against the least that must move.

    TRITON_INTERPRET=1 python tests/kernels/triton_bytes.py [NAME ...]

A row an op: bytes a value that have to come from memory and go there, each counted once in a launch however often its programs
touch it (what they need again is in the cache), the least of them, and bytes that are touched. What torch does beside the
kernels (it sets payloads and histograms to 0, adds up parts of sums) is not counted. `test_triton.py` runs it.
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
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from codec_cases import moved

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.prologue import Prologue
from commpress.kernels import table
from commpress.kernels.triton import fingerprint, low_rank, masks, model, optim, prologue
from commpress.kernels.triton.table import KERNELS

N = 1 << 13
BLOCKS = ("bf16", "fp16", "int8", "int4", "fp8", "sign", "int2")
OTHERS = {"randomk(0.1)": 1 << 14, "randomk(0.001)|int4": 1 << 14, "rotate|int4": 1 << 14, "topk(0.01)": 1 << 17}
"""How many values they are given: beside few the histograms of `topk` are large."""
LEAST = {
    "apply_update": (3, 2, 16),
    "local_step": (6, 5, 32),
    "sync_payload": (5, 5, 24),
    "sync_apply": (6, 3, 28),
    "restore_local": (3, 1, 12),
    "momentum_correction": (3, 3, 20),
    "momentum_ahead": (2, 1, 16),
    "estimate_momentum": (2, 2, 6),
    "add_scaled": (2, 1, 10),
}
"""Of passes of optimizers: how many tensors and numbers they take, and bytes of a value, each read and written once."""
ROWS, COLUMNS, RANK = 512, 128, 4

Op = tuple[int, float, Callable[[], object]]
"""How many values it has, the least bytes of a value, and what starts it."""


class Counted:
    """What launches read and write, in bytes: from memory and to it, and all that is touched."""

    def __init__(self) -> None:
        self.memory, self.touched = 0, 0
        self._here: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def note(self, kind: str, places: Any, mask: Any) -> None:
        """Add the bytes at some places, where the mask is True."""
        width = places.get_element_ty().primitive_bitwidth // 8
        starts = np.broadcast_to(places.data, np.shape(places.data))[np.asarray(mask.data, dtype=bool)]
        self._here[kind].append(
            (starts.reshape(-1, 1).astype(np.uint64) + np.arange(width, dtype=np.uint64)).reshape(-1)
        )

    def end(self) -> None:
        """Count what a launch has touched."""
        for found in self._here.values():
            if found:
                every = np.concatenate(found)
                self.memory += len(np.unique(every))
                self.touched += len(every)
                found.clear()


def counted(run: Callable[[], object]) -> Counted:
    """How many bytes an op reads and writes."""
    count = Counted()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, launched = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__

    def loading(self: Any, places: Any, mask: Any, *more: Any) -> Any:
        count.note("load", places, mask)
        return load(self, places, mask, *more)

    def storing(self: Any, places: Any, value: Any, mask: Any, *more: Any) -> Any:
        count.note("store", places, mask)
        return store(self, places, value, mask, *more)

    def adding(self: Any, operation: Any, places: Any, value: Any, mask: Any, *more: Any) -> Any:
        count.note("load", places, mask)
        count.note("store", places, mask)
        return atomic(self, operation, places, value, mask, *more)

    def launching(self: Any, *arguments: Any, **constants: Any) -> Any:
        launched(self, *arguments, **constants)
        count.end()

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", loading),
        mock.patch.object(InterpreterBuilder, "create_masked_store", storing),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", adding),
        mock.patch.object(GridExecutor, "__call__", launching),
    ):
        run()
    return count


def ops() -> dict[str, Op]:
    """All ops by name: a codec or what takes none, and the action as the benchmarks call it."""
    found: dict[str, Op] = {}
    for spec, n in {**dict.fromkeys(BLOCKS, N), **OTHERS}.items():
        found |= codec_ops(spec, n)
    return found | passes(N) | mask_ops(N) | factor_ops()


def codec_ops(spec: str, n: int) -> dict[str, Op]:
    """Each op of a codec on n values."""
    codec = parse(spec)
    torch.manual_seed(0)
    x, residual, inverse, average, out = (torch.randn(n) for _ in range(5))
    payload = coding.encode(codec, x)
    four, again = payload.repeat(4), torch.empty_like(payload)
    runs: dict[str, Callable[[], object]] = {
        "encode": partial(coding.encode, codec, x, None, None, again),
        "feedback": partial(coding.encode, codec, x, residual, None, again),
        "momentum": partial(coding.encode, codec, x, residual, Prologue(inverse, average, 1.0, 0.5, 0.5), again),
        "mean of 4": partial(coding.mean, codec, four, n, 4, out),
    }
    if coding.fuses_recode(codec, x.device):
        runs["recode 4"] = partial(coding.recode, codec, four, n, 4, None, again)
    return {f"{spec} {op}": (n, moved(codec, op, n) / n, run) for op, run in runs.items()}


def passes(n: int) -> dict[str, Op]:
    """The passes of optimizers, a prologue alone, the hash of a shard."""
    x = [torch.ones(n) for _ in range(6)]
    known = x[5].bfloat16()
    found: dict[str, Op] = {}
    for op, (tensors, numbers, least) in LEAST.items():
        given = [x[0], known] if op in ("estimate_momentum", "add_scaled") else x[:tensors]
        found[op] = n, least, partial(optim.run, op, *given, *[0.5] * numbers)
    found["prologue"] = n, 16, partial(prologue.apply, x[0], Prologue(x[1], x[2], 1.0, 0.5, 0.5))
    found["fingerprint"] = n, 4, partial(fingerprint.fingerprint, x[0].view(torch.int32))
    return found


def mask_ops(n: int) -> dict[str, Op]:
    """What masks do to n values, of which every other is kept."""
    x, kept = torch.ones(n), torch.arange(n) % 2 == 0
    places = kept.nonzero().view(-1).to(torch.int32)
    few = torch.ones(len(places))
    return {
        "keep": (n, 9, partial(model.keep, x, kept)),
        "count_pruned": (n, 5, partial(model.count_pruned, x, kept)),
        "pack": (len(places), 12, partial(masks.pack, x, places, few)),
        "unpack": (len(places), 12, partial(masks.unpack, few, places, x)),
    }


def factor_ops() -> dict[str, Op]:
    """The passes of `powersgd` over a matrix; the least is that of the matrix and its residual alone."""
    x, residual = torch.ones(ROWS, COLUMNS), torch.ones(ROWS, COLUMNS)
    p, q, n = torch.ones(RANK, ROWS), torch.ones(RANK, COLUMNS), ROWS * COLUMNS
    return {
        "project": (n, 4, partial(low_rank.project, x, None, q, p)),
        "project feedback": (n, 12, partial(low_rank.project, x, residual, q, p)),
        "project_back": (n, 4, partial(low_rank.project_back, x, p, q)),
        "expand": (n, 4, partial(low_rank.expand, p, q, x, None)),
        "expand feedback": (n, 12, partial(low_rank.expand, p, q, x, residual)),
    }


def called(function: Any, *arguments: Any, **constants: Any) -> Any:
    """Call a function of a kernel, as `interpreted.py` does."""
    return (function.rewrite() if function.fn.__module__.startswith("commpress.") else partial(REAL_CALL, function))(
        *arguments, **constants
    )


REAL_CALL: Any = InterpretedFunction.__call__


def main(names: list[str]) -> None:
    """Print a line of JSON for each op whose name begins with one of these, or for all."""
    kernels = {(op, word, "cpu"): kernel for (op, word, _), kernel in KERNELS.items()}
    words = {word for _, word, _ in kernels} - {None}  # what has no kernel falls back as on CUDA
    others = {key: kernel for key, kernel in table.KERNELS.items() if key[1] not in words}
    with (
        mock.patch.object(table, "KERNELS", others | kernels),
        mock.patch.object(InterpretedFunction, "__call__", called),
    ):
        for name, (n, least, run) in ops().items():
            if not names or name.startswith(tuple(names)):
                found = counted(run)
                row = {"op": name, "memory": found.memory / n, "least": least, "touched": found.touched / n}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
