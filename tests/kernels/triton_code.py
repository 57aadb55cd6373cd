"""Compiles kernels for CUDA for GPUs, without having one, and prints what their machine code needs:

    python tests/kernels/triton_code.py 90 "80:int8 prologue,sign mean"

Compute capabilities, each with the kernels that are wanted, or all. A row a kernel: registers of a thread, bytes of its stack
(what was spilled), bytes of shared memory, and by the instructions that it would run: accesses to what was spilled, products
that are fused with a sum, and by array of how many bytes its accesses are. `test_triton.py` runs it.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_accesses import accesses, function_of

from commpress.comm import coding, masks_index
from commpress.comm import fingerprint as on_device
from commpress.comm import prologue as prologues
from commpress.comm.codecs import parse
from commpress.comm.prologue import Prologue
from commpress.kernels.triton import (
    cast,
    elias_fano,
    fingerprint,
    float8,
    integer,
    launch,
    low_rank,
    masks,
    model,
    optim,
    prologue,
    random_k,
    rotate,
    sign,
    table,
    topk,
    two_bit,
)
from commpress.optim import loops

N = 1 << 20
"""How many values the kernels are given."""
TYPED = 90
"""The compute capability for which ops are compiled for all dtypes of gradients and of means."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
FAMILIES: dict[str, Any] = {
    "int8": integer,
    "int4": integer,
    "int8(stochastic)": integer,
    "int4(stochastic)": integer,
    "fp8": float8,
    "bf16": cast,
    "fp16": cast,
    "sign": sign,
    "int2": two_bit,
    "randomk(0.1)": random_k,
    "randomk(0.001)|int4": random_k,
    "randomk(0.0001)": random_k,
    "rotate|int4": rotate,
    "topk(0.01)": topk,
}


def compiled(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> Any:
    """Compile for these arguments what `launch` would start."""
    return kernel.warmup(*arguments, grid=(programs,), **(launch.OPTIONS | constants))


def needs(kernel: Any) -> dict[str, int]:
    """What the machine code of a compiled kernel needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        machine = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(found) for name, found in re.findall(r"(REG|STACK):(\d+)", said.stdout)}
    code = kernel.asm["ptx"]
    divides = re.search(r"\b(?:div|rcp|sqrt)\.", code)  # which ptxas makes of fused products
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": kernel.metadata.shared,
        "spilled": len(re.findall(r"\b(?:LDL|STL)\b", machine)),
        "fused": len(re.findall(r"\bfma\.", code)) + (0 if divides else len(re.findall(r"\bFFMA", machine))),
        "wide": len(re.findall(r"\b(?:LDG|STG)\.[.\w]*128", machine)),
    }


@contextlib.contextmanager
def instead_of_launching(capability: int, note: Callable[..., object]) -> Iterator[None]:
    """Have Triton take a GPU of this compute capability for the one that is here, and give `note` what is to be launched."""
    target = GPUTarget("cuda", capability, 32)
    here = {"get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    here["get_current_device"] = lambda: capability  # Triton asks for the target once a device
    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(driver, "_active", SimpleNamespace(**here)))
        for module in {launch, elias_fano, low_rank, *FAMILIES.values()}:
            patched.enter_context(mock.patch.object(module, "launch", note))
        yield


def main(capability: int, wanted: list[str] | None) -> None:
    """Print a line of JSON for each kernel: what it needs on a GPU of this compute capability."""
    kernels: list[Any] = []
    known: dict[str, dict[str, Any]] = {}

    def note(*arguments: Any, **constants: Any) -> None:
        kernels.append(compiled(*arguments, **constants))

    with instead_of_launching(capability, note):
        for name, run in chain(ops(N), typed_ops(N) if capability == TYPED else ()):
            if wanted is not None and name not in wanted:
                continue
            run()
            for kernel in kernels:
                if kernel.hash not in known:  # several ops have some in common
                    known[kernel.hash] = {**needs(kernel), "accesses": accesses(kernel)}
                row = {"kernel": name, "function": function_of(kernel), "capability": capability, **known[kernel.hash]}
                print(json.dumps(row), flush=True)
            kernels.clear()


def keys(n: int, count: int = 4, start: int = 0) -> dict[str, list[tuple[object, ...]]]:
    """What Triton compiles for each op on n values and on so many payloads: two kernels of one key are one."""
    found: dict[str, list[tuple[object, ...]]] = {}

    def note(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        binder = kernel.device_caches[90][-1]
        _, specialization, _ = binder(*arguments, **(launch.OPTIONS | constants))
        found[name].append((kernel.fn.__module__, kernel.fn.__name__, *map(str, specialization)))

    with instead_of_launching(90, note):
        for name, run in ops(n, count, start):
            found[name] = []
            run()
    return found


@contextlib.contextmanager
def as_on_cuda(note: Callable[..., object]) -> Iterator[None]:
    """Run the operations of codecs and the passes on CPU tensors as on CUDA, and give `note` what is to be launched."""

    def looked_up(op: str, word: str | None, device: str) -> Any:
        return table.KERNELS.get((op, word, "cuda"))

    with instead_of_launching(90, note), contextlib.ExitStack() as patched:
        for module in (coding, prologues, loops, masks_index, on_device):
            patched.enter_context(mock.patch.object(module, "lookup", looked_up))
        yield


@contextlib.contextmanager
def noted_keys() -> Iterator[set[tuple[object, ...]]]:
    """Run as on CUDA, but only note what Triton compiles."""
    found: set[tuple[object, ...]] = set()

    def note(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        binder = kernel.device_caches[90][-1]
        _, specialization, _ = binder(*arguments, **(launch.OPTIONS | constants))
        found.add((kernel.fn.__module__, kernel.fn.__name__, *map(str, specialization)))

    with as_on_cuda(note):
        yield found


def warm_keys(spec: str, dtype: torch.dtype) -> set[tuple[object, ...]]:
    """What a warm-up compiles for gradients of a dtype."""
    with noted_keys() as found, mock.patch.object(coding, "compiles_by_place", return_value=True):
        coding.warm_up(parse(spec), torch.device("cpu"), dtype, prologue=True)
    return found


def parts_keys(spec: str, dtype: torch.dtype, n: int = 5000) -> set[tuple[object, ...]]:
    """What is compiled for parts of a gradient and of its memory that begin anywhere, and payloads behind one another."""
    codec, places = parse(spec), (0, 1, 4)
    x, out = torch.zeros(n + 8, dtype=dtype), torch.zeros(n + 8, dtype=dtype)
    residual, inverse, average, floats = torch.zeros(4, n + 8)
    with noted_keys() as found:
        for x_at, kept_at, start in product(places, places, (0, 4, 8)):
            payloads = torch.zeros(start + 3 * codec.nbytes(n), dtype=torch.uint8)[start:]
            payload = payloads[: codec.nbytes(n)]
            part, kept = x[x_at : x_at + n], slice(kept_at, kept_at + n)
            before = Prologue(inverse, average, 1.0, 0.5, 0.5)[kept]
            for memory, update in ((None, None), (residual[kept], None), (residual[kept], before)):
                coding.encode(codec, part, memory, update, payload)
            coding.mean(codec, payloads, n, 3, out[x_at : x_at + n])
            coding.recode(codec, payloads, n, 3, residual[:n], payload)
            coding.recode(codec, payloads, n, 3, None, payload)
            coding.clear(codec, payload, residual[kept])
            before.apply(floats[x_at : x_at + n])
    return found


def warm_passes_keys() -> set[tuple[object, ...]]:
    """What warm-ups compile of the passes that belong to no codec."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    with noted_keys() as found, contextlib.ExitStack() as patched:
        for module in (loops, masks_index, on_device):
            patched.enter_context(mock.patch.object(module, "compiles_by_place", return_value=True))
        for module in (masks_index, on_device):
            patched.enter_context(mock.patch.object(module, "compiled_dtypes", return_value=dtypes))
        for each in (loops, masks_index, on_device):
            each.warm_up(torch.device("cpu"))
    return found


def placed_passes_keys(n: int = 5000) -> set[tuple[object, ...]]:
    """What is compiled of them for gradients, parts for those of a bucket, and parameters that begin anywhere."""

    def at(place: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(n + 8, dtype=dtype)[place : place + n]

    with noted_keys() as found:
        for g_at, part_at, p_at in product((0, 1, 4), repeat=3):
            g, part, p, known = at(g_at), at(part_at), at(p_at), at(part_at, torch.bfloat16)
            states = [torch.zeros(n) for _ in range(4)]
            loops.apply_update(p, g, states[0], 0.9, 0.1)
            loops.local_step(g, *states, p, 1.0, 0.9, 0.9, 0.1, 1.0)
            loops.sync_payload(g, *states[:3], part, 1.0, 0.1, 0.9, 0.5, 2.0)
            loops.sync_apply(p, g, *states[:3], part, 0.9, 0.1, 2.0)
            loops.restore_local(p, *states[:2], 0.9)
            loops.momentum_correction(g, part, p, 0.9, 0.1, True)
            prologues.Ahead(part, 0.1).apply(g)
            loops.estimate_momentum(g, known, 0.5, 1.0)
            loops.add_scaled(g, known, 0.5)
        for dtype, x_at, out_at in product((torch.float32, torch.bfloat16, torch.float16), (0, 1, 8), (0, 1, 8)):
            places = torch.zeros(n, dtype=torch.int32)
            masks_index.pack(at(x_at, dtype), places, at(out_at, dtype))
            masks_index.unpack(at(x_at, dtype), places, at(out_at, dtype))
            on_device.fingerprint_on_device(at(x_at, dtype))
    return found


def ops(n: int, count: int = 4, start: int = 0) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op of each codec, and each that belongs to none, for n values and `count` payloads: its name, and what starts it.

    A payload that is written starts at byte `start` of its memory.
    """
    yield from codec_ops(n, count, start)
    yield from passes(n)
    yield from factors(n)


def codec_ops(n: int, count: int, start: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op of each codec: its name, and what starts its kernels."""
    (x, halves, before), residual = inputs(n), torch.zeros(n)
    for spec, family in FAMILIES.items():
        codec = parse(spec)
        payload = torch.zeros(start + codec.nbytes(n), dtype=torch.uint8)[start:]
        ops = {
            "encode": partial(family.encode, codec, x, None, None, payload),
            "feedback": partial(family.encode, codec, halves, residual, None, payload),
            "prologue": partial(family.encode, codec, x, residual, before, payload),
            "mean": partial(family.mean, codec, payload.repeat(count), count, x),
        }
        if hasattr(family, "recode"):
            ops["recode"] = partial(family.recode, codec, payload.repeat(count), n, count, residual, payload)
            ops["recode alone"] = partial(family.recode, codec, payload.repeat(count), n, count, None, payload)
        if hasattr(family, "clear"):
            ops["clear"] = partial(family.clear, codec, payload, x)
        yield from ((f"{spec} {op}", run) for op, run in ops.items())


def typed_ops(n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ops of codecs on gradients and means of other dtypes than in `codec_ops`: its name, and what starts its kernels."""
    (x, bfloat16, before), residual, float16 = inputs(n), torch.zeros(n), torch.zeros(n, dtype=torch.float16)
    for spec, family in FAMILIES.items():
        if "stochastic" in spec:  # reads and writes what its spec without it does
            continue
        codec = parse(spec)
        payload = torch.zeros(codec.nbytes(n), dtype=torch.uint8)
        yield f"{spec} encode of float16", partial(family.encode, codec, float16, None, None, payload)
        yield f"{spec} feedback of float32", partial(family.encode, codec, x, residual, None, payload)
        yield f"{spec} prologue of float16", partial(family.encode, codec, float16, residual, before, payload)
        if codec.word != "topk":  # whose means are float32
            yield f"{spec} mean of bfloat16", partial(family.mean, codec, payload.repeat(4), 4, bfloat16)
            yield f"{spec} mean of float16", partial(family.mean, codec, payload.repeat(4), 4, float16)


def passes(n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op that belongs to no codec: its name, and what starts its kernel."""
    x, halves, before = inputs(n)
    index, kept = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.bool)
    for op, tensors, numbers in (
        ("apply_update", 3, 2),
        ("local_step", 6, 5),
        ("sync_payload", 5, 5),
        ("sync_apply", 6, 3),
        ("restore_local", 3, 1),
        ("momentum_correction", 3, 3),
        ("momentum_ahead", 2, 1),
    ):
        yield op, partial(optim.run, op, *[x] * tensors, *[0.5] * numbers)
    yield "estimate_momentum", partial(optim.run, "estimate_momentum", x, halves, 0.5, 0.5)
    yield "add_scaled", partial(optim.run, "add_scaled", x, halves, 0.5)
    yield "prologue", partial(prologue.apply, x, before)
    yield "keep", partial(model.keep, x, kept)
    yield "keep of bfloat16", partial(model.keep, halves, kept)
    yield "count_pruned", partial(model.count_pruned, x, kept)
    yield "fingerprint", partial(fingerprint.fingerprint, x.view(torch.int32))
    yield "fingerprint of bfloat16", partial(fingerprint.fingerprint, halves.view(torch.int16))
    yield "pack", partial(masks.pack, x, index, x)
    yield "unpack", partial(masks.unpack, x, index, x)


def factors(n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op of `powersgd` on a matrix of each width of a tile, of some n values and of a rank that n decides."""
    rank = 1 + n % 31
    for columns in (24, 100, 1000 + n % 2):
        rows = n // columns + 1
        x, p, q = torch.zeros(rows, columns), torch.zeros(rank, rows), torch.zeros(rank, columns)
        yield f"project {columns // 2 * 2}", partial(low_rank.project, x, None, q, p)
        yield f"project feedback {columns // 2 * 2}", partial(low_rank.project, x, torch.zeros_like(x), q, p)
        yield f"project_back {columns // 2 * 2}", partial(low_rank.project_back, x, p, q)
        yield f"expand {columns // 2 * 2}", partial(low_rank.expand, p, q, x, None)
        yield f"expand feedback {columns // 2 * 2}", partial(low_rank.expand, p, q, x, torch.zeros_like(x))
    yield "orthonormalize", partial(low_rank.orthonormalize, torch.zeros(3, rank, n // 64 + 1))


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, Prologue]:
    """A gradient in float32 and one in bfloat16, and a prologue."""
    x = torch.zeros(n)
    return x, x.bfloat16(), Prologue(x, x, 1.0, 0.5, 0.5)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        number, _, kernels = argument.partition(":")
        main(int(number), kernels.split(",") if kernels else None)
