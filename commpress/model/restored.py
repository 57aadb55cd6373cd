"""A stored model (`stored.py`) as a module that computes with its integers: what `quantization.convert` leaves of training.

Weights are the file's codes and scales, bit for bit, and static inputs are rounded by the file's ranges. A file does not say
which inputs training rounded by token: prepare the model as the recipe did, and they are.
"""

from collections import defaultdict
from glob import escape

import torch
from torch import nn

from commpress.model import quantization
from commpress.model.codes import Codes
from commpress.model.quantization import Activations, Quantization
from commpress.model.ranges import quantizer_of
from commpress.model.stored import Stored


@torch.no_grad()
def restore(model: nn.Module, stored: Stored) -> nn.Module:
    """Give a model, plain or prepared, the content of a file, in place; return it.

    What the file has as integers is integers from here on, so the model trains no more. Raises ValueError if the model is
    prepared otherwise than the file's was, RuntimeError, torch's own, if the file has other tensors; then it is of no use.
    """
    integers = stored.integers | {
        name: stored.integers[first] for name, first in stored.shared.items() if first in stored.integers
    }
    modules = {name.rpartition(".")[0]: codes for name, codes in integers.items()}
    if not quantization.is_prepared(model):
        _prepare(model, stored, modules)
    _require_same(model, stored, modules)
    ranges = {}
    for name, of_buffer in model.named_buffers(remove_duplicate=False):
        module = name.removesuffix(".range").rpartition(".")[0]
        if name.endswith(".range") and module in stored.ranges:
            ranges[name] = torch.tensor(stored.ranges[module], dtype=of_buffer.dtype)
    model.load_state_dict(stored.state_dict() | ranges)
    if not integers:
        return model
    quantization.convert(model)
    for name, codes in integers.items():
        place = quantization.converted_codes(model.get_parameter(name))
        assert place is not None  # `convert` made it
        place.values.copy_(codes.values)
        place.scale.copy_(codes.scale)
    return model


def _prepare(model: nn.Module, stored: Stored, modules: dict[str, Codes]) -> None:
    """Fake quantisers as the file's model had them. Those that share a weight had the same."""
    static = {id(codes) for name, codes in modules.items() if name in stored.ranges}
    chosen = defaultdict(list)
    for name, codes in modules.items():
        inputs: Activations | None = "static" if id(codes) in static else None
        chosen[codes.bits, _group(codes), inputs].append(escape(name))
    for (bits, group, inputs), names in chosen.items():
        quantization.prepare(model, Quantization(bits, group, inputs, tuple(names)))


def _require_same(model: nn.Module, stored: Stored, modules: dict[str, Codes]) -> None:
    here = {name: (its.bits, its.group) for name, _, its in quantization.prepared(model)}
    there = {name: (codes.bits, _group(codes)) for name, codes in modules.items()}
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            where = "model" if name in here else "file"
            raise ValueError(f"restore: {name!r} has integers in the {where} alone")
        width = modules[name].values.shape[1]
        (bits, group), (of_bits, of_group) = here[name], there[name]
        if (bits, group or width) != (of_bits, of_group or width):
            raise ValueError(
                f"restore: {name!r} is prepared with {bits} bits and groups of {group or width}, the file has {of_bits} "
                f"bits and groups of {of_group or width}"
            )
    static = {name for name, module in model.named_modules() if quantizer_of(module) is not None}
    if wrong := sorted(static ^ stored.ranges.keys()):
        raise ValueError(
            f"restore: {wrong[0]!r} has a range of inputs in the {'model' if wrong[0] in static else 'file'} alone"
        )


def _group(codes: Codes) -> int | None:
    groups = codes.scale.shape[1]
    return None if groups == 1 else codes.values.shape[1] // groups
