"""Runtimes: how each loads and calls a form of a model. And, run as a script, a process of its own for one form.

    torch         a module as it is, with the values of model.safetensors; zeros and integers cost what floats cost
    onnxruntime   model.onnx
    pt2e          model.pt2, compiled by torch.compile with frozen weights
    executorch    model.pte, by XNNPACK's kernels and ExecuTorch's own
    integer       integer.safetensors, by NumPy: what a device computes, not how fast it is
    litert        model.tflite, by XNNPACK's kernels and LiteRT's own; other rows than the file's where its graph allows it

The script imports nothing of commpress, so what it measures is what the runtime takes elsewhere. It talks over a connection:

    <- the job: {"runtime", "path", "threads", "modules", "inputs"}
    -> {"seconds": of the first call, "peak": bytes of loading and of the first call, or None}
    <- ("calls", n)          -> seconds of each, and the processor time of all
    <- ("outputs", inputs)   -> numpy arrays
    <- ("peak", None)        -> bytes of all calls, with what is loaded, or None

A new runtime is a function that imports it and returns how a file is loaded, and a line in RUNTIMES. Inputs and outputs are
numpy arrays. A module's own code counts as part of the runtime: it is imported by a copy without values, `CODE`, first.
torch.export.load and torch.load run code: a form comes from those whose code one would run (`Runtime.runs_code`). All others
read tensors and a graph.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Call = Callable[[list[Any]], list[Any]]
Load = Callable[[str], Call]
CODE = ".code"
"""What is behind the name of a pickled module, for its copy without values."""
ENOUGH = 2
"""Calls before the first that counts: what is compiled or allocated once is there."""


@dataclass(frozen=True)
class Runtime:
    """A program that runs a form."""

    format: str
    """A name in `commpress.model.export.FORMATS`: the file that it runs, or that has the values of the module."""
    needs: tuple[str, ...]
    """Packages."""
    begin: Callable[[int, str], Load]
    """Import them for a file, set the number of threads, and return how the file is loaded."""
    zeros: str
    """What it does with pruned weights, for a sentence on why they do not help."""
    integers: str = ""
    """What it does with integers, if none of them helps."""
    dense: bool = True
    """Whether a dense model has this form. If not, another form of it is compared, and calls are not timed."""
    runs_code: bool = False
    """Whether loading runs code that is in the file. Then a file that is found in a folder has to be asked for by name."""


def _torch(threads: int, path: str) -> Load:
    import torch

    torch.set_num_threads(threads)
    torch.load(path + CODE, weights_only=False)
    return lambda path: _called(torch.load(path, map_location="cpu", weights_only=False))


def _onnxruntime(threads: int, path: str) -> Load:
    import onnxruntime

    def load(path: str) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def call(inputs: list[Any]) -> list[Any]:
            found: list[Any] = session.run(None, dict(zip(names, inputs, strict=True)))
            return found

        return call

    return load


def _pt2e(threads: int, path: str) -> Load:
    import torch
    import torch._inductor.config as inductor
    import torchao.quantization.pt2e  # noqa: F401  registers the graph's operators

    torch.set_num_threads(threads)
    inductor.freezing, inductor.compile_threads = True, 1  # without frozen weights there are no integer kernels
    return lambda path: _called(torch.compile(torch.export.load(path).module()))


def _executorch(threads: int, path: str) -> Load:
    import executorch.kernels.quantized  # noqa: F401  registers operators
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime as Library

    _unsafe_reset_threadpool(threads)

    def load(path: str) -> Call:
        method = Library.get().load_program(path).load_method("forward")
        return lambda inputs: [y.numpy() for y in method.execute([torch.from_numpy(x) for x in inputs])]

    return load


def _integer(threads: int, path: str) -> Load:
    import importlib.util

    file = Path(__file__).parents[1] / "export" / "integer_run.py"  # by its file: commpress itself stays out
    spec = importlib.util.spec_from_file_location("integer_run", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["integer_run"] = found
    spec.loader.exec_module(found)

    def load(path: str) -> Call:
        program = found.load(path)
        return lambda inputs: [(program.run(program.rounded(inputs[0])) * program.output_scale).astype("float32")]

    return load


def _litert(threads: int, path: str) -> Load:
    import numpy
    from ai_edge_litert.interpreter import Interpreter

    def load(path: str) -> Call:
        it = Interpreter(path, num_threads=threads)
        it.allocate_tensors()
        takes, gives = it.get_input_details(), it.get_output_details()
        shapes = [tuple(its["shape"]) for its in takes]

        def call(inputs: list[Any]) -> list[Any]:
            if (given := [x.shape for x in inputs]) != shapes:
                for its, shape in zip(takes, given, strict=True):
                    it.resize_tensor_input(its["index"], shape)
                it.allocate_tensors()
                shapes[:] = given
            for its, x in zip(takes, inputs, strict=True):
                scale, zero = its["quantization"]
                codes = (numpy.round(x / scale) + zero).clip(-128, 127) if scale else x
                it.set_tensor(its["index"], codes.astype(its["dtype"]))
            it.invoke()
            return [it.get_tensor(its["index"]) for its in gives]

        return call

    return load


def _called(model: Any) -> Call:
    import torch
    from torch.utils._pytree import tree_leaves

    def call(inputs: list[Any]) -> list[Any]:
        with torch.no_grad():
            outputs = model(*(torch.from_numpy(x) for x in inputs))
        return [y.numpy() for y in tree_leaves(outputs) if isinstance(y, torch.Tensor)]

    return call


RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime("safetensors", (), _torch, "multiplies zeros", "computes with the floats that integers stand for"),
    "onnxruntime": Runtime("onnx", ("onnxruntime",), _onnxruntime, "multiplies zeros"),
    "pt2e": Runtime("pt2e", ("torchao",), _pt2e, "multiplies zeros", runs_code=True),
    "executorch": Runtime(
        "executorch",
        ("executorch",),
        _executorch,
        "multiplies zeros",
        "decodes integers that XNNPACK has no kernel for",
    ),
    "integer": Runtime("integer", (), _integer, "multiplies zeros", dense=False),
    "litert": Runtime("litert", ("ai_edge_litert",), _litert, "multiplies zeros"),
}


def serve(connection: Connection) -> None:
    """Do one job: load a form, and call it as often as the other end says, until that closes."""
    job = connection.recv()
    sys.path[:] = job["modules"]
    load = RUNTIMES[job["runtime"]].begin(job["threads"], job["path"])
    baseline = _begin_peak()
    call = load(job["path"])
    inputs = job["inputs"]
    seconds, peak = _timed(call, inputs), _peak()
    for _ in range(ENOUGH):
        call(inputs)
    connection.send({"seconds": seconds, "peak": _above(peak, baseline)})
    _begin_peak()
    while True:
        try:
            what, asked = connection.recv()
        except EOFError:
            return
        if what == "calls":
            busy = time.process_time()
            times = [_timed(call, inputs) for _ in range(asked)]
            connection.send((times, time.process_time() - busy))
        elif what == "outputs":
            connection.send(call(asked))
        else:
            connection.send(_above(_peak(), baseline))


def _timed(call: Call, inputs: list[Any]) -> float:
    started = time.perf_counter()
    call(inputs)
    return time.perf_counter() - started


def _begin_peak() -> int | None:
    """Forget the largest memory so far; what is resident now, in bytes. None where the system does not tell (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak() -> int | None:
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _above(peak: int | None, baseline: int | None) -> int | None:
    return None if peak is None or baseline is None else max(peak - baseline, 0)


if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
