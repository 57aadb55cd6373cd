"""sign: its squared error, the layout as the docstring draws it, blocks that stand alone."""

import struct

import numpy as np
import pytest
import torch
from battery import EXAMPLES, gradient, same, tame
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from commpress.comm.codecs import parse

BLOCK = 1024
SIGN = parse("sign")


def round_trip(x: Tensor) -> Tensor:
    return SIGN.decode(SIGN.encode(x), x.numel())


def read(payload: bytes, n: int) -> list[float]:
    """The payload read as the docstring draws it, a value at a time."""
    blocks = -(-n // BLOCK)
    values, at = [], 4 * blocks
    for b in range(blocks):
        m = min(BLOCK, n - b * BLOCK)
        width = -(-m // 8)
        (scale,) = struct.unpack_from("<f", payload, 4 * b)
        values += [-scale if payload[at + i % width] >> i // width & 1 else scale for i in range(m)]
        at += width
    return values


def check_error(x: Tensor) -> None:
    """A block's squared error is sum x^2 - (sum|x|)^2 / m, to float32's rounding of the sum."""
    decoded = round_trip(x).double()
    for start in range(0, x.numel(), BLOCK):
        block = x[start : start + BLOCK].double()
        error = (block - decoded[start : start + BLOCK]).square().sum()
        squares = block.square().sum()
        expected = squares - block.abs().sum().square() / block.numel()
        assert (error - expected).abs() <= 1e-6 * squares
        assert error <= squares * (1 + 1e-6)


@EXAMPLES
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 2100),
        # below that a sum of theirs, scaled by 2**-60 and divided by 1024, is denormal: as coarse as "denormal" below
        elements=st.floats(-1.0, 1.0, width=32).filter(lambda value: value == 0 or abs(value) >= 2.0**-40),
        fill=st.sampled_from([0.0, 0.5, -0.25]),
    ),
    st.integers(-60, 60),
)
def test_squared_error_is_the_stated_one(values: NDArray[np.float32], exponent: int) -> None:
    check_error(torch.from_numpy(values) * 2.0**exponent)


@pytest.mark.parametrize("name", sorted(set(tame(1)) - {"denormal"}))  # there float32 itself is as coarse as the sum
def test_squared_error_on_hard_inputs(name: str) -> None:
    check_error(tame(100_003)[name])


@EXAMPLES
@given(st.integers(1, 2**14 - 1), st.integers(-60, 60), st.integers(1, 3), st.integers(0, 9))
def test_equal_magnitudes_are_exact(mantissa: int, exponent: int, blocks: int, seed: int) -> None:
    """Bit for bit where 1024 times the magnitude needs no rounding."""
    signs = torch.where(gradient(blocks * BLOCK, seed) < 0, -1.0, 1.0)
    x = mantissa * 2.0**exponent * signs
    assert torch.equal(round_trip(x), x)


@EXAMPLES
@given(st.floats(2.0**-90, 2.0**90, width=32), st.integers(1, 3000))
def test_equal_magnitudes_of_any_value_and_number_are_exact_to_rounding(magnitude: float, n: int) -> None:
    x = torch.where(gradient(n) < 0, -magnitude, magnitude)
    assert (round_trip(x) - x).abs().max() <= 2.0**-20 * magnitude


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 1023, 1024, 1025, 2048, 2500])
def test_layout_is_the_documented_one(n: int) -> None:
    x = gradient(n)
    payload = SIGN.encode(x)
    assert SIGN.decode(payload, n).tolist() == read(payload.numpy().tobytes(), n)
    used = 4 * -(-n // BLOCK) + sum(-(-min(BLOCK, n - o) // 8) for o in range(0, n, BLOCK))
    assert payload[used:].tolist() == [0] * (-used % 4)


@pytest.mark.parametrize("n", [1, 7, 1023, 1024, 1025, 2500])
def test_signs_are_those_of_the_input_and_zero_has_one_too(n: int) -> None:
    x = gradient(n)
    x[::5] = 0.0
    x[::7] = -0.0
    decoded = round_trip(x)
    if n == 1:
        assert decoded.tolist() == [0.0]
    assert torch.equal(decoded.signbit(), x.signbit())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1023, 1024, 2048, 2499])
def test_nan_or_inf_spoils_its_own_block_alone(bad: float, at: int) -> None:
    x = gradient(2500)
    clean = round_trip(x)
    x[at] = bad
    decoded = round_trip(x)
    block = slice(at // BLOCK * BLOCK, (at // BLOCK + 1) * BLOCK)
    assert decoded[block].isnan().all()
    decoded[block] = clean[block] = 0
    assert same(decoded, clean)


def test_a_short_last_block_has_the_mean_of_its_own_values() -> None:
    x = torch.cat([torch.full((1024,), 8.0), torch.tensor([1.0, -2.0, 3.0, -2.0])])
    assert round_trip(x)[1024:].tolist() == [2.0, -2.0, 2.0, -2.0]
