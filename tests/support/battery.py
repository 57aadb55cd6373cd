"""The battery: the checks that every codec must pass, whatever its family, on every device that has kernels.

A new codec is one line in CODECS; a new device is there as soon as `commpress/kernels/table.py` knows it and the machine has
one. A check is a function `subject -> None` whose name says what is promised; CODEC_CHECKS lists them, and
`tests/comm/codecs/test_every_codec.py` runs all on each spec and device. The definition in plain torch is the oracle.
"""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.codecs.base import Codec
from commpress.comm.codecs.random_k import RandomK
from commpress.comm.codecs.topk import TopK
from commpress.comm.coding import FLOAT_DTYPES, encode, recode
from commpress.comm.prologue import Ahead, Prologue
from commpress.kernels import table

CODECS: dict[str, float] = {
    # spec: the relative error |x - decode(encode(x))| / |x| that it stays below on a normal distribution
    "none": 1e-9,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "fp8": 0.03,
    "fp8(e5m2)": 0.06,
    "int8": 0.01,
    "int8(stochastic)": 0.012,
    "int4": 0.15,
    "int4(stochastic)": 0.2,
    "int2": 0.36,
    "sign": 0.62,
    "topk(0.001)": 0.995,
    "topk(0.01)": 0.965,
    "topk(0.1)": 0.76,
    "topk(1)": 1e-9,
    "topk(0.01)|int8": 0.965,
    "topk(0.1)|fp8": 0.77,
    "topk(0.1)|int4": 0.77,
    "topk(0.05)|int2": 0.86,
    "topk(0.05)|sign": 0.87,
    "topk(0.02)|bf16": 0.94,
    "topk(0.3)|fp16": 0.47,
    "topk(1)|int8": 0.01,
    "randomk(0.01)": 0.998,
    "randomk(0.1)": 0.96,
    "randomk(1)": 1e-9,
    "randomk(0.2)|int4": 0.92,
    "randomk(0.3)|fp16": 0.86,
    "rotate|int4": 0.15,
    "rotate|int2": 0.36,
    "rotate|sign": 0.62,
}
SPECS: tuple[str, ...] = tuple(CODECS)
LOSSY: tuple[str, ...] = tuple(spec for spec in SPECS if parse(spec).lossy)
DEVICES: tuple[str, ...] = tuple(table.devices())
"""Devices of this machine that have kernels."""
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
    payload = torch.full((codec.nbytes(x.numel()),), 0x5A, dtype=torch.uint8, device=x.device)
    after = None if residual is None else residual.clone()
    if x.numel():
        coding.defined_encode(codec, x, after, payload)
    return payload, after


def same_residual(codec: Codec, after: Tensor, expected: Tensor, total: Tensor, decoded: Tensor) -> bool:
    """Equal bit for bit; but where a sparse codec kept a finite value and its second stage made NaN or Inf of it, "stays as
    it was" is to the rounding of `x + residual`: the loop has overwritten the old residual with that sum by then."""
    if same_bits(after, expected) or not codec.sparse:
        return same_bits(after, expected)
    spoilt = total.isfinite() & ~decoded.isfinite()
    near = (after - expected).abs() <= 2.0**-23 * total.abs()
    return same_bits(after[~spoilt], expected[~spoilt]) and bool(near[spoilt].all())


class Coded(NamedTuple):
    """An input after its encoding: the payload, the residual (None without feedback), and the payload decoded again."""

    payload: Tensor
    after: Tensor | None
    decoded: Tensor


class Definition:
    """The definition of a codec, which remembers what it has made of what: many inputs are the same bytes in the end."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self.nbytes = codec, codec.nbytes
        self._known: dict[tuple[object, ...], Tensor] = {}

    def define_encode(self, x: Tensor) -> Tensor:
        return self._remembered(("encode", x.cpu().numpy().tobytes()), lambda: self._codec.define_encode(x))

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        key = ("decode", payload.cpu().numpy().tobytes(), n)
        return self._remembered(key, lambda: self._codec.define_decode(payload, n))

    def define_mean(self, payloads: Tensor, n: int, count: int) -> Tensor:
        define: Any = type(self._codec).define_mean
        mean: Tensor = define(self if define is Codec.define_mean else self._codec, payloads, n, count)
        return mean

    def _remembered(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


class Subject:
    """A codec on a device, and what has been encoded of it so far: the checks share encodings. For reading only."""

    def __init__(self, codec: Codec, device: str) -> None:
        self.codec, self.device = codec, device
        self.definition: Any = Definition(codec)
        self._inputs: dict[int, dict[str, Tensor]] = {}
        self._before: dict[tuple[int, str], list[Tensor]] = {}
        self._coded: dict[tuple[object, ...], Coded] = {}
        self._payloads: dict[tuple[object, ...], Tensor] = {}

    def inputs(self, n: int) -> dict[str, Tensor]:
        """All inputs of n values, by name."""
        if n not in self._inputs:
            self._inputs[n] = {name: x.to(self.device) for name, x in (tame(n) | wild(n)).items()}
        return self._inputs[n]

    def gradient(self, n: int, seed: int = 0) -> Tensor:
        """Return `gradient` as a new tensor on this device."""
        return gradient(n, seed).to(self.device)

    def before(self, n: int, name: str, memory: int | None) -> Tensor | None:
        """The residual before the encoding, or None. For reading only."""
        if memory is None:
            return None
        if (n, name) not in self._before:
            self._before[n, name] = list(memories(self.inputs(n)[name]))
        return self._before[n, name][memory]

    def encoded(self, n: int, name: str, memory: int | None = None) -> Coded:
        """An input by the kernels; `memory` says with which of the `memories`."""
        key = ("kernels", n, name, memory)
        if key not in self._coded:
            before = self.before(n, name, memory)
            after = None if before is None else before.clone()
            payload = encode(self.codec, self.inputs(n)[name], after)
            self._coded[key] = Coded(payload, after, self.codec.decode(payload, n))
        return self._coded[key]

    def defined(self, n: int, name: str, memory: int | None = None) -> Coded:
        """The same input by the definition."""
        key = ("definition", n, name, memory)
        if key not in self._coded:
            x = self.inputs(n)[name]
            payload, after = defined_encode(self.definition, x, self.before(n, name, memory))
            self._coded[key] = Coded(payload, after, self.definition.define_decode(payload, n) if n else x)
        return self._coded[key]

    def payloads(self, n: int, count: int, finite: bool = True) -> Tensor:
        """The payloads of `count` different inputs, one behind the other."""
        sources: list[tuple[str, int]] = [("gradient", r) for r in range(count)]
        if not finite:
            sources[count // 2], sources[-1] = ("one nan", 0), ("one inf", 0)
        return torch.cat([self._payload(n, name, seed) for name, seed in sources])

    def _payload(self, n: int, name: str, seed: int) -> Tensor:
        if name != "gradient":
            return self.encoded(n, name).payload
        if (n, seed) not in self._payloads:
            self._payloads[n, seed] = self.codec.encode(self.gradient(n, seed))
        return self._payloads[n, seed]

    def defined_mean(self, n: int, count: int, finite: bool = True) -> Tensor:
        """The mean of `payloads` by the definition."""
        key = ("mean", n, count, finite)
        if key not in self._payloads:
            self._payloads[key] = coding.defined_mean(self.definition, self.payloads(n, count, finite), n, count)
        return self._payloads[key]


Check = Callable[[Subject], None]


def memories_at(n: int) -> tuple[int, ...]:
    """Names of the `memories` that n values are coded with: to a loop, an empty one is a value like others."""
    return (0, 1) if n in (7, 257, 5000) else (1,)


# --- the checks: size, values ------------------------------------------------------------------------------------


def nbytes_is_the_length_of_every_payload(subject: Subject) -> None:
    codec = subject.codec
    assert codec.nbytes(0) == 0
    for n in LENGTHS:
        size = codec.nbytes(n)
        assert isinstance(size, int)
        assert size % 4 == 0
        for name, x in subject.inputs(n).items():
            payload = subject.encoded(n, name).payload
            assert payload.dtype == torch.uint8, name
            assert payload.shape == (size,), f"{name}, n = {n}"
            assert payload.is_contiguous()
            assert payload.device == x.device
            if n:
                assert subject.definition.define_encode(x).shape == (size,), f"{name}, n = {n}"


def nbytes_never_falls_as_values_are_added(subject: Subject) -> None:
    # A sparse codec whose positions get one low bit more (at n / k = 2, 4, 8, ...) may save a word.
    slack = 4 if subject.codec.sparse else 0
    sizes = [subject.codec.nbytes(n) for n in range(3000)]
    assert all(after >= before - slack for before, after in pairwise(sizes))


def relative_error_stays_below_the_stated_one(subject: Subject) -> None:
    codec = subject.codec
    for seed in range(3):
        x = normal(50_000, seed).to(subject.device)
        error = (codec.decode(codec.encode(x), x.numel()) - x).norm() / x.norm()
        assert error < CODECS[str(codec)]


def error_is_never_larger_than_the_input(subject: Subject) -> None:
    """|x - decode|^2 <= |x|^2: what error feedback needs in order to converge."""
    for n in LENGTHS:
        for name in tame(n):
            x = subject.inputs(n)[name].double()
            error = subject.encoded(n, name).decoded.double() - x
            assert error.square().sum() <= x.square().sum() * (1 + 1e-6), f"{name}, n = {n}"


def lossless_means_equal(subject: Subject) -> None:
    codec = subject.codec
    exact = same_bits(subject.encoded(5000, "gradient").decoded, subject.inputs(5000)["gradient"])
    assert exact == (CODECS[str(codec)] < 1e-8)
    assert exact or codec.lossy


# --- the checks: kernels against the definition ------------------------------------------------------------------


def kernels_encode_to_the_bytes_of_the_definition(subject: Subject) -> None:
    for n in LENGTHS:
        for name in subject.inputs(n):
            assert torch.equal(subject.encoded(n, name).payload, subject.defined(n, name).payload), f"{name}, n = {n}"


def kernels_leave_the_residual_of_the_definition(subject: Subject) -> None:
    for n in LENGTHS:
        for (name, x), memory in product(subject.inputs(n).items(), memories_at(n)):
            found, expected = subject.encoded(n, name, memory), subject.defined(n, name, memory)
            assert torch.equal(found.payload, expected.payload), f"payload of {name}, n = {n}"
            assert found.after is not None
            assert expected.after is not None
            total = x + subject.before(n, name, memory)
            alike = same_residual(subject.codec, found.after, expected.after, total, found.decoded)
            assert alike, f"residual of {name}, n = {n}"


def kernels_decode_to_the_values_of_the_definition(subject: Subject) -> None:
    for n in LENGTHS[1:]:
        for name in subject.inputs(n):
            found, expected = subject.encoded(n, name), subject.defined(n, name)
            assert torch.equal(found.payload, expected.payload), f"{name}, n = {n}"
            assert same(found.decoded, expected.decoded), f"{name}, n = {n}"


def kernels_give_the_mean_of_the_definition(subject: Subject) -> None:
    for n in LENGTHS[1:]:
        for count, finite in product(range(1, 6), (True, False)):
            found = subject.codec.mean(subject.payloads(n, count, finite), n, count)
            assert same(found, subject.defined_mean(n, count, finite)), f"n = {n}, {count} payloads"


def kernels_recode_to_the_bytes_of_the_definition(subject: Subject) -> None:
    codec = subject.codec

    def equal(payload: Tensor, expected: Tensor, n: int, finite: bool) -> bool:
        if finite:
            return torch.equal(payload, expected)
        return same(codec.decode(payload, n), codec.decode(expected, n))  # the sign of a NaN means nothing

    for n in LENGTHS[1:]:
        for count, finite in product((1, 2, 5), (True, False)):
            payloads, mean = subject.payloads(n, count, finite), subject.defined_mean(n, count, finite)
            assert equal(recode(codec, payloads, n, count), defined_encode(subject.definition, mean)[0], n, finite), (
                f"n = {n}"
            )
            for memory in memories_at(n):
                before = subject.before(n, "gradient", memory)
                assert before is not None
                expected, expected_after = defined_encode(subject.definition, mean, before)
                after = before.clone()
                payload = recode(codec, payloads, n, count, after)
                assert expected_after is not None
                assert equal(payload, expected, n, finite), f"n = {n}, {count} payloads"
                decoded = codec.decode(payload, n)
                assert same_residual(codec, after, expected_after, mean + before, decoded), f"n = {n}"


def recode_is_encode_of_the_mean(subject: Subject) -> None:
    codec = subject.codec
    for n in LENGTHS:
        for sources in (["gradient", "equal", "negative zeros"], ["zeros", "negative zeros"], ["few magnitudes"]):
            count = len(sources)
            payloads = torch.cat([subject.encoded(n, name).payload for name in sources])
            one, other = (subject.gradient(n, seed=8) for _ in range(2))
            expected = encode(codec, codec.mean(payloads, n, count), one)
            assert torch.equal(recode(codec, payloads, n, count, other), expected), f"{sources}, n = {n}"
            assert same_bits(one, other), f"{sources}, n = {n}"


def mean_of_equal_payloads_is_what_one_decodes_to(subject: Subject) -> None:
    one = subject.encoded(1025, "gradient")
    for count in (2, 4):  # shares that are powers of two add up exactly
        assert same(subject.codec.mean(one.payload.repeat(count), 1025, count), one.decoded)


# --- the checks: feedback, NaN and Inf ---------------------------------------------------------------------------


def a_prologue_is_coded_as_what_it_makes_of_the_values(subject: Subject) -> None:
    codec = subject.codec
    for n in (1, 7, 257, 1024, 5000):  # the loops behind it are those that all LENGTHS have been through
        inverse, average = (0.5 + normal(n, 1).abs()).to(subject.device), normal(n, 2).to(subject.device)
        prologue = Prologue(inverse, average, limit=1.5, fresh=0.1, kept=0.9)
        for name, x in subject.inputs(n).items():
            values = x.clone()
            prologue.apply(values)
            for memory in (None, *memories_at(n)):
                before = subject.before(n, name, memory)
                after, expected_after = (None if before is None else before.clone() for _ in range(2))
                expected = encode(codec, values.clone(), expected_after)
                assert torch.equal(encode(codec, x.clone(), after, prologue), expected), f"{name}, n = {n}"
                if after is not None and expected_after is not None:
                    assert same_bits(after, expected_after), f"residual of {name}, n = {n}"


def the_move_of_a_momentum_is_coded_as_in_a_pass_before(subject: Subject) -> None:
    codec = subject.codec
    for n in (1, 7, 257, 1024, 5000):
        for name, x in subject.inputs(n).items():
            fused, before = (Ahead(normal(n, 1).to(subject.device), 0.1) for _ in range(2))
            if not fused.fits(codec, x):
                continue
            values = x.clone()
            before.apply(values)
            for memory in memories_at(n):
                residual = subject.before(n, name, memory)
                assert residual is not None
                after, expected_after = residual.clone(), residual.clone()
                expected = encode(codec, values.clone(), expected_after)
                fused.momentum.copy_(normal(n, 1))
                assert torch.equal(encode(codec, x.clone(), after, fused), expected), f"{name}, n = {n}"
                assert same_bits(after, expected_after), f"residual of {name}, n = {n}"
                assert same_bits(fused.momentum, before.momentum), f"momentum of {name}, n = {n}"


def residual_is_what_the_payload_misses(subject: Subject) -> None:
    """x + residual before = decode + residual after, to the rounding of one float32 subtraction."""
    for n in LENGTHS:
        for name, memory in product(tame(n), memories_at(n)):
            found = subject.encoded(n, name, memory)
            assert found.after is not None
            total = subject.inputs(n)[name] + subject.before(n, name, memory)
            finite = found.decoded.isfinite()  # fp16 overflows beyond 65504
            error = (found.decoded.double() + found.after.double() - total.double()).abs()
            allowed = 2.0**-23 * torch.maximum(found.decoded.abs(), total.abs()).double() + 2.0**-149
            assert (error <= allowed)[finite].all(), f"{name}, n = {n}"


def nan_and_inf_arrive_where_they_stood(subject: Subject) -> None:
    codec = subject.codec
    for n in (1, 7, 257, 5000):
        for bad, at in product((torch.nan, torch.inf, -torch.inf), (0, n // 2, n - 1)):
            x = subject.gradient(n)
            x[at] = bad
            decoded = codec.decode(codec.encode(x), n)
            assert not decoded[at].isfinite(), f"{bad} at {at} of {n} came out as {decoded[at]}"
            with_memory = codec.decode(encode(codec, x, subject.gradient(n, seed=1)), n)
            assert not with_memory[at].isfinite(), f"{bad} at {at} of {n} came out as {with_memory[at]}"


def any_number_of_nan_and_inf_arrives_where_they_stood(subject: Subject) -> None:
    for n in LENGTHS[1:]:
        for name, memory in product(wild(n), (None, *memories_at(n))):
            bad = ~subject.inputs(n)[name].isfinite()
            assert not subject.encoded(n, name, memory).decoded[bad].isfinite().any(), f"{name}, n = {n}"


def nan_and_inf_reach_the_mean(subject: Subject) -> None:
    """Check that they reach the mean and its new code, though several payloads may name more places than one can."""
    codec = subject.codec
    for n in (300, 5000):
        xs = [subject.gradient(n, seed=r) for r in range(3)]
        for r, x in enumerate(xs):
            x[r :: n // 5] = torch.inf
        payloads = torch.cat([codec.encode(x) for x in xs])
        bad = ~torch.stack(xs).isfinite().all(dim=0)
        assert not codec.mean(payloads, n, 3)[bad].isfinite().any()
        for before in (None, torch.zeros_like(xs[0]), subject.gradient(n, seed=3)):
            decoded = codec.decode(recode(codec, payloads, n, 3, before), n)
            assert not decoded[bad].isfinite().any()
            assert before is None or before.isfinite().all()


def nan_and_inf_never_enter_the_residual(subject: Subject) -> None:
    """Where the payload decodes to NaN or Inf, or where x itself is, the old residual stays."""
    for n in LENGTHS:
        for name, memory in product(wild(n), memories_at(n)):
            _, after, decoded = subject.encoded(n, name, memory)
            before = subject.before(n, name, memory)
            assert after is not None
            assert before is not None
            assert after.isfinite().all(), f"{name}, n = {n}"
            total = subject.inputs(n)[name] + before
            spoilt = ~decoded.isfinite() | ~total.isfinite()
            parts = (after[spoilt], before[spoilt], total[spoilt], decoded[spoilt])
            assert same_residual(subject.codec, *parts), f"{name}, n = {n}"


# --- the checks: dtypes, memory, threads -------------------------------------------------------------------------


def every_float_dtype_is_coded_as_its_float32(subject: Subject) -> None:
    codec = subject.codec
    for n in (1, 257, 5000):
        for dtype in FLOAT_DTYPES:
            x = subject.gradient(n).to(dtype)
            payload = codec.encode(x)
            assert torch.equal(payload, codec.encode(x.float())), dtype
            one, other = subject.gradient(n, seed=1), subject.gradient(n, seed=1)
            assert torch.equal(encode(codec, x, one), encode(codec, x.float(), other)), dtype
            assert same_bits(one, other), dtype
            out = torch.full((n,), 7, dtype=dtype, device=subject.device)
            assert codec.decode(payload, n, out) is out
            assert same(out, codec.decode(payload, n).to(dtype)), dtype
            several = subject.payloads(n, 3)
            assert same(codec.mean(several, n, 3, out), codec.mean(several, n, 3).to(dtype)), dtype


def bytes_depend_on_nothing_but_the_values(subject: Subject) -> None:
    """Check that bytes depend neither on what was in `out` nor on its address, and that nothing else is written."""
    codec, here = subject.codec, subject.device
    for n in (1, 2, 7, 255, 257, 1023, 1025, 5000):
        x, before = subject.gradient(n), subject.gradient(n, seed=1)
        size, first = codec.nbytes(n), encode(codec, x, before.clone())
        several = subject.payloads(n, 2)
        for garbage in (0x00, 0xFF, 0x5A):
            for start in (4, 64):
                memory = torch.full((size + 128,), garbage, dtype=torch.uint8, device=here)
                floats = torch.full((n + 128,), garbage / 3.0, device=here)
                payload, residual = memory[start : start + size], floats[start + 1 : start + 1 + n]
                residual.copy_(before)
                x_place = torch.full((n + 128,), torch.nan, device=here)
                x_place[start + 3 : start + 3 + n] = x
                assert encode(codec, x_place[start + 3 : start + 3 + n], residual, out=payload) is payload
                assert torch.equal(payload, first), f"n = {n}"
                outside = torch.cat([memory[:start], memory[start + size :]])
                assert (outside == garbage).all(), f"n = {n}"
                outside_floats = torch.cat([floats[: start + 1], floats[start + 1 + n :]])
                assert (outside_floats == garbage / 3.0).all(), f"n = {n}"

                recode(codec, several, n, 2, out=payload, between=torch.full((n,), float("nan"), device=payload.device))
                assert torch.equal(payload, recode(codec, several, n, 2)), f"n = {n}"
                codec.mean(several, n, 2, residual)
                assert same(residual, codec.mean(several, n, 2)), f"n = {n}"
                outside = torch.cat([memory[:start], memory[start + size :]])
                assert (outside == garbage).all(), f"n = {n}"
                outside_floats = torch.cat([floats[: start + 1], floats[start + 1 + n :]])
                assert (outside_floats == garbage / 3.0).all(), f"n = {n}"


def inputs_are_left_as_they_were(subject: Subject) -> None:
    codec = subject.codec
    for n in (7, 5000):
        x = subject.gradient(n)
        payloads = subject.payloads(n, 2)
        x_before, payloads_before = x.clone(), payloads.clone()
        codec.encode(x)
        encode(codec, x, subject.gradient(n, seed=1))
        codec.mean(payloads, n, 2)
        recode(codec, payloads, n, 2)
        recode(codec, payloads, n, 2, subject.gradient(n, seed=1))
        assert same_bits(x, x_before)
        assert torch.equal(payloads, payloads_before)


def a_tensor_that_requires_grad_is_coded_as_its_values(subject: Subject) -> None:
    codec, x = subject.codec, subject.gradient(300)
    payload = codec.encode(x.clone().requires_grad_())
    assert torch.equal(payload, codec.encode(x))
    assert not codec.decode(payload, 300).requires_grad


def threads_at_work_together_give_the_same_bytes(subject: Subject) -> None:
    codec = subject.codec
    n, jobs = 20_000, 8

    def work(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual = subject.gradient(n, seed=seed + 100)
        payload = encode(codec, subject.gradient(n, seed), residual)
        pair = torch.cat([payload, payload])
        return payload, residual, codec.decode(payload, n), recode(codec, pair, n, 2)

    alone = [work(seed) for seed in range(jobs)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(jobs)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def a_cut_at_the_granularity_changes_nothing(subject: Subject) -> None:
    codec, x = subject.codec, subject.gradient(5000)
    for cut in (codec.granularity, 3 * codec.granularity):
        whole = torch.cat([codec.decode(codec.encode(part), part.numel()) for part in (x[:cut], x[cut:])])
        if isinstance(codec, TopK | RandomK):  # but here each part keeps its own share
            assert whole[:cut].count_nonzero() <= codec.kept(cut)
            assert 0 < whole[cut:].count_nonzero() <= codec.kept(5000 - cut)
        else:
            assert same(whole, codec.decode(codec.encode(x), 5000))


def payloads_of_a_linear_codec_may_be_summed(subject: Subject) -> None:
    codec = subject.codec
    if codec.sum_dtype is None:
        assert not codec.linear
        assert codec.exchange != "all_reduce"  # only what may be summed can be all-reduced
        return
    for n in (1, 2, 7, 1025):
        a, b = (codec.encode(subject.gradient(n, seed)) for seed in (0, 1))
        total, part = a.clone(), codec.summed(n)
        total[part].view(codec.sum_dtype).add_(b[part].view(codec.sum_dtype))
        expected = (codec.decode(a, n) + codec.decode(b, n)).to(codec.sum_dtype).float()
        assert same(codec.decode(total, n), expected)


# --- the checks: errors ------------------------------------------------------------------------------------------


def wrong_values_are_refused_with_a_sentence(subject: Subject) -> None:
    codec, x = subject.codec, subject.gradient(300)
    for wrong in (torch.arange(300), torch.ones(300, dtype=torch.bool), torch.ones(300, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=f"x has dtype {wrong.dtype}, expected one of float32, float64"):
            codec.encode(wrong)
    for shaped in (x.view(3, 100), x[::2], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=re.escape(f"x has shape {tuple(shaped.shape)}") + ".*contiguous 1-D"):
            codec.encode(shaped)


def a_wrong_residual_is_refused_and_untouched(subject: Subject) -> None:
    codec, x = subject.codec, subject.gradient(300)
    with pytest.raises(TypeError, match=r"residual has dtype torch.float64, expected torch.float32"):
        encode(codec, x, torch.zeros_like(x, dtype=torch.float64))
    payload = codec.encode(x)
    for size in (0, 299, 301):
        residual = torch.full((size,), 5.0, device=x.device)
        with pytest.raises(ValueError, match=r"residual has shape .* expected a contiguous 1-D tensor of 300 values"):
            encode(codec, x, residual)
        with pytest.raises(ValueError, match=r"residual has shape .* expected a contiguous 1-D tensor of 300 values"):
            recode(codec, payload, 300, 1, residual)
        assert (residual == 5).all()
    with pytest.raises(ValueError, match="residual has shape"):
        encode(codec, x, torch.zeros(600, device=x.device)[::2])


def a_wrong_payload_is_refused_with_a_sentence(subject: Subject) -> None:
    codec, x = subject.codec, subject.gradient(300)
    payload = codec.encode(x)
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
            lambda: recode(codec, bad, 300, 1),  # noqa: B023
            lambda: codec.encode(x, out=bad),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"{wanted}{size} bytes, got {re.escape(str(bad.dtype))}"):
                call()
    with pytest.raises(ValueError, match=rf"2 payload\(s\) of 300 values .* of {2 * size} bytes"):
        codec.mean(payload, 300, 2)
    with pytest.raises(ValueError, match=r"number of values must not be negative, got -1"):
        codec.decode(payload, -1)


def a_mean_of_nothing_is_refused(subject: Subject) -> None:
    for count in (0, -1):
        for call in (coding.mean, coding.recode):
            with pytest.raises(ValueError, match=f"at least 1, got {count}"):
                call(subject.codec, torch.empty(0, dtype=torch.uint8, device=subject.device), 300, count)


def a_wrong_out_is_refused_with_a_sentence(subject: Subject) -> None:
    codec = subject.codec
    payload = codec.encode(subject.gradient(300))
    with pytest.raises(TypeError, match=r"out has dtype torch.int32"):
        codec.decode(payload, 300, torch.zeros(300, dtype=torch.int32))
    for out in (torch.zeros(299), torch.zeros(3, 100), torch.zeros(600)[::2]):
        with pytest.raises(ValueError, match=r"out has shape .* expected a contiguous 1-D tensor of 300 values"):
            codec.decode(payload, 300, out)


# --- the checks: identity ----------------------------------------------------------------------------------------


def the_spec_round_trips(subject: Subject) -> None:
    codec = subject.codec
    assert str(codec) == codec.spec
    assert parse(str(codec)) == codec
    assert str(parse(str(codec))) == str(codec)
    assert parse(f"  {str(codec).replace('|', ' | ').replace('(', ' ( ').replace(')', ' ) ')} ") == codec
    assert parse(codec) is codec


def equal_settings_are_equal_codecs(subject: Subject) -> None:
    codec = subject.codec
    twin = parse(str(codec))
    assert twin is not codec
    assert twin == codec
    assert hash(twin) == hash(codec)
    assert copy.deepcopy(codec) == codec
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert [spec for spec in SPECS if parse(spec) == codec] == [str(codec)]


def the_repr_can_be_evaluated(subject: Subject) -> None:
    codec = subject.codec
    from commpress.comm.codecs import FAMILIES

    assert eval(repr(codec), {family.__name__: family for family in FAMILIES}) == codec


def a_codec_cannot_be_changed(subject: Subject) -> None:
    codec = subject.codec
    with pytest.raises(AttributeError):
        codec.bits = 3  # type: ignore[attr-defined]
    for field in codec.__dataclass_fields__:  # type: ignore[attr-defined]
        with pytest.raises(AttributeError):
            setattr(codec, field, None)


CODEC_CHECKS: tuple[Check, ...] = (
    nbytes_is_the_length_of_every_payload,
    nbytes_never_falls_as_values_are_added,
    relative_error_stays_below_the_stated_one,
    error_is_never_larger_than_the_input,
    lossless_means_equal,
    kernels_encode_to_the_bytes_of_the_definition,
    kernels_leave_the_residual_of_the_definition,
    kernels_decode_to_the_values_of_the_definition,
    kernels_give_the_mean_of_the_definition,
    kernels_recode_to_the_bytes_of_the_definition,
    recode_is_encode_of_the_mean,
    a_prologue_is_coded_as_what_it_makes_of_the_values,
    the_move_of_a_momentum_is_coded_as_in_a_pass_before,
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
