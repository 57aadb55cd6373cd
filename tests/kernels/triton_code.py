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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from commpress.comm.codecs import parse
from commpress.comm.prologue import Prologue
from commpress.kernels.triton import cast, elias_fano, float8, integer, sign, topk, two_bit
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
    "topk(0.01)": topk,
}
LAUNCHING: tuple[Any, ...] = (*dict.fromkeys(FAMILIES.values()), elias_fano)
"""The modules that start kernels."""
STREAMS = {"_count_all", "_set_apart", "_begin"}
"""The kernels of `topk` that read or write all values; the others look at what was set apart."""


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
    x, residual = torch.zeros(N), torch.zeros(N)
    prologue = Prologue(x, x, 1.0, 0.5, 0.5)
    found: dict[str, Any] = {}

    def note(kernel: Any, *arguments: Any, **constants: Any) -> None:
        name = " ".join([kernel.__name__, *(f"{key}={value}" for key, value in constants.items())])
        found[name] = compiled(kernel, *arguments, **constants)

    for module in LAUNCHING:
        module.launch = note
    for spec, family in FAMILIES.items():
        codec = parse(spec)
        payload = torch.zeros(codec.nbytes(N), dtype=torch.uint8)
        ops = {
            "encode": lambda: family.encode(codec, x, None, None, payload),  # noqa: B023
            "feedback": lambda: family.encode(codec, x.bfloat16(), residual, None, payload),  # noqa: B023
            "prologue": lambda: family.encode(codec, x, residual, prologue, payload),  # noqa: B023
            "mean": lambda: family.mean(codec, payload.repeat(4), 4, x),  # noqa: B023
        }
        if hasattr(family, "clear"):
            ops["clear"] = lambda: family.clear(codec, payload, x)  # noqa: B023
        if hasattr(family, "recode"):
            ops["recode"] = lambda: family.recode(codec, payload.repeat(4), N, 4, residual, payload)  # noqa: B023
        for op, run in ops.items():
            if wanted is None or f"{spec} {op}" in wanted:
                found.clear()
                run()
                for name, kernel in found.items():
                    which = f"{spec} {op}" if len(found) == 1 else f"{spec} {op} {name}"
                    streams = family is not topk or name.split()[0] in STREAMS
                    row = {"kernel": which, "capability": capability, "streams": streams, **needs(kernel)}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        number, _, kernels = argument.partition(":")
        main(int(number), kernels.split(",") if kernels else None)
