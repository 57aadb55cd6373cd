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
    if not quantization.is_prepared(model):
        _prepare(model, stored, integers)
    _require_same(model, stored, integers)
    ranges = {}
    for name, of_buffer in model.named_buffers(remove_duplicate=False):
        module = name.removesuffix(".range").rpartition(".")[0]
        if name.endswith(".range") and module in stored.ranges:
            ranges[name] = torch.tensor(stored.ranges[module], dtype=of_buffer.dtype, device=of_buffer.device)
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


def _prepare(model: nn.Module, stored: Stored, integers: dict[str, Codes]) -> None:
    """Fake quantisers as the file's model had them. Those that share a weight had the same."""
    static = {id(codes) for name, codes in integers.items() if _owner(model, name) in stored.ranges}
    of: dict[str, tuple[int, int | None, Activations | None]] = {}
    for name, codes in integers.items():
        groups, owner = codes.scale.shape[1], _owner(model, name)
        group = of[owner][1] if groups == 1 and owner in of else None
        group = codes.values.shape[1] // groups if groups > 1 else group
        of[owner] = codes.bits, group, "static" if id(codes) in static else None
    chosen = defaultdict(list)
    for owner, how in of.items():
        chosen[how].append(escape(owner))
    for (bits, group, inputs), names in chosen.items():
        quantization.prepare(model, Quantization(bits, group, inputs, tuple(names)))


def _require_same(model: nn.Module, stored: Stored, integers: dict[str, Codes]) -> None:
    here = {name: settings for name, _, settings in quantization.prepared(model)}
    if wrong := sorted(here.keys() ^ {_owner(model, name) for name in integers}):
        where = "model" if wrong[0] in here else "file"
        raise ValueError(f"restore: {wrong[0]!r} has integers only in the {where}")
    for name, codes in integers.items():
        its, width, groups = here[_owner(model, name)], codes.values.shape[1], codes.scale.shape[1]
        if (its.bits, width // (its.group or width)) != (codes.bits, groups):
            raise ValueError(
                f"restore: {name!r} is prepared with {its.bits} bits and groups of {its.group or width}, the file has "
                f"{codes.bits} bits and groups of {width // groups}"
            )
    static = {name for name, module in model.named_modules() if quantizer_of(module) is not None}
    if wrong := sorted(static ^ stored.ranges.keys()):
        where = "model" if wrong[0] in static else "file"
        raise ValueError(f"restore: {wrong[0]!r} has a range of inputs only in the {where}")


def _owner(model: nn.Module, name: str) -> str:
    """The module that computes with a weight: an attention with that of its `out_proj`, which is never called."""
    owner = name.rpartition(".")[0]
    above = owner.rpartition(".")[0]
    try:
        return above if isinstance(model.get_submodule(above), nn.MultiheadAttention) else owner
    except AttributeError:
        raise ValueError(f"restore: the file has {name!r}, the model has no {above!r}") from None
