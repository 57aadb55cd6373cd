"""What a quantised model takes where it runs: bytes and seconds a call by format, against float32 in the same runtime.

python benchmarks/export.py onnx        # onnxruntime; or executorch; or pt2e: torch.compile with frozen weights, a minute
python benchmarks/export.py onnx --model convolutions

A GPT of 3.3 M parameters, 4 x 64 bytes of text a call, or six convolutions with batch norms, 1.1 M parameters, 4 pictures of
32 x 32 a call; one thread; the best of some rounds, the ways in turns. The weights are random, so the differences of logits say
how exactly a runtime computes what training computed, not what int8 costs in loss.
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
from torch import Tensor, nn

from commpress.launch.model import GPT, Shape
from commpress.launch.run_record import machine
from commpress.model import export, quantization, ranges
from commpress.model.quantization import Quantization

SHAPE = Shape(layers=4, width=256, heads=4, context=64)
TEXT = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WAYS = {
    "float32": None,
    "int8, static": Quantization(activations="static"),
    "int8, by token": Quantization(activations="dynamic"),
    "int8 weights": Quantization(),
    "int4 weights": Quantization(4),
    "int4 weights, groups of 32": Quantization(4, 32),
}
OF_TEXT = ["float32", "int8, static", "int8, by token", "int8 weights", "int4 weights, groups of 32"]
OF_PICTURES = ["float32", "int8, static", "int8 weights", "int4 weights"]
ROUNDS, CALLS = 15, 5


def convolutions() -> nn.Module:
    """3 to 64, 128 and 256 channels, two convolutions each."""

    def part(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    widths = [(3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    parts = [module for each in widths for module in part(*each)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def quantised(make: Callable[[], nn.Module], inputs: Tensor, settings: Quantization | None) -> nn.Module:
    """A model whose ranges, and statistics of batch norms, are those of the inputs."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for _ in range(3):
            model(inputs)
        if settings is not None:
            quantization.prepare(model, settings)
            quantization.enable(model)
            model(inputs)
            ranges.learn(model)
    return model


def in_onnxruntime(path: Path, inputs: Tensor) -> Callable[[], Any]:
    """A call of the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, given)


def compiled(path: Path, inputs: Tensor) -> Callable[[], Any]:
    """A call of the file by torch's compiler."""
    import torch._inductor.config as inductor

    inductor.freezing, inductor.compile_threads = True, 1
    with torch.no_grad():
        run = torch.compile(torch.export.load(path).module())
        run(inputs)

    def call() -> None:
        with torch.no_grad():
            run(inputs)

    return call


def in_executorch(path: Path, inputs: torch.Tensor) -> Callable[[], Any]:
    """A call of the file."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda: method.execute([inputs])


LOADERS = {"onnx": in_onnxruntime, "pt2e": compiled, "executorch": in_executorch}


def main() -> None:
    """Export, time and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("format", choices=LOADERS)
    options.add_argument("--model", choices=("gpt", "convolutions"), default="gpt")
    options.add_argument("--ways", nargs="+", choices=WAYS)
    chosen = options.parse_args()
    of_text = chosen.model == "gpt"
    make, inputs = (lambda: GPT(SHAPE), TEXT) if of_text else (convolutions, PICTURES)
    ways = chosen.ways or (OF_TEXT if of_text else OF_PICTURES)
    torch.set_num_threads(1)
    load = LOADERS[chosen.format]
    calls, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            model = quantised(make, inputs, WAYS[way])
            (files[way],) = export(model, Path(folder) / way, formats=(chosen.format,), example_inputs=(inputs,))
            calls[way] = load(files[way].path, inputs)
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
    first = ways[0]
    for way, seconds in best.items():
        times = (f"{1e3 * seconds:.2f}", f"{best[first] / seconds:.2f}x")
        size = (f"{files[way].bytes / 1e6:.2f}", f"{files[first].bytes / files[way].bytes:.2f}x")
        table.add_row(way, *times, *size, f"{files[way].difference:.1e}")
    Console(width=110).print(table)
    last = ways[-1]
    with torch.no_grad():
        reached = quantised(make, inputs, None).eval()(inputs).abs().max()
    print(f"logits of float32 reach {float(reached):.2f}")
    print(
        f"{last}: {best[first] / best[last]:.2f} times as fast, {files[first].bytes / files[last].bytes:.2f} times smaller"
    )


if __name__ == "__main__":
    main()
