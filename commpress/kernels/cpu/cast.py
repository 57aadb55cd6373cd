"""Loops of `bf16` and `fp16`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps, values
from commpress.kernels.cpu.blocks import LARGEST, block_of, part_of, put, put_block, real, room_for

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""
CAST_BLOCK = 1024


@part
def _cast_block(x, residual, halves):
    for j in range(x.size):
        value = x[j]
        put(halves, j, value)
        if residual is not None:
            lost = value - real(halves[j])
            residual[j] = lost if np.abs(lost) <= LARGEST else residual[j]  # not NaN, not Inf


@loop
def cast_encode(x, prologue, residual, halves):
    """The 16-bit floats of x + residual; the residual becomes what they miss."""
    scratch = np.empty(CAST_BLOCK, np.float32)
    for b in range((x.size + CAST_BLOCK - 1) // CAST_BLOCK):
        o = b * CAST_BLOCK
        xb, rb = block_of(x, prologue, residual, o, CAST_BLOCK, scratch), part_of(residual, o, CAST_BLOCK)
        _cast_block(xb, rb, halves[o : o + CAST_BLOCK])


@loop
def cast_mean(halves, W, row, out):
    """The mean of W payloads of `row` 16-bit floats each."""
    share = np.float32(1.0 / W)
    scratch = np.empty(CAST_BLOCK, np.float32)
    for b in range((out.size + CAST_BLOCK - 1) // CAST_BLOCK):  # a block's sum stays in the L1 cache
        o = b * CAST_BLOCK
        ob = room_for(out, o, CAST_BLOCK, scratch)
        for w in range(W):
            hb = halves[w * row + o : w * row + o + ob.size]
            if w:
                for j in range(ob.size):
                    ob[j] += real(hb[j]) * share
            else:
                for j in range(ob.size):
                    ob[j] = real(hb[j]) * share
        put_block(out, o, ob)


HALVES = {"bf16": np.uint16, "fp16": np.int16}
"""By which type of integers the loops tell them apart."""


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    cast_encode(values(x), steps(prologue), floats(residual), padded(payload).view(HALVES[codec.word]))


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    halves = payloads.numpy().view(HALVES[codec.word])
    cast_mean(halves, count, codec.nbytes(out.numel()) // 2, values(out))
