"""The sequencer: what is on its way while something else is waited for, and what a closed exchange must not do."""

import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm.exchange import Label, Wire
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

N = 100_000


def one_waits(folder: str) -> tuple[bool, bool]:
    """Rank 1 submits nothing until rank 0's second bucket is on its way, while its first still waits for rank 1."""
    session = replicas_session("int8", dist.group.WORLD, torch.device("cpu"))
    go = Path(folder) / "go"
    gradients = [torch.full((N,), float(dist.get_rank())) for _ in range(2)]
    sent, waiting = True, True
    futures = []
    if dist.get_rank() == 1:
        while not go.exists():
            time.sleep(0.02)
    for index, gradient in enumerate(gradients):
        futures.append(session.step_buffer.submit(gradient, (Segment(str(index), N),), index, last=index == 1))
        time.sleep(0.3)  # whatever waits for the first bucket does so by now
    if dist.get_rank() == 0:
        deadline = time.monotonic() + 20
        while not (sent := session.report().rows[1].sent_bytes > 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        waiting = not futures[0].done()
        go.touch()
    for future in futures:
        future.wait()
    means = [bool(((gradient - 0.5).abs() < 0.01).all()) for gradient in gradients]
    return sent and all(means), waiting


def test_a_bucket_is_on_its_way_while_the_one_before_it_is_waited_for(tmp_path: Path) -> None:
    assert run(2, one_waits, str(tmp_path)) == [(True, True), (True, True)]


def starting_threads(spec: str) -> tuple[list[str], bool]:
    """Names of the threads in which the sums of two buckets start in a third step, and whether the means are right."""
    session = replicas_session(spec, dist.group.WORLD, torch.device("cpu"), verify=0)
    wire, threads = session.collectives[0].traffic.wire, []
    start = wire.all_reduce

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return start(*args)

    wire.all_reduce = noted  # type: ignore[method-assign]
    for _ in range(3):
        gradients = [torch.full((N,), float(dist.get_rank())) for _ in range(2)]
        for index, gradient in enumerate(gradients):
            session.step_buffer.submit(gradient, (Segment(str(index), N),), index, last=index == 1).wait()
    return threads[-2:], all(bool((gradient == 0.5).all()) for gradient in gradients)


def test_what_has_no_code_starts_in_the_callers_thread() -> None:
    # from the third step on: before, a rank that has other collectives is waited for, which the caller must not do
    assert run(2, starting_threads, "none") == [(["MainThread"] * 2, True)] * 2
    assert run(2, starting_threads, "bf16") == [(["commpress encode"] * 2, True)] * 2


class Summed(torch.autograd.Function):
    """A layer whose backward waits for the other ranks, as that of SyncBatchNorm does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class Branching(nn.Module):
    """The bucket of `sometimes` is ready before that layer's backward on a rank that does not use it, behind it on others."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.sometimes = (nn.Linear(600, 600, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = h + self.sometimes(x) if dist.get_rank() == 1 else h
        out: torch.Tensor = self.last(Summed.apply(h))  # type: ignore[no-untyped-call]
        return out


def trained_with_a_layer_that_waits(spec: str) -> bool:
    model = DistributedDataParallel(Branching(), bucket_cap_mb=1, find_unused_parameters=True)
    commpress.attach(model, spec)
    for _ in range(3):
        model(torch.ones(4, 600)).sum().backward()
        model.zero_grad()
    return True


def test_the_callers_thread_waits_for_no_other_rank() -> None:
    for spec in ("none", "int8"):
        assert run(2, trained_with_a_layer_that_waits, spec, timeout=30) == [True, True]


def closed() -> tuple[list[str], float]:
    """What a closed wire says, and a sum on the default group afterwards."""
    wire, label = Wire(dist.group.WORLD, torch.device("cpu")), Label(0, "a message")
    dist.barrier()  # the other rank has connected, too
    wire.close()
    x = torch.ones(4)
    said = [
        outcome(lambda: wire.all_reduce(x, label)),
        outcome(lambda: wire.all_gather([x.view(torch.uint8)] * 2, label, last=True)),
    ]
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return said, total.item()


def test_a_closed_exchange_sends_nothing_on_the_default_group() -> None:
    for said, total in run(2, closed):
        assert said == ["RuntimeError: the connections are closed"] * 2
        assert total == 3.0
