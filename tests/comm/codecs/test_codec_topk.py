"""topk: exactly k values, exactly the largest, ties spread, whatever the threshold's sample saw; its layout."""

import struct
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from battery import EXAMPLES, gradient, normal, same, same_bits, tame
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from commpress.comm.codecs import parse
from commpress.comm.codecs.topk import TopK
from commpress.comm.coding import clear, encode


def read(payload: bytes, n: int, k: int) -> tuple[list[int], bytes]:
    """The positions as the docstring draws them, a bit at a time, and the payload of the values."""
    low_bits = max(low for low in range(60) if k << low <= n)
    high_at = -(-k * low_bits // 32) * 4
    values_at = high_at + -(-(k + (n >> low_bits) + 1) // 32) * 4

    def bit(start: int, i: int) -> int:
        return payload[start + i // 8] >> i % 8 & 1

    ones = [i for i in range(8 * (values_at - high_at)) if bit(high_at, i)]
    low = [sum(bit(0, i * low_bits + b) << b for b in range(low_bits)) for i in range(k)]
    assert len(ones) == k
    return [(one - i << low_bits) + low[i] for i, one in enumerate(ones)], payload[values_at:]


def kept_positions(codec: TopK, x: Tensor) -> list[int]:
    return read(codec.encode(x).numpy().tobytes(), x.numel(), codec.kept(x.numel()))[0]


def check_selection(x: Tensor, ratio: float, residual: Tensor | None = None) -> None:
    """k = max(1, round(ratio * n)) distinct positions, the magnitudes that torch.topk finds, exact values."""
    n = x.numel()
    k = max(1, round(ratio * n))
    codec = TopK(ratio)
    total = x if residual is None else x + residual
    payload = encode(codec, x, None if residual is None else residual.clone())
    positions, values = read(payload.numpy().tobytes(), n, k)
    assert positions == sorted(set(positions))
    assert 0 <= positions[0] <= positions[-1] < n
    index = torch.tensor(positions)
    assert list(struct.unpack(f"<{k}f", values)) == total[index].tolist()
    assert torch.equal(total[index].abs().sort().values, total.abs().topk(k).values.sort().values)
    expected = torch.zeros(n)
    expected[index] = total[index]
    assert same(codec.decode(payload, n), expected)


# --- which values are kept ---------------------------------------------------------------------------------------


@EXAMPLES
@given(
    hnp.arrays(np.float32, st.integers(1, 500), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from([0.001, 0.01, 0.1, 0.3, 0.5, 0.99, 1.0]),
)
def test_the_k_largest_of_anything(values: NDArray[np.float32], ratio: float) -> None:
    check_selection(torch.from_numpy(values), ratio)


@EXAMPLES
@given(hnp.arrays(np.int8, st.integers(1, 500), elements=st.integers(-3, 3)), st.sampled_from([0.01, 0.1, 0.5, 0.9]))
def test_the_k_largest_among_many_equal_ones(values: NDArray[np.int8], ratio: float) -> None:
    check_selection(torch.from_numpy(values).float(), ratio)


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(1, 30_000), st.floats(1e-4, 1.0), st.booleans())
def test_the_k_largest_of_gradients(seed: int, n: int, ratio: float, feedback: bool) -> None:
    check_selection(gradient(n, seed), ratio, gradient(n, seed + 1) if feedback else None)


@pytest.mark.parametrize("name", sorted(tame(1)))
def test_the_k_largest_of_hard_inputs(name: str) -> None:
    for ratio in (0.001, 0.01, 0.1, 0.5):
        check_selection(tame(100_003)[name], ratio)


def sampled_places(n: int) -> Tensor:
    """Where the threshold's sample looks: one place in each of m strata, hashed. (Aims the tests, promises nothing.)"""
    m = min(n, max(4096, min(32768, n // 64)))
    s = torch.arange(m)
    low, high = s * n // m, (s + 1) * n // m
    return low + s * 2654435761 % 4294967296 % (high - low)


def adversaries(n: int) -> Iterator[tuple[str, Tensor]]:
    """Inputs whose sample says nothing about the rest, and those of regular patterns."""
    g, i, places = normal(n), torch.arange(n), sampled_places(n)
    seen = torch.zeros(n, dtype=torch.bool)
    seen[places] = True
    yield "all large ones are seen", torch.where(seen, 1000 + g, g)
    yield "no large one is seen", torch.where(seen, 1e-3 * g, g)
    yield "zero wherever seen", torch.where(seen, 0.0, g)
    yield "nonzero only where seen", torch.where(seen, g, 0.0)
    yield "one level where seen, another elsewhere", torch.where(seen, 2.0, 1.0)
    for share in (0.004, 0.02, 0.2):
        yield f"first {share:.1%}", torch.where(i < share * n, 100 + g, g)
        yield f"last {share:.1%}", torch.where(i >= n - share * n, 100 + g, g)
        yield f"only the last {share:.1%} not zero", torch.where(i >= n - share * n, g, 0.0)
    for stride in (n // 4096, n // 4096 + 1, 64, 100, 256, 1000):
        for phase in (0, stride - 1):
            yield f"every {stride}th from {phase}", torch.where(i % stride == phase, 100 + g, g)
    yield "falling", (n - i).float()
    yield "one value", torch.where(i == 77_777, 1.0, 0.0)
    yield "last value", torch.where(i == n - 1, 1.0, 0.0)


def test_the_k_largest_against_an_adversary_of_the_sample() -> None:
    for name, x in adversaries(100_000):
        print(name)  # which one failed
        for ratio in (0.001, 0.01, 0.1):
            check_selection(x, ratio)
        check_selection(0.5 * x, 0.01, 0.5 * x.clone())


def test_kept_is_the_rounded_share_and_at_least_one() -> None:
    for n, ratio in product((1, 2, 3, 10, 149, 150, 250, 1000, 99_999), (1e-9, 0.001, 0.01, 0.25, 0.5, 1.0)):
        codec = TopK(ratio)
        assert codec.kept(n) == max(1, round(ratio * n))
        x = torch.arange(1, n + 1).float()
        assert codec.decode(codec.encode(x), n).count_nonzero() == codec.kept(n)


def test_nothing_is_kept_of_nothing() -> None:
    assert TopK(0.5).kept(0) == 0
    assert TopK(0.5).nbytes(0) == 0


def test_all_of_an_embedding_arrives_if_it_is_sparser_than_the_share() -> None:
    x = torch.zeros(2000, 64)
    rows = torch.tensor([0, 3, 77, 1200, 1999])
    x[rows] = normal(5 * 64).view(5, 64)
    flat = x.view(-1)
    residual = torch.zeros_like(flat)
    codec = parse("topk(0.01)")
    assert torch.equal(codec.decode(encode(codec, flat, residual), flat.numel()), flat)
    assert (residual == 0).all()


def test_nan_and_inf_are_kept_before_all_else() -> None:
    x = normal(1000)
    x[[10, 500, 990]] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    assert kept_positions(TopK(0.003), x) == [10, 500, 990]
    assert set(kept_positions(TopK(0.1), x)) > {10, 500, 990}


@pytest.mark.parametrize("spec", ["topk(0.002)", "topk(0.002)|int4", "topk(0.002)|sign", "topk(0.002)|fp16"])
def test_where_more_are_nan_or_inf_than_can_be_named_all_decode_to_nan(spec: str) -> None:
    codec = parse(spec)
    assert isinstance(codec, TopK)
    x, before, momentum = normal(1000), gradient(1000, seed=1), torch.ones(1000)
    x[[10, 500, 990]] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    residual = before.clone()
    payload = encode(codec, x, residual)
    assert not payload[: -codec.values.nbytes(2)].any()
    assert codec.decode(payload, 1000).isnan().all()
    assert codec.mean(torch.cat([codec.encode(normal(1000)), payload]), 1000, 2).isnan().all()
    assert ((residual - before).abs() <= 2.0**-23 * (x + before).abs().nan_to_num(0, 0, 0)).all()
    clear(codec, payload, momentum)
    assert (momentum == 0).all()


def test_residuals_of_infs_and_nans_that_were_not_sent_stay_as_they_were() -> None:
    """More NaN than places: the Infs are below the threshold, and must not enter the residual either."""
    x = normal(10_000)
    x[::20] = torch.nan
    x[7::20] = torch.inf
    residual = gradient(10_000, seed=1)
    before = residual.clone()
    encode(TopK(0.01), x, residual)
    spoilt = ~x.isfinite()
    assert same_bits(residual[spoilt], before[spoilt])
    assert residual.isfinite().all()


# --- ties --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.integers(1, 5000), st.floats(0.001, 1.0), st.sampled_from([0.0, 1.0, -2.5]))
def test_of_equal_values_the_kept_ones_stand_at_even_distances(n: int, ratio: float, value: float) -> None:
    codec = TopK(ratio)
    k = codec.kept(n)
    positions = kept_positions(codec, torch.full((n,), value))
    gaps = np.diff([-1, *positions])
    assert len(positions) == k
    assert set(gaps.tolist()) <= {n // k, -(-n // k)}
    assert positions[-1] == n - 1


def test_ties_are_spread_among_larger_values() -> None:
    x = torch.where(torch.arange(10_000) % 4 == 0, 1.0, 0.0)
    x[:50] = 2.0
    positions = np.array(kept_positions(TopK(0.01), x))
    ties = positions[positions >= 50]
    assert len(ties) == 50
    assert np.diff(ties).max() - np.diff(ties).min() <= 4


@pytest.mark.parametrize(("n", "ratio"), [(1000, 0.1), (1000, 0.5), (150, 0.02), (20_000, 0.01), (100_000, 0.05)])
def test_with_feedback_every_position_of_an_equal_gradient_is_sent_equally_often(n: int, ratio: float) -> None:
    """Here k divides n: every n / k steps each position is sent once."""
    codec = TopK(ratio)
    residual, sent = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    for _ in range(3 * n // codec.kept(n)):
        sent += codec.decode(encode(codec, torch.ones(n), residual), n) != 0
        assert sent.max() - sent.min() <= 1
    assert (sent == 3).all()


@pytest.mark.parametrize(("n", "ratio"), [(997, 0.1), (1000, 0.03), (1009, 0.37), (1000, 0.7), (20_011, 0.05)])
def test_with_feedback_no_position_of_an_equal_gradient_waits_longer_than_n_over_k_steps(n: int, ratio: float) -> None:
    codec = TopK(ratio)
    residual = torch.zeros(n)
    turn = -(-n // codec.kept(n))
    for _ in range(5 * turn):
        encode(codec, torch.ones(n), residual)
        assert residual.max() < turn


# --- payload -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["topk(0.01)", "topk(0.1)|int4", "topk(0.05)|sign", "topk(0.5)|bf16"])
@pytest.mark.parametrize("n", [1, 2, 7, 257, 1025, 30_000])
def test_layout_is_the_documented_one(spec: str, n: int) -> None:
    codec = parse(spec)
    assert isinstance(codec, TopK)
    x = gradient(n)
    k = codec.kept(n)
    payload = codec.encode(x)
    positions, values = read(payload.numpy().tobytes(), n, k)
    assert values == codec.values.encode(x[torch.tensor(positions)]).numpy().tobytes()
    decoded = codec.decode(payload, n)
    expected = torch.zeros(n)
    expected[torch.tensor(positions)] = codec.values.decode(codec.values.encode(x[torch.tensor(positions)]), k)
    assert same(decoded, expected)


def test_the_second_stage_leaves_its_error_in_the_residual() -> None:
    codec = parse("topk(0.1)|int4")
    x, residual = gradient(5000), torch.zeros(5000)
    decoded = codec.decode(encode(codec, x, residual), 5000)
    kept = decoded != 0
    assert (residual[kept] != 0).any()
    assert torch.equal(residual[~kept], x[~kept])


def test_a_finite_value_beside_a_nan_keeps_its_old_residual_to_rounding() -> None:
    """int8 spoils the whole block of kept values: nothing of them arrives, so nothing may leave the residual."""
    residual = torch.tensor([0.5, 1e-9, 0.25])
    codec = parse("topk(1)|int8")
    decoded = codec.decode(encode(codec, torch.tensor([3.0, 1.0, torch.nan]), residual), 3)
    assert decoded.isnan().all()
    assert residual[[0, 2]].tolist() == [0.5, 0.25]
    assert abs(residual[1] - 1e-9) <= 2.0**-23


def test_a_payload_without_its_positions_is_refused() -> None:
    codec = parse("topk(0.1)")
    empty = torch.zeros(codec.nbytes(100), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"topk\(0.1\): a payload of 100 values marks 0 positions, expected 10"):
        codec.decode(empty, 100)


@EXAMPLES
@given(st.binary(min_size=1, max_size=64), st.sampled_from(["topk(0.1)", "topk(0.01)|int4", "topk(0.5)|sign"]))
def test_garbage_is_refused_or_decoded_and_writes_nowhere_else(garbage: bytes, spec: str) -> None:
    codec, n = parse(spec), 1000
    size = codec.nbytes(n)
    payload = torch.frombuffer(bytearray((garbage * size)[:size]), dtype=torch.uint8)
    memory = torch.full((3 * n,), 5.0)
    refused = ""
    try:
        codec.decode(payload, n, memory[n : 2 * n])
    except ValueError as error:
        refused = str(error)
    assert refused == "" or "positions, expected" in refused
    assert (memory[:n] == 5).all()
    assert (memory[2 * n :] == 5).all()
