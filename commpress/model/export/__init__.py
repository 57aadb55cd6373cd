"""A compressed model in a form that its target runs: one call, one file a format.

    safetensors   model.safetensors   commpress reads it (`stored.py`)
    onnx          model.onnx          onnxruntime, and what else reads ONNX
    pt2e          model.pt2           PyTorch: `torch.export.load`, `torch.compile`
    executorch    model.pte           ExecuTorch's runtime, with XNNPACK
    litert        model.tflite        LiteRT's interpreter, formerly TensorFlow Lite
    integer       integer.safetensors a device without floats, and NumPy (`integer_run.py`)
    torchao       transformers/       Transformers: `from_pretrained`

A new format is a module with FILE, `write` and `run`, and a line in FORMATS; packages of its own go into NEEDS.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from commpress import extras
from commpress.model import layers
from commpress.model.export import executorch, integer, litert, onnx, pt2e, record, safetensors, torchao
from commpress.model.export.parts import batch_shapes, evaluated, require_exportable, tensors_of
from commpress.model.export.record import Exported

__all__ = ["FORMATS", "NEEDS", "WITHOUT_PRUNED", "Exported", "export", "require"]

FORMATS: dict[str, ModuleType] = {
    "safetensors": safetensors,
    "onnx": onnx,
    "pt2e": pt2e,
    "executorch": executorch,
    "litert": litert,
    "integer": integer,
    "torchao": torchao,
}
"""By name: a module with FILE, `write(path, model, inputs, shapes)` and `run(path, model, inputs)`."""

WITHOUT_PRUNED = ("safetensors", "onnx")
"""Formats whose files have no pruned weights; all others have them as zeros."""
NEEDS = {
    "onnx": ("export", ("onnxruntime", "onnxscript")),
    "executorch": ("executorch", ("executorch",)),
    "litert": ("litert", ("litert_torch",)),
    "torchao": ("transformers", ("transformers",)),
}
"""By format the extra that installs what it needs beyond commpress.model, and the packages."""


def require(formats: Sequence[str]) -> None:
    """Raise ModuleNotFoundError that names the extra if a package that one of the formats needs is not installed."""
    for name in formats:
        extra, packages = NEEDS.get(name, ("", ()))
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise extras.missing(f"export to {name}", ModuleNotFoundError(name=package), extra)


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    formats: Sequence[str],
    example_inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
) -> list[Exported]:
    """Write `model` to `folder`, one file a format, and return what was written. The model stays as it is. export.json beside
    the files has the same, and their SHA-256, which `commpress.model.export.record.check` compares.

    `model` is plain, or prepared for quantisation, or converted; on the CPU, whole, in float32. The file computes what the
    model does in evaluation with its quantisers on. `example_inputs` are the model's positional arguments. Without
    `dynamic_shapes`, which are torch.export's, the first dimension of the inputs stays free, and all others are fixed.

    Raises ValueError, before anything is written, for an unknown format, a model that cannot be exported or inputs of one row;
    ValueError for what one format does not take, when those before it are written; ModuleNotFoundError that names the extra
    for a missing package; what torch.export raises for a model that it cannot trace.
    """
    if isinstance(formats, str) or not formats or (unknown := [name for name in formats if name not in FORMATS]):
        got = formats if isinstance(formats, str) or not formats else unknown[0]
        raise ValueError(f"export(formats={got!r}): expected some of {', '.join(FORMATS)}, as in formats=('onnx',)")
    if not isinstance(example_inputs, tuple):
        raise ValueError(f"export(example_inputs): expected a tuple, got {type(example_inputs).__name__}")
    model, folder = layers.uncompiled(model), Path(folder)
    require_exportable(model)
    shapes = batch_shapes(example_inputs) if dynamic_shapes is None else dynamic_shapes
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in dict.fromkeys(formats):
        to = FORMATS[name]
        path = folder / to.FILE
        record.forget(folder, name)
        with evaluated(model):
            expected = tensors_of(model(*example_inputs))
            to.write(path, model, example_inputs, shapes)
            found = tensors_of(to.run(path, model, example_inputs))
        pairs = zip(expected, found, strict=True)
        difference = max((_difference(y, z) for y, z in pairs if y.numel()), default=0.0)
        written.append(Exported(name, path, _size(path), difference, record.sums(path)))
        record.keep(folder, type(model).__name__, written[-1:])
    return written


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else path.stat().st_size


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
