"""The battery: the checks that every codec must pass, whatever its family. A new codec is one line in CODECS.

A check is a function `codec -> None` whose name says what is promised; CODEC_CHECKS lists them, and
`tests/comm/codecs/test_every_codec.py` runs each on each spec. The definition in plain torch is the oracle.
"""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from commpress.comm.codecs import parse
from commpress.comm.codecs.base import FLOAT_DTYPES, Codec
from commpress.comm.codecs.blend import Blend
from commpress.comm.codecs.topk import TopK

CODECS: dict[str, float] = {
    # spec: the relative error |x - decode(encode(x))| / |x| that it stays below on a normal distribution
    "none": 1e-9,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "int8": 0.01,
    "int4": 0.15,
    "int2": 0.36,
    "sign": 0.62,
    "topk(0.001)": 0.995,
    "topk(0.01)": 0.965,
    "topk(0.1)": 0.76,
    "topk(1)": 1e-9,
    "topk(0.01)|int8": 0.965,
    "topk(0.1)|int4": 0.77,
    "topk(0.05)|int2": 0.86,
    "topk(0.05)|sign": 0.87,
    "topk(0.02)|bf16": 0.94,
    "topk(0.3)|fp16": 0.47,
    "topk(1)|int8": 0.01,
}
SPECS: tuple[str, ...] = tuple(CODECS)
LOSSY: tuple[str, ...] = tuple(spec for spec in SPECS if parse(spec).lossy)
LENGTHS: tuple[int, ...] = (0, 1, 2, 7, 255, 256, 257, 1023, 1024, 1025, 5000, 20_011)
LARGEST = float(torch.finfo(torch.float32).max)

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)
"""The hypothesis settings of all property tests: the same examples on every machine."""


# --- inputs ------------------------------------------------------------------------------------------------------


def normal(n: int, seed: int = 0) -> Tensor:
    """n normal values, float32."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def gradient(n: int, seed: int = 0) -> Tensor:
    """n values as a gradient has them: normal within a row of 64, the rows of very different size."""
    rows = torch.exp(2 * normal(-(-n // 64), seed + 1000)).repeat_interleave(64)[:n]
    return normal(n, seed) * rows


@cache
def tame(n: int) -> dict[str, Tensor]:
    """Finite inputs within the range of fp16. For reading only."""
    i, g = torch.arange(n), gradient(n)
    large = (100 * g).clamp(-6e4, 6e4)
    sign = torch.where(i % 3 == 0, -1.0, 1.0)
    return {
        "gradient": g,
        "zeros": torch.zeros(n),
        "negative zeros": -torch.zeros(n),
        "equal": torch.full((n,), 0.37),
        "equal magnitudes": 0.37 * sign,
        "few magnitudes": ((i * 7919) % 13 - 6) / 4.0,
        "halves": ((i * 31) % 29 - 14) / 2.0,
        "ascending": (i - n // 2) / 8.0,
        "embedding": torch.where(i // 64 % 97 == 3, g, 0.0),
        "large at the start": torch.where(i < n // 50, large, g),
        "large at the end": torch.where(i >= n - n // 50, large, g),
        "large in every stratum": torch.where(i % max(1, n // 4096) == 0, large, g),
        "one large": torch.where(i == n // 2, 6e4, g),
        "denormal": g * 1e-40,
        "around 2^-100": g * 2.0**-100,
    }


@cache
def wild(n: int) -> dict[str, Tensor]:
    """Inputs with values that overflow somewhere, or that are NaN or Inf from the start. For reading only."""
    i, g = torch.arange(n), gradient(n)
    nan_bits = torch.where(i % 2 == 0, 0x7FC00000, 0x7FC00000 + i % 1000 + 1).to(torch.int32)
    nans = nan_bits.view(torch.float32)
    return {
        "largest": torch.where(i % 2 == 0, LARGEST, -LARGEST),
        "one largest": torch.where(i == n // 2, LARGEST, g),
        "huge": 1e37 * g,
        "one nan": torch.where(i == n // 2, torch.nan, g),
        "one inf": torch.where(i == n // 3, -torch.inf, g),
        "some nan": torch.where((i * 7919) % 400 == 1, nans, g),
        "many nan and inf": torch.where(i % 7 == 1, nans, torch.where(i % 7 == 3, torch.inf, g)),
        "all nan": nans,
        "all inf": torch.full((n,), -torch.inf),
    }


def memories(x: Tensor) -> Iterator[Tensor]:
    """Residuals that fit `x`: none yet, and one of about its size."""
    yield torch.zeros_like(x)
    yield 0.25 * x.flip(0).nan_to_num(0.5, 3.0, -3.0)


# --- words for the checks ----------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and values; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal float32 tensors down to the sign of zero."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def defined_encode(codec: Codec, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The payload and the residual that the definition gives."""
    payload = torch.full((codec.nbytes(x.numel()),), 0x5A, dtype=torch.uint8)
    after = None if residual is None else residual.clone()
    if x.numel():
        codec._defined_encode(x, after, payload)
    return payload, after


def same_residual(codec: Codec, after: Tensor, expected: Tensor, total: Tensor, decoded: Tensor) -> bool:
    """Equal bit for bit; but where topk kept a finite value and its second stage made NaN or Inf of it, "stays as it
    was" is to the rounding of `x + residual`: the loop has overwritten the old residual with that sum by then."""
    spoilt = total.isfinite() & ~decoded.isfinite() & isinstance(codec, TopK)
    near = (after - expected).abs() <= 2.0**-23 * total.abs()
    return same_bits(after[~spoilt], expected[~spoilt]) and bool(near[spoilt].all())


def mixed_payloads(codec: Codec, n: int, count: int, finite: bool = True) -> Tensor:
    """The payloads of `count` different inputs, one behind the other."""
    sources = [gradient(n, seed=r) for r in range(count)]
    if not finite:
        sources[count // 2] = wild(n)["one nan"]
        sources[-1] = wild(n)["one inf"]
    return torch.cat([codec.encode(x) for x in sources])


# --- the checks: size, values ------------------------------------------------------------------------------------


def nbytes_is_the_length_of_every_payload(codec: Codec) -> None:
    assert codec.nbytes(0) == 0
    for n in LENGTHS:
        size = codec.nbytes(n)
        assert isinstance(size, int)
        assert size % 4 == 0
        for name, x in (tame(n) | wild(n)).items():
            payload = codec.encode(x)
            assert payload.dtype == torch.uint8, name
            assert payload.shape == (size,), f"{name}, n = {n}"
            assert payload.is_contiguous()
            if n:
                assert codec.define_encode(x).shape == (size,), f"{name}, n = {n}"


def nbytes_never_falls_as_values_are_added(codec: Codec) -> None:
    # A topk whose positions get one low bit more (at n / k = 2, 4, 8, ...) may save a word.
    slack = 4 if isinstance(codec, TopK) else 0
    sizes = [codec.nbytes(n) for n in range(3000)]
    assert all(after >= before - slack for before, after in pairwise(sizes))


def relative_error_stays_below_the_stated_one(codec: Codec) -> None:
    for seed in range(3):
        x = normal(50_000, seed)
        error = (codec.decode(codec.encode(x), x.numel()) - x).norm() / x.norm()
        assert error < CODECS[str(codec)]


def error_is_never_larger_than_the_input(codec: Codec) -> None:
    """|x - decode|^2 <= |x|^2: what error feedback needs in order to converge."""
    for n in LENGTHS:
        for name, x in tame(n).items():
            error = codec.decode(codec.encode(x), n).double() - x.double()
            assert error.square().sum() <= x.double().square().sum() * (1 + 1e-6), f"{name}, n = {n}"


def lossless_means_equal(codec: Codec) -> None:
    x = gradient(5000)
    exact = same_bits(codec.decode(codec.encode(x), 5000), x)
    assert exact == (CODECS[str(codec)] < 1e-8)
    assert exact or codec.lossy


# --- the checks: loops against the definition --------------------------------------------------------------------


def loops_encode_to_the_bytes_of_the_definition(codec: Codec) -> None:
    for n in LENGTHS:
        for name, x in (tame(n) | wild(n)).items():
            assert torch.equal(codec.encode(x), defined_encode(codec, x)[0]), f"{name}, n = {n}"


def loops_leave_the_residual_of_the_definition(codec: Codec) -> None:
    for n in LENGTHS:
        for name, x in (tame(n) | wild(n)).items():
            for before in memories(x):
                expected, expected_after = defined_encode(codec, x, before)
                after = before.clone()
                payload = codec.encode(x, after)
                assert expected_after is not None
                assert torch.equal(payload, expected), f"payload of {name}, n = {n}"
                decoded = codec.decode(payload, n)
                assert same_residual(codec, after, expected_after, x + before, decoded), f"residual of {name}, n = {n}"


def loops_decode_to_the_values_of_the_definition(codec: Codec) -> None:
    for n in LENGTHS[1:]:
        for name, x in (tame(n) | wild(n)).items():
            payload = codec.encode(x)
            assert same(codec.decode(payload, n), codec.define_decode(payload, n)), f"{name}, n = {n}"


def loops_give_the_mean_of_the_definition(codec: Codec) -> None:
    for n in LENGTHS[1:]:
        for count in range(1, 6):
            for finite in (True, False):
                payloads = mixed_payloads(codec, n, count, finite)
                expected = codec._defined_mean(payloads, n, count)
                assert same(codec.mean(payloads, n, count), expected), f"n = {n}, {count} payloads"


def loops_recode_to_the_bytes_of_the_definition(codec: Codec) -> None:
    def equal(payload: Tensor, expected: Tensor, n: int, finite: bool) -> bool:
        if finite:
            return torch.equal(payload, expected)
        return same(codec.decode(payload, n), codec.decode(expected, n))  # the sign of a NaN means nothing

    for n in LENGTHS[1:]:
        for count in (1, 2, 3, 5):
            for finite in (True, False):
                payloads = mixed_payloads(codec, n, count, finite)
                mean = codec._defined_mean(payloads, n, count)
                assert equal(codec.recode(payloads, n, count), defined_encode(codec, mean)[0], n, finite), f"n = {n}"
                for before in memories(gradient(n)):
                    expected, expected_after = defined_encode(codec, mean, before)
                    after = before.clone()
                    payload = codec.recode(payloads, n, count, after)
                    assert expected_after is not None
                    assert equal(payload, expected, n, finite), f"n = {n}, {count} payloads"
                    decoded = codec.decode(payload, n)
                    assert same_residual(codec, after, expected_after, mean + before, decoded), f"n = {n}"


def recode_is_encode_of_the_mean(codec: Codec) -> None:
    for n in LENGTHS:
        for sources in (["gradient", "equal", "negative zeros"], ["zeros", "negative zeros"], ["few magnitudes"]):
            count = len(sources)
            payloads = torch.cat([codec.encode(tame(n)[name]) for name in sources])
            before = gradient(n, seed=8)
            one, other = before.clone(), before.clone()
            expected = codec.encode(codec.mean(payloads, n, count), one)
            assert torch.equal(codec.recode(payloads, n, count, other), expected), f"{sources}, n = {n}"
            assert same_bits(one, other), f"{sources}, n = {n}"


def mean_of_equal_payloads_is_what_one_decodes_to(codec: Codec) -> None:
    payload = codec.encode(gradient(1025))
    one = codec.decode(payload, 1025)
    for count in (2, 4):  # shares that are powers of two add up exactly
        assert same(codec.mean(payload.repeat(count), 1025, count), one)


# --- the checks: feedback, NaN and Inf ---------------------------------------------------------------------------


def a_blend_is_coded_as_what_it_makes_of_the_values(codec: Codec) -> None:
    for n in LENGTHS:
        blend = Blend(0.5 + normal(n, 1).abs(), normal(n, 2), limit=1.5, fresh=0.1, kept=0.9)
        for name, x in (tame(n) | wild(n)).items():
            for before in (None, *memories(x)):
                values = x.clone()
                blend.apply(values)
                after, expected_after = (None if before is None else before.clone() for _ in range(2))
                expected = codec.encode(values, expected_after)
                assert torch.equal(codec.encode(x.clone(), after, blend=blend), expected), f"{name}, n = {n}"
                assert before is None or same_bits(after, expected_after), f"residual of {name}, n = {n}"


def residual_is_what_the_payload_misses(codec: Codec) -> None:
    """x + residual before = decode + residual after, to the rounding of one float32 subtraction."""
    for n in LENGTHS:
        for name, x in tame(n).items():
            for before in memories(x):
                after = before.clone()
                decoded = codec.decode(codec.encode(x, after), n)
                total = x + before
                finite = decoded.isfinite()  # fp16 overflows beyond 65504
                error = (decoded.double() + after.double() - total.double()).abs()
                allowed = 2.0**-23 * torch.maximum(decoded.abs(), total.abs()).double() + 2.0**-149
                assert (error <= allowed)[finite].all(), f"{name}, n = {n}"


def nan_and_inf_arrive_where_they_stood(codec: Codec) -> None:
    for n in (1, 7, 257, 5000):
        for bad in (torch.nan, torch.inf, -torch.inf):
            for at in (0, n // 2, n - 1):
                x = gradient(n)
                x[at] = bad
                decoded = codec.decode(codec.encode(x), n)
                assert not decoded[at].isfinite(), f"{bad} at {at} of {n} came out as {decoded[at]}"
                with_memory = codec.decode(codec.encode(x, gradient(n, seed=1)), n)
                assert not with_memory[at].isfinite(), f"{bad} at {at} of {n} came out as {with_memory[at]}"


def any_number_of_nan_and_inf_arrives_where_they_stood(codec: Codec) -> None:
    for n in LENGTHS[1:]:
        for name, x in wild(n).items():
            bad = ~x.isfinite()
            for before in (None, *memories(x)):
                decoded = codec.decode(codec.encode(x, before), n)
                assert not decoded[bad].isfinite().any(), f"{name}, n = {n}"


def nan_and_inf_reach_the_mean(codec: Codec) -> None:
    """And what is coded of it anew, though several payloads may name more places than one can."""
    for n in (300, 5000):
        xs = [gradient(n, seed=r) for r in range(3)]
        for r, x in enumerate(xs):
            x[r :: n // 5] = torch.inf
        payloads = torch.cat([codec.encode(x) for x in xs])
        bad = ~torch.stack(xs).isfinite().all(dim=0)
        assert not codec.mean(payloads, n, 3)[bad].isfinite().any()
        for before in (None, torch.zeros(n), gradient(n, seed=3)):
            decoded = codec.decode(codec.recode(payloads, n, 3, before), n)
            assert not decoded[bad].isfinite().any()
            assert before is None or before.isfinite().all()


def nan_and_inf_never_enter_the_residual(codec: Codec) -> None:
    """Where the payload decodes to NaN or Inf, or where x itself is, the old residual stays."""
    for n in LENGTHS:
        for name, x in wild(n).items():
            for before in memories(x):
                after = before.clone()
                decoded = codec.decode(codec.encode(x, after), n)
                assert after.isfinite().all(), f"{name}, n = {n}"
                total = x + before
                spoilt = ~decoded.isfinite() | ~total.isfinite()
                parts = (after[spoilt], before[spoilt], total[spoilt], decoded[spoilt])
                assert same_residual(codec, *parts), f"{name}, n = {n}"


# --- the checks: dtypes, memory, threads -------------------------------------------------------------------------


def every_float_dtype_is_coded_as_its_float32(codec: Codec) -> None:
    for n in (1, 257, 5000):
        for dtype in FLOAT_DTYPES:
            x = gradient(n).to(dtype)
            payload = codec.encode(x)
            assert torch.equal(payload, codec.encode(x.float())), dtype
            one, other = gradient(n, seed=1), gradient(n, seed=1)
            assert torch.equal(codec.encode(x, one), codec.encode(x.float(), other)), dtype
            assert same_bits(one, other), dtype
            out = torch.full((n,), 7, dtype=dtype)
            assert codec.decode(payload, n, out) is out
            assert same(out, codec.decode(payload, n).to(dtype)), dtype
            several = mixed_payloads(codec, n, 3)
            assert same(codec.mean(several, n, 3, out), codec.mean(several, n, 3).to(dtype)), dtype


def bytes_depend_on_nothing_but_the_values(codec: Codec) -> None:
    """Not on what stood in `out`, not on where it lies; and nothing beside the outputs is written."""
    for n in (1, 2, 7, 255, 257, 1023, 1025, 5000):
        x, before = gradient(n), gradient(n, seed=1)
        size, first = codec.nbytes(n), codec.encode(x, before.clone())
        several = mixed_payloads(codec, n, 2)
        for garbage in (0x00, 0xFF, 0x5A):
            for start in (4, 64):
                memory = torch.full((size + 128,), garbage, dtype=torch.uint8)
                floats = torch.full((n + 128,), garbage / 3.0)
                payload, residual = memory[start : start + size], floats[start + 1 : start + 1 + n]
                residual.copy_(before)
                x_place = torch.full((n + 128,), torch.nan)
                x_place[start + 3 : start + 3 + n] = x
                assert codec.encode(x_place[start + 3 : start + 3 + n], residual, payload) is payload
                assert torch.equal(payload, first), f"n = {n}"
                outside = torch.cat([memory[:start], memory[start + size :]])
                assert (outside == garbage).all(), f"n = {n}"
                outside_floats = torch.cat([floats[: start + 1], floats[start + 1 + n :]])
                assert (outside_floats == garbage / 3.0).all(), f"n = {n}"

                codec.recode(several, n, 2, out=payload)
                assert torch.equal(payload, codec.recode(several, n, 2)), f"n = {n}"
                codec.mean(several, n, 2, residual)
                assert same(residual, codec.mean(several, n, 2)), f"n = {n}"
                outside = torch.cat([memory[:start], memory[start + size :]])
                assert (outside == garbage).all(), f"n = {n}"
                outside_floats = torch.cat([floats[: start + 1], floats[start + 1 + n :]])
                assert (outside_floats == garbage / 3.0).all(), f"n = {n}"


def inputs_are_left_as_they_were(codec: Codec) -> None:
    for n in (7, 5000):
        x = gradient(n)
        payloads = mixed_payloads(codec, n, 2)
        x_before, payloads_before = x.clone(), payloads.clone()
        codec.encode(x)
        codec.encode(x, gradient(n, seed=1))
        codec.mean(payloads, n, 2)
        codec.recode(payloads, n, 2)
        codec.recode(payloads, n, 2, gradient(n, seed=1))
        assert same_bits(x, x_before)
        assert torch.equal(payloads, payloads_before)


def a_tensor_that_requires_grad_is_coded_as_its_values(codec: Codec) -> None:
    x = gradient(300)
    payload = codec.encode(x.clone().requires_grad_())
    assert torch.equal(payload, codec.encode(x))
    assert not codec.decode(payload, 300).requires_grad


def threads_at_work_together_give_the_same_bytes(codec: Codec) -> None:
    n, jobs = 20_000, 16

    def work(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual = gradient(n, seed=seed + 100)
        payload = codec.encode(gradient(n, seed), residual)
        pair = torch.cat([payload, payload])
        return payload, residual, codec.decode(payload, n), codec.recode(pair, n, 2)

    alone = [work(seed) for seed in range(jobs)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(jobs)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def a_cut_at_the_granularity_changes_nothing(codec: Codec) -> None:
    x = gradient(5000)
    for cut in (codec.granularity, 3 * codec.granularity):
        whole = torch.cat([codec.decode(codec.encode(part), part.numel()) for part in (x[:cut], x[cut:])])
        if isinstance(codec, TopK):  # but here each part keeps its own share
            assert whole[:cut].count_nonzero() <= codec.kept(cut)
            assert 0 < whole[cut:].count_nonzero() <= codec.kept(5000 - cut)
        else:
            assert same(whole, codec.decode(codec.encode(x), 5000))


def payloads_of_a_linear_codec_may_be_summed(codec: Codec) -> None:
    if codec.sum_dtype is None:
        assert codec.exchange != "all_reduce"  # only what may be summed can be all-reduced
        return
    for n in (1, 2, 7, 1025):
        a, b = codec.encode(gradient(n)), codec.encode(gradient(n, seed=1))
        total = (a.view(codec.sum_dtype) + b.view(codec.sum_dtype)).view(torch.uint8)
        expected = (codec.decode(a, n) + codec.decode(b, n)).to(codec.sum_dtype).float()
        assert same(codec.decode(total, n), expected)


# --- the checks: errors ------------------------------------------------------------------------------------------


def wrong_values_are_refused_with_a_sentence(codec: Codec) -> None:
    x = gradient(300)
    for wrong in (torch.arange(300), torch.ones(300, dtype=torch.bool), torch.ones(300, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=f"x has dtype {wrong.dtype}, expected one of float32, float64"):
            codec.encode(wrong)
    for shaped in (x.view(3, 100), x[::2], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=re.escape(f"x has shape {tuple(shaped.shape)}") + ".*contiguous 1-D"):
            codec.encode(shaped)


def a_wrong_residual_is_refused_and_untouched(codec: Codec) -> None:
    x = gradient(300)
    with pytest.raises(TypeError, match=r"residual has dtype torch.float64, expected torch.float32"):
        codec.encode(x, torch.zeros(300, dtype=torch.float64))
    payload = codec.encode(x)
    for size in (0, 299, 301):
        residual = torch.full((size,), 5.0)
        with pytest.raises(ValueError, match=r"residual has shape .* expected a contiguous 1-D tensor of 300 values"):
            codec.encode(x, residual)
        with pytest.raises(ValueError, match=r"residual has shape .* expected a contiguous 1-D tensor of 300 values"):
            codec.recode(payload, 300, 1, residual)
        assert (residual == 5).all()
    with pytest.raises(ValueError, match="residual has shape"):
        codec.encode(x, torch.zeros(600)[::2])


def a_wrong_payload_is_refused_with_a_sentence(codec: Codec) -> None:
    payload = codec.encode(gradient(300))
    size = payload.numel()
    wanted = re.escape(str(codec)) + r": 1 payload\(s\) of 300 values are a contiguous 1-D uint8 tensor of "
    wrong = (
        payload[:-4],
        torch.cat([payload, payload[:4]]),
        payload.to(torch.int8),
        payload.view(2, -1),
        payload.repeat_interleave(2)[::2],
        payload[:0],
    )
    for bad in wrong:
        for call in (
            lambda: codec.decode(bad, 300),  # noqa: B023
            lambda: codec.recode(bad, 300, 1),  # noqa: B023
            lambda: codec.encode(gradient(300), out=bad),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"{wanted}{size} bytes, got {re.escape(str(bad.dtype))}"):
                call()
    with pytest.raises(ValueError, match=rf"2 payload\(s\) of 300 values .* of {2 * size} bytes"):
        codec.mean(payload, 300, 2)
    with pytest.raises(ValueError, match=r"number of values must not be negative, got -1"):
        codec.decode(payload, -1)


def a_mean_of_nothing_is_refused(codec: Codec) -> None:
    for count in (0, -1):
        for call in (codec.mean, codec.recode):
            with pytest.raises(ValueError, match=f"at least 1, got {count}"):
                call(torch.empty(0, dtype=torch.uint8), 300, count)


def a_wrong_out_is_refused_with_a_sentence(codec: Codec) -> None:
    payload = codec.encode(gradient(300))
    with pytest.raises(TypeError, match=r"out has dtype torch.int32"):
        codec.decode(payload, 300, torch.zeros(300, dtype=torch.int32))
    for out in (torch.zeros(299), torch.zeros(3, 100), torch.zeros(600)[::2]):
        with pytest.raises(ValueError, match=r"out has shape .* expected a contiguous 1-D tensor of 300 values"):
            codec.decode(payload, 300, out)


# --- the checks: identity ----------------------------------------------------------------------------------------


def the_spec_round_trips(codec: Codec) -> None:
    assert str(codec) == codec.spec
    assert parse(str(codec)) == codec
    assert str(parse(str(codec))) == str(codec)
    assert parse(f"  {str(codec).replace('|', ' | ').replace('(', ' ( ').replace(')', ' ) ')} ") == codec
    assert parse(codec) is codec


def equal_settings_are_equal_codecs(codec: Codec) -> None:
    twin = parse(str(codec))
    assert twin is not codec
    assert twin == codec
    assert hash(twin) == hash(codec)
    assert copy.deepcopy(codec) == codec
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert [spec for spec in SPECS if parse(spec) == codec] == [str(codec)]


def the_repr_can_be_evaluated(codec: Codec) -> None:
    from commpress.comm.codecs import FAMILIES

    assert eval(repr(codec), {family.__name__: family for family in FAMILIES}) == codec


def a_codec_cannot_be_changed(codec: Codec) -> None:
    with pytest.raises(AttributeError):
        codec.bits = 3  # type: ignore[attr-defined]
    for field in codec.__dataclass_fields__:  # type: ignore[attr-defined]
        with pytest.raises(AttributeError):
            setattr(codec, field, None)


CODEC_CHECKS: tuple[Callable[[Codec], None], ...] = (
    nbytes_is_the_length_of_every_payload,
    nbytes_never_falls_as_values_are_added,
    relative_error_stays_below_the_stated_one,
    error_is_never_larger_than_the_input,
    lossless_means_equal,
    loops_encode_to_the_bytes_of_the_definition,
    loops_leave_the_residual_of_the_definition,
    loops_decode_to_the_values_of_the_definition,
    loops_give_the_mean_of_the_definition,
    loops_recode_to_the_bytes_of_the_definition,
    recode_is_encode_of_the_mean,
    a_blend_is_coded_as_what_it_makes_of_the_values,
    mean_of_equal_payloads_is_what_one_decodes_to,
    residual_is_what_the_payload_misses,
    nan_and_inf_arrive_where_they_stood,
    any_number_of_nan_and_inf_arrives_where_they_stood,
    nan_and_inf_reach_the_mean,
    nan_and_inf_never_enter_the_residual,
    every_float_dtype_is_coded_as_its_float32,
    bytes_depend_on_nothing_but_the_values,
    inputs_are_left_as_they_were,
    a_tensor_that_requires_grad_is_coded_as_its_values,
    threads_at_work_together_give_the_same_bytes,
    a_cut_at_the_granularity_changes_nothing,
    payloads_of_a_linear_codec_may_be_summed,
    wrong_values_are_refused_with_a_sentence,
    a_wrong_residual_is_refused_and_untouched,
    a_wrong_payload_is_refused_with_a_sentence,
    a_mean_of_nothing_is_refused,
    a_wrong_out_is_refused_with_a_sentence,
    the_spec_round_trips,
    equal_settings_are_equal_codecs,
    the_repr_can_be_evaluated,
    a_codec_cannot_be_changed,
)
