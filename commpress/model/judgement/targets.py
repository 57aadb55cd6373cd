"""Targets: which of a model's kinds of weights have kernels where. Facts of their documents, not measured here.

x86, onnxruntime     onnxruntime.ai/docs/performance/model-optimizations/quantization.html; docs/export.md has measurements
x86, torch.compile   docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_x86_inductor.html; docs/export.md likewise
Arm, XNNPACK         docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html: 8 bits with static and
                     dynamic inputs, 4 with dynamic ones, "Weight-only quantization is not currently supported"; zeros:
                     "Sparse inference" in tensorflow/lite/delegates/xnnpack/README.md (arXiv:1911.09723)
integers only        github.com/ARM-software/CMSIS-NN, README, and its int8 specification,
                     ai.google.dev/edge/litert/models/quantization_spec: one scale for all inputs, one a row of weights
"""

from collections.abc import Iterable

from commpress.model.export import FORMATS
from commpress.model.judgement.forms import Side
from commpress.model.judgement.runtimes import RUNTIMES

INTEGER = "integer kernels"
TARGETS: dict[str, dict[str, str]] = {
    "x86, onnxruntime": {
        "float32": "float kernels",
        "int8 static": INTEGER,
        "int8 dynamic": INTEGER,
        "int8 weights": "decoded, or int8 by its own choice",
        "int8 weights in groups": "decoded, or int8 by its own choice",
        "int4 weights": "decoded, or int8 by its own choice",
        "int4 weights in groups": "decoded, or int8 by its own choice",
    },
    "x86, torch.compile": {
        "float32": "float kernels",
        "int8 static": f"{INTEGER}, once weights are frozen",
        "int8 dynamic": "decoded to floats",
        "int8 weights": "decoded to floats",
        "int8 weights in groups": "decoded to floats",
        "int4 weights": "decoded to floats",
        "int4 weights in groups": "decoded to floats",
    },
    "Arm, XNNPACK (ExecuTorch, LiteRT)": {
        "float32": "float kernels",
        "int8 static": INTEGER,
        "int8 dynamic": INTEGER,
        "int4 dynamic": INTEGER,
        "int4 dynamic in groups": INTEGER,
        "zeros": "1x1 convolutions of CNNs in LiteRT alone",
    },
    "integers only (CMSIS-NN)": {
        "int8 static": INTEGER,
        "int4 static": INTEGER,
    },
}
"""By target and kind of weights what there is. What is not listed has none."""


TAKES = {
    "x86, onnxruntime": "onnx",
    "x86, torch.compile": "pt2e",
    "Arm, XNNPACK (ExecuTorch, LiteRT)": "executorch",
    "integers only (CMSIS-NN)": "integer",
}
"""By target the format of the files that it takes."""


def forms(side: Side) -> list[dict[str, str]]:
    """A row for each target: the file that it takes, and whether a model has it."""
    rows = []
    for target, name in TAKES.items():
        runtime = next(each for each, of in RUNTIMES.items() if of.format == name)
        there = f"{side.forms[runtime].bytes / 1e6:.2f} MB" if runtime in side.forms else ""
        state = there or side.left_out.get(runtime, "not asked for")
        rows.append({"target": target, "file": FORMATS[name].FILE, "state": state})
    return rows


def kernels(kinds: Iterable[str]) -> list[dict[str, str]]:
    """A row for each target and kind."""
    return [
        {"target": target, "kind": kind, "kernels": known.get(kind, "none")}
        for target, known in TARGETS.items()
        for kind in kinds
    ]
