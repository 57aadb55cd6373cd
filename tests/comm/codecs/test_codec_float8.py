"""fp8: the error bounds of both formats, rounding as torch's own float8, blocks that stand alone."""

import numpy as np
import pytest
import torch
from battery import EXAMPLES, gradient, tame
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from commpress.comm.codecs import parse
from commpress.comm.codecs.float8 import BLOCK, FLUSH

FORMATS = {"fp8": (torch.float8_e4m3fn, 2.0**-4, 2.0**-10), "fp8(e5m2)": (torch.float8_e5m2, 2.0**-3, 2.0**-17)}
"""The dtype, the largest relative error, and half of the smallest step."""
BOTH = pytest.mark.parametrize("spec", FORMATS)


def check_bound(spec: str, x: Tensor) -> None:
    """|x - decoded| <= the share of |x| or half of the smallest step, whichever is larger; 0 where all lie below 2^-80."""
    dtype, share, half = FORMATS[spec]
    decoded = parse(spec).decode(parse(spec).encode(x), x.numel())
    for start in range(0, x.numel(), BLOCK):
        block, got = x[start : start + BLOCK].double(), decoded[start : start + BLOCK].double()
        peak = float(block.abs().max())
        if peak < FLUSH:
            assert (got == 0).all()
            continue
        bound = (share * block.abs()).clamp(min=half * peak / torch.finfo(dtype).max)
        assert ((block - got).abs() <= bound * (1 + 2.0**-20)).all()


@BOTH
@EXAMPLES
@given(hnp.arrays(np.float32, st.integers(1, 700), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_error_is_within_the_bound_of_its_format(spec: str, values: NDArray[np.float32]) -> None:
    check_bound(spec, torch.from_numpy(values))


@BOTH
def test_error_bound_on_hard_inputs(spec: str) -> None:
    for x in tame(20_011).values():
        check_bound(spec, x)


@BOTH
def test_every_byte_decodes_to_what_torch_makes_of_it_and_encodes_back(spec: str) -> None:
    """The largest magnitude first, so that the scale is 1."""
    dtype, _, _ = FORMATS[spec]
    values = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)
    values = torch.where(values.isfinite(), values, 0.0)
    codec = parse(spec)
    payload = codec.encode(values)
    assert payload[:4].view(torch.float32).item() == 1.0
    assert torch.equal(codec.decode(payload, 256), values)
    halves = (values.unique()[:-1] + values.unique()[1:]) / 2  # ties, which go to the even one
    halves[0] = torch.finfo(dtype).max
    decoded = codec.decode(codec.encode(halves), halves.numel())
    assert torch.equal(decoded[:BLOCK], halves.to(dtype).to(torch.float32)[:BLOCK])


def test_small_values_beside_large_ones_keep_more_than_with_int8() -> None:
    x = gradient(100_000) * torch.exp(2 * gradient(100_000, 1).clamp(-1, 1))
    small = x.abs() < x.abs().median()

    def lost(spec: str) -> float:
        decoded = parse(spec).decode(parse(spec).encode(x), x.numel())
        return float((x - decoded)[small].norm() / x[small].norm())

    assert lost("fp8") < 0.5 * lost("int8")
