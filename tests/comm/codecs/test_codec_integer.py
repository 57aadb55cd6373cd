"""int8 and int4: the error bound, the rounding, the layout as the docstring draws it, blocks that stand alone."""

import struct

import numpy as np
import pytest
import torch
from battery import EXAMPLES, LARGEST, gradient, same, tame
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from commpress.comm.codecs import parse
from commpress.comm.coding import encode

BLOCK = 256
LEVELS = {"int8": 127, "int4": 7}
BOTH = pytest.mark.parametrize("spec", ["int8", "int4"])

Floats = NDArray[np.float32]


def round_trip(spec: str, x: Tensor) -> Tensor:
    return parse(spec).decode(parse(spec).encode(x), x.numel())


def read(payload: bytes, n: int, bits: int) -> list[float]:
    """The payload read as the docstring draws it, a value at a time."""
    blocks = -(-n // BLOCK)
    values = []
    at = 4 * blocks
    for b in range(blocks):
        m = min(BLOCK, n - b * BLOCK)
        (scale,) = struct.unpack_from("<f", payload, 4 * b)
        if bits == 8:
            codes = [payload[at + j] - 128 for j in range(m)]
            at += m
        else:
            half = (m + 1) // 2
            codes = [(payload[at + j] & 15) - 8 for j in range(half)]
            codes += [(payload[at + j] >> 4) - 8 for j in range(m - half)]
            at += half
        values += [float(np.float32(code) * np.float32(scale)) for code in codes]
    return values


def check_bound(spec: str, x: Tensor) -> None:
    """|x - decoded| <= scale / 2 in each block, and float32's rounding; 0 where all lie below 2^-100."""
    decoded, levels = round_trip(spec, x), LEVELS[spec]
    for start in range(0, x.numel(), BLOCK):
        block, got = x[start : start + BLOCK].double(), decoded[start : start + BLOCK].double()
        peak = float(block.abs().max())
        if peak < 2.0**-100:
            assert (got == 0).all()
        else:
            assert (block - got).abs().max() <= peak * (0.5 / levels + 2.0**-21)


@BOTH
@EXAMPLES
@given(hnp.arrays(np.float32, st.integers(1, 700), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_error_is_at_most_half_a_step_of_the_block(spec: str, values: Floats) -> None:
    check_bound(spec, torch.from_numpy(values))


@BOTH
@EXAMPLES
@given(st.integers(0, 10**6), st.integers(1, 900), st.integers(-110, 120))
def test_error_bound_at_every_size_of_values(spec: str, seed: int, n: int, exponent: int) -> None:
    check_bound(spec, gradient(n, seed).clamp(-60, 60) * 2.0**exponent)


@BOTH
@pytest.mark.parametrize("name", sorted(tame(1)))
def test_error_bound_on_hard_inputs(spec: str, name: str) -> None:
    check_bound(spec, tame(100_003)[name])


@BOTH
def test_codes_round_half_to_even(spec: str) -> None:
    levels = LEVELS[spec]  # with this as the peak the scale is 1
    whole = torch.arange(-levels, levels).float()
    x = torch.cat([torch.tensor([float(levels)]), whole + 0.5])
    assert round_trip(spec, x)[1:].tolist() == [float(round(v)) for v in (whole + 0.5).tolist()]


@BOTH
def test_multiples_of_the_scale_are_exact(spec: str) -> None:
    levels = LEVELS[spec]
    x = torch.arange(-levels, levels + 1).float() / 1024
    assert torch.equal(round_trip(spec, x), x)


@BOTH
@pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 511, 512, 700, 769])
def test_layout_is_the_documented_one(spec: str, n: int) -> None:
    x = gradient(n)
    codec = parse(spec)
    payload = codec.encode(x)
    assert codec.decode(payload, n).tolist() == read(payload.numpy().tobytes(), n, 8 if spec == "int8" else 4)
    (scale,) = struct.unpack_from("<f", payload.numpy().tobytes(), 0)
    assert scale == np.float32(x[:BLOCK].abs().max()) / np.float32(LEVELS[spec])
    used = 4 * -(-n // BLOCK) + (n if spec == "int8" else sum(-(-min(BLOCK, n - o) // 2) for o in range(0, n, BLOCK)))
    assert payload[used:].tolist() == [0] * (-used % 4)


@BOTH
def test_a_block_below_the_flush_is_zero_and_its_residual_keeps_it(spec: str) -> None:
    x = torch.cat([torch.full((256,), 2.0**-101), torch.full((256,), 2.0**-100), torch.full((5,), 1e-44)])
    residual = torch.zeros_like(x)
    codec = parse(spec)
    decoded = codec.decode(encode(codec, x, residual), x.numel())
    assert (decoded[:256] == 0).all()
    assert torch.allclose(decoded[256:512], x[256:512], rtol=1e-6, atol=0)
    assert (decoded[512:] == 0).all()
    assert torch.equal(residual[:256], x[:256])
    assert torch.equal(residual[512:], x[512:])


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 255, 256, 600, 699])
def test_nan_or_inf_spoils_its_own_block_alone(spec: str, bad: float, at: int) -> None:
    x = gradient(700)
    clean = round_trip(spec, x)
    x[at] = bad
    decoded = round_trip(spec, x)
    block = slice(at // BLOCK * BLOCK, (at // BLOCK + 1) * BLOCK)
    assert decoded[block].isnan().all()
    decoded[block] = clean[block] = 0
    assert same(decoded, clean)


@BOTH
def test_a_large_value_coarsens_its_own_block_alone(spec: str) -> None:
    x = gradient(700)
    clean = round_trip(spec, x)
    x[300] = 1e20
    decoded = round_trip(spec, x)
    assert torch.equal(decoded[:256], clean[:256])
    assert torch.equal(decoded[512:], clean[512:])
    assert decoded[256:512].count_nonzero() == 1


@BOTH
def test_finite_values_stay_finite_up_to_2_to_127(spec: str) -> None:
    x = gradient(300).clamp(-1, 1) * 2.0**127
    assert round_trip(spec, x).isfinite().all()


@BOTH
@pytest.mark.parametrize("peak", [LARGEST, 0.999 * LARGEST, 0.99 * LARGEST])
def test_the_largest_floats_leave_a_finite_residual(spec: str, peak: float) -> None:
    residual = torch.full((2,), 0.5)
    encode(parse(spec), torch.tensor([peak, 1.0]), residual)
    assert residual.isfinite().all()
