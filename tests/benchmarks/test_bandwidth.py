"""The bandwidth benchmark runs, its figures fit together, and it refuses to time a codec that moves garbage."""

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from commands import started_by_torchrun
from ranks import outcome, run
from tiers import slow
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bandwidth

from commpress.comm.codecs import Codec, parse
from commpress.comm.codecs.integer import Int8
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.kernels import table
from commpress.kernels.cpu import integer

CPU = torch.device("cpu")
ROW = {
    *("size", "spec", "exchange", "seconds", "quartiles", "sent_bytes", "kernel_bytes"),
    *("algorithm_bandwidth", "bus_bandwidth", "ratio"),
}


def started(arguments: list[str], port: int) -> str:
    """What the benchmark prints on this rank."""
    said = contextlib.redirect_stdout(io.StringIO())
    with started_by_torchrun(port), said as out, mock.patch.object(sys, "argv", ["bandwidth.py", *arguments]):
        bandwidth.main()
    return out.getvalue()


@pytest.mark.slow
def test_it_runs_and_its_figures_fit_together(tmp_path: Path) -> None:
    path = tmp_path / "bandwidth.json"
    asked = ["bf16", "int4", "topk(0.01)|int4", "--to", "1mb", "--repeats", "2", "--json", str(path)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said, silent = run(2, started, asked, store.port)
    assert not silent
    record = json.loads(path.read_text())
    assert record["what"] == "bandwidth"
    assert (record["world_size"], record["backend"], record["link"]["shaped"]) == (2, "gloo", False)
    assert set(record["link"]) == {"hosts", "ranks_per_host", "rate", "delay", "loss", "shaped", "relayed"}
    every = {"two_shot", "one_shot", "hierarchical(1)"}
    exchanges = {"dense": {"all_reduce"}, "bf16": {"all_reduce", *every}, "int4": every, "topk(0.01)|int4": every}
    for size in (2**16, 2**18, 2**20):
        rows = [row for row in record["rows"] if row["size"] == size]
        assert {s: {row["exchange"] for row in rows if row["spec"] == s} for s in exchanges} == exchanges
        assert len(rows) == 11
        for row in rows:
            assert set(row) == ROW
            assert row["algorithm_bandwidth"] == pytest.approx(size / row["seconds"])
            assert row["bus_bandwidth"] == row["algorithm_bandwidth"]  # 2 (W - 1) / W is 1 for two ranks
            if (row["spec"], row["exchange"]) == ("int4", "one_shot"):
                assert row["sent_bytes"] == Plan.of("int4").codec.nbytes(size // 4)
            assert row["kernel_bytes"] is None  # on loopback the counter is that of all ranks
    assert len(record["rows"]) == 33
    last = said.strip().splitlines()[-1]
    assert last.startswith("faster than dense: bf16 ")
    assert all(spec in last for spec in ("int4", "topk(0.01)|int4"))


def test_senseless_sizes_are_refused() -> None:
    assert bandwidth.size_of("64kb") == 2**16
    assert bandwidth.size_of("1MB") == 2**20
    assert (bandwidth.shown(2**16), bandwidth.shown(2**28), bandwidth.shown(5)) == ("64 KB", "256 MB", "5 B")
    with pytest.raises(Exception, match=r"size 'large'.*such as 64kb"):
        bandwidth.size_of("large")


@dataclass(frozen=True)
class Garbled(Int8):
    """int8 whose kernel decodes one value of each block wrongly."""

    word: ClassVar[str] = "garbled"

    @staticmethod
    def encode_values(codec: Codec, x: Tensor, residual: Tensor | None, prologue: None, payload: Tensor) -> None:
        integer.encode(Int8(), x, residual, prologue, payload)

    @staticmethod
    def decode_mean(codec: Codec, payloads: Tensor, count: int, out: Tensor) -> None:
        integer.mean(Int8(), payloads, count, out)
        out[7::256] += 0.25

    @staticmethod
    def recode_values(codec: Codec, *arguments: Any) -> None:
        integer.recode(Int8(), *arguments)


@dataclass(frozen=True)
class Empty(Int8):
    """A codec that sends nothing of use, and owns up to it: its memories hold all."""

    word: ClassVar[str] = "empty"

    @staticmethod
    def encode_values(codec: Codec, x: Tensor, residual: Tensor | None, prologue: None, payload: Tensor) -> None:
        payload.zero_()
        if residual is not None:
            residual += x

    @staticmethod
    def recode_values(codec: Codec, *arguments: Any) -> None:
        integer.recode(Int8(), *arguments)

    @staticmethod
    def decode_mean(codec: Codec, payloads: Tensor, count: int, out: Tensor) -> None:
        out.zero_()


@dataclass(frozen=True)
class Own(Garbled):
    """A codec that decodes differently on every rank."""

    word: ClassVar[str] = "own"

    @staticmethod
    def decode_mean(codec: Codec, payloads: Tensor, count: int, out: Tensor) -> None:
        integer.mean(Int8(), payloads, count, out)
        out[0] += 1e-6 * torch.distributed.get_rank()


def put_in_table(codec: Codec | str) -> None:
    """Give a codec of these its kernels."""
    if isinstance(codec, Garbled | Empty):
        table.KERNELS["encode", codec.word, "cpu"] = table.Kernel(codec.encode_values)
        table.KERNELS["mean", codec.word, "cpu"] = table.Kernel(codec.decode_mean)
        table.KERNELS["recode", codec.word, "cpu"] = table.Kernel(codec.recode_values)


def by_nodes(*codecs: Codec) -> list[str]:
    """What the check says of each codec by `hierarchical(2)`."""
    gradient = torch.randn(2**14, generator=torch.Generator().manual_seed(dist.get_rank()))
    said = []
    for codec in codecs:
        put_in_table(codec)
        session = replicas_session(codec, dist.group.WORLD, CPU, exchange="hierarchical(2)", verify=0)
        case = bandwidth.Case(2**16, str(codec), "hierarchical(2)", session)
        said.append(outcome(lambda case=case: bandwidth.check(case, gradient, 0)))
    return said


def test_garbage_between_nodes_is_not_timed() -> None:
    for garbled, empty, own, sound in run(4, by_nodes, Garbled(), Empty(), Own(), Int8()):
        assert garbled.startswith("GarbageError: garbled by hierarchical(2), 64 KB: a value is off by 0.25 beyond what")
        assert empty.startswith(
            "GarbageError: empty by hierarchical(2), 64 KB: what was left out is as large as the mean"
        )
        assert own.startswith("GarbageError: own by hierarchical(2), 64 KB: the ranks hold different bits")
        assert sound == ""


def named_exchanges(spec: str, *local_world_sizes: str) -> list[list[str]]:
    found = []
    for size in local_world_sizes:
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": size}):
            found.append(bandwidth.exchanges(parse(spec)))
    return found


def test_nodes_are_those_of_torchrun_and_the_halves_of_a_node_that_has_all_ranks() -> None:
    of_four, of_two = run(4, named_exchanges, "int4", "2", "1", "4", "3")[0], run(2, named_exchanges, "bf16", "2")[0]
    assert of_four == [["two_shot", "one_shot", f"hierarchical({node})"] for node in (2, 1, 2, 2)]
    assert of_two == [["all_reduce", "two_shot", "one_shot", "hierarchical(1)"]]


def measured(*codecs: Codec | str) -> list[str]:
    return [outcome(lambda c=c: measure(c)) for c in codecs]


def measure(codec: Codec | str) -> None:
    put_in_table(codec)
    bandwidth.measure([codec], [2**16, 2**18], 1, CPU)


@pytest.mark.parametrize(
    ("codec", "complaint"),
    [
        slow(Garbled(), "a value is off by 0.25 beyond what error feedback remembers"),
        (Empty(), "what was left out is as large as the gradient"),
        (Own(), "the ranks hold different bits"),
    ],
)
def test_garbage_is_not_timed(codec: Codec, complaint: str) -> None:
    for (said,) in run(2, measured, codec):
        assert said.startswith(f"GarbageError: {codec.word} by two_shot, 64 KB: ")
        assert complaint in said


@pytest.mark.parametrize(("world_size", "specs"), [
    (2, ("none", "bf16", "fp16", "int8", "int4", "sign", "topk(0.01)", "topk(0.05)|sign")),
    slow(3, ("bf16", "int4", "topk(0.05)|sign")),
    slow(4, ("bf16", "int4", "topk(0.05)|sign", "randomk(0.1)")),
])  # fmt: skip
def test_what_is_sound_passes(world_size: int, specs: tuple[str, ...]) -> None:
    assert run(world_size, measured, *specs) == [[""] * len(specs)] * world_size
