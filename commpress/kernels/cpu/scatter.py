"""Loops that write single values into a gradient of zeros."""

import numpy as np

from commpress.kernels.compiled import loop
from commpress.kernels.cpu.blocks import put_block
from commpress.kernels.cpu.instructions import settle_streams

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
ZEROS = 256


@loop
def fill_zeros(out, begin, end):
    """out := 0, from block `begin` to `end`."""
    zeros = np.zeros(ZEROS, np.float32)
    for b in range(begin, end):
        o = b * ZEROS
        put_block(out, o, zeros, min(ZEROS, out.size - o))
    settle_streams()


@loop
def scatter_add(index, value, share, out):
    """out[index] += value * share; a position beyond `out` is skipped."""
    n = out.size
    for i in range(index.size):
        if index[i] < n:
            out[index[i]] += value[i] * share
