"""Loops that code ascending positions (Elias 1974; Fano 1971)."""

import numpy as np

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.blocks import ONES, PLACES
from commpress.kernels.cpu.instructions import put_word

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""


@loop
def ef_encode(index, low_bits, low, high):
    """Elias-Fano of ascending positions: `low_bits` of each packed in `low`, the rest unary in `high` (both zeroed).

    Bits are gathered in registers: in memory, each would wait for the one before. The low ones are written eight bytes at a
    time, of which those that are full count; the high ones when their 64 are full."""
    mask = (np.int64(1) << low_bits) - 1
    store, filled, at = np.uint64(0), np.int64(0), np.int64(0)
    unary, word = np.uint64(0), np.int64(0)
    few = low_bits <= 56  # else a position's bits and seven others are more than a register
    for i in range(index.size):
        p = index[i]
        if few and at + 8 <= low.size:
            store |= np.uint64(p & mask) << np.uint64(filled)
            filled += low_bits
            put_word(low, at, store)
            at += filled >> 3
            store >>= np.uint64(filled & 56)
            filled &= 7
        else:
            done = np.int64(0)
            while done < low_bits:  # a byte's bits at a time
                bits = min(low_bits - done, 8 - filled)
                part_of_it = (p >> done) & ((np.int64(1) << bits) - 1)
                store |= np.uint64(part_of_it) << np.uint64(filled)
                filled += bits
                done += bits
                if filled == 8:
                    low[at] = np.uint8(store & np.uint64(255))
                    store, filled, at = np.uint64(0), np.int64(0), at + 1
        bit = (p >> low_bits) + i
        if bit >> 6 != word:
            _put_bytes(high, 8 * word, unary)
            unary, word = np.uint64(0), bit >> 6
        unary |= np.uint64(1) << np.uint64(bit & 63)
    _put_bytes(high, 8 * word, unary)
    if filled:
        low[at] = np.uint8(store & np.uint64(255))


@part
def _put_bytes(high, at, word):
    """Write the eight bytes of a word, or those that there is room for; the others are 0."""
    if at + 8 <= high.size:
        put_word(high, at, word)
    else:
        for j in range(at, high.size):
            high[j] = np.uint8(word & np.uint64(255))
            word >>= np.uint64(8)


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
