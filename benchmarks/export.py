"""What a quantised model takes where it runs: bytes and seconds a call by format, against float32 in the same runtime.

python benchmarks/export.py onnx        # onnxruntime; or executorch; or pt2e: torch.compile with frozen weights, a minute

A GPT of 3.3 M parameters, 4 x 64 bytes of text a call, one thread; the best of some rounds, the ways in turns. The weights are
random, so the differences of logits say how exactly a runtime computes what training computed, not what int8 costs in loss.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from commpress.launch.model import GPT, Shape
from commpress.launch.run_record import machine
from commpress.model import export, quantization, ranges
from commpress.model.quantization import Quantization

SHAPE = Shape(layers=4, width=256, heads=4, context=64)
TEXT = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
WAYS = {
    "float32": None,
    "int8, static": Quantization(activations="static"),
    "int8, by token": Quantization(activations="dynamic"),
    "int8 weights": Quantization(),
    "int4 weights, groups of 32": Quantization(4, 32),
}
ROUNDS, CALLS = 15, 5


def quantised(settings: Quantization | None) -> GPT:
    """A model whose ranges are those of the text."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    if settings is not None:
        quantization.prepare(model, settings)
        quantization.enable(model)
        with torch.no_grad():
            model(TEXT)
        ranges.learn(model)
    return model


def in_onnxruntime(path: Path) -> Callable[[], Any]:
    """A call of the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: TEXT.numpy()}
    return lambda: session.run(None, given)


def compiled(path: Path) -> Callable[[], Any]:
    """A call of the file by torch's compiler."""
    import torch._inductor.config as inductor

    inductor.freezing, inductor.compile_threads = True, 1
    with torch.no_grad():
        run = torch.compile(torch.export.load(path).module())
        run(TEXT)

    def call() -> None:
        with torch.no_grad():
            run(TEXT)

    return call


def in_executorch(path: Path) -> Callable[[], Any]:
    """A call of the file."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda: method.execute([TEXT])


LOADERS = {"onnx": in_onnxruntime, "pt2e": compiled, "executorch": in_executorch}


def main() -> None:
    """Export, time and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("format", choices=LOADERS)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    load = LOADERS[chosen.format]
    calls, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in chosen.ways:
            place = Path(folder) / way
            (files[way],) = export(quantised(WAYS[way]), place, formats=(chosen.format,), example_inputs=(TEXT,))
            calls[way] = load(files[way].path)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for way, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[way] = min(best[way], (time.perf_counter() - start) / CALLS)
    table = Table(title=f"{chosen.format}, {machine(torch.device('cpu'))['processor']}")
    for name in ("", "ms a call", "faster", "MB", "smaller", "difference of logits"):
        table.add_column(name, justify="right" if name else "left")
    first = chosen.ways[0]
    for way, seconds in best.items():
        times = (f"{1e3 * seconds:.2f}", f"{best[first] / seconds:.2f}x")
        size = (f"{files[way].bytes / 1e6:.2f}", f"{files[first].bytes / files[way].bytes:.2f}x")
        table.add_row(way, *times, *size, f"{files[way].difference:.1e}")
    Console(width=110).print(table)
    last = chosen.ways[-1]
    with torch.no_grad():
        print(f"logits of float32 reach {float(quantised(None)(TEXT).abs().max()):.2f}")
    print(
        f"{last}: {best[first] / best[last]:.2f} times as fast, {files[first].bytes / files[last].bytes:.2f} times smaller"
    )


if __name__ == "__main__":
    main()
