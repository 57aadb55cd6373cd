"""The casts: none keeps every bit, bf16 and fp16 round each value by itself within their stated bounds."""

import numpy as np
import pytest
import torch
from battery import EXAMPLES, LARGEST, gradient, same, same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from commpress.comm.codecs import parse

Floats = NDArray[np.float32]


def any_finite(low: float, high: float) -> st.SearchStrategy[Floats]:
    """Arrays of float32 whose magnitudes lie in [low, high]; both must be float32 numbers."""
    sizes = st.floats(low, high, width=32)
    signed = st.one_of(sizes, sizes.map(lambda v: -v))
    return hnp.arrays(np.float32, st.integers(1, 300), elements=signed)


@EXAMPLES
@given(hnp.arrays(np.int32, st.integers(1, 300), elements=st.integers(-(2**31), 2**31 - 1)))
def test_none_keeps_every_bit(bits: NDArray[np.int32]) -> None:
    x = torch.from_numpy(bits).view(torch.float32)
    codec = parse("none")
    payload = codec.encode(x)
    assert torch.equal(payload.view(torch.int32), torch.from_numpy(bits))
    decoded = codec.decode(payload, x.numel())
    assert same(decoded, x)
    assert same_bits(decoded[~x.isnan()], x[~x.isnan()])


def test_none_rounds_float64_to_float32() -> None:
    x = torch.tensor([1 / 3, 1e300, -0.0, 2.0**-149], dtype=torch.float64)
    codec = parse("none")
    assert same_bits(codec.decode(codec.encode(x), 4), torch.tensor([1 / 3, torch.inf, -0.0, 2.0**-149]))


@EXAMPLES
@given(any_finite(2.0**-126, 2.0**127))
def test_bf16_is_within_one_part_in_256(values: Floats) -> None:
    x = torch.from_numpy(values)
    codec = parse("bf16")
    error = codec.decode(codec.encode(x), x.numel()).double() - x.double()
    assert (error.abs() <= 2.0**-8 * x.double().abs()).all()


@EXAMPLES
@given(any_finite(2.0**-14, 65504.0))
def test_fp16_is_within_one_part_in_2048(values: Floats) -> None:
    x = torch.from_numpy(values)
    codec = parse("fp16")
    error = codec.decode(codec.encode(x), x.numel()).double() - x.double()
    assert (error.abs() <= 2.0**-11 * x.double().abs()).all()


def test_fp16_ends_at_65504_and_bf16_does_not() -> None:
    x = torch.tensor([65504.0, 65520.0, -1e6, 2.0**-24, 2.0**-26])
    assert parse("fp16").decode(parse("fp16").encode(x), 5).tolist() == [65504.0, torch.inf, -torch.inf, 2.0**-24, 0.0]
    wide = torch.tensor([2.0**127, -(2.0**-126), 1e6])
    assert parse("bf16").decode(parse("bf16").encode(wide), 3).isfinite().all()


@pytest.mark.parametrize("spec", ["bf16", "fp16"])
def test_halfway_rounds_to_even(spec: str) -> None:
    step = 2.0**-7 if spec == "bf16" else 2.0**-10
    x = 1 + step * torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert parse(spec).decode(parse(spec).encode(x), 4).tolist() == [1, 1 + 2 * step, 1 + 2 * step, 1 + 4 * step]


@pytest.mark.parametrize(("spec", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_tensor_of_the_same_dtype_comes_back_as_it_was(spec: str, dtype: torch.dtype) -> None:
    x = gradient(1025).to(dtype)
    codec = parse(spec)
    assert same(codec.decode(codec.encode(x), 1025, torch.empty(1025, dtype=dtype)), x)


@pytest.mark.parametrize(("spec", "dtype"), [("none", "<f4"), ("fp16", "<f2")])
def test_the_layout_is_the_values_one_behind_the_other(spec: str, dtype: str) -> None:
    x = gradient(301)
    payload = parse(spec).encode(x).numpy().tobytes()
    values = x.numpy().astype(dtype).tobytes()
    assert payload == values + bytes(-len(values) % 4)


def test_the_layout_of_bf16_is_the_upper_halves_of_the_words() -> None:
    x = torch.tensor([1.0, -2.5, 0.15625])  # exact in bf16
    assert parse("bf16").encode(x).numpy().tobytes() == bytes.fromhex("803f 20c0 203e 0000")


def test_the_largest_float_becomes_inf_in_both_and_stays_in_none() -> None:
    x = torch.tensor([LARGEST])
    assert [parse(spec).decode(parse(spec).encode(x), 1).item() for spec in ("none", "bf16", "fp16")] == [
        LARGEST,
        torch.inf,
        torch.inf,
    ]
