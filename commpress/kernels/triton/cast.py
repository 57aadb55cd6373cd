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
def _encode_part(x, prologue, residual, coded, n, at, WHOLE: tl.constexpr, BF16: tl.constexpr):
    inside = None if WHOLE else at < n
    value = total(x, prologue, residual, at, inside)
    word = _word(value, BF16)
    write(coded + at, word, inside)
    if residual is not None:
        keep_lost(residual, at, value - _float(word, BF16), inside)


@counting
def _encode(x, prologue, residual, coded, n, BF16: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _encode_part(x, prologue, residual, coded, n, at, True, BF16)
    else:
        _encode_part(x, prologue, residual, coded, n, at, False, BF16)


@triton.jit
def _mean_part(coded, W, row, out, n, at, share, WHOLE: tl.constexpr, WORDS: tl.constexpr, BF16: tl.constexpr):
    """The mean of W payloads at values `at`; rows are multiples of WORDS words."""
    inside = None if WHOLE else at < n
    mean = _float(tl.load(coded + at, inside), BF16) * share
    for w in range(1, W):
        start = row_start(w, row // WORDS) * WORDS
        mean += _float(tl.load(coded + 2 * start + at, inside), BF16) * share
    write(out + at, mean, inside)


@counting
def _mean(coded, W, row, out, n, share, BF16: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE > n:
        _mean_part(coded, W, row, out, n, at, share, False, 1, BF16)
    elif row % 4 == 0:  # then all rows are read 16 bytes at once
        _mean_part(coded, W, row, out, n, at, share, True, 4, BF16)
    else:
        _mean_part(coded, W, row, out, n, at, share, True, 1, BF16)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    n, coded = x.numel(), padded(payload).view(torch.int16)
    half = codec.sum_dtype is torch.bfloat16
    launch(_encode, triton.cdiv(n, SIZE), x, steps(prologue), residual, coded, n, BF16=half, SIZE=SIZE)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    n, coded = out.numel(), payloads.view(torch.int16)
    half, row = codec.sum_dtype is torch.bfloat16, codec.nbytes(out.numel()) // 4
    launch(_mean, triton.cdiv(n, SIZE), coded, count, row, out, n, 1.0 / count, BF16=half, SIZE=SIZE)
