"""Long means are written past the caches: the same bytes, wherever they begin in memory."""

import pytest
import torch
from battery import gradient, same_bits

from commpress.comm.codecs import parse
from commpress.kernels.cpu.blocks import LONG

SPECS = (
    "bf16",
    "fp16",
    "fp8",
    "int8",
    "int4",
    "int2",
    "sign",
    "topk(0.01)|int4",
    "randomk(0.1)|int4",
    "randomk(0.03)",
    "rotate|int4",
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_long_mean_is_that_of_the_definition(spec: str) -> None:
    codec, n = parse(spec), LONG + 333  # with a tail in every family
    payloads = torch.cat([codec.encode(gradient(n, seed)) for seed in (1, 2)])
    expected = codec.define_mean(payloads, n, 2)
    for offset in (0, 1, 16):  # in values of 4 bytes: at a multiple of 64 bytes, at none, at the next one
        around = torch.full((n + 64,), 7.0)
        out = around[offset : offset + n]
        codec.mean(payloads, n, 2, out=out)
        assert same_bits(out, expected)
        assert (around[:offset] == 7).all()
        assert (around[offset + n :] == 7).all()
