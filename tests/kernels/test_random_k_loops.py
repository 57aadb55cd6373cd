"""The two loops of `randomk` that make a mean, which are written twice for their speed."""

from typing import Any

import numpy as np
import pytest
from numba import njit

from commpress.kernels.cpu.random_k import STRATA, _mean_block, randomk_mean

BLOCKS, WIDTH = 3, 10
SIZE = STRATA * WIDTH


@njit(error_model="numpy")
def block_by_block(
    value: Any, number: Any, size: Any, starts: Any, widths: Any, keys: Any, turns: Any, alike: Any, out: Any
) -> None:
    """The mean as `randomk_recode` makes it."""
    places = np.empty(starts.size, np.int32)
    for b in range(out.size // size):
        block = out[b * size : (b + 1) * size]
        _mean_block(value, b, number, starts, widths, keys, turns, alike, places, block)


@pytest.mark.parametrize("alike", [True, False])
def test_decoding_and_re_encoding_make_the_same_mean(alike: bool) -> None:
    random = np.random.default_rng(0)
    starts, widths = np.arange(0, SIZE, WIDTH, dtype=np.int32), np.full(STRATA, WIDTH, np.int32)
    for count in (1, 2, 5):
        value = random.standard_normal((count, BLOCKS * STRATA), np.float32)
        value[0, :4] = 0, -0.0, np.inf, 1e-42
        value[-1, STRATA + 1 : STRATA + 3] = np.nan, -np.inf
        keys = random.integers(0, 1 << 32, (1 if alike else count, STRATA), np.uint32).repeat(count if alike else 1, 0)
        turns = random.integers(0, WIDTH, (1 if alike else count, STRATA), np.int32).repeat(count if alike else 1, 0)
        given = value, 7, SIZE, starts, widths, keys, turns, alike
        one, other = np.empty((2, BLOCKS * SIZE), np.float32)
        randomk_mean(*given, one, 0, BLOCKS)
        block_by_block(*given, other)
        assert one.tobytes() == other.tobytes(), f"{count} payloads"
        assert np.isnan(one).sum() == WIDTH
        assert np.count_nonzero(one) >= BLOCKS * STRATA - 2
