"""What is timed of a codec, and the bytes that it must move. For `codecs`, `passes` and `gpu_check`."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from copies import Times, in_turns

import commpress
from commpress.comm import coding
from commpress.comm.codecs import Codec
from commpress.comm.codecs.random_k import RandomK
from commpress.comm.exchange import EXCHANGES
from commpress.comm.prologue import Prologue
from commpress.kernels.cpu import slices
from commpress.launch.run_record import machine

SPECS = (
    "bf16",
    "fp16",
    "fp8",
    "fp8(e5m2)",
    "int8",
    "int8(stochastic)",
    "int4",
    "int4(stochastic)",
    "int2",
    "sign",
    "topk(0.1)|int4",
    "topk(0.1)|sign",
    "topk(0.01)",
    "topk(0.01)|int4",
    "topk(0.001)|int4",
    "randomk(0.1)",
    "randomk(0.01)",
    "randomk(0.1)|int4",
    "rotate|int4",
    "rotate|sign",
)
ACTIONS = ("encode", "feedback", "momentum", "decode", "mean of 4", "recode 4")
MB = {"cpu": 26.2144, "cuda": 134.217728}
"""Sizes of the gradient. On a GPU a copy of it moves more than the cache of any holds."""

Key = tuple[int, str, str]
"""Threads, spec, action."""
COPY = ("a copy", "copy")
"""Spec and action of a memory copy that is cut into as many slices as there are threads, as the loops are."""


def name_of(device: torch.device) -> str:
    """The name of the processor or of the GPU."""
    here = machine(device)
    return str(here["accelerator"] or here["processor"])


def actions(x: torch.Tensor, codec: Codec) -> dict[str, Callable[[], object]]:
    """Return what is timed of a codec on x, by action. Memory is allocated beforehand, as in training."""
    n = x.numel()
    payload, residual, out = codec.encode(x), torch.zeros_like(x), torch.empty_like(x)
    four, chunk = payload.repeat(4), torch.empty_like(payload)
    update = Prologue(torch.ones_like(x), x.clone(), limit=2.8, fresh=0.1, kept=0.9)
    gradient = x.clone()  # some codecs leave the update in it
    table: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(x, out=payload),
        "feedback": lambda: coding.encode(codec, x, residual, out=payload),
        "momentum": lambda: coding.encode(codec, gradient, residual, update, payload),
        "decode": lambda: codec.decode(payload, n, out),
        "mean of 4": lambda: codec.mean(four, n, 4, out),
    }
    if EXCHANGES[codec.exchange].chunk(n, codec, 0, 2) is not None or coding.fuses_recode(codec, x.device):
        table["recode 4"] = lambda: coding.recode(codec, four, n, 4, None, chunk, out)
    return table


def moved(codec: Codec, action: str, n: int) -> int:
    """Return the bytes that an action on n float32 values must read and write."""
    values, payload = 4 * n, codec.nbytes(n)
    drawn = 4 * codec.kept(n) if isinstance(codec, RandomK) else values  # it knows beforehand which it sends
    return {
        "encode": drawn + payload,
        "feedback": 3 * values + payload,
        "momentum": 5 * values + payload,
        "decode": payload + values,
        "mean of 4": 4 * payload + values,
        "recode 4": 5 * payload,
    }[action]


def copied_in_slices(x: torch.Tensor) -> Callable[[], object]:
    """Return a call that copies x, a slice a thread: no loop that moves memory can gain more by threads."""
    target, line = torch.empty_like(x), 1024

    def copied(begin: int, end: int) -> None:
        target[begin * line : end * line].copy_(x[begin * line : end * line])

    return lambda: slices.in_slices(copied, x.numel(), line)


def on(threads: int, what: str, call: Callable[[], object]) -> Callable[[], object]:
    """Return a call that finds so many idle cores, and whose error says what it was."""

    def called() -> object:
        try:
            with mock.patch.object(slices, "idle_cores", return_value=threads):
                return call()
        except Exception as error:
            raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error

    return called


def measured(
    x: torch.Tensor, specs: Sequence[str], threads: Sequence[int], repeat: int
) -> tuple[list[float], Times[Key]]:
    """The seconds of copies of x, and by threads, spec and action the seconds of each case.

    For several numbers of threads of COPY, too.
    """
    at_once = [[spec] for spec in specs] if x.device.type == "cuda" else [list(specs)]  # a GPU may have less memory
    copies: list[float] = []
    times: Times[Key] = {}
    for group in at_once:
        cases = {(spec, action): call for spec in group for action, call in actions(x, commpress.parse(spec)).items()}
        if len(threads) > 1:
            cases[COPY] = copied_in_slices(x)
        calls = {
            (count, spec, action): on(count, f"{action}, float32, n = {x.numel()}", call)
            for (spec, action), call in cases.items()
            for count in threads
        }
        more_copies, more = in_turns(calls, x, repeat)
        copies += more_copies
        times |= more
    return copies, times


def rows_of(times: Times[Key], threads: int, specs: Sequence[str], copy: float, n: int) -> list[dict[str, Any]]:
    """Rows of the tables: by spec the bits a value, the copies that each action takes, and its bytes a second."""
    rows: list[dict[str, Any]] = []
    for spec in specs:
        codec = commpress.parse(spec)
        seconds = {a: statistics.median(times[threads, spec, a]) for a in ACTIONS if (threads, spec, a) in times}
        rates = {a: moved(codec, a, n) / taken for a, taken in seconds.items()}
        copies = {a: taken / copy for a, taken in seconds.items()}
        rows.append({"spec": spec, "bits": 8 * codec.nbytes(n) / n, **copies, "bytes_per_second": rates})
    return rows


def gains_of(times: Times[Key], least: int, threads: int, specs: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of how many times as fast each action is on `threads` as on `least`, the copy first."""
    rows: list[dict[str, Any]] = []
    for spec, actions_of in [(COPY[0], COPY[1:]), *((spec, ACTIONS) for spec in specs)]:
        pairs = {a: (times.get((least, spec, a)), times.get((threads, spec, a))) for a in actions_of}
        gains = {
            a: statistics.median(one) / statistics.median(more) for a, (one, more) in pairs.items() if one and more
        }
        rows.append({"spec": spec, **gains})
    return rows
