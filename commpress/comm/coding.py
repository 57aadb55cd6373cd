"""The operations of a codec, on any device: encode with feedback and prologue, mean, recode, clear.

Each checks its arguments, then asks the table of kernels (`commpress/kernels/table.py`); without an entry for the codec and
the device the codec's definition runs, which gives the same bytes.
"""

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commpress.comm import factors
from commpress.comm.prologue import Ahead, Prologue
from commpress.kernels.table import compiles_by_place, lookup

if TYPE_CHECKING:
    from commpress.comm.codecs.base import Codec

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WARM_UP_VALUES = 3000
"""A number of values with full blocks and a tail for every codec."""


def encode(
    codec: "Codec",
    x: Tensor,
    residual: Tensor | None = None,
    prologue: Prologue | Ahead | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Encode `x` ([n], any float dtype), or `x + residual` with error feedback; the payload is uint8 [nbytes(n)].

    `residual` (float32 [n]) becomes the error of the payload, and does not change where the payload decodes to NaN or
    Inf, so that one bad gradient cannot spoil it. `out` takes the payload. With a `prologue` its result for x is encoded,
    and x is undefined afterwards.
    Raises TypeError for a dtype that is not a float, ValueError for a wrong shape.
    """
    _require_values(x, "x")
    n = x.numel()
    if residual is not None:
        _require_values(residual, "residual", n, torch.float32)
    if prologue is not None:
        for name, tensor in prologue.tensors.items():
            _require_values(tensor, f"prologue.{name}", n, torch.float32)
        if not prologue.fits(codec, x):
            raise ValueError(f"{codec} cannot apply this {type(prologue).__name__} as it encodes: apply it to x before")
    payload = torch.empty(codec.nbytes(n), dtype=torch.uint8, device=x.device) if out is None else out
    _require_payload(payload, codec, n)
    if n:
        _encode(codec, x.detach(), residual, prologue, payload)
    return payload


def mean(codec: "Codec", payloads: Tensor, n: int, count: int, out: Tensor | None = None) -> Tensor:
    """Return the mean of `count` payloads, one after the other: the sum over r of decode(payload r) / count.

    Into `out` ([n], any float dtype) if given, else new float32. The order of the sum is fixed, so the bytes of the mean
    depend only on the payloads. Raises ValueError or TypeError for payloads or an `out` that do not fit.
    """
    _require_payload(payloads, codec, n, count)
    result = torch.empty(n, dtype=torch.float32, device=payloads.device) if out is None else out
    _require_values(result, "out", n)
    if n:
        _mean(codec, payloads, count, result)
    return result


def fuses_recode(codec: "Codec", device: torch.device) -> bool:
    """Return whether there is a loop that encodes a mean which it never stores."""
    return lookup("recode", codec.word, device.type) is not None


def recode(
    codec: "Codec",
    payloads: Tensor,
    n: int,
    count: int,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    between: Tensor | None = None,
) -> Tensor:
    """`encode(codec, mean(codec, payloads, n, count), residual, out=out)` in one step: the middle of `two_shot`.

    `between` (float32 [n]) takes the mean where no loop does both (`fuses_recode`); without it, new memory does.
    """
    _require_payload(payloads, codec, n, count)
    if residual is not None:
        _require_values(residual, "residual", n, torch.float32)
    payload = torch.empty(codec.nbytes(n), dtype=torch.uint8, device=payloads.device) if out is None else out
    _require_payload(payload, codec, n)
    if n == 0:
        return payload
    if kernel := lookup("recode", codec.word, payloads.device.type):
        kernel(codec, payloads, n, count, residual, payload)
        return payload
    if between is None:
        between = torch.empty(n, dtype=torch.float32, device=payloads.device)
    _require_values(between, "between", n, torch.float32)
    _mean(codec, payloads, count, between)
    _encode(codec, between, residual, None, payload)
    return payload


def clear(codec: "Codec", payload: Tensor, values: Tensor) -> None:
    """Set `values` (float32 [n]) to 0 at the places that the payload of n values names.

    The payload of a codec that is not sparse names no places: then nothing is cleared.
    Raises ValueError for a wrong shape, TypeError for a wrong dtype.
    """
    n = values.numel()
    _require_values(values, "values", n, torch.float32)
    _require_payload(payload, codec, n)
    if not codec.sparse or n == 0:
        return
    if kernel := lookup("clear", codec.word, values.device.type):
        kernel(codec, payload, values)
        return
    index = codec.define_positions(payload, n)
    if index.numel():
        values[index] = 0
    else:  # it names all of them
        values.zero_()


def warm_up(codec: "Codec", device: torch.device, dtype: torch.dtype = torch.float32, prologue: bool = False) -> None:
    """Compile a codec's kernels now, not in the middle of the first step.

    `dtype` is that of the gradients; with `prologue`, the kernels for one are compiled, too. Triton compiles anew for tensors
    that begin at no multiple of 16 bytes: a payload behind another (`randomk` has its values 8 bytes behind its start), chunks
    of a gradient and of its residual anywhere.
    """
    if not codec.flat:
        factors.warm_up(device)
        return
    n, nbytes = WARM_UP_VALUES, codec.nbytes(WARM_UP_VALUES)
    values = torch.linspace(-1, 1, n + 1, dtype=torch.float32, device=device)
    by_triton = compiles_by_place(device)
    for start, x_at, kept_at in product((0, 4, 8), (0, 1), (0, 1)) if by_triton else [(0, 0, 0)]:
        x, out = values.to(dtype, copy=True)[x_at:][:n], torch.empty(n + 1, dtype=dtype, device=device)[x_at:][:n]
        residual, inverse = torch.zeros_like(values)[kept_at:][:n], values.clone()[kept_at:][:n]
        payload = torch.empty(start + nbytes, dtype=torch.uint8, device=device)[start:]
        encode(codec, x, out=payload)
        encode(codec, x, residual, out=payload)
        if prologue or by_triton:  # on CPU those who clear have a prologue
            clear(codec, payload, residual)
        if prologue:
            update = Prologue(inverse, inverse, 1.0, 0.5, 0.5)
            encode(codec, x, residual, update, out=payload)
            update.apply(values.clone()[x_at:][:n])
            move = Ahead(inverse, 0.5)
            if not by_triton and move.fits(codec, x):
                encode(codec, x, residual, move, out=payload)
        payloads = torch.empty(start + 2 * nbytes, dtype=torch.uint8, device=device)[start:]
        payloads.view(2, nbytes).copy_(payload)
        recode(codec, payloads, n, 2, residual, out=payload)
        recode(codec, payloads, n, 2, out=payload)
        mean(codec, payloads, n, 2, out)


# --- the definitions ----------------------------------------------------------------------------------------------


def defined_encode(codec: "Codec", x: Tensor, residual: Tensor | None, payload: Tensor) -> None:
    """`encode` of float32 [n] by the definition: the oracle of all kernels."""
    total = x if residual is None else x + residual
    payload.copy_(codec.define_encode(total))
    if residual is not None:
        lost = total - codec.define_decode(payload, x.numel())
        residual.copy_(torch.where(lost.isfinite(), lost, residual))


def defined_mean(codec: "Codec", payloads: Tensor, n: int, count: int) -> Tensor:
    """`mean` by the definition, float32 [n]: the oracle of all kernels."""
    return codec.define_mean(payloads, n, count)


# --- after the checks ---------------------------------------------------------------------------------------------


def _encode(
    codec: "Codec", x: Tensor, residual: Tensor | None, prologue: Prologue | Ahead | None, payload: Tensor
) -> None:
    if kernel := lookup("encode", codec.word, x.device.type):
        kernel(codec, x if kernel.takes(x) else x.to(torch.float32), residual, prologue, payload)
        return
    values = x.to(torch.float32)
    if prologue is not None:
        prologue.apply(values)
    defined_encode(codec, values, residual, payload)


def _mean(codec: "Codec", payloads: Tensor, count: int, out: Tensor) -> None:
    kernel = lookup("mean", codec.word, payloads.device.type)
    if kernel is None:
        out.copy_(defined_mean(codec, payloads, out.numel(), count))
    elif kernel.takes(out):
        kernel(codec, payloads, count, out)
    else:
        values = torch.empty(out.numel(), dtype=torch.float32, device=payloads.device)
        kernel(codec, payloads, count, values)
        out.copy_(values)


def _require_values(x: Tensor, name: str, n: int | None = None, dtype: torch.dtype | None = None) -> None:
    if x.dtype not in FLOAT_DTYPES or (dtype is not None and x.dtype != dtype):
        wanted = dtype or "one of " + ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} has dtype {x.dtype}, expected {wanted}")
    if x.dim() != 1 or not x.is_contiguous() or (n is not None and x.numel() != n):
        wanted = "a contiguous 1-D tensor" + ("" if n is None else f" of {n} values")
        raise ValueError(f"{name} has shape {tuple(x.shape)} and stride {x.stride()}, expected {wanted}")


def _require_payload(payload: Tensor, codec: "Codec", n: int, count: int = 1) -> None:
    if n < 0:
        raise ValueError(f"{codec}: the number of values must not be negative, got {n}")
    if count < 1:
        raise ValueError(f"{codec}: the number of payloads must be at least 1, got {count}")
    size = count * codec.nbytes(n)
    if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != size or not payload.is_contiguous():
        raise ValueError(
            f"{codec}: {count} payload(s) of {n} values are a contiguous 1-D uint8 tensor of {size} bytes, "
            f"got {payload.dtype} of shape {tuple(payload.shape)}"
        )
