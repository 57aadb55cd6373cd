"""Whether every op of a codec on a device gives the bytes of the codec's definition. A part of `gpu_check`.

The definition runs on the CPU, in plain torch, in float32: so where a device has no kernel, its plain torch is held to the
same bytes. Inputs are those of the tests' battery (`tests/support/battery.py`), NaN, Inf, denormal and largest values among
them. Only in what is NaN may bytes differ: no two processors agree on its sign.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from passes import Pass, passes
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import Codec
from commpress.comm.prologue import Prologue
from commpress.kernels.table import KERNELS, lookup
from commpress.launch.runtime import sentence

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
import battery

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {("recode", "randomk")}
"""Ops by word of the codec that run in plain torch on CUDA, though CPU has a kernel: docs/gpu.md has them."""
WAITING = ("count_pruned",)
"""Passes that return a number to the host, so no graph can have them."""
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
    unaligned: tuple[int, ...] = (5000,)
    """Of tensors that begin one value behind a multiple of 16 bytes, their payloads 4 bytes behind one."""
    large: int = 1_000_003
    passes: tuple[int, ...] = (1, 7, 1025, 300_007)


SMALL = Inputs(lengths=(0, 1, 257), short=(257,), named=(300,), unaligned=(300,), large=20_011, passes=(7, 1025))
"""Enough to try the program, not the kernels."""


class Comparison:
    """One codec on one device against its definition on the CPU. `count` says how many results were equal, `doing` what was
    called last: op, dtype, length, input."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.codec, self.device, self.count, self.doing = codec, device, 0, "nothing yet"
        self.shift = 0
        """How many values behind a multiple of 16 bytes all tensors begin."""

    def all(self, inputs: Inputs) -> int:
        """Compare on all inputs. Returns the number of comparisons; raises UnequalError."""
        for dtype in DTYPES:
            for n in inputs.lengths if dtype == torch.float32 else inputs.short:
                self.one(dtype, n, "gradient", battery.gradient(n))
                self.several(dtype, n)
            for n in inputs.named:
                for name, x in (battery.tame(n) | battery.wild(n)).items():
                    self.one(dtype, n, name, x)
            self.shift = 1
            for n in inputs.unaligned:
                self.one(dtype, n, "gradient", battery.gradient(n))
                self.several(dtype, n)
            self.shift = 0
        self.one(torch.float32, inputs.large, "gradient", battery.gradient(inputs.large))
        self.several(torch.float32, inputs.large)
        self.in_a_graph(inputs.large)
        return self.count

    def placed(self, x: Tensor) -> Tensor:
        """Return a copy of x on the device that begins `shift` values behind a multiple of 16 bytes; 4 bytes if x is bytes."""
        at = self.shift * (4 if x.dtype == torch.uint8 else 1)
        return torch.cat([x.new_zeros(at), x]).to(self.device)[at:]

    def room(self, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return memory for n values, placed as `placed` does."""
        return self.placed(torch.full((n,), 0x5A, dtype=dtype))

    def payload(self, x: Tensor, residual: Tensor | None = None, prologue: Prologue | None = None) -> Tensor:
        """Encode x, which is on the device."""
        return coding.encode(self.codec, x, residual, prologue, self.room(self.codec.nbytes(x.numel())))

    def where(self, dtype: torch.dtype, n: int) -> str:
        """Return in words what is compared."""
        return f"{str(dtype).removeprefix('torch.')}, n = {n}{', unaligned' if self.shift else ''}"

    def one(self, dtype: torch.dtype, n: int, name: str, values: Tensor) -> None:
        """Encode, encode with feedback, decode, clear, of one input."""
        codec, where = self.codec, f"{self.where(dtype, n)}, {name!r}"
        x = values.to(dtype)
        wide = x.to(torch.float32)
        expected, _ = battery.defined_encode(codec, wide)
        self.doing = f"encode, {where}"
        self.same_payload(self.payload(self.placed(x)), expected, n)
        residual = 0.25 * wide.flip(0).nan_to_num(0.5, 3.0, -3.0).clamp(-1e30, 1e30)
        expected_too, after = battery.defined_encode(codec, wide, residual)
        kept = self.placed(residual)
        self.doing = f"encode with feedback, {where}"
        self.same_payload(self.payload(self.placed(x), kept), expected_too, n)
        if n == 0:
            return
        assert after is not None
        decoded = codec.define_decode(expected_too, n)
        if not battery.same_residual(codec, kept.cpu(), after, wide + residual, decoded):
            self.refuse(kept, after, "residual of ")
        # of the definition's own bytes, so that one wrong op is not two
        self.doing = f"decode, {where}"
        found = codec.decode(self.placed(expected), n, self.room(n, dtype))
        self.same_values(found, codec.define_decode(expected, n).to(dtype))
        if codec.sparse and dtype == torch.float32:
            self.doing = f"clear, {where}"
            left, cleared = self.placed(x), x.clone()
            coding.clear(codec, self.placed(expected), left)
            coding.clear(codec, expected, cleared)
            self.same_values(left, cleared)

    def several(self, dtype: torch.dtype, n: int) -> None:
        """Prologue and encode, and the mean and its code, of several inputs; once with NaN and Inf among them."""
        for finite in (True, False) if n else ():
            where = f"{self.where(dtype, n)}{'' if finite else ', NaN and Inf in it'}"
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
        kept = self.placed(residual)
        prologue = Prologue(self.placed(inverse), self.placed(average), 1.5, 0.1, 0.9)
        self.doing = f"encode with prologue and feedback, {where}"
        self.same_payload(self.payload(self.placed(x), kept, prologue), expected, n)
        assert after is not None
        decoded = codec.define_decode(expected, n)
        if not battery.same_residual(codec, kept.cpu(), after, made + residual, decoded):
            self.refuse(kept, after, "residual of ")

    def mean_of(self, sources: list[Tensor], dtype: torch.dtype, n: int, where: str) -> None:
        """The mean of the payloads of some inputs, and its code with and without feedback."""
        codec, count, residual = self.codec, len(sources), battery.normal(n, 4)
        payloads = torch.cat([battery.defined_encode(codec, x)[0] for x in sources])
        mean, given = codec.define_mean(payloads, n, count), self.placed(payloads)
        self.doing = f"mean, {where}"
        found = codec.mean(given, n, count, self.room(n, dtype))
        self.same_values(found, mean.to(dtype))
        if dtype != torch.float32:
            return
        self.doing = f"recode, {where}"
        out = self.room(codec.nbytes(n))
        self.same_payload(coding.recode(codec, given, n, count, None, out), battery.defined_encode(codec, mean)[0], n)
        expected, after = battery.defined_encode(codec, mean, residual)
        kept, self.doing = self.placed(residual), f"recode with feedback, {where}"
        self.same_payload(coding.recode(codec, given, n, count, kept, out), expected, n)
        assert after is not None
        if not battery.same_residual(codec, kept.cpu(), after, mean + residual, codec.define_decode(expected, n)):
            self.refuse(kept, after, "residual of ")

    def in_a_graph(self, n: int) -> None:
        """Run every op in a CUDA graph, where encode and mean have kernels: none may wait for the GPU. A CPU has no graph."""
        codec, device = self.codec, self.device
        if not has_kernels(codec, device.type):
            return
        self.doing = f"encode, also with feedback and behind a prologue, mean, recode, clear in a CUDA graph, n = {n}"
        x, spent, average, left, residual, behind, owner = (battery.gradient(n, s).to(device) for s in range(7))
        prologue, size = Prologue(0.5 + average.abs(), average, 1.5, 0.1, 0.9), codec.nbytes(n)
        whole, kept, late, recoded, again = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(5))
        pair, out = coding.encode(codec, x).repeat(2), torch.empty_like(x)
        between = torch.empty_like(x)

        def run() -> None:
            coding.encode(codec, x, out=whole)
            coding.encode(codec, x, residual, out=kept)
            coding.encode(codec, spent, behind, prologue, late)
            codec.mean(pair, n, 2, out)
            coding.recode(codec, pair, n, 2, None, recoded, between)
            coding.recode(codec, pair, n, 2, owner, again, between)
            coding.clear(codec, pair[:size], left)

        made = {"payload": whole, "payload with feedback": kept, "payload behind a prologue": late}
        made |= {
            "recoded payload": recoded,
            "recoded payload with feedback": again,
            "mean": out,
            "cleared values": left,
        }
        made |= {"residual": residual, "residual behind a prologue": behind, "owner's residual": owner}
        for what, (found, expected) in zip(made, replayed(run, [*made.values(), spent], device), strict=False):
            self.count += 1
            if not equal(found.cpu(), expected.cpu()):
                self.refuse(found, expected, f"{what} of ")

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
    """Whether encode and mean run by kernels on this type of device."""
    return all(lookup(op, codec.word, device) is not None for op in ("encode", "mean"))


def lacking(word: str | None, device: str) -> list[str]:
    """Return the ops of a codec's word that have a kernel on CPU and should have one on this type of device, but have none."""
    ops = [op for op, of, place in list(KERNELS) if (of, place) == (word, "cpu") and (op, word) not in PLAIN]
    return [op for op in ops if lookup(op, word, device) is None]


def replayed(run: Callable[[], Any], tensors: list[Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Call `run`, then replay a graph of it from the same values of `tensors`: return each, and what the call left in it."""
    before = [x.clone() for x in tensors]
    run()
    expected = [x.clone() for x in tensors]
    replay = captured(run, device)
    for x, value in zip(tensors, before, strict=True):
        x.copy_(value)
    replay()
    return list(zip(tensors, expected, strict=True))


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return what replays a CUDA graph of what `run` starts; `run` itself on a CPU, which has no graphs."""
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, and NaN where NaN is."""
    return battery.same(a, b) if a.dtype.is_floating_point else torch.equal(a, b)


def difference(found: Tensor, expected: Tensor) -> str:
    """Return where two tensors differ, in words."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} of shape {tuple(found.shape)}, expected {expected.dtype} of {tuple(expected.shape)}"
    found, expected = found.flatten(), expected.flatten()
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
    """Yield a record for each pass that codes no flat values: whether it gives on this device what it gives on the CPU.

    Where it has a kernel, a CUDA graph must give that, too.
    """
    errors: dict[str, str] = {}
    counts: dict[str, int] = {}
    words: dict[str, str | None] = {}
    for n in lengths:
        for here, there, graphed in zip(passes(n, device), passes(n, CPU), passes(n, device), strict=True):
            counts[here.op], words[here.op] = counts.get(here.op, 0) + 1, here.word
            try:
                said = compared(here, there)
                if not said and here.op not in WAITING and lookup(here.op, here.word, device.type) is not None:
                    counts[here.op], said = counts[here.op] + 1, compared_in_a_graph(graphed, device)
            except Exception as error:  # a kernel that cannot be compiled, started or captured
                said = sentence(error)
            if said:
                errors.setdefault(here.op, f"{here.op}, {here.dtype}, n = {n}, {said}")
    for op, count in counts.items():
        kernel = lookup(op, words[op], device.type) is not None
        lacks = (
            f"{op}: no kernel on {device.type}, it runs in plain torch" if op in lacking(words[op], device.type) else ""
        )
        yield {"op": op, "comparisons": count, "kernel": kernel, "error": errors.get(op, lacks)}


def compared(here: Pass, there: Pass) -> str:
    """Run a pass on two devices. Return in words how the results differ; "" if they do not."""
    returned = here.call(), there.call()
    for i, (found, expected) in enumerate(zip(here.tensors, there.tensors, strict=True)):
        if not close(found.cpu(), expected, here.exact):
            return f"tensor {i}: {difference(found.cpu(), expected)}"
    if returned[1] is not None and returned[0] != returned[1]:
        return f"{returned[0]}, expected {returned[1]}"
    return ""


def compared_in_a_graph(fresh: Pass, device: torch.device) -> str:
    """Run a pass, and replay it in a CUDA graph. Return in words how the results differ; "" if they do not."""
    for i, (found, expected) in enumerate(replayed(fresh.call, fresh.tensors, device)):
        if not equal(found.cpu(), expected.cpu()):
            return f"in a CUDA graph, tensor {i}: {difference(found.cpu(), expected.cpu())}"
    return ""


def close(found: Tensor, expected: Tensor, exact: bool) -> bool:
    """Whether two results are equal, up to rounding unless they shall be exact, and NaN and Inf where the other is."""
    if exact or found.dtype not in DTYPES:
        return found.dtype == expected.dtype and equal(found, expected)
    finite = expected.isfinite()
    if not equal(found.where(~finite, 0.0), expected.where(~finite, 0.0)):
        return False
    rounding = ROUNDING if found.dtype == torch.float32 else 2.0**-8
    found, expected = found[finite].float(), expected[finite].float()
    most = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((found - expected).abs() <= rounding * most).all())
