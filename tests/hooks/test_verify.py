"""Replicas that do not hold the same bits, and payloads that are not what was sent: every rank says whose, and of what."""

import gc
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, loss_of, network, same, train

import commpress
from commpress.comm.exchange import EXCHANGES, Transfer
from commpress.comm.exchange.label import Header
from commpress.optim import OneBitAdamW, ZeroOneAdamW

HOST = socket.gethostname()


def drifted(spec: str, bad_rank: int, name: str, at: int, verify: int, kind: str = "SGD") -> list[str]:
    """A rank's parameter changes by its last bit before step `at`; what each of six backwards says."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    optimizer: Any = None
    if kind != "SGD":
        make = OneBitAdamW if kind == "OneBitAdamW" else ZeroOneAdamW
        optimizer = make(ddp.parameters(), lr=1e-3, warmup_steps=2)
    session = commpress.attach(ddp, spec, verify=verify, **({"optimizer": optimizer} if optimizer else {}))
    optimizer = optimizer or torch.optim.SGD(ddp.parameters(), lr=0.1)
    said = []
    for step in range(6):
        if step == at and dist.get_rank() == bad_rank:
            p = dict(ddp.module.named_parameters())[name]
            held = optimizer.replica(p) if kind != "SGD" else p
            with torch.no_grad():
                held.view(-1)[:1].view(torch.int32).add_(1)
        optimizer.zero_grad()
        said.append(outcome(lambda step=step: loss_of(ddp, step).backward()))  # type: ignore[misc]
        if said[-1]:
            break
        optimizer.step()
    assert session.report().steps >= len(said) - 1
    return said


@pytest.mark.parametrize(("spec", "world_size", "bad_rank", "kind"), [
    ("int4", 2, 1, "SGD"), ("none", 3, 2, "SGD"), ("topk(0.1)|int4", 3, 0, "SGD"), ("sign", 3, 1, "OneBitAdamW"),
    ("sign", 2, 1, "ZeroOneAdamW"),
])  # fmt: skip
def test_a_parameter_that_drifts_is_named_with_its_rank(spec: str, world_size: int, bad_rank: int, kind: str) -> None:
    for said in run(world_size, drifted, spec, bad_rank, "2.weight", 4, 2, kind):
        assert said[:-1] == [""] * 4
        assert f"rank {bad_rank} ({HOST}) has other values of parameter '2.weight' in step 4" in said[-1]


def test_without_a_comparison_nobody_notices() -> None:
    for said in run(2, drifted, "int4", 1, "2.weight", 4, 0):
        assert said == [""] * 6


def test_it_is_compared_in_the_first_steps_and_every_so_many() -> None:
    for said in run(2, drifted, "int4", 1, "0.bias", 2, 1000):
        assert [bool(message) for message in said] == [False, False, True]
    for said in run(2, drifted, "int4", 1, "0.bias", 3, 5):
        assert [bool(message) for message in said] == [False] * 5 + [True]
        assert "in step 5" in said[-1]


def wrongly_decoded(spec: str, bad_rank: int) -> str:
    """A rank's mean has one wrong bit."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(ddp, spec)
    train(ddp, range(1))
    if dist.get_rank() == bad_rank:
        for kind in map(type, EXCHANGES.values()):

            def flips(self: Any, x: Any, *arguments: Any, sound: Any = kind.run) -> Iterator[Any]:
                yield from sound(self, x, *arguments)
                x[:1].view(torch.int32).add_(1)

            kind.run = flips  # type: ignore[method-assign]
    return outcome(lambda: loss_of(ddp, 1).backward())


@pytest.mark.parametrize("spec", ["int4", "none", "topk(0.1)"])
def test_a_mean_that_differs_is_named_with_its_rank(spec: str) -> None:
    for said in run(3, wrongly_decoded, spec, 1, fresh=True):
        assert f"rank 1 ({HOST}) has other values of the mean of bucket 0" in said


def damaged(spec: str, exchange: str, bad_rank: int) -> tuple[str, int]:
    """A payload that a rank receives has a flipped bit: on its way to an owner, whom all would believe. Returns what the rank
    says, and how many transfers it still holds: they keep its connections open, and other ranks waiting."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(ddp, spec, exchange=exchange)
    train(ddp, range(1))
    if dist.get_rank() == bad_rank:
        peer, sound = (bad_rank + 1) % dist.get_world_size(), Header.prove

        def flips(self: Header) -> None:
            if self.peer == peer and self.payload is not None:
                self.payload[:1] ^= 8
            sound(self)

        Header.prove = flips  # type: ignore[method-assign]
    said, deadline = outcome(lambda: loss_of(ddp, 1).backward()), time.monotonic() + 10
    while (held := transfers()) and time.monotonic() < deadline:
        time.sleep(0.01)  # the bucket that the encode thread was at
    return said, held


def transfers() -> int:
    """How many transfers this process has."""
    return sum(isinstance(one, Transfer) for one in gc.get_objects())


@pytest.mark.parametrize(("spec", "exchange"), [("int4", "two_shot"), ("sign", "one_shot"), ("topk(0.1)", "two_shot")])
def test_a_damaged_payload_is_an_error_on_all_ranks(spec: str, exchange: str) -> None:
    for said, held in run(3, damaged, spec, exchange, 1, fresh=True, group_timeout=300):
        assert "from rank 2 are not those that it sent" in said
        assert "rank 1" in said
        assert held == 0


def trained(spec: str, verify: int) -> Any:
    """Parameters and bytes of a training."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(ddp, spec, verify=verify)
    return train(ddp, range(5)).parameters, session.report().sent_bytes


@pytest.mark.parametrize("spec", ["int4", "none", slow("bf16"), slow("topk(0.1)|sign")])
def test_a_comparison_changes_nothing(spec: str) -> None:
    for compared, plain in zip(run(3, trained, spec, 1), run(3, trained, spec, 0), strict=True):
        assert same(compared[0], plain[0])
        assert compared[1] == plain[1]


def refused(verify: Any) -> str:
    """What attach says."""
    return outcome(lambda: commpress.attach(DistributedDataParallel(network()), "int4", verify=verify))


@pytest.mark.parametrize("verify", [-1, 2.5, "often"])
def test_an_interval_that_is_none_is_refused(verify: Any) -> None:
    for said in run(2, refused, verify):
        assert f"verify {verify!r}: expected a number of steps" in said


def refused_on_one() -> str:
    """Ranks with different intervals."""
    return refused(dist.get_rank() + 5)


def test_all_ranks_compare_in_the_same_steps() -> None:
    for said in run(2, refused_on_one):
        assert said == "ValueError: rank 1 has verify 6, rank 0 has verify 5: all ranks must use the same verify" or (
            "rank 1 has verify 6, rank 0 has 5" in said
        )


def drifted_anchor() -> list[str]:
    """Two syncs; then rank 1's anchor changes by a bit."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = commpress.diloco(model, optimizer, every=1)
    said = []
    for step in range(3):
        if step == 2 and dist.get_rank() == 1:
            outer._fragments[0].anchor[:1].view(torch.int32).add_(1)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        said.append(outcome(optimizer.step))
    return said


def test_an_anchor_that_drifts_is_an_error_on_all_ranks() -> None:
    for said in run(2, drifted_anchor):
        assert said[:2] == ["", ""]
        assert "rank 1 has anchor (its hash) " in said[2]
