"""Kernels of `bf16` and `fp16`. The layout is in `comm/codecs/cast.py`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import (
    INFINITY_BITS,
    bfloat16_bits,
    keep_lost,
    magnitude_bits,
    remembered,
    row_start,
    total,
    write,
)
from commpress.kernels.triton.launch import counting, launch, padded, steps

SIZE = 1024


@triton.jit
def _float(word, BF16: tl.constexpr):
    """The float32 of 16 bits."""
    if BF16:
        return (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word(value, BF16: tl.constexpr):
    """The 16 bits of a float32, rounded half to even; of NaN the one that is sent."""
    if BF16:
        return bfloat16_bits(value)
    else:
        half = value.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(magnitude_bits(value) > INFINITY_BITS, 0x7E00, half).to(tl.int16)


@triton.jit
def _put(value, residual, coded, at, inside, BF16: tl.constexpr):
    """Encode values; write the error to `residual`."""
    word = _word(value, BF16)
    write(coded + at, word, inside)
    if residual is not None:
        keep_lost(residual, at, value - _float(word, BF16), inside)


@counting
def _encode(x, prologue, residual, coded, n, BF16: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _put(total(x, prologue, residual, at, None), residual, coded, at, None, BF16)
    else:
        inside = at < n
        _put(total(x, prologue, residual, at, inside), residual, coded, at, inside, BF16)


@triton.jit
def _mean_part(
    coded, W, row, share, residual, after, out, at, inside, WORDS: tl.constexpr, BF16: tl.constexpr
):  # fmt: skip
    """The mean of W payloads at values `at`, written to `out` or encoded to `after`; rows are multiples of WORDS words."""
    mean = _float(tl.load(coded + at, inside), BF16) * share
    for w in range(1, W):
        start = row_start(w, row // WORDS) * WORDS
        mean += _float(tl.load(coded + 2 * start + at, inside), BF16) * share
    if out is not None:
        write(out + at, mean, inside)
    else:
        _put(remembered(mean, residual, at, inside), residual, after, at, inside, BF16)


@counting
def _mean(coded, W, row, share, residual, after, out, n, BF16: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE > n:
        _mean_part(coded, W, row, share, residual, after, out, at, at < n, 1, BF16)
    elif row % 4 == 0:  # then all rows are read 16 bytes at once
        _mean_part(coded, W, row, share, residual, after, out, at, None, 4, BF16)
    else:
        _mean_part(coded, W, row, share, residual, after, out, at, None, 1, BF16)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    n, coded = x.numel(), padded(payload).view(torch.int16)
    launch(_encode, triton.cdiv(n, SIZE), x, steps(prologue), residual, coded, n, BF16=_bfloat16(codec), SIZE=SIZE)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    _launch_mean(codec, payloads, out.numel(), count, None, None, out)


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    _launch_mean(codec, payloads, n, count, residual, padded(payload).view(torch.int16), None)


def _launch_mean(codec: Any, payloads: Tensor, n: int, count: int, *results: Tensor | None) -> None:
    source = payloads.view(torch.int16), count, codec.nbytes(n) // 4, 1.0 / count
    launch(_mean, triton.cdiv(n, SIZE), *source, *results, n, BF16=_bfloat16(codec), SIZE=SIZE)


def _bfloat16(codec: Any) -> bool:
    return bool(codec.sum_dtype is torch.bfloat16)
