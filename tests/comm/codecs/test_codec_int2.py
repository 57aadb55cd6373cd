"""int2: its squared error, the layout as the docstring draws it, and what a sparse value costs with it."""

import struct

import pytest
import torch
from battery import EXAMPLES, gradient, normal, same, tame
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from commpress.comm.codecs import parse
from commpress.comm.codecs.topk import TopK

BLOCK = 1024
INT2, SIGN = parse("int2"), parse("sign")


def round_trip(x: Tensor) -> Tensor:
    return INT2.decode(INT2.encode(x), x.numel())


def read(payload: bytes, n: int) -> list[float]:
    """The payload read as the docstring draws it, a value at a time."""
    blocks = -(-n // BLOCK)
    plane = sum(-(-min(BLOCK, n - b * BLOCK) // 8) for b in range(blocks))
    values = []
    for b in range(blocks):
        m = min(BLOCK, n - b * BLOCK)
        width, at = -(-m // 8), 8 * blocks + b * BLOCK // 8
        levels = struct.unpack_from("<ff", payload, 8 * b)
        for i in range(m):
            negative, large = (payload[at + start + i % width] >> i // width & 1 for start in (0, plane))
            values.append(-levels[large] if negative else levels[large])
    return values


@EXAMPLES
@given(st.integers(1, 2500), st.integers(0, 9), st.integers(-60, 60))
def test_squared_error_is_the_stated_one(n: int, seed: int, exponent: int) -> None:
    x = gradient(n, seed) * 2.0**exponent
    decoded = round_trip(x).double()
    for start in range(0, n, BLOCK):
        block = x[start : start + BLOCK].double()
        error = (block - decoded[start : start + BLOCK]).square().sum()
        size, squares = block.abs(), block.square().sum()
        expected = squares
        for group in (size[size > size.mean()], size[size <= size.mean()]):
            expected = expected - (group.sum().square() / group.numel() if group.numel() else 0)
        assert (error - expected).abs() <= 1e-5 * squares  # a value at the mean itself may fall on either side


@pytest.mark.parametrize("name", sorted(set(tame(1)) - {"denormal"}))
def test_never_worse_than_sign(name: str) -> None:
    x = tame(100_003)[name].double()
    mine, theirs = (codec.decode(codec.encode(x.float()), x.numel()).double() for codec in (INT2, SIGN))
    assert (mine - x).square().sum() <= (theirs - x).square().sum() + 1e-9 * x.square().sum()


def test_an_eighth_of_the_squares_of_normal_values() -> None:
    x = normal(1_000_000)
    assert (round_trip(x) - x).square().sum() / x.square().sum() < 1 / 8
    assert (SIGN.decode(SIGN.encode(x), x.numel()) - x).square().sum() / x.square().sum() > 1 / 3


def test_two_magnitudes_are_exact() -> None:
    x = torch.tensor([0.5, -8.0, -0.5, 8.0] * 300)
    assert torch.equal(round_trip(x), x)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 1023, 1024, 1025, 2048, 2500])
def test_layout_is_the_documented_one(n: int) -> None:
    x = gradient(n)
    payload = INT2.encode(x)
    assert INT2.decode(payload, n).tolist() == read(payload.numpy().tobytes(), n)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1023, 1024, 2499])
def test_nan_or_inf_spoils_its_own_block_alone(bad: float, at: int) -> None:
    x = gradient(2500)
    clean = round_trip(x)
    x[at] = bad
    decoded = round_trip(x)
    block = slice(at // BLOCK * BLOCK, (at // BLOCK + 1) * BLOCK)
    assert decoded[block].isnan().all()
    decoded[block] = clean[block] = 0
    assert same(decoded, clean)


@pytest.mark.parametrize("n", [2**16, 10**6, 2**24 + 1])
def test_a_value_of_one_in_64_costs_less_than_11_bits(n: int) -> None:
    """SparseLoCo (arXiv:2508.15706) keeps 64 values of each 4096 and spends 12 bits on a place and 2 on a value."""
    codec = parse("topk(0.015625)|int2")
    assert isinstance(codec, TopK)
    assert 8 * codec.nbytes(n) / codec.kept(n) < 10.3


def test_places_chosen_chunk_by_chunk_cost_the_same() -> None:
    """The length of the code depends on how many are kept, not on which: here the 64 largest of each 4096, two sizes each."""
    x = gradient(50 * 4096).view(50, 4096)
    places = x.abs().topk(64, dim=1).indices
    kept = torch.zeros_like(x).scatter(1, places, x.gather(1, places).sign() * 3.0).view(-1)
    codec = parse("topk(0.015625)|int2")
    payload = codec.encode(kept)
    assert torch.equal(codec.decode(payload, kept.numel()), kept)
    assert 8 * payload.numel() / (50 * 64) < 11
