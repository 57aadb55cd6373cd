"""Weights of torchao's kinds: integers in the place of a parameter, as torchao's own convert makes them."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from commpress.model.codes import INTEGERS, Codes, quantize


@runtime_checkable
class ConvertedWeight(Protocol):
    """A weight of torchao's kinds: integers, and a scale and a zero point for each block."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    target_dtype: torch.dtype
    block_size: tuple[int, ...]


def integers(module: Any, w: Tensor) -> Tensor:
    """Return what stands in the place of a prepared module's weight once it is converted, [rows, width]."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    settings = module.quantization
    codes = quantize(w.flatten(1), settings.bits, settings.group)
    weight: Tensor = IntxUnpackedToInt8Tensor(
        codes.values,
        codes.scale,
        torch.zeros_like(codes.scale, dtype=torch.int8),
        target_dtype=INTEGERS[settings.bits],
        block_size=(1, settings.group or codes.values.shape[1]),
        dtype=w.dtype,
        # an embedding ignores it, a Linear that shares the embedding's weight does not
        activation_quantization="int8_asym_per_token" if settings.activations == "dynamic" else None,
    )
    return weight


def converted_codes(w: Any) -> Codes | None:
    """Return the codes of a weight that `convert` or torchao's own convert made; None for any other tensor.

    Raises ValueError for what we cannot hold: other integers than 4 and 8 bits, zero points, groups over several rows.
    """
    if not isinstance(w, ConvertedWeight):
        return None
    if w.target_dtype not in INTEGERS.values() or bool(w.zero_point.any()) or w.block_size[0] != 1:
        raise ValueError(
            f"a converted weight: expected symmetric int4 or int8 with groups within rows, got "
            f"{str(w.target_dtype).removeprefix('torch.')}, groups of {tuple(w.block_size)}"
            f"{', zero points' if bool(w.zero_point.any()) else ''}"
        )
    return Codes(w.qdata, w.scale, 4 if w.target_dtype == INTEGERS[4] else 8)
