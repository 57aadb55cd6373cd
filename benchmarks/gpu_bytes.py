"""Whether every op of a codec on a device gives the bytes of the codec's definition. A part of `gpu_check`.

The definition runs on the CPU, in plain torch, in float32: so where a device has no kernel, its plain torch is held to the
same bytes. Inputs are those of the tests' battery (`tests/support/battery.py`), NaN, Inf, denormal and largest values among
them. Only in what is NaN may bytes differ: no two processors agree on its sign.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from passes import passes
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import Codec
from commpress.comm.prologue import Prologue
from commpress.kernels.table import lookup

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
import battery

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = 2e-6
"""By how much of the largest value the passes of the optimizers and of factors may differ: they are not the same to the bit."""


class UnequalError(RuntimeError):
    """An op gave something else than the definition. The text says which op, dtype, length and input."""


@dataclass(frozen=True)
class Inputs:
    """What a codec is tried on: lengths of gradients by dtype, and lengths at which it gets every input of the battery."""

    lengths: tuple[int, ...] = battery.LENGTHS
    """In float32."""
    short: tuple[int, ...] = (1, 257, 20_011)
    """In bfloat16 and float16."""
    named: tuple[int, ...] = (257, 5000)
    large: int = 1_000_003
    passes: tuple[int, ...] = (1, 7, 1025, 300_007)


SMALL = Inputs(lengths=(0, 1, 257), short=(257,), named=(300,), large=20_011, passes=(7, 1025))
"""Enough to try the program, not the kernels."""


class Comparison:
    """One codec on one device against its definition on the CPU. `count` says how many results were equal, `doing` what was
    called last: op, dtype, length, input."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.codec, self.device, self.count, self.doing = codec, device, 0, "nothing yet"

    def all(self, inputs: Inputs) -> int:
        """Compare on all inputs. Returns the number of comparisons; raises UnequalError."""
        for dtype in DTYPES:
            for n in inputs.lengths if dtype == torch.float32 else inputs.short:
                self.one(dtype, n, "gradient", battery.gradient(n))
                self.several(dtype, n)
            for n in inputs.named:
                for name, x in (battery.tame(n) | battery.wild(n)).items():
                    self.one(dtype, n, name, x)
        self.one(torch.float32, inputs.large, "gradient", battery.gradient(inputs.large))
        self.several(torch.float32, inputs.large)
        self.in_a_graph(inputs.large)
        return self.count

    def one(self, dtype: torch.dtype, n: int, name: str, values: Tensor) -> None:
        """Encode, encode with feedback, decode, clear, of one input."""
        codec, where = self.codec, f"{str(dtype).removeprefix('torch.')}, n = {n}, {name!r}"
        x = values.to(dtype)
        wide = x.to(torch.float32)
        expected, _ = battery.defined_encode(codec, wide)
        self.doing = f"encode, {where}"
        payload = coding.encode(codec, x.to(self.device))
        self.same_payload(payload, expected, n)
        residual = 0.25 * wide.flip(0).nan_to_num(0.5, 3.0, -3.0).clamp(-1e30, 1e30)
        expected_too, after = battery.defined_encode(codec, wide, residual)
        kept = residual.to(self.device)
        self.doing = f"encode with feedback, {where}"
        payload_too = coding.encode(codec, x.to(self.device), kept)
        self.same_payload(payload_too, expected_too, n)
        if n == 0:
            return
        assert after is not None
        decoded = codec.define_decode(expected_too, n)
        if not battery.same_residual(codec, kept.cpu(), after, wide + residual, decoded):
            self.refuse(kept, after, "residual of ")
        # of the definition's own bytes, so that one wrong op is not two
        self.doing = f"decode, {where}"
        found = codec.decode(expected.to(self.device), n, torch.empty(n, dtype=dtype, device=self.device))
        self.same_values(found, codec.define_decode(expected, n).to(dtype))
        if codec.sparse and dtype == torch.float32:
            self.doing = f"clear, {where}"
            left, cleared = x.to(self.device, copy=True), x.clone()
            coding.clear(codec, expected.to(self.device), left)
            coding.clear(codec, expected, cleared)
            self.same_values(left, cleared)

    def several(self, dtype: torch.dtype, n: int) -> None:
        """Prologue and encode, and the mean and its code, of several inputs; once with NaN and Inf among them."""
        name = str(dtype).removeprefix("torch.")
        for finite in (True, False) if n else ():
            where = f"{name}, n = {n}{'' if finite else ', NaN and Inf in it'}"
            sources = [battery.gradient(n, seed) for seed in range(3)]
            if not finite:
                sources[1][n // 2], sources[2][n // 3] = torch.nan, torch.inf
            self.behind_a_prologue(sources[1].to(dtype), where)
            self.mean_of(sources, dtype, n, f"{where}, 3 payloads")

    def behind_a_prologue(self, x: Tensor, where: str) -> None:
        """Encode with feedback what a prologue makes of x."""
        codec, n = self.codec, x.numel()
        inverse, average, residual = 0.5 + battery.normal(n, 1).abs(), battery.normal(n, 2), battery.normal(n, 3)
        scaled = x.to(torch.float32) * inverse
        made = 0.1 * scaled.clamp(-1.5, 1.5) + 0.9 * average + (scaled - scaled)
        expected, after = battery.defined_encode(codec, made, residual)
        kept = residual.to(self.device)
        prologue = Prologue(inverse.to(self.device), average.to(self.device), 1.5, 0.1, 0.9)
        self.doing = f"encode with prologue and feedback, {where}"
        payload = coding.encode(codec, x.to(self.device), kept, prologue)
        self.same_payload(payload, expected, n)
        assert after is not None
        decoded = codec.define_decode(expected, n)
        if not battery.same_residual(codec, kept.cpu(), after, made + residual, decoded):
            self.refuse(kept, after, "residual of ")

    def mean_of(self, sources: list[Tensor], dtype: torch.dtype, n: int, where: str) -> None:
        """The mean of the payloads of some inputs, and its code with and without feedback."""
        codec, count, residual = self.codec, len(sources), battery.normal(n, 4)
        payloads = torch.cat([battery.defined_encode(codec, x)[0] for x in sources])
        mean, given = codec.define_mean(payloads, n, count), payloads.to(self.device)
        self.doing = f"mean, {where}"
        found = codec.mean(given, n, count, torch.empty(n, dtype=dtype, device=self.device))
        self.same_values(found, mean.to(dtype))
        if dtype != torch.float32:
            return
        self.doing = f"recode, {where}"
        self.same_payload(coding.recode(codec, given, n, count), battery.defined_encode(codec, mean)[0], n)
        expected, after = battery.defined_encode(codec, mean, residual)
        kept, self.doing = residual.to(self.device), f"recode with feedback, {where}"
        self.same_payload(coding.recode(codec, given, n, count, kept), expected, n)
        assert after is not None
        if not battery.same_residual(codec, kept.cpu(), after, mean + residual, codec.define_decode(expected, n)):
            self.refuse(kept, after, "residual of ")

    def in_a_graph(self, n: int) -> None:
        """Encode with feedback, mean and recode in a CUDA graph, where all have kernels: none may wait for the GPU."""
        codec, device = self.codec, self.device
        if device.type != "cuda" or not has_kernels(codec, "cuda"):
            return
        self.doing = f"encode with feedback, mean and recode in a CUDA graph, float32, n = {n}"
        x, before = battery.gradient(n).to(device), battery.normal(n, 3).to(device)
        residual, out = before.clone(), torch.empty_like(x)
        expected, after = coding.encode(codec, x, before.clone()), before.clone()
        coding.encode(codec, x, after)
        mean = codec.mean(expected.repeat(2), n, 2)
        payload, again = torch.empty_like(expected), torch.empty_like(expected)
        pair = expected.repeat(2)
        recoded = coding.recode(codec, pair, n, 2)  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            coding.encode(codec, x, residual, out=payload)
            codec.mean(pair, n, 2, out)
            coding.recode(codec, pair, n, 2, None, again)
        residual.copy_(before)
        graph.replay()
        torch.cuda.synchronize()
        self.same_payload(payload, expected.cpu(), n, "payload of ")
        self.same_payload(again, recoded.cpu(), n, "recoded payload of ")
        self.same_values(residual, after.cpu(), "residual of ")
        self.same_values(out, mean.cpu(), "mean of ")

    def same_payload(self, found: Tensor, expected: Tensor, n: int, what: str = "") -> None:
        """Raise UnequalError unless the bytes are equal, or decode to the same where some are of a NaN."""
        self.count += 1
        here = found.cpu()
        if torch.equal(here, expected):
            return
        if here.shape == expected.shape and here.dtype == expected.dtype:
            one, other = (self.codec.define_decode(payload, n) for payload in (here, expected))
            if other.isnan().any() and battery.same(one, other):
                return
        self.refuse(found, expected, what)

    def same_values(self, found: Tensor, expected: Tensor, what: str = "") -> None:
        """Raise UnequalError unless the values are equal, and NaN where NaN is."""
        self.count += 1
        if not battery.same(found.cpu(), expected):
            self.refuse(found, expected, what)

    def refuse(self, found: Tensor, expected: Tensor, what: str) -> None:
        raise UnequalError(f"{self.codec}: {what}{self.doing}: {difference(found.cpu(), expected)}")


def has_kernels(codec: Codec, device: str) -> bool:
    """Whether encode, mean and recode run by kernels on this type of device."""
    return all(lookup(op, codec.word, device) is not None for op in ("encode", "mean"))


def difference(found: Tensor, expected: Tensor) -> str:
    """Return where two tensors differ, in words."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} of shape {tuple(found.shape)}, expected {expected.dtype} of {tuple(expected.shape)}"
    unequal = (found != expected) & ~(found.isnan() & expected.isnan())
    if not unequal.any():
        return "the signs of some zeros differ"
    at = int(unequal.nonzero()[0])
    kind = "bytes" if found.dtype == torch.uint8 else "values"
    return (
        f"{int(unequal.sum())} of {found.numel()} {kind} differ, the first at {at}: {found[at].item()!r}, "
        f"expected {expected[at].item()!r}"
    )


def compare_passes(device: torch.device, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield a record for each pass that codes no flat values: whether it gives on this device what it gives on the CPU."""
    errors: dict[str, str] = {}
    counts: dict[str, int] = {}
    words: dict[str, str | None] = {}
    for n in lengths:
        for here, there in zip(passes(n, device), passes(n, torch.device("cpu")), strict=True):
            counts[here.op], words[here.op] = counts.get(here.op, 0) + 1, here.word
            returned = here.call(), there.call()
            for i, (found, expected) in enumerate(zip(here.tensors, there.tensors, strict=True)):
                if not close(found.cpu(), expected, here.exact):
                    said = f"tensor {i}: {difference(found.cpu(), expected)}"
                    errors.setdefault(here.op, f"{here.op}, {here.dtype}, n = {n}, {said}")
            if returned[1] is not None and returned[0] != returned[1]:
                errors.setdefault(here.op, f"{here.op}, {here.dtype}, n = {n}: {returned[0]}, expected {returned[1]}")
    for op, count in counts.items():
        kernel = lookup(op, words[op], device.type) is not None
        yield {"op": op, "comparisons": count, "kernel": kernel, "error": errors.get(op, "")}


def close(found: Tensor, expected: Tensor, exact: bool) -> bool:
    """Whether two results are equal, up to rounding unless they shall be exact."""
    if exact or found.dtype not in DTYPES:
        return found.dtype == expected.dtype and torch.equal(found, expected)
    rounding = ROUNDING if found.dtype == torch.float32 else 2.0**-8
    most = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((found.float() - expected.float()).abs() <= rounding * most).all())
