"""int8 and int4: the error bound, the rounding, the layout as the docstring draws it, blocks that stand alone; and that
stochastic rounding is right on average, whatever the values are.
"""

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
from commpress.comm.codecs.integer import noise
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


def stochastic(spec: str, x: Tensor) -> Tensor:
    """The error of each value in steps of its block, by stochastic rounding; x is [blocks, 256]."""
    step = x.abs().amax(dim=1, keepdim=True).double() / LEVELS[spec]
    decoded = round_trip(f"{spec}(stochastic)", x.reshape(-1)).view(-1, BLOCK)
    return (decoded.double() - x.double()) / step


@BOTH
@EXAMPLES
@given(st.integers(0, 10**6), st.integers(1, 900), st.integers(-100, 120))
def test_stochastic_rounding_errs_by_less_than_a_step(spec: str, seed: int, n: int, exponent: int) -> None:
    x = gradient(n, seed).clamp(-60, 60) * 2.0**exponent
    decoded = round_trip(f"{spec}(stochastic)", x)
    for start in range(0, n, BLOCK):
        block, got = x[start : start + BLOCK].double(), decoded[start : start + BLOCK].double()
        if (peak := float(block.abs().max())) >= 2.0**-100:
            assert (block - got).abs().max() <= peak * (1 / LEVELS[spec] + 2.0**-21)
            assert (got[block.abs() == peak].abs() - peak).abs().max() <= peak * 2.0**-22  # the largest stays
    assert (decoded[x == 0] == 0).all()


@BOTH
def test_stochastic_rounding_is_right_on_average(spec: str) -> None:
    seeds = 4000
    peaks = LEVELS[spec] * (1 + torch.arange(seeds) * 2.0**-20)  # each is another scale, and so another noise
    values = torch.linspace(-0.9, 0.8, BLOCK - 1) * LEVELS[spec]
    error = stochastic(spec, torch.cat([peaks[:, None], values.repeat(seeds, 1)], dim=1))[:, 1:]
    assert (error.abs() > 0.25).double().mean() > 0.2
    standard = error.std(dim=0) / seeds**0.5
    assert (error.mean(dim=0).abs() <= 4 * standard).all()
    assert error.mean().abs() <= 4 * error.std() / error.numel() ** 0.5
    together = torch.corrcoef(error[:, :64].T).fill_diagonal_(0)  # places of a block err each by itself
    assert together.abs().max() < 5 / seeds**0.5


@BOTH
def test_ranks_that_differ_in_the_last_bits_average_their_noise_out(spec: str) -> None:
    ranks, x = 64, gradient(8 * BLOCK)
    last_bits = 1 + torch.randint(-8, 9, (ranks, x.numel()), generator=torch.Generator().manual_seed(1)) * 2.0**-22

    def mean_error(name: str) -> float:
        decoded = torch.stack([round_trip(name, x * bits) for bits in last_bits])
        return float((decoded.mean(dim=0) - x).square().sum() / (decoded[0] - x).square().sum())

    assert mean_error(f"{spec}(stochastic)") < 2 / ranks
    assert mean_error(spec) > 0.9


def test_the_noise_is_spread_evenly_over_one_step() -> None:
    bits = torch.arange(0x3F800000, 0x3F800000 + 1024 * BLOCK, dtype=torch.int32)
    found = noise(bits.view(torch.float32).view(1024, BLOCK), torch.full((1024,), 0.125))
    assert found.abs().max() < 0.5
    assert (found.double() * 2**24 % 2 == 1).all()
    counts = torch.histc(found, 256, -0.5, 0.5)
    assert (counts - 1024).square().sum() / 1024 < 255 + 4 * (2 * 255) ** 0.5
    assert torch.corrcoef(torch.stack([found.view(-1)[1:], found.view(-1)[:-1]]))[0, 1].abs() < 4 / found.numel() ** 0.5


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
