"""Compiles kernels for CUDA for GPUs, without having one, and prints what their machine code needs:

    python tests/kernels/triton_code.py 90 "80:int8 prologue,sign mean"

Compute capabilities, each with the kernels that are wanted, or all. A row a kernel: registers of a thread, bytes of its stack
(what was spilled), bytes of shared memory, products that are fused with a sum, and accesses of 16 bytes. `test_triton.py` runs
it.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from commpress.comm.codecs import parse
from commpress.comm.prologue import Prologue
from commpress.kernels.triton import (
    cast,
    elias_fano,
    float8,
    integer,
    masks,
    model,
    optim,
    prologue,
    random_k,
    rotate,
    sign,
    topk,
    two_bit,
)
from commpress.kernels.triton.launch import OPTIONS

N = 1 << 20
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

X, HALVES, INDEX, KEPT = (
    torch.zeros(N, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.bool)
)
BEFORE = Prologue(X, X, 1.0, 0.5, 0.5)
PASSES: dict[str, tuple[Any, Callable[[], object]]] = {
    "apply_update": (optim, lambda: optim.run("apply_update", X, X, X, 0.5, 0.5)),
    "local_step": (optim, lambda: optim.run("local_step", *[X] * 6, *[0.5] * 5)),
    "sync_payload": (optim, lambda: optim.run("sync_payload", *[X] * 5, *[0.5] * 5)),
    "sync_apply": (optim, lambda: optim.run("sync_apply", *[X] * 6, *[0.5] * 3)),
    "restore_local": (optim, lambda: optim.run("restore_local", X, X, X, 0.5)),
    "estimate_momentum": (optim, lambda: optim.run("estimate_momentum", X, HALVES, 0.5, 0.5)),
    "add_scaled": (optim, lambda: optim.run("add_scaled", X, HALVES, 0.5)),
    "momentum_correction": (optim, lambda: optim.run("momentum_correction", X, X, X, 0.5, 0.5, 0.0)),
    "momentum_ahead": (optim, lambda: optim.run("momentum_ahead", X, X, 0.5)),
    "prologue": (prologue, lambda: prologue.apply(X, BEFORE)),
    "keep": (model, lambda: model.keep(X, KEPT)),
    "keep of bfloat16": (model, lambda: model.keep(HALVES, KEPT)),
    "count_pruned": (model, lambda: model.count_pruned(X, KEPT)),
    "pack": (masks, lambda: masks.pack(X, INDEX, X)),
    "unpack": (masks, lambda: masks.unpack(X, INDEX, X)),
}
"""Kernels that belong to no codec: their modules, and what starts them."""


def compiled(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> Any:
    """Compile for these arguments what `launch` would start."""
    return kernel.warmup(*arguments, grid=(programs,), **OPTIONS, **constants)


def needs(kernel: Any) -> dict[str, int]:
    """What the machine code of a compiled kernel needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = {name: int(found) for name, found in re.findall(r"(REG|STACK):(\d+)", said.stdout)}
    code = kernel.asm["ptx"]
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": kernel.metadata.shared,
        "fused": len(re.findall(r"\bfma\.", code)),
        "wide": len(re.findall(r"(?:ld|st)\.global[.\w]*\.v4\.b32", code)),
    }


def main(capability: int, wanted: list[str] | None) -> None:
    """Print a line of JSON for each kernel: what it needs on a GPU of this compute capability."""
    target = GPUTarget("cuda", capability, 32)
    here = {"get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    here["get_current_device"] = lambda: capability  # Triton asks for the target once a device
    driver.set_active(SimpleNamespace(**here))
    for name, family, run in [*codec_ops(), *((name, *of) for name, of in PASSES.items())]:
        if wanted is not None and name not in wanted:
            continue
        found: list[Any] = []

        def note(*arguments: Any, found: list[Any] = found, **constants: Any) -> None:
            found.append(compiled(*arguments, **constants))

        family.launch = elias_fano.launch = note
        run()
        for kernel in found:
            row = {"kernel": name, "function": kernel.metadata.name, "capability": capability, **needs(kernel)}
            print(json.dumps(row), flush=True)


def codec_ops() -> Iterator[tuple[str, Any, Callable[[], object]]]:
    """Each op of each codec: its name, its module, and what starts its kernels."""
    residual = torch.zeros(N)
    for spec, family in FAMILIES.items():
        codec = parse(spec)
        payload = torch.zeros(codec.nbytes(N), dtype=torch.uint8)
        ops = {
            "encode": partial(family.encode, codec, X, None, None, payload),
            "feedback": partial(family.encode, codec, HALVES, residual, None, payload),
            "prologue": partial(family.encode, codec, X, residual, BEFORE, payload),
            "mean": partial(family.mean, codec, payload.repeat(4), 4, X),
        }
        if hasattr(family, "recode"):
            ops["recode"] = partial(family.recode, codec, payload.repeat(4), N, 4, residual, payload)
        if hasattr(family, "clear"):
            ops["clear"] = partial(family.clear, codec, payload, X)
        yield from ((f"{spec} {op}", family, run) for op, run in ops.items())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        number, _, kernels = argument.partition(":")
        main(int(number), kernels.split(",") if kernels else None)
