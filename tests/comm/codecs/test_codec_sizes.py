"""Bytes by arithmetic: nbytes against each documented layout up to 2^41 values, and the promised bits a value."""

from itertools import product

from battery import EXAMPLES, SPECS
from hypothesis import given
from hypothesis import strategies as st

from commpress.comm.codecs import parse
from commpress.comm.codecs.topk import TopK

EDGES = [0, 1, 2, 3, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 10**4, 10**6]
EDGES += [2**e + d for e in (20, 30, 31, 32, 33, 36, 40) for d in (-1, 0, 1)]


def up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def documented(spec: str, n: int) -> int:
    """Bytes of a payload as the layouts in the docstrings have it."""
    if n == 0:
        return 0
    first, _, second = (
        spec.replace("fp8(e5m2)", "fp8").replace("(stochastic)", "").removeprefix("rotate|").partition("|")
    )
    if first.startswith("topk"):
        k = max(1, round(float(first[5:-1]) * n))
        low_bits = max(low for low in range(60) if k << low <= n)
        low, high = up(k * low_bits, 32) // 8, up(k + (n >> low_bits) + 1, 32) // 8
        return low + high + documented(second or "none", k)
    if first.startswith("randomk"):  # the number of the draw, and 64 of `block` values
        block = max(64, round(64 / float(first[8:-1])))
        return 8 + documented(second or "none", 64 * (n // block) + up(64 * (n % block), block) // block)
    if first == "int2":  # two sizes a block, two planes of bits
        return up(8 * (up(n, 1024) // 1024) + 2 * (up(n, 8) // 8), 4)
    blocks = {
        "fp8": up(n, 256) // 256,
        "int8": up(n, 256) // 256,
        "int4": up(n, 256) // 256,
        "sign": up(n, 1024) // 1024,
    }
    bits = {"none": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "sign": 1}
    # A block's codes fill whole bytes; all blocks but the last do so by themselves.
    return up(4 * blocks.get(first, 0) + up(n * bits[first], 8) // 8, 4)


def test_nbytes_is_that_of_the_documented_layout() -> None:
    for spec, n in product(SPECS, EDGES):
        assert parse(spec).nbytes(n) == documented(spec, n), f"{spec}, n = {n}"


@EXAMPLES
@given(st.integers(0, 2**41))
def test_nbytes_of_any_length(n: int) -> None:
    for spec in SPECS:
        assert parse(spec).nbytes(n) == documented(spec, n), spec


BITS = {"none": 32, "bf16": 16.001, "fp16": 16.001, "fp8": 8.13, "int8": 8.13, "int4": 4.13, "int2": 2.07, "sign": 1.04}


def test_bits_a_value() -> None:
    for (spec, bits), n in product(BITS.items(), [n for n in EDGES if n >= 10**4]):
        slack = 32 + 24 if n == 10**4 else 0  # a last block's scale and the padding
        assert 8 * parse(spec).nbytes(n) <= bits * n + slack, f"{spec}, n = {n}"


@EXAMPLES
@given(st.integers(10**4, 2**36))
def test_a_position_at_one_percent_takes_at_most_9_bits(n: int) -> None:
    codec = TopK(0.01)
    k = codec.kept(n)
    assert 8 * (codec.nbytes(n) - 4 * k) <= 9 * k


@EXAMPLES
@given(st.integers(10**6, 2**40), st.floats(1e-4, 0.5))
def test_a_position_takes_at_most_three_bits_more_than_log2_of_n_over_k(n: int, ratio: float) -> None:
    codec = TopK(ratio)
    k = codec.kept(n)
    low_bits = (n // k).bit_length() - 1
    assert 8 * (codec.nbytes(n) - 4 * k) <= k * (low_bits + 3) + 64 + 1


def test_the_ratios_that_the_docstrings_promise() -> None:
    n = 2**20
    assert 4 * n / parse("int8").nbytes(n) > 3.9
    assert 4 * n / parse("int4").nbytes(n) > 7.7
    assert 4 * n / parse("sign").nbytes(n) > 31
    assert 4 * n / parse("topk(0.01)").nbytes(n) > 75
    assert 4 * n / parse("topk(0.01)|int4").nbytes(n) > 240
    assert 4 * n / parse("randomk(0.01)").nbytes(n) > 99.9
