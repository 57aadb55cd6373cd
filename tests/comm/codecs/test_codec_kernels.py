"""The loops that stand alone: Elias-Fano for positions beyond 2^33, the k-th largest, the even choice among ties."""

import numpy as np
import pytest
from battery import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from commpress.kernels.cpu import elias_fano, topk

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


def round_trip(positions: list[int], n: int) -> tuple[Longs, int]:
    """Positions below n through Elias-Fano: as decoded, and the low bits of each."""
    index = np.array(positions, np.int64)
    k = index.size
    low_bits = (n // k).bit_length() - 1
    low = np.zeros(-(-k * low_bits // 8), np.uint8)
    high = np.zeros(-(-(k + (n >> low_bits) + 1) // 8), np.uint8)
    elias_fano.ef_encode(index, low_bits, low, high)
    decoded = np.full(k, -1, np.int64)
    assert elias_fano.ef_decode(low_bits, low, high, decoded) == k
    assert sum(int(byte).bit_count() for byte in high) == k
    return decoded, low_bits


@EXAMPLES
@given(st.integers(0, 40), st.data())
def test_elias_fano_gives_back_any_positions(exponent: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(max(1, 2**exponent // 2), 2**exponent))
    positions = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=60))
    assert round_trip(sorted(positions), n)[0].tolist() == sorted(positions)


@pytest.mark.parametrize(
    ("n", "positions", "low_bits"),
    [
        (1, [0], 0),
        (8, list(range(8)), 0),
        (9, [0, 2, 8], 1),
        (2**31, [0, 2**31 - 1], 30),
        (2**31 + 10, [2**31 - 1, 2**31, 2**31 + 9], 29),
        (2**33 + 10, [5, 2**31, 2**32 - 1, 2**32, 2**33, 2**33 + 9], 30),
        (2**34, [2**34 - 1], 34),
        (2**40, [2**40 - 1], 40),
        (2**40, [0], 40),
        (2**40, [0, 1, 2, 2**40 - 2, 2**40 - 1], 37),
        (2**40, list(range(2**40 - 64, 2**40)), 34),
        (2**40, list(range(64)), 34),
    ],
)
def test_elias_fano_at_the_edges(n: int, positions: list[int], low_bits: int) -> None:
    decoded, used = round_trip(positions, n)
    assert decoded.tolist() == positions
    assert used == low_bits


@pytest.mark.parametrize("n", [10**4, 2**31 + 7, 2**36])
def test_elias_fano_of_many_positions(n: int) -> None:
    steps = np.random.default_rng(0).integers(1, n // 5000, 4000)
    positions = np.cumsum(steps) if n > 10**4 else np.arange(0, n, 3)
    assert np.array_equal(round_trip(positions.tolist(), n)[0], positions)


def test_elias_fano_reads_no_more_positions_than_asked_for() -> None:
    decoded = np.zeros(3, np.int64)
    assert elias_fano.ef_decode(0, np.zeros(0, np.uint8), np.full(4, 255, np.uint8), decoded) == 3
    assert decoded.tolist() == [0, 0, 0]


@EXAMPLES
@given(
    hnp.arrays(
        np.int32,
        st.integers(1, 300),
        elements=st.one_of(st.integers(0, 0x7FFFFFFF), st.sampled_from([0, 1, 2, 0x7F800000, 0x7FFFFFFF])),
        fill=st.sampled_from([0, 7, 0x7FFFFFFF]),
    )
)
def test_kth_largest_is_that_of_a_sort(bits: Ints) -> None:
    falling = np.sort(bits)[::-1]
    for k in range(1, bits.size + 1):
        assert topk.kth_largest(bits, k) == falling[k - 1]


@pytest.mark.parametrize("high", [1, 100, 2**11, 2**22, 2**31 - 1])
def test_kth_largest_of_many(high: int) -> None:
    bits = np.random.default_rng(high).integers(0, high, 50_000, dtype=np.int32, endpoint=True)
    falling = np.sort(bits)[::-1]
    for k in (1, 2, 499, 500, 25_000, 49_999, 50_000):
        assert topk.kth_largest(bits, k) == falling[k - 1]


@EXAMPLES
@given(hnp.arrays(np.int32, st.integers(1, 400), elements=st.integers(0, 4)), st.data())
def test_keep_marks_all_above_and_an_even_share_of_the_ties(bits: Ints, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, bits.size))
    threshold = np.sort(bits)[::-1][k - 1]
    above = int((bits > threshold).sum())
    index, value = np.arange(bits.size), bits.view(np.float32).copy()
    topk.keep_largest(index, value, threshold, k)
    kept = index[:k]
    assert (value[:k].view(np.int32) == bits[kept]).all()
    places, values = topk.largest_of(bits.view(np.float32), threshold, k)
    assert (places == kept).all()
    assert (values.view(np.int32) == bits[kept]).all()
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < bits.size
    assert set(np.flatnonzero(bits > threshold)) <= set(kept)
    assert (bits[kept] >= threshold).all()

    ties = np.flatnonzero(bits == threshold)
    ranks = np.flatnonzero(np.isin(ties, kept))
    need = k - above
    assert ranks.size == need
    assert set(np.diff([-1, *ranks]).tolist()) <= {ties.size // need, -(-ties.size // need)}


def test_scatter_adds_shares_and_passes_over_what_lies_beyond() -> None:
    out = np.array([1.0, 2.0, 3.0, 99.0], np.float32)
    index = np.array([0, 2, 2, 3, 2**40], np.int64)
    value = np.array([4.0, 8.0, 16.0, 5.0, 5.0], np.float32)
    topk.scatter_add(index, value, np.float32(0.5), out[:3])
    assert out.tolist() == [3.0, 2.0, 15.0, 99.0]
