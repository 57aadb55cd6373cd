"""Compiles Numba functions for processors that this machine may not be. For `instructions` and `tests/kernels/pieces.py`.

Numba must optimise nothing (`NUMBA_OPT=0`): `lowered` gives LLVM's code for no processor, which `both` then makes ready
for one by the passes that Numba runs. What the loops themselves ask about their processor is answered by `write_for`: once a
process, before anything is lowered, since Numba keeps each part of a loop that it has lowered.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from numba import njit

from commpress.kernels.cpu import blocks, float8, instructions

OPTIONS = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Those of the loops; but nobody calls what is compiled here, so what Python would call it by is not made."""

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()


class Kind(NamedTuple):
    """What the loops ask about the processor that they are written for."""

    wide: bool
    asks_ahead: bool


def kind_of(processor: str, triple: str) -> Kind:
    """The answers for a processor. It is wide if LLVM adds 16 lanes in one register of it."""
    lanes = "<16 x float>"
    asked = f"define {lanes} @add({lanes} %a, {lanes} %b) #0 {{ %c = fadd {lanes} %a, %b ret {lanes} %c }}"
    widest = 'attributes #0 = { "prefer-vector-width"="512" "min-legal-vector-width"="512" }'
    wide = "zmm" in assembly(f"{asked}\n{widest}", processor, triple)
    return Kind(wide, asks_ahead=not processor.startswith("znver"))


def write_for(kind: Kind) -> None:
    """Have all that is lowered from now on in this process written for such processors, and not for this machine."""
    instructions.PACKED = instructions.SIGN_LANES if kind.wide else 16
    blocks.ASKS_AHEAD = kind.asks_ahead
    blocks.CONVERTS_HALVES = float8.CONVERTS_HALVES = True  # all that are asked have an instruction for it


def lowered(function: Callable[..., Any], signature: tuple[Any, ...]) -> str:
    """LLVM's code of a function as Numba lowers it, for no processor."""
    reordered = {key: value for key, value in getattr(function, "targetoptions", {}).items() if key == "fastmath"}
    compiled: Any = njit(**OPTIONS, **reordered)(getattr(function, "py_func", function))
    compiled.compile(signature)
    code = compiled.inspect_llvm(compiled.signatures[0])
    code = re.sub(r"target (triple|datalayout) = .*", "", code)
    return re.sub(r'"(target-cpu|target-features)"="[^"]*"', "", code)


def both(code: str, processor: str, triple: str) -> tuple[str, str]:
    """The code as LLVM optimises it for a processor, and the machine code that it makes of that, as text."""
    machine = _machine(processor, triple)
    module = _module(code, machine, triple)
    return str(module), machine.emit_assembly(module)  # in this order: the latter changes the module


def assembly(code: str, processor: str, triple: str) -> str:
    """The machine code for a processor, as text."""
    return both(code, processor, triple)[1]


def _machine(processor: str, triple: str) -> Any:
    return llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3, jit=False)


def _module(code: str, machine: Any, triple: str) -> Any:
    """The code behind the passes that Numba runs: each function, what calls what, everything."""
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = triple, str(machine.target_data)
    builder = _builder(machine, 3, vectors=True)
    passes = builder.getFunctionPassManager()
    passes.add_refprune_pass()
    for function in module.functions:
        passes.run(function, builder)
    builder = _builder(machine, 0, vectors=False)
    passes = builder.getModulePassManager()
    passes.add_loop_rotate_pass()
    passes.add_instruction_combine_pass()
    passes.add_jump_threading_pass()
    passes.add_refprune_pass()
    passes.run(module, builder)
    builder = _builder(machine, 3, vectors=True)
    passes = builder.getModulePassManager()
    passes.add_refprune_pass()
    passes.run(module, builder)
    return module


def _builder(machine: Any, level: int, vectors: bool) -> Any:
    options = llvm.PipelineTuningOptions(speed_level=level)
    options.loop_vectorization, options.slp_vectorization = vectors, False
    return llvm.create_pass_builder(machine, options)
