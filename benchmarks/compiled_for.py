"""Compiles Numba functions for processors that this machine may not be. For `instructions` and `tests/kernels/pieces.py`.

Numba must optimise nothing (`NUMBA_OPT=0`): `lowered` gives LLVM's code for no processor, which `optimised` then makes ready
for one by the passes that Numba runs.
"""

import re
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from numba import njit

OPTIONS = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Those of the loops; but nobody calls what is compiled here, so what Python would call it by is not made."""

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()


def lowered(function: Callable[..., Any], signature: tuple[Any, ...]) -> str:
    """LLVM's code of a function as Numba lowers it, for no processor."""
    compiled: Any = njit(**OPTIONS)(getattr(function, "py_func", function))
    compiled.compile(signature)
    code = compiled.inspect_llvm(compiled.signatures[0])
    code = re.sub(r"target (triple|datalayout) = .*", "", code)
    return re.sub(r'"(target-cpu|target-features)"="[^"]*"', "", code)


def optimised(code: str, processor: str, triple: str) -> str:
    """The code as LLVM leaves it for a processor."""
    return str(_module(code, _machine(processor, triple), triple))


def assembly(code: str, processor: str, triple: str) -> str:
    """The machine code for a processor, as text."""
    machine = _machine(processor, triple)
    text: str = machine.emit_assembly(_module(code, machine, triple))
    return text


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
