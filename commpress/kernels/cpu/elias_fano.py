"""Loops that code ascending positions (Elias 1974; Fano 1971)."""

import numpy as np

from commpress.kernels.compiled import loop
from commpress.kernels.cpu.blocks import ONES, PLACES

BLOCKS_SHA256 = "a92df2e0d3695fec"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""


@loop
def ef_encode(index, low_bits, low, high):
    """Elias-Fano of ascending positions: `low_bits` of each packed in `low`, the rest unary in `high` (both zeroed).
    A byte is gathered in a register: in memory, each of its bits would wait for the one before."""
    mask = (np.int64(1) << low_bits) - 1
    store, filled, at = np.uint64(0), np.int64(0), np.int64(0)
    unary, byte = np.int64(0), np.int64(0)
    for i in range(index.size):
        p = index[i]
        if low_bits:
            store |= np.uint64(p & mask) << np.uint64(filled)
            filled += low_bits
            while filled >= 8:
                low[at] = np.uint8(store & np.uint64(255))
                store >>= np.uint64(8)
                filled -= 8
                at += 1
        bit = (p >> low_bits) + i
        if bit >> 3 != byte:
            high[byte] = np.uint8(unary)
            unary, byte = np.int64(0), bit >> 3
        unary |= np.int64(1) << (bit & 7)
    high[byte] = np.uint8(unary)
    if filled:
        low[at] = np.uint8(store & np.uint64(255))


@loop
def ef_decode(low_bits, low, high, index):
    """Positions back from Elias-Fano; returns how many there are, fills `index` and no more."""
    k = index.size
    i = np.int64(0)
    for byte in range(high.size):
        v = high[byte]
        if i + 8 <= k:  # eight are written, those of the bits that are set count
            first, ones = 8 * byte - i, PLACES[v]
            eight = index[i : i + 8]
            for j in range(8):
                eight[j] = (first - j + np.int64((ones >> np.uint64(8 * j)) & np.uint64(255))) << low_bits
            i += np.int64(ONES[v])
        elif v:
            for bit in range(8):
                if i < k:
                    index[i] = (byte * 8 + bit - i) << low_bits
                    i += np.int64((v >> np.uint8(bit)) & np.uint8(1))
    mask = np.uint64((np.int64(1) << low_bits) - 1)
    store, filled, at = np.uint64(0), np.int64(0), np.int64(0)
    for j in range(k):
        while filled < low_bits:
            store |= np.uint64(low[at]) << np.uint64(filled)
            filled += 8
            at += 1
        index[j] += np.int64(store & mask)
        store >>= np.uint64(low_bits)
        filled -= low_bits
    return i
